//! Minute candles to a trained, evaluated forecaster. `cargo run --release --example bitcoin -- --help`

use std::process::ExitCode;

fn main() -> ExitCode {
    mamba_ssm_examples::bitcoin::main(std::env::args_os())
}

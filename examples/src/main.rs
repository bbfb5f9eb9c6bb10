//! The example `bitcoin` as a binary, for the tests.

use std::process::ExitCode;

fn main() -> ExitCode {
    mamba_ssm_examples::bitcoin::main(std::env::args_os())
}

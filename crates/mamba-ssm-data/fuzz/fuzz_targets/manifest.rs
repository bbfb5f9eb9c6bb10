#![no_main]

use mamba_ssm_data_fuzz::{allow_caught_panics, load, set};

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    allow_caught_panics();
    let folder = set();
    std::fs::write(folder.join("manifest.json"), bytes).expect("a writable folder");
    load(&folder);
});

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    mamba_ssm_data_fuzz::read("source.csv", bytes);
});

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    mamba_ssm_data_fuzz::allow_caught_panics();
    let mut file = b"PAR1".to_vec();
    file.extend_from_slice(bytes.strip_prefix(b"PAR1").unwrap_or(bytes));
    mamba_ssm_data_fuzz::read("source.parquet", &file);
});

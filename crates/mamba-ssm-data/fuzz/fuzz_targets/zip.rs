#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let mut archive = b"PK\x03\x04".to_vec();
    archive.extend_from_slice(bytes.strip_prefix(b"PK\x03\x04").unwrap_or(bytes));
    mamba_ssm_data_fuzz::read("source.zip", &archive);
});

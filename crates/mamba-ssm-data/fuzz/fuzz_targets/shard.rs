#![no_main]

use mamba_ssm_data_fuzz::{allow_caught_panics, load, set};
use serde_json::{Value, json};

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    allow_caught_panics();
    let folder = set();
    let path = folder.join("manifest.json");
    let text = std::fs::read(&path).expect("a manifest");
    let mut manifest: Value = serde_json::from_slice(&text).expect("a manifest");
    let shard = &mut manifest["shards"][0];
    // The input has no checksum to guess: what is behind it shall be reached.
    shard["bytes"] = json!(bytes.len());
    shard["xxh3"] = json!(format!("{:016x}", xxhash_rust::xxh3::xxh3_64(bytes)));
    let file = shard["file"].as_str().expect("a path");
    std::fs::write(folder.join(file), bytes).expect("a writable folder");
    std::fs::write(path, manifest.to_string()).expect("a writable folder");
    load(&folder);
});

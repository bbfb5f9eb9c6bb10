//! Every kind of bad input is answered by an error that says where and what.

use std::path::Path;

use mamba_ssm_data::{
    Dataset, Error, OrderPolicy, PrepareOptions, ReadOptions, Split, prepare, read_series,
};

use crate::support::{HEADER, candle_rows, candles, folder, small_windows, write};

/// The message for a file with this content.
fn message_for(content: impl AsRef<[u8]>) -> String {
    let dir = folder();
    let path = write(dir.path(), "candles.csv", content);
    let message = read_series(&path, &ReadOptions::default())
        .expect_err("bad input must be refused")
        .to_string();
    assert!(
        message.contains("candles.csv"),
        "the file is not named: {message}"
    );
    message
}

/// Asserts that a message has all of these words.
fn has(message: &str, words: &[&str]) {
    for word in words {
        assert!(message.contains(word), "`{word}` is missing in: {message}");
    }
}

#[test]
fn no_such_file() {
    let error = read_series("nowhere/candles.csv", &ReadOptions::default()).unwrap_err();
    assert!(matches!(error, Error::NotFound { .. }));
    has(&error.to_string(), &["nowhere/candles.csv", "no such file"]);
}

#[test]
fn a_folder_instead_of_a_file() {
    let dir = folder();
    let error = read_series(dir.path(), &ReadOptions::default()).unwrap_err();
    has(&error.to_string(), &["folder"]);
}

#[test]
fn empty_file() {
    has(&message_for(""), &["empty"]);
    has(&message_for("\n\n  \n"), &["empty"]);
}

#[test]
fn header_alone() {
    has(&message_for(HEADER), &["no rows"]);
    has(&message_for(HEADER.trim_end()), &["no rows"]);
}

#[test]
fn wrong_columns() {
    let message = message_for("Timestamp,Open,High,Low,Price\n60,1,1,1,1\n");
    has(&message, &["missing", "`Close`, `Volume`", "`Price`"]);
    has(&message_for("60,1,1,1,1,1\n"), &["6 numbers", "header"]);
}

#[test]
fn a_word_where_a_number_belongs() {
    let rows = candle_rows(0..3);
    let message = message_for(format!("{HEADER}{rows}1600000300,1,2,cheap,1,1\n"));
    has(&message, &["row 5", "`Low`", "`cheap`", "a number"]);
    let message = message_for(format!("{HEADER}yesterday,1,2,1,1,1\n"));
    has(&message, &["row 2", "`Timestamp`", "`yesterday`"]);
    let message = message_for(format!("{HEADER}{rows}\"1600000300\",\"1,5\",1,1,1,1\n"));
    has(&message, &["row 5", "`Open`", "`1,5`"]);
}

#[test]
fn the_row_is_right_far_into_a_large_file() {
    let good = candle_rows(0..150_000);
    let message = message_for(format!("{HEADER}{good}\n1699999999,1,1,1,x,1\n"));
    has(&message, &["row 150003", "`Close`"]);
}

#[test]
fn rows_cut_short_and_rows_too_long() {
    has(
        &message_for(format!("{HEADER}60,1,2,1,1\n")),
        &["row 2", "5 cells", "6"],
    );
    has(
        &message_for(format!("{HEADER}60,1,2,1,1,1,9\n")),
        &["row 2", "7 cells"],
    );
    has(
        &message_for(format!("{HEADER}60,1,2,1,1,1\n12")),
        &["row 3", "1 cells"],
    );
}

#[test]
fn timestamps_out_of_order_or_repeated() {
    let row = |t: i64| format!("{t},1,1,1,1,1\n");
    let message = message_for(format!("{HEADER}{}{}", row(120), row(60)));
    has(&message, &["row 3", "60", "120", "sort"]);
    let message = message_for(format!("{HEADER}{}{}", row(60), row(60)));
    has(&message, &["row 3", "repeats"]);
    // Across the border of two chunks, too.
    let good = candle_rows(0..80_000);
    has(
        &message_for(format!("{HEADER}{good}{}", row(60))),
        &["row 80002"],
    );
}

#[test]
fn the_sort_policy_sorts_and_keeps_the_last_of_each_timestamp() {
    let dir = folder();
    let text = format!("{HEADER}120,1,1,1,1,1\n60,2,2,2,2,2\n120,3,3,3,3,3\n");
    let path = write(dir.path(), "c.csv", text);
    let options = ReadOptions::default().with_order(OrderPolicy::Sort);
    let series = read_series(&path, &options).unwrap();
    assert_eq!(series.timestamps, [60, 120]);
    assert_eq!(series.columns[0], [2.0, 3.0]);
}

#[test]
fn zero_and_negative_prices() {
    has(
        &message_for(format!("{HEADER}60,1,1,0,1,1\n")),
        &["row 2", "`Low`", "above zero"],
    );
    has(
        &message_for(format!("{HEADER}60,1,-3,1,1,1\n")),
        &["row 2", "`High`", "-3"],
    );
    has(
        &message_for(format!("{HEADER}60,1,1,1,1,-1\n")),
        &["row 2", "`Volume`", "zero or more"],
    );
}

#[test]
fn a_gzip_cut_short() {
    use std::io::Write;
    let mut zip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    zip.write_all(candles(5000).as_bytes()).unwrap();
    let bytes = zip.finish().unwrap();
    has(&message_for(&bytes[..bytes.len() / 2]), &["gzip", "row"]);
    // Far into a large file: the lines that came before are counted.
    let mut zip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    zip.write_all(candles(150_000).as_bytes()).unwrap();
    let bytes = zip.finish().unwrap();
    let message = message_for(&bytes[..bytes.len() - 1000]);
    let (_, row) = message.split_once("behind row ").unwrap();
    let row: usize = row.trim_end_matches(')').parse().unwrap();
    assert!((50_000..150_000).contains(&row), "{message}");
}

#[test]
fn one_endless_line() {
    has(&message_for(vec![b'7'; 5 << 20]), &["row 1", "longer than"]);
    let message = message_for(format!("{HEADER}60,1,1,1,1,1\n{}", "7".repeat(5 << 20)));
    has(&message, &["row 3", "longer than"]);
}

#[test]
fn no_rows_in_the_range_of_time() {
    let dir = folder();
    let path = write(dir.path(), "c.csv", candles(10));
    let options = ReadOptions::default().with_from(4_000_000_000);
    has(
        &read_series(&path, &options).unwrap_err().to_string(),
        &["no rows from 2096"],
    );
}

#[test]
fn fewer_rows_than_a_window_and_a_split_without_one() {
    for (rows, words) in [(10, ["10 rows", "16"]), (100, ["validation", "16"])] {
        let dir = folder();
        let path = write(dir.path(), "c.csv", candles(rows));
        let out = dir.path().join("out");
        let options = PrepareOptions::new(&path, &out).with_windows(small_windows());
        let message = prepare(&options).unwrap_err().to_string();
        has(&message, &["c.csv"]);
        has(&message, &words);
        assert!(!out.exists());
    }
}

#[test]
fn another_files_columns_under_a_runs_transform() {
    let dir = folder();
    prepared(dir.path());
    let data = Dataset::open(dir.path().join("set")).unwrap();
    let path = write(dir.path(), "later.csv", candles(100));
    let mut read = ReadOptions::default();
    read.schema.columns.pop();
    let series = read_series(path, &read).unwrap();
    let (transform, windows) = (data.transform().clone(), small_windows());
    let error = Dataset::with_transform(series, transform, &windows, Split::Test).unwrap_err();
    has(&error.to_string(), &["later.csv", "`volume (log1p)`"]);
}

/// A small set, and the path of its only shard.
fn prepared(dir: &Path) -> std::path::PathBuf {
    let csv = write(dir, "c.csv", candles(1000));
    prepare(&PrepareOptions::new(&csv, dir.join("set")).with_windows(small_windows())).unwrap();
    let data = Dataset::open(dir.join("set")).unwrap();
    dir.join("set")
        .join(&data.manifest().unwrap().shards[0].file)
}

#[test]
fn a_shard_cut_short() {
    let dir = folder();
    let shard = prepared(dir.path());
    let bytes = std::fs::read(&shard).unwrap();
    std::fs::write(&shard, &bytes[..bytes.len() - 7]).unwrap();
    let message = Dataset::open(dir.path().join("set"))
        .unwrap_err()
        .to_string();
    has(&message, &["part-00000.parquet", "cut short"]);
}

#[test]
fn a_shard_altered() {
    let dir = folder();
    let shard = prepared(dir.path());
    let mut bytes = std::fs::read(&shard).unwrap();
    bytes[100] ^= 1;
    std::fs::write(&shard, &bytes).unwrap();
    let data = Dataset::open(dir.path().join("set")).unwrap();
    let message = data.rows().unwrap_err().to_string();
    has(&message, &["part-00000.parquet", "checksum"]);
}

#[test]
fn a_shard_missing() {
    let dir = folder();
    let shard = prepared(dir.path());
    std::fs::remove_file(&shard).unwrap();
    let message = Dataset::open(dir.path().join("set"))
        .unwrap_err()
        .to_string();
    has(&message, &["part-00000.parquet", "missing"]);
}

#[test]
fn a_folder_without_a_set() {
    let dir = folder();
    let message = Dataset::open(dir.path()).unwrap_err().to_string();
    has(&message, &["manifest.json", "prepare"]);
    assert!(matches!(
        Dataset::open(dir.path().join("no")),
        Err(Error::NotFound { .. })
    ));
}

#[test]
fn manifests_that_cannot_be_used() {
    let dir = folder();
    prepared(dir.path());
    let path = dir.path().join("set/manifest.json");
    let text = std::fs::read_to_string(&path).unwrap();
    let refused = |change: &dyn Fn(String) -> String, words: &[&str]| {
        std::fs::write(&path, change(text.clone())).unwrap();
        let message = Dataset::open(dir.path().join("set"))
            .unwrap_err()
            .to_string();
        has(&message, &["manifest.json"]);
        has(&message, words);
    };
    refused(&|t| t[..t.len() / 2].into(), &["not a manifest"]);
    refused(
        &|t| t.replace("\"version\": 1", "\"version\": 99"),
        &["version is 99"],
    );
    refused(&|t| t.replace("\"rows\": 1000", "\"rows\": 999"), &["rows"]);
    refused(&|t| t.replace("set-000001/", "../../"), &["outside"]);
    refused(
        &|t| t.replace("\"length\": 16", "\"length\": 1000"),
        &["window"],
    );
    refused(&|t| t.replacen("\"sources\"", "\"sauces\"", 1), &["sauces"]);
}

#[test]
fn an_unknown_split_is_empty_and_a_bad_batch_is_named() {
    use mamba_ssm_data::LoaderOptions;
    let dir = folder();
    prepared(dir.path());
    let data = Dataset::open(dir.path().join("set")).unwrap();
    let message = data
        .loader(Split::Train, &LoaderOptions::new(0))
        .unwrap_err()
        .to_string();
    has(&message, &["batch"]);
    let options = LoaderOptions::new(1).sharded(2, 2);
    has(
        &data.loader(Split::Train, &options).unwrap_err().to_string(),
        &["rank"],
    );
}

#[test]
fn a_url_as_output() {
    let dir = folder();
    let path = write(dir.path(), "c.csv", candles(100));
    let error = prepare(&PrepareOptions::new(path, "s3://bucket/set")).unwrap_err();
    has(&error.to_string(), &["s3://bucket/set", "upload"]);
}

#[cfg(not(feature = "remote"))]
#[test]
fn a_url_in_a_build_without_remote_sets() {
    let message = Dataset::open("s3://bucket/set").unwrap_err().to_string();
    has(&message, &["s3://bucket/set", "feature `remote`"]);
}

//! Whatever bytes a source, a shard or a manifest holds: rows, or an error that names the file.

use std::io::Write;
use std::path::Path;
use std::sync::{Arc, LazyLock};

use arrow::array::{ArrayRef, Float64Array, Int64Array};
use arrow::record_batch::RecordBatch;
use mamba_ssm_data::{
    ColumnSpec, Dataset, LoaderOptions, OrderPolicy, PrepareOptions, ReadOptions, Scale, Schema,
    Split, WindowOptions, prepare, read_series,
};
use parquet::arrow::ArrowWriter;
use proptest::prelude::*;
use proptest::sample::Index;

use crate::support::{candles, folder, write};

/// A change to a file.
#[derive(Debug, Clone)]
enum Edit {
    Set(Index, u8),
    Insert(Index, Vec<u8>),
    Remove(Index, usize),
    Repeat(Index, usize),
    CutAt(Index),
}

fn edit() -> impl Strategy<Value = Edit> {
    let telling = prop::sample::select(&b",\n\r\"-.0eN\xff\x00\x80"[..]);
    let byte = prop_oneof![telling, any::<u8>()];
    prop_oneof![
        8 => (any::<Index>(), byte.clone()).prop_map(|(at, b)| Edit::Set(at, b)),
        3 => (any::<Index>(), prop::collection::vec(byte, 1..8)).prop_map(|(at, b)| Edit::Insert(at, b)),
        2 => (any::<Index>(), 1usize..40).prop_map(|(at, n)| Edit::Remove(at, n)),
        2 => (any::<Index>(), 1usize..40).prop_map(|(at, n)| Edit::Repeat(at, n)),
        1 => any::<Index>().prop_map(Edit::CutAt),
    ]
}

fn edited(seed: &[u8], edits: &[Edit]) -> Vec<u8> {
    let mut bytes = seed.to_vec();
    for edit in edits {
        if bytes.is_empty() {
            break;
        }
        let length = bytes.len();
        let span = |at: &Index, n: usize| {
            let at = at.index(length);
            at..(at + n).min(length)
        };
        match edit {
            Edit::Set(at, byte) => bytes[at.index(length)] = *byte,
            Edit::Insert(at, more) => {
                bytes.splice(span(at, 0), more.iter().copied());
            }
            Edit::Remove(at, n) => {
                bytes.drain(span(at, *n));
            }
            Edit::Repeat(at, n) => {
                let copy = bytes[span(at, *n)].to_vec();
                bytes.splice(span(at, 0), copy);
            }
            Edit::CutAt(at) => bytes.truncate(at.index(length)),
        }
    }
    bytes
}

/// A table in every format that sources come in.
static SOURCES: LazyLock<Vec<(&str, Vec<u8>)>> = LazyLock::new(|| {
    let text = candles(40);
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gzip.write_all(text.as_bytes()).unwrap();
    let mut archive = zip::ZipWriter::new(std::io::Cursor::new(Vec::new()));
    archive
        .start_file("c.csv", zip::write::SimpleFileOptions::default())
        .unwrap();
    archive.write_all(text.as_bytes()).unwrap();
    let quoted = text.replace(',', "\",\"").replace('\n', "\"\n\"");
    vec![
        ("plain.csv", text.clone().into_bytes()),
        ("quoted.csv", format!("\"{quoted}").into_bytes()),
        ("candles.csv.gz", gzip.finish().unwrap()),
        ("candles.zip", archive.finish().unwrap().into_inner()),
        ("candles.parquet", parquet()),
    ]
});

/// A Parquet file of raw candles.
fn parquet() -> Vec<u8> {
    let times: ArrayRef = Arc::new(Int64Array::from_iter_values((0..40).map(|i| i * 60)));
    let prices: ArrayRef = Arc::new(Float64Array::from_iter_values(
        (0..40).map(|i| 1.0 + f64::from(i % 7)),
    ));
    let named = ["Open", "High", "Low", "Close", "Volume"].map(|name| (name, prices.clone()));
    let columns = std::iter::once(("Timestamp", times)).chain(named);
    let batch = RecordBatch::try_from_iter(columns).unwrap();
    let mut bytes = Vec::new();
    let mut writer = ArrowWriter::try_new(&mut bytes, batch.schema(), None).unwrap();
    writer.write(&batch).unwrap();
    writer.close().unwrap();
    bytes
}

/// A set of one shard: its folder, the shard's bytes, and the manifest.
fn small_set() -> (tempfile::TempDir, Vec<u8>, serde_json::Value) {
    let dir = folder();
    let csv = write(dir.path(), "c.csv", candles(100));
    let windows = WindowOptions {
        length: 4,
        stride: 2,
        ..WindowOptions::default()
    };
    prepare(&PrepareOptions::new(csv, dir.path().join("set")).with_windows(windows)).unwrap();
    let text = std::fs::read(dir.path().join("set/manifest.json")).unwrap();
    let manifest: serde_json::Value = serde_json::from_slice(&text).unwrap();
    let file = manifest["shards"][0]["file"].as_str().unwrap();
    let shard = std::fs::read(dir.path().join("set").join(file)).unwrap();
    (dir, shard, manifest)
}

/// Opens a set and reads it in both ways; returns whether all of it could be read.
fn reads(folder: &Path) -> bool {
    let data = match Dataset::open(folder) {
        Ok(data) => data,
        Err(error) => {
            assert!(error.to_string().contains("set"), "{error}");
            return false;
        }
    };
    let paged = data
        .loader(Split::Train, &LoaderOptions::new(4))
        .and_then(|loader| loader.collect::<mamba_ssm_data::Result<Vec<_>>>());
    for batch in paged.iter().flatten() {
        assert_eq!(batch.values.len(), batch.batch * 4 * 5);
    }
    let whole = data.rows();
    if let Ok(rows) = &whole {
        assert_eq!(rows.values.len(), rows.timestamps.len() * rows.width);
    }
    paged.is_ok() && whole.is_ok()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 128, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn edited_sources_give_rows_or_an_error_that_names_them(
        which in any::<Index>(),
        edits in prop::collection::vec(edit(), 0..6),
    ) {
        let (name, seed) = which.get(&SOURCES);
        let dir = folder();
        let path = write(dir.path(), name, edited(seed, &edits));
        for order in [OrderPolicy::Refuse, OrderPolicy::Sort] {
            match read_series(&path, &ReadOptions::default().with_order(order)) {
                Ok(series) => {
                    prop_assert!(series.timestamps.windows(2).all(|w| w[0] < w[1]));
                    prop_assert!(series.columns.iter().all(|c| c.len() == series.len()));
                    prop_assert_eq!(series.valid.len(), series.len());
                }
                Err(error) => prop_assert!(error.to_string().contains(name), "{}", error),
            }
        }
    }

    /// The manifest is made to fit the altered shard, so that its checksum does not save the reader.
    #[test]
    fn edited_shards_give_rows_or_an_error(edits in prop::collection::vec(edit(), 0..5)) {
        let (dir, shard, mut manifest) = small_set();
        let bytes = edited(&shard, &edits);
        let entry = &mut manifest["shards"][0];
        entry["bytes"] = bytes.len().into();
        entry["xxh3"] = format!("{:016x}", xxhash_rust::xxh3::xxh3_64(&bytes)).into();
        let file = dir.path().join("set").join(entry["file"].as_str().unwrap());
        std::fs::write(file, &bytes).unwrap();
        std::fs::write(dir.path().join("set/manifest.json"), manifest.to_string()).unwrap();
        let read = reads(&dir.path().join("set"));
        prop_assert!(read || bytes != shard);
    }

    #[test]
    fn edited_manifests_give_rows_or_an_error(edits in prop::collection::vec(edit(), 1..4)) {
        let (dir, _, manifest) = small_set();
        let text = manifest.to_string();
        let path = dir.path().join("set/manifest.json");
        std::fs::write(path, edited(text.as_bytes(), &edits)).unwrap();
        reads(&dir.path().join("set"));
    }

    /// Numbers come back as they were written, however they are written.
    #[test]
    fn what_is_written_is_read(
        rows in prop::collection::vec((1i64..5000, -1e6..1e6f64, 0usize..5, prop::bool::weighted(0.1)), 1..60),
    ) {
        let mut time = 1_600_000_000;
        let mut expected = Vec::new();
        let mut text = String::from("note,value,time\n");
        for (step, value, style, missing) in rows {
            time += step;
            let cell = match style {
                _ if missing => String::new(),
                0 => format!("{value}"),
                1 => format!("{value:e}"),
                2 => format!("\"{value}\""),
                3 => format!(" {value} "),
                _ => format!("{value:.3}"),
            };
            let stamp = if style == 1 { format!("{time}.0") } else { time.to_string() };
            text += &format!("x,{cell},{stamp}\n");
            let read = cell.trim_matches(['"', ' ']).parse().unwrap_or(f64::NAN);
            expected.push((time, read));
        }
        let dir = folder();
        let path = write(dir.path(), "numbers.csv", text);
        let schema = Schema {
            time: ColumnSpec::new("time", Scale::Identity),
            columns: vec![ColumnSpec::new("value", Scale::Identity)],
            step: 1,
        };
        let series = read_series(path, &ReadOptions::default().with_schema(schema)).unwrap();
        prop_assert_eq!(series.len(), expected.len());
        for (row, (time, value)) in expected.into_iter().enumerate() {
            prop_assert_eq!(series.timestamps[row], time);
            prop_assert_eq!(series.columns[0][row].to_bits(), value.to_bits());
            prop_assert_eq!(series.valid[row], !value.is_nan());
        }
    }
}

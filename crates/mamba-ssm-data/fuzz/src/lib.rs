//! What the targets share.

use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use mamba_ssm_data::{
    Dataset, GapPolicy, LoaderOptions, OrderPolicy, PrepareOptions, RawSeries, ReadOptions, Split,
    WindowOptions, prepare, read_series,
};
use tempfile::TempDir;

/// A folder in memory, where there is one: every input is written to a file.
static FOLDER: LazyLock<TempDir> = LazyLock::new(|| {
    let memory = Path::new("/dev/shm");
    match memory.is_dir() {
        true => tempfile::tempdir_in(memory),
        false => tempfile::tempdir(),
    }
    .expect("a temporary folder")
});

/// A path in the folder of this process.
pub fn scratch(name: &str) -> PathBuf {
    FOLDER.path().join(name)
}

/// Reads these bytes as a source, under both order policies.
pub fn read(name: &str, bytes: &[u8]) {
    let path = scratch(name);
    std::fs::write(&path, bytes).expect("a writable folder");
    for order in [OrderPolicy::Refuse, OrderPolicy::Sort] {
        match read_series(&path, &ReadOptions::default().with_order(order)) {
            Ok(series) => {
                assert!(!series.is_empty());
                assert!(series.timestamps.windows(2).all(|w| w[0] < w[1]));
                assert!(series.columns.iter().all(|c| c.len() == series.len()));
                window(&series);
            }
            Err(error) => assert!(error.to_string().contains(name), "{error}"),
        }
    }
}

/// Cuts a series into windows under every policy of gaps.
fn window(series: &RawSeries) {
    for gaps in [
        GapPolicy::Split,
        GapPolicy::Fill { limit: 3 },
        GapPolicy::Mask { min_valid: 0.5 },
        GapPolicy::Ignore,
    ] {
        let windows = WindowOptions {
            length: 2,
            stride: 1,
            gaps,
            fractions: [1.0, 0.0, 0.0],
            ..WindowOptions::default()
        };
        if let Ok(data) = Dataset::in_memory(series.clone(), &windows) {
            let rows = data.rows().expect("rows in memory");
            assert!(rows.values.iter().all(|v| v.is_finite()));
            let last = data.starts(Split::Train).last().copied();
            assert!(last.is_some_and(|start| start + 2 <= rows.len() as u64));
        }
    }
}

/// The folder of a small set: one shard of 40 rows.
pub fn set() -> PathBuf {
    let out = scratch("set");
    if !out.exists() {
        let csv = scratch("set.csv");
        let mut text = String::from("Timestamp,Open,High,Low,Close,Volume\n");
        for minute in 0..40 {
            let price = 100 + minute % 10;
            text += &format!(
                "{},{price},{price},{price},{price},{}\n",
                minute * 60,
                minute % 3
            );
        }
        std::fs::write(&csv, text).expect("a writable folder");
        let windows = WindowOptions {
            length: 2,
            stride: 1,
            ..WindowOptions::default()
        };
        prepare(&PrepareOptions::new(csv, &out).with_windows(windows)).expect("a small set");
    }
    out
}

/// Opens the set and reads it in both ways.
pub fn load(folder: &Path) {
    let Ok(data) = Dataset::open(folder) else {
        return;
    };
    if let Ok(loader) = data.loader(Split::Train, &LoaderOptions::new(4)) {
        for batch in loader.take(8) {
            match batch {
                Ok(batch) => assert_eq!(
                    batch.values.len(),
                    batch.batch * batch.length * batch.features
                ),
                Err(_) => break,
            }
        }
    }
    if let Ok(rows) = data.rows() {
        assert_eq!(rows.values.len(), rows.timestamps.len() * rows.width);
    }
}

/// Panics that a reader catches and answers with an error are no findings; the others still end the process.
pub fn allow_caught_panics() {
    static ONCE: LazyLock<()> = LazyLock::new(|| std::panic::set_hook(Box::new(|_| {})));
    LazyLock::force(&ONCE);
}

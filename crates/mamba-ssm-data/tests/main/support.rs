//! Small files to read.

use std::path::{Path, PathBuf};

use mamba_ssm_data::WindowOptions;
use tempfile::TempDir;

/// A header of the Kaggle layout.
pub const HEADER: &str = "Timestamp,Open,High,Low,Close,Volume\n";

/// A folder that is removed in the end.
pub fn folder() -> TempDir {
    tempfile::tempdir().expect("a temporary folder")
}

/// Writes a file and returns its path.
pub fn write(folder: &Path, name: &str, content: impl AsRef<[u8]>) -> PathBuf {
    let path = folder.join(name);
    std::fs::write(&path, content).expect("a writable folder");
    path
}

/// The price of a minute of [`candles`].
pub fn price(minute: usize) -> f64 {
    100.0 + (minute * 7 % 31) as f64 * 0.25
}

/// Rows of the Kaggle layout, one a minute, without a header.
pub fn candle_rows(minutes: std::ops::Range<usize>) -> String {
    minutes
        .map(|m| {
            let p = price(m);
            let volume = (m % 5) as f64 * 0.5;
            format!(
                "{},{p},{},{},{p},{volume}\n",
                1_600_000_020 + m * 60,
                p + 1.0,
                p - 1.0
            )
        })
        .collect()
}

/// A file of the Kaggle layout.
pub fn candles(minutes: usize) -> String {
    format!("{HEADER}{}", candle_rows(0..minutes))
}

/// Small windows.
pub fn small_windows() -> WindowOptions {
    WindowOptions {
        length: 16,
        stride: 4,
        ..WindowOptions::default()
    }
}

/// A Python that has this package, by `MAMBA_TEST_PYTHON` or as `python3`; says so when there is none.
pub fn python(package: &str) -> Option<PathBuf> {
    let program = std::env::var_os("MAMBA_TEST_PYTHON").unwrap_or_else(|| "python3".into());
    let found = std::process::Command::new(&program)
        .args(["-c", &format!("import {package}")])
        .stderr(std::process::Stdio::null())
        .status()
        .is_ok_and(|s| s.success());
    if !found {
        eprintln!(
            "skipped: {} has no package `{package}` (MAMBA_TEST_PYTHON names another Python)",
            Path::new(&program).display()
        );
    }
    found.then(|| program.into())
}

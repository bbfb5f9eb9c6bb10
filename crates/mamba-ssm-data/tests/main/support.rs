//! Small files to read.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use mamba_ssm_data::WindowOptions;
use tempfile::TempDir;

/// A header of the Kaggle layout.
pub const HEADER: &str = "Timestamp,Open,High,Low,Close,Volume\n";

/// A folder that is removed in the end.
pub fn folder() -> TempDir {
    tempfile::tempdir().expect("a temporary folder")
}

/// The names in a folder, sorted.
pub fn names_in(folder: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(folder).expect("a folder");
    let mut names: Vec<String> = entries
        .map(|e| e.expect("an entry").file_name().to_string_lossy().into())
        .collect();
    names.sort();
    names
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

/// This test binary, about to run one ignored test as a process of its own; `before` are words to put before it.
pub fn child_process(before: &[&str], test: &str) -> Command {
    let binary = std::env::current_exe().expect("the path of this program");
    let mut words = before
        .iter()
        .map(std::ffi::OsString::from)
        .chain([binary.into_os_string()]);
    let mut command = Command::new(words.next().expect("the program"));
    command
        .args(words)
        .args(["--exact", test, "--ignored", "--nocapture"])
        .stdout(Stdio::piped())
        .stderr(Stdio::null());
    command
}

/// A Python that has this package, by `MAMBA_TEST_PYTHON` or as `python3`; says so when there is none.
pub fn python(package: &str) -> Option<PathBuf> {
    let program = std::env::var_os("MAMBA_TEST_PYTHON").unwrap_or_else(|| "python3".into());
    let found = Command::new(&program)
        .args(["-c", &format!("import {package}")])
        .stderr(Stdio::null())
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

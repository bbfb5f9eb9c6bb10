//! A folder with a small generated market, and the commands run on it.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use mamba_ssm_data::synthetic::{MarketConfig, generate, write_csv};
use tempfile::TempDir;

/// Settings small enough for a test.
pub const TINY: &str = "batch = 4\nwindows_per_epoch = 16\n\
    [model]\nd_model = 16\nn_layer = 1\nd_state = 8\nheaddim = 8\nexpand = 2\nn_heads = 2\n\
    [train]\nepochs = 1\naccumulation = 2\nmax_val_batches = 2\n";

/// Exit code of a command that could not do what it was asked for.
pub const FAILED: i32 = 1;
/// Exit code of a command line that makes no sense.
pub const WRONG_ARGUMENTS: i32 = 2;

pub struct Workshop {
    folder: TempDir,
}

impl Workshop {
    /// An empty one.
    pub fn new() -> Self {
        let folder = tempfile::tempdir().expect("a folder for the test");
        Self { folder }
    }

    /// One with `market.csv` of so many minutes, without gaps, and `tiny.toml`.
    pub fn with_market(minutes: usize) -> Self {
        let shop = Self::new();
        let candles = generate(&MarketConfig::new(minutes).with_seed(3).with_gaps(false));
        write_csv(&shop.path("market.csv"), &candles).expect("writing the market");
        shop.write("tiny.toml", TINY);
        shop
    }

    /// As [`with_market`](Self::with_market), with prepared shards in `shards`, windows of 64 rows.
    pub fn with_shards(minutes: usize) -> Self {
        let shop = Self::with_market(minutes);
        shop.must("prepare --csv @market.csv --out @shards --length 64 --stride 32");
        shop
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub fn write(&self, name: &str, content: impl AsRef<[u8]>) {
        fs::write(self.path(name), content).expect("writing into the test's folder");
    }

    pub fn read(&self, name: &str) -> String {
        fs::read_to_string(self.path(name)).unwrap_or_else(|e| panic!("{name}: {e}"))
    }

    pub fn json(&self, name: &str) -> serde_json::Value {
        serde_json::from_str(&self.read(name)).unwrap_or_else(|e| panic!("{name}: {e}"))
    }

    /// A command line in the folder; words with an `@` in front become paths in it.
    pub fn command(&self, line: &str) -> Command {
        let word = |word: &str| match word.split_once('@') {
            Some((before, name)) => {
                let mut whole = OsString::from(before);
                whole.push(self.path(name));
                whole
            }
            None => word.into(),
        };
        let mut command = Command::new(env!("CARGO_BIN_EXE_bitcoin"));
        command
            .args(line.split_whitespace().map(word))
            .current_dir(self.folder.path());
        command
    }

    fn run(&self, line: &str) -> Output {
        let output = self.command(line).output();
        output.unwrap_or_else(|error| panic!("`{line}` cannot be started: {error}"))
    }

    /// Asserts that a command succeeds; returns its standard output.
    pub fn must(&self, line: &str) -> String {
        let output = self.run(line);
        let error = text(&output.stderr);
        assert!(output.status.success(), "`{line}` failed: {error}");
        text(&output.stdout)
    }

    /// Asserts that a command fails, that it says so on standard error alone, and that the message holds
    /// every one of `words`.
    pub fn fails(&self, line: &str, words: &[&str]) {
        self.fails_with(FAILED, line, words);
    }

    /// As [`fails`](Self::fails), for arguments that make no sense together.
    pub fn refuses(&self, line: &str, words: &[&str]) {
        self.fails_with(WRONG_ARGUMENTS, line, words);
    }

    fn fails_with(&self, code: i32, line: &str, words: &[&str]) {
        let output = self.run(line);
        let error = text(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "`{line}` says: {error}");
        assert!(error.starts_with("error: "), "`{line}` says: {error}");
        for word in words {
            assert!(
                error.contains(word),
                "`{line}` says: {error}\n(expected `{word}` in it)"
            );
        }
        assert_eq!(text(&output.stdout), "", "`{line}`: standard output");
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Rewrites a file's content.
pub fn edit(path: &Path, change: impl FnOnce(String) -> String) {
    let text = fs::read_to_string(path).expect("reading what is to be edited");
    fs::write(path, change(text)).expect("writing what was edited");
}

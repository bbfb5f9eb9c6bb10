//! A folder with a small generated market, and the commands run on it in this process.

use std::fs;
use std::path::{Path, PathBuf};

use mamba_ssm_data::synthetic::{MarketConfig, generate, write_csv};
use mamba_ssm_examples::bitcoin;
use tempfile::TempDir;

/// Settings small enough for a test.
pub const TINY: &str = "batch = 4\nwindows_per_epoch = 16\n\
    [model]\nd_model = 16\nn_layer = 1\nd_state = 8\nheaddim = 8\nexpand = 2\nn_heads = 2\n\
    [train]\nepochs = 1\naccumulation = 2\nmax_val_batches = 2\n";

pub struct Workshop {
    folder: TempDir,
}

impl Workshop {
    /// An empty one.
    pub fn new() -> Self {
        let folder = tempfile::tempdir().expect("a folder for the test");
        Self { folder }
    }

    /// One with `market.csv` of so many minutes.
    pub fn with_market(minutes: usize) -> Self {
        let shop = Self::new();
        let candles = generate(&MarketConfig::new(minutes).with_seed(3).with_gaps(false));
        write_csv(&shop.path("market.csv"), &candles).expect("writing the market");
        shop.write("tiny.toml", TINY);
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

    /// Runs a command line; words with an `@` in front become paths in the folder.
    pub fn run(&self, line: &str) -> Result<(), String> {
        let word = |word: &str| match word.strip_prefix('@') {
            Some(name) => self.path(name).into_os_string(),
            None => word.into(),
        };
        let args: Vec<_> = std::iter::once("bitcoin")
            .chain(line.split_whitespace())
            .map(word)
            .collect();
        bitcoin::run(args).map_err(|error| error.to_string())
    }

    pub fn must(&self, line: &str) {
        self.run(line)
            .unwrap_or_else(|error| panic!("`{line}` failed: {error}"));
    }

    /// Asserts that a command fails and that its message holds every one of `words`.
    pub fn fails(&self, line: &str, words: &[&str]) {
        let error = self.run(line).expect_err(&format!("`{line}` must fail"));
        for word in words {
            assert!(
                error.contains(word),
                "`{line}` says: {error}\n(expected `{word}` in it)"
            );
        }
    }

    /// Prepared shards in `shards`, windows of 64 rows.
    pub fn prepare(&self) {
        self.must("prepare --csv @market.csv --out @shards --length 64 --stride 32");
    }
}

/// Rewrites a file's content.
pub fn edit(path: &Path, change: impl FnOnce(String) -> String) {
    let text = fs::read_to_string(path).expect("reading what is to be edited");
    fs::write(path, change(text)).expect("writing what was edited");
}

//! Memory is bounded by a setting, not by the size of a file or a set.
//!
//! What a process has needed at most is what Linux keeps count of.

use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use mamba_ssm_data::{
    Dataset, LoaderOptions, OrderPolicy, PrepareOptions, ReadOptions, Split, WindowOptions, prepare,
};

use crate::support::{HEADER, child_process, folder, price};

const TASK: &str = "MAMBA_TEST_TASK";
const FROM: &str = "MAMBA_TEST_FROM";
const TO: &str = "MAMBA_TEST_TO";

/// Bytes of rows that a child may hold.
const MEMORY: usize = 4 << 20;

/// Rows of the smaller and of the larger source, whose rows take 78 MB in memory.
const ROWS: [usize; 2] = [400_000, 1_600_000];

/// The most memory that this process has needed so far, in bytes.
fn peak() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|l| l.starts_with("VmHWM:")).unwrap();
    let kilobytes: usize = line.split_whitespace().nth(1).unwrap().parse().unwrap();
    kilobytes * 1024
}

/// Not a test: what the other tests run as a process of its own. Says how much its task has needed.
#[test]
#[ignore = "the child process of other tests"]
fn child() {
    let word = |name| std::env::var(name).unwrap_or_else(|_| panic!("{name} is not set"));
    let from = word(FROM);
    let before = match word(TASK).as_str() {
        "load" => load(&from),
        task => {
            let order = match task {
                "sort" => OrderPolicy::Sort,
                _ => OrderPolicy::Refuse,
            };
            let windows = WindowOptions {
                length: 256,
                stride: 128,
                ..WindowOptions::default()
            };
            let options = PrepareOptions::new(from, word(TO))
                .with_windows(windows)
                .with_read(ReadOptions::default().with_order(order))
                .with_memory_bytes(MEMORY);
            prepare(&options).unwrap();
            0
        }
    };
    println!("peak {}", peak() - before);
}

/// Goes through a shuffled epoch; returns what the process had needed before.
fn load(set: &str) -> usize {
    let data = Dataset::open(set).unwrap();
    let before = peak();
    let options = LoaderOptions::new(16)
        .shuffled(1)
        .with_workers(2, 2)
        .with_memory_bytes(MEMORY);
    let mut windows = 0;
    for batch in data.loader(Split::Train, &options).unwrap() {
        windows += batch.unwrap().batch;
    }
    assert_eq!(windows, data.starts(Split::Train).len());
    before
}

/// What a task has needed at most, in megabytes.
fn needed(task: &str, from: &Path, to: &Path) -> usize {
    let output = child_process(&[], "bounds::child")
        .env(TASK, task)
        // What is on its way grows with the number of threads.
        .env("RAYON_NUM_THREADS", "2")
        .env(FROM, from)
        .env(TO, to)
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{text}");
    let peak = text
        .split("peak ")
        .nth(1)
        .unwrap_or_else(|| panic!("{text}"));
    let bytes: usize = peak.split_whitespace().next().unwrap().parse().unwrap();
    bytes >> 20
}

/// Candles, by row from the first minute to the last or the other way round.
fn source(folder: &Path, rows: usize, backwards: bool) -> PathBuf {
    let path = folder.join(format!("{rows}-{backwards}.csv"));
    let mut out = BufWriter::new(std::fs::File::create(&path).unwrap());
    out.write_all(HEADER.as_bytes()).unwrap();
    for row in 0..rows {
        let minute = if backwards { rows - row } else { row };
        let (time, p) = (1_600_000_020 + 60 * minute, price(minute));
        writeln!(out, "{time},{p},{p},{p},{p},{}", minute % 5).unwrap();
    }
    out.flush().unwrap();
    path
}

/// So many candles, backwards, in so many files that overlap from end to end; returns the pattern that matches them.
fn overlapping(folder: &Path, rows: usize, files: usize) -> PathBuf {
    let folder = folder.join(files.to_string());
    std::fs::create_dir(&folder).unwrap();
    for file in 0..files {
        let mut text = String::from(HEADER);
        for minute in (0..rows).rev().filter(|m| m % files == file) {
            let (time, p) = (1_600_000_020 + 60 * minute, price(minute));
            text += &format!("{time},{p},{p},{p},{p},1\n");
        }
        std::fs::write(folder.join(format!("{file}.csv")), text).unwrap();
    }
    folder.join("*.csv")
}

#[test]
fn more_files_to_sort_need_no_more_memory() {
    let dir = folder();
    let set = dir.path().join("set");
    let [few, many] = [2, 32].map(|files| {
        let pattern = overlapping(dir.path(), ROWS[0], files);
        needed("sort", &pattern, &set)
    });
    println!("{few} MB, {many} MB");
    assert!(many < few + 16, "{few} MB, {many} MB");
    assert_eq!(Dataset::open(&set).unwrap().len(), ROWS[0]);
}

#[test]
fn four_times_the_rows_need_no_more_memory() {
    let dir = folder();
    for (task, backwards) in [("prepare", false), ("sort", true)] {
        let set = dir.path().join(task);
        let [small, large] = ROWS.map(|rows| {
            let preparing = needed(task, &source(dir.path(), rows, backwards), &set);
            (preparing, needed("load", &set, &set))
        });
        println!("{task}: {small:?} MB, {large:?} MB");
        // The rows that are more take 58 MB while they are prepared, and 24 MB in batches.
        assert!(large.0 < small.0 + 32, "{task}: {small:?} MB, {large:?} MB");
        assert!(large.1 < small.1 + 16, "load: {small:?} MB, {large:?} MB");
        let data = Dataset::open(&set).unwrap();
        assert_eq!(data.len(), ROWS[1]);
        let close = data.transform().invert(3, data.rows().unwrap().row(9)[3]);
        assert!((close - price(if backwards { 10 } else { 9 })).abs() < 1e-4);
    }
}

//! A set is the old one or the new one, whenever `prepare` is killed and wherever the disk ends.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use mamba_ssm_data::synthetic::{MarketConfig, generate, write_csv};
use mamba_ssm_data::{Dataset, Normalised, PrepareOptions, prepare, read_series};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use crate::support::{child_process, folder, names_in, small_windows};

const SOURCE: &str = "MAMBA_TEST_SOURCE";
const OUTPUT: &str = "MAMBA_TEST_OUTPUT";
const MEMORY: &str = "MAMBA_TEST_MEMORY";

fn options(source: impl AsRef<Path>, output: impl AsRef<Path>) -> PrepareOptions {
    // Shards of one row group each, so that there are several files to be killed between.
    PrepareOptions::new(source.as_ref(), output.as_ref())
        .with_windows(small_windows())
        .with_shard_bytes(1)
}

/// A file of made-up candles, which do not compress as well as regular ones.
fn market(folder: &Path, name: &str, minutes: usize) -> PathBuf {
    let path = folder.join(name);
    write_csv(&path, &generate(&MarketConfig::new(minutes))).unwrap();
    path
}

/// Not a test: what the other tests run as a process of its own.
#[test]
#[ignore = "the child process of other tests"]
fn child() {
    let place = |name| std::env::var(name).unwrap_or_else(|_| panic!("{name} is not set"));
    let memory = place(MEMORY).parse().unwrap();
    let options = options(place(SOURCE), place(OUTPUT)).with_memory_bytes(memory);
    if let Err(error) = prepare(&options) {
        println!("refused: {error}");
        std::process::exit(7);
    }
}

/// A process that prepares a source.
fn child_command(before: &[&str], source: &Path, output: &Path, memory: usize) -> Command {
    let mut command = child_process(before, "unbreakable::child");
    command
        .env(SOURCE, source)
        .env(OUTPUT, output)
        .env(MEMORY, memory.to_string());
    command
}

/// What a folder must hold after preparing this source.
fn rows_of(source: &Path) -> Normalised {
    let series = read_series(source, &Default::default()).unwrap();
    let data = Dataset::in_memory(series, &small_windows()).unwrap();
    (*data.rows().unwrap()).clone()
}

/// The rows of a set, every checksum verified.
fn rows_in(folder: &Path) -> Normalised {
    (*Dataset::open(folder).unwrap().rows().unwrap()).clone()
}

#[test]
fn killed_at_any_moment_the_set_is_the_old_one_or_the_new_one() {
    let dir = folder();
    let sources = [
        market(dir.path(), "a.csv", 150_000),
        market(dir.path(), "b.csv", 200_000),
    ];
    let contents = [rows_of(&sources[0]), rows_of(&sources[1])];
    let out = dir.path().join("set");

    let begun = Instant::now();
    let status = child_command(&[], &sources[0], &out, 1 << 20).status();
    assert!(status.unwrap().success());
    let whole = begun.elapsed();
    let mut now = 0;
    let mut random = StdRng::seed_from_u64(3);
    let mut killed = 0;
    for _ in 0..25 {
        let next = 1 - now;
        let mut child = child_command(&[], &sources[next], &out, 1 << 20)
            .spawn()
            .unwrap();
        std::thread::sleep(random.random_range(Duration::ZERO..whole.mul_f64(1.1)));
        child.kill().unwrap();
        killed += usize::from(!child.wait().unwrap().success());
        let found = rows_in(&out);
        now = match found == contents[next] {
            true => next,
            false => now,
        };
        assert!(
            found == contents[now],
            "neither the old set nor the new one"
        );
    }
    assert!(killed > 0, "no child was killed while it ran");

    // What the killed ones have left behind goes with the next one that ends well.
    prepare(&options(&sources[0], &out)).unwrap();
    assert!(rows_in(&out) == contents[0]);
    let names = names_in(&out);
    assert_eq!(names.len(), 3, "{names:?}");
    assert_eq!(names[..2], [".lock", "manifest.json"]);
}

/// A limit on the size of files stands for the end of the disk: the write that reaches it fails.
#[cfg(unix)]
#[test]
fn a_write_that_fails_leaves_the_old_set() {
    let dir = folder();
    let old = market(dir.path(), "old.csv", 1000);
    let new = market(dir.path(), "new.csv", 150_000);
    let out = dir.path().join("set");
    prepare(&options(&old, &out)).unwrap();
    let before = names_in(&out);
    // 100 blocks of 512 bytes; ignored, the signal becomes an error of the write. With much memory the
    // shards are what fails, with little the rows that wait beside them.
    let limit = ["sh", "-c", "trap '' XFSZ; ulimit -f 100; exec \"$@\"", "sh"];
    for (memory, action) in [(1 << 30, "write a shard"), (0, "write rows")] {
        let output = child_command(&limit, &new, &out, memory).output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert_eq!(output.status.code(), Some(7), "{text}");
        assert!(
            text.contains(action) && text.contains("too large"),
            "{text}"
        );
        assert!(rows_in(&out) == rows_of(&old));
        assert_eq!(names_in(&out), before);
    }
}

/// A file system of a megabyte, where this user may mount one.
#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_is_named_and_the_old_set_intact() {
    let dir = folder();
    let old = market(dir.path(), "old.csv", 1000);
    let new = market(dir.path(), "new.csv", 150_000);
    let disk = dir.path().join("disk");
    std::fs::create_dir(&disk).unwrap();
    // In a mount namespace of its own: what the script mounts is gone when it ends.
    let script = r#"
        set -e
        mount -t tmpfs -o size=1m tmpfs "$1" || exit 9
        new=$MAMBA_TEST_SOURCE; shift
        MAMBA_TEST_SOURCE=$OLD "$@" >/dev/null
        before=$(cd "$MAMBA_TEST_OUTPUT" && find . -type f | sort | xargs sha256sum)
        status=0
        MAMBA_TEST_SOURCE=$new "$@" || status=$?
        after=$(cd "$MAMBA_TEST_OUTPUT" && find . -type f | sort | xargs sha256sum)
        [ "$before" = "$after" ] && echo intact
        exit $status"#;
    let place = disk.to_str().unwrap();
    let before = [
        "unshare",
        "--user",
        "--map-root-user",
        "--mount",
        "sh",
        "-c",
        script,
        "sh",
        place,
    ];
    for memory in [1 << 30, 0] {
        let output = child_command(&before, &new, &disk.join("set"), memory)
            .env("OLD", &old)
            .output();
        let output = match output {
            Ok(output) if !matches!(output.status.code(), Some(1 | 9)) => output,
            _ => {
                eprintln!("skipped: this user may not mount a file system in a namespace");
                return;
            }
        };
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert_eq!(output.status.code(), Some(7), "{text}");
        assert!(text.contains("the disk is full"), "{text}");
        assert!(text.contains("intact"), "{text}");
    }
}

//! Downloads from a server that fails in each way.

use std::io::Write;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::time::Duration;

use mamba_ssm_data::{
    BinanceMonths, Credentials, Error, FetchOptions, FetchProgress, KaggleSet, ReadOptions, Result,
    fetch_binance, fetch_kaggle, read_series,
};
use sha2::{Digest, Sha256};
use tempfile::TempDir;

use crate::server::{Answer, Request, Server};
use crate::support::{candles, child_process, folder, names_in};

const MONTHS: &str = "data/spot/monthly/klines/BTCUSDT/1m";

/// An archive of one table, large enough to be cut.
fn archive(table: &str, text: &str) -> Vec<u8> {
    let mut archive = zip::ZipWriter::new(std::io::Cursor::new(Vec::new()));
    let stored =
        zip::write::SimpleFileOptions::default().compression_method(zip::CompressionMethod::Stored);
    archive.start_file(table, stored).unwrap();
    archive.write_all(text.as_bytes()).unwrap();
    archive.finish().unwrap().into_inner()
}

fn checksum(bytes: &[u8]) -> String {
    Sha256::digest(bytes)
        .iter()
        .map(|b| format!("{b:02x}"))
        .collect()
}

/// A site with three months of klines and a data set.
fn site() -> TempDir {
    let dir = folder();
    let months = dir.path().join(MONTHS);
    std::fs::create_dir_all(&months).unwrap();
    for (month, first) in [("2024-11", 0), ("2024-12", 3000), ("2025-01", 6000)] {
        // Microseconds since 2025.
        let unit: i64 = if month == "2025-01" { 1_000_000 } else { 1000 };
        let rows: String = (first..first + 3000)
            .map(|m| {
                format!(
                    "{},1,2,0.5,1,3,0,0,0,0,0,0\n",
                    m * 60 * unit + 1_700_000_040 * unit
                )
            })
            .collect();
        let name = format!("BTCUSDT-1m-{month}");
        let bytes = archive(&format!("{name}.csv"), &rows);
        let sum = format!("{}  {name}.zip\n", checksum(&bytes));
        std::fs::write(months.join(format!("{name}.zip")), bytes).unwrap();
        std::fs::write(months.join(format!("{name}.zip.CHECKSUM")), sum).unwrap();
    }
    let sets = dir.path().join("datasets/download/owner");
    std::fs::create_dir_all(&sets).unwrap();
    std::fs::write(sets.join("candles"), archive("c.csv", &candles(5000))).unwrap();
    dir
}

fn options(server: &Server, output: &Path) -> FetchOptions {
    FetchOptions::new(output)
        .with_host(&server.url)
        .with_retries(3, Duration::from_millis(1))
        .with_stall(Duration::from_millis(1500))
}

fn months(from: &str, to: Option<&str>) -> BinanceMonths {
    BinanceMonths {
        from: from.parse().unwrap(),
        to: to.map(|m| m.parse().unwrap()),
        ..BinanceMonths::default()
    }
}

fn binance(server: &Server, output: &Path) -> Result<Vec<PathBuf>> {
    fetch_binance(
        &months("2024-11", Some("2025-01")),
        &options(server, output),
        &mut |_| ControlFlow::Continue(()),
    )
}

fn kaggle(server: &Server, output: &Path) -> Result<PathBuf> {
    let set = KaggleSet {
        dataset: "owner/candles".into(),
        credentials: Some(Credentials {
            username: "me".into(),
            key: "hidden".into(),
        }),
    };
    fetch_kaggle(&set, &options(server, output), &mut |_| {
        ControlFlow::Continue(())
    })
}

fn is_archive(request: &Request) -> bool {
    request.path.ends_with(".zip") || request.path.ends_with("candles")
}

#[test]
fn months_come_checked_and_are_not_fetched_twice() {
    let (site, out) = (site(), folder());
    let server = Server::start(site.path(), |_, _| Answer::Whole);
    let mut seen: Vec<FetchProgress> = Vec::new();
    let files = fetch_binance(
        &months("2024-11", Some("2025-01")),
        &options(&server, out.path()),
        &mut |at| {
            seen.push(at.clone());
            ControlFlow::Continue(())
        },
    )
    .unwrap();
    assert_eq!(files.len(), 3);
    let last = seen.last().unwrap();
    assert_eq!(
        (last.number, last.files, Some(last.done)),
        (3, 3, last.total)
    );
    let series = read_series(out.path().join("BTCUSDT-1m-*.zip"), &ReadOptions::default()).unwrap();
    assert_eq!(series.len(), 9000);
    assert!(series.timestamps.windows(2).all(|w| w[1] - w[0] == 60));

    // A second time the checksums alone are asked for, and a file that does not match is replaced.
    std::fs::write(&files[1], "damaged").unwrap();
    binance(&server, out.path()).unwrap();
    let asked = |name: &str| {
        let all = server.requests();
        all.iter().filter(|r| r.path.ends_with(name)).count()
    };
    assert_eq!(
        [
            asked("2024-11.zip"),
            asked("2024-12.zip"),
            asked("2024-11.zip.CHECKSUM")
        ],
        [1, 2, 2]
    );
    assert_eq!(names_in(out.path()).len(), 3);
}

#[test]
fn a_data_set_comes_with_its_users_name() {
    let (site, out) = (site(), folder());
    let server = Server::start(site.path(), |_, _| Answer::Whole);
    let file = kaggle(&server, out.path()).unwrap();
    assert_eq!(file, out.path().join("candles.zip"));
    assert_eq!(
        read_series(&file, &ReadOptions::default()).unwrap().len(),
        5000
    );
    let requests = server.requests();
    assert_eq!(requests[0].path, "datasets/download/owner/candles");
    assert_eq!(
        requests[0].authorization.as_deref(),
        Some("Basic bWU6aGlkZGVu")
    );
}

#[test]
fn connections_that_are_cut_or_stall_or_are_refused_for_now() {
    let site = site();
    for (failure, resumed) in [
        (Answer::Cut(50_000), true),
        (Answer::Stall(50_000), true),
        (Answer::WithoutRangesCut(50_000), true),
        (Answer::Status(500), false),
        (Answer::Status(429), false),
    ] {
        let out = folder();
        let server = Server::start(site.path(), move |request, before| {
            match (is_archive(request), before, failure) {
                (true, 0, _) => failure,
                (_, _, Answer::WithoutRangesCut(_)) => Answer::WithoutRanges,
                _ => Answer::Whole,
            }
        });
        kaggle(&server, out.path()).unwrap();
        binance(&server, out.path()).unwrap();
        let asked: Vec<_> = server
            .requests()
            .into_iter()
            .filter(|r| r.path.ends_with("2024-12.zip"))
            .map(|r| r.from)
            .collect();
        let second = resumed.then_some(50_000);
        assert_eq!(asked, [None, second], "{failure:?}");
        assert_eq!(names_in(out.path()).len(), 4, "{failure:?}");
    }
}

#[test]
fn failures_that_last_say_what_failed_and_keep_what_came() {
    let site = site();
    for (answer, words, part) in [
        (
            Answer::Status(404),
            "no archive of BTCUSDT 1m for 2024-11",
            false,
        ),
        (Answer::Status(401), "401", true),
        (Answer::Status(503), "4 failures in a row", true),
        (Answer::Stall(0), "4 failures in a row", true),
        (Answer::Altered, "SHA-256", false),
    ] {
        let out = folder();
        let server = Server::start(site.path(), move |request, _| match is_archive(request) {
            true => answer,
            false => Answer::Whole,
        });
        let message = binance(&server, out.path()).unwrap_err().to_string();
        assert!(
            message.contains(words) && message.contains(&server.url),
            "{answer:?}: {message}"
        );
        let expected: &[&str] = match part {
            true => &["BTCUSDT-1m-2024-11.zip.part"],
            false => &[],
        };
        assert_eq!(names_in(out.path()), expected, "{answer:?}");
    }
}

#[test]
fn kaggle_says_what_to_do_when_it_refuses() {
    let (site, out) = (site(), folder());
    for (status, words) in [
        (401, "KAGGLE_USERNAME"),
        (403, "kaggle.json"),
        (404, "no such data set"),
    ] {
        let server = Server::start(site.path(), move |_, _| Answer::Status(status));
        let message = kaggle(&server, out.path()).unwrap_err().to_string();
        assert!(message.contains(words), "{message}");
        assert!(!message.contains("hidden"), "{message}");
        assert_eq!(server.requests().len(), 1);
    }
    let altered = Server::start(site.path(), |_, _| Answer::Altered);
    let message = kaggle(&altered, out.path()).unwrap_err().to_string();
    assert!(message.contains("not a whole zip archive"), "{message}");

    let wrong = KaggleSet {
        dataset: "../etc".into(),
        ..KaggleSet::default()
    };
    let message = fetch_kaggle(&wrong, &options(&altered, out.path()), &mut |_| {
        ControlFlow::Continue(())
    });
    assert!(message.unwrap_err().to_string().contains("owner/name"));
}

#[test]
fn a_download_that_was_stopped_goes_on_the_next_time() {
    let (site, out) = (site(), folder());
    let server = Server::start(site.path(), |_, _| Answer::Whole);
    let month = months("2024-11", Some("2024-11"));
    let outcome = fetch_binance(
        &month,
        &options(&server, out.path()),
        &mut |at| match at.done > 0 {
            true => ControlFlow::Break(()),
            false => ControlFlow::Continue(()),
        },
    );
    assert!(matches!(outcome, Err(Error::Cancelled)));
    assert_eq!(names_in(out.path()), ["BTCUSDT-1m-2024-11.zip.part"]);
    binance(&server, out.path()).unwrap();
    let second = &server.requests()[3];
    assert!(
        second.path.ends_with("2024-11.zip") && second.from > Some(0),
        "{second:?}"
    );
}

/// What is left of another version of the file does not get in the way.
#[test]
fn parts_that_do_not_fit_are_thrown_away() {
    let (site, out) = (site(), folder());
    let server = Server::start(site.path(), |_, _| Answer::Whole);
    for length in [1000, 10_000_000] {
        let part = out.path().join("BTCUSDT-1m-2024-11.zip.part");
        std::fs::write(part, vec![7; length]).unwrap();
        let _ = std::fs::remove_file(out.path().join("BTCUSDT-1m-2024-11.zip"));
        binance(&server, out.path()).unwrap();
        assert_eq!(names_in(out.path()).len(), 3);
    }
}

#[test]
fn the_newest_month_may_not_be_there_yet_but_an_older_one_must() {
    let (site, out) = (site(), folder());
    let server = Server::start(site.path(), |_, _| Answer::Whole);
    let fetch = |which: &BinanceMonths| {
        fetch_binance(which, &options(&server, out.path()), &mut |_| {
            ControlFlow::Continue(())
        })
    };
    let message = fetch(&months("2025-01", Some("2025-02")))
        .unwrap_err()
        .to_string();
    assert!(message.contains("for 2025-02"), "{message}");
    // Published so far: everything up to last month, of which this site has nothing.
    let message = fetch(&months("2024-12", None)).unwrap_err().to_string();
    assert!(message.contains("for 2025-02"), "{message}");
}

#[test]
fn an_archive_without_its_checksum_is_told_from_one_that_is_not_there() {
    let (site, out) = (site(), folder());
    std::fs::remove_file(
        site.path()
            .join(MONTHS)
            .join("BTCUSDT-1m-2024-12.zip.CHECKSUM"),
    )
    .unwrap();
    let server = Server::start(site.path(), |_, _| Answer::Whole);
    let message = binance(&server, out.path()).unwrap_err().to_string();
    assert!(
        message.contains("2024-12.zip.CHECKSUM") && message.contains("the archive is there"),
        "{message}"
    );
    assert_eq!(names_in(out.path()), ["BTCUSDT-1m-2024-11.zip"]);
}

#[test]
fn the_users_name_is_not_sent_on_to_where_a_server_redirects() {
    let (site, out) = (site(), folder());
    let store = Server::start(site.path(), |_, _| Answer::Whole);
    let port = store.url.rsplit(':').next().unwrap().parse().unwrap();
    let front = Server::start(site.path(), move |_, _| Answer::Redirect(port));
    let file = kaggle(&front, out.path()).unwrap();
    assert_eq!(
        read_series(file, &ReadOptions::default()).unwrap().len(),
        5000
    );
    let asked = |server: &Server| -> Vec<_> {
        let all = server.requests().into_iter();
        all.map(|r| r.authorization.is_some()).collect()
    };
    assert_eq!((asked(&front), asked(&store)), (vec![true], vec![false]));
}

#[test]
fn a_part_that_another_process_writes_is_left_to_it() {
    let (site, out) = (site(), folder());
    let server = Server::start(site.path(), |_, _| Answer::Whole);
    let part = out.path().join("BTCUSDT-1m-2024-11.zip.part");
    std::fs::write(&part, "what another process has written").unwrap();
    let other = std::fs::File::options().append(true).open(&part).unwrap();
    other.try_lock().unwrap();
    let error = binance(&server, out.path()).unwrap_err();
    assert!(matches!(error, Error::Busy { .. }), "{error}");
    assert!(error.to_string().contains("2024-11.zip.part"), "{error}");
    assert_eq!(
        std::fs::read(&part).unwrap(),
        b"what another process has written"
    );
    drop(other);
    binance(&server, out.path()).unwrap();
    assert_eq!(names_in(out.path()).len(), 3);
}

/// Not a test: what the next one runs as a process of its own, with its own environment.
#[test]
#[ignore = "the child process of another test"]
fn child() {
    match Credentials::find() {
        Ok(found) => println!("found {}", found.map_or("none".into(), |c| c.username)),
        Err(error) => println!("refused: {error}"),
    }
}

#[test]
fn credentials_come_from_variables_then_the_configured_folder_then_the_home() {
    let dir = folder();
    let home = dir.path().join("home");
    let config = dir.path().join("config");
    for (folder, name) in [
        (home.join(".kaggle"), "of_home"),
        (config.clone(), "of_config"),
    ] {
        std::fs::create_dir_all(&folder).unwrap();
        let text = format!(r#"{{"username":"{name}","key":"hidden"}}"#);
        std::fs::write(folder.join("kaggle.json"), text).unwrap();
    }
    let found = |variables: &[(&str, &str)]| {
        let mut command = child_process(&[], "fetching::child");
        for name in [
            "KAGGLE_USERNAME",
            "KAGGLE_KEY",
            "KAGGLE_CONFIG_DIR",
            "USERPROFILE",
        ] {
            command.env_remove(name);
        }
        command.env("HOME", &home).envs(variables.iter().copied());
        let output = command.output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let line = text.lines().find_map(|l| l.split_once("found "));
        line.unwrap_or_else(|| panic!("{text}")).1.to_string()
    };
    let config = config.to_str().unwrap();
    let (name, key) = (
        ("KAGGLE_USERNAME", "of_variables"),
        ("KAGGLE_KEY", "hidden"),
    );
    let folder = ("KAGGLE_CONFIG_DIR", config);
    assert_eq!(found(&[name, key, folder]), "of_variables");
    assert_eq!(
        found(&[name, folder]),
        "of_config",
        "a name without a key is none"
    );
    assert_eq!(found(&[("KAGGLE_KEY", ""), name, folder]), "of_config");
    assert_eq!(found(&[folder]), "of_config");
    assert_eq!(found(&[]), "of_home");
    assert_eq!(found(&[("HOME", config)]), "none");
}

//! Shard sets behind URLs: a web server that fails in every way, and an S3-compatible one.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use mamba_ssm_data::synthetic::{MarketConfig, generate, write_csv};
use mamba_ssm_data::{
    Dataset, LoaderOptions, Normalised, PrepareOptions, RemoteOptions, Split, prepare, upload,
};
use tempfile::TempDir;

use crate::server::{Answer, Cutter, Request, Server};
use crate::support::{folder, python, small_windows};

/// A set of four shards, one row group each.
fn set() -> (TempDir, PathBuf) {
    let dir = folder();
    let csv = dir.path().join("market.csv");
    let market = MarketConfig::new(240_000).with_gaps(false);
    write_csv(&csv, &generate(&market)).unwrap();
    let out = dir.path().join("set");
    let options = PrepareOptions::new(&csv, &out)
        .with_windows(small_windows())
        .with_shard_bytes(1);
    assert_eq!(prepare(&options).unwrap().shards, 4);
    (dir, out)
}

fn rows(data: &Dataset) -> Normalised {
    (*data.rows().unwrap()).clone()
}

fn quick(dir: &TempDir) -> RemoteOptions {
    RemoteOptions::default()
        .with_cache(dir.path().join("cache"), 1 << 30)
        .with_retries(3, Duration::from_millis(1))
        .with_stall(Duration::from_millis(1500))
}

fn is_shard(request: &Request) -> bool {
    request.path.ends_with(".parquet")
}

#[test]
fn a_set_behind_a_web_server_is_the_set_in_its_folder() {
    let (dir, out) = set();
    let local = Dataset::open(&out).unwrap();
    let server = Server::start(&out, |_, _| Answer::Whole);
    let data = Dataset::open_remote(&server.url, &quick(&dir)).unwrap();
    assert_eq!(data.manifest(), local.manifest());
    assert_eq!(
        server.asked("parquet"),
        0,
        "shards wait until they are wanted"
    );
    let options = LoaderOptions::new(64).shuffled(1).with_workers(2, 2);
    let of = |data: &Dataset| -> Vec<_> {
        let loader = data
            .loader(Split::Train, &options.clone().limited(50))
            .unwrap();
        loader.map(Result::unwrap).collect()
    };
    assert!(of(&data) == of(&local), "the batches differ");
    assert_eq!(rows(&data), rows(&local));
    assert_eq!(server.asked("parquet"), 4, "every shard comes once");

    // The cache outlives the data set.
    let again = Dataset::open_remote(&server.url, &quick(&dir)).unwrap();
    assert_eq!(rows(&again), rows(&local));
    assert_eq!(server.asked("parquet"), 4);
}

#[test]
fn a_file_url_is_a_folder() {
    let (_dir, out) = set();
    let data = Dataset::open(format!("file://{}", out.display())).unwrap();
    assert_eq!(data.len(), 240_000);
}

#[test]
fn cut_connections_go_on_where_they_were_cut() {
    let (dir, out) = set();
    let server = Server::start(&out, |request, before| match (is_shard(request), before) {
        (true, 0) => Answer::Cut(100_000),
        (true, 1) => Answer::Stall(50_000),
        (true, 2) => Answer::Status(500),
        (false, 0) => Answer::Cut(100),
        _ => Answer::Whole,
    });
    let data = Dataset::open_remote(&server.url, &quick(&dir)).unwrap();
    assert_eq!(rows(&data), rows(&Dataset::open(&out).unwrap()));
    let first: Vec<_> = server
        .requests()
        .into_iter()
        .filter(|r| r.path.ends_with("part-00000.parquet"))
        .map(|r| r.from)
        .collect();
    assert_eq!(first[..2], [None, Some(100_000)]);
    assert!(first[2] > Some(100_000), "{first:?}");
    assert_eq!(first[3], first[2]);
}

#[test]
fn servers_without_ranges_begin_again() {
    let (dir, out) = set();
    let server = Server::start(&out, |request, before| match (is_shard(request), before) {
        (true, 0) => Answer::WithoutRangesCut(100_000),
        _ => Answer::WithoutRanges,
    });
    let data = Dataset::open_remote(&server.url, &quick(&dir)).unwrap();
    assert_eq!(rows(&data), rows(&Dataset::open(&out).unwrap()));
}

#[test]
fn an_altered_shard_is_fetched_again_and_then_refused() {
    let (dir, out) = set();
    let expected = rows(&Dataset::open(&out).unwrap());
    let once = Server::start(&out, |request, before| match (is_shard(request), before) {
        (true, 0) => Answer::Altered,
        _ => Answer::Whole,
    });
    let data = Dataset::open_remote(&once.url, &quick(&dir)).unwrap();
    assert_eq!(rows(&data), expected);

    let other = folder();
    let always = Server::start(&out, |request, _| match is_shard(request) {
        true => Answer::Altered,
        false => Answer::Whole,
    });
    let data = Dataset::open_remote(&always.url, &quick(&other)).unwrap();
    let message = data.rows().unwrap_err().to_string();
    for word in [always.url.as_str(), ".parquet", "checksum"] {
        assert!(message.contains(word), "`{word}` is missing in: {message}");
    }
    let left: Vec<_> = std::fs::read_dir(other.path().join("cache"))
        .unwrap()
        .collect();
    assert!(left.is_empty(), "{left:?}");
}

#[test]
fn failures_that_last_are_named_with_their_number() {
    let (dir, out) = set();
    for (answer, words) in [
        (Answer::Status(503), "503"),
        (Answer::Cut(10), "4 failures"),
        (Answer::Stall(10), "nothing came"),
        (Answer::Status(404), "no such file"),
        (Answer::Status(403), "403"),
    ] {
        let server = Server::start(&out, move |request, _| match is_shard(request) {
            true => answer,
            false => Answer::Whole,
        });
        // Short where it has to pass; elsewhere a busy machine's own pauses must not count as stalls.
        let stall = if matches!(answer, Answer::Stall(_)) {
            1
        } else {
            20
        };
        let options = quick(&dir).with_stall(Duration::from_secs(stall));
        let data = Dataset::open_remote(&server.url, &options).unwrap();
        // The last batch, whose shard is the third, so that nothing is fetched ahead: that would ask for the shard as well.
        let all = data.loader(Split::Train, &LoaderOptions::new(1)).unwrap();
        let last = LoaderOptions::new(1).skipping(all.batches() - 1);
        let loader = data.loader(Split::Train, &last);
        let message = loader.unwrap().next().unwrap().unwrap_err().to_string();
        assert!(
            message.contains(words) && message.contains("part-00002.parquet"),
            "{answer:?}: {message}"
        );
        let tries = server.asked("part-00002");
        let lasting = matches!(answer, Answer::Status(404 | 403));
        assert_eq!(tries, if lasting { 1 } else { 4 }, "{answer:?}");
    }
}

#[test]
fn places_that_hold_no_set() {
    let dir = folder();
    let server = Server::start(dir.path(), |_, _| Answer::Whole);
    let message = |url: &str| {
        Dataset::open_remote(url, &quick(&dir))
            .unwrap_err()
            .to_string()
    };
    let empty = message(&server.url);
    assert!(
        empty.contains(&server.url) && empty.contains("prepare"),
        "{empty}"
    );
    assert!(message("gopher://host/set").contains("s3, gs, az"));
    assert!(message("http://host/set?key=1").contains("without `?`"));
    let nobody = message("http://user:secret@127.0.0.1:9/set");
    assert!(
        nobody.contains("127.0.0.1:9") && !nobody.contains("secret"),
        "{nobody}"
    );
    let unknown = Dataset::open_remote(
        "s3://b/set",
        &quick(&dir).with_store_option("aws_colour", "red"),
    );
    assert!(unknown.unwrap_err().to_string().contains("aws_colour"));
}

/// Sizes of all files below a folder.
fn bytes_in(folder: &Path) -> u64 {
    std::fs::read_dir(folder)
        .unwrap()
        .map(|e| e.unwrap().metadata().unwrap().len())
        .sum()
}

#[test]
fn the_cache_keeps_its_bound_and_a_shuffle_fetches_each_shard_once() {
    let (dir, out) = set();
    let local = Dataset::open(&out).unwrap();
    let largest = local
        .manifest()
        .unwrap()
        .shards
        .iter()
        .map(|s| s.bytes)
        .max()
        .unwrap();
    let server = Server::start(&out, |_, _| Answer::Whole);
    let cache = dir.path().join("cache");
    let options = quick(&dir).with_cache(&cache, 2 * largest);
    let data = Dataset::open_remote(&server.url, &options).unwrap();
    // Memory for one page, room for two shards: windows are drawn from one shard after another.
    let loading = LoaderOptions::new(16)
        .shuffled(1)
        .with_shards_at_once(2)
        .with_memory_bytes(65_536 * 21);
    let mut seen = Vec::new();
    for batch in data.loader(Split::Train, &loading).unwrap() {
        seen.extend(batch.unwrap().starts);
        assert!(bytes_in(&cache) <= 2 * largest);
    }
    seen.sort_unstable();
    assert_eq!(seen, local.starts(Split::Train));
    // Windows that reach into the next shard ask for it once more.
    assert!(server.asked("parquet") <= 8, "{}", server.asked("parquet"));

    // Neither the cache nor the place has a say in the order.
    let wide = Dataset::open_remote(&server.url, &quick(&folder())).unwrap();
    let order = |data: &Dataset| {
        let loader = data.loader(Split::Train, &loading).unwrap();
        loader.order().to_vec()
    };
    assert!(order(&data) == order(&wide) && order(&data) == order(&local));

    let tight = quick(&folder()).with_cache(&cache, largest / 2);
    let data = Dataset::open_remote(&server.url, &tight).unwrap();
    let message = data.rows().unwrap_err().to_string();
    assert!(message.contains("cache_bytes"), "{message}");
}

#[test]
fn the_next_shard_is_fetched_before_it_is_wanted() {
    let (dir, out) = set();
    let server = Server::start(&out, |_, _| Answer::Whole);
    let data = Dataset::open_remote(&server.url, &quick(&dir)).unwrap();
    let rows = data.manifest().unwrap().shards[0].rows;
    // In order of time, so that the second shard is not wanted before the first one has ended.
    let mut loader = data.loader(Split::Train, &LoaderOptions::new(64)).unwrap();
    let last_row = |starts: &[u64]| starts[starts.len() - 1] + 15;
    let order = loader.order().to_vec();
    for next in order.chunks(64).skip(1) {
        let batch = loader.next().unwrap().unwrap();
        assert!(
            last_row(&batch.starts) < rows,
            "the second shard was not announced"
        );
        if last_row(next) >= rows {
            break;
        }
        assert_eq!(server.asked("part-00001"), 0);
    }
    let begun = std::time::Instant::now();
    while server.asked("part-00001") == 0 {
        assert!(
            begun.elapsed() < PATIENT,
            "the second shard was not asked for ahead"
        );
        std::thread::sleep(Duration::from_millis(5));
    }
    assert_eq!(server.asked("part-00002"), 0);
}

#[test]
fn an_upload_can_be_taken_up_and_shows_its_manifest_last() {
    let (dir, out) = set();
    let there = dir.path().join("there");
    std::fs::create_dir(&there).unwrap();
    // The third shard is refused until the server is asked again later on.
    let server = Server::start(&there, |request, before| {
        let refused = request.method == "PUT" && request.path.contains("part-00002") && before < 4;
        match refused {
            true => Answer::Status(500),
            false => Answer::Whole,
        }
    });
    let message = upload(&out, &server.url, &quick(&dir))
        .unwrap_err()
        .to_string();
    assert!(
        message.contains("part-00002") && message.contains("500"),
        "{message}"
    );
    assert!(!there.join("manifest.json").exists());
    upload(&out, &server.url, &quick(&dir)).unwrap();
    let sent = |part: &str| {
        let all = server.requests();
        all.iter()
            .filter(|r| r.method == "PUT" && r.path.contains(part))
            .count()
    };
    assert_eq!(
        [sent("part-00000"), sent("part-00002"), sent("manifest")],
        [1, 5, 1]
    );
    let data = Dataset::open_remote(&server.url, &quick(&dir)).unwrap();
    assert_eq!(rows(&data), rows(&Dataset::open(&out).unwrap()));
}

/// For servers that take their time on a busy machine.
const PATIENT: Duration = Duration::from_secs(30);

/// A Python program that serves something and says where in its first line; ended with the test.
struct Program {
    child: Child,
    first_line: String,
}

impl Program {
    fn start(python: &Path, args: &[&str]) -> Self {
        let mut child = Command::new(python)
            .args(args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut first_line = String::new();
        let mut output = BufReader::new(child.stdout.take().unwrap());
        output.read_line(&mut first_line).unwrap();
        Self { child, first_line }
    }

    /// `127.0.0.1:PORT`
    fn address(&self) -> &str {
        let behind = self.first_line.split("http://").nth(1);
        let address = behind.and_then(|rest| rest.split(['/', '\n']).next());
        address.unwrap_or_else(|| panic!("the server did not start: {}", self.first_line))
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn an_http_server_that_is_not_ours_with_connections_cut() {
    let Some(python) = python("http.server") else {
        return;
    };
    let (dir, out) = set();
    let folder = out.to_str().unwrap();
    let args = [
        "-u",
        "-m",
        "http.server",
        "0",
        "--bind",
        "127.0.0.1",
        "--directory",
    ];
    let server = Program::start(&python, &[&args[..], &[folder]].concat());
    let cutter = Cutter::start(server.address(), 3, 100_000);
    let options = quick(&dir).with_stall(PATIENT);
    let data = Dataset::open_remote(&cutter.url, &options).unwrap();
    assert_eq!(rows(&data), rows(&Dataset::open(&out).unwrap()));
    assert_eq!(cutter.cuts(), 3);
}

#[test]
fn an_s3_compatible_store_with_connections_cut() {
    let Some(python) = python("moto.server") else {
        return;
    };
    let script = "import sys, threading\n\
        from moto.server import ThreadedMotoServer\n\
        import boto3\n\
        server = ThreadedMotoServer(ip_address='127.0.0.1', port=0, verbose=False)\n\
        server.start()\n\
        host, port = server.get_host_and_port()\n\
        url = f'http://{host}:{port}'\n\
        boto3.client('s3', endpoint_url=url, region_name='us-east-1', aws_access_key_id='key', \
        aws_secret_access_key='secret').create_bucket(Bucket='candles')\n\
        print(url, flush=True)\n\
        sys.stdin.read()";
    let server = Program::start(&python, &["-c", script]);
    let (dir, out) = set();
    let options = |url: &str| {
        quick(&dir)
            .with_stall(PATIENT)
            .with_store_option("aws_endpoint", url)
            .with_store_option("aws_region", "us-east-1")
            .with_store_option("aws_access_key_id", "key")
            .with_store_option("aws_secret_access_key", "secret")
    };
    let whole = options(&format!("http://{}", server.address()));
    let message = Dataset::open_remote("s3://candles/btc", &whole)
        .unwrap_err()
        .to_string();
    assert!(message.contains("s3://candles/btc"), "{message}");
    upload(&out, "s3://candles/btc", &whole).unwrap();

    let cutter = Cutter::start(server.address(), 3, 100_000);
    let data = Dataset::open_remote("s3://candles/btc", &options(&cutter.url)).unwrap();
    let loader = data.loader(Split::Test, &LoaderOptions::new(8).shuffled(1));
    assert_eq!(loader.unwrap().next().unwrap().unwrap().batch, 8);
    assert_eq!(rows(&data), rows(&Dataset::open(&out).unwrap()));
    assert_eq!(cutter.cuts(), 3);
}

/// The addresses of objects are those of the two stores; the server is ours.
#[test]
fn gs_and_az_urls_lead_to_their_stores() {
    let (dir, out) = set();
    let expected = rows(&Dataset::open(&out).unwrap());
    std::fs::create_dir(dir.path().join("bucket")).unwrap();
    std::fs::rename(&out, dir.path().join("bucket/set")).unwrap();
    let server = Server::start(dir.path(), |request, before| {
        match (is_shard(request), before) {
            (true, 0) => Answer::Cut(100_000),
            _ => Answer::Whole,
        }
    });
    for (scheme, settings) in [
        (
            "gs",
            vec![
                ("google_base_url", server.url.as_str()),
                ("google_skip_signature", "true"),
            ],
        ),
        (
            "az",
            vec![
                ("azure_endpoint", server.url.as_str()),
                ("azure_skip_signature", "true"),
                ("azure_storage_account_name", "account"),
            ],
        ),
    ] {
        let cache = folder();
        let options = settings.into_iter().fold(quick(&cache), |o, (key, value)| {
            o.with_store_option(key, value)
        });
        let data = Dataset::open_remote(&format!("{scheme}://bucket/set"), &options);
        let data = data.unwrap_or_else(|e| panic!("{e}: {:?}", server.requests()));
        assert_eq!(rows(&data), expected, "{scheme}");
    }
}

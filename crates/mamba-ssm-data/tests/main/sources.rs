//! The kinds of source, and several files as one series.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use arrow::array::{
    ArrayRef, Date32Array, Date64Array, Float64Array, Int64Array, StringArray, TimestampSecondArray,
};
use arrow::datatypes::DataType;
use arrow::record_batch::RecordBatch;
use mamba_ssm_data::{
    ColumnSpec, Dataset, Feature, GapPolicy, LoaderOptions, OrderPolicy, PrepareOptions, RawSeries,
    ReadOptions, Scale, Schema, Split, WindowOptions, fill_gaps, prepare, read_many, read_series,
};
use parquet::arrow::ArrowWriter;

use crate::support::{HEADER, candle_rows, candles, folder, price, small_windows, write};

/// An archive with these files.
fn zip_of(folder: &Path, name: &str, files: &[(&str, &str)]) -> PathBuf {
    let path = folder.join(name);
    let mut archive = zip::ZipWriter::new(File::create(&path).unwrap());
    for (name, text) in files {
        archive
            .start_file(*name, zip::write::SimpleFileOptions::default())
            .unwrap();
        archive.write_all(text.as_bytes()).unwrap();
    }
    archive.finish().unwrap();
    path
}

/// A Parquet file with these columns.
fn parquet_of(folder: &Path, name: &str, columns: Vec<(&str, ArrayRef)>) -> PathBuf {
    let path = folder.join(name);
    let batch = RecordBatch::try_from_iter(columns).unwrap();
    let mut writer =
        ArrowWriter::try_new(File::create(&path).unwrap(), batch.schema(), None).unwrap();
    writer.write(&batch).unwrap();
    writer.close().unwrap();
    path
}

fn read(path: impl AsRef<Path>) -> RawSeries {
    read_series(path, &ReadOptions::default()).unwrap()
}

fn refusal(path: impl AsRef<Path>) -> String {
    read_series(path, &ReadOptions::default())
        .expect_err("bad input must be refused")
        .to_string()
}

/// Rows of Binance klines, timestamps in units of `per_second`.
fn klines(minutes: std::ops::Range<usize>, per_second: i64) -> String {
    minutes
        .map(|m| {
            let p = price(m);
            let open = (1_600_000_020 + m as i64 * 60) * per_second;
            let close = open + 60 * per_second - 1;
            format!(
                "{open},{p},{},{},{p},{},{close},12.5,7,1.5,2.5,0\n",
                p + 1.0,
                p - 1.0,
                (m % 5) as f64 * 0.5
            )
        })
        .collect()
}

#[test]
fn a_zip_reads_as_the_table_in_it() {
    let dir = folder();
    let expected = read(write(dir.path(), "plain.csv", candles(3000)));
    let text = candles(3000);
    let zip = zip_of(
        dir.path(),
        "candles.zip",
        &[("README.md", "about\n"), ("candles.csv", &text)],
    );
    let series = read(&zip);
    assert_eq!(series.timestamps, expected.timestamps);
    assert_eq!(series.columns, expected.columns);
    // The content decides, not the name.
    let renamed = dir.path().join("candles.csv");
    std::fs::rename(zip, &renamed).unwrap();
    assert_eq!(read(renamed).columns, expected.columns);
}

#[test]
fn archives_that_hold_no_table_or_two_or_are_cut_short() {
    let dir = folder();
    let none = refusal(zip_of(dir.path(), "none.zip", &[("a.md", "x")]));
    assert!(
        none.contains("none.zip") && none.contains("0 .csv files"),
        "{none}"
    );
    let text = candles(20);
    let two = refusal(zip_of(
        dir.path(),
        "two.zip",
        &[("a.csv", &text), ("b.csv", &text)],
    ));
    assert!(two.contains("2 .csv files"), "{two}");

    let whole = zip_of(dir.path(), "whole.zip", &[("a.csv", &candles(5000))]);
    let bytes = std::fs::read(whole).unwrap();
    let cut = write(dir.path(), "cut.zip", &bytes[..bytes.len() / 2]);
    let message = refusal(cut);
    assert!(
        message.contains("cut.zip") && message.contains("as zip"),
        "{message}"
    );
    let mut damaged = bytes;
    for byte in &mut damaged[2000..2100] {
        *byte ^= 0x55;
    }
    let message = refusal(write(dir.path(), "damaged.zip", damaged));
    assert!(message.contains("damaged.zip"), "{message}");
}

#[test]
fn klines_in_milliseconds_and_in_microseconds_read_alike() {
    let dir = folder();
    let expected = read(write(dir.path(), "plain.csv", candles(300)));
    let text = klines(0..300, 1_000);
    let millis = write(dir.path(), "BTCUSDT-1m-2024-12.csv", &text);
    let micros = write(
        dir.path(),
        "BTCUSDT-1m-2025-01.csv",
        klines(0..300, 1_000_000),
    );
    let zipped = zip_of(dir.path(), "a.zip", &[("BTCUSDT-1m-2024-12.csv", &text)]);
    let titled = write(
        dir.path(),
        "titled.csv",
        format!(
            "open_time,open,high,low,close,volume,close_time,quote_volume,count,taker_buy_volume,taker_buy_quote_volume,ignore\n{text}"
        ),
    );
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gzip.write_all(text.as_bytes()).unwrap();
    let gzipped = write(dir.path(), "a.csv.gz", gzip.finish().unwrap());
    for path in [millis, micros, zipped, gzipped, titled] {
        let series = read(&path);
        assert_eq!(series.timestamps, expected.timestamps, "{}", path.display());
        assert_eq!(series.columns, expected.columns, "{}", path.display());
    }
}

#[test]
fn months_of_klines_are_one_series_whatever_their_units() {
    let dir = folder();
    zip_of(
        dir.path(),
        "k-2024-12.zip",
        &[("k-2024-12.csv", &klines(0..400, 1_000))],
    );
    zip_of(
        dir.path(),
        "k-2025-01.zip",
        &[("k-2025-01.csv", &klines(400..900, 1_000_000))],
    );
    let series = read(dir.path().join("k-*.zip"));
    let expected = read(write(dir.path(), "plain.csv", candles(900)));
    assert_eq!(series.timestamps, expected.timestamps);
    assert_eq!(series.columns, expected.columns);
}

#[test]
fn where_files_overlap_valid_rows_win_and_then_the_last_name() {
    let dir = folder();
    let line = |minute: i64, price: &str| {
        format!(
            "{},{price},{price},{price},{price},1\n",
            1_600_000_020 + minute * 60
        )
    };
    let file = |name: &str, rows: &[(i64, &str)]| {
        let body: String = rows.iter().map(|(m, p)| line(*m, p)).collect();
        write(dir.path(), name, format!("{HEADER}{body}"))
    };
    // `c` holds the oldest rows, `b` speaks last about minutes 2 and 4, but has nothing to say on 3.
    file(
        "a.csv",
        &[(1, "10"), (2, "11"), (3, "12"), (4, "13"), (6, "14")],
    );
    file("b.csv", &[(2, "21"), (3, ""), (4, "23"), (5, "24")]);
    file("c.csv", &[(-9, "30"), (-8, "31")]);
    let series = read(dir.path().join("*.csv"));
    let minutes: Vec<i64> = series
        .timestamps
        .iter()
        .map(|t| (t - 1_600_000_020) / 60)
        .collect();
    assert_eq!(minutes, [-9, -8, 1, 2, 3, 4, 5, 6]);
    assert_eq!(
        series.columns[0],
        [30.0, 31.0, 10.0, 21.0, 12.0, 23.0, 24.0, 14.0]
    );
    assert!(series.valid.iter().all(|&v| v));
}

/// The order in which sources are given decides, not their names; a pattern gives them in the order of their names.
#[test]
fn where_files_disagree_the_later_one_in_the_list_wins() {
    let dir = folder();
    let file = |name: &str, price: i64| {
        let rows: String = (1..4)
            .map(|m| format!("{},{price},{price},{price},{price},1\n", m * 60))
            .collect();
        write(dir.path(), name, format!("{HEADER}{rows}"))
    };
    let (a, b) = (file("a.csv", 10), file("b.csv", 20));
    let pattern = dir.path().join("*.csv");
    for order in [OrderPolicy::Refuse, OrderPolicy::Sort] {
        let options = ReadOptions::default().with_order(order);
        let prices = |list: &[&PathBuf]| read_many(list, &options).unwrap().columns[0].clone();
        assert_eq!(prices(&[&a, &b]), [20.0; 3], "{order:?}");
        assert_eq!(prices(&[&b, &a]), [10.0; 3], "{order:?}");
        assert_eq!(prices(&[&pattern]), [20.0; 3], "{order:?}");
        assert_eq!(prices(&[&pattern, &a]), [10.0; 3], "{order:?}");
    }
}

/// Within a file the last row of a timestamp stays; among files a valid one goes first.
#[test]
fn several_files_in_any_order_are_sorted_into_one_series() {
    let dir = folder();
    let file = |name: &str, rows: &[(i64, &str)]| {
        let rows: String = rows
            .iter()
            .map(|(minute, price)| format!("{},{price},2,2,2,1\n", minute * 60))
            .collect();
        write(dir.path(), name, format!("{HEADER}{rows}"))
    };
    let a = file("a.csv", &[(5, "5"), (3, "3"), (1, "1"), (3, ""), (7, "7")]);
    let b = file(
        "b.csv",
        &[(6, "60"), (3, "30"), (5, ""), (7, "70"), (2, "20")],
    );
    let options = ReadOptions::default().with_order(OrderPolicy::Sort);
    let series = read_many(&[&a, &b], &options).unwrap();
    let minutes: Vec<i64> = series.timestamps.iter().map(|t| t / 60).collect();
    assert_eq!(minutes, [1, 2, 3, 5, 6, 7]);
    assert_eq!(series.columns[0], [1.0, 20.0, 30.0, 5.0, 60.0, 70.0]);

    let missing = dir.path().join("missing.csv");
    let message = read_many(&[&a, &missing], &options)
        .unwrap_err()
        .to_string();
    assert!(message.contains("missing.csv"), "{message}");
}

#[test]
fn a_line_end_within_quotes_is_refused_with_its_row() {
    let dir = folder();
    let header = "Timestamp,Open,High,Low,Close,Volume,note\n";
    let row = |minute: usize, note: &str| format!("{},1,1,1,1,1,{note}\n", minute * 60);
    let rows =
        |minutes: std::ops::Range<usize>| -> String { minutes.map(|m| row(m, "plain")).collect() };
    let refused = |text: String, number: usize| {
        let message = refusal(write(dir.path(), "notes.csv", text));
        let place = format!("notes.csv: row {number}: ");
        assert!(
            message.contains(&place) && message.contains("one row per line"),
            "{message}"
        );
    };
    // Within a block, behind blank lines, and a quote that is never closed.
    refused(
        format!("{header}{}{}", rows(0..9), row(9, "\"two\nlines\"")),
        11,
    );
    refused(format!("{header}\n\n{}", row(9, "\"two\nlines\"")), 4);
    refused(format!("{header}{}{}", row(0, "\"open"), rows(1..5)), 2);
    refused(
        format!("{}{}", header.replace("note", "\"no\nte\""), rows(0..5)),
        1,
    );
    // Around the end of the first block of 2 MiB, which is cut at a line end, perhaps the one within the quotes.
    for pad in (0..36).step_by(4) {
        let before = format!("{header}{}{}", row(0, &"p".repeat(pad)), rows(1..100_000));
        let minute = before[..2 << 20].matches('\n').count() - 1;
        let text = format!(
            "{header}{}{}{}{}",
            row(0, &"p".repeat(pad)),
            rows(1..minute),
            row(minute, "\"two\nlines\""),
            rows(minute + 1..100_000)
        );
        refused(text, minute + 2);
    }
    // Quotes without a line end in them are nothing special.
    let text = format!("{header}{}{}", rows(0..9), row(9, "\"a, \"\"b\"\"\""));
    assert_eq!(read(write(dir.path(), "notes.csv", text)).len(), 10);
}

#[test]
fn overlapping_halves_make_the_whole() {
    let dir = folder();
    let first = write(
        dir.path(),
        "1.csv",
        format!("{HEADER}{}", candle_rows(0..60_000)),
    );
    let second = write(
        dir.path(),
        "2.csv",
        format!("{HEADER}{}", candle_rows(40_000..100_000)),
    );
    let whole = read(write(dir.path(), "whole.csv", candles(100_000)));
    for order in [[&first, &second], [&second, &first]] {
        let series = read_many(&order, &ReadOptions::default()).unwrap();
        assert_eq!(series.timestamps, whole.timestamps);
        assert_eq!(series.columns, whole.columns);
    }
}

#[test]
fn a_pattern_that_matches_nothing_is_named() {
    let dir = folder();
    let message = refusal(dir.path().join("*.nothing"));
    assert!(
        message.contains("*.nothing") && message.contains("no file matches"),
        "{message}"
    );
}

#[test]
fn any_columns_of_a_csv_file_or_a_parquet_file() {
    let dir = folder();
    let schema = Schema {
        time: ColumnSpec::new("when", Scale::Identity),
        columns: vec![
            ColumnSpec::new("load", Scale::Log1p),
            ColumnSpec::new("celsius", Scale::Identity),
        ],
        step: 3600,
    };
    let options = ReadOptions::default().with_schema(schema);
    let csv: String = (0..50)
        .map(|i| format!("{},x,{},{}\n", -3 + i % 7, i * 3600, i * 2))
        .collect();
    let csv = write(
        dir.path(),
        "a.csv",
        format!("celsius,note,when,load\n{csv}"),
    );
    let from_csv = read_series(csv, &options).unwrap();

    let celsius: Vec<i64> = (0..50).map(|i| -3 + i % 7).collect();
    let load: Vec<f64> = (0..50).map(|i| f64::from(i * 2)).collect();
    let when: Vec<i64> = (0..50).map(|i| i * 3600).collect();
    let note: ArrayRef = Arc::new(StringArray::from(vec!["x"; 50]));
    let columns = |when: ArrayRef| {
        vec![
            ("load", Arc::new(Float64Array::from(load.clone())) as _),
            ("note", note.clone()),
            ("WHEN", when),
            ("celsius", Arc::new(Int64Array::from(celsius.clone())) as _),
        ]
    };
    let seconds: ArrayRef = Arc::new(Int64Array::from(when.clone()));
    let nanos: ArrayRef = Arc::new(Int64Array::from_iter_values(
        when.iter().map(|t| t * 1_000_000_000),
    ));
    let nanos = arrow::compute::cast(
        &nanos,
        &DataType::Timestamp(arrow::datatypes::TimeUnit::Nanosecond, None),
    )
    .unwrap();
    for (name, when) in [("seconds.parquet", seconds), ("nanos.parquet", nanos)] {
        let series = read_series(parquet_of(dir.path(), name, columns(when)), &options).unwrap();
        assert_eq!(series.timestamps, from_csv.timestamps, "{name}");
        assert_eq!(series.columns, from_csv.columns, "{name}");
    }
}

#[test]
fn bad_parquet_files_are_refused_in_words() {
    let dir = folder();
    let times: ArrayRef = Arc::new(Int64Array::from_iter_values((0..9).map(|i| i * 60)));
    let prices = |values: Vec<f64>| Arc::new(Float64Array::from(values)) as ArrayRef;
    let columns = |low: ArrayRef| {
        let good = prices(vec![1.0; 9]);
        vec![
            ("Timestamp", times.clone()),
            ("Open", good.clone()),
            ("High", good.clone()),
            ("Low", low),
            ("Close", good.clone()),
            ("Volume", good),
        ]
    };
    let mut zero = vec![1.0; 9];
    zero[6] = 0.0;
    let message = refusal(parquet_of(
        dir.path(),
        "zero.parquet",
        columns(prices(zero)),
    ));
    for word in ["zero.parquet", "row 7", "`Low`", "above zero"] {
        assert!(message.contains(word), "`{word}` is missing in: {message}");
    }
    let words = Arc::new(StringArray::from(vec!["cheap"; 9])) as ArrayRef;
    let message = refusal(parquet_of(dir.path(), "words.parquet", columns(words)));
    assert!(
        message.contains("`Low`") && message.contains("expected numbers"),
        "{message}"
    );
    let mut short = columns(prices(vec![1.0; 9]));
    short.pop();
    let message = refusal(parquet_of(dir.path(), "short.parquet", short));
    assert!(
        message.contains("`Volume`") && message.contains("missing"),
        "{message}"
    );

    let mut late = columns(prices(vec![1.0; 9]));
    late[0].1 = Arc::new(TimestampSecondArray::from_iter_values(
        (0..9).map(|i| i * (i64::MAX / 8)),
    ));
    let message = refusal(parquet_of(dir.path(), "late.parquet", late));
    for word in [
        "late.parquet",
        "row 2",
        "`Timestamp`",
        "within the calendar",
    ] {
        assert!(message.contains(word), "`{word}` is missing in: {message}");
    }

    let good = parquet_of(dir.path(), "good.parquet", columns(prices(vec![1.0; 9])));
    assert_eq!(read(&good).len(), 9);
    let bytes = std::fs::read(good).unwrap();
    let cut = write(dir.path(), "cut.parquet", &bytes[..bytes.len() - 20]);
    let message = refusal(cut);
    assert!(
        message.contains("cut.parquet") && message.contains("Parquet"),
        "{message}"
    );
}

#[test]
fn a_shard_can_be_a_source() {
    let dir = folder();
    let csv = write(dir.path(), "c.csv", candles(500));
    prepare(&PrepareOptions::new(csv, dir.path().join("set")).with_windows(small_windows()))
        .unwrap();
    let data = Dataset::open(dir.path().join("set")).unwrap();
    let shard = dir
        .path()
        .join("set")
        .join(&data.manifest().unwrap().shards[0].file);
    let names = ["Open", "High", "Low", "Close", "Volume"];
    let schema = Schema {
        columns: names
            .map(|n| ColumnSpec::new(n, Scale::Identity))
            .into_iter()
            .collect(),
        ..Schema::ohlcv()
    };
    let series = read_series(shard, &ReadOptions::default().with_schema(schema)).unwrap();
    let rows = data.rows().unwrap();
    assert_eq!(series.timestamps, rows.timestamps);
    assert!((0..500).all(|i| series.columns[4][i] == f64::from(rows.row(i)[4])));
}

/// Rows that a shard marks as filled are no observations wherever they are read.
#[test]
fn what_a_shard_marks_as_filled_is_missing_when_the_shard_is_a_source() {
    let dir = folder();
    let text = candles(500).replace(&candle_rows(100..103), "");
    let csv = write(dir.path(), "c.csv", text);
    let windows = WindowOptions {
        gaps: GapPolicy::Fill { limit: 5 },
        ..small_windows()
    };
    prepare(&PrepareOptions::new(csv, dir.path().join("set")).with_windows(windows)).unwrap();
    let data = Dataset::open(dir.path().join("set")).unwrap();
    let shards = &data.manifest().unwrap().shards;
    let shard = dir.path().join("set").join(&shards[0].file);
    let schema = Schema {
        columns: vec![ColumnSpec::new("Close", Scale::Identity)],
        ..Schema::ohlcv()
    };
    let series = read_series(shard, &ReadOptions::default().with_schema(schema)).unwrap();
    let rows = data.rows().unwrap();
    assert_eq!(series.valid.iter().filter(|v| !**v).count(), 3);
    assert_eq!(series.valid, rows.valid);
    assert!(series.columns[0][100..103].iter().all(|x| x.is_nan()));
    // Split windows stay out of them, and filling gives what was filled before.
    let windows = Dataset::in_memory(series.clone(), &small_windows()).unwrap();
    let crosses = |start: &u64| (100 - 15..103).contains(start);
    assert!(!windows.starts(Split::Train).iter().any(crosses));
    let filled = fill_gaps(series, &GapPolicy::Fill { limit: 5 }).unwrap();
    assert!((0..500).all(|i| filled.columns[0][i] == f64::from(rows.row(i)[3])));
    assert_eq!(filled.valid, rows.valid);
}

#[test]
fn dates_in_a_parquet_file_are_times() {
    let dir = folder();
    let schema = Schema {
        time: ColumnSpec::new("day", Scale::Identity),
        columns: vec![ColumnSpec::new("x", Scale::Identity)],
        step: 86_400,
    };
    let options = ReadOptions::default().with_schema(schema);
    let x: ArrayRef = Arc::new(Float64Array::from(vec![1.0, 2.0, 3.0]));
    let days = [19_723, 19_724, 19_725];
    let date32: ArrayRef = Arc::new(Date32Array::from(days.to_vec()));
    let millis = days.map(|d| i64::from(d) * 86_400_000);
    let date64: ArrayRef = Arc::new(Date64Array::from(millis.to_vec()));
    let text: ArrayRef = Arc::new(StringArray::from(vec![
        "2024-01-01",
        "2024-01-02 00:00",
        "2024-01-03T01:00:00+01:00",
    ]));
    let large = arrow::compute::cast(&text, &DataType::LargeUtf8).unwrap();
    for (name, day) in [
        ("32", date32),
        ("64", date64),
        ("text", text),
        ("large", large),
    ] {
        let path = parquet_of(dir.path(), name, vec![("day", day), ("x", x.clone())]);
        let series = read_series(path, &options).unwrap();
        assert_eq!(
            series.timestamps,
            [1_704_067_200, 1_704_153_600, 1_704_240_000],
            "{name}"
        );
    }
    let words: ArrayRef = Arc::new(StringArray::from(vec!["2024-01-01", "soon", "later"]));
    let path = parquet_of(dir.path(), "words.parquet", vec![("day", words), ("x", x)]);
    let message = read_series(path, &options).unwrap_err().to_string();
    for word in ["words.parquet", "row 2", "`day`", "`soon`", "a date"] {
        assert!(message.contains(word), "`{word}` is missing in: {message}");
    }
}

/// Features, few bytes of memory, and many pages: what comes out is what everything in memory gives.
#[test]
fn features_and_streaming_give_what_memory_gives() {
    let dir = folder();
    let text = candles(200_000);
    let csv = write(dir.path(), "c.csv", text);
    let read = ReadOptions::default().with_features(vec![
        Feature::Return { of: None, steps: 5 },
        Feature::Rsi {
            of: None,
            window: 14,
        },
        Feature::TimeOfDay,
    ]);
    let windows = WindowOptions {
        length: 64,
        stride: 32,
        ..WindowOptions::default()
    };
    let series = read_series(&csv, &read).unwrap();
    assert_eq!(
        series.schema.names()[5..],
        ["return_5", "rsi_14", "day_sin", "day_cos"]
    );
    let memory = Dataset::in_memory(series, &windows).unwrap();

    let out = dir.path().join("set");
    let options = PrepareOptions::new(&csv, &out)
        .with_read(read.clone())
        .with_windows(windows)
        .with_shard_bytes(1)
        .with_memory_bytes(1 << 20);
    prepare(&options).unwrap();
    let shards = Dataset::open(&out).unwrap();
    assert_eq!(shards.manifest().unwrap().shards.len(), 4);
    assert_eq!(shards.read_options(), Some(&read));
    assert_eq!(shards.transform(), memory.transform());

    // A loader that may hold two of the four pages, and one that holds everything.
    let page = 65_536 * (4 * 9 + 1);
    let options = LoaderOptions::new(16)
        .shuffled(5)
        .with_memory_bytes(2 * page);
    let sorted = |loader: mamba_ssm_data::Loader| {
        let mut windows: Vec<(u64, Vec<f32>, Vec<f32>)> = Vec::new();
        for batch in loader {
            let batch = batch.unwrap();
            for (i, &start) in batch.starts.iter().enumerate() {
                let values = &batch.values[i * 64 * 9..(i + 1) * 64 * 9];
                let mask = &batch.mask[i * 64..(i + 1) * 64];
                windows.push((start, values.to_vec(), mask.to_vec()));
            }
        }
        windows.sort_by_key(|w| w.0);
        windows
    };
    let paged = sorted(shards.loader(Split::Train, &options).unwrap());
    let resident = sorted(memory.loader(Split::Train, &options).unwrap());
    assert!(paged.len() > 4000, "{}", paged.len());
    assert!(paged == resident, "pages and memory give different windows");

    // The order of a bounded loader is as repeatable and as resumable as any.
    let order = |skip| {
        let options = options.clone().skipping(skip).with_workers(2, 1);
        let loader = shards.loader(Split::Train, &options).unwrap();
        loader.flat_map(|b| b.unwrap().starts).collect::<Vec<_>>()
    };
    assert_eq!(order(0)[7 * 16..], order(7));
}

//! From a file to batches, by way of shards and in memory.

use std::io::Write;

use mamba_ssm_data::{
    Batch, Dataset, Error, GapPolicy, LoaderOptions, PrepareOptions, Protocol, ReadOptions, Split,
    WindowOptions, prepare, read_series,
};

use crate::support::{HEADER, candle_rows, candles, folder, names_in, price, small_windows, write};

fn set(text: &str, windows: WindowOptions, shard_bytes: usize) -> (tempfile::TempDir, Dataset) {
    let dir = folder();
    let csv = write(dir.path(), "c.csv", text);
    let options = PrepareOptions::new(&csv, dir.path().join("set"))
        .with_windows(windows)
        .with_shard_bytes(shard_bytes);
    prepare(&options).unwrap();
    let data = Dataset::open(dir.path().join("set")).unwrap();
    (dir, data)
}

fn batches(data: &Dataset, options: &LoaderOptions) -> Vec<Batch> {
    data.loader(Split::Train, options)
        .unwrap()
        .collect::<Result<_, _>>()
        .unwrap()
}

#[test]
fn every_spelling_of_the_kaggle_layout_reads_alike() {
    let dir = folder();
    let plain = write(dir.path(), "plain.csv", candles(300));
    let expected = read_series(&plain, &ReadOptions::default()).unwrap();

    let rows = candle_rows(0..300);
    let with_datetime: String = rows
        .lines()
        .map(|l| l.replacen(',', ".0,", 1) + ",2020-09-13 12:27:00+00:00\r\n")
        .collect();
    let dated = format!("\u{feff}Timestamp,Open,High,Low,Close,Volume,datetime\r\n{with_datetime}");
    let quoted: String = rows
        .lines()
        .map(|l| format!("\"{}\"\n", l.replace(',', "\",\"")))
        .collect();
    let mut zip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    zip.write_all(candles(300).as_bytes()).unwrap();

    for (name, bytes) in [
        ("dated.csv", dated.into_bytes()),
        ("quoted.csv", format!("{HEADER}{quoted}").into_bytes()),
        ("candles.csv.gz", zip.finish().unwrap()),
        ("no_last_newline.csv", candles(300).trim_end().into()),
    ] {
        let path = write(dir.path(), name, bytes);
        let series = read_series(&path, &ReadOptions::default()).unwrap();
        assert_eq!(series.timestamps, expected.timestamps, "{name}");
        assert_eq!(series.columns, expected.columns, "{name}");
        assert_eq!(series.valid, expected.valid, "{name}");
    }
    assert_eq!(expected.columns[3][17], price(17));
}

#[test]
fn from_and_to_keep_a_range_of_time() {
    let dir = folder();
    let path = write(dir.path(), "c.csv", candles(100));
    let options = ReadOptions::default()
        .with_from(1_600_000_020 + 600)
        .with_to(1_600_000_020 + 1200);
    let series = read_series(&path, &options).unwrap();
    assert_eq!(series.len(), 10);
    assert_eq!(series.columns[3][0], price(10));
}

#[test]
fn shards_give_back_what_was_prepared() {
    let text = candles(150_000);
    // One row group of 65,536 rows a shard.
    let (dir, data) = set(&text, small_windows(), 1);
    assert_eq!(data.manifest().unwrap().shards.len(), 3);
    let series = read_series(dir.path().join("c.csv"), &ReadOptions::default()).unwrap();
    let memory = Dataset::in_memory(series, &small_windows()).unwrap();
    assert_eq!(*data.rows().unwrap(), *memory.rows().unwrap());
    assert_eq!(data.transform(), memory.transform());
    for split in Split::ALL {
        assert_eq!(data.starts(split), memory.starts(split));
    }
    let rows = data.rows().unwrap();
    let close = data.transform().invert(3, rows.row(149_999)[3]);
    assert!((close - price(149_999)).abs() < 1e-4, "{close}");
}

#[test]
fn statistics_come_from_the_training_rows_alone() {
    let changed: String = candle_rows(0..1000)
        .lines()
        .enumerate()
        .map(|(i, l)| {
            if i < 800 {
                format!("{l}\n")
            } else {
                let time = l.split(',').next().unwrap();
                format!("{time},9000,9000,9000,9000,9000\n")
            }
        })
        .collect();
    let (_a, plain) = set(&candles(1000), small_windows(), 1 << 20);
    let (_b, other) = set(&format!("{HEADER}{changed}"), small_windows(), 1 << 20);
    assert_eq!(plain.transform(), other.transform());
    assert_eq!(plain.fitted_rows(), 0..800);

    let note = WindowOptions {
        protocol: Protocol::Note,
        ..small_windows()
    };
    let (_c, plain) = set(&candles(1000), note.clone(), 1 << 20);
    let (_d, other) = set(&format!("{HEADER}{changed}"), note, 1 << 20);
    assert_ne!(plain.transform(), other.transform());
}

#[test]
fn a_batch_holds_the_rows_of_its_windows() {
    let (_dir, data) = set(&candles(1000), small_windows(), 1 << 20);
    let rows = data.rows().unwrap();
    let all = batches(&data, &LoaderOptions::new(32).shuffled(3));
    for batch in &all {
        assert_eq!(batch.values.len(), batch.batch * 16 * 5);
        for (i, &start) in batch.starts.iter().enumerate() {
            let from = start as usize * 5;
            let got = &batch.values[i * 80..(i + 1) * 80];
            assert_eq!(got, &rows.values[from..from + 80]);
        }
        assert!(batch.mask.iter().all(|&m| m == 1.0));
    }
    let mut starts: Vec<u64> = all.iter().flat_map(|b| b.starts.clone()).collect();
    assert_ne!(starts, data.starts(Split::Train), "shuffled");
    starts.sort_unstable();
    assert_eq!(starts, data.starts(Split::Train));
}

#[test]
fn the_order_depends_on_seed_and_epoch_alone() {
    let (_dir, data) = set(&candles(2000), small_windows(), 1 << 20);
    let options = LoaderOptions::new(7).shuffled(3);
    let plain = batches(&data, &options);
    assert_eq!(plain, batches(&data, &options.clone().with_workers(3, 2)));
    assert_ne!(plain, batches(&data, &options.clone().with_epoch(1)));
    assert_ne!(plain, batches(&data, &LoaderOptions::new(7).shuffled(4)));
}

#[test]
fn resuming_goes_on_with_the_next_batch() {
    let (dir, data) = set(&candles(2000), small_windows(), 1 << 20);
    for (workers, rank, world) in [(0, 0, 1), (1, 0, 1), (3, 0, 1), (2, 1, 3)] {
        let options = LoaderOptions::new(8)
            .shuffled(3)
            .sharded(rank, world)
            .with_workers(workers, 1);
        let all = batches(&data, &options);
        for taken in [0, 1, 5, all.len(), all.len() + 3] {
            // As another process would: nothing but the set and the position is carried over.
            let again = Dataset::open(dir.path().join("set")).unwrap();
            let rest = batches(&again, &options.clone().skipping(taken));
            assert_eq!(rest, all[taken.min(all.len())..], "{workers} {taken}");
        }
    }
    let mut loader = data
        .loader(Split::Train, &LoaderOptions::new(8).limited(4))
        .unwrap();
    loader.next();
    assert_eq!(
        (loader.position(), loader.len(), loader.batches()),
        (1, 3, 4)
    );
}

#[test]
fn ranks_share_the_windows_without_overlap() {
    let (_dir, data) = set(&candles(2000), small_windows(), 1 << 20);
    let of_rank = |rank| {
        batches(&data, &LoaderOptions::new(8).shuffled(3).sharded(rank, 3))
            .iter()
            .flat_map(|b| b.starts.clone())
            .collect::<Vec<_>>()
    };
    let shares = [of_rank(0), of_rank(1), of_rank(2)];
    let each = data.starts(Split::Train).len() / 3;
    assert!(shares.iter().all(|s| s.len() == each));
    let mut together = shares.concat();
    together.sort_unstable();
    together.dedup();
    assert_eq!(together.len(), 3 * each);
}

#[test]
fn missing_cells_leave_their_windows_out_or_masked() {
    let text = candles(1000).replace(
        &candle_rows(100..101),
        &format!("{},,,,,\n", 1_600_000_020 + 100 * 60),
    );
    let (_a, split) = set(&text, small_windows(), 1 << 20);
    assert_eq!(split.manifest().unwrap().valid_rows, 999);
    let crosses = |s: &u64| (*s..*s + 16).contains(&100);
    assert!(!split.starts(Split::Train).iter().any(crosses));

    let fill = WindowOptions {
        gaps: GapPolicy::Fill { limit: 3 },
        ..small_windows()
    };
    let (_b, filled) = set(&text, fill, 1 << 20);
    let start = *filled
        .starts(Split::Train)
        .iter()
        .find(|s| crosses(s))
        .unwrap();
    let batch = batches(&filled, &LoaderOptions::new(1))
        .into_iter()
        .find(|b| b.starts[0] == start)
        .unwrap();
    let at = (100 - start) as usize;
    assert_eq!(batch.mask.iter().filter(|&&m| m == 0.0).count(), 1);
    assert_eq!(batch.mask[at], 0.0);
    assert_eq!(
        batch.values[at * 5..at * 5 + 5],
        batch.values[at * 5 - 5..at * 5]
    );
}

#[test]
fn unseen_rows_are_scored_with_the_runs_own_transform() {
    let (dir, data) = set(&candles(1000), small_windows(), 1 << 20);
    let path = write(
        dir.path(),
        "later.csv",
        format!("{HEADER}{}", candle_rows(1000..1200)),
    );
    let series = read_series(&path, &ReadOptions::default()).unwrap();
    let windows = data.window_options().clone();
    let unseen =
        Dataset::with_transform(series, data.transform().clone(), &windows, Split::Test).unwrap();
    assert_eq!(unseen.transform(), data.transform());
    assert_eq!(unseen.starts(Split::Test).len(), 47);
    assert!(unseen.starts(Split::Train).is_empty());
    let close = unseen
        .transform()
        .invert(3, unseen.rows().unwrap().row(0)[3]);
    assert!((close - price(1000)).abs() < 1e-4);
}

#[test]
fn preparing_again_replaces_the_set_as_a_whole() {
    let (dir, first) = set(&candles(1000), small_windows(), 1 << 20);
    let csv = write(dir.path(), "more.csv", candles(1500));
    let options = PrepareOptions::new(&csv, dir.path().join("set")).with_windows(small_windows());
    prepare(&options).unwrap();
    let second = Dataset::open(dir.path().join("set")).unwrap();
    assert_eq!((first.len(), second.len()), (1000, 1500));
    let names = names_in(&dir.path().join("set"));
    assert_eq!(names, [".lock", "manifest.json", "set-000002"]);
}

/// Ninety seconds between two rows of minutes cannot be filled on the clock.
#[test]
fn masked_windows_never_cross_a_jump_off_the_clock() {
    let late = |rows: String| -> String {
        rows.lines()
            .map(|line| {
                let (time, rest) = line.split_once(',').unwrap();
                format!("{},{rest}\n", time.parse::<i64>().unwrap() + 30)
            })
            .collect()
    };
    // Three minutes are missing on the clock, and later on there is the jump.
    let text = format!(
        "{HEADER}{}{}{}",
        candle_rows(0..200),
        candle_rows(203..500),
        late(candle_rows(500..1000))
    );
    let mask = GapPolicy::Mask { min_valid: 0.5 };
    for gaps in [mask, GapPolicy::Fill { limit: 5 }] {
        let windows = WindowOptions {
            gaps,
            ..small_windows()
        };
        let (dir, data) = set(&text, windows.clone(), 1 << 20);
        let rows = data.rows().unwrap();
        assert_eq!(rows.len(), 1000);
        let starts: Vec<u64> = Split::ALL.iter().flat_map(|&s| data.starts(s)).collect();
        for start in &starts {
            let times = &rows.timestamps[*start as usize..*start as usize + 16];
            assert!(
                times.windows(2).all(|w| w[1] - w[0] == 60),
                "{gaps:?} {start}"
            );
        }
        assert!(starts.contains(&484) && starts.contains(&500), "{gaps:?}");
        assert!(starts.iter().any(|s| (190..200).contains(s)), "{gaps:?}");

        let series = read_series(dir.path().join("c.csv"), &ReadOptions::default()).unwrap();
        let transform = data.transform().clone();
        let unseen = Dataset::with_transform(series, transform, &windows, Split::Test).unwrap();
        assert!(
            !unseen
                .starts(Split::Test)
                .iter()
                .any(|s| (485..500).contains(s))
        );
    }
}

/// A set of four pages, of which the options hold two.
fn larger_than_memory() -> (tempfile::TempDir, Dataset, LoaderOptions) {
    let (dir, data) = set(&candles(200_000), small_windows(), 1);
    let page = 65_536 * (4 * 5 + 1);
    let options = LoaderOptions::new(16)
        .shuffled(5)
        .with_memory_bytes(2 * page);
    (dir, data, options)
}

#[test]
fn the_order_is_the_same_whether_or_not_the_rows_are_in_memory() {
    let (dir, data, options) = larger_than_memory();
    let order = |data: &Dataset, rank: usize| {
        let options = options.clone().sharded(rank, 2);
        let loader = data.loader(Split::Train, &options).unwrap();
        loader.order().to_vec()
    };
    let paged = [order(&data, 0), order(&data, 1)];
    let resident = Dataset::open(dir.path().join("set")).unwrap();
    resident.rows().unwrap();
    assert!(
        order(&resident, 0) == paged[0],
        "the rows in memory change the order"
    );
    // One rank holds the rows in memory, another one does not.
    let mut both = [order(&resident, 0), paged[1].clone()].concat();
    both.sort_unstable();
    both.dedup();
    assert_eq!(both.len(), 2 * paged[0].len());

    // What the order may depend on.
    let other = options.clone().with_memory_bytes(1 << 30);
    let loader = data.loader(Split::Train, &other.sharded(0, 2)).unwrap();
    assert!(loader.order() != paged[0]);
}

#[test]
fn a_loader_dropped_in_the_middle_goes_on_from_its_position() {
    let (dir, data) = set(&candles(2000), small_windows(), 1 << 20);
    let options = LoaderOptions::new(8).shuffled(3).with_workers(3, 2);
    let all = batches(&data, &options);
    let mut loader = data.loader(Split::Train, &options).unwrap();
    let mut seen: Vec<Batch> = loader.by_ref().take(7).map(Result::unwrap).collect();
    // Batches that workers have made ahead were not taken, and do not count.
    let position = loader.position();
    drop(loader);
    assert_eq!(position, 7);
    let again = Dataset::open(dir.path().join("set")).unwrap();
    seen.extend(batches(&again, &options.skipping(position)));
    assert!(seen == all);
}

#[test]
fn a_set_that_was_replaced_says_so_to_those_who_still_read_it() {
    let (dir, data) = set(&candles(1000), small_windows(), 1 << 20);
    let csv = write(dir.path(), "more.csv", candles(1500));
    let out = dir.path().join("set");
    prepare(&PrepareOptions::new(&csv, &out).with_windows(small_windows())).unwrap();
    let error = data.rows().unwrap_err();
    assert!(matches!(error, Error::Replaced { .. }), "{error}");
    let message = error.to_string();
    for word in ["part-00000.parquet", "prepared anew", "open the set again"] {
        assert!(message.contains(word), "`{word}` is missing in: {message}");
    }
    let mut loader = data.loader(Split::Train, &LoaderOptions::new(4)).unwrap();
    let error = loader.next().unwrap().unwrap_err();
    assert!(matches!(error, Error::Replaced { .. }), "{error}");
    assert_eq!(Dataset::open(&out).unwrap().rows().unwrap().len(), 1500);
}

/// Shards of the size that is the default: 64 MB of rows.
#[test]
fn a_large_set_is_cut_into_shards_of_the_default_size() {
    let dir = folder();
    let header: String = (0..60).map(|c| format!(",c{c}")).collect();
    let cells = ",1".repeat(60);
    let mut text = format!("time{header}\n");
    for row in 0..400_000 {
        text += &format!("{row}{cells}\n");
    }
    let csv = write(dir.path(), "wide.csv", text);
    let schema = mamba_ssm_data::Schema {
        time: mamba_ssm_data::ColumnSpec::new("time", mamba_ssm_data::Scale::Identity),
        columns: (0..60)
            .map(|c| {
                mamba_ssm_data::ColumnSpec::new(format!("c{c}"), mamba_ssm_data::Scale::Identity)
            })
            .collect(),
        step: 1,
    };
    let options = PrepareOptions::new(csv, dir.path().join("set"))
        .with_read(ReadOptions::default().with_schema(schema))
        .with_windows(small_windows());
    let summary = prepare(&options).unwrap();
    let data = Dataset::open(dir.path().join("set")).unwrap();
    let rows: Vec<u64> = data
        .manifest()
        .unwrap()
        .shards
        .iter()
        .map(|s| s.rows)
        .collect();
    assert_eq!((summary.shards, rows.len()), (2, 2));
    // Whole row groups of 65,536 rows, as many as 64 MB hold.
    assert_eq!(rows, [4 * 65_536, 400_000 - 4 * 65_536]);
    assert_eq!(data.rows().unwrap().timestamps.len(), 400_000);
}

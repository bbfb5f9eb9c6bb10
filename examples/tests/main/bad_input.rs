//! Every kind of bad input is answered by an error that says where it is and what was expected, and by an
//! exit code that is not zero.

use std::fs;

use super::workshop::{Workshop, edit};

const HEADER: &str = "Timestamp,Open,High,Low,Close,Volume\n";

fn rows(count: usize) -> String {
    rows_every(60, count)
}

fn rows_every(seconds: usize, count: usize) -> String {
    let row = |i: usize| {
        let time = 1_600_000_000 + seconds * i;
        format!("{time},10,12,9,{},{}\n", 10 + i % 2, i % 5)
    };
    HEADER.to_owned() + &(0..count).map(row).collect::<String>()
}

/// `prepare` on a file of this content fails with these words, and with the file's name.
fn prepare_fails(content: &str, words: &[&str]) {
    let shop = Workshop::new();
    shop.write("candles.csv", content);
    let line = "prepare --csv @candles.csv --out @shards --length 16 --stride 8";
    shop.fails(line, words);
    assert!(!shop.path("shards/manifest.json").exists());
}

/// A workshop with a run that was trained for one epoch.
fn trained() -> Workshop {
    let shop = Workshop::with_shards(2000);
    shop.must("train --data @shards --out @run --preset anchored --config @tiny.toml");
    shop
}

#[test]
fn no_such_file() {
    Workshop::new().fails(
        "prepare --csv @nothing.csv --out @shards",
        &["nothing.csv", "no such file"],
    );
}

#[test]
fn an_empty_file_and_a_header_alone() {
    prepare_fails("", &["candles.csv", "empty"]);
    prepare_fails(HEADER, &["candles.csv", "no rows"]);
}

#[test]
fn wrong_columns() {
    let text = rows(100).replace("Close", "Last");
    prepare_fails(&text, &["candles.csv", "Close", "Last"]);
}

#[test]
fn a_word_where_a_number_belongs() {
    let text = rows(100).replacen(",12,9,10,2", ",12,nine,10,2", 1);
    prepare_fails(&text, &["candles.csv", "row 4", "`Low`", "`nine`"]);
}

#[test]
fn timestamps_out_of_order_or_repeated() {
    let swapped = rows(100).replacen("1600000120", "1600000010", 1);
    prepare_fails(&swapped, &["candles.csv", "row 4", "1600000010"]);
    let repeated = rows(100).replacen("1600000120", "1600000060", 1);
    prepare_fails(&repeated, &["candles.csv", "row 4", "repeats"]);
}

#[test]
fn zero_and_negative_prices() {
    for bad in ["0", "-3"] {
        let text = rows(100).replacen(",12,9,11,3", &format!(",12,{bad},11,3"), 1);
        prepare_fails(&text, &["candles.csv", "row 5", "`Low`", bad]);
    }
}

#[test]
fn fewer_rows_than_a_window() {
    prepare_fails(&rows(10), &["10 rows", "16"]);
}

#[test]
fn a_gzip_file_cut_short() {
    let shop = Workshop::new();
    let text = rows(500);
    // The header of a gzip file, then one block of its own length that is stored as it is.
    let mut packed = vec![0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 0xff, 1];
    let length = u16::try_from(text.len()).expect("a small file");
    packed.extend([length.to_le_bytes(), (!length).to_le_bytes()].concat());
    packed.extend(text.as_bytes());
    packed.truncate(packed.len() / 2);
    shop.write("candles.csv.gz", packed);
    let line = "prepare --csv @candles.csv.gz --out @shards --length 16 --stride 8";
    shop.fails(line, &["candles.csv.gz", "gzip"]);
}

#[test]
fn times_that_are_none() {
    let shop = Workshop::with_market(500);
    let line = "prepare --csv @market.csv --out @shards --length 16 --stride 8";
    shop.fails(&format!("{line} --from yesterday"), &["yesterday"]);
    shop.fails(&format!("{line} --to 2024-13-01"), &["2024-13-01"]);
    // Nothing is left of the file.
    shop.fails(&format!("{line} --from 2030-01-01"), &["market.csv"]);
}

#[test]
fn a_shard_cut_short() {
    let shop = Workshop::with_shards(2000);
    let shard = fs::read_dir(shop.path("shards"))
        .unwrap()
        .flat_map(|entry| walk(entry.unwrap().path()))
        .find(|path| path.extension().is_some_and(|e| e == "parquet"))
        .expect("a shard");
    let bytes = fs::read(&shard).unwrap();
    fs::write(&shard, &bytes[..bytes.len() - 100]).unwrap();
    let name = shard.file_name().unwrap().to_str().unwrap().to_owned();
    shop.fails(
        "train --data @shards --out @run --config @tiny.toml",
        &[&name, "prepare"],
    );
}

fn walk(path: std::path::PathBuf) -> Vec<std::path::PathBuf> {
    match fs::read_dir(&path) {
        Ok(entries) => entries
            .flat_map(|entry| walk(entry.unwrap().path()))
            .collect(),
        Err(_) => vec![path],
    }
}

#[test]
fn a_checkpoint_of_another_architecture() {
    let shop = trained();
    edit(&shop.path("run/config.toml"), |text| {
        text.replace("d_model = 16", "d_model = 32")
    });
    // The file, the parameter, what the settings ask for and what the file holds.
    let words = [
        "best/model.safetensors",
        "another architecture",
        "input_projection.weight",
        "expected [15, 32]",
        "found [15, 16]",
    ];
    shop.fails("evaluate --run @run", &words);
    shop.fails(
        "forecast --run @run --csv @market.csv --horizon 2",
        &words[..3],
    );
    let words = ["last/model.safetensors", "input_projection.weight", "32"];
    shop.fails("train --data @shards --out @run --resume", &words);
}

#[test]
fn run_and_data_folders_that_are_none() {
    let shop = Workshop::with_market(2000);
    shop.fails("evaluate --run @nowhere", &["nowhere", "not a run folder"]);
    shop.fails(
        "forecast --run @nowhere --csv @market.csv --horizon 3",
        &["nowhere"],
    );
    shop.fails("compare --run @nowhere", &["nowhere"]);
    shop.fails("train --data @nowhere --out @run", &["nowhere"]);
    shop.fails("train --data @nowhere --out @run --resume", &["nowhere"]);
    shop.must("prepare --csv @market.csv --out @shards --length 64 --stride 32");
    shop.fails(
        "train --data @shards --out @run --resume",
        &["run", "not a run folder"],
    );
}

#[test]
fn a_run_that_is_there_already_or_not_evaluated_yet() {
    let shop = trained();
    shop.fails(
        "train --data @shards --out @run --config @tiny.toml",
        &["run", "--resume", "--out"],
    );
    shop.fails("compare --run @run --out @out", &["not evaluated yet"]);
}

#[test]
fn a_resumed_run_takes_no_other_settings() {
    let shop = trained();
    let before = shop.read("run/config.toml");
    for flag in [
        "--config @tiny.toml",
        "--preset anchored",
        "--model mamba2",
        "--precision f32",
    ] {
        let name = flag.split(' ').next().expect("a name");
        shop.refuses(
            &format!("train --data @shards --out @run --resume {flag}"),
            &["--resume", name, "cannot be used with"],
        );
    }
    assert_eq!(shop.read("run/config.toml"), before);
}

#[test]
fn a_config_with_an_unknown_key() {
    let shop = Workshop::with_shards(2000);
    shop.write("wrong.toml", "[model]\nd_mdoel = 3\n");
    shop.fails(
        "train --data @shards --out @run --config @wrong.toml",
        &["wrong.toml", "d_mdoel", "d_model"],
    );
    shop.write("wrong.toml", "[model]\nheaddim = 7\n");
    shop.fails(
        "train --data @shards --out @run --config @wrong.toml",
        &["d_inner = 256 is not a multiple of headdim = 7"],
    );
}

#[test]
fn candles_of_other_columns_or_too_few_for_a_trained_run() {
    let shop = trained();
    shop.write("short.csv", rows(20));
    shop.fails("evaluate --run @run --csv @short.csv", &["20 rows", "64"]);
    // A gap forty rows before the end: the last window is not whole.
    let text: Vec<String> = rows(200).lines().map(str::to_owned).collect();
    let (head, tail) = (text[..150].join("\n"), text[160..].join("\n"));
    shop.write("gap.csv", format!("{head}\n{tail}\n"));
    shop.fails("forecast --run @run --csv @gap.csv --horizon 3", &["gap"]);

    let renamed = rows(200).replace("Volume", "Trades");
    shop.write("columns.csv", renamed);
    let words = ["columns.csv", "Volume", "Trades"];
    shop.fails("evaluate --run @run --csv @columns.csv", &words);
    shop.fails("forecast --run @run --csv @columns.csv --horizon 3", &words);
}

#[test]
fn candles_that_are_no_minutes() {
    let shop = trained();
    shop.write("five.csv", rows_every(300, 400));
    let words = ["five.csv", "300 s apart", "1m"];
    shop.fails("evaluate --run @run --csv @five.csv", &words);
    shop.fails("forecast --run @run --csv @five.csv --horizon 3", &words);
    // The protocol `note` takes rows as they come, so that such shards can be made.
    shop.must("prepare --csv @five.csv --out @five --length 16 --stride 4 --protocol note");
    for preset in ["note", "anchored"] {
        shop.fails(
            &format!("train --data @five --out @other --preset {preset} --config @tiny.toml"),
            &["five", "300 s apart", "1m"],
        );
    }
    assert!(!shop.path("other").exists());
}

#[test]
fn shards_with_other_statistics() {
    let shop = trained();
    shop.must("prepare --csv @market.csv --out @half --length 64 --stride 32 --to 2024-01-02");
    shop.fails(
        "evaluate --run @run --data @half",
        &["half", "statistics", "--csv"],
    );
    shop.fails(
        "train --data @half --out @run --resume",
        &["half", "statistics", "shards"],
    );
}

#[test]
fn command_lines_that_make_no_sense() {
    let shop = Workshop::new();
    shop.refuses("no-such-command", &["no-such-command", "Usage"]);
    shop.refuses("prepare --csv @market.csv", &["--out", "Usage"]);
    shop.refuses(
        "evaluate --run @run --data @shards --csv @market.csv",
        &["--data", "--csv"],
    );
    shop.refuses("evaluate --run @run --from 2024-01-01", &["--csv"]);
    shop.refuses("train --data @d --out @run --precision f8", &["f8", "bf16"]);
    shop.refuses(
        "train --data @d --out @run --preset nota",
        &["nota", "note"],
    );
}

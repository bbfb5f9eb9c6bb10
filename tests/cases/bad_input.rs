//! Every kind of bad input is answered by an error that says where it is and what was expected.

use std::fs;
use std::io::Write;
use std::process::ExitCode;

use super::workshop::{Workshop, edit};

const HEADER: &str = "Timestamp,Open,High,Low,Close,Volume\n";

fn rows(count: usize) -> String {
    let row = |i: usize| format!("{},10,12,9,11,{}\n", 1_600_000_000 + 60 * i, i % 5);
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
    let text = rows(100).replacen(",12,9,11,2", ",12,nine,11,2", 1);
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
fn a_damaged_gzip_file() {
    let shop = Workshop::new();
    let mut packed = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    packed.write_all(rows(500).as_bytes()).unwrap();
    let bytes = packed.finish().unwrap();
    shop.write("candles.csv.gz", &bytes[..bytes.len() / 2]);
    let line = "prepare --csv @candles.csv.gz --out @shards --length 16 --stride 8";
    shop.fails(line, &["candles.csv.gz", "gzip"]);
}

#[test]
fn a_shard_cut_short() {
    let shop = Workshop::with_market(2000);
    shop.prepare();
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
    let shop = Workshop::with_market(2000);
    shop.prepare();
    shop.must("train --data @shards --out @run --preset anchored --config @tiny.toml");
    edit(&shop.path("run/config.toml"), |text| {
        text.replace("d_model = 16", "d_model = 32")
    });
    shop.fails("evaluate --run @run", &["16", "32"]);
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
    shop.prepare();
    shop.fails(
        "train --data @shards --out @run --resume",
        &["run", "not a run folder"],
    );
}

#[test]
fn a_run_that_is_there_already_or_not_evaluated_yet() {
    let shop = Workshop::with_market(2000);
    shop.prepare();
    shop.must("train --data @shards --out @run --preset anchored --config @tiny.toml");
    shop.fails(
        "train --data @shards --out @run --config @tiny.toml",
        &["--resume"],
    );
    shop.fails("compare --run @run --out @out", &["not evaluated yet"]);
}

#[test]
fn a_config_with_an_unknown_key() {
    let shop = Workshop::with_market(2000);
    shop.prepare();
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
    let shop = Workshop::with_market(2000);
    shop.prepare();
    shop.must("train --data @shards --out @run --preset anchored --config @tiny.toml");
    shop.write("short.csv", rows(20));
    shop.fails("evaluate --run @run --csv @short.csv", &["20 rows", "64"]);
    // A gap forty rows before the end: the last window is not whole.
    let text: Vec<String> = rows(200).lines().map(str::to_owned).collect();
    let (head, tail) = (text[..150].join("\n"), text[160..].join("\n"));
    shop.write("gap.csv", format!("{head}\n{tail}\n"));
    shop.fails("forecast --run @run --csv @gap.csv --horizon 3", &["gap"]);
}

#[test]
fn failure_is_a_non_zero_exit_code() {
    use mamba_ssm_examples::bitcoin;
    let run = |line: &str| bitcoin::main(line.split_whitespace().map(Into::into));
    let failed = |code: ExitCode| format!("{code:?}") != format!("{:?}", ExitCode::SUCCESS);
    assert!(failed(run(
        "bitcoin prepare --csv /nowhere.csv --out /nowhere"
    )));
    assert!(failed(run("bitcoin no-such-command")));
    assert!(!failed(run("bitcoin --help")));
}

//! The commands one after another, as a user would run them.

use std::fs;

use super::workshop::Workshop;

const FEATURES: [&str; 5] = ["Open", "High", "Low", "Close", "Volume"];

#[test]
fn candles_become_an_evaluated_and_compared_forecaster() {
    let shop = Workshop::with_shards(4000);
    for (name, model) in [("mamba", "mamba2"), ("baseline", "transformer")] {
        shop.must(&format!(
            "train --data @shards --out @{name} --model {model} --preset anchored --config @tiny.toml"
        ));
        shop.must(&format!("evaluate --run @{name}"));
    }
    assert_metrics(&shop.json("mamba/metrics.json"));
    for file in ["report.md", "config.toml", "run.json", "history.jsonl"] {
        assert!(shop.path(&format!("mamba/{file}")).is_file(), "{file}");
    }
    let files = fs::read_dir(shop.path("mamba")).unwrap();
    let svgs = files.filter(|f| {
        f.as_ref()
            .unwrap()
            .path()
            .extension()
            .is_some_and(|e| e == "svg")
    });
    assert_eq!(svgs.count(), 6, "five features and the loss");

    shop.must("compare --run @mamba --run @baseline --out @comparison");
    let table = shop.read("comparison/comparison.md");
    assert!(
        table.contains("mamba2 (anchored)") && table.contains("transformer (anchored)"),
        "{table}"
    );

    evaluates_rows_it_has_never_seen(&shop);
    evaluates_other_shards(&shop);
    for run in ["mamba", "baseline"] {
        forecasts_whole_candles(&shop, run);
    }
}

/// The eight keys of every feature and of the average, and what they mean.
fn assert_metrics(metrics: &serde_json::Value) {
    let names: Vec<&String> = metrics["test"].as_object().unwrap().keys().collect();
    assert_eq!(names.len(), FEATURES.len(), "{names:?}");
    let of_features = FEATURES.iter().map(|feature| &metrics["test"][feature]);
    for scores in of_features.clone().chain([&metrics["average"]]) {
        let mut keys: Vec<&str> = scores
            .as_object()
            .unwrap()
            .keys()
            .map(String::as_str)
            .collect();
        keys.sort_unstable();
        let expected = [
            "mae",
            "mape",
            "mse",
            "naive",
            "naive_rmse",
            "r2",
            "rmse",
            "skill",
        ];
        assert_eq!(keys, expected);
        assert!(scores["naive"].is_string(), "{scores}");
        for key in expected.into_iter().filter(|key| *key != "naive") {
            assert!(
                scores[key].as_f64().is_some_and(f64::is_finite),
                "{key}: {scores}"
            );
        }
    }
    for scores in of_features.clone() {
        let number = |key: &str| scores[key].as_f64().unwrap();
        let skill = 1.0 - number("rmse") / number("naive_rmse");
        assert!((number("skill") - skill).abs() < 1e-9, "{scores}");
    }
    let mean = of_features
        .map(|scores| scores["rmse"].as_f64().unwrap())
        .sum::<f64>()
        / 5.0;
    assert!((metrics["average"]["rmse"].as_f64().unwrap() - mean).abs() < 1e-12);
}

/// With the run's own transform; every row but the first of the file is scored, whatever its length.
fn evaluates_rows_it_has_never_seen(shop: &Workshop) {
    shop.must("evaluate --run @mamba --csv @market.csv --out @unseen");
    let unseen = shop.json("unseen/metrics.json");
    assert_eq!(unseen["counts"]["scored"], 3999);
    assert_eq!(unseen["counts"]["distinct_rows"], 3999);
    let seen = shop.json("mamba/metrics.json");
    assert_ne!(unseen["test"]["High"]["rmse"], seen["test"]["High"]["rmse"]);
    assert!(unseen["protocol"].as_str().unwrap().contains("market.csv"));

    // A part of the file, by time: 00:10 to 01:27 are 77 rows, no multiple of the window's 64.
    let times = "--from 2024-01-01T00:10 --to 2024-01-01T01:27";
    shop.must(&format!(
        "evaluate --run @mamba --csv @market.csv {times} --out @part"
    ));
    assert_eq!(shop.json("part/metrics.json")["counts"]["scored"], 76);
}

/// Shards with the run's statistics and other windows: the test rows are scored, once each.
fn evaluates_other_shards(shop: &Workshop) {
    shop.must("prepare --csv @market.csv --out @dense --length 64 --stride 7");
    shop.must("evaluate --run @mamba --data @dense --out @on_dense");
    let scores = |folder: &str| shop.json(&format!("{folder}/metrics.json"));
    let (own, dense) = (scores("mamba"), scores("on_dense"));
    let scored = |metrics: &serde_json::Value| metrics["counts"]["scored"].as_u64().unwrap();
    assert!(scored(&dense) >= scored(&own) && scored(&dense) <= 400);
    assert_eq!(dense["counts"]["distinct_rows"], dense["counts"]["scored"]);
    assert_eq!(own["average"]["naive"], "best_of_each");
}

/// A header and a row per minute after the file's last, candles that a market could have had.
fn forecasts_whole_candles(shop: &Workshop, run: &str) {
    let csv = shop.must(&format!(
        "forecast --run @{run} --csv @market.csv --horizon 7"
    ));
    let lines: Vec<&str> = csv.lines().collect();
    assert_eq!(lines[0], "Timestamp,Open,High,Low,Close,Volume");
    assert_eq!(lines.len(), 1 + 7, "{csv}");
    let market = shop.read("market.csv");
    let last = market
        .lines()
        .last()
        .and_then(|line| line.split(',').next());
    let last: f64 = last
        .and_then(|time| time.parse().ok())
        .expect("a timestamp");
    for (minute, line) in (1..).zip(&lines[1..]) {
        let cells: Vec<f64> = line
            .split(',')
            .map(|cell| cell.parse().expect(line))
            .collect();
        let [time, open, high, low, close, volume] = cells[..] else {
            panic!("{line}")
        };
        assert_eq!(time, last + 60.0 * f64::from(minute));
        assert!(
            [open, high, low, close]
                .iter()
                .all(|p| p.is_finite() && *p > 0.0),
            "{line}"
        );
        assert!(high >= open.max(close) && low <= open.min(close), "{line}");
        assert!(volume.is_finite() && volume >= 0.0, "{line}");
    }
}

#[test]
fn prepare_keeps_the_rows_of_a_time() {
    let shop = Workshop::with_market(3000);
    let line = "prepare --csv @market.csv --length 4 --stride 2";
    let start = 1_704_067_200; // 2024-01-01, where the generated market begins.
    // 24 hours; from the first row on; to the last row.
    for (out, times, rows, from) in [
        (
            "day",
            "--from 2024-01-02 --to 2024-01-03",
            1440,
            start + 86_400,
        ),
        ("head", "--to 2024-01-01T05:00", 300, start),
        ("tail", "--from 1704240000", 120, start + 172_800),
    ] {
        let said = shop.must(&format!("{line} --out @{out} {times}"));
        assert!(said.contains(&format!("{rows} rows from")), "{said}");
        let manifest = shop.json(&format!("{out}/manifest.json"));
        assert_eq!(manifest["rows"], rows, "{times}");
        assert_eq!(manifest["time"][0], from, "{times}");
        assert_eq!(manifest["time"][1], from + 60 * (rows - 1), "{times}");
    }
}

#[test]
fn a_run_resumed_goes_on_where_it_stopped() {
    let shop = Workshop::with_shards(3000);
    shop.write(
        "two.toml",
        super::workshop::TINY.replace("n_layer = 1", "n_layer = 2"),
    );
    for (model, precision) in [("mamba2", "f32"), ("hybrid", "f32"), ("mamba2", "bf16")] {
        let name = |part: &str| format!("{model}_{precision}_{part}");
        let (whole, parts) = (name("whole"), name("parts"));
        let train = format!(
            "train --data @shards --preset anchored --config @two.toml --model {model} --precision {precision}"
        );
        shop.must(&format!("{train} --out @{whole} --epochs 2"));
        shop.must(&format!("{train} --out @{parts} --epochs 1"));
        shop.must(&format!(
            "train --data @shards --out @{parts} --epochs 2 --resume"
        ));
        let losses = losses(&shop, &whole);
        assert_eq!(losses.len(), 2);
        assert_eq!(losses, self::losses(&shop, &parts), "{model}, {precision}");
        let config = shop.read(&format!("{parts}/config.toml"));
        assert!(
            config.contains(&format!("precision = \"{precision}\"")),
            "{config}"
        );
    }
    // Mixed precision is another computation, or the flag did nothing.
    let (wide, narrow) = (
        losses(&shop, "mamba2_f32_whole"),
        losses(&shop, "mamba2_bf16_whole"),
    );
    assert_ne!(wide, narrow);

    let said = shop.must("evaluate --run @hybrid_f32_parts");
    assert!(said.contains("best checkpoint"), "{said}");
    let metrics = shop.json("hybrid_f32_parts/metrics.json");
    assert_eq!(metrics["model"], "hybrid (anchored)");
    assert_metrics(&metrics);
    shop.must("forecast --run @hybrid_f32_parts --csv @market.csv --horizon 2");
}

fn losses(shop: &Workshop, run: &str) -> Vec<f64> {
    shop.read(&format!("{run}/history.jsonl"))
        .lines()
        .map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap())
        .map(|record| record["val_loss"].as_f64().unwrap())
        .collect()
}

#[test]
fn the_published_notes_own_protocol_runs_too() {
    let shop = Workshop::with_market(3000);
    shop.must("prepare --csv @market.csv --out @shards --length 64 --stride 16 --protocol note");
    shop.must("train --data @shards --out @run --preset note --config @tiny.toml");
    shop.must("evaluate --run @run");
    let report = shop.read("run/report.md");
    for word in [
        "Forecasting Bitcoin with Mamba State Space Models",
        "random",
    ] {
        assert!(report.contains(word), "{word}: {report}");
    }
}

#[test]
fn help_names_the_published_note_and_how_long_it_takes() {
    let shop = Workshop::new();
    let help = shop.must("--help");
    assert!(
        help.contains("at most three minutes on two processor cores"),
        "{help}"
    );
    let help = shop.must("train --help");
    assert!(
        help.contains("Forecasting Bitcoin with Mamba State Space Models"),
        "{help}"
    );
}

/// A run keeps the URL it was trained on: every later command finds the shards by it. A build that knows no
/// URLs says so.
#[test]
fn shards_behind_a_url_train_and_evaluate() {
    let shop = Workshop::with_shards(2000);
    let line = "train --data file://@shards --out @run --preset anchored --config @tiny.toml";
    let output = shop.command(line).output().expect("a start");
    let error = String::from_utf8_lossy(&output.stderr);
    // The feature may come from another package that is built at the same time.
    if !output.status.success() && !cfg!(feature = "remote") {
        for word in ["file://", "URL", "`remote`"] {
            assert!(error.contains(word), "{word}: {error}");
        }
        return;
    }
    assert!(output.status.success(), "{error}");
    let place = format!("file://{}", shop.path("shards").display());
    assert_eq!(shop.json("run/run.json")["data"], place.as_str());
    shop.must("evaluate --run @run");
    assert_metrics(&shop.json("run/metrics.json"));
}

//! The commands one after another, as a user would run them.

use std::fs;

use super::workshop::Workshop;

#[test]
fn candles_become_an_evaluated_and_compared_forecaster() {
    let shop = Workshop::with_market(4000);
    shop.prepare();
    for (name, model) in [("mamba", "mamba2"), ("baseline", "transformer")] {
        shop.must(&format!(
            "train --data @shards --out @{name} --model {model} --preset anchored --config @tiny.toml"
        ));
        shop.must(&format!("evaluate --run @{name}"));
    }
    let metrics: serde_json::Value =
        serde_json::from_str(&shop.read("mamba/metrics.json")).unwrap();
    for feature in ["Open", "High", "Low", "Close", "Volume"] {
        let scores = &metrics["test"][feature];
        for key in ["mse", "rmse", "mae", "mape", "r2", "naive_rmse"] {
            let value = scores[key]
                .as_f64()
                .unwrap_or_else(|| panic!("{feature}.{key}: {scores}"));
            assert!(value.is_finite(), "{feature}.{key}");
        }
        assert!(scores["naive"].is_string(), "{scores}");
        let (rmse, naive) = (scores["rmse"].as_f64(), scores["naive_rmse"].as_f64());
        let skill = 1.0 - rmse.unwrap() / naive.unwrap();
        assert!(
            (scores["skill"].as_f64().unwrap() - skill).abs() < 1e-9,
            "{scores}"
        );
    }
    assert!(metrics["average"]["rmse"].as_f64().is_some());
    for file in ["report.md", "config.toml", "run.json", "history.jsonl"] {
        assert!(shop.path(&format!("mamba/{file}")).is_file(), "{file}");
    }
    let svgs = fs::read_dir(shop.path("mamba")).unwrap().filter(|f| {
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

    // Rows it has never seen, with its own transform; every row but the first of the file is scored.
    shop.must("evaluate --run @mamba --csv @market.csv --out @unseen");
    let unseen: serde_json::Value =
        serde_json::from_str(&shop.read("unseen/metrics.json")).unwrap();
    assert_ne!(
        unseen["test"]["High"]["rmse"],
        metrics["test"]["High"]["rmse"]
    );
    shop.must("forecast --run @mamba --csv @market.csv --horizon 5");
    shop.must("forecast --run @baseline --csv @market.csv --horizon 2");
}

#[test]
fn a_run_resumed_goes_on_where_it_stopped() {
    let shop = Workshop::with_market(3000);
    shop.prepare();
    let train = "train --data @shards --preset anchored --config @tiny.toml";
    shop.must(&format!("{train} --out @whole --epochs 2"));
    shop.must(&format!("{train} --out @parts --epochs 1"));
    shop.must(&format!("{train} --out @parts --epochs 2 --resume"));
    let losses = |run: &str| -> Vec<f64> {
        shop.read(&format!("{run}/history.jsonl"))
            .lines()
            .map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap())
            .map(|record| record["val_loss"].as_f64().unwrap())
            .collect()
    };
    let (whole, parts) = (losses("whole"), losses("parts"));
    assert_eq!(whole.len(), 2);
    assert_eq!(whole, parts);
}

#[test]
fn the_notes_own_protocol_runs_too() {
    let shop = Workshop::with_market(3000);
    shop.must("prepare --csv @market.csv --out @shards --length 64 --stride 16 --protocol note");
    shop.must("train --data @shards --out @run --preset note --config @tiny.toml");
    shop.must("evaluate --run @run");
    assert!(shop.read("run/report.md").contains("random"));
}

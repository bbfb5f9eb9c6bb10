use super::*;
use crate::ScaleKind;
use crate::testing::{Market, market};

fn run(market: &Market, predictions: &[f64]) -> Result<Evaluation> {
    evaluate(&market.forecasts("model", predictions))
}

#[test]
fn a_perfect_forecast_has_skill_one_and_the_naive_one_none() {
    let market = market(400);
    let evaluation = run(&market, &market.targets()).unwrap();
    for (name, scores) in &evaluation.test {
        assert_eq!(scores.metrics.rmse, 0.0, "{name}");
        assert_eq!(scores.metrics.r2, 1.0, "{name}");
        assert_eq!(scores.skill, Some(1.0), "{name}");
    }
    assert_eq!(evaluation.average.skill, Some(1.0));

    let close = evaluation
        .feature_names()
        .iter()
        .position(|n| *n == "Close")
        .unwrap();
    let mut predictions = market.targets();
    for (index, &row) in market.target_rows.iter().enumerate() {
        predictions[index * 5 + close] = market.series[(row - 1) * 5 + close];
    }
    let scores = run(&market, &predictions).unwrap().test["Close"].clone();
    assert_eq!(scores.naive, "last_close");
    assert_eq!(scores.skill, Some(0.0));
}

#[test]
fn the_sign_of_the_skill_follows_the_error() {
    let market = market(400);
    let off_by = |size: f64| -> Vec<f64> { market.targets().iter().map(|z| z + size).collect() };
    let good = run(&market, &off_by(1e-7)).unwrap();
    let bad = run(&market, &off_by(10.0)).unwrap();
    for name in good.feature_names() {
        assert!(good.test[name].skill.unwrap() > 0.0, "{name}");
        assert!(bad.test[name].skill.unwrap() < 0.0, "{name}");
        assert!((bad.test[name].metrics.rmse - 10.0).abs() < 1e-9, "{name}");
    }
}

#[test]
fn the_open_is_the_last_close() {
    let market = market(400);
    let evaluation = run(&market, &market.targets()).unwrap();
    assert_eq!(evaluation.test["Open"].naive, "last_close");
    assert!(evaluation.test["Open"].naive_rmse < 1e-5);
    let naives = &evaluation.naives;
    assert!(naives["last_value"]["Open"].rmse > 1e-4);
    assert!(!naives["last_close"].contains_key("Volume"));
    for name in evaluation.feature_names() {
        let best = evaluation.best_naive(name).unwrap();
        assert_eq!(best.rmse, evaluation.test[name].naive_rmse);
        assert!(
            naives
                .values()
                .filter_map(|by| by.get(name))
                .all(|m| m.rmse >= best.rmse)
        );
    }
}

#[test]
fn levels_are_in_dollars_and_coins() {
    let market = market(400);
    let close = &market.scales[3];
    let mut predictions = market.targets();
    for row in predictions.chunks_exact_mut(5) {
        row[3] = close.to_z(close.to_level(row[3]) + 25.0);
    }
    let evaluation = run(&market, &predictions).unwrap();
    let level = &evaluation.levels["Close"];
    assert!((level.metrics.rmse - 25.0).abs() < 1e-6);
    assert!((level.metrics.mae - 25.0).abs() < 1e-6);
    assert_eq!(level.unit, "USD");
    assert_eq!(evaluation.levels["Volume"].unit, "BTC");
    assert!(level.naive_rmse > 0.0);
}

#[test]
fn averages_are_means_over_features() {
    let market = market(300);
    let predictions: Vec<f64> = market.targets().iter().map(|z| z * 0.9).collect();
    let evaluation = run(&market, &predictions).unwrap();
    let mean =
        |pick: fn(&FeatureScores) -> f64| evaluation.test.values().map(pick).sum::<f64>() / 5.0;
    let average = &evaluation.average;
    assert!((average.metrics.rmse - mean(|s| s.metrics.rmse)).abs() < 1e-15);
    assert!((average.metrics.mape - mean(|s| s.metrics.mape)).abs() < 1e-9);
    assert!((average.naive_rmse - mean(|s| s.naive_rmse)).abs() < 1e-15);
    assert!((average.skill.unwrap() - mean(|s| s.skill.unwrap())).abs() < 1e-9);
}

/// Exactly the keys that readers rely on: a name and seven numbers.
fn assert_has_the_eight_keys(scores: &serde_json::Value) {
    let mut keys: Vec<&str> = scores
        .as_object()
        .unwrap()
        .iter()
        .map(|(key, value)| {
            assert_eq!(value.is_string(), key == "naive", "{key}: {value}");
            assert_eq!(value.is_number(), key != "naive", "{key}: {value}");
            key.as_str()
        })
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
}

#[test]
fn json_has_the_keys_readers_rely_on_and_comes_back() {
    let market = market(200);
    let predictions: Vec<f64> = market.targets().iter().map(|z| z + 0.01).collect();
    let evaluation = run(&market, &predictions).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("metrics.json");
    evaluation.write(&path).unwrap();
    let json: serde_json::Value = serde_json::from_slice(&files::read(&path).unwrap()).unwrap();
    for feature in ["Open", "High", "Low", "Close", "Volume"] {
        assert_has_the_eight_keys(&json["test"][feature]);
        assert!(json["levels"][feature]["rmse"].is_number());
        assert!(json["naives"]["last_value"][feature]["rmse"].is_number());
    }
    assert_has_the_eight_keys(&json["average"]);
    assert_eq!(json["average"]["naive"], "best_of_each");
    assert_eq!(json["test"].as_object().unwrap().len(), 5);
    let back = Evaluation::read(&path).unwrap();
    assert_eq!(
        back.feature_names(),
        ["Open", "High", "Low", "Close", "Volume"]
    );
    assert_eq!(back.counts, evaluation.counts);
    assert_eq!(back.skill_table(), evaluation.skill_table());
}

#[test]
fn a_perfect_naive_forecaster_leaves_the_skill_open_not_nan() {
    let scales = [FeatureScale::new("Close", ScaleKind::Identity, 0.0, 1.0).unwrap()];
    let evaluation = evaluate(&Forecasts {
        model: "m",
        protocol: "p",
        scales: &scales,
        timestamps: &[0, 60, 120],
        series: &[1.0; 3],
        target_rows: &[1, 2],
        predictions: &[1.0, 2.0],
    })
    .unwrap();
    assert_eq!(evaluation.test["Close"].skill, None);
    assert_eq!(evaluation.average.skill, None);
    assert_eq!(evaluation.test["Close"].naive_rmse, 0.0);
    let json = serde_json::to_string(&evaluation).unwrap();
    assert!(json.contains(r#""skill":null"#), "{json}");
    assert!(evaluation.skill_table().contains("n/a"));
}

#[test]
fn rows_forecast_twice_count_twice() {
    let mut market = market(100);
    let once = run(&market, &market.targets()).unwrap();
    market.target_rows.extend(market.target_rows.clone());
    let twice = run(&market, &market.targets()).unwrap();
    assert_eq!(twice.counts.scored, 2 * once.counts.scored);
    assert_eq!(twice.counts.distinct_rows, once.counts.distinct_rows);
    assert_eq!(twice.counts.last_timestamp, once.counts.last_timestamp);
}

#[test]
fn predictions_that_are_not_numbers_are_named() {
    let market = market(100);
    for (bad, space) in [
        (f64::NAN, "z-score space"),
        (f64::INFINITY, "z-score space"),
        (1e200, "z-score space"),
        (1e5, "level space (USD)"),
    ] {
        let mut predictions = market.targets();
        predictions[7 * 5 + 1] = bad;
        let error = run(&market, &predictions).unwrap_err().to_string();
        let row = market.target_rows[7];
        assert!(
            error.contains(&format!("prediction of High for row {row} (")),
            "{error}"
        );
        assert!(error.contains(space) && error.contains("UTC"), "{error}");
    }
}

#[test]
fn bad_input_is_named() {
    let mut market = market(100);
    let error = run(&market, &[0.0; 3]).unwrap_err().to_string();
    assert!(error.contains("predictions has 3 values"), "{error}");

    let targets = market.targets();
    let row = market.target_rows[0];
    market.series[row * 5 + 4] = f64::NAN;
    let error = run(&market, &targets).unwrap_err().to_string();
    assert!(
        error.contains(&format!("target Volume of row {row}")),
        "{error}"
    );

    market.target_rows.clear();
    assert!(matches!(
        run(&market, &[]),
        Err(EvalError::Empty {
            what: "target_rows"
        })
    ));

    let evaluation = {
        let market = crate::testing::market(100);
        run(&market, &market.targets()).unwrap()
    };
    let error = evaluation.feature("Price").unwrap_err().to_string();
    assert!(
        error.contains("\"Price\"") && error.contains("Open, High"),
        "{error}"
    );
}

#[test]
fn a_feature_without_a_past_is_named() {
    let scales = [FeatureScale::new("Close", ScaleKind::Identity, 0.0, 1.0).unwrap()];
    let error = evaluate(&Forecasts {
        model: "m",
        protocol: "p",
        scales: &scales,
        timestamps: &[0, 60],
        series: &[f64::NAN, 1.0],
        target_rows: &[1],
        predictions: &[1.0],
    })
    .unwrap_err();
    assert!(
        matches!(error, EvalError::NoHistory { row: 1, .. }),
        "{error}"
    );
}

#[test]
fn files_that_are_not_metrics_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let missing = folder.path().join("none.json");
    let error = Evaluation::read(&missing).unwrap_err().to_string();
    assert!(
        error.contains("cannot read") && error.contains("none.json"),
        "{error}"
    );
    let path = folder.path().join("other.json");
    files::write_atomic(&path, b"{\"a\": 1}").unwrap();
    let error = Evaluation::read(&path).unwrap_err().to_string();
    assert!(
        error.contains("other.json is not a metrics file"),
        "{error}"
    );
}

//! A folder a reader can open: figures, plots and a page that explains them.

use crate::evaluation::{AverageScores, LevelScores};
use crate::naive::NaiveKind;
use crate::plot::{EpochRecord, ForecastPlot, forecast_svg, loss_svg};
use crate::{Evaluation, Forecasts, Metrics, Result, files, text};
use std::fmt::Write;
use std::path::{Path, PathBuf};

/// What a report shows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReportOptions {
    /// Scored rows in each feature's plot, counted from the last one. Default 240.
    pub slice_rows: usize,
}

impl Default for ReportOptions {
    fn default() -> Self {
        Self { slice_rows: 240 }
    }
}

/// The files of a report.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReportFiles {
    /// `metrics.json`.
    pub metrics: PathBuf,
    /// `report.md`.
    pub report: PathBuf,
    /// `plot_<feature>.svg`, one per feature in column order.
    pub plots: Vec<PathBuf>,
    /// `loss.svg`; none when the history holds no finite loss.
    pub loss: Option<PathBuf>,
}

/// Writes `metrics.json`, `report.md`, one plot per feature and the loss curves into `dir`,
/// which is made if it does not exist.
///
/// `evaluation` must be [`evaluate`](crate::evaluate)'s result for `input`; `history` may be empty.
/// Each file is written beside its place and renamed; `report.md` comes last.
///
/// # Errors
///
/// When a file cannot be written or a plot cannot be drawn.
pub fn write_report(
    dir: &Path,
    input: &Forecasts,
    evaluation: &Evaluation,
    history: &[EpochRecord],
    options: &ReportOptions,
) -> Result<ReportFiles> {
    files::create_folder(dir)?;
    let metrics = dir.join("metrics.json");
    evaluation.write(&metrics)?;
    let mut plots = Vec::with_capacity(input.scales.len());
    for scale in input.scales {
        let plot = ForecastPlot::last_rows(input, evaluation, &scale.name, options.slice_rows)?;
        let path = dir.join(plot_name(&scale.name));
        files::write_atomic(&path, forecast_svg(&plot)?.as_bytes())?;
        plots.push(path);
    }
    let loss = write_loss(dir, history)?;
    let report = dir.join("report.md");
    let page = markdown(evaluation, loss.is_some());
    files::write_atomic(&report, page.as_bytes())?;
    Ok(ReportFiles {
        metrics,
        report,
        plots,
        loss,
    })
}

fn write_loss(dir: &Path, history: &[EpochRecord]) -> Result<Option<PathBuf>> {
    if crate::plot::best_epoch(history).is_none() {
        return Ok(None);
    }
    let path = dir.join("loss.svg");
    files::write_atomic(&path, loss_svg(history)?.as_bytes())?;
    Ok(Some(path))
}

/// `plot_close.svg`: letters and digits of the name, the rest as underscores.
fn plot_name(feature: &str) -> String {
    let safe = |c: char| {
        if c.is_alphanumeric() {
            c.to_ascii_lowercase()
        } else {
            '_'
        }
    };
    format!("plot_{}.svg", feature.chars().map(safe).collect::<String>())
}

fn markdown(evaluation: &Evaluation, has_loss: bool) -> String {
    let mut page = format!("# {}\n\n", evaluation.model);
    // Writing to a string cannot fail.
    let _ = head(&mut page, evaluation)
        .and_then(|()| skills(&mut page, evaluation))
        .and_then(|()| z_scores(&mut page, evaluation))
        .and_then(|()| levels(&mut page, evaluation))
        .and_then(|()| naives(&mut page, evaluation))
        .and_then(|()| pictures(&mut page, evaluation, has_loss));
    page
}

fn head(page: &mut String, evaluation: &Evaluation) -> std::fmt::Result {
    let counts = &evaluation.counts;
    writeln!(page, "- Protocol: {}", evaluation.protocol)?;
    write!(page, "- Scored: {} rows", text::count(counts.distinct_rows))?;
    if counts.scored != counts.distinct_rows {
        write!(page, ", {} forecasts", text::count(counts.scored))?;
    }
    let (first, last) = (counts.first_timestamp, counts.last_timestamp);
    writeln!(page, ", {} to {}", text::utc(first), text::utc(last))?;
    writeln!(page, "- All figures: [metrics.json](metrics.json)\n")
}

fn skills(page: &mut String, evaluation: &Evaluation) -> std::fmt::Result {
    page.push_str(
        "## Skill\n\n\
         Skill is 1 - RMSE / RMSE of the naive forecaster that did best on the same rows: above \
         zero,\nthe model knows more than that forecaster; below, it knows less. z-score space.\n\n\
         | feature | RMSE | best naive forecaster | its RMSE | skill |\n\
         | --- | ---: | --- | ---: | ---: |\n",
    );
    for (name, scores) in &evaluation.test {
        writeln!(
            page,
            "| {name} | {} | {} | {} | {} |",
            text::number(scores.metrics.rmse),
            NaiveKind::describe(&scores.naive),
            text::number(scores.naive_rmse),
            text::skill(scores.skill)
        )?;
    }
    let AverageScores {
        metrics,
        naive,
        naive_rmse,
        skill,
    } = &evaluation.average;
    writeln!(
        page,
        "| average | {} | {} | {} | {} |\n",
        text::number(metrics.rmse),
        NaiveKind::describe(naive),
        text::number(*naive_rmse),
        text::skill(*skill)
    )
}

/// The cells of the five measures, in the order RMSE, R2, MAE, MSE, MAPE.
pub(crate) fn cells(metrics: &Metrics) -> [String; 5] {
    [
        text::number(metrics.rmse),
        text::r2(metrics.r2),
        text::number(metrics.mae),
        text::number(metrics.mse),
        text::number(metrics.mape),
    ]
}

fn z_scores(page: &mut String, evaluation: &Evaluation) -> std::fmt::Result {
    page.push_str(
        "## Errors in z-score space\n\n\
         MAPE divides by targets that cross zero here; read it in level space.\n\n\
         | feature | RMSE | R2 | MAE | MSE | MAPE % |\n\
         | --- | ---: | ---: | ---: | ---: | ---: |\n",
    );
    let rows = evaluation
        .test
        .iter()
        .map(|(name, scores)| (name.as_str(), scores.metrics));
    for (name, metrics) in rows.chain([("average", evaluation.average.metrics)]) {
        writeln!(page, "| {name} | {} |", cells(&metrics).join(" | "))?;
    }
    page.push('\n');
    Ok(())
}

fn levels(page: &mut String, evaluation: &Evaluation) -> std::fmt::Result {
    page.push_str(
        "## Errors in level space\n\n\
         | feature | unit | RMSE | its naive RMSE | R2 | MAE | MSE | MAPE % |\n\
         | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |\n",
    );
    for (name, scores) in &evaluation.levels {
        let LevelScores {
            metrics,
            naive_rmse,
            unit,
        } = scores;
        let [rmse, rest @ ..] = cells(metrics);
        let naive = text::number(*naive_rmse);
        writeln!(
            page,
            "| {name} | {unit} | {rmse} | {naive} | {} |",
            rest.join(" | ")
        )?;
    }
    page.push('\n');
    Ok(())
}

fn naives(page: &mut String, evaluation: &Evaluation) -> std::fmt::Result {
    page.push_str("## Naive forecasters\n\nRMSE in z-score space; each sees only rows before the one it forecasts.\n\n");
    let names = evaluation.feature_names();
    writeln!(page, "| forecaster | {} |", names.join(" | "))?;
    writeln!(page, "| --- |{}", " ---: |".repeat(names.len()))?;
    for (naive, by_feature) in &evaluation.naives {
        write!(page, "| {} |", NaiveKind::describe(naive))?;
        for name in &names {
            let rmse = by_feature
                .get(*name)
                .map(|metrics| text::number(metrics.rmse));
            write!(page, " {} |", rmse.unwrap_or_default())?;
        }
        page.push('\n');
    }
    page.push('\n');
    Ok(())
}

fn pictures(page: &mut String, evaluation: &Evaluation, has_loss: bool) -> std::fmt::Result {
    page.push_str("## Plots\n\n");
    for name in evaluation.feature_names() {
        writeln!(page, "![{name}: forecast and truth]({})\n", plot_name(name))?;
    }
    if has_loss {
        writeln!(page, "![Loss by epoch](loss.svg)")?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Market, market};
    use crate::{EvalError, evaluate};
    use std::fs;

    fn write(market: &Market, dir: &Path, history: &[EpochRecord]) -> Result<ReportFiles> {
        let predictions = market.decent_predictions();
        let input = market.forecasts("mamba2 (test)", &predictions);
        let evaluation = evaluate(&input)?;
        write_report(dir, &input, &evaluation, history, &ReportOptions::default())
    }

    #[test]
    fn writes_every_file_it_names_and_links() {
        let folder = tempfile::tempdir().unwrap();
        let dir = folder.path().join("a/report");
        let history = [EpochRecord {
            epoch: 1,
            train_loss: 0.1,
            validation_loss: Some(0.2),
            learning_rate: 1e-4,
        }];
        let written = write(&market(400), &dir, &history).unwrap();
        let page = fs::read_to_string(&written.report).unwrap();
        assert_eq!(written.plots.len(), 5);
        let links = page
            .split("](")
            .skip(1)
            .filter_map(|rest| rest.split(')').next());
        let links: Vec<&str> = links.collect();
        assert_eq!(links.len(), 7, "{links:?}");
        assert!(
            links.iter().all(|link| dir.join(link).is_file()),
            "{links:?}"
        );
        for expected in [
            "# mamba2 (test)",
            "a made-up market",
            "390 rows",
            "2024-06-01 00:10 UTC",
            "| Close |",
            "| average |",
            "mean of the last hour",
            "| BTC |",
        ] {
            assert!(page.contains(expected), "{expected}\n{page}");
        }
        assert!(!page.contains("NaN"));
        assert_eq!(fs::read_dir(&dir).unwrap().count(), 8, "and nothing beside");
    }

    #[test]
    fn without_a_history_there_is_no_loss_curve() {
        let folder = tempfile::tempdir().unwrap();
        let written = write(&market(100), folder.path(), &[]).unwrap();
        assert_eq!(written.loss, None);
        assert!(
            !fs::read_to_string(written.report)
                .unwrap()
                .contains("loss.svg")
        );
    }

    #[test]
    fn a_file_in_the_folders_place_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let taken = folder.path().join("taken");
        fs::write(&taken, "x").unwrap();
        let error = write(&market(100), &taken, &[]).unwrap_err();
        assert!(
            matches!(&error, EvalError::Io { path, .. } if *path == taken),
            "{error}"
        );
    }

    #[test]
    fn plot_names_are_safe() {
        assert_eq!(plot_name("Close"), "plot_close.svg");
        assert_eq!(plot_name("../a b"), "plot____a_b.svg");
    }
}

//! Several models in one table, with the best naive forecaster among them.

use crate::evaluation::{mean_metrics, skill};
use crate::naive::NaiveKind;
use crate::plot::skill_svg;
use crate::report::cells;
use crate::{EvalError, Evaluation, Metrics, Result, files, text};
use std::path::{Path, PathBuf};

/// Evaluations of several models on the same features.
///
/// ```no_run
/// use mamba_ssm_eval::{Comparison, Evaluation};
/// use std::path::Path;
///
/// let runs = ["runs/mamba2/metrics.json", "runs/transformer/metrics.json"];
/// let evaluations = runs.iter().map(|run| Evaluation::read(Path::new(run)));
/// let comparison = Comparison::new(evaluations.collect::<Result<_, _>>()?)?;
/// println!("{}", comparison.to_markdown());
/// comparison.write(Path::new("runs"))?;
/// # Ok::<(), mamba_ssm_eval::EvalError>(())
/// ```
#[derive(Debug, Clone)]
pub struct Comparison {
    models: Vec<Evaluation>,
}

/// The files of a comparison.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ComparisonFiles {
    /// `comparison.md`.
    pub table: PathBuf,
    /// `comparison.svg`.
    pub chart: PathBuf,
}

/// One line of a feature's table.
struct Line {
    name: String,
    metrics: Metrics,
    skill: Option<f64>,
}

impl Comparison {
    /// Puts evaluations side by side. Models that share a name are numbered.
    ///
    /// # Errors
    ///
    /// When there is none, or their features differ.
    pub fn new(mut evaluations: Vec<Evaluation>) -> Result<Self> {
        let Some(first) = evaluations.first() else {
            return Err(EvalError::Empty {
                what: "the list of evaluations",
            });
        };
        let expected = first.feature_names();
        for other in &evaluations {
            if other.feature_names() != expected {
                return Err(EvalError::FeaturesDiffer {
                    model: other.model.clone(),
                    found: other.feature_names().join(", "),
                    first: first.model.clone(),
                    expected: expected.join(", "),
                });
            }
        }
        number_repeats(&mut evaluations);
        Ok(Self {
            models: evaluations,
        })
    }

    /// Whether all models were scored on the same rows, as far as counts, times and the naive
    /// forecasters' errors tell.
    pub fn same_rows(&self) -> bool {
        let first = &self.models[0];
        self.models.iter().all(|model| {
            let close = |(a, b): (f64, f64)| (a - b).abs() <= 1e-6 * b.abs();
            let naive = model.test.values().map(|scores| scores.naive_rmse);
            let expected = first.test.values().map(|scores| scores.naive_rmse);
            model.counts == first.counts && naive.zip(expected).all(close)
        })
    }

    /// The comparison as a Markdown page: one table per feature and one of averages.
    pub fn to_markdown(&self) -> String {
        let mut page = String::from(
            "# Comparison\n\n\
             z-score space; the best of each column in bold. Skill is 1 - RMSE / RMSE of the best \
             naive forecaster\nof that feature on the same rows: above zero, the model beats it.\n\n",
        );
        page.push_str(
            "| model | protocol | rows scored | from | to |\n| --- | --- | ---: | --- | --- |\n",
        );
        for model in &self.models {
            let counts = &model.counts;
            page.push_str(&format!(
                "| {} | {} | {} | {} | {} |\n",
                escape(&model.model),
                escape(&model.protocol),
                text::count(counts.distinct_rows),
                text::utc(counts.first_timestamp),
                text::utc(counts.last_timestamp)
            ));
        }
        if !self.same_rows() {
            page.push_str(
                "\n**The models were not scored on the same rows (or not in the same z-score space): \
                 compare skills, not errors.**\n",
            );
        }
        for feature in self.models[0].feature_names() {
            page.push_str(&format!(
                "\n## {feature}\n\n{}",
                table(&self.feature_lines(feature))
            ));
        }
        page.push_str(&format!("\n## Average\n\n{}", table(&self.average_lines())));
        page.push_str("\n![Skill by feature](comparison.svg)\n");
        page
    }

    /// Writes `comparison.md` and `comparison.svg` into `dir`, which is made if it does not exist.
    ///
    /// # Errors
    ///
    /// When a file cannot be written or the chart cannot be drawn.
    pub fn write(&self, dir: &Path) -> Result<ComparisonFiles> {
        files::create_folder(dir)?;
        let chart = dir.join("comparison.svg");
        files::write_atomic(&chart, skill_svg(&self.models)?.as_bytes())?;
        let table = dir.join("comparison.md");
        files::write_atomic(&table, self.to_markdown().as_bytes())?;
        Ok(ComparisonFiles { table, chart })
    }

    /// The models' lines and the naive forecaster's: one where all were scored on the same rows,
    /// one per model otherwise.
    fn feature_lines(&self, feature: &str) -> Vec<Line> {
        let mut lines = Vec::new();
        for model in &self.models {
            if let Ok(scores) = model.feature(feature) {
                lines.push(Line {
                    name: model.model.clone(),
                    metrics: scores.metrics,
                    skill: scores.skill,
                });
            }
        }
        for model in self.naive_sources() {
            if let (Ok(scores), Ok(metrics)) = (model.feature(feature), model.best_naive(feature)) {
                let name = NaiveKind::describe(&scores.naive);
                lines.push(self.naive_line(name, model, metrics));
            }
        }
        lines
    }

    fn average_lines(&self) -> Vec<Line> {
        let models = self.models.iter().map(|model| Line {
            name: model.model.clone(),
            metrics: model.average.metrics,
            skill: model.average.skill,
        });
        let naives = self.naive_sources().iter().map(|model| {
            let names = model.feature_names();
            let best: Vec<Metrics> = names
                .into_iter()
                .filter_map(|name| model.best_naive(name).ok())
                .collect();
            self.naive_line(
                NaiveKind::describe(&model.average.naive),
                model,
                mean_metrics(best.into_iter()),
            )
        });
        models.chain(naives).collect()
    }

    fn naive_sources(&self) -> &[Evaluation] {
        if self.same_rows() {
            &self.models[..1]
        } else {
            &self.models
        }
    }

    fn naive_line(&self, name: &str, model: &Evaluation, metrics: Metrics) -> Line {
        let name = if self.same_rows() {
            format!("naive: {name}")
        } else {
            format!("naive: {name} (rows of {})", model.model)
        };
        Line {
            name,
            skill: skill(metrics.rmse, metrics.rmse),
            metrics,
        }
    }
}

fn number_repeats(evaluations: &mut [Evaluation]) {
    let names: Vec<String> = evaluations.iter().map(|e| e.model.clone()).collect();
    for (index, evaluation) in evaluations.iter_mut().enumerate() {
        let before = names[..index]
            .iter()
            .filter(|name| **name == names[index])
            .count();
        if before > 0 {
            evaluation.model = format!("{} ({})", names[index], before + 1);
        }
    }
}

/// A bar in a name would end its cell.
fn escape(name: &str) -> String {
    name.replace('|', "\\|")
}

fn table(lines: &[Line]) -> String {
    let mut out = String::from(
        "| model | RMSE | R2 | MAE | MSE | MAPE % | skill |\n\
         | --- | ---: | ---: | ---: | ---: | ---: | ---: |\n",
    );
    // Signed so that the larger is the better in every column.
    let merits = lines.iter().map(|line| {
        let m = &line.metrics;
        let skill = line.skill.unwrap_or(f64::NEG_INFINITY);
        [-m.rmse, m.r2, -m.mae, -m.mse, -m.mape, skill]
    });
    let best = merits
        .clone()
        .fold([f64::NEG_INFINITY; 6], |mut best, merit| {
            best.iter_mut()
                .zip(merit)
                .for_each(|(best, merit)| *best = best.max(merit));
            best
        });
    for (line, merit) in lines.iter().zip(merits) {
        let skill = [text::skill(line.skill)];
        let texts = cells(&line.metrics).into_iter().chain(skill);
        out.push_str(&format!("| {} |", escape(&line.name)));
        for ((cell, merit), best) in texts.zip(merit).zip(best) {
            let bold = if merit == best && merit.is_finite() {
                "**"
            } else {
                ""
            };
            out.push_str(&format!(" {bold}{cell}{bold} |"));
        }
        out.push('\n');
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::market;
    use crate::{FeatureScale, Forecasts, ScaleKind, evaluate};

    fn evaluation(name: &str, rows: usize, share: f64) -> Evaluation {
        let market = market(rows);
        let mut predictions = market.targets();
        for (index, &row) in market.target_rows.iter().enumerate() {
            for feature in 0..5 {
                let z = &mut predictions[index * 5 + feature];
                let before = market.series[(row - 1) * 5 + feature];
                *z = before + share * (*z - before);
            }
        }
        evaluate(&market.forecasts(name, &predictions)).unwrap()
    }

    #[test]
    fn all_models_and_one_naive_forecaster_stand_in_each_table() {
        let models = vec![evaluation("good", 300, 0.9), evaluation("bad", 300, -3.0)];
        let comparison = Comparison::new(models).unwrap();
        assert!(comparison.same_rows());
        let page = comparison.to_markdown();
        for expected in [
            "## Open",
            "## Volume",
            "## Average",
            "naive: last close",
            "290",
        ] {
            assert!(page.contains(expected), "{expected}\n{page}");
        }
        // The open is the last close, so there the naive forecaster stays ahead.
        let good = page.matches("\n| good | **").count();
        assert_eq!(good, 5, "best by RMSE everywhere else\n{page}");
        assert_eq!(page.matches("\n| bad |").count(), 7);
        assert_eq!(page.matches("| naive: ").count(), 6);
        assert!(!page.contains("NaN") && !page.contains("not scored on the same rows"));
    }

    #[test]
    fn different_rows_are_pointed_out() {
        let models = vec![evaluation("m", 300, 0.9), evaluation("m", 200, 0.9)];
        let page = Comparison::new(models).unwrap().to_markdown();
        assert!(page.contains("not scored on the same rows"));
        assert!(page.contains("| m (2) |"));
        assert!(page.contains("(rows of m (2))"));
    }

    #[test]
    fn writes_table_and_chart() {
        let folder = tempfile::tempdir().unwrap();
        let dir = folder.path().join("out");
        let comparison = Comparison::new(vec![evaluation("only", 100, 0.5)]).unwrap();
        let written = comparison.write(&dir).unwrap();
        assert_eq!(
            files::read(&written.table).unwrap(),
            comparison.to_markdown().as_bytes()
        );
        assert!(
            String::from_utf8(files::read(&written.chart).unwrap())
                .unwrap()
                .contains("only")
        );
    }

    #[test]
    fn bad_input_is_named() {
        assert!(matches!(
            Comparison::new(vec![]),
            Err(EvalError::Empty { .. })
        ));
        let scales = [FeatureScale::new("Price", ScaleKind::Identity, 0.0, 1.0).unwrap()];
        let other = evaluate(&Forecasts {
            model: "other",
            protocol: "p",
            scales: &scales,
            timestamps: &[0, 60],
            series: &[1.0, 2.0],
            target_rows: &[1],
            predictions: &[1.0],
        })
        .unwrap();
        let error = Comparison::new(vec![evaluation("first", 100, 0.5), other]).unwrap_err();
        let words = error.to_string();
        assert!(
            words.contains("other was evaluated on Price, first on Open"),
            "{words}"
        );
    }
}

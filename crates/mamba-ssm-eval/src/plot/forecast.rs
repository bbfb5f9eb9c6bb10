//! Prediction, truth and naive forecast of one feature over a readable stretch of time.

use super::axis::Axis;
use super::canvas::{self, Drawn, Key, MODEL, NAIVE_PALE, Panel, TRUTH, panel, reason, stroke};
use crate::naive::{NaiveForecaster, NaiveKind};
use crate::{Evaluation, Forecasts, Result, text};
use plotters::style::{RGBColor, ShapeStyle};

/// The points of a forecast plot, oldest first, in level space.
#[derive(Debug, Clone, PartialEq)]
pub struct ForecastPlot {
    /// Name of the feature.
    pub feature: String,
    /// Unit of the values; may be empty.
    pub unit: String,
    /// Name of the model.
    pub model: String,
    /// Name of the naive forecaster, in words.
    pub naive_name: String,
    /// `[points]` unix seconds, rising.
    pub timestamps: Vec<i64>,
    /// `[points]` what happened.
    pub truth: Vec<f64>,
    /// `[points]` what the model said.
    pub prediction: Vec<f64>,
    /// `[points]` what the naive forecaster said.
    pub naive: Vec<f64>,
}

impl ForecastPlot {
    /// The last `points` different rows scored of one feature, with the best naive forecaster
    /// that `evaluation` names. A row forecast several times shows its last forecast.
    ///
    /// # Errors
    ///
    /// When the feature was not evaluated or the input is not what was evaluated.
    pub fn last_rows(
        input: &Forecasts,
        evaluation: &Evaluation,
        feature: &str,
        points: usize,
    ) -> Result<Self> {
        let scores = evaluation.feature(feature)?;
        let column = input.column(feature)?;
        let kind = NaiveKind::ALL
            .into_iter()
            .find(|kind| kind.name() == scores.naive);
        let kind = kind.unwrap_or(NaiveKind::LastValue);
        let mut order: Vec<usize> = (0..input.target_rows.len()).collect();
        order.sort_by_key(|&index| input.target_rows[index]);
        // Of equal rows the last index wins: keep the later of each pair of neighbours.
        order.reverse();
        order.dedup_by_key(|index| input.target_rows[*index]);
        order.truncate(points.max(2));
        order.reverse();
        let rows: Vec<usize> = order
            .iter()
            .map(|&index| input.target_rows[index])
            .collect();
        let naive = NaiveForecaster::new(input.scales, input.timestamps, input.series, &rows)?;
        let scale = &input.scales[column];
        let width = input.scales.len();
        let level = |values: &[f64], row: usize| scale.to_level(values[row * width + column]);
        Ok(Self {
            feature: feature.to_owned(),
            unit: scale.unit.clone(),
            model: input.model.to_owned(),
            naive_name: NaiveKind::describe(kind.name()).to_owned(),
            timestamps: rows.iter().map(|&row| input.timestamps[row]).collect(),
            truth: rows.iter().map(|&row| level(input.series, row)).collect(),
            prediction: order
                .iter()
                .map(|&index| level(input.predictions, index))
                .collect(),
            naive: rows
                .iter()
                .map(|&row| naive.predict(kind, row, column))
                .map(|z| z.map_or(f64::NAN, |z| scale.to_level(z)))
                .collect(),
        })
    }

    fn measure(&self, what: &str) -> String {
        if self.unit.is_empty() {
            what.to_owned()
        } else {
            format!("{what} ({})", self.unit)
        }
    }
}

/// Draws a forecast plot as an SVG document: the values above, the errors below.
///
/// A line breaks where rows are missing; a forecast far off the truth is drawn at the panel's edge.
///
/// # Errors
///
/// When there are no points, or the vectors differ in length.
pub fn forecast_svg(plot: &ForecastPlot) -> Result<String> {
    check(plot)?;
    let title = format!("{}: forecast one row ahead and truth", plot.feature);
    let (first, last) = (
        plot.timestamps[0],
        plot.timestamps[plot.timestamps.len() - 1],
    );
    let subtitle = format!(
        "{}, the last {} rows scored, {} to {}",
        canvas::shorten(&plot.model, 60),
        plot.timestamps.len(),
        text::utc(first),
        text::utc(last)
    );
    let naive_label = format!("naive: {}", plot.naive_name);
    let keys = [
        Key {
            label: "truth",
            color: TRUTH,
            width: 1.8,
        },
        Key {
            label: &plot.model,
            color: MODEL,
            width: 1.8,
        },
        Key {
            label: &naive_label,
            color: NAIVE_PALE,
            width: 4.0,
        },
    ];
    canvas::page(&title, (960, 650), |root| {
        canvas::headline(root, &title, &subtitle)?;
        let used = canvas::legend(root, &keys, 92.0, 66.0, 940.0)?;
        let (_, body) = root.split_vertically(canvas::px(62.0 + used));
        let (upper, lower) = body.split_vertically(canvas::px(310.0));
        let x = Axis::time(first, last, 9);
        values(&mut Frame::new(&upper, &x, value_axis(plot), false)?, plot)?;
        errors(&mut Frame::new(&lower, &x, error_axis(plot), true)?, plot)
    })
}

/// A panel and its axis, for clamping.
struct Frame<'a> {
    panel: Panel<'a>,
    y: Axis,
}

impl<'a> Frame<'a> {
    fn new(area: &canvas::Area<'a>, x: &Axis, y: Axis, bottom: bool) -> Drawn<Self> {
        Ok(Self {
            panel: panel(area, x, &y, bottom)?,
            y,
        })
    }

    /// One line per stretch without missing rows.
    fn lines(&mut self, times: &[i64], values: &[f64], style: ShapeStyle) -> Drawn<()> {
        for stretch in stretches(times) {
            let points = stretch
                .filter(|&index| values[index].is_finite())
                .map(|index| (times[index] as f64, self.y.clamp(values[index])));
            canvas::line(&mut self.panel, points.collect(), style)?;
        }
        Ok(())
    }
}

fn values(frame: &mut Frame, plot: &ForecastPlot) -> Drawn<()> {
    frame.lines(&plot.timestamps, &plot.naive, stroke(NAIVE_PALE, 4.0))?;
    frame.lines(&plot.timestamps, &plot.truth, stroke(TRUTH, 1.5))?;
    frame.lines(&plot.timestamps, &plot.prediction, stroke(MODEL, 1.5))
}

fn errors(frame: &mut Frame, plot: &ForecastPlot) -> Drawn<()> {
    let (first, last) = (
        plot.timestamps[0],
        plot.timestamps[plot.timestamps.len() - 1],
    );
    let zero = vec![(first as f64, 0.0), (last as f64, 0.0)];
    canvas::line(
        &mut frame.panel,
        zero,
        stroke(RGBColor(0x99, 0x99, 0x99), 1.0),
    )?;
    frame.lines(
        &plot.timestamps,
        &differences(&plot.naive, &plot.truth),
        stroke(NAIVE_PALE, 4.0),
    )?;
    frame.lines(
        &plot.timestamps,
        &differences(&plot.prediction, &plot.truth),
        stroke(MODEL, 1.5),
    )
}

fn differences(values: &[f64], truth: &[f64]) -> Vec<f64> {
    values
        .iter()
        .zip(truth)
        .map(|(value, truth)| value - truth)
        .collect()
}

fn bounds(values: impl IntoIterator<Item = f64>) -> (f64, f64) {
    let finite = values.into_iter().filter(|value| value.is_finite());
    finite.fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), value| {
        (low.min(value), high.max(value))
    })
}

/// Room for all lines, but a forecast may stretch the truth's span no more than threefold.
fn value_axis(plot: &ForecastPlot) -> Axis {
    let (low, high) = bounds(plot.truth.iter().copied());
    let span = (high - low).max(1e-6 * high.abs());
    let all = [&plot.truth, &plot.prediction, &plot.naive];
    let (lowest, highest) = bounds(all.into_iter().flatten().copied());
    let title = plot.measure(&plot.feature);
    Axis::linear(lowest.max(low - span), highest.min(high + span), 6, title)
}

/// Room for the errors, but one forecaster's may stretch the other's no more than fivefold.
fn error_axis(plot: &ForecastPlot) -> Axis {
    let model = bounds(differences(&plot.prediction, &plot.truth));
    let naive = bounds(differences(&plot.naive, &plot.truth));
    let size = |(low, high): (f64, f64)| low.abs().max(high.abs());
    let limit = 5.0 * size(model).min(size(naive));
    let limit = if limit > 0.0 {
        limit
    } else {
        size(model).max(size(naive))
    };
    let (low, high) = (model.0.min(naive.0), model.1.max(naive.1));
    let title = plot.measure("forecast - truth");
    Axis::linear(low.max(-limit).min(0.0), high.min(limit).max(0.0), 5, title)
}

/// Index ranges without a step of more than three times the median one.
fn stretches(times: &[i64]) -> Vec<std::ops::Range<usize>> {
    let mut steps: Vec<i64> = times.windows(2).map(|pair| pair[1] - pair[0]).collect();
    steps.sort_unstable();
    let longest = steps
        .get(steps.len() / 2)
        .map_or(i64::MAX, |step| step.saturating_mul(3));
    let mut out = Vec::new();
    let mut start = 0;
    for index in 1..times.len() {
        if times[index] - times[index - 1] > longest {
            out.push(start..index);
            start = index;
        }
    }
    out.push(start..times.len());
    out
}

fn check(plot: &ForecastPlot) -> Result<()> {
    let expected = plot.timestamps.len();
    if expected == 0 {
        return Err(crate::EvalError::Empty {
            what: "the forecast plot's timestamps",
        });
    }
    for (what, values) in [
        ("truth", &plot.truth),
        ("prediction", &plot.prediction),
        ("naive", &plot.naive),
    ] {
        if values.len() != expected {
            return Err(crate::EvalError::LengthMismatch {
                what,
                found: values.len(),
                expected,
                layout: "one per timestamp".to_owned(),
            });
        }
    }
    // Keeps the reason for a plot that cannot be drawn in one place.
    let (low, high) = bounds(plot.truth.iter().copied());
    if low > high {
        return Err(crate::EvalError::Plot {
            plot: plot.feature.clone(),
            reason: reason("no finite value of the truth"),
        });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::market;
    use crate::{EvalError, evaluate};

    fn plot(feature: &str) -> ForecastPlot {
        let market = market(400);
        let predictions = market.decent_predictions();
        let input = market.forecasts("mamba2 <test>", &predictions);
        let evaluation = evaluate(&input).unwrap();
        ForecastPlot::last_rows(&input, &evaluation, feature, 240).unwrap()
    }

    #[test]
    fn shows_the_last_rows_in_levels() {
        let plot = plot("Close");
        assert_eq!(plot.timestamps.len(), 240);
        assert_eq!(plot.unit, "USD");
        assert!(
            plot.truth
                .iter()
                .all(|value| (50_000.0..70_000.0).contains(value))
        );
        let moved = plot.naive.iter().zip(&plot.truth).skip(1).zip(&plot.truth);
        assert!(
            moved
                .into_iter()
                .all(|((naive, _), before)| (naive - before).abs() < 1e-6)
        );
    }

    #[test]
    fn the_document_says_what_it_shows() {
        for feature in ["High", "Volume"] {
            let svg = forecast_svg(&plot(feature)).unwrap();
            assert!(svg.starts_with("<svg width=\"960\" height=\"650\""));
            assert!(svg.trim_end().ends_with("</svg>"));
            for expected in [
                feature,
                "mamba2 &lt;test&gt;",
                "time (UTC)",
                "forecast - truth",
                "naive: ",
            ] {
                assert!(svg.contains(expected), "{expected}");
            }
            assert!(!svg.contains("NaN") && svg.contains("<polyline"));
        }
    }

    #[test]
    fn rows_forecast_twice_appear_once() {
        let mut market = market(60);
        let mut predictions = market.targets();
        market.target_rows.extend(market.target_rows.clone());
        predictions.extend(market.decent_predictions()[predictions.len()..].to_vec());
        let input = market.forecasts("m", &predictions);
        let evaluation = evaluate(&input).unwrap();
        let plot = ForecastPlot::last_rows(&input, &evaluation, "Low", 1_000).unwrap();
        assert_eq!(plot.timestamps.len(), 50);
        assert!(plot.timestamps.is_sorted());
        assert_ne!(plot.prediction, plot.truth, "the later forecast is shown");
    }

    #[test]
    fn a_runaway_forecast_stays_on_the_page() {
        let mut plot = plot("Close");
        plot.prediction[100] = 1e12;
        let axis = value_axis(&plot);
        assert!(axis.range.end < 100_000.0);
        assert!(forecast_svg(&plot).is_ok());
    }

    #[test]
    fn lines_break_at_gaps() {
        assert_eq!(stretches(&[0, 60, 120, 1_000, 1_060]), [0..3, 3..5]);
        assert_eq!(stretches(&[5]), vec![0..1; 1]);
    }

    #[test]
    fn bad_input_is_named() {
        let mut short = plot("Close");
        short.naive.pop();
        let error = forecast_svg(&short).unwrap_err();
        assert!(matches!(
            error,
            EvalError::LengthMismatch { what: "naive", .. }
        ));
        let mut blank = plot("Close");
        blank.truth.fill(f64::NAN);
        let error = forecast_svg(&blank).unwrap_err().to_string();
        assert!(error.contains("cannot draw Close"), "{error}");
        let market = market(60);
        let targets = market.targets();
        let input = market.forecasts("m", &targets);
        let evaluation = evaluate(&input).unwrap();
        let error = ForecastPlot::last_rows(&input, &evaluation, "Weight", 9).unwrap_err();
        assert!(matches!(error, EvalError::UnknownFeature { .. }));
    }
}

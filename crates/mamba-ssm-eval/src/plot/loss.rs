//! Training and validation loss by epoch, with the learning rate below.

use super::axis::Axis;
use super::canvas::{self, Area, Drawn, Key, MODEL, NAIVE, Panel, panel, reason, stroke};
use crate::{EvalError, Result, text};
use plotters::prelude::{Circle, RGBColor};
use plotters::style::text_anchor::HPos;
use serde::{Deserialize, Serialize};

const BEST: RGBColor = RGBColor(0x00, 0x9E, 0x73);
const RATE: RGBColor = RGBColor(0x66, 0x66, 0x66);

/// What one epoch of training showed.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct EpochRecord {
    /// Number of the epoch, from 1.
    pub epoch: usize,
    /// Mean training loss.
    pub train_loss: f64,
    /// Mean validation loss, if it was measured.
    pub validation_loss: Option<f64>,
    /// Learning rate the epoch ended with.
    pub learning_rate: f64,
}

/// The epoch with the lowest validation loss (training loss where none was validated).
pub(crate) fn best_epoch(history: &[EpochRecord]) -> Option<(usize, f64)> {
    let validated = points(history, |record| record.validation_loss);
    let candidates = if validated.is_empty() {
        points(history, |record| Some(record.train_loss))
    } else {
        validated
    };
    let best = candidates.into_iter().min_by(|a, b| a.1.total_cmp(&b.1))?;
    Some((best.0 as usize, best.1))
}

/// Draws the loss curves as an SVG document. The loss axis is logarithmic when losses span more
/// than a factor of four; the best epoch is marked. Values that are not finite are left out.
///
/// # Errors
///
/// When the history holds no finite loss.
pub fn loss_svg(history: &[EpochRecord]) -> Result<String> {
    let curves = Curves::new(history)?;
    let (epoch, loss) = curves.best;
    let subtitle = format!(
        "{} epoch{}; lowest {} loss {} in epoch {epoch}",
        history.len(),
        if history.len() == 1 { "" } else { "s" },
        if curves.validation.is_empty() {
            "training"
        } else {
            "validation"
        },
        text::number(loss)
    );
    let mut keys = vec![Key {
        label: "training",
        color: MODEL,
        width: 1.8,
    }];
    if !curves.validation.is_empty() {
        keys.push(Key {
            label: "validation",
            color: NAIVE,
            width: 1.8,
        });
    }
    keys.push(Key {
        label: "learning rate (below)",
        color: RATE,
        width: 1.4,
    });
    canvas::page("the loss curves", (960, 560), |root| {
        canvas::headline(root, "Loss by epoch", &subtitle)?;
        canvas::legend(root, &keys, 92.0, 66.0, 940.0)?;
        let (_, body) = root.split_vertically(canvas::px(80.0));
        let (upper, lower) = body.split_vertically(canvas::px(320.0));
        let x = curves.epochs(history);
        losses(root, &upper, &x, &curves)?;
        rates(&lower, &x, history)
    })
}

struct Curves {
    train: Vec<(f64, f64)>,
    validation: Vec<(f64, f64)>,
    best: (usize, f64),
    y: Axis,
    logarithmic: bool,
}

impl Curves {
    fn new(history: &[EpochRecord]) -> Result<Self> {
        let train = points(history, |record| Some(record.train_loss));
        let validation = points(history, |record| record.validation_loss);
        let best = best_epoch(history).ok_or(EvalError::Empty {
            what: "the history's list of finite losses",
        })?;
        let all = train.iter().chain(&validation).map(|point| point.1);
        let (low, high) = all.fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), loss| {
            (low.min(loss), high.max(loss))
        });
        let logarithmic = low > 0.0 && high > 4.0 * low;
        let y = if logarithmic {
            Axis::logarithmic(low, high, "loss (log scale)")
        } else {
            Axis::linear(low, high, 6, "loss")
        };
        Ok(Self {
            train,
            validation,
            best,
            y,
            logarithmic,
        })
    }

    fn epochs(&self, history: &[EpochRecord]) -> Axis {
        let epochs = history.iter().map(|record| record.epoch);
        let first = epochs.clone().min().unwrap_or(1);
        Axis::whole(first, epochs.max().unwrap_or(first), 12, "epoch")
    }

    fn place(&self, (epoch, loss): (f64, f64)) -> (f64, f64) {
        (epoch, if self.logarithmic { loss.log10() } else { loss })
    }
}

fn points(history: &[EpochRecord], pick: impl Fn(&EpochRecord) -> Option<f64>) -> Vec<(f64, f64)> {
    let picked = history
        .iter()
        .filter_map(|record| Some((record.epoch as f64, pick(record)?)));
    picked.filter(|point| point.1.is_finite()).collect()
}

fn losses<'a>(page: &Area<'a>, area: &Area<'a>, x: &Axis, curves: &Curves) -> Drawn<()> {
    let mut panel = panel(area, x, &curves.y, false)?;
    let (best_epoch, best_loss) = curves.best;
    let best = curves.place((best_epoch as f64, best_loss));
    let upright = vec![(best.0, curves.y.range.start), (best.0, curves.y.range.end)];
    canvas::line(&mut panel, upright, stroke(BEST, 1.0))?;
    for (curve, color) in [(&curves.train, MODEL), (&curves.validation, NAIVE)] {
        let placed: Vec<_> = curve.iter().map(|&point| curves.place(point)).collect();
        if placed.len() <= 60 {
            dots(&mut panel, &placed, 2.4, color)?;
        }
        canvas::line(&mut panel, placed, stroke(color, 1.8))?;
    }
    dots(&mut panel, &[best], 5.0, BEST)?;
    mark_best(page, &panel, best.0, x, &curves.y)
}

/// "best: epoch n" at the top of its line, on the side where there is room.
fn mark_best(page: &Area, panel: &Panel, epoch: f64, x: &Axis, y: &Axis) -> Drawn<()> {
    let share = (epoch - x.range.start) / (x.range.end - x.range.start);
    let (anchor, shift) = if share > 0.8 {
        (HPos::Right, -8.0)
    } else {
        (HPos::Left, 8.0)
    };
    let top = (epoch, y.range.end);
    let label = format!("best: epoch {epoch}");
    canvas::text_beside(
        page,
        panel,
        top,
        (shift, 10.0),
        &label,
        (12.0, BEST, anchor),
    )
}

fn dots(panel: &mut Panel, at: &[(f64, f64)], radius: f64, color: RGBColor) -> Drawn<()> {
    use plotters::prelude::Color;
    let style = color.filled();
    let dots = at
        .iter()
        .map(|&point| Circle::new(point, canvas::px(radius), style));
    panel.draw_series(dots).map_err(reason)?;
    Ok(())
}

fn rates(area: &Area, x: &Axis, history: &[EpochRecord]) -> Drawn<()> {
    let rates = points(history, |record| {
        (record.learning_rate > 0.0).then_some(record.learning_rate)
    });
    let bounds = rates
        .iter()
        .fold(None, |bounds: Option<(f64, f64)>, point| {
            let (low, high) = bounds.unwrap_or((point.1, point.1));
            Some((low.min(point.1), high.max(point.1)))
        });
    let (low, high) = bounds.unwrap_or((1e-4, 1e-4));
    let y = Axis::logarithmic(low, high, "learning rate");
    let mut panel = panel(area, x, &y, true)?;
    let placed: Vec<_> = rates
        .iter()
        .map(|&(epoch, rate)| (epoch, rate.log10()))
        .collect();
    canvas::line(&mut panel, steps(&placed), stroke(RATE, 1.6))?;
    if placed.len() <= 60 {
        dots(&mut panel, &placed, 2.0, RATE)?;
    }
    Ok(())
}

/// The corners of a staircase: a rate holds until the next one.
fn steps(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let corner = |pair: &[(f64, f64)]| [pair[0], (pair[1].0, pair[0].1)];
    let corners = points.windows(2).flat_map(corner);
    corners.chain(points.last().copied()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    pub(crate) fn history(epochs: usize) -> Vec<EpochRecord> {
        (1..=epochs)
            .map(|epoch| EpochRecord {
                epoch,
                train_loss: 0.5 / epoch as f64,
                validation_loss: Some(0.6 / epoch as f64 + 0.002 * epoch as f64),
                learning_rate: if epoch < 10 { 1e-4 } else { 5e-5 },
            })
            .collect()
    }

    #[test]
    fn marks_the_best_epoch() {
        let history = history(30);
        assert_eq!(best_epoch(&history).unwrap().0, 17);
        let svg = loss_svg(&history).unwrap();
        for expected in [
            "best: epoch 17",
            "training",
            "validation",
            "log scale",
            "learning rate",
        ] {
            assert!(svg.contains(expected), "{expected}");
        }
        assert!(!svg.contains("NaN") && svg.trim_end().ends_with("</svg>"));
    }

    #[test]
    fn one_epoch_and_no_validation_can_be_drawn() {
        let one = [EpochRecord {
            epoch: 1,
            train_loss: 0.2,
            validation_loss: None,
            learning_rate: 1e-3,
        }];
        let svg = loss_svg(&one).unwrap();
        assert!(svg.contains("best: epoch 1") && !svg.contains(">\nvalidation\n<"));
    }

    #[test]
    fn a_diverged_epoch_is_left_out() {
        let mut history = history(5);
        history[4].train_loss = f64::NAN;
        history[4].validation_loss = Some(f64::INFINITY);
        assert!(!loss_svg(&history).unwrap().contains("NaN"));
        for record in &mut history {
            record.train_loss = f64::NAN;
            record.validation_loss = None;
        }
        assert!(matches!(loss_svg(&history), Err(EvalError::Empty { .. })));
        assert!(loss_svg(&[]).is_err());
    }
}

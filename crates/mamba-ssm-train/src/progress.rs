//! Telling the user how a run is going.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

use crate::checkpoint::TrainState;
use crate::history::EpochRecord;
use crate::trainer::Outcome;

/// What is known after an optimizer step.
#[derive(Debug, Clone, PartialEq)]
pub struct StepReport {
    /// The epoch under way, counted from one.
    pub epoch: usize,
    /// Epochs at most.
    pub epochs: usize,
    /// Micro-batches done in this epoch.
    pub micro_batch: usize,
    /// Micro-batches per epoch.
    pub micro_batches: usize,
    /// Optimizer steps since the run began.
    pub step: usize,
    /// Mean loss since the last report.
    pub loss: f64,
    /// Learning rate.
    pub lr: f64,
    /// Global gradient norm of this step, before clipping.
    pub gradient_norm: f64,
    /// Positions per second since the last report.
    pub tokens_per_second: f64,
    /// Time to the end of the last epoch or to the time limit, whichever comes first.
    pub eta: Duration,
}

/// Receives news of a run. Every method does nothing by default.
pub trait Reporter {
    /// The run starts or continues at `state`.
    fn start(&mut self, state: &TrainState) {
        let _ = state;
    }

    /// An optimizer step was taken (every `log_every` steps).
    fn step(&mut self, report: &StepReport) {
        let _ = report;
    }

    /// An epoch was validated; `improved` if it is the best so far.
    fn epoch(&mut self, record: &EpochRecord, improved: bool) {
        let _ = (record, improved);
    }

    /// Something worth knowing happened.
    fn message(&mut self, text: &str) {
        let _ = text;
    }

    /// The run ended.
    fn end(&mut self, outcome: Outcome) {
        let _ = outcome;
    }
}

/// Says nothing.
#[derive(Debug, Clone, Copy, Default)]
pub struct Silent;

impl Reporter for Silent {}

/// A live line if standard error is a terminal, otherwise a plain line every ten seconds.
pub fn default_reporter() -> Box<dyn Reporter> {
    if std::io::stderr().is_terminal() {
        Box::new(LiveLine::new())
    } else {
        Box::new(PlainLines::new(Duration::from_secs(10)))
    }
}

/// Plain lines on standard error, at most one per interval besides those of the epochs.
#[derive(Debug)]
pub struct PlainLines {
    interval: Duration,
    last: Option<Instant>,
}

impl PlainLines {
    /// At least `interval` lies between two lines about steps.
    pub fn new(interval: Duration) -> Self {
        Self {
            interval,
            last: None,
        }
    }
}

impl Reporter for PlainLines {
    fn start(&mut self, state: &TrainState) {
        if state.step > 0 {
            eprintln!("{}", resumed(state));
        }
    }

    fn step(&mut self, report: &StepReport) {
        if self.last.is_none_or(|last| last.elapsed() >= self.interval) {
            self.last = Some(Instant::now());
            eprintln!("{}", step_line(report));
        }
    }

    fn epoch(&mut self, record: &EpochRecord, improved: bool) {
        eprintln!("{}", epoch_line(record, improved));
    }

    fn message(&mut self, text: &str) {
        eprintln!("{text}");
    }

    fn end(&mut self, outcome: Outcome) {
        eprintln!("{outcome}");
    }
}

/// One line on the terminal that is rewritten in place; epochs scroll by above it.
#[derive(Debug)]
pub struct LiveLine {
    bar: ProgressBar,
}

impl LiveLine {
    /// Draws on standard error.
    pub fn new() -> Self {
        let bar = ProgressBar::no_length();
        if let Ok(style) = ProgressStyle::with_template("{bar:20} {wide_msg}") {
            bar.set_style(style);
        }
        Self { bar }
    }
}

impl Default for LiveLine {
    fn default() -> Self {
        Self::new()
    }
}

impl Reporter for LiveLine {
    fn start(&mut self, state: &TrainState) {
        if state.step > 0 {
            self.bar.println(resumed(state));
        }
    }

    fn step(&mut self, report: &StepReport) {
        self.bar.set_length(report.micro_batches as u64);
        self.bar.set_position(report.micro_batch as u64);
        self.bar.set_message(step_line(report));
    }

    fn epoch(&mut self, record: &EpochRecord, improved: bool) {
        self.bar.println(epoch_line(record, improved));
    }

    fn message(&mut self, text: &str) {
        self.bar.println(text);
    }

    fn end(&mut self, outcome: Outcome) {
        self.bar.finish_and_clear();
        eprintln!("{outcome}");
    }
}

fn resumed(state: &TrainState) -> String {
    format!(
        "resuming at epoch {}, micro-batch {}, step {}",
        state.epoch + 1,
        state.micro_batch,
        state.step
    )
}

fn step_line(report: &StepReport) -> String {
    format!(
        "epoch {}/{} batch {}/{}  loss {:.5}  lr {:.2e}  {} tokens/s  ETA {}",
        report.epoch,
        report.epochs,
        report.micro_batch,
        report.micro_batches,
        report.loss,
        report.lr,
        rate(report.tokens_per_second),
        clock(report.eta),
    )
}

fn epoch_line(record: &EpochRecord, improved: bool) -> String {
    let part = if record.fraction < 1.0 {
        format!(" ({:.0} %)", 100.0 * record.fraction)
    } else {
        String::new()
    };
    let best = if improved { "  best so far" } else { "" };
    format!(
        "epoch {}{part}: train loss {:.5}  validation loss {:.5}  lr {:.2e}  {} tokens/s{best}",
        record.epoch,
        record.train_loss,
        record.val_loss,
        record.lr,
        rate(record.tokens_per_second),
    )
}

/// 1234567 as `1.23M`.
fn rate(value: f64) -> String {
    match value {
        v if v >= 1e6 => format!("{:.2}M", v / 1e6),
        v if v >= 1e3 => format!("{:.1}k", v / 1e3),
        v => format!("{v:.0}"),
    }
}

/// Hours, minutes and seconds.
fn clock(time: Duration) -> String {
    let seconds = time.as_secs();
    format!(
        "{}:{:02}:{:02}",
        seconds / 3600,
        seconds / 60 % 60,
        seconds % 60
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_step_line_says_loss_rate_speed_and_eta() {
        let report = StepReport {
            epoch: 2,
            epochs: 10,
            micro_batch: 30,
            micro_batches: 100,
            step: 42,
            loss: 0.123456,
            lr: 1e-4,
            gradient_norm: 1.0,
            tokens_per_second: 1_234_567.0,
            eta: Duration::from_secs(3_725),
        };
        assert_eq!(
            step_line(&report),
            "epoch 2/10 batch 30/100  loss 0.12346  lr 1.00e-4  1.23M tokens/s  ETA 1:02:05"
        );
    }

    #[test]
    fn the_epoch_line_marks_the_best_and_the_unfinished() {
        let mut record = EpochRecord {
            epoch: 3,
            fraction: 1.0,
            step: 10,
            train_loss: 0.5,
            val_loss: 0.25,
            lr: 5e-5,
            tokens_per_second: 1500.0,
            seconds: 1.0,
            skipped_steps: 0,
        };
        assert_eq!(
            epoch_line(&record, true),
            "epoch 3: train loss 0.50000  validation loss 0.25000  lr 5.00e-5  1.5k tokens/s  best so far"
        );
        record.fraction = 0.4;
        record.tokens_per_second = 12.0;
        assert_eq!(
            epoch_line(&record, false),
            "epoch 3 (40 %): train loss 0.50000  validation loss 0.25000  lr 5.00e-5  12 tokens/s"
        );
    }
}

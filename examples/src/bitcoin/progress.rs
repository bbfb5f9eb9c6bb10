//! How far a long piece of work has come: one live line on a terminal, a plain line now and then elsewhere.

use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

/// Prints `what: done of total, time left` to standard error.
pub(super) struct Progress {
    what: String,
    started: Instant,
    shown: Option<Instant>,
    live: bool,
}

impl Progress {
    pub(super) fn new(what: impl Into<String>) -> Self {
        Self {
            what: what.into(),
            started: Instant::now(),
            shown: None,
            live: std::io::stderr().is_terminal(),
        }
    }

    pub(super) fn show(&mut self, done: u64, total: u64) {
        let pause = Duration::from_millis(if self.live { 100 } else { 10_000 });
        // The first seconds pass in silence: most work is over before a line would help.
        if self.shown.unwrap_or(self.started).elapsed() < pause || total == 0 {
            return;
        }
        self.shown = Some(Instant::now());
        let share = done as f64 / total as f64;
        let left = self.started.elapsed().as_secs_f64() * (1.0 - share) / share.max(1e-9);
        let line = format!("{}: {:.0} %, {left:.0} s left", self.what, 100.0 * share);
        if self.live {
            eprint!("\r\x1b[2K{line}");
            // A line that cannot be shown is no reason to stop the work.
            let _ = std::io::stderr().flush();
        } else {
            eprintln!("{line}");
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if self.live && self.shown.is_some() {
            eprint!("\r\x1b[2K");
        }
    }
}

//! Whole runs of a small model, and the golden loss.

mod golden;
mod runs;
mod support;

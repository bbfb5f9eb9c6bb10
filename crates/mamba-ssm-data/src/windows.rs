//! Where windows may lie, and which split they belong to. Windows are row ranges, never copies.

use std::fmt;
use std::ops::Range;
use std::str::FromStr;

use rand::SeedableRng;
use rand::rngs::ChaCha12Rng;
use rand::seq::SliceRandom;
use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// A part of the data with a purpose of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Split {
    /// Rows to learn from.
    Train,
    /// Rows to choose by.
    Validation,
    /// Rows to report on.
    Test,
}

impl Split {
    /// All splits, in order of time.
    pub const ALL: [Split; 3] = [Split::Train, Split::Validation, Split::Test];
}

impl fmt::Display for Split {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Split::Train => "train",
            Split::Validation => "validation",
            Split::Test => "test",
        })
    }
}

/// What to do where minutes are missing or rows are invalid.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, Default)]
#[serde(rename_all = "snake_case", tag = "policy", deny_unknown_fields)]
pub enum GapPolicy {
    /// A window never crosses a gap nor an invalid row.
    #[default]
    Split,
    /// Up to `limit` missing or invalid rows in a row are filled with the last valid one and
    /// masked; longer gaps split, and so do jumps that are no multiple of the step.
    Fill {
        /// Greatest number of consecutive rows that are filled.
        limit: usize,
    },
    /// Every missing or invalid row is filled with the last valid one and masked, however long
    /// the gap; a window is kept when at least `min_valid` of its rows are valid. A jump that is no
    /// multiple of the step cannot be filled on the clock: no window crosses it.
    Mask {
        /// Least share of valid rows in a window, 0 to 1.
        min_valid: f64,
    },
    /// Rows as they come: a window may cross a gap, and only windows with an invalid row are left
    /// out (what the published note does).
    Ignore,
}

impl GapPolicy {
    /// Checks the numbers.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidOption`].
    pub fn validate(&self) -> Result<()> {
        let bad = |reason: String| {
            Err(Error::InvalidOption {
                option: "gaps",
                reason,
            })
        };
        match self {
            GapPolicy::Fill { limit: 0 } => {
                bad("fill with a limit of 0 fills nothing; use `split`".into())
            }
            GapPolicy::Mask { min_valid } if !(0.0..=1.0).contains(min_valid) => {
                bad(format!("min_valid is {min_valid}; expected 0 to 1"))
            }
            _ => Ok(()),
        }
    }
}

/// `split`, `ignore`, `fill:N` (rows), `mask` (half of a window's rows must be valid) or `mask:SHARE`.
///
/// ```
/// use mamba_ssm_data::GapPolicy;
/// assert_eq!("fill:60".parse::<GapPolicy>()?, GapPolicy::Fill { limit: 60 });
/// assert_eq!("mask".parse::<GapPolicy>()?, GapPolicy::Mask { min_valid: 0.5 });
/// assert!("fill".parse::<GapPolicy>().is_err());
/// # Ok::<(), mamba_ssm_data::Error>(())
/// ```
impl FromStr for GapPolicy {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let (name, number) = match text.trim().split_once(':') {
            Some((name, number)) => (name, Some(number)),
            None => (text.trim(), None),
        };
        let policy = match (name, number) {
            ("split", None) => Some(GapPolicy::Split),
            ("ignore", None) => Some(GapPolicy::Ignore),
            ("fill", Some(limit)) => limit.parse().ok().map(|limit| GapPolicy::Fill { limit }),
            ("mask", None) => Some(GapPolicy::Mask { min_valid: 0.5 }),
            ("mask", Some(share)) => share
                .parse()
                .ok()
                .map(|min_valid| GapPolicy::Mask { min_valid }),
            _ => None,
        };
        let policy = policy.ok_or_else(|| Error::InvalidOption {
            option: "gaps",
            reason: format!(
                "`{}` is none; expected split, ignore, fill:N (rows), mask or mask:SHARE (0 to 1)",
                crate::error::shorten(text)
            ),
        })?;
        policy.validate()?;
        Ok(policy)
    }
}

/// How rows are shared out among the splits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(rename_all = "snake_case")]
pub enum Protocol {
    /// By time, with an embargo of one window between splits; statistics of the training rows
    /// alone. The honest one.
    #[default]
    Chronological,
    /// Overlapping windows shared out at random and statistics of all rows, as in the published
    /// note. Test rows are training rows too: for comparison only.
    Note,
}

/// Window length, stride and the sharing out of windows.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct WindowOptions {
    /// Rows of a window.
    pub length: usize,
    /// Rows from the start of one window to the start of the next.
    pub stride: usize,
    /// What to do at gaps.
    pub gaps: GapPolicy,
    /// How rows are shared out.
    pub protocol: Protocol,
    /// Shares of training, validation and test; they sum to 1.
    pub fractions: [f64; 3],
    /// Seed of the random sharing out ([`Protocol::Note`]).
    pub seed: u64,
}

impl Default for WindowOptions {
    fn default() -> Self {
        Self {
            length: 2048,
            stride: 512,
            gaps: GapPolicy::Split,
            protocol: Protocol::Chronological,
            fractions: [0.8, 0.1, 0.1],
            seed: 0,
        }
    }
}

impl WindowOptions {
    /// Checks all options.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidOption`] naming the option.
    pub fn validate(&self) -> Result<()> {
        let bad = |option, reason| Err(Error::InvalidOption { option, reason });
        if self.length < 2 {
            return bad(
                "length",
                format!("{}; expected at least 2 rows", self.length),
            );
        }
        if self.stride == 0 {
            return bad("stride", "0; expected at least 1 row".into());
        }
        let sum: f64 = self.fractions.iter().sum();
        let shares_are_right = self.fractions.iter().all(|f| (0.0..=1.0).contains(f))
            && (sum - 1.0).abs() < 1e-9
            && self.fractions[0] > 0.0;
        if !shares_are_right {
            return bad(
                "fractions",
                format!(
                    "{:?}; expected three shares from 0 to 1 that sum to 1, the first above 0",
                    self.fractions
                ),
            );
        }
        self.gaps.validate()
    }
}

/// Window starts at equal distances: `first, first + stride, ...`, `count` of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct StartRange {
    /// First start row.
    pub first: u64,
    /// Number of starts.
    pub count: u64,
}

/// The windows of one split, as ranges of start rows.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SplitWindows {
    /// Which split.
    pub split: Split,
    /// The rows of the split: first, and one past the last. Under [`Protocol::Note`] all rows.
    pub rows: (u64, u64),
    /// Start rows, rising.
    pub starts: Vec<StartRange>,
}

impl SplitWindows {
    /// Number of windows.
    pub fn len(&self) -> usize {
        self.starts.iter().map(|r| r.count as usize).sum()
    }

    /// Whether there is no window.
    pub fn is_empty(&self) -> bool {
        self.starts.iter().all(|r| r.count == 0)
    }

    /// All start rows, rising.
    pub fn expand(&self, stride: usize) -> Vec<u64> {
        self.starts
            .iter()
            .flat_map(|r| (0..r.count).map(move |i| r.first + i * stride as u64))
            .collect()
    }
}

/// What the sharing out of windows needs to know about the rows; small even for large inputs.
///
/// Built row by row: runs of rows without a gap or an invalid row, and every invalid run.
#[derive(Debug, Clone, Default)]
pub(crate) struct RowMap {
    rows: usize,
    /// Runs of rows, one step apart and valid (filled rows count as valid under `fill`/`mask`).
    unbroken: Vec<Range<usize>>,
    /// Runs of rows one step apart, whatever is in them.
    on_clock: Vec<Range<usize>>,
    /// Runs of rows that are not true observations.
    invalid: Vec<Range<usize>>,
    last_time: Option<i64>,
    last_usable: bool,
    /// Where the rows come from, for messages.
    origin: String,
}

impl RowMap {
    /// No rows yet.
    pub(crate) fn new(origin: &str) -> Self {
        Self {
            origin: origin.into(),
            ..Self::default()
        }
    }

    /// Adds rows at the end. `usable` tells a row that may stand in a window from one that may not.
    pub(crate) fn extend(
        &mut self,
        step: i64,
        timestamps: &[i64],
        valid: &[bool],
        usable: impl Fn(usize) -> bool,
    ) {
        for (i, (&time, &valid)) in timestamps.iter().zip(valid).enumerate() {
            let row = self.rows;
            let usable = usable(i);
            let ticks = self.last_time.is_some_and(|t| time - t == step);
            add_row(&mut self.on_clock, row, ticks);
            if usable {
                add_row(&mut self.unbroken, row, self.last_usable && ticks);
            }
            if !valid {
                let follows = self.invalid.last().is_some_and(|run| run.end == row);
                add_row(&mut self.invalid, row, follows);
            }
            self.last_time = Some(time);
            self.last_usable = usable;
            self.rows += 1;
        }
    }

    /// Number of unbroken runs.
    pub(crate) fn runs(&self) -> usize {
        self.unbroken.len()
    }

    /// Number of rows that are not true observations.
    pub(crate) fn invalid_rows(&self) -> usize {
        self.invalid.iter().map(Range::len).sum()
    }

    /// Invalid rows within a range.
    fn invalid_within(&self, range: &Range<usize>) -> usize {
        let from = self.invalid.partition_point(|r| r.end <= range.start);
        self.invalid[from..]
            .iter()
            .take_while(|r| r.start < range.end)
            .map(|r| r.end.min(range.end) - r.start.max(range.start))
            .sum()
    }

    /// The starts of the windows that lie within `rows`.
    fn starts_within(&self, rows: Range<usize>, options: &WindowOptions) -> Vec<usize> {
        let (length, stride) = (options.length, options.stride);
        match options.gaps {
            GapPolicy::Split | GapPolicy::Fill { .. } => self
                .unbroken
                .iter()
                .flat_map(|run| {
                    let start = run.start.max(rows.start);
                    let end = run.end.min(rows.end);
                    grid(start, start..end, length, stride)
                })
                .collect(),
            GapPolicy::Ignore => grid(0, rows, length, stride)
                .filter(|&s| self.invalid_within(&(s..s + length)) == 0)
                .collect(),
            // What is left of gaps after filling are jumps off the clock, where each run ends.
            GapPolicy::Mask { min_valid } => self
                .on_clock
                .iter()
                .flat_map(|run| {
                    let within = run.start.max(rows.start)..run.end.min(rows.end);
                    grid(run.start, within, length, stride)
                })
                .filter(|&s| {
                    let valid = length - self.invalid_within(&(s..s + length));
                    valid > 0 && valid as f64 >= min_valid * length as f64
                })
                .collect(),
        }
    }

    /// Shares out the windows. The rows to fit statistics on come first, then the three splits.
    pub(crate) fn share_out(
        &self,
        options: &WindowOptions,
    ) -> Result<(Range<usize>, Vec<SplitWindows>)> {
        options.validate()?;
        let all = self.starts_within(0..self.rows, options);
        if all.is_empty() {
            return Err(self.too_few(options));
        }
        match options.protocol {
            Protocol::Chronological => self.by_time(options),
            Protocol::Note => Ok((0..self.rows, self.at_random(all, options)?)),
        }
    }

    /// The error of rows that hold no window at all.
    fn too_few(&self, options: &WindowOptions) -> Error {
        Error::TooFewRows {
            path: self.origin.clone(),
            rows: self.rows,
            needed: options.length,
            longest: self.unbroken.iter().map(Range::len).max().unwrap_or(0),
        }
    }

    fn by_time(&self, options: &WindowOptions) -> Result<(Range<usize>, Vec<SplitWindows>)> {
        let [train, validation, test] = options.fractions;
        let edge = |share: f64| (share * self.rows as f64).round() as usize;
        let train_end = edge(train).min(self.rows);
        let validation_end = if test == 0.0 {
            self.rows
        } else {
            edge(train + validation).min(self.rows)
        };
        // The embargo comes off the later split, so that training keeps its share.
        let after = |end: usize, stop: usize| (end + options.length).min(stop)..stop;
        let ranges = [
            0..train_end,
            after(train_end, validation_end),
            after(validation_end, self.rows),
        ];
        let splits = Split::ALL
            .into_iter()
            .zip(ranges)
            .zip(options.fractions)
            .map(|((split, rows), share)| {
                let rows = if share == 0.0 {
                    rows.start..rows.start
                } else {
                    rows
                };
                let starts = self.starts_within(rows.clone(), options);
                self.pack(split, rows, starts, share, options)
            })
            .collect::<Result<Vec<_>>>()?;
        Ok((0..train_end, splits))
    }

    fn at_random(&self, mut all: Vec<usize>, options: &WindowOptions) -> Result<Vec<SplitWindows>> {
        all.shuffle(&mut ChaCha12Rng::seed_from_u64(options.seed));
        let edge = |share: f64| ((share * all.len() as f64).round() as usize).min(all.len());
        let first = edge(options.fractions[0]);
        let second = edge(options.fractions[0] + options.fractions[1]);
        let parts = [&all[..first], &all[first..second], &all[second..]];
        Split::ALL
            .into_iter()
            .zip(parts)
            .zip(options.fractions)
            .map(|((split, part), share)| {
                let mut starts = part.to_vec();
                starts.sort_unstable();
                self.pack(split, 0..self.rows, starts, share, options)
            })
            .collect()
    }

    /// All windows in one split; the way of a series that a finished run is scored on.
    pub(crate) fn all_in(&self, split: Split, options: &WindowOptions) -> Result<SplitWindows> {
        let starts = self.starts_within(0..self.rows, options);
        if starts.is_empty() {
            return Err(self.too_few(options));
        }
        self.pack(split, 0..self.rows, starts, 1.0, options)
    }

    /// Folds start rows into ranges; refuses an empty split that should hold something.
    fn pack(
        &self,
        split: Split,
        rows: Range<usize>,
        starts: Vec<usize>,
        share: f64,
        options: &WindowOptions,
    ) -> Result<SplitWindows> {
        if starts.is_empty() && share > 0.0 {
            return Err(Error::EmptySplit {
                path: self.origin.clone(),
                split,
                rows: rows.len(),
                needed: options.length,
            });
        }
        let mut ranges: Vec<StartRange> = Vec::new();
        for start in starts {
            let start = start as u64;
            match ranges.last_mut() {
                Some(r) if r.first + r.count * options.stride as u64 == start => r.count += 1,
                _ => ranges.push(StartRange {
                    first: start,
                    count: 1,
                }),
            }
        }
        Ok(SplitWindows {
            split,
            rows: (rows.start as u64, rows.end as u64),
            starts: ranges,
        })
    }
}

/// Adds a row to the last run, or begins one.
fn add_row(runs: &mut Vec<Range<usize>>, row: usize, follows: bool) {
    match runs.last_mut() {
        Some(run) if follows => run.end = row + 1,
        _ => runs.push(row..row + 1),
    }
}

/// Starts `origin + k * stride` of windows that lie within `rows`.
fn grid(
    origin: usize,
    rows: Range<usize>,
    length: usize,
    stride: usize,
) -> impl Iterator<Item = usize> {
    let first = origin + (rows.start - origin).div_ceil(stride) * stride;
    let end = (rows.end + 1).saturating_sub(length);
    (first..end.max(first)).step_by(stride)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(timestamps: &[i64], valid: &[bool]) -> RowMap {
        let mut map = RowMap::default();
        map.extend(60, timestamps, valid, |i| valid[i]);
        map
    }

    fn minutes(rows: usize) -> Vec<i64> {
        (0..rows as i64).map(|i| i * 60).collect()
    }

    fn options(length: usize, stride: usize, gaps: GapPolicy) -> WindowOptions {
        WindowOptions {
            length,
            stride,
            gaps,
            ..WindowOptions::default()
        }
    }

    #[test]
    fn split_never_crosses_a_gap_or_an_invalid_row() {
        let mut times = minutes(30);
        times[10..].iter_mut().for_each(|t| *t += 60);
        let mut valid = vec![true; 30];
        valid[20] = false;
        let map = map(&times, &valid);
        let starts = map.starts_within(0..30, &options(4, 2, GapPolicy::Split));
        assert_eq!(starts, [0, 2, 4, 6, 10, 12, 14, 16, 21, 23, 25]);
        assert_eq!(map.runs(), 3);
        assert_eq!(map.invalid_rows(), 1);
    }

    #[test]
    fn ignore_crosses_gaps_on_one_grid_but_leaves_out_invalid_rows() {
        let mut times = minutes(20);
        times[10..].iter_mut().for_each(|t| *t += 600);
        let mut valid = vec![true; 20];
        valid[5] = false;
        let starts = map(&times, &valid).starts_within(0..20, &options(4, 2, GapPolicy::Ignore));
        assert_eq!(starts, [0, 6, 8, 10, 12, 14, 16]);
    }

    #[test]
    fn mask_keeps_windows_by_their_share_of_valid_rows() {
        let mut valid = vec![true; 12];
        valid[4..8].fill(false);
        let map = map(&minutes(12), &valid);
        let starts =
            |min_valid| map.starts_within(0..12, &options(4, 2, GapPolicy::Mask { min_valid }));
        assert_eq!(starts(0.5), [0, 2, 6, 8]);
        assert_eq!(starts(0.0), [0, 2, 6, 8]);
        assert_eq!(starts(1.0), [0, 8]);
    }

    #[test]
    fn mask_never_crosses_a_jump_off_the_clock() {
        let mut times = minutes(12);
        times[5..].iter_mut().for_each(|t| *t += 30);
        let map = map(&times, &[true; 12]);
        let mask = options(4, 2, GapPolicy::Mask { min_valid: 0.0 });
        assert_eq!(map.starts_within(0..12, &mask), [0, 5, 7]);
        assert_eq!(map.starts_within(1..10, &mask), [5]);
        assert!(map.starts_within(8..12, &mask).is_empty());
    }

    #[test]
    fn gap_policies_have_names() {
        for (text, policy) in [
            ("split", GapPolicy::Split),
            (" ignore ", GapPolicy::Ignore),
            ("mask:0.9", GapPolicy::Mask { min_valid: 0.9 }),
        ] {
            assert_eq!(text.parse::<GapPolicy>().unwrap(), policy);
        }
        for text in [
            "", "fill", "fill:", "fill:0", "fill:-1", "mask:2", "mask:nan", "split:1", "drop",
        ] {
            let message = text.parse::<GapPolicy>().unwrap_err().to_string();
            assert!(message.contains("gaps"), "{message}");
        }
    }

    #[test]
    fn the_note_counts_of_the_real_file() {
        // 3,605,528 rows without an invalid one, as they come: the note's 7,039 windows.
        let rows = 3_605_528;
        let map = RowMap {
            rows,
            ..RowMap::default()
        };
        let options = WindowOptions {
            gaps: GapPolicy::Ignore,
            protocol: Protocol::Note,
            ..WindowOptions::default()
        };
        let (fit, splits) = map.share_out(&options).unwrap();
        assert_eq!(fit, 0..rows);
        let counts: Vec<usize> = splits.iter().map(SplitWindows::len).collect();
        assert_eq!(counts, [5631, 704, 704]);
        let mut all: Vec<u64> = splits.iter().flat_map(|s| s.expand(512)).collect();
        all.sort_unstable();
        all.dedup();
        assert_eq!(all.len(), 7039);
    }

    #[test]
    fn chronological_splits_keep_a_window_apart() {
        let map = map(&minutes(1000), &[true; 1000]);
        let (fit, splits) = map.share_out(&options(20, 5, GapPolicy::Split)).unwrap();
        assert_eq!(fit, 0..800);
        let last_train = splits[0].expand(5).pop().unwrap() + 20;
        let first_validation = splits[1].expand(5)[0];
        let last_validation = splits[1].expand(5).pop().unwrap() + 20;
        let first_test = splits[2].expand(5)[0];
        assert!(
            last_train <= 800 && first_validation >= 820,
            "{first_validation}"
        );
        assert!(last_validation <= 900 && first_test >= 920, "{first_test}");
        assert_eq!(
            splits[0].starts,
            [StartRange {
                first: 0,
                count: 157
            }]
        );
    }

    #[test]
    fn too_few_rows_and_empty_splits_say_what_is_needed() {
        let small = map(&minutes(10), &[true; 10]);
        let message = small
            .share_out(&options(20, 5, GapPolicy::Split))
            .unwrap_err()
            .to_string();
        assert!(message.contains("10 rows are too few"), "{message}");

        let middling = map(&minutes(100), &[true; 100]);
        let message = middling
            .share_out(&options(20, 5, GapPolicy::Split))
            .unwrap_err()
            .to_string();
        assert!(message.contains("validation split"), "{message}");

        let no_holdout = WindowOptions {
            fractions: [1.0, 0.0, 0.0],
            ..options(20, 5, GapPolicy::Split)
        };
        let (fit, splits) = middling.share_out(&no_holdout).unwrap();
        assert_eq!(fit, 0..100);
        assert_eq!(
            splits.iter().map(SplitWindows::len).collect::<Vec<_>>(),
            [17, 0, 0]
        );
    }

    #[test]
    fn options_out_of_range_are_named() {
        let check = |change: fn(&mut WindowOptions), word: &str| {
            let mut options = WindowOptions::default();
            change(&mut options);
            let message = options.validate().unwrap_err().to_string();
            assert!(message.contains(word), "{message}");
        };
        check(|o| o.length = 1, "length");
        check(|o| o.stride = 0, "stride");
        check(|o| o.fractions = [0.5, 0.1, 0.1], "fractions");
        check(|o| o.gaps = GapPolicy::Mask { min_valid: 2.0 }, "min_valid");
        check(|o| o.gaps = GapPolicy::Fill { limit: 0 }, "limit");
    }
}

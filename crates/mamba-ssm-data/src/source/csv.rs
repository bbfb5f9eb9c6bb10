//! Rows from lines of comma-separated cells, several chunks at a time.

use std::path::Path;

use rayon::prelude::*;

use super::bytes::{Chunks, Format, LONGEST_LINE};
use super::number::{ends_cell, fast_decimal, parse, parse_seconds, to_seconds};
use super::{Block, BlockSource, OrderPolicy, ReadOptions};
use crate::error::shorten;
use crate::schema::ColumnSpec;
use crate::{Error, Result};

/// The columns of a Binance kline file, which has no header.
const BINANCE: [&str; 12] = [
    "open_time",
    "open",
    "high",
    "low",
    "close",
    "volume",
    "close_time",
    "quote_volume",
    "count",
    "taker_buy_volume",
    "taker_buy_quote_volume",
    "ignore",
];

/// What a cell is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Cell {
    Skip,
    Time,
    Column(usize),
}

/// How to take a line apart.
#[derive(Debug)]
struct Layout {
    cells: Vec<Cell>,
    /// Cells up to the last one that is needed; those behind may be missing.
    needed: usize,
}

/// What is wrong with a row, before the file's name and the line number are known.
enum Fault {
    Cells {
        found: usize,
    },
    Word {
        column: Option<usize>,
        value: String,
    },
    Domain {
        column: usize,
        value: f64,
    },
    Order {
        previous: i64,
        current: i64,
    },
    Quoting(String),
    /// A cell goes on in the next line.
    LineEndInCell,
}

/// A chunk's rows, and what the order of the whole file depends on.
struct Parsed {
    block: Block,
    lines: u64,
    /// First and last timestamp before any are filtered out, and the line of the first.
    ends: Option<(u64, i64, i64)>,
}

/// Reads a CSV file block by block.
pub(super) struct CsvReader<'a> {
    name: String,
    options: &'a ReadOptions,
    layout: Layout,
    chunks: Chunks,
    ready: std::collections::VecDeque<Block>,
    pending: Option<Vec<u8>>,
    /// Lines before the next chunk.
    line: u64,
    last_time: Option<i64>,
}

impl<'a> CsvReader<'a> {
    /// Opens the file and reads its header.
    pub(super) fn open(path: &Path, format: Format, options: &'a ReadOptions) -> Result<Self> {
        let name = path.display().to_string();
        let mut chunks = Chunks::open(path, format)?;
        let Some(mut first) = chunks.next()? else {
            return Err(Error::EmptyFile { path: name });
        };
        if first.starts_with(b"\xef\xbb\xbf") {
            first.drain(..3);
        }
        if first.iter().all(u8::is_ascii_whitespace) {
            return Err(Error::EmptyFile { path: name });
        }
        let end = first
            .iter()
            .position(|&b| b == b'\n')
            .map_or(first.len(), |i| i + 1);
        let names = header_cells(&first[..end], &name)?;
        let has_header = names
            .first()
            .is_none_or(|cell| parse_seconds(cell.as_bytes()).is_none());
        let names = match (has_header, names.len()) {
            (true, _) => names,
            (false, 11 | 12) => BINANCE.iter().map(ToString::to_string).collect(),
            (false, found) => {
                return Err(Error::Source {
                    path: name,
                    reason: format!(
                        "the first line has {found} numbers and no names; expected a header line \
                         or the 12 columns of Binance klines"
                    ),
                });
            }
        };
        let layout = Layout::of(&names, options, &name)?;
        if has_header {
            first.drain(..end);
        }
        Ok(Self {
            name,
            options,
            layout,
            chunks,
            ready: Default::default(),
            pending: Some(first),
            line: u64::from(has_header),
            last_time: None,
        })
    }

    /// Parses as many chunks as there are threads; false at the end.
    fn parse_more(&mut self) -> Result<bool> {
        let mut chunks: Vec<Vec<u8>> = self.pending.take().into_iter().collect();
        while chunks.len() < rayon::current_num_threads() {
            match self.chunks.next()? {
                Some(chunk) => chunks.push(chunk),
                None => break,
            }
        }
        if chunks.is_empty() {
            return Ok(false);
        }
        let parsed: Vec<_> = chunks
            .par_iter()
            .map(|chunk| parse_chunk(chunk, &self.layout, self.options))
            .collect();
        for outcome in parsed {
            let parsed = outcome.map_err(|(line, fault)| self.error(self.line + line, fault))?;
            if let Some((line, first, last)) = parsed.ends {
                let previous = self.last_time.replace(last);
                if let Some(previous) = previous.filter(|&p| p >= first)
                    && self.options.order == OrderPolicy::Refuse
                {
                    let fault = Fault::Order {
                        previous,
                        current: first,
                    };
                    return Err(self.error(self.line + line, fault));
                }
            }
            self.line += parsed.lines;
            if parsed.block.len() > 0 {
                self.ready.push_back(parsed.block);
            }
        }
        Ok(true)
    }

    /// The error for a fault in this line (counted from 1).
    fn error(&self, row: u64, fault: Fault) -> Error {
        let path = self.name.clone();
        let spec = |i: usize| &self.options.schema.columns[i];
        match fault {
            Fault::Cells { found } => Error::WrongCellCount {
                path,
                row,
                found,
                expected: self.layout.cells.len(),
            },
            Fault::Word { column, value } => Error::NotANumber {
                path,
                row,
                column: column
                    .map_or(&self.options.schema.time.name, |c| &spec(c).name)
                    .clone(),
                value,
                expected: match column {
                    Some(_) => "a number",
                    None => "a unix time or a date",
                },
            },
            Fault::Domain { column, value } => Error::OutOfDomain {
                path,
                row,
                column: spec(column).name.clone(),
                value,
                expected: spec(column).scale.expected(),
            },
            Fault::Order { previous, current } => Error::OutOfOrder {
                path,
                row,
                previous,
                current,
            },
            Fault::Quoting(reason) => Error::Source {
                path,
                reason: format!("row {row}: {reason}"),
            },
            Fault::LineEndInCell => line_end_in_cell(path, row),
        }
    }
}

impl BlockSource for CsvReader<'_> {
    fn next_block(&mut self) -> Result<Option<Block>> {
        while self.ready.is_empty() {
            if !self.parse_more()? {
                return Ok(None);
            }
        }
        Ok(self.ready.pop_front())
    }

    fn bytes_read(&self) -> u64 {
        self.chunks.bytes_read()
    }
}

/// The cells of the first line.
fn header_cells(line: &[u8], path: &str) -> Result<Vec<String>> {
    let mut reader = csv::ReaderBuilder::new()
        .has_headers(false)
        .from_reader(line);
    let mut record = csv::ByteRecord::new();
    match reader.read_byte_record(&mut record) {
        Ok(true) if holds_line_end(&record) => Err(line_end_in_cell(path.into(), 1)),
        Ok(true) if line.len() <= LONGEST_LINE => Ok(record
            .iter()
            .map(|cell| String::from_utf8_lossy(cell).trim().to_string())
            .collect()),
        Ok(true) => Err(Error::LineTooLong {
            path: path.into(),
            row: 1,
            limit: LONGEST_LINE,
        }),
        Ok(false) => Err(Error::EmptyFile { path: path.into() }),
        Err(e) => Err(Error::Damaged {
            path: path.into(),
            format: "CSV",
            reason: e.to_string(),
        }),
    }
}

/// Whether a cell goes on behind the end of its line, or is not closed where the bytes end.
fn holds_line_end(record: &csv::ByteRecord) -> bool {
    record.as_slice().contains(&b'\n')
}

/// Files are cut at line ends, to be parsed by several threads: a row is a line.
fn line_end_in_cell(path: String, row: u64) -> Error {
    Error::Source {
        path,
        reason: format!(
            "row {row}: a quoted cell goes on in the next line; expected one row per line (is a quote missing?)"
        ),
    }
}

impl Layout {
    /// Finds the schema's columns among the names of the header.
    fn of(names: &[String], options: &ReadOptions, path: &str) -> Result<Self> {
        let mut cells = vec![Cell::Skip; names.len()];
        let mut missing = Vec::new();
        let mut place = |spec: &ColumnSpec, cell: Cell| match super::find_column(names, spec) {
            Some(at) => cells[at] = cell,
            None => missing.push(spec.name.clone()),
        };
        place(&options.schema.time, Cell::Time);
        for (i, spec) in options.schema.columns.iter().enumerate() {
            place(spec, Cell::Column(i));
        }
        if !missing.is_empty() {
            return Err(Error::MissingColumns {
                path: path.into(),
                missing,
                found: names.to_vec(),
            });
        }
        let needed = cells
            .iter()
            .rposition(|c| *c != Cell::Skip)
            .map_or(0, |i| i + 1);
        Ok(Self { cells, needed })
    }
}

/// Parses whole lines. A fault comes with its line, counted from 1 within the chunk.
fn parse_chunk(
    bytes: &[u8],
    layout: &Layout,
    options: &ReadOptions,
) -> std::result::Result<Parsed, (u64, Fault)> {
    if bytes.contains(&b'"') {
        return parse_quoted(bytes, layout, options);
    }
    let mut rows = Rows::new(bytes.len() / 48, layout, options);
    let mut at = 0;
    while at < bytes.len() {
        rows.lines += 1;
        at = rows.line(bytes, at).map_err(|fault| (rows.lines, fault))?;
    }
    Ok(rows.finish())
}

/// The slow way, for chunks in which cells are quoted.
fn parse_quoted(
    bytes: &[u8],
    layout: &Layout,
    options: &ReadOptions,
) -> std::result::Result<Parsed, (u64, Fault)> {
    let mut reader = csv::ReaderBuilder::new()
        .has_headers(false)
        .flexible(true)
        .from_reader(bytes);
    let mut rows = Rows::new(bytes.len() / 48, layout, options);
    let mut record = csv::ByteRecord::new();
    loop {
        let line = reader.position().line();
        match reader.read_byte_record(&mut record) {
            Ok(true) => {
                rows.lines = record
                    .position()
                    .map_or(line, |at| at.line() + blank_lines(bytes, at.byte()));
                if holds_line_end(&record) {
                    return Err((rows.lines, Fault::LineEndInCell));
                }
                rows.record(&record).map_err(|fault| (rows.lines, fault))?;
            }
            Ok(false) => break,
            Err(e) => return Err((line, Fault::Quoting(e.to_string()))),
        }
    }
    rows.lines = bytes.iter().filter(|&&b| b == b'\n').count() as u64
        + u64::from(bytes.last().is_some_and(|&b| b != b'\n'));
    Ok(rows.finish())
}

/// Line ends at a place: the blank lines that the csv crate passes over before a record.
fn blank_lines(bytes: &[u8], at: u64) -> u64 {
    let rest = usize::try_from(at).ok().and_then(|at| bytes.get(at..));
    let blank = rest.unwrap_or_default().iter();
    blank
        .take_while(|b| matches!(b, b'\n' | b'\r'))
        .filter(|&&b| b == b'\n')
        .count() as u64
}

/// The rows of a chunk while they are read.
struct Rows<'a> {
    layout: &'a Layout,
    options: &'a ReadOptions,
    block: Block,
    lines: u64,
    ends: Option<(u64, i64, i64)>,
    /// The cells of the current row.
    time: i64,
    cells: Vec<f64>,
}

impl<'a> Rows<'a> {
    fn new(capacity: usize, layout: &'a Layout, options: &'a ReadOptions) -> Self {
        let width = options.schema.columns.len();
        Self {
            layout,
            options,
            block: Block::with_width(width, capacity),
            lines: 0,
            ends: None,
            time: 0,
            cells: vec![0.0; width],
        }
    }

    /// Reads one line that starts at `at`; returns where the next one starts.
    fn line(&mut self, bytes: &[u8], mut at: usize) -> std::result::Result<usize, Fault> {
        if let Some(next) = blank_line(bytes, at) {
            return Ok(next);
        }
        let mut index = 0;
        loop {
            let cell = self.layout.cells.get(index).copied().unwrap_or(Cell::Skip);
            at = self.cell(cell, bytes, at)?;
            index += 1;
            match bytes.get(at) {
                Some(b',') => at += 1,
                Some(b'\r') if bytes.get(at + 1) == Some(&b'\n') => {
                    at += 2;
                    break;
                }
                Some(_) => {
                    at += 1;
                    break;
                }
                None => break,
            }
        }
        self.finish_row(index)?;
        Ok(at)
    }

    /// Reads one cell; returns where it ends.
    #[inline]
    fn cell(&mut self, cell: Cell, bytes: &[u8], at: usize) -> std::result::Result<usize, Fault> {
        let rest = &bytes[at..];
        if cell != Cell::Skip
            && let Some((value, length)) = fast_decimal(rest, b',')
        {
            match cell {
                Cell::Column(i) => self.cells[i] = value,
                _ => self.time = to_seconds(value.floor() as i64),
            }
            return Ok(at + length);
        }
        let length = rest
            .iter()
            .position(|&b| ends_cell(b, b','))
            .unwrap_or(rest.len());
        self.odd_cell(cell, &rest[..length])?;
        Ok(at + length)
    }

    /// Reads a cell that is not plain digits.
    fn odd_cell(&mut self, cell: Cell, text: &[u8]) -> std::result::Result<(), Fault> {
        let word = |column| Fault::Word {
            column,
            value: shorten(&String::from_utf8_lossy(&text[..text.len().min(256)])),
        };
        match cell {
            Cell::Skip => {}
            Cell::Time => self.time = parse_seconds(text).ok_or_else(|| word(None))?,
            Cell::Column(i) => self.cells[i] = parse(text).ok_or_else(|| word(Some(i)))?,
        }
        Ok(())
    }

    /// Reads a record that the csv crate took apart.
    fn record(&mut self, record: &csv::ByteRecord) -> std::result::Result<(), Fault> {
        for (text, cell) in record.iter().zip(&self.layout.cells) {
            self.odd_cell(*cell, text)?;
        }
        self.finish_row(record.len())
    }

    /// Checks the row that was read and keeps it if it is asked for.
    #[inline]
    fn finish_row(&mut self, found: usize) -> std::result::Result<(), Fault> {
        if found < self.layout.needed || found > self.layout.cells.len() {
            return Err(Fault::Cells { found });
        }
        let time = self.time;
        match &mut self.ends {
            Some((_, _, last)) => {
                if time <= *last && self.options.order == OrderPolicy::Refuse {
                    return Err(Fault::Order {
                        previous: *last,
                        current: time,
                    });
                }
                *last = time;
            }
            None => self.ends = Some((self.lines, time, time)),
        }
        if !self.options.keeps(time) {
            return Ok(());
        }
        let mut valid = true;
        for (column, (&value, spec)) in self
            .cells
            .iter()
            .zip(&self.options.schema.columns)
            .enumerate()
        {
            if !value.is_finite() {
                valid = false;
            } else if !spec.scale.accepts(value) {
                return Err(Fault::Domain { column, value });
            }
        }
        self.block.timestamps.push(time);
        self.block.valid.push(valid);
        for (column, &value) in self.block.columns.iter_mut().zip(&self.cells) {
            column.push(value);
        }
        Ok(())
    }

    fn finish(self) -> Parsed {
        Parsed {
            block: self.block,
            lines: self.lines,
            ends: self.ends,
        }
    }
}

/// Where the next line starts, if this one is blank.
#[inline]
fn blank_line(bytes: &[u8], at: usize) -> Option<usize> {
    match bytes[at] {
        b'\n' => Some(at + 1),
        b'\r' if bytes.get(at + 1).is_none_or(|&b| b == b'\n') => Some((at + 2).min(bytes.len())),
        _ => None,
    }
}

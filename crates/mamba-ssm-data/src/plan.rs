//! A series with everything decided: gaps filled, windows shared out, transform fitted.

use std::ops::Range;

use crate::Result;
use crate::gaps::Filler;
use crate::schema::Schema;
use crate::series::RawSeries;
use crate::shards::RowGroup;
use crate::source::{Block, Stream};
use crate::spill::Scratch;
use crate::store::Store;
use crate::transform::{Normalised, Transform, finite_or_zero};
use crate::windows::{RowMap, SplitWindows, WindowOptions};

/// Everything that is decided about a series, and its rows.
pub(crate) struct Plan {
    pub(crate) store: Store,
    pub(crate) map: RowMap,
    pub(crate) splits: Vec<SplitWindows>,
    pub(crate) transform: Transform,
    pub(crate) fitted: Range<usize>,
}

impl Plan {
    /// Reads a stream to its end; rows that the memory of `scratch` does not hold wait in a file.
    pub(crate) fn of_stream(
        mut stream: Stream<'_>,
        windows: &WindowOptions,
        scratch: &Scratch,
        tell: &mut dyn FnMut(u64, u64) -> Result<()>,
    ) -> Result<Self> {
        let schema = stream.schema.clone();
        let mut intake = Intake::new(&schema, windows, scratch, &stream.origin);
        while let Some(block) = stream.next_block()? {
            intake.push(block)?;
            tell(stream.bytes_read(), stream.bytes)?;
        }
        intake.finish(&schema, windows, &stream.origin)
    }

    /// Takes a series in memory.
    pub(crate) fn of_series(series: RawSeries, windows: &WindowOptions) -> Result<Self> {
        windows.validate()?;
        let scratch = Scratch::unlimited();
        let mut intake = Intake::new(&series.schema, windows, &scratch, &series.origin);
        intake.push(Block {
            timestamps: series.timestamps,
            columns: series.columns,
            valid: series.valid,
        })?;
        intake.finish(&series.schema, windows, &series.origin)
    }

    /// One row group, standardised.
    pub(crate) fn row_group(&self, index: usize) -> Result<RowGroup> {
        let group = self.store.group(index)?;
        let columns = self
            .transform
            .features
            .iter()
            .zip(&group.columns)
            .map(|(stats, column)| {
                column
                    .iter()
                    .map(|&scaled| finite_or_zero(stats.standardise(scaled)))
                    .collect()
            });
        Ok(RowGroup {
            columns: columns.collect(),
            timestamps: group.timestamps.clone(),
            valid: group.valid.clone(),
        })
    }

    /// All rows, standardised, row after row.
    pub(crate) fn normalised(&self) -> Result<Normalised> {
        let width = self.transform.width();
        let mut out = Normalised {
            width,
            ..Normalised::default()
        };
        for index in 0..self.store.groups() {
            let group = self.row_group(index)?;
            let start = out.values.len();
            out.values
                .resize(start + group.timestamps.len() * width, 0.0);
            for (feature, column) in group.columns.iter().enumerate() {
                for (row, &z) in out.values[start..].chunks_exact_mut(width).zip(column) {
                    row[feature] = z;
                }
            }
            out.timestamps.extend(group.timestamps);
            out.valid.extend(group.valid);
        }
        Ok(out)
    }
}

/// Takes rows in: fills gaps, notes where windows may lie, stores.
struct Intake {
    filler: Option<Filler>,
    map: RowMap,
    store: Store,
    step: i64,
}

impl Intake {
    fn new(schema: &Schema, windows: &WindowOptions, scratch: &Scratch, origin: &str) -> Self {
        let scales = schema.columns.iter().map(|c| c.scale).collect();
        Self {
            filler: Filler::new(&windows.gaps, schema.step, origin),
            map: RowMap::new(origin),
            store: Store::new(scales, scratch),
            step: schema.step,
        }
    }

    fn push(&mut self, block: Block) -> Result<()> {
        match &mut self.filler {
            Some(filler) => {
                let filled = filler.push(&block)?;
                self.keep(&filled)
            }
            None => self.keep(&block),
        }
    }

    fn keep(&mut self, block: &Block) -> Result<()> {
        self.map
            .extend(self.step, &block.timestamps, &block.valid, |row| {
                block.is_usable(row)
            });
        self.store.push(block)
    }

    fn finish(mut self, schema: &Schema, windows: &WindowOptions, origin: &str) -> Result<Plan> {
        if let Some(filler) = &mut self.filler {
            let rest = filler.finish();
            self.keep(&rest)?;
        }
        self.store.finish()?;
        let (fitted, splits) = self.map.share_out(windows)?;
        let transform = Transform::from_moments(schema, &self.store.moments(fitted.end)?, origin)?;
        Ok(Plan {
            store: self.store,
            map: self.map,
            splits,
            transform,
            fitted,
        })
    }
}

/// Where windows may lie in a series whose gaps have been filled.
pub(crate) fn mapped(series: &RawSeries) -> RowMap {
    let usable =
        |row: usize| series.valid[row] || series.columns.iter().all(|c| c[row].is_finite());
    let mut map = RowMap::new(&series.origin);
    map.extend(
        series.schema.step,
        &series.timestamps,
        &series.valid,
        usable,
    );
    map
}

//! A whole series on the device: batches are gathered there, and nothing but window starts crosses the bus.

use burn::tensor::{Device, Int, Tensor, TensorData};

use crate::loader::{Loader, LoaderOptions};
use crate::windows::Split;
use crate::{Dataset, Error, Result};

/// All rows of a data set on one device: 4 bytes per value and 4 per row (87 MB for 4.35 million rows of
/// four features, 105 MB for five).
///
/// ```
/// # #[cfg(feature = "flex")] {
/// use burn::tensor::Device;
/// use mamba_ssm_data::synthetic::{MarketConfig, generate};
/// use mamba_ssm_data::{Dataset, LoaderOptions, RawSeries, Resident, Schema, Split, WindowOptions};
///
/// let candles = generate(&MarketConfig::new(500).with_gaps(false));
/// let column = |pick: fn(&mamba_ssm_data::synthetic::Candle) -> f64| candles.iter().map(pick).collect();
/// let series = RawSeries::from_columns(
///     Schema::ohlcv(),
///     (0..500).map(|i| i * 60).collect(),
///     vec![column(|c| c.open), column(|c| c.high), column(|c| c.low), column(|c| c.close), column(|c| c.volume)],
/// )?;
/// let windows = WindowOptions { length: 16, stride: 4, ..WindowOptions::default() };
/// let data = Dataset::in_memory(series, &windows)?;
///
/// let resident = Resident::new(&data, 1 << 30, &Device::default())?.expect("500 rows fit");
/// let batch = resident.batches(Split::Train, &LoaderOptions::new(8).shuffled(1))?.next().unwrap();
/// assert_eq!(batch.values.dims(), [8, 16, 5]);
/// assert_eq!(batch.mask.dims(), [8, 16]);
/// # }
/// # Ok::<(), mamba_ssm_data::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct Resident {
    data: Dataset,
    /// `[rows, features]`
    values: Tensor<2>,
    /// `[rows]`: 1 where the row is a true observation.
    mask: Tensor<1>,
    /// `[1, length]`: 0, 1, 2, ...
    offsets: Tensor<2, Int>,
}

/// A batch on the device.
#[derive(Debug, Clone)]
pub struct DeviceBatch {
    /// `[batch, length, features]`, z-scores, always finite.
    pub values: Tensor<3>,
    /// `[batch, length]`: 1 where the row is a true observation, 0 where it was missing or filled.
    pub mask: Tensor<2>,
    /// First row of each window.
    pub starts: Vec<u64>,
}

impl Resident {
    /// Bytes that the rows of a data set take on a device.
    pub fn bytes(data: &Dataset) -> usize {
        data.len().saturating_mul(4 * (data.width() + 1))
    }

    /// Copies all rows to a device, once; `None` when they take more than `most_bytes` there. Rows that
    /// [`Dataset::rows`] has not read before are not kept in memory.
    ///
    /// # Errors
    ///
    /// [`Error::Shard`] when the rows cannot be read; [`Error::InvalidOption`] when there are more of them than
    /// a device can count (2 147 483 647).
    pub fn new(data: &Dataset, most_bytes: usize, device: &Device) -> Result<Option<Self>> {
        if Self::bytes(data) > most_bytes {
            return Ok(None);
        }
        if i32::try_from(data.len()).is_err() {
            return Err(Error::InvalidOption {
                option: "data",
                reason: format!("{} rows are more than a device can count", data.len()),
            });
        }
        let rows = data.rows_to_take()?;
        let mask: Vec<f32> = rows.valid.iter().map(|&v| f32::from(u8::from(v))).collect();
        let length = data.window_options().length;
        Ok(Some(Self {
            data: data.clone(),
            values: Tensor::from_data(
                TensorData::new(rows.values, [data.len(), data.width()]),
                device,
            ),
            mask: Tensor::from_data(TensorData::new(mask, [data.len()]), device),
            offsets: Tensor::<1, Int>::arange(0..length as i64, device).unsqueeze(),
        }))
    }

    /// The windows that begin at these rows.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidOption`] when there is none, or one of them reaches past the last row.
    pub fn gather(&self, starts: Vec<u64>) -> Result<DeviceBatch> {
        let length = self.data.window_options().length;
        let rows = self.data.len() as u64;
        let beyond = |start: &u64| {
            start
                .checked_add(length as u64)
                .is_none_or(|end| end > rows)
        };
        if let Some(start) = starts.iter().find(|s| beyond(s)) {
            return Err(Error::InvalidOption {
                option: "starts",
                reason: format!("a window of {length} rows at row {start} ends behind row {rows}"),
            });
        }
        if starts.is_empty() {
            return Err(Error::InvalidOption {
                option: "starts",
                reason: "there are none; expected at least one window".into(),
            });
        }
        Ok(self.gather_checked(starts))
    }

    fn gather_checked(&self, starts: Vec<u64>) -> DeviceBatch {
        let [_, length] = self.offsets.dims();
        let (batch, width) = (starts.len(), self.data.width());
        let first: Vec<i64> = starts.iter().map(|&s| s as i64).collect();
        let first = TensorData::new(first, [batch, 1]);
        let first = Tensor::<2, Int>::from_data(first, &self.offsets.device());
        let rows = (first + self.offsets.clone()).reshape([batch * length]);
        DeviceBatch {
            values: self
                .values
                .clone()
                .select(0, rows.clone())
                .reshape([batch, length, width]),
            mask: self.mask.clone().select(0, rows).reshape([batch, length]),
            starts,
        }
    }

    /// The batches that [`Dataset::loader`] gives for the same options, gathered on the device.
    ///
    /// That holds for their order, too: a series that is larger than the options' `memory_bytes` is not shuffled
    /// as a whole here either, unless that number is raised.
    ///
    /// # Errors
    ///
    /// Those of [`Dataset::loader`].
    pub fn batches(&self, split: Split, options: &LoaderOptions) -> Result<DeviceLoader> {
        // Nothing is gathered in memory, so there is nothing for workers to do.
        let options = options.clone().with_workers(0, 0);
        Ok(DeviceLoader {
            resident: self.clone(),
            plan: self.data.loader(split, &options)?,
        })
    }
}

/// An iterator over the batches of a split, on the device. Resumes as [`Loader`] does.
#[derive(Debug)]
pub struct DeviceLoader {
    resident: Resident,
    plan: Loader,
}

impl DeviceLoader {
    /// Batches of the whole epoch (of this rank), whether or not they have been taken.
    pub fn batches(&self) -> usize {
        self.plan.batches()
    }

    /// Batches taken or skipped so far: the `skip` to resume with.
    pub fn position(&self) -> usize {
        self.plan.position()
    }
}

impl Iterator for DeviceLoader {
    type Item = DeviceBatch;

    fn next(&mut self) -> Option<DeviceBatch> {
        let starts = self.plan.next_starts()?;
        Some(self.resident.gather_checked(starts))
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        self.plan.size_hint()
    }
}

impl ExactSizeIterator for DeviceLoader {}

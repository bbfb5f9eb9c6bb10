//! From the data crate's windows to the trainer's batches.

use burn::tensor::{Device, Tensor, TensorData};
use mamba_ssm_data::{Batch, Dataset, LoaderOptions, Normalised, Split};
use mamba_ssm_train::{BatchIter, BatchSource, BoxError, TrainBatch};

use crate::Result;
use crate::encoding::Encoder;

/// The training and validation windows of a data set, encoded for a network.
pub struct Windows<'a> {
    data: &'a Dataset,
    encoder: &'a Encoder,
    options: LoaderOptions,
    windows_per_epoch: usize,
    device: Device,
    train_len: usize,
}

impl<'a> Windows<'a> {
    /// Micro-batches of `batch` windows, shuffled by `seed`; `windows_per_epoch` 0 takes all of them.
    ///
    /// # Errors
    ///
    /// When the batch is empty, or the data set has no training or no validation window.
    pub fn new(
        data: &'a Dataset,
        encoder: &'a Encoder,
        (batch, windows_per_epoch): (usize, usize),
        seed: u64,
        device: &Device,
    ) -> Result<Self> {
        let options = LoaderOptions::new(batch).shuffled(seed);
        let mut source = Self {
            data,
            encoder,
            options,
            windows_per_epoch,
            device: device.clone(),
            train_len: 0,
        };
        source.train_len = data
            .loader(Split::Train, &source.train_options(0, 0))?
            .batches();
        data.loader(Split::Validation, &LoaderOptions::new(batch))?;
        Ok(source)
    }

    fn train_options(&self, epoch: usize, skip: usize) -> LoaderOptions {
        let options = self.options.clone().with_epoch(epoch as u64).skipping(skip);
        match self.windows_per_epoch {
            0 => options,
            windows => options.limited(windows.div_ceil(self.options.batch)),
        }
    }

    fn batches(&self, split: Split, options: &LoaderOptions) -> Result<BatchIter<'_>, BoxError> {
        let rows = self.data.rows()?;
        let loader = self.data.loader(split, options)?;
        Ok(Box::new(loader.map(move |batch| {
            Ok(train_batch(&batch?, &rows, self.encoder, &self.device))
        })))
    }
}

impl BatchSource for Windows<'_> {
    fn train_len(&self) -> usize {
        self.train_len
    }

    fn train_epoch(&mut self, epoch: usize, start: usize) -> Result<BatchIter<'_>, BoxError> {
        self.batches(Split::Train, &self.train_options(epoch, start))
    }

    fn validation(&mut self) -> Result<BatchIter<'_>, BoxError> {
        // In a fixed random order: the trainer takes the first so many, which shall cover the split.
        self.batches(Split::Validation, &self.options.clone())
    }
}

/// What the network sees of a batch, `[batch, length, inputs]`.
pub fn inputs(batch: &Batch, rows: &Normalised, encoder: &Encoder, device: &Device) -> Tensor<3> {
    let mut inputs = Vec::with_capacity(batch.batch * batch.length * encoder.inputs());
    for (window, start) in windows(batch).zip(&batch.starts) {
        let start = *start as usize;
        let times = &rows.timestamps[start..start + batch.length];
        inputs.extend(encoder.encode(None, window, times));
    }
    let shape = [batch.batch, batch.length, encoder.inputs()];
    Tensor::from_data(TensorData::new(inputs, shape), device)
}

/// Position `t` is asked for row `t + 1`; the last position has nothing to answer and is masked.
fn train_batch(batch: &Batch, rows: &Normalised, encoder: &Encoder, device: &Device) -> TrainBatch {
    let shape = [batch.batch, batch.length, batch.features];
    let mut targets = Vec::with_capacity(shape.iter().product());
    let mut mask = Vec::with_capacity(batch.batch * batch.length);
    for (window, valid) in windows(batch).zip(batch.mask.chunks_exact(batch.length)) {
        targets.extend(encoder.targets(window));
        targets.extend(std::iter::repeat_n(0.0, batch.features));
        // A change needs both of its ends.
        mask.extend(valid.windows(2).map(|pair| pair[0] * pair[1]));
        mask.push(0.0);
    }
    TrainBatch {
        input: inputs(batch, rows, encoder, device),
        target: Tensor::from_data(TensorData::new(targets, shape), device),
        mask: Tensor::from_data(TensorData::new(mask, [batch.batch, batch.length]), device),
    }
}

fn windows(batch: &Batch) -> impl Iterator<Item = &[f32]> {
    batch.values.chunks_exact(batch.length * batch.features)
}

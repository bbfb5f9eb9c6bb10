//! Rotary positions: a query or key at position `t` is turned by angles proportional to `t`, so
//! that their product depends on the distance alone.
//!
//! Source: Su et al., *RoFormer: Enhanced Transformer with Rotary Position Embedding*, 2021, eq. 34;
//! layouts as in `flash_attn.layers.rotary.RotaryEmbedding`.

mod reference;

use std::sync::{Arc, Mutex};

use burn::config::Config;
use burn::tensor::{DType, Device, Tensor, TensorData};

use crate::AttentionError;
use crate::error::{at_least_one, positive};

/// Which features form a pair that is turned together.
#[derive(Config, Debug, Copy, PartialEq, Eq)]
pub enum RotaryStyle {
    /// Feature `i` with feature `i + dim / 2` (NeoX, Llama).
    HalfSplit,
    /// Feature `2 i` with feature `2 i + 1` (GPT-J, the paper).
    Interleaved,
}

/// Configuration of [`Rotary`].
#[derive(Config, Debug)]
pub struct RotaryConfig {
    /// Features turned per head, even. The rest of a wider head passes unchanged.
    pub dim: usize,
    /// Base of the angles: pair `i` turns by `base^(-2 i / dim)` per position.
    #[config(default = 10000.0)]
    pub base: f64,
    /// Which features form a pair.
    #[config(default = "RotaryStyle::HalfSplit")]
    pub style: RotaryStyle,
}

impl RotaryConfig {
    /// Creates the rotation.
    ///
    /// # Errors
    ///
    /// A zero or odd `dim`; a `base` that is not positive and finite.
    pub fn try_init(&self) -> Result<Rotary, AttentionError> {
        at_least_one("rotary dim", self.dim)?;
        positive("rotary base", self.base)?;
        if !self.dim.is_multiple_of(2) {
            return Err(AttentionError::RotaryDim {
                dim: self.dim,
                head_dim: self.dim,
            });
        }
        Ok(Rotary {
            dim: self.dim,
            base: self.base,
            style: self.style,
            cache: Arc::default(),
        })
    }

    /// Creates the rotation.
    ///
    /// # Panics
    ///
    /// With the words of [`try_init`](Self::try_init)'s error.
    pub fn init(&self) -> Rotary {
        self.try_init().unwrap_or_else(|error| panic!("{error}"))
    }
}

/// Rotary positions for heads of one width.
///
/// ```
/// use burn::tensor::{Device, Distribution, Tensor};
/// use mamba_ssm_attention::RotaryConfig;
///
/// let device = Device::default();
/// let rotary = RotaryConfig::new(8).init();
/// let q = Tensor::<4>::random([2, 4, 16, 8], Distribution::Default, &device); // [batch, heads, length, head_dim]
/// let turned = rotary.apply(q, 0);
/// assert_eq!(turned.dims(), [2, 4, 16, 8]);
/// ```
#[derive(Clone, Debug)]
pub struct Rotary {
    dim: usize,
    base: f64,
    style: RotaryStyle,
    // The last table, kept because every layer and every step of a training run asks for the same.
    cache: Arc<Mutex<Option<(TableKey, RotaryTable)>>>,
}

#[derive(Clone, Debug, PartialEq)]
struct TableKey {
    device: Device,
    dtype: DType,
    start: usize,
    length: usize,
}

/// Cosines and sines of a run of positions, `[length, dim / 2]` each.
#[derive(Clone, Debug)]
pub struct RotaryTable {
    pub(crate) cos: Tensor<2>,
    pub(crate) sin: Tensor<2>,
    pub(crate) style: RotaryStyle,
}

impl Rotary {
    /// Features turned per head.
    pub fn dim(&self) -> usize {
        self.dim
    }

    /// The table for positions `start .. start + length`, computed in f64 and rounded to `dtype`
    /// (bf16 and f16 tensors get an f32 table). The last table is kept and handed out again.
    pub fn table(&self, start: usize, length: usize, dtype: DType, device: &Device) -> RotaryTable {
        let key = TableKey {
            device: device.clone().inner(),
            dtype: if dtype == DType::F64 {
                DType::F64
            } else {
                DType::F32
            },
            start,
            length,
        };
        let mut cache = match self.cache.lock() {
            Ok(cache) => cache,
            // A panic elsewhere cannot leave a half-written table: it is replaced in one move.
            Err(poisoned) => poisoned.into_inner(),
        };
        if let Some((cached, table)) = cache.as_ref()
            && *cached == key
        {
            return table.clone();
        }
        let table = self.compute(&key);
        *cache = Some((key, table.clone()));
        table
    }

    fn compute(&self, key: &TableKey) -> RotaryTable {
        let half = self.dim / 2;
        let angle = |t: usize, i: usize| {
            (key.start + t) as f64 * self.base.powf(-2.0 * i as f64 / self.dim as f64)
        };
        let tensor = |f: fn(f64) -> f64| {
            let values: Vec<f64> = (0..key.length * half)
                .map(|n| f(angle(n / half, n % half)))
                .collect();
            let data = TensorData::new(values, [key.length, half]).convert_dtype(key.dtype);
            Tensor::<2>::from_data(data, (&key.device, key.dtype))
        };
        RotaryTable {
            cos: tensor(f64::cos),
            sin: tensor(f64::sin),
            style: self.style,
        }
    }

    /// Turns `x`, `[batch, heads, length, head_dim]`, whose first token is at position `start`.
    ///
    /// # Panics
    ///
    /// When `head_dim` is below [`dim`](Self::dim).
    pub fn apply(&self, x: Tensor<4>, start: usize) -> Tensor<4> {
        let length = x.dims()[2];
        let table = self.table(start, length, x.dtype(), &x.device());
        table.apply(x)
    }
}

impl RotaryTable {
    /// Turns `x`, `[batch, heads, length, head_dim]`, by this table's positions.
    ///
    /// # Panics
    ///
    /// When the length differs from the table's or `head_dim` is below the table's width.
    pub fn apply(&self, x: Tensor<4>) -> Tensor<4> {
        let [_, _, length, head_dim] = x.dims();
        let [positions, half] = self.cos.dims();
        assert!(
            length == positions && head_dim >= 2 * half,
            "rotary positions: x is {:?} ([batch, heads, length, head_dim]), \
             the table has {positions} positions of {} features",
            x.dims(),
            2 * half,
        );
        reference::rotate(x, self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::tensor::{Distribution, Tolerance};

    fn values(tensor: Tensor<4>) -> Vec<f64> {
        tensor.into_data().convert::<f64>().try_to_vec().unwrap()
    }

    #[test]
    fn both_styles_agree_with_the_angles_written_out() {
        let device = Device::default();
        let x = Tensor::<4>::from_data([[[[1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 3.0, 4.0]]]], &device);
        // Positions 3 and 4; pair 0 turns by 1 per position, pair 1 by 100^(-1/2) = 0.1.
        let config = RotaryConfig::new(4).with_base(100.0);
        let turn = |a: f64, b: f64, w: f64| (a * w.cos() - b * w.sin(), a * w.sin() + b * w.cos());

        let half = values(config.init().apply(x.clone(), 3));
        let inter = values(
            config
                .with_style(RotaryStyle::Interleaved)
                .init()
                .apply(x, 3),
        );
        for (row, t) in [3.0, 4.0].into_iter().enumerate() {
            let (a, c) = turn(1.0, 3.0, t);
            let (b, d) = turn(2.0, 4.0, t * 0.1);
            for (got, want) in half[row * 4..].iter().zip([a, b, c, d]) {
                assert!((got - want).abs() < 1e-6, "half split: {got} {want}");
            }
            let (a, b) = turn(1.0, 2.0, t);
            let (c, d) = turn(3.0, 4.0, t * 0.1);
            for (got, want) in inter[row * 4..].iter().zip([a, b, c, d]) {
                assert!((got - want).abs() < 1e-6, "interleaved: {got} {want}");
            }
        }
    }

    #[test]
    fn products_depend_on_the_distance_alone_and_the_tail_passes() {
        let device = Device::default();
        let rotary = RotaryConfig::new(6).init();
        let q = Tensor::<4>::random([1, 1, 1, 8], Distribution::Default, &device);
        let k = Tensor::<4>::random([1, 1, 1, 8], Distribution::Default, &device);
        let product = |tq, tk| {
            let turned = rotary.apply(q.clone(), tq) * rotary.apply(k.clone(), tk);
            turned.sum().into_scalar::<f32>()
        };
        assert!((product(7, 3) - product(104, 100)).abs() < 1e-4);
        assert!((product(7, 3) - product(7, 4)).abs() > 1e-4);
        let tail = rotary.apply(q.clone(), 5).slice([0..1, 0..1, 0..1, 6..8]);
        tail.into_data()
            .assert_eq(&q.slice([0..1, 0..1, 0..1, 6..8]).into_data(), true);
    }

    #[test]
    fn the_table_is_kept_and_a_new_length_replaces_it() {
        let device = Device::default();
        let rotary = RotaryConfig::new(4).init();
        let long = rotary.table(0, 5, DType::F32, &device);
        let again = rotary.table(0, 5, DType::F32, &device);
        again.cos.into_data().assert_eq(&long.cos.into_data(), true);
        let later = rotary.table(3, 2, DType::F32, &device);
        assert_eq!(later.sin.dims(), [2, 2]);
        later.sin.into_data().assert_approx_eq::<f32>(
            &long.sin.slice([3..5, 0..2]).into_data(),
            Tolerance::absolute(1e-7),
        );
    }

    #[test]
    fn odd_or_empty_heads_and_bad_bases_are_refused() {
        let refused = |config: RotaryConfig| config.try_init().unwrap_err().to_string();
        assert!(refused(RotaryConfig::new(3)).contains("even"));
        assert!(refused(RotaryConfig::new(0)).contains("rotary dim is 0"));
        for base in [0.0, -1.0, f64::NAN, f64::INFINITY] {
            assert!(refused(RotaryConfig::new(4).with_base(base)).contains("rotary base"));
        }
    }

    #[test]
    #[should_panic(expected = "the table has 2 positions")]
    fn a_wrong_length_is_refused_with_the_shapes() {
        let device = Device::default();
        let table = RotaryConfig::new(4).init().table(0, 2, DType::F32, &device);
        table.apply(Tensor::zeros([1, 1, 3, 4], &device));
    }
}

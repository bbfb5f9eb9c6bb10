//! Which probabilities dropout keeps: a hash of the seed and the position.
//!
//! A row key (seed, batch, head, query) and a column key (seed, key position), 30 bits each and well
//! mixed on the host, are joined by exclusive or and sent through a Feistel network of 15-bit halves.
//! No product in it exceeds 31 bits, so the same few integer operations give the same mask in 32-bit
//! kernels, in vectorised Rust and in tensor operations of any integer width.

use std::ops::Range;

use burn::backend::tensor::{BoolTensor, Device};
use burn::backend::{Backend, Scalar, get_or_init_device_settings};
use burn::tensor::{Shape, TensorData};

use super::AttentionDropout;

pub(crate) const HALF_BITS: u32 = 15;
pub(crate) const HALF_MASK: u32 = (1 << HALF_BITS) - 1;
pub(crate) const KEY_MASK: u32 = (1 << (2 * HALF_BITS)) - 1;
/// Odd 16-bit multipliers of the rounds; the middle bits of the product are the round's output.
pub(crate) const ROUNDS: [u32; 4] = [0xb5a9, 0xd1f3, 0x9e37, 0xc2b3];
pub(crate) const SHIFT: u32 = 9;

/// A position is kept when its hash is below this.
pub(crate) fn threshold(dropout: &AttentionDropout) -> u32 {
    ((1.0 - dropout.prob) * f64::from(KEY_MASK + 1)).round() as u32
}

/// SplitMix64's finaliser (Steele et al., 2014).
fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// MurmurHash3's 32-bit finaliser: the same in a kernel as here.
#[inline(always)]
fn mix32(mut x: u32) -> u32 {
    x = (x ^ (x >> 16)).wrapping_mul(0x85eb_ca6b);
    x = (x ^ (x >> 13)).wrapping_mul(0xc2b2_ae35);
    x ^ (x >> 16)
}

/// Four unrelated words from a seed: two for rows, two for columns.
pub(crate) fn seed_words(seed: u64) -> [u32; 4] {
    let (a, b) = (
        mix(seed ^ 0x9e37_79b9_7f4a_7c15),
        mix(seed ^ 0x3c6e_f372_fe94_f82b),
    );
    [a as u32, (a >> 32) as u32, b as u32, (b >> 32) as u32]
}

/// Key of one query; `plane` is `batch index * heads + head`.
#[inline(always)]
pub(crate) fn row_key(words: [u32; 4], plane: usize, i: usize) -> u32 {
    mix32(mix32(i as u32 ^ words[0]) ^ mix32(plane as u32 ^ words[1])) & KEY_MASK
}

/// Key of one key position.
#[inline(always)]
pub(crate) fn column_key(words: [u32; 4], j: usize) -> u32 {
    mix32(mix32(j as u32 ^ words[2]) ^ words[3]) & KEY_MASK
}

/// The hash of a position, below `2^30`.
#[cfg(any(test, feature = "flex"))]
#[inline(always)]
pub(crate) fn hash(row: u32, column: u32) -> u32 {
    let x = row ^ column;
    let (mut left, mut right) = (x >> HALF_BITS, x & HALF_MASK);
    for k in ROUNDS {
        (left, right) = (right, left ^ (((right * k) >> SHIFT) & HALF_MASK));
    }
    (left << HALF_BITS) | right
}

/// `true` where a probability is dropped: `[batch, heads, rows, columns]` for the given ranges.
pub(crate) fn dropped<B: Backend>(
    dropout: &AttentionDropout,
    [batch, heads]: [usize; 2],
    rows: Range<usize>,
    columns: Range<usize>,
    device: &Device<B>,
) -> BoolTensor<B> {
    let settings = get_or_init_device_settings::<B>(device);
    let shape = [batch, heads, rows.len(), columns.len()];
    let spread = |keys: Vec<i32>, own: [usize; 4]| {
        let data = TensorData::new(keys, own).convert_dtype(settings.int_dtype.into());
        B::int_expand(B::int_from_data(data, device), Shape::new(shape))
    };
    let words = seed_words(dropout.seed);
    let row_keys = (0..batch * heads)
        .flat_map(|plane| rows.clone().map(move |i| row_key(words, plane, i) as i32))
        .collect();
    let column_keys = columns
        .clone()
        .map(|j| column_key(words, j) as i32)
        .collect();
    let x = B::bitwise_xor(
        spread(row_keys, [batch, heads, rows.len(), 1]),
        spread(column_keys, [1, 1, 1, columns.len()]),
    );
    let number = |n: u32| Scalar::from(n as i32);
    let mut left = B::bitwise_right_shift_scalar(x.clone(), number(HALF_BITS));
    let mut right = B::bitwise_and_scalar(x, number(HALF_MASK));
    for k in ROUNDS {
        let product = B::int_mul_scalar(right.clone(), number(k));
        let round = B::bitwise_right_shift_scalar(product, number(SHIFT));
        let round = B::bitwise_and_scalar(round, number(HALF_MASK));
        (left, right) = (right, B::bitwise_xor(left, round));
    }
    let high = B::bitwise_left_shift_scalar(left, number(HALF_BITS));
    let hash = B::bitwise_or(high, right);
    B::int_greater_equal_elem(hash, number(threshold(dropout)), settings.bool_dtype)
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::backend::Dispatch;
    use burn::tensor::{Bool, Tensor};

    #[test]
    fn tensor_operations_and_rust_agree_on_every_position() {
        let device = burn::tensor::Device::default();
        let dropout = AttentionDropout { prob: 0.3, seed: 7 };
        let mask = dropped::<Dispatch>(&dropout, [2, 3], 5..12, 2..40, device.as_dispatch());
        let mask = Tensor::<4, Bool>::from_dispatch(mask)
            .into_data()
            .convert::<bool>()
            .try_to_vec::<bool>()
            .unwrap();
        let words = seed_words(7);
        let mut n = 0;
        for plane in 0..6 {
            for i in 5..12 {
                for j in 2..40 {
                    let h = hash(row_key(words, plane, i), column_key(words, j));
                    assert_eq!(mask[n], h >= threshold(&dropout), "{plane} {i} {j}");
                    n += 1;
                }
            }
        }
    }

    #[test]
    fn the_share_kept_is_right_and_positions_are_unrelated() {
        let dropout = AttentionDropout {
            prob: 0.25,
            seed: 1,
        };
        let words = seed_words(1);
        let n = 400;
        let kept: Vec<Vec<bool>> = (0..n)
            .map(|i| {
                (0..n)
                    .map(|j| hash(row_key(words, 0, i), column_key(words, j)) < threshold(&dropout))
                    .collect()
            })
            .collect();
        let share = |f: &dyn Fn(usize, usize) -> bool| {
            let count = (0..n - 1)
                .flat_map(|i| (0..n - 1).map(move |j| (i, j)))
                .filter(|&(i, j)| f(i, j))
                .count();
            count as f64 / ((n - 1) * (n - 1)) as f64
        };
        let close = |got: f64, want: f64| assert!((got - want).abs() < 0.005, "{got} {want}");
        close(share(&|i, j| kept[i][j]), 0.75);
        close(share(&|i, j| kept[i][j] && kept[i + 1][j]), 0.75 * 0.75);
        close(share(&|i, j| kept[i][j] && kept[i][j + 1]), 0.75 * 0.75);
        // Four corners: what a plain exclusive or of row and column would give away.
        close(
            share(&|i, j| kept[i][j] && kept[i + 1][j] && kept[i][j + 1] && kept[i + 1][j + 1]),
            0.75f64.powi(4),
        );
    }
}

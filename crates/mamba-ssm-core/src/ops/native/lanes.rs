//! Functions of [`LANES`] numbers at a time, written so that the compiler vectorises them inside
//! [`vectorized`](super::vectorized).

use super::LANES;

/// As many numbers as a scratch row's unit.
pub(crate) type Lanes = [f32; LANES];

/// `f` of every lane.
#[inline(always)]
pub(crate) fn map(x: Lanes, f: impl Fn(f32) -> f32) -> Lanes {
    let mut out = [0.0; LANES];
    for (out, x) in out.iter_mut().zip(x) {
        *out = f(x);
    }
    out
}

/// `a b`, lane by lane. Whole lanes in and out: where a loop writes several slices lane by lane, they may
/// overlap for all the compiler knows, and it keeps to single numbers.
#[inline(always)]
pub(crate) fn product(a: Lanes, b: Lanes) -> Lanes {
    let mut out = a;
    for (out, b) in out.iter_mut().zip(b) {
        *out *= b;
    }
    out
}

/// `a + b`, lane by lane; see [`product`].
#[inline(always)]
pub(crate) fn sum(a: Lanes, b: Lanes) -> Lanes {
    let mut out = a;
    for (out, b) in out.iter_mut().zip(b) {
        *out += b;
    }
    out
}

/// `e^x` to about one unit in the last place; zero below -87, never above `e^88`.
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    // Adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits.
    const ROUND: f32 = 12_582_912.0;
    let clamped = x.clamp(-87.0, 88.0);
    let shifted = clamped * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    // ln 2 in two parts: n times the first is exact.
    let r = clamped - n * 0.693_359_4 + n * 2.121_944_4e-4;
    let p = 1.987_569_1e-4;
    let p = p * r + 1.398_2e-3;
    let p = p * r + 8.333_452e-3;
    let p = p * r + 4.166_579_6e-2;
    let p = p * r + 1.666_666_5e-1;
    let p = p * r + 0.5;
    let y = p * r * r + r + 1.0;
    let scale = f32::from_bits(
        (shifted
            .to_bits()
            .wrapping_sub(ROUND.to_bits())
            .wrapping_add(127))
            << 23,
    );
    if x < -87.0 { 0.0 } else { y * scale }
}

/// `1 / (1 + e^-x)`.
#[inline(always)]
pub(crate) fn sigmoid(x: f32) -> f32 {
    let s = 1.0 / (1.0 + exp(-x));
    // Zero, not e^-88: it may meet a huge factor.
    if x < -88.0 { 0.0 } else { s }
}

/// `x sigmoid(x)`.
#[inline(always)]
pub(crate) fn silu(x: f32) -> f32 {
    x * sigmoid(x)
}

/// The derivative of [`silu`].
#[inline(always)]
pub(crate) fn silu_slope(x: f32) -> f32 {
    let s = sigmoid(x);
    s * (1.0 + x * (1.0 - s))
}

/// `log(1 + e^x)` to a few units in the last place, in the tails too.
#[inline(always)]
pub(crate) fn softplus(x: f32) -> f32 {
    // log(1 + u) = 2 artanh(u / (2 + u)), an odd series; its argument is at most 1/3.
    let u = exp(-x.abs());
    let s = u / (2.0 + u);
    let q = s * s;
    let mut sum = 1.0 / 17.0;
    for n in [15.0, 13.0, 11.0, 9.0, 7.0, 5.0, 3.0, 1.0_f32] {
        sum = sum * q + 1.0 / n;
    }
    x.max(0.0) + 2.0 * s * sum
}

/// The sum of products of two slices of one length, in [`LANES`] partial sums.
#[inline(always)]
pub(crate) fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut sums = [0.0; LANES];
    let (a, a_rest) = a.as_chunks::<LANES>();
    let (b, b_rest) = b.as_chunks::<LANES>();
    for (a, b) in a.iter().zip(b) {
        for l in 0..LANES {
            sums[l] += a[l] * b[l];
        }
    }
    let mut sum = total(sums);
    for (a, b) in a_rest.iter().zip(b_rest) {
        sum += a * b;
    }
    sum
}

/// The sum of all lanes.
#[inline(always)]
pub(crate) fn total(sums: Lanes) -> f32 {
    let mut sums = sums;
    let mut half = LANES / 2;
    while half > 0 {
        for l in 0..half {
            sums[l] += sums[l + half];
        }
        half /= 2;
    }
    sums[0]
}

/// `to = from * factor`.
#[inline(always)]
pub(crate) fn scale_into(to: &mut [f32], from: &[f32], factor: f32) {
    for (to, from) in to.iter_mut().zip(from) {
        *to = from * factor;
    }
}

/// `to *= factor`.
#[inline(always)]
pub(crate) fn scale(to: &mut [f32], factor: f32) {
    for to in to {
        *to *= factor;
    }
}

/// `to += from * factor`.
#[inline(always)]
pub(crate) fn add_scaled(to: &mut [f32], from: &[f32], factor: f32) {
    for (to, from) in to.iter_mut().zip(from) {
        *to += from * factor;
    }
}

/// `to[c, r] = from[r, c]` for `[rows, columns]`; rows `from_stride` and `to_stride` apart.
#[inline(always)]
pub(crate) fn transpose(
    (from, from_stride): (&[f32], usize),
    (to, to_stride): (&mut [f32], usize),
    [rows, columns]: [usize; 2],
) {
    // Blocks of rows, so that the lines written stay in cache.
    for r0 in (0..rows).step_by(LANES) {
        let block = LANES.min(rows - r0);
        for c in 0..columns {
            let to = &mut to[c * to_stride + r0..][..block];
            for (r, to) in to.iter_mut().enumerate() {
                *to = from[(r0 + r) * from_stride + c];
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_within_two_units_in_the_last_place() {
        for n in -86_000..88_000 {
            let x = n as f32 * 1e-3;
            let want = f64::from(x).exp();
            let error = (f64::from(exp(x)) - want).abs() / want;
            assert!(error < 2.4e-7, "e^{x}: {error:e}");
        }
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp(-1e30), 0.0);
        assert_eq!(exp(0.0), 1.0);
        assert!(exp(1e30).is_finite());
        assert!(exp(f32::NAN).is_nan());
    }

    #[test]
    fn softplus_is_exact_in_the_tails() {
        for n in -8_000..8_000 {
            let x = n as f32 * 1e-2;
            let want = f64::from(x).exp().ln_1p();
            let error = (f64::from(softplus(x)) - want).abs() / want;
            assert!(error < 4e-7, "softplus({x}): {error:e}");
        }
        assert_eq!(softplus(1e30), 1e30);
        assert_eq!(softplus(-1e30), 0.0);
    }

    #[test]
    fn gates_keep_their_limits() {
        assert_eq!(silu(-1e30), 0.0);
        assert_eq!(silu(1e30), 1e30);
        assert_eq!(silu_slope(-1e3), 0.0);
        assert_eq!(silu_slope(1e3), 1.0);
        assert!((silu(1.0) - 0.731_058_6).abs() < 1e-6);
    }
}

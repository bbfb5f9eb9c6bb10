//! Functions whose general form costs more than what is wanted of them here.

use cubecl::prelude::*;

/// `log(1 + t) / t` for `t` from 0 to 1, lowest power first: interpolated at Chebyshev's nodes, then rounded to f32;
/// relative error at most 1.5e-7 as evaluated in f32.
const LOG1P: [f32; 9] = [
    1.0,
    -0.499_995_02,
    0.333_192_7,
    -0.248_443_7,
    0.191_114_3,
    -0.136_747_7,
    0.078_361_67,
    -0.029_588_507,
    0.005_253_458,
];

/// `log(1 + e^x)`: the logarithm of a number between one and two, without what a general one does for others.
#[cube]
pub(crate) fn softplus<W: Size>(x: Vector<f32, W>) -> Vector<f32, W> {
    let t = (-x.abs()).exp();
    let mut sum = Vector::<f32, W>::new(comptime!(LOG1P[8]).runtime());
    #[unroll]
    for n in 0..8usize {
        sum = fma(sum, t, Vector::new(comptime!(LOG1P[7 - n]).runtime()));
    }
    fma(sum, t, max(x, Vector::new(0.0f32)))
}

/// Bits of a number less those of another are near the bits of its reciprocal: within 5 % with this one.
const RECIPROCAL: u32 = 0x7ef3_11c7;

/// The largest exponent: past it the result is zero to f32, and the reciprocal's first guess no longer near.
const LARGEST: f32 = 80.0;

/// `1 / (1 + e^-x)`: three of Newton's steps in place of a division, which would branch for numbers that do not
/// occur here.
#[cube]
pub(crate) fn sigmoid<W: Size>(x: Vector<f32, W>) -> Vector<f32, W> {
    let one = Vector::<f32, W>::new(1.0f32);
    let below = one + min(-x, Vector::new(LARGEST)).exp();
    let bits = Vector::<u32, W>::new(RECIPROCAL) - Vector::<u32, W>::reinterpret(below);
    let mut value = Vector::<f32, W>::reinterpret(bits);
    #[unroll]
    for _ in 0..3usize {
        value = fma(fma(-below, value, one), value, value);
    }
    value
}

/// The derivative of SiLU, `x / (1 + e^-x)`.
#[cube]
pub(crate) fn silu_slope<W: Size>(x: Vector<f32, W>) -> Vector<f32, W> {
    let one = Vector::<f32, W>::new(1.0f32);
    let sigmoid = sigmoid::<W>(x);
    sigmoid * (one + x * (one - sigmoid))
}

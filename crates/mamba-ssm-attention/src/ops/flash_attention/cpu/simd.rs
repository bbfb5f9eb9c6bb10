//! The arithmetic of the tiles: numbers, instruction sets and the small matrix product.
//!
//! Everything here is generic and inlined into functions compiled once per instruction set (see
//! [`dispatch!`]), where the compiler turns the fixed-size inner loops into vector instructions.

use bytemuck::Pod;

/// A number of the tiles.
pub(super) trait Real:
    Pod
    + Send
    + Sync
    + PartialOrd
    + std::ops::Add<Output = Self>
    + std::ops::Sub<Output = Self>
    + std::ops::Mul<Output = Self>
    + std::ops::Div<Output = Self>
    + std::ops::AddAssign
    + std::ops::MulAssign
{
    const ZERO: Self;
    const ONE: Self;
    const NEG_INFINITY: Self;
    const INFINITY: Self;
    fn from_f64(x: f64) -> Self;
    fn fma(self, a: Self, b: Self) -> Self;
    /// `2^self`; zero for minus infinity.
    fn exp2(self) -> Self;
    fn log2(self) -> Self;
}

impl Real for f32 {
    const ZERO: Self = 0.0;
    const ONE: Self = 1.0;
    const NEG_INFINITY: Self = f32::NEG_INFINITY;
    const INFINITY: Self = f32::INFINITY;

    #[inline(always)]
    fn from_f64(x: f64) -> Self {
        x as f32
    }

    #[inline(always)]
    fn fma(self, a: Self, b: Self) -> Self {
        self.mul_add(a, b)
    }

    /// Cephes' `exp2f`: a polynomial on [-1/2, 1/2] and the exponent set by its bits. Unlike the
    /// standard library's it becomes vector instructions.
    #[inline(always)]
    fn exp2(self) -> Self {
        // Adding 1.5 * 2^23 rounds to the nearest integer, which is left in the low bits.
        const ROUND: f32 = 12_582_912.0;
        let x = if self > -126.0 { self } else { -126.0 };
        let x = if x < 127.0 { x } else { 127.0 };
        let shifted = x + ROUND;
        let f = x - (shifted - ROUND);
        let p = 1.535_336_2e-4f32;
        let p = p * f + 1.339_887_4e-3;
        let p = p * f + 9.618_437e-3;
        let p = p * f + 5.550_332_6e-2;
        let p = p * f + 2.402_264_7e-1;
        let p = p * f + 6.931_472e-1;
        let p = p * f + 1.0;
        let exponent = (shifted.to_bits() as i32).wrapping_sub(ROUND.to_bits() as i32);
        let scale = f32::from_bits(((exponent + 127) << 23) as u32);
        if self > -126.0 { p * scale } else { 0.0 }
    }

    #[inline(always)]
    fn log2(self) -> Self {
        f32::log2(self)
    }
}

impl Real for f64 {
    const ZERO: Self = 0.0;
    const ONE: Self = 1.0;
    const NEG_INFINITY: Self = f64::NEG_INFINITY;
    const INFINITY: Self = f64::INFINITY;

    #[inline(always)]
    fn from_f64(x: f64) -> Self {
        x
    }

    #[inline(always)]
    fn fma(self, a: Self, b: Self) -> Self {
        self.mul_add(a, b)
    }

    #[inline(always)]
    fn exp2(self) -> Self {
        f64::exp2(self)
    }

    #[inline(always)]
    fn log2(self) -> Self {
        f64::log2(self)
    }
}

/// An instruction set: how to multiply and add, and how many rows of a product fit its registers.
pub(super) trait Isa {
    fn fma<T: Real>(a: T, b: T, c: T) -> T;
    fn product<T: Real>(shape: [usize; 3], a: Left<T>, b: &[T], c: &mut [T]);
}

/// 32 registers of 512 bits.
pub(super) struct Avx512;
/// 16 registers of 256 bits.
pub(super) struct Avx2;
/// What every machine of the target has.
pub(super) struct Plain;

impl Isa for Avx512 {
    #[inline(always)]
    fn fma<T: Real>(a: T, b: T, c: T) -> T {
        a.fma(b, c)
    }

    #[inline(always)]
    fn product<T: Real>(shape: [usize; 3], a: Left<T>, b: &[T], c: &mut [T]) {
        product::<T, Self, 8, 32, 8>(shape, a, b, c);
    }
}

impl Isa for Avx2 {
    #[inline(always)]
    fn fma<T: Real>(a: T, b: T, c: T) -> T {
        a.fma(b, c)
    }

    #[inline(always)]
    fn product<T: Real>(shape: [usize; 3], a: Left<T>, b: &[T], c: &mut [T]) {
        product::<T, Self, 4, 16, 8>(shape, a, b, c);
    }
}

impl Isa for Plain {
    #[inline(always)]
    fn fma<T: Real>(a: T, b: T, c: T) -> T {
        // Without the instruction a fused multiply-add is a library call.
        if cfg!(any(target_feature = "fma", target_arch = "aarch64")) {
            a.fma(b, c)
        } else {
            a * b + c
        }
    }

    #[inline(always)]
    fn product<T: Real>(shape: [usize; 3], a: Left<T>, b: &[T], c: &mut [T]) {
        product::<T, Self, 4, 8, 8>(shape, a, b, c);
    }
}

/// The left operand of a product, `[rows, inner]`, stored as it is or transposed, with the distance
/// between stored rows.
#[derive(Clone, Copy)]
pub(super) enum Left<'a, T> {
    Rows(&'a [T], usize),
    Columns(&'a [T], usize),
}

/// `c += a b` with `b`, `[inner, columns]`, and `c`, `[rows, columns]`, packed; `shape` is
/// `[rows, inner, columns]`, rows and columns multiples of 8.
///
/// Blocks of `MR` by `NR` stay in registers; what is left over goes in blocks of 8 columns.
#[inline(always)]
fn product<T: Real, S: Isa, const MR: usize, const NR: usize, const TAIL: usize>(
    [rows, inner, columns]: [usize; 3],
    a: Left<T>,
    b: &[T],
    c: &mut [T],
) {
    let wide = columns - columns % NR;
    for row in (0..rows).step_by(MR) {
        for column in (0..wide).step_by(NR) {
            block::<T, S, MR, NR>(
                inner,
                columns,
                a,
                row,
                &b[column..],
                &mut c[row * columns + column..],
            );
        }
    }
    for row in (0..rows).step_by(8) {
        for column in (wide..columns).step_by(TAIL) {
            block::<T, S, 8, TAIL>(
                inner,
                columns,
                a,
                row,
                &b[column..],
                &mut c[row * columns + column..],
            );
        }
    }
}

#[inline(always)]
fn block<T: Real, S: Isa, const MR: usize, const NR: usize>(
    inner: usize,
    columns: usize,
    a: Left<T>,
    row: usize,
    b: &[T],
    c: &mut [T],
) {
    let mut sums = [[T::ZERO; NR]; MR];
    match a {
        Left::Rows(a, stride) => {
            let rows: [&[T]; MR] = std::array::from_fn(|r| &a[(row + r) * stride..][..inner]);
            for p in 0..inner {
                let b: &[T; NR] = b[p * columns..].first_chunk().expect("b is packed");
                for r in 0..MR {
                    let x = rows[r][p];
                    for n in 0..NR {
                        sums[r][n] = S::fma(x, b[n], sums[r][n]);
                    }
                }
            }
        }
        Left::Columns(a, stride) => {
            for p in 0..inner {
                let b: &[T; NR] = b[p * columns..].first_chunk().expect("b is packed");
                let a: &[T; MR] = a[p * stride + row..]
                    .first_chunk()
                    .expect("a covers the rows");
                for r in 0..MR {
                    for n in 0..NR {
                        sums[r][n] = S::fma(a[r], b[n], sums[r][n]);
                    }
                }
            }
        }
    }
    for r in 0..MR {
        let c: &mut [T; NR] = c[r * columns..]
            .first_chunk_mut()
            .expect("c covers the rows");
        // Values in and out: where `c` is written number by number, the compiler makes half of it vectors.
        let mut sum = *c;
        for n in 0..NR {
            sum[n] += sums[r][n];
        }
        *c = sum;
    }
}

/// Compiles a generic function once per instruction set and calls the best one the machine has.
///
/// `dispatch!(fn name<T>(arg: Type, ..) = body)` defines `name`, which calls `body::<T, Isa>(arg, ..)`;
/// `body` must be `#[inline(always)]`.
macro_rules! dispatch {
    ($(#[$doc:meta])* $vis:vis fn $name:ident<$T:ident>($($arg:ident: $ty:ty),* $(,)?) = $body:ident) => {
        $(#[$doc])*
        $vis fn $name<$T: $crate::ops::flash_attention::cpu::simd::Real>($($arg: $ty),*) {
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f,avx512vl,avx512dq,avx512bw,fma")]
                fn avx512<$T: $crate::ops::flash_attention::cpu::simd::Real>($($arg: $ty),*) {
                    $body::<$T, $crate::ops::flash_attention::cpu::simd::Avx512>($($arg),*)
                }
                #[target_feature(enable = "avx2,fma")]
                fn avx2<$T: $crate::ops::flash_attention::cpu::simd::Real>($($arg: $ty),*) {
                    $body::<$T, $crate::ops::flash_attention::cpu::simd::Avx2>($($arg),*)
                }
                let fma = std::is_x86_feature_detected!("fma");
                if fma
                    && std::is_x86_feature_detected!("avx512f")
                    && std::is_x86_feature_detected!("avx512vl")
                    && std::is_x86_feature_detected!("avx512dq")
                    && std::is_x86_feature_detected!("avx512bw")
                {
                    // SAFETY: the machine has the instructions.
                    return unsafe { avx512($($arg),*) };
                }
                if fma && std::is_x86_feature_detected!("avx2") {
                    // SAFETY: the machine has the instructions.
                    return unsafe { avx2($($arg),*) };
                }
            }
            $body::<$T, $crate::ops::flash_attention::cpu::simd::Plain>($($arg),*)
        }
    };
}
pub(super) use dispatch;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp2_is_within_two_units_in_the_last_place() {
        for n in -125_999..1_000 {
            let x = n as f32 * 1e-3;
            let want = f64::from(x).exp2();
            let error = (f64::from(Real::exp2(x)) - want).abs() / want;
            assert!(error < 2.4e-7, "2^{x}: {error:e}");
        }
        assert_eq!(Real::exp2(f32::NEG_INFINITY), 0.0);
        assert_eq!(Real::exp2(-1e30f32), 0.0);
        assert_eq!(Real::exp2(0.0f32), 1.0);
    }

    fn products_agree<S: Isa>() {
        let draw = |n: usize, k: usize| -> Vec<f64> {
            (0..n).map(|i| ((i * k + 7) % 31) as f64 - 15.0).collect()
        };
        for [rows, inner, columns] in [[8, 1, 8], [64, 8, 64], [16, 64, 24], [64, 64, 40]] {
            let (a, b) = (draw(rows * inner, 13), draw(inner * columns, 17));
            let transposed: Vec<f64> = (0..inner * rows)
                .map(|n| a[(n % rows) * inner + n / rows])
                .collect();
            let mut c = vec![1.0; rows * columns];
            S::product([rows, inner, columns], Left::Rows(&a, inner), &b, &mut c);
            S::product(
                [rows, inner, columns],
                Left::Columns(&transposed, rows),
                &b,
                &mut c,
            );
            for (n, got) in c.iter().enumerate() {
                let (i, j) = (n / columns, n % columns);
                let want: f64 = (0..inner)
                    .map(|p| a[i * inner + p] * b[p * columns + j])
                    .sum();
                assert_eq!(*got, 1.0 + 2.0 * want);
            }
        }
    }

    #[test]
    fn products_of_every_block_size_agree_with_the_definition() {
        products_agree::<Plain>();
        products_agree::<Avx2>();
        products_agree::<Avx512>();
    }
}

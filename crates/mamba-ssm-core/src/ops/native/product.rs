//! Small matrix products whose operands stay in cache.

use pulp::{Arch, Simd, WithSimd};

use super::LANES;

/// The left operand, any strides: element `(i, k)` is `data[i * rows + k * columns]`.
#[derive(Clone, Copy)]
pub(crate) struct Left<'a> {
    pub(crate) data: &'a [f32],
    pub(crate) rows: usize,
    pub(crate) columns: usize,
}

impl<'a> Left<'a> {
    /// Rows of `data`, `stride` apart.
    pub(crate) fn rows(data: &'a [f32], stride: usize) -> Self {
        Self {
            data,
            rows: stride,
            columns: 1,
        }
    }

    /// The transpose of rows of `data`, `stride` apart.
    pub(crate) fn transposed(data: &'a [f32], stride: usize) -> Self {
        Self {
            data,
            rows: 1,
            columns: stride,
        }
    }
}

/// Which part of a product is needed. Operands are stored in full; parts that are skipped must be zero
/// (inner dimension) or are left alone (output).
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Part {
    Full,
    /// The left operand is lower triangular: `k <= i`.
    InnerUpTo,
    /// The left operand is upper triangular: `k >= i`.
    InnerFrom,
    /// Only `j <= i` of the output is used.
    OutputUpTo,
}

/// `out[i, j] (+)= sum_k left[i, k] right[k, j]`, `size = [rows, inner, columns]`, columns in whole
/// [`LANES`].
pub(crate) struct Product<'a> {
    pub(crate) size: [usize; 3],
    pub(crate) left: Left<'a>,
    /// `[inner, columns]`, rows this far apart.
    pub(crate) right: (&'a [f32], usize),
    /// `[rows, columns]`, rows this far apart.
    pub(crate) out: (&'a mut [f32], usize),
    pub(crate) part: Part,
    /// Whether to add to `out` instead of replacing it.
    pub(crate) add: bool,
}

impl Product<'_> {
    /// Computes it.
    pub(crate) fn run(self) {
        let [rows, inner, columns] = self.size;
        if rows == 0 || columns == 0 {
            return;
        }
        assert!(columns.is_multiple_of(LANES), "columns come in whole lanes");
        assert!(self.out.0.len() >= (rows - 1) * self.out.1 + columns);
        if inner > 0 {
            assert!(self.right.0.len() >= (inner - 1) * self.right.1 + columns);
            let last = (rows - 1) * self.left.rows + (inner - 1) * self.left.columns;
            assert!(last < self.left.data.len());
        }
        // SAFETY of what follows: the largest index of every operand was checked above.
        Arch::new().dispatch(self);
    }
}

impl WithSimd for Product<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        // Tiles of 24 (32 registers) or 12 (16 registers) sums; the rest holds the operands.
        match S::F32_LANES {
            16 => self.tiles::<S, 12, 2>(simd),
            8 => self.tiles::<S, 6, 2>(simd),
            _ => self.tiles::<S, 4, 4>(simd),
        }
    }
}

impl Product<'_> {
    #[inline(always)]
    fn tiles<S: Simd, const ROWS: usize, const VECTORS: usize>(mut self, simd: S) {
        let [rows, inner, _] = self.size;
        let mut i = 0;
        while i < rows {
            let step = match rows - i {
                n if n >= ROWS => ROWS,
                n if n >= 4 => 4,
                _ => 1,
            };
            let k = match self.part {
                Part::InnerUpTo => 0..inner.min(i + step),
                Part::InnerFrom => i.min(inner)..inner,
                _ => 0..inner,
            };
            match step {
                4 => self.row::<S, 4, VECTORS>(simd, i, k),
                1 => self.row::<S, 1, VECTORS>(simd, i, k),
                _ => self.row::<S, ROWS, VECTORS>(simd, i, k),
            }
            i += step;
        }
    }

    /// One row of tiles.
    #[inline(always)]
    fn row<S: Simd, const ROWS: usize, const VECTORS: usize>(
        &mut self,
        simd: S,
        i: usize,
        k: std::ops::Range<usize>,
    ) {
        let columns = match self.part {
            Part::OutputUpTo => (i + ROWS).next_multiple_of(LANES).min(self.size[2]),
            _ => self.size[2],
        };
        let wide = S::F32_LANES * VECTORS;
        let mut j = 0;
        while j + wide <= columns {
            self.tile::<S, ROWS, VECTORS>(simd, i, j, k.clone());
            j += wide;
        }
        while j < columns {
            self.tile::<S, ROWS, 1>(simd, i, j, k.clone());
            j += S::F32_LANES;
        }
    }

    #[inline(always)]
    fn tile<S: Simd, const ROWS: usize, const VECTORS: usize>(
        &mut self,
        simd: S,
        i: usize,
        j: usize,
        k: std::ops::Range<usize>,
    ) {
        let mut sums = [[simd.splat_f32s(0.0); VECTORS]; ROWS];
        let Left {
            data,
            rows,
            columns,
        } = self.left;
        // SAFETY: `run` checked the largest index of every operand; `i + ROWS <= rows`,
        // `j + VECTORS * F32_LANES <= columns` and `k` lies within the inner dimension.
        unsafe {
            let left = data.as_ptr().add(i * rows);
            let right = self.right.0.as_ptr().add(j);
            for k in k {
                let right = right.add(k * self.right.1).cast::<S::f32s>();
                let right: [S::f32s; VECTORS] =
                    std::array::from_fn(|v| right.add(v).read_unaligned());
                let left = left.add(k * columns);
                for (r, sums) in sums.iter_mut().enumerate() {
                    let x = simd.splat_f32s(*left.add(r * rows));
                    for (sum, right) in sums.iter_mut().zip(right) {
                        *sum = simd.mul_add_e_f32s(x, right, *sum);
                    }
                }
            }
            for (r, sums) in sums.iter().enumerate() {
                let out = self.out.0.as_mut_ptr().add((i + r) * self.out.1 + j);
                let out = out.cast::<S::f32s>();
                for (v, sum) in sums.iter().enumerate() {
                    let out = out.add(v);
                    let value = if self.add {
                        simd.add_f32s(out.read_unaligned(), *sum)
                    } else {
                        *sum
                    };
                    out.write_unaligned(value);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn products_of_every_part_and_odd_size_agree_with_the_definition() {
        let draw = |n: usize, k: usize| -> Vec<f32> {
            (0..n).map(|i| ((i * k + 7) % 31) as f32 - 15.0).collect()
        };
        for [rows, inner, columns] in [
            [1, 1, 16],
            [12, 5, 32],
            [29, 29, 48],
            [64, 64, 64],
            [3, 0, 16],
        ] {
            for (part, transposed, add) in [
                (Part::Full, false, false),
                (Part::Full, true, true),
                (Part::InnerUpTo, false, true),
                (Part::InnerFrom, true, false),
                (Part::OutputUpTo, false, false),
            ] {
                let mut a = draw(rows * inner, 13);
                let at = |i: usize, k: usize| {
                    if transposed {
                        k * rows + i
                    } else {
                        i * inner + k
                    }
                };
                for i in 0..rows {
                    for k in 0..inner {
                        if (part == Part::InnerUpTo && k > i) || (part == Part::InnerFrom && k < i)
                        {
                            a[at(i, k)] = 0.0;
                        }
                    }
                }
                let left = if transposed {
                    Left::transposed(&a, rows)
                } else {
                    Left::rows(&a, inner)
                };
                let b = draw(inner * columns, 17);
                let mut c = vec![1.0; rows * columns];
                Product {
                    size: [rows, inner, columns],
                    left,
                    right: (&b, columns),
                    out: (&mut c, columns),
                    part,
                    add,
                }
                .run();
                for i in 0..rows {
                    for j in 0..columns {
                        if part == Part::OutputUpTo && j > i {
                            continue;
                        }
                        let sum: f32 = (0..inner).map(|k| a[at(i, k)] * b[k * columns + j]).sum();
                        assert_eq!(c[i * columns + j], sum + if add { 1.0 } else { 0.0 });
                    }
                }
            }
        }
    }
}

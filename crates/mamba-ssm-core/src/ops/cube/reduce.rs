//! Sums over the rows of a matrix: gradients of parameters from what each cube or token found.
//!
//! `out[c] = sum_r x[r, c]` for `[rows, columns]`, f32. Two passes, each with the rows in fixed slices, so
//! that the order of the sum does not depend on timing. Bytes: `rows * columns * 4` read once.

use burn::tensor::DType;
use burn_cubecl::tensor::CubeTensor;
use cubecl::prelude::*;

use super::place::{Place, Rows};
use super::{address_type, alone, elem, empty_like, grid};

/// Rows of a slice.
const SLICE: usize = 64;

#[cube(launch, address_type = "dynamic")]
fn sum_slices(x: &[f32], out: &mut [f32], rows: usize, columns: usize, #[comptime] slice: usize) {
    let slices = rows.div_ceil(comptime!(slice));
    if ABSOLUTE_POS < slices * columns {
        let column = ABSOLUTE_POS % columns;
        let from = ABSOLUTE_POS / columns * comptime!(slice);
        let to = min(from + comptime!(slice), rows);
        let mut sum = 0.0f32;
        for row in from..to {
            sum += x[row * columns + column];
        }
        out[ABSOLUTE_POS] = sum;
    }
}

/// Sums `x`, contiguous f32 of `rows * columns` elements, over its rows: `[columns]`.
pub(crate) fn sum_rows(x: CubeTensor, rows: usize, columns: usize) -> CubeTensor {
    let (mut x, mut rows) = (x, rows);
    loop {
        let slices = rows.div_ceil(SLICE);
        let out = empty_like(&x, [slices * columns], DType::F32);
        let units = alone(&x);
        let client = x.client.clone();
        sum_slices::launch(
            &client,
            grid((slices * columns).div_ceil(units)),
            CubeDim::new_1d(units as u32),
            address_type(&[&x]),
            x.into_buffer_arg(),
            out.clone().into_buffer_arg(),
            rows,
            columns,
            SLICE,
        );
        if slices == 1 {
            return out;
        }
        (x, rows) = (out, slices);
    }
}

#[cube(launch, address_type = "dynamic")]
fn sum_parts<O: Float>(
    parts: &[f32],
    out: &mut [O],
    count: usize,
    rows: usize,
    width: usize,
    place: &Place,
    #[define(O)] _dtype: ElemType,
) {
    if ABSOLUTE_POS < rows * width {
        let mut sum = 0.0f32;
        for part in 0..count {
            sum += parts[part * rows * width + ABSOLUTE_POS];
        }
        let (row, column) = (ABSOLUTE_POS / width, ABSOLUTE_POS % width);
        out[place.offset + row * place.row + column] = O::cast_from(sum);
    }
}

/// Sums the parts of `[count, rows, width]`, f32, into the rows of another tensor.
pub(crate) fn sum_parts_into(parts: CubeTensor, [count, rows, width]: [usize; 3], to: &Rows) {
    let units = alone(&parts);
    let client = parts.client.clone();
    sum_parts::launch(
        &client,
        grid((rows * width).div_ceil(units)),
        CubeDim::new_1d(units as u32),
        address_type(&[&parts, &to.tensor]),
        parts.into_buffer_arg(),
        to.tensor.clone().into_buffer_arg(),
        count,
        rows,
        width,
        to.place(),
        elem(to.tensor.dtype),
    );
}

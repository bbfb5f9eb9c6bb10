//! The second pass of the parameters' gradients: the slices' sums, added up in order.

use cubecl::prelude::*;

use super::common::SIDE;

/// Numbers of a reduction.
#[derive(CubeType, CubeLaunch, Clone)]
pub(super) struct ReduceCall {
    pub(super) slices: usize,
    /// The weight's shape.
    pub(super) d_input: usize,
    pub(super) d_output: usize,
    /// Rows and columns of a slice's sums, in whole blocks, and elements from slice to slice.
    pub(super) rows: usize,
    pub(super) columns: usize,
    pub(super) area: usize,
}

/// Elements of a slice's sums.
pub(super) fn area(rows: usize, columns: usize, bias: bool) -> usize {
    (rows + if bias { SIDE } else { 0 }) * columns
}

/// A unit adds up one element of the weight's or the bias's gradient, `at_once` slices at a time.
#[cube(launch_unchecked, address_type = "dynamic")]
pub(super) fn reduce<E: Float>(
    sums: &[f32],
    weight: &mut [E],
    bias: &mut [E],
    call: &ReduceCall,
    #[comptime] at_once: usize,
    #[comptime] with_bias: bool,
    #[define(E)] _dtype: ElemType,
) {
    let weights = call.d_input * call.d_output;
    let mut all = weights;
    if comptime!(with_bias) {
        all += call.d_output;
    }
    if ABSOLUTE_POS >= all {
        terminate!();
    }
    // The bias's sums follow the weight's rows.
    let mut row = ABSOLUTE_POS / call.d_output;
    if row == call.d_input {
        row = call.rows;
    }
    let column = ABSOLUTE_POS % call.d_output;
    let at = row * call.columns + column;
    let mut sum = 0.0f32;
    let mut slice = 0usize;
    while slice < call.slices {
        let mut part = 0.0f32;
        #[unroll]
        for n in 0..at_once {
            let behind = slice + n >= call.slices;
            let from = select(behind, 0usize, slice + n) * call.area + at;
            part += select(behind, 0.0f32, sums[from]);
        }
        sum += part;
        slice += at_once;
    }
    if ABSOLUTE_POS < weights {
        weight[ABSOLUTE_POS] = E::cast_from(sum);
    } else {
        bias[column] = E::cast_from(sum);
    }
}

//! The forward walk of a slab.

use super::block::Block;
use super::{SLAB, Scan, Slab};
use crate::ops::native::LANES;
use crate::ops::native::lanes::{Lanes, exp, silu};
use crate::ops::native::rows::RowsMut;
use crate::ops::native::{vectorized, with_scratch};

/// Writes a slab's channels of the output, of the final state (`[batch, state, dim]`) and, if they are to
/// be kept, of the states before the chunks (`[batch, chunks, state, dim]`).
pub(super) fn walk(
    scan: &Scan<'_>,
    slab: &Slab,
    y: &RowsMut<'_>,
    last: &RowsMut<'_>,
    states: Option<&RowsMut<'_>>,
) {
    let blocks = SLAB.div_ceil(LANES);
    with_scratch([blocks * scan.state * LANES], |[state]| {
        let state = state.as_chunks_mut().0;
        for (block, h) in blocks_with(scan, slab, state) {
            block.state(scan, scan.initial, h);
        }
        for chunk in 0..scan.chunks() {
            for (block, h) in blocks_with(scan, slab, state) {
                if let Some(states) = states {
                    store(&block, states, chunk * scan.state, h);
                }
                vectorized(
                    #[inline(always)]
                    || advance(scan, slab, &block, chunk, h, y),
                );
            }
        }
        for (block, h) in blocks_with(scan, slab, state) {
            store(&block, last, 0, h);
        }
    });
}

/// A slab's blocks, each with its share of `[blocks, state]` lanes.
pub(super) fn blocks_with<'a>(
    scan: &Scan<'_>,
    slab: &Slab,
    lanes: &'a mut [Lanes],
) -> impl Iterator<Item = (Block, &'a mut [Lanes])> {
    Block::all(slab.batch, &slab.channels).zip(lanes.chunks_exact_mut(scan.state))
}

fn store(block: &Block, to: &RowsMut<'_>, first: usize, h: &[Lanes]) {
    for (n, h) in h.iter().enumerate() {
        // SAFETY: the block's channels belong to this task.
        unsafe { block.store(to, first + n, h) };
    }
}

/// One chunk of one block.
#[inline(always)]
fn advance(
    scan: &Scan<'_>,
    slab: &Slab,
    block: &Block,
    chunk: usize,
    h: &mut [Lanes],
    y: &RowsMut<'_>,
) {
    let skip = scan.d.map(|d| block.load(d));
    for token in scan.tokens(chunk) {
        let (_, dt) = block.step(scan, token);
        let u = block.at(scan.u, token);
        let (b, c) = (
            scan.group_row(scan.b, slab, token),
            scan.group_row(scan.c, slab, token),
        );
        let mut sum = [0.0; LANES];
        for (n, (h, (b, c))) in h.iter_mut().zip(b.iter().zip(c)).enumerate() {
            let rate = block.load(&scan.a[n * scan.dim..][..scan.dim]);
            for l in 0..LANES {
                h[l] = h[l] * exp(dt[l] * rate[l]) + dt[l] * u[l] * b;
                sum[l] += h[l] * c;
            }
        }
        if let Some(d) = &skip {
            for l in 0..LANES {
                sum[l] += d[l] * u[l];
            }
        }
        if let Some(z) = scan.z {
            let z = block.at(z, token);
            for l in 0..LANES {
                sum[l] *= silu(z[l]);
            }
        }
        // SAFETY: the block's channels belong to this task.
        unsafe { block.store(y, token, &sum) };
    }
}

//! The backward walk of a slab: chunks in reverse, each one's states computed again.

use rayon::prelude::*;

use super::block::Block;
use super::forward::blocks_with;
use super::{CHUNK, SLAB, Scan, Slab, sum_parts, turned};
use crate::ops::native::LANES;
use crate::ops::native::lanes::{self, Lanes, exp, sigmoid};
use crate::ops::native::rows::{Rows, RowsMut};
use crate::ops::native::{vectorized, with_scratch, zeros};

/// The gradients, in the shapes of the operands.
pub(super) struct Found {
    pub(super) u: Vec<f32>,
    pub(super) delta: Vec<f32>,
    pub(super) z: Vec<f32>,
    pub(super) a: Vec<f32>,
    pub(super) b: Vec<f32>,
    pub(super) c: Vec<f32>,
    pub(super) d: Vec<f32>,
    pub(super) bias: Vec<f32>,
    pub(super) initial: Vec<f32>,
}

/// Where a slab writes.
struct To<'a> {
    /// `[batch, length, dim]`.
    u: RowsMut<'a>,
    delta: RowsMut<'a>,
    z: RowsMut<'a>,
    /// `[batch, state, dim]`.
    a: RowsMut<'a>,
    initial: RowsMut<'a>,
    /// `[batch, 2, dim]`: of `d` and of the bias.
    vectors: RowsMut<'a>,
    /// `[batch, length, groups * slabs * state]`.
    b: RowsMut<'a>,
    c: RowsMut<'a>,
}

/// All gradients, from the states before the chunks and the gradients of both outputs.
pub(super) fn backward(
    scan: &Scan<'_>,
    states: &[f32],
    dy: Rows<'_>,
    dfinal_state: &[f32],
) -> Found {
    let tokens = scan.batch * scan.length;
    let narrow = scan.groups * scan.slabs_per_group() * scan.state;
    let [mut u, mut delta] = [0, 1].map(|_| zeros(tokens * scan.dim));
    let mut z = zeros(if scan.z.is_some() {
        tokens * scan.dim
    } else {
        0
    });
    let [mut a, mut initial] = [0, 1].map(|_| zeros(scan.batch * scan.state * scan.dim));
    let mut vectors = zeros(scan.batch * 2 * scan.dim);
    let [mut b, mut c] = [0, 1].map(|_| zeros(tokens * narrow));
    {
        let to = To {
            u: RowsMut::new(&mut u, scan.length, scan.dim),
            delta: RowsMut::new(&mut delta, scan.length, scan.dim),
            z: RowsMut::new(&mut z, scan.length, scan.dim),
            a: RowsMut::new(&mut a, scan.state, scan.dim),
            initial: RowsMut::new(&mut initial, scan.state, scan.dim),
            vectors: RowsMut::new(&mut vectors, 2, scan.dim),
            b: RowsMut::new(&mut b, scan.length, narrow),
            c: RowsMut::new(&mut c, scan.length, narrow),
        };
        let rows = scan.chunks() * scan.state;
        let states = Rows::dense(states, rows, scan.dim);
        (0..scan.tasks()).into_par_iter().for_each(|task| {
            walk(scan, &scan.slab(task), states, dy, dfinal_state, &to);
        });
    }
    if scan.z.is_none() {
        z = zeros(tokens * scan.dim);
    }
    let mut vectors = sum_parts(&vectors, 2 * scan.dim);
    let bias = vectors.split_off(scan.dim);
    let a = sum_parts(&a, scan.state * scan.dim);
    let initial = initial
        .chunks_exact(scan.state * scan.dim)
        .flat_map(|state| turned(state, scan.state, scan.dim))
        .collect();
    Found {
        u,
        delta,
        z,
        a: turned(&a, scan.state, scan.dim),
        b: sum_slabs(scan, &b),
        c: sum_slabs(scan, &c),
        d: vectors,
        bias,
        initial,
    }
}

/// `[tokens, groups, slabs, state]` to `[tokens, groups, state]`.
fn sum_slabs(scan: &Scan<'_>, parts: &[f32]) -> Vec<f32> {
    let mut sum = vec![0.0; scan.batch * scan.length * scan.groups * scan.state];
    let shares = parts.chunks_exact(scan.slabs_per_group() * scan.state);
    for (sum, shares) in sum.chunks_exact_mut(scan.state).zip(shares) {
        for share in shares.chunks_exact(scan.state) {
            lanes::add_scaled(sum, share, 1.0);
        }
    }
    sum
}

/// Working memory of a chunk; per token (or before the first) and state, where not said otherwise.
struct Work<'a> {
    /// The states before the chunk and after each token.
    h: &'a mut [Lanes],
    decay: &'a mut [Lanes],
    /// Sums over the slab's blocks.
    db: &'a mut [Lanes],
    dc: &'a mut [Lanes],
    /// Per token: delta before the softplus, the step, and the output before the gate.
    tokens: &'a mut [[Lanes; 3]],
}

fn walk(
    scan: &Scan<'_>,
    slab: &Slab,
    states: Rows<'_>,
    dy: Rows<'_>,
    dfinal_state: &[f32],
    to: &To<'_>,
) {
    let all = scan.state * CHUNK * LANES;
    let carried = SLAB.div_ceil(LANES) * scan.state * LANES;
    let lengths = [
        carried,
        all + scan.state * LANES,
        all,
        all,
        all,
        CHUNK * 3 * LANES,
    ];
    with_scratch(lengths, |[dh, h, decay, db, dc, tokens]| {
        let dh = dh.as_chunks_mut().0;
        let mut work = Work {
            h: h.as_chunks_mut().0,
            decay: decay.as_chunks_mut().0,
            db: db.as_chunks_mut().0,
            dc: dc.as_chunks_mut().0,
            tokens: tokens.as_chunks_mut().0.as_chunks_mut().0,
        };
        for (block, dh) in blocks_with(scan, slab, dh) {
            block.state(scan, Some(dfinal_state), dh);
        }
        for chunk in (0..scan.chunks()).rev() {
            work.db.fill([0.0; LANES]);
            work.dc.fill([0.0; LANES]);
            for (block, dh) in blocks_with(scan, slab, dh) {
                vectorized(
                    #[inline(always)]
                    || {
                        repeat(scan, slab, &block, chunk, states, &mut work);
                        retreat(scan, slab, &block, chunk, dy, dh, &mut work, to);
                    },
                );
            }
            vectorized(
                #[inline(always)]
                || share(scan, slab, chunk, &work, to),
            );
        }
        for (block, dh) in blocks_with(scan, slab, dh) {
            for (n, dh) in dh.iter().enumerate() {
                // SAFETY: the block's channels belong to this task.
                unsafe { block.store(&to.initial, n, dh) };
            }
        }
    });
}

/// The chunk's forward pass, its states and decays kept.
#[inline(always)]
fn repeat(
    scan: &Scan<'_>,
    slab: &Slab,
    block: &Block,
    chunk: usize,
    states: Rows<'_>,
    work: &mut Work<'_>,
) {
    let state = scan.state;
    for n in 0..state {
        work.h[n] = block.at(states, chunk * state + n);
    }
    for (t, token) in scan.tokens(chunk).enumerate() {
        let (raw, dt) = block.step(scan, token);
        let u = block.at(scan.u, token);
        let (b, c) = (
            scan.group_row(scan.b, slab, token),
            scan.group_row(scan.c, slab, token),
        );
        let (before, after) = work.h[t * state..][..2 * state].split_at_mut(state);
        let decays = &mut work.decay[t * state..][..state];
        let mut sum = [0.0; LANES];
        for n in 0..state {
            let rate = block.load(&scan.a[n * scan.dim..][..scan.dim]);
            let decay = lanes::map(std::array::from_fn(|l| dt[l] * rate[l]), exp);
            for l in 0..LANES {
                after[n][l] = before[n][l] * decay[l] + dt[l] * u[l] * b[n];
                sum[l] += after[n][l] * c[n];
            }
            decays[n] = decay;
        }
        if let Some(d) = scan.d {
            let d = block.load(d);
            for l in 0..LANES {
                sum[l] += d[l] * u[l];
            }
        }
        work.tokens[t] = [raw, dt, sum];
    }
}

/// The chunk's backward pass. `dh` is the gradient of the state behind the chunk and then before it.
#[inline(always)]
#[allow(clippy::too_many_arguments)]
fn retreat(
    scan: &Scan<'_>,
    slab: &Slab,
    block: &Block,
    chunk: usize,
    dy: Rows<'_>,
    dh: &mut [Lanes],
    work: &mut Work<'_>,
    to: &To<'_>,
) {
    let (mut dskip, mut dbias) = ([0.0; LANES], [0.0; LANES]);
    let d = scan.d.map_or([0.0; LANES], |d| block.load(d));
    for (t, token) in scan.tokens(chunk).enumerate().rev() {
        let [raw, dt, sum] = work.tokens[t];
        let u = block.at(scan.u, token);
        let mut dsum = block.at(dy, token);
        if let Some(z) = scan.z {
            dsum = ungate(block, token, block.at(z, token), sum, dsum, &to.z);
        }
        let (dstep, dadded) = through_state(scan, slab, block, (t, token), dsum, dh, work, &to.a);
        let (mut du, mut ddelta) = ([0.0; LANES], [0.0; LANES]);
        for l in 0..LANES {
            du[l] = dadded[l] * dt[l] + d[l] * dsum[l];
            ddelta[l] = dstep[l] + dadded[l] * u[l];
            if scan.softplus {
                ddelta[l] *= sigmoid(raw[l]);
            }
            dskip[l] += dsum[l] * u[l];
            dbias[l] += ddelta[l];
        }
        // SAFETY: the block's channels belong to this task.
        unsafe {
            block.store(&to.u, token, &du);
            block.store(&to.delta, token, &ddelta);
        }
    }
    for (row, vector) in [dskip, dbias].iter().enumerate() {
        // SAFETY: as above.
        let to = unsafe { to.vectors.row(block.batch, row, block.first, block.width) };
        to.iter_mut().zip(vector).for_each(|(to, v)| *to += v);
    }
}

/// Through `y silu(z)`: writes the gradient of `z`, returns that of `y`.
#[inline(always)]
fn ungate(block: &Block, token: usize, z: Lanes, y: Lanes, dy: Lanes, to: &RowsMut<'_>) -> Lanes {
    let (mut dz, mut out) = ([0.0; LANES], [0.0; LANES]);
    for l in 0..LANES {
        let s = sigmoid(z[l]);
        dz[l] = dy[l] * y[l] * s * (1.0 + z[l] * (1.0 - s));
        out[l] = dy[l] * z[l] * s;
    }
    // SAFETY: the block's channels belong to this task.
    unsafe { block.store(to, token, &dz) };
    out
}

/// Through one token's states: adds to the gradients of A, B and C; returns those of the step (as far as
/// the decays ask) and of `dt u`.
#[inline(always)]
#[allow(clippy::too_many_arguments)]
fn through_state(
    scan: &Scan<'_>,
    slab: &Slab,
    block: &Block,
    (t, token): (usize, usize),
    dsum: Lanes,
    dh: &mut [Lanes],
    work: &mut Work<'_>,
    da: &RowsMut<'_>,
) -> (Lanes, Lanes) {
    let state = scan.state;
    let (b, c) = (
        scan.group_row(scan.b, slab, token),
        scan.group_row(scan.c, slab, token),
    );
    let [_, dt, _] = work.tokens[t];
    let u = block.at(scan.u, token);
    let added: Lanes = std::array::from_fn(|l| dt[l] * u[l]);
    let (mut dstep, mut dadded) = ([0.0; LANES], [0.0; LANES]);
    for n in 0..state {
        let at = t * state + n;
        let rate = block.load(&scan.a[n * scan.dim..][..scan.dim]);
        let (before, after, decay) = (work.h[at], work.h[at + state], work.decay[at]);
        let (dh, db, dc) = (&mut dh[n], &mut work.db[at], &mut work.dc[at]);
        let mut drate = [0.0; LANES];
        for l in 0..LANES {
            let g = dh[l] + dsum[l] * c[n];
            dc[l] += dsum[l] * after[l];
            db[l] += g * added[l];
            dadded[l] += g * b[n];
            dh[l] = g * decay[l];
            let through = dh[l] * before[l];
            dstep[l] += through * rate[l];
            drate[l] = through * dt[l];
        }
        // SAFETY: the block's channels belong to this task.
        let da = unsafe { da.row(block.batch, n, block.first, block.width) };
        da.iter_mut()
            .zip(drate)
            .for_each(|(da, drate)| *da += drate);
    }
    (dstep, dadded)
}

/// The slab's share in the gradients of B and C of a chunk.
#[inline(always)]
fn share(scan: &Scan<'_>, slab: &Slab, chunk: usize, work: &Work<'_>, to: &To<'_>) {
    let column = (slab.group * scan.slabs_per_group() + slab.number) * scan.state;
    for (t, token) in scan.tokens(chunk).enumerate() {
        for (sums, to) in [(&work.db, &to.b), (&work.dc, &to.c)] {
            // SAFETY: the columns belong to this task.
            let to = unsafe { to.row(slab.batch, token, column, scan.state) };
            for (to, sums) in to.iter_mut().zip(&sums[t * scan.state..]) {
                *to = lanes::total(*sums);
            }
        }
    }
}

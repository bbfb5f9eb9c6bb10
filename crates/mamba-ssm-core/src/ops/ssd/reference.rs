//! The definition, in tensor operations: the block decomposition of the scan.
//!
//! Within a chunk, `y = ((C B^T) * L * dt) x` with `L[i, j] = exp(s[i] - s[j])` for `j <= i`, where `s`
//! are the cumulated `dt A`; between chunks a state is carried. Decays are exponentials of differences,
//! never ratios of exponentials, so nothing overflows.

use burn::tensor::{Bool, Tensor, activation};

use super::{SkipWeight, SsdInput, SsdOptions, SsdOutput};
use crate::ops::precision::{compute_dtype, narrow_to, widen};

/// Chunks whose states are carried by one matrix product.
const CARRY_BLOCK: usize = 32;

pub(super) fn ssd(input: SsdInput, options: &SsdOptions) -> SsdOutput {
    let dtype = input.x.dtype();
    let wide = compute_dtype(dtype);
    let [batch, length, heads, headdim] = input.x.dims();
    let [_, _, groups, state] = input.b.dims();
    let per_group = heads / groups;
    let chunk = options.chunk_size.min(length);
    let chunks = length.div_ceil(chunk);

    let x = widen(input.x, wide);
    let dt = step_sizes(
        widen(input.dt, wide),
        input.dt_bias.map(|bias| widen(bias, wide)),
        options,
    );
    // Padding has dt = 0: it neither decays the state nor adds to it.
    let rows = chunks * chunk;
    let dt_heads = pad(dt.clone(), 1, rows)
        .reshape([batch, chunks, chunk, heads])
        .permute([0, 3, 1, 2]);
    let x_heads = pad(x.clone(), 1, rows)
        .reshape([batch, chunks, chunk, heads, headdim])
        .permute([0, 3, 1, 2, 4]); // [batch, heads, chunks, chunk, headdim]
    let to_groups = |tensor: Tensor<4>| {
        pad(widen(tensor, wide), 1, rows)
            .reshape([batch, chunks, chunk, groups, state])
            .permute([0, 3, 1, 2, 4]) // [batch, groups, chunks, chunk, state]
    };
    let (b, c) = (to_groups(input.b), to_groups(input.c));
    let spread = |tensor: Tensor<5>| spread_groups(tensor, per_group);

    let sums = (dt_heads.clone() * widen(input.a, wide).reshape([1, heads, 1, 1])).cumsum(3);
    let scores = spread(c.clone().matmul(b.clone().swap_dims(3, 4)));
    let weighted = scores * decay_matrix(sums.clone()) * dt_heads.clone().unsqueeze_dim(3);
    let inside = weighted.matmul(x_heads.clone());

    let total = sums.clone().narrow(3, chunk - 1, 1); // [batch, heads, chunks, 1]
    let to_end = ((total.clone() - sums.clone()).exp() * dt_heads).unsqueeze_dim::<5>(4);
    let added = (x_heads * to_end)
        .swap_dims(3, 4)
        .matmul(spread(b))
        .reshape([batch, heads, chunks, headdim * state]);
    let initial = match input.initial_state {
        Some(h) => widen(h, wide).reshape([batch, heads, 1, headdim * state]),
        None => Tensor::zeros(
            [batch, heads, 1, headdim * state],
            (&x.device(), wide.into()),
        ),
    };
    let (before, last) = carry(total.squeeze_dim(3), added, initial);
    let before = before.reshape([batch, heads, chunks, headdim, state]);
    let carried = (spread(c) * sums.exp().unsqueeze_dim(4)).matmul(before.swap_dims(3, 4));

    let mut y = (inside + carried)
        .permute([0, 2, 3, 1, 4])
        .reshape([batch, rows, heads, headdim]);
    if rows > length {
        y = y.narrow(1, 0, length);
    }
    y = match input.d {
        Some(SkipWeight::PerHead(d)) => y + x * widen(d, wide).reshape([1, 1, heads, 1]),
        Some(SkipWeight::PerChannel(d)) => y + x * widen(d, wide).reshape([1, 1, heads, headdim]),
        None => y,
    };
    if let Some(z) = input.z {
        y = y * activation::silu(widen(z, wide));
    }
    SsdOutput {
        y: narrow_to(y, dtype),
        final_state: last.reshape([batch, heads, headdim, state]),
    }
}

/// `clamp(softplus(dt + bias))`.
fn step_sizes(dt: Tensor<3>, bias: Option<Tensor<1>>, options: &SsdOptions) -> Tensor<3> {
    let mut dt = dt;
    if let Some(bias) = bias {
        dt = dt + bias.unsqueeze();
    }
    if options.dt_softplus {
        dt = activation::softplus(dt, 1.0);
    }
    let (low, high) = options.dt_limit;
    // A softplus is positive and most callers set no limit: no clamp, no pass over the data.
    if low > 0.0 || (low == 0.0 && !options.dt_softplus) {
        dt = dt.clamp_min(low);
    }
    if high.is_finite() {
        dt = dt.clamp_max(high);
    }
    dt
}

/// `tensor` with zeros appended along `dim` up to `rows`.
fn pad<const D: usize>(tensor: Tensor<D>, dim: usize, rows: usize) -> Tensor<D> {
    let mut shape = tensor.dims();
    if shape[dim] == rows {
        return tensor;
    }
    shape[dim] = rows - shape[dim];
    let zeros = Tensor::zeros(shape, (&tensor.device(), tensor.dtype()));
    Tensor::cat(vec![tensor, zeros], dim)
}

/// `[batch, groups, ..]` to `[batch, groups * per_group, ..]`, each group repeated.
fn spread_groups(tensor: Tensor<5>, per_group: usize) -> Tensor<5> {
    let [batch, groups, chunks, rows, columns] = tensor.dims();
    if per_group == 1 {
        return tensor;
    }
    tensor
        .unsqueeze_dim::<6>(2)
        .expand([batch, groups, per_group, chunks, rows, columns])
        .reshape([batch, groups * per_group, chunks, rows, columns])
}

/// `exp(s[i] - s[j])` for `j <= i`, else 0; `[.., n]` to `[.., n, n]`.
fn decay_matrix(sums: Tensor<4>) -> Tensor<5> {
    let [.., n] = sums.dims();
    let above = Tensor::<2, Bool>::tril_mask([n, n], 0, &sums.device());
    let difference = sums.clone().unsqueeze_dim::<5>(4) - sums.unsqueeze_dim::<5>(3);
    // Masked before the exponential: above the diagonal it could overflow, and infinity times a zero
    // gradient is NaN.
    difference
        .mask_fill(above.unsqueeze(), f64::NEG_INFINITY)
        .exp()
}

/// Carries a state over items: `h[k + 1] = exp(log_decay[k]) h[k] + added[k]`, `h[0] = initial`.
///
/// `log_decay [batch, heads, n]`, `added [batch, heads, n, size]`, `initial [batch, heads, 1, size]`;
/// returns `h[0..n]` and `h[n]`. By blocks, and blocks of blocks: work `n log n`, never `n^2`.
fn carry(log_decay: Tensor<3>, added: Tensor<4>, initial: Tensor<4>) -> (Tensor<4>, Tensor<4>) {
    let [batch, heads, n, size] = added.dims();
    if n <= CARRY_BLOCK {
        let zero = Tensor::zeros([batch, heads, 1], (&added.device(), added.dtype()));
        let sums = Tensor::cat(vec![zero, log_decay], 2).cumsum(2);
        let decays = decay_matrix(sums.unsqueeze_dim(2)).squeeze_dim::<4>(2);
        let states = decays.matmul(Tensor::cat(vec![initial, added], 2));
        return (states.clone().narrow(2, 0, n), states.narrow(2, n, 1));
    }
    let blocks = n.div_ceil(CARRY_BLOCK);
    let rows = blocks * CARRY_BLOCK;
    let fold = batch * heads * blocks;
    let log_decay = pad(log_decay, 2, rows).reshape([1, fold, CARRY_BLOCK]);
    let added = pad(added, 2, rows).reshape([1, fold, CARRY_BLOCK, size]);

    let nothing = Tensor::zeros([1, fold, 1, size], (&added.device(), added.dtype()));
    let (_, block_added) = carry(log_decay.clone(), added.clone(), nothing);
    let (block_before, last) = carry(
        log_decay.clone().sum_dim(2).reshape([batch, heads, blocks]),
        block_added.reshape([batch, heads, blocks, size]),
        initial,
    );
    let (before, _) = carry(log_decay, added, block_before.reshape([1, fold, 1, size]));
    let before = before.reshape([batch, heads, rows, size]);
    (before.narrow(2, 0, n), last)
}

//! The definition, in tensor operations: an inclusive scan by doubling.
//!
//! Step `k` combines each item with the one `2^k` before it, `(a, b) after (a', b') = (a a', a b' + b)`:
//! `log2(length)` passes over `[batch, dim, state, length]`, and products of decays (at most one) only.

use burn::tensor::{Tensor, activation};

use super::{ScanInput, ScanOptions, ScanOutput};
use crate::ops::precision::{compute_dtype, narrow_to, widen};

pub(super) fn selective_scan(input: ScanInput, options: &ScanOptions) -> ScanOutput {
    let dtype = input.u.dtype();
    let wide = compute_dtype(dtype);
    let [batch, dim, length] = input.u.dims();
    let [_, groups, state, _] = input.b.dims();

    let u = widen(input.u, wide);
    let mut delta = widen(input.delta, wide);
    if let Some(bias) = input.delta_bias {
        delta = delta + widen(bias, wide).reshape([1, dim, 1]);
    }
    if options.delta_softplus {
        delta = activation::softplus(delta, 1.0);
    }
    let spread = |tensor: Tensor<4>| {
        widen(tensor, wide)
            .unsqueeze_dim::<5>(2)
            .expand([batch, groups, dim / groups, state, length])
            .reshape([batch, dim, state, length])
    };

    let a = widen(input.a, wide).reshape([1, dim, state, 1]);
    let decay = (delta.clone().unsqueeze_dim::<4>(2) * a).exp();
    let mut added = (delta * u.clone()).unsqueeze_dim::<4>(2) * spread(input.b);
    if let Some(h) = input.initial_state {
        let first = decay.clone().narrow(3, 0, 1) * widen(h, wide).unsqueeze_dim::<4>(3)
            + added.clone().narrow(3, 0, 1);
        added = match length {
            1 => first,
            _ => Tensor::cat(vec![first, added.narrow(3, 1, length - 1)], 3),
        };
    }
    let states = scan(decay, added);

    let mut y = (states.clone() * spread(input.c)).sum_dim(2).squeeze_dim(2);
    if let Some(d) = input.d {
        y = y + u * widen(d, wide).reshape([1, dim, 1]);
    }
    if let Some(z) = input.z {
        y = y * activation::silu(widen(z, wide));
    }
    ScanOutput {
        y: narrow_to(y, dtype),
        final_state: states.narrow(3, length - 1, 1).squeeze_dim(3),
    }
}

/// `h[t] = decay[t] h[t-1] + added[t]` along the last axis, `h[-1] = 0`.
fn scan(decay: Tensor<4>, added: Tensor<4>) -> Tensor<4> {
    let [.., length] = added.dims();
    let (mut decay, mut states) = (decay, added);
    let mut distance = 1;
    while distance < length {
        let rest = length - distance;
        let late_decay = decay.clone().narrow(3, distance, rest);
        let late = states.clone().narrow(3, distance, rest)
            + late_decay.clone() * states.clone().narrow(3, 0, rest);
        states = Tensor::cat(vec![states.narrow(3, 0, distance), late], 3);
        let product = late_decay * decay.clone().narrow(3, 0, rest);
        decay = Tensor::cat(vec![decay.narrow(3, 0, distance), product], 3);
        distance *= 2;
    }
    states
}

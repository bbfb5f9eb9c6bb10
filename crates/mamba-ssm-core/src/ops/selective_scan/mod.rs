//! The selective scan of Mamba-1: one decay per channel and state.

mod autodiff;
mod backend;
#[cfg(feature = "flex")]
mod cpu;
#[cfg(feature = "cubecl")]
mod cube;
mod reference;

use backend::{Operands, ScanBackend};
use burn::backend::Dispatch;
use burn::tensor::{FloatDType, Tensor};
use mamba_ssm_linear::device::{has_cpu_kernels, has_kernels};

use crate::ops::optional::Optional;
use crate::ops::precision::{narrow_to, widen};

/// The operands of [`selective_scan`], in the official layouts. `dim` is a multiple of `groups`;
/// channel `d` reads group `d / (dim / groups)`.
#[derive(Debug, Clone)]
pub struct ScanInput {
    /// `[batch, dim, length]`.
    pub u: Tensor<3>,
    /// Step sizes before bias and softplus, `[batch, dim, length]`.
    pub delta: Tensor<3>,
    /// Decay rates, negative, `[dim, state]`.
    pub a: Tensor<2>,
    /// `[batch, groups, state, length]`.
    pub b: Tensor<4>,
    /// `[batch, groups, state, length]`.
    pub c: Tensor<4>,
    /// The skip from u to y, `[dim]`.
    pub d: Option<Tensor<1>>,
    /// The gate, `[batch, dim, length]`; the result is multiplied by `silu(z)`.
    pub z: Option<Tensor<3>>,
    /// Added to `delta` before the softplus, `[dim]`.
    pub delta_bias: Option<Tensor<1>>,
    /// The state before the first token, `[batch, dim, state]`; none means zeros.
    pub initial_state: Option<Tensor<3>>,
}

/// How to compute.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ScanOptions {
    /// Whether `delta` goes through a softplus (after the bias).
    pub delta_softplus: bool,
}

impl Default for ScanOptions {
    /// Softplus on, as the Mamba-1 layer uses it.
    fn default() -> Self {
        Self {
            delta_softplus: true,
        }
    }
}

/// What [`selective_scan`] returns.
#[derive(Debug, Clone)]
pub struct ScanOutput {
    /// `[batch, dim, length]`, in the type of `u`.
    pub y: Tensor<3>,
    /// The state after the last token, `[batch, dim, state]`, f32 (f64 for f64 operands).
    pub final_state: Tensor<3>,
}

/// The selective scan of Mamba-1. With `delta = softplus(delta + delta_bias)`, per channel:
///
/// ```text
/// h[t] = exp(delta[t] A) * h[t-1] + delta[t] u[t] B[t]        (state)
/// y[t] = (<h[t], C[t]> + D u[t]) * silu(z[t])
/// ```
///
/// Differentiable in every operand, the initial state included. State and accumulation in f32 (f64 for
/// f64 operands).
///
/// # Panics
///
/// When shapes disagree or `groups` does not divide `dim`.
///
/// Source: Gu and Dao, "Mamba", algorithm 2; `mamba_ssm.ops.selective_scan_interface.selective_scan_fn`.
///
/// ```
/// use burn::tensor::{Device, Tensor};
/// use mamba_ssm_core::{ScanInput, ScanOptions, selective_scan};
///
/// let device = Device::default();
/// let out = selective_scan(
///     ScanInput {
///         u: Tensor::ones([1, 1, 3], &device),
///         delta: Tensor::ones([1, 1, 3], &device),
///         a: Tensor::full([1, 1], 0.5_f32.ln(), &device),
///         b: Tensor::ones([1, 1, 1, 3], &device),
///         c: Tensor::ones([1, 1, 1, 3], &device),
///         d: None,
///         z: None,
///         delta_bias: None,
///         initial_state: None,
///     },
///     &ScanOptions { delta_softplus: false },
/// );
/// // Each step halves the state and adds one.
/// let y = out.y.into_data().try_to_vec::<f32>().unwrap();
/// assert!((y[2] - 1.75).abs() < 1e-6);
/// ```
pub fn selective_scan(input: ScanInput, options: &ScanOptions) -> ScanOutput {
    check(&input);
    let (device, dtype) = (input.u.device(), input.u.dtype());
    let few = input.a.dims()[1] <= backend::MOST_STATES;
    if has_cpu_kernels(&device, dtype) || few && has_kernels(&device, dtype) {
        native(input, options)
    } else {
        reference::selective_scan(input, options)
    }
}

/// The device's own implementation. Its channels come last, as a layer has them: what a layer passes was
/// transposed for this function, and is read where it lies.
fn native(input: ScanInput, options: &ScanOptions) -> ScanOutput {
    let (f32, dtype) = (FloatDType::F32, input.u.dtype());
    let last = |tensor: Tensor<3>| narrow_to(tensor, dtype).swap_dims(1, 2);
    let grouped = |tensor: Tensor<4>| narrow_to(tensor, dtype).permute([0, 3, 1, 2]);
    let operands = Operands {
        u: last(input.u).into_dispatch(),
        delta: last(input.delta).into_dispatch(),
        a: widen(input.a, f32).into_dispatch(),
        b: grouped(input.b).into_dispatch(),
        c: grouped(input.c).into_dispatch(),
        d: Optional::of(input.d.map(|d| widen(d, f32))),
        z: Optional::of(input.z.map(last)),
        delta_bias: Optional::of(input.delta_bias.map(|bias| widen(bias, f32))),
        initial_state: Optional::of(input.initial_state.map(|h| widen(h, f32))),
    };
    let (y, final_state) = Dispatch::selective_scan(operands, options.delta_softplus);
    ScanOutput {
        y: Tensor::<3>::from_dispatch(y).swap_dims(1, 2),
        final_state: Tensor::from_dispatch(final_state),
    }
}

fn check(input: &ScanInput) {
    let [batch, dim, length] = input.u.dims();
    let [_, groups, state, _] = input.b.dims();
    assert!(
        groups > 0 && dim.is_multiple_of(groups),
        "selective_scan: dim = {dim} is not a multiple of groups = {groups}"
    );
    let expect = |name: &str, found: &[usize], expected: &[usize]| {
        assert_eq!(
            found, expected,
            "selective_scan: {name} has the shape on the left, u and b ask for the one on the right"
        );
    };
    expect("delta", &input.delta.dims(), &[batch, dim, length]);
    expect("a", &input.a.dims(), &[dim, state]);
    expect("b", &input.b.dims(), &[batch, groups, state, length]);
    expect("c", &input.c.dims(), &[batch, groups, state, length]);
    if let Some(d) = &input.d {
        expect("d", &d.dims(), &[dim]);
    }
    if let Some(z) = &input.z {
        expect("z", &z.dims(), &[batch, dim, length]);
    }
    if let Some(bias) = &input.delta_bias {
        expect("delta_bias", &bias.dims(), &[dim]);
    }
    if let Some(h) = &input.initial_state {
        expect("initial_state", &h.dims(), &[batch, dim, state]);
    }
}

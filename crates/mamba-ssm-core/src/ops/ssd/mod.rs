//! The state-space duality operator of Mamba-2.
//!
//! One scalar decay per head lets the recurrence be computed chunk by chunk with matrix products.

mod autodiff;
pub(crate) mod backend;
#[cfg(feature = "flex")]
pub(crate) mod cpu;
#[cfg(feature = "cubecl")]
pub(crate) mod cube;
mod reference;

use backend::{Operands, Spec, SsdBackend};
use burn::backend::Dispatch;
use burn::tensor::{DType, FloatDType, Tensor, activation};
use mamba_ssm_linear::device::has_kernels;

use crate::ops::optional::Optional;
use crate::ops::precision::{compute_dtype, narrow_to, widen};

/// The operands of [`ssd`], in the official layouts. `heads` is a multiple of `groups`; head `h` reads
/// group `h / (heads / groups)`.
#[derive(Debug, Clone)]
pub struct SsdInput {
    /// `[batch, length, heads, headdim]`.
    pub x: Tensor<4>,
    /// Step sizes before bias and softplus, `[batch, length, heads]`.
    pub dt: Tensor<3>,
    /// Decay rates, negative, `[heads]`.
    pub a: Tensor<1>,
    /// `[batch, length, groups, state]`.
    pub b: Tensor<4>,
    /// `[batch, length, groups, state]`.
    pub c: Tensor<4>,
    /// The skip from x to y, per head or per channel.
    pub d: Option<SkipWeight>,
    /// The gate, `[batch, length, heads, headdim]`; the result is multiplied by `silu(z)`.
    pub z: Option<Tensor<4>>,
    /// Added to `dt` before the softplus, `[heads]`.
    pub dt_bias: Option<Tensor<1>>,
    /// The state before the first token, `[batch, heads, headdim, state]`; none means zeros.
    pub initial_state: Option<Tensor<4>>,
}

/// The weight of the skip connection, `D` in the official package.
#[derive(Debug, Clone)]
pub enum SkipWeight {
    /// `[heads]`.
    PerHead(Tensor<1>),
    /// `[heads, headdim]`.
    PerChannel(Tensor<2>),
}

impl From<Tensor<1>> for SkipWeight {
    fn from(d: Tensor<1>) -> Self {
        Self::PerHead(d)
    }
}

impl From<Tensor<2>> for SkipWeight {
    fn from(d: Tensor<2>) -> Self {
        Self::PerChannel(d)
    }
}

/// How to compute.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SsdOptions {
    /// Tokens that are computed together by matrix products. Any value gives the same result.
    pub chunk_size: usize,
    /// Whether `dt` goes through a softplus (after the bias).
    pub dt_softplus: bool,
    /// `dt` is clamped to this range at last.
    pub dt_limit: (f64, f64),
}

impl Default for SsdOptions {
    /// Chunks of 64, softplus on, no limit.
    fn default() -> Self {
        Self {
            chunk_size: 64,
            dt_softplus: true,
            dt_limit: (0.0, f64::INFINITY),
        }
    }
}

/// What [`ssd`] returns.
#[derive(Debug, Clone)]
pub struct SsdOutput {
    /// `[batch, length, heads, headdim]`, in the type of `x`.
    pub y: Tensor<4>,
    /// The state after the last token, `[batch, heads, headdim, state]`, f32 (f64 for f64 operands).
    pub final_state: Tensor<4>,
}

/// The selective scan of Mamba-2. With `dt = clamp(softplus(dt + dt_bias))`, per head:
///
/// ```text
/// h[t] = exp(dt[t] A) h[t-1] + dt[t] x[t] B[t]^T        (headdim x state)
/// y[t] = (h[t] C[t] + D x[t]) * silu(z[t])
/// ```
///
/// Differentiable in every operand, the initial state included. State and accumulation in f32 (f64 for
/// f64 operands).
///
/// # Panics
///
/// When shapes disagree, the chunk size is zero, or `groups` does not divide `heads`.
///
/// Source: Dao and Gu, "Transformers are SSMs", section 6 (block decomposition);
/// `mamba_ssm.ops.triton.ssd_combined.mamba_chunk_scan_combined`.
///
/// ```
/// use burn::tensor::{Device, Distribution, Tensor};
/// use mamba_ssm_core::{SsdInput, SsdOptions, ssd};
///
/// let device = Device::default();
/// let random = |shape: [usize; 4]| Tensor::<4>::random(shape, Distribution::Default, &device);
/// let (batch, length, heads, headdim, groups, state) = (2, 100, 4, 16, 1, 8);
/// let out = ssd(
///     SsdInput {
///         x: random([batch, length, heads, headdim]),
///         dt: Tensor::zeros([batch, length, heads], &device),
///         a: Tensor::from_floats([-1.0, -2.0, -4.0, -8.0], &device),
///         b: random([batch, length, groups, state]),
///         c: random([batch, length, groups, state]),
///         d: Some(Tensor::<1>::ones([heads], &device).into()),
///         z: None,
///         dt_bias: None,
///         initial_state: None,
///     },
///     &SsdOptions::default(),
/// );
/// assert_eq!(out.y.dims(), [batch, length, heads, headdim]);
/// assert_eq!(out.final_state.dims(), [batch, heads, headdim, state]);
/// ```
pub fn ssd(input: SsdInput, options: &SsdOptions) -> SsdOutput {
    check(&input, options);
    if !is_native(&input) {
        return reference::ssd(input, options);
    }
    let z = input.z.clone();
    let mut out = native(input, options);
    if let Some(z) = z {
        let dtype = out.y.dtype();
        let wide = compute_dtype(dtype);
        out.y = narrow_to(widen(out.y, wide) * activation::silu(widen(z, wide)), dtype);
    }
    out
}

/// Whether the device has an implementation of its own for the operands' types.
fn is_native(input: &SsdInput) -> bool {
    let dtype = input.x.dtype();
    has_kernels(&input.x.device(), dtype) && input.dt.dtype() != DType::F64
}

/// The device's own implementation, without the gate.
fn native(input: SsdInput, options: &SsdOptions) -> SsdOutput {
    let dtype = input.x.dtype();
    let [_, _, heads, headdim] = input.x.dims();
    let f32 = FloatDType::F32;
    let d = input.d.map(|d| match d {
        SkipWeight::PerHead(d) => widen(d, f32).reshape([heads, 1]).expand([heads, headdim]),
        SkipWeight::PerChannel(d) => widen(d, f32),
    });
    let operands = Operands {
        x: input.x.into_dispatch(),
        dt: input.dt.into_dispatch(),
        a: widen(input.a, f32).into_dispatch(),
        b: narrow_to(input.b, dtype).into_dispatch(),
        c: narrow_to(input.c, dtype).into_dispatch(),
        d: Optional::of(d),
        dt_bias: Optional::of(input.dt_bias.map(|bias| widen(bias, f32))),
        initial_state: Optional::of(input.initial_state.map(|h| widen(h, f32))),
    };
    let spec = Spec {
        softplus: options.dt_softplus,
        limit: options.dt_limit,
    };
    let (y, final_state) = Dispatch::ssd(operands, spec);
    SsdOutput {
        y: Tensor::from_dispatch(y),
        final_state: Tensor::from_dispatch(final_state),
    }
}

fn check(input: &SsdInput, options: &SsdOptions) {
    let [batch, length, heads, headdim] = input.x.dims();
    let [_, _, groups, state] = input.b.dims();
    assert!(options.chunk_size > 0, "ssd: chunk_size is 0");
    assert!(
        groups > 0 && heads.is_multiple_of(groups),
        "ssd: heads = {heads} is not a multiple of groups = {groups}"
    );
    let expect = |name: &str, found: &[usize], expected: &[usize]| {
        assert_eq!(
            found, expected,
            "ssd: {name} has the shape on the left, x and b ask for the one on the right"
        );
    };
    expect("dt", &input.dt.dims(), &[batch, length, heads]);
    expect("a", &input.a.dims(), &[heads]);
    expect("b", &input.b.dims(), &[batch, length, groups, state]);
    expect("c", &input.c.dims(), &[batch, length, groups, state]);
    match &input.d {
        Some(SkipWeight::PerHead(d)) => expect("d", &d.dims(), &[heads]),
        Some(SkipWeight::PerChannel(d)) => expect("d", &d.dims(), &[heads, headdim]),
        None => {}
    }
    if let Some(z) = &input.z {
        expect("z", &z.dims(), &input.x.dims());
    }
    if let Some(bias) = &input.dt_bias {
        expect("dt_bias", &bias.dims(), &[heads]);
    }
    if let Some(h) = &input.initial_state {
        expect("initial_state", &h.dims(), &[batch, heads, headdim, state]);
    }
}

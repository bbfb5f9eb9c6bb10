//! GELU on Burn's CubeCL backends.
//!
//! ```text
//! P(x) = (1 + erf(x / sqrt 2)) / 2      y = x P(x)      dx = dy (P(x) + x exp(-x^2 / 2) / sqrt(2 pi))
//! ```
//!
//! A unit owns sixteen bytes of x. Bytes: x (and dy) read once, y (or dx) written once.

use burn::backend::tensor::FloatTensor;
use burn_cubecl::CubeBackend;
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::tensor::CubeTensor;
use cubecl::prelude::*;
use mamba_ssm_linear::cube::{address_type, alone, common_vector, elem, empty_like, grid};

use super::backend::GeluBackend;

const HALF_ROOT: f32 = std::f32::consts::FRAC_1_SQRT_2;

/// `1 / sqrt(2 pi)`.
const DENSITY: f32 = 0.398_942_3;

/// `y`, or with `dy` read, `dx`.
#[cube(launch, address_type = "dynamic")]
fn kernel<I: Float, V: Size>(
    x: &[I],
    dy: &[I],
    out: &mut [I],
    vectors: usize,
    #[comptime] backward: bool,
    #[define(I)] _dtype: ElemType,
    #[define(V)] _vector: usize,
) {
    if ABSOLUTE_POS < vectors {
        let x = x.as_vectorized().with_vector_size::<V>();
        let out = out.as_vectorized_mut().with_vector_size_mut::<V>();
        let x = Vector::<f32, V>::cast_from(x[ABSOLUTE_POS]);
        let half = Vector::<f32, V>::new(0.5f32);
        let below = half * (x * Vector::new(HALF_ROOT)).erf() + half;
        if comptime!(backward) {
            let dy = dy.as_vectorized().with_vector_size::<V>();
            let density = (x * x * Vector::new(-0.5f32)).exp() * Vector::new(DENSITY);
            let dx = Vector::<f32, V>::cast_from(dy[ABSOLUTE_POS]) * (below + x * density);
            out[ABSOLUTE_POS] = Vector::cast_from(dx);
        } else {
            out[ABSOLUTE_POS] = Vector::cast_from(x * below);
        }
    }
}

fn launch(x: CubeTensor, dy: Option<CubeTensor>) -> CubeTensor {
    let x = into_contiguous(x);
    let dy = dy.map(into_contiguous);
    let elements = x.meta.shape.num_elements();
    let vector = common_vector(16 / x.dtype.size(), &[elements]);
    let out = empty_like(&x, x.meta.shape.clone(), x.dtype);
    let units = alone(&x);
    kernel::launch(
        &x.client,
        grid((elements / vector).div_ceil(units)),
        CubeDim::new_1d(units as u32),
        address_type(&[&x]),
        x.clone().into_buffer_arg(),
        dy.as_ref().unwrap_or(&x).clone().into_buffer_arg(),
        out.clone().into_buffer_arg(),
        elements / vector,
        dy.is_some(),
        elem(x.dtype),
        vector,
    );
    out
}

impl GeluBackend for CubeBackend {
    fn exact_gelu_forward(x: FloatTensor<Self>) -> FloatTensor<Self> {
        launch(x, None)
    }

    fn exact_gelu_backward(x: FloatTensor<Self>, dy: FloatTensor<Self>) -> FloatTensor<Self> {
        launch(x, Some(dy))
    }
}

//! The sum with dropout on Burn's CubeCL backends.
//!
//! ```text
//! m = 1 where hash(seed, token, feature) < 2^32 (1 - p), else 0
//! r = x + m y / (1 - p)      dy = m dr / (1 - p)
//! ```
//!
//! A unit owns up to sixteen bytes of a token. Bytes: x and y read and r written, or dr read and dy written;
//! the mask is in no memory.

use burn::backend::tensor::FloatTensor;
use burn_cubecl::CubeBackend;
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::tensor::CubeTensor;
use cubecl::prelude::*;
use mamba_ssm_linear::cube::{address_type, alone, common_vector, elem, empty_like, grid};

use super::backend::ResidualBackend;
use crate::ops::cube::mix;

/// What `m / (1 - p)` is for each feature of a vector.
#[cube]
fn factors<V: Size>(
    key: u32,
    feature: usize,
    threshold: u32,
    factor: f32,
    #[comptime] vector: usize,
) -> Vector<f32, V> {
    let mut factors = Vector::<f32, V>::new(0.0f32);
    #[unroll]
    for v in 0..vector {
        let hash = mix(key ^ mix((feature + v) as u32));
        factors.insert(v, select(hash < threshold, factor, 0.0f32));
    }
    factors
}

/// `r`, or for a gradient without `x`, `dy`.
#[cube(launch, address_type = "dynamic")]
fn kernel<I: Float, V: Size>(
    x: &[I],
    y: &[I],
    seed: &[f32],
    out: &mut [I],
    count: usize,
    width: usize,
    threshold: u32,
    factor: f32,
    #[comptime] add: bool,
    #[comptime] vector: usize,
    #[define(I)] _dtype: ElemType,
    #[define(V)] _at_once: usize,
) {
    if ABSOLUTE_POS < count {
        let (token, feature) = (ABSOLUTE_POS * vector / width, ABSOLUTE_POS * vector % width);
        let words = (u32::reinterpret(seed[0]), u32::reinterpret(seed[1]));
        let key = mix(mix(token as u32 ^ words.0) ^ mix(words.1));
        let y = y.as_vectorized().with_vector_size::<V>();
        let out = out.as_vectorized_mut().with_vector_size_mut::<V>();
        let mut value = Vector::<f32, V>::cast_from(y[ABSOLUTE_POS])
            * factors::<V>(key, feature, threshold, factor, vector);
        if comptime!(add) {
            let x = x.as_vectorized().with_vector_size::<V>();
            value += Vector::cast_from(x[ABSOLUTE_POS]);
        }
        out[ABSOLUTE_POS] = Vector::cast_from(value);
    }
}

fn launch(x: Option<CubeTensor>, y: CubeTensor, seed: CubeTensor, prob: f64) -> CubeTensor {
    let y = into_contiguous(y);
    let x = x.map(into_contiguous);
    let [batch, length, width]: [usize; 3] = y.meta.shape.dims();
    let vector = common_vector(16 / y.dtype.size(), &[width]);
    let vectors = batch * length * width / vector;
    let out = empty_like(&y, [batch, length, width], y.dtype);
    let units = alone(&y);
    kernel::launch(
        &y.client,
        grid(vectors.div_ceil(units)),
        CubeDim::new_1d(units as u32),
        address_type(&[&y]),
        x.as_ref().unwrap_or(&y).clone().into_buffer_arg(),
        y.clone().into_buffer_arg(),
        into_contiguous(seed).into_buffer_arg(),
        out.clone().into_buffer_arg(),
        vectors,
        width,
        // Rounded down where it would be 2^32.
        ((1.0 - prob) * f64::from(u32::MAX)).round() as u32,
        (1.0 / (1.0 - prob)) as f32,
        x.is_some(),
        vector,
        elem(y.dtype),
        vector,
    );
    out
}

impl ResidualBackend for CubeBackend {
    fn add_dropped_forward(
        x: FloatTensor<Self>,
        y: FloatTensor<Self>,
        seed: FloatTensor<Self>,
        prob: f64,
    ) -> FloatTensor<Self> {
        launch(Some(x), y, seed, prob)
    }

    fn add_dropped_backward(
        dr: FloatTensor<Self>,
        seed: FloatTensor<Self>,
        prob: f64,
    ) -> FloatTensor<Self> {
        launch(None, dr, seed, prob)
    }
}

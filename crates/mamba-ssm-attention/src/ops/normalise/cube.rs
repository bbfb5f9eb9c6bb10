//! The norm on Burn's CubeCL backends.
//!
//! ```text
//! r = 1 / sqrt(mean(x^2) + epsilon)      y = r x      dx = r dy - r^3 mean(x dy) x
//! ```
//!
//! A team of `lanes` neighbours in a plane owns a token; what it read stays in registers between the sums and
//! the output. Bytes: x (and dy) read once, y (or dx) written once.

use burn::backend::tensor::FloatTensor;
use burn_cubecl::CubeBackend;
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::tensor::CubeTensor;
use cubecl::prelude::*;
use mamba_ssm_linear::cube::{address_type, alone, common_vector, elem, empty_like, grid};

use super::backend::NormaliseBackend;

/// What a kernel is compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Plan {
    width: usize,
    /// Elements read at once; divides the width.
    vector: usize,
    /// Units of a team, a power of two.
    lanes: usize,
}

impl Plan {
    fn new(x: &CubeTensor, width: usize) -> Self {
        let hardware = &x.client.properties().hardware;
        let vector = common_vector(16 / x.dtype.size(), &[width]);
        let fixed = hardware.plane_size_min == hardware.plane_size_max;
        let plane = if fixed {
            hardware.plane_size_max as usize
        } else {
            1
        };
        let lanes = (width / vector).next_power_of_two().min(plane);
        Self {
            width,
            vector,
            lanes,
        }
    }

    fn vectors(&self) -> usize {
        self.width / self.vector
    }

    /// Vectors that a unit holds.
    fn shares(&self) -> usize {
        self.vectors().div_ceil(self.lanes)
    }
}

/// A unit's vectors of a token in f32, zero past the token's end.
#[cube]
fn load<I: Float, V: Size>(
    from: &[I],
    token: usize,
    lane: usize,
    #[comptime] plan: Plan,
) -> Array<Vector<f32, V>> {
    let from = from.as_vectorized().with_vector_size::<V>();
    let mut values = Array::<Vector<f32, V>>::new(comptime!(plan.shares()));
    #[unroll]
    for n in 0..comptime!(plan.shares()) {
        let at = lane + comptime!(n * plan.lanes);
        values[n] = Vector::new(0.0f32);
        if at < comptime!(plan.vectors()) {
            values[n] = Vector::cast_from(from[token * comptime!(plan.vectors()) + at]);
        }
    }
    values
}

/// The team's sum of `a b`.
#[cube]
fn inner<V: Size>(
    a: &Array<Vector<f32, V>>,
    b: &Array<Vector<f32, V>>,
    #[comptime] plan: Plan,
) -> f32 {
    let mut sum = 0.0f32;
    #[unroll]
    for n in 0..comptime!(plan.shares()) {
        let product = a[n] * b[n];
        #[unroll]
        for v in 0..comptime!(plan.vector) {
            sum += product.extract(v);
        }
    }
    #[unroll]
    for step in 0..comptime!(plan.lanes.ilog2() as usize) {
        sum += plane_shuffle_xor(sum, comptime!(1u32 << step as u32));
    }
    sum
}

/// `y`, or with `dy` read, `dx`.
#[cube(launch, address_type = "dynamic")]
fn kernel<I: Float, V: Size>(
    x: &[I],
    dy: &[I],
    out: &mut [I],
    tokens: usize,
    epsilon: f32,
    #[comptime] plan: Plan,
    #[comptime] backward: bool,
    #[define(I)] _dtype: ElemType,
    #[define(V)] _vector: usize,
) {
    let own = ABSOLUTE_POS / comptime!(plan.lanes);
    let lane = ABSOLUTE_POS % comptime!(plan.lanes);
    // Past the last token, that one again: its team has to take part in the sums of the plane.
    let token = min(own, tokens - 1);
    let width = comptime!(plan.width as f32);
    let mut values = load::<I, V>(x, token, lane, plan);
    let r = 1.0f32 / (inner::<V>(&values, &values, plan) / width + epsilon).sqrt();
    let scale = Vector::<f32, V>::new(r);
    if comptime!(backward) {
        let dy = load::<I, V>(dy, token, lane, plan);
        let pull = Vector::<f32, V>::new(inner::<V>(&values, &dy, plan) / width * r * r * r);
        #[unroll]
        for n in 0..comptime!(plan.shares()) {
            values[n] = scale * dy[n] - pull * values[n];
        }
    } else {
        #[unroll]
        for n in 0..comptime!(plan.shares()) {
            values[n] = scale * values[n];
        }
    }
    let out = out.as_vectorized_mut().with_vector_size_mut::<V>();
    #[unroll]
    for n in 0..comptime!(plan.shares()) {
        let at = lane + comptime!(n * plan.lanes);
        if own < tokens && at < comptime!(plan.vectors()) {
            out[own * comptime!(plan.vectors()) + at] = Vector::cast_from(values[n]);
        }
    }
}

fn launch(x: CubeTensor, dy: Option<CubeTensor>, epsilon: f64) -> CubeTensor {
    let x = into_contiguous(x);
    let dy = dy.map(into_contiguous);
    let [batch, length, width]: [usize; 3] = x.meta.shape.dims();
    let (tokens, plan) = (batch * length, Plan::new(&x, width));
    let out = empty_like(&x, [batch, length, width], x.dtype);
    let units = (alone(&x) / plan.lanes).max(1) * plan.lanes;
    kernel::launch(
        &x.client,
        grid((tokens * plan.lanes).div_ceil(units)),
        CubeDim::new_1d(units as u32),
        address_type(&[&x]),
        x.clone().into_buffer_arg(),
        dy.as_ref().unwrap_or(&x).clone().into_buffer_arg(),
        out.clone().into_buffer_arg(),
        tokens,
        epsilon as f32,
        plan,
        dy.is_some(),
        elem(x.dtype),
        plan.vector,
    );
    out
}

impl NormaliseBackend for CubeBackend {
    fn normalise_forward(x: FloatTensor<Self>, epsilon: f64) -> FloatTensor<Self> {
        launch(x, None, epsilon)
    }

    fn normalise_backward(
        x: FloatTensor<Self>,
        dy: FloatTensor<Self>,
        epsilon: f64,
    ) -> FloatTensor<Self> {
        launch(x, Some(dy), epsilon)
    }
}

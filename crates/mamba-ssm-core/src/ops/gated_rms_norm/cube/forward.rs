//! The gated norm, forwards.
//!
//! ```text
//! v = x silu(z)      y = v / sqrt(mean(v^2) + eps) * weight                 (norm after the gate)
//! v = x              y = v / sqrt(mean(v^2) + eps) * weight * silu(z)       (norm before it)
//! ```
//!
//! A plane owns one group of channels of a run of tokens, its lanes the channels in turn; a token's
//! channels stay in registers between the sum of squares and the output. Bytes: x and z read, y written.

use cubecl::prelude::*;

use crate::ops::cube::math::sigmoid;
use crate::ops::cube::place::Place;

/// What a kernel is compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Plan {
    /// Channels of a group.
    pub(super) group: usize,
    pub(super) vector: usize,
    /// Lanes of a plane, and planes of a cube.
    pub(super) lanes: usize,
    pub(super) planes: usize,
    /// Tokens of a run.
    pub(super) run: usize,
    pub(super) gated: bool,
    pub(super) norm_first: bool,
}

impl Plan {
    /// Vectors that a lane holds.
    pub(super) fn shares(&self) -> usize {
        self.group.div_ceil(self.vector * self.lanes)
    }
}

/// Numbers of a call.
#[derive(CubeType, CubeLaunch, Clone)]
pub(super) struct Call {
    pub(super) tokens: usize,
    pub(super) groups: usize,
    pub(super) eps: f32,
    pub(super) x: Place,
    pub(super) z: Place,
    /// Of the result: y forwards, dx backwards.
    pub(super) out: Place,
}

/// What a plane works on.
#[derive(CubeType)]
pub(super) struct Share {
    /// First channel of the group.
    pub(super) channel: usize,
    pub(super) run: usize,
    pub(super) start: usize,
    pub(super) end: usize,
    pub(super) lane: usize,
}

#[cube]
pub(super) fn share(call: &Call, #[comptime] plan: Plan) -> Share {
    let plane = CUBE_POS * comptime!(plan.planes) + UNIT_POS as usize / comptime!(plan.lanes);
    let run = plane / call.groups;
    let start = min(run * comptime!(plan.run), call.tokens);
    Share {
        channel: plane % call.groups * comptime!(plan.group),
        run,
        start,
        end: min(start + comptime!(plan.run), call.tokens),
        lane: UNIT_POS as usize % comptime!(plan.lanes),
    }
}

/// The lane's `n`th place within the group, and whether there is one.
#[cube]
pub(super) fn inside(share: &Share, #[comptime] n: usize, #[comptime] plan: Plan) -> usize {
    (share.lane + comptime!(n * plan.lanes)) * comptime!(plan.vector)
}

/// A lane's vectors of a token; zero past the group's end.
#[cube]
pub(super) fn load<I: Float, V: Size>(
    from: &[I],
    place: &Place,
    token: usize,
    share: &Share,
    #[comptime] plan: Plan,
) -> Array<Vector<f32, V>> {
    let from = from.as_vectorized().with_vector_size::<V>();
    let mut values = Array::<Vector<f32, V>>::new(comptime!(plan.shares()));
    #[unroll]
    for n in 0..comptime!(plan.shares()) {
        values[n] = Vector::new(0.0f32);
        let inside = inside(share, n, plan);
        if inside < comptime!(plan.group) {
            let at = place.offset + token * place.row + share.channel + inside;
            values[n] = Vector::<f32, V>::cast_from(from[at / comptime!(plan.vector)]);
        }
    }
    values
}

/// A lane's vectors into a token.
#[cube]
pub(super) fn store<I: Float, V: Size>(
    values: &Array<Vector<f32, V>>,
    to: &mut [I],
    place: &Place,
    token: usize,
    share: &Share,
    #[comptime] plan: Plan,
) {
    let to = to.as_vectorized_mut().with_vector_size_mut::<V>();
    #[unroll]
    for n in 0..comptime!(plan.shares()) {
        let inside = inside(share, n, plan);
        if inside < comptime!(plan.group) {
            let at = place.offset + token * place.row + share.channel + inside;
            to[at / comptime!(plan.vector)] = Vector::<I, V>::cast_from(values[n]);
        }
    }
}

/// The parameter's vectors of the lane.
#[cube]
pub(super) fn load_weight<V: Size>(
    weight: &[f32],
    share: &Share,
    #[comptime] plan: Plan,
) -> Array<Vector<f32, V>> {
    let start = Place {
        offset: 0usize.runtime(),
        row: 0usize.runtime(),
    };
    load::<f32, V>(weight, &start, 0usize, share, plan)
}

/// `sum of a b` over the group, the same in every lane.
#[cube]
pub(super) fn inner<V: Size>(
    a: &Array<Vector<f32, V>>,
    b: &Array<Vector<f32, V>>,
    #[comptime] plan: Plan,
) -> f32 {
    let mut sum = 0.0f32;
    #[unroll]
    for n in 0..comptime!(plan.shares()) {
        let product = a[n] * b[n];
        #[unroll]
        for lane in 0..comptime!(plan.vector) {
            sum += product.extract(lane);
        }
    }
    if comptime!(plan.lanes > 1) {
        sum = plane_sum(sum);
    }
    sum
}

/// A unit's share of a token's channels.
type Channels<V> = Array<Vector<f32, V>>;

/// What the norm is taken of, and the factor behind it.
#[cube]
pub(super) fn gate<V: Size>(
    x: &Array<Vector<f32, V>>,
    z: &Array<Vector<f32, V>>,
    #[comptime] plan: Plan,
) -> (Channels<V>, Channels<V>) {
    let mut normed = Array::<Vector<f32, V>>::new(comptime!(plan.shares()));
    let mut factor = Array::<Vector<f32, V>>::new(comptime!(plan.shares()));
    #[unroll]
    for n in 0..comptime!(plan.shares()) {
        normed[n] = x[n];
        factor[n] = Vector::new(1.0f32);
        if comptime!(plan.gated) {
            let silu = z[n] * sigmoid::<V>(z[n]);
            if comptime!(plan.norm_first) {
                factor[n] = silu;
            } else {
                normed[n] = x[n] * silu;
            }
        }
    }
    (normed, factor)
}

/// `1 / sqrt(mean(v^2) + eps)`.
#[cube]
pub(super) fn reciprocal_rms<V: Size>(
    normed: &Array<Vector<f32, V>>,
    eps: f32,
    #[comptime] plan: Plan,
) -> f32 {
    let mean = inner::<V>(normed, normed, plan) / comptime!(plan.group as f32);
    1.0f32 / (mean + eps).sqrt()
}

#[cube(launch, address_type = "dynamic")]
pub(super) fn forward<I: Float, V: Size>(
    x: &[I],
    z: &[I],
    weight: &[f32],
    y: &mut [I],
    call: &Call,
    #[comptime] plan: Plan,
    #[define(I)] _dtype: ElemType,
    #[define(V)] _vector: usize,
) {
    let share = share(call, plan);
    let weight = load_weight::<V>(weight, &share, plan);
    for token in share.start..share.end {
        let x = load::<I, V>(x, &call.x, token, &share, plan);
        let z = load::<I, V>(z, &call.z, token, &share, plan);
        let (mut normed, factor) = gate::<V>(&x, &z, plan);
        let scale = Vector::<f32, V>::new(reciprocal_rms::<V>(&normed, call.eps, plan));
        #[unroll]
        for n in 0..comptime!(plan.shares()) {
            normed[n] = normed[n] * scale * weight[n] * factor[n];
        }
        store::<I, V>(&normed, y, &call.out, token, &share, plan);
    }
}

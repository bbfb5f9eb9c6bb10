//! The gradients of the steps: what every token's decay carries on, added up along the chunk.

use cubecl::prelude::*;

use super::tiles::{Share, Spot, Tiles, half_planes, kept_parts, slots, tokens_per_lane};
use crate::ops::cube::fragment::LANES;
use crate::ops::ssd::cube::plan::{Call, Plan};

/// `<h, g>` of every head, in parts.
#[cube]
pub(super) fn inner_of_states<E: Float, V: Size>(
    tiles: &mut Tiles<E>,
    spot: &Spot,
    #[comptime] plan: Plan,
) {
    let count = comptime!(kept_parts(plan));
    let vectors = comptime!(plan.state_padded() / plan.vector_n);
    let behind = comptime!(plan.channels() * plan.stride_n() / plan.vector_n);
    let states = tiles.states.as_vectorized().with_vector_size::<V>();
    let mut n = UNIT_POS as usize;
    while n < comptime!(plan.heads * kept_parts(plan)) {
        let mut sum = Vector::<f32, V>::new(0.0f32);
        let mut place = n % count;
        while place < comptime!(plan.headdim_padded() * plan.state_padded() / plan.vector_n) {
            let row = n / count * comptime!(plan.headdim_padded()) + place / vectors;
            let row = spot.states + row;
            let at = row * comptime!(plan.stride_n() / plan.vector_n) + place % vectors;
            let (h, g) = (
                Vector::<f32, V>::cast_from(states[at]),
                Vector::<f32, V>::cast_from(states[behind + at]),
            );
            sum = fma(h, g, sum);
            place += count;
        }
        let mut total = 0.0f32;
        #[unroll]
        for lane in 0..comptime!(plan.vector_n) {
            total += sum.extract(lane);
        }
        tiles.kept[spot.slot * count + n] = total;
        n += comptime!(plan.gradient_units());
    }
}

/// The gradients of the steps, and the terms of the gradient of `A`: a plane of the later half runs over a head's
/// tokens, a lane over a few neighbouring ones.
#[cube]
pub(super) fn store_steps<E: Float>(
    tiles: &Tiles<E>,
    a: &[f32],
    first_head: usize,
    first_slot: usize,
    own: &Share,
    dsteps: &mut [f32],
    decays: &mut [f32],
    call: &Call,
    #[comptime] plan: Plan,
) {
    let lane = UNIT_POS_PLANE as usize;
    let each = comptime!(tokens_per_lane(plan));
    let mut head = UNIT_POS as usize / LANES;
    while head < comptime!(plan.heads) {
        let base = (first_slot + head) * comptime!(plan.chunk);
        let behind = comptime!(slots(plan)) + base;
        // What a token's decay carries on to the tokens behind it, and takes from those before it.
        let mut later = Array::<f32>::new(each);
        let mut earlier = Array::<f32>::new(each);
        let mut all_later = 0.0f32;
        let mut all_earlier = 0.0f32;
        #[unroll]
        for n in 0..each {
            let token = lane * each + n;
            let exists = token < comptime!(plan.chunk);
            let at = select(exists, token, 0usize);
            let step = tiles.step[base + at];
            let value =
                tiles.pairs[base + at] - step * tiles.pairs[behind + at] + tiles.through[base + at];
            later[n] = select(exists, value, 0.0f32);
            earlier[n] = select(exists, step * tiles.through[behind + at], 0.0f32);
            all_later += later[n];
            all_earlier += earlier[n];
        }
        let kept = plane_sum(lane_part_of_kept::<E>(tiles, first_slot + head, plan));
        let end = tiles.sum[base + comptime!(plan.chunk - 1)];
        let mut through = kept * end.exp();
        through += sum_behind(all_later, lane);
        through += sum_before(all_earlier, lane);
        #[unroll]
        for n in 0..each {
            let token = lane * each + n;
            if token < comptime!(plan.chunk) {
                let mut value = through;
                #[unroll]
                for m in 0..each {
                    if comptime!(m >= n) {
                        value += later[m];
                    } else {
                        value += earlier[m];
                    }
                }
                let row = (own.batch * call.chunks + own.chunk) * comptime!(plan.chunk) + token;
                let place = row * call.heads + first_head + head;
                let direct = tiles.diagonal[base + token]
                    + tiles.pairs[behind + token]
                    + tiles.through[behind + token];
                dsteps[place] = direct + a[(first_head + head) / comptime!(plan.parts)] * value;
                decays[place] = value * tiles.step[base + token];
            }
        }
        head += comptime!(half_planes(plan));
    }
}

/// A lane's parts of `<h, g>`.
#[cube]
fn lane_part_of_kept<E: Float>(tiles: &Tiles<E>, slot: usize, #[comptime] plan: Plan) -> f32 {
    let count = comptime!(kept_parts(plan));
    let mut sum = 0.0f32;
    let mut part = UNIT_POS_PLANE as usize;
    while part < count {
        sum += tiles.kept[slot * count + part];
        part += LANES;
    }
    sum
}

/// The sum over the lanes behind a unit's own.
#[cube]
fn sum_behind(value: f32, lane: usize) -> f32 {
    let mut sum = value;
    #[unroll]
    for n in 0..5u32 {
        let reach = comptime!(1u32 << n);
        let other = plane_shuffle_down(sum, reach);
        sum += select(lane + comptime!(1usize << n) < LANES, other, 0.0f32);
    }
    let all = plane_shuffle_down(sum, 1u32);
    select(lane + 1 < LANES, all, 0.0f32)
}

/// The sum over the lanes before a unit's own.
#[cube]
fn sum_before(value: f32, lane: usize) -> f32 {
    let mut sum = value;
    #[unroll]
    for n in 0..5u32 {
        let reach = comptime!(1u32 << n);
        let other = plane_shuffle_up(sum, reach);
        sum += select(lane >= comptime!(1usize << n), other, 0.0f32);
    }
    let all = plane_shuffle_up(sum, 1u32);
    select(lane >= 1, all, 0.0f32)
}

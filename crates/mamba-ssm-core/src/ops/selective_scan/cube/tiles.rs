//! Tiles of tokens: from memory through registers into shared memory, and results back.

use cubecl::prelude::*;

use super::common::{Call, GroupStrides, Own, Plan, Strides, total};

/// The first channel and token of a unit's `i`th vector of a tile.
#[cube]
pub(super) fn spot(#[comptime] i: usize, #[comptime] plan: Plan) -> (usize, usize) {
    let n = UNIT_POS as usize + comptime!(i * plan.units);
    let row = comptime!(plan.row_spots());
    let mut channel = n / row;
    let mut token = n % row * comptime!(plan.width);
    if comptime!(!plan.by_token) {
        channel = n % row * comptime!(plan.width);
        token = n / row;
    }
    (channel, token)
}

/// Whether the vector is of the tile at all.
#[cube]
pub(super) fn in_tile(#[comptime] i: usize, #[comptime] plan: Plan) -> bool {
    let mut inside = true.runtime();
    if comptime!((i + 1) * plan.units > plan.spots()) {
        inside = UNIT_POS as usize + comptime!(i * plan.units) < comptime!(plan.spots());
    }
    inside
}

/// Whether the vector's elements exist: all do or none.
#[cube]
pub(super) fn exists(
    own: &Own,
    start: usize,
    call: &Call,
    #[comptime] i: usize,
    #[comptime] plan: Plan,
) -> bool {
    let (channel, token) = spot(i, plan);
    in_tile(i, plan) && channel < own.channels && start + token < call.length
}

/// Where the vector lies in a tensor, in vectors.
#[cube]
pub(super) fn place(
    at: &Strides,
    own: &Own,
    start: usize,
    #[comptime] i: usize,
    #[comptime] plan: Plan,
) -> usize {
    let (channel, token) = spot(i, plan);
    let inside = (start + token) * at.token + (own.first + channel) * at.channel;
    (own.batch * at.batch + inside) / comptime!(plan.width)
}

/// A unit's `i`th vector of the tile that starts at token `start`; of a tile that is not whole, zeros where it does
/// not exist.
#[cube]
fn fetch<I: Float, W: Size>(
    from: &[I],
    at: &Strides,
    own: &Own,
    start: usize,
    call: &Call,
    #[comptime] i: usize,
    #[comptime] whole: bool,
    #[comptime] plan: Plan,
) -> Vector<I, W> {
    let from = from.as_vectorized().with_vector_size::<W>();
    if comptime!(whole) {
        from[place(at, own, start, i, plan)]
    } else {
        let exists = exists(own, start, call, i, plan);
        // A select rather than a branch, so that the reads do not wait for each other.
        let value = from[select(exists, place(at, own, start, i, plan), 0usize)];
        select(exists, value, Vector::new(I::from_int(0)))
    }
}

/// Writes a unit's `i`th vector, if it exists.
#[cube]
pub(super) fn send<I: Float, W: Size>(
    value: Vector<f32, W>,
    to: &mut [I],
    own: &Own,
    start: usize,
    call: &Call,
    #[comptime] i: usize,
    #[comptime] plan: Plan,
) {
    if exists(own, start, call, i, plan) {
        let to = to.as_vectorized_mut().with_vector_size_mut::<W>();
        to[place(&call.out, own, start, i, plan)] = Vector::cast_from(value);
    }
}

/// A parameter of the channels of the vector; of the first channel where they do not exist.
#[cube]
pub(super) fn parameter<W: Size>(
    from: &[f32],
    own: &Own,
    #[comptime] i: usize,
    #[comptime] plan: Plan,
) -> Vector<f32, W> {
    let (channel, _) = spot(i, plan);
    let channel = own.first + select(channel < own.channels, channel, 0usize);
    let mut value = Vector::<f32, W>::new(from[channel]);
    if comptime!(!plan.by_token) {
        let from = from.as_vectorized().with_vector_size::<W>();
        value = from[channel / comptime!(plan.width)];
    }
    value
}

/// Writes a unit's `i`th vector into a tile.
#[cube]
pub(super) fn put<W: Size>(
    value: Vector<f32, W>,
    tile: &mut Shared<[f32]>,
    #[comptime] i: usize,
    #[comptime] plan: Plan,
) {
    let (channel, token) = spot(i, plan);
    let place = channel * comptime!(plan.stride()) + token;
    if in_tile(i, plan) {
        if comptime!(plan.by_token) {
            let tile = tile.as_vectorized_mut().with_vector_size_mut::<W>();
            tile[place / comptime!(plan.width)] = value;
        } else {
            #[unroll]
            for k in 0..comptime!(plan.width) {
                tile[place + k * comptime!(plan.stride())] = value.extract(k);
            }
        }
    }
}

/// Reads it back; of a vector outside the tile anything.
#[cube]
pub(super) fn get<W: Size>(
    tile: &Shared<[f32]>,
    #[comptime] i: usize,
    #[comptime] plan: Plan,
) -> Vector<f32, W> {
    let (channel, token) = spot(i, plan);
    let place = channel * comptime!(plan.stride()) + token;
    let mut value = Vector::<f32, W>::new(0.0f32);
    if in_tile(i, plan) {
        if comptime!(plan.by_token) {
            let tile = tile.as_vectorized().with_vector_size::<W>();
            value = tile[place / comptime!(plan.width)];
        } else {
            #[unroll]
            for k in 0..comptime!(plan.width) {
                value.insert(k, tile[place + k * comptime!(plan.stride())]);
            }
        }
    }
    value
}

/// What the units of a channel found, added up, for a unit's `i`th vector.
#[cube]
pub(super) fn add_parts<W: Size, X: Size>(
    parts: &Shared<[f32]>,
    #[comptime] i: usize,
    #[comptime] plan: Plan,
) -> Vector<f32, W> {
    let (channel, token) = spot(i, plan);
    let mut value = Vector::<f32, W>::new(0.0f32);
    if in_tile(i, plan) {
        let parts = parts.as_vectorized().with_vector_size::<X>();
        #[unroll]
        for k in 0..comptime!(plan.width) {
            let mut place = token * comptime!(plan.part_stride());
            if comptime!(plan.by_token) {
                place += k * comptime!(plan.part_stride()) + channel * comptime!(plan.split);
            } else {
                place += (channel + k) * comptime!(plan.split);
            }
            let mut sum = Vector::<f32, X>::new(0.0f32);
            #[unroll]
            for s in 0..comptime!(plan.split / plan.part_vector()) {
                sum += parts[place / comptime!(plan.part_vector()) + s];
            }
            value.insert(k, total::<X>(sum, comptime!(plan.part_vector())));
        }
    }
    value
}

/// The token and state of a unit's `i`th number of a tile of B or C.
#[cube]
fn group_spot(i: usize, #[comptime] plan: Plan) -> (usize, usize) {
    let n = UNIT_POS as usize + i * comptime!(plan.units);
    let mut token = n / comptime!(plan.padded());
    let mut state = n % comptime!(plan.padded());
    if comptime!(plan.group_by_token) {
        token = n % comptime!(plan.tokens);
        state = n / comptime!(plan.tokens);
    }
    (token, state)
}

/// Reads a unit's numbers of the group's rows of B or C into registers; zeros past the length and in the
/// padding of the state.
#[cube]
fn fetch_group<I: Float>(
    from: &[I],
    at: &GroupStrides,
    own: &Own,
    start: usize,
    call: &Call,
    into: &mut Array<I>,
    #[comptime] whole: bool,
    #[comptime] plan: Plan,
) {
    let base = own.batch * at.batch + own.group * at.group;
    #[unroll(plan.unroll)]
    for i in 0..comptime!(plan.own_group()) {
        let (token, state) = group_spot(i, plan);
        let place = base + (start + token) * at.token + state * at.state;
        if comptime!(whole) {
            into[i] = from[place];
        } else {
            let exists = token < comptime!(plan.tokens)
                && start + token < call.length
                && state < comptime!(plan.state);
            let value = from[select(exists, place, 0usize)];
            into[i] = select(exists, value, I::from_int(0));
        }
    }
}

/// Writes them into shared memory.
#[cube]
pub(super) fn put_group<I: Float>(
    values: &Array<I>,
    tile: &mut Shared<[f32]>,
    #[comptime] plan: Plan,
) {
    #[unroll(plan.unroll)]
    for i in 0..comptime!(plan.own_group()) {
        let (token, state) = group_spot(i, plan);
        if token < comptime!(plan.tokens) && state < comptime!(plan.padded()) {
            tile[token * comptime!(plan.group_stride()) + state] = f32::cast_from(values[i]);
        }
    }
}

/// A unit's share of a tile, on its way from memory while the tile before is at work.
#[derive(CubeType)]
pub(super) struct Incoming<I: Float, W: Size> {
    pub(super) u: Array<Vector<I, W>>,
    pub(super) delta: Array<Vector<I, W>>,
    pub(super) z: Array<Vector<I, W>>,
    pub(super) b: Array<I>,
    pub(super) c: Array<I>,
}

#[cube]
pub(super) fn incoming<I: Float, W: Size>(#[comptime] plan: Plan) -> Incoming<I, W> {
    Incoming::<I, W> {
        u: Array::new(comptime!(plan.own_spots())),
        delta: Array::new(comptime!(plan.own_spots())),
        z: Array::new(comptime!(plan.own_spots())),
        b: Array::new(comptime!(plan.own_group())),
        c: Array::new(comptime!(plan.own_group())),
    }
}

/// Reads a unit's share of the tile that starts at token `start`.
#[cube]
pub(super) fn fetch_tile<I: Float, W: Size>(
    u: &[I],
    delta: &[I],
    z: &[I],
    b: &[I],
    c: &[I],
    own: &Own,
    start: usize,
    call: &Call,
    into: &mut Incoming<I, W>,
    #[comptime] plan: Plan,
) {
    if is_whole(own, start, call, plan) {
        fetch_all::<I, W>(u, delta, z, b, c, own, start, call, into, true, plan);
    } else {
        fetch_all::<I, W>(u, delta, z, b, c, own, start, call, into, false, plan);
    }
}

/// Whether all of a tile exists, and every unit brings in as many of everything. Nearly always; and numbers of 16
/// bits are selected one by one, which costs more than the reads.
#[cube]
fn is_whole(own: &Own, start: usize, call: &Call, #[comptime] plan: Plan) -> bool {
    let channels = comptime!(plan.is_even()) && own.channels >= comptime!(plan.channels());
    channels && start + comptime!(plan.tokens) <= call.length
}

/// A unit's vectors of one tensor's tile.
#[cube]
pub(super) fn fetch_spots<I: Float, W: Size>(
    from: &[I],
    at: &Strides,
    own: &Own,
    start: usize,
    call: &Call,
    into: &mut Array<Vector<I, W>>,
    #[comptime] plan: Plan,
) {
    let whole = is_whole(own, start, call, plan);
    #[unroll]
    for i in 0..comptime!(plan.own_spots()) {
        if whole {
            into[i] = fetch::<I, W>(from, at, own, start, call, i, true, plan);
        } else {
            into[i] = fetch::<I, W>(from, at, own, start, call, i, false, plan);
        }
    }
}

#[cube]
fn fetch_all<I: Float, W: Size>(
    u: &[I],
    delta: &[I],
    z: &[I],
    b: &[I],
    c: &[I],
    own: &Own,
    start: usize,
    call: &Call,
    into: &mut Incoming<I, W>,
    #[comptime] whole: bool,
    #[comptime] plan: Plan,
) {
    #[unroll]
    for i in 0..comptime!(plan.own_spots()) {
        into.u[i] = fetch::<I, W>(u, &call.u, own, start, call, i, whole, plan);
        into.delta[i] = fetch::<I, W>(delta, &call.delta, own, start, call, i, whole, plan);
        if comptime!(plan.gate) {
            into.z[i] = fetch::<I, W>(z, &call.z, own, start, call, i, whole, plan);
        }
    }
    fetch_group::<I>(b, &call.b, own, start, call, &mut into.b, whole, plan);
    fetch_group::<I>(c, &call.c, own, start, call, &mut into.c, whole, plan);
}

//! What both passes share: who owns what, and tiles brought into shared memory.
//!
//! A cube owns one batch entry and a block of channels of one group and walks the tokens in tiles. The
//! states of a channel are split over neighbouring units, so that the sums over states and channels meet
//! in shared memory or in shuffles and never in global memory. Tensors may lie with tokens or with
//! channels side by side; tiles lie with the tokens of a channel side by side.

use cubecl::prelude::*;

use crate::ops::cube::math::softplus;

/// Between the rows of tiles beyond their width: rows of neighbouring channels or tokens then fall into
/// different banks, and vectors of four stay aligned.
const GAP: usize = 4;

/// Tokens that a unit reads of a tile at once.
pub(super) const STEP: usize = 4;

/// What a kernel is compiled for. Sizes are powers of two, where not said otherwise.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Plan {
    /// Size of the state, any number.
    pub(super) state: usize,
    /// Units of a cube.
    pub(super) units: usize,
    /// Neighbouring units that share the states of a channel.
    pub(super) split: usize,
    /// Channels of a unit.
    pub(super) shares: usize,
    /// States of a unit: so many vectors of so many.
    pub(super) vectors: usize,
    pub(super) vector: usize,
    /// Neighbouring units that add up over their channels by shuffles; `split` where there are none.
    pub(super) lanes: usize,
    /// Tokens of a tile.
    pub(super) tokens: usize,
    /// Tokens between two states that are kept.
    pub(super) chunk: usize,
    /// Tokens whose gradients of B and C wait in shared memory.
    pub(super) waiting: usize,
    /// Elements of u and its like read at once.
    pub(super) width: usize,
    /// Whether the tokens of a channel lie side by side (else the channels of a token).
    pub(super) by_token: bool,
    /// The same of B and C.
    pub(super) group_by_token: bool,
    pub(super) softplus: bool,
    pub(super) bias: bool,
    pub(super) skip: bool,
    pub(super) gate: bool,
    pub(super) initial: bool,
    /// Whether the states between chunks are to be written.
    pub(super) keep: bool,
    /// Whether the states stay in registers: then nothing may be indexed at run time.
    pub(super) unroll: bool,
}

impl Plan {
    /// Channels of a cube.
    pub(super) fn channels(&self) -> usize {
        self.units / self.split * self.shares
    }

    /// Channels between two of a unit.
    pub(super) fn apart(&self) -> usize {
        self.units / self.split
    }

    /// States of a unit.
    pub(super) fn own_states(&self) -> usize {
        self.vectors * self.vector
    }

    /// States of a channel, with the padding.
    pub(super) fn padded(&self) -> usize {
        self.split * self.own_states()
    }

    /// Between the channels of a tile.
    pub(super) fn stride(&self) -> usize {
        self.tokens + GAP
    }

    /// Elements of a tile of tokens and channels.
    pub(super) fn tile(&self) -> usize {
        self.channels() * self.stride()
    }

    /// Between the tokens of a tile of B or C.
    pub(super) fn group_stride(&self) -> usize {
        self.padded() + GAP
    }

    /// Elements of a tile of B or C.
    pub(super) fn group_tile(&self) -> usize {
        self.tokens * self.group_stride()
    }

    /// Between the tokens of what the units found.
    pub(super) fn part_stride(&self) -> usize {
        self.channels() * self.split + GAP
    }

    /// Elements of what the units found.
    pub(super) fn parts(&self) -> usize {
        self.tokens * self.part_stride()
    }

    /// Vectors of a tile.
    pub(super) fn spots(&self) -> usize {
        self.channels() * self.tokens / self.width
    }

    /// Vectors that lie side by side.
    fn row_spots(&self) -> usize {
        let row = if self.by_token {
            self.tokens
        } else {
            self.channels()
        };
        row / self.width
    }

    /// Vectors of a tile that a unit brings in.
    pub(super) fn own_spots(&self) -> usize {
        self.spots().div_ceil(self.units)
    }

    /// Numbers of a tile of B or C that a unit brings in.
    pub(super) fn own_group(&self) -> usize {
        (self.tokens * self.padded()).div_ceil(self.units)
    }

    /// Whether every unit brings in as many of everything, padding of the state aside.
    fn is_even(&self) -> bool {
        self.spots().is_multiple_of(self.units)
            && (self.tokens * self.state).is_multiple_of(self.units)
            && self.state == self.padded()
    }

    /// Elements read at once of what the units of a channel found.
    pub(super) fn part_vector(&self) -> usize {
        self.split.min(4)
    }
}

/// Between the entries, tokens and channels of a tensor, in elements.
#[derive(CubeType, CubeLaunch, Clone, Copy)]
pub(super) struct Strides {
    pub(super) batch: usize,
    pub(super) token: usize,
    pub(super) channel: usize,
}

/// The same of B or C.
#[derive(CubeType, CubeLaunch, Clone, Copy)]
pub(super) struct GroupStrides {
    pub(super) batch: usize,
    pub(super) token: usize,
    pub(super) group: usize,
    pub(super) state: usize,
}

/// Numbers of a call.
#[derive(CubeType, CubeLaunch, Clone)]
pub(super) struct Call {
    /// Cubes with work.
    pub(super) cubes: usize,
    pub(super) length: usize,
    pub(super) dim: usize,
    pub(super) groups: usize,
    /// Blocks of channels of a group.
    pub(super) blocks: usize,
    /// States kept per channel.
    pub(super) chunks: usize,
    pub(super) u: Strides,
    pub(super) delta: Strides,
    pub(super) z: Strides,
    /// Of y forwards, of all gradients like it backwards.
    pub(super) out: Strides,
    pub(super) b: GroupStrides,
    pub(super) c: GroupStrides,
}

/// What a cube owns: channels from `first` on.
#[derive(CubeType)]
pub(super) struct Own {
    pub(super) batch: usize,
    pub(super) group: usize,
    pub(super) block: usize,
    pub(super) first: usize,
    /// Channels that exist.
    pub(super) channels: usize,
}

#[cube]
pub(super) fn own(call: &Call, #[comptime] plan: Plan) -> Own {
    let block = CUBE_POS % call.blocks;
    let group = CUBE_POS / call.blocks % call.groups;
    let per_group = call.dim / call.groups;
    let inside = block * comptime!(plan.channels());
    Own {
        batch: CUBE_POS / call.blocks / call.groups,
        group,
        block,
        first: group * per_group + inside,
        channels: min(comptime!(plan.channels()).runtime(), per_group - inside),
    }
}

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

/// The sum of a vector's elements.
#[cube]
pub(super) fn total<V: Size>(vector: Vector<f32, V>, #[comptime] size: usize) -> f32 {
    let mut sum = vector.extract(0usize);
    #[unroll]
    for k in 1..size {
        sum += vector.extract(k);
    }
    sum
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

/// The channel of a unit's share, counted from the block's first.
#[cube]
pub(super) fn own_channel(share: usize, #[comptime] plan: Plan) -> usize {
    UNIT_POS as usize / comptime!(plan.split) + share * comptime!(plan.apart())
}

/// A unit's place among those that share a channel.
#[cube]
pub(super) fn own_part(#[comptime] plan: Plan) -> usize {
    UNIT_POS as usize % comptime!(plan.split)
}

/// A unit's vector of a token's row of B or C.
#[cube]
pub(super) fn group_vector<V: Size>(
    tile: &Shared<[f32]>,
    token: usize,
    q: usize,
    #[comptime] plan: Plan,
) -> Vector<f32, V> {
    let tile = tile.as_vectorized().with_vector_size::<V>();
    let row = token * comptime!(plan.group_stride() / plan.vector);
    tile[row + own_part(plan) * comptime!(plan.vectors) + q]
}

/// A unit's states of `[.., dim, state]`, in vectors; zeros where there are none.
#[cube]
pub(super) fn read_states<V: Size>(
    from: &[f32],
    row: usize,
    own: &Own,
    call: &Call,
    #[comptime] plan: Plan,
) -> Array<Vector<f32, V>> {
    let mut states = Array::<Vector<f32, V>>::new(comptime!(plan.shares * plan.vectors));
    #[unroll(plan.unroll)]
    for r in 0..comptime!(plan.shares) {
        let channel = own_channel(r, plan);
        let base = (row * call.dim + own.first + channel) * comptime!(plan.state);
        #[unroll(plan.unroll)]
        for q in 0..comptime!(plan.vectors) {
            let first = own_part(plan) * comptime!(plan.own_states()) + q * comptime!(plan.vector);
            let mut value = Vector::<f32, V>::new(0.0f32);
            #[unroll]
            for k in 0..comptime!(plan.vector) {
                if channel < own.channels && first + k < comptime!(plan.state) {
                    value.insert(k, from[base + first + k]);
                }
            }
            states[r * comptime!(plan.vectors) + q] = value;
        }
    }
    states
}

/// Writes them; `stride` between rows and `offset` before the first let them lie within longer rows.
#[cube]
pub(super) fn write_states<V: Size>(
    states: &Array<Vector<f32, V>>,
    to: &mut [f32],
    start: usize,
    own: &Own,
    #[comptime] plan: Plan,
) {
    #[unroll(plan.unroll)]
    for r in 0..comptime!(plan.shares) {
        let channel = own_channel(r, plan);
        let base = start + (own.first + channel) * comptime!(plan.state);
        #[unroll(plan.unroll)]
        for q in 0..comptime!(plan.vectors) {
            let first = own_part(plan) * comptime!(plan.own_states()) + q * comptime!(plan.vector);
            #[unroll]
            for k in 0..comptime!(plan.vector) {
                if channel < own.channels && first + k < comptime!(plan.state) {
                    to[base + first + k] = states[r * comptime!(plan.vectors) + q].extract(k);
                }
            }
        }
    }
}

/// Where a unit's states before a chunk are kept, in vectors: `[batch, chunks, dim, padded state]`.
#[cube]
pub(super) fn kept_place(
    chunk: usize,
    share: usize,
    own: &Own,
    call: &Call,
    #[comptime] plan: Plan,
) -> usize {
    let row = (own.batch * call.chunks + chunk) * call.dim + own.first + own_channel(share, plan);
    (row * comptime!(plan.split) + own_part(plan)) * comptime!(plan.vectors)
}

/// Delta before the softplus.
#[cube]
pub(super) fn raw_step<I: Float, W: Size>(
    delta: Vector<I, W>,
    bias: &[f32],
    own: &Own,
    #[comptime] i: usize,
    #[comptime] plan: Plan,
) -> Vector<f32, W> {
    let mut value = Vector::<f32, W>::cast_from(delta);
    if comptime!(plan.bias) {
        value += parameter::<W>(bias, own, i, plan);
    }
    value
}

/// The step; zero where there is no token, so that it neither decays nor adds.
#[cube]
pub(super) fn step<W: Size>(
    raw: Vector<f32, W>,
    own: &Own,
    start: usize,
    call: &Call,
    #[comptime] i: usize,
    #[comptime] plan: Plan,
) -> Vector<f32, W> {
    let mut value = Vector::<f32, W>::new(0.0f32);
    if exists(own, start, call, i, plan) {
        value = raw;
        if comptime!(plan.softplus) {
            value = softplus::<W>(raw);
        }
    }
    value
}

/// Four tokens of a channel of a tile.
#[cube]
pub(super) fn four(
    tile: &Shared<[f32]>,
    share: usize,
    block: usize,
    #[comptime] plan: Plan,
) -> Vector<f32, Const<4>> {
    let tile = tile.as_vectorized().with_vector_size::<Const<4>>();
    tile[own_channel(share, plan) * comptime!(plan.stride() / STEP) + block]
}

//! What both passes share: who owns what, steps and states. `tiles` brings tokens into shared memory.
//!
//! A cube owns one batch entry and a block of channels of one group and walks the tokens in tiles. The
//! states of a channel are split over neighbouring units, so that the sums over states and channels meet
//! in shared memory or in shuffles and never in global memory. Tensors may lie with tokens or with
//! channels side by side; tiles lie with the tokens of a channel side by side.

use cubecl::prelude::*;

use super::tiles::{exists, parameter};
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
    pub(super) fn row_spots(&self) -> usize {
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
    pub(super) fn is_even(&self) -> bool {
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

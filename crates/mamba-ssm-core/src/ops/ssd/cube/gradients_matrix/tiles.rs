//! Shared memory of the pass for gradients, and how a tile's operands come into it.

use cubecl::prelude::*;

use crate::ops::cube::SIDE;
use crate::ops::cube::fragment::{LANES, own_row};
use crate::ops::cube::tile::{fetch, put};
use crate::ops::ssd::cube::plan::{ALIGNMENT, CUBE_BYTES, Call, Plan};
use crate::ops::ssd::cube::steps::{bounded, carried_step, last_of_block};

/// Planes of a half; also the parts in which the gradient of D is summed over a chunk.
pub(in super::super) fn half_planes(plan: Plan) -> usize {
    plan.chunk / SIDE
}

/// Parts of `<h, g>` of a head.
pub(super) fn kept_parts(plan: Plan) -> usize {
    (plan.gradient_units() / plan.heads).max(1)
}

/// Tokens of a chunk that a lane treats when a plane runs over them.
pub(super) fn tokens_per_lane(plan: Plan) -> usize {
    plan.chunk.div_ceil(LANES)
}

/// Whose tokens a plane owns.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Half {
    Later,
    Earlier,
}

impl Half {
    /// Where the own half lies in tiles, and where the other.
    pub(super) fn own(self) -> usize {
        self as usize
    }

    pub(super) fn other(self) -> usize {
        1 - self as usize
    }
}

/// Tiles whose tokens' numbers are in shared memory: those of one are found while the next is at work and the one
/// behind that comes in.
const SLOT_TILES: usize = 3;

/// Numbers of a half's tokens: of every head of so many tiles.
pub(super) fn slots(plan: Plan) -> usize {
    SLOT_TILES * plan.heads * plan.chunk
}

/// The slot of the first head of a tile.
#[cube]
pub(super) fn first_slot(tile: usize, #[comptime] plan: Plan) -> usize {
    tile % comptime!(SLOT_TILES) * comptime!(plan.heads)
}

/// Which head of a tile is at work, and where what belongs to it lies.
#[derive(CubeType, Clone, Copy)]
pub(super) struct Spot {
    pub(super) head: usize,
    pub(super) slot: usize,
    /// The first rows of the tile's tokens and states.
    pub(super) tokens: usize,
    pub(super) states: usize,
}

/// The spot of a tile's head.
#[cube]
pub(super) fn spot_of(tile: usize, head: usize, #[comptime] plan: Plan) -> Spot {
    let mut turn = 0usize;
    if comptime!(plan.two_tiles) {
        turn = tile % 2;
    }
    Spot {
        head,
        slot: first_slot(tile, plan) + head,
        tokens: turn * comptime!(2 * plan.chunk),
        states: turn * comptime!(2 * plan.channels()),
    }
}

/// Where the terms of a unit's first or second token lie in `[2, slots, chunk]`.
#[cube]
pub(super) fn term_place(
    own: &Share,
    slot: usize,
    #[comptime] second: usize,
    #[comptime] plan: Plan,
    #[comptime] half: Half,
) -> usize {
    let before = comptime!(half.own() * slots(plan) + second * 8);
    slot * comptime!(plan.chunk) + own.token + own_row() + before
}

/// Whether there is a block of the other half's tokens so many blocks from a plane's own.
#[cube]
pub(super) fn has_block(
    own: &Share,
    #[comptime] distance: usize,
    #[comptime] plan: Plan,
    #[comptime] half: Half,
) -> bool {
    let reach = comptime!(distance * SIDE);
    if comptime!(half == Half::Earlier) {
        own.token + reach < comptime!(plan.chunk)
    } else {
        own.token >= reach
    }
}

/// Its first token in the chunk.
#[cube]
pub(super) fn token_of_block(
    own: &Share,
    #[comptime] distance: usize,
    #[comptime] half: Half,
) -> usize {
    if comptime!(half == Half::Earlier) {
        own.token + comptime!(distance * SIDE)
    } else {
        own.token - comptime!(distance * SIDE)
    }
}

/// The sum over the four units that share a row.
#[cube]
pub(super) fn sum_of_quad(value: f32) -> f32 {
    let pair = value + plane_shuffle_xor(value, 1u32);
    pair + plane_shuffle_xor(pair, 2u32)
}

/// What a cube, and in it a plane, owns.
#[derive(CubeType)]
pub(super) struct Share {
    pub(super) batch: usize,
    pub(super) chunk: usize,
    /// The first of the cube's heads.
    pub(super) head: usize,
    /// Tokens before the cube's own, and how many it has.
    pub(super) base: usize,
    pub(super) rows: usize,
    /// Whether the plane owns earlier tokens.
    pub(super) earlier: bool,
    /// The plane's first token in the chunk.
    pub(super) token: usize,
}

#[cube]
pub(super) fn share(call: &Call, #[comptime] plan: Plan) -> Share {
    let blocks = call.heads / comptime!(plan.heads) / call.tiles;
    let chunk = CUBE_POS / blocks % call.chunks;
    let batch = CUBE_POS / blocks / call.chunks;
    let start = chunk * comptime!(plan.chunk);
    let plane = UNIT_POS as usize / LANES;
    let half = plane / comptime!(half_planes(plan));
    Share {
        batch,
        chunk,
        head: CUBE_POS % blocks * call.tiles * comptime!(plan.heads),
        base: batch * call.length + start,
        rows: min(call.length - start, comptime!(plan.chunk).runtime()),
        earlier: half == 1,
        token: plane % comptime!(half_planes(plan)) * SIDE,
    }
}

/// Shared memory. Of two halves, the first is that of the later tokens.
#[derive(CubeType)]
pub(super) struct Tiles<E: Float> {
    /// dy, then x: `[2 chunk, channels]`; behind them those of the next tile, where there is room. So with the states.
    pub(super) tokens: Shared<[E]>,
    /// C, then B: `[2 chunk, state]`.
    pub(super) onto: Shared<[E]>,
    /// h, then g: `[2 channels, state]`.
    pub(super) states: Shared<[E]>,
    /// Here and below there is a slot for every head of three tiles: `[slots, chunk]` each.
    pub(super) step: Shared<[f32]>,
    pub(super) sum: Shared<[f32]>,
    /// `[2, slots, chunk]`: from a token to the last of its block of 16, times its step; and from the token
    /// before its block to it.
    pub(super) factors: Shared<[f32]>,
    /// `[2, slots, chunk]`: of a later token, the pairs with those strictly before it, each by the earlier
    /// one's step; of an earlier token, those with the ones strictly behind it.
    pub(super) pairs: Shared<[f32]>,
    /// `[2, slots, chunk]`: `exp(s) dy.(h C)` and `exp(s[Q] - s) x.(g B)`.
    pub(super) through: Shared<[f32]>,
    /// `[slots, chunk]`: the pair of a token with itself.
    pub(super) diagonal: Shared<[f32]>,
    /// `<h, g>`, in parts: `[slots, parts]`.
    pub(super) kept: Shared<[f32]>,
}

/// Bytes of shared memory of [`Tiles`] of 16 bits.
pub(in super::super) fn bytes(plan: Plan) -> usize {
    let turns = 1 + usize::from(plan.two_tiles);
    let tokens = turns * 2 * plan.tile_x().size();
    let states = turns * 2 * plan.channels() * plan.stride_n();
    let numbers = 9 * slots(plan) + SLOT_TILES * plan.heads * kept_parts(plan);
    2 * (tokens + 2 * plan.tile_n().size() + states) + 4 * numbers + CUBE_BYTES + ALIGNMENT
}

#[cube]
pub(super) fn new_tiles<E: Float>(#[comptime] plan: Plan) -> Tiles<E> {
    let size = comptime!(slots(plan));
    let turns = comptime!(1 + usize::from(plan.two_tiles));
    Tiles::<E> {
        tokens: Shared::new_aligned_slice(comptime!(turns * 2 * plan.tile_x().size()), 128usize),
        onto: Shared::new_aligned_slice(comptime!(2 * plan.tile_n().size()), 128usize),
        states: Shared::new_aligned_slice(
            comptime!(turns * 2 * plan.channels() * plan.stride_n()),
            128usize,
        ),
        step: Shared::new_aligned_slice(size, 16usize),
        sum: Shared::new_aligned_slice(size, 16usize),
        factors: Shared::new_aligned_slice(comptime!(2 * slots(plan)), 16usize),
        pairs: Shared::new_aligned_slice(comptime!(2 * slots(plan)), 16usize),
        through: Shared::new_aligned_slice(comptime!(2 * slots(plan)), 16usize),
        diagonal: Shared::new_aligned_slice(size, 16usize),
        kept: Shared::new_aligned_slice(
            comptime!(SLOT_TILES * plan.heads * kept_parts(plan)),
            16usize,
        ),
    }
}

/// What of the next tile is on its way.
#[derive(CubeType)]
pub(super) struct Next<E: Float, S: Float, VX: Size, VN: Size> {
    pub(super) x: Array<Vector<E, VX>>,
    pub(super) dy: Array<Vector<E, VX>>,
    pub(super) h: Array<Vector<S, VN>>,
    pub(super) g: Array<Vector<S, VN>>,
    pub(super) step: Array<f32>,
    /// Sums of the decays, to the token, to the one before its block of 16, and to the last of the block.
    pub(super) sum: Array<f32>,
    pub(super) before: Array<f32>,
    pub(super) behind: Array<f32>,
}

/// Vectors of a tile's states that each of so many units carries.
pub(super) fn state_shares(plan: Plan, units: usize) -> usize {
    (plan.channels() * plan.state_padded() / plan.vector_n).div_ceil(units)
}

/// Whether each carries as many.
fn shares_even(plan: Plan, units: usize) -> bool {
    (plan.channels() * plan.state_padded() / plan.vector_n).is_multiple_of(units)
}

/// A unit's share of the states at a chunk of the tile that starts at a head.
#[cube]
fn fetch_states<S: Float, V: Size>(
    states: &[S],
    batch: usize,
    chunk: usize,
    head: usize,
    into: &mut Array<Vector<S, V>>,
    call: &Call,
    #[comptime] plan: Plan,
    #[comptime] units: usize,
) {
    let entry =
        ((batch * call.chunks + chunk) * call.heads + head) * comptime!(plan.headdim * plan.state);
    let from = states.as_vectorized().with_vector_size::<V>();
    let vectors = comptime!(plan.state_padded() / plan.vector_n);
    #[unroll]
    for share in 0..comptime!(state_shares(plan, units)) {
        let place = UNIT_POS as usize + comptime!(share * units);
        let (row, n) = (place / vectors, place % vectors * comptime!(plan.vector_n));
        if comptime!(plan.headdim == plan.headdim_padded() && plan.state == plan.state_padded())
            && comptime!(shares_even(plan, units))
        {
            into[share] = from[entry / comptime!(plan.vector_n) + place];
        } else {
            let inner = row / comptime!(plan.headdim_padded());
            let p = row % comptime!(plan.headdim_padded());
            let exists = row < comptime!(plan.channels())
                && p < comptime!(plan.headdim)
                && n < comptime!(plan.state);
            let at = entry + (inner * comptime!(plan.headdim) + p) * comptime!(plan.state) + n;
            let value = from[select(exists, at / comptime!(plan.vector_n), 0usize)];
            into[share] = select(exists, value, Vector::new(S::from_int(0)));
        }
    }
}

/// Writes them into shared memory, `[channels, state]`, from element `start` on.
#[cube]
fn put_states<S: Float, E: Float, V: Size>(
    values: &Array<Vector<S, V>>,
    into: &mut Shared<[E]>,
    start: usize,
    #[comptime] plan: Plan,
    #[comptime] units: usize,
) {
    let into = into.as_vectorized_mut().with_vector_size_mut::<V>();
    let vectors = comptime!(plan.state_padded() / plan.vector_n);
    #[unroll]
    for share in 0..comptime!(state_shares(plan, units)) {
        let place = UNIT_POS as usize + comptime!(share * units);
        let (row, column) = (place / vectors, place % vectors);
        if row < comptime!(plan.channels()) {
            let at = start / comptime!(plan.vector_n)
                + row * comptime!(plan.stride_n() / plan.vector_n)
                + column;
            into[at] = Vector::<E, V>::cast_from(values[share]);
        }
    }
}

/// Reads a unit's share of a tile's tokens and their steps into registers.
#[cube]
pub(super) fn fetch_tokens<E: Float, S: Float, VX: Size, VN: Size>(
    x: &[E],
    dy: &[E],
    steps: &[f32],
    sums: &[f32],
    head: usize,
    own: &Share,
    next: &mut Next<E, S, VX, VN>,
    call: &Call,
    #[comptime] plan: Plan,
) {
    let units = comptime!(plan.gradient_units());
    let tile_x = comptime!(plan.tile_x());
    let channel = head * comptime!(plan.headdim);
    let width = call.heads * comptime!(plan.headdim);
    let from_x = call.x.offset + own.base * call.x.row + channel;
    fetch::<E, VX>(x, from_x, call.x.row, own.rows, &mut next.x, tile_x, units);
    let from_dy = own.base * width + channel;
    fetch::<E, VX>(dy, from_dy, width, own.rows, &mut next.dy, tile_x, units);
    let base = (own.batch * call.chunks + own.chunk) * comptime!(plan.chunk);
    #[unroll]
    for share in 0..comptime!(plan.step_shares(units)) {
        let (token, inner) = carried_step(share, units, plan);
        let token = min(token, comptime!(plan.chunk - 1).runtime());
        let head = head + inner;
        let place = (base + token) * call.heads + head;
        next.step[share] = steps[place];
        next.sum[share] = sums[place];
        let before = max(token / SIDE * SIDE, 1usize) - 1;
        next.before[share] = sums[(base + before) * call.heads + head];
        next.behind[share] = sums[(base + last_of_block(token)) * call.heads + head];
    }
}

/// Reads a unit's share of a tile's states.
#[cube]
pub(super) fn fetch_both_states<E: Float, S: Float, VX: Size, VN: Size>(
    states: &[S],
    dstates: &[S],
    head: usize,
    own: &Share,
    next: &mut Next<E, S, VX, VN>,
    call: &Call,
    #[comptime] plan: Plan,
) {
    let units = comptime!(plan.gradient_units());
    let (batch, chunk) = (own.batch, own.chunk);
    fetch_states::<S, VN>(states, batch, chunk, head, &mut next.h, call, plan, units);
    fetch_states::<S, VN>(dstates, batch, chunk, head, &mut next.g, call, plan, units);
}

/// Writes what [`fetch_tokens`] read into shared memory.
#[cube]
pub(super) fn put_tokens<E: Float, S: Float, VX: Size, VN: Size>(
    next: &Next<E, S, VX, VN>,
    tiles: &mut Tiles<E>,
    to: &Spot,
    #[comptime] plan: Plan,
) {
    let units = comptime!(plan.gradient_units());
    let tile_x = comptime!(plan.tile_x());
    let at = to.tokens * comptime!(tile_x.stride);
    put::<E, VX>(&next.dy, &mut tiles.tokens, at, tile_x, units);
    let behind = at + comptime!(plan.tile_x().size());
    put::<E, VX>(&next.x, &mut tiles.tokens, behind, tile_x, units);
    #[unroll]
    for share in 0..comptime!(plan.step_shares(units)) {
        let (token, head) = carried_step(share, units, plan);
        if token < comptime!(plan.chunk) {
            let at = (to.slot + head) * comptime!(plan.chunk) + token;
            let (step, sum) = (next.step[share], next.sum[share]);
            tiles.step[at] = step;
            tiles.sum[at] = sum;
            tiles.factors[at] = bounded(next.behind[share] - sum) * step;
            tiles.factors[comptime!(slots(plan)) + at] = bounded(sum - next.before[share]);
        }
    }
}

/// Writes what [`fetch_both_states`] read.
#[cube]
pub(super) fn put_both_states<E: Float, S: Float, VX: Size, VN: Size>(
    next: &Next<E, S, VX, VN>,
    tiles: &mut Tiles<E>,
    to: &Spot,
    #[comptime] plan: Plan,
) {
    let units = comptime!(plan.gradient_units());
    let at = to.states * comptime!(plan.stride_n());
    put_states::<S, E, VN>(&next.h, &mut tiles.states, at, plan, units);
    let behind = at + comptime!(plan.channels() * plan.stride_n());
    put_states::<S, E, VN>(&next.g, &mut tiles.states, behind, plan, units);
}

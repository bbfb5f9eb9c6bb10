//! The outputs of a chunk, on matrix units with fragments.
//!
//! ```text
//! y[i] = sum_{j <= i} (C[i].B[j]) exp(s[i] - s[j]) dt[j] x[j]  +  exp(s[i]) h C[i]  +  D x[i]
//! ```
//!
//! A plane owns 16 tokens and some of the heads, or of a head's channels. `C B^T`, found here or by
//! `scores_matrix`, stays in registers over all heads; decayed and masked there, it is the left operand of the
//! product with x, which is summed on top of `C H^T`.

use cubecl::prelude::*;

use super::plan::{Call, Plan};
use super::scores_matrix::read_scores;
use super::steps::bounded;
use crate::ops::cube::SIDE;
use crate::ops::cube::fragment::{
    LANES, NARROW, Pair, four_column, four_narrow, left, multiply, own_column, own_pair, own_row,
    right, right_transposed, zero_sums,
};

/// What a chunk's outputs are made of, in shared memory; of two chunks in turn, where there is room, but for the
/// state and D.
#[derive(CubeType)]
pub(super) struct Tiles<E: Float> {
    /// `[chunk, channels]`.
    pub(super) x: Shared<[E]>,
    /// `[chunk, state]`.
    pub(super) b: Shared<[E]>,
    pub(super) c: Shared<[E]>,
    /// The state before the chunk, `[channels, state]`.
    pub(super) h: Shared<[E]>,
    /// `[channels]`.
    pub(super) d: Shared<[f32]>,
    pub(super) decays: Decays,
}

/// Of a tile's tokens, `[heads, chunk]` each.
#[derive(CubeType)]
pub(super) struct Decays {
    pub(super) step: Shared<[f32]>,
    pub(super) sum: Shared<[f32]>,
    /// The decay from a token to the last of its block of 16, times its step.
    pub(super) factor: Shared<[f32]>,
    /// That to the end of the chunk.
    pub(super) weight: Shared<[f32]>,
    /// `[heads]`: over the whole chunk.
    pub(super) whole: Shared<[f32]>,
}

/// The outputs of a plane's tokens, of the chunk at row `first` of tiles, whose scores are `given` from element
/// `from` on or found here, into `y`, whose rows of this chunk begin at element `to`; `rows` of them exist.
#[cube]
pub(super) fn outputs<E: Float>(
    tiles: &Tiles<E>,
    first: usize,
    given: &[f32],
    from: usize,
    y: &mut [E],
    to: usize,
    rows: usize,
    call: &Call,
    #[comptime] plan: Plan,
) {
    let own = task(first, plan);
    let scores = if comptime!(plan.scores_given) {
        read_scores(given, from, &own, plan)
    } else {
        similarities::<E>(&tiles.c, &tiles.b, first, own.token, plan)
    };
    // Not known when compiled, or the loop over heads would be unrolled: the code of all heads would not fit
    // the instruction cache.
    let parts = comptime!(plan.output_parts().0);
    let heads = min(call.heads, comptime!(plan.heads / parts).runtime());
    for n in 0..heads {
        let head = own.head + n * parts;
        let mut out = zero_sums(comptime!(columns(plan) / NARROW));
        carried::<E>(
            &tiles.c,
            &tiles.h,
            &tiles.decays.sum,
            &mut out,
            &own,
            head,
            plan,
        );
        mixed::<E>(&scores, &tiles.x, &tiles.decays, &mut out, &own, head, plan);
        if comptime!(plan.skip) {
            add_skip::<E>(&mut out, tiles, &own, head, plan);
        }
        let place = Placed {
            to: to + head * comptime!(plan.headdim),
            row: call.out.row,
            rows,
            token: own.token,
            channel: own.channel,
        };
        store::<E>(&out, y, &place, comptime!(columns(plan)), plan);
    }
}

/// What a plane owns.
#[derive(CubeType)]
pub(super) struct Task {
    /// The row of tiles at which the chunk begins, and the place in the decays.
    first: usize,
    steps: usize,
    /// The first of its tokens in the chunk.
    pub(super) token: usize,
    /// The first of its heads.
    head: usize,
    /// The first of its channels in a head.
    channel: usize,
}

#[cube]
fn task(first: usize, #[comptime] plan: Plan) -> Task {
    let plane = UNIT_POS as usize / LANES;
    let blocks = comptime!(plan.chunk / SIDE);
    let heads = comptime!(plan.output_parts().0);
    Task {
        first,
        steps: first * comptime!(plan.heads),
        token: plane % blocks * SIDE,
        head: plane / blocks % heads,
        channel: plane / blocks / heads * comptime!(columns(plan)),
    }
}

/// A plane's channels of a head.
fn columns(plan: Plan) -> usize {
    plan.headdim_padded() / plan.output_parts().1
}

/// `C B^T` of 16 tokens with those up to their last.
#[cube]
pub(super) fn similarities<E: Float>(
    c_tile: &Shared<[E]>,
    b_tile: &Shared<[E]>,
    first: usize,
    token: usize,
    #[comptime] plan: Plan,
) -> Array<Pair<f32>> {
    let mut scores = zero_sums(comptime!(plan.chunk / NARROW));
    let stride = comptime!(plan.stride_n());
    #[unroll]
    for step in 0..comptime!(plan.state_padded() / SIDE) {
        let k = comptime!(step * SIDE);
        let rows = left::<E>(c_tile, first + token, k, stride);
        #[unroll]
        for block in 0..comptime!(plan.chunk / SIDE) {
            if comptime!(block * SIDE) <= token {
                let column = first + comptime!(block * SIDE);
                let columns = right_transposed::<E>(b_tile, k, column, stride);
                multiply::<E>(&rows, &columns, &mut scores, comptime!(2 * block));
            }
        }
    }
    scores
}

/// `out = exp(s[i]) C H^T` of a head.
#[cube]
fn carried<E: Float>(
    c_tile: &Shared<[E]>,
    h_tile: &Shared<[E]>,
    sum: &Shared<[f32]>,
    out: &mut Array<Pair<f32>>,
    own: &Task,
    head: usize,
    #[comptime] plan: Plan,
) {
    let padded = comptime!(plan.headdim_padded());
    let stride = comptime!(plan.stride_n());
    #[unroll]
    for step in 0..comptime!(plan.state_padded() / SIDE) {
        let k = comptime!(step * SIDE);
        let rows = left::<E>(c_tile, own.first + own.token, k, stride);
        #[unroll]
        for block in 0..comptime!(columns(plan) / SIDE) {
            let column = head * padded + own.channel + comptime!(block * SIDE);
            let columns = right_transposed::<E>(h_tile, k, column, stride);
            multiply::<E>(&rows, &columns, out, comptime!(2 * block));
        }
    }
    let token = own.steps + head * comptime!(plan.chunk) + own.token + own_row();
    #[unroll]
    for half in 0..2usize {
        let decay = Pair::<f32>::new(sum[token + comptime!(half * 8)].exp());
        #[unroll]
        for n in 0..comptime!(columns(plan) / NARROW) {
            out[comptime!(2 * n + half)] *= decay;
        }
    }
}

/// `out += M X` of a head, with `M[i, j] = scores[i, j] exp(s[i] - s[j]) dt[j]` for `j <= i`.
#[cube]
fn mixed<E: Float>(
    scores: &Array<Pair<f32>>,
    x_tile: &Shared<[E]>,
    decays: &Decays,
    out: &mut Array<Pair<f32>>,
    own: &Task,
    head: usize,
    #[comptime] plan: Plan,
) {
    let base = own.steps + head * comptime!(plan.chunk);
    // By the place of blocks in the chunk, which is known when compiled, not by their distance: measured, that is 7 %
    // slower.
    #[unroll]
    for block in 0..comptime!(plan.chunk / SIDE) {
        let token = comptime!(block * SIDE).runtime();
        if token <= own.token {
            let mut rows = Array::<Pair<E>>::new(4usize);
            let at = comptime!(4 * block);
            if token == own.token {
                own_block::<E>(scores, at, decays, &mut rows, base + token);
            } else {
                let own_token = base + own.token;
                earlier_block::<E>(scores, at, decays, &mut rows, own_token, base + token);
            }
            times_x::<E>(&rows, x_tile, token, out, own, head, plan);
        }
    }
}

/// `out += rows X`, with a block of rows of `M` and the 16 tokens of x from `token` on.
#[cube]
fn times_x<E: Float>(
    rows: &Array<Pair<E>>,
    x_tile: &Shared<[E]>,
    token: usize,
    out: &mut Array<Pair<f32>>,
    own: &Task,
    head: usize,
    #[comptime] plan: Plan,
) {
    #[unroll]
    for n in 0..comptime!(columns(plan) / SIDE) {
        let column = head * comptime!(plan.headdim_padded()) + own.channel + comptime!(n * SIDE);
        let columns = right::<E>(
            x_tile,
            own.first + token,
            column,
            comptime!(plan.stride_x()),
        );
        multiply::<E>(rows, &columns, out, comptime!(2 * n));
    }
}

/// A block of `M` off the diagonal, as the left operand of a product: of 16 tokens with 16 earlier ones, whose
/// numbers begin at `token` and `other` of the decays; its scores begin at pair `at`. The decay from one token to
/// another is that to the end of the earlier one's block times that from there on.
#[cube]
fn earlier_block<E: Float>(
    scores: &Array<Pair<f32>>,
    #[comptime] at: usize,
    decays: &Decays,
    rows: &mut Array<Pair<E>>,
    token: usize,
    other: usize,
) {
    let factors = decays.factor.as_vectorized().with_vector_size::<Const<2>>();
    let others = other / 2 + own_pair();
    let edge = decays.sum[other + comptime!(SIDE - 1)];
    let token = token + own_row();
    #[unroll]
    for row in 0..2usize {
        let decay = bounded(decays.sum[token + comptime!(row * 8)] - edge);
        let decay = Pair::<f32>::new(decay);
        #[unroll]
        for side in 0..2usize {
            let score = scores[comptime!(at + 2 * side + row)];
            let factor = factors[others + comptime!(side * NARROW / 2)];
            rows[comptime!(2 * side + row)] = Pair::<E>::cast_from(score * (factor * decay));
        }
    }
}

/// A block of `M` on the diagonal, of the tokens whose numbers begin at `token` of the decays.
#[cube]
fn own_block<E: Float>(
    scores: &Array<Pair<f32>>,
    #[comptime] at: usize,
    decays: &Decays,
    rows: &mut Array<Pair<E>>,
    token: usize,
) {
    let steps = decays.step.as_vectorized().with_vector_size::<Const<2>>();
    let sums = decays.sum.as_vectorized().with_vector_size::<Const<2>>();
    let others = token / 2 + own_pair();
    let token = token + own_row();
    #[unroll]
    for n in 0..4usize {
        // Left, below, right, below right: the one on the right holds no pair, the one below all of its.
        let (row, side) = comptime!((n % 2, n / 2));
        if comptime!(row < side) {
            rows[n] = Pair::<E>::new(E::from_int(0));
        } else {
            let own_sum = decays.sum[token + comptime!(row * 8)];
            let behind = sums[others + comptime!(side * NARROW / 2)];
            let step = steps[others + comptime!(side * NARROW / 2)];
            let score = scores[comptime!(at + 2 * side + row)];
            let mut values = Pair::<f32>::new(0.0f32);
            #[unroll]
            for lane in 0..2usize {
                let mut weight = (own_sum - behind.extract(lane)).exp() * step.extract(lane);
                if comptime!(row == side) {
                    weight = select(own_column() + lane <= own_row(), weight, 0.0f32);
                }
                values.insert(lane, score.extract(lane) * weight);
            }
            rows[n] = Pair::<E>::cast_from(values);
        }
    }
}

/// Adds the skip connection.
#[cube]
fn add_skip<E: Float>(
    out: &mut Array<Pair<f32>>,
    tiles: &Tiles<E>,
    own: &Task,
    head: usize,
    #[comptime] plan: Plan,
) {
    let x = tiles.x.as_vectorized().with_vector_size::<Const<2>>();
    let d = tiles.d.as_vectorized().with_vector_size::<Const<2>>();
    // In pairs.
    let channel = head * comptime!(plan.headdim_padded() / 2) + own.channel / 2 + own_pair();
    let row = comptime!(plan.stride_x() / 2);
    let from = (own.first + own.token + own_row()) * row + channel;
    #[unroll]
    for n in 0..comptime!(columns(plan) / NARROW) {
        let weight = d[channel + comptime!(n * NARROW / 2)];
        #[unroll]
        for half in 0..2usize {
            let value = x[from + comptime!(half * 8 * row + n * NARROW / 2)];
            let at = comptime!(2 * n + half);
            out[at] = fma(Pair::<f32>::cast_from(value), weight, out[at]);
        }
    }
}

/// Where a plane's sums of 16 tokens go.
#[derive(CubeType)]
pub(super) struct Placed {
    /// The first channel of the chunk's first token, and from one token to the next.
    pub(super) to: usize,
    pub(super) row: usize,
    /// Tokens of the chunk that exist.
    pub(super) rows: usize,
    /// The plane's first token, and the first of its channels.
    pub(super) token: usize,
    pub(super) channel: usize,
}

/// Writes a plane's sums of 16 tokens and some channels of a head, four channels at a time where they lie so.
#[cube]
pub(super) fn store<E: Float>(
    out: &Array<Pair<f32>>,
    y: &mut [E],
    place: &Placed,
    #[comptime] columns: usize,
    #[comptime] plan: Plan,
) {
    let whole = comptime!(plan.vector_x >= 4 && plan.headdim.is_multiple_of(SIDE));
    if whole && place.rows >= comptime!(plan.chunk) {
        store_whole::<E>(out, y, place, columns);
    } else {
        store_existing::<E>(out, y, place, columns, plan);
    }
}

/// As [`store`], where all of them exist: without branches in between, no write waits for the numbers of another.
#[cube]
fn store_whole<E: Float>(
    out: &Array<Pair<f32>>,
    y: &mut [E],
    place: &Placed,
    #[comptime] columns: usize,
) {
    let y = y.as_vectorized_mut().with_vector_size_mut::<Const<4>>();
    #[unroll]
    for half in 0..2usize {
        let row = place.token + own_row() + comptime!(half * 8);
        let to = (place.to + row * place.row + place.channel + four_column()) / 4;
        #[unroll]
        for n in 0..comptime!(columns / SIDE) {
            let first = Pair::<E>::cast_from(out[comptime!(4 * n + half)]);
            let second = Pair::<E>::cast_from(out[comptime!(4 * n + 2 + half)]);
            y[to + comptime!(n * SIDE / 4)] = four_narrow::<E>(first, second);
        }
    }
}

/// As [`store`], each where it exists.
#[cube]
fn store_existing<E: Float>(
    out: &Array<Pair<f32>>,
    y: &mut [E],
    place: &Placed,
    #[comptime] columns: usize,
    #[comptime] plan: Plan,
) {
    let y = y.as_vectorized_mut().with_vector_size_mut::<Const<2>>();
    #[unroll]
    for half in 0..2usize {
        let row = place.token + own_row() + comptime!(half * 8);
        let to = place.to + row * place.row;
        #[unroll]
        for n in 0..comptime!(columns / NARROW) {
            let inside = place.channel + comptime!(n * NARROW) + own_column();
            if row < place.rows && inside < comptime!(plan.headdim) {
                y[(to + inside) / 2] = Pair::<E>::cast_from(out[comptime!(2 * n + half)]);
            }
        }
    }
}

//! The gradients of every chunk, from the state before it and the gradient of the state behind it.
//!
//! ```text
//! L[i, j] = exp(s[i] - s[j]), j <= i       V[i, j] = (C[i].B[j]) L[i, j] (dy[i].x[j])
//! u[j]    = sum_i (C[i].B[j]) L[i, j] dy[i]  +  exp(s[Q] - s[j]) g B[j]
//! dx[j]   = dt[j] u[j] + D dy[j]
//! dC[i]   = sum_h ( sum_j L[i, j] dt[j] (dy[i].x[j]) B[j]  +  exp(s[i]) h^T dy[i] )
//! dB[j]   = sum_h ( sum_i L[i, j] dt[j] (dy[i].x[j]) C[i]  +  exp(s[Q] - s[j]) dt[j] g^T x[j] )
//! d(dt A)[j] = sum_{i >= j > k} dt[k] V[i, k]  +  sum_{i >= j} exp(s[i]) dy[i].(h C[i])
//!            + sum_{k < j} dt[k] exp(s[Q] - s[k]) x[k].(g B[k])  +  exp(s[Q]) <h, g>
//! d(dt)[j]   = sum_i V[i, j]  +  exp(s[Q] - s[j]) x[j].(g B[j])  +  A d(dt A)[j]
//! ```
//!
//! `h` is the state before the chunk, `g` the gradient of the state behind it. The sum over pairs
//! `i >= j > k` is taken as row sums minus column sums of one f32 tile without its diagonal, so that the
//! terms that must cancel are the same numbers.
//!
//! A cube owns one chunk and a block of heads, as in the forward pass; `C B^T`, its gradient and those of
//! B and C stay with the units over all heads. Bytes: x, dy, B, C and both states read once, dx written.

use cubecl::prelude::*;

use super::outputs::{load_states, load_steps, mix, own_pairs, pair_shares};
use super::plan::{Call, Plan};
use crate::ops::cube::place::Place;
use crate::ops::cube::product::{add_product, new_sum, product, store_sum};
use crate::ops::cube::tile::load;

/// What a tile's heads found on the way to the gradients of the steps, `[heads, chunk]` each.
#[derive(CubeType)]
struct Terms {
    step: Shared<[f32]>,
    sum: Shared<[f32]>,
    /// `exp(s) dy.(h C)`, in parts.
    carried: Shared<[f32]>,
    /// `exp(s[Q] - s) x.(g B)`, in parts.
    added: Shared<[f32]>,
    /// Sums of the rows and columns of `V` below the diagonal, in parts, and the diagonal.
    rows: Shared<[f32]>,
    columns: Shared<[f32]>,
    diagonal: Shared<[f32]>,
    /// `<h, g>`, in parts, and in few parts.
    kept: Shared<[f32]>,
    few: Shared<[f32]>,
}

/// Parts of `<h, g>` that are added last.
pub(super) const KEPT: usize = 8;

/// Parts in which a sum over a head's channels is taken, so that all units have work.
pub(super) fn parts(plan: Plan) -> usize {
    (plan.team.units / (plan.chunk * plan.heads)).max(1)
}

/// Parts in which a sum over a head's state is taken.
pub(super) fn kept_parts(plan: Plan) -> usize {
    (plan.team.units / plan.heads).max(1)
}

/// Parts in which the rows and columns of a tokens-by-tokens tile are summed.
pub(super) fn pair_parts(plan: Plan) -> usize {
    (plan.team.units / (2 * plan.chunk)).clamp(1, plan.chunk)
}

/// Parts in which a sum over the chunk's tokens is taken for every channel.
pub(super) fn skip_parts(plan: Plan) -> usize {
    (plan.team.units / (plan.heads * plan.headdim)).clamp(1, plan.chunk)
}

#[cube]
fn new_terms(#[comptime] plan: Plan) -> Terms {
    let size = comptime!(plan.chunk * plan.heads);
    Terms {
        step: Shared::new_slice(size),
        sum: Shared::new_slice(size),
        carried: Shared::new_slice(comptime!(plan.chunk * plan.heads * parts(plan))),
        added: Shared::new_slice(comptime!(plan.chunk * plan.heads * parts(plan))),
        rows: Shared::new_slice(comptime!(plan.chunk * plan.heads * pair_parts(plan))),
        columns: Shared::new_slice(comptime!(plan.chunk * plan.heads * pair_parts(plan))),
        diagonal: Shared::new_slice(size),
        kept: Shared::new_slice(comptime!(plan.heads * kept_parts(plan))),
        few: Shared::new_slice(comptime!(plan.heads * KEPT)),
    }
}

#[cube(launch, address_type = "dynamic")]
pub(super) fn gradients<I: Float, E: Float, S: Float, O: Float, VX: Size, VN: Size>(
    x: &[I],
    b: &[I],
    c: &[I],
    a: &[f32],
    d: &[f32],
    dy: &[I],
    steps: &[f32],
    sums: &[f32],
    states: &[S],
    dstates: &[S],
    dx: &mut [I],
    db: &mut [O],
    dc: &mut [O],
    dsteps: &mut [f32],
    decays: &mut [f32],
    dd: &mut [f32],
    call: &Call,
    #[comptime] plan: Plan,
    #[define(I, E, S, O)] _types: [ElemType; 4],
    #[define(VX, VN)] _sizes: [usize; 2],
) {
    if CUBE_POS >= call.cubes {
        terminate!();
    }
    let team = comptime!(plan.team);
    let blocks = call.heads / comptime!(plan.heads) / call.tiles;
    let block = CUBE_POS % blocks;
    let chunk = CUBE_POS / blocks % call.chunks;
    let batch = CUBE_POS / blocks / call.chunks;
    let block_head = block * call.tiles * comptime!(plan.heads);
    let group = block_head / (call.heads / call.groups);
    let token = chunk * comptime!(plan.chunk);
    let rows = min(call.length - token, comptime!(plan.chunk).runtime());
    let base = batch * call.length + token;
    let width = call.heads * comptime!(plan.headdim);

    let tile_x = comptime!(plan.tile_x());
    let tile_n = comptime!(plan.tile_n());
    let h_size = comptime!(plan.channels() * plan.stride_n());
    let mut x_tile = Shared::<[E]>::new_aligned_slice(comptime!(tile_x.size()), 16usize);
    let mut dy_tile = Shared::<[E]>::new_aligned_slice(comptime!(tile_x.size()), 16usize);
    let mut b_tile = Shared::<[E]>::new_aligned_slice(comptime!(tile_n.size()), 16usize);
    let mut c_tile = Shared::<[E]>::new_aligned_slice(comptime!(tile_n.size()), 16usize);
    let mut h_tile = Shared::<[E]>::new_aligned_slice(h_size, 16usize);
    let mut g_tile = Shared::<[E]>::new_aligned_slice(h_size, 16usize);
    let mut mixing = Shared::<[E]>::new_aligned_slice(
        comptime!(plan.heads * plan.chunk * plan.stride_q()),
        16usize,
    );
    let mut stage =
        Shared::<[f32]>::new_aligned_slice(comptime!(plan.chunk * plan.stride_stage()), 16usize);
    let mut terms = new_terms(plan);

    let state_column = group * comptime!(plan.state);
    let b_place = call.b.offset + base * call.b.row + state_column;
    let c_place = call.c.offset + base * call.c.row + state_column;
    load::<I, E, VN>(b, b_place, call.b.row, rows, &mut b_tile, tile_n, team);
    load::<I, E, VN>(c, c_place, call.c.row, rows, &mut c_tile, tile_n, team);
    sync_cube();
    product::<E>(
        &c_tile,
        &b_tile,
        &mut stage,
        0usize,
        comptime!(plan.scores()),
        team,
    );
    sync_cube();
    let scores = own_pairs(&stage, plan);
    let mut dscores = Array::<f32>::new(comptime!(pair_shares(plan)));
    #[unroll(pair_shares(plan) <= 64)]
    for r in 0..comptime!(pair_shares(plan)) {
        dscores[r] = 0.0f32;
    }
    let mut sum_b = new_sum(comptime!(plan.onto_state()), team);
    let mut sum_c = new_sum(comptime!(plan.onto_state()), team);

    for tile in 0..call.tiles {
        let first_head = block_head + tile * comptime!(plan.heads);
        let channel = first_head * comptime!(plan.headdim);
        sync_cube();
        load_steps(
            steps,
            sums,
            batch,
            chunk,
            first_head,
            &mut terms.step,
            &mut terms.sum,
            call,
            plan,
        );
        let x_place = call.x.offset + base * call.x.row + channel;
        load::<I, E, VX>(x, x_place, call.x.row, rows, &mut x_tile, tile_x, team);
        load::<I, E, VX>(
            dy,
            base * width + channel,
            width,
            rows,
            &mut dy_tile,
            tile_x,
            team,
        );
        load_states::<S, E, VN>(states, batch, chunk, first_head, &mut h_tile, call, plan);
        load_states::<S, E, VN>(dstates, batch, chunk, first_head, &mut g_tile, call, plan);
        sync_cube();
        product::<E>(
            &c_tile,
            &h_tile,
            &mut stage,
            0usize,
            comptime!(plan.carried()),
            team,
        );
        mix::<E>(&scores, &terms.step, &terms.sum, &mut mixing, false, plan);
        inner_of_states::<E, VN>(&h_tile, &g_tile, &mut terms.kept, plan);
        sync_cube();
        inner_of_tokens::<E, VX>(
            &dy_tile,
            &stage,
            &terms.sum,
            &mut terms.carried,
            false,
            plan,
        );
        sync_cube();
        product::<E>(
            &b_tile,
            &g_tile,
            &mut stage,
            0usize,
            comptime!(plan.carried()),
            team,
        );
        sync_cube();
        inner_of_tokens::<E, VX>(&x_tile, &stage, &terms.sum, &mut terms.added, true, plan);
        sync_cube();
        decay_to_end::<VX>(&mut stage, &terms.sum, plan);
        sync_cube();
        product::<E>(
            &mixing,
            &dy_tile,
            &mut stage,
            0usize,
            comptime!(plan.mixed(true)),
            team,
        );
        sync_cube();
        store_dx::<I, E, VX>(
            &stage,
            &dy_tile,
            &terms.step,
            d,
            base,
            first_head,
            rows,
            dx,
            call,
            plan,
        );
        if comptime!(plan.skip) {
            let row = (batch * call.chunks + chunk) * comptime!(skip_parts(plan));
            skip_terms::<E>(&x_tile, &dy_tile, dd, row * width + channel, width, plan);
        }
        for head in 0..comptime!(plan.heads) {
            sync_cube();
            product::<E>(
                &dy_tile,
                &x_tile,
                &mut stage,
                head,
                comptime!(plan.pairs()),
                team,
            );
            sync_cube();
            pair_terms(&scores, &mut dscores, &mut stage, &mut terms, head, plan);
            sync_cube();
            sum_pairs(&stage, &mut terms, head, plan);
        }
        sync_cube();
        weigh::<E, VX>(&mut x_tile, &mut dy_tile, &terms.step, &terms.sum, plan);
        sync_cube();
        gather_steps(&mut terms, plan);
        add_product::<E>(
            &dy_tile,
            &h_tile,
            &mut sum_c,
            comptime!(plan.onto_state()),
            team,
        );
        add_product::<E>(
            &x_tile,
            &g_tile,
            &mut sum_b,
            comptime!(plan.onto_state()),
            team,
        );
        sync_cube();
        store_steps(
            &terms, a, batch, chunk, first_head, dsteps, decays, call, plan,
        );
    }

    sync_cube();
    own_to_tile::<E>(&dscores, &mut mixing, plan);
    sync_cube();
    add_product::<E>(
        &mixing,
        &b_tile,
        &mut sum_c,
        comptime!(plan.through_scores(false)),
        team,
    );
    add_product::<E>(
        &mixing,
        &c_tile,
        &mut sum_b,
        comptime!(plan.through_scores(true)),
        team,
    );
    let blocks_per_group = blocks / call.groups;
    let part = block % blocks_per_group;
    let entries = call.cubes / (blocks * call.chunks);
    let to = (part * entries + batch) * call.length + token;
    store_sum(&sum_c, &mut stage, comptime!(plan.onto_state()), team);
    sync_cube();
    store_rows::<O, VN>(&stage, rows, to, state_column, dc, &call.dc, plan);
    sync_cube();
    store_sum(&sum_b, &mut stage, comptime!(plan.onto_state()), team);
    sync_cube();
    store_rows::<O, VN>(&stage, rows, to, state_column, db, &call.db, plan);
}

/// `<h, g>` of every head, in parts.
#[cube]
fn inner_of_states<E: Float, V: Size>(
    h: &Shared<[E]>,
    g: &Shared<[E]>,
    kept: &mut Shared<[f32]>,
    #[comptime] plan: Plan,
) {
    let count = comptime!(kept_parts(plan));
    let vectors = comptime!(plan.state_padded() / plan.vector_n);
    let h = h.as_vectorized().with_vector_size::<V>();
    let g = g.as_vectorized().with_vector_size::<V>();
    let mut n = UNIT_POS as usize;
    while n < comptime!(plan.heads * kept_parts(plan)) {
        let head = n / count;
        let mut sum = Vector::<f32, V>::new(0.0f32);
        let mut place = n % count;
        while place < comptime!(plan.headdim_padded() * plan.state_padded() / plan.vector_n) {
            let row = head * comptime!(plan.headdim_padded()) + place / vectors;
            let at = row * comptime!(plan.stride_n() / plan.vector_n) + place % vectors;
            let (h, g) = (
                Vector::<f32, V>::cast_from(h[at]),
                Vector::<f32, V>::cast_from(g[at]),
            );
            sum = fma(h, g, sum);
            place += count;
        }
        kept[n] = lanes_sum::<V>(sum, comptime!(plan.vector_n));
        n += comptime!(plan.team.units);
    }
}

/// The sum of a vector's elements.
#[cube]
fn lanes_sum<V: Size>(vector: Vector<f32, V>, #[comptime] size: usize) -> f32 {
    let mut sum = 0.0f32;
    #[unroll]
    for lane in 0..size {
        sum += vector.extract(lane);
    }
    sum
}

/// The product of every token's channels in a tile with those in the stage, by head, in parts, times the
/// decay since the chunk's start or up to its end.
#[cube]
fn inner_of_tokens<E: Float, V: Size>(
    tile: &Shared<[E]>,
    stage: &Shared<[f32]>,
    sum: &Shared<[f32]>,
    out: &mut Shared<[f32]>,
    #[comptime] to_end: bool,
    #[comptime] plan: Plan,
) {
    let count = comptime!(parts(plan));
    let tile = tile.as_vectorized().with_vector_size::<V>();
    let stage = stage.as_vectorized().with_vector_size::<V>();
    let mut n = UNIT_POS as usize;
    while n < comptime!(plan.chunk * plan.heads * parts(plan)) {
        let row = n / count % comptime!(plan.chunk);
        let head = n / count / comptime!(plan.chunk);
        let first = head * comptime!(plan.headdim_padded() / plan.vector_x);
        let mut inner = Vector::<f32, V>::new(0.0f32);
        let mut p = n % count;
        while p < comptime!(plan.headdim / plan.vector_x) {
            let left = tile[row * comptime!(plan.stride_x() / plan.vector_x) + first + p];
            let right = stage[row * comptime!(plan.stride_stage() / plan.vector_x) + first + p];
            inner = fma(Vector::<f32, V>::cast_from(left), right, inner);
            p += count;
        }
        let mut decay = sum[head * comptime!(plan.chunk) + row];
        if comptime!(to_end) {
            decay = sum[head * comptime!(plan.chunk) + comptime!(plan.chunk - 1)] - decay;
        }
        out[n] = lanes_sum::<V>(inner, comptime!(plan.vector_x)) * decay.exp();
        n += comptime!(plan.team.units);
    }
}

/// `stage[j] *= exp(s[Q] - s[j])`.
#[cube]
fn decay_to_end<V: Size>(stage: &mut Shared<[f32]>, sum: &Shared<[f32]>, #[comptime] plan: Plan) {
    let vectors = comptime!(plan.channels() / plan.vector_x);
    let stage = stage.as_vectorized_mut().with_vector_size_mut::<V>();
    let mut n = UNIT_POS as usize;
    while n < comptime!(plan.chunk * plan.channels() / plan.vector_x) {
        let row = n / vectors;
        let column = n % vectors;
        let head = column / comptime!(plan.headdim_padded() / plan.vector_x);
        let first = head * comptime!(plan.chunk);
        let place = row * comptime!(plan.stride_stage() / plan.vector_x) + column;
        let decay = (sum[first + comptime!(plan.chunk - 1)] - sum[first + row]).exp();
        stage[place] = stage[place] * Vector::new(decay);
        n += comptime!(plan.team.units);
    }
}

/// `dx = dt u + D dy`.
#[cube]
fn store_dx<I: Float, E: Float, V: Size>(
    stage: &Shared<[f32]>,
    dy_tile: &Shared<[E]>,
    step: &Shared<[f32]>,
    d: &[f32],
    base: usize,
    first_head: usize,
    rows: usize,
    dx: &mut [I],
    call: &Call,
    #[comptime] plan: Plan,
) {
    let vector = comptime!(plan.vector_x);
    let vectors = comptime!(plan.headdim / plan.vector_x);
    let stage = stage.as_vectorized().with_vector_size::<V>();
    let dy_tile = dy_tile.as_vectorized().with_vector_size::<V>();
    let d = d.as_vectorized().with_vector_size::<V>();
    let dx = dx.as_vectorized_mut().with_vector_size_mut::<V>();
    let mut n = UNIT_POS as usize;
    while n < comptime!(plan.chunk * plan.heads * plan.headdim / plan.vector_x) {
        let inside = n % vectors * vector;
        let head = n / vectors % comptime!(plan.heads);
        let row = n / vectors / comptime!(plan.heads);
        let column = head * comptime!(plan.headdim_padded()) + inside;
        if row < rows {
            let channel = (first_head + head) * comptime!(plan.headdim) + inside;
            let dt = step[head * comptime!(plan.chunk) + row];
            let u = stage[(row * comptime!(plan.stride_stage()) + column) / vector];
            let mut value = u * Vector::new(dt);
            if comptime!(plan.skip) {
                let dy = Vector::<f32, V>::cast_from(
                    dy_tile[(row * comptime!(plan.stride_x()) + column) / vector],
                );
                value += dy * d[channel / vector];
            }
            let place = call.out.offset + (base + row) * call.out.row + channel;
            dx[place / vector] = Vector::<I, V>::cast_from(value);
        }
        n += comptime!(plan.team.units);
    }
}

/// `sum over the chunk of dy x`, per channel.
#[cube]
fn skip_terms<E: Float>(
    x_tile: &Shared<[E]>,
    dy_tile: &Shared<[E]>,
    dd: &mut [f32],
    to: usize,
    width: usize,
    #[comptime] plan: Plan,
) {
    let channels = comptime!(plan.heads * plan.headdim);
    let mut n = UNIT_POS as usize;
    while n < comptime!(plan.heads * plan.headdim * skip_parts(plan)) {
        let (part, channel) = (n / channels, n % channels);
        let head = channel / comptime!(plan.headdim);
        let column = head * comptime!(plan.headdim_padded()) + channel % comptime!(plan.headdim);
        let mut sum = 0.0f32;
        let mut row = part;
        while row < comptime!(plan.chunk) {
            let place = row * comptime!(plan.stride_x()) + column;
            sum += f32::cast_from(x_tile[place]) * f32::cast_from(dy_tile[place]);
            row += comptime!(skip_parts(plan));
        }
        dd[to + part * width + channel] = sum;
        n += comptime!(plan.team.units);
    }
}

/// From `dy[i].x[j]` in the stage: the gradient of `C B^T`, and `V` in its place, its diagonal apart.
#[cube]
fn pair_terms(
    scores: &Array<f32>,
    dscores: &mut Array<f32>,
    stage: &mut Shared<[f32]>,
    terms: &mut Terms,
    head: usize,
    #[comptime] plan: Plan,
) {
    let first = head * comptime!(plan.chunk);
    #[unroll(pair_shares(plan) <= 64)]
    for r in 0..comptime!(pair_shares(plan)) {
        let place = UNIT_POS as usize + r * comptime!(plan.team.units);
        let i = place / comptime!(plan.chunk);
        let j = place % comptime!(plan.chunk);
        let at = i * comptime!(plan.stride_stage()) + j;
        let mut value = 0.0f32;
        if j <= i {
            let decayed = (terms.sum[first + i] - terms.sum[first + j]).exp() * stage[at];
            dscores[r] = fma(decayed, terms.step[first + j], dscores[r]);
            value = decayed * scores[r];
        }
        if i == j {
            terms.diagonal[first + i] = value;
            value = 0.0f32;
        }
        stage[at] = value;
    }
}

/// Sums of the rows, weighted by the steps, and of the columns of `V`.
#[cube]
fn sum_pairs(stage: &Shared<[f32]>, terms: &mut Terms, head: usize, #[comptime] plan: Plan) {
    let chunk = comptime!(plan.chunk);
    let each = comptime!(plan.chunk.div_ceil(pair_parts(plan)));
    let first = head * chunk;
    let mut n = UNIT_POS as usize;
    while n < comptime!(2 * plan.chunk * pair_parts(plan)) {
        let own = n % chunk;
        let part = n / chunk % comptime!(pair_parts(plan));
        let from = part * each;
        let to = min(from + each, chunk);
        let mut sum = 0.0f32;
        if n < comptime!(plan.chunk * pair_parts(plan)) {
            for k in from..to {
                // Every row starts at another column, so that units read different banks.
                let j = (k + own) % chunk;
                sum = fma(
                    stage[own * comptime!(plan.stride_stage()) + j],
                    terms.step[first + j],
                    sum,
                );
            }
            terms.rows[part * comptime!(plan.chunk * plan.heads) + first + own] = sum;
        } else {
            for i in from..to {
                sum += stage[i * comptime!(plan.stride_stage()) + own];
            }
            terms.columns[part * comptime!(plan.chunk * plan.heads) + first + own] = sum;
        }
        n += comptime!(plan.team.units);
    }
}

/// `x[j] *= exp(s[Q] - s[j]) dt[j]` and `dy[i] *= exp(s[i])`.
#[cube]
fn weigh<E: Float, V: Size>(
    x_tile: &mut Shared<[E]>,
    dy_tile: &mut Shared<[E]>,
    step: &Shared<[f32]>,
    sum: &Shared<[f32]>,
    #[comptime] plan: Plan,
) {
    let vectors = comptime!(plan.channels() / plan.vector_x);
    let x_tile = x_tile.as_vectorized_mut().with_vector_size_mut::<V>();
    let dy_tile = dy_tile.as_vectorized_mut().with_vector_size_mut::<V>();
    let mut n = UNIT_POS as usize;
    while n < comptime!(plan.chunk * plan.channels() / plan.vector_x) {
        let row = n / vectors;
        let column = n % vectors;
        let head = column / comptime!(plan.headdim_padded() / plan.vector_x);
        let first = head * comptime!(plan.chunk);
        let place = row * comptime!(plan.stride_x() / plan.vector_x) + column;
        let own = sum[first + row];
        let weight = (sum[first + comptime!(plan.chunk - 1)] - own).exp() * step[first + row];
        let x = Vector::<f32, V>::cast_from(x_tile[place]) * Vector::new(weight);
        let dy = Vector::<f32, V>::cast_from(dy_tile[place]) * Vector::new(own.exp());
        x_tile[place] = Vector::<E, V>::cast_from(x);
        dy_tile[place] = Vector::<E, V>::cast_from(dy);
        n += comptime!(plan.team.units);
    }
}

/// Adds up the parts of the terms. Afterwards `rows` holds what a token's decay carries on to the tokens
/// behind it, `columns` what it takes from those before it, `diagonal` the gradient of the step itself and
/// `kept` a few parts for every head.
#[cube]
fn gather_steps(terms: &mut Terms, #[comptime] plan: Plan) {
    let size = comptime!(plan.chunk * plan.heads);
    let mut n = UNIT_POS as usize;
    while n < size {
        let mut rows = 0.0f32;
        let mut columns = 0.0f32;
        #[unroll]
        for part in 0..comptime!(pair_parts(plan)) {
            rows += terms.rows[comptime!(part * plan.chunk * plan.heads) + n];
            columns += terms.columns[comptime!(part * plan.chunk * plan.heads) + n];
        }
        let step = terms.step[n];
        let added = total(&terms.added, n, plan);
        terms.rows[n] = rows - step * columns + total(&terms.carried, n, plan);
        terms.columns[n] = step * added;
        terms.diagonal[n] += columns + added;
        n += comptime!(plan.team.units);
    }
    let each = comptime!(kept_parts(plan).div_ceil(KEPT));
    let mut n = UNIT_POS as usize;
    while n < comptime!(plan.heads * KEPT) {
        let head = n / KEPT;
        let from = n % KEPT * each;
        let to = min(from + each, comptime!(kept_parts(plan)).runtime());
        let mut sum = 0.0f32;
        for part in from..to {
            sum += terms.kept[head * comptime!(kept_parts(plan)) + part];
        }
        terms.few[n] = sum;
        n += comptime!(plan.team.units);
    }
}

/// The gradients of the steps, and the terms of the gradient of `A`.
#[cube]
fn store_steps(
    terms: &Terms,
    a: &[f32],
    batch: usize,
    chunk: usize,
    first_head: usize,
    dsteps: &mut [f32],
    decays: &mut [f32],
    call: &Call,
    #[comptime] plan: Plan,
) {
    let size = comptime!(plan.chunk);
    let mut n = UNIT_POS as usize;
    while n < comptime!(plan.chunk * plan.heads) {
        let head = n / size;
        let j = n % size;
        let first = head * size;
        let end = terms.sum[first + comptime!(plan.chunk - 1)];
        let mut kept = 0.0f32;
        #[unroll]
        for part in 0..KEPT {
            kept += terms.few[head * KEPT + part];
        }
        let mut through = kept * end.exp();
        for i in 0..size {
            if i >= j {
                through += terms.rows[first + i];
            } else {
                through += terms.columns[first + i];
            }
        }
        let own = first + j;
        let direct = terms.diagonal[own];
        let place = ((batch * call.chunks + chunk) * size + j) * call.heads + first_head + head;
        dsteps[place] = direct + a[(first_head + head) / comptime!(plan.parts)] * through;
        decays[place] = through * terms.step[own];
        n += comptime!(plan.team.units);
    }
}

/// Sums the parts of a term.
#[cube]
fn total(term: &Shared<[f32]>, at: usize, #[comptime] plan: Plan) -> f32 {
    let mut sum = 0.0f32;
    #[unroll]
    for part in 0..comptime!(parts(plan)) {
        sum += term[at * comptime!(parts(plan)) + part];
    }
    sum
}

/// A unit's elements into a tokens-by-tokens tile.
#[cube]
fn own_to_tile<E: Float>(own: &Array<f32>, tile: &mut Shared<[E]>, #[comptime] plan: Plan) {
    #[unroll(pair_shares(plan) <= 64)]
    for r in 0..comptime!(pair_shares(plan)) {
        let place = UNIT_POS as usize + r * comptime!(plan.team.units);
        let i = place / comptime!(plan.chunk);
        let j = place % comptime!(plan.chunk);
        tile[i * comptime!(plan.stride_q()) + j] = E::cast_from(own[r]);
    }
}

/// Writes tokens-by-state rows.
#[cube]
fn store_rows<O: Float, V: Size>(
    stage: &Shared<[f32]>,
    rows: usize,
    to: usize,
    state_column: usize,
    out: &mut [O],
    place: &Place,
    #[comptime] plan: Plan,
) {
    let vector = comptime!(plan.vector_n);
    let vectors = comptime!(plan.state / plan.vector_n);
    let stage = stage.as_vectorized().with_vector_size::<V>();
    let out = out.as_vectorized_mut().with_vector_size_mut::<V>();
    let mut n = UNIT_POS as usize;
    while n < comptime!(plan.chunk * plan.state / plan.vector_n) {
        let row = n / vectors;
        let column = n % vectors * vector;
        if row < rows {
            let at = place.offset + (to + row) * place.row + state_column + column;
            let value = stage[(row * comptime!(plan.stride_stage()) + column) / vector];
            out[at / vector] = Vector::<O, V>::cast_from(value);
        }
        n += comptime!(plan.team.units);
    }
}

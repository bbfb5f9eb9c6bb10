//! Between rows `[batch, length, (q + k + v heads) dim]` and heads `[batch, heads, length, dim]`, queries and
//! keys turned on the way: `(a, b) -> (a cos - b sin, a sin + b cos)` for each pair of features, with the
//! position's angles.
//!
//! A unit owns two vectors of a head: those of a run of pairs, or (past the turned features) neighbours.
//! Neighbouring units read a row from left to right. Bytes: everything read once and written once; the table
//! of angles comes out of the cache.

use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::tensor::CubeTensor;
use cubecl::prelude::*;
use mamba_ssm_linear::cube::{address_type, alone, common_vector, elem, empty_like, grid};

use crate::ops::rotary::RotaryStyle;

/// How queries and keys turn.
pub(super) struct Turn {
    /// `[length, pairs]`, f32.
    pub(super) cos: CubeTensor,
    pub(super) sin: CubeTensor,
    pub(super) style: RotaryStyle,
    /// Back again.
    pub(super) inverse: bool,
}

/// What a kernel is compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Plan {
    dim: usize,
    /// Pairs that are turned.
    pairs: usize,
    /// Elements moved at once.
    vector: usize,
    /// Whether a pair are neighbours (read one by one), not half of the turned features apart.
    interleaved: bool,
    inverse: bool,
}

impl Plan {
    fn new(dim: usize, widest: usize, turn: Option<&Turn>) -> Self {
        let pairs = turn.map_or(0, |turn| turn.cos.meta.shape[1]);
        let interleaved = turn.is_some_and(|turn| turn.style == RotaryStyle::Interleaved);
        let vector = match interleaved {
            true => 1,
            false => common_vector(widest, &[dim, pairs]),
        };
        Self {
            dim,
            pairs,
            vector,
            interleaved,
            inverse: turn.is_some_and(|turn| turn.inverse),
        }
    }

    /// Units that own turned features of a head.
    fn turning(&self) -> usize {
        self.pairs / self.vector
    }

    /// Vectors between the two of a turning pair.
    fn apart(&self) -> usize {
        match self.interleaved {
            true => 1,
            false => self.turning(),
        }
    }

    /// Units of a head.
    fn slots(&self) -> usize {
        self.turning() + (self.dim - 2 * self.pairs) / self.vector
    }
}

/// Numbers of a call.
#[derive(CubeType, CubeLaunch, Clone)]
struct Call {
    tokens: usize,
    length: usize,
    queries: usize,
    keys: usize,
    values: usize,
}

/// Where a unit's vectors lie.
#[derive(CubeType)]
struct Own {
    /// First of a turning pair's two vectors, or the only one: in the rows, and in its heads.
    row: usize,
    head: usize,
    /// 0 for queries, 1 for keys, 2 for values.
    part: usize,
    /// In the table of angles.
    angle: usize,
    pair: bool,
}

#[cube]
fn own(call: &Call, #[comptime] plan: Plan) -> Own {
    let slot = ABSOLUTE_POS % comptime!(plan.slots());
    let all = call.queries + call.keys + call.values;
    let index = ABSOLUTE_POS / comptime!(plan.slots()) % all;
    let token = ABSOLUTE_POS / comptime!(plan.slots()) / all;
    let (batch, position) = (token / call.length, token % call.length);
    let pair = slot < comptime!(plan.turning());
    let mut feature = slot * comptime!(plan.vector);
    if !pair {
        feature += comptime!(plan.pairs);
    } else if comptime!(plan.interleaved) {
        feature = 2 * slot;
    }
    let mut part = 0usize.runtime();
    let mut head = index;
    let mut heads = call.queries;
    if index >= call.queries + call.keys {
        part = 2usize;
        head = index - call.queries - call.keys;
        heads = call.values;
    } else if index >= call.queries {
        part = 1usize;
        head = index - call.queries;
        heads = call.keys;
    }
    let head = (batch * heads + head) * call.length + position;
    Own {
        row: (token * all + index) * comptime!(plan.dim) + feature,
        head: head * comptime!(plan.dim) + feature,
        part,
        angle: position * comptime!(plan.pairs) + slot * comptime!(plan.vector),
        pair,
    }
}

/// Turns a pair of a query or key; those of values stay.
#[cube]
fn turn<V: Size>(
    a: &mut Vector<f32, V>,
    b: &mut Vector<f32, V>,
    cos: &[f32],
    sin: &[f32],
    own: &Own,
    #[comptime] plan: Plan,
) {
    if own.part < 2usize {
        let at = own.angle / comptime!(plan.vector);
        let cos = cos.as_vectorized().with_vector_size::<V>()[at];
        let mut sin = sin.as_vectorized().with_vector_size::<V>()[at];
        if comptime!(plan.inverse) {
            sin = -sin;
        }
        let turned = *a * cos - *b * sin;
        *b = *a * sin + *b * cos;
        *a = turned;
    }
}

#[cube(launch, address_type = "dynamic")]
fn split_kernel<I: Float, V: Size>(
    rows: &[I],
    q: &mut [I],
    k: &mut [I],
    v: &mut [I],
    cos: &[f32],
    sin: &[f32],
    call: &Call,
    #[comptime] plan: Plan,
    #[define(I)] _dtype: ElemType,
    #[define(V)] _vector: usize,
) {
    let all = call.queries + call.keys + call.values;
    if ABSOLUTE_POS < call.tokens * all * comptime!(plan.slots()) {
        let own = own(call, plan);
        let rows = rows.as_vectorized().with_vector_size::<V>();
        let at = own.row / comptime!(plan.vector);
        let mut a = Vector::<f32, V>::cast_from(rows[at]);
        if comptime!(plan.pairs > 0) {
            if own.pair {
                let mut b = Vector::<f32, V>::cast_from(rows[at + comptime!(plan.apart())]);
                turn::<V>(&mut a, &mut b, cos, sin, &own, plan);
                give::<I, V>(b, q, k, v, &own, comptime!(plan.apart()), plan);
            }
        }
        give::<I, V>(a, q, k, v, &own, 0usize, plan);
    }
}

/// Writes a vector to its head, `beyond` vectors on.
#[cube]
fn give<I: Float, V: Size>(
    value: Vector<f32, V>,
    q: &mut [I],
    k: &mut [I],
    v: &mut [I],
    own: &Own,
    #[comptime] beyond: usize,
    #[comptime] plan: Plan,
) {
    let value = Vector::<I, V>::cast_from(value);
    let at = own.head / comptime!(plan.vector) + beyond;
    if own.part == 0usize {
        q.as_vectorized_mut().with_vector_size_mut::<V>()[at] = value;
    } else if own.part == 1usize {
        k.as_vectorized_mut().with_vector_size_mut::<V>()[at] = value;
    } else {
        v.as_vectorized_mut().with_vector_size_mut::<V>()[at] = value;
    }
}

#[cube(launch, address_type = "dynamic")]
fn merge_kernel<I: Float, V: Size>(
    rows: &mut [I],
    q: &[I],
    k: &[I],
    v: &[I],
    cos: &[f32],
    sin: &[f32],
    call: &Call,
    #[comptime] plan: Plan,
    #[define(I)] _dtype: ElemType,
    #[define(V)] _vector: usize,
) {
    let all = call.queries + call.keys + call.values;
    if ABSOLUTE_POS < call.tokens * all * comptime!(plan.slots()) {
        let own = own(call, plan);
        let rows = rows.as_vectorized_mut().with_vector_size_mut::<V>();
        let at = own.row / comptime!(plan.vector);
        let mut a = take::<I, V>(q, k, v, &own, 0usize, plan);
        if comptime!(plan.pairs > 0) {
            if own.pair {
                let mut b = take::<I, V>(q, k, v, &own, comptime!(plan.apart()), plan);
                turn::<V>(&mut a, &mut b, cos, sin, &own, plan);
                rows[at + comptime!(plan.apart())] = Vector::cast_from(b);
            }
        }
        rows[at] = Vector::cast_from(a);
    }
}

/// Reads a vector of a head, `beyond` vectors on.
#[cube]
fn take<I: Float, V: Size>(
    q: &[I],
    k: &[I],
    v: &[I],
    own: &Own,
    #[comptime] beyond: usize,
    #[comptime] plan: Plan,
) -> Vector<f32, V> {
    let at = own.head / comptime!(plan.vector) + beyond;
    let mut value =
        q.as_vectorized().with_vector_size::<V>()[select(own.part == 0usize, at, 0usize)];
    if own.part == 1usize {
        value = k.as_vectorized().with_vector_size::<V>()[at];
    } else if own.part == 2usize {
        value = v.as_vectorized().with_vector_size::<V>()[at];
    }
    Vector::cast_from(value)
}

/// Numbers and memory of a launch.
struct Launch {
    client: Client,
    count: CubeCount,
    dim: CubeDim,
    addresses: AddressType,
    angles: [CubeTensor; 2],
    call: CallLaunch,
    plan: Plan,
    elem: ElemType,
}

impl Launch {
    fn new(rows: &CubeTensor, counts: [usize; 3], turn: Option<Turn>) -> Self {
        let [batch, length, width]: [usize; 3] = rows.meta.shape.dims();
        let all: usize = counts.iter().sum();
        let plan = Plan::new(width / all, 16 / rows.dtype.size(), turn.as_ref());
        let units = alone(rows);
        let work = batch * length * all * plan.slots();
        let angles = match turn {
            Some(turn) => [turn.cos, turn.sin].map(into_contiguous),
            // Not read.
            None => [rows.clone(), rows.clone()],
        };
        Self {
            client: rows.client.clone(),
            count: grid(work.div_ceil(units)),
            dim: CubeDim::new_1d(units as u32),
            addresses: address_type(&[rows]),
            angles,
            call: CallLaunch::new(batch * length, length, counts[0], counts[1], counts[2]),
            plan,
            elem: elem(rows.dtype),
        }
    }
}

macro_rules! launch {
    ($kernel:ident, $rows:expr, $heads:expr, $counts:expr, $turn:expr) => {{
        let launch = Launch::new($rows, $counts, $turn);
        let [q, k, v] = $heads.each_ref().map(|x| x.clone().into_buffer_arg());
        let [cos, sin] = launch.angles.map(|x| x.into_buffer_arg());
        $kernel::launch(
            &launch.client,
            launch.count,
            launch.dim,
            launch.addresses,
            $rows.clone().into_buffer_arg(),
            q,
            k,
            v,
            cos,
            sin,
            launch.call,
            launch.plan,
            launch.elem,
            launch.plan.vector,
        );
    }};
}

/// Rows `[batch, length, sum of counts x dim]` to queries, keys and values `[batch, count, length, dim]`.
/// Where a count is zero there are the queries again.
pub(super) fn split(
    rows: CubeTensor,
    counts: [usize; 3],
    dim: usize,
    turn: Option<Turn>,
) -> [CubeTensor; 3] {
    let rows = into_contiguous(rows);
    let [batch, length, _]: [usize; 3] = rows.meta.shape.dims();
    let new = |count| empty_like(&rows, [batch, count, length, dim], rows.dtype);
    let q = new(counts[0]);
    let [k, v] = [counts[1], counts[2]].map(|n| if n == 0 { q.clone() } else { new(n) });
    let heads = [q, k, v];
    launch!(split_kernel, &rows, heads, counts, turn);
    heads
}

/// Queries, and keys and values if there are any, side by side in rows.
pub(super) fn merge(heads: [Option<CubeTensor>; 3], turn: Option<Turn>) -> CubeTensor {
    let [q, k, v] = heads.map(|tensor| tensor.map(into_contiguous));
    let q = q.expect("there are queries");
    let count = |tensor: &Option<CubeTensor>| tensor.as_ref().map_or(0, |x| x.meta.shape[1]);
    let counts = [q.meta.shape[1], count(&k), count(&v)];
    let [batch, _, length, dim]: [usize; 4] = q.meta.shape.dims();
    let width = counts.iter().sum::<usize>() * dim;
    let rows = empty_like(&q, [batch, length, width], q.dtype);
    let [k, v] = [k, v].map(|tensor| tensor.unwrap_or_else(|| q.clone()));
    launch!(merge_kernel, &rows, [q, k, v], counts, turn);
    rows
}

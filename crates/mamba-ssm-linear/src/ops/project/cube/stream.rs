//! Products of many tokens with a weight that shared memory holds whole, on matrix units with fragments:
//! `c = a b + bias`.
//!
//! A cube reads the weight once; from then on its planes go their own ways, none waits for another. A plane
//! takes `16 frags` tokens at a time: their operands stay in its registers while it passes over the columns,
//! sixteen at a time, and what it has multiplied it writes at once.
//!
//! A product is a sum over the inner dimension in any order, so a unit reads sixteen bytes of a token where
//! the fragment's own order has four times four: of every 32 inner elements a unit has eight neighbours, and
//! the weight lies in shared memory in the order that follows ([`position`]).
//!
//! Bytes moved: `a` and `c` once, the weight once per cube (from the cache).

use cubecl::prelude::*;

use super::common::Place;
use super::matrix::ProductCall;
use crate::cube::fragment::{
    LANES, NARROW, Pair, SIDE, four, four_column, multiply, own_row, right, right_transposed,
    zero_sums,
};

/// Elements that a unit reads of a token at once.
pub(super) const READ: usize = 8;

/// Elements that a unit writes at once.
pub(super) const WRITE: usize = 4;

/// Inner elements whose order is one unit of [`position`].
const TURN: usize = 4 * READ;

/// Elements added to a row of the weight in shared memory, so that neighbouring rows start in different
/// banks.
const PAD: usize = 8;

/// What a kernel is compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct StreamPlan {
    /// Planes of a cube.
    pub(super) planes: usize,
    /// Blocks of [`SIDE`] tokens that a plane takes at a time.
    pub(super) frags: usize,
    pub(super) inner: usize,
    pub(super) columns: usize,
    /// Elements of the weight read at once.
    pub(super) vector: usize,
    /// Whether the weight is given as its transpose.
    pub(super) transposed: bool,
    pub(super) bias: bool,
}

impl StreamPlan {
    pub(super) fn units(&self) -> usize {
        self.planes * LANES
    }

    /// Tokens that a cube takes at a time.
    pub(super) fn tokens(&self) -> usize {
        self.planes * self.frags * SIDE
    }

    /// The inner dimension in whole turns.
    fn depth(&self) -> usize {
        self.inner.next_multiple_of(TURN)
    }

    /// Columns in whole blocks.
    fn padded(&self) -> usize {
        self.columns.next_multiple_of(SIDE)
    }

    /// Rows of the weight in shared memory, and elements between them.
    fn lie(&self) -> (usize, usize) {
        if self.transposed {
            (self.padded(), self.depth() + PAD)
        } else {
            (self.depth(), self.padded() + PAD)
        }
    }

    fn stride(&self) -> usize {
        self.lie().1
    }

    /// Elements of the weight in shared memory.
    fn size(&self) -> usize {
        let (rows, stride) = self.lie();
        rows * stride
    }

    /// Bytes of shared memory, of 16-bit operands.
    pub(super) fn bytes(&self) -> usize {
        2 * self.size() + 4 * self.padded()
    }

    /// Registers of a unit for its tokens' operands.
    pub(super) fn registers(&self) -> usize {
        self.frags * self.depth() / SIDE * 4
    }

    /// Rows and columns of the weight as given.
    fn given(&self) -> (usize, usize) {
        if self.transposed {
            (self.columns, self.inner)
        } else {
            (self.inner, self.columns)
        }
    }
}

/// Where inner element `k` lies in shared memory: element `8 q + 2 b + e` of 32 is element `e` of pair `q` of
/// block `b`, since unit `q` of a token reads its elements `8 q` on and multiplies them pair by pair.
#[cube]
fn position(k: usize) -> usize {
    k / TURN * TURN + k % READ / 2 * NARROW + k % TURN / READ * 2 + k % 2
}

#[cube(launch_unchecked, address_type = "dynamic")]
pub(super) fn product_stream<E: Float, W: Float, V: Size>(
    a: &[E],
    b: &[W],
    bias: &[W],
    c: &mut [E],
    call: &ProductCall,
    #[comptime] plan: StreamPlan,
    #[define(E, W)] _types: [ElemType; 2],
    #[define(V)] _vector: usize,
) {
    let mut weight = Shared::<[E]>::new_aligned_slice(comptime!(plan.size()), 128usize);
    let mut shift = Shared::<[f32]>::new_aligned_slice(comptime!(plan.padded()), 16usize);
    put_weight::<E, W, V>(b, &call.b, &mut weight, plan);
    put_bias::<W>(bias, &mut shift, plan);
    sync_cube();

    let rows = comptime!(plan.frags * SIDE);
    let mut block = CUBE_POS * comptime!(plan.planes) + UNIT_POS as usize / LANES;
    // Where the grid is bent, cubes past the last have nothing left.
    while block * rows < call.a.rows {
        let token = block * rows;
        let lefts = read_tokens::<E>(a, &call.a, token, plan);
        for n in 0..comptime!(plan.padded() / SIDE) {
            let column = n * SIDE;
            let mut sums = zero_sums(comptime!(2 * plan.frags));
            #[unroll]
            for step in 0..comptime!(plan.depth() / SIDE) {
                let k = comptime!(step * SIDE);
                let stride = comptime!(plan.stride());
                let rights = if comptime!(plan.transposed) {
                    right_transposed::<E>(&weight, k, column, stride)
                } else {
                    right::<E>(&weight, k, column, stride)
                };
                #[unroll]
                for frag in 0..comptime!(plan.frags) {
                    let left = &lefts[comptime!(frag * plan.depth() / SIDE + step)];
                    multiply::<E>(left, &rights, &mut sums, comptime!(2 * frag));
                }
            }
            write::<E>(&sums, &shift, c, &call.c, token, column, plan);
        }
        block += call.cubes * comptime!(plan.planes);
    }
}

/// Brings the weight into shared memory; zero past its end.
#[cube]
fn put_weight<E: Float, W: Float, V: Size>(
    from: &[W],
    place: &Place,
    into: &mut Shared<[E]>,
    #[comptime] plan: StreamPlan,
) {
    let from = from.as_vectorized().with_vector_size::<V>();
    let (rows, columns) = comptime!(plan.given());
    let (all_rows, stride) = comptime!(plan.lie());
    let row_vectors = comptime!((plan.lie().1 - PAD) / plan.vector);
    let mut n = UNIT_POS as usize;
    while n < all_rows * row_vectors {
        let (row, column) = (n / row_vectors, n % row_vectors * comptime!(plan.vector));
        let exists = row < rows && column < columns;
        let at = (row * place.pitch + column) / comptime!(plan.vector);
        let value = from[select(exists, at, 0usize)];
        let value = Vector::<E, V>::cast_from(select(exists, value, Vector::new(W::from_int(0))));
        if comptime!(plan.transposed) {
            #[unroll]
            for v in 0..comptime!(plan.vector) {
                into[row * stride + position(column + v)] = value.extract(v);
            }
        } else {
            let into = into.as_vectorized_mut().with_vector_size_mut::<V>();
            into[(position(row) * stride + column) / comptime!(plan.vector)] = value;
        }
        n += comptime!(plan.units());
    }
}

/// Brings the bias into shared memory, or zeros.
#[cube]
fn put_bias<W: Float>(bias: &[W], into: &mut Shared<[f32]>, #[comptime] plan: StreamPlan) {
    let mut n = UNIT_POS as usize;
    while n < comptime!(plan.padded()) {
        let mut value = 0.0f32;
        if comptime!(plan.bias) {
            if n < comptime!(plan.columns) {
                value = f32::cast_from(bias[n]);
            }
        }
        into[n] = value;
        n += comptime!(plan.units());
    }
}

/// A plane's tokens from `token` on as left operands, `frags x depth / 16`; past the last, that one again.
#[cube]
fn read_tokens<E: Float>(
    from: &[E],
    place: &Place,
    token: usize,
    #[comptime] plan: StreamPlan,
) -> Sequence<Array<Pair<E>>> {
    let from = from.as_vectorized().with_vector_size::<Const<8>>();
    let mut lefts = Sequence::<Array<Pair<E>>>::new();
    #[unroll]
    for frag in 0..comptime!(plan.frags) {
        let upper = min(token + comptime!(frag * SIDE) + own_row(), place.rows - 1);
        let lower = min(
            token + comptime!(frag * SIDE + 8) + own_row(),
            place.rows - 1,
        );
        #[unroll]
        for turn in 0..comptime!(plan.depth() / TURN) {
            let k = comptime!(turn * TURN) + UNIT_POS_PLANE as usize % 4 * READ;
            let (above, below) = if comptime!((turn + 1) * TURN <= plan.inner) {
                let above = from[(upper * place.pitch + k) / READ];
                let below = from[(lower * place.pitch + k) / READ];
                (above, below)
            } else {
                let exists = k < comptime!(plan.inner);
                let zero = Vector::<E, Const<8>>::new(E::from_int(0));
                let above = from[select(exists, (upper * place.pitch + k) / READ, 0usize)];
                let below = from[select(exists, (lower * place.pitch + k) / READ, 0usize)];
                (select(exists, above, zero), select(exists, below, zero))
            };
            #[unroll]
            for half in 0..2usize {
                let mut left = Array::<Pair<E>>::new(4usize);
                #[unroll]
                for n in 0..2usize {
                    let mut upper_pair = Pair::<E>::new(E::from_int(0));
                    let mut lower_pair = Pair::<E>::new(E::from_int(0));
                    #[unroll]
                    for e in 0..2usize {
                        let at = comptime!(4 * half + 2 * n + e);
                        upper_pair.insert(e, above.extract(at));
                        lower_pair.insert(e, below.extract(at));
                    }
                    left[comptime!(2 * n)] = upper_pair;
                    left[comptime!(2 * n + 1)] = lower_pair;
                }
                lefts.push(left);
            }
        }
    }
    lefts
}

/// Writes sixteen columns of a plane's tokens, with the bias.
#[cube]
fn write<E: Float>(
    sums: &Array<Pair<f32>>,
    shift: &Shared<[f32]>,
    c: &mut [E],
    place: &Place,
    token: usize,
    column: usize,
    #[comptime] plan: StreamPlan,
) {
    let c = c.as_vectorized_mut().with_vector_size_mut::<Const<4>>();
    let shift = shift.as_vectorized().with_vector_size::<Const<4>>();
    let to = column + four_column();
    let shift = shift[to / WRITE];
    #[unroll]
    for row in 0..comptime!(2 * plan.frags) {
        let first = comptime!(row / 2 * 4 + row % 2);
        let values = four(sums[first], sums[comptime!(first + 2)]) + shift;
        let row = token + comptime!(row * 8) + own_row();
        if row < place.rows && to < comptime!(plan.columns) {
            c[(row * place.pitch + to) / WRITE] = Vector::<E, Const<4>>::cast_from(values);
        }
    }
}

//! Tiles: rows of a tensor brought into shared memory.

use cubecl::prelude::*;

use super::Team;

/// A tile: rows of tokens, columns in groups (heads), each group padded to whole blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Tile {
    pub(crate) rows: usize,
    /// Groups of columns.
    pub(crate) groups: usize,
    /// Columns of a group in memory.
    pub(crate) width: usize,
    /// Columns of a group in the tile; those past `width` are zero.
    pub(crate) padded: usize,
    /// Between the tile's rows.
    pub(crate) stride: usize,
    /// Elements read at once; divides `width`, the offset and the stride of the memory's rows.
    pub(crate) vector: usize,
}

impl Tile {
    pub(crate) fn vectors(&self) -> usize {
        self.groups * self.padded / self.vector
    }

    /// Vectors that each of so many units carries.
    pub(crate) fn shares(&self, units: usize) -> usize {
        (self.rows * self.vectors()).div_ceil(units)
    }

    /// Whether every unit carries as many.
    fn is_even(&self, units: usize) -> bool {
        (self.rows * self.vectors()).is_multiple_of(units)
    }

    /// Elements of shared memory that it takes.
    pub(crate) fn size(&self) -> usize {
        self.rows * self.stride
    }
}

/// Brings a tile in: its row `r` starts at `base + r * row_stride` of `from`. Rows from `rows` on are
/// zero.
#[cube]
pub(crate) fn load<I: Float, E: Float, V: Size>(
    from: &[I],
    base: usize,
    row_stride: usize,
    rows: usize,
    into: &mut Shared<[E]>,
    #[comptime] tile: Tile,
    #[comptime] team: Team,
) {
    let from = from.as_vectorized().with_vector_size::<V>();
    let into = into.as_vectorized_mut().with_vector_size_mut::<V>();
    let mut n = UNIT_POS as usize;
    while n < comptime!(tile.rows * tile.vectors()) {
        let row = n / comptime!(tile.vectors());
        let column = n % comptime!(tile.vectors()) * comptime!(tile.vector);
        let group = column / comptime!(tile.padded);
        let inside = column % comptime!(tile.padded);
        let mut value = Vector::<E, V>::new(E::from_int(0));
        if row < rows && inside < comptime!(tile.width) {
            let place = base + row * row_stride + group * comptime!(tile.width) + inside;
            value = Vector::<E, V>::cast_from(from[place / comptime!(tile.vector)]);
        }
        into[(row * comptime!(tile.stride) + column) / comptime!(tile.vector)] = value;
        n += comptime!(team.units);
    }
}

/// Reads a unit's share of a tile into registers, to be [`put`] into shared memory later: all reads are
/// under way before the first is needed, and what is computed in between hides them.
#[cube]
pub(crate) fn fetch<E: Float, V: Size>(
    from: &[E],
    base: usize,
    row_stride: usize,
    rows: usize,
    into: &mut Array<Vector<E, V>>,
    #[comptime] tile: Tile,
    #[comptime] units: usize,
) {
    let from = from.as_vectorized().with_vector_size::<V>();
    // Nearly always; what it spares is more than the reads themselves, since numbers of 16 bits are selected
    // one by one.
    let whole = comptime!(tile.is_even(units) && tile.width == tile.padded);
    if whole && rows >= comptime!(tile.rows) {
        #[unroll]
        for share in 0..comptime!(tile.shares(units)) {
            let n = UNIT_POS as usize + comptime!(share * units);
            let row = n / comptime!(tile.vectors());
            let column = n % comptime!(tile.vectors()) * comptime!(tile.vector);
            into[share] = from[(base + row * row_stride + column) / comptime!(tile.vector)];
        }
    } else {
        #[unroll]
        for share in 0..comptime!(tile.shares(units)) {
            let n = UNIT_POS as usize + comptime!(share * units);
            let row = n / comptime!(tile.vectors());
            let column = n % comptime!(tile.vectors()) * comptime!(tile.vector);
            let group = column / comptime!(tile.padded);
            let inside = column % comptime!(tile.padded);
            let exists = row < rows && inside < comptime!(tile.width);
            // A select rather than a branch, so that the reads do not wait for each other.
            let place = base + row * row_stride + group * comptime!(tile.width) + inside;
            let value = from[select(exists, place / comptime!(tile.vector), 0usize)];
            into[share] = select(exists, value, Vector::new(E::from_int(0)));
        }
    }
}

/// Writes what [`fetch`] read into shared memory, from element `start` on.
#[cube]
pub(crate) fn put<E: Float, V: Size>(
    values: &Array<Vector<E, V>>,
    into: &mut Shared<[E]>,
    start: usize,
    #[comptime] tile: Tile,
    #[comptime] units: usize,
) {
    let into = into.as_vectorized_mut().with_vector_size_mut::<V>();
    #[unroll]
    for share in 0..comptime!(tile.shares(units)) {
        let n = UNIT_POS as usize + comptime!(share * units);
        let row = n / comptime!(tile.vectors());
        let column = n % comptime!(tile.vectors());
        if comptime!(tile.is_even(units)) || n < comptime!(tile.rows * tile.vectors()) {
            let at = (start + row * comptime!(tile.stride)) / comptime!(tile.vector) + column;
            into[at] = values[share];
        }
    }
}

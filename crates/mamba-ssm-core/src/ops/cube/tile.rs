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
    fn vectors(&self) -> usize {
        self.groups * self.padded / self.vector
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

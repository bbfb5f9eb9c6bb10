//! What the kernels share: matrices in memory, and tiles of them on the way to shared memory.

use cubecl::prelude::*;

/// Rows and columns of a block of the matrix units.
pub(super) const SIDE: usize = 16;

/// A row-major matrix in memory.
#[derive(CubeType, CubeLaunch, Clone)]
pub(super) struct Place {
    pub(super) rows: usize,
    pub(super) columns: usize,
    /// Elements between the starts of two rows.
    pub(super) pitch: usize,
}

/// A tile of a matrix and how the units of a cube share it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Tile {
    pub(super) rows: usize,
    pub(super) columns: usize,
    /// Elements between two rows (of the tile, or of its transpose) in shared memory.
    pub(super) stride: usize,
    /// Elements read at once; divides the matrix's columns and pitch and the tile's columns.
    pub(super) vector: usize,
    pub(super) units: usize,
}

impl Tile {
    fn row_vectors(&self) -> usize {
        self.columns / self.vector
    }

    fn vectors(&self) -> usize {
        self.rows * self.row_vectors()
    }

    /// Vectors that a unit carries.
    pub(super) fn shares(&self) -> usize {
        self.vectors().div_ceil(self.units)
    }

    /// Whether the last share is a full one.
    fn is_even(&self) -> bool {
        self.vectors().is_multiple_of(self.units)
    }

    /// Elements of shared memory.
    pub(super) fn size(&self) -> usize {
        self.rows * self.stride
    }
}

/// Reads a unit's share of the tile whose first element is `(first_row, first_column)` into registers;
/// zero outside the matrix. All reads are under way before the first is needed.
#[cube]
pub(super) fn fetch<E: Float, V: Size>(
    from: &[E],
    place: &Place,
    first_row: usize,
    first_column: usize,
    into: &mut Array<Vector<E, V>>,
    #[comptime] tile: Tile,
) {
    let from = from.as_vectorized().with_vector_size::<V>();
    let pitch = place.pitch / comptime!(tile.vector);
    // Most tiles: numbers of 16 bits are selected one by one, which costs more than the reads.
    let full = comptime!(tile.is_even()) && first_row + comptime!(tile.rows) <= place.rows;
    if full && first_column + comptime!(tile.columns) <= place.columns {
        #[unroll]
        for share in 0..comptime!(tile.shares()) {
            let n = UNIT_POS as usize + comptime!(share * tile.units);
            let row = first_row + n / comptime!(tile.row_vectors());
            let column = n % comptime!(tile.row_vectors());
            into[share] = from[row * pitch + first_column / comptime!(tile.vector) + column];
        }
    } else {
        #[unroll]
        for share in 0..comptime!(tile.shares()) {
            let n = UNIT_POS as usize + comptime!(share * tile.units);
            let row = first_row + n / comptime!(tile.row_vectors());
            let column = n % comptime!(tile.row_vectors());
            let inside =
                row < place.rows && first_column + column * comptime!(tile.vector) < place.columns;
            // A select rather than a branch, so that the reads do not wait for each other.
            let at = row * pitch + first_column / comptime!(tile.vector) + column;
            let value = from[select(inside, at, 0usize)];
            into[share] = select(inside, value, Vector::new(E::from_int(0)));
        }
    }
}

/// Writes what [`fetch`] read into shared memory as it lies in the matrix, in the type of the products.
#[cube]
pub(super) fn put<F: Float, E: Float, V: Size>(
    values: &Array<Vector<F, V>>,
    into: &mut Shared<[E]>,
    #[comptime] tile: Tile,
) {
    let into = into.as_vectorized_mut().with_vector_size_mut::<V>();
    #[unroll]
    for share in 0..comptime!(tile.shares()) {
        let n = UNIT_POS as usize + comptime!(share * tile.units);
        let row = n / comptime!(tile.row_vectors());
        let column = n % comptime!(tile.row_vectors());
        if comptime!(tile.is_even()) || n < comptime!(tile.vectors()) {
            into[row * comptime!(tile.stride / tile.vector) + column] =
                Vector::<E, V>::cast_from(values[share]);
        }
    }
}

/// Writes what [`fetch`] read into shared memory as f32, as it lies in the matrix or transposed.
#[cube]
pub(super) fn put_f32<E: Float, V: Size>(
    values: &Array<Vector<E, V>>,
    into: &mut Shared<[f32]>,
    #[comptime] tile: Tile,
    #[comptime] transposed: bool,
) {
    #[unroll]
    for share in 0..comptime!(tile.shares()) {
        let n = UNIT_POS as usize + comptime!(share * tile.units);
        let row = n / comptime!(tile.row_vectors());
        let column = n % comptime!(tile.row_vectors()) * comptime!(tile.vector);
        if comptime!(tile.is_even()) || n < comptime!(tile.vectors()) {
            let value = values[share];
            #[unroll]
            for v in 0..comptime!(tile.vector) {
                let number = f32::cast_from(value.extract(v));
                if comptime!(transposed) {
                    into[(column + v) * comptime!(tile.stride) + row] = number;
                } else {
                    into[row * comptime!(tile.stride) + column + v] = number;
                }
            }
        }
    }
}

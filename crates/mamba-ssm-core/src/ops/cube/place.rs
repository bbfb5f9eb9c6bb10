//! Where rows lie: the kernels read and write slices of wider tensors in place.

use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::tensor::CubeTensor;
use cubecl::prelude::*;

use super::common_vector;

/// Row `r` starts at `offset + r * row`.
#[derive(CubeType, CubeLaunch, Clone, Copy)]
pub(crate) struct Place {
    pub(crate) offset: usize,
    pub(crate) row: usize,
}

/// Rows of a contiguous tensor: all of each row, or a slice of it.
#[derive(Clone)]
pub(crate) struct Rows {
    pub(crate) tensor: CubeTensor,
    pub(crate) offset: usize,
    pub(crate) row: usize,
}

impl Rows {
    /// Whole rows of `[batch, length, ..]`.
    pub(crate) fn whole(tensor: CubeTensor) -> Self {
        let tensor = into_contiguous(tensor);
        let row = tensor.meta.shape.iter().skip(2).product();
        Self {
            tensor,
            offset: 0,
            row,
        }
    }

    /// The same, where the tensor lies if its rows are evenly spaced: devices pad rows of some widths.
    pub(crate) fn spaced(tensor: CubeTensor) -> Self {
        let (shape, strides) = (&tensor.meta.shape, tensor.meta.strides());
        let even = shape.rank() == 3
            && !tensor.meta.is_tiled()
            && strides[2] == 1
            && strides[1] >= shape[2]
            && strides[0] == shape[1] * strides[1]
            && tensor.handle.offset_start.unwrap_or(0).is_multiple_of(16);
        if !even {
            return Self::whole(tensor);
        }
        let row = strides[1];
        Self {
            tensor,
            offset: 0,
            row,
        }
    }

    /// The columns from `offset` on of the same rows.
    pub(crate) fn from(&self, offset: usize) -> Self {
        Self {
            offset: self.offset + offset,
            ..self.clone()
        }
    }

    pub(crate) fn place(&self) -> PlaceLaunch {
        PlaceLaunch::new(self.offset, self.row)
    }

    /// The largest vector of at most 16 bytes in which rows of `width` columns can be read.
    pub(crate) fn vector(&self, width: usize) -> usize {
        common_vector(
            16 / self.tensor.dtype.size(),
            &[self.offset, self.row, width],
        )
    }
}

//! Flex tensors as rows of tokens, read in place and written in place.

use std::marker::PhantomData;

use burn::backend::flex::FlexTensor;
use burn::tensor::{Shape, TensorData};

/// A tensor whose leading axes are `[batch, token]` and whose other axes form one row without gaps.
/// The rows may lie apart, as they do in a slice of a wider tensor.
#[derive(Clone, Copy)]
pub(crate) struct Rows<'a> {
    data: &'a [f32],
    batch: usize,
    token: usize,
    width: usize,
}

/// `tensor` itself if its axes from the third on have no gaps, else a copy without any.
pub(crate) fn with_whole_rows(tensor: FlexTensor) -> FlexTensor {
    let layout = tensor.layout();
    let (shape, strides) = (layout.shape(), layout.strides());
    let mut expected = 1;
    let mut whole = strides[..2].iter().all(|stride| *stride >= 0);
    for axis in (2..shape.num_dims()).rev() {
        whole &= shape[axis] == 1 || strides[axis] == expected;
        expected *= shape[axis] as isize;
    }
    if whole {
        tensor
    } else {
        tensor.to_contiguous()
    }
}

impl<'a> Rows<'a> {
    /// A view of a tensor that went through [`with_whole_rows`].
    pub(crate) fn new(tensor: &'a FlexTensor) -> Self {
        let layout = tensor.layout();
        let (shape, strides) = (layout.shape(), layout.strides());
        Self {
            data: &tensor.storage::<f32>()[layout.start_offset()..],
            batch: strides[0] as usize,
            token: strides[1] as usize,
            width: shape[2..].iter().product(),
        }
    }

    /// Rows of `width` without gaps between them.
    pub(crate) fn dense(data: &'a [f32], tokens: usize, width: usize) -> Self {
        Self {
            data,
            batch: tokens * width,
            token: width,
            width,
        }
    }

    /// The columns `start .. start + width`.
    pub(crate) fn columns(self, start: usize, width: usize) -> Self {
        Self {
            data: &self.data[start..],
            width,
            ..self
        }
    }

    /// One token's row.
    #[inline(always)]
    pub(crate) fn row(&self, batch: usize, token: usize) -> &'a [f32] {
        &self.data[batch * self.batch + token * self.token..][..self.width]
    }

    /// What lies from a token's row on, and the distance to the next token's.
    #[inline(always)]
    pub(crate) fn from(&self, batch: usize, token: usize) -> (&'a [f32], usize) {
        (
            &self.data[batch * self.batch + token * self.token..],
            self.token,
        )
    }
}

/// A result that several threads write, each its own columns of the rows.
pub(crate) struct RowsMut<'a> {
    data: *mut f32,
    length: usize,
    batch: usize,
    token: usize,
    first: usize,
    _data: PhantomData<&'a mut [f32]>,
}

// SAFETY: `row` is the only access, and its callers keep to elements of their own.
unsafe impl Send for RowsMut<'_> {}
// SAFETY: as above.
unsafe impl Sync for RowsMut<'_> {}

impl<'a> RowsMut<'a> {
    /// `data` as `[.., tokens, width]`.
    pub(crate) fn new(data: &'a mut [f32], tokens: usize, width: usize) -> Self {
        Self {
            data: data.as_mut_ptr(),
            length: data.len(),
            batch: tokens * width,
            token: width,
            first: 0,
            _data: PhantomData,
        }
    }

    /// The same rows without their first columns.
    pub(crate) fn columns(&self, start: usize) -> RowsMut<'_> {
        RowsMut {
            first: self.first + start,
            ..*self
        }
    }

    /// `width` columns of a token's row from `start` on.
    ///
    /// # Safety
    ///
    /// While the result lives, nothing else may touch these elements.
    #[inline(always)]
    #[allow(clippy::mut_from_ref)]
    pub(crate) unsafe fn row(
        &self,
        batch: usize,
        token: usize,
        start: usize,
        width: usize,
    ) -> &mut [f32] {
        let at = batch * self.batch + token * self.token + self.first + start;
        assert!(at + width <= self.length);
        // SAFETY: within the data; the caller keeps others out.
        unsafe { std::slice::from_raw_parts_mut(self.data.add(at), width) }
    }
}

/// All elements in order, copied only if they are not stored so.
pub(crate) fn contiguous(tensor: FlexTensor) -> FlexTensor {
    if tensor.as_slice::<f32>().is_some() {
        tensor
    } else {
        tensor.to_contiguous()
    }
}

/// The elements of a tensor that went through [`contiguous`].
pub(crate) fn elements(tensor: &FlexTensor) -> &[f32] {
    tensor.as_slice::<f32>().expect("a contiguous f32 tensor")
}

/// A tensor of these elements.
pub(crate) fn tensor<const D: usize>(values: Vec<f32>, shape: [usize; D]) -> FlexTensor {
    FlexTensor::from_data(TensorData::new(values, Shape::new(shape)))
}

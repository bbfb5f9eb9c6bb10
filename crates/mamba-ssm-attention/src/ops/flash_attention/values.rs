//! Readable arithmetic on the float tensors of any backend.

use std::ops::{Add, Div, Mul, Range, Sub};

use burn::backend::Backend;
use burn::backend::tensor::{BoolTensor, FloatTensor};
use burn::tensor::{BoolDType, FloatDType, Shape, Slice};

/// A float tensor, `[batch, heads, tokens, features]` or scores `[batch, heads, queries, keys]`.
#[derive(Clone)]
pub(super) struct Values<B: Backend>(pub(super) FloatTensor<B>);

/// Tokens `range` of every plane.
fn tokens(range: &Range<usize>) -> [Slice; 4] {
    [
        Slice::full(),
        Slice::full(),
        range.clone().into(),
        Slice::full(),
    ]
}

impl<B: Backend> Values<B> {
    pub(super) fn matmul(self, other: Self) -> Self {
        Self(B::float_matmul(self.0, other.0))
    }

    pub(super) fn transpose(self) -> Self {
        Self(B::float_swap_dims(self.0, 2, 3))
    }

    pub(super) fn exp(self) -> Self {
        Self(B::float_exp(self.0))
    }

    pub(super) fn log(self) -> Self {
        Self(B::float_log(self.0))
    }

    /// Sum over the last axis, kept with length one.
    pub(super) fn sum(self) -> Self {
        Self(B::float_sum_dim(self.0, 3))
    }

    /// Maximum over the last axis, kept with length one.
    pub(super) fn max(self) -> Self {
        Self(B::float_max_dim(self.0, 3))
    }

    pub(super) fn detach(self) -> Self {
        Self(B::float_detach(self.0))
    }

    pub(super) fn scale(self, factor: f64) -> Self {
        Self(B::float_mul_scalar(self.0, factor.into()))
    }

    pub(super) fn fill(self, mask: BoolTensor<B>, value: f64) -> Self {
        Self(B::float_mask_fill(self.0, mask, value.into()))
    }

    pub(super) fn cast(self, dtype: FloatDType) -> Self {
        Self(B::float_cast(self.0, dtype))
    }

    pub(super) fn reshape(self, shape: &[usize]) -> Self {
        Self(B::float_reshape(self.0, Shape::from(shape.to_vec())))
    }

    pub(super) fn expand(self, shape: &[usize]) -> Self {
        Self(B::float_expand(self.0, Shape::from(shape.to_vec())))
    }

    /// The queries `range`.
    pub(super) fn rows(&self, range: &Range<usize>) -> Self {
        Self(B::float_slice(self.0.clone(), &tokens(range)))
    }

    /// The keys or values `range`: of their own tensor, so along the same axis as [`rows`](Self::rows).
    pub(super) fn columns(&self, range: &Range<usize>) -> Self {
        self.rows(range)
    }

    pub(super) fn add_to_columns(self, range: &Range<usize>, more: Self) -> Self {
        let sum = self.columns(range) + more;
        Self(B::float_slice_assign(self.0, &tokens(range), sum.0))
    }

    pub(super) fn is_zero(&self, dtype: BoolDType) -> BoolTensor<B> {
        B::float_equal_elem(self.0.clone(), 0.0.into(), dtype)
    }

    pub(super) fn at_least(&self, value: f64, dtype: BoolDType) -> BoolTensor<B> {
        B::float_greater_equal_elem(self.0.clone(), value.into(), dtype)
    }

    pub(super) fn at_most(&self, value: f64, dtype: BoolDType) -> BoolTensor<B> {
        B::float_lower_equal_elem(self.0.clone(), value.into(), dtype)
    }
}

macro_rules! operator {
    ($trait:ident, $method:ident, $op:ident) => {
        impl<B: Backend> $trait for Values<B> {
            type Output = Self;

            fn $method(self, other: Self) -> Self {
                Self(B::$op(self.0, other.0))
            }
        }
    };
}

operator!(Add, add, float_add);
operator!(Sub, sub, float_sub);
operator!(Mul, mul, float_mul);
operator!(Div, div, float_div);

//! Operands that a call may lack.

use burn::backend::AutodiffBackend;
use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::backend::autodiff::ops::NodeGuard;
use burn::backend::tensor::FloatTensor;
use burn::backend::{Autodiff, Backend, ExtensionType};
use burn::tensor::Tensor;

/// A tensor, or its absence: an `Option` that crosses Burn's dispatch.
#[derive(ExtensionType, Debug, Clone)]
#[cfg_attr(feature = "cubecl", extension_type(fusion))]
pub enum Optional<B: Backend> {
    /// No such operand.
    Absent,
    /// The operand.
    Present(FloatTensor<B>),
}

impl<B: Backend> Optional<B> {
    #[cfg(any(feature = "flex", feature = "cubecl"))]
    pub(crate) fn into_option(self) -> Option<FloatTensor<B>> {
        match self {
            Self::Absent => None,
            Self::Present(tensor) => Some(tensor),
        }
    }

    pub(crate) fn new(tensor: Option<FloatTensor<B>>) -> Self {
        tensor.map_or(Self::Absent, Self::Present)
    }
}

impl Optional<burn::backend::Dispatch> {
    pub(crate) fn of<const D: usize>(tensor: Option<Tensor<D>>) -> Self {
        Self::new(tensor.map(Tensor::into_dispatch))
    }
}

impl<B: Backend, C: CheckpointStrategy> Optional<Autodiff<B, C>> {
    /// The operand below autodiff.
    pub(crate) fn into_inner(self) -> Optional<B> {
        match self {
            Self::Absent => Optional::Absent,
            Self::Present(tensor) => Optional::Present(tensor.into_primitive()),
        }
    }

    /// Its node; for an absent operand one that asks for no gradient, made of `like`.
    pub(crate) fn node(&self, like: &FloatTensor<Autodiff<B, C>>) -> NodeGuard {
        match self {
            Self::Absent => Autodiff::<B, C>::from_inner(like.primitive().clone()).node(),
            Self::Present(tensor) => tensor.node(),
        }
    }
}

//! The layers: configuration, initialisation, `forward` over a whole sequence, `forward_from` a carried
//! state, `step` by one token.

mod init;
mod mamba1;
mod mamba2;

pub use mamba1::{Mamba1, Mamba1Config, Mamba1State};
#[cfg(feature = "flex")]
pub(crate) use mamba2::NORM_EPS;
pub use mamba2::{Mamba2, Mamba2Config, Mamba2State};

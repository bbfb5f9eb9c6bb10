//! The convolution on Burn's CubeCL backends.

mod backward;
mod forward;
mod launch;

pub(crate) use launch::Conv;

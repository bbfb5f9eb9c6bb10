//! Kernels for devices whose matrix units multiply `16 x 16` by `16 x 8` blocks held in registers: half
//! precision, f32 sums.

mod forward;
mod joint;
mod keys;
mod queries;
mod tiles;

pub(super) use forward::forward_matrix;
pub(super) use joint::{SHARERS, finish, prepare, sums_of_head};
pub(super) use keys::backward_keys_matrix;
pub(super) use queries::backward_queries_matrix;
pub(super) use tiles::{MatrixPlan, VECTOR};

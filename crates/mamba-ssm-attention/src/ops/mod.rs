//! The operators: one folder each, with the definition in tensor operations beside the fast versions.

pub mod flash_attention;
pub mod rotary;

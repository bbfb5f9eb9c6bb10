//! The operators, one room each.

pub mod project;

//! Tests that cross crates, one binary.

mod cases;

//! The crate as its users see it: files in, batches or errors out.

mod bad_input;
mod support;
mod whole_way;

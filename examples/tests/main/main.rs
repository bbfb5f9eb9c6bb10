//! The commands of the example `bitcoin`, run as a user runs them: as a program.

mod bad_input;
mod commands;
mod demo;
#[cfg(unix)]
mod interrupt;
mod workshop;

mod bad_input;
mod commands;
mod demo;
mod golden;
#[cfg(unix)]
mod interrupt;
mod workshop;

mod bad_input;
mod commands;
mod golden;
mod workshop;

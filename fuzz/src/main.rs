//! Hands made-up call frames, valid and malformed, to the handlers of the shared library.
//!
//! `docs/testing.md` says what is checked. A frame follows from its seed alone, so that one command shows
//! it again: `--seed N --frames 1 --verbose`.

mod board;
mod call;
mod change;
mod check;
mod frame;
mod generate;
mod library;
mod memory;
mod options;
mod pool;
mod record;
mod rules;
mod supervise;
mod values;
mod worker;

use std::process::ExitCode;

fn main() -> ExitCode {
    let done = options::parse().and_then(|options| match &options.board {
        Some(board) => worker::run(&options, board).map(|()| true),
        None => supervise::run(&options),
    });
    match done {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("jax-mhc-fuzz: {error}");
            ExitCode::from(2)
        }
    }
}

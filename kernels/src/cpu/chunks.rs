//! The loop over chunks of tokens that forward calls and the calls without parameter gradients share.

use crate::cpu::parallel::{Pool, for_each};
use crate::cpu::scratch::{Exhausted, pieces};

/// Runs `run` on every chunk of up to `step` tokens: `cut` takes the chunk's rows off the front of the call's, and
/// `scratch` makes the memory that a thread uses for all its chunks.
///
/// # Errors
/// No memory for the list of chunks, or the error of `scratch`.
pub fn run_chunks<T: Send, W>(
    pool: &dyn Pool,
    tokens: usize,
    step: usize,
    mut cut: impl FnMut(usize) -> T,
    scratch: impl Fn() -> Result<W, Exhausted> + Sync,
    run: impl Fn(&mut W, usize, T) + Sync,
) -> Result<(), Exhausted> {
    let chunks = pieces(tokens, step, |tokens| (tokens, cut(tokens)))?;
    for_each(
        "tokens",
        pool,
        chunks,
        scratch,
        |scratch, _, (tokens, chunk)| {
            run(scratch, tokens, chunk);
            Ok(())
        },
    )
}

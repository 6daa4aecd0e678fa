//! How the CPU runs a call, in words for the log.

use crate::signature::{Call, Op};
use crate::simd::instruction_set_of;
use crate::{Pool, collapse, post, pre, sinkhorn};

/// The instruction set, and the chunks of work that threads share; sums over tokens are added in their
/// order. Such as `avx2, chunks: 7 of 16 tokens, threads: 2`.
pub fn plan(call: &Call, pool: &dyn Pool) -> String {
    let tokens = match call.op {
        Op::PreFwd | Op::SeamFwd | Op::HeadFwd => pre::CHUNK,
        Op::PreBwd | Op::SeamBwd | Op::HeadBwd => pre::group_tokens(call.tokens),
        Op::PostFwd | Op::PostBwd => post::CHUNK,
        Op::CollapseFwd | Op::CollapseBwd => collapse::CHUNK,
        Op::SinkhornFwd | Op::SinkhornBwd => sinkhorn::CHUNK,
    };
    let chunks = call.tokens.div_ceil(tokens);
    let threads = pool.num_threads().clamp(1, chunks.max(1));
    let instruction_set = instruction_set_of(call.dtype);
    format!("{instruction_set}, chunks: {chunks} of {tokens} tokens, threads: {threads}")
}

//! How the CPU runs a call, in words for the log.

use crate::contract::check::CheckedCall;
use crate::contract::table::Call;
use crate::cpu::simd::instruction_set_of;
use crate::cpu::{Pool, collapse, post, pre, sinkhorn};

/// The instruction set, and the chunks of work that threads share; sums over tokens are added in their
/// order. Such as `avx2, chunks: 7 of 16 tokens, threads: 2`.
pub fn plan(call: &CheckedCall, pool: &dyn Pool) -> String {
    let tokens = match call.kind {
        Call::PreFwd | Call::PostPreFwd | Call::HeadFwd => pre::CHUNK,
        Call::PreBwd | Call::PostPreBwd | Call::HeadBwd => pre::group_tokens(call.tokens),
        Call::PostFwd | Call::PostBwd => post::CHUNK,
        Call::CollapseFwd | Call::CollapseBwd => collapse::CHUNK,
        Call::SinkhornFwd | Call::SinkhornBwd => sinkhorn::CHUNK,
    };
    let chunks = call.tokens.div_ceil(tokens);
    let threads = pool.num_threads().clamp(1, chunks.max(1));
    let instruction_set = instruction_set_of(call.dtype);
    format!("{instruction_set}, chunks: {chunks} of {tokens} tokens, threads: {threads}")
}

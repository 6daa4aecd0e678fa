//! Launches of `collapse_fwd` and `collapse_bwd`.

use super::post::{THREADS, channels, grid};
use super::sizes::{for_rows, is_aligned, streams_size};
use crate::contract::check::CheckedCall;
use crate::contract::table::Call;
use crate::gpu::launch::{Arg, Device, Kernel, Launch, Problem, Workspace};

/// Threads of a block with one token, at most (`kMaxBackwardThreads` of collapse.cu).
const MAX_BACKWARD_THREADS: usize = 128;

/// The launches of a call, in their order.
pub fn plan(call: &CheckedCall, _device: &Device) -> Vec<Launch> {
    let (functions, grid, threads, mut args) = match call.kind {
        Call::CollapseBwd => {
            let threads = call.c.div_ceil(channels(call)).min(MAX_BACKWARD_THREADS);
            let args = vec![
                Arg::Pointer(call.operand_address("x")),
                Arg::Pointer(call.operand_address("d_u")),
                Arg::Pointer(call.result_address("d_h_pre")),
            ];
            let functions = ["collapse_bwd", "collapse_bwd_unaligned"];
            (functions, [call.tokens as u32, 1, 1], threads, args)
        }
        _ => {
            let (grid, slab) = grid(call);
            let args = vec![
                Arg::Pointer(call.operand_address("x")),
                Arg::Pointer(call.operand_address("h_pre")),
                Arg::Pointer(call.result_address("u")),
                Arg::I32(call.tokens as i32),
                Arg::I32(slab as i32),
            ];
            let functions = ["collapse_fwd", "collapse_fwd_unaligned"];
            (functions, grid, THREADS, args)
        }
    };
    args.extend([Arg::I32(call.n as i32), Arg::I32(call.c as i32)]);
    vec![Launch {
        kernel: Kernel {
            file: "collapse",
            function: for_rows(call.c, functions),
            size: streams_size(call.n, is_aligned(call.c)),
            dtype: call.dtype,
        },
        grid,
        block: threads.next_multiple_of(32) as u32,
        cluster: 1,
        shared_bytes: 0,
        args,
    }]
}

/// What the call needs.
pub fn workspace(_problem: &Problem) -> Workspace {
    Workspace::default()
}

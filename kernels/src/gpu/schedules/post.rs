//! Launches of `post_fwd` and `post_bwd`, for post_pre too, and of the part of post's gradient that pre has.

use super::sizes::{for_rows, is_aligned, streams_bound, streams_size};
use crate::contract::check::CheckedCall;
use crate::contract::table::Call;
use crate::gpu::launch::{Arg, Device, Kernel, Launch, Problem, Workspace};

/// Threads of a block (`kThreads` of post.cu and collapse.cu, `kBackwardThreads` of post.cu).
pub const THREADS: usize = 256;
const BACKWARD_THREADS: usize = 128;
/// Threads for a slab of tokens, at most: their number must fit into 32 bits.
const SLAB_THREADS: usize = 1 << 30;

/// The launches of a call, in their order.
pub fn plan(call: &CheckedCall, _device: &Device) -> Vec<Launch> {
    vec![match call.kind {
        Call::PostBwd => backward(call, call.operand_address("d_x_new")),
        _ => forward(call, call.result_address("x_new")),
    }]
}

/// What the call needs.
pub fn workspace(_problem: &Problem) -> Workspace {
    Workspace::default()
}

fn kernel(call: &CheckedCall, functions: [&'static str; 2]) -> Kernel {
    Kernel {
        file: "post",
        function: for_rows(call.c, functions),
        size: streams_size(call.n, is_aligned(call.c)),
        dtype: call.dtype,
    }
}

/// Channels that a thread takes at once (`V` of post.cu and collapse.cu).
pub fn channels(call: &CheckedCall) -> usize {
    let bytes = if streams_bound(call.n, is_aligned(call.c)) <= 4 {
        16
    } else {
        8
    };
    bytes / call.dtype.num_bytes()
}

/// Blocks with a thread for all streams of some channels of a token.
pub fn grid(call: &CheckedCall) -> ([u32; 3], usize) {
    let threads = call.c.div_ceil(channels(call));
    let slab = (SLAB_THREADS / threads).clamp(1, call.tokens.max(1));
    let blocks = (slab * threads).div_ceil(THREADS);
    let slabs = call.tokens.div_ceil(slab);
    ([blocks as u32, slabs as u32, 1], slab)
}

/// X' at `x_new`.
pub fn forward(call: &CheckedCall, x_new: u64) -> Launch {
    let (grid, slab) = grid(call);
    Launch {
        kernel: kernel(call, ["post_fwd", "post_fwd_unaligned"]),
        grid,
        block: THREADS as u32,
        cluster: 1,
        shared_bytes: 0,
        args: vec![
            Arg::Pointer(call.operand_address("x")),
            Arg::Pointer(call.operand_address("y")),
            Arg::Pointer(call.operand_address("h_post")),
            Arg::Pointer(call.operand_address("h_res")),
            Arg::Pointer(x_new),
            Arg::I32(call.tokens as i32),
            Arg::I32(slab as i32),
            Arg::I32(call.n as i32),
            Arg::I32(call.c as i32),
        ],
    }
}

/// H_res^T times the gradient of X' at `d_x_new`, which may lie where d_x goes.
pub fn mix(call: &CheckedCall, d_x_new: u64, h_res: u64, d_x: u64) -> Launch {
    let (grid, slab) = grid(call);
    Launch {
        kernel: kernel(call, ["mix", "mix_unaligned"]),
        grid,
        block: THREADS as u32,
        cluster: 1,
        shared_bytes: 0,
        args: vec![
            Arg::Pointer(d_x_new),
            Arg::Pointer(h_res),
            Arg::Pointer(d_x),
            Arg::I32(call.tokens as i32),
            Arg::I32(slab as i32),
            Arg::I32(call.n as i32),
            Arg::I32(call.c as i32),
        ],
    }
}

/// The gradients from the one of X' at `d_x_new`.
pub fn backward(call: &CheckedCall, d_x_new: u64) -> Launch {
    Launch {
        kernel: kernel(call, ["post_bwd", "post_bwd_unaligned"]),
        grid: [call.tokens as u32, 1, 1],
        block: BACKWARD_THREADS as u32,
        cluster: 1,
        shared_bytes: 0,
        args: vec![
            Arg::Pointer(call.operand_address("x")),
            Arg::Pointer(call.operand_address("y")),
            Arg::Pointer(call.operand_address("h_post")),
            Arg::Pointer(d_x_new),
            Arg::Pointer(call.result_address("d_y")),
            Arg::Pointer(call.result_address("d_h_post")),
            Arg::Pointer(call.result_address("d_h_res")),
            Arg::I32(call.n as i32),
            Arg::I32(call.c as i32),
        ],
    }
}

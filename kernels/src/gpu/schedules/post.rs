//! The schedule of `post_fwd` and `post_bwd`, whose launches post_pre has too, and the part of post's gradient that
//! pre has.

use super::Schedule;
use super::sizes::{self, for_rows, is_aligned};
use crate::contract::check::CheckedCall;
use crate::contract::table::Call;
use crate::gpu::kernel::Kernel;
use crate::gpu::launch::{Arg, Launch};

/// Threads for a slab of tokens, at most: their number must fit into 32 bits.
const SLAB_THREADS: usize = 1 << 30;

/// Forward a thread some channels of a token, backward a block a token.
pub const SCHEDULE: Schedule = Schedule {
    name: "post",
    plan: |call, _, _| {
        Some(vec![match call.kind {
            Call::PostBwd => backward(call, call.operand_address("d_x_new")),
            _ => forward(call, call.result_address("x_new")),
        }])
    },
};

fn kernel(call: &CheckedCall, functions: [&'static str; 2]) -> Kernel {
    let size = sizes::streams(call.n, is_aligned(call.c));
    Kernel::of(for_rows(call.c, functions), size, call.dtype)
}

/// Channels that a thread takes at once (`V` of post.cu and collapse.cu).
pub fn channels(call: &CheckedCall) -> usize {
    let bytes = if sizes::streams_bound(call.n, is_aligned(call.c)) <= 4 {
        16
    } else {
        8
    };
    bytes / call.dtype.num_bytes()
}

/// Blocks with a thread for all streams of some channels of a token, and the tokens of a row of them.
pub fn grid(call: &CheckedCall, kernel: Kernel) -> ([usize; 3], usize) {
    let threads = call.c.div_ceil(channels(call));
    let slab = (SLAB_THREADS / threads).clamp(1, call.tokens.max(1));
    let blocks = (slab * threads).div_ceil(kernel.threads());
    let slabs = call.tokens.div_ceil(slab);
    ([blocks, slabs, 1], slab)
}

/// X' at `x_new`.
pub fn forward(call: &CheckedCall, x_new: u64) -> Launch {
    let kernel = kernel(call, ["post_fwd", "post_fwd_unaligned"]);
    let (grid, slab) = grid(call, kernel);
    kernel.launch(
        grid,
        vec![
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
    )
}

/// H_res^T times the gradient of X' at `d_x_new`, which may lie where d_x goes.
pub fn mix(call: &CheckedCall, d_x_new: u64, h_res: u64, d_x: u64) -> Launch {
    let kernel = kernel(call, ["mix", "mix_unaligned"]);
    let (grid, slab) = grid(call, kernel);
    kernel.launch(
        grid,
        vec![
            Arg::Pointer(d_x_new),
            Arg::Pointer(h_res),
            Arg::Pointer(d_x),
            Arg::I32(call.tokens as i32),
            Arg::I32(slab as i32),
            Arg::I32(call.n as i32),
            Arg::I32(call.c as i32),
        ],
    )
}

/// The gradients from the one of X' at `d_x_new`.
pub fn backward(call: &CheckedCall, d_x_new: u64) -> Launch {
    let kernel = kernel(call, ["post_bwd", "post_bwd_unaligned"]);
    kernel.launch(
        [call.tokens, 1, 1],
        vec![
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
    )
}

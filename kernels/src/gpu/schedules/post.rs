//! The schedule of `post_fwd` and `post_bwd`, whose launches post_pre has too, and the part of post's gradient that
//! pre has.

use super::Schedule;
use super::sizes::{self, for_rows, is_aligned};
use crate::contract::check::CheckedCall;
use crate::contract::table::Call;
use crate::contract::view::DType;
use crate::gpu::kernel::Kernel;
use crate::gpu::launch::{Arg, Launch};
use crate::gpu::workspace::{Part, Workspace};

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
    sizes::kernel(call, for_rows(call.c, functions))
}

/// Channels that a thread takes at once (`kThreadChannels` of math/post.cuh).
pub fn channels(call: &CheckedCall) -> usize {
    channels_up_to(8, call)
}

/// Channels of 16 bytes for up to `most` streams, else of 8.
fn channels_up_to(most: usize, call: &CheckedCall) -> usize {
    let is_few = sizes::streams_bound(call.n, is_aligned(call.c)) <= most;
    (if is_few { 16 } else { 8 }) / call.dtype.num_bytes()
}

/// Blocks with a thread for all streams of some channels of a token, and the tokens of a row of them.
pub fn grid(call: &CheckedCall, kernel: Kernel) -> ([usize; 3], usize) {
    grid_of(call, kernel, call.c.div_ceil(channels(call)))
}

/// The same with so many threads for a token.
fn grid_of(call: &CheckedCall, kernel: Kernel, threads: usize) -> ([usize; 3], usize) {
    let slab = (SLAB_THREADS / threads).clamp(1, call.tokens.max(1));
    let blocks = (slab * threads).div_ceil(kernel.threads());
    let slabs = call.tokens.div_ceil(slab);
    ([blocks, slabs, 1], slab)
}

/// The same for kernels that mix streams: many bfloat16 streams have a warp for some channels (`kMixesByWarps`).
fn mixing_grid(call: &CheckedCall, kernel: Kernel) -> ([usize; 3], usize) {
    let are_many = sizes::streams_bound(call.n, is_aligned(call.c)) >= 8;
    if are_many && call.dtype == DType::Bf16 {
        grid_of(call, kernel, 32 * call.c.div_ceil(kernel.more("channels")))
    } else {
        grid(call, kernel)
    }
}

/// Threads of a block that has the channels of a token (`kTokenChannels` of math/post.cuh).
pub fn token_threads(call: &CheckedCall, kernel: Kernel) -> u32 {
    let threads = call
        .c
        .div_ceil(channels_up_to(4, call))
        .min(kernel.threads());
    threads.next_multiple_of(32) as u32
}

/// X' at `x_new`.
pub fn forward(call: &CheckedCall, x_new: u64) -> Launch {
    let kernel = kernel(call, ["post_fwd", "post_fwd_unaligned"]);
    let (grid, slab) = mixing_grid(call, kernel);
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

/// Sums over some channels each of <d_u, X'[i]>, the gradient of h_pre.
#[derive(Debug, Clone, Copy)]
pub struct Dots {
    /// Address: [tokens, num, n].
    pub address: u64,
    /// How many there are of a token and stream.
    pub num: usize,
}

/// X' at `x_new`, and dots of it with the cotangent of u; None where no kernel makes both. With a layer norm what u is
/// the cotangent of is known only once X' is.
pub fn forward_with_dots(
    call: &CheckedCall,
    workspace: &mut dyn Workspace,
    x_new: u64,
) -> Option<(Launch, Dots)> {
    let kernel = sizes::find_kernel(call, "post_dots_fwd")?;
    if !is_aligned(call.c) || call.norm_width > 0 {
        return None;
    }
    let num = call.c.div_ceil(kernel.more("channels"));
    let address = workspace.take(Part::per_token(num * call.n));
    let (grid, slab) = grid_of(call, kernel, 32 * num);
    let names = ["x", "y", "h_post", "h_res", "d_u"];
    let mut args = names
        .map(|name| Arg::Pointer(call.operand_address(name)))
        .to_vec();
    args.extend([x_new, address].map(Arg::Pointer));
    args.extend([call.tokens, slab, call.n, call.c].map(|number| Arg::I32(number as i32)));
    Some((kernel.launch(grid, args), Dots { address, num }))
}

/// H_res^T times the gradient of X' at `d_x_new`, which may lie where d_x goes.
pub fn mix(call: &CheckedCall, d_x_new: u64, h_res: u64, d_x: u64) -> Launch {
    let kernel = kernel(call, ["mix", "mix_unaligned"]);
    let (grid, slab) = mixing_grid(call, kernel);
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
    let args = vec![
        Arg::Pointer(call.operand_address("x")),
        Arg::Pointer(call.operand_address("y")),
        Arg::Pointer(call.operand_address("h_post")),
        Arg::Pointer(d_x_new),
        Arg::Pointer(call.result_address("d_y")),
        Arg::Pointer(call.result_address("d_h_post")),
        Arg::Pointer(call.result_address("d_h_res")),
        Arg::I32(call.n as i32),
        Arg::I32(call.c as i32),
    ];
    Launch {
        block: token_threads(call, kernel),
        ..kernel.launch([call.tokens, 1, 1], args)
    }
}

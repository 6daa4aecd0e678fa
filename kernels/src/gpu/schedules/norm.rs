//! Launches around those of pre and of post_pre where the layer's input is normalised (norm.cu).

use super::sizes::{self, find_kernel, kernel};
use crate::contract::check::CheckedCall;
use crate::gpu::kernel::Kernel;
use crate::gpu::launch::{Arg, Launch};
use crate::gpu::tuning::STREAMS;
use crate::gpu::workspace::{Part, Workspace};

/// Multiprocessors of an H200 and threads of each, where a thread has 16 bytes of a stream: so many blocks of a backward
/// pass run at once there, each with a sum over its tokens. Numbers that no other GPU has a say in.
const MULTIPROCESSORS: usize = 132;
const THREADS: usize = 1024;
const MAX_BLOCKS_AT_ONCE: usize = 8;

/// du, in the dtype of the streams, which a backward pass keeps in the workspace.
pub fn d_u(call: &CheckedCall) -> Part {
    Part::bytes_per_token(call.norm_width * call.dtype.num_bytes())
}

/// Blocks of a backward pass for any number of tokens.
pub fn max_blocks(call: &CheckedCall) -> usize {
    let threads = (call.c * call.dtype.num_bytes()).div_ceil(16);
    let at_once = THREADS / threads.next_multiple_of(32).max(1);
    MULTIPROCESSORS * at_once.clamp(1, MAX_BLOCKS_AT_ONCE)
}

/// Sums of `rows` blocks or clusters for the gradient of norm_scale, of so many numbers each where there is a norm.
pub fn sums(call: &CheckedCall, rows: usize, row: usize) -> Part {
    Part::fixed(if call.norm_width > 0 { rows * row } else { 0 })
}

/// The normalised input in place of u, from the streams at `x`; nothing where there is no norm.
pub fn forward(call: &CheckedCall, x: u64) -> Option<Launch> {
    let args = || {
        vec![
            Arg::Pointer(x),
            Arg::Pointer(call.result_address("h_pre")),
            Arg::Pointer(call.operand_address("norm_scale")),
            Arg::Pointer(call.result_address("u")),
            Arg::Pointer(call.result_address("rho")),
            Arg::F32(call.config.norm_scale_eps as f32),
            Arg::I32(call.tokens as i32),
            Arg::I32(call.c as i32),
            Arg::I32(call.n as i32),
        ]
    };
    (call.norm_width > 0).then(|| kernel(call, "norm_fwd").launch([call.tokens, 1, 1], args()))
}

/// Addresses of the cotangents of the sum over the streams at `x` and of h_pre, the latter with what the rounding of
/// the former takes from it, and the launches that make them: operands and nothing where there is no norm.
pub fn backward(
    call: &CheckedCall,
    workspace: &mut dyn Workspace,
    x: u64,
) -> ([u64; 2], Vec<Launch>) {
    if call.norm_width == 0 {
        let given = ["d_u", "d_h_pre"].map(|name| call.operand_address(name));
        return (given, vec![]);
    }
    let [d_sum, d_w, d_h_pre] = [
        d_u(call),
        sums(call, max_blocks(call), call.c),
        Part::per_token(call.n),
    ]
    .map(|part| workspace.take(part));
    let blocks = call.tokens.min(max_blocks(call));
    let mut args = vec![Arg::Pointer(x)];
    let names = ["alpha", "bias", "m", "norm_scale", "rho", "d_u", "d_h_pre"];
    args.extend(names.map(|name| Arg::Pointer(call.operand_address(name))));
    args.extend([
        Arg::Pointer(d_sum),
        Arg::Pointer(d_w),
        Arg::Pointer(d_h_pre),
        Arg::I32(call.tokens as i32),
        Arg::I32(call.c as i32),
        Arg::I32(call.columns as i32),
        Arg::Layout(call.layout.into()),
        Arg::Settings(call.config.into()),
    ]);
    let launches = vec![
        backward_launch(call, blocks, args),
        sum(call, d_w, [blocks, call.c]),
    ];
    ([d_sum, d_h_pre], launches)
}

/// The launch with a thread for every part of a row, where the row has so few.
fn backward_launch(call: &CheckedCall, blocks: usize, args: Vec<Arg>) -> Launch {
    let once = find_kernel(call, "norm_bwd_once").and_then(|kernel| {
        let parts = (call.c * call.dtype.num_bytes()).div_ceil(kernel.more("bytes"));
        (parts <= kernel.threads()).then(|| Launch {
            block: parts.next_multiple_of(32) as u32,
            ..kernel.launch([blocks, 1, 1], args.clone())
        })
    });
    once.unwrap_or_else(|| {
        let size = sizes::bound_of(STREAMS, call.n);
        Kernel::of("norm_bwd", size, call.dtype).launch([blocks, 1, 1], args)
    })
}

/// The gradient of norm_scale from `rows` sums at `d_w`, which have so many numbers each.
pub fn sum(call: &CheckedCall, d_w: u64, [rows, row]: [usize; 2]) -> Launch {
    let kernel = kernel(call, "sum_norm_scale");
    let args = vec![
        Arg::Pointer(d_w),
        Arg::Pointer(call.result_address("d_norm_scale")),
        Arg::I32(rows as i32),
        Arg::I32(call.c as i32),
        Arg::I32(row as i32),
    ];
    kernel.launch([call.c.div_ceil(kernel.more("channels")), 1, 1], args)
}

//! Launches around those of pre and of post_pre where the layer's input is normalised (norm.cu,
//! post_pre_norm_bwd.cu).

use super::sizes::{is_aligned, streams_size};
use crate::contract::check::CheckedCall;
use crate::gpu::launch::{Arg, Kernel, Launch, Problem, Workspace};
use crate::gpu::workspace::{Memory, Part, room};

/// `kThreads`
const THREADS: u32 = 256;
/// Blocks of the backward pass, each with a sum over its tokens; a number that no GPU has a say in.
const MAX_BLOCKS: usize = 512;
/// `kSumChannels`
const SUM_CHANNELS: usize = 32;
/// Channels of a thread of `post_pre_norm_bwd` (`kV`), and those from which on its blocks are so large that half as
/// many fill a GPU.
const POST_PRE_CHANNELS: usize = 8;
const WIDE: usize = 2049;

/// What the backward pass keeps in the workspace: du, in the dtype of the streams, sums for dw, and d_h_pre.
fn parts(problem: &Problem) -> [Part; 3] {
    let row_bytes = problem.norm_width * problem.dtype.num_bytes();
    let sums = Part {
        per_token: 0,
        fixed: MAX_BLOCKS * problem.norm_width,
    };
    let d_sum = Part::per_token(row_bytes.div_ceil(size_of::<f32>()));
    [d_sum, sums, Part::per_token(problem.n)]
}

/// What the backward pass needs.
pub fn workspace(problem: &Problem) -> Workspace {
    if problem.norm_width == 0 {
        return Workspace::default();
    }
    room(&parts(problem))
}

fn launch(call: &CheckedCall, function: &'static str, blocks: usize, args: Vec<Arg>) -> Launch {
    Launch {
        kernel: Kernel {
            file: "norm",
            function,
            size: streams_size(call.n, is_aligned(call.c)),
            dtype: call.dtype,
        },
        grid: [blocks as u32, 1, 1],
        block: THREADS,
        cluster: 1,
        shared_bytes: 0,
        args,
    }
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
    (call.norm_width > 0).then(|| launch(call, "norm_fwd", call.tokens, args()))
}

/// Where the cotangents of the sum over the streams at `x` and of h_pre lie, the latter with what the rounding of
/// the former takes from it, and what makes them: operands and nothing where there is no norm.
pub fn backward(call: &CheckedCall, memory: &mut Memory, x: u64) -> ([u64; 2], Vec<Launch>) {
    if call.norm_width == 0 {
        let given = ["d_u", "d_h_pre"].map(|name| call.operand_address(name));
        return (given, vec![]);
    }
    let [d_sum, d_w, d_h_pre] = parts(&call.problem()).map(|part| memory.take(part));
    let blocks = call.tokens.min(MAX_BLOCKS);
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
        launch(call, "norm_bwd", blocks, args),
        sum(call, d_w, blocks),
    ];
    ([d_sum, d_h_pre], launches)
}

/// The first of both for the one-pass kernel of post_pre, from u_norm and without X'.
pub fn post_pre_backward(call: &CheckedCall, memory: &mut Memory) -> (u64, Vec<Launch>) {
    if call.norm_width == 0 {
        return (call.operand_address("d_u"), vec![]);
    }
    let [d_sum, d_w, _] = parts(&call.problem()).map(|part| memory.take(part));
    let blocks = call.tokens.min(if call.c < WIDE {
        MAX_BLOCKS
    } else {
        MAX_BLOCKS / 2
    });
    let names = [
        "x",
        "y",
        "h_post",
        "h_res",
        "alpha",
        "bias",
        "m",
        "norm_scale",
        "rho",
        "u_norm",
        "d_u",
    ];
    let mut args = names
        .map(|name| Arg::Pointer(call.operand_address(name)))
        .to_vec();
    args.extend([
        Arg::Pointer(d_sum),
        Arg::Pointer(d_w),
        Arg::I32(call.tokens as i32),
        Arg::I32(call.c as i32),
        Arg::Settings(call.config.into()),
    ]);
    let main = Launch {
        kernel: Kernel {
            file: "post_pre_norm_bwd",
            function: "post_pre_norm_bwd",
            size: "n4",
            dtype: call.dtype,
        },
        grid: [blocks as u32, 1, 1],
        block: (call.c / POST_PRE_CHANNELS).next_multiple_of(32) as u32,
        cluster: 1,
        shared_bytes: 0,
        args,
    };
    (d_sum, vec![main, sum(call, d_w, blocks)])
}

/// The gradient of norm_scale from `rows` sums at `d_w`.
pub fn sum(call: &CheckedCall, d_w: u64, rows: usize) -> Launch {
    let args = vec![
        Arg::Pointer(d_w),
        Arg::Pointer(call.result_address("d_norm_scale")),
        Arg::I32(rows as i32),
        Arg::I32(call.c as i32),
    ];
    launch(call, "sum_norm_scale", call.c.div_ceil(SUM_CHANNELS), args)
}

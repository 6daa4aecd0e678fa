//! Launches around those of pre and of post_pre where the layer's input is normalised (norm.cu).

use super::sizes::kernel;
use crate::contract::check::CheckedCall;
use crate::gpu::launch::{Arg, Launch};
use crate::gpu::workspace::{Part, Workspace};

/// Blocks of a backward pass, each with a sum over its tokens; a number that no GPU has a say in.
pub const MAX_BLOCKS: usize = 512;

/// du, in the dtype of the streams, which a backward pass keeps in the workspace.
pub fn d_u(call: &CheckedCall) -> Part {
    Part::bytes_per_token(call.norm_width * call.dtype.num_bytes())
}

/// Sums of `rows` blocks or clusters for the gradient of norm_scale.
pub fn sums(call: &CheckedCall, rows: usize) -> Part {
    Part::fixed(rows * call.norm_width)
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
    let [d_sum, d_w, d_h_pre] = [d_u(call), sums(call, MAX_BLOCKS), Part::per_token(call.n)]
        .map(|part| workspace.take(part));
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
        kernel(call, "norm_bwd").launch([blocks, 1, 1], args),
        sum(call, d_w, blocks),
    ];
    ([d_sum, d_h_pre], launches)
}

/// The gradient of norm_scale from `rows` sums at `d_w`.
pub fn sum(call: &CheckedCall, d_w: u64, rows: usize) -> Launch {
    let kernel = kernel(call, "sum_norm_scale");
    let args = vec![
        Arg::Pointer(d_w),
        Arg::Pointer(call.result_address("d_norm_scale")),
        Arg::I32(rows as i32),
        Arg::I32(call.c as i32),
    ];
    kernel.launch([call.c.div_ceil(kernel.more("channels")), 1, 1], args)
}

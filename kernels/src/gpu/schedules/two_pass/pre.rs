//! Launches of `pre_fwd` and `pre_bwd` in two passes (pre.cu, projection.cu).

use super::projection::{self, Factors, Projection};
use crate::contract::check::CheckedCall;
use crate::contract::config::Constraint;
use crate::contract::layout::CoefficientLayout;
use crate::gpu::device::Device;
use crate::gpu::launch::{Arg, Launch};
use crate::gpu::schedules::post::Dots;
use crate::gpu::schedules::sizes::{self, is_aligned, kernel};
use crate::gpu::schedules::{DXIn, norm};
use crate::gpu::workspace::{Part, Workspace};

/// The most shared memory for what Sinkhorn's backward pass records; the workspace has it otherwise.
const HISTORY_BYTES: usize = 32 << 10;

// pre.cu compares the number of a constraint with those that it knows, and takes any other for `none`.
const _: () = assert!(
    Constraint::ALL.len() == 4,
    "pre_fwd and pre_bwd of two_pass/pre.cu have to take a new constraint"
);

/// The forward pass from the streams at `x`; but for u where its weights are given.
pub fn forward(
    call: &CheckedCall,
    device: &Device,
    workspace: &mut dyn Workspace,
    x: u64,
) -> Vec<Launch> {
    let projection = Projection::of(call, device);
    let partial = workspace.take(projection.partial());
    let slices = projection.slices();
    let u = if call.is_given() {
        0
    } else {
        call.result_address("u")
    };
    let apply = coefficients(call, x, (partial, slices), u);
    projection::project(call, device, workspace, projection, x, partial)
        .into_iter()
        .chain([apply])
        .chain(norm::forward(call, x))
        .collect()
}

/// The coefficients of all tokens from slices of the projection ([`Projection::partial`]: the sums of each token and slice
/// for all octets of columns, then that of the squares and an unused one), and u of the streams at `x` unless it is 0.
pub fn coefficients(call: &CheckedCall, x: u64, partial: (u64, usize), u: u64) -> Launch {
    let names = ["h_pre", "h_post", "h_res", "m", "r"];
    let [h_pre, h_post, h_res, m, r] = names.map(|name| call.result_address(name));
    let results = [u, h_pre, h_post, h_res, m, r];
    apply(call, x, partial, results, [call.tokens, call.c])
}

/// The coefficients that the bias alone makes, of one token, at `results`: h_pre, h_post, h_res and r.
pub fn same_coefficients(call: &CheckedCall, [h_pre, h_post, h_res, r]: [u64; 4]) -> Launch {
    let x = call.operand_address("x");
    apply(call, x, (0, 0), [0, h_pre, h_post, h_res, 0, r], [1, 0])
}

/// The coefficients of some tokens from slices of the projection, and u of some of their channels.
fn apply(
    call: &CheckedCall,
    x: u64,
    (partial, slices): (u64, usize),
    results: [u64; 6],
    [tokens, channels]: [usize; 2],
) -> Launch {
    let kernel = kernel(call, "pre_fwd");
    let mut args = vec![
        Arg::Pointer(x),
        Arg::Pointer(partial),
        Arg::I32(slices as i32),
        Arg::Pointer(call.operand_address("alpha")),
        Arg::Pointer(call.operand_address("bias")),
    ];
    args.extend(results.map(Arg::Pointer));
    args.extend([
        Arg::I32(tokens as i32),
        Arg::I32(channels as i32),
        Arg::I32(call.columns as i32),
        Arg::Layout(call.layout.into()),
        Arg::Settings(call.config.into()),
    ]);
    kernel.launch([tokens.div_ceil(kernel.tokens()), 1, 1], args)
}

/// The backward pass to d_x and the parameters from the streams at `x`, whose dots with d_u may be there.
pub fn backward(
    call: &CheckedCall,
    device: &Device,
    workspace: &mut dyn Workspace,
    x: u64,
    d_x_in: DXIn,
    dots: Option<Dots>,
) -> Option<Vec<Launch>> {
    // Static coefficients have a schedule of their own.
    if call.columns == 0 {
        return None;
    }
    let ([d_u, d_h_pre], mut launches) = norm::backward(call, workspace, x);
    let projection = Projection::of(call, device);
    let dm = projection.fragments().map(|part| workspace.take(part));
    let given = call.is_given().then(|| call.operand_address("h_given"));
    let tokens = Cotangents {
        tokens: call.tokens,
        channels: call.c,
        d_u: if given.is_some() { 0 } else { d_u },
        dots,
        d_h: [
            d_h_pre,
            call.operand_address("d_h_post"),
            call.operand_address("d_h_res"),
        ],
    };
    let logits = logits_bwd(call, workspace, x, &tokens, dm, Part::per_token);
    // d_x_in may lie where d_x does, and x never does: the products are free to run in this order.
    let factors = Factors {
        dm,
        h_pre: given.unwrap_or(logits.h_pre),
        of_tokens: logits.of_tokens,
        d_u,
    };
    launches.push(logits.launch);
    launches.extend(projection::project_back(
        call, device, workspace, projection, x, &factors, d_x_in,
    ));
    launches.extend(projection::d_phi(
        call, device, workspace, projection, x, dm,
    ));
    launches.push(logits.sum);
    Some(launches)
}

/// Cotangents of the coefficients of some tokens.
pub struct Cotangents {
    /// How many tokens.
    pub tokens: usize,
    /// Channels through which u adds to the cotangent of h_pre.
    pub channels: usize,
    /// The cotangent of u; 0 where it adds nothing.
    pub d_u: u64,
    /// What that adds to the cotangent of h_pre, where it is there.
    pub dots: Option<Dots>,
    /// Those of h_pre, h_post and h_res.
    pub d_h: [u64; 3],
}

/// The gradients of the logits.
pub struct LogitsBwd {
    /// What makes r dm, h_pre and the factors of the tokens, and sums over blocks for alpha and bias.
    pub launch: Launch,
    /// What makes d_alpha and d_bias of those.
    pub sum: Launch,
    h_pre: u64,
    of_tokens: u64,
}

/// The gradients of the logits of tokens, those of alpha and bias included. `part` is a part of the workspace with so
/// many floats for each of them.
pub fn logits_bwd(
    call: &CheckedCall,
    workspace: &mut dyn Workspace,
    x: u64,
    cotangents: &Cotangents,
    dm: [u64; 2],
    part: impl Fn(usize) -> Part,
) -> LogitsBwd {
    let Cotangents {
        tokens,
        channels,
        d_u,
        dots,
        d_h,
    } = *cotangents;
    let main = kernel(call, "pre_bwd");
    // Blocks come in pairs, for a tile of tokens.
    let blocks = 2 * tokens.div_ceil(2 * main.tokens());
    let h_pre = workspace.take(part(call.n));
    let of_tokens = workspace.take(part(2));
    let sums = CoefficientLayout::max_num(call.n) + 3;
    let gate_sums = workspace.take(part(sums.div_ceil(main.tokens())));
    // Where the dots are there a block is as many warps as its matrices keep busy (`kBusyWarps`), otherwise a warp for
    // each token and those for H_res.
    let (threads, matrix_warps) = match dots {
        Some(_) => {
            let streams = sizes::streams_bound(call.n, is_aligned(call.c));
            let warps = (main.tokens() * streams).div_ceil(32);
            (32 * warps, warps)
        }
        None => (main.threads(), main.threads() / 32 - main.tokens()),
    };
    // Floats that a block records for Sinkhorn's backward pass.
    let recorded = 2 * call.config.sinkhorn_iters * 32 * matrix_warps;
    let (history, shared_bytes) = if recorded * size_of::<f32>() <= HISTORY_BYTES {
        (0, recorded * size_of::<f32>())
    } else {
        let per_token = recorded.div_ceil(main.tokens());
        (workspace.take(part(per_token)), 0)
    };
    let operand = |name| Arg::Pointer(call.operand_address(name));
    let mut args = vec![Arg::Pointer(x)];
    args.extend(["alpha", "bias", "m", "r"].map(operand));
    args.push(Arg::Pointer(d_u));
    args.extend(d_h.map(Arg::Pointer));
    args.extend(dm.map(Arg::Pointer));
    args.extend([h_pre, of_tokens, gate_sums, history].map(Arg::Pointer));
    args.extend([
        Arg::I32(tokens as i32),
        Arg::I32(channels as i32),
        Arg::I32(call.columns as i32),
        Arg::Layout(call.layout.into()),
        Arg::Settings(call.config.into()),
        Arg::Pointer(dots.map_or(0, |dots| dots.address)),
        Arg::I32(dots.map_or(0, |dots| dots.num) as i32),
    ]);
    let launch = Launch {
        block: threads as u32,
        shared_bytes: shared_bytes as u32,
        ..main.launch([blocks, 1, 1], args)
    };
    let (num, num_alpha) = (call.layout.num(), call.width("alpha"));
    let sum = kernel(call, "sum_gates").launch(
        [num + 3, 1, 1],
        vec![
            Arg::Pointer(gate_sums),
            Arg::Pointer(call.result_address("d_bias")),
            Arg::Pointer(call.result_address("d_alpha")),
            Arg::I32(blocks as i32),
            Arg::I32(num as i32),
            Arg::I32(num_alpha as i32),
        ],
    );
    LogitsBwd {
        launch,
        sum,
        h_pre,
        of_tokens,
    }
}

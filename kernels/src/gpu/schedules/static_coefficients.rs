//! The schedules for static coefficients, which read the streams once (static.cu).

use super::post::{grid, token_threads};
use super::sizes::{find_kernel, kernel};
use super::two_pass::pre::{self, Cotangents};
use super::{DXIn, Schedule, norm};
use crate::contract::check::CheckedCall;
use crate::gpu::device::Device;
use crate::gpu::kernel::Kernel;
use crate::gpu::launch::{Arg, Launch};
use crate::gpu::workspace::{Part, Workspace};

/// Sums over some of the tokens each, of which gradients of the logits are made as of the cotangents of so many tokens;
/// at most.
const MAX_SUMS: usize = 256;

/// The coefficients of one token, then X', u and the coefficients of all tokens.
pub const POST_PRE_FORWARD: Schedule = Schedule {
    name: "static coefficients",
    plan: |call, _, workspace| is_static(call).then(|| post_pre_forward(call, workspace)),
};

/// The streams' gradients, then those of the bias from sums over the tokens.
pub const PRE_BACKWARD: Schedule = Schedule {
    name: "static coefficients",
    plan: |call, device, workspace| {
        let d_x_in = DXIn::of(call, "d_x_in", "h_res");
        pre_backward(call, device, workspace, call.operand_address("x"), d_x_in)
    },
};

/// The same of post and of pre at once, for the numbers of streams that have a size, and without a norm.
pub const POST_PRE_BACKWARD: Schedule = Schedule {
    name: "static coefficients",
    plan: |call, _, workspace| {
        let kernel = find_kernel(call, "post_pre_static_bwd")?;
        let fits = is_static(call) && call.norm_width == 0;
        fits.then(|| post_pre_backward(call, kernel, workspace))
    },
};

fn is_static(call: &CheckedCall) -> bool {
    call.columns == 0
}

fn post_pre_forward(call: &CheckedCall, workspace: &mut dyn Workspace) -> Vec<Launch> {
    let n = call.n;
    let same = [n, n, n * n, 1].map(|floats| workspace.take(Part::fixed(floats)));
    let kernel = kernel(call, "post_pre_static_fwd");
    let (grid, slab) = grid(call, kernel);
    let operands = ["x", "y", "h_post", "h_res"].map(|name| call.operand_address(name));
    let names = ["x_new", "u", "h_pre", "h_post", "h_res", "r"];
    let results = names.map(|name| call.result_address(name));
    let mut args: Vec<Arg> = operands.map(Arg::Pointer).to_vec();
    args.extend(same[..3].iter().copied().chain(results).map(Arg::Pointer));
    args.push(Arg::Pointer(call.operand_address("h_given")));
    args.extend([call.tokens, slab, n, call.c].map(|number| Arg::I32(number as i32)));
    let launches = [
        pre::same_coefficients(call, same),
        kernel.launch(grid, args),
    ];
    let norm = norm::forward(call, call.result_address("x_new"));
    launches.into_iter().chain(norm).collect()
}

/// The backward pass of pre from the streams at `x`.
pub fn pre_backward(
    call: &CheckedCall,
    _: &Device,
    workspace: &mut dyn Workspace,
    x: u64,
    d_x_in: DXIn,
) -> Option<Vec<Launch>> {
    if !is_static(call) {
        return None;
    }
    let ([d_u, d_h_pre], mut launches) = norm::backward(call, workspace, x);
    let dots = Dots::take(call, workspace);
    let kernel = kernel(call, "pre_static_bwd");
    let args = vec![
        Arg::Pointer(x),
        Arg::Pointer(call.operand_address("bias")),
        Arg::Pointer(d_u),
        Arg::Pointer(d_x_in.address),
        Arg::Pointer(d_x_in.h_res.unwrap_or(0)),
        Arg::Pointer(call.result_address(call.kind.first_result())),
        Arg::Pointer(dots.address),
        Arg::Pointer(call.operand_address("h_given")),
        Arg::I32(call.n as i32),
        Arg::I32(call.c as i32),
        Arg::Settings(call.config.into()),
    ];
    launches.push(for_tokens(call, kernel, args));
    launches.extend(bias(call, workspace, dots, d_h_pre));
    Some(launches)
}

fn post_pre_backward(
    call: &CheckedCall,
    kernel: Kernel,
    workspace: &mut dyn Workspace,
) -> Vec<Launch> {
    let d_x_new_in = DXIn::of(call, "d_x_new_in", "h_res_new");
    let dots = Dots::take(call, workspace);
    let names = ["x", "y", "h_post", "h_res", "bias", "d_u"];
    let operands = names.map(|name| call.operand_address(name));
    let cotangent = [d_x_new_in.address, d_x_new_in.h_res.unwrap_or(0)];
    let names = ["d_x_new", "d_y", "d_h_post", "d_h_res"];
    let results = names.map(|name| call.result_address(name));
    let pointers = operands.into_iter().chain(cotangent).chain(results);
    let weights = [dots.address, call.operand_address("h_given")];
    let mut args: Vec<Arg> = pointers.chain(weights).map(Arg::Pointer).collect();
    args.extend([Arg::I32(call.c as i32), Arg::Settings(call.config.into())]);
    let d_h_pre = call.operand_address("d_h_pre");
    let launches = [for_tokens(call, kernel, args)];
    launches
        .into_iter()
        .chain(bias(call, workspace, dots, d_h_pre))
        .collect()
}

/// <d_u, X[i]>, the gradient of the weights of the streams in u.
#[derive(Debug, Clone, Copy)]
struct Dots {
    /// Address: [tokens, n].
    address: u64,
    /// The same where they are a part of the gradient of h_pre; 0 where they are that of given weights.
    of_h_pre: u64,
}

impl Dots {
    fn take(call: &CheckedCall, workspace: &mut dyn Workspace) -> Self {
        if call.is_given() {
            let address = call.result_address("d_h_given");
            return Self {
                address,
                of_h_pre: 0,
            };
        }
        let address = workspace.take(Part::per_token(call.n));
        Self {
            address,
            of_h_pre: address,
        }
    }
}

/// A launch with a block for each token.
fn for_tokens(call: &CheckedCall, kernel: Kernel, args: Vec<Arg>) -> Launch {
    Launch {
        block: token_threads(call, kernel),
        ..kernel.launch([call.tokens, 1, 1], args)
    }
}

/// The gradient of the bias from the cotangents of the coefficients, that of h_pre in two parts.
fn bias(
    call: &CheckedCall,
    workspace: &mut dyn Workspace,
    dots: Dots,
    d_h_pre: u64,
) -> [Launch; 3] {
    let n = call.n;
    let part = |floats| Part::fixed(MAX_SUMS * floats);
    let sums = [n, n, n * n].map(|floats| workspace.take(part(floats)));
    let [d_h_post, d_h_res] = ["d_h_post", "d_h_res"].map(|name| call.operand_address(name));
    let mut args: Vec<Arg> = [dots.of_h_pre, d_h_pre, d_h_post, d_h_res]
        .map(Arg::Pointer)
        .to_vec();
    args.extend(sums.map(Arg::Pointer));
    args.extend([call.tokens, n].map(|number| Arg::I32(number as i32)));
    let num = call.tokens.min(MAX_SUMS);
    let cotangents = Cotangents {
        tokens: num,
        channels: 0,
        d_u: call.operand_address("d_u"),
        dots: None,
        d_h: sums,
    };
    let x = call.operand_address("x");
    let logits = pre::logits_bwd(call, workspace, x, &cotangents, [0; 2], part);
    let sum = kernel(call, "sum_static").launch([num, 1, 1], args);
    [sum, logits.launch, logits.sum]
}

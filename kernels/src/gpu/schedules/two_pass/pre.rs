//! Launches of `pre_fwd` and `pre_bwd` in two passes (pre.cu, projection.cu).

use super::projection::{self, Factors, Projection};
use crate::contract::check::CheckedCall;
use crate::contract::config::Constraint;
use crate::contract::layout::CoefficientLayout;
use crate::gpu::device::Device;
use crate::gpu::kernel::Kernel;
use crate::gpu::launch::{Arg, Launch};
use crate::gpu::schedules::sizes::{self, is_aligned};
use crate::gpu::schedules::{DXIn, norm};
use crate::gpu::workspace::{Part, Workspace};

/// The most shared memory for what Sinkhorn's backward pass records; the workspace has it otherwise.
const HISTORY_BYTES: usize = 32 << 10;

// pre.cu compares the number of a constraint with those that it knows, and takes any other for `none`.
const _: () = assert!(
    Constraint::ALL.len() == 4,
    "pre_fwd and pre_bwd of two_pass/pre.cu have to take a new constraint"
);

fn kernel(call: &CheckedCall, function: &'static str) -> Kernel {
    let size = sizes::streams(call.n, is_aligned(call.c));
    Kernel::of(function, size, call.dtype)
}

/// The forward pass from the streams at `x`.
pub fn forward(
    call: &CheckedCall,
    device: &Device,
    workspace: &mut dyn Workspace,
    x: u64,
) -> Vec<Launch> {
    let projection = Projection::of(call);
    let partial = workspace.take(projection.partial());
    let kernel = kernel(call, "pre_fwd");
    let collapse = kernel.launch(
        [call.tokens.div_ceil(kernel.tokens()), 1, 1],
        vec![
            Arg::Pointer(x),
            Arg::Pointer(partial),
            Arg::I32(projection.slices() as i32),
            Arg::Pointer(call.operand_address("alpha")),
            Arg::Pointer(call.operand_address("bias")),
            Arg::Pointer(call.result_address("u")),
            Arg::Pointer(call.result_address("h_pre")),
            Arg::Pointer(call.result_address("h_post")),
            Arg::Pointer(call.result_address("h_res")),
            Arg::Pointer(call.result_address("m")),
            Arg::Pointer(call.result_address("r")),
            Arg::I32(call.tokens as i32),
            Arg::I32(call.c as i32),
            Arg::I32(call.columns as i32),
            Arg::Layout(call.layout.into()),
            Arg::Settings(call.config.into()),
        ],
    );
    projection::project(call, device, projection, x, partial)
        .into_iter()
        .chain([collapse])
        .chain(norm::forward(call, x))
        .collect()
}

/// The backward pass to d_x and the parameters from the streams at `x`.
pub fn backward(
    call: &CheckedCall,
    device: &Device,
    workspace: &mut dyn Workspace,
    x: u64,
    d_x_in: DXIn,
) -> Vec<Launch> {
    let ([d_u, d_h_pre], mut launches) = norm::backward(call, workspace, x);
    let projection = Projection::of(call);
    let kernel = |function| kernel(call, function);
    let coefficients = kernel("pre_bwd");
    // Blocks come in pairs, for a tile of tokens.
    let blocks = 2 * call.tokens.div_ceil(2 * coefficients.tokens());
    let dm = projection.fragments().map(|part| workspace.take(part));
    let h_pre = workspace.take(Part::per_token(call.n));
    let r_factor = workspace.take(Part::per_token(1));
    let sums = CoefficientLayout::max_num(call.n) + 3;
    let gate_sums = workspace.take(Part::per_token(sums.div_ceil(coefficients.tokens())));
    // Floats that a block records for Sinkhorn's backward pass.
    let recorded = 2 * call.config.sinkhorn_iters * 32;
    let (history, shared_bytes) = if recorded * size_of::<f32>() <= HISTORY_BYTES {
        (0, recorded * size_of::<f32>())
    } else {
        let per_token = recorded.div_ceil(coefficients.tokens());
        (workspace.take(Part::per_token(per_token)), 0)
    };
    let d_phi = workspace.take(projection.d_phi_partial());
    let (num, num_alpha) = (call.layout.num(), call.width("alpha"));
    let coefficients = Launch {
        shared_bytes: shared_bytes as u32,
        ..coefficients.launch(
            [blocks, 1, 1],
            vec![
                Arg::Pointer(x),
                Arg::Pointer(call.operand_address("alpha")),
                Arg::Pointer(call.operand_address("bias")),
                Arg::Pointer(call.operand_address("m")),
                Arg::Pointer(call.operand_address("r")),
                Arg::Pointer(d_u),
                Arg::Pointer(d_h_pre),
                Arg::Pointer(call.operand_address("d_h_post")),
                Arg::Pointer(call.operand_address("d_h_res")),
                Arg::Pointer(dm[0]),
                Arg::Pointer(dm[1]),
                Arg::Pointer(h_pre),
                Arg::Pointer(r_factor),
                Arg::Pointer(gate_sums),
                Arg::Pointer(history),
                Arg::I32(call.tokens as i32),
                Arg::I32(call.c as i32),
                Arg::I32(call.columns as i32),
                Arg::Layout(call.layout.into()),
                Arg::Settings(call.config.into()),
            ],
        )
    };
    let sum_gates = kernel("sum_gates").launch(
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
    // d_x_in may lie where d_x does, and x never does: the products are free to run in this order.
    let factors = Factors {
        dm,
        h_pre,
        r_factor,
        d_u,
    };
    launches.push(coefficients);
    launches.extend(projection::project_back(
        call, device, projection, x, &factors, d_x_in,
    ));
    launches.extend(projection::d_phi(call, projection, x, dm, d_phi));
    launches.push(sum_gates);
    launches
}

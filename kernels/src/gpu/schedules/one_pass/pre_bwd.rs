//! The schedule of `pre_bwd` in one pass over the streams (pre_bwd_one_pass.cu), and what post_pre's backward pass
//! shares with it: its workspace, and the small launches before and after.

use super::{COLUMNS, Geometry, STREAMS};
use crate::contract::check::CheckedCall;
use crate::contract::view::DType;
use crate::gpu::device::{Device, MAX_CLUSTER_BLOCKS};
use crate::gpu::kernel::Kernel;
use crate::gpu::launch::{Arg, Launch};
use crate::gpu::schedules::{DXIn, Schedule, norm, sizes};
use crate::gpu::workspace::{Part, Workspace};

/// The most iterations of Sinkhorn-Knopp whose record fits into shared memory.
const MAX_SINKHORN_ITERS: usize = 128;

/// The logits' gradients beforehand, then one pass over the streams, then the sums for the parameters.
pub const PRE_BACKWARD: Schedule = Schedule {
    name: "one pass",
    plan: |call, device, workspace| {
        let d_x_in = DXIn::of(call, "d_x_in", "h_res");
        plan(call, device, workspace, call.operand_address("x"), d_x_in)
    },
};

/// The geometry of a backward call.
pub fn geometry(call: &CheckedCall, device: &Device) -> Option<Geometry> {
    let recorded = call.config.sinkhorn_iters <= MAX_SINKHORN_ITERS;
    Geometry::of(call, device).filter(|_| recorded)
}

/// Sums that the backward passes in one kernel keep in the workspace, with room for the sums of as many clusters as
/// any GPU runs at once.
pub struct Sums {
    /// Gradients of the logits of h_post and H_res.
    pub d_z: u64,
    /// Sums for alpha and bias, of up to two warps a block.
    pub gates: u64,
    /// Sums for phi, of a cluster each.
    pub d_phi: u64,
}

impl Sums {
    /// Room for the sums of a call.
    pub fn take(call: &CheckedCall, geometry: Geometry, workspace: &mut dyn Workspace) -> Self {
        let gates = 2 * MAX_CLUSTER_BLOCKS as usize * (COLUMNS + 3);
        let d_phi = geometry.max_clusters() * STREAMS * call.c * COLUMNS;
        Self {
            d_z: workspace.take(Part::per_token(COLUMNS)),
            gates: workspace.take(Part::fixed(gates)),
            d_phi: workspace.take(Part::fixed(d_phi)),
        }
    }
}

/// The backward pass from the streams at `x` to d_x and the parameters.
pub fn plan(
    call: &CheckedCall,
    device: &Device,
    workspace: &mut dyn Workspace,
    x: u64,
    d_x_in: DXIn,
) -> Option<Vec<Launch>> {
    let geometry = geometry(call, device)?;
    let find = |function| Kernel::find(function, geometry.size, call.dtype);
    // Where no kernel takes the norm of the layer's input back, too, that is done beforehand.
    let with_norm = find("pre_norm_bwd_one_pass").filter(|_| call.norm_width > 0);
    let kernel = with_norm.or_else(|| find("pre_bwd_one_pass"))?;
    let sums = Sums::take(call, geometry, workspace);
    let operand = |name| call.operand_address(name);
    let (d_w, ([d_u, d_h_pre], mut launches)) = if with_norm.is_some() {
        let d_w = workspace.take(norm::sums(call, geometry.max_clusters()));
        (d_w, (["d_u", "d_h_pre"].map(operand), vec![]))
    } else {
        (0, norm::backward(call, workspace, x))
    };
    let tensor =
        |address, num_streams| Arg::TensorMap(geometry.tensor(call, kernel, address, num_streams));
    let mut args = vec![
        tensor(x, STREAMS),
        tensor(d_u, 1),
        tensor(d_x_in.address, STREAMS),
        tensor(call.result_address(call.kind.first_result()), STREAMS),
    ];
    args.extend(["phi", "alpha", "bias", "m", "r"].map(|name| Arg::Pointer(operand(name))));
    args.extend([
        Arg::Pointer(d_x_in.h_res.unwrap_or(0)),
        Arg::Pointer(d_h_pre),
        Arg::Pointer(sums.d_z),
        Arg::Pointer(sums.d_phi),
        Arg::Pointer(sums.gates),
        Arg::I32(call.tokens as i32),
        Arg::I32(call.c as i32),
        Arg::I32(i32::from(d_x_in.h_res.is_some())),
        Arg::Settings(call.config.into()),
    ]);
    if with_norm.is_some() {
        args.extend(["norm_scale", "rho"].map(|name| Arg::Pointer(operand(name))));
        args.push(Arg::Pointer(d_w));
    }
    let main = geometry.launch(call, device, kernel, args);
    let blocks = main.grid[0];
    let clusters = blocks / geometry.cluster;
    launches.extend([
        logits(call, &sums),
        main,
        sum_gradients(call, &sums, clusters, blocks),
    ]);
    launches.extend(with_norm.map(|_| norm::sum(call, d_w, clusters as usize)));
    Some(launches)
}

/// A kernel of four streams that reads numbers of tokens and no streams.
fn small_kernel(function: &'static str) -> Kernel {
    Kernel::of(function, sizes::streams(STREAMS, true), DType::F32)
}

/// The gradients of the logits of h_post and H_res.
pub fn logits(call: &CheckedCall, sums: &Sums) -> Launch {
    let kernel = small_kernel("logits_bwd");
    let names = ["m", "alpha", "bias", "d_h_post", "d_h_res"];
    let mut args = names
        .map(|name| Arg::Pointer(call.operand_address(name)))
        .to_vec();
    args.extend([
        Arg::Pointer(sums.d_z),
        Arg::I32(call.tokens as i32),
        Arg::Settings(call.config.into()),
    ]);
    let recorded = 2 * call.config.sinkhorn_iters * kernel.tokens() * STREAMS;
    Launch {
        shared_bytes: (recorded * size_of::<f32>()) as u32,
        ..kernel.launch([call.tokens.div_ceil(kernel.tokens()), 1, 1], args)
    }
}

/// The parameters' gradients from the sums of `clusters` for phi and from `rows` for the others.
pub fn sum_gradients(call: &CheckedCall, sums: &Sums, clusters: u32, rows: u32) -> Launch {
    let kernel = small_kernel("sum_gradients");
    let size = STREAMS * call.c * COLUMNS / 4;
    kernel.launch(
        [size.div_ceil(kernel.threads()) + 1, 1, 1],
        vec![
            Arg::Pointer(sums.d_phi),
            Arg::Pointer(sums.gates),
            Arg::Pointer(call.result_address("d_phi")),
            Arg::Pointer(call.result_address("d_bias")),
            Arg::Pointer(call.result_address("d_alpha")),
            Arg::I32(clusters as i32),
            Arg::I32(rows as i32),
            Arg::I32(size as i32),
        ],
    )
}

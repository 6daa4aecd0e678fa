//! The schedule of `sinkhorn_fwd` and `sinkhorn_bwd`.

use super::{Schedule, sizes};
use crate::contract::check::CheckedCall;
use crate::contract::table::Call;
use crate::contract::view::DType;
use crate::gpu::device::Device;
use crate::gpu::kernel::Kernel;
use crate::gpu::launch::{Arg, Launch};
use crate::gpu::workspace::{Part, Workspace};

/// The most shared memory for what the backward pass records; the workspace has it otherwise.
const HISTORY_BYTES: usize = 48 << 10;

/// A thread a row of a matrix.
pub const SCHEDULE: Schedule = Schedule {
    name: "sinkhorn",
    plan: |call, _: &Device, workspace| Some(vec![launch(call, workspace)]),
};

fn launch(call: &CheckedCall, workspace: &mut dyn Workspace) -> Launch {
    let is_backward = call.kind == Call::SinkhornBwd;
    let function = if is_backward {
        "sinkhorn_bwd"
    } else {
        "sinkhorn_fwd"
    };
    let kernel = Kernel::of(function, sizes::streams(call.n, true), DType::F32);
    let rows = sizes::streams_bound(call.n, true);
    let mut args = vec![Arg::Pointer(call.operand_address("z"))];
    let mut shared_bytes = 0;
    if is_backward {
        let half_steps = 2 * call.config.sinkhorn_iters;
        let bytes = half_steps * kernel.threads() * size_of::<f32>();
        let history = if bytes <= HISTORY_BYTES {
            shared_bytes = bytes as u32;
            0
        } else {
            // Blocks are whole.
            workspace.take(Part {
                per_token: half_steps * rows,
                fixed: half_steps * kernel.threads(),
            })
        };
        args.extend([
            Arg::Pointer(call.operand_address("d_h_res")),
            Arg::Pointer(call.result_address("d_z")),
            Arg::Pointer(history),
        ]);
    } else {
        args.push(Arg::Pointer(call.result_address("h_res")));
    }
    args.extend([
        Arg::I64(call.tokens as i64),
        Arg::I32(call.n as i32),
        Arg::Settings(call.config.into()),
    ]);
    let blocks = (call.tokens * rows).div_ceil(kernel.threads());
    Launch {
        shared_bytes,
        ..kernel.launch([blocks, 1, 1], args)
    }
}

//! The schedule of `collapse_fwd` and `collapse_bwd`.

use super::Schedule;
use super::post::{channels, grid};
use super::sizes::{self, for_rows, is_aligned};
use crate::contract::check::CheckedCall;
use crate::contract::table::Call;
use crate::gpu::kernel::Kernel;
use crate::gpu::launch::{Arg, Launch};

/// Forward a thread some channels of a token, backward a block a token.
pub const SCHEDULE: Schedule = Schedule {
    name: "collapse",
    plan: |call, _, _| {
        Some(vec![match call.kind {
            Call::CollapseBwd => backward(call),
            _ => forward(call),
        }])
    },
};

fn kernel(call: &CheckedCall, functions: [&'static str; 2]) -> Kernel {
    let size = sizes::streams(call.n, is_aligned(call.c));
    Kernel::of(for_rows(call.c, functions), size, call.dtype)
}

fn forward(call: &CheckedCall) -> Launch {
    let kernel = kernel(call, ["collapse_fwd", "collapse_fwd_unaligned"]);
    let (grid, slab) = grid(call, kernel);
    kernel.launch(
        grid,
        vec![
            Arg::Pointer(call.operand_address("x")),
            Arg::Pointer(call.operand_address("h_pre")),
            Arg::Pointer(call.result_address("u")),
            Arg::I32(call.tokens as i32),
            Arg::I32(slab as i32),
            Arg::I32(call.n as i32),
            Arg::I32(call.c as i32),
        ],
    )
}

fn backward(call: &CheckedCall) -> Launch {
    let kernel = kernel(call, ["collapse_bwd", "collapse_bwd_unaligned"]);
    let threads = call.c.div_ceil(channels(call)).min(kernel.threads());
    let args = vec![
        Arg::Pointer(call.operand_address("x")),
        Arg::Pointer(call.operand_address("d_u")),
        Arg::Pointer(call.result_address("d_h_pre")),
        Arg::I32(call.n as i32),
        Arg::I32(call.c as i32),
    ];
    Launch {
        block: threads.next_multiple_of(32) as u32,
        ..kernel.launch([call.tokens, 1, 1], args)
    }
}

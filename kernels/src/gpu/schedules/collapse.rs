//! The schedule of `collapse_fwd` and `collapse_bwd`.

use super::Schedule;
use super::post::{grid, token_threads};
use super::sizes::{self, for_rows};
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
    sizes::kernel(call, for_rows(call.c, functions))
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
    let args = vec![
        Arg::Pointer(call.operand_address("x")),
        Arg::Pointer(call.operand_address("d_u")),
        Arg::Pointer(call.result_address("d_h_pre")),
        Arg::I32(call.n as i32),
        Arg::I32(call.c as i32),
    ];
    Launch {
        block: token_threads(call, kernel),
        ..kernel.launch([call.tokens, 1, 1], args)
    }
}

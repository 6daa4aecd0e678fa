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
        let [operand, result] = [CheckedCall::operand_address, CheckedCall::result_address];
        Some(vec![match call.kind {
            Call::CollapseBwd => backward(
                call,
                [
                    operand(call, "x"),
                    operand(call, "d_u"),
                    result(call, "d_h_pre"),
                ],
            ),
            _ => forward(
                call,
                [
                    operand(call, "x"),
                    operand(call, "h_pre"),
                    result(call, "u"),
                ],
            ),
        }])
    },
};

fn kernel(call: &CheckedCall, functions: [&'static str; 2]) -> Kernel {
    sizes::kernel(call, for_rows(call.c, functions))
}

/// u from the streams at `x` and their weights at `h_pre`.
pub fn forward(call: &CheckedCall, [x, h_pre, u]: [u64; 3]) -> Launch {
    let kernel = kernel(call, ["collapse_fwd", "collapse_fwd_unaligned"]);
    let (grid, slab) = grid(call, kernel);
    kernel.launch(
        grid,
        vec![
            Arg::Pointer(x),
            Arg::Pointer(h_pre),
            Arg::Pointer(u),
            Arg::I32(call.tokens as i32),
            Arg::I32(slab as i32),
            Arg::I32(call.n as i32),
            Arg::I32(call.c as i32),
        ],
    )
}

/// The gradient of those weights, at `d_h_pre`.
pub fn backward(call: &CheckedCall, [x, d_u, d_h_pre]: [u64; 3]) -> Launch {
    let kernel = kernel(call, ["collapse_bwd", "collapse_bwd_unaligned"]);
    let args = vec![
        Arg::Pointer(x),
        Arg::Pointer(d_u),
        Arg::Pointer(d_h_pre),
        Arg::I32(call.n as i32),
        Arg::I32(call.c as i32),
    ];
    Launch {
        block: token_threads(call, kernel),
        ..kernel.launch([call.tokens, 1, 1], args)
    }
}

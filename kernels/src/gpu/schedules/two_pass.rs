//! The schedules that read the streams twice: once for the products with phi, and once for what the products give.
//! They take every call of pre and of the head, which is a pre with h_pre alone, but for
//! backward calls with static coefficients.

pub mod pre;
pub mod projection;
mod warpgroups;

use super::{DXIn, Schedule};
use crate::contract::table::Call;

/// The forward pass of pre and of the head.
pub const FORWARD: Schedule = Schedule {
    name: "two passes",
    plan: |call, device, workspace| {
        let x = call.operand_address("x");
        Some(pre::forward(call, device, workspace, x))
    },
};

/// The backward pass of pre and of the head, to which no cotangent of the streams is added.
pub const BACKWARD: Schedule = Schedule {
    name: "two passes",
    plan: |call, device, workspace| {
        let d_x_in = match call.kind {
            Call::HeadBwd => DXIn {
                address: 0,
                h_res: None,
            },
            _ => DXIn::of(call, "d_x_in", "h_res"),
        };
        let x = call.operand_address("x");
        pre::backward(call, device, workspace, x, d_x_in, None)
    },
};

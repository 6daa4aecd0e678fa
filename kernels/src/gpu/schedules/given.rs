//! The schedules of `post_pre_fwd` and `post_pre_bwd` with given weights of the streams in u that are made of the launches
//! of other calls; those that have kernels of their own are in its modules.

pub mod forward;

mod backward;

pub use backward::ONE_PASS_BACKWARD;

use super::two_pass::pre;
use super::{Schedule, collapse, one_pass, one_stream, post, post_pre};
use crate::contract::check::CheckedCall;
use crate::gpu::launch::Launch;

/// The call with a u of its own in one pass, then u of the streams that it makes in place of that.
pub const ONE_PASS_FORWARD: Schedule = Schedule {
    name: "one pass, collapse",
    plan: |call, device, _| {
        let own =
            one_stream::forward(call, device).or_else(|| one_pass::forward::launch(call, device));
        own.map(|launch| vec![launch, u(call)])
    },
};

/// Post, then the coefficients in two passes, and u.
pub const FORWARD: Schedule = Schedule {
    name: "post, then pre and collapse",
    plan: |call, device, workspace| {
        let x_new = call.result_address("x_new");
        let mut launches = vec![post::forward(call, x_new)];
        launches.extend(pre::forward(call, device, workspace, x_new));
        launches.push(u(call));
        Some(launches)
    },
};

/// X' again, the gradient of the given weights of it, then pre's backward pass in two passes, and post's.
pub const BACKWARD: Schedule = Schedule {
    name: "post again, collapse, pre in two passes, post",
    plan: |call, device, workspace| {
        let x_new = post_pre::take_x_new(call, workspace);
        let d_h_given = call.result_address("d_h_given");
        let again = [
            post::forward(call, x_new),
            collapse::backward(call, [x_new, call.operand_address("d_u"), d_h_given]),
        ];
        post_pre::around(call, again, |d_x_in| {
            pre::backward(call, device, workspace, x_new, d_x_in, None)
        })
    },
};

/// u of X' with the given weights.
fn u(call: &CheckedCall) -> Launch {
    let h_given = call.operand_address("h_given");
    let [x_new, u] = ["x_new", "u"].map(|name| call.result_address(name));
    collapse::forward(call, [x_new, h_given, u])
}

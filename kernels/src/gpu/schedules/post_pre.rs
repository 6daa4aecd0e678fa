//! The schedules of `post_pre_fwd` and `post_pre_bwd` that launch post and pre one after the other.

use super::one_pass::pre_bwd;
use super::two_pass::pre;
use super::{DXIn, Schedule, one_stream, post, static_coefficients};
use crate::contract::check::CheckedCall;
use crate::gpu::device::Device;
use crate::gpu::launch::Launch;
use crate::gpu::workspace::{Part, Workspace};

/// Post, then pre in two passes.
pub const FORWARD: Schedule = Schedule {
    name: "post, then pre",
    plan: |call, device, workspace| {
        let x_new = call.result_address("x_new");
        let mut launches = vec![post::forward(call, x_new)];
        launches.extend(pre::forward(call, device, workspace, x_new));
        Some(launches)
    },
};

/// X' again, then pre's backward pass with static coefficients, and post's.
pub const STATIC_BACKWARD: Schedule = Schedule {
    name: "post again, pre with static coefficients, post",
    plan: |call, device, workspace| {
        backward(call, device, workspace, static_coefficients::pre_backward)
    },
};

/// X' again, then pre's backward pass of one stream, and post's.
pub const ONE_STREAM_BACKWARD: Schedule = Schedule {
    name: "post again, pre of one stream, post",
    plan: |call, device, workspace| backward(call, device, workspace, one_stream::pre_backward),
};

/// X' again, then pre's backward pass in one pass over it, and post's.
pub const ONE_PASS_BACKWARD: Schedule = Schedule {
    name: "post again, pre in one pass, post",
    plan: |call, device, workspace| backward(call, device, workspace, pre_bwd::plan),
};

/// X' again, then pre's backward pass in two passes over it, and post's. Where post can do so it leaves pre the sums for
/// which it would read X' once more.
pub const TWO_PASS_BACKWARD: Schedule = Schedule {
    name: "post again, pre in two passes, post",
    plan: |call, device, workspace| {
        let x_new = take_x_new(call, workspace);
        let (again, dots) = match post::forward_with_dots(call, workspace, x_new) {
            Some((launch, dots)) => (launch, Some(dots)),
            None => (post::forward(call, x_new), None),
        };
        around(call, [again], |d_x_in| {
            pre::backward(call, device, workspace, x_new, d_x_in, dots)
        })
    },
};

/// The backward pass of pre from the streams at an address.
type PreBackward = fn(&CheckedCall, &Device, &mut dyn Workspace, u64, DXIn) -> Option<Vec<Launch>>;

fn backward(
    call: &CheckedCall,
    device: &Device,
    workspace: &mut dyn Workspace,
    pre_backward: PreBackward,
) -> Option<Vec<Launch>> {
    let x_new = take_x_new(call, workspace);
    around(call, [post::forward(call, x_new)], |d_x_in| {
        pre_backward(call, device, workspace, x_new, d_x_in)
    })
}

/// Room for X'.
pub fn take_x_new(call: &CheckedCall, workspace: &mut dyn Workspace) -> u64 {
    let streams_bytes = call.n * call.c * call.dtype.num_bytes();
    workspace.take(Part::bytes_per_token(streams_bytes))
}

/// The launches around pre's, from those that make X' again on. The gradient of X' grows where d_x_new_in lies.
pub fn around(
    call: &CheckedCall,
    again: impl IntoIterator<Item = Launch>,
    pre_backward: impl FnOnce(DXIn) -> Option<Vec<Launch>>,
) -> Option<Vec<Launch>> {
    let mut launches: Vec<Launch> = again.into_iter().collect();
    launches.extend(pre_backward(DXIn::of(call, "d_x_new_in", "h_res_new"))?);
    launches.push(post::backward(call, call.result_address("d_x_new")));
    Some(launches)
}

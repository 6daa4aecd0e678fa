//! The schedules of the calls on NVIDIA GPUs: the ways to launch each of them.

mod collapse;
mod given;
mod norm;
mod one_pass;
mod one_stream;
mod post;
mod post_pre;
mod sinkhorn;
mod sizes;
mod static_coefficients;
mod two_pass;

use super::device::Device;
use super::launch::Launch;
use super::workspace::Workspace;
use crate::contract::check::CheckedCall;
use crate::contract::table::Call;

/// A way to launch a call.
pub struct Schedule {
    /// Name in the library's events.
    pub name: &'static str,
    /// The launches of a call in their order; None where the schedule does not take the call on this GPU. What it
    /// takes of the workspace follows from the call without its tokens and from the kind of GPU, [`Device::KINDS`].
    pub plan: fn(&CheckedCall, &Device, &mut dyn Workspace) -> Option<Vec<Launch>>,
}

/// The schedules of a call. The first that takes it runs; the last takes every call.
pub fn schedules(call: &CheckedCall) -> &'static [Schedule] {
    match call.kind {
        Call::PostPreFwd if call.is_given() => &[
            static_coefficients::POST_PRE_FORWARD,
            given::forward::FORWARD,
            given::ONE_PASS_FORWARD,
            given::FORWARD,
        ],
        Call::PostPreBwd if call.is_given() => &[
            static_coefficients::POST_PRE_BACKWARD,
            post_pre::STATIC_BACKWARD,
            given::ONE_PASS_BACKWARD,
            given::BACKWARD,
        ],
        Call::PreFwd => &[one_stream::FORWARD, one_pass::FORWARD, two_pass::FORWARD],
        Call::PreBwd => &[
            static_coefficients::PRE_BACKWARD,
            one_stream::PRE_BACKWARD,
            one_pass::PRE_BACKWARD,
            two_pass::BACKWARD,
        ],
        Call::PostPreFwd => &[
            static_coefficients::POST_PRE_FORWARD,
            one_stream::FORWARD,
            one_pass::FORWARD,
            post_pre::FORWARD,
        ],
        Call::PostPreBwd => &[
            static_coefficients::POST_PRE_BACKWARD,
            post_pre::STATIC_BACKWARD,
            one_stream::POST_PRE_BACKWARD,
            post_pre::ONE_STREAM_BACKWARD,
            one_pass::POST_PRE_BACKWARD,
            post_pre::ONE_PASS_BACKWARD,
            post_pre::TWO_PASS_BACKWARD,
        ],
        Call::HeadFwd => &[one_stream::FORWARD, two_pass::FORWARD],
        Call::HeadBwd => &[one_stream::PRE_BACKWARD, two_pass::BACKWARD],
        Call::PostFwd | Call::PostBwd => &[post::SCHEDULE],
        Call::SinkhornFwd | Call::SinkhornBwd => &[sinkhorn::SCHEDULE],
        Call::CollapseFwd | Call::CollapseBwd => &[collapse::SCHEDULE],
    }
}

/// The cotangent of the streams that a backward call adds to.
#[derive(Debug, Clone, Copy)]
pub struct DXIn {
    /// Address; 0 for none.
    address: u64,
    /// H_res, whose transpose has yet to be applied; None where the cotangent is not deferred.
    h_res: Option<u64>,
}

impl DXIn {
    /// The cotangent of a call at the operand of one name, deferred by the H_res of another.
    fn of(call: &CheckedCall, d_x_in: &str, h_res: &str) -> Self {
        Self {
            address: call.operand_address(d_x_in),
            h_res: (call.config.deferred).then(|| call.operand_address(h_res)),
        }
    }
}

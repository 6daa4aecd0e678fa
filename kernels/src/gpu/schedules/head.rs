//! Launches of `head_fwd` and `head_bwd`: those of a pre that has h_pre alone.

use super::pre::{self, Parts};
use super::projection::{HandedOn, Shape};
use crate::contract::check::CheckedCall;
use crate::contract::table::Call;
use crate::gpu::launch::{Device, Launch, Problem, Workspace};
use crate::gpu::workspace::{Memory, room};

/// The launches of a call, in their order.
pub fn plan(call: &CheckedCall, device: &Device) -> Vec<Launch> {
    let memory = &mut Memory::of(call);
    let x = call.operand_address("x");
    if call.kind == Call::HeadFwd {
        pre::forward(call, device, memory, x)
    } else {
        let handed_on = HandedOn {
            d_x_in: 0,
            h_res: None,
        };
        pre::backward(call, device, memory, x, handed_on)
    }
}

/// What the call needs.
pub fn workspace(problem: &Problem) -> Workspace {
    if problem.kind == Call::HeadFwd {
        room(&[Shape::of(problem).partial()])
    } else {
        room(&Parts::of(problem).all())
    }
}

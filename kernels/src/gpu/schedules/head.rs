//! Launches of `head_fwd` and `head_bwd`: those of a pre that has h_pre alone.

use super::pre::{self, Parts};
use super::projection::{DxIn, Shape};
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
        let d_x_in = DxIn {
            address: 0,
            h_res: None,
        };
        pre::backward(call, device, memory, x, d_x_in)
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

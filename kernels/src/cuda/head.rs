//! Launches of `head_fwd` and `head_bwd`: those of a pre that has h_pre alone.

use super::launch::{Device, Launch, Problem, Workspace};
use super::memory::{Memory, room};
use super::pre::{self, Parts};
use super::projection::{HandedOn, Shape};
use crate::signature::{Call, Op};

/// The launches of a call, in their order.
pub fn plan(call: &Call, device: &Device) -> Vec<Launch> {
    let memory = &mut Memory::of(call);
    let x = call.operand("x").data as u64;
    if call.op == Op::HeadFwd {
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
    if problem.op == Op::HeadFwd {
        room(&[Shape::of(problem).partial()])
    } else {
        room(&Parts::of(problem).all())
    }
}

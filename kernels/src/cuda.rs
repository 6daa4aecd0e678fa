//! The calls on NVIDIA GPUs.
#![allow(dead_code)]

mod head;
mod launch;
mod post;
mod pre;
mod seam;
mod sinkhorn;

use launch::{Device, Launch};
pub use launch::{Problem, Workspace};

use crate::signature::{Call, Op};

/// The launches of a call, in their order.
fn plan(call: &Call, device: &Device) -> Vec<Launch> {
    match call.op {
        Op::PreFwd | Op::PreBwd => pre::plan(call, device),
        Op::PostFwd | Op::PostBwd => post::plan(call, device),
        Op::SeamFwd | Op::SeamBwd => seam::plan(call, device),
        Op::SinkhornFwd | Op::SinkhornBwd => sinkhorn::plan(call, device),
        Op::HeadFwd | Op::HeadBwd => head::plan(call, device),
    }
}

/// The workspace that a call needs.
pub fn workspace(problem: &Problem) -> Workspace {
    match problem.op {
        Op::PreFwd | Op::PreBwd => pre::workspace(problem),
        Op::PostFwd | Op::PostBwd => post::workspace(problem),
        Op::SeamFwd | Op::SeamBwd => seam::workspace(problem),
        Op::SinkhornFwd | Op::SinkhornBwd => sinkhorn::workspace(problem),
        Op::HeadFwd | Op::HeadBwd => head::workspace(problem),
    }
}

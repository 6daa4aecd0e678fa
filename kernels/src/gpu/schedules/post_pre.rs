//! Launches of `post_pre_fwd` and `post_pre_bwd`: those of post and of pre.

use super::projection::Shape;
use super::{one_pass, post, pre};
use crate::contract::check::CheckedCall;
use crate::contract::table::Call;
use crate::gpu::launch::{Device, Launch, Problem, Workspace};
use crate::gpu::workspace::{Memory, Part, room};

/// The launches of a call, in their order.
pub fn plan(call: &CheckedCall, device: &Device) -> Vec<Launch> {
    let memory = &mut Memory::of(call);
    if call.kind == Call::PostPreFwd {
        if let Some(launch) = one_pass::forward(call, device) {
            return vec![launch];
        }
        let x_new = call.result_address("x_new");
        let mut launches = vec![post::forward(call, x_new)];
        launches.extend(pre::forward(call, device, memory, x_new));
        return launches;
    }
    if let Some(launches) = one_pass::post_pre_bwd::plan(call, device, memory) {
        return launches;
    }
    // X' is computed again. Its gradient grows where d_x_new_in lies.
    let x_new = memory.take(x_new(&call.problem()));
    let d_x_in = pre::d_x_in(call, "d_x_new_in", "h_res_new");
    let mut launches = vec![post::forward(call, x_new)];
    launches.extend(pre::backward(call, device, memory, x_new, d_x_in));
    launches.push(post::backward(call, call.result_address("d_x_new")));
    launches
}

/// What the call needs.
pub fn workspace(problem: &Problem) -> Workspace {
    if problem.kind == Call::PostPreFwd {
        return room(&[Shape::of(problem).partial()]);
    }
    // Which of both it is depends on the GPU.
    room(&[x_new(problem)])
        .and(pre::backward_workspace(problem))
        .max(one_pass::post_pre_bwd::workspace(problem))
}

/// X', in the dtype of the streams.
fn x_new(problem: &Problem) -> Part {
    let bytes = problem.n * problem.c * problem.dtype.num_bytes();
    Part::per_token(bytes.div_ceil(size_of::<f32>()))
}

//! Launches of `seam_bwd` in one pass over the streams (seam_bwd_one_pass.cu).

use super::pre_bwd::{self, Parts};
use super::{STREAMS, Shape};
use crate::cuda::launch::{Arg, Device, Kernel, Launch, Problem, Tensor, Workspace};
use crate::cuda::memory::{Memory, room};
use crate::signature::Call;

/// Tokens of a tile (`kTileTokens`), and threads of a block.
const TILE: usize = 8;
const THREADS: u32 = 512;
/// Channels that a block owns. The sums for d_phi of more do not fit into its registers beside the rest:
/// of 320 they would take 120 of the 208 of each thread of the main warps, and leave 48 to the other threads.
const CHANNELS: usize = 256;
/// Warps of a block that write sums of the gates' gradients.
const OWNER_WARPS: u32 = 2;

/// `kSharedBytes`.
const SHARED_BYTES: u32 = 229_888;

/// The shape of a problem, whatever the GPU, where there is a kernel for it.
fn shape(problem: &Problem) -> Option<Shape> {
    pre_bwd::shape(problem).filter(|shape| shape.channels == CHANNELS)
}

/// What `seam_bwd` needs in one pass.
pub fn workspace(problem: &Problem) -> Workspace {
    shape(problem).map_or(Workspace::default(), |shape| {
        room(&Parts::of(problem, shape).all())
    })
}

/// The launches of `seam_bwd` in one pass, where there is a kernel for it.
pub fn plan(call: &Call, device: &Device, memory: &mut Memory) -> Option<Vec<Launch>> {
    let problem = call.problem();
    // On later chips the kernel would spill registers.
    let is_hopper = device.capability.0 == 9;
    let shape = shape(&problem).filter(|shape| is_hopper && shape.runs_on(device))?;
    let [d_z, gate_sums, d_phi] = Parts::of(&problem, shape)
        .all()
        .map(|part| memory.take(part));
    let operand = |name| call.operand(name).data as u64;
    let result = |name| call.result(name).data as u64;
    let tensor = |address, num_streams| {
        let dims = [call.tokens, num_streams, call.c];
        Tensor::new(address, dims, [TILE, CHANNELS])
    };
    let vector = |address| Arg::TensorMap(tensor(address, 1));
    let streams =
        |address| [0, 1].map(|first| Arg::TensorMap(tensor(address, STREAMS).every_second(first)));
    let mut args = streams(operand("x")).to_vec();
    args.extend([vector(operand("y")), vector(operand("d_u"))]);
    args.extend(streams(operand("d_x_new_in")));
    args.extend(streams(result("d_x_new")));
    args.push(vector(result("d_y")));
    let names = [
        "h_post",
        "h_res",
        "phi",
        "alpha",
        "bias",
        "m",
        "r",
        "h_res_new",
        "d_h_pre",
    ];
    args.extend(names.map(|name| Arg::Pointer(operand(name))));
    args.push(Arg::Pointer(d_z));
    args.extend(["d_h_post", "d_h_res"].map(|name| Arg::Pointer(result(name))));
    args.extend([
        Arg::Pointer(d_phi),
        Arg::Pointer(gate_sums),
        Arg::I32(call.tokens as i32),
        Arg::I32(i32::from(call.config.deferred)),
        Arg::Settings(call.config.into()),
    ]);
    let grid = shape.grid(device, call.tokens, TILE);
    let main = Launch {
        kernel: Kernel {
            file: "seam_bwd_one_pass",
            function: "seam_bwd_one_pass",
            size: shape.size,
            dtype: call.dtype,
        },
        grid,
        block: THREADS,
        cluster: shape.cluster,
        shared_bytes: SHARED_BYTES,
        args,
    };
    let clusters = grid[0] / shape.cluster;
    let rows = OWNER_WARPS * grid[0];
    let sums = pre_bwd::sum_gradients(call, d_phi, gate_sums, clusters, rows);
    Some(vec![pre_bwd::gates(call, d_z), main, sums])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_says_the_same() {
        let source = include_str!("../../../cuda/seam_bwd_one_pass.cu");
        let says = |text: &str| assert!(source.contains(text), "{text}");
        says(&format!("kSharedBytes == {SHARED_BYTES}"));
        says(&format!("SIZE == {CHANNELS}"));
        says(&format!("kOwnerWarps = {OWNER_WARPS};"));
        says(&format!("kThreads == {THREADS}"));
    }
}

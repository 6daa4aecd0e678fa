//! Launches of `post_pre_bwd` in one pass over the streams (post_pre_bwd_one_pass.cu), but for d_phi where that has no
//! room for it (phi_bwd.cu).

use super::pre_bwd::{self, Parts};
use super::{COLUMNS, STREAMS, Shape};
use crate::contract::check::CheckedCall;
use crate::gpu::launch::{Arg, Device, Kernel, Launch, Problem, Tensor, Workspace};
use crate::gpu::schedules::norm;
use crate::gpu::workspace::{Memory, Part, room};

/// Tokens of a tile (`kTileTokens`), and threads of a block.
const TILE: usize = 8;
const THREADS: u32 = 512;
/// Warps of a block that write sums of the gates' gradients.
const OWNER_WARPS: u32 = 2;

/// `kSharedBytes`.
fn shared_bytes(channels: usize) -> u32 {
    match channels {
        256 => 229_888,
        320 => 221_696,
        384 => 200_192,
        _ => 230_912,
    }
}

/// Whether there is room for the sums for d_phi (`kSumsPhi`).
fn sums_phi(shape: Shape) -> bool {
    shape.channels == 256
}

/// Where there is not, r dm: as many numbers a token as phi has columns, each in two halves of a float.
fn r_dm(shape: Shape) -> Part {
    Part::per_token(if sums_phi(shape) { 0 } else { COLUMNS })
}

/// Workspace of `post_pre_bwd` in one pass.
pub fn workspace(problem: &Problem) -> Workspace {
    pre_bwd::shape(problem).map_or(Workspace::default(), |shape| {
        room(&Parts::of(problem, shape).all())
            .and(room(&[r_dm(shape)]))
            .and(norm::workspace(problem))
    })
}

/// The launches of `post_pre_bwd` in one pass, where there is a kernel for it.
pub fn plan(call: &CheckedCall, device: &Device, memory: &mut Memory) -> Option<Vec<Launch>> {
    let problem = call.problem();
    // On later chips the kernel would spill registers.
    let is_hopper = device.capability.0 == 9;
    let shape = pre_bwd::shape(&problem).filter(|shape| is_hopper && shape.runs_on(device))?;
    let [d_z, gate_sums, d_phi] = Parts::of(&problem, shape)
        .all()
        .map(|part| memory.take(part));
    let r_dm = memory.take(r_dm(shape));
    let (d_u, mut launches) = norm::post_pre_backward(call, memory);
    let operand = |name| call.operand_address(name);
    let result = |name| call.result_address(name);
    let tensor = |address, num_streams| {
        let dims = [call.tokens, num_streams, call.c];
        Tensor::new(address, dims, [TILE, shape.channels])
    };
    let vector = |address| Arg::TensorMap(tensor(address, 1));
    let streams =
        |address| [0, 1].map(|first| Arg::TensorMap(tensor(address, STREAMS).every_second(first)));
    let mut args = streams(operand("x")).to_vec();
    args.extend([vector(operand("y")), vector(d_u)]);
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
        Arg::Pointer(if sums_phi(shape) { d_phi } else { r_dm }),
        Arg::Pointer(gate_sums),
        Arg::I32(call.tokens as i32),
        Arg::I32(i32::from(call.config.deferred)),
        Arg::Settings(call.config.into()),
    ]);
    let grid = shape.grid(device, call.tokens, TILE);
    let main = Launch {
        kernel: Kernel {
            file: "post_pre_bwd_one_pass",
            function: "post_pre_bwd_one_pass",
            size: shape.size,
            dtype: call.dtype,
        },
        grid,
        block: THREADS,
        cluster: shape.cluster,
        shared_bytes: shared_bytes(shape.channels),
        args,
    };
    launches.extend([pre_bwd::logits_bwd(call, d_z), main]);
    let num_sums = if sums_phi(shape) {
        grid[0] / shape.cluster
    } else {
        let launch = phi(call, device, shape, r_dm, d_phi);
        let num_sums = launch.grid[1];
        launches.push(launch);
        num_sums
    };
    let rows = OWNER_WARPS * grid[0];
    launches.push(pre_bwd::sum_gradients(
        call, d_phi, gate_sums, num_sums, rows,
    ));
    Some(launches)
}

/// The sums for d_phi, at `d_phi`, from r dm: a row of blocks for each of them.
fn phi(call: &CheckedCall, device: &Device, shape: Shape, r_dm: u64, d_phi: u64) -> Launch {
    const TILE: usize = 16;
    const CHANNELS: usize = 128;
    const THREADS: u32 = 256;
    const SHARED_BYTES: u32 = 95_232;
    const BLOCKS_OF_SM: usize = 2;
    let operand = |name| call.operand_address(name);
    let tensor = |name, num_streams| {
        let dims = [call.tokens, num_streams, call.c];
        Arg::TensorMap(Tensor::new(operand(name), dims, [TILE, CHANNELS]))
    };
    let slices = call.c / CHANNELS;
    // There is room for as many sums as clusters make.
    let most = shape.max_clusters() as usize;
    let most = (BLOCKS_OF_SM * device.num_sms as usize / slices).clamp(1, most);
    let num_sums = most.min(call.tokens.div_ceil(TILE));
    let mut args = vec![tensor("x", STREAMS), tensor("y", 1)];
    args.extend(["h_post", "h_res"].map(|name| Arg::Pointer(operand(name))));
    args.extend([r_dm, d_phi].map(Arg::Pointer));
    args.push(Arg::I32(call.tokens as i32));
    Launch {
        kernel: Kernel {
            file: "phi_bwd",
            function: "phi_bwd",
            size: "w128",
            dtype: call.dtype,
        },
        grid: [slices as u32, num_sums as u32, 1],
        block: THREADS,
        cluster: 1,
        shared_bytes: SHARED_BYTES,
        args,
    }
}

#[cfg(test)]
mod tests {
    use super::super::CHANNELS;
    use super::*;

    #[test]
    fn the_kernels_say_the_same() {
        let source = include_str!("../../../../device/one_pass/post_pre_bwd_one_pass.cu");
        let says = |text: &str| assert!(source.contains(text), "{text}");
        for (channels, _) in CHANNELS {
            let bytes = shared_bytes(channels);
            says(&format!("SIZE != {channels} || kSharedBytes == {bytes}"));
        }
        says("kSumsPhi = SIZE == 256;");
        says(&format!("kOwnerWarps = {OWNER_WARPS};"));
        says(&format!("kThreads == {THREADS}"));
        let phi = include_str!("../../../../device/one_pass/phi_bwd.cu");
        assert!(phi.contains("kSharedBytes == 95232 && kThreads == 256 && SIZE == 128"));
        assert!(phi.contains("kTokens = 16;"));
    }
}

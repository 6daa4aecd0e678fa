//! Launches of `pre_bwd` in one pass over the streams (pre_bwd_one_pass.cu), and the small ones around it, which
//! the seam's backward pass has as well.

use super::{COLUMNS, STREAMS, Shape};
use crate::cuda::launch::{
    Arg, Device, Kernel, Launch, MAX_CLUSTER_BLOCKS, Problem, Tensor, Workspace,
};
use crate::cuda::memory::{Memory, Part, room};
use crate::cuda::projection::HandedOn;
use crate::signature::Call;
use crate::view::DType;

/// Tokens of a tile (`kTileTokens`).
const TILE: usize = 8;
/// What Sinkhorn's iterations record has to fit into shared memory.
const MAX_SINKHORN_ITERS: usize = 128;

/// What the backward passes in one kernel keep in the workspace.
pub struct Parts {
    d_z: Part,
    gate_sums: Part,
    d_phi: Part,
}

impl Parts {
    /// Those of a problem, with room for the sums of as many clusters as any GPU runs at once.
    pub fn of(problem: &Problem, shape: Shape) -> Self {
        let fixed = |fixed| Part {
            per_token: 0,
            fixed,
        };
        let clusters = shape.max_clusters() as usize;
        Self {
            d_z: Part::per_token(COLUMNS),
            // Of up to two warps a block.
            gate_sums: fixed(2 * MAX_CLUSTER_BLOCKS as usize * (COLUMNS + 3)),
            d_phi: fixed(clusters * STREAMS * problem.c * COLUMNS),
        }
    }

    /// All of them.
    pub fn all(&self) -> [Part; 3] {
        [self.d_z, self.gate_sums, self.d_phi]
    }
}

/// The shape of a problem, whatever the GPU, where the backward passes have it.
pub fn shape(problem: &Problem) -> Option<Shape> {
    Shape::wanted(problem).filter(|_| problem.sinkhorn_iters <= MAX_SINKHORN_ITERS)
}

/// What `pre_bwd` needs in one pass.
pub fn workspace(problem: &Problem) -> Workspace {
    shape(problem).map_or(Workspace::default(), |shape| {
        room(&Parts::of(problem, shape).all())
    })
}

/// How a block is divided (the constants at the head of pre_bwd_one_pass.cu).
struct Block {
    channels: usize,
    /// Buffers for X and d_u, and for d_x_in.
    stages: usize,
    changes: usize,
    /// Fragments of phi, and of the sums for d_phi, that a main warp has in shared memory.
    fragments: usize,
    sums: usize,
    dot_warps: usize,
}

impl Block {
    const MAIN_WARPS: usize = 8;

    fn of(shape: Shape) -> Self {
        let channels = shape.channels;
        let (stages, changes, fragments, sums, dot_warps) = match channels {
            256 => (5, 5, 4, 0, 4),
            320 => (3, 3, 10, 0, 2),
            384 => (3, 2, 12, 0, 2),
            _ => (2, 2, 14, 1, 2),
        };
        Self {
            channels,
            stages,
            changes,
            fragments,
            sums,
            dot_warps,
        }
    }

    fn threads(&self) -> usize {
        // Besides these a copier and an owner.
        32 * (Self::MAIN_WARPS + (self.dot_warps + 2).next_multiple_of(4))
    }

    fn shared_bytes(&self) -> usize {
        let stream = TILE * self.channels * 2;
        let notes = TILE * (128 + STREAMS * STREAMS * 4 + 16);
        let parts = 16 * self.dot_warps * 16;
        let barriers = 8 * (5 * self.stages + self.changes + 1);
        let units = Self::MAIN_WARPS * size_of::<f32>();
        self.stages * ((STREAMS + 1) * stream + notes)
            + self.changes * STREAMS * stream
            + Self::MAIN_WARPS * 32 * (24 * self.fragments + 48 * self.sums)
            + self.stages.div_ceil(2) * parts
            + barriers
            + units
    }
}

/// The backward pass from the streams at `x` and the cotangent of their sum at `d_u` to d_x and the parameters in one pass, where there is a kernel
/// for it.
pub fn plan(
    call: &Call,
    device: &Device,
    memory: &mut Memory,
    x: u64,
    d_u: u64,
    handed_on: HandedOn,
) -> Option<Vec<Launch>> {
    let problem = call.problem();
    let shape = shape(&problem).filter(|shape| shape.runs_on(device))?;
    let block = Block::of(shape);
    let [d_z, gate_sums, d_phi] = Parts::of(&problem, shape)
        .all()
        .map(|part| memory.take(part));
    let tensor = |address, num_streams| {
        Arg::TensorMap(Tensor::new(
            address,
            [call.tokens, num_streams, call.c],
            [TILE, shape.channels],
        ))
    };
    let operand = |name| call.operand(name).data as u64;
    let grid = shape.grid(device, call.tokens, TILE);
    let mut args = vec![
        tensor(x, STREAMS),
        tensor(d_u, 1),
        tensor(handed_on.d_x_in, STREAMS),
        tensor(call.result(call.op.results()[0]).data as u64, STREAMS),
    ];
    args.extend(["phi", "alpha", "bias", "m", "r"].map(|name| Arg::Pointer(operand(name))));
    args.extend([
        Arg::Pointer(handed_on.h_res.unwrap_or(0)),
        Arg::Pointer(operand("d_h_pre")),
        Arg::Pointer(d_z),
        Arg::Pointer(d_phi),
        Arg::Pointer(gate_sums),
        Arg::I32(call.tokens as i32),
        Arg::I32(call.c as i32),
        Arg::I32(i32::from(handed_on.h_res.is_some())),
        Arg::Settings(call.config.into()),
    ]);
    let main = Launch {
        kernel: Kernel {
            file: "pre_bwd_one_pass",
            function: "pre_bwd_one_pass",
            size: shape.size,
            dtype: call.dtype,
        },
        grid,
        block: block.threads() as u32,
        cluster: shape.cluster,
        shared_bytes: block.shared_bytes() as u32,
        args,
    };
    let clusters = grid[0] / shape.cluster;
    let sums = sum_gradients(call, d_phi, gate_sums, clusters, grid[0]);
    Some(vec![gates(call, d_z), main, sums])
}

/// Kernels that read no streams.
fn small_kernel(function: &'static str) -> Kernel {
    Kernel {
        file: function,
        function,
        size: "n4",
        dtype: DType::F32,
    }
}

/// d_z of h_post and H_res, at `d_z`.
pub fn gates(call: &Call, d_z: u64) -> Launch {
    // Lanes of a matrix (`kLanes`), of the 32 of a block.
    const LANES: usize = 2;
    const TOKENS: usize = 32 / LANES;
    let names = ["m", "alpha", "bias", "d_h_post", "d_h_res"];
    let mut args = names.map(|name| Arg::of(call.operand(name))).to_vec();
    args.extend([
        Arg::Pointer(d_z),
        Arg::I32(call.tokens as i32),
        Arg::Settings(call.config.into()),
    ]);
    Launch {
        kernel: small_kernel("gates_bwd"),
        grid: [call.tokens.div_ceil(TOKENS) as u32, 1, 1],
        block: 32,
        cluster: 1,
        shared_bytes: (2 * call.config.sinkhorn_iters * TOKENS * STREAMS * size_of::<f32>()) as u32,
        args,
    }
}

/// The parameters' gradients from the sums of `clusters` for phi and from `rows` for the others.
pub fn sum_gradients(call: &Call, d_phi: u64, gate_sums: u64, clusters: u32, rows: u32) -> Launch {
    const THREADS: usize = 256;
    let size = STREAMS * call.c * COLUMNS / 4;
    Launch {
        kernel: small_kernel("sum_gradients"),
        grid: [size.div_ceil(THREADS) as u32 + 1, 1, 1],
        block: THREADS as u32,
        cluster: 1,
        shared_bytes: 0,
        args: vec![
            Arg::Pointer(d_phi),
            Arg::Pointer(gate_sums),
            Arg::of(call.result("d_phi")),
            Arg::of(call.result("d_bias")),
            Arg::of(call.result("d_alpha")),
            Arg::I32(clusters as i32),
            Arg::I32(rows as i32),
            Arg::I32(size as i32),
        ],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_says_the_same() {
        let source = include_str!("../../../cuda/pre_bwd_one_pass.cu");
        for (channels, size) in super::super::CHANNELS {
            let cluster = 16;
            let block = Block::of(Shape {
                channels,
                size,
                cluster,
            });
            let (bytes, threads) = (block.shared_bytes(), block.threads());
            let text =
                format!("SIZE != {channels} || (kSharedBytes == {bytes} && kThreads == {threads})");
            assert!(source.contains(&text), "{text}");
        }
    }
}

//! Launches of `pre_bwd` in one pass over the streams (pre_bwd_one_pass.cu), and the small ones around it, which
//! post_pre's backward pass has as well.

use super::{COLUMNS, STREAMS, Shape};
use crate::contract::check::CheckedCall;
use crate::contract::view::DType;
use crate::gpu::launch::{
    Arg, Device, Kernel, Launch, MAX_CLUSTER_BLOCKS, Problem, Tensor, Workspace,
};
use crate::gpu::schedules::norm;
use crate::gpu::schedules::projection::DxIn;
use crate::gpu::workspace::{Memory, Part, room};

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

/// Whether the kernel takes the norm of the layer's input back, too. With 384 channels it would spill registers.
fn normalizes(problem: &Problem, shape: Shape) -> bool {
    problem.norm_width > 0 && shape.channels != 384
}

/// Sums for the gradient of norm_scale, one of each cluster.
fn norm_sums(problem: &Problem, shape: Shape) -> Part {
    Part {
        per_token: 0,
        fixed: (MAX_CLUSTER_BLOCKS / shape.cluster) as usize * problem.norm_width,
    }
}

/// What `pre_bwd` needs in one pass.
pub fn workspace(problem: &Problem) -> Workspace {
    shape(problem).map_or(Workspace::default(), |shape| {
        let norm = if normalizes(problem, shape) {
            room(&[norm_sums(problem, shape)])
        } else {
            norm::workspace(problem)
        };
        room(&Parts::of(problem, shape).all()).and(norm)
    })
}

/// How a block is divided (the constants at the head of pre_bwd_one_pass.cu).
struct Block {
    channels: usize,
    /// Buffers for X and d_u, and for d_x_in.
    stages: usize,
    d_x_in_slots: usize,
    /// Fragments of phi, and of the sums for d_phi, that a main warp has in shared memory.
    fragments: usize,
    sums: usize,
    dot_warps: usize,
}

impl Block {
    const MAIN_WARPS: usize = 8;
    const PART_BYTES: usize = 64;

    fn of(shape: Shape, normalizes: bool) -> Self {
        let channels = shape.channels;
        let (stages, d_x_in_slots, fragments, sums, dot_warps) = match channels {
            256 if normalizes => (5, 5, 4, 0, 2),
            256 => (5, 5, 4, 0, 4),
            320 => (3, 3, 10, 0, 2),
            384 => (3, 2, 12, 0, 2),
            _ => (2, 2, 14, 1, 2),
        };
        Self {
            channels,
            stages,
            d_x_in_slots,
            fragments,
            sums,
            dot_warps,
        }
    }

    fn threads(&self) -> usize {
        // Besides these a loader and an owner.
        32 * (Self::MAIN_WARPS + (self.dot_warps + 2).next_multiple_of(4))
    }

    fn shared_bytes(&self) -> usize {
        let stream = TILE * self.channels * 2;
        let replies = TILE * (128 + STREAMS * STREAMS * 4 + 16);
        let parts = 16 * Self::PART_BYTES;
        let barriers = 8 * (5 * self.stages + self.d_x_in_slots + 1);
        let units = Self::MAIN_WARPS * size_of::<f32>();
        self.stages * ((STREAMS + 1) * stream + replies)
            + self.d_x_in_slots * STREAMS * stream
            + Self::MAIN_WARPS * 32 * (24 * self.fragments + 48 * self.sums)
            + self.stages.div_ceil(2) * parts
            + barriers
            + units
    }
}

/// The backward pass from the streams at `x` to d_x and the parameters in one pass, where there is a kernel for it.
pub fn plan(
    call: &CheckedCall,
    device: &Device,
    memory: &mut Memory,
    x: u64,
    d_x_in: DxIn,
) -> Option<Vec<Launch>> {
    let problem = call.problem();
    let shape = shape(&problem).filter(|shape| shape.runs_on(device))?;
    let normalizes = normalizes(&problem, shape);
    let block = Block::of(shape, normalizes);
    let [d_z, gate_sums, d_phi] = Parts::of(&problem, shape)
        .all()
        .map(|part| memory.take(part));
    let operand = |name| call.operand_address(name);
    let (d_w, ([d_u, d_h_pre], mut launches)) = if normalizes {
        let d_w = memory.take(norm_sums(&problem, shape));
        (d_w, (["d_u", "d_h_pre"].map(operand), vec![]))
    } else {
        (0, norm::backward(call, memory, x))
    };
    let tensor = |address, num_streams| {
        Arg::TensorMap(Tensor::new(
            address,
            [call.tokens, num_streams, call.c],
            [TILE, shape.channels],
        ))
    };
    let grid = shape.grid(device, call.tokens, TILE);
    let mut args = vec![
        tensor(x, STREAMS),
        tensor(d_u, 1),
        tensor(d_x_in.address, STREAMS),
        tensor(call.result_address(call.kind.first_result()), STREAMS),
    ];
    args.extend(["phi", "alpha", "bias", "m", "r"].map(|name| Arg::Pointer(operand(name))));
    args.extend([
        Arg::Pointer(d_x_in.h_res.unwrap_or(0)),
        Arg::Pointer(d_h_pre),
        Arg::Pointer(d_z),
        Arg::Pointer(d_phi),
        Arg::Pointer(gate_sums),
        Arg::I32(call.tokens as i32),
        Arg::I32(call.c as i32),
        Arg::I32(i32::from(d_x_in.h_res.is_some())),
        Arg::Settings(call.config.into()),
    ]);
    if normalizes {
        args.extend(["norm_scale", "rho"].map(|name| Arg::Pointer(operand(name))));
        args.push(Arg::Pointer(d_w));
    }
    let main = Launch {
        kernel: Kernel {
            file: "pre_bwd_one_pass",
            function: if normalizes {
                "pre_norm_bwd_one_pass"
            } else {
                "pre_bwd_one_pass"
            },
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
    launches.extend([logits_bwd(call, d_z), main, sums]);
    launches.extend(normalizes.then(|| norm::sum(call, d_w, clusters as usize)));
    Some(launches)
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
pub fn logits_bwd(call: &CheckedCall, d_z: u64) -> Launch {
    // Lanes of a matrix (`kLanes`), of the 32 of a block.
    const LANES: usize = 2;
    const TOKENS: usize = 32 / LANES;
    let names = ["m", "alpha", "bias", "d_h_post", "d_h_res"];
    let mut args = names
        .map(|name| Arg::Pointer(call.operand_address(name)))
        .to_vec();
    args.extend([
        Arg::Pointer(d_z),
        Arg::I32(call.tokens as i32),
        Arg::Settings(call.config.into()),
    ]);
    Launch {
        kernel: small_kernel("logits_bwd"),
        grid: [call.tokens.div_ceil(TOKENS) as u32, 1, 1],
        block: 32,
        cluster: 1,
        shared_bytes: (2 * call.config.sinkhorn_iters * TOKENS * STREAMS * size_of::<f32>()) as u32,
        args,
    }
}

/// The parameters' gradients from the sums of `clusters` for phi and from `rows` for the others.
pub fn sum_gradients(
    call: &CheckedCall,
    d_phi: u64,
    gate_sums: u64,
    clusters: u32,
    rows: u32,
) -> Launch {
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
            Arg::Pointer(call.result_address("d_phi")),
            Arg::Pointer(call.result_address("d_bias")),
            Arg::Pointer(call.result_address("d_alpha")),
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
        let source = include_str!("../../../../device/one_pass/pre_bwd_one_pass.cu");
        for (channels, size) in super::super::CHANNELS {
            let cluster = 16;
            let shape = Shape {
                channels,
                size,
                cluster,
            };
            let says = |text: String| assert!(source.contains(&text), "{text}");
            for normalizes in [false, true] {
                let block = Block::of(shape, normalizes);
                let bytes = block.shared_bytes();
                says(format!("SIZE != {channels} || kSharedBytes == {bytes}"));
                let threads = block.threads();
                let of = if channels == 256 { "!=" } else { "==" };
                says(if normalizes {
                    format!("Warps<true>::kThreads == {threads}")
                } else {
                    format!("SIZE {of} 256 || Warps<false>::kThreads == {threads}")
                });
            }
        }
    }
}

//! The kernels that read the streams once (one_pass.cuh): which calls they take, and the launches of the
//! forward passes.

pub mod pre_bwd;
pub mod seam_bwd;

use super::launch::{
    Arg, CLUSTER_SIZES, Device, Kernel, Launch, MAX_CLUSTER_BLOCKS, Problem, Tensor,
};
use crate::signature::{Call, Op};
use crate::view::DType;

/// Streams, and columns of phi, that the kernels are written for.
pub const STREAMS: usize = 4;
pub const COLUMNS: usize = STREAMS * (STREAMS + 2);
/// Channels of a stream that a block may own, as build.rs names them.
const CHANNELS: [(usize, &str); 4] = [(256, "w256"), (320, "w320"), (384, "w384"), (448, "w448")];

/// How a cluster of blocks divides the channels among them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// Channels of a stream that a block owns.
    pub channels: usize,
    /// The same, as build.rs names it.
    pub size: &'static str,
    /// Blocks of a cluster.
    pub cluster: u32,
}

impl Shape {
    /// That of a problem which the kernels take, whatever the GPU. The number of tokens has no say: a token's
    /// result must not depend on it. All other widths take two passes over the streams.
    pub fn wanted(problem: &Problem) -> Option<Self> {
        let fits =
            problem.dtype == DType::Bf16 && problem.n == STREAMS && problem.columns == COLUMNS;
        let mut shapes = CHANNELS.into_iter().flat_map(|(channels, size)| {
            CLUSTER_SIZES.map(|cluster| Self {
                channels,
                size,
                cluster,
            })
        });
        shapes.find(|shape| fits && shape.channels * shape.cluster as usize == problem.c)
    }

    /// Whether the GPU has room for a cluster, and this build kernels for it.
    pub fn runs_on(self, device: &Device) -> bool {
        device.num_clusters(self.cluster, 1).is_some()
    }

    /// More clusters than this do not run at once on any GPU.
    pub fn max_clusters(self) -> u32 {
        MAX_CLUSTER_BLOCKS / self.cluster
    }

    /// The blocks of a kernel that takes tiles of so many tokens in turn.
    pub fn grid(self, device: &Device, tokens: usize, tile: usize) -> [u32; 3] {
        let clusters = device.num_clusters(self.cluster, tokens.div_ceil(tile));
        [clusters.unwrap_or(0) * self.cluster, 1, 1]
    }
}

/// How a block of a forward kernel divides its shared memory (`Shape` and `Plan` of one_pass_fwd.cu).
struct Forward {
    is_seam: bool,
    channels: usize,
    /// Of a tile.
    tokens: usize,
    /// Buffers for tiles.
    stages: usize,
    /// Slices of phi that have no room in registers.
    slices_in_shared: usize,
}

impl Forward {
    const THREADS: u32 = 512;
    /// Rows of the sums in a slot, at least.
    const MAX_CLUSTER: usize = 16;
    /// Sums of a token: of all columns and of the squares, and padding.
    const SUMS_BYTES: usize = 28 * size_of::<f32>();
    const SLICE_BYTES: usize = 2 * 256 * 16;

    fn new(channels: usize, is_seam: bool) -> Self {
        let (tokens, stages, slices_in_shared) = match (channels, is_seam) {
            (256, false) => (16, 5, 0),
            (320, false) => (8, 8, 0),
            (384, false) => (8, 7, 0),
            (_, false) => (8, 6, 0),
            (256, true) => (8, 8, 0),
            (320, true) => (8, 7, 0),
            (384, true) => (8, 6, 0),
            (_, true) => (8, 5, 2),
        };
        Self {
            is_seam,
            channels,
            tokens,
            stages,
            slices_in_shared,
        }
    }

    fn shared_bytes(&self) -> usize {
        let round = |bytes: usize| bytes.next_multiple_of(1024);
        let stream = self.tokens * self.channels * 2;
        let h_post = self.tokens * STREAMS * size_of::<f32>();
        let stage = if self.is_seam {
            round((STREAMS + 1) * (stream + h_post))
        } else {
            STREAMS * stream
        };
        let barriers = 1024;
        let partials = 2 * 8 * self.tokens * Self::SUMS_BYTES;
        let own = self.tokens.max(Self::MAX_CLUSTER) * Self::SUMS_BYTES;
        let finish = 2 * 8 * Self::SUMS_BYTES;
        let slices = self.slices_in_shared * Self::SLICE_BYTES;
        round(barriers + partials + self.stages * (own + h_post) + finish + slices)
            + self.stages * stage
    }
}

/// `pre_fwd` or `seam_fwd` in one launch, where there is a kernel for it.
pub fn forward(call: &Call, device: &Device) -> Option<Launch> {
    let is_seam = call.op == Op::SeamFwd;
    let shape = Shape::wanted(&call.problem()).filter(|shape| shape.runs_on(device))?;
    let plan = Forward::new(shape.channels, is_seam);
    let tensor = |name, num_streams| {
        Arg::TensorMap(Tensor::new(
            call.operand(name).data as u64,
            [call.tokens, num_streams, call.c],
            [plan.tokens, shape.channels],
        ))
    };
    let operand = |name| Arg::of(call.operand(name));
    let result = |name| Arg::of(call.result(name));
    let mut args = vec![tensor("x", STREAMS)];
    if is_seam {
        args.extend([tensor("y", 1), operand("h_post"), operand("h_res")]);
    }
    args.extend(["phi", "alpha", "bias"].map(operand));
    if is_seam {
        args.push(result("x_new"));
    }
    args.extend(["u", "h_pre", "h_post", "h_res", "m", "r"].map(result));
    args.extend([
        Arg::I32(call.tokens as i32),
        Arg::Settings(call.config.into()),
    ]);
    Some(Launch {
        kernel: Kernel {
            file: "one_pass_fwd",
            function: if is_seam {
                "seam_fwd_one_pass"
            } else {
                "pre_fwd_one_pass"
            },
            size: shape.size,
            dtype: call.dtype,
        },
        grid: shape.grid(device, call.tokens, plan.tokens),
        block: Forward::THREADS,
        cluster: shape.cluster,
        shared_bytes: plan.shared_bytes() as u32,
        args,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a block may have on GPUs with clusters, and more than half of which it must have.
    const MAX_BYTES: usize = 232_448;

    #[test]
    fn forward_blocks_fit_and_have_a_multiprocessor_each() {
        for (channels, _) in CHANNELS {
            for is_seam in [false, true] {
                let bytes = Forward::new(channels, is_seam).shared_bytes();
                assert!((MAX_BYTES / 2..=MAX_BYTES).contains(&bytes), "{bytes}");
            }
        }
        assert_eq!(Forward::new(256, false).shared_bytes(), 205_824);
        assert_eq!(Forward::new(448, true).shared_bytes(), 228_352);
    }

    #[test]
    fn the_kernel_divides_its_blocks_alike() {
        let source = include_str!("../../cuda/one_pass_fwd.cu");
        for (channels, _) in CHANNELS {
            let [seam, pre] = [true, false].map(|is_seam| {
                let plan = Forward::new(channels, is_seam);
                format!(
                    "Shape{{{}, {}, {}, ",
                    plan.tokens, plan.stages, plan.slices_in_shared
                )
            });
            let is_row = |line: &&str| {
                let row = line.trim_start();
                row.starts_with(&format!("case {channels}: return seam ? {seam}"))
                    && row.contains(&format!(" : {pre}"))
            };
            assert!(source.lines().any(|line| is_row(&line)), "{channels}");
        }
    }

    #[test]
    fn widths_that_clusters_divide_have_a_shape() {
        let shape = |c, n, dtype| {
            let problem = Problem {
                op: Op::PreFwd,
                dtype,
                n,
                c,
                columns: n * (n + 2),
                sinkhorn_iters: 20,
                norm_width: 0,
            };
            Shape::wanted(&problem).map(|shape| (shape.channels, shape.cluster))
        };
        assert_eq!(shape(4096, 4, DType::Bf16), Some((256, 16)));
        assert_eq!(shape(2560, 4, DType::Bf16), Some((320, 8)));
        assert_eq!(shape(6144, 4, DType::Bf16), Some((384, 16)));
        assert_eq!(shape(7168, 4, DType::Bf16), Some((448, 16)));
        assert_eq!(shape(4160, 4, DType::Bf16), None);
        assert_eq!(shape(8192, 4, DType::Bf16), None);
        assert_eq!(shape(4096, 2, DType::Bf16), None);
        assert_eq!(shape(4096, 4, DType::F16), None);
    }
}

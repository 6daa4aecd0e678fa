//! The kernels that read the streams once (one_pass.cuh): which calls they take, and the launches of the
//! forward passes.

pub mod post_pre_bwd;
pub mod pre_bwd;

use crate::contract::check::CheckedCall;
use crate::contract::table::Call;
use crate::contract::view::DType;
use crate::gpu::launch::{
    Arg, CLUSTER_SIZES, Device, Kernel, Launch, MAX_CLUSTER_BLOCKS, Problem, Tensor,
};

/// Streams, and columns of phi, that the kernels are written for.
pub const STREAMS: usize = 4;
pub const COLUMNS: usize = STREAMS * (STREAMS + 2);
/// Channels of a stream that a block may own, as the build names them.
const CHANNELS: [(usize, &str); 4] = [(256, "w256"), (320, "w320"), (384, "w384"), (448, "w448")];

/// How a cluster of blocks divides the channels among them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// Channels of a stream that a block owns.
    pub channels: usize,
    /// Name that the build has for these channels, such as `w256`.
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
    is_post_pre: bool,
    has_norm: bool,
    channels: usize,
    /// Of a tile.
    tokens: usize,
    /// Buffers for tiles.
    stages: usize,
    /// Fragments of phi that have no room in registers.
    fragments_in_shared: usize,
}

impl Forward {
    const THREADS: u32 = 512;
    /// Rows of the sums in a slot, at least.
    const MAX_CLUSTER: usize = 16;
    /// `kFinishRowBytes`
    const FINISH_ROW_BYTES: usize = 28 * size_of::<f32>();
    const FRAGMENT_BYTES: usize = 256 * 16;

    fn new(channels: usize, is_post_pre: bool, has_norm: bool) -> Self {
        let (tokens, stages, fragments_in_shared) = match (channels, is_post_pre, has_norm) {
            (256, false, _) => (16, 5, 0),
            (320, false, _) => (8, 8, 0),
            (384, false, _) => (8, 7, 0),
            (_, false, false) => (8, 6, 0),
            (_, false, true) => (8, 6, 3),
            (256, true, _) => (8, 8, 0),
            (320, true, _) => (8, 7, 0),
            (384, true, false) => (8, 6, 0),
            (384, true, true) => (8, 6, 1),
            (_, true, false) => (8, 5, 5),
            (_, true, true) => (8, 5, 3),
        };
        Self {
            is_post_pre,
            has_norm,
            channels,
            tokens,
            stages,
            fragments_in_shared,
        }
    }

    fn shared_bytes(&self) -> usize {
        let floats = |number: usize| number * size_of::<f32>();
        // Sums of a token: of all columns, of the squares or of the products of its streams, and padding.
        let sums = floats(if self.has_norm { 36 } else { 28 });
        let streams = if self.is_post_pre {
            STREAMS + 1
        } else {
            STREAMS
        };
        let mixing = if self.is_post_pre { STREAMS + 1 } else { 0 };
        let barriers = 1024;
        let partials = 2 * 8 * self.tokens * sums;
        let own = self.tokens.max(Self::MAX_CLUSTER) * sums;
        let coefficients = self.tokens * floats(STREAMS * (1 + mixing));
        let finish = 2 * 8 * Self::FINISH_ROW_BYTES;
        let norm_scale = floats(if self.has_norm { self.channels } else { 0 });
        let fragments = self.fragments_in_shared * Self::FRAGMENT_BYTES;
        let others = self.stages * (own + coefficients) + finish + norm_scale + fragments;
        (barriers + partials + others).next_multiple_of(1024)
            + self.stages * streams * self.tokens * self.channels * 2
    }
}

/// `pre_fwd` or `post_pre_fwd` in one launch, where there is a kernel for it.
pub fn forward(call: &CheckedCall, device: &Device) -> Option<Launch> {
    let is_post_pre = call.kind == Call::PostPreFwd;
    let shape = Shape::wanted(&call.problem()).filter(|shape| shape.runs_on(device))?;
    let has_norm = call.norm_width > 0;
    let plan = Forward::new(shape.channels, is_post_pre, has_norm);
    let tensor = |name, num_streams| {
        Arg::TensorMap(Tensor::new(
            call.operand_address(name),
            [call.tokens, num_streams, call.c],
            [plan.tokens, shape.channels],
        ))
    };
    let operand = |name| Arg::Pointer(call.operand_address(name));
    let result = |name| Arg::Pointer(call.result_address(name));
    let mut args = vec![tensor("x", STREAMS)];
    if is_post_pre {
        args.extend([tensor("y", 1), operand("h_post"), operand("h_res")]);
    }
    args.extend(["phi", "alpha", "bias"].map(operand));
    if has_norm {
        args.push(operand("norm_scale"));
    }
    if is_post_pre {
        args.push(result("x_new"));
    }
    args.extend(["u", "h_pre", "h_post", "h_res", "m", "r"].map(result));
    if has_norm {
        let eps = call.config.norm_scale_eps as f32;
        args.extend([result("rho"), Arg::F32(eps)]);
    }
    args.extend([
        Arg::I32(call.tokens as i32),
        Arg::Settings(call.config.into()),
    ]);
    Some(Launch {
        kernel: Kernel {
            file: "one_pass_fwd",
            function: match (is_post_pre, has_norm) {
                (false, false) => "pre_fwd_one_pass",
                (false, true) => "pre_norm_fwd_one_pass",
                (true, false) => "post_pre_fwd_one_pass",
                (true, true) => "post_pre_norm_fwd_one_pass",
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
    use crate::gpu::launch::CLUSTER_SHARED_BYTES;

    /// What a block may have, and more than half of which it must have.
    const MAX_BYTES: usize = CLUSTER_SHARED_BYTES as usize;

    /// Post_pre or pre, with a norm or without.
    const VARIANTS: [(bool, bool); 4] =
        [(false, false), (false, true), (true, false), (true, true)];

    #[test]
    fn forward_blocks_fit_and_have_a_multiprocessor_each() {
        for (channels, _) in CHANNELS {
            for (is_post_pre, has_norm) in VARIANTS {
                let bytes = Forward::new(channels, is_post_pre, has_norm).shared_bytes();
                assert!((MAX_BYTES / 2..=MAX_BYTES).contains(&bytes), "{bytes}");
            }
        }
        assert_eq!(Forward::new(256, false, false).shared_bytes(), 205_824);
        assert_eq!(Forward::new(448, true, true).shared_bytes(), 230_400);
    }

    #[test]
    fn the_kernel_divides_its_blocks_alike() {
        let source = include_str!("../../../device/one_pass/one_pass_fwd.cu");
        for (channels, _) in CHANNELS {
            for is_post_pre in [false, true] {
                let [norm, none] = [true, false].map(|has_norm| {
                    let plan = Forward::new(channels, is_post_pre, has_norm);
                    format!(
                        "Shape{{{}, {}, {}, ",
                        plan.tokens, plan.stages, plan.fragments_in_shared
                    )
                });
                let is_row = |line: &&str| {
                    let row = line.trim_start();
                    row.starts_with(&format!("case {channels}: return norm ? {norm}"))
                        && row.contains(&format!(" : {none}"))
                };
                assert!(source.lines().any(|line| is_row(&line)), "{channels}");
            }
        }
    }

    #[test]
    fn widths_that_clusters_divide_have_a_shape() {
        let shape = |c, n, dtype| {
            let problem = Problem {
                kind: Call::PreFwd,
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

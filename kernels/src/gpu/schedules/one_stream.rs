//! The schedules of one stream (device/one_stream): its tokens are so short that a block has whole ones and reads them
//! once.

use super::{DXIn, Schedule, norm};
use crate::contract::check::CheckedCall;
use crate::contract::config::Constraint;
use crate::contract::table::Call;
use crate::contract::view::DType;
use crate::gpu::device::{Device, MAX_CLUSTER_BLOCKS};
use crate::gpu::kernel::Kernel;
use crate::gpu::launch::{Arg, Launch};
use crate::gpu::tuning::ONE;
use crate::gpu::workspace::{Part, Workspace};

/// The least C: one of which each lane of a warp has channels where they have 2 bytes. Blocks of narrower streams would
/// have few bytes under way.
const LEAST_CHANNELS: usize = 256;

/// Bytes of a row that a thread has (`V` of one_stream.cuh, in channels).
const THREAD_BYTES: usize = 16;

/// Bytes of a line of a block's shared memory (`kLineBytes` there).
const LINE_BYTES: usize = 128;

/// Columns of phi that a block has room for (`kMostColumns` there).
const MOST_COLUMNS: usize = 3;

/// Bytes of shared memory of a multiprocessor, and those of them that CUDA takes for each block.
const ALL_SHARED_BYTES: usize = 228 << 10;
const TAKEN_BYTES: usize = 1 << 10;

/// The most blocks of a multiprocessor.
const MAX_BLOCKS: usize = 32;

// The kernels take a constraint that they do not know for `none`.
const _: () = assert!(
    Constraint::ALL.len() == 4,
    "the kernels of device/one_stream have to take a new constraint"
);

/// One launch that reads the stream and y once.
pub const FORWARD: Schedule = Schedule {
    name: "one stream",
    plan: |call, device, _| forward(call, device).map(|launch| vec![launch]),
};

/// The cotangent of the stream in one pass, then the sums for the parameters. A head has no cotangent to add to.
pub const PRE_BACKWARD: Schedule = Schedule {
    name: "one stream",
    plan: |call, device, workspace| {
        let d_x_in = DXIn::of(call, "d_x_in", "h_res");
        pre_backward(call, device, workspace, call.operand_address("x"), d_x_in)
    },
};

/// Post and pre at once in blocks with whole tokens, without a norm.
pub const POST_PRE_BACKWARD: Schedule = Schedule {
    name: "one stream",
    plan: |call, device, workspace| {
        if call.norm_width > 0 {
            return None;
        }
        let d_u_and_d_h_pre = ["d_u", "d_h_pre"].map(|name| call.operand_address(name));
        let d_x_in = DXIn::of(call, "d_x_new_in", "h_res_new");
        let x = call.operand_address("x");
        let function = "post_pre_bwd_one_stream";
        backward(
            call,
            device,
            workspace,
            function,
            x,
            d_u_and_d_h_pre,
            d_x_in,
        )
    },
};

/// The blocks of a kernel, each with all channels of its tokens.
#[derive(Debug, Clone, Copy)]
struct Blocks {
    kernel: Kernel,
    /// Threads of a block.
    threads: usize,
    /// Shared memory of a block.
    shared_bytes: usize,
    /// Tokens of a tile.
    tokens: usize,
}

impl Blocks {
    /// Those of a kernel whose tiles have so many arrays, where it takes the call.
    fn of(call: &CheckedCall, function: &'static str, arrays: usize) -> Option<Self> {
        let takes = call.n == 1 && (1..=MOST_COLUMNS).contains(&call.columns);
        takes.then(|| Self::of_width(function, call.dtype, call.c, arrays))?
    }

    /// Those for streams of C channels.
    fn of_width(function: &'static str, dtype: DType, c: usize, arrays: usize) -> Option<Self> {
        let kernel = Kernel::find(function, &ONE, dtype)?;
        let row_bytes = c * dtype.num_bytes();
        if c < LEAST_CHANNELS || !row_bytes.is_multiple_of(THREAD_BYTES) {
            return None;
        }
        // In threads with one set of channels, or with two where the kernel has that.
        let with_sets = |sets, tokens, stages, besides| {
            let threads = (row_bytes / THREAD_BYTES).div_ceil(sets);
            let threads = threads.next_multiple_of(32);
            // Of barriers and of warps.
            let lines = 1 + (threads / 32).next_multiple_of(4);
            let slot_bytes = arrays * tokens * row_bytes + LINE_BYTES;
            Self {
                kernel,
                threads,
                shared_bytes: lines * LINE_BYTES + besides + stages * slot_bytes,
                tokens,
            }
        };
        let one = with_sets(1, kernel.tokens(), kernel.stages(), 0);
        let two = kernel.find_more("wide_tokens").map(|tokens| {
            let phi_bytes = MOST_COLUMNS * c * size_of::<f32>();
            with_sets(2, tokens, kernel.more("wide_stages"), phi_bytes)
        });
        let all = [two, Some(one)].into_iter().flatten();
        let fitting = all.filter(|blocks| blocks.at_once() > 0);
        fitting.max_by_key(|blocks| blocks.at_once() * blocks.threads)
    }

    /// How many a multiprocessor has at once.
    fn at_once(self) -> usize {
        let by_threads = self.kernel.threads() / self.threads;
        let by_memory = ALL_SHARED_BYTES / (self.shared_bytes + TAKEN_BYTES);
        by_threads.min(by_memory).min(MAX_BLOCKS)
    }

    /// How many run at once on any device, at most.
    fn most(self) -> usize {
        MAX_CLUSTER_BLOCKS as usize * self.at_once()
    }

    /// A launch of as many as the device has at once, which take tiles in turn.
    fn launch(self, call: &CheckedCall, device: &Device, args: Vec<Arg>) -> Option<Launch> {
        let multiprocessors = device.num_clusters(1, usize::MAX)? as usize;
        let tiles = call.tokens.div_ceil(self.tokens);
        let blocks = tiles.min(multiprocessors * self.at_once());
        Some(Launch {
            block: self.threads as u32,
            shared_bytes: self.shared_bytes as u32,
            ..self.kernel.launch([blocks, 1, 1], args)
        })
    }
}

/// Sizes and settings, the last arguments of all these kernels.
fn sizes(call: &CheckedCall) -> [Arg; 4] {
    [
        Arg::I32(call.tokens as i32),
        Arg::I32(call.c as i32),
        Arg::I32(call.columns as i32),
        Arg::Settings(call.config.into()),
    ]
}

/// The launch whose u has the weights of its own sublayer.
pub fn forward(call: &CheckedCall, device: &Device) -> Option<Launch> {
    let is_post_pre = call.kind == Call::PostPreFwd;
    let (function, arrays) = if is_post_pre {
        ("post_pre_fwd_one_stream", 2)
    } else {
        ("pre_fwd_one_stream", 1)
    };
    let blocks = Blocks::of(call, function, arrays)?;
    let operand = |name| Arg::Pointer(call.operand_address(name));
    let result = |name| Arg::Pointer(call.result_address(name));
    let mut args = vec![operand("x")];
    if is_post_pre {
        args.extend(["y", "h_post", "h_res"].map(operand));
    }
    args.extend(["phi", "alpha", "bias", "norm_scale"].map(operand));
    if is_post_pre {
        args.push(result("x_new"));
    }
    args.extend(["u", "h_pre", "h_post", "h_res", "m", "r", "rho"].map(result));
    args.push(Arg::F32(call.config.norm_scale_eps as f32));
    args.extend(sizes(call));
    blocks.launch(call, device, args)
}

/// The backward pass of pre from the stream at `x`.
pub fn pre_backward(
    call: &CheckedCall,
    device: &Device,
    workspace: &mut dyn Workspace,
    x: u64,
    d_x_in: DXIn,
) -> Option<Vec<Launch>> {
    let function = "pre_bwd_one_stream";
    Blocks::of(call, function, 3)?;
    let (d_u_and_d_h_pre, mut launches) = norm::backward(call, workspace, x);
    launches.extend(backward(
        call,
        device,
        workspace,
        function,
        x,
        d_u_and_d_h_pre,
        d_x_in,
    )?);
    Some(launches)
}

/// A backward pass from the stream at `x` and the cotangents of u and h_pre.
fn backward(
    call: &CheckedCall,
    device: &Device,
    workspace: &mut dyn Workspace,
    function: &'static str,
    x: u64,
    [d_u, d_h_pre]: [u64; 2],
    d_x_in: DXIn,
) -> Option<Vec<Launch>> {
    let has_post = function == "post_pre_bwd_one_stream";
    let blocks = Blocks::of(call, function, if has_post { 4 } else { 3 })?;
    let size = call.c * call.columns;
    let [d_phi, gates] =
        [size, call.columns + 3].map(|floats| workspace.take(Part::fixed(blocks.most() * floats)));
    let operand = |name| Arg::Pointer(call.operand_address(name));
    let result = |name| Arg::Pointer(call.result_address(name));
    let mut args: Vec<Arg> = [x, d_u, d_x_in.address].map(Arg::Pointer).to_vec();
    if has_post {
        args.push(operand("y"));
    }
    args.extend(["phi", "alpha", "bias", "m", "r"].map(operand));
    args.extend([d_x_in.h_res.unwrap_or(0), d_h_pre].map(Arg::Pointer));
    args.extend(["d_h_post", "d_h_res"].map(operand));
    if has_post {
        args.extend(["h_post", "h_res"].map(operand));
    }
    args.push(result(call.kind.first_result()));
    if has_post {
        args.extend(["d_y", "d_h_post", "d_h_res"].map(result));
    }
    args.extend([d_phi, gates].map(Arg::Pointer));
    args.extend(sizes(call));
    let main = blocks.launch(call, device, args)?;
    let sum = Kernel::of("sum_one_stream", &ONE, DType::F32);
    let mut args: Vec<Arg> = [d_phi, gates].map(Arg::Pointer).to_vec();
    args.extend(["d_phi", "d_bias", "d_alpha"].map(result));
    let numbers = [
        main.grid[0] as usize,
        size,
        call.columns,
        call.width("alpha"),
    ];
    args.extend(numbers.map(|number| Arg::I32(number as i32)));
    // A lane a number, and a block for the gates.
    let sum = sum.launch([size.div_ceil(32) + 1, 1, 1], args);
    Some(vec![main, sum])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gpu::device::CLUSTER_SHARED_BYTES;

    const ALL: [(&str, usize); 4] = [
        ("pre_fwd_one_stream", 1),
        ("post_pre_fwd_one_stream", 2),
        ("pre_bwd_one_stream", 3),
        ("post_pre_bwd_one_stream", 4),
    ];

    #[test]
    fn blocks_fit_and_keep_a_multiprocessor_busy() {
        for (dtype, widest) in [(DType::Bf16, 8192), (DType::F16, 8192), (DType::F32, 4096)] {
            let step = THREAD_BYTES / dtype.num_bytes();
            for (function, arrays) in ALL {
                let of = |c| Blocks::of_width(function, dtype, c, arrays);
                for c in (LEAST_CHANNELS..=widest).step_by(step) {
                    let blocks = of(c).unwrap();
                    let least = blocks.kernel.threads() / 2;
                    let threads = blocks.at_once() * blocks.threads;
                    assert!(threads > least, "{function} {c}: {threads}");
                    assert!(blocks.shared_bytes <= CLUSTER_SHARED_BYTES as usize);
                    assert!(of(c + 1).is_none());
                }
                assert!(of(widest + step).is_none() && of(LEAST_CHANNELS - step).is_none());
            }
        }
    }

    #[test]
    fn blocks_divide_a_multiprocessor() {
        let of = |at: usize, c| {
            let (function, arrays) = ALL[at];
            let blocks = Blocks::of_width(function, DType::Bf16, c, arrays).unwrap();
            (blocks.threads, blocks.tokens, blocks.at_once())
        };
        assert_eq!(of(0, 2048), (256, 4, 4));
        assert_eq!(of(1, 4096), (512, 2, 2));
        assert_eq!(of(2, 2048), (256, 2, 2));
        assert_eq!(of(3, 4096), (512, 2, 1));
        // Two sets of channels a thread.
        assert_eq!(of(2, 2560), (160, 1, 3));
        assert_eq!(of(3, 8192), (512, 1, 1));
    }
}

//! The schedule of `post_pre_bwd` with given weights of the streams in u that reads the streams once, without clusters
//! (given/post_given_bwd.cu).

use crate::contract::check::CheckedCall;
use crate::contract::view::DType;
use crate::gpu::device::{Device, MAX_CLUSTER_BLOCKS};
use crate::gpu::kernel::Kernel;
use crate::gpu::launch::{Arg, Launch, Tensor, line};
use crate::gpu::schedules::one_pass::pre_bwd::{self, Sums};
use crate::gpu::schedules::{Schedule, sizes};
use crate::gpu::tuning::{CHANNELS, NARROW, Size};
use crate::gpu::workspace::{Part, Workspace};

/// The logits' gradients beforehand, then X' and its gradient in one pass, then all sums.
pub const ONE_PASS_BACKWARD: Schedule = Schedule {
    name: "one pass without clusters",
    plan,
};

const FUNCTION: &str = "post_given_bwd";

/// Multiprocessors that a size is chosen for, those of an H200: the workspace follows from it, whatever the GPU.
const MULTIPROCESSORS: usize = 132;

/// The work of a block for each tile beside that for its channels, in bytes of streams.
const FIXED_WORK: usize = 800;

/// The size whose blocks, as many as have a multiprocessor each, have the least work, for n, C and columns of phi.
fn size_of(dtype: DType, [n, c, columns]: [usize; 3]) -> Option<&'static Size> {
    let sizes = CHANNELS.iter().chain(NARROW).filter(|size| {
        [size.streams, size.columns] == [n as u32, columns as u32]
            && sizes::is_aligned(c)
            && c >= line(dtype)
            && c.div_ceil(size.number as usize) <= MULTIPROCESSORS
            && Kernel::find(FUNCTION, size, dtype).is_some()
    });
    sizes.min_by_key(|size| {
        let channels = size.number as usize;
        let ranges = MULTIPROCESSORS / c.div_ceil(channels);
        (channels * n * dtype.num_bytes() + FIXED_WORK) * MULTIPROCESSORS / ranges
    })
}

/// The most blocks that share the tokens of a slice of the channels, on any GPU.
fn max_ranges(slices: usize) -> usize {
    MAX_CLUSTER_BLOCKS as usize / slices
}

fn plan(call: &CheckedCall, device: &Device, workspace: &mut dyn Workspace) -> Option<Vec<Launch>> {
    let size = size_of(call.dtype, [call.n, call.c, call.columns])?;
    let kernel = Kernel::of(FUNCTION, size, call.dtype);
    if !kernel.is_for(device) || !device.has_kernels_for_clusters() || !pre_bwd::has_records(call) {
        return None;
    }
    let slices = call.c.div_ceil(size.number as usize);
    let repliers = kernel.more("repliers");
    let sums = Sums {
        d_z: workspace.take(Part::per_token(call.columns)),
        gates: workspace.take(Part::fixed(
            repliers * max_ranges(slices) * (call.columns + 3),
        )),
        d_phi: workspace.take(Part::fixed(
            max_ranges(slices) * call.n * pre_bwd::padded(call.c) * call.columns,
        )),
    };
    let dots = workspace.take(Part::per_token(slices * kernel.more("dots")));
    let tiles = call.tokens.div_ceil(kernel.tokens());
    let at_once = device.num_sms as usize / slices;
    let ranges = at_once.clamp(1, max_ranges(slices)).min(tiles);

    let operand = |name| call.operand_address(name);
    let result = |name| call.result_address(name);
    let tensor = |address, num_streams| {
        let box_dims = [kernel.tokens(), size.number as usize];
        let dims = [call.tokens, num_streams, call.c];
        Tensor::new(address, call.dtype, dims, box_dims)
    };
    let vector = |address| Arg::BlockMaps(tensor(address, 1));
    let streams = |address| {
        let tensor = tensor(address, call.n);
        [0, 1].map(|first| Arg::BlockMaps(tensor.every_second(first)))
    };
    let mut args = streams(operand("x")).to_vec();
    args.extend(["y", "d_u"].map(|name| vector(operand(name))));
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
        "h_given",
        "d_h_pre",
    ];
    args.extend(names.map(|name| Arg::Pointer(operand(name))));
    args.extend([sums.d_z, dots, sums.d_phi, sums.gates].map(Arg::Pointer));
    args.extend([
        Arg::I32(call.tokens as i32),
        Arg::I32(call.c as i32),
        Arg::I32(i32::from(call.config.deferred)),
        Arg::Settings(call.config.into()),
    ]);
    Some(vec![
        pre_bwd::logits(call, &sums),
        kernel.launch([slices, ranges, 1], args),
        sum(call, size, &sums, dots, [slices, ranges]),
    ])
}

/// The sums over ranges of tokens, and over slices of channels.
fn sum(
    call: &CheckedCall,
    size: &'static Size,
    sums: &Sums,
    dots: u64,
    [slices, ranges]: [usize; 2],
) -> Launch {
    let kernel = Kernel::of("sum_given", size, call.dtype);
    let fours = call.n * call.c * call.columns / 4;
    let phi_blocks = fours.div_ceil(kernel.threads());
    // A warp has as many tokens at once as rows of theirs have no more words than it has lanes.
    let tokens = kernel.threads() / 32 * (32 / kernel.more("dots"));
    let result = |name| Arg::Pointer(call.result_address(name));
    let mut args = [sums.d_phi, sums.gates, dots].map(Arg::Pointer).to_vec();
    args.extend(["h_post", "h_res"].map(|name| Arg::Pointer(call.operand_address(name))));
    let names = [
        "d_phi",
        "d_bias",
        "d_alpha",
        "d_h_post",
        "d_h_res",
        "d_h_given",
    ];
    args.extend(names.map(result));
    let numbers = [
        phi_blocks,
        ranges,
        fours,
        call.c * call.columns / 4,
        pre_bwd::padded(call.c) * call.columns / 4,
        call.layout.num_gates(),
        call.tokens,
        slices,
    ];
    args.extend(numbers.map(|number| Arg::I32(number as i32)));
    kernel.launch([phi_blocks + 1 + call.tokens.div_ceil(tokens), 1, 1], args)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Channels of a block, and blocks that share a slice on an H200.
    fn geometry(dtype: DType, sizes: [usize; 3]) -> Option<(usize, usize)> {
        let channels = size_of(dtype, sizes)?.number as usize;
        Some((channels, MULTIPROCESSORS / sizes[1].div_ceil(channels)))
    }

    #[test]
    fn aligned_widths_of_a_line_or_more_have_a_size() {
        for (sizes, expected) in [
            ([4, 64, 24], (256, 132)),
            ([4, 1000, 24], (256, 33)),
            ([4, 2560, 24], (256, 13)),
            ([4, 4096, 24], (256, 8)),
            ([4, 5120, 24], (256, 6)),
            ([4, 7168, 24], (256, 4)),
            ([4, 33792, 24], (256, 1)),
            ([4, 4096, 8], (512, 16)),
            ([4, 2688, 8], (384, 18)),
            ([4, 4096, 32], (128, 4)),
            ([2, 4096, 8], (512, 16)),
        ] {
            assert_eq!(geometry(DType::Bf16, sizes), Some(expected), "{sizes:?}");
        }
        assert_eq!(geometry(DType::F16, [4, 4096, 24]), Some((256, 8)));
        for sizes in [
            [4, 33856, 24],
            [4, 4100, 24],
            [4, 56, 24],
            [3, 4096, 15],
            [8, 4096, 80],
            [1, 4096, 3],
        ] {
            assert_eq!(geometry(DType::Bf16, sizes), None, "{sizes:?}");
        }
    }
}

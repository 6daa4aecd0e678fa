//! The schedule of `post_pre_fwd` with given weights of the streams in u that reads them once (post_given_fwd.cu), and
//! then makes the coefficients of what that leaves (given_coefficients.cu).

use crate::contract::check::CheckedCall;
use crate::contract::view::DType;
use crate::gpu::device::{Device, MAX_ROWS};
use crate::gpu::kernel::Kernel;
use crate::gpu::launch::{Arg, Launch, Tensor, line};
use crate::gpu::schedules::{Schedule, sizes};
use crate::gpu::tuning::{CHANNELS, Size};
use crate::gpu::workspace::{Part, Workspace};

/// X', u and parts of the sums in blocks that know nothing of each other, then the coefficients of these parts.
pub const FORWARD: Schedule = Schedule {
    name: "one pass, then the coefficients",
    plan,
};

fn plan(call: &CheckedCall, device: &Device, workspace: &mut dyn Workspace) -> Option<Vec<Launch>> {
    let size = size(call.dtype, [call.n, call.c, call.columns])?;
    // The chips that the kernel is compiled for.
    device.num_clusters(1, 1)?;
    let channels = size.number as usize;
    let slices = call.c.div_ceil(channels);
    // A token has a row for each slice, with the columns, the sum of squares, and a number that nobody reads.
    let partial = workspace.take(Part::per_token(slices * (call.columns + 2)));
    let streams = streams(call, device, size, partial);
    Some(vec![streams, coefficients(call, partial, slices)])
}

/// The size of the kernel for n, C and columns of phi.
fn size(dtype: DType, [n, c, columns]: [usize; 3]) -> Option<&'static Size> {
    let mut sizes = CHANNELS.iter().filter(|size| {
        [size.streams, size.columns] == [n as u32, columns as u32]
            && Kernel::find("post_given_fwd", size, dtype).is_some()
    });
    sizes.next().filter(|_| c.is_multiple_of(line(dtype)))
}

/// X', u, and the sums of each slice of the channels, at `partial`.
fn streams(call: &CheckedCall, device: &Device, size: &'static Size, partial: u64) -> Launch {
    let kernel = Kernel::of("post_given_fwd", size, call.dtype);
    let channels = size.number as usize;
    let tensor = |address, num_streams| {
        let dims = [call.tokens, num_streams, call.c];
        let box_dims = [kernel.tokens(), channels];
        Arg::TensorMap(Tensor::new(address, call.dtype, dims, box_dims))
    };
    let operand = |name| call.operand_address(name);
    let result = |name| call.result_address(name);
    let mut args = vec![
        tensor(operand("x"), call.n),
        tensor(operand("y"), 1),
        tensor(result("x_new"), call.n),
        tensor(result("u"), 1),
    ];
    args.extend(["h_post", "h_res", "h_given", "phi"].map(|name| Arg::Pointer(operand(name))));
    args.push(Arg::Pointer(partial));
    args.extend([call.tokens, call.c].map(|size| Arg::I32(size as i32)));
    // Each slice has as many blocks as run at once, of which a multiprocessor has one.
    let slices = call.c.div_ceil(channels);
    let ranges = (device.num_sms as usize / slices).clamp(1, MAX_ROWS);
    let tiles = call.tokens.div_ceil(kernel.tokens());
    kernel.launch([slices, ranges.min(tiles), 1], args)
}

/// The coefficients from these sums.
fn coefficients(call: &CheckedCall, partial: u64, slices: usize) -> Launch {
    let kernel = Kernel::of(
        "given_coefficients",
        sizes::streams(call.n, true),
        DType::F32,
    );
    let mut args = vec![Arg::Pointer(partial), Arg::I32(slices as i32)];
    args.extend(["alpha", "bias"].map(|name| Arg::Pointer(call.operand_address(name))));
    let results = ["h_pre", "h_post", "h_res", "m", "r"];
    args.extend(results.map(|name| Arg::Pointer(call.result_address(name))));
    args.extend([call.tokens, call.c, call.columns].map(|size| Arg::I32(size as i32)));
    args.push(Arg::Settings(call.config.into()));
    kernel.launch([call.tokens.div_ceil(kernel.tokens()), 1, 1], args)
}

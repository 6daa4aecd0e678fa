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

/// X', u and sums over some channels each, then the coefficients of these sums.
pub const FORWARD: Schedule = Schedule {
    name: "one pass, then the coefficients",
    plan,
};

fn plan(call: &CheckedCall, device: &Device, workspace: &mut dyn Workspace) -> Option<Vec<Launch>> {
    let size = size(call.dtype, [call.n, call.c, call.columns])?;
    let blocks = call.c.div_ceil(size.number as usize);
    // Two blocks add up their sums where there is an even number of them: so less goes to memory.
    let cluster = if blocks.is_multiple_of(2) { 2 } else { 1 };
    let at_once = device.num_clusters(cluster, usize::MAX)?;
    let slices = blocks / cluster as usize;
    let sums = Sums {
        slices,
        columns: workspace.take(Part::per_token(slices * call.columns)),
        squares: workspace.take(Part::per_token(slices)),
    };
    let ranges = (at_once as usize / slices).clamp(1, MAX_ROWS);
    let geometry = ([blocks, ranges], cluster);
    Some(vec![
        streams(call, size, geometry, &sums),
        coefficients(call, &sums),
    ])
}

/// The sums of the slices of the channels, of which a token has a row for each.
struct Sums {
    slices: usize,
    /// Addresses of those of the products with the columns of phi, and of the squares.
    columns: u64,
    squares: u64,
}

/// The size of the kernel for n, C and columns of phi.
fn size(dtype: DType, [n, c, columns]: [usize; 3]) -> Option<&'static Size> {
    let mut sizes = CHANNELS.iter().filter(|size| {
        [size.streams, size.columns] == [n as u32, columns as u32]
            && Kernel::find("post_given_fwd", size, dtype).is_some()
    });
    sizes
        .next()
        .filter(|_| sizes::is_aligned(c) && c >= line(dtype))
}

/// X', u and the sums, by so many blocks for the channels and for the tokens, in clusters of so many.
fn streams(
    call: &CheckedCall,
    size: &'static Size,
    ([blocks, ranges], cluster): ([usize; 2], u32),
    sums: &Sums,
) -> Launch {
    let kernel = Kernel::of("post_given_fwd", size, call.dtype);
    let tensor = |address, num_streams| {
        let dims = [call.tokens, num_streams, call.c];
        let box_dims = [kernel.tokens(), size.number as usize];
        Arg::BlockMaps(Tensor::new(address, call.dtype, dims, box_dims))
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
    args.extend([sums.columns, sums.squares].map(Arg::Pointer));
    args.extend([call.tokens, call.c].map(|size| Arg::I32(size as i32)));
    let tiles = call.tokens.div_ceil(kernel.tokens());
    Launch {
        cluster,
        ..kernel.launch([blocks, ranges.min(tiles), 1], args)
    }
}

/// The coefficients from these sums.
fn coefficients(call: &CheckedCall, sums: &Sums) -> Launch {
    let size = sizes::streams(call.n, true);
    let kernel = Kernel::of("given_coefficients", size, DType::F32);
    let mut args = [sums.columns, sums.squares].map(Arg::Pointer).to_vec();
    args.push(Arg::I32(sums.slices as i32));
    args.extend(["alpha", "bias"].map(|name| Arg::Pointer(call.operand_address(name))));
    let results = ["h_pre", "h_post", "h_res", "m", "r"];
    args.extend(results.map(|name| Arg::Pointer(call.result_address(name))));
    args.extend([call.tokens, call.c, call.columns].map(|size| Arg::I32(size as i32)));
    args.push(Arg::Settings(call.config.into()));
    kernel.launch([call.tokens.div_ceil(kernel.tokens()), 1, 1], args)
}

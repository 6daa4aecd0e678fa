//! The schedule of `post_pre_bwd` in one pass over the streams (post_pre_bwd_one_pass.cu), but for d_phi where that
//! has no room for it (phi_bwd.cu), and for the norm of the layer's input (post_pre_norm_bwd.cu).

use super::Geometry;
use super::pre_bwd::{self, Sums};
use crate::contract::check::CheckedCall;
use crate::gpu::device::Device;
use crate::gpu::kernel::Kernel;
use crate::gpu::launch::{Arg, Launch, Tensor};
use crate::gpu::schedules::{Schedule, norm, sizes};
use crate::gpu::tuning::NARROW;
use crate::gpu::workspace::{Part, Workspace};

/// The logits' gradients beforehand, then X' and its gradient in one pass, then the sums for the parameters.
pub const POST_PRE_BACKWARD: Schedule = Schedule {
    name: "one pass",
    plan,
};

fn plan(call: &CheckedCall, device: &Device, workspace: &mut dyn Workspace) -> Option<Vec<Launch>> {
    let function = "post_pre_bwd_one_pass";
    let geometry = pre_bwd::geometry(function, call, device)?;
    let kernel = Kernel::of(function, geometry.size, call.dtype);
    if !kernel.is_for(device) {
        return None;
    }
    let sums_phi = kernel.more("sums_phi") > 0;
    let sums = Sums::take(call, geometry, 0, workspace);
    // As many numbers a token as phi has columns, each in two halves of a float.
    let r_dm = if sums_phi {
        0
    } else {
        workspace.take(Part::per_token(call.columns))
    };
    let (d_u, mut launches) = norm_backward(call, workspace);
    let operand = |name| call.operand_address(name);
    let result = |name| call.result_address(name);
    let vector = |address| Arg::BlockMaps(geometry.tensor(call, kernel, address, 1));
    let streams = |address| {
        let tensor = geometry.tensor(call, kernel, address, call.n);
        [0, 1].map(|first| Arg::BlockMaps(tensor.every_second(first)))
    };
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
    args.push(Arg::Pointer(sums.d_z));
    args.extend(["d_h_post", "d_h_res"].map(|name| Arg::Pointer(result(name))));
    args.extend([
        Arg::Pointer(if sums_phi { sums.d_phi } else { r_dm }),
        Arg::Pointer(sums.gates),
        Arg::I32(call.tokens as i32),
        Arg::I32(call.c as i32),
        Arg::I32(i32::from(call.config.deferred)),
        Arg::Settings(call.config.into()),
    ]);
    let main = geometry.launch(call, device, kernel, args);
    let blocks = main.grid[0];
    launches.extend([pre_bwd::logits(call, &sums), main]);
    let num_sums = if sums_phi {
        blocks / geometry.cluster
    } else {
        let launch = phi(call, device, geometry, r_dm, sums.d_phi);
        let num_sums = launch.grid[1];
        launches.push(launch);
        num_sums
    };
    let rows = kernel.more("owner_warps") as u32 * blocks;
    let channels = pre_bwd::padded(call.c);
    launches.push(pre_bwd::sum_gradients(
        call,
        &sums,
        [num_sums, rows],
        channels,
    ));
    Some(launches)
}

/// The sums for d_phi, at `d_phi`, from r dm: a row of blocks for each of them.
fn phi(call: &CheckedCall, device: &Device, geometry: Geometry, r_dm: u64, d_phi: u64) -> Launch {
    let mut sizes = NARROW.iter();
    let size = sizes.find(|size| size.columns as usize == call.columns);
    let size = size.expect("a size for every geometry without the sums for d_phi");
    let kernel = Kernel::of("phi_bwd", size, call.dtype);
    let channels = size.number as usize;
    let operand = |name| call.operand_address(name);
    let tensor = |name, num_streams| {
        let dims = [call.tokens, num_streams, call.c];
        Arg::BlockMaps(Tensor::new(
            operand(name),
            call.dtype,
            dims,
            [kernel.tokens(), channels],
        ))
    };
    let slices = call.c.div_ceil(channels);
    // There is room for as many sums as clusters make.
    let most = kernel.more("blocks") * device.num_sms as usize / slices;
    let most = most.clamp(1, geometry.max_clusters());
    let num_sums = most.min(call.tokens.div_ceil(kernel.tokens()));
    let mut args = vec![tensor("x", call.n), tensor("y", 1)];
    args.extend(["h_post", "h_res"].map(|name| Arg::Pointer(operand(name))));
    args.extend([r_dm, d_phi].map(Arg::Pointer));
    args.extend([call.tokens, call.c].map(|size| Arg::I32(size as i32)));
    kernel.launch([slices, num_sums, 1], args)
}

/// Address of the cotangent of u, and the launches that make it of that of the normalised u: the operand and nothing
/// where there is no norm.
fn norm_backward(call: &CheckedCall, workspace: &mut dyn Workspace) -> (u64, Vec<Launch>) {
    if call.norm_width == 0 {
        return (call.operand_address("d_u"), vec![]);
    }
    let d_u = workspace.take(norm::d_u(call));
    let d_w = workspace.take(norm::sums(call, norm::max_blocks(call), call.c));
    let kernel = Kernel::of(
        "post_pre_norm_bwd",
        sizes::streams(call.n, true),
        call.dtype,
    );
    let threads = (call.c / kernel.more("channels")).next_multiple_of(32);
    let blocks = call.tokens.min(norm::max_blocks(call));
    let names = [
        "x",
        "y",
        "h_post",
        "h_res",
        "alpha",
        "bias",
        "m",
        "norm_scale",
        "rho",
        "u_norm",
        "d_u",
    ];
    let mut args = names
        .map(|name| Arg::Pointer(call.operand_address(name)))
        .to_vec();
    args.extend([
        Arg::Pointer(d_u),
        Arg::Pointer(d_w),
        Arg::I32(call.tokens as i32),
        Arg::I32(call.c as i32),
        Arg::I32(call.columns as i32),
        Arg::Settings(call.config.into()),
    ]);
    let main = Launch {
        block: threads as u32,
        ..kernel.launch([blocks, 1, 1], args)
    };
    (d_u, vec![main, norm::sum(call, d_w, [blocks, call.c])])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::contract::view::DType;
    use crate::gpu::device::MAX_CLUSTER;
    use crate::gpu::schedules::one_pass::tests::{EIGHT, of_width};
    use crate::gpu::schedules::one_pass::{COLUMNS, STREAMS};
    use crate::gpu::tuning::CHANNELS;

    const FUNCTION: &str = "post_pre_bwd_one_pass";

    /// Channels of a block and blocks of a cluster.
    fn geometry(c: usize, columns: usize) -> Option<(usize, usize)> {
        let found = of_width(FUNCTION, c, columns)?;
        Some((found.channels(), found.cluster as usize))
    }

    #[test]
    fn d_phi_is_summed_on_the_way_wherever_a_cluster_has_room_for_it() {
        assert_eq!(geometry(256, COLUMNS), None);
        for c in (256 + EIGHT..=4096).step_by(EIGHT) {
            let is_ten = (2305..=2560).contains(&c);
            let expected = if is_ten {
                (320, 8)
            } else {
                (256, c.div_ceil(256))
            };
            assert_eq!(geometry(c, COLUMNS), Some(expected), "{c}");
        }
        for (c, expected) in [
            (4160, (320, 13)),
            (5120, (320, 16)),
            (6144, (384, 16)),
            (7168, (448, 16)),
            (8192, (512, 16)),
        ] {
            assert_eq!(geometry(c, COLUMNS), Some(expected), "{c}");
        }
        assert_eq!(geometry(8200, COLUMNS), None);
    }

    #[test]
    fn columns_of_every_constraint_have_a_geometry() {
        for columns in [2 * STREAMS, COLUMNS, 32] {
            for c in (512 + EIGHT..=8192).step_by(EIGHT) {
                let (channels, cluster) = geometry(c, columns).unwrap();
                assert_eq!(cluster, c.div_ceil(channels), "{c} {columns}");
            }
            assert_eq!(geometry(8192 + EIGHT, columns), None);
        }
        // Sizes with phi in part in shared memory are for widths that no other takes.
        for (c, expected) in [(6144, (384, 16)), (6152, (512, 13)), (8192, (512, 16))] {
            assert_eq!(geometry(c, 32), Some(expected), "{c}");
        }
        // A size for every number of columns for which d_phi is another kernel's.
        for size in CHANNELS {
            for dtype in [DType::Bf16, DType::F16] {
                let leaves = Kernel::find(FUNCTION, size, dtype)
                    .is_some_and(|kernel| kernel.more("sums_phi") == 0);
                let mut narrow = NARROW
                    .iter()
                    .filter(|narrow| narrow.columns == size.columns);
                let has = narrow.any(|narrow| Kernel::find("phi_bwd", narrow, dtype).is_some());
                assert!(has || !leaves, "{size:?}");
            }
        }
    }

    #[test]
    fn float16_streams_have_the_geometries_of_bfloat16() {
        let of = |c, columns| {
            let found = Geometry::of_width(FUNCTION, DType::F16, [STREAMS, c, columns])?;
            Some((found.channels(), found.cluster as usize))
        };
        for c in (EIGHT..=8192 + EIGHT).step_by(EIGHT) {
            for columns in [2 * STREAMS, COLUMNS] {
                assert_eq!(of(c, columns), geometry(c, columns), "{c} {columns}");
            }
            assert_eq!(of(c, 32), None);
        }
    }

    #[test]
    fn two_streams_have_a_geometry() {
        let geometry = |c, columns| {
            let found = Geometry::of_width(FUNCTION, DType::Bf16, [2, c, columns])?;
            Some((found.channels(), found.cluster as usize))
        };
        for c in (512 + EIGHT..=8192).step_by(EIGHT) {
            assert_eq!(geometry(c, 8), Some((512, c.div_ceil(512))));
        }
        assert_eq!(geometry(512, 8), None);
        assert_eq!(geometry(8192 + EIGHT, 8), None);
        // Those of `identity` and `permutations`.
        assert_eq!(geometry(2048, 4), None);
        assert_eq!(geometry(2048, 6), None);
    }

    #[test]
    fn float32_streams_have_a_geometry() {
        for columns in [2 * STREAMS, COLUMNS] {
            let geometry = |c| {
                let found = Geometry::of_width(FUNCTION, DType::F32, [STREAMS, c, columns])?;
                Some((found.channels(), found.cluster as usize))
            };
            for c in (256 + EIGHT..=4096).step_by(EIGHT) {
                assert_eq!(geometry(c), Some((256, c.div_ceil(256))));
            }
            assert_eq!(geometry(256), None);
            assert_eq!(geometry(4096 + EIGHT), None);
        }
        assert_eq!(
            Geometry::of_width(FUNCTION, DType::F32, [2, 2048, 8]).map(|found| found.cluster),
            None
        );
    }

    #[test]
    fn clusters_have_every_size() {
        let all = (EIGHT..=8192).step_by(EIGHT);
        let sizes = all.filter_map(|c| geometry(c, COLUMNS).map(|(_, cluster)| cluster));
        let sizes: std::collections::BTreeSet<_> = sizes.collect();
        let but_ten = (2..=MAX_CLUSTER).filter(|cluster| *cluster != 10);
        assert!(sizes.into_iter().eq(but_ten));
    }
}

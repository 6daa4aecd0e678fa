//! The schedule of `pre_bwd` in one pass over the streams (pre_bwd_one_pass.cu), but for d_phi where that has no room
//! for its sums (two_pass/d_phi.cuh), and what post_pre's backward pass shares with it: its workspace, and the small
//! launches before and after.

use super::{Geometry, STREAMS};
use crate::contract::check::CheckedCall;
use crate::contract::view::DType;
use crate::gpu::device::{Device, MAX_CLUSTER, MAX_CLUSTER_BLOCKS};
use crate::gpu::kernel::Kernel;
use crate::gpu::launch::{Arg, Launch};
use crate::gpu::schedules::two_pass::projection::{self, Projection};
use crate::gpu::schedules::{DXIn, Schedule, norm, sizes};
use crate::gpu::workspace::{Part, Workspace};

/// The most iterations of Sinkhorn-Knopp whose record fits into shared memory.
const MAX_SINKHORN_ITERS: usize = 128;

/// The logits' gradients beforehand, then one pass over the streams, then the sums for the parameters. Where d_phi is
/// another kernel's that reads X again.
pub const PRE_BACKWARD: Schedule = Schedule {
    name: "one pass",
    plan: |call, device, workspace| {
        let d_x_in = DXIn::of(call, "d_x_in", "h_res");
        plan(call, device, workspace, call.operand_address("x"), d_x_in)
    },
};

/// The geometry of a backward call, where `function` takes it.
pub fn geometry(function: &'static str, call: &CheckedCall, device: &Device) -> Option<Geometry> {
    Geometry::of(function, call, device).filter(|_| has_records(call))
}

/// Whether what Sinkhorn-Knopp records for the gradients of the logits has room ([`logits`]).
pub fn has_records(call: &CheckedCall) -> bool {
    recorded_iters(call) <= MAX_SINKHORN_ITERS
}

/// Iterations of Sinkhorn-Knopp that a backward pass may want a record of. By the columns: the workspace of a call
/// follows from them and not from its constraint.
fn recorded_iters(call: &CheckedCall) -> usize {
    if call.columns == call.n * (call.n + 2) {
        call.config.sinkhorn_iters
    } else {
        0
    }
}

/// Channels of a stream in sums over tokens that are in memory (geometry.cuh).
pub fn padded(c: usize) -> usize {
    c.next_multiple_of(16)
}

/// Sums that the backward passes in one kernel keep in the workspace, with room for the sums of as many clusters as
/// any GPU runs at once.
pub struct Sums {
    /// Gradients of the logits of h_post, and of H_res where it has any.
    pub d_z: u64,
    /// Sums for alpha and bias, of up to three warps a block.
    pub gates: u64,
    /// Sums for phi, of a cluster each.
    pub d_phi: u64,
}

impl Sums {
    /// Room for the sums of a call, and for at least so many numbers of phi's.
    pub fn take(
        call: &CheckedCall,
        geometry: Geometry,
        least: usize,
        workspace: &mut dyn Workspace,
    ) -> Self {
        let gates = 3 * MAX_CLUSTER_BLOCKS as usize * (call.columns + 3);
        let d_phi = geometry.max_clusters() * call.n * padded(call.c) * call.columns;
        Self {
            d_z: workspace.take(Part::per_token(call.columns)),
            gates: workspace.take(Part::fixed(gates)),
            d_phi: workspace.take(Part::fixed(d_phi.max(least))),
        }
    }
}

/// The backward pass from the streams at `x` to d_x and the parameters.
pub fn plan(
    call: &CheckedCall,
    device: &Device,
    workspace: &mut dyn Workspace,
    x: u64,
    d_x_in: DXIn,
) -> Option<Vec<Launch>> {
    let geometry = geometry("pre_bwd_one_pass", call, device)?;
    let find = |function| Kernel::find(function, geometry.size, call.dtype);
    // Where no kernel takes the norm of the layer's input back, too, that is done beforehand.
    let with_norm = find("pre_norm_bwd_one_pass").filter(|_| call.norm_width > 0);
    let kernel = with_norm.or_else(|| find("pre_bwd_one_pass"))?;
    let geometry = with_owners(kernel, geometry, device)?;
    let sums_phi = kernel.more("sums_phi") > 0;
    let projection = Projection::of(call, device);
    let least = if sums_phi {
        0
    } else {
        projection.d_phi_partial().fixed
    };
    let sums = Sums::take(call, geometry, least, workspace);
    // For d_phi, as its kernel wants it.
    let [_, dm] = projection.fragments();
    let r_dm = if sums_phi { 0 } else { workspace.take(dm) };
    let operand = |name| call.operand_address(name);
    let (d_w, ([d_u, d_h_pre], mut launches)) = if with_norm.is_some() {
        let d_w = workspace.take(norm::sums(
            call,
            geometry.max_clusters(),
            geometry.all_channels(),
        ));
        (d_w, (["d_u", "d_h_pre"].map(operand), vec![]))
    } else {
        (0, norm::backward(call, workspace, x))
    };
    // The kernel itself takes h_post back where there is nothing else.
    let logits = (call.layout.num_res > 0).then(|| logits(call, &sums));
    let tensor =
        |address, num_streams| Arg::BlockMaps(geometry.tensor(call, kernel, address, num_streams));
    let mut args = vec![
        tensor(x, call.n),
        tensor(d_u, 1),
        tensor(d_x_in.address, call.n),
        tensor(call.result_address(call.kind.first_result()), call.n),
    ];
    args.extend(["phi", "alpha", "bias", "m", "r"].map(|name| Arg::Pointer(operand(name))));
    args.extend([
        Arg::Pointer(d_x_in.h_res.unwrap_or(0)),
        Arg::Pointer(d_h_pre),
        Arg::Pointer(logits.as_ref().map_or(operand("d_h_post"), |_| sums.d_z)),
        Arg::Pointer(if sums_phi { sums.d_phi } else { r_dm }),
        Arg::Pointer(sums.gates),
        Arg::I32(call.tokens as i32),
        Arg::I32(call.c as i32),
        Arg::I32(i32::from(d_x_in.h_res.is_some())),
        Arg::Settings(call.config.into()),
    ]);
    if with_norm.is_some() {
        args.extend(["norm_scale", "rho"].map(|name| Arg::Pointer(operand(name))));
        args.push(Arg::Pointer(d_w));
    }
    let main = geometry.launch(call, device, kernel, args);
    let blocks = main.grid[0];
    let clusters = blocks / geometry.cluster;
    let rows = kernel.more("owner_warps") as u32 * blocks;
    launches.extend(logits);
    launches.push(main);
    let (num_sums, channels) = if sums_phi {
        (clusters, padded(call.c))
    } else {
        // There is room for its sums where there would be for those of clusters (a test checks that).
        let launch = projection::d_phi_sums(call, device, projection, x, [0, r_dm], sums.d_phi);
        let num_sums = launch.grid[1];
        launches.push(launch);
        (num_sums, call.c)
    };
    launches.push(sum_gradients(call, &sums, [num_sums, rows], channels));
    launches.extend(
        with_norm.map(|_| norm::sum(call, d_w, [clusters as usize, geometry.all_channels()])),
    );
    Some(launches)
}

/// A geometry whose blocks have room for what all blocks send to the owner of a token, for all tokens that they own of
/// those under way. Where there is none, blocks without channels join the cluster: as many clusters of 13 blocks run at
/// once as of 16.
fn with_owners(kernel: Kernel, geometry: Geometry, device: &Device) -> Option<Geometry> {
    let under_way = kernel.tokens() * kernel.stages();
    let partials = |cluster: usize| under_way.div_ceil(cluster) * cluster;
    if partials(geometry.cluster as usize) <= kernel.more("partials") {
        return Some(geometry);
    }
    let cluster = MAX_CLUSTER as u32;
    let geometry = Geometry {
        cluster,
        ..geometry
    };
    device.num_clusters(cluster, 1).map(|_| geometry)
}

/// The gradients of the logits of h_post, and of H_res where it has any.
pub fn logits(call: &CheckedCall, sums: &Sums) -> Launch {
    let kernel = Kernel::of("logits_bwd", sizes::streams(call.n, true), DType::F32);
    let names = ["m", "alpha", "bias", "d_h_post", "d_h_res"];
    let mut args = names
        .map(|name| Arg::Pointer(call.operand_address(name)))
        .to_vec();
    args.extend([
        Arg::Pointer(sums.d_z),
        Arg::I32(call.tokens as i32),
        Arg::I32(call.columns as i32),
        Arg::Settings(call.config.into()),
    ]);
    let recorded = 2 * recorded_iters(call) * kernel.tokens() * call.n;
    Launch {
        shared_bytes: (recorded * size_of::<f32>()) as u32,
        ..kernel.launch([call.tokens.div_ceil(kernel.tokens()), 1, 1], args)
    }
}

/// The parameters' gradients from the sums of `clusters` for phi, in which streams have so many channels, and from `rows` for
/// the others.
pub fn sum_gradients(
    call: &CheckedCall,
    sums: &Sums,
    [clusters, rows]: [u32; 2],
    channels: usize,
) -> Launch {
    // The same for any number of streams.
    let kernel = Kernel::of("sum_gradients", sizes::streams(STREAMS, true), DType::F32);
    let size = call.n * call.c * call.columns / 4;
    kernel.launch(
        [size.div_ceil(kernel.threads()) + 1, 1, 1],
        vec![
            Arg::Pointer(sums.d_phi),
            Arg::Pointer(sums.gates),
            Arg::Pointer(call.result_address("d_phi")),
            Arg::Pointer(call.result_address("d_bias")),
            Arg::Pointer(call.result_address("d_alpha")),
            Arg::I32(clusters as i32),
            Arg::I32(rows as i32),
            Arg::I32(size as i32),
            Arg::I32((call.c * call.columns / 4) as i32),
            Arg::I32((channels * call.columns / 4) as i32),
            Arg::I32(call.columns as i32),
            Arg::I32(call.layout.num_gates() as i32),
        ],
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gpu::schedules::one_pass::COLUMNS;
    use crate::gpu::schedules::one_pass::tests::EIGHT;
    use crate::gpu::tuning::CHANNELS;

    /// Channels of a block and blocks of a cluster.
    fn geometry_of(dtype: DType, sizes: [usize; 3]) -> Option<(usize, usize)> {
        let found = Geometry::of_width("pre_bwd_one_pass", dtype, sizes)?;
        let kernel = Kernel::of("pre_bwd_one_pass", found.size, dtype);
        let found = with_owners(kernel, found, &Device::KINDS[1])?;
        Some((found.channels(), found.cluster as usize))
    }

    /// The same for four streams in bfloat16.
    fn geometry(c: usize, columns: usize) -> Option<(usize, usize)> {
        geometry_of(DType::Bf16, [STREAMS, c, columns])
    }

    #[test]
    fn float32_streams_have_a_geometry() {
        for columns in [2 * STREAMS, COLUMNS] {
            let geometry = |c| geometry_of(DType::F32, [STREAMS, c, columns]);
            for c in (256 + EIGHT..=4096).step_by(EIGHT) {
                assert_eq!(geometry(c), Some((256, c.div_ceil(256))));
            }
            assert_eq!(geometry(256), None);
            assert_eq!(geometry(4096 + EIGHT), None);
            assert_eq!(geometry(2048 + EIGHT / 2), None);
        }
    }

    #[test]
    fn float16_streams_have_a_geometry() {
        let geometry = |c, columns| geometry_of(DType::F16, [STREAMS, c, columns]);
        for c in (512 + EIGHT..=8192).step_by(EIGHT) {
            let (channels, cluster) = geometry(c, COLUMNS).unwrap();
            assert!(channels * cluster >= c, "{c}");
            assert_eq!(geometry(c, 8), Some((512, c.div_ceil(512))));
        }
        assert_eq!(geometry(512, 8), None);
        assert_eq!(geometry(256, COLUMNS), None);
        assert_eq!(geometry(1024, 32), None);
        // Those that tests on a GPU have (tests/test_cuda.py).
        for (c, expected) in [
            (576, (256, 3)),
            (1024, (256, 4)),
            (2624, (384, 7)),
            (4096, (256, 16)),
            (5440, (384, 15)),
            (7232, (512, 15)),
            (8192, (512, 16)),
        ] {
            assert_eq!(geometry(c, COLUMNS), Some(expected), "{c}");
        }
    }

    #[test]
    fn two_streams_have_a_geometry() {
        let geometry = |c, columns| geometry_of(DType::Bf16, [2, c, columns]);
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
    fn widths_of_every_constraint_have_a_geometry() {
        for (columns, widest) in [(2 * STREAMS, 8192), (COLUMNS, 8192), (32, 8192)] {
            for c in (256 + EIGHT..=widest).step_by(EIGHT) {
                let (channels, cluster) = geometry(c, columns).unwrap();
                assert!(channels * cluster >= c, "{c} {columns}");
            }
            assert_eq!(geometry(widest + EIGHT, columns), None);
        }
        // Those that tests on a GPU have (tests/test_cuda.py), with blocks of every size and with parts of them.
        for (columns, c, expected) in [
            (COLUMNS, 576, (320, 2)),
            (COLUMNS, 960, (256, 4)),
            (COLUMNS, 1088, (384, 3)),
            (COLUMNS, 1600, (256, 7)),
            (COLUMNS, 1856, (256, 8)),
            (COLUMNS, 1984, (256, 8)),
            (COLUMNS, 2624, (448, 6)),
            (COLUMNS, 3136, (448, 7)),
            (COLUMNS, 3648, (256, 15)),
            (COLUMNS, 4160, (320, 13)),
            (COLUMNS, 4224, (320, 14)),
            (COLUMNS, 5440, (384, 15)),
            // Blocks without channels: 14 and 15 of them would do.
            (COLUMNS, 6208, (448, 16)),
            (COLUMNS, 6656, (448, 16)),
            (COLUMNS, 7232, (512, 15)),
            (COLUMNS, 7872, (512, 16)),
            (8, 576, (384, 2)),
            (8, 1088, (384, 3)),
            (8, 1600, (512, 4)),
            (8, 2112, (512, 5)),
            (8, 2624, (384, 7)),
            (8, 4160, (512, 9)),
            (8, 6208, (512, 13)),
            (8, 6720, (512, 14)),
            (8, 7232, (512, 15)),
            (8, 8192, (512, 16)),
            (32, 704, (256, 3)),
            (32, 1344, (256, 6)),
            (32, 1664, (256, 7)),
            (32, 2112, (320, 7)),
            (32, 2624, (256, 11)),
            (32, 2944, (256, 12)),
            (32, 3136, (256, 13)),
            (32, 4544, (320, 15)),
            (32, 5120, (320, 16)),
            (32, 5184, (384, 14)),
            (32, 6080, (384, 16)),
            (32, 6464, (512, 13)),
            (32, 8192, (512, 16)),
        ] {
            assert_eq!(geometry(c, columns), Some(expected), "{c} {columns}");
        }
    }

    #[test]
    fn owners_have_room_for_what_all_blocks_send() {
        let dtypes = [DType::Bf16, DType::F16, DType::F32].into_iter();
        let all = dtypes.flat_map(|dtype| CHANNELS.iter().map(move |size| (size, dtype)));
        for (size, dtype) in all {
            let Some(kernel) = Kernel::find("pre_bwd_one_pass", size, dtype) else {
                continue;
            };
            for cluster in 1..=MAX_CLUSTER {
                let geometry = Geometry {
                    size,
                    cluster: cluster as u32,
                };
                let geometry = with_owners(kernel, geometry, &Device::KINDS[1]).unwrap();
                let blocks = geometry.cluster as usize;
                assert!(blocks >= cluster);
                let at_once = (kernel.tokens() * kernel.stages()).div_ceil(blocks) * blocks;
                assert!(at_once <= kernel.more("partials"), "{size:?} {cluster}");
            }
        }
    }
}

//! The schedules that read the streams once (one_pass.cuh), in clusters of blocks that divide the channels among them.

pub mod forward;
mod post_pre_bwd;
pub mod pre_bwd;

pub use forward::FORWARD;
pub use post_pre_bwd::POST_PRE_BACKWARD;
pub use pre_bwd::PRE_BACKWARD;

use crate::contract::check::CheckedCall;
use crate::contract::config::Constraint;
use crate::contract::view::DType;
use crate::gpu::device::{Device, MAX_CLUSTER, MAX_CLUSTER_BLOCKS};
use crate::gpu::kernel::Kernel;
use crate::gpu::launch::{Arg, Launch, Tensor};
use crate::gpu::schedules::sizes;
use crate::gpu::tuning::{CHANNELS, Size};

/// Streams of most of the kernels.
const STREAMS: usize = 4;

/// Columns of phi where H_res has a logit for each element: those that Sinkhorn-Knopp may be for.
#[cfg(test)]
const COLUMNS: usize = STREAMS * (STREAMS + 2);

/// Clusters of 1, 2 and so on blocks that run at once on an H200. Geometries are chosen for it, whatever the GPU: the
/// workspace, and the order of sums, follow from them.
const CLUSTERS_AT_ONCE: [u32; MAX_CLUSTER] =
    [132, 66, 39, 30, 22, 17, 15, 15, 9, 7, 7, 7, 7, 7, 7, 7];

/// The work of a block for each tile beside that for its channels, in bytes of streams.
const FIXED_WORK: usize = 800;

/// Numbers of phi that a block has room for beside all else: a word each, in whichever dtype the streams are.
const MOST_PHI: u32 = 4 * 448 * 24;

// The kernels tell constraints apart by their columns, and of those with n² columns take any but Birkhoff for `none`.
const _: () = assert!(
    Constraint::ALL.len() == 4,
    "the kernels of device/one_pass have to take a new constraint"
);

/// How a cluster of two blocks or more divides the channels among them. The last block may have less than the others: the copy
/// engine fills it up with zeros.
#[derive(Debug, Clone, Copy)]
pub struct Geometry {
    /// Channels of a stream that a block owns, as the kernels' size.
    size: &'static Size,
    /// Blocks of a cluster.
    cluster: u32,
}

impl Geometry {
    /// The geometry of a call, where `function` takes it on the GPU. The number of tokens has no say: a token's result
    /// must not depend on it.
    fn of(function: &'static str, call: &CheckedCall, device: &Device) -> Option<Self> {
        let geometry = Self::of_width(function, call.dtype, [call.n, call.c, call.columns])?;
        device.num_clusters(geometry.cluster, 1).map(|_| geometry)
    }

    /// The geometry of a kernel for n, C and columns of phi: that with the most tokens at once for their work.
    fn of_width(function: &'static str, dtype: DType, [n, c, columns]: [usize; 3]) -> Option<Self> {
        let all = CHANNELS.iter().filter_map(|size| {
            let kernel = Kernel::find(function, size, dtype)?;
            let cluster = c.div_ceil(size.number as usize);
            let takes = [size.streams, size.columns] == [n as u32, columns as u32]
                && sizes::is_aligned(c)
                && (2..=MAX_CLUSTER).contains(&cluster);
            let geometry = Self {
                size,
                cluster: cluster as u32,
            };
            takes.then_some((geometry, kernel))
        });
        let channel_bytes = n * dtype.num_bytes();
        all.min_by_key(|(geometry, kernel)| {
            (geometry.excess_phi(), geometry.work(*kernel, channel_bytes))
        })
        .map(|(geometry, _)| geometry)
    }

    /// Numbers of phi that have to lie elsewhere than in registers: a size with more of them is for widths that no
    /// other takes.
    fn excess_phi(self) -> u32 {
        (self.size.streams * self.size.number * self.size.columns).saturating_sub(MOST_PHI)
    }

    /// Work of a kernel for a token, where all clusters have some: larger for fewer clusters, for more channels of a
    /// block, which have so many bytes in all streams, and for a size that leaves some to another kernel.
    fn work(self, kernel: Kernel, channel_bytes: usize) -> usize {
        let percent = kernel.find_more("cost").unwrap_or(100);
        let at_once = CLUSTERS_AT_ONCE[self.cluster as usize - 1] as usize;
        (self.channels() * channel_bytes + FIXED_WORK) * 10 * percent / at_once
    }

    /// Channels of a stream that a block owns.
    fn channels(self) -> usize {
        self.size.number as usize
    }

    /// Channels that the blocks of a cluster have room for.
    fn all_channels(self) -> usize {
        self.channels() * self.cluster as usize
    }

    /// More clusters than this do not run at once on any GPU.
    fn max_clusters(self) -> usize {
        (MAX_CLUSTER_BLOCKS / self.cluster) as usize
    }

    /// Streams at an address, of which the kernel takes boxes of a tile.
    fn tensor(
        self,
        call: &CheckedCall,
        kernel: Kernel,
        address: u64,
        num_streams: usize,
    ) -> Tensor {
        let dims = [call.tokens, num_streams, call.c];
        Tensor::new(
            address,
            call.dtype,
            dims,
            [kernel.tokens(), self.channels()],
        )
    }

    /// The launch of a kernel whose clusters take tiles in turn.
    fn launch(self, call: &CheckedCall, device: &Device, kernel: Kernel, args: Vec<Arg>) -> Launch {
        let tiles = call.tokens.div_ceil(kernel.tokens());
        let clusters = device.num_clusters(self.cluster, tiles).unwrap_or(0);
        Launch {
            cluster: self.cluster,
            ..kernel.launch([(clusters * self.cluster) as usize, 1, 1], args)
        }
    }
}

#[cfg(test)]
pub mod tests {
    use super::*;
    use crate::gpu::device::CLUSTER_SHARED_BYTES;
    use crate::gpu::tuning::{FILES, Target};

    #[test]
    fn blocks_of_clusters_fit_and_have_a_multiprocessor_each() {
        let mut num = 0;
        let files = FILES.iter().filter(|file| file.target != Target::Every);
        for row in files.flat_map(|file| file.kernels) {
            if row.stages > 0 && row.sizes.iter().all(|size| CHANNELS.contains(size)) {
                let most = CLUSTER_SHARED_BYTES;
                assert!((most / 2..=most).contains(&row.shared_bytes), "{row:?}");
                num += 1;
            }
        }
        assert!(num > 20);
    }

    /// The geometry of four streams in bfloat16.
    pub fn of_width(function: &'static str, c: usize, columns: usize) -> Option<Geometry> {
        Geometry::of_width(function, DType::Bf16, [STREAMS, c, columns])
    }

    /// A number that C is a multiple of.
    pub const EIGHT: usize = 8;

    #[test]
    fn aligned_widths_have_a_geometry() {
        let of = |c, columns| {
            let found = of_width("pre_fwd_one_pass", c, columns)?;
            Some((found.channels(), found.cluster))
        };
        for (c, columns, geometry) in [
            (512, 24, (256, 2)),
            (768, 24, (384, 2)),
            (1000, 24, (256, 4)),
            (2560, 24, (320, 8)),
            (4096, 24, (256, 16)),
            (6144, 24, (384, 16)),
            (7168, 24, (448, 16)),
            (8192, 24, (512, 16)),
            (4096, 8, (512, 8)),
            (6144, 8, (384, 16)),
            (4096, 32, (256, 16)),
            (4608, 32, (384, 12)),
            (6144, 32, (384, 16)),
            (6208, 32, (512, 13)),
            (8192, 32, (512, 16)),
        ] {
            assert_eq!(of(c, columns), Some(geometry), "{c}, {columns}");
        }
        for c in (256 + EIGHT..=8192).step_by(EIGHT) {
            let (channels, cluster) = of(c, 24).unwrap();
            assert!((c..c + channels).contains(&(channels * cluster as usize)));
        }
        // A cluster of one would need other instructions.
        assert_eq!(of(256, 24), None);
        assert_eq!(of(4100, 24), None);
        assert_eq!(of(8200, 24), None);
        assert_eq!(of(8200, 32), None);
    }
}

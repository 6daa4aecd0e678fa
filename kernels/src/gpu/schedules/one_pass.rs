//! The schedules that read the streams once (one_pass.cuh), in clusters of blocks that divide the channels among them.

mod forward;
mod post_pre_bwd;
pub mod pre_bwd;

pub use forward::FORWARD;
pub use post_pre_bwd::POST_PRE_BACKWARD;
pub use pre_bwd::PRE_BACKWARD;

use crate::contract::check::CheckedCall;
use crate::contract::config::Constraint;
use crate::contract::view::DType;
use crate::gpu::device::{CLUSTER_SIZES, Device, MAX_CLUSTER_BLOCKS};
use crate::gpu::kernel::Kernel;
use crate::gpu::launch::{Arg, Launch, Tensor};
use crate::gpu::tuning::{CHANNELS, Size};

/// Streams, and columns of phi, that the kernels are written for.
const STREAMS: usize = 4;
const COLUMNS: usize = STREAMS * (STREAMS + 2);

/// How a cluster of blocks divides the channels among them.
#[derive(Debug, Clone, Copy)]
pub struct Geometry {
    /// Channels of a stream that a block owns, as the kernels' size.
    size: &'static Size,
    /// Blocks of a cluster.
    cluster: u32,
}

impl Geometry {
    /// The geometry of a call, where the kernels take it on the GPU. The number of tokens has no say: a token's result
    /// must not depend on it.
    fn of(call: &CheckedCall, device: &Device) -> Option<Self> {
        let is_known = matches!(
            call.config.constraint,
            Constraint::Birkhoff | Constraint::None
        );
        let fits = call.dtype == DType::Bf16 && call.n == STREAMS && call.columns == COLUMNS;
        let fits = fits && is_known;
        let geometry = Self::of_width(call.c).filter(|_| fits)?;
        device.num_clusters(geometry.cluster, 1).map(|_| geometry)
    }

    /// The geometry for C channels. All other widths take two passes over the streams.
    fn of_width(c: usize) -> Option<Self> {
        let mut all =
            (CHANNELS.iter()).flat_map(|size| CLUSTER_SIZES.map(|cluster| Self { size, cluster }));
        all.find(|geometry| geometry.channels() * geometry.cluster as usize == c)
    }

    /// Channels of a stream that a block owns.
    fn channels(self) -> usize {
        self.size.number as usize
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
        Tensor::new(address, dims, [kernel.tokens(), self.channels()])
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
mod tests {
    use super::*;
    use crate::gpu::device::CLUSTER_SHARED_BYTES;
    use crate::gpu::tuning::{FILES, Target};

    #[test]
    fn blocks_of_clusters_fit_and_have_a_multiprocessor_each() {
        let mut num = 0;
        let files = FILES.iter().filter(|file| file.target != Target::Every);
        for row in files.flat_map(|file| file.kernels) {
            if row.sizes.iter().all(|size| CHANNELS.contains(size)) {
                let most = CLUSTER_SHARED_BYTES;
                assert!((most / 2..=most).contains(&row.shared_bytes), "{row:?}");
                num += 1;
            }
        }
        assert!(num > 20);
    }

    #[test]
    fn widths_that_clusters_divide_have_a_geometry() {
        let of = |c| Geometry::of_width(c).map(|found| (found.channels(), found.cluster));
        assert_eq!(of(4096), Some((256, 16)));
        assert_eq!(of(2560), Some((320, 8)));
        assert_eq!(of(6144), Some((384, 16)));
        assert_eq!(of(7168), Some((448, 16)));
        assert_eq!(of(4160), None);
        assert_eq!(of(8192), None);
    }
}

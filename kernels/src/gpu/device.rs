//! The numbers of a GPU that plans depend on.

/// A GPU, as far as plans depend on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Device {
    /// CUDA's number of it.
    pub ordinal: i32,
    /// Compute capability, major and minor.
    pub capability: (u32, u32),
    /// Streaming multiprocessors.
    pub num_sms: u32,
    /// The most shared memory that a block may ask for.
    pub max_shared_bytes: u32,
    /// How many clusters of 1, 2 and so on blocks run at once whose blocks have a multiprocessor each; 0
    /// where this build has no kernels for clusters on the GPU.
    pub max_clusters: [u32; MAX_CLUSTER],
}

/// Shared memory that a block may ask for on every GPU that there are kernels for.
pub const SHARED_BYTES: usize = 98 << 10;

/// The same on those with kernels for clusters.
pub const CLUSTER_SHARED_BYTES: u32 = 227 << 10;

/// The most blocks of a grid in its second and third dimension.
pub const MAX_ROWS: usize = (1 << 16) - 1;

/// The most blocks of a cluster.
pub const MAX_CLUSTER: usize = 16;

/// More blocks than this do not run at once in clusters, whatever the GPU: workspaces have room for
/// partial sums of as many.
pub const MAX_CLUSTER_BLOCKS: u32 = 160;

impl Device {
    /// A GPU of a compute capability with all that one of its kind can have: on these the workspace is measured.
    const fn largest(capability: (u32, u32), max_clusters: u32) -> Self {
        Self {
            ordinal: 0,
            capability,
            num_sms: u32::MAX,
            max_shared_bytes: CLUSTER_SHARED_BYTES,
            max_clusters: [max_clusters; MAX_CLUSTER],
        }
    }

    /// A GPU of a compute capability, as far as plans choose kernels by it.
    pub fn of_capability(capability: (u32, u32)) -> Self {
        let (max_shared_bytes, max_clusters) = match capability {
            (8, 0 | 7) => (163 << 10, 0),
            (9, 0) | (10, _) => (CLUSTER_SHARED_BYTES, MAX_CLUSTER_BLOCKS),
            (11, _) => (CLUSTER_SHARED_BYTES, 0),
            _ => (99 << 10, 0),
        };
        Self {
            max_shared_bytes,
            ..Self::largest(capability, max_clusters)
        }
    }

    /// One of each kind that schedules tell apart.
    pub const KINDS: [Self; 3] = [
        Self::largest((8, 0), 0),
        Self::largest((9, 0), MAX_CLUSTER_BLOCKS),
        Self::largest((10, 0), MAX_CLUSTER_BLOCKS),
    ];

    /// Whether this build has kernels for clusters on the GPU, whose blocks have the memory.
    pub fn has_kernels_for_clusters(&self) -> bool {
        self.num_clusters(1, 1).is_some()
    }

    /// Clusters of `size` blocks for a kernel that works on `tiles` in turn: as many as run at once. None
    /// where there are no kernels for them, or no room for a single one.
    pub fn num_clusters(&self, size: u32, tiles: usize) -> Option<u32> {
        let at = (size as usize).checked_sub(1)?;
        let most = (*self.max_clusters.get(at)?).min(MAX_CLUSTER_BLOCKS / size);
        (most > 0 && self.max_shared_bytes >= CLUSTER_SHARED_BYTES)
            .then(|| most.min(tiles.try_into().unwrap_or(most)))
    }
}

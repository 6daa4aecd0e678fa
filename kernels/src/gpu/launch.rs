//! What is to be launched: a plan of a call is a list of these.

use crate::contract::check::CheckedCall;
use crate::contract::config::{Config, EpsMode, NormEpsMode, Order};
use crate::contract::layout::CoefficientLayout;
use crate::contract::limits::MAX_SINKHORN_ITERS;
use crate::contract::limits::MAX_STREAMS;
use crate::contract::table::Call;
use crate::contract::view::DType;

/// A kernel: the symbol `mhc_<function>_<size>_<dtype>` of a file in kernels/device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Kernel {
    /// Stem of the file.
    pub file: &'static str,
    /// Name in the file.
    pub function: &'static str,
    /// One of the sizes that build/main.rs lists for the file, such as `n4`.
    pub size: &'static str,
    /// Of the streams; float32 where the file has no other.
    pub dtype: DType,
}

impl Kernel {
    /// Its name in the compiled module.
    pub fn symbol(&self) -> String {
        let Self {
            function,
            size,
            dtype,
            ..
        } = self;
        format!("mhc_{function}_{size}_{}", dtype.short_name())
    }
}

/// One argument of a kernel. Signed, as in the kernels.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Arg {
    /// An address on the device; 0 where there is none.
    Pointer(u64),
    /// `int`
    I32(i32),
    /// `float`
    F32(f32),
    /// `long long`
    I64(i64),
    /// `Settings`
    Settings(Settings),
    /// `Layout`
    Layout(DeviceLayout),
    /// `TensorMap`
    TensorMap(Tensor),
}

impl Arg {
    /// Where its value lies; None where the driver has to make it first.
    pub(super) fn value(&self) -> Option<*const std::ffi::c_void> {
        Some(match self {
            Self::Pointer(value) => std::ptr::from_ref(value).cast(),
            Self::I32(value) => std::ptr::from_ref(value).cast(),
            Self::F32(value) => std::ptr::from_ref(value).cast(),
            Self::I64(value) => std::ptr::from_ref(value).cast(),
            Self::Settings(value) => std::ptr::from_ref(value).cast(),
            Self::Layout(value) => std::ptr::from_ref(value).cast(),
            Self::TensorMap(_) => return None,
        })
    }
}

/// What the copy engine takes a box at a time of: bfloat16 `[tokens, num_streams, hidden]`, or some of the
/// streams. A box lies in shared memory as `[stream, channels / 64, token, 64]`, with swizzled lines of
/// 128 bytes; in these coordinates one_pass.cuh names its start. `hidden` is a multiple of 64.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tensor {
    /// Where it starts.
    pub address: u64,
    /// Its tokens.
    pub tokens: usize,
    /// Streams of a token in memory; 1 for y and u.
    pub num_streams: usize,
    /// Channels of a stream.
    pub hidden: usize,
    /// The first stream that boxes may have.
    pub first_stream: usize,
    /// From there on every one, or every second.
    pub stream_step: usize,
    /// What a box has of tokens, of channels (a multiple of 64) and of streams.
    pub box_dims: [usize; 3],
}

impl Tensor {
    /// All streams of an operand or a result, or what is like one, in boxes with all of them.
    pub fn new(
        address: u64,
        [tokens, num_streams, hidden]: [usize; 3],
        box_dims: [usize; 2],
    ) -> Self {
        Self {
            address,
            tokens,
            num_streams,
            hidden,
            first_stream: 0,
            stream_step: 1,
            box_dims: [box_dims[0], box_dims[1], num_streams],
        }
    }

    /// The same with every second stream alone.
    pub fn every_second(self, first_stream: usize) -> Self {
        Self {
            first_stream,
            stream_step: 2,
            box_dims: [
                self.box_dims[0],
                self.box_dims[1],
                (self.num_streams - first_stream).div_ceil(2),
            ],
            ..self
        }
    }

    /// Where its first value lies.
    pub(super) fn start(&self) -> u64 {
        self.address + (self.first_stream * self.hidden * BF16_BYTES) as u64
    }

    /// Sizes in values, the fastest first; the strides in bytes of all but the fastest; and those of a box.
    pub(super) fn layout(&self) -> ([u64; 4], [u64; 3], [u32; 4]) {
        let streams = (self.num_streams - self.first_stream).div_ceil(self.stream_step);
        let sizes = [LINE, self.tokens, self.hidden / LINE, streams];
        let stream_bytes = self.hidden * BF16_BYTES;
        let strides = [
            self.num_streams * stream_bytes,
            LINE * BF16_BYTES,
            self.stream_step * stream_bytes,
        ];
        let [tokens, channels, streams] = self.box_dims;
        let box_sizes = [LINE, tokens, channels / LINE, streams];
        (
            sizes.map(|size| size as u64),
            strides.map(|stride| stride as u64),
            box_sizes.map(|size| size as u32),
        )
    }
}

/// Channels of one line of a box (`kBoxChannels` of one_pass.cuh), and bytes of one.
const LINE: usize = 64;
const BF16_BYTES: usize = 2;

/// A [`Config`] as the kernels read it: `Settings` of common.cuh.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Settings {
    constraint: i32,
    sinkhorn_iters: i32,
    sinkhorn_eps: f32,
    clamp: i32,
    row_first: i32,
    norm_eps: f32,
    norm_eps_outside: i32,
    pre_eps: f32,
    post_scale: f32,
}

impl From<&Config> for Settings {
    fn from(config: &Config) -> Self {
        Self {
            constraint: config.constraint as i32,
            sinkhorn_iters: config.sinkhorn_iters as i32,
            sinkhorn_eps: config.sinkhorn_eps as f32,
            clamp: i32::from(config.sinkhorn_eps_mode == EpsMode::Clamp),
            row_first: i32::from(config.order == Order::RowColumn),
            norm_eps: config.norm_eps as f32,
            norm_eps_outside: i32::from(config.norm_eps_mode == NormEpsMode::Outside),
            pre_eps: config.pre_eps as f32,
            post_scale: config.post_scale as f32,
        }
    }
}

/// A [`Layout`] as the kernels read it: `Layout` of common.cuh.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct DeviceLayout {
    n: i32,
    num_post: i32,
    num_res: i32,
}

impl From<CoefficientLayout> for DeviceLayout {
    fn from(layout: CoefficientLayout) -> Self {
        Self {
            n: layout.n as i32,
            num_post: layout.num_post as i32,
            num_res: layout.num_res as i32,
        }
    }
}

/// One kernel with its grid and arguments.
#[derive(Debug, Clone, PartialEq)]
pub struct Launch {
    /// Which.
    pub kernel: Kernel,
    /// Blocks; a launch without blocks is left out.
    pub grid: [u32; 3],
    /// Threads of a block.
    pub block: u32,
    /// Blocks of a cluster, of which `grid` has whole ones; 1 for none. See [`Device::num_clusters`].
    pub cluster: u32,
    /// Dynamic shared memory of a block.
    pub shared_bytes: u32,
    /// As the kernel declares them.
    pub args: Vec<Arg>,
}

/// What plans depend on besides the call.
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
    /// How many clusters run at once whose blocks have a multiprocessor each, for [`CLUSTER_SIZES`]; 0
    /// where this build has no kernels for clusters on the GPU.
    pub max_clusters: [u32; CLUSTER_SIZES.len()],
}

/// Shared memory that a block may ask for on every GPU that there are kernels for.
pub const SHARED_BYTES: usize = 98 << 10;

/// The same on those with kernels for clusters.
pub const CLUSTER_SHARED_BYTES: u32 = 227 << 10;

/// The most blocks of a grid in its second and third dimension.
pub const MAX_ROWS: usize = (1 << 16) - 1;

/// Blocks of a cluster.
pub const CLUSTER_SIZES: [u32; 4] = [2, 4, 8, 16];

/// More blocks than this do not run at once in clusters, whatever the GPU: workspaces have room for
/// partial sums of as many.
pub const MAX_CLUSTER_BLOCKS: u32 = 160;

impl Device {
    /// Clusters of `size` blocks for a kernel that works on `tiles` in turn: as many as run at once. None
    /// where there are no kernels for them, or no room for a single one.
    pub fn num_clusters(&self, size: u32, tiles: usize) -> Option<u32> {
        let at = CLUSTER_SIZES.iter().position(|known| *known == size)?;
        let most = self.max_clusters[at].min(MAX_CLUSTER_BLOCKS / size);
        (most > 0 && self.max_shared_bytes >= CLUSTER_SHARED_BYTES)
            .then(|| most.min(tiles.try_into().unwrap_or(most)))
    }
}

/// What the size of a workspace depends on besides the number of tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Problem {
    /// Which call.
    pub kind: Call,
    /// Of the streams.
    pub dtype: DType,
    /// Streams.
    pub n: usize,
    /// Channels of one stream.
    pub c: usize,
    /// Columns of phi.
    pub columns: usize,
    /// Of the configuration; 0 where there is none.
    pub sinkhorn_iters: usize,
    /// Values of norm_scale; 0 where there are none.
    pub norm_width: usize,
}

/// The most tokens, and values of a token: kernels count in 32 bits, and look ahead by less than the rest.
pub const MAX_COUNT: usize = 1 << 30;

impl Problem {
    /// Whether a call can have these sizes. Nothing that plans compute of them overflows then.
    pub fn is_possible(&self) -> bool {
        (1..=MAX_STREAMS).contains(&self.n)
            && (1..=MAX_COUNT / self.n).contains(&self.c)
            && self.columns <= CoefficientLayout::max_num(self.n)
            && self.sinkhorn_iters <= MAX_SINKHORN_ITERS
            && (self.norm_width == 0 || self.norm_width == self.c)
    }
}

impl CheckedCall<'_> {
    /// The call without its tokens and its memory.
    pub fn problem(&self) -> Problem {
        Problem {
            kind: self.kind,
            dtype: self.dtype,
            n: self.n,
            c: self.c,
            columns: self.columns,
            sinkhorn_iters: if self.kind.has_config() {
                self.config.sinkhorn_iters
            } else {
                0
            },
            norm_width: self.norm_width,
        }
    }
}

/// Floats of memory that a call needs besides its results. Linear in the number of tokens, so that it
/// can be a result of a program that is compiled for any number of them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Workspace {
    /// For each token.
    pub per_token: usize,
    /// For each call.
    pub fixed: usize,
}

impl Workspace {
    /// Room for both.
    pub fn and(self, other: Self) -> Self {
        Self {
            per_token: self.per_token + other.per_token,
            fixed: self.fixed + other.fixed,
        }
    }

    /// Room for either of two.
    pub fn max(self, other: Self) -> Self {
        Self {
            per_token: self.per_token.max(other.per_token),
            fixed: self.fixed.max(other.fixed),
        }
    }

    /// Its number of floats, for at most [`MAX_COUNT`] tokens.
    pub fn len(&self, tokens: usize) -> usize {
        self.per_token * tokens + self.fixed
    }
}

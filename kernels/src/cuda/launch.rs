//! What is to be launched: a plan of a call is a list of these.

use crate::coefficients::Layout;
use crate::config::{Config, Constraint, EpsMode, NormEpsMode, Order};
use crate::signature::{Call, Op};
use crate::view::{DType, View};

/// A kernel: the symbol `mhc_<function>_<size>_<dtype>` of a file in kernels/cuda.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Kernel {
    /// Stem of the file.
    pub file: &'static str,
    /// Name in the file.
    pub function: &'static str,
    /// One of the sizes that build.rs lists for the file, such as `n4`.
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
    /// `long long`
    I64(i64),
    /// `Settings`
    Settings(Settings),
    /// `Layout`
    Layout(DeviceLayout),
}

impl Arg {
    /// Of an operand or a result.
    pub fn of(view: &View) -> Self {
        Self::Pointer(view.data as u64)
    }

    /// Where its value lies.
    pub(super) fn value(&self) -> *const std::ffi::c_void {
        match self {
            Self::Pointer(value) => std::ptr::from_ref(value).cast(),
            Self::I32(value) => std::ptr::from_ref(value).cast(),
            Self::I64(value) => std::ptr::from_ref(value).cast(),
            Self::Settings(value) => std::ptr::from_ref(value).cast(),
            Self::Layout(value) => std::ptr::from_ref(value).cast(),
        }
    }
}

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
            constraint: match config.constraint {
                Constraint::Birkhoff => 0,
                Constraint::None => 1,
                Constraint::Identity => 2,
            },
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

impl From<Layout> for DeviceLayout {
    fn from(layout: Layout) -> Self {
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
}

/// What the size of a workspace depends on besides the number of tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Problem {
    /// Which call.
    pub op: Op,
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
}

impl Call<'_> {
    /// The call without its tokens and its memory.
    pub fn problem(&self) -> Problem {
        Problem {
            op: self.op,
            dtype: self.dtype,
            n: self.n,
            c: self.c,
            columns: self.columns,
            sinkhorn_iters: if self.op.has_config() {
                self.config.sinkhorn_iters
            } else {
                0
            },
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
    /// Its number of floats.
    pub fn len(&self, tokens: usize) -> usize {
        self.per_token * tokens + self.fixed
    }
}

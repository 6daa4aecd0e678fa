//! Launches of kernels: a plan of a call is a list of them.

use super::kernel::Kernel;
use crate::contract::config::{Config, Constraint, EpsMode, NormEpsMode, Order};
use crate::contract::layout::CoefficientLayout;
use crate::contract::view::DType;

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
    Layout(Layout),
    /// `TensorMap`
    TensorMap(Tensor),
    /// `BlockMaps`
    BlockMaps(Tensor),
}

impl Arg {
    /// Address of the argument's value; None where the driver has to make it first.
    pub(super) fn value(&self) -> Option<*const std::ffi::c_void> {
        Some(match self {
            Self::Pointer(value) => std::ptr::from_ref(value).cast(),
            Self::I32(value) => std::ptr::from_ref(value).cast(),
            Self::F32(value) => std::ptr::from_ref(value).cast(),
            Self::I64(value) => std::ptr::from_ref(value).cast(),
            Self::Settings(value) => std::ptr::from_ref(value).cast(),
            Self::Layout(value) => std::ptr::from_ref(value).cast(),
            Self::TensorMap(_) | Self::BlockMaps(_) => return None,
        })
    }
}

/// A tensor that the copy engine takes a box at a time of: `[tokens, num_streams, hidden]`, or some of the streams. A
/// box lies in shared memory as `[stream, line, token, channel of the line]`, with swizzled lines of 128 bytes; in
/// these coordinates one_pass.cuh names its start.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tensor {
    /// Address of its first value.
    pub address: u64,
    /// Dtype of its values.
    pub dtype: DType,
    /// Tokens.
    pub tokens: usize,
    /// Streams of a token in memory; 1 for y and u.
    pub num_streams: usize,
    /// Channels of a stream: a multiple of a line's for [`Arg::TensorMap`], of 8 for [`Arg::BlockMaps`].
    pub hidden: usize,
    /// The first stream that boxes may have.
    pub first_stream: usize,
    /// Step from there on: every stream, or every second.
    pub stream_step: usize,
    /// Tokens, channels (of whole lines) and streams of a box.
    pub box_dims: [usize; 3],
}

impl Tensor {
    /// All streams of an operand or a result, or what is like one, in boxes with all of them.
    pub fn new(
        address: u64,
        dtype: DType,
        [tokens, num_streams, hidden]: [usize; 3],
        box_dims: [usize; 2],
    ) -> Self {
        Self {
            address,
            dtype,
            tokens,
            num_streams,
            hidden,
            first_stream: 0,
            stream_step: 1,
            box_dims: [box_dims[0], box_dims[1], num_streams],
        }
    }

    /// A tensor of every second stream alone.
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

    /// Address of the first value that boxes may have.
    pub(super) fn start(&self) -> u64 {
        self.address + (self.first_stream * self.hidden * self.dtype.num_bytes()) as u64
    }

    /// The map of boxes of all streams, which have whole lines alone.
    pub(super) fn boxes(&self) -> Map {
        let streams = (self.num_streams - self.first_stream).div_ceil(self.stream_step);
        let line = line(self.dtype);
        let sizes = [line, self.tokens, self.hidden / line, streams];
        let stream_bytes = self.hidden * self.dtype.num_bytes();
        let strides = [
            self.num_streams * stream_bytes,
            LINE_BYTES,
            self.stream_step * stream_bytes,
        ];
        let [tokens, channels, streams] = self.box_dims;
        let box_sizes = [line, tokens, channels / line, streams];
        Map {
            dtype: self.dtype,
            start: self.start(),
            sizes: sizes.map(|size| size as u64),
            strides: strides.map(|stride| stride as u64),
            box_sizes: box_sizes.map(|size| size as u32),
        }
    }

    /// Maps of boxes of one stream for the last of the blocks that divide the channels: of its whole lines, where it has any,
    /// and of all that is behind them, where `hidden` ends within a line.
    pub(super) fn last_block(&self) -> [Option<Map>; 2] {
        let line = line(self.dtype);
        let (whole_lines, rest) = (self.hidden / line, self.hidden % line);
        if rest == 0 {
            return [None; 2];
        }
        let block_lines = self.box_dims[1] / line;
        let own_lines = whole_lines % block_lines;
        let of_lines = |map: Map, lines: usize| {
            let [line, tokens, ..] = map.box_sizes;
            Map {
                box_sizes: [line, tokens, lines as u32, 1],
                ..map
            }
        };
        let boxes = self.boxes();
        let [_, tokens, _, streams] = boxes.sizes;
        let behind = Map {
            start: boxes.start + (whole_lines * LINE_BYTES) as u64,
            sizes: [rest as u64, tokens, 1, streams],
            ..boxes
        };
        [
            (own_lines > 0).then(|| of_lines(boxes, own_lines)),
            Some(of_lines(behind, block_lines - own_lines)),
        ]
    }
}

/// A map of the copy engine, as the driver is told of it. Coordinates of a box are those of its first value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Map {
    pub(super) dtype: DType,
    /// Address of its first value.
    pub(super) start: u64,
    /// Sizes in values, the fastest first. What a box has behind them is zero, or is left out.
    pub(super) sizes: [u64; 4],
    /// Strides in bytes of all but the fastest.
    pub(super) strides: [u64; 3],
    /// Sizes of a box in values.
    pub(super) box_sizes: [u32; 4],
}

/// Bytes of one line of a box (`kRowBytes` of one_pass.cuh).
const LINE_BYTES: usize = 128;

/// Channels of one line of a box.
pub const fn line(dtype: DType) -> usize {
    LINE_BYTES / dtype.num_bytes()
}

/// Defines a struct of structs.rs, whose fields the compiler of CUDA C++ lays out alike: all are of 4 bytes.
macro_rules! device_struct {
    ($(#[$doc:meta])* $name:ident { $($(#[$field_doc:meta])* $field:ident: $type:ident,)+ }) => {
        $(#[$doc])*
        #[repr(C)]
        #[derive(Debug, Clone, Copy, PartialEq)]
        pub struct $name {
            $($(#[$field_doc])* $field: $type,)+
        }

        const _: () = assert!(
            size_of::<$name>() == size_of::<i32>() * [$(stringify!($field)),+].len()
        );
    };
}
include!("structs.rs");

impl From<&Config> for Settings {
    fn from(config: &Config) -> Self {
        Self {
            constraint: config.constraint,
            sinkhorn_iters: config.sinkhorn_iters as i32,
            sinkhorn_eps: config.sinkhorn_eps as f32,
            clamp: i32::from(config.sinkhorn_eps_mode == EpsMode::Clamp),
            row_first: i32::from(config.order == Order::RowColumn),
            norm_eps: config.norm_eps as f32,
            norm_eps_outside: i32::from(config.norm_eps_mode == NormEpsMode::Outside),
            pre_eps: config.pre_eps as f32,
            post_scale: config.post_scale as f32,
            post_eps: config.post_eps as f32,
        }
    }
}

impl From<CoefficientLayout> for Layout {
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
    /// The kernel.
    pub kernel: Kernel,
    /// Blocks; a launch without blocks is left out.
    pub grid: [u32; 3],
    /// Threads of a block.
    pub block: u32,
    /// Blocks of a cluster, of which `grid` has whole ones; 1 for none. See [`Device::num_clusters`].
    pub cluster: u32,
    /// Dynamic shared memory of a block.
    pub shared_bytes: u32,
    /// Arguments in the order in which the kernel declares them.
    pub args: Vec<Arg>,
}

//! The structs of frame.h, and the numbers of XLA that fill them.

use std::ffi::{c_char, c_void};

/// XLA_FFI_DataType: every one of version 0.1, by name.
pub mod dtype {
    /// float16
    pub const F16: i32 = 10;
    /// float32
    pub const F32: i32 = 11;
    /// float64
    pub const F64: i32 = 12;
    /// bfloat16
    pub const BF16: i32 = 16;
    /// int64
    pub const S64: i32 = 5;
    /// The largest of version 0.1; later versions add more.
    pub const LAST: i32 = 33;

    /// Size of an element: exact for the four that streams may have, and at most 16.
    pub fn num_bytes(dtype: i32) -> usize {
        match dtype {
            F16 | BF16 | 3 | 7 => 2,
            F32 | 4 | 8 => 4,
            F64 | S64 | 9 | 15 => 8,
            18 => 16,
            _ => 1,
        }
    }

    /// The name of those that streams may have, the number of all others.
    pub fn name(dtype: i32) -> String {
        match dtype {
            F16 => "float16".into(),
            F32 => "float32".into(),
            F64 => "float64".into(),
            BF16 => "bfloat16".into(),
            other => format!("type {other}"),
        }
    }
}

/// XLA_FFI_ArgType_BUFFER and XLA_FFI_RetType_BUFFER.
pub const BUFFER: i32 = 1;

/// XLA_FFI_AttrType.
pub mod attribute {
    /// Numbers of one dtype.
    pub const ARRAY: i32 = 1;
    /// Attributes by name.
    pub const DICTIONARY: i32 = 2;
    /// A number.
    pub const SCALAR: i32 = 3;
    /// Characters.
    pub const STRING: i32 = 4;
}

/// XLA_FFI_Error_Code_INVALID_ARGUMENT
pub const INVALID_ARGUMENT: i32 = 3;

/// An operand or a result.
#[repr(C)]
pub struct FrameBuffer {
    /// [`BUFFER`], or what is none.
    pub kind: i32,
    /// Element type.
    pub dtype: i32,
    /// Number of dimensions.
    pub rank: i64,
    /// The dimensions.
    pub dims: *const i64,
    /// The first element.
    pub data: *mut u8,
}

/// An attribute.
#[repr(C)]
pub struct FrameAttribute {
    /// Characters of its name.
    pub name: *const u8,
    /// Number of bytes of the name.
    pub name_size: usize,
    /// Kind, one of [`attribute`].
    pub kind: i32,
    /// Element type of a scalar or an array.
    pub dtype: i32,
    /// A number, characters or numbers.
    pub value: *const c_void,
    /// How many of them.
    pub size: usize,
}

/// A task of the handler.
pub type FrameTask = extern "C" fn(*mut c_void);

/// The threads that XLA lends.
#[repr(C)]
pub struct FramePool {
    /// How many it says there are.
    pub num_threads: i64,
    /// Takes a task; none: it runs at once.
    pub schedule: Option<extern "C" fn(*mut c_void, FrameTask, *mut c_void)>,
    /// The first argument of `schedule`.
    pub context: *mut c_void,
}

/// A call.
#[repr(C)]
pub struct FrameCall {
    /// Address of the handler.
    pub handler: usize,
    /// Operands.
    pub args: *const FrameBuffer,
    /// Number of operands.
    pub num_args: usize,
    /// Results.
    pub rets: *const FrameBuffer,
    /// Number of results.
    pub num_rets: usize,
    /// Attributes, sorted by name.
    pub attributes: *const FrameAttribute,
    /// Number of attributes.
    pub num_attributes: usize,
    /// Threads.
    pub pool: *const FramePool,
    /// Room for an error's message.
    pub message: *mut c_char,
    /// Size of that room.
    pub message_size: usize,
}

unsafe extern "C" {
    /// Calls the handler: 0, or the code of its error.
    pub fn jax_mhc_call_frame(call: *const FrameCall) -> i32;
}

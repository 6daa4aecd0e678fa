//! A frame: everything that decides a call, as plain data.

use std::fmt;

use crate::call::{BUFFER, attribute, dtype};
use crate::library::Op;

/// An operand or a result.
#[derive(Debug, Clone)]
pub struct Buffer {
    /// Name in the table of calls, or a description.
    pub name: String,
    /// XLA's number of what it is.
    pub kind: i32,
    /// XLA's number of its element type.
    pub dtype: i32,
    /// Dimensions.
    pub dims: Vec<i64>,
    /// Place of the buffer.
    pub place: Place,
}

/// Place of a buffer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// Slot of its own, which the buffer ends with or begins with, and so many bytes off.
    Own {
        /// Whether the buffer ends where the slot ends.
        at_end: bool,
        /// Bytes, towards the inside of the slot.
        shift: usize,
    },
    /// Memory of an operand, so many bytes into it.
    Operand {
        /// Index of the buffer.
        index: usize,
        /// Bytes.
        offset: usize,
    },
    /// Memory of another result.
    Result {
        /// Index of the buffer.
        index: usize,
    },
    /// At this address, where nothing lies.
    Nowhere(usize),
}

impl Buffer {
    /// A buffer of a slot.
    pub fn new(name: &str, dtype: i32, dims: Vec<i64>, at_end: bool) -> Self {
        Self {
            name: name.into(),
            kind: BUFFER,
            dtype,
            dims,
            place: Place::Own { at_end, shift: 0 },
        }
    }

    /// Number of bytes, if all of the dimensions are possible and an address can count it.
    pub fn num_bytes(&self) -> Option<usize> {
        let mut num_bytes = dtype::num_bytes(self.dtype);
        for dim in &self.dims {
            num_bytes = num_bytes.checked_mul(usize::try_from(*dim).ok()?)?;
        }
        isize::try_from(num_bytes).is_ok().then_some(num_bytes)
    }
}

/// An attribute.
#[derive(Debug, Clone)]
pub struct Attribute {
    /// Name.
    pub name: String,
    /// Value.
    pub value: Attr,
}

/// The value of an attribute.
#[derive(Debug, Clone, PartialEq)]
pub enum Attr {
    /// A float64.
    Float(f64),
    /// An int64.
    Int(i64),
    /// Characters, of any encoding.
    Text(Vec<u8>),
    /// A scalar of another type: XLA's number of the type, and the bits.
    Scalar(i32, u64),
    /// Numbers of a type.
    Array(i32, [u64; 2]),
    /// Neither of them, by XLA's number.
    Kind(i32),
}

impl Attr {
    /// XLA's number of what it is.
    pub fn kind(&self) -> i32 {
        match self {
            Attr::Float(_) | Attr::Int(_) | Attr::Scalar(..) => attribute::SCALAR,
            Attr::Text(_) => attribute::STRING,
            Attr::Array(..) => attribute::ARRAY,
            Attr::Kind(kind) => *kind,
        }
    }
}

/// Kinds of values that operands hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Style {
    /// Numbers from -2 to 2.
    Ordinary,
    /// Numbers whose squares overflow.
    Large,
    /// Numbers below the smallest normal one.
    Subnormal,
    /// Zeros of both signs.
    Zero,
    /// Ordinary ones, and NaN.
    WithNan,
    /// Ordinary ones, and infinities.
    WithInf,
}

/// When the tasks of a call run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum When {
    /// Place where they are scheduled.
    AtOnce,
    /// On threads, while the call runs.
    Concurrently,
    /// After the call has returned.
    Afterwards,
}

/// The pool that a call is lent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Schedule {
    /// How many threads it says it has.
    pub num_threads: i64,
    /// When tasks run.
    pub when: When,
}

/// A call of a handler.
#[derive(Debug, Clone)]
pub struct Frame {
    /// Index into the table of calls.
    pub op: usize,
    /// Operands.
    pub args: Vec<Buffer>,
    /// Results.
    pub rets: Vec<Buffer>,
    /// Attributes by their names.
    pub attributes: Vec<Attribute>,
    /// Kind of values that operands hold.
    pub style: Style,
    /// Threads.
    pub schedule: Schedule,
    /// Names of the changes that were made to a valid frame.
    pub changes: Vec<&'static str>,
}

/// A frame for a person to read.
pub struct Printed<'a>(pub &'a Frame, pub &'a [Op]);

impl fmt::Display for Printed<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self(frame, ops) = self;
        let Schedule { num_threads, when } = frame.schedule;
        writeln!(f, "{}", ops[frame.op].name)?;
        writeln!(f, "  changes: {:?}", frame.changes)?;
        writeln!(
            f,
            "  values: {:?}; threads: {num_threads}, {when:?}",
            frame.style
        )?;
        for (role, buffers) in [("operand", &frame.args), ("result", &frame.rets)] {
            for Buffer {
                name,
                kind,
                dtype,
                dims,
                place,
            } in buffers
            {
                write!(
                    f,
                    "  {role} {name}: {}{dims:?}, {place:?}",
                    dtype::name(*dtype)
                )?;
                if *kind == BUFFER {
                    writeln!(f)?;
                } else {
                    writeln!(f, ", of kind {kind}")?;
                }
            }
        }
        for Attribute { name, value } in &frame.attributes {
            match value {
                Attr::Text(text) if text.len() > 60 => {
                    writeln!(f, "  attribute {name:?}: {} characters", text.len())?;
                }
                Attr::Text(text) => {
                    let text = String::from_utf8_lossy(text);
                    writeln!(f, "  attribute {name:?}: {text:?}")?;
                }
                other => writeln!(f, "  attribute {name:?}: {other:?}")?,
            }
        }
        Ok(())
    }
}

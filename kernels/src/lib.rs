//! What jax-mhc computes: kernels for the CPU and for CUDA, the plain description of a call, and its
//! checks.
//!
//! [`cpu`] runs a call on CPUs and [`gpu`] on NVIDIA GPUs. They take views of memory and know nothing of
//! XLA or JAX.

mod contract;
pub mod cpu;
pub mod gpu;

pub use contract::config::{AttributeValue, Config, Constraint, EpsMode, NormEpsMode, Order};
pub use contract::limits;
pub use contract::table::{
    Attribute, Call, Description, Dim, Group, Precision, Setting, TARGET_VERSION, Value,
};
pub use contract::view::{DType, View};

/// Why a call did not run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Error {
    /// It is none of the calls of the table: op, argument, expected, got.
    Refused(String),
    /// The device cannot run it: op, what was tried, the device's error.
    Device(String),
    /// There is no memory for it: op, how much was wanted, what to do.
    Exhausted(String),
}

impl std::fmt::Display for Error {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Refused(message) | Self::Device(message) | Self::Exhausted(message) => {
                f.write_str(message)
            }
        }
    }
}

impl std::error::Error for Error {}

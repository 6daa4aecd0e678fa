//! What jax-mhc computes: kernels for the CPU and for CUDA, the plain description of a call, and its
//! checks.
//!
//! [`call`] runs a call on the CPU and [`cuda`] on a GPU. They take views of memory and know nothing of
//! XLA or JAX.

mod call;
mod coefficients;
mod collapse;
mod config;
pub mod cuda;
mod head;
mod pages;
mod parallel;
mod permutations;
mod plan;
mod post;
mod pre;
mod projection;
mod scratch;
mod seam;
mod signature;
mod simd;
mod sinkhorn;
mod stream;
mod sync;
mod table;
#[cfg(test)]
mod tests;
mod view;

pub use call::call;
pub use config::{Config, Constraint, EpsMode, NormEpsMode, Order};
pub use parallel::{Pool, Serial, Task};
pub use signature::Op;
pub use simd::instruction_set;
pub use table::{Dim, Precision, Row, Setting, Value};
pub use view::{DType, View};

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

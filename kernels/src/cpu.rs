//! The calls on CPUs.

mod chunks;
mod coefficients;
mod collapse;
mod head;
mod memory;
mod pages;
mod parallel;
mod permutations;
mod plan;
mod post;
mod post_pre;
mod pre;
mod projection;
mod run;
mod scratch;
mod simd;
mod sinkhorn;
mod stream;
mod sync;
#[cfg(test)]
mod tests;

pub use parallel::{Pool, Serial, Task};
pub use run::run;
pub use simd::instruction_set;

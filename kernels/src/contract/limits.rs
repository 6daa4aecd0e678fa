//! The bounds of sizes and settings, for every device. The shared library describes them to Python.

/// The most streams.
pub const MAX_STREAMS: usize = 16;

/// The most streams of which permutations are averaged: n! columns of phi.
pub const MAX_PERMUTED: usize = 4;

/// The most Sinkhorn iterations: the backward pass holds the matrices of all of them.
pub const MAX_SINKHORN_ITERS: usize = 10_000;

// The constraints, a row each, for two macros of this name: one makes the enum of Rust (config.rs), the other that of
// CUDA C++ (kernels/build). A row has the number that kernels know the constraint by, the word of `MHCConfig`, the
// number of columns of phi for H_res of n streams, and the most streams.
constraints! {
    /// Doubly stochastic matrices, by Sinkhorn-Knopp.
    Birkhoff = 0, "birkhoff", |n| n * n, MAX_STREAMS;
    /// Any matrix: H_res = z_res (unconstrained hyper-connections).
    None = 1, "none", |n| n * n, MAX_STREAMS;
    /// H_res = I; no coefficients for it.
    Identity = 2, "identity", |_| 0, MAX_STREAMS;
    /// Weighted means of permutation matrices.
    Permutations = 3, "permutations", factorial, MAX_PERMUTED;
}

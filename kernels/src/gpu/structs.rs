// The structs that kernels take as arguments, for two macros of this name: one makes the struct of Rust (launch.rs),
// the other that of CUDA C++ (kernels/build).
device_struct! {
    /// A [`Config`] as the kernels read it.
    Settings {
        /// The set that H_res is kept on.
        constraint: Constraint,
        /// Iterations of Sinkhorn-Knopp.
        sinkhorn_iters: i32,
        /// Term in the divisions of Sinkhorn-Knopp.
        sinkhorn_eps: f32,
        /// 1 for divisions by max(sum, eps), 0 for those by sum + eps.
        clamp: i32,
        /// 1 where iterations begin with rows, 0 where they begin with columns.
        row_first: i32,
        /// Term in r.
        norm_eps: f32,
        /// 1 where that is added to the root, 0 where it is added under it.
        norm_eps_outside: i32,
        /// Term in h_pre.
        pre_eps: f32,
        /// Factor of h_post.
        post_scale: f32,
        /// Term in h_post.
        post_eps: f32,
    }
}
device_struct! {
    /// A [`CoefficientLayout`] as the kernels read it.
    Layout {
        /// Streams.
        n: i32,
        /// Columns of h_post.
        num_post: i32,
        /// Columns of H_res.
        num_res: i32,
    }
}

//! The compiled kernels: a row each. The build hands it to the compiler, which asserts what follows from it, and a
//! plan takes threads and memory of a launch from it.
//!
//! A compiled size is a [`Size`] in the rows of the kernels that have it. In CUDA C++ a row is `tuning_<function>`,
//! with a member for each number.

/// A file of kernels/device, compiled for every size of its kernels, every dtype and every architecture of its target.
pub struct File {
    /// Path in kernels/device without its ending.
    pub path: &'static str,
    /// Dtypes of the streams, or of the numbers where no kernel reads streams.
    pub dtypes: &'static [&'static str],
    /// Architectures.
    pub target: Target,
    /// Names of what [`Tuning::more`] has.
    pub more: &'static [&'static str],
    /// Kernels, but for their variants `<function>_unaligned`, which are tuned alike.
    pub kernels: &'static [Tuning],
}

/// Architectures that a file is compiled for, of those that a build is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Target {
    /// All architectures.
    Every,
    /// Architectures with clusters of blocks and registers that warps hand to each other.
    Clusters,
    /// Compute capability 9.0 alone: on later chips the kernel would spill registers.
    Hopper,
}

/// A size that kernels have code for.
#[derive(Debug, PartialEq, Eq, Hash)]
pub struct Size {
    /// Part of symbols, such as `n4`.
    pub name: &'static str,
    /// Streams, octets of phi's columns, or channels of a stream that a block owns (`SIZE`).
    pub number: u32,
    /// Whether `number` is the size itself and not a bound (`EXACT`).
    pub is_exact: bool,
}

/// A kernel of a file in some sizes.
#[derive(Debug, PartialEq, Eq, Hash)]
pub struct Tuning {
    /// Name in the file.
    pub function: &'static str,
    /// Sizes that are tuned alike.
    pub sizes: &'static [Size],
    /// Tokens of a tile, or of a block without tiles; 0 where that follows from the call.
    pub tokens: u32,
    /// Buffers for tiles; 0 where tiles are not buffered.
    pub stages: u32,
    /// Threads of a block, at most.
    pub threads: u32,
    /// Dynamic shared memory of a block; 0 where that follows from the call.
    pub shared_bytes: u32,
    /// Numbers of some kernels, named by [`File::more`].
    pub more: &'static [u32],
}

const fn exact(name: &'static str, number: u32) -> Size {
    Size {
        name,
        number,
        is_exact: true,
    }
}

const fn bound(number: u32) -> Size {
    Size {
        name: "any",
        number,
        is_exact: false,
    }
}

const fn row(
    function: &'static str,
    sizes: &'static [Size],
    [tokens, stages, threads, shared_bytes]: [u32; 4],
    more: &'static [u32],
) -> Tuning {
    Tuning {
        function,
        sizes,
        tokens,
        stages,
        threads,
        shared_bytes,
        more,
    }
}

/// Streams.
pub const STREAMS: &[Size] = &[exact("n2", 2), N4, exact("n8", 8), bound(16)];
const N4: Size = exact("n4", 4);

/// Columns of phi, in groups of 8.
pub const OCTETS: &[Size] = &[K8, K24, K32, K80, bound(12)];
const K8: Size = exact("k8", 1);
const K24: Size = exact("k24", 3);
const K32: Size = exact("k32", 4);
const K80: Size = exact("k80", 10);

/// Channels of a stream that a block of a cluster owns.
pub const CHANNELS: &[Size] = &[W256, W320, W384, W448];
const W256: Size = exact("w256", 256);
const W320: Size = exact("w320", 320);
const W384: Size = exact("w384", 384);
const W448: Size = exact("w448", 448);

/// Channels of a block without a cluster.
pub const W128: Size = exact("w128", 128);

const ALL: &[&str] = &["bf16", "f16", "f32"];
const BF16: &[&str] = &["bf16"];
const F32: &[&str] = &["f32"];

/// Every compiled kernel.
#[rustfmt::skip]
pub const FILES: &[File] = &[
    File { path: "sinkhorn", dtypes: F32, target: Target::Every, more: &[], kernels: &[
        row("sinkhorn_fwd", STREAMS, [0, 0, 128, 0], &[]),
        row("sinkhorn_bwd", STREAMS, [0, 0, 128, 0], &[]),
    ] },
    File { path: "post", dtypes: ALL, target: Target::Every, more: &[], kernels: &[
        row("post_fwd", STREAMS, [0, 0, 256, 0], &[]),
        row("mix",      STREAMS, [0, 0, 256, 0], &[]),
        row("post_bwd", STREAMS, [1, 0, 128, 0], &[]),
    ] },
    File { path: "collapse", dtypes: ALL, target: Target::Every, more: &[], kernels: &[
        row("collapse_fwd", STREAMS, [0, 0, 256, 0], &[]),
        row("collapse_bwd", STREAMS, [1, 0, 128, 0], &[]),
    ] },
    File { path: "two_pass/pre", dtypes: ALL, target: Target::Every, more: &[], kernels: &[
        row("pre_fwd",   STREAMS, [8, 0, 288, 0], &[]),
        row("pre_bwd",   STREAMS, [8, 0, 288, 0], &[]),
        row("sum_gates", STREAMS, [0, 0,  32, 0], &[]),
    ] },
    // `channels` are those of a block.
    File { path: "two_pass/norm", dtypes: ALL, target: Target::Every, more: &["channels"], kernels: &[
        row("norm_fwd",       STREAMS, [1, 0, 256, 0], &[0]),
        row("norm_bwd",       STREAMS, [1, 0, 256, 0], &[0]),
        row("sum_norm_scale", STREAMS, [0, 0, 256, 0], &[32]),
    ] },
    // `channels` and `octets` are those of a warp. `streams` are what warps that mix them expect; 0 for any number.
    File { path: "two_pass/projection", dtypes: ALL, target: Target::Every, more: &["channels", "octets", "streams"], kernels: &[
        row("project",             OCTETS,       [16, 0, 256, 0], &[ 0, 0, 0]),
        row("project_back",        OCTETS,       [16, 0, 256, 0], &[64, 0, 0]),
        row("project_back_mixing", &[K8],        [16, 0, 256, 0], &[64, 0, 2]),
        row("project_back_mixing", &[K24, K32],  [16, 0, 256, 0], &[64, 0, 4]),
        row("project_back_mixing", &[K80],       [16, 0, 256, 0], &[64, 0, 8]),
        row("project_back_mixing", &[bound(12)], [16, 0, 256, 0], &[64, 0, 0]),
        row("d_phi",               OCTETS,       [16, 0, 256, 0], &[64, 5, 0]),
        row("sum_d_phi",           OCTETS,       [ 0, 0, 256, 0], &[ 0, 0, 0]),
    ] },
    // Tiles of 16 tokens halve the exchange, where there are registers for two accumulators and each tile is read and
    // projected at once. Stages are as many as shared memory holds. `fragments` of phi lie in shared memory, and
    // registers are such that nothing spills. Of what these leave open it is what was fastest on an H200.
    File { path: "one_pass/one_pass_fwd", dtypes: BF16, target: Target::Clusters,
           more: &["fragments", "project_registers", "apply_registers", "other_registers"], kernels: &[
        row("pre_fwd_one_pass",           &[W256], [16, 5, 512, 205_824], &[0, 176,  88, 72]),
        row("pre_fwd_one_pass",           &[W320], [ 8, 8, 512, 196_608], &[0, 168, 104, 72]),
        row("pre_fwd_one_pass",           &[W384], [ 8, 7, 512, 202_752], &[0, 200,  56, 56]),
        row("pre_fwd_one_pass",           &[W448], [ 8, 6, 512, 200_704], &[0, 208,  40, 56]),
        row("pre_norm_fwd_one_pass",      &[W256], [16, 5, 512, 218_112], &[0, 176,  88, 72]),
        row("pre_norm_fwd_one_pass",      &[W320], [ 8, 8, 512, 205_824], &[0, 176,  88, 72]),
        row("pre_norm_fwd_one_pass",      &[W384], [ 8, 7, 512, 211_968], &[0, 200,  56, 56]),
        row("pre_norm_fwd_one_pass",      &[W448], [ 8, 6, 512, 222_208], &[3, 208,  40, 56]),
        row("post_pre_fwd_one_pass",      &[W256], [ 8, 8, 512, 201_728], &[0, 168, 104, 72]),
        row("post_pre_fwd_one_pass",      &[W320], [ 8, 7, 512, 215_040], &[0, 192,  72, 56]),
        row("post_pre_fwd_one_pass",      &[W384], [ 8, 6, 512, 217_088], &[0, 208,  48, 48]),
        row("post_pre_fwd_one_pass",      &[W448], [ 8, 5, 512, 230_400], &[5, 208,  48, 48]),
        row("post_pre_norm_fwd_one_pass", &[W256], [ 8, 8, 512, 210_944], &[0, 176,  88, 72]),
        row("post_pre_norm_fwd_one_pass", &[W320], [ 8, 7, 512, 223_232], &[0, 208,  48, 48]),
        row("post_pre_norm_fwd_one_pass", &[W384], [ 8, 6, 512, 230_400], &[1, 208,  48, 48]),
        row("post_pre_norm_fwd_one_pass", &[W448], [ 8, 5, 512, 230_400], &[3, 208,  48, 48]),
    ] },
    // Stages are for X and d_u, `d_x_in_slots` for d_x_in. A main warp has `held` fragments of phi in registers,
    // `sums` of its sums for d_phi in shared memory, and, where `holds_d_w` is 1, its sums for d_norm_scale in
    // registers. With 384 channels and a norm the kernel would spill.
    File { path: "one_pass/pre_bwd_one_pass", dtypes: BF16, target: Target::Clusters,
           more: &["d_x_in_slots", "held", "dot_warps", "sums", "holds_d_w"], kernels: &[
        row("pre_bwd_one_pass",      &[W256], [8, 5, 512, 220_568], &[5, 4, 4, 0, 1]),
        row("pre_bwd_one_pass",      &[W320], [8, 3, 384, 206_904], &[3, 0, 2, 0, 1]),
        row("pre_bwd_one_pass",      &[W384], [8, 3, 384, 222_256], &[2, 0, 2, 0, 0]),
        row("pre_bwd_one_pass",      &[W448], [8, 2, 384, 231_816], &[2, 0, 2, 1, 0]),
        row("pre_norm_bwd_one_pass", &[W256], [8, 5, 384, 220_568], &[5, 4, 2, 0, 1]),
        row("pre_norm_bwd_one_pass", &[W320], [8, 3, 384, 206_904], &[3, 0, 2, 0, 1]),
        row("pre_norm_bwd_one_pass", &[W448], [8, 2, 384, 231_816], &[2, 0, 2, 1, 0]),
    ] },
    // The sums for d_phi of 256 channels take 96 registers of each thread of the main warps. Those of 320, 384 and 448
    // would take 120, 144 and 168, which the chip has no room for: then `sums_phi` is 0, and phi_bwd computes d_phi.
    // Main warps read `ahead` units of channels ahead.
    File { path: "one_pass/post_pre_bwd_one_pass", dtypes: BF16, target: Target::Hopper,
           more: &["owner_warps", "sums_phi", "ahead"], kernels: &[
        row("post_pre_bwd_one_pass", &[W256], [8, 4, 512, 229_888], &[2, 1, 2]),
        row("post_pre_bwd_one_pass", &[W320], [8, 4, 512, 221_696], &[2, 0, 2]),
        row("post_pre_bwd_one_pass", &[W384], [8, 3, 512, 200_192], &[2, 0, 2]),
        row("post_pre_bwd_one_pass", &[W448], [8, 3, 512, 230_912], &[2, 0, 1]),
    ] },
    // `blocks` run at once on a multiprocessor.
    File { path: "one_pass/phi_bwd", dtypes: BF16, target: Target::Hopper, more: &["blocks"], kernels: &[
        row("phi_bwd", &[W128], [16, 4, 256, 95_232], &[2]),
    ] },
    // `channels` are those of a thread.
    File { path: "one_pass/post_pre_norm_bwd", dtypes: BF16, target: Target::Hopper, more: &["channels"], kernels: &[
        row("post_pre_norm_bwd", &[N4], [1, 0, 896, 0], &[8]),
    ] },
    File { path: "one_pass/logits_bwd", dtypes: F32, target: Target::Clusters, more: &[], kernels: &[
        row("logits_bwd", &[N4], [16, 0, 32, 0], &[]),
    ] },
    File { path: "one_pass/sum_gradients", dtypes: F32, target: Target::Clusters, more: &[], kernels: &[
        row("sum_gradients", &[N4], [0, 0, 256, 0], &[]),
    ] },
];

impl File {
    /// Name by which plans and images know the file: its path without the folder.
    pub fn stem(&self) -> &'static str {
        let folder = self.path.rfind('/').map_or(0, |at| at + 1);
        &self.path[folder..]
    }

    /// Every size that the file is compiled for.
    pub fn sizes(&self) -> Vec<&'static Size> {
        let mut sizes: Vec<&Size> = Vec::new();
        for size in self.kernels.iter().flat_map(|kernel| kernel.sizes) {
            if !sizes.contains(&size) {
                sizes.push(size);
            }
        }
        sizes
    }
}

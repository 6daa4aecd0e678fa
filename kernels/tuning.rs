//! The compiled kernels: a row each. The build hands it to the compiler, which asserts what follows from it, and a
//! plan takes threads and memory of a launch from it.
//!
//! A compiled size is a [`Size`] in the rows of the kernels that have it. In CUDA C++ a row is `tuning_<function>`,
//! with a member for each number.

/// A file of kernels/device, compiled for every size of its kernels, every dtype and every architecture of its target.
/// A file has another row where kernels of other dtypes have other sizes, or are tuned otherwise.
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
    /// Streams, where the kernels know them beside the number (`NUM_STREAMS`); 0 elsewhere.
    pub streams: u32,
    /// Columns of phi, alike (`COLUMNS`).
    pub columns: u32,
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
        streams: 0,
        columns: 0,
    }
}

/// Channels of a stream that a block has, of all four streams, and columns of phi.
const fn channels(name: &'static str, number: u32, columns: u32) -> Size {
    Size {
        streams: 4,
        columns,
        ..exact(name, number)
    }
}

/// The same of both of two streams, with as many columns as they have where they are mixed.
const fn two_streams(name: &'static str, number: u32) -> Size {
    Size {
        streams: 2,
        ..channels(name, number, 8)
    }
}

const fn bound(name: &'static str, number: u32) -> Size {
    Size {
        name,
        number,
        is_exact: false,
        streams: 0,
        columns: 0,
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

/// Streams: numbers with code of their own, then bounds for the others and for rows that are not aligned.
pub const STREAMS: &[Size] = &[N2, N4, N8, UP_TO_4, UP_TO_8, ANY];
const FEW_STREAMS: &[Size] = &[N2, N4, N8, UP_TO_4, UP_TO_8];
const BOUNDS: &[Size] = &[UP_TO_4, UP_TO_8, ANY];
const N2: Size = exact("n2", 2);
const N4: Size = exact("n4", 4);
const N8: Size = exact("n8", 8);
const UP_TO_4: Size = bound("upto4", 4);
const UP_TO_8: Size = bound("upto8", 8);
const ANY: Size = bound("any", 16);

/// Columns of phi, in groups of 8.
pub const OCTETS: &[Size] = &[K8, K24, K32, K80, ANY_OCTETS];
/// As few columns as a block can have in shared memory for all its tokens.
const FEW: &[Size] = &[K8, K24, K32];
const MANY: &[Size] = &[K80, ANY_OCTETS];
const ANY_OCTETS: Size = bound("any", 12);
const K8: Size = exact("k8", 1);
const K24: Size = exact("k24", 3);
const K32: Size = exact("k32", 4);
const K80: Size = exact("k80", 10);

/// Columns that a block of warpgroups has at once.
pub const WARPGROUP_OCTETS: &[Size] = &[K80, K144];
const K144: Size = exact("k144", 18);
/// The most columns.
pub const K288: Size = exact("k288", 36);

/// Channels of a stream that a block of a cluster owns, and columns of phi.
pub const CHANNELS: &[Size] = &[
    W256, W320, W384, W448, W512, W256K8, W384K8, W512K8, W256K32, W320K32, W384K32, W512K32,
    N2W512, N2W1024,
];
const W256: Size = channels("w256", 256, 24);
const W320: Size = channels("w320", 320, 24);
const W384: Size = channels("w384", 384, 24);
const W448: Size = channels("w448", 448, 24);
const W512: Size = channels("w512", 512, 24);
const W256K8: Size = channels("w256k8", 256, 8);
const W384K8: Size = channels("w384k8", 384, 8);
const W512K8: Size = channels("w512k8", 512, 8);
const W256K32: Size = channels("w256k32", 256, 32);
const W320K32: Size = channels("w320k32", 320, 32);
const W384K32: Size = channels("w384k32", 384, 32);
const W512K32: Size = channels("w512k32", 512, 32);
const N2W512: Size = two_streams("n2w512", 512);
const N2W1024: Size = two_streams("n2w1024", 1024);

/// The one of the kernels whose blocks have whole tokens.
pub const ONE: Size = exact("n1", 1);

/// Channels of a block without a cluster.
pub const NARROW: &[Size] = &[W128, W128K32];
const W128: Size = channels("w128", 128, 24);
const W128K32: Size = channels("w128k32", 128, 32);

const ALL: &[&str] = &["bf16", "f16", "f32"];
const HALVES: &[&str] = &["bf16", "f16"];
const BF16: &[&str] = &["bf16"];
const F16: &[&str] = &["f16"];
const F32: &[&str] = &["f32"];

/// Every compiled kernel.
#[rustfmt::skip]
pub const FILES: &[File] = &[
    File { path: "sinkhorn", dtypes: F32, target: Target::Every, more: &[], kernels: &[
        row("sinkhorn_fwd", STREAMS, [0, 0, 128, 0], &[]),
        row("sinkhorn_bwd", STREAMS, [0, 0, 128, 0], &[]),
    ] },
    // `channels` are those of a warp where many bfloat16 streams are mixed on tensor cores.
    File { path: "post", dtypes: ALL, target: Target::Every, more: &["channels"], kernels: &[
        row("post_fwd", STREAMS, [0, 0, 256, 0], &[128]),
        row("mix",      STREAMS, [0, 0, 256, 0], &[128]),
        row("post_bwd", STREAMS, [1, 0, 128, 0], &[0]),
    ] },
    File { path: "post_dots", dtypes: BF16, target: Target::Every, more: &["channels"], kernels: &[
        row("post_dots_fwd", &[N8, UP_TO_8, ANY], [0, 0, 128, 0], &[128]),
    ] },
    File { path: "collapse", dtypes: ALL, target: Target::Every, more: &[], kernels: &[
        row("collapse_fwd", STREAMS, [0, 0, 256, 0], &[]),
        row("collapse_bwd", STREAMS, [1, 0, 128, 0], &[]),
    ] },
    File { path: "static", dtypes: ALL, target: Target::Every, more: &[], kernels: &[
        row("post_pre_static_fwd", STREAMS,     [0, 0, 128, 0], &[]),
        row("pre_static_bwd",      STREAMS,     [1, 0, 128, 0], &[]),
        row("post_pre_static_bwd", &[N2, N4, N8], [1, 0, 128, 0], &[]),
        row("sum_static",          STREAMS,     [0, 0, 256, 0], &[]),
    ] },
    File { path: "two_pass/pre", dtypes: ALL, target: Target::Every, more: &[], kernels: &[
        row("pre_fwd",   &[N2, N4, N8, UP_TO_4], [8, 0, 288, 0], &[]),
        row("pre_bwd",   &[N2, N4, N8, UP_TO_4], [8, 0, 288, 0], &[]),
        // A warp has four matrices of 8 streams at once and two of 16: there are as many warps as 8 tokens want. With 8
        // streams themselves registers are scarce, and one warp keeps up with the memory.
        row("pre_fwd",   &[UP_TO_8], [8, 0, 320, 0], &[]),
        row("pre_bwd",   &[UP_TO_8], [8, 0, 320, 0], &[]),
        row("pre_fwd",   &[ANY], [8, 0, 384, 0], &[]),
        row("pre_bwd",   &[ANY], [8, 0, 384, 0], &[]),
        row("sum_gates", STREAMS, [0, 0,  32, 0], &[]),
    ] },
    // `channels` are those of a block; `bytes` those that a thread has of a stream.
    File { path: "two_pass/norm", dtypes: ALL, target: Target::Every, more: &["channels", "bytes"], kernels: &[
        row("norm_fwd",       STREAMS,   [1, 0,  256, 0], &[ 0,  0]),
        row("norm_bwd",       BOUNDS,    [1, 0,  256, 0], &[ 0,  0]),
        row("norm_bwd_once",  &[N2, N4], [1, 0, 1024, 0], &[ 0, 16]),
        row("norm_bwd_once",  &[N8],     [1, 0, 1024, 0], &[ 0,  8]),
        row("sum_norm_scale", STREAMS,   [0, 0,  256, 0], &[32,  0]),
    ] },
    // `tiles` are those that a block has at once, `channels` and `octets` those of a warp, `blocks` run at once on a
    // multiprocessor with 16-bit streams. `streams` are what warps that mix them expect; 0 for any number.
    File { path: "two_pass/projection", dtypes: ALL, target: Target::Every,
           more: &["tiles", "channels", "octets", "blocks", "streams"], kernels: &[
        row("project",             FEW,          [16, 0, 256, 0], &[ 8,  0,  0, 2, 0]),
        row("phi_fragments",       MANY,         [ 0, 0, 256, 0], &[ 0,  0,  0, 0, 0]),
        row("project_tiled",       MANY,         [16, 5, 256, 0], &[16,  0,  0, 1, 0]),
        row("project_back",        FEW,          [16, 2, 256, 0], &[ 0, 64,  0, 2, 0]),
        row("project_back",        MANY,         [16, 2, 256, 0], &[ 0, 64,  0, 1, 0]),
        row("project_back_mixing", &[K8],        [16, 2, 256, 0], &[ 0, 64,  0, 2, 2]),
        row("project_back_mixing", &[K24, K32],  [16, 2, 256, 0], &[ 0, 64,  0, 2, 4]),
        row("project_back_mixing", &[K80],       [16, 2, 256, 0], &[ 0, 64,  0, 1, 8]),
        row("project_back_mixing", &[ANY_OCTETS], [16, 2, 256, 0], &[ 0, 64,  0, 1, 0]),
        row("d_phi",               FEW,          [16, 4, 256, 0], &[ 0, 64, 10, 2, 0]),
        row("d_phi",               MANY,         [16, 5, 256, 0], &[ 0, 64, 10, 1, 0]),
        row("sum_d_phi",           OCTETS,       [ 0, 0, 256, 0], &[ 0,  0,  0, 0, 0]),
    ] },
    // A block has `channels` at once, and a stage `tiles` of tokens. Stages are as many as shared memory holds. A
    // warpgroup that copies leaves the others `registers`.
    File { path: "two_pass/warpgroups", dtypes: BF16, target: Target::Hopper,
           more: &["tiles", "channels", "registers"], kernels: &[
        row("phi_lines",     WARPGROUP_OCTETS, [ 0, 0, 256, 0], &[ 0, 0, 0]),
        row("r_dm_lines",    WARPGROUP_OCTETS, [ 0, 0, 256, 0], &[ 0, 0, 0]),
        row("project_lines", &[K80],  [16, 4, 640, 213_056], &[16,   0, 112]),
        row("project_lines", &[K144], [16, 4, 384, 213_056], &[ 8,   0, 232]),
        row("d_phi_lines",   &[K80],  [16, 5, 512, 225_360], &[ 4, 192, 160]),
        row("d_phi_lines",   &[K144], [16, 3, 512, 184_368], &[ 4, 192, 160]),
    ] },
    // `channels` are those of a row, `hexets` the most groups of 16 columns that a warp has phi of, `blocks` run at once on
    // a multiprocessor.
    File { path: "two_pass/back_streams", dtypes: BF16, target: Target::Every,
           more: &["channels", "hexets", "blocks"], kernels: &[
        row("project_back_streams", &[N2],      [16, 0, 256, 67_584], &[64, 1, 2]),
        row("project_back_streams", &[N4, UP_TO_4], [16, 0, 256, 68_608], &[64, 2, 2]),
        row("project_back_streams", &[N8, UP_TO_8], [16, 0, 256, 71_680], &[64, 5, 1]),
    ] },
    // A block has phi of `channels`.
    File { path: "two_pass/back_lines", dtypes: BF16, target: Target::Hopper, more: &["channels"], kernels: &[
        row("phi_back_lines",     &[K288], [ 0, 0, 256, 0], &[0]),
        row("project_back_lines", &[K288], [16, 0, 256, 163_968], &[256]),
    ] },
    File { path: "two_pass/back_stages", dtypes: BF16, target: Target::Clusters,
           more: &["channels", "hexets", "blocks"], kernels: &[
        row("project_back_stages", &[N8, UP_TO_8], [16, 4, 512, 216_064], &[64, 5, 1]),
    ] },
    // Tiles of 16 tokens halve the exchange, where there are registers for two accumulators and each tile is read and
    // projected at once. Stages are as many as shared memory holds. `fragments` of phi lie in shared memory, and
    // registers are such that nothing spills; with 80 `other_registers` Sinkhorn has two lanes a matrix. Of what these
    // leave open it is what was fastest on an H200, as far as there are 24 columns and 256 to 448 channels.
    File { path: "one_pass/one_pass_fwd", dtypes: HALVES, target: Target::Clusters,
           more: &["fragments", "project_registers", "apply_registers", "other_registers"], kernels: &[
        row("pre_fwd_one_pass",          &[W256],    [16, 5, 512, 219_136], &[ 0, 168,  96, 80]),
        row("pre_fwd_one_pass",          &[W384],    [ 8, 7, 512, 204_800], &[ 0, 200,  56, 56]),
        row("pre_fwd_one_pass",          &[W512],    [ 8, 5, 512, 212_992], &[ 5, 208,  40, 56]),
        row("pre_fwd_one_pass",          &[W512K8],  [ 8, 6, 512, 211_968], &[ 0, 168,  88, 88]),
        row("pre_norm_fwd_one_pass",     &[W256],    [16, 5, 512, 230_400], &[ 0, 176,  80, 80]),
        row("pre_norm_fwd_one_pass",     &[W384],    [ 8, 7, 512, 215_040], &[ 0, 208,  48, 48]),
        row("pre_norm_fwd_one_pass",     &[W512],    [ 8, 5, 512, 232_448], &[ 8, 208,  40, 56]),
        row("pre_norm_fwd_one_pass",     &[W512K8],  [ 8, 6, 512, 223_232], &[ 0, 168,  88, 88]),
        row("post_pre_fwd_one_pass",     &[W256],    [ 8, 8, 512, 203_776], &[ 0, 168,  96, 80]),
        row("post_pre_fwd_one_pass",     &[W384],    [ 8, 6, 512, 219_136], &[ 0, 208,  48, 48]),
        row("post_pre_fwd_one_pass",     &[W512],    [ 8, 4, 512, 232_448], &[10, 208,  48, 48]),
        row("post_pre_fwd_one_pass",     &[W512K8],  [ 8, 5, 512, 221_184], &[ 0, 176,  80, 80]),
        row("post_pre_norm_fwd_one_pass",&[W256],    [ 8, 8, 512, 214_016], &[ 0, 168,  88, 88]),
        row("post_pre_norm_fwd_one_pass",&[W384],    [ 8, 6, 512, 232_448], &[ 1, 208,  48, 48]),
        row("post_pre_norm_fwd_one_pass",&[W512],    [ 8, 3, 512, 216_064], &[14, 208,  48, 48]),
        row("post_pre_norm_fwd_one_pass",&[W512K8],  [ 8, 5, 512, 231_424], &[ 0, 176,  80, 80]),
    ] },
    // Beside float16 streams a larger size takes the place of these: each costs the build some time.
    File { path: "one_pass/one_pass_fwd", dtypes: BF16, target: Target::Clusters,
           more: &["fragments", "project_registers", "apply_registers", "other_registers"], kernels: &[
        row("pre_fwd_one_pass",          &[W320],    [ 8, 8, 512, 201_728], &[ 0, 168, 104, 72]),
        row("pre_fwd_one_pass",          &[W448],    [ 8, 6, 512, 202_752], &[ 0, 208,  40, 56]),
        row("pre_fwd_one_pass",          &[W384K8],  [ 8, 8, 512, 214_016], &[ 0, 168,  88, 88]),
        row("pre_fwd_one_pass",          &[W256K32], [16, 5, 512, 229_376], &[ 0, 192,  64, 64]),
        row("pre_fwd_one_pass",          &[W384K32], [ 8, 6, 512, 210_944], &[ 6, 208,  40, 56]),
        row("pre_fwd_one_pass",          &[W512K32], [ 8, 3, 512, 220_160], &[22, 208,  40, 56]),
        row("pre_norm_fwd_one_pass",     &[W320],    [ 8, 8, 512, 212_992], &[ 0, 176,  88, 72]),
        row("pre_norm_fwd_one_pass",     &[W448],    [ 8, 6, 512, 225_280], &[ 3, 208,  40,  56]),
        row("pre_norm_fwd_one_pass",     &[W384K8],  [ 8, 7, 512, 199_680], &[ 0, 168,  88, 88]),
        row("pre_norm_fwd_one_pass",     &[W256K32], [ 8, 8, 512, 185_344], &[ 0, 176,  88, 72]),
        row("pre_norm_fwd_one_pass",     &[W384K32], [ 8, 6, 512, 230_400], &[ 9, 208,  40, 56]),
        row("pre_norm_fwd_one_pass",     &[W512K32], [ 8, 3, 512, 232_448], &[23, 208,  40, 56]),
        row("post_pre_fwd_one_pass",     &[W320],    [ 8, 7, 512, 216_064], &[ 0, 192,  72, 56]),
        row("post_pre_fwd_one_pass",     &[W448],    [ 8, 5, 512, 231_424], &[ 5, 208,  48, 48]),
        row("post_pre_fwd_one_pass",     &[W384K8],  [ 8, 6, 512, 202_752], &[ 0, 176,  80, 80]),
        row("post_pre_fwd_one_pass",     &[W256K32], [ 8, 8, 512, 212_992], &[ 0, 200,  56, 56]),
        row("post_pre_fwd_one_pass",     &[W384K32], [ 8, 5, 512, 232_448], &[10, 208,  48, 48]),
        row("post_pre_fwd_one_pass",     &[W512K32], [ 8, 2, 512, 219_136], &[26, 208,  48, 48]),
        row("post_pre_norm_fwd_one_pass",&[W320],    [ 8, 7, 512, 226_304], &[ 0, 208,  48, 48]),
        row("post_pre_norm_fwd_one_pass",&[W448],    [ 8, 5, 512, 232_448], &[ 3, 208,  48, 48]),
        row("post_pre_norm_fwd_one_pass",&[W384K8],  [ 8, 6, 512, 211_968], &[ 0, 176,  80, 80]),
        row("post_pre_norm_fwd_one_pass",&[W256K32], [ 8, 7, 512, 198_656], &[ 0, 200,  56, 56]),
        row("post_pre_norm_fwd_one_pass",&[W384K32], [ 8, 4, 512, 225_280], &[14, 208,  48, 48]),
        row("post_pre_norm_fwd_one_pass",&[W512K32], [ 8, 2, 512, 232_448], &[28, 208,  48, 48]),
        row("pre_fwd_one_pass",          &[N2W512],  [16, 6, 512, 222_208], &[ 0, 168,  96, 80]),
        row("pre_fwd_one_pass",          &[N2W1024], [ 8, 6, 512, 211_968], &[ 0, 168,  96, 80]),
        row("pre_norm_fwd_one_pass",     &[N2W512],  [16, 6, 512, 224_256], &[ 0, 168,  96, 80]),
        row("pre_norm_fwd_one_pass",     &[N2W1024], [ 8, 6, 512, 216_064], &[ 0, 168,  96, 80]),
        row("post_pre_fwd_one_pass",     &[N2W512],  [ 8, 8, 512, 215_040], &[ 0, 168,  96, 80]),
        row("post_pre_fwd_one_pass",     &[N2W1024], [ 8, 4, 512, 210_944], &[ 0, 168,  96, 80]),
        row("post_pre_norm_fwd_one_pass",&[N2W512],  [ 8, 8, 512, 217_088], &[ 0, 168,  96, 80]),
        row("post_pre_norm_fwd_one_pass",&[N2W1024], [ 8, 4, 512, 215_040], &[ 0, 168,  96, 80]),
    ] },
    // phi is cut into parts when it is used, so that it takes as many registers as beside bfloat16.
    File { path: "one_pass/one_pass_fwd", dtypes: F32, target: Target::Clusters,
           more: &["fragments", "project_registers", "apply_registers", "other_registers"], kernels: &[
        row("pre_fwd_one_pass",          &[W256],    [ 8, 6, 512, 227_328], &[ 0, 192,  56,  72]),
        row("pre_fwd_one_pass",          &[W256K8],  [ 8, 6, 512, 210_944], &[ 0, 168,  96, 80]),
        row("pre_norm_fwd_one_pass",     &[W256],    [ 8, 5, 512, 205_824], &[ 1, 192,  56, 72]),
        row("pre_norm_fwd_one_pass",     &[W256K8],  [ 8, 6, 512, 220_160], &[ 0, 168,  96, 80]),
        row("post_pre_fwd_one_pass",     &[W256],    [ 8, 4, 512, 197_632], &[ 1, 184,  72, 72]),
        row("post_pre_fwd_one_pass",     &[W256K8],  [ 8, 5, 512, 221_184], &[ 0, 168,  96, 80]),
        row("post_pre_norm_fwd_one_pass",&[W256],    [ 8, 4, 512, 209_920], &[ 2, 184,  72, 72]),
        row("post_pre_norm_fwd_one_pass",&[W256K8],  [ 8, 5, 512, 230_400], &[ 0, 168,  96, 80]),
    ] },
    // Stages are for X and d_u, `d_x_in_slots` for d_x_in, `partials` for what as many blocks send to the owners of
    // tokens. A main warp has `held` fragments of phi in registers, `sums` of its sums for d_phi in shared memory, and,
    // where `holds_d_w` is 1, its sums for d_norm_scale in registers. It takes `at_once` units of channels at once, for
    // which it reads coefficients once, and X once for both products where `reads_x_once` is 1: as registers allow.
    // Where the sums for d_phi would not fit, `sums_phi` is 0, and d_phi computes it; phi is in registers instead.
    // `cost` is in percent, for the choice of a size: at small widths a block with one owner was slower, when that took
    // its tokens one after the other.
    File { path: "one_pass/pre_bwd_one_pass", dtypes: BF16, target: Target::Clusters,
           more: &["d_x_in_slots", "partials", "held", "dot_warps", "owner_warps", "sums_phi", "sums", "holds_d_w", "at_once", "reads_x_once", "cost"], kernels: &[
        row("pre_bwd_one_pass",      &[W256], [8, 5, 512, 221_104], &[ 5, 52,  4,  4,  3,  1,  0,  1,  2, 0, 100]),
        row("pre_bwd_one_pass",      &[W320], [8, 3, 384, 207_136], &[ 3, 33,  0,  2,  1,  1,  0,  1,  2, 1, 130]),
        row("pre_bwd_one_pass",      &[W384], [8, 3, 384, 222_488], &[ 2, 33,  0,  2,  1,  1,  0,  0,  2, 0, 130]),
        row("pre_bwd_one_pass",      &[W448], [8, 2, 384, 232_440], &[ 2, 24,  0,  2,  1,  1,  1,  0,  1, 0, 130]),
        row("pre_bwd_one_pass",      &[W256K8],  [8, 6, 512, 229_528], &[ 6, 60,  8,  4,  3,  1,  0,  1,  2, 1, 100]),
        row("pre_bwd_one_pass",      &[W384K8],  [8, 4, 512, 227_080], &[ 4, 45, 12,  4,  3,  1,  0,  1,  3, 1, 100]),
        row("pre_bwd_one_pass",      &[W512K8],  [8, 3, 512, 225_568], &[ 3, 33, 16,  4,  3,  1,  0,  1,  4, 1, 100]),
        row("pre_bwd_one_pass",      &[W256K32], [8, 4, 512, 224_008], &[ 4, 45,  0,  4,  3,  1,  0,  0,  2, 0, 100]),
        row("pre_bwd_one_pass",      &[W320K32], [8, 3, 384, 224_280], &[ 2, 33,  0,  2,  1,  1,  1,  0,  2, 0, 130]),
        row("pre_bwd_one_pass",      &[W512], [8, 3, 384, 228_640], &[ 3, 33, 16,  2,  1,  0,  0,  1,  2, 0, 100]),
        row("pre_bwd_one_pass",      &[W384K32], [8, 4, 384, 232_200], &[ 4, 45, 12,  2,  1,  0,  0,  1,  2, 0, 100]),
        row("pre_bwd_one_pass",      &[W512K32], [8, 3, 512, 229_408], &[ 3, 33, 16,  4,  3,  0,  0,  1,  2, 0, 100]),
        row("pre_bwd_one_pass",      &[N2W512],  [8, 5, 512, 211_888], &[ 5, 52,  8,  4,  3,  1,  0,  1,  4, 1, 100]),
        row("pre_norm_bwd_one_pass", &[W256], [8, 5, 384, 221_104], &[ 5, 52,  4,  2,  1,  1,  0,  1,  1, 1, 100]),
        row("pre_norm_bwd_one_pass", &[W320], [8, 3, 384, 207_136], &[ 3, 33,  0,  2,  1,  1,  0,  1,  1, 0, 100]),
        row("pre_norm_bwd_one_pass", &[W384], [8, 3, 384, 222_488], &[ 2, 33,  0,  2,  1,  1,  0,  0,  1, 0, 100]),
        row("pre_norm_bwd_one_pass", &[W448], [8, 2, 384, 232_440], &[ 2, 24,  0,  2,  1,  1,  1,  0,  1, 0, 100]),
        row("pre_norm_bwd_one_pass", &[W256K8],  [8, 6, 384, 229_528], &[ 6, 60,  8,  2,  1,  1,  0,  1,  2, 1, 100]),
        row("pre_norm_bwd_one_pass", &[W384K8],  [8, 4, 384, 227_080], &[ 4, 45, 12,  2,  1,  1,  0,  1,  3, 1, 100]),
        row("pre_norm_bwd_one_pass", &[W512K8],  [8, 3, 384, 225_568], &[ 3, 33, 16,  2,  1,  1,  0,  1,  4, 1, 100]),
        row("pre_norm_bwd_one_pass", &[W256K32], [8, 4, 384, 224_008], &[ 4, 45,  0,  2,  1,  1,  0,  0,  2, 0, 100]),
        row("pre_norm_bwd_one_pass", &[W320K32], [8, 3, 384, 224_280], &[ 2, 33,  0,  2,  1,  1,  1,  0,  1, 0, 100]),
        row("pre_norm_bwd_one_pass", &[W512], [8, 3, 384, 228_640], &[ 3, 33, 16,  2,  1,  0,  0,  1,  2, 0, 100]),
        row("pre_norm_bwd_one_pass", &[W384K32], [8, 4, 384, 232_200], &[ 4, 45, 12,  2,  1,  0,  0,  1,  2, 0, 100]),
    ] },
    // The streams' parts for d_phi and those of r dm take registers, so that some have fewer units at once.
    File { path: "one_pass/pre_bwd_one_pass", dtypes: F16, target: Target::Clusters,
           more: &["d_x_in_slots", "partials", "held", "dot_warps", "owner_warps", "sums_phi", "sums", "holds_d_w", "at_once", "reads_x_once", "cost"], kernels: &[
        row("pre_bwd_one_pass",      &[W256], [8, 5, 512, 221_104], &[ 5, 52,  4,  4,  3,  1,  0,  1,  2, 0, 100]),
        row("pre_bwd_one_pass",      &[W384], [8, 3, 384, 222_488], &[ 2, 33,  0,  2,  1,  1,  0,  0,  1, 0, 130]),
        row("pre_bwd_one_pass",      &[W512K8],  [8, 3, 512, 225_568], &[ 3, 33, 16,  4,  3,  1,  0,  1,  4, 1, 100]),
        row("pre_bwd_one_pass",      &[W512], [8, 3, 384, 228_640], &[ 3, 33, 16,  2,  1,  0,  0,  1,  2, 0, 100]),
        row("pre_norm_bwd_one_pass", &[W256], [8, 5, 384, 221_104], &[ 5, 52,  4,  2,  1,  1,  0,  1,  1, 1, 100]),
        row("pre_norm_bwd_one_pass", &[W384], [8, 3, 384, 222_488], &[ 2, 33,  0,  2,  1,  1,  0,  0,  1, 0, 100]),
        row("pre_norm_bwd_one_pass", &[W512K8],  [8, 3, 384, 225_568], &[ 3, 33, 16,  2,  1,  1,  0,  1,  4, 1, 100]),
        row("pre_norm_bwd_one_pass", &[W512], [8, 3, 384, 228_640], &[ 3, 33, 16,  2,  1,  0,  0,  1,  1, 0, 100]),
    ] },
    // Two tiles of float32 streams are as large as four of bfloat16.
    File { path: "one_pass/pre_bwd_one_pass", dtypes: F32, target: Target::Clusters,
           more: &["d_x_in_slots", "partials", "held", "dot_warps", "owner_warps", "sums_phi", "sums", "holds_d_w", "at_once", "reads_x_once", "cost"], kernels: &[
        row("pre_bwd_one_pass",      &[W256], [8, 3, 384, 231_672], &[ 2, 33,  5,  2,  1,  1,  0,  0,  1, 0, 100]),
        row("pre_bwd_one_pass",      &[W256K8], [8, 3, 384, 224_512], &[ 3, 33,  8,  2,  1,  1,  0,  0,  1, 0, 100]),
    ] },
    // The sums for d_phi of 256 channels take 96 registers of each thread of the main warps. Those of 320, 384 and 448
    // would take 120, 144 and 168, which the chip has no room for: then `sums_phi` is 0, and phi_bwd computes d_phi.
    // Main warps read `ahead` units of channels ahead. `cost` is in percent, for the choice of a size: up to C =
    // 4096 a block has 256 channels, but for some widths at which 15 clusters of 8 with 320 were as fast on an H200 with
    // phi_bwd as 7 clusters of 10 without.
    File { path: "one_pass/post_pre_bwd_one_pass", dtypes: BF16, target: Target::Hopper,
           more: &["gradients", "owner_warps", "sums_phi", "ahead", "cost"], kernels: &[
        row("post_pre_bwd_one_pass", &[W256], [8, 4, 512, 230_912], &[4, 2, 1, 2, 100]),
        row("post_pre_bwd_one_pass", &[W320], [8, 4, 512, 222_720], &[4, 2, 0, 2, 160]),
        row("post_pre_bwd_one_pass", &[W384], [8, 3, 512, 201_216], &[3, 2, 0, 2, 200]),
        row("post_pre_bwd_one_pass", &[W448], [8, 3, 512, 231_936], &[3, 2, 0, 1, 200]),
        row("post_pre_bwd_one_pass", &[W512],    [8, 3, 512, 229_888], &[2, 2, 0, 1, 200]),
        row("post_pre_bwd_one_pass", &[W256K8],  [8, 5, 512, 206_336], &[4, 2, 1, 2, 100]),
        row("post_pre_bwd_one_pass", &[W384K8],  [8, 4, 512, 211_456], &[2, 2, 1, 3, 100]),
        row("post_pre_bwd_one_pass", &[W512K8],  [8, 3, 512, 227_840], &[2, 2, 1, 2, 100]),
        row("post_pre_bwd_one_pass", &[W256K32], [8, 5, 512, 211_456], &[4, 2, 0, 2, 100]),
        row("post_pre_bwd_one_pass", &[W320K32], [8, 4, 512, 223_744], &[4, 2, 0, 1, 100]),
        row("post_pre_bwd_one_pass", &[W384K32], [8, 3, 512, 202_240], &[3, 2, 0, 2, 100]),
        row("post_pre_bwd_one_pass", &[W512K32], [8, 2, 512, 213_504], &[2, 2, 0, 1, 100]),
        row("post_pre_bwd_one_pass", &[N2W512],  [8, 5, 512, 221_696], &[3, 2, 1, 4, 100]),
    ] },
    // Beside float16 streams units of a token's matrices take some bytes more.
    File { path: "one_pass/post_pre_bwd_one_pass", dtypes: F16, target: Target::Hopper,
           more: &["gradients", "owner_warps", "sums_phi", "ahead", "cost"], kernels: &[
        row("post_pre_bwd_one_pass", &[W256],   [8, 4, 512, 231_936], &[4, 2, 1, 2, 100]),
        row("post_pre_bwd_one_pass", &[W320],   [8, 4, 512, 223_744], &[4, 2, 0, 1, 160]),
        row("post_pre_bwd_one_pass", &[W384],   [8, 3, 512, 201_216], &[3, 2, 0, 2, 200]),
        row("post_pre_bwd_one_pass", &[W448],   [8, 3, 512, 231_936], &[3, 2, 0, 1, 200]),
        row("post_pre_bwd_one_pass", &[W512],   [8, 3, 512, 229_888], &[2, 2, 0, 1, 200]),
        row("post_pre_bwd_one_pass", &[W256K8], [8, 5, 512, 206_336], &[4, 2, 1, 2, 100]),
        row("post_pre_bwd_one_pass", &[W384K8], [8, 4, 512, 212_480], &[2, 2, 1, 3, 100]),
        row("post_pre_bwd_one_pass", &[W512K8], [8, 3, 512, 227_840], &[2, 2, 1, 1, 100]),
    ] },
    // Two tiles of float32 streams are as large as four of bfloat16.
    File { path: "one_pass/post_pre_bwd_one_pass", dtypes: F32, target: Target::Hopper,
           more: &["gradients", "owner_warps", "sums_phi", "ahead", "cost"], kernels: &[
        row("post_pre_bwd_one_pass", &[W256],   [8, 2, 384, 232_448], &[2, 1, 1, 2, 100]),
        row("post_pre_bwd_one_pass", &[W256K8], [8, 3, 384, 225_280], &[2, 1, 1, 2, 100]),
    ] },
    // As `post_pre_bwd_one_pass` without what blocks send each other, for sizes alone whose sums for d_phi have room. `repliers`
    // are warps, `dots` words of a token and a block.
    File { path: "given/post_given_bwd", dtypes: BF16, target: Target::Hopper,
           more: &["gradients", "sums_phi", "ahead", "repliers", "dots"], kernels: &[
        row("post_given_bwd", &[W256],   [8, 4, 512, 221_696], &[4, 1, 2, 2, 28]),
        row("post_given_bwd", &[W256K8], [8, 5, 512, 210_432], &[5, 1, 2, 2, 28]),
        row("post_given_bwd", &[W384K8], [8, 4, 512, 226_816], &[3, 1, 3, 2, 28]),
        row("post_given_bwd", &[W512K8], [8, 3, 512, 217_600], &[2, 1, 2, 2, 28]),
        row("post_given_bwd", &[W128K32], [8, 10, 512, 222_720], &[10, 1, 1, 2, 28]),
        row("post_given_bwd", &[N2W512], [8, 5, 512, 217_600], &[3, 1, 4, 2, 12]),
        row("sum_given", &[W256, W256K8, W384K8, W512K8, W128K32], [0, 0, 256, 0], &[0, 0, 0, 0, 28]),
        row("sum_given", &[N2W512], [0, 0, 256, 0], &[0, 0, 0, 0, 12]),
    ] },
    File { path: "given/post_given_bwd", dtypes: F16, target: Target::Hopper,
           more: &["gradients", "sums_phi", "ahead", "repliers", "dots"], kernels: &[
        row("post_given_bwd", &[W256],   [8, 4, 512, 221_696], &[4, 1, 2, 2, 28]),
        row("post_given_bwd", &[W256K8], [8, 5, 512, 210_432], &[5, 1, 2, 2, 28]),
        row("post_given_bwd", &[W512K8], [8, 3, 512, 217_600], &[2, 1, 1, 2, 28]),
        row("sum_given", &[W256, W256K8, W512K8], [0, 0, 256, 0], &[0, 0, 0, 0, 28]),
    ] },
    // Registers of the main warps leave room for one replier.
    File { path: "given/post_given_bwd", dtypes: F32, target: Target::Hopper,
           more: &["gradients", "sums_phi", "ahead", "repliers", "dots"], kernels: &[
        row("post_given_bwd", &[W256],   [8, 2, 384, 228_352], &[2, 1, 2, 1, 28]),
        row("post_given_bwd", &[W256K8], [8, 3, 384, 217_088], &[2, 1, 2, 1, 28]),
        row("sum_given", &[W256, W256K8], [0, 0, 256, 0], &[0, 0, 0, 0, 28]),
    ] },
    // `threads` are those of a multiprocessor, too, whose blocks have so many together.
    File { path: "one_stream/one_stream_fwd", dtypes: ALL, target: Target::Clusters, more: &[], kernels: &[
        row("pre_fwd_one_stream",      &[ONE], [4, 3, 1024, 0], &[]),
        row("post_pre_fwd_one_stream", &[ONE], [2, 3, 1024, 0], &[]),
    ] },
    // `wide_tokens` and `wide_stages` where a thread has two sets of channels, and phi is in shared memory.
    File { path: "one_stream/one_stream_bwd", dtypes: ALL, target: Target::Clusters,
           more: &["wide_tokens", "wide_stages"], kernels: &[
        row("pre_bwd_one_stream",      &[ONE], [2, 4, 512, 0], &[1, 2]),
        row("post_pre_bwd_one_stream", &[ONE], [2, 3, 512, 0], &[1, 2]),
    ] },
    File { path: "one_stream/sum_one_stream", dtypes: F32, target: Target::Clusters, more: &[], kernels: &[
        row("sum_one_stream", &[ONE], [0, 0, 512, 0], &[]),
    ] },
    // `blocks` run at once on a multiprocessor.
    File { path: "one_pass/phi_bwd", dtypes: HALVES, target: Target::Hopper, more: &["blocks"], kernels: &[
        row("phi_bwd", &[W128],    [16, 4, 256, 95_232], &[2]),
    ] },
    File { path: "one_pass/phi_bwd", dtypes: BF16, target: Target::Hopper, more: &["blocks"], kernels: &[
        row("phi_bwd", &[W128K32], [16, 4, 256, 99_328], &[2]),
    ] },
    // `channels` are those of a thread.
    File { path: "one_pass/post_pre_norm_bwd", dtypes: HALVES, target: Target::Hopper, more: &["channels"], kernels: &[
        row("post_pre_norm_bwd", &[N4], [1, 0, 1024, 0], &[8]),
    ] },
    File { path: "one_pass/post_pre_norm_bwd", dtypes: BF16, target: Target::Hopper, more: &["channels"], kernels: &[
        row("post_pre_norm_bwd", &[N2], [1, 0, 1024, 0], &[8]),
    ] },
    File { path: "one_pass/post_pre_norm_bwd", dtypes: F32, target: Target::Hopper, more: &["channels"], kernels: &[
        row("post_pre_norm_bwd", &[N4], [1, 0, 1024, 0], &[4]),
    ] },
    // `slots` are those of tiles whose sums wait for those of the other block.
    File { path: "given/post_given_fwd", dtypes: HALVES, target: Target::Clusters, more: &["slots"], kernels: &[
        row("post_given_fwd", &[W256],    [8,  9, 384, 225_280], &[4]),
        row("post_given_fwd", &[W256K8],  [8, 10, 384, 228_352], &[4]),
        row("post_given_fwd", &[W256K32], [8,  8, 384, 212_992], &[4]),
        row("post_given_fwd", &[N2W512],  [8,  8, 384, 214_016], &[4]),
    ] },
    File { path: "given/post_given_fwd", dtypes: F32, target: Target::Clusters, more: &["slots"], kernels: &[
        row("post_given_fwd", &[W256],    [8,  5, 384, 226_304], &[2]),
        row("post_given_fwd", &[W256K8],  [8,  5, 384, 224_256], &[4]),
    ] },
    File { path: "given/given_coefficients", dtypes: F32, target: Target::Clusters, more: &[], kernels: &[
        row("given_coefficients", &[N2, N4], [8, 0, 128, 0], &[]),
    ] },
    File { path: "one_pass/logits_bwd", dtypes: F32, target: Target::Clusters, more: &[], kernels: &[
        row("logits_bwd", &[N2, N4], [16, 0, 32, 0], &[]),
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

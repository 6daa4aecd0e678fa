//! Launches of the products with phi (projection.cu).

use super::warpgroups::Warpgroups;
use crate::contract::check::CheckedCall;
use crate::contract::config::Constraint;
use crate::contract::view::DType;
use crate::gpu::device::{Device, MAX_ROWS, SHARED_BYTES};
use crate::gpu::kernel::Kernel;
use crate::gpu::launch::{Arg, Launch};
use crate::gpu::schedules::sizes::{self, for_rows, is_aligned};
use crate::gpu::schedules::{DXIn, post};
use crate::gpu::tuning::{OCTETS, Size};
use crate::gpu::workspace::{Part, Workspace};

/// Multiprocessors of a large GPU, and tiles of a call with many tokens, for which the sums of d_phi are cut. Constants,
/// because the order of the sums follows from them.
const D_PHI_MULTIPROCESSORS: usize = 132;
const D_PHI_TILES: usize = 512;

/// How the projection of a call is cut.
#[derive(Debug, Clone, Copy)]
pub struct Projection {
    dtype: DType,
    n: usize,
    c: usize,
    columns: usize,
    /// Where warpgroups multiply.
    warpgroups: Option<Warpgroups>,
}

impl Projection {
    /// The projection of a call on a GPU.
    pub fn of(call: &CheckedCall, device: &Device) -> Self {
        Self {
            dtype: call.dtype,
            n: call.n,
            c: call.c,
            columns: call.columns,
            warpgroups: Warpgroups::of(call, device),
        }
    }

    fn width(&self) -> usize {
        self.n * self.c
    }

    /// Groups of 8 columns.
    fn octets(&self) -> usize {
        self.columns.div_ceil(8)
    }

    /// Groups of 16 columns.
    fn hexets(&self) -> usize {
        self.columns.div_ceil(16)
    }

    /// The size of the kernels for rows of all streams of a token: how many octets they work on at once.
    fn size(&self) -> &'static Size {
        sizes::of(OCTETS, self.octets(), is_aligned(self.width()))
    }

    /// The same of the kernels for rows of a stream. Four of these may be aligned where one is not.
    fn stream_size(&self) -> &'static Size {
        sizes::of(OCTETS, self.octets(), is_aligned(self.c))
    }

    /// Parts of a weight (`kWeightParts`).
    fn weight_parts(&self) -> usize {
        if self.dtype == DType::F32 { 3 } else { 2 }
    }

    /// Parts of phi and of r dm in the products that make d_x (`kBackParts`).
    fn back_parts(&self) -> usize {
        if self.dtype == DType::Bf16 {
            1
        } else {
            self.weight_parts()
        }
    }

    fn kernel(&self, function: &'static str) -> Kernel {
        Kernel::of(function, self.size(), self.dtype)
    }

    /// The same of two kernels, for rows of all streams that are aligned or not.
    fn kernel_for_rows(&self, functions: [&'static str; 2]) -> Kernel {
        self.kernel(for_rows(self.width(), functions))
    }

    /// The same for rows of a stream.
    fn kernel_for_streams(&self, functions: [&'static str; 2]) -> Kernel {
        let function = for_rows(self.c, functions);
        Kernel::of(function, self.stream_size(), self.dtype)
    }

    /// The size of the kernel for few columns, whose blocks have phi for their slice in shared memory: the least that
    /// has room for them. Columns that there are not are zeros there.
    fn few(&self) -> Option<&'static Size> {
        let takes = |size: &&Size| size.is_exact && size.number as usize >= self.octets();
        let size = OCTETS
            .iter()
            .find(takes)
            .filter(|_| is_aligned(self.width()))?;
        Kernel::find("project", size, self.dtype).map(|_| size)
    }

    /// Rows of phi that a block of it holds at once, and their bytes.
    fn stage(&self, few: &Size) -> (usize, usize) {
        let row_bytes = few.number as usize * self.weight_parts() * 16;
        let fitting = (SHARED_BYTES / row_bytes).min(1024);
        let rows = 1 << fitting.ilog2();
        (rows, rows * row_bytes)
    }

    /// Values of a token whose products one block sums. Follows from the projection alone, as the order of
    /// the sums does.
    fn slice(&self) -> usize {
        if let Some(warpgroups) = self.warpgroups {
            return warpgroups.slice();
        }
        if let Some(few) = self.few() {
            return self.stage(few).0;
        }
        match self.octets() {
            // Long slices leave few partial sums, short ones work for many multiprocessors.
            0..=4 => 1024,
            5..=12 => 2048,
            _ => 4096,
        }
    }

    /// How many there are; none without a projection.
    pub fn slices(&self) -> usize {
        if self.columns == 0 {
            0
        } else {
            self.width().div_ceil(self.slice())
        }
    }

    /// The partial sums of `project`.
    pub fn partial(&self) -> Part {
        Part::per_token(self.slices() * (self.octets() * 8 + 2))
    }

    /// The gradient of m, as `project_back` and as `d_phi` want it.
    pub fn fragments(&self) -> [Part; 2] {
        let tile = self.tile();
        [
            Part::per_token(self.hexets() * 4 * 32 * self.back_parts() / tile),
            Part::per_token(self.octets() * 2 * 32 * self.weight_parts() / tile),
        ]
    }

    /// Bytes of B fragments for 16 rows, an octet of columns.
    fn octet_bytes(&self) -> usize {
        self.weight_parts() * 32 * size_of::<[u32; 2]>()
    }

    /// Bytes of some values of a token in shared memory (`Rows` of rows.cuh).
    fn row_bytes(&self, values: usize) -> usize {
        let shift = if is_aligned(self.width()) { 0 } else { 16 };
        values * self.dtype.num_bytes() + shift
    }

    /// Tokens that a warp takes at once.
    fn tile(&self) -> usize {
        self.kernel("d_phi").tokens()
    }

    /// Blocks of d_phi's kernel for the channels, and for the columns.
    fn d_phi_blocks(&self) -> [usize; 2] {
        let kernel = self.kernel("d_phi");
        let channels = kernel.more("channels") * warps_of(kernel);
        // Registers that hold the parts of float32 streams hold no sums (`kMostOctets`).
        let octets = kernel.more("octets") / if self.dtype == DType::F32 { 2 } else { 1 };
        [
            self.width().div_ceil(channels),
            self.octets().div_ceil(octets).max(1),
        ]
    }

    fn d_phi_splits(&self) -> usize {
        if let Some(warpgroups) = self.warpgroups {
            return warpgroups.d_phi_splits();
        }
        let resident = self.kernel("d_phi").more("blocks") / self.dtype.num_bytes().div_ceil(2);
        let blocks = self.d_phi_blocks().iter().product();
        sets_of_tiles(blocks, D_PHI_MULTIPROCESSORS * resident.max(1), D_PHI_TILES).min(32)
    }

    /// The sums of `d_phi` over some tokens each; nothing where warpgroups have one, which is d_phi.
    pub fn d_phi_partial(&self) -> Part {
        let splits = match self.d_phi_splits() {
            1 if self.warpgroups.is_some() => 0,
            splits => splits,
        };
        Part::fixed(splits * self.width() * self.columns)
    }
}

/// Warps of a block.
fn warps_of(kernel: Kernel) -> usize {
    kernel.threads() / 32
}

/// `partial` from x.
pub fn project(
    call: &CheckedCall,
    device: &Device,
    workspace: &mut dyn Workspace,
    projection: Projection,
    x: u64,
    partial: u64,
) -> Vec<Launch> {
    if projection.columns == 0 {
        return Vec::new();
    }
    if let Some(warpgroups) = projection.warpgroups {
        return warpgroups.project(call, device, workspace, x, partial);
    }
    match projection.few() {
        Some(few) => vec![project_few(call, device, projection, few, x, partial)],
        None => project_many(call, device, workspace, projection, x, partial),
    }
}

fn project_few(
    call: &CheckedCall,
    device: &Device,
    projection: Projection,
    few: &'static Size,
    x: u64,
    partial: u64,
) -> Launch {
    let kernel = Kernel::of("project", few, projection.dtype);
    let (stage, shared_bytes) = projection.stage(few);
    let slices = projection.slices();
    let resident = (device.max_shared_bytes as usize / shared_bytes).clamp(1, 2);
    let slots = device.num_sms as usize * resident;
    let block_tokens = kernel.tokens() * kernel.more("tiles");
    let most = call.tokens.div_ceil(block_tokens).clamp(1, MAX_ROWS);
    let groups = (slots / slices).clamp(1, most);
    let launch = kernel.launch(
        [slices, groups, 1],
        vec![
            Arg::Pointer(x),
            Arg::Pointer(call.operand_address("phi")),
            Arg::Pointer(partial),
            Arg::I32(call.tokens as i32),
            Arg::I32(projection.width() as i32),
            Arg::I32(projection.columns as i32),
            Arg::I32(projection.slice() as i32),
            Arg::I32(stage as i32),
        ],
    );
    Launch {
        shared_bytes: shared_bytes as u32,
        ..launch
    }
}

/// Values of a token in a stage of `project_tiled`.
const STAGE_VALUES: usize = 32;

fn project_many(
    call: &CheckedCall,
    device: &Device,
    workspace: &mut dyn Workspace,
    projection: Projection,
    x: u64,
    partial: u64,
) -> Vec<Launch> {
    let kernel = projection.kernel_for_rows(["project_tiled", "project_tiled_unaligned"]);
    let number = projection.size().number as usize;
    // Two stages have to fit into the shared memory of every GPU.
    let most = match projection.dtype {
        DType::F32 if !projection.size().is_exact => number * 2 / 3,
        _ => number,
    };
    let chunks = projection.octets().div_ceil(most);
    let octets = projection.octets().div_ceil(chunks);
    let phi_stages = projection.width().div_ceil(STAGE_VALUES);
    let stage_octets = octets * STAGE_VALUES / 16;
    let phi_bytes = stage_octets * projection.octet_bytes();
    let phi_floats = chunks * phi_stages * phi_bytes / size_of::<f32>();
    let fragments = workspace.take(Part::fixed(phi_floats));
    let block_tokens = kernel.tokens() * kernel.more("tiles");
    let stage_bytes = block_tokens * projection.row_bytes(STAGE_VALUES) + phi_bytes;
    let stages = kernel.stages_within(device, stage_bytes);
    let slices = projection.slices();
    let sizes = [octets, chunks].map(|number| Arg::I32(number as i32));
    let phi = projection.kernel("phi_fragments");
    let threads = chunks * phi_stages * stage_octets * 32;
    let cut_phi = phi.launch(
        [threads.div_ceil(phi.threads()), 1, 1],
        [
            Arg::Pointer(call.operand_address("phi")),
            Arg::Pointer(fragments),
            Arg::I32(projection.width() as i32),
            Arg::I32(projection.columns as i32),
        ]
        .into_iter()
        .chain(sizes)
        .chain([Arg::I32(i32::from(is_aligned(projection.width())))])
        .collect(),
    );
    let tiles = call.tokens.div_ceil(block_tokens);
    let launch = kernel.launch(
        [tiles * chunks, slices.min(MAX_ROWS), 1],
        [
            Arg::Pointer(x),
            Arg::Pointer(fragments),
            Arg::Pointer(partial),
            Arg::I32(call.tokens as i32),
            Arg::I32(projection.width() as i32),
            Arg::I32(projection.columns as i32),
            Arg::I32(projection.slice() as i32),
        ]
        .into_iter()
        .chain(sizes)
        .chain([Arg::I32(stages as i32)])
        .collect(),
    );
    let launch = Launch {
        shared_bytes: (stages * stage_bytes) as u32,
        ..launch
    };
    vec![cut_phi, launch]
}

/// Numbers of tokens that pre's backward leaves for the products.
pub struct Factors {
    /// The gradient of m, see [`Projection::fragments`].
    pub dm: [u64; 2],
    /// The weights of the streams in u: h_pre again, or those that are given.
    pub h_pre: u64,
    /// Factor of -X in d_x that comes of r, and the unit of r dm in float16, of each token.
    pub of_tokens: u64,
    /// The cotangent of the sum over streams.
    pub d_u: u64,
}

/// A block of `project_back`, and what it keeps in shared memory.
#[derive(Debug, Clone, Copy)]
struct BackBlock {
    /// Units that have a tile of tokens together: 64 channels of a stream each, and a warp.
    units: usize,
    /// Tiles at once.
    groups: usize,
    /// Whether the shared memory holds phi, too.
    has_phi: bool,
    /// The same of r dm.
    has_dm: bool,
    shared_bytes: usize,
}

impl Projection {
    /// A block that mixes a deferred cotangent where `mixes`.
    fn back_block(
        &self,
        kernel: Kernel,
        mixes: bool,
        [units, groups]: [usize; 2],
        [has_phi, has_dm]: [bool; 2],
    ) -> BackBlock {
        let tile = kernel.tokens();
        let fragment_bytes = self.hexets() * self.back_parts() * 512;
        let phi = if has_phi { 4 * fragment_bytes } else { 0 };
        let dm = if has_dm { fragment_bytes } else { 0 };
        let h_res = if mixes {
            tile * self.n * size_of::<f32>()
        } else {
            0
        };
        let d_x_in = tile * kernel.more("channels") * self.dtype.num_bytes();
        let buffers = units * groups * (d_x_in + h_res) + groups * dm;
        BackBlock {
            units,
            groups,
            has_phi,
            has_dm,
            shared_bytes: units * phi + 2 * buffers,
        }
    }

    /// A block of units of any streams.
    fn adding_block(&self, kernel: Kernel, device: &Device) -> BackBlock {
        let most = warps_of(kernel);
        // The more units share r dm the less of it there is to read, and the more room phi takes.
        let shapes = |warps: usize| {
            let units = (0..=warps.ilog2()).map(move |halvings| warps >> halvings);
            units.map(move |units| [units, warps / units])
        };
        let all = (0..=most.ilog2()).flat_map(|halvings| shapes(most >> halvings));
        // Exact sizes have both in shared memory, by few warps if need be.
        let kept = if self.stream_size().is_exact {
            all.map(|shape| (shape, [true; 2])).collect::<Vec<_>>()
        } else {
            let kept = [[true, true], [true, false], [false, true], [false, false]];
            let some = |kept| shapes(most).map(move |shape| (shape, kept));
            kept.into_iter().flat_map(some).collect()
        };
        let mut blocks =
            (kept.into_iter()).map(|(shape, kept)| self.back_block(kernel, false, shape, kept));
        blocks
            .find(|block| block.shared_bytes <= device.max_shared_bytes as usize)
            .expect("a block that needs little")
    }

    /// A block of all streams of some channels, that hand each other d_x_in. None where that does not fit.
    fn mixing_block(&self, kernel: Kernel, device: &Device) -> Option<BackBlock> {
        let most = warps_of(kernel) / self.n;
        let mut blocks = (1..=most)
            .rev()
            .map(|groups| self.back_block(kernel, true, [self.n, groups], [true; 2]));
        blocks.find(|block| block.shared_bytes <= device.max_shared_bytes as usize)
    }

    /// The kernel that mixes a deferred cotangent on its way, and its block. None where it does not fit.
    fn mixing(&self, device: &Device) -> Option<(Kernel, BackBlock)> {
        let kernel = Kernel::of("project_back_mixing", self.stream_size(), self.dtype);
        // An exact size expects the streams that most calls with so many columns have.
        let is_expected = [0, self.n].contains(&kernel.more("streams"));
        let kernel = if is_expected {
            self.kernel_for_streams(["project_back_mixing", "project_back_mixing_unaligned"])
        } else {
            Kernel::of(
                "project_back_mixing",
                sizes::bound_of(OCTETS, self.octets()),
                self.dtype,
            )
        };
        Some((kernel, self.mixing_block(kernel, device)?))
    }

    /// The kernel whose blocks have all streams: the faster one where there is memory for its stages. None where there
    /// are too many, or of another dtype.
    fn streams_kernel(&self, device: &Device) -> Option<Kernel> {
        let size = sizes::streams(self.n, is_aligned(self.c));
        let has_stages = is_aligned(self.c) && device.num_clusters(1, 1).is_some();
        let staged = Kernel::find("project_back_stages", size, self.dtype);
        let function = for_rows(
            self.c,
            ["project_back_streams", "project_back_streams_unaligned"],
        );
        staged
            .filter(|_| has_stages)
            .or_else(|| Kernel::find(function, size, self.dtype))
            .filter(|kernel| self.hexets() <= kernel.more("hexets"))
    }

    /// Channels of a block of it: it has eight rows of channels, whatever the number of streams.
    fn streams_channels(&self, kernel: Kernel) -> usize {
        let streams = sizes::streams_bound(self.n, is_aligned(self.c));
        kernel.more("channels") * (8 / streams)
    }
}

/// Into how many sets `tiles` are cut, each of them for `blocks` blocks of which `slots` run at once: with few sets
/// multiprocessors idle at the end, with many their blocks start more often. A start takes as long as a few tiles.
pub fn sets_of_tiles(blocks: usize, slots: usize, tiles: usize) -> usize {
    const START: usize = 4;
    let slots = slots.max(1);
    let most = (8 * slots / blocks).clamp(1, tiles.clamp(1, MAX_ROWS));
    let time = |sets: usize| (blocks * sets).div_ceil(slots) * (tiles.div_ceil(sets) + START);
    (1..=most).min_by_key(|&sets| time(sets)).unwrap_or(1)
}

/// d_x, with the cotangent of the streams that is added to it.
pub fn project_back(
    call: &CheckedCall,
    device: &Device,
    workspace: &mut dyn Workspace,
    projection: Projection,
    x: u64,
    factors: &Factors,
    d_x_in: DXIn,
) -> Vec<Launch> {
    let d_x = call.result_address(call.kind.first_result());
    // `identity` has nothing to mix.
    let is_mixed = call.config.constraint != Constraint::Identity;
    let h_res = d_x_in.h_res.filter(|_| is_mixed);
    if let (Some(h_res), Some(kernel)) = (h_res, projection.streams_kernel(device)) {
        let added = [d_x_in.address, h_res];
        let launch = all_streams(call, device, projection, kernel, x, factors, added);
        return vec![launch];
    }
    // H_res^T is applied on the way where that fits, and beforehand where not.
    let mixing = h_res.and_then(|_| projection.mixing(device));
    let mix = h_res
        .filter(|_| mixing.is_none())
        .map(|h_res| post::mix(call, d_x_in.address, h_res, d_x));
    let added = if mix.is_some() { d_x } else { d_x_in.address };
    let by_warpgroups = projection
        .warpgroups
        .filter(|_| mixing.is_none())
        .and_then(|own| own.project_back(call, device, workspace, x, factors, added));
    if let Some(launches) = by_warpgroups {
        return mix.into_iter().chain(launches).collect();
    }
    let (kernel, block) = mixing.unwrap_or_else(|| {
        let kernel = projection.kernel_for_streams(["project_back", "project_back_unaligned"]);
        (kernel, projection.adding_block(kernel, device))
    });
    let BackBlock {
        units,
        groups,
        has_phi,
        has_dm,
        shared_bytes,
    } = block;
    let channels = projection.c.div_ceil(kernel.more("channels"));
    let blocks = (projection.n * channels).div_ceil(units);
    let registers_allow = kernel.more("blocks") / projection.dtype.num_bytes().div_ceil(2);
    let shared_allows = device.max_shared_bytes as usize / shared_bytes.max(1);
    let slots = device.num_sms as usize * registers_allow.min(shared_allows).max(1);
    let tiles = call.tokens.div_ceil(kernel.tokens() * groups);
    let sets = sets_of_tiles(blocks, slots, tiles);
    let args = vec![
        Arg::Pointer(x),
        Arg::Pointer(call.operand_address("phi")),
        Arg::Pointer(factors.dm[0]),
        Arg::I32(projection.columns as i32),
        Arg::Pointer(factors.h_pre),
        Arg::Pointer(factors.of_tokens),
        Arg::Pointer(factors.d_u),
        Arg::Pointer(added),
        Arg::Pointer(h_res.unwrap_or(0)),
        Arg::Pointer(d_x),
        Arg::I32(call.tokens as i32),
        Arg::I32(projection.n as i32),
        Arg::I32(projection.c as i32),
        Arg::I32(units as i32),
        Arg::I32(i32::from(has_phi)),
        Arg::I32(i32::from(has_dm)),
    ];
    let back = Launch {
        block: (32 * units * groups) as u32,
        shared_bytes: shared_bytes as u32,
        ..kernel.launch([blocks, sets, 1], args)
    };
    mix.into_iter().chain([back]).collect()
}

/// d_x by blocks with all streams, from a cotangent and the H_res by which it is deferred.
fn all_streams(
    call: &CheckedCall,
    device: &Device,
    projection: Projection,
    kernel: Kernel,
    x: u64,
    factors: &Factors,
    [d_x_in, h_res]: [u64; 2],
) -> Launch {
    let groups = projection.c.div_ceil(projection.streams_channels(kernel));
    let slots = device.num_sms as usize * kernel.more("blocks");
    let sets = sets_of_tiles(groups, slots, call.tokens.div_ceil(kernel.tokens()));
    kernel.launch(
        [groups * sets, 1, 1],
        vec![
            Arg::Pointer(x),
            Arg::Pointer(call.operand_address("phi")),
            Arg::Pointer(factors.dm[0]),
            Arg::I32(projection.columns as i32),
            Arg::Pointer(factors.h_pre),
            Arg::Pointer(factors.of_tokens),
            Arg::Pointer(factors.d_u),
            Arg::Pointer(d_x_in),
            Arg::Pointer(h_res),
            Arg::Pointer(call.result_address(call.kind.first_result())),
            Arg::I32(call.tokens as i32),
            Arg::I32(projection.n as i32),
            Arg::I32(projection.c as i32),
            Arg::I32(groups as i32),
        ],
    )
}

/// Sums for d_phi at `partial`, as many as the grid has rows.
pub fn d_phi_sums(
    call: &CheckedCall,
    device: &Device,
    projection: Projection,
    x: u64,
    dm: [u64; 2],
    partial: u64,
) -> Launch {
    let kernel = projection.kernel_for_rows(["d_phi", "d_phi_unaligned"]);
    let tiles = call.tokens.div_ceil(projection.tile());
    let splits = projection.d_phi_splits().min(tiles.max(1));
    let [channels, chunks] = projection.d_phi_blocks();
    let octets = projection.octets().div_ceil(chunks);
    let rows = kernel.tokens() * warps_of(kernel);
    let row_bytes = projection.row_bytes(kernel.more("channels"));
    let stage_bytes = rows * row_bytes + projection.octet_bytes() * octets;
    let stages = kernel.stages_within(device, stage_bytes);
    Launch {
        shared_bytes: (stages * stage_bytes) as u32,
        ..kernel.launch(
            [channels * chunks, splits, 1],
            vec![
                Arg::Pointer(x),
                Arg::Pointer(dm[0]),
                Arg::Pointer(dm[1]),
                Arg::I32(projection.columns as i32),
                Arg::Pointer(partial),
                Arg::I32(call.tokens as i32),
                Arg::I32(projection.width() as i32),
                Arg::I32(octets as i32),
                Arg::I32(chunks as i32),
                Arg::I32(stages as i32),
            ],
        )
    }
}

/// d_phi, by way of `partial` where that has several sums.
pub fn d_phi(
    call: &CheckedCall,
    device: &Device,
    workspace: &mut dyn Workspace,
    projection: Projection,
    x: u64,
    dm: [u64; 2],
) -> Vec<Launch> {
    let partial = workspace.take(projection.d_phi_partial());
    let d_phi = call.result_address("d_phi");
    let (mut launches, num_sums) = if let Some(warpgroups) = projection.warpgroups {
        // Without tokens there is no sum, and `sum_d_phi` makes zeros.
        let is_one = projection.d_phi_splits() == 1 && call.tokens > 0;
        let sums = if is_one { d_phi } else { partial };
        let (launches, num_sums) = warpgroups.d_phi_sums(call, device, workspace, [x, dm[1]], sums);
        if is_one {
            return launches;
        }
        (launches, num_sums)
    } else {
        let sums = d_phi_sums(call, device, projection, x, dm, partial);
        let num_sums = sums.grid[1] as usize;
        (vec![sums], num_sums)
    };
    let size = projection.width() * projection.columns;
    let sum = projection.kernel("sum_d_phi");
    launches.push(sum.launch(
        [size.div_ceil(sum.threads()), 1, 1],
        vec![
            Arg::Pointer(partial),
            Arg::Pointer(d_phi),
            Arg::I32(num_sums as i32),
            Arg::I64(size as i64),
        ],
    ));
    launches
}

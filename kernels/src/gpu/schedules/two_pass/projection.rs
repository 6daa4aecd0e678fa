//! Launches of the products with phi (projection.cu).

use crate::contract::check::CheckedCall;
use crate::contract::view::DType;
use crate::gpu::device::{Device, MAX_ROWS, SHARED_BYTES};
use crate::gpu::kernel::Kernel;
use crate::gpu::launch::{Arg, Launch};
use crate::gpu::schedules::sizes::{self, for_rows, is_aligned};
use crate::gpu::schedules::{DXIn, post};
use crate::gpu::tuning::{OCTETS, Size};
use crate::gpu::workspace::Part;

/// Blocks of d_phi's kernel that a large GPU runs at once. A constant, because the order of the sums
/// follows from it.
const D_PHI_BLOCKS: usize = 264;

/// How the projection of a call is cut.
#[derive(Debug, Clone, Copy)]
pub struct Projection {
    dtype: DType,
    n: usize,
    c: usize,
    columns: usize,
}

impl Projection {
    /// The projection of a call.
    pub fn of(call: &CheckedCall) -> Self {
        Self {
            dtype: call.dtype,
            n: call.n,
            c: call.c,
            columns: call.columns,
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

    /// The kernels' size: how many octets they work on at once.
    fn size(&self) -> &'static Size {
        sizes::of(OCTETS, self.octets(), is_aligned(self.c))
    }

    /// Parts of a weight (`kWeightParts`).
    fn weight_parts(&self) -> usize {
        if self.dtype == DType::F32 { 3 } else { 2 }
    }

    fn kernel(&self, function: &'static str) -> Kernel {
        Kernel::of(function, self.size(), self.dtype)
    }

    /// The same for rows of this call's channels.
    fn kernel_for_rows(&self, functions: [&'static str; 2]) -> Kernel {
        self.kernel(for_rows(self.c, functions))
    }

    /// Rows of phi that a block holds at once, and their bytes.
    fn stage(&self) -> (usize, usize) {
        let row_bytes = self.size().number as usize * self.weight_parts() * 16;
        let fitting = (SHARED_BYTES / row_bytes).min(1024);
        let rows = 1 << fitting.ilog2();
        (rows, rows * row_bytes)
    }

    /// Values of a token whose products one block sums. Follows from the projection alone, as the order of
    /// the sums does.
    fn slice(&self) -> usize {
        if self.size().number <= 4 {
            self.stage().0
        } else {
            // phi passes by in several stages; many slices would cost more than they gain.
            2048
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
        let words = 32 * self.weight_parts();
        [
            Part::per_token(self.hexets() * 4 * words / self.tile()),
            Part::per_token(self.octets() * 2 * words / self.tile()),
        ]
    }

    /// Tokens that a warp takes at once.
    fn tile(&self) -> usize {
        self.kernel("d_phi").tokens()
    }

    /// Blocks of d_phi's kernel for the channels, and for the columns.
    fn d_phi_blocks(&self) -> [usize; 2] {
        let kernel = self.kernel("d_phi");
        let channels = kernel.more("channels") * warps_of(kernel);
        [
            self.width().div_ceil(channels),
            self.octets().div_ceil(kernel.more("octets")),
        ]
    }

    fn d_phi_splits(&self) -> usize {
        let [channels, columns] = self.d_phi_blocks();
        (D_PHI_BLOCKS / (channels * columns.max(1))).clamp(1, 32)
    }

    /// The sums of `d_phi` over some tokens each.
    pub fn d_phi_partial(&self) -> Part {
        Part::fixed(self.d_phi_splits() * self.width() * self.columns)
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
    projection: Projection,
    x: u64,
    partial: u64,
) -> Option<Launch> {
    if projection.columns == 0 {
        return None;
    }
    let (stage, shared_bytes) = projection.stage();
    let kernel = projection.kernel_for_rows(["project", "project_unaligned"]);
    let chunks = projection
        .octets()
        .div_ceil(projection.size().number as usize);
    let slices = projection.slices();
    let resident = (device.max_shared_bytes as usize / shared_bytes).clamp(1, 2);
    let slots = device.num_sms as usize * resident;
    let block_tokens = kernel.tokens() * warps_of(kernel);
    let most = call.tokens.div_ceil(block_tokens).clamp(1, MAX_ROWS);
    let groups = (slots / (slices * chunks)).clamp(1, most);
    let launch = kernel.launch(
        [slices, groups, chunks],
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
    Some(Launch {
        shared_bytes: shared_bytes as u32,
        ..launch
    })
}

/// Numbers of tokens that pre's backward leaves for the products.
pub struct Factors {
    /// The gradient of m, see [`Projection::fragments`].
    pub dm: [u64; 2],
    /// h_pre again.
    pub h_pre: u64,
    /// Factor of -X in d_x that comes of r.
    pub r_factor: u64,
    /// The cotangent of the sum over streams.
    pub d_u: u64,
}

/// The warps of a block of `project_back`, and what it keeps in shared memory.
struct BackBlock {
    warps: usize,
    /// Whether the shared memory holds phi, too.
    staged: bool,
    shared_bytes: usize,
}

impl Projection {
    /// Bytes of phi for the channels of a warp.
    fn warp_phi_bytes(&self) -> usize {
        self.hexets() * self.weight_parts() * 2048
    }

    fn back_block(&self) -> BackBlock {
        let warp_bytes = self.warp_phi_bytes();
        let staged = warp_bytes <= SHARED_BYTES;
        let most = warps_of(self.kernel("project_back"));
        let warps = if staged {
            (SHARED_BYTES / warp_bytes.max(1)).clamp(1, most)
        } else {
            most
        };
        BackBlock {
            warps,
            staged,
            shared_bytes: if staged { warps * warp_bytes } else { 0 },
        }
    }

    /// The same with warps for all streams of some channels, that hand each other d_x_in (`Exchange` of
    /// projection.cu). None where that does not fit, or the kernels expect other streams for so many columns.
    fn mixing_block(&self, device: &Device) -> Option<BackBlock> {
        let kernel = self.kernel("project_back_mixing");
        let (expected, most) = (kernel.more("streams"), warps_of(kernel));
        let is_expected = expected == 0 || expected == self.n;
        let tile = kernel.tokens();
        let exchange = 2 * tile * kernel.more("channels") * self.dtype.num_bytes();
        let h_res = self.n * tile * size_of::<f32>();
        let group_bytes = self.n * (self.warp_phi_bytes() + exchange + h_res);
        // A single group may have all that the GPU has.
        let fits = is_expected && self.n <= most && group_bytes <= device.max_shared_bytes as usize;
        let groups = (most / self.n).min(SHARED_BYTES / group_bytes).max(1);
        fits.then_some(BackBlock {
            warps: self.n * groups,
            staged: true,
            shared_bytes: group_bytes * groups,
        })
    }
}

/// d_x, with the cotangent of the streams that is added to it.
pub fn project_back(
    call: &CheckedCall,
    device: &Device,
    projection: Projection,
    x: u64,
    factors: &Factors,
    d_x_in: DXIn,
) -> Vec<Launch> {
    let d_x = call.result_address(call.kind.first_result());
    // H_res^T is applied on the way where that fits, and beforehand where not.
    let mixing = d_x_in.h_res.and_then(|_| projection.mixing_block(device));
    let mix = (d_x_in.h_res)
        .filter(|_| mixing.is_none())
        .map(|h_res| post::mix(call, d_x_in.address, h_res, d_x));
    let added = if mix.is_some() { d_x } else { d_x_in.address };
    let functions = match mixing {
        Some(_) => ["project_back_mixing", "project_back_mixing_unaligned"],
        None => ["project_back", "project_back_unaligned"],
    };
    let kernel = projection.kernel_for_rows(functions);
    let block = mixing.unwrap_or_else(|| projection.back_block());
    let BackBlock {
        warps,
        staged,
        shared_bytes,
    } = block;
    let blocks = (projection.n * projection.c.div_ceil(kernel.more("channels"))).div_ceil(warps);
    let registers_allow =
        if projection.dtype == DType::F32 { 1 } else { 2 } * warps_of(kernel) / warps;
    let shared_allows = device.max_shared_bytes as usize / shared_bytes.max(1);
    let slots = device.num_sms as usize * registers_allow.min(shared_allows).max(1);
    let most = call.tokens.div_ceil(kernel.tokens()).clamp(1, MAX_ROWS);
    let groups = (slots / blocks).clamp(1, most);
    let args = vec![
        Arg::Pointer(x),
        Arg::Pointer(call.operand_address("phi")),
        Arg::Pointer(factors.dm[0]),
        Arg::Pointer(factors.dm[1]),
        Arg::I32(projection.columns as i32),
        Arg::Pointer(factors.h_pre),
        Arg::Pointer(factors.r_factor),
        Arg::Pointer(factors.d_u),
        Arg::Pointer(added),
        Arg::Pointer(d_x_in.h_res.unwrap_or(0)),
        Arg::Pointer(d_x),
        Arg::I32(call.tokens as i32),
        Arg::I32(projection.n as i32),
        Arg::I32(projection.c as i32),
        Arg::I32(i32::from(staged)),
    ];
    let back = Launch {
        block: (32 * warps) as u32,
        shared_bytes: shared_bytes as u32,
        ..kernel.launch([blocks, groups, 1], args)
    };
    mix.into_iter().chain([back]).collect()
}

/// d_phi, by way of `partial`.
pub fn d_phi(
    call: &CheckedCall,
    projection: Projection,
    x: u64,
    dm: [u64; 2],
    partial: u64,
) -> Vec<Launch> {
    if projection.columns == 0 {
        return Vec::new();
    }
    let tiles = call.tokens.div_ceil(projection.tile());
    let splits = projection.d_phi_splits().min(tiles.max(1));
    let [channels, columns] = projection.d_phi_blocks();
    let size = projection.width() * projection.columns;
    let sum = projection.kernel("sum_d_phi");
    vec![
        projection
            .kernel_for_rows(["d_phi", "d_phi_unaligned"])
            .launch(
                [channels, splits, columns],
                vec![
                    Arg::Pointer(x),
                    Arg::Pointer(dm[0]),
                    Arg::Pointer(dm[1]),
                    Arg::I32(projection.columns as i32),
                    Arg::Pointer(partial),
                    Arg::I32(call.tokens as i32),
                    Arg::I32(projection.width() as i32),
                ],
            ),
        sum.launch(
            [size.div_ceil(sum.threads()), 1, 1],
            vec![
                Arg::Pointer(partial),
                Arg::Pointer(call.result_address("d_phi")),
                Arg::I32(splits as i32),
                Arg::I64(size as i64),
            ],
        ),
    ]
}

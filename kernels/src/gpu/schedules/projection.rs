//! Launches of the products with phi (kernels/device/projection.cu).

use super::post;
use super::sizes::{for_rows, is_aligned};
use crate::contract::check::CheckedCall;
use crate::contract::view::DType;
use crate::gpu::launch::{Arg, Device, Kernel, Launch, MAX_ROWS, Problem, SHARED_BYTES};
use crate::gpu::workspace::{Part, TILE};

const WARPS: usize = 8;
/// Blocks of d_phi's kernel that a large GPU runs at once. A constant, because the order of the sums
/// follows from it.
const D_PHI_BLOCKS: usize = 264;
/// Octets whose sums a warp of d_phi's kernel holds at most (`kPhiOctets`).
const PHI_OCTETS: usize = 5;
/// Channels of a warp in the backward products (`kChannels`).
const CHANNELS: usize = 64;

/// How the projection of a call is cut.
#[derive(Debug, Clone, Copy)]
pub struct Shape {
    dtype: DType,
    n: usize,
    c: usize,
    columns: usize,
}

impl Shape {
    /// That of a call.
    pub fn of(problem: &Problem) -> Self {
        let Problem {
            dtype,
            n,
            c,
            columns,
            ..
        } = *problem;
        Self {
            dtype,
            n,
            c,
            columns,
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

    /// The kernels' size, and how many octets they work on at once.
    fn size(&self) -> (&'static str, usize) {
        match self.octets() {
            _ if !is_aligned(self.c) => ("any", 12),
            1 => ("k8", 1),
            3 => ("k24", 3),
            4 => ("k32", 4),
            10 => ("k80", 10),
            _ => ("any", 12),
        }
    }

    /// Parts of a weight (`kWeightParts`).
    fn weight_parts(&self) -> usize {
        if self.dtype == DType::F32 { 3 } else { 2 }
    }

    fn kernel(&self, function: &'static str) -> Kernel {
        Kernel {
            file: "projection",
            function,
            size: self.size().0,
            dtype: self.dtype,
        }
    }

    /// Rows of phi that a block holds at once, and their bytes.
    fn stage(&self) -> (usize, usize) {
        let row_bytes = self.size().1 * self.weight_parts() * 16;
        let fitting = (SHARED_BYTES / row_bytes).min(1024);
        let rows = 1 << fitting.ilog2();
        (rows, rows * row_bytes)
    }

    /// Values of a token whose products one block sums. Follows from the shape alone, as the order of
    /// the sums does.
    fn slice(&self) -> usize {
        match self.size().0 {
            "k8" | "k24" | "k32" => self.stage().0,
            // phi passes by in several stages; many slices would cost more than they gain.
            _ => 2048,
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
            Part::per_token(self.hexets() * 4 * words / TILE),
            Part::per_token(self.octets() * 2 * words / TILE),
        ]
    }

    fn d_phi_chunks(&self) -> usize {
        self.octets().div_ceil(PHI_OCTETS)
    }

    fn d_phi_splits(&self) -> usize {
        let blocks = self.width().div_ceil(CHANNELS * WARPS) * self.d_phi_chunks().max(1);
        (D_PHI_BLOCKS / blocks).clamp(1, 32)
    }

    /// The sums of `d_phi` over some tokens each.
    pub fn d_phi_partial(&self) -> Part {
        Part {
            per_token: 0,
            fixed: self.d_phi_splits() * self.width() * self.columns,
        }
    }
}

/// `partial` from x.
pub fn project(
    call: &CheckedCall,
    device: &Device,
    shape: Shape,
    x: u64,
    partial: u64,
) -> Option<Launch> {
    if shape.columns == 0 {
        return None;
    }
    let (stage, shared_bytes) = shape.stage();
    let chunks = shape.octets().div_ceil(shape.size().1);
    let slices = shape.slices();
    let resident = (device.max_shared_bytes as usize / shared_bytes).clamp(1, 2);
    let slots = device.num_sms as usize * resident;
    let most = call.tokens.div_ceil(TILE * WARPS).clamp(1, MAX_ROWS);
    let groups = (slots / (slices * chunks)).clamp(1, most);
    let function = for_rows(shape.c, ["project", "project_unaligned"]);
    Some(Launch {
        kernel: shape.kernel(function),
        grid: [slices as u32, groups as u32, chunks as u32],
        block: (32 * WARPS) as u32,
        cluster: 1,
        shared_bytes: shared_bytes as u32,
        args: vec![
            Arg::Pointer(x),
            Arg::Pointer(call.operand_address("phi")),
            Arg::Pointer(partial),
            Arg::I32(call.tokens as i32),
            Arg::I32(shape.width() as i32),
            Arg::I32(shape.columns as i32),
            Arg::I32(shape.slice() as i32),
            Arg::I32(stage as i32),
        ],
    })
}

/// What pre's backward leaves for the products.
pub struct Factors {
    /// The gradient of m, see [`Shape::fragments`].
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
    /// Whether that is phi too.
    staged: bool,
    shared_bytes: usize,
}

impl Shape {
    /// Of phi for the channels of a warp.
    fn warp_phi_bytes(&self) -> usize {
        self.hexets() * self.weight_parts() * 2048
    }

    fn back_block(&self) -> BackBlock {
        let warp_bytes = self.warp_phi_bytes();
        let staged = warp_bytes <= SHARED_BYTES;
        let warps = if staged {
            (SHARED_BYTES / warp_bytes.max(1)).clamp(1, WARPS)
        } else {
            WARPS
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
        let expected = match self.size().0 {
            "k8" => 2,
            "k24" | "k32" => 4,
            "k80" => 8,
            _ => self.n,
        };
        let exchange = 2 * TILE * CHANNELS * self.dtype.num_bytes();
        let h_res = self.n * TILE * size_of::<f32>();
        let group_bytes = self.n * (self.warp_phi_bytes() + exchange + h_res);
        // A single group may have all that the GPU has.
        let fits = self.n == expected
            && self.n <= WARPS
            && group_bytes <= device.max_shared_bytes as usize;
        let groups = (WARPS / self.n).min(SHARED_BYTES / group_bytes).max(1);
        fits.then_some(BackBlock {
            warps: self.n * groups,
            staged: true,
            shared_bytes: group_bytes * groups,
        })
    }
}

/// The cotangent of the streams that a backward call adds to.
#[derive(Debug, Clone, Copy)]
pub struct DxIn {
    /// Its place; 0 for none.
    pub address: u64,
    /// H_res, whose transpose has yet to be applied, where it is deferred.
    pub h_res: Option<u64>,
}

/// d_x, with `d_x_in`.
pub fn project_back(
    call: &CheckedCall,
    device: &Device,
    shape: Shape,
    x: u64,
    factors: &Factors,
    d_x_in: DxIn,
) -> Vec<Launch> {
    let d_x = call.result_address(call.kind.first_result());
    // H_res^T is applied on the way where that fits, and beforehand where not.
    let mixing = d_x_in.h_res.and_then(|_| shape.mixing_block(device));
    let mix = (d_x_in.h_res)
        .filter(|_| mixing.is_none())
        .map(|h_res| post::mix(call, d_x_in.address, h_res, d_x));
    let address = if mix.is_some() { d_x } else { d_x_in.address };
    let functions = match mixing {
        Some(_) => ["project_back_mixing", "project_back_mixing_unaligned"],
        None => ["project_back", "project_back_unaligned"],
    };
    let block = mixing.unwrap_or_else(|| shape.back_block());
    let BackBlock {
        warps,
        staged,
        shared_bytes,
    } = block;
    let blocks = (shape.n * shape.c.div_ceil(CHANNELS)).div_ceil(warps);
    let registers_allow = if shape.dtype == DType::F32 { 1 } else { 2 } * WARPS / warps;
    let shared_allows = device.max_shared_bytes as usize / shared_bytes.max(1);
    let slots = device.num_sms as usize * registers_allow.min(shared_allows).max(1);
    let most = call.tokens.div_ceil(TILE).clamp(1, MAX_ROWS);
    let groups = (slots / blocks).clamp(1, most);
    let back = Launch {
        kernel: shape.kernel(for_rows(shape.c, functions)),
        grid: [blocks as u32, groups as u32, 1],
        block: (32 * warps) as u32,
        cluster: 1,
        shared_bytes: shared_bytes as u32,
        args: vec![
            Arg::Pointer(x),
            Arg::Pointer(call.operand_address("phi")),
            Arg::Pointer(factors.dm[0]),
            Arg::Pointer(factors.dm[1]),
            Arg::I32(shape.columns as i32),
            Arg::Pointer(factors.h_pre),
            Arg::Pointer(factors.r_factor),
            Arg::Pointer(factors.d_u),
            Arg::Pointer(address),
            Arg::Pointer(d_x_in.h_res.unwrap_or(0)),
            Arg::Pointer(d_x),
            Arg::I32(call.tokens as i32),
            Arg::I32(shape.n as i32),
            Arg::I32(shape.c as i32),
            Arg::I32(i32::from(staged)),
        ],
    };
    mix.into_iter().chain([back]).collect()
}

/// d_phi, by way of `partial`.
pub fn d_phi(call: &CheckedCall, shape: Shape, x: u64, dm: [u64; 2], partial: u64) -> Vec<Launch> {
    if shape.columns == 0 {
        return Vec::new();
    }
    let tiles = call.tokens.div_ceil(TILE);
    let splits = shape.d_phi_splits().min(tiles.max(1));
    let blocks = shape.width().div_ceil(CHANNELS * WARPS);
    let size = shape.width() * shape.columns;
    let function = for_rows(shape.c, ["d_phi", "d_phi_unaligned"]);
    vec![
        Launch {
            kernel: shape.kernel(function),
            grid: [blocks as u32, splits as u32, shape.d_phi_chunks() as u32],
            block: (32 * WARPS) as u32,
            cluster: 1,
            shared_bytes: 0,
            args: vec![
                Arg::Pointer(x),
                Arg::Pointer(dm[0]),
                Arg::Pointer(dm[1]),
                Arg::I32(shape.columns as i32),
                Arg::Pointer(partial),
                Arg::I32(call.tokens as i32),
                Arg::I32(shape.width() as i32),
            ],
        },
        Launch {
            kernel: shape.kernel("sum_d_phi"),
            grid: [size.div_ceil(32 * WARPS) as u32, 1, 1],
            block: (32 * WARPS) as u32,
            cluster: 1,
            shared_bytes: 0,
            args: vec![
                Arg::Pointer(partial),
                Arg::Pointer(call.result_address("d_phi")),
                Arg::I32(splits as i32),
                Arg::I64(size as i64),
            ],
        },
    ]
}

//! Launches of the products with many columns of phi on chips whose warpgroups multiply (warpgroups.cu).

use super::projection::{Factors, sets_of_tiles};
use crate::contract::check::CheckedCall;
use crate::contract::view::DType;
use crate::gpu::device::Device;
use crate::gpu::kernel::Kernel;
use crate::gpu::launch::{Arg, Launch, Tensor, line};
use crate::gpu::tuning::{K288, Size, WARPGROUP_OCTETS};
use crate::gpu::workspace::{Part, TILE, Workspace};

/// Blocks of a cluster.
const CLUSTER: u32 = 2;

/// Values of a line, a step of the sums.
const LINE: usize = 64;

/// Clusters that run at once on a large GPU, and lines of a call with many tokens, for which sums are cut. Constants,
/// because the order of the sums follows from them.
const CLUSTERS_AT_ONCE: usize = 66;
const LINES: usize = 128;

/// More columns than the kernels have that keep phi on the chip.
const LEAST_COLUMNS: usize = 33;

/// Products by warpgroups.
#[derive(Debug, Clone, Copy)]
pub struct Warpgroups {
    dtype: DType,
    n: usize,
    width: usize,
    columns: usize,
    size: &'static Size,
}

impl Warpgroups {
    /// Those of a call, where there are kernels for it on the GPU.
    pub fn of(call: &CheckedCall, device: &Device) -> Option<Self> {
        let octets = call.columns.div_ceil(8) as u32;
        let mut fitting = (WARPGROUP_OCTETS.iter()).filter(|size| size.number >= octets);
        let size = fitting.next().or(WARPGROUP_OCTETS.last())?;
        let kernel = Kernel::find("project_lines", size, call.dtype)?;
        let width = call.n * call.c;
        let fits = width.is_multiple_of(line(call.dtype)) && call.columns >= LEAST_COLUMNS;
        let has_room = device.num_clusters(CLUSTER, 1).is_some();
        (fits && has_room && kernel.is_for(device)).then_some(Self {
            dtype: call.dtype,
            n: call.n,
            width,
            columns: call.columns,
            size,
        })
    }

    fn kernel(&self, function: &'static str) -> Kernel {
        Kernel::of(function, self.size, self.dtype)
    }

    /// Columns of a block, and how many blocks have all of them.
    fn chunks(&self) -> [usize; 2] {
        let columns = self.size.number as usize * 8;
        [columns, self.columns.div_ceil(columns)]
    }

    /// Floats of both parts of all columns for a line.
    fn line_floats(&self) -> usize {
        let [columns, chunks] = self.chunks();
        columns * chunks * LINE
    }

    /// Values of a token whose products one block sums: as many slices as C has times 512 values, so that there is a
    /// block for every multiprocessor where X has 2^27 values, whatever C is.
    pub fn slice(&self) -> usize {
        512 * self.n.min(8)
    }

    /// Splits of the tokens, for sums of d_phi.
    pub fn d_phi_splits(&self) -> usize {
        let clusters = self.channel_clusters() * self.chunks()[1];
        sets_of_tiles(clusters, CLUSTERS_AT_ONCE, LINES).min(32)
    }

    /// Clusters for all channels of d_phi.
    fn channel_clusters(&self) -> usize {
        let channels = CLUSTER as usize * self.kernel("d_phi_lines").more("channels");
        self.width.div_ceil(channels)
    }

    /// Persistent clusters for so many units of work of a cluster.
    fn launch(kernel: Kernel, device: &Device, units: usize, args: Vec<Arg>) -> Launch {
        let clusters = device.num_clusters(CLUSTER, units).unwrap_or(0);
        Launch {
            cluster: CLUSTER,
            ..kernel.launch([(clusters * CLUSTER) as usize, 1, 1], args)
        }
    }

    /// X as boxes of one line, or of several, of so many tokens.
    fn tensor(&self, call: &CheckedCall, x: u64, box_dims: [usize; 2]) -> Arg {
        let dims = [call.tokens, 1, self.width];
        Arg::TensorMap(Tensor::new(x, call.dtype, dims, box_dims))
    }

    /// `partial` from x.
    pub fn project(
        &self,
        call: &CheckedCall,
        device: &Device,
        workspace: &mut dyn Workspace,
        x: u64,
        partial: u64,
    ) -> Vec<Launch> {
        let [columns, chunks] = self.chunks();
        let lines = workspace.take(Part::fixed(self.width / LINE * self.line_floats()));
        let sizes = [self.width, self.columns].map(|number| Arg::I32(number as i32));
        let phi = self.kernel("phi_lines");
        let threads = self.width / 8 * chunks * columns;
        let mut args = vec![
            Arg::Pointer(call.operand_address("phi")),
            Arg::Pointer(lines),
        ];
        args.extend(sizes);
        args.push(Arg::I32(chunks as i32));
        let cut_phi = phi.launch([threads.div_ceil(phi.threads()), 1, 1], args);

        let kernel = self.kernel("project_lines");
        let slices = self.width.div_ceil(self.slice());
        let block_tokens = kernel.tokens() * kernel.more("tiles");
        let cluster_tokens = CLUSTER as usize * block_tokens;
        let units = call.tokens.div_ceil(cluster_tokens) * slices * chunks;
        let mut args = vec![
            self.tensor(call, x, [block_tokens, LINE]),
            Arg::Pointer(lines),
            Arg::Pointer(partial),
            Arg::I32(call.tokens as i32),
        ];
        args.extend(sizes);
        args.extend([self.slice(), chunks].map(|number| Arg::I32(number as i32)));
        vec![cut_phi, Self::launch(kernel, device, units, args)]
    }

    /// Sums for d_phi of some tokens each, as many as are told, and before that r dm as their kernel wants it.
    pub fn d_phi_sums(
        &self,
        call: &CheckedCall,
        device: &Device,
        workspace: &mut dyn Workspace,
        [x, dm]: [u64; 2],
        partial: u64,
    ) -> (Vec<Launch>, usize) {
        let [columns, chunks] = self.chunks();
        let per_token = self.line_floats() / LINE;
        let lines = workspace.take(Part {
            per_token,
            fixed: per_token * (LINE - TILE),
        });
        let groups = call.tokens.div_ceil(LINE);
        let splits = self.d_phi_splits().min(groups);
        let cut = self.kernel("r_dm_lines");
        let threads = groups * chunks * 2 * columns * (LINE / TILE);
        let args = vec![
            Arg::Pointer(dm),
            Arg::Pointer(lines),
            Arg::I32(call.tokens as i32),
            Arg::I32(self.columns as i32),
            Arg::I32(chunks as i32),
        ];
        let cut_dm = cut.launch([threads.div_ceil(cut.threads()), 1, 1], args);

        let kernel = self.kernel("d_phi_lines");
        let units = self.channel_clusters() * splits * chunks;
        let mut args = vec![
            self.tensor(call, x, [LINE, kernel.more("channels")]),
            Arg::Pointer(lines),
            Arg::Pointer(partial),
        ];
        let sizes = [call.tokens, self.width, self.columns, splits, chunks];
        args.extend(sizes.map(|number| Arg::I32(number as i32)));
        (
            vec![cut_dm, Self::launch(kernel, device, units, args)],
            splits,
        )
    }

    /// d_x, to which a cotangent at `added` is added as it is, unless that is 0. None where there are so few columns that
    /// other kernels mix on their way, or no whole groups of channels.
    pub fn project_back(
        &self,
        call: &CheckedCall,
        device: &Device,
        workspace: &mut dyn Workspace,
        x: u64,
        factors: &Factors,
        added: u64,
    ) -> Option<Vec<Launch>> {
        let kernel = Kernel::find("project_back_lines", &K288, self.dtype)?;
        if self.size.number < WARPGROUP_OCTETS[1].number || !call.c.is_multiple_of(LINE) {
            return None;
        }
        let columns = (K288.number as usize * 8).next_multiple_of(LINE);
        let halves = Part::fixed(self.width * columns / 2);
        let [lines, units] = [halves, Part::fixed(self.width / 8)].map(|part| workspace.take(part));
        let phi = Kernel::of("phi_back_lines", &K288, self.dtype);
        let args = vec![
            Arg::Pointer(call.operand_address("phi")),
            Arg::Pointer(lines),
            Arg::Pointer(units),
            Arg::I32(self.width as i32),
            Arg::I32(self.columns as i32),
        ];
        let octets_of_block = phi.threads() / 32;
        let cut_phi = phi.launch([(self.width / 8).div_ceil(octets_of_block), 1, 1], args);

        let blocks = self.width.div_ceil(kernel.more("channels"));
        let tiles = call.tokens.div_ceil(LINE * kernel.threads() / 128);
        let sets = sets_of_tiles(blocks, device.num_sms as usize, tiles);
        let mut args = vec![
            Arg::Pointer(x),
            Arg::Pointer(lines),
            Arg::Pointer(units),
            Arg::Pointer(factors.dm[0]),
            Arg::I32(self.columns as i32),
        ];
        let d_x = call.result_address(call.kind.first_result());
        let streams = [factors.h_pre, factors.of_tokens, factors.d_u, added, d_x];
        args.extend(streams.map(Arg::Pointer));
        args.extend([call.tokens, self.n, call.c].map(|number| Arg::I32(number as i32)));
        let back = kernel.launch([blocks, if tiles > 0 { sets } else { 0 }, 1], args);
        Some(vec![cut_phi, back])
    }
}

//! A compiled kernel: its name, and its row of tuning.rs.

use super::device::Device;
use super::launch::{Arg, Launch};
use super::tuning::{FILES, Size, Target, Tuning};
use crate::contract::view::DType;

/// A kernel: the symbol `mhc_<function>_<size>_<dtype>` of a file in kernels/device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Kernel {
    /// Stem of the file.
    pub file: &'static str,
    /// Name in the file.
    pub function: &'static str,
    /// Name of the size, such as `n4`.
    pub size: &'static str,
    /// Dtype of the streams; float32 where the file has no other.
    pub dtype: DType,
    target: Target,
    tuning: &'static Tuning,
    /// Names of what the tuning has more.
    more: &'static [&'static str],
}

impl Kernel {
    /// The kernel of this name, where tuning.rs has a row for it in this size.
    pub fn find(function: &'static str, size: &'static Size, dtype: DType) -> Option<Self> {
        let tuned = function.strip_suffix("_unaligned").unwrap_or(function);
        let rows = FILES
            .iter()
            .flat_map(|file| file.kernels.iter().map(move |row| (file, row)));
        let mut rows = rows.filter(|(file, row)| {
            let has_dtype = file.dtypes.contains(&dtype.short_name());
            has_dtype && row.function == tuned && row.sizes.contains(size)
        });
        rows.next().map(|(file, tuning)| Self {
            file: file.stem(),
            function,
            size: size.name,
            dtype,
            target: file.target,
            tuning,
            more: file.more,
        })
    }

    /// The kernel of this name, which a schedule knows to be there.
    pub fn of(function: &'static str, size: &'static Size, dtype: DType) -> Self {
        Self::find(function, size, dtype)
            .unwrap_or_else(|| panic!("tuning.rs has no {function} in {}", size.name))
    }

    /// Name in the compiled module.
    pub fn symbol(&self) -> String {
        let Self {
            function,
            size,
            dtype,
            ..
        } = self;
        format!("mhc_{function}_{size}_{}", dtype.short_name())
    }

    /// Whether the kernel is compiled for a GPU that has clusters.
    pub fn is_for(&self, device: &Device) -> bool {
        self.target != Target::Hopper || device.capability == (9, 0)
    }

    /// Tokens of a tile, or of a block without tiles.
    pub fn tokens(&self) -> usize {
        self.tuning.tokens as usize
    }

    /// Buffers for tiles.
    pub fn stages(&self) -> usize {
        self.tuning.stages as usize
    }

    /// Buffers of so many bytes that a block of the GPU has room for: at most those of the row, at least two.
    pub fn stages_within(&self, device: &Device, stage_bytes: usize) -> usize {
        let room = device.max_shared_bytes as usize / stage_bytes;
        room.clamp(2, self.stages())
    }

    /// Threads of a block, at most.
    pub fn threads(&self) -> usize {
        self.tuning.threads as usize
    }

    /// A number that this file has besides, by its name.
    pub fn more(&self, name: &str) -> usize {
        self.find_more(name)
            .unwrap_or_else(|| panic!("tuning.rs: {} has no {name}", self.file))
    }

    /// The same, where the file has it.
    pub fn find_more(&self, name: &str) -> Option<usize> {
        let at = self.more.iter().position(|known| *known == name)?;
        Some(self.tuning.more[at] as usize)
    }

    /// A launch without clusters, with the threads and the shared memory of the row.
    pub fn launch(self, grid: [usize; 3], args: Vec<Arg>) -> Launch {
        Launch {
            kernel: self,
            grid: grid.map(|blocks| blocks as u32),
            block: self.tuning.threads,
            cluster: 1,
            shared_bytes: self.tuning.shared_bytes,
            args,
        }
    }
}

//! The workspace of a call: its parts, which a plan takes one after the other, and its size, which is measured by
//! running the plans on a workspace that only counts.

use super::device::Device;
use super::schedules::schedules;
use crate::Config;
use crate::contract::check::CheckedCall;
use crate::contract::layout::CoefficientLayout;
use crate::contract::limits::{MAX_SINKHORN_ITERS, MAX_STREAMS};
use crate::contract::table::Call;
use crate::contract::view::DType;

/// Tokens that the parts of a workspace are counted in: the largest tile of the kernels.
pub const TILE: usize = 16;

/// Every part starts at a multiple of this many floats.
const ALIGNMENT: usize = 32;

/// An array in the workspace.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Part {
    /// Floats for each token, where tokens are counted in whole tiles.
    pub per_token: usize,
    /// Floats besides.
    pub fixed: usize,
}

impl Part {
    /// A part of this many floats a token.
    pub fn per_token(per_token: usize) -> Self {
        Self {
            per_token,
            fixed: 0,
        }
    }

    /// A part of this many floats, whatever the number of tokens.
    pub fn fixed(fixed: usize) -> Self {
        Self {
            per_token: 0,
            fixed,
        }
    }

    /// A part of this many bytes a token.
    pub fn bytes_per_token(bytes: usize) -> Self {
        Self::per_token(bytes.div_ceil(size_of::<f32>()))
    }

    fn len(&self, tokens: usize) -> usize {
        let len = self.per_token * tokens.next_multiple_of(TILE) + self.fixed;
        len.next_multiple_of(ALIGNMENT)
    }

    /// Room for the part, whatever the number of tokens.
    fn room(&self) -> WorkspaceSize {
        WorkspaceSize {
            per_token: self.per_token,
            fixed: self.fixed + self.per_token * (TILE - 1) + ALIGNMENT - 1,
        }
    }
}

/// A workspace that plans take their memory from.
pub trait Workspace {
    /// Address of the next part.
    fn take(&mut self, part: Part) -> u64;
}

/// The workspace that XLA lends a call.
pub struct Lent {
    next: u64,
    /// End of the workspace.
    end: u64,
    tokens: usize,
}

impl Lent {
    /// The workspace of `call`; an empty one where the call has none.
    pub fn of(call: &CheckedCall) -> Self {
        let (next, len) = call.workspace().unwrap_or((0, 0));
        Self {
            next,
            end: next.saturating_add((len as u64).saturating_mul(size_of::<f32>() as u64)),
            tokens: call.tokens,
        }
    }

    /// Whether all parts that were taken lie in the workspace.
    pub fn is_enough(&self) -> bool {
        self.next <= self.end
    }
}

impl Workspace for Lent {
    fn take(&mut self, part: Part) -> u64 {
        let address = self.next;
        let bytes = (part.len(self.tokens) * size_of::<f32>()) as u64;
        self.next = address.saturating_add(bytes);
        address
    }
}

/// A workspace without memory that counts what is taken.
#[derive(Default)]
pub struct Counted(WorkspaceSize);

impl Workspace for Counted {
    fn take(&mut self, part: Part) -> u64 {
        self.0 = self.0.and(part.room());
        0
    }
}

/// Floats of memory that a call needs besides its results. Linear in the number of tokens, so that it
/// can be a result of a program that is compiled for any number of them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct WorkspaceSize {
    /// For each token.
    pub per_token: usize,
    /// For each call.
    pub fixed: usize,
}

impl WorkspaceSize {
    /// Room for both.
    fn and(self, other: Self) -> Self {
        Self {
            per_token: self.per_token + other.per_token,
            fixed: self.fixed + other.fixed,
        }
    }

    /// Room for either of two.
    fn max(self, other: Self) -> Self {
        Self {
            per_token: self.per_token.max(other.per_token),
            fixed: self.fixed.max(other.fixed),
        }
    }

    /// Number of floats, for at most [`MAX_COUNT`] tokens.
    pub fn len(&self, tokens: usize) -> usize {
        self.per_token * tokens + self.fixed
    }
}

/// The most tokens, and values of a token: kernels count in 32 bits, and look ahead by less than the rest.
pub const MAX_COUNT: usize = 1 << 30;

/// A call as the size of its workspace depends on it: without its tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Problem {
    /// The call.
    pub kind: Call,
    /// Dtype of the streams.
    pub dtype: DType,
    /// Streams.
    pub n: usize,
    /// Channels of one stream.
    pub c: usize,
    /// Columns of phi.
    pub columns: usize,
    /// Iterations of Sinkhorn-Knopp; 0 where there are none.
    pub sinkhorn_iters: usize,
    /// Values of norm_scale; 0 where there are none.
    pub norm_width: usize,
    /// Whether u has weights that are given.
    pub given: bool,
}

impl Problem {
    /// The problem of a call: what it is without its tokens and its memory.
    pub fn of(call: &CheckedCall) -> Self {
        Self {
            kind: call.kind,
            dtype: call.dtype,
            n: call.n,
            c: call.c,
            columns: call.columns,
            sinkhorn_iters: if call.kind.has_config() {
                call.config.sinkhorn_iters
            } else {
                0
            },
            norm_width: call.norm_width,
            given: call.is_given(),
        }
    }

    /// Whether a call can have these sizes. Nothing that plans compute of them overflows then.
    pub fn is_possible(&self) -> bool {
        (1..=MAX_STREAMS).contains(&self.n)
            && (1..=MAX_COUNT / self.n).contains(&self.c)
            && self.columns <= CoefficientLayout::max_num(self.n)
            && self.sinkhorn_iters <= MAX_SINKHORN_ITERS
            && (self.norm_width == 0 || self.norm_width == self.c)
            && !(self.given && self.norm_width > 0)
    }

    /// The call, of no tokens and without memory.
    pub fn call<'a>(&self, config: &'a Config) -> CheckedCall<'a> {
        let sizes = [self.n, self.c, self.columns, self.norm_width];
        CheckedCall::without_memory(self.kind, config, self.dtype, sizes)
    }

    /// The workspace that every schedule of the call finds room in, on any GPU. None where no call has such sizes.
    pub fn workspace(&self) -> Option<WorkspaceSize> {
        if !self.is_possible() {
            return None;
        }
        let config = Config {
            sinkhorn_iters: self.sinkhorn_iters,
            dynamic: self.columns > 0,
            norm: self.norm_width > 0,
            given: self.given,
            ..Config::default()
        };
        // Those who ask know the bytes of an element alone.
        let same_bytes = |dtype: &DType| dtype.num_bytes() == self.dtype.num_bytes();
        let mut most = WorkspaceSize::default();
        for dtype in DType::ALL.into_iter().filter(same_bytes) {
            let call = Self { dtype, ..*self }.call(&config);
            for device in &Device::KINDS {
                for schedule in schedules(&call) {
                    let mut counted = Counted::default();
                    if (schedule.plan)(&call, device, &mut counted).is_some() {
                        most = most.max(counted.0);
                    }
                }
            }
        }
        Some(most)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gpu::tuning::FILES;

    #[test]
    fn parts_fit_into_the_room_for_them() {
        let parts = [Part::per_token(7), Part::fixed(5), Part::bytes_per_token(9)];
        let mut counted = Counted::default();
        for part in parts {
            counted.take(part);
        }
        for tokens in [0, 1, 15, 16, 17, 1000] {
            let end = 4 * counted.0.len(tokens) as u64;
            let mut lent = Lent {
                next: 0,
                end,
                tokens,
            };
            for part in parts {
                assert_eq!(lent.take(part) % 128, 0);
                assert!(lent.is_enough());
            }
            lent.take(Part::fixed(end as usize));
            assert!(end == 0 || !lent.is_enough());
        }
    }

    #[test]
    fn parts_have_whole_tiles_of_every_kernel() {
        let rows = FILES.iter().flat_map(|file| file.kernels);
        for row in rows.filter(|row| row.tokens > 0) {
            assert!(TILE.is_multiple_of(row.tokens as usize), "{}", row.function);
        }
    }
}

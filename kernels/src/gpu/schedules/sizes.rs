//! The compiled size of a kernel that a call takes.

use crate::contract::check::CheckedCall;
use crate::gpu::kernel::Kernel;
use crate::gpu::tuning::{STREAMS, Size};

/// The kernel for the streams of a call.
pub fn kernel(call: &CheckedCall, function: &'static str) -> Kernel {
    Kernel::of(function, streams(call.n, is_aligned(call.c)), call.dtype)
}

/// The same, where tuning.rs has it in this size.
pub fn find_kernel(call: &CheckedCall, function: &'static str) -> Option<Kernel> {
    Kernel::find(function, streams(call.n, is_aligned(call.c)), call.dtype)
}

/// The size of the kernels for n streams of C channels.
pub fn streams(n: usize, is_aligned: bool) -> &'static Size {
    of(STREAMS, n, is_aligned)
}

/// The exact size of a number, or the least bound that has room for it: bounds take rows that are not aligned, too.
pub fn of(sizes: &'static [Size], number: usize, is_aligned: bool) -> &'static Size {
    let mut exact =
        (sizes.iter()).filter(|size| is_aligned && size.is_exact && size.number as usize == number);
    exact.next().unwrap_or_else(|| bound_of(sizes, number))
}

/// The least bound that has room for a number; the last where there is none, whose kernels take such numbers in parts.
pub fn bound_of(sizes: &'static [Size], number: usize) -> &'static Size {
    let mut bounds = sizes.iter().filter(|size| !size.is_exact);
    let last = sizes.last().expect("sizes");
    bounds
        .find(|size| number <= size.number as usize)
        .unwrap_or(last)
}

/// The number of streams that these kernels have room for (`SIZE`).
pub fn streams_bound(n: usize, is_aligned: bool) -> usize {
    streams(n, is_aligned).number as usize
}

/// Whether rows can be read 16 bytes at a time (`aligned` of common.cuh).
pub fn is_aligned(c: usize) -> bool {
    c.is_multiple_of(8)
}

/// The function of a kernel that is there for both kinds of rows.
pub fn for_rows(c: usize, [aligned, unaligned]: [&'static str; 2]) -> &'static str {
    if is_aligned(c) { aligned } else { unaligned }
}

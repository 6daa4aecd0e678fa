//! The compiled size of a kernel that a call takes.

use crate::gpu::tuning::{STREAMS, Size};

/// The size of the kernels for n streams of C channels.
pub fn streams(n: usize, is_aligned: bool) -> &'static Size {
    of(STREAMS, n, is_aligned)
}

/// The exact size of a number, or the bound: that takes all numbers, and rows that are not aligned.
pub fn of(sizes: &'static [Size], number: usize, is_aligned: bool) -> &'static Size {
    let mut exact =
        (sizes.iter()).filter(|size| is_aligned && size.is_exact && size.number as usize == number);
    let bound = || sizes.iter().find(|size| !size.is_exact);
    (exact.next().or_else(bound)).expect("the last size is a bound")
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

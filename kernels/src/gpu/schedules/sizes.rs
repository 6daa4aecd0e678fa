//! Which of the compiled sizes of a kernel a call takes.

/// The size of the kernels for n streams, as the build names it.
pub fn streams_size(n: usize, aligned: bool) -> &'static str {
    match n {
        2 if aligned => "n2",
        4 if aligned => "n4",
        8 if aligned => "n8",
        _ => "any",
    }
}

/// The number of streams that these kernels have room for (`SIZE`).
pub fn streams_bound(n: usize, aligned: bool) -> usize {
    if streams_size(n, aligned) == "any" {
        16
    } else {
        n
    }
}

/// Whether rows can be read 16 bytes at a time (`aligned` of common.cuh).
pub fn is_aligned(c: usize) -> bool {
    c.is_multiple_of(8)
}

/// The symbol of a kernel that is there for both kinds of rows.
pub fn for_rows(c: usize, [aligned, unaligned]: [&'static str; 2]) -> &'static str {
    if is_aligned(c) { aligned } else { unaligned }
}

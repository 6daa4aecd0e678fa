//! Large pages for large results.
//!
//! XLA's CPU client takes fresh memory from the system for results of many megabytes, and gives it back
//! after every call. The first write to each page of 4 KiB then costs more than computing what is
//! written there (docs/performance.md); with pages of 2 MiB it costs nearly nothing.

/// Results smaller than this are not worth a system call.
#[cfg(all(target_os = "linux", not(miri)))]
const LEAST_BYTES: usize = 4 << 20;

#[cfg(all(target_os = "linux", not(miri)))]
const PAGE_BYTES: usize = 2 << 20;

/// Asks the system to back this memory with large pages. Its contents stay as they are.
#[cfg(all(target_os = "linux", not(miri)))]
pub fn advise_large<T>(memory: &mut [T]) {
    let len = size_of_val(memory);
    if len < LEAST_BYTES {
        return;
    }
    let first = memory.as_mut_ptr().cast::<u8>();
    let skip = first.align_offset(PAGE_BYTES);
    let whole = (len - skip) / PAGE_BYTES * PAGE_BYTES;
    // A refusal changes nothing but the speed, so the answer is not looked at.
    // SAFETY: the range lies in `memory` (len >= 2 pages), and the advice changes no contents.
    unsafe { libc::madvise(first.add(skip).cast(), whole, libc::MADV_HUGEPAGE) };
}

/// Other systems have no such advice to take.
#[cfg(not(all(target_os = "linux", not(miri))))]
pub fn advise_large<T>(_memory: &mut [T]) {}

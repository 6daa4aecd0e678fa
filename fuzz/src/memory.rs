//! Memory in which any access outside of a buffer is a crash.

use std::ptr::null_mut;

/// Memory of one buffer of a frame. The pages before and behind are no memory at all.
pub struct Slot {
    /// For reads and writes.
    pub writable: *mut u8,
    /// Address of the memory for reads alone.
    pub read_only: *mut u8,
}

/// Bytes of a slot: all buffers of a frame are as large, or smaller.
pub const SLOT_BYTES: usize = 1 << 20;

/// Slots, as many as a frame has buffers at most.
pub const NUM_SLOTS: usize = 40;

const PAGE: usize = 4096;

impl Slot {
    /// # Errors
    /// The system gives no memory.
    pub fn new() -> std::io::Result<Self> {
        // SAFETY: a new file without a name, of the size that is mapped.
        let file = unsafe { libc::memfd_create(c"jax-mhc-fuzz".as_ptr(), 0) };
        if file < 0 {
            return Err(std::io::Error::last_os_error());
        }
        // SAFETY: the file that was just made.
        let sized = unsafe { libc::ftruncate(file, SLOT_BYTES as libc::off_t) } == 0;
        let map = |protection| {
            // SAFETY: a new range of addresses without memory.
            let range = unsafe {
                let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
                libc::mmap(
                    null_mut(),
                    SLOT_BYTES + 2 * PAGE,
                    libc::PROT_NONE,
                    flags,
                    -1,
                    0,
                )
            };
            if !sized || range == libc::MAP_FAILED {
                return Err(std::io::Error::last_os_error());
            }
            // SAFETY: all but the first and the last page of the range, which nobody else knows of.
            let memory = unsafe {
                let flags = libc::MAP_SHARED | libc::MAP_FIXED;
                libc::mmap(range.byte_add(PAGE), SLOT_BYTES, protection, flags, file, 0)
            };
            if memory == libc::MAP_FAILED {
                return Err(std::io::Error::last_os_error());
            }
            Ok(memory.cast())
        };
        let writable = map(libc::PROT_READ | libc::PROT_WRITE);
        let read_only = map(libc::PROT_READ);
        // SAFETY: ours; the mappings stay.
        unsafe { libc::close(file) };
        Ok(Self {
            writable: writable?,
            read_only: read_only?,
        })
    }

    /// The offset of a buffer that ends where the slot ends, or begins where it begins.
    pub fn offset(num_bytes: usize, at_end: bool) -> usize {
        if at_end { SLOT_BYTES - num_bytes } else { 0 }
    }

    /// Bytes of the slot.
    pub fn bytes(&mut self) -> &mut [u8] {
        // SAFETY: the mapping lives as long as the process, and handlers write it during calls alone.
        unsafe { std::slice::from_raw_parts_mut(self.writable, SLOT_BYTES) }
    }
}

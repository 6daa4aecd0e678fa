//! The board on which a worker tells how far it is, in memory that outlives it: a crash loses nothing.

use std::fs::OpenOptions;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::ptr::null_mut;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// Counts of one worker.
#[repr(C)]
#[derive(Default)]
pub struct Board {
    /// Seed of the frame that is being called.
    pub seed: AtomicU64,
    /// Frames that are done.
    pub frames: AtomicU64,
    /// Calls of handlers.
    pub calls: AtomicU64,
    /// Frames that were answered.
    pub accepted: AtomicU64,
    /// Frames that were refused.
    pub refused: AtomicU64,
    /// Frames that nobody called.
    pub skipped: AtomicU64,
    /// Frames with a finding.
    pub findings: AtomicU64,
}

impl Board {
    /// Maps the file, which it makes where there is none.
    ///
    /// # Errors
    /// The system cannot.
    pub fn open(path: &Path) -> std::io::Result<&'static Self> {
        let file = (OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false))
        .open(path)?;
        file.set_len(size_of::<Self>() as u64)?;
        // SAFETY: a file of the size that is mapped.
        let memory = unsafe {
            let protection = libc::PROT_READ | libc::PROT_WRITE;
            libc::mmap(
                null_mut(),
                size_of::<Self>(),
                protection,
                libc::MAP_SHARED,
                file.as_raw_fd(),
                0,
            )
        };
        if memory == libc::MAP_FAILED {
            return Err(std::io::Error::last_os_error());
        }
        // SAFETY: the mapping stays; numbers of any bits are numbers, and all of them are atomic.
        Ok(unsafe { &*memory.cast::<Self>() })
    }

    /// Adds the counts of another one.
    pub fn add(&self, other: &Self) {
        for (sum, count) in self.counts().into_iter().zip(other.counts()) {
            sum.fetch_add(count.load(Relaxed), Relaxed);
        }
    }

    fn counts(&self) -> [&AtomicU64; 6] {
        let Self {
            frames,
            calls,
            accepted,
            refused,
            skipped,
            findings,
            ..
        } = self;
        [frames, calls, accepted, refused, skipped, findings]
    }
}

//! Device memory mapped into this process: an address and a length for KVM, which nobody here reads or writes.
#![allow(unsafe_code, reason = "mmap and munmap are unsafe by nature")]

use std::io;
use std::num::NonZeroUsize;
use std::os::fd::AsFd;
use std::ptr::NonNull;

use nix::libc::{c_void, off_t};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};

/// A shared mapping; it goes when this is dropped.
#[derive(Debug)]
pub struct Mapping {
    start: NonNull<c_void>,
    size: usize,
}

// SAFETY: a mapping belongs to the process, not to a thread, and this gives out nothing but its address.
unsafe impl Send for Mapping {}
// SAFETY: as above; there is nothing to change.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps `size` bytes of a file from `offset` on, both whole pages.
    ///
    /// # Errors
    /// The kernel's.
    pub fn new(file: impl AsFd, offset: u64, size: u64) -> io::Result<Self> {
        let size = usize::try_from(size).map_err(io::Error::other)?;
        let length = NonZeroUsize::new(size).ok_or(io::ErrorKind::InvalidInput)?;
        let offset = off_t::try_from(offset).map_err(io::Error::other)?;
        let access = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice; no reference to what is in it is ever made.
        let start = unsafe { mmap(None, length, access, MapFlags::MAP_SHARED, file, offset) }?;
        Ok(Self { start, size })
    }

    /// Where it starts.
    #[must_use]
    pub fn address(&self) -> u64 {
        self.start.as_ptr() as u64
    }

    /// Length in bytes.
    #[must_use]
    pub fn size(&self) -> u64 {
        // A usize has 64 bits wherever there is KVM with device memory of this size.
        u64::try_from(self.size).unwrap_or(u64::MAX)
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the mapping is this value's own, and whoever used its address held the value.
        let unmapped = unsafe { munmap(self.start, self.size) };
        if let Err(error) = unmapped {
            tracing::warn!(%error, "device memory stays mapped");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whole_pages_of_a_file_are_mapped() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(3 * 4096).unwrap();
        let mapping = Mapping::new(&file, 4096, 8192).unwrap();
        assert_eq!(mapping.size(), 8192);
        assert_eq!(mapping.address() % 4096, 0);
        for (offset, size) in [(0, 0), (1, 4096), (u64::MAX, 4096), (0, u64::MAX)] {
            assert!(Mapping::new(&file, offset, size).is_err());
        }
    }
}

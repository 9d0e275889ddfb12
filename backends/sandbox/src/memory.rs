//! Guest memory, which is no part of a dump of the process.

#![allow(unsafe_code)] // madvise(2) takes an address.

use std::io;
use std::ptr::NonNull;

use nix::sys::mman::{MmapAdvise, madvise};

/// Leaves a mapping of `len` bytes at `start` out of core dumps (madvise(2), MADV_DONTDUMP). Whole pages only.
///
/// # Errors
/// Nothing is mapped there, or `start` is no multiple of the page size.
pub fn exclude_from_dumps(start: *mut u8, len: usize) -> io::Result<()> {
    let Some(start) = NonNull::new(start.cast()) else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    // SAFETY: this advice changes neither contents nor protection of memory, whatever lies at the address.
    unsafe { madvise(start, len, MmapAdvise::MADV_DONTDUMP) }?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::num::NonZeroUsize;

    use nix::sys::mman::{MapFlags, ProtFlags, mmap_anonymous, munmap};

    use super::*;

    /// The flags of the mapping at `start`, as the kernel writes them (proc_pid_smaps(5), VmFlags).
    fn flags(start: usize) -> String {
        let maps = fs::read_to_string("/proc/self/smaps").unwrap();
        let begin = maps.find(&format!("{start:08x}-")).unwrap();
        let rest = &maps[begin..];
        let flags = rest.lines().find_map(|l| l.strip_prefix("VmFlags:"));
        flags.unwrap().to_owned()
    }

    #[test]
    fn memory_is_left_out_of_dumps() {
        let len = NonZeroUsize::new(1 << 16).unwrap();
        let (prot, map) = (ProtFlags::PROT_READ, MapFlags::MAP_PRIVATE);
        // SAFETY: a new mapping, where nothing is.
        let place = unsafe { mmap_anonymous(None, len, prot, map) }.unwrap();
        let start: *mut u8 = place.as_ptr().cast();
        assert!(!flags(start.addr()).contains(" dd"));
        exclude_from_dumps(start, len.get()).unwrap();
        assert!(flags(start.addr()).contains(" dd"));
        assert!(exclude_from_dumps(start.wrapping_add(1), 4096).is_err());
        // SAFETY: nobody uses the mapping any more.
        unsafe { munmap(place, len.get()) }.unwrap();
    }
}

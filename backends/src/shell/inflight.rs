//! The memory in which a front-end keeps what its back-ends note about requests in flight (vhost-user, "Inflight I/O
//! tracking"), for the back-end that comes after one that died.
//!
//! ```text
//!  first back-end   GET_INFLIGHT_FD: a memfd full of zeroes ──▶ front-end ──▶ SET_INFLIGHT_FD: mapped, rings note there
//!     dies
//!  next back-end                                               front-end ──▶ SET_INFLIGHT_FD: mapped, rings go on from there
//! ```
//!
//! The file is sealed so that its size stays. One that comes from the front-end may be any file: its size is checked, and if it
//! is cut short later that ends the connection, as with guest memory (`torn`).

use std::fs::File;
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use ringside_rings::Inflight;
use thiserror::Error;
use vhost::vhost_user::message::VhostUserInflight;
use vm_memory::mmap::MmapRegionError;
use vm_memory::{Bytes, FileOffset, MmapRegion, VolatileMemory};

use super::memory::page_size;
use super::torn::Guarded;

/// The notes of each queue begin on a cache line of their own.
const ALIGN: usize = 64;
/// `version` in the notes of a queue: zero if nobody has begun them.
const VERSION: usize = 8;

/// Requests in flight cannot be tracked as the front-end wants it.
#[derive(Debug, Error)]
pub enum InflightError {
    /// More queues, or larger ones, than the device has.
    #[error(
        "requests in flight of {queues} queues of size {size} are to be tracked; the device has {count}, up to size {max}"
    )]
    Shape {
        /// Number of queues asked for.
        queues: u16,
        /// Their size.
        size: u16,
        /// Queues of the device.
        count: u16,
        /// The largest size that it serves.
        max: u16,
    },
    /// The memory cannot be had.
    #[error("no memory for requests in flight can be had")]
    Create(#[source] io::Error),
    /// The memory is not where the front-end says.
    #[error(
        "the memory for requests in flight, {len:#x} bytes at offset {offset:#x}, is too small for its queues, or no part of its file, which has {size:#x} bytes"
    )]
    Range {
        /// Length in bytes.
        len: u64,
        /// Offset in the file, which has to be a multiple of the page size.
        offset: u64,
        /// Size of the file in bytes.
        size: u64,
    },
    /// The memory cannot be mapped.
    #[error("cannot map the memory for requests in flight for reading and writing")]
    Map(#[source] MmapRegionError),
    /// Too many mappings are guarded.
    #[error("too many memory regions")]
    TooMany,
    /// A queue that is to be started is not among those tracked, or has no room in the memory.
    #[error(
        "the memory for requests in flight has no room for queue {index} with {size} descriptors"
    )]
    NoRoom {
        /// Number of the queue.
        index: u16,
        /// Its size.
        size: u16,
    },
}

/// Makes memory for so many queues of a size (GET_INFLIGHT_FD), with room for both formats and for queues of `max` descriptors:
/// QEMU lets a driver choose a larger queue than it asked memory for, and SeaBIOS does.
pub(super) fn create(
    queues: u16,
    size: u16,
    max: u16,
) -> Result<(VhostUserInflight, File), InflightError> {
    let each = Inflight::len(max, true).next_multiple_of(ALIGN);
    let len = each.saturating_mul(usize::from(queues));
    let len = u64::try_from(len).unwrap_or(u64::MAX);
    let make = || -> io::Result<File> {
        let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
        let file = File::from(memfd_create(c"ringside-inflight", flags)?);
        file.set_len(len)?;
        let seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL;
        fcntl(&file, FcntlArg::F_ADD_SEALS(seals))?;
        Ok(file)
    };
    let file = make().map_err(InflightError::Create)?;
    Ok((VhostUserInflight::new(len, 0, queues, size), file))
}

/// The notes of all queues of a front-end.
pub(super) struct Notes {
    /// Before `region`, to be dropped first.
    guarded: Guarded,
    region: Arc<MmapRegion>,
    /// What each queue has of it in bytes.
    each: usize,
    queues: u16,
    size: u16,
}

impl Notes {
    /// Maps what the front-end keeps (SET_INFLIGHT_FD).
    pub(super) fn map(area: &VhostUserInflight, file: File) -> Result<Self, InflightError> {
        let (queues, size) = (area.num_queues, area.queue_size);
        let (len, offset) = (area.mmap_size, area.mmap_offset);
        let meta = file.metadata().map_err(InflightError::Create)?;
        let page = u64::try_from(page_size()).unwrap_or(4096);
        // The same in all programs that share it out among the queues by the rules of the protocol.
        let each = usize::try_from(len).unwrap_or(0) / usize::from(queues.max(1)) / ALIGN * ALIGN;
        let fits = offset.checked_add(len).is_some_and(|end| end <= meta.len());
        if !fits || !offset.is_multiple_of(page) || each < Inflight::len(size, false) {
            return Err(InflightError::Range {
                len,
                offset,
                size: meta.len(),
            });
        }
        let all = each.saturating_mul(usize::from(queues));
        let region = MmapRegion::from_file(FileOffset::new(file, offset), all)
            .map_err(InflightError::Map)?;
        let guarded = region
            .file_offset()
            .and_then(|offset| Guarded::new(region.as_ptr().addr(), all, offset.file()))
            .ok_or(InflightError::TooMany)?;
        Ok(Self {
            guarded,
            region: Arc::new(region),
            each,
            queues,
            size,
        })
    }

    /// Those of one queue, which has `size` descriptors.
    pub(super) fn of(
        &self,
        index: u16,
        size: u16,
        packed: bool,
    ) -> Result<Inflight, InflightError> {
        let entries = size.max(self.size);
        if index >= self.queues || Inflight::len(entries, packed) > self.each {
            return Err(InflightError::NoRoom { index, size });
        }
        let offset = self.each.saturating_mul(usize::from(index));
        Ok(Inflight::new(Arc::clone(&self.region), offset, entries))
    }

    /// Forgets what was noted: the driver's queues begin anew.
    pub(super) fn clear(&self) {
        for index in 0..usize::from(self.queues) {
            let at = self.each.saturating_mul(index).saturating_add(VERSION);
            let slice = self.region.as_volatile_slice();
            // It lies in the mapping.
            let _ = slice.store(0_u16, at, Ordering::Release);
        }
    }

    /// The memory, as a front-end describes it, and its file.
    pub(super) fn described(&self) -> Option<(VhostUserInflight, &File)> {
        let offset = self.region.file_offset()?;
        let len = u64::try_from(self.region.size()).ok()?;
        let area = VhostUserInflight::new(len, offset.start(), self.queues, self.size);
        Some((area, offset.file()))
    }

    /// Some of it was taken away by the front-end, or lost by the host.
    pub(super) fn torn(&self) -> bool {
        self.guarded.torn()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(len: u64) -> File {
        let file = tempfile::tempfile().unwrap();
        file.set_len(len).unwrap();
        file
    }

    #[test]
    fn what_is_created_can_be_mapped_and_keeps_its_size() {
        let (area, file) = create(3, 256, 512).unwrap();
        assert_eq!((area.num_queues, area.queue_size), (3, 256));
        assert!(file.set_len(0).is_err());
        let notes = Notes::map(&area, file).unwrap();
        for packed in [false, true] {
            assert!(notes.of(2, 128, packed).is_ok());
            assert!(notes.of(2, 512, packed).is_ok());
            assert!(notes.of(3, 256, packed).is_err());
            assert!(notes.of(2, 32768, packed).is_err());
        }
        notes.clear();
        assert!(!notes.torn());
    }

    #[test]
    fn what_a_front_end_sends_is_checked() {
        let area = |len, offset, queues, size| VhostUserInflight::new(len, offset, queues, size);
        // Enough for a split queue of 16, but not for a packed one.
        let notes = Notes::map(&area(320, 0, 1, 16), file(320)).unwrap();
        assert!(notes.of(0, 16, false).is_ok());
        assert!(notes.of(0, 16, true).is_err());
        for wrong in [
            area(320, 0, 1, 32),
            area(320, 0, 2, 16),
            area(0, 0, 1, 16),
            area(321, 0, 1, 16),
            area(320, 1, 1, 16),
            area(320, 4096, 1, 16),
            area(u64::MAX, 4096, 1, 16),
            area(u64::MAX, 0, 65535, 65535),
        ] {
            assert!(
                Notes::map(&wrong, file(320)).is_err(),
                "{:?}",
                wrong.mmap_size
            );
        }
        let pipe = File::from(nix::unistd::pipe().unwrap().0);
        assert!(Notes::map(&area(320, 0, 1, 16), pipe).is_err());
    }
}

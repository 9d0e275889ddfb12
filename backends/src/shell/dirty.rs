//! The dirty log: a bitmap, in memory of the front-end, of the pages of guest memory that the back-end has written
//! (vhost-user, "Migration"), so that a front-end that moves the guest meanwhile knows what to send again.
//!
//! ```text
//!  worker:     write to guest memory ──▶ set the page's bit ──▶ used ring, whose page is set as well
//!  front-end:  fetch and clear bits ───▶ send these pages, until few are left ──▶ stop the rings ──▶ the last bits
//! ```
//!
//! Guest memory carries the log as vm-memory's bitmap ([`PageLog`]): what is written through vm-memory is marked by it, be it a
//! ring or a buffer. What the kernel or a library writes at an address is to be marked by whoever asked for it, once it is done
//! ([`mark_slices`], [`mark_pieces`]). Memory that is not logged costs each write a look at one word.
//!
//! A ring is given memory that is logged, or memory that is not; both are one mapping.

#![allow(
    unsafe_code,
    reason = "a second view of a mapping: vm-memory has no safe way to give it another bitmap"
)]

use std::fs::File;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use thiserror::Error;
use vhost::vhost_user::message::VhostUserLog;
use vm_memory::bitmap::{Bitmap, BitmapSlice, NewBitmap, WithBitmapSlice};
use vm_memory::mmap::{MmapRegionBuilder, MmapRegionError};
use vm_memory::{
    FileOffset, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, MmapRegion, VolatileMemory,
    VolatileSlice,
};

use super::memory::page_size;
use super::torn::Guarded;

/// Bytes of guest memory that a bit stands for, whatever the host's page size (VHOST_LOG_PAGE).
pub(super) const LOG_PAGE: u64 = 4096;

/// Guest memory as it is mapped into a back-end.
pub type Memory = GuestMemoryMmap<PageLog>;

/// A piece of guest memory as this process sees it.
pub(crate) type GuestSlice<'a> = VolatileSlice<'a, PageSlice<'a>>;

/// The dirty log cannot be used as the front-end describes it.
#[derive(Debug, Error)]
pub enum LogError {
    /// The log is not where the front-end says.
    #[error(
        "the dirty log, {len:#x} bytes at offset {offset:#x}, is empty or no part of its file, which has {size:#x} bytes"
    )]
    Range {
        /// Length in bytes.
        len: u64,
        /// Offset in the file, which has to be a multiple of the page size.
        offset: u64,
        /// Size of the file in bytes.
        size: u64,
    },
    /// The file cannot be examined.
    #[error("cannot examine the file of the dirty log")]
    Stat(#[source] io::Error),
    /// The file cannot be mapped.
    #[error("cannot map the dirty log for reading and writing")]
    Map(#[source] MmapRegionError),
    /// Too many mappings are guarded.
    #[error("too many memory regions")]
    TooMany,
    /// There are pages without a bit.
    #[error("the dirty log covers guest memory up to {covered:#x}, which goes up to {end:#x}")]
    TooShort {
        /// The first guest-physical address without a bit.
        covered: u64,
        /// The first one behind guest memory.
        end: u64,
    },
}

/// The log of one front-end, as it gave it (VHOST_USER_SET_LOG_BASE).
#[derive(Debug)]
pub(super) struct DirtyLog {
    /// Before `bits`, to be dropped first.
    guarded: Guarded,
    bits: MmapRegion,
}

impl DirtyLog {
    /// Maps it.
    pub(super) fn map(log: &VhostUserLog, file: File) -> Result<Self, LogError> {
        let (len, offset) = (log.mmap_size, log.mmap_offset);
        let size = file.metadata().map_err(LogError::Stat)?.len();
        let range = LogError::Range { len, offset, size };
        let page = u64::try_from(page_size()).unwrap_or(4096);
        let fits = offset.checked_add(len).is_some_and(|end| end <= size);
        let (true, Ok(bytes)) = (
            fits && len > 0 && offset.is_multiple_of(page),
            usize::try_from(len),
        ) else {
            return Err(range);
        };
        let bits =
            MmapRegion::from_file(FileOffset::new(file, offset), bytes).map_err(LogError::Map)?;
        let guarded = bits
            .file_offset()
            .and_then(|offset| Guarded::new(bits.as_ptr().addr(), bytes, offset.file()))
            .ok_or(LogError::TooMany)?;
        Ok(Self { guarded, bits })
    }

    /// Its length in bytes, its offset in its file, and that.
    pub(super) fn described(&self) -> Option<(u64, u64, &File)> {
        let offset = self.bits.file_offset()?;
        let len = u64::try_from(self.bits.size()).ok()?;
        Some((len, offset.start(), offset.file()))
    }

    /// Some of it was taken away by the front-end.
    pub(super) fn torn(&self) -> bool {
        self.guarded.torn()
    }

    /// The first guest-physical address that it has no bit for.
    pub(super) fn covered(&self) -> u64 {
        let bytes = u64::try_from(self.bits.size()).unwrap_or(u64::MAX);
        bytes.saturating_mul(8).saturating_mul(LOG_PAGE)
    }

    /// Sets the bits of the pages that hold `len` bytes from guest-physical `start` on.
    #[cold]
    fn mark(&self, start: u64, len: usize) {
        let Some(more) = u64::try_from(len).ok().and_then(|len| len.checked_sub(1)) else {
            return;
        };
        let (first, last) = (start / LOG_PAGE, start.saturating_add(more) / LOG_PAGE);
        let bits = self.bits.as_volatile_slice();
        for byte in first / 8..=last / 8 {
            let from = first.saturating_sub(byte.saturating_mul(8)).min(7);
            let to = last.saturating_sub(byte.saturating_mul(8)).min(7);
            let set = (0xff << from) & (0xff >> (7 - to));
            let place = usize::try_from(byte).unwrap_or(usize::MAX);
            // All of guest memory has its bits.
            if let Ok(byte) = bits.get_atomic_ref::<AtomicU8>(place) {
                // Release: who finds the bit, finds what was written. Always, even if it is set: the front-end may be about
                // to clear it, and to send what the page held before.
                byte.fetch_or(set, Ordering::Release);
            }
        }
    }
}

/// A mapping of guest memory, known to the handler of SIGBUS.
#[derive(Debug)]
pub(super) struct Mapping {
    /// Before `region`, to be dropped first.
    pub(super) guarded: Guarded,
    pub(super) region: MmapRegion,
}

/// What a region of guest memory is logged in, if it is.
#[derive(Debug, Clone, Default)]
pub struct PageLog {
    log: Option<Arc<DirtyLog>>,
    /// Guest-physical address of the region.
    start: u64,
    /// What the region is a view of; without, it is a mapping itself.
    _mapping: Option<Arc<Mapping>>,
}

/// The log of a piece of guest memory.
#[derive(Debug, Clone, Copy)]
pub struct PageSlice<'a> {
    log: Option<&'a DirtyLog>,
    /// Guest-physical address of the piece.
    start: u64,
}

/// Guest-physical address of what lies `offset` bytes behind another.
#[inline]
fn behind(start: u64, offset: usize) -> u64 {
    // Guest memory ends before the address space does.
    start.wrapping_add(u64::try_from(offset).unwrap_or(u64::MAX))
}

impl<'a> WithBitmapSlice<'a> for PageLog {
    type S = PageSlice<'a>;
}

impl Bitmap for PageLog {
    #[inline]
    fn mark_dirty(&self, offset: usize, len: usize) {
        self.slice_at(offset).mark_dirty(0, len);
    }

    /// Whether a write there would be logged. What has been is for the front-end to know.
    fn dirty_at(&self, offset: usize) -> bool {
        self.slice_at(offset).dirty_at(0)
    }

    #[inline]
    fn slice_at(&self, offset: usize) -> PageSlice<'_> {
        PageSlice {
            log: self.log.as_deref(),
            start: behind(self.start, offset),
        }
    }
}

impl NewBitmap for PageLog {
    /// Memory that is not logged.
    fn with_len(_len: usize) -> Self {
        Self::default()
    }
}

impl<'a> WithBitmapSlice<'a> for PageSlice<'_> {
    type S = Self;
}

impl BitmapSlice for PageSlice<'_> {}

impl Bitmap for PageSlice<'_> {
    #[inline]
    fn mark_dirty(&self, offset: usize, len: usize) {
        if let Some(log) = self.log {
            log.mark(behind(self.start, offset), len);
        }
    }

    fn dirty_at(&self, _offset: usize) -> bool {
        self.log.is_some()
    }

    #[inline]
    fn slice_at(&self, offset: usize) -> Self {
        Self {
            log: self.log,
            start: behind(self.start, offset),
        }
    }
}

/// A view of a mapping for guest-physical address `guest`, logged or not. It keeps the mapping.
pub(super) fn view(
    mapping: &Arc<Mapping>,
    guest: u64,
    log: Option<&Arc<DirtyLog>>,
) -> Result<MmapRegion<PageLog>, MmapRegionError> {
    let pages = PageLog {
        log: log.cloned(),
        start: guest,
        _mapping: Some(Arc::clone(mapping)),
    };
    let region = &mapping.region;
    let builder = MmapRegionBuilder::new_with_bitmap(region.size(), pages)
        .with_mmap_prot(region.prot())
        .with_mmap_flags(region.flags());
    // SAFETY: the address and the size are those of a mapping, which the view's bitmap owns a part of: it stays until the
    // view is gone.
    let builder = unsafe { builder.with_raw_mmap_pointer(region.as_ptr()) };
    builder.build()
}

/// Whether writes to guest memory are to be marked.
pub(crate) fn is_logged(memory: &Memory) -> bool {
    memory.iter().any(|region| region.bitmap().dirty_at(0))
}

/// Marks the first `len` bytes of pieces of guest memory as written. For what others wrote, as [`mark_written`].
pub(crate) fn mark_slices(slices: &[GuestSlice<'_>], len: usize) {
    let mut left = len;
    for slice in slices {
        let written = slice.len().min(left);
        slice.bitmap().mark_dirty(0, written);
        left = left.saturating_sub(written);
    }
}

/// The same for the `len` bytes behind the first `skip` of pieces as system calls have them.
#[cold]
pub(crate) fn mark_pieces(memory: &Memory, pieces: &[libc::iovec], skip: usize, len: usize) {
    let (mut skip, mut left) = (skip, len);
    for piece in pieces {
        let gone = skip.min(piece.iov_len);
        let written = left.min(piece.iov_len.saturating_sub(gone));
        if written > 0 {
            let start = piece.iov_base.wrapping_byte_add(gone);
            mark_written(memory, start.cast(), written);
        }
        skip = skip.saturating_sub(gone);
        left = left.saturating_sub(written);
    }
}

/// Marks `len` bytes at `place` in this process as written, as far as they are in guest memory that is logged. For what others
/// wrote: vm-memory marks what it writes.
fn mark_written(memory: &Memory, place: *const u8, len: usize) {
    let found = memory.iter().find_map(|region| {
        let offset = place.addr().checked_sub(region.as_ptr().addr())?;
        (offset < region.size()).then_some((region, offset))
    });
    if let Some((region, offset)) = found {
        region.bitmap().mark_dirty(offset, len);
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;
    use vm_memory::Bytes;

    fn log(pages: u64) -> (File, Arc<DirtyLog>) {
        let file = tempfile::tempfile().unwrap();
        file.set_len(pages / 8).unwrap();
        let log = VhostUserLog::new(pages / 8, 0);
        let mapped = DirtyLog::map(&log, file.try_clone().unwrap()).unwrap();
        (file, Arc::new(mapped))
    }

    /// The pages that are marked; they are cleared.
    fn take(file: &File) -> Vec<u64> {
        let len = file.metadata().unwrap().len();
        let mut bits = vec![0; usize::try_from(len).unwrap()];
        file.read_exact_at(&mut bits, 0).unwrap();
        file.write_all_at(&vec![0; bits.len()], 0).unwrap();
        let numbered = (0..).zip(bits);
        numbered
            .flat_map(|(byte, bits)| {
                (0..8)
                    .filter(move |bit| bits >> bit & 1 == 1)
                    .map(move |bit| byte * 8 + bit)
            })
            .collect()
    }

    #[test]
    fn each_page_of_a_range_is_marked_and_no_other() {
        let (file, log) = log(256);
        for first in 0..40_u64 {
            for pages in 1..40_u64 {
                // Its first page from the last byte on, its last one with the first.
                let start = (first + 1) * LOG_PAGE - 1;
                let len = usize::try_from((pages - 1).saturating_sub(1) * LOG_PAGE).unwrap();
                let len = if pages == 1 { 1 } else { len + 2 };
                log.mark(start, len);
                assert_eq!(take(&file), (first..first + pages).collect::<Vec<_>>());
            }
        }
        log.mark(0, 0);
        log.mark(u64::MAX, 1);
        log.mark(256 * LOG_PAGE, 1);
        assert_eq!(take(&file), Vec::<u64>::new());
    }

    #[test]
    fn what_is_written_through_vm_memory_is_marked_where_it_lies_in_the_guest() {
        let (file, log) = log(64);
        let size = 16 * 4096;
        let region = MmapRegion::new(size).unwrap();
        let guarded = Guarded::new(region.as_ptr().addr(), size, &file).unwrap();
        let mapping = Arc::new(Mapping { guarded, region });
        let memory = |log| {
            let guest = 8 * LOG_PAGE;
            let region = view(&mapping, guest, log).unwrap();
            let region = vm_memory::GuestRegionMmap::new(region, vm_memory::GuestAddress(guest));
            Memory::from_regions(vec![region.unwrap()]).unwrap()
        };
        let (logged, plain) = (memory(Some(&log)), memory(None));
        assert!(is_logged(&logged) && !is_logged(&plain));
        let at = |page: u64| vm_memory::GuestAddress(page * LOG_PAGE);
        logged.write_obj(7_u32, at(9)).unwrap();
        logged.write_slice(&[1; 4097], at(12)).unwrap();
        logged.store(1_u16, at(15), Ordering::Release).unwrap();
        assert_eq!(take(&file), [9, 12, 13, 15]);
        let place = logged.get_host_address(at(20)).unwrap();
        mark_written(&logged, place, 2 * 4096);
        assert_eq!(take(&file), [20, 21]);
        // The same memory, without marks.
        plain.write_obj(8_u32, at(9)).unwrap();
        mark_written(&plain, place, 1);
        assert_eq!(take(&file), Vec::<u64>::new());
        assert_eq!(logged.read_obj::<u32>(at(9)).unwrap(), 8);
        let _: u16 = logged.load(at(15), Ordering::Acquire).unwrap();
        assert_eq!(take(&file), Vec::<u64>::new());
    }
}

//! Pieces of guest memory that make up a chain, and copies from and to them.

use vm_memory::bitmap::MS;
use vm_memory::{
    Address, Bytes, GuestAddress, GuestMemory, GuestMemoryBackend, GuestMemoryRegion, VolatileSlice,
};

use crate::error::SegmentError;

/// One piece of a descriptor chain: a range of guest memory, checked to lie in it.
///
/// A segment may span regions that adjoin in guest address space; take its parts with
/// [`GuestMemory::get_slices`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    /// Guest-physical address of the first byte.
    pub addr: GuestAddress,
    /// Length in bytes, never 0 when it comes from a chain.
    pub len: u32,
}

impl Segment {
    /// A segment of `len` bytes at guest-physical `addr`.
    #[must_use]
    pub const fn new(addr: GuestAddress, len: u32) -> Self {
        Self { addr, len }
    }
}

/// Bytes `addr..addr + len` as this process sees them, if they lie in one region of guest memory and no IOMMU is in between;
/// `None` says only that the long way ([`GuestMemory::get_slices`]) has to be gone. Nearly all of a request is in one
/// region, and that way costs more than all else that is done for a small request.
#[inline]
#[must_use]
pub fn in_one_region<M: GuestMemory>(
    mem: &M,
    addr: GuestAddress,
    len: usize,
) -> Option<VolatileSlice<'_, MS<'_, M::PhysicalMemory>>> {
    let region = mem.physical_memory()?.find_region(addr)?;
    let start = region.to_region_addr(addr)?;
    region.get_slice(start, len).ok()
}

/// Total length of segments in bytes.
#[must_use]
#[inline]
pub fn total_len(segments: &[Segment]) -> u64 {
    segments
        .iter()
        .fold(0, |sum, s| sum.saturating_add(u64::from(s.len)))
}

/// The part of guest memory that holds bytes `offset..offset + len` of the segments, if the first segment has them all, as it
/// has nearly always: a request's header, its status.
#[inline]
fn in_first<'a, M: GuestMemory>(
    mem: &'a M,
    segments: &[Segment],
    offset: u64,
    len: usize,
) -> Option<VolatileSlice<'a, MS<'a, M::PhysicalMemory>>> {
    let first = segments.first()?;
    let end = offset.checked_add(u64::try_from(len).ok()?)?;
    if end > u64::from(first.len) {
        return None;
    }
    in_one_region(mem, first.addr.checked_add(offset)?, len)
}

/// Calls `f` for each piece of bytes `offset..offset + len` of the segments, with the piece's guest
/// address, its place in the range and its length.
#[inline]
fn for_each_piece(
    segments: &[Segment],
    offset: u64,
    len: usize,
    mut f: impl FnMut(GuestAddress, usize, usize) -> Result<(), SegmentError>,
) -> Result<(), SegmentError> {
    let too_short = || SegmentError::TooShort {
        offset,
        len,
        available: total_len(segments),
    };
    let mut skip = offset;
    let mut done = 0_usize;
    for segment in segments {
        if done == len {
            break;
        }
        let room = match u64::from(segment.len).checked_sub(skip) {
            Some(room) if room > 0 => room,
            _ => {
                skip = skip.saturating_sub(u64::from(segment.len));
                continue;
            }
        };
        let wanted = len.saturating_sub(done);
        let piece = usize::try_from(room).map_or(wanted, |room| room.min(wanted));
        let addr = segment.addr.checked_add(skip).ok_or_else(too_short)?;
        f(addr, done, piece)?;
        done = done.saturating_add(piece);
        skip = 0;
    }
    if done == len {
        Ok(())
    } else {
        Err(too_short())
    }
}

/// Copies `out.len()` bytes from the segments, beginning `offset` bytes into them, across their
/// borders: a request header may be split over descriptors in any way (VIRTIO 1.3, 2.7.4).
///
/// # Errors
/// [`SegmentError::TooShort`] if the segments end before the range does (`out` may then be partly
/// filled), [`SegmentError::Memory`] if guest memory cannot be accessed.
#[inline]
pub fn read_segments<M: GuestMemory>(
    mem: &M,
    segments: &[Segment],
    offset: u64,
    out: &mut [u8],
) -> Result<(), SegmentError> {
    if let Some(slice) = in_first(mem, segments, offset, out.len()) {
        slice.copy_to(out);
        return Ok(());
    }
    for_each_piece(segments, offset, out.len(), |addr, at, len| {
        let end = at.saturating_add(len);
        match out.get_mut(at..end) {
            Some(part) => mem
                .read_slice(part, addr)
                .map_err(|source| SegmentError::Memory {
                    addr: addr.0,
                    source,
                }),
            None => Ok(()),
        }
    })
}

/// Copies `data` into the segments, beginning `offset` bytes into them, across their borders.
///
/// # Errors
/// [`SegmentError::TooShort`] if the segments end before the range does (part of `data` may then
/// have been written), [`SegmentError::Memory`] if guest memory cannot be accessed.
#[inline]
pub fn write_segments<M: GuestMemory>(
    mem: &M,
    segments: &[Segment],
    offset: u64,
    data: &[u8],
) -> Result<(), SegmentError> {
    if let Some(slice) = in_first(mem, segments, offset, data.len()) {
        slice.copy_from(data);
        return Ok(());
    }
    for_each_piece(segments, offset, data.len(), |addr, at, len| {
        let end = at.saturating_add(len);
        match data.get(at..end) {
            Some(part) => mem
                .write_slice(part, addr)
                .map_err(|source| SegmentError::Memory {
                    addr: addr.0,
                    source,
                }),
            None => Ok(()),
        }
    })
}

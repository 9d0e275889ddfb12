//! Guest memory as frames are copied from and to it.

use ringside_rings::Segment;
use vm_memory::{GuestAddress, GuestMemory, GuestMemoryBackend, GuestMemoryRegion, Permissions};

use crate::shell::{GuestSlice, Memory};

/// Guest memory with the region that was met last: the next piece mostly lies there, too, and to look regions up costs more than
/// all else that is done for a piece of a short frame.
pub(super) struct Window<'a> {
    memory: &'a Memory,
    /// Guest-physical address of the region.
    start: u64,
    region: Option<GuestSlice<'a>>,
}

impl<'a> Window<'a> {
    pub(super) fn new(memory: &'a Memory) -> Self {
        Self {
            memory,
            start: 0,
            region: None,
        }
    }

    /// Bytes `addr..addr + len`, if they lie in one region.
    #[inline]
    pub(super) fn piece(&mut self, addr: GuestAddress, len: usize) -> Option<GuestSlice<'a>> {
        self.in_region(addr, len).or_else(|| self.find(addr, len))
    }

    #[inline]
    fn in_region(&self, addr: GuestAddress, len: usize) -> Option<GuestSlice<'a>> {
        let offset = addr.0.checked_sub(self.start)?;
        let offset = usize::try_from(offset).ok()?;
        self.region.as_ref()?.subslice(offset, len).ok()
    }

    #[inline(never)]
    fn find(&mut self, addr: GuestAddress, len: usize) -> Option<GuestSlice<'a>> {
        let region = self.memory.find_region(addr)?;
        self.start = region.start_addr().0;
        self.region = region.as_volatile_slice().ok();
        self.in_region(addr, len)
    }

    /// Hands over the first `count` bytes of segments, piece by piece, until one is refused. `false` if one was, or if there are
    /// not as many.
    #[inline]
    pub(super) fn each(
        &mut self,
        segments: &[Segment],
        count: usize,
        mut take: impl FnMut(GuestSlice<'a>) -> bool,
    ) -> bool {
        let mut left = count;
        for segment in segments {
            let len = usize::try_from(segment.len).unwrap_or(usize::MAX).min(left);
            if let Some(piece) = self.piece(segment.addr, len) {
                if !take(piece) {
                    return false;
                }
            } else {
                // Across regions that adjoin.
                let access = Permissions::ReadWrite;
                let slices = GuestMemory::get_slices(self.memory, segment.addr, len, access);
                let Ok(slices) = slices else {
                    return false;
                };
                for slice in slices {
                    if !slice.is_ok_and(&mut take) {
                        return false;
                    }
                }
            }
            left = left.saturating_sub(len);
            if left == 0 {
                break;
            }
        }
        left == 0
    }
}

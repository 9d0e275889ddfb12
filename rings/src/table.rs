//! What descriptors of both formats refer to: buffers, and indirect tables.

use vm_memory::{
    Bytes, GuestAddress, GuestMemory, GuestMemoryBackend, GuestMemoryRegion, Permissions,
    VolatileMemory,
};

use crate::area::SliceOf;
use crate::error::ChainError;
use crate::segment::Segment;

/// Size of one descriptor in bytes, in both formats (VIRTIO 1.3, 2.7.5 and 2.8.13).
pub(crate) const DESC_SIZE: usize = 16;

/// Descriptors that an indirect table may have even if the queue has less. No chain may be longer than its queue (VIRTIO 1.3,
/// 2.7.5.3.1 and 2.8.19), but Linux goes by what the device says of itself, such as `seg_max`, and not by the queue; and a driver
/// may take a request that is returned unserved as done.
const SHORT_QUEUE_TABLE: u16 = 128;

/// The most descriptors that an indirect table of a queue of `size` descriptors may have.
#[inline]
pub(crate) const fn table_limit(size: u16) -> u16 {
    if size > SHORT_QUEUE_TABLE {
        size
    } else {
        SHORT_QUEUE_TABLE
    }
}

/// Offset of descriptor `index` in its table or ring.
#[inline]
pub(crate) const fn desc_offset(index: u16) -> usize {
    (index as usize).wrapping_mul(DESC_SIZE)
}

/// The region of guest memory in which the last buffer lay: the next one mostly lies there too, and to look
/// regions up costs more than all else that is done for a descriptor.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct LastRegion {
    start: u64,
    len: u64,
}

impl LastRegion {
    #[inline]
    fn holds(self, addr: u64, len: u32) -> bool {
        let offset = addr.wrapping_sub(self.start);
        self.len
            .checked_sub(offset)
            .is_some_and(|rest| u64::from(len) <= rest)
    }

    /// Checks the buffer that a descriptor names. `mem` is to be the same each time.
    #[inline]
    pub(crate) fn segment<M: GuestMemory>(
        &mut self,
        mem: &M,
        addr: u64,
        len: u32,
        writable: bool,
    ) -> Result<Segment, ChainError> {
        if len == 0 {
            return Err(ChainError::Empty { addr });
        }
        if !self.holds(addr, len) && !self.look_up(mem, addr, len, writable) {
            return Err(ChainError::NotInMemory { addr, len });
        }
        Ok(Segment::new(GuestAddress(addr), len))
    }

    #[inline(never)]
    fn look_up<M: GuestMemory>(&mut self, mem: &M, addr: u64, len: u32, writable: bool) -> bool {
        let start = GuestAddress(addr);
        if let Some(region) = mem.physical_memory().and_then(|mem| mem.find_region(start)) {
            *self = Self {
                start: region.start_addr().0,
                len: region.len(),
            };
            if self.holds(addr, len) {
                return true;
            }
        }
        let access = if writable {
            Permissions::Write
        } else {
            Permissions::Read
        };
        usize::try_from(len).is_ok_and(|len| mem.check_range(start, len, access))
    }
}

/// An indirect table, which may be at any address.
pub(crate) enum Table<'a, M: GuestMemory> {
    /// In one piece of this process's memory.
    Whole(SliceOf<'a, M>),
    /// Across regions mapped apart.
    Scattered(GuestAddress),
}

impl<'a, M: GuestMemory> Table<'a, M> {
    /// Finds the table of `len` bytes at `addr`, and how many descriptors it has: at most `limit`.
    pub(crate) fn find(
        mem: &'a M,
        addr: u64,
        len: u32,
        limit: u16,
    ) -> Result<(Self, u16), ChainError> {
        let bytes = usize::try_from(len).map_err(|_| ChainError::IndirectLength { len, limit })?;
        let entries = match u16::try_from(bytes / DESC_SIZE) {
            Ok(n) if n > 0 && n <= limit && desc_offset(n) == bytes => n,
            _ => return Err(ChainError::IndirectLength { len, limit }),
        };
        let unreadable = |source| ChainError::IndirectRead { addr, source };
        let start = GuestAddress(addr);
        let mut slices = mem
            .get_slices(start, bytes, Permissions::Read)
            .map_err(unreadable)?;
        match slices.next() {
            Some(Ok(slice)) if slice.len() == bytes => Ok((Self::Whole(slice), entries)),
            Some(Err(e)) => Err(unreadable(e)),
            _ => {
                for slice in slices {
                    slice.map_err(unreadable)?;
                }
                Ok((Self::Scattered(start), entries))
            }
        }
    }

    /// Reads the two words of descriptor `index`, in host byte order.
    #[inline]
    pub(crate) fn words(&self, mem: &M, index: u16) -> Result<(u64, u64), ChainError> {
        match self {
            Self::Whole(slice) => {
                let offset = desc_offset(index);
                let word = |offset| {
                    let word = slice.get_ref::<u64>(offset);
                    word.map(|word| u64::from_le(word.load()))
                        .map_err(|source| ChainError::IndirectAccess { index, source })
                };
                Ok((word(offset)?, word(offset.wrapping_add(8))?))
            }
            Self::Scattered(table) => scattered_words(mem, *table, index),
        }
    }
}

#[cold]
fn scattered_words<M: GuestMemory>(
    mem: &M,
    table: GuestAddress,
    index: u16,
) -> Result<(u64, u64), ChainError> {
    let addr = table.0.wrapping_add(u64::from(index).wrapping_mul(16));
    let mut bytes = [0; DESC_SIZE];
    mem.read_slice(&mut bytes, GuestAddress(addr))
        .map_err(|source| ChainError::IndirectRead { addr, source })?;
    let [a0, a1, a2, a3, a4, a5, a6, a7, rest @ ..] = bytes;
    let addr = u64::from_le_bytes([a0, a1, a2, a3, a4, a5, a6, a7]);
    Ok((addr, u64::from_le_bytes(rest)))
}

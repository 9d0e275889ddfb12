//! Scatter/gather lists in guest memory, and the system calls that move a packet between them and a
//! descriptor without a copy in between.
#![allow(
    unsafe_code,
    reason = "readv and writev on guest memory: no safe wrapper takes memory that a guest may write meanwhile"
)]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;

use ringside_rings::Segment;
use vm_memory::{
    Bytes, GuestAddress, GuestMemory, GuestMemoryBackend, GuestMemoryRegion, MemoryRegionAddress,
    Permissions, VolatileMemory, VolatileSlice,
};

use crate::shell::{Memory, is_logged, mark_pieces, prefetch_to_write};

/// Most pieces that one system call takes (UIO_MAXIOV).
const MAX_PIECES: usize = 1024;

/// How messages are sent: without waiting, and with an error in place of a signal when nobody is left to take them.
const SEND_FLAGS: libc::c_int = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;

/// A chain could not be appended.
#[derive(Debug)]
pub(super) enum AppendError {
    /// More pieces than one system call takes.
    TooManyPieces,
    /// Guest memory has no such range.
    NotInMemory,
}

/// A region of guest memory, as the list met it last: looking one up costs more than all else that is done for a piece.
#[derive(Debug, Clone, Copy)]
struct Region {
    /// Guest-physical address of its first byte.
    start: u64,
    len: u64,
    /// Where that is in this process.
    base: *mut libc::c_void,
}

impl Region {
    /// The region around `addr`.
    fn find(memory: &Memory, addr: GuestAddress) -> Option<Self> {
        let region = memory.find_region(addr)?;
        let base = region.get_host_address(MemoryRegionAddress(0)).ok()?;
        Some(Self {
            start: region.start_addr().0,
            len: region.len(),
            base: base.cast(),
        })
    }

    /// The piece that `segment` is, if this region has all of it.
    #[inline]
    fn piece(&self, segment: &Segment) -> Option<libc::iovec> {
        let offset = segment.addr.0.checked_sub(self.start)?;
        let rest = self.len.checked_sub(offset)?;
        if u64::from(segment.len) > rest {
            return None;
        }
        Some(libc::iovec {
            iov_base: self.base.wrapping_byte_add(usize::try_from(offset).ok()?),
            iov_len: usize::try_from(segment.len).ok()?,
        })
    }
}

/// Pieces of guest memory in order, seen as one row of bytes.
///
/// Pieces are appended behind and taken away in front. It owns a reference to the memory, so that
/// each piece stays mapped as long as the list exists.
pub(super) struct IoList {
    memory: Arc<Memory>,
    pieces: Vec<libc::iovec>,
    /// For calls whose pieces are not a part of `pieces`: empty between calls, and without memory before the first one.
    scratch: Vec<libc::iovec>,
    /// Pieces before this one were taken away.
    start: usize,
    /// Two places of a system call are kept free for pieces that are not guest memory.
    limit: usize,
    /// Of `memory`.
    last: Option<Region>,
    /// What is written to `memory` is to be marked.
    logged: bool,
}

// SAFETY: the pointers lead into memory that the list itself keeps mapped; they mean the same in each thread.
unsafe impl Send for IoList {}

impl IoList {
    /// An empty list over `memory`; it allocates here and never again.
    pub(super) fn new(memory: Arc<Memory>) -> Self {
        Self {
            logged: is_logged(&memory),
            memory,
            // Taking away in front then rarely moves what is left.
            pieces: Vec::with_capacity(2 * MAX_PIECES),
            scratch: Vec::new(),
            start: 0,
            limit: MAX_PIECES.saturating_sub(2),
            last: None,
        }
    }

    /// All pieces.
    pub(super) fn live(&self) -> &[libc::iovec] {
        self.pieces.get(self.start..).unwrap_or_default()
    }

    /// Number of pieces.
    pub(super) fn len(&self) -> usize {
        self.pieces.len().saturating_sub(self.start)
    }

    /// Takes everything away.
    pub(super) fn clear(&mut self) {
        self.pieces.clear();
        self.start = 0;
    }

    /// Appends segments and returns how many pieces they are: one each, more across memory regions. On
    /// failure the list is as before.
    #[inline]
    pub(super) fn append(
        &mut self,
        segments: &[Segment],
        access: Permissions,
    ) -> Result<usize, AppendError> {
        // A short packet, and most buffers that are received into. A spill piece has room behind it.
        if let [segment] = segments
            && let Some(piece) = self.last.as_ref().and_then(|region| region.piece(segment))
            && self.len() < self.limit
            && self.pieces.len().saturating_add(1) < self.pieces.capacity()
        {
            self.pieces.push(piece);
            return Ok(1);
        }
        self.append_several(segments, access)
    }

    #[inline(never)]
    fn append_several(
        &mut self,
        segments: &[Segment],
        access: Permissions,
    ) -> Result<usize, AppendError> {
        if self.start > 0 && self.pieces.capacity() - self.pieces.len() < MAX_PIECES {
            self.pieces.drain(..self.start);
            self.start = 0;
        }
        let before = self.pieces.len();
        let result = self.append_all(segments, access);
        if result.is_err() {
            self.pieces.truncate(before);
        }
        result.map(|()| self.pieces.len().saturating_sub(before))
    }

    fn append_all(&mut self, segments: &[Segment], access: Permissions) -> Result<(), AppendError> {
        let Self {
            memory,
            pieces,
            start,
            limit,
            last,
            scratch: _,
            logged: _,
        } = self;
        let mut push = |piece| {
            if pieces.len().saturating_sub(*start) >= *limit {
                return Err(AppendError::TooManyPieces);
            }
            pieces.push(piece);
            Ok(())
        };
        for segment in segments {
            let known = last.and_then(|region| region.piece(segment));
            let piece = known.or_else(|| {
                *last = Region::find(memory, segment.addr);
                last.and_then(|region| region.piece(segment))
            });
            if let Some(piece) = piece {
                push(piece)?;
                continue;
            }
            let len = usize::try_from(segment.len).unwrap_or(usize::MAX);
            let slices = GuestMemory::get_slices(memory.as_ref(), segment.addr, len, access)
                .map_err(|_| AppendError::NotInMemory)?;
            for slice in slices {
                let slice = slice.map_err(|_| AppendError::NotInMemory)?;
                push(libc::iovec {
                    iov_base: slice.ptr_guard_mut().as_ptr().cast(),
                    iov_len: slice.len(),
                })?;
            }
        }
        Ok(())
    }

    /// Takes the first `count` pieces away.
    pub(super) fn consume(&mut self, count: usize) {
        self.start = self.start.saturating_add(count).min(self.pieces.len());
        if self.start == self.pieces.len() {
            self.clear();
        }
    }

    /// Writes all pieces as one packet.
    pub(super) fn write_to(&self, fd: BorrowedFd<'_>) -> io::Result<usize> {
        let live = self.live();
        let fd = fd.as_raw_fd();
        let done = if let [piece] = live {
            // SAFETY: the piece was taken from `memory`, which this list keeps mapped; the kernel only reads.
            unsafe { libc::write(fd, piece.iov_base, piece.iov_len) }
        } else {
            let count = libc::c_int::try_from(live.len()).unwrap_or(libc::c_int::MAX);
            // SAFETY: as above, for each piece.
            unsafe { libc::writev(fd, live.as_ptr(), count) }
        };
        usize::try_from(done).map_err(|_| io::Error::last_os_error())
    }

    /// Reads one packet into the first `count` pieces, and what does not fit there into `spill`. Returns the
    /// length of both.
    pub(super) fn read_from(
        &mut self,
        fd: BorrowedFd<'_>,
        count: usize,
        spill: &mut [u8],
    ) -> io::Result<usize> {
        let count = count.min(self.len());
        let end = self.start.saturating_add(count);
        let tail = libc::iovec {
            iov_base: spill.as_mut_ptr().cast(),
            iov_len: spill.len(),
        };
        // The spill piece stands in the list during the call only.
        let displaced = match self.pieces.get_mut(end) {
            Some(place) => Some(std::mem::replace(place, tail)),
            None => {
                self.pieces.push(tail);
                None
            }
        };
        let live = self.live();
        let pieces = count.saturating_add(1).min(live.len());
        let pieces = libc::c_int::try_from(pieces).unwrap_or(libc::c_int::MAX);
        // SAFETY: the first `count` pieces were taken from `memory`, which this list keeps mapped; the last
        // is `spill`, borrowed for the call. Only the guest's driver shares the former.
        let done = unsafe { libc::readv(fd.as_raw_fd(), live.as_ptr(), pieces) };
        let result = usize::try_from(done).map_err(|_| io::Error::last_os_error());
        match (displaced, self.pieces.get_mut(end)) {
            (Some(piece), Some(place)) => *place = piece,
            _ => self.pieces.truncate(end),
        }
        if let Ok(len) = result {
            self.wrote(0, len, count);
        }
        result
    }

    /// Marks bytes `offset..offset + len` as written, as far as they are in the first `count` pieces.
    #[inline]
    fn wrote(&self, offset: usize, len: usize, count: usize) {
        if self.logged {
            let live = self.live();
            let pieces = live.get(..count).unwrap_or(live);
            mark_pieces(&self.memory, pieces, offset, len);
        }
    }

    /// Marks the first `len` bytes of `count` pieces behind the first `skip` as written.
    #[inline]
    pub(super) fn wrote_pieces(&self, skip: usize, count: usize, len: usize) {
        if self.logged {
            let behind = self.live().get(skip..).unwrap_or_default();
            let pieces = behind.get(..count).unwrap_or(behind);
            mark_pieces(&self.memory, pieces, 0, len);
        }
    }

    /// Sends `front`, and behind it all bytes from byte `skip` on, as one message or a piece of a stream. Returns how much went
    /// out, `front` included.
    pub(super) fn send_behind(
        &mut self,
        fd: BorrowedFd<'_>,
        front: &[u8],
        skip: usize,
    ) -> io::Result<usize> {
        self.gather(iovec_of(front), skip, usize::MAX);
        let message = message(&mut self.scratch);
        // SAFETY: each piece but the first was taken from `memory`, which this list keeps mapped; the first is `front`, borrowed
        // for the call. The kernel only reads. The message lives until after the call.
        let done = unsafe { libc::sendmsg(fd.as_raw_fd(), &raw const message, SEND_FLAGS) };
        self.scratch.clear();
        usize::try_from(done).map_err(|_| io::Error::last_os_error())
    }

    /// Reads one packet: its first bytes into `front`, the next ones into the first `count` pieces from byte `skip` on, and
    /// what does not fit there into `spill`. Returns the length of all of it.
    pub(super) fn read_behind(
        &mut self,
        fd: BorrowedFd<'_>,
        front: &mut [u8],
        skip: usize,
        count: usize,
        spill: &mut [u8],
    ) -> io::Result<usize> {
        let skipped = skip.min(self.room(count));
        self.gather(iovec_of_mut(front), skipped, count);
        // What is skipped and not in the pieces is in the spill.
        let spill = spill.get_mut(skip - skipped..).unwrap_or_default();
        self.scratch.push(iovec_of_mut(spill));
        let pieces = libc::c_int::try_from(self.scratch.len()).unwrap_or(libc::c_int::MAX);
        // SAFETY: the first piece is `front` and the last one `spill`, both borrowed for the call; the others were taken from
        // `memory`, which this list keeps mapped. Only the guest's driver shares those.
        let done = unsafe { libc::readv(fd.as_raw_fd(), self.scratch.as_ptr(), pieces) };
        let result = usize::try_from(done).map_err(|_| io::Error::last_os_error());
        self.scratch.clear();
        if let Ok(len) = result {
            self.wrote(skipped, len.saturating_sub(front.len()), count);
        }
        result
    }

    /// Bytes of all pieces.
    pub(super) fn bytes(&self) -> usize {
        self.room(usize::MAX)
    }

    /// Bytes of the first `count` pieces.
    fn room(&self, count: usize) -> usize {
        let live = self.live().iter().take(count);
        live.fold(0, |room: usize, piece| room.saturating_add(piece.iov_len))
    }

    /// Puts `front` and the first `count` pieces from byte `skip` on into `scratch`.
    fn gather(&mut self, front: libc::iovec, skip: usize, count: usize) {
        let Self {
            pieces,
            scratch,
            start,
            ..
        } = self;
        // Room for the front and for the spill; it allocates in the first call only.
        scratch.reserve(MAX_PIECES.saturating_add(1));
        scratch.push(front);
        let mut skip = skip;
        for piece in pieces.get(*start..).unwrap_or_default().iter().take(count) {
            let gone = skip.min(piece.iov_len);
            skip -= gone;
            if gone < piece.iov_len {
                scratch.push(libc::iovec {
                    iov_base: piece.iov_base.wrapping_byte_add(gone),
                    iov_len: piece.iov_len - gone,
                });
            }
        }
    }

    /// Puts `data` at byte `offset` of the first `count` pieces, and what does not fit there into `spill`, as if that lay
    /// behind them. `false` if `spill` is too short.
    // As of `accept` in `rx`.
    #[inline(always)]
    pub(super) fn deliver(
        &self,
        offset: usize,
        data: &[u8],
        count: usize,
        spill: &mut [u8],
    ) -> bool {
        if count > 0
            && let Some(slice) = self.in_first(offset, data.len())
        {
            prefetch_to_write(slice.ptr_guard_mut().as_ptr(), slice.len());
            slice.copy_from(data);
            self.wrote(offset, data.len(), count);
            return true;
        }
        self.deliver_parts(offset, data, count, spill)
    }

    /// The same of data that does not fit the first piece.
    #[inline(never)]
    fn deliver_parts(&self, offset: usize, data: &[u8], count: usize, spill: &mut [u8]) -> bool {
        let room = self.room(count);
        let fits = room.saturating_sub(offset).min(data.len());
        let (inside, outside) = data.split_at_checked(fits).unwrap_or((data, &[]));
        let start = offset.saturating_sub(room);
        let place = spill.get_mut(start..start.saturating_add(outside.len()));
        if let Some(place) = place {
            place.copy_from_slice(outside);
            inside.is_empty() || self.copy_in(offset, inside)
        } else {
            false
        }
    }

    /// Copies what lies from byte `offset` on: in the first `count` pieces, and then in `spill`. `false` if both end before.
    pub(super) fn collect(
        &self,
        offset: usize,
        out: &mut [u8],
        count: usize,
        spill: &[u8],
    ) -> bool {
        let room = self.room(count);
        let fits = room.saturating_sub(offset).min(out.len());
        let (inside, outside) = out.split_at_mut(fits);
        let start = offset.saturating_sub(room);
        let Some(place) = spill.get(start..start.saturating_add(outside.len())) else {
            return false;
        };
        outside.copy_from_slice(place);
        inside.is_empty() || self.copy_out(offset, inside)
    }

    /// Copies `data` to byte `offset` of the row. `false` if the row ends before.
    // In line it would take registers from those who hardly ever need it.
    #[inline(never)]
    pub(super) fn copy_in(&self, offset: usize, data: &[u8]) -> bool {
        if let Some(slice) = self.in_first(offset, data.len()) {
            slice.copy_from(data);
            self.wrote(offset, data.len(), 1);
            return true;
        }
        let whole = self.each_part(offset, data.len(), |slice, at| {
            let part = data.get(at..).unwrap_or_default();
            slice.write(part, 0).unwrap_or(0)
        });
        self.wrote(offset, data.len(), usize::MAX);
        whole
    }

    /// Puts a number at byte `offset` of the row, as it lies in memory. `false` if the row ends before.
    // As of `accept` in `rx`.
    #[inline(always)]
    pub(super) fn put_u16(&self, offset: usize, number: u16) -> bool {
        let bytes = number.to_le_bytes();
        let Some(slice) = self.in_first(offset, bytes.len()) else {
            return self.copy_in(offset, &bytes);
        };
        if let Ok(place) = slice.get_ref::<[u8; 2]>(0) {
            place.store(bytes);
        }
        self.wrote(offset, bytes.len(), 1);
        true
    }

    /// The first two bytes of the row; none if it is shorter.
    // As of `accept` in `rx`.
    #[inline(always)]
    pub(super) fn first_two(&self) -> Option<[u8; 2]> {
        if let Some(slice) = self.in_first(0, 2) {
            return slice.get_ref(0).ok().map(|place| place.load());
        }
        let mut bytes = [0; 2];
        self.copy_out(0, &mut bytes).then_some(bytes)
    }

    /// Copies from byte `offset` of the row to `out`. `false` if the row ends before.
    // As above.
    #[inline(never)]
    pub(super) fn copy_out(&self, offset: usize, out: &mut [u8]) -> bool {
        let len = out.len();
        if let Some(slice) = self.in_first(offset, len) {
            slice.copy_to(out);
            return true;
        }
        self.each_part(offset, len, |slice, at| {
            let part = out.get_mut(at..).unwrap_or_default();
            slice.read(part, 0).unwrap_or(0)
        })
    }

    /// Bytes `offset..offset + len` of the row, if the first piece has them all, as it has nearly all headers and most packets.
    #[inline]
    fn in_first(&self, offset: usize, len: usize) -> Option<VolatileSlice<'_>> {
        let first = self.live().first()?;
        if offset.checked_add(len)? > first.iov_len {
            return None;
        }
        // SAFETY: the piece was taken from `memory`, which outlives this borrow.
        let slice = unsafe { VolatileSlice::new(first.iov_base.cast(), first.iov_len) };
        slice.subslice(offset, len).ok()
    }

    /// Calls `copy` with each piece of memory from byte `offset` on and the number of bytes copied so
    /// far, until it has copied `len` bytes.
    fn each_part(
        &self,
        offset: usize,
        len: usize,
        mut copy: impl FnMut(VolatileSlice<'_>, usize) -> usize,
    ) -> bool {
        let mut skip = offset;
        let mut done = 0;
        for piece in self.live() {
            if done >= len {
                break;
            }
            if skip >= piece.iov_len {
                skip -= piece.iov_len;
                continue;
            }
            // SAFETY: the piece was taken from `memory`, which outlives this borrow.
            let slice = unsafe { VolatileSlice::new(piece.iov_base.cast(), piece.iov_len) };
            if let Ok(rest) = slice.offset(skip) {
                done += copy(rest, done);
            }
            skip = 0;
        }
        done >= len
    }
}

fn iovec_of(bytes: &[u8]) -> libc::iovec {
    libc::iovec {
        iov_base: bytes.as_ptr().cast_mut().cast(),
        iov_len: bytes.len(),
    }
}

fn iovec_of_mut(bytes: &mut [u8]) -> libc::iovec {
    libc::iovec {
        iov_base: bytes.as_mut_ptr().cast(),
        iov_len: bytes.len(),
    }
}

/// A message without address and control data.
fn message(pieces: &mut [libc::iovec]) -> libc::msghdr {
    libc::msghdr {
        msg_name: std::ptr::null_mut(),
        msg_namelen: 0,
        msg_iov: pieces.as_mut_ptr(),
        msg_iovlen: pieces.len(),
        msg_control: std::ptr::null_mut(),
        msg_controllen: 0,
        msg_flags: 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixDatagram;

    fn list() -> IoList {
        // Two regions that adjoin.
        let ranges = [(GuestAddress(0), 0x1000), (GuestAddress(0x1000), 0x1000)];
        IoList::new(Arc::new(Memory::from_ranges(&ranges).unwrap()))
    }

    fn segment(addr: u64, len: u32) -> Segment {
        Segment::new(GuestAddress(addr), len)
    }

    #[test]
    fn a_segment_across_regions_is_two_pieces() {
        let mut list = list();
        assert_eq!(
            list.append(&[segment(0xff0, 0x20)], Permissions::Write)
                .unwrap(),
            2
        );
        assert!(list.copy_in(0xe, &[1, 2, 3, 4]));
        let mut out = [0; 4];
        list.memory
            .read_slice(&mut out, GuestAddress(0xffe))
            .unwrap();
        assert_eq!(out, [1, 2, 3, 4]);
        let mut out = [0; 4];
        assert!(list.copy_out(0xe, &mut out));
        assert_eq!(out, [1, 2, 3, 4]);
        assert!(!list.copy_in(0x1e, &[0; 4]));
    }

    #[test]
    fn what_cannot_be_appended_leaves_no_trace() {
        let mut list = list();
        let bad = [segment(0, 16), segment(0x1ff0, 0x20)];
        assert!(matches!(
            list.append(&bad, Permissions::Read),
            Err(AppendError::NotInMemory)
        ));
        assert_eq!(list.len(), 0);
        let many = vec![segment(0, 1); MAX_PIECES];
        assert!(matches!(
            list.append(&many, Permissions::Read),
            Err(AppendError::TooManyPieces)
        ));
        assert_eq!(list.len(), 0);
    }

    #[test]
    fn packets_move_through_and_excess_goes_to_the_spill() {
        let (a, b) = UnixDatagram::pair().unwrap();
        let mut list = list();
        list.append(
            &[segment(0, 3), segment(0x100, 3), segment(0x200, 8)],
            Permissions::Write,
        )
        .unwrap();
        a.send(b"abcdefghij").unwrap();
        let mut spill = [0; 8];
        assert_eq!(list.read_from(b.as_fd(), 2, &mut spill).unwrap(), 10);
        assert_eq!(&spill[..4], b"ghij");
        assert_eq!(list.len(), 3);
        let mut out = [0; 6];
        assert!(list.copy_out(0, &mut out));
        assert_eq!(&out, b"abcdef");
        list.consume(1);
        assert_eq!(list.write_to(b.as_fd()).unwrap(), 11);
        let mut out = [0; 16];
        assert_eq!(a.recv(&mut out).unwrap(), 11);
        assert_eq!(&out[..3], b"def");
        list.consume(2);
        assert_eq!(list.len(), 0);
    }

    #[test]
    fn a_list_that_is_refilled_for_ever_does_not_grow() {
        let mut list = list();
        let capacity = list.pieces.capacity();
        for i in 0..10_000_u64 {
            list.append(&[segment(i % 64, 1), segment(64, 1)], Permissions::Write)
                .unwrap();
            if i >= 100 {
                list.consume(2);
            }
        }
        assert_eq!(list.pieces.capacity(), capacity);
        assert_eq!(list.len(), 200);
    }
}

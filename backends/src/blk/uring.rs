//! The io_uring of one worker, on guest memory: the only place of the disk back-end that needs `unsafe`.
//!
//! What makes it sound is kept here and not in the caller's care: iovecs point into a [`Memory`] that this
//! structure holds, a slot cannot be touched while the kernel has it, and neither guest memory nor buffers are let go
//! before all I/O has ended, not even when the worker panics.

#![allow(unsafe_code)] // Submission entries carry raw pointers; copies to and from the bounce buffer.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::ptr;
use std::sync::Arc;
use std::time::Duration;

use io_uring::squeue::Entry;
use io_uring::types::{Fd, Fixed, FsyncFlags, SubmitArgs, Timespec};
use io_uring::{IoUring, cqueue, opcode};
use ringside_rings::{Segment, in_one_region};
use thiserror::Error;
use tracing::{debug, warn};
use vm_memory::{GuestMemory, GuestMemoryBackend, GuestMemoryRegion, MmapRegion, Permissions};

use crate::shell::{
    GuestSlice, IORING_REGISTER_BUFFERS, IORING_REGISTER_FILES, IORING_UNREGISTER_BUFFERS, Memory,
    is_logged, mark_pieces, restricted,
};

/// Most iovecs in one submission (the kernel's UIO_MAXIOV), and most that one request may need.
pub(super) const MAX_IOVECS: usize = 1024;
/// Most bytes in one registered buffer (io_uring_register(2), IORING_REGISTER_BUFFERS).
const MAX_REGISTERED: usize = 1 << 30;
/// Size of the bounce buffer, and of the buffer that zeroes are written from.
const BUFFER: usize = 1 << 20;
/// The disk's place among the ring's registered files.
const DISK: Fixed = Fixed(0);

/// What an entry's user data says: the high half its sort, the low half a number.
const IO: u64 = 0;
const POLL: u64 = 1 << 32;
const IGNORED: u64 = 2 << 32;
const SORT: u64 = !0xffff_ffff;

/// Something that the ring reports.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Completion {
    /// The operation in a slot ended: bytes moved, or a negative errno.
    Io {
        /// The slot.
        slot: u16,
        /// The result.
        result: i32,
    },
    /// A descriptor that is polled became ready.
    Poll {
        /// The number given with it.
        tag: u32,
        /// The poll events, or a negative errno.
        result: i32,
        /// The poll goes on.
        more: bool,
    },
}

/// A request cannot be turned into iovecs.
#[derive(Debug, Error)]
pub(super) enum PrepareError {
    /// Too many pieces of memory.
    #[error("the request has more than {MAX_IOVECS} pieces of memory")]
    TooManySegments,
    /// A segment does not lie in guest memory any more.
    #[error("the buffer at guest address {addr:#x} cannot be accessed")]
    Memory {
        /// Guest-physical address of the segment.
        addr: u64,
    },
    /// The slot does not exist, or the kernel has it.
    #[error("slot {slot} is not free")]
    Slot {
        /// The slot.
        slot: u16,
    },
    /// No bounce buffer can be allocated.
    #[error("no memory for a buffer")]
    Buffer,
}

/// Which way a transfer goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Direction {
    /// From the disk.
    Read,
    /// To the disk.
    Write {
        /// And durable when it completes.
        durable: bool,
    },
}

#[derive(Default)]
struct Slot {
    /// All of the request's memory. Grows to the largest request that used the slot, and is kept.
    iovecs: Vec<libc::iovec>,
    /// The first that is not done.
    next: usize,
    /// Behind the last that the next operation is for; `None`: all.
    end: Option<usize>,
    /// What the kernel gets in place of `iovecs`, when it goes through the bounce buffer.
    bounce: Option<libc::iovec>,
    /// The kernel has it.
    busy: bool,
}

pub(super) struct Uring {
    ring: IoUring,
    slots: Vec<Slot>,
    in_flight: u32,
    /// Operations that the kernel does not know of yet.
    unsubmitted: u32,
    /// What the iovecs point into.
    memory: Option<Arc<Memory>>,
    /// What is written there is to be marked.
    logged: bool,
    /// Guest memory is to be registered with the ring.
    registers: bool,
    /// The registered buffers, by their place in the kernel's table: address and length in bytes.
    registered: Vec<(usize, usize)>,
    bounce: Option<MmapRegion<()>>,
    zeroes: Option<MmapRegion<()>>,
    /// Registered; kept open with the ring.
    _files: Vec<Arc<File>>,
    /// Takes the transfers, if they are to be polled for: without interrupts of the storage, and without sleep while
    /// there are any.
    polled: Option<Polled>,
    /// System calls made.
    pub(super) syscalls: u64,
}

/// A second ring, whose completions the kernel looks for in the storage's own queues (io_uring_setup(2),
/// IORING_SETUP_IOPOLL). Nothing but transfers can go through it.
struct Polled {
    ring: IoUring,
    in_flight: u32,
    /// The storage cannot do it. Transfers go through the other ring.
    refused: bool,
}

impl Polled {
    fn new(entries: u32, files: &[RawFd]) -> io::Result<Self> {
        let mut builder = IoUring::builder();
        builder.dontfork().setup_clamp().setup_iopoll();
        let ring = transfers(&mut builder, entries)?;
        ring.submitter().register_files(files)?;
        Ok(Self {
            ring,
            in_flight: 0,
            refused: false,
        })
    }
}

impl Uring {
    /// A ring of the calling thread, on these files. The first is the disk; an image has others with more of its data.
    ///
    /// With `registers`, guest memory is pinned and known to the kernel as long as it is attached; with `polls`, transfers are
    /// polled for.
    pub(super) fn new(
        entries: u32,
        files: Vec<Arc<File>>,
        registers: bool,
        polls: bool,
    ) -> io::Result<Self> {
        let ring = build(entries)?;
        let numbers: Vec<RawFd> = files.iter().map(AsRawFd::as_raw_fd).collect();
        if !numbers.is_empty() {
            ring.submitter().register_files(&numbers)?;
        }
        let polled = match polls && !numbers.is_empty() {
            true => Some(Polled::new(entries, &numbers)?),
            false => None,
        };
        Ok(Self {
            ring,
            polled,
            slots: Vec::new(),
            in_flight: 0,
            unsubmitted: 0,
            memory: None,
            logged: false,
            registers,
            registered: Vec::new(),
            bounce: None,
            zeroes: None,
            _files: files,
            syscalls: 0,
        })
    }

    /// From now on, requests are in this memory, and in this many slots. Refused (`false`) while I/O is in flight.
    pub(super) fn attach(&mut self, memory: Option<Arc<Memory>>, slots: u16) -> bool {
        if self.in_flight != 0 {
            return false;
        }
        for slot in &mut self.slots {
            slot.iovecs.clear();
        }
        self.slots.resize_with(usize::from(slots), Slot::default);
        if self.polled.as_ref().is_some_and(|p| p.refused) {
            // Its buffers go with it; those to come are for the ring that is used.
            self.polled = None;
        }
        if !std::mem::take(&mut self.registered).is_empty()
            && let Err(e) = self.transfers().submitter().unregister_buffers()
        {
            warn!("guest memory stays pinned until the thread ends: {e}");
        }
        self.logged = memory.as_deref().is_some_and(is_logged);
        self.memory = memory;
        if self.registers
            && let Err(e) = self.register()
        {
            warn!(
                "guest memory is not registered with io_uring: {e}; is the limit of locked memory (`ulimit -l`) as large as the guest?"
            );
        }
        true
    }

    /// What requests are in.
    pub(super) fn memory(&self) -> Option<Arc<Memory>> {
        self.memory.clone()
    }

    /// Tells the kernel of all guest memory, so that it need not look up the pages of each transfer.
    fn register(&mut self) -> io::Result<()> {
        let Some(memory) = &self.memory else {
            return Ok(());
        };
        let mut buffers = Vec::new();
        for region in memory.iter() {
            let slice = region.as_volatile_slice().map_err(io::Error::other)?;
            let (base, len) = (slice.ptr_guard_mut().as_ptr(), slice.len());
            for start in (0..len).step_by(MAX_REGISTERED) {
                buffers.push(libc::iovec {
                    iov_base: base.wrapping_add(start).cast(),
                    iov_len: len.saturating_sub(start).min(MAX_REGISTERED),
                });
            }
        }
        // SAFETY: the buffers lie in guest memory, which `self.memory` keeps mapped until they are unregistered.
        unsafe { self.transfers().submitter().register_buffers(&buffers)? };
        self.registered = buffers
            .iter()
            .map(|buffer| (buffer.iov_base.addr(), buffer.iov_len))
            .collect();
        Ok(())
    }

    /// The ring that knows the registered buffers.
    fn transfers(&self) -> &IoUring {
        self.polled
            .as_ref()
            .map_or(&self.ring, |polled| &polled.ring)
    }

    /// Transfers are under way that nothing but [`enter`](Self::enter) finds the end of.
    pub(super) fn polling(&self) -> bool {
        self.polled.as_ref().is_some_and(|p| p.in_flight > 0)
    }

    /// Operations that were started and have not ended.
    pub(super) fn in_flight(&self) -> u32 {
        self.in_flight
    }

    /// Operations that were started and not submitted.
    pub(super) fn unsubmitted(&self) -> u32 {
        self.unsubmitted
    }

    fn free_slot(&mut self, slot: u16) -> Result<&mut Slot, PrepareError> {
        free(&mut self.slots, slot)
    }

    /// Puts `len` bytes of guest memory into a slot, from `skip` bytes into the segments on. Returns whether all
    /// pieces are aligned to `align` bytes (a power of two).
    pub(super) fn prepare(
        &mut self,
        slot: u16,
        segments: &[Segment],
        skip: u64,
        len: u64,
        align: u32,
    ) -> Result<bool, PrepareError> {
        let memory = self.memory.as_ref().ok_or(PrepareError::Slot { slot })?;
        let state = free(&mut self.slots, slot)?;
        state.iovecs.clear();
        state.next = 0;
        state.end = None;
        state.bounce = None;
        let (mut skip, mut left) = (skip, len);
        let mask = usize::try_from(align)
            .unwrap_or(usize::MAX)
            .saturating_sub(1);
        let mut misaligned = 0;
        for segment in segments {
            if left == 0 {
                break;
            }
            let failed = || PrepareError::Memory {
                addr: segment.addr.0,
            };
            let Some(room) = u64::from(segment.len)
                .checked_sub(skip)
                .filter(|&room| room > 0)
            else {
                skip = skip.saturating_sub(segment.len.into());
                continue;
            };
            let start = segment.addr.0.checked_add(skip).ok_or_else(failed)?;
            let take = room.min(left);
            skip = 0;
            left = left.saturating_sub(take);
            let count = usize::try_from(take).map_err(|_| failed())?;
            let start = vm_memory::GuestAddress(start);
            let mut add = |slice: GuestSlice<'_>| {
                if state.iovecs.len() == MAX_IOVECS {
                    return Err(PrepareError::TooManySegments);
                }
                let base = slice.ptr_guard_mut().as_ptr();
                misaligned |= (base.addr() | slice.len()) & mask;
                state.iovecs.push(libc::iovec {
                    iov_base: base.cast(),
                    iov_len: slice.len(),
                });
                Ok(())
            };
            if let Some(slice) = in_one_region(memory.as_ref(), start, count) {
                add(slice)?;
                continue;
            }
            let slices =
                GuestMemory::get_slices(memory.as_ref(), start, count, Permissions::ReadWrite)
                    .map_err(|_| failed())?;
            for slice in slices {
                add(slice.map_err(|_| failed())?)?;
            }
        }
        if left != 0 {
            return Err(PrepareError::Memory { addr: 0 });
        }
        Ok(misaligned == 0)
    }

    /// Puts up to `len` bytes of zeroes into a slot, for writing. Returns how many.
    pub(super) fn prepare_zeroes(&mut self, slot: u16, len: u64) -> Result<u64, PrepareError> {
        if self.zeroes.is_none() {
            self.zeroes = Some(MmapRegion::new(BUFFER).map_err(|_| PrepareError::Buffer)?);
        }
        let base = self
            .zeroes
            .as_ref()
            .map(MmapRegion::as_ptr)
            .ok_or(PrepareError::Buffer)?;
        let state = self.free_slot(slot)?;
        state.iovecs.clear();
        state.next = 0;
        state.end = None;
        state.bounce = None;
        let mut left = len;
        while left > 0 && state.iovecs.len() < MAX_IOVECS {
            let piece = usize::try_from(left).map_or(BUFFER, |left| left.min(BUFFER));
            state.iovecs.push(libc::iovec {
                iov_base: base.cast(),
                iov_len: piece,
            });
            left = left.saturating_sub(u64::try_from(piece).unwrap_or(left));
        }
        Ok(len.saturating_sub(left))
    }

    /// Sends the next part of a slot's memory through the bounce buffer, which the caller gives to one slot at a time.
    pub(super) fn bounce(&mut self, slot: u16, direction: Direction) -> Result<(), PrepareError> {
        if self.bounce.is_none() {
            self.bounce = Some(MmapRegion::new(BUFFER).map_err(|_| PrepareError::Buffer)?);
        }
        let base = self
            .bounce
            .as_ref()
            .map(MmapRegion::as_ptr)
            .ok_or(PrepareError::Buffer)?;
        let state = self.free_slot(slot)?;
        let mut filled = 0_usize;
        for iovec in state.iovecs.get(state.next..).unwrap_or_default() {
            let piece = iovec.iov_len.min(BUFFER.saturating_sub(filled));
            if matches!(direction, Direction::Write { .. }) {
                // SAFETY: `filled` is at most the length of the buffer.
                let to = unsafe { base.add(filled) };
                // SAFETY: the iovec lies in guest memory, which `self.memory` keeps mapped, and `piece` is within both
                // it and the buffer, which are different mappings. A guest that changes the bytes meanwhile
                // changes what is written and nothing else.
                unsafe { ptr::copy_nonoverlapping(iovec.iov_base.cast::<u8>(), to, piece) };
            }
            filled = filled.saturating_add(piece);
        }
        state.bounce = Some(libc::iovec {
            iov_base: base.cast(),
            iov_len: filled,
        });
        Ok(())
    }

    /// Copies what was read through the bounce buffer to where it belongs.
    fn scatter(&mut self, slot: u16, bytes: usize) {
        let (Some(buffer), Some(state)) = (&self.bounce, self.slots.get(usize::from(slot))) else {
            return;
        };
        let mut copied = 0_usize;
        for iovec in state.iovecs.get(state.next..).unwrap_or_default() {
            let piece = iovec.iov_len.min(bytes.min(BUFFER).saturating_sub(copied));
            // SAFETY: `copied` is at most the length of the buffer.
            let from = unsafe { buffer.as_ptr().add(copied) };
            // SAFETY: as in `bounce`: both ranges are mapped, long enough, and apart.
            unsafe { ptr::copy_nonoverlapping(from, iovec.iov_base.cast::<u8>(), piece) };
            copied = copied.saturating_add(piece);
        }
    }

    /// A read into a slot's memory failed, maybe after some of it was written.
    pub(super) fn read_failed(&self, slot: u16) {
        let state = self.slots.get(usize::from(slot));
        if self.logged && state.is_some_and(|state| state.bounce.is_none()) {
            self.mark(slot, usize::MAX);
        }
    }

    /// Marks the next `bytes` of a slot's memory as written.
    #[cold]
    fn mark(&self, slot: u16, bytes: usize) {
        let (Some(memory), Some(state)) = (&self.memory, self.slots.get(usize::from(slot))) else {
            return;
        };
        let pieces = state.iovecs.get(state.next..).unwrap_or_default();
        mark_pieces(memory, pieces, 0, bytes);
    }

    /// Notes that `bytes` of a slot's memory are done.
    pub(super) fn advance(&mut self, slot: u16, bytes: usize, direction: Direction) {
        let bounced = self
            .slots
            .get(usize::from(slot))
            .is_some_and(|s| s.bounce.is_some());
        if bounced && direction == Direction::Read {
            self.scatter(slot, bytes);
        }
        if self.logged && direction == Direction::Read {
            self.mark(slot, bytes);
        }
        let Ok(state) = self.free_slot(slot) else {
            return;
        };
        let mut left = bytes;
        while left > 0 {
            let Some(iovec) = state.iovecs.get_mut(state.next) else {
                return;
            };
            if iovec.iov_len <= left {
                left = left.saturating_sub(iovec.iov_len);
                state.next = state.next.saturating_add(1);
            } else {
                iovec.iov_base = iovec.iov_base.wrapping_byte_add(left);
                iovec.iov_len = iovec.iov_len.saturating_sub(left);
                left = 0;
            }
        }
    }

    /// Lets the next operation of a slot end after `len` bytes.
    pub(super) fn limit(&mut self, slot: u16, len: u64) -> io::Result<()> {
        let state = self.free_slot(slot).map_err(io::Error::other)?;
        let mut left = usize::try_from(len).unwrap_or(usize::MAX);
        if let Some(bounce) = &mut state.bounce {
            bounce.iov_len = bounce.iov_len.min(left);
        }
        for at in state.next..state.iovecs.len() {
            let Some(iovec) = state.iovecs.get_mut(at) else {
                break;
            };
            if left >= iovec.iov_len {
                left = left.saturating_sub(iovec.iov_len);
                continue;
            }
            if left > 0 {
                let rest = libc::iovec {
                    iov_base: iovec.iov_base.wrapping_byte_add(left),
                    iov_len: iovec.iov_len.saturating_sub(left),
                };
                iovec.iov_len = left;
                state.iovecs.insert(at.saturating_add(1), rest);
            }
            state.end = Some(at.saturating_add(usize::from(left > 0)));
            return Ok(());
        }
        state.end = None;
        Ok(())
    }

    /// Fills the next `len` bytes of a slot's memory with zeroes; they are done then.
    pub(super) fn fill(&mut self, slot: u16, len: u64) -> Result<(), PrepareError> {
        let state = self.free_slot(slot)?;
        state.bounce = None;
        let all = usize::try_from(len).unwrap_or(usize::MAX);
        let mut left = all;
        for iovec in state.iovecs.get(state.next..).unwrap_or_default() {
            let piece = iovec.iov_len.min(left);
            // SAFETY: the iovec lies in guest memory, which `self.memory` keeps mapped, and `piece` is within it.
            unsafe { ptr::write_bytes(iovec.iov_base.cast::<u8>(), 0, piece) };
            left = left.saturating_sub(piece);
        }
        self.advance(slot, all, Direction::Read);
        Ok(())
    }

    /// Transfers what is not done yet of a slot, up to its limit.
    pub(super) fn transfer(
        &mut self,
        slot: u16,
        direction: Direction,
        file: u8,
        offset: u64,
    ) -> io::Result<()> {
        let state = free(&mut self.slots, slot).map_err(io::Error::other)?;
        let iovecs = match &state.bounce {
            Some(iovec) => std::slice::from_ref(iovec),
            None => {
                let end = state.end.unwrap_or(state.iovecs.len());
                state.iovecs.get(state.next..end).unwrap_or_default()
            }
        };
        let base = iovecs.as_ptr();
        let file = Fixed(file.into());
        let count = u32::try_from(iovecs.len().min(MAX_IOVECS)).unwrap_or(0);
        let flags = match direction {
            Direction::Write { durable: true } => libc::RWF_DSYNC,
            _ => 0,
        };
        // Cheaper than a vector of one: the kernel has no iovec to copy.
        let single = match iovecs {
            [iovec] => u32::try_from(iovec.iov_len).ok().map(|len| {
                let base: *mut u8 = iovec.iov_base.cast();
                (
                    base,
                    len,
                    containing(&self.registered, base.addr(), iovec.iov_len),
                )
            }),
            _ => None,
        };
        let entry = match (direction, single) {
            (Direction::Read, Some((base, len, Some(buffer)))) => {
                opcode::ReadFixed::new(file, base, len, buffer)
                    .offset(offset)
                    .build()
            }
            (Direction::Read, Some((base, len, None))) => {
                opcode::Read::new(file, base, len).offset(offset).build()
            }
            (Direction::Read, None) => opcode::Readv::new(file, base, count).offset(offset).build(),
            (Direction::Write { .. }, Some((base, len, Some(buffer)))) => {
                opcode::WriteFixed::new(file, base, len, buffer)
                    .offset(offset)
                    .rw_flags(flags)
                    .build()
            }
            (Direction::Write { .. }, Some((base, len, None))) => {
                opcode::Write::new(file, base, len)
                    .offset(offset)
                    .rw_flags(flags)
                    .build()
            }
            (Direction::Write { .. }, None) => opcode::Writev::new(file, base, count)
                .offset(offset)
                .rw_flags(flags)
                .build(),
        };
        if self.polled.as_ref().is_some_and(|p| !p.refused) {
            return self.start_polled(slot, entry);
        }
        self.start(slot, entry)
    }

    /// Makes completed writes durable.
    pub(super) fn fsync(&mut self, slot: u16) -> io::Result<()> {
        self.free_slot(slot).map_err(io::Error::other)?;
        let entry = opcode::Fsync::new(DISK).flags(FsyncFlags::DATASYNC).build();
        self.start(slot, entry)
    }

    /// Punches a hole or zeroes a range, after `mode` of fallocate(2).
    pub(super) fn fallocate(
        &mut self,
        slot: u16,
        mode: i32,
        offset: u64,
        len: u64,
    ) -> io::Result<()> {
        self.free_slot(slot).map_err(io::Error::other)?;
        let entry = opcode::Fallocate::new(DISK, len)
            .offset(offset)
            .mode(mode)
            .build();
        self.start(slot, entry)
    }

    fn start(&mut self, slot: u16, entry: Entry) -> io::Result<()> {
        // SAFETY: what the entry points to are the slot's own iovecs, which stay as they are while it is busy, and
        // guest memory or a buffer that this structure keeps until nothing is in flight.
        unsafe { self.push(&entry.user_data(IO | u64::from(slot)))? };
        self.started(slot);
        Ok(())
    }

    fn start_polled(&mut self, slot: u16, entry: Entry) -> io::Result<()> {
        let entry = entry.user_data(IO | u64::from(slot));
        let Some(polled) = &mut self.polled else {
            return Err(io::ErrorKind::Unsupported.into());
        };
        // SAFETY: as in `start`.
        while unsafe { polled.ring.submission().push(&entry) }.is_err() {
            self.syscalls = self.syscalls.saturating_add(1);
            polled.ring.submit()?;
        }
        polled.in_flight = polled.in_flight.saturating_add(1);
        self.started(slot);
        Ok(())
    }

    fn started(&mut self, slot: u16) {
        if let Some(state) = self.slots.get_mut(usize::from(slot)) {
            state.busy = true;
        }
        self.in_flight = self.in_flight.saturating_add(1);
        self.unsubmitted = self.unsubmitted.saturating_add(1);
    }

    /// Reports each time a descriptor becomes readable, until told otherwise. The descriptor is never read: an eventfd
    /// from a peer may block or not, and the wake-ups are all that is wanted.
    pub(super) fn poll(&mut self, fd: RawFd, tag: u32) -> io::Result<()> {
        let events = u32::try_from(libc::POLLIN).unwrap_or(1);
        let entry = opcode::PollAdd::new(Fd(fd), events).multi(true).build();
        // SAFETY: a poll entry points to no memory.
        unsafe { self.push(&entry.user_data(POLL | u64::from(tag))) }
    }

    /// Ends a poll.
    pub(super) fn unpoll(&mut self, tag: u32) -> io::Result<()> {
        let entry = opcode::PollRemove::new(POLL | u64::from(tag)).build();
        // SAFETY: a poll-remove entry points to no memory.
        unsafe { self.push(&entry.user_data(IGNORED)) }
    }

    /// # Safety
    /// What the entry points to must stay valid until it completes.
    unsafe fn push(&mut self, entry: &Entry) -> io::Result<()> {
        loop {
            // SAFETY: passed on to the caller.
            if unsafe { self.ring.submission().push(entry) }.is_ok() {
                return Ok(());
            }
            self.enter(0, None)?;
        }
    }

    /// Submits what was pushed and waits for `want` completions, or for the time given. Returns also when a signal
    /// came: look at the completions, there may be none.
    pub(super) fn enter(&mut self, mut want: usize, timeout: Option<Duration>) -> io::Result<()> {
        if let Some(polled) = self.polled.as_mut().filter(|p| p.in_flight > 0) {
            self.syscalls = self.syscalls.saturating_add(1);
            self.unsubmitted = 0;
            tolerate(polled.ring.submit_and_wait(0))?;
            want = 0;
        }
        if want == 0 {
            let queue = self.ring.submission();
            // Completions are worked off in the kernel only when it is entered. A worker that is kept busy by its
            // driver must still hear of commands.
            if queue.is_empty() && !queue.taskrun() && !queue.cq_overflow() {
                return Ok(());
            }
        }
        self.syscalls = self.syscalls.saturating_add(1);
        self.unsubmitted = 0;
        let result = match timeout {
            None => self.ring.submit_and_wait(want),
            Some(time) => {
                let time = Timespec::from(time);
                let args = SubmitArgs::new().timespec(&time);
                self.ring.submitter().submit_with_args(want, &args)
            }
        };
        tolerate(result)
    }

    /// Whether something can be had without waiting: completions, or work that the kernel does when it is entered.
    pub(super) fn ready(&mut self) -> bool {
        let polling = self.polling();
        let queue = self.ring.submission();
        polling || queue.taskrun() || queue.cq_overflow() || {
            drop(queue);
            !self.ring.completion().is_empty()
        }
    }

    /// The next thing that the ring reports, or `None` when there is nothing more now.
    pub(super) fn completion(&mut self) -> Option<Completion> {
        loop {
            let next = self.ring.completion().next();
            let Some(entry) = next else {
                return self.polled_completion();
            };
            let (data, result) = (entry.user_data(), entry.result());
            let number = data & !SORT;
            match data & SORT {
                POLL => {
                    return Some(Completion::Poll {
                        tag: u32::try_from(number).unwrap_or(u32::MAX),
                        result,
                        more: cqueue::more(entry.flags()),
                    });
                }
                IO => {
                    return Some(self.ended(number, result));
                }
                _ => {}
            }
        }
    }

    fn polled_completion(&mut self) -> Option<Completion> {
        let polled = self.polled.as_mut().filter(|p| p.in_flight > 0)?;
        let entry = polled.ring.completion().next()?;
        polled.in_flight = polled.in_flight.saturating_sub(1);
        let mut result = entry.result();
        if result.saturating_neg() == libc::EOPNOTSUPP {
            if !polled.refused {
                warn!(
                    "the storage cannot be polled (a device needs poll queues: nvme.poll_queues, for example); it interrupts as usual"
                );
                polled.refused = true;
                // Known to the other ring only.
                self.registered.clear();
            }
            // To be begun again, now through the ring that sleeps.
            result = libc::EAGAIN.saturating_neg();
        }
        Some(self.ended(entry.user_data() & !SORT, result))
    }

    fn ended(&mut self, number: u64, result: i32) -> Completion {
        let slot = u16::try_from(number).unwrap_or(u16::MAX);
        self.in_flight = self.in_flight.saturating_sub(1);
        if let Some(state) = self.slots.get_mut(usize::from(slot)) {
            state.busy = false;
        }
        Completion::Io { slot, result }
    }
}

/// Lets pass what only says that there is nothing, or not now.
fn tolerate(entered: io::Result<usize>) -> io::Result<()> {
    match entered {
        Ok(_) => Ok(()),
        Err(e)
            if matches!(
                e.raw_os_error(),
                Some(libc::EINTR | libc::ETIME | libc::EBUSY | libc::EAGAIN)
            ) =>
        {
            Ok(())
        }
        Err(e) => Err(e),
    }
}

/// The one of these registered buffers in which bytes lie.
fn containing(registered: &[(usize, usize)], base: usize, len: usize) -> Option<u16> {
    let at = registered.iter().position(|&(start, room)| {
        base.checked_sub(start)
            .is_some_and(|skip| skip.checked_add(len).is_some_and(|end| end <= room))
    })?;
    u16::try_from(at).ok()
}

/// A slot that the kernel does not have.
fn free(slots: &mut [Slot], slot: u16) -> Result<&mut Slot, PrepareError> {
    slots
        .get_mut(usize::from(slot))
        .filter(|s| !s.busy)
        .ok_or(PrepareError::Slot { slot })
}

impl Drop for Uring {
    fn drop(&mut self) {
        // The kernel may still write into guest memory, which must not be unmapped under it.
        while self.in_flight > 0 {
            if self.enter(1, None).is_err() {
                // There is no way to know when it ends: keep all that it may touch.
                std::mem::forget(self.memory.take());
                std::mem::forget(self.bounce.take());
                std::mem::forget(self.zeroes.take());
                std::mem::forget(std::mem::take(&mut self.slots));
                return;
            }
            while self.completion().is_some() {}
        }
    }
}

/// A ring for what is done here.
fn transfers(builder: &mut io_uring::Builder, entries: u32) -> io::Result<IoUring> {
    let registrations = [
        IORING_REGISTER_BUFFERS,
        IORING_UNREGISTER_BUFFERS,
        IORING_REGISTER_FILES,
    ];
    let operations = [
        opcode::Read::CODE,
        opcode::Readv::CODE,
        opcode::ReadFixed::CODE,
        opcode::Write::CODE,
        opcode::Writev::CODE,
        opcode::WriteFixed::CODE,
        opcode::Fsync::CODE,
        opcode::Fallocate::CODE,
        opcode::PollAdd::CODE,
        opcode::PollRemove::CODE,
    ];
    restricted(builder, entries, &registrations, &operations)
}

/// The best ring that the kernel has: completions are then only processed when this thread asks for them.
fn build(entries: u32) -> io::Result<IoUring> {
    let completions = entries.saturating_mul(2);
    let attempts: [fn(&mut io_uring::Builder); 3] = [
        |b| {
            b.setup_single_issuer()
                .setup_defer_taskrun()
                .setup_taskrun_flag();
        },
        |b| {
            b.setup_coop_taskrun().setup_taskrun_flag();
        },
        |_| {},
    ];
    let mut last = io::Error::from(io::ErrorKind::Unsupported);
    for (number, attempt) in attempts.iter().enumerate() {
        let mut builder = IoUring::builder();
        builder.dontfork().setup_clamp().setup_cqsize(completions);
        attempt(&mut builder);
        match transfers(&mut builder, entries) {
            Ok(ring) => {
                debug!(fallback = number, "io_uring ready");
                return Ok(ring);
            }
            Err(e) => last = e,
        }
        if last.raw_os_error() != Some(libc::EINVAL) {
            break;
        }
    }
    Err(last)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a ring answers to an operation.
    fn answer(ring: &mut IoUring, entry: &Entry) -> i32 {
        // SAFETY: what the entry points to lives in the caller until the answer is there.
        unsafe { ring.submission().push(entry) }.unwrap();
        ring.submit_and_wait(1).unwrap();
        ring.completion().next().unwrap().result()
    }

    #[test]
    fn a_ring_opens_and_connects_nothing() {
        let mut ring = build(4).unwrap();
        let (path, file) = (c"/dev/null", tempfile::tempfile().unwrap());
        let open = opcode::OpenAt::new(Fd(libc::AT_FDCWD), path.as_ptr()).build();
        let socket = opcode::Socket::new(libc::AF_INET, libc::SOCK_STREAM, 0).build();
        let accept = opcode::Accept::new(Fd(file.as_raw_fd()), ptr::null_mut(), ptr::null_mut());
        for entry in [open, socket, accept.build(), opcode::Nop::new().build()] {
            assert_eq!(answer(&mut ring, &entry), -libc::EACCES, "{entry:?}");
        }
        let sync = opcode::Fsync::new(Fd(file.as_raw_fd())).build();
        assert_eq!(answer(&mut ring, &sync), 0);
        // For good.
        let again = ring.submitter().register_restrictions(&mut []);
        assert!(again.is_err());
        assert!(
            ring.submitter()
                .register_probe(&mut io_uring::Probe::new())
                .is_err()
        );
    }
}

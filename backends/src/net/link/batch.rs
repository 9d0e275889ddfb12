//! Many frames for a descriptor with one system call, by a ring of io_uring.
//!
//! None of them waits, for room or for a frame, so that the kernel has done all of it, in order, when the call returns.
#![allow(
    unsafe_code,
    reason = "submission entries carry pointers to the pieces of a list, into guest memory, and to spills"
)]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::slice::ChunksExactMut;

use io_uring::squeue::{Entry, Flags};
use io_uring::types::Fixed;
use io_uring::{IoUring, opcode};
use tracing::{debug, warn};

use crate::net::iov::IoList;
use crate::shell::{IORING_REGISTER_FILES, prefetch_to_read, restricted};

/// Most frames of one call: as many as a number of 64 bits can tell apart.
pub(super) const AT_ONCE: u16 = 64;

/// Most pieces of all frames that are read with one call.
const MAX_READ_PIECES: usize = 1024;

/// The place of the descriptor among those that the ring knows: to look it up in the program's table costs for each frame.
const PLACE: Fixed = Fixed(0);

/// Of each frame the kernel waits for these bytes, the header and a short frame; it foresees the rest of a long one.
const BEGINNING: usize = 128;

/// Writes and reads frames of one descriptor.
pub(super) struct Batch {
    ring: IoUring,
    /// It failed, and is not used any more.
    broken: bool,
    /// What the kernel is to say of a write behind which there are others: nothing if all is well, if it knows how.
    quiet: Flags,
    /// Pieces of the frames that are read: empty between calls.
    places: Vec<libc::iovec>,
}

// SAFETY: `IoUring` may be sent by itself. `places` is empty between calls, so that no other thread sees its pointers; entries that a
// failed submission left in the queue are not submitted, as a ring that is `broken` is not used again.
unsafe impl Send for Batch {}

impl std::fmt::Debug for Batch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Batch").finish_non_exhaustive()
    }
}

impl Batch {
    /// `None` where the kernel, or who started this program, does not let it.
    pub(super) fn new(fd: BorrowedFd<'_>) -> Option<Self> {
        match Self::ring(fd) {
            Ok(ring) => Some(Self {
                quiet: if ring.params().is_feature_skip_cqe_on_success() {
                    Flags::SKIP_SUCCESS
                } else {
                    Flags::empty()
                },
                ring,
                broken: false,
                places: Vec::with_capacity(MAX_READ_PIECES),
            }),
            Err(error) => {
                debug!("frames are moved one by one, as there is no io_uring: {error}");
                None
            }
        }
    }

    fn ring(fd: BorrowedFd<'_>) -> io::Result<IoUring> {
        let mut builder = IoUring::builder();
        builder.dontfork();
        let operations = [
            opcode::Write::CODE,
            opcode::Writev::CODE,
            opcode::Readv::CODE,
            opcode::FilesUpdate::CODE,
        ];
        let registrations = [IORING_REGISTER_FILES];
        let ring = restricted(&mut builder, AT_ONCE.into(), &registrations, &operations)?;
        ring.submitter().register_files(&[fd.as_raw_fd()])?;
        Ok(ring)
    }

    pub(super) fn is_sound(&self) -> bool {
        !self.broken
    }

    /// Writes frames, each of so many pieces of the list, and appends what came of each, in their order. At most
    /// [`AT_ONCE`] of them.
    pub(super) fn write(
        &mut self,
        list: &IoList,
        frames: &[usize],
        results: &mut Vec<io::Result<()>>,
    ) {
        if self.broken {
            return;
        }
        let before = results.len();
        let frames = frames.get(..AT_ONCE.into()).unwrap_or(frames);
        let last = frames.len().saturating_sub(1);
        let mut queue = self.ring.submission();
        let mut rest = list.live();
        for (number, &pieces) in frames.iter().enumerate() {
            let (frame, behind) = rest.split_at_checked(pieces).unwrap_or((rest, &[]));
            rest = behind;
            if let [piece, ..] = frame {
                prefetch_to_read(piece.iov_base.cast(), piece.iov_len.min(BEGINNING));
            }
            let quiet = if number < last {
                self.quiet
            } else {
                Flags::empty()
            };
            let entry = write(frame).flags(quiet).user_data(number as u64);
            // SAFETY: the pieces lie in memory that the list keeps mapped, and stay as they are, like the list itself, until the
            // kernel is done with them, which is waited for below. It only reads.
            if unsafe { queue.push(&entry) }.is_err() {
                // It has room for all: something was left in it.
                self.broken = true;
                return;
            }
            // Until the kernel says something else.
            results.push(Err(io::ErrorKind::Interrupted.into()));
        }
        drop(queue);
        let results = results.get_mut(before..).unwrap_or_default();
        self.complete(results, self.quiet, |_| ());
    }

    /// Reads frames, each into so many pieces of the list, and into its spill what does not fit there. Appends the length of
    /// each, in their order: of fewer than were asked for if their pieces are too many for one call. At most [`AT_ONCE`] of them.
    pub(super) fn read(
        &mut self,
        list: &IoList,
        frames: &[usize],
        spills: ChunksExactMut<'_, u8>,
        results: &mut Vec<io::Result<usize>>,
    ) {
        if self.broken {
            return;
        }
        let before = results.len();
        let frames = frames.get(..AT_ONCE.into()).unwrap_or(frames);
        let mut rest = list.live();
        for (&pieces, spill) in frames.iter().zip(spills) {
            let Some((frame, behind)) = rest.split_at_checked(pieces) else {
                break;
            };
            if self.places.len().saturating_add(pieces) >= MAX_READ_PIECES {
                break;
            }
            rest = behind;
            self.places.extend_from_slice(frame);
            self.places.push(libc::iovec {
                iov_base: spill.as_mut_ptr().cast(),
                iov_len: spill.len(),
            });
            // Until the kernel says something else.
            results.push(Err(io::ErrorKind::Interrupted.into()));
        }
        let mut queue = self.ring.submission();
        let mut rest = self.places.as_slice();
        for (number, &pieces) in frames.iter().enumerate().take(results.len() - before) {
            let (frame, behind) = rest.split_at_checked(pieces + 1).unwrap_or((rest, &[]));
            rest = behind;
            let count = u32::try_from(frame.len()).unwrap_or(u32::MAX);
            let entry = opcode::Readv::new(PLACE, frame.as_ptr(), count)
                .rw_flags(libc::RWF_NOWAIT)
                .build()
                .user_data(number as u64);
            // SAFETY: the pieces lie in memory that the list keeps mapped, the last one of each frame is borrowed for the call;
            // those and `places` stay as they are until the kernel is done with them, which is waited for below. Only the
            // guest's driver shares the former.
            if unsafe { queue.push(&entry) }.is_err() {
                self.broken = true;
                self.places.clear();
                return;
            }
        }
        drop(queue);
        let found = results.get_mut(before..).unwrap_or_default();
        self.complete(found, Flags::empty(), |len| len);
        self.places.clear();
        let mut start = 0;
        for (&pieces, result) in frames.iter().zip(results.iter().skip(before)) {
            if let Ok(len) = result {
                list.wrote_pieces(start, pieces, *len);
            }
            start += pieces;
        }
    }

    /// Has the kernel do what was submitted, and notes what came of each. Of those that `quiet` says, but for the last one, it
    /// tells only of failures.
    fn complete<T>(
        &mut self,
        results: &mut [io::Result<T>],
        quiet: Flags,
        done: impl Fn(usize) -> T,
    ) {
        let all = u64::MAX
            .checked_shr(u64::BITS.saturating_sub(u32::try_from(results.len()).unwrap_or(0)))
            .unwrap_or(0);
        let last = all & !(all >> 1);
        let awaited = if quiet.is_empty() { all } else { last };
        let mut told = 0_u64;
        while told & awaited != awaited && !self.broken {
            // None waits, for room or for a frame (RWF_NOWAIT), so that all have been told of, those that failed behind the others,
            // when the call returns that began the last one.
            match self.ring.submit_and_wait(1) {
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // Nothing was begun: these are offered again, and then one by one.
                Err(error) => {
                    warn!("frames are moved one by one from now on: io_uring failed: {error}");
                    self.broken = true;
                }
            }
            for completion in self.ring.completion() {
                let place = usize::try_from(completion.user_data()).unwrap_or(usize::MAX);
                let Some(result) = results.get_mut(place) else {
                    continue;
                };
                told |= 1 << place;
                let outcome = completion.result();
                match outcome.saturating_neg() {
                    ..=0 => *result = Ok(done(usize::try_from(outcome).unwrap_or(0))),
                    // The descriptor knows no RWF_NOWAIT.
                    libc::EOPNOTSUPP => self.broken = true,
                    error => *result = Err(io::Error::from_raw_os_error(error)),
                }
            }
        }
        if !self.broken {
            for (place, result) in results.iter_mut().enumerate() {
                if told >> place & 1 == 0 {
                    *result = Ok(done(0));
                }
            }
        }
    }
}

impl Drop for Batch {
    /// A ring that is closed keeps its descriptors for a while, as the kernel frees it in the background; another program, or this
    /// one, may want the interface at once.
    fn drop(&mut self) {
        if self.broken {
            return;
        }
        let nothing = [-1];
        let entry = opcode::FilesUpdate::new(nothing.as_ptr(), 1).build();
        // SAFETY: the number lives until after the call, in which the kernel reads it.
        if unsafe { self.ring.submission().push(&entry) }.is_ok()
            && let Err(error) = self.ring.submit_and_wait(1)
        {
            debug!("a ring of io_uring keeps its descriptor for a while: {error}");
        }
    }
}

/// One frame: the plainer call if it lies in one piece.
fn write(frame: &[libc::iovec]) -> Entry {
    match frame {
        [piece] => {
            let len = u32::try_from(piece.iov_len).unwrap_or(u32::MAX);
            opcode::Write::new(PLACE, piece.iov_base.cast(), len)
                .rw_flags(libc::RWF_NOWAIT)
                .build()
        }
        _ => {
            let count = u32::try_from(frame.len()).unwrap_or(u32::MAX);
            opcode::Writev::new(PLACE, frame.as_ptr(), count)
                .rw_flags(libc::RWF_NOWAIT)
                .build()
        }
    }
}

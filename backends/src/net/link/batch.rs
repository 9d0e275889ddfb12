//! Many frames for a descriptor with one system call, by a ring of io_uring.
//!
//! None of them waits, for room or for a frame, so that the kernel has done all of it, in order, when the call returns.
#![allow(
    unsafe_code,
    reason = "submission entries carry pointers to the pieces of a list, into guest memory, and to spills"
)]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::slice::ChunksExactMut;

use io_uring::squeue::{Entry, Flags};
use io_uring::types::Fixed;
use io_uring::{IoUring, opcode};
use tracing::{debug, warn};

use crate::net::iov::IoList;
use crate::shell::{IORING_REGISTER_FILES, prefetch_to_read, restricted};

/// Most frames of one call.
pub(super) const AT_ONCE: u16 = 64;
// Those that were told of are bits of a number.
const _: () = assert!(AT_ONCE as u32 <= u64::BITS);

/// Most pieces of all frames that are read with one call.
const MAX_READ_PIECES: usize = 1024;

/// The place of the descriptor among those that the ring knows: to look it up in the program's table costs for each frame.
const PLACE: Fixed = Fixed(0);

/// Bytes of each frame that are fetched ahead: the header and a short frame. While the kernel copies those of a long one, the
/// processor foresees the rest.
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
            // kernel is done with them, which it is when `complete` returns. It only reads.
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
            // those and `places` stay as they are until the kernel is done with them, which it is when `complete` returns. Only
            // the guest's driver shares the former.
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
    ///
    /// All is done, and told, when the call returns that began the last one: none waits for room or for a frame (RWF_NOWAIT), so that
    /// none is left to another thread, and of failures, which come behind the others, the kernel tells before it lets this thread
    /// go on (the ring is not one with IORING_SETUP_DEFER_TASKRUN).
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
        let (mut begun, mut told) = (0, 0_u64);
        while told & awaited != awaited && !self.broken {
            match self.ring.submit_and_wait(1) {
                Ok(count) => begun = count.saturating_add(begun),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // Nothing more was begun: the others are offered again, and then one by one.
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
        for (place, result) in results.iter_mut().enumerate().take(begun) {
            if told >> place & 1 == 0 {
                *result = Ok(done(0));
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
        static NOTHING: [RawFd; 1] = [-1];
        let entry = opcode::FilesUpdate::new(NOTHING.as_ptr(), 1).build();
        // SAFETY: the kernel reads the number, which lives for ever.
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

#[cfg(test)]
mod tests {
    use std::os::fd::{AsFd, OwnedFd};
    use std::sync::Arc;

    use nix::sys::socket::sockopt::{RcvBuf, SndBuf};
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, setsockopt, socketpair};
    use ringside_rings::Segment;
    use vm_memory::{GuestAddress, Permissions};

    use super::*;
    use crate::shell::Memory;

    /// Two ends that keep packets apart.
    fn ends() -> (OwnedFd, OwnedFd) {
        let kind = SockType::SeqPacket;
        let (ours, theirs) =
            socketpair(AddressFamily::Unix, kind, None, SockFlag::SOCK_CLOEXEC).unwrap();
        for end in [&ours, &theirs] {
            setsockopt(end, SndBuf, &200_000).unwrap();
            setsockopt(end, RcvBuf, &200_000).unwrap();
        }
        (ours, theirs)
    }

    fn list() -> IoList {
        let ranges = [(GuestAddress(0), 1 << 20)];
        IoList::new(Arc::new(Memory::from_ranges(&ranges).unwrap()))
    }

    /// With a kernel that tells only of failures, and with one that does not know how.
    #[test]
    fn it_is_known_what_came_of_each_frame() {
        for knows in [true, false] {
            let (ours, theirs) = ends();
            let Some(mut batch) = Batch::new(ours.as_fd()) else {
                eprintln!("skipped: no io_uring here");
                return;
            };
            if !knows {
                batch.quiet = Flags::empty();
            }
            for count in [0, 1, 2, 63, 64] {
                let refused = [vec![], vec![0], vec![1, 62], vec![63], (0..64).collect()];
                for refused in refused {
                    let mut list = list();
                    for place in 0..count {
                        // No packet of this socket is as long.
                        let len = if refused.contains(&place) { 900_000 } else { 9 };
                        let segment = Segment::new(GuestAddress(0), len);
                        list.append(&[segment], Permissions::Read).unwrap();
                    }
                    let mut results = Vec::new();
                    batch.write(&list, &vec![1; count], &mut results);
                    assert_eq!(results.len(), count);
                    for (place, result) in results.iter().enumerate() {
                        let refused = refused.contains(&place);
                        assert_eq!(result.is_err(), refused, "{place} of {count}: {result:?}");
                        if !refused {
                            assert_eq!(nix::unistd::read(&theirs, &mut [0; 99]), Ok(9));
                        }
                    }
                }
            }
            assert!(batch.is_sound());
        }
    }

    #[test]
    fn nothing_is_held_when_it_is_gone() {
        let (ours, theirs) = ends();
        let Some(batch) = Batch::new(ours.as_fd()) else {
            eprintln!("skipped: no io_uring here");
            return;
        };
        drop(ours);
        drop(batch);
        assert_eq!(nix::unistd::read(&theirs, &mut [0; 9]), Ok(0));
    }
}

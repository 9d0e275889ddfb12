//! What a worker hands to a companion, and how the answer comes back.
//!
//! ```text
//!  worker ──Op──▶ channel ──▶ companion: qcow2's, or a connection's; or librbd, without a channel
//!    ▲                           │
//!    └── eventfd in its ring ◀── mailbox: (slot, outcome)
//! ```
//!
//! A request that is handed over keeps its slot, so that no more wait than a queue has descriptors.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering, fence};
use std::sync::mpsc::Sender;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use ringside_rings::Segment;
use tracing::error;
use vm_memory::{GuestAddress, GuestMemory, Permissions};

use super::rbd::{self, Image};
use crate::blk::mailbox::Mailbox;
use crate::shell::{GuestSlice, Memory, is_logged, mark_slices};

/// What is to be done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::blk) enum Action {
    /// Read into the segments.
    Read,
    /// Write from the segments.
    Write,
    /// Make completed writes durable. An image's companion writes its tables; the worker then syncs the file.
    Flush,
    /// The range is not needed any more.
    Discard,
    /// The range is to read as zeroes.
    WriteZeroes {
        /// The space may be given back.
        unmap: bool,
    },
    /// Give back what waits and the storage does not have, [suspended](Outcome::Suspended), until [`Resume`](Self::Resume). There
    /// is no outcome of its own.
    Suspend,
    /// Let what comes from here on wait again. There is no outcome of its own.
    Resume,
    /// Let another program go on with the disk: nothing is in flight.
    Leave,
    /// Go on with a disk that another program has left.
    Adopt,
}

/// An operation of the request in a slot.
#[derive(Debug)]
pub(super) struct Op {
    /// The worker's slot.
    pub(super) slot: u16,
    /// What is to be done.
    pub(super) action: Action,
    /// Where on the disk, in bytes: within its capacity.
    pub(super) offset: u64,
    /// How many bytes.
    pub(super) len: u64,
    /// It is to be durable when it completes.
    pub(super) durable: bool,
    /// Do it, even where the worker could once it knows the place.
    pub(super) serve: bool,
    /// The request's data in guest memory.
    pub(super) segments: Vec<Segment>,
    /// Bytes of the segments before the operation's own.
    pub(super) skip: u64,
    /// What the segments are in.
    pub(super) memory: Arc<Memory>,
    /// Where the outcome goes.
    pub(super) mailbox: Arc<Mailbox<Outcome>>,
}

/// How an operation ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::blk) enum Outcome {
    /// It is done.
    Done,
    /// Nothing is done, but the worker can do it now: it finds the place.
    Again,
    /// It was not done, and will be by whoever has the ring next.
    Suspended,
    /// It failed, with this error number.
    Failed(i32),
}

/// A segment does not lie in guest memory.
#[derive(Debug, thiserror::Error)]
#[error("the buffer at guest address {addr:#x} cannot be accessed")]
pub(super) struct SegmentLost {
    addr: u64,
}

impl Op {
    /// Guest memory of `len` bytes of the operation's data, from `at` on.
    pub(super) fn slices(&self, at: u64, len: u64) -> Result<Vec<GuestSlice<'_>>, SegmentLost> {
        let mut slices = Vec::with_capacity(self.segments.len());
        let (mut skip, mut left) = (self.skip.saturating_add(at), len);
        for segment in &self.segments {
            let lost = || SegmentLost {
                addr: segment.addr.0,
            };
            let room = u64::from(segment.len).saturating_sub(skip);
            if room == 0 {
                skip = skip.saturating_sub(segment.len.into());
                continue;
            }
            let start = segment.addr.0.checked_add(skip).ok_or_else(lost)?;
            let take = room.min(left);
            if take == 0 {
                break;
            }
            skip = 0;
            left = left.saturating_sub(take);
            let count = usize::try_from(take).map_err(|_| lost())?;
            let found = self
                .memory
                .get_slices(GuestAddress(start), count, Permissions::ReadWrite)
                .map_err(|_| lost())?;
            for slice in found {
                slices.push(slice.map_err(|_| lost())?);
            }
        }
        if left > 0 {
            return Err(SegmentLost { addr: 0 });
        }
        Ok(slices)
    }

    /// Marks what a read may have written, by others than vm-memory.
    pub(super) fn mark_read(&self) {
        if is_logged(&self.memory)
            && let Ok(slices) = self.slices(0, self.len)
        {
            mark_slices(&slices, usize::MAX);
        }
    }

    /// Tells the worker.
    pub(super) fn end(self, outcome: Outcome) {
        self.mailbox.put(self.slot, outcome);
    }

    /// Leaves the outcome for the worker. Returns the mailbox if it is to be rung, once everything is posted.
    pub(super) fn post(self, outcome: Outcome) -> Option<Arc<Mailbox<Outcome>>> {
        let first = self.mailbox.post(self.slot, outcome);
        first.then_some(self.mailbox)
    }
}

/// Wakes a thread that waits for operations and for something else.
#[derive(Debug)]
pub(super) struct Wake {
    event: EventFd,
    /// It looks at nothing before the event comes.
    asleep: AtomicBool,
}

impl Wake {
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self {
            event: EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?,
            asleep: AtomicBool::new(false),
        })
    }

    /// Wakes it, whatever it does.
    pub(super) fn wake(&self) {
        if let Err(e) = self.event.write(1) {
            error!("cannot wake the connection's thread: {e}");
        }
    }

    /// Something was put into the channel.
    fn sent(&self) {
        // Either the sleeper finds it with its last look, or it is seen to sleep here: on both sides a fence (SeqCst) is
        // between the two.
        fence(Ordering::SeqCst);
        if self.asleep.swap(false, Ordering::Relaxed) {
            self.wake();
        }
    }

    /// About to wait for the event: one last look at the channel has to follow.
    pub(super) fn lie_down(&self) {
        self.asleep.store(true, Ordering::Relaxed);
        fence(Ordering::SeqCst);
    }

    /// Awake again, by the event or not.
    pub(super) fn get_up(&self, by_event: bool) {
        self.asleep.store(false, Ordering::Relaxed);
        if by_event && let Err(e) = self.event.read() {
            error!("cannot read an eventfd: {e}");
        }
    }
}

impl AsFd for Wake {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }
}

/// Wakes a thread once more when it goes: the last sender is gone then, perhaps.
#[derive(Debug)]
struct Bell(Arc<Wake>);

impl Drop for Bell {
    fn drop(&mut self) {
        self.0.wake();
    }
}

/// A worker's end: where it hands operations over, and takes outcomes back.
#[derive(Debug)]
pub(in crate::blk) struct Link {
    way: Way,
    mailbox: Arc<Mailbox<Outcome>>,
}

#[derive(Debug)]
enum Way {
    /// To a companion's thread.
    Thread {
        sender: Sender<Op>,
        /// Wakes one that waits for other things as well; goes after the sender.
        wake: Option<Bell>,
    },
    /// To an image of a Ceph cluster.
    Image(Arc<Image>),
}

impl Link {
    pub(super) fn new(sender: Sender<Op>, wake: Option<Arc<Wake>>) -> io::Result<Self> {
        let wake = wake.map(Bell);
        Self::by(Way::Thread { sender, wake })
    }

    pub(super) fn to_image(image: Arc<Image>) -> io::Result<Self> {
        Self::by(Way::Image(image))
    }

    fn by(way: Way) -> io::Result<Self> {
        Ok(Self {
            way,
            mailbox: Arc::new(Mailbox::new()?),
        })
    }

    /// For the operation's `mailbox`.
    pub(super) fn mailbox(&self) -> Arc<Mailbox<Outcome>> {
        Arc::clone(&self.mailbox)
    }

    /// Hands an operation over, to be [announced](Self::announce). `false` if nobody is there any more.
    pub(super) fn hand_over(&self, op: Op) -> bool {
        match &self.way {
            Way::Thread { sender, .. } => sender.send(op).is_ok(),
            Way::Image(image) => {
                rbd::begin(image, op);
                true
            }
        }
    }

    /// Wakes a companion that sleeps, after a batch was handed over.
    pub(in crate::blk) fn announce(&self) {
        if let Way::Thread {
            wake: Some(Bell(wake)),
            ..
        } = &self.way
        {
            wake.sent();
        }
    }

    /// Flushes, and waits until that is done.
    ///
    /// # Errors
    /// What the companion, or the system, said.
    pub(in crate::blk) fn flush(&self) -> io::Result<()> {
        self.have(Action::Flush)
    }

    /// Has something done that is about no range, and waits until it is.
    ///
    /// # Errors
    /// What the companion, or the system, said.
    pub(in crate::blk) fn have(&self, action: Action) -> io::Result<()> {
        if !self.say(action) {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        let mut outcomes = Vec::new();
        while outcomes.is_empty() {
            let mut fds = [PollFd::new(self.mailbox.as_fd(), PollFlags::POLLIN)];
            match poll(&mut fds, PollTimeout::NONE) {
                Ok(_) | Err(Errno::EINTR) => self.take(&mut outcomes),
                Err(e) => return Err(e.into()),
            }
        }
        match outcomes.first() {
            Some((_, Outcome::Failed(error))) => Err(io::Error::from_raw_os_error(*error)),
            _ => Ok(()),
        }
    }

    /// Has what waits given back, or not any more, by a companion that may keep it waiting: one that is connected to a server.
    pub(super) fn suspend(&self, suspended: bool) {
        if let Way::Thread { wake: Some(_), .. } = &self.way {
            // One that is gone has nothing.
            self.say(match suspended {
                true => Action::Suspend,
                false => Action::Resume,
            });
        }
    }

    /// Hands over what is about no range. `false` if nobody is there any more.
    fn say(&self, action: Action) -> bool {
        let handed_over = self.hand_over(Op {
            slot: 0,
            action,
            offset: 0,
            len: 0,
            durable: true,
            serve: true,
            segments: Vec::new(),
            skip: 0,
            memory: Arc::default(),
            mailbox: self.mailbox(),
        });
        self.announce();
        handed_over
    }

    /// Takes all outcomes; `ended` is emptied first.
    pub(super) fn take(&self, ended: &mut Vec<(u16, Outcome)>) {
        self.mailbox.take(ended);
    }
}

impl AsRawFd for Link {
    /// Readable when outcomes wait.
    fn as_raw_fd(&self) -> RawFd {
        self.mailbox.as_raw_fd()
    }
}

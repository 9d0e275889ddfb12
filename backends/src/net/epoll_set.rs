//! The descriptors that a worker waits on.
//!
//! All of them are edge-triggered: an eventfd then needs no read to be quiet again, and a TAP whose packets
//! nobody can take needs no change of the set. That saves a system call for each kick, and a descriptor
//! of the peer's choosing is never read.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::sync::Arc;

use epoll::{ControlOptions, Event, Events};

/// Most events of one wait.
const BATCH: usize = 8;

/// An epoll instance.
#[derive(Debug)]
pub(super) struct EpollSet {
    instance: Arc<Instance>,
    events: [Event; BATCH],
}

impl EpollSet {
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self {
            instance: Arc::new(Instance(epoll::create(true)?)),
            events: [Event::new(Events::empty(), 0); BATCH],
        })
    }

    /// Waits on a descriptor for input, from now on; if there is some already, once for that.
    pub(super) fn add(&self, fd: RawFd, token: u64) -> io::Result<()> {
        self.add_for(fd, Events::EPOLLIN, token)
    }

    fn add_for(&self, fd: RawFd, events: Events, token: u64) -> io::Result<()> {
        self.instance.add(fd, events, token)
    }

    /// Lets somebody add descriptors to this set, all with one token.
    pub(super) fn watcher(&self, token: u64) -> Watcher {
        Watcher {
            instance: Arc::clone(&self.instance),
            token,
        }
    }

    /// Waits on a descriptor no longer.
    pub(super) fn remove(&self, fd: RawFd) {
        let event = Event::new(Events::empty(), 0);
        // A descriptor that could not be added is not there to be removed.
        let _ = epoll::ctl(self.instance.0, ControlOptions::EPOLL_CTL_DEL, fd, event);
    }

    /// Waits for at most `timeout` milliseconds, for ever if it is negative, and returns tokens and what
    /// happened to them. A signal ends the wait without events.
    pub(super) fn wait(
        &mut self,
        timeout: i32,
    ) -> io::Result<impl Iterator<Item = (u64, Events)> + use<>> {
        let count = match epoll::wait(self.instance.0, timeout, &mut self.events) {
            Ok(count) => count,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => 0,
            Err(e) => return Err(e),
        };
        Ok(self
            .events
            .into_iter()
            .take(count)
            .map(|event| (event.data, Events::from_bits_retain(event.events))))
    }
}

/// One token of a set, for somebody whose descriptors come and go. A descriptor leaves the set when it is closed.
#[derive(Debug)]
pub(super) struct Watcher {
    instance: Arc<Instance>,
    token: u64,
}

impl Watcher {
    /// Waits on a descriptor for input and for room for output.
    pub(super) fn add(&self, fd: BorrowedFd<'_>) -> io::Result<()> {
        let both = Events::EPOLLIN | Events::EPOLLOUT;
        self.instance.add(fd.as_raw_fd(), both, self.token)
    }
}

/// The kernel's object.
#[derive(Debug)]
struct Instance(RawFd);

impl Instance {
    fn add(&self, fd: RawFd, events: Events, token: u64) -> io::Result<()> {
        let event = Event::new(events | Events::EPOLLET, token);
        epoll::ctl(self.0, ControlOptions::EPOLL_CTL_ADD, fd, event)
    }
}

impl Drop for Instance {
    fn drop(&mut self) {
        // Nothing is lost if this fails.
        let _ = epoll::close(self.0);
    }
}

//! Where a worker finds what other threads did for the requests in its slots.

use std::io;
use std::mem;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::sync::{Mutex, PoisonError};

use nix::sys::eventfd::{EfdFlags, EventFd};
use tracing::error;

/// The outcomes for one worker, by slot.
#[derive(Debug)]
pub(super) struct Mailbox<O> {
    ended: Mutex<Vec<(u16, O)>>,
    event: EventFd,
}

impl<O> Mailbox<O> {
    /// An empty one.
    ///
    /// # Errors
    /// What the system said.
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self {
            ended: Mutex::default(),
            event: EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?,
        })
    }

    /// Leaves an outcome. Returns whether the worker is to be [woken](Self::ring): who finds others there is announced with
    /// them.
    #[must_use]
    pub(super) fn post(&self, slot: u16, outcome: O) -> bool {
        let mut ended = self.ended.lock().unwrap_or_else(PoisonError::into_inner);
        ended.push((slot, outcome));
        ended.len() == 1
    }

    /// Wakes the worker.
    pub(super) fn ring(&self) {
        if let Err(e) = self.event.write(1) {
            error!("cannot wake the worker: {e}");
        }
    }

    /// Leaves an outcome, and wakes the worker if need be.
    pub(super) fn put(&self, slot: u16, outcome: O) {
        if self.post(slot, outcome) {
            self.ring();
        }
    }

    /// Takes all outcomes; `ended` is emptied first. The eventfd is never read: who waits for it is told of each write.
    pub(super) fn take(&self, ended: &mut Vec<(u16, O)>) {
        ended.clear();
        let mut list = self.ended.lock().unwrap_or_else(PoisonError::into_inner);
        mem::swap(ended, &mut list);
    }
}

impl<O> AsFd for Mailbox<O> {
    /// Readable when outcomes wait.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }
}

impl<O> AsRawFd for Mailbox<O> {
    /// Readable when outcomes wait.
    fn as_raw_fd(&self) -> RawFd {
        self.event.as_fd().as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_worker_is_woken_once_for_what_comes_together() {
        let mailbox = Mailbox::new().unwrap();
        let mut ended = vec![(7, 'z')];
        mailbox.put(1, 'a');
        mailbox.put(0, 'b');
        assert_eq!(mailbox.event.read(), Ok(1));
        mailbox.take(&mut ended);
        assert_eq!(ended, [(1, 'a'), (0, 'b')]);
        mailbox.put(2, 'c');
        assert_eq!(mailbox.event.read(), Ok(1));
        mailbox.take(&mut ended);
        assert_eq!(ended, [(2, 'c')]);
        mailbox.take(&mut ended);
        assert_eq!(ended, []);
    }
}

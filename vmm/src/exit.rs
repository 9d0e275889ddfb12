//! Why the virtual machine ends, and how whoever finds out tells the control thread.

use std::fmt;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// Why the virtual machine ends. Each has an exit status of its own; `--help` lists them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ExitReason {
    /// The guest entered ACPI S5.
    PowerOff,
    /// The user or a supervisor asked for it: SIGTERM, SIGINT, or the console's escape key.
    Requested(&'static str),
    /// The guest asked for a reset, by the device named here.
    Reset(&'static str),
    /// The guest's kernel reported a panic through pvpanic.
    Panic,
    /// The guest's processor gave up (triple fault), or KVM could not go on.
    Crash(String),
    /// A device or thread of the VMM failed.
    Failure(String),
}

impl ExitReason {
    /// The process's exit status.
    pub fn status(&self) -> u8 {
        match self {
            Self::PowerOff | Self::Requested(_) => 0,
            Self::Failure(_) => 1,
            // 2 is a usage error, reported before there is a machine.
            Self::Reset(_) => 3,
            Self::Panic => 4,
            Self::Crash(_) => 5,
        }
    }
}

impl fmt::Display for ExitReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::PowerOff => write!(f, "the guest powered off"),
            Self::Requested(by) => write!(f, "ended by {by}"),
            Self::Reset(by) => write!(f, "the guest asked for a reset ({by})"),
            Self::Panic => write!(f, "the guest's kernel panicked"),
            Self::Crash(why) => write!(f, "the guest crashed: {why}"),
            Self::Failure(why) => write!(f, "{why}"),
        }
    }
}

struct Shared {
    is_set: AtomicBool,
    reason: Mutex<Option<(ExitReason, Instant)>>,
    event: EventFd,
}

/// Ends the machine. The first reason given counts; later ones are ignored.
#[derive(Clone)]
pub struct ExitHandle(Arc<Shared>);

impl ExitHandle {
    /// A handle that nobody used yet. Fails if the process has no file descriptor left.
    pub fn new() -> io::Result<Self> {
        let event = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        Ok(Self(Arc::new(Shared {
            is_set: AtomicBool::new(false),
            reason: Mutex::new(None),
            event,
        })))
    }

    /// Asks the control thread to end the machine.
    pub fn end(&self, reason: ExitReason) {
        let mut first = self.0.reason.lock().unwrap_or_else(PoisonError::into_inner);
        if first.is_none() {
            tracing::debug!(%reason, "end of the machine asked for");
            *first = Some((reason, Instant::now()));
            self.0.is_set.store(true, Ordering::Release);
            // Cannot fail: the counter is written once.
            if let Err(error) = self.0.event.write(1) {
                tracing::error!(%error, "cannot wake the control thread");
            }
        }
    }

    /// Whether the machine is to end. Cheap enough for each exit of a processor.
    pub fn is_set(&self) -> bool {
        self.0.is_set.load(Ordering::Acquire)
    }

    /// The first reason given, if any was.
    pub fn reason(&self) -> Option<ExitReason> {
        self.first().map(|(reason, _)| reason)
    }

    /// Since when the machine is to end.
    pub fn since(&self) -> Option<Instant> {
        self.first().map(|(_, since)| since)
    }

    fn first(&self) -> Option<(ExitReason, Instant)> {
        let first = self.0.reason.lock();
        first.unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl AsRawFd for ExitHandle {
    /// Becomes readable when [`ExitHandle::end`] was called.
    fn as_raw_fd(&self) -> RawFd {
        self.0.event.as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_reason_counts() {
        let exit = ExitHandle::new().unwrap();
        assert_eq!(exit.reason(), None);
        let other = exit.clone();
        other.end(ExitReason::Panic);
        exit.end(ExitReason::Reset("i8042"));
        assert_eq!(exit.reason(), Some(ExitReason::Panic));
        assert_eq!(exit.0.event.read().unwrap(), 1);
    }

    #[test]
    fn statuses_of_different_ends_differ() {
        let crash = ExitReason::Crash(String::new());
        let failure = ExitReason::Failure(String::new());
        let all = [
            ExitReason::PowerOff,
            failure,
            ExitReason::Reset(""),
            ExitReason::Panic,
            crash,
        ];
        let mut statuses: Vec<u8> = all.iter().map(ExitReason::status).collect();
        statuses.dedup();
        assert_eq!(statuses, [0, 1, 3, 4, 5]);
        assert_eq!(ExitReason::Requested("SIGTERM").status(), 0);
    }
}

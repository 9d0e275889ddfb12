//! Holds the processors of a machine that is paused: none of them is in the guest until it is resumed.
//!
//! Back-ends go on meanwhile: they end the requests that the guest has made, and what comes for it waits in its rings.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use vmm_sys_util::signal::{Killable, SIGRTMIN};

/// How long a processor may take to leave the guest: it may be in a device that waits for somebody.
const PATIENCE: Duration = Duration::from_secs(5);

/// The machine is not paused, or not resumed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// Nothing to do.
    #[error("the machine is paused already")]
    Paused,
    /// Nothing to do.
    #[error("the machine is not paused")]
    Running,
    /// A processor is held up in a device.
    #[error(
        "a processor does not leave its device within {} seconds: is somebody reading the console?",
        PATIENCE.as_secs()
    )]
    HeldUp,
}

#[derive(Default)]
struct State {
    /// Those of the processors.
    threads: Vec<JoinHandle<()>>,
    /// How many of them wait.
    waiting: usize,
}

#[derive(Default)]
struct Shared {
    /// Changed with `state` locked.
    closed: AtomicBool,
    state: Mutex<State>,
    changed: Condvar,
}

/// What each processor passes before it enters the guest.
#[derive(Clone, Default)]
pub struct Gate(Arc<Shared>);

impl Gate {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The thread of a processor, which is to be held from now on.
    pub fn add(&self, thread: JoinHandle<()>) {
        self.lock().threads.push(thread);
    }

    /// All of these, which nobody holds any more.
    pub fn take(&self) -> Vec<JoinHandle<()>> {
        self.open();
        std::mem::take(&mut self.lock().threads)
    }

    /// Whether it is closed. Cheap enough for each exit of a processor.
    #[inline]
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.0.closed.load(Ordering::Acquire)
    }

    /// Holds the calling processor until the gate is open. It is opened for processors that are to end, too.
    pub fn wait(&self) {
        let mut state = self.lock();
        state.waiting = state.waiting.saturating_add(1);
        self.0.changed.notify_all();
        while self.is_closed() {
            let woken = self.0.changed.wait(state);
            state = woken.unwrap_or_else(PoisonError::into_inner);
        }
        state.waiting = state.waiting.saturating_sub(1);
    }

    /// Gets all processors out of the guest, and returns when they are.
    ///
    /// # Errors
    /// [`Error::Paused`], or [`Error::HeldUp`], and then all of them go on.
    pub fn pause(&self) -> Result<(), Error> {
        let mut state = self.lock();
        if self.0.closed.swap(true, Ordering::AcqRel) {
            return Err(Error::Paused);
        }
        let end = Instant::now() + PATIENCE;
        // Open again: somebody else resumed it, or it ends.
        while self.is_closed() {
            let inside = state.threads.iter().filter(|thread| !thread.is_finished());
            if inside.clone().count() <= state.waiting {
                return Ok(());
            }
            if Instant::now() > end {
                drop(state);
                self.open();
                return Err(Error::HeldUp);
            }
            // Again and again: a signal that comes within a device's system call interrupts that one only.
            for thread in inside {
                if let Err(error) = thread.kill(SIGRTMIN()) {
                    tracing::debug!(%error, "a processor's thread is gone already");
                }
            }
            let waited = self.0.changed.wait_timeout(state, Duration::from_millis(1));
            (state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        }
        Ok(())
    }

    /// Lets all of them go on.
    ///
    /// # Errors
    /// [`Error::Running`]
    pub fn resume(&self) -> Result<(), Error> {
        if self.open() {
            Ok(())
        } else {
            Err(Error::Running)
        }
    }

    /// Returns whether it was closed.
    fn open(&self) -> bool {
        let _state = self.lock();
        let was_closed = self.0.closed.swap(false, Ordering::AcqRel);
        self.0.changed.notify_all();
        was_closed
    }
}

//! What the driver has set by the control queue, and how the workers learn of it.
//!
//! The control queue's worker publishes a new set and waits until each queue pair's worker goes by it; only
//! then the command is answered. A worker on its data path only compares a number.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::coalesce::Coalescing;
use super::config::MacAddress;
use super::filter::Filter;
use super::hash::Hashing;
use super::steering::Rss;

/// How long a command may wait for the workers before it is answered as failed: they take notice at once, unless a busy host
/// lets them not run.
const PATIENCE: Duration = Duration::from_secs(5);

/// Which queue pairs receive, of those whose rings the front-end has enabled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Pairs {
    /// All: no driver speaks to a control queue of ours.
    Enabled,
    /// The first ones, as many as the driver said.
    First(u16),
    /// Those that have got buffers: the driver said how many it uses before its control queue came to us.
    Fed,
}

/// One set.
#[derive(Debug, Clone)]
pub(super) struct Settings {
    /// Which packets the driver wants.
    pub(super) filter: Filter,
    /// Queue pairs in use.
    pub(super) pairs: Pairs,
    /// Another program has the link as well: queues stay attached to it, or detached, as they are.
    pub(super) frozen: bool,
    /// No link is touched: it may be another program's.
    pub(super) left: bool,
    /// The driver is asked to make itself known to the network (VIRTIO_NET_S_ANNOUNCE), and has not answered yet.
    pub(super) announce: bool,
    /// The offloads with which the driver takes packets, as bits of the features, since it has changed its mind about them.
    pub(super) offloads: Option<u64>,
    /// The address that the back-end is to make known to the network, and how often it was asked to.
    pub(super) rarp: (MacAddress, u32),
    /// What is hashed, for a driver that wants reports, or its packets steered.
    pub(super) hashing: Arc<Hashing>,
    /// How packets are steered to queue pairs, if the driver says so; the link was told.
    pub(super) rss: Option<Arc<Rss>>,
    /// By queue: how its interrupts are held back.
    pub(super) coalescing: Box<[Coalescing]>,
    /// The same of all receive queues, and of all transmit queues, as far as the driver has said so.
    pub(super) coalescing_of_all: [Coalescing; 2],
}

impl Settings {
    /// Those of a driver that has not spoken yet, on a device with this many queue pairs.
    pub(super) fn new(filter: Filter, pairs: u16) -> Self {
        Self {
            filter,
            pairs: Pairs::Enabled,
            frozen: false,
            left: false,
            announce: false,
            offloads: None,
            rarp: Default::default(),
            hashing: Arc::new(Hashing::off()),
            rss: None,
            coalescing: vec![Coalescing::default(); usize::from(pairs) * 2].into(),
            coalescing_of_all: Default::default(),
        }
    }

    /// Uses the first pairs only. Queues of the others are disabled: what was said of one alone is forgotten (VIRTIO 1.3, 5.1.6.5.9).
    pub(super) fn use_pairs(&mut self, pairs: u16) {
        self.pairs = Pairs::First(pairs);
        // Receive queues have even numbers, transmit queues odd ones (VIRTIO 1.3, 5.1.2).
        let of_all = self.coalescing_of_all.iter().cycle();
        let queues = self.coalescing.iter_mut().zip(of_all);
        for (queue, of_all) in queues.skip(usize::from(pairs) * 2) {
            *queue = *of_all;
        }
    }

    /// The driver uses a queue.
    pub(super) fn uses(&self, queue: u16) -> bool {
        match self.pairs {
            Pairs::First(count) => queue / 2 < count,
            Pairs::Enabled | Pairs::Fed => true,
        }
    }

    /// How interrupts of a queue are held back.
    pub(super) fn coalescing_of(&self, queue: u16) -> Coalescing {
        let found = self.coalescing.get(usize::from(queue));
        found.copied().unwrap_or_default()
    }
}

#[derive(Debug)]
struct State {
    settings: Arc<Settings>,
    /// By worker: the version it goes by.
    adopted: Box<[u64]>,
}

/// The present set, between the threads.
#[derive(Debug)]
pub(super) struct Shared {
    version: AtomicU64,
    state: Mutex<State>,
    adopted: Condvar,
    /// By worker: wakes it.
    wakers: Box<[EventFd]>,
}

impl Shared {
    /// Begins with one set, for this many workers of queue pairs.
    pub(super) fn new(settings: Settings, workers: u16) -> io::Result<Self> {
        let wakers = (0..workers)
            .map(|_| EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC))
            .collect::<io::Result<_>>()?;
        Ok(Self {
            version: AtomicU64::new(0),
            state: Mutex::new(State {
                settings: Arc::new(settings),
                adopted: vec![0; workers.into()].into(),
            }),
            adopted: Condvar::new(),
            wakers,
        })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The present set.
    pub(super) fn get(&self) -> Arc<Settings> {
        Arc::clone(&self.lock().settings)
    }

    /// Changes the set and wakes all workers. Returns the version to wait for.
    pub(super) fn change(&self, change: impl FnOnce(&mut Settings)) -> u64 {
        let version = {
            let mut state = self.lock();
            change(Arc::make_mut(&mut state.settings));
            self.version.fetch_add(1, Ordering::Release).wrapping_add(1)
        };
        for waker in &self.wakers {
            // A counter at its maximum wakes as well.
            let _ = waker.write(1);
        }
        version
    }

    /// Waits until all workers go by this version. `false` if one takes too long.
    pub(super) fn wait(&self, version: u64) -> bool {
        let deadline = Instant::now() + PATIENCE;
        let mut state = self.lock();
        while state.adopted.iter().any(|&adopted| adopted < version) {
            let Some(left) = deadline.checked_duration_since(Instant::now()) else {
                return false;
            };
            state = self
                .adopted
                .wait_timeout(state, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
        true
    }

    /// The set has changed since `known`.
    #[inline]
    pub(super) fn is_newer(&self, known: u64) -> bool {
        self.version.load(Ordering::Acquire) != known
    }

    /// The present set with its version, for a worker to go by.
    pub(super) fn latest(&self) -> (u64, Arc<Settings>) {
        let state = self.lock();
        (
            self.version.load(Ordering::Acquire),
            Arc::clone(&state.settings),
        )
    }

    /// The worker now goes by this version.
    pub(super) fn adopt(&self, worker: u16, version: u64) {
        if let Some(adopted) = self.lock().adopted.get_mut(usize::from(worker)) {
            *adopted = version;
        }
        self.adopted.notify_all();
    }

    /// What a worker waits on for changes. Edge-triggered: it is never read.
    pub(super) fn waker(&self, worker: u16) -> Option<RawFd> {
        self.wakers.get(usize::from(worker)).map(AsRawFd::as_raw_fd)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_change_is_complete_when_all_workers_have_adopted_it() {
        let filter = Filter::new(MacAddress::default(), false);
        let shared = Shared::new(Settings::new(filter, 2), 2).unwrap();
        let version = shared.change(|s| s.pairs = Pairs::First(1));
        assert!(shared.is_newer(0));
        std::thread::scope(|scope| {
            for worker in 0..2 {
                let shared = &shared;
                scope.spawn(move || {
                    let (latest, settings) = shared.latest();
                    assert_eq!((latest, settings.pairs), (version, Pairs::First(1)));
                    shared.adopt(worker, latest);
                });
            }
            assert!(shared.wait(version));
        });
        let next = shared.change(|s| s.pairs = Pairs::First(2));
        shared.adopt(0, next);
        assert!(!shared.wait(next), "worker 1 has not adopted it");
    }
}

//! The data path of one queue: kick → drain the ring → io_uring on guest memory → used ring → interrupt.
//!
//! One turn of the loop costs one `io_uring_enter`, which submits a batch and waits for the next event, and at most one
//! write to the call eventfd. Kicks, completions and the shell's commands all arrive as completions of the same ring.
//! Nothing is allocated for a request: it lives in a slot, of which there are as many as descriptors in the ring.
//!
//! So a request that is alone costs three system calls, and one among many a fraction of that:
//!
//! ```text
//!  io_uring_enter  submits it, waits for its end
//!  write           interrupts the driver
//!  io_uring_enter  waits for the next kick, which is never read
//! ```
//!
//! Between having nothing to do and sleeping lies the poll window (`PollWindow`): while events come fast, the worker looks for the
//! next one without telling the driver that it sleeps, which saves its wake-up and the driver's kick:
//!
//! ```text
//!  turn: drain, publish, interrupt ──▶ spin, notifications off ──▶ arm: notifications on ──▶ look once more ──▶ sleep
//!    ▲                                   │ something came                                     │                  │
//!    └───────────────────────────────────┴────────────────────────────────────────────────────┴──────────────────┘
//! ```
//!
//! A long batch is not worked off in one go: the storage gets its operations in groups, and the driver what was answered at
//! once, so that both work while the rest is drained.
//!
//! The interrupt does not go through the ring as well: io_uring hands a write to a blocking eventfd, which is what
//! front-ends send, to another thread of the kernel, and a driver that does not take its interrupts could pile them up.
//!
//! | Module | Its matter |
//! | --- | --- |
//! | this one | the thread: events, the poll window, a ring that comes and goes |
//! | `turn` | one turn on a ring: what ended is answered, what is new begins |
//! | `turn::steps` | from one operation of a request to the next |
//! | `turn::zoned` | what the device is asked for, zones held |
//! | `job` | a request that is being served, and its slot |

mod job;
mod turn;

use std::collections::VecDeque;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::Sender;
use std::time::{Duration, Instant};

use ringside_rings::{ChainBuf, Segment};
use tracing::{debug, error, info, warn};

use super::device::BlockDevice;
use super::image::{Outcome, Side};
use super::limits::Throttle;
use super::offload::{self, DeviceLink, Offload};
use super::request::{ID_LEN, Limits, Range};
use super::stats::{Clock, QueueStats};
use super::uring::{Completion, Uring};
use super::zones::Zones;
use crate::shell::{Chain as Causes, Command, Commands, LogLimit, PollLimits, PollWindow, Vring};

use job::Job;
use turn::{Turn, abandon_zone};

/// Entries of the submission queue; a larger batch takes a system call more.
const SUBMISSIONS: u32 = 256;
/// Tag of the poll on the command eventfd.
const COMMANDS: u32 = 0;
/// Tag of the poll on the companion's outcomes.
const OUTCOMES: u32 = 1;
/// Tag of the poll on the outcomes of what the device was asked for.
const DEVICE: u32 = 2;
/// Kicks count up from here.
const KICKS: u32 = 3;
/// How often a ring without a kick descriptor is looked at.
const POLL_INTERVAL: Duration = Duration::from_micros(100);
/// Pauses between two looks while spinning: about as long as the look.
const SPINS: u32 = 4;

/// What all workers of a disk have in common.
#[derive(Debug, Clone)]
pub(super) struct Shared {
    pub(super) clock: Clock,
    pub(super) throttle: Arc<Throttle>,
    /// Where the data is; with none and without a companion, requests succeed at once, and no data moves.
    pub(super) files: Vec<Arc<File>>,
    /// What the disk can do by ioctls, if it is a block device.
    pub(super) device: Option<Arc<dyn BlockDevice>>,
    /// Who does them.
    pub(super) offload: Arc<Offload>,
    /// The disk's zones, if it has some.
    pub(super) zones: Option<Arc<Zones>>,
    pub(super) limits: Limits,
    /// The disk's size in bytes, which may change: it stands in for `limits.capacity`.
    pub(super) capacity: Arc<AtomicU64>,
    /// Buffers must be aligned to this many bytes.
    pub(super) memory_align: u32,
    /// Guest memory is to be registered with io_uring.
    pub(super) registers: bool,
    /// Transfers are to be polled for.
    pub(super) polls: bool,
    /// For how long to spin for requests, while nothing is in flight.
    pub(super) poll: PollLimits,
    /// For how long to spin while the storage works.
    pub(super) poll_storage: PollLimits,
    pub(super) serial: [u8; ID_LEN],
    /// `wce` in the configuration space.
    pub(super) writeback: Arc<AtomicBool>,
}

/// What ended since the last turn, and how.
#[derive(Debug, Default)]
struct Ended {
    /// In the kernel.
    completed: Vec<(u16, i32)>,
    /// At the companion.
    outcomes: Vec<(u16, Outcome)>,
    /// On the disk's thread.
    device: Vec<(u16, offload::Outcome)>,
}

impl Ended {
    fn clear(&mut self) {
        let Self {
            completed,
            outcomes,
            device,
        } = self;
        completed.clear();
        outcomes.clear();
        device.clear();
    }

    /// The slots that were waiting for it.
    fn slots(&self) -> impl Iterator<Item = u16> {
        let completed = self.completed.iter().map(|&(slot, _)| slot);
        let outcomes = self.outcomes.iter().map(|&(slot, _)| slot);
        let device = self.device.iter().map(|&(slot, _)| slot);
        completed.chain(outcomes).chain(device)
    }
}

pub(super) struct Worker {
    shared: Shared,
    commands: Commands,
    /// Ends before `side` does: what it has under way is counted there.
    uring: Uring,
    side: Option<Side>,
    device: Option<DeviceLink>,
    queue: Option<Queue>,
    /// Number of the present kick poll; each start takes a new one.
    kick_tag: u32,
    /// Commands or outcomes do not arrive any more.
    deaf: bool,
    /// Take no chains.
    paused: bool,
    /// Who waits for that to have taken effect.
    pausing: Vec<Sender<()>>,
    stats: Arc<QueueStats>,
    /// For requests, and for the storage.
    windows: [PollWindow; 2],
    limit: LogLimit,
}

/// A ring that this worker owns.
struct Queue {
    vring: Box<Vring>,
    chain: ChainBuf,
    jobs: Vec<Option<Job>>,
    /// What is left of the ranges of each job, the last first. Grows to the most that a slot has had, and is kept.
    ranges: Vec<Vec<Range>>,
    /// Those of a request that has no slot yet.
    new_ranges: Vec<Range>,
    /// Where a job that has more to say than its status writes it. Grows to the most that a slot has had, and is kept.
    answers: Vec<Vec<Segment>>,
    free: Vec<u16>,
    /// Jobs that wait for the bounce buffer, which `bouncing` has.
    waiting: VecDeque<u16>,
    bouncing: Option<u16>,
    paused: bool,
    /// Chains wait because of a limit, probably for so long.
    throttled: Option<Duration>,
    /// The driver broke the ring; it is kept until the shell takes it back.
    broken: bool,
    /// Where to give it back, once nothing is in flight.
    stop: Option<Sender<Box<Vring>>>,
    /// What waits is not to be waited for then: whoever has the ring next does it.
    suspends: bool,
}

impl Worker {
    /// A worker on the calling thread.
    pub(super) fn new(
        shared: Shared,
        side: Option<Side>,
        commands: Commands,
        stats: Arc<QueueStats>,
    ) -> std::io::Result<Self> {
        let mut uring = Uring::new(
            SUBMISSIONS,
            shared.files.clone(),
            shared.registers,
            shared.polls,
        )?;
        uring.poll(commands.as_raw_fd(), COMMANDS)?;
        if let Some(side) = &side {
            uring.poll(side.as_raw_fd(), OUTCOMES)?;
        }
        let device = match &shared.device {
            Some(device) => Some(DeviceLink::new(
                Arc::clone(device),
                Arc::clone(&shared.offload),
            )?),
            None => None,
        };
        if let Some(device) = &device {
            uring.poll(device.mailbox().as_raw_fd(), DEVICE)?;
        }
        Ok(Self {
            windows: [shared.poll, shared.poll_storage].map(PollWindow::new),
            shared,
            commands,
            uring,
            side,
            device,
            queue: None,
            kick_tag: KICKS,
            deaf: false,
            paused: false,
            pausing: Vec::new(),
            stats,
            limit: LogLimit::default(),
        })
    }

    /// Serves until told to end.
    pub(super) fn run(mut self) {
        let mut ended = Ended::default();
        let mut wait = false;
        loop {
            if let Err(e) = self.enter(wait) {
                // Nothing can be served without it, and the shell sees that the thread is gone.
                error!("io_uring failed: {e}");
                return;
            }
            ended.clear();
            let (mut commanded, mut answered, mut asked) = (false, false, false);
            while let Some(completion) = self.uring.completion() {
                match completion {
                    Completion::Io { slot, result } => {
                        if let Some(side) = &mut self.side {
                            side.ended(slot);
                        }
                        ended.completed.push((slot, result));
                    }
                    Completion::Poll { tag, result, more } => {
                        commanded |= tag == COMMANDS;
                        answered |= tag == OUTCOMES;
                        asked |= tag == DEVICE;
                        self.polled(tag, result, more);
                    }
                }
            }
            if self.deaf {
                // The shell sees that the thread is gone; one that hears no commands would keep it waiting for ever.
                return;
            }
            if let (true, Some(side)) = (answered, &self.side) {
                side.take(&mut ended.outcomes);
            }
            if let (true, Some(device)) = (asked, &self.device) {
                device.mailbox().take(&mut ended.device);
            }
            if commanded {
                self.commands.acknowledge();
                while let Some(command) = self.commands.next() {
                    match command {
                        Command::Start(vring) => self.start(vring),
                        Command::Stop {
                            index,
                            suspend,
                            done,
                        } => self.stop(index, suspend, done),
                        Command::Pause { done } => {
                            self.pause(true);
                            self.pausing.push(done);
                        }
                        Command::Resume => {
                            self.pause(false);
                            self.pausing.clear();
                        }
                        Command::Exit => {
                            self.report();
                            return;
                        }
                    }
                }
            }
            wait = !self.turn(&ended);
            self.tell_paused();
        }
    }

    /// Takes no chains from now on, or takes them again.
    fn pause(&mut self, paused: bool) {
        self.paused = paused;
        if let Some(queue) = &mut self.queue {
            queue.paused = paused;
        }
    }

    /// Tells who waits for it that nothing is in flight.
    fn tell_paused(&mut self) {
        if !self.pausing.is_empty()
            && self.uring.in_flight() == 0
            && self.queue.as_ref().is_none_or(Queue::idle)
        {
            for done in self.pausing.drain(..) {
                // Its client may have left.
                let _ = done.send(());
            }
        }
    }

    /// Submits what was begun. To `wait` is to return only when there is something to do: the worker spins for a while if
    /// that pays, then lets the driver know that it wants to be kicked, and sleeps.
    fn enter(&mut self, wait: bool) -> std::io::Result<()> {
        if !wait || self.uring.polling() {
            return self.uring.enter(0, None);
        }
        if let Some(throttled) = self.queue.as_ref().and_then(|queue| queue.throttled) {
            return self.uring.enter(1, Some(throttled));
        }
        if self.polled_by_wish() {
            return self.uring.enter(1, Some(POLL_INTERVAL));
        }
        let [for_requests, for_storage] = &mut self.windows;
        let poll = match (&self.queue, self.uring.in_flight()) {
            (Some(_), 0) => for_requests,
            _ => for_storage,
        };
        let start = Instant::now();
        let window = poll.now();
        if !window.is_zero() {
            self.uring.enter(0, None)?;
            let queue = self.queue.as_mut();
            if let Some(after) = spin(queue, &mut self.uring, start, window) {
                poll.hit(after);
                return self.uring.enter(0, None);
            }
        }
        let waiting = arm(self.queue.as_mut());
        self.uring.enter(usize::from(!waiting), None)?;
        poll.slept(start.elapsed(), window);
        Ok(())
    }

    /// The front-end wants its ring to be polled.
    fn polled_by_wish(&self) -> bool {
        self.queue
            .as_ref()
            .is_some_and(|q| q.vring.kick.is_none() && q.serves())
    }

    fn polled(&mut self, tag: u32, result: i32, more: bool) {
        if tag >= KICKS {
            if tag != self.kick_tag {
                return; // of a ring that was given back
            }
            self.stats.kicks.add(1);
        }
        let gone = i32::from(libc::POLLERR | libc::POLLHUP | libc::POLLNVAL);
        if result < 0 || result & gone != 0 {
            if tag < KICKS {
                error!("an eventfd of this program failed ({result})");
                self.deaf = true;
                return;
            }
            // A front-end can bring this about as often as it likes.
            if let Some(held_back) = self.limit.check() {
                warn!(
                    held_back,
                    "no kicks can arrive any more: the front-end's kick descriptor failed ({result})"
                );
            }
            return;
        }
        if more {
            return;
        }
        // The kernel ended the poll (a full completion queue): begin a new one, which reports at once what was missed.
        let fd = match tag {
            COMMANDS => Some(self.commands.as_raw_fd()),
            OUTCOMES => self.side.as_ref().map(AsRawFd::as_raw_fd),
            DEVICE => self.device.as_ref().map(|d| d.mailbox().as_raw_fd()),
            _ => self.queue.as_ref().and_then(|q| q.vring.kick_fd()),
        };
        if let Some(fd) = fd
            && let Err(e) = self.uring.poll(fd, tag)
        {
            error!("cannot wait for kicks: {e}");
            self.deaf |= tag < KICKS;
        }
    }

    fn start(&mut self, vring: Box<Vring>) {
        let size = vring.ring.size();
        if self.queue.is_some() || !self.uring.attach(Some(Arc::clone(&vring.memory)), size) {
            // The shell starts a ring only after it took back the one before.
            error!(queue = vring.index, "the worker has a ring already");
            return;
        }
        self.kick_tag = self.kick_tag.wrapping_add(1).max(KICKS);
        if let Some(fd) = vring.kick_fd()
            && let Err(e) = self.uring.poll(fd, self.kick_tag)
            && let Some(held_back) = self.limit.check()
        {
            error!(queue = vring.index, held_back, "cannot wait for kicks: {e}");
        }
        if let Some(side) = &mut self.side {
            side.attach(size);
        }
        if vring.resumes()
            && let Err(e) = vring.notify_driver()
        {
            debug!("cannot signal the call eventfd: {e}");
        }
        self.queue = Some(Queue {
            chain: ChainBuf::new(size),
            jobs: vec![None; usize::from(size)],
            ranges: vec![Vec::new(); usize::from(size)],
            new_ranges: Vec::new(),
            answers: vec![Vec::new(); usize::from(size)],
            free: (0..size).rev().collect(),
            waiting: VecDeque::with_capacity(usize::from(size)),
            bouncing: None,
            paused: self.paused,
            throttled: None,
            broken: false,
            stop: None,
            suspends: false,
            vring,
        });
    }

    fn stop(&mut self, index: u16, suspend: bool, done: Sender<Box<Vring>>) {
        match &mut self.queue {
            Some(queue) if queue.vring.index == index => {
                queue.stop = Some(done);
                queue.suspends = suspend;
                if suspend {
                    queue.abandon_waiting(self.shared.zones.as_deref());
                    if let Some(side) = &mut self.side {
                        side.suspend();
                    }
                }
            }
            // Dropping `done` tells the shell.
            _ => error!(queue = index, "the worker does not have this ring"),
        }
    }

    /// One turn: what completed, then what is new. Returns whether to come back without waiting.
    fn turn(&mut self, ended: &Ended) -> bool {
        let Some(queue) = &mut self.queue else {
            return false;
        };
        let mut turn = Turn {
            limits: Limits {
                capacity: self.shared.capacity.load(Ordering::Relaxed),
                ..self.shared.limits.negotiated(queue.vring.features)
            },
            shared: &self.shared,
            uring: &mut self.uring,
            side: self.side.as_mut(),
            device: self.device.as_ref(),
            stats: &self.stats,
            now: self.shared.clock.now(),
            unpublished: false,
            throttled: None,
            limit: &self.limit,
        };
        let again = match turn.run(queue, ended) {
            Ok(again) => again,
            Err(error) => {
                if !queue.broken {
                    queue.broken = true;
                    queue.abandon_waiting(self.shared.zones.as_deref());
                    if let Some(held_back) = self.limit.check() {
                        warn!(
                            queue = queue.vring.index,
                            held_back,
                            "queue stopped, the driver broke it: {}",
                            Causes(&error)
                        );
                    }
                    if let Err(e) = queue.vring.signal_error() {
                        debug!("cannot signal the error eventfd: {e}");
                    }
                    // Some requests may have been returned in this turn; an interrupt too many does no harm.
                    if let Err(e) = queue.vring.notify_driver() {
                        debug!("cannot signal the call eventfd: {e}");
                    }
                }
                false
            }
        };
        queue.throttled = turn.throttled;
        if let Some(side) = &mut self.side {
            side.announce();
        }
        self.stats.turns.add(1);
        self.stats.enters.set(self.uring.syscalls);
        self.stats
            .in_flight
            .set(queue.vring.ring.in_flight().into());
        let ended = queue.idle() && queue.to_take() == 0;
        if queue.stop.is_some() && ended && self.uring.in_flight() == 0 {
            self.give_back();
        }
        again
    }

    fn give_back(&mut self) {
        let Some(queue) = self.queue.take() else {
            return;
        };
        self.uring.attach(None, 0);
        self.stats.in_flight.set(0);
        if queue.vring.kick.is_some()
            && let Err(e) = self.uring.unpoll(self.kick_tag)
        {
            error!("cannot stop waiting for kicks: {e}");
        }
        self.kick_tag = self.kick_tag.wrapping_add(1).max(KICKS);
        // The poll holds the descriptor; let it go before the ring does.
        if let Err(e) = self.uring.enter(0, None) {
            error!("io_uring failed: {e}");
        }
        if let Some(stop) = queue.stop {
            // The shell waits for it.
            let _ = stop.send(queue.vring);
        }
    }

    fn report(&self) {
        let (requests, kicks) = (self.stats.total(), self.stats.kicks.get());
        let (notifications, turns) = (self.stats.notifications.get(), self.stats.turns.get());
        let syscalls = self.uring.syscalls.saturating_add(notifications);
        if requests > 0 {
            info!(
                requests,
                syscalls, notifications, kicks, turns, "worker ends"
            );
        }
    }
}

/// Looks for something to do until there is some, and returns after what time it came, or `None` when `window` is over.
fn spin(
    queue: Option<&mut Queue>,
    uring: &mut Uring,
    start: Instant,
    window: Duration,
) -> Option<Duration> {
    let queue = queue?;
    let serves = queue.serves();
    let mut session = queue.vring.session().ok()?;
    // A ring that is broken shows in the turn.
    if serves {
        session.disable_notifications().ok()?;
    }
    loop {
        let found = uring.ready() || serves && session.available().is_ok_and(|waiting| waiting > 0);
        let passed = start.elapsed();
        if found {
            return Some(passed);
        }
        if passed >= window {
            return None;
        }
        for _ in 0..SPINS {
            std::hint::spin_loop();
        }
    }
}

/// Asks the driver to kick. Returns whether there is something to do already, for which it will not kick.
fn arm(queue: Option<&mut Queue>) -> bool {
    let Some(queue) = queue.filter(|queue| queue.serves()) else {
        return false;
    };
    let session = queue.vring.session();
    // A ring that is broken shows in the turn.
    session
        .and_then(|mut session| session.enable_notifications())
        .unwrap_or(true)
}

impl Queue {
    /// New chains are to be taken.
    fn serves(&self) -> bool {
        self.vring.enabled && !self.broken && !self.paused && self.stop.is_none()
    }

    /// How many chains are to be taken in a turn. A ring that is to be given back ends what an earlier owner began.
    fn to_take(&self) -> u16 {
        let ring = &self.vring.ring;
        match self.serves() {
            true => ring.size(),
            false if self.suspends => 0,
            false if self.vring.enabled && !self.broken && !self.paused => ring.unserved(),
            false => 0,
        }
    }

    /// Drops the requests that wait for the bounce buffer: there is no ring to answer them on, or another has it next.
    fn abandon_waiting(&mut self, zones: Option<&Zones>) {
        while let Some(slot) = self.waiting.pop_front() {
            if let Some(place) = self.jobs.get_mut(usize::from(slot)) {
                if let Some(job) = place.take() {
                    abandon_zone(zones, &job);
                }
                self.free.push(slot);
            }
        }
    }

    /// No request is being served.
    fn idle(&self) -> bool {
        self.free.len() == self.jobs.len()
    }
}

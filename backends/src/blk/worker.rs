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
//! Between having nothing to do and sleeping lies the poll window (`poll.rs`): while events come fast, the worker looks for the
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

use std::collections::VecDeque;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::Sender;
use std::time::{Duration, Instant};

use ringside_rings::{Chain, ChainBuf, PopError, RingError, Segment, Session, write_segments};
use tracing::{debug, error, info, warn};
use vm_memory::GuestAddress;

use super::config::feature;
use super::device::{BlockDevice, ZoneAction};
use super::image::{Action, Outcome, Part, Place, Side};
use super::limits::Throttle;
use super::offload::{self, DeviceLink, Offload};
use super::poll::{PollLimits, PollWindow};
use super::request::{
    self, APPEND_ANSWER_LEN, HEADER_LEN, ID_LEN, Limits, Range, RangeAction, Request, SECTOR,
    Status,
};
use super::stats::{Clock, Kind, QueueStats};
use super::uring::{Completion, Direction, PrepareError, Uring};
use super::zones::{Position, Zones};
use crate::shell::{Chain as Causes, Command, Commands, LogLimit, Memory, Vring, signal};

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
/// After how long a ring whose driver is over a limit is looked at again in any case: the limit may have changed.
const THROTTLE_INTERVAL: Duration = Duration::from_millis(100);
/// After how many operations the storage gets them, while a batch is still being drained: it can begin meanwhile, and what is
/// begun apart ends apart, so that the driver has something to go on with.
const SUBMIT: u32 = 8;
/// After how many requests that were answered at once the driver is shown them: it can go on meanwhile.
const ANSWERS: u32 = 8;
/// Pauses between two looks while spinning: about as long as the look.
const SPINS: u32 = 4;
/// How often an operation that the kernel wants repeated is repeated.
const MAX_RETRIES: u8 = 100;

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

/// What an operation in a slot is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// Moves `remaining` bytes at `offset`.
    Transfer(Direction),
    /// Writes zeroes, where the storage cannot do that by itself.
    WriteZeroes,
    /// Frees or zeroes the range.
    Fallocate { mode: i32, or_write: bool },
    /// Makes durable what came before, and is the last.
    Sync,
    /// The companion does it.
    Companion(Action),
    /// The device does it, on the disk's thread.
    Device(DeviceCall),
}

/// What the device does on the disk's thread.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum DeviceCall {
    Discard,
    SecureErase,
    /// Describes zones to the driver.
    ZoneReport,
    /// Changes the zone that is held.
    Zone(ZoneAction),
    ZoneResetAll,
}

/// Whether a job needs a zone for itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Hold {
    /// No.
    None,
    /// Yes, and it does not have it yet.
    Wanted(u32),
    /// It has it.
    Held(u32),
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

/// A request that is being served.
#[derive(Debug, Clone, Copy)]
struct Job {
    head: u16,
    status: GuestAddress,
    stage: Stage,
    /// What is done to one range after the other.
    ranges: Option<RangeAction>,
    offset: u64,
    remaining: u64,
    hold: Hold,
    /// It is appended to its zone, and the driver is told where.
    append: bool,
    /// Where a write into a zone that is held begins.
    start: u64,
    kind: Kind,
    /// Bytes that the request is about.
    len: u64,
    /// When it was taken.
    began: u64,
    durable: bool,
    /// It goes through the bounce buffer.
    bounced: bool,
    /// The companion was asked where its data is.
    missed: bool,
    retries: u8,
}

impl Job {
    /// What is left of it, for the companion.
    fn part(&self, slot: u16, action: Action) -> Part {
        Part {
            slot,
            action,
            offset: self.offset,
            len: self.remaining,
            durable: self.durable && action != Action::Read,
        }
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
}

/// What a completion means for its request.
enum Next {
    Done(Status),
    /// Another operation was started, or waits.
    Pending,
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
                        Command::Stop { index, done } => self.stop(index, done),
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
            vring,
        });
    }

    fn stop(&mut self, index: u16, done: Sender<Box<Vring>>) {
        match &mut self.queue {
            Some(queue) if queue.vring.index == index => queue.stop = Some(done),
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
        if queue.stop.is_some() && queue.idle() && self.uring.in_flight() == 0 {
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

    /// Drops the requests that the kernel does not have: there is no ring to answer them on.
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

/// The parts of a worker that a turn needs, apart from the queue.
struct Turn<'w> {
    limits: Limits,
    shared: &'w Shared,
    uring: &'w mut Uring,
    side: Option<&'w mut Side>,
    device: Option<&'w DeviceLink>,
    stats: &'w QueueStats,
    /// When the turn began.
    now: u64,
    /// Something was answered that the driver has not been shown.
    unpublished: bool,
    /// A limit was reached.
    throttled: Option<Duration>,
    limit: &'w LogLimit,
}

impl Turn<'_> {
    fn run(&mut self, queue: &mut Queue, ended: &Ended) -> Result<bool, RingError> {
        let serves = queue.serves();
        let features = queue.vring.features;
        let Queue {
            vring,
            chain,
            jobs,
            ranges,
            new_ranges,
            answers,
            free,
            waiting,
            bouncing,
            broken,
            ..
        } = queue;
        let mut slots = Slots {
            jobs,
            ranges,
            new_ranges,
            answers,
            free,
            waiting,
            bouncing,
        };
        if *broken {
            // Requests end, but nobody can be told.
            self.release_all(&mut slots, ended);
            return Ok(false);
        }
        let call = vring.call.as_ref();
        let mut session = match vring.ring.session(vring.memory.as_ref()) {
            Ok(session) => session,
            Err(e) => {
                self.release_all(&mut slots, ended);
                return Err(e);
            }
        };
        let mut first_error = None;
        for &(slot, result) in &ended.completed {
            let told = self.completed(&mut slots, &mut session, slot, result);
            // All completions must be seen, or their slots are lost.
            first_error = first_error.or(told.err());
        }
        for &(slot, outcome) in &ended.outcomes {
            let told = self.answered(&mut slots, &mut session, slot, outcome);
            first_error = first_error.or(told.err());
        }
        for &(slot, outcome) in &ended.device {
            let told = self.device_answered(&mut slots, &mut session, slot, outcome);
            first_error = first_error.or(told.err());
        }
        if let Some(error) = first_error {
            return Err(error);
        }
        let taken = match serves {
            true => self.drain(&mut slots, &mut session, chain, features, call),
            false => Ok(false),
        };
        // What was finished before the driver broke its ring is returned all the same.
        self.publish(&mut session, call)?;
        taken
    }

    /// Frees the slots of requests that ended with nobody to tell. What waited for a zone has it now.
    fn release_all(&self, slots: &mut Slots<'_>, ended: &Ended) {
        for slot in ended.slots() {
            if let Some(job) = slots.get(slot) {
                abandon_zone(self.shared.zones.as_deref(), &job);
            }
            slots.release(slot);
        }
    }

    /// Shows the driver what was answered, and interrupts it if it wants to be.
    fn publish(
        &mut self,
        session: &mut Session<'_, Memory>,
        call: Option<&File>,
    ) -> Result<(), RingError> {
        let notify = session.publish()?;
        if std::mem::take(&mut self.unpublished) && !notify {
            self.stats.suppressed.add(1);
        }
        if notify && call.is_some() {
            self.stats.notifications.add(1);
            if let Err(e) = signal(call) {
                debug!("cannot signal the call eventfd: {e}");
            }
        }
        Ok(())
    }

    /// Writes are to be durable when they complete. Ask for each request after it was taken: a driver that was told that
    /// the cache is off may add one to a batch that is being drained.
    fn durable(&self, features: u64) -> bool {
        durable(features, self.shared.writeback.load(Ordering::Relaxed))
    }

    /// Takes chains until there are none, or as many as there are descriptors. Returns whether more may wait.
    fn drain(
        &mut self,
        slots: &mut Slots<'_>,
        session: &mut Session<'_, Memory>,
        buf: &mut ChainBuf,
        features: u64,
        call: Option<&File>,
    ) -> Result<bool, RingError> {
        if session.available()? == 0 {
            return Ok(false);
        }
        session.disable_notifications()?;
        let mut answered = 0_u32;
        for _ in 0..slots.jobs.len() {
            match session.pop(buf) {
                Ok(Some(chain)) => {
                    if self.uring.unsubmitted() >= SUBMIT {
                        // What it fails with shows when the worker waits.
                        let _ = self.uring.enter(0, None);
                    }
                    let head = chain.head();
                    let durable = self.durable(features);
                    if let Some(len) = self.begin(slots, session.memory(), &chain, durable) {
                        session.push_used(head, len)?;
                        answered = answered.wrapping_add(1);
                        if answered.is_multiple_of(ANSWERS) {
                            self.publish(session, call)?;
                        }
                    } else if self.throttled.is_some() {
                        session.rewind(1);
                        return Ok(false);
                    }
                }
                Ok(None) => return Ok(false),
                Err(PopError::Ring(e)) => return Err(e),
                Err(PopError::Chain { head, error }) => {
                    self.malformed(&error);
                    session.push_used(head, 0)?;
                }
            }
        }
        Ok(true)
    }

    fn complain(&mut self, error: &dyn std::error::Error) {
        if let Some(held_back) = self.limit.check() {
            warn!(held_back, "malformed request: {}", Causes(error));
        }
    }

    /// A chain that there is no answer to is returned.
    fn malformed(&mut self, error: &dyn std::error::Error) {
        self.complain(error);
        self.stats.malformed();
        self.unpublished = true;
    }

    /// Answers a request. Returns the length for the used ring.
    fn answer(&mut self, mem: &Memory, job: &Job, status: Status) -> u32 {
        let took = self.now.saturating_sub(job.began);
        self.stats.answered(job.kind, job.len, status, took);
        self.unpublished = true;
        answer(mem, job, status)
    }

    /// Whether the disk's limits allow a request now; otherwise after what time in nanoseconds they may.
    fn allowed(&self, request: &Request) -> Result<(), u64> {
        let throttle = &self.shared.throttle;
        match *request {
            Request::Read { len, .. } => throttle.take(false, len, self.now),
            Request::Write { len, .. } | Request::ZoneAppend { len, .. } => {
                throttle.take(true, len, self.now)
            }
            Request::Flush
            | Request::Ranges(_)
            | Request::ZoneReport { .. }
            | Request::Zone { .. }
            | Request::ZoneResetAll => throttle.take(true, 0, self.now),
            Request::GetId { .. } | Request::Refuse(_) => Ok(()),
        }
    }

    /// Begins a request, unless it is `throttled`. Returns the length for the used ring if it is answered already.
    fn begin(
        &mut self,
        slots: &mut Slots<'_>,
        mem: &Memory,
        chain: &Chain<'_>,
        durable: bool,
    ) -> Option<u32> {
        let request = match request::parse(chain, mem, &self.limits, slots.new_ranges) {
            Ok(request) => request,
            Err(e) => {
                self.malformed(&e);
                return Some(0);
            }
        };
        if self.shared.throttle.active()
            && let Err(wait) = self.allowed(&request)
        {
            self.stats.throttled.add(1);
            self.throttled = Some(Duration::from_nanos(wait).min(THROTTLE_INTERVAL));
            return None;
        }
        let (kind, len) = request.measure(slots.new_ranges);
        // The last writable byte; `parse` saw that there is one.
        let status = chain
            .writable()
            .last()
            .and_then(|s| s.addr.0.checked_add(u64::from(s.len).saturating_sub(1)))
            .map(GuestAddress)?;
        let mut job = Job {
            head: chain.head(),
            status,
            stage: Stage::Sync,
            ranges: None,
            offset: 0,
            remaining: 0,
            hold: Hold::None,
            append: false,
            start: 0,
            kind,
            len,
            began: self.now,
            durable,
            bounced: false,
            missed: false,
            retries: 0,
        };
        let null = self.shared.files.is_empty() && self.side.is_none();
        match request {
            Request::Refuse(status) => return Some(self.answer(mem, &job, status)),
            Request::GetId { len } => {
                let count = ID_LEN.min(usize::try_from(len).unwrap_or(ID_LEN));
                let id = self.shared.serial.get(..count).unwrap_or_default();
                return Some(match write_segments(mem, chain.writable(), 0, id) {
                    Ok(()) => {
                        job.len = u64::try_from(count).unwrap_or(0);
                        self.answer(mem, &job, Status::Ok)
                    }
                    Err(_) => self.answer(mem, &job, Status::IoError),
                });
            }
            Request::Flush => {
                if self.side.as_ref().is_some_and(|side| side.flushes()) {
                    job.stage = Stage::Companion(Action::Flush);
                }
            }
            Request::Read { offset, len } => {
                if let (Some(zones), true) = (&self.shared.zones, self.limits.zoned && len > 0)
                    && let Err(status) = zones.check_read(offset, len)
                {
                    return Some(self.answer(mem, &job, status));
                }
                job.stage = Stage::Transfer(Direction::Read);
                (job.offset, job.remaining) = (offset, len);
            }
            Request::Write { offset, len } => {
                job.stage = Stage::Transfer(Direction::Write { durable });
                (job.offset, job.remaining) = (offset, len);
            }
            Request::Ranges(action) => job.ranges = Some(action),
            Request::ZoneAppend { offset, len } => {
                job.stage = Stage::Transfer(Direction::Write { durable });
                (job.offset, job.remaining) = (offset, len);
                job.append = true;
            }
            Request::ZoneReport { offset, len } => {
                job.stage = Stage::Device(DeviceCall::ZoneReport);
                (job.offset, job.remaining) = (offset, len);
            }
            Request::Zone { offset, action } => {
                job.stage = Stage::Device(DeviceCall::Zone(action));
                job.offset = offset;
            }
            Request::ZoneResetAll => job.stage = Stage::Device(DeviceCall::ZoneResetAll),
        }
        match self.zone_to_hold(&job) {
            Ok(hold) => job.hold = hold,
            Err(status) => {
                let status = self.limits.zone_status(status);
                return Some(self.answer(mem, &job, status));
            }
        }
        let nothing = match (job.stage, job.ranges) {
            (Stage::Transfer(_), _) => job.remaining == 0,
            (_, Some(_)) => slots.new_ranges.is_empty(),
            _ => false,
        };
        if null || nothing {
            return Some(self.answer(mem, &job, Status::Ok));
        }
        let Some(slot) = slots.take() else {
            // Not reachable while the ring holds no more chains than it has descriptors.
            return Some(self.answer(mem, &job, Status::IoError));
        };
        if let Stage::Transfer(direction) = job.stage {
            let (segments, skip) = match direction {
                Direction::Read => (chain.writable(), 0),
                Direction::Write { .. } => (chain.readable(), HEADER_LEN),
            };
            let align = self.shared.memory_align;
            match self
                .uring
                .prepare(slot, segments, skip, job.remaining, align)
            {
                Ok(aligned) => job.bounced = !aligned,
                Err(e) => {
                    self.complain(&e);
                    slots.release(slot);
                    return Some(self.answer(mem, &job, Status::IoError));
                }
            }
            if let Some(side) = &mut self.side {
                side.hold(slot, segments, skip);
            }
        }
        if job.append || job.stage == Stage::Device(DeviceCall::ZoneReport) {
            slots.keep_answer(slot, chain.writable());
        }
        let next = match job.ranges {
            Some(action) => {
                slots.keep_ranges(slot);
                self.next_range(slots, slot, &mut job, action)
            }
            None => self.advance(slots, slot, &mut job),
        };
        match next {
            Next::Pending => {
                slots.put(slot, job);
                None
            }
            Next::Done(status) => Some(self.end(slots, mem, slot, &job, status)),
        }
    }

    /// Ends a job that has a slot. Returns the length for the used ring.
    fn end(
        &mut self,
        slots: &mut Slots<'_>,
        mem: &Memory,
        slot: u16,
        job: &Job,
        status: Status,
    ) -> u32 {
        if let (Hold::Held(zone), Some(zones)) = (job.hold, &self.shared.zones) {
            match (job.stage, status) {
                (Stage::Transfer(_), Status::Ok) => zones.wrote(zone, job.start, job.offset),
                (Stage::Transfer(_), _) => zones.forget(zone),
                // The device's call has seen to it.
                _ => {}
            }
            zones.leave(zone);
        }
        let mut status = status;
        if job.append && status == Status::Ok {
            let sector = (job.start / SECTOR).to_le_bytes();
            let (segments, place) = slots.append_answer(slot);
            if write_segments(mem, segments, place, &sector).is_err() {
                status = Status::IoError;
            }
        }
        slots.release(slot);
        self.answer(mem, job, status)
    }

    /// The zone that a job needs for itself.
    fn zone_to_hold(&self, job: &Job) -> Result<Hold, Status> {
        let Some(zones) = &self.shared.zones else {
            return Ok(Hold::None);
        };
        match job.stage {
            Stage::Device(DeviceCall::Zone(_)) => zones.sequential_at(job.offset).map(Hold::Wanted),
            Stage::Transfer(Direction::Write { .. }) if job.append => {
                zones.sequential_at(job.offset).map(Hold::Wanted)
            }
            Stage::Transfer(Direction::Write { .. }) if job.remaining > 0 => {
                let zone = zones.to_hold(job.offset, job.remaining)?;
                Ok(zone.map_or(Hold::None, Hold::Wanted))
            }
            _ => Ok(Hold::None),
        }
    }

    /// Takes the zone that a job needs, and goes on if it is free.
    fn enter_zone(&mut self, slots: &mut Slots<'_>, slot: u16, job: &mut Job, zone: u32) -> Next {
        let (Some(zones), Some(link)) = (&self.shared.zones, self.device) else {
            return Next::Done(Status::IoError);
        };
        if !zones.enter(zone, link.mailbox(), slot) {
            return Next::Pending;
        }
        job.hold = Hold::Held(zone);
        self.in_zone(slots, slot, job, zone)
    }

    /// Goes on with a job that holds its zone.
    fn in_zone(&mut self, slots: &mut Slots<'_>, slot: u16, job: &mut Job, zone: u32) -> Next {
        let (Some(zones), Some(link)) = (&self.shared.zones, self.device) else {
            return Next::Done(Status::IoError);
        };
        if let Stage::Transfer(_) = job.stage {
            let position = zones.position(zone);
            if position == Position::Unknown {
                let zones = Arc::clone(zones);
                let asked = link.ask(slot, move |device| match zones.look_up(device, zone) {
                    Ok(()) => offload::Outcome::Granted,
                    Err(e) => Err(e).into(),
                });
                return self.started(asked);
            }
            if let (true, Position::At { next, .. }) = (job.append, position) {
                job.offset = next;
            }
            if let Err(status) = zones.check_write(position, job.offset, job.remaining) {
                return Next::Done(self.limits.zone_status(status));
            }
            job.start = job.offset;
        }
        self.advance(slots, slot, job)
    }

    /// Begins with the next range of a job; after the last, the job is done.
    fn next_range(
        &mut self,
        slots: &mut Slots<'_>,
        slot: u16,
        job: &mut Job,
        action: RangeAction,
    ) -> Next {
        if let Some(Range { offset, len, unmap }) = slots.next_range(slot) {
            (job.offset, job.remaining, job.retries) = (offset, len, 0);
            job.stage = self.stage_for(action, unmap);
        } else if job.durable && self.side.is_none() {
            job.stage = Stage::Sync;
        } else {
            return Next::Done(Status::Ok);
        }
        self.advance(slots, slot, job)
    }

    fn stage_for(&self, action: RangeAction, unmap: bool) -> Stage {
        match (action, &self.side) {
            (RangeAction::SecureErase, _) => Stage::Device(DeviceCall::SecureErase),
            (RangeAction::Discard, None) if self.device.is_some() => {
                Stage::Device(DeviceCall::Discard)
            }
            (RangeAction::Discard, Some(_)) => Stage::Companion(Action::Discard),
            (RangeAction::WriteZeroes, Some(_)) => Stage::Companion(Action::WriteZeroes { unmap }),
            (RangeAction::Discard, None) => Stage::Fallocate {
                mode: libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE,
                or_write: false,
            },
            (RangeAction::WriteZeroes, None) => {
                let how = if unmap {
                    libc::FALLOC_FL_PUNCH_HOLE
                } else {
                    libc::FALLOC_FL_ZERO_RANGE
                };
                Stage::Fallocate {
                    mode: how | libc::FALLOC_FL_KEEP_SIZE,
                    or_write: true,
                }
            }
        }
    }

    /// Starts the next operation of a job.
    fn advance(&mut self, slots: &mut Slots<'_>, slot: u16, job: &mut Job) -> Next {
        if let Hold::Wanted(zone) = job.hold {
            return self.enter_zone(slots, slot, job, zone);
        }
        let started = match job.stage {
            Stage::Transfer(direction) => {
                if job.bounced && *slots.bouncing != Some(slot) {
                    if slots.bouncing.is_some() {
                        slots.waiting.push_back(slot);
                        return Next::Pending;
                    }
                    *slots.bouncing = Some(slot);
                }
                if self.side.is_some() {
                    return self.transfer_by_map(slot, job, direction);
                }
                self.transfer(slot, job, direction, 0, job.offset, None)
            }
            Stage::WriteZeroes => self
                .uring
                .prepare_zeroes(slot, job.remaining)
                .map_err(failed)
                .and_then(|_| {
                    // Made durable together with the other ranges.
                    let direction = Direction::Write { durable: false };
                    self.uring.transfer(slot, direction, 0, job.offset)
                }),
            Stage::Fallocate { mode, .. } => {
                self.uring.fallocate(slot, mode, job.offset, job.remaining)
            }
            Stage::Sync => self.uring.fsync(slot),
            Stage::Companion(action) => return self.hand_over(slot, job, action),
            Stage::Device(call) => self.ask_device(slots, slot, job, call),
        };
        self.started(started)
    }

    fn started(&mut self, started: std::io::Result<()>) -> Next {
        match started {
            Ok(()) => Next::Pending,
            Err(e) => {
                self.complain(&e);
                Next::Done(Status::IoError)
            }
        }
    }

    /// Transfers the next bytes of a job at `offset` of a file: all of them, or `len`.
    fn transfer(
        &mut self,
        slot: u16,
        job: &Job,
        direction: Direction,
        file: u8,
        offset: u64,
        len: Option<u64>,
    ) -> std::io::Result<()> {
        if job.bounced {
            self.uring.bounce(slot, direction).map_err(failed)?;
        }
        if let Some(len) = len {
            self.uring.limit(slot, len)?;
        }
        self.uring.transfer(slot, direction, file, offset)
    }

    /// Transfers the next bytes of a job where the map says that they are, or lets the companion see to it.
    fn transfer_by_map(&mut self, slot: u16, job: &mut Job, direction: Direction) -> Next {
        let action = match direction {
            Direction::Read => Action::Read,
            Direction::Write { .. } => Action::Write,
        };
        while job.remaining > 0 {
            let part = job.part(slot, action);
            let place = self.side.as_mut().map(|side| side.find(&part));
            match place {
                Some(Place::File { layer, offset, len }) => {
                    let started = self.transfer(slot, job, direction, layer, offset, Some(len));
                    if let (Err(_), Some(side)) = (&started, &mut self.side) {
                        side.ended(slot);
                    }
                    return self.started(started);
                }
                Some(Place::Zeroes { len }) => {
                    if let Err(e) = self.uring.fill(slot, len) {
                        self.complain(&e);
                        return Next::Done(Status::IoError);
                    }
                    self.moved(slot, job, len);
                }
                Some(Place::Unknown) | None => return self.hand_over(slot, job, action),
            }
        }
        Next::Done(Status::Ok)
    }

    /// Notes that the next bytes of a job are done.
    fn moved(&mut self, slot: u16, job: &mut Job, bytes: u64) {
        job.remaining = job.remaining.saturating_sub(bytes);
        job.offset = job.offset.saturating_add(bytes);
        job.missed = false;
        if let Some(side) = &mut self.side {
            side.advance(slot, bytes);
        }
    }

    fn hand_over(&mut self, slot: u16, job: &Job, action: Action) -> Next {
        let part = job.part(slot, action);
        let taken = match (&mut self.side, self.uring.memory()) {
            (Some(side), Some(memory)) => side.hand_over(&part, job.missed, memory),
            _ => false,
        };
        if taken {
            return Next::Pending;
        }
        if let Some(held_back) = self.limit.check() {
            error!(held_back, "the image's thread is gone");
        }
        Next::Done(Status::IoError)
    }

    /// Lets the device do it, on the disk's thread.
    fn ask_device(
        &self,
        slots: &Slots<'_>,
        slot: u16,
        job: &Job,
        call: DeviceCall,
    ) -> std::io::Result<()> {
        let unsupported = || std::io::Error::from(std::io::ErrorKind::Unsupported);
        let link = self.device.ok_or_else(unsupported)?;
        let zones = || self.shared.zones.clone().ok_or_else(unsupported);
        let (offset, len) = (job.offset, job.remaining);
        match call {
            DeviceCall::Discard => link.ask(slot, move |d| d.discard(offset, len).into()),
            DeviceCall::SecureErase => link.ask(slot, move |d| d.secure_erase(offset, len).into()),
            DeviceCall::ZoneReport => {
                let (zones, memory) = (zones()?, self.uring.memory().ok_or_else(unsupported)?);
                let segments = slots.answer(slot).to_vec();
                link.ask(slot, move |device| {
                    match zones.report(device, offset, &memory, &segments, len) {
                        Ok(bytes) => offload::Outcome::Filled(bytes),
                        Err(e) => Err(e).into(),
                    }
                })
            }
            DeviceCall::Zone(action) => {
                let zones = zones()?;
                let Hold::Held(zone) = job.hold else {
                    return Err(unsupported());
                };
                link.ask(slot, move |device| {
                    zones.manage(device, action, zone).into()
                })
            }
            DeviceCall::ZoneResetAll => {
                let zones = zones()?;
                link.ask(slot, move |device| zones.reset_all(device).into())
            }
        }
    }

    /// The device has done what it was asked for.
    fn device_answered(
        &mut self,
        slots: &mut Slots<'_>,
        session: &mut Session<'_, Memory>,
        slot: u16,
        outcome: offload::Outcome,
    ) -> Result<(), RingError> {
        let Some(mut job) = slots.get(slot) else {
            return Ok(());
        };
        let next = match outcome {
            offload::Outcome::Done => self.range_done(slots, slot, &mut job),
            offload::Outcome::Filled(bytes) => {
                job.len = bytes;
                Next::Done(Status::Ok)
            }
            offload::Outcome::Granted => match job.hold {
                Hold::Wanted(zone) | Hold::Held(zone) => {
                    job.hold = Hold::Held(zone);
                    self.in_zone(slots, slot, &mut job, zone)
                }
                Hold::None => Next::Done(Status::IoError),
            },
            offload::Outcome::Failed(errno) => {
                if let Stage::Transfer(_) = job.stage {
                    // The zone's position is not known: nothing can be tried again.
                    job.retries = MAX_RETRIES;
                }
                self.failed(slots, slot, &mut job, errno)
            }
        };
        self.settle(slots, session, slot, job, next)
    }

    /// The companion has answered.
    fn answered(
        &mut self,
        slots: &mut Slots<'_>,
        session: &mut Session<'_, Memory>,
        slot: u16,
        outcome: Outcome,
    ) -> Result<(), RingError> {
        let Some(mut job) = slots.get(slot) else {
            return Ok(());
        };
        let next = match outcome {
            Outcome::Again => {
                job.missed = true;
                self.advance(slots, slot, &mut job)
            }
            Outcome::Done
                if job.stage == Stage::Companion(Action::Flush)
                    && self.side.as_ref().is_some_and(|side| side.syncs()) =>
            {
                job.stage = Stage::Sync;
                self.advance(slots, slot, &mut job)
            }
            Outcome::Done => self.range_done(slots, slot, &mut job),
            Outcome::Failed(libc::EOPNOTSUPP) => Next::Done(Status::Unsupported),
            // It is in the companion's log.
            Outcome::Failed(_) => Next::Done(Status::IoError),
        };
        self.settle(slots, session, slot, job, next)
    }

    /// An operation ended.
    fn completed(
        &mut self,
        slots: &mut Slots<'_>,
        session: &mut Session<'_, Memory>,
        slot: u16,
        result: i32,
    ) -> Result<(), RingError> {
        let Some(mut job) = slots.get(slot) else {
            return Ok(());
        };
        let next = self.result(slots, slot, &mut job, result);
        self.settle(slots, session, slot, job, next)
    }

    /// Goes on with a job, or answers it.
    fn settle(
        &mut self,
        slots: &mut Slots<'_>,
        session: &mut Session<'_, Memory>,
        slot: u16,
        job: Job,
        next: Next,
    ) -> Result<(), RingError> {
        match next {
            Next::Pending => {
                slots.put(slot, job);
                Ok(())
            }
            Next::Done(status) => {
                let len = self.end(slots, session.memory(), slot, &job, status);
                let ended = session.push_used(job.head, len);
                self.next_bounce(slots, session)?;
                ended
            }
        }
    }

    /// Gives the bounce buffer to the next that waits for it.
    fn next_bounce(
        &mut self,
        slots: &mut Slots<'_>,
        session: &mut Session<'_, Memory>,
    ) -> Result<(), RingError> {
        while slots.bouncing.is_none() {
            let Some(slot) = slots.waiting.pop_front() else {
                break;
            };
            let Some(mut job) = slots.get(slot) else {
                continue;
            };
            match self.advance(slots, slot, &mut job) {
                Next::Pending => slots.put(slot, job),
                Next::Done(status) => {
                    let len = self.end(slots, session.memory(), slot, &job, status);
                    session.push_used(job.head, len)?;
                }
            }
        }
        Ok(())
    }

    fn result(&mut self, slots: &mut Slots<'_>, slot: u16, job: &mut Job, result: i32) -> Next {
        let Ok(bytes) = usize::try_from(result) else {
            return self.failed(slots, slot, job, result.saturating_neg());
        };
        match job.stage {
            Stage::Sync | Stage::Companion(_) | Stage::Device(_) => Next::Done(Status::Ok),
            Stage::Fallocate { .. } => self.range_done(slots, slot, job),
            Stage::Transfer(_) | Stage::WriteZeroes => {
                let moved = u64::try_from(bytes).unwrap_or(u64::MAX);
                if bytes == 0 || moved > job.remaining {
                    // The end of the file, which is shorter than it was.
                    return Next::Done(Status::IoError);
                }
                if let Stage::Transfer(direction) = job.stage {
                    self.uring.advance(slot, bytes, direction);
                }
                self.moved(slot, job, moved);
                if job.remaining == 0 {
                    return self.range_done(slots, slot, job);
                }
                self.advance(slots, slot, job)
            }
        }
    }

    /// An operation is done, and the request with it unless that has more ranges.
    fn range_done(&mut self, slots: &mut Slots<'_>, slot: u16, job: &mut Job) -> Next {
        match job.ranges {
            Some(action) => self.next_range(slots, slot, job, action),
            None => Next::Done(Status::Ok),
        }
    }

    fn failed(&mut self, slots: &mut Slots<'_>, slot: u16, job: &mut Job, errno: i32) -> Next {
        match (errno, job.stage) {
            (libc::EINTR | libc::EAGAIN, _) if job.retries < MAX_RETRIES => {
                job.retries = job.retries.saturating_add(1);
                self.advance(slots, slot, job)
            }
            (libc::EOPNOTSUPP | libc::ENOSYS, Stage::Fallocate { or_write: true, .. }) => {
                job.stage = Stage::WriteZeroes;
                // It moves bytes after all.
                self.shared.throttle.charge(job.remaining, self.now);
                self.advance(slots, slot, job)
            }
            (
                libc::EOPNOTSUPP | libc::ENOSYS | libc::ENOTTY,
                Stage::Fallocate { .. } | Stage::Device(_),
            ) => Next::Done(Status::Unsupported),
            // What Linux makes of BLK_STS_ZONE_OPEN_RESOURCE and BLK_STS_ZONE_ACTIVE_RESOURCE.
            (libc::ETOOMANYREFS, _) if job.hold != Hold::None => {
                Next::Done(self.limits.zone_status(Status::ZoneOpenResource))
            }
            (libc::EOVERFLOW, _) if job.hold != Hold::None => {
                Next::Done(self.limits.zone_status(Status::ZoneActiveResource))
            }
            // The zone cannot be brought into this state (VIRTIO 1.3, 5.2.6.2).
            (_, Stage::Device(DeviceCall::Zone(_))) => {
                Next::Done(self.limits.zone_status(Status::ZoneInvalidCommand))
            }
            _ => {
                if let Some(held_back) = self.limit.check() {
                    let error = std::io::Error::from_raw_os_error(errno);
                    warn!(
                        held_back,
                        offset = job.offset,
                        len = job.remaining,
                        "I/O error: {error}"
                    );
                }
                Next::Done(Status::IoError)
            }
        }
    }
}

/// Gives up the zone that a job holds, or was granted, in which it may have written. Not for a job that still waits for
/// its zone.
fn abandon_zone(zones: Option<&Zones>, job: &Job) {
    if let (Some(zones), Hold::Wanted(zone) | Hold::Held(zone)) = (zones, job.hold) {
        zones.forget(zone);
        zones.leave(zone);
    }
}

/// The cache is writethrough unless the driver can flush it, and has not switched it off (VIRTIO 1.3, 5.2.6.2).
fn durable(features: u64, writeback: bool) -> bool {
    let flushes = features & (feature::FLUSH | feature::CONFIG_WCE) != 0;
    !(writeback && flushes)
}

fn failed(error: PrepareError) -> std::io::Error {
    std::io::Error::other(error)
}

/// Writes the status, and returns the length for the used ring: bytes written, with the status.
fn answer(mem: &Memory, job: &Job, status: Status) -> u32 {
    let place = Segment::new(job.status, 1);
    if write_segments(mem, &[place], 0, &[status as u8]).is_err() {
        return 0;
    }
    let data = match (status, job.kind) {
        (Status::Ok, Kind::Read | Kind::Zone | Kind::Other) => job.len,
        (Status::Ok, Kind::Write) if job.append => APPEND_ANSWER_LEN,
        _ => 0,
    };
    u32::try_from(data.saturating_add(1)).unwrap_or(u32::MAX)
}

/// Jobs and who has which slot.
struct Slots<'q> {
    jobs: &'q mut Vec<Option<Job>>,
    ranges: &'q mut Vec<Vec<Range>>,
    new_ranges: &'q mut Vec<Range>,
    answers: &'q mut Vec<Vec<Segment>>,
    free: &'q mut Vec<u16>,
    waiting: &'q mut VecDeque<u16>,
    bouncing: &'q mut Option<u16>,
}

impl Slots<'_> {
    fn take(&mut self) -> Option<u16> {
        self.free.pop()
    }

    fn get(&self, slot: u16) -> Option<Job> {
        self.jobs.get(usize::from(slot)).copied().flatten()
    }

    fn put(&mut self, slot: u16, job: Job) {
        if let Some(place) = self.jobs.get_mut(usize::from(slot)) {
            *place = Some(job);
        }
    }

    /// Gives a slot the ranges of the request that was parsed last.
    fn keep_ranges(&mut self, slot: u16) {
        if let Some(ranges) = self.ranges.get_mut(usize::from(slot)) {
            std::mem::swap(ranges, self.new_ranges);
            ranges.reverse();
        }
    }

    /// Keeps where a job writes its answer, with the status at the end.
    fn keep_answer(&mut self, slot: u16, segments: &[Segment]) {
        if let Some(answer) = self.answers.get_mut(usize::from(slot)) {
            answer.clear();
            answer.extend_from_slice(segments);
        }
    }

    fn answer(&self, slot: u16) -> &[Segment] {
        self.answers
            .get(usize::from(slot))
            .map_or(&[], Vec::as_slice)
    }

    /// Where append_sector is in an answer: directly before the status.
    fn append_answer(&self, slot: u16) -> (&[Segment], u64) {
        let segments = self.answer(slot);
        let len = segments
            .iter()
            .map(|segment| u64::from(segment.len))
            .sum::<u64>();
        (
            segments,
            len.saturating_sub(APPEND_ANSWER_LEN.saturating_add(1)),
        )
    }

    fn next_range(&mut self, slot: u16) -> Option<Range> {
        self.ranges.get_mut(usize::from(slot))?.pop()
    }

    fn release(&mut self, slot: u16) {
        if let Some(place) = self.jobs.get_mut(usize::from(slot)) {
            *place = None;
            self.free.push(slot);
        }
        if *self.bouncing == Some(slot) {
            *self.bouncing = None;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn writes_are_durable_unless_there_is_a_cache_that_can_be_flushed() {
        for (features, writeback, expected) in [
            (0, true, true),
            (0, false, true),
            (feature::FLUSH, true, false),
            (feature::FLUSH, false, true),
            (feature::CONFIG_WCE, true, false),
            (feature::CONFIG_WCE | feature::FLUSH, true, false),
            (feature::CONFIG_WCE | feature::FLUSH, false, true),
        ] {
            assert_eq!(durable(features, writeback), expected, "{features:#x}");
        }
    }
}

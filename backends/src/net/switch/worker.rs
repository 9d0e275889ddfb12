//! The thread of a switch: it owns all rings and links of all ports.
//!
//! ```text
//!            ┌──────────────────── one round ───────────────────┐
//!  kick tx ─▶│ each port that has something, in turn: up to a   │
//!  link    ─▶│ budget of frames; rules, table, copy to outlets  │──▶ at most one interrupt for each ring
//!  command ─▶│ show receivers what they got, interrupt          │
//!            │ nothing left? spin for as long as it pays, sleep │
//!            └──────────────────────────────────────────────────┘
//! ```
//!
//! Nothing in it waits for a peer: interrupts are sent by a way that never blocks (`signal`), and a frame that nobody takes is
//! dropped.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use epoll::Events;
use nix::sys::eventfd::{EfdFlags, EventFd};
use ringside_rings::{Chain, PopError, RingError, Segment};
use tracing::{debug, error, warn};

use super::super::config::MacAddress;
use super::super::epoll_set::EpollSet;
use super::super::features::header_len;
use super::super::iov::IoList;
use super::super::limits::{LONGEST_WAIT, sleep_until};
use super::super::link::Link;
use super::super::ring::Ring;
use super::super::settings::Shared;
use super::super::worker::POLL_INTERVAL;
use super::counters::AllPorts;
use super::frame::{Beginning, Frame, HEADER, PREFIX, Refused, Rest, is_group};
use super::offload::{Room, segments};
use super::outlet::{Egress, GuestOutlet, LinkOutlet, Outlet, RxRing, interrupt, tell_of_failure};
use super::policy::{MAX_PORTS, PortId};
use super::shared::PortShared;
use super::signal::Signals;
use super::table::{Key, Learnt, Table};
use super::window::Window;
use crate::net::tx::{MAX_FRAME, MIN_FRAME};
use crate::shell::{
    Command, Commands, MOST_PREFETCHED, Memory, PollLimits, PollWindow, Vring, now,
    prefetch_to_read,
};

/// Most frames of one port in a round, so that all get their share. Long ones count for more.
const BUDGET: u64 = 64;
/// Bytes of a frame that count for as much as a frame: copying them takes as long.
const COUNTED_AS_FRAME: u64 = 4096;
/// Most pieces of a frame: as many as one system call takes for a link (UIO_MAXIOV).
const MAX_PIECES: usize = 1024;
/// Pieces of all frames of a turn, for those that are longer than what is looked at.
const MAX_SEGMENTS: usize = 2 * MAX_PIECES;

/// Most rounds between two looks at the descriptors.
const ROUNDS: u32 = 8;
/// Looks at the rings between two looks at the descriptors, while spinning: those cost a system call.
const LOOKS: u32 = 16;

const INBOX: u64 = 0;
const COMMAND: u64 = 1;
const SETTINGS: u64 = 2;
const KICK: u64 = 3;
const LINK: u64 = 4;
const TIMER_RX: u64 = 5;
const TIMER_TX: u64 = 6;

/// What happened, at which port, to which of its queue pairs.
fn token(kind: u64, port: PortId, pair: u16) -> u64 {
    kind | u64::from(port) << 16 | u64::from(pair) << 32
}

fn parts(token: u64) -> (u64, PortId, usize) {
    let [kind, _, p0, p1, q0, q1, ..] = token.to_le_bytes();
    let pair = u16::from_le_bytes([q0, q1]);
    (kind.into(), u16::from_le_bytes([p0, p1]), pair.into())
}

/// What is behind a new port.
pub(super) enum Behind {
    /// A guest: its rings come as commands.
    Guest {
        commands: Commands,
        settings: Arc<Shared>,
        pairs: u16,
    },
    /// A link.
    Link(Box<dyn Link>),
}

/// An address that is known: its VLAN, itself, its port, and in which second a frame came from there.
pub(super) type Known = (u16, MacAddress, PortId, u32);

/// What the switch's thread is told.
pub(super) enum Order {
    /// There is one port more.
    Add(PortId, Arc<PortShared>, Behind),
    /// A port is to go. Its number may then be used again: orders are obeyed one after the other.
    Remove(PortId),
    /// Tell which addresses are known.
    Addresses(Sender<Vec<Known>>),
    /// Let no frame pass, and tell which addresses are known.
    Freeze(Sender<Vec<Known>>),
    /// Know these addresses.
    Learn(Vec<Known>),
    /// Let frames pass again.
    Thaw,
    /// End.
    End,
}

/// Orders, between the threads.
#[derive(Debug)]
pub(super) struct Inbox {
    orders: Mutex<Vec<Order>>,
    event: EventFd,
}

impl std::fmt::Debug for Order {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Add(..) => "Add",
            Self::Remove(_) => "Remove",
            Self::Addresses(_) => "Addresses",
            Self::Freeze(_) => "Freeze",
            Self::Learn(_) => "Learn",
            Self::Thaw => "Thaw",
            Self::End => "End",
        })
    }
}

impl Inbox {
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self {
            orders: Mutex::default(),
            event: EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?,
        })
    }

    pub(super) fn send(&self, order: Order) {
        let mut orders = self.orders.lock().unwrap_or_else(PoisonError::into_inner);
        orders.push(order);
        // A counter at its maximum wakes as well.
        let _ = self.event.write(1);
    }

    fn take(&self) -> Vec<Order> {
        let mut orders = self.orders.lock().unwrap_or_else(PoisonError::into_inner);
        std::mem::take(&mut *orders)
    }
}

/// A guest's transmit ring.
struct TxRing {
    ring: Ring,
    header_len: usize,
    /// It stands in the row of those that have something.
    waiting: bool,
    /// It stands among those that are looked at while spinning, and whose drivers are not asked to kick.
    hot: bool,
    /// It stands among those whose limits make them wait: nothing its driver does gives it a turn before that is over.
    throttled: bool,
    /// What its last turn took beyond its budget, in frames.
    debt: u64,
    /// Chains that were returned.
    done: u64,
}

/// Where frames of a port come from.
enum Source {
    Guest {
        commands: Commands,
        settings: Arc<Shared>,
        /// By queue pair.
        rings: Vec<Option<TxRing>>,
    },
    /// The link itself stands with the outlet.
    Link { waiting: bool },
}

/// A port, as frames from it see it.
struct Ingress {
    shared: Arc<PortShared>,
    source: Source,
    /// What the last frame has shown.
    last: Last,
}

/// What the table said about the addresses of a frame: of the next one it says the same, mostly.
#[derive(Debug, Clone, Copy, Default)]
struct Last {
    /// Where it came from, and in which second: it is known.
    source: (Key, u32),
    /// Where it went to, in which second, and the table's changes until then.
    destination: (Key, u32, u64),
    /// The port behind which that is.
    port: PortId,
}

/// All that a frame passes on its way, apart from where it comes from.
struct Fabric {
    /// By port.
    egress: Vec<Option<Egress>>,
    table: Table,
    /// Addresses that belong to one port, as numbers, sorted.
    owners: Vec<(u64, PortId)>,
    room: Room,
    /// Ports that were given frames in this round, as bits.
    touched: u64,
    /// Nanoseconds of CLOCK_MONOTONIC: all programs that take each other's place go by it.
    now: u64,
}

/// The switch.
pub(super) struct Worker {
    inbox: Arc<Inbox>,
    all: Arc<AllPorts>,
    epoll: EpollSet,
    /// By port.
    ingress: Vec<Option<Ingress>>,
    fabric: Fabric,
    /// Those that have something, in the order in which they get their turn.
    row: VecDeque<(PortId, usize)>,
    /// Transmit rings that had something since the last sleep, and were emptied.
    hot: Vec<(PortId, usize)>,
    /// Transmit rings without a kick descriptor.
    polled: Vec<(PortId, usize)>,
    poll: PollWindow,
    /// Since when there has been nothing to do, and how much of that it spun.
    idle: Option<(Instant, Duration)>,
    /// It was told to end, or cannot go on.
    ended: bool,
    /// No frame passes.
    frozen: bool,
    /// Those whose limits make them wait, and until when.
    throttled: Vec<(u64, PortId, usize)>,
    signals: Signals,
    /// Frames of the turn at hand.
    batch: Batch,
    /// Where frames from links arrive.
    bounce: Box<[u8]>,
    nothing: IoList,
}

/// How a turn of a port ended.
enum Turn {
    /// Its budget is used up.
    More,
    /// Nothing is left.
    Idle,
    /// Its limits make it wait for so many nanoseconds.
    Throttled(u64),
}

impl Worker {
    /// All that can fail about a worker fails here, before its thread begins. Entries of the table are forgotten after `ageing`
    /// seconds.
    pub(super) fn new(
        inbox: Arc<Inbox>,
        all: Arc<AllPorts>,
        ageing: u32,
        poll: PollLimits,
    ) -> io::Result<Self> {
        let epoll = EpollSet::new()?;
        epoll.add(inbox.event.as_fd().as_raw_fd(), token(INBOX, 0, 0))?;
        let ports = usize::from(MAX_PORTS);
        Ok(Self {
            inbox,
            all,
            epoll,
            ingress: (0..ports).map(|_| None).collect(),
            fabric: Fabric {
                egress: (0..ports).map(|_| None).collect(),
                table: Table::new(ports, ageing),
                owners: Vec::new(),
                room: Room::new(),
                touched: 0,
                now: now(),
            },
            row: VecDeque::new(),
            hot: Vec::new(),
            polled: Vec::new(),
            poll: PollWindow::new(poll),
            idle: None,
            ended: false,
            frozen: false,
            throttled: Vec::new(),
            signals: Signals::new()?,
            batch: Batch::new(),
            bounce: vec![0; HEADER + MAX_FRAME].into(),
            nothing: IoList::new(Arc::new(Memory::new())),
        })
    }

    /// Lets no frame pass until [`Order::Thaw`].
    pub(super) fn frozen(self) -> Self {
        Self {
            frozen: true,
            ..self
        }
    }

    /// Serves until [`Order::End`].
    pub(super) fn run(mut self) {
        let mut timeout = 0;
        while !self.ended {
            self.look(timeout);
            timeout = self.work();
        }
    }

    /// Waits for the descriptors, in milliseconds, and does what they say. Returns whether any said something.
    fn look(&mut self, timeout: i32) -> bool {
        let events = match self.epoll.wait(timeout) {
            Ok(events) => events,
            Err(e) => {
                error!("cannot wait for events, the switch is dead: {e}");
                self.ended = true;
                return true;
            }
        };
        if timeout != 0 {
            self.all.wakeups.add(1);
        }
        if let Some((since, spun)) = self.idle.take() {
            self.poll.slept(since.elapsed(), spun);
        }
        let mut any = false;
        for (what, events) in events {
            any = true;
            let (kind, port, pair) = parts(what);
            match kind {
                INBOX => self.take_orders(),
                COMMAND => self.obey(port),
                SETTINGS => self.adopt(port),
                KICK => self.enqueue(port, pair),
                LINK => self.link_stirred(port, events),
                TIMER_RX => self.release(port, pair, true),
                TIMER_TX => self.release(port, pair, false),
                _ => {}
            }
        }
        any
    }

    /// Sends frames on until there are none, or it is time to look at the descriptors. Returns how long to wait for those, in
    /// milliseconds.
    fn work(&mut self) -> i32 {
        for _ in 0..ROUNDS {
            if self.frozen {
                return -1;
            }
            self.fabric.now = now();
            self.wake_throttled();
            self.look_at_polled();
            self.round();
            if self.row.is_empty() && !self.spin() {
                self.arm();
                return self.timeout();
            }
            if self.ended {
                break;
            }
        }
        0
    }

    /// Looks for something to do for as long as that pays. Returns whether there is some.
    fn spin(&mut self) -> bool {
        let start = Instant::now();
        let window = self.poll.now();
        loop {
            let passed = start.elapsed();
            if passed >= window {
                self.idle = Some((start, window));
                return false;
            }
            for _ in 0..LOOKS {
                if self.find_waiting() {
                    self.poll.hit(start.elapsed());
                    return true;
                }
                std::hint::spin_loop();
            }
            if self.look(0) {
                self.poll.hit(start.elapsed());
                return true;
            }
        }
    }

    /// Looks at the rings that had something lately.
    fn find_waiting(&mut self) -> bool {
        let found = (0..self.hot.len()).filter_map(|at| self.hot.get(at).copied());
        let found: Option<(PortId, usize)> = found.into_iter().find(|&(port, pair)| {
            let tx = tx_ring(&mut self.ingress, port, pair);
            tx.is_some_and(|tx| !tx.throttled && tx.ring.waiting())
        });
        if let Some((port, pair)) = found {
            self.enqueue(port, pair);
        }
        found.is_some()
    }

    /// Asks drivers to kick from now on. Those that had something meanwhile get their turn.
    fn arm(&mut self) {
        while let Some((port, pair)) = self.hot.pop() {
            if let Some(tx) = tx_ring(&mut self.ingress, port, pair) {
                tx.hot = false;
                if !tx.throttled && tx.ring.arm() {
                    self.enqueue(port, pair);
                }
            }
        }
    }

    /// How long to sleep, in milliseconds.
    fn timeout(&self) -> i32 {
        if !self.row.is_empty() {
            return 0;
        }
        let next = self.throttled.iter().map(|&(until, ..)| until).min();
        let wait = next.map(|until| sleep_until(until, self.fabric.now));
        match (wait, !self.polled.is_empty()) {
            (Some(wait), true) => wait.min(POLL_INTERVAL),
            (Some(wait), false) => wait,
            (None, true) => POLL_INTERVAL,
            (None, false) => -1,
        }
    }

    fn look_at_polled(&mut self) {
        if self.polled.is_empty() {
            return;
        }
        let Self {
            polled, ingress, ..
        } = self;
        // One that is broken is looked at no more.
        polled.retain(|&(port, pair)| {
            tx_ring(ingress, port, pair).is_some_and(|tx| tx.ring.polled())
        });
        for at in 0..self.polled.len() {
            if let Some(&(port, pair)) = self.polled.get(at) {
                self.enqueue(port, pair);
            }
        }
    }

    /// Puts a port's queue pair at the end of the row, unless it stands there or has to wait.
    fn enqueue(&mut self, port: PortId, pair: usize) {
        let ingress = self.ingress.get_mut(usize::from(port));
        let waiting = match ingress.and_then(Option::as_mut).map(|it| &mut it.source) {
            Some(Source::Guest { rings, .. }) => {
                let ring = rings.get_mut(pair).and_then(Option::as_mut);
                ring.filter(|ring| !ring.throttled)
                    .map(|ring| &mut ring.waiting)
            }
            Some(Source::Link { waiting }) => Some(waiting),
            None => None,
        };
        if let Some(waiting) = waiting
            && !std::mem::replace(waiting, true)
        {
            self.row.push_back((port, pair));
        }
    }

    fn wake_throttled(&mut self) {
        let now = self.fabric.now;
        while let Some(at) = self.throttled.iter().position(|&(until, ..)| until <= now) {
            let (_, port, pair) = self.throttled.swap_remove(at);
            if let Some(tx) = tx_ring(&mut self.ingress, port, pair) {
                tx.throttled = false;
            }
            self.enqueue(port, pair);
        }
    }

    /// One turn for each that stands in the row.
    fn round(&mut self) {
        for _ in 0..self.row.len() {
            let Some((port, pair)) = self.row.pop_front() else {
                break;
            };
            match self.turn(port, pair) {
                Turn::More => self.enqueue(port, pair),
                Turn::Idle => {
                    if let Some(tx) = tx_ring(&mut self.ingress, port, pair)
                        && !std::mem::replace(&mut tx.hot, true)
                    {
                        self.hot.push((port, pair));
                    }
                }
                Turn::Throttled(wait) => {
                    if let Some(tx) = tx_ring(&mut self.ingress, port, pair) {
                        tx.throttled = true;
                        let wait = wait.min(LONGEST_WAIT);
                        let until = self.fabric.now.saturating_add(wait);
                        self.throttled.push((until, port, pair));
                    }
                }
            }
        }
        self.fabric.flush(&self.signals);
    }

    fn turn(&mut self, port: PortId, pair: usize) -> Turn {
        let Self {
            ingress,
            fabric,
            signals,
            batch,
            bounce,
            nothing,
            ..
        } = self;
        let ingress = ingress.get_mut(usize::from(port)).and_then(Option::as_mut);
        let Some(Ingress {
            shared,
            source,
            last,
        }) = ingress
        else {
            return Turn::Idle;
        };
        match source {
            Source::Guest { rings, .. } => {
                let Some(Some(tx)) = rings.get_mut(pair) else {
                    return Turn::Idle;
                };
                tx.waiting = false;
                if !tx.ring.sound() {
                    return Turn::Idle;
                }
                match tx.serve(port, shared, last, fabric, batch) {
                    Ok((turn, wanted)) => {
                        let TxRing { ring, done, .. } = tx;
                        if ring.due(wanted, *done) {
                            interrupt(ring, shared, signals);
                        }
                        turn
                    }
                    Err(error) => {
                        tx.ring.give_up(&error);
                        tell_of_failure(&tx.ring, shared, signals);
                        Turn::Idle
                    }
                }
            }
            Source::Link { waiting } => {
                *waiting = false;
                serve_link(port, shared, last, fabric, batch, bounce, nothing)
            }
        }
    }

    fn link_stirred(&mut self, port: PortId, events: Events) {
        let egress = self.fabric.egress.get_mut(usize::from(port));
        if let Some(Some(Egress {
            outlet: Outlet::Link(outlet),
            ..
        })) = egress
            && outlet.link.ready(events).readable
        {
            self.enqueue(port, 0);
        }
    }

    fn take_orders(&mut self) {
        // Addresses may have become too old since the last round.
        self.fabric.now = now();
        // The descriptor is edge-triggered and never read.
        for order in self.inbox.take() {
            match order {
                Order::Add(port, shared, behind) => self.add(port, shared, behind),
                Order::Remove(port) => self.remove(port),
                Order::Addresses(to) => {
                    // Who asked may have gone.
                    let _ = to.send(self.fabric.table.dump(self.fabric.seconds()));
                }
                // All that was sent has arrived: a round is done before orders are taken.
                Order::Freeze(to) => {
                    self.frozen = true;
                    for egress in self.fabric.egress.iter_mut().flatten() {
                        if let Outlet::Link(outlet) = &mut egress.outlet {
                            outlet.link.leave();
                        }
                    }
                    let _ = to.send(self.fabric.table.dump(self.fabric.seconds()));
                }
                Order::Learn(known) => self.learn(known),
                Order::Thaw => self.thaw(),
                Order::End => self.ended = true,
            }
        }
    }

    /// Lets frames pass again.
    fn thaw(&mut self) {
        self.frozen = false;
        for port in 0..MAX_PORTS {
            let egress = self.fabric.egress.get_mut(usize::from(port));
            if let Some(Some(Egress {
                outlet: Outlet::Link(outlet),
                ..
            })) = egress
            {
                outlet.link.go_on();
                self.enqueue(port, 0);
            }
        }
    }

    /// Goes by what another switch has learnt.
    fn learn(&mut self, known: Vec<Known>) {
        for (vlan, address, port, seen) in known {
            let ingress = self.ingress.get(usize::from(port)).and_then(Option::as_ref);
            if let Some(Ingress { shared, .. }) = ingress {
                let key = Key::new(vlan, number(address));
                // What does not fit is learnt again, or not.
                let _ = self.fabric.table.learn(key, port, shared.quota, seen);
            }
        }
    }

    fn add(&mut self, port: PortId, shared: Arc<PortShared>, behind: Behind) {
        let name = shared.name.clone();
        let ready = match behind {
            Behind::Guest {
                commands,
                settings,
                pairs,
            } => {
                let wait = |fd: RawFd, kind| self.epoll.add(fd, token(kind, port, 0));
                let waited = wait(commands.as_raw_fd(), COMMAND).and_then(|()| {
                    settings
                        .waker(0)
                        .map_or(Ok(()), |waker| wait(waker, SETTINGS))
                });
                waited.map(|()| {
                    let outlet = GuestOutlet::new(Arc::clone(&settings), pairs);
                    let source = Source::Guest {
                        commands,
                        settings,
                        rings: (0..pairs).map(|_| None).collect(),
                    };
                    (source, Outlet::Guest(outlet))
                })
            }
            Behind::Link(mut link) => {
                let watched = link.watch(self.epoll.watcher(token(LINK, port, 0)));
                watched.and_then(|()| {
                    let outlet = LinkOutlet::new(link).ok_or(io::ErrorKind::OutOfMemory)?;
                    Ok((Source::Link { waiting: false }, Outlet::Link(outlet)))
                })
            }
        };
        let (source, outlet) = match ready {
            Ok(ready) => ready,
            // Its commands are dropped, which its control thread takes for what it is.
            Err(e) => {
                error!(
                    port = name,
                    "the port cannot be waited for, and is dead: {e}"
                );
                return;
            }
        };
        let is_link = matches!(source, Source::Link { .. });
        let at = usize::from(port);
        let (Some(ingress), Some(egress)) =
            (self.ingress.get_mut(at), self.fabric.egress.get_mut(at))
        else {
            return;
        };
        let recorder = shared.take_recorder().filter(|recorder| {
            let begun = recorder.begin();
            if let Err(error) = &begun {
                error!(port = shared.name, "its frames are not captured: {error}");
            }
            begun.is_ok()
        });
        *egress = Some(Egress {
            shared: Arc::clone(&shared),
            outlet,
            recorder,
        });
        *ingress = Some(Ingress {
            shared,
            source,
            last: Default::default(),
        });
        self.fabric.find_owners();
        self.make_room();
        if is_link {
            self.enqueue(port, 0);
        } else {
            self.obey(port);
        }
        debug!(port = name, "port added to the switch");
    }

    /// Nothing is allocated later for those that have something.
    fn make_room(&mut self) {
        let sources = self.ingress.iter().flatten().map(|it| match &it.source {
            Source::Guest { rings, .. } => rings.len(),
            Source::Link { .. } => 1,
        });
        let most: usize = sources.sum();
        self.row.reserve(most.saturating_sub(self.row.len()));
        self.hot.reserve(most.saturating_sub(self.hot.len()));
        self.throttled
            .reserve(most.saturating_sub(self.throttled.len()));
    }

    fn remove(&mut self, port: PortId) {
        let at = usize::from(port);
        if let (Some(ingress), Some(egress)) =
            (self.ingress.get_mut(at), self.fabric.egress.get_mut(at))
        {
            if let Some(Ingress {
                shared,
                source: Source::Guest {
                    commands, settings, ..
                },
                ..
            }) = ingress
            {
                self.epoll.remove(commands.as_raw_fd());
                if let Some(waker) = settings.waker(0) {
                    self.epoll.remove(waker);
                }
                debug!(port = shared.name, "port removed from the switch");
            }
            *ingress = None;
            *egress = None;
        }
        self.fabric.table.forget(port);
        self.fabric.find_owners();
        self.forget(|of, _| of == port);
    }

    /// Rings are not there any more: they stand in no list.
    fn forget(&mut self, gone: impl Fn(PortId, usize) -> bool) {
        self.row.retain(|&(port, pair)| !gone(port, pair));
        self.hot.retain(|&(port, pair)| !gone(port, pair));
        self.polled.retain(|&(port, pair)| !gone(port, pair));
        self.throttled.retain(|&(_, port, pair)| !gone(port, pair));
    }

    /// Goes by what a driver has set.
    fn adopt(&mut self, port: PortId) {
        let at = usize::from(port);
        let egress = self.fabric.egress.get_mut(at).and_then(Option::as_mut);
        let Some(Egress {
            outlet: Outlet::Guest(guest),
            ..
        }) = egress
        else {
            return;
        };
        if !guest.adopt() {
            return;
        }
        let queues = guest.rings.len().saturating_mul(2);
        for queue in (0..queues).filter_map(|queue| u16::try_from(queue).ok()) {
            self.coalesce(port, queue);
        }
        if let Some(Some(Egress {
            outlet: Outlet::Guest(guest),
            ..
        })) = self.fabric.egress.get(at)
        {
            guest.adopted();
        }
    }

    /// Has a queue hold its interrupts back as its driver said.
    fn coalesce(&mut self, port: PortId, queue: u16) {
        let egress = self.fabric.egress.get(usize::from(port));
        if let Some(Some(Egress {
            outlet: Outlet::Guest(guest),
            ..
        })) = egress
        {
            let limits = guest.coalescing_of(queue);
            let receives = queue.is_multiple_of(2);
            self.settle(port, usize::from(queue / 2), receives, |ring, done| {
                ring.hold_back(limits, done)
            });
        }
    }

    /// An interrupt that was held back is sent.
    fn release(&mut self, port: PortId, pair: usize, receives: bool) {
        self.settle(port, pair, receives, Ring::release);
    }

    /// Interrupts the driver of a ring, if it is there and that is due.
    fn settle(
        &mut self,
        port: PortId,
        pair: usize,
        receives: bool,
        due: impl FnOnce(&mut Ring, u64) -> bool,
    ) {
        let at = usize::from(port);
        let (Some(Some(ingress)), Some(Some(egress))) =
            (self.ingress.get_mut(at), self.fabric.egress.get_mut(at))
        else {
            return;
        };
        let found = match (receives, &mut egress.outlet, &mut ingress.source) {
            (true, Outlet::Guest(guest), _) => {
                let rx = guest.rings.get_mut(pair).and_then(Option::as_mut);
                rx.map(|rx| (&mut rx.ring, rx.done))
            }
            (false, _, Source::Guest { rings, .. }) => {
                let tx = rings.get_mut(pair).and_then(Option::as_mut);
                tx.map(|tx| (&mut tx.ring, tx.done))
            }
            _ => None,
        };
        if let Some((ring, done)) = found
            && due(ring, done)
        {
            interrupt(ring, &ingress.shared, &self.signals);
        }
    }

    /// Obeys all commands that wait at a port.
    fn obey(&mut self, port: PortId) {
        let at = usize::from(port);
        loop {
            let ingress = self.ingress.get(at).and_then(Option::as_ref);
            let Some(Source::Guest { commands, .. }) = ingress.map(|it| &it.source) else {
                return;
            };
            commands.acknowledge();
            match commands.next() {
                Some(Command::Start(vring)) => self.start(port, vring),
                Some(Command::Stop { index, done, .. }) => {
                    if let Some(vring) = self.stop(port, index) {
                        // The control thread waits; if it does not, the ring just ends here.
                        let _ = done.send(vring);
                    }
                }
                // Not for this device, whose drain is refused.
                Some(Command::Pause { .. } | Command::Resume) => {}
                // The port goes with [`Order::Remove`].
                Some(Command::Exit) | None => return,
            }
        }
    }

    fn start(&mut self, port: PortId, vring: Box<Vring>) {
        let at = usize::from(port);
        let (Some(Some(ingress)), Some(Some(egress))) =
            (self.ingress.get_mut(at), self.fabric.egress.get_mut(at))
        else {
            return;
        };
        let log = &ingress.shared.log;
        let (index, pair) = (vring.index, vring.index / 2);
        if vring.resumes()
            && let Some(call) = &vring.call
            && let Err(error) = self.signals.signal(call)
        {
            let port = &ingress.shared.name;
            debug!(
                port,
                queue = index,
                "the driver cannot be interrupted: {error}"
            );
        }
        // Receive queues have even numbers, transmit queues odd ones (VIRTIO 1.3, 5.1.2).
        if index.is_multiple_of(2) {
            if let Outlet::Guest(guest) = &mut egress.outlet {
                let mut rx = RxRing::new(vring, log);
                let what = token(TIMER_RX, port, pair);
                wait_for_timer(&self.epoll, &mut rx.ring, what, &ingress.shared);
                if let Some(place) = guest.rings.get_mut(usize::from(pair)) {
                    *place = Some(rx);
                }
                guest.choose_pairs();
            }
            self.coalesce(port, index);
            return;
        }
        let mut tx = TxRing {
            header_len: header_len(vring.features).into(),
            ring: Ring::new(vring, log),
            waiting: false,
            hot: false,
            throttled: false,
            debt: 0,
            done: 0,
        };
        if let Some(kick) = &tx.ring.vring.kick {
            // To ask what state a file is in can take as long as its owner likes. An eventfd answers at once, and only an eventfd
            // can be signalled; one kick too many does no harm.
            let signalled = self.signals.signal(kick);
            let waited =
                signalled.and_then(|()| self.epoll.add(kick.as_raw_fd(), token(KICK, port, pair)));
            if let Err(error) = waited
                && let Some(held_back) = log.check()
            {
                warn!(
                    port = ingress.shared.name,
                    queue = index,
                    held_back,
                    "cannot wait on the front-end's kick descriptor: {error}"
                );
            }
        }
        let polled = (port, usize::from(pair));
        if tx.ring.polled() && !self.polled.contains(&polled) {
            self.polled.push(polled);
        }
        // What a disabled queue holds is for its driver to say again: the ring may be none any more.
        let runs = tx.ring.runs();
        let what = token(TIMER_TX, port, pair);
        wait_for_timer(&self.epoll, &mut tx.ring, what, &ingress.shared);
        if let Source::Guest { rings, .. } = &mut ingress.source
            && let Some(place) = rings.get_mut(usize::from(pair))
        {
            *place = Some(tx);
        }
        self.coalesce(port, index);
        if runs {
            self.enqueue(port, pair.into());
        }
    }

    fn stop(&mut self, port: PortId, index: u16) -> Option<Box<Vring>> {
        let at = usize::from(port);
        let pair = usize::from(index / 2);
        self.release(port, pair, index.is_multiple_of(2));
        if index.is_multiple_of(2) {
            let egress = self.fabric.egress.get_mut(at)?.as_mut()?;
            let Outlet::Guest(guest) = &mut egress.outlet else {
                return None;
            };
            let ring = guest.rings.get_mut(pair)?.take()?;
            guest.choose_pairs();
            return Some(ring.ring.vring);
        }
        let ingress = self.ingress.get_mut(at)?.as_mut()?;
        let Source::Guest { rings, .. } = &mut ingress.source else {
            return None;
        };
        let vring = rings.get_mut(pair)?.take()?.ring.vring;
        if let Some(fd) = vring.kick_fd() {
            self.epoll.remove(fd);
        }
        self.forget(|of, ring| of == port && ring == pair);
        Some(vring)
    }
}

/// Waits for the timer of a ring that has one.
fn wait_for_timer(epoll: &EpollSet, ring: &mut Ring, what: u64, port: &PortShared) {
    let Some(Err(error)) = ring.timer_fd().map(|timer| epoll.add(timer, what)) else {
        return;
    };
    ring.without_timer();
    if let Some(held_back) = port.log.check() {
        warn!(
            port = port.name,
            held_back, "no interrupt is held back, as its timer cannot be waited for: {error}"
        );
    }
}

/// An address as a number of 48 bits.
fn number(address: MacAddress) -> u64 {
    let [a, b, c, d, e, f] = address.octets();
    u64::from_be_bytes([0, 0, a, b, c, d, e, f])
}

/// A guest's transmit ring, if it is there.
fn tx_ring(ingress: &mut [Option<Ingress>], port: PortId, pair: usize) -> Option<&mut TxRing> {
    match &mut ingress.get_mut(usize::from(port))?.as_mut()?.source {
        Source::Guest { rings, .. } => rings.get_mut(pair)?.as_mut(),
        Source::Link { .. } => None,
    }
}

/// A frame of a batch.
struct Slot {
    beginning: Beginning,
    /// The ports that it goes to, as bits.
    to: u64,
    /// What its chain is returned by.
    head: u16,
}

/// The frames that a port sends in one turn. Where each goes is found out first; then each receiver's ring is opened once,
/// and gets all that are for it.
struct Batch {
    slots: Box<[Slot]>,
    count: usize,
    /// Of all chains.
    segments: Vec<Segment>,
    /// All ports that any of the frames goes to, as bits.
    to: u64,
    /// The frame before is in the last slot, and one like it goes the same way.
    repeats: bool,
}

/// Where a frame goes.
struct Route {
    /// Ports, as bits.
    to: u64,
    /// The next one goes there, too, if it is like this one.
    repeats: bool,
}

impl Route {
    const NOWHERE: Self = Self {
        to: 0,
        repeats: false,
    };
}

impl Batch {
    fn new() -> Self {
        let slot = || Slot {
            beginning: Beginning::new(),
            to: 0,
            head: 0,
        };
        Self {
            slots: (0..BUDGET).map(|_| slot()).collect(),
            count: 0,
            segments: Vec::with_capacity(MAX_SEGMENTS),
            to: 0,
            repeats: false,
        }
    }

    fn clear(&mut self) {
        self.count = 0;
        self.repeats = false;
        self.segments.clear();
        self.to = 0;
    }

    /// The frames that go somewhere.
    fn slots(&self) -> &[Slot] {
        self.slots.get(..self.count).unwrap_or_default()
    }

    /// Takes the frame in `chain`, of which `header_len` bytes are its header, and finds out where it goes. Returns whether it
    /// goes anywhere: its chain is then to be returned as the batch is done.
    #[inline]
    fn take(
        &mut self,
        window: &mut Window<'_>,
        chain: &Chain<'_>,
        header_len: usize,
        shared: &PortShared,
        route: impl FnOnce(&Beginning) -> Route,
    ) -> Result<bool, Refused> {
        let repeats = std::mem::take(&mut self.repeats);
        let len = usize::try_from(chain.readable_len()).unwrap_or(usize::MAX);
        let pieces = chain.readable();
        if !(header_len + MIN_FRAME..=header_len + MAX_FRAME).contains(&len)
            || pieces.len() > MAX_PIECES
        {
            return Err(Refused::Malformed);
        }
        let slots = self.slots.split_at_mut_checked(self.count);
        let (before, free) = slots.ok_or(Refused::Malformed)?;
        let slot = free.first_mut().ok_or(Refused::Malformed)?;
        let Slot {
            beginning,
            to,
            head,
        } = slot;
        let count = len.min(header_len + PREFIX);
        let mut place = beginning
            .place(header_len, count)
            .ok_or(Refused::Malformed)?;
        if count < len && len <= MOST_PREFETCHED {
            // The rest of it is copied once the frames behind it were looked at.
            window.each(pieces, len, |piece| {
                prefetch_to_read(piece.ptr_guard().as_ptr(), piece.len());
                true
            });
        }
        let whole = if let [segment] = pieces
            && let Some(piece) = window.piece(segment.addr, count)
        {
            piece.copy_to(place) == count
        } else {
            window.each(pieces, count, |piece| {
                let room = std::mem::take(&mut place);
                let Some((now, later)) = room.split_at_mut_checked(piece.len()) else {
                    return false;
                };
                piece.copy_to(now);
                place = later;
                true
            })
        };
        if !whole {
            return Err(Refused::Malformed);
        }
        let (prefix_len, rest_len) = (count - header_len, len - count);
        let vlans = &shared.policy.vlans;
        match before.last() {
            Some(last)
                if repeats
                    && beginning.is_like(
                        &last.beginning,
                        header_len,
                        prefix_len,
                        rest_len,
                        vlans,
                    ) =>
            {
                shared.came_in(beginning);
                *to = last.to;
                self.repeats = true;
            }
            _ => {
                beginning.understand(header_len, prefix_len, rest_len, vlans)?;
                let route = route(beginning);
                if route.to == 0 {
                    return Ok(false);
                }
                (*to, self.repeats) = (route.to, route.repeats);
            }
        }
        let start = self.segments.len();
        // There is room for the longest chain when this is called.
        if count < len {
            self.segments.extend_from_slice(pieces);
        }
        beginning.goes_on(start..self.segments.len(), count);
        *head = chain.head();
        self.count += 1;
        self.to |= *to;
        Ok(true)
    }

    /// There is room for any chain.
    #[inline]
    fn has_room(&self) -> bool {
        self.segments.len() <= MAX_SEGMENTS - MAX_PIECES
    }
}

impl TxRing {
    /// Sends on what the driver has made available. Returns how it ended, and whether the driver wants an interrupt.
    fn serve(
        &mut self,
        port: PortId,
        shared: &PortShared,
        last: &mut Last,
        fabric: &mut Fabric,
        batch: &mut Batch,
    ) -> Result<(Turn, bool), RingError> {
        let Self {
            ring,
            header_len,
            debt,
            done,
            ..
        } = self;
        let Some(mut left) = pay(debt) else {
            return Ok((Turn::More, false));
        };
        // A disabled transmit queue is emptied without effect ("Ring states" of the vhost-user protocol), and so is one whose
        // cable is pulled.
        let serves = ring.vring.enabled && shared.is_up();
        let memory = Arc::clone(&ring.vring.memory);
        let mut window = Window::new(&memory);
        let (mut session, buf, _) = ring.parts()?;
        session.disable_notifications()?;
        batch.clear();
        let turn = loop {
            if left == 0 || !batch.has_room() {
                break Ok(Turn::More);
            }
            let head = match session.pop(buf) {
                Ok(Some(chain)) => {
                    if serves {
                        let len = chain.readable_len();
                        left = left.saturating_sub(len / COUNTED_AS_FRAME);
                        if shared.limits.of_tx()
                            && let Err(wait) = shared.limits.take_tx(len, fabric.now)
                        {
                            shared.counters.tx_throttled.add(1);
                            session.rewind(1);
                            break Ok(Turn::Throttled(wait));
                        }
                        let mut more = 0;
                        let route = |frame: &Beginning| {
                            let route = fabric.route(port, shared, last, frame);
                            more = fabric.work_beside(route.to, frame);
                            route
                        };
                        match batch.take(&mut window, &chain, *header_len, shared, route) {
                            Ok(true) => {
                                left = left.saturating_sub(1);
                                if more > 0 {
                                    *debt = debt.saturating_add(more.saturating_sub(left));
                                    left = left.saturating_sub(more);
                                }
                                continue;
                            }
                            Ok(false) => {}
                            Err(why) => refused(shared, why),
                        }
                    }
                    chain.head()
                }
                Ok(None) => break Ok(Turn::Idle),
                Err(PopError::Chain { head, .. }) => {
                    refused(shared, Refused::Malformed);
                    head
                }
                // What was done before the driver broke its ring is returned all the same.
                Err(PopError::Ring(error)) => break Err(error),
            };
            session.push_used(head, 0)?;
            *done = done.wrapping_add(1);
            left = left.saturating_sub(1);
        };
        let rest = Rest::Guest {
            memory: &memory,
            segments: &batch.segments,
        };
        fabric.deliver(port, batch.to, batch.slots(), &rest);
        for slot in batch.slots() {
            session.push_used(slot.head, 0)?;
            *done = done.wrapping_add(1);
        }
        let interrupted = session.publish()?;
        Ok((turn?, interrupted))
    }
}

/// What is left for a turn when a debt is paid; `None` if that takes all of it.
fn pay(debt: &mut u64) -> Option<u64> {
    let left = BUDGET.saturating_sub(*debt);
    *debt = debt.saturating_sub(BUDGET);
    (left > 0).then_some(left)
}

#[cold]
fn refused(shared: &PortShared, why: Refused) {
    match why {
        Refused::Malformed => shared.counters.tx_dropped.add(1),
        Refused::Vlan => shared.counters.tx_wrong_vlan.add(1),
    }
}

/// Sends on what a link has.
fn serve_link(
    port: PortId,
    shared: &PortShared,
    last: &mut Last,
    fabric: &mut Fabric,
    batch: &mut Batch,
    bounce: &mut [u8],
    nothing: &mut IoList,
) -> Turn {
    let Some(slot) = batch.slots.first_mut() else {
        return Turn::Idle;
    };
    let mut left = BUDGET;
    while left > 0 {
        left = left.saturating_sub(1);
        let Some(Some(Egress {
            outlet: Outlet::Link(outlet),
            ..
        })) = fabric.egress.get_mut(usize::from(port))
        else {
            return Turn::Idle;
        };
        let len = match outlet.link.receive(nothing, 0, HEADER, bounce) {
            Ok(len) => len,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => {
                if error.kind() != io::ErrorKind::WouldBlock
                    && let Some(held_back) = shared.log.check()
                {
                    warn!(
                        port = shared.name,
                        held_back, "cannot receive from the link: {error}"
                    );
                }
                return Turn::Idle;
            }
        };
        if !shared.is_up() {
            continue;
        }
        // It is out of the link, which would not take it back.
        let bytes = u64::try_from(len).unwrap_or(u64::MAX);
        if shared.limits.of_tx() && shared.limits.take_tx(bytes, fabric.now).is_err() {
            shared.counters.tx_limited.add(1);
            continue;
        }
        let bytes = bounce.get(..len).unwrap_or_default();
        let begun = if bytes.len() < HEADER + MIN_FRAME {
            Err(Refused::Malformed)
        } else {
            slot.beginning.begin(bytes, &shared.policy.vlans)
        };
        match begun {
            Ok(rest) => {
                slot.to = fabric.route(port, shared, last, &slot.beginning).to;
                let more = fabric.work_beside(slot.to, &slot.beginning);
                left = left.saturating_sub(more);
                let slots = std::slice::from_ref(&*slot);
                fabric.deliver(port, slot.to, slots, &Rest::Bytes(rest));
            }
            Err(why) => refused(shared, why),
        }
    }
    Turn::More
}

fn length(frame: &Beginning) -> u64 {
    u64::try_from(frame.len()).unwrap_or(u64::MAX)
}

fn bit(port: PortId) -> u64 {
    1_u64.checked_shl(port.into()).unwrap_or(0)
}

/// The ports of a set of bits.
fn ports(set: u64) -> impl Iterator<Item = usize> {
    let mut set = set;
    std::iter::from_fn(move || {
        let port = usize::try_from(set.trailing_zeros()).ok()?;
        (set != 0).then(|| {
            set &= set - 1;
            port
        })
    })
}

impl Fabric {
    fn seconds(&self) -> u32 {
        u32::try_from(self.now / 1_000_000_000).unwrap_or(u32::MAX)
    }

    /// Finds out where a frame belongs.
    #[inline]
    fn route(
        &mut self,
        from: PortId,
        shared: &PortShared,
        last: &mut Last,
        frame: &Beginning,
    ) -> Route {
        let counters = &shared.counters;
        let source = frame.source();
        if is_group(source) {
            counters.tx_dropped.add(1);
            return Route::NOWHERE;
        }
        if frame.is_link_local() {
            counters.tx_undelivered.add(1);
            return Route::NOWHERE;
        }
        if !shared.policy.allows(frame) {
            counters.tx_forged.add(1);
            return Route::NOWHERE;
        }
        let now = self.seconds();
        let key = Key::new(frame.vlan, source);
        if last.source != (key, now) {
            // Another port has it for itself.
            if self.owner(source).is_some_and(|owner| owner != from) {
                counters.tx_forged.add(1);
                return Route::NOWHERE;
            }
            match self.table.learn(key, from, shared.quota, now) {
                Learnt::Known => last.source = (key, now),
                Learnt::Full => counters.tx_unlearnt.add(1),
            }
        }
        shared.came_in(frame);
        let to = if frame.is_to_group() {
            None
        } else {
            let address = frame.destination();
            let destination = (Key::new(frame.vlan, address), now, self.table.changes());
            if last.destination == destination {
                Some(last.port)
            } else if let Some(port) = self.table.look_up(destination.0, now) {
                (last.destination, last.port) = (destination, port);
                Some(port)
            } else {
                self.owner(address)
            }
        };
        let isolated = shared.policy.isolated;
        match to {
            Some(to) if to != from && self.reaches(to, isolated, frame) => Route {
                to: bit(to),
                // What it may not say is looked for in each frame, and an address that is not learnt is counted each time.
                repeats: !shared.policy.has_addresses() && last.source == (key, now),
            },
            Some(_) => {
                counters.tx_undelivered.add(1);
                Route::NOWHERE
            }
            None if !shared.limits.take_flood(length(frame), self.now) => {
                counters.tx_storm.add(1);
                Route::NOWHERE
            }
            None => {
                counters.tx_flooded.add(1);
                let others = (0..MAX_PORTS).filter(|&to| to != from);
                let to = others
                    .filter(|&to| self.reaches(to, isolated, frame))
                    .fold(0, |set, to| set | bit(to));
                // Each counts for the limit.
                Route { to, repeats: false }
            }
        }
    }

    /// What a frame takes beside what it takes of itself, in frames: it is copied to each in `to`, a set of bits, and cut for those
    /// that do not take it as it is.
    #[inline]
    fn work_beside(&self, to: u64, frame: &Beginning) -> u64 {
        let others = to & to.wrapping_sub(1);
        if others == 0 && !frame.header.is_cut() {
            return 0;
        }
        let copies = u64::from(others.count_ones());
        let copied = copies.saturating_mul(length(frame)) / COUNTED_AS_FRAME;
        let segments = segments(&frame.header, frame.len());
        if segments == 0 {
            return copied;
        }
        let egress = |port| self.egress.get(port).and_then(Option::as_ref);
        let receivers = ports(to).filter_map(egress);
        receivers
            .filter(|egress| !egress.shared.takes(&frame.header))
            .fold(copied, |sum, _| sum.saturating_add(segments))
    }

    /// A port is to get a frame; `isolated` is the one where it came in.
    #[inline]
    fn reaches(&self, to: PortId, isolated: bool, frame: &Beginning) -> bool {
        let egress = self.egress.get(usize::from(to)).and_then(Option::as_ref);
        egress.is_some_and(|egress| egress.shared.form(frame, isolated).is_some())
    }

    /// Gives each of the ports in `to`, a set of bits, those of the frames that go there.
    fn deliver<'a>(&mut self, from: PortId, to: u64, slots: &'a [Slot], rest: &'a Rest<'a>) {
        self.touched |= to;
        let frame = |slot: &'a Slot| Frame {
            beginning: &slot.beginning,
            rest,
        };
        if let Some(Some(egress)) = self.egress.get_mut(usize::from(from))
            && egress.recorder.is_some()
        {
            self.touched |= bit(from);
            egress.record(slots.iter().filter(|slot| slot.to != 0).map(frame));
        }
        for port in ports(to) {
            let Some(Some(egress)) = self.egress.get_mut(port) else {
                continue;
            };
            let slots = slots.iter().filter(|slot| slot.to >> port & 1 != 0);
            let frames = slots.map(frame);
            egress.record(frames.clone());
            egress.take(frames, &mut self.room, self.now);
        }
    }

    fn owner(&self, address: u64) -> Option<PortId> {
        let at = self
            .owners
            .binary_search_by_key(&address, |&(address, _)| address)
            .ok()?;
        self.owners.get(at).map(|&(_, port)| port)
    }

    /// Sorts out which address belongs to which port.
    fn find_owners(&mut self) {
        let ports = (0..).zip(&self.egress);
        let owners = ports.flat_map(|(port, egress)| {
            let shared = egress.as_ref().map(|egress| &egress.shared);
            let addresses = shared.into_iter().flat_map(|shared| {
                let own = shared.mac.into_iter();
                own.chain(shared.policy.macs.iter().copied())
            });
            addresses.map(move |address| (number(address), port))
        });
        self.owners = owners.collect();
        self.owners.sort_unstable();
        self.owners.dedup_by_key(|&mut (address, _)| address);
    }

    /// Ends a round.
    fn flush(&mut self, signals: &Signals) {
        for port in ports(std::mem::take(&mut self.touched)) {
            if let Some(Some(egress)) = self.egress.get_mut(port) {
                egress.flush(signals);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::super::filter::Filter;
    use super::super::super::settings::Settings;
    use super::super::frame::CSUM;
    use super::super::policy::{Policy, Vlans};
    use super::super::shared::{LIMITS, PortRates};
    use super::*;

    fn fabric() -> Fabric {
        Fabric {
            egress: (0..MAX_PORTS).map(|_| None).collect(),
            table: Table::new(usize::from(MAX_PORTS), 1),
            owners: Vec::new(),
            room: Room::new(),
            touched: 0,
            now: 0,
        }
    }

    /// A frame of `len` bytes with this virtio-net header.
    fn frame(header: [u8; 10], len: usize) -> Beginning {
        let mut bytes = vec![0; HEADER + len];
        bytes[..10].copy_from_slice(&header);
        let mut frame = Beginning::new();
        frame.begin(&bytes, &Vlans::Access(1)).unwrap();
        frame
    }

    #[test]
    fn copies_for_many_count_for_more() {
        let fabric = fabric();
        let beside = |to, len| fabric.work_beside(to, &frame([0; 10], len));
        assert_eq!(beside(0, 65_536), 0);
        assert_eq!(beside(1 << 63, 65_536), 0);
        assert_eq!(beside(u64::MAX, 64), 0);
        assert_eq!(beside(0b11, 65_536), 16);
        assert_eq!(beside(u64::MAX >> 1, 65_536), 62 * 16);
    }

    #[test]
    fn segments_count_for_those_that_have_them_cut() {
        let mut fabric = fabric();
        let segmentation = CSUM | libc::TUN_F_TSO4;
        for (egress, offloads) in fabric.egress.iter_mut().zip([0, segmentation, CSUM]) {
            let policy = Policy {
                vlans: Vlans::Access(1),
                isolated: false,
                macs: Vec::new(),
                ips: Vec::new(),
            };
            let rates = PortRates::new(&LIMITS);
            let shared = Arc::new(PortShared::new("x", None, policy, 1, rates, offloads));
            let settings = Settings::new(Filter::new(MacAddress::default(), false), 1);
            let settings = Arc::new(Shared::new(settings, 1).unwrap());
            *egress = Some(Egress {
                shared,
                outlet: Outlet::Guest(GuestOutlet::new(settings, 1)),
                recorder: None,
            });
        }
        let of = |size: u16| {
            let [low, high] = size.to_le_bytes();
            frame([1, 1, 54, 0, low, high, 34, 0, 16, 0], 65_000)
        };
        assert_eq!(fabric.work_beside(0b10, &of(48)), 0);
        assert_eq!(fabric.work_beside(0b1, &of(48)), 1355);
        assert_eq!(fabric.work_beside(0b111, &of(1448)), 31 + 2 * 45);
        // What is cut no finer.
        assert_eq!(fabric.work_beside(0b1, &of(1)), 1366);
    }

    #[test]
    fn a_debt_is_paid_by_the_next_turns() {
        let mut debt = 2 * BUDGET + 10;
        assert_eq!(
            [(); 4].map(|()| pay(&mut debt)),
            [None, None, Some(BUDGET - 10), Some(BUDGET)]
        );
        let mut debt = BUDGET;
        assert_eq!([(); 2].map(|()| pay(&mut debt)), [None, Some(BUDGET)]);
    }
}

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
//! Nothing in it waits for a peer: call descriptors are made non-blocking, and a frame that nobody takes is dropped.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use epoll::Events;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::eventfd::{EfdFlags, EventFd};
use ringside_rings::{Chain, PopError, RingError, read_segments};
use tracing::{debug, error, warn};

use super::super::config::MacAddress;
use super::super::epoll_set::EpollSet;
use super::super::features::header_len;
use super::super::iov::IoList;
use super::super::link::Link;
use super::super::ring::Ring;
use super::super::settings::Shared;
use super::super::worker::POLL_INTERVAL;
use super::counters::AllPorts;
use super::frame::{Frame, MAX_HEADER, PREFIX, Refused, Rest};
use super::offload::Room;
use super::outlet::{Egress, GuestOutlet, LinkOutlet, Outlet, RxRing, interrupt};
use super::policy::{MAX_PORTS, PortId};
use super::shared::PortShared;
use super::table::{Key, Learnt, Table};
use crate::net::tx::{MAX_FRAME, MIN_FRAME};
use crate::shell::{Command, Commands, LogLimit, Memory, PollLimits, PollWindow, Vring};

/// Most frames of one port in a round, so that all get their share. Long ones count for more.
const BUDGET: u64 = 64;
/// Bytes of a frame that count for as much as a frame: copying them takes as long.
const COUNTED_AS_FRAME: u64 = 4096;

/// Most rounds between two looks at the descriptors.
const ROUNDS: u32 = 8;
/// Looks at the rings between two looks at the descriptors, while spinning: those cost a system call.
const LOOKS: u32 = 16;

const INBOX: u64 = 0;
const COMMAND: u64 = 1;
const SETTINGS: u64 = 2;
const KICK: u64 = 3;
const LINK: u64 = 4;

/// How long a ring waits at most until its limits are asked again, in nanoseconds: they may have been changed meanwhile.
const LONGEST_WAIT: u64 = 100_000_000;

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

/// What the switch's thread is told.
pub(super) enum Order {
    /// There is one port more.
    Add(PortId, Arc<PortShared>, Behind),
    /// A port is to go. Its number may then be used again: orders are obeyed one after the other.
    Remove(PortId),
    /// Tell which addresses are known.
    Addresses(Sender<Vec<(u16, MacAddress, PortId, u32)>>),
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
    /// Where the last frame came from, and in which second: it is known.
    last: (Key, u32),
}

/// All that a frame passes on its way, apart from where it comes from.
struct Fabric {
    /// By port.
    egress: Vec<Option<Egress>>,
    table: Table,
    /// Addresses that belong to one port, sorted.
    owners: Vec<([u8; 6], PortId)>,
    room: Room,
    /// Ports that were given frames in this round, as bits.
    touched: u64,
    /// Nanoseconds since the switch began.
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
    poll: PollWindow,
    /// Since when there has been nothing to do, and how much of that it spun.
    idle: Option<(Instant, Duration)>,
    /// It was told to end, or cannot go on.
    ended: bool,
    /// Those whose limits make them wait, and until when.
    throttled: Vec<(u64, PortId, usize)>,
    /// Where frames from links arrive.
    bounce: Box<[u8]>,
    nothing: IoList,
    began: Instant,
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
                now: 0,
            },
            row: VecDeque::new(),
            hot: Vec::new(),
            poll: PollWindow::new(poll),
            idle: None,
            ended: false,
            throttled: Vec::new(),
            bounce: vec![0; MAX_HEADER + MAX_FRAME].into(),
            nothing: IoList::new(Arc::new(Memory::new())),
            began: Instant::now(),
        })
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
                _ => {}
            }
        }
        any
    }

    /// Sends frames on until there are none, or it is time to look at the descriptors. Returns how long to wait for those, in
    /// milliseconds.
    fn work(&mut self) -> i32 {
        for _ in 0..ROUNDS {
            let passed = self.began.elapsed().as_nanos();
            self.fabric.now = u64::try_from(passed).unwrap_or(u64::MAX);
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
        let now = self.fabric.now;
        let next = self.throttled.iter().map(|&(until, ..)| until).min();
        let wait = next.map(|until| {
            let wait = Duration::from_nanos(until.saturating_sub(now));
            i32::try_from(wait.as_millis()).map_or(i32::MAX, |wait| wait.saturating_add(1))
        });
        match (wait, self.polls()) {
            (Some(wait), true) => wait.min(POLL_INTERVAL),
            (Some(wait), false) => wait,
            (None, true) => POLL_INTERVAL,
            (None, false) => -1,
        }
    }

    /// All transmit rings, with the numbers of port and queue pair.
    fn tx_rings(&self) -> impl Iterator<Item = (PortId, usize, &TxRing)> {
        let ports = (0..).zip(&self.ingress);
        ports.flat_map(|(port, ingress)| {
            let rings = match ingress.as_ref().map(|ingress| &ingress.source) {
                Some(Source::Guest { rings, .. }) => rings.as_slice(),
                _ => &[],
            };
            let rings = rings.iter().enumerate();
            rings.filter_map(move |(pair, ring)| Some((port, pair, ring.as_ref()?)))
        })
    }

    /// A ring has no kick descriptor.
    fn polls(&self) -> bool {
        self.tx_rings().any(|(_, _, tx)| tx.ring.polled())
    }

    fn look_at_polled(&mut self) {
        if !self.polls() {
            return;
        }
        let polled: Vec<_> = self
            .tx_rings()
            .filter(|(_, _, tx)| tx.ring.polled())
            .map(|(port, pair, _)| (port, pair))
            .collect();
        for (port, pair) in polled {
            self.enqueue(port, pair);
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
        self.fabric.flush();
    }

    fn turn(&mut self, port: PortId, pair: usize) -> Turn {
        let Self {
            ingress,
            fabric,
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
                match tx.serve(port, shared, last, fabric) {
                    Ok((turn, interrupted)) => {
                        if interrupted {
                            interrupt(&tx.ring, shared);
                        }
                        turn
                    }
                    Err(error) => {
                        tx.ring.fail(&error);
                        Turn::Idle
                    }
                }
            }
            Source::Link { waiting } => {
                *waiting = false;
                serve_link(port, shared, last, fabric, bounce, nothing)
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
        // The descriptor is edge-triggered and never read.
        for order in self.inbox.take() {
            match order {
                Order::Add(port, shared, behind) => self.add(port, shared, behind),
                Order::Remove(port) => self.remove(port),
                Order::Addresses(to) => {
                    // Who asked may have gone.
                    let _ = to.send(self.fabric.table.dump(self.fabric.seconds()));
                }
                Order::End => self.ended = true,
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
        *egress = Some(Egress {
            shared: Arc::clone(&shared),
            outlet,
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
        self.throttled.retain(|&(_, port, pair)| !gone(port, pair));
    }

    fn adopt(&mut self, port: PortId) {
        let egress = self.fabric.egress.get_mut(usize::from(port));
        if let Some(Some(Egress {
            outlet: Outlet::Guest(guest),
            ..
        })) = egress
        {
            guest.adopt();
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
                Some(Command::Stop { index, done }) => {
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
        unblock(&vring, log);
        let (index, pair) = (vring.index, vring.index / 2);
        // Receive queues have even numbers, transmit queues odd ones (VIRTIO 1.3, 5.1.2).
        if index.is_multiple_of(2) {
            if let Outlet::Guest(guest) = &mut egress.outlet {
                let ring = RxRing::new(vring, log);
                if let Some(place) = guest.rings.get_mut(usize::from(pair)) {
                    *place = Some(ring);
                }
                guest.count_pairs();
            }
            return;
        }
        let tx = TxRing {
            header_len: header_len(vring.features).into(),
            ring: Ring::new(vring, log),
            waiting: false,
            hot: false,
            throttled: false,
        };
        if let Some(fd) = tx.ring.kick_fd()
            && let Err(error) = self.epoll.add(fd, token(KICK, port, pair))
            && let Some(held_back) = log.check()
        {
            warn!(
                port = ingress.shared.name,
                queue = index,
                held_back,
                "cannot wait on the front-end's kick descriptor: {error}"
            );
        }
        // What a disabled queue holds is for its driver to say again: the ring may be none any more.
        let runs = tx.ring.runs();
        if let Source::Guest { rings, .. } = &mut ingress.source
            && let Some(place) = rings.get_mut(usize::from(pair))
        {
            *place = Some(tx);
        }
        if runs {
            self.enqueue(port, pair.into());
        }
    }

    fn stop(&mut self, port: PortId, index: u16) -> Option<Box<Vring>> {
        let at = usize::from(port);
        let pair = usize::from(index / 2);
        if index.is_multiple_of(2) {
            let egress = self.fabric.egress.get_mut(at)?.as_mut()?;
            let Outlet::Guest(guest) = &mut egress.outlet else {
                return None;
            };
            let ring = guest.rings.get_mut(pair)?.take()?;
            guest.count_pairs();
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

/// A peer that hands over an eventfd that blocks must not stop the switch.
fn unblock(vring: &Vring, log: &LogLimit) {
    for file in [&vring.call, &vring.err].into_iter().flatten() {
        let unblocked = fcntl(file, FcntlArg::F_GETFL).and_then(|flags| {
            let flags = OFlag::from_bits_retain(flags) | OFlag::O_NONBLOCK;
            fcntl(file, FcntlArg::F_SETFL(flags))
        });
        if let Err(error) = unblocked
            && let Some(held_back) = log.check()
        {
            warn!(
                queue = vring.index,
                held_back, "cannot make the call descriptor non-blocking: {error}"
            );
        }
    }
}

/// A guest's transmit ring, if it is there.
fn tx_ring(ingress: &mut [Option<Ingress>], port: PortId, pair: usize) -> Option<&mut TxRing> {
    match &mut ingress.get_mut(usize::from(port))?.as_mut()?.source {
        Source::Guest { rings, .. } => rings.get_mut(pair)?.as_mut(),
        Source::Link { .. } => None,
    }
}

impl TxRing {
    /// Sends on what the driver has made available. Returns how it ended, and whether the driver wants an interrupt.
    fn serve(
        &mut self,
        port: PortId,
        shared: &PortShared,
        last: &mut (Key, u32),
        fabric: &mut Fabric,
    ) -> Result<(Turn, bool), RingError> {
        let Self {
            ring, header_len, ..
        } = self;
        // A disabled transmit queue is emptied without effect ("Ring states" of the vhost-user protocol), and so is one whose
        // cable is pulled.
        let serves = ring.vring.enabled && shared.is_up();
        let (mut session, buf, _) = ring.parts()?;
        session.disable_notifications()?;
        let mut left = BUDGET;
        let turn = loop {
            if left == 0 {
                break Turn::More;
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
                            break Turn::Throttled(wait);
                        }
                        match take_in(session.memory(), &chain, *header_len, shared) {
                            Ok(frame) => fabric.forward(port, shared, last, &frame),
                            Err(why) => refused(shared, why),
                        }
                    }
                    chain.head()
                }
                Ok(None) => break Turn::Idle,
                Err(PopError::Chain { head, .. }) => {
                    refused(shared, Refused::Malformed);
                    head
                }
                Err(PopError::Ring(error)) => {
                    // What was done before the driver broke its ring is returned all the same.
                    session.publish()?;
                    return Err(error);
                }
            };
            session.push_used(head, 0)?;
            left = left.saturating_sub(1);
        };
        let interrupted = session.publish()?;
        Ok((turn, interrupted))
    }
}

/// Reads the beginning of a frame from a guest's chain.
#[inline]
fn take_in<'a>(
    memory: &'a Memory,
    chain: &Chain<'a>,
    header_len: usize,
    shared: &PortShared,
) -> Result<Frame<'a>, Refused> {
    let len = usize::try_from(chain.readable_len()).unwrap_or(usize::MAX);
    if !(header_len + MIN_FRAME..=header_len + MAX_FRAME).contains(&len) {
        return Err(Refused::Malformed);
    }
    let mut first = [0; MAX_HEADER + PREFIX];
    let count = len.min(header_len + PREFIX);
    let first = first.get_mut(..count).ok_or(Refused::Malformed)?;
    read_segments(memory, chain.readable(), 0, first).map_err(|_| Refused::Malformed)?;
    let rest = Rest::Guest {
        memory,
        segments: chain.readable(),
        skip: count,
    };
    frame_of(first, header_len, rest, len - count, shared)
}

fn frame_of<'a>(
    first: &[u8],
    header_len: usize,
    rest: Rest<'a>,
    rest_len: usize,
    shared: &PortShared,
) -> Result<Frame<'a>, Refused> {
    let (header, frame) = first
        .split_at_checked(header_len)
        .ok_or(Refused::Malformed)?;
    let header = header.first_chunk().ok_or(Refused::Malformed)?;
    Frame::new(*header, frame, rest, rest_len, &shared.policy.vlans)
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
    last: &mut (Key, u32),
    fabric: &mut Fabric,
    bounce: &mut [u8],
    nothing: &mut IoList,
) -> Turn {
    for _ in 0..BUDGET {
        let Some(Some(Egress {
            outlet: Outlet::Link(outlet),
            ..
        })) = fabric.egress.get_mut(usize::from(port))
        else {
            return Turn::Idle;
        };
        let len = match outlet.link.receive(nothing, 0, MAX_HEADER, bounce) {
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
        let bytes = bounce.get(..len).unwrap_or_default();
        let count = len.min(MAX_HEADER + PREFIX);
        let (first, rest) = bytes.split_at_checked(count).unwrap_or((bytes, &[]));
        let frame = if bytes.len() < MAX_HEADER + MIN_FRAME {
            Err(Refused::Malformed)
        } else {
            frame_of(first, MAX_HEADER, Rest::Bytes(rest), rest.len(), shared)
        };
        match frame {
            Ok(frame) => fabric.forward(port, shared, last, &frame),
            Err(why) => refused(shared, why),
        }
    }
    Turn::More
}

fn bit(port: PortId) -> u64 {
    1_u64.checked_shl(port.into()).unwrap_or(0)
}

impl Fabric {
    fn seconds(&self) -> u32 {
        u32::try_from(self.now / 1_000_000_000).unwrap_or(u32::MAX)
    }

    /// Sends a frame on to where it belongs.
    #[inline]
    fn forward(
        &mut self,
        from: PortId,
        shared: &PortShared,
        last: &mut (Key, u32),
        frame: &Frame<'_>,
    ) {
        let counters = &shared.counters;
        let source = frame.source();
        if source[0] & 1 != 0 {
            counters.tx_dropped.add(1);
            return;
        }
        if frame.is_link_local() {
            counters.tx_undelivered.add(1);
            return;
        }
        if !shared.policy.allows(frame) {
            counters.tx_forged.add(1);
            return;
        }
        let now = self.seconds();
        let key = Key::new(frame.vlan, source);
        if *last != (key, now) {
            // Another port has it for itself.
            if self.owner(source).is_some_and(|owner| owner != from) {
                counters.tx_forged.add(1);
                return;
            }
            match self.table.learn(key, from, shared.quota, now) {
                Learnt::Known => *last = (key, now),
                Learnt::Full => counters.tx_unlearnt.add(1),
            }
        }
        counters.tx_packets.add(1);
        let len = u64::try_from(frame.len()).unwrap_or(u64::MAX);
        counters.tx_bytes.add(len);
        let to = if frame.is_to_group() {
            None
        } else {
            let destination = frame.destination();
            let known = self.table.look_up(Key::new(frame.vlan, destination), now);
            known.or_else(|| self.owner(destination))
        };
        let isolated = shared.policy.isolated;
        match to {
            Some(to) => {
                if to == from || !self.deliver(to, isolated, frame) {
                    counters.tx_undelivered.add(1);
                }
            }
            None if !shared.limits.take_flood(self.now) => counters.tx_storm.add(1),
            None => {
                counters.tx_flooded.add(1);
                for to in (0..MAX_PORTS).filter(|&to| to != from) {
                    self.deliver(to, isolated, frame);
                }
            }
        }
    }

    /// `false` if the port is not to get it.
    #[inline]
    fn deliver(&mut self, to: PortId, isolated: bool, frame: &Frame<'_>) -> bool {
        let Some(Some(egress)) = self.egress.get_mut(usize::from(to)) else {
            return false;
        };
        let Some(form) = egress.form(frame, isolated) else {
            return false;
        };
        self.touched |= bit(to);
        egress.send(frame, form, &mut self.room, self.now);
        true
    }

    fn owner(&self, address: [u8; 6]) -> Option<PortId> {
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
            addresses.map(move |address| (address.octets(), port))
        });
        self.owners = owners.collect();
        self.owners.sort_unstable();
        self.owners.dedup_by_key(|&mut (address, _)| address);
    }

    /// Ends a round.
    fn flush(&mut self) {
        let mut touched = std::mem::take(&mut self.touched);
        while touched != 0 {
            let port = touched.trailing_zeros();
            touched &= touched - 1;
            let at = usize::try_from(port).unwrap_or(usize::MAX);
            if let Some(Some(egress)) = self.egress.get_mut(at) {
                egress.flush();
            }
        }
    }
}

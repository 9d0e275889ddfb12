//! The worker of one queue pair: a thread that owns a queue of the link, a receive ring and a transmit ring.
//!
//! ```text
//!            ┌───────────── one turn ─────────────┐
//!  kick rx ─▶│ settings changed? go by them       │
//!  kick tx ─▶│ transmit: up to a budget, publish  │──▶ at most one interrupt for each ring
//!  link    ─▶│ receive:  up to a budget, publish  │
//!  command ─▶│ nothing left? spin, then sleep     │
//!            └────────────────────────────────────┘
//! ```
//!
//! While packets come fast, the worker looks for the next ones itself, for as long as its poll window says (`PollWindow`), and
//! the driver need not kick. Only before it sleeps it asks for kicks, and looks once more.
//!
//! ```text
//!  turn ──▶ spin, notifications off ──▶ arm: notifications on ──▶ look once more ──▶ sleep
//!    ▲          │ something came                                       │ something came   │ a descriptor stirred
//!    └──────────┴──────────────────────────────────────────────────────┴──────────────────┘
//! ```

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tracing::{debug, error, warn};

use super::counters::Counters;
use super::epoll_set::EpollSet;
use super::limits::{self, CardLimits, sleep_until};
use super::link::Link;
use super::rarp;
use super::rx::{self, Rx, RxEnd};
use super::settings::{Pairs, Settings, Shared};
use super::tx::Tx;
use crate::shell::{Command, Commands, LogLimit, PollLimits, PollWindow, Vring, now};

const COMMAND: u64 = 0;
const SETTINGS: u64 = 1;
const LINK: u64 = 2;
const KICK_RX: u64 = 3;
const KICK_TX: u64 = 4;
const TIMER_RX: u64 = 5;
const TIMER_TX: u64 = 6;

/// How often a ring without a kick descriptor is looked at, in milliseconds.
pub(super) const POLL_INTERVAL: i32 = 1;

/// Most turns between two looks at the descriptors.
const TURNS: u32 = 8;
/// Looks at the rings between two looks at the descriptors, while spinning: those cost a system call.
const LOOKS: u32 = 16;

/// Packets that the driver got, and their bytes.
fn received(counters: &Counters) -> (u64, u64) {
    (counters.rx_packets.get(), counters.rx_bytes.get())
}

/// One queue pair.
pub(super) struct PairWorker<L> {
    pair: u16,
    mtu: u16,
    link: L,
    commands: Commands,
    shared: Arc<Shared>,
    counters: Arc<Counters>,
    epoll: EpollSet,
    version: u64,
    settings: Arc<Settings>,
    rx: Option<Rx>,
    tx: Option<Tx>,
    /// The driver may have added receive buffers since the last turn found none.
    rx_fed: bool,
    /// The driver may have added packets since the last turn found none.
    tx_kicked: bool,
    /// The link may have packets.
    readable: bool,
    poll: PollWindow,
    limits: Arc<CardLimits>,
    /// Since when there has been nothing to do, and how much of that it spun.
    idle: Option<(Instant, Duration)>,
    /// It was told to end, or cannot go on.
    ended: bool,
    /// Of both rings.
    log: LogLimit,
}

impl<L: Link> PairWorker<L> {
    /// All that can fail about a worker fails here, before its thread begins.
    pub(super) fn new(
        pair: u16,
        mtu: u16,
        mut link: L,
        commands: Commands,
        shared: Arc<Shared>,
        counters: Arc<Counters>,
    ) -> io::Result<Self> {
        let epoll = EpollSet::new()?;
        epoll.add(commands.as_raw_fd(), COMMAND)?;
        link.watch(epoll.watcher(LINK))?;
        if let Some(waker) = shared.waker(pair) {
            epoll.add(waker, SETTINGS)?;
        }
        let (version, settings) = shared.latest();
        let mut worker = Self {
            pair,
            mtu,
            link,
            commands,
            shared,
            counters,
            epoll,
            version,
            settings,
            rx: None,
            tx: None,
            rx_fed: false,
            tx_kicked: false,
            readable: false,
            poll: PollWindow::new(PollLimits::default()),
            limits: Arc::new(CardLimits::new(&limits::NAMES)),
            idle: None,
            ended: false,
            log: LogLimit::default(),
        };
        worker.attach();
        Ok(worker)
    }

    /// Lets it spin before it sleeps.
    pub(super) fn spinning(mut self, limits: PollLimits) -> Self {
        self.poll = PollWindow::new(limits);
        self
    }

    /// Has it keep limits, which other pairs share.
    pub(super) fn limited(self, limits: Arc<CardLimits>) -> Self {
        Self { limits, ..self }
    }

    /// Serves until [`Command::Exit`].
    pub(super) fn run(mut self) {
        let mut timeout = 0;
        while !self.ended {
            self.look(timeout);
            timeout = self.work();
        }
        debug!(pair = self.pair, "worker ends: {}", self.counters);
    }

    /// Waits for the descriptors, in milliseconds, and does what they say. Returns whether any said something.
    fn look(&mut self, timeout: i32) -> bool {
        let events = match self.epoll.wait(timeout) {
            Ok(events) => events,
            Err(e) => {
                error!(
                    pair = self.pair,
                    "cannot wait for events, the queue pair is dead: {e}"
                );
                self.ended = true;
                return true;
            }
        };
        if timeout != 0 {
            self.counters.wakeups.add(1);
        }
        if let Some((since, spun)) = self.idle.take() {
            self.poll.slept(since.elapsed(), spun);
        }
        let mut any = false;
        for (token, what) in events {
            any = true;
            match token {
                COMMAND => self.ended |= !self.obey(),
                LINK => {
                    let ready = self.link.ready(what);
                    self.readable |= ready.readable;
                    if let (true, Some(tx)) = (ready.writable, &mut self.tx) {
                        // A packet may wait for this.
                        self.tx_kicked |= tx.is_full();
                        tx.writable();
                    }
                }
                KICK_RX => self.rx_fed = true,
                KICK_TX => self.tx_kicked = true,
                TIMER_RX => {
                    if let Some(rx) = &mut self.rx {
                        rx.ring.flush(&self.counters);
                    }
                }
                TIMER_TX => {
                    if let Some(tx) = &mut self.tx {
                        tx.ring.flush(&self.counters);
                    }
                }
                // SETTINGS, which are looked at each time.
                _ => {}
            }
        }
        if self.shared.is_newer(self.version) {
            let (_, asked) = self.settings.rarp;
            let left = self.settings.left;
            (self.version, self.settings) = self.shared.latest();
            match (left, self.settings.left) {
                (false, true) => self.link.leave(),
                (true, false) => {
                    self.link.go_on();
                    // Something may be there since.
                    self.readable = true;
                }
                _ => {}
            }
            self.attach();
            self.coalesce();
            if self.settings.rarp.1 != asked {
                self.send_rarp();
            }
            self.shared.adopt(self.pair, self.version);
        }
        any
    }

    /// Moves packets until there are none, or it is time to look at the descriptors. Returns how long to wait for those, in
    /// milliseconds.
    fn work(&mut self) -> i32 {
        if self.settings.left {
            return -1;
        }
        for _ in 0..TURNS {
            self.wake_throttled();
            if !self.turn() && !self.spin() {
                return if self.arm() { 0 } else { self.timeout() };
            }
            if self.ended {
                break;
            }
        }
        0
    }

    /// Until when limits make a ring wait, in nanoseconds.
    fn throttled(&self) -> Option<u64> {
        let rx = self.rx.as_ref().and_then(|rx| rx.throttled);
        let tx = self.tx.as_ref().and_then(|tx| tx.throttled);
        rx.into_iter().chain(tx).min()
    }

    /// Rings that have waited for long enough go on.
    fn wake_throttled(&mut self) {
        if self.throttled().is_none() {
            return;
        }
        let now = now();
        if let Some(rx) = &mut self.rx {
            rx.throttled.take_if(|until| *until <= now);
        }
        if let Some(tx) = &mut self.tx {
            self.tx_kicked |= tx.throttled.take_if(|until| *until <= now).is_some();
        }
    }

    /// How long to sleep, in milliseconds.
    fn timeout(&self) -> i32 {
        let wait = self.throttled().map(|until| sleep_until(until, now()));
        let look = self.polled().then_some(POLL_INTERVAL);
        wait.into_iter().chain(look).min().unwrap_or(-1)
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
                if self.waiting() {
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

    /// A ring has something for its next turn.
    fn waiting(&mut self) -> bool {
        if let Some(tx) = &mut self.tx {
            self.tx_kicked |= tx.waiting();
        }
        // Buffers are of use only if there is a packet.
        if let Some(rx) = &mut self.rx
            && self.readable
            && !self.rx_fed
            && rx.ring.waiting()
        {
            self.rx_fed = true;
            return true;
        }
        self.tx_kicked
    }

    /// Asks the driver to kick from now on, wherever it has nothing. Returns whether it had something meanwhile.
    fn arm(&mut self) -> bool {
        if let Some(tx) = &mut self.tx {
            self.tx_kicked |= tx.arm();
        }
        let rx = self.rx.as_mut().filter(|_| !self.rx_fed);
        let fed = rx.is_some_and(|rx| rx.ring.arm());
        self.rx_fed |= fed;
        self.tx_kicked || fed && self.readable
    }

    /// A ring has no kick descriptor.
    fn polled(&self) -> bool {
        self.rx.as_ref().is_some_and(|rx| rx.ring.polled())
            || self.tx.as_ref().is_some_and(|tx| tx.ring.polled())
    }

    /// One turn on both rings. Returns whether there is more to do at once.
    fn turn(&mut self) -> bool {
        let mut more = false;
        // A kick may be of a ring that was given back since.
        self.tx_kicked &= self.tx.is_some();
        if let Some(tx) = &mut self.tx
            && (self.tx_kicked || tx.ring.polled())
        {
            let link_up = self.settings.filter.link_up;
            self.tx_kicked = tx.turn(&mut self.link, link_up, &self.limits, &self.counters);
            more |= self.tx_kicked;
            tx.ring.turned(&self.counters);
        }
        let in_use = self.in_use();
        if let Some(rx) = &mut self.rx
            && in_use
            && self.readable
            && rx.throttled.is_none()
            && (self.rx_fed || rx.ring.polled())
        {
            let limits = self.limits.of_rx().then(|| self.limits.at(now()));
            let reserved = limits.map(|limits| limits.reserve_rx(rx::BUDGET));
            let reserved = match reserved.transpose() {
                Ok(reserved) => reserved,
                Err(until) => {
                    self.counters.rx_throttled.add(1);
                    rx.throttled = Some(until);
                    return more;
                }
            };
            let budget = reserved.map_or(rx::BUDGET, |reserved| reserved.packets);
            let before = received(&self.counters);
            match rx.turn(&mut self.link, &self.settings, budget, &self.counters) {
                RxEnd::More => more = true,
                RxEnd::Idle => self.readable = false,
                RxEnd::Starved => self.rx_fed = false,
            }
            if let Some((limits, reserved)) = limits.zip(reserved) {
                let (packets, bytes) = received(&self.counters);
                let packets = packets.wrapping_sub(before.0);
                limits.settle_rx(reserved, packets, bytes.wrapping_sub(before.1));
            }
            rx.ring.turned(&self.counters);
        }
        more
    }

    /// The driver receives on this pair.
    fn in_use(&self) -> bool {
        self.rx.as_ref().is_some_and(|rx| {
            let chosen = match self.settings.pairs {
                Pairs::Enabled => true,
                Pairs::First(count) => self.pair < count,
                Pairs::Fed => rx.fed(),
            };
            rx.ring.runs() && chosen
        })
    }

    /// Attaches the link's queue if the pair is in use, else detaches it, so that the kernel spreads packets over
    /// the pairs in use only. The first queue stays: an interface without any would lose its settings.
    fn attach(&mut self) {
        let attached = self.pair == 0 || self.in_use();
        if self.settings.frozen {
            return;
        }
        if attached != self.link.attached() {
            if let Err(error) = self.link.set_attached(attached)
                && let Some(held_back) = self.log.check()
            {
                warn!(
                    pair = self.pair,
                    attached, held_back, "cannot change the link's queue: {error}"
                );
            }
            self.readable = true;
        }
    }

    /// Makes the guest known to the network.
    fn send_rarp(&mut self) {
        let (mac, _) = self.settings.rarp;
        // One that cannot send is not known by its packets either.
        let Some(tx) = self.tx.as_ref().filter(|_| self.pair == 0) else {
            return;
        };
        if let Err(error) = rarp::send(&mut self.link, mac, tx.header_len())
            && let Some(held_back) = self.log.check()
        {
            warn!(
                held_back,
                "the guest cannot be made known to the network: {error}"
            );
        }
    }

    /// Has both rings hold their interrupts back as the driver said.
    fn coalesce(&mut self) {
        let rings = [
            self.rx.as_mut().map(|rx| &mut rx.ring),
            self.tx.as_mut().map(|tx| &mut tx.ring),
        ];
        for ring in rings.into_iter().flatten() {
            let limits = self.settings.coalescing_of(ring.vring.index);
            ring.coalesce(limits, &self.counters);
        }
    }

    /// Obeys all commands that wait. `false` if the thread is to end.
    fn obey(&mut self) -> bool {
        self.commands.acknowledge();
        while let Some(command) = self.commands.next() {
            match command {
                Command::Start(vring) => self.start(vring),
                Command::Stop { index, done, .. } => {
                    if let Some(vring) = self.stop(index) {
                        // The control thread waits; if it does not, the ring just ends here.
                        let _ = done.send(vring);
                    }
                }
                // Not for this device, whose drain is refused.
                Command::Pause { .. } | Command::Resume => {}
                Command::Exit => return false,
            }
        }
        true
    }

    fn start(&mut self, vring: Box<Vring>) {
        if vring.resumes()
            && let Err(error) = vring.notify_driver()
        {
            let (pair, queue) = (self.pair, vring.index);
            debug!(pair, queue, "the driver cannot be interrupted: {error}");
        }
        // Receive queues have even numbers, transmit queues odd ones (VIRTIO 1.3, 5.1.2).
        if vring.index.is_multiple_of(2) {
            let most = self.link.gives_at_once();
            let mut rx = Rx::new(vring, self.mtu, most, &self.log);
            self.wait_on(rx.ring.kick_fd(), KICK_RX);
            if !self.wait_on(rx.ring.timer_fd(), TIMER_RX) {
                rx.ring.without_timer();
            }
            self.rx = Some(rx);
            self.rx_fed = true;
            self.readable = true;
            self.attach();
        } else {
            let mut tx = Tx::new(vring, &self.log);
            self.wait_on(tx.ring.kick_fd(), KICK_TX);
            if !self.wait_on(tx.ring.timer_fd(), TIMER_TX) {
                tx.ring.without_timer();
            }
            // What a disabled queue holds is for its driver to say again: the ring may be none any more.
            self.tx_kicked = tx.ring.runs();
            self.tx = Some(tx);
        }
        self.coalesce();
    }

    /// Waits on a descriptor, if there is one. Returns whether it does, or need not.
    fn wait_on(&self, fd: Option<RawFd>, token: u64) -> bool {
        let added = fd.map_or(Ok(()), |fd| self.epoll.add(fd, token));
        if let Err(error) = &added
            && let Some(held_back) = self.log.check()
        {
            warn!(
                pair = self.pair,
                held_back, "cannot wait on the front-end's kick descriptor, or on a timer: {error}"
            );
        }
        added.is_ok()
    }

    fn stop(&mut self, index: u16) -> Option<Box<Vring>> {
        let vring = if index.is_multiple_of(2) {
            let mut rx = self.rx.take_if(|rx| rx.ring.vring.index == index)?;
            rx.ring.flush(&self.counters);
            self.attach();
            rx.into_vring(&self.counters)
        } else {
            let mut tx = self.tx.take_if(|tx| tx.ring.vring.index == index)?;
            tx.ring.flush(&self.counters);
            tx.into_vring()
        };
        if let Some(fd) = vring.kick_fd() {
            self.epoll.remove(fd);
        }
        debug!(pair = self.pair, queue = index, "{}", self.counters);
        Some(vring)
    }
}

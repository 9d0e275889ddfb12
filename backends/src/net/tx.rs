//! Transmit: from the driver's chains to the link; to a TAP with one system call for many packets, however long.

use std::io;

use ringside_rings::{ChainBuf, PopError, RingError, Session};
use tracing::{debug, warn};
use vm_memory::Permissions;

use super::counters::Counters;
use super::features::header_len;
use super::iov::IoList;
use super::limits::{CardLimits, Measure, Unlimited};
use super::link::Link;
use super::ring::Ring;
use crate::shell::{Chain as Causes, LogLimit, Memory, Vring, now};

/// Most packets of one turn, so that receiving gets its share.
const BUDGET: u32 = 128;

/// The longest frame that is passed on: an IPv6 packet with a payload of 65535 bytes, behind an Ethernet
/// header with two VLAN tags.
pub(super) const MAX_FRAME: usize = 22 + 40 + 65535;

/// The shortest frame: an Ethernet header.
pub(super) const MIN_FRAME: usize = 14;

/// The transmit queue of a pair.
pub(super) struct Tx {
    pub(super) ring: Ring,
    header_len: usize,
    row: Row,
    /// The link is full; go on when it is writable.
    full: bool,
    /// Until when limits make it wait, in nanoseconds.
    pub(super) throttled: Option<u64>,
    log: LogLimit,
}

/// How it goes on when what was taken is sent.
#[derive(PartialEq, Eq)]
enum Sent {
    Done,
    Full,
    /// A signal came first; it may be for the worker.
    Interrupted,
}

/// What there is to take.
enum Next {
    Taken,
    /// A packet for which there is no room in the list before others are gone.
    NoRoom,
    /// A packet that limits make wait until that time.
    Throttled(u64),
    Nothing,
    Broken(RingError),
}

/// A chain that was taken and is not returned yet.
struct Taken {
    head: u16,
    /// Bytes of a packet that is to be sent, header included; none: it only goes back.
    len: Option<u64>,
}

/// Chains that were taken, in their order.
#[derive(Default)]
struct Row {
    chains: Vec<Taken>,
    /// Of each packet among them, how many pieces of the list it is.
    pieces: Vec<usize>,
    /// What came of each.
    results: Vec<io::Result<()>>,
}

impl Row {
    /// It allocates here and never again.
    fn new() -> Self {
        let most = usize::try_from(BUDGET).unwrap_or_default();
        Self {
            chains: Vec::with_capacity(most),
            pieces: Vec::with_capacity(most),
            results: Vec::with_capacity(most),
        }
    }

    /// Takes the next chain.
    #[inline]
    fn take<L: Link, M: Measure>(
        &mut self,
        way: &Way<'_, L, M>,
        list: &mut IoList,
        session: &mut Session<'_, Memory>,
        buf: &mut ChainBuf,
    ) -> Next {
        let mut len = None;
        let head = match session.pop(buf) {
            Ok(Some(chain)) => {
                let bytes = chain.readable_len();
                if !way.enabled {
                } else if !way.takes(bytes) {
                    way.dropped(&"a packet too short or too long");
                } else if let Err(until) = way.limits.take_tx(bytes) {
                    session.rewind(1);
                    return Next::Throttled(until);
                } else if let Ok(pieces) = list.append(chain.readable(), Permissions::Read) {
                    self.pieces.push(pieces);
                    len = Some(bytes);
                } else {
                    way.limits.give_back_tx(1, bytes);
                    if list.len() > 0 {
                        session.rewind(1);
                        return Next::NoRoom;
                    }
                    way.dropped(&"a packet in too many pieces");
                }
                chain.head()
            }
            Ok(None) => return Next::Nothing,
            Err(PopError::Chain { head, error }) => {
                way.dropped(&Causes(&error));
                head
            }
            Err(PopError::Ring(error)) => return Next::Broken(error),
        };
        self.chains.push(Taken { head, len });
        Next::Taken
    }

    /// Sends the packets and returns the chains, as far as the link takes them: the others are available again.
    fn send<L: Link, M: Measure>(
        &mut self,
        way: &mut Way<'_, L, M>,
        list: &mut IoList,
        session: &mut Session<'_, Memory>,
    ) -> Result<Sent, RingError> {
        let Self {
            chains,
            pieces,
            results,
        } = self;
        if !pieces.is_empty() {
            way.counters.tx_calls.add(1);
            way.link.send_all(list, pieces, way.header_len, results);
            list.clear();
            pieces.clear();
        }
        let charged = M::LIMITS.then(|| sum(chains));
        let last = results.iter().rposition(Result::is_ok);
        let mut sent = Sent::Done;
        let (mut packets, mut bytes, mut lost) = (0, 0, (0, 0));
        let mut results = results.drain(..).enumerate();
        let mut left = u16::try_from(chains.len()).unwrap_or(u16::MAX);
        for Taken { head, len } in chains.drain(..) {
            match len.map(|len| (len, results.next())) {
                None => {}
                Some((len, Some((_, Ok(()))))) => {
                    packets += 1;
                    bytes += len;
                }
                // It can be offered again, in the same place of the row, unless one behind it has gone.
                Some((_, Some((number, Err(error)))))
                    if is_not_now(&error) && last.is_none_or(|last| last < number) =>
                {
                    sent = match error.kind() {
                        io::ErrorKind::WouldBlock => Sent::Full,
                        _ => Sent::Interrupted,
                    };
                }
                Some((len, Some((_, Err(error))))) => {
                    lost = (lost.0 + 1, lost.1 + len);
                    way.lost(&error);
                }
                Some((_, None)) => sent = Sent::Interrupted,
            }
            if sent != Sent::Done {
                session.rewind(left);
                break;
            }
            session.push_used(head, 0)?;
            left = left.saturating_sub(1);
        }
        if let Some((count, sum)) = charged {
            way.limits
                .give_back_tx(count - packets - lost.0, sum - bytes - lost.1);
        }
        way.counters.tx_packets.add(packets);
        way.counters.tx_bytes.add(bytes);
        Ok(sent)
    }
}

/// How many packets there are among chains, and their bytes.
fn sum(chains: &[Taken]) -> (u64, u64) {
    let lens = chains.iter().filter_map(|taken| taken.len);
    lens.fold((0, 0), |(count, sum), len| (count + 1, sum + len))
}

fn is_not_now(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
    )
}

/// Where packets go, and where it is said what became of them.
struct Way<'t, L, M> {
    link: &'t mut L,
    /// Packets are sent, and not only taken.
    enabled: bool,
    limits: M,
    header_len: usize,
    queue: u16,
    counters: &'t Counters,
    log: &'t LogLimit,
}

impl<L: Link, M> Way<'_, L, M> {
    /// Whether a packet is neither too short nor too long; its header counts.
    fn takes(&self, bytes: u64) -> bool {
        let frame = usize::try_from(bytes)
            .ok()
            .and_then(|len| len.checked_sub(self.header_len));
        frame.is_some_and(|len| (MIN_FRAME..=MAX_FRAME).contains(&len))
    }

    /// A header that the kernel does not like, no memory.
    #[cold]
    fn lost(&self, error: &io::Error) {
        match self.link.advice(error) {
            Some(advice) => self.dropped(&advice),
            None => self.dropped(error),
        }
    }

    #[cold]
    fn dropped(&self, why: &dyn std::fmt::Display) {
        self.counters.tx_dropped.add(1);
        if let Some(held_back) = self.log.check() {
            warn!(
                queue = self.queue,
                held_back, "packet from the driver dropped: {why}"
            );
        }
    }
}

impl Tx {
    /// Bytes of the header in front of each packet.
    pub(super) fn header_len(&self) -> usize {
        self.header_len
    }

    pub(super) fn new(vring: Box<Vring>, log: &LogLimit) -> Self {
        Self {
            header_len: header_len(vring.features).into(),
            ring: Ring::new(vring, log),
            row: Row::new(),
            full: false,
            throttled: None,
            log: log.clone(),
        }
    }

    /// The link takes packets again.
    pub(super) fn writable(&mut self) {
        self.full = false;
    }

    /// The link is full.
    pub(super) fn is_full(&self) -> bool {
        self.full
    }

    /// Whatever the driver does, nothing is sent before something else has happened.
    fn blocked(&self) -> bool {
        self.full || self.throttled.is_some()
    }

    /// There is something to send.
    pub(super) fn waiting(&mut self) -> bool {
        !self.blocked() && self.ring.waiting()
    }

    /// Asks the driver to kick, unless the link has to take packets first, or time has to pass. Returns whether there is something
    /// to send already.
    pub(super) fn arm(&mut self) -> bool {
        !self.blocked() && self.ring.arm()
    }

    /// Sends what the driver has made available, into nothing unless the cable is in (`link_up`). Returns whether there is more.
    pub(super) fn turn<L: Link>(
        &mut self,
        link: &mut L,
        link_up: bool,
        limits: &CardLimits,
        counters: &Counters,
    ) -> bool {
        if !self.ring.sound() || self.blocked() {
            return false;
        }
        let served = if limits.of_tx() {
            self.serve(link, link_up, limits.at(now()), counters)
        } else {
            self.serve(link, link_up, Unlimited, counters)
        };
        link.flush();
        match served {
            Ok((more, interrupt)) => {
                if interrupt {
                    self.ring.interrupt(counters);
                }
                more
            }
            Err(error) => {
                self.ring.fail(&error);
                false
            }
        }
    }

    fn serve<L: Link, M: Measure>(
        &mut self,
        link: &mut L,
        link_up: bool,
        limits: M,
        counters: &Counters,
    ) -> Result<(bool, bool), RingError> {
        let Self {
            ring,
            header_len,
            row,
            full,
            throttled,
            log,
        } = self;
        let at_once = usize::from(link.at_once());
        let mut way = Way {
            link,
            // A disabled transmit queue is emptied without effect ("Ring states" of the vhost-user protocol).
            enabled: ring.vring.enabled && link_up,
            limits,
            header_len: *header_len,
            queue: ring.vring.index,
            counters,
            log,
        };
        let (mut session, buf, list) = ring.parts()?;
        session.disable_notifications()?;
        let mut left = BUDGET;
        let (more, broken) = loop {
            let next = row.take(&way, list, &mut session, buf);
            if matches!(next, Next::Taken) {
                left = left.saturating_sub(1);
                if left > 0 && row.pieces.len() < at_once {
                    continue;
                }
            }
            match row.send(&mut way, list, &mut session)? {
                Sent::Done => {}
                Sent::Full => {
                    counters.tx_full.add(1);
                    *full = true;
                    break (false, None);
                }
                Sent::Interrupted => break (true, None),
            }
            match next {
                Next::NoRoom => {}
                Next::Taken if left > 0 => {}
                Next::Taken => break (true, None),
                Next::Throttled(until) => {
                    counters.tx_throttled.add(1);
                    *throttled = Some(until);
                    break (false, None);
                }
                Next::Nothing => break (false, None),
                Next::Broken(error) => break (false, Some(error)),
            }
        };
        // What was done before the driver broke its ring is returned all the same.
        let interrupt = session.publish()?;
        match broken {
            None => Ok((more, interrupt)),
            Some(error) => Err(error),
        }
    }

    /// Gives the ring back. Nothing is in flight between turns.
    pub(super) fn into_vring(self) -> Box<Vring> {
        debug!(queue = self.ring.vring.index, "transmit queue stops");
        self.ring.vring
    }
}

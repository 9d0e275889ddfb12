//! Receive: from the link straight into the driver's buffers; from a TAP with one system call for many packets while they are
//! short and come fast.
//!
//! How long a packet will be is not known before it is read. So buffers for the longest possible one are taken
//! from the ring beforehand, and the packet is read over all of them; those it did not need stay taken
//! for the next packet, and are given back when the ring stops.
//!
//! ```text
//!  ring ─pop─▶ posted buffers, in a row ◀──readv── TAP
//!              [head 7][head 2][head 9]…[spill]
//!               ╰─ packet ─╯  the next one begins here     spill: what did not fit, until the driver posts more
//! ```
//!
//! The kernel looks at each buffer of a read, whether it needs it or not. So as long as packets are short, only the first
//! buffers of the row are given to it; a long one then goes through the spill, and for a while all buffers are given.
//!
//! A packet that the filter refuses is overwritten by the next one.
//!
//! With one call for many, each has one buffer of the row, and a spill of its own. Buffers are used in order: those that were read
//! behind one that did not fit, or is for nobody, go through their spills.

use std::collections::VecDeque;
use std::io;

use ringside_rings::{PopError, RingError, Session};
use tracing::{debug, warn};
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6,
    VIRTIO_NET_F_GUEST_UFO, VIRTIO_NET_F_GUEST_USO4, VIRTIO_NET_F_GUEST_USO6,
    VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_MTU, VIRTIO_NET_HDR_F_NEEDS_CSUM, VIRTIO_NET_HDR_GSO_ECN,
    VIRTIO_NET_HDR_GSO_NONE, VIRTIO_NET_HDR_GSO_TCPV4, VIRTIO_NET_HDR_GSO_TCPV6,
    VIRTIO_NET_HDR_GSO_UDP, VIRTIO_NET_HDR_GSO_UDP_L4,
};
use vm_memory::Permissions;

use super::config::{TYPE_AT, is_longer_by_tag, longest_frame};
use super::counters::Counters;
use super::features::{GUEST_SEGMENTATION, guest_offloads, has, header_len};
use super::filter::{Filter, PEEK};
use super::hash::{self, Hashing, Report};
use super::iov::{AppendError, IoList};
use super::link::Link;
use super::ring::Ring;
use super::settings::Settings;
use super::tx::MAX_FRAME;
use crate::shell::{Chain as Causes, LogLimit, Memory, Vring};

/// Most packets of one turn, so that transmitting gets its share.
pub(super) const BUDGET: u32 = 128;

/// Bytes of buffers that are given to the kernel while packets are short: those of the usual MTU fit.
const SHORT: usize = 2048;
/// Packets after a long one that are read over all buffers.
const LONG_FOR: u32 = 256;

/// The longest header (VIRTIO 1.3, 5.1.6).
const MAX_HEADER: usize = 20;
/// Where `num_buffers` lies in it.
const NUM_BUFFERS: usize = 10;
/// Where `hash_value`, `hash_report` and padding lie in the longest one, eight bytes together (VIRTIO 1.3, 5.1.6).
const HASH_VALUE: usize = 12;
/// Bytes of a spill.
const SPILL: usize = MAX_HEADER + MAX_FRAME;
/// From so many packets on one call for all of them takes less time than one for each.
const MANY: u16 = 4;
/// Bytes of a frame beside its MTU: an Ethernet header with two VLAN tags.
const FRAME_OVERHEAD: usize = 22;

/// A buffer of the driver, taken from the ring.
#[derive(Debug, Clone, Copy)]
struct Posted {
    head: u16,
    /// Pieces of the list.
    pieces: usize,
    /// Bytes.
    len: usize,
}

/// A packet that did not fit the posted buffers, or the next ones of the row: its rest waits in a spill.
#[derive(Debug, Clone, Copy)]
struct Held {
    /// Number of the spill.
    spill: usize,
    len: usize,
    /// Bytes of it that are in the posted buffers.
    fitted: usize,
}

/// How a turn ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum RxEnd {
    /// The budget is used up.
    More,
    /// The link has no packet.
    Idle,
    /// The driver has no buffer.
    Starved,
}

/// The receive queue of a pair.
pub(super) struct Rx {
    pub(super) ring: Ring,
    /// Until when limits make it wait, in nanoseconds.
    pub(super) throttled: Option<u64>,
    fed: bool,
    state: State,
}

/// All of the receive queue but its ring.
struct State {
    queue: u16,
    offloads: u64,
    header_len: usize,
    mergeable: bool,
    /// Bytes of the longest packet that the driver gets, but for those that are to be cut, its header included.
    longest: usize,
    /// Bytes of buffers to have posted before a packet is read.
    wanted: usize,
    posted: VecDeque<Posted>,
    /// Bytes in `posted`.
    room: usize,
    /// In their order.
    held: VecDeque<Held>,
    /// Packets to come that may be long.
    long_for: u32,
    /// Most packets that the link gives at once.
    most: u16,
    /// Packets that it probably has.
    expected: u16,
    /// Each has [`SPILL`] bytes.
    spills: Box<[u8]>,
    /// Of a call for many packets: the pieces for each, and what came of it.
    pieces: Vec<usize>,
    results: Vec<io::Result<usize>>,
    log: LogLimit,
}

impl Rx {
    /// `mtu` is that of the link, in bytes, as far as it is known, and `most` how many packets it gives at once.
    pub(super) fn new(mut vring: Box<Vring>, mtu: u16, most: u16, log: &LogLimit) -> Self {
        // A ring that cannot be read breaks in its first turn.
        let waiting = vring.session().and_then(|mut session| session.available());
        let fed = vring.ring.has_begun() || waiting.is_ok_and(|count| count > 0);
        let features = vring.features;
        let mergeable = has(features, VIRTIO_NET_F_MRG_RXBUF);
        let offloads = guest_offloads(features);
        let header_len = usize::from(header_len(features));
        let frame = if offloads & GUEST_SEGMENTATION == 0 {
            usize::from(mtu) + FRAME_OVERHEAD
        } else {
            MAX_FRAME
        };
        let state = State {
            queue: vring.index,
            offloads,
            header_len,
            mergeable,
            longest: longest_frame(has(features, VIRTIO_NET_F_MTU).then_some(mtu))
                .saturating_add(header_len),
            // Without mergeable buffers a packet gets one, whatever its size.
            wanted: if mergeable { header_len + frame } else { 1 },
            posted: VecDeque::with_capacity(vring.ring.size().into()),
            room: 0,
            held: VecDeque::with_capacity(most.into()),
            long_for: 0,
            most,
            expected: 1,
            // The system gives pages of it when long packets come.
            spills: vec![0; SPILL * usize::from(most.max(1))].into(),
            pieces: Vec::with_capacity(most.into()),
            results: Vec::with_capacity(most.into()),
            log: log.clone(),
        };
        Self {
            ring: Ring::new(vring, log),
            throttled: None,
            fed,
            state,
        }
    }

    /// The driver had given it buffers when it was started.
    pub(super) fn fed(&self) -> bool {
        self.fed
    }

    /// Receives what the link has, up to `budget` packets.
    pub(super) fn turn<L: Link>(
        &mut self,
        link: &mut L,
        settings: &Settings,
        budget: u32,
        counters: &Counters,
    ) -> RxEnd {
        match self.serve(link, settings, budget, counters) {
            Ok((end, interrupt)) => {
                if interrupt {
                    self.ring.interrupt(counters);
                }
                end
            }
            Err(error) => {
                self.ring.fail(&error);
                RxEnd::Starved
            }
        }
    }

    // By itself: what surrounds it would take registers from it.
    #[inline(never)]
    fn serve<L: Link>(
        &mut self,
        link: &mut L,
        settings: &Settings,
        budget: u32,
        counters: &Counters,
    ) -> Result<(RxEnd, bool), RingError> {
        let Self { ring, state, .. } = self;
        let (mut session, buf, list) = ring.parts()?;
        session.disable_notifications()?;
        let mut left = budget;
        let end = loop {
            let wanted = state.wanted();
            let at_once = state.at_once(link, left);
            let mut full = false;
            while (state.room < wanted || state.posted.len() < at_once) && !full && left > 0 {
                match session.pop(buf) {
                    Ok(Some(chain)) => {
                        let usable = chain.readable().is_empty();
                        let appended =
                            usable.then(|| list.append(chain.writable(), Permissions::Write));
                        match appended {
                            Some(Ok(pieces)) => {
                                let head = chain.head();
                                let len =
                                    usize::try_from(chain.writable_len()).unwrap_or(usize::MAX);
                                state.posted.push_back(Posted { head, pieces, len });
                                state.room = state.room.saturating_add(len);
                            }
                            Some(Err(AppendError::TooManyPieces)) if list.len() > 0 => {
                                session.rewind(1);
                                full = true;
                            }
                            _ => {
                                state.dropped(
                                    counters,
                                    &"a buffer that is readable or in too many pieces",
                                );
                                session.push_used(chain.head(), 0)?;
                                left = left.saturating_sub(1);
                            }
                        }
                    }
                    Ok(None) => break,
                    Err(PopError::Chain { head, error }) => {
                        state.dropped(counters, &Causes(&error));
                        session.push_used(head, 0)?;
                        left = left.saturating_sub(1);
                    }
                    Err(PopError::Ring(error)) => {
                        // What was done before the driver broke its ring is returned all the same.
                        session.publish()?;
                        return Err(error);
                    }
                }
            }
            // A driver can make buffers that are none as fast as they are returned.
            if left == 0 {
                break RxEnd::More;
            }
            let len = match state.held.front().copied() {
                Some(held) if state.is_room(&held) => {
                    state.held.pop_front();
                    state.take_in(&held, list);
                    held.len
                }
                Some(_) if full || !state.mergeable && !state.posted.is_empty() => {
                    state.held.pop_front();
                    left = left.saturating_sub(1);
                    state.dropped(counters, &"a packet that does not fit the driver's buffers");
                    continue;
                }
                None if at_once > 1 && !state.posted.is_empty() => {
                    let more = state.read_all(link, list, at_once, counters);
                    let done = state.sort(&mut session, list, settings, counters)?;
                    left = left.saturating_sub(done);
                    if !more && state.held.is_empty() {
                        break RxEnd::Idle;
                    }
                    continue;
                }
                None if !state.posted.is_empty() => match state.read(link, list, counters) {
                    Ok(Some(len)) => len,
                    Ok(None) => {
                        left = left.saturating_sub(1);
                        continue;
                    }
                    Err(()) => break RxEnd::Idle,
                },
                _ => {
                    counters.rx_starved.add(1);
                    break RxEnd::Starved;
                }
            };
            left = left.saturating_sub(1);
            let buffers = state.accept(list, len, settings, counters);
            state.give(&mut session, list, len, buffers)?;
        };
        let interrupt = session.publish()?;
        Ok((end, interrupt))
    }

    /// Gives the ring back, and the buffers taken from it to the ring. Packets that were held are lost.
    pub(super) fn into_vring(mut self, counters: &Counters) -> Box<Vring> {
        let lost = self.state.held.len();
        counters
            .rx_dropped
            .add(u64::try_from(lost).unwrap_or(u64::MAX));
        if let Err(error) = self.unpost() {
            self.ring.fail(&error);
        }
        debug!(queue = self.ring.vring.index, "receive queue stops");
        self.ring.vring
    }

    fn unpost(&mut self) -> Result<(), RingError> {
        let Self { ring, state, .. } = self;
        let posted = u16::try_from(state.posted.len()).unwrap_or(u16::MAX);
        ring.parts()?.0.rewind(posted);
        // A malformed chain among them was returned out of order; those before it cannot be rewound.
        let stuck = usize::from(ring.vring.ring.in_flight());
        let (mut session, _, _) = ring.parts()?;
        for posted in state.posted.drain(..).take(stuck) {
            session.push_used(posted.head, 0)?;
        }
        session.publish()?;
        Ok(())
    }
}

impl State {
    /// Bytes of buffers to have posted before the next packet.
    fn wanted(&self) -> usize {
        match self.held.front() {
            Some(held) if self.mergeable => held.len,
            _ => self.wanted,
        }
    }

    /// How many packets to read with one call.
    fn at_once<L: Link>(&self, link: &L, left: u32) -> usize {
        if self.most <= 1 || self.expected < MANY || self.long_for > 0 || !self.held.is_empty() {
            return 1;
        }
        let most = self.expected.min(link.gives_at_once());
        usize::from(most).min(usize::try_from(left).unwrap_or(usize::MAX))
    }

    /// Of the packets that were asked for with one call, the link had so many.
    fn expect(&mut self, read: usize) {
        let more = read >= self.pieces.len();
        let expected = if more { read.saturating_mul(2) } else { read };
        self.expected = u16::try_from(expected).unwrap_or(u16::MAX).max(1);
    }

    /// There are buffers for a packet that is held.
    fn is_room(&self, held: &Held) -> bool {
        if self.mergeable {
            self.room >= held.len
        } else {
            self.fits(held.len)
        }
    }

    /// A packet fits the next buffer.
    fn fits(&self, len: usize) -> bool {
        len >= self.header_len && self.posted.front().is_some_and(|first| len <= first.len)
    }

    /// Puts the rest of a packet that was held into the buffers.
    fn take_in(&self, held: &Held, list: &IoList) {
        let spill = self.spills.chunks_exact(SPILL).nth(held.spill);
        let rest = held.len.saturating_sub(held.fitted);
        let rest = spill.and_then(|spill| spill.get(..rest));
        list.copy_in(held.fitted, rest.unwrap_or_default());
    }

    /// Holds packet `number` of a call, which has read `len` bytes; `used` buffers of that call are not in the row any more.
    /// `false` if it cannot be: it is lost.
    #[inline(never)]
    fn hold(&mut self, list: &IoList, number: usize, used: usize, len: usize) -> bool {
        let before = number.saturating_sub(used);
        let Some(buffer) = self.posted.get(before).copied() else {
            return false;
        };
        let fitted = len.min(buffer.len);
        let rest = len.saturating_sub(fitted);
        // Without mergeable buffers it may still fit another buffer than its own.
        let alone = before == 0 && !self.mergeable;
        if len < self.header_len || rest >= SPILL || rest > 0 && alone {
            return false;
        }
        if rest > 0 && self.mergeable {
            self.long_for = LONG_FOR;
        }
        let mut held = Held {
            spill: number,
            len,
            fitted,
        };
        if before > 0 || !self.held.is_empty() {
            // Its buffer is for a packet before it.
            let places = self.posted.iter().take(before);
            let offset = places.fold(0_usize, |sum, posted| sum.saturating_add(posted.len));
            let spill = self.spills.chunks_exact_mut(SPILL).nth(number);
            let Some(spill) = spill.filter(|spill| len <= spill.len()) else {
                return false;
            };
            spill.copy_within(..rest, fitted);
            let Some(start) = spill.get_mut(..fitted) else {
                return false;
            };
            list.copy_out(offset, start);
            held.fitted = 0;
        }
        self.held.push_back(held);
        true
    }

    /// Returns the first `buffers` buffers of the row with a packet of `len` bytes.
    // As of `accept`.
    #[inline(always)]
    fn give(
        &mut self,
        session: &mut Session<'_, Memory>,
        list: &mut IoList,
        len: usize,
        buffers: usize,
    ) -> Result<(), RingError> {
        if buffers == 1 {
            return self.give_one(session, list, len).map(drop);
        }
        self.give_several(session, list, len, buffers)
    }

    /// The same of none or of more than one.
    #[inline(never)]
    fn give_several(
        &mut self,
        session: &mut Session<'_, Memory>,
        list: &mut IoList,
        len: usize,
        buffers: usize,
    ) -> Result<(), RingError> {
        let mut rest = len;
        for _ in 0..buffers {
            rest = self.give_one(session, list, rest)?;
        }
        Ok(())
    }

    /// Returns the first buffer of the row with the first of `len` bytes; gives the number of those that it has no room for.
    // As of `accept`.
    #[inline(always)]
    fn give_one(
        &mut self,
        session: &mut Session<'_, Memory>,
        list: &mut IoList,
        len: usize,
    ) -> Result<usize, RingError> {
        let Some(posted) = self.posted.pop_front() else {
            return Ok(0);
        };
        let used = len.min(posted.len);
        session.push_used(posted.head, u32::try_from(used).unwrap_or(u32::MAX))?;
        list.consume(posted.pieces);
        self.room = self.room.saturating_sub(posted.len);
        Ok(len.saturating_sub(used))
    }

    /// Returns the packets of a call that stand where they belong, and holds the others. Returns how much of the turn that takes.
    fn sort(
        &mut self,
        session: &mut Session<'_, Memory>,
        list: &mut IoList,
        settings: &Settings,
        counters: &Counters,
    ) -> Result<u32, RingError> {
        let (mut read, mut used, mut done) = (0, 0, 0_u32);
        let mut results = std::mem::take(&mut self.results);
        for (number, result) in results.drain(..).enumerate() {
            let Ok(len) = result else { continue };
            read += 1;
            if number == used && self.fits(len) {
                let buffers = self.accept(list, len, settings, counters);
                self.give(session, list, len, buffers)?;
                used += buffers;
            } else if self.hold(list, number, used, len) {
                continue;
            } else {
                self.dropped(counters, &"a packet without a header, or too long");
            }
            done = done.saturating_add(1);
        }
        self.results = results;
        self.expect(read);
        Ok(if read == 0 { 1 } else { done })
    }

    /// Reads up to `count` packets, each into one buffer. Returns whether there may be more.
    fn read_all<L: Link>(
        &mut self,
        link: &mut L,
        list: &mut IoList,
        count: usize,
        counters: &Counters,
    ) -> bool {
        counters.rx_calls.add(1);
        self.pieces.clear();
        let posted = self.posted.iter().take(count);
        self.pieces.extend(posted.map(|posted| posted.pieces));
        let spills = self.spills.chunks_exact_mut(SPILL);
        link.receive_all(list, &self.pieces, spills, &mut self.results);
        // Each error is told; the last result says whether there may be more.
        let mut more = true;
        for result in &self.results {
            let error = result.as_ref().err();
            more = error.is_none_or(|error| self.may_go_on(error));
        }
        more
    }

    /// Whether to read again after an error.
    fn may_go_on(&self, error: &io::Error) -> bool {
        match error.kind() {
            io::ErrorKind::WouldBlock => false,
            io::ErrorKind::Interrupted => true,
            _ => {
                if let Some(held_back) = self.log.check() {
                    warn!(
                        queue = self.queue,
                        held_back, "cannot receive from the link: {error}"
                    );
                }
                false
            }
        }
    }

    /// How many pieces of the row are given to the link for a packet, and their bytes.
    // As of `accept`.
    #[inline(always)]
    fn given(&mut self, list: &IoList) -> (usize, usize) {
        if self.long_for > 0 {
            self.long_for = self.long_for.saturating_sub(1);
            return (list.len(), self.room);
        }
        match self.posted.front() {
            Some(first) if first.len >= SHORT => (first.pieces, first.len),
            _ => self.given_several(),
        }
    }

    /// The same of buffers that are short, too.
    fn given_several(&self) -> (usize, usize) {
        let (mut pieces, mut room) = (0_usize, 0_usize);
        for posted in &self.posted {
            pieces = pieces.saturating_add(posted.pieces);
            room = room.saturating_add(posted.len);
            if room >= SHORT {
                break;
            }
        }
        (pieces, room)
    }

    /// Reads one packet. `None` if it was lost, an error if there is none.
    // As of `accept`.
    #[inline(always)]
    fn read<L: Link>(
        &mut self,
        link: &mut L,
        list: &mut IoList,
        counters: &Counters,
    ) -> Result<Option<usize>, ()> {
        let (pieces, room) = if self.mergeable {
            self.given(list)
        } else {
            self.posted.front().map_or((0, 0), |p| (p.pieces, p.len))
        };
        counters.rx_calls.add(1);
        let spill = self.spills.get_mut(..SPILL).unwrap_or_default();
        let received = link.receive(list, pieces, self.header_len, spill);
        self.expected = match received {
            Ok(_) => self.expected.saturating_mul(2),
            Err(_) => 1,
        };
        match received {
            Ok(len) if len < self.header_len => {
                self.dropped(counters, &"a packet shorter than its header");
                Ok(None)
            }
            Ok(len) if len <= room => {
                // One that fits the first buffer needs no others beside it.
                if len > SHORT && !self.fits(len) {
                    self.long_for = LONG_FOR;
                }
                Ok(Some(len))
            }
            // The spill was full as well, so maybe not all of it is here.
            Ok(len) if !self.mergeable || len >= room.saturating_add(SPILL) => {
                self.dropped(counters, &"a packet longer than the driver's buffers");
                Ok(None)
            }
            Ok(len) => {
                self.long_for = LONG_FOR;
                self.held.push_back(Held {
                    spill: 0,
                    len,
                    fitted: room,
                });
                Ok(None)
            }
            Err(error) if self.may_go_on(&error) => Ok(None),
            Err(_) => Err(()),
        }
    }

    /// Decides on the packet in the first `len` bytes of the list and completes its header. Returns how many of
    /// the posted buffers it takes: 0 if it is not for the driver.
    // A call costs more than the common way through it. What few packets need is out of line: it would take registers from the others.
    #[inline(always)]
    fn accept(
        &mut self,
        list: &IoList,
        len: usize,
        settings: &Settings,
        counters: &Counters,
    ) -> usize {
        let Some([flags, gso]) = list.first_two().filter(|_| len >= 2) else {
            return 0;
        };
        let filter = &settings.filter;
        let passes = filter.passes_any();
        if !passes.unwrap_or_else(|| self.is_listed(list, len, filter)) {
            counters.rx_filtered.add(1);
            return 0;
        }
        // The link may hold packets from before the driver chose its offloads.
        if !self.readable(flags, gso) {
            self.dropped(
                counters,
                &"a packet with an offload that the driver did not accept",
            );
            return 0;
        }
        if len > self.longest && self.exceeds(list, len, gso) {
            self.dropped(counters, &"a packet longer than the MTU");
            return 0;
        }
        // Without the feature the flags are 0 (VIRTIO 1.3, 5.1.6.4.1).
        if flags != 0 && !has(self.offloads, VIRTIO_NET_F_GUEST_CSUM) {
            list.copy_in(0, &[0]);
        }
        let buffers = match self.posted.front() {
            Some(first) if len <= first.len => 1,
            _ => self.count_buffers(len),
        };
        // It is 1 without mergeable buffers (VIRTIO 1.3, 5.1.6.4.1). The kernel leaves the field alone.
        if self.header_len > NUM_BUFFERS {
            list.put_u16(NUM_BUFFERS, buffers);
        }
        if self.header_len > HASH_VALUE {
            self.report_hash(list, len, &settings.hashing);
        }
        counters.rx_packets.add(1);
        counters
            .rx_bytes
            .add(u64::try_from(len).unwrap_or(u64::MAX));
        buffers.into()
    }

    /// The filter lets the packet in the first `len` bytes of the list pass.
    #[inline(never)]
    fn is_listed(&self, list: &IoList, len: usize, filter: &Filter) -> bool {
        let mut start = [0; PEEK];
        let seen = len.saturating_sub(self.header_len).min(PEEK);
        let seen = start.get_mut(..seen).unwrap_or_default();
        list.copy_out(self.header_len, seen) && filter.passes(seen)
    }

    /// The driver must not get the packet in the first `len` bytes of the list, which are more than its MTU (VIRTIO 1.3, 5.1.4.1).
    #[inline(never)]
    fn exceeds(&self, list: &IoList, len: usize, gso: u8) -> bool {
        let mut ethertype = [0; 2];
        list.copy_out(self.header_len.saturating_add(TYPE_AT), &mut ethertype);
        u32::from(gso) & !VIRTIO_NET_HDR_GSO_ECN == VIRTIO_NET_HDR_GSO_NONE
            && !is_longer_by_tag(len, ethertype, self.longest)
    }

    /// How many of the posted buffers `len` bytes take.
    #[inline(never)]
    fn count_buffers(&self, len: usize) -> u16 {
        let mut buffers: u16 = 0;
        let mut rest = len;
        for posted in &self.posted {
            buffers = buffers.saturating_add(1);
            match rest.checked_sub(posted.len) {
                Some(left) if left > 0 => rest = left,
                _ => break,
            }
        }
        buffers
    }

    /// Writes the hash of the packet in the first `len` bytes of the list into its header.
    #[inline(never)]
    fn report_hash(&self, list: &IoList, len: usize, hashing: &Hashing) {
        let mut start = [0; hash::PEEK];
        let seen = len.saturating_sub(self.header_len).min(hash::PEEK);
        let seen = start.get_mut(..seen).unwrap_or_default();
        let report = if list.copy_out(self.header_len, seen) {
            hashing.report(seen)
        } else {
            Report::NONE
        };
        list.copy_in(HASH_VALUE, &report.to_le_bytes());
    }

    /// The driver accepted what the header asks of it (VIRTIO 1.3, 5.1.6.4.1).
    #[inline]
    fn readable(&self, flags: u8, gso: u8) -> bool {
        flags == 0 && u32::from(gso) == VIRTIO_NET_HDR_GSO_NONE || self.asked_for(flags, gso)
    }

    /// The same of a header that asks for something.
    #[inline(never)]
    fn asked_for(&self, flags: u8, gso: u8) -> bool {
        let accepted = |feature| has(self.offloads, feature);
        let needs_csum = u32::from(flags) & VIRTIO_NET_HDR_F_NEEDS_CSUM != 0;
        let segmented = match u32::from(gso) & !VIRTIO_NET_HDR_GSO_ECN {
            VIRTIO_NET_HDR_GSO_NONE => true,
            VIRTIO_NET_HDR_GSO_TCPV4 => accepted(VIRTIO_NET_F_GUEST_TSO4),
            VIRTIO_NET_HDR_GSO_TCPV6 => accepted(VIRTIO_NET_F_GUEST_TSO6),
            VIRTIO_NET_HDR_GSO_UDP => accepted(VIRTIO_NET_F_GUEST_UFO),
            VIRTIO_NET_HDR_GSO_UDP_L4 => {
                accepted(VIRTIO_NET_F_GUEST_USO4) || accepted(VIRTIO_NET_F_GUEST_USO6)
            }
            _ => false,
        };
        segmented && (!needs_csum || accepted(VIRTIO_NET_F_GUEST_CSUM))
    }

    #[cold]
    fn dropped(&mut self, counters: &Counters, why: &dyn std::fmt::Display) {
        counters.rx_dropped.add(1);
        if let Some(held_back) = self.log.check() {
            warn!(queue = self.queue, held_back, "not received: {why}");
        }
    }
}

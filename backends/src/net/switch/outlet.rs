//! Where frames leave the switch: a guest's receive rings, or a link.
//!
//! A frame is copied once, into as many buffers as it takes; one that does not find enough of them is dropped and the buffers
//! are put back, so that nothing is ever waited for and a guest that takes no packets holds up nobody.

use std::io;
use std::sync::Arc;

use ringside_rings::{Chain, ChainBuf, PopError, RingError, Segment, Session, write_segments};
use tracing::{debug, warn};
use virtio_bindings::virtio_net::VIRTIO_NET_F_MRG_RXBUF;
use vm_memory::{GuestAddress, Permissions, VolatileSlice};

use super::super::coalesce::Coalescing;
use super::super::config::{TYPE_AT, is_longer_by_tag};
use super::super::features::{has, header_len};
use super::super::filter::Filter;
use super::super::hash::Hashing;
use super::super::iov::IoList;
use super::super::link::{Link, Recorder};
use super::super::ring::Ring;
use super::super::settings::{Pairs, Settings, Shared};
use super::frame::{Beginning, Bytes, FRONT, Frame, HEADER, Header, LONGEST_HEADER, Packet};
use super::offload::{self, Room};
use super::policy::Form;
use super::shared::PortShared;
use super::signal::Signals;
use super::window::Window;
use crate::net::tx::MAX_FRAME;
use crate::shell::{LogLimit, Memory, Vring, prefetch_to_write};

/// Where `num_buffers` lies in a header (VIRTIO 1.3, 5.1.6).
const NUM_BUFFERS: u64 = 10;

/// Most buffers of one packet: with fewer bytes in each than this allows for 64 KiB, long packets are dropped.
const MAX_BUFFERS: usize = 1024;

/// What came of a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Put {
    Done,
    /// There are not enough buffers.
    Starved,
    /// It does not fit those there are.
    Unfit,
}

/// A guest's receive ring.
pub(super) struct RxRing {
    pub(super) ring: Ring,
    /// The first chain of a packet: its header is completed when all others are known.
    first: ChainBuf,
    /// Chains of the packet at hand, with the bytes in each.
    heads: Vec<(u16, u32)>,
    header_len: usize,
    mergeable: bool,
    /// It was given packets that are not published yet.
    dirty: bool,
    /// Packets that it was given.
    pub(super) done: u64,
}

impl RxRing {
    pub(super) fn new(vring: Box<Vring>, log: &LogLimit) -> Self {
        let features = vring.features;
        Self {
            first: ChainBuf::new(vring.ring.size()),
            heads: Vec::with_capacity(MAX_BUFFERS),
            header_len: header_len(features).into(),
            mergeable: has(features, VIRTIO_NET_F_MRG_RXBUF),
            dirty: false,
            done: 0,
            ring: Ring::new(vring, log),
        }
    }

    /// Opens it for packets; `memory` is its memory.
    fn open<'a>(
        &'a mut self,
        memory: &'a Memory,
        hashing: &'a Hashing,
    ) -> Result<Opened<'a>, RingError> {
        let Self {
            ring,
            first,
            heads,
            header_len,
            mergeable,
            dirty,
            done: _,
        } = self;
        let (mut session, other, _) = ring.parts()?;
        session.disable_notifications()?;
        Ok(Opened {
            session,
            window: Window::new(memory),
            first,
            other,
            heads,
            header_len: *header_len,
            hashing,
            mergeable: *mergeable,
            dirty,
        })
    }

    /// It is served no more; who is to know of that is told as the round ends.
    fn fail(&mut self, error: &RingError) {
        self.ring.give_up(error);
        self.dirty = true;
    }

    /// Shows the driver what it was given, and interrupts it if it wants that.
    fn publish(&mut self, port: &PortShared, signals: &Signals) {
        if !std::mem::take(&mut self.dirty) {
            return;
        }
        if !self.ring.sound() {
            tell_of_failure(&self.ring, port, signals);
            return;
        }
        let published = self
            .ring
            .parts()
            .and_then(|(mut session, ..)| session.publish());
        let done = self.done;
        match published {
            Ok(wanted) => {
                if self.ring.due(wanted, done) {
                    interrupt(&self.ring, port, signals);
                }
            }
            Err(error) => {
                self.ring.give_up(&error);
                tell_of_failure(&self.ring, port, signals);
            }
        }
    }
}

/// A receive ring for as many packets as there are for it in a row.
struct Opened<'a> {
    session: Session<'a, Memory>,
    window: Window<'a>,
    first: &'a mut ChainBuf,
    /// Chains of a packet behind the first one.
    other: &'a mut ChainBuf,
    heads: &'a mut Vec<(u16, u32)>,
    header_len: usize,
    /// What is reported, with a header that has room for it.
    hashing: &'a Hashing,
    mergeable: bool,
    dirty: &'a mut bool,
}

impl Opened<'_> {
    #[inline]
    fn put(&mut self, packet: &Packet<'_>) -> Result<Put, RingError> {
        let chain = match self.session.pop(self.first) {
            Ok(Some(chain)) => chain,
            Ok(None) => return Ok(Put::Starved),
            Err(PopError::Chain { head, .. }) => return self.put_back(head),
            Err(PopError::Ring(error)) => return Err(self.broke(error)),
        };
        let head = chain.head();
        // A short packet, and most buffers.
        if let Some(whole) = packet.whole(self.header_len)
            && let ([], [segment]) = (chain.readable(), chain.writable())
            && let Ok(len) = u32::try_from(whole.len())
            && len <= segment.len
            && let Some(place) = self.window.piece(segment.addr, whole.len())
        {
            place.copy_from(whole);
            self.session.push_used(head, len)?;
            *self.dirty = true;
            return Ok(Put::Done);
        }
        let total = packet.len(self.header_len);
        if let [segment, ..] = chain.writable()
            && let Ok(len) = usize::try_from(segment.len)
            && let Some(place) = self.window.piece(segment.addr, total.min(len))
        {
            prefetch_to_write(place.ptr_guard_mut().as_ptr(), place.len());
        }
        let mut room = [0; LONGEST_HEADER];
        let mut bytes = if self.header_len > HEADER {
            packet.bytes_with(self.hashing.report(packet.start()), &mut room)
        } else {
            packet.bytes(self.header_len)
        };
        // Without mergeable buffers a packet gets one.
        let least = if self.mergeable { 0 } else { total };
        match fill(
            &mut self.window,
            &chain,
            self.header_len,
            least,
            total,
            &mut bytes,
        ) {
            Filled::Bytes(count) if count == total => {
                let len = u32::try_from(count).unwrap_or(u32::MAX);
                self.session.push_used(head, len)?;
                *self.dirty = true;
                Ok(Put::Done)
            }
            Filled::Bytes(count) => self.put_rest(head, count, total, bytes),
            Filled::TooShort => {
                self.session.rewind(1);
                Ok(Put::Unfit)
            }
            Filled::Unusable => self.put_back(head),
        }
    }

    /// Fills further chains with what does not fit into the first one, `head`, which has `count` bytes of `total`.
    fn put_rest(
        &mut self,
        head: u16,
        count: usize,
        total: usize,
        mut bytes: Bytes<'_>,
    ) -> Result<Put, RingError> {
        let Self {
            session,
            window,
            first,
            other,
            heads,
            header_len,
            dirty,
            ..
        } = self;
        let length = |count: usize| u32::try_from(count).unwrap_or(u32::MAX);
        heads.clear();
        heads.push((head, length(count)));
        let mut left = total.saturating_sub(count);
        let put = loop {
            let unusable = match session.pop(other) {
                Ok(Some(chain)) => {
                    if chain.readable().is_empty() {
                        if heads.len() == MAX_BUFFERS {
                            session.rewind(1);
                            break Put::Unfit;
                        }
                        let room = usize::try_from(chain.writable_len()).unwrap_or(usize::MAX);
                        let count = left.min(room);
                        if window.each(chain.writable(), count, |place| bytes.copy_to(place)) {
                            left = left.saturating_sub(count);
                            heads.push((chain.head(), length(count)));
                            if left == 0 {
                                break Put::Done;
                            }
                            continue;
                        }
                    }
                    chain.head()
                }
                Ok(None) => break Put::Starved,
                Err(PopError::Chain { head, .. }) => head,
                Err(PopError::Ring(error)) => return Err(self.broke(error)),
            };
            return self.put_back(unusable);
        };
        if put != Put::Done {
            session.rewind(u16::try_from(heads.len()).unwrap_or(u16::MAX));
            heads.clear();
            return Ok(put);
        }
        if *header_len >= HEADER {
            let count = u16::try_from(heads.len()).unwrap_or(u16::MAX);
            let count = count.to_le_bytes();
            // It was written there a moment ago.
            let _ = write_segments(session.memory(), first.writable(), NUM_BUFFERS, &count);
        }
        for (head, len) in heads.drain(..) {
            session.push_used(head, len)?;
        }
        **dirty = true;
        Ok(Put::Done)
    }

    /// Buffers before one that is none cannot be put back: all of them go back empty, and the packet is lost.
    #[cold]
    fn put_back(&mut self, unusable: u16) -> Result<Put, RingError> {
        for (head, _) in self.heads.drain(..) {
            self.session.push_used(head, 0)?;
        }
        self.session.push_used(unusable, 0)?;
        *self.dirty = true;
        Ok(Put::Unfit)
    }

    /// What was done before the driver broke its ring is returned all the same.
    #[cold]
    fn broke(&mut self, error: RingError) -> RingError {
        self.session.publish().err().unwrap_or(error)
    }
}

/// What came of the first buffer of a packet.
enum Filled {
    /// It has so many bytes of it.
    Bytes(usize),
    /// It is too short for a packet that gets no other.
    TooShort,
    /// It is no buffer, or too short for a header.
    Unusable,
}

/// Copies a packet of `total` bytes into a chain as far as it goes, which is to be at least `least` bytes.
#[inline(never)]
fn fill(
    window: &mut Window<'_>,
    chain: &Chain<'_>,
    header_len: usize,
    least: usize,
    total: usize,
    bytes: &mut Bytes<'_>,
) -> Filled {
    let room = usize::try_from(chain.writable_len()).unwrap_or(usize::MAX);
    if !chain.readable().is_empty() || room < header_len {
        return Filled::Unusable;
    }
    if room < least {
        return Filled::TooShort;
    }
    let count = total.min(room);
    match window.each(chain.writable(), count, |place| bytes.copy_to(place)) {
        true => Filled::Bytes(count),
        false => Filled::Unusable,
    }
}

/// Interrupts a driver, unless it polls.
pub(super) fn interrupt(ring: &Ring, port: &PortShared, signals: &Signals) {
    let Some(call) = &ring.vring.call else {
        return;
    };
    port.counters.interrupts.add(1);
    if let Err(error) = signals.signal(call)
        && let Some(held_back) = port.log.check()
    {
        warn!(
            port = port.name,
            queue = ring.vring.index,
            held_back,
            "the driver cannot be interrupted: {error}"
        );
    }
}

/// Tells a front-end and its driver of a ring that is broken.
#[cold]
pub(super) fn tell_of_failure(ring: &Ring, port: &PortShared, signals: &Signals) {
    if let Some(err) = &ring.vring.err
        && let Err(error) = signals.signal(err)
    {
        debug!(
            port = port.name,
            "the front-end cannot be told of it: {error}"
        );
    }
    // Some chains may have been returned in this turn; an interrupt too many does no harm.
    interrupt(ring, port, signals);
}

/// A guest's side of a port, as frames for it see it.
pub(super) struct GuestOutlet {
    /// By queue pair.
    pub(super) rings: Vec<Option<RxRing>>,
    shared: Arc<Shared>,
    version: u64,
    settings: Arc<Settings>,
    /// Queue pairs that frames are spread over, by number.
    chosen: Vec<usize>,
}

impl GuestOutlet {
    pub(super) fn new(shared: Arc<Shared>, pairs: u16) -> Self {
        let (version, settings) = shared.latest();
        Self {
            rings: (0..pairs).map(|_| None).collect(),
            shared,
            version,
            settings,
            chosen: Vec::with_capacity(pairs.into()),
        }
    }

    /// Goes by what the driver has set, if that is new. Returns whether it is.
    pub(super) fn adopt(&mut self) -> bool {
        if self.shared.is_newer(self.version) {
            (self.version, self.settings) = self.shared.latest();
            self.choose_pairs();
            true
        } else {
            false
        }
    }

    /// It goes by what it has seen last.
    pub(super) fn adopted(&self) {
        self.shared.adopt(0, self.version);
    }

    /// How interrupts of a queue are held back.
    pub(super) fn coalescing_of(&self, queue: u16) -> Coalescing {
        self.settings.coalescing_of(queue)
    }

    /// Chooses the pairs that frames are spread over: those that run, as far as the driver uses them.
    pub(super) fn choose_pairs(&mut self) {
        let used = match self.settings.pairs {
            Pairs::First(count) => count.into(),
            Pairs::Enabled | Pairs::Fed => self.rings.len(),
        };
        let rings = self.rings.iter().take(used).enumerate();
        let running = rings.filter(|(_, ring)| ring.as_ref().is_some_and(|it| it.ring.runs()));
        self.chosen.clear();
        // There is room for all.
        self.chosen.extend(running.map(|(pair, _)| pair));
    }

    /// Sends frames out that are for this port.
    fn take<'a>(
        &mut self,
        frames: impl Iterator<Item = Frame<'a>>,
        shared: &PortShared,
        room: &mut Room,
        now: u64,
    ) {
        let mut frames = frames;
        let mut next = frames.next();
        let mut tagged = [0; FRONT];
        while let Some(first) = &next {
            let (settings, chosen) = (&self.settings, self.chosen.as_slice());
            let queue = queue_of(settings, chosen, first);
            let filter = &settings.filter;
            let ring = self.rings.get_mut(queue).and_then(Option::as_mut);
            let Some(ring) = ring.filter(|ring| ring.ring.runs()) else {
                shared.counters.rx_starved.add(1);
                next = frames.next();
                continue;
            };
            let memory = Arc::clone(&ring.ring.vring.memory);
            let mut packets = 0;
            let served = ring.open(&memory, &settings.hashing).and_then(|opened| {
                let mut way = Way {
                    opened,
                    filter,
                    shared,
                    limited: shared.limits.of_rx(),
                    longest: shared.longest(),
                    now,
                    tagged: &mut tagged,
                    packets: 0,
                    bytes: 0,
                };
                let mut sent = Ok(());
                while let Some(frame) =
                    next.take_if(|next| queue_of(settings, chosen, next) == queue)
                {
                    next = frames.next();
                    sent = match shared.as_it_is(&frame) {
                        Some(form) => way.send(&frame, form),
                        None => way.finish(&frame, room),
                    };
                    if sent.is_err() {
                        shared.counters.rx_dropped.add(1);
                        break;
                    }
                }
                packets = way.packets;
                shared.counters.rx_packets.add(packets);
                shared.counters.rx_bytes.add(way.bytes);
                sent
            });
            ring.done = ring.done.wrapping_add(packets);
            if let Err(error) = served {
                ring.fail(&error);
                // Flows are spread over those that are left, unless the driver has a table for that.
                self.choose_pairs();
            }
        }
    }
}

/// What frames pass on their way into a receive ring.
struct Way<'a> {
    opened: Opened<'a>,
    filter: &'a Filter,
    shared: &'a PortShared,
    /// There are limits of what goes out.
    limited: bool,
    /// Bytes of the longest frame that the driver gets, but for those that are to be cut.
    longest: usize,
    now: u64,
    /// Where a frame is put together that gets a tag.
    tagged: &'a mut [u8; FRONT],
    /// Packets that went out, and their bytes.
    packets: u64,
    bytes: u64,
}

impl Way<'_> {
    /// Sends a frame out as it is, unless something is against it.
    #[inline]
    fn send(&mut self, frame: &Frame<'_>, form: Form) -> Result<(), RingError> {
        let packet = frame.packet(form, self.tagged);
        if self.limited && !self.shared.admits(&packet, self.now) {
            return Ok(());
        }
        if !self.filter.passes(packet.start()) {
            self.shared.counters.rx_filtered.add(1);
            return Ok(());
        }
        if packet.len(0) > self.longest && exceeds(frame, &packet, self.longest) {
            self.shared.counters.rx_dropped.add(1);
            return Ok(());
        }
        match self.opened.put(&packet)? {
            Put::Done => {
                self.packets = self.packets.saturating_add(1);
                let len = u64::try_from(packet.len(0)).unwrap_or(u64::MAX);
                self.bytes = self.bytes.saturating_add(len);
            }
            put => self.shared.count(put, &packet),
        }
        Ok(())
    }

    /// Sends out what becomes of a frame that the port does not take as it is.
    #[cold]
    fn finish(&mut self, frame: &Frame<'_>, room: &mut Room) -> Result<(), RingError> {
        let mut sent = Ok(());
        let shared = self.shared;
        shared.finished(frame, room, |part, form| {
            if sent.is_ok() {
                sent = self.send(part, form);
            }
        });
        sent
    }
}

/// The driver must not get this packet, which has more than `longest` bytes (VIRTIO 1.3, 5.1.4.1).
#[inline(never)]
fn exceeds(frame: &Frame<'_>, packet: &Packet<'_>, longest: usize) -> bool {
    let ethertype = packet.start().get(TYPE_AT..).and_then(<[u8]>::first_chunk);
    let ethertype = ethertype.copied().unwrap_or_default();
    !frame.header.is_cut() && !is_longer_by_tag(packet.len(0), ethertype, longest)
}

/// The queue pair that a frame is for: by its flow one of those that are chosen, unless the driver has a table for that.
#[inline]
fn queue_of(settings: &Settings, chosen: &[usize], frame: &Frame<'_>) -> usize {
    if let Some(rss) = &settings.rss {
        return rss.pair(frame.prefix()).into();
    }
    let place = match chosen.len() {
        0 | 1 => 0,
        many => usize::try_from(frame.flow()).unwrap_or(0) % many,
    };
    chosen.get(place).copied().unwrap_or(0)
}

#[inline(never)]
fn record<'a>(
    recorder: &mut Recorder,
    shared: &PortShared,
    frames: impl Iterator<Item = Frame<'a>>,
) {
    for frame in frames {
        let Some(form) = shared.policy.vlans.form(frame.vlan) else {
            continue;
        };
        let mut tagged = [0; FRONT];
        let packet = frame.packet(form, &mut tagged);
        recorder.keep(packet.len(0), |out| {
            // A guest that takes its memory away has the rest of it as zeros.
            let _ = packet.bytes(0).copy_to(VolatileSlice::from(out));
        });
    }
}

/// What a port does with each frame that leaves there.
impl PortShared {
    /// In which form a frame leaves here, if it does; `isolated` is the port where it came in.
    #[inline]
    pub(super) fn form(&self, frame: &Beginning, isolated: bool) -> Option<Form> {
        let policy = &self.policy;
        if isolated && policy.isolated || !self.is_up() {
            return None;
        }
        policy
            .vlans
            .form(frame.vlan)
            .filter(|&form| form == Form::Tagged || !frame.has_inner_tag())
    }

    /// A frame came in.
    #[inline]
    pub(super) fn came_in(&self, frame: &Beginning) {
        self.counters.tx_packets.add(1);
        let len = u64::try_from(frame.len()).unwrap_or(u64::MAX);
        self.counters.tx_bytes.add(len);
    }

    /// It takes a frame with this header as it is.
    #[inline]
    pub(super) fn takes(&self, header: &Header) -> bool {
        let taken = |needs| needs & !self.offloads() == 0;
        header.is_plain() || header.needs().is_some_and(taken)
    }

    /// In which form a frame goes out that this port takes as it is.
    #[inline]
    fn as_it_is(&self, frame: &Frame<'_>) -> Option<Form> {
        if self.takes(&frame.header) {
            self.policy.vlans.form(frame.vlan)
        } else {
            None
        }
    }

    /// Hands over a frame as it is, or what becomes of it if this port does not take it so.
    #[inline]
    fn finished(&self, frame: &Frame<'_>, room: &mut Room, mut send: impl FnMut(&Frame<'_>, Form)) {
        if let Some(form) = self.as_it_is(frame) {
            send(frame, form);
            return;
        }
        let Some(form) = self.policy.vlans.form(frame.vlan) else {
            return;
        };
        match offload::finish(frame, room, |part| send(part, form)) {
            Some(()) => self.counters.rx_softened.add(1),
            None => self.counters.rx_dropped.add(1),
        }
    }

    /// The limits let a packet go out, at the time `now` in nanoseconds.
    #[inline]
    fn admits(&self, packet: &Packet<'_>, now: u64) -> bool {
        if !self.limits.of_rx() {
            return true;
        }
        let len = u64::try_from(packet.len(0)).unwrap_or(u64::MAX);
        let admitted = self.limits.take_rx(len, now);
        if !admitted {
            self.counters.rx_limited.add(1);
        }
        admitted
    }

    #[inline]
    fn count(&self, put: Put, packet: &Packet<'_>) {
        let counters = &self.counters;
        match put {
            Put::Done => {
                counters.rx_packets.add(1);
                let len = u64::try_from(packet.len(0)).unwrap_or(u64::MAX);
                counters.rx_bytes.add(len);
            }
            Put::Starved => counters.rx_starved.add(1),
            Put::Unfit => counters.rx_dropped.add(1),
        }
    }
}

/// A link's side of a port, as frames for it see it.
pub(super) struct LinkOutlet {
    pub(super) link: Box<dyn Link>,
    /// Where a frame is put together for its one system call.
    memory: Arc<Memory>,
    list: IoList,
    /// It was given frames since it was last flushed.
    dirty: bool,
}

impl LinkOutlet {
    /// `None` if there is no memory.
    pub(super) fn new(link: Box<dyn Link>) -> Option<Self> {
        let ranges = [(GuestAddress(0), HEADER + MAX_FRAME)];
        let memory = Arc::new(Memory::from_ranges(&ranges).ok()?);
        Some(Self {
            link,
            list: IoList::new(Arc::clone(&memory)),
            memory,
            dirty: false,
        })
    }

    fn put(&mut self, packet: &Packet<'_>, port: &PortShared) -> Put {
        let Ok(len) = u32::try_from(packet.len(HEADER)) else {
            return Put::Unfit;
        };
        let whole = [Segment::new(GuestAddress(0), len)];
        let count = usize::try_from(len).unwrap_or(usize::MAX);
        let mut bytes = packet.bytes(HEADER);
        self.list.clear();
        if !Window::new(&self.memory).each(&whole, count, |place| bytes.copy_to(place))
            || self.list.append(&whole, Permissions::Read).is_err()
        {
            return Put::Unfit;
        }
        self.dirty = true;
        match self.link.send(&mut self.list, HEADER) {
            Ok(()) => Put::Done,
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
                ) =>
            {
                Put::Starved
            }
            Err(error) => {
                if let Some(held_back) = port.log.check() {
                    let advice = self.link.advice(&error).unwrap_or_default();
                    warn!(
                        port = port.name,
                        held_back, "frame dropped: {error} {advice}"
                    );
                }
                Put::Unfit
            }
        }
    }
}

/// What is behind a port, as frames for it see it.
pub(super) enum Outlet {
    Guest(GuestOutlet),
    Link(LinkOutlet),
}

/// A port, as frames for it see it.
pub(super) struct Egress {
    pub(super) shared: Arc<PortShared>,
    pub(super) outlet: Outlet,
    /// Keeps what comes in here, too.
    pub(super) recorder: Option<Recorder>,
}

impl Egress {
    /// Keeps frames in the form that they have here, if that is wanted.
    #[inline]
    pub(super) fn record<'a>(&mut self, frames: impl Iterator<Item = Frame<'a>>) {
        if let Some(recorder) = &mut self.recorder {
            record(recorder, &self.shared, frames);
        }
    }

    /// Sends frames out. `now` is in nanoseconds.
    #[inline]
    pub(super) fn take<'a>(
        &mut self,
        frames: impl Iterator<Item = Frame<'a>>,
        room: &mut Room,
        now: u64,
    ) {
        let Self { shared, outlet, .. } = self;
        match outlet {
            Outlet::Guest(guest) => guest.take(frames, shared, room, now),
            Outlet::Link(link) => {
                for frame in frames {
                    shared.finished(&frame, room, |part, form| {
                        let mut tagged = [0; FRONT];
                        let packet = part.packet(form, &mut tagged);
                        if shared.admits(&packet, now) {
                            let put = link.put(&packet, shared);
                            shared.count(put, &packet);
                        }
                    });
                }
            }
        }
    }

    /// Ends a batch: what was sent is shown to who gets it.
    #[inline]
    pub(super) fn flush(&mut self, signals: &Signals) {
        if let Some(recorder) = &mut self.recorder {
            recorder.hand_over();
        }
        match &mut self.outlet {
            Outlet::Guest(guest) => {
                for ring in guest.rings.iter_mut().flatten() {
                    ring.publish(&self.shared, signals);
                }
            }
            Outlet::Link(link) => {
                if std::mem::take(&mut link.dirty) {
                    link.link.flush();
                }
            }
        }
    }
}

//! Where frames leave the switch: a guest's receive rings, or a link.
//!
//! A frame is copied once, into as many buffers as it takes; one that does not find enough of them is dropped and the buffers
//! are put back, so that nothing is ever waited for and a guest that takes no packets holds up nobody.

use std::sync::Arc;

use ringside_rings::{ChainBuf, PopError, RingError, Segment, in_one_region, write_segments};
use tracing::warn;
use virtio_bindings::virtio_net::VIRTIO_NET_F_MRG_RXBUF;
use vm_memory::{GuestAddress, GuestMemory, Permissions};

use super::super::features::{has, header_len};
use super::super::iov::IoList;
use super::super::link::Link;
use super::super::ring::Ring;
use super::super::settings::{Pairs, Settings, Shared};
use super::frame::{Bytes, Frame, MAX_HEADER, Packet};
use super::offload::{self, Room};
use super::policy::Form;
use super::shared::PortShared;
use crate::net::tx::MAX_FRAME;
use crate::shell::{LogLimit, Memory, Vring};

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
            ring: Ring::new(vring, log),
        }
    }

    fn put(&mut self, packet: &Packet<'_>) -> Result<Put, RingError> {
        let Self {
            ring,
            first,
            heads,
            header_len,
            mergeable,
            dirty,
        } = self;
        let (mut session, other, _) = ring.parts()?;
        session.disable_notifications()?;
        let total = packet.len(*header_len);
        let mut bytes = packet.bytes(*header_len);
        let mut left = total;
        heads.clear();
        let put = loop {
            let buf = if heads.is_empty() {
                &mut *first
            } else {
                &mut *other
            };
            let unusable = match session.pop(buf) {
                Ok(Some(chain)) => {
                    let room = usize::try_from(chain.writable_len()).unwrap_or(usize::MAX);
                    let begins = heads.is_empty();
                    if chain.readable().is_empty() && !(begins && room < *header_len) {
                        if !*mergeable && room < total || heads.len() == MAX_BUFFERS {
                            session.rewind(1);
                            break Put::Unfit;
                        }
                        let count = left.min(room);
                        if fill(session.memory(), chain.writable(), count, &mut bytes) {
                            left = left.saturating_sub(count);
                            heads.push((chain.head(), u32::try_from(count).unwrap_or(u32::MAX)));
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
                Err(PopError::Ring(error)) => {
                    // What was done before the driver broke its ring is returned all the same.
                    session.publish()?;
                    return Err(error);
                }
            };
            // Buffers before one that is none cannot be put back: all of them go back empty, and the packet is lost.
            for (head, _) in heads.drain(..) {
                session.push_used(head, 0)?;
            }
            session.push_used(unusable, 0)?;
            *dirty = true;
            break Put::Unfit;
        };
        if put != Put::Done {
            session.rewind(u16::try_from(heads.len()).unwrap_or(u16::MAX));
            return Ok(put);
        }
        if heads.len() > 1 && *header_len == MAX_HEADER {
            let count = u16::try_from(heads.len()).unwrap_or(u16::MAX);
            let count = count.to_le_bytes();
            // It was written there a moment ago.
            let _ = write_segments(session.memory(), first.writable(), NUM_BUFFERS, &count);
        }
        for &(head, len) in heads.iter() {
            session.push_used(head, len)?;
        }
        *dirty = true;
        Ok(put)
    }

    /// Shows the driver what it was given, and interrupts it if it wants that.
    fn publish(&mut self, port: &PortShared) {
        if !std::mem::take(&mut self.dirty) || !self.ring.sound() {
            return;
        }
        let published = self
            .ring
            .parts()
            .and_then(|(mut session, ..)| session.publish());
        match published {
            Ok(true) => interrupt(&self.ring, port),
            Ok(false) => {}
            Err(error) => self.ring.fail(&error),
        }
    }
}

/// Interrupts a driver, unless it polls.
pub(super) fn interrupt(ring: &Ring, port: &PortShared) {
    if ring.vring.call.is_none() {
        return;
    }
    port.counters.interrupts.add(1);
    if let Err(error) = ring.vring.notify_driver()
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

/// Copies `count` bytes into segments of guest memory.
#[inline]
fn fill(memory: &Memory, segments: &[Segment], count: usize, bytes: &mut Bytes<'_>) -> bool {
    let mut left = count;
    for segment in segments {
        let len = usize::try_from(segment.len).unwrap_or(usize::MAX).min(left);
        if let Some(slice) = in_one_region(memory, segment.addr, len) {
            if !bytes.copy_to(slice) {
                return false;
            }
        } else {
            let Ok(slices) = memory.get_slices(segment.addr, len, Permissions::Write) else {
                return false;
            };
            for slice in slices {
                if !slice.is_ok_and(|slice| bytes.copy_to(slice)) {
                    return false;
                }
            }
        }
        left = left.saturating_sub(len);
        if left == 0 {
            break;
        }
    }
    left == 0
}

/// A guest's side of a port, as frames for it see it.
pub(super) struct GuestOutlet {
    /// By queue pair.
    pub(super) rings: Vec<Option<RxRing>>,
    shared: Arc<Shared>,
    version: u64,
    settings: Arc<Settings>,
    /// Queue pairs that frames are spread over.
    spread: u32,
}

impl GuestOutlet {
    pub(super) fn new(shared: Arc<Shared>, pairs: u16) -> Self {
        let (version, settings) = shared.latest();
        Self {
            rings: (0..pairs).map(|_| None).collect(),
            shared,
            version,
            settings,
            spread: 0,
        }
    }

    /// Goes by what the driver has set, if that is new.
    pub(super) fn adopt(&mut self) {
        if self.shared.is_newer(self.version) {
            (self.version, self.settings) = self.shared.latest();
            self.count_pairs();
            self.shared.adopt(0, self.version);
        }
    }

    /// Counts the pairs that frames are spread over: the first ones that run, as far as the driver uses them.
    pub(super) fn count_pairs(&mut self) {
        let running = self
            .rings
            .iter()
            .take_while(|ring| ring.as_ref().is_some_and(|ring| ring.ring.runs()))
            .count();
        let running = u32::try_from(running).unwrap_or(0);
        self.spread = match self.settings.pairs {
            Pairs::First(count) => running.min(count.into()),
            Pairs::Enabled | Pairs::Fed => running,
        };
    }

    fn queue_of(&self, frame: &Frame<'_>) -> usize {
        if self.spread < 2 {
            return 0;
        }
        let queue = frame.flow().checked_rem(self.spread).unwrap_or(0);
        usize::try_from(queue).unwrap_or(0)
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
        let ranges = [(GuestAddress(0), MAX_HEADER + MAX_FRAME)];
        let memory = Arc::new(Memory::from_ranges(&ranges).ok()?);
        Some(Self {
            link,
            list: IoList::new(Arc::clone(&memory)),
            memory,
            dirty: false,
        })
    }

    fn put(&mut self, packet: &Packet<'_>, port: &PortShared) -> Put {
        let Ok(len) = u32::try_from(packet.len(MAX_HEADER)) else {
            return Put::Unfit;
        };
        let whole = [Segment::new(GuestAddress(0), len)];
        let count = usize::try_from(len).unwrap_or(usize::MAX);
        self.list.clear();
        if !fill(&self.memory, &whole, count, &mut packet.bytes(MAX_HEADER))
            || self.list.append(&whole, Permissions::Read).is_err()
        {
            return Put::Unfit;
        }
        self.dirty = true;
        match self.link.send(&mut self.list, MAX_HEADER) {
            Ok(()) => Put::Done,
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => Put::Starved,
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
}

impl Egress {
    /// In which form a frame leaves here, if it does; `isolated` is the port where it came in.
    #[inline]
    pub(super) fn form(&self, frame: &Frame<'_>, isolated: bool) -> Option<Form> {
        let policy = &self.shared.policy;
        if isolated && policy.isolated || !self.shared.is_up() {
            return None;
        }
        policy
            .vlans
            .form(frame.vlan)
            .filter(|&form| form == Form::Tagged || !frame.has_inner_tag())
    }

    /// Sends a frame out, or counts why not. `now` is in nanoseconds.
    #[inline]
    pub(super) fn send(&mut self, frame: &Frame<'_>, form: Form, room: &mut Room, now: u64) {
        let accepted = self.shared.offloads();
        if frame
            .header
            .needs()
            .is_some_and(|needs| needs & !accepted == 0)
        {
            self.send_as_is(frame, form, now);
            return;
        }
        let shared = Arc::clone(&self.shared);
        let finished = offload::finish(frame, room, |part| self.send_as_is(part, form, now));
        match finished {
            Some(()) => shared.counters.rx_softened.add(1),
            None => shared.counters.rx_dropped.add(1),
        }
    }

    fn send_as_is(&mut self, frame: &Frame<'_>, form: Form, now: u64) {
        let Self { shared, outlet } = self;
        let counters = &shared.counters;
        let packet = frame.packet(form);
        let len = u64::try_from(packet.len(0)).unwrap_or(u64::MAX);
        if shared.limits.of_rx() && !shared.limits.take_rx(len, now) {
            counters.rx_limited.add(1);
            return;
        }
        let put = match outlet {
            Outlet::Guest(guest) => {
                if !guest.settings.filter.passes(packet.start()) {
                    counters.rx_filtered.add(1);
                    return;
                }
                let queue = guest.queue_of(frame);
                let ring = guest.rings.get_mut(queue).and_then(Option::as_mut);
                match ring.filter(|ring| ring.ring.runs()) {
                    None => Put::Starved,
                    Some(ring) => match ring.put(&packet) {
                        Ok(put) => put,
                        Err(error) => {
                            ring.ring.fail(&error);
                            Put::Unfit
                        }
                    },
                }
            }
            Outlet::Link(link) => link.put(&packet, shared),
        };
        match put {
            Put::Done => {
                counters.rx_packets.add(1);
                counters.rx_bytes.add(len);
            }
            Put::Starved => counters.rx_starved.add(1),
            Put::Unfit => counters.rx_dropped.add(1),
        }
    }

    /// Ends a batch: what was sent is shown to who gets it.
    #[inline]
    pub(super) fn flush(&mut self) {
        match &mut self.outlet {
            Outlet::Guest(guest) => {
                for ring in guest.rings.iter_mut().flatten() {
                    ring.publish(&self.shared);
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

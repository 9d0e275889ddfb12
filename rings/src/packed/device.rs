//! The device side of a packed virtqueue: what [`crate::DeviceRing`] does for this format.

use std::ops::ControlFlow;
use std::sync::atomic::{Ordering, fence};

use vm_memory::bitmap::BS;
use vm_memory::{GuestAddress, GuestMemory, Permissions};

use super::desc::{self, DESC_F_WRITE, Rest};
use super::inflight::{Resumed, Tracking};
use super::layout::{Cursor, EVENT_ALIGN, EVENT_LEN, Event};
use crate::area::{AreaRef, resolve};
use crate::chain::ChainBuf;
use crate::device::{DESC_ALIGN, MAX_SIZE, RingConfig, reject_overlap};
use crate::error::{Area, ChainError, PopError, RingError};
use crate::inflight::{Inflight, damaged};
use crate::table::{LastRegion, Table, desc_offset, table_limit};

/// How many buffer ids there are: 16 bits, whatever the size of the queue (VIRTIO 1.3, 2.8.13).
pub(crate) const IDS: usize = 1 << 16;

/// The device's state of one packed virtqueue.
#[derive(Debug)]
pub(crate) struct DeviceRing {
    /// Size, addresses, features: fixed while the queue runs.
    size: u16,
    desc_ring: GuestAddress,
    driver_event: GuestAddress,
    device_event: GuestAddress,
    event_idx: bool,
    indirect: bool,
    /// The next descriptor to take.
    next_avail: Cursor,
    /// The next descriptor to mark used, as the driver sees it.
    next_used: Cursor,
    /// Used descriptors from `next_used` on cover this many, and are not yet visible: the first of them is
    /// here and not in memory.
    staged: u16,
    first: u64,
    /// Descriptors taken, and not visibly used: they are not the driver's to write.
    busy: u16,
    /// Chains taken and not yet pushed.
    in_flight: u16,
    /// By buffer id: how many descriptors the chain in flight has; 0 if there is none.
    counts: Box<[u16]>,
    /// By the place of its last descriptor: the id of the chain taken from there last.
    taken: Box<[u16]>,
    /// Used descriptors were published before, so that `next_used` tells what the driver was told of.
    published: bool,
    /// What the driver was last told about notifications, if it was told by this owner.
    notifications: Option<bool>,
    /// What is noted for an owner that comes after this one. Chains are then shown to the driver one by one.
    tracking: Option<Box<Tracking>>,
}

impl DeviceRing {
    pub(crate) fn new<M: GuestMemory>(config: &RingConfig, mem: &M) -> Result<Self, RingError> {
        let size = config.size;
        if size == 0 || size > MAX_SIZE {
            return Err(RingError::PackedSize { size });
        }
        let ring_len = desc_offset(size);
        let areas = [
            (Area::DeviceEvent, config.used_ring, EVENT_LEN, EVENT_ALIGN),
            (Area::DriverEvent, config.avail_ring, EVENT_LEN, EVENT_ALIGN),
            (Area::Descriptors, config.desc_table, ring_len, DESC_ALIGN),
        ];
        for (area, addr, _, align) in areas {
            if !addr.0.is_multiple_of(align) {
                let addr = addr.0;
                return Err(RingError::Misaligned { area, addr, align });
            }
        }
        // The device writes the first and the last of them.
        let [device, driver, ring] = areas.map(|(area, addr, len, _)| (area, addr, len));
        for (area, with) in [(device, driver), (device, ring), (driver, ring)] {
            reject_overlap(area, with)?;
        }
        let mut ring = Self {
            size,
            desc_ring: config.desc_table,
            driver_event: config.avail_ring,
            device_event: config.used_ring,
            event_idx: config.event_idx,
            indirect: config.indirect,
            next_avail: Cursor::from_index(config.next_avail, size)?,
            next_used: Cursor::from_index(config.next_used, size)?,
            staged: 0,
            first: 0,
            busy: 0,
            in_flight: 0,
            counts: vec![0; IDS].into_boxed_slice(),
            taken: vec![0; usize::from(size)].into_boxed_slice(),
            published: false,
            notifications: None,
            tracking: None,
        };
        ring.session(mem)?;
        Ok(ring)
    }

    /// Goes on from the notes in `table`, and keeps them.
    pub(crate) fn resume<M: GuestMemory>(
        config: &RingConfig,
        mem: &M,
        table: Inflight,
    ) -> Result<Self, RingError> {
        let mut ring = Self::new(config, mem)?;
        let (size, next_used) = (ring.size, ring.next_used);
        let resume = |session: Session<'_, M>| {
            Tracking::resume(table, size, next_used, |at| session.rest(at))
        };
        let Resumed {
            tracking,
            next_used,
        } = resume(ring.session(mem)?)?;
        for (number, &id) in tracking.again.heads().iter().enumerate() {
            let count = tracking.copies_of(number);
            match ring.counts.get_mut(usize::from(id)) {
                Some(held) if *held == 0 => *held = count,
                _ => return Err(damaged("two chains in flight have the same id")),
            }
            ring.busy = ring.busy.saturating_add(count);
            ring.in_flight = ring.in_flight.saturating_add(1);
        }
        ring.next_used = next_used;
        // All that was taken is used or in flight.
        ring.next_avail = next_used.after(ring.busy, size);
        ring.tracking = Some(Box::new(tracking));
        Ok(ring)
    }

    pub(crate) fn is_tracked(&self) -> bool {
        self.tracking.is_some()
    }

    /// Chains of a former owner that are to be served again.
    #[inline]
    pub(crate) fn unserved(&self) -> u16 {
        self.tracking.as_ref().map_or(0, |t| t.again.left())
    }

    #[inline]
    pub(crate) fn size(&self) -> u16 {
        self.size
    }

    #[inline]
    pub(crate) fn next_avail(&self) -> u16 {
        self.next_avail.bits()
    }

    #[inline]
    pub(crate) fn next_used(&self) -> u16 {
        self.next_used.bits()
    }

    #[inline]
    pub(crate) fn in_flight(&self) -> u16 {
        self.in_flight
    }

    pub(crate) fn session<'a, M: GuestMemory>(
        &'a mut self,
        mem: &'a M,
    ) -> Result<Session<'a, M>, RingError> {
        let desc = resolve(
            mem,
            Area::Descriptors,
            self.desc_ring,
            desc_offset(self.size),
            Permissions::ReadWrite,
        )?;
        let driver_event = resolve(
            mem,
            Area::DriverEvent,
            self.driver_event,
            EVENT_LEN,
            Permissions::Read,
        )?;
        let device_event = resolve(
            mem,
            Area::DeviceEvent,
            self.device_event,
            EVENT_LEN,
            Permissions::ReadWrite,
        )?;
        // A front-end chooses where in this process's memory guest memory begins; if that makes a
        // descriptor unaligned, it shows here and not in the middle of a batch.
        desc.load_u64_atomic(0, Ordering::Relaxed)?;
        driver_event.load_u32_atomic(0, Ordering::Relaxed)?;
        device_event.load_u32_atomic(0, Ordering::Relaxed)?;
        Ok(Session {
            ring: self,
            mem,
            desc,
            driver_event,
            device_event,
            region: LastRegion::default(),
        })
    }
}

/// One turn of the device's loop.
pub(crate) struct Session<'a, M: GuestMemory> {
    ring: &'a mut DeviceRing,
    mem: &'a M,
    desc: AreaRef<'a, BS<'a, M::Bitmap>>,
    driver_event: AreaRef<'a, BS<'a, M::Bitmap>>,
    device_event: AreaRef<'a, BS<'a, M::Bitmap>>,
    region: LastRegion,
}

/// Why the segments of a chain were not gathered.
enum Stopped {
    /// The queue is broken.
    Ring(RingError),
    /// The contents of the chain are malformed, in its descriptor number `count`, which says `rest`.
    Chain {
        count: u16,
        rest: Rest,
        error: ChainError,
    },
}

impl From<RingError> for Stopped {
    fn from(error: RingError) -> Self {
        Self::Ring(error)
    }
}

impl<M: GuestMemory> Session<'_, M> {
    /// Chains of a former owner that are to be served again.
    #[inline]
    pub(crate) fn unserved(&self) -> u16 {
        self.ring.unserved()
    }

    #[inline]
    pub(crate) fn memory(&self) -> &M {
        self.mem
    }

    /// Whether there is a chain: 1 or 0. To count them would be to walk them.
    pub(crate) fn available(&mut self) -> Result<u16, RingError> {
        Ok(u16::from(self.next()?.is_some()))
    }

    /// Flags, id and length of a descriptor.
    #[inline]
    fn rest(&self, at: u16) -> Result<Rest, RingError> {
        let offset = desc_offset(at).wrapping_add(8);
        let word = self.desc.load_u64_atomic(offset, Ordering::Acquire)?;
        Ok(Rest::from_word(word))
    }

    /// The next descriptor, if the driver made it available.
    #[inline]
    fn next(&self) -> Result<Option<Rest>, RingError> {
        let ring = &*self.ring;
        let cursor = ring.next_avail;
        // Acquire: the address, the descriptors behind it and the buffers are read after it
        // (VIRTIO 1.3, 2.8.21.1.1).
        let rest = self.rest(cursor.at())?;
        if !rest.is_available(cursor) {
            return Ok(None);
        }
        // The driver has `size` descriptors, and those of a chain whose return it cannot have seen
        // are not its to reuse.
        if ring.busy >= ring.size {
            let at = cursor.at();
            return Err(RingError::AvailDescriptor { at, room: 0 });
        }
        Ok(Some(rest))
    }

    /// Takes the next available chain into `buf`, and returns its id.
    #[inline(never)]
    pub(crate) fn pop(&mut self, buf: &mut ChainBuf) -> Result<Option<u16>, PopError> {
        if self.ring.tracking.is_some()
            && let Some(popped) = self.pop_again(buf)
        {
            return popped;
        }
        let Some(rest) = self.next()? else {
            return Ok(None);
        };
        match self.gather(rest, buf) {
            Ok((id, count)) => {
                self.take(id, count)?;
                Ok(Some(id))
            }
            Err(stopped) => Err(self.malformed(stopped)),
        }
    }

    /// Takes a chain of a former owner that is to be served again, if there is one.
    #[inline(never)]
    fn pop_again(&mut self, buf: &mut ChainBuf) -> Option<Result<Option<u16>, PopError>> {
        let (number, id) = self.ring.tracking.as_mut()?.again.take()?;
        let gathered = self.gather_copies(number, buf);
        let malformed = |error| PopError::Chain { head: id, error };
        Some(gathered.map(|()| Some(id)).map_err(malformed))
    }

    /// Notes that a chain is in flight.
    #[inline]
    fn take(&mut self, id: u16, count: u16) -> Result<(), RingError> {
        let ring = &mut *self.ring;
        let next = ring.next_avail.after(count, ring.size);
        let last = match count {
            1 => ring.next_avail,
            _ => ring.next_avail.after(count.saturating_sub(1), ring.size),
        };
        if let (Some(held), Some(taken)) = (
            ring.counts.get_mut(usize::from(id)),
            ring.taken.get_mut(usize::from(last.at())),
        ) {
            if *held != 0 {
                return Err(RingError::HeadInFlight { head: id });
            }
            *held = count;
            *taken = id;
        }
        if ring.tracking.is_some() {
            self.track(id, count)?;
        }
        let ring = &mut *self.ring;
        ring.next_avail = next;
        ring.busy = ring.busy.saturating_add(count);
        ring.in_flight = ring.in_flight.saturating_add(1);
        Ok(())
    }

    /// Notes the chain at the next place in the memory that outlives the device.
    #[inline(never)]
    fn track(&mut self, id: u16, count: u16) -> Result<(), RingError> {
        let ring = &mut *self.ring;
        let (start, size, desc) = (ring.next_avail, ring.size, &self.desc);
        let Some(tracking) = &mut ring.tracking else {
            return Ok(());
        };
        tracking.took(id, count, |number| {
            let offset = desc_offset(start.after(number, size).at());
            let word = desc.load_u64(offset.wrapping_add(8))?;
            Ok((desc.load_u64(offset)?, Rest::from_word(word)))
        })
    }

    /// Takes a chain whose contents are malformed. Its id stands in its last descriptor.
    #[cold]
    fn malformed(&mut self, stopped: Stopped) -> PopError {
        let (mut count, mut rest, error) = match stopped {
            Stopped::Ring(error) => return error.into(),
            Stopped::Chain { count, rest, error } => (count, rest, error),
        };
        let start = self.ring.next_avail;
        while rest.has_next() {
            rest = match self.following(start, count) {
                Ok(rest) => rest,
                Err(error) => return error.into(),
            };
            count = count.saturating_add(1);
        }
        match self.take(rest.id, count) {
            Ok(()) => PopError::Chain {
                head: rest.id,
                error,
            },
            Err(error) => error.into(),
        }
    }

    /// Gives back the last chain taken, as if it had not been; breaks if it was returned already.
    pub(crate) fn rewind(&mut self) -> ControlFlow<()> {
        let ring = &mut *self.ring;
        let is_held = |id: u16| ring.counts.get(usize::from(id)).is_some_and(|&c| c != 0);
        if let Some(tracking) = &mut ring.tracking
            && let Some(done) = tracking.again.rewind(is_held)
        {
            return done;
        }
        let last = ring.next_avail.before(1, ring.size);
        // The device may have written the descriptor again, so the id comes from our own notes.
        let id = ring.taken.get(usize::from(last.at())).copied();
        let id = id.unwrap_or_default();
        let count = match ring.counts.get_mut(usize::from(id)) {
            Some(held) if *held != 0 => std::mem::take(held),
            _ => return ControlFlow::Break(()),
        };
        if let Some(tracking) = &mut ring.tracking
            && tracking.gave_back(id).is_err()
        {
            return ControlFlow::Break(());
        }
        ring.next_avail = ring.next_avail.before(count, ring.size);
        ring.busy = ring.busy.saturating_sub(count);
        ring.in_flight = ring.in_flight.saturating_sub(1);
        ControlFlow::Continue(())
    }

    /// A chain is not in flight any more. Returns how many descriptors it has.
    #[inline]
    pub(crate) fn retire(&mut self, id: u16) -> Result<u16, RingError> {
        let ring = &mut *self.ring;
        match ring.counts.get_mut(usize::from(id)) {
            Some(held) if *held != 0 => {
                ring.in_flight = ring.in_flight.saturating_sub(1);
                if let Some(tracking) = &mut ring.tracking {
                    tracking.returned(id);
                }
                Ok(std::mem::take(held))
            }
            _ => Err(RingError::HeadNotInFlight { head: id }),
        }
    }

    /// Writes one used descriptor that stands for `count` descriptors: those of chain `id`, and of chains
    /// before it that are skipped (VIRTIO 1.3, 2.8.8).
    // A call costs more than the common way through it.
    #[inline(always)]
    pub(crate) fn stage(&mut self, id: u16, len: u32, count: u16) -> Result<(), RingError> {
        let ring = &mut *self.ring;
        let cursor = ring.next_used.after(ring.staged, ring.size);
        // `len` counts with this flag only (VIRTIO 1.3, 2.8.4).
        let write = if len > 0 { DESC_F_WRITE } else { 0 };
        let word = Rest {
            len,
            id,
            flags: desc::used(cursor) | write,
        }
        .to_word();
        if ring.tracking.is_some() {
            return self.show(cursor, word, count);
        }
        let first = ring.staged == 0;
        ring.staged = ring.staged.saturating_add(count);
        if first {
            ring.first = word;
            return Ok(());
        }
        self.desc
            .store_u64(desc_offset(cursor.at()).wrapping_add(8), word)
    }

    /// Shows the driver one used descriptor at once, and notes that.
    #[inline(never)]
    fn show(&mut self, cursor: Cursor, word: u64, count: u16) -> Result<(), RingError> {
        let ring = &mut *self.ring;
        let Some(tracking) = &mut ring.tracking else {
            return Ok(());
        };
        let next = cursor.after(count, ring.size);
        tracking.publishes(cursor, next)?;
        // Release: all the device wrote to buffers comes before it (VIRTIO 1.3, 2.8.2), and the notes.
        let offset = desc_offset(cursor.at()).wrapping_add(8);
        self.desc
            .store_u64_atomic(offset, word, Ordering::Release)?;
        ring.next_used = next;
        ring.busy = ring.busy.saturating_sub(count);
        tracking.published(next, count)
    }

    /// Makes all staged used descriptors visible with the first of them.
    #[inline]
    pub(crate) fn publish(&mut self) -> Result<bool, RingError> {
        let ring = &mut *self.ring;
        if let Some(tracking) = &mut ring.tracking {
            let shown = std::mem::take(&mut tracking.shown);
            return self.wants_interrupt(shown);
        }
        if ring.staged == 0 {
            return Ok(false);
        }
        let old = ring.next_used;
        let moved = ring.staged;
        // Release: the descriptors behind it, and all the device wrote to buffers, come before it
        // (VIRTIO 1.3, 2.8.2).
        let offset = desc_offset(old.at()).wrapping_add(8);
        self.desc
            .store_u64_atomic(offset, ring.first, Ordering::Release)?;
        ring.next_used = old.after(moved, ring.size);
        ring.staged = 0;
        ring.busy = ring.busy.saturating_sub(moved);
        self.wants_interrupt(moved.into())
    }

    /// Whether the driver wants an interrupt for the last `moved` descriptors that were marked used.
    #[inline]
    fn wants_interrupt(&mut self, moved: u32) -> Result<bool, RingError> {
        if moved == 0 {
            return Ok(false);
        }
        let ring = &mut *self.ring;
        let first = !ring.published;
        ring.published = true;
        // The driver writes its wish, then looks at the descriptor; the device the other way round. With
        // a full barrier on both sides at least one sees the other (VIRTIO 1.3, 2.8.22).
        fence(Ordering::SeqCst);
        let bits = self.driver_event.load_u32_atomic(0, Ordering::Relaxed)?;
        let event = Event::from_bits(bits, ring.event_idx);
        // What a former owner told the driver is not known: tell it once too often. So with more than a round of the queue.
        let sure = first || moved > u32::from(ring.size);
        let moved = u16::try_from(moved).unwrap_or(u16::MAX).min(ring.size);
        let old = ring.next_used.before(moved, ring.size);
        Ok(event.wants(old, moved, ring.size) || (sure && matches!(event, Event::Desc(_))))
    }

    /// Tells the driver that it need not notify (VIRTIO 1.3, 2.8.10).
    pub(crate) fn disable_notifications(&mut self) -> Result<(), RingError> {
        if self.ring.notifications == Some(false) {
            return Ok(());
        }
        self.device_event
            .store_u32_atomic(0, Event::Disable.to_bits(), Ordering::Relaxed)?;
        self.ring.notifications = Some(false);
        Ok(())
    }

    /// Asks the driver to notify from the next chain on.
    pub(crate) fn enable_notifications(&mut self) -> Result<bool, RingError> {
        let event = if self.ring.event_idx {
            Some(Event::Desc(self.ring.next_avail))
        } else if self.ring.notifications == Some(true) {
            None
        } else {
            Some(Event::Enable)
        };
        if let Some(event) = event {
            self.device_event
                .store_u32_atomic(0, event.to_bits(), Ordering::Relaxed)?;
        }
        self.ring.notifications = Some(true);
        // The other half of the barrier in the driver's publication (VIRTIO 1.3, 2.8.21.3.1).
        fence(Ordering::SeqCst);
        Ok(self.available()? != 0)
    }

    /// Walks the chain that begins with `rest` at the next place and gathers its segments. Returns its id and
    /// how many descriptors it has.
    #[inline]
    fn gather(&mut self, rest: Rest, buf: &mut ChainBuf) -> Result<(u16, u16), Stopped> {
        if rest.is_indirect() || rest.has_next() {
            return self.gather_chain(rest, buf);
        }
        // A short packet, and most buffers that are received into.
        let addr = self.desc.load_u64(desc_offset(self.ring.next_avail.at()))?;
        let (count, writable) = (1, rest.is_writable());
        match self.region.segment(self.mem, addr, rest.len, writable) {
            Ok(segment) => {
                buf.set(segment, writable);
                Ok((rest.id, count))
            }
            Err(error) => Err(Stopped::Chain { count, rest, error }),
        }
    }

    /// Walks a chain of several segments. Returns the same.
    fn gather_chain(&mut self, rest: Rest, buf: &mut ChainBuf) -> Result<(u16, u16), Stopped> {
        buf.clear();
        let start = self.ring.next_avail;
        let mut cursor = start;
        let mut rest = rest;
        let mut count = 1_u16;
        loop {
            let addr = self.desc.load_u64(desc_offset(cursor.at()))?;
            if let Err(error) = self.append(addr, rest, count > 1, buf) {
                return Err(Stopped::Chain { count, rest, error });
            }
            if !rest.has_next() {
                return Ok((rest.id, count));
            }
            rest = self.following(start, count)?;
            cursor = cursor.after(1, self.ring.size);
            count = count.saturating_add(1);
        }
    }

    /// Gathers the segments of a chain that is to be served again.
    fn gather_copies(&mut self, number: usize, buf: &mut ChainBuf) -> Result<(), ChainError> {
        buf.clear();
        let copy = |ring: &DeviceRing, at| ring.tracking.as_ref().and_then(|t| t.copy(number, at));
        let mut at = 0_u16;
        while let Some((addr, rest)) = copy(self.ring, at) {
            self.append(addr, rest, at > 0, buf)?;
            at = at.saturating_add(1);
        }
        Ok(())
    }

    /// The descriptor `count` behind that at `start`: no further than there can be any that the driver wrote, so that
    /// a chain without end ends.
    #[inline]
    fn following(&self, start: Cursor, count: u16) -> Result<Rest, RingError> {
        let room = self.ring.size.saturating_sub(self.ring.busy);
        if count >= room {
            let at = start.at();
            return Err(RingError::AvailDescriptor { at, room });
        }
        let cursor = start.after(count, self.ring.size);
        let offset = desc_offset(cursor.at()).wrapping_add(8);
        Ok(Rest::from_word(self.desc.load_u64(offset)?))
    }

    /// Adds what one descriptor of the ring refers to.
    #[inline]
    fn append(
        &mut self,
        addr: u64,
        rest: Rest,
        follows: bool,
        buf: &mut ChainBuf,
    ) -> Result<(), ChainError> {
        if rest.is_indirect() {
            return self.append_table(addr, rest, follows, buf);
        }
        let writable = rest.is_writable();
        let segment = self.region.segment(self.mem, addr, rest.len, writable)?;
        buf.push(segment, writable, self.ring.size)
    }

    /// Adds what an indirect table refers to: all its descriptors, in order (VIRTIO 1.3, 2.8.7).
    fn append_table(
        &mut self,
        addr: u64,
        rest: Rest,
        follows: bool,
        buf: &mut ChainBuf,
    ) -> Result<(), ChainError> {
        if !self.ring.indirect {
            return Err(ChainError::IndirectNotNegotiated);
        }
        if rest.has_next() {
            return Err(ChainError::IndirectNext);
        }
        // A chain is of one kind throughout (VIRTIO 1.3, 2.8.5 and 2.8.19).
        if follows {
            return Err(ChainError::IndirectMixed);
        }
        let limit = table_limit(self.ring.size);
        let (table, entries) = Table::find(self.mem, addr, rest.len, limit)?;
        for index in 0..entries {
            let (addr, word) = table.words(self.mem, index)?;
            // WRITE is the only flag here, the rest is to be ignored.
            let entry = Rest::from_word(word);
            let writable = entry.is_writable();
            let segment = self.region.segment(self.mem, addr, entry.len, writable)?;
            buf.push(segment, writable, limit)?;
        }
        Ok(())
    }
}

//! The device side of a split virtqueue: what [`crate::DeviceRing`] does for this format.

use std::ops::ControlFlow;
use std::sync::atomic::{Ordering, fence};

use virtio_queue::{Error as QueueError, Queue, QueueT};
use vm_memory::bitmap::BS;
use vm_memory::{GuestAddress, GuestMemory, Permissions};

use super::desc::Desc;
use super::inflight::Tracking;
use super::layout::{
    self, AVAIL_ALIGN, AVAIL_F_NO_INTERRUPT, FLAGS, IDX, USED_ALIGN, USED_F_NO_NOTIFY,
};
use crate::area::{AreaRef, resolve};
use crate::chain::ChainBuf;
use crate::device::{DESC_ALIGN, RingConfig, reject_overlap};
use crate::error::{Area, ChainError, PopError, RingError};
use crate::inflight::Inflight;
use crate::table::{LastRegion, Table, desc_offset, table_limit};

/// The device's state of one split virtqueue.
#[derive(Debug)]
pub(crate) struct DeviceRing {
    /// Size, addresses, features: fixed while the queue runs.
    geometry: Queue,
    size: u16,
    /// `size - 1`: turns an index into a place in the ring.
    mask: u16,
    event_idx: bool,
    indirect: bool,
    /// Chains up to here were taken.
    next_avail: u16,
    /// Chains up to here are known to be available.
    avail_idx: u16,
    /// Used elements up to here are visible to the driver.
    next_used: u16,
    /// Used elements written behind `next_used`, not yet visible.
    staged: u16,
    /// Chains taken and not yet pushed.
    in_flight: u16,
    /// By head: the chain is in flight.
    held: Box<[bool]>,
    /// By place in the available ring: the head that was taken from there last.
    taken: Box<[u16]>,
    /// Used elements were published before, so that `next_used` tells what the driver was told of.
    published: bool,
    /// What the driver was last told about notifications, if it was told by this owner.
    notifications: Option<bool>,
    /// With EVENT_IDX: the index from which on it was to notify.
    asked_from: u16,
    /// What is noted for an owner that comes after this one.
    tracking: Option<Box<Tracking>>,
}

impl DeviceRing {
    pub(crate) fn new<M: GuestMemory>(config: &RingConfig, mem: &M) -> Result<Self, RingError> {
        let size = config.size;
        let geometry = geometry(config)?;
        let desc = (Area::Descriptors, config.desc_table, desc_offset(size));
        let avail = (Area::Available, config.avail_ring, layout::avail_len(size));
        let used = (Area::Used, config.used_ring, layout::used_len(size));
        // The used ring is the only area that the device writes: it must not share bytes with the others.
        reject_overlap(used, desc)?;
        reject_overlap(used, avail)?;
        let mut ring = Self {
            geometry,
            size,
            mask: size.wrapping_sub(1),
            event_idx: config.event_idx,
            indirect: config.indirect,
            next_avail: config.next_avail,
            avail_idx: config.next_avail,
            next_used: config.next_used,
            staged: 0,
            in_flight: 0,
            held: vec![false; usize::from(size)].into_boxed_slice(),
            taken: vec![0; usize::from(size)].into_boxed_slice(),
            published: false,
            notifications: None,
            asked_from: config.next_avail,
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
        let next_used = ring.session(mem)?.used_index()?;
        let tracking = Tracking::resume(table, config.size, next_used)?;
        let heads = tracking.again.heads();
        for &head in heads {
            if let Some(held) = ring.held.get_mut(usize::from(head)) {
                *held = true;
            }
        }
        ring.in_flight = u16::try_from(heads.len()).unwrap_or(u16::MAX);
        // All that was taken is used or in flight.
        let next_avail = next_used.wrapping_add(ring.in_flight);
        ring.next_avail = next_avail;
        ring.avail_idx = next_avail;
        ring.asked_from = next_avail;
        ring.next_used = next_used;
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
        self.next_avail
    }

    #[inline]
    pub(crate) fn next_used(&self) -> u16 {
        self.next_used
    }

    #[inline]
    pub(crate) fn in_flight(&self) -> u16 {
        self.in_flight
    }

    pub(crate) fn session<'a, M: GuestMemory>(
        &'a mut self,
        mem: &'a M,
    ) -> Result<Session<'a, M>, RingError> {
        let size = self.size;
        let desc = resolve(
            mem,
            Area::Descriptors,
            GuestAddress(self.geometry.desc_table()),
            desc_offset(size),
            Permissions::Read,
        )?;
        let avail = resolve(
            mem,
            Area::Available,
            GuestAddress(self.geometry.avail_ring()),
            layout::avail_len(size),
            Permissions::Read,
        )?;
        let used = resolve(
            mem,
            Area::Used,
            GuestAddress(self.geometry.used_ring()),
            layout::used_len(size),
            Permissions::ReadWrite,
        )?;
        // A front-end chooses where in this process's memory guest memory begins; if that makes an
        // index unaligned, it shows here and not in the middle of a batch.
        avail.load_u16_atomic(IDX, Ordering::Relaxed)?;
        used.load_u16_atomic(IDX, Ordering::Relaxed)?;
        Ok(Session {
            ring: self,
            mem,
            desc,
            avail,
            used,
            region: LastRegion::default(),
        })
    }
}

/// Checks size and alignment, and keeps them with the addresses.
fn geometry(config: &RingConfig) -> Result<Queue, RingError> {
    let misaligned = |area, addr: GuestAddress, align| {
        move |_: QueueError| RingError::Misaligned {
            area,
            addr: addr.0,
            align,
        }
    };
    let (desc, avail, used) = (config.desc_table, config.avail_ring, config.used_ring);
    let mut queue = Queue::new(config.size).map_err(|_| RingError::Size { size: config.size })?;
    queue.try_set_desc_table_address(desc).map_err(misaligned(
        Area::Descriptors,
        desc,
        DESC_ALIGN,
    ))?;
    queue.try_set_avail_ring_address(avail).map_err(misaligned(
        Area::Available,
        avail,
        AVAIL_ALIGN,
    ))?;
    queue
        .try_set_used_ring_address(used)
        .map_err(misaligned(Area::Used, used, USED_ALIGN))?;
    Ok(queue)
}

/// One turn of the device's loop.
pub(crate) struct Session<'a, M: GuestMemory> {
    ring: &'a mut DeviceRing,
    mem: &'a M,
    desc: AreaRef<'a, BS<'a, M::Bitmap>>,
    avail: AreaRef<'a, BS<'a, M::Bitmap>>,
    used: AreaRef<'a, BS<'a, M::Bitmap>>,
    region: LastRegion,
}

impl<'a, M: GuestMemory> Session<'a, M> {
    /// Chains of a former owner that are to be served again.
    #[inline]
    pub(crate) fn unserved(&self) -> u16 {
        self.ring.unserved()
    }

    #[inline]
    pub(crate) fn memory(&self) -> &M {
        self.mem
    }

    /// The used index as it stands in the ring.
    fn used_index(&self) -> Result<u16, RingError> {
        self.used.load_u16_atomic(IDX, Ordering::Acquire)
    }

    /// Chains that are available and not yet taken.
    pub(crate) fn available(&mut self) -> Result<u16, RingError> {
        // Acquire: the ring elements and descriptors up to `idx` are read after it (VIRTIO 1.3, 2.7.13.3).
        let avail_idx = self.avail.load_u16_atomic(IDX, Ordering::Acquire)?;
        let ring = &mut *self.ring;
        let waiting = avail_idx.wrapping_sub(ring.next_avail);
        // The driver has `size` descriptors, and those of a chain whose return it cannot have seen
        // are not its to reuse.
        let room = ring
            .size
            .saturating_sub(ring.in_flight)
            .saturating_sub(ring.staged);
        if waiting > room {
            let next_avail = ring.next_avail;
            return Err(RingError::AvailIndex {
                avail_idx,
                next_avail,
                waiting,
                room,
            });
        }
        ring.avail_idx = avail_idx;
        Ok(waiting)
    }

    /// Takes the next available chain into `buf`, and returns its head. The available index is read only when the
    /// chains known of are used up.
    #[inline(never)]
    pub(crate) fn pop(&mut self, buf: &mut ChainBuf) -> Result<Option<u16>, PopError> {
        let again = self.ring.tracking.as_mut().and_then(|t| t.again.take());
        let head = if let Some((_, head)) = again {
            head
        } else if let Some(head) = self.take()? {
            head
        } else {
            return Ok(None);
        };
        self.gather(head, buf)?;
        Ok(Some(head))
    }

    /// Notes that the next available chain is in flight.
    #[inline]
    fn take(&mut self) -> Result<Option<u16>, RingError> {
        if self.ring.next_avail == self.ring.avail_idx && self.available()? == 0 {
            return Ok(None);
        }
        let place = self.ring.next_avail & self.ring.mask;
        let head = self.avail.load_u16(layout::avail_element(place))?;
        let ring = &mut *self.ring;
        let (Some(held), Some(taken)) = (
            ring.held.get_mut(usize::from(head)),
            ring.taken.get_mut(usize::from(place)),
        ) else {
            let size = ring.size;
            return Err(RingError::Head { head, size });
        };
        if *held {
            return Err(RingError::HeadInFlight { head });
        }
        if let Some(tracking) = &mut ring.tracking {
            tracking.took(head)?;
        }
        *held = true;
        *taken = head;
        ring.next_avail = ring.next_avail.wrapping_add(1);
        ring.in_flight = ring.in_flight.wrapping_add(1);
        Ok(Some(head))
    }

    /// Gives back the last chain taken, as if it had not been; breaks if it was returned already.
    pub(crate) fn rewind(&mut self) -> ControlFlow<()> {
        let ring = &mut *self.ring;
        let is_held = |head: u16| ring.held.get(usize::from(head)) == Some(&true);
        if let Some(tracking) = &mut ring.tracking
            && let Some(done) = tracking.again.rewind(is_held)
        {
            return done;
        }
        let previous = ring.next_avail.wrapping_sub(1);
        // The driver may have written the ring element again, so its head comes from our own notes.
        let head = ring.taken.get(usize::from(previous & ring.mask)).copied();
        let head = head.unwrap_or_default();
        match ring.held.get_mut(usize::from(head)) {
            Some(held) if *held => *held = false,
            _ => return ControlFlow::Break(()),
        }
        if let Some(tracking) = &mut ring.tracking
            && tracking.gave_back(head).is_err()
        {
            return ControlFlow::Break(());
        }
        ring.next_avail = previous;
        ring.in_flight = ring.in_flight.saturating_sub(1);
        ControlFlow::Continue(())
    }

    /// A chain is not in flight any more. Returns what it takes of the used ring: one element.
    #[inline]
    pub(crate) fn retire(&mut self, head: u16) -> Result<u16, RingError> {
        let ring = &mut *self.ring;
        match ring.held.get_mut(usize::from(head)) {
            Some(held) if *held => *held = false,
            _ => return Err(RingError::HeadNotInFlight { head }),
        }
        ring.in_flight = ring.in_flight.saturating_sub(1);
        if let Some(tracking) = &mut ring.tracking {
            tracking.returned(head)?;
        }
        Ok(1)
    }

    /// Writes one used element that stands for `chains` chains, `head` the last of them: the others are
    /// skipped (VIRTIO 1.3, 2.7.9).
    #[inline]
    pub(crate) fn stage(&mut self, head: u16, len: u32, chains: u16) -> Result<(), RingError> {
        let ring = &mut *self.ring;
        let place = ring.next_used.wrapping_add(ring.staged) & ring.mask;
        ring.staged = ring.staged.wrapping_add(chains);
        // struct virtq_used_elem { le32 id; le32 len; } in one store (VIRTIO 1.3, 2.7.8).
        let element = u64::from(head) | (u64::from(len) << 32);
        self.used.store_u64(layout::used_element(place), element)
    }

    /// Makes all staged used elements visible with one store of the used index.
    #[inline]
    pub(crate) fn publish(&mut self) -> Result<bool, RingError> {
        let ring = &mut *self.ring;
        if ring.staged == 0 {
            return Ok(false);
        }
        let old = ring.next_used;
        let new = old.wrapping_add(ring.staged);
        if let Some(tracking) = &mut ring.tracking {
            tracking.publishes()?;
        }
        // Release: the elements, and all the device wrote to buffers, come before the index
        // (VIRTIO 1.3, 2.7.8.2).
        self.used.store_u16_atomic(IDX, new, Ordering::Release)?;
        ring.next_used = new;
        ring.staged = 0;
        if let Some(tracking) = &mut ring.tracking {
            tracking.published(new)?;
        }
        let first = !ring.published;
        ring.published = true;
        // The driver writes its wish, then reads the index; the device the other way round. With a
        // full barrier on both sides at least one sees the other (VIRTIO 1.3, 2.7.7.2).
        fence(Ordering::SeqCst);
        if ring.event_idx {
            let event = self
                .avail
                .load_u16_atomic(layout::used_event(ring.size), Ordering::Relaxed)?;
            // What a former owner told the driver is not known: tell it once too often.
            Ok(first || layout::passes(event, new, old))
        } else {
            let flags = self.avail.load_u16_atomic(FLAGS, Ordering::Relaxed)?;
            Ok(flags & AVAIL_F_NO_INTERRUPT == 0)
        }
    }

    /// Tells the driver that it need not notify (VIRTIO 1.3, 2.7.10).
    pub(crate) fn disable_notifications(&mut self) -> Result<(), RingError> {
        if self.ring.notifications == Some(false) {
            return Ok(());
        }
        let ring = &mut *self.ring;
        if !ring.event_idx {
            self.used
                .store_u16_atomic(FLAGS, USED_F_NO_NOTIFY, Ordering::Relaxed)?;
        } else if ring.avail_idx == ring.asked_from {
            // To leave avail_event where it is does it, unless the driver has yet to pass it: put it behind the driver then.
            let offset = layout::avail_event(ring.size);
            let passed = ring.asked_from.wrapping_sub(1);
            self.used
                .store_u16_atomic(offset, passed, Ordering::Relaxed)?;
        }
        ring.notifications = Some(false);
        Ok(())
    }

    /// Asks the driver to notify from the next chain on.
    pub(crate) fn enable_notifications(&mut self) -> Result<bool, RingError> {
        if self.ring.event_idx {
            let offset = layout::avail_event(self.ring.size);
            self.used
                .store_u16_atomic(offset, self.ring.next_avail, Ordering::Relaxed)?;
            self.ring.asked_from = self.ring.next_avail;
        } else if self.ring.notifications != Some(true) {
            self.used.store_u16_atomic(FLAGS, 0, Ordering::Relaxed)?;
        }
        self.ring.notifications = Some(true);
        // The other half of the barrier in the driver's publication (VIRTIO 1.3, 2.7.13.4.1).
        fence(Ordering::SeqCst);
        Ok(self.available()? != 0)
    }

    /// Gathers the segments of the chain from `head`.
    #[inline]
    fn gather(&mut self, head: u16, buf: &mut ChainBuf) -> Result<(), PopError> {
        let first = self.ring_descriptor(head)?;
        if first.is_indirect() || first.has_next() {
            return self.gather_chain(head, first, buf);
        }
        // A short packet, and most buffers that are received into.
        let writable = first.is_writable();
        let segment = self
            .region
            .segment(self.mem, first.addr, first.len, writable)
            .map_err(|error| PopError::Chain { head, error })?;
        buf.set(segment, writable);
        Ok(())
    }

    /// Walks the chain from its `first` descriptor. At most `size` segments, or as many as a table may have, and one indirect
    /// descriptor are looked at, so that a loop ends.
    fn gather_chain(&mut self, head: u16, first: Desc, buf: &mut ChainBuf) -> Result<(), PopError> {
        buf.clear();
        let bad = |error| PopError::Chain { head, error };
        let size = self.ring.size;
        let mut table: Option<Table<'a, M>> = None;
        let (mut entries, mut longest) = (size, size);
        let mut desc = first;
        loop {
            let index = if desc.is_indirect() {
                if table.is_some() {
                    return Err(bad(ChainError::IndirectNested));
                }
                if !self.ring.indirect {
                    return Err(bad(ChainError::IndirectNotNegotiated));
                }
                if desc.has_next() {
                    return Err(bad(ChainError::IndirectNext));
                }
                // Its WRITE flag is ignored (VIRTIO 1.3, 2.7.5.3.2).
                let (found, count) =
                    Table::find(self.mem, desc.addr, desc.len, table_limit(size)).map_err(bad)?;
                longest = table_limit(size);
                (table, entries) = (Some(found), count);
                0
            } else {
                let writable = desc.is_writable();
                let segment = self.region.segment(self.mem, desc.addr, desc.len, writable);
                buf.push(segment.map_err(bad)?, writable, longest)
                    .map_err(bad)?;
                if !desc.has_next() {
                    return Ok(());
                }
                if desc.next >= entries {
                    return Err(bad(ChainError::Next {
                        next: desc.next,
                        entries,
                    }));
                }
                desc.next
            };
            desc = match &table {
                None => self.ring_descriptor(index)?,
                Some(table) => {
                    let (addr, rest) = table.words(self.mem, index).map_err(bad)?;
                    Desc::from_words(addr, rest)
                }
            };
        }
    }

    #[inline]
    fn ring_descriptor(&self, index: u16) -> Result<Desc, RingError> {
        let (addr, rest) = self.desc.load_u64_pair(desc_offset(index))?;
        Ok(Desc::from_words(addr, rest))
    }
}

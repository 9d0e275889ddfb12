//! The driver side of a packed virtqueue: what [`crate::DriverRing`] does for this format.

use std::sync::atomic::{Ordering, fence};

use vm_memory::bitmap::{BS, BitmapSlice};
use vm_memory::{GuestMemory, Permissions};

use super::desc::{self, DESC_F_INDIRECT, DESC_F_NEXT, Rest};
use super::layout::{Cursor, EVENT_LEN, Event};
use crate::area::{AreaRef, resolve};
use crate::driver::{Batch, DriverLayout, check_chain, flagged};
use crate::error::{Area, DriverError, RingError};
use crate::segment::{Segment, total_len};
use crate::table::desc_offset;

/// A chain the device has, as the driver remembers it.
#[derive(Debug)]
struct Pending<T> {
    token: T,
    /// Descriptors of the ring that it takes.
    count: u16,
    /// How many chains had been added before it.
    number: u16,
    writable_len: u64,
}

/// The driver's state of one packed virtqueue.
#[derive(Debug)]
pub(crate) struct DriverRing<T> {
    layout: DriverLayout,
    event_idx: bool,
    /// The next descriptor to make visible to the device.
    next_avail: Cursor,
    /// Descriptors from there on are written and not yet visible: the second word of the first is here and not
    /// in memory.
    staged: u16,
    first: u64,
    /// Chains among them, and chains ever added.
    staged_chains: u16,
    added: u16,
    /// The next used descriptor to look at.
    last_used: Cursor,
    /// Free descriptors.
    free: u16,
    /// By buffer id: the next free one behind it. In order, the id of a chain is the place of its first
    /// descriptor instead.
    next_id: Box<[u16]>,
    free_id: u16,
    /// By buffer id: the chain given to the device.
    pending: Box<[Option<Pending<T>>]>,
    /// Chains added and not yet collected.
    outstanding: u16,
    /// What the device was last told about interrupts.
    interrupts: bool,
    /// In order: the batch that is being collected.
    batch: Option<Batch>,
}

impl<T> DriverRing<T> {
    pub(crate) fn new<M: GuestMemory>(
        layout: DriverLayout,
        event_idx: bool,
        index: u16,
        mem: &M,
    ) -> Result<Self, DriverError> {
        let size = layout.size;
        let start = Cursor::from_index(index, size)?;
        let mut ring = Self {
            layout,
            event_idx,
            next_avail: start,
            staged: 0,
            first: 0,
            staged_chains: 0,
            added: 0,
            last_used: start,
            free: size,
            next_id: (0..size).map(|i| i.wrapping_add(1)).collect(),
            free_id: 0,
            pending: std::iter::repeat_with(|| None)
                .take(usize::from(size))
                .collect(),
            outstanding: 0,
            interrupts: true,
            batch: None,
        };
        let session = ring.session(mem)?;
        // Zeroes are available in no round, and the driver looks for used ones only where it wrote.
        session.desc.clear()?;
        session.driver_event.clear()?;
        session.device_event.clear()?;
        drop(session);
        Ok(ring)
    }

    pub(crate) fn layout(&self) -> &DriverLayout {
        &self.layout
    }

    #[inline]
    pub(crate) fn free(&self) -> u16 {
        self.free
    }

    #[inline]
    pub(crate) fn outstanding(&self) -> u16 {
        self.outstanding
    }

    pub(crate) fn session<'a, M: GuestMemory>(
        &'a mut self,
        mem: &'a M,
    ) -> Result<DriverSession<'a, T, M>, RingError> {
        let at = &self.layout;
        let find = |area, addr, len| resolve(mem, area, addr, len, Permissions::ReadWrite);
        let desc = find(Area::Descriptors, at.desc_table, desc_offset(at.size))?;
        let driver_event = find(Area::DriverEvent, at.avail_ring, EVENT_LEN)?;
        let device_event = find(Area::DeviceEvent, at.used_ring, EVENT_LEN)?;
        let tables = if at.indirect_entries > 0 {
            let len = desc_offset(at.indirect_entries).wrapping_mul(usize::from(at.size));
            Some(find(Area::IndirectTables, at.indirect_tables, len)?)
        } else {
            None
        };
        desc.load_u64_atomic(0, Ordering::Relaxed)?;
        driver_event.load_u32_atomic(0, Ordering::Relaxed)?;
        device_event.load_u32_atomic(0, Ordering::Relaxed)?;
        Ok(DriverSession {
            ring: self,
            desc,
            driver_event,
            device_event,
            tables,
        })
    }
}

/// One turn of the driver.
pub(crate) struct DriverSession<'a, T, M: GuestMemory> {
    ring: &'a mut DriverRing<T>,
    desc: AreaRef<'a, BS<'a, M::Bitmap>>,
    driver_event: AreaRef<'a, BS<'a, M::Bitmap>>,
    device_event: AreaRef<'a, BS<'a, M::Bitmap>>,
    tables: Option<AreaRef<'a, BS<'a, M::Bitmap>>>,
}

impl<T, M: GuestMemory> DriverSession<'_, T, M> {
    #[inline]
    pub(crate) fn free(&self) -> u16 {
        self.ring.free
    }

    /// Writes a chain of one descriptor per segment.
    #[inline]
    pub(crate) fn add(
        &mut self,
        readable: &[Segment],
        writable: &[Segment],
        token: T,
    ) -> Result<u16, DriverError> {
        let count = check_chain(readable, writable, self.ring.layout.size)?;
        self.reserve(count)?;
        let id = self.next_id();
        let mut left = count;
        for (segment, write) in flagged(readable, writable) {
            left = left.wrapping_sub(1);
            let next = if left > 0 { DESC_F_NEXT } else { 0 };
            self.put(segment.addr.0, segment.len, id, write | next)?;
        }
        self.offer(id, count, total_len(writable), token)
    }

    /// Writes a chain as one descriptor that refers to a table (VIRTIO 1.3, 2.8.7).
    #[inline]
    pub(crate) fn add_indirect(
        &mut self,
        readable: &[Segment],
        writable: &[Segment],
        token: T,
    ) -> Result<u16, DriverError> {
        let entries = self.ring.layout.indirect_entries;
        let count = check_chain(readable, writable, entries)?;
        self.reserve(1)?;
        let Some(tables) = &self.tables else {
            return Err(DriverError::TooLong {
                segments: usize::from(count),
                limit: 0,
            });
        };
        let id = self.next_id();
        // Inside the tables' area: checked to be there for `size` tables.
        let table = desc_offset(entries).wrapping_mul(usize::from(id));
        let mut entry = table;
        for (segment, flags) in flagged(readable, writable) {
            let (len, id) = (segment.len, 0);
            store_desc(tables, entry, segment.addr.0, Rest { len, id, flags })?;
            entry = entry.wrapping_add(desc_offset(1));
        }
        let offset = u64::try_from(table).unwrap_or(u64::MAX);
        let addr = self.ring.layout.indirect_tables.0.wrapping_add(offset);
        let len = u32::try_from(desc_offset(count)).unwrap_or(u32::MAX);
        self.put(addr, len, id, DESC_F_INDIRECT)?;
        self.offer(id, 1, total_len(writable), token)
    }

    #[inline]
    fn reserve(&self, needed: u16) -> Result<(), DriverError> {
        let free = self.ring.free;
        if needed > free {
            return Err(DriverError::Full { needed, free });
        }
        Ok(())
    }

    /// The id of the next chain.
    #[inline]
    fn next_id(&self) -> u16 {
        let ring = &*self.ring;
        if ring.layout.in_order {
            ring.next_avail.after(ring.staged, ring.layout.size).at()
        } else {
            ring.free_id
        }
    }

    /// Writes the next descriptor of the ring.
    #[inline]
    fn put(&mut self, addr: u64, len: u32, id: u16, flags: u16) -> Result<(), RingError> {
        let ring = &mut *self.ring;
        let cursor = ring.next_avail.after(ring.staged, ring.layout.size);
        let offset = desc_offset(cursor.at());
        let flags = flags | desc::available(cursor);
        let rest = Rest { len, id, flags };
        if ring.staged == 0 {
            ring.first = rest.to_word();
            self.desc.store_u64(offset, addr)?;
        } else {
            store_desc(&self.desc, offset, addr, rest)?;
        }
        ring.staged = ring.staged.wrapping_add(1);
        Ok(())
    }

    /// Notes a chain whose descriptors are written.
    #[inline]
    fn offer(
        &mut self,
        id: u16,
        count: u16,
        writable_len: u64,
        token: T,
    ) -> Result<u16, DriverError> {
        let ring = &mut *self.ring;
        let place = usize::from(id);
        if !ring.layout.in_order {
            ring.free_id = ring.next_id.get(place).copied().unwrap_or(0);
        }
        if let Some(slot) = ring.pending.get_mut(place) {
            *slot = Some(Pending {
                token,
                count,
                number: ring.added,
                writable_len,
            });
        }
        ring.free = ring.free.saturating_sub(count);
        ring.added = ring.added.wrapping_add(1);
        ring.staged_chains = ring.staged_chains.wrapping_add(1);
        ring.outstanding = ring.outstanding.wrapping_add(1);
        Ok(id)
    }

    /// Makes all added chains visible with the first descriptor of them.
    #[inline]
    pub(crate) fn publish(&mut self) -> Result<bool, RingError> {
        let ring = &mut *self.ring;
        if ring.staged == 0 {
            return Ok(false);
        }
        let (old, size) = (ring.next_avail, ring.layout.size);
        let moved = ring.staged;
        // Release: the descriptors behind it come before it (VIRTIO 1.3, 2.8.21.1.1).
        let offset = desc_offset(old.at()).wrapping_add(8);
        self.desc
            .store_u64_atomic(offset, ring.first, Ordering::Release)?;
        ring.next_avail = old.after(moved, size);
        ring.staged = 0;
        ring.staged_chains = 0;
        // Descriptor first, then the device's wish, as the device does it the other way round
        // (VIRTIO 1.3, 2.8.21.3.1).
        fence(Ordering::SeqCst);
        let bits = self.device_event.load_u32_atomic(0, Ordering::Relaxed)?;
        Ok(Event::from_bits(bits, ring.event_idx).wants(old, moved, size))
    }

    /// Collects the next chain the device has used.
    #[inline]
    pub(crate) fn poll_used(&mut self) -> Result<Option<(T, u32)>, DriverError> {
        let batch = match self.ring.batch {
            Some(batch) => batch,
            None => match self.used()? {
                Some(batch) => batch,
                None => return Ok(None),
            },
        };
        if !self.ring.layout.in_order {
            return self.collect(batch.id, Some(batch.len)).map(Some);
        }
        // In order it is about the oldest chain, and all up to the one that it names (VIRTIO 1.3, 2.8.8).
        let oldest = self.ring.last_used.at();
        let last = oldest == batch.id;
        self.ring.batch = if last { None } else { Some(batch) };
        self.collect(oldest, last.then_some(batch.len)).map(Some)
    }

    /// The next used descriptor, if the device has something to return. It names a chain that the device has.
    #[inline]
    fn used(&self) -> Result<Option<Batch>, DriverError> {
        let ring = &*self.ring;
        if ring.outstanding == ring.staged_chains {
            return Ok(None);
        }
        let cursor = ring.last_used;
        // Acquire: buffers are read after it (VIRTIO 1.3, 2.8.22).
        let offset = desc_offset(cursor.at()).wrapping_add(8);
        let rest = Rest::from_word(self.desc.load_u64_atomic(offset, Ordering::Acquire)?);
        if !rest.is_used(cursor) {
            return Ok(None);
        }
        let id = rest.id;
        let known = ring.pending.get(usize::from(id)).and_then(Option::as_ref);
        // Chains that the device cannot see yet are the last that were added.
        let visible =
            |chain: &Pending<T>| ring.added.wrapping_sub(chain.number) > ring.staged_chains;
        if !known.is_some_and(visible) {
            return Err(DriverError::UsedId { id: id.into() });
        }
        // Without the flag `len` is reserved (VIRTIO 1.3, 2.8.4).
        let len = if rest.is_writable() { rest.len } else { 0 };
        Ok(Some(Batch { id, len }))
    }

    /// Takes a chain back. Without `len` all was written that can be.
    #[inline]
    fn collect(&mut self, id: u16, len: Option<u32>) -> Result<(T, u32), DriverError> {
        let ring = &mut *self.ring;
        let unknown = || DriverError::UsedId { id: id.into() };
        let place = usize::from(id);
        let slot = ring.pending.get_mut(place).ok_or_else(unknown)?;
        let room = slot.as_ref().ok_or_else(unknown)?.writable_len;
        let len = len.unwrap_or(u32::try_from(room).unwrap_or(u32::MAX));
        if u64::from(len) > room {
            let head = id;
            return Err(DriverError::UsedLen { head, len, room });
        }
        let Some(Pending { token, count, .. }) = slot.take() else {
            return Err(unknown());
        };
        if !ring.layout.in_order {
            if let Some(next) = ring.next_id.get_mut(place) {
                *next = ring.free_id;
            }
            ring.free_id = id;
        }
        ring.free = ring.free.saturating_add(count);
        ring.outstanding = ring.outstanding.saturating_sub(1);
        ring.last_used = ring.last_used.after(count, ring.layout.size);
        Ok((token, len))
    }

    /// Tells the device that it need not interrupt (VIRTIO 1.3, 2.8.10).
    pub(crate) fn disable_interrupts(&mut self) -> Result<(), RingError> {
        if self.ring.interrupts {
            self.driver_event
                .store_u32_atomic(0, Event::Disable.to_bits(), Ordering::Relaxed)?;
        }
        self.ring.interrupts = false;
        Ok(())
    }

    /// Asks the device to interrupt from the next used chain on.
    pub(crate) fn enable_interrupts(&mut self) -> Result<bool, DriverError> {
        let ring = &*self.ring;
        let event = if ring.event_idx {
            Some(Event::Desc(ring.last_used))
        } else if ring.interrupts {
            None
        } else {
            Some(Event::Enable)
        };
        if let Some(event) = event {
            self.driver_event
                .store_u32_atomic(0, event.to_bits(), Ordering::Relaxed)?;
        }
        self.ring.interrupts = true;
        // The other half of the barrier in the device's publication (VIRTIO 1.3, 2.8.22).
        fence(Ordering::SeqCst);
        Ok(self.ring.batch.is_some() || self.used()?.is_some())
    }
}

#[inline]
fn store_desc<B: BitmapSlice>(
    area: &AreaRef<'_, B>,
    offset: usize,
    addr: u64,
    rest: Rest,
) -> Result<(), RingError> {
    area.store_u64(offset, addr)?;
    area.store_u64(offset.wrapping_add(8), rest.to_word())
}

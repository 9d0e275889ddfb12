//! The driver side of a split virtqueue: what [`crate::DriverRing`] does for this format.

use std::sync::atomic::{Ordering, fence};

use vm_memory::bitmap::BS;
use vm_memory::{GuestMemory, Permissions};

use super::desc::Desc;
use super::layout::{
    self, AVAIL_F_NO_INTERRUPT, DESC_F_INDIRECT, DESC_F_NEXT, FLAGS, IDX, USED_F_NO_NOTIFY,
};
use crate::area::{AreaRef, resolve};
use crate::driver::{Batch, DriverLayout, check_chain, flagged};
use crate::error::{Area, DriverError, RingError};
use crate::segment::{Segment, total_len};
use crate::table::{DESC_SIZE, desc_offset};

/// A chain the device has, as the driver remembers it.
#[derive(Debug)]
struct Pending<T> {
    token: T,
    /// The last descriptor of the chain, and how many it has.
    last: u16,
    count: u16,
    writable_len: u64,
}

/// The driver's state of one split virtqueue.
#[derive(Debug)]
pub(crate) struct DriverRing<T> {
    layout: DriverLayout,
    /// `size - 1`: turns an index into a place in the ring.
    mask: u16,
    event_idx: bool,
    /// By descriptor: the one that follows it, in its chain or among the free ones.
    next: Box<[u16]>,
    free_head: u16,
    free: u16,
    /// By head: the chain given to the device.
    pending: Box<[Option<Pending<T>>]>,
    /// Chains added and not yet collected.
    outstanding: u16,
    /// Chains up to here are visible to the device.
    avail_idx: u16,
    /// Chains written behind `avail_idx`, not yet visible.
    staged: u16,
    /// Used elements up to here were collected.
    last_used: u16,
    /// Used elements up to here are known of.
    used_idx: u16,
    /// What the device was last told about interrupts.
    interrupts: bool,
    /// In order: the head of the oldest chain, and the batch that is being collected.
    oldest: u16,
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
        let mut ring = Self {
            layout,
            mask: size.wrapping_sub(1),
            event_idx,
            // In order, chains follow each other in the table and around its end (VIRTIO 1.3, 2.7.5).
            next: (1..size).chain([0]).collect(),
            free_head: 0,
            free: size,
            pending: std::iter::repeat_with(|| None)
                .take(usize::from(size))
                .collect(),
            outstanding: 0,
            avail_idx: index,
            staged: 0,
            last_used: index,
            used_idx: index,
            interrupts: true,
            oldest: 0,
            batch: None,
        };
        let session = ring.session(mem)?;
        session.desc.clear()?;
        session.avail.clear()?;
        session.used.clear()?;
        session.avail.store_u16(IDX, index)?;
        session.avail.store_u16(layout::used_event(size), index)?;
        session.used.store_u16(IDX, index)?;
        session.used.store_u16(layout::avail_event(size), index)?;
        drop(session);
        Ok(ring)
    }

    pub(crate) fn layout(&self) -> &DriverLayout {
        &self.layout
    }

    /// Free descriptors.
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
        let find = |area, addr, len, access| resolve(mem, area, addr, len, access);
        let desc = find(
            Area::Descriptors,
            at.desc_table,
            desc_offset(at.size),
            Permissions::ReadWrite,
        )?;
        let avail = find(
            Area::Available,
            at.avail_ring,
            layout::avail_len(at.size),
            Permissions::ReadWrite,
        )?;
        let used = find(
            Area::Used,
            at.used_ring,
            layout::used_len(at.size),
            Permissions::ReadWrite,
        )?;
        let tables = if at.indirect_entries > 0 {
            let len = desc_offset(at.indirect_entries).wrapping_mul(usize::from(at.size));
            let addr = at.indirect_tables;
            Some(find(
                Area::IndirectTables,
                addr,
                len,
                Permissions::ReadWrite,
            )?)
        } else {
            None
        };
        avail.load_u16_atomic(IDX, Ordering::Relaxed)?;
        used.load_u16_atomic(IDX, Ordering::Relaxed)?;
        Ok(DriverSession {
            ring: self,
            desc,
            avail,
            used,
            tables,
        })
    }
}

/// The descriptor of one segment of a chain, with the place of the one behind it.
#[inline]
fn part(segment: Segment, write: u16, next: Option<u16>) -> Desc {
    let link = if next.is_some() { DESC_F_NEXT } else { 0 };
    Desc {
        addr: segment.addr.0,
        len: segment.len,
        flags: write | link,
        next: next.unwrap_or(0),
    }
}

/// One turn of the driver on one virtqueue. Dropping it loses nothing.
pub(crate) struct DriverSession<'a, T, M: GuestMemory> {
    ring: &'a mut DriverRing<T>,
    desc: AreaRef<'a, BS<'a, M::Bitmap>>,
    avail: AreaRef<'a, BS<'a, M::Bitmap>>,
    used: AreaRef<'a, BS<'a, M::Bitmap>>,
    tables: Option<AreaRef<'a, BS<'a, M::Bitmap>>>,
}

impl<T, M: GuestMemory> DriverSession<'_, T, M> {
    /// Free descriptors.
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
        let (head, free) = (self.ring.free_head, self.ring.free);
        if count > free {
            return Err(DriverError::Full {
                needed: count,
                free,
            });
        }
        let mut index = head;
        let mut last = head;
        let mut left = count;
        for (segment, write) in flagged(readable, writable) {
            let next = self.following(index)?;
            left = left.wrapping_sub(1);
            let desc = part(segment, write, (left > 0).then_some(next));
            store_desc(&self.desc, desc_offset(index), desc)?;
            last = index;
            index = next;
        }
        let writable_len = total_len(writable);
        self.offer(
            head,
            Pending {
                token,
                last,
                count,
                writable_len,
            },
            index,
        )
    }

    /// Writes a chain as one descriptor that refers to a table (VIRTIO 1.3, 2.7.5.3).
    #[inline]
    pub(crate) fn add_indirect(
        &mut self,
        readable: &[Segment],
        writable: &[Segment],
        token: T,
    ) -> Result<u16, DriverError> {
        let entries = self.ring.layout.indirect_entries;
        let count = check_chain(readable, writable, entries)?;
        let (head, free) = (self.ring.free_head, self.ring.free);
        if free == 0 {
            return Err(DriverError::Full { needed: 1, free });
        }
        let Some(tables) = &self.tables else {
            return Err(DriverError::TooLong {
                segments: usize::from(count),
                limit: 0,
            });
        };
        // Inside the tables' area: checked to be there for `size` tables.
        let table = desc_offset(entries).wrapping_mul(usize::from(head));
        let mut entry = 0_u16;
        for (segment, write) in flagged(readable, writable) {
            let next = entry.wrapping_add(1);
            let desc = part(segment, write, (next < count).then_some(next));
            store_desc(tables, table.wrapping_add(desc_offset(entry)), desc)?;
            entry = next;
        }
        let offset = u64::try_from(table).unwrap_or(u64::MAX);
        let desc = Desc {
            addr: self.ring.layout.indirect_tables.0.wrapping_add(offset),
            len: u32::from(count).wrapping_mul(DESC_SIZE_U32),
            flags: DESC_F_INDIRECT,
            next: 0,
        };
        store_desc(&self.desc, desc_offset(head), desc)?;
        let next = self.following(head)?;
        let writable_len = total_len(writable);
        self.offer(
            head,
            Pending {
                token,
                last: head,
                count: 1,
                writable_len,
            },
            next,
        )
    }

    /// Makes all added chains visible with one store of the available index.
    #[inline]
    pub(crate) fn publish(&mut self) -> Result<bool, RingError> {
        let ring = &mut *self.ring;
        if ring.staged == 0 {
            return Ok(false);
        }
        let old = ring.avail_idx;
        let new = old.wrapping_add(ring.staged);
        // Release: descriptors and ring elements come before the index (VIRTIO 1.3, 2.7.13.3.1).
        self.avail.store_u16_atomic(IDX, new, Ordering::Release)?;
        ring.avail_idx = new;
        ring.staged = 0;
        // Index first, then the device's wish, as the device does it the other way round
        // (VIRTIO 1.3, 2.7.13.4.1).
        fence(Ordering::SeqCst);
        if ring.event_idx {
            let offset = layout::avail_event(ring.layout.size);
            let event = self.used.load_u16_atomic(offset, Ordering::Relaxed)?;
            Ok(layout::passes(event, new, old))
        } else {
            let flags = self.used.load_u16_atomic(FLAGS, Ordering::Relaxed)?;
            Ok(flags & USED_F_NO_NOTIFY == 0)
        }
    }

    /// Collects the next chain the device has used. The used index is read only when the elements known of
    /// are used up.
    #[inline]
    pub(crate) fn poll_used(&mut self) -> Result<Option<(T, u32)>, DriverError> {
        if self.ring.last_used == self.ring.used_idx && self.returned()? == 0 {
            return Ok(None);
        }
        if self.ring.layout.in_order {
            return self.poll_batch();
        }
        let (id, len) = self.used_element()?;
        let head = u16::try_from(id).map_err(|_| DriverError::UsedId { id })?;
        self.collect(head, Some(len)).map(Some)
    }

    /// `id` and `len` of the next used element.
    #[inline]
    fn used_element(&self) -> Result<(u32, u32), RingError> {
        let place = self.ring.last_used & self.ring.mask;
        let element = self.used.load_u64(layout::used_element(place))?;
        let [i0, i1, i2, i3, l0, l1, l2, l3] = element.to_le_bytes();
        let id = u32::from_le_bytes([i0, i1, i2, i3]);
        let len = u32::from_le_bytes([l0, l1, l2, l3]);
        Ok((id, len))
    }

    /// Collects the oldest chain: an element is about a batch of them (VIRTIO 1.3, 2.7.9). Apart, so that it
    /// does not weigh on queues used in any order.
    #[inline(never)]
    fn poll_batch(&mut self) -> Result<Option<(T, u32)>, DriverError> {
        let batch = match self.ring.batch {
            Some(batch) => batch,
            None => {
                let (id, len) = self.used_element()?;
                let id = u16::try_from(id).map_err(|_| DriverError::UsedId { id })?;
                Batch { id, len }
            }
        };
        let oldest = self.ring.oldest;
        let last = oldest == batch.id;
        self.ring.batch = if last { None } else { Some(batch) };
        let collected = self.collect(oldest, last.then_some(batch.len))?;
        // The used index covers the whole batch.
        if !last && self.ring.last_used == self.ring.used_idx {
            let id = batch.id.into();
            return Err(DriverError::UsedId { id });
        }
        Ok(Some(collected))
    }

    /// Takes a chain back. Without `len` all was written that can be.
    #[inline]
    fn collect(&mut self, head: u16, len: Option<u32>) -> Result<(T, u32), DriverError> {
        let ring = &mut *self.ring;
        let unknown = || DriverError::UsedId { id: head.into() };
        let slot = ring
            .pending
            .get_mut(usize::from(head))
            .ok_or_else(unknown)?;
        let room = slot.as_ref().ok_or_else(unknown)?.writable_len;
        let len = len.unwrap_or(u32::try_from(room).unwrap_or(u32::MAX));
        if u64::from(len) > room {
            return Err(DriverError::UsedLen { head, len, room });
        }
        let Some(Pending {
            token, last, count, ..
        }) = slot.take()
        else {
            return Err(unknown());
        };
        if ring.layout.in_order {
            ring.oldest = ring.oldest.wrapping_add(count) & ring.mask;
        } else {
            if let Some(next) = ring.next.get_mut(usize::from(last)) {
                *next = ring.free_head;
            }
            ring.free_head = head;
        }
        ring.free = ring.free.saturating_add(count);
        ring.outstanding = ring.outstanding.saturating_sub(1);
        ring.last_used = ring.last_used.wrapping_add(1);
        Ok((token, len))
    }

    /// Tells the device that it need not interrupt (VIRTIO 1.3, 2.7.7).
    pub(crate) fn disable_interrupts(&mut self) -> Result<(), RingError> {
        // With EVENT_IDX leaving used_event where it is does it: the device passed it already.
        if !self.ring.event_idx && self.ring.interrupts {
            self.avail
                .store_u16_atomic(FLAGS, AVAIL_F_NO_INTERRUPT, Ordering::Relaxed)?;
        }
        self.ring.interrupts = false;
        Ok(())
    }

    /// Asks the device to interrupt from the next used chain on.
    pub(crate) fn enable_interrupts(&mut self) -> Result<bool, DriverError> {
        if self.ring.event_idx {
            let offset = layout::used_event(self.ring.layout.size);
            self.avail
                .store_u16_atomic(offset, self.ring.last_used, Ordering::Relaxed)?;
        } else if !self.ring.interrupts {
            self.avail.store_u16_atomic(FLAGS, 0, Ordering::Relaxed)?;
        }
        self.ring.interrupts = true;
        // The other half of the barrier in the device's publication (VIRTIO 1.3, 2.7.7.2).
        fence(Ordering::SeqCst);
        Ok(self.returned()? != 0)
    }

    /// Reads the used index: how many chains the device has returned and nobody has collected.
    fn returned(&mut self) -> Result<u16, DriverError> {
        // Acquire: used elements and buffers are read after it (VIRTIO 1.3, 2.7.14).
        let used_idx = self.used.load_u16_atomic(IDX, Ordering::Acquire)?;
        let ring = &mut *self.ring;
        let last_used = ring.last_used;
        let returned = used_idx.wrapping_sub(last_used);
        let held = ring.outstanding.saturating_sub(ring.staged);
        if returned > held {
            return Err(DriverError::UsedIndex {
                used_idx,
                last_used,
                returned,
                held,
            });
        }
        ring.used_idx = used_idx;
        Ok(returned)
    }

    /// The descriptor after `index` in its list.
    #[inline]
    fn following(&self, index: u16) -> Result<u16, RingError> {
        let size = self.ring.layout.size;
        let next = self.ring.next.get(usize::from(index));
        next.copied().ok_or(RingError::Head { head: index, size })
    }

    /// Takes the descriptors of a chain off the free list and puts its head into the available ring.
    #[inline]
    fn offer(
        &mut self,
        head: u16,
        pending: Pending<T>,
        free_head: u16,
    ) -> Result<u16, DriverError> {
        let ring = &mut *self.ring;
        let place = ring.avail_idx.wrapping_add(ring.staged) & ring.mask;
        self.avail.store_u16(layout::avail_element(place), head)?;
        ring.free_head = free_head;
        ring.free = ring.free.saturating_sub(pending.count);
        if let Some(slot) = ring.pending.get_mut(usize::from(head)) {
            *slot = Some(pending);
        }
        ring.staged = ring.staged.wrapping_add(1);
        ring.outstanding = ring.outstanding.wrapping_add(1);
        Ok(head)
    }
}

/// Size of one descriptor in bytes, as a length field holds it.
const DESC_SIZE_U32: u32 = 16;
const _: () = assert!(DESC_SIZE == 16);

#[inline]
fn store_desc<B: vm_memory::bitmap::BitmapSlice>(
    area: &AreaRef<'_, B>,
    offset: usize,
    desc: Desc,
) -> Result<(), RingError> {
    let (first, second) = desc.to_words();
    area.store_u64(offset, first)?;
    area.store_u64(offset.wrapping_add(8), second)
}

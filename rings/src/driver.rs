//! The driver side of a split virtqueue: the other half, for tests, benchmarks and load generators,
//! and for a program that is itself a vhost-user front-end.
//!
//! [`DriverRing`] is the state, [`DriverSession`] one turn with the areas resolved to this
//! process's memory. The device on the other side is not trusted either: what the driver needs to
//! know again it keeps for itself and never reads back from the descriptor table.
//!
//! ```text
//! add … add ──▶ publish ─▶ true: notify the device
//!                  │
//!   interrupt ──▶ disable_interrupts ──▶ poll_used … poll_used (None) ──▶ enable_interrupts
//!                          ▲                                               │ true    │ false
//!                          └───────────────────────────────────────────────┘         ▼ sleep
//! ```

use std::sync::atomic::{Ordering, fence};

use vm_memory::bitmap::BS;
use vm_memory::{GuestAddress, GuestMemory, Permissions};

use crate::area::{AreaRef, resolve};
use crate::desc::Desc;
use crate::device::RingConfig;
use crate::error::{Area, DriverError, RingError};
use crate::layout::{
    self, AVAIL_F_NO_INTERRUPT, CACHE_LINE, DESC_ALIGN, DESC_F_INDIRECT, DESC_F_NEXT, DESC_F_WRITE,
    DESC_SIZE, FLAGS, IDX, MAX_SIZE, USED_F_NO_NOTIFY,
};
use crate::segment::{Segment, total_len};

/// Most bytes in a chain (VIRTIO 1.3, 2.7.5.2).
const MAX_BYTES: u64 = 1 << 32;

/// Where a driver puts its virtqueue in guest memory: descriptor table, available ring, used ring
/// and, for indirect chains, one table per descriptor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DriverLayout {
    size: u16,
    indirect_entries: u16,
    desc_table: GuestAddress,
    avail_ring: GuestAddress,
    used_ring: GuestAddress,
    indirect_tables: GuestAddress,
    end: GuestAddress,
}

impl DriverLayout {
    /// Lays out a queue of `size` descriptors from guest-physical address `base` on. With
    /// `indirect_entries` above 0, chains of up to that many segments can be added as indirect ones.
    ///
    /// # Errors
    /// [`RingError::Size`] if the size is not a power of two up to 32768, [`RingError::Misaligned`]
    /// if `base` is not aligned to 16 bytes, [`DriverError::TooLong`] if an indirect table would have
    /// more entries than the queue, [`DriverError::Layout`] if the address space ends too soon.
    pub fn new(base: GuestAddress, size: u16, indirect_entries: u16) -> Result<Self, DriverError> {
        if !size.is_power_of_two() || size > MAX_SIZE {
            return Err(RingError::Size { size }.into());
        }
        if !base.0.is_multiple_of(DESC_ALIGN) {
            let (area, addr, align) = (Area::Descriptors, base.0, DESC_ALIGN);
            return Err(RingError::Misaligned { area, addr, align }.into());
        }
        // VIRTIO 1.3, 2.7.5.3.1.
        if indirect_entries > size {
            let segments = usize::from(indirect_entries);
            return Err(DriverError::TooLong {
                segments,
                limit: size,
            });
        }
        let after = |start: u64, len: usize| {
            u64::try_from(len)
                .ok()
                .and_then(|len| start.checked_add(len))
                .and_then(|end| end.checked_next_multiple_of(CACHE_LINE))
        };
        let ends = || {
            let avail = base
                .0
                .checked_add(u64::try_from(layout::desc_len(size)).ok()?)?;
            // The used ring begins on a cache line of its own: the other side writes it.
            let used = after(avail, layout::avail_len(size))?;
            let tables = after(used, layout::used_len(size))?;
            let one_table = layout::desc_len(indirect_entries);
            let end = after(tables, one_table.checked_mul(usize::from(size))?)?;
            Some((avail, used, tables, end))
        };
        let (avail, used, tables, end) =
            ends().ok_or(DriverError::Layout { base: base.0, size })?;
        Ok(Self {
            size,
            indirect_entries,
            desc_table: base,
            avail_ring: GuestAddress(avail),
            used_ring: GuestAddress(used),
            indirect_tables: GuestAddress(tables),
            end: GuestAddress(end),
        })
    }

    /// Queue size in descriptors.
    #[must_use]
    pub fn size(&self) -> u16 {
        self.size
    }

    /// Guest-physical address of the descriptor table.
    #[must_use]
    pub fn desc_table(&self) -> GuestAddress {
        self.desc_table
    }

    /// Guest-physical address of the available ring.
    #[must_use]
    pub fn avail_ring(&self) -> GuestAddress {
        self.avail_ring
    }

    /// Guest-physical address of the used ring.
    #[must_use]
    pub fn used_ring(&self) -> GuestAddress {
        self.used_ring
    }

    /// The first guest-physical address behind all areas.
    #[must_use]
    pub fn end(&self) -> GuestAddress {
        self.end
    }

    /// What the device side is told of a fresh queue laid out like this.
    #[must_use]
    pub fn config(&self, event_idx: bool) -> RingConfig {
        RingConfig {
            size: self.size,
            desc_table: self.desc_table,
            avail_ring: self.avail_ring,
            used_ring: self.used_ring,
            event_idx,
            indirect: self.indirect_entries > 0,
            next_avail: 0,
            next_used: 0,
        }
    }
}

/// A chain the device has, as the driver remembers it.
#[derive(Debug)]
struct Pending<T> {
    token: T,
    /// The last descriptor of the chain, and how many it has.
    last: u16,
    count: u16,
    writable_len: u64,
}

/// The driver's state of one split virtqueue. `T` is what the driver knows a request by: it is
/// handed in with a chain and comes back when the device has used it.
#[derive(Debug)]
pub struct DriverRing<T> {
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
}

impl<T> DriverRing<T> {
    /// Clears the areas in `mem` and begins a fresh queue there. Interrupts are on. All that the
    /// ring will ever need is allocated here.
    ///
    /// # Errors
    /// [`DriverError::Ring`] if an area does not lie in `mem` in one piece.
    pub fn new<M: GuestMemory>(
        layout: DriverLayout,
        event_idx: bool,
        mem: &M,
    ) -> Result<Self, DriverError> {
        Self::starting_at(layout, event_idx, 0, mem)
    }

    /// Like [`new`](Self::new), for a queue whose both indices already stand at `index`, as on one that
    /// has been running and is idle. The device side begins with `next_avail` and `next_used` there.
    ///
    /// # Errors
    /// [`DriverError::Ring`] if an area does not lie in `mem` in one piece.
    pub fn starting_at<M: GuestMemory>(
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
            next: (0..size).map(|i| i.wrapping_add(1)).collect(),
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

    /// Where the queue lies.
    #[must_use]
    pub fn layout(&self) -> &DriverLayout {
        &self.layout
    }

    /// Free descriptors.
    #[inline]
    #[must_use]
    pub fn free(&self) -> u16 {
        self.free
    }

    /// Chains added and not yet collected.
    #[inline]
    #[must_use]
    pub fn outstanding(&self) -> u16 {
        self.outstanding
    }

    /// Resolves the ring's areas in `mem` for one turn.
    ///
    /// # Errors
    /// [`RingError`] if an area does not lie in `mem` in one piece, at the alignment it needs.
    pub fn session<'a, M: GuestMemory>(
        &'a mut self,
        mem: &'a M,
    ) -> Result<DriverSession<'a, T, M>, RingError> {
        let at = &self.layout;
        let find = |area, addr, len, access| resolve(mem, area, addr, len, access);
        let desc = find(
            Area::Descriptors,
            at.desc_table,
            layout::desc_len(at.size),
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
            let len = layout::desc_len(at.indirect_entries).wrapping_mul(usize::from(at.size));
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

/// One turn of the driver on one virtqueue. Dropping it loses nothing.
pub struct DriverSession<'a, T, M: GuestMemory> {
    ring: &'a mut DriverRing<T>,
    desc: AreaRef<'a, BS<'a, M::Bitmap>>,
    avail: AreaRef<'a, BS<'a, M::Bitmap>>,
    used: AreaRef<'a, BS<'a, M::Bitmap>>,
    tables: Option<AreaRef<'a, BS<'a, M::Bitmap>>>,
}

/// Segments of a chain in order, each with its WRITE flag.
fn flagged<'s>(
    readable: &'s [Segment],
    writable: &'s [Segment],
) -> impl Iterator<Item = (Segment, u16)> + 's {
    let readable = readable.iter().map(|&s| (s, 0));
    readable.chain(writable.iter().map(|&s| (s, DESC_F_WRITE)))
}

impl<T, M: GuestMemory> DriverSession<'_, T, M> {
    /// Free descriptors.
    #[inline]
    #[must_use]
    pub fn free(&self) -> u16 {
        self.ring.free
    }

    /// Writes a chain of one descriptor per segment. The device sees it after
    /// [`publish`](Self::publish). Returns the number of its head descriptor.
    ///
    /// # Errors
    /// [`DriverError::Full`] if too few descriptors are free; the ring is then as before.
    #[inline]
    pub fn add(
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
            let desc = if left > 0 {
                Desc {
                    addr: segment.addr.0,
                    len: segment.len,
                    flags: write | DESC_F_NEXT,
                    next,
                }
            } else {
                Desc {
                    addr: segment.addr.0,
                    len: segment.len,
                    flags: write,
                    next: 0,
                }
            };
            store_desc(&self.desc, layout::desc_offset(index), desc)?;
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

    /// Writes a chain as one descriptor that refers to a table (VIRTIO 1.3, 2.7.5.3). Returns the number
    /// of its head descriptor.
    ///
    /// # Errors
    /// [`DriverError::Full`] if no descriptor is free, [`DriverError::TooLong`] if the layout's tables
    /// have too few entries; the ring is then as before.
    #[inline]
    pub fn add_indirect(
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
        let table = layout::desc_len(entries).wrapping_mul(usize::from(head));
        let mut entry = 0_u16;
        for (segment, write) in flagged(readable, writable) {
            let next = entry.wrapping_add(1);
            let desc = if next < count {
                Desc {
                    addr: segment.addr.0,
                    len: segment.len,
                    flags: write | DESC_F_NEXT,
                    next,
                }
            } else {
                Desc {
                    addr: segment.addr.0,
                    len: segment.len,
                    flags: write,
                    next: 0,
                }
            };
            store_desc(tables, table.wrapping_add(layout::desc_offset(entry)), desc)?;
            entry = next;
        }
        let offset = u64::try_from(table).unwrap_or(u64::MAX);
        let desc = Desc {
            addr: self.ring.layout.indirect_tables.0.wrapping_add(offset),
            len: u32::from(count).wrapping_mul(DESC_SIZE_U32),
            flags: DESC_F_INDIRECT,
            next: 0,
        };
        store_desc(&self.desc, layout::desc_offset(head), desc)?;
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

    /// Makes all added chains visible with one store of the available index. Returns whether the
    /// device wants to be notified of them; `false` when there were none.
    ///
    /// # Errors
    /// [`RingError::Access`] only if guest memory is not what it was when the session began.
    #[inline]
    pub fn publish(&mut self) -> Result<bool, RingError> {
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

    /// Collects the next chain the device has used: its token, and how many bytes the device wrote
    /// into its writable segments. The used index is read only when the elements known of are used up.
    ///
    /// # Errors
    /// [`DriverError::UsedIndex`], [`DriverError::UsedId`] or [`DriverError::UsedLen`] if the device
    /// misbehaves; the queue is then broken.
    #[inline]
    pub fn poll_used(&mut self) -> Result<Option<(T, u32)>, DriverError> {
        if self.ring.last_used == self.ring.used_idx && self.returned()? == 0 {
            return Ok(None);
        }
        let place = self.ring.last_used & self.ring.mask;
        let element = self.used.load_u64(layout::used_element(place))?;
        let [i0, i1, i2, i3, l0, l1, l2, l3] = element.to_le_bytes();
        let id = u32::from_le_bytes([i0, i1, i2, i3]);
        let len = u32::from_le_bytes([l0, l1, l2, l3]);

        let ring = &mut *self.ring;
        let unknown = || DriverError::UsedId { id };
        let head = u16::try_from(id).map_err(|_| unknown())?;
        let slot = ring
            .pending
            .get_mut(usize::from(head))
            .ok_or_else(unknown)?;
        let room = slot.as_ref().ok_or_else(unknown)?.writable_len;
        if u64::from(len) > room {
            return Err(DriverError::UsedLen { head, len, room });
        }
        let Some(Pending {
            token, last, count, ..
        }) = slot.take()
        else {
            return Err(unknown());
        };
        if let Some(next) = ring.next.get_mut(usize::from(last)) {
            *next = ring.free_head;
        }
        ring.free_head = head;
        ring.free = ring.free.saturating_add(count);
        ring.outstanding = ring.outstanding.saturating_sub(1);
        ring.last_used = ring.last_used.wrapping_add(1);
        Ok(Some((token, len)))
    }

    /// Tells the device that it need not interrupt. A hint; an interrupt can still arrive
    /// (VIRTIO 1.3, 2.7.7).
    ///
    /// # Errors
    /// [`RingError::Access`] only if guest memory is not what it was when the session began.
    pub fn disable_interrupts(&mut self) -> Result<(), RingError> {
        // With EVENT_IDX leaving used_event where it is does it: the device passed it already.
        if !self.ring.event_idx && self.ring.interrupts {
            self.avail
                .store_u16_atomic(FLAGS, AVAIL_F_NO_INTERRUPT, Ordering::Relaxed)?;
        }
        self.ring.interrupts = false;
        Ok(())
    }

    /// Asks the device to interrupt from the next used chain on. `true` means that chains were used
    /// meanwhile, for which no interrupt will come: collect again before sleeping.
    ///
    /// # Errors
    /// [`DriverError::UsedIndex`] if the device misbehaves.
    pub fn enable_interrupts(&mut self) -> Result<bool, DriverError> {
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

/// Number of descriptors a chain takes, if it is one the device has to accept.
#[inline]
fn check_chain(readable: &[Segment], writable: &[Segment], limit: u16) -> Result<u16, DriverError> {
    let segments = readable.len().saturating_add(writable.len());
    if segments == 0 || flagged(readable, writable).any(|(s, _)| s.len == 0) {
        return Err(DriverError::Empty);
    }
    if total_len(readable).saturating_add(total_len(writable)) > MAX_BYTES {
        return Err(DriverError::TooManyBytes);
    }
    match u16::try_from(segments) {
        Ok(count) if count <= limit => Ok(count),
        _ => Err(DriverError::TooLong { segments, limit }),
    }
}

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

//! The device side of a split virtqueue.
//!
//! [`DeviceRing`] is the state that outlives a turn of the device's event loop; it holds no
//! reference to memory, so it can be moved between threads and taken out while memory changes.
//! [`Session`] is one turn: the ring's areas resolved to this process's memory.
//!
//! The order of one turn, for a device that sleeps when idle:
//!
//! ```text
//! kick ──▶ disable_notifications ──▶ pop … pop (None) ──▶ push_used … ──▶ publish ─▶ true: interrupt
//!                  ▲                                                        │
//!                  └────────── true ────────── enable_notifications ◀───────┘
//!                                                  │ false
//!                                                  ▼ sleep
//! ```

use std::sync::atomic::{Ordering, fence};

use virtio_queue::{Error as QueueError, Queue, QueueT};
use vm_memory::bitmap::BS;
use vm_memory::{Bytes, GuestAddress, GuestMemory, Permissions};

use crate::area::{AreaRef, SliceOf, resolve};
use crate::chain::{Chain, ChainBuf};
use crate::desc::Desc;
use crate::error::{Area, ChainError, PopError, RingError};
use crate::layout::{
    self, AVAIL_ALIGN, AVAIL_F_NO_INTERRUPT, DESC_ALIGN, DESC_SIZE, FLAGS, IDX, USED_ALIGN,
    USED_F_NO_NOTIFY,
};
use crate::segment::{Segment, in_one_region};

/// What the transport negotiated for one virtqueue.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RingConfig {
    /// Queue size in descriptors: a power of two up to 32768.
    pub size: u16,
    /// Guest-physical address of the descriptor table.
    pub desc_table: GuestAddress,
    /// Guest-physical address of the available ring.
    pub avail_ring: GuestAddress,
    /// Guest-physical address of the used ring.
    pub used_ring: GuestAddress,
    /// VIRTIO_F_EVENT_IDX was negotiated.
    pub event_idx: bool,
    /// VIRTIO_F_INDIRECT_DESC was negotiated.
    pub indirect: bool,
    /// The available index to begin with: 0 for a fresh queue.
    pub next_avail: u16,
    /// The used index to begin with: 0 for a fresh queue, else what the used ring holds.
    pub next_used: u16,
}

/// The device's state of one split virtqueue.
///
/// It begins with no chain in flight: whatever `next_avail` and `next_used` say, chains taken by an
/// earlier owner of the queue are not known to it.
#[derive(Debug)]
pub struct DeviceRing {
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
}

impl DeviceRing {
    /// Takes over a virtqueue and allocates all that it will ever need.
    ///
    /// # Errors
    /// [`RingError`] if the size is not a power of two up to 32768, an area is misaligned, not wholly
    /// in guest memory, or across regions mapped apart, or if the used ring overlaps another area.
    pub fn new<M: GuestMemory>(config: &RingConfig, mem: &M) -> Result<Self, RingError> {
        let size = config.size;
        let geometry = geometry(config)?;
        reject_overlap(config)?;
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
        };
        ring.session(mem)?;
        Ok(ring)
    }

    /// Queue size in descriptors.
    #[inline]
    #[must_use]
    pub fn size(&self) -> u16 {
        self.size
    }

    /// Index of the next chain to take: what GET_VRING_BASE reports.
    #[inline]
    #[must_use]
    pub fn next_avail(&self) -> u16 {
        self.next_avail
    }

    /// The used index as the driver sees it; staged elements do not count.
    #[inline]
    #[must_use]
    pub fn next_used(&self) -> u16 {
        self.next_used
    }

    /// Chains taken and not yet returned by [`Session::push_used`].
    #[inline]
    #[must_use]
    pub fn in_flight(&self) -> u16 {
        self.in_flight
    }

    /// Resolves the ring's areas in `mem` for one turn of the device's loop.
    ///
    /// # Errors
    /// [`RingError`] if an area does not lie in `mem` in one piece, at the alignment it needs.
    pub fn session<'a, M: GuestMemory>(
        &'a mut self,
        mem: &'a M,
    ) -> Result<Session<'a, M>, RingError> {
        let size = self.size;
        let desc = resolve(
            mem,
            Area::Descriptors,
            GuestAddress(self.geometry.desc_table()),
            layout::desc_len(size),
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

/// The used ring is the only area that the device writes: it must not share bytes with the others.
fn reject_overlap(config: &RingConfig) -> Result<(), RingError> {
    let range = |addr: GuestAddress, len: usize| {
        let start = u128::from(addr.0);
        start..start.saturating_add(u128::try_from(len).unwrap_or(u128::MAX))
    };
    let used = range(config.used_ring, layout::used_len(config.size));
    for (area, other) in [
        (
            Area::Descriptors,
            range(config.desc_table, layout::desc_len(config.size)),
        ),
        (
            Area::Available,
            range(config.avail_ring, layout::avail_len(config.size)),
        ),
    ] {
        if used.start < other.end && other.start < used.end {
            return Err(RingError::Overlap { area });
        }
    }
    Ok(())
}

/// One turn of the device's loop on one virtqueue.
///
/// Dropping it loses nothing: staged used elements stay staged in the [`DeviceRing`].
pub struct Session<'a, M: GuestMemory> {
    ring: &'a mut DeviceRing,
    mem: &'a M,
    desc: AreaRef<'a, BS<'a, M::Bitmap>>,
    avail: AreaRef<'a, BS<'a, M::Bitmap>>,
    used: AreaRef<'a, BS<'a, M::Bitmap>>,
}

/// Where the descriptors of a chain are read from.
enum Table<'a, M: GuestMemory> {
    /// The queue's descriptor table.
    Ring,
    /// An indirect table in one piece of this process's memory.
    Indirect(SliceOf<'a, M>),
    /// An indirect table across regions mapped apart.
    Scattered(GuestAddress),
}

impl<M: GuestMemory> Session<'_, M> {
    /// Guest memory as this turn sees it.
    #[inline]
    #[must_use]
    pub fn memory(&self) -> &M {
        self.mem
    }

    /// Chains that are available and not yet taken.
    ///
    /// # Errors
    /// [`RingError::AvailIndex`] if the driver's index is ahead by more than can be outstanding.
    pub fn available(&mut self) -> Result<u16, RingError> {
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

    /// Takes the next available chain, or `None` when there is none. `buf` holds its segments until
    /// it is used again. The available index is read only when the chains known of are used up.
    ///
    /// # Errors
    /// [`PopError::Ring`] if the queue is broken, and is to be stopped; [`PopError::Chain`] if only
    /// this chain is malformed, which is then in flight like any other.
    #[inline]
    pub fn pop<'b>(&mut self, buf: &'b mut ChainBuf) -> Result<Option<Chain<'b>>, PopError> {
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
            return Err(RingError::Head {
                head,
                size: ring.size,
            }
            .into());
        };
        if *held {
            return Err(RingError::HeadInFlight { head }.into());
        }
        *held = true;
        *taken = head;
        ring.next_avail = ring.next_avail.wrapping_add(1);
        ring.in_flight = ring.in_flight.wrapping_add(1);

        buf.clear();
        self.gather(head, buf)?;
        Ok(Some(buf.chain(head)))
    }

    /// Gives back the last `chains` chains taken, as if they had not been: they are available again.
    /// Stops early at a chain that was already returned.
    pub fn rewind(&mut self, chains: u16) {
        let ring = &mut *self.ring;
        for _ in 0..chains {
            let previous = ring.next_avail.wrapping_sub(1);
            // The driver may have written the ring element again, so its head comes from our own notes.
            let held = ring
                .taken
                .get(usize::from(previous & ring.mask))
                .and_then(|&head| ring.held.get_mut(usize::from(head)));
            match held {
                Some(held) if *held => *held = false,
                _ => break,
            }
            ring.next_avail = previous;
            ring.in_flight = ring.in_flight.saturating_sub(1);
        }
    }

    /// Writes one used element: chain `head` is done, and the device wrote `len` bytes into its
    /// writable segments. The driver sees it after [`publish`](Self::publish).
    ///
    /// # Errors
    /// [`RingError::HeadNotInFlight`] if this chain was not taken, or was returned before.
    #[inline]
    pub fn push_used(&mut self, head: u16, len: u32) -> Result<(), RingError> {
        let ring = &mut *self.ring;
        match ring.held.get_mut(usize::from(head)) {
            Some(held) if *held => *held = false,
            _ => return Err(RingError::HeadNotInFlight { head }),
        }
        let place = ring.next_used.wrapping_add(ring.staged) & ring.mask;
        ring.staged = ring.staged.wrapping_add(1);
        ring.in_flight = ring.in_flight.saturating_sub(1);
        // struct virtq_used_elem { le32 id; le32 len; } in one store (VIRTIO 1.3, 2.7.8).
        let element = u64::from(head) | (u64::from(len) << 32);
        self.used.store_u64(layout::used_element(place), element)
    }

    /// Makes all staged used elements visible with one store of the used index. Returns whether the
    /// driver wants an interrupt for them; `false` when there were none.
    ///
    /// # Errors
    /// [`RingError::Access`] only if guest memory is not what it was when the session began.
    #[inline]
    pub fn publish(&mut self) -> Result<bool, RingError> {
        let ring = &mut *self.ring;
        if ring.staged == 0 {
            return Ok(false);
        }
        let old = ring.next_used;
        let new = old.wrapping_add(ring.staged);
        // Release: the elements, and all the device wrote to buffers, come before the index
        // (VIRTIO 1.3, 2.7.8.2).
        self.used.store_u16_atomic(IDX, new, Ordering::Release)?;
        ring.next_used = new;
        ring.staged = 0;
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

    /// Tells the driver that it need not notify: the device will look for itself. A hint; a
    /// notification can still arrive (VIRTIO 1.3, 2.7.10).
    ///
    /// # Errors
    /// [`RingError::Access`] only if guest memory is not what it was when the session began.
    pub fn disable_notifications(&mut self) -> Result<(), RingError> {
        if self.ring.notifications == Some(false) {
            return Ok(());
        }
        // With EVENT_IDX leaving avail_event where it is does it: the driver passed it already.
        if !self.ring.event_idx {
            self.used
                .store_u16_atomic(FLAGS, USED_F_NO_NOTIFY, Ordering::Relaxed)?;
        }
        self.ring.notifications = Some(false);
        Ok(())
    }

    /// Asks the driver to notify from the next chain on. `true` means that chains became available
    /// meanwhile, for which no notification will come: drain again before sleeping.
    ///
    /// # Errors
    /// [`RingError::AvailIndex`] as from [`available`](Self::available).
    pub fn enable_notifications(&mut self) -> Result<bool, RingError> {
        if self.ring.event_idx {
            let offset = layout::avail_event(self.ring.size);
            self.used
                .store_u16_atomic(offset, self.ring.next_avail, Ordering::Relaxed)?;
        } else if self.ring.notifications != Some(true) {
            self.used.store_u16_atomic(FLAGS, 0, Ordering::Relaxed)?;
        }
        self.ring.notifications = Some(true);
        // The other half of the barrier in the driver's publication (VIRTIO 1.3, 2.7.13.4.1).
        fence(Ordering::SeqCst);
        Ok(self.available()? != 0)
    }

    /// Walks the chain from `head` and gathers its segments. At most `size` segments and one
    /// indirect descriptor are looked at, so that a loop ends.
    fn gather(&self, head: u16, buf: &mut ChainBuf) -> Result<(), PopError> {
        let bad = |error| PopError::Chain { head, error };
        let size = self.ring.size;
        let mut table = Table::<M>::Ring;
        let mut entries = size;
        let mut index = head;
        loop {
            let desc = match &table {
                Table::Ring => self.ring_descriptor(index)?,
                Table::Indirect(slice) => indirect_descriptor(slice, index)?,
                Table::Scattered(addr) => {
                    scattered_descriptor(self.mem, *addr, index).map_err(bad)?
                }
            };
            if desc.is_indirect() {
                if !matches!(table, Table::Ring) {
                    return Err(bad(ChainError::IndirectNested));
                }
                (table, entries) = self.indirect_table(desc).map_err(bad)?;
                index = 0;
                continue;
            }
            let segment = self.segment(desc).map_err(bad)?;
            buf.push(segment, desc.is_writable(), size).map_err(bad)?;
            if !desc.has_next() {
                return Ok(());
            }
            if desc.next >= entries {
                return Err(bad(ChainError::Next {
                    next: desc.next,
                    entries,
                }));
            }
            index = desc.next;
        }
    }

    #[inline]
    fn ring_descriptor(&self, index: u16) -> Result<Desc, RingError> {
        let offset = layout::desc_offset(index);
        let addr = self.desc.load_u64(offset)?;
        Ok(Desc::from_words(
            addr,
            self.desc.load_u64(offset.wrapping_add(8))?,
        ))
    }

    /// Checks the buffer that a descriptor names.
    #[inline]
    fn segment(&self, desc: Desc) -> Result<Segment, ChainError> {
        let Desc { addr, len, .. } = desc;
        if len == 0 {
            return Err(ChainError::Empty { addr });
        }
        let access = if desc.is_writable() {
            Permissions::Write
        } else {
            Permissions::Read
        };
        let bytes = usize::try_from(len).map_err(|_| ChainError::NotInMemory { addr, len })?;
        if in_one_region(self.mem, GuestAddress(addr), bytes).is_none()
            && !self.mem.check_range(GuestAddress(addr), bytes, access)
        {
            return Err(ChainError::NotInMemory { addr, len });
        }
        Ok(Segment::new(GuestAddress(addr), len))
    }

    /// Finds the table an indirect descriptor refers to. Its WRITE flag is ignored (VIRTIO 1.3, 2.7.5.3.2).
    fn indirect_table(&self, desc: Desc) -> Result<(Table<'_, M>, u16), ChainError> {
        let Desc { addr, len, .. } = desc;
        let limit = self.ring.size;
        if !self.ring.indirect {
            return Err(ChainError::IndirectNotNegotiated);
        }
        if desc.has_next() {
            return Err(ChainError::IndirectNext);
        }
        let bytes = usize::try_from(len).map_err(|_| ChainError::IndirectLength { len, limit })?;
        let entries = match u16::try_from(bytes / DESC_SIZE) {
            Ok(n) if n > 0 && n <= limit && layout::desc_len(n) == bytes => n,
            _ => return Err(ChainError::IndirectLength { len, limit }),
        };
        let unreadable = |source| ChainError::IndirectRead { addr, source };
        let start = GuestAddress(addr);
        let mut slices = self
            .mem
            .get_slices(start, bytes, Permissions::Read)
            .map_err(unreadable)?;
        match slices.next() {
            Some(Ok(slice)) if slice.len() == bytes => Ok((Table::Indirect(slice), entries)),
            Some(Err(e)) => Err(unreadable(e)),
            _ => {
                for slice in slices {
                    slice.map_err(unreadable)?;
                }
                Ok((Table::Scattered(start), entries))
            }
        }
    }
}

/// Reads descriptor `index` of an indirect table, which may be at any address.
#[inline]
fn indirect_descriptor<B: vm_memory::bitmap::BitmapSlice>(
    table: &vm_memory::VolatileSlice<'_, B>,
    index: u16,
) -> Result<Desc, RingError> {
    use vm_memory::VolatileMemory;
    let offset = layout::desc_offset(index);
    let word = |offset: usize| {
        let word = table.get_ref::<u64>(offset);
        word.map(|w| u64::from_le(w.load()))
            .map_err(|source| RingError::Access {
                area: Area::Descriptors,
                offset,
                source,
            })
    };
    Ok(Desc::from_words(
        word(offset)?,
        word(offset.wrapping_add(8))?,
    ))
}

/// Reads descriptor `index` of an indirect table that lies across regions.
#[cold]
fn scattered_descriptor<M: GuestMemory>(
    mem: &M,
    table: GuestAddress,
    index: u16,
) -> Result<Desc, ChainError> {
    let addr = table.0.wrapping_add(u64::from(index).wrapping_mul(16));
    let mut bytes = [0; DESC_SIZE];
    mem.read_slice(&mut bytes, GuestAddress(addr))
        .map_err(|source| ChainError::IndirectRead { addr, source })?;
    let [a0, a1, a2, a3, a4, a5, a6, a7, rest @ ..] = bytes;
    let addr = u64::from_le_bytes([a0, a1, a2, a3, a4, a5, a6, a7]);
    Ok(Desc::from_words(addr, u64::from_le_bytes(rest)))
}

//! The driver side of a virtqueue, split or packed: the other half, for tests, benchmarks and load
//! generators, and for a program that is itself a vhost-user front-end.
//!
//! [`DriverRing`] is the state, [`DriverSession`] one turn with the areas resolved to this
//! process's memory. The device on the other side is not trusted either: what the driver needs to
//! know again it keeps for itself and never reads back from the descriptors.
//!
//! ```text
//! add … add ──▶ publish ─▶ true: notify the device
//!                  │
//!   interrupt ──▶ disable_interrupts ──▶ poll_used … poll_used (None) ──▶ enable_interrupts
//!                          ▲                                               │ true    │ false
//!                          └───────────────────────────────────────────────┘         ▼ sleep
//! ```

use vm_memory::{GuestAddress, GuestMemory};

use crate::chain::MAX_BYTES;
use crate::device::{DESC_ALIGN, MAX_SIZE, RingConfig};
use crate::error::{Area, DriverError, RingError};
use crate::segment::{Segment, total_len};
use crate::table::desc_offset;
use crate::{packed, split};

/// Bytes that travel together between cores: what the two sides write is kept apart by this.
const CACHE_LINE: u64 = 64;

/// Descriptor flag of both formats: device-writable (VIRTIO 1.3, 2.7.5 and 2.8.3).
const DESC_F_WRITE: u16 = 2;

/// Where a driver puts its virtqueue in guest memory, and in which format: descriptor table, available
/// ring, used ring (packed: descriptor ring and both event suppression structures) and, for indirect
/// chains, one table per descriptor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DriverLayout {
    pub(crate) size: u16,
    pub(crate) indirect_entries: u16,
    packed: bool,
    pub(crate) in_order: bool,
    pub(crate) desc_table: GuestAddress,
    pub(crate) avail_ring: GuestAddress,
    pub(crate) used_ring: GuestAddress,
    pub(crate) indirect_tables: GuestAddress,
    end: GuestAddress,
}

impl DriverLayout {
    /// Lays out a split queue of `size` descriptors from guest-physical address `base` on. With
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
        let (avail, used) = (
            split::layout::avail_len(size),
            split::layout::used_len(size),
        );
        // The used ring begins on a cache line of its own: the other side writes it.
        Self::lay_out(base, size, indirect_entries, false, [avail, used])
    }

    /// The same for a packed queue, whose size need not be a power of two.
    ///
    /// # Errors
    /// As from [`new`](Self::new), with [`RingError::PackedSize`] for a size of 0 or above 32768.
    pub fn packed(
        base: GuestAddress,
        size: u16,
        indirect_entries: u16,
    ) -> Result<Self, DriverError> {
        if size == 0 || size > MAX_SIZE {
            return Err(RingError::PackedSize { size }.into());
        }
        let events = [packed::layout::EVENT_LEN; 2];
        Self::lay_out(base, size, indirect_entries, true, events)
    }

    fn lay_out(
        base: GuestAddress,
        size: u16,
        indirect_entries: u16,
        packed: bool,
        [avail_len, used_len]: [usize; 2],
    ) -> Result<Self, DriverError> {
        if !base.0.is_multiple_of(DESC_ALIGN) {
            let (area, addr, align) = (Area::Descriptors, base.0, DESC_ALIGN);
            return Err(RingError::Misaligned { area, addr, align }.into());
        }
        // VIRTIO 1.3, 2.7.5.3.1 and 2.8.17.
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
            let descs = desc_offset(size);
            let avail = if packed {
                after(base.0, descs)?
            } else {
                base.0.checked_add(u64::try_from(descs).ok()?)?
            };
            let used = after(avail, avail_len)?;
            let tables = after(used, used_len)?;
            let one_table = desc_offset(indirect_entries);
            let end = after(tables, one_table.checked_mul(usize::from(size))?)?;
            Some((avail, used, tables, end))
        };
        let (avail, used, tables, end) =
            ends().ok_or(DriverError::Layout { base: base.0, size })?;
        Ok(Self {
            size,
            indirect_entries,
            packed,
            in_order: false,
            desc_table: base,
            avail_ring: GuestAddress(avail),
            used_ring: GuestAddress(used),
            indirect_tables: GuestAddress(tables),
            end: GuestAddress(end),
        })
    }

    /// The same, to be used in order (VIRTIO_F_IN_ORDER): descriptors are taken in ring order, and the device
    /// returns chains in the order in which they were made available.
    #[must_use]
    pub const fn in_order(self) -> Self {
        Self {
            in_order: true,
            ..self
        }
    }

    /// Queue size in descriptors.
    #[must_use]
    pub fn size(&self) -> u16 {
        self.size
    }

    /// The queue is packed.
    #[must_use]
    pub fn is_packed(&self) -> bool {
        self.packed
    }

    /// Guest-physical address of the descriptor table or ring.
    #[must_use]
    pub fn desc_table(&self) -> GuestAddress {
        self.desc_table
    }

    /// Guest-physical address of the available ring, or of the driver event suppression structure.
    #[must_use]
    pub fn avail_ring(&self) -> GuestAddress {
        self.avail_ring
    }

    /// Guest-physical address of the used ring, or of the device event suppression structure.
    #[must_use]
    pub fn used_ring(&self) -> GuestAddress {
        self.used_ring
    }

    /// The first guest-physical address behind all areas.
    #[must_use]
    pub fn end(&self) -> GuestAddress {
        self.end
    }

    /// Where both indices of a fresh queue stand.
    const fn fresh(&self) -> u16 {
        if self.packed {
            packed::layout::FRESH
        } else {
            0
        }
    }

    /// What the device side is told of a fresh queue laid out like this.
    #[must_use]
    pub fn config(&self, event_idx: bool) -> RingConfig {
        RingConfig {
            size: self.size,
            desc_table: self.desc_table,
            avail_ring: self.avail_ring,
            used_ring: self.used_ring,
            packed: self.packed,
            in_order: self.in_order,
            event_idx,
            indirect: self.indirect_entries > 0,
            next_avail: self.fresh(),
            next_used: self.fresh(),
        }
    }
}

/// The driver's state of one virtqueue. `T` is what the driver knows a request by: it is
/// handed in with a chain and comes back when the device has used it.
#[derive(Debug)]
pub struct DriverRing<T> {
    format: Format<T>,
}

#[derive(Debug)]
enum Format<T> {
    Split(split::driver::DriverRing<T>),
    Packed(packed::driver::DriverRing<T>),
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
        Self::starting_at(layout, event_idx, layout.fresh(), mem)
    }

    /// Like [`new`](Self::new), for a queue whose both indices already stand at `index`, as on one that
    /// has been running and is idle. The device side begins with `next_avail` and `next_used` there, in
    /// the form of [`RingConfig::next_avail`].
    ///
    /// # Errors
    /// [`DriverError::Ring`] if an area does not lie in `mem` in one piece, or if a packed queue has no such
    /// index.
    pub fn starting_at<M: GuestMemory>(
        layout: DriverLayout,
        event_idx: bool,
        index: u16,
        mem: &M,
    ) -> Result<Self, DriverError> {
        let format = if layout.packed {
            Format::Packed(packed::driver::DriverRing::new(
                layout, event_idx, index, mem,
            )?)
        } else {
            Format::Split(split::driver::DriverRing::new(
                layout, event_idx, index, mem,
            )?)
        };
        Ok(Self { format })
    }

    /// Where the queue lies.
    #[must_use]
    pub fn layout(&self) -> &DriverLayout {
        either!(Format, &self.format, ring => ring.layout())
    }

    /// Free descriptors.
    #[inline]
    #[must_use]
    pub fn free(&self) -> u16 {
        either!(Format, &self.format, ring => ring.free())
    }

    /// Chains added and not yet collected.
    #[inline]
    #[must_use]
    pub fn outstanding(&self) -> u16 {
        either!(Format, &self.format, ring => ring.outstanding())
    }

    /// Resolves the ring's areas in `mem` for one turn.
    ///
    /// # Errors
    /// [`RingError`] if an area does not lie in `mem` in one piece, at the alignment it needs.
    #[inline]
    pub fn session<'a, M: GuestMemory>(
        &'a mut self,
        mem: &'a M,
    ) -> Result<DriverSession<'a, T, M>, RingError> {
        let side = match &mut self.format {
            Format::Split(ring) => Side::Split(ring.session(mem)?),
            Format::Packed(ring) => Side::Packed(ring.session(mem)?),
        };
        Ok(DriverSession { side })
    }
}

/// One turn of the driver on one virtqueue. Dropping it loses nothing.
pub struct DriverSession<'a, T, M: GuestMemory> {
    side: Side<'a, T, M>,
}

enum Side<'a, T, M: GuestMemory> {
    Split(split::driver::DriverSession<'a, T, M>),
    Packed(packed::driver::DriverSession<'a, T, M>),
}

impl<T, M: GuestMemory> DriverSession<'_, T, M> {
    /// Free descriptors.
    #[inline]
    #[must_use]
    pub fn free(&self) -> u16 {
        either!(Side, &self.side, side => side.free())
    }

    /// Writes a chain of one descriptor per segment; the device sees it after
    /// [`publish`](Self::publish). Returns what it is known by in the ring: the number of its head
    /// descriptor, or its buffer id.
    ///
    /// # Errors
    /// [`DriverError::Full`] if too few descriptors are free, [`DriverError::Empty`] or
    /// [`DriverError::TooManyBytes`] if a device may refuse the chain; the ring is then as before.
    #[inline]
    pub fn add(
        &mut self,
        readable: &[Segment],
        writable: &[Segment],
        token: T,
    ) -> Result<u16, DriverError> {
        either!(Side, &mut self.side, side => side.add(readable, writable, token))
    }

    /// Writes a chain as one descriptor that refers to a table (VIRTIO 1.3, 2.7.5.3 and 2.8.7). Returns what it
    /// is known by in the ring.
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
        either!(Side, &mut self.side, side => side.add_indirect(readable, writable, token))
    }

    /// Makes all added chains visible with one store. Returns whether the device wants to be notified of
    /// them; `false` when there were none.
    ///
    /// # Errors
    /// [`RingError::Access`] only if guest memory is not what it was when the session began.
    #[inline]
    pub fn publish(&mut self) -> Result<bool, RingError> {
        either!(Side, &mut self.side, side => side.publish())
    }

    /// Collects the next chain the device has used: its token, and how many bytes the device wrote
    /// into its writable segments.
    ///
    /// # Errors
    /// [`DriverError::UsedIndex`], [`DriverError::UsedId`] or [`DriverError::UsedLen`] if the device
    /// misbehaves; the queue is then broken.
    #[inline]
    pub fn poll_used(&mut self) -> Result<Option<(T, u32)>, DriverError> {
        either!(Side, &mut self.side, side => side.poll_used())
    }

    /// Tells the device that it need not interrupt. A hint; an interrupt can still arrive
    /// (VIRTIO 1.3, 2.7.7).
    ///
    /// # Errors
    /// [`RingError::Access`] only if guest memory is not what it was when the session began.
    #[inline]
    pub fn disable_interrupts(&mut self) -> Result<(), RingError> {
        either!(Side, &mut self.side, side => side.disable_interrupts())
    }

    /// Asks the device to interrupt from the next used chain on. `true` means that chains were used
    /// meanwhile, for which no interrupt will come: collect again before sleeping.
    ///
    /// # Errors
    /// [`DriverError::UsedIndex`] if the device misbehaves.
    #[inline]
    pub fn enable_interrupts(&mut self) -> Result<bool, DriverError> {
        either!(Side, &mut self.side, side => side.enable_interrupts())
    }
}

/// What the device says of the oldest chain when queues are used in order: one element of its can stand for a
/// batch of chains (VIRTIO 1.3, 2.7.9 and 2.8.8).
#[derive(Debug, Clone, Copy)]
pub(crate) struct Batch {
    /// The last chain of the batch.
    pub(crate) id: u16,
    /// What was written into that; all others were used completely.
    pub(crate) len: u32,
}

/// Segments of a chain in order, each with its WRITE flag.
pub(crate) fn flagged<'s>(
    readable: &'s [Segment],
    writable: &'s [Segment],
) -> impl Iterator<Item = (Segment, u16)> + 's {
    let readable = readable.iter().map(|&s| (s, 0));
    readable.chain(writable.iter().map(|&s| (s, DESC_F_WRITE)))
}

/// Number of descriptors a chain takes, if it is one the device has to accept.
#[inline]
pub(crate) fn check_chain(
    readable: &[Segment],
    writable: &[Segment],
    limit: u16,
) -> Result<u16, DriverError> {
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

//! The device side of a virtqueue, split or packed.
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

use vm_memory::{GuestAddress, GuestMemory};

use crate::chain::{Chain, ChainBuf};
use crate::error::{Area, PopError, RingError};
use crate::inflight::Inflight;
use crate::order::Order;
use crate::{packed, split};

/// Alignment of the descriptor table or ring in bytes (VIRTIO 1.3, 2.7 and 2.8.10.1).
pub(crate) const DESC_ALIGN: u64 = 16;
/// Largest queue size (VIRTIO 1.3, 2.7 and 2.8).
pub(crate) const MAX_SIZE: u16 = 32768;

/// What the transport negotiated for one virtqueue.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RingConfig {
    /// Queue size in descriptors: up to 32768, and a power of two if the queue is split.
    pub size: u16,
    /// Guest-physical address of the descriptor table or ring.
    pub desc_table: GuestAddress,
    /// Guest-physical address of the available ring; packed: of the driver event suppression structure.
    pub avail_ring: GuestAddress,
    /// Guest-physical address of the used ring; packed: of the device event suppression structure.
    pub used_ring: GuestAddress,
    /// VIRTIO_F_RING_PACKED was negotiated.
    pub packed: bool,
    /// VIRTIO_F_IN_ORDER was negotiated.
    pub in_order: bool,
    /// VIRTIO_F_EVENT_IDX was negotiated.
    pub event_idx: bool,
    /// VIRTIO_F_INDIRECT_DESC was negotiated.
    pub indirect: bool,
    /// The available index to begin with: 0 for a fresh queue. Packed: the place of the next descriptor to
    /// take, with the wrap counter in bit 15; 0x8000 for a fresh queue (VIRTIO 1.3, 2.8.1).
    pub next_avail: u16,
    /// The used index to begin with: 0 for a fresh queue, else what the used ring holds. Packed: the place
    /// of the next used descriptor, as above.
    pub next_used: u16,
}

impl RingConfig {
    /// Where both indices of a fresh queue stand.
    #[must_use]
    pub const fn fresh_index(packed: bool) -> u16 {
        if packed { packed::layout::FRESH } else { 0 }
    }
}

/// The device's state of one virtqueue.
///
/// A [new](Self::new) one begins with no chain in flight: whatever `next_avail` and `next_used` say, chains taken by an
/// earlier owner of the queue are not known to it. One that is [resumed](Self::resume) knows them.
#[derive(Debug)]
pub struct DeviceRing {
    format: Format,
    /// With VIRTIO_F_IN_ORDER.
    order: Option<Order>,
}

#[derive(Debug)]
enum Format {
    Split(split::device::DeviceRing),
    Packed(packed::device::DeviceRing),
}

impl DeviceRing {
    /// Takes over a virtqueue and allocates all that it will ever need.
    ///
    /// # Errors
    /// [`RingError`] if the size is not one of the format, an area is misaligned, not wholly in guest
    /// memory, or across regions mapped apart, if an area that the device writes overlaps another one, or
    /// if an index of a packed queue does not exist.
    pub fn new<M: GuestMemory>(config: &RingConfig, mem: &M) -> Result<Self, RingError> {
        let format = if config.packed {
            Format::Packed(packed::device::DeviceRing::new(config, mem)?)
        } else {
            Format::Split(split::device::DeviceRing::new(config, mem)?)
        };
        Ok(Self::with_order(format, config))
    }

    /// Takes over a virtqueue from an owner that may have ended at any time, and notes the chains in flight for the next
    /// one. Chains that were taken and not returned come first, in the order in which they were taken. Where notes were
    /// begun they say where the queue stands, not `next_avail` and `next_used`.
    ///
    /// A packed queue then shows the driver each chain as it is [pushed](Session::push_used); interrupts are still for
    /// [`publish`](Session::publish) to decide on.
    ///
    /// # Errors
    /// As from [`new`](Self::new); [`RingError::Inflight`] if the notes are not of a device side that served this queue, or
    /// have room for a smaller one only; [`RingError::Access`] if they do not lie in their memory.
    pub fn resume<M: GuestMemory>(
        config: &RingConfig,
        mem: &M,
        notes: Inflight,
    ) -> Result<Self, RingError> {
        let format = if config.packed {
            Format::Packed(packed::device::DeviceRing::resume(config, mem, notes)?)
        } else {
            Format::Split(split::device::DeviceRing::resume(config, mem, notes)?)
        };
        Ok(Self::with_order(format, config))
    }

    fn with_order(format: Format, config: &RingConfig) -> Self {
        let heads = match &format {
            Format::Split(_) => config.size.into(),
            Format::Packed(_) => packed::device::IDS,
        };
        let order = config.in_order.then(|| Order::new(config.size, heads));
        Self { format, order }
    }

    /// Chains in flight are noted for the next owner.
    #[must_use]
    pub fn is_tracked(&self) -> bool {
        either!(Format, &self.format, ring => ring.is_tracked())
    }

    /// Chains in flight that an earlier owner took, and this one has not taken again. They are [available](Session::available).
    #[inline]
    #[must_use]
    pub fn unserved(&self) -> u16 {
        either!(Format, &self.format, ring => ring.unserved())
    }

    /// Queue size in descriptors.
    #[inline]
    #[must_use]
    pub fn size(&self) -> u16 {
        either!(Format, &self.format, ring => ring.size())
    }

    /// Index of the next chain to take, in the form of [`RingConfig::next_avail`].
    #[inline]
    #[must_use]
    pub fn next_avail(&self) -> u16 {
        either!(Format, &self.format, ring => ring.next_avail())
    }

    /// The used index as the driver sees it, in the form of [`RingConfig::next_used`]; staged elements do not
    /// count.
    #[inline]
    #[must_use]
    pub fn next_used(&self) -> u16 {
        either!(Format, &self.format, ring => ring.next_used())
    }

    /// Chains were taken from the queue, by this owner or one before it, as far as the index tells: it goes around.
    #[must_use]
    pub fn has_begun(&self) -> bool {
        let packed = matches!(self.format, Format::Packed(_));
        self.next_avail() != RingConfig::fresh_index(packed)
    }

    /// Chains taken and not yet returned by [`Session::push_used`], by this owner or one before it.
    #[inline]
    #[must_use]
    pub fn in_flight(&self) -> u16 {
        let taken = either!(Format, &self.format, ring => ring.in_flight());
        let waiting = self.order.as_ref().map_or(0, Order::waiting);
        taken.saturating_sub(waiting)
    }

    /// Resolves the ring's areas in `mem` for one turn of the device's loop.
    ///
    /// # Errors
    /// [`RingError`] if an area does not lie in `mem` in one piece, at the alignment it needs.
    #[inline]
    pub fn session<'a, M: GuestMemory>(
        &'a mut self,
        mem: &'a M,
    ) -> Result<Session<'a, M>, RingError> {
        let side = match &mut self.format {
            Format::Split(ring) => Side::Split(ring.session(mem)?),
            Format::Packed(ring) => Side::Packed(ring.session(mem)?),
        };
        let order = self.order.as_mut();
        Ok(Session { side, order })
    }
}

/// Refuses areas that share bytes: each with its guest-physical start and its length.
pub(crate) fn reject_overlap(
    (area, start, len): (Area, GuestAddress, usize),
    (with, other, other_len): (Area, GuestAddress, usize),
) -> Result<(), RingError> {
    let end = |addr: GuestAddress, len| {
        u128::from(addr.0).saturating_add(u128::try_from(len).unwrap_or(u128::MAX))
    };
    if u128::from(start.0) < end(other, other_len) && u128::from(other.0) < end(start, len) {
        return Err(RingError::Overlap { area, with });
    }
    Ok(())
}

/// One turn of the device's loop on one virtqueue.
///
/// Dropping it loses nothing: staged used elements stay staged in the [`DeviceRing`].
pub struct Session<'a, M: GuestMemory> {
    side: Side<'a, M>,
    order: Option<&'a mut Order>,
}

enum Side<'a, M: GuestMemory> {
    Split(split::device::Session<'a, M>),
    Packed(packed::device::Session<'a, M>),
}

impl<M: GuestMemory> Session<'_, M> {
    /// Guest memory as this turn sees it.
    #[inline]
    #[must_use]
    pub fn memory(&self) -> &M {
        either!(Side, &self.side, side => side.memory())
    }

    /// Chains that are available, or [unserved](DeviceRing::unserved), and not yet taken. A packed queue does not say how many: 1 stands for any number.
    ///
    /// # Errors
    /// [`RingError::AvailIndex`] or [`RingError::AvailDescriptor`] if the driver made more available than can be
    /// outstanding.
    #[inline]
    pub fn available(&mut self) -> Result<u16, RingError> {
        either!(Side, &mut self.side, side => {
            let unserved = side.unserved();
            Ok(unserved.saturating_add(side.available()?))
        })
    }

    /// Takes the next available chain, or `None` when there is none. `buf` holds its segments until
    /// it is used again. No memory is read for chains that are known to be there.
    ///
    /// # Errors
    /// [`PopError::Ring`] if the queue is broken, and is to be stopped; [`PopError::Chain`] if only
    /// this chain is malformed, which is then in flight like any other.
    #[inline]
    pub fn pop<'b>(&mut self, buf: &'b mut ChainBuf) -> Result<Option<Chain<'b>>, PopError> {
        // What a caller does not look at of the chain is not even put together.
        Ok(self.take(buf)?.map(|head| buf.chain(head)))
    }

    /// Takes the next available chain into `buf`, and returns what it is returned by.
    #[inline]
    fn take(&mut self, buf: &mut ChainBuf) -> Result<Option<u16>, PopError> {
        match self.order {
            None => either!(Side, &mut self.side, side => side.pop(buf)),
            Some(_) => self.take_in_order(buf),
        }
    }

    #[inline(never)]
    fn take_in_order(&mut self, buf: &mut ChainBuf) -> Result<Option<u16>, PopError> {
        let popped = either!(Side, &mut self.side, side => side.pop(buf));
        if let Some(order) = &mut self.order {
            match &popped {
                Ok(Some(head)) => order.taken(*head, Some(buf.writable_len())),
                Err(PopError::Chain { head, .. }) => order.taken(*head, None),
                Ok(None) | Err(PopError::Ring(_)) => {}
            }
        }
        popped
    }

    /// Gives back the last `chains` chains taken, as if they had not been: they are available again.
    /// Stops early at a chain that was already returned.
    pub fn rewind(&mut self, chains: u16) {
        for _ in 0..chains {
            if let Some(order) = &mut self.order
                && order.untake().is_break()
            {
                break;
            }
            if either!(Side, &mut self.side, side => side.rewind()).is_break() {
                break;
            }
        }
    }

    /// Says that chain `head` is done, and that the device wrote `len` bytes into its writable segments. The
    /// driver sees it after [`publish`](Self::publish); with VIRTIO_F_IN_ORDER, once all chains taken before it
    /// are done as well.
    ///
    /// # Errors
    /// [`RingError::HeadNotInFlight`] if this chain was not taken, or was returned before.
    // A call costs more than the common way through it.
    #[inline(always)]
    pub fn push_used(&mut self, head: u16, len: u32) -> Result<(), RingError> {
        match &mut self.order {
            Some(order) => order.done(head, len),
            None => either!(Side, &mut self.side, side => {
                let amount = side.retire(head)?;
                side.stage(head, len, amount)
            }),
        }
    }

    /// Makes all that was pushed visible with one store, unless it is. Returns whether the driver wants an interrupt for
    /// it; `false` when there was nothing.
    ///
    /// # Errors
    /// [`RingError::Access`] only if guest memory is not what it was when the session began.
    #[inline]
    pub fn publish(&mut self) -> Result<bool, RingError> {
        if let Some(order) = &mut self.order {
            either!(Side, &mut self.side, side => {
                let mut skipped = 0_u16;
                while let Some(ready) = order.next() {
                    skipped = skipped.saturating_add(side.retire(ready.head)?);
                    if !ready.skipped {
                        side.stage(ready.head, ready.len, skipped)?;
                        skipped = 0;
                    }
                }
            });
        }
        either!(Side, &mut self.side, side => side.publish())
    }

    /// Tells the driver that it need not notify: the device will look for itself. A hint; a
    /// notification can still arrive (VIRTIO 1.3, 2.7.10).
    ///
    /// # Errors
    /// [`RingError::Access`] only if guest memory is not what it was when the session began.
    #[inline]
    pub fn disable_notifications(&mut self) -> Result<(), RingError> {
        either!(Side, &mut self.side, side => side.disable_notifications())
    }

    /// Asks the driver to notify from the next chain on. `true` means that chains became available
    /// meanwhile, for which no notification will come: drain again before sleeping.
    ///
    /// # Errors
    /// As from [`available`](Self::available).
    #[inline]
    pub fn enable_notifications(&mut self) -> Result<bool, RingError> {
        either!(Side, &mut self.side, side => {
            Ok(side.enable_notifications()? || side.unserved() > 0)
        })
    }
}

//! What survives the device side: the chains that it took and has not returned, noted in memory that its front-end keeps
//! (vhost-user, "Inflight I/O tracking").
//!
//! Only the device side knows which chains it has. When its process dies, the next one finds them here, and serves them
//! again in the order in which they were taken: none is lost, and none is returned twice. What a request does it may
//! do twice: that it was done and that the driver was told cannot be one step.
//!
//! The format of the notes is that of the specification (`QueueRegionSplit`, `QueueRegionPacked`), so that programs of different
//! origin can follow each other. They are written in an order in which each prefix makes sense, as the process can
//! end behind any store. A process that is killed leaves all that it stored before, and nothing that it would have stored
//! after, whatever the processor: stores are atomic and of release order, so that the compiler keeps theirs.
//!
//! A split queue. `used` is the used index in the ring, `used_idx` its copy in the notes:
//!
//! ```text
//!  take      counter of the head ──▶ in flight
//!                                    └ from here on it is served again
//!  return    list of the batch ──▶ used ──▶ not in flight, each ──▶ used_idx
//!                                  └ from here on the driver has it
//!  between used and used_idx: they differ, by the length of the batch; its list says which heads are not in flight
//! ```
//!
//! A packed queue. The driver's descriptors do not outlast the return of another chain at their place, so the notes hold
//! copies, in entries taken from a list of free ones. `free` and its old value lie in one word, the two used indices with
//! their wrap counters in another, so that each pair changes with one store:
//!
//! ```text
//!  take      copies ──▶ in flight ──▶ free, old free
//!                                     └ from here on it is served again; before, what is in the free list is not in flight
//!  return    links ──▶ free ──▶ used index ──▶ used descriptor ──▶ not in flight ──▶ old free ──▶ old used index
//!                                              └ from here on the driver has it
//!  between used index and old used index: they differ; if the descriptor at the old one is still as the driver wrote it,
//!  the chain was not returned, and what is old holds
//! ```
//!
//! A used descriptor behind others would be seen with the first of them, also by a driver that is told of another batch
//! in its place after a crash. So packed chains are returned one by one, and only the notification stays for the batch.
//!
//! The memory is the front-end's to write, at any time. What is in it is read once, when a queue is [resumed](crate::DeviceRing::resume):
//! each index is checked and no loop is longer than the queue; notes that contradict themselves are refused. While the
//! queue runs it is written only.

#[cfg(test)]
mod tests;

use std::ops::ControlFlow;
use std::sync::Arc;

use vm_memory::{MmapRegion, VolatileMemory};

use crate::area::AreaRef;
use crate::error::{Area, RingError};
use crate::{packed, split};

/// `version` of notes that were begun (vhost-user, `QueueRegionSplit` and `QueueRegionPacked`).
pub(crate) const VERSION: u16 = 1;

/// Where the chains of one queue that are in flight are noted.
#[derive(Debug, Clone)]
pub struct Inflight {
    region: Arc<MmapRegion>,
    offset: usize,
    entries: u16,
}

impl Inflight {
    /// The notes at `offset` in `region`, 8-byte aligned, for a queue of up to `entries` descriptors. Zeroes stand for notes
    /// that nobody has begun.
    #[must_use]
    pub const fn new(region: Arc<MmapRegion>, offset: usize, entries: u16) -> Self {
        Self {
            region,
            offset,
            entries,
        }
    }

    /// Length of the notes in bytes.
    #[must_use]
    pub fn len(entries: u16, packed: bool) -> usize {
        let (header, entry) = if packed {
            (packed::inflight::HEADER, packed::inflight::ENTRY)
        } else {
            (split::inflight::HEADER, split::inflight::ENTRY)
        };
        usize::from(entries)
            .saturating_mul(entry)
            .saturating_add(header)
    }

    pub(crate) fn entries(&self) -> u16 {
        self.entries
    }

    /// Refuses notes for smaller queues, and those whose end lies outside the region.
    pub(crate) fn check(&self, size: u16, packed: bool) -> Result<(), RingError> {
        let entries = self.entries;
        if entries < size {
            return Err(RingError::InflightSize { entries, size });
        }
        self.area(packed).map(|_| ())
    }

    #[inline]
    pub(crate) fn area(&self, packed: bool) -> Result<AreaRef<'_, ()>, RingError> {
        let len = Self::len(self.entries, packed);
        let offset = self.offset;
        let slice = self.region.get_slice(offset, len);
        let slice = slice.map_err(|source| RingError::Access {
            area: Area::Inflight,
            offset,
            source,
        })?;
        Ok(AreaRef::new(Area::Inflight, slice))
    }
}

pub(crate) const fn damaged(why: &'static str) -> RingError {
    RingError::Inflight { why }
}

/// Chains that are to be served again, in order.
#[derive(Debug)]
pub(crate) struct Again {
    heads: Box<[u16]>,
    /// How many were taken.
    taken: usize,
    /// How many others can have been taken since, and not given back, at least.
    others: u16,
}

impl Again {
    /// From heads with the number by which they were taken.
    pub(crate) fn new(found: &[(u64, u16)]) -> Self {
        Self {
            heads: found.iter().map(|&(_, head)| head).collect(),
            taken: 0,
            others: 0,
        }
    }

    pub(crate) fn heads(&self) -> &[u16] {
        &self.heads
    }

    /// How many are left.
    #[inline]
    pub(crate) fn left(&self) -> u16 {
        u16::try_from(self.heads.len().saturating_sub(self.taken)).unwrap_or(u16::MAX)
    }

    /// The next, and its number.
    #[inline]
    pub(crate) fn take(&mut self) -> Option<(usize, u16)> {
        let at = self.taken;
        let head = *self.heads.get(at)?;
        self.taken = at.saturating_add(1);
        Some((at, head))
    }

    /// Another chain was taken.
    #[inline]
    pub(crate) fn took_other(&mut self) {
        self.others = self.others.saturating_add(1);
    }

    /// Gives back the chain taken last: `None` if it is another. Breaks if there is none, or it was returned.
    pub(crate) fn rewind(&mut self, in_flight: impl Fn(u16) -> bool) -> Option<ControlFlow<()>> {
        if let Some(others) = self.others.checked_sub(1) {
            self.others = others;
            return None;
        }
        let last = self.taken.checked_sub(1);
        match last.and_then(|last| Some((last, *self.heads.get(last)?))) {
            Some((last, head)) if in_flight(head) => {
                self.taken = last;
                Some(ControlFlow::Continue(()))
            }
            _ => Some(ControlFlow::Break(())),
        }
    }
}

//! Notes about a split queue's chains in flight (vhost-user, `QueueRegionSplit`). The order of stores is that of
//! [`crate::inflight`].

use std::sync::atomic::Ordering;

use crate::area::AreaRef;
use crate::error::RingError;
use crate::inflight::{Again, Inflight, VERSION, damaged};

/// Length of what precedes the entries: `features`, `version`, `desc_num`, `last_batch_head`, `used_idx`.
pub(crate) const HEADER: usize = 16;
const FEATURES: usize = 0;
const VERSION_AT: usize = 8;
const DESC_NUM: usize = 10;
const LAST_BATCH_HEAD: usize = 12;
const USED_IDX: usize = 14;
/// Length of an entry (`DescStateSplit`), of which there is one for each descriptor.
pub(crate) const ENTRY: usize = 16;
/// `inflight`, a byte, in an entry; as the first word of one it stands for itself and a `next` of 0.
const IN_FLIGHT: usize = 0;
const NEXT: usize = 6;
const COUNTER: usize = 8;

/// What is noted of one queue.
#[derive(Debug)]
pub(crate) struct Tracking {
    table: Inflight,
    /// Number of the next chain taken.
    counter: u64,
    last_batch_head: u16,
    /// Heads that were returned, and are not visibly so: as many as count.
    batch: Box<[u16]>,
    count: u16,
    pub(crate) again: Again,
}

impl Tracking {
    /// Takes the notes over, or begins them, for a queue whose used index is `used_idx`.
    pub(crate) fn resume(table: Inflight, size: u16, used_idx: u16) -> Result<Self, RingError> {
        table.check(size, false)?;
        let entries = table.entries();
        let area = table.area(false)?;
        match area.load_u16_atomic(VERSION_AT, Ordering::Acquire)? {
            0 => begin(&area, entries, used_idx)?,
            VERSION => finish_batch(&area, entries, used_idx)?,
            _ => return Err(damaged("their version is unknown")),
        }
        let mut found = Vec::new();
        for head in 0..entries {
            if area.load_u8_atomic(at(head, IN_FLIGHT), Ordering::Relaxed)? == 0 {
                continue;
            }
            if head >= size {
                return Err(damaged(
                    "a head is in flight that is not below the queue size",
                ));
            }
            let counter = area.load_u64_atomic(at(head, COUNTER), Ordering::Relaxed)?;
            found.push((counter, head));
        }
        found.sort_unstable();
        let last_batch_head = area.load_u16_atomic(LAST_BATCH_HEAD, Ordering::Relaxed)?;
        Ok(Self {
            counter: found.last().map_or(0, |&(last, _)| last.wrapping_add(1)),
            last_batch_head,
            batch: vec![0; usize::from(size)].into_boxed_slice(),
            count: 0,
            again: Again::new(&found),
            table,
        })
    }

    /// A chain was taken.
    #[inline]
    pub(crate) fn took(&mut self, head: u16) -> Result<(), RingError> {
        let area = self.table.area(false)?;
        area.store_u64_atomic(at(head, COUNTER), self.counter, Ordering::Release)?;
        area.store_u64_atomic(at(head, IN_FLIGHT), 1, Ordering::Release)?;
        self.counter = self.counter.wrapping_add(1);
        self.again.took_other();
        Ok(())
    }

    /// A chain was given back, as if it had not been taken.
    pub(crate) fn gave_back(&mut self, head: u16) -> Result<(), RingError> {
        let area = self.table.area(false)?;
        area.store_u8_atomic(at(head, IN_FLIGHT), 0, Ordering::Release)
    }

    /// A chain was returned; the driver does not see it yet.
    #[inline]
    pub(crate) fn returned(&mut self, head: u16) -> Result<(), RingError> {
        let area = self.table.area(false)?;
        area.store_u16_atomic(at(head, NEXT), self.last_batch_head, Ordering::Release)?;
        self.last_batch_head = head;
        if let Some(place) = self.batch.get_mut(usize::from(self.count)) {
            *place = head;
            self.count = self.count.saturating_add(1);
        }
        Ok(())
    }

    /// All that was returned is about to become visible.
    #[inline]
    pub(crate) fn publishes(&mut self) -> Result<(), RingError> {
        let area = self.table.area(false)?;
        area.store_u16_atomic(LAST_BATCH_HEAD, self.last_batch_head, Ordering::Release)
    }

    /// It is visible.
    #[inline]
    pub(crate) fn published(&mut self, used_idx: u16) -> Result<(), RingError> {
        let area = self.table.area(false)?;
        let batch = self.batch.get(..usize::from(self.count));
        for &head in batch.unwrap_or_default() {
            area.store_u8_atomic(at(head, IN_FLIGHT), 0, Ordering::Release)?;
        }
        self.count = 0;
        area.store_u16_atomic(USED_IDX, used_idx, Ordering::Release)
    }
}

/// Offset of a field of an entry.
#[inline]
fn at(head: u16, field: usize) -> usize {
    usize::from(head)
        .wrapping_mul(ENTRY)
        .wrapping_add(HEADER)
        .wrapping_add(field)
}

fn begin(area: &AreaRef<'_, ()>, entries: u16, used_idx: u16) -> Result<(), RingError> {
    for head in 0..entries {
        area.store_u64_atomic(at(head, IN_FLIGHT), 0, Ordering::Release)?;
    }
    area.store_u64_atomic(FEATURES, 0, Ordering::Release)?;
    area.store_u16_atomic(DESC_NUM, entries, Ordering::Release)?;
    area.store_u16_atomic(LAST_BATCH_HEAD, 0, Ordering::Release)?;
    area.store_u16_atomic(USED_IDX, used_idx, Ordering::Release)?;
    area.store_u16_atomic(VERSION_AT, VERSION, Ordering::Release)
}

/// Ends what may have been under way when the process before ended.
fn finish_batch(area: &AreaRef<'_, ()>, entries: u16, used_idx: u16) -> Result<(), RingError> {
    if area.load_u64_atomic(FEATURES, Ordering::Relaxed)? != 0 {
        return Err(damaged("they have unknown features"));
    }
    let noted = area.load_u16_atomic(DESC_NUM, Ordering::Relaxed)?;
    if noted != entries {
        // A driver that began its queue anew may have chosen another size.
        if is_idle(area, noted.min(entries))? {
            return begin(area, entries, used_idx);
        }
        return Err(damaged("they have another number of entries"));
    }
    let noted = area.load_u16_atomic(USED_IDX, Ordering::Relaxed)?;
    let batch = used_idx.wrapping_sub(noted);
    if batch == 0 {
        return Ok(());
    }
    // A driver that began its queue anew leaves nothing to go on with, and an index that has nothing to do with the last.
    if is_idle(area, entries)? {
        return area.store_u16_atomic(USED_IDX, used_idx, Ordering::Release);
    }
    if batch > entries {
        return Err(damaged("the last batch is longer than the queue"));
    }
    let mut head = area.load_u16_atomic(LAST_BATCH_HEAD, Ordering::Relaxed)?;
    for _ in 0..batch {
        if head >= entries {
            return Err(damaged("the list of the last batch leads out of them"));
        }
        area.store_u8_atomic(at(head, IN_FLIGHT), 0, Ordering::Release)?;
        head = area.load_u16_atomic(at(head, NEXT), Ordering::Relaxed)?;
    }
    area.store_u16_atomic(USED_IDX, used_idx, Ordering::Release)
}

/// Nothing is in flight.
fn is_idle(area: &AreaRef<'_, ()>, entries: u16) -> Result<bool, RingError> {
    for head in 0..entries {
        if area.load_u8_atomic(at(head, IN_FLIGHT), Ordering::Relaxed)? != 0 {
            return Ok(false);
        }
    }
    Ok(true)
}

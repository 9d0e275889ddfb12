//! Notes about a packed queue's chains in flight (vhost-user, `QueueRegionPacked`). The order of stores is that of
//! [`crate::inflight`].

use std::sync::atomic::Ordering;

use super::desc::Rest;
use super::device::IDS;
use super::layout::Cursor;
use crate::area::AreaRef;
use crate::error::RingError;
use crate::inflight::{Again, Inflight, VERSION, damaged};

/// Length of what precedes the entries, with padding.
pub(crate) const HEADER: usize = 32;
const FEATURES: usize = 0;
/// `version`, `desc_num`, `free_head`, `old_free_head`: 16 bits each.
const BEGUN: usize = 8;
/// `free_head` and `old_free_head`.
const FREE: usize = 12;
/// `used_idx`, `old_used_idx`: 16 bits each; `used_wrap_counter`, `old_used_wrap_counter`: 8 bits each; padding.
const USED: usize = 16;
/// Length of an entry (`DescStatePacked`), which is the copy of one descriptor.
pub(crate) const ENTRY: usize = 32;
/// `inflight` and padding: 8 bits each; `next`, `last`, `num`: 16 bits each.
const STATE: usize = 0;
const NEXT: usize = 2;
const COUNTER: usize = 8;
/// `id`, `flags`: 16 bits each; `len`: 32 bits.
const REST: usize = 16;
const ADDR: usize = 24;

/// What is noted of one queue.
#[derive(Debug)]
pub(crate) struct Tracking {
    table: Inflight,
    /// Number of the next chain taken.
    counter: u64,
    /// By entry: the next of its chain, or of the free list.
    next: Box<[u16]>,
    /// By the first entry of a chain: the last one.
    last: Box<[u16]>,
    /// By buffer id: the first entry of its chain.
    first: Box<[u16]>,
    /// The first free entry.
    free: u16,
    /// First entries of chains that were returned, and are not visibly so: as many as count.
    group: Box<[u16]>,
    count: u16,
    /// Descriptors that were marked used since the driver was last notified, or not.
    pub(crate) shown: u32,
    pub(crate) again: Again,
    /// Copies of the descriptors of those chains, one chain after the other, and by its number where each ends.
    copies: Box<[(u64, Rest)]>,
    ends: Box<[usize]>,
}

/// How a queue goes on.
pub(crate) struct Resumed {
    pub(crate) tracking: Tracking,
    pub(crate) next_used: Cursor,
}

/// The first entry of a chain, `last` and `num`.
type State = (u16, u16, u16);

impl Tracking {
    /// Takes the notes over, or begins them with `next_used`. `rest` reads a descriptor of the queue.
    pub(crate) fn resume(
        table: Inflight,
        size: u16,
        next_used: Cursor,
        rest: impl FnOnce(u16) -> Result<Rest, RingError>,
    ) -> Result<Resumed, RingError> {
        table.check(size, true)?;
        let entries = table.entries();
        let area = table.area(true)?;
        let [version, desc_num, free, old_free] =
            words(area.load_u64_atomic(BEGUN, Ordering::Acquire)?);
        let (free, next_used) = match version {
            0 => {
                begin(&area, entries, next_used)?;
                (0, next_used)
            }
            VERSION => {
                if area.load_u64_atomic(FEATURES, Ordering::Relaxed)? != 0 {
                    return Err(damaged("they have unknown features"));
                }
                if desc_num != entries {
                    return Err(damaged("they have another number of entries"));
                }
                let [new, old] = cursors(area.load_u64_atomic(USED, Ordering::Relaxed)?, size)?;
                // Not as the driver made it available: so the chain was returned.
                if new != old && !rest(old.at())?.is_available(old) {
                    (free, new)
                } else {
                    (old_free, old)
                }
            }
            _ => return Err(damaged("their version is unknown")),
        };
        let found = Found::read(&area, entries, size, free)?;
        store_free(&area, free, free)?;
        store_used(&area, next_used, next_used)?;
        let tracking = found.into_tracking(table, size, free)?;
        Ok(Resumed {
            tracking,
            next_used,
        })
    }

    /// How many descriptors a chain has that is to be served again.
    pub(crate) fn copies_of(&self, number: usize) -> u16 {
        u16::try_from(self.span(number).len()).unwrap_or(u16::MAX)
    }

    fn span(&self, number: usize) -> std::ops::Range<usize> {
        let end = |number: usize| self.ends.get(number).copied().unwrap_or(0);
        number.checked_sub(1).map_or(0, end)..end(number)
    }

    /// A descriptor of such a chain.
    #[inline]
    pub(crate) fn copy(&self, number: usize, at: u16) -> Option<(u64, Rest)> {
        let copies = self.copies.get(self.span(number))?;
        copies.get(usize::from(at)).copied()
    }

    /// A chain of `count` descriptors was taken; `descriptor` reads them.
    #[inline]
    pub(crate) fn took(
        &mut self,
        id: u16,
        count: u16,
        descriptor: impl Fn(u16) -> Result<(u64, Rest), RingError>,
    ) -> Result<(), RingError> {
        let area = self.table.area(true)?;
        let head = self.free;
        let (mut entry, mut last) = (head, head);
        for number in 0..count {
            let (addr, rest) = descriptor(number)?;
            let Some(&next) = self.next.get(usize::from(entry)) else {
                return Err(damaged("they are full"));
            };
            area.store_u64_atomic(at(entry, ADDR), addr, Ordering::Release)?;
            area.store_u64_atomic(at(entry, REST), rest_word(rest), Ordering::Release)?;
            (last, entry) = (entry, next);
        }
        if let (Some(first), Some(end), Some(&next)) = (
            self.first.get_mut(usize::from(id)),
            self.last.get_mut(usize::from(head)),
            self.next.get(usize::from(head)),
        ) {
            (*first, *end) = (head, last);
            area.store_u64_atomic(at(head, COUNTER), self.counter, Ordering::Release)?;
            let state = word([1, next, last, count]);
            area.store_u64_atomic(at(head, STATE), state, Ordering::Release)?;
        }
        self.free = entry;
        self.counter = self.counter.wrapping_add(1);
        self.again.took_other();
        store_free(&area, entry, entry)
    }

    /// A chain was given back, as if it had not been taken.
    pub(crate) fn gave_back(&mut self, id: u16) -> Result<(), RingError> {
        let head = self.first.get(usize::from(id)).copied();
        let head = head.unwrap_or(u16::MAX);
        self.release(head)?;
        let area = self.table.area(true)?;
        store_free(&area, head, head)?;
        area.store_u8_atomic(at(head, STATE), 0, Ordering::Release)
    }

    /// A chain was returned; the driver does not see it yet.
    #[inline]
    pub(crate) fn returned(&mut self, id: u16) {
        if let (Some(&head), Some(place)) = (
            self.first.get(usize::from(id)),
            self.group.get_mut(usize::from(self.count)),
        ) {
            *place = head;
            self.count = self.count.saturating_add(1);
        }
    }

    /// All that was returned is about to become visible: the used index moves.
    #[inline]
    pub(crate) fn publishes(&mut self, old: Cursor, new: Cursor) -> Result<(), RingError> {
        let old_free = self.free;
        for number in 0..self.count {
            if let Some(&head) = self.group.get(usize::from(number)) {
                self.release(head)?;
            }
        }
        let area = self.table.area(true)?;
        store_free(&area, self.free, old_free)?;
        store_used(&area, new, old)
    }

    /// It is visible.
    #[inline]
    pub(crate) fn published(&mut self, new: Cursor, moved: u16) -> Result<(), RingError> {
        let area = self.table.area(true)?;
        let group = self.group.get(..usize::from(self.count));
        for &head in group.unwrap_or_default() {
            area.store_u8_atomic(at(head, STATE), 0, Ordering::Release)?;
        }
        self.count = 0;
        self.shown = self.shown.saturating_add(moved.into());
        store_free(&area, self.free, self.free)?;
        store_used(&area, new, new)
    }

    /// Puts the entries of a chain before the free ones.
    #[inline]
    fn release(&mut self, head: u16) -> Result<(), RingError> {
        let last = self.last.get(usize::from(head)).copied();
        let last = last.unwrap_or(u16::MAX);
        if let Some(next) = self.next.get_mut(usize::from(last)) {
            *next = self.free;
            let area = self.table.area(true)?;
            area.store_u16_atomic(at(last, NEXT), self.free, Ordering::Release)?;
            self.free = head;
        }
        Ok(())
    }
}

/// What the notes say, checked.
struct Found {
    next: Box<[u16]>,
    chains: Vec<(u64, State)>,
    copies: Vec<(u64, Rest)>,
    ends: Vec<usize>,
}

impl Found {
    fn read(area: &AreaRef<'_, ()>, entries: u16, size: u16, free: u16) -> Result<Self, RingError> {
        let states = (0..entries)
            .map(|entry| area.load_u64_atomic(at(entry, STATE), Ordering::Relaxed))
            .map(|state| state.map(words))
            .collect::<Result<Vec<_>, _>>()?;
        let mut seen = vec![false; usize::from(entries)];
        // An entry that was seen before, or is none, ends a list.
        let mut visit = |entry: u16| match seen.get_mut(usize::from(entry)) {
            Some(seen) if !*seen => {
                *seen = true;
                states.get(usize::from(entry)).map(|&[_, next, ..]| next)
            }
            _ => None,
        };
        let mut free_entries = vec![false; usize::from(entries)];
        let mut left = entries;
        let mut entry = free;
        while let Some(after) = visit(entry) {
            left = left.saturating_sub(1);
            // What is free is not in flight, whatever was under way.
            area.store_u8_atomic(at(entry, STATE), 0, Ordering::Release)?;
            if let Some(is_free) = free_entries.get_mut(usize::from(entry)) {
                *is_free = true;
            }
            entry = after;
        }
        if entry < entries {
            return Err(damaged("their free list loops"));
        }
        let mut chains = Vec::new();
        for ((head, &[in_flight, _, last, num]), is_free) in (0..).zip(&states).zip(free_entries) {
            if in_flight & 0xff != 0 && !is_free {
                let counter = area.load_u64_atomic(at(head, COUNTER), Ordering::Relaxed)?;
                chains.push((counter, (head, last, num)));
            }
        }
        chains.sort_unstable();
        let (mut copies, mut ends) = (Vec::new(), Vec::new());
        let mut room = size;
        for &(_, (head, last, num)) in &chains {
            room = room
                .checked_sub(num)
                .filter(|_| num > 0)
                .ok_or_else(|| damaged("chains in flight have no descriptors, or too many"))?;
            left = left.saturating_sub(num);
            let (mut entry, mut end) = (head, head);
            for _ in 0..num {
                let after = visit(entry)
                    .ok_or_else(|| damaged("a chain leads out of them, or into another"))?;
                let rest = area.load_u64_atomic(at(entry, REST), Ordering::Relaxed)?;
                let addr = area.load_u64_atomic(at(entry, ADDR), Ordering::Relaxed)?;
                copies.push((addr, rest_from(rest)));
                (end, entry) = (entry, after);
            }
            if end != last {
                return Err(damaged("a chain ends elsewhere than it says"));
            }
            ends.push(copies.len());
        }
        if left > 0 {
            return Err(damaged("an entry is neither free nor in flight"));
        }
        Ok(Self {
            next: states.iter().map(|&[_, next, ..]| next).collect(),
            chains,
            copies,
            ends,
        })
    }

    fn into_tracking(self, table: Inflight, size: u16, free: u16) -> Result<Tracking, RingError> {
        let Self {
            next,
            chains,
            copies,
            ends,
        } = self;
        let mut first = vec![0; IDS].into_boxed_slice();
        let mut last = vec![0; next.len()].into_boxed_slice();
        let mut found = Vec::with_capacity(chains.len());
        for (&(counter, (head, end, _)), &after) in chains.iter().zip(&ends) {
            // A chain's id stands in its last descriptor (VIRTIO 1.3, 2.8.6).
            let id = after.checked_sub(1).and_then(|at| copies.get(at));
            let id = id.map_or(0, |(_, rest)| rest.id);
            if let (Some(known), Some(known_end)) = (
                first.get_mut(usize::from(id)),
                last.get_mut(usize::from(head)),
            ) {
                (*known, *known_end) = (head, end);
            }
            found.push((counter, id));
        }
        Ok(Tracking {
            table,
            counter: found.last().map_or(0, |&(last, _)| last.wrapping_add(1)),
            next,
            last,
            first,
            free,
            group: vec![0; usize::from(size)].into_boxed_slice(),
            count: 0,
            shown: 0,
            again: Again::new(&found),
            copies: copies.into_boxed_slice(),
            ends: ends.into_boxed_slice(),
        })
    }
}

fn begin(area: &AreaRef<'_, ()>, entries: u16, next_used: Cursor) -> Result<(), RingError> {
    for entry in 0..entries {
        // The last one leads to none.
        let state = word([0, entry.saturating_add(1), 0, 0]);
        area.store_u64_atomic(at(entry, STATE), state, Ordering::Release)?;
    }
    area.store_u64_atomic(FEATURES, 0, Ordering::Release)?;
    store_used(area, next_used, next_used)?;
    area.store_u64_atomic(BEGUN, word([VERSION, entries, 0, 0]), Ordering::Release)
}

/// Offset of a field of an entry.
#[inline]
fn at(entry: u16, field: usize) -> usize {
    usize::from(entry)
        .wrapping_mul(ENTRY)
        .wrapping_add(HEADER)
        .wrapping_add(field)
}

/// `free_head` and `old_free_head`, in one store.
#[inline]
fn store_free(area: &AreaRef<'_, ()>, free: u16, old: u16) -> Result<(), RingError> {
    let value = u32::from(free) | u32::from(old) << 16;
    area.store_u32_atomic(FREE, value, Ordering::Release)
}

/// The used index, the old one and their wrap counters, in one store.
#[inline]
fn store_used(area: &AreaRef<'_, ()>, new: Cursor, old: Cursor) -> Result<(), RingError> {
    let wraps = u16::from(new.wrap()) | u16::from(old.wrap()) << 8;
    area.store_u64_atomic(
        USED,
        word([new.at(), old.at(), wraps, 0]),
        Ordering::Release,
    )
}

/// The used index and the old one.
fn cursors(value: u64, size: u16) -> Result<[Cursor; 2], RingError> {
    let [new, old, wraps, _] = words(value);
    let [new_wrap, old_wrap] = wraps.to_le_bytes();
    let cursor = |at: u16, wrap: u8| {
        let fresh = if wrap & 1 != 0 {
            super::layout::FRESH
        } else {
            0
        };
        match Cursor::from_index(at | fresh, size) {
            Ok(cursor) if cursor.at() == at => Ok(cursor),
            _ => Err(damaged("a used index is not below the queue size")),
        }
    };
    Ok([cursor(new, new_wrap)?, cursor(old, old_wrap)?])
}

#[inline]
const fn word([a, b, c, d]: [u16; 4]) -> u64 {
    a as u64 | (b as u64) << 16 | (c as u64) << 32 | (d as u64) << 48
}

#[inline]
const fn words(value: u64) -> [u16; 4] {
    let [a0, a1, b0, b1, c0, c1, d0, d1] = value.to_le_bytes();
    [
        u16::from_le_bytes([a0, a1]),
        u16::from_le_bytes([b0, b1]),
        u16::from_le_bytes([c0, c1]),
        u16::from_le_bytes([d0, d1]),
    ]
}

/// `id`, `flags` and `len` as an entry has them.
#[inline]
const fn rest_word(rest: Rest) -> u64 {
    rest.id as u64 | (rest.flags as u64) << 16 | (rest.len as u64) << 32
}

const fn rest_from(value: u64) -> Rest {
    let [i0, i1, f0, f1, l0, l1, l2, l3] = value.to_le_bytes();
    Rest {
        len: u32::from_le_bytes([l0, l1, l2, l3]),
        id: u16::from_le_bytes([i0, i1]),
        flags: u16::from_le_bytes([f0, f1]),
    }
}

//! Where the bytes of an image lie: a table of fixed size that workers read without a lock, and only the companion writes.
//!
//! A granule is the smallest cluster of all layers, so that each granule lies in one piece in one file. An entry is a
//! single word and so never torn: what the granule is, in which layer, where there, and which of the granules that
//! share the place it belongs to.
//!
//! ```text
//!  63 62 61      56 55           38 37                          0
//!  kind │ layer    │ tag           │ offset in the file, in granules
//! ```

use std::sync::atomic::{AtomicU64, Ordering};

/// Most entries: 8 MiB, enough for 64 GiB of 64 KiB clusters.
const MAX_ENTRIES: u64 = 1 << 20;
/// Most files of an image and its backing files.
pub(super) const MAX_LAYERS: usize = 1 << LAYER_BITS;

const OFFSET_BITS: u32 = 38;
const TAG_BITS: u32 = 18;
const LAYER_BITS: u32 = 6;
const KIND_SHIFT: u32 = OFFSET_BITS + TAG_BITS + LAYER_BITS;

/// Kinds of entries; 0 is none.
const ZEROES: u64 = 1;
const FROZEN: u64 = 2;
const WRITABLE: u64 = 3;

/// What is known of a granule.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Entry {
    /// It reads as zeroes, and has no place to write to.
    Zeroes,
    /// It is in a file.
    Data {
        /// Number of the file.
        layer: u8,
        /// Where the granule begins there, in bytes: a multiple of the granule.
        offset: u64,
        /// It may be written there.
        writable: bool,
    },
}

/// Where the first bytes of a range are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::blk) enum Place {
    /// In a file.
    File {
        /// Number of the file.
        layer: u8,
        /// Offset in bytes.
        offset: u64,
        /// How many bytes are there.
        len: u64,
    },
    /// Nowhere: this many bytes read as zeroes.
    Zeroes {
        /// How many.
        len: u64,
    },
    /// The table does not say, or they have no place that may be written: ask the companion.
    Unknown,
}

/// The table.
#[derive(Debug)]
pub(super) struct Map {
    /// Binary logarithm of the granule in bytes.
    shift: u32,
    /// Binary logarithm of the number of entries.
    index_bits: u32,
    entries: Box<[AtomicU64]>,
}

impl Map {
    /// An empty table for a disk of `capacity` bytes whose granule has `1 << shift` bytes.
    pub(super) fn new(shift: u32, capacity: u64) -> Self {
        let granules = (capacity >> shift).saturating_add(1).min(MAX_ENTRIES);
        let index_bits = granules.next_power_of_two().ilog2();
        Self {
            shift,
            index_bits,
            entries: (0..1_u64 << index_bits)
                .map(|_| AtomicU64::new(0))
                .collect(),
        }
    }

    /// The granule in bytes.
    pub(super) fn granule(&self) -> u64 {
        1 << self.shift
    }

    /// The entry's place, and the tag of a granule.
    fn slot(&self, granule: u64) -> Option<(&AtomicU64, u64)> {
        let index = granule & ((1 << self.index_bits) - 1);
        let entry = self.entries.get(usize::try_from(index).ok()?)?;
        Some((entry, granule >> self.index_bits))
    }

    fn get(&self, granule: u64) -> Option<Entry> {
        let (entry, tag) = self.slot(granule)?;
        // Acquire: what the companion wrote to the files before, the reader of this entry finds there.
        let word = entry.load(Ordering::Acquire);
        if (word >> OFFSET_BITS) & ((1 << TAG_BITS) - 1) != tag {
            return None;
        }
        let kind = word >> KIND_SHIFT;
        match kind {
            ZEROES => Some(Entry::Zeroes),
            FROZEN | WRITABLE => Some(Entry::Data {
                layer: u8::try_from((word >> (OFFSET_BITS + TAG_BITS)) & ((1 << LAYER_BITS) - 1))
                    .ok()?,
                offset: (word & ((1 << OFFSET_BITS) - 1)) << self.shift,
                writable: kind == WRITABLE,
            }),
            _ => None,
        }
    }

    /// Notes what a granule is. What an entry has no room for stays unknown.
    pub(super) fn set(&self, granule: u64, known: Entry) {
        let Some((entry, tag)) = self.slot(granule) else {
            return;
        };
        let (kind, layer, place) = match known {
            Entry::Zeroes => (ZEROES, 0, 0),
            Entry::Data {
                layer,
                offset,
                writable,
            } => (
                if writable { WRITABLE } else { FROZEN },
                u64::from(layer),
                offset >> self.shift,
            ),
        };
        let fits = tag >> TAG_BITS == 0 && layer >> LAYER_BITS == 0 && place >> OFFSET_BITS == 0;
        let word = if fits {
            (kind << KIND_SHIFT)
                | (layer << (OFFSET_BITS + TAG_BITS))
                | (tag << OFFSET_BITS)
                | place
        } else {
            0
        };
        entry.store(word, Ordering::Release);
    }

    /// Forgets the granules that overlap a range of bytes.
    pub(super) fn forget(&self, offset: u64, len: u64) {
        let first = offset >> self.shift;
        let last = offset.saturating_add(len.saturating_sub(1)) >> self.shift;
        let all = 1_u64 << self.index_bits;
        for granule in (first..=last).take(usize::try_from(all).unwrap_or(usize::MAX)) {
            // Whoever has the place: it would be looked up again.
            if let Some((entry, _)) = self.slot(granule) {
                entry.store(0, Ordering::Release);
            }
        }
    }

    /// Where the first bytes of a range are, which is not empty; to `write` there or to read.
    pub(super) fn find(&self, offset: u64, len: u64, write: bool) -> Place {
        let granule = offset >> self.shift;
        let within = offset & (self.granule() - 1);
        let Some(first) = self.get(granule) else {
            return Place::Unknown;
        };
        let mut known = self.granule().saturating_sub(within);
        let mut next = granule;
        while known < len {
            next = next.saturating_add(1);
            let expected = match first {
                Entry::Zeroes => Entry::Zeroes,
                Entry::Data {
                    layer,
                    offset,
                    writable,
                } => Entry::Data {
                    layer,
                    offset: offset.saturating_add(next.saturating_sub(granule) << self.shift),
                    writable,
                },
            };
            if self.get(next) != Some(expected) {
                break;
            }
            known = known.saturating_add(self.granule());
        }
        let len = known.min(len);
        match first {
            Entry::Zeroes if !write => Place::Zeroes { len },
            Entry::Data {
                layer,
                offset,
                writable,
            } if writable || !write => Place::File {
                layer,
                offset: offset.saturating_add(within),
                len,
            },
            _ => Place::Unknown,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashMap;

    const K64: u64 = 1 << 16;

    fn data(layer: u8, offset: u64, writable: bool) -> Entry {
        Entry::Data {
            layer,
            offset,
            writable,
        }
    }

    #[test]
    fn ranges_go_on_as_long_as_they_are_in_one_piece() {
        let map = Map::new(16, 1 << 30);
        assert_eq!(map.find(0, 512, false), Place::Unknown);
        map.set(0, data(0, 8 * K64, true));
        map.set(1, data(0, 9 * K64, true));
        map.set(2, data(0, 11 * K64, true));
        map.set(3, data(1, 12 * K64, false));
        map.set(4, Entry::Zeroes);
        map.set(5, Entry::Zeroes);
        let file = |layer, offset, len| Place::File { layer, offset, len };
        assert_eq!(map.find(512, 4096, true), file(0, 8 * K64 + 512, 4096));
        assert_eq!(
            map.find(512, 10 * K64, true),
            file(0, 8 * K64 + 512, 2 * K64 - 512)
        );
        assert_eq!(map.find(2 * K64, 2 * K64, false), file(0, 11 * K64, K64));
        assert_eq!(map.find(3 * K64, 2 * K64, false), file(1, 12 * K64, K64));
        assert_eq!(map.find(3 * K64, 512, true), Place::Unknown);
        assert_eq!(
            map.find(4 * K64, 5 * K64, false),
            Place::Zeroes { len: 2 * K64 }
        );
        assert_eq!(map.find(4 * K64, 512, true), Place::Unknown);
        map.forget(K64 - 1, 2);
        assert_eq!(map.find(0, 512, false), Place::Unknown);
        assert_eq!(map.find(K64, 512, false), Place::Unknown);
        assert_eq!(map.find(2 * K64, 512, false), file(0, 11 * K64, 512));
    }

    #[test]
    fn granules_that_share_a_place_are_told_apart() {
        let map = Map::new(9, 1 << 40);
        map.set(5, data(0, 512, true));
        assert_eq!(
            map.find((5 + MAX_ENTRIES) * 512, 512, false),
            Place::Unknown
        );
        map.set(5 + MAX_ENTRIES, data(0, 1024, true));
        assert_eq!(map.find(5 * 512, 512, false), Place::Unknown);
    }

    #[test]
    fn what_has_no_room_stays_unknown() {
        let map = Map::new(9, u64::MAX);
        map.set(1 << (20 + 18), Entry::Zeroes);
        assert_eq!(map.find(0, 512, false), Place::Unknown);
        map.set(0, data(0, 1 << (38 + 9), true));
        assert_eq!(map.find(0, 512, false), Place::Unknown);
        map.set(0, data(64, 0, true));
        assert_eq!(map.find(0, 512, false), Place::Unknown);
    }

    proptest! {
        #[test]
        fn an_entry_is_what_was_set_last_or_unknown(sets in prop::collection::vec((0..1_u64 << 22, 0..64_u8, 0..1_u64 << 30, any::<bool>()), 1..200)) {
            let map = Map::new(12, 1 << 34);
            let mut last = HashMap::new();
            for (granule, layer, place, writable) in sets {
                let entry = data(layer, place << 12, writable);
                map.set(granule, entry);
                last.insert(granule, entry);
            }
            for (granule, entry) in last {
                prop_assert!(map.get(granule).is_none_or(|known| known == entry));
            }
        }
    }
}

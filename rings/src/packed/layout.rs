//! Places in a packed ring, and the event suppression structures (VIRTIO 1.3, 2.8).

use crate::error::RingError;

/// Alignment of an event suppression structure in bytes (VIRTIO 1.3, 2.8.10.1).
pub(crate) const EVENT_ALIGN: u64 = 4;
/// Size of an event suppression structure in bytes (VIRTIO 1.3, 2.8.10.1).
pub(crate) const EVENT_LEN: usize = 4;

/// Where the index stands on a fresh queue: place 0, wrap counter 1 (VIRTIO 1.3, 2.8.1).
pub(crate) const FRESH: u16 = WRAP;

/// The wrap counter beside a place in the ring, in an event suppression structure (VIRTIO 1.3, 2.8.14) and in
/// an index of the transport.
const WRAP: u16 = 1 << 15;

/// A place in the ring, with the wrap counter of the side that is there (VIRTIO 1.3, 2.8.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Cursor {
    at: u16,
    wrap: bool,
}

impl Cursor {
    /// The cursor that an index of the transport stands for.
    pub(crate) fn from_index(index: u16, size: u16) -> Result<Self, RingError> {
        let cursor = Self::from_bits(index);
        if cursor.at >= size {
            return Err(RingError::Index { index, size });
        }
        Ok(cursor)
    }

    const fn from_bits(bits: u16) -> Self {
        Self {
            at: bits & !WRAP,
            wrap: bits & WRAP != 0,
        }
    }

    /// As 16 bits: the place, and the wrap counter above it.
    #[inline]
    pub(crate) const fn bits(self) -> u16 {
        if self.wrap { self.at | WRAP } else { self.at }
    }

    /// Number of the descriptor.
    #[inline]
    pub(crate) const fn at(self) -> u16 {
        self.at
    }

    /// The wrap counter.
    #[inline]
    pub(crate) const fn wrap(self) -> bool {
        self.wrap
    }

    /// The cursor `count` descriptors further, at most once around.
    #[inline]
    pub(crate) const fn after(self, count: u16, size: u16) -> Self {
        let at = self.at.wrapping_add(count);
        if at < size {
            Self { at, ..self }
        } else {
            Self {
                at: at.wrapping_sub(size),
                wrap: !self.wrap,
            }
        }
    }

    /// The cursor `count` descriptors back, at most once around.
    #[inline]
    pub(crate) const fn before(self, count: u16, size: u16) -> Self {
        if count <= self.at {
            Self {
                at: self.at.wrapping_sub(count),
                ..self
            }
        } else {
            Self {
                at: self.at.wrapping_add(size).wrapping_sub(count),
                wrap: !self.wrap,
            }
        }
    }

    /// How far it is to another cursor. The wrap counters tell two rounds apart, and no more.
    const fn distance(self, to: Self, size: u16) -> u32 {
        let (from, to) = (self.in_two_rounds(size), to.in_two_rounds(size));
        if from <= to {
            to.wrapping_sub(from)
        } else {
            let rounds = 2_u32.wrapping_mul(size as u32);
            to.wrapping_add(rounds).wrapping_sub(from)
        }
    }

    const fn in_two_rounds(self, size: u16) -> u32 {
        let round = if self.wrap { 0 } else { size as u32 };
        (self.at as u32).wrapping_add(round)
    }
}

/// What one side wants to be told of (VIRTIO 1.3, 2.8.10).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Event {
    /// RING_EVENT_FLAGS_ENABLE: everything.
    Enable,
    /// RING_EVENT_FLAGS_DISABLE: nothing.
    Disable,
    /// RING_EVENT_FLAGS_DESC: the descriptor here.
    Desc(Cursor),
}

impl Event {
    /// The structure in host byte order: `desc` and `flags` (VIRTIO 1.3, 2.8.14).
    #[inline]
    pub(crate) const fn to_bits(self) -> u32 {
        match self {
            Self::Enable => 0,
            Self::Disable => 1 << 16,
            Self::Desc(cursor) => cursor.bits() as u32 | 2 << 16,
        }
    }

    /// What the other side wrote; it is free to write anything. RING_EVENT_FLAGS_DESC without
    /// VIRTIO_F_EVENT_IDX and the reserved value are taken as a wish to hear everything.
    #[inline]
    pub(crate) const fn from_bits(bits: u32, event_idx: bool) -> Self {
        let [d0, d1, flags, _] = bits.to_le_bytes();
        match flags & 3 {
            1 => Self::Disable,
            2 if event_idx => Self::Desc(Cursor::from_bits(u16::from_le_bytes([d0, d1]))),
            _ => Self::Enable,
        }
    }

    /// Whether the other side is to be told that this one moved `moved` descriptors on from `old`.
    #[inline]
    pub(crate) const fn wants(self, old: Cursor, moved: u16, size: u16) -> bool {
        match self {
            Self::Enable => true,
            Self::Disable => false,
            Self::Desc(cursor) => old.distance(cursor, size) < moved as u32,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::MAX_SIZE;

    const SIZES: [u16; 5] = [1, 3, 8, 300, MAX_SIZE];

    #[test]
    fn cursors_go_around_and_back() {
        for size in SIZES {
            let start = Cursor::from_index(FRESH, size).unwrap();
            assert_eq!((start.at(), start.wrap()), (0, true));
            let mut cursor = start;
            for round in 0..4 {
                for at in 0..size.min(400) {
                    let step = if at + 1 == size.min(400) {
                        size - at
                    } else {
                        1
                    };
                    assert_eq!((cursor.at(), cursor.wrap()), (at, round % 2 == 0));
                    let next = cursor.after(step, size);
                    assert_eq!(next.before(step, size), cursor);
                    assert_eq!(cursor.distance(next, size), u32::from(step));
                    cursor = next;
                }
            }
            assert_eq!(cursor, start);
            assert_eq!(start.after(size, size).bits(), 0);
            assert!(size == MAX_SIZE || Cursor::from_index(size, size).is_err());
        }
    }

    /// `wants` against its definition: the descriptor waited for is among those moved over.
    #[test]
    fn event_is_wanted_when_its_descriptor_was_written() {
        for size in 1..=if cfg!(miri) { 5 } else { 16 } {
            for old in 0..2 * size {
                let old = Cursor::from_bits(FRESH)
                    .after(old / 2, size)
                    .after(old - old / 2, size);
                for moved in 1..=size {
                    let written: Vec<_> = (0..moved).map(|i| old.after(i, size)).collect();
                    for event in (0..size).flat_map(|at| [at, at | WRAP]) {
                        let event = Cursor::from_bits(event);
                        let wanted = Event::Desc(event).wants(old, moved, size);
                        assert_eq!(
                            wanted,
                            written.contains(&event),
                            "{event:?} {old:?} {moved}"
                        );
                    }
                }
            }
        }
    }

    #[test]
    fn events_are_the_structure_of_the_specification() {
        let cursor = Cursor::from_bits(0x8123);
        for (event, bytes) in [
            (Event::Enable, [0, 0, 0, 0]),
            (Event::Disable, [0, 0, 1, 0]),
            (Event::Desc(cursor), [0x23, 0x81, 2, 0]),
        ] {
            let bits = event.to_bits();
            assert_eq!(bits.to_le_bytes(), bytes);
            assert_eq!(Event::from_bits(bits, true), event);
        }
        let desc = Event::Desc(cursor).to_bits();
        assert_eq!(Event::from_bits(desc, false), Event::Enable);
        assert_eq!(Event::from_bits(0xffff_ffff, true), Event::Enable);
        assert_eq!(Event::from_bits(0xfffd_ffff, true), Event::Disable);
    }
}

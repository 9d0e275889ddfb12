//! One packed-ring descriptor as two little-endian words (VIRTIO 1.3, 2.8.13).

use super::layout::Cursor;

/// The buffer continues in the next descriptor (VIRTIO 1.3, 2.8.6).
pub(crate) const DESC_F_NEXT: u16 = 1;
/// Device-writable; of a used descriptor: `len` is valid (VIRTIO 1.3, 2.8.3).
pub(crate) const DESC_F_WRITE: u16 = 2;
/// The buffer is a table of descriptors (VIRTIO 1.3, 2.8.7).
pub(crate) const DESC_F_INDIRECT: u16 = 4;
/// With [`DESC_F_USED`]: whose turn it is (VIRTIO 1.3, 2.8.1).
const DESC_F_AVAIL: u16 = 1 << 7;
/// See [`DESC_F_AVAIL`].
const DESC_F_USED: u16 = 1 << 15;
const TURN: u16 = DESC_F_AVAIL | DESC_F_USED;

/// A descriptor without its address, decoded from a single read: what is checked is what is used. Its word
/// holds all that the two sides tell each other by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Rest {
    pub(crate) len: u32,
    pub(crate) id: u16,
    pub(crate) flags: u16,
}

impl Rest {
    /// Decodes the second word of a descriptor, in host byte order.
    #[inline]
    pub(crate) const fn from_word(word: u64) -> Self {
        let [l0, l1, l2, l3, i0, i1, f0, f1] = word.to_le_bytes();
        Self {
            len: u32::from_le_bytes([l0, l1, l2, l3]),
            id: u16::from_le_bytes([i0, i1]),
            flags: u16::from_le_bytes([f0, f1]),
        }
    }

    /// The second word of the descriptor, in host byte order.
    #[inline]
    pub(crate) const fn to_word(self) -> u64 {
        self.len as u64 | (self.id as u64) << 32 | (self.flags as u64) << 48
    }

    #[inline]
    pub(crate) const fn has_next(self) -> bool {
        self.flags & DESC_F_NEXT != 0
    }

    #[inline]
    pub(crate) const fn is_writable(self) -> bool {
        self.flags & DESC_F_WRITE != 0
    }

    #[inline]
    pub(crate) const fn is_indirect(self) -> bool {
        self.flags & DESC_F_INDIRECT != 0
    }

    /// The driver made it available, if it has come to `cursor` for the first time since the device was there.
    #[inline]
    pub(crate) const fn is_available(self, cursor: Cursor) -> bool {
        self.flags & TURN == available(cursor)
    }

    /// The device used it, if it has come to `cursor` for the first time since the driver was there.
    #[inline]
    pub(crate) const fn is_used(self, cursor: Cursor) -> bool {
        self.flags & TURN == used(cursor)
    }
}

/// Flags by which the driver makes the descriptor at `cursor` available.
#[inline]
pub(crate) const fn available(cursor: Cursor) -> u16 {
    if cursor.wrap() {
        DESC_F_AVAIL
    } else {
        DESC_F_USED
    }
}

/// Flags by which the device marks the descriptor at `cursor` used.
#[inline]
pub(crate) const fn used(cursor: Cursor) -> u16 {
    if cursor.wrap() { TURN } else { 0 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use virtio_queue::desc::packed::Descriptor;
    use vm_memory::ByteValued;

    /// The same bytes as virtio-queue's descriptor, and back.
    #[test]
    fn words_are_a_descriptor() {
        let rest = Rest {
            len: 0x090a_0b0c,
            id: 0x0d0e,
            flags: 0x0f10,
        };
        assert_eq!(Rest::from_word(rest.to_word()), rest);
        let theirs = Descriptor::new(0x0102_0304_0506_0708, rest.len, rest.id, rest.flags);
        assert_eq!(theirs.as_slice()[8..], rest.to_word().to_le_bytes());
    }

    #[test]
    fn turns_follow_the_wrap_counter() {
        let first = Cursor::from_index(0x8000, 4).unwrap();
        let second = Cursor::from_index(0, 4).unwrap();
        let flags = |flags| Rest {
            len: 0,
            id: 0,
            flags,
        };
        // A ring begins with zeroes: neither available nor used.
        for (value, is) in [
            (0x0000, [false, false, false, true]),
            (0x0080, [true, false, false, false]),
            (0x8080, [false, true, false, false]),
            (0x8000, [false, false, true, false]),
        ] {
            let rest = flags(value | 0x7f7f);
            let found = [
                rest.is_available(first),
                rest.is_used(first),
                rest.is_available(second),
                rest.is_used(second),
            ];
            assert_eq!(found, is, "{value:#x}");
        }
    }
}

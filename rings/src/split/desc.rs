//! One split-ring descriptor as two little-endian words (VIRTIO 1.3, 2.7.5).

use super::layout::{DESC_F_INDIRECT, DESC_F_NEXT, DESC_F_WRITE};

/// A descriptor, decoded from a single read: what is checked is what is used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Desc {
    pub(crate) addr: u64,
    pub(crate) len: u32,
    pub(crate) flags: u16,
    pub(crate) next: u16,
}

impl Desc {
    /// Decodes the two words of a descriptor, in host byte order.
    #[inline]
    pub(crate) const fn from_words(addr: u64, rest: u64) -> Self {
        let [l0, l1, l2, l3, f0, f1, n0, n1] = rest.to_le_bytes();
        Self {
            addr,
            len: u32::from_le_bytes([l0, l1, l2, l3]),
            flags: u16::from_le_bytes([f0, f1]),
            next: u16::from_le_bytes([n0, n1]),
        }
    }

    /// The two words of the descriptor, in host byte order.
    #[inline]
    pub(crate) const fn to_words(self) -> (u64, u64) {
        let [l0, l1, l2, l3] = self.len.to_le_bytes();
        let [f0, f1] = self.flags.to_le_bytes();
        let [n0, n1] = self.next.to_le_bytes();
        (
            self.addr,
            u64::from_le_bytes([l0, l1, l2, l3, f0, f1, n0, n1]),
        )
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
}

#[cfg(test)]
mod tests {
    use super::*;
    use virtio_queue::desc::split::Descriptor;
    use vm_memory::ByteValued;

    /// The same bytes as virtio-queue's descriptor, and back.
    #[test]
    fn words_are_a_descriptor() {
        let desc = Desc {
            addr: 0x0102_0304_0506_0708,
            len: 0x090a_0b0c,
            flags: 0x0d0e,
            next: 0x0f10,
        };
        let (first, second) = desc.to_words();
        assert_eq!(Desc::from_words(first, second), desc);
        let theirs = Descriptor::new(desc.addr, desc.len, desc.flags, desc.next);
        let bytes = [first.to_le_bytes(), second.to_le_bytes()].concat();
        assert_eq!(theirs.as_slice(), bytes);
    }

    #[test]
    fn flags_are_told_apart() {
        let desc = |flags| Desc {
            addr: 0,
            len: 0,
            flags,
            next: 0,
        };
        let flags = |d: Desc| (d.has_next(), d.is_writable(), d.is_indirect());
        assert_eq!(flags(desc(1)), (true, false, false));
        assert_eq!(flags(desc(2)), (false, true, false));
        assert_eq!(flags(desc(4)), (false, false, true));
        assert_eq!(flags(desc(0xfff8)), (false, false, false));
    }
}

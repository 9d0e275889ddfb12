//! Offsets and sizes of the two rings of a split virtqueue (VIRTIO 1.3, 2.7).

/// Alignment of the available ring in bytes (VIRTIO 1.3, 2.7).
pub(crate) const AVAIL_ALIGN: u64 = 2;
/// Alignment of the used ring in bytes (VIRTIO 1.3, 2.7).
pub(crate) const USED_ALIGN: u64 = 4;

/// `flags` comes first in both rings (VIRTIO 1.3, 2.7.6 and 2.7.8).
pub(crate) const FLAGS: usize = 0;
/// `idx` follows it.
pub(crate) const IDX: usize = 2;
/// The ring's elements follow that.
const ELEMENTS: usize = 4;
/// Size of an element of the available ring.
const AVAIL_ELEMENT: usize = 2;
/// Size of an element of the used ring.
const USED_ELEMENT: usize = 8;
/// Size of `used_event` and of `avail_event`, behind the elements whether negotiated or not.
const EVENT: usize = 2;

/// Available ring flag: the device need not interrupt (VIRTIO 1.3, 2.7.6).
pub(crate) const AVAIL_F_NO_INTERRUPT: u16 = 1;
/// Used ring flag: the driver need not notify (VIRTIO 1.3, 2.7.8).
pub(crate) const USED_F_NO_NOTIFY: u16 = 1;

/// Descriptor flag: `next` is valid (VIRTIO 1.3, 2.7.5).
pub(crate) const DESC_F_NEXT: u16 = 1;
/// Descriptor flag: device-writable (VIRTIO 1.3, 2.7.5).
pub(crate) const DESC_F_WRITE: u16 = 2;
/// Descriptor flag: the buffer is a table of descriptors (VIRTIO 1.3, 2.7.5).
pub(crate) const DESC_F_INDIRECT: u16 = 4;

// None of the sums below can overflow: every argument stems from a u16.

/// Bytes of an available ring of `size` elements.
#[inline]
pub(crate) const fn avail_len(size: u16) -> usize {
    used_event(size).wrapping_add(EVENT)
}

/// Bytes of a used ring of `size` elements.
#[inline]
pub(crate) const fn used_len(size: u16) -> usize {
    avail_event(size).wrapping_add(EVENT)
}

/// Offset of element `slot` of the available ring.
#[inline]
pub(crate) const fn avail_element(slot: u16) -> usize {
    (slot as usize)
        .wrapping_mul(AVAIL_ELEMENT)
        .wrapping_add(ELEMENTS)
}

/// Offset of element `slot` of the used ring.
#[inline]
pub(crate) const fn used_element(slot: u16) -> usize {
    (slot as usize)
        .wrapping_mul(USED_ELEMENT)
        .wrapping_add(ELEMENTS)
}

/// Offset of `used_event`, behind the elements of the available ring (VIRTIO 1.3, 2.7.6).
#[inline]
pub(crate) const fn used_event(size: u16) -> usize {
    avail_element(size)
}

/// Offset of `avail_event`, behind the elements of the used ring (VIRTIO 1.3, 2.7.8).
#[inline]
pub(crate) const fn avail_event(size: u16) -> usize {
    used_element(size)
}

/// Whether moving an index from `old` to `new` passes `event`, that is whether the other side asked
/// to be told (VIRTIO 1.3, 2.7.7.1 and 2.7.10).
#[inline]
pub(crate) const fn passes(event: u16, new: u16, old: u16) -> bool {
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::MAX_SIZE;

    /// `passes` against its definition: the other side waits for element `event`, and the index
    /// moved over it.
    #[test]
    fn event_is_passed_when_its_element_was_added() {
        // Miri is slow, and not after wrong values.
        let step = if cfg!(miri) { 1021 } else { 1 };
        for old in [0, 1, 7, 0x7fff, 0x8000, 0xfffa, 0xffff_u16] {
            for moved in [0, 1, 2, 5, 300, MAX_SIZE] {
                let new = old.wrapping_add(moved);
                for event in (0..=u16::MAX).step_by(step) {
                    let added = event.wrapping_sub(old) < moved;
                    assert_eq!(passes(event, new, old), added, "{event} {new} {old}");
                }
            }
        }
    }

    #[test]
    fn areas_have_the_sizes_of_the_specification() {
        for size in [1_u16, 2, 256, MAX_SIZE] {
            let n = usize::from(size);
            assert_eq!(avail_len(size), 6 + 2 * n);
            assert_eq!(used_len(size), 6 + 8 * n);
        }
    }
}

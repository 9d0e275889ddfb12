//! The registers that say which pieces of memory there are besides the RAM that the guest started
//! with. Read-only; a piece's registers change once, when it is added.
//!
//! | offset, from 16 × the piece's index | size | register |
//! | --- | --- | --- |
//! | 0 | 8 | guest-physical address |
//! | 8 | 8 | length in bytes; 0 as long as the piece is not there |
//!
//! Ports are read by at most 4 bytes at a time. A guest that reads a length while it changes may see
//! halves of two values, and so that the piece is there, or not yet; then it reads again at the
//! interrupt, which comes after the change.

use crate::bus::BusDevice;
use crate::layout::Range;

/// Size of a piece's registers in bytes.
pub const PIECE_SIZE: u8 = 16;

/// The registers of all pieces.
pub struct Registers {
    bytes: Vec<u8>,
}

impl Registers {
    /// Room for `pieces`, of which none is there.
    pub fn new(pieces: usize) -> Self {
        Self {
            bytes: vec![0; pieces.saturating_mul(PIECE_SIZE.into())],
        }
    }

    /// Shows a piece.
    pub(super) fn set(&mut self, index: usize, piece: Range) {
        let values = [piece.start.to_le_bytes(), piece.size.to_le_bytes()].concat();
        let at = index.saturating_mul(values.len());
        for (place, byte) in self.bytes.iter_mut().skip(at).zip(values) {
            *place = byte;
        }
    }
}

impl BusDevice for Registers {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        let from = usize::try_from(offset).unwrap_or(usize::MAX);
        for (place, byte) in data.iter_mut().zip(self.bytes.iter().skip(from)) {
            *place = *byte;
        }
    }

    fn write(&mut self, _offset: u64, _data: &[u8]) {}
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn filled() -> Registers {
        let mut registers = Registers::new(3);
        let piece = |n: u64| Range {
            start: n << 32,
            size: n << 27,
        };
        registers.set(0, piece(1));
        registers.set(1, piece(2));
        registers
    }

    #[test]
    fn pieces_show_once_they_are_there() {
        let mut registers = filled();
        let mut read = |offset| {
            let mut data = [0xff; 4];
            registers.read(offset, &mut data);
            u32::from_le_bytes(data)
        };
        let words: Vec<u32> = (0..48).step_by(4).map(&mut read).collect();
        assert_eq!(words[..4], [0, 1, 1 << 27, 0]);
        assert_eq!(words[4..8], [0, 2, 2 << 27, 0]);
        assert_eq!(words[8..], [0; 4]);
        // Beyond the end, and for pieces that have no registers.
        assert_eq!(read(46), 0xffff_0000);
        assert_eq!(read(48), u32::MAX);
        assert_eq!(read(u64::MAX), u32::MAX);
        registers.set(3, Range { start: 9, size: 9 });
        assert_eq!(registers.bytes.len(), 48);
    }

    proptest! {
        #[test]
        fn nothing_that_a_guest_does_changes_them(
            accesses in prop::collection::vec(
                (prop_oneof![0u64..64, any::<u64>()], 0usize..9, any::<u64>(), any::<bool>()), 1..64),
        ) {
            let mut registers = filled();
            for (offset, length, value, write) in accesses {
                let mut data = value.to_le_bytes();
                if write {
                    registers.write(offset, &data[..length]);
                } else {
                    registers.read(offset, &mut data[..length]);
                }
            }
            prop_assert_eq!(registers.bytes, filled().bytes);
        }
    }
}

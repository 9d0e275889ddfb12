//! The configuration space of one function: a type 0 header, BARs that can be sized and moved, and
//! a list of capabilities.

use super::bits::*;

/// Why a function cannot be built like that.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Error {
    /// Sizes of BARs are powers of two: from 16 bytes on, from 2 KiB on for a ROM, and below 4 GiB unless the
    /// address has 64 bits.
    #[error("a BAR of {size:#x} bytes is impossible")]
    BarSize {
        /// The size in bytes.
        size: u64,
    },
    /// The register is taken or does not exist.
    #[error("BAR {index} does not exist or is taken")]
    BarIndex {
        /// Number of the register.
        index: usize,
    },
    /// The conventional configuration space is full.
    #[error("no room for capability {id:#x}")]
    NoRoom {
        /// The capability's ID.
        id: u8,
    },
}

/// What identifies a function to its driver.
#[derive(Clone, Copy, Debug)]
pub struct Identity {
    /// Vendor ID.
    pub vendor: u16,
    /// Device ID.
    pub device: u16,
    /// Revision ID.
    pub revision: u8,
    /// Base class, sub-class and programming interface, from the high to the low byte.
    pub class: u32,
    /// Subsystem vendor ID.
    pub subsystem_vendor: u16,
    /// Subsystem ID.
    pub subsystem: u16,
}

/// What a base address register looks like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BarKind {
    /// Memory below 4 GiB; one register.
    Memory32 {
        /// Reads have no side effects.
        prefetchable: bool,
    },
    /// Memory anywhere; two registers.
    Memory64 {
        /// Reads have no side effects.
        prefetchable: bool,
    },
    /// The expansion ROM, register [`ROM_BAR`]; it has an enable bit of its own.
    Rom,
}

/// One base address register, or two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bar {
    /// Size in bytes.
    pub size: u64,
    /// What it looks like.
    pub kind: BarKind,
}

/// The configuration space of a function. All accesses are safe for any offset and width.
#[derive(Clone, Debug)]
pub struct ConfigSpace {
    bytes: Vec<u8>,
    /// The bits of `bytes` that software can change.
    writable: Vec<u8>,
    bars: [Option<Bar>; DECODER_COUNT],
    /// Where the offset of the next capability is to be stored.
    link: usize,
    free: usize,
}

impl ConfigSpace {
    /// A function without BARs and capabilities.
    pub fn new(identity: Identity) -> Self {
        let mut space = Self::with_registers(&[]);
        space.set(VENDOR_ID, &identity.vendor.to_le_bytes());
        space.set(DEVICE_ID, &identity.device.to_le_bytes());
        space.set(REVISION_ID, &[identity.revision]);
        let [interface, sub_class, base_class, _] = identity.class.to_le_bytes();
        space.set(CLASS_CODE, &[interface, sub_class, base_class]);
        space.set(
            SUBSYSTEM_VENDOR_ID,
            &identity.subsystem_vendor.to_le_bytes(),
        );
        space.set(SUBSYSTEM_ID, &identity.subsystem.to_le_bytes());
        space.set_writable(COMMAND, &COMMAND_WRITABLE.to_le_bytes());
        space.set_writable(INTERRUPT_LINE, &[0xff]);
        space
    }

    /// A function that shows `registers`, none of which software can change so far, and that has no BARs.
    pub fn with_registers(registers: &[u8]) -> Self {
        let mut space = Self {
            bytes: vec![0; CONFIG_SIZE],
            writable: vec![0; CONFIG_SIZE],
            bars: [None; DECODER_COUNT],
            link: CAPABILITIES_POINTER,
            free: HEADER_SIZE,
        };
        space.set(0, registers);
        space
    }

    /// Adds a BAR at register `index`; a 64-bit one takes the next register, too, and a ROM is at [`ROM_BAR`].
    pub fn add_bar(&mut self, index: usize, size: u64, kind: BarKind) -> Result<(), Error> {
        let least = if kind == BarKind::Rom { 2048 } else { 16 };
        let narrow = !matches!(kind, BarKind::Memory64 { .. });
        if !size.is_power_of_two() || size < least || (narrow && size > 1 << 31) {
            return Err(Error::BarSize { size });
        }
        let taken = |i: usize| i >= BAR_COUNT || self.bars.get(i).is_none_or(Option::is_some);
        let upper_half = index
            .checked_sub(1)
            .and_then(|i| self.bars.get(i).copied().flatten())
            .is_some_and(|bar| matches!(bar.kind, BarKind::Memory64 { .. }));
        let possible = match kind {
            BarKind::Rom => index == ROM_BAR && self.bar(ROM_BAR).is_none(),
            BarKind::Memory32 { .. } => !taken(index) && !upper_half,
            BarKind::Memory64 { .. } => !taken(index) && !taken(index + 1) && !upper_half,
        };
        if !possible {
            return Err(Error::BarIndex { index });
        }
        if let Some(bar) = self.bars.get_mut(index) {
            *bar = Some(Bar { size, kind });
        }
        // Sizing (PCI Express 5.0, 7.5.1.2.1) follows: address bits below the size read as zero.
        let [.., low] = halves(!(size - 1));
        let flags = |prefetchable| if prefetchable { BAR_PREFETCHABLE } else { 0 };
        match kind {
            BarKind::Memory64 { prefetchable } => {
                let register = BAR0 + 4 * index;
                let flags = u64::from(BAR_MEMORY_64 | flags(prefetchable));
                self.set(register, &flags.to_le_bytes());
                let mask = !(size - 1) & !BAR_MEMORY_FLAGS;
                self.set_writable(register, &mask.to_le_bytes());
            }
            BarKind::Memory32 { prefetchable } => {
                let register = BAR0 + 4 * index;
                self.set(register, &flags(prefetchable).to_le_bytes());
                self.set_writable(register, &low.to_le_bytes());
            }
            BarKind::Rom => {
                self.set(ROM_ADDRESS, &[0; 4]);
                self.set_writable(ROM_ADDRESS, &(low | ROM_ENABLE).to_le_bytes());
            }
        }
        Ok(())
    }

    /// Appends a capability: `body` follows its ID and next pointer; `writable` has the bits of
    /// it that software can change (missing bytes: none). Returns its offset.
    pub fn add_capability(&mut self, id: u8, body: &[u8], writable: &[u8]) -> Result<usize, Error> {
        let offset = self.free;
        let end = offset + 2 + body.len();
        if end > CONVENTIONAL_SIZE {
            return Err(Error::NoRoom { id });
        }
        // Offsets are below 256 here.
        let link = u8::try_from(offset).map_err(|_| Error::NoRoom { id })?;
        self.set(self.link, &[link]);
        self.set(offset, &[id, 0]);
        self.set(offset + 2, body);
        self.set_writable(offset + 2, writable.get(..body.len()).unwrap_or(writable));
        self.link = offset + 1;
        self.free = end.next_multiple_of(4);
        let status = self.u16(STATUS) | STATUS_CAPABILITIES;
        self.set(STATUS, &status.to_le_bytes());
        Ok(offset)
    }

    /// Adds the PCI Express capability of a root complex integrated endpoint, which has no link
    /// (PCI Express 5.0, 7.5.3).
    pub fn add_express_capability(&mut self) -> Result<usize, Error> {
        let mut body = [0; EXPRESS_SIZE - 2];
        let flags = EXPRESS_VERSION | EXPRESS_INTEGRATED_ENDPOINT;
        put(&mut body, 0, &flags.to_le_bytes());
        put(&mut body, 2, &EXPRESS_DEVCAP_RBER.to_le_bytes());
        put(&mut body, 6, &EXPRESS_DEVCTL_DEFAULT.to_le_bytes());
        let mut writable = [0; EXPRESS_SIZE - 2];
        put(&mut writable, 6, &0x7fffu16.to_le_bytes());
        self.add_capability(CAP_EXPRESS, &body, &writable)
    }

    /// Reads registers. Beyond the end they read as all ones.
    pub fn read(&self, offset: usize, data: &mut [u8]) {
        for (i, byte) in data.iter_mut().enumerate() {
            *byte = self.bytes.get(offset + i).copied().unwrap_or(0xff);
        }
    }

    /// Writes registers; bits that software cannot change stay.
    pub fn write(&mut self, offset: usize, data: &[u8]) {
        for (i, byte) in data.iter().enumerate() {
            let place = self.bytes.get_mut(offset + i);
            if let (Some(old), Some(mask)) = (place, self.writable.get(offset + i)) {
                *old = (*old & !mask) | (byte & mask);
            }
        }
    }

    /// All registers.
    pub fn registers(&self) -> &[u8] {
        &self.bytes
    }

    /// Has the registers that software can change be what they are in `registers` of the same function elsewhere. Returns
    /// whether it is the same.
    pub fn restore(&mut self, registers: &[u8]) -> bool {
        let same = registers.len() == self.bytes.len() && registers.get(..4) == self.bytes.get(..4);
        if same {
            self.write(0, registers);
        }
        same
    }

    /// Sets registers regardless of what software may change.
    pub fn set(&mut self, offset: usize, data: &[u8]) {
        put(&mut self.bytes, offset, data);
    }

    /// Says which bits software can change.
    pub fn set_writable(&mut self, offset: usize, mask: &[u8]) {
        put(&mut self.writable, offset, mask);
    }

    /// A 16-bit register.
    pub fn u16(&self, offset: usize) -> u16 {
        let mut data = [0; 2];
        self.read(offset, &mut data);
        u16::from_le_bytes(data)
    }

    /// A 32-bit register.
    pub fn u32(&self, offset: usize) -> u32 {
        let mut data = [0; 4];
        self.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    /// The BAR that starts at register `index`, if there is one.
    pub fn bar(&self, index: usize) -> Option<Bar> {
        self.bars.get(index).copied().flatten()
    }

    /// The address in a BAR, whether or not it is decoded.
    pub fn bar_address(&self, index: usize) -> Option<u64> {
        let register = BAR0 + 4 * index;
        match self.bar(index)?.kind {
            BarKind::Memory64 { .. } => {
                let [low, high] = [self.u32(register), self.u32(register + 4)].map(u64::from);
                Some((high << 32 | low) & !BAR_MEMORY_FLAGS)
            }
            BarKind::Memory32 { .. } => Some(u64::from(self.u32(register)) & !BAR_MEMORY_FLAGS),
            BarKind::Rom => Some((self.u32(ROM_ADDRESS) & ROM_ADDRESS_MASK).into()),
        }
    }

    /// The address that the function answers at for a BAR, if memory accesses are on.
    pub fn decoded_bar(&self, index: usize) -> Option<u64> {
        let enabled = self.u16(COMMAND) & COMMAND_MEMORY != 0
            && (index != ROM_BAR || self.u32(ROM_ADDRESS) & ROM_ENABLE != 0);
        self.bar_address(index).filter(|_| enabled)
    }

    /// Puts a BAR somewhere, as firmware does.
    pub fn place_bar(&mut self, index: usize, address: u64) {
        let [high, low] = halves(address);
        let register = BAR0 + 4 * index;
        match self.bar(index).map(|bar| bar.kind) {
            Some(BarKind::Memory64 { .. }) => {
                self.write(register, &low.to_le_bytes());
                self.write(register + 4, &high.to_le_bytes());
            }
            Some(BarKind::Memory32 { .. }) => self.write(register, &low.to_le_bytes()),
            Some(BarKind::Rom) => self.write(ROM_ADDRESS, &low.to_le_bytes()),
            None => {}
        }
    }
}

/// The upper and the lower 32 bits.
fn halves(value: u64) -> [u32; 2] {
    let [a, b, c, d, e, f, g, h] = value.to_be_bytes();
    [[a, b, c, d], [e, f, g, h]].map(u32::from_be_bytes)
}

fn put(bytes: &mut [u8], offset: usize, data: &[u8]) {
    for (place, byte) in bytes.iter_mut().skip(offset).zip(data) {
        *place = *byte;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const WIDE: BarKind = BarKind::Memory64 { prefetchable: true };
    const NARROW: BarKind = BarKind::Memory32 {
        prefetchable: false,
    };

    fn space() -> ConfigSpace {
        let mut space = ConfigSpace::new(Identity {
            vendor: 0x1af4,
            device: 0x1042,
            revision: 1,
            class: 0x01_80_02,
            subsystem_vendor: 0x1af4,
            subsystem: 0x42,
        });
        space.add_bar(0, 0x1_0000, WIDE).unwrap();
        space.add_express_capability().unwrap();
        space
            .add_capability(CAP_MSIX, &[0; 10], &[0, 0xc0])
            .unwrap();
        space
    }

    #[test]
    fn identity_is_read_only() {
        let mut space = space();
        space.write(0, &[0; 4]);
        space.write(8, &[0; 4]);
        assert_eq!(space.u32(0), 0x1042_1af4);
        assert_eq!(space.u32(8), 0x0180_0201);
        assert_eq!(space.u32(SUBSYSTEM_VENDOR_ID), 0x0042_1af4);
    }

    #[test]
    fn bars_are_sized_and_moved() {
        let mut space = space();
        space.write(BAR0, &[0xff; 8]);
        assert_eq!(space.u32(BAR0), 0xffff_000c);
        assert_eq!(space.u32(BAR0 + 4), 0xffff_ffff);
        space.write(BAR0, &0x1_2345_6789_u64.to_le_bytes());
        assert_eq!(space.bar_address(0), Some(0x1_2345_0000));
        assert_eq!(space.decoded_bar(0), None);
        space.write(COMMAND, &COMMAND_MEMORY.to_le_bytes());
        assert_eq!(space.decoded_bar(0), Some(0x1_2345_0000));
        space.write(BAR0 + 8, &[0xff; 4]);
        assert_eq!(space.u32(BAR0 + 8), 0, "there is no such BAR");
        assert_eq!(space.decoded_bar(1), None);
        assert_eq!(space.decoded_bar(99), None);
    }

    #[test]
    fn narrow_bars_and_roms_are_sized_and_moved() {
        let mut space = space();
        space.add_bar(2, 0x100, NARROW).unwrap();
        space.add_bar(ROM_BAR, 0x1_0000, BarKind::Rom).unwrap();
        space.write(BAR0 + 8, &[0xff; 4]);
        space.write(ROM_ADDRESS, &[0xff; 4]);
        assert_eq!(space.u32(BAR0 + 8), 0xffff_ff00);
        assert_eq!(space.u32(BAR0 + 12), 0);
        assert_eq!(space.u32(ROM_ADDRESS), 0xffff_0001);
        space.write(COMMAND, &COMMAND_MEMORY.to_le_bytes());
        space.place_bar(2, 0xc000_0100);
        space.place_bar(ROM_BAR, 0xc001_0000);
        assert_eq!(space.decoded_bar(2), Some(0xc000_0100));
        assert_eq!(space.bar_address(ROM_BAR), Some(0xc001_0000));
        assert_eq!(space.decoded_bar(ROM_BAR), None, "not enabled");
        space.write(ROM_ADDRESS, &0xc001_0001_u32.to_le_bytes());
        assert_eq!(space.decoded_bar(ROM_BAR), Some(0xc001_0000));
    }

    #[test]
    fn impossible_bars_are_refused() {
        let mut space = space();
        for (size, kind) in [
            (0, WIDE),
            (1, WIDE),
            (8, NARROW),
            (24, WIDE),
            (1 << 32, NARROW),
            (1024, BarKind::Rom),
        ] {
            let error = Err(Error::BarSize { size });
            assert_eq!(space.add_bar(2, size, kind), error);
        }
        for (index, kind) in [
            (0, WIDE),
            (1, WIDE),
            (1, NARROW),
            (5, WIDE),
            (6, NARROW),
            (5, BarKind::Rom),
            (usize::MAX - 1, WIDE),
        ] {
            let error = Err(Error::BarIndex { index });
            assert_eq!(space.add_bar(index, 4096, kind), error);
        }
        space.add_bar(4, 16, WIDE).unwrap();
        assert!(space.add_bar(5, 16, NARROW).is_err());
        space.add_bar(2, 16, NARROW).unwrap();
        space.add_bar(3, 16, NARROW).unwrap();
    }

    #[test]
    fn capabilities_are_a_list() {
        let mut space = space();
        assert_ne!(space.u16(STATUS) & STATUS_CAPABILITIES, 0);
        let first = space.u16(CAPABILITIES_POINTER) & 0xff;
        assert_eq!(space.u16(first.into()) & 0xff, u16::from(CAP_EXPRESS));
        let second = space.u16(first.into()) >> 8;
        assert_eq!(space.u16(second.into()), u16::from(CAP_MSIX));
        assert_eq!(second % 4, 0);
        space.write(usize::from(second) + 2, &[0xff; 4]);
        assert_eq!(space.u32(usize::from(second)), 0xc000_0011);
        while space.add_capability(CAP_VENDOR, &[0; 14], &[]).is_ok() {}
        assert_eq!(
            space.add_capability(CAP_VENDOR, &[0; 14], &[]),
            Err(Error::NoRoom { id: CAP_VENDOR })
        );
        assert_eq!(space.u32(CONVENTIONAL_SIZE), 0, "no extended capability");
    }

    proptest! {
        #[test]
        fn no_access_changes_what_is_read_only(
            accesses in prop::collection::vec((0..5000usize, prop::collection::vec(any::<u8>(), 0..9)), 0..100)
        ) {
            let mut space = space();
            let before = space.clone();
            for (offset, data) in accesses {
                space.write(offset, &data);
                let mut back = data.clone();
                space.read(offset, &mut back);
            }
            for (i, mask) in before.writable.iter().enumerate() {
                prop_assert_eq!(space.bytes[i] & !mask, before.bytes[i] & !mask);
            }
            prop_assert_eq!(space.bar_address(0).unwrap() % 0x1_0000, 0);
        }
    }
}

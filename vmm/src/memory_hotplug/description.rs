//! How the guest's ACPI learns of memory that is added: a memory device for each piece that there
//! can be, and a generic event device that says when to look at them again (ACPI 6.5, 5.6.9).
//!
//! An interrupt notifies all pieces that are there. One that the guest knows already is looked at in
//! vain; so no state has to be kept, and none can be wrong, over a guest that misses an interrupt or
//! starts another kernel.

use acpi_tables::aml::{
    Add, AddressSpace, AddressSpaceCacheable, CreateQWordField, Device, EISAName, Equal, Field,
    FieldAccessType, FieldEntry, FieldLockRule, FieldUpdateRule, IO, If, Interrupt, Local, Method,
    Name, NotEqual, Notify, ONE, OpRegion, OpRegionSpace, Path, ResourceTemplate, Return, Store,
    Subtract, ZERO,
};
use acpi_tables::{Aml, AmlSink};

use super::registers::PIECE_SIZE;
use crate::layout::{self, Range};

/// Present, enabled, shown, working (6.3.7).
const PRESENT: u8 = 0xf;
/// "Device check": a device has come (5.6.6).
const DEVICE_CHECK: u8 = 1;
/// Offsets in a QWord address space descriptor (6.4.3.5.1).
const MINIMUM: u8 = 14;
const MAXIMUM: u8 = 22;
const LENGTH: u8 = 38;

/// The devices in the namespace, for the scope `\_SB`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryDevices {
    /// Where pieces will be.
    pub range: Range,
    /// How many there can be.
    pub pieces: usize,
}

impl MemoryDevices {
    /// The ports of the registers, for whoever reserves them.
    pub fn ports(&self) -> Range {
        let pieces = u64::try_from(self.pieces).unwrap_or(u64::MAX);
        Range {
            start: layout::MEMORY_HOTPLUG_PORT,
            size: pieces.saturating_mul(PIECE_SIZE.into()),
        }
    }

    /// The same, as a resource.
    pub fn reserved_ports(&self) -> IO {
        let Range { start, size } = self.ports();
        let start = u16::try_from(start).unwrap_or(u16::MAX);
        IO::new(start, start, 1, u8::try_from(size).unwrap_or(u8::MAX))
    }
}

impl Aml for MemoryDevices {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        let pieces: Vec<Piece> = (0..self.pieces).map(Piece).collect();
        for piece in &pieces {
            piece.to_aml_bytes(sink);
        }
        let checks: Vec<Check> = pieces.iter().map(|piece| Check(piece.name())).collect();
        let body = checks.iter().map(|check| check as &dyn Aml).collect();
        // An edge, active high; Linux takes nothing but interrupts among its resources.
        let interrupt = Interrupt::new(true, true, false, false, layout::MEMORY_HOTPLUG_IRQ);
        Device::new(
            "GED0".into(),
            vec![
                &Name::new("_HID".into(), &"ACPI0013"),
                &Name::new("_UID".into(), &ZERO),
                &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&interrupt])),
                // There is one interrupt, so its number, the argument, says nothing new.
                &Method::new("_EVT".into(), 1, true, body),
            ],
        )
        .to_aml_bytes(sink);
    }
}

/// A piece by its index.
struct Piece(usize);

impl Piece {
    fn name(&self) -> String {
        format!("MH{:02X}", self.0)
    }
}

impl Aml for Piece {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        let index = u64::try_from(self.0).unwrap_or(u64::MAX);
        let ports =
            layout::MEMORY_HOTPLUG_PORT.saturating_add(index.saturating_mul(PIECE_SIZE.into()));
        let ports = u16::try_from(ports).unwrap_or(u16::MAX);
        let (base, size) = (Path::new("BASE"), Path::new("SIZE"));
        let fields = Field::new(
            "REGS".into(),
            FieldAccessType::DWord,
            FieldLockRule::NoLock,
            FieldUpdateRule::Preserve,
            vec![
                FieldEntry::Named(*b"BASE", 64),
                FieldEntry::Named(*b"SIZE", 64),
            ],
        );
        let range = AddressSpace::new_memory(AddressSpaceCacheable::Cacheable, true, 0, 0u64, None);
        let [min, max, len] = ["MIN_", "MAX_", "LEN_"].map(Path::new);
        Device::new(
            self.name().as_str().into(),
            vec![
                &Name::new("_HID".into(), &EISAName::new("PNP0C80")),
                &Name::new("_UID".into(), &index),
                &OpRegion::new("REGS".into(), OpRegionSpace::SystemIO, &ports, &PIECE_SIZE),
                &fields,
                &Method::new(
                    "_STA".into(),
                    0,
                    false,
                    vec![
                        &If::new(&Equal::new(&size, &ZERO), vec![&Return::new(&ZERO)]),
                        &Return::new(&PRESENT),
                    ],
                ),
                &Method::new(
                    "_CRS".into(),
                    0,
                    // Serialized, because it creates named objects.
                    true,
                    vec![
                        &Store::new(&Local(0), &ResourceTemplate::new(vec![&range])),
                        &CreateQWordField::new(&min, &Local(0), &MINIMUM),
                        &CreateQWordField::new(&max, &Local(0), &MAXIMUM),
                        &CreateQWordField::new(&len, &Local(0), &LENGTH),
                        &Store::new(&min, &base),
                        &Store::new(&len, &size),
                        &Add::new(&max, &base, &size),
                        &Subtract::new(&max, &max, &ONE),
                        &Return::new(&Local(0)),
                    ],
                ),
            ],
        )
        .to_aml_bytes(sink);
    }
}

/// Notifies a piece that is there.
struct Check(String);

impl Aml for Check {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        let piece = format!("\\_SB_.{}", self.0);
        let size = Path::new(&format!("{piece}.SIZE"));
        If::new(
            &NotEqual::new(&size, &ZERO),
            vec![&Notify::new(&Path::new(&piece), &DEVICE_CHECK)],
        )
        .to_aml_bytes(sink);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn code(pieces: usize) -> Vec<u8> {
        let mut code = Vec::new();
        let range = Range {
            start: 4 << 30,
            size: 1 << 30,
        };
        MemoryDevices { range, pieces }.to_aml_bytes(&mut code);
        code
    }

    fn count(code: &[u8], part: &[u8]) -> usize {
        code.windows(part.len()).filter(|w| *w == part).count()
    }

    #[test]
    fn each_piece_is_a_memory_device_with_registers_of_its_own() {
        let code = code(7);
        // EISA ID PNP0C80, as a number (19.3.4).
        assert_eq!(count(&code, b"_HID\x0c\x41\xd0\x0c\x80"), 7);
        for index in 0u8..7 {
            let name = [b'M', b'H', b'0', b'0' + index];
            // The device, and its name twice in the event method.
            assert_eq!(count(&code, &name), 3, "{index}");
            // OperationRegion (REGS, SystemIO, 0x620 + 16 × index, 16)
            let region = [
                b"\x5b\x80REGS\x01\x0b",
                &[0x20 + 16 * index, 6, 0x0a, 16][..],
            ]
            .concat();
            assert_eq!(count(&code, &region), 1, "{index}");
        }
        // Field (REGS, DWordAcc, NoLock, Preserve) {BASE, 64, SIZE, 64}
        assert_eq!(count(&code, b"REGS\x03BASE\x40\x04SIZE\x40\x04"), 7);
        assert_eq!(count(&self::code(2), b"_HID\x0c\x41\xd0\x0c\x80"), 2);
    }

    #[test]
    fn a_piece_that_is_not_there_has_no_status() {
        // If (SIZE == 0) {Return (0)}; Return (0xf).
        let body = b"\xa0\x09\x93SIZE\x00\xa4\x00\xa4\x0a\x0f";
        assert_eq!(count(&code(3), body), 3);
    }

    #[test]
    fn the_resources_are_what_the_registers_say() {
        let code = code(1);
        let mut descriptor = Vec::new();
        AddressSpace::new_memory(AddressSpaceCacheable::Cacheable, true, 0, 0u64, None)
            .to_aml_bytes(&mut descriptor);
        assert_eq!(descriptor.len(), usize::from(LENGTH) + 8);
        assert_eq!(count(&code, &descriptor), 1);
        for (offset, name) in [(14, b"MIN_"), (22, b"MAX_"), (38, b"LEN_")] {
            // CreateQWordField (Local0, offset, name)
            let field = [&[0x8f, 0x60, 0x0a, offset], &name[..]].concat();
            assert_eq!(count(&code, &field), 1, "{offset}");
        }
        // MIN_ = BASE; LEN_ = SIZE; MAX_ = BASE + SIZE; MAX_ = MAX_ - 1; return.
        let body = b"\x70BASEMIN_\x70SIZELEN_\x72BASESIZEMAX_\x74MAX_\x01MAX_\xa4\x60";
        assert_eq!(count(&code, body), 1);
    }

    #[test]
    fn an_edge_notifies_each_piece_that_is_there() {
        let code = code(2);
        assert_eq!(count(&code, b"_HID\x0dACPI0013\0"), 1);
        // Interrupt (ResourceConsumer, Edge, ActiveHigh, Exclusive) {10}
        assert_eq!(count(&code, b"\x89\x06\x00\x03\x01\x0a\x00\x00\x00"), 1);
        for index in [b'0', b'1'] {
            // If (\_SB.MH0n.SIZE != 0) {Notify (\_SB.MH0n, 1)}
            let check = [
                b"\x92\x93\\\x2f\x03_SB_MH0",
                &[index][..],
                b"SIZE\x00\x86\\\x2e_SB_MH0",
                &[index],
                b"\x01",
            ]
            .concat();
            assert_eq!(count(&code, &check), 1, "{code:x?}");
        }
    }

    #[test]
    fn ports_are_reserved_up_to_the_last_piece() {
        let devices = |pieces| MemoryDevices {
            range: Range { start: 0, size: 0 },
            pieces,
        };
        let mut resource = Vec::new();
        devices(7).reserved_ports().to_aml_bytes(&mut resource);
        assert_eq!(resource, [0x47, 1, 0x20, 6, 0x20, 6, 1, 112]);
        assert_eq!(devices(2).ports().end(), layout::MEMORY_HOTPLUG_PORT + 32);
    }
}

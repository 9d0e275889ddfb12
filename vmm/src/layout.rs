//! The guest's address map: where RAM, the PCI windows and the platform's fixed devices are.
//!
//! ```text
//! 0                     low RAM (real-mode and boot structures below 1 MiB)
//! ..3 GiB               low RAM ends at the latest
//! 3 GiB    0xC000_0000  32-bit PCI MMIO window
//! 3.5 GiB  0xE000_0000  ECAM: PCI configuration space, 256 buses
//!          0xF000_0000  free
//!          0xFEC0_0000  I/O APIC
//!          0xFEE0_0000  local APICs
//!          0xFEFF_C000  KVM: identity-map page, then three pages of task state
//! 4 GiB                 high RAM
//! RAM's end, rounded up to 1 GiB: memory that is added while the guest runs
//! its end, rounded up to 1 GiB: 64-bit PCI MMIO window
//! ```

/// One GiB in bytes.
pub const GIB: u64 = 1 << 30;

/// Real-mode segment, GDT, page tables and everything else a boot protocol wants below 1 MiB.
pub mod boot {
    /// The global descriptor table that the boot CPU starts with.
    pub const GDT: u64 = 0x500;
    /// An empty interrupt descriptor table.
    pub const IDT: u64 = 0x520;
    /// PVH: `hvm_start_info`, its module list and its memory map.
    pub const PVH_INFO: u64 = 0x6000;
    /// Linux: `boot_params`, the "zero page".
    pub const ZERO_PAGE: u64 = 0x7000;
    /// The initial stack's top. Nothing is below it but the zero page's end.
    pub const STACK: u64 = 0x8ff0;
    /// Page tables that map the first 4 GiB one to one: PML4, PDPT, four page directories.
    pub const PAGE_TABLES: u64 = 0x9000;
    /// The kernel's command line.
    pub const CMDLINE: u64 = 0x2_0000;
    /// Size limit of the command line, with its terminating zero.
    pub const CMDLINE_MAX: usize = 0x1_0000;
    /// End of the memory that the firmware would have left to the operating system below the
    /// extended BIOS data area.
    pub const LOW_END: u64 = 0x9_fc00;
    /// The ACPI tables; the RSDP is found by scanning the BIOS area from here (ACPI 6.5, 5.2.5.1).
    pub const ACPI: u64 = 0xe_0000;
    /// End of the BIOS area and so of the space for ACPI tables.
    pub const ACPI_END: u64 = 0x10_0000;
    /// Where kernels are loaded unless they say otherwise.
    pub const HIGH_START: u64 = 0x10_0000;
}

/// End of the RAM below 4 GiB, at the latest.
pub const LOW_RAM_END: u64 = 3 * GIB;
/// Start of the RAM that does not fit below [`LOW_RAM_END`].
pub const HIGH_RAM_START: u64 = 4 * GIB;

/// Of what the size of memory that is added must be a multiple, and its address: the size of
/// Linux's memory blocks on x86 (a guest that starts with 64 GiB or more may use larger ones).
pub const MEMORY_BLOCK: u64 = 128 << 20;

/// Start of the 32-bit PCI MMIO window.
pub const PCI_MMIO32_START: u64 = LOW_RAM_END;
/// Size of the 32-bit PCI MMIO window in bytes.
pub const PCI_MMIO32_SIZE: u64 = ECAM_START - PCI_MMIO32_START;

/// Start of the enhanced configuration access mechanism's window (PCI Express 5.0, 7.2.2).
pub const ECAM_START: u64 = 0xE000_0000;
/// The last bus number that the ECAM window covers; the first is 0.
pub const ECAM_LAST_BUS: u8 = 255;
/// Size of the ECAM window: 1 MiB for each bus.
pub const ECAM_SIZE: u64 = (ECAM_LAST_BUS as u64 + 1) << 20;

/// Limit of the 64-bit PCI MMIO window's size in bytes.
pub const PCI_MMIO64_MAX_SIZE: u64 = 512 * GIB;

/// Ports of PCI configuration mechanism 1: address at +0, data at +4 (PCI 3.0, 3.2.2.3.2).
pub const PCI_CONFIG_PORT: u64 = 0xcf8;
/// Size of [`PCI_CONFIG_PORT`]'s range.
pub const PCI_CONFIG_PORT_SIZE: u64 = 8;

/// The I/O APIC's registers (in the kernel).
pub const IOAPIC: u64 = 0xFEC0_0000;
/// The local APICs' registers (in the kernel).
pub const LOCAL_APIC: u64 = 0xFEE0_0000;
/// A page that KVM needs on processors that cannot run real mode as a guest.
pub const KVM_IDENTITY_MAP: u64 = 0xFEFF_C000;
/// Three pages that KVM needs for the same reason.
pub const KVM_TSS: u64 = 0xFEFF_D000;

/// First GSI of the PCI devices' interrupt pins.
pub const FIRST_PCI_GSI: u32 = 16;
/// Number of those GSIs.
pub const PCI_GSIS: u32 = 8;
/// First GSI that is not a pin of the I/O APIC; MSI routes start here.
pub const FIRST_MSI_GSI: u32 = 24;

/// COM1.
pub const SERIAL_PORT: u64 = 0x3f8;
/// COM1's interrupt: ISA IRQ, and GSI.
pub const SERIAL_IRQ: u32 = 4;
/// Index and data port of the RTC and its CMOS memory.
pub const RTC_PORT: u64 = 0x70;
/// The keyboard controller's command port.
pub const I8042_COMMAND_PORT: u64 = 0x64;
/// The reset control register, one byte inside the PCI configuration ports' range.
pub const RESET_PORT: u64 = 0xcf9;
/// pvpanic's event port.
pub const PVPANIC_PORT: u64 = 0x505;
/// ACPI PM1 event block, 4 bytes; PM1 control block at +4, 2 bytes; PM timer at +8, 4 bytes.
pub const ACPI_PM_PORT: u64 = 0x600;
/// The ACPI system control interrupt.
pub const ACPI_SCI_IRQ: u32 = 9;
/// The registers of memory that is added, 16 bytes for each piece.
pub const MEMORY_HOTPLUG_PORT: u64 = 0x620;
/// The interrupt that says that there is more memory: ISA IRQ, and GSI. PCI has all pins above these.
pub const MEMORY_HOTPLUG_IRQ: u32 = 10;

/// A range of the guest-physical address space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    /// First address.
    pub start: u64,
    /// Length in bytes.
    pub size: u64,
}

impl Range {
    /// First address after the range.
    pub fn end(&self) -> u64 {
        self.start.saturating_add(self.size)
    }
}

/// The RAM ranges of a guest of `size` bytes: one, or two around the hole below 4 GiB.
pub fn ram_ranges(size: u64) -> Vec<Range> {
    if size <= LOW_RAM_END {
        return vec![Range { start: 0, size }];
    }
    vec![
        Range {
            start: 0,
            size: LOW_RAM_END,
        },
        Range {
            start: HIGH_RAM_START,
            size: size - LOW_RAM_END,
        },
    ]
}

/// Where `size` bytes of memory go that are added to a guest whose RAM ends at `ram_end`.
pub fn added_memory(ram_end: u64, size: u64) -> Range {
    Range {
        start: above_ram(ram_end),
        size,
    }
}

/// First address after what processors with `physical_bits` bits of physical address reach.
pub fn address_limit(physical_bits: u32) -> u64 {
    1u64.checked_shl(physical_bits).unwrap_or(u64::MAX)
}

/// The 64-bit PCI MMIO window of a guest whose memory ends at `memory_end` and whose processors
/// have `physical_bits` bits of physical address. Empty if there is no room.
pub fn pci_mmio64(memory_end: u64, physical_bits: u32) -> Range {
    let start = above_ram(memory_end);
    let room = address_limit(physical_bits).saturating_sub(start);
    Range {
        start,
        size: room.min(PCI_MMIO64_MAX_SIZE),
    }
}

/// The next GiB above memory and the hole below 4 GiB.
fn above_ram(end: u64) -> u64 {
    end.max(HIGH_RAM_START).div_ceil(GIB).saturating_mul(GIB)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ram_has_a_hole_below_4_gib() {
        assert_eq!(
            ram_ranges(512 << 20),
            [Range {
                start: 0,
                size: 512 << 20
            }]
        );
        assert_eq!(
            ram_ranges(3 * GIB),
            [Range {
                start: 0,
                size: 3 * GIB
            }]
        );
        assert_eq!(
            ram_ranges(6 * GIB),
            [
                Range {
                    start: 0,
                    size: 3 * GIB
                },
                Range {
                    start: 4 * GIB,
                    size: 3 * GIB
                }
            ]
        );
    }

    #[test]
    fn the_64_bit_window_is_above_ram_and_inside_the_address_space() {
        assert_eq!(
            pci_mmio64(3 * GIB, 40),
            Range {
                start: 4 * GIB,
                size: 512 * GIB
            }
        );
        assert_eq!(
            pci_mmio64(7 * GIB + 4096, 36),
            Range {
                start: 8 * GIB,
                size: 56 * GIB
            }
        );
        assert_eq!(pci_mmio64(70 * GIB, 36).size, 0);
    }

    #[test]
    fn added_memory_is_between_ram_and_the_64_bit_window() {
        let small = added_memory(512 << 20, 3 << 30);
        assert_eq!((small.start, small.end()), (4 * GIB, 7 * GIB));
        let large = added_memory(6 * GIB + 4096, MEMORY_BLOCK);
        assert_eq!(large.start, 7 * GIB);
        assert_eq!(pci_mmio64(large.end(), 40).start, 8 * GIB);
        // Nothing to add: the window is where it is without.
        let none = added_memory(5 * GIB + 4096, 0);
        assert_eq!(pci_mmio64(none.end(), 40), pci_mmio64(5 * GIB + 4096, 40));
        assert_eq!(added_memory(u64::MAX, GIB).end(), u64::MAX);
    }

    #[test]
    fn fixed_ranges_do_not_overlap() {
        let ranges = [
            (0, LOW_RAM_END),
            (PCI_MMIO32_START, PCI_MMIO32_SIZE),
            (ECAM_START, ECAM_SIZE),
            (IOAPIC, 4096),
            (LOCAL_APIC, 4096),
            (KVM_IDENTITY_MAP, 4096),
            (KVM_TSS, 3 * 4096),
            (HIGH_RAM_START, GIB),
        ];
        for pair in ranges.windows(2) {
            assert!(pair[0].0 + pair[0].1 <= pair[1].0, "{pair:x?}");
        }
    }
}

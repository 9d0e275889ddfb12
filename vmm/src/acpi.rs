//! The ACPI tables (ACPI 6.5, 5.2): what the guest's kernel learns about processors, interrupt
//! controllers, power, the PCI host bridge and the platform's devices.
//!
//! `RSDP → XSDT → FADT (→ DSDT, FACS), MADT, MCFG, SRAT if memory can grow`

use acpi_tables::Aml;
use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, Arg, CreateDWordField, Device, EISAName, Else, Equal, IO,
    If, Interrupt, Local, Memory32Fixed, Method, Name, ONE, Or, Package, Path, ResourceTemplate,
    Return, Scope, Store, Uuid, ZERO,
};
use acpi_tables::facs::FACS;
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace as GasSpace, GAS};
use acpi_tables::madt::{EnabledStatus, IoApic, ProcessorLocalApic};
use acpi_tables::mcfg::MCFG;
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::srat::{MemoryAffinity, SRAT};
use acpi_tables::xsdt::XSDT;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use crate::devices::{acpi_pm, reset, rtc, serial};
use crate::layout::{self, Range, boot};
use crate::memory_hotplug::description::MemoryDevices;
use crate::pci::host::pin_gsis;

/// Why the tables cannot be built.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// More processors than the space below 1 MiB has room to describe.
    #[error("the ACPI tables need {needed:#x} bytes, but there are only {available:#x}")]
    TooLarge {
        /// Size of the tables in bytes.
        needed: u64,
        /// Space for them in bytes.
        available: u64,
    },
    /// Guest RAM is not where the tables go.
    #[error("cannot write the ACPI tables into guest memory")]
    Write(#[from] vm_memory::GuestMemoryError),
}

/// What the tables describe.
#[derive(Clone, Copy, Debug)]
pub struct Platform {
    /// Number of processors; their local APIC IDs count from 0.
    pub cpus: u8,
    /// The 64-bit PCI MMIO window; may be empty.
    pub pci_mmio64: Range,
    /// What memory can be added by, if it can.
    pub memory_devices: Option<MemoryDevices>,
}

const OEM_ID: [u8; 6] = *b"RNGSDE";
const OEM_TABLE_ID: [u8; 8] = *b"RINGSIDE";
const OEM_REVISION: u32 = 1;
/// Length of the header that all tables but RSDP and FACS begin with.
const HEADER: u32 = 36;

/// ISA interrupts in the MADT: polarity active high, trigger mode edge or level (table 5.27).
const ACTIVE_HIGH_EDGE: u16 = 0b0101;
const ACTIVE_HIGH_LEVEL: u16 = 0b1101;

/// Writes the tables into guest RAM; returns the RSDP's address.
pub fn write(memory: &GuestMemoryMmap, platform: &Platform) -> Result<GuestAddress, Error> {
    // The RSDP comes first so that a scan of the BIOS area finds it; each table is 64-byte aligned,
    // as the FACS has to be.
    let mut place = Placer {
        memory,
        next: boot::ACPI,
    };
    let rsdp_at = place.reserve(Rsdp::len());
    let facs = place.put(&bytes(&FACS::new()))?;
    let dsdt = place.put(dsdt(platform).as_slice())?;
    let fadt = place.put(&fadt(facs, dsdt))?;
    let madt = place.put(madt(platform.cpus).as_slice())?;
    let mcfg = place.put(&bytes(&mcfg()))?;
    let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    for table in [fadt, madt, mcfg] {
        xsdt.add_entry(table);
    }
    if let Some(devices) = platform.memory_devices {
        xsdt.add_entry(place.put(&bytes(&srat(memory, devices.range)))?);
    }
    let xsdt = place.put(&bytes(&xsdt))?;
    let rsdp = bytes(&Rsdp::new(OEM_ID, xsdt));
    memory.write_slice(&rsdp, GuestAddress(rsdp_at))?;
    Ok(GuestAddress(rsdp_at))
}

struct Placer<'a> {
    memory: &'a GuestMemoryMmap,
    next: u64,
}

impl Placer<'_> {
    fn reserve(&mut self, size: usize) -> u64 {
        let at = self.next;
        self.next = (at + size as u64).next_multiple_of(64);
        at
    }

    fn put(&mut self, table: &[u8]) -> Result<u64, Error> {
        let at = self.reserve(table.len());
        if self.next > boot::ACPI_END {
            return Err(Error::TooLarge {
                needed: self.next - boot::ACPI,
                available: boot::ACPI_END - boot::ACPI,
            });
        }
        self.memory.write_slice(table, GuestAddress(at))?;
        Ok(at)
    }
}

fn bytes(table: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes);
    bytes
}

fn port(offset: u16) -> u16 {
    u16::try_from(layout::ACPI_PM_PORT)
        .unwrap_or(u16::MAX)
        .saturating_add(offset)
}

/// Fixed ACPI description table (5.2.9).
fn fadt(facs: u64, dsdt: u64) -> Vec<u8> {
    // Legacy devices are there; no keyboard controller, no VGA (5.2.9.3).
    const LEGACY_DEVICES: u16 = 1 << 0;
    const VGA_NOT_PRESENT: u16 = 1 << 2;

    let io = |bits, size, port: u16| GAS::new(GasSpace::SystemIo, bits, 0, size, port.into());
    let [event, control, timer] =
        [acpi_pm::PM1_EVENT, acpi_pm::PM1_CONTROL, acpi_pm::PM_TIMER].map(port);
    let mut fadt = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION).dsdt_64(dsdt);
    // A FACS below 4 GiB belongs into the 32-bit field, whatever the revision.
    fadt = fadt.firmware_ctrl_32(u32::try_from(facs).unwrap_or(0));
    fadt.sci_int = u16::try_from(layout::ACPI_SCI_IRQ).unwrap_or(0).into();
    // Without an SMI command port the machine is in ACPI mode from the start (4.8.3.2.1).
    fadt.pm1a_evt_blk = u32::from(event).into();
    fadt.x_pm1a_evt_blk = io(32, AccessSize::WordAccess, event);
    fadt.pm1_evt_len = 4;
    fadt.pm1a_cnt_blk = u32::from(control).into();
    fadt.x_pm1a_cnt_blk = io(16, AccessSize::WordAccess, control);
    fadt.pm1_cnt_len = 2;
    fadt.pm_tmr_blk = u32::from(timer).into();
    fadt.x_pm_tmr_blk = io(32, AccessSize::DwordAccess, timer);
    fadt.pm_tmr_len = 4;
    // Latencies over these limits say that C2 and C3 are not supported.
    fadt.p_lvl2_lat = 101.into();
    fadt.p_lvl3_lat = 1001.into();
    fadt.century = rtc::CENTURY;
    fadt.iapc_boot_arch = (LEGACY_DEVICES | VGA_NOT_PRESENT).into();
    fadt.reset_reg = GAS::new(
        GasSpace::SystemIo,
        8,
        0,
        AccessSize::ByteAccess,
        layout::RESET_PORT,
    );
    fadt.reset_value = reset::RESET_VALUE;
    for flag in [
        Flags::Wbinvd,
        Flags::ProcC1,
        // These two and FixRtc: "not a fixed feature".
        Flags::PwrButton,
        Flags::SlpButton,
        Flags::FixRtc,
        Flags::TmrValExt,
        Flags::ResetRegSup,
    ] {
        fadt = fadt.flag(flag);
    }
    bytes(&fadt.finalize())
}

/// Multiple APIC description table (5.2.12).
fn madt(cpus: u8) -> Sdt {
    /// The machine also has PICs.
    const PCAT_COMPAT: u32 = 1;
    /// ID of the I/O APIC; a number of its own, apart from the local APICs'.
    const IOAPIC_ID: u8 = 255;

    let mut madt = Sdt::new(*b"APIC", HEADER, 5, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    let local_apic = u32::try_from(layout::LOCAL_APIC).unwrap_or(0);
    madt.append_slice(&local_apic.to_le_bytes());
    madt.append_slice(&PCAT_COMPAT.to_le_bytes());
    for cpu in 0..cpus {
        madt.append_slice(&bytes(&ProcessorLocalApic::new(
            cpu,
            cpu,
            EnabledStatus::Enabled,
        )));
    }
    let ioapic = u32::try_from(layout::IOAPIC).unwrap_or(0);
    madt.append_slice(&bytes(&IoApic::new(IOAPIC_ID, ioapic, 0)));
    // The timer is at pin 2, see `irq`.
    madt.append_slice(&source_override(0, 2, ACTIVE_HIGH_EDGE));
    let sci = u8::try_from(layout::ACPI_SCI_IRQ).unwrap_or(0);
    madt.append_slice(&source_override(
        sci,
        layout::ACPI_SCI_IRQ,
        ACTIVE_HIGH_LEVEL,
    ));
    // Local APIC NMI (5.2.12.7): LINT1 of all processors.
    madt.append_slice(&[4, 6, 0xff, 0, 0, 1]);
    madt
}

/// Interrupt source override (5.2.12.5) of an ISA interrupt.
fn source_override(irq: u8, gsi: u32, flags: u16) -> Vec<u8> {
    let mut entry = vec![2, 10, 0, irq];
    entry.extend_from_slice(&gsi.to_le_bytes());
    entry.extend_from_slice(&flags.to_le_bytes());
    entry
}

/// Where PCI configuration space is (PCI Firmware 3.3, 4.1.2).
fn mcfg() -> MCFG {
    let mut mcfg = MCFG::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    mcfg.add_ecam(layout::ECAM_START, 0, 0, layout::ECAM_LAST_BUS);
    mcfg
}

/// System resource affinity table (5.2.16): RAM, and how far it may grow. All of it is near all
/// processors, those that are not listed are in domain 0; but Linux must know the highest address that
/// there can be to keep bounce buffers ready for devices that do not reach it.
fn srat(memory: &GuestMemoryMmap, growth: Range) -> SRAT {
    let mut srat = SRAT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    for region in memory.iter() {
        let (start, size) = (region.start_addr().0, region.len());
        srat.add_memory_affinity(MemoryAffinity::new(0, start, size).enabled());
    }
    let growth = MemoryAffinity::new(0, growth.start, growth.size);
    srat.add_memory_affinity(growth.enabled().hotpluggable());
    srat
}

/// Differentiated system description table: the namespace.
fn dsdt(platform: &Platform) -> Sdt {
    let mut dsdt = Sdt::new(*b"DSDT", HEADER, 6, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    let s5 = acpi_pm::SLEEP_TYPE_S5;
    let sleep = Package::new(vec![&s5, &s5, &ZERO, &ZERO]);
    dsdt.append_slice(&bytes(&Name::new("\\_S5_".into(), &sleep)));
    let cpus: Vec<Cpu> = (0..platform.cpus).map(Cpu).collect();
    let mut children: Vec<&dyn Aml> = cpus.iter().map(|cpu| cpu as &dyn Aml).collect();
    let pci = PciHost(platform.pci_mmio64);
    let reserved = Reserved(platform.memory_devices);
    children.extend([&pci as &dyn Aml, &reserved, &Com1, &Clock, &PvPanic]);
    if let Some(devices) = &platform.memory_devices {
        children.push(devices);
    }
    dsdt.append_slice(&bytes(&Scope::new("\\_SB_".into(), children)));
    dsdt
}

/// A processor.
struct Cpu(u8);

impl Aml for Cpu {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        let name = format!("C{:03X}", self.0);
        Device::new(
            name.as_str().into(),
            vec![
                &Name::new("_HID".into(), &"ACPI0007"),
                &Name::new("_UID".into(), &self.0),
            ],
        )
        .to_aml_bytes(sink);
    }
}

/// The PCI host bridge: its windows, and the request for its features to be left to the guest.
struct PciHost(Range);

impl Aml for PciHost {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        let low = |address: u64| u32::try_from(address).unwrap_or(u32::MAX);
        let cache = || AddressSpaceCacheable::NotCacheable;
        let buses = AddressSpace::new_bus_number(0u16, u16::from(layout::ECAM_LAST_BUS));
        let config = IO::new(0xcf8, 0xcf8, 1, 8);
        let ports_low = AddressSpace::new_io(0u16, 0xcf7, None);
        let ports_high = AddressSpace::new_io(0xd00u16, 0xffff, None);
        let mmio32 = AddressSpace::new_memory(
            cache(),
            true,
            low(layout::PCI_MMIO32_START),
            low(layout::PCI_MMIO32_START + layout::PCI_MMIO32_SIZE - 1),
            None,
        );
        let mut windows: Vec<&dyn Aml> = vec![&buses, &config, &ports_low, &ports_high, &mmio32];
        let mmio64 = AddressSpace::new_memory(
            cache(),
            true,
            self.0.start,
            self.0.end().saturating_sub(1),
            None,
        );
        if self.0.size != 0 {
            windows.push(&mmio64);
        }
        let resources = ResourceTemplate::new(windows);
        let routes: Vec<PinRoute> = (0..PCI_DEVICES)
            .flat_map(|device| {
                pin_gsis(device)
                    .into_iter()
                    .zip(0..)
                    .map(move |(gsi, pin)| (device, pin, gsi))
            })
            .map(|(device, pin, gsi)| PinRoute { device, pin, gsi })
            .collect();
        let routes = Package::new(routes.iter().map(|route| route as &dyn Aml).collect());
        Device::new(
            "PCI0".into(),
            vec![
                // PCI Express host bridge, compatible with PCI's.
                &Name::new("_HID".into(), &EISAName::new("PNP0A08")),
                &Name::new("_CID".into(), &EISAName::new("PNP0A03")),
                &Name::new("_SEG".into(), &ZERO),
                &Name::new("_BBN".into(), &ZERO),
                &Name::new("_UID".into(), &ZERO),
                // DMA is coherent.
                &Name::new("_CCA".into(), &ONE),
                &Name::new("_CRS".into(), &resources),
                &Name::new("_PRT".into(), &routes),
                &Osc,
            ],
        )
        .to_aml_bytes(sink);
    }
}

/// Devices of a bus.
const PCI_DEVICES: u8 = 32;

/// Where an interrupt pin of all functions of a device on bus 0 leads (ACPI 6.5, 6.2.13): to a pin of the I/O APIC, without a
/// link device that could change that.
struct PinRoute {
    device: u8,
    pin: u8,
    gsi: u32,
}

impl Aml for PinRoute {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        /// All functions.
        const ANY_FUNCTION: u32 = 0xffff;
        let address = u32::from(self.device) << 16 | ANY_FUNCTION;
        Package::new(vec![&address, &self.pin, &ZERO, &self.gsi]).to_aml_bytes(sink);
    }
}

/// `_OSC` of the host bridge (PCI Firmware 3.3, 4.5.1): the guest gets control of every PCI
/// Express feature that it asks for; nothing here would use them itself.
struct Osc;

impl Aml for Osc {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        /// "Unrecognized UUID" in the status word (ACPI 6.5, 6.2.11).
        const UNRECOGNIZED_UUID: u8 = 1 << 2;
        let known = Uuid::new("33DB4D5B-1FF7-401C-9657-7441C03DD766");
        Method::new(
            "_OSC".into(),
            4,
            // Serialized, because it creates a named object.
            true,
            vec![
                &If::new(&Equal::new(&Arg(0), &known), vec![&Return::new(&Arg(3))]),
                &Else::new(vec![
                    &Store::new(&Local(0), &Arg(3)),
                    &CreateDWordField::new(&Path::new("CDW1"), &Local(0), &ZERO),
                    &Or::new(&Path::new("CDW1"), &Path::new("CDW1"), &UNRECOGNIZED_UUID),
                    &Return::new(&Local(0)),
                ]),
            ],
        )
        .to_aml_bytes(sink);
    }
}

/// Motherboard resources. Linux uses ECAM only where firmware has reserved it (PCI Firmware 3.3,
/// 4.1.2, note 2). So are the ports by which it learns of more memory.
struct Reserved(Option<MemoryDevices>);

impl Aml for Reserved {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        let start = u32::try_from(layout::ECAM_START).unwrap_or(0);
        let size = u32::try_from(layout::ECAM_SIZE).unwrap_or(0);
        let window = Memory32Fixed::new(true, start, size);
        let ports = self.0.map(|devices| devices.reserved_ports());
        let mut reserved: Vec<&dyn Aml> = vec![&window];
        if let Some(ports) = &ports {
            reserved.push(ports);
        }
        let resources = ResourceTemplate::new(reserved);
        Device::new(
            "MBRD".into(),
            vec![
                &Name::new("_HID".into(), &EISAName::new("PNP0C02")),
                &Name::new("_UID".into(), &ZERO),
                &Name::new("_CRS".into(), &resources),
            ],
        )
        .to_aml_bytes(sink);
    }
}

fn ports(start: u64, length: u64) -> IO {
    let start = u16::try_from(start).unwrap_or(u16::MAX);
    IO::new(start, start, 1, u8::try_from(length).unwrap_or(u8::MAX))
}

/// The serial port.
struct Com1;

impl Aml for Com1 {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        let ports = ports(layout::SERIAL_PORT, serial::SIZE);
        let irq = Interrupt::new(true, true, false, false, layout::SERIAL_IRQ);
        let resources = ResourceTemplate::new(vec![&ports, &irq]);
        Device::new(
            "COM1".into(),
            vec![
                &Name::new("_HID".into(), &EISAName::new("PNP0501")),
                &Name::new("_UID".into(), &ONE),
                &Name::new("_DDN".into(), &"COM1"),
                &Name::new("_CRS".into(), &resources),
            ],
        )
        .to_aml_bytes(sink);
    }
}

/// The real-time clock.
struct Clock;

impl Aml for Clock {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        let ports = ports(layout::RTC_PORT, rtc::SIZE);
        let resources = ResourceTemplate::new(vec![&ports]);
        Device::new(
            "RTC_".into(),
            vec![
                &Name::new("_HID".into(), &EISAName::new("PNP0B00")),
                &Name::new("_CRS".into(), &resources),
            ],
        )
        .to_aml_bytes(sink);
    }
}

/// The panic event port.
struct PvPanic;

impl Aml for PvPanic {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        /// Present, enabled, shown, working (6.3.7).
        const PRESENT: u8 = 0xf;
        let ports = ports(layout::PVPANIC_PORT, 1);
        let resources = ResourceTemplate::new(vec![&ports]);
        Device::new(
            "PEVT".into(),
            vec![
                &Name::new("_HID".into(), &"QEMU0001"),
                &Name::new("_STA".into(), &PRESENT),
                &Name::new("_CRS".into(), &resources),
            ],
        )
        .to_aml_bytes(sink);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn platform(cpus: u8) -> Platform {
        Platform {
            cpus,
            pci_mmio64: Range {
                start: 4 << 30,
                size: 512 << 30,
            },
            memory_devices: None,
        }
    }

    fn written(cpus: u8) -> (GuestMemoryMmap, u64) {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 2 << 20)]).unwrap();
        let rsdp = write(&memory, &platform(cpus)).unwrap();
        (memory, rsdp.0)
    }

    fn table(memory: &GuestMemoryMmap, at: u64) -> Vec<u8> {
        let length: u32 = memory.read_obj(GuestAddress(at + 4)).unwrap();
        let mut bytes = vec![0; length as usize];
        memory.read_slice(&mut bytes, GuestAddress(at)).unwrap();
        let sum = bytes.iter().fold(0u8, |sum, b| sum.wrapping_add(*b));
        assert_eq!(
            sum,
            0,
            "checksum of {}",
            String::from_utf8_lossy(&bytes[..4])
        );
        bytes
    }

    fn u64_at(bytes: &[u8], at: usize) -> u64 {
        u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
    }

    #[test]
    fn tables_are_linked_and_their_checksums_right() {
        for cpus in [1, 8, 254] {
            let (memory, rsdp) = written(cpus);
            let mut root = [0; 36];
            memory.read_slice(&mut root, GuestAddress(rsdp)).unwrap();
            assert_eq!(&root[..8], b"RSD PTR ");
            assert_eq!(
                root[..20].iter().fold(0u8, |sum, b| sum.wrapping_add(*b)),
                0
            );
            assert_eq!(root.iter().fold(0u8, |sum, b| sum.wrapping_add(*b)), 0);
            let xsdt = table(&memory, u64_at(&root, 24));
            let tables: Vec<Vec<u8>> = xsdt[36..]
                .chunks(8)
                .map(|p| table(&memory, u64_at(p, 0)))
                .collect();
            let names: Vec<&[u8]> = tables.iter().map(|t| &t[..4]).collect();
            assert_eq!(names, [b"FACP", b"APIC", b"MCFG"]);
            assert_eq!(&table(&memory, u64_at(&tables[0], 140))[..4], b"DSDT");
            let facs = u32::from_le_bytes(tables[0][36..40].try_into().unwrap());
            assert_eq!(facs % 64, 0);
        }
    }

    #[test]
    fn the_madt_has_every_processor_and_the_timers_pin() {
        let madt = madt(3);
        let mut rest = &madt.as_slice()[44..];
        let mut entries = Vec::new();
        while !rest.is_empty() {
            let (entry, tail) = rest.split_at(usize::from(rest[1]));
            entries.push(entry.to_vec());
            rest = tail;
        }
        let cpus: Vec<u8> = entries.iter().filter(|e| e[0] == 0).map(|e| e[3]).collect();
        assert_eq!(cpus, [0, 1, 2]);
        assert!(entries.contains(&vec![2, 10, 0, 0, 2, 0, 0, 0, 5, 0]));
        assert!(entries.contains(&vec![2, 10, 0, 9, 9, 0, 0, 0, 13, 0]));
    }

    #[test]
    fn memory_that_can_be_added_shows_in_dsdt_and_srat() {
        let growth = Range {
            start: 4 << 30,
            size: 1 << 30,
        };
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 2 << 20)]).unwrap();
        let platform = Platform {
            memory_devices: Some(MemoryDevices {
                range: growth,
                pieces: 7,
            }),
            ..platform(254)
        };
        let rsdp = write(&memory, &platform).unwrap();
        let mut root = [0; 36];
        memory.read_slice(&mut root, rsdp).unwrap();
        let xsdt = table(&memory, u64_at(&root, 24));
        let srat = table(&memory, u64_at(&xsdt, xsdt.len() - 8));
        assert_eq!(&srat[..4], b"SRAT");
        // Memory affinity structures (5.2.16.2): type, length, range, enabled and hot-pluggable.
        let ranges: Vec<_> = srat[48..]
            .chunks(40)
            .map(|s| (s[..2].to_vec(), u64_at(s, 8), u64_at(s, 16), s[28]))
            .collect();
        assert_eq!(
            ranges,
            [
                (vec![1, 40], 0, 2 << 20, 1),
                (vec![1, 40], growth.start, growth.size, 3)
            ]
        );
        let dsdt = dsdt(&platform).as_slice().to_vec();
        let has = |part: &[u8]| dsdt.windows(part.len()).any(|window| window == part);
        assert!(has(b"ACPI0013") && has(b"MH06"));
        // IO (Decode16, 0x620, 0x620, 1, 112)
        assert!(has(&[0x47, 1, 0x20, 6, 0x20, 6, 1, 112]));
    }

    #[test]
    fn the_mcfg_names_the_ecam_window() {
        let mcfg = bytes(&mcfg());
        assert_eq!(u64_at(&mcfg, 44), layout::ECAM_START);
        assert_eq!(mcfg[52..56], [0, 0, 0, 255]);
    }

    #[test]
    fn osc_refuses_what_it_does_not_know() {
        let code = bytes(&Osc);
        let has = |bytes: &[u8]| code.windows(bytes.len()).any(|window| window == bytes);
        // CreateDWordField (Local0, Zero, CDW1); Or (CDW1, 4, CDW1); Return (Local0).
        assert!(
            has(b"\x8a\x60\x00CDW1\x7dCDW1\x0a\x04CDW1\xa4\x60"),
            "{code:x?}"
        );
        // Four arguments, serialized.
        assert!(has(b"_OSC\x0c"), "{code:x?}");
    }

    #[test]
    fn each_pin_of_each_device_has_a_route() {
        let code = dsdt(&platform(1)).as_slice().to_vec();
        let has = |bytes: &[u8]| code.windows(bytes.len()).any(|window| window == bytes);
        // Name (_PRT, Package (128) {...
        assert!(has(b"\x08_PRT\x12"));
        // Package (4) { 0x1ffff, Zero, Zero, 17 }, and { 0x1fffff, 3, Zero, 18 }.
        assert!(has(b"\x04\x0c\xff\xff\x01\x00\x00\x00\x0a\x11"));
        assert!(has(b"\x04\x0c\xff\xff\x1f\x00\x0a\x03\x00\x0a\x12"));
    }

    #[test]
    fn a_window_without_room_is_left_out() {
        let with = dsdt(&platform(1)).as_slice().len();
        let empty = Platform {
            cpus: 1,
            pci_mmio64: Range {
                start: 4 << 30,
                size: 0,
            },
            memory_devices: None,
        };
        assert!(dsdt(&empty).as_slice().len() < with);
    }
}

//! What a guest sees of a device's configuration space: some registers are the device's, others are emulated.
//!
//! | registers | the guest's |
//! | --- | --- |
//! | IDs, class, subsystem | as they were when the device was opened |
//! | command | memory decoding is emulated: the device always decodes, the guest's mapping comes and goes. Bus master, INTx disable and the rest are the device's |
//! | BARs, expansion ROM | emulated: size as the device has it, address as the guest likes it. Ports (I/O BARs) are left out |
//! | interrupt pin and line | emulated |
//! | MSI, MSI-X | emulated; the host's own messages are never seen |
//! | power management | emulated: D3hot is remembered, and nothing else happens |
//! | PCI Express, vendor-specific, VPD, SATA, advanced features | the device's (the kernel turns a function-level reset into its own) |
//! | AER, VC, serial number, power budgeting, vendor-specific extended | the device's |
//! | any other capability | not there: among them SR-IOV, ATS, PRI, PASID, ACS, ARI, resizable BARs, enhanced allocation |
//!
//! What the kernel lets through of the rest is its own decision: it virtualises, too, so that a device cannot be used against
//! the host (Linux, drivers/vfio/pci/vfio_pci_config.c).

use std::io;

use ringside_vfio::device::{PassthroughDevice, Region};

use crate::pci::bits::*;
use crate::pci::config::{self, BarKind, ConfigSpace};
use crate::pci::msi::MsiLayout;

/// Most capabilities that fit a list (each takes a double word of what follows the header).
const MAX_CAPABILITIES: usize = (CONVENTIONAL_SIZE - HEADER_SIZE) / 4;
/// Most extended capabilities that fit their list.
const MAX_EXTENDED: usize = (CONFIG_SIZE - EXTENDED_START) / 4;
/// An I/O BAR (PCI Express 5.0, 7.5.1.2.1).
const BAR_IO: u32 = 1;
/// The header's layout, without the multi-function bit.
const HEADER_LAYOUT: u8 = 0x7f;

/// Capabilities that a guest sees.
const SHOWN: [u8; 8] = [
    CAP_POWER_MANAGEMENT,
    CAP_VITAL_PRODUCT_DATA,
    CAP_MSI,
    CAP_VENDOR,
    CAP_EXPRESS,
    CAP_MSIX,
    CAP_SATA,
    CAP_ADVANCED_FEATURES,
];
/// Extended capabilities that a guest sees.
const SHOWN_EXTENDED: [u16; 6] = [
    EXT_CAP_AER,
    EXT_CAP_VC,
    EXT_CAP_SERIAL_NUMBER,
    EXT_CAP_POWER_BUDGETING,
    EXT_CAP_VENDOR,
    EXT_CAP_DESIGNATED_VENDOR,
];

/// Why a device's configuration space cannot be shown to a guest.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The device does not answer.
    #[error("its configuration space cannot be read")]
    Read(#[source] io::Error),
    /// Not an endpoint.
    #[error("it has a header of type {0}: only endpoints (type 0) can be given to a guest")]
    Header(u8),
    /// A BAR that no device may have.
    #[error("its BARs make no sense")]
    Bar(#[from] config::Error),
}

/// A place in a BAR.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Which BAR.
    pub bar: u8,
    /// Where in it, in bytes.
    pub offset: u64,
}

/// The MSI-X capability of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MsixInfo {
    /// Offset of the capability.
    pub capability: usize,
    /// Number of vectors.
    pub vectors: u16,
    /// Where the table is.
    pub table: Place,
    /// Where the pending bits are.
    pub pending: Place,
}

/// A device's configuration space as a guest sees it.
#[derive(Clone, Debug)]
pub struct VirtualConfig {
    /// The emulated registers, and what the others were at the start.
    space: ConfigSpace,
    /// The bits that are emulated.
    emulated: Vec<u8>,
    /// Offset of the power management capability.
    power: Option<usize>,
    msi: Option<usize>,
    msix: Option<MsixInfo>,
}

impl VirtualConfig {
    /// Reads the device's registers and decides about each.
    pub fn new(device: &dyn PassthroughDevice) -> Result<Self, Error> {
        let size = usize::try_from(device.region(Region::Config).size).unwrap_or(0);
        let mut registers = vec![0; size.min(CONFIG_SIZE)];
        for (offset, word) in (0u64..).step_by(4).zip(registers.chunks_exact_mut(4)) {
            device
                .read(Region::Config, offset, word)
                .map_err(Error::Read)?;
        }
        let mut config = Self {
            space: ConfigSpace::with_registers(&registers),
            emulated: vec![0; CONFIG_SIZE],
            power: None,
            msi: None,
            msix: None,
        };
        // Beyond the device's own space nothing is left to the device.
        config.emulate(registers.len(), CONFIG_SIZE - registers.len());
        config.header(device)?;
        config.capabilities();
        if registers.len() > EXTENDED_START {
            config.extended_capabilities();
        }
        Ok(config)
    }

    /// The emulated registers.
    pub fn space(&self) -> &ConfigSpace {
        &self.space
    }

    /// The same, to place BARs.
    pub fn space_mut(&mut self) -> &mut ConfigSpace {
        &mut self.space
    }

    /// Turns off what a reset turns off: memory decoding, MSI and MSI-X. The power is on.
    pub fn reset(&mut self) {
        let clear = |space: &mut ConfigSpace, register: usize, bits: u16| {
            let value = space.u16(register) & !bits;
            space.set(register, &value.to_le_bytes());
        };
        clear(&mut self.space, COMMAND, COMMAND_MEMORY);
        if let Some(power) = self.power {
            clear(&mut self.space, power + 4, PM_POWER_STATE);
        }
        if let Some(msi) = self.msi {
            clear(&mut self.space, msi + 2, MSI_ENABLE);
        }
        if let Some(msix) = self.msix {
            let bits = MSIX_ENABLE | MSIX_FUNCTION_MASK;
            clear(&mut self.space, msix.capability + 2, bits);
        }
    }

    /// Offset of the MSI capability.
    pub fn msi(&self) -> Option<usize> {
        self.msi
    }

    /// The MSI-X capability.
    pub fn msix(&self) -> Option<MsixInfo> {
        self.msix
    }

    /// The interrupt pin, from 1 on.
    pub fn pin(&self) -> Option<u8> {
        match self.space.u16(INTERRUPT_PIN).to_le_bytes() {
            [pin @ 1..=4, _] => Some(pin),
            _ => None,
        }
    }

    fn emulate(&mut self, offset: usize, length: usize) {
        for mask in self.emulated.iter_mut().skip(offset).take(length) {
            *mask = 0xff;
        }
    }

    /// Emulates registers with these values and writable bits.
    fn put(&mut self, offset: usize, value: &[u8], writable: &[u8]) {
        self.emulate(offset, value.len());
        self.space.set(offset, value);
        self.space.set_writable(offset, writable);
    }

    fn emulate_bits(&mut self, offset: usize, bits: u16) {
        for (mask, bits) in self
            .emulated
            .iter_mut()
            .skip(offset)
            .zip(bits.to_le_bytes())
        {
            *mask |= bits;
        }
    }

    fn byte(&self, offset: usize) -> u8 {
        let mut byte = [0];
        self.space.read(offset, &mut byte);
        let [byte] = byte;
        byte
    }

    fn header(&mut self, device: &dyn PassthroughDevice) -> Result<(), Error> {
        let layout = self.byte(HEADER_TYPE) & HEADER_LAYOUT;
        if layout != 0 {
            return Err(Error::Header(layout));
        }
        self.emulate(VENDOR_ID, 4);
        // What the device decodes was settled before the guest came.
        let command = self.space.u16(COMMAND) & !(COMMAND_MEMORY | COMMAND_IO);
        self.space.set(COMMAND, &command.to_le_bytes());
        self.space
            .set_writable(COMMAND, &COMMAND_MEMORY.to_le_bytes());
        self.emulate_bits(COMMAND, COMMAND_MEMORY | COMMAND_IO);
        self.emulate(REVISION_ID, 4);
        self.put(HEADER_TYPE, &[layout], &[]);
        self.put(BIST, &[0], &[]);
        self.emulate(SUBSYSTEM_VENDOR_ID, 4);
        self.bars(device)?;
        let pin = if device.irq_count(ringside_vfio::device::Irq::Intx) == 0 {
            0
        } else {
            self.byte(INTERRUPT_PIN)
        };
        self.put(INTERRUPT_LINE, &[0, pin], &[0xff, 0]);
        Ok(())
    }

    fn bars(&mut self, device: &dyn PassthroughDevice) -> Result<(), Error> {
        let registers: [u32; BAR_COUNT] = std::array::from_fn(|bar| self.space.u32(BAR0 + 4 * bar));
        self.put(BAR0, &[0; 4 * BAR_COUNT], &[0; 4 * BAR_COUNT]);
        self.put(ROM_ADDRESS, &[0; 4], &[0; 4]);
        for (bar, register) in (0u8..).zip(registers) {
            let size = device.region(Region::Bar(bar)).size;
            if size == 0 {
                continue;
            }
            if register & BAR_IO != 0 {
                tracing::debug!(bar, "the guest does not get an I/O BAR");
                continue;
            }
            let prefetchable = register & BAR_PREFETCHABLE != 0;
            let kind = if register & BAR_MEMORY_64 != 0 {
                BarKind::Memory64 { prefetchable }
            } else {
                BarKind::Memory32 { prefetchable }
            };
            self.space.add_bar(bar.into(), size, kind)?;
        }
        let rom = device.region(Region::Rom).size;
        if rom != 0 {
            // VFIO gives a ROM its size in the device, or that of a copy in memory.
            let size = rom.next_power_of_two().max(2048);
            self.space.add_bar(ROM_BAR, size, BarKind::Rom)?;
        }
        Ok(())
    }

    /// Links the capabilities that the guest sees, and hides the others.
    fn capabilities(&mut self) {
        let mut found = Vec::new();
        if self.space.u16(STATUS) & STATUS_CAPABILITIES != 0 {
            let mut at = usize::from(self.byte(CAPABILITIES_POINTER) & !3);
            while at >= HEADER_SIZE && found.len() < MAX_CAPABILITIES {
                found.push((at, self.byte(at)));
                at = usize::from(self.byte(at + 1) & !3);
            }
        }
        let (shown, hidden): (Vec<_>, Vec<_>) = found
            .iter()
            .copied()
            .partition(|(_, id)| SHOWN.contains(id));
        for (at, _) in hidden {
            let end = end_of(at, found.iter().map(|(at, _)| *at), CONVENTIONAL_SIZE);
            self.hide(at, end);
        }
        let mut link = CAPABILITIES_POINTER;
        for &(at, id) in &shown {
            self.link(link, at);
            self.emulate(at, 1);
            link = at + 1;
            self.capability(id, at);
        }
        self.link(link, 0);
        let status = self.space.u16(STATUS) & !STATUS_CAPABILITIES;
        let list = if shown.is_empty() {
            0
        } else {
            STATUS_CAPABILITIES
        };
        self.space.set(STATUS, &(status | list).to_le_bytes());
        self.emulate_bits(STATUS, STATUS_CAPABILITIES);
    }

    fn link(&mut self, link: usize, to: usize) {
        // Capabilities are below 256.
        self.put(link, &[u8::try_from(to).unwrap_or(0)], &[]);
    }

    fn hide(&mut self, from: usize, to: usize) {
        let nothing = vec![0; to.saturating_sub(from)];
        self.put(from, &nothing, &nothing);
    }

    fn capability(&mut self, id: u8, at: usize) {
        match id {
            CAP_POWER_MANAGEMENT => {
                self.power = Some(at);
                let version = self.space.u16(at + 2) & PM_CAP_VERSION;
                self.put(at + 2, &version.to_le_bytes(), &[]);
                let (control, writable) = (PM_NO_SOFT_RESET, PM_POWER_STATE);
                self.put(at + 4, &control.to_le_bytes(), &writable.to_le_bytes());
                self.put(at + 6, &[0; 2], &[]);
            }
            CAP_MSI if self.msi.is_none() => {
                self.msi = Some(at);
                let control = self.space.u16(at + 2) & (MSI_CAPABLE | MSI_64_BIT | MSI_MASKABLE);
                let writable = MSI_ENABLE | MSI_ENABLED;
                self.put(at + 2, &control.to_le_bytes(), &writable.to_le_bytes());
                let layout = MsiLayout::new(at, control);
                self.put(at + 4, &[0; 4], &[0xfc, 0xff, 0xff, 0xff]);
                if layout.upper_address {
                    self.put(at + 8, &[0; 4], &[0xff; 4]);
                }
                self.put(layout.data, &[0; 2], &[0xff; 2]);
                if let Some(mask) = layout.mask {
                    self.put(layout.data + 2, &[0; 2], &[]);
                    self.put(mask, &[0; 8], &[0xff; 4]);
                }
            }
            CAP_MSIX if self.msix.is_none() => {
                let size = self.space.u16(at + 2) & (MSIX_MAX_VECTORS - 1);
                let place = |register: u32| {
                    let [low, ..] = register.to_le_bytes();
                    Place {
                        bar: low & 7,
                        offset: u64::from(register & !7),
                    }
                };
                self.msix = Some(MsixInfo {
                    capability: at,
                    vectors: size + 1,
                    table: place(self.space.u32(at + 4)),
                    pending: place(self.space.u32(at + 8)),
                });
                let writable = MSIX_ENABLE | MSIX_FUNCTION_MASK;
                self.put(at + 2, &size.to_le_bytes(), &writable.to_le_bytes());
                self.emulate(at + 4, 8);
            }
            _ => {}
        }
    }

    fn extended_capabilities(&mut self) {
        let header = |space: &ConfigSpace, at: usize| {
            let header = space.u32(at);
            let [a, b, ..] = header.to_le_bytes();
            let next = usize::try_from(header >> 20).unwrap_or(0) & !3;
            (u16::from_le_bytes([a, b]), next)
        };
        let mut found = Vec::new();
        let mut at = EXTENDED_START;
        while at >= EXTENDED_START && found.len() < MAX_EXTENDED {
            let (id, next) = header(&self.space, at);
            if id == 0xffff || (id == EXT_CAP_NULL && next == 0) {
                break;
            }
            found.push((at, id));
            at = next;
        }
        let (shown, hidden): (Vec<_>, Vec<_>) = found
            .iter()
            .copied()
            .partition(|(_, id)| SHOWN_EXTENDED.contains(id));
        for (at, _) in hidden {
            let end = end_of(at, found.iter().map(|(at, _)| *at), CONFIG_SIZE);
            self.hide(at, end);
        }
        // The list starts at its fixed place, whether or not what is there is shown.
        let mut list = shown;
        if list.first().is_none_or(|(at, _)| *at != EXTENDED_START) {
            list.insert(0, (EXTENDED_START, EXT_CAP_NULL));
        }
        let nexts = list.iter().skip(1).map(|(at, _)| *at).chain([0]);
        for (&(at, id), next) in list.iter().zip(nexts.collect::<Vec<_>>()) {
            let version = if id == EXT_CAP_NULL {
                0
            } else {
                self.space.u32(at) & 0x000f_0000
            };
            let next = u32::try_from(next).unwrap_or(0) << 20;
            let header = u32::from(id) | version | next;
            self.put(at, &header.to_le_bytes(), &[]);
        }
    }

    /// Reads registers.
    pub fn read(
        &self,
        device: &dyn PassthroughDevice,
        offset: usize,
        data: &mut [u8],
    ) -> io::Result<()> {
        let masks = || self.masks(offset, data.len());
        if masks().all(|mask| mask == 0xff) {
            self.space.read(offset, data);
            return Ok(());
        }
        let masks: Vec<u8> = masks().collect();
        let at = u64::try_from(offset).unwrap_or(u64::MAX);
        device.read(Region::Config, at, data)?;
        for ((byte, mask), at) in data.iter_mut().zip(masks).zip(offset..) {
            *byte = (*byte & !mask) | (self.byte(at) & mask);
        }
        Ok(())
    }

    fn masks(&self, offset: usize, length: usize) -> impl Iterator<Item = u8> {
        (offset..offset.saturating_add(length))
            .map(|at| self.emulated.get(at).copied().unwrap_or(0xff))
    }

    /// Writes registers.
    pub fn write(
        &mut self,
        device: &dyn PassthroughDevice,
        offset: usize,
        data: &[u8],
    ) -> io::Result<()> {
        self.space.write(offset, data);
        let masks: Vec<u8> = self.masks(offset, data.len()).collect();
        let at = u64::try_from(offset).unwrap_or(u64::MAX);
        // In one piece where nothing of it is emulated: devices may take a register as a whole only.
        if masks.iter().all(|mask| *mask == 0) {
            return device.write(Region::Config, at, data);
        }
        for ((byte, mask), at) in data.iter().zip(masks).zip(at..) {
            let value = match mask {
                0xff => continue,
                0 => *byte,
                _ => {
                    let mut old = [0];
                    device.read(Region::Config, at, &mut old)?;
                    let [old] = old;
                    (old & mask) | (byte & !mask)
                }
            };
            device.write(Region::Config, at, &[value])?;
        }
        Ok(())
    }
}

/// Where a capability ends at the latest: where the next one starts.
fn end_of(at: usize, others: impl Iterator<Item = usize>, limit: usize) -> usize {
    others.filter(|other| *other > at).min().unwrap_or(limit)
}

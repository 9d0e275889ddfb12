//! Functions of the host's PCI bus in the hands of the guest, through VFIO.
//!
//! | module | concern |
//! | --- | --- |
//! | [`config`] | which registers of configuration space are the device's, and which are emulated |
//! | [`bars`] | which parts of a BAR the guest reaches without an exit |
//! | [`interrupts`] | pin, MSI and MSI-X by irqfd |
//! | `passthrough` | all functions of a guest |
//!
//! ```text
//! guest's driver ──▶ BARs: KVM memory slots ─────────────▶ device
//!      │ │                                                  │  │
//!      │ └─▶ configuration space, MSI-X table: VfioPci      │  └─ DMA: IOMMU ─▶ guest RAM
//!      └──── irqfd ◀─ eventfd of the vector ◀───────────────┘
//! ```
//!
//! In steady state nothing passes through this process: the guest's accesses to the device's registers do not leave the
//! guest, its DMA is translated by the IOMMU, and its interrupts go from the kernel's VFIO to the kernel's KVM.

pub mod bars;
pub mod config;
pub mod interrupts;
mod passthrough;
#[cfg(test)]
mod tests;

use std::io;
use std::sync::Arc;

use ringside_vfio::address::PciAddress;
use ringside_vfio::device::{self, Area, Irq, Mapping, PassthroughDevice, Region};
use vmm_sys_util::eventfd::EventFd;

use self::config::{MsixInfo, VirtualConfig};
use self::interrupts::Interrupts;
pub use self::interrupts::Routing;
pub use self::passthrough::Passthrough;
use crate::complaints::Complaints;
use crate::kvm::{self, SlotId, Vm};
use crate::memory_hotplug;
use crate::pci::bits::*;
use crate::pci::{self, ConfigSpace, PciFunction};

/// What device memory needs from KVM, narrow enough to be played by a test.
pub trait MemorySlots: Send + Sync {
    /// Lets the guest reach `mapping` at guest-physical `start` without an exit.
    fn map(&self, start: u64, mapping: &Arc<Mapping>) -> Result<SlotId, kvm::Error>;
    /// Undoes [`MemorySlots::map`].
    fn unmap(&self, slot: SlotId);
}

impl MemorySlots for Vm {
    fn map(&self, start: u64, mapping: &Arc<Mapping>) -> Result<SlotId, kvm::Error> {
        Vm::map(self, start, mapping)
    }
    fn unmap(&self, slot: SlotId) {
        Vm::unmap(self, slot);
    }
}

/// Why a device cannot be given to the guest.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Its registers.
    #[error("the guest cannot have {address}: {source}")]
    Config {
        /// The device.
        address: PciAddress,
        /// What is wrong with them.
        source: config::Error,
    },
    /// Its interrupts.
    #[error("the guest cannot have the interrupts of {address}")]
    Interrupts {
        /// The device.
        address: PciAddress,
        /// What is wrong.
        #[source]
        source: interrupts::Error,
    },
    /// VFIO.
    #[error(transparent)]
    Device(#[from] device::Error),
    /// KVM.
    #[error(transparent)]
    Kvm(#[from] kvm::Error),
    /// Guest memory that was added before there was a function.
    #[error(transparent)]
    Memory(#[from] memory_hotplug::Error),
    /// The guest's PCI bus.
    #[error(transparent)]
    Pci(#[from] pci::host::Error),
    /// No file descriptor left, most likely.
    #[error("cannot watch a device")]
    Event(#[source] io::Error),
    /// The guest has it, or another with that name.
    #[error("the guest has {host} as `{id}` already")]
    Taken {
        /// Its id.
        id: String,
        /// Its address on the host.
        host: PciAddress,
    },
    /// The guest was asked for it, in vain.
    #[error(
        "the guest has not let go of `{id}` within {} seconds: has it a driver for hot-plug slots (pciehp)? If it lets go later, plug the function in again (device-add)",
        passthrough::RELEASE_LIMIT.as_secs()
    )]
    Kept {
        /// Its id.
        id: String,
    },
    /// No such function.
    #[error("there is no device `{id}` that could be removed; `device-list` shows those that can")]
    Unknown {
        /// The id.
        id: String,
    },
}

/// A piece of a BAR that the guest reaches without an exit.
struct Piece {
    area: Area,
    mapping: Arc<Mapping>,
    slot: Option<SlotId>,
}

/// A device of the host as a function of the guest's PCI bus.
pub struct VfioPci {
    device: Box<dyn PassthroughDevice>,
    config: VirtualConfig,
    interrupts: Interrupts,
    slots: Arc<dyn MemorySlots>,
    /// By BAR.
    pieces: [Vec<Piece>; BAR_COUNT],
    complaints: Complaints,
}

impl VfioPci {
    /// Prepares an open device for the bus.
    pub fn new(
        device: Box<dyn PassthroughDevice>,
        routing: Arc<dyn Routing>,
        slots: Arc<dyn MemorySlots>,
    ) -> Result<Self, Error> {
        let address = device.address();
        let failed = |source| Error::Config { address, source };
        let config = VirtualConfig::new(device.as_ref()).map_err(failed)?;
        let interrupts = Interrupts::new(routing, device.as_ref(), &config)
            .map_err(|source| Error::Interrupts { address, source })?;
        let mut pieces = [const { Vec::new() }; BAR_COUNT];
        for (bar, pieces) in (0u8..).zip(&mut pieces) {
            if config.space().bar(bar.into()).is_none() {
                continue;
            }
            let region = Region::Bar(bar);
            let holes = interrupts
                .msix()
                .and(config.msix())
                .map_or_else(Vec::new, |msix| holes(msix, bar));
            for area in bars::without(&device.region(region).mappable, &holes) {
                let mapping = device
                    .map(region, area)
                    .map_err(|source| device::Error::Region {
                        address,
                        region,
                        source,
                    })?;
                pieces.push(Piece {
                    area,
                    mapping,
                    slot: None,
                });
            }
        }
        let mut function = Self {
            device,
            config,
            interrupts,
            slots,
            pieces,
            complaints: Complaints::default(),
        };
        function
            .power_up()
            .map_err(|e| failed(config::Error::Read(e)))?;
        Ok(function)
    }

    /// Lets the device answer at its own addresses for as long as the guest has it, and starts with what a reset leaves:
    /// no bus master.
    fn power_up(&mut self) -> io::Result<()> {
        let mut command = [0; 2];
        let at = offset(COMMAND);
        self.device.read(Region::Config, at, &mut command)?;
        let command = u16::from_le_bytes(command) & !COMMAND_BUS_MASTER | COMMAND_MEMORY;
        self.device
            .write(Region::Config, at, &command.to_le_bytes())
    }

    /// The device's address on the host.
    pub fn address(&self) -> PciAddress {
        self.device.address()
    }

    /// Lets the kernel signal `event` for an error of the device or when it wants the device back. Returns whether it can.
    pub fn watch(&self, irq: Irq, event: &EventFd) -> Result<bool, Error> {
        if self.device.irq_count(irq) == 0 {
            return Ok(false);
        }
        self.device.enable_irq(irq, &[event])?;
        Ok(true)
    }

    fn complain(&self, what: &str, error: &(dyn std::error::Error + 'static)) {
        if self.complaints.may_complain() {
            let device = self.address();
            tracing::warn!(%device, error, "{what}");
        }
    }

    fn update_interrupts(&mut self) {
        let updated = self.interrupts.update(self.device.as_ref(), &self.config);
        if let Err(error) = updated {
            self.complain("a device's interrupts cannot be switched", &error);
        }
    }

    /// Which part of MSI-X an access to a BAR meets, and where in it.
    fn msix_part(&self, bar: usize, offset: u64) -> Option<(MsixPart, u64)> {
        self.interrupts.msix()?;
        let info = self.config.msix()?;
        let [table, pending] = sizes(info);
        [
            (MsixPart::Table, info.table, table),
            (MsixPart::Pending, info.pending, pending),
        ]
        .into_iter()
        .find_map(|(part, place, size)| {
            let at = offset.checked_sub(place.offset)?;
            (usize::from(place.bar) == bar && at < size).then_some((part, at))
        })
    }

    fn unmap(&mut self, bar: usize) {
        for piece in self.pieces.get_mut(bar).into_iter().flatten() {
            if let Some(slot) = piece.slot.take() {
                self.slots.unmap(slot);
            }
        }
    }

    fn map(&mut self, bar: usize, start: u64) {
        // A BAR smaller than a page may be anywhere in it; only at its start it is what a page can show.
        if !start.is_multiple_of(bars::PAGE) {
            return;
        }
        let mut failed = None;
        for piece in self.pieces.get_mut(bar).into_iter().flatten() {
            match self
                .slots
                .map(start.saturating_add(piece.area.offset), &piece.mapping)
            {
                Ok(slot) => piece.slot = Some(slot),
                Err(error) => failed = Some(error),
            }
        }
        if let Some(error) = failed {
            self.complain("the guest's accesses to a BAR are slow", &error);
        }
    }
}

#[derive(Clone, Copy)]
enum MsixPart {
    Table,
    Pending,
}

/// Sizes in bytes of the MSI-X table and of the pending bits, which come in quad words (PCI Express 5.0, 7.7.2).
fn sizes(info: MsixInfo) -> [u64; 2] {
    let vectors = u64::from(info.vectors);
    [vectors * MSIX_ENTRY_SIZE, vectors.div_ceil(64) * 8]
}

fn holes(info: MsixInfo, bar: u8) -> Vec<Area> {
    let [table, pending] = sizes(info);
    [(info.table, table), (info.pending, pending)]
        .into_iter()
        .filter(|(place, _)| place.bar == bar)
        .map(|(place, size)| Area {
            offset: place.offset,
            size,
        })
        .collect()
}

fn offset(register: usize) -> u64 {
    u64::try_from(register).unwrap_or(u64::MAX)
}

fn region(bar: usize) -> Option<Region> {
    match u8::try_from(bar) {
        Ok(bar) if usize::from(bar) < BAR_COUNT => Some(Region::Bar(bar)),
        Ok(bar) if usize::from(bar) == ROM_BAR => Some(Region::Rom),
        _ => None,
    }
}

impl PciFunction for VfioPci {
    fn config(&self) -> &ConfigSpace {
        self.config.space()
    }

    fn config_mut(&mut self) -> &mut ConfigSpace {
        self.config.space_mut()
    }

    fn read_config(&mut self, offset: usize, data: &mut [u8]) {
        if let Some(msi) = self.interrupts.msi() {
            msi.show_pending(self.config.space_mut());
        }
        if let Err(error) = self.config.read(self.device.as_ref(), offset, data) {
            data.fill(0xff);
            self.complain("a device does not answer", &error);
        }
    }

    fn write_config(&mut self, offset: usize, data: &[u8]) {
        if let Err(error) = self.config.write(self.device.as_ref(), offset, data) {
            self.complain("a device does not answer", &error);
        }
        self.update_interrupts();
    }

    fn reset(&mut self) {
        self.config.reset();
        self.update_interrupts();
        if let Err(error) = self.device.reset() {
            self.complain("a device is not reset", &error);
        }
        if let Err(error) = self.power_up() {
            self.complain("a device does not answer", &error);
        }
    }

    fn read_bar(&mut self, bar: usize, offset: u64, data: &mut [u8]) {
        if let (Some((part, at)), Some(msix)) =
            (self.msix_part(bar, offset), self.interrupts.msix())
        {
            match part {
                MsixPart::Table => msix.read_table(at, data),
                MsixPart::Pending => msix.read_pending(at, data),
            }
            return;
        }
        let Some(region) = region(bar) else { return };
        if let Err(error) = self.device.read(region, offset, data) {
            data.fill(0xff);
            self.complain("a device does not answer", &error);
        }
    }

    fn write_bar(&mut self, bar: usize, offset: u64, data: &[u8]) {
        match self.msix_part(bar, offset) {
            Some((MsixPart::Table, at)) => {
                if let Some(msix) = self.interrupts.msix_mut() {
                    msix.write_table(at, data);
                }
            }
            Some((MsixPart::Pending, _)) => {}
            None => {
                let Some(region @ Region::Bar(_)) = region(bar) else {
                    return;
                };
                if let Err(error) = self.device.write(region, offset, data) {
                    self.complain("a device does not answer", &error);
                }
            }
        }
    }

    fn bar_moved(&mut self, bar: usize, _: Option<u64>, to: Option<u64>) {
        self.unmap(bar);
        if let Some(start) = to {
            self.map(bar, start);
        }
    }

    fn plugged(&mut self, intx_gsis: [u32; 4]) {
        let gsi = self.config.pin().and_then(|pin| {
            let index = usize::from(pin).checked_sub(1)?;
            intx_gsis.get(index).copied()
        });
        if let Some(Err(error)) = gsi.map(|gsi| self.interrupts.connect_pin(gsi)) {
            self.complain("a device's pin cannot be connected", &error);
        }
        self.update_interrupts();
    }
}

impl Drop for VfioPci {
    fn drop(&mut self) {
        self.interrupts.stop(self.device.as_ref());
        for bar in 0..BAR_COUNT {
            self.unmap(bar);
        }
        // Mappings keep the device open. It resets itself when it goes, as the last of all.
        self.pieces = [const { Vec::new() }; BAR_COUNT];
    }
}

//! A function that a guest drives: its regions, interrupts and reset, as VFIO gives them
//! (Linux, Documentation/driver-api/vfio.rst and include/uapi/linux/vfio.h).
//!
//! | module | concern |
//! | --- | --- |
//! | [`error`] | why there is no device, and what to do |
//! | [`mapping`] | device memory in this process |
//! | [`address_space`] | what the devices of a guest reach by DMA; opens devices |
//! | `kernel` | the device as the kernel gives it |
//! | `name` | how the kernel is told which device, and the token that proves the right to it |
//! | `sys` | the calls that vfio-ioctls does not have |
//!
//! [`PassthroughDevice`] is all that a VMM needs of a device, narrow enough to be played by a test.
//!
//! ```text
//!                 open: group viable, bound, reset        interrupts, BARs
//!   (in sysfs) ───────────────────────────────▶ opened ◀──────────────────▶ guest
//!       ▲                                         │ drop: interrupts off, reset, DMA unmapped
//!       └─────────────────────────────────────────┘
//! ```

pub mod address_space;
pub mod error;
mod kernel;
pub mod mapping;
mod name;
mod sys;

use std::io;
use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;

pub use address_space::{AddressSpace, Interface, assignable};
pub use error::Error;
pub use mapping::Mapping;
pub(crate) use name::DeviceName;

use crate::address::PciAddress;

/// A part of a function that is read, written or mapped (`VFIO_PCI_*_REGION_INDEX`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Region {
    /// What BAR 0 to 5 leads to.
    Bar(u8),
    /// The expansion ROM.
    Rom,
    /// Configuration space: 256 or 4096 bytes.
    Config,
}

impl Region {
    /// VFIO's number of the region.
    #[must_use]
    pub fn index(self) -> u32 {
        use vfio_bindings::bindings::vfio;
        match self {
            Self::Bar(bar) => vfio::VFIO_PCI_BAR0_REGION_INDEX + u32::from(bar),
            Self::Rom => vfio::VFIO_PCI_ROM_REGION_INDEX,
            Self::Config => vfio::VFIO_PCI_CONFIG_REGION_INDEX,
        }
    }
}

/// A part of a region, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Area {
    /// From the region's start.
    pub offset: u64,
    /// Length.
    pub size: u64,
}

/// What a region is like.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RegionInfo {
    /// Size in bytes; 0 if the function has no such region.
    pub size: u64,
    /// Where it can be mapped. The MSI-X table may be inside: the kernel lets it be mapped, a VMM must not.
    pub mappable: Vec<Area>,
}

/// A kind of event that a function signals (`VFIO_PCI_*_IRQ_INDEX`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Irq {
    /// The interrupt pin, level-triggered: the kernel masks it at each interrupt.
    Intx,
    /// MSI.
    Msi,
    /// MSI-X.
    Msix,
    /// The function reported an error that it cannot recover from.
    Error,
    /// The kernel wants the device back.
    Request,
}

impl Irq {
    /// VFIO's number of the kind.
    #[must_use]
    pub fn index(self) -> u32 {
        use vfio_bindings::bindings::vfio;
        match self {
            Self::Intx => vfio::VFIO_PCI_INTX_IRQ_INDEX,
            Self::Msi => vfio::VFIO_PCI_MSI_IRQ_INDEX,
            Self::Msix => vfio::VFIO_PCI_MSIX_IRQ_INDEX,
            Self::Error => vfio::VFIO_PCI_ERR_IRQ_INDEX,
            Self::Request => vfio::VFIO_PCI_REQ_IRQ_INDEX,
        }
    }
}

/// How a function was reset.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ResetBy {
    /// Function-level reset, or whatever else resets this function alone and completely.
    Function,
    /// A reset of its bus, on which nothing is that is not ours.
    Bus,
    /// From D3hot to D0, which may leave state behind.
    PowerManagement,
}

/// A function of the host in the hands of a guest.
pub trait PassthroughDevice: Send {
    /// Its address on the host.
    fn address(&self) -> PciAddress;

    /// What a region is like.
    fn region(&self, region: Region) -> RegionInfo;

    /// Reads a region. Accesses of 1, 2, 4 and 8 bytes reach the device in one piece where they are aligned.
    ///
    /// # Errors
    /// The kernel's, also if the access is not inside the region.
    fn read(&self, region: Region, offset: u64, data: &mut [u8]) -> io::Result<()>;

    /// Writes a region.
    ///
    /// # Errors
    /// As [`PassthroughDevice::read`].
    fn write(&self, region: Region, offset: u64, data: &[u8]) -> io::Result<()>;

    /// Maps a page-aligned area of a region into this process, in whole pages.
    ///
    /// # Errors
    /// The kernel's.
    fn map(&self, region: Region, area: Area) -> io::Result<Arc<Mapping>>;

    /// How many events of a kind there are.
    fn irq_count(&self, irq: Irq) -> u32;

    /// From now on the function signals `events`, one each from event 0 on. INTx, MSI and MSI-X exclude each other.
    ///
    /// # Errors
    /// [`Error::Irq`].
    fn enable_irq(&self, irq: Irq, events: &[&EventFd]) -> Result<(), Error>;

    /// Undoes [`PassthroughDevice::enable_irq`].
    ///
    /// # Errors
    /// [`Error::Irq`].
    fn disable_irq(&self, irq: Irq) -> Result<(), Error>;

    /// From now on a signal on `event` unmasks the interrupt pin.
    ///
    /// # Errors
    /// [`Error::Irq`].
    fn unmask_intx_by(&self, event: &EventFd) -> Result<(), Error>;

    /// Resets the function: by itself if it can be, else with its bus, else through power management.
    ///
    /// # Errors
    /// [`Error::Reset`] if none of them works.
    fn reset(&self) -> Result<ResetBy, Error>;
}

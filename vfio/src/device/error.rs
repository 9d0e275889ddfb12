//! Why a guest cannot have a device, and what to do about it.

use std::io;
use std::path::PathBuf;

use thiserror::Error;
use vfio_ioctls::VfioError;

use super::{Irq, Region};
use crate::address::PciAddress;
use crate::inventory::InventoryError;
use crate::viability::Obstacle;

/// A device cannot be opened or used.
#[derive(Debug, Error)]
pub enum Error {
    /// It is not there, or sysfs cannot be read.
    #[error(transparent)]
    Inventory(#[from] InventoryError),
    /// Something about it or its group forbids it.
    #[error("a guest cannot have {address}: it {}", list(obstacles))]
    Obstacles {
        /// The device.
        address: PciAddress,
        /// What forbids it.
        obstacles: Vec<Obstacle>,
    },
    /// A physical function in use by the host.
    #[error(
        "{address} is a physical function and driven by {driver}: make virtual functions with \
         `ringside-vfio create {address} NUMBER` and give the guest one of those"
    )]
    Physical {
        /// The device.
        address: PciAddress,
        /// Its driver.
        driver: String,
    },
    /// Another driver has it, or none.
    #[error(
        "{address} is {}: `ringside-vfio bind {address}` binds it to vfio-pci",
        driver.as_ref().map_or("bound to no driver".to_owned(), |d| format!("bound to {d}"))
    )]
    NotBound {
        /// The device.
        address: PciAddress,
        /// Its driver.
        driver: Option<String>,
    },
    /// The VFIO of the kernel cannot be used at all.
    #[error(
        "cannot open {}: {}",
        path.display(),
        if source.kind() == io::ErrorKind::PermissionDenied {
            "this user may not; let root give it to the user (chown, or a udev rule)"
        } else {
            "is the kernel's VFIO there (`modprobe vfio-pci`)?"
        }
    )]
    Vfio {
        /// What was to be opened.
        path: PathBuf,
        /// The kernel's reason.
        #[source]
        source: io::Error,
    },
    /// This user has no access to the device.
    #[error(
        "this user may not open {} of {address}: let root give it to the user (chown, or a udev rule)",
        path.display()
    )]
    Permission {
        /// The device.
        address: PciAddress,
        /// Its file.
        path: PathBuf,
    },
    /// Somebody else has it.
    #[error("{address} is in use: another process has its IOMMU group ({})", path.display())]
    InUse {
        /// The device.
        address: PciAddress,
        /// Its group's file.
        path: PathBuf,
    },
    /// Interrupts are not confined.
    #[error(
        "the IOMMU of this machine does not remap interrupts, so a guest could forge them: switch interrupt remapping on in \
         the firmware, or accept that with vfio_iommu_type1.allow_unsafe_interrupts=1"
    )]
    UnsafeInterrupts,
    /// The physical function is in VFIO's hands as well, and asks who comes.
    #[error(
        "{address} needs a token, because its physical function is bound to vfio-pci, too: give the one that was set \
         with `ringside-vfio create --vf-token` (vf-token=UUID)"
    )]
    Token {
        /// The device.
        address: PciAddress,
    },
    /// The same, where it cannot be given.
    #[error(
        "{address} needs a token, because its physical function is bound to vfio-pci, too, and only groups take one here: \
         give --vfio-interface group"
    )]
    TokenByGroup {
        /// The device.
        address: PciAddress,
    },
    /// A token where none is asked for.
    #[error("{address} takes no token: its physical function is not bound to vfio-pci")]
    NoToken {
        /// The device.
        address: PciAddress,
    },
    /// The device cannot be opened for another reason.
    #[error("cannot open {address} through VFIO")]
    Open {
        /// The device.
        address: PciAddress,
        /// vfio-ioctls' reason.
        #[source]
        source: VfioError,
    },
    /// The name of the device cannot be put down for the kernel.
    #[error("cannot create a directory for temporary files")]
    Name(#[source] io::Error),
    /// The guest's memory is more than may be locked.
    #[error(
        "cannot map {size} bytes of guest memory for DMA: all of it is locked in memory, and the limit of this process is \
         {limit} bytes (`ulimit -l`, LimitMEMLOCK= of systemd); raise it, or run with CAP_IPC_LOCK"
    )]
    LockedMemory {
        /// What was to be mapped.
        size: u64,
        /// The limit.
        limit: u64,
    },
    /// The container is full.
    #[error(
        "the kernel has no room for another DMA mapping (65535 by default): raise the parameter dma_entry_limit of the module \
         vfio_iommu_type1"
    )]
    Mappings,
    /// The guest's memory cannot be mapped for another reason.
    #[error("cannot map {size} bytes of guest memory for DMA at {address:#x}")]
    Map {
        /// Guest-physical address.
        address: u64,
        /// Length in bytes.
        size: u64,
        /// vfio-ioctls' reason.
        #[source]
        source: VfioError,
    },
    /// A region cannot be used.
    #[error("cannot map {region:?} of {address}")]
    Region {
        /// The device.
        address: PciAddress,
        /// Which region.
        region: Region,
        /// The kernel's reason.
        #[source]
        source: io::Error,
    },
    /// Interrupts cannot be switched.
    #[error("the kernel does not switch {irq:?} interrupts of {address}")]
    Irq {
        /// The device.
        address: PciAddress,
        /// Which.
        irq: Irq,
        /// The kernel's reason.
        #[source]
        source: io::Error,
    },
    /// No reset works.
    #[error("{address} cannot be reset, so it would bring the last guest's state to the next one")]
    Reset {
        /// The device.
        address: PciAddress,
        /// Why the last method tried does not work.
        #[source]
        source: io::Error,
    },
}

fn list(obstacles: &[Obstacle]) -> String {
    let texts: Vec<String> = obstacles.iter().map(ToString::to_string).collect();
    texts.join("; it ")
}

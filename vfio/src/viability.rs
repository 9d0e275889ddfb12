//! Whether a guest can be given a function, and what stands in the way.
//!
//! The kernel hands out an IOMMU group as a whole (Linux, Documentation/driver-api/vfio.rst): as long as
//! any function in it is driven by a host driver that does DMA, none of them can be assigned.

use std::fmt;

use serde::Serialize;

use crate::address::PciAddress;
use crate::inventory::{Inventory, PciDevice, Role};

/// Base class and subclass of bridges, in a class code (PCI Code and ID Assignment, 1.7).
const BASE_CLASS_BRIDGE: u8 = 0x06;

/// Something that keeps a function from being assigned.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "code", rename_all = "kebab-case")]
pub enum Obstacle {
    /// The function is a bridge.
    Bridge,
    /// No IOMMU translates its DMA.
    NoIommu,
    /// VFIO's no-IOMMU mode is on for it: its DMA is not confined.
    Unconfined,
    /// Its virtual functions are enabled.
    VfsEnabled {
        /// How many.
        count: u16,
    },
    /// A function of the same group is driven by the host.
    GroupMember {
        /// That function.
        member: PciAddress,
        /// Its driver.
        driver: String,
    },
}

impl fmt::Display for Obstacle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Bridge => write!(f, "is a bridge"),
            Self::NoIommu => write!(
                f,
                "has no IOMMU group: switch the IOMMU on in the firmware, and on Intel machines on the kernel's command line too (intel_iommu=on)"
            ),
            Self::Unconfined => {
                write!(
                    f,
                    "is in no-IOMMU mode, in which its DMA reaches all of the host's memory"
                )
            }
            Self::VfsEnabled { count } => {
                write!(
                    f,
                    "has {count} virtual functions enabled: assign those, or disable them"
                )
            }
            Self::GroupMember { member, driver } => {
                write!(
                    f,
                    "shares its IOMMU group with {member}, driven by {driver}: bind that to vfio-pci or to no driver"
                )
            }
        }
    }
}

/// Whether a function can be assigned.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Viability {
    /// Nothing stands in the way.
    pub viable: bool,
    /// It is bound to a VFIO driver already; else it has to be bound to vfio-pci first.
    pub bound: bool,
    /// What stands in the way.
    pub obstacles: Vec<Obstacle>,
}

/// Drivers that hand a device to user space through VFIO: vfio-pci and its variants for one device.
pub(crate) fn is_vfio(driver: &str) -> bool {
    driver == "vfio-pci" || driver.ends_with("-vfio-pci") || driver.ends_with("_vfio_pci")
}

pub(crate) fn is_bridge(device: &PciDevice) -> bool {
    let [_, base, ..] = device.class.to_be_bytes();
    base == BASE_CLASS_BRIDGE
}

/// Whether the kernel lets a group be assigned in spite of this driver: it does no DMA of its own.
fn is_harmless(driver: &str) -> bool {
    is_vfio(driver) || matches!(driver, "pci-stub" | "pcieport" | "shpchp")
}

/// Judges one function of the inventory.
#[must_use]
pub fn judge(device: &PciDevice, inventory: &Inventory) -> Viability {
    let mut obstacles = Vec::new();
    if is_bridge(device) {
        obstacles.push(Obstacle::Bridge);
    }
    let bound = device.driver.as_deref().is_some_and(is_vfio);
    match device.role {
        // Taking its driver away takes the virtual functions away from whoever uses them. Where the
        // driver is VFIO's already, they are under its token.
        Role::Pf {
            vfs_enabled: count, ..
        } if count > 0 && !bound => {
            obstacles.push(Obstacle::VfsEnabled { count });
        }
        _ => {}
    }
    match &device.iommu_group {
        None => obstacles.push(Obstacle::NoIommu),
        Some(group) if group.no_iommu => obstacles.push(Obstacle::Unconfined),
        Some(group) => {
            let others = group
                .members
                .iter()
                .filter(|member| **member != device.address);
            for other in others.filter_map(|member| inventory.get(*member)) {
                match &other.driver {
                    Some(driver) if !is_harmless(driver) => {
                        let (member, driver) = (other.address, driver.clone());
                        obstacles.push(Obstacle::GroupMember { member, driver });
                    }
                    _ => {}
                }
            }
        }
    }
    Viability {
        viable: obstacles.is_empty(),
        bound,
        obstacles,
    }
}

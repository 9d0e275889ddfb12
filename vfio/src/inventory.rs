//! The host's PCI functions as sysfs shows them (Linux, Documentation/ABI/testing/sysfs-bus-pci).

use std::collections::BTreeMap;

use serde::{Serialize, Serializer};
use thiserror::Error;

use crate::address::PciAddress;
use crate::host::{Host, HostError};
use crate::ids::PciIds;

/// Where sysfs lists all PCI functions.
pub(crate) const DEVICES: &str = "sys/bus/pci/devices";
/// Where sysfs lists all IOMMU groups.
const GROUPS: &str = "sys/kernel/iommu_groups";

/// The host's PCI functions could not be listed.
#[derive(Debug, Error)]
pub enum InventoryError {
    /// There is no PCI bus in sysfs.
    #[error("{path} does not exist; is sysfs mounted, and has this machine PCI?")]
    NoPci {
        /// Where it was looked for.
        path: String,
    },
    /// No such function.
    #[error("there is no PCI device {0}; `ringside-vfio list --all` shows all")]
    NoDevice(PciAddress),
    /// A file could not be read.
    #[error("the PCI devices cannot be read")]
    Host(#[from] HostError),
}

/// What a function is to SR-IOV.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "kind", rename_all = "lowercase")]
pub enum Role {
    /// A physical function that can have virtual ones.
    Pf {
        /// How many it can have.
        vfs_total: u16,
        /// How many are enabled.
        vfs_enabled: u16,
        /// Those enabled, in order.
        vfs: Vec<PciAddress>,
    },
    /// A virtual function.
    Vf {
        /// Its physical function.
        pf: PciAddress,
        /// Its number among the physical function's virtual ones, if that lists it.
        index: Option<u16>,
    },
    /// Neither.
    Other,
}

/// How a function can be reset.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Reset {
    /// It can be reset at all.
    pub possible: bool,
    /// By which methods, in the order in which the kernel tries them. Empty when it cannot be reset, or
    /// when the kernel is too old to tell (before 5.15).
    pub methods: Vec<String>,
}

/// An IOMMU group: the smallest set of functions that the IOMMU can tell from all others.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Group {
    /// Its number.
    pub id: u32,
    /// The kernel's domain type for it, such as `DMA-FQ` or `identity`.
    #[serde(rename = "type")]
    pub domain: Option<String>,
    /// It stands for no isolation at all: VFIO's no-IOMMU mode.
    pub no_iommu: bool,
    /// The functions in it, in order, this one included.
    pub members: Vec<PciAddress>,
}

impl Group {
    /// The name of its file in `/dev/vfio`.
    #[must_use]
    pub fn file_name(&self) -> String {
        let prefix = if self.no_iommu { "noiommu-" } else { "" };
        format!("{prefix}{}", self.id)
    }
}

/// One PCI function.
#[derive(Debug, Clone, Serialize)]
pub struct PciDevice {
    /// Where it is.
    pub address: PciAddress,
    /// What it is to SR-IOV.
    #[serde(flatten)]
    pub role: Role,
    /// Vendor id.
    #[serde(serialize_with = "id")]
    pub vendor: u16,
    /// Device id.
    #[serde(serialize_with = "id")]
    pub device: u16,
    /// Subsystem's vendor id.
    #[serde(serialize_with = "id")]
    pub subsystem_vendor: u16,
    /// Subsystem's device id.
    #[serde(serialize_with = "id")]
    pub subsystem_device: u16,
    /// Class code: base class, subclass, programming interface.
    #[serde(serialize_with = "class")]
    pub class: u32,
    /// Vendor's name, if known.
    pub vendor_name: Option<String>,
    /// Device's name, if known.
    pub device_name: Option<String>,
    /// Class's name, if known.
    pub class_name: Option<String>,
    /// The driver bound to it.
    pub driver: Option<String>,
    /// The only driver that may bind to it.
    pub driver_override: Option<String>,
    /// The NUMA node it is near to, if the machine says so.
    pub numa_node: Option<u16>,
    /// Its IOMMU group. None when there is no IOMMU for it.
    pub iommu_group: Option<Group>,
    /// How it can be reset.
    pub reset: Reset,
    /// Network interfaces it carries.
    pub interfaces: Vec<String>,
}

/// Ids are known by their hexadecimal digits.
fn id<S: Serializer>(id: &u16, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(&format_args!("{id:#06x}"))
}

fn class<S: Serializer>(class: &u32, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(&format_args!("{class:#08x}"))
}

/// All PCI functions of the host, by address.
#[derive(Debug)]
pub struct Inventory {
    devices: BTreeMap<PciAddress, PciDevice>,
}

impl Inventory {
    /// Reads all functions. Those that vanish meanwhile are left out.
    ///
    /// # Errors
    /// [`InventoryError::NoPci`] if the host has no PCI, [`InventoryError::Host`] if sysfs cannot be read
    /// or holds what the kernel does not document.
    pub fn read(host: &Host, ids: &PciIds) -> Result<Self, InventoryError> {
        let Some(names) = host.names(DEVICES)? else {
            return Err(InventoryError::NoPci {
                path: host.path(DEVICES).display().to_string(),
            });
        };
        let mut devices = BTreeMap::new();
        for name in names {
            let address = address(host, DEVICES, &name)?;
            if let Some(device) = read_device(host, ids, address)? {
                devices.insert(address, device);
            }
        }
        number_vfs(&mut devices);
        Ok(Self { devices })
    }

    /// All functions, by address.
    pub fn devices(&self) -> impl Iterator<Item = &PciDevice> {
        self.devices.values()
    }

    /// One function.
    ///
    /// # Errors
    /// [`InventoryError::NoDevice`] if there is none at this address.
    pub fn device(&self, address: PciAddress) -> Result<&PciDevice, InventoryError> {
        self.devices
            .get(&address)
            .ok_or(InventoryError::NoDevice(address))
    }

    /// One function, if there is one at this address.
    #[must_use]
    pub fn get(&self, address: PciAddress) -> Option<&PciDevice> {
        self.devices.get(&address)
    }
}

/// An address that sysfs gives as a name.
fn address(host: &Host, place: &str, name: &str) -> Result<PciAddress, HostError> {
    name.parse()
        .map_err(|_| host.wrong(place, name.to_owned(), "a PCI address"))
}

/// The functions whose addresses are names in a directory.
fn addresses(host: &Host, place: &str, names: &[String]) -> Result<Vec<PciAddress>, HostError> {
    let mut list = names
        .iter()
        .map(|name| address(host, place, name))
        .collect::<Result<Vec<_>, _>>()?;
    list.sort();
    Ok(list)
}

/// `None` if the function is no longer there.
fn read_device(
    host: &Host,
    ids: &PciIds,
    address: PciAddress,
) -> Result<Option<PciDevice>, HostError> {
    let file = |name: &str| format!("{DEVICES}/{address}/{name}");
    let id = |name| host.number::<u16>(file(name), "a 16-bit id");
    // Every function has these three.
    let (Some(vendor), Some(device), Some(class)) = (
        id("vendor")?,
        id("device")?,
        host.number::<u32>(file("class"), "a class code")?,
    ) else {
        return Ok(None);
    };
    // -1 stands for none.
    let numa_node = host
        .number::<i32>(file("numa_node"), "a node number")?
        .and_then(|node| u16::try_from(node).ok());
    Ok(Some(PciDevice {
        address,
        role: read_role(host, address)?,
        vendor,
        device,
        subsystem_vendor: id("subsystem_vendor")?.unwrap_or(0),
        subsystem_device: id("subsystem_device")?.unwrap_or(0),
        class,
        vendor_name: ids.vendor(vendor).map(str::to_owned),
        device_name: ids.device(vendor, device).map(str::to_owned),
        class_name: ids.class(class).map(str::to_owned),
        driver: host.link(file("driver"))?,
        driver_override: read_override(host, address)?,
        numa_node,
        iommu_group: read_group(host, address)?,
        reset: read_reset(host, address)?,
        interfaces: host.names(file("net"))?.unwrap_or_default(),
    }))
}

pub(crate) fn read_override(host: &Host, device: PciAddress) -> Result<Option<String>, HostError> {
    let name = host.text(format!("{DEVICES}/{device}/driver_override"))?;
    Ok(name.filter(|name| !name.is_empty() && name != "(null)"))
}

fn read_role(host: &Host, device: PciAddress) -> Result<Role, HostError> {
    let file = |name: &str| format!("{DEVICES}/{device}/{name}");
    if let Some(pf) = host.link(file("physfn"))? {
        return Ok(Role::Vf {
            pf: address(host, &file("physfn"), &pf)?,
            index: None,
        });
    }
    let vfs = |name| host.number::<u16>(file(name), "a number of virtual functions");
    match vfs("sriov_totalvfs")? {
        Some(vfs_total) if vfs_total > 0 => {
            let vfs_enabled = vfs("sriov_numvfs")?.unwrap_or(0);
            let mut list = Vec::with_capacity(usize::from(vfs_enabled));
            for index in 0..vfs_enabled {
                let link = file(&format!("virtfn{index}"));
                if let Some(vf) = host.link(&link)? {
                    list.push(address(host, &link, &vf)?);
                }
            }
            Ok(Role::Pf {
                vfs_total,
                vfs_enabled,
                vfs: list,
            })
        }
        _ => Ok(Role::Other),
    }
}

/// Gives each virtual function its number, which only its physical function knows.
fn number_vfs(devices: &mut BTreeMap<PciAddress, PciDevice>) {
    let mut numbers = BTreeMap::new();
    for device in devices.values() {
        if let Role::Pf { vfs, .. } = &device.role {
            numbers.extend(vfs.iter().copied().zip(0_u16..));
        }
    }
    for device in devices.values_mut() {
        if let Role::Vf { index, .. } = &mut device.role {
            *index = numbers.get(&device.address).copied();
        }
    }
}

fn read_group(host: &Host, device: PciAddress) -> Result<Option<Group>, HostError> {
    let link = format!("{DEVICES}/{device}/iommu_group");
    let Some(name) = host.link(&link)? else {
        return Ok(None);
    };
    let id = name
        .parse()
        .map_err(|_| host.wrong(&link, name, "the number of an IOMMU group"))?;
    let file = |name: &str| format!("{GROUPS}/{id}/{name}");
    let names = host.names(file("devices"))?.unwrap_or_default();
    // A group can hold devices that are not PCI (platform devices): they have no PCI address.
    let names: Vec<_> = names
        .into_iter()
        .filter(|name| name.parse::<PciAddress>().is_ok())
        .collect();
    Ok(Some(Group {
        id,
        domain: host.text(file("type"))?,
        no_iommu: host.text(file("name"))?.as_deref() == Some("vfio-noiommu"),
        members: addresses(host, &file("devices"), &names)?,
    }))
}

fn read_reset(host: &Host, device: PciAddress) -> Result<Reset, HostError> {
    let file = |name: &str| format!("{DEVICES}/{device}/{name}");
    let methods: Vec<_> = host
        .text(file("reset_method"))?
        .map(|list| list.split_whitespace().map(str::to_owned).collect())
        .unwrap_or_default();
    Ok(Reset {
        possible: !methods.is_empty() || host.has(file("reset")),
        methods,
    })
}

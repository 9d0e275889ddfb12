//! Gives devices to a driver, such as vfio-pci, and puts them back.
//!
//! A device changes hands in steps: `driver_override` names the driver that may have it, the old driver lets go of
//! it, the kernel looks for a driver again. Each step leaves a state from which `arrange` gets to any other,
//! so undoing, and mending what a killed run left, is arranging again. What a device is to be put back to is
//! in its [record](crate::state::Record) before the first step.

use std::io::{self, Write};

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::address::PciAddress;
use crate::host::{Host, HostError};
use crate::ids::PciIds;
use crate::inventory::{self, DEVICES, Inventory, InventoryError, PciDevice, Role};
use crate::occupancy::{Occupancy, Use, Users, users};
use crate::state::{Records, StateError};
use crate::viability::{is_bridge, is_vfio};

/// Where sysfs lists the drivers of PCI functions.
const DRIVERS: &str = "sys/bus/pci/drivers";
/// Looks for a driver for the function that is written to it.
const PROBE: &str = "sys/bus/pci/drivers_probe";
/// Lets vfio-pci take devices without an IOMMU.
const NO_IOMMU_MODE: &str = "sys/module/vfio/parameters/enable_unsafe_noiommu_mode";

/// A device could not be given to a driver, or put back.
#[derive(Debug, Error)]
pub enum BindError {
    /// The devices could not be listed, or it is not there.
    #[error(transparent)]
    Inventory(#[from] InventoryError),
    /// The records could not be read or written.
    #[error(transparent)]
    State(#[from] StateError),
    /// A file could not be read or written.
    #[error(transparent)]
    Host(#[from] HostError),
    /// The device is a bridge.
    #[error("{0} is a bridge: bind the devices behind it")]
    Bridge(PciAddress),
    /// Its virtual functions are enabled.
    #[error(
        "{address} has {count} virtual functions enabled, which would go with its driver: \
         run `ringside-vfio destroy {address}` first"
    )]
    VfsEnabled {
        /// The physical function.
        address: PciAddress,
        /// How many.
        count: u16,
    },
    /// No IOMMU translates its DMA, so vfio-pci would not have it.
    #[error(
        "{0} has no IOMMU group: switch the IOMMU on in the firmware, and on Intel machines on the kernel's command line too (intel_iommu=on)"
    )]
    NoIommu(PciAddress),
    /// The host needs it, or another device of its group.
    #[error("{}; --force goes on anyway", needed(*address, *member, what))]
    Needed {
        /// The device.
        address: PciAddress,
        /// Which device of its group it is about, or the device itself.
        member: PciAddress,
        /// What for.
        what: Use,
    },
    /// A process uses it.
    #[error(
        "{address} is in use by process {}: end that first{advice}",
        pids(users)
    )]
    InUse {
        /// The device.
        address: PciAddress,
        /// Which processes.
        users: Users,
        /// How to go on in spite of it.
        advice: &'static str,
    },
    /// There is no such driver.
    #[error("there is no driver {driver}, and loading a module of this name failed")]
    NoDriver {
        /// Its name.
        driver: String,
        /// What modprobe said.
        #[source]
        source: io::Error,
    },
    /// The module was loaded, but the driver is not there.
    #[error("the module {0} is loaded, but there is no driver of this name for PCI devices")]
    NotADriver(String),
    /// The driver did not take the device.
    #[error(
        "{driver} did not take {address}{}; the kernel's log says why (dmesg)",
        got.as_ref().map_or_else(String::new, |got| format!(", which {got} has now"))
    )]
    Refused {
        /// The device.
        address: PciAddress,
        /// The driver.
        driver: String,
        /// The driver that has it instead.
        got: Option<String>,
    },
}

fn needed(address: PciAddress, member: PciAddress, what: &Use) -> String {
    if address == member {
        format!("{address} carries {what}")
    } else {
        format!("{address} shares its IOMMU group with {member}, which carries {what}")
    }
}

fn pids(users: &Users) -> String {
    let pids: Vec<_> = users.pids.iter().map(ToString::to_string).collect();
    pids.join(", ")
}

/// Who has a device, and who may have it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Binding {
    /// The driver bound to it.
    pub driver: Option<String>,
    /// The only driver that may bind to it.
    pub driver_override: Option<String>,
}

impl Binding {
    /// Bound to a driver, and to be bound to no other.
    #[must_use]
    pub fn to(driver: &str) -> Self {
        Self {
            driver: Some(driver.to_owned()),
            driver_override: Some(driver.to_owned()),
        }
    }

    /// Reads who has a device now.
    ///
    /// # Errors
    /// [`HostError`] if sysfs cannot be read.
    pub fn read(host: &Host, address: PciAddress) -> Result<Self, HostError> {
        Ok(Self {
            driver: host.link(format!("{DEVICES}/{address}/driver"))?,
            driver_override: inventory::read_override(host, address)?,
        })
    }
}

/// What became of one device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Outcome {
    /// The device.
    pub address: PciAddress,
    /// Its IOMMU group.
    pub group: Option<u32>,
    /// The driver that has it now.
    pub driver: Option<String>,
    /// Something was changed.
    pub changed: bool,
}

impl Outcome {
    pub(crate) fn read(host: &Host, address: PciAddress, changed: bool) -> Result<Self, HostError> {
        let group = host.link(format!("{DEVICES}/{address}/iommu_group"))?;
        Ok(Self {
            address,
            group: group.and_then(|group| group.parse().ok()),
            driver: Binding::read(host, address)?.driver,
            changed,
        })
    }
}

fn set_override(host: &Host, address: PciAddress, driver: Option<&str>) -> Result<(), HostError> {
    if inventory::read_override(host, address)?.as_deref() == driver {
        return Ok(());
    }
    // A line end alone clears it (Linux, Documentation/ABI/testing/sysfs-bus-pci).
    let text = format!("{}\n", driver.unwrap_or_default());
    host.write(format!("{DEVICES}/{address}/driver_override"), &text)
}

/// Lets the kernel look for a driver for a device that has none.
pub(crate) fn probe(host: &Host, address: PciAddress) -> Result<(), HostError> {
    host.write(PROBE, &address.to_string())
}

/// Brings a device into the hands of whom `wanted` says.
///
/// # Errors
/// [`BindError`] if the kernel or the driver refuses; the device may be without a driver then.
pub(crate) fn arrange(host: &Host, address: PciAddress, wanted: &Binding) -> Result<(), BindError> {
    let now = Binding::read(host, address)?;
    if now.driver != wanted.driver {
        // The driver is named even where it is not to stay the only one: so no other can be quicker, and a
        // virtual function is probed although sriov_drivers_autoprobe is off (since Linux 5.3).
        let first = wanted.driver.as_ref().or(wanted.driver_override.as_ref());
        set_override(host, address, first.map(String::as_str))?;
        if now.driver.is_some() {
            host.write(
                format!("{DEVICES}/{address}/driver/unbind"),
                &address.to_string(),
            )?;
        }
        if let Some(driver) = &wanted.driver {
            probe(host, address)?;
            // The kernel tells whoever writes nothing about a driver that refuses.
            let got = Binding::read(host, address)?.driver;
            if got.as_ref() != Some(driver) {
                return Err(BindError::Refused {
                    address,
                    driver: driver.clone(),
                    got,
                });
            }
        }
    }
    Ok(set_override(
        host,
        address,
        wanted.driver_override.as_deref(),
    )?)
}

/// Makes sure that a driver is there: loads the module of its name if it is not.
///
/// # Errors
/// [`BindError::NoDriver`] or [`BindError::NotADriver`] if it is not.
pub(crate) fn require_driver(host: &Host, driver: &str) -> Result<(), BindError> {
    if host.has(format!("{DRIVERS}/{driver}")) {
        return Ok(());
    }
    host.load_module(driver)
        .map_err(|source| BindError::NoDriver {
            driver: driver.to_owned(),
            source,
        })?;
    if host.has(format!("{DRIVERS}/{driver}")) {
        Ok(())
    } else {
        Err(BindError::NotADriver(driver.to_owned()))
    }
}

/// Makes sure that an IOMMU translates a device's DMA, if that is what the driver wants.
///
/// # Errors
/// [`BindError::NoIommu`] if none does.
pub(crate) fn require_iommu(
    host: &Host,
    device: &PciDevice,
    driver: &str,
) -> Result<(), BindError> {
    let needed = is_vfio(driver) && device.iommu_group.is_none();
    if needed && host.text(NO_IOMMU_MODE)?.as_deref() != Some("Y") {
        return Err(BindError::NoIommu(device.address));
    }
    Ok(())
}

/// The other devices of a device's IOMMU group that can be given away with it. The host keeps the bridges.
pub(crate) fn others_of(
    device: &PciDevice,
    inventory: &Inventory,
) -> impl Iterator<Item = PciAddress> {
    let members = device.iommu_group.iter().flat_map(|group| &group.members);
    members
        .copied()
        .filter(|member| *member != device.address)
        .filter(|member| !inventory.get(*member).is_some_and(is_bridge))
}

/// Looks for what the host needs a device, or others that go with it, for.
pub(crate) fn guard(
    address: PciAddress,
    others: impl IntoIterator<Item = PciAddress>,
    occupancy: &Occupancy,
) -> Result<(), BindError> {
    for member in [address].into_iter().chain(others) {
        if let Some(what) = occupancy.of(member).next() {
            return Err(BindError::Needed {
                address,
                member,
                what: what.clone(),
            });
        }
    }
    Ok(())
}

/// Looks for processes that use a device.
pub(crate) fn guard_users(
    host: &Host,
    device: &PciDevice,
    advice: &'static str,
) -> Result<(), BindError> {
    let users = users(host, device)?;
    if users.pids.is_empty() {
        return Ok(());
    }
    Err(BindError::InUse {
        address: device.address,
        users,
        advice,
    })
}

pub(crate) const FORCE_ADVICE: &str = ", or use --force, which waits until it lets go";

fn refuse_virtual_functions(device: &PciDevice) -> Result<(), BindError> {
    match device.role {
        Role::Pf {
            vfs_enabled: count, ..
        } if count > 0 => Err(BindError::VfsEnabled {
            address: device.address,
            count,
        }),
        _ => Ok(()),
    }
}

/// The physical function of a virtual one.
pub(crate) fn pf_of(device: &PciDevice) -> Option<PciAddress> {
    match device.role {
        Role::Vf { pf, .. } => Some(pf),
        _ => None,
    }
}

/// Changes of a run, so that they can be undone.
pub(crate) struct Changes<'a> {
    host: &'a Host,
    /// Who had the devices, in the order in which they were changed.
    before: Vec<(PciAddress, Binding)>,
}

impl<'a> Changes<'a> {
    pub(crate) fn new(host: &'a Host) -> Self {
        Self {
            host,
            before: Vec::new(),
        }
    }

    /// Remembers who has a device, before it is changed.
    pub(crate) fn note(&mut self, address: PciAddress) -> Result<Binding, HostError> {
        let binding = Binding::read(self.host, address)?;
        self.before.push((address, binding.clone()));
        Ok(binding)
    }

    /// Undoes everything, last change first. Gives the devices that are as they were, and says about the
    /// others what to do.
    pub(crate) fn undo(self, remarks: &mut dyn Write) -> Vec<PciAddress> {
        let mut undone = Vec::new();
        for (address, binding) in self.before.into_iter().rev() {
            match arrange(self.host, address, &binding) {
                Ok(()) => undone.push(address),
                // A remark that nobody can read does not stop the rest.
                Err(error) => drop(writeln!(
                    remarks,
                    "ringside-vfio: {address} could not be put back, run `ringside-vfio unbind {address}`: {error}"
                )),
            }
        }
        undone
    }
}

/// Removes doubles, and keeps the order.
fn distinct(addresses: &[PciAddress]) -> Vec<PciAddress> {
    let mut list = Vec::with_capacity(addresses.len());
    for address in addresses {
        if !list.contains(address) {
            list.push(*address);
        }
    }
    list
}

/// Gives devices to a driver: all of them or, if that fails, none.
///
/// A device that the driver has already stays as it is. With `force`, devices go that the host needs or that a
/// process uses; a process that uses one through VFIO is waited for.
///
/// # Errors
/// [`BindError`], if one is refused before the first change, or fails.
pub fn bind(
    host: &Host,
    addresses: &[PciAddress],
    driver: &str,
    force: bool,
    remarks: &mut dyn Write,
) -> Result<Vec<Outcome>, BindError> {
    let records = Records::open(host, remarks)?;
    let inventory = Inventory::read(host, &PciIds::default())?;
    let occupancy = Occupancy::read(host)?;
    let wanted = Binding::to(driver);
    let addresses = distinct(addresses);
    let mut open = Vec::new();
    for address in &addresses {
        let device = inventory.device(*address)?;
        if is_bridge(device) {
            return Err(BindError::Bridge(*address));
        }
        let now = Binding::read(host, *address)?;
        if now.driver == wanted.driver {
            // Who bound it without leaving a record knows how to put it back; else a run was killed.
            if now != wanted && records.get(*address)?.is_some_and(|r| r.binding.is_some()) {
                open.push(device);
            }
            continue;
        }
        refuse_virtual_functions(device)?;
        require_iommu(host, device, driver)?;
        if !force {
            guard(*address, others_of(device, &inventory), &occupancy)?;
            guard_users(host, device, FORCE_ADVICE)?;
        }
        open.push(device);
    }
    if !open.is_empty() {
        require_driver(host, driver)?;
    }
    let mut changes = Changes::new(host);
    let mut recorded = Vec::new();
    let result = open.iter().try_for_each(|device| {
        let address = device.address;
        // A record that is there tells of whoever had it before the first of several changes.
        let known = records.get(address)?;
        if known.is_none_or(|record| record.binding.is_none()) {
            let before = Binding::read(host, address)?;
            recorded.push(address);
            records.change(address, pf_of(device), |record| {
                record.binding = Some(before);
            })?;
        }
        changes.note(address)?;
        arrange(host, address, &wanted)
    });
    if let Err(error) = result {
        let undone = changes.undo(remarks);
        for address in recorded.iter().filter(|address| undone.contains(address)) {
            records.change(*address, None, |record| record.binding = None)?;
        }
        return Err(error);
    }
    let changed = |address: &PciAddress| open.iter().any(|device| device.address == *address);
    addresses
        .iter()
        .map(|address| Ok(Outcome::read(host, *address, changed(address))?))
        .collect()
}

/// Puts devices back to who had them before they were bound: all of them or, if that fails, none.
///
/// A device that a VFIO driver has without a record of who had it before goes to whichever driver of the host
/// takes it. One that no VFIO driver has stays as it is.
///
/// # Errors
/// [`BindError`], if one is refused before the first change, or fails.
pub fn unbind(
    host: &Host,
    addresses: &[PciAddress],
    remarks: &mut dyn Write,
) -> Result<Vec<Outcome>, BindError> {
    let records = Records::open(host, remarks)?;
    let inventory = Inventory::read(host, &PciIds::default())?;
    let addresses = distinct(addresses);
    let mut open = Vec::new();
    for address in &addresses {
        let device = inventory.device(*address)?;
        let record = records.get(*address)?.and_then(|record| record.binding);
        let now = Binding::read(host, *address)?;
        let ours = |name: &Option<String>| name.as_deref().is_some_and(is_vfio);
        if record.is_none() && !ours(&now.driver) && !ours(&now.driver_override) {
            continue;
        }
        refuse_virtual_functions(device)?;
        guard_users(host, device, "")?;
        open.push((device, record));
    }
    let mut changes = Changes::new(host);
    let result = open.iter().try_for_each(|(device, record)| {
        changes.note(device.address)?;
        put_back(host, device, record.as_ref(), remarks)
    });
    if let Err(error) = result {
        changes.undo(remarks);
        return Err(error);
    }
    for (device, _) in &open {
        records.change(device.address, None, |record| record.binding = None)?;
    }
    let changed = |address: &PciAddress| open.iter().any(|(device, _)| device.address == *address);
    addresses
        .iter()
        .map(|address| Ok(Outcome::read(host, *address, changed(address))?))
        .collect()
}

/// Puts one device back to who had it, as far as that is known and there.
fn put_back(
    host: &Host,
    device: &PciDevice,
    record: Option<&Binding>,
    remarks: &mut dyn Write,
) -> Result<(), BindError> {
    let address = device.address;
    let mut remark = |text: String| {
        // A remark that nobody can read is no reason to stop.
        let _ = writeln!(remarks, "ringside-vfio: {address}: {text}");
    };
    if let Some(former) = record {
        let there = match &former.driver {
            Some(driver) => require_driver(host, driver),
            None => Ok(()),
        };
        match there {
            Ok(()) => return arrange(host, address, former),
            Err(error) => remark(format!(
                "its former driver is gone ({error}); another of the host may have it"
            )),
        }
    } else {
        remark("who had it before is not recorded; the host's own driver may have it".to_owned());
    }
    arrange(host, address, &Binding::default())?;
    Ok(probe(host, address)?)
}

//! Makes and removes the virtual functions of a physical one.
//!
//! The order keeps the host's drivers off: `sriov_drivers_autoprobe` is switched off, `sriov_numvfs` makes the
//! functions, each is given to its driver, and `sriov_drivers_autoprobe` gets its former value back. That
//! value is in the physical function's [record](crate::state::Record) meanwhile. What fails is undone in
//! reverse order; what a killed run left, the next `create` or `destroy` completes.

use std::io::Write;
use std::str::FromStr;

use nix::errno::Errno;
use serde::Serialize;
use thiserror::Error;
use uuid::Uuid;

use crate::address::PciAddress;
use crate::binding::{
    BindError, Binding, Changes, FORCE_ADVICE, Outcome, arrange, guard, guard_users, others_of,
    probe, require_driver, require_iommu,
};
use crate::host::{Host, HostError};
use crate::ids::PciIds;
use crate::inventory::{DEVICES, Inventory, InventoryError, PciDevice, Role};
use crate::occupancy::Occupancy;
use crate::state::{Records, StateError};
use crate::token::TokenError;
use crate::viability::is_vfio;

/// Lets vfio-pci's physical functions have virtual ones.
const ENABLE_SRIOV: &str = "sys/module/vfio_pci/parameters/enable_sriov";

/// Virtual functions could not be made or removed.
#[derive(Debug, Error)]
pub enum FunctionsError {
    /// It is a virtual function itself.
    #[error("{address} is a virtual function; name its physical function {pf}")]
    IsVf {
        /// The device.
        address: PciAddress,
        /// Its physical function.
        pf: PciAddress,
    },
    /// It has no SR-IOV.
    #[error(
        "{0} has no SR-IOV capability, or it is switched off in the device's or the machine's firmware; \
         `ringside-vfio list` shows the devices that have it"
    )]
    NotPf(PciAddress),
    /// Nothing could make or remove its virtual functions.
    #[error(
        "{0} has no driver, and its virtual functions are made and removed by its driver: bind one first"
    )]
    NoDriver(PciAddress),
    /// It cannot have so many.
    #[error("{address} can have {total} virtual functions, not {wanted}")]
    TooMany {
        /// The physical function.
        address: PciAddress,
        /// How many it can have.
        total: u16,
        /// How many were asked for.
        wanted: u16,
    },
    /// It has another number of them.
    #[error(
        "{address} has {enabled} virtual functions, and the number cannot change while there are any: \
         run `ringside-vfio destroy {address}` first"
    )]
    Different {
        /// The physical function.
        address: PciAddress,
        /// How many it has.
        enabled: u16,
    },
    /// The driver refused.
    #[error(
        "{driver} did not change the number of virtual functions of {address} to {count}: {reason}"
    )]
    Number {
        /// The physical function.
        address: PciAddress,
        /// Its driver.
        driver: String,
        /// How many were asked for.
        count: u16,
        /// What that means.
        reason: &'static str,
        /// What the kernel said.
        #[source]
        source: HostError,
    },
    /// The driver made fewer.
    #[error(
        "{address} has {made} virtual functions after its driver was asked for {wanted}; the kernel's log says why (dmesg)"
    )]
    Short {
        /// The physical function.
        address: PciAddress,
        /// How many there are.
        made: usize,
        /// How many were asked for.
        wanted: u16,
    },
    /// vfio-pci is not to make virtual functions.
    #[error(
        "{0} is bound to vfio-pci, which makes virtual functions only with its parameter enable_sriov: \
         write Y to /sys/module/vfio_pci/parameters/enable_sriov, or load it with enable_sriov=1"
    )]
    SriovOff(PciAddress),
    /// A VF token means something for vfio-pci only.
    #[error(
        "{address} is bound to {driver}: a VF token belongs to a physical function that vfio-pci drives"
    )]
    TokenWithoutVfio {
        /// The physical function.
        address: PciAddress,
        /// Its driver.
        driver: String,
    },
    /// The token could not be set.
    #[error(transparent)]
    Token(#[from] TokenError),
    /// A virtual function could not be given to its driver, or taken from it.
    #[error(transparent)]
    Bind(#[from] BindError),
    /// The records could not be read or written.
    #[error(transparent)]
    State(#[from] StateError),
    /// The devices could not be listed, or it is not there.
    #[error(transparent)]
    Inventory(#[from] InventoryError),
    /// A file could not be read or written.
    #[error(transparent)]
    Host(#[from] HostError),
}

/// Who is to have new virtual functions.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Owner {
    /// This driver, such as vfio-pci.
    Driver(String),
    /// Whichever driver of the host takes them.
    Host,
    /// Nobody.
    Nobody,
}

/// The name cannot be a driver's.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("`{0}` is not the name of a driver: letters, digits, - and _ only")]
pub struct BadDriver(pub String);

/// Checks the name of a driver, which becomes part of paths.
///
/// # Errors
/// [`BadDriver`] if there is anything in it but letters, digits, `-` and `_`, or nothing.
pub fn driver_name(name: &str) -> Result<String, BadDriver> {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_');
    // modprobe and the kernel would take a leading dash for something else.
    if name.bytes().all(plain) && !name.is_empty() && !name.starts_with('-') {
        Ok(name.to_owned())
    } else {
        Err(BadDriver(name.to_owned()))
    }
}

impl FromStr for Owner {
    type Err = BadDriver;

    fn from_str(name: &str) -> Result<Self, BadDriver> {
        match name {
            "host" => Ok(Self::Host),
            "none" => Ok(Self::Nobody),
            name => driver_name(name).map(Self::Driver),
        }
    }
}

/// What `create` is to do.
#[derive(Debug, Clone)]
pub struct Wish {
    /// The physical function.
    pub pf: PciAddress,
    /// How many virtual functions; at least 1.
    pub count: u16,
    /// Who is to have them.
    pub owner: Owner,
    /// The VF token to set, if vfio-pci has the physical function; one is made up if it is needed.
    pub token: Option<Uuid>,
    /// Takes existing virtual functions even from whoever needs or uses them.
    pub force: bool,
}

/// What there is after `create`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Created {
    /// The virtual functions, in order.
    pub devices: Vec<Outcome>,
    /// The VF token that was set.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vf_token: Option<String>,
}

/// What the inventory says about a physical function.
struct Pf<'a> {
    device: &'a PciDevice,
    total: u16,
    enabled: u16,
    vfs: &'a [PciAddress],
}

impl<'a> Pf<'a> {
    fn of(inventory: &'a Inventory, address: PciAddress) -> Result<Self, FunctionsError> {
        let device = inventory.device(address)?;
        match &device.role {
            Role::Pf {
                vfs_total,
                vfs_enabled,
                vfs,
            } => Ok(Self {
                device,
                total: *vfs_total,
                enabled: *vfs_enabled,
                vfs,
            }),
            Role::Vf { pf, .. } => Err(FunctionsError::IsVf { address, pf: *pf }),
            Role::Other => Err(FunctionsError::NotPf(address)),
        }
    }

    fn driver(&self) -> Result<&'a str, FunctionsError> {
        let driver = self.device.driver.as_deref();
        driver.ok_or(FunctionsError::NoDriver(self.device.address))
    }
}

fn autoprobe(pf: PciAddress) -> String {
    format!("{DEVICES}/{pf}/sriov_drivers_autoprobe")
}

/// Tells a physical function's driver how many virtual functions there are to be.
fn set_number(host: &Host, pf: PciAddress, driver: &str, count: u16) -> Result<(), FunctionsError> {
    let file = format!("{DEVICES}/{pf}/sriov_numvfs");
    host.write(file, &count.to_string()).map_err(|source| {
        let errno = match &source {
            HostError::Write { source, .. } => source.raw_os_error().map(Errno::from_raw),
            _ => None,
        };
        // What the PCI core and drivers answer (Linux, drivers/pci/iov.c, sriov_numvfs_store).
        let reason = match errno {
            Some(Errno::ENOENT) => "it has no support for virtual functions",
            Some(Errno::ENOMEM) => {
                "there is no address space for them; let the firmware or the kernel (pci=realloc) make some"
            }
            Some(Errno::EPERM) => "it does not let go of some of them",
            Some(Errno::EACCES) => "this needs root",
            Some(Errno::EBUSY) => "they are in use, or another program changed the number just now",
            _ => "the kernel's log may say why (dmesg)",
        };
        FunctionsError::Number {
            address: pf,
            driver: driver.to_owned(),
            count,
            reason,
            source,
        }
    })
}

/// Gives `sriov_drivers_autoprobe` the value that it had before the first change, if one is recorded.
fn restore_autoprobe(
    host: &Host,
    records: &Records<'_>,
    pf: PciAddress,
) -> Result<(), FunctionsError> {
    if let Some(former) = records.get(pf)?.and_then(|record| record.autoprobe) {
        host.write(autoprobe(pf), &former)?;
        records.change(pf, None, |record| record.autoprobe = None)?;
    }
    Ok(())
}

/// Whether a virtual function is with whom it is to be.
fn is_with(binding: &Binding, owner: &Owner) -> bool {
    match owner {
        Owner::Driver(driver) => *binding == Binding::to(driver),
        Owner::Host => {
            binding.driver_override.is_none()
                && binding
                    .driver
                    .as_deref()
                    .is_some_and(|driver| !is_vfio(driver))
        }
        Owner::Nobody => *binding == Binding::default(),
    }
}

/// Gives one virtual function to whom it is to belong.
fn give(
    host: &Host,
    vf: PciAddress,
    owner: &Owner,
    remarks: &mut dyn Write,
) -> Result<(), FunctionsError> {
    match owner {
        Owner::Driver(driver) => arrange(host, vf, &Binding::to(driver))?,
        Owner::Nobody => arrange(host, vf, &Binding::default())?,
        Owner::Host => {
            arrange(host, vf, &Binding::default())?;
            // Without udev nobody loads the module for a new device. No module is an answer as well.
            let loaded = match host.text(format!("{DEVICES}/{vf}/modalias"))? {
                Some(alias) => host.load_module(&alias),
                None => Ok(()),
            };
            probe(host, vf)?;
            if Binding::read(host, vf)?.driver.is_none() {
                let why = loaded.err().map_or_else(String::new, |e| format!(" ({e})"));
                // A remark that nobody can read is no reason to stop.
                let _ = writeln!(
                    remarks,
                    "ringside-vfio: no driver of the host took {vf}{why}"
                );
            }
        }
    }
    Ok(())
}

/// Makes virtual functions and gives them to a driver.
///
/// If there are as many already, those that are not with the driver are given to it.
///
/// # Errors
/// [`FunctionsError`], if it is refused before the first change, or fails; what was done is undone then, and
/// `remarks` says what could not be.
pub fn create(
    host: &Host,
    wish: &Wish,
    remarks: &mut dyn Write,
) -> Result<Created, FunctionsError> {
    let records = Records::open(host, remarks)?;
    let inventory = Inventory::read(host, &PciIds::default())?;
    let pf = Pf::of(&inventory, wish.pf)?;
    let driver = pf.driver()?;
    if wish.count > pf.total {
        return Err(FunctionsError::TooMany {
            address: wish.pf,
            total: pf.total,
            wanted: wish.count,
        });
    }
    if pf.enabled != 0 && pf.enabled != wish.count {
        return Err(FunctionsError::Different {
            address: wish.pf,
            enabled: pf.enabled,
        });
    }
    if driver == "vfio-pci" && host.text(ENABLE_SRIOV)?.as_deref() != Some("Y") {
        return Err(FunctionsError::SriovOff(wish.pf));
    }
    let token = match wish.token {
        Some(_) if !is_vfio(driver) => {
            return Err(FunctionsError::TokenWithoutVfio {
                address: wish.pf,
                driver: driver.to_owned(),
            });
        }
        // Whoever uses the functions that are there knows the token they were made with.
        None if is_vfio(driver) && pf.enabled == 0 => Some(Uuid::new_v4()),
        token => token,
    };
    if let Owner::Driver(driver) = &wish.owner {
        // Where there is none for the physical function there is none for its virtual ones.
        require_iommu(host, pf.device, driver)?;
        require_driver(host, driver)?;
    }
    let mut mend = Vec::new();
    if pf.enabled != 0 {
        let occupancy = Occupancy::read(host)?;
        for vf in pf.vfs {
            if is_with(&Binding::read(host, *vf)?, &wish.owner) {
                continue;
            }
            let device = inventory.device(*vf)?;
            if !wish.force {
                guard(*vf, others_of(device, &inventory), &occupancy)?;
                guard_users(host, device, FORCE_ADVICE)?;
            }
            mend.push(*vf);
        }
    }
    if let Some(token) = &token {
        host.set_vf_token(wish.pf, token)?;
    }
    let (vfs, changed) = if pf.enabled == 0 {
        let vfs = make(host, &records, wish, driver, remarks)?;
        (vfs.clone(), vfs)
    } else {
        hand_over(host, &records, wish, &mend, remarks)?;
        (pf.vfs.to_vec(), mend)
    };
    let outcome = |vf: &PciAddress| Outcome::read(host, *vf, changed.contains(vf));
    Ok(Created {
        devices: vfs.iter().map(outcome).collect::<Result<_, _>>()?,
        vf_token: token.map(|token| token.to_string()),
    })
}

/// Makes the virtual functions where there are none.
fn make(
    host: &Host,
    records: &Records<'_>,
    wish: &Wish,
    driver: &str,
    remarks: &mut dyn Write,
) -> Result<Vec<PciAddress>, FunctionsError> {
    let pf = wish.pf;
    let result = try_make(host, records, wish, driver, remarks);
    let Err(error) = result else { return result };
    let mut remark = |failure: &dyn std::error::Error| {
        // A remark that nobody can read does not stop the rest.
        let _ = writeln!(
            remarks,
            "ringside-vfio: not everything could be undone, run `ringside-vfio destroy {pf}`: {failure}"
        );
    };
    // The functions take their drivers and overrides with them.
    let left = host.text(format!("{DEVICES}/{pf}/sriov_numvfs"));
    if !matches!(left.as_ref().map(Option::as_deref), Ok(Some("0")))
        && let Err(failure) = set_number(host, pf, driver, 0)
    {
        remark(&failure);
    }
    if let Err(failure) = restore_autoprobe(host, records, pf) {
        remark(&failure);
    }
    Err(error)
}

fn try_make(
    host: &Host,
    records: &Records<'_>,
    wish: &Wish,
    driver: &str,
    remarks: &mut dyn Write,
) -> Result<Vec<PciAddress>, FunctionsError> {
    let pf = wish.pf;
    // Kernels before 4.12 have no such switch.
    if let Some(now) = host.text(autoprobe(pf))? {
        if records
            .get(pf)?
            .is_none_or(|record| record.autoprobe.is_none())
        {
            records.change(pf, None, |record| record.autoprobe = Some(now.clone()))?;
        }
        if now != "0" {
            host.write(autoprobe(pf), "0")?;
        }
    }
    set_number(host, pf, driver, wish.count)?;
    let inventory = Inventory::read(host, &PciIds::default())?;
    let vfs = Pf::of(&inventory, pf)?.vfs.to_vec();
    if vfs.len() != usize::from(wish.count) {
        return Err(FunctionsError::Short {
            address: pf,
            made: vfs.len(),
            wanted: wish.count,
        });
    }
    if wish.owner == Owner::Host && host.has(autoprobe(pf)) {
        // Without an override the kernel offers a virtual function to drivers only when this is on.
        host.write(autoprobe(pf), "1")?;
    }
    for vf in &vfs {
        give(host, *vf, &wish.owner, remarks)?;
    }
    restore_autoprobe(host, records, pf)?;
    Ok(vfs)
}

/// Gives existing virtual functions to whom they are to belong.
fn hand_over(
    host: &Host,
    records: &Records<'_>,
    wish: &Wish,
    vfs: &[PciAddress],
    remarks: &mut dyn Write,
) -> Result<(), FunctionsError> {
    let mut changes = Changes::new(host);
    let mut hand_over = || {
        if wish.owner == Owner::Host
            && !vfs.is_empty()
            && let Some(now) = host.text(autoprobe(wish.pf))?
            && now != "1"
        {
            if records
                .get(wish.pf)?
                .is_none_or(|record| record.autoprobe.is_none())
            {
                records.change(wish.pf, None, |record| record.autoprobe = Some(now))?;
            }
            host.write(autoprobe(wish.pf), "1")?;
        }
        for vf in vfs {
            changes.note(*vf)?;
            give(host, *vf, &wish.owner, remarks)?;
        }
        restore_autoprobe(host, records, wish.pf)
    };
    let result = hand_over();
    if result.is_err() {
        changes.undo(remarks);
        if let Err(failure) = restore_autoprobe(host, records, wish.pf) {
            let _ = writeln!(remarks, "ringside-vfio: {}: {failure}", wish.pf);
        }
        return result;
    }
    for vf in vfs {
        // They are no longer bound for a while: this is where they belong now.
        records.change(*vf, None, |record| record.binding = None)?;
    }
    Ok(())
}

/// Takes a physical function's virtual ones from their drivers and removes them; gives their addresses.
///
/// With `force`, even those go that the host needs or that a process uses; the process is waited for.
/// If it fails half-way, another `destroy` goes on from there.
///
/// # Errors
/// [`FunctionsError`], if it is refused before the first change, or fails.
pub fn destroy(
    host: &Host,
    address: PciAddress,
    force: bool,
    remarks: &mut dyn Write,
) -> Result<Vec<PciAddress>, FunctionsError> {
    let records = Records::open(host, remarks)?;
    let inventory = Inventory::read(host, &PciIds::default())?;
    let pf = Pf::of(&inventory, address)?;
    if pf.enabled != 0 {
        let driver = pf.driver()?;
        let occupancy = Occupancy::read(host)?;
        if !force {
            for vf in pf.vfs {
                guard(*vf, [], &occupancy)?;
                guard_users(host, inventory.device(*vf)?, FORCE_ADVICE)?;
            }
        }
        for vf in pf.vfs {
            arrange(host, *vf, &Binding::default())?;
        }
        set_number(host, address, driver, 0)?;
    }
    restore_autoprobe(host, &records, address)?;
    records.forget_functions_of(address)?;
    Ok(pf.vfs.to_vec())
}

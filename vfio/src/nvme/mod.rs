//! NVMe controllers with SR-IOV: a virtual function is a secondary controller, which is of use once the primary
//! one has given it queues and interrupts and it is online (NVM Express Base Specification 2.0, 8.26).
//!
//! [`admin`] says what commands and answers look like, [`passthrough`] carries them.

use std::io::{self, Write};

use serde::Serialize;
use thiserror::Error;

use crate::address::PciAddress;
use crate::binding::{BindError, FORCE_ADVICE, guard, guard_users};
use crate::host::{Host, HostError, advice};
use crate::ids::PciIds;
use crate::inventory::{DEVICES, Inventory, InventoryError, PciDevice};
use crate::occupancy::Occupancy;
use crate::vf::{VfError, VfName};

pub mod admin;
pub mod passthrough;

use admin::{
    Action, Admin, AdminError, Capacity, DATA_LENGTH, Data, PrimaryCapabilities, Resource,
    Secondary,
};

/// A controller could not be asked or changed.
#[derive(Debug, Error)]
pub enum NvmeError {
    /// The host's driver does not have the device.
    #[error(
        "{address} is not an NVMe controller of the host ({}): only nvme can give its secondary controllers queues",
        driver.as_deref().map_or_else(|| "no driver is bound to it".to_owned(), |name| format!("its driver is {name}"))
    )]
    NoController {
        /// The device.
        address: PciAddress,
        /// Its driver.
        driver: Option<String>,
    },
    /// The device file could not be opened.
    #[error("cannot open /dev/{controller}{}", advice(source))]
    Open {
        /// The controller.
        controller: String,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The controller has no secondary ones.
    #[error("{0} cannot tell its secondary controllers; it may have no virtualization management")]
    Identify(String, #[source] AdminError),
    /// No secondary controller is the virtual function.
    #[error("{controller} has no secondary controller for virtual function {vf}")]
    NoSecondary {
        /// The controller.
        controller: String,
        /// Number of the virtual function.
        vf: u16,
    },
    /// It cannot have so many.
    #[error("a secondary controller of {controller} can have {most} {resource}, not {wanted}")]
    TooMany {
        /// The controller.
        controller: String,
        /// What of.
        resource: Resource,
        /// How many it can have.
        most: u16,
        /// How many were asked for.
        wanted: u16,
    },
    /// The primary controller gives none of them away.
    #[error("{controller} has no {resource} that its secondary controllers could have")]
    NotFlexible {
        /// The controller.
        controller: String,
        /// What of.
        resource: Resource,
    },
    /// A command of the sequence failed.
    #[error("{what} failed for secondary controller {id} of {controller}")]
    Command {
        /// The controller.
        controller: String,
        /// The secondary controller's id.
        id: u16,
        /// What was to be done.
        what: String,
        /// Why.
        #[source]
        source: AdminError,
    },
    /// The controller gave another number.
    #[error("{controller} gave its secondary controller {id} {got} {resource}, not {wanted}")]
    Short {
        /// The controller.
        controller: String,
        /// The secondary controller's id.
        id: u16,
        /// What of.
        resource: Resource,
        /// How many it has now.
        got: u16,
        /// How many were asked for.
        wanted: u16,
    },
    /// The virtual function is not there, or its physical function is none.
    #[error(transparent)]
    Vf(#[from] VfError),
    /// The virtual function is needed or used.
    #[error(transparent)]
    Bind(#[from] BindError),
    /// The devices could not be listed, or it is not there.
    #[error(transparent)]
    Inventory(#[from] InventoryError),
    /// A file could not be read.
    #[error(transparent)]
    Host(#[from] HostError),
}

/// A primary controller with its secondary ones.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Controllers {
    /// The physical function.
    pub address: PciAddress,
    /// The kernel's name of the primary controller.
    pub controller: String,
    /// What the primary controller says about itself.
    pub primary: PrimaryCapabilities,
    /// The secondary controllers, by id.
    pub secondaries: Vec<Secondary>,
}

/// What a secondary controller is to have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Wish {
    /// Queues, of which the first are the admin queues: at least 2.
    pub queues: u16,
    /// Interrupts: at least 1.
    pub interrupts: u16,
    /// A namespace to attach to it.
    pub namespace: Option<u32>,
    /// Takes it offline even if the host needs it or a process uses it.
    pub force: bool,
}

/// An open primary controller.
struct Primary {
    name: String,
    id: u16,
    admin: Box<dyn Admin>,
}

impl Primary {
    fn open(host: &Host, pf: &PciDevice) -> Result<Self, NvmeError> {
        let place = format!("{DEVICES}/{}/nvme", pf.address);
        let names = host.names(&place)?.unwrap_or_default();
        let missing = || NvmeError::NoController {
            address: pf.address,
            driver: pf.driver.clone(),
        };
        let name = names.into_iter().next().ok_or_else(missing)?;
        let id = host
            .number(format!("{place}/{name}/cntlid"), "a controller's id")?
            .ok_or_else(missing)?;
        let admin = host
            .nvme(format!("dev/{name}"))
            .map_err(|source| NvmeError::Open {
                controller: name.clone(),
                source,
            })?;
        Ok(Self { name, id, admin })
    }

    fn identify(&mut self, command: &admin::Command) -> Result<[u8; DATA_LENGTH], NvmeError> {
        let mut data = [0; DATA_LENGTH];
        self.admin
            .submit(command, Data::In(&mut data))
            .map_err(|error| NvmeError::Identify(self.name.clone(), error))?;
        Ok(data)
    }

    fn capabilities(&mut self) -> Result<PrimaryCapabilities, NvmeError> {
        let data = self.identify(&admin::identify_primary(self.id))?;
        Ok(admin::parse_primary(&data))
    }

    fn secondaries(&mut self) -> Result<Vec<Secondary>, NvmeError> {
        let mut all: Vec<Secondary> = Vec::new();
        let mut first = 0;
        // An answer holds 127 at most. Ids rise, so this ends even if the controller repeats itself.
        loop {
            let data = self.identify(&admin::identify_secondaries(first))?;
            let more = admin::parse_secondaries(&data);
            let fresh = more.into_iter().filter(|one| one.id >= first);
            let before = all.len();
            all.extend(fresh);
            let last = all.get(before..).and_then(<[_]>::last);
            match last.and_then(|last| last.id.checked_add(1)) {
                Some(next) if next > first => first = next,
                _ => return Ok(all),
            }
        }
    }

    /// Carries out one action on a secondary controller.
    fn manage(&mut self, id: u16, action: Action) -> Result<(), NvmeError> {
        let result = self
            .admin
            .submit(&admin::manage(id, action), Data::Nothing)
            .map_err(|source| NvmeError::Command {
                controller: self.name.clone(),
                id,
                what: match action {
                    Action::Offline => "going offline".to_owned(),
                    Action::Assign { resource, count } => format!("assigning {count} {resource}"),
                    Action::Online => "going online".to_owned(),
                },
                source,
            })?;
        if let Action::Assign { resource, count } = action {
            // NRM: how many it has now.
            let [low, high, ..] = result.to_le_bytes();
            let got = u16::from_le_bytes([low, high]);
            if got != count {
                return Err(NvmeError::Short {
                    controller: self.name.clone(),
                    id,
                    resource,
                    got,
                    wanted: count,
                });
            }
        }
        Ok(())
    }

    /// Gives a secondary controller resources and brings it online. Whether it goes offline first makes no
    /// difference to one that is.
    fn configure(&mut self, id: u16, queues: u16, interrupts: u16) -> Result<(), NvmeError> {
        self.manage(id, Action::Offline)?;
        for (resource, count) in [
            (Resource::Queues, queues),
            (Resource::Interrupts, interrupts),
        ] {
            self.manage(id, Action::Assign { resource, count })?;
        }
        self.manage(id, Action::Online)
    }

    /// Puts a secondary controller back to what it was.
    fn restore(&mut self, former: &Secondary) -> Result<(), NvmeError> {
        if former.online {
            return self.configure(former.id, former.queues, former.interrupts);
        }
        self.manage(former.id, Action::Offline)?;
        for (resource, count) in [
            (Resource::Queues, former.queues),
            (Resource::Interrupts, former.interrupts),
        ] {
            self.manage(former.id, Action::Assign { resource, count })?;
        }
        Ok(())
    }

    fn attach(&mut self, id: u16, namespace: u32) -> Result<(), NvmeError> {
        let (command, list) = admin::attach(namespace, id);
        match self.admin.submit(&command, Data::Out(&list)) {
            Err(source) if !source.is_already_attached() => Err(NvmeError::Command {
                controller: self.name.clone(),
                id,
                what: format!("attaching namespace {namespace}"),
                source,
            }),
            _ => Ok(()),
        }
    }
}

/// Lists a primary controller's resources and its secondary controllers.
///
/// # Errors
/// [`NvmeError`], if there are none or it cannot be asked.
pub fn list(host: &Host, pf: PciAddress) -> Result<Controllers, NvmeError> {
    let inventory = Inventory::read(host, &PciIds::default())?;
    let mut primary = Primary::open(host, inventory.device(pf)?)?;
    Ok(Controllers {
        address: pf,
        primary: primary.capabilities()?,
        secondaries: primary.secondaries()?,
        controller: primary.name,
    })
}

/// Gives a virtual function's controller queues and interrupts, brings it online and attaches a namespace. What
/// fails is undone, except that a namespace that was attached stays.
///
/// # Errors
/// [`NvmeError`], if it is refused before the first change, or fails.
pub fn assign(
    host: &Host,
    pf: PciAddress,
    vf: VfName,
    wish: &Wish,
    remarks: &mut dyn Write,
) -> Result<Secondary, NvmeError> {
    let inventory = Inventory::read(host, &PciIds::default())?;
    let device = inventory.device(pf)?;
    let mut primary = Primary::open(host, device)?;
    let (index, address) = vf.find(device)?;
    let function = inventory.device(address)?;
    if !wish.force {
        guard(address, [], &Occupancy::read(host)?)?;
        guard_users(host, function, FORCE_ADVICE)?;
    }
    let capabilities = primary.capabilities()?;
    for (resource, wanted, capacity) in [
        (Resource::Queues, wish.queues, capabilities.queues),
        (
            Resource::Interrupts,
            wish.interrupts,
            capabilities.interrupts,
        ),
    ] {
        check(&primary.name, resource, wanted, capacity)?;
    }
    // Virtual functions are counted from 0 in Linux, from 1 by the controller.
    let number = index.saturating_add(1);
    let find = |list: Vec<Secondary>| list.into_iter().find(|one| one.vf == number);
    let controller = primary.name.clone();
    let missing = || NvmeError::NoSecondary {
        controller: controller.clone(),
        vf: index,
    };
    let former = find(primary.secondaries()?).ok_or_else(missing)?;
    let id = former.id;
    let result = primary
        .configure(id, wish.queues, wish.interrupts)
        .and_then(|()| match wish.namespace {
            Some(namespace) => primary.attach(id, namespace),
            None => Ok(()),
        });
    if let Err(error) = result {
        if let Err(failure) = primary.restore(&former) {
            // A remark that nobody can read does not hide the error.
            let _ = writeln!(
                remarks,
                "ringside-vfio: secondary controller {id} could not be put back: {failure}"
            );
        }
        return Err(error);
    }
    find(primary.secondaries()?).ok_or_else(missing)
}

/// Whether a secondary controller could have so many of a resource if no other had any.
fn check(
    controller: &str,
    resource: Resource,
    wanted: u16,
    capacity: Option<Capacity>,
) -> Result<(), NvmeError> {
    match capacity {
        None => Err(NvmeError::NotFlexible {
            controller: controller.to_owned(),
            resource,
        }),
        Some(Capacity { most, .. }) if wanted > most => Err(NvmeError::TooMany {
            controller: controller.to_owned(),
            resource,
            most,
            wanted,
        }),
        Some(_) => Ok(()),
    }
}

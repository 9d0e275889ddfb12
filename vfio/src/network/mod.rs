//! Settings of virtual functions that are network cards: they are the physical function's to make, before a
//! guest has the card and while it has it.
//!
//! Each setting is a request of its own to the kernel, so that a driver that refuses one still does the others.

use std::fmt;
use std::io::{self, Write};
use std::str::FromStr;

use serde::Serialize;
use thiserror::Error;

use crate::address::PciAddress;
use crate::host::{Host, HostError};
use crate::ids::PciIds;
use crate::inventory::{Inventory, InventoryError, PciDevice, Role};
use crate::vf::{VfError, VfName};

pub mod rtnetlink;

/// The settings could not be read or changed.
#[derive(Debug, Error)]
pub enum NetworkError {
    /// There is no such virtual function.
    #[error(transparent)]
    Vf(#[from] VfError),
    /// The physical function is not a network card to the host.
    #[error(
        "{pf} has no network interface ({}), and only the driver of one can set this",
        driver.as_deref().unwrap_or("no driver is bound to it")
    )]
    NoInterface {
        /// The physical function.
        pf: PciAddress,
        /// Its driver.
        driver: Option<String>,
    },
    /// None of its interfaces has settings for the virtual function.
    #[error("the driver of {interface} has no settings for virtual function {vf}")]
    NoSettings {
        /// The physical function's interface.
        interface: String,
        /// Number of the virtual function.
        vf: u16,
    },
    /// The kernel could not be asked.
    #[error("cannot speak with the kernel's network configuration")]
    Netlink(#[source] io::Error),
    /// The kernel's answer about an interface failed.
    #[error("cannot read the settings of the virtual functions of {interface}")]
    Read {
        /// The physical function's interface.
        interface: String,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The devices could not be listed, or it is not there.
    #[error(transparent)]
    Inventory(#[from] InventoryError),
    /// A file could not be read.
    #[error(transparent)]
    Host(#[from] HostError),
}

/// The address of a network card.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Mac(pub [u8; 6]);

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl fmt::Debug for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl Serialize for Mac {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// The text is no value of a setting.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum BadValue {
    /// Not the address of a network card.
    #[error("`{0}` is not the address of one network card, such as 52:54:00:12:34:56")]
    Mac(String),
    /// Not a VLAN.
    #[error(
        "`{0}` is not a VLAN: 1 to 4094, or 0 for none, and after a colon its priority, 0 to 7"
    )]
    Vlan(String),
}

impl FromStr for Mac {
    type Err = BadValue;

    fn from_str(text: &str) -> Result<Self, BadValue> {
        let parse = || {
            let mut mac = [0; 6];
            let mut parts = text.split(':');
            for byte in &mut mac {
                let part = parts.next()?;
                let plain = part.len() == 2 && part.bytes().all(|b| b.is_ascii_hexdigit());
                *byte = u8::from_str_radix(part, 16).ok().filter(|_| plain)?;
            }
            // The lowest bit of the first byte stands for a group of cards (IEEE 802, 8.2.2).
            let [first, ..] = mac;
            (parts.next().is_none() && first & 1 == 0).then_some(Self(mac))
        };
        parse().ok_or_else(|| BadValue::Mac(text.to_owned()))
    }
}

/// A VLAN that the card puts its virtual function's packets into.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Vlan {
    /// Its number; 0 for none.
    pub id: u16,
    /// The priority (IEEE 802.1Q, PCP).
    pub qos: u8,
}

impl FromStr for Vlan {
    type Err = BadValue;

    fn from_str(text: &str) -> Result<Self, BadValue> {
        let parse = || {
            let (id, qos) = text.split_once(':').unwrap_or((text, "0"));
            let id = id.parse().ok().filter(|id| *id <= 4094)?;
            let qos = qos.parse().ok().filter(|qos| *qos <= 7)?;
            Some(Self { id, qos })
        };
        parse().ok_or_else(|| BadValue::Vlan(text.to_owned()))
    }
}

/// What a virtual function's link follows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum LinkState {
    /// The physical function's link.
    Auto,
    /// Always up: virtual functions reach each other even without a cable.
    Enable,
    /// Always down.
    Disable,
}

/// One setting.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Setting {
    /// The card's address.
    Mac(Mac),
    /// Its VLAN.
    Vlan(Vlan),
    /// The rates in Mbit/s that it may send at most, and is to get at least; 0 for no such limit.
    Rate {
        /// At least.
        min: u32,
        /// At most.
        max: u32,
    },
    /// Whether it may set promiscuous mode and its own address.
    Trust(bool),
    /// Whether packets with a sender address that is not its own are dropped.
    SpoofCheck(bool),
    /// What its link follows.
    LinkState(LinkState),
}

impl Setting {
    /// Its name in reports.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Mac(_) => "mac",
            Self::Vlan(_) => "vlan",
            Self::Rate { .. } => "rate",
            Self::Trust(_) => "trust",
            Self::SpoofCheck(_) => "spoofchk",
            Self::LinkState(_) => "link-state",
        }
    }
}

/// The settings that a virtual function has, as far as the kernel tells.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct VfSettings {
    /// The card's address. All zeros if the guest gets one at random.
    pub mac: Option<Mac>,
    /// Its VLAN.
    pub vlan: Option<Vlan>,
    /// Rate in Mbit/s that it is to get at least; 0 for no limit.
    pub min_rate: Option<u32>,
    /// Rate in Mbit/s that it may send at most; 0 for no limit.
    pub max_rate: Option<u32>,
    /// Whether it may set promiscuous mode and its own address.
    pub trust: Option<bool>,
    /// Whether packets with a sender address that is not its own are dropped.
    pub spoofchk: Option<bool>,
    /// What its link follows.
    pub link_state: Option<LinkState>,
}

/// The kernel's network configuration, as far as it is about virtual functions.
pub trait Links {
    /// The settings of all virtual functions of an interface, by their numbers.
    ///
    /// # Errors
    /// What the kernel said.
    fn settings(&mut self, interface: u32) -> io::Result<Vec<(u16, VfSettings)>>;

    /// Changes one setting of one virtual function.
    ///
    /// # Errors
    /// What the kernel said.
    fn set(&mut self, interface: u32, vf: u16, setting: &Setting) -> io::Result<()>;
}

/// What is to be changed; what is `None` stays.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Wish {
    /// The card's address.
    pub mac: Option<Mac>,
    /// Its VLAN.
    pub vlan: Option<Vlan>,
    /// Rate in Mbit/s that it is to get at least; 0 for no limit.
    pub min_rate: Option<u32>,
    /// Rate in Mbit/s that it may send at most; 0 for no limit.
    pub max_rate: Option<u32>,
    /// Whether it may set promiscuous mode and its own address.
    pub trust: Option<bool>,
    /// Whether packets with a sender address that is not its own are dropped.
    pub spoofchk: Option<bool>,
    /// What its link follows.
    pub link_state: Option<LinkState>,
}

impl Wish {
    /// The settings to change, in the order in which to do so.
    fn settings(&self, now: &VfSettings) -> Vec<Setting> {
        // The kernel takes both rates at once: the one that is to stay is given as it is.
        let rate = (self.min_rate.is_some() || self.max_rate.is_some()).then(|| Setting::Rate {
            min: self.min_rate.or(now.min_rate).unwrap_or(0),
            max: self.max_rate.or(now.max_rate).unwrap_or(0),
        });
        [
            self.mac.map(Setting::Mac),
            self.vlan.map(Setting::Vlan),
            rate,
            self.trust.map(Setting::Trust),
            self.spoofchk.map(Setting::SpoofCheck),
            self.link_state.map(Setting::LinkState),
        ]
        .into_iter()
        .flatten()
        .collect()
    }
}

/// What became of one setting.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Attempt {
    /// Its name.
    pub setting: &'static str,
    /// Why it was refused, if it was.
    pub error: Option<String>,
}

/// What became of all settings.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Answer {
    /// The virtual function.
    pub address: PciAddress,
    /// Its number.
    pub index: u16,
    /// The physical function's network interface.
    pub interface: String,
    /// What became of each setting.
    pub attempts: Vec<Attempt>,
    /// All settings, as the kernel tells them afterwards.
    pub settings: VfSettings,
}

/// Changes settings of one virtual function. That one is refused does not keep the others from being made.
///
/// # Errors
/// [`NetworkError`], if it is not there or the kernel cannot be asked.
pub fn set(
    host: &Host,
    pf: PciAddress,
    vf: VfName,
    wish: &Wish,
    remarks: &mut dyn Write,
) -> Result<Answer, NetworkError> {
    let inventory = Inventory::read(host, &PciIds::default())?;
    let device = inventory.device(pf)?;
    let (index, address) = vf.find(device)?;
    let mut links = host.links().map_err(NetworkError::Netlink)?;
    let (interface, number, now) = interface(host, device, index, links.as_mut())?;
    let mut attempts = Vec::new();
    for setting in wish.settings(&now) {
        let result = links.set(number, index, &setting);
        attempts.push(Attempt {
            setting: setting.name(),
            error: result.err().map(|error| refusal(device, &error)),
        });
    }
    let set_mac = attempts
        .iter()
        .any(|attempt| attempt.setting == "mac" && attempt.error.is_none());
    if let Some(driver) = inventory.get(address).and_then(|vf| vf.driver.as_ref())
        && set_mac
    {
        // A remark that nobody can read is no reason to stop.
        let _ = writeln!(
            remarks,
            "ringside-vfio: {address} is bound to {driver}: it takes its new address at its next reset, \
             such as at the next start of its guest"
        );
    }
    let settings = read(links.as_mut(), &interface, number)?
        .into_iter()
        .find(|(number, _)| *number == index)
        .map(|(_, settings)| settings)
        .unwrap_or_default();
    Ok(Answer {
        address,
        index,
        interface,
        attempts,
        settings,
    })
}

fn refusal(pf: &PciDevice, error: &io::Error) -> String {
    let driver = pf.driver.as_deref().unwrap_or("the driver");
    match error.raw_os_error().map(nix::errno::Errno::from_raw) {
        Some(nix::errno::Errno::EOPNOTSUPP) => format!("{driver} cannot do this"),
        Some(nix::errno::Errno::EPERM) => "this needs root".to_owned(),
        _ => format!("{driver} refused: {error}"),
    }
}

fn read(
    links: &mut dyn Links,
    interface: &str,
    number: u32,
) -> Result<Vec<(u16, VfSettings)>, NetworkError> {
    links.settings(number).map_err(|source| NetworkError::Read {
        interface: interface.to_owned(),
        source,
    })
}

fn number(host: &Host, interface: &str) -> Result<Option<u32>, HostError> {
    let file = format!("sys/class/net/{interface}/ifindex");
    host.number(file, "the number of an interface")
}

/// The interface that has settings for a virtual function: a physical function can have one for each port.
fn interface(
    host: &Host,
    pf: &PciDevice,
    vf: u16,
    links: &mut dyn Links,
) -> Result<(String, u32, VfSettings), NetworkError> {
    for interface in &pf.interfaces {
        let Some(number) = number(host, interface)? else {
            continue;
        };
        let all = read(links, interface, number)?;
        if let Some((_, settings)) = all.into_iter().find(|(number, _)| *number == vf) {
            return Ok((interface.clone(), number, settings));
        }
    }
    Err(match pf.interfaces.first() {
        Some(interface) => NetworkError::NoSettings {
            interface: interface.clone(),
            vf,
        },
        None => NetworkError::NoInterface {
            pf: pf.address,
            driver: pf.driver.clone(),
        },
    })
}

/// The settings of all virtual functions of an inventory, by address. What cannot be had is left out: they
/// are an addition to a list that does not depend on them.
#[must_use]
pub fn all(host: &Host, inventory: &Inventory) -> Vec<(PciAddress, VfSettings)> {
    let mut found = Vec::new();
    let Ok(mut links) = host.links() else {
        return found;
    };
    for pf in inventory.devices() {
        let Role::Pf { vfs, .. } = &pf.role else {
            continue;
        };
        let Some(interface) = pf.interfaces.first().filter(|_| !vfs.is_empty()) else {
            continue;
        };
        let Ok(Some(number)) = number(host, interface) else {
            continue;
        };
        for (index, settings) in links.settings(number).unwrap_or_default() {
            found.extend(
                vfs.get(usize::from(index))
                    .map(|address| (*address, settings)),
            );
        }
    }
    found
}

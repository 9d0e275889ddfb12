//! `ringside-vfio set`.

use std::io::Write;

use clap::{ArgGroup, Args, ValueEnum};

use super::CliError;
use crate::address::PciAddress;
use crate::host::Host;
use crate::network::{self, LinkState, Mac, Vlan, Wish};
use crate::report;
use crate::vf::VfName;

pub(super) const SET_HELP: &str = "\
The settings are made by the driver of the physical function, for the card that the guest then
sees. Each is made by itself: one that the driver cannot do, or refuses, does not keep the
others from being made, and the exit status is 1. A rate that is not given stays as it is. A
virtual function that is in use takes a new address at its next reset.

Examples:
  ringside-vfio set 01:00.0 0 --mac 52:54:00:00:00:01 --spoofchk on
  ringside-vfio set 01:00.0 01:10.2 --vlan 100:3 --rate 1000
  ringside-vfio set 01:00.0 0 --vlan 0 --rate 0        neither of them any more

JSON is one object: `attempts` lists each setting with its `error` or null, `settings` is what
the driver tells afterwards, as in the list of `ringside-vfio list --json`.";

/// On or off.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Switch {
    /// On.
    On,
    /// Off.
    Off,
}

impl From<Switch> for bool {
    fn from(switch: Switch) -> Self {
        switch == Switch::On
    }
}

/// Options of `set`.
#[derive(Debug, Args)]
#[command(group = ArgGroup::new("setting").required(true).multiple(true))]
pub struct SetOptions {
    /// The physical function.
    pub pf: PciAddress,

    /// The virtual function: its number or its address.
    pub vf: VfName,

    /// The card's address; all zeros for one that the guest makes up.
    #[arg(long, group = "setting")]
    pub mac: Option<Mac>,

    /// The VLAN that its packets are put into, and their priority; 0 for none.
    #[arg(long, group = "setting", value_name = "ID[:QOS]")]
    pub vlan: Option<Vlan>,

    /// How fast it may send at most; 0 for no limit.
    #[arg(long, group = "setting", value_name = "MBIT")]
    pub rate: Option<u32>,

    /// How fast it is to be able to send at least; 0 for no such promise.
    #[arg(long, group = "setting", value_name = "MBIT")]
    pub min_rate: Option<u32>,

    /// Whether it may set promiscuous mode and its own address.
    #[arg(long, group = "setting")]
    pub trust: Option<Switch>,

    /// Whether packets with a sender address that is not its own are dropped.
    #[arg(long, group = "setting")]
    pub spoofchk: Option<Switch>,

    /// What its link follows: the cable's (auto), or is always up or down.
    #[arg(long, group = "setting")]
    pub link_state: Option<LinkState>,

    /// Prints JSON in place of text.
    #[arg(long)]
    pub json: bool,
}

pub(super) fn set(
    host: &Host,
    options: &SetOptions,
    out: &mut impl Write,
    remarks: &mut impl Write,
) -> Result<(), CliError> {
    let wish = Wish {
        mac: options.mac,
        vlan: options.vlan,
        min_rate: options.min_rate,
        max_rate: options.rate,
        trust: options.trust.map(bool::from),
        spoofchk: options.spoofchk.map(bool::from),
        link_state: options.link_state,
    };
    let answer = network::set(host, options.pf, options.vf, &wish, remarks)?;
    let printed = if options.json {
        report::answer(out, &answer)
    } else {
        answer.attempts.iter().try_for_each(|attempt| {
            let result = attempt.error.as_deref().unwrap_or("done");
            writeln!(out, "{}: {result}", attempt.setting)
        })
    };
    printed.map_err(CliError::Output)?;
    let refused = answer
        .attempts
        .iter()
        .filter(|attempt| attempt.error.is_some());
    let settings: Vec<_> = refused.map(|attempt| attempt.setting).collect();
    if settings.is_empty() {
        Ok(())
    } else {
        Err(CliError::Refused {
            address: answer.address,
            settings,
        })
    }
}

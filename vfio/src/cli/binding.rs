//! `ringside-vfio bind` and `ringside-vfio unbind`.

use std::io::Write;

use clap::Args;

use super::{CliError, Devices, VFIO_PCI};
use crate::address::PciAddress;
use crate::binding::{self, Outcome};
use crate::functions::driver_name;
use crate::host::Host;
use crate::report;

pub(super) const BIND_HELP: &str = "\
Refuses bridges, physical functions whose virtual ones are enabled, and, without --force,
whatever carries a mounted file system, swap space or a default route, be it through LVM, RAID,
bonds, bridges or VLANs, and whatever shares an IOMMU group with it.

Either all the devices are bound or none. The other devices of an IOMMU group have to be bound
too, or be without a driver: `ringside-vfio list` shows them.

Examples:
  ringside-vfio bind 02:00.0
  ringside-vfio bind 03:00.0 03:00.1              a card and its sound device, in one group

JSON is one object with the list `devices`; `changed` is false for what was bound before.";

pub(super) const UNBIND_HELP: &str = "\
The former driver and driver_override are those from before `bind`. A device that was bound by
another program goes to whichever driver of the host takes it. Refuses while a process uses the
device.

JSON is one object with the list `devices`; `changed` is false for what was not bound.";

/// Options of `bind`.
#[derive(Debug, Args)]
pub struct BindOptions {
    /// The devices.
    #[arg(value_name = "ADDRESS", required = true)]
    pub addresses: Vec<PciAddress>,

    /// The driver that is to have them. Its module is loaded if need be.
    #[arg(long, default_value = VFIO_PCI, value_parser = driver_name)]
    pub driver: String,

    /// Takes them even if the host needs them or a process uses them; waits until that lets go.
    #[arg(long)]
    pub force: bool,

    /// Prints JSON in place of a table.
    #[arg(long)]
    pub json: bool,
}

/// Options of `unbind`.
#[derive(Debug, Args)]
pub struct UnbindOptions {
    /// The devices.
    #[arg(value_name = "ADDRESS", required = true)]
    pub addresses: Vec<PciAddress>,

    /// Prints JSON in place of a table.
    #[arg(long)]
    pub json: bool,
}

pub(super) fn bind(
    host: &Host,
    options: &BindOptions,
    out: &mut impl Write,
    remarks: &mut impl Write,
) -> Result<(), CliError> {
    let (driver, force) = (&options.driver, options.force);
    let outcomes = binding::bind(host, &options.addresses, driver, force, remarks)?;
    print(out, &outcomes, options.json, |outcome| {
        format!("{} was bound to {driver} already", outcome.address)
    })
}

pub(super) fn unbind(
    host: &Host,
    options: &UnbindOptions,
    out: &mut impl Write,
    remarks: &mut impl Write,
) -> Result<(), CliError> {
    let outcomes = binding::unbind(host, &options.addresses, remarks)?;
    print(out, &outcomes, options.json, |outcome| {
        format!("{} was not bound to vfio-pci", outcome.address)
    })
}

/// Prints what became of devices; `unchanged` says why one is as it was.
fn print(
    out: &mut impl Write,
    outcomes: &[Outcome],
    json: bool,
    unchanged: impl Fn(&Outcome) -> String,
) -> Result<(), CliError> {
    if json {
        return report::answer(out, &Devices { devices: outcomes }).map_err(CliError::Output);
    }
    for outcome in outcomes.iter().filter(|outcome| !outcome.changed) {
        writeln!(out, "{}", unchanged(outcome)).map_err(CliError::Output)?;
    }
    report::outcomes(out, outcomes).map_err(CliError::Output)
}

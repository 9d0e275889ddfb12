//! `ringside-vfio create` and `ringside-vfio destroy`.

use std::io::Write;

use clap::Args;
use uuid::Uuid;

use super::{CliError, Devices, VFIO_PCI};
use crate::address::PciAddress;
use crate::functions::{self, Owner, Wish};
use crate::host::Host;
use crate::report;

pub(super) const CREATE_HELP: &str = "\
The host's drivers are kept off the new functions: they are made with sriov_drivers_autoprobe
off, and each is given to its driver by driver_override. If one of the steps fails, the steps
before it are undone.

A function that has as many virtual functions already keeps them; those that are not with DRIVER
are given to it. To change their number, destroy them first: the kernel wants it so.

When vfio-pci drives the physical function itself (its parameter enable_sriov is Y), whoever
uses a virtual one has to know the VF token that is set here: under QEMU vfio-pci,vf-token=UUID.

Examples:
  ringside-vfio create 01:00.0 4                  four, for guests
  ringside-vfio create 01:00.0 4 --driver host    four, as network cards or disks of the host
  ringside-vfio create 01:00.0 2 --driver none    two without a driver, to configure them first

JSON is one object with the list `devices` and, if a token was set, `vf_token`.";

pub(super) const DESTROY_HELP: &str = "\
Refuses while a process has the VFIO file of a virtual function open, or the host itself needs
one for a file system, swap space or its default route.

JSON is one object with the list `devices`: those that were removed.";

/// Options of `create`.
#[derive(Debug, Args)]
pub struct CreateOptions {
    /// The physical function.
    pub pf: PciAddress,

    /// How many virtual functions it is to have; `destroy` removes them.
    #[arg(value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    pub count: u16,

    /// Who is to have them: a driver, `host` for the host's own, `none` for nobody.
    #[arg(long, default_value = VFIO_PCI)]
    pub driver: Owner,

    /// The VF token to set, if vfio-pci drives the physical function [default: a random one].
    #[arg(long, value_name = "UUID")]
    pub vf_token: Option<Uuid>,

    /// Takes existing virtual functions away even from a process or from what the host needs them for.
    #[arg(long)]
    pub force: bool,

    /// Prints JSON in place of a table.
    #[arg(long)]
    pub json: bool,
}

/// Options of `destroy`.
#[derive(Debug, Args)]
pub struct DestroyOptions {
    /// The physical function.
    pub pf: PciAddress,

    /// Removes them even if the host needs them or a process uses them; waits until that lets go.
    #[arg(long)]
    pub force: bool,

    /// Prints JSON in place of text.
    #[arg(long)]
    pub json: bool,
}

pub(super) fn create(
    host: &Host,
    options: &CreateOptions,
    out: &mut impl Write,
    remarks: &mut impl Write,
) -> Result<(), CliError> {
    let wish = Wish {
        pf: options.pf,
        count: options.count,
        owner: options.driver.clone(),
        token: options.vf_token,
        force: options.force,
    };
    let created = functions::create(host, &wish, remarks)?;
    if options.json {
        return report::answer(out, &created).map_err(CliError::Output);
    }
    report::outcomes(out, &created.devices).map_err(CliError::Output)?;
    match created.vf_token {
        Some(token) => writeln!(out, "VF token: {token}").map_err(CliError::Output),
        None => Ok(()),
    }
}

pub(super) fn destroy(
    host: &Host,
    options: &DestroyOptions,
    out: &mut impl Write,
    remarks: &mut impl Write,
) -> Result<(), CliError> {
    let gone = functions::destroy(host, options.pf, options.force, remarks)?;
    let printed = if options.json {
        report::answer(out, &Devices { devices: &gone })
    } else if gone.is_empty() {
        writeln!(out, "{} has no virtual functions", options.pf)
    } else {
        gone.iter().try_for_each(|vf| writeln!(out, "{vf} is gone"))
    };
    printed.map_err(CliError::Output)
}

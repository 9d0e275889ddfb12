//! The command line of `ringside-vfio`.

use std::io::{self, Write};
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};
use serde::Serialize;
use thiserror::Error;
use uuid::Uuid;

use crate::address::PciAddress;
use crate::binding::{self, BindError, Outcome};
use crate::functions::{self, FunctionsError, Owner, Wish, driver_name};
use crate::host::{Host, HostError};
use crate::ids::PciIds;
use crate::inventory::{Inventory, InventoryError, PciDevice, Role};
use crate::report;

/// The driver that hands devices to user space.
const VFIO_PCI: &str = "vfio-pci";

const AFTER_HELP: &str = "\
Exit status: 0 when it is done, 1 when it failed, 2 when the command line is wrong.

Devices are written as 0000:01:10.0, or 01:10.0 in domain 0. What is needed to put devices back is in
/run/ringside-vfio; a run that was killed is completed by the next.

Examples:
  ringside-vfio list                   SR-IOV devices, and whether a guest can have them
  ringside-vfio create 01:00.0 4       makes four virtual functions, ready for guests
  ringside-vfio bind 02:00.0           makes a whole device ready for a guest
  ringside-vfio unbind 02:00.0         gives it back to its former driver
  ringside-vfio destroy 01:00.0        removes the virtual functions";

const LIST_HELP: &str = "\
Columns of the table:
  ADDRESS     domain:bus:device.function
  SR-IOV      PF enabled/possible VFs: a physical function; VF number of PF: a virtual one
  DEVICE      names from the PCI id database (package pci.ids or hwdata), and [vendor:device]
  DRIVER      the driver bound to it, and in parentheses its network interfaces
  GROUP       its IOMMU group, and what else is in it: a group is assigned as a whole
  NUMA        the memory node it is near to
  RESET       how the kernel resets it, in the order of trying; `yes` if an old kernel does not say
  ASSIGNABLE  yes; yes, once bound to vfio-pci; or no, and why not

JSON is one object with the list `devices`; `viability.obstacles` holds the reasons, each with a
`code` that does not change.";

const CREATE_HELP: &str = "\
The host's drivers are kept off the new functions: they are made with sriov_drivers_autoprobe off, and
each is given to its driver by driver_override. If one of the steps fails, the steps before it are undone.

A function that has as many virtual functions already keeps them; those that are not with DRIVER are given
to it. To change their number, destroy them first: the kernel wants it so.

When vfio-pci drives the physical function itself (its parameter enable_sriov is Y), whoever uses
a virtual one has to know the VF token that is set here: under QEMU vfio-pci,vf-token=UUID.

Examples:
  ringside-vfio create 01:00.0 4                  four, for guests
  ringside-vfio create 01:00.0 4 --driver host    four, as network cards or disks of the host
  ringside-vfio create 01:00.0 2 --driver none    two without a driver, to configure them first

JSON is one object with the list `devices` and, if a token was set, `vf_token`.";

const DESTROY_HELP: &str = "\
Refuses while a process has the VFIO file of a virtual function open, or the host itself needs one for a
file system, swap space or its default route.

JSON is one object with the list `devices`: those that were removed.";

const BIND_HELP: &str = "\
Refuses bridges, physical functions whose virtual ones are enabled, and, without --force, whatever carries a
mounted file system, swap space or a default route, be it through LVM, RAID, bonds, bridges or VLANs, and
whatever shares an IOMMU group with it.

Either all the devices are bound or none. The other devices of an IOMMU group have to be bound too, or
be without a driver: `ringside-vfio list` shows them.

Examples:
  ringside-vfio bind 02:00.0
  ringside-vfio bind 03:00.0 03:00.1              a card and its sound device, in one group

JSON is one object with the list `devices`; `changed` is false for what was bound before.";

const UNBIND_HELP: &str = "\
The former driver and driver_override are those from before `bind`. A device that was bound by another program
goes to whichever driver of the host takes it. Refuses while a process uses the device.

JSON is one object with the list `devices`; `changed` is false for what was not bound.";

/// Lists the PCI devices that guests can be given, makes them ready, and gives them back to the host.
#[derive(Debug, Parser)]
#[command(name = "ringside-vfio", version, max_term_width = 100, after_help = AFTER_HELP)]
pub struct Cli {
    /// Looks at the host's files below this directory in place of /.
    #[arg(
        long,
        value_name = "DIR",
        default_value = "/",
        global = true,
        hide_default_value = true
    )]
    pub root: PathBuf,

    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Lists SR-IOV devices: driver, IOMMU group, reset, and whether a guest can have them.
    #[command(after_help = LIST_HELP)]
    List(ListOptions),
    /// Makes virtual functions and gives them to vfio-pci, ready for guests.
    #[command(after_help = CREATE_HELP)]
    Create(CreateOptions),
    /// Takes the virtual functions of a physical one from their drivers and removes them.
    #[command(after_help = DESTROY_HELP)]
    Destroy(DestroyOptions),
    /// Gives devices to vfio-pci, ready for guests.
    #[command(after_help = BIND_HELP)]
    Bind(BindOptions),
    /// Gives devices back to the drivers that had them.
    #[command(after_help = UNBIND_HELP)]
    Unbind(UnbindOptions),
}

/// Options of `list`.
#[derive(Debug, Args)]
pub struct ListOptions {
    /// Lists these devices only, SR-IOV or not. As 0000:01:10.0, or 01:10.0 in domain 0.
    #[arg(value_name = "ADDRESS")]
    pub addresses: Vec<PciAddress>,

    /// Lists every PCI device.
    #[arg(long, conflicts_with = "addresses")]
    pub all: bool,

    /// Prints JSON in place of a table.
    #[arg(long)]
    pub json: bool,

    /// Takes names from this file [default: pci.ids where the distribution puts it].
    #[arg(long, value_name = "FILE")]
    pub pci_ids: Option<PathBuf>,
}

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

/// The command could not be carried out.
#[derive(Debug, Error)]
pub enum CliError {
    /// The devices could not be listed.
    #[error(transparent)]
    Inventory(#[from] InventoryError),
    /// The id database could not be read.
    #[error("the PCI id database cannot be used")]
    Ids(#[source] HostError),
    /// Devices could not be given to a driver, or put back.
    #[error(transparent)]
    Bind(#[from] BindError),
    /// Virtual functions could not be made or removed.
    #[error(transparent)]
    Functions(#[from] FunctionsError),
    /// The result could not be written.
    #[error("the result cannot be written")]
    Output(#[source] io::Error),
}

/// Carries out the command; the result goes to `out`, remarks to `remarks`.
///
/// # Errors
/// [`CliError`], if something failed.
pub fn run(cli: &Cli, out: &mut impl Write, remarks: &mut impl Write) -> Result<(), CliError> {
    run_on(&Host::new(&cli.root), &cli.command, out, remarks)
}

/// Carries out the command on a given host.
///
/// # Errors
/// [`CliError`], if something failed.
pub fn run_on(
    host: &Host,
    command: &Command,
    out: &mut impl Write,
    remarks: &mut impl Write,
) -> Result<(), CliError> {
    match command {
        Command::List(options) => list(host, options, out, remarks),
        Command::Create(options) => create(host, options, out, remarks),
        Command::Destroy(options) => destroy(host, options, out, remarks),
        Command::Bind(options) => bind(host, options, out, remarks),
        Command::Unbind(options) => unbind(host, options, out, remarks),
    }
}

/// The answer of commands that are about devices and nothing else.
#[derive(Debug, Serialize)]
struct Devices<'a, T> {
    devices: &'a [T],
}

fn create(
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

fn destroy(
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

fn bind(
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

fn unbind(
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

fn list(
    host: &Host,
    options: &ListOptions,
    out: &mut impl Write,
    remarks: &mut impl Write,
) -> Result<(), CliError> {
    let ids = match &options.pci_ids {
        Some(path) => PciIds::from_file(path),
        None => PciIds::installed(host),
    };
    let inventory = Inventory::read(host, &ids.map_err(CliError::Ids)?)?;
    let devices: Vec<&PciDevice> = if options.addresses.is_empty() {
        let wanted = |device: &&PciDevice| options.all || device.role != Role::Other;
        inventory.devices().filter(wanted).collect()
    } else {
        let one = |address: &PciAddress| inventory.device(*address);
        options
            .addresses
            .iter()
            .map(one)
            .collect::<Result<_, _>>()?
    };
    if options.json {
        report::json(out, &inventory, &devices).map_err(CliError::Output)
    } else if devices.is_empty() {
        // Not on standard output: an empty list is an empty list.
        let hint = if options.all {
            ""
        } else {
            " with SR-IOV; `--all` lists the others too"
        };
        writeln!(
            remarks,
            "ringside-vfio: this machine has no PCI device{hint}"
        )
        .map_err(CliError::Output)
    } else {
        report::table(out, &inventory, &devices).map_err(CliError::Output)
    }
}

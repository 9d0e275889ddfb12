//! The command line of `ringside-vfio`.

use std::io::{self, Write};
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};
use thiserror::Error;

use crate::address::PciAddress;
use crate::host::{Host, HostError};
use crate::ids::PciIds;
use crate::inventory::{Inventory, InventoryError, PciDevice, Role};
use crate::report;

const AFTER_HELP: &str = "\
Exit status: 0 when it is done, 1 when it failed, 2 when the command line is wrong.

Examples:
  ringside-vfio list                   SR-IOV devices, and whether a guest can have them
  ringside-vfio list --all --json      every PCI device, for programs
  ringside-vfio list 0000:01:10.0      one device";

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

/// Lists the PCI devices that guests can be given, and says what stands in the way of the others.
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

/// The command could not be carried out.
#[derive(Debug, Error)]
pub enum CliError {
    /// The devices could not be listed.
    #[error(transparent)]
    Inventory(#[from] InventoryError),
    /// The id database could not be read.
    #[error("the PCI id database cannot be used")]
    Ids(#[source] HostError),
    /// The result could not be written.
    #[error("the list cannot be written")]
    Output(#[source] io::Error),
}

/// Carries out the command; the result goes to `out`, remarks to `remarks`.
///
/// # Errors
/// [`CliError`], if something failed.
pub fn run(cli: &Cli, out: &mut impl Write, remarks: &mut impl Write) -> Result<(), CliError> {
    let host = Host::new(&cli.root);
    match &cli.command {
        Command::List(options) => list(&host, options, out, remarks),
    }
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

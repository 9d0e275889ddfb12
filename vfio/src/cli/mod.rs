//! The command line of `ringside-vfio`: a file for each command, with its options, its help and its printing.

use std::io::{self, Write};
use std::path::PathBuf;

use clap::{Parser, Subcommand};
use serde::Serialize;
use thiserror::Error;

use crate::address::PciAddress;
use crate::binding::BindError;
use crate::check::CheckError;
use crate::functions::FunctionsError;
use crate::host::{Host, HostError};
use crate::inventory::InventoryError;
use crate::network::NetworkError;
use crate::nvme::NvmeError;

mod binding;
mod check;
mod functions;
mod list;
mod network;
mod nvme;

pub use binding::{BindOptions, UnbindOptions};
pub use check::CheckOptions;
pub use functions::{CreateOptions, DestroyOptions};
pub use list::ListOptions;
pub use network::SetOptions;
pub use nvme::NvmeOptions;

/// The driver that hands devices to user space.
const VFIO_PCI: &str = "vfio-pci";

const AFTER_HELP: &str = "\
Exit status: 0 when it is done, 1 when it failed, 2 when the command line is wrong.

Devices are written as 0000:01:10.0, or 01:10.0 in domain 0. What is needed to put devices back
is in /run/ringside-vfio; a run that was killed is completed by the next.

Examples:
  ringside-vfio list                   SR-IOV devices, and whether a guest can have them
  ringside-vfio create 01:00.0 4       makes four virtual functions, ready for guests
  ringside-vfio set 01:00.0 0 --mac 52:54:00:00:00:01
                                       the address of the first of them
  ringside-vfio check 01:10.0          says whether a guest can have it
  ringside-vfio bind 02:00.0           makes a whole device ready for a guest
  ringside-vfio unbind 02:00.0         gives it back to its former driver
  ringside-vfio destroy 01:00.0        removes the virtual functions";

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
    #[command(after_help = list::LIST_HELP)]
    List(ListOptions),
    /// Makes virtual functions and gives them to vfio-pci, ready for guests.
    #[command(after_help = functions::CREATE_HELP)]
    Create(CreateOptions),
    /// Takes the virtual functions of a physical one from their drivers and removes them.
    #[command(after_help = functions::DESTROY_HELP)]
    Destroy(DestroyOptions),
    /// Gives devices to vfio-pci, ready for guests.
    #[command(after_help = binding::BIND_HELP)]
    Bind(BindOptions),
    /// Gives devices back to the drivers that had them.
    #[command(after_help = binding::UNBIND_HELP)]
    Unbind(UnbindOptions),
    /// Says whether a guest can have a device, and how to mend what keeps it from that.
    #[command(after_help = check::CHECK_HELP)]
    Check(CheckOptions),
    /// Changes settings of a virtual function that is a network card.
    #[command(after_help = network::SET_HELP)]
    Set(SetOptions),
    /// Shows an NVMe controller's virtual functions, or gives one queues, interrupts and a namespace.
    #[command(after_help = nvme::NVME_HELP)]
    Nvme(NvmeOptions),
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
    /// The device could not be checked.
    #[error(transparent)]
    Check(#[from] CheckError),
    /// A guest cannot have the device; the findings say why.
    #[error("{0} cannot be given to a guest as it is")]
    Unusable(PciAddress),
    /// The settings of virtual functions could not be changed.
    #[error(transparent)]
    Network(#[from] NetworkError),
    /// The kernel refused settings; the answer says which.
    #[error("{address} did not get: {}", settings.join(", "))]
    Refused {
        /// The virtual function.
        address: PciAddress,
        /// The settings.
        settings: Vec<&'static str>,
    },
    /// An NVMe controller could not be asked or changed.
    #[error(transparent)]
    Nvme(#[from] NvmeError),
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
        Command::List(options) => list::list(host, options, out, remarks),
        Command::Create(options) => functions::create(host, options, out, remarks),
        Command::Destroy(options) => functions::destroy(host, options, out, remarks),
        Command::Bind(options) => binding::bind(host, options, out, remarks),
        Command::Unbind(options) => binding::unbind(host, options, out, remarks),
        Command::Check(options) => check::check(host, options, out),
        Command::Set(options) => network::set(host, options, out, remarks),
        Command::Nvme(options) => nvme::nvme(host, options, out, remarks),
    }
}

/// The answer of commands that are about devices and nothing else.
#[derive(Debug, Serialize)]
struct Devices<'a, T> {
    devices: &'a [T],
}

//! `ringside-vfio list`.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::PathBuf;

use clap::Args;

use super::CliError;
use crate::address::PciAddress;
use crate::host::Host;
use crate::ids::PciIds;
use crate::inventory::{Inventory, PciDevice, Role};
use crate::{network, report};

pub(super) const LIST_HELP: &str = "\
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
`code` that does not change. `settings` of virtual functions that are network cards are those of
`ringside-vfio set`.";

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

pub(super) fn list(
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
        let settings: BTreeMap<_, _> = network::all(host, &inventory).into_iter().collect();
        report::json(out, &inventory, &devices, &settings).map_err(CliError::Output)
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

//! `ringside-vfio nvme`.

use std::io::{self, Write};

use clap::Args;

use super::CliError;
use crate::address::PciAddress;
use crate::host::Host;
use crate::nvme::admin::{Capacity, Secondary};
use crate::nvme::{self, Controllers, Wish};
use crate::report;
use crate::vf::VfName;

pub(super) const NVME_HELP: &str = "\
A virtual function of an NVMe controller is a secondary controller. It works once it has queues
and interrupts of those that are flexible, is online and has a namespace attached. Two queues
are one for admin commands and one for reads and writes. The physical function has to be driven
by nvme.

With VF, its controller goes offline, gets what is asked for, and goes online. If that fails it
gets back what it had.

Examples:
  ringside-vfio nvme 01:00.0                                     what there is, and who has it
  ringside-vfio create 01:00.0 1                                 first of all: a virtual function
  ringside-vfio nvme 01:00.0 0 --queues 2 --interrupts 2 --attach 2

JSON of the list is one object with `primary` and the list `secondaries`, otherwise the one
secondary controller. `vf` counts from 1 there, as the controller does.";

/// Options of `nvme`.
#[derive(Debug, Args)]
pub struct NvmeOptions {
    /// The physical function.
    pub pf: PciAddress,

    /// The virtual function to give something: its number or its address.
    #[arg(requires_all = ["queues", "interrupts"])]
    pub vf: Option<VfName>,

    /// How many queues it is to have, the admin queue among them: at least 2.
    #[arg(long, value_name = "N", requires = "vf", value_parser = clap::value_parser!(u16).range(2..))]
    pub queues: Option<u16>,

    /// How many interrupts it is to have: at least 1.
    #[arg(long, value_name = "N", requires = "vf", value_parser = clap::value_parser!(u16).range(1..))]
    pub interrupts: Option<u16>,

    /// A namespace to attach to it.
    #[arg(long, value_name = "NSID", requires = "vf", value_parser = clap::value_parser!(u32).range(1..))]
    pub attach: Option<u32>,

    /// Takes it offline even if the host needs it or a process uses it.
    #[arg(long, requires = "vf")]
    pub force: bool,

    /// Prints JSON in place of tables.
    #[arg(long)]
    pub json: bool,
}

pub(super) fn nvme(
    host: &Host,
    options: &NvmeOptions,
    out: &mut impl Write,
    remarks: &mut impl Write,
) -> Result<(), CliError> {
    let printed = match (options.vf, options.queues, options.interrupts) {
        (Some(vf), Some(queues), Some(interrupts)) => {
            let wish = Wish {
                queues,
                interrupts,
                namespace: options.attach,
                force: options.force,
            };
            let secondary = nvme::assign(host, options.pf, vf, &wish, remarks)?;
            if options.json {
                report::answer(out, &secondary)
            } else {
                secondaries(out, &[secondary])
            }
        }
        _ => {
            let controllers = nvme::list(host, options.pf)?;
            if options.json {
                report::answer(out, &controllers)
            } else {
                table(out, &controllers)
            }
        }
    };
    printed.map_err(CliError::Output)
}

fn table(out: &mut impl Write, controllers: &Controllers) -> io::Result<()> {
    let primary = &controllers.primary;
    writeln!(
        out,
        "{}: primary controller {}",
        controllers.controller, primary.id
    )?;
    let headings = ["", "FLEXIBLE", "ASSIGNED", "OWN", "MOST"];
    let mut rows = vec![headings.map(str::to_owned)];
    for (name, capacity) in [
        ("queues", primary.queues),
        ("interrupts", primary.interrupts),
    ] {
        rows.push(capacity.map_or_else(
            || [name, "-", "-", "-", "-"].map(str::to_owned),
            |capacity| row(name, &capacity),
        ));
    }
    report::columns(out, &rows)?;
    secondaries(out, &controllers.secondaries)
}

fn row(name: &str, capacity: &Capacity) -> [String; 5] {
    let own = u32::from(capacity.primary_private) + u32::from(capacity.primary_flexible);
    [
        name.to_owned(),
        capacity.flexible.to_string(),
        capacity.assigned.to_string(),
        own.to_string(),
        capacity.most.to_string(),
    ]
}

fn secondaries(out: &mut impl Write, list: &[Secondary]) -> io::Result<()> {
    let headings = ["CONTROLLER", "VF", "STATE", "QUEUES", "INTERRUPTS"];
    let mut rows = vec![headings.map(str::to_owned)];
    rows.extend(list.iter().map(|one| {
        let state = if one.online { "online" } else { "offline" };
        [
            one.id.to_string(),
            // As `ringside-vfio list` counts them.
            one.vf
                .checked_sub(1)
                .map_or_else(|| "-".to_owned(), |vf| vf.to_string()),
            state.to_owned(),
            one.queues.to_string(),
            one.interrupts.to_string(),
        ]
    }));
    report::columns(out, &rows)
}

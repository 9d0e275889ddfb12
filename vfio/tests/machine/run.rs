//! Commands on made-up machines, as the command line gives them.

use std::sync::Arc;

use clap::Parser;
use ringside_vfio::cli::{Cli, run_on};
use ringside_vfio::host::Host;
use serde_json::Value;

use super::Machine;
use super::kernel::{FakeKernel, Trouble};

pub(crate) const PF: &str = "0000:01:00.0";
pub(crate) const DISK: &str = "0000:02:00.0";

/// What a command printed and did.
pub(crate) struct Done {
    pub(crate) error: Option<String>,
    pub(crate) out: String,
    pub(crate) remarks: String,
    pub(crate) changes: Vec<String>,
}

impl Done {
    #[track_caller]
    pub(crate) fn well(self) -> Self {
        assert_eq!(self.error, None, "{}{:#?}", self.remarks, self.changes);
        self
    }

    #[track_caller]
    pub(crate) fn badly(self) -> String {
        self.error.unwrap()
    }

    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.out).unwrap()
    }
}

pub(crate) fn run_in(machine: &Machine, line: &str, trouble: Trouble) -> Done {
    run_under(
        machine,
        line,
        &Arc::new(FakeKernel::new(machine.root(), trouble)),
    )
}

/// Runs a command under a kernel that goes on living.
pub(crate) fn run_under(machine: &Machine, line: &str, kernel: &Arc<FakeKernel>) -> Done {
    let before = kernel.log.lock().unwrap().len();
    let host = Host::with_kernel(machine.root(), kernel.clone());
    let words = ["ringside-vfio"].into_iter().chain(line.split(' '));
    let cli = Cli::try_parse_from(words).unwrap();
    let (mut out, mut remarks) = (Vec::new(), Vec::new());
    let result = run_on(&host, &cli.command, &mut out, &mut remarks);
    let changes = kernel.log.lock().unwrap()[before..].to_vec();
    Done {
        error: result.err().map(|error| {
            let mut text = error.to_string();
            let mut error: &dyn std::error::Error = &error;
            while let Some(source) = error.source() {
                text = format!("{text}: {source}");
                error = source;
            }
            text
        }),
        out: String::from_utf8(out).unwrap(),
        remarks: String::from_utf8(remarks).unwrap(),
        changes,
    }
}

pub(crate) fn run(machine: &Machine, line: &str) -> Done {
    run_in(machine, line, Trouble::Nothing)
}

/// A network card without virtual functions, and a disk controller; vfio-pci is a module.
pub(crate) fn machine() -> Machine {
    let machine = Machine::new();
    for driver in ["igb", "igbvf", "nvme", "pcieport"] {
        machine.driver_exists(driver);
    }
    machine.put("lib/modules/vfio-pci", "");
    machine.device("0000:00:03.0", "1b36:000c", "060400");
    machine.driver("0000:00:03.0", "pcieport");
    machine.group("0000:00:03.0", 3);
    for (device, class, group, driver) in [(PF, "020000", 4, "igb"), (DISK, "010802", 9, "nvme")] {
        machine.device(device, "8086:10c9", class);
        machine.attribute(device, "made_for", driver);
        machine.attribute(device, "driver_override", "(null)\n");
        machine.driver(device, driver);
        machine.group(device, group);
    }
    machine.attribute(PF, "sriov_totalvfs", "7\n");
    machine.attribute(PF, "sriov_numvfs", "0\n");
    machine.attribute(PF, "sriov_drivers_autoprobe", "1\n");
    machine
}

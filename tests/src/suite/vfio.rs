//! SR-IOV devices as ringside-vfio sees them.

use std::fs;
use std::time::Duration;

use serde_json::Value;

use super::Test;
use crate::command;
use crate::ensure;
use crate::error::{Doing, LabError, Result};
use crate::site::{Place, Site};

pub(super) const TESTS: &[Test] = &[Test {
    name: "vfio::lists_virtual_functions",
    seconds: 30,
    run: lists_virtual_functions,
}];

/// Two virtual functions of the lab's network card, each in an IOMMU group of its own, so that a guest could have them.
fn lists_virtual_functions(site: &Site) -> Result<()> {
    if site.place != Place::Lab {
        return Err(LabError::Skipped(
            "a machine's own SR-IOV devices are left alone".into(),
        ));
    }
    command::run_line("modprobe igb")?;
    let list = |arguments: &[&str]| -> Result<String> {
        let mut program = site.program("ringside-vfio");
        command::run(
            program.arg("list").args(arguments),
            site.limit(Duration::from_secs(5)),
        )
    };
    let devices = |text: &str| -> Result<Vec<Value>> {
        serde_json::from_str::<Value>(text)
            .ok()
            .and_then(|answer| answer.get("devices")?.as_array().cloned())
            .ok_or_else(|| LabError::Protocol {
                from: "ringside-vfio",
                text: text.into(),
            })
    };
    let before = devices(&list(&["--json"])?)?;
    // The NVMe controller has SR-IOV too.
    let pf = before
        .iter()
        .find(|device| device.get("driver") == Some(&"igb".into()))
        .and_then(|device| device.get("address")?.as_str())
        .ok_or_else(|| LabError::Check("the lab's network card is not listed".into()))?;
    let switch = format!("/sys/bus/pci/devices/{pf}/sriov_numvfs");
    fs::write(&switch, "2").doing(|| format!("write {switch}"))?;
    let table = list(&[]);
    let text = list(&["--json"]);
    fs::write(&switch, "0").doing(|| format!("write {switch}"))?;
    let after = devices(&text?)?;
    let table = table?;
    print!("{table}");
    let groups: Vec<&Value> = after
        .iter()
        .filter(|device| device.get("kind") == Some(&"vf".into()))
        .filter_map(|device| device.pointer("/iommu_group/members"))
        .collect();
    ensure!(
        after.len() == before.len() + 2 && groups.len() == 2,
        "{} devices before and {} virtual functions after 2 were made:\n{table}",
        before.len(),
        groups.len()
    );
    ensure!(
        groups
            .iter()
            .all(|members| members.as_array().is_some_and(|list| list.len() == 1)),
        "a virtual function shares its IOMMU group:\n{table}"
    );
    Ok(())
}

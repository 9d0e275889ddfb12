//! What `ringside-vfio` prints: tables for people, JSON for programs.

use std::collections::BTreeMap;
use std::io::{self, Write};

use serde::Serialize;

use crate::address::PciAddress;
use crate::binding::Outcome;
use crate::inventory::{Inventory, PciDevice, Role};
use crate::network::VfSettings;
use crate::viability::{Viability, judge};

/// A function, the judgement on it, and its settings if it is a virtual one of a network card.
#[derive(Debug, Serialize)]
struct Entry<'a> {
    #[serde(flatten)]
    device: &'a PciDevice,
    viability: Viability,
    #[serde(skip_serializing_if = "Option::is_none")]
    settings: Option<&'a VfSettings>,
}

/// The whole answer. Fields are added, never renamed or removed.
#[derive(Debug, Serialize)]
struct Answer<'a> {
    devices: Vec<Entry<'a>>,
}

/// Writes the functions as one JSON object with the list `devices`.
///
/// # Errors
/// Only when `out` cannot be written.
pub fn json(
    out: &mut impl Write,
    inventory: &Inventory,
    devices: &[&PciDevice],
    settings: &BTreeMap<PciAddress, VfSettings>,
) -> io::Result<()> {
    let entries = devices.iter().map(|device| Entry {
        device,
        viability: judge(device, inventory),
        settings: settings.get(&device.address),
    });
    let answer = Answer {
        devices: entries.collect(),
    };
    self::answer(out, &answer)
}

/// Writes an answer as JSON.
///
/// # Errors
/// Only when `out` cannot be written.
pub fn answer(out: &mut impl Write, answer: &impl Serialize) -> io::Result<()> {
    serde_json::to_writer_pretty(&mut *out, answer)?;
    writeln!(out)
}

/// Writes what became of devices as a table, one line each.
///
/// # Errors
/// Only when `out` cannot be written.
pub fn outcomes(out: &mut impl Write, outcomes: &[Outcome]) -> io::Result<()> {
    let none = || "-".to_owned();
    let mut rows = vec![["ADDRESS", "GROUP", "DRIVER"].map(str::to_owned)];
    rows.extend(outcomes.iter().map(|outcome| {
        [
            outcome.address.to_string(),
            outcome.group.map_or_else(none, |group| group.to_string()),
            outcome.driver.clone().unwrap_or_else(none),
        ]
    }));
    columns(out, &rows)
}

/// Writes lines whose cells stand below each other.
pub(crate) fn columns<const N: usize>(
    out: &mut impl Write,
    rows: &[[String; N]],
) -> io::Result<()> {
    let mut widths = [0; N];
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = cell.chars().count().max(*width);
        }
    }
    for row in rows {
        let mut line = String::new();
        for (cell, width) in row.iter().zip(widths) {
            line.push_str(&format!("{cell:width$}  "));
        }
        writeln!(out, "{}", line.trim_end())?;
    }
    Ok(())
}

const HEADINGS: [&str; 8] = [
    "ADDRESS",
    "SR-IOV",
    "DEVICE",
    "DRIVER",
    "GROUP",
    "NUMA",
    "RESET",
    "ASSIGNABLE",
];

/// Writes the functions as a table, one line each.
///
/// # Errors
/// Only when `out` cannot be written.
pub fn table(
    out: &mut impl Write,
    inventory: &Inventory,
    devices: &[&PciDevice],
) -> io::Result<()> {
    let mut rows = vec![HEADINGS.map(str::to_owned)];
    rows.extend(
        devices
            .iter()
            .map(|device| row(device, &judge(device, inventory))),
    );
    columns(out, &rows)
}

fn row(device: &PciDevice, viability: &Viability) -> [String; HEADINGS.len()] {
    let none = || "-".to_owned();
    let role = match &device.role {
        Role::Pf {
            vfs_total,
            vfs_enabled,
            ..
        } => format!("PF {vfs_enabled}/{vfs_total} VFs"),
        Role::Vf {
            pf,
            index: Some(index),
        } => format!("VF {index} of {pf}"),
        Role::Vf { pf, index: None } => format!("VF of {pf}"),
        Role::Other => none(),
    };
    let driver = match (&device.driver, device.interfaces.as_slice()) {
        (Some(driver), []) => driver.clone(),
        (Some(driver), interfaces) => format!("{driver} ({})", interfaces.join(", ")),
        (None, _) => none(),
    };
    let group = device.iommu_group.as_ref().map_or_else(none, |group| {
        let others = group
            .members
            .iter()
            .filter(|member| **member != device.address);
        let others: Vec<_> = others.map(ToString::to_string).collect();
        if others.is_empty() {
            group.id.to_string()
        } else {
            format!("{} with {}", group.id, others.join(", "))
        }
    });
    let reset = match device.reset.methods.as_slice() {
        [] if device.reset.possible => "yes".to_owned(),
        [] => "no".to_owned(),
        methods => methods.join(","),
    };
    [
        device.address.to_string(),
        role,
        name(device),
        driver,
        group,
        device.numa_node.map_or_else(none, |node| node.to_string()),
        reset,
        assignable(viability),
    ]
}

/// As much of the name as is known, and always the ids.
fn name(device: &PciDevice) -> String {
    let ids = format!("[{:04x}:{:04x}]", device.vendor, device.device);
    let named = match (&device.vendor_name, &device.device_name) {
        (Some(vendor), Some(name)) => Some(format!("{vendor} {name}")),
        (Some(vendor), None) => match &device.class_name {
            Some(class) => Some(format!("{vendor} {class}")),
            None => Some(vendor.clone()),
        },
        (None, _) => device.class_name.clone(),
    };
    named.map_or_else(|| ids.clone(), |name| format!("{name} {ids}"))
}

fn assignable(viability: &Viability) -> String {
    if !viability.viable {
        let reasons: Vec<_> = viability
            .obstacles
            .iter()
            .map(ToString::to_string)
            .collect();
        format!("no: {}", reasons.join("; "))
    } else if viability.bound {
        "yes".to_owned()
    } else {
        "yes, once bound to vfio-pci".to_owned()
    }
}

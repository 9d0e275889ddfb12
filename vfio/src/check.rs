//! Looks for everything that could keep a guest from using a device, and says how to mend it.
//!
//! Whether interrupts are remapped is read off the names of the interrupt controllers in `/proc/interrupts`: the
//! kernel puts `IR-` before the names of those whose interrupts go through the IOMMU, Intel's and AMD's alike.
//! The capability bit in `/sys/class/iommu` says only that the hardware could, and the kernel's log may not be
//! readable or long gone.

use serde::Serialize;
use thiserror::Error;

use nix::unistd::{AccessFlags, access};

use crate::address::PciAddress;
use crate::host::{Host, HostError};
use crate::ids::PciIds;
use crate::inventory::{Inventory, InventoryError, PciDevice, Role};
use crate::occupancy::{Occupancy, users};
use crate::viability::{Obstacle, is_vfio, judge};

/// CAP_IPC_LOCK, the capability to lock memory without limit (Linux, include/uapi/linux/capability.h).
const CAP_IPC_LOCK: u32 = 14;

/// Mappings that a guest needs at most if it has no IOMMU of its own: a few for its RAM, one for each BAR of
/// other devices that it may write to by DMA.
const FEW_MAPPINGS: u32 = 1024;

/// The parameters of VFIO containers.
const TYPE1: &str = "sys/module/vfio_iommu_type1/parameters";

/// The device could not be checked.
#[derive(Debug, Error)]
pub enum CheckError {
    /// The devices could not be listed, or it is not there.
    #[error(transparent)]
    Inventory(#[from] InventoryError),
    /// A file could not be read.
    #[error(transparent)]
    Host(#[from] HostError),
}

/// How good or bad a finding is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Level {
    /// As it should be.
    Ok,
    /// It works, with a flaw or a condition.
    Warn,
    /// A guest cannot have the device.
    Fail,
}

impl Level {
    /// Its name.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Warn => "warn",
            Self::Fail => "fail",
        }
    }
}

/// One thing that was looked at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// What was looked at; does not change from version to version.
    pub code: &'static str,
    /// How it is.
    pub level: Level,
    /// What was found.
    pub message: String,
    /// How to mend it, if there is something to mend.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub remedy: Option<String>,
}

/// All findings about one device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Checked {
    /// The device.
    pub address: PciAddress,
    /// None of the findings is a failure.
    pub usable: bool,
    /// What was found.
    pub findings: Vec<Finding>,
}

fn ok(code: &'static str, message: impl Into<String>) -> Finding {
    Finding {
        code,
        level: Level::Ok,
        message: message.into(),
        remedy: None,
    }
}

fn flaw(
    level: Level,
    code: &'static str,
    message: impl Into<String>,
    remedy: impl Into<String>,
) -> Finding {
    Finding {
        code,
        level,
        message: message.into(),
        remedy: Some(remedy.into()),
    }
}

fn warn(code: &'static str, message: impl Into<String>, remedy: impl Into<String>) -> Finding {
    flaw(Level::Warn, code, message, remedy)
}

fn fail(code: &'static str, message: impl Into<String>, remedy: impl Into<String>) -> Finding {
    flaw(Level::Fail, code, message, remedy)
}

/// Checks one device for a guest with so many bytes of memory, by a VMM that runs as this process does.
///
/// # Errors
/// [`CheckError`], if the device is not there or a file that is there cannot be read.
pub fn check(host: &Host, address: PciAddress, memory: Option<u64>) -> Result<Checked, CheckError> {
    let inventory = Inventory::read(host, &PciIds::default())?;
    let device = inventory.device(address)?;
    let mut findings = vec![iommu(device)];
    findings.extend(interrupt_remapping(host)?);
    findings.push(modules(host));
    findings.extend(viability(device, &inventory));
    findings.push(driver(device));
    findings.extend(permission(host, device));
    findings.push(locked_memory(host, memory)?);
    findings.extend(mappings(host)?);
    findings.push(reset(device));
    findings.push(in_use(host, device)?);
    findings.extend(needed(&Occupancy::read(host)?, device));
    findings.extend(token(device, &inventory));
    Ok(Checked {
        address,
        usable: findings.iter().all(|finding| finding.level != Level::Fail),
        findings,
    })
}

fn iommu(device: &PciDevice) -> Finding {
    match &device.iommu_group {
        Some(group) if group.no_iommu => fail(
            "iommu",
            "VFIO's no-IOMMU mode is on: the device's DMA reaches all of the host's memory",
            "switch the IOMMU on in the firmware, and enable_unsafe_noiommu_mode of the module vfio off",
        ),
        Some(group) => ok(
            "iommu",
            format!("an IOMMU translates its DMA (group {})", group.id),
        ),
        None => fail(
            "iommu",
            "no IOMMU translates its DMA",
            "switch the IOMMU on in the firmware, and on Intel machines on the kernel's command line too (intel_iommu=on)",
        ),
    }
}

fn interrupt_remapping(host: &Host) -> Result<Option<Finding>, HostError> {
    let code = "interrupt-remapping";
    let interrupts = host.text("proc/interrupts")?.unwrap_or_default();
    let chip = |name: &str| {
        interrupts.lines().any(|line| {
            line.split_whitespace()
                .any(|word| word.strip_prefix(name).is_some_and(is_chip))
        })
    };
    if chip("IR-") {
        return Ok(Some(ok(code, "the IOMMU remaps interrupts")));
    }
    let unsafe_allowed = host.text(format!("{TYPE1}/allow_unsafe_interrupts"))?;
    let remedy = "switch on interrupt remapping (x2APIC, VT-d interrupt remapping) in the firmware, and leave \
                  intremap=off and nointremap off the kernel's command line";
    Ok(if unsafe_allowed.as_deref() == Some("Y") {
        Some(warn(
            code,
            "interrupts are not remapped, and vfio_iommu_type1 allows that: a guest can raise any interrupt of the host",
            remedy,
        ))
    } else if chip("") {
        Some(fail(
            code,
            "interrupts are not remapped, so VFIO refuses the device",
            remedy,
        ))
    } else {
        // No interrupt controller of this architecture is known here: VFIO itself is the judge.
        None
    })
}

/// Whether a word in `/proc/interrupts` names an interrupt controller whose interrupts can be remapped.
fn is_chip(name: &str) -> bool {
    name.starts_with("IO-APIC") || name.starts_with("PCI-MSI")
}

fn modules(host: &Host) -> Finding {
    let missing: Vec<&str> = [
        ("vfio-pci", "sys/bus/pci/drivers/vfio-pci"),
        // The driver's container, or the IOMMU's own interface, opens the device.
        ("vfio_iommu_type1", "dev/vfio/vfio"),
    ]
    .into_iter()
    .filter(|(_, place)| !host.has(place))
    .map(|(name, _)| name)
    .collect();
    if missing.is_empty() {
        ok("modules", "the VFIO modules are loaded")
    } else {
        fail(
            "modules",
            format!("not loaded: {}", missing.join(", ")),
            "run `modprobe vfio-pci`; `ringside-vfio bind` does so too",
        )
    }
}

fn viability(device: &PciDevice, inventory: &Inventory) -> Vec<Finding> {
    let obstacles: Vec<_> = judge(device, inventory)
        .obstacles
        .into_iter()
        // What the IOMMU does was looked at before.
        .filter(|obstacle| !matches!(obstacle, Obstacle::NoIommu | Obstacle::Unconfined))
        .map(|obstacle| {
            let code = match obstacle {
                Obstacle::GroupMember { .. } => "group",
                _ => "kind",
            };
            let remedy = match &obstacle {
                Obstacle::Bridge => "choose a device behind it".to_owned(),
                Obstacle::VfsEnabled { .. } => {
                    format!("choose a virtual function, or run `ringside-vfio destroy {}`", device.address)
                }
                Obstacle::GroupMember { member, .. } => format!(
                    "run `ringside-vfio bind {member}` if the host can do without it, or move one of them to another slot"
                ),
                Obstacle::NoIommu | Obstacle::Unconfined => String::new(),
            };
            fail(code, format!("it {obstacle}"), remedy)
        })
        .collect();
    if obstacles.is_empty() {
        vec![ok("group", "nothing of the host's is in its IOMMU group")]
    } else {
        obstacles
    }
}

fn driver(device: &PciDevice) -> Finding {
    let remedy = format!("run `ringside-vfio bind {}`", device.address);
    match device.driver.as_deref() {
        Some(driver) if is_vfio(driver) => ok("driver", format!("bound to {driver}")),
        Some(driver) => fail("driver", format!("bound to {driver}"), remedy),
        None => fail("driver", "bound to no driver", remedy),
    }
}

/// Whether this user may open the group. Its file is there once all of the group is bound.
fn permission(host: &Host, device: &PciDevice) -> Option<Finding> {
    let group = device.iommu_group.as_ref()?;
    let path = format!("dev/vfio/{}", group.file_name());
    if !host.has(&path) {
        return None;
    }
    let both = AccessFlags::R_OK | AccessFlags::W_OK;
    Some(match access(&host.path(&path), both) {
        Ok(()) => ok("permission", format!("this user may open /{path}")),
        Err(errno) => fail(
            "permission",
            format!("this user may not open /{path}: {errno}"),
            format!("run `chown USER /{path}`, or write a udev rule for SUBSYSTEM==\"vfio\""),
        ),
    })
}

/// Writes a number of bytes for people.
fn bytes(number: u64) -> String {
    for (shift, unit) in [(30, "GiB"), (20, "MiB"), (10, "KiB")] {
        let whole = number >> shift;
        if whole >= 10 || (whole > 0 && number == whole << shift) {
            return format!("{whole} {unit}");
        }
    }
    format!("{number} bytes")
}

/// All of a guest's memory is locked, as the device may write to any of it at any time.
fn locked_memory(host: &Host, memory: Option<u64>) -> Result<Finding, HostError> {
    let code = "locked-memory";
    let status = host.text("proc/self/status")?.unwrap_or_default();
    let capabilities = status
        .lines()
        .find_map(|line| line.strip_prefix("CapEff:"))
        .and_then(|digits| u64::from_str_radix(digits.trim(), 16).ok());
    if capabilities.is_some_and(|set| set >> CAP_IPC_LOCK & 1 != 0) {
        return Ok(ok(
            code,
            "this user may lock any amount of memory (CAP_IPC_LOCK)",
        ));
    }
    let limits = host.text("proc/self/limits")?.unwrap_or_default();
    let limit = limits
        .lines()
        .find_map(|line| line.strip_prefix("Max locked memory"))
        .and_then(|rest| rest.split_whitespace().next());
    let limit = match limit {
        None => {
            return Ok(warn(
                code,
                "it is not known how much memory may be locked",
                "see `ulimit -l`",
            ));
        }
        Some("unlimited") => return Ok(ok(code, "this user may lock any amount of memory")),
        Some(limit) => limit.parse().unwrap_or(0),
    };
    let may = format!("this user may lock {}", bytes(limit));
    let remedy = "raise the limit: LimitMEMLOCK=infinity in the unit, memlock in /etc/security/limits.conf, \
                  or `prlimit --memlock`";
    Ok(match memory {
        Some(memory) if limit < memory => fail(
            code,
            format!("{may}, and the guest's {} have to be", bytes(memory)),
            remedy,
        ),
        Some(memory) => ok(
            code,
            format!("{may}, enough for the guest's {}", bytes(memory)),
        ),
        None => warn(
            code,
            format!("{may}: a guest's memory can be no larger (--memory SIZE checks a size)"),
            remedy,
        ),
    })
}

fn mappings(host: &Host) -> Result<Option<Finding>, HostError> {
    let code = "dma-entry-limit";
    let file = format!("{TYPE1}/dma_entry_limit");
    // The parameter is unsigned and 32 bits long.
    let limit = host.number::<u32>(file, "a number of mappings")?;
    Ok(limit.map(|limit| {
        let message = format!("a container can have {limit} DMA mappings");
        if limit < FEW_MAPPINGS {
            warn(
                code,
                message,
                "load vfio_iommu_type1 with a larger dma_entry_limit (65535 is the kernel's default)",
            )
        } else {
            ok(code, message)
        }
    }))
}

fn reset(device: &PciDevice) -> Finding {
    match device.reset.methods.as_slice() {
        [] if !device.reset.possible => warn(
            "reset",
            "the kernel cannot reset it: a guest gets it as the one before has left it",
            "give it to one guest only, and power-cycle the host in between",
        ),
        [] => ok("reset", "it can be reset"),
        methods => ok("reset", format!("it can be reset: {}", methods.join(", "))),
    }
}

fn in_use(host: &Host, device: &PciDevice) -> Result<Finding, HostError> {
    let users = users(host, device)?;
    let pids: Vec<_> = users.pids.iter().map(ToString::to_string).collect();
    Ok(if !pids.is_empty() {
        fail(
            "in-use",
            format!("process {} has it", pids.join(", ")),
            "end that process, or choose another device",
        )
    } else if users.complete {
        ok("in-use", "no process has it")
    } else {
        ok(
            "in-use",
            "no process of this user has it; others cannot be looked into",
        )
    })
}

fn needed(occupancy: &Occupancy, device: &PciDevice) -> Vec<Finding> {
    let needed: Vec<_> = occupancy
        .of(device.address)
        .map(|what| {
            fail(
                "host-needs-it",
                format!("it carries {what}"),
                "move that elsewhere, or choose another device",
            )
        })
        .collect();
    if needed.is_empty() {
        vec![ok(
            "host-needs-it",
            "it carries no mounted file system, swap space or default route",
        )]
    } else {
        needed
    }
}

/// Virtual functions of a physical one that a user has as well are opened with a secret of that user's.
fn token(device: &PciDevice, inventory: &Inventory) -> Option<Finding> {
    let Role::Vf { pf, .. } = device.role else {
        return None;
    };
    let driver = inventory.get(pf)?.driver.as_deref()?;
    is_vfio(driver).then(|| {
        warn(
            "vf-token",
            format!(
                "its physical function {pf} is bound to {driver}: opening it takes the VF token"
            ),
            format!(
                "give the VMM the token that was set for {pf} (`ringside-vfio create` prints it)"
            ),
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_for_people() {
        for (number, text) in [
            (0, "0 bytes"),
            (1023, "1023 bytes"),
            (1024, "1 KiB"),
            (8_388_608, "8 MiB"),
            (1 << 30, "1 GiB"),
            (3 << 29, "1536 MiB"),
            (100 << 30, "100 GiB"),
        ] {
            assert_eq!(bytes(number), text);
        }
    }
}

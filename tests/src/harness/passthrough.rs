//! The lab VM's devices that a guest can be given: found by what they are, made ready by ringside-vfio, given back when the value
//! goes. A guest that has one is to be dropped before: declare it after.

use std::fs;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::command;
use crate::error::{Doing, LabError, Result};
use crate::setup::sorted_names;
use crate::site::{Place, Site};

/// Where sysfs has the PCI functions.
const DEVICES: &str = "/sys/bus/pci/devices";
/// How long one run of ringside-vfio may take, on plain hardware.
const COMMAND_LIMIT: Duration = Duration::from_secs(10);
/// How long a driver may take to show its device, on plain hardware.
const DRIVER_LIMIT: Duration = Duration::from_secs(5);
/// How often something is looked for.
const POLL: Duration = Duration::from_millis(50);

/// A device of the lab VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Device {
    /// Intel 82576, a network card with SR-IOV; driver igb, and igbvf for its virtual functions. MSI-X.
    Igb,
    /// Intel 82574L, a network card without; driver e1000e, whose parameter `IntMode` is 0 for INTx and 2 for MSI-X (for 1, MSI,
    /// the driver finds that QEMU's card does not interrupt, and falls back to INTx). On one cable with the 82576.
    E1000e,
    /// QEMU's NVMe controller with SR-IOV; driver nvme. MSI-X.
    Nvme,
    /// An AHCI controller with a disk of 1 GiB; driver ahci. MSI without MSI-X; INTx with `pci=nomsi`. Has a BAR in I/O space.
    Sata,
    /// QEMU's device for lessons (docs/specs/edu.rst), which reads and writes memory where it is told to; no driver. MSI, INTx.
    Edu,
}

impl Device {
    /// Vendor and device of its PCI header.
    #[must_use]
    pub fn id(self) -> PciId {
        let (vendor, device) = match self {
            Self::Igb => (0x8086, 0x10c9),
            Self::E1000e => (0x8086, 0x10d3),
            Self::Nvme => (0x1b36, 0x0010),
            Self::Sata => (0x8086, 0x2922),
            Self::Edu => (0x1234, 0x11e8),
        };
        PciId { vendor, device }
    }

    /// Finds it; gives its address.
    ///
    /// # Errors
    /// Skips the test outside of the lab VM: a machine's own devices are left alone. Fails if it is not there.
    pub fn find(self, site: &Site) -> Result<String> {
        if site.place != Place::Lab {
            return Err(LabError::Skipped(
                "a machine's own devices are left alone".into(),
            ));
        }
        let id = self.id();
        let entries = fs::read_dir(DEVICES).doing(|| format!("read {DEVICES}"))?;
        let mut addresses: Vec<String> = entries
            .flatten()
            .filter(|entry| PciId::of(&entry.path()) == Some(id))
            .map(|entry| entry.file_name().to_string_lossy().into_owned())
            // What is on bus 0 belongs to the machine itself: it has an AHCI controller, too.
            .filter(|address| !address.starts_with("0000:00:"))
            .collect();
        // Virtual functions, which come after the physical one, can have the same numbers.
        addresses.sort_unstable();
        addresses
            .into_iter()
            .next()
            .ok_or_else(|| LabError::Check(format!("the lab VM has no {self:?} ({id})")))
    }
}

/// Vendor and device of a PCI function.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PciId {
    /// Vendor.
    pub vendor: u16,
    /// Device.
    pub device: u16,
}

impl PciId {
    /// A virtual function of [`Device::Igb`].
    pub const IGBVF: Self = Self {
        vendor: 0x8086,
        device: 0x10ca,
    };

    /// Of a function in sysfs.
    fn of(function: &Path) -> Option<Self> {
        let number = |name: &str| {
            let text = fs::read_to_string(function.join(name)).ok()?;
            u16::from_str_radix(text.trim().strip_prefix("0x")?, 16).ok()
        };
        Some(Self {
            vendor: number("vendor")?,
            device: number("device")?,
        })
    }
}

impl std::fmt::Display for PciId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:04x}:{:04x}", self.vendor, self.device)
    }
}

/// A whole device that is bound to vfio-pci, until this goes.
#[derive(Debug)]
pub struct Assigned {
    site: Site,
    address: String,
}

impl Assigned {
    /// Binds it.
    ///
    /// # Errors
    /// As [`Device::find`], and if ringside-vfio fails.
    pub fn bind(site: &Site, device: Device) -> Result<Self> {
        let address = device.find(site)?;
        ringside_vfio(site, &["bind", &address])?;
        Ok(Self {
            site: site.clone(),
            address,
        })
    }

    /// Its address, as `0000:02:00.0`.
    #[must_use]
    pub fn address(&self) -> &str {
        &self.address
    }
}

impl Drop for Assigned {
    fn drop(&mut self) {
        // The next test that wants it binds it again.
        let _ = ringside_vfio(&self.site, &["unbind", &self.address]);
    }
}

/// The virtual functions of a physical one, until this goes.
#[derive(Debug)]
pub struct VirtualFunctions<const N: usize> {
    site: Site,
    pf: String,
    addresses: [String; N],
    destroyed: bool,
}

impl<const N: usize> VirtualFunctions<N> {
    /// Makes them by `ringside-vfio create PF N`, with more arguments; those of an earlier test are removed first.
    ///
    /// # Errors
    /// Fails if ringside-vfio does, or says nothing intelligible.
    pub fn create(site: &Site, pf: &str, arguments: &[&str]) -> Result<Self> {
        let enabled = Path::new(DEVICES).join(pf).join("sriov_numvfs");
        let enabled =
            fs::read_to_string(&enabled).doing(|| format!("read {}", enabled.display()))?;
        if enabled.trim() != "0" {
            ringside_vfio(site, &["destroy", pf])?;
        }
        let count = N.to_string();
        let text = ringside_vfio(
            site,
            &[&["create", pf, &count, "--json"], arguments].concat(),
        )?;
        let addresses = addresses_in(&text).and_then(|list| list.try_into().ok());
        let addresses = addresses.ok_or(LabError::Protocol {
            from: "ringside-vfio",
            text,
        })?;
        Ok(Self {
            site: site.clone(),
            pf: pf.into(),
            addresses,
            destroyed: false,
        })
    }

    /// Their addresses, in order.
    #[must_use]
    pub fn addresses(&self) -> &[String; N] {
        &self.addresses
    }

    /// Removes them, which has to succeed.
    ///
    /// # Errors
    /// Fails if ringside-vfio does.
    pub fn destroy(mut self) -> Result<()> {
        self.destroyed = true;
        ringside_vfio(&self.site, &["destroy", &self.pf]).map(drop)
    }
}

impl<const N: usize> Drop for VirtualFunctions<N> {
    fn drop(&mut self) {
        if !self.destroyed {
            // The next test that wants some removes them first.
            let _ = ringside_vfio(&self.site, &["destroy", &self.pf]);
        }
    }
}

/// The addresses in an answer `{"devices": [{"address": …}, …], …}`.
fn addresses_in(answer: &str) -> Option<Vec<String>> {
    let answer: Value = serde_json::from_str(answer).ok()?;
    let devices = answer.get("devices")?.as_array()?;
    devices
        .iter()
        .map(|device| Some(device.get("address")?.as_str()?.to_owned()))
        .collect()
}

/// Runs ringside-vfio, which has to succeed; gives what it wrote.
///
/// # Errors
/// As [`command::run`].
pub fn ringside_vfio(site: &Site, arguments: &[&str]) -> Result<String> {
    let mut program = site.program("ringside-vfio");
    command::run(program.args(arguments), site.limit(COMMAND_LIMIT))
}

/// The names in a directory of a PCI function, such as `net`, once there are any.
pub(super) fn wait_for_names(site: &Site, address: &str, directory: &str) -> Result<Vec<String>> {
    let path: PathBuf = [DEVICES, address, directory].iter().collect();
    let what = format!("an entry in {}", path.display());
    wait_until(site, DRIVER_LIMIT, &what, || {
        sorted_names(&path).ok().filter(|names| !names.is_empty())
    })
}

/// Waits until `look` finds something; the limit is for plain hardware.
pub(super) fn wait_until<T>(
    site: &Site,
    limit: Duration,
    what: &str,
    mut look: impl FnMut() -> Option<T>,
) -> Result<T> {
    let limit = site.limit(limit);
    let deadline = Instant::now() + limit;
    loop {
        if let Some(value) = look() {
            return Ok(value);
        }
        if Instant::now() > deadline {
            return Err(LabError::TimedOut {
                what: what.into(),
                limit,
                output: String::new(),
            });
        }
        thread::sleep(POLL);
    }
}

/// Loads a module of the kernel.
pub(super) fn load(module: &str) -> Result<()> {
    command::run_line(&format!("modprobe {module}")).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_taken_from_the_answer() {
        let answer = r#"{"devices": [{"address": "0000:01:10.0", "group": 16}, {"address": "0000:01:10.2"}]}"#;
        assert_eq!(
            addresses_in(answer),
            Some(vec!["0000:01:10.0".to_owned(), "0000:01:10.2".to_owned()])
        );
        assert_eq!(addresses_in(r#"{"devices": [{}]}"#), None);
        assert_eq!(addresses_in("0000:01:10.0"), None);
    }

    #[test]
    fn ids_are_written_as_lspci_writes_them() {
        assert_eq!(Device::Nvme.id().to_string(), "1b36:0010");
    }
}

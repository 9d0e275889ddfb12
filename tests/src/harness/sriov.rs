//! The lab VM's physical functions with SR-IOV, as its host uses them while guests have the virtual ones.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::passthrough::{
    Device, VirtualFunctions, load, ringside_vfio, wait_for_names, wait_until,
};
use crate::command;
use crate::error::Result;
use crate::setup::sorted_names;
use crate::site::Site;

/// Where the lab VM's own network namespace is (recipe/l1-start.sh).
const LAB_NAMESPACE: &str = "/run/netns/lab";
/// What is mounted below /sys and has to be there again when /sys is mounted anew.
const BELOW_SYS: [(&str, &str); 2] = [
    ("debugfs", "/sys/kernel/debug"),
    ("tracefs", "/sys/kernel/tracing"),
];
/// How long a link may take to come up, on plain hardware.
const LINK_LIMIT: Duration = Duration::from_secs(10);
/// How long a disk may take to come and go, on plain hardware.
const DISK_LIMIT: Duration = Duration::from_secs(5);

/// The network card with SR-IOV. Its interface is in the test's own namespace, and goes back to the lab VM's own when that ends.
/// The card switches between the physical function, the virtual ones and the cable.
#[derive(Debug)]
pub struct Igb {
    site: Site,
    address: String,
    interface: String,
}

impl Igb {
    /// Takes it.
    ///
    /// # Errors
    /// As [`Device::find`], and if its driver shows no interface or that cannot be moved.
    pub fn take(site: &Site) -> Result<Self> {
        let address = Device::Igb.find(site)?;
        load("igb")?;
        // An interface that an earlier test had comes back when the kernel has cleaned up after that.
        let interface = wait_for_names(site, &address, "net")?.swap_remove(0);
        if command::run_line(&format!("ip link show {interface}")).is_err() {
            let pid = std::process::id();
            command::run_line(&format!(
                "nsenter --net={LAB_NAMESPACE} ip link set {interface} netns {pid}"
            ))?;
            // A sysfs shows the interfaces of the namespace that it was mounted in.
            command::run_line("mount -t sysfs sysfs /sys")?;
            for (kind, place) in BELOW_SYS {
                command::run_line(&format!("mount -t {kind} {kind} {place}"))?;
            }
        }
        // Connections to a guest that is gone would keep this namespace, and the interface in it, for minutes.
        command::run_line("sysctl -q -w net.ipv4.tcp_orphan_retries=1 net.ipv4.tcp_retries2=3")?;
        Ok(Self {
            site: site.clone(),
            address,
            interface,
        })
    }

    /// Address of the physical function.
    #[must_use]
    pub fn address(&self) -> &str {
        &self.address
    }

    /// Name of its interface.
    #[must_use]
    pub fn interface(&self) -> &str {
        &self.interface
    }

    /// Gives the interface an address (with its prefix length), brings it up, and waits for its link. Virtual functions have no
    /// link before.
    ///
    /// # Errors
    /// Fails if the link does not come up.
    pub fn up(&self, address: &str) -> Result<()> {
        let interface = &self.interface;
        command::run_line(&format!("ip address add {address} dev {interface}"))?;
        command::run_line(&format!("ip link set {interface} up"))?;
        let carrier = format!("/sys/class/net/{interface}/carrier");
        wait_until(
            &self.site,
            LINK_LIMIT,
            &format!("the link of {interface}"),
            || {
                fs::read_to_string(&carrier)
                    .is_ok_and(|text| text.trim() == "1")
                    .then_some(())
            },
        )
    }

    /// Makes virtual functions, as [`VirtualFunctions::create`].
    ///
    /// # Errors
    /// As [`VirtualFunctions::create`].
    pub fn create<const N: usize>(&self, arguments: &[&str]) -> Result<VirtualFunctions<N>> {
        VirtualFunctions::create(&self.site, &self.address, arguments)
    }

    /// Sets what a virtual function, by its number, may do: `settings` are options of `ringside-vfio set`.
    ///
    /// # Errors
    /// Fails if ringside-vfio does.
    pub fn set(&self, number: usize, settings: &[&str]) -> Result<()> {
        let number = number.to_string();
        let arguments = [&["set", &self.address, &number], settings].concat();
        ringside_vfio(&self.site, &arguments).map(drop)
    }
}

/// The NVMe controller with SR-IOV. The host has its first namespace; the second, of 1 GiB, is for a virtual function, or for the
/// host in between.
#[derive(Debug)]
pub struct NvmePf {
    site: Site,
    address: String,
    /// As `nvme0`.
    controller: String,
}

impl NvmePf {
    /// The namespace that nobody has at first.
    pub const SPARE_NAMESPACE: u32 = 2;

    /// Takes it.
    ///
    /// # Errors
    /// As [`Device::find`], and if its driver shows no controller.
    pub fn take(site: &Site) -> Result<Self> {
        let address = Device::Nvme.find(site)?;
        load("nvme")?;
        let controller = wait_for_names(site, &address, "nvme")?.swap_remove(0);
        Ok(Self {
            site: site.clone(),
            address,
            controller,
        })
    }

    /// Address of the physical function.
    #[must_use]
    pub fn address(&self) -> &str {
        &self.address
    }

    /// Its character device.
    #[must_use]
    pub fn controller(&self) -> PathBuf {
        Path::new("/dev").join(&self.controller)
    }

    /// Makes virtual functions, as [`VirtualFunctions::create`]. Each works only after [`NvmePf::equip`].
    ///
    /// # Errors
    /// As [`VirtualFunctions::create`].
    pub fn create<const N: usize>(&self, arguments: &[&str]) -> Result<VirtualFunctions<N>> {
        VirtualFunctions::create(&self.site, &self.address, arguments)
    }

    /// Gives a virtual function, by its number, queues (the admin queue included; up to 4), interrupts (up to 4) and the spare
    /// namespace, and brings it online.
    ///
    /// # Errors
    /// Fails if ringside-vfio does.
    pub fn equip(&self, number: usize, queues: u16, interrupts: u16) -> Result<()> {
        ringside_vfio(
            &self.site,
            &[
                "nvme",
                &self.address,
                &number.to_string(),
                "--queues",
                &queues.to_string(),
                "--interrupts",
                &interrupts.to_string(),
                "--attach",
                &Self::SPARE_NAMESPACE.to_string(),
            ],
        )
        .map(drop)
    }

    /// Attaches the spare namespace to the host's own controller, too.
    ///
    /// # Errors
    /// Fails if nvme-cli does, or no disk comes up.
    pub fn spare_namespace(&self) -> Result<HostNamespace> {
        // A test that was killed may have left it attached.
        if let Some(disk) = self.disk_of_spare() {
            return Ok(self.host_namespace(disk));
        }
        change_attachment(&self.controller(), "attach-ns")?;
        let disk = wait_until(
            &self.site,
            DISK_LIMIT,
            "the disk of the spare namespace",
            || self.disk_of_spare(),
        )?;
        Ok(self.host_namespace(disk))
    }

    fn host_namespace(&self, disk: PathBuf) -> HostNamespace {
        HostNamespace {
            disk,
            controller: self.controller(),
        }
    }

    /// The block device of the spare namespace, if the host has it.
    fn disk_of_spare(&self) -> Option<PathBuf> {
        let disks = sorted_names(Path::new("/sys/block")).ok()?;
        let spare = disks.into_iter().find(|name| {
            // nvme0n2 is of nvme0.
            name.strip_prefix(&self.controller)
                .is_some_and(|rest| rest.starts_with('n'))
                && fs::read_to_string(format!("/sys/block/{name}/nsid"))
                    .is_ok_and(|nsid| nsid.trim() == Self::SPARE_NAMESPACE.to_string())
        })?;
        Some(Path::new("/dev").join(spare))
    }
}

/// The spare namespace as a disk of the host, until this goes.
#[derive(Debug)]
pub struct HostNamespace {
    disk: PathBuf,
    controller: PathBuf,
}

impl HostNamespace {
    /// The block device.
    #[must_use]
    pub fn disk(&self) -> &Path {
        &self.disk
    }
}

impl Drop for HostNamespace {
    fn drop(&mut self) {
        // The next test does not mind if it stays.
        let _ = change_attachment(&self.controller, "detach-ns");
    }
}

/// Attaches the spare namespace to the physical function's controller, which is number 0 of the subsystem, or detaches it.
fn change_attachment(controller: &Path, verb: &str) -> Result<()> {
    command::run_line(&format!(
        "nvme {verb} {} --namespace-id={} --controllers=0",
        controller.display(),
        NvmePf::SPARE_NAMESPACE
    ))
    .map(drop)
}

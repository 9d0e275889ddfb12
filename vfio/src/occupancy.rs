//! What the host itself needs a device for: what is mounted from it, swap space on it, the default route
//! through it; and which processes use it through VFIO.
//!
//! A block device or a network interface is followed down to PCI: through `slaves` (device mapper, md) and
//! the paths of an NVMe namespace, and through `lower_*` (bond, bridge, VLAN). Every PCI function on the
//! way counts, so that a RAID controller counts as well as the disk behind it. A ZFS pool does not show its
//! disks in sysfs: they are not found.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::io::ErrorKind;
use std::path::{Component, Path};

use serde::Serialize;

use crate::address::PciAddress;
use crate::host::{Host, HostError};
use crate::inventory::{DEVICES, PciDevice};

/// Flags of a route (Linux, include/uapi/linux/route.h).
const RTF_UP: u32 = 0x0001;
const RTF_REJECT: u32 = 0x0200;

/// Something that the host would lose with the device.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(tag = "use", rename_all = "kebab-case")]
pub enum Use {
    /// A mounted file system.
    Mount {
        /// The block device it is on.
        disk: String,
        /// Where it is mounted.
        at: String,
    },
    /// A file system of several disks. Sysfs lists these while it is mounted.
    Btrfs {
        /// The block device it is on.
        disk: String,
    },
    /// Swap space.
    Swap {
        /// The block device it is on.
        disk: String,
    },
    /// A default route.
    DefaultRoute {
        /// The interface it goes through.
        interface: String,
    },
}

impl fmt::Display for Use {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Mount { disk, at } => write!(f, "the file system mounted at {at} ({disk})"),
            Self::Btrfs { disk } => write!(f, "a btrfs file system ({disk})"),
            Self::Swap { disk } => write!(f, "swap space ({disk})"),
            Self::DefaultRoute { interface } => write!(f, "the default route ({interface})"),
        }
    }
}

/// What the host needs its devices for.
#[derive(Debug, Default)]
pub struct Occupancy {
    uses: BTreeMap<PciAddress, BTreeSet<Use>>,
}

impl Occupancy {
    /// Reads mounts, swap space and routes.
    ///
    /// # Errors
    /// [`HostError`] if a file that is there cannot be read.
    pub fn read(host: &Host) -> Result<Self, HostError> {
        let mut occupancy = Self::default();
        for (disk, at) in mounts(host)? {
            let devices = behind_disk(host, &disk)?;
            occupancy.note(&devices, &Use::Mount { disk, at });
        }
        for disk in btrfs(host)? {
            let devices = behind_disk(host, &disk)?;
            occupancy.note(&devices, &Use::Btrfs { disk });
        }
        for disk in swaps(host)? {
            let devices = behind_disk(host, &disk)?;
            occupancy.note(&devices, &Use::Swap { disk });
        }
        for interface in default_routes(host)? {
            let devices = behind_interface(host, &interface)?;
            occupancy.note(&devices, &Use::DefaultRoute { interface });
        }
        Ok(occupancy)
    }

    /// What one device is needed for.
    pub fn of(&self, address: PciAddress) -> impl Iterator<Item = &Use> {
        self.uses.get(&address).into_iter().flatten()
    }

    fn note(&mut self, devices: &BTreeSet<PciAddress>, what: &Use) {
        for device in devices {
            self.uses.entry(*device).or_default().insert(what.clone());
        }
    }
}

/// The names in a path in `/sys/devices`.
fn names_in(path: &Path) -> impl Iterator<Item = &str> {
    path.components().filter_map(|part| match part {
        Component::Normal(name) => name.to_str(),
        _ => None,
    })
}

/// The PCI functions that a path in `/sys/devices` leads through.
fn functions_in(path: &Path) -> impl Iterator<Item = PciAddress> {
    names_in(path).filter_map(|name| name.parse().ok())
}

/// The PCI functions that a block device depends on.
fn behind_disk(host: &Host, disk: &str) -> Result<BTreeSet<PciAddress>, HostError> {
    let mut found = BTreeSet::new();
    let mut seen = BTreeSet::new();
    let mut next = vec![disk.to_owned()];
    while let Some(name) = next.pop() {
        if !seen.insert(name.clone()) {
            continue;
        }
        let place = format!("sys/class/block/{name}");
        let Some(target) = host.target(&place)? else {
            continue;
        };
        found.extend(functions_in(&target));
        for part in names_in(&target) {
            if part.starts_with("nvme-subsys") {
                found.extend(behind_paths(host, &target, part)?);
            }
            // A partition is below its disk.
            if host.has(format!("sys/class/block/{part}")) {
                next.push(part.to_owned());
            }
        }
        next.extend(host.names(format!("{place}/slaves"))?.unwrap_or_default());
    }
    Ok(found)
}

/// The PCI functions of a disk that several controllers of an NVMe subsystem can give, and which is below none of
/// them: namespace `nvme0n1` has a path `nvme0c2n1` through each controller that it is attached to.
fn behind_paths(host: &Host, disk: &Path, subsystem: &str) -> Result<Vec<PciAddress>, HostError> {
    let is_path = |name: &&String| {
        names_in(disk).any(|disk| {
            let namespace = disk.rsplit_once('n');
            let path = name.rsplit_once('n');
            namespace.zip(path).is_some_and(|(namespace, path)| {
                let controller = path.0.strip_prefix(namespace.0);
                path.1 == namespace.1
                    && controller.is_some_and(|controller| controller.starts_with('c'))
            })
        })
    };
    let blocks = host.names("sys/class/block")?.unwrap_or_default();
    let mut found = Vec::new();
    for name in blocks.iter().filter(is_path) {
        if let Some(target) = host.target(format!("sys/class/block/{name}"))? {
            found.extend(functions_in(&target));
        }
    }
    if found.is_empty() {
        // Then any controller of the subsystem may be the one.
        let place = format!("sys/class/nvme-subsystem/{subsystem}");
        for entry in host.names(&place)?.unwrap_or_default() {
            // Namespaces are beside the controllers, as directories.
            if let Ok(Some(target)) = host.target(format!("{place}/{entry}")) {
                found.extend(functions_in(&target));
            }
        }
    }
    Ok(found)
}

/// The PCI functions that a network interface depends on.
fn behind_interface(host: &Host, interface: &str) -> Result<BTreeSet<PciAddress>, HostError> {
    let mut found = BTreeSet::new();
    let mut seen = BTreeSet::new();
    let mut next = vec![interface.to_owned()];
    while let Some(name) = next.pop() {
        if !seen.insert(name.clone()) {
            continue;
        }
        let place = format!("sys/class/net/{name}");
        let Some(target) = host.target(&place)? else {
            continue;
        };
        found.extend(functions_in(&target));
        let names = host.names(&place)?.unwrap_or_default();
        next.extend(
            names
                .iter()
                .filter_map(|name| name.strip_prefix("lower_").map(str::to_owned)),
        );
    }
    Ok(found)
}

/// The name of the block device that a path below `/dev` stands for.
fn disk_at(host: &Host, path: &str) -> Result<Option<String>, HostError> {
    if !path.starts_with("/dev/") {
        return Ok(None);
    }
    // Names that people know, such as those of the device mapper, are links to the kernel's.
    match host.link(path)? {
        Some(name) => Ok(Some(name)),
        None => Ok(path.rsplit('/').next().map(str::to_owned)),
    }
}

/// Mounted block devices, and where (Linux, Documentation/filesystems/proc.rst, 3.5).
fn mounts(host: &Host) -> Result<Vec<(String, String)>, HostError> {
    let text = host.text("proc/self/mountinfo")?.unwrap_or_default();
    let mut found = Vec::new();
    for line in text.lines() {
        let Some((front, back)) = line.split_once(" - ") else {
            continue;
        };
        let mut front = front.split(' ').skip(2);
        let (Some(number), Some(at)) = (front.next(), front.nth(1)) else {
            continue;
        };
        // File systems such as btrfs have a number of their own, but name the device.
        let disk = match host.link(format!("sys/dev/block/{number}"))? {
            Some(disk) => Some(disk),
            None => match back.split(' ').nth(1) {
                Some(source) => disk_at(host, &unescaped(source))?,
                None => None,
            },
        };
        found.extend(disk.map(|disk| (disk, unescaped(at))));
    }
    Ok(found)
}

fn btrfs(host: &Host) -> Result<Vec<String>, HostError> {
    let mut found = Vec::new();
    for name in host.names("sys/fs/btrfs")?.unwrap_or_default() {
        let devices = format!("sys/fs/btrfs/{name}/devices");
        found.extend(host.names(devices)?.unwrap_or_default());
    }
    Ok(found)
}

/// Block devices with swap space. Swap files are on file systems that are mounted.
fn swaps(host: &Host) -> Result<Vec<String>, HostError> {
    let text = host.text("proc/swaps")?.unwrap_or_default();
    let mut found = Vec::new();
    for line in text.lines().skip(1) {
        let mut words = line.split_whitespace();
        if let (Some(path), Some("partition")) = (words.next(), words.next()) {
            found.extend(disk_at(host, &unescaped(path))?);
        }
    }
    Ok(found)
}

/// Interfaces that have a default route.
fn default_routes(host: &Host) -> Result<BTreeSet<String>, HostError> {
    let usable = |flags: &str| {
        u32::from_str_radix(flags, 16)
            .is_ok_and(|flags| flags & RTF_UP != 0 && flags & RTF_REJECT == 0)
    };
    let zero = |number: &str| number.bytes().all(|digit| digit == b'0');
    let mut found = BTreeSet::new();
    for line in host
        .text("proc/net/route")?
        .unwrap_or_default()
        .lines()
        .skip(1)
    {
        // Iface Destination Gateway Flags RefCnt Use Metric Mask …
        let words: Vec<&str> = line.split_whitespace().collect();
        if let [interface, destination, _, flags, _, _, _, mask, ..] = words.as_slice()
            && zero(destination)
            && zero(mask)
            && usable(flags)
        {
            found.insert((*interface).to_owned());
        }
    }
    for line in host
        .text("proc/net/ipv6_route")?
        .unwrap_or_default()
        .lines()
    {
        // Destination and its prefix length, source and its, next hop, metric, references, use, flags, interface.
        let words: Vec<&str> = line.split_whitespace().collect();
        if let [destination, length, _, _, _, _, _, _, flags, interface] = words.as_slice()
            && zero(destination)
            && zero(length)
            && usable(flags)
        {
            found.insert((*interface).to_owned());
        }
    }
    Ok(found)
}

/// Undoes the kernel's octal escapes of white space in paths.
fn unescaped(path: &str) -> String {
    path.replace("\\040", " ")
        .replace("\\011", "\t")
        .replace("\\012", "\n")
        .replace("\\134", "\\")
}

/// Processes that use a device through VFIO.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Users {
    /// Their numbers.
    pub pids: Vec<u32>,
    /// Every process could be looked into.
    pub complete: bool,
}

/// Finds the processes that have a device's IOMMU group, or the device's own VFIO file, open.
///
/// # Errors
/// [`HostError`] if processes cannot be listed.
pub fn users(host: &Host, device: &PciDevice) -> Result<Users, HostError> {
    let mut files = Vec::new();
    if let Some(group) = &device.iommu_group {
        files.push(format!("vfio/{}", group.file_name()));
    }
    for name in host
        .names(format!("{DEVICES}/{}/vfio-dev", device.address))?
        .unwrap_or_default()
    {
        files.push(format!("vfio/devices/{name}"));
    }
    let mut users = Users {
        pids: Vec::new(),
        complete: true,
    };
    for process in host.names("proc")?.unwrap_or_default() {
        let Ok(pid) = process.parse::<u32>() else {
            continue;
        };
        let place = format!("proc/{pid}/fd");
        let descriptors = match host.names(&place) {
            Ok(descriptors) => descriptors.unwrap_or_default(),
            Err(HostError::Read { source, .. }) if source.kind() == ErrorKind::PermissionDenied => {
                users.complete = false;
                continue;
            }
            Err(error) => return Err(error),
        };
        let uses = |descriptor: &String| {
            // A descriptor may be closed at any time.
            let target = host.target(format!("{place}/{descriptor}"));
            // The path may begin anywhere: the process may see another root directory.
            target
                .ok()
                .flatten()
                .is_some_and(|target| files.iter().any(|file| target.ends_with(file)))
        };
        if descriptors.iter().any(uses) {
            users.pids.push(pid);
        }
    }
    users.pids.sort_unstable();
    Ok(users)
}

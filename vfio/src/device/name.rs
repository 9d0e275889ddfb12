//! How the kernel is told which device of a group is meant: its name, and behind it the token of a virtual function whose
//! physical function is in the hands of VFIO, too (Linux, drivers/vfio/pci/vfio_pci_core.c, `vfio_pci_validate_vf_token`).
//!
//! vfio-ioctls takes a path, uses its last component as the name, and follows the link `iommu_group` in it, also when the
//! device is given up: then the device itself may be gone from sysfs. So it gets a directory with nothing but that link.
//! The directory is locked as long as it is needed: systemd-tmpfiles leaves alone what is locked, however old it is.

use std::fs::File;
use std::io;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use nix::fcntl::{Flock, FlockArg};
use tempfile::TempDir;
use uuid::Uuid;

use crate::address::PciAddress;

/// A directory that stands for a device; removed when dropped.
#[derive(Debug)]
pub(crate) struct DeviceName {
    path: PathBuf,
    _lock: Flock<File>,
    _directory: TempDir,
}

impl DeviceName {
    /// Names the function at `address`, in a group, with its token if it takes one.
    pub(crate) fn new(address: PciAddress, group: u32, token: Option<&Uuid>) -> io::Result<Self> {
        let directory = tempfile::Builder::new()
            .prefix("ringside-vfio.")
            .tempdir()?;
        let lock = Flock::lock(File::open(directory.path())?, FlockArg::LockShared);
        let lock = lock.map_err(|(_, errno)| errno)?;
        let name = match token {
            Some(token) => format!("{address} vf_token={token}"),
            None => address.to_string(),
        };
        let path = directory.path().join(name);
        std::fs::create_dir(&path)?;
        let target = format!("/sys/kernel/iommu_groups/{group}");
        symlink(target, path.join("iommu_group"))?;
        Ok(Self {
            path,
            _lock: lock,
            _directory: directory,
        })
    }

    /// The directory.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_name_has_the_token_and_the_group() {
        let address = "0000:01:10.0".parse().unwrap();
        let token = Uuid::from_u128(7);
        let name = DeviceName::new(address, 12, Some(&token)).unwrap();
        let path = name.path().to_owned();
        assert_eq!(
            path.file_name().unwrap().to_str().unwrap(),
            "0000:01:10.0 vf_token=00000000-0000-0000-0000-000000000007"
        );
        let group = path.join("iommu_group").read_link().unwrap();
        assert_eq!(group.file_name().unwrap(), "12");
        let directory = File::open(path.parent().unwrap()).unwrap();
        let lock = Flock::lock(directory, FlockArg::LockExclusiveNonblock);
        assert!(lock.is_err(), "it could be cleaned away");
        drop(name);
        assert!(!path.exists());
        let name = DeviceName::new(address, 12, None).unwrap();
        assert_eq!(name.path().file_name().unwrap(), "0000:01:10.0");
    }
}

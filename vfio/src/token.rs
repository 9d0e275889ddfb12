//! VF tokens: the secret that the user of a physical function under vfio-pci shares with the users of its
//! virtual functions (Linux, Documentation/driver-api/vfio.rst, and `vfio_pci_validate_vf_token` in
//! drivers/vfio/pci/vfio_pci_core.c).
//!
//! The kernel takes the token as part of the device's name in `VFIO_GROUP_GET_DEVICE_FD`:
//! `0000:01:00.0 vf_token=UUID`. Opening the physical function with a token sets it, and it stays set after
//! the function is closed; opening a virtual function asks for it. The library that opens devices makes the
//! name from the path it is given, so [`device_path`] gives a path that ends in that name.

use std::io;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tempfile::TempDir;
use thiserror::Error;
use uuid::Uuid;
use vfio_ioctls::{VfioContainer, VfioDevice, VfioError};

use crate::address::PciAddress;
use crate::host::Host;
use crate::inventory::DEVICES;

/// A device could not be opened with its token.
#[derive(Debug, Error)]
pub enum TokenError {
    /// The directory for the device's path could not be made.
    #[error(
        "cannot make a path with a VF token for {address} in the directory for temporary files"
    )]
    Path {
        /// The device.
        address: PciAddress,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// VFIO did not open it.
    #[error(
        "cannot open {address} through VFIO to set its VF token; is it in use? Then its user has set the token"
    )]
    Open {
        /// The device.
        address: PciAddress,
        /// What VFIO said.
        #[source]
        source: VfioError,
    },
}

/// A path by which `vfio-ioctls` opens a device. What was made for it is removed when it is dropped, which
/// may be as soon as the device is open.
#[derive(Debug)]
pub struct DevicePath {
    path: PathBuf,
    /// Holds the symbolic link that the path is, if there is a token.
    _directory: Option<TempDir>,
}

impl DevicePath {
    /// The path.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl AsRef<Path> for DevicePath {
    fn as_ref(&self) -> &Path {
        &self.path
    }
}

/// The path by which to open a device through its IOMMU group, with a VF token or without. Without one it is the
/// device's directory in sysfs. A VFIO character device takes no token by this path.
///
/// # Errors
/// [`TokenError::Path`] if the directory for temporary files cannot be written.
pub fn device_path(
    host: &Host,
    address: PciAddress,
    token: Option<&Uuid>,
) -> Result<DevicePath, TokenError> {
    let device = host.path(format!("{DEVICES}/{address}"));
    let Some(token) = token else {
        return Ok(DevicePath {
            path: device,
            _directory: None,
        });
    };
    let make = || {
        let directory = TempDir::with_prefix("ringside-vfio-")?;
        let path = directory.path().join(format!("{address} vf_token={token}"));
        symlink(&device, &path)?;
        Ok((path, directory))
    };
    let (path, directory) = make().map_err(|source| TokenError::Path { address, source })?;
    Ok(DevicePath {
        path,
        _directory: Some(directory),
    })
}

/// Sets the token of a physical function that vfio-pci drives.
///
/// # Errors
/// [`TokenError`] if it cannot be opened.
pub(crate) fn set(host: &Host, pf: PciAddress, token: &Uuid) -> Result<(), TokenError> {
    let path = device_path(host, pf, Some(token))?;
    let open = || {
        let container = Arc::new(VfioContainer::new(None)?);
        VfioDevice::new(path.path(), container, false)
    };
    let device = open().map_err(|source| TokenError::Open {
        address: pf,
        source,
    })?;
    drop(device);
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn path_with_a_token_ends_in_the_name_that_the_kernel_wants() {
        let root = tempfile::tempdir().unwrap();
        let device = root.path().join("sys/bus/pci/devices/0000:01:00.0");
        fs::create_dir_all(&device).unwrap();
        symlink("../../../kernel/iommu_groups/7", device.join("iommu_group")).unwrap();
        let host = Host::new(root.path());
        let address = "01:00.0".parse().unwrap();
        let plain = device_path(&host, address, None).unwrap();
        assert_eq!(plain.path(), device);

        let token = Uuid::from_u128(0x1234);
        let with_token = device_path(&host, address, Some(&token)).unwrap();
        let path = with_token.path().to_owned();
        assert_eq!(
            path.file_name().unwrap(),
            "0000:01:00.0 vf_token=00000000-0000-0000-0000-000000001234"
        );
        let group = path.join("iommu_group").read_link().unwrap();
        assert_eq!(group.file_name().unwrap(), "7");
        drop(with_token);
        assert!(path.symlink_metadata().is_err());
        assert!(path.parent().unwrap().symlink_metadata().is_err());
        // What the link pointed to is still there.
        assert!(device.is_dir());
    }
}

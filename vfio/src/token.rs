//! VF tokens: the secret that the user of a physical function under vfio-pci shares with the users of its
//! virtual functions (Linux, Documentation/driver-api/vfio.rst, and `vfio_pci_validate_vf_token` in
//! drivers/vfio/pci/vfio_pci_core.c).
//!
//! Opening the physical function with a token sets it, and it stays set after the function is closed; opening a
//! virtual function asks for it.

use std::sync::Arc;

use thiserror::Error;
use uuid::Uuid;
use vfio_ioctls::{VfioContainer, VfioDevice, VfioError};

use crate::address::PciAddress;
use crate::device::DeviceName;
use crate::host::{Host, HostError};
use crate::inventory::DEVICES;

/// The token of a physical function could not be set.
#[derive(Debug, Error)]
pub enum TokenError {
    /// Its group could not be read.
    #[error("the IOMMU group of {address} cannot be read")]
    Group {
        /// The device.
        address: PciAddress,
        /// Why.
        #[source]
        source: HostError,
    },
    /// It has no group.
    #[error("{0} has no IOMMU group; `ringside-vfio check {0}` says why")]
    NoGroup(PciAddress),
    /// The kernel could not be told of it.
    #[error("cannot create a directory for temporary files")]
    Name(#[source] std::io::Error),
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

/// Sets the token of a physical function that vfio-pci drives.
///
/// # Errors
/// [`TokenError`] if it cannot be opened.
pub(crate) fn set(host: &Host, pf: PciAddress, token: &Uuid) -> Result<(), TokenError> {
    let group = host
        .link(format!("{DEVICES}/{pf}/iommu_group"))
        .map_err(|source| TokenError::Group {
            address: pf,
            source,
        })?;
    let group = group.and_then(|name| name.parse().ok());
    let group = group.ok_or(TokenError::NoGroup(pf))?;
    let name = DeviceName::new(pf, group, Some(token)).map_err(TokenError::Name)?;
    let open = || {
        let container = Arc::new(VfioContainer::new(None)?);
        VfioDevice::new(name.path(), container, false)
    };
    let device = open().map_err(|source| TokenError::Open {
        address: pf,
        source,
    })?;
    // Before the name, which is looked at once more.
    drop(device);
    Ok(())
}

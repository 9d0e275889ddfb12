//! How people name a virtual function of a physical one: by its number or by its address.

use std::fmt;
use std::str::FromStr;

use thiserror::Error;

use crate::address::PciAddress;
use crate::inventory::{PciDevice, Role};

/// A physical function has no virtual one of this name.
#[derive(Debug, Error)]
pub enum VfError {
    /// The device is no physical function.
    #[error("{0} is not a physical function with virtual ones; `ringside-vfio list` shows those")]
    NotPf(PciAddress),
    /// There is no such virtual function.
    #[error("{pf} has no virtual function {vf}: it has {count}")]
    NoVf {
        /// The physical function.
        pf: PciAddress,
        /// What was asked for.
        vf: VfName,
        /// How many it has.
        count: usize,
    },
}

/// What names a virtual function of a given physical one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum VfName {
    /// Its number.
    Number(u16),
    /// Its address.
    Address(PciAddress),
}

/// The text names no virtual function.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("`{0}` is neither the number of a virtual function nor a PCI address")]
pub struct BadVfName(String);

impl FromStr for VfName {
    type Err = BadVfName;

    fn from_str(text: &str) -> Result<Self, BadVfName> {
        let number = text.parse().map(Self::Number).ok();
        let address = || text.parse().map(Self::Address).ok();
        number
            .or_else(address)
            .ok_or_else(|| BadVfName(text.to_owned()))
    }
}

impl fmt::Display for VfName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Number(number) => write!(f, "{number}"),
            Self::Address(address) => write!(f, "{address}"),
        }
    }
}

impl VfName {
    /// Number and address of the virtual function.
    ///
    /// # Errors
    /// [`VfError::NotPf`] or [`VfError::NoVf`] if the physical function has none of this name.
    pub fn find(self, pf: &PciDevice) -> Result<(u16, PciAddress), VfError> {
        let Role::Pf { vfs, .. } = &pf.role else {
            return Err(VfError::NotPf(pf.address));
        };
        (0..)
            .zip(vfs.iter().copied())
            .find(|(number, address)| match self {
                Self::Number(wanted) => *number == wanted,
                Self::Address(wanted) => *address == wanted,
            })
            .ok_or(VfError::NoVf {
                pf: pf.address,
                vf: self,
                count: vfs.len(),
            })
    }
}

//! What is needed to put a device back, kept in one file per device until it is put back.
//!
//! A record is written before the first change to its device and removed after the last, so whoever finds
//! one knows that the device is changed, or was being changed by a run that was killed. The files lie below
//! `/run`, which is empty after a start of the machine, as the changes are gone then. One run at a time holds
//! the lock.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::address::PciAddress;
use crate::binding::Binding;
use crate::host::{Host, HostError, advice};
use crate::inventory::DEVICES;

/// Where the records are.
const DIRECTORY: &str = "run/ringside-vfio";

/// The records could not be read or written.
#[derive(Debug, Error)]
pub enum StateError {
    /// The directory or its lock could not be made.
    #[error("cannot lock {}{}", path.display(), advice(source))]
    Lock {
        /// The lock's file.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// A record is not one.
    #[error(
        "{} is damaged; put the device back by hand if need be, and remove the file",
        path.display()
    )]
    Damaged {
        /// The record's file.
        path: PathBuf,
        /// What is wrong with it.
        #[source]
        source: serde_json::Error,
    },
    /// A file could not be read or written.
    #[error(transparent)]
    Host(#[from] HostError),
}

/// What is needed to put one device back.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// The inode of the device's directory in sysfs. It differs when the device went away and another, or
    /// the same one, came to its address: the record is about the past then.
    inode: u64,
    /// The physical function, if the device is a virtual one.
    pub pf: Option<PciAddress>,
    /// Who had the device before it was bound.
    pub binding: Option<Binding>,
    /// What the physical function's `sriov_drivers_autoprobe` was before virtual functions were made.
    pub autoprobe: Option<String>,
}

/// All records, held by one run at a time.
#[derive(Debug)]
pub struct Records<'a> {
    host: &'a Host,
    _lock: Flock<File>,
}

fn file(address: PciAddress) -> String {
    format!("{DIRECTORY}/{address}.json")
}

impl<'a> Records<'a> {
    /// Takes the lock; waits for another run that holds it, and says so in `remarks`.
    ///
    /// # Errors
    /// [`StateError::Lock`] if the directory cannot be written.
    pub fn open(host: &'a Host, remarks: &mut dyn Write) -> Result<Self, StateError> {
        let path = host.path(format!("{DIRECTORY}/lock"));
        let open = || {
            fs::create_dir_all(host.path(DIRECTORY))?;
            // Neither truncated nor removed: whoever waits for it holds this very file.
            OpenOptions::new()
                .create(true)
                .append(true)
                .mode(0o600)
                .open(&path)
        };
        let failure = |source| StateError::Lock {
            path: path.clone(),
            source,
        };
        let file = open().map_err(failure)?;
        let lock = match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Err((file, Errno::EWOULDBLOCK)) => {
                // A remark that nobody can read is no reason to stop.
                let _ = writeln!(remarks, "ringside-vfio: waiting for another ringside-vfio");
                Flock::lock(file, FlockArg::LockExclusive)
            }
            lock => lock,
        };
        let lock = lock.map_err(|(_, errno)| failure(errno.into()))?;
        Ok(Self { host, _lock: lock })
    }

    /// The record of a device, as far as it is about the device that is there now.
    ///
    /// # Errors
    /// [`StateError`] if it cannot be read.
    pub fn get(&self, address: PciAddress) -> Result<Option<Record>, StateError> {
        let inode = self.host.inode(format!("{DEVICES}/{address}"))?;
        let record = self.read(address)?;
        Ok(record.filter(|record| Some(record.inode) == inode))
    }

    /// Changes the record of a device, which is made if there is none and removed if nothing is left in it.
    ///
    /// # Errors
    /// [`StateError`] if it cannot be read or written.
    pub fn change(
        &self,
        address: PciAddress,
        pf: Option<PciAddress>,
        change: impl FnOnce(&mut Record),
    ) -> Result<(), StateError> {
        let old = self.get(address)?;
        let mut new = match &old {
            Some(record) => record.clone(),
            None => Record {
                inode: self
                    .host
                    .inode(format!("{DEVICES}/{address}"))?
                    .unwrap_or_default(),
                pf,
                binding: None,
                autoprobe: None,
            },
        };
        change(&mut new);
        if new.binding.is_none() && new.autoprobe.is_none() {
            self.forget(address)
        } else if old.as_ref() == Some(&new) {
            Ok(())
        } else {
            // Nothing in a record fails to become JSON; if it did, it would be as a failed write.
            let text = serde_json::to_string(&new).map_err(|source| StateError::Damaged {
                path: self.host.path(file(address)),
                source,
            })?;
            Ok(self.host.replace(file(address), &text)?)
        }
    }

    /// Removes the record of a device, if there is one.
    ///
    /// # Errors
    /// [`StateError`] if it cannot be removed.
    pub fn forget(&self, address: PciAddress) -> Result<(), StateError> {
        if self.host.has(file(address)) {
            self.host.remove(file(address))?;
        }
        Ok(())
    }

    /// Removes the records of a physical function's virtual ones, of past ones too.
    ///
    /// # Errors
    /// [`StateError`] if they cannot be read or removed.
    pub fn forget_functions_of(&self, pf: PciAddress) -> Result<(), StateError> {
        for name in self.host.names(DIRECTORY)?.unwrap_or_default() {
            let address = name
                .strip_suffix(".json")
                .and_then(|name| name.parse::<PciAddress>().ok());
            let Some(address) = address else { continue };
            if self
                .read(address)?
                .is_some_and(|record| record.pf == Some(pf))
            {
                self.forget(address)?;
            }
        }
        Ok(())
    }

    fn read(&self, address: PciAddress) -> Result<Option<Record>, StateError> {
        let Some(text) = self.host.bytes(file(address))? else {
            return Ok(None);
        };
        serde_json::from_slice(&text)
            .map(Some)
            .map_err(|source| StateError::Damaged {
                path: self.host.path(file(address)),
                source,
            })
    }
}

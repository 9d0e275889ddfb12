//! Devices of the kernel's device mapper: block devices that can be made to fail under those who use them.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use crate::command;
use crate::ensure;
use crate::error::Result;

/// For what takes no time.
const LIMIT: Duration = Duration::from_secs(60);

/// A mapped device. It goes with this value, and has to be out of use by then.
#[derive(Debug)]
pub struct Mapped {
    name: String,
    path: PathBuf,
}

impl Mapped {
    /// Creates a device of this name with a table (dmsetup(8), "TABLE FORMAT").
    ///
    /// # Errors
    /// Fails if there is one of this name, or the kernel does not take the table.
    pub fn create(name: &str, table: &str) -> Result<Self> {
        command::run_line("modprobe dm-mod")?;
        dmsetup(["create", "--noudevsync", name], table)?;
        let mut mapped = Self {
            name: name.into(),
            path: PathBuf::new(),
        };
        // Without udev there is only the kernel's own name for it.
        let text = command::run_line(&format!(
            "dmsetup info -c --noheadings -o blkdevname {name}"
        ))?;
        mapped.path = Path::new("/dev").join(text.trim());
        Ok(mapped)
    }

    /// The block device.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Puts another table in the place of the present one. Requests that are under way end by the old one.
    ///
    /// # Errors
    /// Fails if the kernel does not take it; the old one stays.
    pub fn load(&self, table: &str) -> Result<()> {
        dmsetup(["load", "--noudevsync", &self.name], table)?;
        self.suspend()?;
        self.resume()
    }

    /// Lets requests hang from now on.
    ///
    /// # Errors
    /// Fails if those that are under way do not end.
    pub fn suspend(&self) -> Result<()> {
        dmsetup(["suspend", "--nolockfs", &self.name], "")
    }

    /// Goes on with the requests that hang.
    ///
    /// # Errors
    /// Fails if the kernel refuses it.
    pub fn resume(&self) -> Result<()> {
        dmsetup(["resume", "--noudevsync", &self.name], "")
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        // What hangs has to end before the device can. Who had it open may keep it for a while: the kernel tears down the
        // io_uring of a program some time after the program has ended.
        let _ = self.resume();
        let _ = dmsetup(["remove", "--noudevsync", "--retry", &self.name], "");
    }
}

fn dmsetup<const N: usize>(arguments: [impl AsRef<OsStr>; N], table: &str) -> Result<()> {
    let mut dmsetup = Command::new("dmsetup");
    let line = command::describe(dmsetup.args(arguments));
    let output = command::output_with_input(&mut dmsetup, table.as_bytes(), LIMIT)?;
    ensure!(output.status.success(), "{line}: {}", output.stderr);
    Ok(())
}

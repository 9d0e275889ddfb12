//! The kernel as far as this crate changes it: behind a trait, so that tests play it.

use std::fmt::Debug;
use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::path::Path;
use std::process::{Command, Stdio};

use uuid::Uuid;

use crate::address::PciAddress;
use crate::host::Host;
use crate::network::Links;
use crate::network::rtnetlink::Rtnetlink;
use crate::nvme::admin::Admin;
use crate::nvme::passthrough::Passthrough;
use crate::token::{self, TokenError};

/// What changes the host. Each method makes one change, wholly or not at all; paths are complete.
pub trait Kernel: Debug + Send + Sync {
    /// Writes to an attribute that exists.
    ///
    /// # Errors
    /// What the kernel answers.
    fn write(&self, path: &Path, text: &str) -> io::Result<()>;

    /// Puts a file with this text in the place of another or of none.
    ///
    /// # Errors
    /// What the kernel answers.
    fn replace(&self, path: &Path, text: &str) -> io::Result<()>;

    /// Removes a file.
    ///
    /// # Errors
    /// What the kernel answers.
    fn remove(&self, path: &Path) -> io::Result<()>;

    /// Loads a module, by name or alias, for the host whose files are below `root`.
    ///
    /// # Errors
    /// What `modprobe` said.
    fn load(&self, root: &Path, module: &str) -> io::Result<()>;

    /// Opens a physical function through VFIO with a token and closes it again: it keeps the token.
    ///
    /// # Errors
    /// [`TokenError`], if it cannot be opened.
    fn set_vf_token(&self, host: &Host, pf: PciAddress, token: &Uuid) -> Result<(), TokenError>;

    /// The network configuration of the host whose files are below `root`.
    ///
    /// # Errors
    /// What the kernel answers, or that `root` is another host's.
    fn links(&self, root: &Path) -> io::Result<Box<dyn Links>>;

    /// The controller of an NVMe device file.
    ///
    /// # Errors
    /// What the kernel answers.
    fn nvme(&self, path: &Path) -> io::Result<Box<dyn Admin>>;
}

/// The kernel this process runs on.
#[derive(Debug, Clone, Copy)]
pub struct LiveKernel;

impl Kernel for LiveKernel {
    fn write(&self, path: &Path, text: &str) -> io::Result<()> {
        // An attribute is not created, and it takes its text in one write.
        OpenOptions::new()
            .write(true)
            .truncate(true)
            .open(path)?
            .write_all(text.as_bytes())
    }

    fn replace(&self, path: &Path, text: &str) -> io::Result<()> {
        let new = path.with_extension("new");
        fs::write(&new, text)?;
        fs::rename(&new, path)
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        fs::remove_file(path)
    }

    fn load(&self, root: &Path, module: &str) -> io::Result<()> {
        let mut command = Command::new("modprobe");
        if root != Path::new("/") {
            command.arg("-d").arg(root);
        }
        let output = command
            .args(["--", module])
            .stdin(Stdio::null())
            .output()
            .map_err(|e| io::Error::new(e.kind(), format!("cannot run modprobe: {e}")))?;
        if output.status.success() {
            return Ok(());
        }
        let said = String::from_utf8_lossy(&output.stderr);
        match said.trim() {
            "" => Err(io::Error::other(format!(
                "modprobe ended with {}",
                output.status
            ))),
            said => Err(io::Error::other(said.to_owned())),
        }
    }

    fn set_vf_token(&self, host: &Host, pf: PciAddress, token: &Uuid) -> Result<(), TokenError> {
        token::set(host, pf, token)
    }

    fn links(&self, root: &Path) -> io::Result<Box<dyn Links>> {
        if root != Path::new("/") {
            return Err(io::Error::other(
                "the network of this machine is not that of the files below --root",
            ));
        }
        Ok(Box::new(Rtnetlink::open()?))
    }

    fn nvme(&self, path: &Path) -> io::Result<Box<dyn Admin>> {
        Ok(Box::new(Passthrough::open(path)?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_are_not_made_and_files_are_whole() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("0000:01:00.0.json");
        let error = LiveKernel.write(&file, "x").unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
        LiveKernel.replace(&file, "first").unwrap();
        // What a killed run left does not matter.
        fs::write(directory.path().join("0000:01:00.0.new"), "half").unwrap();
        LiveKernel.replace(&file, "second").unwrap();
        assert_eq!(fs::read_to_string(&file).unwrap(), "second");
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
        LiveKernel.remove(&file).unwrap();
        assert!(!file.exists());
    }

    #[test]
    fn other_hosts_have_another_network() {
        assert!(LiveKernel.links(Path::new("/")).is_ok());
        let error = LiveKernel.links(Path::new("/host")).err().unwrap();
        assert!(error.to_string().contains("--root"), "{error}");
    }
}

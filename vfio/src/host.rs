//! The host's files this crate looks at and changes, rooted at a directory: `/` in life, a made-up tree in tests.

use std::ffi::OsString;
use std::io::{self, ErrorKind};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::{fs, str};

use thiserror::Error;
use uuid::Uuid;

use crate::address::PciAddress;
use crate::kernel::{Kernel, LiveKernel};
use crate::network::Links;
use crate::nvme::admin::Admin;
use crate::token::TokenError;

/// Reading or changing the host's files failed.
#[derive(Debug, Error)]
pub enum HostError {
    /// A file or directory could not be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// What was to be read.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// A file holds something else than the kernel documents for it.
    #[error("{} holds `{content}`, which is not {expected}", path.display())]
    Content {
        /// The file.
        path: PathBuf,
        /// What it holds.
        content: String,
        /// What it ought to hold.
        expected: &'static str,
    },
    /// The kernel did not take what was written to an attribute, or a file could not be written.
    #[error("cannot write `{}` to {}{}", text.trim_end(), path.display(), advice(source))]
    Write {
        /// The file.
        path: PathBuf,
        /// What was to be written.
        text: String,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// A file could not be removed.
    #[error("cannot remove {}{}", path.display(), advice(source))]
    Remove {
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}

/// What to do about a change that is not permitted.
pub(crate) fn advice(error: &io::Error) -> &'static str {
    match error.kind() {
        ErrorKind::PermissionDenied => " (run this as root)",
        _ => "",
    }
}

/// The host's file tree below a root directory, and the kernel that is behind it.
#[derive(Debug, Clone)]
pub struct Host {
    root: PathBuf,
    kernel: Arc<dyn Kernel>,
}

/// A file that is not there is an answer, not a failure. The same holds for a file of a device that
/// vanishes while it is read, and for an attribute that the device does not have after all.
fn absent(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory)
        || error.raw_os_error() == Some(nix::libc::ENODEV)
}

impl Host {
    /// The tree below `root`, changed by this process.
    #[must_use]
    pub fn new(root: impl Into<PathBuf>) -> Self {
        Self::with_kernel(root, Arc::new(LiveKernel))
    }

    /// The tree below `root`, changed by somebody else.
    #[must_use]
    pub fn with_kernel(root: impl Into<PathBuf>, kernel: Arc<dyn Kernel>) -> Self {
        Self {
            root: root.into(),
            kernel,
        }
    }

    /// Where `path` lies, given from the tree's root on, with or without a leading slash.
    #[must_use]
    pub fn path(&self, path: impl AsRef<Path>) -> PathBuf {
        let path = path.as_ref();
        self.root.join(path.strip_prefix("/").unwrap_or(path))
    }

    /// The bytes of a file, or `None` if there is none.
    ///
    /// # Errors
    /// [`HostError::Read`] if it is there and cannot be read.
    pub fn bytes(&self, path: impl AsRef<Path>) -> Result<Option<Vec<u8>>, HostError> {
        let path = self.path(path);
        match fs::read(&path) {
            Ok(bytes) => Ok(Some(bytes)),
            Err(e) if absent(&e) => Ok(None),
            Err(source) => Err(HostError::Read { path, source }),
        }
    }

    /// The text of an attribute without the white space around it, or `None` if there is none.
    ///
    /// # Errors
    /// [`HostError`] if it is there and cannot be read, or is not text.
    pub fn text(&self, path: impl AsRef<Path>) -> Result<Option<String>, HostError> {
        let path = path.as_ref();
        let Some(bytes) = self.bytes(path)? else {
            return Ok(None);
        };
        match str::from_utf8(&bytes) {
            Ok(text) => Ok(Some(text.trim().to_owned())),
            Err(_) => Err(self.wrong(path, String::from_utf8_lossy(&bytes).into_owned(), "text")),
        }
    }

    /// A number in an attribute, decimal or hexadecimal with `0x`, or `None` if there is none.
    ///
    /// # Errors
    /// [`HostError`] if it is there and is not such a number.
    pub fn number<T: TryFrom<i64>>(
        &self,
        path: impl AsRef<Path>,
        expected: &'static str,
    ) -> Result<Option<T>, HostError> {
        let path = path.as_ref();
        let Some(text) = self.text(path)? else {
            return Ok(None);
        };
        let number = match text.strip_prefix("0x") {
            Some(digits) => i64::from_str_radix(digits, 16),
            None => text.parse(),
        };
        match number.ok().and_then(|n| T::try_from(n).ok()) {
            Some(number) => Ok(Some(number)),
            None => Err(self.wrong(path, text, expected)),
        }
    }

    /// The last component of what a symbolic link points to, or `None` if there is no such link.
    ///
    /// # Errors
    /// [`HostError::Read`] if it is there and cannot be read.
    pub fn link(&self, path: impl AsRef<Path>) -> Result<Option<String>, HostError> {
        let target = self.target(path)?;
        Ok(target.and_then(|target| Some(target.file_name()?.to_string_lossy().into_owned())))
    }

    /// What a symbolic link points to, or `None` if there is no such link.
    ///
    /// # Errors
    /// [`HostError::Read`] if it is there and cannot be read.
    pub fn target(&self, path: impl AsRef<Path>) -> Result<Option<PathBuf>, HostError> {
        let path = self.path(path);
        match fs::read_link(&path) {
            Ok(target) => Ok(Some(target)),
            Err(e) if absent(&e) => Ok(None),
            Err(source) => Err(HostError::Read { path, source }),
        }
    }

    /// The names in a directory, sorted, or `None` if there is none.
    ///
    /// # Errors
    /// [`HostError::Read`] if it is there and cannot be read.
    pub fn names(&self, path: impl AsRef<Path>) -> Result<Option<Vec<String>>, HostError> {
        let path = self.path(path);
        let list = || {
            fs::read_dir(&path)?
                .map(|entry| Ok(entry?.file_name()))
                .collect()
        };
        let names: io::Result<Vec<OsString>> = list();
        match names {
            Ok(names) => {
                let mut names: Vec<_> = names
                    .iter()
                    .map(|name| name.to_string_lossy().into_owned())
                    .collect();
                names.sort();
                Ok(Some(names))
            }
            Err(e) if absent(&e) => Ok(None),
            Err(source) => Err(HostError::Read { path, source }),
        }
    }

    /// Whether there is something at `path`.
    #[must_use]
    pub fn has(&self, path: impl AsRef<Path>) -> bool {
        self.path(path).symlink_metadata().is_ok()
    }

    /// The inode number of what is at `path`, links followed, or `None` if there is nothing.
    ///
    /// # Errors
    /// [`HostError::Read`] if it is there and cannot be looked at.
    pub fn inode(&self, path: impl AsRef<Path>) -> Result<Option<u64>, HostError> {
        let path = self.path(path);
        match fs::metadata(&path) {
            Ok(metadata) => Ok(Some(metadata.ino())),
            Err(e) if absent(&e) => Ok(None),
            Err(source) => Err(HostError::Read { path, source }),
        }
    }

    /// Writes to an attribute.
    ///
    /// # Errors
    /// [`HostError::Write`] if there is no such attribute or the kernel refuses.
    pub fn write(&self, path: impl AsRef<Path>, text: &str) -> Result<(), HostError> {
        let path = self.path(path);
        self.kernel
            .write(&path, text)
            .map_err(|source| HostError::Write {
                path,
                text: text.to_owned(),
                source,
            })
    }

    /// Puts a file with this text in the place of another or of none: whole or not at all.
    ///
    /// # Errors
    /// [`HostError::Write`] if it cannot be written.
    pub fn replace(&self, path: impl AsRef<Path>, text: &str) -> Result<(), HostError> {
        let path = self.path(path);
        self.kernel
            .replace(&path, text)
            .map_err(|source| HostError::Write {
                path,
                text: text.to_owned(),
                source,
            })
    }

    /// Removes a file, if it is there.
    ///
    /// # Errors
    /// [`HostError::Remove`] if it is there and cannot be removed.
    pub fn remove(&self, path: impl AsRef<Path>) -> Result<(), HostError> {
        let path = self.path(path);
        match self.kernel.remove(&path) {
            Err(source) if !absent(&source) => Err(HostError::Remove { path, source }),
            _ => Ok(()),
        }
    }

    /// Loads a kernel module by its name or by an alias.
    ///
    /// # Errors
    /// What `modprobe` said.
    pub fn load_module(&self, name: &str) -> io::Result<()> {
        self.kernel.load(&self.root, name)
    }

    /// Gives a physical function that vfio-pci drives the token that its virtual ones then ask for.
    ///
    /// # Errors
    /// [`TokenError`], if it cannot be opened through VFIO.
    pub fn set_vf_token(&self, pf: PciAddress, token: &Uuid) -> Result<(), TokenError> {
        self.kernel.set_vf_token(self, pf, token)
    }

    /// The network configuration that belongs to the tree.
    ///
    /// # Errors
    /// What the kernel said, or that the tree is another host's.
    pub fn links(&self) -> io::Result<Box<dyn Links>> {
        self.kernel.links(&self.root)
    }

    /// The controller of an NVMe device file.
    ///
    /// # Errors
    /// What the kernel said.
    pub fn nvme(&self, path: impl AsRef<Path>) -> io::Result<Box<dyn Admin>> {
        self.kernel.nvme(&self.path(path))
    }

    /// An error about what a file holds.
    #[must_use]
    pub fn wrong(
        &self,
        path: impl AsRef<Path>,
        content: String,
        expected: &'static str,
    ) -> HostError {
        HostError::Content {
            path: self.path(path),
            content,
            expected,
        }
    }
}

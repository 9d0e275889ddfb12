//! What the back-ends serve: made ready before its cells are measured, removed afterwards.

use std::fs::File;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use nix::fcntl::OFlag;

use crate::command;
use crate::error::{Doing, LabError, Result};
use crate::site::Site;

/// How long writing and reading a whole file may take on a slow disk.
const PREPARE_LIMIT: Duration = Duration::from_secs(900);
/// How long losetup may take.
const LOSETUP_LIMIT: Duration = Duration::from_secs(60);
/// Space that is left to others.
const SPARE: u64 = 512 << 20;

/// A kind of storage.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// Requests succeed at once, no data moves: what the back-end itself costs.
    Null,
    /// A file on the disk.
    File,
    /// A file in memory.
    Tmpfs,
    /// A block device: a loop device on a file on the disk.
    Loop,
}

impl Kind {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Null => "null",
            Self::File => "file",
            Self::Tmpfs => "tmpfs",
            Self::Loop => "loop",
        }
    }
}

/// Storage that is there; what was made for it goes when it is dropped.
#[derive(Debug)]
pub(super) struct Storage {
    pub(super) kind: Kind,
    /// `None`: no data.
    pub(super) path: Option<PathBuf>,
    /// Bytes.
    pub(super) size: u64,
    /// O_DIRECT works.
    pub(super) direct: bool,
    // Dropped in this order: the device before its file.
    _device: Option<LoopDevice>,
    _directory: Option<tempfile::TempDir>,
}

/// A loop device; it is detached when dropped.
#[derive(Debug)]
struct LoopDevice(PathBuf);

impl LoopDevice {
    fn on(file: &Path) -> Result<Self> {
        let mut losetup = Command::new("losetup");
        losetup.args(["--find", "--show", "--direct-io=on"]);
        let device = command::run(losetup.arg(file), LOSETUP_LIMIT)?;
        Ok(Self(device.trim().into()))
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        let mut losetup = Command::new("losetup");
        losetup.arg("--detach").arg(&self.0);
        if let Err(error) = command::run(&mut losetup, LOSETUP_LIMIT) {
            eprintln!("lab: {} stays: {error}", self.0.display());
        }
    }
}

impl Storage {
    /// No storage: requests without data.
    pub(super) fn null() -> Self {
        Self {
            kind: Kind::Null,
            path: None,
            size: 1 << 30,
            direct: true,
            _device: None,
            _directory: None,
        }
    }

    /// Makes storage of this kind and size ready; on the disk in `directory`.
    ///
    /// # Errors
    /// [`LabError::Skipped`], with the reason, if this machine cannot have it.
    pub(super) fn prepare(kind: Kind, site: &Site, directory: &Path, size: u64) -> Result<Self> {
        let mut storage = Self {
            kind,
            size,
            ..Self::null()
        };
        let parent = match kind {
            Kind::Null => return Ok(storage),
            Kind::File | Kind::Loop => directory,
            Kind::Tmpfs => Path::new("/dev/shm"),
        };
        let skipped = |why: String| LabError::Skipped(format!("{}: {why}", kind.name()));
        let free = free_space(parent)?;
        if free < size.saturating_add(SPARE) {
            return Err(skipped(format!(
                "{} has {} MiB free",
                parent.display(),
                free >> 20
            )));
        }
        let made = tempfile::Builder::new()
            .prefix("ringside-bench-")
            .tempdir_in(parent)
            .doing(|| format!("make a directory in {}", parent.display()))?;
        let file = made.path().join("disk.img");
        File::create(&file)
            .and_then(|file| file.set_len(size))
            .doing(|| format!("create {}", file.display()))?;
        storage._directory = Some(made);
        storage.direct = File::options()
            .read(true)
            .custom_flags(OFlag::O_DIRECT.bits())
            .open(&file)
            .is_ok();
        // Written fully and read once: an image that is still sparse, or fresh, gives other figures.
        for direction in ["write", "read"] {
            let mut fio = fio(site);
            fio.arg(format!("--filename={}", file.display()));
            fio.arg(format!("--direct={}", u8::from(storage.direct)));
            fio.arg(format!("--rw={direction}"));
            fio.args(["--bs=1M", "--iodepth=4", "--end_fsync=1"]);
            command::run(&mut fio, PREPARE_LIMIT)?;
        }
        storage.path = Some(file.clone());
        if kind == Kind::Loop {
            let device = LoopDevice::on(&file).map_err(|error| skipped(error.to_string()))?;
            storage.path = Some(device.0.clone());
            storage._device = Some(device);
        }
        Ok(storage)
    }

    /// In words, for the table.
    pub(super) fn describe(&self) -> String {
        let mib = self.size >> 20;
        let direct = if self.direct { "O_DIRECT" } else { "buffered" };
        match self.kind {
            Kind::Null => format!("null: no data moves, {mib} MiB"),
            Kind::File => format!("file: {mib} MiB on the disk, {direct}"),
            Kind::Tmpfs => format!("tmpfs: {mib} MiB in memory, {direct}"),
            Kind::Loop => format!("loop: a loop device on a file of {mib} MiB, {direct}"),
        }
    }
}

/// fio of the lab's root with what all its runs have in common.
pub(super) fn fio(site: &Site) -> Command {
    let mut fio = site.root_program("usr/bin/fio");
    fio.args(["--name=raw", "--ioengine=io_uring", "--thread"]);
    fio.args(["--norandommap", "--randrepeat=0", "--group_reporting"]);
    fio
}

fn free_space(directory: &Path) -> Result<u64> {
    let space = nix::sys::statvfs::statvfs(directory)
        .doing(|| format!("ask for the free space of {}", directory.display()))?;
    Ok(space
        .blocks_available()
        .saturating_mul(space.fragment_size()))
}

//! Where things are on the side where KVM is: in the lab VM or on the machine itself.

use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use clap::Args;
use serde::{Deserialize, Serialize};

use crate::error::{LabError, Result};

/// Environment variable with the site as JSON, for the process of one test.
pub const SITE_VARIABLE: &str = "RINGSIDE_LAB_SITE";

/// Which machine runs the guests.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Place {
    /// This machine, with its own KVM.
    Host,
    /// The lab VM.
    Lab,
}

/// A version of stock QEMU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum QemuVersion {
    /// 10.0 of Debian trixie.
    V10,
    /// 11 of Debian trixie-backports.
    V11,
}

/// How much is done by tests that do the same again and again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Args)]
pub struct Effort {
    /// How often each test of `crash::` kills its back-end, and the guest of `boot::reboots_and_a_panic` reboots
    #[arg(long, default_value_t = 3, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub kills: u32,
    /// How long `soak::` keeps its guests busy; without it, that test is skipped
    #[arg(long = "soak-seconds", default_value_t = 0, value_name = "N", value_parser = clap::value_parser!(u32).range(..=72_000))]
    pub soak_seconds: u32,
}

impl Effort {
    /// For each kill, on plain hardware: to start again what was killed, and to have it work.
    const KILL: Duration = Duration::from_secs(2);

    /// How long it can take in one test, on plain hardware.
    #[must_use]
    pub fn duration(&self) -> Duration {
        Self::KILL
            .saturating_mul(self.kills)
            .max(Duration::from_secs(self.soak_seconds.into()))
    }
}

impl Default for Effort {
    fn default() -> Self {
        Self {
            kills: 3,
            soak_seconds: 0,
        }
    }
}

/// Paths and properties of one side.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Site {
    /// Which machine this is.
    pub place: Place,
    /// The lab's Debian root ("/" when this is the system that runs).
    pub root: PathBuf,
    /// Directory of the static programs under test.
    pub programs: PathBuf,
    /// Initramfs of a test's guest.
    pub initramfs: PathBuf,
    /// File or block device with the Debian root file system of a test's guest; never written.
    pub guest_disk: PathBuf,
    /// Directory for what tests write, on a file system with O_DIRECT and hole punching where possible.
    pub scratch: PathBuf,
    /// A whole block device that tests may overwrite, where there is one.
    pub block_device: Option<PathBuf>,
    /// How much is done by tests that do the same again and again.
    pub effort: Effort,
}

impl Site {
    /// The site as seen inside the lab VM.
    #[must_use]
    pub fn inside_lab() -> Self {
        Self {
            place: Place::Lab,
            root: "/".into(),
            programs: "/lab/bin".into(),
            initramfs: "/lab/run/guest.cpio".into(),
            guest_disk: "/dev/vda".into(),
            scratch: "/lab/scratch".into(),
            block_device: Some("/dev/vdc".into()),
            effort: Effort::default(),
        }
    }

    /// The site this process was given by the one that started it.
    ///
    /// # Errors
    /// Fails outside of the suite.
    pub fn current() -> Result<Self> {
        let text = std::env::var(SITE_VARIABLE).map_err(|_| {
            LabError::Setup("this command is for the lab's own use; see `cargo lab --help`".into())
        })?;
        serde_json::from_str(&text).map_err(|error| LabError::Protocol {
            from: "suite",
            text: error.to_string(),
        })
    }

    /// The kernel that guests boot: Debian's own, unmodified.
    #[must_use]
    pub fn kernel(&self) -> PathBuf {
        self.root.join("opt/lab/vmlinuz")
    }

    /// The same kernel as the ELF file that its bzImage unpacks itself to.
    #[must_use]
    pub fn elf_kernel(&self) -> PathBuf {
        self.root.join("opt/lab/vmlinux")
    }

    /// The only CPU that a guest's VMM may run on, where that is restricted.
    ///
    /// The lab VM's emulator sometimes loses a guest that runs on two of the emulated CPUs at once: one of its processors
    /// triple-faults, or the lab VM itself does, and the more processors the guest has the sooner. With 8 of them one boot
    /// in four ended so, of ringside-vmm (5 of 21) and of stock QEMU (3 of 12) alike; on a single CPU none of 23.
    #[must_use]
    pub fn guest_cpu(&self) -> Option<u32> {
        match self.place {
            Place::Host => None,
            Place::Lab => Some(1),
        }
    }

    /// How much longer than on plain hardware everything may take. Generous: it only matters when something is broken.
    #[must_use]
    pub fn patience(&self) -> u32 {
        match self.place {
            Place::Host => 2,
            Place::Lab => 12,
        }
    }

    /// A time limit, given for plain hardware, stretched for this site.
    #[must_use]
    pub fn limit(&self, plain: Duration) -> Duration {
        plain.saturating_mul(self.patience())
    }

    /// A command that runs one of the project's programs.
    #[must_use]
    pub fn program(&self, name: &str) -> Command {
        Command::new(self.programs.join(name))
    }

    /// A command that runs a program of the lab's root by its path in there, from wherever this process runs: through the
    /// root's own dynamic loader, which needs no privilege.
    #[must_use]
    pub fn root_program(&self, path: &str) -> Command {
        if self.root == std::path::Path::new("/") {
            return Command::new(PathBuf::from("/").join(path));
        }
        let mut command = Command::new(self.root.join("lib64/ld-linux-x86-64.so.2"));
        // fio's libraries have some of their own in the last of these.
        let libraries = [
            "usr/lib/x86_64-linux-gnu",
            "usr/lib",
            "usr/lib/x86_64-linux-gnu/ceph",
        ]
        .map(|part| self.root.join(part).display().to_string());
        command
            .arg("--library-path")
            .arg(libraries.join(":"))
            .arg(self.root.join(path));
        command
    }

    /// A command that runs stock QEMU with its own firmware directories.
    #[must_use]
    pub fn qemu(&self, version: QemuVersion) -> Command {
        let prefix = match version {
            QemuVersion::V10 => "opt/qemu-10/",
            QemuVersion::V11 => "",
        };
        let mut command = self.root_program(&format!("{prefix}usr/bin/qemu-system-x86_64"));
        for directory in [
            format!("{prefix}usr/share/qemu"),
            "usr/share/seabios".into(),
        ] {
            command.arg("-L").arg(self.root.join(directory));
        }
        command
    }
}

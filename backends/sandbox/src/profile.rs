//! What a program keeps, and how it gives up the rest.

use std::collections::BTreeMap;
use std::error::Error;
use std::fmt;
use std::path::Path;
use std::sync::OnceLock;

use caps::Capability;
use clap::ValueEnum;
use serde::Deserialize;
use thiserror::Error;
use tracing::{info, warn};

use crate::calls::{self, Call};
use crate::files::{Files, FilesError};
use crate::filter::{FilterError, Filters, ThreadKind};
use crate::privileges::{self, PrivilegeError};

/// Whether a program confines itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// A system call that is not on the list ends it. What the kernel does not let it have, it does without.
    #[default]
    On,
    /// As on, but without any part of it the program does not start.
    Strict,
    /// It has all the rights of its user.
    Off,
    /// As on, but such a call is logged by the kernel, and done.
    Log,
}

impl Mode {
    /// A part of the confinement; none if this kernel, or a container, does not let the program have it.
    fn part<T, E: Into<SandboxError>>(self, part: Result<T, E>) -> Result<Option<T>, SandboxError> {
        match part.map_err(Into::into) {
            Ok(part) => Ok(Some(part)),
            Err(error) if self == Self::Strict => Err(error),
            Err(error) => {
                warn!(
                    error = &error as &dyn Error,
                    "goes on with more rights than it needs (--sandbox=strict would not)"
                );
                Ok(None)
            }
        }
    }
}

/// The process cannot be confined.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum SandboxError {
    /// Privileges cannot be dropped.
    #[error("privileges cannot be dropped")]
    Privileges(#[from] PrivilegeError),
    /// The files that can be opened are as many as before.
    #[error("the files that can be opened cannot be restricted")]
    Files(#[from] FilesError),
    /// The system calls are as many as before.
    #[error("system calls cannot be restricted")]
    Filter(#[from] FilterError),
}

static CONFINED: OnceLock<()> = OnceLock::new();

/// Whether this process has given up what its profile does not list.
#[must_use]
pub fn confined() -> bool {
    CONFINED.get().is_some()
}

/// What a program needs from now on. Everything else is given up by [`enter`](Self::enter).
#[derive(Debug)]
pub struct Profile {
    program: &'static str,
    files: Files,
    capabilities: Vec<Capability>,
    network: bool,
    calls: Vec<Call>,
    threads: BTreeMap<ThreadKind, Vec<Call>>,
}

impl Profile {
    /// The profile of a program that does no more than compute, log, and end ([`calls::RUNTIME`]).
    #[must_use]
    pub fn new(program: &'static str) -> Self {
        Self {
            program,
            files: Files::default(),
            capabilities: Vec::new(),
            network: false,
            calls: calls::RUNTIME.to_vec(),
            threads: BTreeMap::new(),
        }
    }

    /// Keeps system calls.
    pub fn calls(&mut self, group: &[Call]) -> &mut Self {
        self.calls.extend_from_slice(group);
        self
    }

    /// Has threads of a kind keep these alone, besides [`calls::RUNTIME`], of what the process keeps. Adds to what was said
    /// before.
    pub fn thread(&mut self, kind: ThreadKind, groups: &[&[Call]]) -> &mut Self {
        let kept = self
            .threads
            .entry(kind)
            .or_insert_with(|| calls::RUNTIME.to_vec());
        groups
            .iter()
            .for_each(|group| kept.extend_from_slice(group));
        self
    }

    /// Keeps a capability, if the program has it.
    pub fn capability(&mut self, capability: Capability) -> &mut Self {
        self.capabilities.push(capability);
        self
    }

    /// Stays in the host's network. Without it the process gets one of its own, which is empty.
    pub fn network(&mut self) -> &mut Self {
        self.network = true;
        self
    }

    /// May connect to this port of TCP, on any host.
    pub fn connect_tcp(&mut self, port: u16) -> &mut Self {
        self.files.connect_tcp(port);
        self.network()
    }

    /// May connect to this port of UDP's and TCP's name servers, and read what says where they are.
    pub fn names(&mut self) -> &mut Self {
        for path in calls::NAME_FILES {
            self.files.read(Path::new(path));
        }
        self.connect_tcp(53).calls(calls::NAMES)
    }

    /// May open for reading a file, or all that lies under a directory.
    pub fn read(&mut self, path: &Path) -> &mut Self {
        self.files.read(path);
        self
    }

    /// May open for reading and writing a file, or all that lies under a directory, and use it if it is a device.
    pub fn write(&mut self, path: &Path) -> &mut Self {
        self.files.write(path);
        self
    }

    /// May list a directory, and those under it.
    pub fn list(&mut self, path: &Path) -> &mut Self {
        self.files.list(path);
        self
    }

    /// May have directories and symbolic links of its own under `path`, for a while.
    pub fn scratch(&mut self, path: &Path) -> &mut Self {
        self.files.scratch(path);
        self
    }

    /// May write to the file at `path`; if there is none, create it, and write to all others in its directory.
    pub fn create(&mut self, path: &Path) -> &mut Self {
        self.files.make(path);
        self
    }

    /// May remove the file at `path`, and so all others in its directory: Landlock knows directories, and no names in them.
    pub fn remove(&mut self, path: &Path) -> &mut Self {
        self.files.remove(path);
        self
    }

    /// May listen on a Unix socket at `path`, and remove it afterwards, and so on all others in its directory.
    pub fn listen(&mut self, path: &Path) -> &mut Self {
        self.files.listen(path);
        self
    }

    /// May connect to a Unix socket at `path`, which may be replaced by another.
    pub fn connect(&mut self, path: &Path) -> &mut Self {
        self.files.connect(path);
        self
    }

    /// Gives up everything else, for good. To be called from the main thread before the process reads from a guest or a peer,
    /// best before it has other threads: of those that it has, the system calls are restricted, and nothing else.
    ///
    /// What this kernel, or a container, does not let it have is said in the log, and done without, unless the mode is
    /// [`Mode::Strict`].
    ///
    /// # Errors
    /// [`SandboxError`]: a strict program cannot have all of it.
    pub fn enter(self, mode: Mode) -> Result<(), SandboxError> {
        let Self {
            program,
            files,
            capabilities,
            network,
            calls,
            threads,
        } = self;
        if mode == Mode::Off {
            warn!(
                "{program} is not confined (--sandbox=off): whoever takes it over has all rights of its user"
            );
            return Ok(());
        }
        // Before /proc is out of reach.
        let threads_before = privileges::threads().saturating_sub(1);
        let filters = Filters::compile(mode, &calls, threads)?;
        mode.part(privileges::hide())?;
        let namespaces = privileges::separate(network);
        let kept = mode.part(privileges::drop_capabilities(&capabilities))?;
        let landlock = mode.part(files.enforce())?;
        let seccomp = mode.part(filters.install())?;
        // Entered once: a second filter only takes away more.
        let _ = CONFINED.set(());
        info!(
            "confined: system calls {}; {}; namespaces of its own: {}; capabilities kept: {}",
            seccomp.map_or("not restricted", |()| "restricted"),
            landlock.as_deref().unwrap_or("files not restricted"),
            List(&namespaces),
            kept.map_or("all".to_owned(), |kept| List(&kept).to_string()),
        );
        if mode == Mode::Log {
            warn!(
                "system calls that are not on the list are logged by the kernel (audit type 1326) and done (--sandbox=log)"
            );
        }
        if threads_before > 0 {
            info!(
                "{threads_before} threads were there before: their system calls are restricted, but they keep files and capabilities",
            );
        }
        Ok(())
    }
}

/// Values with commas between them.
struct List<'l, T>(&'l [T]);

impl<T: fmt::Display> fmt::Display for List<'_, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            [] => f.write_str("none"),
            [first, rest @ ..] => {
                write!(f, "{first}")?;
                rest.iter().try_for_each(|value| write!(f, ", {value}"))
            }
        }
    }
}

//! Which files, sockets and ports can be opened (Landlock, landlock(7)). Descriptors that are open stay as they are.

use std::io;
use std::path::{Path, PathBuf};

use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, CompatLevel, Compatible, LandlockStatus, NetPort,
    PathBeneath, PathFd, RestrictionStatus, Ruleset, RulesetAttr, RulesetCreated,
    RulesetCreatedAttr, RulesetError, RulesetStatus, Scope,
};
use thiserror::Error;
use tracing::debug;

/// What is restricted, as far as the kernel knows it: this is Landlock's newest version that was looked at.
const NEWEST: ABI = ABI::V9;

/// Files cannot be restricted.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum FilesError {
    /// The kernel refused.
    #[error("Landlock refused a rule")]
    Rules(#[from] RulesetError),
    /// It is not there.
    #[error("{0}")]
    Absent(&'static str),
    /// There is no such file to make a rule for.
    #[error("{path} cannot be looked at")]
    Path {
        /// The path.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
}

/// What can be opened.
#[derive(Debug, Default)]
pub(crate) struct Files {
    paths: Vec<(PathBuf, BitFlags<AccessFs>)>,
    ports: Vec<u16>,
}

impl Files {
    pub(crate) fn read(&mut self, path: &Path) {
        self.add(path, AccessFs::ReadFile | AccessFs::ReadDir);
    }

    pub(crate) fn write(&mut self, path: &Path) {
        let read = AccessFs::ReadFile | AccessFs::ReadDir;
        self.add(path, read | AccessFs::WriteFile | AccessFs::IoctlDev);
    }

    pub(crate) fn list(&mut self, path: &Path) {
        self.add(path, AccessFs::ReadDir.into());
    }

    pub(crate) fn scratch(&mut self, path: &Path) {
        let make = AccessFs::MakeDir | AccessFs::MakeSym;
        let remove = AccessFs::RemoveDir | AccessFs::RemoveFile;
        self.add(path, make | remove | AccessFs::ReadDir);
    }

    pub(crate) fn make(&mut self, path: &Path) {
        if path.exists() {
            self.add(path, AccessFs::WriteFile | AccessFs::IoctlDev);
            return;
        }
        self.add(directory(path), AccessFs::MakeReg | AccessFs::WriteFile);
    }

    pub(crate) fn remove(&mut self, path: &Path) {
        self.add(directory(path), AccessFs::RemoveFile.into());
    }

    pub(crate) fn listen(&mut self, path: &Path) {
        let own = AccessFs::MakeSock | AccessFs::RemoveFile;
        // Whether the socket that is there is anybody's is asked by connecting to it.
        self.add(directory(path), own | AccessFs::ResolveUnix);
    }

    pub(crate) fn connect(&mut self, path: &Path) {
        self.add(directory(path), AccessFs::ResolveUnix.into());
    }

    pub(crate) fn connect_tcp(&mut self, port: u16) {
        self.ports.push(port);
    }

    fn add(&mut self, path: &Path, access: BitFlags<AccessFs>) {
        self.paths.push((path.to_owned(), access));
    }

    /// Restricts the calling thread, and those that it starts. Returns what came of it, for the log.
    pub(crate) fn enforce(&self) -> Result<String, FilesError> {
        let ruleset = Ruleset::default()
            .set_compatibility(CompatLevel::BestEffort)
            .handle_access(AccessFs::from_all(NEWEST))?
            .handle_access(AccessNet::from_all(NEWEST))?
            .scope(Scope::from_all(NEWEST))?
            .create()?;
        let ruleset = self
            .paths
            .iter()
            .try_fold(ruleset, |rules, (path, access)| allow(rules, path, *access))?;
        let ports = self.ports.iter();
        let ports =
            ports.map(|&port| Ok::<_, RulesetError>(NetPort::new(port, AccessNet::ConnectTcp)));
        let status = ruleset.add_rules(ports)?.restrict_self()?;
        describe(&status)
    }
}

/// One rule more, if there is something at `path`.
fn allow(
    rules: RulesetCreated,
    path: &Path,
    access: BitFlags<AccessFs>,
) -> Result<RulesetCreated, FilesError> {
    let meta = match path.metadata() {
        Ok(meta) => meta,
        Err(error) => {
            debug!("{} will not be opened: {error}", path.display());
            return Ok(rules);
        }
    };
    let access = if meta.is_dir() {
        access
    } else {
        access & AccessFs::from_file(NEWEST)
    };
    let fd = PathFd::new(path).map_err(|error| FilesError::Path {
        path: path.to_owned(),
        source: io::Error::other(error),
    })?;
    Ok(rules.add_rule(PathBeneath::new(fd, access))?)
}

/// The directory that a file is in.
fn directory(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        Some(_) => Path::new("."),
        None => path,
    }
}

fn describe(status: &RestrictionStatus) -> Result<String, FilesError> {
    Ok(match (&status.landlock, &status.ruleset) {
        (LandlockStatus::Available { effective_abi, .. }, RulesetStatus::FullyEnforced) => {
            format!(
                "Landlock restricts what can be opened (version {})",
                *effective_abi as i32
            )
        }
        (LandlockStatus::Available { effective_abi, .. }, _) => {
            let lacks = [
                (ABI::V3, "truncating files"),
                (ABI::V4, "TCP"),
                (ABI::V5, "device ioctls"),
                (ABI::V6, "signals and abstract sockets"),
                (ABI::V9, "Unix sockets"),
            ];
            let lacks = lacks.iter().filter(|(abi, _)| abi > effective_abi);
            let lacks: Vec<&str> = lacks.map(|&(_, what)| what).collect();
            format!(
                "Landlock restricts what can be opened, but in this kernel (version {}) not {}",
                *effective_abi as i32,
                lacks.join(", ")
            )
        }
        (LandlockStatus::NotEnabled, _) => {
            return Err(FilesError::Absent(
                "Landlock is off (boot with lsm=landlock,...)",
            ));
        }
        (LandlockStatus::NotImplemented, _) => {
            return Err(FilesError::Absent(
                "this kernel, or a container, has no Landlock (CONFIG_SECURITY_LANDLOCK)",
            ));
        }
    })
}

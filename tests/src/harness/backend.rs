//! The project's back-ends as processes.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use super::daemon::{Daemon, fresh_name, is_socket};
use crate::command;
use crate::ensure;
use crate::error::Result;
use crate::programs::DYNAMIC_BLK;
use crate::site::Site;

/// How long a back-end may take until its socket is there, on plain hardware.
const READY_LIMIT: Duration = Duration::from_secs(5);

/// What a back-end serves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A disk.
    Blk,
    /// A network card.
    Net,
}

/// A running back-end.
#[derive(Debug)]
pub struct BackEnd {
    daemon: Daemon,
    pub(super) kind: Kind,
    /// Its socket, relative to the test's directory: socket addresses are short.
    pub(super) socket: String,
    /// Queues, or queue pairs.
    pub(super) queues: u16,
}

impl BackEnd {
    /// Its process.
    #[must_use]
    pub fn daemon(&mut self) -> &mut Daemon {
        &mut self.daemon
    }

    /// Its socket's path, relative to the test's directory.
    #[must_use]
    pub fn socket(&self) -> &str {
        &self.socket
    }

    /// Asks it to end, by SIGTERM.
    ///
    /// # Errors
    /// Fails if it does not end promptly, or not with success.
    pub fn stop(mut self, site: &Site) -> Result<()> {
        let status = self.daemon.stop(site)?;
        ensure!(
            status.success(),
            "the back-end at {} ended with {status} on SIGTERM",
            self.socket
        );
        Ok(())
    }

    /// Starts somebody else's back-end: `command` is what makes it listen at `socket`, and `queues` are its queues or queue pairs.
    ///
    /// # Errors
    /// Fails, with the end of its log, if it does not come up.
    pub fn foreign(
        site: &Site,
        kind: Kind,
        queues: u16,
        socket: &str,
        command: Command,
    ) -> Result<Self> {
        let program = command.get_program().to_string_lossy().into_owned();
        let name = program.rsplit('/').next().unwrap_or("back-end");
        Self::start(site, name, kind, queues, socket.into(), command)
    }

    fn ours(
        site: &Site,
        kind: Kind,
        program: &str,
        queues: u16,
        socket: Option<String>,
        arguments: &[String],
        ordinary_user: bool,
    ) -> Result<Self> {
        let stem = match kind {
            Kind::Blk => "blk",
            Kind::Net => "net",
        };
        let socket = socket.unwrap_or_else(|| fresh_name(site, stem, "sock"));
        let mut command = site.program(program);
        command.arg("--socket-path").arg(&socket).args(arguments);
        if ordinary_user {
            command = command::as_ordinary_user(&command);
        }
        Self::start(site, program, kind, queues, socket, command)
    }

    fn start(
        site: &Site,
        name: &str,
        kind: Kind,
        queues: u16,
        socket: String,
        command: Command,
    ) -> Result<Self> {
        let mut daemon = Daemon::start(site, name, command)?;
        let path = site.scratch.join(&socket);
        daemon.wait_until("its socket", site.limit(READY_LIMIT), || is_socket(&path))?;
        Ok(Self {
            daemon,
            kind,
            socket,
            queues,
        })
    }
}

/// Starts `ringside-blk`.
#[derive(Debug)]
pub struct Blk {
    program: &'static str,
    path: PathBuf,
    queues: u16,
    socket: Option<String>,
    arguments: Vec<String>,
}

impl Blk {
    /// A disk on this file or block device.
    #[must_use]
    pub fn on(path: impl Into<PathBuf>) -> Self {
        Self {
            program: "ringside-blk",
            path: path.into(),
            queues: 1,
            socket: None,
            arguments: Vec::new(),
        }
    }

    /// By the program that is linked dynamically, and so can load libraries.
    #[must_use]
    pub fn dynamic(mut self) -> Self {
        self.program = DYNAMIC_BLK;
        self
    }

    /// How many queues it offers.
    #[must_use]
    pub fn queues(mut self, queues: u16) -> Self {
        self.queues = queues;
        self
    }

    /// The socket of one that is gone, to take its place.
    #[must_use]
    pub fn in_place_of(mut self, gone: &BackEnd) -> Self {
        self.socket = Some(gone.socket.clone());
        self
    }

    /// One more argument of the program.
    #[must_use]
    pub fn arg(mut self, argument: &str) -> Self {
        self.arguments.push(argument.into());
        self
    }

    /// Starts it, and waits until a front-end can connect.
    ///
    /// # Errors
    /// Fails, with the end of its log, if it does not come up.
    pub fn start(mut self, site: &Site) -> Result<BackEnd> {
        self.arguments
            .push(format!("--path={}", self.path.display()));
        self.arguments.push(format!("--queues={}", self.queues));
        BackEnd::ours(
            site,
            Kind::Blk,
            self.program,
            self.queues,
            self.socket,
            &self.arguments,
            false,
        )
    }
}

/// Starts `ringside-net` on a TAP of the test's network namespace, or another link.
#[derive(Debug)]
pub struct Net {
    /// Name of the TAP, if it is one.
    tap: Option<String>,
    ordinary_user: bool,
    address: Option<String>,
    pairs: u16,
    socket: Option<String>,
    arguments: Vec<String>,
}

impl Net {
    /// A network card on a TAP of this name.
    #[must_use]
    pub fn tap(name: &str) -> Self {
        Self {
            tap: Some(name.into()),
            ..Self::without(format!("--tap={name}"))
        }
    }

    /// A network card on a link that is ready, as `--link` has it.
    #[must_use]
    pub fn link(link: &str) -> Self {
        Self::without(format!("--link={link}"))
    }

    fn without(argument: String) -> Self {
        Self {
            tap: None,
            ordinary_user: false,
            address: None,
            pairs: 1,
            socket: None,
            arguments: vec![argument],
        }
    }

    /// Runs it as a user without privileges.
    #[must_use]
    pub fn as_ordinary_user(mut self) -> Self {
        self.ordinary_user = true;
        self
    }

    /// The address (with its prefix length) that this side of the TAP gets.
    #[must_use]
    pub fn address(mut self, address: &str) -> Self {
        self.address = Some(address.into());
        self
    }

    /// The socket of one that is gone, to take its place.
    #[must_use]
    pub fn in_place_of(mut self, gone: &BackEnd) -> Self {
        self.socket = Some(gone.socket.clone());
        self
    }

    /// How many queue pairs it offers.
    #[must_use]
    pub fn queue_pairs(mut self, pairs: u16) -> Self {
        self.pairs = pairs;
        self
    }

    /// One more argument of the program.
    #[must_use]
    pub fn arg(mut self, argument: &str) -> Self {
        self.arguments.push(argument.into());
        self
    }

    /// Starts it, waits until a front-end can connect, and brings the TAP up.
    ///
    /// # Errors
    /// Fails, with the end of its log, if it does not come up; and if the TAP cannot be set up.
    pub fn start(mut self, site: &Site) -> Result<BackEnd> {
        self.arguments.push(format!("--queue-pairs={}", self.pairs));
        let backend = BackEnd::ours(
            site,
            Kind::Net,
            "ringside-net",
            self.pairs,
            self.socket.take(),
            &self.arguments,
            self.ordinary_user,
        )?;
        if let Some(tap) = &self.tap {
            if let Some(address) = &self.address {
                command::run_line(&format!("ip address add {address} dev {tap}"))?;
            }
            command::run_line(&format!("ip link set {tap} up"))?;
        }
        Ok(backend)
    }
}

/// Creates a sparse file for a disk in the test's directory; `size` in bytes.
///
/// # Errors
/// Fails if it cannot be created.
pub fn disk_file(site: &Site, name: &str, size: u64) -> Result<PathBuf> {
    use crate::error::Doing;
    let path = site.scratch.join(name);
    let doing = || format!("create {}", path.display());
    std::fs::File::create(&path)
        .doing(doing)?
        .set_len(size)
        .doing(doing)?;
    Ok(path)
}

/// SHA-256 of a whole file or block device.
///
/// # Errors
/// Fails if it cannot be read.
pub fn sha256(path: &Path) -> Result<String> {
    let mut command = Command::new("sha256sum");
    let text = command::run(command.arg(path), Duration::from_secs(600))?;
    Ok(text
        .split_whitespace()
        .next()
        .unwrap_or_default()
        .to_owned())
}

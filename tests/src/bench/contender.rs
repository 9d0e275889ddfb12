//! The back-ends that are measured, each by its command line, and their processes.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::storage::{Kind, Storage};
use crate::command::{GRACE, bound, end_tree};
use crate::error::{Doing, LabError, Result, last_lines};
use crate::site::Site;

/// How long a back-end may take on plain hardware until it listens.
const START_LIMIT: Duration = Duration::from_secs(10);
/// How often its socket is looked for.
const START_POLL: Duration = Duration::from_micros(500);

/// Whose it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Family {
    /// `ringside-blk`
    Ringside,
    /// `qemu-storage-daemon`
    Qemu,
    /// Given on the command line.
    Other,
}

/// A back-end with its settings.
#[derive(Debug, Clone)]
pub(super) struct Contender {
    pub(super) name: String,
    pub(super) family: Family,
    settings: Settings,
}

#[derive(Debug, Clone)]
enum Settings {
    /// More options.
    Ringside(&'static [&'static str]),
    /// Options of the iothread.
    Qemu(&'static str),
    /// A command line with {socket} and {path}.
    Line(String),
}

/// Busy waiting for a millisecond, whatever it costs.
const BUSY: &[&str] = &[
    "--poll",
    "10000",
    "--poll-storage",
    "10000",
    "--poll-budget",
    "100",
];

/// Our back-end and QEMU's, both as they come (QEMU's in an iothread, which is its best) and busy waiting, and those of the command line.
pub(super) fn all(others: &[String]) -> Result<Vec<Contender>> {
    let contender = |name: &str, family, settings| Contender {
        name: name.into(),
        family,
        settings,
    };
    let mut all = vec![
        contender("ringside", Family::Ringside, Settings::Ringside(&[])),
        contender("ringside busy", Family::Ringside, Settings::Ringside(BUSY)),
        contender("qsd", Family::Qemu, Settings::Qemu("")),
        contender(
            "qsd busy",
            Family::Qemu,
            Settings::Qemu(",poll-max-ns=1000000"),
        ),
    ];
    for other in others {
        let Some((name, line)) = other.split_once('=') else {
            return Err(LabError::Setup(format!(
                "--back-end {other}: give NAME=COMMAND"
            )));
        };
        if !line.contains("{socket}") {
            return Err(LabError::Setup(format!(
                "--back-end {name}: the command line must have {{socket}}"
            )));
        }
        all.push(Contender::line(name, line.into()));
    }
    Ok(all)
}

impl Contender {
    /// A back-end that is started by a command line, with {socket} and, for real storage, {path}.
    pub(super) fn line(name: &str, line: String) -> Self {
        Self {
            name: name.into(),
            family: Family::Other,
            settings: Settings::Line(line),
        }
    }

    /// Whether it can serve this storage: a command line without {path} has no data, and one with it has some.
    pub(super) fn serves(&self, storage: &Storage) -> bool {
        match &self.settings {
            Settings::Line(line) => line.contains("{path}") == storage.path.is_some(),
            _ => true,
        }
    }

    /// The command that serves `storage` at `socket`.
    fn command(&self, site: &Site, storage: &Storage, queues: u16, socket: &Path) -> Command {
        match &self.settings {
            Settings::Ringside(options) => {
                let mut command = bound(site.programs.join("ringside-blk"));
                command.arg("--socket-path").arg(socket);
                match &storage.path {
                    Some(path) => {
                        command.arg("--path").arg(path);
                        command.args(storage.direct.then_some("--direct"));
                    }
                    None => {
                        command.arg("--null").arg(storage.size.to_string());
                    }
                }
                command.arg("--queues").arg(queues.to_string());
                command.args(*options);
                command
            }
            Settings::Qemu(options) => {
                let program = site.root_program("usr/bin/qemu-storage-daemon");
                let mut command = bound(program.get_program());
                command.args(program.get_args());
                command
                    .arg("--object")
                    .arg(format!("iothread,id=io0{options}"));
                command.arg("--blockdev");
                command.arg(match &storage.path {
                    Some(path) => {
                        let driver = match storage.kind {
                            Kind::Loop => "host_device",
                            _ => "file",
                        };
                        let cache = if storage.direct { "on" } else { "off" };
                        format!(
                            "{driver},node-name=disk,filename={},aio=io_uring,cache.direct={cache}",
                            path.display()
                        )
                    }
                    None => format!(
                        "null-co,node-name=disk,size={},read-zeroes=off",
                        storage.size
                    ),
                });
                command.arg("--export").arg(format!(
                    "vhost-user-blk,id=export,node-name=disk,writable=on,num-queues={queues},iothread=io0,\
                     addr.type=unix,addr.path={}",
                    socket.display()
                ));
                command
            }
            Settings::Line(line) => {
                let path = storage
                    .path
                    .as_ref()
                    .map_or_else(String::new, |path| path.display().to_string());
                let line = line
                    .replace("{socket}", &socket.display().to_string())
                    .replace("{path}", &path)
                    .replace("{queues}", &queues.to_string());
                let mut command = bound("sh");
                command.arg("-c").arg(format!("exec {line}"));
                command
            }
        }
    }

    /// Starts it, and waits until it listens.
    ///
    /// # Errors
    /// Fails, with the end of what it wrote, if it does not.
    pub(super) fn start(
        &self,
        site: &Site,
        storage: &Storage,
        queues: u16,
        directory: &Path,
    ) -> Result<Process> {
        let socket = socket_in(directory);
        let command = self.command(site, storage, queues, &socket);
        Process::start(&self.name, command, site, directory)
    }
}

/// A running back-end; it ends when dropped.
#[derive(Debug)]
pub(super) struct Process {
    child: Child,
    pub(super) socket: PathBuf,
    log: PathBuf,
    /// From its start until it listened.
    pub(super) started: Duration,
}

/// Where a back-end that is measured listens.
pub(super) fn socket_in(directory: &Path) -> PathBuf {
    directory.join("back-end.sock")
}

impl Process {
    /// Runs a back-end that is to listen at [`socket_in`] its directory, and waits until it does.
    ///
    /// # Errors
    /// Fails, with the end of what it wrote, if it does not.
    pub(super) fn start(
        name: &str,
        mut command: Command,
        site: &Site,
        directory: &Path,
    ) -> Result<Self> {
        let socket = socket_in(directory);
        let log = directory.join("back-end.log");
        // One that was killed leaves it behind.
        let _ = fs::remove_file(&socket);
        let file = File::create(&log).doing(|| format!("create {}", log.display()))?;
        let errors = file
            .try_clone()
            .doing(|| format!("write {}", log.display()))?;
        let start = Instant::now();
        let child = command
            .stdin(Stdio::null())
            .stdout(file)
            .stderr(errors)
            .spawn()
            .doing(|| format!("run {name}"))?;
        let mut process = Self {
            child,
            socket,
            log,
            started: Duration::ZERO,
        };
        while !listens(&process.socket, process.pid()) {
            let ended = process.child.try_wait();
            if ended.is_ok_and(|status| status.is_some()) {
                return Err(LabError::Ended {
                    what: format!("{name} ended before it listened"),
                    output: process.text(),
                });
            }
            let limit = site.limit(START_LIMIT);
            if start.elapsed() > limit {
                return Err(LabError::TimedOut {
                    what: format!("the listening of {name}"),
                    limit,
                    output: process.text(),
                });
            }
            thread::sleep(START_POLL);
        }
        process.started = start.elapsed();
        Ok(process)
    }

    pub(super) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What it wrote.
    pub(super) fn text(&self) -> String {
        let text = fs::read(&self.log).unwrap_or_default();
        last_lines(&String::from_utf8_lossy(&text), 20).join("\n")
    }

    /// Ends it, and gives what it wrote.
    pub(super) fn end(mut self) -> String {
        end_tree(&mut self.child, GRACE);
        self.text()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        end_tree(&mut self.child, GRACE);
    }
}

/// Whether somebody listens on a Unix socket, here or in the network namespace of a process; without connecting, which some
/// back-ends take for their front-end.
fn listens(socket: &Path, pid: u32) -> bool {
    // __SO_ACCEPTCON, in the fourth column (proc(5)).
    const LISTENS: &str = "00010000";
    let path = socket.display().to_string();
    let found = |list: &str| {
        fs::read_to_string(list).is_ok_and(|text| {
            text.lines().any(|line| {
                let mut words = line.split_whitespace();
                words.nth(3) == Some(LISTENS) && line.ends_with(&path)
            })
        })
    };
    found("/proc/net/unix") || found(&format!("/proc/{pid}/net/unix"))
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn only_a_socket_that_listens_is_one() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s");
        let pid = std::process::id();
        assert!(!listens(&path, pid));
        let listener = UnixListener::bind(&path).unwrap();
        assert!(listens(&path, pid));
        drop(listener);
        assert!(!listens(&path, pid));
    }

    #[test]
    fn other_back_ends_need_a_socket() {
        assert!(all(&["spdk".into()]).is_err());
        assert!(all(&["spdk=vhost".into()]).is_err());
        let all = all(&["spdk=vhost -S {socket}".into()]).unwrap();
        assert_eq!(all.last().unwrap().name, "spdk");
    }
}

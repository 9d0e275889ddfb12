//! A process that runs beside the test until it is stopped, with its log in a file.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::command::{describe, wait_for};
use crate::error::{Doing, LabError, Result, last_lines};
use crate::site::Site;

/// How long a process may take to end when asked to, on plain hardware.
const STOP_LIMIT: Duration = Duration::from_secs(5);

/// A running process.
#[derive(Debug)]
pub struct Daemon {
    child: Child,
    name: String,
    log: PathBuf,
}

/// A name with a number after it if the current test has such a file already: `blk.log`, `blk-2.log`.
pub(super) fn fresh_name(site: &Site, stem: &str, extension: &str) -> String {
    (1_u32..)
        .map(|number| match number {
            1 => format!("{stem}.{extension}"),
            _ => format!("{stem}-{number}.{extension}"),
        })
        .find(|name| !site.scratch.join(name).exists())
        .unwrap_or_else(|| format!("{stem}.{extension}"))
}

impl Daemon {
    /// Starts a process whose output goes to `NAME.log`.
    ///
    /// # Errors
    /// Fails if it cannot be started.
    pub fn start(site: &Site, name: &str, mut command: Command) -> Result<Self> {
        let log = site.scratch.join(fresh_name(site, name, "log"));
        let doing = || format!("create {}", log.display());
        let output = File::create(&log).doing(doing)?;
        let errors = output.try_clone().doing(doing)?;
        let line = describe(&command);
        let child = command
            .current_dir(&site.scratch)
            .stdin(Stdio::null())
            .stdout(output)
            .stderr(errors)
            .spawn()
            .doing(|| format!("run `{line}`"))?;
        Ok(Self {
            child,
            name: name.into(),
            log,
        })
    }

    /// The process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The file that it writes to.
    #[must_use]
    pub fn log_path(&self) -> &Path {
        &self.log
    }

    /// What it has written so far.
    #[must_use]
    pub fn log(&self) -> String {
        String::from_utf8_lossy(&fs::read(&self.log).unwrap_or_default()).into_owned()
    }

    fn log_tail(&self) -> String {
        last_lines(&self.log(), 20).join("\n")
    }

    /// Its exit status, if it has ended.
    ///
    /// # Errors
    /// Fails if the process cannot be asked.
    pub fn ended(&mut self) -> Result<Option<ExitStatus>> {
        self.child
            .try_wait()
            .doing(|| format!("wait for {}", self.name))
    }

    /// Waits until `ready` says so.
    ///
    /// # Errors
    /// Fails if that does not happen within the limit, or the process ends before.
    pub fn wait_until(
        &mut self,
        what: &str,
        limit: Duration,
        mut ready: impl FnMut() -> bool,
    ) -> Result<()> {
        let start = Instant::now();
        loop {
            if ready() {
                return Ok(());
            }
            if let Some(status) = self.ended()? {
                return Err(LabError::Ended {
                    what: format!("{} ended with {status} before {what}", self.name),
                    output: self.log_tail(),
                });
            }
            if start.elapsed() > limit {
                return Err(LabError::TimedOut {
                    what: format!("{}: {what}", self.name),
                    limit,
                    output: self.log_tail(),
                });
            }
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// Waits for the process to end by itself.
    ///
    /// # Errors
    /// Fails if it still runs at the limit.
    pub fn wait(&mut self, limit: Duration) -> Result<ExitStatus> {
        match wait_for(&mut self.child, limit)? {
            Some(status) => Ok(status),
            None => Err(LabError::TimedOut {
                what: format!("the end of {}", self.name),
                limit,
                output: self.log_tail(),
            }),
        }
    }

    /// Sends a signal.
    ///
    /// # Errors
    /// Fails if the process is gone.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        signal_child(&self.child, signal)
    }

    /// Asks it to end (SIGTERM) and gives its exit status.
    ///
    /// # Errors
    /// Fails if it does not end promptly.
    pub fn stop(&mut self, site: &Site) -> Result<ExitStatus> {
        if let Some(status) = self.ended()? {
            return Ok(status);
        }
        self.signal(Signal::SIGTERM)?;
        self.wait(site.limit(STOP_LIMIT))
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            let _ = self.signal(Signal::SIGTERM);
            if !matches!(
                wait_for(&mut self.child, Duration::from_secs(3)),
                Ok(Some(_))
            ) {
                let _ = self.child.kill();
            }
        }
        let _ = self.child.wait();
    }
}

/// Sends a signal to a process that this one has started and not yet waited for: its number cannot be another's.
pub(super) fn signal_child(child: &Child, signal: Signal) -> Result<()> {
    let pid = i32::try_from(child.id()).unwrap_or(i32::MAX);
    kill(Pid::from_raw(pid), signal).doing(|| format!("send {signal} to process {pid}"))
}

/// Whether a Unix socket exists there, without connecting: a back-end takes a connection for its front-end.
pub(super) fn is_socket(path: &Path) -> bool {
    use std::os::unix::fs::FileTypeExt;
    fs::symlink_metadata(path).is_ok_and(|metadata| metadata.file_type().is_socket())
}

/// How many threads a process has started: those that the kernel adds for io_uring come and go as it likes.
///
/// # Errors
/// Fails if there is no such process.
pub fn threads(pid: u32) -> Result<usize> {
    let path = format!("/proc/{pid}/task");
    let tasks = std::fs::read_dir(&path).doing(|| format!("list {path}"))?;
    let own = tasks.flatten().filter(|task| {
        let name = std::fs::read_to_string(task.path().join("comm"));
        !name.is_ok_and(|name| name.starts_with("iou-"))
    });
    Ok(own.count())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn site(directory: &Path) -> Site {
        Site {
            scratch: directory.into(),
            ..Site::inside_lab()
        }
    }

    fn script(text: &str) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", text]);
        command
    }

    #[test]
    fn end_before_ready_shows_the_log() {
        let directory = tempfile::tempdir().unwrap();
        let site = site(directory.path());
        let mut daemon = Daemon::start(&site, "x", script("echo no such file; exit 1")).unwrap();
        let error = daemon
            .wait_until("its socket", Duration::from_secs(9), || false)
            .unwrap_err();
        assert!(error.to_string().contains("no such file"), "{error}");
    }

    #[test]
    fn stop_is_by_sigterm() {
        let directory = tempfile::tempdir().unwrap();
        let site = site(directory.path());
        let text = "trap 'exit 5' TERM; touch up; while :; do sleep 0.05; done";
        let mut daemon = Daemon::start(&site, "x", script(text)).unwrap();
        let up = directory.path().join("up");
        daemon
            .wait_until("it runs", Duration::from_secs(9), || up.exists())
            .unwrap();
        assert_eq!(daemon.stop(&site).unwrap().code(), Some(5));
    }

    #[test]
    fn names_do_not_collide() {
        let directory = tempfile::tempdir().unwrap();
        let site = site(directory.path());
        let _first = Daemon::start(&site, "x", script("exit 0")).unwrap();
        assert_eq!(fresh_name(&site, "x", "log"), "x-2.log");
    }
}

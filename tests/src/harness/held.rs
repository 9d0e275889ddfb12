//! What a process holds of the machine, to tell whether it grows.

use std::fmt;
use std::fs;

use super::daemon::threads;
use crate::error::{Doing, Result};

/// What a process holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Held {
    /// Resident memory of its own, in KiB: that of guests is not.
    pub memory: u64,
    /// Open file descriptors.
    pub descriptors: usize,
    /// Threads, without the kernel's for io_uring.
    pub threads: usize,
}

impl Held {
    /// What it holds now.
    ///
    /// # Errors
    /// Fails if there is no such process.
    pub fn by(pid: u32) -> Result<Self> {
        let path = format!("/proc/{pid}/status");
        let status = fs::read_to_string(&path).doing(|| format!("read {path}"))?;
        let path = format!("/proc/{pid}/fd");
        let descriptors = fs::read_dir(&path).doing(|| format!("list {path}"))?;
        let memory = status
            .lines()
            .find_map(|line| line.strip_prefix("RssAnon:")?.trim().strip_suffix(" kB"));
        Ok(Self {
            memory: memory
                .and_then(|memory| memory.trim().parse().ok())
                .unwrap_or(0),
            descriptors: descriptors.count(),
            threads: threads(pid)?,
        })
    }
}

impl fmt::Display for Held {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            memory,
            descriptors,
            threads,
        } = self;
        write!(f, "{memory} KiB, {descriptors} fds, {threads} threads")
    }
}

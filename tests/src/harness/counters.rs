//! Counts of what guests and back-ends do: KVM exits, system calls, interrupts.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use nix::sys::signal::Signal;

use super::daemon::Daemon;
use super::guest::Guest;
use crate::error::{Doing, LabError, Result};
use crate::site::Site;

/// Where KVM shows its counters.
const KVM_DIRECTORY: &str = "/sys/kernel/debug/kvm";

/// KVM's counters, summed over all guests: a test has one.
#[derive(Debug, Clone)]
pub struct KvmCounts(BTreeMap<String, u64>);

impl KvmCounts {
    /// Reads them.
    ///
    /// # Errors
    /// Skips the test where there are none (debugfs absent or not readable).
    pub fn read() -> Result<Self> {
        let entries = fs::read_dir(KVM_DIRECTORY).map_err(|error| {
            LabError::Skipped(format!("no counters of KVM in {KVM_DIRECTORY}: {error}"))
        })?;
        let mut counts = BTreeMap::new();
        for entry in entries.flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            // Directories are of one guest each, and histograms have several numbers.
            if let Ok(text) = fs::read_to_string(entry.path())
                && let Ok(value) = text.trim().parse()
            {
                counts.insert(name, value);
            }
        }
        Ok(Self(counts))
    }

    /// How much a counter (`exits`, `io_exits`, `mmio_exits`, `halt_exits`, …) has grown since an earlier reading.
    #[must_use]
    pub fn since(&self, earlier: &Self, name: &str) -> u64 {
        let value = |counts: &Self| counts.0.get(name).copied().unwrap_or_default();
        value(self).saturating_sub(value(earlier))
    }
}

/// Counts the system calls of a process and its threads with strace.
#[derive(Debug)]
pub struct SyscallCounter {
    strace: Daemon,
    table: std::path::PathBuf,
}

impl SyscallCounter {
    /// Starts to count.
    ///
    /// # Errors
    /// Fails if strace cannot attach.
    pub fn attach(site: &Site, pid: u32) -> Result<Self> {
        let table = site.scratch.join(format!("syscalls-{pid}"));
        let mut command = Command::new("strace");
        command
            .args(["-f", "-c", "-U", "name,calls", "-o"])
            .arg(&table);
        command.arg("-p").arg(pid.to_string());
        let mut strace = Daemon::start(site, "strace", command)?;
        strace.wait_until("it is attached", site.limit(Duration::from_secs(5)), || {
            traced(pid)
        })?;
        Ok(Self { strace, table })
    }

    /// Stops, and gives the calls by name.
    ///
    /// # Errors
    /// Fails if strace does not end or leaves no table.
    pub fn finish(mut self, site: &Site) -> Result<BTreeMap<String, u64>> {
        self.strace.signal(Signal::SIGINT)?;
        self.strace.wait(site.limit(Duration::from_secs(5)))?;
        // Without a single call there is no table.
        let text =
            fs::read_to_string(&self.table).doing(|| format!("read {}", self.table.display()))?;
        Ok(parse_table(&text))
    }
}

/// Whether all threads of a process have a tracer.
fn traced(pid: u32) -> bool {
    let Ok(threads) = fs::read_dir(format!("/proc/{pid}/task")) else {
        return false;
    };
    threads.flatten().all(|thread| has_tracer(&thread.path()))
}

fn has_tracer(thread: &Path) -> bool {
    fs::read_to_string(thread.join("status")).is_ok_and(|status| {
        status
            .lines()
            .find_map(|line| line.strip_prefix("TracerPid:"))
            .is_some_and(|tracer| tracer.trim() != "0")
    })
}

/// Lines of `name calls`, between a heading and a total.
fn parse_table(text: &str) -> BTreeMap<String, u64> {
    text.lines()
        .filter_map(|line| {
            let mut words = line.split_whitespace();
            let name = words.next()?;
            let calls = words.next()?.parse().ok()?;
            (name != "total").then(|| (name.to_owned(), calls))
        })
        .collect()
}

/// Sum of the interrupts in the guest's `/proc/interrupts` whose line contains `part` (such as `virtio1-`).
///
/// # Errors
/// Fails if the guest does not answer.
pub fn guest_interrupts(guest: &mut Guest, part: &str) -> Result<u64> {
    Ok(sum_interrupts(&guest.run_ok("cat /proc/interrupts")?, part))
}

fn sum_interrupts(table: &str, part: &str) -> u64 {
    let cpus = table
        .lines()
        .next()
        .map_or(0, |line| line.split_whitespace().count());
    table
        .lines()
        .skip(1)
        .filter(|line| line.contains(part))
        .flat_map(|line| line.split_whitespace().skip(1).take(cpus))
        .filter_map(|word| word.parse::<u64>().ok())
        .sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strace_table_is_parsed() {
        let text = "syscall              calls\n---------------- ---------\n\
                    io_uring_enter         120\nwrite                    3\n\
                    ---------------- ---------\ntotal                  123\n";
        let calls = parse_table(text);
        assert_eq!(calls.len(), 2);
        assert_eq!(calls["io_uring_enter"], 120);
    }

    #[test]
    fn interrupts_of_all_cpus_are_summed() {
        let table = "           CPU0       CPU1\n  24:   5   7   PCI-MSIX-0000:00:03.0   0-edge   virtio1-req.0\n\
                     25:   1   0   PCI-MSIX-0000:00:03.0   1-edge   virtio2-req.0\n";
        assert_eq!(sum_interrupts(table, "virtio1-"), 12);
        assert_eq!(sum_interrupts(table, "virtio"), 13);
    }
}

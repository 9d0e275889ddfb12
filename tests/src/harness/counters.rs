//! Counts of what guests, VMMs and back-ends do: system calls, KVM exits, interrupts. Counts do not depend on how fast the
//! machine is.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::time::Duration;

use crate::command;
use crate::error::{Doing, LabError, Result};
use crate::site::Site;

/// Where the kernel describes its tracepoints.
const TRACEPOINTS: &str = "/sys/kernel/tracing/events";
/// Any system call.
pub const SYSTEM_CALL: &str = "raw_syscalls:sys_enter";
/// A system call that KVM_RUN is one of, and the only one that a VMM makes all the time.
pub const IOCTL: &str = "syscalls:sys_enter_ioctl";
/// A guest was left for the kernel, whatever for.
pub const KVM_EXIT: &str = "kvm:kvm_exit";
/// A request was handed to an io_uring.
pub const URING_REQUEST: &str = "io_uring:io_uring_submit_req";

/// How often tracepoints were passed by each of some processes, within one window of time. The processes are not slowed down or
/// woken up by it, as they would be by strace.
#[derive(Debug)]
pub struct EventCounts(BTreeMap<(u32, String), u64>);

impl EventCounts {
    /// Counts for some seconds.
    ///
    /// # Errors
    /// Skips the test where the kernel shows no tracepoints; fails if perf does.
    pub fn measure(site: &Site, pids: &[u32], events: &[&str], seconds: u64) -> Result<Self> {
        if fs::read_dir(TRACEPOINTS).is_err() {
            return Err(LabError::Skipped(format!(
                "tracepoints cannot be counted: {TRACEPOINTS} is not there or not readable"
            )));
        }
        let table = site.scratch.join("perf.csv");
        let list: Vec<String> = pids.iter().map(u32::to_string).collect();
        let mut perf = site.root_program("usr/bin/perf");
        perf.args(["stat", "--per-thread", "-x", ",", "-o"])
            .arg(&table);
        perf.arg("-e").arg(events.join(","));
        perf.arg("-p").arg(list.join(","));
        perf.args(["--", "sleep", &seconds.to_string()]);
        let threads = threads_of(pids)?;
        command::run(
            &mut perf,
            Duration::from_secs(seconds) + site.limit(Duration::from_secs(5)),
        )?;
        let text = fs::read_to_string(&table).doing(|| format!("read {}", table.display()))?;
        let mut counts = BTreeMap::new();
        for (thread, event, count) in parse_perf(&text) {
            let Some(pid) = threads.get(&thread) else {
                continue;
            };
            *counts.entry((*pid, event.to_owned())).or_default() += count;
        }
        // A count that perf did not take must not look like none.
        for pid in pids {
            for event in events {
                if !counts.contains_key(&(*pid, (*event).to_owned())) {
                    return Err(LabError::Protocol { from: "perf", text });
                }
            }
        }
        Ok(Self(counts))
    }

    /// How often a process passed a tracepoint.
    #[must_use]
    pub fn of(&self, pid: u32, event: &str) -> u64 {
        self.0
            .get(&(pid, event.to_owned()))
            .copied()
            .unwrap_or_default()
    }
}

/// The threads of some processes, and which of them each belongs to.
fn threads_of(pids: &[u32]) -> Result<BTreeMap<u32, u32>> {
    let mut threads = BTreeMap::new();
    for pid in pids {
        let path = format!("/proc/{pid}/task");
        let entries = fs::read_dir(&path).doing(|| format!("read {path}"))?;
        for entry in entries.flatten() {
            if let Ok(thread) = entry.file_name().to_string_lossy().parse() {
                threads.insert(thread, *pid);
            }
        }
    }
    Ok(threads)
}

/// Thread, event and count of each line `NAME-THREAD,COUNT,,EVENT,…`.
fn parse_perf(text: &str) -> Vec<(u32, &str, u64)> {
    text.lines()
        .filter_map(|line| {
            let mut fields = line.split(',');
            let thread = fields.next()?.rsplit('-').next()?.parse().ok()?;
            // A thread that slept all the time is `<not counted>`.
            let count = match fields.next()? {
                "<not counted>" => 0,
                number => number.parse().ok()?,
            };
            let event = fields.nth(1)?;
            Some((thread, event, count))
        })
        .collect()
}

/// How many flushes the kernel has sent to a block device (Documentation/block/stat.rst, field 16).
///
/// # Errors
/// Fails if it is no block device, or the kernel does not count them.
pub fn flushes(device: &Path) -> Result<u64> {
    let name = device.file_name().unwrap_or_default().to_string_lossy();
    let path = format!("/sys/block/{name}/stat");
    let text = fs::read_to_string(&path).doing(|| format!("read {path}"))?;
    text.split_whitespace()
        .nth(15)
        .and_then(|field| field.parse().ok())
        .ok_or(LabError::Protocol {
            from: "kernel",
            text,
        })
}

/// Sum of the interrupts in a guest's `/proc/interrupts` whose line contains `part` (such as `virtio1-`).
#[must_use]
pub fn sum_interrupts(table: &str, part: &str) -> u64 {
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
    fn perf_table_is_parsed() {
        let text = "# started on\n\nvcpu-0-17,12,,kvm:kvm_exit,2039,100.00,,\n\
                    main-9,<not counted>,,kvm:kvm_exit,0,100.00,,\n";
        assert_eq!(
            parse_perf(text),
            [(17, "kvm:kvm_exit", 12), (9, "kvm:kvm_exit", 0)]
        );
    }

    #[test]
    fn interrupts_of_all_cpus_are_summed() {
        let table = "           CPU0       CPU1\n  24:   5   7   PCI-MSIX-0000:00:03.0   0-edge   virtio1-req.0\n\
                     25:   1   0   PCI-MSIX-0000:00:03.0   1-edge   virtio2-req.0\n";
        assert_eq!(sum_interrupts(table, "virtio1-"), 12);
        assert_eq!(sum_interrupts(table, "virtio"), 13);
    }
}

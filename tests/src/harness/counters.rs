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
/// A guest was left for an access to memory that KVM does not map: to a register, not to a mapped BAR.
pub const KVM_MMIO: &str = "kvm:kvm_mmio";
/// A guest was left for an access to an I/O port.
pub const KVM_PIO: &str = "kvm:kvm_pio";
/// A guest was left for the VMM.
pub const KVM_USERSPACE_EXIT: &str = "kvm:kvm_userspace_exit";
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

/// How many packets have passed a network interface.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Packets {
    /// Received by it.
    pub received: u64,
    /// Sent by it.
    pub sent: u64,
}

/// The packets of an interface of the test's own network namespace.
///
/// # Errors
/// Fails if there is no such interface.
pub fn packets(interface: &str) -> Result<Packets> {
    // That of the process's own namespace, which a sysfs that was mounted before does not show.
    let path = "/proc/self/net/dev";
    let text = fs::read_to_string(path).doing(|| format!("read {path}"))?;
    parse_packets(&text, interface).ok_or(LabError::Protocol {
        from: "kernel",
        text,
    })
}

/// From the line `NAME: BYTES PACKETS …`, with eight fields for what was received before those for what was sent.
fn parse_packets(table: &str, interface: &str) -> Option<Packets> {
    let fields = table
        .lines()
        .filter_map(|line| line.split_once(':'))
        .find(|(name, _)| name.trim() == interface)
        .map(|(_, fields)| fields)?;
    let number = |index: usize| fields.split_whitespace().nth(index)?.parse().ok();
    Some(Packets {
        received: number(1)?,
        sent: number(9)?,
    })
}

/// Sum of the interrupts in a guest's `/proc/interrupts` whose line contains `part` (such as `virtio1-`).
#[must_use]
pub fn sum_interrupts(table: &str, part: &str) -> u64 {
    sum_lines(table, |line| line.contains(part))
}

/// As [`sum_interrupts`], of one kind only: `IO-APIC` (which INTx comes by), `PCI-MSI-` or `PCI-MSIX-`.
#[must_use]
pub fn sum_interrupts_by(table: &str, kind: &str, part: &str) -> u64 {
    sum_lines(table, |line| line.contains(kind) && line.contains(part))
}

fn sum_lines(table: &str, counts: impl Fn(&str) -> bool) -> u64 {
    let cpus = table
        .lines()
        .next()
        .map_or(0, |line| line.split_whitespace().count());
    table
        .lines()
        .skip(1)
        .filter(|line| counts(line))
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
    fn packets_of_an_interface_are_found() {
        let table = "Inter-|   Receive |  Transmit\n face |bytes packets\n    lo: 1 2 3 4 5 6 7 8 9 10 11\n\
                     eth0:15505008 10491 12 0 0 0 0 6 34348784 23299 0 0 0 0 0 0\n";
        assert_eq!(
            parse_packets(table, "eth0"),
            Some(Packets {
                received: 10491,
                sent: 23299
            })
        );
        assert_eq!(parse_packets(table, "eth"), None);
    }

    #[test]
    fn interrupts_of_all_cpus_are_summed() {
        let table = "           CPU0       CPU1\n  24:   5   7   PCI-MSIX-0000:00:03.0   0-edge   virtio1-req.0\n\
                     25:   1   0   PCI-MSIX-0000:00:03.0   1-edge   virtio2-req.0\n";
        assert_eq!(sum_interrupts(table, "virtio1-"), 12);
        assert_eq!(sum_interrupts(table, "virtio"), 13);
        assert_eq!(sum_interrupts_by(table, "PCI-MSIX-", "virtio2-"), 1);
        assert_eq!(sum_interrupts_by(table, "PCI-MSI-", "virtio"), 0);
    }
}

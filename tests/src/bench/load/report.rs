//! What a load was, and what came of it.

use std::fs;
use std::io;

use serde::{Deserialize, Serialize};

use super::Outcome;
use super::connection::{EVENT_IDX, INDIRECT_DESC, RING_PACKED};
use super::error::LoadError;
use super::lane::{Measured, histogram};
use super::options::{Completions, LoadArgs};

/// Latency in nanoseconds, from when a request is written into the ring until it is collected.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Latency {
    /// Requests that were timed.
    pub samples: u64,
    /// Mean.
    pub mean: f64,
    /// Half of them took at most this long.
    pub p50: u64,
    /// Nine of ten.
    pub p90: u64,
    /// 99 of 100.
    pub p99: u64,
    /// 999 of 1000.
    pub p999: u64,
    /// The longest.
    pub max: u64,
}

/// What the back-end's process used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Usage {
    /// Processor time in nanoseconds.
    pub cpu: u64,
    /// Context switches because it waited.
    pub voluntary: u64,
    /// Context switches because another was to run.
    pub involuntary: u64,
}

/// The result of a load.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// What the requests did.
    pub shape: String,
    /// Bytes of each.
    pub block_size: u64,
    /// Requests in flight on each queue.
    pub depth: u16,
    /// Queues.
    pub queues: u16,
    /// Completions were polled for.
    pub polling: bool,
    /// VIRTIO_F_EVENT_IDX was in use.
    pub event_idx: bool,
    /// Chains were indirect.
    pub indirect: bool,
    /// Queues were packed.
    pub packed: bool,
    /// Requests that completed while measuring.
    pub requests: u64,
    /// How long that was, in seconds.
    pub seconds: f64,
    /// Requests per second.
    pub iops: f64,
    /// Latency of a request.
    pub latency: Latency,
    /// Writes to the kick eventfds.
    pub kicks: u64,
    /// Waits for the call eventfds.
    pub interrupts: u64,
    /// Blocks that were read again and compared after the load.
    pub verified: u64,
    /// What the back-end's process used meanwhile, if it was watched.
    pub usage: Option<Usage>,
}

impl Usage {
    /// What the process has used up to now, all its threads together.
    pub(in crate::bench) fn of(pid: u32) -> Result<Self, LoadError> {
        let failed = |source| LoadError::Watch { pid, source };
        let mut usage = Self {
            cpu: 0,
            voluntary: 0,
            involuntary: 0,
        };
        for task in fs::read_dir(format!("/proc/{pid}/task")).map_err(failed)? {
            let task = task.map_err(failed)?.path();
            let (Ok(times), Ok(status)) = (
                fs::read_to_string(task.join("schedstat")),
                fs::read_to_string(task.join("status")),
            ) else {
                // It ended in this moment.
                continue;
            };
            let numbers = parse(&times, &status).ok_or_else(|| {
                failed(io::Error::other(
                    "the kernel has no /proc/PID/task/TID/schedstat",
                ))
            })?;
            usage.cpu = usage.cpu.saturating_add(numbers.cpu);
            usage.voluntary = usage.voluntary.saturating_add(numbers.voluntary);
            usage.involuntary = usage.involuntary.saturating_add(numbers.involuntary);
        }
        Ok(usage)
    }

    /// What it has used since then.
    pub(in crate::bench) fn since(self, before: Self) -> Self {
        Self {
            cpu: self.cpu.saturating_sub(before.cpu),
            voluntary: self.voluntary.saturating_sub(before.voluntary),
            involuntary: self.involuntary.saturating_sub(before.involuntary),
        }
    }
}

/// Reads `schedstat` (nanoseconds on a processor, first) and `status` of a thread (proc(5)).
fn parse(times: &str, status: &str) -> Option<Usage> {
    let count = |name: &str| {
        status
            .lines()
            .find_map(|line| line.strip_prefix(name)?.trim().parse().ok())
    };
    Some(Usage {
        cpu: times.split_whitespace().next()?.parse().ok()?,
        voluntary: count("voluntary_ctxt_switches:")?,
        involuntary: count("nonvoluntary_ctxt_switches:")?,
    })
}

impl Report {
    /// Puts together what the lanes measured.
    pub(super) fn new(args: &LoadArgs, features: u64, outcome: &Outcome<Measured>) -> Self {
        let Outcome {
            lanes,
            usage,
            elapsed,
        } = outcome;
        let sum = |of: fn(&Measured) -> u64| lanes.iter().map(of).sum::<u64>();
        // Each lane has its own beginning and end.
        let iops = lanes
            .iter()
            .map(|lane| lane.requests as f64 / lane.elapsed.as_secs_f64().max(1e-9))
            .sum();
        Self {
            shape: args.shape.name().into(),
            block_size: args.block_size,
            depth: args.depth,
            queues: args.queues,
            polling: args.completions == Completions::Polling,
            event_idx: features & EVENT_IDX != 0,
            indirect: features & INDIRECT_DESC != 0,
            packed: features & RING_PACKED != 0,
            requests: sum(|lane| lane.requests),
            seconds: elapsed.as_secs_f64(),
            iops,
            latency: latency(lanes),
            kicks: sum(|lane| lane.kicks),
            interrupts: sum(|lane| lane.interrupts),
            verified: sum(|lane| lane.swept),
            usage: *usage,
        }
    }

    /// Bytes per second.
    #[must_use]
    pub fn bytes_per_second(&self) -> f64 {
        self.iops * self.block_size as f64
    }

    /// Prints it on standard output.
    pub(super) fn print(&self, json: bool) -> Result<(), LoadError> {
        if json {
            return print_json(self);
        }
        println!(
            "{} of {} bytes, {} deep on {} queue(s): {:.0} requests/s, {:.1} MB/s",
            self.shape,
            self.block_size,
            self.depth,
            self.queues,
            self.iops,
            self.bytes_per_second() / 1e6
        );
        let us = |nanos: u64| nanos as f64 / 1e3;
        let Latency {
            p50,
            p90,
            p99,
            p999,
            max,
            ..
        } = self.latency;
        println!(
            "latency in µs: 50 % {:.1}, 90 % {:.1}, 99 % {:.1}, 99.9 % {:.1}, longest {:.1}",
            us(p50),
            us(p90),
            us(p99),
            us(p999),
            us(max)
        );
        let per_request = |count: u64| count as f64 / self.requests.max(1) as f64;
        println!(
            "per request: {:.3} kicks, {:.3} interrupts waited for",
            per_request(self.kicks),
            per_request(self.interrupts)
        );
        if let Some(usage) = self.usage {
            println!(
                "the back-end, per request: {:.0} ns of processor time, {:.3} waits",
                per_request(usage.cpu),
                per_request(usage.voluntary)
            );
        }
        if self.verified > 0 {
            println!("{} blocks hold what was written last", self.verified);
        }
        Ok(())
    }
}

/// Prints a result on standard output, in one line.
pub(super) fn print_json(report: &impl Serialize) -> Result<(), LoadError> {
    let text = serde_json::to_string(report).map_err(|error| LoadError::Io {
        doing: "print the result",
        source: error.into(),
    })?;
    println!("{text}");
    Ok(())
}

fn latency(lanes: &[Measured]) -> Latency {
    let mut all = histogram().ok();
    if let Some(all) = &mut all {
        for lane in lanes {
            // Same bounds: it cannot fail.
            let _ = all.add(&lane.latency);
        }
    }
    let quantile = |q| all.as_ref().map_or(0, |all| all.value_at_quantile(q));
    Latency {
        samples: all.as_ref().map_or(0, hdrhistogram::Histogram::len),
        mean: all.as_ref().map_or(0.0, hdrhistogram::Histogram::mean),
        p50: quantile(0.5),
        p90: quantile(0.9),
        p99: quantile(0.99),
        p999: quantile(0.999),
        max: quantile(1.0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn usage_of_this_process_grows() {
        let before = Usage::of(std::process::id()).unwrap();
        let mut sum = 0_u64;
        while Usage::of(std::process::id()).unwrap().since(before).cpu < 1_000_000 {
            sum = sum.wrapping_add(std::hint::black_box(1));
        }
        assert!(Usage::of(u32::MAX).is_err());
    }

    #[test]
    fn thread_files_are_read() {
        let status = "Name:\tx\nvoluntary_ctxt_switches:\t12\nnonvoluntary_ctxt_switches:\t3\n";
        let usage = parse("9876543 21 7\n", status).unwrap();
        assert_eq!(
            (usage.cpu, usage.voluntary, usage.involuntary),
            (9_876_543, 12, 3)
        );
        assert_eq!(parse("", status), None);
    }
}

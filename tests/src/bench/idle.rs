//! What a back-end costs that is connected and has nothing to do.

use std::fmt;
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use serde::Serialize;

use super::contender::{self, Contender, Family, Process, socket_in};
use super::load::Usage;
use super::measure::Bench;
use super::storage::Storage;
use crate::command::{GRACE, bound, end_tree};
use crate::error::{Doing, LabError, Result};
use crate::site::Site;

/// Requests, or frames, before it is idle.
const REQUESTS: u32 = 1000;
/// Until what those left behind has settled.
const SETTLING: Duration = Duration::from_millis(500);
/// How long it is watched.
const WATCHED: Duration = Duration::from_secs(3);
/// How long the front-end stays: longer than that, in seconds.
const LINGER: &str = "10";

/// An idle back-end.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Idle {
    pub(super) name: String,
    /// How often one of its threads woke up, per second.
    pub wake_ups: f64,
    /// Processor time per second, in nanoseconds.
    pub(super) cpu: f64,
    /// Resident memory in bytes, without guest memory and other shared mappings.
    pub resident: u64,
    /// From its start until it listened, in seconds.
    pub(super) started: f64,
}

impl fmt::Display for Idle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "idle {}: {:.1} wake-ups/s, {:.0} ns CPU/s, {:.1} MiB resident without guest memory, listens after {:.1} ms",
            self.name,
            self.wake_ups,
            self.cpu,
            self.resident as f64 / f64::from(1 << 20),
            self.started * 1e3
        )
    }
}

/// Watches a back-end that served some requests and then has no more.
pub(super) fn watch(bench: &Bench<'_>, contender: &Contender) -> Result<Idle> {
    let process = bench.start(contender, &Storage::null(), 1)?;
    let requests = bench.site.program("ringside-load");
    watch_process(&contender.name, &process, requests)
}

/// Watches `ringside-blk` as it comes.
///
/// # Errors
/// Fails if it does.
pub fn of_ringside_blk(site: &Site, directory: &Path) -> Result<Idle> {
    let ours = contender::all(&[])?
        .into_iter()
        .find(|contender| contender.family == Family::Ringside)
        .ok_or_else(|| LabError::Setup("ringside-blk is not among the back-ends".into()))?;
    let process = ours.start(site, &Storage::null(), 1, directory)?;
    watch_process(&ours.name, &process, site.program("ringside-load"))
}

/// What a card of `ringside-net` is joined to.
#[derive(Debug, Clone, Copy)]
pub enum Behind<'a> {
    /// Frames are dropped.
    Nothing,
    /// This interface.
    Tap(&'a str),
    /// A switch, with as many other ports, which nobody has.
    Ports(u16),
}

/// Watches `ringside-net` as it comes.
///
/// # Errors
/// Fails if it does.
pub fn of_ringside_net(site: &Site, directory: &Path, behind: Behind<'_>) -> Result<Idle> {
    let socket = socket_in(directory);
    let mut command = bound(site.programs.join("ringside-net"));
    match behind {
        Behind::Nothing => command.args(["--link", "null"]),
        Behind::Tap(name) => command.args(["--tap", name]),
        Behind::Ports(count) => {
            // The last one to listen is the one that is waited for.
            for number in 0..count {
                let other = directory.join(format!("port{number}.sock"));
                command.arg(format!("--port=socket={}", other.display()));
            }
            command.arg(format!("--port=socket={}", socket.display()))
        }
    };
    if !matches!(behind, Behind::Ports(_)) {
        command.arg("--socket-path").arg(socket);
    }
    let name = match behind {
        Behind::Nothing => "ringside-net".to_owned(),
        Behind::Tap(_) => "ringside-net on a TAP".to_owned(),
        Behind::Ports(count) => format!("ringside-net as a switch with {} ports", count + 1),
    };
    let process = Process::start(&name, command, site, directory)?;
    let mut frames = site.program("ringside-load");
    frames.args(["net", "--completions", "eventfd"]);
    watch_process(&name, &process, frames)
}

/// Watches a back-end after `load` has loaded it.
fn watch_process(name: &str, process: &Process, mut load: Command) -> Result<Idle> {
    load.arg("--socket-path").arg(&process.socket);
    load.arg("--count").arg(REQUESTS.to_string());
    load.args(["--linger", LINGER, "--json"]);
    let mut load = load
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .doing(|| "run ringside-load".into())?;
    // Its result comes when the last request has ended.
    let mut line = String::new();
    let read = match load.stdout.take() {
        Some(stdout) => BufReader::new(stdout).read_line(&mut line),
        None => Ok(0),
    };
    let idle = match read {
        Ok(1..) => observe(name, process),
        _ => Err(LabError::Ended {
            what: "the load ended without a result".into(),
            output: process.text(),
        }),
    };
    end_tree(&mut load, GRACE);
    idle
}

fn observe(name: &str, process: &Process) -> Result<Idle> {
    let usage = || Usage::of(process.pid()).map_err(|error| LabError::Setup(error.to_string()));
    thread::sleep(SETTLING);
    let before = usage()?;
    thread::sleep(WATCHED);
    let used = usage()?.since(before);
    let per_second = |count: u64| count as f64 / WATCHED.as_secs_f64();
    let path = format!("/proc/{}/smaps", process.pid());
    let maps = fs::read_to_string(&path).doing(|| format!("read {path}"))?;
    Ok(Idle {
        name: name.into(),
        wake_ups: per_second(used.voluntary),
        cpu: per_second(used.cpu),
        resident: resident(&maps),
        started: process.started.as_secs_f64(),
    })
}

/// Bytes resident in the private mappings of `/proc/PID/smaps` (proc(5)).
fn resident(maps: &str) -> u64 {
    let mut private = false;
    let mut sum = 0_u64;
    for line in maps.lines() {
        let mut words = line.split_whitespace();
        let (Some(first), Some(second)) = (words.next(), words.next()) else {
            continue;
        };
        if first == "Rss:" {
            let kib: u64 = second.parse().unwrap_or_default();
            sum = sum.saturating_add(if private { kib << 10 } else { 0 });
        } else if !first.ends_with(':') {
            // A mapping begins: addresses, then permissions, of which the last says whether it is shared.
            private = second.ends_with('p');
        }
    }
    sum
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shared_mappings_do_not_count() {
        let maps = "\
7f00-7f10 rw-p 00000000 00:00 0 \nSize:  64 kB\nRss:   8 kB\n\
7f20-7f30 rw-s 00000000 00:01 5 /memfd:guest (deleted)\nSize: 64 kB\nRss: 64 kB\n\
7f40-7f50 r-xp 00000000 08:01 9 /usr/bin/x\nSize: 64 kB\nRss: 12 kB\nVmFlags: rd ex\n";
        assert_eq!(resident(maps), 20 << 10);
    }
}

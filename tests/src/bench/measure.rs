//! One measurement: a fresh back-end under one load, or fio on the storage itself.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::Duration;

use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::cells::Cell;
use super::contender::{Contender, Process};
use super::load::{Completions, Report};
use super::storage::{Storage, fio};
use crate::command;
use crate::error::{Doing, LabError, Result};
use crate::site::Site;

/// How much longer than it measures a load may take.
const LOAD_LIMIT: Duration = Duration::from_secs(60);
/// Load before measuring, in seconds.
const WARM_UP: f64 = 0.15;
/// How long system calls are counted, in seconds.
const COUNTED: f64 = 0.3;
/// Until perf has attached.
const PERF_START: Duration = Duration::from_millis(300);

/// What one measurement gave.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub(super) struct Sample {
    /// Requests per second.
    pub(super) iops: f64,
    /// Latency in nanoseconds.
    pub(super) p50: f64,
    /// Latency in nanoseconds.
    pub(super) p99: f64,
    /// Processor time of the back-end for each request, in nanoseconds.
    pub(super) cpu: Option<f64>,
    /// How often the back-end waited for each request.
    pub(super) waits: Option<f64>,
}

/// Which processors the two sides run on.
#[derive(Debug, Clone)]
pub(super) struct Processors {
    available: Vec<usize>,
}

impl Processors {
    pub(super) fn of_this_process() -> Result<Self> {
        let set =
            sched_getaffinity(Pid::from_raw(0)).doing(|| "ask for this process's CPUs".into())?;
        let available = (0..CpuSet::count())
            .filter(|&cpu| set.is_set(cpu).unwrap_or_default())
            .collect();
        Ok(Self { available })
    }

    /// Those of the front-end and of the back-end for this many queues: apart if there are enough, else all for both.
    pub(super) fn split(&self, queues: u16) -> Option<(&[usize], &[usize])> {
        let queues = usize::from(queues);
        let front = self.available.get(..queues)?;
        let back = self.available.get(queues..queues.checked_mul(2)?)?;
        Some((front, back))
    }

    /// Does something with the calling thread, and what it starts, on these processors only.
    pub(super) fn on<T>(&self, cpus: &[usize], work: impl FnOnce() -> Result<T>) -> Result<T> {
        let set = |cpus: &[usize]| {
            let mut set = CpuSet::new();
            cpus.iter()
                .try_for_each(|&cpu| set.set(cpu))
                .and_then(|()| sched_setaffinity(Pid::from_raw(0), &set))
                .doing(|| format!("run on the processors {cpus:?}"))
        };
        set(cpus)?;
        let result = work();
        set(&self.available)?;
        result
    }
}

/// What all measurements have in common.
#[derive(Debug)]
pub(super) struct Bench<'a> {
    pub(super) site: &'a Site,
    pub(super) processors: Processors,
    /// For sockets and logs.
    pub(super) directory: &'a Path,
    /// How long each measurement takes, in seconds.
    pub(super) seconds: f64,
}

impl Bench<'_> {
    /// A back-end that listens, on its processors.
    pub(super) fn start(
        &self,
        contender: &Contender,
        storage: &Storage,
        queues: u16,
    ) -> Result<Process> {
        let start = || contender.start(self.site, storage, queues, self.directory);
        match self.processors.split(queues) {
            Some((_, back)) => self.processors.on(back, start),
            None => start(),
        }
    }

    /// Does something on the processors of the front-end.
    pub(super) fn on_front<T>(&self, queues: u16, work: impl FnOnce() -> Result<T>) -> Result<T> {
        match self.processors.split(queues) {
            Some((front, _)) => self.processors.on(front, work),
            None => work(),
        }
    }

    /// Loads a back-end for the usual time.
    pub(super) fn report(
        &self,
        process: &Process,
        cell: &Cell,
        options: &[&str],
    ) -> Result<Report> {
        let mut load = self.load(process, cell);
        load.arg("--seconds").arg(self.seconds.to_string());
        load.arg("--warm-up").arg(WARM_UP.to_string());
        run_load(load.args(options), process)
    }

    fn load(&self, process: &Process, cell: &Cell) -> Command {
        let mut load = self.site.program("ringside-load");
        load.arg("--socket-path").arg(&process.socket);
        load.args(["--json", "--shape", cell.shape.name()]);
        load.arg("--watch").arg(process.pid().to_string());
        for (option, value) in [
            ("--block-size", cell.block_size),
            ("--depth", cell.depth.into()),
            ("--queues", cell.queues.into()),
        ] {
            load.arg(option).arg(value.to_string());
        }
        if cell.completions == Completions::Polling {
            load.args(["--completions", "polling"]);
        }
        if let Some((front, _)) = self.processors.split(cell.queues) {
            let list: Vec<String> = front.iter().map(ToString::to_string).collect();
            load.arg("--cpus").arg(list.join(","));
        }
        load
    }

    /// Measures a back-end, freshly started.
    pub(super) fn back_end(
        &self,
        contender: &Contender,
        storage: &Storage,
        cell: &Cell,
    ) -> Result<Sample> {
        let process = self.start(contender, storage, cell.queues)?;
        let report = self.report(&process, cell, &[])?;
        let each = |count: u64| count as f64 / report.requests.max(1) as f64;
        Ok(Sample {
            iops: report.iops,
            p50: report.latency.p50 as f64,
            p99: report.latency.p99 as f64,
            cpu: report.usage.map(|usage| each(usage.cpu)),
            waits: report.usage.map(|usage| each(usage.voluntary)),
        })
    }

    /// Counts the system calls of a back-end for each request, by the kernel's trace point. It slows each of them down, so
    /// nothing else is measured meanwhile.
    pub(super) fn system_calls(
        &self,
        perf: &Perf,
        contender: &Contender,
        storage: &Storage,
        cell: &Cell,
        iops: f64,
    ) -> Result<f64> {
        let process = self.start(contender, storage, cell.queues)?;
        // Connecting costs system calls too, a hundred or two: too few to show among these.
        let requests = (iops * COUNTED).clamp(4000.0, 2e6).round();
        let log = self.directory.join("perf.log");
        let counter = perf.attach(process.pid(), &log)?;
        let mut load = self.load(&process, cell);
        load.arg("--count").arg(requests.to_string());
        run_load(&mut load, &process)?;
        Ok(counter.read()? / requests)
    }

    /// Measures the storage without any back-end.
    pub(super) fn raw(&self, storage: &Storage, cell: &Cell) -> Result<Option<Sample>> {
        let Some(path) = &storage.path else {
            return Ok(None);
        };
        let mut fio = fio(self.site);
        fio.args(["--time_based", "--output-format=json"]);
        fio.args(["--lat_percentiles=1", "--clat_percentiles=0"]);
        fio.args(["--rwmixread=70"]);
        for (option, value) in [
            ("filename", path.display().to_string()),
            ("direct", u8::from(storage.direct).to_string()),
            ("rw", cell.shape.name().to_owned()),
            ("bs", cell.block_size.to_string()),
            ("iodepth", cell.depth.to_string()),
            ("numjobs", cell.queues.to_string()),
            ("runtime", format!("{}ms", (self.seconds * 1e3).round())),
            ("ramp_time", format!("{}ms", (WARM_UP * 1e3).round())),
        ] {
            fio.arg(format!("--{option}={value}"));
        }
        let text = command::run(&mut fio, Duration::from_secs_f64(self.seconds) + LOAD_LIMIT)?;
        parse_fio(&text).map(Some)
    }
}

fn run_load(load: &mut Command, process: &Process) -> Result<Report> {
    let line = command::describe(load);
    let text = command::run(load, LOAD_LIMIT).map_err(|error| LabError::Ended {
        what: error.to_string(),
        output: process.text(),
    })?;
    serde_json::from_str(&text).map_err(|error| LabError::Protocol {
        from: "load generator",
        text: format!("{error} in the output of `{line}`: {text}"),
    })
}

/// Reads fio's JSON: both directions together, latency of the one with more requests.
fn parse_fio(text: &str) -> Result<Sample> {
    let failed = |why: &str| LabError::Protocol {
        from: "fio",
        text: format!("{why}: {text}"),
    };
    // fio may write warnings before it.
    let start = text.find('{').unwrap_or_default();
    let report: Value = text
        .get(start..)
        .and_then(|json| serde_json::from_str(json).ok())
        .ok_or_else(|| failed("no JSON"))?;
    let job = report
        .pointer("/jobs/0")
        .ok_or_else(|| failed("no job in it"))?;
    let number = |path: &str| job.pointer(path).and_then(Value::as_f64).unwrap_or(0.0);
    let (reads, writes) = (number("/read/iops"), number("/write/iops"));
    let direction = if reads >= writes { "read" } else { "write" };
    let percentile = |name: &str| number(&format!("/{direction}/lat_ns/percentile/{name}"));
    if reads + writes <= 0.0 {
        return Err(failed("no requests in it"));
    }
    Ok(Sample {
        iops: reads + writes,
        p50: percentile("50.000000"),
        p99: percentile("99.000000"),
        cpu: None,
        waits: None,
    })
}

/// `perf stat` on the trace point of system calls, where that is permitted.
#[derive(Debug)]
pub(super) struct Perf(());

/// A counter that runs.
struct Counter<'p> {
    child: Child,
    log: &'p Path,
}

impl Perf {
    const EVENT: &'static str = "raw_syscalls:sys_enter";

    /// Tries it.
    ///
    /// # Errors
    /// [`LabError::Skipped`] with the reason.
    pub(super) fn find(directory: &Path) -> Result<Self> {
        let this = Self(());
        let log = directory.join("perf.log");
        let mut perf = Self::command(&log);
        perf.args(["--", "true"]);
        let counted = command::output(&mut perf, Duration::from_secs(20))
            .and_then(|_| count_in(&log, Self::EVENT));
        match counted {
            Ok(_) => Ok(this),
            Err(error) => Err(LabError::Skipped(format!(
                "system calls are not counted: perf cannot use {} here ({error})",
                Self::EVENT
            ))),
        }
    }

    /// perf in a mount namespace of its own, in which the trace points are there.
    fn command(log: &Path) -> Command {
        let script = "[ -e /sys/kernel/tracing/events ] || mount -t tracefs tracefs /sys/kernel/tracing; exec \"$@\"";
        let mut command = Command::new("unshare");
        command.args(["--mount", "sh", "-c", script, "sh", "perf", "stat", "-x,"]);
        command.args(["-e", Self::EVENT, "-o"]).arg(log);
        command
    }

    fn attach<'p>(&self, pid: u32, log: &'p Path) -> Result<Counter<'p>> {
        let mut perf = Self::command(log);
        perf.arg("-p").arg(pid.to_string());
        let child = perf
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .doing(|| "run perf".into())?;
        thread::sleep(PERF_START);
        Ok(Counter { child, log })
    }
}

impl Counter<'_> {
    fn read(mut self) -> Result<f64> {
        if let Ok(pid) = i32::try_from(self.child.id()) {
            kill(Pid::from_raw(pid), Signal::SIGINT).doing(|| "end perf".into())?;
        }
        command::wait_for(&mut self.child, Duration::from_secs(10))?;
        count_in(self.log, Perf::EVENT)
    }
}

impl Drop for Counter<'_> {
    fn drop(&mut self) {
        // It has ended, unless something failed before.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The count of an event in what `perf stat -x,` wrote.
fn count_in(log: &Path, event: &str) -> Result<f64> {
    let text = std::fs::read_to_string(log).doing(|| format!("read {}", log.display()))?;
    text.lines()
        .filter(|line| line.contains(event))
        .find_map(|line| line.split(',').next()?.parse().ok())
        .ok_or_else(|| LabError::Protocol {
            from: "perf",
            text: text.trim().to_owned(),
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_directions_of_fio_count() {
        let text = r#"fio: a warning
            {"jobs": [{"read": {"iops": 70.5, "lat_ns": {"percentile": {"50.000000": 5, "99.000000": 9}}},
                       "write": {"iops": 29.5}}]}"#;
        let sample = parse_fio(text).unwrap();
        assert_eq!((sample.iops, sample.p50, sample.p99), (100.0, 5.0, 9.0));
        assert!(parse_fio("{}").is_err());
        assert!(parse_fio(r#"{"jobs": [{}]}"#).is_err());
    }

    #[test]
    fn each_side_has_processors_of_its_own_or_all() {
        let processors = Processors {
            available: vec![0, 1, 4, 5],
        };
        assert_eq!(processors.split(1), Some((&[0][..], &[1][..])));
        assert_eq!(processors.split(2), Some((&[0, 1][..], &[4, 5][..])));
        assert_eq!(processors.split(3), None);
    }

    #[test]
    fn perf_output_is_read() {
        let directory = tempfile::tempdir().unwrap();
        let log = directory.path().join("log");
        std::fs::write(
            &log,
            "# started\n\n29,,raw_syscalls:sys_enter,100,100.00,,\n",
        )
        .unwrap();
        assert_eq!(count_in(&log, Perf::EVENT).unwrap(), 29.0);
        std::fs::write(&log, "<not supported>,,raw_syscalls:sys_enter,0,,,\n").unwrap();
        assert!(count_in(&log, Perf::EVENT).is_err());
    }
}

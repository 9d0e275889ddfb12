//! One measurement: a fresh back-end under one load.

use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::super::contender::{Process, socket_in};
use super::super::load::{NetReport, Usage};
use super::super::measure::Processors;
use super::cells::{Behind, Cell, Front};
use super::contender::{BACKLOG, Contender, FULL_TAP, LONE_TAP, mode, second_socket};
use crate::command;
use crate::error::{LabError, Result};
use crate::harness::{Testpmd, last_shown, testpmd};
use crate::site::Site;

/// How much longer than it measures a load may take.
const LOAD_LIMIT: Duration = Duration::from_secs(60);
/// Load before measuring, in seconds.
const WARM_UP: f64 = 0.2;
/// Until `dpdk-testpmd` forwards and has shown figures that are not of its start.
const TESTPMD_START: Duration = Duration::from_millis(2500);
/// Until a fresh back-end forwards, which may go on starting after it listens.
const SETTLING: Duration = Duration::from_millis(300);

/// What one measurement gave. Where the cell is a stream and has no frames, its bits stand for them.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub(super) struct Sample {
    /// Frames per second.
    pub(super) rate: f64,
    /// Processor time of the back-end for each frame, in nanoseconds.
    pub(super) cpu: Option<f64>,
    /// How often the back-end waited for each frame.
    pub(super) waits: Option<f64>,
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
    /// The processor of the front-end and that of the back-end, where there are two.
    pub(super) fn pair(&self) -> Option<(usize, usize)> {
        let (front, back) = self.processors.split(1)?;
        Some((*front.first()?, *back.first()?))
    }

    /// Measures a contender, freshly started.
    pub(super) fn measure(&self, contender: Contender, cell: &Cell) -> Result<Sample> {
        if let Behind::Tcp(direction) = cell.behind {
            return self.tcp(contender, cell, direction);
        }
        let Some(process) = self.start(contender, cell)? else {
            return self.bare(cell);
        };
        match cell.front {
            Front::Ringside => self.load(&process, cell),
            Front::Testpmd => self.testpmd(&process, cell),
        }
    }

    /// Starts a back-end and waits until it forwards; `None` for one that is none.
    pub(super) fn start(&self, contender: Contender, cell: &Cell) -> Result<Option<Process>> {
        let socket = socket_in(self.directory);
        let second = second_socket(&socket);
        // One that was killed leaves it behind.
        let _ = std::fs::remove_file(second);
        let Some(command) = contender.command(self.site, cell, &socket, self.pair()) else {
            return Ok(None);
        };
        let start = || Process::start(contender.name(), command, self.site, self.directory);
        let process = match self.processors.split(1) {
            // DPDK goes where its own option says.
            Some((_, back)) if contender != Contender::Dpdk => self.processors.on(back, start)?,
            _ => start()?,
        };
        thread::sleep(SETTLING);
        Ok(Some(process))
    }

    /// Loads with a front-end of our own.
    fn load(&self, process: &Process, cell: &Cell) -> Result<Sample> {
        let mut load = self.site.program("ringside-load");
        load.arg("net").arg("--socket-path").arg(&process.socket);
        load.arg("--watch").arg(process.pid().to_string());
        if cell.behind == Behind::Port {
            load.arg("--to").arg(second_socket(&process.socket));
        } else {
            load.args(["--direction", cell.direction().name()]);
        }
        if cell.is_segment() {
            // As much data in flight as there is in 8000 frames of the usual length.
            load.args(["--queue-size", "256"]);
        }
        load.args(cell.packed.then_some("--packed"));
        if let Some((front, _)) = self.pair() {
            load.arg("--cpu").arg(front.to_string());
        }
        if cell.behind == Behind::TapBacklog {
            load.args(["--backlog", FULL_TAP, "--count", &BACKLOG.to_string()]);
        }
        self.run(load, cell).map_err(|error| LabError::Ended {
            what: error.to_string(),
            output: process.text(),
        })
    }

    /// Moves frames without any card.
    fn bare(&self, cell: &Cell) -> Result<Sample> {
        let mut load = self.site.program("ringside-load");
        load.args(["tap", "--direction", cell.direction().name()]);
        if cell.behind == Behind::TapBacklog {
            load.args(["--tap", FULL_TAP, "--backlog", &BACKLOG.to_string()]);
            if let Some((front, _)) = self.pair() {
                // As with a card before it.
                load.arg("--source-cpu").arg(front.to_string());
            }
        } else {
            load.args(["--tap", LONE_TAP]);
        }
        if let Some((_, back)) = self.pair() {
            load.arg("--cpu").arg(back.to_string());
        }
        self.run(load, cell)
    }

    fn run(&self, mut load: Command, cell: &Cell) -> Result<Sample> {
        load.arg("--json");
        load.args(["--frame", &cell.frame.to_string()]);
        if cell.behind != Behind::TapBacklog {
            load.args(["--seconds", &self.seconds.to_string()]);
            load.args(["--warm-up", &WARM_UP.to_string()]);
        }
        let text = command::run(&mut load, LOAD_LIMIT)?;
        let report: NetReport =
            serde_json::from_str(&text).map_err(|error| LabError::Protocol {
                from: "load generator",
                text: format!("{error}: {text}"),
            })?;
        let each = |count: u64| count as f64 / report.frames().max(1) as f64;
        Ok(Sample {
            rate: report.rate(),
            cpu: report.usage.map(|usage| each(usage.cpu)),
            waits: report.usage.map(|usage| each(usage.voluntary)),
        })
    }

    /// Loads with DPDK's front-end.
    fn testpmd(&self, process: &Process, cell: &Cell) -> Result<Sample> {
        let mode = mode(cell.direction());
        let device = format!(
            "net_virtio_user0,path={},queue_size=1024,packed_vq={}",
            process.socket.display(),
            u8::from(cell.packed)
        );
        let log = self.directory.join("testpmd.log");
        let pair = self.pair();
        let command = testpmd(self.site, "front-end", &[device], mode, cell.frame, pair);
        let front = Testpmd::start(command, log)?;
        let usage = || Usage::of(process.pid()).map_err(|error| LabError::Setup(error.to_string()));
        thread::sleep(TESTPMD_START);
        let before = usage();
        // Whole seconds: that is how often it shows figures.
        let seconds = self.seconds.ceil().max(1.0);
        thread::sleep(Duration::from_secs_f64(seconds));
        let after = usage();
        let text = front.text()?;
        drop(front);
        let rates = last_shown(&text, "Rx-pps:").zip(last_shown(&text, "Tx-pps:"));
        let Some((received, sent)) = rates.filter(|(received, sent)| received + sent > 0.0) else {
            return Err(LabError::Ended {
                what: "dpdk-testpmd moved nothing".into(),
                output: format!("{text}\n{}", process.text()),
            });
        };
        let rate = received + sent;
        let used = after?.since(before?);
        let each = |count: u64| count as f64 / (rate * seconds);
        Ok(Sample {
            rate,
            cpu: Some(each(used.cpu)),
            waits: Some(each(used.voluntary)),
        })
    }
}

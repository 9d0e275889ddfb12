//! `cargo lab bench net`: what it is asked for, and its course.
//!
//! ```text
//! cells ────── which way frames go, how long they are, what takes or gives them, and whose front-end moves them
//! contender ── who stands behind the front-end: ringside-net, DPDK's vhost port, passt; or nobody, for a loop on the same TAP
//! measure ──── one of them, freshly started, for a moment
//! tcp ──────── the same with a TCP stream between two network namespaces
//! outcome ──── medians, and ratios to the limit of the row within each round
//! ```

mod cells;
mod contender;
mod measure;
mod outcome;
mod tcp;

pub(super) use self::contender::second_socket;

use std::fs;
use std::num::NonZero;
use std::path::PathBuf;
use std::time::Instant;

use clap::Args;
use nix::sched::{CloneFlags, unshare};
use serde::Serialize;

use self::cells::Cell;
use self::contender::{BACKLOG, Contender, FULL_TAP, LONE_TAP, TCP_ADDRESS, TCP_TAP};
use self::measure::{Bench, Sample};
use self::outcome::{CellOutcome, Row};
use super::instructions::{self, FrameInstructions};
use super::load::parse_seconds;
use super::measure::Processors;
use super::notes::{Notes, contains, first_line, processor};
use crate::command;
use crate::error::{Doing, LabError, Result};
use crate::programs;
use crate::setup::Systems;
use crate::site::Site;

/// Options of `cargo lab bench net`.
#[derive(Debug, Clone, Args)]
pub struct NetBench {
    /// Only cells whose name contains this, such as `discard 64`, `tap`, `forward` or `tcp`
    #[arg(long, value_name = "TEXT")]
    filter: Option<String>,

    /// Fewer rounds: a first impression in a minute or two
    #[arg(long)]
    quick: bool,

    /// How often each back-end is measured in each cell [default: 5, or 3 of a quick run]
    #[arg(long, value_name = "N")]
    rounds: Option<NonZero<u16>>,

    /// How long each measurement takes
    #[arg(long, value_name = "SECONDS", default_value_t = 1.0, value_parser = parse_seconds)]
    seconds: f64,

    /// Only back-ends whose name contains this
    #[arg(long, value_name = "TEXT")]
    only: Option<String>,

    /// Directory with ringside-net and ringside-load to be used in place of fresh builds
    #[arg(long, value_name = "DIR")]
    programs: Option<PathBuf>,

    /// Only count the instructions of ringside-net for a frame, under valgrind
    #[arg(long, conflicts_with_all = ["quick", "filter", "only", "rounds", "json", "svg"])]
    instructions: bool,

    /// Write all samples as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,

    /// Draw the ratios into an SVG file
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,

    /// Keep sockets and logs
    #[arg(long)]
    keep: bool,
}

/// All that was measured, and where.
#[derive(Debug, Serialize)]
struct Outcome {
    kernel: String,
    processor: String,
    seconds: f64,
    rounds: usize,
    cells: Vec<CellOutcome>,
    instructions: Option<FrameInstructions>,
    /// What could not be measured, and why.
    skipped: Vec<String>,
}

impl Outcome {
    /// Where it was measured, in words.
    fn machine(&self) -> String {
        format!(
            "{}, Linux {}; medians of {} rounds of {} s",
            self.processor, self.kernel, self.rounds, self.seconds
        )
    }
}

/// Runs the benchmark, and prints what it gives.
///
/// # Errors
/// Fails if a back-end does, or nothing can be measured.
pub fn run(systems: &Systems, options: &NetBench) -> Result<()> {
    let programs = programs::given_or_built(options.programs.as_deref())?;
    let mut scratch = tempfile::tempdir().doing(|| "make a directory for sockets".into())?;
    if options.keep {
        scratch.disable_cleanup(true);
        eprintln!("lab: sockets and logs stay in {}", scratch.path().display());
    }
    let site = Site {
        scratch: scratch.path().to_owned(),
        ..systems.host_site(&programs, scratch.path())
    };
    let mut notes = Notes::default();
    let tap = notes.keep(own_network()).map(|()| LONE_TAP);
    let instructions = || instructions::of_frames(&site, scratch.path(), tap);
    if options.instructions {
        println!("{}", instructions()?);
        return notes.verdict();
    }
    let cells: Vec<Cell> = cells::all()
        .into_iter()
        .filter(|cell| contains(&cell.name(), options.filter.as_deref()))
        .collect();
    let contenders: Vec<Contender> = contender::ALL
        .into_iter()
        .filter(|contender| contains(contender.name(), options.only.as_deref()))
        .collect();
    if cells.is_empty() || contenders.is_empty() {
        let names: Vec<String> = cells::all().iter().map(Cell::name).collect();
        return Err(LabError::Setup(format!(
            "no cell or no back-end has such a name; cells: {}",
            names.join(", ")
        )));
    }
    let rounds = match options.rounds {
        Some(rounds) => rounds.get().into(),
        None if options.quick => 3,
        None => 5,
    };
    let bench = Bench {
        site: &site,
        processors: Processors::of_this_process()?,
        directory: scratch.path(),
        seconds: options.seconds,
    };
    let start = Instant::now();
    let mut outcomes = Vec::new();
    for (index, cell) in cells.iter().enumerate() {
        if cell.needs_tap() && tap.is_none() {
            continue;
        }
        eprintln!(
            "lab: {} of {}: {}, after {} s",
            index + 1,
            cells.len(),
            cell.name(),
            start.elapsed().as_secs()
        );
        let outcome = measure_cell(&bench, &contenders, cell, rounds, &mut notes);
        println!("{}", outcome.table());
        outcomes.push(outcome);
    }
    let whole = !options.quick && options.filter.is_none() && options.only.is_none();
    let instructions = whole.then(instructions).and_then(|count| notes.keep(count));
    if let Some(instructions) = &instructions {
        println!("{instructions}");
    }
    let outcome = Outcome {
        kernel: first_line("/proc/sys/kernel/osrelease"),
        processor: processor(),
        seconds: options.seconds,
        rounds,
        cells: outcomes,
        instructions,
        skipped: notes.skipped.clone(),
    };
    println!("{}", outcome.machine());
    if let Some(path) = &options.json {
        let text = serde_json::to_string_pretty(&outcome)
            .map_err(std::io::Error::from)
            .doing(|| format!("write {}", path.display()))?;
        fs::write(path, text).doing(|| format!("write {}", path.display()))?;
    }
    if let Some(path) = &options.svg {
        let picture = outcome::picture(&outcome.cells, &outcome.machine());
        fs::write(path, picture).doing(|| format!("write {}", path.display()))?;
    }
    notes.verdict()
}

/// All back-ends in one cell, in turn. One that fails is left out of the cell from then on: the figures of the others are
/// worth having.
fn measure_cell(
    bench: &Bench<'_>,
    contenders: &[Contender],
    cell: &Cell,
    rounds: usize,
    notes: &mut Notes,
) -> CellOutcome {
    let mut taking_part: Vec<(Contender, Vec<Sample>)> = contenders
        .iter()
        .filter(|contender| contender.serves(cell))
        .map(|contender| (*contender, Vec::new()))
        .collect();
    for round in 0..rounds {
        for (contender, samples) in &mut taking_part {
            match bench.measure(*contender, cell) {
                Ok(sample) => samples.push(sample),
                Err(error) => {
                    notes.fail(format!("{} in {}: {error}", contender.name(), cell.name()));
                }
            }
        }
        taking_part.retain(|(_, samples)| samples.len() > round);
        // None always comes first.
        if !taking_part.is_empty() {
            taking_part.rotate_left(1);
        }
    }
    let mut rows: Vec<Row> = taking_part
        .into_iter()
        .map(|(contender, samples)| Row::new(contender, samples))
        .collect();
    rows.sort_by_key(|row| contender::ALL.iter().position(|c| c.name() == row.name));
    CellOutcome::new(cell, rows)
}

/// Moves this process, and what it starts, into a network namespace of its own with its TAPs in it.
fn own_network() -> Result<()> {
    unshare(CloneFlags::CLONE_NEWNET).map_err(|errno| {
        LabError::Skipped(format!(
            "cells with a TAP, TCP, and instructions with a TAP: this process may not have a network namespace of its own ({errno}); run it as root"
        ))
    })?;
    let mut lines = vec![
        // passt connects to the loopback.
        "ip link set dev lo up".to_owned(),
    ];
    for tap in [LONE_TAP, FULL_TAP, TCP_TAP] {
        lines.push(format!("ip tuntap add dev {tap} mode tap"));
        // Nothing is sent that was not asked for.
        lines.push(format!("sysctl -q -w net.ipv6.conf.{tap}.disable_ipv6=1"));
        lines.push(format!("ip link set dev {tap} up"));
    }
    lines.push(format!("ip link set dev {FULL_TAP} txqueuelen {BACKLOG}"));
    lines.push(format!("ip address add {TCP_ADDRESS}/24 dev {TCP_TAP}"));
    for line in lines {
        command::run_line(&line)?;
    }
    Ok(())
}

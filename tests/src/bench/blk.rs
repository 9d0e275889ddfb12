//! `cargo lab bench blk`: what it is asked for, and its course.

use std::fs;
use std::num::NonZero;
use std::path::{Path, PathBuf};
use std::time::Instant;

use clap::Args;
use serde::Serialize;

use super::cells::{self, Cell};
use super::contender::{self, Contender, Family};
use super::idle::{self, Idle};
use super::instructions::{self, Instructions};
use super::load::{parse_seconds, parse_size};
use super::measure::{Bench, Perf, Processors, Sample};
use super::notes::{Notes, contains, first_line, processor};
use super::others::{self, Other};
use super::outcome::{CellOutcome, Row};
use super::picture;
use super::storage::Storage;
use crate::error::{Doing, LabError, Result};
use crate::programs;
use crate::setup::Systems;

/// What a measurement takes besides measuring: starting, connecting, warming up, ending.
const OVERHEAD: f64 = 0.45;
/// What counting system calls takes.
const COUNTING: f64 = 1.1;

/// Options of `cargo lab bench blk`.
#[derive(Debug, Clone, Args)]
pub struct BlkBench {
    /// Only cells whose name contains this, such as `null` or `file randread 4k d32`
    #[arg(long, value_name = "TEXT")]
    filter: Option<String>,

    /// Few cells, few rounds: a first impression in a minute or two
    #[arg(long)]
    quick: bool,

    /// How often each back-end is measured in each cell [default: 5, or 3 of a quick run]
    #[arg(long, value_name = "N")]
    rounds: Option<NonZero<u16>>,

    /// How long each measurement takes
    #[arg(long, value_name = "SECONDS", default_value_t = 1.0, value_parser = parse_seconds)]
    seconds: f64,

    /// Size of the disk that is read and written
    #[arg(long, value_name = "SIZE", default_value = "2G", value_parser = parse_size)]
    size: u64,

    /// Directory on the disk to be measured [default: the lab's, in the user's cache]
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,

    /// Another back-end: its name and its command line, with {socket}, for real storage {path}, and if it wants {queues}
    #[arg(long = "back-end", value_name = "NAME=COMMAND")]
    back_ends: Vec<String>,

    /// Only back-ends whose name contains this
    #[arg(long, value_name = "TEXT")]
    only: Option<String>,

    /// Directory with ringside-blk and ringside-load to be used in place of fresh builds
    #[arg(long, value_name = "DIR")]
    programs: Option<PathBuf>,

    /// Only count the instructions of ringside-blk for a request, under valgrind
    #[arg(long, conflicts_with_all = ["quick", "filter", "json", "svg"])]
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
    others: Vec<Other>,
    idle: Vec<Idle>,
    instructions: Option<Instructions>,
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
pub fn run(systems: &Systems, options: &BlkBench) -> Result<()> {
    let programs = programs::given_or_built(options.programs.as_deref())?;
    let mut scratch = tempfile::tempdir().doing(|| "make a directory for sockets".into())?;
    if options.keep {
        scratch.disable_cleanup(true);
        eprintln!("lab: sockets and logs stay in {}", scratch.path().display());
    }
    let site = systems.host_site(&programs, scratch.path());
    if options.instructions {
        println!("{}", instructions::count(&site, scratch.path())?);
        return Ok(());
    }
    let contenders: Vec<Contender> = contender::all(&options.back_ends)?
        .into_iter()
        .filter(|contender| contains(&contender.name, options.only.as_deref()))
        .collect();
    let cells: Vec<Cell> = cells::all(options.quick)
        .into_iter()
        .filter(|cell| contains(&cell.name(), options.filter.as_deref()))
        .collect();
    if cells.is_empty() || contenders.is_empty() {
        let names: Vec<String> = cells::all(false).iter().map(Cell::name).collect();
        return Err(LabError::Setup(format!(
            "no cell or no back-end has such a name; cells: {}",
            names.join(", ")
        )));
    }
    let mut course = Course {
        bench: Bench {
            site: &site,
            processors: Processors::of_this_process()?,
            directory: scratch.path(),
            seconds: options.seconds,
        },
        rounds: match options.rounds {
            Some(rounds) => rounds.get().into(),
            None if options.quick => 3,
            None => 5,
        },
        contenders,
        perf: None,
        notes: Notes::default(),
    };
    match Perf::find(scratch.path()) {
        Ok(perf) => course.perf = Some(perf),
        Err(error) => course.notes.skip(error)?,
    }
    eprintln!(
        "lab: {} cells, {} back-ends, {} rounds: about {} minutes",
        cells.len(),
        course.contenders.len(),
        course.rounds,
        (course.estimate(&cells) / 60.0).ceil()
    );
    let directory = options.dir.as_deref().unwrap_or(systems.path());
    let outcomes = course.all(&cells, directory, options.size)?;
    let others = match options.filter {
        None => course.others(directory),
        Some(_) => Ok(Vec::new()),
    };
    let others = course.notes.keep(others).unwrap_or_default();
    let idle = course.idle();
    let idle = course.notes.keep(idle).unwrap_or_default();
    let instructions = course
        .notes
        .keep(instructions::count(&site, scratch.path()));
    if let Some(instructions) = &instructions {
        println!("{instructions}");
    }
    let outcome = Outcome {
        kernel: first_line("/proc/sys/kernel/osrelease"),
        processor: processor(),
        seconds: options.seconds,
        rounds: course.rounds,
        cells: outcomes,
        others,
        idle,
        instructions,
        skipped: course.notes.skipped.clone(),
    };
    println!("{}", summary(&outcome));
    if let Some(path) = &options.json {
        let text = serde_json::to_string_pretty(&outcome)
            .map_err(std::io::Error::from)
            .doing(|| format!("write {}", path.display()))?;
        fs::write(path, text).doing(|| format!("write {}", path.display()))?;
    }
    if let Some(path) = &options.svg {
        let picture = picture::of_disks(&outcome.cells, &outcome.machine());
        fs::write(path, picture).doing(|| format!("write {}", path.display()))?;
    }
    course.notes.verdict()
}

/// A run through the cells.
struct Course<'a> {
    bench: Bench<'a>,
    rounds: usize,
    contenders: Vec<Contender>,
    perf: Option<Perf>,
    notes: Notes,
}

impl Course<'_> {
    /// How long it will take, in seconds.
    fn estimate(&self, cells: &[Cell]) -> f64 {
        let one = self.bench.seconds + OVERHEAD;
        let rounds = self.rounds as f64;
        let contenders = self.contenders.len() as f64;
        let counting = if self.perf.is_some() {
            COUNTING * contenders
        } else {
            0.0
        };
        cells.len() as f64 * (rounds * one * (contenders + 1.0) + counting)
    }

    /// Front-ends of others.
    fn others(&mut self, directory: &Path) -> Result<Vec<Other>> {
        println!("\nFront-ends of others, null randread 4k, requests/s:");
        let found = others::measure(&self.bench, &self.contenders, self.rounds)?;
        match others::checked_disk(&self.bench, directory) {
            Ok(disk) => println!("{}", others::check(&self.bench, &self.contenders, &disk)?),
            Err(error) => self.notes.skip(error)?,
        }
        println!("{}\n", others::fio_engine(&self.bench)?);
        Ok(found)
    }

    /// What each costs that has nothing to do: ours and QEMU's as they come.
    fn idle(&self) -> Result<Vec<Idle>> {
        let mut seen = Vec::new();
        let mut found = Vec::new();
        for contender in &self.contenders {
            if contender.family != Family::Other && !seen.contains(&contender.family) {
                seen.push(contender.family);
                let idle = idle::watch(&self.bench, contender)?;
                println!("{idle}");
                found.push(idle);
            }
        }
        Ok(found)
    }

    fn all(&mut self, cells: &[Cell], directory: &Path, size: u64) -> Result<Vec<CellOutcome>> {
        let mut outcomes = Vec::new();
        let start = Instant::now();
        let mut done = 0;
        for group in cells.chunk_by(|a, b| a.storage == b.storage) {
            let Some(first) = group.first() else { continue };
            let prepared = Storage::prepare(first.storage, self.bench.site, directory, size);
            done += group.len();
            let storage = match prepared {
                Ok(storage) => storage,
                Err(error) => {
                    self.notes.skip(error)?;
                    continue;
                }
            };
            println!("\n{}", storage.describe());
            for (index, cell) in group.iter().enumerate() {
                let number = done - group.len() + index + 1;
                eprintln!(
                    "lab: {number} of {}: {}, after {} s",
                    cells.len(),
                    cell.name(),
                    start.elapsed().as_secs()
                );
                let outcome = self.cell(&storage, cell);
                if let Some(outcome) = self.notes.keep(outcome) {
                    println!("{}", outcome.table());
                    outcomes.push(outcome);
                }
            }
        }
        Ok(outcomes)
    }

    /// All back-ends in one cell, in turn, between measurements of the storage itself. One that fails is left out of the
    /// cell from then on: the figures of the others are worth having.
    fn cell(&mut self, storage: &Storage, cell: &Cell) -> Result<CellOutcome> {
        let mut serving: Vec<(&Contender, Vec<Sample>)> = self
            .contenders
            .iter()
            .filter(|contender| contender.serves(storage))
            .map(|contender| (contender, Vec::new()))
            .collect();
        let mut failed = Vec::new();
        let mut note = |contender: &Contender, error: LabError| {
            failed.push(format!("{} in {}: {error}", contender.name, cell.name()));
        };
        let mut raw: Vec<Sample> = Vec::new();
        for round in 0..self.rounds {
            raw.extend(self.bench.raw(storage, cell)?);
            for (contender, samples) in &mut serving {
                match self.bench.back_end(contender, storage, cell) {
                    Ok(sample) => samples.push(sample),
                    Err(error) => note(contender, error),
                }
            }
            serving.retain(|(_, samples)| samples.len() > round);
            // None always comes first.
            if !serving.is_empty() {
                serving.rotate_left(1);
            }
        }
        raw.extend(self.bench.raw(storage, cell)?);
        let mut rows = Vec::new();
        for contender in &self.contenders {
            let of = |(one, _): &(&Contender, Vec<Sample>)| one.name == contender.name;
            let Some(at) = serving.iter().position(of) else {
                continue;
            };
            let (_, samples) = serving.swap_remove(at);
            let mut row = Row::new(contender, samples);
            if let Some(perf) = &self.perf {
                let bench = &self.bench;
                match bench.system_calls(perf, contender, storage, cell, row.iops()) {
                    Ok(count) => row.system_calls = Some(count),
                    Err(error) => note(contender, error),
                }
            }
            rows.push(row);
        }
        for what in failed {
            self.notes.fail(what);
        }
        Ok(CellOutcome::new(cell, raw, rows))
    }
}

/// The ratios of all cells, one line each.
fn summary(outcome: &Outcome) -> String {
    let mut text = format!(
        "{}\n{:<28} {:>14} {:>14} {:>19} {:>8} {:>8}\n",
        outcome.machine(),
        "",
        "ringside/raw",
        "qsd best/raw",
        "ringside/qsd best:",
        "99 %",
        "CPU"
    );
    for cell in &outcome.cells {
        let ours = cell.rows.iter().find(|row| row.family == Family::Ringside);
        let number = |ratio: Option<f64>| ratio.map_or("-".into(), |ratio| format!("{ratio:.2}"));
        let best = cell.best(Family::Qemu);
        let between = |of: fn(&Row) -> Option<f64>| Some(ours.and_then(of)? / best.and_then(of)?);
        text.push_str(&format!(
            "{:<28} {:>14} {:>14} {:>19} {:>8} {:>8}\n",
            cell.name,
            number(ours.and_then(|row| Some(row.to_raw?.median))),
            number(best.and_then(|row| Some(row.to_raw?.median))),
            number(ours.and_then(|row| Some(row.to_qsd?.median))),
            number(between(Row::p99)),
            number(between(Row::cpu)),
        ));
    }
    for why in &outcome.skipped {
        text.push_str(&format!("skipped: {why}\n"));
    }
    text
}

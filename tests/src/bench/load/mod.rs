//! A load generator for vhost-user back-ends, of disks and of network cards: the program `ringside-load`.
//!
//! It is the front-end of a virtual machine without the machine: guest memory, one virtqueue per thread on the driver side of
//! `ringside-rings`, and requests that never end. It works alone against any back-end's socket.
//!
//! ```text
//! options ── front     connection, guest memory, rings
//!    │         │          (foreign: the same by the crate `virtio-driver`; net: a network card)
//!    └──── pattern     which request comes next; what a block must hold (verification)
//!              │
//!            lane      one queue in a thread: add, publish, kick, wait, collect
//!              │
//!           report     requests per second, latency, processor time of the back-end
//! ```

mod connection;
mod error;
mod foreign;
mod front;
mod lane;
mod net;
mod options;
mod pattern;
mod report;

use std::process::ExitCode;
use std::sync::Barrier;
use std::sync::atomic::{AtomicU8, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use clap::{Parser, Subcommand};

pub use error::LoadError;
pub use net::{JoinArgs, NetArgs, TapArgs};
pub use options::{Completions, Driver, LoadArgs, Shape};
pub use report::{Latency, Report, Usage};

pub(super) use net::{Direction, NetReport};
pub(super) use options::{parse_seconds, parse_size};

use foreign::Foreign;
use front::FrontEnd;
use lane::Measured;

/// `ringside-load`: puts a vhost-user back-end under load, that of a disk or that of a network card, and measures it.
#[derive(Debug, Parser)]
#[command(
    name = "ringside-load",
    version,
    after_help = options::EXAMPLES,
    args_conflicts_with_subcommands = true,
    subcommand_negates_reqs = true
)]
struct Cli {
    #[command(flatten)]
    load: Option<LoadArgs>,
    #[command(subcommand)]
    other: Option<Other>,
}

/// Loads on something else than a disk.
#[derive(Debug, Subcommand)]
enum Other {
    /// Put a network card under load, without a look at what its frames hold
    Net(NetArgs),
    /// Write frames to a TAP, or read what comes from it: the limit of a card that is joined to one
    Tap(TapArgs),
    /// Join a TAP to a network card, or to another TAP, until it is ended: for loads that the kernel's own network makes
    Join(JoinArgs),
}

/// Runs the program.
#[must_use]
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    let done = match (&cli.other, &cli.load) {
        (Some(Other::Net(args)), _) => net::run(args),
        (Some(Other::Tap(args)), _) => net::run_bare(args),
        (Some(Other::Join(args)), _) => net::join(args),
        (None, Some(load)) => run(load),
        (None, None) => Err(LoadError::Option("give --socket-path".into())),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("ringside-load: {error}");
            ExitCode::FAILURE
        }
    }
}

/// What the lanes are to do now.
#[derive(Debug)]
struct Phase(AtomicU8);

impl Phase {
    const WARM_UP: u8 = 0;
    const MEASURE: u8 = 1;
    const END: u8 = 2;

    fn now(&self) -> u8 {
        // It orders nothing: a lane that sees it late measures a request or two less.
        self.0.load(Ordering::Relaxed)
    }

    fn set(&self, phase: u8) {
        self.0.store(phase, Ordering::Relaxed);
    }
}

/// One lane: what its thread does once all are ready.
type Job<'a, T = Measured> = Box<dyn FnOnce(&Phase, &Barrier) -> Result<T, LoadError> + Send + 'a>;

/// When the lanes begin and end.
struct Course {
    /// They end by themselves.
    counted: bool,
    warm_up: Duration,
    seconds: Duration,
    watch: Option<u32>,
}

/// What came of all lanes.
struct Outcome<T> {
    lanes: Vec<T>,
    usage: Option<Usage>,
    elapsed: Duration,
}

/// Connects, loads, measures and prints.
fn run(args: &LoadArgs) -> Result<(), LoadError> {
    args.check()?;
    match args.front_end {
        Driver::Ringside => {
            let mut front = FrontEnd::connect(args)?;
            load(args, front.features, front.jobs(args)?)?;
            front.leave();
        }
        Driver::VirtioDriver => {
            let mut front = Foreign::connect(args)?;
            let features = front.features();
            load(args, features, front.jobs(args)?)?;
        }
    }
    Ok(())
}

/// Runs the jobs and prints what they measured; then stays as long as it is to.
fn load(args: &LoadArgs, features: u64, jobs: Vec<Job<'_>>) -> Result<(), LoadError> {
    let course = Course {
        counted: args.count.is_some(),
        warm_up: args.warm_up(),
        seconds: args.seconds(),
        watch: args.watch,
    };
    let outcome = measure(&course, jobs)?;
    Report::new(args, features, &outcome).print(args.json)?;
    // Connected, with nothing to do: what an idle back-end costs shows now.
    thread::sleep(args.linger());
    Ok(())
}

/// Runs the jobs.
fn measure<T: Send>(course: &Course, jobs: Vec<Job<'_, T>>) -> Result<Outcome<T>, LoadError> {
    let phase = Phase(AtomicU8::new(if course.counted {
        Phase::MEASURE
    } else {
        Phase::WARM_UP
    }));
    let ready = Barrier::new(jobs.len().saturating_add(1));
    thread::scope(|scope| {
        let (phase, ready) = (&phase, &ready);
        let threads: Vec<_> = jobs
            .into_iter()
            .map(|job| scope.spawn(move || job(phase, ready)))
            .collect();
        ready.wait();
        if !course.counted {
            thread::sleep(course.warm_up);
        }
        let before = course.watch.map(Usage::of).transpose();
        let start = Instant::now();
        phase.set(Phase::MEASURE);
        if course.counted {
            while !threads.iter().all(|t| t.is_finished()) {
                thread::sleep(Duration::from_millis(1));
            }
        } else {
            // In steps, so that a lane that failed is not waited for.
            while start.elapsed() < course.seconds && !threads.iter().any(|t| t.is_finished()) {
                let left = course.seconds.saturating_sub(start.elapsed());
                thread::sleep(left.min(Duration::from_millis(50)));
            }
        }
        let elapsed = start.elapsed();
        let after = course.watch.map(Usage::of).transpose();
        // Whatever failed, the lanes end.
        phase.set(Phase::END);
        let mut lanes = Vec::new();
        for thread in threads {
            lanes.push(thread.join().map_err(|_| LoadError::Lane)??);
        }
        let usage = before?
            .zip(after?)
            .map(|(before, after)| after.since(before));
        Ok(Outcome {
            lanes,
            usage,
            elapsed,
        })
    })
}

//! A load generator for vhost-user block back-ends: the program `ringside-load`.
//!
//! It is the front-end of a virtual machine without the machine: guest memory, one virtqueue per thread on the driver side of
//! `ringside-rings`, and requests that never end. It works alone against any back-end's socket.
//!
//! ```text
//! options ── front     connection, guest memory, rings
//!    │         │          (foreign: the same by the crate `virtio-driver`)
//!    └──── pattern     which request comes next; what a block must hold (verification)
//!              │
//!            lane      one queue in a thread: add, publish, kick, wait, collect
//!              │
//!           report     requests per second, latency, processor time of the back-end
//! ```

mod error;
mod foreign;
mod front;
mod lane;
mod options;
mod pattern;
mod report;

use std::process::ExitCode;
use std::sync::Barrier;
use std::sync::atomic::{AtomicU8, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use clap::Parser;

pub use error::LoadError;
pub use options::{Completions, Driver, LoadArgs, Shape};
pub use report::{Latency, Report, Usage};

pub(super) use options::{parse_seconds, parse_size};

use foreign::Foreign;
use front::FrontEnd;
use lane::Measured;

/// `ringside-load`: puts a vhost-user block back-end under load, and measures it.
#[derive(Debug, Parser)]
#[command(name = "ringside-load", version, after_help = options::EXAMPLES)]
struct Cli {
    #[command(flatten)]
    load: LoadArgs,
}

/// Runs the program.
#[must_use]
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    match run(&cli.load) {
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

/// One queue under load: what its thread does once all are ready.
type Job<'a> = Box<dyn FnOnce(&Phase, &Barrier) -> Result<Measured, LoadError> + Send + 'a>;

/// Connects, loads, measures and prints.
fn run(args: &LoadArgs) -> Result<(), LoadError> {
    args.check()?;
    match args.front_end {
        Driver::Ringside => {
            let mut front = FrontEnd::connect(args)?;
            measure(args, front.features, front.jobs(args)?)?;
            front.leave();
        }
        Driver::VirtioDriver => {
            let mut front = Foreign::connect(args)?;
            let features = front.features();
            measure(args, features, front.jobs(args)?)?;
        }
    }
    Ok(())
}

/// Runs the jobs and prints what they measured; then stays as long as it is to.
fn measure(args: &LoadArgs, features: u64, jobs: Vec<Job<'_>>) -> Result<(), LoadError> {
    let phase = Phase(AtomicU8::new(if args.count.is_some() {
        Phase::MEASURE
    } else {
        Phase::WARM_UP
    }));
    let ready = Barrier::new(jobs.len().saturating_add(1));
    let (lanes, usage, elapsed) = thread::scope(|scope| {
        let (phase, ready) = (&phase, &ready);
        let threads: Vec<_> = jobs
            .into_iter()
            .map(|job| scope.spawn(move || job(phase, ready)))
            .collect();
        ready.wait();
        if args.count.is_none() {
            thread::sleep(args.warm_up());
        }
        let before = args.watch.map(Usage::of).transpose();
        let start = Instant::now();
        phase.set(Phase::MEASURE);
        if args.count.is_none() {
            // In steps, so that a lane that failed is not waited for.
            while start.elapsed() < args.seconds() && !threads.iter().any(|t| t.is_finished()) {
                let left = args.seconds().saturating_sub(start.elapsed());
                thread::sleep(left.min(Duration::from_millis(50)));
            }
        } else {
            while !threads.iter().all(|t| t.is_finished()) {
                thread::sleep(Duration::from_millis(1));
            }
        }
        let elapsed = start.elapsed();
        let after = args.watch.map(Usage::of).transpose();
        // Whatever failed, the lanes end.
        phase.set(Phase::END);
        let mut lanes = Vec::new();
        for thread in threads {
            lanes.push(thread.join().map_err(|_| LoadError::Lane)??);
        }
        let usage = before?
            .zip(after?)
            .map(|(before, after)| after.since(before));
        Ok::<_, LoadError>((lanes, usage, elapsed))
    })?;
    Report::new(args, features, &lanes, usage, elapsed).print(args.json)?;
    // Connected, with nothing to do: what an idle back-end costs shows now.
    thread::sleep(args.linger());
    Ok(())
}

//! `cargo lab test`: the native tests, then the suite, its tests shared out among as many lab VMs as the machine has room for.

use std::collections::VecDeque;
use std::io::Write;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use crate::error::{Doing, LabError, Result};
use crate::lab::{Lab, Prepared, Where};
use crate::native;
use crate::protocol::{Event, Outcome, Request, Tally};
use crate::setup::Systems;
use crate::site::{Effort, Site};
use crate::suite;

/// The test that is no part of the suite, as it ends the machine that the suite runs in.
const CUT: &str = "crash::power_is_cut";
/// How long a lab may say nothing after the limit of the test that it runs: then it is gone itself.
const SILENCE_LIMIT: Duration = Duration::from_secs(120);

/// What is tested, and how.
#[derive(Debug)]
pub struct Plan<'a> {
    /// Only tests whose name contains one of these; all, if empty.
    pub filters: &'a [String],
    /// How much is done by tests that do the same again and again.
    pub effort: Effort,
    /// How many lab VMs.
    pub jobs: Option<usize>,
    /// Whether everything that tests write is shown.
    pub verbose: bool,
}

/// The names of the end-to-end tests that are selected.
#[must_use]
pub fn names(filters: &[String]) -> Vec<&'static str> {
    let mut names = suite::names(filters);
    names.extend(suite::is_selected(CUT, filters).then_some(CUT));
    names
}

/// Runs the tests of a plan, and counts them.
///
/// # Errors
/// Fails if a test could not even be run; those that were are counted.
pub fn run(
    plan: &Plan,
    place: Where,
    systems: impl FnOnce() -> Result<Systems>,
    tally: &mut Tally,
) -> Result<()> {
    let names = names(plan.filters);
    if names.is_empty() {
        return Err(LabError::Setup(format!(
            "no end-to-end test has a name with {}; `cargo lab test --list` shows them",
            plan.filters.join(" or ")
        )));
    }
    // What it asks comes before all that takes long.
    let systems = systems()?;
    if plan.filters.is_empty() {
        let native = native::test(plan.verbose)?;
        println!("lab: native tests: {native}");
        tally.add(native);
    }
    let total = u64::try_from(names.len()).unwrap_or(u64::MAX);
    let prepared = Prepared::several(systems, place, plan.jobs, names.len())?;
    let progress = Progress {
        waiting: Mutex::new(names.into()),
        tally: Mutex::new(Tally::default()),
    };
    thread::scope(|scope| {
        for prepared in prepared {
            let worker = thread::Builder::new().name("lab".into());
            let started = worker.spawn_scoped(scope, || {
                if let Err(error) = work(prepared, plan, &progress) {
                    eprintln!("lab: {error}");
                }
            });
            if let Err(error) = started {
                eprintln!("lab: one thread less than wanted: {error}");
            }
        }
    });
    let ended = *locked(&progress.tally);
    tally.add(ended);
    let missing = total.saturating_sub(ended.passed + ended.failed + ended.skipped);
    if missing > 0 {
        eprintln!("lab: {missing} tests did not come to run, as no lab was left for them");
        tally.failed += missing;
    }
    Ok(())
}

/// What the labs share.
struct Progress {
    waiting: Mutex<VecDeque<&'static str>>,
    tally: Mutex<Tally>,
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Runs tests in a lab of this thread as long as there are some.
fn work(prepared: Prepared, plan: &Plan, progress: &Progress) -> Result<()> {
    let mut lab = prepared.start()?;
    loop {
        let Some(name) = locked(&progress.waiting).pop_front() else {
            return Ok(());
        };
        // What hangs is to be seen.
        eprintln!("lab: {name} begins");
        let (outcome, sound) = match name {
            CUT => cut_power(&mut lab),
            _ => run_inside(&mut lab, name, plan),
        };
        locked(&progress.tally).count(outcome);
        if !sound && !locked(&progress.waiting).is_empty() {
            // The other tests need not end with it.
            lab.restart()?;
        }
    }
}

/// Runs a test of the suite; gives how it ended, and whether the lab can run another.
fn run_inside(lab: &mut Lab, name: &str, plan: &Plan) -> (Outcome, bool) {
    let request = Request::Test {
        name: name.into(),
        effort: plan.effort,
    };
    let limit = suite::limit(name, plan.effort, &Site::inside_lab()) + SILENCE_LIMIT;
    let start = Instant::now();
    let mut outcome = None;
    let result = lab.request(&request, limit, |event| {
        if let Event::Ended { outcome: how, .. } = event {
            outcome = Some(*how);
        }
        show(event, plan.verbose);
    });
    match (outcome, result) {
        (Some(outcome), Ok(_)) => (outcome, true),
        (Some(outcome), Err(error)) => {
            eprintln!("lab: {error}");
            (outcome, false)
        }
        (None, result) => {
            let why = result.map_or_else(|error| error.to_string(), |_| "no result came".into());
            show_end(name, Outcome::Failed, start, why);
            (Outcome::Failed, false)
        }
    }
}

/// Runs the test that ends the lab VM and starts it again; gives the same.
fn cut_power(lab: &mut Lab) -> (Outcome, bool) {
    let start = Instant::now();
    let (outcome, detail) = match lab.cut_power() {
        Ok(detail) => (Outcome::Passed, detail),
        Err(LabError::Skipped(why)) => (Outcome::Skipped, why),
        Err(error) => (Outcome::Failed, error.to_string()),
    };
    show_end(CUT, outcome, start, detail);
    (outcome, outcome != Outcome::Failed)
}

fn show_end(name: &str, outcome: Outcome, start: Instant, detail: String) {
    let ended = Event::Ended {
        name: name.into(),
        outcome,
        seconds: start.elapsed().as_secs_f64(),
        detail,
    };
    show(&ended, true);
}

/// Shows an event on the terminal: a test when it has ended, as others run beside it.
pub fn show(event: &Event, verbose: bool) {
    let mut out = std::io::stdout().lock();
    let written = match event {
        Event::Output { text } => write!(out, "{text}"),
        Event::Ended {
            name,
            outcome,
            seconds,
            detail,
        } => {
            let word = match outcome {
                Outcome::Passed => "ok",
                Outcome::Failed => "FAILED",
                Outcome::Skipped => "skipped",
            };
            let line = format!("test {name} ... {word} ({seconds:.1} s)");
            let indented = detail
                .lines()
                .map(|line| format!("    {line}\n"))
                .collect::<String>();
            // What a passed test printed is a result: figures that belong into the log.
            match outcome {
                Outcome::Skipped => writeln!(out, "{line}: {detail}"),
                Outcome::Passed if !verbose && detail.len() > 8000 => writeln!(out, "{line}"),
                _ => write!(out, "{line}\n{indented}"),
            }
        }
        Event::Ready | Event::Done { .. } => Ok(()),
    };
    // Nobody looks any more; the exit status still tells.
    let _ = written
        .and_then(|()| out.flush())
        .doing(|| "write to standard output".into());
}

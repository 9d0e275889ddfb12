//! `cargo lab test`: the native tests, a short search in each fuzz target, then the suite, its tests shared out among as many lab
//! VMs as the machine has room for.

use std::collections::VecDeque;
use std::io::Write;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use crate::error::{Doing, LabError, Result};
use crate::fuzz;
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
    /// How long to search in each fuzz target.
    pub fuzz_seconds: u32,
    /// How many lab VMs.
    pub jobs: Option<usize>,
    /// How often a failed test is run again.
    pub retries: u16,
    /// Within which time from `start` a test has to begin; later it is skipped.
    pub within: Option<Duration>,
    /// When all this began.
    pub start: Instant,
    /// Whether everything that tests write is shown.
    pub verbose: bool,
}

impl Plan<'_> {
    /// Whether no test is to begin any more.
    fn is_over(&self) -> bool {
        self.within
            .is_some_and(|within| self.start.elapsed() >= within)
    }
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
    let mut names = names(plan.filters);
    // The long ones first: so no lab is left alone with one at the end.
    let limit = |name: &&str| suite::limit(name, plan.effort, &Site::inside_lab());
    names.sort_by_key(|name| std::cmp::Reverse(limit(name)));
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
        if plan.fuzz_seconds > 0 {
            let fuzzed = fuzz::test(plan.fuzz_seconds).unwrap_or_else(|error| {
                // The tests with guests have nothing to do with it.
                eprintln!("lab: fuzz: {error}");
                Tally {
                    failed: 1,
                    ..Tally::default()
                }
            });
            println!("lab: fuzz targets: {fuzzed}");
            tally.add(fuzzed);
        }
    }
    let total = u64::try_from(names.len()).unwrap_or(u64::MAX);
    let prepared = Prepared::several(systems, place, plan.jobs, names.len())?;
    let progress = Progress {
        waiting: Mutex::new(names.into()),
        tally: Mutex::new(Tally::default()),
        failures: Mutex::new(Vec::new()),
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
    // At the end, where they are found.
    for failure in locked(&progress.failures).iter() {
        print!("{failure}");
    }
    let ended = *locked(&progress.tally);
    tally.add(ended);
    let missing = total.saturating_sub(ended.passed + ended.failed + ended.skipped);
    if missing > 0 {
        eprintln!("lab: {missing} tests did not come to an end, as no lab was left for them");
        tally.failed += missing;
    }
    Ok(())
}

/// What the labs share.
struct Progress {
    waiting: Mutex<VecDeque<&'static str>>,
    tally: Mutex<Tally>,
    /// What is to be said at the end of tests that failed, be it once.
    failures: Mutex<Vec<String>>,
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Runs tests in a lab of this thread as long as there are some.
fn work(prepared: Prepared, plan: &Plan, progress: &Progress) -> Result<()> {
    if plan.is_over() {
        skip_rest(progress);
        return Ok(());
    }
    let mut lab = prepared.start()?;
    loop {
        if plan.is_over() {
            skip_rest(progress);
        }
        let Some(name) = locked(&progress.waiting).pop_front() else {
            return Ok(());
        };
        let mut attempt = 0;
        let ended = loop {
            // What hangs is to be seen.
            eprintln!("lab: {name} begins");
            let ended = match name {
                CUT => cut_power(&mut lab),
                _ => run_inside(&mut lab, name, plan),
            };
            attempt += 1;
            if ended.outcome == Outcome::Failed {
                locked(&progress.failures).push(in_short(name, attempt, &ended.detail));
            }
            if ended.outcome != Outcome::Failed || attempt > plan.retries {
                break ended;
            }
            if !ended.sound {
                lab.restart()?;
            }
        };
        let outcome = match ended.outcome {
            // It could be run before.
            Outcome::Skipped if attempt > 1 => Outcome::Failed,
            outcome => outcome,
        };
        locked(&progress.tally).count(outcome);
        if attempt > 1 {
            let end = format!("{name} ended at attempt {attempt}: {}\n", word(outcome));
            locked(&progress.failures).push(end);
        }
        if !ended.sound && !plan.is_over() && !locked(&progress.waiting).is_empty() {
            // The other tests need not end with it.
            lab.restart()?;
        }
    }
}

/// Says of the tests that are left that there is no time for them.
fn skip_rest(progress: &Progress) {
    for name in std::mem::take(&mut *locked(&progress.waiting)) {
        let why = "no time is left for it (--within)".to_owned();
        ended(name, Outcome::Skipped, Instant::now(), why, true);
        locked(&progress.tally).count(Outcome::Skipped);
    }
}

/// How a test ended.
struct Ended {
    outcome: Outcome,
    detail: String,
    /// Whether the lab can run another one.
    sound: bool,
}

/// What is said of a failure at the end: some of what the test printed, and its error.
fn in_short(name: &str, attempt: u16, detail: &str) -> String {
    const FIRST: usize = 4;
    const LAST: usize = 12;
    let lines: Vec<_> = detail
        .lines()
        .take_while(|line| !line.starts_with("--- end of "))
        .collect();
    let mut text = format!("{name} failed at attempt {attempt}:\n");
    for (number, line) in lines.iter().enumerate() {
        if number == FIRST && lines.len() > FIRST + LAST {
            text.push_str("    […]\n");
        }
        // Behind that an error shows a log.
        let error = line.ends_with("; the last it wrote:");
        if number < FIRST || error || number + LAST >= lines.len() {
            text.push_str("    ");
            text.extend(line.chars().take(300));
            text.push('\n');
        }
    }
    text
}

/// Runs a test of the suite.
fn run_inside(lab: &mut Lab, name: &str, plan: &Plan) -> Ended {
    let request = Request::Test {
        name: name.into(),
        effort: plan.effort,
    };
    let limit = suite::limit(name, plan.effort, &Site::inside_lab()) + SILENCE_LIMIT;
    let start = Instant::now();
    let mut told = None;
    let result = lab.request(&request, limit, |event| {
        if let Event::Ended {
            outcome, detail, ..
        } = event
        {
            told = Some((*outcome, detail.clone()));
        }
        show(event, plan.verbose);
    });
    match (told, result) {
        (Some((outcome, detail)), result) => {
            if let Err(error) = &result {
                eprintln!("lab: {error}");
            }
            Ended {
                outcome,
                detail,
                sound: result.is_ok(),
            }
        }
        (None, result) => {
            let why = result.map_or_else(|error| error.to_string(), |_| "no result came".into());
            ended(name, Outcome::Failed, start, why, false)
        }
    }
}

/// Runs the test that ends the lab VM and starts it again.
fn cut_power(lab: &mut Lab) -> Ended {
    let start = Instant::now();
    let (outcome, detail) = match lab.cut_power() {
        Ok(detail) => (Outcome::Passed, detail),
        Err(LabError::Skipped(why)) => (Outcome::Skipped, why),
        Err(error) => (Outcome::Failed, error.to_string()),
    };
    ended(CUT, outcome, start, detail, outcome != Outcome::Failed)
}

/// Shows how a test ended that has not said it itself, and gives it.
fn ended(name: &str, outcome: Outcome, start: Instant, detail: String, sound: bool) -> Ended {
    let event = Event::Ended {
        name: name.into(),
        outcome,
        seconds: start.elapsed().as_secs_f64(),
        detail: detail.clone(),
    };
    show(&event, true);
    Ended {
        outcome,
        detail,
        sound,
    }
}

fn word(outcome: Outcome) -> &'static str {
    match outcome {
        Outcome::Passed => "ok",
        Outcome::Failed => "FAILED",
        Outcome::Skipped => "skipped",
    }
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
            let line = format!("test {name} ... {} ({seconds:.1} s)", word(*outcome));
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_in_short_has_the_error_and_no_logs() {
        let printed: String = (0..40).map(|number| format!("line {number}\n")).collect();
        let detail = format!("{printed}it broke\n--- end of a.log\nnoise\n");
        let text = in_short("a::test", 2, &detail);
        assert!(
            text.starts_with("a::test failed at attempt 2:\n    line 0\n"),
            "{text}"
        );
        assert!(
            text.contains("    line 3\n    […]\n    line 29\n"),
            "{text}"
        );
        assert!(text.ends_with("    it broke\n"), "{text}");
        let log = "line\n".repeat(30);
        let text = in_short(
            "c",
            1,
            &format!("{printed}it ended; the last it wrote:\n{log}"),
        );
        assert!(
            text.contains("\n    it ended; the last it wrote:\n"),
            "{text}"
        );
        assert_eq!(
            in_short("b", 1, "why\n"),
            "b failed at attempt 1:\n    why\n"
        );
    }
}

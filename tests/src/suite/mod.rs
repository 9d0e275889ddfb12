//! The end-to-end tests, and what runs them: each in a process of its own, in its own process, mount and network namespaces, so
//! that nothing it starts or creates outlives it, whatever happens to it.

mod bench;
mod bench_net;
mod blk;
mod blk_control;
mod boot;
mod crash;
mod faults;
mod formats;
mod links;
mod migration;
mod net;
mod net_features;
mod net_switch;
mod others;
mod snapshot;
mod soak;
mod upgrade;
mod vfio;
mod zoned;

use std::fs::{self, File};
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use crate::command::{bound, wait_for};
use crate::error::{Doing, LabError, Result, last_lines};
use crate::harness::readable;
use crate::inside::Events;
use crate::protocol::{Event, Outcome};
use crate::setup::sorted_names;
use crate::site::{Effort, SITE_VARIABLE, Site};

/// Exit status of the process of a test that cannot run here.
const SKIPPED_STATUS: i32 = 77;

/// How long the directory of a test may resist.
const REMOVAL_LIMIT: Duration = Duration::from_secs(5);

/// One end-to-end test.
#[derive(Debug)]
pub struct Test {
    /// Its name: `area::what_holds`.
    pub name: &'static str,
    /// How long it may take on plain hardware, in seconds.
    pub seconds: u64,
    /// The test. It may write into the current directory; what it leaves there named `*.log` is shown if it fails.
    pub run: fn(&Site) -> Result<()>,
}

/// All tests, in the order they are handed out.
fn tests() -> impl Iterator<Item = &'static Test> {
    [
        boot::TESTS,
        blk::TESTS,
        blk_control::TESTS,
        crash::TESTS,
        faults::TESTS,
        upgrade::TESTS,
        formats::TESTS,
        bench::TESTS,
        bench_net::TESTS,
        net::TESTS,
        net_switch::TESTS,
        links::TESTS,
        net_features::TESTS,
        others::TESTS,
        migration::TESTS,
        snapshot::TESTS,
        zoned::TESTS,
        soak::TESTS,
    ]
    .into_iter()
    .flatten()
    .chain(vfio::tests())
}

/// Names of the tests that `filters` select: all when there are none, else those that contain one of them.
#[must_use]
pub fn names(filters: &[String]) -> Vec<&'static str> {
    tests()
        .map(|test| test.name)
        .filter(|name| is_selected(name, filters))
        .collect()
}

/// Whether `filters` select the test of this name.
#[must_use]
pub fn is_selected(name: &str, filters: &[String]) -> bool {
    filters.is_empty() || filters.iter().any(|filter| name.contains(filter.as_str()))
}

/// The test of this name.
fn named(name: &str) -> Result<&'static Test> {
    tests()
        .find(|test| test.name == name)
        .ok_or_else(|| LabError::Setup(format!("there is no test {name}")))
}

/// How long a test may take.
#[must_use]
pub fn limit(name: &str, effort: Effort, site: &Site) -> Duration {
    let seconds = named(name).map_or(0, |test| test.seconds);
    site.limit(Duration::from_secs(seconds) + effort.duration())
}

/// Runs a test; the status is 1 when it failed.
///
/// # Errors
/// Fails if there is no such test, or nobody takes the events.
pub fn run(site: &Site, name: &str, events: &Events) -> Result<i32> {
    let test = named(name)?;
    let start = Instant::now();
    let (outcome, detail) = run_in_process(site, test)
        .unwrap_or_else(|error| (Outcome::Failed, format!("It cannot be run: {error}")));
    let seconds = start.elapsed().as_secs_f64();
    events.tell(&Event::Ended {
        name: name.into(),
        outcome,
        seconds,
        detail,
    })?;
    Ok(i32::from(outcome == Outcome::Failed))
}

fn run_in_process(site: &Site, test: &Test) -> Result<(Outcome, String)> {
    let directory = site.scratch.join(test.name.replace("::", "-"));
    // An earlier attempt may have left something.
    remove_soon(&directory).doing(|| format!("remove {}", directory.display()))?;
    fs::create_dir_all(&directory).doing(|| format!("create {}", directory.display()))?;
    let log_path = directory.join("test.log");
    let log = File::create(&log_path).doing(|| format!("create {}", log_path.display()))?;
    let errors = log
        .try_clone()
        .doing(|| format!("write {}", log_path.display()))?;
    let mut child = isolated(site, &directory, &["run-test", test.name])?
        .stdin(Stdio::null())
        .stdout(log)
        .stderr(errors)
        .spawn()
        .doing(|| "run unshare".into())?;
    let limit = limit(test.name, site.effort, site);
    let status = wait_for(&mut child, limit)?;
    if status.is_none() {
        // The kernel ends all in the process namespace with it.
        let _ = child.kill();
        let _ = child.wait();
    }
    let (outcome, mut detail) = match status.map(|status| status.code()) {
        Some(Some(0)) => (Outcome::Passed, text_of(&log_path)),
        Some(Some(SKIPPED_STATUS)) => (Outcome::Skipped, text_of(&log_path)),
        Some(_) => (Outcome::Failed, failure(&directory, "")),
        None => {
            let why = format!("It did not end within {} s.\n", limit.as_secs());
            (Outcome::Failed, failure(&directory, &why))
        }
    };
    if let Err(error) = remove_soon(&directory) {
        // It takes space, and is in the way of this test alone.
        detail.push_str(&format!("\n{} stays: {error}", directory.display()));
    }
    Ok((outcome, detail))
}

/// Removes a directory in which the last processes of a test may still be at work: they end with their namespace.
fn remove_soon(directory: &Path) -> std::io::Result<()> {
    let deadline = Instant::now() + REMOVAL_LIMIT;
    loop {
        match fs::remove_dir_all(directory) {
            Err(_) if directory.exists() && Instant::now() < deadline => {
                thread::sleep(Duration::from_millis(50));
            }
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
            _ => return Ok(()),
        }
    }
}

/// A command that runs this program with other arguments in namespaces and a directory of its own.
///
/// # Errors
/// Fails if this program cannot be found.
pub fn isolated(site: &Site, directory: &Path, arguments: &[&str]) -> Result<Command> {
    let site = Site {
        scratch: directory.to_owned(),
        ..site.clone()
    };
    let site = serde_json::to_string(&site).map_err(|error| LabError::Protocol {
        from: "suite",
        text: error.to_string(),
    })?;
    let program = std::env::current_exe().doing(|| "find this program".into())?;
    // All in the namespace ends with its first process, that one with unshare, and unshare with this program.
    let mut command = bound("unshare");
    command
        .args([
            "--fork",
            "--pid",
            "--mount-proc",
            "--net",
            "--kill-child",
            "--",
        ])
        .arg(program)
        .args(arguments)
        .env(SITE_VARIABLE, site)
        .current_dir(directory);
    Ok(command)
}

fn text_of(log: &Path) -> String {
    String::from_utf8_lossy(&fs::read(log).unwrap_or_default())
        .trim_end()
        .to_owned()
}

/// What shows why a test failed: its messages, and the end of each log it left.
fn failure(directory: &Path, why: &str) -> String {
    let mut text = format!("{why}{}\n", text_of(&directory.join("test.log")));
    for name in sorted_names(directory).unwrap_or_default() {
        if name == "test.log" || !name.ends_with(".log") {
            continue;
        }
        text.push_str(&format!("--- end of {name}\n"));
        for line in last_lines(&readable(&text_of(&directory.join(&name))), 40) {
            text.push_str(line);
            text.push('\n');
        }
    }
    text
}

/// Runs one test in this process; gives the exit status.
///
/// # Errors
/// Fails if there is no such test, or this is not a process of the suite.
pub fn run_test(name: &str) -> Result<i32> {
    let site = Site::current()?;
    let test = named(name)?;
    Ok(match (test.run)(&site) {
        Ok(()) => 0,
        Err(LabError::Skipped(why)) => {
            eprintln!("{why}");
            SKIPPED_STATUS
        }
        Err(error) => {
            eprintln!("{error}");
            1
        }
    })
}

#[cfg(test)]
mod unit_tests {
    use super::*;

    #[test]
    fn names_are_unique_and_good_for_directories() {
        let mut all = names(&[]);
        assert!(!all.is_empty());
        let count = all.len();
        all.sort_unstable();
        all.dedup();
        assert_eq!(all.len(), count);
        let fits = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_' || c == ':';
        assert!(all.iter().all(|name| name.chars().all(fits)));
    }

    #[test]
    fn filters_select_by_part_of_the_name() {
        assert!(names(&["no such test".into()]).is_empty());
        let first = names(&[])[0];
        assert!(names(&[first.into()]).contains(&first));
    }
}

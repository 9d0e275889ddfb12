//! The checks and tests that need no lab: cargo's own.

use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use crate::command::{self, GRACE, describe};
use crate::error::{Doing, Result};
use crate::programs::{BUILD_LIMIT, cargo};
use crate::protocol::Tally;

/// How long all native tests may take; they take a minute on a slow machine.
const TEST_LIMIT: Duration = Duration::from_secs(20 * 60);

/// Checks format and lints, and with cargo-deny, where it is installed, licences.
///
/// # Errors
/// Fails at the first check that does.
pub fn check() -> Result<()> {
    must_succeed(cargo().args(["fmt", "--all", "--check"]))?;
    must_succeed(cargo().args([
        "clippy",
        "--workspace",
        "--all-targets",
        "--locked",
        "--",
        "-D",
        "warnings",
    ]))?;
    let deny = cargo()
        .args(["deny", "--version"])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
    if deny.is_ok_and(|status| status.success()) {
        must_succeed(cargo().args(["deny", "--offline", "check", "bans", "licenses", "sources"]))
    } else {
        eprintln!("lab: cargo-deny is not installed; licences are not checked");
        Ok(())
    }
}

fn must_succeed(command: &mut Command) -> Result<()> {
    let line = describe(command);
    eprintln!("lab: {}", line.rsplit('/').next().unwrap_or(&line));
    command::succeed(command, BUILD_LIMIT)
}

/// Runs all native tests of the workspace and counts them. A test that writes a line `skipped: why`, or past the capture of its
/// output `test NAME: skipped: why`, counts as skipped; a time-out, and a test program that dies, as a failure.
///
/// # Errors
/// Fails if cargo cannot be run, or the tests do not compile.
pub fn test(verbose: bool) -> Result<Tally> {
    let all = ["test", "--workspace", "--locked", "--quiet"];
    must_succeed(cargo().args(all).arg("--no-run"))?;
    let mut command = cargo();
    command.args(all).args(["--no-fail-fast", "--"]);
    command.args(["--show-output", "--format=pretty"]);
    eprintln!("lab: cargo test --workspace");
    count(&mut command, verbose, TEST_LIMIT)
}

/// Runs the native tests of some packages, each test program started by `runner`, and counts them.
///
/// # Errors
/// As [`test`].
pub fn traced(packages: &[&str], runner: &Path) -> Result<Tally> {
    let packages = packages.iter().flat_map(|package| ["--package", package]);
    let all: Vec<&str> = ["test", "--tests", "--locked", "--quiet"]
        .into_iter()
        .chain(packages)
        .collect();
    must_succeed(cargo().args(&all).arg("--no-run"))?;
    let mut command = cargo();
    command.args(&all).arg("--no-fail-fast");
    // Of this architecture the lists are.
    command.env("CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUNNER", runner);
    count(&mut command, false, TEST_LIMIT)
}

/// Runs a command that writes as `cargo test` does, and counts.
fn count(command: &mut Command, verbose: bool, limit: Duration) -> Result<Tally> {
    let line = describe(command);
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .doing(|| format!("run `{line}`"))?;
    let summary = Arc::new(Mutex::new(Summary::default()));
    let locked = |summary: &Mutex<Summary>, text: &str, past_capture: bool| {
        let mut summary = summary.lock().unwrap_or_else(PoisonError::into_inner);
        if past_capture {
            summary.skipped += u64::from(text.contains(": skipped: "));
            true
        } else {
            summary.take(text)
        }
    };
    let mut readers = Vec::new();
    if let Some(stdout) = child.stdout.take() {
        let summary = Arc::clone(&summary);
        readers.push(thread::spawn(move || {
            each_line(stdout, |text| {
                if locked(&summary, text, false) || verbose {
                    println!("{text}");
                }
            });
        }));
    }
    if let Some(stderr) = child.stderr.take() {
        let summary = Arc::clone(&summary);
        readers.push(thread::spawn(move || {
            each_line(stderr, |text| {
                locked(&summary, text, true);
                eprintln!("{text}");
            });
        }));
    }
    let status = command::wait_for(&mut child, limit)?;
    if status.is_none() {
        command::end_tree(&mut child, GRACE);
    }
    // What a test left behind may hold the pipes open for ever.
    let deadline = Instant::now() + GRACE;
    while readers.iter().any(|reader| !reader.is_finished()) && Instant::now() < deadline {
        thread::sleep(Duration::from_millis(10));
    }
    let mut tally = summary
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .tally();
    match status {
        None => {
            let seconds = limit.as_secs();
            eprintln!("lab: the native tests took longer than {seconds} s and were ended");
            tally.failed += 1;
        }
        Some(status) if !status.success() && tally.failed == 0 => {
            eprintln!("lab: `{line}` ended with {status}, and no test that failed");
            tally.failed += 1;
        }
        Some(_) => {}
    }
    Ok(tally)
}

/// Calls `take` with each line of a stream, whatever bytes it has.
fn each_line(stream: impl Read, mut take: impl FnMut(&str)) {
    for line in BufReader::new(stream).split(b'\n') {
        let Ok(line) = line else { return };
        take(&String::from_utf8_lossy(&line));
    }
}

/// What libtest's output says.
#[derive(Debug, Default)]
struct Summary {
    counted: Tally,
    skipped: u64,
    in_failures: bool,
}

impl Summary {
    /// Takes a line; whether it is of interest to everybody.
    fn take(&mut self, line: &str) -> bool {
        if let Some(counts) = line.strip_prefix("test result: ") {
            let number = |word: &str| {
                counts
                    .split([';', '.'])
                    .filter_map(|part| part.trim().strip_suffix(word))
                    .find_map(|number| number.trim().parse::<u64>().ok())
                    .unwrap_or_default()
            };
            self.counted.add(Tally {
                passed: number("passed"),
                failed: number("failed"),
                skipped: number("ignored"),
            });
            self.in_failures = false;
            return false;
        }
        if line.starts_with("skipped: ") {
            self.skipped += 1;
            return true;
        }
        if line == "failures:" {
            self.in_failures = true;
        }
        self.in_failures || line.ends_with("... FAILED") || line.contains("... ignored")
    }

    fn tally(&self) -> Tally {
        // A test that says it is skipped ends as one that passed.
        let skipped = self.skipped.min(self.counted.passed);
        Tally {
            passed: self.counted.passed - skipped,
            failed: self.counted.failed,
            skipped: self.counted.skipped + skipped,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_of_all_binaries_are_added() {
        let mut summary = Summary::default();
        for line in [
            "test a ... ok",
            "skipped: no permission to create a TAP",
            "test result: ok. 3 passed; 0 failed; 1 ignored; 0 measured; 2 filtered out; finished in 0.00s",
            "test result: FAILED. 0 passed; 1 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.10s",
        ] {
            summary.take(line);
        }
        assert_eq!(
            summary.tally(),
            Tally {
                passed: 2,
                failed: 1,
                skipped: 2
            }
        );
    }

    fn counted(script: &str, limit: Duration) -> Tally {
        let mut command = Command::new("sh");
        count(command.args(["-c", script]), false, limit).unwrap()
    }

    #[test]
    fn test_program_that_dies_is_a_failure() {
        let script = "echo 'test result: ok. 2 passed; 0 failed; 0 ignored'
            echo 'test a: skipped: no device' >&2; exit 101";
        assert_eq!(
            counted(script, Duration::from_secs(60)).to_string(),
            "1 passed, 1 failed, 1 skipped"
        );
    }

    #[test]
    fn tests_that_do_not_end_are_a_failure() {
        let start = Instant::now();
        let script = "echo 'test result: ok. 2 passed; 0 failed; 0 ignored'; sleep 64 & sleep 64";
        assert_eq!(
            counted(script, Duration::from_millis(500)).to_string(),
            "2 passed, 1 failed, 0 skipped"
        );
        assert!(start.elapsed() < Duration::from_secs(30));
    }

    #[test]
    fn failures_are_shown_and_passes_are_not() {
        let mut summary = Summary::default();
        assert!(!summary.take("test a ... ok"));
        assert!(summary.take("test c ... ignored, needs a terminal"));
        assert!(summary.take("test b ... FAILED"));
        assert!(summary.take("failures:"));
        assert!(summary.take("thread panicked at"));
    }
}

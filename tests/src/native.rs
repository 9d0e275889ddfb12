//! The checks and tests that need no lab: cargo's own.

use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};
use std::thread;

use crate::command::describe;
use crate::error::{Doing, LabError, Result};
use crate::programs::cargo;
use crate::protocol::Tally;

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
    let status = command.status().doing(|| format!("run `{line}`"))?;
    if status.success() {
        Ok(())
    } else {
        Err(LabError::Command {
            command: line,
            status,
            output: String::new(),
        })
    }
}

/// Runs all native tests of the workspace and counts them. A test that writes a line `skipped: why`, or past the capture of its
/// output `test NAME: skipped: why`, counts as skipped.
///
/// # Errors
/// Fails if cargo cannot be run, or the tests do not compile.
pub fn test(verbose: bool) -> Result<Tally> {
    let mut command = cargo();
    command.args(["test", "--workspace", "--no-fail-fast", "--quiet", "--"]);
    command.args(["--show-output", "--format=pretty"]);
    let line = describe(&command);
    eprintln!("lab: cargo test --workspace");
    let mut child = command
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .doing(|| format!("run `{line}`"))?;
    let mut summary = Summary::default();
    let past_capture = child.stderr.take().map(|stderr| {
        thread::spawn(move || {
            let mut skipped = 0;
            for text in BufReader::new(stderr).lines().map_while(|line| line.ok()) {
                skipped += u64::from(text.contains(": skipped: "));
                eprintln!("{text}");
            }
            skipped
        })
    });
    if let Some(stdout) = child.stdout.take() {
        for text in BufReader::new(stdout).lines() {
            let text = text.doing(|| format!("read what `{line}` writes"))?;
            let shown = summary.take(&text);
            if verbose || shown {
                println!("{text}");
            }
        }
    }
    let status = child.wait().doing(|| format!("wait for `{line}`"))?;
    summary.skipped += past_capture
        .and_then(|thread| thread.join().ok())
        .unwrap_or_default();
    let tally = summary.tally();
    if !status.success() && tally.failed == 0 {
        return Err(LabError::Command {
            command: line,
            status,
            output: String::new(),
        });
    }
    Ok(tally)
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

//! What the lab program on the machine and the one beside KVM (in the lab VM, or a child process) say to each other: one JSON
//! object per line, requests one way and events the other.

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use crate::site::Effort;

/// Asked of the side where KVM is. It answers each with events, the last of them [`Event::Done`].
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "kebab-case")]
pub enum Request {
    /// Run a shell command.
    Shell {
        /// What `sh -c` gets.
        command: String,
    },
    /// Run a test of the suite.
    Test {
        /// Its name.
        name: String,
        /// How much is done by tests that do the same again and again.
        effort: Effort,
    },
    /// Run the demonstration.
    Demo,
    /// Do one half of the power cut.
    PowerCut {
        /// Which.
        half: Half,
    },
}

/// What is done before and after the power of the lab VM is cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Half {
    /// A guest writes until the power fails, and says what has reached its disks.
    Write,
    /// What has reached them is looked for.
    Read,
}

impl Half {
    /// As the command line has it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Write => "write",
            Self::Read => "read",
        }
    }
}

/// Told by the side where KVM is.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
pub enum Event {
    /// It takes requests now.
    Ready,
    /// Something to show.
    Output {
        /// The text, with its line ends.
        text: String,
    },
    /// A test ended.
    Ended {
        /// Its name.
        name: String,
        /// How.
        outcome: Outcome,
        /// How long it took.
        seconds: f64,
        /// Why it was skipped, or what shows the failure: message and log tails.
        detail: String,
    },
    /// A request is done.
    Done {
        /// 0, or an exit status that says what failed.
        status: i32,
    },
}

/// How a test ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    /// All it checks holds.
    Passed,
    /// Something it checks does not hold, or it did not end in time.
    Failed,
    /// It cannot run here.
    Skipped,
}

/// Counts of test outcomes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Tally {
    /// Tests that passed.
    pub passed: u64,
    /// Tests that failed.
    pub failed: u64,
    /// Tests that could not run.
    pub skipped: u64,
}

impl Tally {
    /// Counts one test.
    pub fn count(&mut self, outcome: Outcome) {
        match outcome {
            Outcome::Passed => self.passed += 1,
            Outcome::Failed => self.failed += 1,
            Outcome::Skipped => self.skipped += 1,
        }
    }

    /// Adds another's counts.
    pub fn add(&mut self, other: Tally) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.skipped += other.skipped;
    }
}

impl std::fmt::Display for Tally {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{} passed, {} failed, {} skipped",
            self.passed, self.failed, self.skipped
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_survive_the_wire() {
        let event = Event::Ended {
            name: "a".into(),
            outcome: Outcome::Skipped,
            seconds: 1.5,
            detail: "two\nlines".into(),
        };
        let line = serde_json::to_string(&event).unwrap();
        assert!(!line.contains('\n'));
        let Event::Ended {
            outcome, detail, ..
        } = serde_json::from_str(&line).unwrap()
        else {
            panic!("{line}");
        };
        assert_eq!((outcome, detail.as_str()), (Outcome::Skipped, "two\nlines"));
    }

    #[test]
    fn tally_reads_as_the_last_line() {
        let mut tally = Tally::default();
        tally.count(Outcome::Passed);
        tally.count(Outcome::Failed);
        tally.add(Tally {
            passed: 1,
            failed: 0,
            skipped: 4,
        });
        assert_eq!(tally.to_string(), "2 passed, 1 failed, 4 skipped");
    }
}

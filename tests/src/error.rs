//! What can go wrong in the lab, as the person who ran it is to read it.

use std::io;
use std::process::ExitStatus;
use std::time::Duration;

use thiserror::Error;

/// Result of everything in the lab that can fail.
pub type Result<T, E = LabError> = std::result::Result<T, E>;

/// A failure of the lab, of a test, or of what a test runs.
#[derive(Debug, Error)]
pub enum LabError {
    /// Cannot {doing}
    #[error("cannot {doing}: {source}")]
    Io {
        /// What was being done, as it follows "cannot".
        doing: String,
        /// Why it failed.
        source: io::Error,
    },
    /// A program ended with an error
    #[error("`{command}` ended with {status}{}", tail(.output))]
    Command {
        /// The command line.
        command: String,
        /// How it ended.
        status: ExitStatus,
        /// The end of what it wrote.
        output: String,
    },
    /// Something did not happen in time
    #[error("{what} did not happen within {} s{}", .limit.as_secs(), tail(.output))]
    TimedOut {
        /// What was waited for.
        what: String,
        /// How long.
        limit: Duration,
        /// The end of the console or log that would have shown it.
        output: String,
    },
    /// Something ended that should have gone on
    #[error("{what}{}", tail(.output))]
    Ended {
        /// What ended, and how.
        what: String,
        /// The end of its console or log.
        output: String,
    },
    /// Messages that do not follow the lab's protocol
    #[error("the lab's {from} sent something unintelligible: {text}")]
    Protocol {
        /// Which side sent it.
        from: &'static str,
        /// What it sent.
        text: String,
    },
    /// A check of a test does not hold
    #[error("{0}")]
    Check(String),
    /// The test cannot run here; this is why
    #[error("skipped: {0}")]
    Skipped(String),
    /// The lab cannot be set up; the text says what to do
    #[error("{0}")]
    Setup(String),
}

/// Puts the last lines of `output` under a message.
fn tail(output: &str) -> String {
    let output = output.trim_end();
    if output.is_empty() {
        return String::new();
    }
    let mut text = String::from("; the last it wrote:");
    for line in last_lines(output, 30) {
        text.push_str("\n    ");
        text.push_str(line);
    }
    text
}

/// The last `count` lines of `text`.
#[must_use]
pub fn last_lines(text: &str, count: usize) -> Vec<&str> {
    let lines: Vec<&str> = text.lines().collect();
    lines
        .iter()
        .skip(lines.len().saturating_sub(count))
        .copied()
        .collect()
}

/// Says what was being done when an I/O error came.
pub trait Doing<T> {
    /// Wraps the error; `doing` follows the word "cannot".
    ///
    /// # Errors
    /// The error of `self`, with its circumstances.
    fn doing(self, doing: impl FnOnce() -> String) -> Result<T>;
}

impl<T, E: Into<io::Error>> Doing<T> for std::result::Result<T, E> {
    fn doing(self, doing: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|error| LabError::Io {
            doing: doing(),
            source: error.into(),
        })
    }
}

/// Ends a test with a message unless the condition holds.
#[macro_export]
macro_rules! ensure {
    ($condition:expr, $($message:tt)+) => {
        let holds: bool = $condition;
        if !holds {
            return Err($crate::error::LabError::Check(format!($($message)+)));
        }
    };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn last_lines_are_the_last() {
        assert_eq!(last_lines("a\nb\nc\n", 2), ["b", "c"]);
        assert_eq!(last_lines("a", 2), ["a"]);
    }

    #[test]
    fn message_ends_with_the_tail() {
        let error = LabError::TimedOut {
            what: "the guest's boot".into(),
            limit: Duration::from_secs(9),
            output: "one\ntwo\n".into(),
        };
        assert_eq!(
            error.to_string(),
            "the guest's boot did not happen within 9 s; the last it wrote:\n    one\n    two"
        );
    }
}

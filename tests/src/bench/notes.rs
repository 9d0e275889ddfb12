//! What every benchmark says besides its figures: where it ran, what was left out, and what failed.

use std::fs;

use crate::error::{LabError, Result};

/// What could not be measured, and why.
#[derive(Debug, Default)]
pub(super) struct Notes {
    /// There is nothing wrong with it.
    pub(super) skipped: Vec<String>,
    /// Measurements that gave an error, and which.
    failed: Vec<String>,
}

impl Notes {
    /// Says why something is not measured; other errors are passed on.
    pub(super) fn skip(&mut self, error: LabError) -> Result<()> {
        match error {
            LabError::Skipped(why) => {
                eprintln!("lab: skipped: {why}");
                self.skipped.push(why);
                Ok(())
            }
            error => Err(error),
        }
    }

    /// What was measured; or notes why not, for the figures that there are have taken long.
    pub(super) fn keep<T>(&mut self, measured: Result<T>) -> Option<T> {
        let kept = measured
            .map(Some)
            .or_else(|error| self.skip(error).map(|()| None));
        kept.unwrap_or_else(|error| {
            self.fail(error.to_string());
            None
        })
    }

    /// Notes a failure.
    pub(super) fn fail(&mut self, what: String) {
        eprintln!("lab: {what}");
        self.failed.push(what);
    }

    /// An error if anything failed.
    pub(super) fn verdict(&self) -> Result<()> {
        if self.failed.is_empty() {
            return Ok(());
        }
        Err(LabError::Check(format!(
            "{} measurements failed:\n{}",
            self.failed.len(),
            self.failed.join("\n")
        )))
    }
}

/// Whether all words of the filter are in the name.
pub(super) fn contains(name: &str, filter: Option<&str>) -> bool {
    filter.is_none_or(|filter| {
        filter
            .split_whitespace()
            .all(|word| name.split_whitespace().any(|part| part.contains(word)))
    })
}

/// The first line of a file, or nothing.
pub(super) fn first_line(path: &str) -> String {
    let text = fs::read_to_string(path).unwrap_or_default();
    text.lines().next().unwrap_or_default().to_owned()
}

/// Model and number of the processors.
pub(super) fn processor() -> String {
    let text = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = text
        .lines()
        .find_map(|line| line.strip_prefix("model name")?.split_once(": "))
        .map_or("unknown processor", |(_, model)| model);
    let count = text
        .lines()
        .filter(|line| line.starts_with("processor"))
        .count();
    format!("{count} × {model}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn filters_are_words() {
        let name = "file randread 4k d32";
        assert!(contains(name, None));
        assert!(contains(name, Some("file d32")));
        assert!(contains(name, Some("rand")));
        assert!(!contains(name, Some("file d1 null")));
    }

    #[test]
    fn what_failed_is_told_in_the_end_and_what_was_skipped_is_not() {
        let mut notes = Notes::default();
        assert_eq!(notes.keep(Ok(1)), Some(1));
        assert_eq!(notes.keep::<()>(Err(LabError::Skipped("why".into()))), None);
        assert!(notes.verdict().is_ok());
        assert_eq!(notes.keep::<()>(Err(LabError::Check("that".into()))), None);
        assert!(notes.verdict().unwrap_err().to_string().contains("that"));
    }
}

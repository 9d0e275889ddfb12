//! `ringside-ctl`, for the control sockets of the programs under test.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::Value;

use crate::command;
use crate::error::{LabError, Result};
use crate::site::Site;

/// How long an answer may take, on plain hardware.
const LIMIT: Duration = Duration::from_secs(10);

/// The control socket of a program.
#[derive(Debug)]
pub struct Control<'a> {
    site: &'a Site,
    socket: PathBuf,
}

impl<'a> Control<'a> {
    /// One of this name, in the test's directory.
    #[must_use]
    pub fn new(site: &'a Site, name: &str) -> Self {
        Self {
            site,
            socket: site.scratch.join(name),
        }
    }

    /// Its path.
    #[must_use]
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Asks for something with these words of `ringside-ctl`; gives what it prints.
    ///
    /// # Errors
    /// Fails if it is refused.
    pub fn ask(&self, words: &[&str]) -> Result<String> {
        let mut ctl = self.site.program("ringside-ctl");
        ctl.arg("--socket").arg(&self.socket).args(words);
        command::run(&mut ctl, self.site.limit(LIMIT))
    }

    /// The same, as JSON.
    ///
    /// # Errors
    /// Fails if it is refused.
    pub fn ask_json(&self, words: &[&str]) -> Result<Value> {
        let text = self.ask(&[&["--json"], words].concat())?;
        serde_json::from_str(&text).map_err(|_| LabError::Protocol {
            from: "ringside-ctl",
            text,
        })
    }
}

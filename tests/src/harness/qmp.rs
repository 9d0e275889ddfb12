//! QEMU's control socket (QMP).

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::error::{Doing, LabError, Result};

/// How often a migration is looked at.
const INTERVAL: Duration = Duration::from_millis(200);

/// A connection that takes commands.
#[derive(Debug)]
pub struct Qmp {
    output: UnixStream,
    input: BufReader<UnixStream>,
}

impl Qmp {
    /// Connects; no command may take longer than `limit`.
    ///
    /// # Errors
    /// Fails if nobody listens, or QEMU does not answer.
    pub fn connect(socket: &Path, limit: Duration) -> Result<Self> {
        let doing = || format!("connect to QEMU at {}", socket.display());
        let output = UnixStream::connect(socket).doing(doing)?;
        output.set_read_timeout(Some(limit)).doing(doing)?;
        let input = BufReader::new(output.try_clone().doing(doing)?);
        let mut qmp = Self { output, input };
        // Its greeting comes first.
        qmp.read()?;
        qmp.execute("qmp_capabilities", &json!({}))?;
        Ok(qmp)
    }

    fn read(&mut self) -> Result<Value> {
        let mut line = String::new();
        self.input
            .read_line(&mut line)
            .doing(|| "read from QEMU".into())?;
        serde_json::from_str(&line).map_err(|_| LabError::Protocol {
            from: "QEMU",
            text: line,
        })
    }

    /// Executes a command, and gives what it returns.
    ///
    /// # Errors
    /// Fails if QEMU refuses it.
    pub fn execute(&mut self, command: &str, arguments: &Value) -> Result<Value> {
        let line = json!({ "execute": command, "arguments": arguments });
        writeln!(self.output, "{line}").doing(|| format!("send `{command}` to QEMU"))?;
        loop {
            let answer = self.read()?;
            if let Some(value) = answer.get("return") {
                return Ok(value.clone());
            }
            if answer.get("error").is_some() {
                return Err(LabError::Protocol {
                    from: "QEMU",
                    text: format!("{command}: {answer}"),
                });
            }
            // An event.
        }
    }

    /// Migrates the guest to the QEMU that listens at `socket`, and gives what QEMU tells of it in the end.
    ///
    /// # Errors
    /// Fails if it does not come to a good end in time.
    pub fn migrate(&mut self, socket: &str, limit: Duration) -> Result<Value> {
        // In a machine that is emulated memory is slow to copy.
        let patience = json!({ "downtime-limit": 5000, "max-bandwidth": 4_u64 << 30 });
        self.execute("migrate-set-parameters", &patience)?;
        self.execute("migrate", &json!({ "uri": format!("unix:{socket}") }))?;
        let start = Instant::now();
        loop {
            let state = self.execute("query-migrate", &json!({}))?;
            match state.get("status").and_then(Value::as_str) {
                Some("completed") => return Ok(state),
                Some("failed" | "cancelled") => {
                    return Err(LabError::Protocol {
                        from: "QEMU",
                        text: state.to_string(),
                    });
                }
                _ if start.elapsed() > limit => {
                    return Err(LabError::TimedOut {
                        what: "the end of the migration".into(),
                        limit,
                        output: state.to_string(),
                    });
                }
                _ => thread::sleep(INTERVAL),
            }
        }
    }
}

//! The connection to the side where KVM is: a process whose standard input takes requests and whose standard output gives
//! events. It is QEMU with the lab VM, or `lab inside` on this machine.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::thread;
use std::time::Duration;

use crate::command::{self, describe};
use crate::error::{Doing, LabError, Result, last_lines};
use crate::protocol::{Event, Request};

/// A running other side. It is ended when this goes.
#[derive(Debug)]
pub struct Link {
    child: Child,
    requests: Option<ChildStdin>,
    events: Receiver<std::result::Result<Event, String>>,
    /// Files that show what happened when it ends unexpectedly.
    logs: Vec<PathBuf>,
    what: &'static str,
}

impl Link {
    /// Starts the other side and waits until it is ready.
    ///
    /// # Errors
    /// Fails if it cannot be started, or is not ready at the limit.
    pub fn start(
        what: &'static str,
        mut command: Command,
        stderr: &Path,
        other_logs: &[PathBuf],
        limit: Duration,
    ) -> Result<Self> {
        let errors = fs::File::create(stderr).doing(|| format!("create {}", stderr.display()))?;
        let line = describe(&command);
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(errors)
            .spawn()
            .doing(|| format!("run `{line}`"))?;
        let (sender, events) = mpsc::channel();
        if let Some(stdout) = child.stdout.take() {
            thread::spawn(move || read_events(stdout, &sender));
        }
        let requests = child.stdin.take();
        let mut logs = vec![stderr.to_owned()];
        logs.extend_from_slice(other_logs);
        let mut link = Self {
            child,
            requests,
            events,
            logs,
            what,
        };
        match link.next(limit)? {
            Event::Ready => Ok(link),
            other => Err(LabError::Protocol {
                from: what,
                text: format!("{other:?}"),
            }),
        }
    }

    /// Sends a request and gives each event of the answer to `show`; returns the status it ended with.
    ///
    /// # Errors
    /// Fails if the other side ends, or says nothing for as long as the limit.
    pub fn request(
        &mut self,
        request: &Request,
        silence_limit: Duration,
        mut show: impl FnMut(&Event),
    ) -> Result<i32> {
        let status = self.request_until(request, silence_limit, |event| {
            show(event);
            ControlFlow::Continue(())
        })?;
        // Nothing breaks it off.
        Ok(status.unwrap_or_default())
    }

    /// As [`Link::request`], until `watch` breaks it off: then there is no status, and nothing more can be asked.
    ///
    /// # Errors
    /// As [`Link::request`].
    pub fn request_until(
        &mut self,
        request: &Request,
        silence_limit: Duration,
        mut watch: impl FnMut(&Event) -> ControlFlow<()>,
    ) -> Result<Option<i32>> {
        let mut line = serde_json::to_string(request).map_err(|error| LabError::Protocol {
            from: "host",
            text: error.to_string(),
        })?;
        line.push('\n');
        if let Some(requests) = &mut self.requests
            && requests.write_all(line.as_bytes()).is_err()
        {
            return Err(self.ended());
        }
        loop {
            let event = self.next(silence_limit)?;
            if let Event::Done { status } = event {
                return Ok(Some(status));
            }
            if watch(&event).is_break() {
                return Ok(None);
            }
        }
    }

    /// Ends the other side by SIGKILL, in the middle of whatever it does; nothing more can be asked.
    ///
    /// # Errors
    /// Fails if the kernel does not let it.
    pub fn cut(&mut self) -> Result<()> {
        let doing = || format!("kill the {}", self.what);
        self.child.kill().doing(doing)?;
        self.child.wait().doing(doing).map(drop)
    }

    fn next(&mut self, limit: Duration) -> Result<Event> {
        match self.events.recv_timeout(limit) {
            Ok(Ok(event)) => Ok(event),
            Ok(Err(text)) => Err(LabError::Protocol {
                from: self.what,
                text,
            }),
            Err(RecvTimeoutError::Timeout) => Err(LabError::TimedOut {
                what: format!("an answer of the {}", self.what),
                limit,
                output: self.log_tails(),
            }),
            Err(RecvTimeoutError::Disconnected) => Err(self.ended()),
        }
    }

    fn ended(&mut self) -> LabError {
        let how = match command::wait_for(&mut self.child, Duration::from_secs(1)) {
            Ok(Some(status)) => format!("ended unexpectedly ({status})"),
            _ => "closed its connection".into(),
        };
        LabError::Ended {
            what: format!("the {} {how}", self.what),
            output: self.log_tails(),
        }
    }

    fn log_tails(&self) -> String {
        let mut text = String::new();
        for log in &self.logs {
            let content = fs::read(log).unwrap_or_default();
            for line in last_lines(&String::from_utf8_lossy(&content), 25) {
                text.push_str(line);
                text.push('\n');
            }
        }
        text
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        // The end of its input tells the other side to end; an emulated machine gets a moment for that.
        drop(self.requests.take());
        if !matches!(
            command::wait_for(&mut self.child, Duration::from_secs(5)),
            Ok(Some(_))
        ) {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

fn read_events(stream: impl Read, sender: &mpsc::Sender<std::result::Result<Event, String>>) {
    for line in BufReader::new(stream).split(b'\n') {
        let Ok(line) = line else { return };
        if line.is_empty() {
            continue;
        }
        let event =
            serde_json::from_slice(&line).map_err(|_| String::from_utf8_lossy(&line).into_owned());
        if sender.send(event).is_err() {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn start(script: &str, log: &Path) -> Result<Link> {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        Link::start("test side", command, log, &[], Duration::from_secs(10))
    }

    #[test]
    fn request_shows_events_until_done() {
        let directory = tempfile::tempdir().unwrap();
        let script = r#"echo '{"event":"ready"}'; read request
            echo '{"event":"output","text":"hi"}'; echo '{"event":"done","status":3}'"#;
        let mut link = start(script, &directory.path().join("log")).unwrap();
        let mut shown = 0;
        let status = link
            .request(&Request::Demo, Duration::from_secs(10), |_| shown += 1)
            .unwrap();
        assert_eq!((status, shown), (3, 1));
    }

    #[test]
    fn end_of_the_other_side_shows_its_log() {
        let directory = tempfile::tempdir().unwrap();
        let error = start("echo no such device >&2", &directory.path().join("log")).unwrap_err();
        assert!(error.to_string().contains("no such device"), "{error}");
    }

    #[test]
    fn silence_is_a_time_out() {
        let directory = tempfile::tempdir().unwrap();
        let mut link = start(
            "echo '{\"event\":\"ready\"}'; exec sleep 9",
            &directory.path().join("log"),
        )
        .unwrap();
        let error = link
            .request(&Request::Demo, Duration::from_millis(20), |_| ())
            .unwrap_err();
        assert!(matches!(error, LabError::TimedOut { .. }), "{error}");
        let _ = link.child.kill();
    }
}

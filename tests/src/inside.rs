//! The side where KVM is: takes requests, runs them, tells events.

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};

use crate::command::describe;
use crate::error::{Doing, LabError, Result};
use crate::protocol::{Event, Request};
use crate::site::Site;
use crate::suite;

/// Where events go; shared by the threads that tell them.
#[derive(Clone)]
pub struct Events(Arc<Mutex<Box<dyn Write + Send>>>);

impl Events {
    /// Tells an event.
    ///
    /// # Errors
    /// Fails if the other side is gone.
    pub fn tell(&self, event: &Event) -> Result<()> {
        let mut line = serde_json::to_string(event).map_err(|error| LabError::Protocol {
            from: "inside",
            text: error.to_string(),
        })?;
        line.push('\n');
        let mut out = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        out.write_all(line.as_bytes())
            .and_then(|()| out.flush())
            .doing(|| "tell the lab program what happens".into())
    }
}

/// Serves requests on a character device, both ways.
///
/// # Errors
/// As [`serve`].
pub fn serve_port(port: &std::path::Path, site: &Site) -> Result<()> {
    let opening = || format!("open {}", port.display());
    let input = File::options()
        .read(true)
        .write(true)
        .open(port)
        .doing(opening)?;
    let output = input.try_clone().doing(opening)?;
    serve(input, Box::new(output), site)
}

/// Serves requests until there are no more.
///
/// # Errors
/// Fails if the other side goes while a request runs, or speaks another protocol.
pub fn serve(input: impl Read, output: Box<dyn Write + Send>, site: &Site) -> Result<()> {
    let events = Events(Arc::new(Mutex::new(output)));
    events.tell(&Event::Ready)?;
    for line in BufReader::new(input).lines() {
        let line = line.doing(|| "read a request".into())?;
        let request: Request = serde_json::from_str(&line).map_err(|_| LabError::Protocol {
            from: "host",
            text: line.clone(),
        })?;
        let status = match request {
            Request::Shell { command } => stream(
                Command::new("sh")
                    .args(["-c", &command])
                    .current_dir(&site.scratch),
                &events,
            )?,
            Request::Suite { filters } => suite::run(site, &filters, &events)?,
            Request::Demo => stream(
                &mut suite::isolated(site, &site.scratch, &["run-demo"])?,
                &events,
            )?,
        };
        events.tell(&Event::Done { status })?;
    }
    Ok(())
}

/// Runs a program and passes on what it writes as it comes; gives its exit status.
fn stream(command: &mut Command, events: &Events) -> Result<i32> {
    let line = describe(command);
    let running = || format!("run `{line}`");
    let (mut reader, writer) = std::io::pipe().doing(running)?;
    let errors = writer.try_clone().doing(running)?;
    command.stdin(Stdio::null()).stdout(writer).stderr(errors);
    let mut child = command.spawn().doing(running)?;
    // The command keeps the pipe's other end open, and the reader would never see its end.
    command.stdout(Stdio::null()).stderr(Stdio::null());
    let mut buffer = [0; 4096];
    loop {
        let count = reader.read(&mut buffer).doing(running)?;
        if count == 0 {
            break;
        }
        let text = String::from_utf8_lossy(buffer.get(..count).unwrap_or_default()).into_owned();
        events.tell(&Event::Output { text })?;
    }
    let status = child.wait().doing(running)?;
    Ok(status.code().unwrap_or(128))
}

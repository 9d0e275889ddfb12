//! The side where KVM is: takes requests, runs them, tells events.

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use crate::command::describe;
use crate::error::{Doing, LabError, Result};
use crate::protocol::{Event, Request};
use crate::site::Site;
use crate::suite;

/// How often the end of a program is looked for.
const POLL: Duration = Duration::from_millis(50);
/// How long, in all, is waited for what a program wrote last.
const AFTERGLOW: Duration = Duration::from_secs(1);
/// How much of what a program writes is passed on at once.
const CHUNK: usize = 4096;
/// What a pipe holds: pipe(7).
const PIPE_SIZE: usize = 65536;

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
            Request::Test { name, effort } => {
                let site = Site {
                    effort,
                    ..site.clone()
                };
                suite::run(&site, &name, &events)?
            }
            Request::Demo => stream(
                &mut suite::isolated(site, &site.scratch, &["run-demo"])?,
                &events,
            )?,
            Request::PowerCut { half } => stream(
                &mut suite::isolated(site, &site.scratch, &["run-power-cut", half.name()])?,
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
    let (sender, chunks) = mpsc::sync_channel(0);
    thread::spawn(move || {
        let mut buffer = [0; CHUNK];
        // It ends with the last writer, or when nobody takes what it has read.
        while let Ok(count @ 1..) = reader.read(&mut buffer) {
            let chunk = buffer.get(..count).unwrap_or_default().to_vec();
            if sender.send(chunk).is_err() {
                return;
            }
        }
    });
    let mut unfinished = Vec::new();
    // What the program leaves behind may hold the pipe open, and write, for ever. After the program's end there is as much to
    // come from itself as the pipe and the reader hold, and it comes without being waited for.
    let mut left = PIPE_SIZE + CHUNK;
    let mut patience = AFTERGLOW;
    let mut ended = false;
    while left > 0 && !patience.is_zero() {
        ended = ended || child.try_wait().doing(running)?.is_some();
        let start = Instant::now();
        let next = chunks.recv_timeout(if ended { patience } else { POLL });
        if ended {
            patience = patience.saturating_sub(start.elapsed());
        }
        match next {
            Ok(chunk) => {
                unfinished.extend_from_slice(&chunk);
                let text = take_text(&mut unfinished);
                if !text.is_empty() {
                    events.tell(&Event::Output { text })?;
                }
                if ended {
                    left = left.saturating_sub(chunk.len());
                }
            }
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => break,
        }
    }
    if !unfinished.is_empty() {
        let text = String::from_utf8_lossy(&unfinished).into_owned();
        events.tell(&Event::Output { text })?;
    }
    let status = child.wait().doing(running)?;
    // As a shell gives it.
    let by_signal = || 128 + status.signal().unwrap_or_default();
    Ok(status.code().unwrap_or_else(by_signal))
}

/// Takes the text at the start of some bytes, and leaves a character that has not come to its end yet.
fn take_text(bytes: &mut Vec<u8>) -> String {
    let complete = match bytes.utf8_chunks().last() {
        // What may still become a character is at most three bytes at the end.
        Some(last) => match std::str::from_utf8(last.invalid()) {
            Err(error) if error.error_len().is_none() => bytes.len() - last.invalid().len(),
            _ => bytes.len(),
        },
        None => 0,
    };
    let rest = bytes.split_off(complete);
    let text = String::from_utf8_lossy(bytes).into_owned();
    *bytes = rest;
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn characters_are_not_cut() {
        let mut bytes = "aé€".as_bytes().to_vec();
        let end = bytes.pop().unwrap();
        assert_eq!(take_text(&mut bytes), "aé");
        bytes.push(end);
        assert_eq!(take_text(&mut bytes), "€");
        assert!(bytes.is_empty());
    }

    #[test]
    fn bytes_that_are_no_text_do_not_wait() {
        let mut bytes = b"a\xffb\xff".to_vec();
        assert_eq!(take_text(&mut bytes), "a\u{fffd}b\u{fffd}");
        assert!(bytes.is_empty());
    }

    /// Status and output of a shell command.
    fn streamed(script: &str) -> (i32, String) {
        let (mut reader, writer) = std::io::pipe().unwrap();
        let events = Events(Arc::new(Mutex::new(Box::new(writer))));
        let told = thread::spawn(move || {
            let mut text = String::new();
            reader.read_to_string(&mut text).unwrap();
            text
        });
        let status = stream(Command::new("sh").args(["-c", script]), &events).unwrap();
        drop(events);
        (status, told.join().unwrap())
    }

    #[test]
    fn status_and_output_are_passed_on() {
        let (status, told) = streamed("echo hi; exit 3");
        assert_eq!(status, 3);
        assert!(told.contains("hi"), "{told}");
        assert_eq!(streamed("kill -9 $$").0, 137);
    }

    #[test]
    fn background_job_does_not_hold_the_command_up() {
        let start = Instant::now();
        let (status, told) = streamed("sleep 20 & echo hi");
        assert_eq!(status, 0);
        assert!(told.contains("hi"), "{told}");
        // Nor does one that goes on to write, be it fast or slowly.
        assert_eq!(streamed("while echo y; do :; done & exit 3").0, 3);
        assert_eq!(streamed("while echo y; do sleep 0.1; done & exit 3").0, 3);
        assert!(start.elapsed() < Duration::from_secs(15));
    }
}

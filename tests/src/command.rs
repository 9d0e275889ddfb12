//! Programs that are run to their end within a time limit.

use std::ffi::OsStr;
use std::io::{Read, Write};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use crate::error::{Doing, LabError, Result};

/// How often the end of a process is looked for.
const POLL: Duration = Duration::from_millis(10);

/// What a program wrote, and how it ended.
#[derive(Debug, Clone)]
pub struct Output {
    /// How it ended.
    pub status: ExitStatus,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

/// The command line, for messages.
#[must_use]
pub fn describe(command: &Command) -> String {
    let mut text = command.get_program().to_string_lossy().into_owned();
    for argument in command.get_args() {
        text.push(' ');
        text.push_str(&argument.to_string_lossy());
    }
    text
}

/// A command that runs a program which the kernel kills when the thread that starts it is gone, whatever ended that.
///
/// Some programs outlive their parent otherwise: `unshare --fork` ignores the signals of a terminal while it waits, and the
/// first process of a process namespace ignores all it has no handler for.
#[must_use]
pub fn bound(program: impl AsRef<OsStr>) -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", "--"]).arg(program);
    command
}

/// Waits for a process until the limit; `None` when it is still running then.
///
/// # Errors
/// Fails if the process cannot be waited for.
pub fn wait_for(child: &mut Child, limit: Duration) -> Result<Option<ExitStatus>> {
    let deadline = Instant::now() + limit;
    loop {
        if let Some(status) = child.try_wait().doing(|| "wait for a process".into())? {
            return Ok(Some(status));
        }
        if Instant::now() >= deadline {
            return Ok(None);
        }
        thread::sleep(POLL);
    }
}

/// Reads a stream to its end in a thread of its own.
fn read_all(mut stream: impl Read + Send + 'static) -> thread::JoinHandle<String> {
    thread::spawn(move || {
        let mut bytes = Vec::new();
        // What came before an error is still worth showing.
        let _ = stream.read_to_end(&mut bytes);
        String::from_utf8_lossy(&bytes).into_owned()
    })
}

/// Runs a program with the given standard input, to its end, whatever its exit status.
///
/// # Errors
/// Fails if it cannot be started, or is still running at the limit (it is then killed).
pub fn output_with_input(command: &mut Command, input: &[u8], limit: Duration) -> Result<Output> {
    let name = describe(command);
    command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut child = command.spawn().doing(|| format!("run `{name}`"))?;
    if let Some(mut stdin) = child.stdin.take() {
        // A program that does not want all its input may close it early.
        let _ = stdin.write_all(input);
    }
    let stdout = child.stdout.take().map(read_all);
    let stderr = child.stderr.take().map(read_all);
    let status = wait_for(&mut child, limit)?;
    if status.is_none() {
        let _ = child.kill();
        let _ = child.wait();
    }
    let collect = |reader: Option<thread::JoinHandle<String>>| {
        reader
            .and_then(|reader| reader.join().ok())
            .unwrap_or_default()
    };
    let Some(status) = status else {
        // Grandchildren may hold the pipes open; the text is not worth waiting for.
        return Err(LabError::TimedOut {
            what: format!("the end of `{name}`"),
            limit,
            output: String::new(),
        });
    };
    Ok(Output {
        status,
        stdout: collect(stdout),
        stderr: collect(stderr),
    })
}

/// Runs a program to its end, whatever its exit status.
///
/// # Errors
/// As [`output_with_input`].
pub fn output(command: &mut Command, limit: Duration) -> Result<Output> {
    output_with_input(command, &[], limit)
}

/// Runs a program that has to succeed; gives its standard output.
///
/// # Errors
/// As [`output`], and if the exit status is not 0.
pub fn run(command: &mut Command, limit: Duration) -> Result<String> {
    let output = output(command, limit)?;
    if !output.status.success() {
        return Err(LabError::Command {
            command: describe(command),
            status: output.status,
            output: format!("{}{}", output.stdout, output.stderr),
        });
    }
    Ok(output.stdout)
}

/// Runs a short command given as words separated by blanks (no quoting), as [`run`].
///
/// # Errors
/// As [`run`].
pub fn run_line(line: &str) -> Result<String> {
    let mut words = line.split_whitespace();
    let program = words.next().unwrap_or_default();
    run(Command::new(program).args(words), Duration::from_secs(60))
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt;

    use super::*;

    #[test]
    fn output_has_both_streams_and_the_status() {
        let mut command = Command::new("sh");
        command.args(["-c", "cat; echo err >&2; exit 3"]);
        let output = output_with_input(&mut command, b"in", Duration::from_secs(10)).unwrap();
        assert_eq!(output.status.code(), Some(3));
        assert_eq!(
            (output.stdout.as_str(), output.stderr.as_str()),
            ("in", "err\n")
        );
    }

    #[test]
    fn run_shows_the_output_of_a_failed_command() {
        let mut command = Command::new("sh");
        command.args(["-c", "echo because; exit 1"]);
        let error = run(&mut command, Duration::from_secs(10)).unwrap_err();
        assert!(error.to_string().contains("because"), "{error}");
    }

    #[test]
    fn bound_program_dies_with_the_thread_that_started_it() {
        let starter = thread::spawn(|| {
            let mut command = bound("sh");
            command.args(["-c", "echo up; exec sleep 60"]);
            let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
            // Before that the signal may not be asked for yet.
            child
                .stdout
                .as_mut()
                .unwrap()
                .read_exact(&mut [0; 3])
                .unwrap();
            child
        });
        let mut child = starter.join().unwrap();
        let status = wait_for(&mut child, Duration::from_secs(30)).unwrap();
        assert_eq!(status.and_then(|status| status.signal()), Some(9));
    }

    #[test]
    fn run_ends_at_the_limit() {
        let error = run(Command::new("sleep").arg("60"), Duration::from_millis(50)).unwrap_err();
        assert!(matches!(error, LabError::TimedOut { .. }), "{error}");
    }
}

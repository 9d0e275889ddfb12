//! Programs that are run to their end within a time limit.

use std::ffi::OsStr;
use std::fs;
use std::io::{Read, Write};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::error::{Doing, LabError, Result};

/// How often the end of a process is looked for.
const POLL: Duration = Duration::from_millis(10);
/// How long a process that is told to end may take for it.
pub const GRACE: Duration = Duration::from_secs(5);

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

/// A text as one word of a shell command.
#[must_use]
pub fn quoted(text: &str) -> String {
    format!("'{}'", text.replace('\'', r"'\''"))
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

/// User and group of tests that are to need no privilege: some number, of which the system knows nothing.
pub const ORDINARY_USER: u32 = 1000;

/// The same command, run by a user who is not root and has no capability.
#[must_use]
pub fn as_ordinary_user(command: &Command) -> Command {
    let mut changing = Command::new("setpriv");
    changing
        .arg(format!("--reuid={ORDINARY_USER}"))
        .arg(format!("--regid={ORDINARY_USER}"))
        .args(["--clear-groups", "--inh-caps=-all", "--no-new-privs", "--"])
        .arg(command.get_program())
        .args(command.get_args());
    changing
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

/// A process, told from a later one of the same number by when it started.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Process {
    pid: i32,
    started: u64,
}

/// The process and its parent's number, from a line of `/proc/PID/stat` (proc_pid_stat(5)); `None` for one that has ended.
fn parse_stat(stat: &str) -> Option<(Process, i32)> {
    let (pid, _) = stat.split_once(' ')?;
    // The name, in brackets, may have blanks and brackets in it.
    let (_, rest) = stat.rsplit_once(") ")?;
    let mut fields = rest.split(' ');
    if matches!(fields.next()?, "Z" | "X") {
        return None;
    }
    let parent = fields.next()?.parse().ok()?;
    // starttime is field 22, the parent is field 4.
    let started = fields.nth(17)?.parse().ok()?;
    let pid = pid.parse().ok()?;
    Some((Process { pid, started }, parent))
}

/// A process and all that descend from it.
fn tree(root: u32) -> Vec<Process> {
    let all: Vec<(Process, i32)> = fs::read_dir("/proc")
        .into_iter()
        .flatten()
        .filter_map(|entry| fs::read_to_string(entry.ok()?.path().join("stat")).ok())
        .filter_map(|stat| parse_stat(&stat))
        .collect();
    let mut found: Vec<Process> = all
        .iter()
        .filter(|(process, _)| u32::try_from(process.pid) == Ok(root))
        .map(|(process, _)| *process)
        .collect();
    let mut next = 0;
    while let Some(parent) = found.get(next).copied() {
        let children = all.iter().filter(|(_, of)| *of == parent.pid);
        found.extend(children.map(|(process, _)| *process));
        next += 1;
    }
    found
}

fn runs(process: &Process) -> bool {
    fs::read_to_string(format!("/proc/{}/stat", process.pid))
        .is_ok_and(|stat| parse_stat(&stat).is_some_and(|(now, _)| now == *process))
}

/// Ends a process and all that descend from it: first by SIGTERM, and what is still there after `grace` by SIGKILL.
///
/// A process group of their own would do that too, but then what is typed at the terminal did not reach them.
pub fn end_tree(child: &mut Child, grace: Duration) {
    let mut processes = tree(child.id());
    let signal_all = |processes: &[Process], signal: Signal| {
        for process in processes.iter().filter(|process| runs(process)) {
            // It may end in this moment.
            let _ = kill(Pid::from_raw(process.pid), signal);
        }
    };
    signal_all(&processes, Signal::SIGTERM);
    let deadline = Instant::now() + grace;
    while Instant::now() < deadline {
        if matches!(child.try_wait(), Ok(Some(_))) && !processes.iter().any(runs) {
            return;
        }
        thread::sleep(POLL);
    }
    if matches!(child.try_wait(), Ok(None)) {
        processes.extend(tree(child.id()));
    }
    signal_all(&processes, Signal::SIGKILL);
    let _ = child.wait();
}

/// Runs a program that has to succeed, on this process's own input and output.
///
/// # Errors
/// Fails if it cannot be started, ends with another status than 0, or is still running at the limit (it is then ended, with
/// all it started).
pub fn succeed(command: &mut Command, limit: Duration) -> Result<()> {
    let line = describe(command);
    let mut child = command.spawn().doing(|| format!("run `{line}`"))?;
    match wait_for(&mut child, limit)? {
        Some(status) if status.success() => Ok(()),
        Some(status) => Err(LabError::Command {
            command: line,
            status,
            output: String::new(),
        }),
        None => {
            end_tree(&mut child, GRACE);
            Err(LabError::TimedOut {
                what: format!("the end of `{line}`"),
                limit,
                output: String::new(),
            })
        }
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
/// Fails if it cannot be started, or is still running at the limit (it is then ended, with all it started).
pub fn output_with_input(command: &mut Command, input: &[u8], limit: Duration) -> Result<Output> {
    let name = describe(command);
    command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut child = command.spawn().doing(|| format!("run `{name}`"))?;
    if let Some(mut stdin) = child.stdin.take()
        && !input.is_empty()
    {
        let input = input.to_owned();
        // Beside the readers: the program may write before it has read all.
        thread::spawn(move || {
            // A program that does not want all its input may close it early.
            let _ = stdin.write_all(&input);
        });
    }
    let stdout = child.stdout.take().map(read_all);
    let stderr = child.stderr.take().map(read_all);
    let status = wait_for(&mut child, limit)?;
    if status.is_none() {
        end_tree(&mut child, GRACE);
    }
    let collect = |reader: Option<thread::JoinHandle<String>>| {
        reader
            .and_then(|reader| reader.join().ok())
            .unwrap_or_default()
    };
    let Some(status) = status else {
        // What left the tree before may hold the pipes open; the text is not worth waiting for.
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
    fn large_input_comes_back() {
        let input = vec![b'x'; 4 << 20];
        let limit = Duration::from_secs(60);
        let output = output_with_input(&mut Command::new("cat"), &input, limit).unwrap();
        assert_eq!(output.stdout.len(), input.len());
    }

    #[test]
    fn run_shows_the_output_of_a_failed_command() {
        let mut command = Command::new("sh");
        command.args(["-c", "echo because; exit 1"]);
        let error = run(&mut command, Duration::from_secs(10)).unwrap_err();
        assert!(error.to_string().contains("because"), "{error}");
    }

    /// Until it has written `up`.
    fn wait_until_up(child: &mut Child) {
        let output = child.stdout.as_mut().unwrap();
        output.read_exact(&mut [0; 3]).unwrap();
    }

    #[test]
    fn bound_program_dies_with_the_thread_that_started_it() {
        let starter = thread::spawn(|| {
            let mut command = bound("sh");
            command.args(["-c", "echo up; exec sleep 60"]);
            let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
            // Before that the signal may not be asked for yet.
            wait_until_up(&mut child);
            child
        });
        let mut child = starter.join().unwrap();
        let status = wait_for(&mut child, Duration::from_secs(30)).unwrap();
        assert_eq!(status.and_then(|status| status.signal()), Some(9));
    }

    #[test]
    fn name_of_a_process_does_not_confuse() {
        let stat = "7 (a) b (c) S 3 7 7 0 -1 4194304 1 0 0 0 0 0 0 0 20 0 1 0 987 5 6";
        let (process, parent) = parse_stat(stat).unwrap();
        assert_eq!((process.pid, process.started, parent), (7, 987, 3));
        assert_eq!(parse_stat(&stat.replace(" S ", " Z ")), None);
    }

    #[test]
    fn tree_ends_by_sigterm_or_sigkill() {
        // The shell ignores SIGTERM, and so does what it starts, but for the last.
        let script = "trap '' TERM; sleep 61 & sh -c 'sleep 62 & wait' & echo up; wait; sleep 63";
        let mut command = Command::new("sh");
        command.args(["-c", script]).stdout(Stdio::piped());
        let mut child = command.spawn().unwrap();
        wait_until_up(&mut child);
        let processes = tree(child.id());
        assert!(processes.len() >= 3, "{processes:?}");
        end_tree(&mut child, Duration::from_millis(100));
        let deadline = Instant::now() + Duration::from_secs(10);
        while processes.iter().any(runs) && Instant::now() < deadline {
            thread::sleep(POLL);
        }
        assert!(!processes.iter().any(runs));
        assert_eq!(child.wait().unwrap().signal(), Some(9));
    }

    #[test]
    fn quoted_is_one_word() {
        assert_eq!(quoted("/a b/it's"), r"'/a b/it'\''s'");
    }

    #[test]
    fn run_ends_at_the_limit() {
        let error = run(Command::new("sleep").arg("60"), Duration::from_millis(50)).unwrap_err();
        assert!(matches!(error, LabError::TimedOut { .. }), "{error}");
    }
}

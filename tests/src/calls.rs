//! Which system calls the programs make when they are confined, over all native tests, beside the lists that they are held to:
//! what no test needs is superfluous, unless the list calls it rare.
//!
//! `cargo test` starts each test program under strace, which writes a file for each thread. A thread counts from the
//! moment when its program has filtered its system calls.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

use nix::libc;
use ringside_sandbox::calls::{Call, GROUPS, REFUSED};

use crate::command::quoted;
use crate::error::{Doing, LabError, Result};
use crate::native;

/// The programs, by the names of their files.
const PROGRAMS: [&str; 3] = ["ringside-blk", "ringside-net", "ringside-vmm"];
/// What has a test in the lab only: it takes a Ceph cluster, or devices to assign.
const LAB: [&str; 2] = ["CEPH", "VFIO"];

/// What came of it.
#[derive(Debug, Default)]
pub struct Found {
    /// Threads of confined programs.
    pub threads: u64,
    /// Calls that are on no list, as strace shows them.
    pub missing: BTreeSet<String>,
    seen: BTreeSet<(i64, String)>,
}

impl Found {
    /// What is on a list, and was not seen: group, and call.
    pub fn superfluous(&self) -> impl Iterator<Item = (&'static str, &'static Call)> {
        let tested = GROUPS.iter().filter(|(name, _)| !LAB.contains(name));
        tested
            .flat_map(|&(name, calls)| calls.iter().map(move |call| (name, call)))
            .filter(|(_, call)| !call.rare && !self.seen.contains(&key(call)))
    }

    fn take(&mut self, number: i64, arguments: &[u64], line: &str) {
        let refused = REFUSED.iter().flat_map(|(_, calls)| *calls);
        let listed = GROUPS.iter().flat_map(|(_, calls)| *calls).chain(refused);
        let mut known = false;
        for call in listed.filter(|c| c.number == number && c.only.holds(arguments)) {
            self.seen.insert(key(call));
            known = true;
        }
        // A disk's own ioctls are with the disk.
        if !known && number != libc::SYS_ioctl {
            self.missing.insert(line.to_owned());
        }
    }
}

fn key(call: &Call) -> (i64, String) {
    (call.number, format!("{:?}", call.only))
}

/// Traces the native tests of the back-ends and the VMM.
///
/// # Errors
/// Fails if there is no strace, cargo cannot be run, or a trace cannot be read.
pub fn find() -> Result<Found> {
    let version = Command::new("strace").arg("--version").output();
    version.doing(|| "run strace, which this needs".into())?;
    let directory = tempfile::tempdir().doing(|| "make a directory for traces".into())?;
    let traces = directory.path().join("traces");
    let runner = directory.path().join("runner");
    // Numbers of threads come again, but hardly in one test program.
    let script = format!(
        "#!/bin/sh\nexec strace -ff -qqq -n -X raw -s 0 -e signal=none -o {}/$$ \"$@\"\n",
        quoted(&traces.display().to_string())
    );
    let executable = fs::Permissions::from_mode(0o700);
    fs::create_dir(&traces)
        .and_then(|()| fs::write(&runner, script))
        .and_then(|()| fs::set_permissions(&runner, executable))
        .doing(|| format!("write to {}", directory.path().display()))?;
    let packages = ["ringside-backends", "ringside-vmm"];
    let tally = native::traced(&packages, &runner)?;
    println!("lab: native tests, traced: {tally}");
    let mut found = Found::default();
    let files = fs::read_dir(&traces).doing(|| "list the traces".into())?;
    for file in files {
        let path = file.doing(|| "list the traces".into())?.path();
        let text = read(&path)?;
        let mut lines = text.lines();
        // Its other threads are found from there.
        if lines.any(|line| started(line).is_some_and(|name| PROGRAMS.contains(&name))) {
            walk(&path, lines, false, &mut found)?;
        }
    }
    if found.threads == 0 {
        return Err(LabError::Setup(
            "no test has run a program that is confined".into(),
        ));
    }
    Ok(found)
}

fn read(path: &Path) -> Result<String> {
    match fs::read(path) {
        Ok(text) => Ok(String::from_utf8_lossy(&text).into_owned()),
        // A thread that was ended before it did anything.
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(String::new()),
        Err(error) => Err(error).doing(|| format!("read {}", path.display())),
    }
}

/// The program that a line starts.
fn started(line: &str) -> Option<&str> {
    let path = line.split_once("] execve(\"")?.1.split('"').next()?;
    line.contains(") = 0")
        .then(|| path.rsplit('/').next().unwrap_or(path))
}

/// Takes what the thread whose trace is at `path` does, and those that it starts.
fn walk<'l>(
    path: &Path,
    lines: impl Iterator<Item = &'l str>,
    mut confined: bool,
    found: &mut Found,
) -> Result<()> {
    found.threads += u64::from(confined);
    for line in lines {
        let Some((number, arguments, result)) = parse(line) else {
            continue;
        };
        if started(line).is_some() {
            // Somebody else's program.
            return Ok(());
        }
        if confined {
            found.take(number, &arguments, line);
        }
        match number {
            // SECCOMP_SET_MODE_FILTER with SECCOMP_FILTER_FLAG_TSYNC (seccomp(2))
            libc::SYS_seccomp if result == Some(0) && arguments.starts_with(&[1, 1]) => {
                found.threads += u64::from(!confined);
                confined = true;
            }
            libc::SYS_clone | libc::SYS_clone3 | libc::SYS_fork | libc::SYS_vfork => {
                if let Some(thread @ 1..) = result {
                    let path = path.with_extension(thread.to_string());
                    walk(&path, read(&path)?.lines(), confined, found)?;
                }
            }
            _ => {}
        }
    }
    Ok(())
}

/// Number, arguments that are numbers, and result of a line as `[  16] ioctl(5, 0x5421, [1]) = 0`.
fn parse(line: &str) -> Option<(i64, Vec<u64>, Option<u64>)> {
    let (number, rest) = line.strip_prefix('[')?.split_once(']')?;
    let (call, result) = rest.rsplit_once(" = ")?;
    let (_, arguments) = call.split_once('(')?;
    let arguments = match arguments.split_once("flags=") {
        // strace begins with the stack of the thread.
        Some((stack, flags)) if stack.starts_with("child_stack=") => flags,
        _ => arguments,
    };
    let arguments = arguments.trim_end().trim_end_matches(')');
    // The end of its thread has cut the call off.
    let cut = arguments.strip_suffix(" <unfinished ...>");
    let arguments = split(cut.unwrap_or(arguments)).into_iter();
    let result = result.split(' ').next().map(value);
    Some((
        number.trim().parse().ok()?,
        arguments.map(|text| value(text).unwrap_or(0)).collect(),
        result.flatten(),
    ))
}

/// Arguments that have commas between them: structures and lists have commas in them, too.
fn split(arguments: &str) -> Vec<&str> {
    let mut depth = 0_u32;
    let between = |letter| {
        match letter {
            '{' | '[' => depth += 1,
            '}' | ']' => depth = depth.saturating_sub(1),
            _ => {}
        }
        letter == ',' && depth == 0
    };
    arguments.split(between).map(str::trim_start).collect()
}

/// A number, or flags beside each other.
fn value(text: &str) -> Option<u64> {
    if let Some((first, more)) = text.split_once('|') {
        return Some(value(first)? | value(more)?);
    }
    match text.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16).ok(),
        None => text.parse().ok(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn traces_are_understood() {
        let line = "[  16] ioctl(5, 0x5421, [1])  = 0";
        assert_eq!(parse(line), Some((16, vec![5, 0x5421, 0], Some(0))));
        let line = "[  56] clone(child_stack=0x7f8e, flags=0x3d0f00, tls=0x7f) = 11154";
        assert_eq!(parse(line), Some((56, vec![0x3d_0f00, 0], Some(11154))));
        let line = "[ 257] openat(-100, \"\"..., 0x80000) = -1 EACCES (Permission denied)";
        assert_eq!(parse(line), Some((257, vec![0, 0, 0x8_0000], None)));
        let line = "[  41] socket(0x2, 0x1|0x80000, 0)      = 13";
        assert_eq!(parse(line), Some((41, vec![2, 0x8_0001, 0], Some(13))));
        let line = "[  46] sendmsg(9, {msg_name=NULL, msg_iov=[{iov_base=\"\"..., iov_len=12}, \
            {iov_base=\"\"..., iov_len=8}], msg_iovlen=2, msg_flags=0}, 0x20004000) = 20";
        assert_eq!(parse(line), Some((46, vec![9, 0, 0x2000_4000], Some(20))));
        let line = "[  72] fcntl(533, 0x1 <unfinished ...>) = ?";
        assert_eq!(parse(line), Some((72, vec![533, 1], None)));
        assert_eq!(parse("+++ exited with 0 +++"), None);
        let line = "[  59] execve(\"/x/ringside-blk\", [...], 0x7f /* 61 vars */) = 0";
        assert_eq!(started(line), Some("ringside-blk"));
    }

    #[test]
    fn what_was_not_seen_is_superfluous() {
        let directory = tempfile::tempdir().unwrap();
        let write = |thread: u32, lines: &[&str]| {
            let path = directory.path().join(format!("7.{thread}"));
            fs::write(path, lines.join("\n")).unwrap();
        };
        write(
            2,
            &[
                "[   0] read(3, \"\"..., 8) = 8",
                "[ 101] ptrace(0) = -1 EPERM",
            ],
        );
        let first = [
            "[ 165] mount(0) = 0",
            "[ 317] seccomp(0x1, 0x1, {len=10, filter=0x5}) = 0",
            "[  56] clone(child_stack=0x7f, flags=0x3d0f00, tls=0x1) = 2",
        ];
        let mut found = Found::default();
        let path = directory.path().join("7.1");
        walk(&path, first.into_iter(), false, &mut found).unwrap();
        assert_eq!(found.threads, 2);
        assert_eq!(found.missing.len(), 1, "{:?}", found.missing);
        let superfluous: Vec<i64> = found.superfluous().map(|(_, call)| call.number).collect();
        assert!(superfluous.contains(&libc::SYS_write));
        for seen in [libc::SYS_read, libc::SYS_clone] {
            assert!(!superfluous.contains(&seen));
        }
    }
}

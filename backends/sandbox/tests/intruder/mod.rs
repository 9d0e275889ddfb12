//! What somebody tries who has taken a program over. A test program runs itself again for each attempt, with a variable in its
//! environment that says which; there a test of the name `intruder` confines the process as the program does, and tries it.

#![allow(
    dead_code, // each test program uses its own part
    unreachable_pub,
    clippy::unwrap_used,
    clippy::panic
)] // test support: a panic is how it fails

use std::env;
use std::fs::{File, OpenOptions};
use std::io;
use std::net::TcpStream;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Command, ExitStatus};
use std::sync::OnceLock;
use std::thread;

use ringside_sandbox::{ThreadKind, narrow};

/// Names the profile, the kind of thread and the attempt.
const ATTEMPT: &str = "RINGSIDE_TEST_ATTEMPT";

/// What an intruder tries.
pub type Attempt = fn() -> io::Result<()>;

/// A system call with three arguments.
pub fn call(number: libc::c_long, arguments: [usize; 3]) -> io::Result<()> {
    let [a, b, c] = arguments;
    // SAFETY: none of the calls below gets a pointer but to a text that lives as long as the program.
    let done = unsafe { libc::syscall(number, a, b, c) };
    match done {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

/// The process that started this one; asked for before that is forbidden, too.
static PARENT: OnceLock<usize> = OnceLock::new();

fn parent() -> usize {
    *PARENT.get().unwrap()
}

pub const SHELL: &std::ffi::CStr = c"/bin/sh";

/// With which the process is ended.
pub const ENDED: &[(&str, Attempt)] = &[
    ("connect out", || {
        TcpStream::connect("127.0.0.1:9").map(drop)
    }),
    ("exec", || {
        Err(Command::new(SHELL.to_str().unwrap()).arg("-c").exec())
    }),
    ("fork", || {
        Command::new(SHELL.to_str().unwrap()).status().map(drop)
    }),
    ("run a file by descriptor", || {
        call(libc::SYS_execveat, [usize::MAX, SHELL.as_ptr().addr(), 0])
    }),
    ("ptrace", || {
        // PTRACE_ATTACH
        call(libc::SYS_ptrace, [16, parent(), 0])
    }),
    ("read the memory of another", || {
        call(libc::SYS_process_vm_readv, [parent(), 0, 0])
    }),
    ("signal", || call(libc::SYS_kill, [parent(), 0, 0])),
    ("signal a thread of another", || {
        call(libc::SYS_tgkill, [parent(), parent(), 0])
    }),
    ("have the kernel signal another", || {
        // F_SETOWN
        call(libc::SYS_fcntl, [0, 8, parent()])
    }),
    ("have a terminal signal others", || {
        // F_SETFL, O_ASYNC
        call(libc::SYS_fcntl, [0, 4, 0x2000])
    }),
    ("move a thread of another", || {
        call(libc::SYS_sched_setaffinity, [parent(), 0, 0])
    }),
    ("take descriptors of another", || {
        call(libc::SYS_pidfd_open, [parent(), 0, 0])
    }),
    ("become another user", || {
        call(libc::SYS_setuid, [65534, 0, 0])
    }),
    ("load a program into the kernel", || {
        call(libc::SYS_bpf, [5, 0, 0])
    }),
    ("leave its namespaces", || call(libc::SYS_setns, [0, 0, 0])),
    ("mount", || call(libc::SYS_mount, [0, 0, 0])),
    ("change the mode of a file", || {
        call(libc::SYS_chmod, [SHELL.as_ptr().addr(), 0o755, 0])
    }),
    ("run what it has written", || {
        // PROT_READ | PROT_WRITE | PROT_EXEC
        call(libc::SYS_mprotect, [0, 4096, 7])
    }),
];

/// What fails, as the C library does it by itself and must survive.
pub const REFUSED: &[(&str, Attempt)] = &[
    ("open a file", || File::open("/etc/passwd").map(drop)),
    ("create a file", || {
        let path = env::temp_dir().join("ringside-intruder");
        let mut options = OpenOptions::new();
        options.write(true).create(true).open(path).map(drop)
    }),
    ("map a library", || {
        // PROT_READ | PROT_EXEC
        call(libc::SYS_mmap, [0, 4096, 5])
    }),
];

/// In the program that is run again: confines the process by what `confine` does with the name of a profile, and tries what the
/// environment says, on a thread of one of these kinds if it names that. In the first one it returns.
pub fn intrude(confine: impl FnOnce(&str), kinds: &[(&str, ThreadKind)], more: &[(&str, Attempt)]) {
    let Ok(wanted) = env::var(ATTEMPT) else {
        return;
    };
    let parent = std::os::unix::process::parent_id();
    PARENT.set(parent.try_into().unwrap()).unwrap();
    let mut parts = wanted.split(':');
    let mut next = || parts.next().unwrap();
    let (profile, thread, what) = (next(), next(), next());
    confine(profile);
    let mut all = ENDED.iter().chain(REFUSED).chain(more);
    let (_, attempt) = *all.find(|(name, _)| *name == what).unwrap();
    let intrude = move || match attempt() {
        Ok(()) => 0,
        Err(error) => error.raw_os_error().unwrap_or(255),
    };
    let kind = kinds.iter().find(|(name, _)| *name == thread);
    let outcome = match kind {
        None => intrude(),
        Some(&(_, kind)) => {
            let narrowed = move || {
                narrow(kind).unwrap();
                intrude()
            };
            thread::spawn(narrowed).join().unwrap()
        }
    };
    std::process::exit(outcome);
}

/// Tries it in a process that has confined itself.
pub fn attempt(profile: &str, thread: &str, what: &str) -> ExitStatus {
    Command::new(env::current_exe().unwrap())
        .args(["--exact", "intruder", "--nocapture"])
        .env(ATTEMPT, format!("{profile}:{thread}:{what}"))
        .output()
        .unwrap()
        .status
}

/// Each ends the process.
pub fn ends(profile: &str, thread: &str, attempts: &[(&str, Attempt)]) {
    for (what, _) in attempts {
        let status = attempt(profile, thread, what);
        let signal = status.signal();
        assert_eq!(
            signal,
            Some(libc::SIGSYS),
            "{profile}, {thread}: {what}: {status}"
        );
    }
}

/// Each fails, and the process lives.
pub fn fails(profile: &str, thread: &str, attempts: &[(&str, Attempt)]) {
    for (what, _) in attempts {
        let status = attempt(profile, thread, what);
        let code = status.code();
        assert_eq!(
            code,
            Some(libc::EACCES),
            "{profile}, {thread}: {what}: {status}"
        );
    }
}

/// Whether the kernel has Landlock, and it is on: landlock_create_ruleset(2) then tells its version.
pub fn landlock() -> bool {
    call(libc::SYS_landlock_create_ruleset, [0, 0, 1]).is_ok()
}

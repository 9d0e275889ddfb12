//! What somebody finds who has taken a back-end over: a process confines itself as the program does, with the same device, and
//! then does what an intruder would. And what the kernel says about the programs themselves.
//!
//! This program runs itself again for each attempt, with a variable in its environment that says which.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)] // a test

mod frontend;

use std::env;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Command, ExitStatus};
use std::sync::OnceLock;
use std::thread;

use clap::Parser;
use frontend::{Daemon, own_network, skip};
use io_uring::types::Fd;
use io_uring::{IoUring, opcode};
use nix::unistd::geteuid;
use ringside_backends::blk::{Blk, BlkArgs};
use ringside_backends::net::NetArgs;
use ringside_backends::shell::{Device, Program, ShellArgs, confine};
use ringside_sandbox::{ThreadKind, narrow};

/// Names the device, the kind of thread and the attempt.
const ATTEMPT: &str = "RINGSIDE_TEST_ATTEMPT";

const BLK: &str = env!("CARGO_BIN_EXE_ringside-blk");
const NET: &str = env!("CARGO_BIN_EXE_ringside-net");

/// What an intruder tries.
type Attempt = fn() -> io::Result<()>;

/// A system call with three arguments.
fn call(number: libc::c_long, arguments: [usize; 3]) -> io::Result<()> {
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

const SHELL: &std::ffi::CStr = c"/bin/sh";

/// With which the process is ended.
const ENDED: &[(&str, Attempt)] = &[
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
const REFUSED: &[(&str, Attempt)] = &[
    ("open a file", || File::open("/etc/passwd").map(drop)),
    ("create a file", || {
        let path = env::temp_dir().join("ringside-intruder");
        let mut options = OpenOptions::new();
        options.write(true).create(true).open(path).map(drop)
    }),
];

/// Besides, on the thread of a disk's queue.
const ENDED_ON_QUEUES: &[(&str, Attempt)] = &[
    ("have a ring of its own", || IoUring::new(4).map(drop)),
    ("listen to front-ends", || {
        call(libc::SYS_accept4, [0, 0, 0])
    }),
    ("remove a file", || {
        call(libc::SYS_unlink, [SHELL.as_ptr().addr(), 0, 0])
    }),
    ("connect to a service", || {
        UnixStream::connect("/run/ringside-intruder").map(drop)
    }),
];

/// Besides, on the control thread of a disk, which makes rings: it goes past the filter, and Landlock is still there.
const REFUSED_BY_LANDLOCK: &[(&str, Attempt)] = &[("open a file by io_uring", || {
    let path = c"/etc/passwd";
    let mut ring = IoUring::new(4)?;
    let open = opcode::OpenAt::new(Fd(libc::AT_FDCWD), path.as_ptr()).build();
    // SAFETY: the path lives as long as the program.
    unsafe { ring.submission().push(&open) }.unwrap();
    ring.submit_and_wait(1)?;
    let result = ring.completion().next().unwrap().result();
    match result {
        0.. => Ok(()),
        errno => Err(io::Error::from_raw_os_error(-errno)),
    }
})];

#[derive(Parser)]
struct BlkCli {
    #[command(flatten)]
    blk: BlkArgs,
    #[command(flatten)]
    shell: ShellArgs,
}

#[derive(Parser)]
struct NetCli {
    #[command(flatten)]
    net: NetArgs,
    #[command(flatten)]
    shell: ShellArgs,
}

fn confine_as(kind: &'static str, args: &ShellArgs, device: &impl Device) {
    let program = Program {
        name: "a back-end",
        kind,
        features: &[],
        hangup: "",
    };
    confine(&program, args, |profile| device.needs(profile)).unwrap();
}

/// The other side of [`attempt`].
#[test]
fn intruder() {
    let Ok(attempt) = env::var(ATTEMPT) else {
        return;
    };
    let parent = std::os::unix::process::parent_id();
    PARENT.set(parent.try_into().unwrap()).unwrap();
    let mut parts = attempt.split(':');
    let mut next = || parts.next().unwrap().to_owned();
    let (device, thread, what) = (next(), next(), next());
    let socket = env::temp_dir().join("ringside-confined");
    let socket = socket.to_str().unwrap();
    if device != "net" {
        let mode = if device == "blk" { "on" } else { "log" };
        let args = [
            "x",
            "--socket-path",
            socket,
            "--null",
            "1M",
            "--sandbox",
            mode,
        ];
        let cli = BlkCli::parse_from(args);
        confine_as("block", &cli.shell, &Blk::new(cli.blk.open().unwrap()));
    } else {
        let args = ["x", "--socket-path", socket, "--link", "null"];
        let cli = NetCli::parse_from(args);
        confine_as("net", &cli.shell, &cli.net.open().unwrap());
    }
    let all = [ENDED, REFUSED, ENDED_ON_QUEUES, REFUSED_BY_LANDLOCK].concat();
    let (_, attempt) = all.into_iter().find(|(name, _)| *name == what).unwrap();
    let intrude = move || match attempt() {
        Ok(()) => 0,
        Err(error) => error.raw_os_error().unwrap_or(255),
    };
    let outcome = if thread == "queue" {
        let intrude = move || {
            narrow(ThreadKind::Queue).unwrap();
            intrude()
        };
        thread::spawn(intrude).join().unwrap()
    } else {
        intrude()
    };
    std::process::exit(outcome);
}

/// Tries it in a process that has confined itself.
fn attempt(device: &str, thread: &str, what: &str) -> ExitStatus {
    Command::new(env::current_exe().unwrap())
        .args(["--exact", "intruder", "--nocapture"])
        .env(ATTEMPT, format!("{device}:{thread}:{what}"))
        .output()
        .unwrap()
        .status
}

fn ends(device: &str, thread: &str, attempts: &[(&str, Attempt)]) {
    for (what, _) in attempts {
        let status = attempt(device, thread, what);
        let signal = status.signal();
        assert_eq!(
            signal,
            Some(libc::SIGSYS),
            "{device}, {thread}: {what}: {status}"
        );
    }
}

fn fails(device: &str, thread: &str, attempts: &[(&str, Attempt)]) {
    for (what, _) in attempts {
        let status = attempt(device, thread, what);
        let code = status.code();
        assert_eq!(
            code,
            Some(libc::EACCES),
            "{device}, {thread}: {what}: {status}"
        );
    }
}

#[test]
fn who_takes_a_disk_over_gets_nowhere() {
    for thread in ["control", "queue"] {
        ends("blk", thread, ENDED);
        fails("blk", thread, REFUSED);
    }
    ends("blk", "queue", ENDED_ON_QUEUES);
    if landlock() {
        fails("blk", "control", REFUSED_BY_LANDLOCK);
    } else {
        skip(
            "who_takes_a_disk_over_gets_nowhere",
            "this kernel has no Landlock",
        );
    }
}

#[test]
fn who_takes_a_network_card_over_gets_nowhere() {
    for thread in ["control", "queue"] {
        ends("net", thread, ENDED);
        fails("net", thread, REFUSED);
    }
    ends("net", "queue", ENDED_ON_QUEUES);
}

/// Whether the kernel has it, and it is on: landlock_create_ruleset(2) then tells its version.
fn landlock() -> bool {
    call(libc::SYS_landlock_create_ruleset, [0, 0, 1]).is_ok()
}

/// The value of a line of /proc/PID/task/TID/status.
fn field(status: &str, name: &str) -> String {
    let line = status.lines().find_map(|l| l.strip_prefix(name)).unwrap();
    line.trim_start_matches(':').trim().to_owned()
}

/// Checks what the kernel says about each thread of a program, and about all of it. `kept`: the capabilities that a program of
/// root's has.
fn is_confined(daemon: &Daemon, kept: u64, test: &str) {
    let kept = if geteuid().is_root() { kept } else { 0 };
    let process = format!("/proc/{}", daemon.id());
    let mut threads = 0;
    for task in fs::read_dir(format!("{process}/task")).unwrap() {
        let status = fs::read_to_string(task.unwrap().path().join("status")).unwrap();
        let name = field(&status, "Name");
        assert_eq!(field(&status, "NoNewPrivs"), "1", "{name}");
        assert_eq!(field(&status, "Seccomp"), "2", "{name}");
        let set = |set| u64::from_str_radix(&field(&status, set), 16).unwrap();
        assert_eq!(["CapInh", "CapAmb"].map(set), [0; 2], "{name}");
        assert_eq!(["CapPrm", "CapEff"].map(set), [kept; 2], "{name}");
        if geteuid().is_root() {
            assert_eq!(set("CapBnd"), kept, "{name}");
        }
        threads += 1;
    }
    assert!(threads > 1);
    let limits = fs::read_to_string(format!("{process}/limits")).unwrap();
    let core = limits.lines().find(|l| l.starts_with("Max core file size"));
    let core: Vec<&str> = core.unwrap().split_whitespace().collect();
    assert_eq!(core[4..6], ["0", "0"]);
    let namespaces = |of: &str| {
        let namespace = |name| fs::read_link(Path::new(of).join("ns").join(name)).ok();
        ["ipc", "uts", "net"].map(namespace)
    };
    if geteuid().is_root() {
        let (own, other) = (namespaces("/proc/self"), namespaces(&process));
        for (own, other) in own.into_iter().zip(other) {
            assert!(own.is_some() && own != other, "{own:?}");
        }
    } else {
        skip(test, "only root has the right to namespaces");
    }
}

#[test]
fn a_disk_is_confined_when_it_is_ready() {
    let test = "a_disk_is_confined_when_it_is_ready";
    let image = tempfile::NamedTempFile::new().unwrap();
    image.as_file().set_len(1 << 20).unwrap();
    let path = image.path().to_str().unwrap();
    let daemon = Daemon::start(BLK, &["--path", path, "--queues", "2"]);
    is_confined(&daemon, 0, test);
}

#[test]
fn a_network_card_is_confined_when_it_is_ready() {
    let test = "a_network_card_is_confined_when_it_is_ready";
    if own_network(test) {
        let daemon = Daemon::start(NET, &["--tap", "vm0", "--queue-pairs", "2"]);
        // CAP_BPF, for the guest's table of queues.
        is_confined(&daemon, 1 << 39, test);
    }
}

#[test]
fn what_is_only_to_be_logged_is_done() {
    let status = attempt("blk-logged", "control", "load a program into the kernel");
    // And fails there, for want of arguments or of the right.
    assert!(matches!(status.code(), Some(1..)), "{status}");
}

#[test]
fn a_program_can_be_left_as_it_is() {
    let daemon = Daemon::start(BLK, &["--null", "1M", "--sandbox", "off"]);
    let status = fs::read_to_string(format!("/proc/{}/status", daemon.id())).unwrap();
    assert_eq!(field(&status, "Seccomp"), "0");
    assert!(daemon.log().contains("is not confined (--sandbox=off)"));
}

/// Connects as another user, and asks for the status; gives what comes back until the connection ends.
fn ask_as(user: usize, socket: std::path::PathBuf) -> String {
    let asked = thread::spawn(move || {
        // Of this thread alone: the C library's function would change all of them.
        let same = usize::MAX;
        call(libc::SYS_setresuid, [same, user, same]).unwrap();
        let mut stream = UnixStream::connect(socket).unwrap();
        // It may be closed by then.
        let _ = stream.write_all(b"{\"command\":\"status\"}\n");
        let _ = stream.shutdown(Shutdown::Write);
        let mut answer = String::new();
        let _ = stream.read_to_string(&mut answer);
        answer
    });
    asked.join().unwrap()
}

#[test]
fn only_users_that_are_allowed_are_served() {
    let test = "only_users_that_are_allowed_are_served";
    if !geteuid().is_root() {
        skip(test, "only root can become another user");
        return;
    }
    let control = tempfile::tempdir().unwrap();
    let socket = control.path().join("control");
    let path = socket.to_str().unwrap();
    let args = [
        "--null",
        "1M",
        "--control-socket",
        path,
        "--allow-uid",
        "65533",
    ];
    let daemon = Daemon::start(BLK, &args);
    let open_to_all = |path: &Path, mode| {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    };
    open_to_all(control.path(), 0o755);
    open_to_all(daemon.dir.path(), 0o755);
    // Sockets are made for their owner, whatever peers are checked besides.
    for socket in [&socket, &daemon.socket()] {
        assert_eq!(
            socket.metadata().unwrap().permissions().mode() & 0o777,
            0o600
        );
        open_to_all(socket, 0o666);
    }
    let refused = ask_as(65534, socket.clone());
    assert!(refused.contains("\"denied\""), "{refused}");
    assert!(refused.contains("--allow-uid 65534"), "{refused}");
    assert!(ask_as(65533, socket).contains("\"result\""));
    assert_eq!(ask_as(65534, daemon.socket()), "");
    daemon.wait_for_line("a connection of user 65534");
}

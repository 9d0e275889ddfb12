//! What somebody tries who has taken a program over. A test program runs itself again for each attempt, with a variable in its
//! environment that says which; there a test of the name `intruder` confines the process as the program does, and tries it.

#![allow(
    dead_code, // each test program uses its own part
    unreachable_pub,
    clippy::unwrap_used,
    clippy::panic
)] // test support: a panic is how it fails

use std::env;
use std::ffi::OsString;
use std::fs::{File, OpenOptions, create_dir};
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};
use std::sync::OnceLock;
use std::thread;

use ringside_sandbox::{ThreadKind, narrow};

/// Names the profile, the kind of thread and the attempt.
const ATTEMPT: &str = "RINGSIDE_TEST_ATTEMPT";
/// Names the directory of [`Services`], and their ports.
const SERVICES: &str = "RINGSIDE_TEST_SERVICES";
/// Exit status of a program in which the attempt came to its end: no error has this number.
const DONE: i32 = 200;

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

/// Services that listen while a program is attacked: on Unix sockets and ports of TCP, of each one that the program is for and
/// one that is none of its business. The first has a directory of its own.
pub struct Services {
    pub dir: PathBuf,
    pub port: u16,
    pub other_port: u16,
}

/// What comes of a connection.
pub trait Stream: Read + Write {}

impl<T: Read + Write> Stream for T {}

fn greet<S: Stream>(
    connections: impl Iterator<Item = io::Result<S>> + Send + 'static,
    hello: fn(&mut dyn Stream) -> io::Result<()>,
) {
    thread::spawn(move || {
        for stream in connections {
            let _ = hello(&mut stream.unwrap());
        }
    });
}

/// The connections of a Unix socket, for as long as the program runs.
fn connections(listener: UnixListener) -> impl Iterator<Item = io::Result<UnixStream>> {
    std::iter::repeat_with(move || listener.accept().map(|(stream, _)| stream))
}

impl Services {
    /// Starts them in a directory. `hello` is what those that the program is for say to who connects.
    pub fn start(dir: &Path, hello: fn(&mut dyn Stream) -> io::Result<()>) -> Self {
        let this = |port, other_port| Self {
            dir: dir.to_owned(),
            port,
            other_port,
        };
        for name in ["own", "other"] {
            create_dir(dir.join(name)).unwrap();
        }
        let unix = this(0, 0);
        greet(
            connections(UnixListener::bind(unix.socket()).unwrap()),
            hello,
        );
        for address in [
            SocketAddr::from_pathname(unix.other_socket()).unwrap(),
            unix.abstract_socket(),
        ] {
            greet(
                connections(UnixListener::bind_addr(&address).unwrap()),
                |_| Ok(()),
            );
        }
        let ports = [hello, |_: &mut dyn Stream| Ok(())].map(|hello| {
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            let port = listener.local_addr().unwrap().port();
            let accepted = move || listener.accept().map(|(stream, _)| stream);
            greet(std::iter::repeat_with(accepted), hello);
            port
        });
        this(ports[0], ports[1])
    }

    pub fn socket(&self) -> PathBuf {
        self.dir.join("own/s")
    }

    pub fn other_socket(&self) -> PathBuf {
        self.dir.join("other/s")
    }

    fn abstract_socket(&self) -> SocketAddr {
        SocketAddr::from_abstract_name(self.dir.as_os_str().as_encoded_bytes()).unwrap()
    }

    /// For the program that is run again.
    fn told(&self) -> OsString {
        let mut told = OsString::from(format!("{} {} ", self.port, self.other_port));
        told.push(&self.dir);
        told
    }
}

static TOLD: OnceLock<Services> = OnceLock::new();

/// In the program that is run again: the services of the one that has started it.
pub fn services() -> &'static Services {
    TOLD.get_or_init(|| {
        let told = env::var(SERVICES).unwrap();
        let parts: Vec<&str> = told.splitn(3, ' ').collect();
        let [port, other_port, dir] = parts[..] else {
            panic!("{told}");
        };
        Services {
            dir: dir.into(),
            port: port.parse().unwrap(),
            other_port: other_port.parse().unwrap(),
        }
    })
}

/// Reaches the service on a Unix socket that a program is for.
pub const TO_SOCKET: &[(&str, Attempt)] = &[("connect to its own service", || {
    UnixStream::connect(services().socket()).map(drop)
})];

/// Reaches another one.
pub const TO_OTHER_SOCKET: &[(&str, Attempt)] = &[("connect to another service", || {
    UnixStream::connect(services().other_socket()).map(drop)
})];

/// Reaches one that has no file.
pub const TO_ABSTRACT_SOCKET: &[(&str, Attempt)] = &[("connect to an abstract socket", || {
    UnixStream::connect_addr(&services().abstract_socket()).map(drop)
})];

/// Reaches the port that a program is for.
pub const TO_PORT: &[(&str, Attempt)] = &[("connect to its own port", || {
    TcpStream::connect(("127.0.0.1", services().port)).map(drop)
})];

/// Reaches another one.
pub const TO_OTHER_PORT: &[(&str, Attempt)] = &[("connect to another port", || {
    TcpStream::connect(("127.0.0.1", services().other_port)).map(drop)
})];

/// Lets others connect.
pub const LISTEN: &[(&str, Attempt)] = &[
    ("listen at a socket", || {
        UnixListener::bind(services().dir.join("intruder")).map(drop)
    }),
    ("listen at a port", || {
        TcpListener::bind("127.0.0.1:0").map(drop)
    }),
];

/// Connects to another port by data that is sent (TCP Fast Open), of which Landlock is not asked: with one of three calls.
fn fast_open(number: libc::c_long) -> io::Result<()> {
    let address = libc::sockaddr_in {
        sin_family: 2, // AF_INET
        sin_port: services().other_port.to_be(),
        sin_addr: libc::in_addr {
            s_addr: u32::from(Ipv4Addr::LOCALHOST).to_be(),
        },
        sin_zero: [0; 8],
    };
    let mut data = libc::iovec {
        iov_base: (&raw const address).cast_mut().cast(),
        iov_len: 1,
    };
    let message = libc::msghdr {
        msg_name: (&raw const address).cast_mut().cast(),
        msg_namelen: 16,
        msg_iov: &raw mut data,
        msg_iovlen: 1,
        msg_control: std::ptr::null_mut(),
        msg_controllen: 0,
        msg_flags: 0,
    };
    let messages = [libc::mmsghdr {
        msg_hdr: message,
        msg_len: 0,
    }];
    let flags = 0x2000_0000; // MSG_FASTOPEN
    let at = (&raw const address).expose_provenance();
    let [a, b, c, d, e] = match number {
        libc::SYS_sendto => [at, 1, flags, at, 16],
        libc::SYS_sendmsg => [(&raw const message).expose_provenance(), flags, 0, 0, 0],
        _ => [messages.as_ptr().expose_provenance(), 1, flags, 0, 0],
    };
    // SAFETY: it takes no pointer. AF_INET, SOCK_STREAM.
    let socket = unsafe { libc::socket(2, 1, 0) };
    // SAFETY: pointers are to what lives until the end of this function, and the lengths are theirs.
    let sent = unsafe { libc::syscall(number, socket, a, b, c, d, e) };
    match sent {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

/// Which no program needs that connects to a service, be it on a Unix socket or a port of TCP.
pub const OTHER_SOCKETS: &[(&str, Attempt)] = &[
    ("connect by fast open", || fast_open(libc::SYS_sendto)),
    ("connect by fast open in a message", || {
        fast_open(libc::SYS_sendmsg)
    }),
    ("connect by fast open in messages", || {
        fast_open(libc::SYS_sendmmsg)
    }),
    ("send datagrams", || {
        // AF_INET, SOCK_DGRAM
        call(libc::SYS_socket, [2, 2, 0])
    }),
    ("connect by another protocol", || {
        // AF_INET, SOCK_STREAM, IPPROTO_MPTCP: Landlock takes it for no TCP.
        call(libc::SYS_socket, [2, 1, 262])
    }),
    ("change the host's network", || {
        // AF_NETLINK, SOCK_RAW
        call(libc::SYS_socket, [16, 3, 0])
    }),
    ("see all packets", || {
        // AF_PACKET, SOCK_RAW
        call(libc::SYS_socket, [17, 3, 0])
    }),
    ("reach other machines of this host", || {
        // AF_VSOCK, SOCK_STREAM
        call(libc::SYS_socket, [40, 1, 0])
    }),
];

/// All attempts but those that a program has a right to.
pub fn but(
    attempts: &[(&'static str, Attempt)],
    permitted: &[&str],
) -> Vec<(&'static str, Attempt)> {
    for name in permitted {
        assert!(attempts.iter().any(|(what, _)| what == name), "{name}");
    }
    let mut left = attempts.to_vec();
    left.retain(|(what, _)| !permitted.contains(what));
    left
}

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
    let shared = [
        ENDED,
        REFUSED,
        TO_SOCKET,
        TO_OTHER_SOCKET,
        TO_ABSTRACT_SOCKET,
        TO_PORT,
        TO_OTHER_PORT,
        LISTEN,
        OTHER_SOCKETS,
    ];
    let mut all = shared.into_iter().flatten().chain(more);
    let (_, attempt) = *all.find(|(name, _)| *name == what).unwrap();
    let intrude = move || match attempt() {
        Ok(()) => DONE,
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
    attempt_at(profile, thread, what, None)
}

fn attempt_at(profile: &str, thread: &str, what: &str, services: Option<&Services>) -> ExitStatus {
    let mut command = Command::new(env::current_exe().unwrap());
    command
        .args(["--exact", "intruder", "--nocapture"])
        .env(ATTEMPT, format!("{profile}:{thread}:{what}"));
    if let Some(services) = services {
        command.env(SERVICES, services.told());
    }
    command.output().unwrap().status
}

/// A program to be attacked: its profile, the kind of thread, and the services that there are.
#[derive(Clone, Copy)]
pub struct Victim<'v> {
    pub profile: &'v str,
    pub thread: &'v str,
    pub services: Option<&'v Services>,
}

impl Victim<'_> {
    fn all(self, attempts: &[(&str, Attempt)], expected: impl Fn(ExitStatus) -> bool) {
        let Self {
            profile,
            thread,
            services,
        } = self;
        for (what, _) in attempts {
            let status = attempt_at(profile, thread, what, services);
            assert!(expected(status), "{profile}, {thread}: {what}: {status}");
        }
    }

    /// Each ends the process.
    pub fn ends(self, attempts: &[(&str, Attempt)]) {
        self.all(attempts, |status| status.signal() == Some(libc::SIGSYS));
    }

    /// Each fails for want of a right, and the process lives.
    pub fn fails(self, attempts: &[(&str, Attempt)]) {
        self.all(attempts, |status| status.code() == Some(libc::EACCES));
    }

    /// Each fails in one way or another, and the process lives.
    pub fn does_not(self, attempts: &[(&str, Attempt)]) {
        // That of a test that fails, which is no error number here.
        let failed = |code| (1..DONE).contains(&code) && code != 101;
        self.all(attempts, |status| status.code().is_some_and(failed));
    }

    /// Each is done: the program has a right to it.
    pub fn does(self, attempts: &[(&str, Attempt)]) {
        self.all(attempts, |status| status.code() == Some(DONE));
    }

    /// A program that connects to a Unix socket is kept from others as far as Landlock tells them apart. What it does not, `skip` is
    /// told.
    pub fn keeps_from_other_sockets(self, skip: impl FnOnce(&str)) {
        if landlock(9) {
            self.fails(TO_OTHER_SOCKET);
        } else {
            self.does(TO_OTHER_SOCKET);
        }
        if landlock(6) {
            self.does_not(TO_ABSTRACT_SOCKET);
        } else {
            skip("abstract sockets take version 6 of Landlock");
        }
    }
}

/// Each ends the process.
pub fn ends(profile: &str, thread: &str, attempts: &[(&str, Attempt)]) {
    let services = None;
    Victim {
        profile,
        thread,
        services,
    }
    .ends(attempts);
}

/// Each fails, and the process lives.
pub fn fails(profile: &str, thread: &str, attempts: &[(&str, Attempt)]) {
    let services = None;
    Victim {
        profile,
        thread,
        services,
    }
    .fails(attempts);
}

/// Whether the kernel has Landlock, in this version or a later one, and it is on: landlock_create_ruleset(2) then tells its version.
pub fn landlock(version: libc::c_long) -> bool {
    // SAFETY: without a ruleset it reads no memory.
    let newest = unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, 0, 0, 1) };
    newest >= version
}

//! System calls in groups, each with what it is needed for. What takes a request or a kind as an argument is restricted to
//! those that are needed.

use libc::{c_int, c_long, c_ulong};

/// What an argument must be. Arguments count from 0; 32 bits are looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Only {
    /// Anything.
    Always,
    /// This value.
    Is(u8, u64),
    /// The bits of a mask have this value.
    Has(u8, u64, u64),
    /// This value, and in the argument behind it none of the bits of a mask.
    IsWithout(u8, u64, u64),
    /// A socket of this family, of this type whatever its flags, and of this protocol.
    Socket(u64, u64, u64),
    /// The number of this process.
    Own(u8),
}

impl Only {
    /// Whether arguments are such ones. Whose the number of a process is nobody can tell from them.
    #[must_use]
    pub fn holds(&self, arguments: &[u64]) -> bool {
        let (argument, mask, value) = match *self {
            Self::Always | Self::Own(_) => return true,
            Self::Is(argument, value) => (argument, !0, value),
            Self::Has(argument, mask, value) => (argument, mask, value),
            Self::IsWithout(argument, value, mask) => {
                let [first, behind] = [
                    Self::Is(argument, value),
                    Self::Has(argument.saturating_add(1), mask, 0),
                ];
                return first.holds(arguments) && behind.holds(arguments);
            }
            Self::Socket(family, kind, protocol) => {
                let all = [
                    Self::Is(0, family),
                    Self::Has(1, SOCK_TYPE_MASK, kind),
                    Self::Is(2, protocol),
                ];
                return all.iter().all(|only| only.holds(arguments));
            }
        };
        let argument = arguments.get(usize::from(argument));
        argument.is_some_and(|argument| argument & mask & 0xffff_ffff == value)
    }
}

/// What of the second argument of socket(2) is the type; the rest is flags (linux/net.h).
pub(crate) const SOCK_TYPE_MASK: u64 = 0xf;

/// A system call that a program keeps.
#[derive(Debug, Clone, Copy)]
pub struct Call {
    /// Its number.
    pub number: c_long,
    /// With which arguments.
    pub only: Only,
    /// What for.
    pub why: &'static str,
    /// The native tests may never make it: that depends on the C library, the kernel, the moment or the host, or takes a guest.
    pub rare: bool,
}

const fn call(number: c_long, why: &'static str) -> Call {
    only(number, Only::Always, why)
}

const fn only(number: c_long, only: Only, why: &'static str) -> Call {
    Call {
        number,
        only,
        why,
        rare: false,
    }
}

const fn rare(call: Call) -> Call {
    Call { rare: true, ..call }
}

/// An ioctl by its request.
#[must_use]
pub const fn ioctl(request: c_ulong, why: &'static str) -> Call {
    // Requests have 32 bits; libc has some of them sign-extended.
    let request = Only::Is(1, request & 0xffff_ffff);
    only(libc::SYS_ioctl, request, why)
}

/// All ioctls of a driver, by the letter or number that its requests have in common.
#[must_use]
pub const fn ioctls(kind: u8, why: &'static str) -> Call {
    only(
        libc::SYS_ioctl,
        Only::Has(1, 0xff00, (kind as u64) << 8),
        why,
    )
}

/// A request to fcntl.
const fn fcntl(request: c_int, why: &'static str) -> Call {
    only(
        libc::SYS_fcntl,
        Only::Is(1, request.unsigned_abs() as u64),
        why,
    )
}

/// A socket by its address family.
#[must_use]
pub const fn socket(family: c_int, why: &'static str) -> Call {
    only(
        libc::SYS_socket,
        Only::Is(0, family.unsigned_abs() as u64),
        why,
    )
}

/// A socket of the Internet. Without its protocol it could be one of MPTCP, which connects to any server of TCP, and which Landlock
/// takes for another matter.
const fn internet(family: c_int, kind: c_int, protocol: c_int, why: &'static str) -> Call {
    let [family, kind, protocol] = [
        family.unsigned_abs() as u64,
        kind.unsigned_abs() as u64,
        protocol.unsigned_abs() as u64,
    ];
    only(libc::SYS_socket, Only::Socket(family, kind, protocol), why)
}

/// Sending on what is connected; which argument is the flags. With `MSG_FASTOPEN` it would connect, and Landlock would not be asked.
const fn sends(number: c_long, flags: u8, why: &'static str) -> Call {
    only(number, Only::Has(flags, FAST_OPEN, 0), why)
}

/// `MSG_FASTOPEN`, without its sign.
const FAST_OPEN: u64 = 0x2000_0000;
/// `PROT_EXEC`, without its sign.
const EXEC: u64 = 0x4;
/// `CLONE_THREAD`, without its sign.
const THREAD: u64 = 0x1_0000;
/// PR_SET_VMA (prctl(2)): the C library names its memory.
const PR_SET_VMA: u64 = 0x5356_4d41;

/// What every thread of every program needs.
pub const RUNTIME: &[Call] = &[
    call(libc::SYS_read, "eventfds, files"),
    call(libc::SYS_write, "eventfds, logs, files, a frame"),
    call(libc::SYS_writev, "logs"),
    call(libc::SYS_close, "descriptors"),
    // None that has signals sent (F_SETOWN, F_SETSIG, F_SETLEASE, F_NOTIFY; O_ASYNC, for whose owner a terminal is asked): they
    // may go to any process.
    fcntl(libc::F_DUPFD_CLOEXEC, "duplicates of descriptors"),
    fcntl(libc::F_GETFD, "flags of descriptors"),
    rare(fcntl(libc::F_SETFD, "flags of descriptors")),
    fcntl(libc::F_GETFL, "modes of open files"),
    only(
        libc::SYS_fcntl,
        Only::IsWithout(1, libc::F_SETFL as u64, libc::O_ASYNC as u64),
        "sockets that do not block",
    ),
    call(libc::SYS_brk, "memory"),
    only(
        libc::SYS_mmap,
        Only::Has(2, EXEC, 0),
        "memory; none that can be executed",
    ),
    only(
        libc::SYS_mprotect,
        Only::Has(2, EXEC, 0),
        "stacks of threads; nothing that can be executed",
    ),
    call(libc::SYS_munmap, "memory"),
    rare(call(libc::SYS_mremap, "memory that grows")),
    rare(call(
        libc::SYS_madvise,
        "memory given back, or left out of dumps",
    )),
    call(libc::SYS_futex, "locks, and threads that end"),
    only(
        libc::SYS_clone,
        Only::Has(0, THREAD, THREAD),
        "threads; no processes",
    ),
    call(libc::SYS_set_robust_list, "threads"),
    call(libc::SYS_rseq, "threads"),
    call(libc::SYS_sigaltstack, "stacks of threads"),
    call(libc::SYS_rt_sigprocmask, "threads"),
    call(libc::SYS_rt_sigaction, "guest memory that is taken away"),
    call(libc::SYS_rt_sigreturn, "the same"),
    call(libc::SYS_gettid, "threads"),
    call(libc::SYS_getpid, "signals among threads"),
    only(
        libc::SYS_tgkill,
        Only::Own(0),
        "signals among threads of this process",
    ),
    only(
        libc::SYS_prctl,
        Only::Is(0, libc::PR_SET_NAME as u64),
        "names of threads",
    ),
    rare(only(
        libc::SYS_prctl,
        Only::Is(0, PR_SET_VMA),
        "names of memory",
    )),
    only(
        libc::SYS_prctl,
        Only::Is(0, libc::PR_SET_NO_NEW_PRIVS as u64),
        "threads that restrict themselves",
    ),
    call(libc::SYS_seccomp, "the same; a filter only takes away"),
    rare(call(libc::SYS_sched_yield, "locks")),
    call(libc::SYS_sched_getaffinity, "the number of processors"),
    rare(call(
        libc::SYS_clock_gettime,
        "time, where the vDSO has none",
    )),
    call(libc::SYS_clock_nanosleep, "pauses"),
    rare(call(libc::SYS_restart_syscall, "a pause after a stop")),
    call(libc::SYS_getrandom, "seeds of hash tables"),
    call(libc::SYS_poll, "waiting for a descriptor"),
    call(libc::SYS_eventfd2, "waking threads"),
    call(libc::SYS_exit, "threads that end"),
    call(libc::SYS_exit_group, "the end"),
];

/// Event loops.
pub const EVENTS: &[Call] = &[
    call(
        libc::SYS_epoll_create1,
        "event loops of ports that are added",
    ),
    call(libc::SYS_epoll_ctl, "what they wait for"),
    call(libc::SYS_epoll_wait, "waiting"),
    call(libc::SYS_timerfd_create, "timers"),
    rare(call(libc::SYS_timerfd_settime, "timers")),
];

/// Sockets that are connected or listening.
pub const SOCKETS: &[Call] = &[
    call(
        libc::SYS_accept4,
        "front-ends, clients of the control socket",
    ),
    call(libc::SYS_recvmsg, "messages with descriptors"),
    sends(libc::SYS_sendmsg, 2, "messages with descriptors"),
    call(libc::SYS_recvfrom, "messages"),
    sends(libc::SYS_sendto, 3, "messages"),
    call(libc::SYS_getsockopt, "the peer's user, errors"),
    call(libc::SYS_setsockopt, "how long to wait for a peer"),
    call(libc::SYS_getsockname, "kinds of sockets"),
    call(libc::SYS_shutdown, "ends of connections"),
    ioctl(libc::FIONBIO, "sockets that do not block"),
];

/// A connection that another program had.
pub const TAKING_OVER: &[Call] = &[
    call(libc::SYS_socketpair, "what was negotiated on it"),
    call(libc::SYS_dup3, "the connection, in place of that"),
];

/// Files that are open, their names, and memory that peers share.
pub const FILES: &[Call] = &[
    rare(call(libc::SYS_fstat, "memory that a front-end shares")),
    call(
        libc::SYS_newfstatat,
        "the socket's file, before it is removed",
    ),
    call(
        libc::SYS_statx,
        "files, and the socket's file before it is removed",
    ),
    call(libc::SYS_fstatfs, "the size of its pages"),
    call(libc::SYS_lseek, "the size of a device"),
    call(libc::SYS_unlink, "the socket's file, at the end"),
    rare(call(libc::SYS_unlinkat, "the socket's file, at the end")),
    call(libc::SYS_memfd_create, "notes of requests in flight"),
    call(libc::SYS_ftruncate, "their size; the size of an image"),
    fcntl(libc::F_ADD_SEALS, "notes that keep their size"),
    rare(fcntl(libc::F_OFD_SETLK, "locks of images")),
    rare(only(
        libc::SYS_sched_setaffinity,
        Only::Is(0, 0),
        "where the calling thread runs",
    )),
];

/// Opening files that Landlock leaves.
pub const OPENING: &[Call] = &[call(libc::SYS_openat, "files")];

/// What the C library and Rust's try and can do without: a program that does not keep it gets this error, and lives.
pub const REFUSED: &[(c_int, &[Call])] = &[
    (
        libc::ENOSYS,
        &[call(
            libc::SYS_clone3,
            "threads: its flags lie in memory, where no filter can look; `clone` has them in an argument",
        )],
    ),
    (
        libc::EACCES,
        &[
            call(
                libc::SYS_openat,
                "the kernel's overcommit_memory, when a thread gives memory back",
            ),
            only(
                libc::SYS_mmap,
                Only::Has(2, EXEC, EXEC),
                "libraries that are loaded to look a name up",
            ),
            call(libc::SYS_readlink, "this program, in the trace of a panic"),
            call(libc::SYS_getcwd, "the directory, in the trace of a panic"),
        ],
    ),
];

/// Listening on a Unix socket.
pub const LISTENING: &[Call] = &[
    socket(libc::AF_UNIX, "sockets of ports that are added"),
    call(libc::SYS_fchmod, "their mode"),
    call(libc::SYS_bind, "their names"),
    call(libc::SYS_listen, "their queues"),
    call(libc::SYS_connect, "whether somebody listens there"),
    // Where Landlock lets the directory be opened.
    rare(call(libc::SYS_flock, "that one program at a time does so")),
];

/// Connecting to a Unix socket.
pub const CONNECTING: &[Call] = &[
    socket(libc::AF_UNIX, "a peer that listens, and is replaced"),
    call(libc::SYS_connect, "the same"),
];

/// Connecting to a server over TCP.
pub const TCP: &[Call] = &[
    internet(
        libc::AF_INET,
        libc::SOCK_STREAM,
        0,
        "a server that is replaced",
    ),
    rare(internet(
        libc::AF_INET6,
        libc::SOCK_STREAM,
        0,
        "a server that is replaced",
    )),
    call(libc::SYS_connect, "the same"),
];

/// Looking up names of hosts, by the C library.
pub const NAMES: &[Call] = &[
    rare(internet(libc::AF_INET, libc::SOCK_DGRAM, 0, "name servers")),
    rare(internet(
        libc::AF_INET6,
        libc::SOCK_DGRAM,
        0,
        "name servers",
    )),
    rare(internet(
        libc::AF_INET,
        libc::SOCK_DGRAM,
        libc::IPPROTO_UDP,
        "which address this host has towards another",
    )),
    rare(internet(
        libc::AF_INET6,
        libc::SOCK_DGRAM,
        libc::IPPROTO_UDP,
        "the same",
    )),
    rare(internet(
        libc::AF_INET,
        libc::SOCK_STREAM,
        0,
        "long answers of name servers",
    )),
    rare(internet(libc::AF_INET6, libc::SOCK_STREAM, 0, "the same")),
    rare(socket(libc::AF_UNIX, "a local cache of names")),
    rare(socket(
        libc::AF_NETLINK,
        "addresses of this host, to order those of another by",
    )),
    call(libc::SYS_connect, "name servers"),
    rare(call(libc::SYS_bind, "netlink")),
    rare(sends(libc::SYS_sendmmsg, 3, "questions to name servers")),
    call(libc::SYS_openat, "configuration"),
    rare(call(libc::SYS_fstat, "configuration")),
    rare(call(libc::SYS_newfstatat, "configuration")),
    rare(call(libc::SYS_lseek, "configuration")),
    rare(call(libc::SYS_uname, "the domain of this host")),
];

/// What says where name servers are.
pub const NAME_FILES: &[&str] = &[
    "/etc/resolv.conf",
    "/etc/hosts",
    "/etc/host.conf",
    "/etc/nsswitch.conf",
    "/etc/gai.conf",
    "/run/systemd/resolve",
];

/// A ring of io_uring that exists.
pub const URING: &[Call] = &[
    call(
        libc::SYS_io_uring_enter,
        "reading and writing the disk, waiting",
    ),
    call(libc::SYS_io_uring_register, "guest memory"),
];

/// Making one: io_uring has operations that no filter sees. `ringside-blk` restricts its rings before it uses them.
pub const URING_SETUP: &[Call] = &[call(libc::SYS_io_uring_setup, "a ring for each queue")];

/// Reading and writing files by offset.
pub const STORAGE: &[Call] = &[
    call(libc::SYS_pread64, "tables of an image"),
    rare(call(libc::SYS_pwrite64, "tables of an image")),
    call(libc::SYS_preadv, "data of an image"),
    call(libc::SYS_pwritev, "data of an image"),
    call(libc::SYS_fsync, "what is to be durable"),
    rare(call(libc::SYS_fdatasync, "what is to be durable")),
    call(libc::SYS_fallocate, "holes"),
    call(libc::SYS_ftruncate, "the size of an image"),
    call(libc::SYS_lseek, "holes"),
    call(libc::SYS_statx, "the size of an image"),
    rare(call(libc::SYS_fstat, "the size of an image")),
    call(libc::SYS_fstatfs, "an image that is opened once more"),
];

/// Sending and receiving on sockets that are connected.
pub const STREAMS: &[Call] = &[
    call(libc::SYS_recvmsg, "into guest memory"),
    sends(libc::SYS_sendmsg, 2, "from guest memory"),
    call(libc::SYS_recvfrom, "frames, answers"),
    sends(libc::SYS_sendto, 3, "frames, requests"),
    call(libc::SYS_readv, "into guest memory"),
    call(libc::SYS_getsockopt, "errors"),
    call(libc::SYS_setsockopt, "how long to wait for a peer"),
    call(libc::SYS_shutdown, "the end"),
    ioctl(libc::FIONBIO, "sockets that do not block"),
];

/// What a queue of a network card does with frames.
pub const FRAMES: &[Call] = &[
    call(libc::SYS_readv, "a frame into guest memory"),
    call(libc::SYS_recvmsg, "a frame into guest memory"),
    sends(libc::SYS_sendmsg, 2, "a frame from guest memory"),
    call(libc::SYS_recvfrom, "frames, and a ring of AF_XDP"),
    sends(libc::SYS_sendto, 3, "frames, and a ring of AF_XDP"),
];

/// A ring of io_uring that exists, and reads, writes and registers what is open, no more.
pub const BATCHES: &[Call] = &[call(
    libc::SYS_io_uring_enter,
    "many frames from or into guest memory",
)];

/// Asynchronous I/O, of a context that exists: it signals eventfds without waiting. It can read and write what is open, no more.
pub const SIGNALS: &[Call] = &[
    call(libc::SYS_io_submit, "an interrupt"),
    rare(call(libc::SYS_io_getevents, "room for more of them")),
    rare(call(libc::SYS_io_destroy, "the end")),
];

/// A packet socket.
pub const PACKET: &[Call] = &[
    rare(socket(libc::AF_PACKET, "a queue that is attached again")),
    call(libc::SYS_bind, "the same"),
    call(libc::SYS_setsockopt, "the same"),
    call(libc::SYS_getsockopt, "the same"),
];

/// BPF_MAP_UPDATE_ELEM and BPF_MAP_DELETE_ELEM (bpf(2)).
pub const BPF_MAPS: &[Call] = &[
    rare(only(
        libc::SYS_bpf,
        Only::Is(0, 2),
        "which packets go to which queue",
    )),
    rare(only(
        libc::SYS_bpf,
        Only::Is(0, 3),
        "which packets go to which queue",
    )),
];

/// A virtual machine: its processors, its memory, its interrupts.
pub const MACHINE: &[Call] = &[
    rare(call(libc::SYS_socketpair, "requests of a back-end")),
    rare(call(libc::SYS_pipe2, "the state of a back-end")),
    rare(call(libc::SYS_sysinfo, "how much memory the host has")),
    ioctls(0xae, "KVM"),
    call(
        libc::SYS_fallocate,
        "guest memory that is to be there from the start, or is added",
    ),
    call(libc::SYS_pread64, "registers of devices, boot images"),
    rare(call(libc::SYS_pwrite64, "registers of devices")),
    rare(ioctl(libc::TCGETS, "the terminal")),
    rare(ioctl(libc::TCSETS, "the terminal")),
    rare(ioctl(libc::TCSETSW, "the terminal")),
    rare(ioctl(libc::TCSETSF, "the terminal")),
];

/// Writing the state of a virtual machine into a file that gets its name when it is complete.
pub const SNAPSHOTS: &[Call] = &[
    rare(call(libc::SYS_fsync, "what is to be durable")),
    rare(call(libc::SYS_flock, "that no other process writes it")),
    rare(call(libc::SYS_rename, "its name")),
];

/// Assigned devices: VFIO and iommufd, whose requests share a letter.
pub const VFIO: &[Call] = &[
    only(
        libc::SYS_prlimit64,
        Only::Is(2, 0),
        "the limit of locked memory, in a message; it sets none",
    ),
    ioctls(b';', "VFIO, iommufd"),
    call(libc::SYS_readlink, "names of devices and groups"),
    call(libc::SYS_getdents64, "devices and groups"),
    call(libc::SYS_mkdir, "a name that has a token in it"),
    call(libc::SYS_symlink, "the same"),
    call(libc::SYS_openat, "the same, and device files"),
    call(libc::SYS_unlinkat, "the same"),
    call(libc::SYS_statx, "the same"),
    call(libc::SYS_newfstatat, "the same"),
    call(libc::SYS_fstat, "the same"),
    call(libc::SYS_flock, "the same"),
];

/// Ceph's librados and librbd, which are loaded before: threads, event loops, connections, their configuration and admin socket.
pub const CEPH: &[Call] = &[
    call(libc::SYS_accept, "the admin socket"),
    call(libc::SYS_access, "configuration"),
    call(libc::SYS_bind, "sockets of its own"),
    call(libc::SYS_dup, "descriptors"),
    call(libc::SYS_getcwd, "configuration"),
    call(libc::SYS_getdents64, "configuration"),
    call(libc::SYS_getegid, "configuration"),
    call(libc::SYS_geteuid, "configuration"),
    call(libc::SYS_getgid, "configuration"),
    call(libc::SYS_getuid, "configuration"),
    call(libc::SYS_getrusage, "statistics"),
    call(libc::SYS_gettimeofday, "time, where the vDSO has none"),
    call(libc::SYS_listen, "the admin socket"),
    call(libc::SYS_lstat, "configuration"),
    call(libc::SYS_open, "configuration"),
    call(libc::SYS_pipe2, "waking its threads"),
    call(libc::SYS_readlink, "configuration"),
    call(libc::SYS_readlinkat, "configuration"),
    // The C library names its threads by their numbers, which no filter can tell from those of others.
    call(libc::SYS_sched_setscheduler, "threads"),
    call(libc::SYS_sched_getparam, "threads"),
    call(libc::SYS_sched_getscheduler, "threads"),
    call(libc::SYS_set_tid_address, "threads"),
    call(libc::SYS_stat, "configuration"),
    call(libc::SYS_sysinfo, "sizes of caches"),
    call(libc::SYS_time, "time, where the vDSO has none"),
    call(libc::SYS_umask, "the admin socket"),
];

/// All of them, by their names.
pub const GROUPS: &[(&str, &[Call])] = &[
    ("RUNTIME", RUNTIME),
    ("EVENTS", EVENTS),
    ("SOCKETS", SOCKETS),
    ("TAKING_OVER", TAKING_OVER),
    ("FILES", FILES),
    ("OPENING", OPENING),
    ("LISTENING", LISTENING),
    ("CONNECTING", CONNECTING),
    ("TCP", TCP),
    ("NAMES", NAMES),
    ("URING", URING),
    ("URING_SETUP", URING_SETUP),
    ("STORAGE", STORAGE),
    ("STREAMS", STREAMS),
    ("FRAMES", FRAMES),
    ("BATCHES", BATCHES),
    ("SIGNALS", SIGNALS),
    ("PACKET", PACKET),
    ("BPF_MAPS", BPF_MAPS),
    ("MACHINE", MACHINE),
    ("SNAPSHOTS", SNAPSHOTS),
    ("VFIO", VFIO),
    ("CEPH", CEPH),
];

#[cfg(test)]
mod tests {
    use super::*;

    /// What is not among them escapes those who look at all.
    #[test]
    fn no_group_is_forgotten() {
        let defined = include_str!("calls.rs")
            .lines()
            .filter(|line| line.starts_with("pub const ") && line.contains(": &[Call]"));
        assert_eq!(defined.count(), GROUPS.len());
    }

    #[test]
    fn nothing_that_reaches_other_processes_is_kept() {
        let forbidden = [
            libc::SYS_execve,
            libc::SYS_execveat,
            libc::SYS_fork,
            libc::SYS_vfork,
            libc::SYS_kill,
            libc::SYS_tkill,
            libc::SYS_ptrace,
            libc::SYS_process_vm_readv,
            libc::SYS_process_vm_writev,
            libc::SYS_pidfd_open,
            libc::SYS_pidfd_getfd,
            libc::SYS_pidfd_send_signal,
            libc::SYS_mount,
            libc::SYS_unshare,
            libc::SYS_setns,
            libc::SYS_setuid,
            libc::SYS_pkey_mprotect,
            libc::SYS_memfd_secret,
        ];
        // Of these only some, and one entry without a condition would lift all others.
        let restricted = [
            libc::SYS_fcntl,
            libc::SYS_sched_setaffinity,
            libc::SYS_tgkill,
            libc::SYS_clone,
            libc::SYS_mprotect,
            libc::SYS_socket,
            libc::SYS_sendto,
            libc::SYS_sendmsg,
            libc::SYS_sendmmsg,
        ];
        for call in GROUPS.iter().flat_map(|(_, calls)| *calls) {
            assert!(!forbidden.contains(&call.number), "{call:?}");
            let any = call.only == Only::Always;
            assert!(!any || !restricted.contains(&call.number), "{call:?}");
            assert!(!call.why.is_empty(), "{call:?}");
        }
    }
}

//! What somebody finds who has taken a back-end over: a process confines itself as the program does, with the same device, and
//! then does what an intruder would. And what the kernel says about the programs themselves.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)] // a test

#[path = "../sandbox/tests/confinement/mod.rs"]
mod confinement;
mod frontend;
#[path = "../sandbox/tests/intruder/mod.rs"]
mod intruder;

use std::env;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::OnceLock;
use std::thread;

use clap::Parser;
use frontend::{Daemon, FrontEnd, Setup, nbd, own_network, skip};
use intruder::{
    Attempt, ENDED, LISTEN, OTHER_SOCKETS, REFUSED, SHELL, Services, TO_OTHER_PORT, TO_PORT,
    TO_SOCKET, Victim, attempt, but, call, ends, fails, intrude, landlock, services,
};
use io_uring::types::Fd;
use io_uring::{IoUring, opcode};
use nix::unistd::geteuid;
use ringside_backends::blk::{Blk, BlkArgs};
use ringside_backends::net::{Net, NetArgs, Switch, SwitchArgs};
use ringside_backends::shell::{Device, Hub, Parts, Program, ShellArgs, confine};
use ringside_sandbox::ThreadKind;
use seccompiler::{BpfProgram, SeccompAction, SeccompFilter, TargetArch, apply_filter};
use serde_json::json;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

const BLK: &str = env!("CARGO_BIN_EXE_ringside-blk");
const NET: &str = env!("CARGO_BIN_EXE_ringside-net");

/// Besides, on the thread of a disk's queue.
const ENDED_ON_QUEUES: &[(&str, Attempt)] = &[
    ("have a ring of its own", || IoUring::new(4).map(drop)),
    ("listen to front-ends", || {
        call(libc::SYS_accept4, [0, 0, 0])
    }),
    ("remove a file", || {
        call(libc::SYS_unlink, [SHELL.as_ptr().addr(), 0, 0])
    }),
];

/// Besides, where no service is connected to.
const CONNECT: &[(&str, Attempt)] = &[("connect to a service", || {
    UnixStream::connect("/run/ringside-intruder").map(drop)
})];

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

/// What the resolver of the C library reads.
const READ_NAMES: &[(&str, Attempt)] =
    &[("read names of hosts", || File::open("/etc/hosts").map(drop))];

/// Where a card asks for a passt, and who is asked: it ends by itself.
static STARTER: OnceLock<(UnixStream, Child)> = OnceLock::new();

/// Whatever is said there, a passt is started.
const START_PASST: &[(&str, Attempt)] = &[("have the starter start others", || {
    let mut starter = &STARTER.get().unwrap().0;
    // The card itself waits for no answer.
    starter.set_nonblocking(false)?;
    for request in [1, 0, b'/', 0xff] {
        starter.write_all(&[request])?;
        let (_, connection) = starter.recv_with_fd(&mut [0; 4])?;
        // It has begun then.
        UnixStream::from(OwnedFd::from(connection.unwrap())).read_exact(&mut [0])?;
    }
    Ok(())
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
    switch: SwitchArgs,
    #[command(flatten)]
    shell: ShellArgs,
}

fn program(kind: &'static str) -> Program {
    Program {
        name: "a back-end",
        kind,
        features: &[],
        hangup: "",
    }
}

fn confine_as(kind: &'static str, args: &ShellArgs, device: &impl Device) {
    confine(&program(kind), args, |profile| device.needs(profile)).unwrap();
}

/// The image of a profile with that name.
fn image(format: &str) -> PathBuf {
    Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("intruder.{format}"))
}

/// What each profile serves, besides a disk.
const CARDS: &[(&str, &[&str])] = &[
    ("net", &["--link", "null"]),
    ("tap", &["--tap", "ring0"]),
    ("packet", &["--link", "packet:lo"]),
    ("passt-started", &["--link", "passt"]),
];

/// Where a disk on a server of NBD is.
fn uri(profile: &str) -> Option<String> {
    let port = || services().port;
    Some(match profile {
        "nbd-unix" => format!("nbd+unix:///?socket={}", services().socket().display()),
        "nbd-tcp" => format!("nbd://127.0.0.1:{}", port()),
        "nbd-name" => format!("nbd://localhost:{}", port()),
        _ => return None,
    })
}

/// A card goes on with the passt of another program, and with what has started it: this program cannot be that itself.
fn take_passt_over(cli: &NetCli) -> Net {
    let pair = || UnixStream::pair().unwrap();
    let ((starter, theirs), (connection, _passt)) = (pair(), pair());
    let child = Command::new(NET)
        .args(["--start-passt", "--mtu", "1500"])
        .env("PATH", services().dir.join("bin"))
        .stdin(OwnedFd::from(theirs))
        .spawn()
        .unwrap();
    let asked = (starter.try_clone().unwrap(), child);
    STARTER.set(asked).unwrap();
    let parts = Parts {
        description: json!({"link": "passt", "mac": [2, 0, 0, 0, 0, 1], "offloads": 0, "attached": []}),
        descriptors: vec![starter.into(), connection.into()],
    };
    cli.net.open_as(Some(parts)).unwrap()
}

fn confine_profile(profile: &str) {
    let socket = env::temp_dir().join("ringside-confined");
    let args = ["x", "--socket-path", socket.to_str().unwrap()];
    let card = CARDS.iter().find(|(name, _)| *name == profile);
    if let Some((_, options)) = card {
        let cli = NetCli::parse_from([&args[..], options].concat());
        let card = match profile {
            "passt-started" => take_passt_over(&cli),
            _ => cli.net.open().unwrap(),
        };
        return confine_as("net", &cli.shell, &card);
    }
    if profile == "passt" {
        let link = format!("passt:{}", services().socket().display());
        let cli = NetCli::parse_from([&args[..], &["--link", &link]].concat());
        return confine_as("net", &cli.shell, &cli.net.open().unwrap());
    }
    if profile == "switch" {
        let ports = ["--link", "null", "--port", "socket=/run/none"];
        let cli = NetCli::parse_from([&args[..], &ports].concat());
        let switch = Switch::new(&cli.net, &cli.switch, None).unwrap();
        return confine(&program("net"), &cli.shell, |profile| switch.needs(profile)).unwrap();
    }
    let (image, uri) = (image(profile), uri(profile));
    let disk: &[&str] = match (profile, &uri) {
        ("blk", _) => &["--null", "1M"],
        ("blk-logged", _) => &["--null", "1M", "--sandbox", "log"],
        (_, Some(uri)) => &["--path", uri],
        (format, None) => &["--path", image.to_str().unwrap(), "--format", format],
    };
    let cli = BlkCli::parse_from([&args[..], disk].concat());
    confine_as("block", &cli.shell, &Blk::new(cli.blk.open().unwrap()));
}

/// The other side of [`intruder::attempt`].
#[test]
fn intruder() {
    let kinds = [
        ("queue", ThreadKind::Queue),
        ("helper", ThreadKind::Helper),
        ("server", ThreadKind::Server),
    ];
    let more = [
        ENDED_ON_QUEUES,
        CONNECT,
        REFUSED_BY_LANDLOCK,
        READ_NAMES,
        START_PASST,
    ];
    let more = more.concat();
    intrude(confine_profile, &kinds, &more);
}

#[test]
fn who_takes_a_disk_over_gets_nowhere() {
    ends_on("blk", &["control", "queue"], ENDED);
    if landlock(1) {
        fails("blk", "control", REFUSED_BY_LANDLOCK);
    } else {
        skip(
            "who_takes_a_disk_over_gets_nowhere",
            "this kernel has no Landlock",
        );
    }
}

#[test]
fn who_takes_a_file_over_gets_no_further() {
    let test = "who_takes_a_file_over_gets_no_further";
    File::create(image("raw"))
        .unwrap()
        .set_len(1 << 20)
        .unwrap();
    ends_on("raw", &["control", "queue"], ENDED);
    let mut create = Command::new("qemu-img");
    create
        .args(["create", "-q", "-f", "qcow2"])
        .arg(image("qcow2"));
    if create
        .arg("1M")
        .status()
        .is_ok_and(|status| status.success())
    {
        // Its helpers read and write the image's tables.
        ends_on("qcow2", &["control", "queue", "helper"], ENDED);
    } else {
        skip(test, "qemu-img is not installed (package qemu-utils)");
    }
}

fn ends_on(profile: &str, threads: &[&str], attempts: &[(&str, Attempt)]) {
    for thread in threads {
        ends(profile, thread, attempts);
        fails(profile, thread, REFUSED);
    }
    ends(profile, "queue", &[ENDED_ON_QUEUES, CONNECT].concat());
}

/// A program that connects to a service on a Unix socket does that, and what Landlock cannot yet keep it from.
fn reaches_sockets(victim: Victim<'_>, test: &str) {
    victim.does(TO_SOCKET);
    victim.keeps_from_other_sockets(|why| skip(test, why));
}

/// One that connects to a port does that.
fn reaches_a_port(victim: Victim<'_>, test: &str) {
    victim.does(TO_PORT);
    if landlock(4) {
        victim.fails(TO_OTHER_PORT);
    } else {
        skip(test, "ports of TCP take version 4 of Landlock");
    }
}

#[test]
fn who_takes_a_card_on_passt_over_reaches_sockets_alone() {
    let test = "who_takes_a_card_on_passt_over_reaches_sockets_alone";
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let services = Services::start(dir.path(), |_| Ok(()));
    for thread in ["control", "queue"] {
        let victim = Victim {
            profile: "passt",
            thread,
            services: Some(&services),
        };
        victim.ends(ENDED);
        victim.ends(&[LISTEN, OTHER_SOCKETS].concat());
        victim.fails(REFUSED);
        reaches_sockets(victim, test);
    }
    let queue = Victim {
        profile: "passt",
        thread: "queue",
        services: Some(&services),
    };
    queue.ends(ENDED_ON_QUEUES);
}

/// Who has taken the card over can have one passt after the other, with the arguments that were given.
#[test]
fn who_takes_a_card_over_that_starts_passt_gets_another_passt() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let services = Services::start(dir.path(), |_| Ok(()));
    let (passt, started) = (dir.path().join("bin/passt"), dir.path().join("started"));
    fs::create_dir(dir.path().join("bin")).unwrap();
    let script = format!(
        "#!/bin/sh\necho \"$0 $*\" >>{}; echo >&0; exec /bin/sleep 100\n",
        started.display()
    );
    fs::write(&passt, script).unwrap();
    fs::set_permissions(&passt, fs::Permissions::from_mode(0o755)).unwrap();
    for thread in ["control", "queue"] {
        let victim = Victim {
            profile: "passt-started",
            thread,
            services: Some(&services),
        };
        victim.ends(ENDED);
        victim.ends(&[LISTEN, OTHER_SOCKETS].concat());
        victim.ends(TO_SOCKET);
        victim.fails(REFUSED);
        victim.does(START_PASST);
        if thread == "queue" {
            victim.ends(ENDED_ON_QUEUES);
        }
    }
    let started = fs::read_to_string(started).unwrap();
    let line = format!("{} --foreground --quiet --fd 0 --mtu 1500", passt.display());
    assert_eq!(started.lines().collect::<Vec<_>>(), [line.as_str(); 8]);
}

#[test]
fn who_takes_a_disk_of_a_server_over_reaches_the_server_alone() {
    let test = "who_takes_a_disk_of_a_server_over_reaches_the_server_alone";
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let services = Services::start(dir.path(), |stream| nbd::greet(stream, false));
    let victim = |profile, thread| Victim {
        profile,
        thread,
        services: Some(&services),
    };
    let but_tcp = but(ENDED, &["connect out"]);
    for thread in ["control", "server"] {
        let unix = victim("nbd-unix", thread);
        unix.ends(ENDED);
        unix.ends(&[LISTEN, OTHER_SOCKETS].concat());
        unix.fails(REFUSED);
        reaches_sockets(unix, test);

        let tcp = victim("nbd-tcp", thread);
        tcp.ends(&but_tcp);
        tcp.ends(&[LISTEN, OTHER_SOCKETS, TO_SOCKET].concat());
        tcp.fails(REFUSED);
        reaches_a_port(tcp, test);

        // Besides, the resolver's files and sockets.
        let name = victim("nbd-name", thread);
        name.ends(&but_tcp);
        name.ends(&but(
            OTHER_SOCKETS,
            &["send datagrams", "change the host's network"],
        ));
        name.does(READ_NAMES);
        if landlock(1) {
            name.fails(REFUSED);
        }
        if landlock(4) {
            name.fails(LISTEN);
        }
        reaches_a_port(name, test);
    }
    for profile in ["nbd-unix", "nbd-tcp", "nbd-name"] {
        let queue = victim(profile, "queue");
        queue.ends(ENDED);
        queue.ends(&[ENDED_ON_QUEUES, LISTEN, OTHER_SOCKETS, TO_SOCKET, TO_PORT].concat());
        queue.fails(REFUSED);
        victim(profile, "server").ends(ENDED_ON_QUEUES);
        if landlock(1) {
            victim(profile, "control").fails(REFUSED_BY_LANDLOCK);
        }
    }
}

#[test]
fn who_takes_a_network_card_over_gets_nowhere() {
    for card in ["net", "switch"] {
        ends_on(card, &["control", "queue"], ENDED);
    }
    if own_network("who_takes_a_network_card_over_gets_nowhere") {
        for card in ["tap", "packet"] {
            ends_on(card, &["control", "queue"], ENDED);
        }
    }
}

/// CAP_BPF, as a bit of a set (linux/capability.h).
const BPF: u64 = 1 << 39;

/// Checks what the kernel says about each thread of a program: `kept` are its capabilities, if it has them, and `narrowed` the names of
/// the threads that have given up more than it has.
fn is_confined(daemon: &Daemon, kept: u64, narrowed: &[&str], test: &str) {
    let skip = |why: &str| skip(test, why);
    confinement::is_confined(daemon.id(), kept, skip);
    confinement::are_narrowed(daemon.id(), narrowed, skip);
}

#[test]
fn a_disk_is_confined_when_it_is_ready() {
    let test = "a_disk_is_confined_when_it_is_ready";
    let image = tempfile::NamedTempFile::new().unwrap();
    image.as_file().set_len(1 << 20).unwrap();
    let path = image.path().to_str().unwrap();
    let daemon = Daemon::start(BLK, &["--path", path, "--queues", "2"]);
    is_confined(&daemon, 0, &["blk-queue-0", "blk-queue-1"], test);
}

#[test]
fn a_disk_of_a_server_is_confined_when_it_is_ready() {
    let test = "a_disk_of_a_server_is_confined_when_it_is_ready";
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let services = Services::start(dir.path(), |stream| {
        nbd::greet(stream, false)?;
        // Until it leaves.
        stream.read(&mut [0]).map(drop)
    });
    let uri = format!("nbd+unix:///?socket={}", services.socket().display());
    let daemon = Daemon::start(BLK, &["--path", &uri]);
    is_confined(&daemon, 0, &["blk-nbd-0", "blk-queue-0"], test);
}

#[test]
fn a_disk_in_an_image_is_confined_when_it_is_ready() {
    let test = "a_disk_in_an_image_is_confined_when_it_is_ready";
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let image = dir.path().join("image");
    let mut create = Command::new("qemu-img");
    create.args(["create", "-q", "-f", "qcow2"]).arg(&image);
    if !create.arg("1M").status().is_ok_and(|s| s.success()) {
        return skip(test, "qemu-img is not installed (package qemu-utils)");
    }
    let path = image.to_str().unwrap();
    let daemon = Daemon::start(BLK, &["--path", path, "--format", "qcow2"]);
    is_confined(&daemon, 0, &["blk-image", "blk-queue-0"], test);
}

#[test]
fn a_network_card_is_confined_when_it_is_ready() {
    let test = "a_network_card_is_confined_when_it_is_ready";
    if own_network(test) {
        let daemon = Daemon::start(NET, &["--tap", "vm0", "--queue-pairs", "2"]);
        // For the guest's table of queues.
        let narrowed = ["net-control", "net-pair0", "net-pair1"];
        is_confined(&daemon, BPF, &narrowed, test);
    }
}

#[test]
fn a_switch_is_confined_when_it_is_ready() {
    let test = "a_switch_is_confined_when_it_is_ready";
    let dir = tempfile::tempdir().unwrap();
    let mut command = Command::new(NET);
    for name in ["a", "b"] {
        let socket = dir.path().join(name);
        let port = format!("socket={},name={name}", socket.display());
        command.arg("--port").arg(port);
    }
    let daemon = Daemon::spawn_command(&mut command, dir);
    daemon.wait_for_socket();
    let narrowed = ["a-control", "b-control", "switch"];
    is_confined(&daemon, 0, &narrowed, test);
}

#[test]
fn guest_memory_is_in_no_dump() {
    let test = "guest_memory_is_in_no_dump";
    for (program, device) in [(BLK, ["--null", "1M"]), (NET, ["--link", "null"])] {
        for slots in [false, true] {
            for mode in ["on", "off"] {
                let daemon = Daemon::start(program, &[&device[..], &["--sandbox", mode]].concat());
                let setup = Setup {
                    slots,
                    ..Setup::default()
                };
                let _front = FrontEnd::new(&daemon.socket(), setup);
                confinement::is_in_no_dump(daemon.id(), "guest", |why| skip(test, why));
            }
        }
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
    assert_eq!(confinement::field(&status, "Seccomp").unwrap(), "0");
    assert!(daemon.log().contains("is not confined (--sandbox=off)"));
}

/// A kernel, or a container, that lets a program confine itself in nothing.
fn hinder(command: &mut Command) {
    let refused = [
        libc::SYS_seccomp,
        libc::SYS_landlock_create_ruleset,
        libc::SYS_unshare,
        libc::SYS_capset,
    ];
    let rules = refused.map(|number| (number, Vec::new())).into();
    let denied = SeccompAction::Errno(libc::EPERM.unsigned_abs());
    let arch = TargetArch::x86_64;
    let filter = SeccompFilter::new(rules, SeccompAction::Allow, denied, arch).unwrap();
    let filter: BpfProgram = filter.try_into().unwrap();
    let apply = move || apply_filter(&filter).map_err(io::Error::other);
    // SAFETY: it makes two system calls, and allocates only if they fail.
    unsafe { command.pre_exec(apply) };
}

#[test]
fn a_kernel_that_lacks_it_is_told_of() {
    for (mode, starts) in [("on", true), ("strict", false)] {
        let dir = tempfile::tempdir().unwrap();
        let mut command = Command::new(BLK);
        command.arg("--socket-path").arg(dir.path().join("s"));
        command.args(["--null", "1M", "--sandbox", mode]);
        hinder(&mut command);
        let mut daemon = Daemon::spawn_command(&mut command, dir);
        if starts {
            daemon.wait_for_socket();
            for lacks in [
                "privileges cannot be dropped",
                "the files that can be opened cannot be restricted",
                "system calls cannot be restricted",
            ] {
                assert!(daemon.log().contains(lacks), "{}", daemon.log());
            }
        } else {
            assert_eq!(daemon.wait().code(), Some(1));
            assert!(daemon.log().contains("privileges cannot be dropped"));
        }
    }
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

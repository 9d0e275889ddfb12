//! `ringside-blk` with NBD servers: QEMU's and nbdkit, some that come and go, and hostile ones.

#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation
)] // helpers of tests: a panic is how they fail

mod frontend;

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc;
use std::thread::{self, sleep};
use std::time::{Duration, Instant};

use frontend::disk::{DISCARD, Disk, FLUSH, IN, OK, OUT, ROOM};
use frontend::nbd::greet;
use frontend::{Daemon, FrontEnd, PATIENCE, REGION, SECOND, Setup, own_network, skip};
use ringside_rings::Segment;
use vm_memory::{Bytes, GuestAddress};

const BLK: &str = env!("CARGO_BIN_EXE_ringside-blk");
const MIB: usize = 1 << 20;
const IOERR: u8 = 1;

/// A server in a directory with a socket `s` and a file `disk` of 16 MiB, ended when dropped.
struct Server {
    dir: tempfile::TempDir,
    child: Child,
    program: &'static str,
    args: Vec<String>,
}

impl Server {
    /// QEMU's, of the file, under the name "disk"; `None`, and a word on standard error, if there is none.
    fn new(test: &str, args: &[&str]) -> Option<Self> {
        let all = ["-f", "raw", "-x", "disk", "-t", "--discard=unmap"];
        Self::start(
            test,
            ("qemu-nbd", "qemu-utils"),
            &[&all, args, &["disk"]].concat(),
        )
    }

    /// nbdkit, with these filters and this plugin; `None`, and a word on standard error, if there is none.
    fn nbdkit(test: &str, args: &[&str]) -> Option<Self> {
        let all = [&["-f", "-U", "s"], args].concat();
        Self::start(test, ("nbdkit", "nbdkit"), &all)
    }

    fn start(test: &str, (program, package): (&'static str, &str), args: &[&str]) -> Option<Self> {
        if Command::new(program).arg("--version").output().is_err() {
            skip(
                test,
                format_args!("{program} is not installed (package {package})"),
            );
            return None;
        }
        let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let disk = fs::File::create(dir.path().join("disk")).unwrap();
        disk.set_len(16 << 20).unwrap();
        let args: Vec<String> = args.iter().map(ToString::to_string).collect();
        let child = Self::spawn(&dir, program, &args);
        Some(Self {
            dir,
            child,
            program,
            args,
        })
    }

    fn spawn(dir: &tempfile::TempDir, program: &str, args: &[String]) -> Child {
        let socket = dir.path().join("s");
        let mut command = Command::new(program);
        command.args(args).current_dir(dir.path());
        let tcp = args.iter().any(|arg| arg == "-p");
        if program == "qemu-nbd" && !tcp {
            command.arg("-k").arg(&socket);
        }
        let child = command.stdin(Stdio::null()).spawn().unwrap();
        if tcp {
            // Nothing shows when it listens but a connection, which some tests count.
            sleep(Duration::from_secs(1));
        }
        let start = Instant::now();
        while !tcp && !socket.exists() {
            assert!(start.elapsed() < PATIENCE, "{program} does not listen");
            sleep(Duration::from_millis(10));
        }
        // From its name to its queue.
        sleep(Duration::from_millis(50));
        child
    }

    fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    fn restart(&mut self) {
        let _ = fs::remove_file(self.dir.path().join("s"));
        self.child = Self::spawn(&self.dir, self.program, &self.args);
    }

    fn uri(&self) -> String {
        format!(
            "nbd+unix:///disk?socket={}",
            self.dir.path().join("s").display()
        )
    }

    fn disk(&self) -> Vec<u8> {
        fs::read(self.dir.path().join("disk")).unwrap()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn serve(uri: &str, args: &[&str]) -> Daemon {
    Daemon::start(BLK, &[&["--path", uri], args].concat())
}

fn refusal(uri: &str, args: &[&str]) -> String {
    let (code, log) = Daemon::spawn(BLK, &[&["--path", uri], args].concat()).outcome();
    assert_eq!(code, Some(1), "{log}");
    log
}

fn connect(daemon: &Daemon, queues: usize, model: Vec<u8>) -> Disk {
    let setup = Setup {
        queues,
        ..Setup::default()
    };
    Disk::new(FrontEnd::new(&daemon.socket(), setup), model)
}

#[test]
fn random_requests_leave_what_they_wrote() {
    let test = "random_requests_leave_what_they_wrote";
    // One connection for each queue, and one for all.
    for shared in ["--shared=4", "--shared=1"] {
        let Some(server) = Server::new(test, &[shared]) else {
            return;
        };
        let daemon = serve(&server.uri(), &["--queues", "3"]);
        let mut disk = connect(&daemon, 3, vec![0; 16 * MIB]);
        disk.exercise(2000, true);
        disk.verify();
        disk.flush();
        assert!(server.disk() == disk.model);
        drop(disk);
        daemon.assert_idle();
        daemon.stop();
    }
}

#[test]
fn an_export_is_found_over_tcp_and_by_writethrough() {
    let test = "an_export_is_found_over_tcp_and_by_writethrough";
    if !own_network(test) {
        return;
    }
    let up = Command::new("ip")
        .args(["link", "set", "lo", "up"])
        .status();
    if !up.is_ok_and(|status| status.success()) {
        skip(test, "the loopback device cannot be set up with ip");
        return;
    }
    let Some(server) = Server::new(test, &["-b", "127.0.0.1", "-p", "10809", "--shared=0"]) else {
        return;
    };
    let daemon = serve(
        "nbd://localhost/disk",
        &["--cache", "writethrough", "--queues", "2"],
    );
    let mut disk = connect(&daemon, 2, vec![0; 16 * MIB]);
    disk.exercise(500, true);
    disk.verify();
    assert!(server.disk() == disk.model);
    drop(disk);
    daemon.stop();
}

#[test]
fn requests_outlive_a_server_that_comes_back() {
    let test = "requests_outlive_a_server_that_comes_back";
    let Some(mut server) = Server::new(test, &["--shared=4"]) else {
        return;
    };
    let daemon = serve(&server.uri(), &["--queues", "2"]);
    let mut disk = connect(&daemon, 2, vec![0; 16 * MIB]);
    for _ in 0..4 {
        disk.exercise(200, true);
        // Requests are in flight when it goes.
        thread::scope(|scope| {
            scope.spawn(|| {
                sleep(Duration::from_millis(20));
                server.kill();
                sleep(Duration::from_millis(200));
                server.restart();
            });
            let start = Instant::now();
            while start.elapsed() < Duration::from_millis(800) {
                disk.exercise(50, true);
            }
        });
    }
    disk.verify();
    assert!(daemon.log().contains("connected to"), "{}", daemon.log());
    assert!(server.disk() == disk.model);
    drop(disk);
    daemon.stop();
}

/// Connections go from program to program; a server that serves one client, and one that serves several, notice nothing.
#[test]
fn an_export_goes_from_program_to_program() {
    let test = "an_export_goes_from_program_to_program";
    for shared in ["--shared=1", "--shared=8"] {
        let Some(server) = Server::new(test, &[shared]) else {
            return;
        };
        let uri = server.uri();
        let args = ["--path", &uri, "--queues", "2"];
        let mut daemon = Daemon::start_controlled(BLK, &args);
        let mut disk = connect(&daemon, 2, vec![0; 16 * MIB]);
        for upgrade in 0..20 {
            disk.load(60, true);
            if upgrade % 5 == 0 {
                let otherwise = [&args[..], &["--physical-block-size", "8192"]].concat();
                let elsewhere = uri.replace("/disk?", "/other?");
                let elsewhere = ["--path", &elsewhere, "--queues", "2"];
                for (other, why) in [
                    (&otherwise[..], "configuration space"),
                    (&elsewhere, "start it with the same --path"),
                ] {
                    let mut child = daemon.successor(BLK, other);
                    assert_eq!(child.wait().unwrap().code(), Some(1));
                    let log = daemon.log();
                    assert!(log.contains(why), "{log}");
                    disk.load(60, true);
                }
            }
            daemon.upgrade(BLK, &args);
            assert!(!daemon.log().contains("lost"), "{}", daemon.log());
        }
        disk.exercise(60, true);
        assert!(!daemon.log().contains("lost"), "{}", daemon.log());
        disk.verify();
        disk.flush();
        daemon.stop();
        assert!(server.disk() == disk.model);
    }
}

/// GET_VRING_BASE_SKIP_DRAIN: what waits for a server that is gone is left in flight, and served where the ring starts next: in the same
/// program, or in another one that gets the notes.
#[test]
fn requests_that_wait_go_where_the_ring_goes() {
    let test = "requests_that_wait_go_where_the_ring_goes";
    for packed in [false, true] {
        let Some(mut server) = Server::new(test, &["--shared=8"]) else {
            return;
        };
        let mut daemon = serve(&server.uri(), &["--queues", "2"]);
        let setup = Setup {
            queues: 2,
            packed,
            tracked: true,
            ..Setup::default()
        };
        let mut front = FrontEnd::new(&daemon.socket(), setup);
        front.raw.accept_skip_drain();
        let mut disk = Disk::new(front, vec![0; 16 * MIB]);
        for round in 0..4 {
            disk.exercise(60, true);
            server.kill();
            disk.load(12, true);
            let start = Instant::now();
            while !packed && noted(&disk) == 0 {
                assert!(start.elapsed() < PATIENCE, "no request was taken");
                sleep(Duration::from_millis(1));
            }
            let waiting = [0, 1].map(|index| disk.front.raw.skip_drain(index));
            if !packed {
                assert_ne!(noted(&disk), 0, "all requests have ended");
            }
            if round % 2 == 0 {
                server.restart();
                for (index, base) in waiting.into_iter().enumerate() {
                    disk.front.start(index, base);
                }
            } else {
                daemon.stop();
                server.restart();
                daemon = serve(&server.uri(), &["--queues", "2"]);
                disk.front.hand_over(&daemon.socket());
                disk.front.raw.accept_skip_drain();
            }
            disk.drain();
            if !packed {
                assert_eq!(noted(&disk), 0);
            }
        }
        // With a server there is nothing to wait for long.
        disk.load(12, true);
        let bases = [0, 1].map(|index| disk.front.raw.skip_drain(index));
        for (index, base) in bases.into_iter().enumerate() {
            disk.front.start(index, base);
        }
        disk.verify();
        daemon.stop();
        assert!(server.disk() == disk.model);
    }
}

/// A request of several parts is suspended between them.
#[test]
fn the_next_part_of_a_request_is_not_waited_for() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let listener = UnixListener::bind(&path).unwrap();
    let ((asked, was_asked), (answer, may_answer)) = (mpsc::channel(), mpsc::channel());
    // It answers once.
    thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        greet(&mut stream, false).unwrap();
        let (_, cookie, _, _) = request(&mut stream).unwrap();
        asked.send(()).unwrap();
        may_answer.recv().unwrap();
        stream.write_all(&simple(0, cookie)).unwrap();
        let _ = stream.read_to_end(&mut Vec::new());
    });
    let daemon = serve(&format!("nbd+unix:///?socket={}", path.display()), &[]);
    let setup = Setup {
        tracked: true,
        ..Setup::default()
    };
    let mut front = FrontEnd::new(&daemon.socket(), setup);
    front.raw.accept_skip_drain();
    let (head, ranges) = (front.guest.alloc(16, 16), front.guest.alloc(32, 16));
    let status = front.guest.alloc(1, 16);
    let memory = &front.guest.memory;
    memory.write_slice(&[0; 16], head).unwrap();
    memory.write_obj(DISCARD, head).unwrap();
    for (number, sector) in (0..).zip([0_u64, 64]) {
        let range = [&sector.to_le_bytes()[..], &8_u32.to_le_bytes(), &[0; 4]].concat();
        let at = GuestAddress(ranges.0 + 16 * number);
        memory.write_slice(&range, at).unwrap();
    }
    let readable = [Segment::new(head, 16), Segment::new(ranges, 32)];
    front.queues[0].submit(&front.guest, &readable, &[Segment::new(status, 1)], 1);
    was_asked.recv().unwrap();
    thread::scope(|scope| {
        scope.spawn(|| {
            sleep(Duration::from_millis(100));
            answer.send(()).unwrap();
        });
        // One that was taken, and is not used.
        assert_eq!(front.raw.skip_drain(0), 1);
    });
    let used = front.queues[0].ring.layout().used_ring();
    let used: u16 = front
        .guest
        .memory
        .read_obj(GuestAddress(used.0 + 2))
        .unwrap();
    assert_eq!(used, 0);
    drop(front);
    daemon.stop();
}

/// How many requests of a disk with split rings are noted as in flight (vhost-user, `QueueRegionSplit`).
fn noted(disk: &Disk) -> usize {
    let (area, file) = disk.front.inflight.as_ref().unwrap();
    let mut notes = vec![0; area.mmap_size as usize];
    file.read_exact_at(&mut notes, area.mmap_offset).unwrap();
    let each = notes.len() / usize::from(area.num_queues) / 64 * 64;
    let entries = notes
        .chunks_exact(each)
        .flat_map(|queue| queue[16..].chunks_exact(16).take(64));
    entries.filter(|entry| entry[0] == 1).count()
}

#[test]
fn requests_fail_when_a_server_stays_away() {
    let test = "requests_fail_when_a_server_stays_away";
    let Some(mut server) = Server::new(test, &[]) else {
        return;
    };
    let daemon = serve(&server.uri(), &["--reconnect-timeout", "1"]);
    let mut disk = connect(&daemon, 1, vec![0; 16 * MIB]);
    assert_eq!(disk.attempt(OUT, 0, 4096), OK);
    server.kill();
    let start = Instant::now();
    assert_eq!(disk.attempt(OUT, 0, 4096), IOERR);
    let waited = start.elapsed();
    assert!(
        waited > Duration::from_millis(900) && waited < PATIENCE,
        "{waited:?}"
    );
    // From now on they do not wait.
    let start = Instant::now();
    assert_eq!(disk.attempt(IN, 0, 4096), IOERR);
    assert!(start.elapsed() < Duration::from_millis(900));
    daemon.assert_idle();
    server.restart();
    let start = Instant::now();
    while disk.attempt(IN, 0, 4096) != OK {
        assert!(start.elapsed() < PATIENCE, "does not come back");
        sleep(Duration::from_millis(50));
    }
    server.kill();
    drop(disk);
    daemon.stop();
}

#[test]
fn a_server_that_wants_one_client_by_now_does_not_get_several() {
    let test = "a_server_that_wants_one_client_by_now_does_not_get_several";
    let Some(mut server) = Server::new(test, &["--shared=4"]) else {
        return;
    };
    let allow = |server: &mut Server, clients: &str| {
        server.kill();
        let shared = |arg: &&mut String| arg.starts_with("--shared=");
        *server.args.iter_mut().find(shared).unwrap() = format!("--shared={clients}");
        server.restart();
    };
    for (queues, status) in [("1", OK), ("2", IOERR)] {
        allow(&mut server, "4");
        let args = ["--queues", queues, "--reconnect-timeout", "1"];
        let daemon = serve(&server.uri(), &args);
        let mut disk = connect(&daemon, 1, vec![0; 16 * MIB]);
        assert_eq!(disk.attempt(OUT, 0, 4096), OK);
        allow(&mut server, "1");
        assert_eq!(disk.attempt(OUT, 0, 4096), status, "{queues} queues");
        if status != OK {
            assert!(
                daemon.log().contains("wants one client"),
                "{}",
                daemon.log()
            );
            allow(&mut server, "4");
            let start = Instant::now();
            while disk.attempt(OUT, 0, 4096) != OK {
                assert!(start.elapsed() < PATIENCE, "does not come back");
                sleep(Duration::from_millis(50));
            }
        }
        drop(disk);
        daemon.stop();
    }
}

#[test]
fn a_drain_does_not_wait_for_a_server_that_is_gone() {
    let test = "a_drain_does_not_wait_for_a_server_that_is_gone";
    let Some(mut server) = Server::new(test, &[]) else {
        return;
    };
    let control = server.dir.path().join("c");
    let args = ["--control-socket", &control.display().to_string()];
    let daemon = serve(&server.uri(), &args);
    let drain = || {
        let arguments = serde_json::json!({"timeout": 1});
        ringside_control::client::call(&control, "drain", &arguments).unwrap()
    };
    server.kill();
    let start = Instant::now();
    let error = drain().unwrap_err();
    assert!(start.elapsed() < Duration::from_secs(5));
    assert!(
        error.message.contains("not durable yet after 1 s"),
        "{error:?}"
    );
    assert!(error.message.contains("goes on"), "{error:?}");
    server.restart();
    let start = Instant::now();
    while drain().is_err() {
        assert!(start.elapsed() < PATIENCE, "{}", daemon.log());
    }
    daemon.stop();
}

#[test]
fn nbdkit_is_served_from_memory_and_from_a_file() {
    let test = "nbdkit_is_served_from_memory_and_from_a_file";
    for (plugin, queues) in [(["memory", "16M"], 1), (["file", "disk"], 3)] {
        let Some(server) = Server::nbdkit(test, &plugin) else {
            return;
        };
        let daemon = serve(&server.uri(), &["--queues", "3"]);
        let mut disk = connect(&daemon, queues, vec![0; 16 * MIB]);
        disk.exercise(2000, true);
        disk.verify();
        disk.flush();
        assert!(plugin == ["memory", "16M"] || server.disk() == disk.model);
        drop(disk);
        daemon.assert_idle();
        daemon.stop();
    }
}

#[test]
fn errors_of_nbdkit_reach_the_guest_and_are_over_when_they_are_over() {
    let test = "errors_of_nbdkit_reach_the_guest_and_are_over_when_they_are_over";
    let args = [
        "--filter=error",
        "memory",
        "16M",
        "error-file=fail",
        "error-pread=EIO",
        "error-pread-rate=50%",
        "error-pwrite=ENOSPC",
        "error-pwrite-rate=50%",
    ];
    let Some(server) = Server::nbdkit(test, &args) else {
        return;
    };
    let daemon = serve(&server.uri(), &[]);
    let mut disk = connect(&daemon, 1, vec![0; 16 * MIB]);
    disk.exercise(500, true);
    fs::write(server.dir.path().join("fail"), "").unwrap();
    // Of errors that follow each other, the first few are logged: one of a write, too.
    while disk.attempt(OUT, 0, 65536) == OK {}
    let mut failed = 1;
    for block in 0..100 {
        let at = block * 65536;
        while disk.attempt(OUT, at, 65536) != OK {
            failed += 1;
        }
        while disk.attempt(IN, at, 4096) != OK {
            failed += 1;
        }
        disk.model[at as usize..][..65536].fill(0x5a);
    }
    assert!((40..1000).contains(&failed), "{failed} of some 400 failed");
    assert!(daemon.log().contains("No space left"), "{}", daemon.log());
    assert!(!daemon.log().contains("lost"), "{}", daemon.log());
    fs::remove_file(server.dir.path().join("fail")).unwrap();
    disk.verify();
    disk.exercise(200, true);
    disk.verify();
    drop(disk);
    daemon.stop();
}

#[test]
fn requests_to_a_slow_server_wait_together_and_outlive_it() {
    let test = "requests_to_a_slow_server_wait_together_and_outlive_it";
    let args = [
        "--filter=delay",
        "file",
        "disk",
        "rdelay=30ms",
        "wdelay=30ms",
    ];
    let Some(mut server) = Server::nbdkit(test, &args) else {
        return;
    };
    let daemon = serve(&server.uri(), &["--queues", "2"]);
    let mut disk = connect(&daemon, 2, vec![0; 16 * MIB]);
    let start = Instant::now();
    disk.exercise(200, false);
    // One after the other they would take 6 s.
    let taken = start.elapsed();
    assert!(taken < Duration::from_secs(3), "{taken:?}");
    for _ in 0..3 {
        // On this thread: nbdkit ends when the thread ends that started it.
        thread::scope(|scope| {
            scope.spawn(|| disk.exercise(200, true));
            sleep(Duration::from_millis(100));
            server.kill();
            sleep(Duration::from_millis(200));
            server.restart();
        });
    }
    disk.verify();
    assert!(daemon.log().contains("connected to"), "{}", daemon.log());
    assert!(server.disk() == disk.model);
    drop(disk);
    daemon.stop();
}

#[test]
fn what_cannot_be_served_is_refused_with_a_reason() {
    let test = "what_cannot_be_served_is_refused_with_a_reason";
    let Some(server) = Server::new(test, &["-r", "--shared=4"]) else {
        return;
    };
    assert!(refusal(&server.uri(), &[]).contains("use --read-only"));
    serve(&server.uri(), &["--read-only"]).stop();
    let other = server.uri().replace("/disk?", "/other?");
    assert!(refusal(&other, &["--read-only"]).contains("no such export"));
    let qcow2 = ["--read-only", "--format", "qcow2"];
    assert!(refusal(&server.uri(), &qcow2).contains("let the server open the image"));
    let nobody: PathBuf = server.dir.path().join("nobody");
    let nobody = format!("nbd+unix:///?socket={}", nobody.display());
    assert!(refusal(&nobody, &[]).contains("connection failed"));
    assert!(refusal("nbds://h/x", &[]).contains("no TLS"));
}

/// A server of one connection after the other, that answers each request by `answer`, given its type, cookie, offset and
/// length.
fn hostile(
    listener: UnixListener,
    structured: bool,
    answer: impl Fn(u16, u64, u64, u32) -> Vec<u8> + Send + 'static,
) {
    thread::spawn(move || {
        for stream in listener.incoming() {
            let _ = converse(&mut stream.unwrap(), structured, &answer);
        }
    });
}

fn converse(
    stream: &mut UnixStream,
    structured: bool,
    answer: &dyn Fn(u16, u64, u64, u32) -> Vec<u8>,
) -> std::io::Result<()> {
    greet(stream, structured)?;
    loop {
        let (kind, cookie, offset, len) = request(stream)?;
        if kind == 1 {
            stream.read_exact(&mut vec![0; len as usize])?;
        }
        stream.write_all(&answer(kind, cookie, offset, len))?;
    }
}

/// Type, cookie, offset and length of the next request.
fn request(stream: &mut UnixStream) -> std::io::Result<(u16, u64, u64, u32)> {
    let mut head = [0; 28];
    stream.read_exact(&mut head)?;
    assert_eq!(head[..4], 0x2560_9513_u32.to_be_bytes());
    let kind = u16::from_be_bytes(head[6..8].try_into().unwrap());
    let cookie = u64::from_be_bytes(head[8..16].try_into().unwrap());
    let offset = u64::from_be_bytes(head[16..24].try_into().unwrap());
    let len = u32::from_be_bytes(head[24..].try_into().unwrap());
    Ok((kind, cookie, offset, len))
}

fn simple(error: u32, cookie: u64) -> Vec<u8> {
    let mut bytes = 0x6744_6698_u32.to_be_bytes().to_vec();
    bytes.extend(error.to_be_bytes());
    bytes.extend(cookie.to_be_bytes());
    bytes
}

fn chunk(flags: u16, kind: u16, cookie: u64, data: &[u8]) -> Vec<u8> {
    let mut bytes = 0x668e_33ef_u32.to_be_bytes().to_vec();
    bytes.extend(flags.to_be_bytes());
    bytes.extend(kind.to_be_bytes());
    bytes.extend(cookie.to_be_bytes());
    bytes.extend((data.len() as u32).to_be_bytes());
    bytes.extend(data);
    bytes
}

#[test]
fn a_server_that_breaks_the_protocol_gets_no_further() {
    type Answer = fn(u16, u64, u64, u32) -> Vec<u8>;
    let cases: [(&str, bool, Answer); 14] = [
        ("nothing but noise", false, |_, _, _, _| vec![0xaa; 64]),
        ("another cookie", false, |_, cookie, _, _| {
            simple(0, cookie ^ 1)
        }),
        ("another generation", false, |_, cookie, _, _| {
            simple(0, cookie ^ 1 << 40)
        }),
        ("a chunk not asked for", false, |_, cookie, _, _| {
            chunk(1, 0, cookie, &[])
        }),
        ("no answer at all", true, |_, _, _, _| Vec::new()),
        ("simple for a read", true, |_, cookie, _, _| {
            simple(0, cookie)
        }),
        ("no data", true, |_, cookie, _, _| chunk(1, 0, cookie, &[])),
        ("less data", true, |_, cookie, offset, _| {
            chunk(
                1,
                1,
                cookie,
                &[&offset.to_be_bytes()[..], &[7; 512]].concat(),
            )
        }),
        ("more data", true, |_, cookie, offset, len| {
            chunk(
                1,
                1,
                cookie,
                &[&offset.to_be_bytes()[..], &vec![7; len as usize + 1]].concat(),
            )
        }),
        ("data before", true, |_, cookie, offset, len| {
            chunk(
                1,
                1,
                cookie,
                &[&(offset - 1).to_be_bytes()[..], &vec![7; len as usize]].concat(),
            )
        }),
        ("data twice", true, |_, cookie, offset, len| {
            let data = [&offset.to_be_bytes()[..], &vec![7; len as usize]].concat();
            [chunk(0, 1, cookie, &data), chunk(1, 1, cookie, &data)].concat()
        }),
        ("a hole too far", true, |_, cookie, offset, _| {
            chunk(
                1,
                2,
                cookie,
                &[&offset.to_be_bytes()[..], &u32::MAX.to_be_bytes()].concat(),
            )
        }),
        ("an unknown chunk", true, |_, cookie, _, _| {
            chunk(1, 99, cookie, &[0; 40])
        }),
        ("a long error", true, |_, cookie, _, _| {
            chunk(1, 0x8001, cookie, &[0; 9000])
        }),
    ];
    thread::scope(|scope| {
        for (what, structured, answer) in cases {
            scope.spawn(move || {
                let dir = tempfile::tempdir().unwrap();
                let path = dir.path().join("s");
                hostile(UnixListener::bind(&path).unwrap(), structured, answer);
                let uri = format!("nbd+unix:///?socket={}", path.display());
                let daemon = serve(&uri, &["--reconnect-timeout", "1"]);
                let mut disk = connect(&daemon, 1, vec![0; MIB]);
                let start = Instant::now();
                assert_eq!(disk.attempt(IN, 8192, 4096), IOERR, "{what}");
                assert!(start.elapsed() < PATIENCE, "{what}");
                drop(disk);
                daemon.stop();
            });
        }
    });
}

#[test]
fn a_write_that_the_server_did_not_take_is_no_success() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let listener = UnixListener::bind(&path).unwrap();
    thread::spawn(move || {
        let mut open = Vec::new();
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            greet(&mut stream, false).unwrap();
            // More than the socket holds is to follow.
            if let Ok((_, cookie, _, _)) = request(&mut stream) {
                let _ = stream.write_all(&simple(0, cookie));
            }
            open.push(stream);
        }
    });
    let uri = format!("nbd+unix:///?socket={}", path.display());
    let daemon = serve(&uri, &["--reconnect-timeout", "1"]);
    let mut disk = connect(&daemon, 1, vec![0; MIB]);
    for _ in 0..2 {
        let start = Instant::now();
        assert_eq!(disk.attempt(OUT, 0, ROOM), IOERR);
        assert!(start.elapsed() < PATIENCE);
    }
    drop(disk);
    daemon.stop();
}

#[test]
fn a_server_that_never_comes_to_the_point_is_left() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let listener = UnixListener::bind(&path).unwrap();
    thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        for byte in b"NBDMAGICIHAVEOPT\0\x03" {
            sleep(Duration::from_millis(700));
            if stream.write_all(&[*byte]).is_err() {
                break;
            }
        }
    });
    let start = Instant::now();
    let log = refusal(&format!("nbd+unix:///?socket={}", path.display()), &[]);
    assert!(log.contains("connection failed"), "{log}");
    assert!(start.elapsed() < Duration::from_secs(8), "{log}");
}

#[test]
fn a_server_that_hangs_up_again_and_again_is_not_called_all_the_time() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let listener = UnixListener::bind(&path).unwrap();
    let calls = Arc::new(AtomicU32::new(0));
    let counter = Arc::clone(&calls);
    thread::spawn(move || {
        for stream in listener.incoming() {
            counter.fetch_add(1, Ordering::Relaxed);
            let _ = greet(&mut stream.unwrap(), false);
        }
    });
    let daemon = serve(&format!("nbd+unix:///?socket={}", path.display()), &[]);
    sleep(Duration::from_secs(1));
    let calls = calls.load(Ordering::Relaxed);
    assert!((2..12).contains(&calls), "{calls}");
    daemon.stop();
}

/// The request fails, and does not hold up the front-end's end until the server's patience is over.
#[test]
fn memory_that_is_taken_away_fails_its_request_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    hostile(
        UnixListener::bind(&path).unwrap(),
        false,
        |_, cookie, _, _| simple(0, cookie),
    );
    let daemon = serve(&format!("nbd+unix:///?socket={}", path.display()), &[]);
    let mut front = FrontEnd::new(&daemon.socket(), Setup::default());
    let (head, status) = (front.guest.alloc(16, 16), front.guest.alloc(1, 16));
    front.guest.file.set_len(REGION).unwrap();
    let memory = &front.guest.memory;
    memory.write_slice(&[0; 16], head).unwrap();
    memory.write_obj(OUT, head).unwrap();
    memory.write_obj(0xff_u8, status).unwrap();
    let readable = [
        Segment::new(head, 16),
        Segment::new(GuestAddress(SECOND), 64 << 10),
    ];
    let start = Instant::now();
    front.queues[0].submit(&front.guest, &readable, &[Segment::new(status, 1)], 1);
    front.complete(0);
    assert!(start.elapsed() < Duration::from_secs(5));
    let found: u8 = front.guest.memory.read_obj(status).unwrap();
    assert_eq!(found, IOERR);
    drop(front);
    daemon.stop();
}

#[test]
fn errors_of_a_server_reach_the_guest_and_nothing_else() {
    for structured in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        hostile(
            UnixListener::bind(&path).unwrap(),
            structured,
            move |kind, cookie, offset, len| {
                match kind {
                    // The first 64 KiB can be read: in chunks, from the end to the start, with a hole.
                    0 if offset + u64::from(len) <= 65536 && structured => {
                        let half = u64::from(len / 2);
                        let data =
                            [&(offset + half).to_be_bytes()[..], &vec![7; half as usize]].concat();
                        let hole = [&offset.to_be_bytes()[..], &(len / 2).to_be_bytes()].concat();
                        [
                            chunk(0, 1, cookie, &data),
                            chunk(0, 2, cookie, &hole),
                            chunk(1, 0, cookie, &[]),
                        ]
                        .concat()
                    }
                    0 if offset + u64::from(len) <= 65536 => {
                        let half = len as usize / 2;
                        [simple(0, cookie), vec![0; half], vec![7; half]].concat()
                    }
                    0 if structured => {
                        let mut error = 5_u32.to_be_bytes().to_vec();
                        error.extend([0, 3]);
                        error.extend(b"bad");
                        chunk(1, 0x8001, cookie, &error)
                    }
                    1 => simple(28, cookie),
                    _ => simple(if kind == 3 { 0 } else { 5 }, cookie),
                }
            },
        );
        let uri = format!("nbd+unix:///?socket={}", path.display());
        let daemon = serve(&uri, &[]);
        let mut disk = connect(&daemon, 1, [vec![0; 2048], vec![7; 2048]].concat());
        for _ in 0..3 {
            assert_eq!(disk.attempt(OUT, 0, 4096), IOERR);
            assert_eq!(disk.attempt(IN, 1 << 17, 4096), IOERR);
            assert_eq!(disk.attempt(FLUSH, 0, 0), OK);
            // By the buffer.
            disk.verify();
        }
        // Straight into guest memory.
        disk.model = [vec![0; 32768], vec![7; 32768]].concat();
        disk.verify();
        assert!(!daemon.log().contains("lost"), "{}", daemon.log());
        drop(disk);
        daemon.stop();
    }
}

//! The dirty log: while it is on, the pages that a device writes are marked, and no others; the memory tells which they are.

#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation
)] // helpers of tests: a panic is how they fail

mod frontend;

use std::cell::Cell;
use std::collections::BTreeSet;
use std::fs::File;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::process::{Child, Command};
use std::thread::sleep;
use std::time::{Duration, Instant};

use frontend::request::{SET_LOG_BASE, SET_LOG_FD};
use frontend::{Daemon, FrontEnd, PATIENCE, REGION, SECOND, Setup, own_network, skip};
use nix::sys::memfd::{MFdFlags, memfd_create};
use proptest::prelude::*;
use proptest::test_runner::TestRunner;
use ringside_rings::Segment;
use vhost::VhostBackend;
use vm_memory::{Bytes, GuestAddress};

const BLK: &str = env!("CARGO_BIN_EXE_ringside-blk");
const NET: &str = env!("CARGO_BIN_EXE_ringside-net");

const PAGE: u64 = 4096;
/// Size of the disk.
const DISK: u64 = 4 << 20;
/// Content of guest memory that nobody has written, and that no sector of the disk has.
const UNTOUCHED: u8 = 0xaa;

/// Guest memory at one time.
struct Snapshot(Vec<u8>);

impl Snapshot {
    fn take(front: &FrontEnd) -> Self {
        let mut all = front.guest.read(GuestAddress(0), REGION as usize);
        all.extend(front.guest.read(GuestAddress(SECOND), REGION as usize));
        Self(all)
    }

    /// Numbers of the guest's pages that differ.
    fn changed(&self, now: &Self) -> BTreeSet<u64> {
        let pages = self.0.chunks(PAGE as usize);
        pages
            .zip(now.0.chunks(PAGE as usize))
            .zip(0..)
            .filter(|((before, after), _)| before != after)
            .map(|(_, page)| match page * PAGE < REGION {
                true => page,
                false => page + (SECOND - REGION) / PAGE,
            })
            .collect()
    }
}

/// Numbers of the pages that are marked, which are cleared.
fn marked(log: &File) -> BTreeSet<u64> {
    let mut bits = vec![0; ((SECOND + REGION) / PAGE / 8) as usize];
    log.read_exact_at(&mut bits, 0).unwrap();
    log.write_all_at(&vec![0; bits.len()], 0).unwrap();
    let bit = |page: &u64| bits[(page / 8) as usize] >> (page % 8) & 1 == 1;
    (0..(SECOND + REGION) / PAGE).filter(bit).collect()
}

/// Stops all rings, so that the driver can prepare what the device does at once when they run again.
fn stop(front: &mut FrontEnd) -> Vec<u32> {
    (0..front.queues.len())
        .map(|queue| front.messages.get_vring_base(queue).unwrap())
        .collect()
}

/// Lets the rings run until `done`, and returns what then is marked and what has changed.
fn run(
    front: &mut FrontEnd,
    bases: &[u32],
    log: &File,
    done: impl FnOnce(&mut FrontEnd),
) -> (BTreeSet<u64>, BTreeSet<u64>) {
    marked(log);
    let before = Snapshot::take(front);
    for (queue, &base) in bases.iter().enumerate() {
        front.start(queue, base);
    }
    done(front);
    stop(front);
    let changed = before.changed(&Snapshot::take(front));
    (marked(log), changed)
}

/// A request of a disk's driver.
#[derive(Debug, Clone)]
struct Request {
    kind: u32,
    sector: u64,
    /// Bytes of data, in two pieces: at an odd place of a page, and in the other region.
    len: u32,
    cut: u32,
    at: u64,
}

fn requests() -> impl Strategy<Value = Vec<Request>> {
    // Read, write, flush, get the serial number; one that is unknown.
    let kind = prop_oneof![4 => Just(0), 1 => Just(1), 1 => Just(4), 1 => Just(8), 1 => Just(99)];
    let one = (
        kind,
        0..DISK / 512 + 8,
        0..64_u32,
        any::<u32>(),
        0..3 * PAGE,
    );
    let one = one.prop_map(|(kind, sector, sectors, cut, at)| Request {
        kind,
        sector,
        len: sectors * 512,
        cut: cut % (sectors * 512 + 1),
        at,
    });
    proptest::collection::vec(one, 1..12)
}

/// More than buffers take on the way from where the disk is.
const LARGE: Request = Request {
    kind: 0,
    sector: 8,
    len: 2 << 20,
    cut: (2 << 20) - 4096,
    at: 5,
};

/// Room for each request's data in each region, but for the last one.
const ROOM: u64 = 0x1_2000;

fn submit(front: &mut FrontEnd, number: u64, request: &Request) {
    let head = front.guest.alloc(16, 16);
    let mut header = [0; 16];
    header[..4].copy_from_slice(&request.kind.to_le_bytes());
    header[8..].copy_from_slice(&request.sector.to_le_bytes());
    front.guest.memory.write_slice(&header, head).unwrap();
    let here = GuestAddress(REGION / 2 + number * ROOM + request.at);
    let there = GuestAddress(SECOND + number * ROOM);
    let status = GuestAddress(SECOND + (number + 1) * ROOM - 1);
    let pieces = [(here, request.cut), (there, request.len - request.cut)];
    if request.kind == 1 {
        for (at, len) in pieces {
            // Or what is read later looks as if nothing had been.
            let data = vec![0x22; len as usize];
            front.guest.memory.write_slice(&data, at).unwrap();
        }
    }
    let data = pieces
        .iter()
        .filter(|(_, len)| *len > 0)
        .map(|&(at, len)| Segment::new(at, len));
    let mut readable = vec![Segment::new(head, 16)];
    let mut writable = Vec::new();
    match request.kind {
        1 => readable.extend(data),
        4 => {}
        _ => writable.extend(data),
    }
    writable.push(Segment::new(status, 1));
    let FrontEnd { queues, guest, .. } = front;
    queues[0].submit(guest, &readable, &writable, number);
}

fn image() -> tempfile::NamedTempFile {
    let mut file = tempfile::NamedTempFile::new_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    file.write_all(&vec![0x11; DISK as usize]).unwrap();
    file
}

/// Puts what no device writes where devices will write.
fn wipe(front: &FrontEnd) {
    let untouched = vec![UNTOUCHED; (REGION / 2) as usize];
    for at in [REGION / 2, SECOND, SECOND + REGION / 2] {
        let at = GuestAddress(at);
        front.guest.memory.write_slice(&untouched, at).unwrap();
    }
}

/// Requests of a driver, and whether each used ring is said to be logged.
fn disk_marks(args: &[&str]) {
    let image = image();
    disk_at_marks(image.path().to_str().unwrap(), args);
}

fn disk_at_marks(path: &str, args: &[&str]) {
    let daemon = Daemon::start(BLK, &[&["--path", path], args].concat());
    for packed in [false, true] {
        let setup = Setup {
            packed,
            ..Setup::default()
        };
        let mut runner = TestRunner::new(ProptestConfig::with_cases(6));
        let outcome = runner.run(
            &(requests(), any::<bool>()),
            |(mut requests, used_rings)| {
                requests.push(LARGE);
                let mut front = FrontEnd::new(&daemon.socket(), setup);
                front.begin_log(used_rings);
                let log = front.log.as_ref().unwrap().0.try_clone().unwrap();
                wipe(&front);
                let bases = stop(&mut front);
                for (number, request) in (0..).zip(&requests) {
                    submit(&mut front, number, request);
                }
                let (marked, changed) = run(&mut front, &bases, &log, |front| {
                    for _ in &requests {
                        front.complete(0);
                    }
                });
                prop_assert!(changed.len() > 512);
                prop_assert_eq!(marked, changed);
                Ok(())
            },
        );
        assert!(outcome.is_ok(), "packed: {packed}: {outcome:?}");
    }
    daemon.stop();
}

#[test]
fn a_disk_marks_the_pages_that_it_writes() {
    disk_marks(&[]);
}

#[test]
fn a_disk_with_a_bounce_buffer_marks_the_pages_that_it_writes() {
    disk_marks(&["--direct"]);
}

#[test]
fn a_disk_in_an_image_marks_the_pages_that_it_writes() {
    let test = "a_disk_in_an_image_marks_the_pages_that_it_writes";
    let (raw, dir) = (image(), directory());
    let path = dir.path().join("image");
    let mut convert = Command::new("qemu-img");
    convert.args(["convert", "-f", "raw", "-O", "qcow2"]);
    let converted = convert.args([raw.path(), &path]).status();
    if !converted.is_ok_and(|status| status.success()) {
        return skip(test, "qemu-img is not installed (package qemu-utils)");
    }
    disk_at_marks(path.to_str().unwrap(), &["--format", "qcow2"]);
}

/// Ended when dropped.
struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_disk_of_a_server_marks_the_pages_that_it_writes() {
    let test = "a_disk_of_a_server_marks_the_pages_that_it_writes";
    let (raw, dir) = (image(), directory());
    let socket = dir.path().join("s");
    let mut command = Command::new("qemu-nbd");
    command.args(["-f", "raw", "-t", "-k"]).arg(&socket);
    let Ok(server) = command.arg(raw.path()).spawn() else {
        return skip(test, "qemu-nbd is not installed (package qemu-utils)");
    };
    let _server = Server(server);
    let start = Instant::now();
    while UnixStream::connect(&socket).is_err() {
        assert!(start.elapsed() < PATIENCE, "qemu-nbd does not listen");
        sleep(Duration::from_millis(10));
    }
    disk_at_marks(&format!("nbd+unix:///?socket={}", socket.display()), &[]);
}

fn directory() -> tempfile::TempDir {
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap()
}

/// Has the device do the same with the log on and off, in turn: what is marked then is what has changed, or nothing. Gives how many
/// pages have changed at least.
fn marks_while_on(
    front: &mut FrontEnd,
    submit: impl Fn(&mut FrontEnd),
    done: impl Fn(&mut FrontEnd),
) -> usize {
    let mut least = usize::MAX;
    for on in [true, false, true, false] {
        let log = match on {
            true => {
                front.begin_log(true);
                front.log.as_ref().unwrap().0.try_clone().unwrap()
            }
            false => front.end_log(),
        };
        wipe(front);
        let bases = stop(front);
        submit(front);
        let (marked, changed) = run(front, &bases, &log, &done);
        least = least.min(changed.len());
        assert_eq!(marked, if on { changed } else { BTreeSet::new() });
        for queue in 0..front.queues.len() {
            let base = front.messages.get_vring_base(queue).unwrap();
            front.start(queue, base);
        }
    }
    least
}

#[test]
fn nothing_is_marked_once_the_log_is_off() {
    let image = image();
    let daemon = Daemon::start(BLK, &["--path", image.path().to_str().unwrap()]);
    let read = Request {
        kind: 0,
        sector: 0,
        len: 65536,
        cut: 100,
        at: 7,
    };
    for packed in [false, true] {
        let setup = Setup {
            packed,
            ..Setup::default()
        };
        let mut front = FrontEnd::new(&daemon.socket(), setup);
        let changed = marks_while_on(
            &mut front,
            |front| submit(front, 0, &read),
            |front| {
                front.complete(0);
            },
        );
        assert!(changed > 16, "packed: {packed}");
    }
    daemon.stop();
}

#[test]
fn nothing_is_marked_by_a_network_device_once_the_log_is_off() {
    if !own_network("nothing_is_marked_by_a_network_device_once_the_log_is_off") {
        return;
    }
    let fixed = ["--mac", "52:54:00:00:00:05", "--tap-ip", "10.9.0.1/24"];
    let daemon = Daemon::start(NET, &[&fixed[..], &["--tap", "ring0"]].concat());
    let setup = Setup {
        queues: 2,
        ..Setup::default()
    };
    for setup in setup.formats() {
        let mut front = FrontEnd::new(&daemon.socket(), setup);
        let changed = marks_while_on(
            &mut front,
            |front| ask(front, 1, 1),
            |front| {
                front.complete(1);
                front.complete(0);
            },
        );
        // Both rings, and a buffer.
        assert!(changed >= 3, "packed: {}: {changed}", setup.packed);
    }
    daemon.stop();
}

#[test]
fn a_log_that_cannot_be_used_is_refused() {
    let image = image();
    let daemon = Daemon::start(BLK, &["--path", image.path().to_str().unwrap()]);
    let connect = || FrontEnd::new(&daemon.socket(), Setup::default());
    let log = File::from(memfd_create(c"log", MFdFlags::MFD_CLOEXEC).unwrap());
    let len = (SECOND + REGION) / PAGE / 8;
    log.set_len(len).unwrap();
    // No bit for the last pages; behind the end of the file; at an odd place.
    for (len, offset) in [(len - 1, 0), (len + 1, 0), (len, 4096), (len - 100, 100)] {
        // It has an answer of its own, in which there is no way to say so.
        let mut front = connect();
        let payload = [u64::to_ne_bytes(len), u64::to_ne_bytes(offset)].concat();
        front
            .raw
            .send_with_fds(SET_LOG_BASE, &payload, &[log.as_raw_fd()]);
        assert!(front.raw.is_closed());
    }
    assert!(daemon.log().contains("the dirty log"), "{}", daemon.log());
    let mut front = connect();
    front.begin_log(true);
    front.raw.send_with_fds(SET_LOG_FD, &[], &[log.as_raw_fd()]);
    assert_eq!(front.raw.reply(), (SET_LOG_FD, 0));
    // Used rings elsewhere are not: the ring stays stopped, which the front-end is told.
    let layout = *front.queues[0].ring.layout();
    let mut addresses = front.addresses(&layout);
    addresses.log_addr = Some(layout.used_ring().0 + PAGE);
    assert!(front.messages.set_vring_addr(0, &addresses).is_err());
    daemon.stop();
}

#[test]
fn a_log_that_is_cut_short_ends_the_connection() {
    let image = image();
    let daemon = Daemon::start(BLK, &["--path", image.path().to_str().unwrap()]);
    let mut front = FrontEnd::new(&daemon.socket(), Setup::default());
    front.begin_log(true);
    front.log.as_ref().unwrap().0.set_len(0).unwrap();
    let flush = Request {
        kind: 4,
        sector: 0,
        len: 0,
        cut: 0,
        at: 0,
    };
    submit(&mut front, 0, &flush);
    assert!(front.raw.is_closed());
    drop(front);
    FrontEnd::new(&daemon.socket(), Setup::default());
    daemon.stop();
}

/// Makes buffers available to a card across pages, of which a small packet needs a part of the first only, and has it ask so often "Who
/// has 10.9.0.1?", to which the host answers.
fn ask(front: &mut FrontEnd, buffers: u64, questions: u64) {
    const MAC: [u8; 6] = [0x52, 0x54, 0, 0, 0, 5];
    let FrontEnd { queues, guest, .. } = front;
    for number in 0..buffers {
        let at = GuestAddress(SECOND + number * 3 * PAGE + 100);
        let room = Segment::new(at, 2 * PAGE as u32);
        queues[0].submit(guest, &[], &[room], number);
    }
    let mut packet = vec![0; 12];
    packet.extend([0xff; 6]);
    packet.extend(MAC);
    packet.extend([8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
    packet.extend(MAC);
    packet.extend([10, 9, 0, 2, 0, 0, 0, 0, 0, 0, 10, 9, 0, 1]);
    let at = guest.alloc(packet.len() as u64, 64);
    guest.memory.write_slice(&packet, at).unwrap();
    for number in 0..questions {
        queues[1].submit(guest, &[Segment::new(at, packet.len() as u32)], &[], number);
    }
}

#[test]
fn a_network_device_marks_the_pages_that_it_writes() {
    if !own_network("a_network_device_marks_the_pages_that_it_writes") {
        return;
    }
    let fixed = ["--mac", "52:54:00:00:00:05", "--tap-ip", "10.9.0.1/24"];
    let daemon = Daemon::start(NET, &[&fixed[..], &["--tap", "ring0"]].concat());
    for setup in Setup::default().formats() {
        for used_rings in [false, true] {
            let queues = 2;
            let mut front = FrontEnd::new(&daemon.socket(), Setup { queues, ..setup });
            front.begin_log(used_rings);
            let log = front.log.as_ref().unwrap().0.try_clone().unwrap();
            wipe(&front);
            let bases = stop(&mut front);
            // Often enough that many answers are read with one call.
            const ASKED: u64 = 12;
            ask(&mut front, 16, ASKED);
            let (marked, changed) = run(&mut front, &bases, &log, |front| {
                for _ in 0..ASKED {
                    front.complete(1);
                    front.complete(0);
                }
            });
            // Both rings, and a page of each buffer.
            assert!(changed.len() >= 2 + 12, "{changed:?}");
            assert_eq!(marked, changed, "packed: {}", setup.packed);
        }
    }
    daemon.stop();
}

/// A frame that a guest sends, and how its buffer lies.
#[derive(Debug, Clone)]
struct Sent {
    len: u32,
    cut: u32,
    /// Where the receiver's buffer begins in its room, and its length.
    at: u64,
    room: u32,
}

fn sent() -> impl Strategy<Value = Vec<Sent>> {
    let one = (14..9000_u32, any::<u32>(), 0..3 * PAGE, 64..6000_u32);
    let one = one.prop_map(|(len, cut, at, room)| Sent {
        len,
        cut: 1 + cut % (HEADER + len - 1),
        at,
        room,
    });
    proptest::collection::vec(one, 1..24)
}

/// Bytes of the header in front of a frame.
const HEADER: u32 = 12;

/// One guest sends to another, whose memory is logged: what the switch copies there is marked, in as many buffers as a frame
/// takes, and nothing else; so are the sender's used rings.
#[test]
fn a_switch_marks_the_pages_that_it_writes() {
    let dir = tempfile::tempdir().unwrap();
    let sockets = ["a", "b"].map(|name| dir.path().join(name));
    let mut command = Command::new(NET);
    for (number, socket) in (1..).zip(&sockets) {
        let port = format!("socket={},mac=02:00:00:00:00:0{number}", socket.display());
        command.arg("--port").arg(port);
    }
    let daemon = Daemon::spawn_command(&mut command, dir);
    daemon.wait_for_line("ringside-net ready");
    let setup = Setup {
        queues: 2,
        ..Setup::default()
    };
    for setup in setup.formats() {
        let mut runner = TestRunner::new(ProptestConfig::with_cases(6));
        let pages = Cell::new(0);
        let outcome = runner.run(&(sent(), any::<bool>()), |(frames, used_rings)| {
            let [mut from, mut to] = sockets
                .each_ref()
                .map(|socket| FrontEnd::new(socket, setup));
            let logs = [&mut from, &mut to].map(|front| {
                front.begin_log(used_rings);
                wipe(front);
                front.log.as_ref().unwrap().0.try_clone().unwrap()
            });
            let bases = [stop(&mut from), stop(&mut to)];
            for (number, frame) in (0..).zip(&frames) {
                for place in 0..2 {
                    let at = SECOND + (2 * number + place) * ROOM + frame.at;
                    let FrontEnd { queues, guest, .. } = &mut to;
                    let room = Segment::new(GuestAddress(at), frame.room);
                    queues[0].submit(guest, &[], &[room], number);
                }
                let mut packet = vec![0; HEADER as usize];
                packet.extend([2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1, 0x88, 0xb5]);
                packet.resize((HEADER + frame.len) as usize, 0x33);
                let at = from.guest.alloc(packet.len() as u64, 64);
                from.guest.memory.write_slice(&packet, at).unwrap();
                let (head, rest) = (frame.cut, HEADER + frame.len - frame.cut);
                let pieces = [(at, head), (GuestAddress(at.0 + u64::from(head)), rest)];
                let pieces = pieces.map(|(at, len)| Segment::new(at, len));
                let FrontEnd { queues, guest, .. } = &mut from;
                queues[1].submit(guest, &pieces, &[], number);
            }
            for (queue, &base) in bases[1].iter().enumerate() {
                to.start(queue, base);
            }
            let before = Snapshot::take(&to);
            marked(&logs[1]);
            let (of_sender, changed) = run(&mut from, &bases[0], &logs[0], |front| {
                for _ in &frames {
                    front.complete(1);
                }
            });
            prop_assert_eq!(of_sender, changed);
            stop(&mut to);
            let changed = before.changed(&Snapshot::take(&to));
            pages.set(pages.get() + changed.len());
            prop_assert_eq!(marked(&logs[1]), changed);
            Ok(())
        });
        assert!(outcome.is_ok(), "packed: {}: {outcome:?}", setup.packed);
        // The rings and a buffer of each case at least, on average.
        assert!(pages.get() > 18, "{}", pages.get());
    }
    daemon.stop();
}

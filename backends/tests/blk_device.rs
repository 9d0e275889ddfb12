//! `ringside-blk` as a process, met over its socket by a front-end with a driver.

#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation
)] // helpers of tests: a panic is how they fail

mod frontend;

use std::fs;
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;
use std::time::Instant;

use frontend::{
    Daemon, EVENT_IDX, FrontEnd, PATIENCE, REGION, SECOND, Setup, readable, skip, without_rights,
};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::Signal;
use ringside_rings::Segment;
use vhost::VhostBackend;
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::VhostUserConfigFlags;
use vm_memory::{Bytes, GuestAddress};

const BLK: &str = env!("CARGO_BIN_EXE_ringside-blk");

/// Request types and status values (VIRTIO 1.3, 5.2.6).
const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;
const SECURE_ERASE: u32 = 14;
const OK: u8 = 0;
const IOERR: u8 = 1;
const UNSUPP: u8 = 2;

/// Size of the disk in these tests.
const DISK: u64 = 4 << 20;

struct Machine {
    daemon: Daemon,
    front: FrontEnd,
    image: tempfile::NamedTempFile,
}

impl Machine {
    fn new(args: &[&str], setup: Setup) -> Self {
        let image = image();
        let daemon = serve(&image, args);
        let front = FrontEnd::new(&daemon.socket(), setup);
        Self {
            daemon,
            front,
            image,
        }
    }

    fn plain() -> Self {
        Self::new(&[], Setup::default())
    }

    /// One request: `data` is sent, `room` bytes are for the answer. Returns status, used length and the answer.
    fn request(&mut self, kind: u32, sector: u64, data: &[u8], room: u32) -> (u8, u32, Vec<u8>) {
        request(&mut self.front, 0, kind, sector, data, room)
    }

    fn status(&mut self, kind: u32, sector: u64, data: &[u8], room: u32) -> u8 {
        self.request(kind, sector, data, room).0
    }

    fn disk(&self) -> Vec<u8> {
        fs::read(self.image.path()).unwrap()
    }
}

/// An image whose every sector holds its number.
fn image() -> tempfile::NamedTempFile {
    let mut file = tempfile::NamedTempFile::new_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let mut data = Vec::new();
    for sector in 0..DISK / 512 {
        data.extend(sector.to_le_bytes().repeat(64));
    }
    file.write_all(&data).unwrap();
    file
}

fn serve(image: &tempfile::NamedTempFile, args: &[&str]) -> Daemon {
    let path = image.path().to_str().unwrap();
    Daemon::start(BLK, &[&["--path", path], args].concat())
}

fn header(kind: u32, sector: u64) -> [u8; 16] {
    let mut header = [0; 16];
    header[..4].copy_from_slice(&kind.to_le_bytes());
    header[8..].copy_from_slice(&sector.to_le_bytes());
    header
}

fn range(sector: u64, sectors: u32, flags: u32) -> Vec<u8> {
    let mut range = sector.to_le_bytes().to_vec();
    range.extend(sectors.to_le_bytes());
    range.extend(flags.to_le_bytes());
    range
}

fn request(
    front: &mut FrontEnd,
    queue: usize,
    kind: u32,
    sector: u64,
    data: &[u8],
    room: u32,
) -> (u8, u32, Vec<u8>) {
    let memory = front.guest.memory.clone();
    let head = front.guest.alloc(16, 16);
    memory.write_slice(&header(kind, sector), head).unwrap();
    let mut readable = vec![Segment::new(head, 16)];
    if !data.is_empty() {
        let at = front.guest.alloc(data.len() as u64, 4096);
        memory.write_slice(data, at).unwrap();
        readable.push(Segment::new(at, data.len() as u32));
    }
    let answer = front.guest.alloc(u64::from(room) + 1, 4096);
    let status = GuestAddress(answer.0 + u64::from(room));
    memory.write_obj(0xee_u8, status).unwrap();
    let mut writable = vec![Segment::new(status, 1)];
    if room > 0 {
        writable.insert(0, Segment::new(answer, room));
    }
    front.queues[queue].submit(&front.guest, &readable, &writable, sector);
    let (token, used) = front.complete(queue);
    assert_eq!(token, sector);
    let status = memory.read_obj(status).unwrap();
    (status, used, front.guest.read(answer, room as usize))
}

#[test]
fn reads_and_writes_what_the_image_holds() {
    for setup in [
        Setup::default(),
        Setup {
            without: EVENT_IDX,
            ..Setup::default()
        },
        Setup {
            slots: true,
            ..Setup::default()
        },
        Setup {
            without: frontend::PROTOCOL_FEATURES,
            ..Setup::default()
        },
    ]
    .into_iter()
    .flat_map(Setup::formats)
    {
        let mut m = Machine::new(&["--in-order", "on"], setup);
        let before = m.disk();
        let (status, used, data) = m.request(IN, 3, &[], 8192);
        assert_eq!((status, used), (OK, 8193));
        assert_eq!(data, before[3 * 512..][..8192]);
        let data: Vec<u8> = (0..65536_u32).map(|i| (i * 7 % 251) as u8).collect();
        let (status, used, _) = m.request(OUT, 100, &data, 0);
        assert_eq!((status, used), (OK, 1));
        assert_eq!(m.status(FLUSH, 0, &[], 0), OK);
        assert_eq!(m.request(IN, 100, &[], 65536).2, data);
        let after = m.disk();
        assert_eq!(after[100 * 512..][..65536], data);
        assert_eq!(after[..100 * 512], before[..100 * 512]);
        assert_eq!(after[228 * 512..], before[228 * 512..]);
        m.daemon.stop();
    }
}

#[test]
fn a_request_may_be_cut_in_any_way() {
    let mut m = Machine::plain();
    let memory = m.front.guest.memory.clone();
    // The header in four pieces, the last together with the first data; the rest behind the hole in guest memory.
    let head = m.front.guest.alloc(4096, 4096);
    let mut bytes = header(OUT, 8).to_vec();
    let data: Vec<u8> = (0..1024_u32).map(|i| i as u8).collect();
    bytes.extend(&data[..300]);
    memory.write_slice(&bytes, head).unwrap();
    memory
        .write_slice(&data[300..], GuestAddress(SECOND + 5))
        .unwrap();
    let at = |offset: u64, len| Segment::new(GuestAddress(head.0 + offset), len);
    let readable = [
        at(0, 1),
        at(1, 6),
        at(7, 2),
        at(9, 307),
        Segment::new(GuestAddress(SECOND + 5), 724),
    ];
    let status = m.front.guest.alloc(1, 1);
    m.front.queues[0].submit(&m.front.guest, &readable, &[Segment::new(status, 1)], 9);
    assert_eq!(m.front.complete(0), (9, 1));
    assert_eq!(memory.read_obj::<u8>(status).unwrap(), OK);
    assert_eq!(m.disk()[8 * 512..][..1024], data);
    // The answer in pieces, the last with the status.
    memory.write_slice(&header(IN, 8), head).unwrap();
    let out = m.front.guest.alloc(2048, 4096);
    let writable = [
        Segment::new(GuestAddress(out.0 + 1), 1023),
        Segment::new(GuestAddress(SECOND + REGION - 2), 2),
    ];
    m.front.queues[0].submit(&m.front.guest, &[at(0, 16)], &writable, 10);
    assert_eq!(m.front.complete(0), (10, 1025));
    assert_eq!(
        m.front.guest.read(GuestAddress(out.0 + 1), 1023),
        data[..1023]
    );
    let last = m.front.guest.read(GuestAddress(SECOND + REGION - 2), 2);
    assert_eq!(last, [data[1023], OK]);
    m.daemon.stop();
}

#[test]
fn discard_punches_holes_and_zeroes_are_zeroes() {
    let mut m = Machine::plain();
    let blocks = |m: &Machine| fs::metadata(m.image.path()).unwrap().blocks();
    let before = blocks(&m);
    assert_eq!(m.status(DISCARD, 0, &range(2048, 2048, 0), 0), OK);
    assert!(blocks(&m) <= before - 2048, "{before} → {}", blocks(&m));
    for (start, flags) in [(4096, 0), (4200, 1)] {
        assert_eq!(m.status(WRITE_ZEROES, 0, &range(start, 64, flags), 0), OK);
        let disk = m.disk();
        let zeroed = &disk[start as usize * 512..][..64 * 512];
        assert!(zeroed.iter().all(|&b| b == 0));
        assert_eq!(
            disk[(start as usize + 64) * 512..][..8],
            (start + 64).to_le_bytes()
        );
    }
    assert_eq!(m.status(DISCARD, 0, &range(0, 8, 1), 0), UNSUPP);
    assert_eq!(m.status(WRITE_ZEROES, 0, &range(0, 8, 4), 0), UNSUPP);
    assert_eq!(m.status(DISCARD, 0, &range(8191, 2, 0), 0), IOERR);
    assert_eq!(m.status(DISCARD, 0, &[0; 15], 0), IOERR);
    assert_eq!(m.disk()[..8], 0_u64.to_le_bytes());
    m.daemon.stop();
}

#[test]
fn a_request_has_up_to_32_ranges_and_all_of_them_are_done_or_none() {
    let mut m = Machine::plain();
    // As many as there may be, with an empty one among them.
    let at = |number: u32| u64::from(number) * 64;
    let list = |count: u32, flags| -> Vec<u8> {
        let one = |n| range(at(n), if n == 5 { 0 } else { 8 }, flags);
        (0..count).flat_map(one).collect()
    };
    let before = m.disk();
    assert_eq!(m.status(WRITE_ZEROES, 0, &list(33, 0), 0), IOERR);
    assert_eq!(m.status(DISCARD, 0, &list(33, 0), 0), IOERR);
    let beyond = [range(at(0), 8, 0), range(8191, 2, 0)].concat();
    assert_eq!(m.status(WRITE_ZEROES, 0, &beyond, 0), IOERR);
    let flags = [range(8191, 2, 0), range(at(0), 8, 2)].concat();
    assert_eq!(m.status(WRITE_ZEROES, 0, &flags, 0), UNSUPP);
    assert_eq!(m.disk(), before, "a request that is refused does nothing");
    assert_eq!(m.status(WRITE_ZEROES, 0, &list(32, 0), 0), OK);
    let mut expected = before;
    for number in (0..32).filter(|&n| n != 5) {
        expected[at(number) as usize * 512..][..4096].fill(0);
    }
    assert_eq!(m.disk(), expected);
    // Two that touch, one of them to be unmapped, and all at once.
    let pair = [range(4096, 8, 1), range(4104, 3, 0)].concat();
    assert_eq!(m.status(WRITE_ZEROES, 0, &pair, 0), OK);
    expected[4096 * 512..][..11 * 512].fill(0);
    assert_eq!(m.disk(), expected);
    let blocks = |m: &Machine| fs::metadata(m.image.path()).unwrap().blocks();
    let before = blocks(&m);
    let holes = [range(6144, 1024, 0), range(7168, 1024, 0)].concat();
    assert_eq!(m.status(DISCARD, 0, &holes, 0), OK);
    assert!(blocks(&m) <= before - 2048, "{before} → {}", blocks(&m));
    m.daemon.stop();
}

#[test]
fn several_ranges_are_zeroed_through_a_cache_that_is_off() {
    let mut m = Machine::new(&["--cache", "writethrough"], Setup::default());
    let mut expected = m.disk();
    let list = [range(8, 8, 0), range(64, 16, 1), range(256, 1, 0)].concat();
    assert_eq!(m.status(WRITE_ZEROES, 0, &list, 0), OK);
    for (start, sectors) in [(8, 8), (64, 16), (256, 1)] {
        expected[start * 512..][..sectors * 512].fill(0);
    }
    assert_eq!(m.disk(), expected);
    m.daemon.stop();
}

#[test]
fn zeroes_are_written_where_the_file_system_cannot_make_them() {
    // tmpfs has no FALLOC_FL_ZERO_RANGE.
    let Ok(mut image) = tempfile::NamedTempFile::new_in("/dev/shm") else {
        skip(
            "zeroes_are_written_where_the_file_system_cannot_make_them",
            "no /dev/shm",
        );
        return;
    };
    image.write_all(&vec![0xff; DISK as usize]).unwrap();
    let daemon = serve(&image, &[]);
    let mut front = FrontEnd::new(&daemon.socket(), Setup::default());
    let sectors = (DISK / 512 - 2) as u32;
    let zeroes = [range(1, 3000, 0), range(3001, sectors - 3000, 0)].concat();
    assert_eq!(request(&mut front, 0, WRITE_ZEROES, 0, &zeroes, 0).0, OK);
    let disk = fs::read(image.path()).unwrap();
    assert!(disk[512..][..DISK as usize - 1024].iter().all(|&b| b == 0));
    assert_eq!((disk[511], disk[DISK as usize - 512]), (0xff, 0xff));
    daemon.stop();
}

#[test]
fn what_lies_outside_the_disk_or_is_unknown_is_refused() {
    let mut m = Machine::plain();
    let end = DISK / 512;
    assert_eq!(m.request(IN, end - 1, &[], 512).0, OK);
    assert_eq!(m.request(IN, end - 1, &[], 1024), (IOERR, 1, vec![0; 1024]));
    assert_eq!(m.status(OUT, end, &[1; 512], 0), IOERR);
    assert_eq!(m.status(IN, u64::MAX, &[], 512), IOERR);
    assert_eq!(m.status(IN, u64::MAX / 512, &[], 512), IOERR);
    assert_eq!(m.status(IN, 0, &[], 511), IOERR);
    assert_eq!(m.status(OUT, 0, &[1; 100], 0), IOERR);
    assert_eq!(m.status(99, 0, &[], 0), UNSUPP);
    assert_eq!(m.status(IN, 0, &[], 0), OK);
    // No room for a status: returned with nothing written.
    let head = m.front.guest.alloc(16, 16);
    m.front
        .guest
        .memory
        .write_slice(&header(IN, 0), head)
        .unwrap();
    let status = m.front.guest.alloc(1, 1);
    m.front.queues[0].submit(&m.front.guest, &[Segment::new(head, 16)], &[], 1);
    assert_eq!(m.front.complete(0), (1, 0));
    let writable = [Segment::new(status, 1)];
    m.front.queues[0].submit(&m.front.guest, &[Segment::new(head, 15)], &writable, 2);
    // No whole header, which leaves an error to say.
    assert_eq!(m.front.complete(0), (2, 1));
    let memory = m.front.guest.memory.clone();
    assert_eq!(memory.read_obj::<u8>(status).unwrap(), IOERR);
    // A buffer outside guest memory.
    let outside = [Segment::new(GuestAddress(REGION + 4096), 512), writable[0]];
    m.front.queues[0].submit(&m.front.guest, &[Segment::new(head, 16)], &outside, 3);
    assert_eq!(m.front.complete(0), (3, 0));
    assert_eq!(m.request(IN, 7, &[], 512).2[..8], 7_u64.to_le_bytes());
    m.daemon.stop();
}

#[test]
fn what_was_not_negotiated_is_unsupported() {
    // VIRTIO_BLK_F_FLUSH, _CONFIG_WCE, _DISCARD, _WRITE_ZEROES (VIRTIO 1.3, 5.2.3).
    const ALL: u64 = 1 << 9 | 1 << 11 | 1 << 13 | 1 << 14;
    let image = image();
    let before = fs::read(image.path()).unwrap();
    let daemon = serve(&image, &[]);
    for accepted in [0, 1 << 9, 1 << 13, 1 << 14] {
        let setup = Setup {
            without: ALL & !accepted,
            ..Setup::default()
        };
        let mut front = FrontEnd::new(&daemon.socket(), setup);
        for (kind, feature, data) in [
            (FLUSH, 1 << 9, vec![]),
            (DISCARD, 1 << 13, range(2, 0, 0)),
            (WRITE_ZEROES, 1 << 14, range(2, 0, 0)),
        ] {
            let expected = if accepted == feature { OK } else { UNSUPP };
            let status = request(&mut front, 0, kind, 0, &data, 0).0;
            assert_eq!(status, expected, "command {kind}");
        }
    }
    assert_eq!(fs::read(image.path()).unwrap(), before);
    daemon.stop();
    // Not offered at all.
    let daemon = serve(&image, &["--discard", "off"]);
    let mut front = FrontEnd::new(&daemon.socket(), Setup::default());
    for kind in [DISCARD, WRITE_ZEROES, SECURE_ERASE] {
        let status = request(&mut front, 0, kind, 0, &range(2, 8, 0), 0).0;
        assert_eq!(status, UNSUPP);
    }
    assert_eq!(fs::read(image.path()).unwrap(), before);
    daemon.stop();
}

/// A file system of a mebibyte, in a mount namespace of this thread. `None`, and a word on standard error, if that
/// cannot be.
fn small_file_system(test: &str) -> Option<tempfile::TempDir> {
    let dir = tempfile::tempdir().unwrap();
    let none = None::<&str>;
    let made = unshare(CloneFlags::CLONE_NEWNS)
        .and_then(|()| mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none))
        .and_then(|()| {
            let size = Some("size=1m");
            mount(none, dir.path(), Some("tmpfs"), MsFlags::empty(), size)
        });
    match made {
        Ok(()) => Some(dir),
        Err(e) => {
            skip(test, format_args!("no mount: {e}"));
            None
        }
    }
}

#[test]
fn a_full_file_system_is_an_error_of_the_request_and_of_nothing_else() {
    let test = "a_full_file_system_is_an_error_of_the_request_and_of_nothing_else";
    let Some(dir) = small_file_system(test) else {
        return;
    };
    let path = dir.path().join("disk");
    fs::File::create(&path).unwrap().set_len(DISK).unwrap();
    let daemon = Daemon::start(BLK, &["--path", path.to_str().unwrap()]);
    let mut front = FrontEnd::new(&daemon.socket(), Setup::default());
    let piece = vec![7; 64 << 10];
    let sectors = piece.len() as u64 / 512;
    let mut written = 0;
    while request(&mut front, 0, OUT, written * sectors, &piece, 0).0 == OK {
        written += 1;
        assert!(written <= 16, "more than there is room for");
    }
    assert!(written > 0);
    assert_eq!(
        request(&mut front, 0, OUT, written * sectors, &piece, 0).0,
        IOERR
    );
    assert!(daemon.log().contains("No space left"), "{}", daemon.log());
    // What was written stays, and with room again writes succeed.
    let (status, _, data) = request(&mut front, 0, IN, 0, &[], 512);
    assert_eq!((status, data), (OK, vec![7; 512]));
    let all = range(0, sectors as u32, 0);
    assert_eq!(request(&mut front, 0, DISCARD, 0, &all, 0).0, OK);
    assert_eq!(
        request(&mut front, 0, OUT, written * sectors, &piece, 0).0,
        OK
    );
    daemon.stop();
}

#[test]
fn serial_and_configuration_are_as_asked_for() {
    let args = [
        "--serial",
        "RING-1",
        "--queues",
        "3",
        "--cache",
        "writethrough",
    ];
    let mut m = Machine::new(&args, Setup::default());
    let (status, used, id) = m.request(GET_ID, 0, &[], 20);
    assert_eq!((status, used), (OK, 21));
    assert_eq!(id, b"RING-1\0\0\0\0\0\0\0\0\0\0\0\0\0\0");
    assert_eq!(m.request(GET_ID, 0, &[], 4), (OK, 5, b"RING".to_vec()));
    let read = |m: &mut Machine| {
        m.front
            .messages
            .get_config(0, 60, VhostUserConfigFlags::empty(), &[0; 60])
            .unwrap()
            .1
    };
    let config = read(&mut m);
    assert_eq!(config[..8], (DISK / 512).to_le_bytes());
    assert_eq!(config[34..36], 3_u16.to_le_bytes());
    assert_eq!(config[32], 0, "writethrough");
    let write = |m: &mut Machine, offset, data: &[u8]| {
        let flags = VhostUserConfigFlags::WRITABLE;
        m.front.messages.set_config(offset, flags, data)
    };
    write(&mut m, 32, &[1]).unwrap();
    assert_eq!(read(&mut m)[32], 1);
    // Everything else is not the driver's to write, and the connection survives the attempt.
    assert!(write(&mut m, 0, &[0; 8]).is_err());
    assert_eq!(read(&mut m)[..8], (DISK / 512).to_le_bytes());
    assert_eq!(m.front.messages.get_queue_num().unwrap(), 3);
    m.daemon.stop();
}

#[test]
fn a_read_only_disk_stays_as_it_is() {
    let mut m = Machine::new(&["--read-only"], Setup::default());
    let before = m.disk();
    assert_eq!(m.front.features & (1 << 5), 1 << 5, "VIRTIO_BLK_F_RO");
    assert_eq!(m.status(OUT, 0, &[1; 512], 0), IOERR);
    assert_eq!(m.status(DISCARD, 0, &range(0, 8, 0), 0), UNSUPP);
    assert_eq!(m.status(IN, 0, &[], 512), OK);
    assert_eq!(m.status(FLUSH, 0, &[], 0), OK);
    assert_eq!(m.disk(), before);
    m.daemon.stop();
}

/// A loop device over an image, detached when dropped. `None`, and a word on standard error, if that cannot be.
struct Loop(String);

impl Loop {
    fn new(test: &str, image: &Path, sector: u32) -> Option<Self> {
        let mut command = Command::new("losetup");
        command.args(["--find", "--show", "--sector-size", &sector.to_string()]);
        let output = command.arg(image).output();
        match output {
            Ok(output) if output.status.success() => {
                let name = String::from_utf8(output.stdout).unwrap();
                Some(Self(name.trim().to_owned()))
            }
            other => {
                skip(test, format_args!("losetup: {other:?}"));
                None
            }
        }
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").args(["--detach", &self.0]).status();
    }
}

#[test]
fn block_devices_are_served_with_their_geometry() {
    let test = "block_devices_are_served_with_their_geometry";
    for (sector, args) in [(512_u32, &[][..]), (4096, &[]), (4096, &["--direct"])] {
        let image = image();
        let Some(device) = Loop::new(test, image.path(), sector) else {
            return;
        };
        let daemon = Daemon::start(BLK, &[&["--path", &device.0], args].concat());
        let mut front = FrontEnd::new(&daemon.socket(), Setup::default());
        let flags = VhostUserConfigFlags::empty();
        let (_, config) = front.messages.get_config(0, 60, flags, &[0; 60]).unwrap();
        assert_eq!(config[..8], (DISK / 512).to_le_bytes());
        assert_eq!(config[20..24], sector.to_le_bytes());
        let mut status =
            |kind, sector, data: &[u8]| request(&mut front, 0, kind, sector, data, 0).0;
        assert_eq!(status(OUT, 64, &[7; 4096]), OK);
        assert_eq!(status(WRITE_ZEROES, 0, &range(128, 64, 0)), OK);
        assert_eq!(status(WRITE_ZEROES, 0, &range(256, 64, 1)), OK);
        assert_eq!(status(DISCARD, 0, &range(512, 64, 0)), OK);
        assert_eq!(status(FLUSH, 0, &[]), OK);
        for (at, first) in [(64, 0x0707_0707_0707_0707), (128, 0), (256, 0), (8, 8_u64)] {
            let (status, _, data) = request(&mut front, 0, IN, at, &[], 4096);
            assert_eq!((status, &data[..8]), (OK, &first.to_le_bytes()[..]));
        }
        // Nobody else may write it meanwhile.
        let (code, log) = Daemon::spawn(BLK, &["--path", &device.0]).outcome();
        assert_eq!(code, Some(1));
        assert!(log.contains("in use by another program"), "{log}");
        daemon.stop();
    }
}

#[test]
fn a_block_device_discards_as_much_as_it_says_and_erases_nothing_securely() {
    let test = "a_block_device_discards_as_much_as_it_says_and_erases_nothing_securely";
    let image = image();
    let Some(device) = Loop::new(test, image.path(), 512) else {
        return;
    };
    let daemon = Daemon::start(BLK, &["--path", &device.0]);
    let mut front = FrontEnd::new(&daemon.socket(), Setup::default());
    assert_eq!(front.features & 1 << 16, 0, "VIRTIO_BLK_F_SECURE_ERASE");
    let flags = VhostUserConfigFlags::empty();
    let (_, config) = front.messages.get_config(0, 72, flags, &[0; 72]).unwrap();
    let u32_at = |at: usize| u32::from_le_bytes(config[at..at + 4].try_into().unwrap());
    let most = |name| {
        let device = device.0.trim_start_matches("/dev/");
        let limit = fs::read_to_string(format!("/sys/block/{device}/queue/{name}")).unwrap();
        (limit.trim().parse::<u64>().unwrap().min(1 << 30) / 512) as u32
    };
    assert_eq!(u32_at(36), most("discard_max_bytes"));
    assert_eq!(u32_at(44) % 8, 0, "the granularity");
    assert_eq!(u32_at(48), most("write_zeroes_max_bytes"));
    assert_eq!((u32_at(40), u32_at(52)), (32, 32));
    assert_eq!((u32_at(60), u32_at(64)), (0, 0));
    let mut status = |kind, list: &[u8]| request(&mut front, 0, kind, 0, list, 0).0;
    let before = fs::metadata(image.path()).unwrap().blocks();
    let holes = [range(2048, 1024, 0), range(3072, 1024, 0)].concat();
    assert_eq!(status(DISCARD, &holes), OK);
    assert!(fs::metadata(image.path()).unwrap().blocks() <= before - 2048);
    assert_eq!(status(WRITE_ZEROES, &range(4096, 64, 1)), OK);
    assert_eq!(status(SECURE_ERASE, &range(0, 64, 0)), UNSUPP);
    let (status, _, data) = request(&mut front, 0, IN, 4096, &[], 65 * 512);
    assert_eq!(status, OK);
    assert!(data[..64 * 512].iter().all(|&b| b == 0));
    assert_eq!(data[64 * 512..][..8], 4160_u64.to_le_bytes());
    daemon.stop();
}

#[test]
fn direct_io_serves_unaligned_buffers_too() {
    let image = image();
    let path = image.path().to_str().unwrap().to_owned();
    let args = ["--direct", "--path", &path];
    let mut daemon = Daemon::spawn(BLK, &args);
    // A file system without direct I/O is said to be one.
    std::thread::sleep(std::time::Duration::from_millis(100));
    if daemon.log().contains("does not support --direct") {
        assert_eq!(daemon.wait().code(), Some(1));
        skip(
            "direct_io_serves_unaligned_buffers_too",
            format_args!("no O_DIRECT on {path}"),
        );
        return;
    }
    daemon.wait_for_socket();
    let mut front = FrontEnd::new(&daemon.socket(), Setup::default());
    let memory = front.guest.memory.clone();
    const LEN: u32 = 2 << 20; // more than the bounce buffer has
    // Two at once: the second waits for the buffer.
    let mut jobs = Vec::new();
    for (number, kind) in [(0, OUT), (1, OUT)] {
        let head = front.guest.alloc(16, 16);
        let sector = u64::from(number * LEN / 512);
        memory.write_slice(&header(kind, sector), head).unwrap();
        let data = GuestAddress(front.guest.alloc(u64::from(LEN) + 1, 4096).0 + 1);
        let bytes: Vec<u8> = (0..LEN).map(|i| (i % 253 + number) as u8).collect();
        memory.write_slice(&bytes, data).unwrap();
        let status = front.guest.alloc(1, 1);
        memory.write_obj(0xee_u8, status).unwrap();
        let readable = [Segment::new(head, 16), Segment::new(data, LEN)];
        let writable = [Segment::new(status, 1)];
        front.queues[0].submit(&front.guest, &readable, &writable, u64::from(number));
        jobs.push((status, bytes));
    }
    for _ in 0..2 {
        assert_eq!(front.complete(0).1, 1);
    }
    let disk = fs::read(&path).unwrap();
    for (number, (status, bytes)) in jobs.iter().enumerate() {
        assert_eq!(memory.read_obj::<u8>(*status).unwrap(), OK);
        assert!(disk[number * LEN as usize..][..LEN as usize] == bytes[..]);
    }
    let head = front.guest.alloc(16, 16);
    memory.write_slice(&header(IN, 0), head).unwrap();
    let out = GuestAddress(front.guest.alloc(u64::from(LEN) + 4, 4096).0 + 3);
    let writable = [Segment::new(out, LEN + 1)];
    front.queues[0].submit(&front.guest, &[Segment::new(head, 16)], &writable, 7);
    assert_eq!(front.complete(0), (7, LEN + 1));
    let read = front.guest.read(out, LEN as usize + 1);
    assert!(read[..LEN as usize] == jobs[0].1[..]);
    assert_eq!(read[LEN as usize], OK);
    daemon.stop();
}

#[test]
fn queues_are_served_side_by_side() {
    let setup = Setup {
        queues: 4,
        ..Setup::default()
    };
    let mut m = Machine::new(&["--queues", "4"], setup);
    let mut expected = vec![vec![0_u8; 4]; 4];
    for round in 0..64_u64 {
        for (queue, written) in expected.iter_mut().enumerate() {
            let sector = round * 4 + queue as u64;
            *written = vec![(round as u8) ^ (queue as u8) << 6; 512];
            let (status, ..) = request(&mut m.front, queue, OUT, sector, written, 0);
            assert_eq!(status, OK);
        }
        for (queue, written) in expected.iter().enumerate() {
            // Read by another queue than wrote it.
            let sector = round * 4 + queue as u64;
            let (status, _, data) = request(&mut m.front, (queue + 1) % 4, IN, sector, &[], 512);
            assert_eq!((status, &data), (OK, written));
        }
    }
    m.daemon.stop();
}

#[test]
fn a_full_queue_completes_with_fewer_interrupts_than_requests() {
    let mut m = Machine::plain();
    let memory = m.front.guest.memory.clone();
    let head = m.front.guest.alloc(16, 16);
    memory.write_slice(&header(IN, 0), head).unwrap();
    let out = m.front.guest.alloc(513, 4096);
    let mut kicks = 0;
    const ROUNDS: u64 = 200;
    for _ in 0..ROUNDS {
        let queue = &mut m.front.queues[0];
        let mut session = queue.ring.session(&memory).unwrap();
        for token in 0..32 {
            let writable = [Segment::new(out, 513)];
            session
                .add(&[Segment::new(head, 16)], &writable, token)
                .unwrap();
        }
        if session.publish().unwrap() {
            queue.kick.write(1).unwrap();
            kicks += 1;
        }
        for _ in 0..32 {
            assert_eq!(m.front.complete(0).1, 513);
        }
    }
    let interrupts = m.front.queues[0].interrupts;
    assert!(
        kicks <= ROUNDS && interrupts <= ROUNDS * 8,
        "{kicks} kicks, {interrupts} interrupts"
    );
    drop(m.front);
    let daemon = m.daemon;
    daemon.signal(Signal::SIGTERM);
    let (code, log) = daemon.outcome();
    assert_eq!(code, Some(0));
    let number = |name: &str| -> u64 {
        let rest = log.split(&format!(" {name}=")).nth(1).unwrap();
        rest.split_whitespace().next().unwrap().parse().unwrap()
    };
    assert_eq!(number("requests"), ROUNDS * 32);
    assert!(number("syscalls") < ROUNDS * 32, "{log}");
}

#[test]
fn get_vring_base_drains_and_the_ring_goes_on_from_there() {
    for setup in Setup::default().formats() {
        let mut m = Machine::new(&["--in-order", "on"], setup);
        let memory = m.front.guest.memory.clone();
        let head = m.front.guest.alloc(16, 16);
        memory.write_slice(&header(IN, 0), head).unwrap();
        let out = m.front.guest.alloc(65537, 4096);
        let mut place = m.front.fresh();
        for round in 0..50 {
            let count = 1 + round % 30;
            for token in 0..count {
                let writable = [Segment::new(out, 65537)];
                let queue = &mut m.front.queues[0];
                queue.submit(&m.front.guest, &[Segment::new(head, 16)], &writable, token);
            }
            let stopped = m.front.messages.get_vring_base(0).unwrap();
            // What was taken is finished, and nothing else.
            let mut session = m.front.queues[0].ring.session(&memory).unwrap();
            let mut done = 0;
            while session.poll_used().unwrap().is_some() {
                done += 1;
            }
            place = moved(place, done, setup);
            assert_eq!(stopped, place);
            m.front.start(0, stopped);
            for _ in u64::from(done)..count {
                assert_eq!(m.front.complete(0).1, 65537);
            }
            place = moved(place, count as u16 - done, setup);
        }
        m.daemon.stop();
    }
}

/// The base of a ring that is `chains` requests of two descriptors further.
fn moved(base: u32, chains: u16, setup: Setup) -> u32 {
    if !setup.packed {
        return u32::from((base as u16).wrapping_add(chains));
    }
    // The used half is the same: nothing is in flight.
    let (mut at, mut wrap) = (base as u16 & 0x7fff, base & 0x8000);
    at += 2 * chains;
    if at >= setup.size {
        (at, wrap) = (at - setup.size, wrap ^ 0x8000);
    }
    (u32::from(at) | wrap) * 0x1_0001
}

/// A front-end that knows of half the base of a packed queue, the available one.
#[test]
fn half_a_base_is_enough() {
    let setup = Setup {
        packed: true,
        ..Setup::default()
    };
    let mut m = Machine::new(&[], setup);
    for _ in 0..100 {
        assert_eq!(m.status(IN, 7, &[], 512), OK);
        let base = m.front.messages.get_vring_base(0).unwrap();
        m.front.start(0, base & 0xffff);
    }
    m.front.messages.get_vring_base(0).unwrap();
    m.daemon.stop();
}

#[test]
fn what_is_not_to_be_offered_is_not() {
    for (args, offered) in [
        (&[] as &[&str], frontend::RING_PACKED),
        (&["--packed", "off"], 0),
        (
            &["--in-order", "on"],
            frontend::RING_PACKED | frontend::IN_ORDER,
        ),
    ] {
        let m = Machine::new(args, Setup::default());
        let features = m.front.messages.get_features().unwrap();
        let both = frontend::RING_PACKED | frontend::IN_ORDER;
        assert_eq!(features & both, offered, "{args:?}");
        m.daemon.stop();
    }
}

#[test]
fn a_disabled_ring_waits_until_it_is_enabled() {
    let mut m = Machine::plain();
    m.front.messages.set_vring_enable(0, false).unwrap();
    let head = m.front.guest.alloc(16, 16);
    m.front
        .guest
        .memory
        .write_slice(&header(FLUSH, 0), head)
        .unwrap();
    let status = m.front.guest.alloc(1, 1);
    let (readable_part, writable) = ([Segment::new(head, 16)], [Segment::new(status, 1)]);
    m.front.queues[0].submit(&m.front.guest, &readable_part, &writable, 1);
    let call = m.front.queues[0].call.as_raw_fd();
    assert!(!readable(call, std::time::Duration::from_millis(100)));
    m.front.messages.set_vring_enable(0, true).unwrap();
    assert_eq!(m.front.complete(0), (1, 1));
    m.daemon.stop();
}

#[test]
fn a_driver_that_breaks_its_ring_stops_that_ring_only() {
    let setup = Setup {
        queues: 2,
        ..Setup::default()
    };
    for setup in setup.formats() {
        let mut m = Machine::new(&["--queues", "2", "--in-order", "on"], setup);
        assert_eq!(request(&mut m.front, 0, IN, 0, &[], 512).0, OK);
        let layout = *m.front.queues[0].ring.layout();
        let memory = m.front.guest.memory.clone();
        if setup.packed {
            // All descriptors available, each continued in the next. The request before had two.
            for index in 0..u64::from(setup.size) {
                let flags = if index < 2 {
                    1_u16 << 15 | 1
                } else {
                    1 << 7 | 1
                };
                let at = layout.desc_table().0 + 16 * index + 14;
                memory.write_obj(flags, GuestAddress(at)).unwrap();
            }
        } else {
            let idx = GuestAddress(layout.avail_ring().0 + 2);
            memory.write_obj(0x7fff_u16, idx).unwrap();
        }
        m.front.queues[0].kick.write(1).unwrap();
        assert!(m.front.queues[0].failed());
        assert_eq!(request(&mut m.front, 1, IN, 5, &[], 512).0, OK);
        m.daemon.assert_idle();
        assert!(
            m.daemon.log().contains("queue stopped"),
            "{}",
            m.daemon.log()
        );
        // A new front-end finds everything in order.
        drop(m.front);
        m.front = FrontEnd::new(&m.daemon.socket(), Setup { queues: 1, ..setup });
        assert_eq!(request(&mut m.front, 0, IN, 5, &[], 512).0, OK);
        m.daemon.stop();
    }
}

#[test]
fn memory_can_come_and_go_under_a_running_ring() {
    let mut m = Machine::plain();
    let second = m.front.guest.regions()[1];
    let read_into_second = |m: &mut Machine| {
        let head = m.front.guest.alloc(16, 16);
        m.front
            .guest
            .memory
            .write_slice(&header(IN, 9), head)
            .unwrap();
        let out = [Segment::new(GuestAddress(SECOND), 513)];
        m.front.queues[0].submit(&m.front.guest, &[Segment::new(head, 16)], &out, 4);
        m.front.complete(0)
    };
    assert_eq!(read_into_second(&mut m), (4, 513));
    m.front.messages.remove_mem_region(&second).unwrap();
    assert_eq!(read_into_second(&mut m), (4, 0));
    assert!(m.front.messages.remove_mem_region(&second).is_err());
    m.front.messages.add_mem_region(&second).unwrap();
    assert_eq!(read_into_second(&mut m), (4, 513));
    m.daemon.stop();
}

/// QEMU changes a region of memory by taking it away and adding it again, also the one that a ring lies in.
#[test]
fn a_ring_comes_back_with_its_memory() {
    let mut m = Machine::plain();
    let regions = m.front.guest.regions();
    assert_eq!(m.status(FLUSH, 0, &[], 0), OK);
    let (head, answer) = (m.front.guest.alloc(16, 16), m.front.guest.alloc(513, 16));
    let memory = m.front.guest.memory.clone();
    memory.write_slice(&header(IN, 5), head).unwrap();
    m.front.messages.remove_mem_region(&regions[0]).unwrap();
    // What the driver asks for meanwhile waits.
    let writable = [Segment::new(answer, 513)];
    m.front.queues[0].submit(&m.front.guest, &[Segment::new(head, 16)], &writable, 9);
    m.front.messages.add_mem_region(&regions[0]).unwrap();
    assert_eq!(m.front.complete(0), (9, 513));
    assert_eq!(memory.read_obj::<u64>(answer).unwrap(), 5);
    assert!(!m.daemon.log().contains("WARN"), "{}", m.daemon.log());
    m.daemon.stop();
}

#[test]
fn a_disk_that_shrinks_gives_errors_and_nothing_worse() {
    let mut m = Machine::plain();
    m.image.as_file().set_len(4096).unwrap();
    assert_eq!(m.status(IN, 0, &[], 4096), OK);
    assert_eq!(m.status(IN, 4096, &[], 4096), IOERR);
    m.daemon.stop();
}

#[test]
fn a_disk_that_grows_is_announced() {
    let mut m = Machine::plain();
    assert_eq!(m.status(IN, DISK / 512, &[], 512), IOERR);
    m.image.as_file().set_len(2 * DISK).unwrap();
    // Without anywhere to say it, it is taken up all the same.
    m.daemon.signal(Signal::SIGHUP);
    let capacity = |m: &mut Machine| {
        let flags = VhostUserConfigFlags::empty();
        let (_, config) = m.front.messages.get_config(0, 8, flags, &[0; 8]).unwrap();
        u64::from_le_bytes(config.try_into().unwrap()) * 512
    };
    let start = Instant::now();
    while capacity(&mut m) != 2 * DISK {
        assert!(start.elapsed() < PATIENCE, "{}", m.daemon.log());
    }
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    m.front.messages.set_backend_request_fd(&theirs).unwrap();
    drop(theirs);
    m.image.as_file().set_len(3 * DISK).unwrap();
    m.daemon.signal(Signal::SIGHUP);
    ours.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut message = [0; 12];
    ours.read_exact(&mut message).unwrap();
    // VHOST_USER_BACKEND_CONFIG_CHANGE_MSG, version 1, no payload.
    assert_eq!(message, [2, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(capacity(&mut m), 3 * DISK);
    assert_eq!(m.status(IN, 3 * DISK / 512 - 1, &[], 512), OK);
    // A size that is none is not taken up.
    m.image.as_file().set_len(3 * DISK + 100).unwrap();
    m.daemon.signal(Signal::SIGHUP);
    while !m.daemon.log().contains("stays as it was") {
        assert!(start.elapsed() < PATIENCE, "{}", m.daemon.log());
    }
    assert_eq!(capacity(&mut m), 3 * DISK);
    m.daemon.stop();
}

#[test]
fn a_null_disk_answers_without_data() {
    let daemon = Daemon::start(BLK, &["--null", "1T"]);
    let mut front = FrontEnd::new(&daemon.socket(), Setup::default());
    assert_eq!(request(&mut front, 0, IN, 1 << 30, &[], 4096).0, OK);
    assert_eq!(request(&mut front, 0, OUT, 0, &[1; 512], 0).0, OK);
    assert_eq!(request(&mut front, 0, FLUSH, 0, &[], 0).0, OK);
    assert_eq!(request(&mut front, 0, IN, 1 << 31, &[], 4096).0, IOERR);
    daemon.stop();
}

#[test]
fn the_disk_is_locked_and_free_again_at_once() {
    let image = image();
    let first = serve(&image, &[]);
    let path = image.path().to_str().unwrap();
    let (code, log) = Daemon::spawn(BLK, &["--path", path]).outcome();
    assert_eq!(code, Some(1));
    assert!(log.contains("in use by another program"), "{log}");
    first.stop();
    for _ in 0..5 {
        serve(&image, &[]).stop();
    }
    let start = Instant::now();
    drop(serve(&image, &[])); // killed
    serve(&image, &[]).stop();
    assert!(start.elapsed() < PATIENCE);
}

#[test]
fn each_wrong_disk_has_its_message_and_status() {
    let dir = tempfile::tempdir().unwrap();
    let odd = dir.path().join("odd");
    fs::write(&odd, [0; 700]).unwrap();
    let empty = dir.path().join("empty");
    fs::write(&empty, []).unwrap();
    let absent = dir.path().join("absent");
    for (path, message) in [
        (odd.as_path(), "700 bytes, which is not a multiple"),
        (empty.as_path(), "is empty"),
        (absent.as_path(), "does not exist"),
        (dir.path(), "neither a regular file nor a block device"),
    ] {
        let (code, log) = Daemon::spawn(BLK, &["--path", path.to_str().unwrap()]).outcome();
        assert_eq!(code, Some(1), "{log}");
        assert!(log.contains(message), "{log}");
    }
    for args in [
        &["--path", "x", "--null", "1G"][..],
        &["--null", "0"],
        &["--null", "1G", "--queue-size", "100"],
        &["--null", "1G", "--no-such-option"],
        &[
            "--null",
            "1G",
            "--serial",
            "far too long for a serial number",
        ],
        &[],
    ] {
        let (code, log) = Daemon::spawn(BLK, args).outcome();
        assert_eq!(code, Some(2), "{log}");
    }
}

#[test]
fn a_disk_without_permission_is_refused() {
    let test = "a_disk_without_permission_is_refused";
    const NOBODY: u32 = 65534;
    let dir = tempfile::tempdir().unwrap();
    let allow = |path: &Path, mode| {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    };
    allow(dir.path(), 0o755);
    let path = dir.path().join("disk");
    fs::write(&path, [0; 512]).unwrap();
    for (mode, args, what) in [
        (
            0o644,
            &[][..],
            "opened for writing; use --read-only, or change its permissions",
        ),
        (0o600, &["--read-only"], "opened"),
    ] {
        allow(&path, mode);
        let mut command = Command::new(BLK);
        command.uid(NOBODY).gid(NOBODY);
        command.arg("--path").arg(&path).args(args);
        let Some((code, log)) = without_rights(test, &mut command) else {
            return;
        };
        assert_eq!(code, Some(1), "{log}");
        let path = path.display();
        let expected = format!(
            "ringside-blk: disk {path} cannot be {what}: Permission denied (os error 13)\n"
        );
        assert_eq!(log, expected);
    }
}

#[test]
fn two_programs_use_a_disk_in_turns() {
    let image = image();
    let path = image.path().to_str().unwrap();
    let in_turns = ["--path", path, "--lock", "running"];
    let first = Daemon::start(BLK, &in_turns);
    let second = Daemon::start(BLK, &in_turns);
    let mut here = FrontEnd::new(&first.socket(), Setup::default());
    let data = [0x5a; 512];
    assert_eq!(request(&mut here, 0, OUT, 3, &data, 0).0, OK);
    // Whoever wants it for himself is refused, and so is the other one, as long as the queue runs.
    let (status, log) = Daemon::spawn(BLK, &["--path", path]).outcome();
    assert_eq!(status, Some(1), "{log}");
    let mut there = FrontEnd::idle(&second.socket(), Setup::default());
    let start = |front: &mut FrontEnd, base| {
        front.prepare(0, base);
        front.messages.set_vring_kick(0, &front.queues[0].kick)
    };
    assert!(start(&mut there, 0).is_err());
    assert!(second.log().contains("is in use by another program"));
    let base = here.messages.get_vring_base(0).unwrap();
    start(&mut there, 0).unwrap();
    there.messages.set_vring_enable(0, true).unwrap();
    assert_eq!(request(&mut there, 0, IN, 3, &[], 512).2, data);
    assert!(start(&mut here, base).is_err());
    there.messages.get_vring_base(0).unwrap();
    start(&mut here, base).unwrap();
    assert_eq!(request(&mut here, 0, IN, 3, &[], 512).2, data);
    // A front-end that leaves has had its turn as well.
    drop((here, there));
    let mut there = FrontEnd::new(&second.socket(), Setup::default());
    assert_eq!(request(&mut there, 0, IN, 3, &[], 512).2, data);
    second.stop();
    first.stop();
}

//! What a driver sees of a block device that is not there: all of the workers' path, on a fake device and a plain file.

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use clap::Parser;
use nix::sys::eventfd::{EfdFlags, EventFd};
use ringside_rings::{DeviceRing, DriverLayout, DriverRing, Segment};
use vm_memory::{Bytes, GuestAddress};

use super::config::feature;
use super::device::fake::{Call, Fake};
use super::device::{ZoneAction, ZoneInfo};
use super::zones::Zones;
use super::{Blk, BlkArgs, BlkConfig, ZoneGeometry};
use crate::shell::{Command, CommandSender, Device, Memory, Vring, WorkerThread, command_channel};

const IN: u32 = 0;
const OUT: u32 = 1;
const SECURE_ERASE: u32 = 14;
const ZONE_APPEND: u32 = 15;
const ZONE_REPORT: u32 = 16;
const ZONE_OPEN: u32 = 18;
const ZONE_FINISH: u32 = 22;
const ZONE_RESET: u32 = 24;
const ZONE_RESET_ALL: u32 = 26;
/// Status values (VIRTIO 1.3, 5.2.6).
const OK: u8 = 0;
const IOERR: u8 = 1;
const UNSUPP: u8 = 2;
const INVALID_CMD: u8 = 3;
const UNALIGNED_WP: u8 = 4;
const OPEN_RESOURCE: u8 = 5;
const ACTIVE_RESOURCE: u8 = 6;

const PATIENCE: Duration = Duration::from_secs(20);
/// Of the queues, and where they lie.
const SIZE: u16 = 64;
const QUEUE: u64 = 0x1_0000;
const MEMORY: usize = 16 << 20;

/// Zones of a mebibyte, three quarters of which can be written; the first anywhere.
const ZONE: u64 = 1 << 20;
const CAPACITY: u64 = 8 * ZONE;
const WRITABLE: u64 = ZONE / 4 * 3;
const GEOMETRY: ZoneGeometry = ZoneGeometry {
    size: ZONE,
    max_open: 0,
    max_active: 0,
    max_append: 65536,
    write_granularity: 4096,
};

#[derive(Parser)]
struct Cli {
    #[command(flatten)]
    blk: BlkArgs,
    #[arg(long)]
    print_capabilities: bool,
}

struct Queue {
    driver: DriverRing<u64>,
    kick: EventFd,
    sender: CommandSender,
    thread: Option<WorkerThread>,
}

/// A disk with two queues, and their driver.
struct Machine {
    fake: Arc<Fake>,
    file: Arc<File>,
    memory: Arc<Memory>,
    queues: Vec<Queue>,
    next: u64,
    _blk: Blk,
}

/// A request that was sent.
#[derive(Clone, Copy)]
struct Sent {
    answer: GuestAddress,
    room: u64,
}

impl Machine {
    fn new(without: u64, change: impl FnOnce(&mut BlkConfig, &Arc<Fake>)) -> Self {
        let temporary = tempfile::NamedTempFile::new().unwrap();
        temporary.as_file().set_len(CAPACITY).unwrap();
        let path = temporary.path().to_str().unwrap();
        let cli = Cli::try_parse_from(["x", "--path", path, "--queues", "2"]).unwrap();
        assert!(!cli.print_capabilities);
        let mut config = cli.blk.open().unwrap();
        let zone = |number: u64| ZoneInfo {
            start: number * ZONE,
            len: ZONE,
            capacity: WRITABLE,
            write_pointer: number * ZONE,
            kind: if number == 0 { 1 } else { 2 },
            condition: u8::from(number > 0),
        };
        let fake = Arc::new(Fake {
            zones: (0..8).map(zone).collect::<Vec<_>>().into(),
            at_once: 3,
            ..Fake::default()
        });
        config.disk.as_mut().unwrap().device = Some(Arc::<Fake>::clone(&fake));
        change(&mut config, &fake);
        let mut blk = Blk::new(config);
        let features = blk.features() & !without;
        blk.set_features(features);
        let memory = Arc::new(Memory::from_ranges(&[(GuestAddress(0), MEMORY)]).unwrap());
        let queues = (0..2_u16).map(|index| {
            let (sender, commands) = command_channel().unwrap();
            let thread = blk.spawn_worker(index.into(), commands).unwrap();
            let base = GuestAddress(QUEUE * u64::from(index));
            let layout = DriverLayout::new(base, SIZE, 0).unwrap();
            let driver = DriverRing::new(layout, true, memory.as_ref()).unwrap();
            let kick = EventFd::from_flags(EfdFlags::EFD_NONBLOCK).unwrap();
            let vring = Vring {
                index,
                ring: DeviceRing::new(&layout.config(true), memory.as_ref()).unwrap(),
                memory: Arc::clone(&memory),
                kick: Some(kick.as_fd().try_clone_to_owned().unwrap().into()),
                call: None,
                err: None,
                features,
                enabled: true,
            };
            sender.send(Command::Start(Box::new(vring))).unwrap();
            Queue {
                driver,
                kick,
                sender,
                thread: Some(thread),
            }
        });
        Self {
            queues: queues.collect(),
            fake,
            file: Arc::new(temporary.reopen().unwrap()),
            memory,
            next: 4 * QUEUE,
            _blk: blk,
        }
    }

    fn zoned(without: u64) -> Self {
        Self::new(without, |config, fake| {
            let zones = Zones::read(fake.as_ref(), &GEOMETRY, CAPACITY).unwrap();
            config.disk.as_mut().unwrap().zones = Some((Arc::new(zones), GEOMETRY));
            config.geometry.zones = Some(GEOMETRY);
        })
    }

    fn alloc(&mut self, len: u64) -> GuestAddress {
        let at = self.next.next_multiple_of(16);
        self.next = at + len;
        assert!(self.next < u64::try_from(MEMORY).unwrap());
        GuestAddress(at)
    }

    /// Makes a request available.
    fn send(&mut self, queue: usize, kind: u32, sector: u64, data: &[u8], room: u64) -> Sent {
        let request = self.alloc(16 + u64::try_from(data.len()).unwrap());
        let answer = self.alloc(room + 1);
        let memory = Arc::clone(&self.memory);
        memory.write_obj(kind, request).unwrap();
        memory
            .write_obj(sector, GuestAddress(request.0 + 8))
            .unwrap();
        memory
            .write_slice(data, GuestAddress(request.0 + 16))
            .unwrap();
        memory
            .write_obj(0xee_u8, GuestAddress(answer.0 + room))
            .unwrap();
        // The last data with the status; an append's answer is in pieces that fit nothing.
        let (first, rest) = (room.min(3), room - room.min(3));
        let len = |len: u64| u32::try_from(len).unwrap();
        let mut readable = vec![Segment::new(request, 16)];
        if !data.is_empty() {
            let data_len = len(u64::try_from(data.len()).unwrap());
            readable.push(Segment::new(GuestAddress(request.0 + 16), data_len));
        }
        let mut writable = vec![Segment::new(GuestAddress(answer.0 + first), len(rest + 1))];
        if first > 0 {
            writable.insert(0, Segment::new(answer, len(first)));
        }
        let queue = &mut self.queues[queue];
        let mut session = queue.driver.session(memory.as_ref()).unwrap();
        session.add(&readable, &writable, answer.0).unwrap();
        if session.publish().unwrap() {
            queue.kick.write(1).unwrap();
        }
        Sent { answer, room }
    }

    /// Waits for as many answers of a queue. Returns their used lengths in the order in which they came.
    fn wait(&mut self, queue: usize, count: usize) -> Vec<u32> {
        let start = Instant::now();
        let mut lens = Vec::new();
        let mut session = self.queues[queue]
            .driver
            .session(self.memory.as_ref())
            .unwrap();
        while lens.len() < count {
            match session.poll_used().unwrap() {
                Some((_, len)) => lens.push(len),
                None => std::thread::sleep(Duration::from_micros(100)),
            }
            assert!(start.elapsed() < PATIENCE, "{} of {count} came", lens.len());
        }
        lens
    }

    fn answer(&self, sent: Sent) -> (u8, Vec<u8>) {
        let mut bytes = vec![0; usize::try_from(sent.room).unwrap()];
        self.memory.read_slice(&mut bytes, sent.answer).unwrap();
        let status = GuestAddress(sent.answer.0 + sent.room);
        (self.memory.read_obj(status).unwrap(), bytes)
    }

    fn request(&mut self, kind: u32, sector: u64, data: &[u8], room: u64) -> (u8, u32, Vec<u8>) {
        let sent = self.send(0, kind, sector, data, room);
        let len = self.wait(0, 1)[0];
        let (status, bytes) = self.answer(sent);
        (status, len, bytes)
    }

    fn status(&mut self, kind: u32, byte: u64, data: &[u8]) -> u8 {
        self.request(kind, byte / 512, data, 0).0
    }

    fn append(&mut self, byte: u64, data: &[u8]) -> (u8, u64) {
        let (status, _, place) = self.request(ZONE_APPEND, byte / 512, data, 8);
        (status, u64::from_le_bytes(place.try_into().unwrap()) * 512)
    }

    fn holds(&self, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.file.read_exact_at(&mut bytes, at).unwrap();
        bytes
    }

    /// What the device would say of a zone.
    fn pointer_is(&self, zone: usize, at: u64) {
        self.fake.zones.lock().unwrap()[zone].write_pointer = at;
    }

    fn fails_with(&self, errno: Option<i32>) {
        *self.fake.errno.lock().unwrap() = errno;
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        for (index, queue) in (0..).zip(&mut self.queues) {
            let (done, ring) = mpsc::channel();
            queue
                .sender
                .send(Command::Stop {
                    index,
                    suspend: false,
                    done,
                })
                .unwrap();
            drop(ring.recv_timeout(PATIENCE));
            queue.sender.send(Command::Exit).unwrap();
            if let Some(thread) = queue.thread.take() {
                thread.join().unwrap();
            }
        }
    }
}

#[test]
fn writes_are_taken_at_the_write_pointer_only() {
    let mut m = Machine::zoned(0);
    let block = [7; 4096];
    // The conventional zone, anywhere.
    assert_eq!(m.status(OUT, ZONE / 2, &block), OK);
    assert_eq!(m.status(OUT, 4096, &block), OK);
    assert_eq!(m.status(OUT, ZONE, &block), OK);
    assert_eq!(m.status(OUT, ZONE + 4096, &block), OK);
    m.pointer_is(1, ZONE + 8192);
    assert_eq!(m.status(OUT, ZONE, &[9; 4096]), UNALIGNED_WP);
    assert_eq!(m.holds(ZONE, 4096), block, "it did not reach the device");
    assert_eq!(m.status(OUT, ZONE + 12288, &block), UNALIGNED_WP);
    assert_eq!(m.status(OUT, ZONE + 8192, &[1; 512]), UNALIGNED_WP);
    assert_eq!(m.status(OUT, ZONE + 8192, &block), OK);
    // Out of the zone, beyond what can be written of it, and into one that is full.
    assert_eq!(m.status(OUT, ZONE - 4096, &[7; 8192]), INVALID_CMD);
    assert_eq!(m.status(OUT, 2 * ZONE, &vec![1; 900 << 10]), INVALID_CMD);
    assert_eq!(m.status(OUT, 2 * ZONE, &vec![1; 768 << 10]), OK);
    assert_eq!(m.status(OUT, 2 * ZONE + WRITABLE, &block), INVALID_CMD);
    // Reads of such zones end with them.
    let read = |m: &mut Machine, at: u64, len| m.request(IN, at / 512, &[], len).0;
    assert_eq!(read(&mut m, 0, 2 * ZONE), OK);
    assert_eq!(read(&mut m, 2 * ZONE, ZONE), OK);
    assert_eq!(read(&mut m, 3 * ZONE - 512, 1024), INVALID_CMD);
}

#[test]
fn appends_of_two_queues_share_a_zone() {
    let mut m = Machine::zoned(0);
    let mut sent = Vec::new();
    for number in 0..24_u8 {
        let queue = usize::from(number % 2);
        let data = vec![number; 4096 * (1 + usize::from(number % 3))];
        let zone = if number % 5 == 0 { 4 } else { 3 };
        let request = m.send(queue, ZONE_APPEND, zone * ZONE / 512, &data, 8);
        sent.push((zone, request, data));
    }
    for queue in [0, 1] {
        assert!(m.wait(queue, 12).iter().all(|&len| len == 9));
    }
    let mut places = Vec::new();
    for (zone, request, data) in &sent {
        let (status, place) = m.answer(*request);
        assert_eq!(status, OK);
        let at = u64::from_le_bytes(place.try_into().unwrap()) * 512;
        assert_eq!(m.holds(at, data.len()), *data);
        places.push((*zone, at, u64::try_from(data.len()).unwrap()));
    }
    // One behind the other, without holes.
    places.sort_unstable();
    for zone in [3, 4] {
        let mut next = zone * ZONE;
        for &(_, at, len) in places.iter().filter(|place| place.0 == zone) {
            assert_eq!(at, next);
            next += len;
        }
    }
}

/// What a broken queue had, and what it was waiting for, comes free for the other.
#[test]
fn a_queue_that_breaks_holds_no_zone() {
    for _ in 0..20 {
        let mut m = Machine::zoned(0);
        let block = [7; 4096];
        for number in 0..20 {
            m.send(number % 2, ZONE_APPEND, 3 * ZONE / 512, &block, 8);
        }
        let queue = &m.queues[1];
        let index = GuestAddress(queue.driver.layout().avail_ring().0 + 2);
        m.memory.write_obj(9999_u16, index).unwrap();
        queue.kick.write(1).unwrap();
        m.wait(0, 10);
        assert_eq!(m.status(ZONE_RESET, 3 * ZONE, &[]), OK);
        assert_eq!(m.append(3 * ZONE, &block), (OK, 3 * ZONE));
    }
}

#[test]
fn appends_have_their_own_rules() {
    let mut m = Machine::zoned(0);
    let block = [7; 4096];
    assert_eq!(m.append(ZONE, &block), (OK, ZONE));
    assert_eq!(m.status(OUT, ZONE + 4096, &block), OK);
    assert_eq!(m.append(ZONE, &block), (OK, ZONE + 8192));
    assert_eq!(m.append(ZONE + 4096, &block).0, INVALID_CMD);
    assert_eq!(m.append(0, &block).0, INVALID_CMD, "a conventional zone");
    assert_eq!(m.append(CAPACITY, &block).0, INVALID_CMD);
    assert_eq!(m.append(ZONE, &vec![1; 65536 + 512]).0, INVALID_CMD);
    assert_eq!(m.append(ZONE, &[]).0, INVALID_CMD);
    // No room for the place.
    assert_eq!(m.status(ZONE_APPEND, ZONE, &block), IOERR);
    assert_eq!(m.append(ZONE, &block), (OK, ZONE + 12288));
}

#[test]
fn zones_are_changed_and_what_is_known_of_them_with_it() {
    let mut m = Machine::zoned(0);
    let block = [7; 4096];
    assert_eq!(m.status(OUT, 3 * ZONE, &block), OK);
    assert_eq!(m.status(ZONE_RESET, 3 * ZONE, &[]), OK);
    assert_eq!(m.status(OUT, 3 * ZONE, &block), OK);
    for wrong in [0, 3 * ZONE + 4096, CAPACITY] {
        assert_eq!(m.status(ZONE_RESET, wrong, &[]), INVALID_CMD, "{wrong}");
    }
    assert_eq!(m.status(OUT, 5 * ZONE, &block), OK);
    assert_eq!(m.status(ZONE_RESET_ALL, 0, &[]), OK);
    assert_eq!(m.append(3 * ZONE, &block), (OK, 3 * ZONE));
    assert_eq!(m.append(5 * ZONE, &block), (OK, 5 * ZONE));
    // What the device refuses, and what it has no more room for.
    for (errno, status) in [
        (libc::EIO, INVALID_CMD),
        (libc::ETOOMANYREFS, OPEN_RESOURCE),
        (libc::EOVERFLOW, ACTIVE_RESOURCE),
    ] {
        m.fails_with(Some(errno));
        assert_eq!(m.status(ZONE_OPEN, 4 * ZONE, &[]), status);
    }
    // Its pointer cannot be read either: nothing is written.
    m.fails_with(Some(libc::EIO));
    assert_eq!(m.status(OUT, 4 * ZONE, &block), IOERR);
    m.fails_with(None);
    assert_eq!(m.status(OUT, 4 * ZONE, &block), OK);
    m.fake.zones.lock().unwrap()[6].condition = 14;
    assert_eq!(m.status(ZONE_FINISH, 6 * ZONE, &[]), OK);
    assert_eq!(m.status(OUT, 6 * ZONE, &block), INVALID_CMD);
    let calls = m.fake.calls.lock().unwrap();
    for (action, at, len) in [
        (ZoneAction::Reset, 3 * ZONE, ZONE),
        (ZoneAction::Reset, 0, CAPACITY),
        (ZoneAction::Open, 4 * ZONE, ZONE),
        (ZoneAction::Finish, 6 * ZONE, ZONE),
    ] {
        assert!(calls.contains(&Call::Manage(action, at, len)), "{action:?}");
    }
}

#[test]
fn a_report_comes_with_the_length_that_was_written() {
    let mut m = Machine::zoned(0);
    m.pointer_is(6, 6 * ZONE + 8192);
    let (status, len, report) = m.request(ZONE_REPORT, (5 * ZONE + 512) / 512, &[], 1000);
    assert_eq!((status, len), (OK, 64 * 4 + 1));
    let u64_at = |at: usize| u64::from_le_bytes(report[at..at + 8].try_into().unwrap());
    assert_eq!(u64_at(0), 3);
    for (at, zone) in [(64, 5), (128, 6), (192, 7)] {
        assert_eq!(u64_at(at), WRITABLE / 512);
        assert_eq!(u64_at(at + 8), zone * ZONE / 512);
        let written = if zone == 6 { 8192 } else { 0 };
        assert_eq!(u64_at(at + 16), (zone * ZONE + written) / 512);
        assert_eq!(report[at + 24..at + 26], [2, 1]);
    }
    assert_eq!(
        m.request(ZONE_REPORT, CAPACITY / 512, &[], 1000).0,
        INVALID_CMD
    );
    assert_eq!(m.request(ZONE_REPORT, 0, &[], 63).0, IOERR);
}

#[test]
fn who_does_not_know_zones_hears_nothing_of_them() {
    let mut m = Machine::zoned(feature::ZONED);
    let block = [7; 4096];
    for kind in [ZONE_OPEN, ZONE_FINISH, ZONE_RESET, ZONE_RESET_ALL] {
        assert_eq!(m.status(kind, ZONE, &[]), UNSUPP);
    }
    assert_eq!(m.append(ZONE, &block).0, UNSUPP);
    assert_eq!(m.request(ZONE_REPORT, 0, &[], 1000).0, UNSUPP);
    assert_eq!(m.status(OUT, ZONE, &block), OK);
    m.pointer_is(1, ZONE + 4096);
    assert_eq!(m.status(OUT, ZONE, &block), IOERR);
    assert_eq!(m.status(OUT, ZONE - 4096, &[7; 8192]), IOERR);
    assert_eq!(m.request(IN, 0, &[], 3 * ZONE).0, OK);
}

#[test]
fn ranges_are_erased_securely_one_after_the_other() {
    let mut m = Machine::new(0, |config, _| config.geometry.max_secure_erase = ZONE);
    let list = |ranges: &[(u64, u32, u32)]| -> Vec<u8> {
        let one = |&(sector, sectors, flags): &(u64, u32, u32)| {
            let mut bytes = sector.to_le_bytes().to_vec();
            bytes.extend(sectors.to_le_bytes());
            bytes.extend(flags.to_le_bytes());
            bytes
        };
        ranges.iter().flat_map(one).collect()
    };
    let calls = |m: &Machine| std::mem::take(&mut *m.fake.calls.lock().unwrap());
    let three = list(&[(8, 16, 0), (0, 1, 0), (2048, 2048, 0)]);
    assert_eq!(m.status(SECURE_ERASE, 0, &three), OK);
    let erase = |sector: u64, sectors: u64| Call::SecureErase(sector * 512, sectors * 512);
    assert_eq!(calls(&m), [erase(8, 16), erase(0, 1), erase(2048, 2048)]);
    assert_eq!(m.status(SECURE_ERASE, 0, &list(&[(0, 2049, 0)])), IOERR);
    assert_eq!(m.status(SECURE_ERASE, 0, &list(&[(0, 8, 1)])), UNSUPP);
    assert_eq!(calls(&m), []);
    // The first that fails is the last that is tried.
    m.fails_with(Some(libc::EOPNOTSUPP));
    assert_eq!(m.status(SECURE_ERASE, 0, &three), UNSUPP);
    m.fails_with(Some(libc::EIO));
    assert_eq!(m.status(SECURE_ERASE, 0, &three), IOERR);
    assert_eq!(calls(&m), [erase(8, 16), erase(8, 16)]);
    let mut silent = Machine::new(feature::SECURE_ERASE, |config, _| {
        config.geometry.max_secure_erase = ZONE;
    });
    assert_eq!(silent.status(SECURE_ERASE, 0, &three), UNSUPP);
    assert_eq!(calls(&silent), []);
}

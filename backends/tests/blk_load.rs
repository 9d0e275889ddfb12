//! `ringside-blk` under drivers that never pause: hostile ones, and honest ones that verify what they read.

#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation
)] // helpers of tests: a panic is how they fail

mod frontend;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use frontend::{Daemon, EVENT_IDX, FrontEnd, Guest, PATIENCE, Queue, SECOND, Setup};
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;
use ringside_rings::{DriverLayout, DriverRing, Segment};
use vhost::VhostBackend;
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::VhostUserConfigFlags;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

const BLK: &str = env!("CARGO_BIN_EXE_ringside-blk");

// Request types, a status and feature bits (VIRTIO 1.3, 5.2.3 and 5.2.6).
const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const OK: u8 = 0;
const FEATURE_FLUSH: u64 = 1 << 9;
const FEATURE_CONFIG_WCE: u64 = 1 << 11;
const INDIRECT_DESC: u64 = 1 << 28;

/// Size of a request's data in bytes.
const BLOCK: u32 = 4096;
/// Size of the disk of these tests.
const DISK: u64 = 16 << 20;

fn image() -> tempfile::NamedTempFile {
    let file = tempfile::NamedTempFile::new_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    file.as_file().set_len(DISK).unwrap();
    file
}

fn serve(image: &tempfile::NamedTempFile, args: &[&str]) -> Daemon {
    let path = image.path().to_str().unwrap();
    Daemon::start(BLK, &[&["--path", path], args].concat())
}

/// Bytes that differ from seed to seed.
fn pattern(seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..BLOCK)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state as u8
        })
        .collect()
}

/// A driver that makes the same chains available again as soon as they are used, straight in memory: the device
/// hardly ever finds its ring empty. Runs until told to stop, and counts how many chains were used.
fn never_pause(
    memory: &GuestMemoryMmap,
    layout: &DriverLayout,
    kick: &EventFd,
    stop: &AtomicBool,
    total: &AtomicU64,
) {
    let index = |ring: GuestAddress| GuestAddress(ring.0 + 2);
    let (avail, used) = (index(layout.avail_ring()), index(layout.used_ring()));
    let mut last: u16 = memory.load(used, Ordering::Acquire).unwrap();
    let mut idle = 0;
    // As far ahead as the device accepts.
    let offer = |used: u16| {
        let next = used.wrapping_add(layout.size());
        memory.store(next, avail, Ordering::Release).unwrap();
    };
    offer(last);
    while !stop.load(Ordering::Relaxed) {
        let now: u16 = memory.load(used, Ordering::Acquire).unwrap();
        if now == last {
            idle += 1;
            if idle % 1000 == 0 {
                kick.write(1).unwrap();
            }
            continue;
        }
        total.fetch_add(now.wrapping_sub(last).into(), Ordering::Relaxed);
        last = now;
        offer(now);
    }
}

/// Whatever a driver does, the front-end gets its ring back, and the program ends when it is told to.
#[test]
fn a_driver_that_never_pauses_cannot_keep_its_ring() {
    for kind in [GET_ID, IN, FLUSH] {
        let daemon = Daemon::start(BLK, &["--null", "1G"]);
        let setup = Setup {
            without: EVENT_IDX,
            ..Setup::default()
        };
        let mut front = FrontEnd::new(&daemon.socket(), setup);
        let memory = front.guest.memory.clone();
        let page = front.guest.alloc(4096, 4096);
        memory.write_obj(kind, page).unwrap();
        let writable = [Segment::new(GuestAddress(page.0 + 1024), 513)];
        let half = setup.size / 2;
        let queue = &mut front.queues[0];
        let layout = *queue.ring.layout();
        // A full ring of chains of two descriptors; then the second half of the available ring, too, names them.
        let mut session = queue.ring.session(&memory).unwrap();
        for token in 0..u64::from(half) {
            let head = session
                .add(&[Segment::new(page, 16)], &writable, token)
                .unwrap();
            let place = 4 + 2 * (u64::from(half) + token);
            let place = GuestAddress(layout.avail_ring().0 + place);
            memory.write_obj(head, place).unwrap();
        }
        session.publish().unwrap();
        let kick = queue.kick.try_clone().unwrap();
        kick.write(1).unwrap();
        let (stop, total) = (AtomicBool::new(false), AtomicU64::new(0));
        let (base, took) = thread::scope(|scope| {
            scope.spawn(|| never_pause(&memory, &layout, &kick, &stop, &total));
            let start = Instant::now();
            while total.load(Ordering::Relaxed) < 1000 && start.elapsed() < PATIENCE {
                thread::sleep(Duration::from_millis(1));
            }
            let start = Instant::now();
            // Returns only when the worker has obeyed; without that, the time-out of the test suite ends it.
            let base = front.messages.get_vring_base(0);
            let took = start.elapsed();
            stop.store(true, Ordering::Relaxed);
            (base, took)
        });
        base.unwrap();
        let total = total.into_inner();
        assert!(total >= 1000, "only {total} requests of type {kind}");
        assert!(took < PATIENCE / 2, "it took {took:?}");
        drop(front);
        daemon.stop();
    }
}

/// Requests that a queue keeps in flight.
const DEPTH: usize = 24;

/// One queue that is kept full of writes and reads of blocks of its own, each read verified.
struct Verifier<'q> {
    queue: &'q mut Queue,
    memory: GuestMemoryMmap,
    /// First block of the disk that belongs to this queue.
    first: u64,
    indirect: bool,
    /// Where each request lies: header, status, and data from `DATA` on.
    places: Vec<GuestAddress>,
    /// What each block was last written with.
    version: Vec<u64>,
    writing: Vec<bool>,
    /// Shifts the data from its alignment.
    shift: u64,
}

impl<'q> Verifier<'q> {
    const DATA: u64 = 4096;

    fn new(
        queue: &'q mut Queue,
        guest: &mut Guest,
        first: u64,
        indirect: bool,
        shift: u64,
    ) -> Self {
        Self {
            queue,
            memory: guest.memory.clone(),
            first,
            indirect,
            places: (0..DEPTH).map(|_| guest.alloc(3 * 4096, 4096)).collect(),
            version: vec![0; DEPTH],
            writing: vec![false; DEPTH],
            shift,
        }
    }

    fn contents(&self, slot: usize) -> Vec<u8> {
        pattern((self.first + slot as u64) << 32 | self.version[slot])
    }

    /// Makes the next request of a block: a write of new contents, then a read.
    fn submit(&mut self, slot: usize) {
        self.writing[slot] = !self.writing[slot];
        let place = self.places[slot];
        let data = GuestAddress(place.0 + Self::DATA + self.shift);
        let kind = if self.writing[slot] {
            self.version[slot] += 1;
            self.memory.write_slice(&self.contents(slot), data).unwrap();
            OUT
        } else {
            self.memory
                .write_slice(&[0x55; BLOCK as usize], data)
                .unwrap();
            IN
        };
        let sector = (self.first + slot as u64) * 8;
        self.memory.write_obj(kind, place).unwrap();
        self.memory
            .write_obj(sector, GuestAddress(place.0 + 8))
            .unwrap();
        self.memory
            .write_obj(0xff_u8, GuestAddress(place.0 + 16))
            .unwrap();
        // Header and data in two pieces each.
        let header = [
            Segment::new(place, 4),
            Segment::new(GuestAddress(place.0 + 4), 12),
        ];
        let halves = [
            Segment::new(data, 1536),
            Segment::new(GuestAddress(data.0 + 1536), BLOCK - 1536),
        ];
        let status = [Segment::new(GuestAddress(place.0 + 16), 1)];
        let (readable, writable) = if self.writing[slot] {
            ([&header[..], &halves].concat(), status.to_vec())
        } else {
            (header.to_vec(), [&halves[..], &status].concat())
        };
        let mut session = self.queue.ring.session(&self.memory).unwrap();
        let token = slot as u64;
        if self.indirect {
            session.add_indirect(&readable, &writable, token).unwrap();
        } else {
            session.add(&readable, &writable, token).unwrap();
        }
        if session.publish().unwrap() {
            self.queue.kick.write(1).unwrap();
        }
    }

    fn verify(&self, slot: usize, len: u32) {
        let place = self.places[slot];
        let status: u8 = self.memory.read_obj(GuestAddress(place.0 + 16)).unwrap();
        assert_eq!(status, OK);
        if self.writing[slot] {
            assert_eq!(len, 1);
            return;
        }
        assert_eq!(len, BLOCK + 1);
        let mut data = vec![0; BLOCK as usize];
        let at = GuestAddress(place.0 + Self::DATA + self.shift);
        self.memory.read_slice(&mut data, at).unwrap();
        assert!(
            data == self.contents(slot),
            "block {}",
            self.first + slot as u64
        );
    }

    /// Does `requests` requests in all.
    fn run(mut self, guest: &Guest, requests: usize) {
        for slot in 0..DEPTH {
            self.submit(slot);
        }
        for done in 1..=requests {
            let (token, len) = self.queue.complete(guest);
            let slot = token as usize;
            self.verify(slot, len);
            if done + DEPTH <= requests {
                self.submit(slot);
            }
        }
        assert_eq!(self.queue.ring.outstanding(), 0);
    }
}

/// Replaces a queue by one with room for indirect chains.
fn make_indirect(front: &mut FrontEnd, index: usize, size: u16) {
    assert_ne!(front.features & INDIRECT_DESC, 0);
    front.messages.get_vring_base(index).unwrap();
    let len = DriverLayout::new(GuestAddress(0), size, 8).unwrap().end().0;
    let base = front.guest.alloc(len, 4096);
    let layout = DriverLayout::new(base, size, 8).unwrap();
    let event_idx = front.features & EVENT_IDX != 0;
    front.queues[index].ring = DriverRing::new(layout, event_idx, &front.guest.memory).unwrap();
    front.start(index, 0);
}

/// All queues at once, each by a thread of its own.
fn hammer(front: &mut FrontEnd, requests: usize, indirect: bool, shift: u64) {
    let FrontEnd { guest, queues, .. } = front;
    let verifiers: Vec<_> = (0_u64..)
        .zip(queues.iter_mut())
        .map(|(i, queue)| Verifier::new(queue, guest, i * DEPTH as u64, indirect, shift))
        .collect();
    let guest = &*guest;
    thread::scope(|scope| {
        for verifier in verifiers {
            scope.spawn(|| verifier.run(guest, requests));
        }
    });
}

#[test]
fn queues_at_full_depth_hold_what_was_written() {
    for (args, without, indirect) in [
        (&["--queues", "4"][..], 0, false),
        (&["--queues", "4", "--direct"], 0, true),
        (
            &["--queues", "4", "--cache", "writethrough"],
            EVENT_IDX,
            true,
        ),
    ] {
        let image = image();
        let daemon = serve(&image, args);
        let setup = Setup {
            without,
            queues: 4,
            size: 128,
            ..Setup::default()
        };
        let mut front = FrontEnd::new(&daemon.socket(), setup);
        if indirect {
            for index in 0..4 {
                make_indirect(&mut front, index, 32);
            }
        }
        // Enough for the indices to wrap.
        hammer(&mut front, 400, indirect, 0);
        drop(front);
        daemon.stop();
    }
}

/// Buffers that O_DIRECT cannot use share one bounce buffer, whatever the depth.
#[test]
fn unaligned_buffers_at_full_depth_hold_what_was_written() {
    let image = image();
    let daemon = serve(&image, &["--queues", "2", "--direct"]);
    let setup = Setup {
        queues: 2,
        size: 128,
        ..Setup::default()
    };
    let mut front = FrontEnd::new(&daemon.socket(), setup);
    hammer(&mut front, 300, false, 5);
    drop(front);
    daemon.stop();
}

/// Rings that are stopped and started, and memory that is described anew, while requests are in flight; with
/// the bounce buffer, too, for which requests wait.
#[test]
fn changes_under_load_lose_nothing() {
    for shift in [0, 5] {
        let image = image();
        let daemon = serve(&image, &["--direct"]);
        let setup = Setup {
            size: 128,
            ..Setup::default()
        };
        let mut front = FrontEnd::new(&daemon.socket(), setup);
        let changes = change_under_load(&mut front, shift);
        assert!(changes > 20, "only {changes} changes");
        drop(front);
        daemon.stop();
    }
}

/// Verifies blocks on queue 0 while its ring changes all the time; returns how often it did.
fn change_under_load(front: &mut FrontEnd, shift: u64) -> u32 {
    let FrontEnd {
        guest,
        queues,
        messages,
        ..
    } = front;
    let regions = guest.regions();
    let call = queues[0].call.try_clone().unwrap();
    let verifier = Verifier::new(&mut queues[0], guest, 0, false, shift);
    let guest = &*guest;
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            verifier.run(guest, 1500);
            done.store(true, Ordering::Relaxed);
        });
        let mut changes = 0;
        let start = Instant::now();
        while !done.load(Ordering::Relaxed) {
            assert!(start.elapsed() < PATIENCE, "the requests do not end");
            match changes % 4 {
                0 => drop(messages.set_mem_table(&regions).unwrap()),
                1 => messages.set_vring_enable(0, false).unwrap(),
                2 => messages.set_vring_enable(0, true).unwrap(),
                _ => messages.set_vring_call(0, &call).unwrap(),
            }
            changes += 1;
        }
        changes
    })
}

/// A front-end leaves with requests in flight; the next one finds all that the last was told of.
#[test]
fn front_ends_that_vanish_leave_a_disk_that_works() {
    let image = image();
    let daemon = serve(&image, &["--direct", "--queues", "2"]);
    for _ in 0..5 {
        let setup = Setup {
            queues: 2,
            size: 128,
            ..Setup::default()
        };
        let mut front = FrontEnd::new(&daemon.socket(), setup);
        hammer(&mut front, 50, false, 0);
        let FrontEnd { guest, queues, .. } = &mut front;
        let mut verifier = Verifier::new(&mut queues[0], guest, 0, false, 0);
        for slot in 0..DEPTH {
            verifier.submit(slot);
        }
    }
    daemon.stop();
}

/// A driver that cannot flush, and one that switches the cache off: each write is durable then, and works.
#[test]
fn drivers_without_a_cache_are_served() {
    const WRITEBACK: u32 = 32;
    let image = image();
    let daemon = serve(&image, &[]);
    let setup = Setup {
        without: FEATURE_FLUSH | FEATURE_CONFIG_WCE,
        size: 128,
        ..Setup::default()
    };
    let mut front = FrontEnd::new(&daemon.socket(), setup);
    hammer(&mut front, 100, false, 0);
    drop(front);

    let setup = Setup {
        without: 0,
        ..setup
    };
    let mut front = FrontEnd::new(&daemon.socket(), setup);
    let flags = VhostUserConfigFlags::WRITABLE;
    front.messages.set_config(WRITEBACK, flags, &[0]).unwrap();
    hammer(&mut front, 100, false, 0);
    assert_eq!(
        front
            .messages
            .get_config(WRITEBACK, 1, flags, &[0])
            .unwrap()
            .1,
        [0]
    );
    drop(front);
    // The mode belongs to one front-end.
    let mut front = FrontEnd::new(&daemon.socket(), setup);
    assert_eq!(
        front
            .messages
            .get_config(WRITEBACK, 1, flags, &[0])
            .unwrap()
            .1,
        [1]
    );
    drop(front);
    daemon.stop();
}

/// Buffers in both regions of guest memory in one request, none of them in one piece.
#[test]
fn a_request_may_use_all_of_guest_memory() {
    let image = image();
    let daemon = serve(&image, &[]);
    let mut front = FrontEnd::new(&daemon.socket(), Setup::default());
    let memory = front.guest.memory.clone();
    let low = front.guest.alloc(8192, 4096);
    memory.write_obj(OUT, low).unwrap();
    memory.write_obj(64_u64, GuestAddress(low.0 + 8)).unwrap();
    let data = pattern(1);
    let (one, two) = (GuestAddress(low.0 + 1000), GuestAddress(SECOND + 4095));
    memory.write_slice(&data[..1000], one).unwrap();
    memory.write_slice(&data[1000..], two).unwrap();
    let status = GuestAddress(low.0 + 8191);
    let readable = [
        Segment::new(low, 16),
        Segment::new(one, 1000),
        Segment::new(two, BLOCK - 1000),
    ];
    front.queues[0].submit(&front.guest, &readable, &[Segment::new(status, 1)], 0);
    assert_eq!(front.complete(0), (0, 1));
    assert_eq!(memory.read_obj::<u8>(status).unwrap(), OK);
    let disk = std::fs::read(image.path()).unwrap();
    assert!(disk[64 * 512..64 * 512 + BLOCK as usize] == data);
    drop(front);
    daemon.stop();
}

/// The queues of 16 guests, 64 of them, on two processors: each is served, and holds what was written.
#[test]
fn many_guests_share_two_processors() {
    const GUESTS: usize = 16;
    const QUEUES: usize = 4;
    let mut two = CpuSet::new();
    let allowed = sched_getaffinity(Pid::from_raw(0)).unwrap();
    for cpu in (0..CpuSet::count()).filter(|cpu| allowed.is_set(*cpu).unwrap()) {
        if (0..cpu).filter(|cpu| two.is_set(*cpu).unwrap()).count() < 2 {
            two.set(cpu).unwrap();
        }
    }
    // Of this thread, and so of all that it starts.
    sched_setaffinity(Pid::from_raw(0), &two).unwrap();
    thread::scope(|scope| {
        for _ in 0..GUESTS {
            scope.spawn(|| {
                let image = image();
                let daemon = serve(&image, &["--queues", "4"]);
                let setup = Setup {
                    queues: QUEUES,
                    size: 128,
                    ..Setup::default()
                };
                let mut front = FrontEnd::new(&daemon.socket(), setup);
                hammer(&mut front, 200, false, 0);
                drop(front);
                daemon.stop();
            });
        }
    });
}

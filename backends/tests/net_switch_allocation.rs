//! The thread of a switch allocates nothing for a frame once it is warm.

// Counting allocations takes an allocator, which is unsafe to implement. Helpers of tests may panic.
#![allow(
    unsafe_code,
    clippy::unwrap_used,
    clippy::panic,
    clippy::arithmetic_side_effects
)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use clap::Parser;
use ringside_backends::net::{NetArgs, Switch, SwitchArgs, SwitchPort};
use ringside_backends::shell::{
    Command, CommandSender, Device, Hub, Memory, OpenPort, Vring, command_channel,
};
use ringside_rings::{DeviceRing, DriverLayout, DriverRing, Segment};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// Allocations of all threads but those of the test.
static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);

thread_local! {
    /// Set on the test's own thread.
    static EXEMPT: Cell<bool> = const { Cell::new(false) };
}

struct Counting;

// SAFETY: every call is passed on to the system's allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if !EXEMPT.with(Cell::get) {
            ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        }
        // SAFETY: the caller keeps to the contract of `alloc`, which is the same.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        // SAFETY: `ptr` came from `System` by way of this allocator, with this layout.
        unsafe { System.dealloc(ptr, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

#[derive(Parser)]
struct Cli {
    #[command(flatten)]
    net: NetArgs,
    #[command(flatten)]
    switch: SwitchArgs,
    #[arg(long)]
    print_capabilities: bool,
}

const SIZE: u16 = 256;
const LEN: usize = 4 << 20;
const BUFFERS: u64 = 0x10_0000;
/// Room for each frame.
const ROOM: u32 = 2048;
const HEADER: u32 = 12;

/// Frames that pass before allocations count, and those that count.
const WARM: u64 = 2_000;
const COUNTED: u64 = 20_000;

/// A guest of which one queue matters.
struct Guest {
    memory: Arc<Memory>,
    driver: DriverRing<u64>,
    kick: EventFd,
    sender: CommandSender,
    device: SwitchPort,
    index: u16,
}

impl Guest {
    fn new(switch: &mut Switch, number: u8, index: u16, features: u64, kicks: bool) -> Self {
        let socket = ("socket".to_owned(), "/unused".to_owned());
        let mac = ("mac".to_owned(), format!("02:00:00:00:00:{number:02x}"));
        let OpenPort { mut device, .. } = switch.open(&[socket, mac].into()).unwrap();
        let (sender, commands) = command_channel().unwrap();
        device.spawn_worker(0, commands).unwrap();
        let features = device.features() & features;
        device.set_features(features);
        let memory = Arc::new(Memory::from_ranges(&[(GuestAddress(0), LEN)]).unwrap());
        let layout = DriverLayout::new(GuestAddress(0), SIZE, 0).unwrap();
        let driver = DriverRing::new(layout, true, memory.as_ref()).unwrap();
        let kick = EventFd::new(EFD_NONBLOCK).unwrap();
        // SAFETY: the eventfd lives until the end of this call.
        let fd = unsafe { BorrowedFd::borrow_raw(kick.as_raw_fd()) };
        let vring = Vring {
            index,
            ring: DeviceRing::new(&layout.config(true), memory.as_ref()).unwrap(),
            memory: Arc::clone(&memory),
            kick: kicks.then(|| fd.try_clone_to_owned().unwrap().into()),
            call: None,
            err: None,
            features,
            enabled: true,
        };
        sender.send(Command::Start(Box::new(vring))).unwrap();
        Self {
            memory,
            driver,
            kick,
            sender,
            device,
            index,
        }
    }

    fn buffer(slot: u64, len: u32) -> [Segment; 1] {
        let at = GuestAddress(BUFFERS + slot * u64::from(ROOM));
        [Segment::new(at, len)]
    }

    /// Puts all free buffers into the ring, `len` bytes of each to be read, or all of it to be written.
    fn fill(&mut self, free: &mut Vec<u64>, len: Option<u32>) {
        let mut session = self.driver.session(self.memory.as_ref()).unwrap();
        for slot in free.drain(..) {
            match len {
                Some(len) => session.add(&Self::buffer(slot, len), &[], slot),
                None => session.add(&[], &Self::buffer(slot, ROOM), slot),
            }
            .unwrap();
        }
        if session.publish().unwrap() {
            self.kick.write(1).unwrap();
        }
    }

    fn used(&mut self, free: &mut Vec<u64>) -> u64 {
        let mut session = self.driver.session(self.memory.as_ref()).unwrap();
        let before = free.len();
        while let Some((slot, _)) = session.poll_used().unwrap() {
            free.push(slot);
        }
        (free.len() - before) as u64
    }

    fn end(self) {
        let (given_back, ring) = std::sync::mpsc::channel();
        self.sender
            .send(Command::Stop {
                suspend: false,
                index: self.index,
                done: given_back,
            })
            .unwrap();
        drop(ring.recv_timeout(Duration::from_secs(10)).unwrap());
        drop(self.device);
    }
}

/// Passes frames of `len` bytes from one guest, which kicks or is looked at, to another, which takes them without `features`, and
/// returns what was allocated meanwhile.
fn allocations(len: u32, header: [u8; 10], without: u64, kicks: bool) -> u64 {
    let args = ["x", "--tap", "unused", "--port", "/unused"];
    let cli = Cli::try_parse_from(args).unwrap();
    assert!(!cli.print_capabilities);
    let mut switch = Switch::new(&cli.net, &cli.switch, None).unwrap();
    switch.begin().unwrap();
    let mut from = Guest::new(&mut switch, 1, 1, !0, kicks);
    let mut to = Guest::new(&mut switch, 2, 0, !without, true);
    let ethernet = [2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1, 8, 0, 0x45, 0];
    for slot in 0..u64::from(SIZE) {
        let at = Guest::buffer(slot, ROOM)[0].addr;
        from.memory.write_slice(&header, at).unwrap();
        let at = GuestAddress(at.0 + u64::from(HEADER));
        from.memory.write_slice(&ethernet, at).unwrap();
    }
    let slots = || (0..u64::from(SIZE)).collect::<Vec<_>>();
    let (mut packets, mut buffers) = (slots(), slots());
    let (mut received, mut before) = (0, 0);
    let start = Instant::now();
    while received < WARM + COUNTED {
        if before == 0 && received >= WARM {
            before = ALLOCATIONS.load(Ordering::Relaxed);
        }
        to.fill(&mut buffers, None);
        from.fill(&mut packets, Some(HEADER + len));
        received += to.used(&mut buffers);
        from.used(&mut packets);
        assert!(start.elapsed() < Duration::from_secs(60), "{received} came");
    }
    let allocated = ALLOCATIONS.load(Ordering::Relaxed) - before;
    from.end();
    to.end();
    allocated
}

#[test]
fn frames_do_not_allocate() {
    const GUEST_CSUM: u64 = 1 << 1;
    EXEMPT.with(|exempt| exempt.set(true));
    // The thread that has started this one has something to write down.
    std::thread::sleep(Duration::from_millis(100));
    let unfinished = [1, 0, 0, 0, 0, 0, 34, 0, 16, 0];
    for (len, header, without, kicks) in [
        (60, [0; 10], 0, true),
        (1514, [0; 10], 0, true),
        // A checksum that is made here.
        (1514, unfinished, GUEST_CSUM, true),
        (60, [0; 10], 0, false),
    ] {
        // The counter counts: starting does allocate.
        let before = ALLOCATIONS.load(Ordering::Relaxed);
        assert_eq!(allocations(len, header, without, kicks), 0, "{len}");
        assert!(ALLOCATIONS.load(Ordering::Relaxed) > before);
    }
}

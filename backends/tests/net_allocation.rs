//! A queue pair's worker allocates nothing for a packet once it is warm.

// Descriptors are borrowed by their numbers. Helpers of tests may panic.
#![allow(
    unsafe_code,
    clippy::unwrap_used,
    clippy::panic,
    clippy::arithmetic_side_effects
)]

mod counting;

use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use clap::Parser;
use ringside_backends::net::NetArgs;
use ringside_backends::shell::{Command, Device, Memory, Vring, command_channel};
use ringside_rings::{DeviceRing, DriverLayout, DriverRing, Segment};
use vm_memory::GuestAddress;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

#[derive(Parser)]
struct Cli {
    #[command(flatten)]
    net: NetArgs,
    #[arg(long)]
    print_capabilities: bool,
}

const SIZE: u16 = 64;
const LEN: usize = 1 << 20;
const DATA: u64 = 0x4_0000;
/// Bytes of a buffer, as one segment to receive, as two to send.
const BUFFER: u32 = 2048;

/// VIRTIO_NET_F_CTRL_VQ and VIRTIO_NET_F_MQ (VIRTIO 1.3, 5.1.3): without those there is one worker.
const CONTROL: u64 = 1 << 17 | 1 << 22;

/// Packets that a worker has moved before its allocations count, and those that count.
const WARM: u64 = 2_000;
const COUNTED: u64 = 20_000;

/// Moves packets over one queue, and returns what was allocated meanwhile.
fn allocations(args: &[&str], queue: u16, packed: bool) -> u64 {
    let cli = Cli::try_parse_from([&["x"], args].concat()).unwrap();
    assert!(!cli.print_capabilities);
    let mut net = cli.net.open().unwrap();
    let features = net.features() & !CONTROL;
    net.set_features(features);
    let (sender, commands) = command_channel().unwrap();
    let thread = net.spawn_worker(0, commands).unwrap();

    let memory = Arc::new(Memory::from_ranges(&[(GuestAddress(0), LEN)]).unwrap());
    let layout = if packed {
        DriverLayout::packed(GuestAddress(0), SIZE, 0).unwrap()
    } else {
        DriverLayout::new(GuestAddress(0), SIZE, 0).unwrap()
    };
    let mut driver = DriverRing::<u64>::new(layout, true, memory.as_ref()).unwrap();
    let ring = DeviceRing::new(&layout.config(true), memory.as_ref()).unwrap();
    let (kick, call) = (
        EventFd::new(EFD_NONBLOCK).unwrap(),
        EventFd::new(EFD_NONBLOCK).unwrap(),
    );
    let file = |eventfd: &EventFd| {
        // SAFETY: the descriptor is open, and the eventfd outlives this line.
        let fd = unsafe { BorrowedFd::borrow_raw(eventfd.as_raw_fd()) };
        Some(fd.try_clone_to_owned().unwrap().into())
    };
    let vring = Vring {
        index: queue,
        ring,
        memory: Arc::clone(&memory),
        kick: file(&kick),
        call: file(&call),
        err: None,
        features,
        enabled: true,
    };
    sender.send(Command::Start(Box::new(vring))).unwrap();

    let start = Instant::now();
    let (mut done, mut before) = (0_u64, 0);
    let mut free: Vec<u64> = (0..u64::from(SIZE / 2)).collect();
    while done < WARM + COUNTED {
        if done >= WARM && before == 0 {
            before = counting::allocations();
        }
        let mut session = driver.session(memory.as_ref()).unwrap();
        while let Some(slot) = free.pop() {
            let at = DATA + slot * u64::from(BUFFER);
            let half = BUFFER / 2;
            let added = if queue == 0 {
                let whole = Segment::new(GuestAddress(at), BUFFER);
                session.add(&[], &[whole], slot)
            } else {
                let halves =
                    [at, at + u64::from(half)].map(|at| Segment::new(GuestAddress(at), half));
                session.add(&halves, &[], slot)
            };
            added.unwrap();
        }
        if session.publish().unwrap() {
            kick.write(1).unwrap();
        }
        while let Some((slot, _)) = session.poll_used().unwrap() {
            free.push(slot);
            done += 1;
        }
        assert!(start.elapsed() < Duration::from_secs(60), "{done} moved");
    }
    let allocated = counting::allocations() - before;
    let (given_back, ring) = std::sync::mpsc::channel();
    let stop = Command::Stop {
        index: queue,
        suspend: false,
        done: given_back,
    };
    sender.send(stop).unwrap();
    drop(ring.recv_timeout(Duration::from_secs(10)).unwrap());
    sender.send(Command::Exit).unwrap();
    thread.join().unwrap();
    allocated
}

#[test]
fn packets_do_not_allocate() {
    counting::exempt_this_thread();
    for packed in [false, true] {
        for (args, queue) in [
            (&["--link", "null"][..], 1),
            (&["--link", "null", "--poll", "0"], 1),
            (&["--link", "generate:60"], 0),
            (&["--link", "generate:9000"], 0),
        ] {
            // The counter counts: starting does allocate.
            let before = counting::allocations();
            assert_eq!(allocations(args, queue, packed), 0, "{args:?} {packed}");
            assert!(counting::allocations() > before);
        }
    }
}

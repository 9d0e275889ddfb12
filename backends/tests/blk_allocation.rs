//! A disk's worker allocates nothing for a request once it is warm.

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
use ringside_backends::blk::{Blk, BlkArgs};
use ringside_backends::shell::{Command, Device, Memory, Vring, command_channel};
use ringside_rings::{DeviceRing, DriverLayout, DriverRing, Segment};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

#[derive(Parser)]
struct Cli {
    #[command(flatten)]
    blk: BlkArgs,
    #[arg(long)]
    print_capabilities: bool,
}

const SIZE: u16 = 64;
const LEN: usize = 1 << 20;
const HEADERS: u64 = 0x2_0000;
const DATA: u64 = 0x4_0000;
/// Each request has two pieces of this many bytes.
const PIECE: u32 = 2048;

/// Requests that a worker has served before its allocations count, and those that count.
const WARM: u64 = 2_000;
const COUNTED: u64 = 20_000;

/// Serves reads and writes of two segments each, many at a time, their data `shift` bytes from alignment, and returns what
/// was allocated meanwhile.
fn allocations(args: &[&str], shift: u64) -> u64 {
    let cli = Cli::try_parse_from([&["x"], args].concat()).unwrap();
    assert!(!cli.print_capabilities);
    let mut blk = Blk::new(cli.blk.open().unwrap());
    let features = blk.features();
    let (sender, commands) = command_channel().unwrap();
    let thread = blk.spawn_worker(0, commands).unwrap();

    let memory = Arc::new(Memory::from_ranges(&[(GuestAddress(0), LEN)]).unwrap());
    let layout = DriverLayout::new(GuestAddress(0), SIZE, 4).unwrap();
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
        index: 0,
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
    let (mut begun, mut done, mut before) = (0_u64, 0, 0);
    let mut free: Vec<u64> = (0..u64::from(SIZE / 2)).collect();
    while done < WARM + COUNTED {
        if done >= WARM && before == 0 {
            before = counting::allocations();
        }
        let mut session = driver.session(memory.as_ref()).unwrap();
        while let Some(slot) = free.pop() {
            let (header, data) = (
                GuestAddress(HEADERS + slot * 32),
                GuestAddress(DATA + shift + slot * u64::from(2 * PIECE)),
            );
            let write = begun % 4 == 0;
            memory.write_obj(u32::from(write), header).unwrap();
            memory
                .write_obj(begun % 1024 * 8, GuestAddress(header.0 + 8))
                .unwrap();
            memory
                .write_obj(0xff_u8, GuestAddress(header.0 + 16))
                .unwrap();
            let header_part = Segment::new(header, 16);
            let status = Segment::new(GuestAddress(header.0 + 16), 1);
            let parts = [
                Segment::new(data, PIECE),
                Segment::new(GuestAddress(data.0 + u64::from(PIECE)), PIECE),
            ];
            let added = if write {
                session.add_indirect(&[header_part, parts[0], parts[1]], &[status], slot)
            } else {
                session.add_indirect(&[header_part], &[parts[0], parts[1], status], slot)
            };
            added.unwrap();
            begun += 1;
        }
        if session.publish().unwrap() {
            kick.write(1).unwrap();
        }
        while let Some((slot, _)) = session.poll_used().unwrap() {
            let status: u8 = memory
                .read_obj(GuestAddress(HEADERS + slot * 32 + 16))
                .unwrap();
            assert_eq!(status, 0);
            free.push(slot);
            done += 1;
        }
        assert!(start.elapsed() < Duration::from_secs(60), "{done} served");
    }
    let allocated = counting::allocations() - before;
    let (given_back, ring) = std::sync::mpsc::channel();
    sender
        .send(Command::Stop {
            index: 0,
            suspend: false,
            done: given_back,
        })
        .unwrap();
    drop(ring.recv_timeout(Duration::from_secs(10)).unwrap());
    sender.send(Command::Exit).unwrap();
    thread.join().unwrap();
    allocated
}

#[test]
fn requests_do_not_allocate() {
    counting::exempt_this_thread();
    let file = tempfile::NamedTempFile::new_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    file.as_file().set_len(8 << 20).unwrap();
    let path = file.path().to_str().unwrap();
    for (args, shift) in [
        (&["--null", "8M"][..], 0),
        (&["--path", path], 0),
        (&["--path", path, "--direct"], 0),
        // Through the bounce buffer.
        (&["--path", path, "--direct"], 8),
        (&["--path", path, "--poll-storage", "100"], 0),
    ] {
        // The counter counts: starting does allocate.
        let before = counting::allocations();
        assert_eq!(allocations(args, shift), 0, "{args:?}");
        assert!(counting::allocations() > before);
    }
}

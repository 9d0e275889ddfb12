//! How long one core takes for a chain: driver side, device side, and both, in batches.
//! `cargo bench -p ringside-rings`; a measurement, so nothing here passes or fails.
// A benchmark may panic, and its values are small.
#![allow(
    clippy::unwrap_used,
    clippy::arithmetic_side_effects,
    clippy::cast_precision_loss
)]

use std::hint::black_box;
use std::time::{Duration, Instant};

use ringside_rings::{
    ChainBuf, DeviceRing, DriverLayout, DriverRing, Segment, read_segments, write_segments,
};
use vm_memory::{GuestAddress, GuestMemoryMmap};

const SIZE: u16 = 256;
const BATCH: u32 = 32;
const BATCHES: u32 = 30_000;
const ROUNDS: usize = 5;

/// A block request: header, 4 KiB of data, status.
const HEADER: [Segment; 1] = [Segment::new(GuestAddress(0x10_0000), 16)];
const DATA: [Segment; 2] = [
    Segment::new(GuestAddress(0x11_0000), 4096),
    Segment::new(GuestAddress(0x10_0010), 1),
];

fn run(name: &str, layout: DriverLayout, indirect: bool, event_idx: bool) {
    let mem = GuestMemoryMmap::<()>::from_ranges(&[
        (GuestAddress(0), 0x8_0000),
        (GuestAddress(0x8_0000), 0x10_0000),
        (GuestAddress(0x1000_0000), 0x1000),
    ])
    .unwrap();
    let mut driver = DriverRing::<u32>::new(layout, event_idx, &mem).unwrap();
    let mut device = DeviceRing::new(&layout.config(event_idx), &mem).unwrap();
    let mut buf = ChainBuf::new(SIZE);
    let mut best = (Duration::MAX, Duration::MAX);
    for _ in 0..ROUNDS {
        let (mut at_driver, mut at_device) = (Duration::ZERO, Duration::ZERO);
        for _ in 0..BATCHES {
            let begin = Instant::now();
            let mut session = driver.session(&mem).unwrap();
            for token in 0..BATCH {
                if indirect {
                    session.add_indirect(&HEADER, &DATA, token).unwrap();
                } else {
                    session.add(&HEADER, &DATA, token).unwrap();
                }
            }
            black_box(session.publish().unwrap());
            let offered = Instant::now();
            let mut turn = device.session(&mem).unwrap();
            turn.disable_notifications().unwrap();
            while let Some(chain) = turn.pop(&mut buf).unwrap() {
                let mut header = [0; 16];
                read_segments(&mem, chain.readable(), 0, &mut header).unwrap();
                black_box(header);
                write_segments(&mem, chain.writable(), 4096, &[0]).unwrap();
                turn.push_used(chain.head(), 4097).unwrap();
            }
            black_box(turn.publish().unwrap());
            black_box(turn.enable_notifications().unwrap());
            let served = Instant::now();
            while let Some(token) = session.poll_used().unwrap() {
                black_box(token);
            }
            black_box(session.enable_interrupts().unwrap());
            at_driver += begin.elapsed() - (served - offered);
            at_device += served - offered;
        }
        best = best.min((at_driver, at_device));
    }
    let chains = f64::from(BATCH * BATCHES);
    let each = |time: Duration| time.as_nanos() as f64 / chains;
    let (driver, device) = (each(best.0), each(best.1));
    println!(
        "{name:36} driver {driver:6.1} ns  device {device:6.1} ns  device alone {:5.2} M chains/s",
        1e3 / device
    );
}

fn main() {
    let split = DriverLayout::new(GuestAddress(0), SIZE, 8).unwrap();
    let packed = DriverLayout::packed(GuestAddress(0), SIZE, 8).unwrap();
    for (format, layout) in [
        ("split", split),
        ("packed", packed),
        ("split in order", split.in_order()),
        ("packed in order", packed.in_order()),
    ] {
        run(&format!("{format}, direct, flags"), layout, false, false);
        run(&format!("{format}, direct, event_idx"), layout, false, true);
        run(
            &format!("{format}, indirect, event_idx"),
            layout,
            true,
            true,
        );
    }
}

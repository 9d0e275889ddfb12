//! The state of a device that goes with a guest that moves, through the messages of a front-end.

#![allow(clippy::unwrap_used, clippy::indexing_slicing)] // helpers of tests: a panic is how they fail

mod frontend;

use frontend::{Daemon, FrontEnd, Setup};
use ringside_rings::Segment;
use vhost::VhostBackend;
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::VhostUserConfigFlags;
use vm_memory::{Bytes, GuestAddress};

const BLK: &str = env!("CARGO_BIN_EXE_ringside-blk");
const NET: &str = env!("CARGO_BIN_EXE_ringside-net");
const DISK: [&str; 2] = ["--null", "1G"];
/// Not TAP interfaces: they need rights.
const CARD: [&str; 6] = [
    "--link",
    "null",
    "--queue-pairs",
    "2",
    "--mac",
    "52:54:00:00:00:05",
];
/// The number of the control queue.
const CONTROL: usize = 4;
/// `wce` (VIRTIO 1.3, 5.2.4).
const WCE: u32 = 32;

fn config(front: &mut FrontEnd, offset: u32, len: u32) -> Vec<u8> {
    let flags = VhostUserConfigFlags::empty();
    let buffer = vec![0; len as usize];
    let read = front.messages.get_config(offset, len, flags, &buffer);
    read.unwrap().1
}

/// Sends a command of the control queue, which must be obeyed (VIRTIO 1.3, 5.1.6.5).
fn command(front: &mut FrontEnd, bytes: &[u8]) {
    let at = front.guest.alloc(bytes.len() as u64 + 1, 64);
    front.guest.memory.write_slice(bytes, at).unwrap();
    let ack = GuestAddress(at.0 + bytes.len() as u64);
    let readable = [Segment::new(at, u32::try_from(bytes.len()).unwrap())];
    let FrontEnd { queues, guest, .. } = front;
    queues[CONTROL].submit(guest, &readable, &[Segment::new(ack, 1)], at.0);
    front.complete(CONTROL);
    assert_eq!(front.guest.read(ack, 1), [0], "{bytes:?}");
}

fn stop(front: &FrontEnd) {
    for queue in 0..front.queues.len() {
        front.messages.get_vring_base(queue).unwrap();
    }
}

#[test]
fn the_cache_mode_of_a_disk_goes_with_it() {
    let (from, to) = (Daemon::start(BLK, &DISK), Daemon::start(BLK, &DISK));
    let mut front = FrontEnd::new(&from.socket(), Setup::default());
    let flags = VhostUserConfigFlags::WRITABLE;
    front.messages.set_config(WCE, flags, &[0]).unwrap();
    // Rings run.
    assert_eq!(front.save_state(), None);
    stop(&front);
    let state = front.save_state().unwrap();
    let mut front = FrontEnd::idle(&to.socket(), Setup::default());
    assert_eq!(config(&mut front, WCE, 1), [1]);
    assert!(front.load_state(&state));
    assert_eq!(config(&mut front, WCE, 1), [0]);
    assert_eq!(front.save_state().unwrap(), state);
    to.stop();
}

#[test]
fn what_a_driver_said_to_a_network_card_goes_with_it() {
    let (from, to) = (Daemon::start(NET, &CARD), Daemon::start(NET, &CARD));
    let setup = Setup {
        queues: CONTROL + 1,
        ..Setup::default()
    };
    let mut front = FrontEnd::new(&from.socket(), setup);
    let mac = [0x52, 0x54, 0, 0, 0, 9];
    let group = [1, 0, 0x5e, 0, 0, 1];
    command(&mut front, &[&[1, 1][..], &mac].concat());
    command(&mut front, &[0, 0, 0]);
    let table = [&[1, 0, 0, 0, 0, 0, 1, 0, 0, 0][..], &group].concat();
    command(&mut front, &table);
    command(&mut front, &[2, 0, 7, 0]);
    command(&mut front, &[4, 0, 2, 0]);
    // All receive queues: 8 packets, 50 microseconds.
    command(&mut front, &[6, 1, 8, 0, 0, 0, 50, 0, 0, 0]);
    stop(&front);
    let state = front.save_state().unwrap();
    let mut front = FrontEnd::idle(&to.socket(), setup);
    let before = front.save_state().unwrap();
    assert_ne!(before, state);
    assert!(front.load_state(&state));
    assert_eq!(front.save_state().unwrap(), state);
    assert_eq!(config(&mut front, 0, 6), mac);
    // The next front-end's driver begins anew.
    drop(front);
    let front = FrontEnd::idle(&to.socket(), setup);
    assert_eq!(front.save_state().unwrap(), before);
    to.stop();
}

#[test]
fn a_state_that_is_wrong_changes_nothing() {
    let (mut card, disk) = (Daemon::start(NET, &CARD), Daemon::start(BLK, &DISK));
    let one_pair = Daemon::start(NET, &["--link", "null"]);
    let of = |daemon: &Daemon| FrontEnd::idle(&daemon.socket(), Setup::default());
    let (mut front, other) = (of(&card), of(&disk).save_state().unwrap());
    let good = front.save_state().unwrap();
    let mut damaged = good.clone();
    *damaged.last_mut().unwrap() ^= 1;
    let mut later = good.clone();
    later[16] += 1;
    let misfit = of(&one_pair).save_state().unwrap();
    let cases = [
        (&other, "kind `block`"),
        (&good[..good.len() - 1].to_vec(), "cut short"),
        (&damaged, "checksum"),
        (&later, "version 2"),
        (&misfit, "queue pairs"),
        (&vec![0; 40], "does not begin as one"),
        (&Vec::new(), "does not begin as one"),
        (&vec![0; 1 << 20], "more than"),
    ];
    for (number, (wrong, why)) in cases.into_iter().enumerate() {
        if number == 4 {
            // The log says so much in a while.
            card = Daemon::start(NET, &CARD);
            front = of(&card);
        }
        assert!(!front.load_state(wrong), "{why}");
        card.wait_for_line(why);
        assert_eq!(front.save_state().unwrap(), good);
    }
    assert!(front.load_state(&good));
    card.stop();
}

//! `ringside-blk` killed again and again under load: its front-end keeps what it noted about requests in flight, and the next
//! one goes on from there.

#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation
)] // helpers of tests: a panic is how they fail

mod frontend;

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::thread::sleep;
use std::time::Duration;

use frontend::disk::Disk;
use frontend::{Daemon, FrontEnd, Setup};
use ringside_control::client;
use ringside_rings::Segment;
use serde_json::Value;
use vhost::VhostBackend;
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::VhostUserInflight;
use vm_memory::Bytes;

const BLK: &str = env!("CARGO_BIN_EXE_ringside-blk");
const SIZE: usize = 4 << 20;
/// How often the program is killed, for each format.
const KILLS: usize = 25;

fn tracked(queues: usize, packed: bool) -> Setup {
    Setup {
        queues,
        packed,
        tracked: true,
        ..Setup::default()
    }
}

/// What is on the disk is known all the time, each read is compared with it, and a request that came back twice would be
/// none that the driver has.
fn survives(setup: Setup, more: &[&str]) {
    let image = tempfile::NamedTempFile::new().unwrap();
    image.as_file().set_len(SIZE as u64).unwrap();
    let path = image.path().to_str().unwrap();
    let args = [&["--path", path, "--queues", "4"], more].concat();
    let mut daemon = Daemon::start(BLK, &args);
    let front = FrontEnd::new(&daemon.socket(), setup);
    let mut disk = Disk::new(front, vec![0; SIZE]);
    for kill in 0..KILLS {
        disk.load(40, true);
        let pause = disk.random() % 2000;
        if kill % 4 != 0 {
            sleep(Duration::from_micros(pause));
        }
        daemon.replace(BLK, &args);
        disk.front.hand_over(&daemon.socket());
    }
    disk.exercise(40, true);
    disk.verify();
    disk.flush();
    let mut found = vec![0; SIZE];
    let file = File::open(image.path()).unwrap();
    file.read_exact_at(&mut found, 0).unwrap();
    assert!(found == disk.model, "the file is not what the driver wrote");
    daemon.stop();
}

#[test]
fn split_rings_survive_their_back_end() {
    survives(tracked(4, false), &[]);
}

#[test]
fn packed_rings_survive_their_back_end() {
    survives(tracked(4, true), &[]);
}

#[test]
fn rings_used_in_order_survive_their_back_end() {
    for packed in [false, true] {
        let setup = Setup {
            in_order: true,
            ..tracked(2, packed)
        };
        survives(setup, &["--in-order", "on"]);
    }
}

#[test]
fn requests_over_a_limit_survive_their_back_end() {
    survives(tracked(2, true), &["--limit", "iops=4000"]);
}

const NULL: [&str; 4] = ["--null", "1G", "--queues", "2"];

#[test]
fn tracking_is_part_of_the_status() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("control");
    let control = ["--control-socket", socket.to_str().unwrap()];
    let daemon = Daemon::start(BLK, &[&NULL[..], &control].concat());
    for tracked in [false, true] {
        let setup = Setup {
            tracked,
            ..Setup::default()
        };
        let front = FrontEnd::new(&daemon.socket(), setup);
        let status = client::call(&socket, "status", &Value::Null).unwrap();
        let found = status.unwrap()["inflight-tracking"].clone();
        assert_eq!(found, tracked);
        drop(front);
    }
}

/// The queue whose notes are damaged does not start; the other one, and the connection, go on.
#[test]
fn notes_that_make_no_sense_stop_one_queue_only() {
    for packed in [false, true] {
        let daemon = Daemon::start(BLK, &NULL);
        let mut front = FrontEnd::new(&daemon.socket(), tracked(2, packed));
        front.works(0);
        let (_, file) = front.inflight.as_ref().unwrap();
        file.write_all_at(&[7], 8).unwrap();
        front.works(0);
        front.messages.get_vring_base(0).unwrap();
        let refused = front.messages.set_vring_kick(0, &front.queues[0].kick);
        assert!(refused.is_err());
        front.works(1);
        daemon.wait_for_line("their version is unknown");
        daemon.stop();
    }
}

#[test]
fn memory_for_notes_is_checked() {
    let daemon = Daemon::start(BLK, &NULL);
    let mut front = FrontEnd::new(&daemon.socket(), tracked(2, true));
    let file = tempfile::tempfile().unwrap();
    file.set_len(1 << 20).unwrap();
    let event = &front.queues[0].kick;
    let area = |len, offset, queues, size| VhostUserInflight::new(len, offset, queues, size);
    for (area, fd) in [
        (area(1 << 20, 0, 2, 64), event.as_raw_fd()),
        (area(2 << 20, 0, 2, 64), file.as_raw_fd()),
        (area(1 << 20, 4096, 2, 64), file.as_raw_fd()),
        (area(4096, 1, 2, 64), file.as_raw_fd()),
        (area(1024, 0, 2, 64), file.as_raw_fd()),
        (area(1 << 20, 0, 3, 64), file.as_raw_fd()),
    ] {
        assert!(front.messages.set_inflight_fd(&area, fd).is_err());
    }
    front.works(0);
    // There is nothing to answer with.
    assert!(front.messages.get_inflight_fd(&area(0, 0, 3, 64)).is_err());
    FrontEnd::new(&daemon.socket(), tracked(2, false)).works(1);
}

/// A driver may choose a larger queue than its VMM asked memory for.
#[test]
fn queues_may_be_larger_than_was_said() {
    let daemon = Daemon::start(BLK, &NULL);
    for packed in [false, true] {
        let setup = Setup {
            packed,
            ..Setup::default()
        };
        let mut front = FrontEnd::new(&daemon.socket(), setup);
        let wanted = VhostUserInflight::new(0, 0, 1, setup.size / 4);
        let inflight = front.messages.get_inflight_fd(&wanted).unwrap();
        front.track(&inflight);
        front.works(0);
    }
    daemon.stop();
}

/// A front-end that cuts the notes short while they are in use loses its connection; the next one is served.
#[test]
fn notes_that_are_taken_away_cost_the_connection_only() {
    let daemon = Daemon::start(BLK, &NULL);
    let mut front = FrontEnd::new(&daemon.socket(), Setup::default());
    let file = tempfile::tempfile().unwrap();
    file.set_len(1 << 20).unwrap();
    let area = VhostUserInflight::new(1 << 20, 0, 1, 64);
    front.track(&(area, file.try_clone().unwrap()));
    front.works(0);
    file.set_len(0).unwrap();
    let (head, status) = (front.guest.alloc(16, 16), front.guest.alloc(1, 1));
    front.guest.memory.write_obj(4_u32, head).unwrap();
    let (readable, writable) = ([Segment::new(head, 16)], [Segment::new(status, 1)]);
    front.queues[0].submit(&front.guest, &readable, &writable, 1);
    assert!(front.raw.is_closed());
    FrontEnd::new(&daemon.socket(), tracked(2, true)).works(1);
    daemon.stop();
}

/// A driver that resets its device begins anew, whatever was noted.
#[test]
fn a_reset_ends_what_was_noted() {
    for packed in [false, true] {
        let daemon = Daemon::start(BLK, &NULL);
        let mut front = FrontEnd::new(&daemon.socket(), tracked(1, packed));
        front.works(0);
        front.messages.reset_device().unwrap();
        let layout = *front.queues[0].ring.layout();
        let len = (layout.end().0 - layout.desc_table().0) as usize;
        let memory = &front.guest.memory;
        memory
            .write_slice(&vec![0; len], layout.desc_table())
            .unwrap();
        let ring = ringside_rings::DriverRing::new(
            layout,
            front.features & frontend::EVENT_IDX != 0,
            memory,
        );
        front.queues[0].ring = ring.unwrap();
        front.start(0, front.fresh());
        front.works(0);
        daemon.stop();
    }
}

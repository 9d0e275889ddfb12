//! `ringside-net` killed again and again while its driver sends and receives: the next one goes on with the rings as they are, and
//! no queue is stuck.

#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation
)] // helpers of tests: a panic is how they fail

mod frontend;

use std::time::{Duration, Instant};

use frontend::{Daemon, FrontEnd, PATIENCE, Setup};
use ringside_rings::Segment;
use vm_memory::GuestAddress;

const NET: &str = env!("CARGO_BIN_EXE_ringside-net");
/// Frames come without end, and are dropped.
const ARGS: [&str; 4] = ["--link", "generate:60", "--queue-pairs", "2"];
const KILLS: usize = 50;
/// Receive and transmit queues of two pairs, and the buffers of each.
const QUEUES: usize = 4;
const BUFFERS: usize = 32;
const SIZE: u32 = 2048;

/// A driver that has all its buffers in its rings all the time.
struct Driver {
    front: FrontEnd,
    /// How often a buffer came back, for each queue.
    returned: [u64; QUEUES],
}

impl Driver {
    fn new(daemon: &Daemon) -> Self {
        let setup = Setup {
            queues: QUEUES,
            ..Setup::default()
        };
        let mut this = Self {
            front: FrontEnd::new(&daemon.socket(), setup),
            returned: [0; QUEUES],
        };
        for queue in 0..QUEUES {
            for _ in 0..BUFFERS {
                let buffer = this.front.guest.alloc(SIZE.into(), 64);
                this.submit(queue, buffer);
            }
        }
        this
    }

    fn submit(&mut self, queue: usize, buffer: GuestAddress) {
        let FrontEnd { queues, guest, .. } = &mut self.front;
        let received = [Segment::new(buffer, SIZE)];
        // A header that asks for nothing, and 60 bytes.
        let sent = [Segment::new(buffer, 72)];
        let (readable, writable): (&[_], &[_]) = match queue % 2 {
            0 => (&[], &received),
            _ => (&sent, &[]),
        };
        queues[queue].submit(guest, readable, writable, buffer.0);
    }

    /// Puts back what has come back.
    fn turn(&mut self) {
        for queue in 0..QUEUES {
            loop {
                let FrontEnd { queues, guest, .. } = &mut self.front;
                let mut session = queues[queue].ring.session(&guest.memory).unwrap();
                let Some((buffer, len)) = session.poll_used().unwrap() else {
                    break;
                };
                assert_eq!(len, if queue % 2 == 0 { 72 } else { 0 });
                self.returned[queue] += 1;
                self.submit(queue, GuestAddress(buffer));
            }
        }
    }

    /// Goes on until each queue has given back more than all buffers, those that were in use before among them.
    fn all_move(&mut self) {
        let before = self.returned;
        let start = Instant::now();
        let stuck = |now: &[u64; QUEUES]| {
            let pairs = before.iter().zip(now);
            pairs
                .filter(|(before, now)| **now <= **before + BUFFERS as u64)
                .count()
        };
        while stuck(&self.returned) > 0 {
            assert!(
                start.elapsed() < PATIENCE,
                "{before:?}, then {:?}",
                self.returned
            );
            self.turn();
        }
    }
}

#[test]
fn each_queue_goes_on_after_each_kill() {
    let mut daemon = Daemon::start(NET, &ARGS);
    let mut driver = Driver::new(&daemon);
    driver.all_move();
    let mut pauses = Vec::new();
    for kill in 0..KILLS {
        let moment = Instant::now();
        let until = Duration::from_micros(kill as u64 * 79 % 2000);
        while moment.elapsed() < until {
            driver.turn();
        }
        let start = Instant::now();
        daemon.replace(NET, &ARGS);
        driver.front.hand_over(&daemon.socket());
        // What was put in while nobody looked.
        for queue in &driver.front.queues {
            queue.kick.write(1).unwrap();
        }
        driver.all_move();
        pauses.push(start.elapsed());
    }
    pauses.sort_unstable();
    println!(
        "{KILLS} kills; until all queues had moved: {:?} in the middle, {:?} at most",
        pauses[KILLS / 2],
        pauses[KILLS - 1]
    );
    drop(driver);
    daemon.stop();
}

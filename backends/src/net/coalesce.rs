//! Interrupts that are held back (VIRTIO 1.3, 5.1.6.5.9): until enough packets are done, or time is up.
//!
//! ```text
//!               the driver wants to know
//!    ┌────────┐ ───────────────────────▶ ┌──────┐
//!    │ silent │        timer armed       │ held │
//!    └────────┘ ◀─────────────────────── └──────┘
//!                max_packets, or the timer, or the ring stops: one interrupt
//! ```
//!
//! Whatever is held comes out: only with a timer that runs is anything held, and a queue without a delay holds nothing.

use std::io;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::time::Duration;

use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};

/// How interrupts of a queue are held back: struct virtio_net_ctrl_coal (VIRTIO 1.3, 5.1.6.5.9).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Coalescing {
    /// After so many packets there is an interrupt.
    pub(super) max_packets: u32,
    /// An interrupt may be held back for so long, in microseconds.
    pub(super) max_usecs: u32,
}

impl Coalescing {
    /// With either of them 0 there is an interrupt after every packet (VIRTIO 1.3, 5.1.6.5.9), as there is with a limit of one.
    fn delay(self) -> Option<Duration> {
        (self.max_usecs > 0 && self.max_packets > 1)
            .then(|| Duration::from_micros(self.max_usecs.into()))
    }
}

/// What is to be done about an interrupt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    Nothing,
    Interrupt,
    Arm(Duration),
}

/// The decisions, without a timer. Packets are counted since any time.
#[derive(Debug, Default)]
struct Holder {
    limits: Coalescing,
    held: bool,
    /// Packets that were done when the last one was told of.
    told: u64,
}

impl Holder {
    /// The driver wants to know of what is done.
    fn wanted(&mut self, done: u64) -> Step {
        match self.limits.delay() {
            None => self.release(done),
            Some(_) if self.enough(done) => self.release(done),
            Some(_) if self.held => Step::Nothing,
            Some(delay) => {
                self.held = true;
                Step::Arm(delay)
            }
        }
    }

    /// A turn has ended.
    fn turned(&mut self, done: u64) -> Step {
        if !self.held {
            self.told = done;
        } else if self.enough(done) {
            return self.release(done);
        }
        Step::Nothing
    }

    /// Time is up, or the ring stops.
    fn flushed(&mut self, done: u64) -> Step {
        if self.held {
            self.release(done)
        } else {
            Step::Nothing
        }
    }

    fn enough(&self, done: u64) -> bool {
        done.wrapping_sub(self.told) >= u64::from(self.limits.max_packets)
    }

    fn release(&mut self, done: u64) -> Step {
        self.held = false;
        self.told = done;
        Step::Interrupt
    }
}

/// Holds interrupts of one ring back.
#[derive(Debug)]
pub(super) struct Coalescer {
    holder: Holder,
    timer: TimerFd,
}

impl Coalescer {
    /// Holds nothing back until it gets limits.
    pub(super) fn new() -> io::Result<Self> {
        let flags = TimerFlags::TFD_CLOEXEC | TimerFlags::TFD_NONBLOCK;
        Ok(Self {
            holder: Holder::default(),
            timer: TimerFd::new(ClockId::CLOCK_MONOTONIC, flags)?,
        })
    }

    /// What to wait on. Edge-triggered: it is never read.
    pub(super) fn timer_fd(&self) -> RawFd {
        self.timer.as_fd().as_raw_fd()
    }

    /// Goes by these limits from now on. Returns whether the driver is to be interrupted now, with `done` packets done.
    pub(super) fn set(&mut self, limits: Coalescing, done: u64) -> bool {
        if self.holder.limits == limits {
            return false;
        }
        self.holder.limits = limits;
        self.flush(done)
    }

    /// The driver wants to be interrupted, with `done` packets done. Returns whether it is now.
    pub(super) fn wanted(&mut self, done: u64) -> bool {
        match self.holder.wanted(done) {
            Step::Nothing => false,
            Step::Interrupt => true,
            // Without a timer it cannot be later.
            Step::Arm(delay) => {
                let expiration = Expiration::OneShot(TimeSpec::from_duration(delay));
                let armed = self.timer.set(expiration, TimerSetTimeFlags::empty());
                armed.is_err() && self.flush(done)
            }
        }
    }

    /// A turn has ended with `done` packets done. Returns whether the driver is to be interrupted now.
    pub(super) fn turned(&mut self, done: u64) -> bool {
        self.holder.turned(done) == Step::Interrupt
    }

    /// Time is up, or the ring stops, with `done` packets done. Returns whether the driver is to be interrupted now.
    pub(super) fn flush(&mut self, done: u64) -> bool {
        self.holder.flushed(done) == Step::Interrupt
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn holder(max_packets: u32, max_usecs: u32) -> Holder {
        Holder {
            limits: Coalescing {
                max_packets,
                max_usecs,
            },
            ..Holder::default()
        }
    }

    #[test]
    fn without_a_delay_each_interrupt_is_sent() {
        for (packets, usecs) in [(0, 0), (16, 0), (0, 50), (1, 50)] {
            let mut holder = holder(packets, usecs);
            for done in 1..100 {
                assert_eq!(holder.wanted(done), Step::Interrupt, "{packets} {usecs}");
                assert_eq!(holder.turned(done), Step::Nothing);
            }
        }
    }

    #[test]
    fn packets_or_time_release_it() {
        let mut holder = holder(8, 50);
        let armed = Step::Arm(Duration::from_micros(50));
        assert_eq!(holder.wanted(3), armed);
        assert_eq!(holder.wanted(5), Step::Nothing);
        assert_eq!(holder.turned(7), Step::Nothing);
        // Also while the driver does not ask again.
        assert_eq!(holder.turned(8), Step::Interrupt);
        assert_eq!(holder.flushed(8), Step::Nothing);
        assert_eq!(holder.wanted(10), armed);
        assert_eq!(holder.flushed(11), Step::Interrupt);
        // A burst that is large enough needs no timer.
        assert_eq!(holder.wanted(19), Step::Interrupt);
    }

    #[test]
    fn a_timer_expires_and_new_limits_release_what_is_held() {
        use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
        let mut coalescer = Coalescer::new().unwrap();
        let limits = |max_usecs| Coalescing {
            max_packets: 8,
            max_usecs,
        };
        assert!(!coalescer.set(limits(100), 0));
        assert!(!coalescer.wanted(1));
        let mut fds = [PollFd::new(coalescer.timer.as_fd(), PollFlags::POLLIN)];
        assert_eq!(poll(&mut fds, PollTimeout::from(5000_u16)).unwrap(), 1);
        assert!(coalescer.flush(1));
        assert!(!coalescer.wanted(2));
        assert!(coalescer.set(limits(0), 2));
        assert!(coalescer.wanted(3));
    }

    #[derive(Debug, Clone)]
    enum Event {
        Turn { packets: u8, wanted: bool },
        Expiry,
        Limits(u32, u32),
    }

    fn event() -> impl Strategy<Value = Event> {
        prop_oneof![
            8 => (any::<u8>(), any::<bool>())
                .prop_map(|(packets, wanted)| Event::Turn { packets, wanted }),
            2 => Just(Event::Expiry),
            1 => (0_u32..300, 0_u32..3).prop_map(|(packets, usecs)| Event::Limits(packets, usecs)),
        ]
    }

    proptest! {
        /// Whenever the driver wants to know, it is interrupted at once, or the timer runs and will interrupt it.
        #[test]
        fn no_wake_up_is_lost(start in any::<u64>(), events in prop::collection::vec(event(), 1..200)) {
            let mut holder = holder(0, 0);
            let (mut done, mut owed, mut armed) = (start, false, false);
            for event in events {
                let mut steps = Vec::new();
                match event {
                    Event::Turn { packets, wanted } => {
                        done = done.wrapping_add(packets.into());
                        if wanted {
                            owed = true;
                            steps.push(holder.wanted(done));
                        }
                        steps.push(holder.turned(done));
                    }
                    Event::Expiry if armed => {
                        armed = false;
                        steps.push(holder.flushed(done));
                    }
                    Event::Expiry => {}
                    Event::Limits(max_packets, max_usecs) => {
                        holder.limits = Coalescing { max_packets, max_usecs };
                        steps.push(holder.flushed(done));
                    }
                }
                for step in steps {
                    match step {
                        Step::Nothing => {}
                        Step::Interrupt => owed = false,
                        Step::Arm(_) => armed = true,
                    }
                }
                prop_assert!(!owed || armed, "an interrupt is owed and nothing will send it");
                prop_assert_eq!(owed, holder.held);
            }
        }
    }
}

//! The two queues of a card under load, in one thread.

use std::io::ErrorKind;
use std::time::{Duration, Instant};

use ringside_rings::{DriverRing, DriverSession, Segment};
use vm_memory::{GuestAddress, GuestMemoryMmap};
use vmm_sys_util::epoll::{Epoll, EpollEvent};
use vmm_sys_util::eventfd::EventFd;

use super::super::Phase;
use super::super::connection::Started;
use super::super::error::LoadError;
use super::super::lane::{PATIENCE, SPINS};
use super::HEADER_LEN;

/// Most frames of one side between two looks at the other one.
const BATCH: u32 = 64;

/// What was moved while it was measured.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Counts {
    pub(super) sent: u64,
    pub(super) received: u64,
    pub(super) elapsed: Duration,
    pub(super) kicks: u64,
    pub(super) interrupts: u64,
}

impl Counts {
    /// Frames of both directions.
    pub(super) fn frames(&self) -> u64 {
        self.sent.saturating_add(self.received)
    }
}

/// The buffers of a queue, one for each slot.
#[derive(Debug, Clone, Copy)]
pub(super) struct Buffers {
    /// Where the first one lies; the others follow.
    pub(super) first: GuestAddress,
    /// Bytes of each.
    pub(super) len: u32,
}

impl Buffers {
    /// Where the buffer of a slot lies.
    pub(super) fn of(self, slot: u16) -> GuestAddress {
        let offset = u64::from(slot) * u64::from(self.len);
        GuestAddress(self.first.0.saturating_add(offset))
    }
}

/// One queue.
pub(super) struct Side<'q> {
    memory: &'q GuestMemoryMmap,
    ring: &'q mut DriverRing<u16>,
    kick: &'q EventFd,
    call: &'q EventFd,
    buffers: Buffers,
    /// Slots in use: none if nothing goes this way.
    depth: u16,
    /// Bytes of a buffer, header included.
    len: u32,
    transmits: bool,
}

impl<'q> Side<'q> {
    pub(super) fn receive(
        memory: &'q GuestMemoryMmap,
        queue: &'q mut Started,
        buffers: Buffers,
        depth: u16,
    ) -> Self {
        Self {
            memory,
            ring: &mut queue.ring,
            kick: &queue.kick,
            call: &queue.call,
            buffers,
            depth,
            len: buffers.len,
            transmits: false,
        }
    }

    pub(super) fn transmit(
        memory: &'q GuestMemoryMmap,
        queue: &'q mut Started,
        buffers: Buffers,
        depth: u16,
        frame: u32,
    ) -> Self {
        Self {
            memory,
            ring: &mut queue.ring,
            kick: &queue.kick,
            call: &queue.call,
            buffers,
            depth,
            len: HEADER_LEN.saturating_add(frame),
            transmits: true,
        }
    }
}

/// Sends the frame of the first slot alone: so a switch learns where its sender is.
pub(super) fn announce(side: Side<'_>) -> Result<(), LoadError> {
    Turn::new(side, true)?.send_one()
}

/// How both queues are served.
pub(super) struct Lane<'m> {
    pub(super) interrupts: &'m Epoll,
    pub(super) polling: bool,
    /// What is sent is what is received: by another card.
    pub(super) forwards: bool,
    /// Frames to move in all, where they are counted.
    pub(super) left: Option<u64>,
}

impl Lane<'_> {
    /// Keeps the queues full until the phase, or the number of frames, ends it.
    pub(super) fn run(&self, sides: [Side<'_>; 2], phase: &Phase) -> Result<Counts, LoadError> {
        let mut turns = Vec::new();
        for side in sides {
            turns.push(Turn::new(side, self.polling)?);
        }
        let mut counts = Counts::default();
        let mut started = self.left.map(|_| Instant::now());
        for turn in &mut turns {
            turn.fill(&mut counts)?;
        }
        let mut quiet = Quiet::default();
        loop {
            let before = counts.frames();
            for turn in &mut turns {
                turn.collect(&mut counts)?;
            }
            if counts.frames() > before {
                quiet = Quiet::default();
            } else if self.polling {
                std::hint::spin_loop();
                quiet.spin()?;
            } else {
                self.wait(&mut turns, &mut counts)?;
            }
            if started.is_none() && phase.now() != Phase::WARM_UP {
                started = Some(Instant::now());
                counts = Counts::default();
            }
            let ended = match self.left {
                Some(left) if self.forwards => counts.received >= left,
                Some(left) => counts.frames() >= left,
                None => phase.now() == Phase::END,
            };
            if ended {
                break;
            }
        }
        counts.elapsed = started.map_or(Duration::ZERO, |started| started.elapsed());
        Ok(counts)
    }

    /// Sleeps until the back-end interrupts, unless something comes meanwhile.
    fn wait(&self, turns: &mut [Turn<'_>], counts: &mut Counts) -> Result<(), LoadError> {
        for turn in turns.iter_mut() {
            if turn.depth > 0 && turn.session.enable_interrupts()? {
                return Ok(());
            }
        }
        let failed = |source| LoadError::Io {
            doing: "wait for the call eventfd",
            source,
        };
        let mut events = [EpollEvent::default(); 2];
        let timeout = i32::try_from(PATIENCE.as_millis()).unwrap_or(i32::MAX);
        match self.interrupts.wait(timeout, &mut events) {
            Ok(0) => return Err(stalled()),
            Ok(_) => {}
            Err(error) if error.kind() == ErrorKind::Interrupted => return Ok(()),
            Err(error) => return Err(failed(error)),
        }
        counts.interrupts = counts.interrupts.saturating_add(1);
        for turn in turns {
            turn.acknowledge().map_err(failed)?;
        }
        Ok(())
    }
}

fn stalled() -> LoadError {
    LoadError::Quiet { patience: PATIENCE }
}

/// How long nothing has come.
#[derive(Debug, Default)]
struct Quiet {
    spins: u32,
    since: Option<Instant>,
}

impl Quiet {
    /// The clock is not looked at each time.
    fn spin(&mut self) -> Result<(), LoadError> {
        self.spins = self.spins.wrapping_add(1);
        if self.spins.is_multiple_of(SPINS) {
            let since = *self.since.get_or_insert_with(Instant::now);
            if since.elapsed() > PATIENCE {
                return Err(stalled());
            }
        }
        Ok(())
    }
}

/// A side with its ring resolved.
struct Turn<'l> {
    session: DriverSession<'l, u16, GuestMemoryMmap>,
    kick: &'l EventFd,
    call: &'l EventFd,
    buffers: Buffers,
    depth: u16,
    len: u32,
    transmits: bool,
}

impl<'l> Turn<'l> {
    fn new(side: Side<'l>, polling: bool) -> Result<Self, LoadError> {
        let mut session = side.ring.session(side.memory)?;
        if polling {
            session.disable_interrupts()?;
        }
        Ok(Self {
            session,
            kick: side.kick,
            call: side.call,
            buffers: side.buffers,
            depth: side.depth,
            len: side.len,
            transmits: side.transmits,
        })
    }

    /// Makes the buffer of a slot available.
    #[inline]
    fn submit(&mut self, slot: u16) -> Result<(), LoadError> {
        let segment = [Segment::new(self.buffers.of(slot), self.len)];
        if self.transmits {
            self.session.add(&segment, &[], slot)?;
        } else {
            self.session.add(&[], &segment, slot)?;
        }
        Ok(())
    }

    /// Sends the frame of the first slot, and waits until it was taken.
    fn send_one(&mut self) -> Result<(), LoadError> {
        self.submit(0)?;
        self.publish(&mut Counts::default())?;
        let start = Instant::now();
        while self.session.poll_used()?.is_none() {
            if start.elapsed() > PATIENCE {
                return Err(stalled());
            }
            std::thread::yield_now();
        }
        Ok(())
    }

    /// Makes all buffers available.
    fn fill(&mut self, counts: &mut Counts) -> Result<(), LoadError> {
        for slot in 0..self.depth {
            self.submit(slot)?;
        }
        self.publish(counts)
    }

    /// Takes what was used, a batch at most, and makes it available again.
    #[inline]
    fn collect(&mut self, counts: &mut Counts) -> Result<(), LoadError> {
        let mut count = 0;
        while count < BATCH
            && let Some((slot, _)) = self.session.poll_used()?
        {
            self.submit(slot)?;
            count = count.saturating_add(1);
        }
        if count == 0 {
            return Ok(());
        }
        let frames = if self.transmits {
            &mut counts.sent
        } else {
            &mut counts.received
        };
        *frames = frames.saturating_add(count.into());
        self.publish(counts)
    }

    fn publish(&mut self, counts: &mut Counts) -> Result<(), LoadError> {
        if self.session.publish()? {
            counts.kicks = counts.kicks.saturating_add(1);
            self.kick.write(1).map_err(|source| LoadError::Io {
                doing: "write the kick eventfd",
                source,
            })?;
        }
        Ok(())
    }

    /// Takes interrupts back that have come. Only one of the two eventfds may have fired.
    fn acknowledge(&self) -> std::io::Result<()> {
        match self.call.read() {
            Err(error) if error.kind() != ErrorKind::WouldBlock => Err(error),
            _ => Ok(()),
        }
    }
}

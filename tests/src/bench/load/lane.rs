//! One queue under load, in a thread of its own.

use std::io::ErrorKind;
use std::ops::Range;
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use ringside_rings::{DriverRing, DriverSession, Segment};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, VolatileSlice};
use vmm_sys_util::epoll::{Epoll, EpollEvent};
use vmm_sys_util::eventfd::EventFd;

use super::Phase;
use super::error::LoadError;
use super::front::{HEADER_STRIDE, Queue, data_offset};
use super::options::{Completions, LoadArgs};
use super::pattern::{Kind, Op, Pattern};

/// VIRTIO_BLK_T_IN and VIRTIO_BLK_T_OUT (VIRTIO 1.3, 5.2.6).
const IN: u32 = 0;
const OUT: u32 = 1;
/// VIRTIO_BLK_S_OK (VIRTIO 1.3, 5.2.6).
const STATUS_OK: u8 = 0;
/// What a status is before the device has written one.
const STATUS_NONE: u8 = 0xff;
/// Length of a request's header (VIRTIO 1.3, 5.2.6).
const HEADER_LEN: u32 = 16;
/// Where the status of a request lies, from its header on.
const STATUS: usize = 32;
/// Sector size of request headers (VIRTIO 1.3, 5.2.6).
const SECTOR: u64 = 512;
/// How long no request may complete.
pub(super) const PATIENCE: Duration = Duration::from_secs(20);
/// How often a polling lane looks in vain between looks at the clock.
pub(super) const SPINS: u32 = 1 << 16;
/// Digits of latencies that are kept.
const DIGITS: u8 = 3;

type Slice<'m> = VolatileSlice<'m, vm_memory::bitmap::BS<'m, ()>>;

/// Where the request of one slot lies.
struct Slot<'m> {
    header: Segment,
    data: Segment,
    status: Segment,
    /// Header and status.
    head: Slice<'m>,
    buffer: Slice<'m>,
    op: Op,
    started: Option<Instant>,
}

/// What one lane did while it was measured.
#[derive(Debug)]
pub(super) struct Measured {
    pub(super) requests: u64,
    pub(super) elapsed: Duration,
    /// Nanoseconds, of the requests that were timed.
    pub(super) latency: Histogram<u64>,
    pub(super) kicks: u64,
    pub(super) interrupts: u64,
    /// Blocks that were compared after the load.
    pub(super) swept: u64,
}

impl Measured {
    pub(super) fn new() -> Result<Self, LoadError> {
        Ok(Self {
            requests: 0,
            elapsed: Duration::ZERO,
            latency: histogram()?,
            kicks: 0,
            interrupts: 0,
            swept: 0,
        })
    }
}

/// A histogram of nanoseconds up to a minute; longer ones count as that.
pub(super) fn histogram() -> Result<Histogram<u64>, LoadError> {
    Histogram::new_with_bounds(1, 60_000_000_000, DIGITS)
        .map_err(|error| LoadError::Option(error.to_string()))
}

/// One queue and its requests.
pub(super) struct Lane<'m> {
    ring: &'m mut DriverRing<u16>,
    kick: &'m EventFd,
    call: &'m EventFd,
    interrupts: &'m Epoll,
    memory: &'m GuestMemoryMmap,
    indirect: bool,
    polling: bool,
    block: u32,
    slots: Vec<Slot<'m>>,
    pattern: Pattern,
    /// Requests still to be done, where they are counted.
    left: Option<u64>,
    /// One request in so many is timed.
    sample: u32,
}

impl<'m> Lane<'m> {
    /// A lane for `range`, in blocks, of the disk.
    pub(super) fn new(
        args: &LoadArgs,
        index: usize,
        memory: &'m GuestMemoryMmap,
        queue: &'m mut Queue,
        range: Range<u64>,
    ) -> Result<Self, LoadError> {
        let block = args.block()?;
        let slots = (0..args.depth)
            .map(|slot| place(memory, queue, slot, block))
            .collect::<Result<Vec<_>, _>>()?;
        Ok(Self {
            ring: &mut queue.ring,
            kick: &queue.kick,
            call: &queue.call,
            interrupts: &queue.interrupts,
            indirect: queue.indirect,
            memory,
            polling: args.completions == Completions::Polling,
            block,
            slots,
            pattern: Pattern::new(args, range)?,
            left: args.share(index),
            sample: args.sample(),
        })
    }

    /// Keeps the queue full until the phase, or the number of requests, ends it; then reads all again that it wrote, if it is
    /// to verify.
    pub(super) fn run(mut self, phase: &Phase) -> Result<Measured, LoadError> {
        let counted = self.left.is_some();
        let mut left = self.left;
        let mut next = |pattern: &mut Pattern| {
            match &mut left {
                Some(left) => *left = left.checked_sub(1)?,
                None if phase.now() == Phase::END => return None,
                None => {}
            }
            Some(pattern.next())
        };
        let mut turn = Turn::new(&mut self)?;
        let mut measured = Measured::new()?;
        let mut started = counted.then(Instant::now);
        turn.begin(&mut next)?;
        loop {
            let count = turn.collect(&mut measured, &mut next)?;
            measured.requests = measured.requests.saturating_add(count);
            if started.is_none() && phase.now() != Phase::WARM_UP {
                started = Some(Instant::now());
                measured = Measured::new()?;
            }
            // With a time, the requests then in flight are part of nothing: the queue is not full any more.
            let ended = if counted {
                turn.in_flight == 0
            } else {
                phase.now() == Phase::END
            };
            if ended {
                break;
            }
        }
        measured.elapsed = started.map_or(Duration::ZERO, |started| started.elapsed());

        let mut rest = Measured::new()?;
        while turn.in_flight > 0 {
            turn.collect(&mut rest, |_| None)?;
        }
        let mut from = 0;
        turn.begin(|pattern| pattern.next_of_sweep(&mut from))?;
        while turn.in_flight > 0 {
            let count = turn.collect(&mut rest, |pattern| pattern.next_of_sweep(&mut from))?;
            measured.swept = measured.swept.saturating_add(count);
        }
        Ok(measured)
    }
}

/// Finds the memory of a slot's request.
fn place<'m>(
    memory: &'m GuestMemoryMmap,
    queue: &Queue,
    slot: u16,
    block: u32,
) -> Result<Slot<'m>, LoadError> {
    let header = GuestAddress(queue.headers.0 + u64::from(slot) * HEADER_STRIDE);
    let status = GuestAddress(header.0 + STATUS as u64);
    let data = GuestAddress(queue.data.0 + data_offset(slot, block));
    let slice = |addr: GuestAddress, len: u64| {
        let failed = LoadError::Access { addr: addr.0 };
        match usize::try_from(len) {
            Ok(len) => memory.get_slice(addr, len).map_err(|_| failed),
            Err(_) => Err(failed),
        }
    };
    Ok(Slot {
        header: Segment::new(header, HEADER_LEN),
        data: Segment::new(data, block),
        status: Segment::new(status, 1),
        head: slice(header, HEADER_STRIDE)?,
        buffer: slice(data, u64::from(block))?,
        op: Op {
            kind: Kind::Read,
            block: 0,
        },
        started: None,
    })
}

/// A lane with its ring resolved.
struct Turn<'l, 'm> {
    session: DriverSession<'l, u16, GuestMemoryMmap>,
    kick: &'m EventFd,
    call: &'m EventFd,
    interrupts: &'m Epoll,
    indirect: bool,
    polling: bool,
    block: u32,
    slots: &'l mut [Slot<'m>],
    pattern: &'l mut Pattern,
    sample: u32,
    /// Requests until the next one that is timed.
    until_sample: u32,
    in_flight: usize,
    /// Turns in a row that found nothing.
    spins: u32,
    idle_since: Option<Instant>,
}

impl<'l, 'm> Turn<'l, 'm> {
    fn new(lane: &'l mut Lane<'m>) -> Result<Self, LoadError> {
        let mut session = lane.ring.session(lane.memory)?;
        if lane.polling {
            session.disable_interrupts()?;
        }
        Ok(Self {
            session,
            kick: lane.kick,
            call: lane.call,
            interrupts: lane.interrupts,
            indirect: lane.indirect,
            polling: lane.polling,
            block: lane.block,
            slots: &mut lane.slots,
            pattern: &mut lane.pattern,
            sample: lane.sample,
            until_sample: 0,
            in_flight: 0,
            spins: 0,
            idle_since: None,
        })
    }

    /// Fills all slots, as long as there is something to do.
    fn begin(&mut self, mut next: impl FnMut(&mut Pattern) -> Option<Op>) -> Result<(), LoadError> {
        for slot in 0..self.slots.len() {
            let Ok(slot) = u16::try_from(slot) else { break };
            let Some(op) = next(self.pattern) else { break };
            self.submit(slot, op)?;
        }
        if self.session.publish()? {
            self.notify()?;
        }
        Ok(())
    }

    /// Takes what has completed, and puts what is next in its place; waits if nothing has. Gives how many completed.
    fn collect(
        &mut self,
        measured: &mut Measured,
        mut next: impl FnMut(&mut Pattern) -> Option<Op>,
    ) -> Result<u64, LoadError> {
        let mut count = 0_u64;
        while let Some((slot, written)) = self.session.poll_used()? {
            self.end(slot, written, measured)?;
            count = count.saturating_add(1);
            if let Some(op) = next(self.pattern) {
                self.submit(slot, op)?;
            }
        }
        if count > 0 {
            if self.session.publish()? {
                self.notify()?;
                measured.kicks = measured.kicks.saturating_add(1);
            }
            self.spins = 0;
            self.idle_since = None;
            return Ok(count);
        }
        if self.polling {
            std::hint::spin_loop();
            self.spins = self.spins.wrapping_add(1);
            if self.spins.is_multiple_of(SPINS) {
                let since = *self.idle_since.get_or_insert_with(Instant::now);
                if since.elapsed() > PATIENCE {
                    return Err(self.stalled());
                }
            }
        } else if !self.session.enable_interrupts()? {
            self.wait()?;
            measured.interrupts = measured.interrupts.saturating_add(1);
        }
        Ok(0)
    }

    fn stalled(&self) -> LoadError {
        LoadError::Stalled {
            patience: PATIENCE,
            in_flight: self.in_flight,
        }
    }

    fn notify(&self) -> Result<(), LoadError> {
        self.kick.write(1).map_err(|source| LoadError::Io {
            doing: "write the kick eventfd",
            source,
        })
    }

    /// Sleeps until the back-end interrupts.
    fn wait(&self) -> Result<(), LoadError> {
        let failed = |source| LoadError::Io {
            doing: "wait for the call eventfd",
            source,
        };
        let mut events = [EpollEvent::default()];
        let timeout = i32::try_from(PATIENCE.as_millis()).unwrap_or(i32::MAX);
        match self.interrupts.wait(timeout, &mut events) {
            Ok(0) => return Err(self.stalled()),
            Ok(_) => {}
            Err(error) if error.kind() == ErrorKind::Interrupted => return Ok(()),
            Err(error) => return Err(failed(error)),
        }
        match self.call.read() {
            Err(error) if error.kind() != ErrorKind::WouldBlock => Err(failed(error)),
            _ => Ok(()),
        }
    }

    /// Makes a request available in its slot.
    #[inline]
    fn submit(&mut self, slot: u16, op: Op) -> Result<(), LoadError> {
        let Some(place) = self.slots.get_mut(usize::from(slot)) else {
            return Err(LoadError::Access { addr: 0 });
        };
        let access = |_| LoadError::Access {
            addr: place.header.addr.0,
        };
        let kind = match op.kind {
            Kind::Read => IN,
            Kind::Write => OUT,
        };
        // Type and, behind four reserved bytes, the sector.
        let sector = op.block.wrapping_mul(u64::from(self.block) / SECTOR);
        let head = &place.head;
        head.write_obj(u64::from(kind).to_le(), 0).map_err(access)?;
        head.write_obj(sector.to_le(), 8).map_err(access)?;
        head.write_obj(STATUS_NONE, STATUS).map_err(access)?;
        if op.kind == Kind::Write && self.pattern.verifies() {
            self.pattern.fill(op, &place.buffer)?;
        }
        place.op = op;
        place.started = if self.until_sample == 0 {
            self.until_sample = self.sample;
            Some(Instant::now())
        } else {
            None
        };
        self.until_sample = self.until_sample.wrapping_sub(1);
        let (header, data, status) = (place.header, place.data, place.status);
        let session = &mut self.session;
        match (op.kind, self.indirect) {
            (Kind::Read, true) => session.add_indirect(&[header], &[data, status], slot)?,
            (Kind::Read, false) => session.add(&[header], &[data, status], slot)?,
            (Kind::Write, true) => session.add_indirect(&[header, data], &[status], slot)?,
            (Kind::Write, false) => session.add(&[header, data], &[status], slot)?,
        };
        self.in_flight = self.in_flight.wrapping_add(1);
        Ok(())
    }

    /// Ends the request of a slot.
    #[inline]
    fn end(&mut self, slot: u16, written: u32, measured: &mut Measured) -> Result<(), LoadError> {
        let Some(place) = self.slots.get_mut(usize::from(slot)) else {
            return Err(LoadError::Access { addr: 0 });
        };
        if let Some(started) = place.started {
            let nanos = u64::try_from(started.elapsed().as_nanos()).unwrap_or(u64::MAX);
            measured.latency.saturating_record(nanos);
        }
        self.in_flight = self.in_flight.wrapping_sub(1);
        let op = place.op;
        let status: u8 = place.head.read_obj(STATUS).map_err(|_| LoadError::Access {
            addr: place.status.addr.0,
        })?;
        if status != STATUS_OK {
            return Err(LoadError::Status {
                what: match op.kind {
                    Kind::Read => "read",
                    Kind::Write => "write",
                },
                offset: op.block.wrapping_mul(u64::from(self.block)),
                len: self.block,
                status,
            });
        }
        if self.pattern.verifies() {
            let room = match op.kind {
                Kind::Read => self.block.saturating_add(1),
                Kind::Write => 1,
            };
            if written != room {
                return Err(LoadError::Written { written, room });
            }
            self.pattern.end(op, self.block, &place.buffer)?;
        }
        Ok(())
    }
}

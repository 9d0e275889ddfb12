//! One turn on a ring: what ended is answered, what is new begins, and the driver is shown it.

mod steps;
mod zoned;

use std::fs::File;
use std::sync::atomic::Ordering;
use std::time::Duration;

use ringside_rings::{Chain, ChainBuf, PopError, RingError, Segment, Session, write_segments};
use tracing::{debug, warn};
use vm_memory::GuestAddress;

use super::job::{DeviceCall, Hold, Job, Next, Slots, Stage};
use super::{Ended, Queue, Shared};
use crate::blk::config::feature;
use crate::blk::image::{Action, Outcome, Side};
use crate::blk::offload::DeviceLink;
use crate::blk::request::{
    self, APPEND_ANSWER_LEN, HEADER_LEN, ID_LEN, Limits, Request, SECTOR, Status,
};
use crate::blk::stats::{Kind, QueueStats};
use crate::blk::uring::{Direction, Uring};
use crate::shell::{Chain as Causes, LogLimit, Memory, signal};

pub(super) use zoned::abandon_zone;

/// After how long a ring whose driver is over a limit is looked at again in any case: the limit may have changed.
const THROTTLE_INTERVAL: Duration = Duration::from_millis(100);
/// After how many operations the storage gets them, while a batch is still being drained: it can begin meanwhile, and what is
/// begun apart ends apart, so that the driver has something to go on with.
const SUBMIT: u32 = 8;
/// After how many requests that were answered at once the driver is shown them: it can go on meanwhile.
const ANSWERS: u32 = 8;

/// The parts of a worker that a turn needs, apart from the queue.
pub(super) struct Turn<'w> {
    pub(super) limits: Limits,
    pub(super) shared: &'w Shared,
    pub(super) uring: &'w mut Uring,
    pub(super) side: Option<&'w mut Side>,
    pub(super) device: Option<&'w DeviceLink>,
    pub(super) stats: &'w QueueStats,
    /// When the turn began.
    pub(super) now: u64,
    /// Something was answered that the driver has not been shown.
    pub(super) unpublished: bool,
    /// A limit was reached.
    pub(super) throttled: Option<Duration>,
    pub(super) limit: &'w LogLimit,
}

impl Turn<'_> {
    pub(super) fn run(&mut self, queue: &mut Queue, ended: &Ended) -> Result<bool, RingError> {
        let most = queue.to_take();
        let features = queue.vring.features;
        let Queue {
            vring,
            chain,
            jobs,
            ranges,
            new_ranges,
            answers,
            free,
            waiting,
            bouncing,
            broken,
            ..
        } = queue;
        let mut slots = Slots {
            jobs,
            ranges,
            new_ranges,
            answers,
            free,
            waiting,
            bouncing,
        };
        if *broken {
            // Requests end, but nobody can be told.
            self.release_all(&mut slots, ended);
            return Ok(false);
        }
        let call = vring.call.as_ref();
        let mut session = match vring.ring.session(vring.memory.as_ref()) {
            Ok(session) => session,
            Err(e) => {
                self.release_all(&mut slots, ended);
                return Err(e);
            }
        };
        let mut first_error = None;
        for &(slot, result) in &ended.completed {
            let told = self.completed(&mut slots, &mut session, slot, result);
            // All completions must be seen, or their slots are lost.
            first_error = first_error.or(told.err());
        }
        for &(slot, outcome) in &ended.outcomes {
            let told = self.answered(&mut slots, &mut session, slot, outcome);
            first_error = first_error.or(told.err());
        }
        for &(slot, outcome) in &ended.device {
            let told = self.device_answered(&mut slots, &mut session, slot, outcome);
            first_error = first_error.or(told.err());
        }
        if let Some(error) = first_error {
            return Err(error);
        }
        let taken = match most {
            0 => Ok(false),
            _ => self.drain(&mut slots, &mut session, chain, features, call, most),
        };
        // What was finished before the driver broke its ring is returned all the same.
        self.publish(&mut session, call)?;
        taken
    }

    /// Frees the slots of requests that ended with nobody to tell. What waited for a zone has it now.
    fn release_all(&self, slots: &mut Slots<'_>, ended: &Ended) {
        for slot in ended.slots() {
            if let Some(job) = slots.get(slot) {
                abandon_zone(self.shared.zones.as_deref(), &job);
            }
            slots.release(slot);
        }
    }

    /// Shows the driver what was answered, and interrupts it if it wants to be.
    fn publish(
        &mut self,
        session: &mut Session<'_, Memory>,
        call: Option<&File>,
    ) -> Result<(), RingError> {
        let notify = session.publish()?;
        if std::mem::take(&mut self.unpublished) && !notify {
            self.stats.suppressed.add(1);
        }
        if notify && call.is_some() {
            self.stats.notifications.add(1);
            if let Err(e) = signal(call) {
                debug!("cannot signal the call eventfd: {e}");
            }
        }
        Ok(())
    }

    /// Writes are to be durable when they complete. Ask for each request after it was taken: a driver that was told that
    /// the cache is off may add one to a batch that is being drained.
    fn durable(&self, features: u64) -> bool {
        durable(features, self.shared.writeback.load(Ordering::Relaxed))
    }

    /// Takes chains until there are none, or `most`: as many as there are descriptors, or fewer. Returns whether more may wait.
    fn drain(
        &mut self,
        slots: &mut Slots<'_>,
        session: &mut Session<'_, Memory>,
        buf: &mut ChainBuf,
        features: u64,
        call: Option<&File>,
        most: u16,
    ) -> Result<bool, RingError> {
        if session.available()? == 0 {
            return Ok(false);
        }
        session.disable_notifications()?;
        let mut answered = 0_u32;
        for _ in 0..most {
            match session.pop(buf) {
                Ok(Some(chain)) => {
                    if self.uring.unsubmitted() >= SUBMIT {
                        // What it fails with shows when the worker waits.
                        let _ = self.uring.enter(0, None);
                    }
                    let head = chain.head();
                    let durable = self.durable(features);
                    if let Some(len) = self.begin(slots, session.memory(), &chain, durable) {
                        session.push_used(head, len)?;
                        answered = answered.wrapping_add(1);
                        if answered.is_multiple_of(ANSWERS) {
                            self.publish(session, call)?;
                        }
                    } else if self.throttled.is_some() {
                        session.rewind(1);
                        return Ok(false);
                    }
                }
                Ok(None) => return Ok(false),
                Err(PopError::Ring(e)) => return Err(e),
                Err(PopError::Chain { head, error }) => {
                    self.malformed(&error);
                    session.push_used(head, 0)?;
                }
            }
        }
        Ok(true)
    }

    fn complain(&mut self, error: &dyn std::error::Error) {
        if let Some(held_back) = self.limit.check() {
            warn!(held_back, "malformed request: {}", Causes(error));
        }
    }

    /// A chain that is no request is returned.
    fn malformed(&mut self, error: &dyn std::error::Error) {
        self.complain(error);
        self.stats.malformed();
        self.unpublished = true;
    }

    /// Answers a request. Returns the length for the used ring.
    fn answer(&mut self, mem: &Memory, job: &Job, status: Status) -> u32 {
        let took = self.now.saturating_sub(job.began);
        self.stats.answered(job.kind, job.len, status, took);
        self.unpublished = true;
        answer(mem, job, status)
    }

    /// Whether the disk's limits allow a request now; otherwise after what time in nanoseconds they may.
    fn allowed(&self, request: &Request) -> Result<(), u64> {
        let throttle = &self.shared.throttle;
        match *request {
            Request::Read { len, .. } => throttle.take(false, len, self.now),
            Request::Write { len, .. } | Request::ZoneAppend { len, .. } => {
                throttle.take(true, len, self.now)
            }
            Request::Flush
            | Request::Ranges(_)
            | Request::ZoneReport { .. }
            | Request::Zone { .. }
            | Request::ZoneResetAll => throttle.take(true, 0, self.now),
            Request::GetId { .. } | Request::Refuse(_) => Ok(()),
        }
    }

    /// Begins a request, unless it is `throttled`. Returns the length for the used ring if it is answered already.
    fn begin(
        &mut self,
        slots: &mut Slots<'_>,
        mem: &Memory,
        chain: &Chain<'_>,
        durable: bool,
    ) -> Option<u32> {
        let request = match request::parse(chain, mem, &self.limits, slots.new_ranges) {
            Ok(request) => request,
            Err(e) => {
                self.malformed(&e);
                let told = status_place(chain).is_some_and(|at| tell(mem, at, Status::IoError));
                return Some(told.into());
            }
        };
        if self.shared.throttle.active()
            && let Err(wait) = self.allowed(&request)
        {
            self.stats.throttled.add(1);
            self.throttled = Some(Duration::from_nanos(wait).min(THROTTLE_INTERVAL));
            return None;
        }
        let (kind, len) = request.measure(slots.new_ranges);
        // `parse` saw that there is one.
        let status = status_place(chain)?;
        let mut job = Job {
            head: chain.head(),
            status,
            stage: Stage::Sync,
            ranges: None,
            offset: 0,
            remaining: 0,
            hold: Hold::None,
            append: false,
            start: 0,
            kind,
            len,
            began: self.now,
            durable,
            bounced: false,
            missed: false,
            retries: 0,
        };
        let null = self.shared.files.is_empty() && self.side.is_none();
        match request {
            Request::Refuse(status) => return Some(self.answer(mem, &job, status)),
            Request::GetId { len } => {
                let count = ID_LEN.min(usize::try_from(len).unwrap_or(ID_LEN));
                let id = self.shared.serial.get(..count).unwrap_or_default();
                return Some(match write_segments(mem, chain.writable(), 0, id) {
                    Ok(()) => {
                        job.len = u64::try_from(count).unwrap_or(0);
                        self.answer(mem, &job, Status::Ok)
                    }
                    Err(_) => self.answer(mem, &job, Status::IoError),
                });
            }
            Request::Flush => {
                if self.side.as_ref().is_some_and(|side| side.flushes()) {
                    job.stage = Stage::Companion(Action::Flush);
                }
            }
            Request::Read { offset, len } => {
                if let (Some(zones), true) = (&self.shared.zones, self.limits.zoned && len > 0)
                    && let Err(status) = zones.check_read(offset, len)
                {
                    return Some(self.answer(mem, &job, status));
                }
                job.stage = Stage::Transfer(Direction::Read);
                (job.offset, job.remaining) = (offset, len);
            }
            Request::Write { offset, len } => {
                job.stage = Stage::Transfer(Direction::Write { durable });
                (job.offset, job.remaining) = (offset, len);
            }
            Request::Ranges(action) => job.ranges = Some(action),
            Request::ZoneAppend { offset, len } => {
                job.stage = Stage::Transfer(Direction::Write { durable });
                (job.offset, job.remaining) = (offset, len);
                job.append = true;
            }
            Request::ZoneReport { offset, len } => {
                job.stage = Stage::Device(DeviceCall::ZoneReport);
                (job.offset, job.remaining) = (offset, len);
            }
            Request::Zone { offset, action } => {
                job.stage = Stage::Device(DeviceCall::Zone(action));
                job.offset = offset;
            }
            Request::ZoneResetAll => job.stage = Stage::Device(DeviceCall::ZoneResetAll),
        }
        match self.zone_to_hold(&job) {
            Ok(hold) => job.hold = hold,
            Err(status) => {
                let status = self.limits.zone_status(status);
                return Some(self.answer(mem, &job, status));
            }
        }
        let nothing = match (job.stage, job.ranges) {
            (Stage::Transfer(_), _) => job.remaining == 0,
            (_, Some(_)) => slots.new_ranges.is_empty(),
            _ => false,
        };
        if null || nothing {
            return Some(self.answer(mem, &job, Status::Ok));
        }
        let Some(slot) = slots.take() else {
            // Not reachable while the ring holds no more chains than it has descriptors.
            return Some(self.answer(mem, &job, Status::IoError));
        };
        if let Stage::Transfer(direction) = job.stage {
            let (segments, skip) = match direction {
                Direction::Read => (chain.writable(), 0),
                Direction::Write { .. } => (chain.readable(), HEADER_LEN),
            };
            let align = self.shared.memory_align;
            match self
                .uring
                .prepare(slot, segments, skip, job.remaining, align)
            {
                Ok(aligned) => job.bounced = !aligned,
                Err(e) => {
                    self.complain(&e);
                    slots.release(slot);
                    return Some(self.answer(mem, &job, Status::IoError));
                }
            }
            if let Some(side) = &mut self.side {
                side.hold(slot, segments, skip);
            }
        }
        if job.append || job.stage == Stage::Device(DeviceCall::ZoneReport) {
            slots.keep_answer(slot, chain.writable());
        }
        let next = match job.ranges {
            Some(action) => {
                slots.keep_ranges(slot);
                self.next_range(slots, slot, &mut job, action)
            }
            None => self.advance(slots, slot, &mut job),
        };
        match next {
            Next::Pending => {
                slots.put(slot, job);
                None
            }
            Next::Done(status) => Some(self.end(slots, mem, slot, &job, status)),
        }
    }

    /// Ends a job that has a slot. Returns the length for the used ring.
    fn end(
        &mut self,
        slots: &mut Slots<'_>,
        mem: &Memory,
        slot: u16,
        job: &Job,
        status: Status,
    ) -> u32 {
        if let (Hold::Held(zone), Some(zones)) = (job.hold, &self.shared.zones) {
            match (job.stage, status) {
                (Stage::Transfer(_), Status::Ok) => zones.wrote(zone, job.start, job.offset),
                (Stage::Transfer(_), _) => zones.forget(zone),
                // The device's call has seen to it.
                _ => {}
            }
            zones.leave(zone);
        }
        let mut status = status;
        if job.append && status == Status::Ok {
            let sector = (job.start / SECTOR).to_le_bytes();
            let (segments, place) = slots.append_answer(slot);
            if write_segments(mem, segments, place, &sector).is_err() {
                status = Status::IoError;
            }
        }
        slots.release(slot);
        self.answer(mem, job, status)
    }

    /// The companion has answered.
    fn answered(
        &mut self,
        slots: &mut Slots<'_>,
        session: &mut Session<'_, Memory>,
        slot: u16,
        outcome: Outcome,
    ) -> Result<(), RingError> {
        let Some(mut job) = slots.get(slot) else {
            return Ok(());
        };
        let next = match outcome {
            Outcome::Again => {
                job.missed = true;
                self.advance(slots, slot, &mut job)
            }
            Outcome::Done
                if job.stage == Stage::Companion(Action::Flush)
                    && self.side.as_ref().is_some_and(|side| side.syncs()) =>
            {
                job.stage = Stage::Sync;
                self.advance(slots, slot, &mut job)
            }
            Outcome::Done => self.range_done(slots, slot, &mut job),
            Outcome::Suspended => {
                // It stays in flight, and noted as such.
                abandon_zone(self.shared.zones.as_deref(), &job);
                slots.release(slot);
                return Ok(());
            }
            Outcome::Failed(libc::EOPNOTSUPP) => Next::Done(Status::Unsupported),
            // It is in the companion's log.
            Outcome::Failed(_) => Next::Done(Status::IoError),
        };
        self.settle(slots, session, slot, job, next)
    }

    /// An operation ended.
    fn completed(
        &mut self,
        slots: &mut Slots<'_>,
        session: &mut Session<'_, Memory>,
        slot: u16,
        result: i32,
    ) -> Result<(), RingError> {
        let Some(mut job) = slots.get(slot) else {
            return Ok(());
        };
        let next = self.result(slots, slot, &mut job, result);
        self.settle(slots, session, slot, job, next)
    }

    /// Goes on with a job, or answers it.
    fn settle(
        &mut self,
        slots: &mut Slots<'_>,
        session: &mut Session<'_, Memory>,
        slot: u16,
        job: Job,
        next: Next,
    ) -> Result<(), RingError> {
        match next {
            Next::Pending => {
                slots.put(slot, job);
                Ok(())
            }
            Next::Done(status) => {
                let len = self.end(slots, session.memory(), slot, &job, status);
                let ended = session.push_used(job.head, len);
                self.next_bounce(slots, session)?;
                ended
            }
        }
    }

    /// Gives the bounce buffer to the next that waits for it.
    fn next_bounce(
        &mut self,
        slots: &mut Slots<'_>,
        session: &mut Session<'_, Memory>,
    ) -> Result<(), RingError> {
        while slots.bouncing.is_none() {
            let Some(slot) = slots.waiting.pop_front() else {
                break;
            };
            let Some(mut job) = slots.get(slot) else {
                continue;
            };
            match self.advance(slots, slot, &mut job) {
                Next::Pending => slots.put(slot, job),
                Next::Done(status) => {
                    let len = self.end(slots, session.memory(), slot, &job, status);
                    session.push_used(job.head, len)?;
                }
            }
        }
        Ok(())
    }
}

/// The cache is writethrough unless the driver can flush it, and has not switched it off (VIRTIO 1.3, 5.2.6.2).
fn durable(features: u64, writeback: bool) -> bool {
    let flushes = features & (feature::FLUSH | feature::CONFIG_WCE) != 0;
    !(writeback && flushes)
}

/// Where the status of a request goes: its last writable byte (VIRTIO 1.3, 5.2.6).
fn status_place(chain: &Chain<'_>) -> Option<GuestAddress> {
    let last = chain.writable().last()?;
    let before = u64::from(last.len).checked_sub(1)?;
    last.addr.0.checked_add(before).map(GuestAddress)
}

/// Writes the status. `false` if guest memory has no such place.
fn tell(mem: &Memory, place: GuestAddress, status: Status) -> bool {
    write_segments(mem, &[Segment::new(place, 1)], 0, &[status as u8]).is_ok()
}

/// Writes the status, and returns the length for the used ring: bytes written, with the status.
fn answer(mem: &Memory, job: &Job, status: Status) -> u32 {
    if !tell(mem, job.status, status) {
        return 0;
    }
    let data = match (status, job.kind) {
        (Status::Ok, Kind::Read | Kind::Zone | Kind::Other) => job.len,
        (Status::Ok, Kind::Write) if job.append => APPEND_ANSWER_LEN,
        _ => 0,
    };
    u32::try_from(data.saturating_add(1)).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn writes_are_durable_unless_there_is_a_cache_that_can_be_flushed() {
        for (features, writeback, expected) in [
            (0, true, true),
            (0, false, true),
            (feature::FLUSH, true, false),
            (feature::FLUSH, false, true),
            (feature::CONFIG_WCE, true, false),
            (feature::CONFIG_WCE | feature::FLUSH, true, false),
            (feature::CONFIG_WCE | feature::FLUSH, false, true),
        ] {
            assert_eq!(durable(features, writeback), expected, "{features:#x}");
        }
    }
}

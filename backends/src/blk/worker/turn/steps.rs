//! From one operation of a request to the next: transfers, ranges, and what an operation ended with.

use tracing::{error, warn};

use super::Turn;
use crate::blk::image::{Action, Place};
use crate::blk::request::{Range, RangeAction, Status};
use crate::blk::uring::{Direction, PrepareError};
use crate::blk::worker::job::{DeviceCall, Hold, Job, MAX_RETRIES, Next, Slots, Stage};

impl Turn<'_> {
    /// Begins with the next range of a job; after the last, the job is done.
    pub(super) fn next_range(
        &mut self,
        slots: &mut Slots<'_>,
        slot: u16,
        job: &mut Job,
        action: RangeAction,
    ) -> Next {
        if let Some(Range { offset, len, unmap }) = slots.next_range(slot) {
            (job.offset, job.remaining, job.retries) = (offset, len, 0);
            job.stage = self.stage_for(action, unmap);
        } else if job.durable && self.side.is_none() {
            job.stage = Stage::Sync;
        } else {
            return Next::Done(Status::Ok);
        }
        self.advance(slots, slot, job)
    }

    pub(super) fn stage_for(&self, action: RangeAction, unmap: bool) -> Stage {
        match (action, &self.side) {
            (RangeAction::SecureErase, _) => Stage::Device(DeviceCall::SecureErase),
            (RangeAction::Discard, None) if self.device.is_some() => {
                Stage::Device(DeviceCall::Discard)
            }
            (RangeAction::Discard, Some(_)) => Stage::Companion(Action::Discard),
            (RangeAction::WriteZeroes, Some(_)) => Stage::Companion(Action::WriteZeroes { unmap }),
            (RangeAction::Discard, None) => Stage::Fallocate {
                mode: libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE,
                or_write: false,
            },
            (RangeAction::WriteZeroes, None) => {
                let how = if unmap {
                    libc::FALLOC_FL_PUNCH_HOLE
                } else {
                    libc::FALLOC_FL_ZERO_RANGE
                };
                Stage::Fallocate {
                    mode: how | libc::FALLOC_FL_KEEP_SIZE,
                    or_write: true,
                }
            }
        }
    }

    /// Starts the next operation of a job.
    pub(super) fn advance(&mut self, slots: &mut Slots<'_>, slot: u16, job: &mut Job) -> Next {
        if let Hold::Wanted(zone) = job.hold {
            return self.enter_zone(slots, slot, job, zone);
        }
        let started = match job.stage {
            Stage::Transfer(direction) => {
                if job.bounced && *slots.bouncing != Some(slot) {
                    if slots.bouncing.is_some() {
                        slots.waiting.push_back(slot);
                        return Next::Pending;
                    }
                    *slots.bouncing = Some(slot);
                }
                if self.side.is_some() {
                    return self.transfer_by_map(slot, job, direction);
                }
                self.transfer(slot, job, direction, 0, job.offset, None)
            }
            Stage::WriteZeroes => self
                .uring
                .prepare_zeroes(slot, job.remaining)
                .map_err(failed)
                .and_then(|_| {
                    // Made durable together with the other ranges.
                    let direction = Direction::Write { durable: false };
                    self.uring.transfer(slot, direction, 0, job.offset)
                }),
            Stage::Fallocate { mode, .. } => {
                self.uring.fallocate(slot, mode, job.offset, job.remaining)
            }
            Stage::Sync => self.uring.fsync(slot),
            Stage::Companion(action) => return self.hand_over(slot, job, action),
            Stage::Device(call) => self.ask_device(slots, slot, job, call),
        };
        self.started(started)
    }

    pub(super) fn started(&mut self, started: std::io::Result<()>) -> Next {
        match started {
            Ok(()) => Next::Pending,
            Err(e) => {
                self.complain(&e);
                Next::Done(Status::IoError)
            }
        }
    }

    /// Transfers the next bytes of a job at `offset` of a file: all of them, or `len`.
    pub(super) fn transfer(
        &mut self,
        slot: u16,
        job: &Job,
        direction: Direction,
        file: u8,
        offset: u64,
        len: Option<u64>,
    ) -> std::io::Result<()> {
        if job.bounced {
            self.uring.bounce(slot, direction).map_err(failed)?;
        }
        if let Some(len) = len {
            self.uring.limit(slot, len)?;
        }
        self.uring.transfer(slot, direction, file, offset)
    }

    /// Transfers the next bytes of a job where the map says that they are, or lets the companion see to it.
    pub(super) fn transfer_by_map(
        &mut self,
        slot: u16,
        job: &mut Job,
        direction: Direction,
    ) -> Next {
        let action = match direction {
            Direction::Read => Action::Read,
            Direction::Write { .. } => Action::Write,
        };
        while job.remaining > 0 {
            let part = job.part(slot, action);
            let place = self.side.as_mut().map(|side| side.find(&part));
            match place {
                Some(Place::File { layer, offset, len }) => {
                    let started = self.transfer(slot, job, direction, layer, offset, Some(len));
                    if let (Err(_), Some(side)) = (&started, &mut self.side) {
                        side.ended(slot);
                    }
                    return self.started(started);
                }
                Some(Place::Zeroes { len }) => {
                    if let Err(e) = self.uring.fill(slot, len) {
                        self.complain(&e);
                        return Next::Done(Status::IoError);
                    }
                    self.moved(slot, job, len);
                }
                Some(Place::Unknown) | None => return self.hand_over(slot, job, action),
            }
        }
        Next::Done(Status::Ok)
    }

    /// Notes that the next bytes of a job are done.
    pub(super) fn moved(&mut self, slot: u16, job: &mut Job, bytes: u64) {
        job.remaining = job.remaining.saturating_sub(bytes);
        job.offset = job.offset.saturating_add(bytes);
        job.missed = false;
        if let Some(side) = &mut self.side {
            side.advance(slot, bytes);
        }
    }

    pub(super) fn hand_over(&mut self, slot: u16, job: &Job, action: Action) -> Next {
        let part = job.part(slot, action);
        let taken = match (&mut self.side, self.uring.memory()) {
            (Some(side), Some(memory)) => side.hand_over(&part, job.missed, memory),
            _ => false,
        };
        if taken {
            return Next::Pending;
        }
        if let Some(held_back) = self.limit.check() {
            error!(held_back, "the image's thread is gone");
        }
        Next::Done(Status::IoError)
    }

    pub(super) fn result(
        &mut self,
        slots: &mut Slots<'_>,
        slot: u16,
        job: &mut Job,
        result: i32,
    ) -> Next {
        let Ok(bytes) = usize::try_from(result) else {
            if job.stage == Stage::Transfer(Direction::Read) {
                self.uring.read_failed(slot);
            }
            return self.failed(slots, slot, job, result.saturating_neg());
        };
        match job.stage {
            Stage::Sync | Stage::Companion(_) | Stage::Device(_) => Next::Done(Status::Ok),
            Stage::Fallocate { .. } => self.range_done(slots, slot, job),
            Stage::Transfer(_) | Stage::WriteZeroes => {
                let moved = u64::try_from(bytes).unwrap_or(u64::MAX);
                if bytes == 0 || moved > job.remaining {
                    // The end of the file, which is shorter than it was.
                    return Next::Done(Status::IoError);
                }
                if let Stage::Transfer(direction) = job.stage {
                    self.uring.advance(slot, bytes, direction);
                }
                self.moved(slot, job, moved);
                if job.remaining == 0 {
                    return self.range_done(slots, slot, job);
                }
                self.advance(slots, slot, job)
            }
        }
    }

    /// An operation is done, and the request with it unless that has more ranges.
    pub(super) fn range_done(&mut self, slots: &mut Slots<'_>, slot: u16, job: &mut Job) -> Next {
        match job.ranges {
            Some(action) => self.next_range(slots, slot, job, action),
            None => Next::Done(Status::Ok),
        }
    }

    pub(super) fn failed(
        &mut self,
        slots: &mut Slots<'_>,
        slot: u16,
        job: &mut Job,
        errno: i32,
    ) -> Next {
        match (errno, job.stage) {
            (libc::EINTR | libc::EAGAIN, _) if job.retries < MAX_RETRIES => {
                job.retries = job.retries.saturating_add(1);
                self.advance(slots, slot, job)
            }
            (libc::EOPNOTSUPP | libc::ENOSYS, Stage::Fallocate { or_write: true, .. }) => {
                job.stage = Stage::WriteZeroes;
                // It moves bytes after all.
                self.shared.throttle.charge(job.remaining, self.now);
                self.advance(slots, slot, job)
            }
            (
                libc::EOPNOTSUPP | libc::ENOSYS | libc::ENOTTY,
                Stage::Fallocate { .. } | Stage::Device(_),
            ) => Next::Done(Status::Unsupported),
            // What Linux makes of BLK_STS_ZONE_OPEN_RESOURCE and BLK_STS_ZONE_ACTIVE_RESOURCE.
            (libc::ETOOMANYREFS, _) if job.hold != Hold::None => {
                Next::Done(self.limits.zone_status(Status::ZoneOpenResource))
            }
            (libc::EOVERFLOW, _) if job.hold != Hold::None => {
                Next::Done(self.limits.zone_status(Status::ZoneActiveResource))
            }
            // The zone cannot be brought into this state (VIRTIO 1.3, 5.2.6.2).
            (_, Stage::Device(DeviceCall::Zone(_))) => {
                Next::Done(self.limits.zone_status(Status::ZoneInvalidCommand))
            }
            _ => {
                if let Some(held_back) = self.limit.check() {
                    let error = std::io::Error::from_raw_os_error(errno);
                    warn!(
                        held_back,
                        offset = job.offset,
                        len = job.remaining,
                        "I/O error: {error}"
                    );
                }
                Next::Done(Status::IoError)
            }
        }
    }
}

fn failed(error: PrepareError) -> std::io::Error {
    std::io::Error::other(error)
}

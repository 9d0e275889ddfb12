//! What the device does by itself on the disk's thread, and the zones that requests hold meanwhile.

use std::sync::Arc;

use ringside_rings::{RingError, Session};

use super::Turn;
use crate::blk::offload;
use crate::blk::request::Status;
use crate::blk::uring::Direction;
use crate::blk::worker::job::{DeviceCall, Hold, Job, MAX_RETRIES, Next, Slots, Stage};
use crate::blk::zones::{Position, Zones};
use crate::shell::Memory;

impl Turn<'_> {
    /// The zone that a job needs for itself.
    pub(super) fn zone_to_hold(&self, job: &Job) -> Result<Hold, Status> {
        let Some(zones) = &self.shared.zones else {
            return Ok(Hold::None);
        };
        match job.stage {
            Stage::Device(DeviceCall::Zone(_)) => zones.sequential_at(job.offset).map(Hold::Wanted),
            Stage::Transfer(Direction::Write { .. }) if job.append => {
                zones.sequential_at(job.offset).map(Hold::Wanted)
            }
            Stage::Transfer(Direction::Write { .. }) if job.remaining > 0 => {
                let zone = zones.to_hold(job.offset, job.remaining)?;
                Ok(zone.map_or(Hold::None, Hold::Wanted))
            }
            _ => Ok(Hold::None),
        }
    }

    /// Takes the zone that a job needs, and goes on if it is free.
    pub(super) fn enter_zone(
        &mut self,
        slots: &mut Slots<'_>,
        slot: u16,
        job: &mut Job,
        zone: u32,
    ) -> Next {
        let (Some(zones), Some(link)) = (&self.shared.zones, self.device) else {
            return Next::Done(Status::IoError);
        };
        if !zones.enter(zone, link.mailbox(), slot) {
            return Next::Pending;
        }
        job.hold = Hold::Held(zone);
        self.in_zone(slots, slot, job, zone)
    }

    /// Goes on with a job that holds its zone.
    pub(super) fn in_zone(
        &mut self,
        slots: &mut Slots<'_>,
        slot: u16,
        job: &mut Job,
        zone: u32,
    ) -> Next {
        let (Some(zones), Some(link)) = (&self.shared.zones, self.device) else {
            return Next::Done(Status::IoError);
        };
        if let Stage::Transfer(_) = job.stage {
            let position = zones.position(zone);
            if position == Position::Unknown {
                let zones = Arc::clone(zones);
                let asked = link.ask(slot, move |device| match zones.look_up(device, zone) {
                    Ok(()) => offload::Outcome::Granted,
                    Err(e) => Err(e).into(),
                });
                return self.started(asked);
            }
            if let (true, Position::At { next, .. }) = (job.append, position) {
                job.offset = next;
            }
            if let Err(status) = zones.check_write(position, job.offset, job.remaining) {
                return Next::Done(self.limits.zone_status(status));
            }
            job.start = job.offset;
        }
        self.advance(slots, slot, job)
    }

    /// Lets the device do it, on the disk's thread.
    pub(super) fn ask_device(
        &self,
        slots: &Slots<'_>,
        slot: u16,
        job: &Job,
        call: DeviceCall,
    ) -> std::io::Result<()> {
        let unsupported = || std::io::Error::from(std::io::ErrorKind::Unsupported);
        let link = self.device.ok_or_else(unsupported)?;
        let zones = || self.shared.zones.clone().ok_or_else(unsupported);
        let (offset, len) = (job.offset, job.remaining);
        match call {
            DeviceCall::Discard => link.ask(slot, move |d| d.discard(offset, len).into()),
            DeviceCall::SecureErase => link.ask(slot, move |d| d.secure_erase(offset, len).into()),
            DeviceCall::ZoneReport => {
                let (zones, memory) = (zones()?, self.uring.memory().ok_or_else(unsupported)?);
                let segments = slots.answer(slot).to_vec();
                link.ask(slot, move |device| {
                    match zones.report(device, offset, &memory, &segments, len) {
                        Ok(bytes) => offload::Outcome::Filled(bytes),
                        Err(e) => Err(e).into(),
                    }
                })
            }
            DeviceCall::Zone(action) => {
                let zones = zones()?;
                let Hold::Held(zone) = job.hold else {
                    return Err(unsupported());
                };
                link.ask(slot, move |device| {
                    zones.manage(device, action, zone).into()
                })
            }
            DeviceCall::ZoneResetAll => {
                let zones = zones()?;
                link.ask(slot, move |device| zones.reset_all(device).into())
            }
        }
    }

    /// The device has done what it was asked for.
    pub(super) fn device_answered(
        &mut self,
        slots: &mut Slots<'_>,
        session: &mut Session<'_, Memory>,
        slot: u16,
        outcome: offload::Outcome,
    ) -> Result<(), RingError> {
        let Some(mut job) = slots.get(slot) else {
            return Ok(());
        };
        let next = match outcome {
            offload::Outcome::Done => self.range_done(slots, slot, &mut job),
            offload::Outcome::Filled(bytes) => {
                job.len = bytes;
                Next::Done(Status::Ok)
            }
            offload::Outcome::Granted => match job.hold {
                Hold::Wanted(zone) | Hold::Held(zone) => {
                    job.hold = Hold::Held(zone);
                    self.in_zone(slots, slot, &mut job, zone)
                }
                Hold::None => Next::Done(Status::IoError),
            },
            offload::Outcome::Failed(errno) => {
                if let Stage::Transfer(_) = job.stage {
                    // The zone's position is not known: nothing can be tried again.
                    job.retries = MAX_RETRIES;
                }
                self.failed(slots, slot, &mut job, errno)
            }
        };
        self.settle(slots, session, slot, job, next)
    }
}

/// Gives up the zone that a job holds, or was granted, in which it may have written. Not for a job that still waits for
/// its zone.
pub(in super::super) fn abandon_zone(zones: Option<&Zones>, job: &Job) {
    if let (Some(zones), Hold::Wanted(zone) | Hold::Held(zone)) = (zones, job.hold) {
        zones.forget(zone);
        zones.leave(zone);
    }
}

//! What the receive and the transmit side of a queue pair have in common: a ring that can break.

use std::sync::Arc;

use ringside_rings::{ChainBuf, RingError, Session};
use tracing::{debug, warn};

use super::counters::Counters;
use super::iov::IoList;
use crate::shell::{Chain as Causes, LogLimit, Memory, Vring};

/// A vring with room for its chains.
pub(super) struct Ring {
    pub(super) vring: Box<Vring>,
    pub(super) buf: ChainBuf,
    pub(super) list: IoList,
    /// The driver broke the ring: it is not served any more.
    broken: bool,
    /// Of the worker: a ring that comes and goes has no more to say than one that stays.
    log: LogLimit,
}

impl Ring {
    pub(super) fn new(vring: Box<Vring>, log: &LogLimit) -> Self {
        Self {
            buf: ChainBuf::new(vring.ring.size()),
            list: IoList::new(Arc::clone(&vring.memory)),
            vring,
            broken: false,
            log: log.clone(),
        }
    }

    /// The ring is served: it is enabled and sound.
    pub(super) fn runs(&self) -> bool {
        self.vring.enabled && !self.broken
    }

    /// The ring is sound.
    pub(super) fn sound(&self) -> bool {
        !self.broken
    }

    /// The kick descriptor is missing: look for yourself.
    pub(super) fn polled(&self) -> bool {
        self.vring.kick.is_none() && !self.broken
    }

    /// The parts of one turn, apart from each other.
    pub(super) fn parts(
        &mut self,
    ) -> Result<(Session<'_, Memory>, &mut ChainBuf, &mut IoList), RingError> {
        let Self {
            vring, buf, list, ..
        } = self;
        Ok((vring.session()?, buf, list))
    }

    /// Stops serving the ring and tells the front-end.
    pub(super) fn fail(&mut self, error: &RingError) {
        self.broken = true;
        let queue = self.vring.index;
        if let Some(held_back) = self.log.check() {
            warn!(
                queue,
                held_back,
                "the driver broke the ring, it is not served any more: {}",
                Causes(error)
            );
        }
        if let Err(error) = self.vring.signal_error() {
            debug!(queue, "the front-end cannot be told of it: {error}");
        }
        // Some chains may have been returned in this turn; an interrupt too many does no harm.
        if let Err(error) = self.vring.notify_driver() {
            debug!(queue, "the driver cannot be interrupted: {error}");
        }
    }

    /// Interrupts the driver, unless it polls.
    pub(super) fn interrupt(&self, counters: &Counters) {
        if self.vring.call.is_none() {
            return;
        }
        counters.interrupts.add(1);
        if let Err(error) = self.vring.notify_driver()
            && let Some(held_back) = self.log.check()
        {
            warn!(
                queue = self.vring.index,
                held_back, "the driver cannot be interrupted: {error}"
            );
        }
    }

    /// The descriptor to wait on, if the ring is still served.
    pub(super) fn kick_fd(&self) -> Option<i32> {
        self.vring.kick_fd()
    }
}

//! What the receive and the transmit side of a queue pair have in common: a ring that can break.

use std::sync::Arc;

use ringside_rings::{ChainBuf, RingError, Session};
use tracing::{debug, warn};
use virtio_bindings::virtio_net::{VIRTIO_NET_F_NOTF_COAL, VIRTIO_NET_F_VQ_NOTF_COAL};

use super::coalesce::{Coalescer, Coalescing};
use super::counters::Counters;
use super::features::has;
use super::iov::IoList;
use crate::shell::{Chain as Causes, LogLimit, Memory, Vring};

/// A vring with room for its chains.
pub(super) struct Ring {
    pub(super) vring: Box<Vring>,
    pub(super) buf: ChainBuf,
    pub(super) list: IoList,
    /// If the driver may have its interrupts held back.
    coalescer: Option<Coalescer>,
    /// The driver broke the ring: it is not served any more.
    broken: bool,
    /// Of the worker: a ring that comes and goes has no more to say than one that stays.
    log: LogLimit,
}

impl Ring {
    pub(super) fn new(vring: Box<Vring>, log: &LogLimit) -> Self {
        let may_wait = has(vring.features, VIRTIO_NET_F_NOTF_COAL)
            || has(vring.features, VIRTIO_NET_F_VQ_NOTF_COAL);
        let coalescer = may_wait.then(Coalescer::new).transpose();
        let coalescer = coalescer.unwrap_or_else(|error| {
            if let Some(held_back) = log.check() {
                let queue = vring.index;
                warn!(
                    queue,
                    held_back, "no timer to hold interrupts back with: {error}"
                );
            }
            None
        });
        Self {
            coalescer,
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

    /// The driver has made something available. A ring that is broken shows in the turn.
    #[inline]
    pub(super) fn waiting(&mut self) -> bool {
        !self.broken
            && self
                .vring
                .session()
                .and_then(|mut session| session.available())
                .map_or(true, |count| count > 0)
    }

    /// Asks the driver to kick. Returns whether it has made something available before, for which it will not kick.
    pub(super) fn arm(&mut self) -> bool {
        !self.broken
            && self
                .vring
                .session()
                .and_then(|mut session| session.enable_notifications())
                .unwrap_or(true)
    }

    /// Stops serving the ring.
    pub(super) fn give_up(&mut self, error: &RingError) {
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
    }

    /// Stops serving the ring and tells the front-end.
    pub(super) fn fail(&mut self, error: &RingError) {
        self.give_up(error);
        let queue = self.vring.index;
        if let Err(error) = self.vring.signal_error() {
            debug!(queue, "the front-end cannot be told of it: {error}");
        }
        // Some chains may have been returned in this turn; an interrupt too many does no harm.
        if let Err(error) = self.vring.notify_driver() {
            debug!(queue, "the driver cannot be interrupted: {error}");
        }
    }

    /// The driver is to be interrupted for what is done. Returns whether it is now, or when it has said.
    #[inline]
    fn wanted(&mut self, done: u64) -> bool {
        self.coalescer.as_mut().is_none_or(|c| c.wanted(done))
    }

    /// A turn has ended. Returns whether the driver is to be interrupted for what was held back.
    #[inline]
    fn ended(&mut self, done: u64) -> bool {
        self.coalescer.as_mut().is_some_and(|c| c.turned(done))
    }

    /// A turn has ended, and the driver wants an interrupt for what is done, or not. Returns whether it is to have one now.
    #[inline]
    pub(super) fn due(&mut self, wanted: bool, done: u64) -> bool {
        wanted && self.wanted(done) || self.ended(done)
    }

    /// An interrupt that is held back is to be held back no longer. Returns whether there is one.
    pub(super) fn release(&mut self, done: u64) -> bool {
        self.coalescer.as_mut().is_some_and(|c| c.flush(done))
    }

    /// From now on interrupts are held back like this. Returns whether the driver is to be interrupted now.
    pub(super) fn hold_back(&mut self, limits: Coalescing, done: u64) -> bool {
        self.coalescer.as_mut().is_some_and(|c| c.set(limits, done))
    }

    /// Interrupts the driver, now or when it has said.
    pub(super) fn interrupt(&mut self, counters: &Counters) {
        if self.wanted(self.done(counters)) {
            self.interrupt_now(counters);
        }
    }

    /// A turn has ended.
    pub(super) fn turned(&mut self, counters: &Counters) {
        if self.ended(self.done(counters)) {
            self.interrupt_now(counters);
        }
    }

    /// An interrupt that is held back is to be held back no longer.
    pub(super) fn flush(&mut self, counters: &Counters) {
        if self.release(self.done(counters)) {
            self.interrupt_now(counters);
        }
    }

    /// From now on interrupts are held back like this.
    pub(super) fn coalesce(&mut self, limits: Coalescing, counters: &Counters) {
        if self.hold_back(limits, self.done(counters)) {
            self.interrupt_now(counters);
        }
    }

    /// The packets that were done, those before this ring included.
    fn done(&self, counters: &Counters) -> u64 {
        // Receive queues have even numbers, transmit queues odd ones (VIRTIO 1.3, 5.1.2).
        if self.vring.index.is_multiple_of(2) {
            counters.rx_packets.get()
        } else {
            let dropped = counters.tx_dropped.get();
            counters.tx_packets.get().wrapping_add(dropped)
        }
    }

    /// Interrupts the driver, unless it polls.
    fn interrupt_now(&self, counters: &Counters) {
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

    /// Nobody waits for its timer: no interrupt is held back.
    pub(super) fn without_timer(&mut self) {
        self.coalescer = None;
    }

    /// Becomes readable when an interrupt was held back for long enough.
    pub(super) fn timer_fd(&self) -> Option<i32> {
        self.coalescer.as_ref().map(Coalescer::timer_fd)
    }

    /// The descriptor to wait on, if the ring is still served.
    pub(super) fn kick_fd(&self) -> Option<i32> {
        self.vring.kick_fd()
    }
}

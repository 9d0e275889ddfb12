//! Transmit: from the driver's chains to the link; to a TAP with one system call for each packet, however long.

use ringside_rings::{PopError, RingError};
use tracing::{debug, warn};
use vm_memory::Permissions;

use super::counters::Counters;
use super::features::header_len;
use super::link::Link;
use super::ring::Ring;
use crate::shell::{Chain as Causes, LogLimit, Vring};
use std::io;

/// Most packets of one turn, so that receiving gets its share.
const BUDGET: u32 = 128;

/// The longest frame that is passed on: an IPv6 packet with a payload of 65535 bytes, behind an Ethernet
/// header with two VLAN tags.
pub(super) const MAX_FRAME: usize = 22 + 40 + 65535;

/// The shortest frame: an Ethernet header.
pub(super) const MIN_FRAME: usize = 14;

/// The transmit queue of a pair.
pub(super) struct Tx {
    pub(super) ring: Ring,
    header_len: usize,
    /// The link is full; go on when it is writable.
    full: bool,
    log: LogLimit,
}

enum Sent {
    Done,
    Full,
    /// A signal came first; it may be for the worker.
    Interrupted,
}

impl Tx {
    /// Bytes of the header in front of each packet.
    pub(super) fn header_len(&self) -> usize {
        self.header_len
    }

    pub(super) fn new(vring: Box<Vring>, log: &LogLimit) -> Self {
        Self {
            header_len: header_len(vring.features).into(),
            ring: Ring::new(vring, log),
            full: false,
            log: log.clone(),
        }
    }

    /// The link takes packets again.
    pub(super) fn writable(&mut self) {
        self.full = false;
    }

    /// The link is full.
    pub(super) fn is_full(&self) -> bool {
        self.full
    }

    /// There is something to send.
    pub(super) fn waiting(&mut self) -> bool {
        !self.full && self.ring.waiting()
    }

    /// Asks the driver to kick, unless the link has to take packets first. Returns whether there is something to send already.
    pub(super) fn arm(&mut self) -> bool {
        !self.full && self.ring.arm()
    }

    /// Sends what the driver has made available, into nothing unless the cable is in (`link_up`). Returns whether there is more.
    pub(super) fn turn<L: Link>(
        &mut self,
        link: &mut L,
        link_up: bool,
        counters: &Counters,
    ) -> bool {
        if !self.ring.sound() || self.full {
            return false;
        }
        let served = self.serve(link, link_up, counters);
        link.flush();
        match served {
            Ok((more, interrupt)) => {
                if interrupt {
                    self.ring.interrupt(counters);
                }
                more
            }
            Err(error) => {
                self.ring.fail(&error);
                false
            }
        }
    }

    fn serve<L: Link>(
        &mut self,
        link: &mut L,
        link_up: bool,
        counters: &Counters,
    ) -> Result<(bool, bool), RingError> {
        let Self {
            ring,
            header_len,
            full,
            log,
        } = self;
        // A disabled transmit queue is emptied without effect ("Ring states" of the vhost-user protocol).
        let (enabled, queue) = (ring.vring.enabled && link_up, ring.vring.index);
        let lengths = *header_len + MIN_FRAME..=*header_len + MAX_FRAME;
        let (mut session, buf, list) = ring.parts()?;
        session.disable_notifications()?;
        let mut left = BUDGET;
        let more = loop {
            if left == 0 {
                break true;
            }
            let head = match session.pop(buf) {
                Ok(Some(chain)) => {
                    if enabled {
                        list.clear();
                        let len = usize::try_from(chain.readable_len()).unwrap_or(usize::MAX);
                        let sent = if !lengths.contains(&len) {
                            dropped(counters, log, queue, &"a packet too short or too long");
                            Sent::Done
                        } else if list.append(chain.readable(), Permissions::Read).is_err() {
                            dropped(counters, log, queue, &"a packet in too many pieces");
                            Sent::Done
                        } else {
                            counters.tx_calls.add(1);
                            match link.send(list, *header_len) {
                                Ok(()) => {
                                    counters.tx_packets.add(1);
                                    counters.tx_bytes.add(chain.readable_len());
                                    Sent::Done
                                }
                                Err(e) if e.kind() == io::ErrorKind::WouldBlock => Sent::Full,
                                Err(e) if e.kind() == io::ErrorKind::Interrupted => {
                                    Sent::Interrupted
                                }
                                // A header that the kernel does not like, no memory.
                                Err(e) => {
                                    match link.advice(&e) {
                                        Some(advice) => dropped(counters, log, queue, &advice),
                                        None => dropped(counters, log, queue, &e),
                                    }
                                    Sent::Done
                                }
                            }
                        };
                        // A packet that was not taken can be offered again, in the same place of the row.
                        match sent {
                            Sent::Done => {}
                            Sent::Full => {
                                counters.tx_full.add(1);
                                session.rewind(1);
                                *full = true;
                                break false;
                            }
                            Sent::Interrupted => {
                                session.rewind(1);
                                break true;
                            }
                        }
                    }
                    chain.head()
                }
                Ok(None) => break false,
                Err(PopError::Chain { head, error }) => {
                    dropped(counters, log, queue, &Causes(&error));
                    head
                }
                Err(PopError::Ring(error)) => {
                    // What was done before the driver broke its ring is returned all the same.
                    session.publish()?;
                    return Err(error);
                }
            };
            session.push_used(head, 0)?;
            left = left.saturating_sub(1);
        };
        let interrupt = session.publish()?;
        Ok((more, interrupt))
    }

    /// Gives the ring back. Nothing is in flight between turns.
    pub(super) fn into_vring(self) -> Box<Vring> {
        debug!(queue = self.ring.vring.index, "transmit queue stops");
        self.ring.vring
    }
}

#[cold]
fn dropped(counters: &Counters, log: &LogLimit, queue: u16, why: &dyn std::fmt::Display) {
    counters.tx_dropped.add(1);
    if let Some(held_back) = log.check() {
        warn!(queue, held_back, "packet from the driver dropped: {why}");
    }
}

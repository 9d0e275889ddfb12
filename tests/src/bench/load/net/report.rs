//! What came of a load on a card.

use serde::{Deserialize, Serialize};

use super::super::Outcome;
use super::super::connection::{EVENT_IDX, RING_PACKED};
use super::super::error::LoadError;
use super::super::report::{Usage, print_json};
use super::lane::Counts;

/// The result of a load on a card, or of a loop on a TAP.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(in crate::bench) struct NetReport {
    /// Bytes of each frame that was sent.
    pub(in crate::bench) frame: u32,
    /// VIRTIO_F_EVENT_IDX was in use.
    pub(in crate::bench) event_idx: bool,
    /// Queues were packed.
    pub(in crate::bench) packed: bool,
    /// What was sent came back by a second card, and counts when it arrives.
    pub(in crate::bench) forwarded: bool,
    /// Frames from the guest.
    pub(in crate::bench) sent: u64,
    /// Frames to the guest.
    pub(in crate::bench) received: u64,
    /// How long they took, in seconds.
    pub(in crate::bench) seconds: f64,
    /// Writes to the kick eventfds.
    pub(in crate::bench) kicks: u64,
    /// Waits for the call eventfds that ended.
    pub(in crate::bench) interrupts: u64,
    /// What the watched process used meanwhile.
    pub(in crate::bench) usage: Option<Usage>,
}

impl NetReport {
    pub(super) fn new(
        frame: u32,
        features: u64,
        forwarded: bool,
        outcome: &Outcome<Counts>,
    ) -> Self {
        let sum = |of: fn(&Counts) -> u64| outcome.lanes.iter().map(of).sum::<u64>();
        let longest = outcome.lanes.iter().map(|counts| counts.elapsed).max();
        Self {
            frame,
            event_idx: features & EVENT_IDX != 0,
            packed: features & RING_PACKED != 0,
            forwarded,
            sent: sum(|counts| counts.sent),
            received: sum(|counts| counts.received),
            seconds: longest.unwrap_or_default().as_secs_f64(),
            kicks: sum(|counts| counts.kicks),
            interrupts: sum(|counts| counts.interrupts),
            usage: outcome.usage,
        }
    }

    /// Frames of both directions, or those that arrived if they are the same ones.
    pub(in crate::bench) fn frames(&self) -> u64 {
        let sent = if self.forwarded { 0 } else { self.sent };
        sent.saturating_add(self.received)
    }

    /// Frames per second.
    pub(in crate::bench) fn rate(&self) -> f64 {
        self.frames() as f64 / self.seconds.max(1e-9)
    }

    /// Prints it on standard output.
    pub(super) fn print(&self, json: bool) -> Result<(), LoadError> {
        if json {
            return print_json(self);
        }
        let per_frame = |count: u64| count as f64 / self.frames().max(1) as f64;
        println!(
            "{} frames sent, {} received in {:.2} s: {:.3} million a second",
            self.sent,
            self.received,
            self.seconds,
            self.rate() / 1e6
        );
        println!(
            "per frame: {:.4} kicks, {:.4} interrupts waited for",
            per_frame(self.kicks),
            per_frame(self.interrupts)
        );
        if let Some(usage) = self.usage {
            println!(
                "processor time per frame: {:.0} ns, {:.4} waits",
                per_frame(usage.cpu),
                per_frame(usage.voluntary)
            );
        }
        Ok(())
    }
}

//! What a queue pair has done so far.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};

/// A number that one thread increases and others may read.
#[derive(Debug, Default)]
pub(super) struct Counter(AtomicU64);

impl Counter {
    /// Adds to the number. Only the thread that owns the queue pair does so, hence no atomic addition.
    #[inline]
    pub(super) fn add(&self, count: u64) {
        let sum = self.0.load(Ordering::Relaxed).wrapping_add(count);
        self.0.store(sum, Ordering::Relaxed);
    }

    /// The number.
    #[must_use]
    pub(super) fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Counters of one queue pair. Transmit and receive are the driver's words.
#[derive(Debug, Default)]
pub(super) struct Counters {
    /// Packets from the driver that the TAP took.
    pub(super) tx_packets: Counter,
    /// Bytes of those, headers included.
    pub(super) tx_bytes: Counter,
    /// System calls that wrote to the TAP, successful or not.
    pub(super) tx_calls: Counter,
    /// Packets from the driver that were malformed, or that the kernel refused.
    pub(super) tx_dropped: Counter,
    /// Times the TAP was full.
    pub(super) tx_full: Counter,
    /// Packets that the driver got.
    pub(super) rx_packets: Counter,
    /// Bytes of those, headers included.
    pub(super) rx_bytes: Counter,
    /// System calls that read from the TAP, successful or not.
    pub(super) rx_calls: Counter,
    /// Packets that did not pass the driver's filter.
    pub(super) rx_filtered: Counter,
    /// Packets for which the driver's buffers were too small, or that it cannot read.
    pub(super) rx_dropped: Counter,
    /// Times there was no buffer for a packet.
    pub(super) rx_starved: Counter,
    /// Interrupts sent, both queues.
    pub(super) interrupts: Counter,
    /// Times the worker's loop woke up.
    pub(super) wakeups: Counter,
}

impl fmt::Display for Counters {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            tx_packets,
            tx_bytes,
            tx_calls,
            tx_dropped,
            tx_full,
            rx_packets,
            rx_bytes,
            rx_calls,
            rx_filtered,
            rx_dropped,
            rx_starved,
            interrupts,
            wakeups,
        } = self;
        let mut separator = "";
        for (name, counter) in [
            ("tx_packets", tx_packets),
            ("tx_bytes", tx_bytes),
            ("tx_calls", tx_calls),
            ("tx_dropped", tx_dropped),
            ("tx_full", tx_full),
            ("rx_packets", rx_packets),
            ("rx_bytes", rx_bytes),
            ("rx_calls", rx_calls),
            ("rx_filtered", rx_filtered),
            ("rx_dropped", rx_dropped),
            ("rx_starved", rx_starved),
            ("interrupts", interrupts),
            ("wakeups", wakeups),
        ] {
            write!(f, "{separator}{name}={}", counter.get())?;
            separator = " ";
        }
        Ok(())
    }
}

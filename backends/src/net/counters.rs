//! What a queue pair has done so far.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};

/// A number that one thread increases and others may read.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds to the number. Only the thread that owns the queue pair does so, hence no atomic addition.
    #[inline]
    pub(super) fn add(&self, count: u64) {
        let sum = self.0.load(Ordering::Relaxed).wrapping_add(count);
        self.0.store(sum, Ordering::Relaxed);
    }

    /// The number.
    #[must_use]
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Counters of one queue pair. Transmit and receive are the driver's words.
#[derive(Debug, Default)]
pub struct Counters {
    /// Packets from the driver that the TAP took.
    pub tx_packets: Counter,
    /// Bytes of those, headers included.
    pub tx_bytes: Counter,
    /// System calls that wrote to the TAP, successful or not.
    pub tx_calls: Counter,
    /// Packets from the driver that were malformed, or that the kernel refused.
    pub tx_dropped: Counter,
    /// Times the TAP was full.
    pub tx_full: Counter,
    /// Packets that the driver got.
    pub rx_packets: Counter,
    /// Bytes of those, headers included.
    pub rx_bytes: Counter,
    /// System calls that read from the TAP, successful or not.
    pub rx_calls: Counter,
    /// Packets that did not pass the driver's filter.
    pub rx_filtered: Counter,
    /// Packets for which the driver's buffers were too small, or that it cannot read.
    pub rx_dropped: Counter,
    /// Times there was no buffer for a packet.
    pub rx_starved: Counter,
    /// Interrupts sent, both queues.
    pub interrupts: Counter,
    /// Times the worker's loop woke up.
    pub wakeups: Counter,
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

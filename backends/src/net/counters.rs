//! What a queue pair has done so far.

use std::fmt;
use std::sync::Arc;

use ringside_control::Metrics;
use ringside_control::metrics::Kind;
use serde_json::{Map, Value};

use crate::shell::{Counter, Statistics, counters_go_on, counters_to_json};

/// Counters of one queue pair. Transmit and receive are the driver's words.
#[derive(Debug, Default)]
pub(super) struct Counters {
    /// Packets from the driver that the link took.
    pub(super) tx_packets: Counter,
    /// Bytes of those, headers included.
    pub(super) tx_bytes: Counter,
    /// Writes to the link, successful or not.
    pub(super) tx_calls: Counter,
    /// Packets from the driver that were malformed, or that the kernel refused.
    pub(super) tx_dropped: Counter,
    /// Times the link was full.
    pub(super) tx_full: Counter,
    /// Times limits made the driver's packets wait.
    pub(super) tx_throttled: Counter,
    /// Packets that the driver got.
    pub(super) rx_packets: Counter,
    /// Bytes of those, headers included.
    pub(super) rx_bytes: Counter,
    /// Reads from the link, successful or not.
    pub(super) rx_calls: Counter,
    /// Packets that did not pass the driver's filter.
    pub(super) rx_filtered: Counter,
    /// Packets for which the driver's buffers were too small, or that it cannot read.
    pub(super) rx_dropped: Counter,
    /// Times there was no buffer for a packet.
    pub(super) rx_starved: Counter,
    /// Times limits made packets for the driver wait.
    pub(super) rx_throttled: Counter,
    /// Interrupts sent, both queues.
    pub(super) interrupts: Counter,
    /// Times the worker's loop woke up.
    pub(super) wakeups: Counter,
}

impl Counters {
    /// All of them, with names and descriptions.
    fn all(&self) -> [(&'static str, &'static str, &Counter); 15] {
        let Self {
            tx_packets,
            tx_bytes,
            tx_calls,
            tx_dropped,
            tx_full,
            tx_throttled,
            rx_packets,
            rx_bytes,
            rx_calls,
            rx_filtered,
            rx_dropped,
            rx_starved,
            rx_throttled,
            interrupts,
            wakeups,
        } = self;
        [
            (
                "tx_packets",
                "Packets from the driver that the link took.",
                tx_packets,
            ),
            ("tx_bytes", "Bytes of those, headers included.", tx_bytes),
            ("tx_calls", "Writes to the link.", tx_calls),
            (
                "tx_dropped",
                "Packets from the driver that were malformed or refused.",
                tx_dropped,
            ),
            ("tx_full", "Times the link was full.", tx_full),
            (
                "tx_throttled",
                "Times limits made the driver's packets wait.",
                tx_throttled,
            ),
            ("rx_packets", "Packets that the driver got.", rx_packets),
            ("rx_bytes", "Bytes of those, headers included.", rx_bytes),
            ("rx_calls", "Reads from the link.", rx_calls),
            (
                "rx_filtered",
                "Packets that did not pass the driver's filter.",
                rx_filtered,
            ),
            (
                "rx_dropped",
                "Packets that did not fit the driver's buffers.",
                rx_dropped,
            ),
            (
                "rx_starved",
                "Times there was no buffer for a packet.",
                rx_starved,
            ),
            (
                "rx_throttled",
                "Times limits made packets for the driver wait.",
                rx_throttled,
            ),
            ("interrupts", "Interrupts sent, both queues.", interrupts),
            ("wakeups", "Times the worker's loop woke up.", wakeups),
        ]
    }
}

impl fmt::Display for Counters {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut separator = "";
        for (name, _, counter) in self.all() {
            write!(f, "{separator}{name}={}", counter.get())?;
            separator = " ";
        }
        Ok(())
    }
}

impl Counters {
    fn named(&self) -> impl Iterator<Item = (&'static str, &Counter)> {
        self.all()
            .into_iter()
            .map(|(name, _, counter)| (name, counter))
    }

    /// For another program.
    pub(super) fn to_json(&self) -> Value {
        counters_to_json(self.named())
    }

    /// They go on from where those of another program were.
    pub(super) fn go_on(&self, from: &Value) {
        counters_go_on(self.named(), from);
    }
}

/// The counters of all queue pairs.
pub(super) struct AllCounters(pub(super) Vec<Arc<Counters>>);

impl Statistics for AllCounters {
    fn stats(&self) -> Map<String, Value> {
        let pairs = self.0.iter().map(|counters| {
            let pair = counters.all().into_iter();
            let pair =
                pair.map(|(name, _, counter)| (name.replace('_', "-"), counter.get().into()));
            Value::Object(pair.collect())
        });
        Map::from_iter([("queue-pairs".to_owned(), pairs.collect())])
    }

    fn metrics(&self, page: &mut Metrics) {
        let names = Counters::default();
        for (at, (name, help, _)) in names.all().into_iter().enumerate() {
            let name = format!("ringside_net_{name}_total");
            page.begin(&name, Kind::Counter, help);
            for (pair, counters) in self.0.iter().enumerate() {
                if let Some((_, _, counter)) = counters.all().get(at) {
                    page.sample(&name, &[("queue_pair", &pair)], counter.get());
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_queue_pair_has_its_samples() {
        let pairs = [7, 8].map(|packets| {
            let counters = Counters::default();
            counters.tx_packets.add(packets);
            Arc::new(counters)
        });
        let all = AllCounters(pairs.to_vec());
        assert_eq!(all.stats()["queue-pairs"][1]["tx-packets"], 8);
        let mut page = Metrics::default();
        all.metrics(&mut page);
        let text = page.into_text();
        assert!(
            text.contains("ringside_net_tx_packets_total{queue_pair=\"0\"} 7\nringside_net_tx_packets_total{queue_pair=\"1\"} 8\n"),
            "{text}"
        );
    }
}

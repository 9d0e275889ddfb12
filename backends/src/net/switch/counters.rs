//! What the ports of a switch have done so far.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use ringside_control::Metrics;
use ringside_control::metrics::Kind;
use serde_json::{Map, Value, json};

use super::shared::PortShared;
use crate::shell::{Counter, Statistics, counters_go_on, counters_to_json};

/// Counters of one port. Transmit and receive are the words of what is behind it: the driver, or the link's other end.
#[derive(Debug, Default)]
pub(super) struct Counters {
    /// Frames that came in.
    pub(super) tx_packets: Counter,
    /// Bytes of those.
    pub(super) tx_bytes: Counter,
    /// Frames that were malformed.
    pub(super) tx_dropped: Counter,
    /// Frames from an address that is not the port's to send from.
    pub(super) tx_forged: Counter,
    /// Frames in a VLAN that the port does not belong to.
    pub(super) tx_wrong_vlan: Counter,
    /// Frames that went to all ports.
    pub(super) tx_flooded: Counter,
    /// Frames for all ports that were more than a port may send.
    pub(super) tx_storm: Counter,
    /// Frames that nobody could take or was to take.
    pub(super) tx_undelivered: Counter,
    /// Times that the limits of rates made a guest's frames wait.
    pub(super) tx_throttled: Counter,
    /// Frames from a link that were more than the limits of rates allow.
    pub(super) tx_limited: Counter,
    /// Source addresses that were not learnt, as the port has its share of the table.
    pub(super) tx_unlearnt: Counter,
    /// Frames that went out.
    pub(super) rx_packets: Counter,
    /// Bytes of those.
    pub(super) rx_bytes: Counter,
    /// Frames that the driver's filter refused.
    pub(super) rx_filtered: Counter,
    /// Frames for which there was no buffer, or no room in the link.
    pub(super) rx_starved: Counter,
    /// Frames that did not fit the driver's buffers, or that it cannot read.
    pub(super) rx_dropped: Counter,
    /// Frames that were more than the limits of rates allow.
    pub(super) rx_limited: Counter,
    /// Frames that were finished in software, as the driver or the link does not do so.
    pub(super) rx_softened: Counter,
    /// Interrupts sent.
    pub(super) interrupts: Counter,
}

impl Counters {
    /// All of them, with names and descriptions.
    fn all(&self) -> [(&'static str, &'static str, &Counter); 19] {
        let Self {
            tx_packets,
            tx_bytes,
            tx_dropped,
            tx_forged,
            tx_wrong_vlan,
            tx_flooded,
            tx_storm,
            tx_undelivered,
            tx_throttled,
            tx_limited,
            tx_unlearnt,
            rx_packets,
            rx_bytes,
            rx_filtered,
            rx_starved,
            rx_dropped,
            rx_limited,
            rx_softened,
            interrupts,
        } = self;
        [
            ("tx_packets", "Frames that came in.", tx_packets),
            ("tx_bytes", "Bytes of those.", tx_bytes),
            ("tx_dropped", "Frames that were malformed.", tx_dropped),
            (
                "tx_forged",
                "Frames from an address that is not the port's to send from.",
                tx_forged,
            ),
            (
                "tx_wrong_vlan",
                "Frames in a VLAN that the port does not belong to.",
                tx_wrong_vlan,
            ),
            ("tx_flooded", "Frames that went to all ports.", tx_flooded),
            (
                "tx_storm",
                "Frames for all ports that were more than the port may send.",
                tx_storm,
            ),
            (
                "tx_undelivered",
                "Frames that nobody was to take.",
                tx_undelivered,
            ),
            (
                "tx_throttled",
                "Times that limits of rates made a guest's frames wait.",
                tx_throttled,
            ),
            (
                "tx_limited",
                "Frames from an uplink that were more than limits of rates allow.",
                tx_limited,
            ),
            (
                "tx_unlearnt",
                "Source addresses that did not fit the port's share of the table.",
                tx_unlearnt,
            ),
            ("rx_packets", "Frames that went out.", rx_packets),
            ("rx_bytes", "Bytes of those.", rx_bytes),
            (
                "rx_filtered",
                "Frames that the driver's filter refused.",
                rx_filtered,
            ),
            (
                "rx_starved",
                "Frames for which there was no buffer.",
                rx_starved,
            ),
            (
                "rx_dropped",
                "Frames that the driver's buffers are too small for, or that it cannot read.",
                rx_dropped,
            ),
            (
                "rx_limited",
                "Frames that were more than limits of rates allow.",
                rx_limited,
            ),
            (
                "rx_softened",
                "Frames whose checksum or segments were made here.",
                rx_softened,
            ),
            ("interrupts", "Interrupts sent.", interrupts),
        ]
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

/// All ports that there are, by name.
#[derive(Debug, Default)]
pub(super) struct AllPorts {
    ports: Mutex<BTreeMap<String, Arc<PortShared>>>,
    /// Times the switch's thread woke up.
    pub(super) wakeups: Counter,
}

impl AllPorts {
    fn get(&self) -> Vec<Arc<PortShared>> {
        let ports = self.ports.lock().unwrap_or_else(PoisonError::into_inner);
        ports.values().cloned().collect()
    }

    /// Those of the switch itself.
    pub(super) fn own(&self) -> [(&'static str, &Counter); 1] {
        [("wakeups", &self.wakeups)]
    }

    pub(super) fn insert(&self, port: Arc<PortShared>) {
        let mut ports = self.ports.lock().unwrap_or_else(PoisonError::into_inner);
        ports.insert(port.name.clone(), port);
    }

    pub(super) fn remove(&self, name: &str) {
        let mut ports = self.ports.lock().unwrap_or_else(PoisonError::into_inner);
        ports.remove(name);
    }
}

impl Statistics for AllPorts {
    fn stats(&self) -> Map<String, Value> {
        let ports = self.get().into_iter().map(|port| {
            let all = port.counters.all().into_iter();
            let all = all.map(|(name, _, counter)| (name.replace('_', "-"), counter.get().into()));
            let named = [("name".to_owned(), port.name.clone().into())];
            Value::Object(named.into_iter().chain(all).collect())
        });
        let ports: Vec<Value> = ports.collect();
        Map::from_iter([
            ("ports".to_owned(), ports.into()),
            ("wakeups".to_owned(), json!(self.wakeups.get())),
        ])
    }

    fn metrics(&self, page: &mut Metrics) {
        let names = Counters::default();
        let ports = self.get();
        for (at, (name, help, _)) in names.all().into_iter().enumerate() {
            let name = format!("ringside_net_port_{name}_total");
            page.begin(&name, Kind::Counter, help);
            for port in &ports {
                if let Some((_, _, counter)) = port.counters.all().get(at) {
                    page.sample(&name, &[("port", &port.name)], counter.get());
                }
            }
        }
        let up = "ringside_net_port_link_up";
        page.begin(up, Kind::Gauge, "Whether the port's cable is plugged in.");
        for port in &ports {
            page.sample(up, &[("port", &port.name)], u8::from(port.is_up()));
        }
        let limit = "ringside_net_port_limit";
        page.begin(limit, Kind::Gauge, "Frames or bytes allowed in a second.");
        for port in &ports {
            for (key, rate) in port.limits.get().iter() {
                page.sample(limit, &[("port", &port.name), ("limit", &key)], rate.rate);
            }
        }
        page.single(
            (
                "ringside_net_switch_wakeups_total",
                Kind::Counter,
                "Times the switch's thread woke up.",
            ),
            &[],
            self.wakeups.get(),
        );
    }
}

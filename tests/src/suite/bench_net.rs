//! What network cards cost, beside those of others: counts, and rates of one boot to each other.

use std::time::Duration;

use super::Test;
use super::blk::per_unit;
use crate::command;
use crate::ensure;
use crate::error::{LabError, Result};
use crate::harness::{
    EventCounts, Guest, KVM_EXIT, KVM_USERSPACE_EXIT, Net, Vmm, iperf3, iperf3_server,
    sum_interrupts,
};
use crate::site::Site;

pub(super) const TESTS: &[Test] = &[Test {
    name: "bench::tcp_of_three_cards",
    seconds: 180,
    run: tcp_of_three_cards,
}];

/// A card of a guest, and what is behind it.
struct Card {
    name: &'static str,
    interface: &'static str,
    /// The host's address on its TAP.
    host: &'static str,
    guest: &'static str,
}

const CARDS: [Card; 3] = [
    Card {
        name: "ringside-net",
        interface: "eth0",
        host: "10.77.0.1",
        guest: "10.77.0.2/24",
    },
    Card {
        name: "QEMU's tap",
        interface: "eth1",
        host: "10.78.0.1",
        guest: "10.78.0.2/24",
    },
    Card {
        name: "vhost-net",
        interface: "eth2",
        host: "10.79.0.1",
        guest: "10.79.0.2/24",
    },
];

/// How often each card is measured each way, in turn.
const ROUNDS: usize = 2;
/// How long, in seconds.
const SECONDS: u64 = 1;
/// How long packets are counted, in seconds.
pub(super) const COUNTED: u64 = 3;

/// One guest of QEMU with three cards, each on a TAP of its own: bulk TCP each way, and what a packet costs. How fast they are to
/// each other is printed, and depends on the machine; how often the guest was left does less so.
fn tcp_of_three_cards(site: &Site) -> Result<()> {
    if !std::path::Path::new("/dev/vhost-net").exists() {
        return Err(LabError::Skipped(
            "there is no /dev/vhost-net to compare with: load the module vhost_net".into(),
        ));
    }
    let [ours, tap, vhost] = &CARDS;
    let net = Net::tap("tap0")
        .address(&format!("{}/24", ours.host))
        .start(site)?;
    for (name, card) in [("tap1", tap), ("tap2", vhost)] {
        for line in [
            format!("ip tuntap add dev {name} mode tap vnet_hdr"),
            format!("ip address add {}/24 dev {name}", card.host),
            format!("ip link set dev {name} up"),
        ] {
            command::run_line(&line)?;
        }
    }
    let _server = iperf3_server(site, None)?;
    let mut builder = Guest::on(Vmm::Qemu11).device(&net);
    for (id, vhost) in [("tap1", "off"), ("tap2", "on")] {
        builder = builder
            .arg("-netdev")
            .arg(&format!(
                "tap,id={id},ifname={id},script=no,downscript=no,vhost={vhost}"
            ))
            .arg("-device")
            .arg(&format!("virtio-net-pci,netdev={id}"));
    }
    let mut guest = builder.boot(site)?;
    for card in &CARDS {
        guest.run_ok(&format!(
            "ip address add {} dev {interface} && ip link set {interface} up && ping -c 3 -i 0.2 -W 5 {}",
            card.guest,
            card.host,
            interface = card.interface
        ))?;
    }
    for (direction, options) in [("guest to host", ""), ("host to guest", "--reverse")] {
        let mut rates = [const { Vec::new() }; 3];
        for _ in 0..ROUNDS {
            for (card, rates) in CARDS.iter().zip(&mut rates) {
                let rate = iperf3(&mut guest, card.host, SECONDS, options)?;
                ensure!(rate > 0.0, "nothing arrived by {}, {direction}", card.name);
                rates.push(rate);
            }
        }
        for (card, others) in CARDS.iter().zip(&rates).skip(1) {
            let ratios = rates[0]
                .iter()
                .zip(others)
                .map(|(ours, other)| ours / other);
            let text: Vec<String> = ratios.map(|ratio| format!("{ratio:.2}")).collect();
            println!(
                "{direction}: {} to {}: {}",
                ours.name,
                card.name,
                text.join(", ")
            );
        }
        for card in &CARDS {
            let interface = card.interface;
            let device = format!("basename $(readlink -f /sys/class/net/{interface}/device)");
            let device = guest.run_ok(&device)?;
            let stream = Stream {
                host: card.host,
                options,
                interface,
                interrupts: &format!("{}-", device.trim()),
            };
            let events = [KVM_EXIT, KVM_USERSPACE_EXIT];
            let cost = stream.count(site, &mut guest, &events)?;
            let pid = guest.vmm_pid();
            println!(
                "{direction}, {}: per packet {} KVM exits, of which {} to the VMM, and {} interrupts",
                card.name,
                per_unit(cost.counts.of(pid, KVM_EXIT), cost.packets),
                per_unit(cost.counts.of(pid, KVM_USERSPACE_EXIT), cost.packets),
                per_unit(cost.interrupts, cost.packets),
            );
            ensure!(
                cost.packets > 100,
                "{} packets by {} are too few to count by",
                cost.packets,
                card.name
            );
        }
    }
    guest.shut_down()?;
    net.stop(site)
}

/// A TCP stream between a guest and the host.
pub(super) struct Stream<'a> {
    /// The host's address.
    pub(super) host: &'a str,
    /// More of iperf3's arguments.
    pub(super) options: &'a str,
    /// The guest's interface.
    pub(super) interface: &'a str,
    /// What the lines of its interrupts contain.
    pub(super) interrupts: &'a str,
}

/// What happened while packets passed.
pub(super) struct Cost {
    /// By the VMM's process.
    pub(super) counts: EventCounts,
    /// In the guest.
    pub(super) interrupts: u64,
    /// Received and sent by the interface, as the guest counts them.
    pub(super) packets: u64,
}

impl Stream<'_> {
    /// Counts while it flows.
    pub(super) fn count(&self, site: &Site, guest: &mut Guest, events: &[&str]) -> Result<Cost> {
        let take = format!(
            "cat /proc/interrupts; cd /sys/class/net/{}/statistics; echo $(($(cat rx_packets) + $(cat tx_packets)))",
            self.interface
        );
        // Nothing may be said on the console meanwhile: each character is an exit.
        guest.run_ok(&format!(
            "iperf3 --client {} --time {} {} </dev/null >/run/iperf.log 2>&1 & \
             (sleep 2; ({take}) >/run/before; sleep {COUNTED}; ({take}) >/run/part; mv /run/part /run/after) \
             </dev/null >/dev/null 2>&1 &",
            self.host,
            COUNTED + 5,
            self.options
        ))?;
        std::thread::sleep(Duration::from_secs(1));
        let counts = EventCounts::measure(site, &[guest.vmm_pid()], events, COUNTED)?;
        let samples = guest.run_ok(
            "while [ ! -e /run/after ]; do sleep 0.2; done; cat /run/before; echo ===; \
             cat /run/after; rm /run/before /run/after; wait; sleep 4",
        )?;
        let (before, after) = samples.split_once("===\n").unwrap_or_default();
        let numbers = |sample: &str| -> Option<(u64, u64)> {
            let packets = sample.lines().last()?.trim().parse().ok()?;
            Some((packets, sum_interrupts(sample, self.interrupts)))
        };
        let (Some(before), Some(after)) = (numbers(before), numbers(after)) else {
            return Err(LabError::Protocol {
                from: "guest agent",
                text: samples,
            });
        };
        Ok(Cost {
            counts,
            interrupts: after.1.saturating_sub(before.1),
            packets: after.0.saturating_sub(before.0),
        })
    }
}

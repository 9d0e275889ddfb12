//! Network cards served by ringside-net.

use std::time::Duration;

use nix::sys::signal::Signal;

use super::Test;
use crate::command;
use crate::ensure;
use crate::error::Result;
use crate::harness::{BackEnd, Capture, Guest, Net, Vmm, iperf3, iperf3_server, sum_interrupts};
use crate::site::Site;

pub(super) const TESTS: &[Test] = &[
    Test {
        name: "net::tcp_with_and_without_offloads",
        seconds: 120,
        run: tcp_with_and_without_offloads,
    },
    Test {
        name: "net::multiqueue",
        seconds: 120,
        run: multiqueue,
    },
    Test {
        name: "net::back_end_is_replaced",
        seconds: 90,
        run: back_end_is_replaced,
    },
];

/// How many packets of the capture came from the guest at `address` and went to it; first all, then those of more than an
/// Ethernet frame with 1500 bytes of payload: segments that nobody has cut.
fn segments(site: &Site, capture: Capture, address: &str) -> Result<[u64; 4]> {
    let counts = capture.count(
        site,
        [
            format!("src host {address}"),
            format!("dst host {address}"),
            format!("src host {address} and greater 1515"),
            format!("dst host {address} and greater 1515"),
        ],
    )?;
    ensure!(
        counts[0] > 100 && counts[1] > 100,
        "the capture has only {} packets from the guest and {} to it",
        counts[0],
        counts[1]
    );
    Ok(counts)
}

/// Bulk TCP each way between the guest and the host at `server`.
pub(super) fn tcp_both_ways(guest: &mut Guest, server: &str, what: &str) -> Result<()> {
    for (direction, options) in [("guest to host", ""), ("host to guest", "--reverse")] {
        let rate = iperf3(guest, server, 3, options)?;
        println!("{what}{direction}: {:.0} Mbit/s", rate / 1e6);
        ensure!(rate > 0.0, "nothing arrived, {direction}");
    }
    Ok(())
}

/// With the offloads that the guest's driver turns on by itself, segments of more than a frame pass the TAP in both directions;
/// without, none does.
fn tcp_with_and_without_offloads(site: &Site) -> Result<()> {
    let on = Net::tap("tap0").address("10.77.0.1/24").start(site)?;
    let off = Net::tap("tap1")
        .address("10.78.0.1/24")
        .arg("--offload=off")
        .start(site)?;
    let _server = iperf3_server(site, None)?;
    let mut guest = Guest::on(Vmm::Ringside)
        .device(&on)
        .device(&off)
        .boot(site)?;
    guest.network_up("10.77.0.2/24")?;
    guest.run_ok("ip address add 10.78.0.2/24 dev eth1 && ip link set eth1 up")?;
    guest.run_ok("ping -c 3 -i 0.2 -W 5 10.77.0.1 && ping -c 3 -i 0.2 -W 5 10.78.0.1")?;
    for (interface, state) in [("eth0", "on"), ("eth1", "off [fixed]")] {
        let features = guest.run_ok(&format!("ethtool -k {interface}"))?;
        ensure!(
            features.contains(&format!("tx-tcp-segmentation: {state}")),
            "TSO of {interface} is not {state}:\n{features}"
        );
    }

    let capture = Capture::start(site, "tap0")?;
    tcp_both_ways(&mut guest, "10.77.0.1", "offloads on, ")?;
    let [_, _, out, back] = segments(site, capture, "10.77.0.2")?;
    println!("segments over 1500 bytes on the TAP: {out} from the guest, {back} to it");
    ensure!(
        out > 0 && back > 0,
        "no segments over 1500 bytes on the TAP with offloads on: {out} from the guest, {back} to it"
    );

    let capture = Capture::start(site, "tap1")?;
    tcp_both_ways(&mut guest, "10.78.0.1", "offloads off, ")?;
    let [_, _, out, back] = segments(site, capture, "10.78.0.2")?;
    ensure!(
        out == 0 && back == 0,
        "segments over 1500 bytes on the TAP with offloads off: {out} from the guest, {back} to it"
    );

    // The same over IPv6.
    command::run_line("ip -6 address add fd00:77::1/64 dev tap0 nodad")?;
    // Busybox's ip, which comes first in the guest's path, knows no nodad.
    guest.run_ok("/usr/sbin/ip -6 address add fd00:77::2/64 dev eth0 nodad")?;
    let capture = Capture::start(site, "tap0")?;
    tcp_both_ways(&mut guest, "fd00:77::1", "IPv6, ")?;
    let [_, _, out, back] = segments(site, capture, "fd00:77::2")?;
    ensure!(
        out > 0 && back > 0,
        "no IPv6 segments over 1500 bytes on the TAP: {out} from the guest, {back} to it"
    );

    // The guest may also turn its own off while it runs.
    guest.run_ok("ethtool -K eth0 tso off gso off")?;
    let capture = Capture::start(site, "tap0")?;
    iperf3(&mut guest, "10.77.0.1", 1, "")?;
    let [_, _, out, _] = segments(site, capture, "10.77.0.2")?;
    ensure!(out == 0, "{out} segments from the guest with TSO off");
    guest.shut_down()?;
    on.stop(site)?;
    off.stop(site)
}

/// Queue pairs are turned on and off by the guest while traffic passes.
fn multiqueue(site: &Site) -> Result<()> {
    let net = Net::tap("tap0")
        .queue_pairs(4)
        .address("10.77.0.1/24")
        .start(site)?;
    let _server = iperf3_server(site, None)?;
    let mut guest = Guest::on(Vmm::Ringside).cpus(4).device(&net).boot(site)?;
    guest.network_up("10.77.0.2/24")?;
    for pairs in [1, 4, 2] {
        guest.run_ok(&format!("ethtool -L eth0 combined {pairs}"))?;
        let shown = guest.run_ok("ethtool -l eth0 | grep Combined: | tail -n 1")?;
        ensure!(
            shown
                .split_whitespace()
                .eq(["Combined:", &pairs.to_string()]),
            "{pairs} pairs were asked for: {shown}"
        );
        let before = guest.run_ok("cat /proc/interrupts")?;
        for options in ["--parallel 4", "--parallel 4 --reverse"] {
            let rate = iperf3(&mut guest, "10.77.0.1", 2, options)?;
            ensure!(rate > 0.0, "nothing arrived through {pairs} pairs");
        }
        let after = guest.run_ok("cat /proc/interrupts")?;
        let used = (0..4)
            .filter(|pair| {
                let name = format!("virtio1-input.{pair}");
                sum_interrupts(&after, &name) > sum_interrupts(&before, &name)
            })
            .count();
        println!("{used} of {pairs} receive queues took packets");
        ensure!(
            used <= pairs && (used > 1 || pairs == 1),
            "{used} of {pairs} receive queues took packets"
        );
    }
    guest.run_ok("ping -c 3 -i 0.2 -W 5 10.77.0.1")?;
    guest.shut_down()?;
    Ok(())
}

/// A card whose back-end is killed goes on with the next one that listens at its socket, and the guest does nothing for it.
fn back_end_is_replaced(site: &Site) -> Result<()> {
    let start = |net: Net| -> Result<BackEnd> {
        let net = net.address("10.77.0.1/24").queue_pairs(2).start(site)?;
        // The TAP goes with its back-end. The next must have the same address, or the guest talks to the first one for as
        // long as it believes its ARP cache.
        command::run_line("ip link set tap0 address 02:00:00:00:77:01")?;
        Ok(net)
    };
    let mut first = start(Net::tap("tap0"))?;
    let mut guest = Guest::on(Vmm::Ringside)
        .cpus(2)
        .diskless()
        .device(&first)
        .boot(site)?;
    guest.network_up("10.77.0.2/24")?;
    guest.run_ok("ping -c 3 -W 5 10.77.0.1")?;
    first.daemon().signal(Signal::SIGKILL)?;
    first.daemon().wait(site.limit(Duration::from_secs(5)))?;
    let second = start(Net::tap("tap0").in_place_of(&first))?;
    // A few packets are lost while the VMM finds the new one.
    guest.run_ok_within(
        "for i in $(seq 30); do ping -c 1 -W 1 10.77.0.1 && exit 0; done; exit 1",
        Duration::from_secs(40),
    )?;
    guest.run_ok("ping -c 5 -W 5 10.77.0.1")?;
    let log = guest.vmm_log();
    ensure!(
        log.contains("back-end is gone") && log.contains("back-end is back"),
        "the VMM does not say that a back-end was lost and found:\n{log}"
    );
    guest.shut_down()?;
    second.stop(site)
}

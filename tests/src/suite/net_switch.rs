//! Guests that ringside-net joins to each other.

use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::Test;
use crate::command;
use crate::ensure;
use crate::error::Result;
use crate::harness::{Guest, Switch, Vmm, iperf3, iperf3_server, packets};
use crate::site::Site;

pub(super) const TESTS: &[Test] = &[
    Test {
        name: "net_switch::guests_are_joined",
        seconds: 120,
        run: guests_are_joined,
    },
    Test {
        name: "net_switch::rules_hold_against_a_forger",
        seconds: 90,
        run: rules_hold_against_a_forger,
    },
    Test {
        name: "net_switch::a_trunk_carries_several_vlans",
        seconds: 120,
        run: a_trunk_carries_several_vlans,
    },
    Test {
        name: "net_switch::a_port_comes_back_under_load",
        seconds: 120,
        run: a_port_comes_back_under_load,
    },
    Test {
        name: "net_switch::a_stopped_guest_slows_nobody",
        seconds: 120,
        run: a_stopped_guest_slows_nobody,
    },
];

/// A small guest at a port.
fn guest(site: &Site, port: &str) -> Result<Guest> {
    Guest::on(Vmm::Ringside)
        .memory("256M")
        .arg(&Switch::net(port))
        .boot(site)
}

/// A guest reaches an address, as soon as its port serves it.
fn reaches(guest: &mut Guest, address: &str) -> Result<()> {
    let ping = format!("for i in $(seq 30); do ping -c 1 -W 1 {address} && exit 0; done; exit 1");
    guest
        .run_ok_within(&ping, Duration::from_secs(40))
        .map(drop)
}

/// Bulk traffic between guests touches neither the uplink nor the processor of the host's network; packets of 9000 bytes and of the
/// most that there are pass, and ports come and go meanwhile. Bulk traffic with the host passes the uplink, segments whole.
fn guests_are_joined(site: &Site) -> Result<()> {
    const MTU: &str = "mtu=65535";
    let ports = [("a", MTU), ("b", MTU)];
    let switch = Switch::start(
        site,
        &ports,
        &["--uplink=tap:up0,name=up", "--tap-ip=10.77.0.9/24"],
    )?;
    let mut a = guest(site, "a")?;
    let mut b = guest(site, "b")?;
    a.network_up("10.77.0.1/24")?;
    b.network_up("10.77.0.2/24")?;
    a.run_ok("ping -c 2 -W 5 10.77.0.9")?;
    a.run_ok("grep -qx 65535 /sys/class/net/eth0/mtu")?;
    for mtu in [65_535, 9000] {
        for guest in [&mut a, &mut b] {
            guest.run_ok(&format!("ip link set eth0 mtu {mtu}"))?;
        }
        let received = |what: &str| switch.count(site, "b", what);
        let before = (received("rx-packets")?, received("rx-bytes")?);
        // The headers of IP and ICMP are no payload.
        a.run_ok(&format!(
            "/usr/bin/ping -M do -c 2 -W 5 -s {} 10.77.0.2",
            mtu - 28
        ))?;
        let frames = received("rx-packets")? - before.0;
        let bytes = received("rx-bytes")? - before.1;
        ensure!(
            bytes >= 2 * (mtu + 14) && frames < 20,
            "{frames} frames of {bytes} bytes for two packets of {mtu}: they were cut"
        );
    }

    b.run_ok("iperf3 --server --daemon")?;
    let uplink = |way: &str| -> Result<(u64, u64)> {
        let count = |what| switch.count(site, "up", &format!("{way}-{what}"));
        Ok((count("packets")?, count("bytes")?))
    };
    let (before, _) = uplink("rx")?;
    let tap_before = packets("up0")?.received;
    let rate = iperf3(&mut a, "10.77.0.2", 3, "")?;
    let back = iperf3(&mut a, "10.77.0.2", 3, "--reverse")?;
    println!("a to b {:.0} Mbit/s, b to a {:.0}", rate / 1e6, back / 1e6);
    ensure!(rate > 0.0 && back > 0.0, "nothing arrived");
    let on_uplink = uplink("rx")?.0 - before;
    let tap = packets("up0")?.received - tap_before;
    println!("frames on the uplink meanwhile: {on_uplink}; on its TAP: {tap}");
    ensure!(
        on_uplink < 10 && tap < 10,
        "{on_uplink} frames between guests reached the uplink, and {tap} its TAP"
    );
    let (frames, bytes) = (
        switch.count(site, "b", "rx-packets")?,
        switch.count(site, "b", "rx-bytes")?,
    );
    let lost = switch.count(site, "b", "rx-starved")?;
    println!(
        "b got {frames} frames of {} bytes on average; {lost} found no buffer",
        bytes / frames.max(1)
    );
    ensure!(
        bytes / frames.max(1) > 9014,
        "segments were cut on their way"
    );

    let _server = iperf3_server(site, None)?;
    for (way, options) in [("rx", ""), ("tx", "--reverse")] {
        let before = uplink(way)?;
        let rate = iperf3(&mut a, "10.77.0.9", 2, options)?;
        let after = uplink(way)?;
        let (frames, bytes) = (after.0 - before.0, after.1 - before.1);
        println!(
            "over the uplink, {way}: {:.0} Mbit/s, frames of {} bytes on average",
            rate / 1e6,
            bytes / frames.max(1)
        );
        ensure!(
            bytes / frames.max(1) > 1514,
            "segments were cut on their way over the uplink"
        );
    }

    // A port goes and comes back while traffic passes.
    b.run_ok("ping -i 0.05 -c 2000 10.77.0.1 >/tmp/ping 2>&1 &")?;
    for _ in 0..3 {
        switch.control(site).ask(&["port-remove", "b"])?;
        switch.add(site, "b", MTU)?;
        reaches(&mut a, "10.77.0.2")?;
    }
    a.shut_down()?;
    b.shut_down()?;
    switch.stop(site)
}

/// What a guest sends that wants to be in VLAN 8: broadcast frames of a type for local experiments (IEEE 802, 9.2.3), with that tag,
/// and with it behind one of VLAN 7.
const TAGGED: &str = "python3 -c \"
import socket
card = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
card.bind(('eth0', 0))
for tags in ['81000008', '8100000781000008']:
    for _ in range(5):
        card.send(bytes.fromhex('ffffffffffff' + '02000000000e' + tags + '88b5').ljust(60, bytes(1)))
\"";

/// VLANs, isolation and address filters, against a guest that is its own administrator. The host is in both VLANs, by the uplink.
fn rules_hold_against_a_forger(site: &Site) -> Result<()> {
    let ports = [
        ("a", "vlan=7,mac=02:00:00:00:00:0a"),
        ("evil", "vlan=7,mac=02:00:00:00:00:0e,ip-filter=10.77.0.2"),
    ];
    let uplink = ["--uplink=tap:up0,name=up,trunk=7-8", "--tap-up"];
    let switch = Switch::start(site, &ports, &uplink)?;
    for (vlan, address) in [(7, "10.77.0.9/24"), (8, "10.78.0.9/24")] {
        for line in [
            format!("ip link add link up0 name up0.{vlan} type vlan id {vlan}"),
            format!("ip address add {address} dev up0.{vlan}"),
            format!("ip link set up0.{vlan} up"),
        ] {
            command::run_line(&line)?;
        }
    }
    let mut a = guest(site, "a")?;
    let mut evil = guest(site, "evil")?;
    a.network_up("10.77.0.1/24")?;
    let card = evil.network_up("10.77.0.2/24")?;
    evil.run_ok("ping -c 2 -W 5 10.77.0.1 && ping -c 2 -W 5 10.77.0.9")?;

    // Another VLAN's tag.
    let refused = switch.count(site, "evil", "tx-wrong-vlan")?;
    let seen = packets("up0.8")?.received;
    evil.run_ok(TAGGED)?;
    // They are behind them in the ring.
    evil.run_ok("ping -c 2 -W 5 10.77.0.9")?;
    let refused = switch.count(site, "evil", "tx-wrong-vlan")? - refused;
    let seen = packets("up0.8")?.received - seen;
    ensure!(
        refused == 10 && seen == 0,
        "of 10 frames with forged tags {refused} were refused, and {seen} seen in the other VLAN"
    );

    // Another IP address.
    evil.run_ok(&format!("ip address add 10.77.0.3/24 dev {card}"))?;
    let forged = evil.run("ping -c 2 -W 1 -I 10.77.0.3 10.77.0.1")?;
    ensure!(
        forged.status != 0,
        "an address that is not its own passed:\n{}",
        forged.text
    );
    let by_address = switch.count(site, "evil", "tx-forged")?;
    ensure!(by_address > 0, "no forged frame was counted");

    // The other guest's MAC address.
    evil.run_ok(&format!(
        "ip link set {card} down && ip link set {card} address 02:00:00:00:00:0a && ip link set {card} up"
    ))?;
    let forged = evil.run("ping -c 2 -W 1 10.77.0.1")?;
    ensure!(
        forged.status != 0,
        "another guest's MAC address passed:\n{}",
        forged.text
    );
    ensure!(
        switch.count(site, "evil", "tx-forged")? > by_address,
        "no frame with a forged MAC address was counted"
    );
    evil.run_ok(&format!(
        "ip link set {card} down && ip link set {card} address 02:00:00:00:00:0e && ip link set {card} up"
    ))?;
    evil.run_ok("ping -c 2 -W 5 10.77.0.1")?;

    // In another VLAN it reaches the host there, and not the guest.
    let control = switch.control(site);
    evil.run_ok(&format!("ip address add 10.78.0.2/24 dev {card}"))?;
    let again = |port: &str, options: &str, mac: &str| -> Result<()> {
        control.ask(&["port-remove", port])?;
        switch.add(site, port, &format!("{options},mac=02:00:00:00:00:{mac}"))?;
        Ok(())
    };
    again("evil", "vlan=8", "0e")?;
    reaches(&mut evil, "10.78.0.9")?;
    let apart = evil.run("ping -c 3 -W 1 10.77.0.1")?;
    ensure!(
        apart.status != 0,
        "another VLAN was passed:\n{}",
        apart.text
    );

    // Isolated from each other, both reach the host, and neither the other one.
    again("a", "vlan=7,isolated=on", "0a")?;
    again("evil", "vlan=7,isolated=on", "0e")?;
    reaches(&mut a, "10.77.0.9")?;
    reaches(&mut evil, "10.77.0.9")?;
    let apart = evil.run("ping -c 3 -W 1 10.77.0.1")?;
    ensure!(apart.status != 0, "isolation was passed:\n{}", apart.text);
    a.shut_down()?;
    evil.shut_down()?;
    switch.stop(site)
}

/// A guest at a trunk is in one VLAN without tags, and gets the frames of another one with them.
fn a_trunk_carries_several_vlans(site: &Site) -> Result<()> {
    let ports = [("a", "vlan=7"), ("b", "vlan=8"), ("t", "trunk=8,native=7")];
    let switch = Switch::start(site, &ports, &[])?;
    let mut a = guest(site, "a")?;
    let mut b = guest(site, "b")?;
    let mut trunk = guest(site, "t")?;
    a.network_up("10.77.0.1/24")?;
    b.network_up("10.77.0.1/24")?;
    trunk.network_up("10.77.0.3/24")?;
    // The native VLAN, both ways.
    a.run_ok("ping -c 2 -W 5 10.77.0.3")?;
    // Of the other VLAN it sees who is asked for, with the tag, and nothing of it without.
    trunk.run_ok("tcpdump -i eth0 -e -n -l arp >/tmp/seen 2>/tmp/listens &")?;
    trunk.run_ok_within(
        "until grep -q listening /tmp/listens; do sleep 0.2; done",
        Duration::from_secs(40),
    )?;
    b.run("ping -c 2 -W 1 10.77.0.88")?;
    trunk.run_ok_within(
        "until grep -q 'vlan 8,.*who-has 10.77.0.88' /tmp/seen; do sleep 0.2; done",
        Duration::from_secs(40),
    )?;
    trunk.run_ok("! grep -v 'vlan 8,' /tmp/seen | grep 10.77.0.88")?;
    let apart = b.run("ping -c 2 -W 1 10.77.0.3")?;
    ensure!(
        apart.status != 0,
        "VLAN 8 is answered without a tag:\n{}",
        apart.text
    );
    for guest in [a, b, trunk] {
        guest.shut_down()?;
    }
    switch.stop(site)
}

/// A connection outlives the port of its receiver: that goes while data flows, comes again, and data flows on.
fn a_port_comes_back_under_load(site: &Site) -> Result<()> {
    const MEGABYTE: u64 = 1 << 20;
    let switch = Switch::start(site, &[("a", ""), ("b", "")], &[])?;
    let mut a = guest(site, "a")?;
    let mut b = guest(site, "b")?;
    a.network_up("10.77.0.1/24")?;
    b.network_up("10.77.0.2/24")?;
    b.run_ok("iperf3 --server --daemon")?;
    a.run_ok("iperf3 --client 10.77.0.2 --time 600 >/tmp/iperf 2>&1 &")?;
    wait_for_bytes(&switch, site, "b", MEGABYTE)?;
    for _ in 0..3 {
        switch.control(site).ask(&["port-remove", "b"])?;
        switch.add(site, "b", "")?;
        // It counts from nothing.
        wait_for_bytes(&switch, site, "b", MEGABYTE)?;
    }
    let state = a.run_ok("pgrep iperf3 >/dev/null && cat /tmp/iperf")?;
    ensure!(!state.contains("error"), "iperf3 has given up:\n{state}");
    a.shut_down()?;
    b.shut_down()?;
    switch.stop(site)
}

/// Waits until a port's guest has got so many bytes.
fn wait_for_bytes(switch: &Switch, site: &Site, port: &str, bytes: u64) -> Result<()> {
    for _ in 0..300 {
        if switch.count(site, port, "rx-bytes")? >= bytes {
            return Ok(());
        }
        std::thread::sleep(Duration::from_millis(200));
    }
    ensure!(false, "port {port} gets no traffic");
    Ok(())
}

/// Frames for a guest that is stopped are dropped, and others go on as if it were not there.
fn a_stopped_guest_slows_nobody(site: &Site) -> Result<()> {
    let switch = Switch::start(site, &[("a", ""), ("b", ""), ("c", "")], &[])?;
    let mut a = guest(site, "a")?;
    let mut b = guest(site, "b")?;
    let mut c = guest(site, "c")?;
    for (guest, address) in [
        (&mut a, "10.77.0.1/24"),
        (&mut b, "10.77.0.2/24"),
        (&mut c, "10.77.0.3/24"),
    ] {
        guest.network_up(address)?;
    }
    b.run_ok("iperf3 --server --daemon")?;
    a.run_ok("ping -c 2 -W 5 10.77.0.3")?;
    let before = iperf3(&mut a, "10.77.0.2", 2, "")?;
    let vmm = Pid::from_raw(i32::try_from(c.vmm_pid()).unwrap_or(i32::MAX));
    let signal = |signal| kill(vmm, signal).map_err(std::io::Error::from);
    use crate::error::Doing;
    signal(Signal::SIGSTOP).doing(|| "stop a VMM".into())?;
    // Its buffers run out, and stay so.
    a.run_ok_within(
        "ping -q -i 0.005 -c 600 -W 1 10.77.0.3 >/dev/null; true",
        Duration::from_secs(40),
    )?;
    // What else the machine does weighs on a moment, but hardly on five.
    let mut stopped = 0.0_f64;
    for _ in 0..5 {
        stopped = stopped.max(iperf3(&mut a, "10.77.0.2", 2, "")?);
        if stopped > before / 4.0 {
            break;
        }
    }
    let lost = switch.count(site, "c", "rx-starved")?;
    signal(Signal::SIGCONT).doing(|| "continue a VMM".into())?;
    println!(
        "with all running {:.0} Mbit/s, with one stopped {:.0}; {lost} frames were dropped for it",
        before / 1e6,
        stopped / 1e6
    );
    ensure!(
        lost > 0,
        "no frame was dropped for the guest that was stopped"
    );
    ensure!(
        stopped > before / 4.0,
        "{stopped} bit/s are left of {before}"
    );
    reaches(&mut a, "10.77.0.3")?;
    for guest in [a, b, c] {
        guest.shut_down()?;
    }
    switch.stop(site)
}

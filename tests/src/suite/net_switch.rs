//! Guests that ringside-net joins to each other.

use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::Test;
use crate::ensure;
use crate::error::Result;
use crate::harness::{Guest, Switch, Vmm, iperf3, packets};
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

/// Bulk traffic between guests touches neither the uplink nor the processor of the host's network; frames of 9000 bytes pass, and
/// ports come and go meanwhile.
fn guests_are_joined(site: &Site) -> Result<()> {
    let ports = [("a", "mtu=9000"), ("b", "mtu=9000")];
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
    let long = switch.count(site, "b", "rx-bytes")?;
    a.run_ok("grep -qx 9000 /sys/class/net/eth0/mtu && ping -c 2 -W 5 -s 8972 10.77.0.2")?;
    let (frames, long) = (
        switch.count(site, "b", "rx-packets")?,
        switch.count(site, "b", "rx-bytes")? - long,
    );
    ensure!(
        long >= 2 * 9014 && frames < 20,
        "{frames} frames for two of 9014 bytes: they were cut"
    );

    b.run_ok("iperf3 --server --daemon")?;
    let before = switch.count(site, "up", "rx-packets")?;
    let rate = iperf3(&mut a, "10.77.0.2", 3, "")?;
    let back = iperf3(&mut a, "10.77.0.2", 3, "--reverse")?;
    println!("a to b {:.0} Mbit/s, b to a {:.0}", rate / 1e6, back / 1e6);
    ensure!(rate > 0.0 && back > 0.0, "nothing arrived");
    let on_uplink = switch.count(site, "up", "rx-packets")? - before;
    let tap = packets("up0")?.received;
    println!("frames on the uplink meanwhile: {on_uplink}; on its TAP in all: {tap}");
    ensure!(
        on_uplink < 10,
        "{on_uplink} frames between guests reached the uplink"
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

    // A port goes and comes back while traffic passes.
    b.run_ok("ping -i 0.05 -c 2000 10.77.0.1 >/tmp/ping 2>&1 &")?;
    for _ in 0..3 {
        switch.control(site).ask(&["port-remove", "b"])?;
        switch.add(site, "b", "mtu=9000")?;
        a.run_ok_within(
            "for i in $(seq 30); do ping -c 1 -W 1 10.77.0.2 && exit 0; done; exit 1",
            Duration::from_secs(40),
        )?;
    }
    a.shut_down()?;
    b.shut_down()?;
    switch.stop(site)
}

/// VLANs, isolation and address filters, against a guest that is its own administrator.
fn rules_hold_against_a_forger(site: &Site) -> Result<()> {
    let ports = [
        ("a", "vlan=7,mac=02:00:00:00:00:0a"),
        ("evil", "vlan=7,mac=02:00:00:00:00:0e,ip-filter=10.77.0.2"),
    ];
    let uplink = ["--uplink=tap:up0,name=up,trunk=7-8", "--tap-up"];
    let switch = Switch::start(site, &ports, &uplink)?;
    let mut a = guest(site, "a")?;
    let mut evil = guest(site, "evil")?;
    a.network_up("10.77.0.1/24")?;
    let card = evil.network_up("10.77.0.2/24")?;
    evil.run_ok("ping -c 2 -W 5 10.77.0.1")?;

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

    // Another VLAN, and no way to other isolated ports.
    let control = switch.control(site);
    for (options, what) in [
        ("vlan=8", "another VLAN"),
        ("vlan=7,isolated=on", "isolation"),
    ] {
        for port in ["a", "evil"] {
            // The second time both are isolated; the first time only one moves to another VLAN.
            if port == "a" && what == "another VLAN" {
                continue;
            }
            control.ask(&["port-remove", port])?;
            let mac = if port == "a" { "0a" } else { "0e" };
            switch.add(site, port, &format!("{options},mac=02:00:00:00:00:{mac}"))?;
        }
        wait_for_front_ends(&switch, site)?;
        let apart = evil.run("ping -c 3 -W 1 10.77.0.1")?;
        ensure!(apart.status != 0, "{what} was passed:\n{}", apart.text);
    }
    a.shut_down()?;
    evil.shut_down()?;
    switch.stop(site)
}

/// Waits until a front-end is at each port.
fn wait_for_front_ends(switch: &Switch, site: &Site) -> Result<()> {
    for _ in 0..100 {
        let list = switch.control(site).ask(&["port-list"])?;
        if !list.contains("front-end=none") {
            return Ok(());
        }
        std::thread::sleep(Duration::from_millis(200));
    }
    ensure!(false, "a VMM does not come back to its port");
    Ok(())
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

/// Frames for a guest that is stopped are dropped, and others go on as if it were not there. How fast is printed: nothing but
/// the clock tells, and what else the machine does weighs on it.
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
    let stopped = iperf3(&mut a, "10.77.0.2", 2, "")?;
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
    ensure!(stopped > 0.0, "nothing is left of {before} bit/s");
    a.run_ok("ping -c 2 -W 60 10.77.0.3")?;
    for guest in [a, b, c] {
        guest.shut_down()?;
    }
    switch.stop(site)
}

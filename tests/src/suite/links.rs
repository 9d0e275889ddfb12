//! What a card can be joined to beside a plain TAP.

use std::net::Ipv4Addr;
use std::os::unix::fs::chown;
use std::thread;
use std::time::{Duration, Instant};

use super::Test;
use super::net::tcp_both_ways;
use crate::command::{self, ORDINARY_USER};
use crate::ensure;
use crate::error::{Doing, Result};
use crate::harness::{
    Capture, Guest, Namespace, Net, Vmm, disk_file, http_server, iperf3_server, name_server, sha256,
};
use crate::site::Site;

pub(super) const TESTS: &[Test] = &[
    Test {
        name: "links::an_ordinary_user_reaches_the_outside_by_passt",
        seconds: 90,
        run: an_ordinary_user_reaches_the_outside_by_passt,
    },
    Test {
        name: "links::macvtap",
        seconds: 90,
        run: macvtap,
    },
    Test {
        name: "links::packet_socket",
        seconds: 90,
        run: packet_socket,
    },
    Test {
        name: "links::packet_socket_under_qemu",
        seconds: 90,
        run: packet_socket_under_qemu,
    },
    Test {
        name: "links::af_xdp",
        seconds: 90,
        run: af_xdp,
    },
    Test {
        name: "links::long_frames",
        seconds: 90,
        run: long_frames,
    },
];

/// Sets up what DHCP gives. The words that the client knows are in its environment.
const DHCP_SCRIPT: &str = r#"#!/bin/busybox sh
[ "$1" = bound ] || exit 0
ip address add "$ip/$mask" dev "$interface"
ip route add default via "$router"
for server in $dns; do echo "nameserver $server"; done > /etc/resolv.conf
"#;

/// A user who is not root starts card and VMM. The guest gets its address and its name server by DHCP, fetches a file by name from a
/// server outside of the namespace, is reached by a forwarded port, and survives the end of its passt.
fn an_ordinary_user_reaches_the_outside_by_passt(site: &Site) -> Result<()> {
    let outside = Namespace::create(site, "outside", "10.99.0.1/24", "10.99.0.2/24")?;
    command::run_line("ip link set lo up")?;
    // The gateway leads to the host itself; servers are elsewhere.
    command::run_line("ip route add default via 10.99.0.254")?;
    name_server(&outside, Ipv4Addr::new(10, 99, 0, 2))?;
    let directory = site.scratch.join("www");
    std::fs::create_dir(&directory).doing(|| "create a directory".into())?;
    let file = disk_file(site, "www/file", 1 << 20)?;
    let _server = http_server(site, &outside, &directory)?;

    let owner = Some(ORDINARY_USER);
    chown(&site.scratch, owner, owner).doing(|| "give the directory to the user".into())?;
    command::run_line("chmod 666 /dev/kvm")?;
    let mut card = Net::link("passt")
        .as_ordinary_user()
        .arg("--forward=tcp:8080:80")
        .arg("--passt-arg=--dns")
        .arg("--passt-arg=10.99.0.2")
        .arg("--passt-arg=--ipv4-only")
        .start(site)?;
    let mut guest = Guest::on(Vmm::Ringside)
        .diskless()
        .as_ordinary_user()
        .device(&card)
        .boot(site)?;
    let user = command::run_line(&format!("stat -c %u /proc/{}", guest.vmm_pid()))?;
    ensure!(
        user.trim() == ORDINARY_USER.to_string(),
        "the VMM runs as user {user}"
    );
    guest.run_ok(&format!(
        "mkdir -p /etc && cat > /dhcp <<'END'\n{DHCP_SCRIPT}END\nchmod +x /dhcp && ip link set eth0 up && udhcpc -i eth0 -n -q -s /dhcp"
    ))?;
    let shown = guest.run_ok("ip address show eth0 && cat /etc/resolv.conf")?;
    ensure!(
        shown.contains("10.99.0.1/24") && shown.contains("nameserver 10.99.0.2"),
        "DHCP did not give what the host has:\n{shown}"
    );
    let fetch = "wget -q -T 20 -O - http://server.example/file | sha256sum";
    let expected = format!("{}  -", sha256(&file)?);
    let fetched = guest.run_ok_within(fetch, Duration::from_secs(30))?;
    ensure!(
        fetched.trim() == expected,
        "the file is another one: {fetched} and not {expected}"
    );

    guest
        .run_ok("mkdir -p /www && echo from the guest > /www/index.html && httpd -p 80 -h /www")?;
    let page = outside.run_line("busybox wget -q -T 20 -O - http://10.99.0.1:8080/")?;
    ensure!(
        page.trim() == "from the guest",
        "the forwarded port gives \"{page}\""
    );

    // The passt is ours: nobody else in this process namespace has one.
    command::run_line("pkill -KILL passt")?;
    let fetched = guest.run_ok_within(
        &format!("for i in $(seq 10); do {fetch} && exit 0; sleep 1; done; exit 1"),
        Duration::from_secs(40),
    )?;
    ensure!(
        fetched.lines().any(|line| line == expected),
        "after passt was killed the file is another one: {fetched}"
    );
    let log = card.daemon().log();
    ensure!(
        log.contains("passt is gone") && log.contains("passt is back"),
        "the end of passt is not told:\n{log}"
    );
    guest.shut_down()?;
    card.stop(site)?;
    // It ends when the card's program has ended.
    let end = Instant::now() + site.limit(Duration::from_secs(5));
    while let Ok(left) = command::run_line("pgrep -l -r D,R,S passt") {
        ensure!(Instant::now() < end, "processes of passt are left:\n{left}");
        thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}

/// Another machine is joined to the host by `outside`; the guest is joined to that interface by a link, and both reach each other.
fn reaches_outside(site: &Site, vmm: Vmm, link: &str) -> Result<()> {
    let outside = Namespace::create(site, "outside", "10.98.0.1/24", "10.98.0.2/24")?;
    if link.starts_with("macvtap:") {
        command::run_line("ip link add link outside name mv0 type macvtap mode bridge")?;
        command::run_line("ip link set mv0 up")?;
    }
    // AF_XDP gives no word on checksums that are left to the card, and virtual Ethernet leaves them all.
    let whole = !link.starts_with("xdp:");
    if !whole {
        outside.run_line("ethtool -K eth0 tx off")?;
    }
    let _server = iperf3_server(site, Some(&outside))?;
    let capture = site.scratch.join("card.pcap");
    let card = Net::link(link)
        .arg(&format!("--pcap={}", capture.display()))
        .arg("--pcap-snap=96")
        .start(site)?;
    let mut guest = Guest::on(vmm).device(&card).boot(site)?;
    guest.network_up("10.98.0.3/24")?;
    guest.run_ok("ping -c 3 -i 0.2 -W 5 10.98.0.2")?;
    outside.run_line("ping -c 1 -W 5 10.98.0.3")?;
    tcp_both_ways(&mut guest, "10.98.0.2", &format!("{link}, "))?;
    guest.shut_down()?;
    card.stop(site)?;
    let [pings, large] = Capture::of(capture).count(site, ["icmp", "tcp and greater 1515"])?;
    println!("{link}: {pings} packets of ping, {large} segments of more than a frame");
    // Four questions with their answers.
    ensure!(pings >= 8, "the capture has {pings} packets of ping");
    ensure!(
        whole == (large > 0),
        "{large} segments of more than a frame passed"
    );
    Ok(())
}

fn macvtap(site: &Site) -> Result<()> {
    reaches_outside(site, Vmm::Ringside, "macvtap:mv0")
}

fn packet_socket(site: &Site) -> Result<()> {
    reaches_outside(site, Vmm::Ringside, "packet:outside")
}

fn packet_socket_under_qemu(site: &Site) -> Result<()> {
    reaches_outside(site, Vmm::Qemu11, "packet:outside")
}

fn af_xdp(site: &Site) -> Result<()> {
    reaches_outside(site, Vmm::Ringside, "xdp:outside")
}

/// Frames of 9000 bytes, and of the most that a TAP has, pass whole, with segmentation by the card and without.
fn long_frames(site: &Site) -> Result<()> {
    let mut cards = Vec::new();
    for (tap, address, mtu, offload) in [
        ("tap0", "10.96.0.1/24", "9000", "all"),
        ("tap1", "10.97.0.1/24", "65521", "all"),
        ("tap2", "10.98.0.1/24", "65521", "off"),
    ] {
        let card = Net::tap(tap)
            .address(address)
            .arg(&format!("--mtu={mtu}"))
            .arg(&format!("--offload={offload}"))
            .start(site)?;
        cards.push(card);
    }
    let [first, second, third] = cards.as_slice() else {
        return Ok(());
    };
    let mut guest = Guest::on(Vmm::Ringside)
        .device(first)
        .device(second)
        .device(third)
        .boot(site)?;
    for (card, network, mtu) in [("eth0", 96, 9000), ("eth1", 97, 65521), ("eth2", 98, 65521)] {
        guest.run_ok(&format!(
            "ip address add 10.{network}.0.2/24 dev {card} && ip link set {card} mtu {mtu} up"
        ))?;
        // The headers of IP and ICMP are no payload.
        let payload = mtu - 28;
        guest.run_ok(&format!(
            "/usr/bin/ping -M do -s {payload} -c 3 -i 0.3 -W 5 10.{network}.0.1"
        ))?;
        // Counted by the host: name, colon, bytes received.
        let tap = format!("tap{}:", network - 96);
        let table = command::run_line("cat /proc/net/dev")?;
        let bytes: u64 = table
            .lines()
            .find_map(|line| line.trim().strip_prefix(&tap)?.split_whitespace().next())
            .and_then(|bytes| bytes.parse().ok())
            .unwrap_or(0);
        ensure!(
            bytes >= 3 * mtu,
            "the host got {bytes} bytes by {card}, less than three packets of {mtu}"
        );
    }
    guest.shut_down()?;
    for card in cards {
        card.stop(site)?;
    }
    Ok(())
}

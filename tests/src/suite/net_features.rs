//! What a guest's driver and its operator can ask of a network card beside packets: a cable, fewer interrupts, a stand-in.

use std::time::{Duration, Instant};

use serde_json::Value;

use super::Test;
use crate::command;
use crate::ensure;
use crate::error::{LabError, Result};
use crate::harness::{
    Control, Guest, Igb, Net, Vmm, iperf3, iperf3_server, packets, sum_interrupts,
};
use crate::site::Site;

pub(super) const TESTS: &[Test] = &[
    Test {
        name: "net::link_goes_down_and_up",
        seconds: 60,
        run: link_goes_down_and_up,
    },
    Test {
        name: "net::interrupts_are_held_back",
        seconds: 60,
        run: interrupts_are_held_back,
    },
    Test {
        name: "net::flows_go_where_the_guest_says",
        seconds: 90,
        run: flows_go_where_the_guest_says,
    },
    Test {
        name: "net::stands_in_for_a_function",
        seconds: 120,
        run: stands_in_for_a_function,
    },
];

const HOST: &str = "10.77.0.1";
/// How long TCP may wait before it goes on by another path, on plain hardware.
const RESUME_LIMIT: Duration = Duration::from_secs(5);

/// A shell command for the guest that waits until a condition holds, for ten seconds.
fn until(condition: &str) -> String {
    format!(
        "tries=0; until {condition}; do tries=$((tries + 1)); [ $tries -lt 100 ] || exit 1; sleep 0.1; done"
    )
}

/// The cable is pulled out and plugged in over the control socket, and the guest sees it.
fn link_goes_down_and_up(site: &Site) -> Result<()> {
    let control = Control::new(site, "net.ctl");
    let net = Net::tap("tap0")
        .address(&format!("{HOST}/24"))
        .arg(&format!("--control-socket={}", control.socket().display()))
        .start(site)?;
    let mut guest = Guest::on(Vmm::Ringside)
        .diskless()
        .device(&net)
        .boot(site)?;
    guest.network_up("10.77.0.2/24")?;
    let reach = format!("ping -c 3 -i 0.2 -W 5 {HOST}");
    guest.run_ok(&reach)?;
    for _ in 0..2 {
        control.ask(&["link", "down"])?;
        guest.run_ok(&until("ip link show eth0 | grep -q NO-CARRIER"))?;
        let sent = packets("tap0")?.received;
        let lost = guest.run(&format!("ping -c 2 -i 0.2 -W 1 {HOST}"))?;
        ensure!(lost.status != 0, "a packet passed without a cable");
        let now = packets("tap0")?.received;
        ensure!(now == sent, "{} packets reached the TAP", now - sent);
        control.ask(&["link", "up"])?;
        guest.run_ok(&until("! ip link show eth0 | grep -q NO-CARRIER"))?;
        guest.run_ok(&reach)?;
    }
    guest.shut_down()?;
    net.stop(site)
}

/// The guest's driver has interrupts held back until enough packets came or time is up, and gets fewer for each packet.
fn interrupts_are_held_back(site: &Site) -> Result<()> {
    let net = Net::tap("tap0")
        .address(&format!("{HOST}/24"))
        .start(site)?;
    let _server = iperf3_server(site, None)?;
    let mut guest = Guest::on(Vmm::Ringside).device(&net).boot(site)?;
    guest.network_up("10.77.0.2/24")?;
    // Few packets at a time: each of them could have an interrupt of its own.
    let mut per_packet = |limits: &str| -> Result<f64> {
        guest.run_ok(&format!("ethtool -C eth0 {limits}"))?;
        let count = |guest: &mut Guest| -> Result<(u64, u64)> {
            let received = guest.run_ok("cat /sys/class/net/eth0/statistics/rx_packets")?;
            let table = guest.run_ok("cat /proc/interrupts")?;
            Ok((
                received.trim().parse().unwrap_or(0),
                sum_interrupts(&table, "virtio1-input"),
            ))
        };
        let before = count(&mut guest)?;
        iperf3(
            &mut guest,
            HOST,
            2,
            "--udp --bitrate 1M --length 400 --reverse",
        )?;
        let after = count(&mut guest)?;
        let (received, interrupts) = (after.0 - before.0, after.1 - before.1);
        println!("{limits}: {received} packets, {interrupts} interrupts");
        ensure!(received > 100, "only {received} packets came");
        #[allow(clippy::cast_precision_loss, reason = "thousands at most")]
        Ok(interrupts as f64 / received as f64)
    };
    let free = per_packet("rx-usecs 0 rx-frames 0")?;
    let held = per_packet("rx-usecs 100000 rx-frames 16")?;
    let timed = per_packet("rx-usecs 30000 rx-frames 64")?;
    ensure!(
        held < 0.5 * free && timed < 0.7 * free,
        "interrupts for each packet: {free:.2} freely, {held:.2} with 16 at once, {timed:.2} every 30 ms"
    );
    // Nothing that is held back is lost: with a packet a second, each waits for the timer alone.
    guest.run_ok("ethtool -C eth0 rx-usecs 50000 rx-frames 64 tx-usecs 50000 tx-frames 64")?;
    guest.run_ok(&format!("ping -c 5 -i 0.5 -W 5 {HOST}"))?;
    guest.shut_down()?;
    net.stop(site)
}

/// Receive-side scaling: the guest's table, and what it has hashed, decide which queue pair a flow comes by.
fn flows_go_where_the_guest_says(site: &Site) -> Result<()> {
    const PAIRS: usize = 4;
    let control = Control::new(site, "net.ctl");
    let net = Net::tap("tap0")
        .queue_pairs(4)
        .address(&format!("{HOST}/24"))
        .arg("--hash-report")
        .arg(&format!("--control-socket={}", control.socket().display()))
        .start(site)?;
    let _server = iperf3_server(site, None)?;
    let mut guest = Guest::on(Vmm::Ringside).cpus(4).device(&net).boot(site)?;
    guest.network_up("10.77.0.2/24")?;
    guest.run_ok(&format!("ethtool -L eth0 combined {PAIRS}"))?;
    let received = || -> Result<Vec<u64>> {
        let stats = control.ask_json(&["stats"])?;
        let pairs = (0..PAIRS).map(|pair| {
            let packets = stats.pointer(&format!("/queue-pairs/{pair}/rx-packets"));
            packets
                .and_then(Value::as_u64)
                .ok_or_else(|| LabError::Protocol {
                    from: "ringside-ctl stats",
                    text: stats.to_string(),
                })
        });
        pairs.collect()
    };
    // The pairs that have a good part of what comes by eight flows.
    let used = |guest: &mut Guest, what: &str| -> Result<Vec<usize>> {
        let before = received()?;
        iperf3(guest, HOST, 1, "--parallel 8 --reverse")?;
        let after = received()?;
        let counts: Vec<u64> = after.iter().zip(before).map(|(a, b)| a - b).collect();
        println!("{what}: {counts:?}");
        let all: u64 = counts.iter().sum();
        ensure!(all > 200, "only {all} packets came");
        let counts = counts.into_iter().enumerate();
        let many = counts.filter(|(_, count)| *count > all / 50);
        Ok(many.map(|(pair, _)| pair).collect())
    };
    println!("{}", guest.run_ok("ethtool -x eth0")?);
    let spread = used(&mut guest, "as the driver likes")?;
    ensure!(spread.len() > 1, "eight flows came by {spread:?}");
    for (table, pairs) in [("equal 2", &[0, 1][..]), ("start 2 equal 2", &[2, 3])] {
        guest.run_ok(&format!("ethtool -X eth0 {table}"))?;
        let found = used(&mut guest, table)?;
        ensure!(
            !found.is_empty() && found.iter().all(|pair| pairs.contains(pair)),
            "with a table of {table}, flows came by {found:?}"
        );
    }
    // Without ports in the hash, all flows of two hosts are one.
    guest.run_ok(
        "ethtool -X eth0 equal 4 && ethtool -K eth0 rxhash on && \
         ethtool -N eth0 rx-flow-hash tcp4 sd",
    )?;
    let found = used(&mut guest, "by addresses alone")?;
    ensure!(
        found.len() == 1,
        "by addresses alone, flows came by {found:?}"
    );
    guest.run_ok("ethtool -N eth0 rx-flow-hash tcp4 sdfn")?;
    let found = used(&mut guest, "by ports again")?;
    ensure!(found.len() > 1, "by ports, eight flows came by {found:?}");
    guest.shut_down()?;
    net.stop(site)
}

/// A function of the network card and a card of ours with the same address are one interface to the guest: TCP goes over the
/// function while it is there, over our card when it was unplugged, and over the function when it is there again.
fn stands_in_for_a_function(site: &Site) -> Result<()> {
    const MAC: &str = "52:54:00:00:00:a5";
    let igb = Igb::take(site)?;
    let functions = igb.create::<2>(&[])?;
    igb.set(0, &["--mac", MAC])?;
    let [function, _] = functions.addresses();
    let net = Net::tap("tap0")
        .arg(&format!("--mac={MAC}"))
        .arg("--standby")
        .start(site)?;
    // Both ways end at one bridge, which answers with the physical function's address.
    let physical = igb.interface();
    let address = command::run_line(&format!("cat /sys/class/net/{physical}/address"))?;
    for line in [
        "ip link add br0 type bridge".to_owned(),
        format!("ip link set br0 address {}", address.trim()),
        format!("ip link set {physical} master br0"),
        "ip link set tap0 master br0".to_owned(),
        format!("ip link set {physical} up"),
        format!("ip address add {HOST}/24 dev br0"),
        "ip link set br0 up".to_owned(),
    ] {
        command::run_line(&line)?;
    }
    let _server = iperf3_server(site, None)?;
    let control = Control::new(site, "api.sock");
    let mut guest = Guest::on(Vmm::Ringside)
        .device(&net)
        .kernel_argument("lab.drivers")
        .arg(&format!("--api-socket={}", control.socket().display()))
        .boot(site)?;
    let master = guest.run_ok("basename $(readlink /sys/class/net/*/master)")?;
    let master = master.trim().to_owned();
    guest.run_ok(&format!(
        "ip address add 10.77.0.2/24 dev {master} && ip link set {master} up"
    ))?;
    let reach = format!(
        "tries=0; until ping -c 1 -W 1 {HOST} || [ $tries = 30 ]; do tries=$((tries + 1)); done; \
         ping -c 3 -i 0.2 -W 5 {HOST}"
    );
    guest.run_ok(&reach)?;
    guest.run_ok(&format!(
        "(iperf3 --client {HOST} --time 600 --forceflush >/tmp/iperf3.log 2>&1; echo $? >/tmp/iperf3.status) \
         >/dev/null 2>&1 </dev/null &"
    ))?;
    guest.run_ok(&until("grep -q sec /tmp/iperf3.log"))?;
    // What our card has, and what the function has, of some seconds.
    let passed = |seconds| -> Result<[u64; 2]> {
        let before = (packets("tap0")?.received, packets(physical)?.received);
        std::thread::sleep(Duration::from_secs(seconds));
        let after = (packets("tap0")?.received, packets(physical)?.received);
        Ok([after.0 - before.0, after.1 - before.1])
    };
    // The same of TCP, once it goes on: what was under way when its path changed it sends again after a time that doubles.
    let shares = || -> Result<[u64; 2]> {
        let start = Instant::now();
        while passed(1)?.iter().sum::<u64>() < 20 && start.elapsed() < site.limit(RESUME_LIMIT) {}
        passed(4)
    };
    let joined = until(
        "[ $(ls -d /sys/bus/pci/drivers/igbvf/*/net/*/master 2>/dev/null | wc -l) = 1 ] && \
         cat /sys/bus/pci/drivers/igbvf/*/net/*/carrier | grep -q 1",
    );
    for round in 0..2 {
        let [card, function_share] = shares()?;
        println!(
            "round {round}, alone: {card} packets on our card, {function_share} on the function"
        );
        ensure!(
            card > 20 && function_share < card / 4,
            "without the function, {card} packets came by our card and {function_share} by the function"
        );
        let start = Instant::now();
        control.ask(&["device-add", &format!("{function},id=hot")])?;
        guest.run_ok(&joined)?;
        println!("joined after {:?}", start.elapsed());
        let [card, function_share] = shares()?;
        println!(
            "round {round}, both: {card} packets on our card, {function_share} on the function"
        );
        ensure!(
            function_share > 20 && card < function_share / 4,
            "with the function, {card} packets came by our card and {function_share} by the function"
        );
        guest.run_ok(&reach)?;
        control.ask(&["device-remove", "hot"])?;
        guest.run_ok(&until("[ ! -e /sys/bus/pci/drivers/igbvf/*/net ]"))?;
        guest.run_ok(&reach)?;
    }
    // One connection all the time: what ends it is its user.
    guest.run_ok(&format!(
        "kill -INT $(pidof iperf3); {}; cat /tmp/iperf3.log; grep -q 'the client has terminated' /tmp/iperf3.log",
        until("[ -e /tmp/iperf3.status ]")
    ))?;
    guest.shut_down()?;
    functions.destroy()?;
    net.stop(site)
}

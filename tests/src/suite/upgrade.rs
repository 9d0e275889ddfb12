//! Back-ends whose place is taken by others under load: the guest sees nothing but a pause.

use std::thread::sleep;
use std::time::Duration;

use super::Test;
use crate::ensure;
use crate::error::{LabError, Result};
use crate::harness::{
    BackEnd, Blk, Control, Daemon, Guest, Net, Switch, Vmm, disk_file, iperf3_server,
};
use crate::site::Site;

pub(super) const TESTS: &[Test] = &[
    Test {
        name: "upgrade::disk_and_card_go_on",
        seconds: 120,
        run: disk_and_card_go_on,
    },
    Test {
        name: "upgrade::switch_goes_unnoticed",
        seconds: 60,
        run: switch_goes_unnoticed,
    },
];

/// How often each is upgraded.
const UPGRADES: usize = 10;
const QUEUES: u16 = 2;
/// How long an upgrade may take on plain hardware.
const LIMIT: Duration = Duration::from_secs(10);
const MIB: u64 = 1 << 20;

/// Takes the place of a back-end. Returns the new one, and the pause in microseconds.
pub(super) fn upgrade(
    site: &Site,
    mut old: BackEnd,
    start: impl FnOnce(&BackEnd) -> Result<BackEnd>,
) -> Result<(BackEnd, u64)> {
    let mut new = start(&old)?;
    let pause = pause(site, old.daemon(), new.daemon())?;
    Ok((new, pause))
}

/// Waits until one program has taken the place of the other. Returns the pause in microseconds.
pub(super) fn pause(site: &Site, old: &mut Daemon, new: &mut Daemon) -> Result<u64> {
    let status = old.wait(site.limit(LIMIT))?;
    ensure!(
        status.success(),
        "the one whose place was taken ended with {status}"
    );
    let log = new.log_path().to_owned();
    let text = || std::fs::read_to_string(&log).unwrap_or_default();
    let ready = || text().contains(" ready");
    new.wait_until("it has taken over", site.limit(LIMIT), ready)?;
    let text = text();
    let pause = text
        .split_once("took over from process ")
        .and_then(|(_, rest)| rest.split_whitespace().nth(2)?.parse().ok());
    match pause {
        Some(pause) => Ok(pause),
        None => Err(LabError::Ended {
            what: "it does not say that it has taken over".into(),
            output: text,
        }),
    }
}

fn disk_and_card_go_on(site: &Site) -> Result<()> {
    let option = |option: &str, name: &str| {
        let socket = Control::new(site, name).socket().display().to_string();
        format!("--{option}={socket}")
    };
    let blk = |disk| {
        let blk = Blk::on(disk).queues(QUEUES);
        blk.arg(&option("control-socket", "blk.ctl"))
    };
    let net = || {
        let net = Net::tap("tap0").queue_pairs(QUEUES);
        net.arg(&option("control-socket", "net.ctl"))
    };
    let image = disk_file(site, "disk.img", 64 * MIB)?;
    let mut disk = blk(image.clone()).start(site)?;
    let mut card = net().address("10.77.0.1/24").start(site)?;
    let _server = iperf3_server(site, None)?;
    let mut guest = Guest::on(Vmm::Ringside)
        .cpus(QUEUES.into())
        .device(&disk)
        .device(&card)
        .boot(site)?;
    guest.network_up("10.77.0.2/24")?;
    // What was written is read again and compared. Each answer to a ping comes, however late.
    guest.run_ok(
        "(while [ ! -e /run/enough ]; do \
         fio --name=load --filename=/dev/vdb --direct=1 --ioengine=libaio --rw=randwrite --bs=4k --iodepth=8 --numjobs=2 \
         --size=4M --offset_increment=16M --verify=crc32c --verify_backlog=16 --verify_fatal=1 --randrepeat=0 --eta=never \
         >/run/fio.log 2>&1 || { touch /run/failed; break; }; done; touch /run/done) </dev/null >/dev/null 2>&1 & \
         (while [ ! -e /run/enough ]; do iperf3 -c 10.77.0.1 -t 2 -P 2 --bidir || touch /run/broken; done; touch /run/through) \
         </dev/null >/run/iperf.log 2>&1 & \
         (ping -i 0.2 -W 60 10.77.0.1 & echo $! >/run/ping.pid; wait) </dev/null >/run/ping.log 2>&1 &",
    )?;
    let (mut of_disk, mut of_card) = (Vec::new(), Vec::new());
    for _ in 0..UPGRADES {
        sleep(Duration::from_millis(300));
        let pause;
        (disk, pause) = upgrade(site, disk, |old| {
            let blk = blk(image.clone()).arg(&option("take-over", "blk.ctl"));
            blk.in_place_of(old).start(site)
        })?;
        of_disk.push(pause);
        let pause;
        (card, pause) = upgrade(site, card, |old| {
            let net = net().arg(&option("take-over", "net.ctl"));
            net.in_place_of(old).start(site)
        })?;
        of_card.push(pause);
    }
    println!("pauses of the disk: {of_disk:?} µs");
    println!("pauses of the card: {of_card:?} µs");
    guest.run_ok_within(
        "touch /run/enough; while [ ! -e /run/done ] || [ ! -e /run/through ]; do sleep 0.1; done; \
         [ ! -e /run/failed ] || { cat /run/fio.log; exit 1; }; [ ! -e /run/broken ] || { tail -n 40 /run/iperf.log; exit 1; }",
        Duration::from_secs(30),
    )?;
    no_ping_lost(&mut guest, &["/run/ping"])?;
    let errors = guest.run_ok("dmesg | grep -ci -e 'i/o error' -e 'blk_update_request' || true")?;
    ensure!(
        errors.trim() == "0",
        "the guest saw errors:\n{}",
        guest.run_ok("dmesg | tail -20")?
    );
    guest.shut_down()?;
    disk.stop(site)?;
    card.stop(site)
}

/// Two guests of a switch, that send to each other and ping each other, while one switch after the other takes its place.
fn switch_goes_unnoticed(site: &Site) -> Result<()> {
    let ports = [("a", "mac=02:00:00:00:00:0a"), ("b", "")];
    let uplink = ["--uplink=tap:up0,name=up", "--tap-ip=10.77.0.9/24"];
    let mut switch = Switch::start(site, &ports, &uplink)?;
    let guest = |port: &str, address: &str| -> Result<Guest> {
        let mut guest = Guest::on(Vmm::Ringside)
            .memory("256M")
            .arg(&Switch::net(port))
            .boot(site)?;
        guest.network_up(address)?;
        Ok(guest)
    };
    let mut a = guest("a", "10.77.0.1/24")?;
    let mut b = guest("b", "10.77.0.2/24")?;
    b.run_ok("iperf3 --server --daemon")?;
    a.run_ok("ping -c 1 -W 60 10.77.0.2 && ping -c 1 -W 60 10.77.0.9")?;
    // Each answer to a ping comes, however late.
    a.run_ok(
        "(while [ ! -e /run/enough ]; do iperf3 -c 10.77.0.2 -t 2 --bidir || touch /run/broken; done; touch /run/through) \
         </dev/null >/run/iperf.log 2>&1 & \
         for to in 2 9; do (ping -i 0.2 -W 60 10.77.0.$to & echo $! >/run/ping$to.pid; wait) </dev/null >/run/ping$to.log 2>&1 & done",
    )?;
    let mut pauses = Vec::new();
    for _ in 0..UPGRADES {
        sleep(Duration::from_millis(300));
        let mut next = switch.successor(site)?;
        pauses.push(pause(site, switch.daemon(), next.daemon())?);
        switch = next;
    }
    println!("pauses of the switch: {pauses:?} µs");
    a.run_ok_within(
        "touch /run/enough; while [ ! -e /run/through ]; do sleep 0.1; done; \
         [ ! -e /run/broken ] || { tail -n 40 /run/iperf.log; exit 1; }",
        Duration::from_secs(30),
    )?;
    no_ping_lost(&mut a, &["/run/ping2", "/run/ping9"])?;
    // The programs count on from each other, and the guest's kernel counts for itself.
    let [sent] = numbers(&a.run_ok("cat /sys/class/net/eth0/statistics/tx_packets")?)?;
    let frames = switch.count(site, "a", "tx-packets")?;
    println!("frames of the first guest: {sent}; counted from program to program: {frames}");
    ensure!(
        frames >= sent,
        "the guest has sent {sent} frames, and {frames} were counted"
    );
    a.shut_down()?;
    b.shut_down()?;
    switch.stop(site)
}

/// Ends a guest's pings, whose processes and output are in files of these names, and waits for the answers that are still on their way.
fn no_ping_lost(guest: &mut Guest, names: &[&str]) -> Result<()> {
    let [pids, logs] = [".pid", ".log"].map(|end| {
        let files: Vec<_> = names.iter().map(|name| format!("{name}{end}")).collect();
        files.join(" ")
    });
    let text = guest.run_ok_within(
        &format!(
            "kill -INT $(cat {pids}) && sleep 1 && \
             echoes() {{ awk '$1 == \"Icmp:\" && !names {{ names = split($0, name); next }} \
             $1 == \"Icmp:\" {{ for (i = 2; i <= names; i++) count[name[i]] = $i }} \
             END {{ print count[\"OutEchos\"], count[\"InEchoReps\"] }}' /proc/net/snmp; }}; \
             tries=0; until set -- $(echoes); [ \"$1\" = \"$2\" ] || [ $tries = 100 ]; do \
             tries=$((tries + 1)); sleep 0.1; done; echo $1 $2"
        ),
        Duration::from_secs(30),
    )?;
    let [sent, answered] = numbers(&text)?;
    println!("{sent} pings were sent, {answered} answered");
    ensure!(
        sent > UPGRADES as u64 && sent == answered,
        "{answered} of {sent} pings were answered:\n{}",
        guest.run_ok(&format!("cat {logs}"))?
    );
    Ok(())
}

/// As many numbers as a guest has printed.
fn numbers<const N: usize>(text: &str) -> Result<[u64; N]> {
    let numbers: Option<Vec<_>> = text
        .split_whitespace()
        .map(|word| word.parse().ok())
        .collect();
    numbers
        .and_then(|numbers| numbers.try_into().ok())
        .ok_or_else(|| LabError::Protocol {
            from: "the guest",
            text: text.into(),
        })
}

//! Our back-ends under other people's VMMs, and our VMM with other people's back-ends.

use std::path::Path;
use std::thread::sleep;
use std::time::{Duration, Instant};

use super::Test;
use super::blk::{arrived, exchange, random_file};
use super::net::tcp_both_ways;
use crate::command;
use crate::ensure;
use crate::error::Result;
use crate::harness::{
    BackEnd, Blk, Guest, Kind, Net, Switch, Testpmd, Vmm, disk_file, iperf3_server, last_shown,
    testpmd,
};
use crate::site::Site;

pub(super) const TESTS: &[Test] = &[
    Test {
        name: "others::our_back_ends_under_qemu_10",
        seconds: 120,
        run: |site| our_back_ends(site, Vmm::Qemu10),
    },
    Test {
        name: "others::our_back_ends_under_qemu_11",
        seconds: 120,
        run: |site| our_back_ends(site, Vmm::Qemu11),
    },
    Test {
        name: "others::packed_queues_under_ringside_vmm",
        seconds: 120,
        run: |site| packed_queues(site, Vmm::Ringside),
    },
    Test {
        name: "others::packed_queues_under_qemu_11",
        seconds: 120,
        run: |site| packed_queues(site, Vmm::Qemu11),
    },
    Test {
        name: "others::our_vmm_with_qemu_storage_daemon_and_passt",
        seconds: 120,
        run: our_vmm,
    },
    Test {
        name: "others::dpdk_virtio_user",
        seconds: 120,
        run: dpdk_virtio_user,
    },
];

/// How long DPDK may take to start, or to end.
const DPDK_LIMIT: Duration = Duration::from_secs(15);

/// Disk and card of a guest under stock QEMU.
fn our_back_ends(site: &Site, vmm: Vmm) -> Result<()> {
    let disk = random_file(site, "disk.img")?;
    let blk = Blk::on(&disk).queues(2).start(site)?;
    let net = Net::tap("tap0")
        .address("10.77.0.1/24")
        .queue_pairs(2)
        .start(site)?;
    let _server = iperf3_server(site, None)?;
    let mut guest = Guest::on(vmm)
        .cpus(2)
        .device(&blk)
        .device(&net)
        .boot(site)?;
    let queues = guest
        .run_ok("ls /sys/block/vdb/mq | wc -l; ls -d /sys/class/net/eth0/queues/rx-* | wc -l")?;
    ensure!(
        queues.split_whitespace().eq(["2", "2"]),
        "queues of the disk and of the card: {queues}"
    );
    let seen = exchange(&mut guest, "/dev/vdb", &disk)?;
    guest.network_up("10.77.0.2/24")?;
    let features = guest.run_ok("ethtool -k eth0")?;
    ensure!(
        features.contains("tx-tcp-segmentation: on"),
        "TSO is off:\n{features}"
    );
    tcp_both_ways(&mut guest, "10.77.0.1", "")?;
    let status = guest.shut_down()?;
    ensure!(status.success(), "QEMU ended with {status}");
    blk.stop(site)?;
    net.stop(site)?;
    arrived(&disk, &seen)
}

/// Disk and card of a guest that uses packed queues for both.
fn packed_queues(site: &Site, vmm: Vmm) -> Result<()> {
    let disk = disk_file(site, "disk.img", 64 << 20)?;
    let blk = Blk::on(&disk).queues(2).start(site)?;
    let net = Net::tap("tap0").address("10.77.0.1/24").start(site)?;
    let _server = iperf3_server(site, None)?;
    let mut guest = Guest::on(vmm)
        .cpus(2)
        .packed()
        .device(&blk)
        .device(&net)
        .boot(site)?;
    for device in ["/sys/block/vdb/device", "/sys/class/net/eth0/device"] {
        // A digit for each feature bit: VIRTIO_F_RING_PACKED is number 34.
        let bit = guest.run_ok(&format!("cut -c 35 {device}/features"))?;
        ensure!(bit.trim() == "1", "{device} has no packed queues: {bit}");
    }
    guest.run_ok_within(
        "fio --name=verify --filename=/dev/vdb --direct=1 --ioengine=libaio --iodepth=32 \
         --rw=randwrite --bsrange=4k-64k --numjobs=2 --size=6M --offset_increment=32M \
         --cpus_allowed=0-1 --cpus_allowed_policy=split \
         --verify=crc32c --verify_fatal=1 --do_verify=1",
        Duration::from_secs(60),
    )?;
    guest.network_up("10.77.0.2/24")?;
    tcp_both_ways(&mut guest, "10.77.0.1", "")?;
    guest.run_ok("ping -c 3 -i 0.2 -W 5 10.77.0.1")?;
    guest.shut_down()?;
    blk.stop(site)?;
    net.stop(site)
}

/// A disk of qemu-storage-daemon, another that the VMM knows nothing of but its type, and a card of passt.
fn our_vmm(site: &Site) -> Result<()> {
    let disks = [
        random_file(site, "disk-1.img")?,
        random_file(site, "disk-2.img")?,
    ];
    let known = storage_daemon(site, &disks[0], "known.sock")?;
    let generic = storage_daemon(site, &disks[1], "generic.sock")?;
    let passt = passt(site, "passt.sock", ["10.79.0.2", "10.79.0.1"])?;
    let _server = iperf3_server(site, None)?;
    let mut guest = Guest::on(Vmm::Ringside)
        .device(&known)
        .device(&passt)
        .arg(&format!(
            "--vhost-user=type=blk,socket={},num-queues=1,config-size=60",
            generic.socket()
        ))
        .boot(site)?;
    let seen = [
        exchange(&mut guest, "/dev/vdb", &disks[0])?,
        exchange(&mut guest, "/dev/vdc", &disks[1])?,
    ];
    guest.network_up("10.79.0.2/24")?;
    tcp_both_ways(&mut guest, "10.79.0.1", "")?;
    guest.shut_down()?;
    for (disk, seen) in disks.iter().zip(&seen) {
        arrived(disk, seen)?;
    }
    Ok(())
}

/// A disk of qemu-storage-daemon, which does not lock its file: another side may have it.
pub(super) fn storage_daemon(site: &Site, disk: &Path, socket: &str) -> Result<BackEnd> {
    let mut storage = site.root_program("usr/bin/qemu-storage-daemon");
    storage.arg("--blockdev").arg(format!(
        "file,node-name=disk,locking=off,filename={}",
        disk.display()
    ));
    storage.arg("--export").arg(format!(
        "vhost-user-blk,id=export,node-name=disk,writable=on,addr.type=unix,addr.path={socket}"
    ));
    BackEnd::foreign(site, Kind::Blk, 1, socket, storage)
}

/// A card of passt, by the addresses of guest and gateway. It answers for the gateway itself, and connects to this side's loopback.
pub(super) fn passt(site: &Site, socket: &str, [guest, gateway]: [&str; 2]) -> Result<BackEnd> {
    command::run_line("ip link set lo up")?;
    let mut passt = site.root_program("usr/bin/passt");
    passt.args(["--foreground", "--vhost-user", "--runas", "0"]);
    passt.args(["--socket", socket, "--address", guest]);
    passt.args(["--netmask", "24", "--gateway", gateway, "--ipv4-only"]);
    BackEnd::foreign(site, Kind::Net, 1, socket, passt)
}

/// DPDK's driver at two ports of a switch, with each kind of queue: what one sends the other receives.
fn dpdk_virtio_user(site: &Site) -> Result<()> {
    let ports = [
        ("a", "mac=02:00:00:00:00:0a"),
        ("b", "mac=02:00:00:00:00:0b"),
    ];
    let switch = Switch::start(site, &ports, &[])?;
    for (packed, in_order) in [(0, 0), (0, 1), (1, 0), (1, 1)] {
        let start = |port: &str, mode, options: &[&str]| {
            let device =
                format!("net_virtio_user0,path={port}.sock,packed_vq={packed},in_order={in_order}");
            let mut command = testpmd(site, port, &[device], mode, 64, None);
            command.args(options);
            let log = format!("testpmd-{port}-{packed}{in_order}.log");
            Testpmd::start(command, site.scratch.join(log))
        };
        let before = switch.count(site, "b", "rx-packets")?;
        let receiver = start("b", "rxonly", &[])?;
        let sender = start("a", "txonly", &["--eth-peer=0,02:00:00:00:00:0b"])?;
        wait_for_frames(site, &receiver)?;
        sender.end(site.limit(DPDK_LIMIT))?;
        let text = receiver.end(site.limit(DPDK_LIMIT))?;
        let received = last_shown(&text, "RX-packets:").unwrap_or_default();
        let passed = switch.count(site, "b", "rx-packets")? - before;
        println!(
            "packed {packed}, in order {in_order}: dpdk-testpmd received {received}, the switch counts {passed}"
        );
        // What is in the ring at the end it does not take.
        ensure!(
            received > 0.0 && received <= passed as f64 && passed as f64 - received <= 1024.0,
            "the switch passed {passed} frames, and {received} came"
        );
    }
    let forged = switch.count(site, "a", "tx-forged")? + switch.count(site, "a", "tx-dropped")?;
    ensure!(forged == 0, "{forged} of its frames were refused");
    switch.stop(site)
}

/// Waits until a DPDK that receives shows that it does.
fn wait_for_frames(site: &Site, receiver: &Testpmd) -> Result<()> {
    let deadline = Instant::now() + site.limit(DPDK_LIMIT);
    loop {
        let text = receiver.text()?;
        if last_shown(&text, "Rx-pps:").is_some_and(|rate| rate > 0.0) {
            return Ok(());
        }
        ensure!(
            Instant::now() < deadline,
            "no frame came; dpdk-testpmd wrote:\n{text}"
        );
        sleep(Duration::from_millis(200));
    }
}

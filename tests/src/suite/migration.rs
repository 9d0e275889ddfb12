//! Guests that move from one VMM to another while they work.

use std::path::Path;
use std::time::Duration;

use serde_json::Value;

use super::Test;
use super::blk::arrived;
use crate::command;
use crate::ensure;
use crate::error::Result;
use crate::harness::{
    BackEnd, Blk, Guest, GuestBuilder, Kind, Net, Qmp, Vmm, disk_file, iperf3_server,
};
use crate::site::Site;

pub(super) const TESTS: &[Test] = &[
    Test {
        name: "migration::qemu_moves_a_guest_with_disk_and_card",
        seconds: 240,
        run: |site| move_guest(site, Vmm::Qemu11, false, &OURS),
    },
    Test {
        name: "migration::qemu_moves_a_guest_with_packed_queues",
        seconds: 240,
        run: |site| move_guest(site, Vmm::Qemu11, true, &OURS),
    },
    Test {
        name: "migration::qemu_10_moves_a_guest_with_disk_and_card",
        seconds: 240,
        run: |site| move_guest(site, Vmm::Qemu10, false, &OURS),
    },
    Test {
        name: "migration::qemu_moves_a_guest_of_qemu_storage_daemon_and_passt",
        seconds: 240,
        run: |site| move_guest(site, Vmm::Qemu11, false, &OTHERS),
    },
];

/// How long a guest may take to move, on plain hardware.
const MOVE_LIMIT: Duration = Duration::from_secs(30);
/// How long a round of fio may take.
const ROUND_LIMIT: Duration = Duration::from_secs(30);

/// Back-ends of one side.
struct BackEnds {
    disk: fn(&Site, &Path, &str) -> Result<BackEnd>,
    card: fn(&Site, &str) -> Result<BackEnd>,
    /// Tells in the guest that it reaches the host.
    reach: &'static str,
}

const OURS: BackEnds = BackEnds {
    disk: |site, disk, _side| Blk::on(disk).arg("--lock=running").start(site),
    card: |site, side| {
        let tap = format!("tap-{side}");
        let net = Net::tap(&tap).start(site)?;
        command::run_line(&format!("ip link set {tap} master br0"))?;
        Ok(net)
    },
    reach: "ping -c 3 -i 0.2 -W 5 10.77.0.1",
};

const OTHERS: BackEnds = BackEnds {
    disk: of_storage_daemon,
    card: of_passt,
    // The server may be busy with another one.
    reach: "for i in 1 2 3 4 5; do timeout 30 iperf3 --client 10.77.0.1 --time 1 >/dev/null && exit 0; sleep 1; done; exit 1",
};

fn of_storage_daemon(site: &Site, disk: &Path, side: &str) -> Result<BackEnd> {
    let socket = format!("storage-{side}.sock");
    let mut storage = site.root_program("usr/bin/qemu-storage-daemon");
    storage.arg("--blockdev").arg(format!(
        "file,node-name=disk,locking=off,filename={}",
        disk.display()
    ));
    storage.arg("--export").arg(format!(
        "vhost-user-blk,id=export,node-name=disk,writable=on,addr.type=unix,addr.path={socket}"
    ));
    BackEnd::foreign(site, Kind::Blk, 1, &socket, storage)
}

/// A card that has the host's address on the guest's side, and connects to this side's loopback.
fn of_passt(site: &Site, side: &str) -> Result<BackEnd> {
    command::run_line("ip link set lo up")?;
    let socket = format!("passt-{side}.sock");
    let mut passt = site.root_program("usr/bin/passt");
    passt.args(["--foreground", "--vhost-user", "--runas", "0"]);
    passt.args(["--socket", &socket, "--address", "10.77.0.2"]);
    passt.args(["--netmask", "24", "--gateway", "10.77.0.1", "--ipv4-only"]);
    BackEnd::foreign(site, Kind::Net, 1, &socket, passt)
}

fn guest<'a>(vmm: Vmm, packed: bool, (disk, card): &'a (BackEnd, BackEnd)) -> GuestBuilder<'a> {
    let guest = Guest::on(vmm).cpus(2).memory("384M");
    let guest = if packed { guest.packed() } else { guest };
    guest.device(disk).device(card)
}

/// A guest writes to its disk, reads all of it back, and sends over its card; meanwhile it moves. Back-ends are two of each: the
/// disks' share a file, the cards' a bridge.
fn move_guest(site: &Site, vmm: Vmm, packed: bool, back_ends: &BackEnds) -> Result<()> {
    let disk = disk_file(site, "disk.img", 64 << 20)?;
    for line in [
        "ip link add br0 type bridge",
        "ip address add 10.77.0.1/24 dev br0",
        "ip link set br0 up",
    ] {
        command::run_line(line)?;
    }
    let _server = iperf3_server(site, None)?;
    let start = |side| -> Result<(BackEnd, BackEnd)> {
        Ok((
            (back_ends.disk)(site, &disk, side)?,
            (back_ends.card)(site, side)?,
        ))
    };
    let (from, to) = (start("from")?, start("to")?);
    let mut source = guest(vmm, packed, &from)
        .arg("-qmp")
        .arg("unix:from.qmp,server=on,wait=off")
        .boot(site)?;
    source.network_up("10.77.0.2/24")?;
    source.run_ok(back_ends.reach)?;
    let written = source.run_ok(
        "dd if=/dev/urandom of=/dev/vdb bs=64k count=128 seek=512 oflag=direct conv=notrunc 2>/dev/null; \
         dd if=/dev/vdb bs=64k count=128 skip=512 iflag=direct 2>/dev/null | sha256sum",
    )?;
    source.run_ok(
        "(while [ ! -e /run/stop ]; do fio --name=verify --filename=/dev/vdb --direct=1 --ioengine=libaio \
         --iodepth=8 --rw=randwrite --bsrange=4k-64k --size=4M --verify=crc32c --verify_fatal=1 --do_verify=1 \
         || { touch /run/fio.failed; break; }; echo x >>/run/rounds; done >/run/fio.log 2>&1; touch /run/fio.ended) \
         </dev/null >/dev/null 2>&1 & \
         (while [ ! -e /run/stop ]; do timeout -k 1 20 iperf3 --client 10.77.0.1 --time 2 --bitrate 20M >/run/iperf.log 2>&1 \
         && echo x >>/run/sent || { cat /run/iperf.log >>/run/iperf.failed; sleep 1; }; done) </dev/null >/dev/null 2>&1 & \
         while [ ! -e /run/rounds ]; do sleep 0.2; done",
    )?;
    let mut target = guest(vmm, packed, &to).await_migration(site, "unix:move.sock")?;
    let mut qmp = Qmp::connect(&site.scratch.join("from.qmp"), site.limit(MOVE_LIMIT))?;
    let told = qmp.migrate("move.sock", site.limit(MOVE_LIMIT))?;
    let number = |name: &str| told.pointer(name).and_then(Value::as_u64).unwrap_or(0);
    println!(
        "the guest moved in {} ms, of which it stood still for {} ms; {} MiB were sent, in {} rounds",
        number("/total-time"),
        number("/downtime"),
        number("/ram/transferred") >> 20,
        number("/ram/dirty-sync-count"),
    );
    drop(source);
    from.0.stop(site)?;
    from.1.stop(site)?;
    // What it was about goes on, and comes to an end without a fault: with what was written before the move, and after it.
    target.run_ok_within(
        "for what in rounds sent; do before=$(wc -l </run/$what); left=600; \
         while [ $(wc -l </run/$what) -lt $((before + 2)) ]; do [ ! -e /run/fio.ended ] || break; sleep 0.2; left=$((left - 1)); \
         [ $left -gt 0 ] || { echo no more $what; ps; ping -c 3 10.77.0.1; tail -n 20 /run/fio.log /run/iperf.log /run/iperf.failed; exit 1; }; \
         done; done; \
         touch /run/stop; while [ ! -e /run/fio.ended ]; do sleep 0.2; done; \
         if [ -e /run/fio.failed ]; then cat /run/fio.log; exit 1; fi",
        ROUND_LIMIT.saturating_mul(4),
    )?;
    target.run_ok_within(back_ends.reach, ROUND_LIMIT)?;
    let failed = target.run_ok("cat /run/iperf.failed 2>/dev/null || true")?;
    if !failed.is_empty() {
        println!("iperf3 ended without success and was started again: {failed}");
    }
    let read = target.run_ok(
        "echo 3 >/proc/sys/vm/drop_caches; \
         dd if=/dev/vdb bs=64k count=128 skip=512 iflag=direct 2>/dev/null | sha256sum",
    )?;
    ensure!(
        read == written,
        "before the move {written} was written, after it {read} is read"
    );
    let errors = target.run_ok("dmesg | grep -iE 'I/O error|virtio.*(broken|error)' || true")?;
    ensure!(errors.is_empty(), "the guest's kernel says: {errors}");
    let seen = target.run_ok("sync; sha256sum </dev/vdb")?;
    let status = target.shut_down()?;
    ensure!(status.success(), "QEMU ended with {status}");
    to.0.stop(site)?;
    to.1.stop(site)?;
    arrived(&disk, &seen)
}

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
    BackEnd, Blk, Guest, GuestBuilder, Kind, Net, Qmp, Vmm, bridge, disk_file, iperf3_server,
};
use crate::site::Site;

pub(super) const TESTS: &[Test] = &[
    Test {
        name: "migration::qemu_moves_a_guest_with_packed_queues",
        seconds: 240,
        run: |site| move_guest(site, Vmm::Qemu11, true, ours),
    },
    Test {
        name: "migration::qemu_10_moves_a_guest_with_disk_and_card",
        seconds: 240,
        run: |site| move_guest(site, Vmm::Qemu10, false, ours),
    },
    Test {
        name: "migration::qemu_moves_a_guest_with_a_disk_of_qemu_storage_daemon",
        seconds: 240,
        run: |site| move_guest(site, Vmm::Qemu11, false, of_storage_daemon),
    },
];

/// How long a guest may take to move, on plain hardware.
const MOVE_LIMIT: Duration = Duration::from_secs(30);
/// How long a round of fio may take.
const ROUND_LIMIT: Duration = Duration::from_secs(30);

/// A disk's back-end, of one side.
type StartDisk = fn(&Site, &Path, &str) -> Result<BackEnd>;

fn ours(site: &Site, disk: &Path, _side: &str) -> Result<BackEnd> {
    Blk::on(disk).arg("--lock=running").start(site)
}

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

/// A card whose TAP is a port of the bridge.
fn card(site: &Site, tap: &str) -> Result<BackEnd> {
    let net = Net::tap(tap).start(site)?;
    command::run_line(&format!("ip link set {tap} master br0"))?;
    Ok(net)
}

fn guest<'a>(vmm: Vmm, packed: bool, (disk, card): &'a (BackEnd, BackEnd)) -> GuestBuilder<'a> {
    let guest = Guest::on(vmm).memory("384M");
    let guest = if packed { guest.packed() } else { guest };
    guest.device(disk).device(card)
}

/// A guest writes to its disk, reads all of it back, and sends over its card; meanwhile it moves. Back-ends are two of each: the
/// disks' share a file, the cards' a bridge.
fn move_guest(site: &Site, vmm: Vmm, packed: bool, start_disk: StartDisk) -> Result<()> {
    let disk = disk_file(site, "disk.img", 16 << 20)?;
    bridge()?;
    let _server = iperf3_server(site, None)?;
    let from = (start_disk(site, &disk, "from")?, card(site, "tap0")?);
    let to = (start_disk(site, &disk, "to")?, card(site, "tap1")?);
    let mut source = guest(vmm, packed, &from)
        .arg("-qmp")
        .arg("unix:from.qmp,server=on,wait=off")
        .boot(site)?;
    source.network_up("10.77.0.2/24")?;
    source.run_ok("ping -c 3 -i 0.2 -W 5 10.77.0.1")?;
    let written = source.run_ok(
        "dd if=/dev/urandom of=/dev/vdb bs=64k count=64 seek=128 oflag=direct conv=notrunc 2>/dev/null; \
         dd if=/dev/vdb bs=64k count=64 skip=128 iflag=direct 2>/dev/null | sha256sum",
    )?;
    source.run_ok(
        "(while [ ! -e /run/stop ]; do fio --name=verify --filename=/dev/vdb --direct=1 --ioengine=libaio \
         --iodepth=8 --rw=randwrite --bsrange=4k-64k --size=1M --verify=crc32c --verify_fatal=1 --do_verify=1 \
         || { touch /run/fio.failed; break; }; echo x >>/run/rounds; done >/run/fio.log 2>&1; touch /run/fio.ended) \
         </dev/null >/dev/null 2>&1 & \
         (while [ ! -e /run/stop ]; do timeout -k 1 120 iperf3 --client 10.77.0.1 --time 2 --bitrate 20M >/run/iperf.log 2>&1 \
         && echo x >>/run/sent || { echo status $?; cat /run/iperf.log; sleep 1; } >>/run/iperf.failed; done) </dev/null >/dev/null 2>&1 & \
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
    target.run_ok("ping -c 3 -i 0.2 -W 5 10.77.0.1")?;
    let failed = target.run_ok("cat /run/iperf.failed 2>/dev/null || true")?;
    ensure!(
        failed.is_empty(),
        "a connection of iperf3 ended, or stood still for two minutes: {failed}"
    );
    let read = target.run_ok(
        "echo 3 >/proc/sys/vm/drop_caches; \
         dd if=/dev/vdb bs=64k count=64 skip=128 iflag=direct 2>/dev/null | sha256sum",
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

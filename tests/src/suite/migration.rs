//! Guests that move from one VMM to another while they work.

use std::fs;
use std::path::Path;
use std::time::Duration;

use serde_json::Value;

use super::Test;
use super::blk::arrived;
use super::others::{passt, storage_daemon};
use crate::command;
use crate::ensure;
use crate::error::{Doing, Result};
use crate::harness::{
    BackEnd, Blk, Daemon, Guest, GuestBuilder, Net, Qmp, Vmm, bridge, disk_file, iperf3_server,
    listens,
};
use crate::site::Site;

pub(super) const TESTS: &[Test] = &[
    Test {
        name: "migration::qemu_10_moves_a_guest_with_disk_and_card",
        seconds: 240,
        run: |site| {
            let _server = network(site)?;
            let moved = move_guest(site, Vmm::Qemu10, false, ours)?;
            println!("downtime: {} ms", moved.downtime);
            moved.unbroken()
        },
    },
    Test {
        name: "migration::qemu_moves_guests_with_back_ends_of_ours_and_of_others",
        seconds: 480,
        run: of_ours_and_of_others,
    },
];

/// How long a guest may take to move, on plain hardware.
const MOVE_LIMIT: Duration = Duration::from_secs(30);
/// How long passt may take to listen for its helper.
const LISTEN_LIMIT: Duration = Duration::from_secs(5);
/// How long a round of fio may take.
const ROUND_LIMIT: Duration = Duration::from_secs(30);

/// Host and guest.
const HOST: &str = "10.77.0.1";
const GUEST: &str = "10.77.0.2";

/// What serves the guest on one side.
struct Side {
    disk: BackEnd,
    card: BackEnd,
    /// What the back-ends need beside them.
    helper: Option<Daemon>,
}

impl Side {
    fn guest(&self, vmm: Vmm, packed: bool) -> GuestBuilder<'_> {
        let guest = Guest::on(vmm).memory("384M");
        let guest = if packed { guest.packed() } else { guest };
        // Ours can, and is the one without a helper.
        let guest = match (vmm, &self.helper) {
            (Vmm::Qemu11, None) => guest.moves_in_flight(),
            _ => guest,
        };
        guest.device(&self.disk).device(&self.card)
    }

    /// What the back-ends need beside them is there.
    fn has_help(&mut self) -> Result<()> {
        let ended = match &mut self.helper {
            Some(helper) => helper.ended()?,
            None => None,
        };
        ensure!(ended.is_none(), "passt's helper has ended: {ended:?}");
        Ok(())
    }

    fn stop(self, site: &Site) -> Result<()> {
        self.disk.stop(site)?;
        self.card.stop(site)?;
        match self.helper {
            Some(mut helper) => helper.stop(site).map(drop),
            None => Ok(()),
        }
    }
}

/// Starts the back-ends of a side, by the file of the disk and the side's name.
type StartSide = fn(&Site, &Path, &str) -> Result<Side>;

/// Ours: a TAP is a port of the bridge.
fn ours(site: &Site, disk: &Path, side: &str) -> Result<Side> {
    let tap = format!("tap-{side}");
    let card = Net::tap(&tap).start(site)?;
    command::run_line(&format!("ip link set {tap} master br0"))?;
    Ok(Side {
        disk: Blk::on(disk).arg("--lock=running").start(site)?,
        card,
        helper: None,
    })
}

/// qemu-storage-daemon and passt, with the helper by which it moves connections.
fn of_others(site: &Site, disk: &Path, side: &str) -> Result<Side> {
    let disk = storage_daemon(site, disk, &format!("storage-{side}.sock"))?;
    // Whom passt lets ping by its sockets.
    let groups = "/proc/sys/net/ipv4/ping_group_range";
    fs::write(groups, "0 0").doing(|| format!("write {groups}"))?;
    let socket = format!("passt-{side}.sock");
    let mut card = passt(site, &socket, [GUEST, HOST])?;
    // The helper does not wait for it.
    let repair = format!("{socket}.repair");
    let address = format!("unix:{repair}");
    card.daemon()
        .wait_until("its helper's socket", site.limit(LISTEN_LIMIT), || {
            listens(&address).unwrap_or(false)
        })?;
    let mut helper = site.root_program("usr/bin/passt-repair");
    helper.arg(repair);
    Ok(Side {
        disk,
        card,
        helper: Some(Daemon::start(site, "passt-repair", helper)?),
    })
}

/// How a guest has moved.
struct Moved {
    /// How long it stood still, in milliseconds.
    downtime: u64,
    /// What is to be said of connections that ended.
    failed: String,
}

impl Moved {
    /// No connection of iperf3 ended, or stood still for two minutes.
    fn unbroken(&self) -> Result<()> {
        ensure!(
            self.failed.is_empty(),
            "a connection of iperf3 ended, or stood still for two minutes: {}",
            self.failed
        );
        Ok(())
    }
}

/// The host's side of the cards' networks, with a server of iperf3.
fn network(site: &Site) -> Result<Daemon> {
    bridge()?;
    iperf3_server(site, None)
}

/// One guest moves with packed queues, of our back-ends, then one with others'.
fn of_ours_and_of_others(site: &Site) -> Result<()> {
    let _server = network(site)?;
    let ours = move_guest(site, Vmm::Qemu11, true, ours)?;
    ours.unbroken()?;
    let others = move_guest(site, Vmm::Qemu11, false, of_others)?;
    println!(
        "downtime with ringside-blk and ringside-net, packed queues: {} ms; with qemu-storage-daemon and passt, split: {} ms",
        ours.downtime, others.downtime
    );
    // Whether passt keeps a connection is its own affair.
    if !others.failed.is_empty() {
        println!("with passt a connection ended: {}", others.failed);
    }
    Ok(())
}

/// A guest writes to its disk, reads all of it back, and sends over its card; meanwhile it moves. Back-ends are two of each: the
/// disks' share a file, the cards' a network.
fn move_guest(site: &Site, vmm: Vmm, packed: bool, start: StartSide) -> Result<Moved> {
    let disk = disk_file(site, "disk.img", 16 << 20)?;
    let mut from = start(site, &disk, "from")?;
    let mut to = start(site, &disk, "to")?;
    let mut source = from
        .guest(vmm, packed)
        .arg("-qmp")
        .arg("unix:from.qmp,server=on,wait=off")
        .boot(site)?;
    source.network_up(&format!("{GUEST}/24"))?;
    let ping = format!("ping -c 3 -i 0.2 -W 5 {HOST}");
    source.run_ok(&ping)?;
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
    let mut target = to
        .guest(vmm, packed)
        .await_migration(site, "unix:move.sock")?;
    let mut qmp = Qmp::connect(&site.scratch.join("from.qmp"), site.limit(MOVE_LIMIT))?;
    for side in [&mut from, &mut to] {
        side.has_help()?;
    }
    let told = qmp.migrate("move.sock", site.limit(MOVE_LIMIT))?;
    let number = |name: &str| told.pointer(name).and_then(Value::as_u64).unwrap_or(0);
    let downtime = number("/downtime");
    ensure!(downtime > 0, "QEMU tells no downtime: {told}");
    println!(
        "the guest moved in {} ms, of which it stood still for {} ms; {} MiB were sent, in {} rounds",
        number("/total-time"),
        downtime,
        number("/ram/transferred") >> 20,
        number("/ram/dirty-sync-count"),
    );
    drop(source);
    from.stop(site)?;
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
    target.run_ok(&ping)?;
    let failed = target.run_ok("cat /run/iperf.failed 2>/dev/null || true")?;
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
    to.stop(site)?;
    arrived(&disk, &seen)?;
    Ok(Moved { downtime, failed })
}

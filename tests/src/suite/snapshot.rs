//! Guests of ringside-vmm that go on elsewhere.

use std::fs;
use std::path::Path;
use std::time::Duration;

use serde_json::Value;

use super::Test;
use crate::command;
use crate::ensure;
use crate::error::{Doing, Result};
use crate::harness::{BackEnd, Blk, Control, Guest, GuestBuilder, Net, Vmm, disk_file};
use crate::site::Site;

pub(super) const TESTS: &[Test] = &[
    Test {
        name: "snapshot::a_guest_goes_on_from_a_file",
        seconds: 180,
        run: a_guest_goes_on_from_a_file,
    },
    Test {
        name: "snapshot::a_guest_moves_while_it_runs",
        seconds: 180,
        run: a_guest_moves_while_it_runs,
    },
];

/// What a guest does until it is told to stop: it writes to its disk, and reads all of it back.
const LOAD: &str = "(while [ ! -e /run/stop ]; do fio --name=verify --filename=/dev/vdb --direct=1 --ioengine=libaio \
     --iodepth=8 --rw=randwrite --bsrange=4k-64k --size=4M --verify=crc32c --verify_fatal=1 --do_verify=1 \
     || { touch /run/fio.failed; break; }; echo x >>/run/rounds; done >/run/fio.log 2>&1; touch /run/fio.ended) \
     </dev/null >/dev/null 2>&1 & \
     while [ ! -e /run/rounds ]; do sleep 0.2; done";
/// Has it do so twice more, and come to an end.
const FINISH: &str = "before=$(wc -l </run/rounds); \
     while [ $(wc -l </run/rounds) -lt $((before + 2)) ]; do [ ! -e /run/fio.ended ] || break; sleep 0.2; done; \
     touch /run/stop; while [ ! -e /run/fio.ended ]; do sleep 0.2; done; \
     if [ -e /run/fio.failed ]; then cat /run/fio.log; exit 1; fi";
/// What tells this boot of the guest from another.
const BOOT: &str = "cat /proc/sys/kernel/random/boot_id";
/// How long its load may take to end.
const FINISH_LIMIT: Duration = Duration::from_secs(60);

/// A bridge with an address of its own, which stays when its ports come and go: the guest has it in its neighbour table.
fn bridge() -> Result<()> {
    for line in [
        "ip link add br0 address 52:54:00:77:00:01 type bridge",
        "ip address add 10.77.0.1/24 dev br0",
        "ip link set br0 up",
    ] {
        command::run_line(line)?;
    }
    Ok(())
}

/// A card whose TAP is a port of the bridge. The guest keeps the address that it has found.
fn card(site: &Site, tap: &str) -> Result<BackEnd> {
    let net = Net::tap(tap).arg("--mac=52:54:00:77:00:02").start(site)?;
    command::run_line(&format!("ip link set {tap} master br0"))?;
    Ok(net)
}

fn guest<'a>(disk: &'a BackEnd, card: &'a BackEnd, control: &Control) -> GuestBuilder<'a> {
    Guest::on(Vmm::Ringside)
        .cpus(2)
        .memory("384M")
        .device(disk)
        .device(card)
        .arg("--api-socket")
        .arg(&control.socket().display().to_string())
}

/// A snapshot of a guest whose disk is busy, which goes on; another one with which it ends; and the guest of that one, with other
/// back-ends, goes on where it was.
fn a_guest_goes_on_from_a_file(site: &Site) -> Result<()> {
    let disk = disk_file(site, "disk.img", 64 << 20)?;
    bridge()?;
    let folder = site.scratch.join("snapshots");
    fs::create_dir(&folder).doing(|| format!("create {}", folder.display()))?;

    let (blk, net) = (Blk::on(&disk).start(site)?, card(site, "tap0")?);
    let control = Control::new(site, "before.sock");
    let mut before = guest(&blk, &net, &control)
        .arg("--snapshots")
        .arg(&folder.display().to_string())
        .boot(site)?;
    let boot = load(&mut before)?;
    for words in [
        &["snapshot", "first"][..],
        &["snapshot", "second", "--stop"],
    ] {
        let told = control.ask_json(words)?;
        println!("{}: {told}", words.join(" "));
        if words.len() == 2 {
            before.run_ok("before=$(wc -l </run/rounds); until [ $(wc -l </run/rounds) -gt $before ]; do sleep 0.2; done; [ ! -e /run/fio.failed ]")?;
        }
    }
    let status = before.ended()?;
    ensure!(status.success(), "the VMM ended with {status}");
    blk.stop(site)?;
    net.stop(site)?;

    let (blk, net) = (Blk::on(&disk).start(site)?, card(site, "tap1")?);
    let control = Control::new(site, "after.sock");
    let mut after = guest(&blk, &net, &control).restore(site, &folder.join("second"))?;
    same_guest(&mut after, &boot)?;
    let status = after.shut_down()?;
    ensure!(status.success(), "the VMM ended with {status}");
    blk.stop(site)?;
    net.stop(site)?;
    on_disk(&disk)
}

/// Two VMMs, with back-ends of their own: the disks' share a file, the cards' a bridge. One that does not fit is refused, and
/// the guest stays; then it moves while its disk is busy.
fn a_guest_moves_while_it_runs(site: &Site) -> Result<()> {
    let disk = disk_file(site, "disk.img", 64 << 20)?;
    bridge()?;
    let start = || Blk::on(&disk).arg("--lock=running").start(site);
    let (blk, net) = (start()?, card(site, "tap0")?);
    let (blk_there, net_there) = (start()?, card(site, "tap1")?);
    let control = Control::new(site, "source.sock");
    let mut source = guest(&blk, &net, &control)
        .arg("--migrate-to=unix:move.sock")
        .boot(site)?;
    let boot = load(&mut source)?;

    let there = Control::new(site, "target.sock");
    let unlike = guest(&blk_there, &net_there, &there)
        .memory("256M")
        .await_migration(site, "move.sock")?;
    let refused = control.ask(&["migrate", "unix:move.sock"]);
    ensure!(
        refused.is_err(),
        "a machine with less memory took the guest"
    );
    let status = unlike.ended()?;
    ensure!(status.code() == Some(1), "the VMM ended with {status}");
    source.run_ok(&format!("[ ! -e /run/fio.failed ] && {BOOT}"))?;

    let mut target = guest(&blk_there, &net_there, &there).await_migration(site, "move.sock")?;
    let told = control.ask_json(&["migrate", "unix:move.sock"])?;
    let number = |name: &str| told.get(name).and_then(Value::as_u64).unwrap_or(0);
    println!(
        "the guest moved in {} ms, of which it stood still for {} ms; {} MiB were sent, in {} rounds",
        number("milliseconds"),
        number("downtime-milliseconds"),
        number("memory") >> 20,
        number("rounds"),
    );
    let status = source.ended()?;
    ensure!(status.success(), "the VMM ended with {status}");
    blk.stop(site)?;
    net.stop(site)?;
    same_guest(&mut target, &boot)?;
    let status = target.shut_down()?;
    ensure!(status.success(), "the VMM ended with {status}");
    blk_there.stop(site)?;
    net_there.stop(site)?;
    on_disk(&disk)
}

/// Starts what a guest is about, and gives what tells its boot.
fn load(guest: &mut Guest) -> Result<String> {
    guest.network_up("10.77.0.2/24")?;
    guest.run_ok("ping -c 3 -i 0.2 -W 5 10.77.0.1")?;
    let boot = guest.run_ok(BOOT)?;
    guest.run_ok(
        "echo marker >/run/marker; echo marker | dd of=/dev/vdb bs=512 seek=100000 conv=sync 2>/dev/null; sync",
    )?;
    guest.run_ok(LOAD)?;
    Ok(boot)
}

/// It is the guest of that boot; what it was about comes to an end without a fault; it reaches the network.
fn same_guest(guest: &mut Guest, boot: &str) -> Result<()> {
    let now = guest.run_ok(BOOT)?;
    ensure!(now == boot, "boot {boot} has become boot {now}");
    let marker = guest.run_ok("cat /run/marker")?;
    ensure!(marker.trim() == "marker", "in memory is {marker}");
    guest.run_ok("ping -c 3 -i 0.2 -W 5 10.77.0.1")?;
    guest.run_ok_within(FINISH, FINISH_LIMIT)?;
    guest.run_ok(
        "dd if=/dev/vdb bs=512 skip=100000 count=1 iflag=direct 2>/dev/null | grep marker",
    )?;
    let errors =
        guest.run_ok("dmesg | grep -iE 'I/O error|virtio.*(broken|error)|lockup|stall' || true")?;
    ensure!(errors.is_empty(), "the guest's kernel says: {errors}");
    Ok(())
}

fn on_disk(disk: &Path) -> Result<()> {
    let bytes = fs::read(disk).doing(|| format!("read {}", disk.display()))?;
    let at = 100_000 * 512;
    ensure!(
        bytes.get(at..at + 6) == Some(b"marker"),
        "the marker is not on the disk"
    );
    Ok(())
}

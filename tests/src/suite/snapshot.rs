//! Guests of ringside-vmm that go on elsewhere.

use std::fs;
use std::io::{self, Read};
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::thread;
use std::time::Duration;

use serde_json::Value;

use super::Test;
use crate::command;
use crate::ensure;
use crate::error::{Doing, Result};
use crate::harness::{
    BackEnd, Blk, Control, Guest, GuestBuilder, Igb, Net, Vmm, bridge, disk_file, packets,
};
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
    Test {
        name: "snapshot::a_guest_moves_with_its_function",
        seconds: 180,
        run: a_guest_moves_with_its_function,
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

/// What a guest gives its card as an address; the cards come with another one.
const OWN_MAC: &str = "52:54:00:77:00:09";

/// A card whose TAP is a port of the bridge.
fn card(site: &Site, tap: &str) -> Result<BackEnd> {
    let net = Net::tap(tap)
        .arg("--mac=52:54:00:77:00:02")
        .arg(&format!("--control-socket={tap}.ctl"))
        .start(site)?;
    command::run_line(&format!("ip link set {tap} master br0"))?;
    Ok(net)
}

/// A card has the address that the guest has given it by the control queue.
fn keeps_its_address(site: &Site, tap: &str) -> Result<()> {
    let status = Control::new(site, &format!("{tap}.ctl")).ask_json(&["status"])?;
    let address = status.pointer("/interface/mac").and_then(Value::as_str);
    ensure!(
        address == Some(OWN_MAC),
        "the guest gave its card the address {OWN_MAC}, and that of {tap} is {status}"
    );
    Ok(())
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
    before.run_ok(&format!("ip link set eth0 address {OWN_MAC}"))?;
    let boot = load(&mut before)?;
    for words in [
        &["snapshot", "first"][..],
        &["snapshot", "second", "--stop"],
    ] {
        let told = control.ask_json(words)?;
        println!("{}: {told}", words.join(" "));
        if words.len() == 2 {
            before.run_ok("before=$(wc -l </run/rounds); until [ $(wc -l </run/rounds) -gt $before ]; do sleep 0.2; done; [ ! -e /run/fio.failed ]")?;
            keeps_its_address(site, "tap0")?;
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
    keeps_its_address(site, "tap1")?;
    let status = after.shut_down()?;
    ensure!(status.success(), "the VMM ended with {status}");
    blk.stop(site)?;
    net.stop(site)?;
    on_disk(&disk)
}

/// Where a guest comes to, and where one that does not get there is sent.
const TARGET: &str = "tcp:127.0.0.1:7000";
const CUT_SHORT: &str = "tcp:127.0.0.1:7001";

/// Two VMMs, with back-ends of their own: the disks' share a file, the cards' a bridge. A machine that does not fit is refused, and a
/// connection breaks: the guest stays. Then it moves over TCP while its disk is busy.
fn a_guest_moves_while_it_runs(site: &Site) -> Result<()> {
    let disk = disk_file(site, "disk.img", 64 << 20)?;
    bridge()?;
    command::run_line("ip link set lo up")?;
    let start = || Blk::on(&disk).arg("--lock=running").start(site);
    let (blk, net) = (start()?, card(site, "tap0")?);
    let (blk_there, net_there) = (start()?, card(site, "tap1")?);
    let control = Control::new(site, "source.sock");
    let mut source = guest(&blk, &net, &control)
        .arg("--migrate-to=unix:move.sock")
        .arg(&format!("--migrate-to={TARGET}"))
        .arg(&format!("--migrate-to={CUT_SHORT}"))
        .boot(site)?;
    source.run_ok(&format!("ip link set eth0 address {OWN_MAC}"))?;
    let boot = load(&mut source)?;

    let there = Control::new(site, "target.sock");
    let mut stays = |address: &str, target: Guest, says: &str| -> Result<()> {
        let refused = control.ask(&["migrate", address]);
        ensure!(refused.is_err(), "the guest is gone by {address}");
        let log = target.log_of_end(1)?;
        ensure!(log.contains(says), "it does not say `{says}`:\n{log}");
        source.run_ok(&format!("[ ! -e /run/fio.failed ] && {BOOT}"))?;
        Ok(())
    };
    let target = guest(&blk_there, &net_there, &there).memory("256M");
    let target = target.await_migration(site, "unix:move.sock")?;
    stays("unix:move.sock", target, "256 MiB of memory")?;
    let target = guest(&blk_there, &net_there, &there).await_migration(site, TARGET)?;
    let cut = cut_short()?;
    stays(CUT_SHORT, target, "the VMM that has the guest keeps it")?;
    ensure!(matches!(cut.join(), Ok(Ok(()))), "too little was sent");

    let mut target = guest(&blk_there, &net_there, &there).await_migration(site, TARGET)?;
    let told = control.ask_json(&["migrate", TARGET])?;
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
    keeps_its_address(site, "tap1")?;
    let status = target.shut_down()?;
    ensure!(status.success(), "the VMM ended with {status}");
    blk_there.stop(site)?;
    net_there.stop(site)?;
    on_disk(&disk)
}

/// A guest whose traffic goes over a function of the host moves, and has another function at the other end: a card of ours with the
/// same address stands in for them meanwhile. Before, a move fails, and the guest has its function again.
fn a_guest_moves_with_its_function(site: &Site) -> Result<()> {
    const MAC: &str = "52:54:00:00:00:a6";
    let igb = Igb::take(site)?;
    let functions = igb.create::<2>(&[])?;
    for number in [0, 1] {
        igb.set(number, &["--mac", MAC])?;
    }
    let [here, there] = functions.addresses();
    // All ways end at one bridge, which has the physical function's address.
    let physical = igb.interface();
    let address = command::run_line(&format!("cat /sys/class/net/{physical}/address"))?;
    for line in [
        format!("ip link add br0 address {} type bridge", address.trim()),
        format!("ip link set {physical} master br0"),
        format!("ip link set {physical} up"),
        "ip address add 10.77.0.1/24 dev br0".to_owned(),
        "ip link set br0 up".to_owned(),
    ] {
        command::run_line(&line)?;
    }
    let card = |tap: &str| -> Result<BackEnd> {
        let net = Net::tap(tap).arg(&format!("--mac={MAC}")).arg("--standby");
        let net = net.start(site)?;
        command::run_line(&format!("ip link set {tap} master br0"))?;
        Ok(net)
    };
    let (net, net_there) = (card("tap0")?, card("tap1")?);
    let control = Control::new(site, "source.sock");
    let mut source = with_function(&net, &control, here)
        .arg("--migrate-to=unix:nowhere.sock")
        .arg("--migrate-to=unix:move.sock")
        .boot(site)?;
    let master =
        source.run_ok("for master in /sys/class/net/*/master; do readlink $master; done")?;
    let master = master
        .lines()
        .next()
        .and_then(|path| path.rsplit('/').next());
    let master = master.unwrap_or_default();
    source.run_ok(&format!(
        "ip address add 10.77.0.2/24 dev {master} && ip link set {master} up; {HAS_FUNCTION}; \
         until ping -c 1 -W 1 10.77.0.1 >/dev/null; do sleep 0.2; done; \
         ping -i 0.2 10.77.0.1 </dev/null >/run/ping.log 2>&1 & echo $! >/run/ping.pid"
    ))?;
    let by_function = |guest: &mut Guest, tap: &str| -> Result<()> {
        guest.run_ok(HAS_FUNCTION)?;
        let before = (packets(tap)?.received, packets(physical)?.received);
        guest.run_ok("sleep 2")?;
        let after = (packets(tap)?.received, packets(physical)?.received);
        let shares = (after.0 - before.0, after.1 - before.1);
        println!(
            "in two seconds {} packets by {tap}, {} by the function",
            shares.0, shares.1
        );
        ensure!(
            shares.1 >= 5 && shares.0 < shares.1,
            "with a function, {} packets came by {tap} and {} by the function",
            shares.0,
            shares.1
        );
        Ok(())
    };
    by_function(&mut source, "tap0")?;

    // Somebody who takes a part of it and goes.
    let nowhere = site.scratch.join("nowhere.sock");
    let listener = UnixListener::bind(&nowhere).doing(|| "wait for a guest".into())?;
    let taker = thread::spawn(move || {
        let (mut connection, _) = listener.accept()?;
        connection.read_exact(&mut vec![0; 1 << 20])
    });
    let failed = control.ask(&["migrate", "unix:nowhere.sock"]);
    ensure!(failed.is_err(), "the guest moved to nowhere");
    ensure!(
        matches!(taker.join(), Ok(Ok(()))),
        "nothing of the guest came"
    );
    by_function(&mut source, "tap0")?;

    let there_control = Control::new(site, "target.sock");
    let mut target =
        with_function(&net_there, &there_control, there).await_migration(site, "unix:move.sock")?;
    let told = control.ask_json(&["migrate", "unix:move.sock"])?;
    println!("{told}");
    let status = source.ended()?;
    ensure!(status.success(), "the VMM ended with {status}");
    net.stop(site)?;
    by_function(&mut target, "tap1")?;
    let pings =
        target.run_ok("kill -INT $(cat /run/ping.pid); sleep 0.5; tail -n 3 /run/ping.log")?;
    println!("{}", pings.trim());
    // It takes the guest some five seconds to let go of a function: had nothing gone over the card, many more were missing.
    let words: Vec<_> = pings.split_whitespace().collect();
    let lost = words.windows(2).find_map(|pair| match pair {
        [percent, "packet"] => percent.strip_suffix('%')?.parse::<u32>().ok(),
        _ => None,
    });
    ensure!(
        lost.is_some_and(|percent| percent <= 10),
        "too many packets were lost:\n{pings}"
    );
    let list = there_control.ask_json(&["device-list"])?;
    ensure!(
        list.to_string().contains(there.as_str()),
        "the devices are {list}"
    );
    let status = target.shut_down()?;
    ensure!(status.success(), "the VMM ended with {status}");
    net_there.stop(site)?;
    functions.destroy()
}

/// Waits until the guest has its function, joined to the card that stands in for it, and its link is up.
const HAS_FUNCTION: &str = "tries=0; \
     until [ -n \"$(ls -d /sys/bus/pci/drivers/igbvf/*/net/*/master 2>/dev/null)\" ] && \
     grep -q 1 /sys/bus/pci/drivers/igbvf/*/net/*/carrier; do \
     tries=$((tries + 1)); [ $tries -lt 150 ] || exit 1; sleep 0.1; done";

fn with_function<'a>(card: &'a BackEnd, control: &Control, function: &str) -> GuestBuilder<'a> {
    Guest::on(Vmm::Ringside)
        .cpus(2)
        .memory("256M")
        .diskless()
        .device(card)
        .vfio(&format!("{function},id=nic,standby={}", card.socket()))
        .arg("--api-socket")
        .arg(&control.socket().display().to_string())
}

/// Lets a part of a guest pass to the target, and breaks both connections.
fn cut_short() -> Result<thread::JoinHandle<io::Result<()>>> {
    const PASSES: u64 = 16 << 20;
    let address = |text: &str| text.trim_start_matches("tcp:").to_owned();
    let listener = TcpListener::bind(address(CUT_SHORT)).doing(|| "wait for a guest".into())?;
    Ok(thread::spawn(move || {
        let (source, _) = listener.accept()?;
        let mut target = TcpStream::connect(address(TARGET))?;
        let passed = io::copy(&mut source.take(PASSES), &mut target)?;
        if passed == PASSES {
            Ok(())
        } else {
            Err(io::ErrorKind::UnexpectedEof.into())
        }
    }))
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

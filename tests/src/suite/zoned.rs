//! Zoned disks: a host-managed device of the host, as it comes to a guest.

use std::path::Path;
use std::time::Duration;

use super::Test;
use crate::command;
use crate::ensure;
use crate::error::Result;
use crate::harness::{Blk, Guest, Vmm, with_null_blk};
use crate::site::Site;

pub(super) const TESTS: &[Test] = &[
    Test {
        name: "zoned::zones_are_the_hosts",
        seconds: 120,
        run: |site| {
            with_zones(site, |site, device| {
                guest_zones(site, Vmm::Ringside, device)
            })
        },
    },
    Test {
        name: "zoned::zones_are_the_hosts_under_qemu_11",
        seconds: 120,
        run: |site| with_zones(site, |site, device| guest_zones(site, Vmm::Qemu11, device)),
    },
    Test {
        name: "zoned::who_knows_no_zones_writes_at_the_pointer",
        seconds: 60,
        run: |site| with_zones(site, zones_unknown),
    },
];

/// For what takes no time.
const LIMIT: Duration = Duration::from_secs(60);
const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;

/// A null device in memory with 256 zones of 4 MiB, 3 of them usable. Two can be written anywhere; of the others four can be
/// open.
const ZONES: &str =
    "zoned=1 zone_size=4 zone_capacity=3 zone_nr_conv=2 zone_max_open=4 zone_max_active=6";
/// How many of the zones are used, from the first on.
const USED: usize = 20;

/// Runs a test on a zoned device of the host.
fn with_zones(site: &Site, test: fn(&Site, &Path) -> Result<()>) -> Result<()> {
    with_null_blk(site, ZONES, |device| test(site, device))
}

fn guest_zones(site: &Site, vmm: Vmm, device: &Path) -> Result<()> {
    let blk = Blk::on(device).queues(2).arg("--direct").start(site)?;
    let guest = Guest::on(vmm).cpus(2);
    let mut guest = match vmm {
        Vmm::Ringside => guest.device(&blk),
        // Its vhost-user-blk leaves out what it does not know; this one passes everything on.
        Vmm::Qemu10 | Vmm::Qemu11 => guest
            .arg("-chardev")
            .arg(&format!("socket,id=zoned,path={}", blk.socket()))
            .arg("-device")
            .arg("vhost-user-test-device-pci,virtio-id=2,num_vqs=2,vq_size=128,config_size=96,chardev=zoned"),
    }
    .boot(site)?;
    let limits = guest.run_ok(
        "cd /sys/block/vdb/queue && cat zoned chunk_sectors nr_zones max_open_zones max_active_zones \
         zone_write_granularity",
    )?;
    ensure!(
        limits
            .split_whitespace()
            .eq(["host-managed", "8192", "256", "4", "6", "4096"]),
        "the guest sees {limits}"
    );
    let append = guest.run_ok("cat /sys/block/vdb/queue/zone_append_max_bytes")?;
    ensure!(append.trim() != "0", "the guest cannot append");
    let all = guest.run_ok("blkzone report /dev/vdb | wc -l")?;
    ensure!(all.trim() == "256", "a report has {all} zones");
    // A conventional zone anywhere; others only from their start on.
    guest.run_ok(&write(MIB, 64 * KIB))?;
    guest.run_ok(&write(8 * MIB, 256 * KIB))?;
    guest.run_ok(&write(8 * MIB + 256 * KIB, 4 * KIB))?;
    let off = guest.run(&write(12 * MIB + 4 * KIB, 4 * KIB))?;
    ensure!(
        off.status != 0 && off.text.contains("Input/output error"),
        "a write off the write pointer ended with {}: {}",
        off.status,
        off.text
    );
    same_zones(&mut guest, device)?;
    // All that can be done to a zone, in turn: opened, closed, full, and empty again.
    for (action, zone) in [
        ("open -o 24576 -c 1", 3),
        ("close -o 16384 -c 1", 2),
        ("finish -o 40960 -c 1", 5),
        ("reset -o 16384 -c 1", 2),
    ] {
        guest.run_ok(&format!("blkzone {action} /dev/vdb"))?;
        same_zones(&mut guest, device)
            .inspect_err(|_| println!("after blkzone {action}, which is of zone {zone}"))?;
    }
    guest.run_ok(&write(8 * MIB, 4 * KIB))?;
    // More than can be open, without fio, which keeps count.
    let open = (6..12).map(|zone| format!("blkzone open -o {} -c 1 /dev/vdb", zone * 8192));
    let open: Vec<_> = open.collect();
    let refused = guest.run(&open.join(" && "))?;
    ensure!(
        refused.status != 0,
        "six zones more were opened, where four can be: {}",
        refused.text
    );
    guest.run_ok("blkzone reset /dev/vdb")?;
    same_zones(&mut guest, device)?;
    // Two jobs write zones in their order and read them back.
    guest.run_ok_within(
        "fio --name=zones --filename=/dev/vdb --direct=1 --ioengine=libaio --iodepth=4 --zonemode=zbd \
         --rw=write --bs=64k --offset=16M --size=24M --offset_increment=32M --numjobs=2 --max_open_zones=2 \
         --cpus_allowed=0-1 --cpus_allowed_policy=split --verify=crc32c --verify_fatal=1 --do_verify=1",
        Duration::from_secs(60),
    )?;
    same_zones(&mut guest, device)?;
    guest.shut_down()?;
    blk.stop(site)
}

fn write(at: u64, len: u64) -> String {
    format!(
        "dd if=/dev/urandom of=/dev/vdb bs=4k seek={} count={} oflag=direct conv=notrunc 2>&1",
        at / (4 * KIB),
        len / (4 * KIB)
    )
}

/// The guest's report says what the host's does, of the zones that the test uses: a report of all is much for a serial port.
fn same_zones(guest: &mut Guest, device: &Path) -> Result<()> {
    let report = format!("blkzone report -c {USED}");
    let host = command::run_line(&format!("{report} {}", device.display()))?;
    let seen = guest.run_ok(&format!("{report} /dev/vdb"))?;
    let lines = |text: &str| text.lines().map(comparable).collect::<Vec<_>>();
    let (host, seen) = (lines(&host), lines(&seen));
    let different = host.iter().zip(&seen).find(|(host, seen)| host != seen);
    ensure!(
        different.is_none() && [host.len(), seen.len()] == [USED; 2],
        "the host reports {} zones, the guest {}: {different:?}",
        host.len(),
        seen.len()
    );
    Ok(())
}

/// A line of a report, without the write pointer of a zone that is full, which means nothing.
fn comparable(line: &str) -> String {
    match (line.trim().split_once("wptr "), line.contains("zcond:14")) {
        (Some((before, after)), true) => {
            let rest = after.split_once(' ').map_or("", |(_, rest)| rest);
            format!("{before}{rest}")
        }
        _ => line.trim().to_owned(),
    }
}

/// A driver that does not know zones reads everywhere, and writes where a zone lets it.
fn zones_unknown(site: &Site, device: &Path) -> Result<()> {
    let blk = Blk::on(device).arg("--direct").start(site)?;
    let io = |command: &str| -> Result<bool> {
        let mut qemu_io = site.root_program("usr/bin/qemu-io");
        qemu_io.args(["-t", "none", "-c", command, "--image-opts"]);
        qemu_io.arg(format!(
            "driver=virtio-blk-vhost-user,path={},cache.direct=on",
            site.scratch.join(blk.socket()).display()
        ));
        let output = command::output_with_input(&mut qemu_io, b"", LIMIT)?;
        Ok(output.status.success() && !output.stdout.contains("failed"))
    };
    for (command, works) in [
        ("read 8M 64k", true),
        ("write 1M 64k", true),
        ("write 8M 64k", true),
        ("write 8M 64k", false),
        ("write 8260k 64k", false),
        ("write 8256k 64k", true),
        ("write 11M 64k", false),
    ] {
        ensure!(
            io(command)? == works,
            "{command} was expected to {}",
            if works { "work" } else { "fail" }
        );
    }
    blk.stop(site)
}

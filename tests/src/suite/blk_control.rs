//! Disks that are changed and watched over their control socket while a guest uses them.

use std::thread::sleep;
use std::time::{Duration, Instant};

use serde_json::Value;

use super::Test;
use crate::ensure;
use crate::error::{LabError, Result};
use crate::harness::{Blk, Control, Guest, Vmm, disk_file};
use crate::site::Site;

pub(super) const TESTS: &[Test] = &[
    Test {
        name: "blk::resized_under_ringside_vmm",
        seconds: 90,
        run: |site| resized(site, Vmm::Ringside),
    },
    Test {
        name: "blk::resized_under_qemu_11",
        seconds: 90,
        run: |site| resized(site, Vmm::Qemu11),
    },
    Test {
        name: "blk::controlled",
        seconds: 120,
        run: controlled,
    },
];

const MIB: u64 = 1 << 20;
/// For what fio does in the guest, on plain hardware.
const FIO_LIMIT: Duration = Duration::from_secs(40);

/// Serves `disk.img` of 64 MiB with a control socket, and these arguments.
fn serve<'a>(site: &'a Site, arguments: &[&str]) -> Result<(crate::harness::BackEnd, Control<'a>)> {
    let disk = disk_file(site, "disk.img", 64 * MIB)?;
    let control = Control::new(site, "blk.ctl");
    let mut blk = Blk::on(&disk).arg(&format!("--control-socket={}", control.socket().display()));
    for argument in arguments {
        blk = blk.arg(argument);
    }
    Ok((blk.start(site)?, control))
}

/// Runs fio on the guest's `/dev/vdb`, directly.
fn fio(guest: &mut Guest, options: &str) -> Result<String> {
    let command =
        format!("fio --name=x --filename=/dev/vdb --direct=1 --ioengine=libaio {options}");
    guest.run_ok_within(&command, FIO_LIMIT)
}

/// A disk that grows while its guest runs: the guest sees its new size, and the new part works.
fn resized(site: &Site, vmm: Vmm) -> Result<()> {
    let (blk, control) = serve(site, &[])?;
    let mut guest = Guest::on(vmm).device(&blk).boot(site)?;
    let before = guest.run_ok("lsblk -b -n -o SIZE /dev/vdb")?;
    ensure!(before.trim() == (64 * MIB).to_string(), "it has {before}");
    control.ask(&["resize", "96M"])?;
    // The driver asks for the new size some time after it was told.
    guest.run_ok(
        "(for i in $(seq 50); do [ $(cat /sys/block/vdb/size) = 196608 ] && exit 0; sleep 0.1; done; exit 1)",
    )?;
    let after = guest.run_ok("lsblk -b -n -o SIZE /dev/vdb")?;
    println!("size: {} before, {} after", before.trim(), after.trim());
    ensure!(after.trim() == (96 * MIB).to_string(), "it has {after}");
    fio(
        &mut guest,
        "--offset=64M --size=32M --io_size=4M --rw=randwrite --bs=16k --iodepth=8 \
         --verify=crc32c --do_verify=1 --verify_fatal=1",
    )?;
    let refused = control.ask(&["resize", "32M"]);
    ensure!(refused.is_err(), "it became smaller without --shrink");
    guest.shut_down()?;
    blk.stop(site)
}

/// A number in an answer, by its path.
fn number(value: &Value, path: &str) -> Result<u64> {
    value
        .pointer(path)
        .and_then(Value::as_u64)
        .ok_or_else(|| LabError::Protocol {
            from: "ringside-ctl",
            text: format!("no {path} in {value}"),
        })
}

/// 4 KiB random reads in each second, as fio in the guest counts them.
fn reads_per_second(guest: &mut Guest) -> Result<u64> {
    let text = fio(
        guest,
        "--rw=randread --bs=4k --iodepth=8 --time_based --runtime=4 --output-format=terse --terse-version=3",
    )?;
    // The eighth field of a line is what is asked for (fio(1), "TERSE OUTPUT").
    let rate = text
        .lines()
        .find_map(|line| line.strip_prefix("3;fio")?.split(';').nth(6)?.parse().ok());
    rate.ok_or(LabError::Protocol { from: "fio", text })
}

/// A disk that is limited, counted and drained over its control socket.
fn controlled(site: &Site) -> Result<()> {
    let (blk, control) = serve(site, &["--limit=iops=40,iops-burst=4"])?;
    let mut guest = Guest::on(Vmm::Ringside).device(&blk).boot(site)?;
    limits_change_at_run_time(&mut guest, &control)?;
    metrics_agree_with_fio(&mut guest, &control)?;
    drained_and_resumed_under_fio(site, &mut guest, &control)?;
    guest.shut_down()?;
    blk.stop(site)
}

/// A limit holds from the moment it is set, and is gone when it is taken away.
fn limits_change_at_run_time(guest: &mut Guest, control: &Control) -> Result<()> {
    let limited = reads_per_second(guest)?;
    control.ask(&["limits", "iops=20,iops-burst=2"])?;
    let halved = reads_per_second(guest)?;
    control.ask(&["limits", "iops=0"])?;
    let free = reads_per_second(guest)?;
    println!("reads per second: {limited} of 40, {halved} of 20, {free} without a limit");
    ensure!(
        (20..=44).contains(&limited),
        "{limited} reads per second with a limit of 40"
    );
    ensure!(
        (10..=22).contains(&halved),
        "{halved} reads per second with a limit of 20"
    );
    ensure!(
        free > 60,
        "{free} reads per second without a limit are hardly more than with it"
    );
    Ok(())
}

/// What the back-end has counted is what fio did.
fn metrics_agree_with_fio(guest: &mut Guest, control: &Control) -> Result<()> {
    // Each request of fio is one of the disk.
    guest.run_ok("echo 2 >/sys/block/vdb/queue/nomerges")?;
    let sample = || -> Result<(u64, u64, u64)> {
        let page = control.ask(&["metrics"])?;
        let of = |name: &str| -> Result<u64> {
            page.lines()
                .find_map(|line| line.strip_prefix(name)?.trim().parse().ok())
                .ok_or_else(|| LabError::Protocol {
                    from: "ringside-ctl metrics",
                    text: page.clone(),
                })
        };
        Ok((
            of("ringside_block_requests_total{queue=\"0\",operation=\"read\"}")?,
            of("ringside_block_requests_total{queue=\"0\",operation=\"write\"}")?,
            of("ringside_block_bytes_total{queue=\"0\",operation=\"write\"}")?,
        ))
    };
    let before = sample()?;
    let text = fio(
        guest,
        "--rw=randrw --bs=4k --iodepth=4 --size=64M --number_ios=600 --output-format=json",
    )?;
    let after = sample()?;
    let report: Option<Value> = text
        .find('{')
        .and_then(|start| serde_json::from_str(text.get(start..)?.trim_end()).ok());
    let report = report.ok_or(LabError::Protocol { from: "fio", text })?;
    let reads = number(&report, "/jobs/0/read/total_ios")?;
    let writes = number(&report, "/jobs/0/write/total_ios")?;
    let counted = (after.0 - before.0, after.1 - before.1, after.2 - before.2);
    println!(
        "fio: {reads} reads, {writes} writes; ringside-blk: {} and {}",
        counted.0, counted.1
    );
    ensure!(reads + writes >= 600, "fio did {reads} + {writes}");
    ensure!(
        counted.1 == writes && counted.2 == writes * 4096,
        "{} writes of {} bytes were counted",
        counted.1,
        counted.2
    );
    // Whoever opens a disk may read a little of it besides.
    ensure!(
        (reads..reads + 20).contains(&counted.0),
        "{} reads were counted",
        counted.0
    );
    Ok(())
}

/// A disk that is drained in the middle of a load stands still, and the load goes on unharmed when it is resumed.
fn drained_and_resumed_under_fio(site: &Site, guest: &mut Guest, control: &Control) -> Result<()> {
    guest.run_ok(
        "(fio --name=x --filename=/dev/vdb --direct=1 --ioengine=libaio --rw=randwrite --bs=4k --iodepth=16 --size=64M \
         --io_size=6M --verify=crc32c --do_verify=1 --verify_fatal=1 >/run/fio.log 2>&1; echo $? >/run/status) \
         </dev/null >/dev/null 2>&1 &",
    )?;
    let writes =
        || -> Result<u64> { number(&control.ask_json(&["stats"])?, "/queues/0/requests/write") };
    let (begin, limit) = (Instant::now(), site.limit(Duration::from_secs(10)));
    let before = writes()?;
    while writes()? < before + 100 {
        ensure!(begin.elapsed() < limit, "fio does not write");
        sleep(Duration::from_millis(50));
    }
    control.ask(&["drain", "--timeout", "8"])?;
    let drained = writes()?;
    let stats = control.ask_json(&["stats"])?;
    ensure!(
        number(&stats, "/queues/0/in-flight")? == 0,
        "requests are in flight in a drained disk: {stats}"
    );
    sleep(Duration::from_secs(1));
    let still = writes()?;
    ensure!(
        still == drained,
        "{} writes reached a drained disk",
        still - drained
    );
    control.ask(&["resume"])?;
    let status = guest.run_ok_within(
        "while [ ! -e /run/status ]; do sleep 0.2; done; cat /run/status /run/fio.log",
        FIO_LIMIT,
    )?;
    println!("{drained} writes before the drain, {} in all", writes()?);
    ensure!(status.starts_with('0'), "fio ended with {status}");
    Ok(())
}

//! Disks served by ringside-blk.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;

use super::Test;
use crate::command;
use crate::ensure;
use crate::error::{Doing, LabError, Result};
use crate::harness::{
    Blk, EventCounts, Guest, IOCTL, KVM_EXIT, Mapped, SYSTEM_CALL, URING_REQUEST, Vmm, disk_file,
    flushes, sha256, sum_interrupts,
};
use crate::site::Site;

pub(super) const TESTS: &[Test] = &[
    Test {
        name: "blk::contents_both_ways",
        seconds: 90,
        run: contents_both_ways,
    },
    Test {
        name: "blk::fio_verify_multiqueue",
        seconds: 120,
        run: fio_verify_multiqueue,
    },
    Test {
        name: "blk::flushes_reach_the_disk",
        seconds: 90,
        run: flushes_reach_the_disk,
    },
    Test {
        name: "blk::discard_punches_holes",
        seconds: 90,
        run: discard_punches_holes,
    },
    Test {
        name: "blk::errors_reach_the_guest",
        seconds: 90,
        run: errors_reach_the_guest,
    },
    Test {
        name: "blk::back_end_dies_under_load",
        seconds: 90,
        run: back_end_dies_under_load,
    },
    Test {
        name: "blk::back_end_stays_away",
        seconds: 90,
        run: back_end_stays_away,
    },
    Test {
        name: "blk::counts_per_request",
        seconds: 120,
        run: counts_per_request,
    },
];

const MIB: u64 = 1 << 20;

/// Size of the disk of [`exchange`].
const EXCHANGED: u64 = 12 * MIB;

/// A file of bytes that no compressor or zero detection can take for others.
pub(super) fn random_file(site: &Site, name: &str) -> Result<PathBuf> {
    let path = disk_file(site, name, 0)?;
    let doing = || format!("fill {}", path.display());
    let mut random = File::open("/dev/urandom").doing(doing)?.take(EXCHANGED);
    let mut file = File::create(&path).doing(doing)?;
    std::io::copy(&mut random, &mut file).doing(doing)?;
    file.flush().and_then(|()| file.sync_all()).doing(doing)?;
    drop(file);
    Ok(path)
}

/// What the host wrote to `disk` the guest reads from `device`; then the guest writes. Gives the checksum of what the guest sees
/// in the end, which [`arrived`] compares when the guest is gone.
pub(super) fn exchange(guest: &mut Guest, device: &str, disk: &Path) -> Result<String> {
    let seen = guest.run_ok(&format!("sha256sum <{device}"))?;
    let written = sha256(disk)?;
    ensure!(
        seen.starts_with(&written),
        "the guest reads {seen}, the host wrote {written}"
    );
    // From the far end and the middle, in pieces that are no multiple of a page.
    let seen = guest.run_ok(&format!(
        "dd if=/dev/urandom of={device} bs=512 count=2001 seek=77 conv=notrunc 2>/dev/null && \
         dd if=/dev/urandom of={device} bs=1M count=2 seek=9 conv=notrunc 2>/dev/null && \
         sync && echo 3 >/proc/sys/vm/drop_caches && sha256sum <{device}"
    ))?;
    ensure!(
        !seen.starts_with(&written),
        "the guest does not see its own writes"
    );
    Ok(seen)
}

/// What the guest saw last, the host reads: the whole disk.
pub(super) fn arrived(disk: &Path, seen: &str) -> Result<()> {
    let read = sha256(disk)?;
    ensure!(
        seen.starts_with(&read),
        "the guest wrote {seen}, the host reads {read}"
    );
    Ok(())
}

fn contents_both_ways(site: &Site) -> Result<()> {
    let disk = random_file(site, "disk.img")?;
    let blk = Blk::on(&disk)
        .arg("--serial=ringside-0123456789")
        .start(site)?;
    let mut guest = Guest::on(Vmm::Ringside)
        .diskless()
        .device(&blk)
        .boot(site)?;
    let serial = guest.run_ok("cat /sys/block/vda/serial")?;
    ensure!(
        serial.trim() == "ringside-0123456789",
        "the serial number came as {serial}"
    );
    let seen = exchange(&mut guest, "/dev/vda", &disk)?;
    guest.shut_down()?;
    blk.stop(site)?;
    arrived(&disk, &seen)
}

/// Four CPUs write through four queues, and every block is read back and compared.
fn fio_verify_multiqueue(site: &Site) -> Result<()> {
    let disk = disk_file(site, "disk.img", 256 * MIB)?;
    let blk = Blk::on(&disk).queues(4).arg("--direct").start(site)?;
    let mut guest = Guest::on(Vmm::Ringside)
        .cpus(4)
        .memory("1G")
        .device(&blk)
        .boot(site)?;
    let queues = guest.run_ok("ls /sys/block/vdb/mq | wc -l")?;
    ensure!(
        queues.trim() == "4",
        "the guest uses {} queues of 4",
        queues.trim()
    );
    // One job for each CPU, and so one for each queue.
    guest.run_ok_within(
        "fio --name=verify --filename=/dev/vdb --direct=1 --ioengine=libaio --iodepth=16 \
         --rw=randwrite --bsrange=4k-64k --numjobs=4 --size=8M --offset_increment=64M \
         --cpus_allowed=0-3 --cpus_allowed_policy=split \
         --verify=crc32c --verify_fatal=1 --do_verify=1",
        Duration::from_secs(60),
    )?;
    let interrupts = guest.run_ok("cat /proc/interrupts")?;
    for queue in 0..4 {
        ensure!(
            sum_interrupts(&interrupts, &format!("virtio1-req.{queue}")) > 0,
            "queue {queue} was not used:\n{interrupts}"
        );
    }
    guest.shut_down()?;
    Ok(())
}

/// A block device of the site that the test may overwrite.
pub(super) fn block_device(site: &Site) -> Result<&Path> {
    site.block_device.as_deref().ok_or_else(|| {
        LabError::Skipped("this machine has no block device that a test may overwrite".into())
    })
}

/// Each flush of the guest is one of the disk below the back-end; with the write cache off each write is followed by one.
fn flushes_reach_the_disk(site: &Site) -> Result<()> {
    let device = block_device(site)?;
    let blk = Blk::on(device).start(site)?;
    let mut guest = Guest::on(Vmm::Ringside).device(&blk).boot(site)?;
    let cache = guest.run_ok("cat /sys/block/vdb/cache_type")?;
    ensure!(cache.trim() == "write back", "the cache is {cache}");
    let mut flushes_by = |command: &str| -> Result<u64> {
        let before = flushes(device)?;
        guest.run_ok(command)?;
        Ok(flushes(device)?.saturating_sub(before))
    };
    let write = "for i in 1 2 3 4 5; do dd if=/dev/urandom of=/dev/vdb bs=4k count=1 \
                 seek=$i oflag=direct conv=notrunc 2>/dev/null || exit 1; done";
    let plain = flushes_by(write)?;
    let synced = flushes_by(&write.replace("notrunc", "notrunc,fsync"))?;
    let write_through = flushes_by(&format!(
        "echo 'write through' >/sys/block/vdb/cache_type; {write}"
    ))?;
    println!(
        "flushes of the disk by 5 writes: {plain} in write-back mode, {synced} with fsync, {write_through} in write-through mode"
    );
    ensure!(plain == 0, "writes alone cause {plain} flushes");
    ensure!(synced >= 5, "5 fsyncs of the guest caused {synced} flushes");
    ensure!(
        write_through >= 5,
        "5 writes without a write cache caused {write_through} flushes"
    );
    guest.shut_down()?;
    Ok(())
}

/// Discard gives space back to the host's file system, and what was discarded or zeroed reads as zeroes; the rest stays.
fn discard_punches_holes(site: &Site) -> Result<()> {
    let disk = random_file(site, "disk.img")?;
    let blk = Blk::on(&disk).start(site)?;
    let mut guest = Guest::on(Vmm::Ringside).device(&blk).boot(site)?;
    let allocated = || -> Result<u64> {
        let metadata = fs::metadata(&disk).doing(|| format!("look at {}", disk.display()))?;
        Ok(metadata.blocks() * 512)
    };
    let before = allocated()?;
    let kept = "dd if=/dev/vdb bs=1M skip=8 iflag=direct 2>/dev/null | sha256sum";
    let tail = guest.run_ok(kept)?;
    guest.run_ok("d=/usr/sbin/blkdiscard; $d -o 0 -l 4M /dev/vdb && $d -z -o 4M -l 4M /dev/vdb")?;
    let after = allocated()?;
    ensure!(
        after + 4 * MIB <= before,
        "the file had {before} bytes allocated before the discard, and {after} after it"
    );
    guest.run_ok(
        "dd if=/dev/vdb bs=1M count=8 iflag=direct 2>/dev/null | cmp -n 8388608 - /dev/zero",
    )?;
    ensure!(
        guest.run_ok(kept)? == tail,
        "what was not discarded has changed"
    );
    guest.shut_down()?;
    Ok(())
}

/// A sector that cannot be read and a host's file system that is full: an error of that request, and the disk goes on.
fn errors_reach_the_guest(site: &Site) -> Result<()> {
    let device = block_device(site)?;
    // In 512-byte sectors: 1 MiB that works, 4 KiB that does not, and again some that work.
    let table = format!(
        "0 2048 linear {0} 0\n2048 8 error\n2056 2040 linear {0} 2056\n",
        device.display()
    );
    let mapped = Mapped::create("ringside-bad", &table)?;
    let small = site.scratch.join("small");
    fs::create_dir_all(&small).doing(|| format!("create {}", small.display()))?;
    command::run_line(&format!(
        "mount -t tmpfs -o size=4M tmpfs {}",
        small.display()
    ))?;
    let full = disk_file(site, "small/disk.img", 32 * MIB)?;
    let bad = Blk::on(mapped.path()).arg("--direct").start(site)?;
    let full = Blk::on(&full).start(site)?;
    let mut guest = Guest::on(Vmm::Ringside)
        .device(&bad)
        .device(&full)
        .boot(site)?;
    let read = |sector: u32| {
        format!("dd if=/dev/vdb of=/dev/null bs=512 count=8 skip={sector} iflag=direct 2>&1")
    };
    guest.run_ok(&read(2040))?;
    let output = guest.run(&read(2048))?;
    ensure!(
        output.status != 0 && output.text.contains("Input/output error"),
        "reading bad sectors ended with {}: {}",
        output.status,
        output.text
    );
    guest.run_ok(&read(2056))?;

    let fill = "dd if=/dev/zero of=/dev/vdc bs=64k count=256 oflag=direct 2>&1";
    let output = guest.run(fill)?;
    ensure!(
        output.status != 0,
        "16 MiB were written into a file system of 4 MiB: {}",
        output.text
    );
    // What fits into what is there already still works, for reads and for writes.
    guest.run_ok(
        "dd if=/dev/urandom of=/dev/vdc bs=64k count=1 oflag=direct conv=notrunc 2>/dev/null && \
         dd if=/dev/vdc of=/dev/null bs=1M iflag=direct 2>/dev/null",
    )?;
    // So does the rest, as soon as there is room.
    command::run_line(&format!("mount -o remount,size=64M {}", small.display()))?;
    guest.run_ok(fill)?;
    guest.shut_down()?;
    bad.stop(site)?;
    full.stop(site)
}

/// A back-end that is killed under load: the VMM says so, the guest goes on with its other disk, and ends in order.
fn back_end_dies_under_load(site: &Site) -> Result<()> {
    let disk = disk_file(site, "disk.img", 64 * MIB)?;
    let mut blk = Blk::on(&disk).start(site)?;
    let mut guest = Guest::on(Vmm::Ringside).device(&blk).boot(site)?;
    start_fio(&mut guest, "vdb", 16)?;
    blk.daemon().signal(Signal::SIGKILL)?;
    blk.daemon().wait(site.limit(Duration::from_secs(5)))?;
    // The guest is alive, and its root, on the other back-end, too.
    guest.run_ok("echo 3 >/proc/sys/vm/drop_caches && sha256sum /usr/bin/fio")?;
    let log = guest.vmm_log();
    ensure!(
        log.lines()
            .any(|line| line.contains("back-end is gone") && line.contains(blk.socket())),
        "the VMM does not say which back-end is gone:\n{log}"
    );
    // Without a sync, which would wait for the dead disk.
    let status = guest.end_by("busybox poweroff -n -f")?;
    ensure!(
        status.code() == Some(0),
        "ringside-vmm ended with {status} after a power-off"
    );
    Ok(())
}

/// The status register of a device that is in use, which Linux reads and shows: ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK
/// (VIRTIO 1.3, 2.1).
const IN_USE: &str = "0x0000000f";
/// The same with DEVICE_NEEDS_RESET.
const NEEDS_RESET: &str = "0x0000004f";

/// A back-end stays away for longer than its guest is to wait: the VMM says so, the device tells the guest that it needs a reset, and
/// the guest goes on with its other disk. One that comes later serves it when its driver has reset the device, not before.
fn back_end_stays_away(site: &Site) -> Result<()> {
    let (kept_file, lost_file) = (
        disk_file(site, "kept.img", MIB)?,
        disk_file(site, "lost.img", MIB)?,
    );
    let kept = Blk::on(&kept_file).start(site)?;
    let mut lost = Blk::on(&lost_file).start(site)?;
    let mut guest = Guest::on(Vmm::Ringside)
        .diskless()
        .device(&kept)
        .arg("--blk")
        .arg(&format!("socket={},loss-timeout=1", lost.socket()))
        .boot(site)?;
    let status = |guest: &mut Guest, disk: &str, expected: &str| -> Result<()> {
        let status = guest.run_ok(&format!("cat /sys/block/{disk}/device/status"))?;
        ensure!(
            status.trim() == expected,
            "the status of {disk} is {status}, and not {expected}"
        );
        Ok(())
    };
    let writes = |guest: &mut Guest, disk: &str, file: &Path, text: &str| -> Result<()> {
        guest.run_ok(&format!(
            "printf {text} | dd of=/dev/{disk} conv=notrunc,fsync 2>/dev/null"
        ))?;
        let found = fs::read(file).doing(|| format!("read {}", file.display()))?;
        ensure!(
            found.starts_with(text.as_bytes()),
            "what the guest wrote to {disk} is not in {}",
            file.display()
        );
        Ok(())
    };
    writes(&mut guest, "vdb", &lost_file, "before")?;
    for disk in ["vda", "vdb"] {
        status(&mut guest, disk, IN_USE)?;
    }
    lost.daemon().signal(Signal::SIGKILL)?;
    lost.daemon().wait(site.limit(Duration::from_secs(5)))?;
    let told = guest.run(&format!(
        "for i in $(seq 100); do [ $(cat /sys/block/vdb/device/status) != {NEEDS_RESET} ] || exit 0; sleep 0.1; done; exit 1"
    ))?;
    ensure!(
        told.status == 0,
        "the guest is not told that its disk is lost:\n{}",
        guest.vmm_log()
    );
    let says = |guest: &Guest, what: &str| {
        let log = guest.vmm_log();
        log.lines()
            .any(|line| line.contains(what) && line.contains(lost.socket()))
    };
    ensure!(
        says(&guest, "(loss-timeout)"),
        "the VMM does not say that it waits no longer:\n{}",
        guest.vmm_log()
    );
    status(&mut guest, "vda", IN_USE)?;
    writes(&mut guest, "vda", &kept_file, "meanwhile")?;

    let found = Blk::on(&lost_file).in_place_of(&lost).start(site)?;
    let (start, limit) = (Instant::now(), site.limit(Duration::from_secs(10)));
    while !says(&guest, "back-end is back") {
        ensure!(
            start.elapsed() < limit,
            "the VMM does not find the next back-end:\n{}",
            guest.vmm_log()
        );
        sleep(Duration::from_millis(50));
    }
    status(&mut guest, "vdb", NEEDS_RESET)?;
    guest.run_ok(
        "device=$(readlink -f /sys/block/vdb/device); driver=/sys/bus/virtio/drivers/virtio_blk; \
         echo ${device##*/} >$driver/unbind && echo ${device##*/} >$driver/bind",
    )?;
    status(&mut guest, "vdb", IN_USE)?;
    writes(&mut guest, "vdb", &lost_file, "afterwards")?;
    let status = guest.shut_down()?;
    ensure!(
        status.code() == Some(0),
        "ringside-vmm ended with {status} after a power-off"
    );
    kept.stop(site)?;
    found.stop(site)
}

/// Starts 4 KiB random reads of a disk in the guest's background, and waits until they run.
fn start_fio(guest: &mut Guest, disk: &str, depth: u32) -> Result<()> {
    guest.run_ok(&format!(
        "fio --name=load --filename=/dev/{disk} --direct=1 --ioengine=libaio --rw=randread --bs=4k \
         --iodepth={depth} --time_based --runtime=600 --eta=never </dev/null >/run/fio.log 2>&1 & \
         echo $! >/run/fio.pid; set -- $(cat /sys/block/{disk}/stat); enough=$(($1 + 100)); \
         while set -- $(cat /sys/block/{disk}/stat); [ $1 -lt $enough ]; do \
         kill -0 $(cat /run/fio.pid) || exit 1; sleep 0.1; done"
    ))?;
    Ok(())
}

/// What happened while a guest read a disk for some seconds.
pub(super) struct Reads {
    /// Of the processes that were looked at.
    pub(super) counts: EventCounts,
    /// Reads that were completed.
    pub(super) reads: u64,
    /// Interrupts of the disk in the guest.
    pub(super) interrupts: u64,
}

/// How long reads are counted.
pub(super) const COUNT_SECONDS: u64 = 5;

/// Counts while the guest reads 4 KiB at random places of `disk` (such as `vdb`), whose interrupts have `interrupt` in their name.
pub(super) fn count_reads(
    site: &Site,
    guest: &mut Guest,
    (disk, interrupt): (&str, &str),
    depth: u32,
    pids: &[u32],
    events: &[&str],
) -> Result<Reads> {
    start_fio(guest, disk, depth)?;
    // The guest takes its own counts meanwhile. Nothing may be said on its console: each character is an exit.
    let take = format!("cat /proc/interrupts /sys/block/{disk}/stat");
    guest.run_ok(&format!(
        "(sleep 1; {take} >/run/before; sleep {COUNT_SECONDS}; {take} >/run/part; mv /run/part /run/after) \
         </dev/null >/dev/null 2>&1 &"
    ))?;
    let counts = EventCounts::measure(site, pids, events, COUNT_SECONDS)?;
    let samples = guest.run_ok(
        "while [ ! -e /run/after ]; do sleep 0.2; done; cat /run/before; echo ===; \
         cat /run/after; kill $(cat /run/fio.pid); rm /run/before /run/after; sleep 1",
    )?;
    let (reads, interrupts) = sampled(&samples, interrupt)?;
    ensure!(
        reads > 100,
        "{reads} reads in {COUNT_SECONDS} s are too few to count by"
    );
    Ok(Reads {
        counts,
        reads,
        interrupts,
    })
}

/// A count for each of `units`, with two decimals.
pub(super) fn per_unit(count: u64, units: u64) -> String {
    let units = units.max(1);
    let hundredths = (count * 100 + units / 2) / units;
    format!("{}.{:02}", hundredths / 100, hundredths % 100)
}

/// What one 4 KiB random read of a guest costs: KVM exits, interrupts, system calls. While the reads go on the VMM makes no
/// system call but KVM_RUN, and hardly that.
fn counts_per_request(site: &Site) -> Result<()> {
    let disk = disk_file(site, "disk.img", 256 * MIB)?;
    let mut blk = Blk::on(&disk).arg("--direct").start(site)?;
    let mut guest = Guest::on(Vmm::Ringside).device(&blk).boot(site)?;
    guest.run_ok("dd if=/dev/zero of=/dev/vdb bs=1M count=256 oflag=direct 2>/dev/null")?;
    let (vmm_pid, blk_pid) = (guest.vmm_pid(), blk.daemon().pid());
    for depth in [1_u32, 32] {
        let events = [SYSTEM_CALL, IOCTL, KVM_EXIT, URING_REQUEST];
        let pids = [vmm_pid, blk_pid];
        let disk = ("vdb", "virtio1-req");
        let Reads {
            counts,
            reads,
            interrupts,
        } = count_reads(site, &mut guest, disk, depth, &pids, &events)?;
        let requests = counts.of(blk_pid, URING_REQUEST);
        ensure!(
            requests > 100,
            "{requests} requests in {COUNT_SECONDS} s are too few to count by"
        );
        let ioctls = counts.of(vmm_pid, IOCTL);
        let others = counts.of(vmm_pid, SYSTEM_CALL).saturating_sub(ioctls);
        println!(
            "4 KiB random read, depth {depth}: {} KVM exits, {} interrupts, {} system calls of ringside-blk per read; \
             of ringside-vmm {ioctls} KVM_RUN and {others} others in all ({requests} reads)",
            per_unit(counts.of(vmm_pid, KVM_EXIT), requests),
            per_unit(interrupts, reads),
            per_unit(counts.of(blk_pid, SYSTEM_CALL), requests),
        );
        // Published figures: one interrupt at most; submission, interrupt and sleep of the back-end. KVM exits have no bound
        // here, as those of the timer grow with the time a read takes.
        let blk_calls = counts.of(blk_pid, SYSTEM_CALL);
        ensure!(
            interrupts > 0 && interrupts * 100 <= reads * 105,
            "{interrupts} interrupts for {reads} reads"
        );
        ensure!(
            blk_calls * 100 <= requests * 310,
            "{blk_calls} system calls of ringside-blk for {requests} reads"
        );
        ensure!(
            others == 0,
            "ringside-vmm made {others} system calls besides KVM_RUN"
        );
        ensure!(
            ioctls < requests / 10,
            "the VMM's process ran for {ioctls} exits during {requests} reads"
        );
    }
    guest.shut_down()?;
    Ok(())
}

/// Reads completed and interrupts taken between the two samples.
fn sampled(samples: &str, interrupt: &str) -> Result<(u64, u64)> {
    let numbers = |sample: &str| -> Option<(u64, u64)> {
        let reads = sample.lines().last()?.split_whitespace().next()?;
        Some((reads.parse().ok()?, sum_interrupts(sample, interrupt)))
    };
    let (before, after) = samples.split_once("===\n").unwrap_or_default();
    match (numbers(before), numbers(after)) {
        (Some(before), Some(after)) => Ok((
            after.0.saturating_sub(before.0),
            after.1.saturating_sub(before.1),
        )),
        _ => Err(LabError::Protocol {
            from: "guest's counters",
            text: samples.into(),
        }),
    }
}

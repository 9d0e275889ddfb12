//! Disks served by ringside-blk.

use std::fs::File;
use std::io::{Read, Write};
use std::path::Path;
use std::time::Duration;

use super::Test;
use crate::ensure;
use crate::error::{Doing, Result};
use crate::harness::{
    Blk, Guest, KvmCounts, SyscallCounter, Vmm, disk_file, guest_interrupts, sha256,
};
use crate::site::Site;

pub(super) const TESTS: &[Test] = &[
    Test {
        name: "blk::contents_both_ways",
        seconds: 90,
        run: |site| contents(site, Vmm::Ringside),
    },
    Test {
        name: "blk::contents_under_qemu_10",
        seconds: 90,
        run: |site| contents(site, Vmm::Qemu10),
    },
    Test {
        name: "blk::contents_under_qemu_11",
        seconds: 90,
        run: |site| contents(site, Vmm::Qemu11),
    },
    Test {
        name: "blk::fio_verify_multiqueue",
        seconds: 120,
        run: fio_verify_multiqueue,
    },
    Test {
        name: "blk::vmm_is_off_the_data_path",
        seconds: 120,
        run: vmm_is_off_the_data_path,
    },
];

const MIB: u64 = 1 << 20;

/// Fills a file with bytes that no compressor or zero detection can take for others.
fn fill_with_random(path: &Path, size: u64) -> Result<()> {
    let doing = || format!("fill {}", path.display());
    let mut random = File::open("/dev/urandom").doing(doing)?.take(size);
    let mut file = File::create(path).doing(doing)?;
    std::io::copy(&mut random, &mut file).doing(doing)?;
    file.flush().and_then(|()| file.sync_all()).doing(doing)
}

/// What the host wrote the guest reads; what the guest wrote the host reads: the whole disk, by checksum.
fn contents(site: &Site, vmm: Vmm) -> Result<()> {
    let disk = disk_file(site, "disk.img", 0)?;
    fill_with_random(&disk, 12 * MIB)?;
    let blk = Blk::on(&disk).start(site)?;
    let mut guest = Guest::on(vmm).diskless().device(&blk).boot(site)?;
    let seen = guest.run_ok("sha256sum </dev/vda")?;
    let written = sha256(&disk)?;
    ensure!(
        seen.starts_with(&written),
        "the guest reads {seen}, the host wrote {written}"
    );

    // From the far end and the middle, in pieces that are no multiple of a page.
    let seen = guest.run_ok(
        "dd if=/dev/urandom of=/dev/vda bs=512 count=2001 seek=77 conv=notrunc 2>/dev/null && \
         dd if=/dev/urandom of=/dev/vda bs=1M count=2 seek=9 conv=notrunc 2>/dev/null && \
         sync && echo 3 >/proc/sys/vm/drop_caches && sha256sum </dev/vda",
    )?;
    guest.shut_down()?;
    let status = blk.stop(site)?;
    ensure!(
        status.success(),
        "ringside-blk ended with {status} on SIGTERM"
    );
    let read = sha256(&disk)?;
    ensure!(read != written, "the guest's writes did not arrive");
    ensure!(
        seen.starts_with(&read),
        "the guest wrote {seen}, the host reads {read}"
    );
    Ok(())
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
    guest.run_ok_within(
        "fio --name=verify --filename=/dev/vdb --direct=1 --ioengine=libaio --iodepth=16 \
         --rw=randwrite --bsrange=4k-64k --numjobs=4 --size=16M --offset_increment=64M \
         --verify=crc32c --verify_fatal=1 --do_verify=1",
        Duration::from_secs(60),
    )?;
    guest.shut_down()?;
    Ok(())
}

/// While a guest does I/O, the VMM makes no system call but its vCPUs' KVM_RUN, and KVM is left for doorbells and interrupts
/// only. The counts are what the README quotes.
fn vmm_is_off_the_data_path(site: &Site) -> Result<()> {
    let disk = disk_file(site, "disk.img", 256 * MIB)?;
    let mut blk = Blk::on(&disk).arg("--direct").start(site)?;
    let mut guest = Guest::on(Vmm::Ringside).device(&blk).boot(site)?;
    guest.run_ok("dd if=/dev/zero of=/dev/vdb bs=1M count=256 oflag=direct 2>/dev/null")?;
    for depth in [1_u32, 32] {
        // Without tracers first: they change how long things take, and so how often somebody sleeps.
        let fio = format!(
            "fio --name=count --filename=/dev/vdb --direct=1 --ioengine=libaio --rw=randread \
             --bs=4k --iodepth={depth} --number_ios=2000 --size=256M --output-format=terse"
        );
        let interrupts_before = guest_interrupts(&mut guest, "virtio1-req")?;
        let kvm_before = KvmCounts::read()?;
        guest.run_ok_within(&fio, Duration::from_secs(30))?;
        let kvm = KvmCounts::read()?;
        let interrupts = guest_interrupts(&mut guest, "virtio1-req")? - interrupts_before;

        let vmm_calls = SyscallCounter::attach(site, guest.vmm_pid())?;
        let blk_calls = SyscallCounter::attach(site, blk.daemon().pid())?;
        guest.run_ok_within(&fio, Duration::from_secs(60))?;
        let vmm_calls = vmm_calls.finish(site)?;
        let blk_calls: u64 = blk_calls.finish(site)?.values().sum();
        let per_io = |count: u64| format!("{}.{:02}", count / 2000, count % 2000 / 20);
        println!(
            "depth {depth:>2}, per 4 KiB read: {} KVM exits (all), {} interrupts, {} system calls of ringside-blk",
            per_io(kvm.since(&kvm_before, "exits")),
            per_io(interrupts),
            per_io(blk_calls),
        );
        // Commands and their output go through the serial console: reads and writes of a few hundred bytes. An I/O path
        // through the VMM would show as thousands.
        let others: u64 = vmm_calls
            .iter()
            .filter(|(name, _)| *name != "ioctl")
            .map(|(_, count)| count)
            .sum();
        println!("depth {depth:>2}, calls of ringside-vmm for 2000 reads: {vmm_calls:?}");
        ensure!(
            others < 1000,
            "ringside-vmm made {others} system calls besides KVM_RUN"
        );
    }
    guest.shut_down()?;
    Ok(())
}

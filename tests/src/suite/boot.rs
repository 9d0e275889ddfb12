//! Guests that come up, and go.

use std::thread;
use std::time::Duration;

use super::Test;
use crate::ensure;
use crate::error::Result;
use crate::harness::{Blk, Control, Guest, Net, Vmm, disk_file};
use crate::site::Site;

pub(super) const TESTS: &[Test] = &[
    Test {
        name: "boot::the_lab_itself",
        seconds: 60,
        run: the_lab_itself,
    },
    Test {
        name: "boot::by_bzimage",
        seconds: 60,
        run: by_bzimage,
    },
    Test {
        name: "boot::by_pvh",
        seconds: 60,
        run: by_pvh,
    },
    Test {
        name: "boot::eight_cpus_and_six_gib",
        seconds: 120,
        run: eight_cpus_and_six_gib,
    },
    Test {
        name: "boot::reboots_and_a_panic",
        seconds: 240,
        run: reboots_and_a_panic,
    },
    Test {
        name: "boot::paused_under_load",
        seconds: 120,
        run: paused_under_load,
    },
];

/// A guest under stock QEMU, and what tests rely on: exit statuses, long commands.
fn the_lab_itself(site: &Site) -> Result<()> {
    let mut guest = Guest::on(Vmm::Qemu11).diskless().boot(site)?;
    agent_works(&mut guest)?;
    let status = guest.shut_down()?;
    ensure!(status.success(), "QEMU ended with {status}");
    Ok(())
}

fn agent_works(guest: &mut Guest) -> Result<()> {
    let failed = guest.run("exit 7")?;
    ensure!(
        failed.status == 7,
        "exit status 7 came back as {}",
        failed.status
    );
    // Longer than a line of a terminal: the agent gets it in parts.
    let long = "x".repeat(5000);
    ensure!(
        guest.run_ok(&format!("echo {long}"))?.trim() == long,
        "a long command was damaged"
    );
    Ok(())
}

/// The kernel's log has no complaint about what the VMM tells it: tables, buses, processors, clocks.
fn no_complaints(guest: &mut Guest) -> Result<()> {
    let log = guest.run_ok("dmesg -r 2>/dev/null || dmesg")?;
    let complaints: Vec<&str> = log
        .lines()
        .filter(|line| {
            [
                "ACPI Error",
                "ACPI BIOS Error",
                "Firmware Bug",
                "firmware bug",
                "BIOS bug",
                "Call Trace",
                "unstable",
            ]
            .iter()
            .any(|word| line.contains(word))
        })
        .collect();
    ensure!(
        complaints.is_empty(),
        "the guest's kernel complains:\n{}",
        complaints.join("\n")
    );
    Ok(())
}

/// The Debian disk is the guest's root; the machine is as asked for; a power-off ends the VMM with status 0.
fn by_bzimage(site: &Site) -> Result<()> {
    let mut guest = Guest::on(Vmm::Ringside)
        .bzimage()
        .cpus(2)
        .memory("1G")
        .boot(site)?;
    agent_works(&mut guest)?;
    let release = guest.run_ok("cat /etc/os-release")?;
    ensure!(release.contains("trixie"), "not Debian trixie: {release}");
    ensure!(
        guest.run_ok("cat /sys/block/vda/ro")?.trim() == "1",
        "the read-only disk is not read-only in the guest"
    );
    ensure!(
        guest.run_ok("nproc")?.trim() == "2",
        "the guest has not the CPUs it was given"
    );
    let kib = memory_kib(&mut guest)?;
    ensure!(
        (900 << 10..=1 << 20).contains(&kib),
        "the guest has {kib} KiB of 1 GiB"
    );
    no_complaints(&mut guest)?;
    let status = guest.shut_down()?;
    ensure!(
        status.code() == Some(0),
        "ringside-vmm ended with {status} after a power-off"
    );
    Ok(())
}

fn memory_kib(guest: &mut Guest) -> Result<u64> {
    let memory = guest.run_ok("awk '/^MemTotal/ { print $2 }' /proc/meminfo")?;
    Ok(memory.trim().parse().unwrap_or_default())
}

/// The same kernel as an ELF file, by PVH. A guest that nobody asks to end ends with the VMM, on SIGTERM, with status 0.
fn by_pvh(site: &Site) -> Result<()> {
    let mut guest = Guest::on(Vmm::Ringside).diskless().boot(site)?;
    // What Linux calls its PVH entry (arch/x86/platform/pvh/enlighten.c) in the place of a boot loader's number.
    let loader = guest.run_ok("cat /proc/sys/kernel/bootloader_type")?;
    ensure!(
        loader.trim() == "176",
        "the kernel was started by loader {loader}, not by PVH"
    );
    no_complaints(&mut guest)?;
    let status = guest.end_by_signal(nix::sys::signal::Signal::SIGTERM)?;
    ensure!(
        status.code() == Some(0),
        "ringside-vmm ended with {status} on SIGTERM"
    );
    Ok(())
}

/// More than fits below the hole under 4 GiB, and a queue of each device for four of eight processors.
fn eight_cpus_and_six_gib(site: &Site) -> Result<()> {
    let disk = disk_file(site, "disk.img", 64 << 20)?;
    let blk = Blk::on(&disk).queues(4).start(site)?;
    let net = Net::tap("tap0")
        .queue_pairs(4)
        .address("10.77.0.1/24")
        .start(site)?;
    let mut guest = Guest::on(Vmm::Ringside)
        .cpus(8)
        .memory("6G")
        .device(&blk)
        .device(&net)
        .boot(site)?;
    ensure!(
        guest.run_ok("nproc")?.trim() == "8",
        "the guest has not the CPUs it was given"
    );
    let kib = memory_kib(&mut guest)?;
    ensure!(
        (5_800 << 10..=6 << 20).contains(&kib),
        "the guest has {kib} KiB of 6 GiB"
    );
    // Buffers from above 4 GiB: the guest's kernel takes the highest memory first.
    guest.run_ok(
        "dd if=/dev/urandom of=/dev/shm/random bs=1M count=32 2>/dev/null && \
         dd if=/dev/shm/random of=/dev/vdb bs=1M oflag=direct 2>/dev/null && \
         dd if=/dev/vdb bs=1M count=32 iflag=direct 2>/dev/null | cmp - /dev/shm/random",
    )?;
    let queues = guest
        .run_ok("ls /sys/block/vdb/mq | wc -l; ls -d /sys/class/net/eth0/queues/rx-* | wc -l")?;
    ensure!(
        queues.split_whitespace().eq(["4", "4"]),
        "queues of the disk and of the card: {queues}"
    );
    guest.network_up("10.77.0.2/24")?;
    guest.run_ok("ping -c 3 -i 0.2 -W 5 10.77.0.1")?;
    guest.shut_down()?;
    Ok(())
}

/// A guest that reboots ends its VMM with status 3, and the next VMM finds the back-ends ready; one that panics, with 4.
fn reboots_and_a_panic(site: &Site) -> Result<()> {
    let disk = disk_file(site, "disk.img", 1 << 20)?;
    let blk = Blk::on(&disk).start(site)?;
    let net = Net::tap("tap0").address("10.77.0.1/24").start(site)?;
    let last = site.effort.kills.saturating_add(1);
    for number in 1..=last {
        let mut guest = Guest::on(Vmm::Ringside)
            .diskless()
            .device(&blk)
            .device(&net)
            .boot(site)?;
        // Each boot finds what the one before has written, and reaches the host.
        guest.network_up("10.77.0.2/24")?;
        let count = guest.run_ok(
            "count=$(head -c 512 /dev/vda | tr -dc 0-9); echo $((count + 1)) | tee /tmp/count && \
             dd if=/tmp/count of=/dev/vda conv=notrunc,fsync 2>/dev/null && \
             ping -c 1 -W 5 10.77.0.1 >/dev/null",
        )?;
        ensure!(
            count.trim() == number.to_string(),
            "boot {number} counted {}",
            count.trim()
        );
        let (command, expected) = if number == last {
            ("echo c >/proc/sysrq-trigger", 4)
        } else {
            ("reboot -f", 3)
        };
        let status = guest.end_by(command)?;
        ensure!(
            status.code() == Some(expected),
            "ringside-vmm ended with {status} after `{command}`"
        );
    }
    blk.stop(site)?;
    net.stop(site)
}

/// A guest whose disk is busy is paused again and again: nothing happens to it meanwhile, and nothing is lost.
fn paused_under_load(site: &Site) -> Result<()> {
    let disk = disk_file(site, "disk.img", 64 << 20)?;
    let blk = Blk::on(&disk).queues(2).start(site)?;
    let control = Control::new(site, "vm.sock");
    let mut guest = Guest::on(Vmm::Ringside)
        .cpus(2)
        .device(&blk)
        .arg("--api-socket")
        .arg(&control.socket().display().to_string())
        .boot(site)?;
    guest.run_ok(
        "(fio --name=verify --filename=/dev/vdb --direct=1 --ioengine=libaio --iodepth=16 --rw=randwrite --bs=4k \
         --size=16M --verify=crc32c --verify_fatal=1 --do_verify=1 >/run/fio.log 2>&1; echo $? >/run/fio.status) &",
    )?;
    for _ in 0..5 {
        thread::sleep(Duration::from_millis(500));
        control.ask(&["pause"])?;
        let state = control.ask_json(&["status"])?;
        ensure!(
            state.get("state").is_some_and(|state| state == "paused"),
            "the machine is {state}"
        );
        thread::sleep(Duration::from_millis(500));
        control.ask(&["resume"])?;
    }
    let done = guest.run_ok_within(
        "until [ -s /run/fio.status ]; do sleep 0.2; done; cat /run/fio.status /run/fio.log",
        Duration::from_secs(60),
    )?;
    ensure!(done.starts_with("0\n"), "fio found errors:\n{done}");
    no_complaints(&mut guest)?;
    let status = guest.shut_down()?;
    ensure!(status.success(), "the VMM ended with {status}");
    blk.stop(site)
}

//! Guests that come up, and go.

use super::Test;
use crate::ensure;
use crate::error::Result;
use crate::harness::{Guest, Vmm};
use crate::site::Site;

pub(super) const TESTS: &[Test] = &[
    Test {
        name: "boot::qemu_diskless",
        seconds: 60,
        run: qemu_diskless,
    },
    Test {
        name: "boot::qemu_debian",
        seconds: 90,
        run: qemu_debian,
    },
    Test {
        name: "boot::ringside_diskless",
        seconds: 60,
        run: ringside_diskless,
    },
    Test {
        name: "boot::ringside_debian",
        seconds: 90,
        run: ringside_debian,
    },
];

/// The lab itself: a guest without a disk under stock QEMU.
fn qemu_diskless(site: &Site) -> Result<()> {
    let mut guest = Guest::on(Vmm::Qemu11).cpus(2).diskless().boot(site)?;
    ensure!(
        guest.run_ok("nproc")?.trim() == "2",
        "the guest has not the CPUs it was given"
    );
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
    let status = guest.shut_down()?;
    ensure!(status.success(), "QEMU ended with {status}");
    Ok(())
}

/// The lab itself: a guest with the Debian disk under the older QEMU.
fn qemu_debian(site: &Site) -> Result<()> {
    let mut guest = Guest::on(Vmm::Qemu10).cpus(1).boot(site)?;
    let release = guest.run_ok("cat /etc/os-release")?;
    ensure!(release.contains("trixie"), "not Debian trixie: {release}");
    guest.run_ok("touch /written && fio --version && iperf3 --version && ethtool --version")?;
    guest.shut_down()?;
    Ok(())
}

/// Our VMM: several CPUs, the memory asked for, commands, power-off with status 0.
fn ringside_diskless(site: &Site) -> Result<()> {
    let mut guest = Guest::on(Vmm::Ringside)
        .cpus(2)
        .memory("1G")
        .diskless()
        .boot(site)?;
    ensure!(
        guest.run_ok("nproc")?.trim() == "2",
        "the guest has not the CPUs it was given"
    );
    let memory = guest.run_ok("awk '/^MemTotal/ { print $2 }' /proc/meminfo")?;
    let kib: u64 = memory.trim().parse().unwrap_or_default();
    ensure!(
        (900 << 10..=1 << 20).contains(&kib),
        "the guest has {kib} KiB of 1 GiB"
    );
    let status = guest.shut_down()?;
    ensure!(
        status.code() == Some(0),
        "ringside-vmm ended with {status} after a power-off"
    );
    Ok(())
}

/// Our VMM with ringside-blk: the Debian disk is the guest's root.
fn ringside_debian(site: &Site) -> Result<()> {
    let mut guest = Guest::on(Vmm::Ringside).boot(site)?;
    let release = guest.run_ok("cat /etc/os-release")?;
    ensure!(release.contains("trixie"), "not Debian trixie: {release}");
    ensure!(
        guest.run_ok("cat /sys/block/vda/ro")?.trim() == "1",
        "the read-only disk is not read-only in the guest"
    );
    guest.shut_down()?;
    Ok(())
}

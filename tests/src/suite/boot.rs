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

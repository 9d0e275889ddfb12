//! Devices that are passed through to a guest: made ready by ringside-vfio, and under stock QEMU as the reference.

use std::process::Command;
use std::time::Duration;

use serde_json::Value;

use super::Test;
use crate::command;
use crate::ensure;
use crate::error::{LabError, Result};
use crate::harness::{
    Assigned, Device, Guest, Igb, KernelLog, NvmePf, PciId, Registers, Transfer, Vmm, dma_fault,
    edu_transfer, igbvf_transmit_from, packets, ringside_vfio, sum_interrupts_by,
};
use crate::site::Site;

mod counts;
mod life;
mod mistakes;

/// All tests with devices that are passed through.
pub(super) fn tests() -> impl Iterator<Item = &'static Test> {
    [TESTS, life::TESTS, counts::TESTS, mistakes::TESTS]
        .into_iter()
        .flatten()
}

const TESTS: &[Test] = &[
    Test {
        name: "vfio::lists_virtual_functions",
        seconds: 30,
        run: lists_virtual_functions,
    },
    Test {
        name: "vfio::network_function",
        seconds: 90,
        run: |site| network_function(site, Vmm::Ringside),
    },
    Test {
        name: "vfio::disk_function",
        seconds: 90,
        run: disk_function,
    },
    Test {
        name: "vfio::intx_msi_and_dma",
        seconds: 90,
        run: intx_msi_and_dma,
    },
    Test {
        name: "vfio::network_function_under_qemu",
        seconds: 90,
        run: |site| network_function(site, Vmm::Qemu11),
    },
];

/// The host's side of the network.
const HOST: &str = "10.77.0.1";
/// No guest of these tests has memory there, or a BAR.
const OUTSIDE: u64 = 1 << 30;
/// Until a message of the kernel is there, on plain hardware.
const MESSAGE_LIMIT: Duration = Duration::from_secs(2);
/// For a command on the host's side.
const HOST_LIMIT: Duration = Duration::from_secs(60);

/// Two virtual functions of the lab's network card, each in an IOMMU group of its own, so that a guest could have them.
fn lists_virtual_functions(site: &Site) -> Result<()> {
    let igb = Igb::take(site)?;
    let before = listed(site)?;
    let functions = igb.create::<2>(&["--driver", "none"])?;
    let table = ringside_vfio(site, &["list"])?;
    let after = listed(site)?;
    functions.destroy()?;
    print!("{table}");
    let groups: Vec<&Value> = after
        .iter()
        .filter(|device| device.get("kind") == Some(&"vf".into()))
        .filter_map(|device| device.pointer("/iommu_group/members"))
        .collect();
    ensure!(
        after.len() == before.len() + 2 && groups.len() == 2,
        "{} devices before and {} virtual functions after 2 were made:\n{table}",
        before.len(),
        groups.len()
    );
    ensure!(
        groups
            .iter()
            .all(|members| members.as_array().is_some_and(|list| list.len() == 1)),
        "a virtual function shares its IOMMU group:\n{table}"
    );
    Ok(())
}

/// The devices with SR-IOV.
fn listed(site: &Site) -> Result<Vec<Value>> {
    let text = ringside_vfio(site, &["list", "--json"])?;
    serde_json::from_str::<Value>(&text)
        .ok()
        .and_then(|answer| answer.get("devices")?.as_array().cloned())
        .ok_or(LabError::Protocol {
            from: "ringside-vfio",
            text,
        })
}

/// A virtual function of the network card: the MAC address that the host gave it, packets both ways, MSI-X; and a transmit ring
/// outside of the guest's memory, which the IOMMU keeps it from.
fn network_function(site: &Site, vmm: Vmm) -> Result<()> {
    const MAC: &str = "52:54:00:00:00:a0";
    let igb = Igb::take(site)?;
    igb.up(&format!("{HOST}/24"))?;
    let functions = igb.create::<2>(&[])?;
    igb.set(0, &["--mac", MAC])?;
    let [function, _] = functions.addresses();
    let mut log = KernelLog::follow()?;
    let mut guest = Guest::on(vmm).diskless().vfio(function).boot(site)?;
    let card = guest.network_up("10.77.0.2/24")?;
    let mac = guest.run_ok(&format!("cat /sys/class/net/{card}/address"))?;
    ensure!(
        mac.trim() == MAC,
        "the guest's card is {mac}, not {MAC} as set"
    );
    let before = packets(igb.interface())?;
    reaches_host(&mut guest)?;
    let after = packets(igb.interface())?;
    ensure!(
        after.received >= before.received + 3 && after.sent >= before.sent + 3,
        "the physical function saw {before:?} before and {after:?} after three packets each way"
    );
    let table = guest.run_ok("cat /proc/interrupts")?;
    ensure!(
        sum_interrupts_by(&table, "PCI-MSIX-", &format!("{card}-rx")) > 0,
        "no interrupts of the card:\n{table}"
    );
    let registers = Registers::take(&mut guest, PciId::IGBVF)?;
    igbvf_transmit_from(&mut guest, &registers, OUTSIDE)?;
    let fault = dma_fault(function, Transfer::Read, OUTSIDE);
    log.wait_for(&fault, site.limit(MESSAGE_LIMIT))?;
    guest.shut_down()?;
    functions.destroy()
}

fn reaches_host(guest: &mut Guest) -> Result<()> {
    // The link may take a while, and the first packet with it.
    guest
        .run_ok(&format!(
            "tries=0; until ping -c 1 -W 1 {HOST} || [ $tries = 30 ]; do tries=$((tries + 1)); done >/dev/null; \
             ping -c 3 -i 0.2 -W 5 {HOST}"
        ))
        .map(drop)
}

/// A virtual function of the NVMe controller: what the host has written, the guest reads, and the other way round.
fn disk_function(site: &Site) -> Result<()> {
    const SUM: &str = "bs=1M count=8 iflag=direct 2>/dev/null | sha256sum";
    const FILL: &str = "bs=1M count=8 oflag=direct 2>/dev/null";
    let on_host = |line: &str| command::run(Command::new("sh").args(["-c", line]), HOST_LIMIT);
    let nvme = NvmePf::take(site)?;
    let namespace = nvme.spare_namespace()?;
    let disk = namespace.disk().display().to_string();
    on_host(&format!("dd if=/dev/urandom of={disk} {FILL}"))?;
    let written = on_host(&format!("dd if={disk} {SUM}"))?;
    drop(namespace);
    let functions = nvme.create::<1>(&[])?;
    let [function] = functions.addresses();
    nvme.equip(0, 3, 3)?;
    let mut guest = Guest::on(Vmm::Ringside)
        .diskless()
        .vfio(function)
        .boot(site)?;
    let seen = guest.run_ok(&format!("dd if=/dev/nvme0n1 {SUM}"))?;
    ensure!(
        seen == written,
        "the guest reads {seen}, the host wrote {written}"
    );
    let seen = guest.run_ok(&format!(
        "dd if=/dev/urandom of=/dev/nvme0n1 {FILL} && dd if=/dev/nvme0n1 {SUM}"
    ))?;
    let table = guest.run_ok("cat /proc/interrupts")?;
    ensure!(
        sum_interrupts_by(&table, "PCI-MSIX-", "nvme0q1") > 0,
        "no interrupts of the disk:\n{table}"
    );
    guest.shut_down()?;
    let namespace = nvme.spare_namespace()?;
    let read = on_host(&format!("dd if={} {SUM}", namespace.disk().display()))?;
    ensure!(
        seen == read,
        "the guest wrote {seen}, the host reads {read}"
    );
    drop(namespace);
    functions.destroy()
}

/// A network card by INTx, a disk by MSI, and a device whose DMA ends where the guest's memory does.
fn intx_msi_and_dma(site: &Site) -> Result<()> {
    let igb = Igb::take(site)?;
    igb.up(&format!("{HOST}/24"))?;
    let card = Assigned::bind(site, Device::E1000e)?;
    let disk = Assigned::bind(site, Device::Sata)?;
    let edu = Assigned::bind(site, Device::Edu)?;
    let mut log = KernelLog::follow()?;
    let mut guest = Guest::on(Vmm::Ringside)
        .diskless()
        .kernel_argument("e1000e.IntMode=0")
        .vfio(card.address())
        .vfio(disk.address())
        .vfio(edu.address())
        .arg("--log-level=warn,ringside_vfio=debug")
        .boot(site)?;
    // None of them can be reset by itself, and each is alone on its bus. The link to the PCI Express one among them, the card,
    // does not come back in time on the emulated port: it is reset by power management then.
    let vmm_log = guest.vmm_log();
    let by = |how: &str| vmm_log.matches(&format!("by={how}")).count();
    ensure!(
        by("Bus") >= 2 && by("Bus") + by("PowerManagement") == 3,
        "the devices were not reset with their buses, or by power management:\n{vmm_log}"
    );
    guest.network_up("10.77.0.2/24")?;
    reaches_host(&mut guest)?;
    guest.run_ok(
        "dd if=/dev/urandom of=/tmp/random bs=1M count=2 2>/dev/null && \
         dd if=/tmp/random of=/dev/sda bs=64k oflag=direct 2>/dev/null && \
         dd if=/dev/sda bs=64k count=32 iflag=direct 2>/dev/null | cmp - /tmp/random",
    )?;
    let table = guest.run_ok("cat /proc/interrupts")?;
    ensure!(
        sum_interrupts_by(&table, "IO-APIC", "eth0") > 0
            && sum_interrupts_by(&table, "PCI-MSI-", "ahci") > 0,
        "the card has not interrupted by INTx, or the disk not by MSI:\n{table}"
    );
    let registers = Registers::take(&mut guest, Device::Edu.id())?;
    // The first page of the BIOS's area is RAM or ROM to every guest.
    edu_transfer(&mut guest, &registers, Transfer::Read, 0xf_0000)?;
    let stray = log
        .messages()?
        .iter()
        .find(|line| line.contains("DMAR: [DMA"));
    ensure!(stray.is_none(), "DMA to the guest's memory: {stray:?}");
    for (transfer, address) in [
        (Transfer::Read, OUTSIDE),
        (Transfer::Write, OUTSIDE + 0x1000),
    ] {
        edu_transfer(&mut guest, &registers, transfer, address)?;
        let fault = dma_fault(edu.address(), transfer, address);
        log.wait_for(&fault, site.limit(MESSAGE_LIMIT))?;
    }
    guest.shut_down()?;
    Ok(())
}

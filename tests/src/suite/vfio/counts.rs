//! What a packet and a read of a passed-through function cost, and what the other ways cost.

use super::{HOST, reaches_host};
use crate::command;
use crate::ensure;
use crate::error::Result;
use crate::harness::{
    Blk, Guest, IOCTL, Igb, KVM_EXIT, KVM_USERSPACE_EXIT, NvmePf, Vmm, iperf3_server,
};
use crate::site::Site;
use crate::suite::Test;
use crate::suite::bench_net::{COUNTED, Cost, Stream};
use crate::suite::blk::{COUNT_SECONDS, Reads, count_reads, per_unit};

pub(super) const TESTS: &[Test] = &[
    Test {
        name: "vfio::counts_per_packet",
        seconds: 120,
        run: counts_per_packet,
    },
    Test {
        name: "vfio::counts_of_three_disks",
        seconds: 300,
        run: counts_of_three_disks,
    },
];

/// While packets pass a network function the guest is left for interrupts and its timer only, and the VMM not entered.
fn counts_per_packet(site: &Site) -> Result<()> {
    let igb = Igb::take(site)?;
    igb.up(&format!("{HOST}/24"))?;
    let functions = igb.create::<1>(&[])?;
    let [function] = functions.addresses();
    let _server = iperf3_server(site, None)?;
    let mut guest = Guest::on(Vmm::Ringside).vfio(function).boot(site)?;
    let card = guest.network_up("10.77.0.2/24")?;
    reaches_host(&mut guest)?;
    for (direction, options) in [("sent", ""), ("received", "--reverse")] {
        let stream = Stream {
            host: HOST,
            options,
            interface: card,
            interrupts: card,
        };
        let Cost {
            counts,
            interrupts,
            packets,
        } = stream.count(site, &mut guest, &[KVM_EXIT, KVM_USERSPACE_EXIT, IOCTL])?;
        let pid = guest.vmm_pid();
        let to_vmm = counts.of(pid, KVM_USERSPACE_EXIT);
        println!(
            "packets mostly {direction}: {} KVM exits and {} interrupts per packet; the VMM was entered {to_vmm} times \
             for {packets} packets",
            per_unit(counts.of(pid, KVM_EXIT), packets),
            per_unit(interrupts, packets),
        );
        ensure!(
            packets > 1000 && interrupts > 0,
            "{packets} packets and {interrupts} interrupts in {COUNTED} s are too few to count by"
        );
        // Signals, such as those that end it, could enter it; packets must not.
        ensure!(
            to_vmm * 1000 <= packets && counts.of(pid, IOCTL) * 1000 <= packets,
            "the VMM was entered {to_vmm} times during {packets} packets"
        );
    }
    guest.shut_down()?;
    functions.destroy()
}

/// One disk (a namespace of the NVMe controller), read in three ways: emulated by QEMU, as a vhost-user device by ringside-blk, and as
/// a function of its own, which is verified, too.
fn counts_of_three_disks(site: &Site) -> Result<()> {
    const DEPTHS: [u32; 2] = [1, 16];
    let nvme = NvmePf::take(site)?;
    let functions = nvme.create::<1>(&[])?;
    let [function] = functions.addresses();
    let mut rows = Vec::new();
    let count = |guest: &mut Guest, disk, name: &str| -> Result<Vec<(String, u64)>> {
        let pid = guest.vmm_pid();
        let mut cells = Vec::new();
        for depth in DEPTHS {
            let events = [KVM_EXIT, KVM_USERSPACE_EXIT];
            let Reads {
                counts,
                reads,
                interrupts,
            } = count_reads(site, guest, disk, depth, &[pid], &events)?;
            let text = format!(
                "{name}, depth {depth}: per read {} KVM exits, of which {} to the VMM, and {} interrupts",
                per_unit(counts.of(pid, KVM_EXIT), reads),
                per_unit(counts.of(pid, KVM_USERSPACE_EXIT), reads),
                per_unit(interrupts, reads),
            );
            let entered = counts.of(pid, KVM_USERSPACE_EXIT);
            let emulated = name == "emulated";
            ensure!(
                emulated == (entered >= reads),
                "{text}: the VMM was entered {entered} times for {reads} reads"
            );
            cells.push((text, reads));
        }
        Ok(cells)
    };
    {
        let namespace = nvme.spare_namespace()?;
        let disk = namespace.disk();
        let drive = format!(
            "if=none,id=sata,format=raw,cache=none,aio=io_uring,file={}",
            disk.display()
        );
        // Reads of what was never written do not reach the disk.
        command::run_line(&format!(
            "dd if=/dev/zero of={} bs=4M count=256 oflag=direct",
            disk.display()
        ))?;
        let mut guest = Guest::on(Vmm::Qemu11)
            .kernel_argument("lab.drivers")
            .arg("-drive")
            .arg(&drive)
            .arg("-device")
            .arg("ide-hd,drive=sata")
            .boot(site)?;
        rows.push(count(&mut guest, ("sda", "ahci"), "emulated")?);
        guest.shut_down()?;
        let blk = Blk::on(disk).arg("--direct").start(site)?;
        let mut guest = Guest::on(Vmm::Ringside).device(&blk).boot(site)?;
        rows.push(count(&mut guest, ("vdb", "virtio1-req"), "vhost-user")?);
        guest.shut_down()?;
        blk.stop(site)?;
    }
    nvme.equip(0, 2, 2)?;
    let mut guest = Guest::on(Vmm::Ringside).vfio(function).boot(site)?;
    // What is read is what was written.
    guest.run_ok_within(
        "fio --name=verify --filename=/dev/nvme0n1 --direct=1 --ioengine=libaio --rw=randwrite --bs=4k \
         --iodepth=8 --size=16M --verify=crc32c --do_verify=1",
        std::time::Duration::from_secs(30),
    )?;
    rows.push(count(&mut guest, ("nvme0n1", "nvme0q1"), "function")?);
    guest.shut_down()?;
    let emulated: Vec<u64> = rows
        .first()
        .into_iter()
        .flatten()
        .map(|(_, reads)| *reads)
        .collect();
    for row in &rows {
        for ((text, reads), base) in row.iter().zip(&emulated) {
            println!(
                "{text}; {} reads/s, {} times those of the emulated disk",
                reads / COUNT_SECONDS,
                per_unit(*reads, *base)
            );
        }
    }
    functions.destroy()
}

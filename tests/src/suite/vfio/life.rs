//! Devices over the life of guests: several at once, reboots, a VMM that is killed, plugging in and out, and a host that wants its
//! device back.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use nix::sys::signal::Signal;
use serde_json::Value;

use super::{HOST, reaches_host};
use crate::command;
use crate::ensure;
use crate::error::{LabError, Result};
use crate::harness::{
    Blk, Control, Daemon, Guest, Igb, Net, NvmePf, Vmm, disk_file, iperf3, iperf3_server,
};
use crate::site::Site;
use crate::suite::Test;

pub(super) const TESTS: &[Test] = &[
    Test {
        name: "vfio::two_guests_and_back_ends",
        seconds: 180,
        run: two_guests_and_back_ends,
    },
    Test {
        name: "vfio::several_functions_in_one_guest",
        seconds: 120,
        run: several_functions_in_one_guest,
    },
    Test {
        name: "vfio::reboot_and_kill",
        seconds: 180,
        run: reboot_and_kill,
    },
    Test {
        name: "vfio::plugged_in_and_out",
        seconds: 120,
        run: plugged_in_and_out,
    },
    Test {
        name: "vfio::taken_back_by_the_host",
        seconds: 90,
        run: taken_back_by_the_host,
    },
    Test {
        name: "vfio::memory_that_is_added",
        seconds: 60,
        run: memory_that_is_added,
    },
];

/// Gives the network interface of a driver in the guest an address, and brings it up. `functions` is a pattern of the driver's
/// devices in sysfs.
fn bring_up(guest: &mut Guest, functions: &str, address: &str) -> Result<()> {
    guest
        .run_ok(&format!(
            "for path in {functions}/net/*; do name=${{path##*/}}; done; \
             ip address add {address} dev $name && ip link set $name up"
        ))
        .map(drop)
}

/// Devices of the driver of the network card's virtual functions.
const IGBVF: &str = "/sys/bus/pci/drivers/igbvf/*";
/// Devices of the driver of virtio network cards.
const VIRTIO_NET: &str = "/sys/bus/virtio/drivers/virtio_net/*";

/// Two guests with a function of the same card each, one of them with a disk and a card of our back-ends, too: TCP between each of
/// them and the host, and from one to the other through the card.
fn two_guests_and_back_ends(site: &Site) -> Result<()> {
    let igb = Igb::take(site)?;
    igb.up(&format!("{HOST}/24"))?;
    let functions = igb.create::<2>(&[])?;
    let [first, second] = functions.addresses();
    let disk = disk_file(site, "disk.img", 64 << 20)?;
    let blk = Blk::on(&disk).start(site)?;
    let net = Net::tap("tap0").address("10.78.0.1/24").start(site)?;
    let _server = iperf3_server(site, None)?;
    let mut one = Guest::on(Vmm::Ringside)
        .device(&blk)
        .device(&net)
        .vfio(first)
        .boot(site)?;
    let mut two = Guest::on(Vmm::Ringside).vfio(second).boot(site)?;
    bring_up(&mut one, IGBVF, "10.77.0.2/24")?;
    bring_up(&mut two, IGBVF, "10.77.0.3/24")?;
    for guest in [&mut one, &mut two] {
        reaches_host(guest)?;
    }
    for (what, guest) in [("first", &mut one), ("second", &mut two)] {
        for (direction, options) in [("to", ""), ("from", "--reverse")] {
            let rate = iperf3(guest, HOST, 3, options)?;
            println!(
                "{what} guest {direction} the host's physical function: {:.0} Mbit/s",
                rate / 1e6
            );
            ensure!(rate > 0.0, "nothing arrived");
        }
    }
    two.run_ok("iperf3 --server --daemon")?;
    let rate = iperf3(&mut one, "10.77.0.3", 3, "")?;
    println!(
        "from one guest's function to the other's: {:.0} Mbit/s",
        rate / 1e6
    );
    ensure!(rate > 0.0, "nothing arrived");
    // The back-ends' devices beside the function.
    one.run_ok(
        "dd if=/dev/urandom of=/tmp/r bs=1M count=4 2>/dev/null && \
         dd if=/tmp/r of=/dev/vdb bs=1M oflag=direct 2>/dev/null && \
         dd if=/dev/vdb bs=1M count=4 iflag=direct 2>/dev/null | cmp - /tmp/r",
    )?;
    bring_up(&mut one, VIRTIO_NET, "10.78.0.2/24")?;
    one.run_ok("ping -c 3 -i 0.2 -W 5 10.78.0.1")?;
    for guest in [one, two] {
        guest.shut_down()?;
    }
    functions.destroy()
}

/// Two network functions and a disk function in one guest.
fn several_functions_in_one_guest(site: &Site) -> Result<()> {
    let igb = Igb::take(site)?;
    igb.up(&format!("{HOST}/24"))?;
    let cards = igb.create::<2>(&[])?;
    let nvme = NvmePf::take(site)?;
    let disks = nvme.create::<1>(&[])?;
    nvme.equip(0, 2, 2)?;
    let mut builder = Guest::on(Vmm::Ringside).diskless();
    for address in cards.addresses().iter().chain(disks.addresses()) {
        builder = builder.vfio(address);
    }
    let mut guest = builder.boot(site)?;
    guest.run_ok(
        "ip address add 10.77.0.2/24 dev eth0 && ip link set eth0 up && \
         ip address add 10.79.0.2/24 dev eth1 && ip link set eth1 up",
    )?;
    command::run_line(&format!(
        "ip address add 10.79.0.1/24 dev {}",
        igb.interface()
    ))?;
    reaches_host(&mut guest)?;
    guest.run_ok("ping -c 3 -i 0.2 -W 5 10.79.0.1")?;
    guest.run_ok(
        "dd if=/dev/urandom of=/tmp/r bs=1M count=2 2>/dev/null && \
         dd if=/tmp/r of=/dev/nvme0n1 bs=1M oflag=direct 2>/dev/null && \
         dd if=/dev/nvme0n1 bs=1M count=2 iflag=direct 2>/dev/null | cmp - /tmp/r",
    )?;
    guest.shut_down()?;
    cards.destroy()?;
    disks.destroy()
}

/// A guest that reboots finds its function as it was; one whose VMM is killed in the middle of DMA leaves it ready for the next.
fn reboot_and_kill(site: &Site) -> Result<()> {
    let igb = Igb::take(site)?;
    igb.up(&format!("{HOST}/24"))?;
    let functions = igb.create::<1>(&[])?;
    let [function] = functions.addresses();
    let mut server = iperf3_server(site, None)?;
    let boot = || -> Result<Guest> {
        let mut guest = Guest::on(Vmm::Ringside).vfio(function).boot(site)?;
        bring_up(&mut guest, IGBVF, "10.77.0.2/24")?;
        reaches_host(&mut guest)?;
        Ok(guest)
    };
    let status = boot()?.end_by("reboot -f")?;
    ensure!(
        status.code() == Some(3),
        "ringside-vmm ended with {status} when the guest rebooted"
    );
    let mut guest = boot()?;
    // Packets are under way when it is killed.
    guest.run_ok(&format!(
        "iperf3 --client {HOST} --time 60 --bidir >/run/iperf.log 2>&1 & sleep 3; kill -0 $!"
    ))?;
    guest.end_by_signal(Signal::SIGKILL)?;
    // This one waits for its client, and serves no other.
    server.stop(site)?;
    let mut guest = boot()?;
    let _server = iperf3_server(site, None)?;
    let rate = iperf3(&mut guest, HOST, 2, "")?;
    ensure!(rate > 0.0, "nothing arrived after the VMM was killed");
    guest.shut_down()?;
    functions.destroy()
}

/// How many devices the VMM has.
fn devices(control: &Control<'_>) -> Result<usize> {
    let answer = control.ask_json(&["device-list"])?;
    let devices = answer.get("devices").and_then(Value::as_array);
    devices.map(Vec::len).ok_or_else(|| LabError::Protocol {
        from: "ringside-ctl",
        text: answer.to_string(),
    })
}

/// Waits until the guest has let go of a device.
fn wait_for(site: &Site, control: &Control<'_>, count: usize) -> Result<()> {
    let limit = site.limit(Duration::from_secs(8));
    let start = std::time::Instant::now();
    while devices(control)? != count {
        if start.elapsed() > limit {
            return Err(LabError::TimedOut {
                what: "the guest to let go of a device".into(),
                limit,
                output: String::new(),
            });
        }
        std::thread::sleep(Duration::from_millis(200));
    }
    Ok(())
}

/// A function is plugged into a running guest, used, unplugged, and plugged in again; one that was there from the start leaves.
fn plugged_in_and_out(site: &Site) -> Result<()> {
    let igb = Igb::take(site)?;
    igb.up(&format!("{HOST}/24"))?;
    let functions = igb.create::<2>(&[])?;
    let [cold, hot] = functions.addresses();
    let control = Control::new(site, "api.sock");
    let mut guest = Guest::on(Vmm::Ringside)
        .diskless()
        .vfio(cold)
        .arg(&format!("--api-socket={}", control.socket().display()))
        .boot(site)?;
    guest.network_up("10.77.0.2/24")?;
    reaches_host(&mut guest)?;
    for round in 0..2 {
        control.ask(&["device-add", &format!("{hot},id=hot")])?;
        let again = control.ask(&["device-add", hot]);
        ensure!(
            again.is_err(),
            "the guest was given the same function twice"
        );
        guest.run_ok(
            "tries=0; until [ -e /sys/class/net/eth1 ]; do tries=$((tries + 1)); \
             [ $tries -lt 100 ] || exit 1; sleep 0.1; done; \
             ip address add 10.79.0.2/24 dev eth1 && ip link set eth1 up",
        )?;
        if round == 0 {
            command::run_line(&format!(
                "ip address add 10.79.0.1/24 dev {}",
                igb.interface()
            ))?;
        }
        guest.run_ok(
            "tries=0; until ping -c 1 -W 1 10.79.0.1 || [ $tries = 30 ]; do tries=$((tries + 1)); done; \
             ping -c 3 -i 0.2 -W 5 10.79.0.1",
        )?;
        ensure!(devices(&control)? == 2, "two devices are not listed");
        control.ask(&["device-remove", "hot"])?;
        wait_for(site, &control, 1)?;
        guest.run_ok("[ ! -e /sys/class/net/eth1 ]")?;
    }
    // The host has it back.
    command::run(
        site.program("ringside-vfio").args(["unbind", hot]),
        site.limit(Duration::from_secs(5)),
    )?;
    reaches_host(&mut guest)?;
    control.ask(&["device-remove", cold])?;
    wait_for(site, &control, 0)?;
    guest.run_ok("[ ! -e /sys/class/net/eth0 ]")?;
    guest.shut_down()?;
    functions.destroy()
}

/// The host unbinds a function that a guest uses: the guest is asked for it, and lets go; from one that cannot, the function is
/// taken. Both guests live on.
fn taken_back_by_the_host(site: &Site) -> Result<()> {
    let igb = Igb::take(site)?;
    igb.up(&format!("{HOST}/24"))?;
    let functions = igb.create::<1>(&[])?;
    let [function] = functions.addresses();
    for (kernel, what) in [
        ("", "asked to let go"),
        ("pcie_ports=compat", "it is taken away"),
    ] {
        let mut guest = Guest::on(Vmm::Ringside)
            .diskless()
            .kernel_argument(kernel)
            .vfio(function)
            .boot(site)?;
        guest.network_up("10.77.0.2/24")?;
        reaches_host(&mut guest)?;
        let mut unbinding = Command::new("sh");
        unbinding.args([
            "-c",
            &format!("echo {function} >/sys/bus/pci/drivers/vfio-pci/unbind"),
        ]);
        // The write ends when the device is free.
        let mut unbinding = Daemon::start(site, "unbind", unbinding)?;
        let status = unbinding.wait(site.limit(Duration::from_secs(10)))?;
        ensure!(
            status.success(),
            "the host cannot unbind {function}: {status}"
        );
        let bound = Path::new("/sys/bus/pci/devices")
            .join(function)
            .join("driver");
        ensure!(!bound.exists(), "{function} is still bound");
        let log = guest.vmm_log();
        ensure!(log.contains(what), "the VMM does not say `{what}`:\n{log}");
        guest.run_ok("uname -a")?;
        guest.shut_down()?;
        command::run(
            site.program("ringside-vfio").args(["bind", function]),
            site.limit(Duration::from_secs(5)),
        )?;
    }
    functions.destroy()
}

/// A guest gets more memory while it runs: its passed-through disk and that of a back-end read into it, by DMA and by mapping.
fn memory_that_is_added(site: &Site) -> Result<()> {
    /// Of each disk: both together are more than the guest has at first.
    const MIB: u32 = 160;
    let nvme = NvmePf::take(site)?;
    let functions = nvme.create::<1>(&[])?;
    let [function] = functions.addresses();
    nvme.equip(0, 2, 2)?;
    let disk = disk_file(site, "disk.img", u64::from(MIB) << 20)?;
    let blk = Blk::on(&disk).start(site)?;
    let control = Control::new(site, "api.sock");
    let mut guest = Guest::on(Vmm::Ringside)
        .diskless()
        .memory("256M,max=1G")
        .kernel_argument("memhp_default_state=online")
        .device(&blk)
        .vfio(function)
        .arg(&format!("--api-socket={}", control.socket().display()))
        .boot(site)?;
    let memory = |guest: &mut Guest| -> Result<u64> {
        let text = guest.run_ok("grep MemTotal /proc/meminfo")?;
        let number = text.split_whitespace().nth(1);
        number
            .and_then(|number| number.parse().ok())
            .ok_or(LabError::Protocol {
                from: "guest agent",
                text,
            })
    };
    let before = memory(&mut guest)?;
    control.ask(&["memory-add", "512M"])?;
    guest.run_ok(
        "tries=0; until [ $(sed -n 's/MemTotal: *//; s/ kB//p; q' /proc/meminfo) -gt 600000 ]; do \
         tries=$((tries + 1)); [ $tries -lt 50 ] || exit 1; sleep 0.1; done",
    )?;
    let after = memory(&mut guest)?;
    println!("the guest has {after} kB, {before} kB before");
    // The root is limited to half of what there was at first.
    guest.run_ok("mount -t tmpfs -o size=400M tmpfs /tmp")?;
    for disk in ["nvme0n1", "vda"] {
        guest.run_ok_within(
            &format!(
                "dd if=/dev/urandom of=/dev/{disk} bs=1M count=16 2>/dev/null; \
                 dd if=/dev/{disk} of=/tmp/{disk} bs=1M count={MIB} iflag=direct 2>/dev/null && \
                 sync && echo 1 >/proc/sys/vm/drop_caches && \
                 cmp -n $(({MIB} << 20)) /tmp/{disk} /dev/{disk}"
            ),
            Duration::from_secs(30),
        )?;
    }
    let refused = control.ask(&["memory-add", "512M"]);
    ensure!(
        refused.is_err(),
        "the guest was given more than it can have"
    );
    guest.shut_down()?;
    blk.stop(site)?;
    functions.destroy()
}

//! The demonstration: a Debian guest on our VMM, its disk and network from our back-ends, measured from inside it.

use std::io::Write;
use std::time::Duration;

use crate::error::{Doing, LabError, Result};
use crate::harness::{Blk, Guest, Namespace, Net, Vmm, disk_file, iperf3, iperf3_server};
use crate::site::{Place, Site};

/// Size of the disk that is measured.
const DISK_SIZE: u64 = 1 << 30;
/// Length of one measurement.
const SECONDS: u64 = 5;
/// This side of the guest's network.
const NEAR: &str = "10.77.0.1";
/// The guest.
const GUEST: &str = "10.77.0.2";
/// A machine beyond this side, reached by forwarding.
const BEYOND: &str = "10.78.0.2";

/// Runs the demonstration; in namespaces of its own, like a test.
///
/// # Errors
/// Fails if a program does not come up, or a measurement fails.
pub fn run(site: &Site) -> Result<()> {
    let say = |text: String| {
        let mut out = std::io::stdout();
        out.write_all(text.as_bytes())
            .and_then(|()| out.flush())
            .doing(|| "show a result".into())
    };
    let machine = match site.place {
        Place::Host => "this machine",
        Place::Lab => "the lab VM (software emulation: figures compare with each other only)",
    };
    say(format!(
        "Back-ends, VMM and guest run on the KVM of {machine}.\n"
    ))?;
    let disk = disk_file(site, "demo.img", DISK_SIZE)?;
    let mut blk = Blk::on(&disk).queues(2).arg("--direct").start(site)?;
    let mut net = Net::tap("demo0")
        .address(&format!("{NEAR}/24"))
        .start(site)?;
    let beyond = Namespace::create(site, "beyond", "10.78.0.1/24", &format!("{BEYOND}/24"))?;
    Namespace::forward()?;
    let _near_server = iperf3_server(site, None)?;
    let _far_server = iperf3_server(site, Some(&beyond))?;
    let mut guest = Guest::on(Vmm::Ringside)
        .cpus(2)
        .memory("1G")
        .device(&blk)
        .device(&net)
        .boot(site)?;
    say(format!(
        "ringside-vmm is process {}, ringside-blk {}, ringside-net {}.\n",
        guest.vmm_pid(),
        blk.daemon().pid(),
        net.daemon().pid()
    ))?;
    let interface = guest.network_up(&format!("{GUEST}/24"))?;
    guest.run_ok(&format!("ip route add default via {NEAR}"))?;
    say(format!("\n$ uname -a\n{}", guest.run_ok("uname -a")?))?;
    say(format!(
        "\n$ lsblk\n{}",
        guest.run_ok("lsblk -o NAME,SIZE,TYPE,RO,MOUNTPOINTS,DISC-MAX")?
    ))?;
    // What no driver of this kind has is of no interest.
    let offloads = format!(
        "ethtool -k {interface} | grep -E 'checksum|segmentation|receive' | grep -v 'off \\[fixed\\]'"
    );
    say(format!(
        "\n$ ethtool -k {interface}\n{}\n",
        guest.run_ok(&offloads)?
    ))?;

    say(format!(
        "{:<44}{:>14}{:>14}\n",
        "fio, in the guest, on /dev/vdb", "operations/s", "MB/s"
    ))?;
    for (what, options) in [
        (
            "128 KiB sequential write, depth 16",
            "--rw=write --bs=128k --iodepth=16",
        ),
        (
            "128 KiB sequential read, depth 16",
            "--rw=read --bs=128k --iodepth=16",
        ),
        (
            "4 KiB random read, depth 1",
            "--rw=randread --bs=4k --iodepth=1",
        ),
        (
            "4 KiB random read, depth 32",
            "--rw=randread --bs=4k --iodepth=32",
        ),
        (
            "4 KiB random write, depth 32",
            "--rw=randwrite --bs=4k --iodepth=32",
        ),
    ] {
        let (operations, bytes) = fio(&mut guest, options)?;
        say(format!(
            "{what:<44}{operations:>14.0}{:>14.1}\n",
            bytes / 1e6
        ))?;
    }
    say(format!(
        "\n{:<44}{:>14}\n",
        "iperf3, TCP, in the guest", "Mbit/s"
    ))?;
    for (what, server, options) in [
        ("guest to host", NEAR, ""),
        ("host to guest", NEAR, "--reverse"),
        ("guest to beyond the host", BEYOND, ""),
        ("beyond the host to guest", BEYOND, "--reverse"),
    ] {
        let bits = iperf3(&mut guest, server, SECONDS, options)?;
        say(format!("{what:<44}{:>14.0}\n", bits / 1e6))?;
    }
    let status = guest.shut_down()?;
    say(format!(
        "\nThe guest powered itself off; ringside-vmm ended with {status}.\n"
    ))
}

/// Runs fio on the guest's second disk; gives operations and bytes per second.
fn fio(guest: &mut Guest, options: &str) -> Result<(f64, f64)> {
    let line = format!(
        "fio --name=demo --filename=/dev/vdb --direct=1 --ioengine=libaio --time_based \
         --runtime={SECONDS} --output-format=json {options}"
    );
    let text = guest.run_ok_within(&line, Duration::from_secs(SECONDS + 15))?;
    let damaged = || LabError::Protocol {
        from: "fio",
        text: text.clone(),
    };
    // Notes may come before the JSON.
    let json = text
        .get(text.find('{').ok_or_else(damaged)?..)
        .unwrap_or_default();
    let result: serde_json::Value = serde_json::from_str(json).map_err(|_| damaged())?;
    let job = result.pointer("/jobs/0").ok_or_else(damaged)?;
    let sum = |key: &str| -> f64 {
        ["read", "write"]
            .iter()
            .filter_map(|direction| job.get(direction)?.get(key)?.as_f64())
            .sum()
    };
    Ok((sum("iops"), sum("bw_bytes")))
}

//! Network cards served by ringside-net.

use super::Test;
use crate::ensure;
use crate::error::Result;
use crate::harness::{Guest, Net, Vmm, iperf3, iperf3_server};
use crate::site::Site;

pub(super) const TESTS: &[Test] = &[
    Test {
        name: "net::tcp_both_ways",
        seconds: 120,
        run: |site| tcp_both_ways(site, Vmm::Ringside),
    },
    Test {
        name: "net::tcp_under_qemu_10",
        seconds: 120,
        run: |site| tcp_both_ways(site, Vmm::Qemu10),
    },
    Test {
        name: "net::tcp_under_qemu_11",
        seconds: 120,
        run: |site| tcp_both_ways(site, Vmm::Qemu11),
    },
];

/// Bulk TCP each way, with the offloads that the guest's driver turns on by itself.
fn tcp_both_ways(site: &Site, vmm: Vmm) -> Result<()> {
    let net = Net::tap("tap0").address("10.77.0.1/24").start(site)?;
    let _server = iperf3_server(site, None)?;
    let mut guest = Guest::on(vmm).cpus(2).device(&net).boot(site)?;
    let interface = guest.network_up("10.77.0.2/24")?;
    guest.run_ok("ping -c 3 -i 0.2 -W 5 10.77.0.1")?;
    let features = guest.run_ok(&format!("ethtool -k {interface}"))?;
    ensure!(
        features.contains("tcp-segmentation-offload: on"),
        "TSO is off:\n{features}"
    );
    for (what, options) in [("guest to host", ""), ("host to guest", "--reverse")] {
        let rate = iperf3(&mut guest, "10.77.0.1", 3, options)?;
        println!("{what}: {:.0} Mbit/s", rate / 1e6);
        ensure!(rate > 0.0, "nothing arrived, {what}");
    }
    guest.shut_down()?;
    let status = net.stop(site)?;
    ensure!(
        status.success(),
        "ringside-net ended with {status} on SIGTERM"
    );
    Ok(())
}

//! `dpdk-testpmd` of the lab's root, as a front-end or as a back-end.

use std::process::Command;

use crate::command::bound;
use crate::site::Site;

/// Below the root: the program, and the drivers that are needed of all that DPDK has.
const PROGRAM: &str = "usr/bin/dpdk-testpmd";
const DRIVERS: &str = "usr/lib/x86_64-linux-gnu/dpdk/pmds-25.0";
const NEEDED: [&str; 4] = [
    "librte_bus_vdev.so.25",
    "librte_mempool_ring.so.25",
    "librte_net_vhost.so.25",
    "librte_net_virtio.so.25",
];

/// A command that forwards on `devices`, with the first of `processors` for that, and the other one for all the rest.
pub(super) fn command(
    site: &Site,
    name: &str,
    devices: &[String],
    mode: &str,
    frame: u32,
    processors: Option<(usize, usize)>,
) -> Command {
    let program = site.root_program(PROGRAM);
    let mut command = bound(program.get_program());
    command.args(program.get_args());
    let (forwarding, main) = processors.unwrap_or((1, 0));
    command.arg("-l").arg(format!("{main},{forwarding}"));
    command.arg("--main-lcore").arg(main.to_string());
    // Neither huge pages nor hardware; what belongs to one process of DPDK goes by its prefix.
    command.args(["--no-huge", "-m", "512", "--no-pci", "--no-telemetry"]);
    command.args(["--log-level", "lib.vhost.config:error"]);
    command.arg("--file-prefix").arg(format!("ringside-{name}"));
    for driver in NEEDED {
        command.arg("-d").arg(site.root.join(DRIVERS).join(driver));
    }
    for device in devices {
        command.arg(format!("--vdev={device}"));
    }
    command.args(["--", "--total-num-mbufs=16384", "--no-mlockall"]);
    command.args(["--auto-start", "--stats-period", "1"]);
    command.arg(format!("--forward-mode={mode}"));
    command.arg(format!("--txpkts={frame}"));
    command
}

/// Frames a second that it received and sent: the last ones that it showed.
pub(super) fn rates(text: &str) -> Option<(f64, f64)> {
    let last = |name: &str| {
        text.lines()
            .filter_map(|line| line.split_once(name)?.1.split_whitespace().next())
            .filter_map(|word| word.parse().ok())
            .next_back()
    };
    Some((last("Rx-pps:")?, last("Tx-pps:")?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_rates_count() {
        let text = "  Rx-pps:            0          Rx-bps:            0\n  Tx-pps:        46456   x\n\
            Rx-pps: 7 Rx-bps: 1\nTx-pps: 12345 Tx-bps: 2\n";
        assert_eq!(rates(text), Some((7.0, 12345.0)));
        assert_eq!(rates("Rx-pps: 7\n"), None);
    }
}

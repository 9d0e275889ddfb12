//! `dpdk-testpmd` of the lab's root, as a front-end or as a back-end.

use std::fs::{self, File};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::command::{GRACE, bound, end_tree, wait_for};
use crate::error::{Doing, LabError, Result};
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
#[must_use]
pub fn testpmd(
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

/// One that runs. It ends when dropped.
#[derive(Debug)]
pub struct Testpmd {
    child: Child,
    log: PathBuf,
}

impl Testpmd {
    /// Starts it, with what it writes in a file.
    ///
    /// # Errors
    /// Fails if it cannot be started.
    pub fn start(mut command: Command, log: PathBuf) -> Result<Self> {
        let doing = || format!("write {}", log.display());
        let file = File::create(&log).doing(doing)?;
        let errors = file.try_clone().doing(doing)?;
        // It may end when its standard input does.
        let child = command
            .stdin(Stdio::piped())
            .stdout(file)
            .stderr(errors)
            .spawn()
            .doing(|| "run dpdk-testpmd".into())?;
        Ok(Self { child, log })
    }

    /// All that it has written.
    ///
    /// # Errors
    /// Fails if that cannot be read.
    pub fn text(&self) -> Result<String> {
        fs::read_to_string(&self.log).doing(|| format!("read {}", self.log.display()))
    }

    /// Has it end in order; gives all that it has written, which ends with its counts.
    ///
    /// # Errors
    /// Fails if it does not.
    pub fn end(mut self, limit: Duration) -> Result<String> {
        let pid = Pid::from_raw(i32::try_from(self.child.id()).unwrap_or(i32::MAX));
        kill(pid, Signal::SIGINT)
            .map_err(std::io::Error::from)
            .doing(|| "interrupt dpdk-testpmd".into())?;
        let ended = wait_for(&mut self.child, limit)?;
        let text = self.text()?;
        match ended {
            Some(_) => Ok(text),
            None => Err(LabError::TimedOut {
                what: "the end of dpdk-testpmd".into(),
                limit,
                output: text,
            }),
        }
    }
}

impl Drop for Testpmd {
    fn drop(&mut self) {
        end_tree(&mut self.child, GRACE);
    }
}

/// The last number that it showed behind a name, such as `Rx-pps:`.
#[must_use]
pub fn last_shown(text: &str, name: &str) -> Option<f64> {
    text.lines()
        .filter_map(|line| line.split_once(name)?.1.split_whitespace().next())
        .filter_map(|word| word.parse().ok())
        .next_back()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_number_counts() {
        let text = "  Rx-pps:            0          Rx-bps:            0\n  Tx-pps:        46456   x\n\
            Rx-pps: 7 Rx-bps: 1\nTx-pps: 12345 Tx-bps: 2\n";
        assert_eq!(last_shown(text, "Rx-pps:"), Some(7.0));
        assert_eq!(last_shown(text, "Tx-pps:"), Some(12345.0));
        assert_eq!(last_shown("Rx-pps: 7\n", "Tx-pps:"), None);
    }
}

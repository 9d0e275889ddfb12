//! Networks around a guest: namespaces beyond the test's own, and iperf3.

use std::ffi::OsStr;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use super::daemon::{Daemon, fresh_name};
use super::guest::Guest;
use crate::command;
use crate::error::{LabError, Result};
use crate::site::Site;

/// How long a server may take to listen, on plain hardware.
const LISTEN_LIMIT: Duration = Duration::from_secs(5);

/// A network namespace joined to the test's own by a pair of virtual Ethernet interfaces. It lives as long as the process that holds it.
#[derive(Debug)]
pub struct Namespace {
    holder: Daemon,
}

impl Namespace {
    /// Creates it; `near` and `far` are the addresses (with prefix length) of the pair's two ends, and far's default route is near.
    ///
    /// # Errors
    /// Fails if one of the steps does.
    pub fn create(site: &Site, name: &str, near: &str, far: &str) -> Result<Self> {
        let mut holding = Command::new("unshare");
        holding.args(["--net", "sleep", "infinity"]);
        let mut holder = Daemon::start(site, name, holding)?;
        let pid = holder.pid();
        let own = std::fs::read_link("/proc/self/ns/net").ok();
        holder.wait_until("its namespace", site.limit(LISTEN_LIMIT), || {
            let other = std::fs::read_link(format!("/proc/{pid}/ns/net")).ok();
            other.is_some() && other != own
        })?;
        let namespace = Self { holder };
        command::run_line(&format!(
            "ip link add {name} type veth peer name eth0 netns {pid}"
        ))?;
        command::run_line(&format!("ip address add {near} dev {name}"))?;
        command::run_line(&format!("ip link set {name} up"))?;
        let gateway = near.split('/').next().unwrap_or(near);
        for line in [
            "ip link set lo up".to_owned(),
            format!("ip address add {far} dev eth0"),
            "ip link set eth0 up".to_owned(),
            format!("ip route add default via {gateway}"),
        ] {
            namespace.run_line(&line)?;
        }
        Ok(namespace)
    }

    /// Lets the test's own namespace forward packets between its interfaces.
    ///
    /// # Errors
    /// Fails if the kernel does not allow it.
    pub fn forward() -> Result<()> {
        command::run_line("sysctl -q -w net.ipv4.ip_forward=1").map(drop)
    }

    /// A command that runs another in the namespace.
    #[must_use]
    pub fn enter(&self, command: &Command) -> Command {
        let mut entering = Command::new("nsenter");
        entering
            .arg(format!("--net=/proc/{}/ns/net", self.holder.pid()))
            .arg(command.get_program())
            .args(command.get_args());
        entering
    }

    /// As [`command::run_line`], in the namespace.
    ///
    /// # Errors
    /// As [`command::run_line`].
    pub fn run_line(&self, line: &str) -> Result<String> {
        command::run_line(&format!(
            "nsenter --net=/proc/{}/ns/net {line}",
            self.holder.pid()
        ))
    }
}

/// Records the headers of what passes an interface of the test's own namespace.
#[derive(Debug)]
pub struct Capture {
    tcpdump: Daemon,
    file: PathBuf,
}

impl Capture {
    /// Starts to record.
    ///
    /// # Errors
    /// Fails if tcpdump does.
    pub fn start(site: &Site, interface: &str) -> Result<Self> {
        let file = site
            .scratch
            .join(fresh_name(site, &format!("capture-{interface}"), "pcap"));
        let mut command = site.root_program("usr/bin/tcpdump");
        // Root stays root: the file is in a directory of its own.
        command.args(["-Z", "root", "-s", "96", "-i", interface, "-w"]);
        command.arg(&file);
        let mut tcpdump = Daemon::start(site, "tcpdump", command)?;
        tcpdump.wait_until("it listens", site.limit(LISTEN_LIMIT), || {
            // It is created when the recording has begun.
            file.exists()
        })?;
        Ok(Self { tcpdump, file })
    }

    /// Ends the recording; counts the packets that match each of the filters (pcap-filter(7)).
    ///
    /// # Errors
    /// Fails if tcpdump does.
    pub fn count<const N: usize>(
        mut self,
        site: &Site,
        filters: [impl AsRef<OsStr>; N],
    ) -> Result<[u64; N]> {
        self.tcpdump.stop(site)?;
        let mut counts = [0; N];
        for (count, filter) in counts.iter_mut().zip(filters) {
            let mut command = site.root_program("usr/bin/tcpdump");
            command.arg("-r").arg(&self.file).arg("--count").arg(filter);
            let text = command::run(&mut command, site.limit(Duration::from_secs(20)))?;
            // "N packets", or "1 packet".
            *count = text
                .split_whitespace()
                .next()
                .and_then(|word| word.parse().ok())
                .ok_or(LabError::Protocol {
                    from: "tcpdump",
                    text,
                })?;
        }
        Ok(counts)
    }
}

/// Starts an iperf3 server, in a namespace or in the test's own.
///
/// # Errors
/// Fails if it does not come to listen.
pub fn iperf3_server(site: &Site, namespace: Option<&Namespace>) -> Result<Daemon> {
    let mut command = site.root_program("usr/bin/iperf3");
    command.args(["--server", "--forceflush"]);
    if let Some(namespace) = namespace {
        command = namespace.enter(&command);
    }
    let mut server = Daemon::start(site, "iperf3", command)?;
    let pid = server.pid();
    server.wait_until("it listens", site.limit(LISTEN_LIMIT), || {
        // Port 5201 (0x1451) in state LISTEN (0A), of the namespace that process is in.
        ["tcp", "tcp6"].iter().any(|file| {
            std::fs::read_to_string(format!("/proc/{pid}/net/{file}"))
                .is_ok_and(|table| table.contains(":1451 0") && table.contains(" 0A "))
        })
    })?;
    Ok(server)
}

/// Runs an iperf3 client in the guest; gives bit/s as received. `options` are more of its arguments.
///
/// # Errors
/// Fails if iperf3 does, or gives no result.
pub fn iperf3(guest: &mut Guest, server: &str, seconds: u64, options: &str) -> Result<f64> {
    let line = format!("iperf3 --client {server} --time {seconds} --json {options}");
    let text = guest.run_ok_within(&line, Duration::from_secs(seconds + 15))?;
    let result: serde_json::Value =
        serde_json::from_str(&text).map_err(|_| LabError::Protocol {
            from: "iperf3",
            text: text.clone(),
        })?;
    result
        .pointer("/end/sum_received/bits_per_second")
        .and_then(serde_json::Value::as_f64)
        .ok_or(LabError::Protocol {
            from: "iperf3",
            text,
        })
}

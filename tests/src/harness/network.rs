//! Networks around a guest: namespaces beyond the test's own, and iperf3.

use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::net::{Ipv4Addr, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::Duration;

use nix::sched::{CloneFlags, setns};

use super::daemon::{Daemon, fresh_name};
use super::guest::Guest;
use crate::command::{self, bound};
use crate::error::{Doing, LabError, Result};
use crate::site::Site;

/// How long a server may take to listen, on plain hardware.
const LISTEN_LIMIT: Duration = Duration::from_secs(5);

/// A network namespace, joined to the test's own by a pair of virtual Ethernet interfaces or by what is put into it. It lives as long as the process that holds it.
#[derive(Debug)]
pub struct Namespace {
    holder: Daemon,
}

impl Namespace {
    /// Creates it, joined to nothing.
    ///
    /// # Errors
    /// Fails if there is none for this process to have.
    pub fn alone(site: &Site, name: &str) -> Result<Self> {
        let mut holding = bound("unshare");
        holding.args(["--net", "sleep", "infinity"]);
        let mut holder = Daemon::start(site, name, holding)?;
        let pid = holder.pid();
        let own = std::fs::read_link("/proc/self/ns/net").ok();
        holder.wait_until("its namespace", site.limit(LISTEN_LIMIT), || {
            let other = std::fs::read_link(format!("/proc/{pid}/ns/net")).ok();
            other.is_some() && other != own
        })?;
        Ok(Self { holder })
    }

    /// Moves an interface of the test's own namespace into it.
    ///
    /// # Errors
    /// Fails if there is no such interface.
    pub fn take(&self, interface: &str) -> Result<()> {
        let pid = self.holder.pid();
        command::run_line(&format!("ip link set {interface} netns {pid}")).map(drop)
    }

    /// Creates it; `near` and `far` are the addresses (with prefix length) of the pair's two ends, and far's default route is near.
    ///
    /// # Errors
    /// Fails if one of the steps does.
    pub fn create(site: &Site, name: &str, near: &str, far: &str) -> Result<Self> {
        let namespace = Self::alone(site, name)?;
        let pid = namespace.holder.pid();
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

    /// Does something on a thread in the namespace: sockets that it opens belong there.
    ///
    /// # Errors
    /// Fails if the namespace cannot be entered, or as `act` does.
    pub fn within<T: Send>(&self, act: impl FnOnce() -> io::Result<T> + Send) -> Result<T> {
        let path = format!("/proc/{}/ns/net", self.holder.pid());
        let doing = || format!("work in the namespace {path}");
        let entered = || {
            let namespace = File::open(&path)?;
            setns(namespace, CloneFlags::CLONE_NEWNET)?;
            act()
        };
        thread::scope(|scope| scope.spawn(entered).join())
            .unwrap_or_else(|_| Err(io::Error::other("the thread panicked")))
            .doing(doing)
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

/// Makes the bridge br0, at 10.77.0.1, with an address of its own: one of its ports' would change when they come and go, and guests
/// have it in their neighbour tables.
///
/// # Errors
/// Fails if one of the steps does.
pub fn bridge() -> Result<()> {
    for line in [
        "ip link add br0 address 52:54:00:77:00:01 type bridge",
        "ip address add 10.77.0.1/24 dev br0",
        "ip link set br0 up",
    ] {
        command::run_line(line)?;
    }
    Ok(())
}

/// Records the headers of what passes an interface of the test's own namespace.
#[derive(Debug)]
pub struct Capture {
    /// What writes it, if that is still at work.
    tcpdump: Option<Daemon>,
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
        Ok(Self {
            tcpdump: Some(tcpdump),
            file,
        })
    }

    /// A file that somebody else has written.
    #[must_use]
    pub fn of(file: PathBuf) -> Self {
        let tcpdump = None;
        Self { tcpdump, file }
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
        if let Some(tcpdump) = &mut self.tcpdump {
            tcpdump.stop(site)?;
        }
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

/// Starts a server of HTTP, in a namespace, for the files of a directory.
///
/// # Errors
/// Fails if it does not come to listen.
pub fn http_server(site: &Site, namespace: &Namespace, directory: &Path) -> Result<Daemon> {
    let mut command = site.root_program("usr/bin/busybox");
    command
        .args(["httpd", "-f", "-p", "80", "-h"])
        .arg(directory);
    let mut server = Daemon::start(site, "httpd", namespace.enter(&command))?;
    let pid = server.pid();
    server.wait_until("it listens", site.limit(LISTEN_LIMIT), || listens(pid, 80))?;
    Ok(server)
}

/// Answers questions of DNS for the address of any name, in a namespace, with one address, as long as the test runs.
///
/// # Errors
/// Fails if its port cannot be had.
pub fn name_server(namespace: &Namespace, address: Ipv4Addr) -> Result<()> {
    let socket = namespace.within(|| UdpSocket::bind(("0.0.0.0", 53)))?;
    thread::spawn(move || {
        let mut question = [0; 512];
        while let Ok((len, peer)) = socket.recv_from(&mut question) {
            let asked = question.get(..len).unwrap_or_default();
            if let Some(answer) = dns_answer(asked, address) {
                // Who does not get it asks again.
                let _ = socket.send_to(&answer, peer);
            }
        }
    });
    Ok(())
}

/// The answer to a question with one name (RFC 1035, 4.1): the address if it asks for one of IPv4, else nothing.
fn dns_answer(question: &[u8], address: Ipv4Addr) -> Option<Vec<u8>> {
    let (header, rest) = question.split_first_chunk::<12>()?;
    let name = rest.iter().position(|byte| *byte == 0)?;
    // The name with its end, the type and the class.
    let asked = rest.get(..name + 5)?;
    let count = u8::from(asked.get(name + 1..name + 3)? == [0, 1]);
    let [id0, id1, ..] = *header;
    // A response, without error.
    let mut answer = vec![id0, id1, 0x81, 0x80, 0, 1, 0, count, 0, 0, 0, 0];
    answer.extend(asked);
    if count == 1 {
        // The name again, type A, class IN, for a minute, four bytes.
        answer.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4]);
        answer.extend(address.octets());
    }
    Some(answer)
}

/// A process's network namespace has a TCP socket that listens on this port.
fn listens(pid: u32, port: u16) -> bool {
    let local = format!(":{port:04X} 0");
    ["tcp", "tcp6"].iter().any(|file| {
        // In state LISTEN (0A).
        std::fs::read_to_string(format!("/proc/{pid}/net/{file}"))
            .is_ok_and(|table| table.contains(&local) && table.contains(" 0A "))
    })
}

/// Starts an iperf3 server, in a namespace or in the test's own.
///
/// # Errors
/// Fails if it does not come to listen.
pub fn iperf3_server(site: &Site, namespace: Option<&Namespace>) -> Result<Daemon> {
    let program = site.root_program("usr/bin/iperf3");
    let mut command = bound(program.get_program());
    command.args(program.get_args());
    command.args(["--server", "--forceflush"]);
    if let Some(namespace) = namespace {
        command = namespace.enter(&command);
    }
    let mut server = Daemon::start(site, "iperf3", command)?;
    let pid = server.pid();
    server.wait_until("it listens", site.limit(LISTEN_LIMIT), || {
        listens(pid, 5201)
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

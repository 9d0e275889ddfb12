//! The program `ringside-ctl`: its command line, and how it shows answers.

use std::ffi::OsString;
use std::io::{self, Write};
use std::path::PathBuf;

use clap::{Parser, Subcommand};
use serde_json::{Map, Value, json};

use crate::client;
use crate::options::keys_and_values;

/// Exit status: the request was granted.
const GRANTED: u8 = 0;
/// Exit status: it was not.
const REFUSED: u8 = 1;
/// Exit status: the command line is wrong.
const USAGE: u8 = 2;

const AFTER_HELP: &str = "\
Exit status: 0 when the request was granted, 1 when it was not, 2 when the command line is wrong.

Examples, for `ringside-vmm --api-socket /run/vm.sock`:
  ringside-ctl --socket /run/vm.sock device-add 0000:01:10.0
  ringside-ctl --socket /run/vm.sock device-add 0000:01:10.2,id=nic
  ringside-ctl --socket /run/vm.sock device-list
  ringside-ctl --socket /run/vm.sock device-remove nic
  ringside-ctl --socket /run/vm.sock device-remove nic --force    the guest did not let go of it
  ringside-ctl --socket /run/vm.sock memory-add 512M
  ringside-ctl --socket /run/vm.sock snapshot before-update
  ringside-ctl --socket /run/vm.sock migrate unix:/run/vm.move

Examples, for `ringside-blk --control-socket /run/disk.ctl`:
  ringside-ctl --socket /run/disk.ctl status
  ringside-ctl --socket /run/disk.ctl resize 20G
  ringside-ctl --socket /run/disk.ctl limits iops=2000,bandwidth=100M
  ringside-ctl --socket /run/disk.ctl limits iops=0,bandwidth=0    no limits any more
  ringside-ctl --socket /run/disk.ctl drain --timeout 10 && cp disk.img copy.img
  ringside-ctl --socket /run/disk.ctl resume
  curl --unix-socket /run/disk.ctl http://localhost/metrics

Examples, for `ringside-net --port ... --control-socket /run/switch.ctl`:
  ringside-ctl --socket /run/switch.ctl port-list
  ringside-ctl --socket /run/switch.ctl port-add /run/vm3.sock,name=vm3,vlan=7
  ringside-ctl --socket /run/switch.ctl port-limits vm3 tx-bytes=100M,rx-bytes=100M
  ringside-ctl --socket /run/switch.ctl port-link vm3 down
  ringside-ctl --socket /run/switch.ctl port-remove vm3
  ringside-ctl --socket /run/switch.ctl addresses

The protocol is one JSON object in each line, both ways:
  {\"id\": 1, \"command\": \"device-add\", \"arguments\": {\"host\": \"0000:01:10.0\"}}
  {\"id\": 1, \"result\": {\"id\": \"0000:01:10.0\"}}
  {\"id\": 2, \"error\": {\"code\": \"conflict\", \"message\": \"...\"}}";

/// Sends one request to the control socket of a Ringside program, and shows the answer.
///
/// ringside-vmm listens with --api-socket, back-ends with --control-socket.
#[derive(Debug, Parser)]
#[command(name = "ringside-ctl", version, max_term_width = 100, after_help = AFTER_HELP)]
struct Cli {
    /// The program's control socket.
    #[arg(long, value_name = "PATH")]
    socket: PathBuf,

    /// Prints the answer as JSON.
    #[arg(long)]
    json: bool,

    /// What to ask for.
    #[command(subcommand)]
    request: Request,
}

#[derive(Debug, Subcommand)]
enum Request {
    /// All: shows what the program is and does.
    Status,
    /// Back-ends: shows what has been counted.
    Stats,
    /// Back-ends: shows the same in Prometheus's text format.
    Metrics,
    /// Back-ends: ends it, as SIGTERM does.
    Quit,
    /// Disk: gives it another size, or looks at its size again.
    Resize {
        /// The new size, such as 20G, of an image file; without it, the size that the disk has by now is told to the guest.
        size: Option<String>,
        /// Lets an image become smaller: what lies behind its new end is lost.
        #[arg(long, requires = "size")]
        shrink: bool,
    },
    /// Disk, network: sets limits of rates, and shows them.
    Limits {
        /// Those to change, as for --limit of ringside-blk or ringside-net; 0 takes a limit away.
        #[arg(value_name = "KEY=VALUE,...", value_parser = limits)]
        limits: Option<Arguments>,
    },
    /// Disk: takes no more requests, and waits until those under way have ended and are durable.
    Drain {
        /// Gives up, and lets the disk go on, after so many seconds.
        #[arg(long, value_name = "SECONDS", default_value_t = 30)]
        timeout: u32,
    },
    /// Disk: takes requests again, after `drain`. VMM: lets the guest go on, after `pause`.
    Resume,
    /// Network: asks the guest to make itself known to the network.
    Announce,
    /// Network: plugs the guest's cable in, or pulls it out: no frame passes, and the guest sees NO-CARRIER.
    Link {
        /// What it is to be.
        #[arg(value_parser = ["up", "down"])]
        state: String,
    },
    /// Switch: lists the ports and uplinks.
    PortList,
    /// Switch: shows one port or uplink in full.
    PortStatus {
        /// Its name.
        port: String,
    },
    /// Switch: serves one port more.
    PortAdd {
        /// As for ringside-net --port.
        #[arg(value_name = "socket=PATH,KEY=VALUE,...", value_parser = port)]
        port: Arguments,
    },
    /// Switch: ends a port; its front-end is disconnected.
    PortRemove {
        /// Its name.
        port: String,
    },
    /// Switch: plugs the cable of a port or an uplink in, or pulls it.
    PortLink {
        /// Its name.
        port: String,
        /// What its guest is to see, or what passes.
        #[arg(value_parser = ["up", "down"])]
        state: String,
    },
    /// Switch: sets limits of the rates of a port or an uplink, and shows them.
    PortLimits {
        /// Its name.
        port: String,
        /// Those to change, as for ringside-net --port; 0 takes a limit away.
        #[arg(value_name = "KEY=VALUE,...", value_parser = limits)]
        limits: Option<Arguments>,
    },
    /// Switch: asks the guest at a port to make itself known to the network.
    PortAnnounce {
        /// Its name.
        port: String,
    },
    /// Switch: shows which addresses were found behind which port.
    Addresses,
    /// VMM: lists the machine's devices.
    DeviceList,
    /// VMM: plugs in a PCI function of the host that is bound to vfio-pci.
    DeviceAdd {
        /// As for ringside-vmm --vfio: the address alone, or keys host=, id=, vf-token=, standby=.
        #[arg(value_name = "ADDRESS | KEY=VALUE,...", value_parser = device)]
        device: Arguments,
    },
    /// VMM: asks the guest to let go of a function; it leaves when the guest has done so. `device-list` shows whether it has.
    DeviceRemove {
        /// Its id.
        id: String,
        /// Takes it away, as if it was torn out of its slot, without asking the guest.
        #[arg(long)]
        force: bool,
    },
    /// VMM: adds to the guest's memory, up to ringside-vmm --memory max=SIZE.
    MemoryAdd {
        /// By how much, in multiples of 128M, such as 512M.
        size: String,
    },
    /// VMM: writes a snapshot of the machine into the folder of ringside-vmm --snapshots. The guest stands still meanwhile. With
    /// `ringside-vmm --restore` it goes on from there; its disks are not in it: copy them while it is paused, or stop it.
    Snapshot {
        /// Its file's name in the folder.
        name: String,
        /// Ends the machine when the snapshot is written, so that its disks stay as the snapshot has them.
        #[arg(long)]
        stop: bool,
    },
    /// VMM: moves the guest, while it runs, to another VMM that waits for it (ringside-vmm --incoming), and ends. If that fails
    /// the guest stays.
    Migrate {
        /// Where that one waits: unix:PATH or tcp:ADDRESS:PORT, one of ringside-vmm --migrate-to.
        to: String,
    },
    /// VMM: holds the guest's processors. Its back-ends end what it has asked them for.
    Pause,
    /// VMM: ends the machine, as a power cut would for the guest.
    PowerOff,
}

/// A command's arguments.
type Arguments = Map<String, Value>;

fn device(text: &str) -> Result<Arguments, String> {
    arguments(text, Some("host"))
}

fn port(text: &str) -> Result<Arguments, String> {
    arguments(text, Some("socket"))
}

fn limits(text: &str) -> Result<Arguments, String> {
    arguments(text, None)
}

fn arguments(text: &str, main_key: Option<&str>) -> Result<Arguments, String> {
    let pairs = keys_and_values(text, main_key)?.into_iter();
    Ok(pairs.map(|(key, value)| (key, value.into())).collect())
}

impl Request {
    /// The command and its arguments, null if it takes none.
    fn to_json(&self) -> (&'static str, Value) {
        match self {
            Self::Status => ("status", Value::Null),
            Self::Stats => ("stats", Value::Null),
            Self::Metrics => ("metrics", Value::Null),
            Self::Quit => ("quit", Value::Null),
            Self::Resize { size, shrink } => match size {
                Some(size) => ("resize", json!({ "size": size, "shrink": shrink })),
                None => ("resize", json!({})),
            },
            Self::Limits { limits } => ("limits", json!(limits.clone().unwrap_or_default())),
            Self::Drain { timeout } => ("drain", json!({ "timeout": timeout })),
            Self::Resume => ("resume", Value::Null),
            Self::Announce => ("announce", Value::Null),
            Self::Link { state } => ("link", json!({ "state": state })),
            Self::PortList => ("port-list", Value::Null),
            Self::PortStatus { port } => ("port-status", json!({ "port": port })),
            Self::PortAdd { port } => ("port-add", json!(port)),
            Self::PortRemove { port } => ("port-remove", json!({ "port": port })),
            Self::PortLink { port, state } => {
                ("port-link", json!({ "port": port, "state": state }))
            }
            Self::PortLimits { port, limits } => {
                let limits = limits.clone().unwrap_or_default();
                ("port-limits", json!({ "port": port, "limits": limits }))
            }
            Self::PortAnnounce { port } => ("port-announce", json!({ "port": port })),
            Self::Addresses => ("addresses", Value::Null),
            Self::DeviceList => ("device-list", Value::Null),
            Self::DeviceAdd { device } => ("device-add", json!(device)),
            Self::DeviceRemove { id, force } => {
                ("device-remove", json!({ "id": id, "force": force }))
            }
            Self::MemoryAdd { size } => ("memory-add", json!({ "size": size })),
            Self::Snapshot { name, stop } => ("snapshot", json!({ "name": name, "stop": stop })),
            Self::Migrate { to } => ("migrate", json!({ "to": to })),
            Self::Pause => ("pause", Value::Null),
            Self::PowerOff => ("power-off", Value::Null),
        }
    }
}

/// Runs the program with these arguments, its own name first. Returns its exit status.
pub fn run(
    arguments: impl IntoIterator<Item = OsString>,
    out: &mut dyn Write,
    err: &mut dyn Write,
) -> u8 {
    let (status, written) = match Cli::try_parse_from(arguments) {
        Ok(cli) => match ask(&cli) {
            Ok(text) => (GRANTED, out.write_all(text.as_bytes())),
            Err(message) => (REFUSED, writeln!(err, "ringside-ctl: {message}")),
        },
        Err(error) if error.use_stderr() => (USAGE, write!(err, "{}", error.render())),
        // Help, or the version.
        Err(shown) => (GRANTED, write!(out, "{}", shown.render())),
    };
    match written {
        Ok(()) => status,
        // Whoever reads it has seen enough.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => status,
        Err(error) => {
            // There is nowhere else to say it.
            let _ = writeln!(err, "ringside-ctl: cannot write the answer: {error}");
            REFUSED
        }
    }
}

/// What to show of the answer, or why there is none.
fn ask(cli: &Cli) -> Result<String, String> {
    let (command, arguments) = cli.request.to_json();
    let result = client::call(&cli.socket, command, &arguments).map_err(|error| {
        format!(
            "no answer at {}: {error}; does a ringside-vmm (--api-socket) or a back-end (--control-socket) listen there?",
            cli.socket.display()
        )
    })?;
    let result = result.map_err(|error| error.message)?;
    Ok(if cli.json {
        format!("{result:#}\n")
    } else {
        table(&result)
    })
}

/// For people: a line for each value; of a list alone, a line for each of its items.
fn table(result: &Value) -> String {
    let mut text = String::new();
    match result {
        Value::String(page) => text.push_str(page),
        Value::Object(object) => match object.iter().next() {
            Some((_, Value::Array(items))) if object.len() == 1 => {
                items.iter().for_each(|item| line(&mut text, "", item));
            }
            _ => object.iter().for_each(|(key, value)| match value {
                Value::Array(items) if items.iter().any(Value::is_object) => {
                    items.iter().for_each(|item| line(&mut text, key, item));
                }
                Value::Object(_) => line(&mut text, key, value),
                _ => text.push_str(&format!("{key}={}\n", plain(value))),
            }),
        },
        _ => {}
    }
    text
}

/// All pairs of an object in one line.
fn line(text: &mut String, title: &str, object: &Value) {
    let pairs = object.as_object().into_iter().flatten();
    let pairs = pairs.map(|(key, value)| format!("{key}={}", plain(value)));
    let title = (!title.is_empty()).then(|| format!("{title}:"));
    let words: Vec<_> = title.into_iter().chain(pairs).collect();
    text.push_str(&words.join(" "));
    text.push('\n');
}

fn plain(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Array(items) if !items.iter().any(|item| item.is_object() || item.is_array()) => {
            items.iter().map(plain).collect::<Vec<_>>().join(",")
        }
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_is_written_as_on_the_vmms_command_line() {
        let read = |text: &str| device(text).map(Value::from);
        assert_eq!(
            read("01:10.0,id=a,,b"),
            Ok(json!({"host": "01:10.0", "id": "a,b"}))
        );
        assert_eq!(read("host=01:10.0"), Ok(json!({"host": "01:10.0"})));
        for wrong in ["", "01:10.0,nic", "01:10.0,host=01:10.2"] {
            assert!(device(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn answers_are_shown_to_people() {
        let list = json!({"devices": [{"id": "a", "leaving": false}, {"socket": "/b"}]});
        assert_eq!(table(&list), "id=a leaving=false\nsocket=/b\n");
        assert_eq!(table(&json!({"cpus": 2})), "cpus=2\n");
        assert_eq!(table(&json!({})), "");
        assert_eq!(table(&json!("up 1\n")), "up 1\n");
        let status = json!({
            "device": "block",
            "disk": {"path": "/x", "size": 1},
            "features": ["RO", "MQ"],
            "queues": [{"index": 0, "size": 128}, {"index": 1, "size": 0}],
        });
        assert_eq!(
            table(&status),
            "device=block\ndisk: path=/x size=1\nfeatures=RO,MQ\nqueues: index=0 size=128\nqueues: index=1 size=0\n"
        );
    }

    #[test]
    fn wrong_command_lines_and_lost_programs_have_a_status_of_their_own() {
        let status = |arguments: &[&str]| {
            let (mut out, mut err) = (Vec::new(), Vec::new());
            let words = ["ringside-ctl"].iter().chain(arguments).map(OsString::from);
            let status = run(words, &mut out, &mut err);
            assert!(out.is_empty() != err.is_empty(), "{arguments:?}");
            status
        };
        assert_eq!(status(&["fly"]), USAGE);
        assert_eq!(status(&["--socket", "x", "resize", "--shrink"]), USAGE);
        assert_eq!(status(&["--socket", "/nowhere/x", "status"]), REFUSED);
        assert_eq!(status(&["--help"]), GRANTED);
    }
}

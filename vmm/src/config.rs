//! What the user asked for: the command line and the TOML file, merged and checked. Pure: nothing
//! here opens a file or a device.
//!
//! Both sources have one schema. An option with keys is written `socket=/run/a.sock,num-queues=4`
//! on the command line and as a table of the same keys in the file; each key is read by the same
//! code. A comma inside a value is doubled.

use std::collections::HashSet;
use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use clap::{Parser, ValueEnum};
use ringside_control::Size;
use ringside_control::options::keys_and_values;
use ringside_sandbox::Mode;
use ringside_vfio::address::PciAddress;
use serde::Deserialize;
use serde::de::value::{MapAccessDeserializer, MapDeserializer};
use serde::de::{DeserializeOwned, Deserializer, Error as _, MapAccess, Visitor};

use uuid::Uuid;

use crate::layout;
use crate::memory::{self, PageSize};
use crate::snapshot::transport::Address;

/// Most processors a guest can have: 8-bit local APIC IDs, of which 255 means all of them.
pub const MAX_CPUS: u32 = 254;
/// Most hot-plug slots: each takes 2 MiB of the guest's address space below 4 GiB, and a place on the bus.
pub const MAX_HOTPLUG_PORTS: u8 = 64;
/// Largest size of a split virtqueue (VIRTIO 1.3, 2.7).
const MAX_QUEUE_SIZE: u16 = 32768;
/// Most queues of a device: each needs an MSI-X vector, of which a function has at most 2048, and
/// the vhost-user protocol names a queue with 8 bits (SET_VRING_KICK).
const MAX_QUEUES: u16 = 256;

/// A mistake in the configuration.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Error {
    /// An option that every guest needs is absent.
    #[error(
        "no kernel given: use --kernel FILE, or `kernel = \"FILE\"` in the configuration file, or --restore FILE"
    )]
    NoKernel,
    /// Functions of the host are not in a snapshot, and this one would be missed.
    #[error(
        "a guest brings {0} along only if a card stands in for it: give --vfio the card's socket (standby=SOCKET), or leave it out and plug it in when the guest runs (device-add)"
    )]
    RestoreVfio(PciAddress),
    /// Nothing stands in for a function.
    #[error("no network card (--net) has the socket {}, which is to stand in for {host}", socket.display())]
    NoStandby {
        /// The function.
        host: PciAddress,
        /// What was given.
        socket: PathBuf,
    },
    /// No processors, or too many.
    #[error("a guest cannot have {0} CPUs: give --cpus a number from 1 to {MAX_CPUS}")]
    Cpus(u32),
    /// Memory of a size that makes no sense.
    #[error("{0}")]
    Memory(String),
    /// Memory that would have to shrink.
    #[error("--memory: max={max} is less than the guest starts with, {size}")]
    MemoryMax {
        /// What was given.
        max: Size,
        /// What the guest starts with.
        size: Size,
    },
    /// Memory that cannot grow by whole pieces.
    #[error("--memory: max={max} less the size, {size}, is not a multiple of {unit}")]
    MemoryGrowth {
        /// What was given.
        max: Size,
        /// What the guest starts with.
        size: Size,
        /// Of what it must be a multiple.
        unit: Size,
    },
    /// A queue count that makes no sense.
    #[error("{option}: num-queues={value} is not possible: {rule}")]
    Queues {
        /// `--blk`, `--net` or `--vhost-user`.
        option: &'static str,
        /// What was given.
        value: u16,
        /// What is possible.
        rule: &'static str,
    },
    /// A queue size that makes no sense.
    #[error("{option}: queue-size={value} is not a power of two from 1 to {MAX_QUEUE_SIZE}")]
    QueueSize {
        /// `--blk`, `--net` or `--vhost-user`.
        option: &'static str,
        /// What was given.
        value: u16,
    },
    /// Two devices cannot share a back-end.
    #[error("two devices have the socket {}: a back-end serves one device", .0.display())]
    SameSocket(PathBuf),
    /// More slots than there is room for.
    #[error("{0} hot-plug slots are too many: give --hotplug-ports 0 to {MAX_HOTPLUG_PORTS}")]
    HotplugPorts(u8),
    /// A function can be given once.
    #[error("{0} is given to the guest twice")]
    SameFunction(PciAddress),
    /// Names tell devices apart.
    #[error("two devices have the id `{0}`: give each its own")]
    SameId(String),
    /// Not the syntax of TOML, or a key that does not exist.
    #[error("the configuration file is wrong: {0}")]
    File(String),
}

/// A minimal KVM virtual machine monitor whose disks and network cards are vhost-user back-ends.
#[derive(Debug, Default, Parser)]
#[command(name = "ringside-vmm", version, max_term_width = 100, after_long_help = AFTER_HELP)]
pub struct Cli {
    /// The guest's kernel: a Linux bzImage, or an ELF file with a PVH or 64-bit Linux entry.
    #[arg(long, value_name = "FILE")]
    pub kernel: Option<PathBuf>,

    /// The guest's initial RAM disk.
    #[arg(long, value_name = "FILE")]
    pub initramfs: Option<PathBuf>,

    /// The kernel's command line [default: console=ttyS0].
    #[arg(long, value_name = "TEXT")]
    pub cmdline: Option<String>,

    /// Number of virtual processors [default: 1].
    #[arg(long, value_name = "N")]
    pub cpus: Option<u32>,

    /// Guest memory [default: 512M]. A size alone, or keys: size=SIZE, max=SIZE up to which it can
    /// grow while the guest runs, in multiples of 128M [default: it cannot], hugepages=on|off|2M|1G,
    /// prefault=on|off (allocate everything at the start, and what is added when it is added).
    #[arg(long, value_name = "SIZE | KEY=VALUE,...", value_parser = parse::<MemoryOptions>)]
    pub memory: Option<MemoryOptions>,

    /// A disk served by a vhost-user back-end; repeat for more. Keys: socket=PATH,
    /// num-queues=N [default: one for each CPU, as far as the back-end has them], queue-size=N
    /// [default: 256], reconnect-timeout=SECONDS to wait for the back-end at the start [default: 10],
    /// loss-timeout=SECONDS to wait for one that goes while the guest uses the device, which is then told
    /// that it needs a reset [default: no limit], packed=on|off to offer packed virtqueues
    /// [default: off for a device that goes on by itself when its back-end dies and another comes, which
    /// packed queues make impossible (cards) or dearer (disks), else on].
    #[arg(long, value_name = "socket=PATH,...", value_parser = parse::<BlkOptions>)]
    pub blk: Vec<BlkOptions>,

    /// A network card served by a vhost-user back-end; repeat for more. Keys as for --blk, and
    /// mac=ADDRESS, for back-ends that leave it to us. Here num-queues counts receive and transmit
    /// queues, 2 for each queue pair [default: as many as the back-end has].
    #[arg(long, value_name = "socket=PATH,...", value_parser = parse::<NetOptions>)]
    pub net: Vec<NetOptions>,

    /// Any other device served by a vhost-user back-end; repeat for more. Keys as for --blk, and
    /// type=ID, a virtio device ID or a name such as console, rng, scsi, input, vsock, fs;
    /// config-size=BYTES of its configuration space.
    #[arg(long, value_name = "type=ID,socket=PATH,...", value_parser = parse::<VhostUserOptions>)]
    pub vhost_user: Vec<VhostUserOptions>,

    /// A PCI function of the host, bound to vfio-pci; repeat for more. Its address alone, or keys: host=ADDRESS,
    /// id=NAME for the control socket [default: the address], vf-token=UUID if its physical function is bound to vfio-pci,
    /// too; standby=SOCKET of the --net card that stands in for it (`ringside-net --standby`) while the guest moves: it is
    /// asked to let go of the function before, and with --incoming or --restore gets the one named there when it runs.
    /// `ringside-vfio create` makes virtual functions and binds them.
    #[arg(long, value_name = "ADDRESS | KEY=VALUE,...", value_parser = parse::<VfioOptions>)]
    pub vfio: Vec<VfioOptions>,

    /// How VFIO confines those functions: group (a container with a type 1 IOMMU), iommufd, or auto (iommufd where the
    /// kernel has it) [default: auto].
    #[arg(long, value_name = "INTERFACE")]
    pub vfio_interface: Option<VfioInterface>,

    /// Listens for requests at this Unix socket: plugging devices in and out, state, the end. `ringside-ctl` speaks with it.
    #[arg(long, value_name = "PATH")]
    pub api_socket: Option<PathBuf>,

    /// Where `ringside-ctl snapshot NAME` puts snapshots of the machine: a folder that is there. A snapshot is a file with all of
    /// the guest's memory and state; its disks are not in it. Keep it as you keep the guest's secrets.
    #[arg(long, value_name = "FOLDER")]
    pub snapshots: Option<PathBuf>,

    /// Goes on with the guest of a snapshot in place of booting one: give the other options as they were given to the VMM that
    /// made it, and disks with the content they had then. Sockets, and what serves them, may be others; --kernel, --initramfs
    /// and --cmdline have no effect.
    #[arg(long, value_name = "FILE")]
    pub restore: Option<PathBuf>,

    /// Where `ringside-ctl migrate` may move the running guest to: unix:PATH, or tcp:ADDRESS:PORT by number; repeat for more. A
    /// VMM waits there with --incoming. Nothing is encrypted or authenticated but by the socket's file: use TCP over a network
    /// that you trust, or a tunnel to a Unix socket.
    #[arg(long, value_name = "ADDRESS")]
    pub migrate_to: Vec<Address>,

    /// Waits at unix:PATH or tcp:ADDRESS:PORT for a guest that another VMM moves here, in place of booting one: give the other
    /// options as they were given there, and the same disks. Sockets, and what serves them, may be others; --kernel,
    /// --initramfs and --cmdline have no effect.
    #[arg(long, value_name = "ADDRESS", conflicts_with = "restore")]
    pub incoming: Option<Address>,

    /// Empty slots for functions that are plugged in later [default: 2 with --api-socket, else none].
    #[arg(long, value_name = "N")]
    pub hotplug_ports: Option<u8>,

    /// Where the guest's first serial port leads: stdio, file=PATH, socket=PATH (listens for one
    /// client at a time), or null [default: stdio].
    #[arg(long, value_name = "WHERE")]
    pub serial: Option<SerialTarget>,

    /// Lets this user use the control socket, and those of --serial and --incoming, too, by number; repeat for more. Root and the
    /// VMM's own user always may. Sockets are made with mode 0600: give the user a right to write to their files, for example by
    /// setfacl.
    #[arg(long, value_name = "UID")]
    pub allow_uid: Vec<u32>,

    /// Whether the VMM gives up the rights that it does not need, before it reads from a back-end or runs the guest: on, strict (it
    /// does not start if the kernel lacks a part of it), log (what it would be ended for is written to the kernel's log, audit type
    /// 1326, and done), or off (for debuggers) [default: on].
    #[arg(long, value_name = "on|strict|log|off", hide_possible_values = true)]
    pub sandbox: Option<Mode>,

    /// Reads options from a TOML file: the same names and keys. The command line wins; devices
    /// of both are used.
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,

    /// What to log to standard error: error, warn, info, debug or trace [default: warn]; or a
    /// filter for single modules, such as `warn,ringside_vmm::pci=debug`.
    #[arg(long, value_name = "LEVEL")]
    pub log_level: Option<String>,
}

const AFTER_HELP: &str = "\
Exit status:
  0  the guest powered off, or an end was asked for (SIGTERM, SIGINT, SIGHUP, Ctrl-A x)
  1  something failed at run time, such as a file or a back-end that is not there
  2  wrong usage
  3  the guest asked for a reset: start again to let it reboot
  4  the guest's kernel panicked (reported by its pvpanic driver)
  5  the guest crashed: a triple fault, or an error inside KVM

Console, with --serial stdio on a terminal:
  Ctrl-A x       end the virtual machine
  Ctrl-A Ctrl-A  send Ctrl-A to the guest
  Ctrl-A h       help

Example:
  ringside-vmm --kernel /boot/vmlinuz --initramfs initrd.img --cmdline 'console=ttyS0' \\
    --cpus 2 --memory 1G --blk socket=/run/disk.sock --net socket=/run/net.sock --vfio 0000:01:10.0

The same as a file for --config:
  kernel = \"/boot/vmlinuz\"
  initramfs = \"initrd.img\"
  cpus = 2
  memory = { size = \"1G\", hugepages = false }
  [[blk]]
  socket = \"/run/disk.sock\"
  [[net]]
  socket = \"/run/net.sock\"
  mac = \"52:54:00:12:34:56\"
  [[vfio]]
  host = \"0000:01:10.0\"";

/// The configuration file.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub struct FileOptions {
    kernel: Option<PathBuf>,
    initramfs: Option<PathBuf>,
    cmdline: Option<String>,
    cpus: Option<u32>,
    memory: Option<TextOr<MemoryOptions>>,
    blk: Vec<TextOr<BlkOptions>>,
    net: Vec<TextOr<NetOptions>>,
    vhost_user: Vec<TextOr<VhostUserOptions>>,
    vfio: Vec<TextOr<VfioOptions>>,
    vfio_interface: Option<VfioInterface>,
    api_socket: Option<PathBuf>,
    snapshots: Option<PathBuf>,
    migrate_to: Vec<Address>,
    hotplug_ports: Option<u8>,
    allow_uid: Vec<u32>,
    sandbox: Option<Mode>,
    serial: Option<String>,
    log_level: Option<String>,
}

impl FromStr for FileOptions {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let mut options: Self = toml::from_str(text).map_err(|e| Error::File(e.to_string()))?;
        // Checked here, where the message can still name the file.
        if let Some(serial) = &options.serial {
            serial
                .parse::<SerialTarget>()
                .map_err(|e| Error::File(format!("serial: {e}")))?;
        }
        options.cmdline = options.cmdline.map(|line| line.trim().to_owned());
        Ok(options)
    }
}

/// `--memory`.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub struct MemoryOptions {
    #[serde(deserialize_with = "some")]
    size: Option<Size>,
    #[serde(deserialize_with = "some")]
    max: Option<Size>,
    #[serde(deserialize_with = "some")]
    hugepages: Option<HugepagesValue>,
    #[serde(deserialize_with = "switch")]
    prefault: Option<bool>,
}

/// `--blk`.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct BlkOptions {
    socket: PathBuf,
    #[serde(default, deserialize_with = "number")]
    num_queues: Option<u16>,
    #[serde(default, deserialize_with = "number")]
    queue_size: Option<u16>,
    #[serde(default, deserialize_with = "switch")]
    packed: Option<bool>,
    #[serde(default, deserialize_with = "number")]
    reconnect_timeout: Option<u32>,
    #[serde(default, deserialize_with = "number")]
    loss_timeout: Option<u32>,
}

/// `--net`.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct NetOptions {
    socket: PathBuf,
    #[serde(default, deserialize_with = "some")]
    mac: Option<Mac>,
    #[serde(default, deserialize_with = "number")]
    num_queues: Option<u16>,
    #[serde(default, deserialize_with = "number")]
    queue_size: Option<u16>,
    #[serde(default, deserialize_with = "switch")]
    packed: Option<bool>,
    #[serde(default, deserialize_with = "number")]
    reconnect_timeout: Option<u32>,
    #[serde(default, deserialize_with = "number")]
    loss_timeout: Option<u32>,
}

/// `--vhost-user`.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct VhostUserOptions {
    #[serde(rename = "type")]
    device_type: DeviceType,
    socket: PathBuf,
    #[serde(default, deserialize_with = "number")]
    num_queues: Option<u16>,
    #[serde(default, deserialize_with = "number")]
    queue_size: Option<u16>,
    #[serde(default, deserialize_with = "number")]
    config_size: Option<u16>,
    #[serde(default, deserialize_with = "switch")]
    packed: Option<bool>,
    #[serde(default, deserialize_with = "number")]
    reconnect_timeout: Option<u32>,
    #[serde(default, deserialize_with = "number")]
    loss_timeout: Option<u32>,
}

/// `--vfio`.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct VfioOptions {
    #[serde(deserialize_with = "by_from_str")]
    host: PciAddress,
    #[serde(default, deserialize_with = "some")]
    id: Option<String>,
    #[serde(default, deserialize_with = "optional_by_from_str")]
    vf_token: Option<Uuid>,
    #[serde(default, deserialize_with = "some")]
    standby: Option<PathBuf>,
}

/// `--vfio-interface`.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum VfioInterface {
    /// iommufd where the kernel has it, else groups.
    #[default]
    Auto,
    /// A group in a container.
    Group,
    /// A device file, and iommufd.
    Iommufd,
}

/// Where the serial port leads.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum SerialTarget {
    /// This process's standard input and output.
    #[default]
    Stdio,
    /// Output to a file; no input.
    File(PathBuf),
    /// A Unix socket that the VMM listens on, one client at a time.
    Socket(PathBuf),
    /// Nowhere.
    Null,
}

impl FromStr for SerialTarget {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once('=') {
            None if text == "stdio" => Ok(Self::Stdio),
            None if text == "null" => Ok(Self::Null),
            Some(("file", path)) if !path.is_empty() => Ok(Self::File(path.into())),
            Some(("socket", path)) if !path.is_empty() => Ok(Self::Socket(path.into())),
            _ => Err(format!(
                "`{text}` is none of stdio, file=PATH, socket=PATH, null"
            )),
        }
    }
}

/// A virtio device ID (VIRTIO 1.3, 5).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceType(pub u16);

impl DeviceType {
    /// A network card.
    pub const NET: Self = Self(1);
    /// A disk.
    pub const BLOCK: Self = Self(2);
}

/// Names of device IDs that people may have back-ends for.
const DEVICE_NAMES: [(&str, u16); 18] = [
    ("net", 1),
    ("blk", 2),
    ("console", 3),
    ("rng", 4),
    ("scsi", 8),
    ("gpu", 16),
    ("input", 18),
    ("vsock", 19),
    ("crypto", 20),
    ("iommu", 23),
    ("sound", 25),
    ("fs", 26),
    ("rpmb", 28),
    ("video-encoder", 30),
    ("video-decoder", 31),
    ("i2c", 34),
    ("can", 36),
    ("gpio", 41),
];

impl FromStr for DeviceType {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let named = DEVICE_NAMES
            .iter()
            .find(|(name, _)| *name == text)
            .map(|(_, id)| *id);
        let id = match named {
            Some(id) => id,
            None => text.parse().map_err(|_| {
                let names: Vec<&str> = DEVICE_NAMES.iter().map(|(name, _)| *name).collect();
                format!(
                    "type `{text}` is neither a virtio device ID nor one of {}",
                    names.join(", ")
                )
            })?,
        };
        // 0 is reserved; above 63 the PCI device ID would leave virtio's range (4.1.2.1).
        if (1..=63).contains(&id) {
            Ok(Self(id))
        } else {
            Err(format!("no virtio device has ID {id}"))
        }
    }
}

impl fmt::Display for DeviceType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match DEVICE_NAMES.iter().find(|(_, id)| *id == self.0) {
            Some((name, _)) => f.write_str(name),
            None => write!(f, "{}", self.0),
        }
    }
}

/// An Ethernet address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mac(pub [u8; 6]);

impl FromStr for Mac {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong =
            || format!("`{text}` is not an Ethernet address: write it like 52:54:00:12:34:56");
        let mut bytes = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut bytes {
            let part = parts.next().filter(|p| p.len() == 2).ok_or_else(wrong)?;
            *byte = u8::from_str_radix(part, 16).map_err(|_| wrong())?;
        }
        if parts.next().is_some() {
            return Err(wrong());
        }
        if bytes.first().is_some_and(|b| b & 1 != 0) || bytes == [0; 6] {
            return Err(format!(
                "`{text}` is a multicast or empty address; a card needs its own"
            ));
        }
        Ok(Self(bytes))
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

/// Where the guest comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    /// It boots.
    Boot {
        /// The kernel's file.
        kernel: PathBuf,
        /// The initial RAM disk's file.
        initramfs: Option<PathBuf>,
    },
    /// It goes on from a snapshot, in this file.
    Snapshot(PathBuf),
    /// It comes here from another VMM.
    Incoming(Address),
}

/// What to run, complete and checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// Where the guest comes from.
    pub origin: Origin,
    /// The kernel's command line.
    pub cmdline: String,
    /// Number of processors, 1 to [`MAX_CPUS`].
    pub cpus: u32,
    /// Guest RAM at the start.
    pub memory: memory::Options,
    /// How far it can grow: [`Config::memory`]'s size if it cannot, else more by a multiple of
    /// [`layout::MEMORY_BLOCK`] and of its pages' size.
    pub memory_max: Size,
    /// Devices in the order they are put on the PCI bus: disks, network cards, others.
    pub devices: Vec<DeviceConfig>,
    /// Functions of the host's PCI bus.
    pub vfio: Vec<VfioConfig>,
    /// How VFIO confines them.
    pub vfio_interface: VfioInterface,
    /// Where the control socket is to listen.
    pub api_socket: Option<PathBuf>,
    /// Where snapshots go, if there are to be any.
    pub snapshots: Option<PathBuf>,
    /// Where the guest may move to.
    pub migrate_to: Vec<Address>,
    /// Number of empty slots, at most [`MAX_HOTPLUG_PORTS`].
    pub hotplug_ports: u8,
    /// Users who may use the control socket, besides root and this one.
    pub allow_uid: Vec<u32>,
    /// Whether it gives up rights.
    pub sandbox: Mode,
    /// The serial port.
    pub serial: SerialTarget,
    /// Filter of the log.
    pub log_level: String,
}

/// A device served by a vhost-user back-end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceConfig {
    /// What it is.
    pub device_type: DeviceType,
    /// The back-end's listening socket.
    pub socket: PathBuf,
    /// Number of request queues (block), receive and transmit queues (net), all queues (others);
    /// `None` leaves it to the device.
    pub num_queues: Option<u16>,
    /// Number of the guest's processors, and so of the request queues that are of use to it.
    pub cpus: u32,
    /// Size limit of each queue, in descriptors.
    pub queue_size: u16,
    /// The Ethernet address, for a network card.
    pub mac: Option<Mac>,
    /// Size of the device configuration space in bytes; `None` leaves it to the device.
    pub config_size: Option<u16>,
    /// Whether packed virtqueues are offered; `None` leaves it to the device.
    pub packed: Option<bool>,
    /// How long to wait for the back-end at the start.
    pub reconnect_timeout: Duration,
    /// How long a guest that uses the device waits for a back-end that went; `None` for as long as it takes.
    pub loss_timeout: Option<Duration>,
}

/// A function of the host's PCI bus.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VfioConfig {
    /// Its address on the host.
    pub host: PciAddress,
    /// Its name in this VMM.
    pub id: String,
    /// What shows its physical function's owner that we may have it.
    pub token: Option<Uuid>,
    /// Socket of the card that stands in for it while the guest moves.
    pub standby: Option<PathBuf>,
}

impl VfioConfig {
    /// Whether what is to stand in for it is a card among `devices`, if anything is.
    ///
    /// # Errors
    /// [`Error::NoStandby`]
    pub fn check_standby(&self, devices: &[DeviceConfig]) -> Result<(), Error> {
        let is_card = |socket: &PathBuf| {
            let mut cards = devices.iter().filter(|d| d.device_type == DeviceType::NET);
            cards.any(|card| card.socket == *socket)
        };
        match self.standby.as_ref().filter(|socket| !is_card(socket)) {
            None => Ok(()),
            Some(socket) => Err(Error::NoStandby {
                host: self.host,
                socket: socket.clone(),
            }),
        }
    }
}

const DEFAULT_QUEUE_SIZE: u16 = 256;
const DEFAULT_RECONNECT_SECONDS: u32 = 10;
const DEFAULT_MEMORY: Size = Size(512 << 20);

impl Config {
    /// Merges command line and file. The command line wins; devices of both are used, those of
    /// the file first.
    pub fn new(cli: Cli, file: FileOptions) -> Result<Self, Error> {
        let Cli {
            kernel,
            initramfs,
            cmdline,
            cpus,
            memory,
            blk,
            net,
            vhost_user,
            vfio,
            vfio_interface,
            api_socket,
            snapshots,
            restore,
            migrate_to,
            incoming,
            hotplug_ports,
            allow_uid,
            sandbox,
            serial,
            config: _,
            log_level,
        } = cli;
        let cpus = cpus.or(file.cpus).unwrap_or(1);
        if !(1..=MAX_CPUS).contains(&cpus) {
            return Err(Error::Cpus(cpus));
        }
        let file_memory = file.memory.map(|m| m.0).unwrap_or_default();
        let (memory, memory_max) = merge_memory(memory.unwrap_or_default(), file_memory)?;
        let mut devices = Vec::new();
        for blk in file.blk.into_iter().map(|b| b.0).chain(blk) {
            devices.push(blk.resolve(cpus)?);
        }
        for net in file.net.into_iter().map(|n| n.0).chain(net) {
            devices.push(net.resolve(cpus)?);
        }
        for other in file.vhost_user.into_iter().map(|v| v.0).chain(vhost_user) {
            devices.push(other.resolve(cpus)?);
        }
        let mut sockets = HashSet::new();
        if let Some(twice) = devices.iter().find(|d| !sockets.insert(&d.socket)) {
            return Err(Error::SameSocket(twice.socket.clone()));
        }
        let api_socket = api_socket.or(file.api_socket);
        let default_ports = if api_socket.is_some() { 2 } else { 0 };
        let hotplug_ports = hotplug_ports
            .or(file.hotplug_ports)
            .unwrap_or(default_ports);
        if hotplug_ports > MAX_HOTPLUG_PORTS {
            return Err(Error::HotplugPorts(hotplug_ports));
        }
        let vfio = file.vfio.into_iter().map(|v| v.0).chain(vfio);
        let vfio: Vec<_> = vfio.map(VfioOptions::resolve).collect();
        let (mut hosts, mut ids) = (HashSet::new(), HashSet::new());
        for device in &vfio {
            if !hosts.insert(device.host) {
                return Err(Error::SameFunction(device.host));
            }
            if !ids.insert(&device.id) {
                return Err(Error::SameId(device.id.clone()));
            }
            device.check_standby(&devices)?;
        }
        let serial = match serial {
            Some(serial) => serial,
            None => file
                .serial
                .as_deref()
                .unwrap_or("stdio")
                .parse()
                .map_err(Error::File)?,
        };
        let origin = match (restore, incoming) {
            (Some(snapshot), _) => Origin::Snapshot(snapshot),
            (None, Some(address)) => Origin::Incoming(address),
            (None, None) => Origin::Boot {
                kernel: kernel.or(file.kernel).ok_or(Error::NoKernel)?,
                initramfs: initramfs.or(file.initramfs),
            },
        };
        let missed = vfio.iter().find(|device| device.standby.is_none());
        if let (Origin::Snapshot(_) | Origin::Incoming(_), Some(device)) = (&origin, missed) {
            return Err(Error::RestoreVfio(device.host));
        }
        Ok(Self {
            origin,
            cmdline: cmdline
                .or(file.cmdline)
                .unwrap_or_else(|| "console=ttyS0".to_owned()),
            cpus,
            memory,
            memory_max,
            devices,
            vfio,
            vfio_interface: vfio_interface.or(file.vfio_interface).unwrap_or_default(),
            api_socket,
            snapshots: snapshots.or(file.snapshots),
            migrate_to: file.migrate_to.into_iter().chain(migrate_to).collect(),
            hotplug_ports,
            allow_uid: file.allow_uid.into_iter().chain(allow_uid).collect(),
            sandbox: sandbox.or(file.sandbox).unwrap_or_default(),
            serial,
            log_level: log_level
                .or(file.log_level)
                .unwrap_or_else(|| "warn".to_owned()),
        })
    }
}

/// What RAM is like at the start, and how far it can grow.
fn merge_memory(cli: MemoryOptions, file: MemoryOptions) -> Result<(memory::Options, Size), Error> {
    let options = memory::Options {
        size: cli.size.or(file.size).unwrap_or(DEFAULT_MEMORY),
        pages: cli
            .hugepages
            .or(file.hugepages)
            .map_or(PageSize::Normal, |h| h.0),
        prefault: cli.prefault.or(file.prefault).unwrap_or(false),
    };
    options.check().map_err(|e| Error::Memory(e.to_string()))?;
    let size = options.size;
    let max = cli.max.or(file.max).unwrap_or(size);
    let Some(growth) = max.0.checked_sub(size.0) else {
        return Err(Error::MemoryMax { max, size });
    };
    let unit = Size(layout::MEMORY_BLOCK.max(options.pages.bytes()));
    if !growth.is_multiple_of(unit.0) {
        return Err(Error::MemoryGrowth { max, size, unit });
    }
    Ok((options, max))
}

fn check_queues(
    option: &'static str,
    queues: Option<u16>,
    size: Option<u16>,
) -> Result<u16, Error> {
    if let Some(value) = queues
        && !(1..=MAX_QUEUES).contains(&value)
    {
        return Err(Error::Queues {
            option,
            value,
            rule: "give 1 to 256",
        });
    }
    let value = size.unwrap_or(DEFAULT_QUEUE_SIZE);
    if !value.is_power_of_two() || value > MAX_QUEUE_SIZE {
        return Err(Error::QueueSize { option, value });
    }
    Ok(value)
}

fn seconds(count: u32) -> Duration {
    Duration::from_secs(count.into())
}

fn timeout(given: Option<u32>) -> Duration {
    seconds(given.unwrap_or(DEFAULT_RECONNECT_SECONDS))
}

impl BlkOptions {
    fn resolve(self, cpus: u32) -> Result<DeviceConfig, Error> {
        let queue_size = check_queues("--blk", self.num_queues, self.queue_size)?;
        Ok(DeviceConfig {
            device_type: DeviceType::BLOCK,
            socket: self.socket,
            num_queues: self.num_queues,
            cpus,
            queue_size,
            mac: None,
            config_size: None,
            packed: self.packed,
            reconnect_timeout: timeout(self.reconnect_timeout),
            loss_timeout: self.loss_timeout.map(seconds),
        })
    }
}

impl NetOptions {
    fn resolve(self, cpus: u32) -> Result<DeviceConfig, Error> {
        let option = "--net";
        let queue_size = check_queues(option, self.num_queues, self.queue_size)?;
        if let Some(value) = self.num_queues.filter(|n| !n.is_multiple_of(2)) {
            let rule = "give 2 for each pair of a receive and a transmit queue";
            return Err(Error::Queues {
                option,
                value,
                rule,
            });
        }
        Ok(DeviceConfig {
            device_type: DeviceType::NET,
            socket: self.socket,
            num_queues: self.num_queues,
            cpus,
            queue_size,
            mac: self.mac,
            config_size: None,
            packed: self.packed,
            reconnect_timeout: timeout(self.reconnect_timeout),
            loss_timeout: self.loss_timeout.map(seconds),
        })
    }
}

impl VhostUserOptions {
    fn resolve(self, cpus: u32) -> Result<DeviceConfig, Error> {
        let queue_size = check_queues("--vhost-user", self.num_queues, self.queue_size)?;
        Ok(DeviceConfig {
            device_type: self.device_type,
            socket: self.socket,
            num_queues: self.num_queues,
            cpus,
            queue_size,
            mac: None,
            config_size: self.config_size,
            packed: self.packed,
            reconnect_timeout: timeout(self.reconnect_timeout),
            loss_timeout: self.loss_timeout.map(seconds),
        })
    }
}

impl VfioOptions {
    /// With the defaults in place of what was left out.
    pub fn resolve(self) -> VfioConfig {
        VfioConfig {
            id: self.id.unwrap_or_else(|| self.host.to_string()),
            host: self.host,
            token: self.vf_token,
            standby: self.standby,
        }
    }
}

/// Reads `key=value,key=value`; a first item without `=` is the value of the type's main key.
fn parse<T: DeserializeOwned + MainKey>(text: &str) -> Result<T, String> {
    let pairs = keys_and_values(text, Some(T::MAIN_KEY))?;
    let map: MapDeserializer<'_, _, serde::de::value::Error> =
        MapDeserializer::new(pairs.into_iter());
    T::deserialize(map).map_err(|e| e.to_string())
}

/// The key whose name may be left out.
trait MainKey {
    const MAIN_KEY: &'static str;
}

impl MainKey for MemoryOptions {
    const MAIN_KEY: &'static str = "size";
}
impl MainKey for BlkOptions {
    const MAIN_KEY: &'static str = "socket";
}
impl MainKey for NetOptions {
    const MAIN_KEY: &'static str = "socket";
}
impl MainKey for VfioOptions {
    const MAIN_KEY: &'static str = "host";
}
impl MainKey for VhostUserOptions {
    const MAIN_KEY: &'static str = "type";
}

/// In the file: a table of keys, or the text that the command line takes.
#[derive(Debug)]
struct TextOr<T>(T);

impl<'de, T: DeserializeOwned + MainKey> Deserialize<'de> for TextOr<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Either<T>(std::marker::PhantomData<T>);
        impl<'de, T: DeserializeOwned + MainKey> Visitor<'de> for Either<T> {
            type Value = T;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "a table or a text of KEY=VALUE pairs")
            }
            fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<T, E> {
                parse(text).map_err(E::custom)
            }
            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<T, A::Error> {
                T::deserialize(MapAccessDeserializer::new(map))
            }
        }
        deserializer
            .deserialize_any(Either(std::marker::PhantomData))
            .map(TextOr)
    }
}

/// A value that is a number in the file and a text on the command line.
#[derive(Debug)]
enum Scalar {
    Bool(bool),
    Number(u64),
    Text(String),
}

impl<'de> Deserialize<'de> for Scalar {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Any;
        impl Visitor<'_> for Any {
            type Value = Scalar;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "a number, a text or a switch")
            }
            fn visit_bool<E: serde::de::Error>(self, value: bool) -> Result<Scalar, E> {
                Ok(Scalar::Bool(value))
            }
            fn visit_i64<E: serde::de::Error>(self, value: i64) -> Result<Scalar, E> {
                u64::try_from(value)
                    .map(Scalar::Number)
                    .map_err(|_| E::custom(format!("{value} is negative")))
            }
            fn visit_u64<E: serde::de::Error>(self, value: u64) -> Result<Scalar, E> {
                Ok(Scalar::Number(value))
            }
            fn visit_str<E: serde::de::Error>(self, value: &str) -> Result<Scalar, E> {
                Ok(Scalar::Text(value.to_owned()))
            }
        }
        deserializer.deserialize_any(Any)
    }
}

/// A key that is there has a value: texts of the command line are no `Option`s to serde.
fn some<'de, D, T>(deserializer: D) -> Result<Option<T>, D::Error>
where
    D: Deserializer<'de>,
    T: Deserialize<'de>,
{
    T::deserialize(deserializer).map(Some)
}

fn number<'de, D, T>(deserializer: D) -> Result<Option<T>, D::Error>
where
    D: Deserializer<'de>,
    T: TryFrom<u64>,
{
    let value = match Scalar::deserialize(deserializer)? {
        Scalar::Number(value) => value,
        Scalar::Text(text) => text
            .parse()
            .map_err(|_| D::Error::custom(format!("`{text}` is not a number")))?,
        Scalar::Bool(value) => return Err(D::Error::custom(format!("{value} is not a number"))),
    };
    T::try_from(value)
        .map(Some)
        .map_err(|_| D::Error::custom(format!("{value} is too large")))
}

fn switch<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<bool>, D::Error> {
    match Scalar::deserialize(deserializer)? {
        Scalar::Bool(value) => Ok(Some(value)),
        Scalar::Text(text) if matches!(text.as_str(), "on" | "true" | "yes") => Ok(Some(true)),
        Scalar::Text(text) if matches!(text.as_str(), "off" | "false" | "no") => Ok(Some(false)),
        Scalar::Text(text) => Err(D::Error::custom(format!("`{text}` is neither on nor off"))),
        Scalar::Number(n) => Err(D::Error::custom(format!("`{n}` is neither on nor off"))),
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct HugepagesValue(PageSize);

impl<'de> Deserialize<'de> for HugepagesValue {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let pages = match Scalar::deserialize(deserializer)? {
            Scalar::Bool(true) => PageSize::HugeDefault,
            Scalar::Bool(false) => PageSize::Normal,
            Scalar::Text(text) => match text.as_str() {
                "on" | "true" | "yes" => PageSize::HugeDefault,
                "off" | "false" | "no" => PageSize::Normal,
                "2M" => PageSize::Huge2M,
                "1G" => PageSize::Huge1G,
                _ => {
                    return Err(D::Error::custom(format!(
                        "hugepages `{text}` is none of on, off, 2M, 1G"
                    )));
                }
            },
            Scalar::Number(n) => {
                return Err(D::Error::custom(format!(
                    "hugepages `{n}` is none of on, off, 2M, 1G"
                )));
            }
        };
        Ok(Self(pages))
    }
}

fn by_from_str<'de, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: Deserializer<'de>,
    T: FromStr<Err: fmt::Display>,
{
    let text = match Scalar::deserialize(deserializer)? {
        Scalar::Text(text) => text,
        Scalar::Number(number) => number.to_string(),
        Scalar::Bool(value) => value.to_string(),
    };
    text.parse().map_err(D::Error::custom)
}

/// As [`some`], for types that are read from text.
fn optional_by_from_str<'de, D, T>(deserializer: D) -> Result<Option<T>, D::Error>
where
    D: Deserializer<'de>,
    T: FromStr<Err: fmt::Display>,
{
    by_from_str(deserializer).map(Some)
}

macro_rules! deserialize_by_from_str {
    ($($type:ty),*) => {$(
        impl<'de> Deserialize<'de> for $type {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                by_from_str(deserializer)
            }
        }
    )*};
}

deserialize_by_from_str!(DeviceType, Mac);

#[cfg(test)]
mod tests {
    use super::*;

    fn cli(args: &[&str]) -> Result<Cli, String> {
        Cli::try_parse_from(["ringside-vmm"].iter().chain(args)).map_err(|e| e.to_string())
    }

    fn config(args: &[&str], file: &str) -> Result<Config, Error> {
        Config::new(cli(args).unwrap(), file.parse()?)
    }

    #[test]
    fn defaults() {
        let config = config(&["--kernel", "k"], "").unwrap();
        assert_eq!(config.cpus, 1);
        assert_eq!(config.memory.size, Size(512 << 20));
        assert_eq!(config.memory_max, Size(512 << 20));
        assert_eq!(config.cmdline, "console=ttyS0");
        assert_eq!(config.serial, SerialTarget::Stdio);
        assert!(config.devices.is_empty());
    }

    #[test]
    fn the_help_is_well_formed() {
        use clap::CommandFactory;
        Cli::command().debug_assert();
    }

    #[test]
    fn a_full_command_line() {
        let config = config(
            &[
                "--kernel=k",
                "--cpus=8",
                "--memory=size=6G,max=8G,hugepages=2M,prefault=on",
                "--blk=socket=/a,num-queues=4,queue-size=1024,reconnect-timeout=0,loss-timeout=7,packed=off",
                "--blk=/b,,c",
                "--net=socket=/n,mac=52:54:00:01:02:03,num-queues=4",
                "--vhost-user=type=fs,socket=/fs,config-size=40",
                "--vhost-user=4,socket=/rng",
                "--serial=file=/tmp/log",
            ],
            "",
        )
        .unwrap();
        assert_eq!(config.memory.size, Size(6 << 30));
        assert_eq!(config.memory_max, Size(8 << 30));
        assert_eq!(config.memory.pages, PageSize::Huge2M);
        assert!(config.memory.prefault);
        let [a, b, n, fs, rng] = config.devices.as_slice() else {
            panic!("{config:?}")
        };
        assert_eq!((a.num_queues, a.queue_size), (Some(4), 1024));
        assert_eq!(a.reconnect_timeout, Duration::ZERO);
        assert_eq!(a.loss_timeout, Some(Duration::from_secs(7)));
        assert_eq!((a.packed, b.packed), (Some(false), None));
        assert_eq!(b.socket, PathBuf::from("/b,c"));
        assert_eq!((b.num_queues, b.queue_size), (None, 256));
        assert_eq!(n.mac, Some(Mac([0x52, 0x54, 0, 1, 2, 3])));
        assert_eq!((fs.device_type, fs.config_size), (DeviceType(26), Some(40)));
        assert_eq!(rng.device_type, DeviceType(4));
        assert_eq!(config.serial, SerialTarget::File("/tmp/log".into()));
    }

    #[test]
    fn the_file_has_the_same_keys_and_the_command_line_wins() {
        let file = r#"
            kernel = "from-file"
            cpus = 2
            memory = { size = "1G", max = "3G", hugepages = true }
            serial = "null"
            [[blk]]
            socket = "/a"
            num-queues = 2
            [[net]]
            socket = "/n"
            mac = "52:54:00:01:02:03"
            [[vhost-user]]
            type = 26
            socket = "/fs"
        "#;
        let config = config(&["--cpus=4", "--memory=prefault=on", "--blk=/b"], file).unwrap();
        let boot = |kernel: &str| Origin::Boot {
            kernel: kernel.into(),
            initramfs: None,
        };
        assert_eq!(config.origin, boot("from-file"));
        assert_eq!(config.cpus, 4);
        assert_eq!(config.memory.size, Size(1 << 30));
        assert_eq!(config.memory_max, Size(3 << 30));
        assert_eq!(config.memory.pages, PageSize::HugeDefault);
        assert!(config.memory.prefault);
        assert_eq!(config.serial, SerialTarget::Null);
        let sockets: Vec<_> = config
            .devices
            .iter()
            .map(|d| d.socket.to_str().unwrap())
            .collect();
        assert_eq!(sockets, ["/a", "/b", "/n", "/fs"]);
    }

    #[test]
    fn functions_of_the_host_have_names() {
        let token = "6eb7ba36-1b9a-4f8e-b4b6-0c6c4b6f5e0a";
        let option = format!("--vfio=host=0000:01:10.2,id=nic,vf-token={token}");
        let args = [
            "--kernel=k",
            "--vfio=01:10.0",
            &option,
            "--vfio-interface=group",
        ];
        let config = config(&args, "vfio = [{ host = '01:00.0' }]").unwrap();
        let ids: Vec<_> = config.vfio.iter().map(|v| v.id.as_str()).collect();
        assert_eq!(ids, ["0000:01:00.0", "0000:01:10.0", "nic"]);
        assert_eq!(config.vfio[2].token, Some(token.parse().unwrap()));
        assert_eq!(config.vfio_interface, VfioInterface::Group);
        assert_eq!(config.hotplug_ports, 0);
    }

    #[test]
    fn a_card_stands_in_for_a_function() {
        let function = "--vfio=01:10.0,standby=/n";
        let moved = config(&["--incoming=unix:/m", "--net=socket=/n", function], "").unwrap();
        assert_eq!(moved.vfio[0].standby, Some("/n".into()));
        for device in ["--blk=socket=/n", "--net=socket=/other"] {
            let error = config(&["--kernel=k", device, function], "").unwrap_err();
            let text =
                "no network card (--net) has the socket /n, which is to stand in for 0000:01:10.0";
            assert_eq!(error.to_string(), text);
        }
    }

    #[test]
    fn there_are_slots_for_what_is_plugged_in_later() {
        let ports = |args: &[&str], file| config(args, file).map(|c| c.hotplug_ports);
        assert_eq!(ports(&["--kernel=k", "--api-socket=/s"], ""), Ok(2));
        assert_eq!(
            ports(&["--kernel=k"], "api-socket='/s'\nhotplug-ports=4"),
            Ok(4)
        );
        assert_eq!(
            ports(&["--kernel=k", "--hotplug-ports=65"], ""),
            Err(Error::HotplugPorts(65))
        );
    }

    #[test]
    fn a_snapshot_takes_the_place_of_a_kernel() {
        let snapshots = config(&["--restore=/s/a", "--snapshots=/s"], "kernel='k'").unwrap();
        assert_eq!(snapshots.origin, Origin::Snapshot("/s/a".into()));
        assert_eq!(snapshots.snapshots, Some("/s".into()));
        assert_eq!(
            config(&["--restore=/s/a", "--vfio=01:10.0"], ""),
            Err(Error::RestoreVfio("01:10.0".parse().unwrap()))
        );
        let file = config(&["--kernel=k"], "snapshots='/s'").unwrap();
        assert_eq!(file.snapshots, Some("/s".into()));
    }

    #[test]
    fn texts_are_allowed_in_the_file() {
        let config = config(
            &[],
            "kernel='k'\nmemory='2G'\nblk=['socket=/a,num-queues=2']",
        )
        .unwrap();
        assert_eq!(config.memory.size, Size(2 << 30));
        assert_eq!(config.devices[0].num_queues, Some(2));
    }

    #[test]
    fn mistakes_have_clear_messages() {
        for (args, message) in [
            (&["--bogus"][..], "--bogus"),
            (&["--cpus=x"], "invalid"),
            (&["--memory=1X"], "`1X` is not a size"),
            (&["--memory=size=1G,speed=9"], "unknown field `speed`"),
            (&["--memory=hugepages=4K"], "none of on, off, 2M, 1G"),
            (&["--memory=prefault=maybe"], "neither on nor off"),
            (&["--blk=num-queues=2"], "missing field `socket`"),
            (&["--blk=socket=/a,4"], "`4` is not KEY=VALUE"),
            (&["--blk="], "not KEY=VALUE"),
            (&["--blk=socket=/a,num-queues=-1"], "`-1` is not a number"),
            (&["--blk=socket=/a,num-queues=70000"], "70000 is too large"),
            (&["--blk=socket=/a,socket=/b"], "`socket` is there twice"),
            (&["--net=socket=/a,mac=52:54"], "not an Ethernet address"),
            (&["--net=socket=/a,mac=ff:ff:ff:ff:ff:ff"], "multicast"),
            (&["--vhost-user=socket=/a"], "missing field `type`"),
            (
                &["--vhost-user=type=99,socket=/a"],
                "no virtio device has ID 99",
            ),
            (
                &["--vhost-user=type=disk,socket=/a"],
                "neither a virtio device ID",
            ),
            (&["--vfio=nic0"], "`nic0` is not a PCI address"),
            (&["--vfio=id=a"], "missing field `host`"),
            (&["--vfio=01:10.0,vf-token=7"], "invalid"),
            (&["--vfio-interface=type1"], "possible values"),
            (&["--serial=tty"], "none of stdio"),
        ] {
            let error = cli(args).unwrap_err();
            assert!(error.contains(message), "{args:?}: {error}");
        }
    }

    #[test]
    fn impossible_values_are_refused() {
        assert_eq!(config(&[], ""), Err(Error::NoKernel));
        assert_eq!(config(&["--kernel=k", "--cpus=0"], ""), Err(Error::Cpus(0)));
        assert_eq!(
            config(&["--kernel=k", "--cpus=255"], ""),
            Err(Error::Cpus(255))
        );
        assert_eq!(
            config(&["--kernel=k", "--blk=/a", "--net=/b"], "blk=['/b']"),
            Err(Error::SameSocket("/b".into()))
        );
        assert_eq!(
            config(
                &["--kernel=k", "--vfio=01:10.0", "--vfio=0000:01:10.0,id=a"],
                ""
            ),
            Err(Error::SameFunction("01:10.0".parse().unwrap()))
        );
        assert_eq!(
            config(
                &["--kernel=k", "--vfio=1:1.0,id=a", "--vfio=1:1.1,id=a"],
                ""
            ),
            Err(Error::SameId("a".into()))
        );
        for args in [
            "--memory=0",
            "--memory=1G,hugepages=1G,size=1G",
            "--memory=1000000001",
        ] {
            let Ok(cli) = cli(&["--kernel=k", args]) else {
                continue;
            };
            assert!(Config::new(cli, FileOptions::default()).is_err(), "{args}");
        }
        for args in [
            "--blk=/a,num-queues=0",
            "--blk=/a,num-queues=257",
            "--blk=/a,queue-size=0",
            "--blk=/a,queue-size=100",
            "--blk=/a,queue-size=65535",
            "--net=/a,num-queues=3",
        ] {
            let error = config(&["--kernel=k", args], "").unwrap_err().to_string();
            assert!(error.starts_with("--"), "{args}: {error}");
        }
    }

    #[test]
    fn memory_grows_by_whole_blocks() {
        for (option, growth) in [
            ("size=1G,max=1G", 0),
            ("size=1G,max=1152M", 128 << 20),
            ("size=16M,max=144M", 128 << 20),
            ("size=1G,max=3G,hugepages=1G", 2 << 30),
        ] {
            let config = config(&["--kernel=k", "--memory", option], "").unwrap();
            assert_eq!(config.memory_max.0 - config.memory.size.0, growth);
        }
        for (option, message) in [
            ("size=1G,max=512M", "max=512 MiB is less than"),
            ("max=256M", "starts with, 512 MiB"),
            ("size=1G,max=1100M", "not a multiple of 128 MiB"),
            ("size=1G,max=1536M,hugepages=1G", "not a multiple of 1 GiB"),
        ] {
            let error = config(&["--kernel=k", "--memory", option], "").unwrap_err();
            assert!(error.to_string().contains(message), "{option}: {error}");
        }
    }

    #[test]
    fn mistakes_in_the_file_have_clear_messages() {
        for (file, message) in [
            ("bogus = 1", "unknown field `bogus`"),
            ("kernel = 1", "invalid type"),
            (
                "memory = { size = '1G', speed = 1 }",
                "unknown field `speed`",
            ),
            ("[[blk]]\nsocket = '/a'\nnum-queues = -4", "-4 is negative"),
            ("serial = 'tty'", "serial: `tty` is none of"),
            ("kernel =", ""),
        ] {
            let error = config(&[], file).unwrap_err().to_string();
            assert!(error.contains("configuration file is wrong"), "{error}");
            assert!(error.contains(message), "{file}: {error}");
        }
    }
}

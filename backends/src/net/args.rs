//! The command line of a network device, and the device it asks for.

use std::fmt;
use std::io;
use std::net::Ipv4Addr;
use std::os::fd::{OwnedFd, RawFd};
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use clap::{Args, ValueEnum};
use serde::Deserialize;
use thiserror::Error;
use tracing::info;

use super::config::{MacAddress, NetConfig};
use super::device::Net;
use super::features::{Extras, Offloads, offered};
use super::hash::HASH_TYPES;
use super::limits::{CardRates, NAMES};
use super::link::{
    Described, Forward, HostEnd, Interface, LinkError, LinkOptions, LinkSpec, MAX_QUEUES, MAX_SNAP,
    Opened, Tap,
};
use crate::shell::{Chain as Causes, OnOff, OpenError, Parts, PollLimits, TakeOverError, same};

fn parse_limits(text: &str) -> Result<CardRates, String> {
    let rates = CardRates::new(&NAMES).parse(text);
    rates.map_err(|error| error.to_string())
}

/// Kinds of offload.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Offload {
    /// All that the kernel has
    All,
    /// None
    Off,
    /// Checksums
    Csum,
    /// TCP segmentation over IPv4 and IPv6, needs csum
    Tso,
    /// UDP fragmentation, needs csum
    Ufo,
    /// UDP segmentation, needs csum
    Uso,
}

/// An IPv4 address and the length of its network prefix.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cidr {
    /// The address.
    pub address: Ipv4Addr,
    /// Bits of the prefix, up to 32.
    pub prefix_len: u8,
}

/// A text is no address with a prefix length.
#[derive(Debug, Error, PartialEq, Eq)]
#[error("expected an IPv4 address with a prefix length, as in 192.168.90.1/24")]
pub struct CidrError;

impl FromStr for Cidr {
    type Err = CidrError;

    fn from_str(text: &str) -> Result<Self, CidrError> {
        let (address, prefix_len) = text.split_once('/').ok_or(CidrError)?;
        let prefix_len = prefix_len.parse().map_err(|_| CidrError)?;
        if prefix_len > 32 {
            return Err(CidrError);
        }
        Ok(Self {
            address: address.parse().map_err(|_| CidrError)?,
            prefix_len,
        })
    }
}

impl fmt::Display for Cidr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.prefix_len)
    }
}

/// Options of a network device.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Network device")]
pub struct NetArgs {
    /// TAP interface to use; it is created if there is none, and then goes away with this program
    ///
    /// A %d in the name is replaced by a free number. Creating an interface needs CAP_NET_ADMIN. Without it, use
    /// one made for this user: ip tuntap add dev NAME mode tap user USER vnet_hdr multi_queue
    #[arg(long, value_name = "NAME", required_unless_present_any = ["tap_fd", "link", "print_capabilities"], conflicts_with_all = ["tap_fd", "link"])]
    pub tap: Option<String>,

    /// What else the card is joined to: a KIND and what belongs to it
    ///
    /// tap:NAME is --tap NAME. macvtap:NAME is a macvtap interface, which must be there; the guest gets its address unless --mac
    /// says otherwise. packet:NAME shares a network interface with the host by a packet socket, and needs CAP_NET_RAW; the
    /// guest and the host do not see each other there. xdp:NAME takes the interface from the host by AF_XDP, one of its queues for
    /// each queue pair, and needs CAP_NET_ADMIN, CAP_NET_RAW and CAP_BPF; it has no offloads. passt is user-mode networking, without any privilege: this program
    /// starts passt, which gives the guest an address by DHCP and opens its connections on its behalf; passt:SOCKET
    /// connects to one that runs. For measurements, null takes all packets and gives none, and generate:BYTES
    /// gives frames of that length as fast as the guest takes them.
    #[arg(long, value_name = "KIND[:…]", conflicts_with = "tap_fd")]
    pub link: Option<LinkSpec>,

    /// Port of the host that leads to the guest, with --link passt or --uplink passt: [ADDRESS/]PORT[:GUEST-PORT] behind tcp: or udp:, as in tcp:8080:80
    #[arg(long, value_name = "PROTOCOL:PORTS")]
    pub forward: Vec<Forward>,

    /// One more argument for passt, with --link passt or --uplink passt; `passt --help` lists them
    #[arg(long, value_name = "ARGUMENT", allow_hyphen_values = true)]
    pub passt_arg: Vec<String>,

    /// Inherited TAP queues to use, by number: one for each queue pair, all of one interface
    ///
    /// Each must have been attached with IFF_TAP, IFF_NO_PI and IFF_VNET_HDR, several with IFF_MULTI_QUEUE.
    #[arg(long, value_name = "NUMBER", value_delimiter = ',', value_parser = clap::value_parser!(RawFd).range(0..))]
    pub tap_fd: Vec<RawFd>,

    /// File for a copy of all packets, in the format of tcpdump and Wireshark; one that is there is overwritten
    ///
    /// A file that is slower than the packets gets not all of them, which is said; the guest does not wait for it. A file has one
    /// writer; a FIFO, such as Wireshark reads, has to have its reader first.
    #[arg(long, value_name = "FILE")]
    pub pcap: Option<PathBuf>,

    /// Bytes of each packet to keep with --pcap
    #[arg(long, value_name = "BYTES", default_value_t = MAX_SNAP, requires = "pcap", value_parser = clap::value_parser!(u32).range(1..=i64::from(MAX_SNAP)))]
    pub pcap_snap: u32,

    /// Keep the TAP interface when this program ends
    #[arg(long, conflicts_with = "tap_fd")]
    pub tap_persist: bool,

    /// Bring the TAP interface up
    #[arg(long)]
    pub tap_up: bool,

    /// IPv4 address of the host's end of the TAP interface; implies --tap-up
    #[arg(long, value_name = "ADDRESS/LENGTH")]
    pub tap_ip: Option<Cidr>,

    /// Address of the guest's interface [default: a random one]
    #[arg(long, value_name = "ADDRESS")]
    pub mac: Option<MacAddress>,

    /// Largest packet in bytes, told to the guest and set on the TAP interface
    #[arg(long, value_name = "BYTES", value_parser = clap::value_parser!(u16).range(68..))]
    pub mtu: Option<u16>,

    /// Speed in Mbit/s that the guest shows for its interface; it limits nothing
    #[arg(long, value_name = "MBITS", value_parser = clap::value_parser!(u32).range(1..=0x7fff_ffff))]
    pub speed: Option<u32>,

    /// Offer the card as the stand-in of an assigned network function with the same --mac
    ///
    /// The guest's driver (Linux: net_failover) joins both to one interface, sends over the function while it is
    /// there, and over this card when it is taken away, as before a live migration.
    #[arg(long, requires = "mac")]
    pub standby: bool,

    /// Number of queue pairs, each served by a thread of its own [default: 1, or as many as --tap-fd has]
    #[arg(long, value_name = "COUNT", value_parser = clap::value_parser!(u16).range(1..=i64::from(MAX_QUEUES)), conflicts_with = "tap_fd")]
    pub queue_pairs: Option<u16>,

    /// How long a queue pair's thread without packets may spin for the next before it sleeps, in microseconds; 0: not at all
    ///
    /// It spins only while packets come as fast as that, and spares the guest its kicks meanwhile. A card that is idle sleeps.
    #[arg(help_heading = "Performance", long, value_name = "MICROSECONDS", default_value_t = 50, value_parser = clap::value_parser!(u32).range(0..=10_000))]
    pub poll: u32,

    /// Most that spinning in vain may take of a queue pair's thread, in percent
    #[arg(help_heading = "Performance", long, value_name = "PERCENT", default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..=100))]
    pub poll_budget: u32,

    /// Limit the card's rates: keys tx-packets, tx-bytes, rx-packets and rx-bytes, each in a second
    ///
    /// tx is what the guest sends, which waits in its ring; rx what it gets, which waits in the link, as far as that holds it.
    /// KEY-burst=N is how much may come at once after a pause; a tenth of a second's worth, unless given. Units K, M, G are
    /// powers of 1024. A segment that the guest leaves to be cut is one packet. `ringside-ctl limits` changes the limits of a
    /// card in use. Who waits sleeps for a millisecond at least, so that a burst of less than comes in two of them makes a lower
    /// limit.
    #[arg(help_heading = "Performance", long, value_name = "KEY=VALUE,...", value_parser = parse_limits)]
    pub limit: Option<CardRates>,

    /// Offer to spread received packets over several queue pairs by a table of the guest's (receive-side scaling)
    ///
    /// It needs a TAP interface and a kernel that takes a program for it (CAP_BPF, or sysctl
    /// kernel.unprivileged_bpf_disabled=0); the log says if it does not. QEMU answers its guests on its own, so that
    /// their tables do not come here.
    #[arg(
        long,
        value_enum,
        default_value = "on",
        value_name = "on|off",
        hide_possible_values = true
    )]
    pub rss: OnOff,

    /// Offer to give the guest a hash of each received packet's addresses and ports
    ///
    /// It saves the guest from hashing when it spreads packets over its processors, and costs the host that work.
    #[arg(long)]
    pub hash_report: bool,

    /// Work that the guest may leave to the host and the host to the guest, as far as the kernel can
    #[arg(
        long,
        value_name = "KIND",
        value_enum,
        value_delimiter = ',',
        default_value = "all"
    )]
    pub offload: Vec<Offload>,

    /// Offer packed virtqueues; the guest decides
    #[arg(
        long,
        value_enum,
        default_value = "on",
        value_name = "on|off",
        hide_possible_values = true
    )]
    pub packed: OnOff,

    /// Offer to use buffers in the order in which they came, which saves both sides work
    #[arg(
        long,
        value_enum,
        default_value = "on",
        value_name = "on|off",
        hide_possible_values = true
    )]
    pub in_order: OnOff,
}

/// The device that the command line asks for cannot be had.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ArgsError {
    /// Values that do not go together.
    #[error("--offload: {0}")]
    Offload(&'static str),
    /// A queue was named twice.
    #[error("--tap-fd: file descriptor {0} is given twice; each queue pair needs its own")]
    SameFd(RawFd),
    /// Too many queues were handed over.
    #[error("--tap-fd: {0} queues; at most {MAX_QUEUES} can be served")]
    TooManyFds(usize),
    /// A setting for a TAP, and there is none.
    #[error("{0} is for a TAP interface, and no link is one")]
    NoTap(&'static str),
    /// A setting for passt, and this program starts none.
    #[error("{0} is for a passt that this program starts: give --link passt, or --uplink passt")]
    NoPasst(&'static str),
    /// A setting for one link, and there are several that it could be for.
    #[error("{0} is for one link, and there are several of its kind")]
    Several(&'static str),
    /// The place of another program cannot be taken.
    #[error("cannot take over")]
    TakeOver(#[from] TakeOverError),
    /// The link cannot be had.
    #[error(transparent)]
    Link(#[from] LinkError),
    /// The system refused something that every process needs.
    #[error("cannot create event descriptors: raise the limit of open files (ulimit -n)")]
    System(#[source] io::Error),
}

impl OpenError for ArgsError {
    fn is_usage(&self) -> bool {
        match self {
            Self::TakeOver(_) => false,
            Self::Offload(_)
            | Self::SameFd(_)
            | Self::TooManyFds(_)
            | Self::NoTap(_)
            | Self::NoPasst(_)
            | Self::Several(_) => true,
            Self::Link(error) => error.is_usage(),
            Self::System(_) => false,
        }
    }
}

/// Goes on with the link of another program, if it is what these options ask for. Without a kind it was one of descriptors that
/// the other program was given.
pub(super) fn adopt_link(
    spec: Option<&LinkSpec>,
    described: Described,
    descriptors: Vec<OwnedFd>,
    options: LinkOptions<'_>,
) -> Result<Opened, ArgsError> {
    let mac = MacAddress::new(described.mac);
    same("the address", &mac, &options.mac.unwrap_or(mac))?;
    let Some(spec) = spec else {
        let tap = LinkSpec::Tap(String::new());
        return Ok(tap.adopt(described, descriptors, options)?);
    };
    // A name with a pattern was chosen by the kernel.
    if !spec.to_string().contains('%') {
        same("the link", &described.link, &spec.to_string())?;
    }
    if matches!(spec, LinkSpec::Tap(_) | LinkSpec::Macvtap(_)) {
        let count = descriptors.len();
        same("a number of queue pairs of", &count, &options.queues.into())?;
    }
    Ok(spec.adopt(described, descriptors, options)?)
}

impl NetArgs {
    fn offloads(&self) -> Result<Offloads, ArgsError> {
        let given = |kind| self.offload.contains(&kind);
        let alone = |kind| given(kind) && self.offload.iter().any(|&other| other != kind);
        if alone(Offload::All) || alone(Offload::Off) {
            return Err(ArgsError::Offload("all and off stand alone"));
        }
        let on = |kind| given(kind) || given(Offload::All);
        let offloads = Offloads {
            csum: on(Offload::Csum),
            tso: on(Offload::Tso),
            ufo: on(Offload::Ufo),
            uso: on(Offload::Uso),
        };
        if !offloads.csum && (offloads.tso || offloads.ufo || offloads.uso) {
            return Err(ArgsError::Offload("tso, ufo and uso need csum as well"));
        }
        Ok(offloads)
    }

    /// The sets of `TUN_F_*` offloads for guests that are joined by a switch, best first. It cuts segments where need be, but
    /// makes no UDP fragments.
    pub(super) fn switched_offloads(&self) -> Result<[u32; 3], ArgsError> {
        let offloads = Offloads {
            ufo: false,
            ..self.offloads()?
        };
        Ok(offloads.candidates())
    }

    /// For how long a worker spins.
    pub(super) fn poll_limits(&self) -> PollLimits {
        PollLimits {
            window: Duration::from_micros(self.poll.into()),
            budget: self.poll_budget,
        }
    }

    pub(super) fn host_end(&self) -> HostEnd {
        HostEnd {
            persist: self.tap_persist,
            mtu: self.mtu,
            address: self.tap_ip,
            up: self.tap_up || self.tap_ip.is_some(),
        }
    }

    fn inherit(&self, offloads: &[u32]) -> Result<Opened, ArgsError> {
        for (index, fd) in self.tap_fd.iter().enumerate() {
            let mut behind = self.tap_fd.iter().skip(index.saturating_add(1));
            if behind.any(|other| other == fd) {
                return Err(ArgsError::SameFd(*fd));
            }
        }
        if self.tap_fd.len() > usize::from(MAX_QUEUES) {
            return Err(ArgsError::TooManyFds(self.tap_fd.len()));
        }
        let (tap, queues) = Tap::inherit(&self.tap_fd).map_err(LinkError::from)?;
        let mac = self.mac.unwrap_or_else(MacAddress::random);
        Ok(Opened::tap(tap, queues, mac, offloads, self.host_end())?)
    }

    /// Goes on with the link of another program, if it is what these options ask for.
    fn adopt_link(&self, parts: Parts, candidates: &[u32]) -> Result<Opened, ArgsError> {
        let Parts {
            description,
            descriptors,
        } = parts;
        let described = Described::deserialize(&description).map_err(TakeOverError::Description)?;
        let spec = match (&self.tap, &self.link) {
            (Some(name), _) => Some(LinkSpec::Tap(name.clone())),
            (None, given) => given.clone(),
        };
        adopt_link(
            spec.as_ref(),
            described,
            descriptors,
            self.link_options(candidates),
        )
    }

    fn link_options<'a>(&'a self, offloads: &'a [u32]) -> LinkOptions<'a> {
        LinkOptions {
            queues: self.queue_pairs.unwrap_or(1),
            mac: self.mac,
            offloads,
            host: self.host_end(),
            forwards: &self.forward,
            passt_arguments: &self.passt_arg,
        }
    }

    /// Refuses settings that none of these links has, or of which nobody knows whose they are.
    pub(super) fn check_settings(&self, links: &[LinkSpec]) -> Result<(), ArgsError> {
        let count = |is: fn(&LinkSpec) -> bool| links.iter().filter(|link| is(link)).count();
        let taps = count(|link| matches!(link, LinkSpec::Tap(_) | LinkSpec::Macvtap(_)));
        let passts = count(|link| matches!(link, LinkSpec::Passt(None)));
        let for_tap = [
            (self.tap_ip.is_some(), "--tap-ip"),
            (self.tap_persist, "--tap-persist"),
            (self.tap_up, "--tap-up"),
        ];
        let for_passt = [
            (!self.forward.is_empty(), "--forward"),
            (!self.passt_arg.is_empty(), "--passt-arg"),
        ];
        let given = |(given, option): (bool, &'static str)| given.then_some(option);
        let first = |settings: &[_]| settings.iter().copied().find_map(given);
        if let (0, Some(option)) = (taps, first(&for_tap)) {
            return Err(ArgsError::NoTap(option));
        }
        if let (0, Some(option)) = (passts, first(&for_passt)) {
            return Err(ArgsError::NoPasst(option));
        }
        // An address or a port of the host can be of one of them.
        for (several, setting) in [(taps > 1, for_tap[0]), (passts > 1, for_passt[0])] {
            if let (true, Some(option)) = (several, given(setting)) {
                return Err(ArgsError::Several(option));
            }
        }
        Ok(())
    }

    /// What the command line names; a TAP that is inherited has no name here.
    fn link_spec(&self) -> LinkSpec {
        match (&self.tap, &self.link) {
            (None, Some(link)) => link.clone(),
            (tap, _) => LinkSpec::Tap(tap.clone().unwrap_or_default()),
        }
    }

    fn open_link(&self, offloads: &[u32]) -> Result<Opened, ArgsError> {
        if self.tap.is_none() && self.link.is_none() {
            return self.inherit(offloads);
        }
        Ok(self.link_spec().open(self.link_options(offloads))?)
    }

    /// Opens the link and makes the device.
    ///
    /// # Errors
    /// [`ArgsError`]
    pub fn open(&self) -> Result<Net, ArgsError> {
        self.open_as(None)
    }

    /// The same with what the device of another program is made of, whose place this one takes.
    ///
    /// # Errors
    /// [`ArgsError`]
    pub fn open_as(&self, parts: Option<Parts>) -> Result<Net, ArgsError> {
        let candidates = self.offloads()?.candidates();
        self.check_settings(&[self.link_spec()])?;
        let taken = parts.is_some();
        let opened = match parts {
            Some(parts) => self.adopt_link(parts, &candidates)?,
            None => self.open_link(&candidates)?,
        };
        let Opened {
            name,
            interface,
            queues,
            offloads,
            mac,
        } = match &self.pcap {
            Some(path) => opened.captured(path, self.pcap_snap)?,
            None => opened,
        };
        let pairs = u16::try_from(queues.len()).unwrap_or(MAX_QUEUES);
        let rss = self.rss == OnOff::On && pairs > 1 && can_steer(interface.as_ref());
        let config = NetConfig {
            mac,
            pairs,
            mtu: self.mtu,
            speed: self.speed,
            hash_types: if rss || self.hash_report {
                HASH_TYPES
            } else {
                0
            },
        };
        let extras = Extras {
            mtu: self.mtu.is_some(),
            speed: self.speed.is_some(),
            coalescing: true,
            standby: self.standby,
            rss,
            hash_report: self.hash_report,
            multi_queue: pairs > 1,
            packed: self.packed == OnOff::On,
            in_order: self.in_order == OnOff::On,
        };
        let features = offered(offloads, extras);
        let poll = self.poll_limits();
        Net::new(config, features, &name, interface, queues)
            .map(|net| net.spinning(poll).captured(self.pcap.is_some()))
            .map(|net| match self.limit {
                Some(rates) => net.limited(rates),
                None => net,
            })
            .map(|net| if taken { net.taken() } else { net })
            .map_err(ArgsError::System)
    }
}

/// Whether packets can go to the queues that a driver wants.
fn can_steer(interface: &dyn Interface) -> bool {
    match interface.prepare_steering() {
        Ok(()) => true,
        Err(error) => {
            info!("RSS is not offered: {}", Causes(&error));
            false
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser, Debug)]
    struct Cli {
        #[command(flatten)]
        net: NetArgs,
        #[arg(long)]
        print_capabilities: bool,
    }

    fn parse(args: &[&str]) -> Result<NetArgs, clap::Error> {
        Cli::try_parse_from([&["x"], args].concat()).map(|cli| cli.net)
    }

    #[test]
    fn one_way_to_a_tap_is_needed_and_only_one() {
        assert!(parse(&[]).is_err());
        assert!(parse(&["--tap", "t", "--tap-fd", "3"]).is_err());
        assert!(parse(&["--tap-fd", "3", "--queue-pairs", "2"]).is_err());
        assert_eq!(parse(&["--tap-fd", "3,4"]).unwrap().tap_fd, [3, 4]);
        assert!(parse(&["--tap", "t", "--queue-pairs", "0"]).is_err());
        assert!(parse(&["--tap", "t", "--queue-pairs", "257"]).is_err());
        assert!(parse(&["--tap", "t", "--mtu", "67"]).is_err());
        assert!(parse(&["--tap", "t", "--mac", "01:00:00:00:00:00"]).is_err());
        assert!(parse(&["--tap", "t", "--tap-ip", "10.0.0.1"]).is_err());
        assert!(parse(&["--tap", "t", "--standby"]).is_err());
        let standby = ["--tap", "t", "--standby", "--mac", "02:00:00:00:00:01"];
        assert!(parse(&standby).unwrap().standby);
        let same = parse(&["--tap-fd", "900,900"]).unwrap().open();
        assert!(matches!(same, Err(ArgsError::SameFd(900))));
    }

    #[test]
    fn offloads_that_do_not_go_together_are_refused() {
        let offloads = |list| {
            parse(&["--tap", "t", "--offload", list])
                .unwrap()
                .offloads()
        };
        assert!(offloads("all").unwrap().uso);
        assert!(!offloads("off").unwrap().csum);
        let some = offloads("csum,tso").unwrap();
        assert!(some.csum && some.tso && !some.ufo && !some.uso);
        assert!(offloads("tso").unwrap_err().is_usage());
        assert!(offloads("all,csum").is_err());
        assert!(offloads("off,csum").is_err());
    }

    #[test]
    fn cidr() {
        let cidr: Cidr = "192.168.90.1/24".parse().unwrap();
        assert_eq!(cidr.to_string(), "192.168.90.1/24");
        for bad in ["", "1.2.3.4", "1.2.3.4/33", "1.2.3/24", "1.2.3.4/-1"] {
            assert_eq!(bad.parse::<Cidr>(), Err(CidrError), "{bad:?}");
        }
    }
}

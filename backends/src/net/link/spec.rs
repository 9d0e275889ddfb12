//! The option --link, and how a link is opened.

use std::fmt;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;

use ringside_sandbox::{Capability, Profile, ThreadKind, calls};
use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::idle::{MAX_GENERATED, MIN_GENERATED};
use super::packet::{self, Packet};
use super::passt::{Forward, Passt, Source};
use super::pcap::tee;
use super::xdp::Xdp;
use super::{AnyLink, Fixed, Generate, Interface, LinkError, Null, Tap};
use crate::net::args::Cidr;
use crate::net::config::MacAddress;

/// What stands behind a card, as the command line says it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LinkSpec {
    /// A TAP interface.
    Tap(String),
    /// A macvtap interface that there is.
    Macvtap(String),
    /// A packet socket on an interface.
    Packet(String),
    /// AF_XDP sockets on an interface.
    Xdp(String),
    /// A passt: one that listens on this socket, or one that this program starts.
    Passt(Option<PathBuf>),
    /// Nothing.
    Null,
    /// A source of frames of this many bytes.
    Generate(u16),
}

/// A text names no link.
#[derive(Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum LinkSpecError {
    /// No such kind.
    #[error(
        "there is no link of kind \"{0}\"; there are tap:NAME, macvtap:NAME, packet:NAME, xdp:NAME, passt, passt:SOCKET, null and generate:BYTES"
    )]
    Kind(String),
    /// The name is missing.
    #[error("a link of kind {0} needs the name of an interface, as in {0}:eth0")]
    NoName(&'static str),
    /// Too much was said.
    #[error("a link of kind {0} takes nothing behind its name")]
    TooMuch(&'static str),
    /// The length of frames is none.
    #[error(
        "frames to generate have {MIN_GENERATED} to {MAX_GENERATED} bytes, as in generate:1514"
    )]
    Length,
}

impl FromStr for LinkSpec {
    type Err = LinkSpecError;

    fn from_str(text: &str) -> Result<Self, LinkSpecError> {
        let (kind, rest) = match text.split_once(':') {
            Some((kind, rest)) => (kind, Some(rest)),
            None => (text, None),
        };
        let name = |kind| match rest {
            Some(name) if !name.is_empty() => Ok(name.to_owned()),
            _ => Err(LinkSpecError::NoName(kind)),
        };
        match kind {
            "tap" => Ok(Self::Tap(name("tap")?)),
            "macvtap" => Ok(Self::Macvtap(name("macvtap")?)),
            "packet" => Ok(Self::Packet(name("packet")?)),
            "xdp" => Ok(Self::Xdp(name("xdp")?)),
            "passt" => Ok(Self::Passt(
                rest.filter(|path| !path.is_empty()).map(PathBuf::from),
            )),
            "null" if rest.is_some() => Err(LinkSpecError::TooMuch("null")),
            "null" => Ok(Self::Null),
            "generate" => {
                let len: u16 = rest
                    .unwrap_or("60")
                    .parse()
                    .map_err(|_| LinkSpecError::Length)?;
                if (MIN_GENERATED..=MAX_GENERATED).contains(&len) {
                    Ok(Self::Generate(len))
                } else {
                    Err(LinkSpecError::Length)
                }
            }
            _ => Err(LinkSpecError::Kind(kind.to_owned())),
        }
    }
}

impl fmt::Display for LinkSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tap(name) => write!(f, "tap:{name}"),
            Self::Macvtap(name) => write!(f, "macvtap:{name}"),
            Self::Packet(name) => write!(f, "packet:{name}"),
            Self::Xdp(name) => write!(f, "xdp:{name}"),
            Self::Passt(Some(path)) => write!(f, "passt:{}", path.display()),
            Self::Passt(None) => f.write_str("passt"),
            Self::Null => f.write_str("null"),
            Self::Generate(len) => write!(f, "generate:{len}"),
        }
    }
}

/// What is to be done with the host's end of an interface.
#[derive(Debug, Clone, Copy, Default)]
pub(in crate::net) struct HostEnd {
    /// It stays when this program ends.
    pub(in crate::net) persist: bool,
    /// Its MTU in bytes.
    pub(in crate::net) mtu: Option<u16>,
    /// Its IPv4 address.
    pub(in crate::net) address: Option<Cidr>,
    /// It is brought up.
    pub(in crate::net) up: bool,
}

/// What a link needs to know of the card before it.
#[derive(Debug, Clone, Copy)]
pub(in crate::net) struct LinkOptions<'a> {
    /// Number of queues.
    pub(in crate::net) queues: u16,
    /// Address of the card, if it has one already.
    pub(in crate::net) mac: Option<MacAddress>,
    /// Sets of `TUN_F_*` that are wanted, best first.
    pub(in crate::net) offloads: &'a [u32],
    /// For a TAP.
    pub(in crate::net) host: HostEnd,
    /// For a passt that this program starts: ports of the host that lead to the guest.
    pub(in crate::net) forwards: &'a [Forward],
    /// For a passt that this program starts: more arguments.
    pub(in crate::net) passt_arguments: &'a [String],
}

/// A link that is open.
pub(in crate::net) struct Opened {
    /// What it is, for the log and the status: as --link has it.
    pub(in crate::net) name: String,
    /// What a driver can change about it.
    pub(in crate::net) interface: Arc<dyn Interface>,
    /// One for each queue pair.
    pub(in crate::net) queues: Vec<AnyLink>,
    /// The `TUN_F_*` offloads that it takes and gives, of those that are wanted.
    pub(in crate::net) offloads: u32,
    /// The address that the card should have.
    pub(in crate::net) mac: MacAddress,
}

/// A link that is open, for a program that goes on with it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(in crate::net) struct Described {
    /// What it is, as --link has it.
    pub(in crate::net) link: String,
    /// The address of the card.
    pub(in crate::net) mac: [u8; 6],
    /// The `TUN_F_*` offloads that it takes and gives.
    pub(in crate::net) offloads: u32,
    /// The queues that are attached.
    pub(in crate::net) attached: Vec<u16>,
}

impl LinkSpec {
    /// What it needs when the program is confined, besides sending and receiving.
    pub(super) fn needs(&self, profile: &mut Profile) {
        match self {
            // A queue that is attached again has a new socket.
            Self::Packet(_) => {
                profile
                    .network()
                    .capability(Capability::CAP_NET_RAW)
                    .calls(calls::PACKET)
                    .thread(ThreadKind::Queue, &[calls::PACKET]);
            }
            Self::Xdp(_) => {
                profile
                    .capability(Capability::CAP_BPF)
                    .calls(calls::BPF_MAPS)
                    .thread(ThreadKind::Queue, &[calls::BPF_MAPS]);
            }
            Self::Passt(Some(path)) => {
                profile
                    .connect(path)
                    .calls(calls::STREAMS)
                    .calls(calls::CONNECTING)
                    .thread(ThreadKind::Queue, &[calls::STREAMS, calls::CONNECTING]);
            }
            // Another process starts it.
            Self::Passt(None) => {
                profile
                    .calls(calls::STREAMS)
                    .thread(ThreadKind::Queue, &[calls::STREAMS]);
            }
            Self::Tap(_) | Self::Macvtap(_) => {}
            Self::Null | Self::Generate(_) => {}
        }
    }

    /// Goes on with the link of another program, which has it open until it ends.
    ///
    /// # Errors
    /// [`LinkError`]
    pub(in crate::net) fn adopt(
        &self,
        described: Described,
        descriptors: Vec<OwnedFd>,
        options: LinkOptions<'_>,
    ) -> Result<Opened, LinkError> {
        let Described {
            link: name,
            mac,
            offloads,
            attached,
        } = described;
        let mac = MacAddress::new(mac);
        match self {
            Self::Tap(_) | Self::Macvtap(_) => {
                let (tap, queues) = Tap::adopt(descriptors)?;
                Ok(Opened {
                    name,
                    offloads,
                    interface: Arc::new(tap),
                    queues: queues.into_iter().map(AnyLink::Tap).collect(),
                    mac,
                })
            }
            Self::Packet(interface) => {
                let sockets = attached.into_iter().zip(descriptors).collect();
                let packet = Packet::adopt(interface, options.queues, sockets)?;
                Ok(Opened::packet(name, packet, offloads, mac))
            }
            Self::Passt(path) => {
                let passt = Passt::adopt(path.as_deref(), descriptors)?;
                Ok(Opened::passt(name, passt, mac))
            }
            Self::Xdp(_) | Self::Null | Self::Generate(_) => self.open(LinkOptions {
                mac: Some(mac),
                ..options
            }),
        }
    }

    /// Opens it.
    ///
    /// # Errors
    /// [`LinkError`]
    pub(in crate::net) fn open(&self, options: LinkOptions<'_>) -> Result<Opened, LinkError> {
        let LinkOptions {
            queues,
            mac,
            offloads,
            host,
            forwards,
            passt_arguments,
        } = options;
        let mac = mac.unwrap_or_else(MacAddress::random);
        let name = self.to_string();
        // Who takes whatever comes, and gives whole frames only, has all offloads.
        let whole = offloads.first().copied().unwrap_or(0);
        Ok(match self {
            Self::Tap(interface) => {
                let (tap, queues) = Tap::open(interface, queues)?;
                Opened::tap(tap, queues, mac, offloads, host)?
            }
            Self::Macvtap(interface) => {
                let (tap, queues) = Tap::macvtap(interface, queues)?;
                // Packets for other addresses do not reach it.
                let mac = match options.mac {
                    Some(mac) => mac,
                    None => tap.mac()?,
                };
                let opened = Opened::tap(tap, queues, mac, offloads, host)?;
                Opened { name, ..opened }
            }
            Self::Packet(interface) => {
                Opened::packet(name, Packet::open(interface, queues)?, whole, mac)
            }
            Self::Xdp(interface) => Opened {
                name,
                interface: Arc::new(Fixed(self.clone())),
                queues: Xdp::open(interface, queues)?
                    .into_iter()
                    .map(|queue| AnyLink::Other(Box::new(queue)))
                    .collect(),
                offloads: 0,
                mac,
            },
            Self::Passt(_) if queues > 1 => return Err(LinkError::OneQueue { kind: "passt" }),
            Self::Passt(path) => {
                let source = match path {
                    Some(path) => Source::Listening(path.clone()),
                    None => Source::started(forwards, passt_arguments, host.mtu)?,
                };
                Opened::passt(name, Passt::open(source)?, mac)
            }
            Self::Null => Opened {
                name,
                interface: Arc::new(Fixed(self.clone())),
                queues: (0..queues).map(|_| AnyLink::Null(Null)).collect(),
                offloads: whole,
                mac,
            },
            Self::Generate(len) => Opened {
                name,
                interface: Arc::new(Fixed(self.clone())),
                queues: (0..queues)
                    .map(|_| AnyLink::Generate(Generate::new(*len, mac)))
                    .collect(),
                offloads: whole,
                mac,
            },
        })
    }
}

impl Opened {
    /// With a file that gets a copy of its frames, at most `snap` bytes of each.
    ///
    /// # Errors
    /// [`LinkError::Pcap`]
    pub(in crate::net) fn captured(self, path: &Path, snap: u32) -> Result<Self, LinkError> {
        let queues = tee(self.queues, path, snap)?;
        Ok(Self { queues, ..self })
    }

    /// Packet sockets that are open.
    fn packet(
        name: String,
        (interface, queues): (Arc<packet::Sockets>, Vec<Packet>),
        offloads: u32,
        mac: MacAddress,
    ) -> Self {
        let queues = queues.into_iter();
        Self {
            name,
            interface,
            queues: queues
                .map(|queue| AnyLink::Other(Box::new(queue)))
                .collect(),
            offloads,
            mac,
        }
    }

    /// A passt that is connected.
    fn passt(name: String, link: Passt, mac: MacAddress) -> Self {
        Self {
            name,
            interface: link.handle(),
            queues: vec![AnyLink::Other(Box::new(link))],
            offloads: 0,
            mac,
        }
    }

    /// A TAP interface that is open.
    ///
    /// # Errors
    /// [`LinkError::Tap`]
    pub(in crate::net) fn tap(
        tap: Tap,
        queues: Vec<super::TapQueue>,
        mac: MacAddress,
        offloads: &[u32],
        host: HostEnd,
    ) -> Result<Self, LinkError> {
        let offloads = tap.probe_offloads(offloads);
        if host.persist {
            tap.set_persistent()?;
        }
        if let Some(mtu) = host.mtu {
            tap.set_mtu(mtu)?;
        }
        if let Some(Cidr {
            address,
            prefix_len,
        }) = host.address
        {
            tap.set_address(address, prefix_len)?;
        }
        if host.up {
            tap.set_up()?;
        }
        Ok(Self {
            name: format!("tap:{}", tap.name()),
            offloads,
            interface: Arc::new(tap),
            queues: queues.into_iter().map(AnyLink::Tap).collect(),
            mac,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_are_read_and_written_alike() {
        for text in ["tap:vm0", "null", "generate:1514"] {
            assert_eq!(text.parse::<LinkSpec>().unwrap().to_string(), text);
        }
        assert_eq!("generate".parse(), Ok(LinkSpec::Generate(60)));
        let wrong = |text: &str| text.parse::<LinkSpec>().unwrap_err();
        assert_eq!(wrong("tap"), LinkSpecError::NoName("tap"));
        assert_eq!(wrong("tap:"), LinkSpecError::NoName("tap"));
        assert_eq!(wrong("null:x"), LinkSpecError::TooMuch("null"));
        assert_eq!(wrong("generate:59"), LinkSpecError::Length);
        assert_eq!(wrong("generate:x"), LinkSpecError::Length);
        assert_eq!(wrong("tun:x"), LinkSpecError::Kind("tun".to_owned()));
    }
}

//! What a port is made from, as users write it: `socket=PATH,vlan=7,…`.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::PathBuf;
use std::str::FromStr;

use clap::Args;
use ringside_control::Size;
use ringside_control::options::keys_and_values;
use thiserror::Error;

use super::super::config::MacAddress;
use super::super::link::LinkSpec;
use super::policy::{DEFAULT_VLAN, Policy, VlanRange, Vlans, parse_vlan};
use super::shared::{FLOOD, LIMITS, PortRates};
use crate::net::link::{MAX_QUEUES, MAX_SNAP};
use crate::shell::{LimitError, NamedRates, PortOptions};

/// Options of a switch.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Switch")]
pub struct SwitchArgs {
    /// Serve a guest at a port of a switch, in place of one guest with a link of its own; once for each guest
    ///
    /// socket=PATH is where its virtual machine monitor connects (client=on: listens). Further keys: name=, mac=, mtu=,
    /// queue-pairs=, rss= [on], hash-report= and standby= as the options of these names say of a card; vlan=N for the VLAN
    /// that it is in without knowing [1], or trunk=N+N-N for those that it sees with tags, with native=N for the one
    /// without; isolated=on so that it speaks with no other isolated port;
    /// mac-filter=MAC+MAC and ip-filter=IP+IP for the only addresses that it may send from; and limits in a second:
    /// tx-packets=, tx-bytes=, rx-packets=, rx-bytes= (each with -burst=), and flood-packets= [20000] for what goes to all (a longer frame than 1514 bytes is several);
    /// pcap=FILE, which is overwritten, for a copy of what the switch lets in there, and of what is to go out, before rx-
    /// limits and the guest's buffers (of ports that come later only with --sandbox off), of each frame at most pcap-snap= [262144] bytes.
    /// Ports come and go while the program runs: ringside-ctl port-add, port-remove.
    #[arg(long, value_name = "socket=PATH,…", value_parser = parse_port)]
    pub port: Vec<PortOptions>,

    /// Join the switch to what a --link can be, such as tap:NAME; with the keys of a --port that are not about a guest
    ///
    /// What comes from there beyond tx-packets= and tx-bytes= is dropped; a guest's frames wait in its ring.
    #[arg(long, value_name = "KIND[:…][,KEY=VALUE,…]", value_parser = parse_uplink, requires = "port")]
    pub uplink: Vec<PortOptions>,

    /// Seconds after which the switch forgets where an address was, if nothing comes from there
    #[arg(long, value_name = "SECONDS", default_value_t = 300, value_parser = clap::value_parser!(u32).range(1..=1_000_000), requires = "port")]
    pub ageing: u32,
}

fn parse_port(text: &str) -> Result<PortOptions, String> {
    let options = keys_and_values(text, Some("socket"))?.into_iter().collect();
    GuestOptions::read(&options).map_err(|e| e.to_string())?;
    Ok(options)
}

fn parse_uplink(text: &str) -> Result<PortOptions, String> {
    let options = keys_and_values(text, Some("link"))?.into_iter().collect();
    UplinkOptions::read(&options).map_err(|e| e.to_string())?;
    Ok(options)
}

/// A port is described in a way that cannot be.
#[derive(Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum OptionsError {
    /// A key that is none.
    #[error("there is no key `{0}`: see --port in --help")]
    Unknown(String),
    /// A key that must be there.
    #[error("{0}= is missing")]
    Missing(&'static str),
    /// A value that its key cannot have.
    #[error("{key}: {why}")]
    Value {
        /// The key.
        key: &'static str,
        /// What is wrong.
        why: String,
    },
    /// Keys that exclude each other, or need each other.
    #[error("{0}")]
    Together(&'static str),
    /// Limits.
    #[error(transparent)]
    Limit(#[from] LimitError),
}

/// A file for a copy of a port's frames.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Capture {
    pub(super) path: PathBuf,
    /// Most bytes of each frame.
    pub(super) snap: u32,
}

/// Longest name of a port, in bytes.
const MAX_NAME: usize = 64;

/// Takes keys out of a description one by one, so that what is left is unknown.
struct Reader(PortOptions);

impl Reader {
    fn text(&mut self, key: &str) -> Option<String> {
        self.0.remove(key)
    }

    fn get<T>(
        &mut self,
        key: &'static str,
        read: impl FnOnce(&str) -> Result<T, String>,
    ) -> Result<Option<T>, OptionsError> {
        self.text(key)
            .map(|text| read(&text).map_err(|why| OptionsError::Value { key, why }))
            .transpose()
    }

    fn list<T: FromStr<Err: ToString>>(
        &mut self,
        key: &'static str,
    ) -> Result<Vec<T>, OptionsError> {
        let read = |text: &str| {
            let items = text.split('+').map(str::parse);
            items
                .collect::<Result<_, T::Err>>()
                .map_err(|e| e.to_string())
        };
        Ok(self.get(key, read)?.unwrap_or_default())
    }

    fn switch(&mut self, key: &'static str, default: bool) -> Result<bool, OptionsError> {
        let read = |text: &str| match text {
            "on" => Ok(true),
            "off" => Ok(false),
            _ => Err(format!("`{text}` is neither on nor off")),
        };
        Ok(self.get(key, read)?.unwrap_or(default))
    }

    /// The name; the log shows it, threads and metrics are named by it.
    fn name(&mut self) -> Result<Option<String>, OptionsError> {
        let read = |text: &str| {
            if text.len() > MAX_NAME || text.chars().any(char::is_control) {
                return Err(format!(
                    "{text:?} has more than {MAX_NAME} bytes, or control characters"
                ));
            }
            Ok(text.to_owned())
        };
        Ok(self.get("name", read)?.filter(|name| !name.is_empty()))
    }

    /// What guests' ports and uplinks have in common.
    fn policy(&mut self) -> Result<(Policy, PortRates), OptionsError> {
        let access = self.get("vlan", parse_vlan)?;
        let trunk = self.get("trunk", str::parse::<VlanRange>)?;
        let native = self.get("native", parse_vlan)?;
        let vlans = match (access, trunk, native) {
            (Some(_), Some(_), _) => {
                return Err(OptionsError::Together(
                    "vlan= and trunk= exclude each other",
                ));
            }
            (_, None, Some(_)) => {
                return Err(OptionsError::Together(
                    "native= is for a trunk: give trunk=, too",
                ));
            }
            (access, None, None) => Vlans::Access(access.unwrap_or(DEFAULT_VLAN)),
            (None, Some(tagged), native) => Vlans::Trunk { tagged, native },
        };
        let policy = Policy {
            vlans,
            isolated: self.switch("isolated", false)?,
            macs: self.list("mac-filter")?,
            ips: self.list::<IpAddr>("ip-filter")?,
        };
        let mut changes = BTreeMap::from([("flood-packets".to_owned(), Size(FLOOD))]);
        let is_limit = |key: &String| LIMITS.iter().any(|limit| key.starts_with(limit));
        let keys: Vec<String> = self.0.keys().filter(|key| is_limit(key)).cloned().collect();
        for key in keys {
            let value = self.text(&key).unwrap_or_default();
            let size = value.parse().map_err(|why| OptionsError::Value {
                key: "limits of rates",
                why,
            })?;
            changes.insert(key, size);
        }
        let rates = NamedRates::new(&LIMITS).with(&changes)?;
        Ok((policy, rates))
    }

    fn capture(&mut self) -> Result<Option<Capture>, OptionsError> {
        let read = |text: &str| {
            let snap = text.parse().ok();
            let snap = snap.filter(|snap| (1..=MAX_SNAP).contains(snap));
            snap.ok_or_else(|| format!("`{text}` is no number from 1 to {MAX_SNAP}"))
        };
        let snap = self.get("pcap-snap", read)?;
        match self.text("pcap").filter(|path| !path.is_empty()) {
            Some(path) => Ok(Some(Capture {
                path: path.into(),
                snap: snap.unwrap_or(MAX_SNAP),
            })),
            None if snap.is_some() => Err(OptionsError::Together(
                "pcap-snap= is for a capture: give pcap=, too",
            )),
            None => Ok(None),
        }
    }

    fn end(self) -> Result<(), OptionsError> {
        match self.0.into_keys().next() {
            Some(key) => Err(OptionsError::Unknown(key)),
            None => Ok(()),
        }
    }
}

/// A guest's port.
#[derive(Debug, Clone)]
pub(super) struct GuestOptions {
    pub(super) name: Option<String>,
    pub(super) socket: PathBuf,
    pub(super) client: bool,
    pub(super) mac: Option<MacAddress>,
    pub(super) mtu: Option<u16>,
    pub(super) pairs: u16,
    pub(super) rss: bool,
    pub(super) hash_report: bool,
    pub(super) standby: bool,
    pub(super) policy: Policy,
    pub(super) rates: PortRates,
    pub(super) capture: Option<Capture>,
}

fn number(range: std::ops::RangeInclusive<u16>) -> impl FnOnce(&str) -> Result<u16, String> {
    move |text| {
        let number = text.parse().ok().filter(|number| range.contains(number));
        number.ok_or_else(|| {
            let (first, last) = (range.start(), range.end());
            format!("`{text}` is no number from {first} to {last}")
        })
    }
}

impl GuestOptions {
    pub(super) fn read(options: &PortOptions) -> Result<Self, OptionsError> {
        let mut reader = Reader(options.clone());
        let (policy, rates) = reader.policy()?;
        let capture = reader.capture()?;
        let mac = |text: &str| {
            text.parse()
                .map_err(|e: super::super::config::MacError| e.to_string())
        };
        let read = Self {
            name: reader.name()?,
            socket: reader
                .text("socket")
                .filter(|path| !path.is_empty())
                .ok_or(OptionsError::Missing("socket"))?
                .into(),
            client: reader.switch("client", false)?,
            mac: reader.get("mac", mac)?,
            mtu: reader.get("mtu", number(68..=u16::MAX))?,
            pairs: reader
                .get("queue-pairs", number(1..=MAX_QUEUES))?
                .unwrap_or(1),
            rss: reader.switch("rss", true)?,
            hash_report: reader.switch("hash-report", false)?,
            standby: reader.switch("standby", false)?,
            policy,
            rates,
            capture,
        };
        reader.end()?;
        if read.standby && read.mac.is_none() {
            return Err(OptionsError::Together(
                "standby=on needs mac=: that of the function that the card stands in for",
            ));
        }
        Ok(read)
    }
}

/// A link's port.
#[derive(Debug, Clone)]
pub(super) struct UplinkOptions {
    pub(super) name: Option<String>,
    pub(super) link: LinkSpec,
    pub(super) policy: Policy,
    pub(super) rates: PortRates,
    pub(super) capture: Option<Capture>,
}

impl UplinkOptions {
    pub(super) fn read(options: &PortOptions) -> Result<Self, OptionsError> {
        let mut reader = Reader(options.clone());
        let (policy, rates) = reader.policy()?;
        let capture = reader.capture()?;
        let link = |text: &str| text.parse::<LinkSpec>().map_err(|e| e.to_string());
        let read = Self {
            name: reader.name()?,
            link: reader
                .get("link", link)?
                .ok_or(OptionsError::Missing("link"))?,
            policy,
            rates,
            capture,
        };
        reader.end()?;
        Ok(read)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_are_described_by_keys() {
        let read = |text: &str| {
            let options = parse_port(text)?;
            GuestOptions::read(&options).map_err(|e| e.to_string())
        };
        let port = read("/run/a,vlan=7,isolated=on,mac-filter=02:00:00:00:00:01+02:00:00:00:00:02,tx-bytes=10M,queue-pairs=4").unwrap();
        assert_eq!(port.socket, PathBuf::from("/run/a"));
        assert_eq!(port.policy.vlans, Vlans::Access(7));
        assert!(port.policy.isolated);
        assert_eq!((port.policy.macs.len(), port.pairs), (2, 4));
        let limits = port.rates.to_json();
        assert_eq!(limits["tx-bytes"], 10 << 20);
        assert_eq!(limits["flood-packets"], FLOOD);
        let trunk = read("socket=/run/a,trunk=2+4-6,native=9,flood-packets=0").unwrap();
        assert!(matches!(
            trunk.policy.vlans,
            Vlans::Trunk {
                native: Some(9),
                ..
            }
        ));
        for (wrong, why) in [
            ("vlan=7", "socket= is missing"),
            ("/run/a,vlan=7,trunk=8", "exclude each other"),
            ("/run/a,native=7", "give trunk="),
            ("/run/a,vlan=4095", "1 to 4094"),
            ("/run/a,isolated=yes", "neither on nor off"),
            ("/run/a,standby=on", "needs mac="),
            ("/run/a,ip-filter=10.0.0", "ip-filter: "),
            ("/run/a,colour=red", "no key `colour`"),
            ("/run/a,pcap-snap=64", "give pcap="),
            ("/run/a,pcap=/run/a.pcap,pcap-snap=0", "pcap-snap: "),
            ("/run/a,tx-bytes-burst=1", "of no use without"),
            ("/run/a,queue-pairs=0", "from 1 to 256"),
            ("/run/a,name=a\0b", "control characters"),
        ] {
            let error = read(wrong).unwrap_err();
            assert!(error.contains(why), "{wrong}: {error}");
        }
        assert_eq!(
            read("/run/a,pcap=/run/a.pcap,pcap-snap=96")
                .unwrap()
                .capture,
            Some(Capture {
                path: "/run/a.pcap".into(),
                snap: 96
            })
        );
        assert!(parse_uplink("tap:up0,trunk=1-4094").is_ok());
        assert!(parse_uplink("tap:up0,mac=02:00:00:00:00:01").is_err());
        assert!(parse_uplink("road:up0").is_err());
    }
}

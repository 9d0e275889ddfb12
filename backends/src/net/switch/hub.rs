//! The switch as a whole: its thread, and the ports that come and go.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::{Arc, mpsc};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use ringside_control::{ApiError, ErrorCode, Size};
use ringside_sandbox::{Profile, ThreadKind, calls};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use thiserror::Error;
use tracing::{error, info};

use super::super::args::{ArgsError, NetArgs, adopt_link};
use super::super::config::{MacAddress, NetConfig};
use super::super::device::{needs, no_other_program};
use super::super::features::{Extras, offered};
use super::super::hash::HASH_TYPES;
use super::super::link::{Described, Interface, LinkError, LinkOptions, PcapError, Recorder};
use super::counters::AllPorts;
use super::options::{Capture, GuestOptions, OptionsError, SwitchArgs, UplinkOptions};
use super::policy::{MAX_PORTS, PortId};
use super::port::SwitchPort;
use super::shared::{PortSettings, PortShared};
use super::table::{QUOTA, UPLINK_QUOTA};
use super::worker::{Behind, Inbox, Known, Order, Worker};
use crate::shell::{
    Hub, OnOff, OpenError, OpenPort, Parts, PortOptions, StateError, Statistics, TakeOverError,
    UplinkControl, confined, counters_go_on, counters_to_json, now, same,
};

/// How long the switch's thread may take to tell what it knows.
const PATIENCE: Duration = Duration::from_secs(2);

/// A switch, or a port of it, cannot be had.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum SwitchError {
    /// The description of a port.
    #[error("port: {0}")]
    Options(#[from] OptionsError),
    /// What is for all ports.
    #[error(transparent)]
    Args(#[from] ArgsError),
    /// Two ports of one name.
    #[error("there is a port `{0}` already: give another name")]
    Name(String),
    /// Two ports with one address.
    #[error("address {mac} belongs to port `{port}` already")]
    Address {
        /// The address.
        mac: MacAddress,
        /// Who has it.
        port: String,
    },
    /// No more ports.
    #[error("the switch has {MAX_PORTS} ports, and no room for another")]
    Full,
    /// An uplink.
    #[error("uplink {name}")]
    Link {
        /// Its name.
        name: String,
        /// What is wrong with it.
        #[source]
        source: LinkError,
    },
    /// A capture file.
    #[error(transparent)]
    Capture(#[from] PcapError),
    /// The same capture file for two ports.
    #[error("the capture file {path} is named twice: give each port its own", path = .0.display())]
    OneCapture(PathBuf),
    /// The system refused something that every process needs.
    #[error("cannot create the switch's threads or event descriptors")]
    System(#[source] io::Error),
}

impl OpenError for SwitchError {
    fn is_usage(&self) -> bool {
        match self {
            Self::Options(_) | Self::Name(_) | Self::Address { .. } | Self::OneCapture(_) => true,
            Self::Args(error) => error.is_usage(),
            Self::Link { .. } | Self::Full | Self::Capture(_) | Self::System(_) => false,
        }
    }
}

/// What a switch is made of, for another program.
#[derive(Debug, Serialize, Deserialize)]
struct SwitchParts {
    /// Its ports and links, as its command line had them.
    options: [Vec<PortOptions>; 2],
    ageing: u32,
    /// Its links now, and how many descriptors each has.
    links: Vec<(Described, usize)>,
}

/// What a switch goes on from.
#[derive(Debug, Serialize, Deserialize)]
struct SwitchState {
    /// VLAN, address, port, and in which second of CLOCK_MONOTONIC a frame came from there.
    addresses: Vec<(u16, [u8; 6], String, u32)>,
    /// Of uplinks, by name.
    uplinks: BTreeMap<String, PortSettings>,
    /// What uplinks have of frames.
    left: Vec<Value>,
    counters: Value,
}

/// A switch.
pub struct Switch {
    args: NetArgs,
    /// The `TUN_F_*` offloads that guests are offered.
    offloads: u32,
    /// By number: the ports there are.
    ports: Vec<Option<Arc<PortShared>>>,
    uplinks: Vec<Arc<Uplink>>,
    /// Capture files of ports on the command line, until those are there: later the program may open no file.
    recorders: BTreeMap<PathBuf, Recorder>,
    /// Ports and links, as the command line had them.
    options: [Vec<PortOptions>; 2],
    ageing: u32,
    all: Arc<AllPorts>,
    inbox: Arc<Inbox>,
    /// Until its thread starts.
    worker: Option<Worker>,
    thread: Option<JoinHandle<()>>,
}

/// What a switch is joined to.
struct Uplink {
    port: Arc<PortShared>,
    interface: Arc<dyn Interface>,
    described: Described,
}

impl UplinkControl for Uplink {
    fn name(&self) -> &str {
        &self.port.name
    }

    fn link(&self) -> &str {
        &self.described.link
    }

    fn status(&self) -> Value {
        let policy = &self.port.policy;
        json!({
            "device": "uplink",
            "interface": {
                "port": self.port.name,
                "uplink": self.described.link,
                "link": if self.port.is_up() { "up" } else { "down" },
                "vlans": policy.vlans.to_string(),
                "isolated": policy.isolated,
            },
            "limits": self.port.limits.get().to_json(),
        })
    }

    fn limits(&self, changes: &BTreeMap<String, Size>) -> Result<Value, ApiError> {
        self.port.limits.change(changes)
    }

    fn set_link(&self, up: bool) -> bool {
        self.port.plug(up)
    }
}

impl Switch {
    /// Whether these options go together.
    ///
    /// # Errors
    /// [`SwitchError`]
    pub fn check(args: &NetArgs, switch: &SwitchArgs) -> Result<(), SwitchError> {
        args.switched_offloads()?;
        let ports = switch.port.iter().map(GuestOptions::read);
        let ports = ports.collect::<Result<Vec<_>, _>>()?;
        let uplinks = switch.uplink.iter().map(UplinkOptions::read);
        let uplinks = uplinks.collect::<Result<Vec<_>, _>>()?;
        let captures = ports.into_iter().map(|port| port.capture);
        let captures = captures.chain(uplinks.iter().map(|uplink| uplink.capture.clone()));
        let mut files = BTreeSet::new();
        for Capture { path, .. } in captures.flatten() {
            if !files.insert(path.clone()) {
                return Err(SwitchError::OneCapture(path));
            }
        }
        let links: Vec<_> = uplinks.into_iter().map(|uplink| uplink.link).collect();
        Ok(args.check_settings(&links)?)
    }

    /// A switch that is joined to its uplinks, and has no thread yet: to those of another program, if it takes the place of that.
    ///
    /// # Errors
    /// [`SwitchError`]
    pub fn new(
        args: &NetArgs,
        switch: &SwitchArgs,
        parts: Option<Parts>,
    ) -> Result<Self, SwitchError> {
        let options = [switch.port.clone(), switch.uplink.clone()];
        let candidates = args.switched_offloads()?;
        let inbox = Arc::new(Inbox::new().map_err(SwitchError::System)?);
        let all = Arc::<AllPorts>::default();
        let poll = args.poll_limits();
        let worker = Worker::new(Arc::clone(&inbox), Arc::clone(&all), switch.ageing, poll)
            .map_err(SwitchError::System)?;
        let worker = match parts {
            Some(_) => worker.frozen(),
            None => worker,
        };
        let mut opened = Self {
            args: args.clone(),
            offloads: candidates.first().copied().unwrap_or(0),
            ports: (0..MAX_PORTS).map(|_| None).collect(),
            uplinks: Vec::new(),
            recorders: BTreeMap::new(),
            options,
            ageing: switch.ageing,
            all,
            inbox,
            worker: Some(worker),
            thread: None,
        };
        let mut taken = parts.map(|parts| opened.taken_links(parts)).transpose()?;
        // Another program has none to give away: a port that had one is gone, and its file is finished.
        let first = if taken.is_none() { &*switch.port } else { &[] };
        for options in first {
            if let Some(Capture { path, snap }) = GuestOptions::read(options)?.capture {
                let recorder = Recorder::open(&path, snap)?;
                opened.recorders.insert(path, recorder);
            }
        }
        for options in &switch.uplink {
            let link = taken.as_mut().and_then(Iterator::next);
            opened.uplink(options, &candidates, link)?;
        }
        Ok(opened)
    }

    /// The links of another program, if it was started as this one is.
    fn taken_links(&self, parts: Parts) -> Result<TakenLinks, ArgsError> {
        let SwitchParts {
            options,
            ageing,
            links,
        } = SwitchParts::deserialize(&parts.description).map_err(TakeOverError::Description)?;
        let [ports, uplinks] = &self.options;
        same("ports", &options[0], ports)?;
        same("uplinks", &options[1], uplinks)?;
        same("an ageing of", &ageing, &self.ageing)?;
        let mut descriptors = parts.descriptors.into_iter();
        let links = links.into_iter().map(|(described, count)| {
            let own = descriptors.by_ref().take(count).collect();
            (described, own)
        });
        Ok(links.collect::<Vec<_>>().into_iter())
    }

    fn name_of(&self, port: PortId) -> Option<&str> {
        let port = self.ports.get(usize::from(port))?.as_ref()?;
        Some(port.name.as_str())
    }

    fn uplink_ports(&self) -> impl Iterator<Item = &Arc<PortShared>> {
        self.uplinks.iter().map(|uplink| &uplink.port)
    }

    /// The addresses that the switch's thread knows, by an order that has it tell them.
    fn known(&self, order: fn(mpsc::Sender<Vec<Known>>) -> Order) -> Result<Vec<Known>, ApiError> {
        let (to, told) = mpsc::channel();
        self.inbox.send(order(to));
        told.recv_timeout(PATIENCE).map_err(|_| {
            let message = "the switch does not answer: it is very busy, or has ended; ask again";
            ApiError::of(ErrorCode::Busy, message)
        })
    }

    /// A number that is free, and a name for it.
    fn place(&self, name: Option<String>) -> Result<(PortId, String), SwitchError> {
        let free = (0..).zip(&self.ports).find(|(_, port)| port.is_none());
        let (number, _) = free.ok_or(SwitchError::Full)?;
        let named = |name: &str| self.ports.iter().flatten().any(|port| port.name == name);
        match name {
            Some(name) if named(&name) => Err(SwitchError::Name(name)),
            Some(name) => Ok((number, name)),
            None => {
                let names = (0..=MAX_PORTS).map(|number| format!("port{number}"));
                let free = names.into_iter().find(|name| !named(name));
                Ok((number, free.ok_or(SwitchError::Full)?))
            }
        }
    }

    /// No address belongs to two ports.
    fn check_addresses(&self, addresses: &[MacAddress]) -> Result<(), SwitchError> {
        for port in self.ports.iter().flatten() {
            let owned = port.mac.iter().chain(&port.policy.macs);
            for &mac in owned {
                if addresses.contains(&mac) {
                    let port = port.name.clone();
                    return Err(SwitchError::Address { mac, port });
                }
            }
        }
        Ok(())
    }

    /// What keeps a port's frames, if that is wanted.
    fn recorder(&mut self, capture: Option<Capture>) -> Result<Option<Recorder>, PcapError> {
        let opened = capture.map(
            |Capture { path, snap }| match self.recorders.remove(&path) {
                Some(recorder) => Ok(recorder),
                None => Recorder::open(&path, snap),
            },
        );
        opened.transpose()
    }

    fn insert(&mut self, number: PortId, port: &Arc<PortShared>) {
        if let Some(place) = self.ports.get_mut(usize::from(number)) {
            *place = Some(Arc::clone(port));
        }
        self.all.insert(Arc::clone(port));
    }

    fn uplink(
        &mut self,
        options: &PortOptions,
        candidates: &[u32],
        taken: Option<TakenLink>,
    ) -> Result<(), SwitchError> {
        let UplinkOptions {
            name,
            link,
            policy,
            rates,
            capture,
        } = UplinkOptions::read(options)?;
        let (number, name) = self.place(name)?;
        self.check_addresses(&policy.macs)?;
        let failed = |source| SwitchError::Link {
            name: name.clone(),
            source,
        };
        let link_options = LinkOptions {
            queues: 1,
            mac: None,
            offloads: candidates,
            host: self.args.host_end(),
            forwards: &self.args.forward,
            passt_arguments: &self.args.passt_arg,
        };
        let opened = match taken {
            Some((described, descriptors)) => {
                adopt_link(Some(&link), described, descriptors, link_options)?
            }
            None => {
                let opened = link.open(link_options).map_err(failed)?;
                let interface = &opened.interface;
                interface.set_header_len(12).map_err(failed)?;
                interface.set_offloads(opened.offloads).map_err(failed)?;
                opened
            }
        };
        let (link_name, offloads) = (opened.name, opened.offloads);
        let port = PortShared::new(&name, None, policy, UPLINK_QUOTA, rates, offloads);
        let port = Arc::new(port.recorded(self.recorder(capture)?));
        self.uplinks.push(Arc::new(Uplink {
            port: Arc::clone(&port),
            interface: Arc::clone(&opened.interface),
            described: Described {
                link: link_name.clone(),
                mac: opened.mac.octets(),
                offloads,
                attached: opened.interface.order(),
            },
        }));
        if let Some(queue) = opened.queues.into_iter().next() {
            info!(port = name, link = link_name, "uplink");
            self.insert(number, &port);
            let behind = Behind::Link(queue.boxed());
            self.inbox.send(Order::Add(number, port, behind));
        }
        Ok(())
    }
}

/// A link of another program.
type TakenLink = (Described, Vec<OwnedFd>);
type TakenLinks = std::vec::IntoIter<TakenLink>;

impl Hub for Switch {
    type Port = SwitchPort;
    type Error = SwitchError;

    fn needs(&self, profile: &mut Profile) {
        needs(profile);
        profile
            .calls(calls::SIGNALS)
            .thread(ThreadKind::Queue, &[calls::SIGNALS]);
        let uplinks = self.uplinks.iter();
        uplinks.for_each(|link| link.interface.needs(profile));
    }

    fn begin(&mut self) -> Result<(), SwitchError> {
        if let Some(worker) = self.worker.take() {
            let run = move || confined(ThreadKind::Queue, || worker.run());
            let thread = thread::Builder::new().name("switch".to_owned()).spawn(run);
            self.thread = Some(thread.map_err(SwitchError::System)?);
        }
        Ok(())
    }

    fn open(&mut self, options: &PortOptions) -> Result<OpenPort<SwitchPort>, SwitchError> {
        let GuestOptions {
            name,
            socket,
            client,
            mac,
            mtu,
            pairs,
            rss,
            hash_report,
            standby,
            policy,
            rates,
            capture,
        } = GuestOptions::read(options)?;
        let (number, name) = self.place(name)?;
        let mut options = options.clone();
        let mac = mac
            .or_else(|| policy.macs.first().copied())
            .unwrap_or_else(MacAddress::random);
        options.insert("name".to_owned(), name.clone());
        options.insert("mac".to_owned(), mac.to_string());
        self.check_addresses(&[&[mac][..], &policy.macs].concat())?;
        let rss = rss && pairs > 1;
        let config = NetConfig {
            mac,
            pairs,
            mtu: mtu.or(self.args.mtu),
            speed: self.args.speed,
            hash_types: if rss || hash_report { HASH_TYPES } else { 0 },
        };
        let extras = Extras {
            mtu: config.mtu.is_some(),
            speed: config.speed.is_some(),
            coalescing: true,
            standby,
            rss,
            hash_report,
            multi_queue: pairs > 1,
            packed: self.args.packed == OnOff::On,
            in_order: self.args.in_order == OnOff::On,
        };
        let features = offered(self.offloads, extras);
        let port = PortShared::new(&name, Some(mac), policy, QUOTA, rates, 0);
        let port = Arc::new(port.recorded(self.recorder(capture)?));
        let all = Arc::clone(&self.all);
        let inbox = Arc::clone(&self.inbox);
        let device = SwitchPort::new(number, config, features, Arc::clone(&port), inbox, all)
            .map_err(SwitchError::System)?;
        self.insert(number, &port);
        Ok(OpenPort {
            name,
            socket,
            client,
            options,
            device,
        })
    }

    fn closed(&mut self, name: &str) {
        for place in &mut self.ports {
            place.take_if(|port| port.name == name);
        }
        self.all.remove(name);
    }

    fn statistics(&self) -> Arc<dyn Statistics> {
        Arc::clone(&self.all) as Arc<dyn Statistics>
    }

    fn status(&self) -> Map<String, Value> {
        let uplinks = self.uplink_ports();
        let uplinks: Vec<&str> = uplinks.map(|port| port.name.as_str()).collect();
        Map::from_iter([
            ("device".to_owned(), "switch".into()),
            ("uplinks".to_owned(), json!(uplinks)),
        ])
    }

    fn uplinks(&self) -> Vec<Arc<dyn UplinkControl>> {
        let uplinks = self.uplinks.iter().cloned();
        uplinks.map(|uplink| uplink as _).collect()
    }

    fn end(&mut self) {
        self.inbox.send(Order::End);
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            error!("the switch's thread panicked");
        }
    }

    fn addresses(&self) -> Result<Value, ApiError> {
        let known = self.known(Order::Addresses)?;
        let now = u32::try_from(now() / 1_000_000_000).unwrap_or(u32::MAX);
        let rows = known.into_iter().map(|(vlan, mac, port, seen)| {
            json!({
                "vlan": vlan,
                "address": mac.to_string(),
                "port": self.name_of(port),
                "age": now.saturating_sub(seen),
            })
        });
        Ok(json!({ "addresses": rows.collect::<Vec<_>>() }))
    }

    fn parts(&self) -> Result<Parts, ApiError> {
        if let Some(port) = self.ports.iter().flatten().find(|port| port.captured) {
            return Err(no_other_program(&format!("port {}", port.name)));
        }
        let mut descriptors = Vec::new();
        let mut links = Vec::new();
        for uplink in &self.uplinks {
            let found = uplink.interface.parts();
            let found = found.map_err(|error| ApiError::new(ErrorCode::Failed, &error))?;
            let Some(own) = found else {
                return Err(no_other_program(uplink.link()));
            };
            links.push((uplink.described.clone(), own.len()));
            descriptors.extend(own);
        }
        let description = json!(SwitchParts {
            options: self.options.clone(),
            ageing: self.ageing,
            links,
        });
        Ok(Parts {
            description,
            descriptors,
        })
    }

    fn freeze(&self) -> Result<Value, ApiError> {
        let known = self.known(Order::Freeze).inspect_err(|_| self.thaw())?;
        let addresses = known.into_iter().filter_map(|(vlan, mac, port, seen)| {
            let port = self.name_of(port)?.to_owned();
            Some((vlan, mac.octets(), port, seen))
        });
        let uplinks = self.uplink_ports();
        Ok(json!(SwitchState {
            addresses: addresses.collect(),
            uplinks: uplinks
                .map(|port| (port.name.clone(), port.save()))
                .collect(),
            left: self
                .uplinks
                .iter()
                .map(|uplink| uplink.interface.left())
                .collect(),
            counters: counters_to_json(self.all.own()),
        }))
    }

    fn adopt(&self, state: &Value) -> Result<(), StateError> {
        let SwitchState {
            addresses,
            uplinks,
            left,
            counters,
        } = SwitchState::deserialize(state).map_err(StateError::Content)?;
        for port in self.uplink_ports() {
            if let Some(settings) = uplinks.get(&port.name) {
                port.adopt(settings)?;
            }
        }
        for (uplink, left) in self.uplinks.iter().zip(&left) {
            let adopted = uplink.interface.adopt_left(left);
            adopted.map_err(|error| StateError::Misfit(error.to_string()))?;
        }
        counters_go_on(self.all.own(), &counters);
        let ports = (0..).zip(&self.ports);
        let numbers: BTreeMap<&str, PortId> = ports
            .filter_map(|(number, port)| Some((port.as_ref()?.name.as_str(), number)))
            .collect();
        let known = addresses.into_iter().filter_map(|(vlan, mac, port, seen)| {
            let number = *numbers.get(port.as_str())?;
            Some((vlan, MacAddress::new(mac), number, seen))
        });
        self.inbox.send(Order::Learn(known.collect()));
        Ok(())
    }

    fn thaw(&self) {
        self.inbox.send(Order::Thaw);
    }
}

impl Drop for Switch {
    fn drop(&mut self) {
        self.end();
    }
}

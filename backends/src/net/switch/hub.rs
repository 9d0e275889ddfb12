//! The switch as a whole: its thread, and the ports that come and go.

use std::io;
use std::sync::{Arc, mpsc};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use ringside_control::{ApiError, ErrorCode};
use ringside_sandbox::{Profile, ThreadKind, calls};
use serde_json::{Map, Value, json};
use thiserror::Error;
use tracing::{error, info};

use super::super::args::{ArgsError, NetArgs};
use super::super::config::{MacAddress, NetConfig};
use super::super::device::needs;
use super::super::features::{Extras, offered};
use super::super::link::{Interface, LinkError, LinkOptions};
use super::counters::AllPorts;
use super::options::{GuestOptions, OptionsError, SwitchArgs, UplinkOptions};
use super::policy::{MAX_PORTS, PortId};
use super::port::SwitchPort;
use super::shared::PortShared;
use super::table::{QUOTA, UPLINK_QUOTA};
use super::worker::{Behind, Inbox, Order, Worker};
use crate::shell::{Hub, OnOff, OpenError, OpenPort, PortOptions, Statistics, confined};

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
    /// The system refused something that every process needs.
    #[error("cannot create the switch's threads or event descriptors")]
    System(#[source] io::Error),
}

impl OpenError for SwitchError {
    fn is_usage(&self) -> bool {
        match self {
            Self::Options(_) | Self::Name(_) | Self::Address { .. } => true,
            Self::Args(error) => error.is_usage(),
            Self::Link { .. } | Self::Full | Self::System(_) => false,
        }
    }
}

/// A switch.
pub struct Switch {
    args: NetArgs,
    /// The `TUN_F_*` offloads that guests are offered.
    offloads: u32,
    /// By number: the ports there are.
    ports: Vec<Option<Arc<PortShared>>>,
    uplinks: Vec<Arc<dyn Interface>>,
    all: Arc<AllPorts>,
    inbox: Arc<Inbox>,
    /// Until its thread starts.
    worker: Option<Worker>,
    thread: Option<JoinHandle<()>>,
}

impl Switch {
    /// A switch that is joined to its uplinks, and has no thread yet.
    ///
    /// # Errors
    /// [`SwitchError`]
    pub fn new(args: &NetArgs, switch: &SwitchArgs) -> Result<Self, SwitchError> {
        let candidates = args.switched_offloads()?;
        let inbox = Arc::new(Inbox::new().map_err(SwitchError::System)?);
        let all = Arc::<AllPorts>::default();
        let poll = args.poll_limits();
        let worker = Worker::new(Arc::clone(&inbox), Arc::clone(&all), switch.ageing, poll)
            .map_err(SwitchError::System)?;
        let mut opened = Self {
            args: args.clone(),
            offloads: candidates.first().copied().unwrap_or(0),
            ports: (0..MAX_PORTS).map(|_| None).collect(),
            uplinks: Vec::new(),
            all,
            inbox,
            worker: Some(worker),
            thread: None,
        };
        for options in &switch.uplink {
            opened.uplink(options, &candidates)?;
        }
        Ok(opened)
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

    fn insert(&mut self, number: PortId, port: &Arc<PortShared>) {
        if let Some(place) = self.ports.get_mut(usize::from(number)) {
            *place = Some(Arc::clone(port));
        }
        self.all.insert(Arc::clone(port));
    }

    fn uplink(&mut self, options: &PortOptions, candidates: &[u32]) -> Result<(), SwitchError> {
        let UplinkOptions {
            name,
            link,
            policy,
            rates,
        } = UplinkOptions::read(options)?;
        let (number, name) = self.place(name)?;
        self.check_addresses(&policy.macs)?;
        let failed = |source| SwitchError::Link {
            name: name.clone(),
            source,
        };
        let opened = link
            .open(LinkOptions {
                queues: 1,
                mac: None,
                offloads: candidates,
                host: self.args.host_end(),
                forwards: &self.args.forward,
                passt_arguments: &self.args.passt_arg,
            })
            .map_err(failed)?;
        let interface = &opened.interface;
        interface.set_header_len(12).map_err(failed)?;
        interface.set_offloads(opened.offloads).map_err(failed)?;
        self.uplinks.push(Arc::clone(interface));
        let (link_name, offloads) = (opened.name, opened.offloads);
        let port = PortShared::new(&name, None, policy, UPLINK_QUOTA, rates, offloads);
        let port = Arc::new(port);
        if let Some(queue) = opened.queues.into_iter().next() {
            info!(port = name, link = link_name, "uplink");
            self.insert(number, &port);
            let behind = Behind::Link(queue.boxed());
            self.inbox.send(Order::Add(number, port, behind));
        }
        Ok(())
    }
}

impl Hub for Switch {
    type Port = SwitchPort;
    type Error = SwitchError;

    fn needs(&self, profile: &mut Profile) {
        needs(profile);
        profile
            .calls(calls::SIGNALS)
            .thread(ThreadKind::Queue, &[calls::SIGNALS]);
        self.uplinks.iter().for_each(|link| link.needs(profile));
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
            policy,
            rates,
        } = GuestOptions::read(options)?;
        let (number, name) = self.place(name)?;
        let mac = mac
            .or_else(|| policy.macs.first().copied())
            .unwrap_or_else(MacAddress::random);
        self.check_addresses(&[&[mac][..], &policy.macs].concat())?;
        let config = NetConfig {
            mac,
            pairs,
            mtu: mtu.or(self.args.mtu),
            speed: self.args.speed,
            hash_types: 0,
        };
        let extras = Extras {
            mtu: config.mtu.is_some(),
            speed: config.speed.is_some(),
            // The switch interrupts once in a round, whatever a driver would like.
            coalescing: false,
            standby: false,
            // It spreads packets itself, by their flows.
            rss: false,
            hash_report: false,
            multi_queue: pairs > 1,
            packed: self.args.packed == OnOff::On,
            in_order: self.args.in_order == OnOff::On,
        };
        let features = offered(self.offloads, extras);
        let port = Arc::new(PortShared::new(&name, Some(mac), policy, QUOTA, rates, 0));
        let all = Arc::clone(&self.all);
        let inbox = Arc::clone(&self.inbox);
        let device = SwitchPort::new(number, config, features, Arc::clone(&port), inbox, all)
            .map_err(SwitchError::System)?;
        self.insert(number, &port);
        Ok(OpenPort {
            name,
            socket,
            client,
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
        let uplinks = self
            .ports
            .iter()
            .flatten()
            .filter(|port| port.mac.is_none());
        let uplinks: Vec<&str> = uplinks.map(|port| port.name.as_str()).collect();
        Map::from_iter([
            ("device".to_owned(), "switch".into()),
            ("uplinks".to_owned(), json!(uplinks)),
        ])
    }

    fn addresses(&self) -> Result<Value, ApiError> {
        let (to, told) = mpsc::channel();
        self.inbox.send(Order::Addresses(to));
        let known = told.recv_timeout(PATIENCE).map_err(|_| {
            let message = "the switch does not answer: it is very busy, or has ended; ask again";
            ApiError::of(ErrorCode::Busy, message)
        })?;
        let rows = known.into_iter().map(|(vlan, mac, port, age)| {
            let port = self.ports.get(usize::from(port)).and_then(Option::as_ref);
            json!({
                "vlan": vlan,
                "address": mac.to_string(),
                "port": port.map(|port| port.name.as_str()),
                "age": age,
            })
        });
        Ok(json!({ "addresses": rows.collect::<Vec<_>>() }))
    }
}

impl Drop for Switch {
    fn drop(&mut self) {
        self.inbox.send(Order::End);
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            error!("the switch's thread panicked");
        }
    }
}

//! The network device as the daemon shell sees it.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;
use std::thread;

use ringside_control::{ApiError, ErrorCode, Size};
use ringside_sandbox::{Profile, ThreadKind, calls};
use serde::Deserialize;
use serde_json::{Map, Value, json};
use tracing::{debug, error, info, warn};
use vhost::vhost_user::VhostUserProtocolFeatures;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CTRL_VLAN, VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_GUEST_ANNOUNCE, VIRTIO_NET_F_STATUS,
};

use super::config::{MacAddress, NetConfig, Status};
use super::control_worker::ControlWorker;
use super::counters::{AllCounters, Counters};
use super::features::{control_queue, feature_name, guest_offloads, has, header_len, tun_offloads};
use super::filter::Filter;
use super::limits::{CardLimits, CardRates, NAMES};
use super::link::{AnyLink, Described, Interface, Link};
use super::settings::{Settings, Shared};
use super::state;
use super::worker::PairWorker;
use crate::shell::{
    Chain as Causes, Commands, Device, DeviceError, LogLimit, Parts, PollLimits, StateError,
    Statistics, WorkerThread, confined,
};

/// The MTU of an Ethernet that nobody has configured.
const DEFAULT_MTU: u16 = 1500;

/// A network device on a link.
pub struct Net {
    config: NetConfig,
    features: u64,
    acked: u64,
    /// What the link is, for the log.
    name: String,
    interface: Arc<dyn Interface>,
    /// By queue pair; taken by its worker.
    queues: Vec<Option<AnyLink>>,
    /// Nothing else hears what passes them.
    plain: bool,
    counters: Vec<Arc<Counters>>,
    shared: Arc<Shared>,
    poll: PollLimits,
    limits: Arc<CardLimits>,
    log: LogLimit,
}

impl Net {
    /// A device with one queue pair for each queue of its link.
    ///
    /// # Errors
    /// If no eventfd can be created.
    pub(super) fn new(
        config: NetConfig,
        features: u64,
        name: &str,
        interface: Arc<dyn Interface>,
        queues: Vec<AnyLink>,
    ) -> io::Result<Self> {
        let settings = Settings::new(Filter::new(config.mac, false), config.pairs);
        Ok(Self {
            shared: Arc::new(Shared::new(settings, config.pairs)?),
            counters: queues.iter().map(|_| Arc::default()).collect(),
            plain: true,
            queues: queues.into_iter().map(Some).collect(),
            config,
            features,
            acked: 0,
            name: name.to_owned(),
            interface,
            poll: PollLimits::default(),
            limits: Arc::new(CardLimits::new(&NAMES)),
            log: LogLimit::default(),
        })
    }

    /// It takes the place of another program's, which has its link as well.
    pub(super) fn taken(self) -> Self {
        self.shared.change(|settings| {
            settings.frozen = true;
            settings.left = true;
        });
        self
    }

    /// A capture file hears what passes its link, or not.
    pub(super) fn captured(self, captured: bool) -> Self {
        let plain = !captured;
        Self { plain, ..self }
    }

    /// All its queue pairs together keep these limits.
    pub(super) fn limited(self, rates: CardRates) -> Self {
        self.limits.set(rates);
        self
    }

    /// Lets the threads of its queue pairs spin before they sleep.
    pub(super) fn spinning(self, poll: PollLimits) -> Self {
        Self { poll, ..self }
    }

    fn set_interface(&self) {
        let header_len = header_len(self.acked);
        let offloads = tun_offloads(guest_offloads(self.acked));
        let result = self
            .interface
            .set_header_len(header_len)
            .and_then(|()| self.interface.set_offloads(offloads))
            .and_then(|()| self.interface.set_steering(None));
        if let Err(error) = result
            && let Some(held_back) = self.log.check()
        {
            error!(
                held_back,
                "packets will not fit the driver's choice: {}",
                Causes(&error)
            );
        }
    }

    /// The driver makes itself known to the network when it is asked to.
    fn announces(&self) -> bool {
        let answers = [
            VIRTIO_NET_F_STATUS,
            VIRTIO_NET_F_CTRL_VQ,
            VIRTIO_NET_F_GUEST_ANNOUNCE,
        ];
        answers.iter().all(|&feature| has(self.acked, feature))
    }

    /// Forgets what the driver set by the control queue.
    fn forget_settings(&self) {
        let mut filter = Filter::new(self.config.mac, has(self.acked, VIRTIO_NET_F_CTRL_VLAN));
        self.shared.change(|settings| {
            // The cable is not the driver's.
            filter.link_up = settings.filter.link_up;
            *settings = Settings {
                rarp: settings.rarp,
                frozen: settings.frozen,
                left: settings.left,
                ..Settings::new(filter, self.config.pairs)
            };
        });
    }
}

/// Why a link stays where it is.
pub(super) fn no_other_program(link: &str) -> ApiError {
    let message = format!(
        "{link} cannot go over to another program, as AF_XDP sockets and what has a capture file cannot: end this one, and start \
         the other; the guest waits for it if its VMM reconnects"
    );
    ApiError::of(ErrorCode::Conflict, message)
}

/// What the thread of a queue pair begins with, beside its link.
struct PairStart {
    pair: u16,
    mtu: u16,
    commands: Commands,
    shared: Arc<Shared>,
    counters: Arc<Counters>,
    poll: PollLimits,
    limits: Arc<CardLimits>,
}

impl PairStart {
    fn spawn<L: Link + 'static>(self, link: L) -> io::Result<thread::JoinHandle<()>> {
        let Self {
            pair,
            mtu,
            commands,
            shared,
            counters,
            poll,
            limits,
        } = self;
        let worker = PairWorker::new(pair, mtu, link, commands, shared, counters)?;
        let worker = worker.spinning(poll).limited(limits);
        thread::Builder::new()
            .name(format!("net-pair{pair}"))
            .spawn(move || confined(ThreadKind::Queue, || worker.run()))
    }
}

/// What any network card needs when the program is confined, besides what the shell does.
pub(super) fn needs(profile: &mut Profile) {
    profile
        .calls(calls::FRAMES)
        .thread(ThreadKind::Queue, &[calls::EVENTS, calls::FRAMES])
        .thread(ThreadKind::Helper, &[calls::EVENTS]);
}

impl Device for Net {
    fn features(&self) -> u64 {
        self.features
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::RARP
    }

    /// Two for each pair, and the control queue.
    fn queue_count(&self) -> u16 {
        self.config.pairs.saturating_mul(2).saturating_add(1)
    }

    fn read_config(&self, offset: u32, len: u32) -> Result<Vec<u8>, DeviceError> {
        // The driver may have changed the address (VIRTIO 1.3, 5.1.6.5.2).
        let settings = self.shared.get();
        let mac = settings.filter.mac;
        let status = Status {
            link_up: settings.filter.link_up,
            announce: settings.announce,
        };
        NetConfig { mac, ..self.config }.read(status, offset, len)
    }

    /// All fields are read-only for a driver (VIRTIO 1.3, 5.1.4).
    fn write_config(&mut self, offset: u32, _data: &[u8]) -> Result<(), DeviceError> {
        Err(DeviceError::ConfigReadOnly { offset })
    }

    /// A driver negotiates features once after a reset (VIRTIO 1.3, 3.1.1), which also takes back
    /// what it had set by the control queue.
    fn set_features(&mut self, acked: u64) {
        self.acked = acked;
        self.forget_settings();
        self.set_interface();
    }

    /// The network may have the guest at another place than it is now. So its driver is asked to announce itself (VIRTIO
    /// 1.3, 5.1.6.5.4) when it can send again, which is with its first transmit queue; the others may follow later.
    fn resumed(&mut self, queue: u16) -> bool {
        if queue != 1 || !self.announces() {
            return false;
        }
        debug!("the guest goes on with a new connection and is asked to announce itself");
        self.shared.change(|settings| settings.announce = true);
        true
    }

    /// One for each pair, and one for the control queue.
    fn worker_count(&self) -> usize {
        usize::from(self.config.pairs).saturating_add(1)
    }

    fn worker_of(&self, queue: u16) -> usize {
        let pairs = self.config.pairs;
        let last = usize::from(pairs);
        match control_queue(self.acked, pairs) {
            Some(control) if queue == control => last,
            // Without MQ the control queue has the number of a receive queue, which then has this one: no driver uses it, but
            // a front-end may start it, and each worker has one ring of a kind.
            Some(control) if queue == pairs.saturating_mul(2) => usize::from(control / 2),
            _ => usize::from(queue / 2).min(last),
        }
    }

    fn spawn_worker(
        &mut self,
        worker: usize,
        commands: Commands,
    ) -> Result<WorkerThread, DeviceError> {
        let failed = |source: io::Error| DeviceError::Worker {
            worker,
            source: source.into(),
        };
        if worker == 0 {
            let NetConfig { mac, pairs, .. } = self.config;
            info!(link = self.name, %mac, pairs, "network device");
        }
        let queue = self.queues.get_mut(worker).and_then(Option::take);
        let shared = Arc::clone(&self.shared);
        let thread = match (queue, self.counters.get(worker)) {
            (Some(queue), Some(counters)) => {
                let start = PairStart {
                    pair: u16::try_from(worker).unwrap_or(u16::MAX),
                    mtu: self.config.mtu.unwrap_or(DEFAULT_MTU),
                    commands,
                    shared,
                    counters: Arc::clone(counters),
                    poll: self.poll,
                    limits: Arc::clone(&self.limits),
                };
                match queue {
                    AnyLink::Tap(link) => start.spawn(link),
                    AnyLink::Null(link) => start.spawn(link),
                    AnyLink::Generate(link) => start.spawn(link),
                    AnyLink::Other(link) => start.spawn(link),
                }
            }
            _ => {
                let interface = Arc::clone(&self.interface);
                let pairs = self.config.pairs;
                let worker =
                    ControlWorker::new(interface, shared, pairs, commands).map_err(failed)?;
                thread::Builder::new()
                    .name("net-control".to_owned())
                    .spawn(move || confined(ThreadKind::Helper, || worker.run()))
            }
        };
        thread.map(WorkerThread::Own).map_err(failed)
    }

    fn needs(&self, profile: &mut Profile) {
        needs(profile);
        self.interface.needs(profile);
    }

    fn statistics(&self) -> Arc<dyn Statistics> {
        Arc::new(AllCounters(self.counters.clone()))
    }

    fn status(&self) -> Map<String, Value> {
        let filter = &self.shared.get().filter;
        let (mac, state) = (filter.mac, if filter.link_up { "up" } else { "down" });
        Map::from_iter([
            ("device".to_owned(), "net".into()),
            (
                "interface".to_owned(),
                json!({
                    "link": self.name,
                    "mac": mac.to_string(),
                    "queue-pairs": self.config.pairs,
                    "mtu": self.config.mtu,
                    "state": state,
                }),
            ),
            ("limits".to_owned(), self.limits.get().to_json()),
        ])
    }

    fn feature_name(&self, bit: u32) -> Option<&'static str> {
        feature_name(bit)
    }

    fn announce(&mut self) -> Result<bool, ApiError> {
        if !self.announces() {
            let message = "the guest's driver, if there is one, did not accept GUEST_ANNOUNCE";
            return Err(ApiError::of(ErrorCode::Conflict, message));
        }
        self.shared.change(|settings| settings.announce = true);
        Ok(true)
    }

    fn send_rarp(&mut self, mac: [u8; 6]) {
        debug!("the guest is made known to the network in its place");
        self.shared.change(|settings| {
            let (_, asked) = settings.rarp;
            settings.rarp = (MacAddress::new(mac), asked.wrapping_add(1));
        });
    }

    fn set_link(&mut self, up: bool) -> Result<bool, ApiError> {
        let mut changed = false;
        self.shared.change(|settings| {
            changed = settings.filter.link_up != up;
            settings.filter.link_up = up;
        });
        Ok(changed)
    }

    fn limits(&mut self, changes: &BTreeMap<String, Size>) -> Result<Value, ApiError> {
        self.limits.change(changes)
    }

    fn save(&self) -> Result<Vec<u8>, StateError> {
        state::save(&self.shared)
    }

    fn load(&mut self, bytes: &[u8]) -> Result<(), StateError> {
        let (pairs, link) = (self.config.pairs, self.interface.as_ref());
        state::load(bytes, self.acked, pairs, &self.shared, link)
    }

    fn parts(&self) -> Result<Parts, ApiError> {
        let failed = |error: io::Error| ApiError::new(ErrorCode::Failed, &error);
        let found = match self.plain {
            true => self.interface.parts().map_err(failed)?,
            false => None,
        };
        let Some(descriptors) = found else {
            return Err(no_other_program(&self.name));
        };
        let described = Described {
            link: self.name.clone(),
            mac: self.config.mac.octets(),
            offloads: tun_offloads(guest_offloads(self.features)),
            attached: self.interface.order(),
        };
        Ok(Parts {
            description: json!(described),
            descriptors,
        })
    }

    fn settings(&self) -> Value {
        let link_up = self.shared.get().filter.link_up;
        let counters = self.counters.iter().map(|pair| pair.to_json());
        json!({
            "link-up": link_up,
            "order": self.interface.order(),
            "left": self.interface.left(),
            "counters": counters.collect::<Vec<_>>(),
            "limits": self.limits.get().to_json(),
            "levels": self.limits.levels(),
        })
    }

    fn adopt(&mut self, settings: &Value) -> Result<(), StateError> {
        #[derive(Deserialize)]
        #[serde(rename_all = "kebab-case")]
        struct HostSettings {
            link_up: bool,
            order: Vec<u16>,
            left: Value,
            counters: Vec<Value>,
            #[serde(default)]
            limits: BTreeMap<String, Size>,
            /// When their buckets will be full, in nanoseconds of CLOCK_MONOTONIC.
            #[serde(default)]
            levels: [u64; NAMES.len()],
        }
        let HostSettings {
            link_up,
            order,
            left,
            counters,
            limits,
            levels,
        } = HostSettings::deserialize(settings).map_err(StateError::Content)?;
        self.limits.adopt(&limits, levels)?;
        for (pair, from) in self.counters.iter().zip(&counters) {
            pair.go_on(from);
        }
        self.interface
            .adopt_order(order)
            .map_err(|error| StateError::Misfit(Causes(&error).to_string()))?;
        self.interface
            .adopt_left(&left)
            .map_err(|error| StateError::Misfit(error.to_string()))?;
        self.shared
            .change(|settings| settings.filter.link_up = link_up);
        Ok(())
    }

    fn freeze(&mut self) {
        let frozen = self.shared.change(|settings| settings.frozen = true);
        if !self.shared.wait(frozen) {
            warn!("a queue pair takes no notice; packets that wait in the link may be lost");
        }
    }

    fn leave(&mut self) -> Result<(), ApiError> {
        let left = self.shared.change(|settings| settings.left = true);
        match self.shared.wait(left) {
            true => Ok(()),
            false => {
                let message = "a queue pair takes no notice: it is very busy; try again";
                Err(ApiError::of(ErrorCode::Busy, message))
            }
        }
    }

    fn thaw(&mut self) {
        let driver = self.shared.get().offloads;
        let offloads = driver.unwrap_or(guest_offloads(self.acked));
        if let Err(error) = self.interface.set_offloads(tun_offloads(offloads)) {
            error!(
                "packets will not fit the driver's choice: {}",
                Causes(&error)
            );
        }
        self.shared.change(|settings| {
            settings.frozen = false;
            settings.left = false;
        });
    }

    fn reset(&mut self) {
        let Self {
            config: _,
            features: _,
            acked,
            name: _,
            interface: _,
            queues: _,
            plain: _,
            counters: _,
            shared: _,
            poll: _,
            limits: _,
            log: _,
        } = self;
        *acked = 0;
        self.forget_settings();
        self.set_interface();
    }
}

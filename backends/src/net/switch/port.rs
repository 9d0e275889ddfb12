//! A guest's port as the daemon shell sees it: a network device whose rings the switch's thread serves.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;
use std::thread;

use ringside_control::{ApiError, ErrorCode, Size};
use ringside_sandbox::ThreadKind;
use serde::Deserialize;
use serde_json::{Map, Value, json};
use tracing::{debug, info};
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CTRL_VLAN, VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_GUEST_ANNOUNCE, VIRTIO_NET_F_MTU,
    VIRTIO_NET_F_STATUS,
};

use super::super::config::{NetConfig, Status};
use super::super::control_worker::ControlWorker;
use super::super::features::{control_queue, feature_name, guest_offloads, has, tun_offloads};
use super::super::filter::Filter;
use super::super::link::Interface;
use super::super::settings::{Settings, Shared};
use super::super::state;
use super::counters::AllPorts;
use super::policy::PortId;
use super::shared::{PortSettings, PortShared};
use super::worker::{Behind, Inbox, Order};
use crate::shell::{
    Commands, Device, DeviceError, Parts, StateError, Statistics, WorkerThread, confined,
};

/// The worker that serves a port's queue pairs: the switch's thread.
const SWITCH: usize = 0;
/// The worker that serves its control queue.
const CONTROL: usize = 1;

/// A guest's port.
#[derive(Debug)]
pub struct SwitchPort {
    number: PortId,
    config: NetConfig,
    features: u64,
    acked: u64,
    /// With the switch.
    shared: Arc<PortShared>,
    /// What the driver sets by the control queue.
    settings: Arc<Shared>,
    inbox: Arc<Inbox>,
    all: Arc<AllPorts>,
}

fn settings_of(config: &NetConfig, acked: u64) -> Settings {
    let filter = Filter::new(config.mac, has(acked, VIRTIO_NET_F_CTRL_VLAN));
    Settings::new(filter, config.pairs)
}

impl SwitchPort {
    /// A port that is not yet in the switch.
    ///
    /// # Errors
    /// If no eventfd can be created.
    pub(super) fn new(
        number: PortId,
        config: NetConfig,
        features: u64,
        shared: Arc<PortShared>,
        inbox: Arc<Inbox>,
        all: Arc<AllPorts>,
    ) -> io::Result<Self> {
        Ok(Self {
            number,
            // One thread goes by them: the switch's.
            settings: Arc::new(Shared::new(settings_of(&config, 0), 1)?),
            config,
            features,
            acked: 0,
            shared,
            inbox,
            all,
        })
    }

    #[cfg(test)]
    pub(super) fn shared(&self) -> &Arc<PortShared> {
        &self.shared
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

    /// Forgets what the driver set by the control queue, and takes packets as its features say.
    fn begin(&self) {
        let settings = settings_of(&self.config, self.acked);
        self.settings.change(|place| *place = settings);
        let offloads = tun_offloads(guest_offloads(self.acked));
        let mtu = self.config.mtu;
        self.shared
            .set_mtu(mtu.filter(|_| has(self.acked, VIRTIO_NET_F_MTU)));
        // A port takes whatever it is told.
        let _ = self.shared.set_offloads(offloads);
    }
}

impl Device for SwitchPort {
    fn features(&self) -> u64 {
        self.features
    }

    /// Two for each pair, and the control queue.
    fn queue_count(&self) -> u16 {
        self.config.pairs.saturating_mul(2).saturating_add(1)
    }

    fn read_config(&self, offset: u32, len: u32) -> Result<Vec<u8>, DeviceError> {
        // The driver may have changed the address (VIRTIO 1.3, 5.1.6.5.2).
        let settings = self.settings.get();
        let mac = settings.filter.mac;
        let config = NetConfig { mac, ..self.config };
        let status = Status {
            link_up: self.shared.is_up(),
            announce: settings.announce,
        };
        config.read(status, offset, len)
    }

    /// All fields are read-only for a driver (VIRTIO 1.3, 5.1.4).
    fn write_config(&mut self, offset: u32, _data: &[u8]) -> Result<(), DeviceError> {
        Err(DeviceError::ConfigReadOnly { offset })
    }

    fn set_features(&mut self, acked: u64) {
        self.acked = acked;
        self.begin();
    }

    /// As for a card of its own.
    fn resumed(&mut self, queue: u16) -> bool {
        if queue != 1 || !self.announces() {
            return false;
        }
        debug!("the guest goes on with a new connection and is asked to announce itself");
        self.settings.change(|settings| settings.announce = true);
        true
    }

    fn worker_count(&self) -> usize {
        2
    }

    fn worker_of(&self, queue: u16) -> usize {
        match control_queue(self.acked, self.config.pairs) {
            Some(control) if queue == control => CONTROL,
            // Without MQ the control queue has the number of a receive queue, which then has this one: no driver uses it.
            Some(_) if queue == self.config.pairs.saturating_mul(2) => SWITCH,
            None if queue == self.config.pairs.saturating_mul(2) => CONTROL,
            _ => SWITCH,
        }
    }

    fn spawn_worker(
        &mut self,
        worker: usize,
        commands: Commands,
    ) -> Result<WorkerThread, DeviceError> {
        let settings = Arc::clone(&self.settings);
        let pairs = self.config.pairs;
        if worker == SWITCH {
            let NetConfig { mac, pairs, .. } = self.config;
            info!(%mac, pairs, "network port");
            let behind = Behind::Guest {
                commands,
                settings,
                // Without MQ the last receive queue may come here too.
                pairs: pairs.saturating_add(1),
            };
            let shared = Arc::clone(&self.shared);
            self.inbox.send(Order::Add(self.number, shared, behind));
            return Ok(WorkerThread::Shared);
        }
        let failed = |source: io::Error| DeviceError::Worker {
            worker,
            source: source.into(),
        };
        let interface = Arc::clone(&self.shared) as Arc<dyn Interface>;
        let control = ControlWorker::new(interface, settings, pairs, commands).map_err(failed)?;
        thread::Builder::new()
            .name(format!("{}-control", self.shared.name))
            .spawn(move || confined(ThreadKind::Helper, || control.run()))
            .map(WorkerThread::Own)
            .map_err(failed)
    }

    fn shares_process(&self) -> bool {
        true
    }

    fn statistics(&self) -> Arc<dyn Statistics> {
        Arc::clone(&self.all) as Arc<dyn Statistics>
    }

    fn status(&self) -> Map<String, Value> {
        let mac = self.settings.get().filter.mac;
        let policy = &self.shared.policy;
        Map::from_iter([
            ("device".to_owned(), "net".into()),
            (
                "interface".to_owned(),
                json!({
                    "port": self.shared.name,
                    "mac": mac.to_string(),
                    "queue-pairs": self.config.pairs,
                    "mtu": self.config.mtu,
                    "link": if self.shared.is_up() { "up" } else { "down" },
                    "vlans": policy.vlans.to_string(),
                    "isolated": policy.isolated,
                }),
            ),
            ("limits".to_owned(), self.shared.limits.get().to_json()),
        ])
    }

    fn feature_name(&self, bit: u32) -> Option<&'static str> {
        feature_name(bit)
    }

    fn limits(&mut self, changes: &BTreeMap<String, Size>) -> Result<Value, ApiError> {
        self.shared.limits.change(changes)
    }

    fn set_link(&mut self, up: bool) -> Result<bool, ApiError> {
        Ok(self.shared.plug(up))
    }

    fn announce(&mut self) -> Result<bool, ApiError> {
        if !self.announces() {
            let message = "the guest's driver, if there is one, did not accept GUEST_ANNOUNCE";
            return Err(ApiError::of(ErrorCode::Conflict, message));
        }
        self.settings.change(|settings| settings.announce = true);
        Ok(true)
    }

    fn save(&self) -> Result<Vec<u8>, StateError> {
        state::save(&self.settings)
    }

    fn load(&mut self, bytes: &[u8]) -> Result<(), StateError> {
        let (pairs, port) = (self.config.pairs, self.shared.as_ref());
        state::load(bytes, self.acked, pairs, &self.settings, port)
    }

    /// Its rings are in guest memory, and all else is the switch's.
    fn parts(&self) -> Result<Parts, ApiError> {
        Ok(Parts::default())
    }

    fn settings(&self) -> Value {
        json!(self.shared.save())
    }

    fn adopt(&mut self, settings: &Value) -> Result<(), StateError> {
        let settings = PortSettings::deserialize(settings).map_err(StateError::Content)?;
        self.shared.adopt(&settings)
    }

    fn reset(&mut self) {
        let Self {
            number: _,
            config: _,
            features: _,
            acked,
            shared: _,
            settings: _,
            inbox: _,
            all: _,
        } = self;
        *acked = 0;
        self.begin();
    }
}

impl Drop for SwitchPort {
    fn drop(&mut self) {
        self.inbox.send(Order::Remove(self.number));
    }
}

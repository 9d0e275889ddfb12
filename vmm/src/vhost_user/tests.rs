//! The front-end against a back-end that is played: behind the [`Link`] trait, and on a real
//! socket by a server that shares no code with the front-end.

use std::collections::VecDeque;
use std::error::Error as StdError;
use std::io::{Read, Write};
use std::os::unix::net::UnixListener;
use std::thread::JoinHandle;
use std::time::Instant;

use proptest::prelude::*;
use tempfile::TempDir;
use vhost::vhost_user::Error as ProtocolError;
use vhost::vhost_user::message::VhostUserInflight;
use vm_memory::{FileOffset, GuestRegionMmap, MmapRegion};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use super::link::{
    F_PROTOCOL_FEATURES, P_BACKEND_REQ, P_CONFIG, P_DEVICE_STATE, P_INFLIGHT, P_LOG, P_MQ,
    P_REPLY_ACK,
};
use super::*;
use crate::config::Mac;
use crate::event_loop::EventLoop;
use crate::virtio::bits::{F_EVENT_IDX, F_RING_PACKED, F_VERSION_1, STATUS_NEEDS_RESET};

const BLK_FLUSH: u64 = 1 << 9;
const BLK_MQ: u64 = 1 << 12;
const NET_MRG: u64 = 1 << 15;
const NET_CTRL: u64 = 1 << 17;
const NET_MQ: u64 = 1 << 22;
const NET_RSS: u64 = 1 << 60;
const NET_MAC_STATUS: u64 = 1 << 5 | 1 << 16;
const BASIC: u64 = F_VERSION_1 | F_EVENT_IDX | F_PROTOCOL_FEATURES;
const ALL: u64 = P_MQ | P_REPLY_ACK | P_CONFIG | P_BACKEND_REQ;

fn wanted(device_type: DeviceType) -> DeviceConfig {
    DeviceConfig {
        device_type,
        socket: "/nowhere".into(),
        num_queues: None,
        cpus: 8,
        queue_size: 64,
        mac: None,
        config_size: None,
        packed: None,
        reconnect_timeout: Duration::from_millis(200),
        loss_timeout: None,
    }
}

fn memory() -> GuestMemoryMmap {
    let file = tempfile::tempfile().unwrap();
    file.set_len(1 << 20).unwrap();
    let file = Some(FileOffset::new(file, 0));
    GuestMemoryMmap::from_ranges_with_files([(GuestAddress(0), 1 << 20, file)]).unwrap()
}

/// Three pages for each queue.
fn activation(features: u64, queues: &[u16]) -> Activation {
    let queue = |index: &u16| {
        let at = u64::from(*index) * 0x3000;
        ActiveQueue {
            queue: Queue {
                index: *index,
                size: 64,
                descriptors: at,
                available: at + 0x1000,
                used: at + 0x2000,
            },
            kick: new_event().unwrap(),
            call: new_event().unwrap(),
        }
    };
    Activation {
        features,
        queues: queues.iter().map(queue).collect(),
        again: false,
    }
}

/// A back-end behind the trait: what it has, and what it was told.
#[derive(Default)]
struct Backend {
    features: u64,
    protocol: u64,
    queues: u64,
    config: Vec<u8>,
    refuse: Option<&'static str>,
    /// A byte of the configuration that a state changes, and to what.
    loaded: Option<(usize, u8)>,
    /// Hangs up at this step, once.
    goes: Option<&'static str>,
    /// Hangs up instead of taking the channel.
    dies: bool,
    log: Vec<String>,
}

#[derive(Clone, Default)]
struct FakeLink(Arc<Mutex<Backend>>);

impl FakeLink {
    fn told(&self, step: &'static str, text: String) -> Result<(), LinkError> {
        let mut backend = self.0.lock().unwrap();
        backend.log.push(text);
        if backend.goes.take_if(|at| *at == step).is_some() {
            let source = vhost::Error::VhostUserProtocol(ProtocolError::Disconnected);
            return Err(LinkError { step, source });
        }
        if backend.refuse == Some(step) {
            let source = vhost::Error::VhostUserProtocol(ProtocolError::BackendInternalError);
            return Err(LinkError { step, source });
        }
        Ok(())
    }
    fn log(&self) -> Vec<String> {
        std::mem::take(&mut self.0.lock().unwrap().log)
    }
}

impl Link for FakeLink {
    fn features(&mut self) -> Result<u64, LinkError> {
        Ok(self.0.lock().unwrap().features)
    }
    fn protocol_features(&mut self) -> Result<u64, LinkError> {
        Ok(self.0.lock().unwrap().protocol)
    }
    fn set_protocol_features(&mut self, features: u64) -> Result<(), LinkError> {
        assert_eq!(features & !self.0.lock().unwrap().protocol, 0);
        Ok(())
    }
    fn queue_count(&mut self) -> Result<u64, LinkError> {
        Ok(self.0.lock().unwrap().queues)
    }
    fn set_channel(&mut self, _: &UnixStream) -> Result<(), LinkError> {
        if !self.0.lock().unwrap().dies {
            return Ok(());
        }
        let source = vhost::Error::VhostUserProtocol(ProtocolError::Disconnected);
        let step = "SET_BACKEND_REQ_FD";
        Err(LinkError { step, source })
    }
    fn read_config(&mut self, offset: u32, length: u32) -> Result<Vec<u8>, LinkError> {
        self.told("GET_CONFIG", format!("config {offset} {length}"))?;
        let backend = self.0.lock().unwrap();
        let (from, length) = (
            usize::try_from(offset).unwrap(),
            usize::try_from(length).unwrap(),
        );
        if let Some(part) = backend.config.get(from..from + length) {
            return Ok(part.to_vec());
        }
        let source = vhost::Error::VhostUserProtocol(ProtocolError::BackendInternalError);
        Err(LinkError {
            step: "GET_CONFIG",
            source,
        })
    }
    fn write_config(&mut self, offset: u32, data: &[u8]) -> Result<(), LinkError> {
        self.told("SET_CONFIG", format!("write {offset} {data:?}"))?;
        let from = usize::try_from(offset).unwrap();
        self.0.lock().unwrap().config[from..from + data.len()].copy_from_slice(data);
        Ok(())
    }
    fn set_features(&mut self, features: u64) -> Result<(), LinkError> {
        self.told("SET_FEATURES", format!("features {features:#x}"))
    }
    fn set_memory(&mut self, memory: &GuestMemoryMmap) -> Result<(), LinkError> {
        self.told("SET_MEM_TABLE", format!("memory {}", memory.num_regions()))
    }
    fn new_inflight(&mut self, queues: u16, size: u16) -> Result<Inflight, LinkError> {
        self.told("GET_INFLIGHT_FD", format!("new notes {queues} {size}"))?;
        let area = VhostUserInflight::new(4096, 0, queues, size);
        let file = tempfile::tempfile().unwrap();
        Ok(Inflight { area, file })
    }
    fn set_inflight(&mut self, inflight: &Inflight) -> Result<(), LinkError> {
        let (queues, size) = (inflight.area.num_queues, inflight.area.queue_size);
        self.told("SET_INFLIGHT_FD", format!("notes {queues} {size}"))
    }
    fn start_ring(&mut self, ring: &Ring, _: &RingEvents<'_>) -> Result<(), LinkError> {
        assert_eq!(ring.available - ring.descriptors, 0x1000);
        assert_eq!(ring.used - ring.descriptors, 0x2000);
        let text = format!(
            "start {} size {} base {:#x}",
            ring.index, ring.size, ring.base
        );
        self.told("SET_VRING_ADDR", text)
    }
    fn enable_ring(&mut self, index: usize, enable: bool) -> Result<(), LinkError> {
        self.told("SET_VRING_ENABLE", format!("enable {index} {enable}"))
    }
    fn stop_ring(&mut self, index: usize) -> Result<u32, LinkError> {
        self.told("GET_VRING_BASE", format!("stop {index}"))?;
        Ok(0x1234_8765)
    }
    fn set_log(&mut self, log: &DirtyLog) -> Result<(), LinkError> {
        self.told("SET_LOG_BASE", format!("log of {} bytes", log.size()))
    }
    fn set_ring_log(&mut self, ring: &Ring) -> Result<(), LinkError> {
        let text = format!("addresses of {}, log {:x?}", ring.index, ring.log);
        self.told("SET_VRING_ADDR", text)
    }
    fn save_state(&mut self) -> Result<Vec<u8>, LinkError> {
        self.told("SET_DEVICE_STATE_FD", "save".into())?;
        Ok(b"kept".to_vec())
    }
    fn load_state(&mut self, state: &[u8]) -> Result<(), LinkError> {
        let text = String::from_utf8_lossy(state);
        self.told("SET_DEVICE_STATE_FD", format!("load {text}"))?;
        let mut backend = self.0.lock().unwrap();
        if let Some((at, byte)) = backend.loaded {
            backend.config[at] = byte;
        }
        Ok(())
    }
}

impl Dial for FakeLink {
    fn dial(&self, _: Duration) -> io::Result<(Box<dyn Link>, Option<UnixStream>)> {
        Ok((Box::new(self.clone()), None))
    }
}

fn fake(features: u64, protocol: u64, queues: u64, config: Vec<u8>) -> FakeLink {
    FakeLink(Arc::new(Mutex::new(Backend {
        features,
        protocol,
        queues,
        config,
        ..Default::default()
    })))
}

/// A disk of eight sectors with three queues.
fn blk() -> FakeLink {
    let mut config = vec![0; 60];
    config[0] = 8;
    config[34] = 3;
    fake(BASIC | BLK_FLUSH | BLK_MQ, ALL, 4, config)
}

fn exit() -> ExitHandle {
    ExitHandle::new().unwrap()
}

fn device(link: &FakeLink, wanted: DeviceConfig) -> Result<VhostUserDevice, Error> {
    device_of(&EventLoop::new().unwrap().handle(), link, wanted)
}

fn device_of(
    events: &LoopHandle,
    link: &FakeLink,
    wanted: DeviceConfig,
) -> Result<VhostUserDevice, Error> {
    let (events, link) = (events.clone(), Box::new(link.clone()));
    VhostUserDevice::with_dial(wanted, memory(), events, exit(), link)
}

fn chain(error: &dyn StdError) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(error) = next {
        text += &format!(": {error}");
        next = error.source();
    }
    text
}

fn refusal(link: &FakeLink, wanted: DeviceConfig) -> String {
    match device(link, wanted) {
        Ok(_) => panic!("this must not work"),
        Err(error) => chain(&error),
    }
}

#[test]
fn the_guest_is_offered_what_both_can() {
    let link = blk();
    link.0.lock().unwrap().features |= 1 << 26 | 1 << 33 | 1 << 34 | 1 << 38;
    let mut device = device(&link, wanted(DeviceType::BLOCK)).unwrap();
    let features = F_VERSION_1 | F_EVENT_IDX | F_RING_PACKED | BLK_FLUSH | BLK_MQ;
    assert_eq!(device.features(), features);
    assert_eq!(device.queue_sizes(), [64; 3]);
    let mut capacity = [0; 8];
    device.read_config(0, &mut capacity);
    assert_eq!(u64::from_le_bytes(capacity), 8);
}

#[test]
fn fewer_queues_than_there_are_show_in_the_configuration() {
    let mut config = wanted(DeviceType::BLOCK);
    config.num_queues = Some(2);
    let mut two = device(&blk(), config.clone()).unwrap();
    assert_eq!(two.queue_sizes().len(), 2);
    let mut queues = [0; 2];
    two.read_config(34, &mut queues);
    assert_eq!(queues, [2, 0]);
    config.num_queues = Some(4);
    let text = refusal(&blk(), config.clone());
    assert!(text.contains("has 3 queues"), "{text}");
    (config.num_queues, config.cpus) = (None, 1);
    assert_eq!(device(&blk(), config).unwrap().queue_sizes().len(), 1);
}

#[test]
fn a_device_starts_and_stops_in_order() {
    let link = blk();
    let mut device = device(&link, wanted(DeviceType::BLOCK)).unwrap();
    link.log();
    let features = F_VERSION_1 | BLK_FLUSH;
    device.activate(activation(features, &[0, 2])).unwrap();
    let choice = features | F_PROTOCOL_FEATURES;
    assert_eq!(
        link.log(),
        [
            format!("features {choice:#x}"),
            "memory 1".into(),
            "start 0 size 64 base 0x0".into(),
            "start 2 size 64 base 0x0".into(),
            "enable 0 true".into(),
            "enable 2 true".into(),
        ]
    );
    device.reset();
    let stopped = ["stop 0", "enable 0 false", "stop 2", "enable 2 false"];
    assert_eq!(link.log(), stopped);
    device.reset();
    assert!(link.log().is_empty());
    device.activate(activation(features, &[1])).unwrap();
    link.log();
    drop(device);
    assert_eq!(link.log(), ["stop 1", "enable 1 false"]);
}

#[test]
fn a_suspended_device_goes_on_here_or_elsewhere() {
    let link = blk();
    link.0.lock().unwrap().protocol |= P_DEVICE_STATE;
    let mut here = device(&link, wanted(DeviceType::BLOCK)).unwrap();
    assert_eq!(
        here.suspend().unwrap().bases,
        [],
        "the guest has not started it"
    );
    let features = F_VERSION_1 | BLK_FLUSH;
    here.activate(activation(features, &[0, 2])).unwrap();
    link.log();
    let suspended = here.suspend().unwrap();
    assert_eq!(suspended.bases, [(0, 0x1234_8765), (2, 0x1234_8765)]);
    assert_eq!(suspended.back_end.as_deref(), Some(&b"kept"[..]));
    let stopped = [
        "stop 0",
        "enable 0 false",
        "stop 2",
        "enable 2 false",
        "save",
    ];
    assert_eq!(link.log(), stopped);
    let choice = features | F_PROTOCOL_FEATURES;
    let equipped = [
        format!("features {choice:#x}"),
        "memory 1".into(),
        "load kept".into(),
        // A card's address may have come with it.
        "config 0 60".into(),
    ];
    let rings = [
        "start 0 size 64 base 0x12348765",
        "start 2 size 64 base 0x12348765",
        "enable 0 true",
        "enable 2 true",
    ]
    .map(str::to_owned);
    let started = [&equipped[..], &rings].concat();
    here.resume();
    assert_eq!(link.log(), started);
    here.resume();
    assert!(link.log().is_empty(), "it runs");

    let mut there = device(&link, wanted(DeviceType::BLOCK)).unwrap();
    link.log();
    let again = || Some(activation(features, &[0, 2]));
    there.restore(again(), &suspended).unwrap();
    assert_eq!(link.log(), equipped, "the guest is not here yet");
    there.resume();
    assert_eq!(link.log(), rings);

    // A state that nobody can take over, and queues that ran from nowhere.
    let mut plain = device(&blk(), wanted(DeviceType::BLOCK)).unwrap();
    let error = plain.restore(again(), &suspended).unwrap_err().to_string();
    assert!(error.contains("cannot take over the state"), "{error}");
    let nowhere = Suspended::default();
    let error = there.restore(again(), &nowhere).unwrap_err().to_string();
    assert!(error.contains("nothing says where it goes on"), "{error}");
    there.restore(None, &nowhere).unwrap();
}

#[test]
fn who_has_the_guest_keeps_it_if_the_back_end_does_not_take_the_device_over() {
    let link = blk();
    link.0.lock().unwrap().protocol |= P_DEVICE_STATE | P_INFLIGHT;
    let suspended = Suspended {
        bases: vec![(0, 7)],
        config: link.0.lock().unwrap().config.clone(),
        back_end: Some(b"kept".to_vec()),
    };
    let restore = |device: &mut VhostUserDevice| {
        device.restore(Some(activation(F_VERSION_1, &[0])), &suspended)
    };
    for step in [
        "SET_FEATURES",
        "GET_INFLIGHT_FD",
        "SET_INFLIGHT_FD",
        "SET_MEM_TABLE",
        "SET_DEVICE_STATE_FD",
    ] {
        let mut device = device(&link, wanted(DeviceType::BLOCK)).unwrap();
        link.0.lock().unwrap().refuse = Some(step);
        let text = chain(&*restore(&mut device).unwrap_err());
        assert!(text.contains("/nowhere does not take over"), "{text}");
        assert!(text.contains(&format!("{step} failed")), "{text}");
        assert!(device.shared.state().running.is_none());
        link.0.lock().unwrap().refuse = None;
        link.0.lock().unwrap().goes = Some(step);
        let text = chain(&*restore(&mut device).unwrap_err());
        assert!(text.contains("no conversation"), "{text}");
    }
    let mut device = device(&link, wanted(DeviceType::BLOCK)).unwrap();
    device.shared.state().connection = None;
    let text = chain(&*restore(&mut device).unwrap_err());
    assert!(text.contains("is gone"), "{text}");
}

/// Restores a device with these features on a back-end; the guest has read that configuration elsewhere.
fn restored(
    link: &FakeLink,
    kind: DeviceType,
    features: u64,
    config: &[u8],
) -> Result<VhostUserDevice, String> {
    let mut device = device(link, wanted(kind)).unwrap();
    let suspended = Suspended {
        bases: vec![(0, 7)],
        config: config.to_vec(),
        back_end: (link.0.lock().unwrap().protocol & P_DEVICE_STATE != 0).then(Vec::new),
    };
    let activation = activation(features, &[0]);
    match device.restore(Some(activation), &suspended) {
        Ok(()) => Ok(device),
        Err(error) => Err(chain(&*error)),
    }
}

#[test]
fn a_disk_that_comes_to_a_back_end_may_have_grown_and_nothing_else() {
    const BLK_SIZE: u64 = 1 << 6;
    const SEG_MAX: u64 = 1 << 2;
    let link = blk();
    link.0.lock().unwrap().features |= BLK_SIZE | SEG_MAX;
    let same = link.0.lock().unwrap().config.clone();
    let kind = DeviceType::BLOCK;
    let with = |at: usize, byte: u8| {
        let mut config = same.clone();
        config[at] = byte;
        restored(&link, kind, F_VERSION_1 | BLK_SIZE | BLK_MQ, &config)
    };
    let unchanged = with(0, 8).unwrap();
    assert_eq!(unchanged.notifier().generation(), 0);
    // Sizes of disks are numbers of eight bytes. What is advice, or no feature of the driver's, may be anything.
    link.0.lock().unwrap().config[1] = 1;
    let larger = with(0, 255).unwrap();
    assert_eq!(larger.notifier().generation(), 1, "it is told");
    link.0.lock().unwrap().config[1] = 0;
    for at in [12, 16, 24, 32, 37, 49] {
        with(at, 9).unwrap();
    }
    for (at, byte, field) in [
        (0, 9, "capacity"),
        (7, 1, "capacity"),
        (21, 2, "blk_size"),
        (34, 2, "num_queues"),
    ] {
        let error = with(at, byte).err().unwrap();
        let text = format!("at /nowhere has another {field} in its configuration");
        assert!(error.contains(&text), "{error}");
    }
    let mut config = same.clone();
    config[12] = 126;
    let error = restored(&link, kind, F_VERSION_1 | SEG_MAX, &config);
    assert!(error.err().unwrap().contains("seg_max"));
    config[12] = 0;
    restored(&link, kind, F_VERSION_1 | SEG_MAX, &config).unwrap();
}

#[test]
fn a_card_that_comes_to_a_back_end_is_the_same_but_for_its_link() {
    const NET_MTU: u64 = 1 << 3;
    let features = BASIC | NET_MRG | NET_MAC_STATUS | NET_CTRL | NET_MQ | NET_MTU;
    let mut config = vec![0; 24];
    (config[0], config[8], config[11]) = (2, 2, 5);
    let link = fake(features, ALL, 5, config.clone());
    let with = |at: usize, byte: u8| {
        let mut config = config.clone();
        config[at] = byte;
        let features = features & !F_PROTOCOL_FEATURES;
        restored(&link, DeviceType::NET, features, &config)
    };
    for at in [6, 7, 12] {
        with(at, 1).unwrap();
    }
    for (at, field) in [(5, "mac"), (8, "max_virtqueue_pairs"), (10, "mtu")] {
        let error = with(at, 9).err().unwrap();
        assert!(error.contains(&format!("another {field} in")), "{error}");
    }
    // An address that its driver has set comes with the device's state.
    link.0.lock().unwrap().protocol |= P_DEVICE_STATE;
    link.0.lock().unwrap().loaded = Some((0, 4));
    for first in [2, 4] {
        let mut config = config.clone();
        config[0] = first;
        link.0.lock().unwrap().config[0] = 2;
        let card = restored(
            &link,
            DeviceType::NET,
            features & !F_PROTOCOL_FEATURES,
            &config,
        );
        let mut byte = [0];
        card.unwrap().read_config(0, &mut byte);
        assert_eq!(byte, [4]);
    }
}

/// Between the moment when a back-end has taken a device over and that when its guest comes.
#[test]
fn what_was_taken_over_goes_to_the_next_back_end_as_a_whole() {
    let link = blk();
    link.0.lock().unwrap().protocol |= P_DEVICE_STATE;
    let suspended = Suspended {
        bases: vec![(0, 7)],
        config: link.0.lock().unwrap().config.clone(),
        back_end: Some(b"kept".to_vec()),
    };
    let mut device = device(&link, wanted(DeviceType::BLOCK)).unwrap();
    let activation = activation(F_VERSION_1, &[0]);
    device.restore(Some(activation), &suspended).unwrap();
    // It has memory, so it hears of more.
    link.log();
    let (piece, whole) = larger(&device.shared.state().memory);
    device.memory_listener().add(&piece, &whole).unwrap();
    assert_eq!(link.log(), ["memory 2"]);
    let shared = Arc::clone(&device.shared);
    shared.lose(&mut shared.state(), "test");
    assert_eq!(device.notifier().status(), 0, "nothing is under way");
    eventually("it is back", || shared.state().connection.is_some());
    link.log();
    device.resume();
    let features = format!("features {:#x}", F_VERSION_1 | F_PROTOCOL_FEATURES);
    let all = [
        features.as_str(),
        "memory 2",
        "load kept",
        "config 0 60",
        "start 0 size 64 base 0x7",
        "enable 0 true",
    ];
    assert_eq!(link.log(), all);
    assert_eq!(device.notifier().status(), 0);
}

#[test]
fn what_was_kept_is_there_for_the_next_back_end_if_one_goes_while_it_starts() {
    let link = blk();
    link.0.lock().unwrap().protocol |= P_DEVICE_STATE | P_INFLIGHT;
    let mut device = device(&link, wanted(DeviceType::BLOCK)).unwrap();
    device.activate(activation(F_VERSION_1, &[0])).unwrap();
    for step in ["SET_DEVICE_STATE_FD", "SET_VRING_ADDR", "SET_VRING_ENABLE"] {
        device.suspend().unwrap();
        link.log();
        link.0.lock().unwrap().goes = Some(step);
        device.resume();
        let is_there = || device.shared.state().connection.is_some();
        eventually("it is back", is_there);
        let log = link.log();
        let loads = log.iter().filter(|line| *line == "load kept").count();
        assert_eq!(loads, 2, "{step}: {log:?}");
        assert_eq!(log.last().unwrap(), "enable 0 true");
    }
    assert_eq!(device.notifier().status(), 0);
    // One that comes when it has started gets nothing that is out of date.
    let shared = Arc::clone(&device.shared);
    shared.lose(&mut shared.state(), "test");
    eventually("it is back", || shared.state().connection.is_some());
    let log = link.log();
    assert_eq!(log.last().unwrap(), "enable 0 true");
    assert!(!log.contains(&"load kept".to_owned()), "{log:?}");
}

#[test]
fn what_a_back_end_writes_is_noted_if_it_can() {
    let log = Arc::new(DirtyLog::new(&memory()).unwrap());
    let link = blk();
    let mut blind = device(&link, wanted(DeviceType::BLOCK)).unwrap();
    let error = blind.track(Some(&log)).unwrap_err().to_string();
    assert!(
        error.contains("cannot tell which pages it writes"),
        "{error}"
    );

    let state = || {
        let link = blk();
        let mut back_end = link.0.lock().unwrap();
        back_end.protocol |= P_LOG;
        back_end.features |= F_LOG_ALL;
        drop(back_end);
        link
    };
    let link = state();
    let mut device = device(&link, wanted(DeviceType::BLOCK)).unwrap();
    assert_eq!(
        device.features() & F_LOG_ALL,
        0,
        "it is no feature of the guest's"
    );
    let features = F_VERSION_1 | BLK_FLUSH;
    device.activate(activation(features, &[0])).unwrap();
    link.log();
    let choice = features | F_PROTOCOL_FEATURES;
    device.track(Some(&log)).unwrap();
    let noted = link.log();
    assert_eq!(noted[0], format!("log of {} bytes", log.size()));
    assert_eq!(noted[1], format!("features {:#x}", choice | F_LOG_ALL));
    assert!(
        noted[2].starts_with("addresses of 0, log Some("),
        "{noted:?}"
    );
    // A driver that starts it anew does not get out of it.
    device.reset();
    device.activate(activation(features, &[0])).unwrap();
    assert!(link.log().contains(&noted[0]));
    device.track(None).unwrap();
    let plain = [
        format!("features {choice:#x}"),
        "addresses of 0, log None".into(),
    ];
    assert_eq!(link.log(), plain);
}

#[test]
fn packed_queues_are_offered_where_they_cost_nothing_or_are_wanted() {
    let net = || fake(BASIC | NET_MRG | NET_MAC_STATUS, ALL, 4, vec![0; 60]);
    let notes = || {
        let link = blk();
        link.0.lock().unwrap().protocol |= P_INFLIGHT;
        link
    };
    for (link, kind, packed, offered) in [
        (blk(), DeviceType::BLOCK, None, true),
        (blk(), DeviceType::BLOCK, Some(false), false),
        (notes(), DeviceType::BLOCK, None, false),
        (notes(), DeviceType::BLOCK, Some(true), true),
        (net(), DeviceType::NET, None, false),
        (net(), DeviceType::NET, Some(true), true),
    ] {
        link.0.lock().unwrap().features |= F_RING_PACKED;
        let config = DeviceConfig {
            packed,
            ..wanted(kind)
        };
        let device = device(&link, config).unwrap();
        let found = device.features() & F_RING_PACKED != 0;
        assert_eq!(found, offered, "{kind} {packed:?}");
    }
}

#[test]
fn packed_queues_go_on_where_they_were_unless_the_driver_has_reset_the_device() {
    let link = blk();
    link.0.lock().unwrap().features |= F_RING_PACKED;
    let mut device = device(&link, wanted(DeviceType::BLOCK)).unwrap();
    let features = F_VERSION_1 | F_RING_PACKED;
    for (again, base) in [
        (false, "0x80008000"),
        (true, "0x12348765"),
        (false, "0x80008000"),
    ] {
        link.log();
        let activation = Activation {
            again,
            ..activation(features, &[1])
        };
        device.activate(activation).unwrap();
        assert_eq!(link.log()[2], format!("start 1 size 64 base {base}"));
        device.reset();
    }
    // There is room for the four bytes of an event suppression structure, and not for a used ring.
    for (features, starts) in [(features, true), (F_VERSION_1, false)] {
        let mut small = activation(features, &[0]);
        let queue = &mut small.queues[0].queue;
        queue.used = (1 << 20) - 16;
        queue.available = queue.used - 0x1000;
        queue.descriptors = queue.used - 0x2000;
        assert_eq!(device.activate(small).is_ok(), starts);
        device.reset();
    }
}

#[test]
fn a_disk_whose_back_end_notes_what_is_under_way_goes_on_with_the_next_one() {
    let link = blk();
    link.0.lock().unwrap().protocol |= P_INFLIGHT;
    link.0.lock().unwrap().features |= F_RING_PACKED;
    let mut device = device(&link, wanted(DeviceType::BLOCK)).unwrap();
    link.log();
    let activation = activation(F_VERSION_1, &[0]);
    let kick = activation.queues[0].kick.try_clone().unwrap();
    device.activate(activation).unwrap();
    let notes = ["new notes 3 64", "notes 3 64", "memory 1"];
    assert_eq!(link.log()[1..4], notes);
    let shared = Arc::clone(&device.shared);
    shared.lose(&mut shared.state(), "test");
    eventually("it goes on", || kick.read().is_ok());
    let log = link.log();
    let at = log.iter().position(|line| line.starts_with("features"));
    assert_eq!(log[at.unwrap() + 1..][..2], notes[1..], "{log:?}");
    assert_eq!(device.notifier().status(), 0);
    // A reset ends what was under way.
    device.reset();
    link.log();
    device
        .activate(self::activation(F_VERSION_1, &[0]))
        .unwrap();
    assert_eq!(link.log()[1], notes[0]);
    // Of packed queues they say how far they were served.
    device.reset();
    let packed = self::activation(F_VERSION_1 | F_RING_PACKED, &[0]);
    let kick = packed.queues[0].kick.try_clone().unwrap();
    device.activate(packed).unwrap();
    shared.lose(&mut shared.state(), "test");
    eventually("it goes on", || kick.read().is_ok());
    assert_eq!(device.notifier().status(), 0);
    // One that does not read its predecessor's notes is no successor.
    link.0.lock().unwrap().protocol &= !P_INFLIGHT;
    shared.lose(&mut shared.state(), "test");
    std::thread::sleep(4 * RECONNECT_PAUSE);
    assert!(shared.state().connection.is_none());
}

/// [`memory`] with another MiB at 1 GiB: the new piece, and all of it.
fn larger(memory: &GuestMemoryMmap) -> (GuestMemoryMmap, GuestMemoryMmap) {
    let file = tempfile::tempfile().unwrap();
    file.set_len(1 << 20).unwrap();
    let mapping = MmapRegion::from_file(FileOffset::new(file, 0), 1 << 20).unwrap();
    let region = Arc::new(GuestRegionMmap::new(mapping, GuestAddress(1 << 30)).unwrap());
    let piece = GuestMemoryMmap::from_arc_regions(vec![Arc::clone(&region)]).unwrap();
    (piece, memory.insert_region(region).unwrap())
}

#[test]
fn a_running_back_end_has_more_memory_at_once_and_another_when_it_starts() {
    let link = blk();
    let mut device = device(&link, wanted(DeviceType::BLOCK)).unwrap();
    link.log();
    let memory = device.shared.state().memory.clone();
    let ((piece, whole), listener) = (larger(&memory), device.memory_listener());
    Arc::clone(&listener).add(&piece, &whole).unwrap();
    assert!(link.log().is_empty(), "it has no memory yet");
    // Queues may be there.
    let mut activation = activation(F_VERSION_1, &[0]);
    let queue = &mut activation.queues[0].queue;
    for area in [
        &mut queue.descriptors,
        &mut queue.available,
        &mut queue.used,
    ] {
        *area += 1 << 30;
    }
    device.activate(activation).unwrap();
    assert_eq!(link.log()[1], "memory 2");
    Arc::clone(&listener).withdraw(&piece, &memory);
    Arc::clone(&listener).add(&piece, &whole).unwrap();
    assert_eq!(link.log(), ["memory 1", "memory 2"]);
    device.reset();
    link.log();
    Arc::clone(&listener).withdraw(&piece, &memory);
    assert!(link.log().is_empty(), "it has no queues any more");
    device
        .activate(self::activation(F_VERSION_1, &[0]))
        .unwrap();
    assert_eq!(link.log()[1], "memory 1");
}

#[test]
fn a_back_end_that_refuses_more_memory_goes_on_with_what_it_has() {
    let link = blk();
    let mut device = device(&link, wanted(DeviceType::BLOCK)).unwrap();
    device.activate(activation(F_VERSION_1, &[0])).unwrap();
    let memory = device.shared.state().memory.clone();
    let ((piece, whole), listener) = (larger(&memory), device.memory_listener());
    assert_eq!(listener.name(), "device blk at /nowhere");
    link.0.lock().unwrap().refuse = Some("SET_MEM_TABLE");
    let error = Arc::clone(&listener).add(&piece, &whole).unwrap_err();
    let text = chain(&*error);
    assert!(text.contains("/nowhere refuses a larger"), "{text}");
    assert_eq!(device.shared.state().memory.num_regions(), 1);
    assert!(device.shared.state().connection.is_some());
    assert_eq!(device.notifier().status(), 0);
    // One that does not give memory back is told of what is right at the next start.
    link.0.lock().unwrap().refuse = None;
    Arc::clone(&listener).add(&piece, &whole).unwrap();
    link.0.lock().unwrap().refuse = Some("SET_MEM_TABLE");
    Arc::clone(&listener).withdraw(&piece, &memory);
    assert_eq!(device.shared.state().memory.num_regions(), 1);
}

#[test]
fn queues_outside_memory_are_refused() {
    let link = blk();
    let mut device = device(&link, wanted(DeviceType::BLOCK)).unwrap();
    link.log();
    type Change = fn(&mut Queue);
    let changes: [Change; 7] = [
        |q| q.descriptors = 8,
        |q| q.available = 1,
        |q| q.used = 2,
        |q| q.descriptors = (1 << 20) - 16,
        |q| q.available = 1 << 20,
        |q| q.used = u64::MAX - 3,
        |q| q.used = 0xffff_ffff_0000_0000,
    ];
    for change in changes {
        let mut activation = activation(F_VERSION_1, &[0]);
        change(&mut activation.queues[0].queue);
        device.activate(activation).unwrap_err();
        assert!(link.log().is_empty(), "the back-end hears nothing of it");
    }
}

#[test]
fn a_refusal_to_start_is_an_error_and_the_device_can_be_reset() {
    let link = blk();
    let mut device = device(&link, wanted(DeviceType::BLOCK)).unwrap();
    link.0.lock().unwrap().refuse = Some("SET_VRING_ADDR");
    let error = device.activate(activation(F_VERSION_1, &[0])).unwrap_err();
    assert!(chain(&*error).contains("SET_VRING_ADDR"));
    link.0.lock().unwrap().refuse = None;
    link.log();
    device.reset();
    assert_eq!(link.log(), ["stop 0", "enable 0 false"]);
    device.activate(activation(F_VERSION_1, &[0])).unwrap();
}

#[test]
fn the_configuration_is_read_again_when_it_may_have_changed() {
    let link = blk();
    let mut device = device(&link, wanted(DeviceType::BLOCK)).unwrap();
    link.log();
    let mut byte = [0];
    device.read_config(0, &mut byte);
    device.read_config(60, &mut byte);
    device.read_config(u64::MAX, &mut byte);
    assert!(link.log().is_empty(), "the back-end would have told");
    device.write_config(32, &[1]);
    device.write_config(60, &[1]);
    device.write_config(u64::MAX, &[1; 8]);
    device.write_config(1 << 40, &[1]);
    device.write_config(0, &[]);
    assert_eq!(link.log(), ["write 32 [1]"]);
    device.read_config(32, &mut byte);
    assert_eq!(byte, [1]);
    assert_eq!(link.log(), ["config 0 60"]);

    let silent = blk();
    silent.0.lock().unwrap().protocol &= !P_BACKEND_REQ;
    let mut device = self::device(&silent, wanted(DeviceType::BLOCK)).unwrap();
    silent.log();
    device.read_config(0, &mut byte);
    assert_eq!(silent.log().len(), 1, "this one cannot tell");
}

#[test]
fn a_back_end_that_knows_only_rings_gets_a_card_around_it() {
    let offered = BASIC | NET_MRG | NET_CTRL | NET_MQ | 1 << 3 | 1 << 63;
    let link = fake(offered, P_REPLY_ACK, 0, vec![]);
    let mut config = wanted(DeviceType::NET);
    config.mac = Some(Mac([2, 0, 0, 0, 0, 9]));
    let mut card = device(&link, config.clone()).unwrap();
    assert_eq!(
        card.features(),
        F_VERSION_1 | F_EVENT_IDX | NET_MRG | NET_MAC_STATUS
    );
    assert_eq!(card.queue_sizes().len(), 2);
    let mut bytes = [0; 8];
    card.read_config(0, &mut bytes);
    assert_eq!(bytes, [2, 0, 0, 0, 0, 9, 1, 0]);
    card.write_config(0, &[1; 8]);
    card.activate(activation(card.features(), &[0, 1])).unwrap();
    assert_eq!(
        link.log()[0],
        format!("features {:#x}", BASIC | NET_MRG),
        "it never hears of features it does not have"
    );
    config.num_queues = Some(4);
    assert!(refusal(&link, config.clone()).contains("has one pair"));
    (config.mac, config.num_queues) = (None, Some(2));
    let (mut a, mut b) = ([0; 6], [0; 6]);
    device(&link, config.clone())
        .unwrap()
        .read_config(0, &mut a);
    device(&link, config).unwrap().read_config(0, &mut b);
    assert_eq!(a[0] & 3, 2, "unicast, locally administered");
    assert_ne!(a, b);
}

#[test]
fn a_card_of_several_pairs_is_the_back_ends() {
    let mut bytes = vec![0; 24];
    bytes[8] = 4;
    let features = BASIC | NET_MRG | NET_CTRL | NET_MQ | NET_RSS | NET_MAC_STATUS;
    let link = fake(features, ALL, 9, bytes);
    let mut config = wanted(DeviceType::NET);
    let card = device(&link, config.clone()).unwrap();
    assert_eq!(card.queue_sizes().len(), 9);
    config.num_queues = Some(8);
    assert_eq!(
        device(&link, config.clone()).unwrap().queue_sizes().len(),
        9
    );
    config.num_queues = Some(2);
    let single = device(&link, config.clone()).unwrap();
    assert_eq!(single.queue_sizes().len(), 3);
    assert_eq!(single.features() & (NET_MQ | NET_RSS), 0);
    for n in [0, 1, 4, 10] {
        config.num_queues = Some(n);
        let text = refusal(&link, config.clone());
        assert!(text.contains("has 8 queues"), "{text}");
    }
    link.0.lock().unwrap().config[8] = 128;
    config.num_queues = None;
    let text = refusal(&link, config.clone());
    assert!(text.contains("257 queues"), "{text}");
    config.num_queues = Some(2);
    device(&link, config).unwrap();
}

#[test]
fn sockets_of_another_type_are_told() {
    let card = fake(
        BASIC | NET_MRG | NET_CTRL | NET_MAC_STATUS,
        ALL,
        3,
        vec![0; 60],
    );
    let text = refusal(&card, wanted(DeviceType::BLOCK));
    assert!(text.contains("not one of type blk"), "{text}");
    let rings_only = fake(BASIC | NET_MRG, P_REPLY_ACK, 0, vec![]);
    let text = refusal(&rings_only, wanted(DeviceType::BLOCK));
    assert!(text.contains("no configuration space"), "{text}");
    let text = refusal(&blk(), wanted(DeviceType::NET));
    assert!(text.contains("not one of type net"), "{text}");
    let typical = 1 << 2 | 1 << 6 | BLK_FLUSH;
    let zoned = fake(BASIC | typical | 1 << 16 | 1 << 17, ALL, 1, vec![0; 96]);
    let text = refusal(&zoned, wanted(DeviceType::NET));
    assert!(text.contains("not one of type net"), "{text}");
    device(&zoned, wanted(DeviceType::BLOCK)).unwrap();
    let short = fake(BASIC | BLK_FLUSH, ALL, 1, vec![0; 8]);
    let text = refusal(&short, wanted(DeviceType::BLOCK));
    assert!(text.contains("60 bytes of configuration"), "{text}");
    let legacy = fake(F_PROTOCOL_FEATURES | BLK_FLUSH, ALL, 1, vec![0; 60]);
    let text = refusal(&legacy, wanted(DeviceType::BLOCK));
    assert!(text.contains("VIRTIO_F_VERSION_1"), "{text}");
}

#[test]
fn other_types_have_their_usual_shape() {
    let link = fake(BASIC | 1, ALL, 5, vec![7; 64]);
    let vsock = device(&link, wanted(DeviceType(19))).unwrap();
    assert_eq!(vsock.queue_sizes().len(), 3);
    assert_eq!(link.log()[0], "config 0 8");
    let mut config = wanted(DeviceType(19));
    (config.num_queues, config.config_size) = (Some(5), Some(16));
    assert_eq!(
        device(&link, config.clone()).unwrap().queue_sizes().len(),
        5
    );
    assert_eq!(link.log()[0], "config 0 16");
    config.num_queues = Some(6);
    assert!(refusal(&link, config.clone()).contains("has 5 queues"));
    let bare = fake(F_VERSION_1, 0, 0, vec![]);
    let mut bare = device(&bare, config).unwrap();
    assert_eq!(bare.queue_sizes().len(), 6);
    let mut byte = [9];
    bare.read_config(0, &mut byte);
    assert_eq!(byte, [0]);
}

proptest! {
    /// Whatever a back-end claims, there is an error or a device that the transport can carry.
    #[test]
    fn any_claims_make_an_error_or_a_sound_device(
        (features, protocol, queues) in (any::<u64>(), any::<u64>(), any::<u64>()),
        plausible: bool,
        config in prop::collection::vec(any::<u8>(), 0..100),
        kind in 1u16..64,
        num_queues in prop::option::of(0u16..300),
        config_size in prop::option::of(0u16..100),
        accesses in prop::collection::vec((0..120u64, 0usize..9), 0..20),
    ) {
        let features = if plausible { features | BASIC } else { features };
        let link = fake(features, protocol, queues % 0x8001, config);
        let wanted = DeviceConfig { num_queues, config_size, ..wanted(DeviceType(kind)) };
        if let Ok(mut device) = device(&link, wanted) {
            prop_assert!(device.queue_sizes().len() <= 300);
            prop_assert_eq!(device.features() & !(features | NET_MAC_STATUS), 0);
            for (offset, length) in accesses {
                device.read_config(offset, &mut [0; 8][..length]);
            }
        }
    }
}

// On a real socket.

const GET_FEATURES: u32 = 1;
const SET_MEM_TABLE: u32 = 5;
const SET_VRING_BASE: u32 = 10;
const GET_VRING_BASE: u32 = 11;
const SET_VRING_KICK: u32 = 12;
const GET_PROTOCOL_FEATURES: u32 = 15;
const GET_QUEUE_NUM: u32 = 17;
const SET_VRING_ENABLE: u32 = 18;
const GET_CONFIG: u32 = 24;
const GET_INFLIGHT_FD: u32 = 31;
const SET_INFLIGHT_FD: u32 = 32;

/// The requests that came: number and body.
type Seen = Mutex<VecDeque<(u32, Vec<u8>)>>;

/// Serves one connection, then ends.
struct Server {
    thread: JoinHandle<()>,
    seen: Arc<Seen>,
    stream: UnixStream,
    /// It has stopped answering.
    mute: Arc<AtomicBool>,
}

struct Machine {
    dir: TempDir,
    events: LoopHandle,
    exit: ExitHandle,
    thread: Option<JoinHandle<()>>,
}

impl Machine {
    fn new() -> Self {
        let mut events = EventLoop::new().unwrap();
        let handle = events.handle();
        Self {
            dir: tempfile::tempdir().unwrap(),
            events: handle,
            exit: exit(),
            thread: Some(std::thread::spawn(move || events.run().unwrap())),
        }
    }

    fn config(&self, device_type: DeviceType) -> DeviceConfig {
        DeviceConfig {
            socket: self.dir.path().join("socket"),
            reconnect_timeout: Duration::from_secs(5),
            ..wanted(device_type)
        }
    }

    fn connect(&self, kind: DeviceType, memory: GuestMemoryMmap) -> Result<VhostUserDevice, Error> {
        let (events, exit) = (self.events.clone(), self.exit.clone());
        VhostUserDevice::connect(self.config(kind), memory, events, exit)
    }

    /// Lets a back-end listen, accept one connection and serve it.
    fn serve(&self, features: u64, config: Vec<u8>) -> JoinHandle<Server> {
        self.serve_with(features, ALL, config)
    }

    fn serve_with(&self, features: u64, protocol: u64, config: Vec<u8>) -> JoinHandle<Server> {
        let path = self.dir.path().join("socket");
        let _ = std::fs::remove_file(&path);
        let listener = UnixListener::bind(path).unwrap();
        std::thread::spawn(move || {
            let (stream, _) = listener.accept().unwrap();
            let seen = Arc::new(Mutex::new(VecDeque::new()));
            let (theirs, log) = (stream.try_clone().unwrap(), seen.clone());
            let mute = Arc::new(AtomicBool::new(false));
            let muted = mute.clone();
            let offer = (features, protocol);
            let serve = move || answer(theirs, offer, &config, &log, &muted);
            Server {
                thread: std::thread::spawn(serve),
                seen,
                stream,
                mute,
            }
        })
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.events.stop();
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap();
        }
    }
}

fn answer(
    mut stream: UnixStream,
    (features, protocol): (u64, u64),
    config: &[u8],
    seen: &Seen,
    mute: &AtomicBool,
) {
    loop {
        let mut header = [0; 12];
        if stream.read_exact(&mut header).is_err() {
            return;
        }
        let word = |at: usize| u32::from_ne_bytes(header[at..at + 4].try_into().unwrap());
        let (request, flags) = (word(0), word(4));
        let mut body = vec![0; usize::try_from(word(8)).unwrap()];
        stream.read_exact(&mut body).unwrap();
        let reply = match request {
            GET_FEATURES => Some(features.to_ne_bytes().to_vec()),
            GET_PROTOCOL_FEATURES => Some(protocol.to_ne_bytes().to_vec()),
            GET_QUEUE_NUM => Some(4u64.to_ne_bytes().to_vec()),
            GET_VRING_BASE => Some(body.clone()),
            GET_INFLIGHT_FD => Some([&4096u64.to_ne_bytes()[..], &body[8..]].concat()),
            GET_CONFIG => {
                let size = u32::from_ne_bytes(body[4..8].try_into().unwrap());
                let size = usize::try_from(size).unwrap();
                Some([&body[..12], &config[..size]].concat())
            }
            _ if flags & 8 != 0 => Some(vec![0; 8]),
            _ => None,
        };
        seen.lock().unwrap().push_back((request, body));
        if let (Some(reply), false) = (reply, mute.load(Ordering::SeqCst)) {
            let mut bytes = request.to_ne_bytes().to_vec();
            bytes.extend(5u32.to_ne_bytes());
            bytes.extend(u32::try_from(reply.len()).unwrap().to_ne_bytes());
            bytes.extend(reply);
            let file = (request == GET_INFLIGHT_FD).then(|| tempfile::tempfile().unwrap());
            let files: Vec<_> = file.iter().map(|f| f.as_raw_fd()).collect();
            if stream.send_with_fds(&[&bytes[..]], &files).is_err() {
                return;
            }
        }
    }
}

impl Server {
    /// The bodies of all requests of one kind so far.
    fn bodies(&self, request: u32) -> Vec<Vec<u8>> {
        let seen = self.seen.lock().unwrap();
        let of_kind = seen.iter().filter(|(r, _)| *r == request);
        of_kind.map(|(_, body)| body.clone()).collect()
    }

    /// Dies as a crashed process does.
    fn crash(self) {
        self.stream.shutdown(std::net::Shutdown::Both).unwrap();
        self.thread.join().unwrap();
    }
}

fn eventually(what: &str, mut done: impl FnMut() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < Duration::from_secs(20), "{what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn disk() -> (u64, Vec<u8>) {
    let mut config = vec![0; 60];
    config[0] = 8;
    (BASIC | BLK_FLUSH, config)
}

#[test]
fn a_device_lives_on_a_real_socket() {
    let machine = Machine::new();
    let (features, config) = disk();
    let accepted = machine.serve(features, config);
    let mut device = machine.connect(DeviceType::BLOCK, memory()).unwrap();
    let server = accepted.join().unwrap();
    let mut byte = [0];
    device.read_config(0, &mut byte);
    assert_eq!(byte, [8]);
    device.activate(activation(F_VERSION_1, &[0])).unwrap();
    assert_eq!(server.bodies(SET_VRING_KICK).len(), 1);
    let enabled = server.bodies(SET_VRING_ENABLE);
    assert_eq!(enabled, [[0, 0, 0, 0, 1, 0, 0, 0]]);
    device.reset();
    assert_eq!(server.bodies(GET_VRING_BASE).len(), 1);
    drop(device);
    server.thread.join().unwrap();
}

#[test]
fn a_disk_whose_back_end_crashed_needs_a_reset_and_then_works() {
    let machine = Machine::new();
    let (features, config) = disk();
    let accepted = machine.serve(features, config.clone());
    let mut device = machine.connect(DeviceType::BLOCK, memory()).unwrap();
    device.activate(activation(F_VERSION_1, &[0])).unwrap();
    let notifier = device.notifier();
    accepted.join().unwrap().crash();
    eventually("the guest is told", || {
        notifier.status() & STATUS_NEEDS_RESET != 0
    });
    let mut byte = [0];
    device.read_config(0, &mut byte);
    assert_eq!(byte, [8], "what is known is still answered");

    let server = machine.serve(features, config).join().unwrap();
    eventually("it is back", || device.shared.state().connection.is_some());
    assert!(server.bodies(SET_VRING_KICK).is_empty());
    device.reset();
    assert!(server.bodies(GET_VRING_BASE).is_empty());
    device.activate(activation(F_VERSION_1, &[0])).unwrap();
    assert_eq!(server.bodies(SET_VRING_KICK).len(), 1);
}

#[test]
fn a_disk_whose_back_end_crashed_goes_on_with_its_notes() {
    let machine = Machine::new();
    let (features, config) = disk();
    let accepted = machine.serve_with(features, ALL | P_INFLIGHT, config.clone());
    let mut device = machine.connect(DeviceType::BLOCK, memory()).unwrap();
    device.activate(activation(F_VERSION_1, &[0])).unwrap();
    let first = accepted.join().unwrap();
    let notes = first.bodies(SET_INFLIGHT_FD);
    // A page at offset 0, for one queue of 64 descriptors.
    assert_eq!(notes[0][..8], 4096u64.to_ne_bytes());
    assert_eq!(notes[0][8..20], [0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 64, 0]);
    first.crash();
    let second = machine.serve_with(features, ALL | P_INFLIGHT, config);
    let second = second.join().unwrap();
    eventually("it goes on", || second.bodies(SET_VRING_ENABLE).len() == 1);
    assert!(second.bodies(GET_INFLIGHT_FD).is_empty());
    assert_eq!(second.bodies(SET_INFLIGHT_FD), notes);
    assert_eq!(device.notifier().status(), 0);
}

#[test]
fn a_back_end_that_stays_away_too_long_costs_a_reset() {
    let machine = Machine::new();
    let (features, config) = disk();
    let accepted = machine.serve_with(features, ALL | P_INFLIGHT, config.clone());
    let wanted = DeviceConfig {
        loss_timeout: Some(Duration::from_millis(100)),
        ..machine.config(DeviceType::BLOCK)
    };
    let (events, exit) = (machine.events.clone(), machine.exit.clone());
    let mut device = VhostUserDevice::connect(wanted, memory(), events, exit).unwrap();
    device.activate(activation(F_VERSION_1, &[0])).unwrap();
    let notifier = device.notifier();
    assert_eq!(notifier.status(), 0);
    accepted.join().unwrap().crash();
    eventually("the guest is told", || {
        notifier.status() & STATUS_NEEDS_RESET != 0
    });
    // It could go on with the notes, but its guest was told otherwise.
    let server = machine.serve_with(features, ALL | P_INFLIGHT, config);
    let server = server.join().unwrap();
    eventually("it is back", || device.shared.state().connection.is_some());
    assert!(server.bodies(SET_VRING_KICK).is_empty());
    device.reset();
    device.activate(activation(F_VERSION_1, &[0])).unwrap();
    assert_eq!(server.bodies(SET_VRING_KICK).len(), 1);
}

#[test]
fn a_back_end_that_goes_again_and_again_has_not_been_back() {
    let machine = Machine::new();
    let (features, config) = disk();
    let limit = Duration::from_millis(1500);
    let wanted = DeviceConfig {
        loss_timeout: Some(limit),
        ..machine.config(DeviceType::BLOCK)
    };
    let serve = || machine.serve_with(features, ALL | P_INFLIGHT, config.clone());
    let mut accepted = serve();
    let (events, exit) = (machine.events.clone(), machine.exit.clone());
    let mut device = VhostUserDevice::connect(wanted, memory(), events, exit).unwrap();
    device.activate(activation(F_VERSION_1, &[0])).unwrap();
    let notifier = device.notifier();
    let told = || notifier.status() & STATUS_NEEDS_RESET != 0;
    // It does not wait for it as long as its pauses grow.
    let mut losses = 0;
    while !told() {
        let server = accepted.join().unwrap();
        accepted = serve();
        eventually("it goes on", || {
            told() || server.bodies(SET_VRING_KICK).len() == 1
        });
        server.crash();
        losses += 1;
        assert!(losses < 8, "the guest is not told");
        eventually("it is lost", || device.shared.state().connection.is_none());
    }
    // The clock goes on over at least one return.
    assert!(losses > 1, "{losses} losses in {limit:?}");
}

#[test]
fn memory_is_added_over_a_real_socket_whether_requests_are_acknowledged_or_not() {
    for protocol in [ALL, ALL & !P_REPLY_ACK] {
        let machine = Machine::new();
        let (features, config) = disk();
        let accepted = machine.serve_with(features, protocol, config);
        let mut device = machine.connect(DeviceType::BLOCK, memory()).unwrap();
        device.activate(activation(F_VERSION_1, &[0])).unwrap();
        let server = accepted.join().unwrap();
        let (piece, whole) = larger(&device.shared.state().memory);
        device.memory_listener().add(&piece, &whole).unwrap();
        // The back-end has it when that returns: nothing is waited for here.
        let tables = server.bodies(SET_MEM_TABLE);
        assert_eq!([tables[0][0], tables[1][0]], [1, 2]);
        assert_eq!(tables[1][40..48], (1u64 << 30).to_ne_bytes());
        server.crash();
    }
}

#[test]
fn a_back_end_that_goes_while_memory_is_added_gets_it_when_it_is_back() {
    let machine = Machine::new();
    let features = BASIC | NET_MRG | NET_MAC_STATUS;
    let accepted = machine.serve(features, vec![0; 60]);
    let mut device = machine.connect(DeviceType::NET, memory()).unwrap();
    device.activate(activation(F_VERSION_1, &[0, 1])).unwrap();
    let server = accepted.join().unwrap();
    // It hears of it, and dies.
    server.mute.store(true, Ordering::SeqCst);
    let ((piece, whole), listener) = (
        larger(&device.shared.state().memory),
        device.memory_listener(),
    );
    let adding =
        std::thread::spawn(move || listener.add(&piece, &whole).map_err(|e| e.to_string()));
    eventually("it hears of it", || server.bodies(SET_MEM_TABLE).len() == 2);
    server.crash();
    adding.join().unwrap().unwrap();
    let server = machine.serve(features, vec![0; 60]).join().unwrap();
    eventually("it goes on", || server.bodies(SET_VRING_ENABLE).len() == 2);
    assert_eq!(server.bodies(SET_MEM_TABLE)[0][0], 2);
    assert_eq!(device.notifier().status(), 0);
}

#[test]
fn a_card_whose_back_end_crashed_goes_on_from_the_used_index() {
    let machine = Machine::new();
    let features = BASIC | NET_MRG | NET_MAC_STATUS;
    let accepted = machine.serve(features, vec![0; 60]);
    let memory = memory();
    let mut device = machine.connect(DeviceType::NET, memory.clone()).unwrap();
    let activation = activation(F_VERSION_1, &[0, 1]);
    let kick = activation.queues[1].kick.try_clone().unwrap();
    device.activate(activation).unwrap();
    memory.write_obj(0x1234u16, GuestAddress(0x5002)).unwrap();
    accepted.join().unwrap().crash();
    let server = machine.serve(features, vec![0; 60]).join().unwrap();
    eventually("the queues run again", || kick.read().is_ok());
    let bases = server.bodies(SET_VRING_BASE);
    assert_eq!(
        bases,
        [[0, 0, 0, 0, 0, 0, 0, 0], [1, 0, 0, 0, 0x34, 0x12, 0, 0]]
    );
    assert_eq!(server.bodies(SET_VRING_ENABLE).len(), 2);
    assert_eq!(device.notifier().status(), 0);
}

/// How far packed queues were served nobody can tell.
#[test]
fn a_card_of_packed_queues_whose_back_end_crashed_needs_a_reset() {
    let machine = Machine::new();
    let features = BASIC | NET_MRG | NET_MAC_STATUS | F_RING_PACKED;
    for protocol in [ALL, ALL & !P_REPLY_ACK] {
        let accepted = machine.serve_with(features, protocol, vec![0; 60]);
        let config = DeviceConfig {
            packed: Some(true),
            ..machine.config(DeviceType::NET)
        };
        let (events, exit) = (machine.events.clone(), machine.exit.clone());
        let mut device = VhostUserDevice::connect(config, memory(), events, exit).unwrap();
        let activation = activation(F_VERSION_1 | F_RING_PACKED, &[0, 1]);
        device.activate(activation).unwrap();
        let server = accepted.join().unwrap();
        // Without acknowledgements nobody waits for it.
        let bases = || server.bodies(SET_VRING_BASE);
        eventually("it has both queues", || bases().len() == 2);
        let bases = bases();
        let fresh = [0, 0x80, 0, 0x80];
        for (index, base) in (0..).zip(&bases) {
            assert_eq!(base[..], [[index, 0, 0, 0], fresh].concat());
        }
        server.crash();
        let notifier = device.notifier();
        eventually("the guest is told", || {
            notifier.status() & STATUS_NEEDS_RESET != 0
        });
    }
}

#[test]
fn a_device_started_while_its_back_end_is_away_starts_later() {
    let machine = Machine::new();
    let (features, config) = disk();
    let accepted = machine.serve(features, config.clone());
    let mut device = machine.connect(DeviceType::BLOCK, memory()).unwrap();
    accepted.join().unwrap().crash();
    eventually("the loss is noticed", || {
        device.shared.state().connection.is_none()
    });
    device.activate(activation(F_VERSION_1, &[0])).unwrap();
    // Another disk than the guest was promised is not taken.
    let unlike = machine.serve(BASIC | 1 << 6, config.clone());
    let unlike = unlike.join().unwrap();
    unlike.thread.join().unwrap();
    assert!(device.shared.state().connection.is_none());
    let server = machine.serve(features, config).join().unwrap();
    eventually("it starts", || server.bodies(SET_VRING_ENABLE).len() == 1);
    assert_eq!(device.notifier().status(), 0);
}

#[test]
fn sockets_without_a_back_end_are_clear_errors() {
    let machine = Machine::new();
    let connect = |config: &DeviceConfig| {
        VhostUserDevice::connect(
            config.clone(),
            memory(),
            machine.events.clone(),
            machine.exit.clone(),
        )
        .map(|_| ())
        .unwrap_err()
    };
    let mut config = machine.config(DeviceType::BLOCK);
    config.reconnect_timeout = Duration::from_millis(10);
    assert!(matches!(connect(&config), Error::Connect { .. }));
    std::fs::write(&config.socket, "a file").unwrap();
    config.reconnect_timeout = Duration::from_secs(3600);
    let text = chain(&connect(&config));
    assert!(text.contains("not a socket"), "{text}");
    config.reconnect_timeout = Duration::from_millis(10);
    std::fs::remove_file(&config.socket).unwrap();
    let listener = UnixListener::bind(&config.socket).unwrap();
    assert!(matches!(connect(&config), Error::Silent { .. }));
    let closer = std::thread::spawn(move || {
        // The connection that nobody accepted above, and the new one.
        drop(listener.accept().unwrap());
        let (mut stream, _) = listener.accept().unwrap();
        stream.read_exact(&mut [0; 12]).unwrap();
    });
    assert!(matches!(connect(&config), Error::Negotiate { .. }));
    closer.join().unwrap();
}

#[test]
fn a_listener_without_room_is_not_waited_for_longer_than_any_other() {
    use nix::sys::socket::{self, AddressFamily, Backlog, SockFlag, SockType, UnixAddr};
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("socket");
    let stream = SockType::Stream;
    let listener =
        socket::socket(AddressFamily::Unix, stream, SockFlag::SOCK_CLOEXEC, None).unwrap();
    socket::bind(listener.as_raw_fd(), &UnixAddr::new(&path).unwrap()).unwrap();
    socket::listen(&listener, Backlog::new(0).unwrap()).unwrap();
    let patience = Duration::from_millis(50);
    let mut accepted = Vec::new();
    let error = loop {
        match connect(&path, patience) {
            Ok(socket) => accepted.push(socket),
            Err(error) => break error,
        }
    };
    assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
    assert!(!accepted.is_empty());
}

#[test]
fn a_back_end_that_dies_at_the_last_step_is_no_start() {
    let link = blk();
    link.0.lock().unwrap().dies = true;
    let text = refusal(&link, wanted(DeviceType::BLOCK));
    assert!(text.contains("SET_BACKEND_REQ_FD"), "{text}");
}

#[test]
fn a_back_end_that_hangs_does_not_hold_up_the_end() {
    let machine = Machine::new();
    let (features, config) = disk();
    let accepted = machine.serve(features, config);
    let mut device = machine.connect(DeviceType::BLOCK, memory()).unwrap();
    device.activate(activation(F_VERSION_1, &[0])).unwrap();
    let server = accepted.join().unwrap();
    server.mute.store(true, Ordering::SeqCst);
    let start = Instant::now();
    let resetting = std::thread::spawn(move || device.reset());
    eventually("the back-end hears of it", || {
        server.bodies(GET_VRING_BASE).len() == 1
    });
    machine.exit.end(crate::exit::ExitReason::PowerOff);
    resetting.join().unwrap();
    assert!(start.elapsed() < STOP_LIMIT / 2);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    /// Whatever bytes come in place of answers, starting is an error.
    #[test]
    fn garbage_is_no_back_end(
        bytes in prop::collection::vec(any::<u8>(), 0..200),
        header: bool,
    ) {
        let machine = Machine::new();
        let config = machine.config(DeviceType::BLOCK);
        let listener = UnixListener::bind(&config.socket).unwrap();
        let server = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            if header {
                // An answer to GET_FEATURES, as far as its header tells.
                stream.write_all(&[1, 0, 0, 0, 5, 0, 0, 0, 8, 0, 0, 0]).unwrap();
            }
            let _ = stream.write_all(&bytes);
            stream.shutdown(std::net::Shutdown::Write).unwrap();
            let _ = stream.read_to_end(&mut Vec::new());
        });
        prop_assert!(machine.connect(DeviceType::BLOCK, memory()).is_err());
        server.join().unwrap();
    }
}

#[test]
fn a_slow_start_is_waited_for() {
    let machine = Machine::new();
    let config = machine.config(DeviceType::BLOCK);
    let (events, exit) = (machine.events.clone(), machine.exit.clone());
    let connecting = std::thread::spawn(move || {
        VhostUserDevice::connect(config, memory(), events, exit).map(|_| ())
    });
    std::thread::sleep(Duration::from_millis(150));
    let (features, config) = disk();
    let server = machine.serve(features, config);
    connecting.join().unwrap().unwrap();
    server.join().unwrap().thread.join().unwrap();
}

#[test]
fn a_change_of_the_configuration_reaches_the_guest() {
    let link = blk();
    let machine = Machine::new();
    let wanted = wanted(DeviceType::BLOCK);
    let mut device = device_of(&machine.events, &link, wanted).unwrap();
    let (channel, mut theirs) = Channel::new().unwrap();
    device.shared.watch_channel(channel).unwrap();
    let generation = device.notifier().generation();
    link.0.lock().unwrap().config[0] = 16;
    let mut message = Vec::new();
    for word in [2u32, 1, 0] {
        message.extend(word.to_ne_bytes());
    }
    theirs.write_all(&message).unwrap();
    let notifier = device.notifier();
    eventually("a new generation", || notifier.generation() != generation);
    let mut byte = [0];
    device.read_config(0, &mut byte);
    assert_eq!(byte, [16]);
}

#[test]
fn the_error_eventfd_stops_the_device_once() {
    let link = blk();
    let machine = Machine::new();
    let wanted = wanted(DeviceType::BLOCK);
    let mut device = device_of(&machine.events, &link, wanted).unwrap();
    device.activate(activation(F_VERSION_1, &[0])).unwrap();
    let before = device.notifier().generation();
    let error = {
        let state = device.shared.state();
        state.running.as_ref().unwrap().error.try_clone().unwrap()
    };
    for _ in 0..3 {
        error.write(1).unwrap();
    }
    let notifier = device.notifier();
    eventually("the guest is told", || {
        notifier.status() & STATUS_NEEDS_RESET != 0
    });
    assert_eq!(notifier.generation(), before + 1);
}

//! The vhost-user messages: what each of them does to features, memory, rings and configuration.
//!
//! A ring's life, seen from here:
//!
//! ```text
//!            SET_VRING_NUM, _ADDR, _BASE, _CALL, _ERR          SET_VRING_KICK, and all is there
//!  stopped ────────────────────────────────────────▶ stopped ────────────────────────────────▶ running
//!     ▲                                                                                          │ ▲
//!     │   GET_VRING_BASE, SET_VRING_NUM, _BASE, RESET_DEVICE, _OWNER, the front-end leaves:      │ │
//!     └──────────────── the worker finishes what is in flight and gives the ring back ◀──────────┘ │
//!                                                                                                  │
//!        any other message about a running ring, or about memory: stop, change, start again ───────┘
//! ```
//!
//! A size or a base for a ring that runs says that the front-end sets it up anew without having stopped it. Such a ring
//! waits for its SET_VRING_KICK: with old addresses in memory that the guest may use otherwise by now it must not run.
//!
//! Rings start on SET_VRING_KICK and not on the first kick, as all known back-ends do: a chain that was
//! added before the connection must not wait for the next one.
//!
//! A device that offers INFLIGHT_SHMFD has its requests in flight noted by the rings themselves: they begin with what the
//! back-end before this one noted, and a worker serves it as it comes. So GET_VRING_BASE_INFLIGHT and GET_VRING_BASE_SKIP_DRAIN are
//! offered, too: GET_VRING_BASE ends what is in flight, and GET_VRING_BASE_SKIP_DRAIN leaves in the notes what the storage does not
//! have. What it has is waited for in any case: it reads and writes the guest's memory.
//!
//! While the dirty log is on, a ring has memory that marks what is written to it (`dirty`): its own areas too, and also if only
//! its VHOST_VRING_F_LOG is set, or only VHOST_F_LOG_ALL, as there are front-ends that set nothing else.

mod handed;

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::Duration;

use nix::sys::stat::fstat;
use ringside_control::{ApiError, Chain, ErrorCode};
use ringside_rings::{DeviceRing, RingConfig, RingError};
use serde_json::{Value, json};
use thiserror::Error;
use tracing::{debug, info, warn};
use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags, VhostUserInflight,
    VhostUserLog, VhostUserMemoryRegion, VhostUserShMemConfig, VhostUserSharedMsg,
    VhostUserSingleMemoryRegion, VhostUserVringAddrFlags, VhostUserVringState,
};
use vhost::vhost_user::{
    Error as ProtocolError, GpuBackend, Result as ProtocolResult, VhostUserBackendReqHandlerMut,
    VhostUserProtocolFeatures, VhostUserVirtioFeatures,
};
use virtio_bindings::virtio_config::{VIRTIO_F_IN_ORDER, VIRTIO_F_RING_PACKED};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::signal::Killable;

use super::control::{Link, LinkState, Reply, Request, Statistics, feature_names};
use super::daemon::wake_signal;
use super::device::{Device, DeviceError, WorkerThread};
use super::dirty::{DirtyLog, LogError, Memory};
use super::inflight::{self, InflightError, Notes};
use super::limit::LogLimit;
use super::memory::{MAX_SHARED, MAX_SLOTS, MemoryError, MemoryTable, check_file_system};
use super::placement::{Placement, PlacementError};
use super::state::{StateError, Transfers};
use super::vring::{Command, CommandSender, Vring, command_channel};

pub(super) use handed::Kicks;

/// VHOST_USER_F_PROTOCOL_FEATURES, the one virtio feature bit that is vhost-user's own.
pub(super) const PROTOCOL_FEATURES: u64 = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();

/// VHOST_F_LOG_ALL: what is written to guest memory is to be marked. No feature of the device.
const LOG_ALL: u64 = VhostUserVirtioFeatures::LOG_ALL.bits();

/// Feature bits that are for this side of the device only.
const TRANSPORT_FEATURES: u64 = PROTOCOL_FEATURES | LOG_ALL;

/// The largest virtqueue (VIRTIO 1.3, 2.7 and 2.8).
const MAX_QUEUE_SIZE: u16 = 32768;

/// How long a worker may take to give a ring back before it is woken from a system call, and then how often.
const STOP_PATIENCE: Duration = Duration::from_millis(500);

/// A message that cannot be obeyed.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum HandlerError {
    /// There is no such queue.
    #[error("queue {index} does not exist: the device has {count}")]
    NoQueue {
        /// Number of the queue.
        index: u32,
        /// How many queues there are.
        count: usize,
    },
    /// The front-end accepted features that were not offered.
    #[error("features {unknown:#x} were accepted but not offered")]
    Features {
        /// The bits that were not offered.
        unknown: u64,
    },
    /// A queue size that cannot be served.
    #[error(
        "queue {index}: size {size} is not a power of two up to {max}, or a packed virtqueue's up to there"
    )]
    QueueSize {
        /// Number of the queue.
        index: u32,
        /// Size asked for.
        size: u32,
        /// The largest size that is served.
        max: u16,
    },
    /// A ring index that does not fit 16 bits.
    #[error("queue {index}: base {base:#x} is not an index of a split virtqueue")]
    Base {
        /// Number of the queue.
        index: u32,
        /// What the front-end sent.
        base: u32,
    },
    /// A ring address lies in no region of the front-end's memory table.
    #[error("queue {index}: address {addr:#x} lies in no memory region")]
    Address {
        /// Number of the queue.
        index: u16,
        /// Address in the front-end's address space.
        addr: u64,
    },
    /// The ring cannot be used as it is described.
    #[error("queue {index} cannot be started")]
    Ring {
        /// Number of the queue.
        index: u16,
        /// What is wrong with it.
        #[source]
        source: RingError,
    },
    /// Guest memory cannot be used as it is described.
    #[error("guest memory")]
    Memory(#[from] MemoryError),
    /// The dirty log cannot be used.
    #[error(transparent)]
    Log(#[from] LogError),
    /// The log address of a ring is not that of its used ring: no address is translated in between.
    #[error(
        "queue {index}: writes to the used ring are to be logged at guest address {log:#x}, and it lies at {used:#x}"
    )]
    LogAddress {
        /// Number of the queue.
        index: u16,
        /// Guest-physical address that the front-end wants to be logged.
        log: u64,
        /// Where the used ring lies in guest memory.
        used: u64,
    },
    /// Requests in flight cannot be tracked.
    #[error(transparent)]
    Inflight(#[from] InflightError),
    /// The device refuses.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// The device's state cannot be moved.
    #[error(transparent)]
    State(#[from] StateError),
    /// A worker cannot run where it is to.
    #[error(transparent)]
    Placement(#[from] PlacementError),
    /// A worker thread has ended; nothing can be served any more.
    #[error("worker {worker} has ended unexpectedly")]
    WorkerLost {
        /// Number of the worker.
        worker: usize,
        /// What the command channel said.
        #[source]
        source: io::Error,
    },
    /// A descriptor that cannot carry events: one that is always ready would keep a worker spinning.
    #[error("queue {index}: the descriptor sent is neither an eventfd nor a pipe")]
    EventDescriptor {
        /// Number of the queue.
        index: u8,
    },
    /// The message belongs to a protocol feature that was not offered.
    #[error("{0} is not offered")]
    NotOffered(&'static str),
}

impl From<HandlerError> for ProtocolError {
    fn from(error: HandlerError) -> Self {
        Self::ReqHandlerError(io::Error::other(error))
    }
}

/// Where the driver's kicks arrive.
#[derive(Debug, Default)]
enum Kick {
    /// SET_VRING_KICK has not come since the ring was stopped.
    #[default]
    Unset,
    /// It came without a descriptor: the ring is to be polled.
    Polled,
    /// It came with this descriptor.
    Fd(File),
}

/// Ring addresses in the front-end's address space.
#[derive(Debug, Clone, Copy)]
struct Addresses {
    desc: u64,
    avail: u64,
    used: u64,
    /// Guest-physical address of the used ring, with VHOST_VRING_F_LOG.
    log: Option<u64>,
}

/// What the front-end said about one ring.
#[derive(Debug, Default)]
struct RingState {
    size: u16,
    addresses: Option<Addresses>,
    /// Where it goes on when it is stopped, as VHOST_USER_SET_VRING_BASE puts it; `None` if it is fresh.
    base: Option<u32>,
    enabled: bool,
    kick: Kick,
    call: Option<File>,
    err: Option<File>,
    /// A worker has it, and with it the three descriptors.
    running: bool,
    /// It runs, or ran until something else changed that it depends on.
    started: bool,
    /// How it began with this front-end, once it has: on a driver's way (`true`), which the device is yet to be told; or
    /// from the start, or the device was told.
    resumed: Option<bool>,
}

struct Worker {
    commands: CommandSender,
    thread: WorkerThread,
}

/// The device, its workers, and all that the present front-end has said.
pub(super) struct Handler<D> {
    device: D,
    workers: Vec<Worker>,
    rings: Vec<RingState>,
    memory: MemoryTable,
    /// What is written to guest memory is marked here, while that is wanted.
    dirty: Option<Arc<DirtyLog>>,
    /// `memory`, marking in `dirty`.
    logged: Option<Arc<Memory>>,
    /// Where requests in flight are noted, if the front-end wants it.
    notes: Option<Notes>,
    /// With VHOST_USER_F_PROTOCOL_FEATURES.
    acked_features: u64,
    acked_protocol: u64,
    /// Of the device's state.
    transfers: Transfers,
    /// Where the front-end takes requests of ours (VHOST_USER_SET_BACKEND_REQ_FD).
    requests: Option<UnixStream>,
    /// A front-end is connected.
    connected: Arc<AtomicBool>,
    /// Rings run, or will as soon as what was changed is there again.
    in_use: bool,
    /// The workers are to take no chains.
    paused: bool,
    /// For what front-ends can bring about as often as they like.
    log: LogLimit,
}

/// VHOST_USER_BACKEND_CONFIG_CHANGE_MSG: the configuration space changed.
const CONFIG_CHANGE: u32 = 2;

impl<D: Device> Handler<D> {
    /// Starts the device's workers.
    pub(super) fn new(mut device: D, placement: &Placement) -> Result<Self, HandlerError> {
        let mut workers = Vec::new();
        for number in 0..device.worker_count() {
            let (commands, receiver) = command_channel().map_err(|e| DeviceError::Worker {
                worker: number,
                source: e.into(),
            })?;
            let pinned = placement.pin(number)?;
            let thread = device.spawn_worker(number, receiver)?;
            drop(pinned);
            workers.push(Worker { commands, thread });
        }
        let rings = (0..device.queue_count())
            .map(|_| RingState::default())
            .collect();
        Ok(Self {
            device,
            workers,
            rings,
            memory: MemoryTable::default(),
            dirty: None,
            logged: None,
            notes: None,
            acked_features: 0,
            acked_protocol: 0,
            transfers: Transfers::default(),
            requests: None,
            connected: Arc::default(),
            in_use: false,
            paused: false,
            log: LogLimit::default(),
        })
    }

    /// What the device counts, and whether a front-end is connected.
    pub(super) fn observables(&self) -> (Arc<dyn Statistics>, Arc<AtomicBool>) {
        (self.device.statistics(), Arc::clone(&self.connected))
    }

    /// A front-end is there.
    pub(super) fn begin_session(&mut self) {
        self.connected.store(true, Ordering::Relaxed);
    }

    /// Answers what a client of the control socket asks for.
    pub(super) fn control(&mut self, request: &Request) -> Result<Reply, ApiError> {
        let value = match request {
            Request::Status => self.status(),
            Request::Resize(arguments) => {
                let arguments = arguments.unwrap_or_default();
                let changed = self.device.resize(arguments.size, arguments.shrink)?;
                self.configured(changed)
            }
            Request::Announce => {
                let changed = self.device.announce()?;
                self.configured(changed)
            }
            Request::Link(Link { state }) => {
                let changed = self.device.set_link(*state == LinkState::Up)?;
                self.configured(changed)
            }
            Request::Limits(changes) => self.device.limits(&changes.clone().unwrap_or_default())?,
            Request::Drain(_) => return self.drain(),
            Request::Resume => {
                // For those that can be drained.
                drop(self.device.drained()?);
                self.paused = false;
                self.tell_workers(|| Command::Resume)?;
                json!({})
            }
            // The end is for the caller to bring about; counters clients read without asking this thread; another program
            // is met by whoever has the sockets.
            Request::Quit | Request::Stats | Request::Metrics | Request::HandOver(_) => json!({}),
        };
        Ok(Reply::Done(value))
    }

    /// Tells the driver of a change, and the client whether there was one.
    fn configured(&mut self, changed: bool) -> Value {
        if changed {
            self.config_changed();
        }
        json!({ "changed": changed })
    }

    fn drain(&mut self) -> Result<Reply, ApiError> {
        let then = self.device.drained()?;
        let stays = std::mem::replace(&mut self.paused, true);
        let (done, idle) = mpsc::channel();
        self.tell_workers(|| Command::Pause { done: done.clone() })?;
        Ok(Reply::Drain {
            idle,
            workers: self.workers.len(),
            then,
            stays,
        })
    }

    fn tell_workers(&self, command: impl Fn() -> Command) -> Result<(), ApiError> {
        for (worker, found) in self.workers.iter().enumerate() {
            found
                .commands
                .send(command())
                .map_err(|source| HandlerError::WorkerLost { worker, source })
                .map_err(|error| ApiError::new(ErrorCode::Failed, &error))?;
        }
        Ok(())
    }

    fn status(&self) -> Value {
        let names = |features| feature_names(features, |bit| self.device.feature_name(bit));
        let packed = self.acked_features & (1 << VIRTIO_F_RING_PACKED) != 0;
        let queues = self.rings.iter().enumerate().map(|(index, ring)| {
            json!({
                "index": index,
                "size": ring.size,
                "enabled": ring.enabled,
                "running": ring.running,
                "format": if packed { "packed" } else { "split" },
            })
        });
        let mut status = json!({
            "version": env!("CARGO_PKG_VERSION"),
            "pid": std::process::id(),
            "front-end": if self.connected.load(Ordering::Relaxed) { "connected" } else { "none" },
            "paused": self.paused,
            "inflight-tracking": self.notes.is_some(),
            "dirty-log": self.dirty.is_some() && self.acked_features & LOG_ALL != 0,
            "offered": names(self.device.features() | TRANSPORT_FEATURES),
            "features": names(self.acked_features),
            "queues": queues.collect::<Vec<_>>(),
        });
        if let Some(status) = status.as_object_mut() {
            status.append(&mut self.device.status());
        }
        status
    }

    /// Whether the front-end may send SET_BACKEND_REQ_FD.
    pub(super) fn takes_requests(&self) -> bool {
        self.acked_protocol & VhostUserProtocolFeatures::BACKEND_REQ.bits() != 0
    }

    /// Whether the front-end may send SET_LOG_FD.
    pub(super) fn takes_log(&self) -> bool {
        self.acked_protocol & VhostUserProtocolFeatures::LOG_SHMFD.bits() != 0
    }

    /// Whether the front-end may send SEND_RARP.
    pub(super) fn takes_rarp(&self) -> bool {
        self.acked_protocol & VhostUserProtocolFeatures::RARP.bits() != 0
    }

    /// VHOST_USER_SEND_RARP.
    pub(super) fn send_rarp(&mut self, mac: [u8; 6]) {
        self.device.send_rarp(mac);
    }

    /// The socket on which the front-end takes our requests.
    pub(super) fn set_requests(&mut self, socket: UnixStream) {
        self.requests = Some(socket);
    }

    /// Looks again at what the device is made of, and tells the driver if that changed its configuration.
    pub(super) fn refresh(&mut self) {
        match self.device.refresh() {
            Ok(false) => info!("the device is as it was"),
            Ok(true) => self.config_changed(),
            Err(error) => warn!("{}", Chain(&error)),
        }
    }

    /// The front-end takes notice of changes (VHOST_USER_BACKEND_CONFIG_CHANGE_MSG belongs to the protocol feature CONFIG).
    fn hears_changes(&self) -> bool {
        self.requests.is_some()
            && self.acked_protocol & VhostUserProtocolFeatures::CONFIG.bits() != 0
    }

    fn config_changed(&mut self) {
        let hears = self.hears_changes();
        let Some(socket) = self.requests.as_mut().filter(|_| hears) else {
            info!("configuration changed; the front-end, if any, takes no notice of that");
            return;
        };
        // Version 1, no reply wanted, no payload.
        let mut message = [0; 12];
        for (place, word) in message.chunks_exact_mut(4).zip([CONFIG_CHANGE, 1, 0]) {
            place.copy_from_slice(&word.to_ne_bytes());
        }
        match socket.write_all(&message) {
            Ok(()) => debug!("configuration changed, the front-end was told"),
            Err(error) => {
                if let Some(held_back) = self.log.check() {
                    warn!(
                        held_back,
                        "cannot tell the front-end that the configuration changed: {error}"
                    );
                }
                self.requests = None;
            }
        }
    }

    /// The limit of what is logged about front-ends.
    pub(super) fn log(&self) -> &LogLimit {
        &self.log
    }

    /// Whether the front-end may send SET_VRING_ENABLE: it accepted the protocol features as such, although
    /// maybe not yet by SET_FEATURES. QEMU enables rings in between.
    pub(super) fn enables_early(&self) -> bool {
        self.acked_protocol != 0 && self.acked_features & PROTOCOL_FEATURES == 0
    }

    /// REPLY_ACK was negotiated: a message that wants a reply gets one, whatever comes of it.
    pub(super) fn reply_ack(&self) -> bool {
        self.acked_protocol & VhostUserProtocolFeatures::REPLY_ACK.bits() != 0
    }

    /// The driver uses packed virtqueues.
    fn packed(&self) -> bool {
        self.acked_features & (1 << VIRTIO_F_RING_PACKED) != 0
    }

    /// The front-end is gone: stop all rings, and forget it.
    pub(super) fn end_session(&mut self) -> Result<(), HandlerError> {
        self.connected.store(false, Ordering::Relaxed);
        self.reset_rings()?;
        self.memory = MemoryTable::default();
        self.dirty = None;
        self.logged = None;
        self.notes = None;
        self.acked_features = 0;
        self.acked_protocol = 0;
        self.transfers.forget();
        self.requests = None;
        self.device.reset();
        Ok(())
    }

    /// Ends all workers.
    pub(super) fn shut_down(&mut self) {
        for worker in &self.workers {
            // A worker that is gone needs no command.
            let _ = worker.commands.send(Command::Exit);
        }
        for worker in self.workers.drain(..) {
            if worker.thread.join().is_err() {
                warn!("a worker thread panicked");
            }
        }
    }

    /// Guest memory was taken away while it was in use.
    pub(super) fn memory_gone(&self) -> bool {
        self.memory.torn()
            || self.notes.as_ref().is_some_and(Notes::torn)
            || self.dirty.as_ref().is_some_and(|dirty| dirty.torn())
    }

    /// How many memory regions a front-end may have.
    fn memory_slots(&self) -> usize {
        if self.device.shares_process() {
            MAX_SHARED
        } else {
            MAX_SLOTS
        }
    }

    /// Whether a file may be mapped that the front-end sends.
    fn check(&self, file: &File) -> Result<(), HandlerError> {
        if self.device.shares_process() {
            check_file_system(file)?;
        }
        Ok(())
    }

    fn queue(&self, index: u32) -> Result<u16, HandlerError> {
        u16::try_from(index)
            .ok()
            .filter(|&i| usize::from(i) < self.rings.len())
            .ok_or(HandlerError::NoQueue {
                index,
                count: self.rings.len(),
            })
    }

    fn state(&mut self, index: u16) -> Result<&mut RingState, HandlerError> {
        let count = self.rings.len();
        self.rings
            .get_mut(usize::from(index))
            .ok_or(HandlerError::NoQueue {
                index: index.into(),
                count,
            })
    }

    fn worker(&self, index: u16) -> Result<(usize, &Worker), HandlerError> {
        let number = self.device.worker_of(index);
        self.workers
            .get(number)
            .map(|worker| (number, worker))
            .ok_or_else(|| HandlerError::WorkerLost {
                worker: number,
                source: io::ErrorKind::NotFound.into(),
            })
    }

    /// Stops a ring if it runs, changes it, and starts it again, or for the first time, if it then can run.
    fn change(
        &mut self,
        index: u32,
        change: impl FnOnce(&mut RingState),
    ) -> Result<(), HandlerError> {
        let index = self.queue(index)?;
        self.stop(index)?;
        change(self.state(index)?);
        self.start(index)
    }

    /// The same for something that all rings depend on. Rings that could not run before may run now: a region of memory is
    /// changed by taking it away and adding it again.
    fn change_all(&mut self, change: impl FnOnce(&mut Self)) -> Result<(), HandlerError> {
        let indices = 0..self.device.queue_count();
        for index in indices.clone() {
            self.stop(index)?;
        }
        change(self);
        for index in indices {
            match self.start(index) {
                Ok(()) => {}
                Err(error @ HandlerError::WorkerLost { .. }) => return Err(error),
                Err(HandlerError::Address { addr, .. }) => {
                    if let Some(held_back) = self.log.check() {
                        let held_back = Some(held_back).filter(|&count| count > 0);
                        info!(
                            queue = index,
                            held_back, "ring waits for its memory at {addr:#x}"
                        );
                    }
                }
                // A ring that no longer works is its own misfortune.
                Err(error) => {
                    if let Some(held_back) = self.log.check() {
                        let error = Chain(&error);
                        warn!(queue = index, held_back, "ring stays stopped: {error}");
                    }
                    if let Some(err) = &self.state(index)?.err {
                        signal_error(err);
                    }
                }
            }
        }
        Ok(())
    }

    /// Changes what a ring begins with; one that has been started is stopped until the next SET_VRING_KICK.
    fn set_up(
        &mut self,
        index: u32,
        change: impl FnOnce(&mut RingState),
    ) -> Result<(), HandlerError> {
        let queue = self.queue(index)?;
        if self.state(queue)?.started {
            self.halt(queue)?;
        }
        self.change(index, change)
    }

    /// Stops a ring; it starts again with the next SET_VRING_KICK.
    fn halt(&mut self, index: u16) -> Result<(), HandlerError> {
        self.stop(index)?;
        self.halted(index)
    }

    /// A ring was taken back, and is not to start by itself.
    fn halted(&mut self, index: u16) -> Result<(), HandlerError> {
        let state = self.state(index)?;
        state.kick = Kick::Unset;
        state.started = false;
        self.look_at_use();
        Ok(())
    }

    /// VHOST_USER_GET_VRING_BASE_SKIP_DRAIN: stops a ring, and leaves requests in flight. Returns its base.
    pub(super) fn vring_base_skip_drain(&mut self, index: u32) -> Result<u32, HandlerError> {
        if self.acked_protocol & SKIP_DRAIN.bits() == 0 {
            return Err(HandlerError::NotOffered("GET_VRING_BASE_SKIP_DRAIN"));
        }
        let queue = self.queue(index)?;
        self.take_back(queue, self.notes.is_some())?;
        self.halted(queue)?;
        self.last_base(queue)
    }

    /// Where the next back-end goes on with a ring that was stopped.
    fn last_base(&mut self, queue: u16) -> Result<u32, HandlerError> {
        let fresh = u32::from(RingConfig::fresh_index(self.packed()));
        let ring = self.state(queue)?;
        ring.call = None;
        Ok(ring.base.unwrap_or(fresh | fresh << 16))
    }

    /// Tells the device if it is not in use any more.
    fn look_at_use(&mut self) {
        if self.in_use && !self.rings.iter().any(|ring| ring.started) {
            self.in_use = false;
            self.device.end_use();
        }
    }

    fn running(&self) -> impl Iterator<Item = u16> + '_ {
        (0_u16..)
            .zip(&self.rings)
            .filter_map(|(index, ring)| ring.running.then_some(index))
    }

    /// Gives a ring to its worker, if the front-end has said all that is needed.
    fn start(&mut self, index: u16) -> Result<(), HandlerError> {
        let features = self.acked_features;
        let state = self.state(index)?;
        let (Some(user), false, false) = (
            state.addresses,
            state.running,
            matches!(state.kick, Kick::Unset),
        ) else {
            return Ok(());
        };
        if state.size == 0 {
            return Ok(());
        }
        let (size, base) = (state.size, state.base);
        let has = |feature: u32| features & (1 << feature) != 0;
        let packed = has(VIRTIO_F_RING_PACKED);
        let translate = |addr| {
            self.memory
                .guest_address(addr)
                .ok_or(HandlerError::Address { index, addr })
        };
        let used_ring = translate(user.used)?;
        if let Some(log) = user.log.filter(|&log| log != used_ring.0) {
            let used = used_ring.0;
            return Err(HandlerError::LogAddress { index, log, used });
        }
        let wanted = features & LOG_ALL != 0 || user.log.is_some();
        let logged = self.logged.as_ref().filter(|_| wanted);
        let memory = Arc::clone(logged.unwrap_or(self.memory.memory()));
        let (next_avail, next_used) = match base {
            None => {
                let fresh = RingConfig::fresh_index(packed);
                (
                    fresh,
                    (!packed).then(|| used_index(&memory, used_ring)).flatten(),
                )
            }
            Some(base) if packed => packed_indices(base),
            Some(base) => {
                let index = split_index(index.into(), base)?;
                (index, used_index(&memory, used_ring))
            }
        };
        let config = RingConfig {
            size,
            desc_table: translate(user.desc)?,
            avail_ring: translate(user.avail)?,
            used_ring,
            packed,
            in_order: has(VIRTIO_F_IN_ORDER),
            event_idx: has(VIRTIO_RING_F_EVENT_IDX),
            indirect: has(VIRTIO_RING_F_INDIRECT_DESC),
            next_avail,
            next_used: next_used.unwrap_or(next_avail),
        };
        if !self.in_use {
            self.device.begin_use()?;
            self.in_use = true;
        }
        let ring = match &self.notes {
            Some(notes) => {
                DeviceRing::resume(&config, memory.as_ref(), notes.of(index, size, packed)?)
            }
            None => DeviceRing::new(&config, memory.as_ref()),
        };
        let ring = match ring {
            Ok(ring) => ring,
            Err(source) => {
                self.look_at_use();
                return Err(HandlerError::Ring { index, source });
            }
        };
        let begun = ring.has_begun();
        let state = self.state(index)?;
        let vring = Vring {
            index,
            ring,
            memory,
            kick: match std::mem::replace(&mut state.kick, Kick::Polled) {
                Kick::Fd(file) => Some(file),
                Kick::Unset | Kick::Polled => None,
            },
            call: state.call.take(),
            err: state.err.take(),
            features: features & !TRANSPORT_FEATURES,
            enabled: state.enabled,
        };
        state.running = true;
        state.started = true;
        let resumed = state.resumed.get_or_insert(begun);
        let tell = *resumed && vring.enabled;
        if tell {
            *resumed = false;
        }
        debug!(
            queue = index,
            size,
            packed,
            next_avail = vring.ring.next_avail(),
            next_used = vring.ring.next_used(),
            unserved = vring.ring.unserved(),
            enabled = vring.enabled,
            "ring starts"
        );
        let (worker, found) = self.worker(index)?;
        found
            .commands
            .send(Command::Start(Box::new(vring)))
            .map_err(|source| HandlerError::WorkerLost { worker, source })?;
        if tell && self.hears_changes() && self.device.resumed(index) {
            self.config_changed();
        }
        Ok(())
    }

    /// Takes a ring back from its worker, which first finishes what is in flight.
    fn stop(&mut self, index: u16) -> Result<(), HandlerError> {
        self.take_back(index, false)
    }

    /// Takes a ring back from its worker. To `suspend` is to leave in flight what need not be waited for.
    fn take_back(&mut self, index: u16, suspend: bool) -> Result<(), HandlerError> {
        if !self.state(index)?.running {
            return Ok(());
        }
        let (worker, found) = self.worker(index)?;
        let lost = |source| HandlerError::WorkerLost { worker, source };
        let (done, given_back) = mpsc::channel();
        found
            .commands
            .send(Command::Stop {
                index,
                suspend,
                done,
            })
            .map_err(lost)?;
        let mut warned = false;
        let vring = loop {
            match given_back.recv_timeout(STOP_PATIENCE) {
                Ok(vring) => break vring,
                Err(RecvTimeoutError::Disconnected) => {
                    return Err(lost(io::ErrorKind::BrokenPipe.into()));
                }
                Err(RecvTimeoutError::Timeout) => {
                    // The storage may be slow. Or the peer made an eventfd that it handed us block.
                    if !warned {
                        warned = true;
                        if let Some(held_back) = self.log.check() {
                            warn!(
                                queue = index,
                                held_back, "waiting for requests in flight to finish"
                            );
                        }
                    }
                    if let WorkerThread::Own(thread) = &found.thread
                        && let Err(error) = thread.kill(wake_signal())
                    {
                        return Err(lost(error.into()));
                    }
                }
            }
        };
        let packed = vring.features & (1 << VIRTIO_F_RING_PACKED) != 0;
        let base = base(&vring.ring, packed);
        let state = self.state(index)?;
        state.running = false;
        state.base = Some(base);
        state.kick = vring.kick.map_or(Kick::Polled, Kick::Fd);
        state.call = vring.call;
        state.err = vring.err;
        debug!(
            queue = index,
            base = format_args!("{base:#x}"),
            "ring stopped"
        );
        Ok(())
    }

    /// All rings stopped, disabled, and as if never set up.
    fn reset_rings(&mut self) -> Result<(), HandlerError> {
        let running: Vec<u16> = self.running().collect();
        for index in running {
            self.stop(index)?;
        }
        for ring in &mut self.rings {
            *ring = RingState::default();
        }
        self.look_at_use();
        Ok(())
    }

    fn set_memory(&mut self, memory: Result<MemoryTable, MemoryError>) -> ProtocolResult<()> {
        let memory = memory.map_err(HandlerError::from)?;
        let logged = match &self.dirty {
            Some(dirty) => Some(memory.logged(dirty).map_err(HandlerError::from)?),
            None => None,
        };
        Ok(self.change_all(|handler| {
            handler.memory = memory;
            handler.logged = logged;
        })?)
    }

    /// VHOST_USER_SET_VRING_ENABLE, also when it comes early.
    pub(super) fn enable(&mut self, index: u32, enable: bool) -> Result<(), HandlerError> {
        let queue = self.queue(index)?;
        if self.state(queue)?.enabled == enable {
            return Ok(());
        }
        debug!(queue, enable, "ring enabled or disabled");
        self.change(index, |ring| ring.enabled = enable)
    }

    /// How many queues of which size are to be tracked.
    fn tracked(&self, inflight: &VhostUserInflight) -> Result<(u16, u16), HandlerError> {
        // `vhost` goes by what the front-end accepted last, be it refused.
        if self.acked_protocol & VhostUserProtocolFeatures::INFLIGHT_SHMFD.bits() == 0 {
            return Err(HandlerError::NotOffered("INFLIGHT_SHMFD"));
        }
        let (queues, size) = (inflight.num_queues, inflight.queue_size);
        let (count, max) = (self.device.queue_count(), self.max_queue_size());
        if queues == 0 || queues > count || size == 0 || size > max {
            let shape = InflightError::Shape {
                queues,
                size,
                count,
                max,
            };
            return Err(shape.into());
        }
        Ok((queues, size))
    }

    /// The largest queue size that is served.
    fn max_queue_size(&self) -> u16 {
        self.device.max_queue_size().min(MAX_QUEUE_SIZE)
    }

    /// The `vhost` crate tells the front-end that it failed, and nobody else why.
    fn transfer_failed(&self, error: HandlerError) -> ProtocolError {
        if let Some(held_back) = self.log.check() {
            warn!(held_back, "device state: {}", Chain(&error));
        }
        error.into()
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
            | VhostUserProtocolFeatures::RESET_DEVICE
            | VhostUserProtocolFeatures::BACKEND_REQ
            | VhostUserProtocolFeatures::LOG_SHMFD
            | VhostUserProtocolFeatures::DEVICE_STATE
            | self.device.protocol_features()
            | self.of_notes()
    }

    /// What a device can that has its requests in flight noted.
    fn of_notes(&self) -> VhostUserProtocolFeatures {
        let noted = VhostUserProtocolFeatures::INFLIGHT_SHMFD;
        match self.device.protocol_features().contains(noted) {
            true => VhostUserProtocolFeatures::GET_VRING_BASE_INFLIGHT | SKIP_DRAIN,
            false => VhostUserProtocolFeatures::empty(),
        }
    }
}

/// VHOST_USER_PROTOCOL_F_GET_VRING_BASE_SKIP_DRAIN, which the `vhost` crate does not know.
const SKIP_DRAIN: VhostUserProtocolFeatures = VhostUserProtocolFeatures::from_bits_retain(1 << 23);

/// The base of a split virtqueue: the available index.
fn split_index(index: u32, base: u32) -> Result<u16, HandlerError> {
    u16::try_from(base).map_err(|_| HandlerError::Base { index, base })
}

/// The base of a packed virtqueue: in the low half the place of the next descriptor to take, in the high half that of the
/// next used one, each with its wrap counter in the top bit. Front-ends that know the low half only leave the other
/// 0; with nothing in flight both are the same.
fn packed_indices(base: u32) -> (u16, Option<u16>) {
    let [a0, a1, u0, u1] = base.to_le_bytes();
    let (avail, used) = (u16::from_le_bytes([a0, a1]), u16::from_le_bytes([u0, u1]));
    (avail, (used != 0).then_some(used))
}

/// What VHOST_USER_GET_VRING_BASE answers.
fn base(ring: &DeviceRing, packed: bool) -> u32 {
    let used = if packed { ring.next_used() } else { 0 };
    u32::from(ring.next_avail()) | u32::from(used) << 16
}

/// The used index as it stands in guest memory (VIRTIO 1.3, 2.7.8): vhost-user does not send it.
fn used_index(memory: &super::Memory, used_ring: GuestAddress) -> Option<u16> {
    let at = GuestAddress(used_ring.0.checked_add(2)?);
    memory
        .load::<u16>(at, Ordering::Acquire)
        .ok()
        .map(u16::from_le)
}

/// Lets pass what events can come through: an eventfd, whose inode has no type, or a pipe.
fn event_descriptor(index: u8, fd: Option<File>) -> Result<Option<File>, HandlerError> {
    descriptor(index, fd, |_, kind| matches!(kind, 0 | libc::S_IFIFO))
}

/// The same for what is waited on. Others than eventfds have inodes without a type, too: epoll and timer descriptors, which
/// a front-end can have ready for ever at no cost of its own. Only to an eventfd can 0 be added.
fn kick_descriptor(index: u8, fd: Option<File>) -> Result<Option<File>, HandlerError> {
    descriptor(index, fd, |mut file, kind| match kind {
        0 => file.write(&0_u64.to_ne_bytes()).is_ok(),
        kind => kind == libc::S_IFIFO,
    })
}

/// Lets pass a descriptor, if there is one, that suits, by the type of its inode.
fn descriptor(
    index: u8,
    fd: Option<File>,
    suits: impl Fn(&File, u32) -> bool,
) -> Result<Option<File>, HandlerError> {
    let Some(file) = fd else { return Ok(None) };
    match fstat(&file).map(|stat| stat.st_mode & libc::S_IFMT) {
        Ok(kind) if suits(&file, kind) => Ok(Some(file)),
        _ => Err(HandlerError::EventDescriptor { index }),
    }
}

fn signal_error(mut err: &File) {
    // The peer owns the other end; there is nobody else to tell.
    let _ = err.write(&1_u64.to_ne_bytes());
}

impl<D: Device> VhostUserBackendReqHandlerMut for Handler<D> {
    fn set_owner(&mut self) -> ProtocolResult<()> {
        Ok(())
    }

    /// Deprecated; the specification lets it disable all rings. Front-ends that still send it do so when the driver
    /// resets its device, and its rings may not be touched any more.
    fn reset_owner(&mut self) -> ProtocolResult<()> {
        for index in 0..self.device.queue_count() {
            self.halt(index)?;
            self.state(index)?.enabled = false;
        }
        Ok(())
    }

    fn reset_device(&mut self) -> ProtocolResult<()> {
        self.reset_rings()?;
        if let Some(notes) = &self.notes {
            notes.clear();
        }
        self.device.reset();
        // What was negotiated holds until the front-end negotiates again.
        self.device
            .set_features(self.acked_features & !TRANSPORT_FEATURES);
        debug!("device reset by the front-end");
        Ok(())
    }

    fn get_features(&mut self) -> ProtocolResult<u64> {
        Ok(self.device.features() | TRANSPORT_FEATURES)
    }

    fn set_features(&mut self, features: u64) -> ProtocolResult<()> {
        let unknown = features & !(self.device.features() | TRANSPORT_FEATURES);
        if unknown != 0 {
            return Err(HandlerError::Features { unknown }.into());
        }
        self.change_all(|handler| {
            let before = std::mem::replace(&mut handler.acked_features, features);
            if before & !features & LOG_ALL != 0 {
                handler.dirty = None;
                handler.logged = None;
            }
            // The driver set nothing anew if it is only the log that begins or ends.
            if before ^ features != LOG_ALL {
                handler.device.set_features(features & !TRANSPORT_FEATURES);
            }
            if features & PROTOCOL_FEATURES == 0 {
                // Without SET_VRING_ENABLE, rings begin enabled.
                for ring in &mut handler.rings {
                    ring.enabled = true;
                }
            }
        })?;
        debug!(
            features = format_args!("{features:#x}"),
            "features accepted"
        );
        Ok(())
    }

    fn set_mem_table(
        &mut self,
        regions: &[VhostUserMemoryRegion],
        files: Vec<File>,
        _postcopy_listening: Option<bool>,
    ) -> ProtocolResult<Option<Vec<u64>>> {
        files.iter().try_for_each(|file| self.check(file))?;
        self.set_memory(MemoryTable::new(regions, files, self.memory_slots()))?;
        Ok(None)
    }

    fn set_vring_num(&mut self, index: u32, num: u32) -> ProtocolResult<()> {
        let max = self.max_queue_size();
        let packed = self.packed();
        let size = u16::try_from(num)
            .ok()
            .filter(|size| (size.is_power_of_two() || packed && *size > 0) && *size <= max)
            .ok_or(HandlerError::QueueSize {
                index,
                size: num,
                max,
            })?;
        Ok(self.set_up(index, |ring| ring.size = size)?)
    }

    fn set_vring_addr(
        &mut self,
        index: u32,
        flags: VhostUserVringAddrFlags,
        descriptor: u64,
        used: u64,
        available: u64,
        log: u64,
    ) -> ProtocolResult<()> {
        let is_logged = flags.contains(VhostUserVringAddrFlags::VHOST_VRING_F_LOG);
        Ok(self.change(index, |ring| {
            ring.addresses = Some(Addresses {
                desc: descriptor,
                avail: available,
                used,
                log: is_logged.then_some(log),
            });
        })?)
    }

    fn set_vring_base(&mut self, index: u32, base: u32) -> ProtocolResult<()> {
        if !self.packed() {
            split_index(index, base)?;
        }
        Ok(self.set_up(index, |ring| ring.base = Some(base))?)
    }

    fn get_vring_base(&mut self, index: u32) -> ProtocolResult<VhostUserVringState> {
        let queue = self.queue(index)?;
        self.halt(queue)?;
        Ok(VhostUserVringState::new(index, self.last_base(queue)?))
    }

    fn set_vring_kick(&mut self, index: u8, fd: Option<File>) -> ProtocolResult<()> {
        let kick = kick_descriptor(index, fd)?.map_or(Kick::Polled, Kick::Fd);
        Ok(self.change(index.into(), |ring| ring.kick = kick)?)
    }

    fn set_vring_call(&mut self, index: u8, fd: Option<File>) -> ProtocolResult<()> {
        let call = event_descriptor(index, fd)?;
        Ok(self.change(index.into(), |ring| ring.call = call)?)
    }

    fn set_vring_err(&mut self, index: u8, fd: Option<File>) -> ProtocolResult<()> {
        let err = event_descriptor(index, fd)?;
        Ok(self.change(index.into(), |ring| ring.err = err)?)
    }

    fn get_protocol_features(&mut self) -> ProtocolResult<VhostUserProtocolFeatures> {
        Ok(self.protocol_features())
    }

    fn set_protocol_features(&mut self, features: u64) -> ProtocolResult<()> {
        let unknown = features & !self.protocol_features().bits();
        if unknown != 0 {
            return Err(HandlerError::Features { unknown }.into());
        }
        self.acked_protocol = features;
        Ok(())
    }

    fn get_queue_num(&mut self) -> ProtocolResult<u64> {
        Ok(self.device.queue_count().into())
    }

    fn set_vring_enable(&mut self, index: u32, enable: bool) -> ProtocolResult<()> {
        Ok(self.enable(index, enable)?)
    }

    fn get_config(
        &mut self,
        offset: u32,
        size: u32,
        _flags: VhostUserConfigFlags,
    ) -> ProtocolResult<Vec<u8>> {
        Ok(self
            .device
            .read_config(offset, size)
            .map_err(HandlerError::from)?)
    }

    fn set_config(
        &mut self,
        offset: u32,
        buf: &[u8],
        _flags: VhostUserConfigFlags,
    ) -> ProtocolResult<()> {
        Ok(self
            .device
            .write_config(offset, buf)
            .map_err(HandlerError::from)?)
    }

    fn get_max_mem_slots(&mut self) -> ProtocolResult<u64> {
        Ok(u64::try_from(self.memory_slots()).unwrap_or(u64::MAX))
    }

    fn add_mem_region(
        &mut self,
        region: &VhostUserSingleMemoryRegion,
        fd: File,
        _postcopy_listening: Option<bool>,
    ) -> ProtocolResult<Option<u64>> {
        self.check(&fd)?;
        self.set_memory(self.memory.with(region, fd, self.memory_slots()))?;
        Ok(None)
    }

    fn remove_mem_region(&mut self, region: &VhostUserSingleMemoryRegion) -> ProtocolResult<()> {
        self.set_memory(self.memory.without(region))
    }

    fn get_inflight_fd(
        &mut self,
        inflight: &VhostUserInflight,
    ) -> ProtocolResult<(VhostUserInflight, File)> {
        let (queues, size) = self.tracked(inflight)?;
        Ok(inflight::create(queues, size, self.max_queue_size()).map_err(HandlerError::from)?)
    }

    fn set_inflight_fd(&mut self, inflight: &VhostUserInflight, file: File) -> ProtocolResult<()> {
        self.tracked(inflight)?;
        let notes = Notes::map(inflight, file).map_err(HandlerError::from)?;
        debug!(
            queues = inflight.num_queues,
            size = inflight.queue_size,
            "requests in flight are noted from now on"
        );
        Ok(self.change_all(|handler| handler.notes = Some(notes))?)
    }

    fn set_log_base(&mut self, log: &VhostUserLog, file: File) -> ProtocolResult<()> {
        self.check(&file)?;
        let dirty = Arc::new(DirtyLog::map(log, file).map_err(HandlerError::from)?);
        let logged = self.memory.logged(&dirty).map_err(HandlerError::from)?;
        debug!(
            covered = format_args!("{:#x}", dirty.covered()),
            "dirty log in place"
        );
        Ok(self.change_all(|handler| {
            handler.dirty = Some(dirty);
            handler.logged = Some(logged);
        })?)
    }

    /// The device is as it is at this moment: its rings are stopped. Its transfer takes as long as it takes, and the
    /// front-end asks by CHECK_DEVICE_STATE what came of it.
    fn set_device_state_fd(
        &mut self,
        direction: VhostTransferStateDirection,
        _phase: VhostTransferStatePhase,
        fd: File,
    ) -> ProtocolResult<Option<File>> {
        let begin = || -> Result<(), HandlerError> {
            if self.running().next().is_some() {
                return Err(StateError::Running.into());
            }
            match direction {
                VhostTransferStateDirection::SAVE => {
                    self.transfers.save(fd, self.device.save()?)?;
                }
                VhostTransferStateDirection::LOAD => self.transfers.load(fd)?,
            }
            Ok(())
        };
        begin().map_err(|error| self.transfer_failed(error))?;
        Ok(None)
    }

    fn check_device_state(&mut self) -> ProtocolResult<()> {
        let mut check = || -> Result<(), HandlerError> {
            let Some(state) = self.transfers.check()? else {
                return Ok(());
            };
            if self.running().next().is_some() {
                return Err(StateError::Running.into());
            }
            Ok(self.device.load(&state)?)
        };
        check().map_err(|error| self.transfer_failed(error))?;
        debug!("the device's state was moved");
        Ok(())
    }

    // The rest belongs to protocol features that are not offered.

    fn set_gpu_socket(&mut self, _gpu_backend: GpuBackend) -> ProtocolResult<()> {
        Err(HandlerError::NotOffered("a GPU socket").into())
    }

    fn get_shared_object(&mut self, _uuid: VhostUserSharedMsg) -> ProtocolResult<File> {
        Err(HandlerError::NotOffered("SHARED_OBJECT").into())
    }

    fn get_shmem_config(&mut self) -> ProtocolResult<VhostUserShMemConfig> {
        Err(HandlerError::NotOffered("SHMEM").into())
    }
}

//! The block device: a disk image or a block device, served over vhost-user (VIRTIO 1.3, 5.2).
//!
//! ```text
//!  virtqueue ──▶ request.rs ──▶ worker.rs ──▶ uring.rs ──▶ disk.rs' file
//!  (rings)       what is asked,  one thread    io_uring on    opened, examined,
//!                is it valid?    for a queue   guest memory   locked
//!                                   │
//!                                   ├────────▶ image/: what an image needs besides
//!                                   └────────▶ offload.rs ──▶ device/: what a block device does by ioctl
//! ```
//!
//! `limits.rs` says when a request may begin, `stats.rs` counts what became of it; the control socket reads and changes them
//! while the workers go on.

mod args;
mod config;
mod confine;
mod device;
mod disk;
#[cfg(test)]
mod driven;
#[cfg(feature = "fuzzing")]
#[doc(hidden)]
pub mod fuzz;
mod image;
mod limits;
mod mailbox;
mod offload;
mod request;
mod resize;
mod stats;
mod uring;
mod worker;
mod zones;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use ringside_control::metrics::Kind;
use ringside_control::{ApiError, ErrorCode, Metrics, Size};
use ringside_sandbox::{Profile, ThreadKind, narrow};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use tracing::{info, warn};
use vhost::vhost_user::VhostUserProtocolFeatures;

use crate::shell::{
    Chain, Commands, Device, DeviceError, Drained, LogLimit, Parts, PollLimits, StateError,
    Statistics, WorkerThread, config_range, open_state, seal_state,
};

pub use args::{ArgsError, BlkArgs};
pub use config::{Geometry, ZoneGeometry};
pub use disk::{Disk, DiskError, DiskOptions, Format, Lock, Ranges, Source, Taken};
pub use image::{
    HandshakeError, HeaderError, Image, LoadError, NameError, Nbd, NbdError, Qcow2Error, Rbd,
    RbdError, UriError,
};
pub use limits::{LimitError, RateLimits};

use config::feature;
use limits::Throttle;
use request::{ID_LEN, Limits};
use resize::ResizeError;
use stats::{Clock, QueueStats};
use worker::{Shared, Worker};

/// Of the device, in its state.
const KIND: &str = "block";
/// Version of [`BlkState`].
const STATE_VERSION: u32 = 1;

/// What a driver has set: see [`Device::save`].
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct BlkState {
    /// `wce` (VIRTIO 1.3, 5.2.4).
    writeback: bool,
}

/// Most data segments in a request: with header and status it fits a queue of 128, which is QEMU's default.
const SEG_MAX: u16 = 126;

/// What the device is like, checked: made from [`BlkArgs`].
#[derive(Debug)]
pub struct BlkConfig {
    /// The disk; `None` answers all requests at once and moves no data, to measure the rest.
    pub disk: Option<Disk>,
    /// It is that of another program, whose place this one takes.
    pub taken: bool,
    /// When it is locked.
    pub lock: Lock,
    /// What the driver is told.
    pub geometry: Geometry,
    /// The driver may not write.
    pub read_only: bool,
    /// The cache is writeback until the driver says otherwise.
    pub writeback: bool,
    /// What VIRTIO_BLK_T_GET_ID returns, padded with zeroes.
    pub serial: [u8; ID_LEN],
    /// The largest queue size, a power of two.
    pub max_queue_size: u16,
    /// Pin guest memory and register it with io_uring.
    pub register_memory: bool,
    /// Look for completions in the storage's queues, without its interrupts.
    pub io_poll: bool,
    /// Longest time that a worker without requests spins for before it sleeps.
    pub poll: Duration,
    /// Longest time that a worker spins for while the storage works.
    pub poll_storage: Duration,
    /// Most that spinning in vain may take of a worker's time, in percent.
    pub poll_budget: u32,
    /// Packed virtqueues are offered.
    pub packed: bool,
    /// Use in order is offered.
    pub in_order: bool,
    /// Limits of its rates.
    pub limits: RateLimits,
}

/// The block device.
#[derive(Debug)]
pub struct Blk {
    geometry: Geometry,
    features: u64,
    max_queue_size: u16,
    default_writeback: bool,
    path: Option<PathBuf>,
    source: Option<Source>,
    lock: Lock,
    /// Its lock is another program's, too, and stays when this one ends.
    taken: bool,
    /// By queue.
    stats: Vec<Arc<QueueStats>>,
    shared: Shared,
    limit: LogLimit,
}

impl Blk {
    /// A device that has no front-end yet.
    #[must_use]
    pub fn new(config: BlkConfig) -> Self {
        let BlkConfig {
            disk,
            taken,
            lock,
            geometry,
            read_only,
            writeback,
            serial,
            max_queue_size,
            limits,
            register_memory,
            io_poll,
            poll,
            poll_storage,
            poll_budget,
            packed,
            in_order,
        } = config;
        let throttle = Throttle::default();
        throttle.set(limits);
        let poll_limits = |window| PollLimits {
            window,
            budget: poll_budget,
        };
        let mut features = feature::VERSION_1
            | feature::EVENT_IDX
            | feature::INDIRECT_DESC
            | feature::SEG_MAX
            | feature::BLK_SIZE
            | feature::TOPOLOGY
            | feature::FLUSH
            | feature::CONFIG_WCE;
        if read_only {
            features |= feature::RO;
        }
        if geometry.queues > 1 {
            features |= feature::MQ;
        }
        if geometry.max_discard > 0 {
            features |= feature::DISCARD;
        }
        if geometry.max_write_zeroes > 0 {
            features |= feature::WRITE_ZEROES;
        }
        if geometry.max_secure_erase > 0 {
            features |= feature::SECURE_ERASE;
        }
        if geometry.zones.is_some() {
            features |= feature::ZONED;
        }
        if packed {
            features |= feature::RING_PACKED;
        }
        if in_order {
            features |= feature::IN_ORDER;
        }
        let align = disk.as_ref().map_or(1, |d| d.align);
        let device = disk.as_ref().and_then(|d| d.device.clone());
        let zones = disk.as_ref().and_then(|d| d.zones.as_ref());
        let zones = zones.map(|(zones, _)| Arc::clone(zones));
        if let (Some(zones), Some(geometry)) = (&zones, &geometry.zones) {
            info!(
                zones = zones.count(),
                size = geometry.size,
                "the disk is zoned"
            );
        }
        let memory_align = disk.as_ref().map_or(1, |d| d.memory_align);
        let (path, source) = disk.map(|d| (d.path, d.source)).unzip();
        Self {
            geometry,
            features,
            max_queue_size,
            default_writeback: writeback,
            path,
            stats: (0..geometry.queues).map(|_| Arc::default()).collect(),
            shared: Shared {
                clock: Clock,
                throttle: Arc::new(throttle),
                limits: Limits {
                    capacity: geometry.capacity,
                    read_only,
                    // Until a driver says what it accepts.
                    flush: false,
                    max_discard: geometry.max_discard,
                    max_write_zeroes: geometry.max_write_zeroes,
                    max_secure_erase: geometry.max_secure_erase,
                    zoned: false,
                    max_append: geometry.zones.map_or(0, |zones| zones.max_append),
                    align: u64::from(align),
                },
                files: source.as_ref().map(Source::files).unwrap_or_default(),
                device,
                offload: Arc::default(),
                zones,
                memory_align,
                registers: register_memory,
                polls: io_poll,
                poll: poll_limits(poll),
                poll_storage: poll_limits(poll_storage),
                serial,
                writeback: Arc::new(AtomicBool::new(writeback)),
                capacity: Arc::new(AtomicU64::new(geometry.capacity)),
            },
            limit: LogLimit::default(),
            source,
            lock,
            taken,
        }
    }
}

impl Blk {
    /// The disk has this size from now on. Returns whether it had another.
    fn set_capacity(&mut self, capacity: u64) -> bool {
        let before = std::mem::replace(&mut self.geometry.capacity, capacity);
        // Relaxed: a request that comes before a worker sees it is judged by the old size.
        self.shared.capacity.store(capacity, Ordering::Relaxed);
        if before != capacity {
            info!(before, now = capacity, "the disk has a new size");
        }
        before != capacity
    }
}

impl Drop for Blk {
    fn drop(&mut self) {
        // An image gives back its locks when it has written everything.
        match &mut self.source {
            Some(Source::Raw(disk)) if !self.taken => disk::unlock(disk),
            Some(Source::Qcow2(image)) if self.taken => image.keep_locks(),
            _ => {}
        }
    }
}

impl Device for Blk {
    fn features(&self) -> u64 {
        self.features
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::INFLIGHT_SHMFD
    }

    fn queue_count(&self) -> u16 {
        self.geometry.queues
    }

    fn max_queue_size(&self) -> u16 {
        self.max_queue_size
    }

    fn read_config(&self, offset: u32, len: u32) -> Result<Vec<u8>, DeviceError> {
        let writeback = self.shared.writeback.load(Ordering::Relaxed);
        config_range(&config::encode(&self.geometry, writeback), offset, len)
    }

    fn write_config(&mut self, offset: u32, data: &[u8]) -> Result<(), DeviceError> {
        let writeback = config::write(offset, data)?;
        // A worker sees it with its next turn; what was written before is for the driver to flush.
        self.shared.writeback.store(writeback, Ordering::Relaxed);
        Ok(())
    }

    fn set_features(&mut self, acked: u64) {
        // Each ring carries what was accepted; nothing is common to all of them. The reset of a device that nobody
        // drives accepts nothing.
        if self.features & !acked & feature::ZONED != 0
            && acked & feature::VERSION_1 != 0
            && let Some(held_back) = self.limit.check()
        {
            warn!(
                held_back,
                "the driver or the VMM does not know zoned disks: writes that are not at a zone's write pointer will fail"
            );
        }
    }

    fn worker_count(&self) -> usize {
        usize::from(self.geometry.queues)
    }

    fn begin_use(&mut self) -> Result<(), DeviceError> {
        if let (Lock::Running, Some(path), Some(Source::Raw(file))) =
            (self.lock, &self.path, &self.source)
        {
            disk::lock(file, path, self.shared.limits.read_only, args::LOCK_WAIT)
                .map_err(|e| DeviceError::Use(Box::new(e)))?;
        }
        Ok(())
    }

    fn end_use(&mut self) {
        if let (Lock::Running, Some(Source::Raw(file))) = (self.lock, &self.source) {
            disk::unlock(file);
        }
    }

    fn worker_of(&self, queue: u16) -> usize {
        usize::from(queue)
    }

    fn spawn_worker(
        &mut self,
        worker: usize,
        commands: Commands,
    ) -> Result<WorkerThread, DeviceError> {
        let shared = self.shared.clone();
        let stats = self.stats.get(worker).cloned().unwrap_or_default();
        let (ready, started) = mpsc::channel();
        let failed = |source| DeviceError::Worker { worker, source };
        let side = match &mut self.source {
            Some(source) => source.attach().map_err(|e| failed(e.into()))?,
            None => None,
        };
        if let (0, Some(path), Some(Source::Raw(file))) = (worker, &self.path, &self.source)
            && disk::looks_like_qcow2(file)
        {
            warn!(
                "disk {} looks like a qcow2 image, and is served as it is; was --format qcow2 forgotten?",
                path.display()
            );
        }
        let thread = thread::Builder::new()
            .name(format!("blk-queue-{worker}"))
            // The io_uring belongs to the thread that makes it.
            .spawn(move || {
                let worker = Worker::new(shared, side, commands, stats);
                let worker = worker.map_err(|e| Box::new(UringError(e)).into());
                // From here on there is no other ring to be had.
                let worker =
                    worker.and_then(|worker| Ok(narrow(ThreadKind::Queue).map(|()| worker)?));
                match worker {
                    Ok(worker) => {
                        if ready.send(Ok(())).is_ok() {
                            worker.run();
                        }
                    }
                    Err(e) => {
                        // The receiver waits for it.
                        let _ = ready.send(Err(e));
                    }
                }
            })
            .map_err(|e| failed(e.into()))?;
        match started.recv() {
            Ok(Ok(())) => Ok(WorkerThread::Own(thread)),
            Ok(Err(e)) => Err(failed(e)),
            Err(e) => Err(failed(Box::new(e))),
        }
    }

    /// The disk may have another size now. Not so an image, which nobody else can change while it is locked; an export
    /// keeps the size that it had, and so do zones.
    fn refresh(&mut self) -> Result<bool, DeviceError> {
        let block = self.geometry.block_size;
        let capacity = match (&self.path, &self.source, &self.geometry.zones) {
            (Some(path), Some(Source::Raw(file)), None) => disk::capacity(file, path, block),
            (Some(path), Some(Source::Rbd(rbd)), _) => disk::size_of(rbd, path, block),
            _ => return Ok(false),
        };
        let capacity = capacity.map_err(|e| DeviceError::Refresh(Box::new(e)))?;
        Ok(self.set_capacity(capacity))
    }

    fn needs(&self, profile: &mut Profile) {
        confine::needs(self, profile);
    }

    fn statistics(&self) -> Arc<dyn Statistics> {
        Arc::new(BlkStatistics {
            queues: self.stats.clone(),
            capacity: Arc::clone(&self.shared.capacity),
            throttle: Arc::clone(&self.shared.throttle),
        })
    }

    fn status(&self) -> Map<String, Value> {
        let cache = match self.shared.writeback.load(Ordering::Relaxed) {
            true => "writeback",
            false => "writethrough",
        };
        Map::from_iter([
            ("device".to_owned(), "block".into()),
            (
                "disk".to_owned(),
                json!({
                    "path": self.path,
                    "size": self.geometry.capacity,
                    "block-size": self.geometry.block_size,
                    "read-only": self.shared.limits.read_only,
                    "cache": cache,
                }),
            ),
            ("limits".to_owned(), self.shared.throttle.limits().to_json()),
        ])
    }

    fn feature_name(&self, bit: u32) -> Option<&'static str> {
        config::feature_name(bit)
    }

    fn resize(&mut self, size: Option<Size>, shrink: bool) -> Result<bool, ApiError> {
        let Some(Size(size)) = size else {
            return self
                .refresh()
                .map_err(|error| ApiError::new(ErrorCode::Failed, &error));
        };
        resize::check(
            self.geometry.capacity,
            size,
            self.geometry.block_size,
            shrink,
        )?;
        if let (Some(path), Some(source)) = (&self.path, &self.source) {
            let path = path.clone();
            let read_only = self.shared.limits.read_only;
            match source {
                Source::Qcow2(_) | Source::Nbd(_) => {
                    return Err(ResizeError::NotRaw { path }.into());
                }
                _ if read_only => return Err(ResizeError::ReadOnly { path }.into()),
                Source::Raw(file) => resize::set_len(file, &path, size, shrink)?,
                Source::Rbd(rbd) => resize::set_size(rbd, &path, size, shrink)?,
            }
        }
        Ok(self.set_capacity(size))
    }

    fn limits(&mut self, changes: &BTreeMap<String, Size>) -> Result<Value, ApiError> {
        let limits = self
            .shared
            .throttle
            .limits()
            .with(changes)
            .map_err(|error| ApiError::new(ErrorCode::BadRequest, &error))?;
        self.shared.throttle.set(limits);
        Ok(limits.to_json())
    }

    fn drained(&self) -> Result<Drained, ApiError> {
        match &self.source {
            Some(source) => source
                .flush()
                .map_err(|error| ApiError::new(ErrorCode::Failed, &error)),
            None => Ok(Box::new(|| Ok(()))),
        }
    }

    fn save(&self) -> Result<Vec<u8>, StateError> {
        let writeback = self.shared.writeback.load(Ordering::Relaxed);
        seal_state(KIND, STATE_VERSION, &BlkState { writeback })
    }

    fn load(&mut self, state: &[u8]) -> Result<(), StateError> {
        let BlkState { writeback } = open_state(KIND, STATE_VERSION, state)?;
        self.shared.writeback.store(writeback, Ordering::Relaxed);
        Ok(())
    }

    /// A disk in files is those, open and with their locks; one on a server, the connections.
    fn parts(&self) -> Result<Parts, ApiError> {
        match &self.source {
            None => Ok(Parts::default()),
            Some(source) => source.parts(),
        }
    }

    fn leave(&mut self) -> Result<(), ApiError> {
        match &self.source {
            None => Ok(()),
            Some(source) => source
                .leave()
                .map_err(|error| ApiError::new(ErrorCode::Failed, &error)),
        }
    }

    fn settings(&self) -> Value {
        let (capacity, limits) = (self.geometry.capacity, self.shared.throttle.limits());
        let counters = self.stats.iter().map(|queue| queue.handed());
        json!({
            "capacity": capacity,
            "limits": limits.to_json(),
            "levels": self.shared.throttle.levels(),
            "counters": counters.collect::<Vec<_>>(),
        })
    }

    fn adopt(&mut self, settings: &Value) -> Result<(), StateError> {
        #[derive(Deserialize)]
        struct Settings {
            capacity: u64,
            limits: BTreeMap<String, Size>,
            levels: [u64; limits::COUNT],
            counters: Vec<Value>,
        }
        let Settings {
            capacity,
            limits,
            levels,
            counters,
        } = Settings::deserialize(settings).map_err(StateError::Content)?;
        let ours = self.geometry.capacity;
        if capacity != ours {
            let why = format!("that disk has {capacity} bytes, and this one {ours}");
            return Err(StateError::Misfit(why));
        }
        let limits = RateLimits::default()
            .with(&limits)
            .map_err(|error| StateError::Misfit(error.to_string()))?;
        if let Some(source) = &self.source {
            source
                .adopt()
                .map_err(|error| StateError::Misfit(Chain(&error).to_string()))?;
        }
        if let Some(zones) = &self.shared.zones {
            zones.forget_all();
        }
        self.shared.throttle.set(limits);
        self.shared.throttle.set_levels(levels);
        for (queue, from) in self.stats.iter().zip(&counters) {
            queue.go_on(from);
        }
        Ok(())
    }

    fn thaw(&mut self) {
        self.taken = false;
    }

    fn reset(&mut self) {
        let Self {
            geometry: _,
            features: _,
            max_queue_size: _,
            default_writeback,
            path: _,
            source: _,
            lock: _,
            taken: _,
            stats: _,
            shared,
            limit: _,
        } = self;
        shared
            .writeback
            .store(*default_writeback, Ordering::Relaxed);
    }
}

/// What others may see of a disk at any time.
struct BlkStatistics {
    queues: Vec<Arc<QueueStats>>,
    capacity: Arc<AtomicU64>,
    throttle: Arc<Throttle>,
}

impl Statistics for BlkStatistics {
    fn stats(&self) -> Map<String, Value> {
        Map::from_iter([("queues".to_owned(), stats::to_json(&self.queues))])
    }

    fn metrics(&self, page: &mut Metrics) {
        let capacity = (
            "ringside_block_capacity_bytes",
            Kind::Gauge,
            "The disk's size.",
        );
        page.single(capacity, &[], self.capacity.load(Ordering::Relaxed));
        self.throttle.limits().metrics(page);
        stats::metrics(&self.queues, page);
    }
}

/// io_uring cannot be used.
#[derive(Debug, thiserror::Error)]
#[error(
    "io_uring cannot be used; Linux 5.13 or newer is needed, and /proc/sys/kernel/io_uring_disabled must allow it"
)]
struct UringError(#[source] std::io::Error);

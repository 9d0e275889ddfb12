//! The block device: a raw image file or a block device, served over vhost-user (VIRTIO 1.3, 5.2).
//!
//! ```text
//!  virtqueue ──▶ request.rs ──▶ worker.rs ──▶ uring.rs ──▶ disk.rs' file
//!  (rings)       what is asked,  one thread    io_uring on    opened, examined,
//!                is it valid?    for a queue   guest memory   locked
//! ```

mod args;
mod config;
mod disk;
mod poll;
mod request;
mod uring;
mod worker;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use tracing::info;

use crate::shell::{Commands, Device, DeviceError, config_range};

pub use args::{ArgsError, BlkArgs};
pub use config::Geometry;
pub use disk::{Disk, DiskError, DiskOptions};

use config::feature;
use poll::PollLimits;
use request::{ID_LEN, Limits};
use worker::{Shared, Worker};

/// Most data segments in a request: with header and status it fits a queue of 128, which is QEMU's default.
const SEG_MAX: u16 = 126;

/// What the device is like, checked: made from [`BlkArgs`].
#[derive(Debug)]
pub struct BlkConfig {
    /// The disk; `None` answers all requests at once and moves no data, to measure the rest.
    pub disk: Option<Disk>,
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
    /// Longest time that a worker without requests spins for before it sleeps.
    pub poll: Duration,
    /// Longest time that a worker spins for while the storage works.
    pub poll_storage: Duration,
    /// Most that spinning in vain may take of a worker's time, in percent.
    pub poll_budget: u32,
}

/// The block device.
#[derive(Debug)]
pub struct Blk {
    geometry: Geometry,
    features: u64,
    max_queue_size: u16,
    default_writeback: bool,
    path: Option<PathBuf>,
    shared: Shared,
}

impl Blk {
    /// A device that has no front-end yet.
    #[must_use]
    pub fn new(config: BlkConfig) -> Self {
        let BlkConfig {
            disk,
            geometry,
            read_only,
            writeback,
            serial,
            max_queue_size,
            register_memory,
            poll,
            poll_storage,
            poll_budget,
        } = config;
        let poll_limits = |window| PollLimits {
            window,
            budget: poll_budget,
        };
        let discard = geometry.max_range > 0;
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
        if discard {
            features |= feature::DISCARD | feature::WRITE_ZEROES;
        }
        let align = disk.as_ref().map_or(1, |d| d.align);
        let path = disk.as_ref().map(|d| d.path.clone());
        Self {
            geometry,
            features,
            max_queue_size,
            default_writeback: writeback,
            path,
            shared: Shared {
                limits: Limits {
                    capacity: geometry.capacity,
                    read_only,
                    // Until a driver says what it accepts.
                    flush: false,
                    discard: false,
                    write_zeroes: false,
                    max_range: geometry.max_range,
                    align: u64::from(align),
                },
                disk: disk.map(|d| Arc::new(d.file)),
                memory_align: align,
                registers: register_memory,
                poll: poll_limits(poll),
                poll_storage: poll_limits(poll_storage),
                serial,
                writeback: Arc::new(AtomicBool::new(writeback)),
                capacity: Arc::new(AtomicU64::new(geometry.capacity)),
            },
        }
    }
}

impl Drop for Blk {
    fn drop(&mut self) {
        if let Some(disk) = &self.shared.disk {
            disk::unlock(disk);
        }
    }
}

impl Device for Blk {
    fn features(&self) -> u64 {
        self.features
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
        // Each ring carries what was accepted; nothing is common to all of them.
        let _ = acked;
    }

    fn worker_count(&self) -> usize {
        usize::from(self.geometry.queues)
    }

    fn worker_of(&self, queue: u16) -> usize {
        usize::from(queue)
    }

    fn spawn_worker(
        &mut self,
        worker: usize,
        commands: Commands,
    ) -> Result<JoinHandle<()>, DeviceError> {
        let shared = self.shared.clone();
        let (ready, started) = mpsc::channel();
        let failed = |source| DeviceError::Worker { worker, source };
        let thread = thread::Builder::new()
            .name(format!("blk-queue-{worker}"))
            // The io_uring belongs to the thread that makes it.
            .spawn(move || match Worker::new(shared, commands) {
                Ok(worker) => {
                    if ready.send(Ok(())).is_ok() {
                        worker.run();
                    }
                }
                Err(e) => {
                    // The receiver waits for it.
                    let _ = ready.send(Err(e));
                }
            })
            .map_err(|e| failed(e.into()))?;
        match started.recv() {
            Ok(Ok(())) => Ok(thread),
            Ok(Err(e)) => Err(failed(Box::new(UringError(e)))),
            Err(e) => Err(failed(Box::new(e))),
        }
    }

    /// The disk may have another size now.
    fn refresh(&mut self) -> Result<bool, DeviceError> {
        let (Some(path), Some(file)) = (&self.path, &self.shared.disk) else {
            return Ok(false);
        };
        let capacity = disk::capacity(file, path, self.geometry.block_size)
            .map_err(|e| DeviceError::Refresh(Box::new(e)))?;
        let before = std::mem::replace(&mut self.geometry.capacity, capacity);
        // Relaxed: a request that comes before a worker sees it is judged by the old size.
        self.shared.capacity.store(capacity, Ordering::Relaxed);
        if before != capacity {
            info!(before, now = capacity, "the disk has a new size");
        }
        Ok(before != capacity)
    }

    fn reset(&mut self) {
        let Self {
            geometry: _,
            features: _,
            max_queue_size: _,
            default_writeback,
            path: _,
            shared,
        } = self;
        shared
            .writeback
            .store(*default_writeback, Ordering::Relaxed);
    }
}

/// io_uring cannot be used.
#[derive(Debug, thiserror::Error)]
#[error(
    "io_uring cannot be used; Linux 5.13 or newer is needed, and /proc/sys/kernel/io_uring_disabled must allow it"
)]
struct UringError(#[source] std::io::Error);

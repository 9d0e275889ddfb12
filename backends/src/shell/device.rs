//! What a back-end tells the shell about its device.

use std::collections::BTreeMap;
use std::error::Error as StdError;
use std::io;
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use ringside_control::{ApiError, ErrorCode, Size};
use ringside_sandbox::Profile;
use serde_json::{Map, Value};
use thiserror::Error;
use vhost::vhost_user::VhostUserProtocolFeatures;

use super::control::Statistics;
use super::handover::Parts;
use super::state::StateError;
use super::vring::Commands;

/// A request of the front-end or the shell that a device cannot fulfil.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum DeviceError {
    /// The range lies outside the device's configuration space.
    #[error("bytes {offset}..{offset}+{len} lie outside the configuration space of {size} bytes")]
    ConfigRange {
        /// Offset of the first byte.
        offset: u32,
        /// Number of bytes.
        len: usize,
        /// Size of the configuration space.
        size: usize,
    },
    /// The driver may not write this field.
    #[error("the configuration field at offset {offset} cannot be written")]
    ConfigReadOnly {
        /// Offset of the first byte.
        offset: u32,
    },
    /// What the device is made of cannot be used as it is now.
    #[error("the device stays as it was")]
    Refresh(#[source] Box<dyn StdError + Send + Sync>),
    /// What the device is made of cannot be used now.
    #[error("the device cannot be used")]
    Use(#[source] Box<dyn StdError + Send + Sync>),
    /// A worker thread cannot be started.
    #[error("worker {worker} cannot be started")]
    Worker {
        /// Number of the worker.
        worker: usize,
        /// What failed.
        #[source]
        source: Box<dyn StdError + Send + Sync>,
    },
}

/// Why the device that a command line asks for cannot be had.
pub trait OpenError: StdError {
    /// Whether the command line itself is wrong, whatever the system.
    fn is_usage(&self) -> bool;
}

/// Makes durable what a drained device was given: done on a thread of its own, which may wait long.
pub type Drained = Box<dyn FnOnce() -> io::Result<()> + Send>;

/// What a device answers that does not know a command.
fn unknown<T>(command: &str) -> Result<T, ApiError> {
    let message = format!("this device has no command `{command}`");
    Err(ApiError::of(ErrorCode::NotFound, message))
}

/// The most that front-ends of vhost-user ask for (VHOST_USER_MAX_CONFIG_SIZE).
const CONFIG_SPACE: usize = 256;

/// Bytes `offset..offset + len` of a configuration space that begins with `config`. Front-ends ask for structures of
/// another length, of later or earlier versions of VIRTIO: what they read beyond is zero.
///
/// # Errors
/// [`DeviceError::ConfigRange`] if the range ends beyond what a front-end can ask for.
pub fn config_range(config: &[u8], offset: u32, len: u32) -> Result<Vec<u8>, DeviceError> {
    let (start, count) = (
        usize::try_from(offset).unwrap_or(usize::MAX),
        usize::try_from(len).unwrap_or(usize::MAX),
    );
    if start
        .checked_add(count)
        .is_none_or(|end| end > CONFIG_SPACE)
    {
        return Err(DeviceError::ConfigRange {
            offset,
            len: count,
            size: CONFIG_SPACE,
        });
    }
    let rest = config.get(start..).unwrap_or_default();
    Ok(rest
        .iter()
        .copied()
        .chain(std::iter::repeat(0))
        .take(count)
        .collect())
}

/// The thread of a worker.
#[derive(Debug)]
pub enum WorkerThread {
    /// It serves this device alone, and ends on [`super::Command::Exit`].
    Own(JoinHandle<()>),
    /// It serves others, too, and goes on when this device has ended: it must not wait for a peer.
    Shared,
}

impl WorkerThread {
    /// Waits for its end, if it has one with the device.
    ///
    /// # Errors
    /// What it panicked with.
    pub fn join(self) -> thread::Result<()> {
        match self {
            Self::Own(thread) => thread.join(),
            Self::Shared => Ok(()),
        }
    }
}

/// One device: its features, its configuration space, and who serves which queue. It does no I/O itself.
///
/// All methods run on the control thread. The order of calls over a life:
/// [`spawn_worker`](Self::spawn_worker) for each worker once; then for each front-end that connects the
/// configuration and [`set_features`](Self::set_features) in any order the peer likes, and
/// [`reset`](Self::reset) when it leaves; at the end the shell sends [`super::Command::Exit`] and joins the workers.
pub trait Device {
    /// The virtio features that the device offers, without VHOST_USER_F_PROTOCOL_FEATURES, which is the shell's.
    fn features(&self) -> u64;

    /// The vhost-user protocol features that the device needs beyond those of the shell (REPLY_ACK, MQ,
    /// CONFIG, CONFIGURE_MEM_SLOTS, RESET_DEVICE, LOG_SHMFD, DEVICE_STATE).
    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::empty()
    }

    /// Number of vrings, at least 1.
    fn queue_count(&self) -> u16;

    /// The largest queue size that the device serves: a power of two up to 32768.
    fn max_queue_size(&self) -> u16 {
        32768
    }

    /// Reads `len` bytes of the configuration space.
    ///
    /// # Errors
    /// [`DeviceError::ConfigRange`]
    fn read_config(&self, offset: u32, len: u32) -> Result<Vec<u8>, DeviceError>;

    /// Writes into the configuration space.
    ///
    /// # Errors
    /// [`DeviceError::ConfigRange`], [`DeviceError::ConfigReadOnly`]
    fn write_config(&mut self, offset: u32, data: &[u8]) -> Result<(), DeviceError>;

    /// The driver accepted these features: a subset of [`features`](Self::features). All rings are stopped
    /// while this runs, and each [`super::Vring`] that starts afterwards carries the same set.
    fn set_features(&mut self, acked: u64);

    /// Number of worker threads, at least 1.
    fn worker_count(&self) -> usize;

    /// The worker that serves a queue: less than [`worker_count`](Self::worker_count).
    fn worker_of(&self, queue: u16) -> usize;

    /// It shares its process with other devices, and gets no more than its share of what the process has.
    fn shares_process(&self) -> bool {
        false
    }

    /// Starts a worker thread, or has one that is there already serve this device; it lives until [`super::Command::Exit`].
    ///
    /// # Errors
    /// [`DeviceError::Worker`]
    fn spawn_worker(
        &mut self,
        worker: usize,
        commands: Commands,
    ) -> Result<WorkerThread, DeviceError>;

    /// The first ring is about to run.
    ///
    /// # Errors
    /// [`DeviceError::Use`]: it stays stopped.
    fn begin_use(&mut self) -> Result<(), DeviceError> {
        Ok(())
    }

    /// No ring runs any more, nor will without the front-end's starting it.
    fn end_use(&mut self) {}

    /// The front-end goes on with a ring that its driver has used before: the ring begins with a base other than 0, for the
    /// first time in this connection, and is enabled. So it is after the front-end or this program was replaced under
    /// a running guest. Called only for a front-end that can be told of changes. Returns whether the configuration
    /// space changed, which the driver is then told.
    fn resumed(&mut self, queue: u16) -> bool {
        let _ = queue;
        false
    }

    /// Makes the guest known to the network where it is now, by a packet from this address (VHOST_USER_SEND_RARP). Called only
    /// with the protocol feature RARP.
    fn send_rarp(&mut self, mac: [u8; 6]) {
        let _ = mac;
    }

    /// Looks again at what the device is made of, because the user asked for it by SIGHUP. Returns whether the
    /// configuration space changed, which the driver is then told.
    ///
    /// # Errors
    /// [`DeviceError::Refresh`]
    fn refresh(&mut self) -> Result<bool, DeviceError> {
        Ok(false)
    }

    /// Says what it needs from when the program is confined on, besides what the shell does. All that can be open is open
    /// then; workers have not been started.
    fn needs(&self, profile: &mut Profile) {
        let _ = profile;
    }

    /// What it counts.
    fn statistics(&self) -> Arc<dyn Statistics>;

    /// What it has to say about itself when it is asked for its status.
    fn status(&self) -> Map<String, Value> {
        Map::new()
    }

    /// The name of a feature bit that is of this kind of device.
    fn feature_name(&self, bit: u32) -> Option<&'static str> {
        let _ = bit;
        None
    }

    /// Gives it another size in bytes, a smaller one only if that is allowed expressly; or looks again at what size it has.
    /// Returns whether the configuration space changed, which the driver is then told.
    ///
    /// # Errors
    /// Why it keeps its size.
    fn resize(&mut self, size: Option<Size>, shrink: bool) -> Result<bool, ApiError> {
        let _ = (size, shrink);
        unknown("resize")
    }

    /// Changes limits of rates, by name; 0 takes one away. Returns all that hold from now on.
    ///
    /// # Errors
    /// Why nothing is changed.
    fn limits(&mut self, changes: &BTreeMap<String, Size>) -> Result<Value, ApiError> {
        let _ = changes;
        unknown("limits")
    }

    /// What is to be done when its workers were paused and have ended what was in flight.
    ///
    /// # Errors
    /// Its workers do not obey [`super::Command::Pause`].
    fn drained(&self) -> Result<Drained, ApiError> {
        unknown("drain")
    }

    /// Says that the cable is plugged in, or not. Returns whether the configuration space changed, which the driver is then
    /// told.
    ///
    /// # Errors
    /// It has no link.
    fn set_link(&mut self, up: bool) -> Result<bool, ApiError> {
        let _ = up;
        unknown("link")
    }

    /// Asks the driver to make itself known to the network. Returns whether the configuration space changed, which the
    /// driver is then told.
    ///
    /// # Errors
    /// Why the driver cannot be asked.
    fn announce(&mut self) -> Result<bool, ApiError> {
        unknown("announce")
    }

    /// What its driver has set, and neither the front-end nor another device knows, for the device that takes its place
    /// (VHOST_USER_SET_DEVICE_STATE_FD). All rings are stopped.
    ///
    /// # Errors
    /// [`StateError`]
    fn save(&self) -> Result<Vec<u8>, StateError>;

    /// Goes on from what another one of its kind has saved. Its driver has accepted the same features, and all rings are
    /// stopped. If it fails, nothing is changed.
    ///
    /// # Errors
    /// [`StateError`]
    fn load(&mut self, state: &[u8]) -> Result<(), StateError>;

    /// What it is made of, for a program that is to take the place of this one while its driver goes on: that opens the
    /// same device by it.
    ///
    /// # Errors
    /// Why it cannot be had by another program.
    fn parts(&self) -> Result<Parts, ApiError> {
        let message =
            "this device cannot go over to another program: end this one, and start the other";
        Err(ApiError::of(ErrorCode::Conflict, message))
    }

    /// What users have changed about it since it was opened.
    fn settings(&self) -> Value {
        Value::Null
    }

    /// Goes by what users had changed about the device whose place it takes. The state of that was loaded before.
    ///
    /// # Errors
    /// It is not the same device.
    fn adopt(&mut self, settings: &Value) -> Result<(), StateError> {
        let _ = settings;
        Ok(())
    }

    /// It is about to go over to another program. Its rings are stopped afterwards, and nothing else may change of what both
    /// have in common. Then either this program ends, without another word, or there is [`thaw`](Self::thaw).
    fn freeze(&mut self) {}

    /// All its rings are stopped, and nothing is in flight. What it has in memory, and the other program is to find elsewhere, is
    /// written there. Then either this program ends, or there is [`thaw`](Self::thaw).
    ///
    /// # Errors
    /// It cannot be written, and nothing goes over.
    fn leave(&mut self) -> Result<(), ApiError> {
        Ok(())
    }

    /// What both programs have in common is this one's alone: it goes on after all, or it has taken the place of the other.
    fn thaw(&mut self) {}

    /// Back to the state before the first front-end: forget what a driver set. All rings are stopped.
    fn reset(&mut self);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn configuration_is_bounded_and_padded_with_zeroes() {
        let config: Vec<u8> = (1..=60).collect();
        assert_eq!(config_range(&config, 0, 60).unwrap(), config);
        let long = config_range(&config, 56, 100).unwrap();
        assert_eq!((long.len(), &long[..5]), (100, &[57, 58, 59, 60, 0][..]));
        assert_eq!(config_range(&config, 255, 1).unwrap(), [0]);
        assert!(config_range(&config, 0, 257).is_err());
        assert!(config_range(&config, 256, 1).is_err());
        assert!(config_range(&config, u32::MAX, u32::MAX).is_err());
    }
}

//! Virtio devices as the guest sees them: the PCI transport, and what it needs from a device.
//!
//! | module | concern |
//! | --- | --- |
//! | [`bits`] | numbers of VIRTIO 1.3 |
//! | [`common`] | the common configuration structure: negotiation, queues, status |
//! | [`pci`] | that structure and the others as a PCI function |
//!
//! ```text
//!           features        FEATURES_OK        DRIVER_OK
//!   reset ──────────▶ negotiating ──────▶ agreed ──────▶ running: VirtioDevice::activate
//!     ▲                                     ▲               │ │
//!     │                                     └ no bus master ┘ │
//!     └────────────────────── status 0 ───────────────────────┘
//!                    both ways back: VirtioDevice::reset
//! ```

pub mod bits;
pub mod common;
pub mod pci;

use std::error::Error;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::EventFd;

pub use pci::VirtioPci;

use crate::complaints::Complaints;
use crate::snapshot::dirty::DirtyLog;

/// A queue as the driver set it up. Addresses are guest-physical and not checked.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq, Serialize)]
pub struct Queue {
    /// Index among the device's queues.
    pub index: u16,
    /// Number of descriptors, within the device's limit: a power of two, unless the queue is packed.
    pub size: u16,
    /// Descriptor table.
    pub descriptors: u64,
    /// Available ring; of a packed queue the driver's event suppression structure.
    pub available: u64,
    /// Used ring; of a packed queue the device's event suppression structure.
    pub used: u64,
}

/// A queue with its notifications.
pub struct ActiveQueue {
    /// Where it is.
    pub queue: Queue,
    /// Signalled when the driver rings its doorbell.
    pub kick: EventFd,
    /// To be signalled to interrupt the driver.
    pub call: EventFd,
}

/// All that is settled when the driver sets DRIVER_OK.
pub struct Activation {
    /// The features that the driver chose, among those offered.
    pub features: u64,
    /// The queues it enabled, by index.
    pub queues: Vec<ActiveQueue>,
    /// The device was stopped since the driver's last reset, and goes on where it was.
    pub again: bool,
}

/// A device that was suspended.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Eq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Suspended {
    /// Where the queues go on that ran, by index, as SET_VRING_BASE has it.
    pub bases: Vec<(usize, u32)>,
    /// The device configuration that the guest could read.
    pub config: Vec<u8>,
    /// What the back-end keeps, if it can tell.
    pub back_end: Option<Vec<u8>>,
}

/// A virtio device behind a transport.
pub trait VirtioDevice: Send {
    /// The device ID (VIRTIO 1.3, 5).
    fn device_type(&self) -> u16;
    /// Features offered to the driver.
    fn features(&self) -> u64;
    /// The size limit of each queue.
    fn queue_sizes(&self) -> Vec<u16>;
    /// How the device tells the driver about changes, and that it cannot go on.
    fn notifier(&self) -> Arc<Notifier>;
    /// Reads device configuration; bytes that do not exist read as zero.
    fn read_config(&mut self, offset: u64, data: &mut [u8]);
    /// Writes device configuration.
    fn write_config(&mut self, offset: u64, data: &[u8]);
    /// Starts the queues. After an error the device needs a reset.
    fn activate(&mut self, activation: Activation) -> Result<(), Box<dyn Error + Send + Sync>>;
    /// Stops the queues. When it returns, guest memory is no longer touched.
    fn reset(&mut self);

    /// Stops the queues for a while, and tells what is needed to go on elsewhere. When it returns, guest memory is no longer
    /// touched.
    fn suspend(&mut self) -> Result<Suspended, Box<dyn Error + Send + Sync>> {
        Err("a device of this kind cannot be moved".into())
    }

    /// Goes on after [`VirtioDevice::suspend`], whether or not that was possible.
    fn resume(&mut self) {}

    /// From now on notes in `log` which pages it writes; without one, no longer.
    fn track(&mut self, log: Option<&Arc<DirtyLog>>) -> Result<(), Box<dyn Error + Send + Sync>> {
        let _ = log;
        Err("a device of this kind cannot be moved".into())
    }

    /// Takes over the state of a device elsewhere, and is suspended as that one; without an activation that one did not run.
    fn restore(
        &mut self,
        activation: Option<Activation>,
        state: &Suspended,
    ) -> Result<(), Box<dyn Error + Send + Sync>> {
        let _ = (activation, state);
        Err("a device of this kind cannot be moved".into())
    }
}

/// What a device tells its driver outside of queues. Shared by the transport, which shows it in
/// registers, and the device, any thread of which may call it.
#[derive(Default)]
pub struct Notifier {
    generation: AtomicU8,
    /// Bits of the status register that the device sets itself.
    status: AtomicU8,
    isr: AtomicU8,
    complaints: Complaints,
    event: Mutex<Option<EventFd>>,
}

impl Notifier {
    /// The configuration has changed: a new generation (VIRTIO 1.3, 2.5.1) and an interrupt.
    pub fn config_changed(&self) {
        self.generation.fetch_add(1, Ordering::SeqCst);
        self.isr.fetch_or(bits::ISR_CONFIG, Ordering::SeqCst);
        let event = self.event.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(Err(error)) = event.as_ref().map(|e| e.write(1)) {
            tracing::debug!(%error, "configuration interrupt is already pending");
        }
    }

    /// The device cannot go on until the driver resets it (VIRTIO 1.3, 2.1.2).
    pub fn needs_reset(&self) {
        let before = self
            .status
            .fetch_or(bits::STATUS_NEEDS_RESET, Ordering::SeqCst);
        if before & bits::STATUS_NEEDS_RESET == 0 {
            self.config_changed();
        }
    }

    /// Whether to log another trouble of this device.
    pub fn may_complain(&self) -> bool {
        self.complaints.may_complain()
    }

    /// Takes NEEDS_RESET back, when the device was reset.
    fn clear(&self, event: Option<EventFd>) {
        self.status.store(0, Ordering::SeqCst);
        self.isr.store(0, Ordering::SeqCst);
        *self.event.lock().unwrap_or_else(PoisonError::into_inner) = event;
    }

    /// What the guest was told, for another process: the configuration's generation, status bits, and interrupt status.
    fn told(&self) -> [u8; 3] {
        [&self.generation, &self.status, &self.isr].map(|field| field.load(Ordering::SeqCst))
    }

    /// Sets what the guest was told.
    fn tell_again(&self, [generation, status, isr]: [u8; 3]) {
        self.generation.store(generation, Ordering::SeqCst);
        let status = status & bits::STATUS_NEEDS_RESET;
        self.status.store(status, Ordering::SeqCst);
        self.isr.store(isr & bits::ISR_CONFIG, Ordering::SeqCst);
    }

    /// The configuration's generation.
    pub fn generation(&self) -> u8 {
        self.generation.load(Ordering::SeqCst)
    }

    /// The status bits that the device set.
    pub fn status(&self) -> u8 {
        self.status.load(Ordering::SeqCst)
    }

    /// The interrupt status, which reading clears (VIRTIO 1.3, 4.1.4.5.1).
    fn take_isr(&self) -> u8 {
        self.isr.swap(0, Ordering::SeqCst)
    }
}

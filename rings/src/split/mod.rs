//! Split virtqueues (VIRTIO 1.3, 2.7).

mod desc;
pub(crate) mod device;
pub(crate) mod driver;
pub(crate) mod inflight;
pub(crate) mod layout;

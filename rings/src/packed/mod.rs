//! Packed virtqueues (VIRTIO 1.3, 2.8).
//!
//! Both sides write to one ring of descriptors. A batch becomes visible with one store all the same: the
//! other side looks at the next descriptor only, so the first descriptor of a batch is written last (2.8.2).

mod desc;
pub(crate) mod device;
pub(crate) mod driver;
pub(crate) mod inflight;
pub(crate) mod layout;

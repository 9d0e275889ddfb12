//! Guest-memory rings: the device side and the driver side of virtqueues. Depends on no other
//! Ringside crate, on no socket and on no KVM.
#![forbid(unsafe_code)]
#![warn(clippy::arithmetic_side_effects)]

mod area;
mod chain;
mod desc;
mod device;
mod driver;
mod error;
mod layout;
mod segment;

pub use chain::{Chain, ChainBuf};
pub use device::{DeviceRing, RingConfig, Session};
pub use driver::{DriverLayout, DriverRing, DriverSession};
pub use error::{Area, ChainError, DriverError, PopError, RingError, SegmentError};
pub use segment::{Segment, read_segments, total_len, write_segments};

//! Disks that are not raw files: what workers cannot read and write by themselves goes to a companion.
//!
//! ```text
//!  worker ──▶ Paths (map.rs): the place is known ──▶ uring.rs, on the file of the layer
//!    │
//!    └──Op──▶ ops.rs ──▶ qcow2.rs: a thread for the image, through imago
//!                   ├──▶ nbd/: a thread for each connection
//!                   └──▶ rbd/: Ceph's library, and its threads
//! ```

mod header;
mod map;
mod nbd;
mod ops;
mod qcow2;
mod rbd;
mod side;

pub use header::HeaderError;
pub use nbd::{HandshakeError, Nbd, NbdError, UriError};
pub use qcow2::{Image, Qcow2Error};
pub use rbd::{LoadError, NameError, Rbd, RbdError};

pub(super) use header::MAGIC as QCOW2_MAGIC;
pub(super) use map::Place;
pub(super) use nbd::Target;
pub(super) use ops::{Action, Outcome};
pub(super) use rbd::Target as RbdTarget;
pub(super) use side::{Part, Side};

//! What can go wrong with a load, as the person who runs it is to read it.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use ringside_rings::{DriverError, RingError};
use thiserror::Error;

/// The load cannot be put on, or the back-end does not serve it.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum LoadError {
    /// Nobody listens at the socket.
    #[error("cannot connect to {}: {source}; is the back-end running?", .path.display())]
    Connect {
        /// The socket.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The back-end refused a message, or left.
    #[error("the back-end did not accept {message}: {source}")]
    Message {
        /// The vhost-user message.
        message: &'static str,
        /// Why.
        source: vhost::Error,
    },
    /// An option that this back-end or this machine cannot satisfy.
    #[error("{0}")]
    Option(String),
    /// Guest memory cannot be had.
    #[error("cannot make guest memory of {size} bytes: {source}")]
    Memory {
        /// Its size in bytes.
        size: u64,
        /// Why.
        source: io::Error,
    },
    /// Guest memory cannot be accessed, where it was laid out to be.
    #[error("guest memory at {addr:#x} cannot be accessed")]
    Access {
        /// Guest-physical address.
        addr: u64,
    },
    /// The operating system refused something.
    #[error("cannot {doing}: {source}")]
    Io {
        /// What was being done, as it follows "cannot".
        doing: &'static str,
        /// Why.
        source: io::Error,
    },
    /// A ring cannot be laid out, or the back-end broke it.
    #[error("the virtqueue failed: {0}")]
    Driver(#[from] DriverError),
    /// A ring cannot be accessed.
    #[error("the virtqueue failed: {0}")]
    Ring(#[from] RingError),
    /// A request came back with an error.
    #[error("the back-end answered a {what} of {len} bytes at {offset} with status {status}")]
    Status {
        /// "read" or "write".
        what: &'static str,
        /// First byte on the disk.
        offset: u64,
        /// Length in bytes.
        len: u32,
        /// VIRTIO_BLK_S_IOERR (1) or VIRTIO_BLK_S_UNSUPP (2), or 255 if it wrote none.
        status: u8,
    },
    /// The back-end said that it wrote another number of bytes than it was asked to.
    #[error("the back-end says that it wrote {written} bytes into a request with room for {room}")]
    Written {
        /// What the used element says.
        written: u32,
        /// Length of the request's device-writable part.
        room: u32,
    },
    /// A read gave something else than was written.
    #[error("the {len} bytes at {offset} are not what was written there last: byte {at} differs")]
    Corrupt {
        /// First byte on the disk.
        offset: u64,
        /// Length in bytes.
        len: u32,
        /// The first word that differs, in bytes from there.
        at: usize,
    },
    /// No completion came.
    #[error("no request completed for {} s, with {in_flight} in flight", .patience.as_secs())]
    Stalled {
        /// How long.
        patience: Duration,
        /// Requests given to the back-end.
        in_flight: usize,
    },
    /// No frame was moved.
    #[error("no frame was sent or received for {} s", .patience.as_secs())]
    Quiet {
        /// How long.
        patience: Duration,
    },
    /// The process to watch is gone, or not ours to look at.
    #[error("cannot watch process {pid}: {source}")]
    Watch {
        /// Its number.
        pid: u32,
        /// Why.
        source: io::Error,
    },
    /// A thread ended by a panic, whose message is on standard error.
    #[error("a thread of the load failed")]
    Lane,
}

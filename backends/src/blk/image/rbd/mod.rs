//! A disk in a Ceph cluster: an image of a RADOS block device, or a snapshot of one, through Ceph's librbd.
//!
//! ```text
//!  worker ──Op──▶ librbd, begun on the worker's thread ──▶ its threads ──▶ object storage daemons
//!    ▲                                                         │
//!    └── mailbox ◀── outcome ◀── on_done (ffi.rs) ◀────────────┘
//! ```
//!
//! Data goes between guest memory and librbd's messages. No more is in flight than the queues have slots. An image that is
//! written is this program's alone: its exclusive lock is held as long as it is open, and other clients that have it open
//! are a reason not to begin.

mod ffi;
mod target;

use std::fmt;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{SigSet, Signal};
use ringside_sandbox::{Profile, calls};
use thiserror::Error;
use tracing::{info, warn};

use super::ops::{Action, Link, Op, Outcome};
use super::side::Side;
use ffi::{Ceph, Cluster, Pool, Request};

pub use ffi::LoadError;
pub use target::NameError;

pub(super) use ffi::Image;
pub(in crate::blk) use target::Target;

/// RBD_FEATURE_EXCLUSIVE_LOCK
const EXCLUSIVE_LOCK: u64 = 1 << 2;
/// What librbd discards is aligned to so many bytes (`rbd_discard_granularity_bytes`, its default); what is less stays.
const DISCARD_ALIGN: u32 = 64 << 10;
/// How often to look whether others still have an image open.
const LOCK_INTERVAL: Duration = Duration::from_millis(200);

/// An image of a cluster cannot be used.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum RbdError {
    /// The name is wrong.
    #[error(transparent)]
    Name(#[from] NameError),
    /// Ceph's libraries cannot be used.
    #[error(transparent)]
    Library(#[from] LoadError),
    /// There is no such configuration.
    #[error("RBD: the configuration file {path} cannot be read")]
    Conf {
        /// Its path.
        path: PathBuf,
        /// What librados said.
        #[source]
        source: io::Error,
    },
    /// An option that Ceph does not know.
    #[error("RBD: Ceph has no option {key:?}, or {value:?} is not a value for it")]
    Option {
        /// Its name.
        key: String,
        /// Its value.
        value: String,
        /// What librados said.
        #[source]
        source: io::Error,
    },
    /// The cluster cannot be reached, or does not let us in.
    #[error(
        "RBD: the cluster of {image} cannot be used; check the monitors' addresses (mon_host), the user (id) and its keyring, \
         for example with: ceph --id admin status"
    )]
    Connect {
        /// The image.
        image: String,
        /// What librados said.
        #[source]
        source: io::Error,
    },
    /// There is no such pool, or it may not be used.
    #[error("RBD: pool {pool:?} cannot be used; `rbd ls {pool}` should list its images")]
    Pool {
        /// Its name.
        pool: String,
        /// What librados said.
        #[source]
        source: io::Error,
    },
    /// There is no such image.
    #[error(
        "RBD: there is no {image}; create an image with: rbd create POOL/IMAGE --size 10G, or a snapshot with: \
         rbd snap create POOL/IMAGE@SNAPSHOT"
    )]
    Absent {
        /// The image.
        image: String,
    },
    /// A snapshot cannot be written.
    #[error("RBD: {image} is a snapshot, which cannot be written; use --read-only")]
    Snapshot {
        /// The image.
        image: String,
    },
    /// It cannot be opened.
    #[error("RBD: {image} cannot be opened")]
    Open {
        /// The image.
        image: String,
        /// What librbd said.
        #[source]
        source: io::Error,
    },
    /// Another client has it open.
    #[error(
        "RBD: {image} is in use by another client, at {client}; two writers would destroy it. End that client, or let both \
         read only (--read-only). One that died is forgotten after 30 seconds"
    )]
    InUse {
        /// The image.
        image: String,
        /// The client's address.
        client: String,
    },
    /// Another client has its lock, and keeps it.
    #[error(
        "RBD: {image} is locked by another client, which keeps its exclusive lock; end it, or see: rbd lock ls {image}"
    )]
    Locked {
        /// The image.
        image: String,
        /// What librbd said.
        #[source]
        source: io::Error,
    },
}

/// An image that is open.
pub struct Rbd {
    image: Arc<Image>,
    name: String,
    /// It is no snapshot.
    changes: bool,
}

impl fmt::Debug for Rbd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Rbd").field(&self.name).finish()
    }
}

impl Rbd {
    /// Ceph's library has threads, files and connections of its own, in the host's network.
    pub(in crate::blk) fn needs(&self, profile: &mut Profile) {
        profile
            .network()
            .calls(calls::STORAGE)
            .calls(calls::STREAMS)
            .calls(calls::NAMES)
            .calls(calls::CEPH);
    }

    /// Connects to the cluster and opens the image. `patience`: how long connecting may take, how long to wait until no other
    /// client has the image open, and how long requests wait for daemons that do not answer.
    ///
    /// # Errors
    /// [`RbdError`]
    pub(in crate::blk) fn open(
        target: &Target,
        read_only: bool,
        patience: Duration,
    ) -> Result<Self, RbdError> {
        let name = target.to_string();
        if target.snapshot.is_some() && !read_only {
            return Err(RbdError::Snapshot { image: name });
        }
        let ceph = Ceph::load()?;
        // The threads that librados starts take over what this one takes no notice of.
        let _quiet = Quiet::begin();
        let cluster = connect(ceph, target, &name, patience)?;
        let refused = |source| RbdError::Pool {
            pool: target.pool.clone(),
            source,
        };
        let text = |text: &str| ffi::text(text).map_err(refused);
        let namespace = target.namespace.as_deref().map(text).transpose()?;
        let pool = Pool::open(cluster, &text(&target.pool)?, namespace.as_deref());
        let pool = pool.map_err(refused)?;
        let failed = |source: io::Error| match source.raw_os_error() {
            Some(libc::ENOENT) => RbdError::Absent {
                image: name.clone(),
            },
            _ => RbdError::Open {
                image: name.clone(),
                source,
            },
        };
        let snapshot = target.snapshot.as_deref().map(text).transpose()?;
        let image = text(&target.image)?;
        let image = Image::open(pool, &image, snapshot.as_deref(), read_only).map_err(failed)?;
        if !read_only {
            own(&image, &name, patience, failed)?;
        }
        Ok(Self {
            image: Arc::new(image),
            name,
            changes: target.snapshot.is_none(),
        })
    }

    /// Size in bytes.
    ///
    /// # Errors
    /// What librbd said.
    pub(in crate::blk) fn size(&self) -> io::Result<u64> {
        self.image.size()
    }

    /// Gives it another size; what lies behind is lost.
    ///
    /// # Errors
    /// What librbd said.
    pub(in crate::blk) fn resize(&self, size: u64) -> io::Result<()> {
        self.image.resize(size)
    }

    /// What is discarded should be aligned to this many bytes, which is also a good size for transfers.
    pub(in crate::blk) fn discard_align(&self) -> u32 {
        DISCARD_ALIGN
    }

    /// What a worker needs.
    ///
    /// # Errors
    /// What the system said.
    pub(in crate::blk) fn attach(&self) -> io::Result<Side> {
        // Not earlier: the program takes SIGHUP by now.
        if self.changes {
            self.image.watch()?;
        }
        Ok(Side::new(self.link()?, None))
    }

    /// A way to the image.
    ///
    /// # Errors
    /// What the system said.
    pub(in crate::blk) fn link(&self) -> io::Result<Link> {
        Link::to_image(Arc::clone(&self.image))
    }
}

impl Drop for Rbd {
    /// All workers have ended. What still holds the image is an operation that nobody waits for any more: it must not be the
    /// one to close it, on a thread of librbd.
    fn drop(&mut self) {
        while Arc::strong_count(&self.image) > 1 {
            thread::sleep(Duration::from_millis(1));
        }
    }
}

/// Keeps signals that are for the whole process from the calling thread, and from the threads that are started meanwhile.
struct Quiet(Option<SigSet>);

impl Quiet {
    fn begin() -> Self {
        let before = SigSet::thread_get_mask().ok();
        let mut process = SigSet::empty();
        for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP] {
            process.add(signal);
        }
        Self(before.filter(|_| process.thread_block().is_ok()))
    }
}

impl Drop for Quiet {
    fn drop(&mut self) {
        if let Some(Err(e)) = self.0.map(|before| before.thread_set_mask()) {
            warn!("signals may not be noticed: {e}");
        }
    }
}

fn connect(
    ceph: &'static Ceph,
    target: &Target,
    name: &str,
    patience: Duration,
) -> Result<Cluster, RbdError> {
    let refused = |source| RbdError::Connect {
        image: name.to_owned(),
        source,
    };
    let id = target.id.as_deref().map(ffi::text).transpose();
    let cluster = Cluster::new(ceph, id.map_err(refused)?.as_deref()).map_err(refused)?;
    let path = target.conf.clone().unwrap_or_default();
    let unread = |source| RbdError::Conf {
        path: path.clone(),
        source,
    };
    if target.conf.is_some() {
        let path = std::ffi::CString::new(path.as_os_str().as_bytes());
        let path = path.map_err(|e| unread(e.into()))?;
        cluster.read_conf(Some(&path)).map_err(unread)?;
    } else if let Err(e) = cluster.read_conf(None) {
        // The options may say all that is needed.
        info!("RBD: there is no configuration of Ceph: {e}");
    }
    let set = |key: &str, value: &str| {
        let set = || cluster.set(&ffi::text(key)?, &ffi::text(value)?);
        set().map_err(|source| RbdError::Option {
            key: key.to_owned(),
            value: value.to_owned(),
            source,
        })
    };
    // 0 would be for ever.
    let seconds = patience.as_secs().max(1).to_string();
    for key in [
        "client_mount_timeout",
        "rados_mon_op_timeout",
        "rados_osd_op_timeout",
    ] {
        set(key, &seconds)?;
    }
    for (key, value) in &target.options {
        set(key, value)?;
    }
    // A guest may change data on its way; a message whose checksum is wrong then would be sent for ever.
    set("rbd_disable_zero_copy_writes", "true")?;
    cluster.connect().map_err(refused)?;
    Ok(cluster)
}

/// Makes sure that nobody else writes the image.
fn own(
    image: &Image,
    name: &str,
    patience: Duration,
    failed: impl Fn(io::Error) -> RbdError,
) -> Result<(), RbdError> {
    let begun = Instant::now();
    while let Some(client) = image.other().map_err(&failed)? {
        if begun.elapsed() >= patience {
            let image = name.to_owned();
            return Err(RbdError::InUse { image, client });
        }
        thread::sleep(LOCK_INTERVAL);
    }
    if image.features().map_err(&failed)? & EXCLUSIVE_LOCK == 0 {
        warn!("RBD: {name} has no exclusive lock; see to it that nobody else writes it");
        return Ok(());
    }
    image.lock().map_err(|source| RbdError::Locked {
        image: name.to_owned(),
        source,
    })
}

/// Begins an operation.
pub(super) fn begin(image: &Arc<Image>, op: Op) {
    if op.len == 0 && op.action != Action::Flush {
        return op.end(Outcome::Done);
    }
    let request = match op.action {
        Action::Read => Request::Read,
        Action::Write => Request::Write,
        // No image of a cluster goes over, and nothing of it waits.
        Action::Flush | Action::Suspend | Action::Resume | Action::Leave | Action::Adopt => {
            Request::Flush
        }
        Action::Discard => Request::Discard,
        Action::WriteZeroes { unmap } => Request::WriteZeroes { thick: !unmap },
    };
    Image::start(Arc::clone(image), op, request, ended);
}

/// Librbd has ended what it was asked for.
fn ended(image: Arc<Image>, op: Op, request: Request, result: i64) {
    let done = match request {
        Request::Read => u64::try_from(result) == Ok(op.len),
        _ => result >= 0,
    };
    let changes = !matches!(request, Request::Read | Request::Flush);
    if done && changes && op.durable {
        return Image::start(image, op, Request::Flush, ended);
    }
    let outcome = if done {
        Outcome::Done
    } else {
        let error = match i32::try_from(result) {
            Ok(error @ ..0) => error.saturating_neg(),
            // Less than was asked for.
            _ => libc::EIO,
        };
        if let Some(held_back) = image.limit.check() {
            let (offset, len) = (op.offset, op.len);
            let error = io::Error::from_raw_os_error(error);
            warn!(
                held_back,
                ?request,
                offset,
                len,
                "I/O error of the Ceph cluster: {error}"
            );
        }
        Outcome::Failed(error)
    };
    // Before the worker hears of it: who waits for it closes the image then, and not this thread.
    drop(image);
    op.end(outcome);
}

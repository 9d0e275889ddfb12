//! Ceph's own libraries, librados and librbd, loaded when they are needed: the program starts without them.
//!
//! The functions are those of librados.h and librbd.h, with the meaning that these give them. Each that returns an `int`
//! returns a negative error number when it fails.
#![allow(
    unsafe_code,
    reason = "the functions of librados and librbd, which read and write guest memory on threads of their own"
)]

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::io;
use std::ptr;
use std::sync::{Arc, OnceLock};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use thiserror::Error;

use crate::blk::image::ops::Op;
use crate::shell::{GuestSlice, LogLimit};

/// Ceph's libraries cannot be used.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum LoadError {
    /// This program has no dynamic loader.
    #[error(
        "RBD: this program was linked statically, and cannot load Ceph's libraries; use one that was linked dynamically \
         (built without crt-static)"
    )]
    Static,
    /// A library is not there, or is too old.
    #[error(
        "RBD: {library} cannot be used; install Ceph's client libraries, of version 16 or newer (in Debian: librbd1)"
    )]
    Library {
        /// Its name.
        library: &'static str,
        /// What the loader said.
        #[source]
        source: libloading::Error,
    },
}

/// A cluster (rados_t), a pool in use (rados_ioctx_t), an image (rbd_image_t) or a completion (rbd_completion_t).
type Handle = *mut c_void;
type Callback = extern "C" fn(completion: Handle, argument: *mut c_void);
type Changed = extern "C" fn(argument: *mut c_void);

/// A client that has an image open (rbd_image_watcher_t).
#[derive(Debug, Clone, Copy)]
#[repr(C)]
struct Watcher {
    address: *mut c_char,
    id: i64,
    cookie: u64,
}

/// The functions of a library, under their own names.
macro_rules! library {
    ($name:ident from $file:literal { $(fn $function:ident($($argument:ty),*) $(-> $result:ty)?;)* }) => {
        #[derive(Debug)]
        struct $name {
            $($function: unsafe extern "C" fn($($argument),*) $(-> $result)?,)*
        }

        impl $name {
            fn load() -> Result<Self, LoadError> {
                let failed = |source| LoadError::Library { library: $file, source };
                // SAFETY: what runs when it is loaded is Ceph's, and asks nothing of who loads it.
                let library = unsafe { libloading::Library::new($file) }.map_err(failed)?;
                let functions = Self {
                    $($function: {
                        let name = concat!(stringify!($function), "\0");
                        // SAFETY: the type is that of the function in Ceph's header.
                        *unsafe { library.get(name.as_bytes()) }.map_err(failed)?
                    },)*
                };
                // Its threads run to the end of the program.
                std::mem::forget(library);
                Ok(functions)
            }
        }
    };
}

library! {
    Rados from "librados.so.2" {
        fn rados_create(*mut Handle, *const c_char) -> c_int;
        fn rados_conf_read_file(Handle, *const c_char) -> c_int;
        fn rados_conf_set(Handle, *const c_char, *const c_char) -> c_int;
        fn rados_connect(Handle) -> c_int;
        fn rados_get_instance_id(Handle) -> u64;
        fn rados_shutdown(Handle);
        fn rados_ioctx_create(Handle, *const c_char, *mut Handle) -> c_int;
        fn rados_ioctx_set_namespace(Handle, *const c_char);
        fn rados_ioctx_destroy(Handle);
    }
}

library! {
    Rbd from "librbd.so.1" {
        fn rbd_open(Handle, *const c_char, *mut Handle, *const c_char) -> c_int;
        fn rbd_open_read_only(Handle, *const c_char, *mut Handle, *const c_char) -> c_int;
        fn rbd_close(Handle) -> c_int;
        fn rbd_get_size(Handle, *mut u64) -> c_int;
        fn rbd_get_features(Handle, *mut u64) -> c_int;
        fn rbd_resize(Handle, u64) -> c_int;
        fn rbd_lock_acquire(Handle, c_int) -> c_int;
        fn rbd_watchers_list(Handle, *mut Watcher, *mut usize) -> c_int;
        fn rbd_watchers_list_cleanup(*mut Watcher, usize);
        fn rbd_update_watch(Handle, *mut u64, Changed, *mut c_void) -> c_int;
        fn rbd_update_unwatch(Handle, u64) -> c_int;
        fn rbd_aio_create_completion(*mut c_void, Callback, *mut Handle) -> c_int;
        fn rbd_aio_get_return_value(Handle) -> isize;
        fn rbd_aio_release(Handle);
        fn rbd_aio_readv(Handle, *const libc::iovec, c_int, u64, Handle) -> c_int;
        fn rbd_aio_writev(Handle, *const libc::iovec, c_int, u64, Handle) -> c_int;
        fn rbd_aio_flush(Handle, Handle) -> c_int;
        fn rbd_aio_discard(Handle, u64, u64, Handle) -> c_int;
        fn rbd_aio_write_zeroes(Handle, u64, usize, Handle, c_int, c_int) -> c_int;
    }
}

/// Both libraries.
#[derive(Debug)]
pub(super) struct Ceph {
    rados: Rados,
    rbd: Rbd,
}

impl Ceph {
    /// Loads them, once.
    ///
    /// # Errors
    /// [`LoadError`]
    pub(super) fn load() -> Result<&'static Self, LoadError> {
        static LOADED: OnceLock<Ceph> = OnceLock::new();
        if cfg!(target_feature = "crt-static") {
            return Err(LoadError::Static);
        }
        if let Some(ceph) = LOADED.get() {
            return Ok(ceph);
        }
        let (rados, rbd) = (Rados::load()?, Rbd::load()?);
        Ok(LOADED.get_or_init(|| Self { rados, rbd }))
    }
}

/// The result of a call.
fn checked(result: c_int) -> io::Result<()> {
    if result < 0 {
        return Err(io::Error::from_raw_os_error(result.saturating_neg()));
    }
    Ok(())
}

fn pointer(text: Option<&CStr>) -> *const c_char {
    text.map_or(ptr::null(), CStr::as_ptr)
}

/// A connection to a cluster.
#[derive(Debug)]
pub(super) struct Cluster {
    ceph: &'static Ceph,
    handle: Handle,
}

// SAFETY: librados keeps its own locks; what it gives out may be used by any thread.
unsafe impl Send for Cluster {}
// SAFETY: as above, and by several at a time.
unsafe impl Sync for Cluster {}

impl Cluster {
    /// One that is not connected yet. `id`: whom the cluster takes us for.
    ///
    /// # Errors
    /// What librados said; as with all that follows.
    pub(super) fn new(ceph: &'static Ceph, id: Option<&CStr>) -> io::Result<Self> {
        let mut handle = ptr::null_mut();
        // SAFETY: both are valid for the call.
        checked(unsafe { (ceph.rados.rados_create)(&raw mut handle, pointer(id)) })?;
        Ok(Self { ceph, handle })
    }

    /// Reads a configuration file; `None`: from where Ceph looks for it.
    pub(super) fn read_conf(&self, path: Option<&CStr>) -> io::Result<()> {
        // SAFETY: the handle is open, and the path valid for the call.
        checked(unsafe { (self.ceph.rados.rados_conf_read_file)(self.handle, pointer(path)) })
    }

    /// Sets an option.
    pub(super) fn set(&self, key: &CStr, value: &CStr) -> io::Result<()> {
        let (key, value) = (key.as_ptr(), value.as_ptr());
        // SAFETY: the handle is open, and both texts valid for the call.
        checked(unsafe { (self.ceph.rados.rados_conf_set)(self.handle, key, value) })
    }

    /// Connects.
    pub(super) fn connect(&self) -> io::Result<()> {
        // SAFETY: the handle is open.
        checked(unsafe { (self.ceph.rados.rados_connect)(self.handle) })
    }

    /// The number by which a cluster knows a connected client.
    fn id(&self) -> u64 {
        // SAFETY: the handle is open.
        unsafe { (self.ceph.rados.rados_get_instance_id)(self.handle) }
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        // SAFETY: nothing uses the handle any more.
        unsafe { (self.ceph.rados.rados_shutdown)(self.handle) }
    }
}

/// A pool in use.
#[derive(Debug)]
pub(super) struct Pool {
    handle: Handle,
    cluster: Cluster,
}

// SAFETY: as for a cluster.
unsafe impl Send for Pool {}
// SAFETY: as for a cluster.
unsafe impl Sync for Pool {}

impl Pool {
    /// A pool of a connected cluster.
    pub(super) fn open(
        cluster: Cluster,
        name: &CStr,
        namespace: Option<&CStr>,
    ) -> io::Result<Self> {
        let rados = &cluster.ceph.rados;
        let mut handle = ptr::null_mut();
        let (of, name) = (cluster.handle, name.as_ptr());
        // SAFETY: the cluster is connected, and the others are valid for the call.
        checked(unsafe { (rados.rados_ioctx_create)(of, name, &raw mut handle) })?;
        if let Some(namespace) = namespace {
            // SAFETY: the handle is open, and the name valid for the call.
            unsafe { (rados.rados_ioctx_set_namespace)(handle, namespace.as_ptr()) }
        }
        Ok(Self { handle, cluster })
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        // SAFETY: nothing uses the handle any more.
        unsafe { (self.cluster.ceph.rados.rados_ioctx_destroy)(self.handle) }
    }
}

/// An open image. Not to be dropped by a thread of librbd, which closing waits for.
#[derive(Debug)]
pub(in crate::blk::image) struct Image {
    handle: Handle,
    /// Of the watch for changes.
    watch: OnceLock<u64>,
    pool: Pool,
    /// For what is said about its errors.
    pub(super) limit: LogLimit,
}

// SAFETY: librbd keeps its own locks; an image may be used by any thread.
unsafe impl Send for Image {}
// SAFETY: as above, and by several at a time.
unsafe impl Sync for Image {}

/// What librbd is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Request {
    /// Read into the operation's memory.
    Read,
    /// Write from the operation's memory.
    Write,
    /// Make durable what was written.
    Flush,
    /// The range is not needed any more.
    Discard,
    /// The range is to read as zeroes.
    WriteZeroes {
        /// Its space is to be allocated.
        thick: bool,
    },
}

/// Takes an operation back: what librbd was asked for, and what it returned.
pub(super) type Ended = fn(Arc<Image>, Op, Request, i64);

/// An operation that librbd works on.
struct Flight {
    image: Arc<Image>,
    op: Op,
    request: Request,
    /// In the operation's memory, which is mapped as long as the operation is there.
    pieces: Box<[libc::iovec]>,
    ended: Ended,
}

impl Image {
    /// Opens an image, or a snapshot of it.
    pub(super) fn open(
        pool: Pool,
        name: &CStr,
        snapshot: Option<&CStr>,
        read_only: bool,
    ) -> io::Result<Self> {
        let rbd = &pool.cluster.ceph.rbd;
        let open = if read_only {
            rbd.rbd_open_read_only
        } else {
            rbd.rbd_open
        };
        let mut handle = ptr::null_mut();
        let (name, snapshot) = (name.as_ptr(), pointer(snapshot));
        // SAFETY: the pool is open, and the others are valid for the call.
        checked(unsafe { open(pool.handle, name, &raw mut handle, snapshot) })?;
        Ok(Self {
            handle,
            watch: OnceLock::new(),
            pool,
            limit: LogLimit::default(),
        })
    }

    fn ceph(&self) -> &'static Ceph {
        self.pool.cluster.ceph
    }

    /// Its size in bytes.
    pub(super) fn size(&self) -> io::Result<u64> {
        let mut size = 0;
        // SAFETY: the image is open, and the number is there for the call.
        checked(unsafe { (self.ceph().rbd.rbd_get_size)(self.handle, &raw mut size) })?;
        Ok(size)
    }

    /// Gives it another size; what lies behind is lost.
    pub(super) fn resize(&self, size: u64) -> io::Result<()> {
        // SAFETY: the image is open.
        checked(unsafe { (self.ceph().rbd.rbd_resize)(self.handle, size) })
    }

    /// Its features (RBD_FEATURE_…).
    pub(super) fn features(&self) -> io::Result<u64> {
        let mut features = 0;
        // SAFETY: the image is open, and the number is there for the call.
        checked(unsafe { (self.ceph().rbd.rbd_get_features)(self.handle, &raw mut features) })?;
        Ok(features)
    }

    /// Takes its lock, and keeps it until it is closed: nobody else can write.
    pub(super) fn lock(&self) -> io::Result<()> {
        /// RBD_LOCK_MODE_EXCLUSIVE
        const EXCLUSIVE: c_int = 0;
        // SAFETY: the image is open.
        checked(unsafe { (self.ceph().rbd.rbd_lock_acquire)(self.handle, EXCLUSIVE) })
    }

    /// The address of another client that has it open for writing.
    pub(super) fn other(&self) -> io::Result<Option<String>> {
        let rbd = &self.ceph().rbd;
        let mut list = [Watcher {
            address: ptr::null_mut(),
            id: 0,
            cookie: 0,
        }; 64];
        let mut count = list.len();
        let into = list.as_mut_ptr();
        // SAFETY: the image is open, and the list has `count` places.
        checked(unsafe { (rbd.rbd_watchers_list)(self.handle, into, &raw mut count) })?;
        let ours = i64::try_from(self.pool.cluster.id()).unwrap_or(-1);
        let watchers = list.iter().take(count);
        let other = watchers
            .filter(|watcher| watcher.id != ours && !watcher.address.is_null())
            .map(|watcher| {
                // SAFETY: librbd gave an address as text.
                let address = unsafe { CStr::from_ptr(watcher.address) };
                address.to_string_lossy().into_owned()
            })
            .next();
        // SAFETY: these are the watchers that librbd gave, and nobody looks at them any more.
        unsafe { (rbd.rbd_watchers_list_cleanup)(list.as_mut_ptr(), count) }
        Ok(other)
    }

    /// From now on this process is sent SIGHUP when the image's size may have changed.
    pub(super) fn watch(&self) -> io::Result<()> {
        if self.watch.get().is_some() {
            return Ok(());
        }
        let mut watch = 0;
        let (place, nothing) = (&raw mut watch, ptr::null_mut());
        // SAFETY: the image is open, the number is there for the call, and `on_change` uses no argument.
        checked(unsafe {
            (self.ceph().rbd.rbd_update_watch)(self.handle, place, on_change, nothing)
        })?;
        // The control thread is the only one to come here.
        self.watch.get_or_init(|| watch);
        Ok(())
    }

    /// Begins what an operation asks for, or a part of that; `ended` gets it back, from this thread or one of librbd's.
    pub(super) fn start(image: Arc<Self>, op: Op, request: Request, ended: Ended) {
        let rbd = &image.ceph().rbd;
        let handle = image.handle;
        let pieces: Box<[libc::iovec]> = match request {
            Request::Read | Request::Write => match op.slices(0, op.len) {
                Ok(slices) => slices.iter().map(piece).collect(),
                Err(_) => return ended(image, op, request, -i64::from(libc::EFAULT)),
            },
            _ => Box::default(),
        };
        let (first, count) = (pieces.as_ptr(), c_int::try_from(pieces.len()));
        let (offset, len) = (op.offset, op.len);
        let (Ok(count), Ok(size)) = (count, usize::try_from(len)) else {
            return ended(image, op, request, -i64::from(libc::EINVAL));
        };
        let flight = Box::into_raw(Box::new(Flight {
            image,
            op,
            request,
            pieces,
            ended,
        }));
        let mut completion = ptr::null_mut();
        // SAFETY: `on_done` takes the argument back, which nobody else does unless this or the next call fails.
        let made =
            unsafe { (rbd.rbd_aio_create_completion)(flight.cast(), on_done, &raw mut completion) };
        if made < 0 {
            return give_back(flight, made);
        }
        // The image is open until all that it works on has ended: each has a hand on it.
        let begun = match request {
            // SAFETY: the pieces are in the flight, and they and their memory stay until `on_done`.
            Request::Read => unsafe {
                (rbd.rbd_aio_readv)(handle, first, count, offset, completion)
            },
            // SAFETY: as for reading.
            Request::Write => unsafe {
                (rbd.rbd_aio_writev)(handle, first, count, offset, completion)
            },
            // SAFETY: the image is open.
            Request::Flush => unsafe { (rbd.rbd_aio_flush)(handle, completion) },
            // SAFETY: the image is open.
            Request::Discard => unsafe { (rbd.rbd_aio_discard)(handle, offset, len, completion) },
            Request::WriteZeroes { thick } => {
                // RBD_WRITE_ZEROES_FLAG_THICK_PROVISION
                let flags = c_int::from(thick);
                // SAFETY: the image is open.
                unsafe { (rbd.rbd_aio_write_zeroes)(handle, offset, size, completion, flags, 0) }
            }
        };
        if begun < 0 {
            // SAFETY: it was not begun, so that the completion is nobody's but ours.
            unsafe { (rbd.rbd_aio_release)(completion) }
            give_back(flight, begun);
        }
    }
}

impl Drop for Image {
    fn drop(&mut self) {
        let rbd = &self.ceph().rbd;
        if let Some(&watch) = self.watch.get() {
            // SAFETY: the image is open, and the watch its own. That it fails is no matter: the image goes.
            let _ = unsafe { (rbd.rbd_update_unwatch)(self.handle, watch) };
        }
        // SAFETY: nobody uses the handle any more. What was not flushed is lost with the connection, as with any disk.
        let _ = unsafe { (rbd.rbd_close)(self.handle) };
    }
}

/// Takes back what librbd did not take.
fn give_back(flight: *mut Flight, result: c_int) {
    // SAFETY: `start` made it of a box, and nobody else has it.
    let flight = unsafe { Box::from_raw(flight) };
    flight.end(result.into());
}

impl Flight {
    fn end(self, result: i64) {
        let Self {
            image,
            op,
            request,
            pieces,
            ended,
        } = self;
        drop(pieces);
        if matches!(request, Request::Read) {
            op.mark_read();
        }
        ended(image, op, request, result);
    }
}

/// On a thread of librbd: an operation is done.
extern "C" fn on_done(completion: Handle, argument: *mut c_void) {
    // SAFETY: `start` made it of a box, for this completion alone.
    let flight = unsafe { Box::from_raw(argument.cast::<Flight>()) };
    let rbd = &flight.image.ceph().rbd;
    // SAFETY: the completion is this one, and done.
    let result = unsafe { (rbd.rbd_aio_get_return_value)(completion) };
    // SAFETY: nobody looks at the completion any more.
    unsafe { (rbd.rbd_aio_release)(completion) }
    flight.end(i64::try_from(result).unwrap_or(i64::MIN));
}

/// On a thread of librbd, which must not be kept: the control thread looks what has changed.
extern "C" fn on_change(_: *mut c_void) {
    if let Err(e) = kill(Pid::this(), Signal::SIGHUP) {
        tracing::warn!("RBD: that the image has changed cannot be told: {e}");
    }
}

fn piece(slice: &GuestSlice<'_>) -> libc::iovec {
    libc::iovec {
        iov_base: slice.ptr_guard_mut().as_ptr().cast(),
        iov_len: slice.len(),
    }
}

/// A text for C. Names and options with a zero byte were refused before.
pub(super) fn text(text: &str) -> io::Result<CString> {
    CString::new(text).map_err(|_| io::ErrorKind::InvalidInput.into())
}

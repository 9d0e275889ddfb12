//! qcow2 images, through the crate `imago`: opening an image with its backing files, and the companion that does what
//! changes where data is.
//!
//! A worker reads and writes by itself wherever the [`Map`] tells the place: the same io_uring on guest memory as for a
//! raw file, on the file of the layer that has the data. Everything else it hands to the companion, one thread for the
//! image: looking places up, allocating writes, compressed clusters, discarding, zeroing, writing the tables back.
//!
//! # Why this is exact under several queues
//!
//! - The companion alone changes the image, one operation after the other, and alone writes the map: after each change,
//!   before its outcome is told. A driver that knows of a change therefore finds a worker that knows of it, whichever queue.
//! - A worker that looked a place up a moment before a change serves a request that runs at the same time as the change. For
//!   reads and copies on write that is no matter: bytes that the change does not touch are the same in the old place,
//!   which stays what it is. Only layers that nobody writes, and clusters that belong to this image alone, are
//!   in the map; a cluster that an internal snapshot shares is not, as it can be freed by a copy on write.
//! - Zeroing keeps the clusters allocated, so that a write under way ends in a place where it does no harm.
//! - Discarding frees clusters, which become part of something else: another place on the disk, or a table. A
//!   write under way must not end there. So the companion closes the [`Gate`] first: workers then hand over everything, and
//!   when the last of their own operations has ended, nobody uses a place from the map. Then it discards.
//!
//! # When a program takes the place of another
//!
//! It gets all files, with their locks, opens the image to see what it is, and opens it once more when the other program has
//! written its tables and writes nothing any more. Until then it writes nothing itself, and no worker looks into its map.
//!
//! # Durability
//!
//! Tables are cached by `imago` and written with a flush: reference counts before the entries that need them, so that
//! a killed process leaves clusters that are not used, and no more. A flush that finds the tables unchanged is a
//! fdatasync in the worker's ring; otherwise the companion writes them first. Whoever asks for a durable write gets it
//! written in place only when the tables are on the disk already.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread::{self, JoinHandle, Thread};

use imago::file::File as Storage;
use imago::io_buffers::{IoVector, IoVectorMut};
use imago::qcow2::Qcow2;
use imago::raw::Raw;
use imago::{FormatAccess, Mapping, Storage as _, StorageOpenOptions};
use nix::fcntl::{FallocateFlags, fallocate};
use ringside_sandbox::ThreadKind;
use thiserror::Error;
use tracing::{debug, error, info, warn};

use super::header::{Header, HeaderError};
use super::map::{Entry, MAX_LAYERS, Map, Place};
use super::ops::{Action, Link, Op, Outcome};
use super::side::Side;
use crate::blk::disk::{self, DiskError, DiskOptions};
use crate::shell::{LogLimit, confined};

/// How far a lookup goes beyond what was asked, in granules: neighbours are wanted next, more often than not.
const LOOKAHEAD: u64 = 64;

/// An image that is not served.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum Qcow2Error {
    /// One of the files cannot be opened.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// The header says no.
    #[error("image {path}: {source}")]
    Header {
        /// The image or backing file.
        path: PathBuf,
        /// Why.
        source: HeaderError,
    },
    /// Its tables cannot be used.
    #[error(
        "image {path} cannot be used; look at it with qemu-img check, and repair it with qemu-img check -r all"
    )]
    Tables {
        /// The image or backing file.
        path: PathBuf,
        /// What is wrong.
        #[source]
        source: io::Error,
    },
    /// It has a backing file, and may not.
    #[error(
        "image {path} has the backing file {backing:?}, and --backing off forbids that; leave it out, or merge the two with qemu-img rebase -b ''"
    )]
    BackingForbidden {
        /// The image.
        path: PathBuf,
        /// What its header names.
        backing: String,
    },
    /// The backing file's format is not in the header: it would have to be guessed.
    #[error(
        "image {path} does not say which format its backing file {backing:?} has; write it into the image with qemu-img rebase -u -b FILE -F raw|qcow2"
    )]
    BackingFormat {
        /// The image.
        path: PathBuf,
        /// What its header names.
        backing: String,
    },
    /// The backing file's format is not known.
    #[error(
        "image {path}: its backing file {backing:?} has the format {format:?}; only raw and qcow2 are possible"
    )]
    UnknownBackingFormat {
        /// The image.
        path: PathBuf,
        /// What its header names.
        backing: String,
        /// What its header says.
        format: String,
    },
    /// The backing file is no local path.
    #[error(
        "image {path}: its backing file {backing:?} is not a local path, which is all that is supported"
    )]
    NotLocal {
        /// The image.
        path: PathBuf,
        /// What its header names.
        backing: String,
    },
    /// The chain is too long, or a ring.
    #[error("image {path} has more than {MAX_LAYERS} backing files, or is its own")]
    TooManyLayers {
        /// The image.
        path: PathBuf,
    },
}

/// Closed while the companion frees clusters.
#[derive(Debug, Default)]
struct Gate {
    closed: AtomicBool,
    /// The operations that each worker has under way in places from the map.
    under_way: Mutex<Vec<Arc<AtomicU32>>>,
    companion: OnceLock<Thread>,
}

impl Gate {
    /// Waits until no worker uses the map, and keeps it so. On the companion's thread.
    fn close(&self) {
        // Either a worker sees this after it has counted itself, or its count is seen below: all four accesses are in one
        // order (SeqCst).
        self.closed.store(true, Ordering::SeqCst);
        let workers = self
            .under_way
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone();
        for worker in workers {
            while worker.load(Ordering::SeqCst) > 0 {
                thread::park(); // woken by `Paths::leave`
            }
        }
    }

    fn open(&self) {
        self.closed.store(false, Ordering::SeqCst);
    }
}

/// A worker's view of the image: which places it may use.
#[derive(Debug)]
pub(super) struct Paths {
    map: Arc<Map>,
    gate: Arc<Gate>,
    under_way: Arc<AtomicU32>,
    tables_changed: Arc<AtomicBool>,
}

impl Paths {
    /// Where the first bytes of a range are. After [`Place::File`], call [`leave`](Self::leave) when the operation on
    /// it has ended.
    pub(super) fn find(&self, offset: u64, len: u64, write: bool) -> Place {
        self.under_way.fetch_add(1, Ordering::SeqCst);
        let place = if self.gate.closed.load(Ordering::SeqCst) {
            Place::Unknown
        } else {
            self.map.find(offset, len, write)
        };
        if !matches!(place, Place::File { .. }) {
            self.leave();
        }
        place
    }

    /// An operation in a place from the map has ended.
    pub(super) fn leave(&self) {
        self.under_way.fetch_sub(1, Ordering::SeqCst);
        if self.gate.closed.load(Ordering::SeqCst)
            && let Some(companion) = self.gate.companion.get()
        {
            companion.unpark();
        }
    }

    /// The companion must write tables before what was written is durable.
    pub(super) fn tables_changed(&self) -> bool {
        self.tables_changed.load(Ordering::Acquire)
    }
}

impl Drop for Paths {
    /// The worker's io_uring has ended, and with it all operations.
    fn drop(&mut self) {
        self.under_way.store(0, Ordering::SeqCst);
        if let Some(companion) = self.gate.companion.get() {
            companion.unpark();
        }
    }
}

/// An open image.
#[derive(Debug)]
pub struct Image {
    /// All files, the image's own first: layers of the map.
    files: Vec<Arc<File>>,
    map: Arc<Map>,
    gate: Arc<Gate>,
    tables_changed: Arc<AtomicBool>,
    /// Size in bytes.
    capacity: u64,
    /// Discarding and zeroing are possible.
    ranges: bool,
    /// Until it runs.
    companion: Option<Box<Companion>>,
    running: Option<(Sender<Op>, JoinHandle<()>)>,
    /// Its locks are given back in the end.
    locked: bool,
}

impl Image {
    /// Opens an image, whose own `file` is open and locked, with all of its backing files.
    ///
    /// # Errors
    /// [`Qcow2Error`]
    pub(in crate::blk) fn open(options: &DiskOptions, file: Arc<File>) -> Result<Self, Qcow2Error> {
        let own = Arc::clone(&file);
        // What another program writes is not looked at, let alone written, before it has left it.
        let write = !options.read_only && options.taken.is_none();
        let opened = Opened::open(options, Known::First(file), write)?;
        let Opened {
            files,
            header,
            granule_bits,
            access,
            layers,
        } = opened;
        let files: Vec<Arc<File>> = files.into_iter().map(|(_, file)| file).collect();
        let capacity = access.size();
        let map = Arc::new(Map::new(granule_bits, capacity));
        let gate = Arc::<Gate>::default();
        let tables_changed = Arc::<AtomicBool>::default();
        Ok(Self {
            files: files.clone(),
            capacity,
            // Version 2 cannot mark clusters as zeroes.
            ranges: header.version >= 3,
            companion: Some(Box::new(Companion {
                access,
                file: own,
                layers,
                cluster: 1 << header.cluster_bits,
                frozen: !write,
                options: options.clone(),
                files,
                map: Arc::clone(&map),
                gate: Arc::clone(&gate),
                tables_changed: Arc::clone(&tables_changed),
                limit: LogLimit::default(),
            })),
            running: None,
            locked: true,
            map,
            gate,
            tables_changed,
        })
    }

    /// Its locks are another program's, too, and stay when this one ends.
    pub(in crate::blk) fn keep_locks(&mut self) {
        self.locked = false;
    }

    /// Size in bytes.
    pub(in crate::blk) fn capacity(&self) -> u64 {
        self.capacity
    }

    /// Discarding and zeroing are possible.
    pub(in crate::blk) fn ranges(&self) -> bool {
        self.ranges
    }

    /// All files that data can be in: number 0 is the one that is written.
    pub(in crate::blk) fn files(&self) -> &[Arc<File>] {
        &self.files
    }

    /// What a worker needs. The first starts the companion.
    ///
    /// # Errors
    /// What the system said.
    pub(in crate::blk) fn attach(&mut self) -> io::Result<Side> {
        let link = Link::new(self.sender()?, None)?;
        let under_way = Arc::<AtomicU32>::default();
        self.gate
            .under_way
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(Arc::clone(&under_way));
        let paths = Paths {
            map: Arc::clone(&self.map),
            gate: Arc::clone(&self.gate),
            under_way,
            tables_changed: Arc::clone(&self.tables_changed),
        };
        Ok(Side::new(link, Some(paths)))
    }

    /// A way to the companion, which runs.
    ///
    /// # Errors
    /// What the system said.
    pub(in crate::blk) fn link(&self) -> io::Result<Link> {
        match &self.running {
            Some((sender, _)) => Link::new(sender.clone(), None),
            None => Err(io::ErrorKind::BrokenPipe.into()),
        }
    }

    fn sender(&mut self) -> io::Result<Sender<Op>> {
        if let Some((sender, _)) = &self.running {
            return Ok(sender.clone());
        }
        let Some(companion) = self.companion.take() else {
            return Err(io::ErrorKind::BrokenPipe.into()); // could not be started before
        };
        let (sender, ops) = mpsc::channel();
        let thread = thread::Builder::new()
            .name("blk-image".into())
            .spawn(move || confined(ThreadKind::Helper, || companion.run(&ops)))?;
        info!(
            size = self.capacity,
            layers = self.files.len(),
            granule = self.map.granule(),
            "qcow2 image"
        );
        // Set once: there is one companion.
        let _ = self.gate.companion.set(thread.thread().clone());
        self.running = Some((sender.clone(), thread));
        Ok(sender)
    }
}

impl Drop for Image {
    /// Waits until the companion has written everything, and gives the locks back. All workers have ended.
    fn drop(&mut self) {
        if let Some((sender, thread)) = self.running.take() {
            drop(sender);
            if thread.join().is_err() {
                error!("the image's thread failed");
            }
        }
        for file in self.files.iter().filter(|_| self.locked) {
            disk::unlock(file);
        }
    }
}

/// Files that are open.
enum Known {
    /// The image's own.
    First(Arc<File>),
    /// All, layer by layer.
    All(Vec<Arc<File>>),
}

/// An image and its layers.
struct Opened {
    files: Vec<(PathBuf, Arc<File>)>,
    header: Header,
    granule_bits: u32,
    access: FormatAccess<Storage>,
    /// Number of each storage object of the image.
    layers: Vec<(usize, u8)>,
}

impl Opened {
    fn open(options: &DiskOptions, known: Known, write: bool) -> Result<Self, Qcow2Error> {
        let (first, known) = match known {
            Known::First(file) => (Some(file), Vec::new()),
            Known::All(files) => (files.first().cloned(), files),
        };
        let Some(first) = first else {
            let path = options.path.clone();
            return Err(DiskError::OtherwiseOpen { path }.into());
        };
        let mut chain = Chain {
            options,
            known,
            files: Vec::new(),
            granule_bits: u32::MAX,
        };
        let (header, image) = chain.qcow2(&options.path, first, write)?;
        let Chain {
            files,
            granule_bits,
            ..
        } = chain;
        let access = FormatAccess::new(image);
        let layers = access
            .inner()
            .collect_storage_dependencies()
            .into_iter()
            .filter_map(|storage| {
                let path = storage.get_filename()?;
                let layer = files.iter().position(|(known, _)| *known == path)?;
                Some((address(storage), u8::try_from(layer).ok()?))
            })
            .collect();
        Ok(Self {
            files,
            header,
            granule_bits,
            access,
            layers,
        })
    }
}

/// Opens one layer after the other.
struct Chain<'o> {
    options: &'o DiskOptions,
    /// Those that are open already.
    known: Vec<Arc<File>>,
    files: Vec<(PathBuf, Arc<File>)>,
    granule_bits: u32,
}

impl Chain<'_> {
    /// The file for `imago`, which has the same open file description, and so the same lock.
    fn storage(
        &mut self,
        path: &Path,
        file: Arc<File>,
        write: bool,
    ) -> Result<Storage, Qcow2Error> {
        if self.files.len() >= MAX_LAYERS {
            return Err(Qcow2Error::TooManyLayers {
                path: self.options.path.clone(),
            });
        }
        let options = StorageOpenOptions::new()
            .filename(path)
            .write(write)
            .direct(self.options.direct);
        let storage = file
            .try_clone()
            .and_then(|clone| Storage::from_open_file(clone, options))
            .map_err(tables(path))?;
        self.files.push((path.to_owned(), file));
        Ok(storage)
    }

    fn qcow2(
        &mut self,
        path: &Path,
        file: Arc<File>,
        write: bool,
    ) -> Result<(Header, Qcow2<Storage>), Qcow2Error> {
        let header = Header::read(&file).map_err(|source| Qcow2Error::Header {
            path: path.to_owned(),
            source,
        })?;
        self.granule_bits = self.granule_bits.min(header.cluster_bits);
        let storage = self.storage(path, file, write)?;
        let mut image = Qcow2::open_image(storage, write).map_err(tables(path))?;
        image.set_data_file(None);
        let backing = match image.implicit_backing_file().cloned() {
            Some(backing) => {
                // `imago` does not look for it in a version 2 header.
                Some(self.backing(path, backing, header.backing_format.clone())?)
            }
            None => None,
        };
        image.set_backing(backing);
        Ok((header, image))
    }

    fn backing(
        &mut self,
        path: &Path,
        backing: String,
        format: Option<String>,
    ) -> Result<FormatAccess<Storage>, Qcow2Error> {
        let path = path.to_owned();
        if !self.options.backing {
            return Err(Qcow2Error::BackingForbidden { path, backing });
        }
        let Some(format) = format else {
            return Err(Qcow2Error::BackingFormat { path, backing });
        };
        // As QEMU reads it: something like "nbd:" in front of the first slash is a protocol.
        if backing
            .split('/')
            .next()
            .is_some_and(|first| first.contains(':'))
        {
            return Err(Qcow2Error::NotLocal { path, backing });
        }
        let target = path.parent().unwrap_or(Path::new("")).join(&backing);
        let number = self.files.len();
        let file = match self.known.get(number) {
            Some(file) => Arc::clone(file),
            None => {
                let options = DiskOptions {
                    path: target.clone(),
                    read_only: true,
                    ..self.options.clone()
                };
                disk::open_layer(&options, number)?
            }
        };
        match format.as_str() {
            "qcow2" => {
                let (_, image) = self.qcow2(&target, file, false)?;
                Ok(FormatAccess::new(image))
            }
            "raw" => {
                let storage = self.storage(&target, file, false)?;
                let raw = Raw::open_image(storage, false).map_err(tables(&target))?;
                Ok(FormatAccess::new(raw))
            }
            _ => Err(Qcow2Error::UnknownBackingFormat {
                path,
                backing,
                format,
            }),
        }
    }
}

fn tables(path: &Path) -> impl FnOnce(io::Error) -> Qcow2Error + use<> {
    let path = path.to_owned();
    move |source| Qcow2Error::Tables { path, source }
}

/// By which a layer is known again: `imago` names it by reference, and keeps it where it is.
fn address(storage: &Storage) -> usize {
    ptr::from_ref(storage).addr()
}

/// The thread that changes the image.
#[derive(Debug)]
struct Companion {
    access: FormatAccess<Storage>,
    /// The image's own file.
    file: Arc<File>,
    /// Number of each storage object of the image.
    layers: Vec<(usize, u8)>,
    /// Cluster size of the image in bytes.
    cluster: u64,
    /// Nothing is written.
    frozen: bool,
    /// How it was opened, and all files: to open it once more.
    options: DiskOptions,
    files: Vec<Arc<File>>,
    map: Arc<Map>,
    gate: Arc<Gate>,
    tables_changed: Arc<AtomicBool>,
    limit: LogLimit,
}

impl Companion {
    fn run(mut self, ops: &Receiver<Op>) {
        while let Ok(op) = ops.recv() {
            let outcome = match self.serve(&op) {
                Ok(outcome) => outcome,
                Err(e) => self.failed(&op, &e),
            };
            op.end(outcome);
        }
        if !self.frozen
            && let Err(e) = self.flush().and_then(|()| self.access.sync())
        {
            error!("the image's tables cannot be written; look at it with qemu-img check: {e}");
        }
    }

    fn failed(&self, op: &Op, error: &io::Error) -> Outcome {
        if let Some(held_back) = self.limit.check() {
            warn!(
                held_back,
                action = ?op.action,
                offset = op.offset,
                len = op.len,
                "I/O error: {error}"
            );
        }
        let otherwise = match error.kind() {
            io::ErrorKind::Unsupported => libc::EOPNOTSUPP,
            _ => libc::EIO,
        };
        Outcome::Failed(error.raw_os_error().unwrap_or(otherwise))
    }

    fn serve(&mut self, op: &Op) -> io::Result<Outcome> {
        if matches!(op.action, Action::Read | Action::Write) && !op.serve {
            let write = op.action == Action::Write;
            self.look_up(op.offset, op.len)?;
            if self.map.find(op.offset, op.len, write) != Place::Unknown {
                return Ok(Outcome::Again);
            }
        }
        match op.action {
            Action::Read => {
                let slices = op.slices(0, op.len).map_err(io::Error::other)?;
                let (buffers, _guard) = IoVectorMut::from_volatile_slice(&slices);
                self.access.readv(buffers, op.offset)?;
                return Ok(Outcome::Done);
            }
            Action::Flush => {
                self.flush()?;
                return Ok(Outcome::Done);
            }
            // Nothing of it waits.
            Action::Suspend | Action::Resume => return Ok(Outcome::Done),
            // The other program reads the tables from the file, which this one does not write any more.
            Action::Leave => {
                if !self.frozen {
                    self.flush()?;
                }
                return Ok(Outcome::Done);
            }
            Action::Adopt => {
                self.adopt().map_err(io::Error::other)?;
                return Ok(Outcome::Done);
            }
            Action::Write => {
                let slices = op.slices(0, op.len).map_err(io::Error::other)?;
                let (buffers, _guard) = IoVector::from_volatile_slice(&slices);
                self.change(op, |access| access.writev(buffers, op.offset))?;
                self.look_up(op.offset, op.len)?;
            }
            Action::WriteZeroes { unmap: false } => {
                self.change(op, |access| access.write_zeroes(op.offset, op.len))?;
            }
            Action::WriteZeroes { unmap: true } => {
                self.discard(op, |access| access.discard_to_zero(op.offset, op.len))?;
            }
            Action::Discard => {
                self.discard(op, |access| access.discard_to_any(op.offset, op.len))?;
            }
        }
        if op.durable {
            self.access.flush()?;
            self.access.sync()?;
            // Not before the sync: who finds it unset writes durably in place.
            self.tables_changed.store(false, Ordering::Release);
        }
        Ok(Outcome::Done)
    }

    /// Opens the image once more: another program has written it.
    fn adopt(&mut self) -> Result<(), Qcow2Error> {
        let Self { options, files, .. } = self;
        let write = !options.read_only;
        let Opened { access, layers, .. } =
            Opened::open(options, Known::All(files.clone()), write)?;
        if access.size() != self.access.size() {
            let path = options.path.clone();
            return Err(DiskError::OtherwiseOpen { path }.into());
        }
        self.access = access;
        self.layers = layers;
        self.frozen = !write;
        // The other program has written its tables, and not synced them.
        self.tables_changed.store(write, Ordering::Release);
        Ok(())
    }

    /// Changes what is in a range. The map then knows nothing of the clusters in it, whether that succeeded or not.
    fn change(
        &mut self,
        op: &Op,
        change: impl FnOnce(&mut FormatAccess<Storage>) -> io::Result<()>,
    ) -> io::Result<()> {
        self.tables_changed.store(true, Ordering::Release);
        let changed = change(&mut self.access);
        let start = op.offset - op.offset % self.cluster;
        let end = op
            .offset
            .saturating_add(op.len)
            .next_multiple_of(self.cluster);
        self.map.forget(start, end.saturating_sub(start));
        changed
    }

    /// Gives clusters back: to the image, and their bytes to the file system.
    fn discard(
        &mut self,
        op: &Op,
        discard: impl FnOnce(&mut FormatAccess<Storage>) -> io::Result<()>,
    ) -> io::Result<()> {
        self.gate.close();
        // First the bytes: clusters that are given back may be taken at once, for what is zeroed in part.
        let given_back = self.clusters(op.offset, op.len).map(|clusters| {
            for (offset, len) in clusters {
                self.punch(offset, len);
            }
        });
        let discarded = given_back.and_then(|()| self.change(op, discard));
        self.gate.open();
        discarded
    }

    /// Where the whole clusters of a range are in the image's own file, as far as they belong to nobody else.
    fn clusters(&self, offset: u64, len: u64) -> io::Result<Vec<(u64, u64)>> {
        let mut at = offset.next_multiple_of(self.cluster);
        let end = offset.saturating_add(len);
        let end = end - end % self.cluster;
        let mut found = Vec::new();
        while at < end {
            let (mapping, run) = self.access.get_mapping(at, end.saturating_sub(at))?;
            let run = run - run % self.cluster;
            if let Mapping::Raw {
                storage,
                offset,
                writable: true,
                ..
            } = mapping
                && self.layer(storage) == Some(0)
                && run > 0
            {
                found.push((offset, run));
            }
            at = at.saturating_add(run.max(self.cluster));
        }
        Ok(found)
    }

    fn punch(&self, offset: u64, len: u64) {
        let (Ok(offset), Ok(len)) = (i64::try_from(offset), i64::try_from(len)) else {
            return;
        };
        let mode = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        if let Err(e) = fallocate(&self.file, mode, offset, len) {
            // The image has the cluster back all the same.
            debug!("the file system does not take a cluster back: {e}");
        }
    }

    /// Writes the tables, if they have changed. What is written is not on the disk before it is synced.
    fn flush(&self) -> io::Result<()> {
        if self.tables_changed.load(Ordering::Relaxed) {
            self.access.flush()?;
            // Only now: who finds it unset, syncs without coming here.
            self.tables_changed.store(false, Ordering::Release);
        }
        Ok(())
    }

    fn layer(&self, storage: &Storage) -> Option<u8> {
        let wanted = address(storage);
        self.layers
            .iter()
            .find(|(known, _)| *known == wanted)
            .map(|(_, layer)| *layer)
    }

    /// Enters into the map where a range is, and a little of what follows.
    fn look_up(&self, offset: u64, len: u64) -> io::Result<()> {
        let granule = self.map.granule();
        let capacity = self.access.size();
        let end = offset.saturating_add(len);
        let mut at = offset - offset % granule;
        while at < end {
            let beyond = end
                .saturating_sub(at)
                .saturating_add(LOOKAHEAD.saturating_mul(granule));
            let (mapping, run) = self.access.get_mapping(at, beyond)?;
            let (entry, len) = match mapping {
                Mapping::Zero { .. } => (Some(Entry::Zeroes), run),
                Mapping::Raw {
                    storage,
                    offset,
                    writable,
                    ..
                } => {
                    // What is beyond the end of the file reads as zeroes, and is for `imago` to make longer, which
                    // keeps account of the length.
                    let len = run.min(storage.size()?.saturating_sub(offset));
                    let layer = self.layer(storage);
                    // A cluster that is shared may be freed by a copy on write.
                    let stays = writable || self.frozen || layer != Some(0);
                    let entry = layer
                        .filter(|_| stays && offset.is_multiple_of(granule))
                        .map(|layer| Entry::Data {
                            layer,
                            offset,
                            writable: writable && !self.frozen,
                        });
                    (entry, len)
                }
                _ => (None, run),
            };
            let whole = if at.saturating_add(len) >= capacity {
                len.div_ceil(granule)
            } else {
                len / granule
            };
            if let Some(entry) = entry {
                for number in 0..whole {
                    let entry = match entry {
                        Entry::Zeroes => entry,
                        Entry::Data {
                            layer,
                            offset,
                            writable,
                        } => Entry::Data {
                            layer,
                            offset: offset.saturating_add(number.saturating_mul(granule)),
                            writable,
                        },
                    };
                    self.map.set((at / granule).saturating_add(number), entry);
                }
            }
            // What is not in one piece is left out.
            at = at.saturating_add(run.div_ceil(granule).max(1).saturating_mul(granule));
        }
        Ok(())
    }
}

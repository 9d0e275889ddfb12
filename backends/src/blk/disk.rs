//! The disk behind the device: an image file or a block device, opened, examined and locked; or nothing at all.

use std::fs::{self, File, Metadata, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use clap::ValueEnum;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use ringside_control::{ApiError, ErrorCode};
use serde_json::Value;
use thiserror::Error;
use tracing::{debug, warn};

use super::config::ZoneGeometry;
use super::device::{BlockDevice, Device};
use super::image::{
    Action, Image, Nbd, NbdError, QCOW2_MAGIC, Qcow2Error, Rbd, RbdError, RbdTarget, Side, Target,
};
use super::request::SECTOR;
use super::zones::Zones;
use crate::shell::{Drained, Parts, set_lock};

/// Most bytes to discard or zero at once, even if the storage would take more: other requests wait for it.
const MAX_RANGE: u64 = 1 << 30;
/// Most bytes to append to a zone at once. Appends are writes at the zone's pointer, for which the device has no limit.
const MAX_APPEND: u64 = 1 << 20;
/// How often to try to lock a disk.
const LOCK_INTERVAL: Duration = Duration::from_millis(20);

/// The disk cannot be used.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum DiskError {
    /// There is no such file.
    #[error("disk {path} does not exist; create it, for example with truncate --size 1G {path}")]
    Absent {
        /// The path.
        path: PathBuf,
    },
    /// It is a directory, a socket, a terminal…
    #[error(
        "disk {path} is neither a regular file nor a block device; give the path of a raw image or of a device"
    )]
    NotADisk {
        /// The path.
        path: PathBuf,
    },
    /// It may not be opened for writing.
    #[error("disk {path} cannot be opened for writing; use --read-only, or change its permissions")]
    NotWritable {
        /// The path.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// It cannot be opened.
    #[error("disk {path} cannot be opened")]
    Open {
        /// The path.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The file system has no direct I/O.
    #[error("disk {path}: its file system does not support --direct; leave it out")]
    NoDirect {
        /// The path.
        path: PathBuf,
    },
    /// It has no bytes.
    #[error("disk {path} is empty; give it a size, for example with truncate --size 1G")]
    Empty {
        /// The path.
        path: PathBuf,
    },
    /// Its size is not a whole number of blocks.
    #[error(
        "disk {path} has {size} bytes, which is not a multiple of the block size {block}; \
         enlarge it, for example with truncate --size %{block} {path}"
    )]
    Unaligned {
        /// The path.
        path: PathBuf,
        /// Its size in bytes.
        size: u64,
        /// The block size in bytes.
        block: u32,
    },
    /// The block size asked for is smaller than what the storage can do.
    #[error("disk {path} needs --block-size {needed} (with --direct, or on this device)")]
    BlockSize {
        /// The path.
        path: PathBuf,
        /// The smallest block size in bytes.
        needed: u32,
    },
    /// It is zoned, and cannot be written through the page cache.
    #[error(
        "disk {path} is a host-managed zoned device, which the page cache cannot write in order; use --direct, or --read-only"
    )]
    ZonedNeedsDirect {
        /// The path.
        path: PathBuf,
    },
    /// Its zones cannot be read.
    #[error("disk {path}: its zones cannot be read; does blkzone report {path} show them?")]
    Zones {
        /// The path.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// Another program uses it.
    #[error(
        "disk {path} is in use by another program (it holds a lock); two writers would destroy it; \
         end that program, or let both read only (--read-only)"
    )]
    Locked {
        /// The path.
        path: PathBuf,
    },
    /// It cannot be used in turns.
    #[error(
        "disk {path} cannot be used in turns (--lock running): that is for raw files and block devices without zones; of an \
         image's tables and of zones each program has its own copy in memory, and servers keep their own locks"
    )]
    NotInTurns {
        /// The path.
        path: PathBuf,
    },
    /// Another program has it open in another way than this one would.
    #[error(
        "disk {path} is another file now, or the other program has it open in another way: give both the same options"
    )]
    OtherwiseOpen {
        /// The path.
        path: PathBuf,
    },
    /// The image's format says no.
    #[error(transparent)]
    Qcow2(#[from] Box<Qcow2Error>),
    /// The server says no.
    #[error(transparent)]
    Nbd(#[from] Box<NbdError>),
    /// The cluster says no.
    #[error(transparent)]
    Rbd(#[from] Box<RbdError>),
    /// Its size cannot be found out.
    #[error("the size of {path} cannot be read")]
    Size {
        /// The path.
        path: PathBuf,
        /// What librbd said.
        #[source]
        source: io::Error,
    },
    /// A format in a cluster.
    #[error("{path}: an RBD image is served as it is; leave --format out")]
    FormatOfRbd {
        /// The path.
        path: PathBuf,
    },
    /// An image on a server.
    #[error(
        "{path}: an export is served as it is; let the server open the image, for example with qemu-nbd -f qcow2"
    )]
    FormatOfExport {
        /// The URI.
        path: PathBuf,
    },
}

/// What a disk's bytes mean.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// They are the disk's contents.
    Raw,
    /// A qcow2 image.
    Qcow2,
}

/// When a disk is locked against use by others.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Lock {
    /// As long as it is open.
    Always,
    /// While rings of a front-end run.
    Running,
}

/// A disk of another program, whose place this one takes.
#[derive(Debug, Clone)]
pub struct Taken {
    /// What it says about it.
    pub description: Value,
    /// Files, layer by layer; or connections.
    pub files: Vec<Arc<File>>,
}

impl From<Parts> for Taken {
    fn from(parts: Parts) -> Self {
        let files = parts.descriptors.into_iter();
        Self {
            description: parts.description,
            files: files.map(|file| Arc::new(file.into())).collect(),
        }
    }
}

/// How to open a disk.
#[derive(Debug, Clone)]
pub struct DiskOptions {
    /// What another program has open, and locked, if this one takes its place.
    pub taken: Option<Taken>,
    /// Where it is.
    pub path: PathBuf,
    /// Open it for reading only.
    pub read_only: bool,
    /// Bypass the host's page cache.
    pub direct: bool,
    /// Logical block size in bytes; chosen after the storage if not given.
    pub block_size: Option<u32>,
    /// When to lock it.
    pub lock: Lock,
    /// How long to wait for a lock that another program holds.
    pub lock_wait: Duration,
    /// What its bytes mean.
    pub format: Format,
    /// An image may have backing files.
    pub backing: bool,
    /// How long requests wait for a server that is gone.
    pub patience: Duration,
}

/// How much of a disk can be discarded, zeroed or erased at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ranges {
    /// Most bytes to discard; 0 if it is not possible.
    pub max_discard: u64,
    /// What is discarded or erased should be aligned to this many bytes.
    pub discard_align: u32,
    /// Most bytes to zero; 0 if it is not possible.
    pub max_write_zeroes: u64,
    /// Zeroing can give space back.
    pub zeroes_unmap: bool,
    /// Most bytes to erase securely; 0 if it is not possible.
    pub max_secure_erase: u64,
}

impl Ranges {
    /// Nothing is possible.
    pub(super) const NONE: Self = Self {
        max_discard: 0,
        discard_align: 0,
        max_write_zeroes: 0,
        zeroes_unmap: false,
        max_secure_erase: 0,
    };

    /// What is possible where nobody promises that nothing is left of what is erased; best done in multiples of a block.
    pub(super) fn of_blocks(block: u32) -> Self {
        Self {
            max_discard: MAX_RANGE,
            discard_align: block,
            max_write_zeroes: MAX_RANGE,
            zeroes_unmap: true,
            max_secure_erase: 0,
        }
    }

    /// What the request queue of a block device can do, in `block`s: `value` reads from its directory in sysfs.
    fn of_device(block: u32, erases: bool, value: impl Fn(&str) -> Option<u64>) -> Self {
        let most = |limit: Option<u64>| {
            let bytes = limit.unwrap_or(MAX_RANGE).min(MAX_RANGE);
            bytes - bytes % u64::from(block.max(1))
        };
        let by_itself = most(value("write_zeroes_max_bytes"));
        Self {
            max_discard: most(value("discard_max_bytes")),
            discard_align: value("discard_granularity")
                .and_then(|size| u32::try_from(size).ok())
                .unwrap_or(0)
                .next_multiple_of(block.max(1))
                .max(block),
            // What the device cannot do by itself is written.
            max_write_zeroes: if by_itself > 0 { by_itself } else { MAX_RANGE },
            zeroes_unmap: by_itself > 0,
            max_secure_erase: if erases { MAX_RANGE } else { 0 },
        }
    }
}

/// A disk that is open, locked and examined.
#[derive(Debug)]
pub struct Disk {
    /// Where its contents are.
    pub source: Source,
    /// Where it is.
    pub path: PathBuf,
    /// Size in bytes, a multiple of `block_size`.
    pub capacity: u64,
    /// Logical block size in bytes.
    pub block_size: u32,
    /// Physical block size in bytes.
    pub physical_block_size: u32,
    /// Best transfer size in bytes, or 0.
    pub opt_io: u32,
    /// What can be done to ranges.
    pub ranges: Ranges,
    /// Its zones, if it is a host-managed zoned device, and what a driver is told about them.
    pub(super) zones: Option<(Arc<Zones>, ZoneGeometry)>,
    /// What it can do besides, if it is in a block device as it is.
    pub(super) device: Option<Arc<dyn BlockDevice>>,
    /// Transfers must be aligned to this many bytes; 1 if any will do.
    pub align: u32,
    /// Buffers must be aligned to this many bytes; 1 if any will do.
    pub memory_align: u32,
}

/// Where a disk's contents are.
#[derive(Debug)]
pub enum Source {
    /// In a file, which is open and locked as long as it is.
    Raw(Arc<File>),
    /// In a qcow2 image.
    Qcow2(Image),
    /// On an NBD server.
    Nbd(Nbd),
    /// In a Ceph cluster.
    Rbd(Rbd),
}

impl Source {
    /// The files that io_uring reads and writes: number 0 is the one that is written.
    pub(super) fn files(&self) -> Vec<Arc<File>> {
        match self {
            Self::Raw(file) => vec![Arc::clone(file)],
            Self::Qcow2(image) => image.files().to_vec(),
            Self::Nbd(_) | Self::Rbd(_) => Vec::new(),
        }
    }

    /// What a worker needs besides its io_uring.
    ///
    /// # Errors
    /// What the system said.
    pub(super) fn attach(&mut self) -> io::Result<Option<Side>> {
        match self {
            Self::Raw(_) => Ok(None),
            Self::Qcow2(image) => image.attach().map(Some),
            Self::Nbd(nbd) => nbd.attach().map(Some),
            Self::Rbd(rbd) => rbd.attach().map(Some),
        }
    }

    /// What makes durable all that was written, once nothing is in flight.
    ///
    /// # Errors
    /// What the system said.
    pub(super) fn flush(&self) -> io::Result<Drained> {
        match self {
            Self::Raw(file) => {
                let file = Arc::clone(file);
                Ok(Box::new(move || file.sync_all()))
            }
            Self::Qcow2(image) => {
                let (link, file) = (image.link()?, image.files().first().cloned());
                Ok(Box::new(move || {
                    link.flush()?;
                    file.map_or(Ok(()), |file| file.sync_all())
                }))
            }
            Self::Nbd(nbd) => {
                let link = nbd.link()?;
                Ok(Box::new(move || link.flush()))
            }
            Self::Rbd(rbd) => {
                let link = rbd.link()?;
                Ok(Box::new(move || link.flush()))
            }
        }
    }

    /// What another program opens the same disk by.
    ///
    /// # Errors
    /// Why it cannot be had by another program.
    pub(super) fn parts(&self) -> Result<Parts, ApiError> {
        let failed = |error: io::Error| ApiError::new(ErrorCode::Failed, &error);
        let files = match self {
            Self::Raw(file) => std::slice::from_ref(file),
            Self::Qcow2(image) => image.files(),
            Self::Nbd(nbd) => return nbd.parts().map_err(failed),
            Self::Rbd(_) => {
                let message = "an RBD image cannot go over to another program: end this one, and start the other; the guest \
                     waits for it if its VMM reconnects";
                return Err(ApiError::of(ErrorCode::Conflict, message));
            }
        };
        let clones = files.iter().map(|file| Ok(file.try_clone()?.into()));
        let descriptors: io::Result<_> = clones.collect();
        Ok(Parts {
            description: Value::Null,
            descriptors: descriptors.map_err(failed)?,
        })
    }

    /// Nothing is in flight, and another program is to go on: what it is to find in files is written, and connections are left
    /// alone.
    ///
    /// # Errors
    /// What the companion, or the system, said.
    pub(super) fn leave(&self) -> io::Result<()> {
        match self {
            Self::Qcow2(image) => image.link()?.have(Action::Leave),
            Self::Nbd(nbd) => nbd.leave(),
            Self::Raw(_) | Self::Rbd(_) => Ok(()),
        }
    }

    /// Goes on with what another program has left.
    ///
    /// # Errors
    /// What the companion, or the system, said.
    pub(super) fn adopt(&self) -> io::Result<()> {
        match self {
            Self::Qcow2(image) => image.link()?.have(Action::Adopt),
            Self::Raw(_) | Self::Nbd(_) | Self::Rbd(_) => Ok(()),
        }
    }

    /// Discarding and zeroing are possible.
    pub(super) fn ranges(&self) -> bool {
        match self {
            Self::Raw(_) | Self::Rbd(_) => true,
            Self::Qcow2(image) => image.ranges(),
            Self::Nbd(nbd) => nbd.ranges(),
        }
    }
}

impl Disk {
    /// Opens, examines and locks a disk.
    ///
    /// # Errors
    /// [`DiskError`]
    pub fn open(options: &DiskOptions) -> Result<Self, DiskError> {
        let disk = Self::find(options)?;
        let in_turns = matches!(disk.source, Source::Raw(_)) && disk.zones.is_none();
        if options.lock == Lock::Running && !in_turns {
            let path = disk.path;
            return Err(DiskError::NotInTurns { path });
        }
        Ok(disk)
    }

    fn find(options: &DiskOptions) -> Result<Self, DiskError> {
        let path = &options.path;
        if let Some(target) = Target::parse(path) {
            let target = target.map_err(NbdError::from).map_err(Box::new)?;
            return Self::connect(options, target);
        }
        if let Some(target) = RbdTarget::parse(path) {
            let target = target.map_err(RbdError::from).map_err(Box::new)?;
            return Self::of_cluster(options, &target);
        }
        let file = open_layer(options, 0)?;
        let meta = file.metadata().map_err(|source| DiskError::Open {
            path: path.clone(),
            source,
        })?;
        let storage = Storage::examine(&meta, meta.file_type().is_block_device());
        let align = if options.direct {
            direct_alignment(&file, storage.logical).max(storage.logical)
        } else {
            1
        };
        let needed = storage.logical.max(align);
        let block_size = options.block_size.unwrap_or(needed);
        if block_size < needed {
            return Err(DiskError::BlockSize {
                path: path.clone(),
                needed,
            });
        }
        let device = match (options.format, &storage.queue) {
            (Format::Raw, Some(_)) => Some(Device::new(Arc::clone(&file))),
            _ => None,
        };
        let (capacity, source) = match options.format {
            Format::Raw => (capacity(&file, path, block_size)?, Source::Raw(file)),
            Format::Qcow2 => {
                let image = Image::open(options, file).map_err(Box::new)?;
                let capacity = in_blocks(image.capacity(), path, block_size)?;
                (capacity, Source::Qcow2(image))
            }
        };
        let zones = match (&device, &storage.zones) {
            (Some(device), Some(geometry)) if options.direct || options.read_only => {
                let zones =
                    Zones::read(device, geometry, capacity).map_err(|source| DiskError::Zones {
                        path: path.clone(),
                        source,
                    })?;
                Some((Arc::new(zones), *geometry))
            }
            (_, Some(_)) => return Err(DiskError::ZonedNeedsDirect { path: path.clone() }),
            (_, None) => None,
        };
        let physical_block_size = storage.physical.max(block_size);
        let ranges = match (&device, &storage.queue) {
            // To a zone that is written sequentially, only a reset gives space back (VIRTIO 1.3, 5.2.5.1).
            _ if zones.is_some() => Ranges::NONE,
            (Some(device), Some(queue)) => {
                let erases = !options.read_only && device.erases_securely();
                Ranges::of_device(block_size, erases, |name| attribute(queue, name))
            }
            _ if source.ranges() => Ranges::of_blocks(physical_block_size),
            _ => Ranges::NONE,
        };
        Ok(Self {
            capacity,
            path: path.clone(),
            source,
            zones,
            ranges,
            device: device.map(|device| -> Arc<dyn BlockDevice> { Arc::new(device) }),
            block_size,
            physical_block_size,
            opt_io: storage.opt_io,
            align,
            memory_align: align,
        })
    }

    fn connect(options: &DiskOptions, target: Target) -> Result<Self, DiskError> {
        let path = &options.path;
        if options.format != Format::Raw {
            return Err(DiskError::FormatOfExport { path: path.clone() });
        }
        let (read_only, patience) = (options.read_only, options.patience);
        let nbd = match &options.taken {
            Some(Taken { description, files }) => {
                let clones = files.iter().map(|socket| socket.try_clone());
                let sockets = clones.collect::<io::Result<_>>();
                let sockets = sockets.map_err(|source| DiskError::Open {
                    path: path.clone(),
                    source,
                })?;
                Nbd::adopt(target, description, sockets, read_only, patience)
            }
            None => Nbd::open(target, read_only, patience),
        };
        let nbd = nbd.map_err(Box::new)?;
        let sector = u32::try_from(SECTOR).unwrap_or(512);
        let needed = nbd.min_block().max(sector);
        let block_size = options.block_size.unwrap_or(needed);
        if block_size < needed || needed > 4096 {
            return Err(DiskError::BlockSize {
                path: path.clone(),
                needed,
            });
        }
        let physical_block_size = physical(nbd.preferred_block(), block_size);
        Ok(Self {
            capacity: in_blocks(nbd.capacity(), path, block_size)?,
            path: path.clone(),
            zones: None,
            ranges: if nbd.ranges() {
                Ranges::of_blocks(physical_block_size)
            } else {
                Ranges::NONE
            },
            device: None,
            block_size,
            physical_block_size,
            opt_io: 0,
            align: nbd.min_block(),
            memory_align: 1,
            source: Source::Nbd(nbd),
        })
    }
}

impl Disk {
    fn of_cluster(options: &DiskOptions, target: &RbdTarget) -> Result<Self, DiskError> {
        let path = &options.path;
        if options.format != Format::Raw {
            return Err(DiskError::FormatOfRbd { path: path.clone() });
        }
        let rbd = Rbd::open(target, options.read_only, options.patience).map_err(Box::new)?;
        let sector = u32::try_from(SECTOR).unwrap_or(512);
        let block_size = options.block_size.unwrap_or(sector);
        // What guests align their file systems to.
        let physical_block_size = block_size.max(4096);
        let ranges = Ranges {
            discard_align: rbd.discard_align(),
            ..Ranges::of_blocks(physical_block_size)
        };
        Ok(Self {
            capacity: size_of(&rbd, path, block_size)?,
            path: path.clone(),
            zones: None,
            ranges,
            device: None,
            block_size,
            physical_block_size,
            opt_io: rbd.discard_align(),
            align: 1,
            memory_align: 1,
            source: Source::Rbd(rbd),
        })
    }
}

/// The block that a server prefers, if it can be a disk's.
fn physical(preferred: u32, block: u32) -> u32 {
    if preferred.is_power_of_two() && (block..=1 << 20).contains(&preferred) {
        preferred
    } else {
        block
    }
}

/// The size of an open disk in bytes, which must be some, in whole blocks.
pub(super) fn capacity(file: &File, path: &Path, block: u32) -> Result<u64, DiskError> {
    let path = || path.to_owned();
    // The size of a block device is where its end is, too. Nothing else uses the file's position.
    let mut file = file;
    let size = file
        .seek(SeekFrom::End(0))
        .map_err(|source| DiskError::Open {
            path: path(),
            source,
        })?;
    in_blocks(size, &path(), block)
}

/// The size of an image of a cluster in bytes, which must be some, in whole blocks.
pub(super) fn size_of(rbd: &Rbd, path: &Path, block: u32) -> Result<u64, DiskError> {
    let size = rbd.size().map_err(|source| DiskError::Size {
        path: path.to_owned(),
        source,
    })?;
    in_blocks(size, path, block)
}

fn in_blocks(size: u64, path: &Path, block: u32) -> Result<u64, DiskError> {
    let path = path.to_owned();
    if size == 0 {
        return Err(DiskError::Empty { path });
    }
    if !size.is_multiple_of(u64::from(block)) {
        return Err(DiskError::Unaligned { path, size, block });
    }
    Ok(size)
}

/// Whether a file begins as a qcow2 image does. It may be a raw disk all the same: a guest can make anything of
/// the disk that it writes.
pub(super) fn looks_like_qcow2(file: &File) -> bool {
    let mut start = AlignedBlock::default();
    file.read_at(start.bytes(), 0).is_ok() && start.bytes().starts_with(&QCOW2_MAGIC)
}

/// Opens a file or device, and locks it.
fn open_locked(options: &DiskOptions) -> Result<File, DiskError> {
    let path = &options.path;
    let meta = fs::metadata(path).map_err(|source| match source.kind() {
        io::ErrorKind::NotFound => DiskError::Absent { path: path.clone() },
        _ => DiskError::Open {
            path: path.clone(),
            source,
        },
    })?;
    if !meta.file_type().is_block_device() && !meta.is_file() {
        return Err(DiskError::NotADisk { path: path.clone() });
    }
    let file = open(options)?;
    if options.lock == Lock::Always {
        lock(&file, path, options.read_only, options.lock_wait)?;
    }
    Ok(file)
}

/// A file of the disk: the first one, or the backing file of the one before. Opens and locks it, or takes it from another program.
pub(super) fn open_layer(options: &DiskOptions, number: usize) -> Result<Arc<File>, DiskError> {
    match &options.taken {
        Some(Taken { files, .. }) => match files.get(number) {
            Some(file) => adopt(options, file),
            None => Err(DiskError::OtherwiseOpen {
                path: options.path.clone(),
            }),
        },
        None => Ok(Arc::new(open_locked(options)?)),
    }
}

/// Goes on with the file of another program, whose lock belongs to it, if it is what these options open.
fn adopt(options: &DiskOptions, file: &Arc<File>) -> Result<Arc<File>, DiskError> {
    let path = || options.path.clone();
    let failed = |source| DiskError::Open {
        path: path(),
        source,
    };
    let (here, there) = (
        fs::metadata(&options.path).map_err(failed)?,
        file.metadata().map_err(failed)?,
    );
    let flags = fcntl(file, FcntlArg::F_GETFL).map_err(|errno| failed(errno.into()))?;
    let access = match options.read_only {
        true => libc::O_RDONLY,
        false => libc::O_RDWR,
    };
    let same_file = (here.dev(), here.ino()) == (there.dev(), there.ino());
    let direct = flags & libc::O_DIRECT != 0;
    if !same_file || flags & libc::O_ACCMODE != access || direct != options.direct {
        return Err(DiskError::OtherwiseOpen { path: path() });
    }
    Ok(Arc::clone(file))
}

fn open(options: &DiskOptions) -> Result<File, DiskError> {
    let path = options.path.clone();
    let mut flags = libc::O_CLOEXEC;
    if options.direct {
        flags |= libc::O_DIRECT;
    }
    OpenOptions::new()
        .read(true)
        .write(!options.read_only)
        .custom_flags(flags)
        .open(&path)
        .map_err(|source| match source.raw_os_error().map(Errno::from_raw) {
            Some(Errno::EINVAL) if options.direct => DiskError::NoDirect { path },
            Some(Errno::EACCES | Errno::EPERM | Errno::EROFS) if !options.read_only => {
                DiskError::NotWritable { path, source }
            }
            _ => DiskError::Open { path, source },
        })
}

/// Locks the disk for as long as it is open: one writer, or readers. The lock is an open file description lock
/// as QEMU takes them too; a reader leaves out the bytes 100 and beyond, by which QEMU's readers and writers
/// find each other, so that it can share an image with them.
pub(super) fn lock(
    file: &File,
    path: &Path,
    read_only: bool,
    patience: Duration,
) -> Result<(), DiskError> {
    let (kind, len) = if read_only {
        (libc::F_RDLCK, 100)
    } else {
        (libc::F_WRLCK, 0) // to the end, wherever it will be
    };
    let mut patience = patience;
    loop {
        match set_lock(file, kind, len) {
            Ok(()) => return Ok(()),
            // A program that was killed a moment ago has its lock until the kernel has torn down its io_uring.
            Err(Errno::EAGAIN | Errno::EACCES) if patience > Duration::ZERO => {
                thread::sleep(LOCK_INTERVAL);
                patience = patience.saturating_sub(LOCK_INTERVAL);
            }
            Err(Errno::EAGAIN | Errno::EACCES) => {
                return Err(DiskError::Locked {
                    path: path.to_owned(),
                });
            }
            Err(e) => {
                warn!(
                    "disk {} cannot be locked against use by others: {e}",
                    path.display()
                );
                return Ok(());
            }
        }
    }
}

/// Gives the lock back at once. Closing the file does it too, but only when no io_uring has it any more, which the
/// kernel finds out some time after the ring is closed.
pub(super) fn unlock(file: &File) {
    if let Err(e) = set_lock(file, libc::F_UNLCK, 0) {
        debug!("the disk's lock cannot be given back: {e}");
    }
}

/// What the storage under a file is like, in bytes.
struct Storage {
    logical: u32,
    physical: u32,
    opt_io: u32,
    zones: Option<ZoneGeometry>,
    /// Where sysfs describes it, if it is a block device.
    queue: Option<PathBuf>,
}

impl Storage {
    fn examine(meta: &Metadata, device: bool) -> Self {
        let sector = u32::try_from(SECTOR).unwrap_or(512);
        if device {
            let queue = queue_directory(meta.rdev());
            let value = |name: &str| -> Option<u32> {
                attribute(queue.as_ref()?, name).and_then(|value| u32::try_from(value).ok())
            };
            let logical = value("logical_block_size").unwrap_or(sector);
            let physical = value("physical_block_size").unwrap_or(logical);
            return Self {
                logical,
                physical,
                opt_io: value("optimal_io_size").unwrap_or(0),
                zones: queue.as_deref().and_then(|queue| zones_of(queue, physical)),
                queue,
            };
        }
        // The file system's block, so that guests align their partitions to it.
        let block = u32::try_from(meta.blksize()).unwrap_or(4096).min(4096);
        Self {
            logical: sector,
            physical: if block.is_power_of_two() {
                block.max(sector)
            } else {
                sector
            },
            opt_io: 0,
            zones: None,
            queue: None,
        }
    }
}

/// The zones of a host-managed device, whose request queue sysfs describes in a directory. A host-aware device may be
/// written anywhere, and is served as one without zones.
fn zones_of(queue: &Path, physical: u32) -> Option<ZoneGeometry> {
    let model = fs::read_to_string(queue.join("zoned")).ok()?;
    if model.trim() != "host-managed" {
        return None;
    }
    let number = |name: &str| attribute(queue, name).and_then(|value| u32::try_from(value).ok());
    let size = attribute(queue, "chunk_sectors")
        .filter(|&sectors| sectors > 0)?
        .checked_mul(SECTOR)?;
    Some(ZoneGeometry {
        size,
        max_open: number("max_open_zones").unwrap_or(0),
        max_active: number("max_active_zones").unwrap_or(0),
        max_append: size.min(MAX_APPEND),
        write_granularity: number("zone_write_granularity")
            .filter(|&bytes| bytes > 0)
            .unwrap_or(physical),
    })
}

/// A number in a directory of sysfs.
fn attribute(directory: &Path, name: &str) -> Option<u64> {
    let text = fs::read_to_string(directory.join(name)).ok()?;
    text.trim().parse().ok()
}

/// Where sysfs describes the request queue of a block device; for a partition, that of the whole disk.
fn queue_directory(rdev: u64) -> Option<PathBuf> {
    let (major, minor) = (nix::sys::stat::major(rdev), nix::sys::stat::minor(rdev));
    let device = Path::new("/sys/dev/block").join(format!("{major}:{minor}"));
    ["queue", "../queue"]
        .iter()
        .map(|sub| device.join(sub))
        .find(|dir| dir.is_dir())
}

/// A block that direct I/O can fill.
#[derive(Debug)]
#[repr(align(4096))]
pub(super) struct AlignedBlock([u8; 4096]);

impl Default for AlignedBlock {
    fn default() -> Self {
        Self([0; 4096])
    }
}

impl AlignedBlock {
    pub(super) fn bytes(&mut self) -> &mut [u8] {
        &mut self.0
    }
}

/// The alignment that direct I/O needs: found by trying.
fn direct_alignment(file: &File, logical: u32) -> u32 {
    let mut block = AlignedBlock::default();
    let len = usize::try_from(logical).unwrap_or(usize::MAX);
    let Some(aligned) = block.bytes().get_mut(..len) else {
        return 4096;
    };
    match file.read_at(aligned, u64::from(logical)) {
        Err(e) if e.raw_os_error() == Some(libc::EINVAL) => 4096,
        _ => logical,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn options(path: &Path) -> DiskOptions {
        DiskOptions {
            taken: None,
            path: path.to_owned(),
            read_only: false,
            direct: false,
            block_size: None,
            lock: Lock::Always,
            lock_wait: Duration::ZERO,
            format: Format::Raw,
            backing: true,
            patience: Duration::ZERO,
        }
    }

    fn image(len: u64) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(len).unwrap();
        file
    }

    #[test]
    fn opens_an_image() {
        let file = image(1 << 20);
        let disk = Disk::open(&options(file.path())).unwrap();
        assert_eq!((disk.capacity, disk.block_size), (1 << 20, 512));
        assert!(disk.physical_block_size >= 512);
    }

    #[test]
    fn each_thing_that_is_no_disk_has_its_error() {
        let dir = tempfile::tempdir().unwrap();
        let open = |path: &Path| Disk::open(&options(path)).map(|_| ());
        assert!(matches!(
            open(&dir.path().join("none")),
            Err(DiskError::Absent { .. })
        ));
        assert!(matches!(open(dir.path()), Err(DiskError::NotADisk { .. })));
        assert!(matches!(
            open(Path::new("/dev/null")),
            Err(DiskError::NotADisk { .. })
        ));
        assert!(matches!(
            open(image(0).path()),
            Err(DiskError::Empty { .. })
        ));
        assert!(matches!(
            open(image(1000).path()),
            Err(DiskError::Unaligned { size: 1000, .. })
        ));
        let mut big_blocks = options(dir.path());
        let file = image(4096 + 512);
        big_blocks.path = file.path().to_owned();
        big_blocks.block_size = Some(4096);
        assert!(matches!(
            Disk::open(&big_blocks),
            Err(DiskError::Unaligned { block: 4096, .. })
        ));
    }

    #[test]
    fn ranges_are_what_the_device_can_do() {
        let device = |erases, values: &[(&str, u64)]| {
            let values = values.to_vec();
            Ranges::of_device(4096, erases, move |name| {
                values.iter().find(|(n, _)| *n == name).map(|(_, v)| *v)
            })
        };
        let able = device(
            true,
            &[
                ("discard_max_bytes", (1 << 20) + 512),
                ("discard_granularity", 6000),
                ("write_zeroes_max_bytes", 1 << 40),
            ],
        );
        let expected = Ranges {
            max_discard: 1 << 20,
            discard_align: 8192,
            max_write_zeroes: MAX_RANGE,
            zeroes_unmap: true,
            max_secure_erase: MAX_RANGE,
        };
        assert_eq!(able, expected);
        let unable = device(
            false,
            &[
                ("discard_max_bytes", 0),
                ("discard_granularity", 0),
                ("write_zeroes_max_bytes", 0),
            ],
        );
        let expected = Ranges {
            max_discard: 0,
            discard_align: 4096,
            max_write_zeroes: MAX_RANGE,
            zeroes_unmap: false,
            max_secure_erase: 0,
        };
        assert_eq!(unable, expected);
        let unknown = device(false, &[]);
        assert_eq!(
            (unknown.max_discard, unknown.max_write_zeroes),
            (MAX_RANGE, MAX_RANGE)
        );
    }

    #[test]
    fn one_writer_or_many_readers() {
        let mut file = image(4096);
        file.write_all(b"x").unwrap();
        let write = options(file.path());
        let read = DiskOptions {
            read_only: true,
            ..write.clone()
        };
        let writer = Disk::open(&write).unwrap();
        assert!(matches!(Disk::open(&write), Err(DiskError::Locked { .. })));
        assert!(matches!(Disk::open(&read), Err(DiskError::Locked { .. })));
        drop(writer);
        let _one = Disk::open(&read).unwrap();
        let _two = Disk::open(&read).unwrap();
        assert!(matches!(Disk::open(&write), Err(DiskError::Locked { .. })));
    }
}

//! Machines that go on elsewhere: a snapshot, and how a machine is made of it.
//!
//! | module | concern |
//! | --- | --- |
//! | [`dirty`] | which pages are written while a guest moves |
//! | [`transport`] | the connection over which it does |
//! | [`stream`] | the format: sections with lengths and checksums |
//! | [`memory`] | guest memory in it |
//! | [`cpu`] | the state of processors, and of what KVM keeps for the machine |
//!
//! ```text
//! pause the processors ─▶ stop the queues ─▶ write description, memory, state ─▶ start the queues, let the processors go on
//!
//! read the description: is it such a machine? ─▶ devices connect ─▶ memory ─▶ state: controllers, processors, PCI functions
//!     ─▶ start the queues, let the processors go on
//! ```
//!
//! A guest that moves while it runs ([`Departure`]) takes the same way over a connection: memory comes several times, all of it
//! first and then what was written meanwhile, until so little is left that the guest can stand still for it.
//!
//! What a snapshot says is not believed: a machine is built from the options as ever, and takes over only what a guest could
//! have written to its registers itself.

pub mod cpu;
pub mod dirty;
pub mod memory;
pub mod stream;
pub mod transport;

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, BufReader, BufWriter, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use kvm_bindings::kvm_cpuid_entry2;
use ringside_control::Size;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use vm_memory::GuestMemoryMmap;

use self::cpu::{ChipState, CpuState};
use self::dirty::{DirtyLog, Pages};
use self::stream::{Kind, Reader, Writer};
use self::transport::{Address, Connection};
use crate::config::DeviceType;
use crate::devices::PlatformState;
use crate::kvm::{self, Vm};
use crate::pci::FunctionState;

/// Why there is no snapshot, or no machine made of one.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No such file, or no right to it.
    #[error("cannot open the snapshot {path}")]
    Open {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        #[source]
        source: io::Error,
    },
    /// A name that leads elsewhere.
    #[error("`{0}` is no name for a snapshot: give one without `/` that does not begin with a dot")]
    Name(String),
    /// One that is there already is somebody's.
    #[error("there is a snapshot `{0}` already: give another name, or remove it first")]
    Exists(String),
    /// Another VMM is about to write one of this name.
    #[error(
        "another VMM writes the snapshot {0:?} into that folder: wait for it, or take another name"
    )]
    Busy(String),
    /// There is none, or no right to it.
    #[error("cannot open the folder for snapshots, {path}: it must be there, and a directory")]
    Folder {
        /// The folder.
        path: PathBuf,
        /// The system's reason.
        #[source]
        source: io::Error,
    },
    /// The folder.
    #[error("cannot create the snapshot {path}")]
    Create {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        #[source]
        source: io::Error,
    },
    /// The disk is full, most likely.
    #[error("cannot write the snapshot")]
    Write(#[source] io::Error),
    /// It cannot be read.
    #[error("cannot read the snapshot")]
    Read(#[source] io::Error),
    /// Guest memory cannot be read.
    #[error("cannot read guest memory")]
    Memory(#[source] io::Error),
    /// Another file.
    #[error("this is no snapshot of ringside-vmm")]
    Foreign,
    /// Of another VMM.
    #[error(
        "the snapshot has version {found}, but this VMM reads version {}: use the VMM that wrote it",
        stream::VERSION
    )]
    Version {
        /// The version it has.
        found: u32,
    },
    /// It was not written to its end.
    #[error("the snapshot is cut short: it was not written to its end, or not copied as a whole")]
    CutShort,
    /// A checksum is wrong, or what it belongs to makes no sense.
    #[error("the snapshot is damaged: take another copy of it")]
    Damaged,
    /// A section of it cannot be read.
    #[error("the snapshot is damaged: {section} makes no sense")]
    Nonsense {
        /// Which one.
        section: &'static str,
        /// Why.
        #[source]
        source: serde_json::Error,
    },
    /// A state that has no room.
    #[error("a section of {length} bytes is longer than a snapshot can have, {limit}")]
    TooLong {
        /// Bytes of it.
        length: usize,
        /// Bytes at most.
        limit: usize,
    },
    /// Memory that this machine does not have.
    #[error("the snapshot is damaged: it has memory at {address:#x}, where the guest has none")]
    Place {
        /// Guest-physical address.
        address: u64,
    },
    /// Another machine.
    #[error(
        "the snapshot is of a machine with {saved}, but this one has {ours}: start it with the same options"
    )]
    Mismatch {
        /// What the guest had.
        saved: String,
        /// What it would have.
        ours: String,
    },
    /// Other processors.
    #[error(
        "this host's processors lack what the guest was shown (CPUID {function:#x}, {register}: bits {missing:#x}): restore it on a host of the same kind"
    )]
    Cpuid {
        /// The leaf.
        function: u32,
        /// The register.
        register: &'static str,
        /// The features that are not there.
        missing: u32,
    },
    /// A back-end that is not like the one before.
    #[error("the back-end at {} cannot serve the snapshot's device: {what}; start it with the same options", socket.display())]
    BackEnd {
        /// Its socket.
        socket: PathBuf,
        /// What is other.
        what: String,
    },
    /// A device's own reason.
    #[error("device {device} cannot take over the snapshot's state: {why}")]
    Device {
        /// Which one, by its place on the bus.
        device: String,
        /// What is wrong.
        why: String,
    },
    /// A device does not let go.
    #[error("the state of device {device} cannot be saved: {why}")]
    Unsaved {
        /// Which one, by its place on the bus.
        device: String,
        /// What is wrong.
        why: String,
    },
    /// The other VMM cannot be reached.
    #[error("cannot connect to {address}: does a ringside-vmm wait there (--incoming)?")]
    Connect {
        /// Where it should be.
        address: Address,
        /// The system's reason.
        #[source]
        source: io::Error,
    },
    /// There is no place for a guest to come to.
    #[error("cannot wait for a guest at {address}")]
    Listen {
        /// Where it should come.
        address: Address,
        /// The system's reason.
        #[source]
        source: io::Error,
    },
    /// The other VMM does not want it, or is gone.
    #[error("the other VMM does not take the guest, which stays here: its log says why")]
    Declined(#[source] io::Error),
    /// Nobody knows where the guest is.
    #[error(
        "the other VMM was told to run the guest, and has not said that it does: the guest is paused here; if it does not run there, `resume` it, else `power-off`"
    )]
    Doubt(#[source] io::Error),
    /// It was given up.
    #[error("the VMM that has the guest keeps it")]
    Kept(#[source] io::Error),
    /// No memory to note what is written.
    #[error("cannot note which pages are written")]
    Log(#[source] io::Error),
    /// What is written cannot be noted.
    #[error(transparent)]
    Kvm(#[from] kvm::Error),
    /// Processors.
    #[error(transparent)]
    Cpu(#[from] cpu::Error),
}

impl Error {
    /// The same, where a guest is sent over a connection: it has not gone.
    #[must_use]
    pub fn of_departure(self) -> Self {
        match self {
            Self::Write(source) => Self::Declined(source),
            other => other,
        }
    }

    /// The same, where a guest comes over a connection: it has not come.
    #[must_use]
    pub fn of_arrival(self) -> Self {
        match self {
            Self::CutShort => Self::Kept(io::ErrorKind::UnexpectedEof.into()),
            Self::Read(source) => Self::Kept(source),
            other => other,
        }
    }
}

/// What a machine is: all that must be the same where it goes on.
#[derive(Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Description {
    /// The VMM that wrote it, for people.
    pub program: String,
    /// Number of processors.
    pub cpus: u8,
    /// Bytes of memory it was started with.
    pub memory: u64,
    /// How far that can grow, in bytes.
    pub memory_max: u64,
    /// Bytes of each piece that was added.
    pub pieces: Vec<u64>,
    /// Number of root ports.
    pub ports: usize,
    /// Its devices, in order.
    pub devices: Vec<DeviceDescription>,
    /// What its processors are shown.
    pub cpuid: Vec<kvm_cpuid_entry2>,
    /// Their local APICs' timers can wait for a value of the time stamp counter.
    pub tsc_deadline: bool,
}

/// What a device of a back-end is.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct DeviceDescription {
    /// The virtio device ID.
    pub device_type: u16,
    /// The features that the guest was offered.
    pub features: u64,
    /// The size limit of each queue.
    pub queues: Vec<u16>,
}

impl DeviceDescription {
    /// The device that the guest has had, served by what is at `socket`: more features than the guest was offered do no harm.
    ///
    /// # Errors
    /// [`Error::BackEnd`]
    pub fn served_by(&self, ours: Self, socket: &Path) -> Result<Self, Error> {
        let lacks = |what: String| Error::BackEnd {
            socket: socket.to_owned(),
            what,
        };
        let missing = self.features & !ours.features;
        if missing != 0 {
            return Err(lacks(format!("it lacks features ({missing:#x})")));
        }
        if self.queues != ours.queues {
            let count = |queues: &[u16]| {
                let size = queues.first().copied().unwrap_or_default();
                format!("{} queues of {size}", queues.len())
            };
            let (theirs, ours) = (count(&self.queues), count(&ours.queues));
            return Err(lacks(format!("the guest had {theirs}, and it has {ours}")));
        }
        Ok(self.clone())
    }
}

impl Description {
    /// Whether such a machine is what the options ask for. Devices are compared when they are connected.
    ///
    /// # Errors
    /// [`Error::Mismatch`]
    pub fn check(&self, ours: &Machine) -> Result<(), Error> {
        let kinds = |types: &[u16]| {
            let names = types.iter().map(|id| DeviceType(*id).to_string());
            names.collect::<Vec<_>>().join(", ")
        };
        let types: Vec<_> = self.devices.iter().map(|d| d.device_type).collect();
        let rows = [
            (format!("{} CPUs", self.cpus), format!("{} CPUs", ours.cpus)),
            (
                format!("{} of memory", Size(self.memory)),
                format!("{} of memory", Size(ours.memory)),
            ),
            (
                format!("memory max={}", Size(self.memory_max)),
                format!("memory max={}", Size(ours.memory_max)),
            ),
            (
                format!("{} hot-plug slots", self.ports),
                format!("{} hot-plug slots", ours.ports),
            ),
            (
                format!("these devices: {}", kinds(&types)),
                format!("these: {}", kinds(&ours.devices)),
            ),
        ];
        let same = [
            self.cpus == ours.cpus,
            self.memory == ours.memory,
            self.memory_max == ours.memory_max,
            self.ports == ours.ports,
            types == ours.devices,
        ];
        match rows.into_iter().zip(same).find(|(_, same)| !same) {
            Some(((saved, ours), _)) => Err(Error::Mismatch { saved, ours }),
            None => Ok(()),
        }
    }
}

/// The machine that the options ask for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Machine {
    /// Number of processors.
    pub cpus: u8,
    /// Bytes of memory it starts with.
    pub memory: u64,
    /// How far that can grow, in bytes.
    pub memory_max: u64,
    /// Number of root ports.
    pub ports: usize,
    /// Types of its devices.
    pub devices: Vec<u16>,
}

/// What a machine does.
#[derive(Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct State {
    /// Its processors.
    pub cpus: Vec<CpuState>,
    /// What KVM keeps for all of them.
    pub chips: ChipState,
    /// The platform's devices.
    pub platform: PlatformState,
    /// The functions of bus 0, in order.
    pub functions: Vec<FunctionState>,
}

/// Writes a snapshot; returns how many bytes of memory were not empty.
///
/// # Errors
/// [`Error::Write`], [`Error::Memory`]
pub fn write<W: Write>(
    out: W,
    description: &Description,
    memory: &GuestMemoryMmap,
    state: &State,
) -> Result<(u64, W), Error> {
    let mut out = Writer::new(out)?;
    section(&mut out, Kind::Description, description)?;
    let written = memory::write(memory, &mut out)?;
    section(&mut out, Kind::State, state)?;
    Ok((written, out.finish()?))
}

fn section<W: Write>(
    out: &mut Writer<W>,
    kind: Kind,
    content: &impl Serialize,
) -> Result<(), Error> {
    let json = serde_json::to_vec(content).map_err(|e| Error::Write(e.into()))?;
    out.section(kind, &[&json])
}

/// A guest that is on its way to another VMM.
pub struct Departure {
    out: Writer<Connection>,
    memory: GuestMemoryMmap,
    log: Arc<DirtyLog>,
    /// Bytes of memory sent so far.
    pub sent: u64,
    /// How often memory was gone through.
    pub rounds: u32,
}

/// So many pages are sent while the guest stands still.
const REST: u64 = 1024;
/// A guest that writes faster than it can be sent stands still after so many rounds.
const MOST_ROUNDS: u32 = 30;

impl Departure {
    /// Says what machine it is.
    ///
    /// # Errors
    /// [`Error::Write`]
    pub fn new(
        connection: Connection,
        description: &Description,
        memory: GuestMemoryMmap,
        log: Arc<DirtyLog>,
    ) -> Result<Self, Error> {
        let mut out = Writer::new(connection)?;
        section(&mut out, Kind::Description, description)?;
        Ok(Self {
            out,
            memory,
            log,
            sent: 0,
            rounds: 0,
        })
    }

    /// Sends memory while the guest runs, until little is left or that does not come about. What is written is being noted.
    ///
    /// # Errors
    /// [`Error`]
    pub fn send_ahead(&mut self, vm: &Vm) -> Result<(), Error> {
        self.sent = memory::write(&self.memory, &mut self.out)?;
        self.rounds = 1;
        let mut pages = self.written(vm)?;
        while pages.count() > REST && self.rounds < MOST_ROUNDS {
            self.send(&pages)?;
            pages = self.written(vm)?;
        }
        self.send(&pages)
    }

    /// Sends the rest, and what the machine does, when nothing writes any more. Gives back the connection, for the last words.
    ///
    /// # Errors
    /// [`Error`]
    pub fn send_rest(mut self, vm: &Vm, state: &State) -> Result<(Connection, u64), Error> {
        let pages = self.written(vm)?;
        self.send(&pages)?;
        section(&mut self.out, Kind::State, state)?;
        Ok((self.out.finish()?, self.sent))
    }

    fn written(&self, vm: &Vm) -> Result<Pages, Error> {
        let mut pages = Pages::none_of(&self.memory);
        vm.take_dirty(&mut pages)?;
        self.log.take(&mut pages);
        Ok(pages)
    }

    fn send(&mut self, pages: &Pages) -> Result<(), Error> {
        let sent = memory::write_pages(&self.memory, pages, &mut self.out)?;
        self.sent = self.sent.saturating_add(sent);
        self.rounds = self.rounds.saturating_add(1);
        Ok(())
    }
}

/// A snapshot that is being read.
pub struct Incoming<R> {
    input: Reader<R>,
    /// What machine it is.
    pub description: Description,
}

/// A snapshot in a file, or a guest that comes from another VMM.
pub type Source = Box<dyn Read + Send>;

impl Incoming<Source> {
    /// Opens a file, and reads what machine it is.
    ///
    /// # Errors
    /// [`Error::Open`], and as [`Incoming::new`]
    pub fn open(path: &Path) -> Result<Self, Error> {
        let file = File::open(path).map_err(|source| Error::Open {
            path: path.to_owned(),
            source,
        })?;
        Self::new(Box::new(BufReader::with_capacity(BUFFER, file)))
    }

    /// Reads from another VMM, which says nothing more before it is answered.
    ///
    /// # Errors
    /// As [`Incoming::new`]
    pub fn over(connection: Connection) -> Result<Self, Error> {
        Self::new(Box::new(BufReader::with_capacity(BUFFER, connection)))
    }
}

impl<R: Read> Incoming<R> {
    /// Reads what machine it is.
    ///
    /// # Errors
    /// [`Error`]: it is none, of another version, or damaged
    pub fn new(input: R) -> Result<Self, Error> {
        let mut input = Reader::new(input)?;
        let (kind, body) = input.section()?;
        let description = parse(kind, Kind::Description, "its description", body)?;
        Ok(Self { input, description })
    }

    /// Reads memory into a guest that has not run, and then what the machine does.
    ///
    /// # Errors
    /// [`Error`]: it is damaged or cut short
    pub fn read(&mut self, memory: &GuestMemoryMmap) -> Result<State, Error> {
        let (kind, body) = memory::read(memory, &mut self.input)?;
        let state = parse(kind, Kind::State, "its state", &body)?;
        match self.input.section()? {
            (Kind::End, _) => Ok(state),
            _ => Err(Error::Damaged),
        }
    }
}

fn parse<T: DeserializeOwned>(
    kind: Kind,
    wanted: Kind,
    section: &'static str,
    body: &[u8],
) -> Result<T, Error> {
    if kind != wanted {
        return Err(Error::Damaged);
    }
    serde_json::from_slice(body).map_err(|source| Error::Nonsense { section, source })
}

/// Bytes that are read and written at a time: a section of memory and its head.
const BUFFER: usize = 256 << 10;

/// A folder of snapshots.
pub struct Folder {
    path: PathBuf,
    /// A process that is confined has no right to open it, and names in it are to be durable.
    open: File,
}

impl Folder {
    /// Opens a folder that is there.
    ///
    /// # Errors
    /// [`Error::Folder`]
    pub fn open(path: &Path) -> Result<Self, Error> {
        let mut options = OpenOptions::new();
        options.read(true).custom_flags(libc::O_DIRECTORY);
        let (path, open) = (path.to_owned(), options.open(path));
        match open {
            Ok(open) => Ok(Self { path, open }),
            Err(source) => Err(Error::Folder { path, source }),
        }
    }

    /// Returns when the names in it are durable.
    fn sync(&self) -> io::Result<()> {
        match self.open.sync_all() {
            // A file system that has nothing to write for a folder (fsync(2)).
            Err(error) if error.kind() == io::ErrorKind::InvalidInput => Ok(()),
            result => result,
        }
    }
}

/// A snapshot that is not complete. Nothing is left of it unless it gets another name.
struct Partial {
    path: PathBuf,
    /// Open, and so locked, until the name is another one or gone.
    file: Arc<File>,
    complete: bool,
}

impl Partial {
    /// Gives it its name, durably.
    fn complete(mut self, path: &Path, folder: &Folder) -> io::Result<()> {
        std::fs::rename(&self.path, path)?;
        // Should the rest fail. From here on another one may have the name that it had.
        path.clone_into(&mut self.path);
        folder.sync()?;
        self.complete = true;
        Ok(())
    }
}

impl Drop for Partial {
    fn drop(&mut self) {
        if self.complete {
            return;
        }
        if let Err(error) = std::fs::remove_file(&self.path) {
            tracing::warn!(%error, path = %self.path.display(), "a part of a snapshot is left");
        }
    }
}

/// Locks a file until it is closed; not if another process has it locked.
fn lock(file: &File) -> io::Result<bool> {
    match file.try_lock() {
        Ok(()) => Ok(true),
        Err(TryLockError::WouldBlock) => Ok(false),
        Err(TryLockError::Error(error)) => Err(error),
    }
}

/// Whether it is this file that has the name.
fn is_at(file: &File, path: &Path) -> io::Result<bool> {
    let (ours, there) = (file.metadata()?, path.symlink_metadata());
    Ok(there.is_ok_and(|there| (there.dev(), there.ino()) == (ours.dev(), ours.ino())))
}

/// Locks a file that was just made, unless somebody took it for one that was left.
fn lock_new(file: File, path: &Path) -> io::Result<Option<File>> {
    // Who has done so may have removed it before it was locked here.
    match lock(&file) {
        Ok(locked) => Ok((locked && is_at(&file, path)?).then_some(file)),
        Err(error) => {
            // A file system without locks: nobody else has this one.
            std::fs::remove_file(path)?;
            Err(error)
        }
    }
}

/// Makes a file that is locked: as long as it is open nobody else makes one of its name in this way. One that a killed process left
/// is replaced.
fn create_alone(path: &Path) -> io::Result<Option<File>> {
    let mut options = OpenOptions::new();
    // The guest's memory is in it.
    options.write(true).mode(0o600);
    let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK;
    match options.clone().custom_flags(flags).open(path) {
        Ok(left) => {
            if !lock(&left)? {
                return Ok(None);
            }
            // Whoever had it locked may have given it another name.
            if is_at(&left, path)? {
                // A process that is confined may remove it, but not cut it off.
                std::fs::remove_file(path)?;
            }
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error),
    }
    match options.create_new(true).open(path) {
        Ok(file) => lock_new(file, path),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(None),
        Err(error) => Err(error),
    }
}

/// A file of a folder of snapshots. Until it is complete it has another name.
pub struct Outgoing<'a> {
    folder: &'a Folder,
    partial: Partial,
    path: PathBuf,
    out: BufWriter<Arc<File>>,
}

impl<'a> Outgoing<'a> {
    /// Begins the snapshot `name` in `folder`.
    ///
    /// # Errors
    /// [`Error::Name`], [`Error::Busy`], [`Error::Exists`], [`Error::Create`]
    pub fn create(folder: &'a Folder, name: &str) -> Result<Self, Error> {
        if name.is_empty() || name.starts_with('.') || name.contains(['/', '\0']) {
            return Err(Error::Name(name.to_owned()));
        }
        let unfinished = folder.path.join(format!(".{name}.partial"));
        let partial = match create_alone(&unfinished) {
            Ok(Some(file)) => Partial {
                path: unfinished,
                file: Arc::new(file),
                complete: false,
            },
            Ok(None) => return Err(Error::Busy(name.to_owned())),
            Err(source) => {
                return Err(Error::Create {
                    path: unfinished,
                    source,
                });
            }
        };
        // Nobody else gives a file this name from here on.
        let path = folder.path.join(name);
        if path.exists() {
            return Err(Error::Exists(name.to_owned()));
        }
        let out = BufWriter::with_capacity(BUFFER, partial.file.clone());
        Ok(Self {
            folder,
            partial,
            path,
            out,
        })
    }

    /// Where it will be.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Writes it, durably, and gives it its name. Returns how many bytes of memory were not empty.
    ///
    /// # Errors
    /// As [`write()`]; then nothing is left of it.
    pub fn write(
        self,
        description: &Description,
        memory: &GuestMemoryMmap,
        state: &State,
    ) -> Result<u64, Error> {
        let Self {
            folder,
            partial,
            path,
            out,
        } = self;
        let (written, out) = write(out, description, memory, state)?;
        let file = out.into_inner().map_err(|e| Error::Write(e.into_error()))?;
        file.sync_all().map_err(Error::Write)?;
        partial.complete(&path, folder).map_err(Error::Write)?;
        Ok(written)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::{GuestRam, MIN_SIZE, Options, PageSize};
    use crate::testing::has_kvm;
    use std::thread;
    use vm_memory::{Bytes, GuestAddress};

    fn ram() -> GuestRam {
        let options = Options {
            size: Size(MIN_SIZE),
            pages: PageSize::Normal,
            prefault: false,
        };
        GuestRam::new(options).unwrap()
    }

    /// Of two that write one name at a time one is refused, and nothing of the other's is touched.
    #[test]
    fn one_name_has_one_writer() {
        let dir = tempfile::tempdir().unwrap();
        let (path, name) = (dir.path(), "state");
        let folder = Folder::open(path).unwrap();
        // One that was left.
        std::fs::write(path.join(".state.partial"), "left").unwrap();
        let first = Outgoing::create(&folder, name).unwrap();
        let second = Outgoing::create(&folder, name).err();
        assert!(matches!(second, Some(Error::Busy(_))), "{second:?}");
        assert_eq!(first.partial.file.metadata().unwrap().len(), 0);
        drop(first);
        assert!(std::fs::read_dir(path).unwrap().next().is_none());
        let third = Outgoing::create(&folder, name).unwrap();
        third.partial.complete(&third.path, &folder).unwrap();
        let fourth = Outgoing::create(&folder, name).err();
        assert!(matches!(fourth, Some(Error::Exists(_))), "{fourth:?}");
        let names = std::fs::read_dir(path).unwrap();
        let names: Vec<_> = names.map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(names, ["state"]);
    }

    /// What happens between the making of a file and its lock.
    #[test]
    fn a_file_that_was_taken_for_one_that_was_left_is_not_written() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("partial");
        let make = || OpenOptions::new().write(true).create_new(true).open(&path);
        let ours = make().unwrap();
        let theirs = create_alone(&path).unwrap().unwrap();
        assert!(lock_new(ours, &path).unwrap().is_none());
        assert!(is_at(&theirs, &path).unwrap());
        std::fs::remove_file(&path).unwrap();
        let ours = make().unwrap();
        let _theirs = File::open(&path).and_then(|file| lock(&file).map(|_| file));
        assert!(lock_new(ours, &path).unwrap().is_none());
        std::fs::remove_file(&path).unwrap();
        assert!(lock_new(make().unwrap(), &path).unwrap().is_some());
        // A file that cannot be locked is none that is left to the next one.
        let mut options = OpenOptions::new();
        let lockless = options.read(true).custom_flags(libc::O_PATH).open(&path);
        lock_new(lockless.unwrap(), &path).unwrap_err();
        assert!(!path.exists());
    }

    #[test]
    fn a_snapshot_whose_name_is_not_durable_is_none() {
        let dir = tempfile::tempdir().unwrap();
        let mut folder = Folder::open(dir.path()).unwrap();
        folder.sync().unwrap();
        // As of a disk that fails.
        let mut options = OpenOptions::new();
        let options = options.read(true).custom_flags(libc::O_PATH);
        folder.open = options.open(dir.path()).unwrap();
        let Outgoing { partial, path, .. } = Outgoing::create(&folder, "state").unwrap();
        partial.complete(&path, &folder).unwrap_err();
        assert!(std::fs::read_dir(dir.path()).unwrap().next().is_none());
        let missing = Folder::open(&dir.path().join("none")).err();
        assert!(matches!(missing, Some(Error::Folder { .. })), "{missing:?}");
        let file = dir.path().join("file");
        std::fs::write(&file, "").unwrap();
        assert!(matches!(Folder::open(&file), Err(Error::Folder { .. })));
    }

    /// Threads that take turns and get in each other's way: each that was let write has its own file.
    #[test]
    fn a_name_is_never_taken_from_its_writer() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("partial");
        let written = std::sync::atomic::AtomicUsize::new(0);
        thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for turn in 0..500 {
                        let Some(file) = create_alone(&path).unwrap() else {
                            continue;
                        };
                        let ours = file.metadata().unwrap().ino();
                        thread::yield_now();
                        assert_eq!(path.metadata().unwrap().ino(), ours);
                        written.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                        // Every other one is left behind, as by a process that was killed.
                        if turn % 2 == 0 {
                            std::fs::remove_file(&path).unwrap();
                        }
                    }
                });
            }
        });
        assert!(written.into_inner() > 4);
    }

    fn description() -> Description {
        Description {
            program: "a test".into(),
            cpus: 1,
            memory: MIN_SIZE,
            memory_max: MIN_SIZE,
            pieces: Vec::new(),
            ports: 0,
            devices: Vec::new(),
            cpuid: Vec::new(),
            tsc_deadline: false,
        }
    }

    /// A guest of 16 MiB that are not empty, on its way over TCP to whatever `destination` does.
    fn depart<T: Send + 'static>(
        destination: impl FnOnce(Connection) -> T + Send + 'static,
    ) -> (Vm, GuestRam, Departure, thread::JoinHandle<T>) {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = Address::Tcp(listener.local_addr().unwrap());
        let listener = transport::Listener::Tcp(listener);
        let peers = ringside_control::Peers::allowing(&[]);
        let there = thread::spawn(move || destination(listener.accept(&peers).unwrap()));
        let (vm, ram) = (Vm::new().unwrap(), ram());
        let content = vec![7; 16 << 20];
        ram.memory().write_slice(&content, GuestAddress(0)).unwrap();
        vm.add_ram(ram.memory()).unwrap();
        vm.log_dirty(true).unwrap();
        let log = Arc::new(DirtyLog::new(ram.memory()).unwrap());
        let connection = Connection::connect(&address).unwrap();
        let departure = Departure::new(connection, &description(), ram.memory().clone(), log);
        (vm, ram, departure.unwrap(), there)
    }

    #[test]
    fn a_guest_stays_if_the_destination_breaks_off() {
        if !has_kvm("a_guest_stays_if_the_destination_breaks_off") {
            return;
        }
        let (vm, _ram, mut departure, there) =
            depart(|mut connection| connection.read_exact(&mut vec![0; 1 << 20]));
        let error = departure.send_ahead(&vm).unwrap_err().of_departure();
        assert!(matches!(error, Error::Declined(_)), "{error:?}");
        there.join().unwrap().unwrap();
    }

    #[test]
    fn a_guest_has_not_come_if_the_source_breaks_off() {
        if !has_kvm("a_guest_has_not_come_if_the_source_breaks_off") {
            return;
        }
        let (vm, _ram, mut departure, there) = depart(|connection| {
            let mut incoming = Incoming::over(connection).unwrap();
            assert_eq!(incoming.description.program, "a test");
            let ram = ram();
            let error = incoming.read(ram.memory()).unwrap_err().of_arrival();
            let mut content = vec![0; 16 << 20];
            let read = ram.memory().read_slice(&mut content, GuestAddress(0));
            read.unwrap();
            (error, content)
        });
        departure.send_ahead(&vm).unwrap();
        assert_eq!(departure.sent, 16 << 20);
        drop(departure);
        let (error, content) = there.join().unwrap();
        assert!(matches!(error, Error::Kept(_)), "{error:?}");
        assert!(content.iter().all(|byte| *byte == 7));
    }
}

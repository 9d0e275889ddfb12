//! A copy of all frames of a link, or of a switch's port, in a file that Wireshark and tcpdump read: the capture format pcap with times in
//! nanoseconds (draft-ietf-opsawg-pcap).
//!
//! ```text
//!  queue's thread: frame ─copy─▶ [record][record] … ─ end of a batch, or full ─▶ writer thread ─▶ file
//!                                 ◀──────────────── empty buffers ────────────────╯
//! ```
//!
//! A queue has a fixed number of buffers. When the file is too slow for them, frames are missing in it, and that is said;
//! the queue waits for nobody, nor does who removes it: the writer goes on by itself, and the program waits for it at its end.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, SystemTime};

use epoll::Events;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::signal::SigSet;
use ringside_sandbox::confined;
use thiserror::Error;
use tracing::{error, warn};

use super::{AnyLink, Link, Ready};
use crate::net::epoll_set::Watcher;
use crate::net::iov::IoList;
use crate::shell::{LogLimit, set_lock};

/// Buffers of a queue.
const BUFFERS: usize = 4;
/// Bytes of a buffer.
const BUFFER: usize = 1 << 19;
/// Most bytes of a frame that are kept, as of tcpdump.
pub(in crate::net) const MAX_SNAP: u32 = 1 << 18;
/// Bytes before each frame: two times, two lengths.
const RECORD: usize = 16;
/// The first field of a file with times in nanoseconds.
const MAGIC: u32 = 0xa1b2_3c4d;
/// Version 2.4 of the format.
const VERSION: [u16; 2] = [2, 4];
/// Frames begin with an Ethernet header.
const LINKTYPE_ETHERNET: u32 = 1;

/// How often, and how long after each other, a file that somebody writes is tried.
const LOCK_ATTEMPTS: u32 = 20;
const LOCK_INTERVAL: Duration = Duration::from_millis(50);

/// How long the end of a program waits for files that are still written.
const END: Duration = Duration::from_secs(3);

/// How many files are being written.
static WRITERS: (Mutex<usize>, Condvar) = (Mutex::new(0), Condvar::new());

/// A capture file cannot be had.
#[derive(Debug, Error)]
#[error("cannot write the capture file {path}{}", hint(.path, .source), path = .path.display())]
pub struct PcapError {
    path: PathBuf,
    #[source]
    source: io::Error,
}

/// What to do about it.
fn hint(path: &Path, error: &io::Error) -> &'static str {
    let is_fifo = || fs::metadata(path).is_ok_and(|meta| meta.file_type().is_fifo());
    match error.kind() {
        // It is locked, or a pipe that is full.
        io::ErrorKind::WouldBlock => ", which something writes already: name another one",
        io::ErrorKind::PermissionDenied if confined() => {
            ": this program is confined and opens those of its first ports only; give it with --port, or use --sandbox off"
        }
        _ if error.raw_os_error() == Some(Errno::ENXIO as i32) && is_fifo() => {
            ": have somebody read this FIFO first"
        }
        _ => "",
    }
}

/// Waits until capture files have all that was kept for them, as a program ends; not for long, as a file may hang.
pub fn finish_captures() {
    let (count, ended) = &WRITERS;
    let count = count.lock().unwrap_or_else(PoisonError::into_inner);
    let waited = ended.wait_timeout_while(count, END, |count| *count > 0);
    let (count, _) = waited.unwrap_or_else(PoisonError::into_inner);
    if *count > 0 {
        warn!(
            files = *count,
            "capture files are too slow: their ends are missing"
        );
    }
}

/// A buffer of records, and where it goes when it is empty again.
#[derive(Debug)]
struct Batch {
    records: Vec<u8>,
    back: Sender<Vec<u8>>,
}

/// The thread that writes the file: it begins with the first queue that is used, when the program is confined, and ends when
/// the last one is gone and all is written.
#[derive(Debug)]
struct Writer {
    path: PathBuf,
    sender: SyncSender<Batch>,
    /// Until it begins.
    idle: Mutex<Option<(File, Receiver<Batch>)>>,
}

impl Writer {
    fn open(path: &Path, queues: usize, snap: u32) -> Result<Self, PcapError> {
        let failed = |source| PcapError {
            path: path.to_owned(),
            source,
        };
        let file = create(path, &header(snap)).map_err(failed)?;
        let (sender, receiver) = sync_channel(queues.saturating_mul(BUFFERS));
        Ok(Self {
            path: path.to_owned(),
            sender,
            idle: Mutex::new(Some((file, receiver))),
        })
    }

    fn begin(&self) -> io::Result<()> {
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        let Some((file, receiver)) = idle.take() else {
            return Ok(());
        };
        let path = self.path.clone();
        let writing = Writing::begin();
        let thread = thread::Builder::new().name("net-pcap".to_owned());
        thread.spawn(move || {
            // Signals are the control thread's.
            let _ = SigSet::all().thread_block();
            write_all(file, &path, &receiver);
            drop(writing);
        })?;
        Ok(())
    }
}

/// A file that is being written, while this lives.
struct Writing;

impl Writing {
    fn change(by: impl FnOnce(usize) -> usize) {
        let (count, changed) = &WRITERS;
        let mut count = count.lock().unwrap_or_else(PoisonError::into_inner);
        *count = by(*count);
        changed.notify_all();
    }

    fn begin() -> Self {
        Self::change(|count| count.saturating_add(1));
        Self
    }
}

impl Drop for Writing {
    fn drop(&mut self) {
        Self::change(|count| count.saturating_sub(1));
    }
}

/// Opens a file that nobody else writes, or a FIFO that somebody reads, and writes its header.
fn create(path: &Path, header: &[u8]) -> io::Result<File> {
    let mut options = File::options();
    // Not emptied before it is known that nobody writes it; and nobody waits for the reader of a FIFO.
    options.write(true).create(true).truncate(false);
    let mut file = options.custom_flags(OFlag::O_NONBLOCK.bits()).open(path)?;
    if file.metadata()?.is_file() {
        lock(&file, path)?;
        file.set_len(0)?;
    }
    file.write_all(header)?;
    // Its thread waits for a reader that is slow.
    fcntl(&file, FcntlArg::F_SETFL(OFlag::empty()))?;
    Ok(file)
}

/// Locks the file for as long as it is open. Of a port that was removed a moment ago the last frames may still be written.
fn lock(file: &File, path: &Path) -> io::Result<()> {
    for _ in 0..LOCK_ATTEMPTS {
        match set_lock(file, libc::F_WRLCK, 0) {
            Ok(()) => return Ok(()),
            Err(Errno::EAGAIN | Errno::EACCES) => thread::sleep(LOCK_INTERVAL),
            Err(error) => {
                let path = path.display();
                warn!("capture file {path} cannot be locked against other writers: {error}");
                return Ok(());
            }
        }
    }
    Err(io::ErrorKind::WouldBlock.into())
}

fn header(snap: u32) -> [u8; 24] {
    let [major, minor] = VERSION.map(u16::to_ne_bytes);
    let mut header = [0; 24];
    let fields = MAGIC
        .to_ne_bytes()
        .into_iter()
        .chain(major)
        .chain(minor)
        // Two fields that are 0.
        .chain([0; 8])
        .chain(snap.to_ne_bytes())
        .chain(LINKTYPE_ETHERNET.to_ne_bytes());
    for (place, byte) in header.iter_mut().zip(fields) {
        *place = byte;
    }
    header
}

fn write_all(mut file: File, path: &Path, batches: &Receiver<Batch>) {
    let mut broken = false;
    while let Ok(Batch { mut records, back }) = batches.recv() {
        if !broken && let Err(error) = file.write_all(&records) {
            broken = true;
            error!(
                file = %path.display(),
                "the capture ends: its file cannot be written: {error}"
            );
        }
        records.clear();
        // The queue may be gone.
        let _ = back.send(records);
    }
}

/// What keeps frames for a file.
#[derive(Debug)]
pub(in crate::net) struct Recorder {
    snap: usize,
    current: Option<Vec<u8>>,
    back: Sender<Vec<u8>>,
    empty: Receiver<Vec<u8>>,
    writer: Arc<Writer>,
    missing: u64,
    log: LogLimit,
}

impl Recorder {
    /// One that has a file of its own, with at most `snap` bytes of each frame.
    pub(in crate::net) fn open(path: &Path, snap: u32) -> Result<Self, PcapError> {
        let writer = Arc::new(Writer::open(path, 1, snap)?);
        Ok(Self::new(&writer, snap))
    }

    fn new(writer: &Arc<Writer>, snap: u32) -> Self {
        let (back, empty) = channel();
        for _ in 0..BUFFERS {
            // Both ends are here.
            let _ = back.send(Vec::with_capacity(BUFFER));
        }
        Self {
            snap: usize::try_from(snap).unwrap_or(BUFFER),
            current: None,
            back,
            empty,
            writer: Arc::clone(writer),
            missing: 0,
            log: LogLimit::default(),
        }
    }

    /// Lets the file be written from now on.
    pub(in crate::net) fn begin(&self) -> io::Result<()> {
        self.writer.begin()
    }

    /// Appends the record of a frame of `len` bytes, that `copy` gives the first bytes of.
    pub(in crate::net) fn keep(&mut self, len: usize, copy: impl FnOnce(&mut [u8])) {
        let kept = len.min(self.snap);
        let room = RECORD.saturating_add(kept);
        if self
            .current
            .as_ref()
            .is_some_and(|buffer| buffer.capacity() - buffer.len() < room)
        {
            self.hand_over();
        }
        if self.current.is_none() {
            self.current = self.empty.try_recv().ok();
        }
        let Some(buffer) = &mut self.current else {
            self.missing = self.missing.saturating_add(1);
            if let Some(held_back) = self.log.check() {
                warn!(
                    held_back,
                    file = %self.writer.path.display(),
                    missing = self.missing,
                    "frames are missing in the capture: its file is too slow"
                );
            }
            return;
        };
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        let now = now.unwrap_or_default();
        // The format ends in 2106.
        let seconds = u32::try_from(now.as_secs()).unwrap_or(u32::MAX);
        let [kept_len, whole_len] = [kept, len].map(|n| u32::try_from(n).unwrap_or(u32::MAX));
        for field in [seconds, now.subsec_nanos(), kept_len, whole_len] {
            buffer.extend_from_slice(&field.to_ne_bytes());
        }
        let start = buffer.len();
        buffer.resize(start.saturating_add(kept), 0);
        copy(buffer.get_mut(start..).unwrap_or_default());
    }

    /// Hands over what is kept, as a batch ends.
    pub(in crate::net) fn hand_over(&mut self) {
        if let Some(records) = self.current.take_if(|records| !records.is_empty()) {
            let back = self.back.clone();
            // There is room for all buffers of all queues.
            let _ = self.writer.sender.try_send(Batch { records, back });
        }
    }
}

impl Drop for Recorder {
    fn drop(&mut self) {
        self.hand_over();
    }
}

/// A link whose frames are kept in a file.
pub(super) struct Tee {
    inner: Box<dyn Link>,
    recorder: Recorder,
}

/// Puts a capture file behind each of these queues, with at most `snap` bytes of each frame.
pub(super) fn tee(queues: Vec<AnyLink>, path: &Path, snap: u32) -> Result<Vec<AnyLink>, PcapError> {
    let writer = Arc::new(Writer::open(path, queues.len(), snap)?);
    let teed = queues.into_iter().map(|queue| {
        AnyLink::Other(Box::new(Tee {
            inner: queue.boxed(),
            recorder: Recorder::new(&writer, snap),
        }))
    });
    Ok(teed.collect())
}

impl Link for Tee {
    fn watch(&mut self, watcher: Watcher) -> io::Result<()> {
        self.recorder.begin()?;
        self.inner.watch(watcher)
    }

    fn ready(&mut self, events: Events) -> Ready {
        self.inner.ready(events)
    }

    fn send(&mut self, frame: &mut IoList, header_len: usize) -> io::Result<()> {
        self.inner.send(frame, header_len)?;
        let len = frame.bytes().saturating_sub(header_len);
        self.recorder.keep(len, |out| {
            frame.copy_out(header_len, out);
        });
        Ok(())
    }

    fn flush(&mut self) {
        self.inner.flush();
        self.recorder.hand_over();
    }

    fn receive(
        &mut self,
        list: &mut IoList,
        pieces: usize,
        header_len: usize,
        spill: &mut [u8],
    ) -> io::Result<usize> {
        match self.inner.receive(list, pieces, header_len, spill) {
            Ok(len) => {
                self.recorder.keep(len.saturating_sub(header_len), |out| {
                    list.collect(header_len, out, pieces, spill);
                });
                Ok(len)
            }
            Err(error) => {
                self.recorder.hand_over();
                Err(error)
            }
        }
    }

    fn attached(&self) -> bool {
        self.inner.attached()
    }

    fn set_attached(&mut self, attached: bool) -> io::Result<()> {
        self.inner.set_attached(attached)
    }

    fn advice(&self, error: &io::Error) -> Option<&'static str> {
        self.inner.advice(error)
    }
}

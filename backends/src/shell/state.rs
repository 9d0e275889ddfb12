//! The state of a device that goes with a guest that moves (vhost-user, "Migrating back-end state"): what its driver has set and
//! no front-end knows.
//!
//! ```text
//!  magic  8 bytes │ kind of device  8 │ version  4 │ length  4 │ CRC-32 of the rest  4 │ the rest: JSON
//! ```
//!
//! Numbers are little-endian. The front-end gives a descriptor to write it to, or to read it from, and asks later what came of
//! that. Which descriptor that is, how much comes out of it, and when, is up to the front-end: a thread of its own waits for
//! it, and not for long.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver};
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::stat::fstat;
use serde::Serialize;
use serde::de::DeserializeOwned;
use thiserror::Error;

/// What a state begins with.
const MAGIC: [u8; 8] = *b"RINGSTAT";
/// Length of all that comes before the JSON.
const HEADER: usize = 28;
/// The longest state in bytes: twice that of a network device of 256 queue pairs with all tables full.
const MAX_LEN: usize = 256 << 10;
/// How long the front-end may take to give or take it.
const PATIENCE: Duration = Duration::from_secs(5);
/// As much as a pipe takes without blocking once it is said to be writable (PIPE_BUF).
const PIECE: usize = 4096;

/// A device's state cannot be saved or loaded.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum StateError {
    /// It begins otherwise.
    #[error("what came is no device state: it does not begin as one")]
    NoState,
    /// It is of another kind of device.
    #[error("the state is that of a device of kind `{found}`, and this one is of kind `{kind}`")]
    Kind {
        /// The kind of device that it is of.
        found: String,
        /// That of this device.
        kind: &'static str,
    },
    /// It is of another version.
    #[error("the state is of version {found}; this program knows version {version}")]
    Version {
        /// Its version.
        found: u32,
        /// The one that is known.
        version: u32,
    },
    /// Some of it is missing, or there is more than it.
    #[error("the state has {found} bytes, and says that it has {len}: it was cut short or damaged")]
    Length {
        /// How many there are, without the header.
        found: usize,
        /// How many there should be.
        len: u32,
    },
    /// It is longer than any.
    #[error("the state has more than {MAX_LEN} bytes")]
    TooLong,
    /// It was changed on its way.
    #[error("the checksum of the state is wrong: it was damaged")]
    Checksum,
    /// It is no description of a state.
    #[error("the state cannot be read")]
    Content(#[source] serde_json::Error),
    /// It describes what this device cannot be in.
    #[error("the state does not fit this device: {0}")]
    Misfit(String),
    /// Rings run.
    #[error("the state of a device can be moved only while all its rings are stopped")]
    Running,
    /// A transfer is under way.
    #[error("another transfer of the state has not ended")]
    Busy,
    /// None was begun.
    #[error("no transfer of the state was begun")]
    NoTransfer,
    /// It is neither a pipe nor a file.
    #[error("a device's state goes through a pipe, or into a file")]
    Descriptor,
    /// The other side of the descriptor.
    #[error("the state did not come through")]
    Transfer(#[source] io::Error),
}

/// A state with its header.
///
/// # Errors
/// [`StateError::Content`], [`StateError::TooLong`]
pub(crate) fn seal(
    kind: &'static str,
    version: u32,
    state: &impl Serialize,
) -> Result<Vec<u8>, StateError> {
    let body = serde_json::to_vec(state).map_err(StateError::Content)?;
    let len = u32::try_from(body.len()).map_err(|_| StateError::TooLong)?;
    let mut name = [0; 8];
    for (place, byte) in name.iter_mut().zip(kind.bytes()) {
        *place = byte;
    }
    let mut sealed = MAGIC.to_vec();
    sealed.extend(name);
    for word in [version, len, crc32fast::hash(&body)] {
        sealed.extend(word.to_le_bytes());
    }
    sealed.extend(body);
    if sealed.len() > MAX_LEN {
        return Err(StateError::TooLong);
    }
    Ok(sealed)
}

/// The state behind a header that is in order.
///
/// # Errors
/// [`StateError`]: it is no state, of another device or version, damaged, or cut short.
pub(crate) fn open<T: DeserializeOwned>(
    kind: &'static str,
    version: u32,
    sealed: &[u8],
) -> Result<T, StateError> {
    let (header, body) = sealed
        .split_first_chunk::<HEADER>()
        .ok_or(StateError::NoState)?;
    let rest = header.strip_prefix(&MAGIC).ok_or(StateError::NoState)?;
    let (name, words) = rest.split_at_checked(8).ok_or(StateError::NoState)?;
    let name = String::from_utf8_lossy(name);
    let name = name.trim_end_matches('\0');
    if name != kind {
        let found = name.to_owned();
        return Err(StateError::Kind { found, kind });
    }
    let mut words = words
        .chunks_exact(4)
        .filter_map(|word| word.try_into().ok())
        .map(u32::from_le_bytes);
    let mut word = || words.next().unwrap_or(0);
    let (found, len, checksum) = (word(), word(), word());
    if found != version {
        return Err(StateError::Version { found, version });
    }
    if u32::try_from(body.len()) != Ok(len) {
        let found = body.len();
        return Err(StateError::Length { found, len });
    }
    if crc32fast::hash(body) != checksum {
        return Err(StateError::Checksum);
    }
    serde_json::from_slice(body).map_err(StateError::Content)
}

/// What a transfer under way ends with.
enum End {
    Saved(Receiver<io::Result<()>>),
    Loaded(Receiver<io::Result<Vec<u8>>>),
}

/// The transfers of one front-end after the other.
#[derive(Default)]
pub(super) struct Transfers {
    end: Option<End>,
    /// The thread of one has this, too.
    busy: Arc<()>,
}

impl Transfers {
    fn begin<T: Send + 'static>(
        &mut self,
        file: &File,
        transfer: impl FnOnce() -> io::Result<T> + Send + 'static,
    ) -> Result<Receiver<io::Result<T>>, StateError> {
        // Of other files, none says when it is ready.
        let kind = fstat(file).map(|stat| stat.st_mode & libc::S_IFMT);
        if !matches!(kind, Ok(libc::S_IFIFO | libc::S_IFREG)) {
            return Err(StateError::Descriptor);
        }
        if Arc::strong_count(&self.busy) > 1 {
            return Err(StateError::Busy);
        }
        let busy = Arc::clone(&self.busy);
        let (done, end) = mpsc::channel();
        thread::Builder::new()
            .name("state".to_owned())
            .spawn(move || {
                let result = transfer();
                drop(busy);
                // The front-end may never ask.
                let _ = done.send(result);
            })
            .map_err(StateError::Transfer)?;
        Ok(end)
    }

    /// Writes a state to the front-end's descriptor, and closes it.
    pub(super) fn save(&mut self, file: File, state: Vec<u8>) -> Result<(), StateError> {
        let peer = file.try_clone().map_err(StateError::Transfer)?;
        let end = self.begin(&peer, move || send(&file, &state))?;
        self.end = Some(End::Saved(end));
        Ok(())
    }

    /// Reads one from it, up to its end.
    pub(super) fn load(&mut self, file: File) -> Result<(), StateError> {
        let peer = file.try_clone().map_err(StateError::Transfer)?;
        let end = self.begin(&peer, move || receive(&file))?;
        self.end = Some(End::Loaded(end));
        Ok(())
    }

    /// Waits for the end of the one that was begun. Returns what was read, if that is what it did.
    pub(super) fn check(&mut self) -> Result<Option<Vec<u8>>, StateError> {
        fn result<T>(end: &Receiver<io::Result<T>>) -> Result<T, StateError> {
            let result = end
                .recv_timeout(PATIENCE)
                .map_err(|_| StateError::Transfer(io::ErrorKind::TimedOut.into()))?;
            result.map_err(|error| match error.kind() {
                io::ErrorKind::FileTooLarge => StateError::TooLong,
                _ => StateError::Transfer(error),
            })
        }
        match self.end.take().ok_or(StateError::NoTransfer)? {
            End::Saved(end) => result(&end).map(|()| None),
            End::Loaded(end) => result(&end).map(Some),
        }
    }

    /// The front-end is gone, and nobody asks any more.
    pub(super) fn forget(&mut self) {
        self.end = None;
    }
}

/// Waits until the descriptor can be read or written, or is closed on the other side.
fn wait(file: &File, what: PollFlags, end: Instant) -> io::Result<()> {
    let mut fds = [PollFd::new(file.as_fd(), what)];
    loop {
        let left = end.saturating_duration_since(Instant::now());
        let left = PollTimeout::try_from(left).unwrap_or(PollTimeout::ZERO);
        match poll(&mut fds, left) {
            Ok(0) => return Err(io::ErrorKind::TimedOut.into()),
            Ok(_) => return Ok(()),
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}

fn send(mut file: &File, state: &[u8]) -> io::Result<()> {
    let end = Instant::now() + PATIENCE;
    for piece in state.chunks(PIECE) {
        wait(file, PollFlags::POLLOUT, end)?;
        file.write_all(piece)?;
    }
    Ok(())
}

fn receive(mut file: &File) -> io::Result<Vec<u8>> {
    let end = Instant::now() + PATIENCE;
    let (mut state, mut piece) = (Vec::new(), [0; PIECE]);
    loop {
        wait(file, PollFlags::POLLIN, end)?;
        let count = match file.read(&mut piece) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            read => read?,
        };
        if count == 0 {
            return Ok(state);
        }
        state.extend_from_slice(piece.get(..count).unwrap_or_default());
        if state.len() > MAX_LEN {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_damaged_is_refused() {
        let sealed = seal("blk", 3, &[1_u8, 2, 3]).unwrap();
        let read = |sealed: &[u8]| open::<Vec<u8>>("blk", 3, sealed);
        assert_eq!(read(&sealed).unwrap(), [1, 2, 3]);
        for cut in 0..sealed.len() {
            assert!(read(&sealed[..cut]).is_err(), "{cut}");
        }
        for at in 0..sealed.len() {
            let mut wrong = sealed.clone();
            wrong[at] ^= 1;
            assert!(read(&wrong).is_err(), "{at}");
        }
        assert!(matches!(
            open::<Vec<u8>>("net", 3, &sealed),
            Err(StateError::Kind { found, .. }) if found == "blk"
        ));
        assert!(matches!(
            open::<Vec<u8>>("blk", 4, &sealed),
            Err(StateError::Version { found: 3, .. })
        ));
        let longer = [&sealed[..], &[0]].concat();
        assert!(matches!(read(&longer), Err(StateError::Length { .. })));
        assert!(matches!(
            open::<String>("blk", 3, &sealed),
            Err(StateError::Content(_))
        ));
    }

    #[test]
    fn a_pipe_without_end_is_not_read_for_ever() {
        let (reader, writer) = nix::unistd::pipe().unwrap();
        let mut transfers = Transfers::default();
        transfers.load(reader.into()).unwrap();
        let (other, _writer) = nix::unistd::pipe().unwrap();
        assert!(matches!(
            transfers.load(other.into()),
            Err(StateError::Busy)
        ));
        let filler = thread::spawn(move || {
            let mut writer = File::from(writer);
            while writer.write_all(&[7; PIECE]).is_ok() {}
        });
        assert!(matches!(transfers.check(), Err(StateError::TooLong)));
        filler.join().unwrap();
        assert!(matches!(transfers.check(), Err(StateError::NoTransfer)));
        let null = File::open("/dev/null").unwrap();
        assert!(matches!(transfers.load(null), Err(StateError::Descriptor)));
    }
}

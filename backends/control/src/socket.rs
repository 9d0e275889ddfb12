//! A Unix socket that a program listens on, and its file.

use std::fs::{self, File, TryLockError};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, connect, listen, socket,
};
use nix::sys::stat::{Mode, fchmod};

/// How long another program is given to make its socket, and between looks.
const LOCK_PATIENCE: Duration = Duration::from_secs(2);
const LOCK_PAUSE: Duration = Duration::from_millis(5);

/// Connections that may wait to be accepted.
const BACKLOG: i32 = 128;

/// A path cannot be listened on.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ListenError {
    /// Something that is no socket has that name.
    #[error("{path} exists and is not a socket; choose another path, or remove it")]
    NotASocket {
        /// The path.
        path: PathBuf,
    },
    /// A program listens there already.
    #[error("another program listens on {path}; end it, or choose another path")]
    InUse {
        /// The path.
        path: PathBuf,
    },
    /// The socket left by an earlier program cannot be examined or removed.
    #[error("cannot replace the stale socket {path}")]
    Stale {
        /// The path.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The socket cannot be created.
    #[error(
        "cannot listen on {path}; choose a path of less than 108 bytes in a directory that exists and that this user may \
         write to"
    )]
    Listen {
        /// The path.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
}

/// A listening socket's file, removed when dropped if it still is the one that was made.
#[derive(Debug)]
pub struct SocketFile {
    path: PathBuf,
    identity: (u64, u64),
}

impl SocketFile {
    /// Listens at `path`, for this user only (mode 0600). A socket that a process left behind when it died is replaced; one
    /// that somebody listens on is not, nor is anything else.
    ///
    /// # Errors
    /// [`ListenError`]
    pub fn listen(path: &Path) -> Result<(Self, UnixListener), ListenError> {
        let failed = |source| ListenError::Listen {
            path: path.to_owned(),
            source,
        };
        // Another program may find the same stale socket, and take ours for it before we listen.
        let _alone = lock_directory(path);
        remove_stale(path)?;
        let listener = listen_at(path).map_err(failed)?;
        let meta = fs::symlink_metadata(path).map_err(failed)?;
        let file = Self {
            path: path.to_owned(),
            identity: (meta.dev(), meta.ino()),
        };
        Ok((file, listener))
    }

    /// The file at `path` of a socket that another process listened on, and this one does now.
    ///
    /// # Errors
    /// It is not there any more.
    pub fn adopt(path: &Path) -> io::Result<Self> {
        let meta = fs::symlink_metadata(path)?;
        Ok(Self {
            path: path.to_owned(),
            identity: (meta.dev(), meta.ino()),
        })
    }

    /// Leaves the file to another process that listens on the socket.
    pub fn leave(self) {
        std::mem::forget(self);
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        let ours = fs::symlink_metadata(&self.path)
            .is_ok_and(|meta| (meta.dev(), meta.ino()) == self.identity);
        if ours && let Err(error) = fs::remove_file(&self.path) {
            tracing::warn!(%error, path = %self.path.display(), "cannot remove a socket");
        }
    }
}

/// Keeps other programs that make sockets in this way from doing so in the same directory, until it is closed. Programs that may not
/// open the directory, as they are confined already, do without; so they do if somebody else does not let it go.
fn lock_directory(path: &Path) -> Option<File> {
    let parent = path.parent().filter(|parent| parent != &Path::new(""));
    let directory = File::open(parent.unwrap_or(Path::new("."))).ok()?;
    let end = Instant::now() + LOCK_PATIENCE;
    loop {
        match directory.try_lock() {
            Ok(()) => return Some(directory),
            Err(TryLockError::WouldBlock) if Instant::now() < end => thread::sleep(LOCK_PAUSE),
            Err(_) => return None,
        }
    }
}

/// Removes a socket that nobody listens on.
fn remove_stale(path: &Path) -> Result<(), ListenError> {
    let stale = |source| ListenError::Stale {
        path: path.to_owned(),
        source,
    };
    let meta = match fs::symlink_metadata(path) {
        Ok(meta) => meta,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(stale(e)),
    };
    // A connection to any other file is refused, too.
    if !meta.file_type().is_socket() {
        return Err(ListenError::NotASocket {
            path: path.to_owned(),
        });
    }
    match connect_at_once(path) {
        Ok(_) | Err(Errno::EAGAIN) => Err(ListenError::InUse {
            path: path.to_owned(),
        }),
        Err(Errno::ECONNREFUSED) => {
            tracing::debug!(path = %path.display(), "replacing a stale socket");
            fs::remove_file(path).map_err(stale)
        }
        // A socket of another type has an owner.
        Err(e) => Err(stale(e.into())),
    }
}

/// A connection to who listens there, without waiting for it. It does not wait for what is sent either.
///
/// # Errors
/// EAGAIN: somebody listens, and those who wait to be accepted are as many as may (connect(2)). Whatever else the system says.
pub fn connect_at_once(path: &Path) -> nix::Result<UnixStream> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let socket = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
    connect(socket.as_raw_fd(), &UnixAddr::new(path)?)?;
    Ok(socket.into())
}

fn listen_at(path: &Path) -> io::Result<UnixListener> {
    let flags = SockFlag::SOCK_CLOEXEC;
    let socket = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
    // Before it is bound: the file has the socket's mode (unix(7)) from its first moment.
    fchmod(&socket, Mode::S_IRUSR | Mode::S_IWUSR)?;
    bind(socket.as_raw_fd(), &UnixAddr::new(path)?)?;
    listen(&socket, Backlog::new(BACKLOG)?)?;
    Ok(socket.into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn who_is_stopped_or_holds_the_directory_holds_nobody_up() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s");
        let stopped = listen_at(&path).unwrap();
        nix::sys::socket::listen(&stopped, Backlog::new(0).unwrap()).unwrap();
        let _waits = UnixStream::connect(&path).unwrap();
        let error = SocketFile::listen(&path).err();
        assert!(
            matches!(error, Some(ListenError::InUse { .. })),
            "{error:?}"
        );
        let holder = File::open(directory.path()).unwrap();
        holder.lock().unwrap();
        SocketFile::listen(&directory.path().join("other")).unwrap();
    }

    #[test]
    fn of_many_that_find_a_stale_socket_one_listens() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s");
        for _ in 0..50 {
            drop(listen_at(&path).unwrap());
            let listen = || SocketFile::listen(&path);
            let all = std::thread::scope(|scope| {
                let threads: Vec<_> = (0..4).map(|_| scope.spawn(listen)).collect();
                let all = threads.into_iter().map(|thread| thread.join().unwrap());
                all.filter_map(Result::ok).collect::<Vec<_>>()
            });
            assert_eq!(all.len(), 1);
            UnixStream::connect(&path).unwrap();
        }
    }

    #[test]
    fn the_socket_is_for_its_owner_and_goes_with_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        let (file, listener) = SocketFile::listen(&path).unwrap();
        let mode = path.metadata().unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        assert!(matches!(
            SocketFile::listen(&path),
            Err(ListenError::InUse { .. })
        ));
        // Somebody has put another one in its place.
        fs::remove_file(&path).unwrap();
        let (other, other_listener) = SocketFile::listen(&path).unwrap();
        drop((file, listener));
        assert!(path.exists());
        drop((other, other_listener));
        assert!(!path.exists());
        drop(UnixListener::bind(&path).unwrap());
        drop(SocketFile::listen(&path).unwrap());
        assert!(!path.exists(), "a stale one is replaced");
    }

    #[test]
    fn other_files_stay() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("precious");
        fs::write(&path, "precious").unwrap();
        let error = SocketFile::listen(&path).unwrap_err();
        assert!(matches!(error, ListenError::NotASocket { .. }), "{error}");
        assert_eq!(fs::read(&path).unwrap(), b"precious");
        let link = dir.path().join("link");
        std::os::unix::fs::symlink(&path, &link).unwrap();
        assert!(SocketFile::listen(&link).is_err());
        assert!(link.is_symlink());
        assert!(matches!(
            SocketFile::listen(&dir.path().join("no/such/dir")),
            Err(ListenError::Listen { .. })
        ));
    }
}

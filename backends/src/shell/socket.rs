//! The Unix socket on which front-ends are met: listening, connecting, or inherited.

#![allow(unsafe_code)] // An inherited descriptor becomes an owned one: nothing but the user vouches for it.

use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use nix::fcntl::{FcntlArg, fcntl};
use nix::sys::socket::{
    AddressFamily, SockType, SockaddrLike, SockaddrStorage, getsockname, getsockopt, sockopt,
};
use nix::sys::stat::{Mode, umask};
use thiserror::Error;
use tracing::{debug, warn};

/// The socket cannot be used.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum SocketError {
    /// Something that is no socket has that name.
    #[error("{path} exists and is not a socket; choose another --socket-path, or remove it")]
    NotASocket {
        /// The path.
        path: PathBuf,
    },
    /// A program listens there already.
    #[error("another program listens on {path}; end it, or choose another --socket-path")]
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
        "cannot listen on {path}; choose a --socket-path of less than 108 bytes in a directory that exists and that this \
         user may write to"
    )]
    Listen {
        /// The path.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The inherited descriptor is not open.
    #[error("--fd {fd}: no such open file descriptor")]
    NotOpen {
        /// Its number.
        fd: RawFd,
    },
    /// The inherited descriptor is no Unix stream socket.
    #[error("--fd {fd} is not a Unix stream socket")]
    NotUnixStream {
        /// Its number.
        fd: RawFd,
    },
    /// The inherited descriptor is neither listening nor connected.
    #[error("--fd {fd} is a socket that neither listens nor is connected")]
    NotConnected {
        /// Its number.
        fd: RawFd,
    },
    /// A property of the socket cannot be set.
    #[error("cannot prepare the socket")]
    Prepare(#[source] io::Error),
}

/// How front-ends come.
#[derive(Debug)]
pub(super) enum Endpoint {
    /// They connect to us.
    Listening(Listener),
    /// We connect to them, again and again.
    Connecting(PathBuf),
    /// There is exactly one, connected already.
    Connected(UnixStream),
}

/// A listening socket, and its file if we made it.
#[derive(Debug)]
pub(super) struct Listener {
    pub(super) socket: UnixListener,
    _file: Option<SocketFile>,
}

/// Removes the socket's file at the end, if it still is the one we made.
#[derive(Debug)]
struct SocketFile {
    path: PathBuf,
    identity: (u64, u64),
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        let ours = fs::symlink_metadata(&self.path)
            .is_ok_and(|meta| (meta.dev(), meta.ino()) == self.identity);
        if ours && let Err(error) = fs::remove_file(&self.path) {
            warn!(path = %self.path.display(), "cannot remove the socket: {error}");
        }
    }
}

/// Listens on `path` with mode 0600, in place of a socket that nobody serves any more.
pub(super) fn listen(path: &Path) -> Result<Endpoint, SocketError> {
    remove_stale(path)?;
    let failed = |source| SocketError::Listen {
        path: path.to_owned(),
        source,
    };
    // The mode has to be right from the first moment. No other thread runs yet that creates files.
    let before = umask(Mode::from_bits_truncate(0o177));
    let bound = UnixListener::bind(path);
    umask(before);
    let socket = bound.map_err(failed)?;
    let meta = fs::symlink_metadata(path).map_err(failed)?;
    let file = SocketFile {
        path: path.to_owned(),
        identity: (meta.dev(), meta.ino()),
    };
    socket.set_nonblocking(true).map_err(failed)?;
    Ok(Endpoint::Listening(Listener {
        socket,
        _file: Some(file),
    }))
}

fn remove_stale(path: &Path) -> Result<(), SocketError> {
    let stale = |source| SocketError::Stale {
        path: path.to_owned(),
        source,
    };
    let meta = match fs::symlink_metadata(path) {
        Ok(meta) => meta,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(stale(e)),
    };
    if !meta.file_type().is_socket() {
        return Err(SocketError::NotASocket {
            path: path.to_owned(),
        });
    }
    match UnixStream::connect(path) {
        Ok(_) => Err(SocketError::InUse {
            path: path.to_owned(),
        }),
        Err(e) if e.kind() == io::ErrorKind::ConnectionRefused => {
            debug!(path = %path.display(), "replacing a stale socket");
            fs::remove_file(path).map_err(stale)
        }
        // A full backlog, or a socket of another type, has an owner.
        Err(e) => Err(stale(e)),
    }
}

/// Whether a descriptor is a Unix stream socket.
pub(super) fn is_unix_stream(socket: &OwnedFd) -> bool {
    getsockopt(socket, sockopt::SockType).is_ok_and(|t| t == SockType::Stream)
        && getsockname::<SockaddrStorage>(socket.as_raw_fd())
            .is_ok_and(|name| name.family() == Some(AddressFamily::Unix))
}

/// Takes over an inherited socket, listening or connected.
pub(super) fn inherit(fd: RawFd) -> Result<Endpoint, SocketError> {
    // SAFETY: the number is only used to ask whether it is open; a closed one makes fcntl fail.
    let probe = unsafe { BorrowedFd::borrow_raw(fd) };
    if fcntl(probe, FcntlArg::F_GETFD).is_err() {
        return Err(SocketError::NotOpen { fd });
    }
    // SAFETY: the descriptor is open, and by --fd the user hands it over to this program, in which nothing
    // else knows its number.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    if !is_unix_stream(&socket) {
        return Err(SocketError::NotUnixStream { fd });
    }
    if getsockopt(&socket.as_fd(), sockopt::AcceptConn).unwrap_or(false) {
        let socket = UnixListener::from(socket);
        socket.set_nonblocking(true).map_err(SocketError::Prepare)?;
        return Ok(Endpoint::Listening(Listener {
            socket,
            _file: None,
        }));
    }
    let stream = UnixStream::from(socket);
    if stream.peer_addr().is_err() {
        return Err(SocketError::NotConnected { fd });
    }
    Ok(Endpoint::Connected(stream))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::IntoRawFd;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn socket_file_is_private_and_goes_away() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let endpoint = listen(&path).unwrap();
        let mode = fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        assert!(matches!(listen(&path), Err(SocketError::InUse { .. })));
        drop(endpoint);
        assert!(!path.exists());
    }

    #[test]
    fn stale_sockets_are_replaced_and_other_files_are_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        drop(UnixListener::bind(&path).unwrap());
        assert!(path.exists());
        drop(listen(&path).unwrap());
        fs::write(&path, "precious").unwrap();
        assert!(matches!(listen(&path), Err(SocketError::NotASocket { .. })));
        assert_eq!(fs::read(&path).unwrap(), b"precious");
        assert!(matches!(
            listen(&dir.path().join("no/such/dir")),
            Err(SocketError::Listen { .. })
        ));
    }

    #[test]
    fn somebody_elses_socket_file_stays() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let ours = listen(&path).unwrap();
        fs::remove_file(&path).unwrap();
        let _theirs = UnixListener::bind(&path).unwrap();
        drop(ours);
        assert!(path.exists());
    }

    #[test]
    fn inherited_descriptors_are_examined() {
        let dir = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(dir.path().join("s")).unwrap();
        assert!(matches!(
            inherit(listener.into_raw_fd()),
            Ok(Endpoint::Listening(_))
        ));
        let (a, _b) = UnixStream::pair().unwrap();
        assert!(matches!(
            inherit(a.into_raw_fd()),
            Ok(Endpoint::Connected(_))
        ));
        let file = tempfile::tempfile().unwrap();
        assert!(matches!(
            inherit(file.into_raw_fd()),
            Err(SocketError::NotUnixStream { .. })
        ));
        assert!(matches!(
            inherit(1_000_000),
            Err(SocketError::NotOpen { .. })
        ));
    }
}

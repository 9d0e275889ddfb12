//! The Unix socket on which front-ends are met: listening, connecting, or inherited.

#![allow(unsafe_code)] // An inherited descriptor becomes an owned one: nothing but the user vouches for it.

use std::io;
use std::mem::ManuallyDrop;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::socket::{
    AddressFamily, SockType, SockaddrLike, SockaddrStorage, getsockname, getsockopt, sockopt,
};
use nix::unistd::dup3;
use ringside_control::{ListenError, SocketFile};
use thiserror::Error;

/// The socket cannot be used.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum SocketError {
    /// The path cannot be listened on.
    #[error(transparent)]
    Listen(#[from] ListenError),
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
    file: Option<SocketFile>,
}

impl Listener {
    /// Leaves the file to another process that has the socket.
    pub(super) fn leave(self) {
        if let Some(file) = self.file {
            file.leave();
        }
    }
}

impl Endpoint {
    /// A listening socket that another process has, and whose file is still that one's.
    pub(super) fn adopt(socket: UnixListener) -> Self {
        Self::Listening(Listener { socket, file: None })
    }

    /// The file of the socket is this process's from now on.
    pub(super) fn adopt_file(&mut self, path: &Path) -> io::Result<()> {
        if let Self::Listening(listener) = self {
            listener.file = Some(SocketFile::adopt(path)?);
        }
        Ok(())
    }
}

/// Listens on `path` with mode 0600, in place of a socket that nobody serves any more.
pub(super) fn listen(path: &Path) -> Result<Endpoint, SocketError> {
    let (file, socket) = SocketFile::listen(path)?;
    socket.set_nonblocking(true).map_err(SocketError::Prepare)?;
    Ok(Endpoint::Listening(Listener {
        socket,
        file: Some(file),
    }))
}

/// Whether a descriptor is a Unix stream socket.
pub(super) fn is_unix_stream(socket: &OwnedFd) -> bool {
    getsockopt(socket, sockopt::SockType).is_ok_and(|t| t == SockType::Stream)
        && getsockname::<SockaddrStorage>(socket.as_raw_fd())
            .is_ok_and(|name| name.family() == Some(AddressFamily::Unix))
}

/// Puts a socket in the place of another, whose number keeps its owner.
pub(super) fn replace(number: RawFd, socket: &UnixStream) -> io::Result<()> {
    // SAFETY: the caller lends its owner's number; what it stands for is exchanged at once, and never closed here.
    let mut place = ManuallyDrop::new(unsafe { OwnedFd::from_raw_fd(number) });
    dup3(socket, &mut place, OFlag::O_CLOEXEC)?;
    Ok(())
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
        return Ok(Endpoint::Listening(Listener { socket, file: None }));
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

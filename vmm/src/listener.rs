//! Unix sockets that the VMM listens on.

use std::fs;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, listen, socket,
};
use nix::sys::stat::{Mode, fchmod};

/// A listening socket's file, removed when dropped if it still is the one that was made.
#[derive(Debug)]
pub(crate) struct SocketFile {
    path: PathBuf,
    identity: (u64, u64),
}

impl SocketFile {
    /// Listens at `path`, for this user only. A socket that a process left behind when it died is replaced; one that
    /// somebody listens on is not, nor is anything else.
    pub(crate) fn listen(path: &Path) -> io::Result<(Self, UnixListener)> {
        let listener = match listen_at(path) {
            Err(e) if e.kind() == io::ErrorKind::AddrInUse && is_stale(path)? => {
                fs::remove_file(path)?;
                listen_at(path)?
            }
            result => result?,
        };
        let meta = fs::symlink_metadata(path)?;
        let file = Self {
            path: path.to_owned(),
            identity: (meta.dev(), meta.ino()),
        };
        Ok((file, listener))
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

/// Whether there is a socket that nobody listens on.
fn is_stale(path: &Path) -> io::Result<bool> {
    // A connection to any other file is refused, too.
    if !fs::symlink_metadata(path)?.file_type().is_socket() {
        return Err(io::Error::new(
            io::ErrorKind::AlreadyExists,
            "the file is there, and is not a socket",
        ));
    }
    let connected = UnixStream::connect(path);
    Ok(connected.is_err_and(|e| e.kind() == io::ErrorKind::ConnectionRefused))
}

fn listen_at(path: &Path) -> io::Result<UnixListener> {
    let flags = SockFlag::SOCK_CLOEXEC;
    let socket = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
    // Before it is bound: the file has the socket's mode (unix(7)) from its first moment.
    fchmod(&socket, Mode::S_IRUSR | Mode::S_IWUSR)?;
    bind(socket.as_raw_fd(), &UnixAddr::new(path)?)?;
    listen(&socket, Backlog::new(16)?)?;
    Ok(socket.into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn the_socket_is_for_its_owner_and_goes_with_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        let (file, listener) = SocketFile::listen(&path).unwrap();
        let mode = path.metadata().unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        assert!(SocketFile::listen(&path).is_err(), "in use");
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
        assert!(error.to_string().contains("not a socket"), "{error}");
        assert_eq!(fs::read(&path).unwrap(), b"precious");
        let link = dir.path().join("link");
        std::os::unix::fs::symlink(&path, &link).unwrap();
        assert!(SocketFile::listen(&link).is_err());
        assert!(link.is_symlink());
    }
}

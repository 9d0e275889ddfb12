//! The connection between two VMMs over which a guest moves, and the words at its end.
//!
//! ```text
//! source                                    destination
//!   description, memory, …, state ───────────▶
//!                        ◀─────────────────── READY: it has all of it, and everything fits
//!   gives the guest up   GO ─────────────────▶
//!                        ◀─────────────────── RUNNING
//! ```
//!
//! Before GO the source has the guest, and lets it go on if anything fails; a destination that has heard no GO never runs it. If
//! the source hears no RUNNING it cannot know, and leaves the guest paused for somebody to decide.

use std::fmt;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use ringside_control::{Peers, SocketFile};
use serde::Deserialize;
use serde::de::{Deserializer, Error as _};

use crate::complaints::Complaints;

/// How long the other side may be silent.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// The destination has the guest, and can run it.
pub const READY: u8 = b'R';
/// The destination is to run it.
pub const GO: u8 = b'G';
/// It does.
pub const RUNNING: u8 = b'!';

/// Where a guest moves to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// A Unix socket.
    Unix(PathBuf),
    /// A port of TCP.
    Tcp(SocketAddr),
}

impl FromStr for Address {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("`{text}` is neither unix:PATH nor tcp:ADDRESS:PORT, by number");
        match text.split_once(':') {
            Some(("unix", path)) if !path.is_empty() => Ok(Self::Unix(path.into())),
            Some(("tcp", address)) => address.parse().map(Self::Tcp).map_err(|_| wrong()),
            _ => Err(wrong()),
        }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
            Self::Tcp(address) => write!(f, "tcp:{address}"),
        }
    }
}

impl<'de> Deserialize<'de> for Address {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(D::Error::custom)
    }
}

/// A connection to the other VMM.
pub enum Connection {
    /// Over a Unix socket.
    Unix(UnixStream),
    /// Over TCP.
    Tcp(TcpStream),
}

impl Connection {
    /// Connects to a VMM that waits for a guest.
    ///
    /// # Errors
    /// Nobody listens there, or there is no right to connect.
    pub fn connect(address: &Address) -> io::Result<Self> {
        match address {
            Address::Unix(path) => Self::Unix(UnixStream::connect(path)?),
            Address::Tcp(address) => Self::Tcp(TcpStream::connect_timeout(address, PATIENCE)?),
        }
        .prepared()
    }

    /// Another handle of the same connection.
    ///
    /// # Errors
    /// The process has no file descriptor left.
    pub fn try_clone(&self) -> io::Result<Self> {
        Ok(match self {
            Self::Unix(stream) => Self::Unix(stream.try_clone()?),
            Self::Tcp(stream) => Self::Tcp(stream.try_clone()?),
        })
    }

    fn prepared(self) -> io::Result<Self> {
        match &self {
            Self::Unix(stream) => {
                stream.set_read_timeout(Some(PATIENCE))?;
                stream.set_write_timeout(Some(PATIENCE))?;
            }
            Self::Tcp(stream) => {
                stream.set_read_timeout(Some(PATIENCE))?;
                stream.set_write_timeout(Some(PATIENCE))?;
                // The last words are short, and the guest stands still.
                stream.set_nodelay(true)?;
            }
        }
        Ok(self)
    }

    /// Says a word.
    ///
    /// # Errors
    /// The other side is gone.
    pub fn say(&mut self, word: u8) -> io::Result<()> {
        self.write_all(&[word])?;
        self.flush()
    }

    /// Waits for a word.
    ///
    /// # Errors
    /// The other side is gone, is silent, or says something else.
    pub fn hear(&mut self, word: u8) -> io::Result<()> {
        let mut heard = [0];
        self.read_exact(&mut heard)?;
        if heard == [word] {
            Ok(())
        } else {
            Err(io::ErrorKind::InvalidData.into())
        }
    }
}

impl Read for Connection {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Unix(stream) => stream.read(buffer),
            Self::Tcp(stream) => stream.read(buffer),
        }
    }
}

impl Write for Connection {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        match self {
            Self::Unix(stream) => stream.write(buffer),
            Self::Tcp(stream) => stream.write(buffer),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Waits for one guest.
pub enum Listener {
    /// At a Unix socket, whose file goes with it.
    Unix(UnixListener, SocketFile),
    /// At a port of TCP.
    Tcp(TcpListener),
}

impl Listener {
    /// Listens. A Unix socket has mode 0600.
    ///
    /// # Errors
    /// Somebody else does, or there is no right to.
    pub fn bind(address: &Address) -> io::Result<Self> {
        Ok(match address {
            Address::Unix(path) => {
                let (file, listener) = SocketFile::listen(path).map_err(io::Error::other)?;
                Self::Unix(listener, file)
            }
            Address::Tcp(address) => Self::Tcp(TcpListener::bind(address)?),
        })
    }

    /// Waits for the VMM that has the guest, as long as it takes. At a Unix socket it is one of these users'; with TCP nobody
    /// says whose it is.
    ///
    /// # Errors
    /// The process has no file descriptor left.
    pub fn accept(&self, peers: &Peers) -> io::Result<Connection> {
        let complaints = Complaints::default();
        match self {
            Self::Unix(listener, _) => loop {
                let (stream, _) = listener.accept()?;
                match peers.check(&stream) {
                    Ok(()) => break Connection::Unix(stream),
                    Err(error) if complaints.may_complain() => {
                        tracing::warn!("socket for a guest: {error}");
                    }
                    Err(_) => {}
                }
            },
            Self::Tcp(listener) => Connection::Tcp(listener.accept()?.0),
        }
        .prepared()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stranger::Stranger;

    #[test]
    fn addresses_are_read_and_shown() {
        for text in ["unix:/run/a", "tcp:10.0.0.1:77", "tcp:[::1]:77"] {
            assert_eq!(text.parse::<Address>().unwrap().to_string(), text);
        }
        for text in ["", "unix:", "/run/a", "tcp:host:1", "tcp:10.0.0.1"] {
            assert!(text.parse::<Address>().is_err(), "{text}");
        }
    }

    #[test]
    fn a_guest_comes_from_no_other_user() {
        const TEST: &str = "snapshot::transport::tests::a_guest_comes_from_no_other_user";
        let Some(stranger) = Stranger::new(TEST, |path| {
            let mut stream = UnixStream::connect(path).unwrap();
            assert_eq!(stream.read(&mut [0]).unwrap(), 0);
        }) else {
            return;
        };
        let unix = Address::Unix(stranger.socket());
        let listener = Listener::bind(&unix).unwrap();
        let stranger = stranger.start();
        let accepting = std::thread::spawn(move || {
            let mut accepted = listener.accept(&Peers::allowing(&[])).unwrap();
            accepted.say(READY).unwrap();
        });
        // Which ends only when it is told that nobody takes it.
        stranger.end();
        Connection::connect(&unix).unwrap().hear(READY).unwrap();
        accepting.join().unwrap();
    }

    #[test]
    fn words_go_both_ways() {
        let dir = tempfile::tempdir().unwrap();
        let unix = Address::Unix(dir.path().join("s"));
        let listener = Listener::bind(&unix).unwrap();
        let mut source = Connection::connect(&unix).unwrap();
        let mut destination = listener.accept(&Peers::allowing(&[])).unwrap();
        destination.say(READY).unwrap();
        source.hear(READY).unwrap();
        source.say(b'?').unwrap();
        assert!(destination.hear(GO).is_err());
        drop(source);
        assert!(destination.hear(GO).is_err());
    }
}

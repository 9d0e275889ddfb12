//! Where an export is: `nbd://` and `nbd+unix://` (NBD, doc/uri.md).

use std::fmt;
use std::fs::File;
use std::io;
use std::net::{IpAddr, TcpStream, ToSocketAddrs};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::sys::socket::{
    self, AddressFamily, SockFlag, SockType, UnixAddr, setsockopt, socket, sockopt,
};
use percent_encoding::percent_decode_str;
use ringside_sandbox::{Profile, ThreadKind, calls};
use thiserror::Error;
use tracing::debug;

/// The port of NBD servers (NBD, doc/uri.md, "NBD URI components").
const PORT: u16 = 10809;
/// Longest name of an export (NBD, doc/proto.md, "Values", NBD_OPT_EXPORT_NAME).
const MAX_NAME: usize = 4096;
/// After this many seconds of silence the peer is asked whether it is still there…
const KEEPALIVE_IDLE: u32 = 10;
/// …again and again after so many…
const KEEPALIVE_INTERVAL: u32 = 5;
/// …and given up after so many times.
const KEEPALIVE_COUNT: u32 = 3;

/// A path that begins like an NBD URI, and is none that can be used.
#[derive(Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum UriError {
    /// An unknown scheme.
    #[error(
        "{0}: only nbd://HOST[:PORT]/EXPORT and nbd+unix:///EXPORT?socket=PATH are possible; there is no TLS"
    )]
    Scheme(String),
    /// No host.
    #[error("{0}: the host is missing; write nbd://HOST[:PORT]/EXPORT")]
    Host(String),
    /// The port is no number.
    #[error("{0}: the port is not a number between 1 and 65535")]
    Port(String),
    /// A Unix socket without its path.
    #[error("{0}: the socket is missing; write nbd+unix:///EXPORT?socket=PATH")]
    Socket(String),
    /// Something in percent signs that is no text.
    #[error("{0}: what is encoded by percent signs is not UTF-8")]
    Encoding(String),
    /// The export's name.
    #[error("{0}: the name of the export is longer than 4096 bytes")]
    Name(String),
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Server {
    Tcp { host: String, port: u16 },
    Unix(PathBuf),
}

/// An export of a server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::blk) struct Target {
    server: Server,
    /// Name of the export; the empty name is the server's default.
    pub(super) export: String,
}

impl Target {
    /// Reads a URI; `None` if the path is none.
    pub(in crate::blk) fn parse(path: &Path) -> Option<Result<Self, UriError>> {
        let text = path.to_str()?;
        let (scheme, rest) = text.split_once("://")?;
        scheme
            .starts_with("nbd")
            .then(|| Self::parse_uri(text, scheme, rest))
    }

    fn parse_uri(text: &str, scheme: &str, rest: &str) -> Result<Self, UriError> {
        let whole = || text.to_owned();
        let decode = |part: &str| {
            percent_decode_str(part)
                .decode_utf8()
                .map(|s| s.into_owned())
                .map_err(|_| UriError::Encoding(whole()))
        };
        let (before, query) = rest.split_once('?').unwrap_or((rest, ""));
        let (authority, export) = before.split_once('/').unwrap_or((before, ""));
        let export = decode(export)?;
        if export.len() > MAX_NAME {
            return Err(UriError::Name(whole()));
        }
        let server = match scheme {
            "nbd" => {
                let (host, port) = match authority.strip_prefix('[').map(|a| a.split_once(']')) {
                    Some(Some((host, after))) => (host, after.strip_prefix(':')),
                    Some(None) => return Err(UriError::Host(whole())),
                    None => match authority.rsplit_once(':') {
                        Some((host, port)) => (host, Some(port)),
                        None => (authority, None),
                    },
                };
                if host.is_empty() {
                    return Err(UriError::Host(whole()));
                }
                let port = match port {
                    None | Some("") => PORT,
                    Some(number) => match number.parse() {
                        Ok(port) if port > 0 => port,
                        _ => return Err(UriError::Port(whole())),
                    },
                };
                Server::Tcp {
                    host: decode(host)?,
                    port,
                }
            }
            "nbd+unix" => {
                let socket = query
                    .split('&')
                    .find_map(|pair| pair.strip_prefix("socket="))
                    .filter(|socket| !socket.is_empty() && authority.is_empty())
                    .ok_or_else(|| UriError::Socket(whole()))?;
                Server::Unix(decode(socket)?.into())
            }
            _ => return Err(UriError::Scheme(whole())),
        };
        Ok(Self { server, export })
    }

    /// What it takes to connect again, and to talk.
    pub(super) fn needs(&self, profile: &mut Profile) {
        let server = ThreadKind::Server;
        profile
            .calls(calls::STREAMS)
            .thread(server, &[calls::STREAMS]);
        match &self.server {
            Server::Unix(path) => profile
                .connect(path)
                .calls(calls::CONNECTING)
                .thread(server, &[calls::CONNECTING]),
            Server::Tcp { host, port } => {
                profile
                    .connect_tcp(*port)
                    .calls(calls::TCP)
                    .thread(server, &[calls::TCP]);
                if host.parse::<IpAddr>().is_err() {
                    profile.names().thread(server, &[calls::NAMES]);
                }
                profile
            }
        };
    }

    /// Connects. Reading and writing fail after `patience`, until the socket is made non-blocking.
    pub(super) fn connect(&self, patience: Duration) -> io::Result<File> {
        let fd = match &self.server {
            Server::Unix(path) => {
                let (family, kind) = (AddressFamily::Unix, SockType::Stream);
                let fd = socket(family, kind, SockFlag::SOCK_CLOEXEC, None)?;
                let stream = UnixStream::from(fd);
                stream.set_read_timeout(Some(patience))?;
                // Also for connecting: a server that accepts nobody has a queue that fills up (unix(7)).
                stream.set_write_timeout(Some(patience))?;
                socket::connect(stream.as_raw_fd(), &UnixAddr::new(path)?)?;
                OwnedFd::from(stream)
            }
            Server::Tcp { host, port } => {
                let mut last = io::Error::from(io::ErrorKind::AddrNotAvailable);
                let stream = (host.as_str(), *port)
                    .to_socket_addrs()?
                    .find_map(
                        |address| match TcpStream::connect_timeout(&address, patience) {
                            Ok(stream) => Some(stream),
                            Err(e) => {
                                last = e;
                                None
                            }
                        },
                    )
                    .ok_or(last)?;
                stream.set_nodelay(true)?;
                stream.set_read_timeout(Some(patience))?;
                stream.set_write_timeout(Some(patience))?;
                if let Err(e) = watch(&stream) {
                    debug!("a server that vanishes may be noticed late: {e}");
                }
                OwnedFd::from(stream)
            }
        };
        Ok(File::from(fd))
    }
}

/// Lets the kernel notice a peer that is gone without a word.
fn watch(stream: &impl AsFd) -> nix::Result<()> {
    setsockopt(stream, sockopt::KeepAlive, &true)?;
    setsockopt(stream, sockopt::TcpKeepIdle, &KEEPALIVE_IDLE)?;
    setsockopt(stream, sockopt::TcpKeepInterval, &KEEPALIVE_INTERVAL)?;
    setsockopt(stream, sockopt::TcpKeepCount, &KEEPALIVE_COUNT)?;
    let all = KEEPALIVE_COUNT
        .saturating_mul(KEEPALIVE_INTERVAL)
        .saturating_add(KEEPALIVE_IDLE)
        .saturating_mul(1000);
    setsockopt(stream, sockopt::TcpUserTimeout, &all)
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.server {
            Server::Tcp { host, port } => write!(f, "export {:?} of {host}:{port}", self.export),
            Server::Unix(path) => write!(f, "export {:?} of {}", self.export, path.display()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::socket::{Backlog, bind, listen};
    use std::time::Instant;

    #[test]
    fn a_server_that_accepts_nobody_is_left() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let (family, kind) = (AddressFamily::Unix, SockType::Stream);
        let listener = socket(family, kind, SockFlag::SOCK_CLOEXEC, None).unwrap();
        bind(listener.as_raw_fd(), &UnixAddr::new(&path).unwrap()).unwrap();
        listen(&listener, Backlog::new(1).unwrap()).unwrap();
        let target = Target {
            server: Server::Unix(path),
            export: String::new(),
        };
        let start = Instant::now();
        let waiting: Vec<_> = (0..4)
            .map(|_| target.connect(Duration::from_millis(50)))
            .collect();
        assert!(waiting.first().is_some_and(Result::is_ok));
        assert!(waiting.last().is_some_and(Result::is_err));
        assert!(start.elapsed() < Duration::from_secs(5));
    }

    fn parse(text: &str) -> Option<Result<Target, UriError>> {
        Target::parse(Path::new(text))
    }

    fn tcp(host: &str, port: u16, export: &str) -> Option<Result<Target, UriError>> {
        Some(Ok(Target {
            server: Server::Tcp {
                host: host.into(),
                port,
            },
            export: export.into(),
        }))
    }

    #[test]
    fn uris_are_read_and_paths_are_left_alone() {
        assert_eq!(parse("/nbd/x"), None);
        assert_eq!(parse("disk.img"), None);
        assert_eq!(parse("nbd://h/disk"), tcp("h", 10809, "disk"));
        assert_eq!(parse("nbd://h:1/a%20b/c"), tcp("h", 1, "a b/c"));
        assert_eq!(parse("nbd://[::1]:2"), tcp("::1", 2, ""));
        assert_eq!(parse("nbd://[::1]/x"), tcp("::1", 10809, "x"));
        assert_eq!(
            parse("nbd+unix:///x?socket=/run/a%2fb"),
            Some(Ok(Target {
                server: Server::Unix("/run/a/b".into()),
                export: "x".into()
            }))
        );
        let refused = |text: &str| parse(text).unwrap().unwrap_err().to_string();
        assert!(refused("nbds://h/x").contains("no TLS"));
        assert!(refused("nbd:///x").contains("host is missing"));
        assert!(refused("nbd://[::1/x").contains("host is missing"));
        assert!(refused("nbd://h:0/x").contains("port"));
        assert!(refused("nbd://h:99999/x").contains("port"));
        assert!(refused("nbd+unix:///x").contains("socket is missing"));
        assert!(refused("nbd+unix://h/x?socket=/s").contains("socket is missing"));
        assert!(refused("nbd://h/%ff").contains("UTF-8"));
        assert!(refused(&format!("nbd://h/{}", "x".repeat(4097))).contains("4096"));
    }
}

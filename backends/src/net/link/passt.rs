//! User-mode networking without privileges: a passt process on the other end of a stream socket.
//!
//! ```text
//!  guest memory ──sendmsg──▶ [length, 4 bytes, big endian][frame] … ─▶ passt ─▶ its own sockets on the host
//!               ◀──copy───── buffer ◀──recv── as many frames as are there
//! ```
//!
//! passt knows no virtio-net header, so there are no offloads. A frame of which the socket took only a part is finished before
//! the next one: its rest is kept here. When passt goes, it is connected to or started again, at growing intervals; frames from the
//! guest are dropped meanwhile.
//!
//! A program that takes the place of this one gets the connection, what was read from it and is not the guest's yet, and the starter.

use std::ffi::OsString;
use std::io;
use std::net::IpAddr;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use epoll::Events;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::sockopt::SndBuf;
use nix::sys::socket::{MsgFlags, recv, send, setsockopt};
use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};
use ringside_control::connect_at_once;
use ringside_sandbox::Profile;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use thiserror::Error;
use tracing::{debug, info, warn};

use super::starter::{PROGRAM, Starter};
use super::{Interface, Link, LinkSpec, MAX_HEADER, Ready};
use crate::net::epoll_set::Watcher;
use crate::net::iov::IoList;
use crate::net::tx::MAX_FRAME;
use crate::shell::{Chain as Causes, LogLimit};

/// Bytes before each frame: its length.
const PREFIX: usize = 4;
/// Bytes that are read at once: several of the longest frames.
const BUFFER: usize = 4 * (PREFIX + MAX_FRAME);
/// Bytes that the socket is asked to hold, so that long frames pass whole.
const SOCKET_BUFFER: usize = 1 << 20;
/// First and longest time between two attempts to have a passt again.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));
/// How often it is looked whether a passt was started.
const ANSWER_POLL: Duration = Duration::from_millis(10);
/// How long a passt that is started may take to say something, in milliseconds.
const START_LIMIT: u16 = 500;

/// There is no passt to be had.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum PasstError {
    /// Nobody listens.
    #[error(
        "no passt listens at {path}: start one (passt --socket {path}), or say --link passt and let this program start it",
        path = .path.display()
    )]
    Connect {
        /// The socket.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// Somebody listens, and does not accept.
    #[error(
        "the passt at {path} takes no connection: it serves another program, or is stopped; end it and start another one",
        path = .path.display()
    )]
    Silent {
        /// The socket.
        path: PathBuf,
    },
    /// It cannot be started.
    #[error("cannot start {PROGRAM}: install it, and have it in the PATH")]
    Start(#[source] io::Error),
    /// It ended at once.
    #[error("{PROGRAM} ended at once ({0}): it says why above")]
    Ended(std::process::ExitStatus),
    /// The process that starts it is not there.
    #[error("cannot have a process that starts {PROGRAM}")]
    Starter(#[source] io::Error),
    /// The system refused something that every process needs.
    #[error("cannot make a socket or a timer for {PROGRAM}")]
    System(#[source] io::Error),
}

/// A protocol whose ports can be forwarded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Protocol {
    Tcp,
    Udp,
}

/// A port of the host that leads to a port of the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Forward {
    protocol: Protocol,
    /// The address of the host; all without one.
    address: Option<IpAddr>,
    host: u16,
    guest: u16,
}

/// A text is no forwarded port.
#[derive(Debug, Error, PartialEq, Eq)]
#[error(
    "expected PROTOCOL:[ADDRESS/]HOST-PORT[:GUEST-PORT], as in tcp:8080:80 or udp:127.0.0.1/5353"
)]
pub struct ForwardError;

impl FromStr for Forward {
    type Err = ForwardError;

    fn from_str(text: &str) -> Result<Self, ForwardError> {
        let (protocol, rest) = text.split_once(':').ok_or(ForwardError)?;
        let protocol = match protocol {
            "tcp" => Protocol::Tcp,
            "udp" => Protocol::Udp,
            _ => return Err(ForwardError),
        };
        let (address, ports) = match rest.split_once('/') {
            Some((address, ports)) => (Some(address.parse().map_err(|_| ForwardError)?), ports),
            None => (None, rest),
        };
        let port = |text: &str| match text.parse() {
            Ok(0) | Err(_) => Err(ForwardError),
            Ok(port) => Ok(port),
        };
        let (host, guest) = match ports.split_once(':') {
            Some((host, guest)) => (port(host)?, port(guest)?),
            None => (port(ports)?, port(ports)?),
        };
        Ok(Self {
            protocol,
            address,
            host,
            guest,
        })
    }
}

impl Forward {
    /// As passt has it on its command line.
    fn arguments(self) -> [OsString; 2] {
        let option = match self.protocol {
            Protocol::Tcp => "--tcp-ports",
            Protocol::Udp => "--udp-ports",
        };
        let address = self.address.map(|address| format!("{address}/"));
        let ports = format!(
            "{}{}:{}",
            address.unwrap_or_default(),
            self.host,
            self.guest
        );
        [option.into(), ports.into()]
    }
}

/// Where a passt comes from.
#[derive(Debug)]
pub(super) enum Source {
    /// One listens on this socket.
    Listening(PathBuf),
    /// This one starts it.
    Started(Starter),
}

impl Source {
    /// A passt to be started, that forwards ports and tells the guest this MTU.
    pub(super) fn started(
        forwards: &[Forward],
        arguments: &[String],
        mtu: Option<u16>,
    ) -> Result<Self, PasstError> {
        let mtu = mtu.map(|mtu| ["--mtu".into(), mtu.to_string().into()]);
        let all = mtu
            .into_iter()
            .flatten()
            .chain(forwards.iter().flat_map(|forward| forward.arguments()))
            .chain(arguments.iter().map(OsString::from));
        let starter = Starter::new(&all.collect::<Vec<_>>()).map_err(PasstError::Starter)?;
        Ok(Self::Started(starter))
    }

    /// A connection to it. `None`, and `asked` is set, while one is being started.
    fn try_connect(&self, asked: &mut bool) -> Result<Option<Connection>, PasstError> {
        let stream = match self {
            Self::Listening(path) => connect_at_once(path).map(Some).map_err(|errno| {
                let path = path.clone();
                match errno {
                    Errno::EAGAIN => PasstError::Silent { path },
                    errno => PasstError::Connect {
                        path,
                        source: errno.into(),
                    },
                }
            })?,
            Self::Started(starter) => {
                if !*asked {
                    starter.ask().map_err(PasstError::Start)?;
                }
                let answer = starter.answer();
                *asked = matches!(answer, Ok(None));
                answer.map_err(PasstError::Start)?
            }
        };
        let Some(stream) = stream else {
            return Ok(None);
        };
        prepare(&stream).map_err(PasstError::System)?;
        Ok(Some(Connection {
            stream,
            since: Instant::now(),
        }))
    }

    /// A connection to it, however long that takes.
    fn connect(&self) -> Result<Connection, PasstError> {
        let mut asked = false;
        loop {
            if let Some(connection) = self.try_connect(&mut asked)? {
                return Ok(connection);
            }
            if let Self::Started(starter) = self {
                starter.await_answer().map_err(PasstError::Start)?;
            }
        }
    }

    /// Waits until a passt that was just started says something, which it does at once, or does not like its arguments.
    fn await_life(&self, connection: &Connection) -> Result<(), PasstError> {
        let Self::Started(starter) = self else {
            return Ok(());
        };
        let mut fds = [PollFd::new(connection.stream.as_fd(), PollFlags::POLLIN)];
        // If it is silent, it is taken as it is.
        let _ = poll(&mut fds, PollTimeout::from(START_LIMIT));
        let [fd] = fds;
        let happened = fd.revents().unwrap_or(PollFlags::empty());
        if !happened.contains(PollFlags::POLLHUP) {
            return Ok(());
        }
        let status = starter.wait().map_err(PasstError::Starter)?;
        Err(PasstError::Ended(status))
    }
}

/// A connection to a passt.
#[derive(Debug)]
struct Connection {
    stream: UnixStream,
    since: Instant,
}

/// What another program goes on with.
#[derive(Debug)]
pub(super) struct Handle {
    spec: LinkSpec,
    starter: Option<UnixStream>,
    /// The present connection.
    stream: Mutex<Option<UnixStream>>,
    left: Mutex<Left>,
}

/// What of frames is on neither side of the connection while a program takes the place of another.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Left {
    /// From passt, for the guest.
    received: Vec<u8>,
    /// The rest of a frame of the guest.
    pending: Vec<u8>,
    /// The starter has not answered yet.
    #[serde(default)]
    asked: bool,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Handle {
    fn connected(&self, connection: Option<&Connection>) {
        let stream = connection.and_then(|connection| connection.stream.try_clone().ok());
        *lock(&self.stream) = stream;
    }
}

impl Interface for Handle {
    fn needs(&self, profile: &mut Profile) {
        self.spec.needs(profile);
    }

    /// The starter's socket, if there is one, and the connection, if there is one.
    fn parts(&self) -> io::Result<Option<Vec<OwnedFd>>> {
        let stream = lock(&self.stream);
        let all = self.starter.iter().chain(stream.as_ref());
        let all = all.map(|socket| Ok(socket.try_clone()?.into()));
        all.collect::<io::Result<_>>().map(Some)
    }

    fn left(&self) -> Value {
        json!(*lock(&self.left))
    }

    fn adopt_left(&self, left: &Value) -> io::Result<()> {
        let left = Left::deserialize(left)?;
        if left.received.len() > BUFFER || left.pending.len() > PREFIX + MAX_FRAME {
            return Err(io::ErrorKind::InvalidData.into());
        }
        *lock(&self.left) = left;
        Ok(())
    }
}

/// The link to a passt.
pub(super) struct Passt {
    handle: Arc<Handle>,
    source: Source,
    connection: Option<Connection>,
    watcher: Option<Watcher>,
    /// Rings when it is time to have a passt again.
    timer: TimerFd,
    backoff: Duration,
    /// A passt is being started.
    asked: bool,
    /// What came from it and was not given yet lies in `start..end`.
    buffer: Box<[u8]>,
    start: usize,
    end: usize,
    /// The rest of a frame of which the socket took a part.
    pending: Vec<u8>,
    /// Bytes of it that are gone by now.
    sent: usize,
    /// It may be another program's, and so may its starter.
    left: bool,
    log: LogLimit,
}

impl Passt {
    /// Connects to a passt, or starts one.
    pub(super) fn open(source: Source) -> Result<Self, PasstError> {
        let connection = source.connect()?;
        source.await_life(&connection)?;
        Self::on(source, Some(connection))
    }

    /// Goes on with the passt of another program: at `path`, or that which its starter has started.
    pub(super) fn adopt(
        path: Option<&Path>,
        descriptors: Vec<OwnedFd>,
    ) -> Result<Self, PasstError> {
        let mut sockets = descriptors.into_iter().map(UnixStream::from);
        let source = match path {
            Some(path) => Source::Listening(path.to_owned()),
            None => {
                let socket = sockets.next().ok_or(io::ErrorKind::NotConnected);
                let starter = socket.map_err(io::Error::from).and_then(Starter::on);
                Source::Started(starter.map_err(PasstError::Starter)?)
            }
        };
        let connection = sockets.next().map(|stream| Connection {
            stream,
            since: Instant::now(),
        });
        let mut link = Self::on(source, connection)?;
        link.left = true;
        Ok(link)
    }

    fn on(source: Source, connection: Option<Connection>) -> Result<Self, PasstError> {
        let timer = TimerFd::new(
            ClockId::CLOCK_MONOTONIC,
            TimerFlags::TFD_NONBLOCK | TimerFlags::TFD_CLOEXEC,
        )
        .map_err(|errno| PasstError::System(errno.into()))?;
        let (path, starter) = match &source {
            Source::Listening(path) => (Some(path.clone()), None),
            Source::Started(starter) => (None, Some(starter.socket().map_err(PasstError::System)?)),
        };
        let handle = Arc::new(Handle {
            spec: LinkSpec::Passt(path),
            starter,
            stream: Mutex::default(),
            left: Mutex::default(),
        });
        handle.connected(connection.as_ref());
        Ok(Self {
            handle,
            source,
            connection,
            watcher: None,
            timer,
            backoff: BACKOFF.0,
            asked: false,
            buffer: vec![0; BUFFER].into(),
            start: 0,
            end: 0,
            pending: Vec::with_capacity(PREFIX + MAX_FRAME),
            sent: 0,
            left: false,
            log: LogLimit::default(),
        })
    }

    /// What a driver, and another program, sees of it.
    pub(super) fn handle(&self) -> Arc<Handle> {
        Arc::clone(&self.handle)
    }

    /// The connection is over. There will be another one after a while.
    fn lose(&mut self, why: &dyn std::fmt::Display) {
        let Some(connection) = self.connection.take() else {
            return;
        };
        self.handle.connected(None);
        if let Some(held_back) = self.log.check() {
            warn!(
                held_back,
                "passt is gone ({why}); no packet passes until it is back"
            );
        }
        // One that goes again and again is not started more and more often.
        if connection.since.elapsed() > BACKOFF.1 {
            self.backoff = BACKOFF.0;
        }
        self.start = 0;
        self.end = 0;
        self.pending.clear();
        self.sent = 0;
        self.try_later();
    }

    fn try_later(&mut self) {
        self.ring_after(self.backoff);
        self.backoff = self.backoff.saturating_mul(2).min(BACKOFF.1);
    }

    fn ring_after(&mut self, pause: Duration) {
        let once = Expiration::OneShot(TimeSpec::from(pause));
        if let Err(error) = self.timer.set(once, TimerSetTimeFlags::empty()) {
            warn!("passt will not be back: a timer cannot be set: {error}");
        }
    }

    /// Never waits: other cards may have this thread, too.
    fn reconnect(&mut self) {
        let connected = self.source.try_connect(&mut self.asked);
        let connected = connected.and_then(|connection| {
            if let (Some(watcher), Some(connection)) = (&self.watcher, &connection) {
                let fd = connection.stream.as_fd();
                watcher.add(fd).map_err(PasstError::System)?;
            }
            Ok(connection)
        });
        match connected {
            Ok(Some(connection)) => {
                if let Some(held_back) = self.log.check() {
                    info!(held_back, "passt is back");
                }
                self.handle.connected(Some(&connection));
                self.connection = Some(connection);
            }
            Ok(None) => self.ring_after(ANSWER_POLL),
            Err(error) => {
                debug!("passt is not back yet: {}", Causes(&error));
                self.try_later();
            }
        }
    }

    /// Sends what is left of the last frame. `false` if there is still some.
    fn drain(&mut self) -> bool {
        while let Some(rest) = self.pending.get(self.sent..).filter(|r| !r.is_empty()) {
            let Some(connection) = &self.connection else {
                break;
            };
            let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
            match send(connection.stream.as_raw_fd(), rest, flags) {
                Ok(sent) => self.sent = self.sent.saturating_add(sent),
                Err(nix::Error::EAGAIN) => return false,
                Err(nix::Error::EINTR) => {}
                Err(errno) => self.lose(&errno),
            }
        }
        self.pending.clear();
        self.sent = 0;
        true
    }

    /// The length of the next frame and where it lies, if all of it is there.
    fn next_frame(&self) -> Result<Option<std::ops::Range<usize>>, usize> {
        let there = self.buffer.get(self.start..self.end).unwrap_or_default();
        let Some((prefix, rest)) = there.split_first_chunk::<PREFIX>() else {
            return Ok(None);
        };
        let len = usize::try_from(u32::from_be_bytes(*prefix)).unwrap_or(usize::MAX);
        if len == 0 || len > MAX_FRAME {
            return Err(len);
        }
        let begin = self.start.saturating_add(PREFIX);
        Ok((rest.len() >= len).then(|| begin..begin.saturating_add(len)))
    }

    /// Reads more into the buffer. `false` if nothing came.
    fn fill(&mut self) -> bool {
        if self.start > 0 {
            self.buffer.copy_within(self.start..self.end, 0);
            self.end = self.end.saturating_sub(self.start);
            self.start = 0;
        }
        let Some(connection) = &self.connection else {
            return false;
        };
        let fd = connection.stream.as_raw_fd();
        let place = self.buffer.get_mut(self.end..).unwrap_or_default();
        match recv(fd, place, MsgFlags::MSG_DONTWAIT) {
            Ok(0) => self.lose(&"it closed the connection"),
            Ok(count) => {
                self.end = self.end.saturating_add(count);
                return true;
            }
            Err(nix::Error::EAGAIN | nix::Error::EINTR) => {}
            Err(errno) => self.lose(&errno),
        }
        false
    }
}

/// Long frames are to pass whole, if the system lets them.
fn prepare(stream: &UnixStream) -> io::Result<()> {
    stream.set_nonblocking(true)?;
    if let Err(error) = setsockopt(stream, SndBuf, &SOCKET_BUFFER) {
        debug!("the socket to passt stays as it is: {error}");
    }
    Ok(())
}

impl Link for Passt {
    fn watch(&mut self, watcher: Watcher) -> io::Result<()> {
        watcher.add(self.timer.as_fd())?;
        if let Some(connection) = &self.connection {
            watcher.add(connection.stream.as_fd())?;
        }
        self.watcher = Some(watcher);
        Ok(())
    }

    fn ready(&mut self, events: Events) -> Ready {
        if self.left {
            // An end of it shows with the next frame.
            return Ready {
                readable: false,
                writable: false,
            };
        }
        // Both descriptors have one token. The timer runs only while there is no connection.
        if self.connection.is_none() {
            let mut rung = [0; 8];
            if nix::unistd::read(&self.timer, &mut rung).is_ok() {
                self.reconnect();
            }
        } else if events.intersects(Events::EPOLLHUP | Events::EPOLLERR) {
            self.lose(&"it closed the connection");
        }
        Ready {
            readable: true,
            writable: self.drain(),
        }
    }

    fn send(&mut self, frame: &mut IoList, header_len: usize) -> io::Result<()> {
        if !self.drain() {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        let Some(connection) = &self.connection else {
            return Err(io::ErrorKind::NotConnected.into());
        };
        let len = frame.bytes().saturating_sub(header_len);
        let prefix = u32::try_from(len).unwrap_or(u32::MAX).to_be_bytes();
        match frame.send_behind(connection.stream.as_fd(), &prefix, header_len) {
            Ok(sent) if sent < PREFIX.saturating_add(len) => {
                let front = prefix.get(sent..).unwrap_or_default();
                self.pending.extend_from_slice(front);
                let gone = sent.saturating_sub(PREFIX);
                let copied = self.pending.len();
                self.pending
                    .resize(copied.saturating_add(len.saturating_sub(gone)), 0);
                let rest = self.pending.get_mut(copied..).unwrap_or_default();
                frame.copy_out(header_len.saturating_add(gone), rest);
                Ok(())
            }
            Ok(_) => Ok(()),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Err(error),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Err(error),
            Err(error) => {
                self.lose(&error);
                Err(error)
            }
        }
    }

    fn receive(
        &mut self,
        list: &mut IoList,
        pieces: usize,
        header_len: usize,
        spill: &mut [u8],
    ) -> io::Result<usize> {
        loop {
            match self.next_frame() {
                Ok(Some(place)) => {
                    self.start = place.end;
                    let len = header_len.saturating_add(place.len());
                    let frame = self.buffer.get(place).unwrap_or_default();
                    let header = [0; MAX_HEADER];
                    let header = header.get(..header_len).unwrap_or(&header);
                    let given = list.deliver(0, header, pieces, spill)
                        && list.deliver(header_len, frame, pieces, spill);
                    if given {
                        return Ok(len);
                    }
                }
                Ok(None) if self.fill() => {}
                Ok(None) => return Err(io::ErrorKind::WouldBlock.into()),
                Err(len) => self.lose(&format_args!("it sent a frame of {len} bytes")),
            }
        }
    }

    fn leave(&mut self) {
        self.left = true;
        let received = self.buffer.get(self.start..self.end);
        let pending = self.pending.get(self.sent..);
        *lock(&self.handle.left) = Left {
            received: received.unwrap_or_default().to_vec(),
            pending: pending.unwrap_or_default().to_vec(),
            asked: self.asked,
        };
        (self.start, self.end, self.sent) = (0, 0, 0);
        self.pending.clear();
    }

    fn go_on(&mut self) {
        let Left {
            received,
            pending,
            asked,
        } = std::mem::take(&mut *lock(&self.handle.left));
        self.left = false;
        self.asked = asked;
        if self.connection.is_none() {
            // They belong to one that is gone, and the timer may have rung meanwhile.
            self.try_later();
            return;
        }
        if let Some(place) = self.buffer.get_mut(..received.len()) {
            place.copy_from_slice(&received);
            self.end = received.len();
        }
        self.pending.extend_from_slice(&pending);
    }

    fn advice(&self, error: &io::Error) -> Option<&'static str> {
        (error.kind() == io::ErrorKind::NotConnected).then_some("passt is not there")
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use nix::sys::socket::{
        AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, listen, socket,
    };
    use vmm_sys_util::sock_ctrl_msg::ScmSocket;

    use super::*;

    #[test]
    fn forwards_are_read_strictly() {
        let arguments = |text: &str| text.parse::<Forward>().unwrap().arguments();
        assert_eq!(arguments("tcp:8080:80"), ["--tcp-ports", "8080:80"]);
        assert_eq!(arguments("udp:53"), ["--udp-ports", "53:53"]);
        assert_eq!(
            arguments("tcp:127.0.0.1/22:2222"),
            ["--tcp-ports", "127.0.0.1/22:2222"]
        );
        assert_eq!(arguments("tcp:::1/22"), ["--tcp-ports", "::1/22:22"]);
        for wrong in [
            "",
            "tcp",
            "tcp:",
            "tcp:0",
            "tcp:1:0",
            "sctp:1",
            "tcp:x/1",
            "tcp:65536",
            "tcp:1:2:3",
        ] {
            assert_eq!(wrong.parse::<Forward>(), Err(ForwardError), "{wrong:?}");
        }
    }

    /// Who would wait for it would wait for as long as it is stopped.
    #[test]
    fn a_passt_that_is_stopped_is_not_waited_for() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("passt.sock");
        let (family, flags) = (AddressFamily::Unix, SockFlag::SOCK_CLOEXEC);
        let stopped = socket(family, SockType::Stream, flags, None).unwrap();
        bind(stopped.as_raw_fd(), &UnixAddr::new(&path).unwrap()).unwrap();
        listen(&stopped, Backlog::new(0).unwrap()).unwrap();
        let first = Passt::open(Source::Listening(path.clone())).unwrap();
        let error = Passt::open(Source::Listening(path.clone())).err().unwrap();
        assert!(matches!(error, PasstError::Silent { .. }), "{error}");
        drop((first, stopped));
        let error = Passt::open(Source::Listening(path)).err().unwrap();
        assert!(matches!(error, PasstError::Connect { .. }), "{error}");
    }

    /// The thread has other cards, and an answer that comes late is no other one's.
    #[test]
    fn who_starts_it_is_not_waited_for() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let source = Source::Started(Starter::on(ours).unwrap());
        let (stream, first) = UnixStream::pair().unwrap();
        let connection = Connection {
            stream,
            since: Instant::now(),
        };
        let mut link = Passt::on(source, Some(connection)).unwrap();
        drop(first);
        assert!(!link.fill() && link.connection.is_none());
        for _ in 0..3 {
            link.reconnect();
            assert!(link.asked && link.connection.is_none());
        }
        theirs.set_nonblocking(true).unwrap();
        assert_eq!(theirs.read(&mut [0; 8]).unwrap(), 1, "it was asked once");
        let (mut passt, stream) = UnixStream::pair().unwrap();
        let answer = &0_i32.to_le_bytes()[..];
        theirs.send_with_fd(answer, stream.as_raw_fd()).unwrap();
        drop(stream);
        // A program that takes its place knows that there is an answer to come.
        link.leave();
        link.go_on();
        link.reconnect();
        assert!(!link.asked && link.connection.is_some());
        let frame = [&60_u32.to_be_bytes()[..], &[7; 60]].concat();
        passt.write_all(&frame).unwrap();
        assert!(link.fill() && link.next_frame().unwrap().is_some());
        // It says that there is none.
        link.lose(&"a test");
        link.reconnect();
        assert_eq!(theirs.read(&mut [0; 8]).unwrap(), 1);
        theirs.write_all(&libc::ENOENT.to_le_bytes()).unwrap();
        link.reconnect();
        assert!(!link.asked && link.connection.is_none());
    }

    #[test]
    fn a_passt_that_is_not_there_is_named() {
        let source = Source::Listening("/nowhere/passt.sock".into());
        let error = Passt::open(source).err().unwrap();
        assert!(
            error
                .to_string()
                .contains("passt --socket /nowhere/passt.sock"),
            "{error}"
        );
    }
}

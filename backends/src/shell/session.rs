//! One front-end's connection: takes its messages one by one, and decides which errors end it.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{MsgFlags, recv};
use ringside_control::Chain;
use thiserror::Error;
use tracing::warn;
use vhost::vhost_user::message::FrontendReq;
use vhost::vhost_user::{BackendReqHandler, Error as ProtocolError};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use super::device::Device;
use super::handler::{Handler, HandlerError};
use super::socket::{is_unix_stream, replace};

/// Length of a message header: request, flags, size of the payload.
const HEADER: usize = 12;
/// Version 1, in the header's flags.
const VERSION: u32 = 0x1;
/// The message is a reply.
const FLAG_REPLY: u32 = 0x4;
/// The sender wants a reply (REPLY_ACK).
const FLAG_NEED_REPLY: u32 = 0x8;

/// How long a front-end may take to send the rest of a message that it began, or to take a reply.
const PATIENCE: Duration = Duration::from_secs(2);

/// The connection ends, and not because the front-end left.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum SessionError {
    /// The socket failed.
    #[error("the connection failed")]
    Socket(#[source] io::Error),
    /// The front-end began a message and did not finish it.
    #[error("the front-end stopped in the middle of a message")]
    Stalled,
    /// The front-end does not read.
    #[error("the front-end leaves its answers unread")]
    Deaf,
    /// Guest memory was taken away.
    #[error(
        "guest memory is gone: the front-end truncated its file while it was in use, or the host's memory failed"
    )]
    MemoryGone,
    /// A message broke the protocol.
    #[error("message {request}: {}", Cause(error))]
    Protocol {
        /// Which message.
        request: String,
        /// What is wrong with it.
        error: ProtocolError,
    },
}

/// What one step found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Step {
    /// A message was served; there may be more.
    Served,
    /// No message is waiting.
    Idle,
    /// The front-end closed the connection.
    Gone,
}

pub(super) struct Session<D: Device> {
    socket: UnixStream,
    messages: BackendReqHandler<Mutex<Handler<D>>>,
    handler: Arc<Mutex<Handler<D>>>,
}

/// A request that the `vhost` crate does not know (vhost-user, "Front-end message types").
const GET_VRING_BASE_SKIP_DRAIN: u32 = 45;

/// The part of a header that is needed before the message is read.
#[derive(Debug, Clone, Copy)]
struct Header {
    request: u32,
    flags: u32,
    size: u32,
}

impl Header {
    fn parse(bytes: [u8; HEADER]) -> Self {
        let [a, b, c, d, e, f, g, h, i, j, k, l] = bytes;
        Self {
            request: u32::from_ne_bytes([a, b, c, d]),
            flags: u32::from_ne_bytes([e, f, g, h]),
            size: u32::from_ne_bytes([i, j, k, l]),
        }
    }

    fn name(self) -> String {
        match FrontendReq::try_from(self.request) {
            Ok(request) => format!("{request:?}"),
            Err(()) if self.request == GET_VRING_BASE_SKIP_DRAIN => {
                "GET_VRING_BASE_SKIP_DRAIN".to_owned()
            }
            Err(()) => self.request.to_string(),
        }
    }

    fn is(self, request: FrontendReq) -> bool {
        self.request == u32::from(request)
    }

    /// Refuses another size, and flags that this message cannot have.
    fn check(self, size: u32) -> Result<(), ProtocolError> {
        if self.size != size || self.flags & !FLAG_NEED_REPLY != VERSION {
            return Err(ProtocolError::InvalidMessage);
        }
        Ok(())
    }
}

impl<D: Device> Session<D> {
    pub(super) fn new(
        socket: UnixStream,
        handler: &Arc<Mutex<Handler<D>>>,
    ) -> Result<Self, SessionError> {
        prepare(&socket).map_err(SessionError::Socket)?;
        let stream = socket.try_clone().map_err(SessionError::Socket)?;
        Ok(Self {
            socket,
            messages: BackendReqHandler::from_stream(stream, Arc::clone(handler)),
            handler: Arc::clone(handler),
        })
    }

    /// Goes on with a connection on which these features were accepted. The `vhost` crate keeps what was negotiated to itself,
    /// and learns it from messages only: they come from here, on a socket that is then replaced.
    pub(super) fn resume(
        socket: UnixStream,
        handler: &Arc<Mutex<Handler<D>>>,
        features: u64,
        protocol_features: u64,
    ) -> Result<Self, SessionError> {
        let (mut front_end, stream) = UnixStream::pair().map_err(SessionError::Socket)?;
        prepare(&stream).map_err(SessionError::Socket)?;
        prepare(&socket).map_err(SessionError::Socket)?;
        let mut messages = BackendReqHandler::from_stream(stream, Arc::clone(handler));
        for (request, payload) in [
            (FrontendReq::GET_FEATURES, None),
            (FrontendReq::SET_FEATURES, Some(features)),
            (FrontendReq::SET_PROTOCOL_FEATURES, Some(protocol_features)),
        ] {
            let payload = payload.map(u64::to_ne_bytes);
            let payload = payload.as_ref().map_or(&[][..], |payload| payload);
            let size = u32::try_from(payload.len()).unwrap_or(0);
            let words = [u32::from(request), VERSION, size].map(u32::to_ne_bytes);
            let message = [words.as_flattened(), payload].concat();
            front_end
                .write_all(&message)
                .map_err(SessionError::Socket)?;
            messages
                .handle_request()
                .map_err(|error| SessionError::Protocol {
                    request: format!("{request:?}"),
                    error,
                })?;
        }
        replace(messages.as_raw_fd(), &socket).map_err(SessionError::Socket)?;
        Ok(Self {
            socket,
            messages,
            handler: Arc::clone(handler),
        })
    }

    /// Its connection.
    pub(super) fn socket(&self) -> &UnixStream {
        &self.socket
    }

    /// Serves one message, if one waits.
    pub(super) fn step(&mut self) -> Result<Step, SessionError> {
        let header = match self.peek()? {
            Ok(header) => header,
            Err(step) => return Ok(step),
        };
        self.wait_for_room()?;
        let early = header.is(FrontendReq::SET_VRING_ENABLE) && self.lock().enables_early();
        let requests = header.is(FrontendReq::SET_BACKEND_REQ_FD) && self.lock().takes_requests();
        let result = if early {
            self.enable_early(header)
        } else if requests {
            self.set_requests(header)
        } else if header.is(FrontendReq::SET_LOG_FD) && self.lock().takes_log() {
            self.set_log_fd(header)
        } else if header.is(FrontendReq::SEND_RARP) && self.lock().takes_rarp() {
            self.send_rarp(header)
        } else if header.request == GET_VRING_BASE_SKIP_DRAIN {
            self.vring_base_skip_drain(header)
        } else {
            self.messages.handle_request()
        };
        match result {
            Ok(()) => Ok(Step::Served),
            Err(ProtocolError::Disconnected) => Ok(Step::Gone),
            Err(ProtocolError::SocketRetry(_)) => Err(SessionError::Stalled),
            Err(ProtocolError::SocketBroken(e) | ProtocolError::SocketError(e)) => {
                Err(SessionError::Socket(e))
            }
            Err(source) if self.survives(header, &source) => {
                if let Some(held_back) = self.lock().log().check() {
                    let request = header.name();
                    warn!(held_back, "message {request} refused: {}", Cause(&source));
                }
                Ok(Step::Served)
            }
            Err(error) => Err(SessionError::Protocol {
                request: header.name(),
                error,
            }),
        }
    }

    /// Whether the connection goes on after a message that could not be obeyed: if the front-end was told, or
    /// if the message is a guest's attempt to write its configuration space.
    fn survives(&self, header: Header, error: &ProtocolError) -> bool {
        let ProtocolError::ReqHandlerError(cause) = error else {
            return false;
        };
        let cause = cause.get_ref().and_then(|e| e.downcast_ref());
        if matches!(cause, Some(HandlerError::WorkerLost { .. })) {
            return false;
        }
        // The `vhost` crate acknowledges a message that failed, but sends nothing in place of an answer: a front-end that
        // waits for one would wait for ever.
        let answered = ![
            FrontendReq::GET_VRING_BASE,
            FrontendReq::GET_INFLIGHT_FD,
            FrontendReq::SET_LOG_BASE,
        ]
        .into_iter()
        .any(|request| header.is(request))
            && header.request != GET_VRING_BASE_SKIP_DRAIN;
        let told = answered && header.flags & FLAG_NEED_REPLY != 0 && self.lock().reply_ack();
        told || header.is(FrontendReq::SET_CONFIG)
    }

    /// Waits until an answer has room in the socket, which has some for the largest one as long as it counts as writable. The
    /// `vhost` crate tries to send for ever.
    fn wait_for_room(&self) -> Result<(), SessionError> {
        let mut fds = [PollFd::new(self.socket.as_fd(), PollFlags::POLLOUT)];
        let end = Instant::now() + PATIENCE;
        loop {
            let left = end.saturating_duration_since(Instant::now());
            match poll(
                &mut fds,
                PollTimeout::try_from(left).unwrap_or(PollTimeout::ZERO),
            ) {
                Ok(0) => return Err(SessionError::Deaf),
                Ok(_) => return Ok(()),
                Err(Errno::EINTR) => {}
                Err(e) => return Err(SessionError::Socket(e.into())),
            }
        }
    }

    /// Looks at the header of the next message and leaves it in the socket.
    fn peek(&self) -> Result<Result<Header, Step>, SessionError> {
        let mut bytes = [0; HEADER];
        let fd = self.socket.as_raw_fd();
        let peek = MsgFlags::MSG_PEEK;
        let first = loop {
            match recv(fd, &mut bytes, peek | MsgFlags::MSG_DONTWAIT) {
                Ok(n) => break n,
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => return Ok(Err(Step::Idle)),
                Err(Errno::ECONNRESET) => return Ok(Err(Step::Gone)),
                Err(e) => return Err(SessionError::Socket(e.into())),
            }
        };
        match first {
            0 => return Ok(Err(Step::Gone)),
            HEADER => {}
            _ => loop {
                match recv(fd, &mut bytes, peek | MsgFlags::MSG_WAITALL) {
                    Ok(HEADER) => break,
                    Err(Errno::EINTR) => {}
                    Ok(_) | Err(Errno::EAGAIN) => return Err(SessionError::Stalled),
                    Err(e) => return Err(SessionError::Socket(e.into())),
                }
            },
        }
        Ok(Ok(Header::parse(bytes)))
    }

    /// Serves a SET_VRING_ENABLE that the `vhost` crate would refuse. QEMU sends it for network devices between
    /// SET_PROTOCOL_FEATURES and SET_FEATURES, when VHOST_USER_F_PROTOCOL_FEATURES is offered but not yet accepted.
    fn enable_early(&mut self, header: Header) -> Result<(), ProtocolError> {
        let [a, b, c, d, e, f, g, h] = self.take_payload(header)?;
        let index = u32::from_ne_bytes([a, b, c, d]);
        let enable = match u32::from_ne_bytes([e, f, g, h]) {
            0 => false,
            1 => true,
            _ => return Err(ProtocolError::InvalidParam),
        };
        let result = self.lock().enable(index, enable);
        self.acknowledge(header, result.is_ok())?;
        Ok(result?)
    }

    /// Serves a SET_BACKEND_REQ_FD: what the `vhost` crate makes of the socket cannot send the one request that a device
    /// with a configuration space has.
    fn set_requests(&mut self, header: Header) -> Result<(), ProtocolError> {
        let socket = OwnedFd::from(self.take_descriptor(header)?);
        if !is_unix_stream(&socket) {
            return Err(ProtocolError::NotUnixSocket);
        }
        let socket = UnixStream::from(socket);
        // A front-end that does not read must not hold up everything else.
        socket
            .set_write_timeout(Some(PATIENCE))
            .map_err(socket_error)?;
        self.lock().set_requests(socket);
        self.acknowledge(header, true)
    }

    /// Takes a SET_LOG_FD, which the `vhost` crate does not know. The descriptor is to be signalled when something was logged; no
    /// front-end is known that waits for that instead of looking, and it would cost each batch a system call.
    fn set_log_fd(&mut self, header: Header) -> Result<(), ProtocolError> {
        drop(self.take_descriptor(header)?);
        self.acknowledge(header, true)
    }

    /// Serves a SEND_RARP, which the `vhost` crate does not know: the guest's address is in the first six bytes of its payload.
    fn send_rarp(&mut self, header: Header) -> Result<(), ProtocolError> {
        let [a, b, c, d, e, f, _, _] = self.take_payload(header)?;
        self.lock().send_rarp([a, b, c, d, e, f]);
        self.acknowledge(header, true)
    }

    /// Serves a GET_VRING_BASE_SKIP_DRAIN, which the `vhost` crate does not know: GET_VRING_BASE but for what it leaves in flight.
    fn vring_base_skip_drain(&mut self, header: Header) -> Result<(), ProtocolError> {
        let [a, b, c, d, ..] = self.take_payload(header)?;
        let index = u32::from_ne_bytes([a, b, c, d]);
        let base = self.lock().vring_base_skip_drain(index)?;
        self.reply(header, [index, base])
    }

    /// Takes a message with a payload of eight bytes.
    fn take_payload(&mut self, header: Header) -> Result<[u8; 8], ProtocolError> {
        header.check(8)?;
        let mut message = [0; HEADER + 8];
        self.socket.read_exact(&mut message).map_err(socket_error)?;
        let [.., a, b, c, d, e, f, g, h] = message;
        Ok([a, b, c, d, e, f, g, h])
    }

    /// Takes a message that is a descriptor and nothing else.
    fn take_descriptor(&mut self, header: Header) -> Result<File, ProtocolError> {
        header.check(0)?;
        let mut message = [0; HEADER];
        let (count, file) = self
            .socket
            .recv_with_fd(&mut message)
            .map_err(|e| socket_error(e.into()))?;
        file.filter(|_| count == HEADER)
            .ok_or(ProtocolError::IncorrectFds)
    }

    /// Answers a message that wants to be, if REPLY_ACK was negotiated.
    fn acknowledge(&mut self, header: Header, success: bool) -> Result<(), ProtocolError> {
        if self.lock().reply_ack() && header.flags & FLAG_NEED_REPLY != 0 {
            self.reply(header, [u32::from(!success), 0])?;
        }
        Ok(())
    }

    /// Answers a message with a payload of eight bytes.
    fn reply(&mut self, header: Header, [first, second]: [u32; 2]) -> Result<(), ProtocolError> {
        let words = [header.request, VERSION | FLAG_REPLY, 8, first, second];
        let reply = words.map(u32::to_ne_bytes);
        let sent = self.socket.write_all(reply.as_flattened());
        sent.map_err(socket_error)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Handler<D>> {
        // Only this thread ever locks it.
        self.handler.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<D: Device> AsRawFd for Session<D> {
    fn as_raw_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }
}

/// Messages are begun only when one waits, so blocking reads are short; time-outs bound them.
fn prepare(socket: &UnixStream) -> io::Result<()> {
    socket.set_nonblocking(false)?;
    socket.set_read_timeout(Some(PATIENCE))?;
    socket.set_write_timeout(Some(PATIENCE))
}

fn socket_error(error: io::Error) -> ProtocolError {
    match error.kind() {
        io::ErrorKind::UnexpectedEof => ProtocolError::Disconnected,
        io::ErrorKind::WouldBlock => ProtocolError::SocketRetry(error),
        _ => ProtocolError::SocketError(error),
    }
}

/// What the handler said, without the wrapping of the `vhost` crate, which keeps no source chain.
struct Cause<'a>(&'a ProtocolError);

impl std::fmt::Display for Cause<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.0 {
            ProtocolError::ReqHandlerError(e) => match e.get_ref() {
                Some(inner) => Chain(inner).fmt(f),
                None => e.fmt(f),
            },
            other => other.fmt(f),
        }
    }
}

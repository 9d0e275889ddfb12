//! The back-end channel: requests that a back-end sends to us (vhost-user, "Back-end
//! communication"). Only a change of the configuration is asked for; all else is refused.
//!
//! The socket is non-blocking, and file descriptors that come along are dropped by the kernel, so
//! a hostile back-end can neither hold the control thread nor fill our descriptor table.

use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;

const CONFIG_CHANGE_MSG: u32 = 2;
const VERSION: u32 = 1;
const VERSION_MASK: u32 = 3;
const FLAG_REPLY: u32 = 1 << 2;
const FLAG_NEED_REPLY: u32 = 1 << 3;
const HEADER: usize = 12;
/// Longer requests do not exist.
const MAX_SIZE: usize = 4096;
/// Requests served for one event of the socket; a back-end that floods us is cut off.
const MAX_BURST: usize = 64;

/// Our end of the channel.
pub(crate) struct Channel {
    socket: UnixStream,
    buffer: Vec<u8>,
}

/// What a back-end wanted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Requests {
    /// The device's configuration has changed.
    pub(crate) config_changed: bool,
    /// The channel is of no use any more.
    pub(crate) closed: bool,
}

impl Channel {
    /// A channel, and the end to give to the back-end.
    pub(crate) fn new() -> io::Result<(Self, UnixStream)> {
        let (ours, theirs) = UnixStream::pair()?;
        ours.set_nonblocking(true)?;
        let buffer = Vec::new();
        let channel = Self {
            socket: ours,
            buffer,
        };
        Ok((channel, theirs))
    }

    /// The socket to wait for.
    pub(crate) fn socket(&self) -> &UnixStream {
        &self.socket
    }

    /// Serves everything that has arrived. Several changes of the configuration are one.
    pub(crate) fn serve(&mut self) -> Requests {
        let mut requests = Requests::default();
        for _ in 0..MAX_BURST {
            match self.next(&mut requests) {
                Ok(true) => {}
                Ok(false) => return requests,
                Err(error) => {
                    // The end of the back-end is reported by whoever watches its main socket.
                    if error.kind() != ErrorKind::UnexpectedEof {
                        tracing::warn!(%error, "the back-end channel is closed");
                    }
                    requests.closed = true;
                    return requests;
                }
            }
        }
        tracing::warn!("a back-end floods its channel, which is closed");
        requests.closed = true;
        requests
    }

    /// Serves one request, if it is there in full.
    fn next(&mut self, requests: &mut Requests) -> io::Result<bool> {
        if !self.fill(HEADER)? {
            return Ok(false);
        }
        let word = |at: usize| {
            let bytes = self.buffer.get(at..at + 4);
            bytes
                .and_then(|b| b.try_into().ok())
                .map_or(0, u32::from_ne_bytes)
        };
        let (request, flags, size) = (word(0), word(4), word(8));
        let size = usize::try_from(size).unwrap_or(usize::MAX);
        if flags & (VERSION_MASK | FLAG_REPLY) != VERSION || size > MAX_SIZE {
            return Err(ErrorKind::InvalidData.into());
        }
        if !self.fill(HEADER + size)? {
            return Ok(false);
        }
        self.buffer.clear();
        let known = request == CONFIG_CHANGE_MSG && size == 0;
        requests.config_changed |= known;
        if !known {
            tracing::debug!(request, "a back-end's request is refused");
        }
        if flags & FLAG_NEED_REPLY != 0 {
            let mut reply = Vec::with_capacity(HEADER + 8);
            reply.extend(request.to_ne_bytes());
            reply.extend((VERSION | FLAG_REPLY).to_ne_bytes());
            reply.extend(8u32.to_ne_bytes());
            reply.extend(u64::from(!known).to_ne_bytes());
            // A back-end that lets replies pile up until nothing fits is cut off by the error.
            self.socket.write_all(&reply)?;
        }
        Ok(true)
    }

    /// Reads until there are `length` bytes of the current request. Returns whether there are.
    fn fill(&mut self, length: usize) -> io::Result<bool> {
        while self.buffer.len() < length {
            let mut part = [0; 256];
            let missing = (length - self.buffer.len()).min(part.len());
            match self.socket.read(part.get_mut(..missing).unwrap_or(&mut [])) {
                Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
                Ok(n) => self.buffer.extend(part.iter().take(n)),
                Err(e) if e.kind() == ErrorKind::WouldBlock => return Ok(false),
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(request: u32, flags: u32, body: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::new();
        bytes.extend(request.to_ne_bytes());
        bytes.extend(flags.to_ne_bytes());
        bytes.extend(u32::try_from(body.len()).unwrap().to_ne_bytes());
        bytes.extend(body);
        bytes
    }

    const CHANGED: Requests = Requests {
        config_changed: true,
        closed: false,
    };

    #[test]
    fn a_change_is_noticed_and_acknowledged() {
        let (mut channel, mut peer) = Channel::new().unwrap();
        assert_eq!(channel.serve(), Requests::default());
        peer.write_all(&message(2, 1, &[])).unwrap();
        peer.write_all(&message(2, 1 | FLAG_NEED_REPLY, &[]))
            .unwrap();
        assert_eq!(channel.serve(), CHANGED);
        let mut reply = [0; 20];
        peer.read_exact(&mut reply).unwrap();
        assert_eq!(reply[..], message(2, 5, &[0; 8]));
    }

    #[test]
    fn a_request_may_come_in_pieces() {
        let (mut channel, mut peer) = Channel::new().unwrap();
        let bytes = message(2, 1, &[]);
        for byte in &bytes[..11] {
            peer.write_all(&[*byte]).unwrap();
            assert_eq!(channel.serve(), Requests::default());
        }
        peer.write_all(&bytes[11..]).unwrap();
        assert_eq!(channel.serve(), CHANGED);
    }

    #[test]
    fn other_requests_are_refused() {
        let (mut channel, mut peer) = Channel::new().unwrap();
        peer.write_all(&message(3, 1 | FLAG_NEED_REPLY, &[0; 24]))
            .unwrap();
        assert_eq!(channel.serve(), Requests::default());
        let mut reply = [0; 20];
        peer.read_exact(&mut reply).unwrap();
        assert_ne!(reply[12..], [0; 8]);
    }

    #[test]
    fn garbage_floods_and_the_end_close_it() {
        for bytes in [
            message(2, 0, &[]),
            message(2, 5, &[]),
            [[2, 0, 0, 0], [1, 0, 0, 0], [0xff; 4]].concat(),
            message(2, 1, &[]).repeat(100),
        ] {
            let (mut channel, mut peer) = Channel::new().unwrap();
            peer.write_all(&bytes).unwrap();
            assert!(channel.serve().closed, "{bytes:?}");
        }
        let (mut channel, peer) = Channel::new().unwrap();
        drop(peer);
        assert!(channel.serve().closed);
    }
}

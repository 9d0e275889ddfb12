//! AF_XDP: frames of one receive queue of a network interface, past the host's network, in memory shared with the kernel.
//!
//! ```text
//!  interface's queue ─▶ XDP program ─▶ rx ring ─copy─▶ guest buffers        all four rings hold places in one memory
//!                         │            fill ring ◀──── the place is free     of 1024 frames (umem)
//!                         ╰─ no socket for the queue: the host's network
//!  guest chain ─copy─▶ tx ring ─▶ interface    completion ring ─▶ the place is free
//! ```
//!
//! The kernel copies frames unless the interface's driver can use that memory itself (zero-copy). There is no virtio-net header,
//! so there are no offloads, and frames are at most [`MAX_LEN`] bytes.
//!
//! | Module | Its matter |
//! | --- | --- |
//! | `socket` | one socket with its memory and its rings |
//! | `program` | the XDP program that sends frames to sockets |
//! | `sys` | mappings and system calls: all that is unsafe |

mod program;
mod socket;
mod sys;

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use epoll::Events;
use nix::errno::Errno;
use thiserror::Error;
use tracing::info;

use self::program::Program;
use self::socket::XdpSocket;
use super::packet::{PacketError, interface_index, promiscuous};
use super::{ATTEMPTS, Link, MAX_HEADER, Ready, patiently};
use crate::net::epoll_set::Watcher;
use crate::net::iov::IoList;

pub(super) use self::socket::MAX_LEN;

/// An AF_XDP socket cannot be had.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum XdpError {
    /// The interface cannot be used.
    #[error(transparent)]
    Interface(#[from] PacketError),
    /// No right.
    #[error(
        "no permission for AF_XDP on \"{name}\": run with CAP_NET_ADMIN, CAP_NET_RAW and CAP_BPF"
    )]
    Permission {
        /// Name of the interface.
        name: String,
    },
    /// Another program has it.
    #[error(
        "\"{name}\" has an XDP program, or queue {queue} of it a socket, already: end who uses it"
    )]
    Busy {
        /// Name of the interface.
        name: String,
        /// Number of its queue.
        queue: u16,
    },
    /// It has fewer queues.
    #[error("\"{name}\" has no queue {queue}: fewer --queue-pairs, or more channels (ethtool -L)")]
    NoQueue {
        /// Name of the interface.
        name: String,
        /// Number of its queue.
        queue: u16,
    },
    /// Another request to the kernel failed.
    #[error("AF_XDP on \"{name}\": {what} failed")]
    Request {
        /// Name of the interface.
        name: String,
        /// What was tried.
        what: &'static str,
        /// What the system said.
        #[source]
        source: io::Error,
    },
}

/// How often a queue that is busy is tried: five seconds in all. The kernel needs its lock of all networks for that, which others hold
/// for long when they make and remove some.
const QUEUE_ATTEMPTS: u32 = 251;

/// What was tried, and what the system said.
type Failed = (&'static str, Errno);

fn explained(name: &str, queue: u16, (what, errno): Failed) -> XdpError {
    let name = name.to_owned();
    match errno {
        Errno::EPERM | Errno::EACCES => XdpError::Permission { name },
        Errno::EBUSY | Errno::EEXIST => XdpError::Busy { name, queue },
        Errno::EINVAL if what == socket::BINDING => XdpError::NoQueue { name, queue },
        other => XdpError::Request {
            name,
            what,
            source: other.into(),
        },
    }
}

/// Attaches a program. That of a program that has ended a moment ago is there until its last descriptor is closed: processes that it
/// has started have them for a moment, too.
fn attach(index: libc::c_int, queues: u16) -> Result<Program, Failed> {
    let busy = |(_, errno): &Failed| matches!(errno, Errno::EBUSY | Errno::EEXIST);
    patiently(ATTEMPTS, busy, || Program::attach(index, queues))
}

/// Opens a socket on a queue. One whose socket was closed a moment ago is busy until the kernel has freed that one's memory,
/// which it does in the background.
fn open_queue(index: libc::c_int, queue: u16) -> Result<XdpSocket, Failed> {
    let busy = |failed: &Failed| *failed == (socket::BINDING, Errno::EBUSY);
    patiently(QUEUE_ATTEMPTS, busy, || XdpSocket::open(index, queue))
}

/// One queue of an interface.
pub(super) struct Xdp {
    name: String,
    queue: u16,
    socket: XdpSocket,
    program: Arc<Program>,
    attached: bool,
    /// Lets the interface receive frames for all addresses, while it is open.
    _promiscuous: OwnedFd,
}

impl Xdp {
    /// Opens a socket on each of the first `count` queues of the interface `name`.
    pub(super) fn open(name: &str, count: u16) -> Result<Vec<Self>, XdpError> {
        let index = interface_index(name)?;
        let program = attach(index, count).map_err(|failed| explained(name, 0, failed))?;
        let program = Arc::new(program);
        (0..count)
            .map(|queue| {
                let explained = |failed| explained(name, queue, failed);
                let socket = open_queue(index, queue).map_err(explained)?;
                program.insert(queue, socket.as_fd()).map_err(explained)?;
                Ok(Self {
                    name: name.to_owned(),
                    queue,
                    socket,
                    program: Arc::clone(&program),
                    attached: true,
                    _promiscuous: promiscuous(name, index)?,
                })
            })
            .collect()
    }
}

impl Link for Xdp {
    fn watch(&mut self, watcher: Watcher) -> io::Result<()> {
        let mode = if self.socket.zero_copy() {
            "zero-copy"
        } else {
            "copy"
        };
        info!(
            interface = self.name,
            queue = self.queue,
            "AF_XDP in {mode} mode"
        );
        watcher.add(self.socket.as_fd())
    }

    fn ready(&mut self, events: Events) -> Ready {
        // What the interface did not take at once goes out when it has room.
        self.socket.kick();
        Ready::from(events)
    }

    fn send(&mut self, frame: &mut IoList, header_len: usize) -> io::Result<()> {
        let len = frame.bytes().saturating_sub(header_len);
        if len > MAX_LEN {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let sent = self.socket.send(len, |place| {
            frame.copy_out(header_len, place);
        });
        if sent {
            Ok(())
        } else {
            Err(io::ErrorKind::WouldBlock.into())
        }
    }

    fn flush(&mut self) {
        self.socket.kick();
    }

    fn receive(
        &mut self,
        list: &mut IoList,
        pieces: usize,
        header_len: usize,
        spill: &mut [u8],
    ) -> io::Result<usize> {
        let header = [0; MAX_HEADER];
        let header = header.get(..header_len).unwrap_or(&header);
        let len = self.socket.receive(|frame| {
            list.deliver(0, header, pieces, spill);
            list.deliver(header_len, frame, pieces, spill);
            header_len.saturating_add(frame.len())
        });
        len.ok_or_else(|| io::ErrorKind::WouldBlock.into())
    }

    fn attached(&self) -> bool {
        self.attached
    }

    /// Frames of a queue that is detached go to the host's network.
    fn set_attached(&mut self, attached: bool) -> io::Result<()> {
        if attached == self.attached {
            return Ok(());
        }
        let changed = if attached {
            self.program.insert(self.queue, self.socket.as_fd())
        } else {
            self.program.remove(self.queue)
        };
        changed.map_err(|(_, errno)| errno)?;
        self.attached = attached;
        Ok(())
    }

    fn advice(&self, error: &io::Error) -> Option<&'static str> {
        (error.kind() == io::ErrorKind::InvalidInput)
            .then_some("a frame longer than AF_XDP takes; give the guest a smaller MTU (--mtu)")
    }
}

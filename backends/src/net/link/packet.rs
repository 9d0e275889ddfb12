//! A packet socket on an interface of the host: what arrives at the interface reaches the guest, and what the guest sends
//! leaves by it (packet(7)).
//!
//! The host's own network goes on to use the interface. Segments pass whole: the socket has a virtio-net header of its own
//! (PACKET_VNET_HDR), which is the guest's without `num_buffers`.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nix::errno::Errno;
use nix::net::if_::if_nametoindex;
use nix::sys::socket::{AddressFamily, SockFlag, SockProtocol, SockType, socket};
use ringside_sandbox::Profile;
use thiserror::Error;

use super::{Interface, Link, LinkSpec, MAX_HEADER};
use crate::net::epoll_set::Watcher;
use crate::net::iov::IoList;

/// Bytes of the header that a packet socket knows: without `num_buffers` (VIRTIO 1.3, 5.1.6).
const SOCKET_HEADER: usize = 10;

/// A packet socket cannot be had.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum PacketError {
    /// No such interface.
    #[error("there is no interface \"{name}\": `ip link` lists those that there are")]
    NoInterface {
        /// What was asked for.
        name: String,
    },
    /// No right.
    #[error("no permission for a packet socket on \"{name}\": run with CAP_NET_RAW")]
    Permission {
        /// Name of the interface.
        name: String,
    },
    /// Another request to the kernel failed.
    #[error("packet socket on \"{name}\": {what} failed")]
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

/// The number of an interface.
///
/// # Errors
/// [`PacketError::NoInterface`]
pub(super) fn interface_index(name: &str) -> Result<libc::c_int, PacketError> {
    let index = if_nametoindex(name).ok();
    index
        .and_then(|index| index.try_into().ok())
        .ok_or_else(|| PacketError::NoInterface {
            name: name.to_owned(),
        })
}

/// Lets an interface receive frames for all addresses, as long as the result is open. It receives nothing itself.
///
/// # Errors
/// [`PacketError`]
pub(super) fn promiscuous(name: &str, index: libc::c_int) -> Result<OwnedFd, PacketError> {
    let fd = socket(
        AddressFamily::Packet,
        SockType::Raw,
        SockFlag::SOCK_CLOEXEC,
        None::<SockProtocol>,
    );
    let fd = fd.map_err(|errno| explained(name, "opening it", errno))?;
    sys::set_promiscuous(fd.as_fd(), index)
        .map_err(|errno| explained(name, "receiving packets for all addresses", errno))?;
    Ok(fd)
}

fn explained(name: &str, what: &'static str, errno: Errno) -> PacketError {
    let name = name.to_owned();
    match errno {
        Errno::EPERM | Errno::EACCES => PacketError::Permission { name },
        other => PacketError::Request {
            name,
            what,
            source: other.into(),
        },
    }
}

/// The sockets once more, by which another program goes on with them.
#[derive(Debug)]
pub(super) struct Sockets {
    spec: LinkSpec,
    /// By queue: `None` while it takes no part.
    queues: Mutex<Vec<Option<OwnedFd>>>,
}

impl Sockets {
    fn new(name: &str, count: u16) -> Arc<Self> {
        Arc::new(Self {
            spec: LinkSpec::Packet(name.to_owned()),
            queues: Mutex::new((0..count).map(|_| None).collect()),
        })
    }

    fn queues(&self) -> MutexGuard<'_, Vec<Option<OwnedFd>>> {
        self.queues.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The socket of a queue is this one now.
    fn set(&self, number: u16, socket: Option<&OwnedFd>) {
        if let Some(place) = self.queues().get_mut(usize::from(number)) {
            // Without it, another program opens one of its own.
            *place = socket.and_then(|socket| socket.try_clone().ok());
        }
    }
}

impl Interface for Sockets {
    fn needs(&self, profile: &mut Profile) {
        self.spec.needs(profile);
    }

    fn parts(&self) -> io::Result<Option<Vec<OwnedFd>>> {
        let queues = self.queues();
        let sockets = queues.iter().flatten().map(OwnedFd::try_clone);
        sockets.collect::<io::Result<_>>().map(Some)
    }

    fn order(&self) -> Vec<u16> {
        let queues = self.queues();
        let open = (0..)
            .zip(queues.iter())
            .filter(|(_, queue)| queue.is_some());
        open.map(|(number, _)| number).collect()
    }
}

/// One socket of those that share what arrives at an interface.
#[derive(Debug)]
pub(super) struct Packet {
    number: u16,
    sockets: Arc<Sockets>,
    name: String,
    index: libc::c_int,
    /// Number of the group (PACKET_FANOUT), if there are several.
    group: Option<u16>,
    /// `None` while it takes no part: the kernel lets no socket out of a group but by closing it.
    socket: Option<OwnedFd>,
    watcher: Option<Watcher>,
}

impl Packet {
    /// Opens `count` sockets on the interface `name`, that share its flows.
    pub(super) fn open(name: &str, count: u16) -> Result<(Arc<Sockets>, Vec<Self>), PacketError> {
        Self::adopt(name, count, Vec::new())
    }

    /// The same with sockets of another program, with the numbers of their queues.
    pub(super) fn adopt(
        name: &str,
        count: u16,
        taken: Vec<(u16, OwnedFd)>,
    ) -> Result<(Arc<Sockets>, Vec<Self>), PacketError> {
        let index = interface_index(name)?;
        let sockets = Sockets::new(name, count);
        let goes_on = !taken.is_empty();
        let mut taken = BTreeMap::from_iter(taken);
        let mut group = match taken.values().next() {
            Some(socket) if count > 1 => {
                let found = sys::group_of(socket.as_fd());
                Some(found.map_err(|errno| explained(name, "finding its fan-out group", errno))?)
            }
            _ => None,
        };
        let queues = (0..count)
            .map(|number| {
                let mut queue = Self {
                    number,
                    sockets: Arc::clone(&sockets),
                    name: name.to_owned(),
                    index,
                    group,
                    socket: None,
                    watcher: None,
                };
                queue.socket = taken.remove(&number);
                // One that took no part does so when it is to.
                if !goes_on {
                    let socket = queue.socket()?;
                    if count > 1 && group.is_none() {
                        let found = sys::new_group(socket.as_fd());
                        group = Some(queue.request("making a fan-out group", found)?);
                        queue.group = group;
                    }
                    queue.socket = Some(socket);
                }
                sockets.set(number, queue.socket.as_ref());
                Ok(queue)
            })
            .collect::<Result<_, _>>()?;
        Ok((sockets, queues))
    }

    fn request<T>(&self, what: &'static str, result: Result<T, Errno>) -> Result<T, PacketError> {
        result.map_err(|errno| explained(&self.name, what, errno))
    }

    /// A socket as this one has it, member of its group.
    fn socket(&self) -> Result<OwnedFd, PacketError> {
        // Without a protocol nothing arrives until it is bound.
        let fd = socket(
            AddressFamily::Packet,
            SockType::Raw,
            SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK,
            None::<SockProtocol>,
        );
        let fd = self.request("opening it", fd)?;
        let socket = fd.as_fd();
        let header = sys::set(socket, libc::PACKET_VNET_HDR, 1);
        self.request("asking for virtio-net headers", header)?;
        let incoming = sys::set(socket, libc::PACKET_IGNORE_OUTGOING, 1);
        self.request("leaving out packets that go out", incoming)?;
        let promiscuous = sys::set_promiscuous(socket, self.index);
        self.request("receiving packets for all addresses", promiscuous)?;
        self.request("binding it", sys::bind(socket, self.index))?;
        if let Some(group) = self.group {
            let joined = sys::join_group(socket, group);
            self.request("joining its fan-out group", joined)?;
        }
        Ok(fd)
    }
}

impl Link for Packet {
    fn watch(&mut self, watcher: Watcher) -> io::Result<()> {
        if let Some(socket) = &self.socket {
            watcher.add(socket.as_fd())?;
        }
        self.watcher = Some(watcher);
        Ok(())
    }

    fn send(&mut self, frame: &mut IoList, header_len: usize) -> io::Result<()> {
        let Some(socket) = &self.socket else {
            return Err(io::ErrorKind::NotConnected.into());
        };
        let mut header = [0; SOCKET_HEADER];
        frame.copy_out(0, &mut header);
        frame
            .send_behind(socket.as_fd(), &header, header_len)
            .map(drop)
    }

    fn receive(
        &mut self,
        list: &mut IoList,
        pieces: usize,
        header_len: usize,
        spill: &mut [u8],
    ) -> io::Result<usize> {
        let Some(socket) = &self.socket else {
            return Err(io::ErrorKind::WouldBlock.into());
        };
        let mut header = [0; MAX_HEADER];
        let (front, _) = header.split_at_mut(SOCKET_HEADER);
        let len = list.read_behind(socket.as_fd(), front, header_len, pieces, spill)?;
        let header = header.get(..header_len).unwrap_or(&header);
        list.deliver(0, header, pieces, spill);
        Ok(len.saturating_sub(SOCKET_HEADER).saturating_add(header_len))
    }

    fn attached(&self) -> bool {
        self.socket.is_some()
    }

    /// A socket alone stays.
    fn set_attached(&mut self, attached: bool) -> io::Result<()> {
        if self.group.is_none() || attached == self.attached() {
            return Ok(());
        }
        if !attached {
            self.sockets.set(self.number, None);
            self.socket = None;
            return Ok(());
        }
        let socket = self.socket().map_err(io::Error::other)?;
        if let Some(watcher) = &self.watcher {
            watcher.add(socket.as_fd())?;
        }
        self.sockets.set(self.number, Some(&socket));
        self.socket = Some(socket);
        Ok(())
    }

    fn advice(&self, error: &io::Error) -> Option<&'static str> {
        match error.raw_os_error()? {
            libc::ENETDOWN => Some("the interface is down; bring it up (ip link set NAME up)"),
            libc::EMSGSIZE => Some("a packet longer than the MTU of the interface"),
            libc::ENXIO | libc::ENODEV => Some("the interface was deleted"),
            _ => None,
        }
    }
}

/// The requests to the kernel, each behind a function that cannot be called wrongly.
#[allow(
    unsafe_code,
    reason = "the options and addresses of packet sockets have no safe wrapper"
)]
mod sys {
    use super::*;

    /// Sends each flow to one member of the group (linux/if_packet.h).
    const PACKET_FANOUT_HASH: libc::c_int = 0;
    /// The kernel chooses a number that is free (linux/if_packet.h).
    const PACKET_FANOUT_FLAG_UNIQUEID: libc::c_int = 0x2000;

    fn set_option<T>(socket: BorrowedFd<'_>, option: libc::c_int, value: &T) -> Result<(), Errno> {
        let len = libc::socklen_t::try_from(size_of::<T>()).map_err(|_| Errno::EINVAL)?;
        // SAFETY: the kernel reads `len` bytes of a value that lives until after the call.
        let done = unsafe {
            libc::setsockopt(
                socket.as_raw_fd(),
                libc::SOL_PACKET,
                option,
                std::ptr::from_ref(value).cast(),
                len,
            )
        };
        Errno::result(done).map(drop)
    }

    /// Sets an option that is a number.
    pub(super) fn set(
        socket: BorrowedFd<'_>,
        option: libc::c_int,
        value: libc::c_int,
    ) -> Result<(), Errno> {
        set_option(socket, option, &value)
    }

    /// Receives what is for other addresses, too, as long as the socket is open.
    pub(super) fn set_promiscuous(socket: BorrowedFd<'_>, index: libc::c_int) -> Result<(), Errno> {
        let request = libc::packet_mreq {
            mr_ifindex: index,
            mr_type: u16::try_from(libc::PACKET_MR_PROMISC).map_err(|_| Errno::EINVAL)?,
            mr_alen: 0,
            mr_address: [0; 8],
        };
        set_option(socket, libc::PACKET_ADD_MEMBERSHIP, &request)
    }

    /// Takes packets of all kinds of one interface.
    pub(super) fn bind(socket: BorrowedFd<'_>, index: libc::c_int) -> Result<(), Errno> {
        let address = libc::sockaddr_ll {
            sll_family: u16::try_from(libc::AF_PACKET).map_err(|_| Errno::EINVAL)?,
            sll_protocol: u16::try_from(libc::ETH_P_ALL)
                .map_err(|_| Errno::EINVAL)?
                .to_be(),
            sll_ifindex: index,
            sll_hatype: 0,
            sll_pkttype: 0,
            sll_halen: 0,
            sll_addr: [0; 8],
        };
        let len = libc::socklen_t::try_from(size_of_val(&address)).map_err(|_| Errno::EINVAL)?;
        // SAFETY: the kernel reads one sockaddr_ll, which lives until after the call.
        let done = unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), len) };
        Errno::result(done).map(drop)
    }

    /// Makes a group, the socket its first member; returns its number.
    pub(super) fn new_group(socket: BorrowedFd<'_>) -> Result<u16, Errno> {
        let wanted = (PACKET_FANOUT_HASH | PACKET_FANOUT_FLAG_UNIQUEID) << 16;
        set(socket, libc::PACKET_FANOUT, wanted)?;
        group_of(socket)
    }

    /// The number of the group whose member the socket is.
    pub(super) fn group_of(socket: BorrowedFd<'_>) -> Result<u16, Errno> {
        let mut value: libc::c_int = 0;
        let mut len = libc::socklen_t::try_from(size_of_val(&value)).map_err(|_| Errno::EINVAL)?;
        // SAFETY: the kernel writes one int and its length, which live until after the call.
        let done = unsafe {
            libc::getsockopt(
                socket.as_raw_fd(),
                libc::SOL_PACKET,
                libc::PACKET_FANOUT,
                (&raw mut value).cast(),
                &raw mut len,
            )
        };
        Errno::result(done)?;
        u16::try_from(value & 0xffff).map_err(|_| Errno::EINVAL)
    }

    /// Joins a group.
    pub(super) fn join_group(socket: BorrowedFd<'_>, group: u16) -> Result<(), Errno> {
        set(
            socket,
            libc::PACKET_FANOUT,
            (PACKET_FANOUT_HASH << 16) | libc::c_int::from(group),
        )
    }
}

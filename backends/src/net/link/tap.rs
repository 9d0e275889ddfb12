//! A Linux TAP interface: opened by name or inherited, its offloads, and its queues. A macvtap interface is one, too, whose
//! other end is the network of a real interface.
//!
//! The interface is one object of the kernel, each open file one queue of it. [`Tap`] speaks about the
//! interface, [`TapQueue`] is what one queue pair reads and writes.

use std::ffi::{c_int, c_ulong};
use std::fs::OpenOptions;
use std::io;
use std::net::Ipv4Addr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::slice::ChunksExactMut;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use epoll::Events;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, FdFlag, OFlag, fcntl};
use nix::net::if_::if_nametoindex;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};
use ringside_sandbox::{Call, Capability, Profile, ThreadKind, calls};
use thiserror::Error;
use tracing::error;

use super::batch::{self, Batch};
use super::{ATTEMPTS, Interface, Link, LinkError, Ready, patiently};
use crate::net::config::MacAddress;
use crate::net::epoll_set::Watcher;
use crate::net::iov::IoList;
use crate::net::steering::{Rss, Steering};

/// The clone device from which TAP queues are opened.
const TUN_DEVICE: &str = "/dev/net/tun";

/// Most packets that are read with one call: each has a spill of its own.
const GIVES_AT_ONCE: u16 = 32;

/// Most queues of one interface (the kernel's MAX_TAP_QUEUES).
pub(in crate::net) const MAX_QUEUES: u16 = 256;

/// Why a TAP interface cannot be used.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum TapError {
    /// The name does not fit.
    #[error("TAP name \"{name}\" is not usable: 1 to {max} bytes, without '/', white space and NUL", max = libc::IFNAMSIZ - 1)]
    Name {
        /// What was asked for.
        name: String,
    },
    /// The kernel's TUN/TAP driver is not there, or not for us.
    #[error("cannot open {TUN_DEVICE}: load the tun module, and give this user access to it")]
    OpenDevice(#[source] io::Error),
    /// No right to create or open it.
    #[error(
        "no permission for TAP \"{name}\": run with CAP_NET_ADMIN, or have it made for this user \
         (ip tuntap add dev {name} mode tap user USER vnet_hdr{multi})", multi = multi_queue_word(*.queues)
    )]
    Permission {
        /// Name of the interface.
        name: String,
        /// Queues wanted.
        queues: u16,
    },
    /// No such macvtap interface.
    #[error(
        "there is no macvtap interface \"{name}\": make one on an interface of the host \
         (ip link add link eth0 name {name} type macvtap mode bridge)"
    )]
    NoMacvtap {
        /// What was asked for.
        name: String,
    },
    /// The device file of a macvtap interface is not there, or not for us.
    #[error(
        "cannot open {path}, the device file of \"{name}\": it must be there, and this user have access to it"
    )]
    OpenMacvtap {
        /// Name of the interface.
        name: String,
        /// The file.
        path: String,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The device file is that of an interface in another network namespace.
    #[error(
        "{path} is the device file of \"{other}\", not of \"{name}\": it is in another network namespace"
    )]
    OtherMacvtap {
        /// Name of the interface.
        name: String,
        /// The file.
        path: String,
        /// Whose it is.
        other: String,
    },
    /// Somebody has it open.
    #[error("TAP \"{name}\" is in use by another program: end that, or choose another name")]
    Busy {
        /// Name of the interface.
        name: String,
    },
    /// It exists, and is of another kind.
    #[error(
        "\"{name}\" exists and is no TAP interface{with}{multi}: choose another name, or delete it \
         (ip link delete {name}) and let this program create it", with = if *.queues > 1 { " with" } else { "" }, multi = multi_queue_word(*.queues)
    )]
    Kind {
        /// Name of the interface.
        name: String,
        /// Queues wanted.
        queues: u16,
    },
    /// It has as many queues open as it can have.
    #[error(
        "TAP \"{name}\" has no room for {queues} more queues: at most {MAX_QUEUES} can be open in all programs together"
    )]
    TooManyQueues {
        /// Name of the interface.
        name: String,
        /// Queues wanted.
        queues: u16,
    },
    /// A descriptor that was handed over is no TAP queue.
    #[error(
        "file descriptor {fd} is no open TAP queue: open {TUN_DEVICE} and attach it to an interface before handing it over"
    )]
    NotATap {
        /// Its number.
        fd: RawFd,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// A descriptor that was handed over lacks the packet header.
    #[error(
        "file descriptor {fd} is a queue of \"{name}\" without {lacking}: open it with IFF_TAP, IFF_NO_PI and IFF_VNET_HDR"
    )]
    Flags {
        /// Its number.
        fd: RawFd,
        /// Name of the interface.
        name: String,
        /// What is missing.
        lacking: &'static str,
    },
    /// Descriptors that were handed over belong to different interfaces.
    #[error(
        "file descriptors {first} and {fd} are queues of different TAP interfaces, \"{name}\" and \"{other}\""
    )]
    Mixed {
        /// Number of the first one.
        first: RawFd,
        /// Number of the other one.
        fd: RawFd,
        /// Interface of the first one.
        name: String,
        /// Interface of the other one.
        other: String,
    },
    /// The kernel takes no program that steers packets.
    #[error(
        "the kernel takes no program that steers packets of \"{name}\": give this program CAP_BPF, or allow all of them that \
         (sysctl kernel.unprivileged_bpf_disabled=0)"
    )]
    Steering {
        /// Name of the interface.
        name: String,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// Another request to the kernel failed.
    #[error("TAP \"{name}\": {what} failed")]
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

fn multi_queue_word(queues: u16) -> &'static str {
    if queues > 1 { " multi_queue" } else { "" }
}

/// One queue of a TAP interface: a non-blocking descriptor that gives and takes one packet for each
/// `readv` and `writev`, with a virtio-net header before it.
#[derive(Debug)]
pub struct TapQueue {
    fd: Arc<OwnedFd>,
    /// It can be attached to and detached from the interface (IFF_MULTI_QUEUE).
    switchable: bool,
    /// Its number among the queues of the interface that are ours.
    number: u16,
    members: Arc<Mutex<Members>>,
    /// The interface was deleted, and that was said.
    lost: bool,
    /// Many frames for one system call.
    batch: Option<Box<Batch>>,
}

/// The queues that are attached, and how packets are spread over them. The kernel knows queues by their position in an array
/// of those: a queue that is attached comes last, and the last one takes the place of one that is detached.
#[derive(Debug, Default)]
struct Members {
    order: Vec<u16>,
    steering: Option<Steering>,
    rss: Option<Rss>,
}

impl Members {
    /// A queue was attached, or detached.
    fn moved(&mut self, number: u16, attached: bool) {
        let place = self.order.iter().position(|&other| other == number);
        match (attached, place) {
            (true, None) => self.order.push(number),
            (false, Some(place)) => drop(self.order.swap_remove(place)),
            _ => {}
        }
    }

    /// Tells the kernel.
    fn steer(&self) -> io::Result<()> {
        let (Some(steering), Some(rss)) = (&self.steering, &self.rss) else {
            return Ok(());
        };
        steering.set(rss, |number| {
            let place = self.order.iter().position(|&other| other == number);
            // Packets of a queue that is not there go to the first one.
            place
                .and_then(|place| u16::try_from(place).ok())
                .unwrap_or(0)
        })
    }
}

fn lock(members: &Mutex<Members>) -> MutexGuard<'_, Members> {
    members.lock().unwrap_or_else(PoisonError::into_inner)
}

impl TapQueue {
    /// A queue that is opened behind `before` others.
    fn new(fd: OwnedFd, switchable: bool, before: usize, members: &Arc<Mutex<Members>>) -> Self {
        Self {
            batch: Batch::new(fd.as_fd()).map(Box::new),
            fd: Arc::new(fd),
            switchable,
            number: u16::try_from(before).unwrap_or(u16::MAX),
            members: Arc::clone(members),
            lost: false,
        }
    }

    /// Wraps a non-blocking descriptor with a packet for each read and write. It is always attached.
    #[cfg(test)]
    pub(in crate::net) fn from_packet_fd(fd: OwnedFd) -> Self {
        let members = Members {
            order: vec![0],
            ..Members::default()
        };
        Self::new(fd, false, 0, &Arc::new(Mutex::new(members)))
    }
}

impl Link for TapQueue {
    fn watch(&mut self, watcher: Watcher) -> io::Result<()> {
        watcher.add(self.fd.as_fd())
    }

    fn ready(&mut self, events: Events) -> Ready {
        // A queue that is detached is in error as well.
        if events.contains(Events::EPOLLERR) && !self.lost && self.attached() {
            self.lost = true;
            error!(
                "the interface was deleted: no packet passes any more; start this program again"
            );
        }
        Ready::from(events)
    }

    fn send(&mut self, frame: &mut IoList, _header_len: usize) -> io::Result<()> {
        frame.write_to(self.fd.as_fd()).map(drop)
    }

    fn at_once(&self) -> u16 {
        match &self.batch {
            Some(batch) if batch.is_sound() => batch::AT_ONCE,
            _ => 1,
        }
    }

    fn send_all(
        &mut self,
        frames: &mut IoList,
        pieces: &[usize],
        header_len: usize,
        results: &mut Vec<io::Result<()>>,
    ) {
        match &mut self.batch {
            Some(batch) if pieces.len() > 1 => batch.write(frames, pieces, results),
            _ => results.push(self.send(frames, header_len)),
        }
    }

    fn receive(
        &mut self,
        list: &mut IoList,
        pieces: usize,
        _header_len: usize,
        spill: &mut [u8],
    ) -> io::Result<usize> {
        list.read_from(self.fd.as_fd(), pieces, spill)
    }

    fn gives_at_once(&self) -> u16 {
        match &self.batch {
            Some(batch) if batch.is_sound() => GIVES_AT_ONCE,
            _ => 1,
        }
    }

    fn receive_all(
        &mut self,
        list: &mut IoList,
        pieces: &[usize],
        spills: ChunksExactMut<'_, u8>,
        results: &mut Vec<io::Result<usize>>,
    ) {
        if let Some(batch) = &mut self.batch {
            batch.read(list, pieces, spills, results);
        }
    }

    fn attached(&self) -> bool {
        lock(&self.members).order.contains(&self.number)
    }

    /// The queue of an interface that has only one stays attached.
    fn set_attached(&mut self, attached: bool) -> io::Result<()> {
        if !self.switchable || self.attached() == attached {
            return Ok(());
        }
        let flag = if attached {
            libc::IFF_ATTACH_QUEUE
        } else {
            libc::IFF_DETACH_QUEUE
        };
        let mut members = lock(&self.members);
        ioctls::set_queue(self.fd.as_fd(), flag)?;
        members.moved(self.number, attached);
        members.steer()
    }

    fn advice(&self, error: &io::Error) -> Option<&'static str> {
        (error.raw_os_error() == Some(libc::EIO))
            .then_some("the TAP interface is down; bring it up (--tap-up)")
    }
}

impl AsFd for TapQueue {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// A TAP interface that this program has open.
#[derive(Debug)]
pub struct Tap {
    name: String,
    /// A second descriptor of the first queue, which is never detached: requests on a detached queue fail.
    control: OwnedFd,
    /// Of all queues.
    queues: Vec<Arc<OwnedFd>>,
    /// Another program has it open, whose place this one takes.
    taken: bool,
    members: Arc<Mutex<Members>>,
}

impl Tap {
    /// Opens `queues` queues of the interface `name`; creates it if there is none. A `%d` in the name is replaced by
    /// a number that is free.
    ///
    /// An interface with one queue is opened so that no other program can have it too.
    ///
    /// # Errors
    /// [`TapError`]
    pub fn open(name: &str, queues: u16) -> Result<(Self, Vec<TapQueue>), TapError> {
        check_name(name)?;
        let queues = queues.max(1);
        let mut name = name.to_owned();
        let mut opened = Vec::new();
        let members = Arc::default();
        let mut flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
        if queues > 1 {
            flags |= libc::IFF_MULTI_QUEUE;
        }
        for _ in 0..queues {
            let fd = open_device()?;
            let attach = |flags| {
                // By a program that was killed a moment ago, perhaps.
                let busy = |errno: &Errno| matches!(errno, Errno::EBUSY | Errno::E2BIG);
                patiently(ATTEMPTS, busy, || {
                    ioctls::set_interface(fd.as_fd(), &name, flags)
                })
            };
            let attached = match attach(flags) {
                // It was made with multi_queue; one queue of it will do.
                Err(Errno::EINVAL) if queues == 1 => {
                    flags |= libc::IFF_MULTI_QUEUE;
                    attach(flags)
                }
                other => other,
            };
            name = attached.map_err(|errno| open_error(&name, queues, errno))?;
            opened.push(TapQueue::new(fd, queues > 1, opened.len(), &members));
        }
        Self::with_queues(name, opened)
    }

    /// Opens `queues` queues of the macvtap interface `name`, which there must be.
    ///
    /// # Errors
    /// [`TapError`]
    pub fn macvtap(name: &str, queues: u16) -> Result<(Self, Vec<TapQueue>), TapError> {
        check_name(name)?;
        let queues = queues.max(1);
        let owned = || name.to_owned();
        let index = if_nametoindex(name).map_err(|_| TapError::NoMacvtap { name: owned() })?;
        let path = format!("/dev/tap{index}");
        let mut flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
        if queues > 1 {
            flags |= libc::IFF_MULTI_QUEUE;
        }
        let mut opened = Vec::new();
        let members = Arc::default();
        for _ in 0..queues {
            let fd = open_queue(&path).map_err(|source| match source.raw_os_error() {
                Some(libc::ENOENT) => TapError::NoMacvtap { name: owned() },
                Some(libc::EBUSY) => TapError::TooManyQueues {
                    name: owned(),
                    queues,
                },
                _ => TapError::OpenMacvtap {
                    name: owned(),
                    path: path.clone(),
                    source,
                },
            })?;
            ioctls::set_interface(fd.as_fd(), name, flags)
                .and_then(|_| ioctls::get_interface(fd.as_fd()))
                .map_err(|errno| open_error(name, queues, errno))
                .and_then(|(other, _)| {
                    let (name, path) = (owned(), path.clone());
                    match other == name {
                        true => Ok(()),
                        false => Err(TapError::OtherMacvtap { name, path, other }),
                    }
                })?;
            opened.push(TapQueue::new(fd, queues > 1, opened.len(), &members));
        }
        Self::with_queues(owned(), opened)
    }

    /// Takes over descriptors that a parent has opened, one for each queue. Each number is taken once: the
    /// descriptors belong to the result.
    ///
    /// # Errors
    /// [`TapError::NotATap`], [`TapError::Flags`], [`TapError::Mixed`]
    pub fn inherit(fds: &[RawFd]) -> Result<(Self, Vec<TapQueue>), TapError> {
        let mut opened = Vec::new();
        let members = Arc::default();
        let mut interface: Option<(RawFd, String)> = None;
        for &number in fds {
            let not_a_tap = |errno: Errno| TapError::NotATap {
                fd: number,
                source: errno.into(),
            };
            let fd = ioctls::take(number).map_err(not_a_tap)?;
            let (name, flags) = ioctls::get_interface(fd.as_fd()).map_err(not_a_tap)?;
            for (flag, lacking) in [
                (libc::IFF_TAP, "IFF_TAP"),
                (libc::IFF_NO_PI, "IFF_NO_PI"),
                (libc::IFF_VNET_HDR, "IFF_VNET_HDR"),
            ] {
                if flags & flag == 0 {
                    let fd = number;
                    return Err(TapError::Flags { fd, name, lacking });
                }
            }
            let first = interface.get_or_insert_with(|| (number, name.clone()));
            if first.1 != name {
                return Err(TapError::Mixed {
                    first: first.0,
                    fd: number,
                    name: first.1.clone(),
                    other: name,
                });
            }
            let request = |what| {
                let name = name.clone();
                move |errno: Errno| TapError::Request {
                    name,
                    what,
                    source: errno.into(),
                }
            };
            let what = "making an inherited descriptor non-blocking";
            let status = fcntl(&fd, FcntlArg::F_GETFL).map_err(request(what))?;
            let status = OFlag::from_bits_retain(status) | OFlag::O_NONBLOCK;
            fcntl(&fd, FcntlArg::F_SETFL(status)).map_err(request(what))?;
            fcntl(&fd, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC)).map_err(request(what))?;
            opened.push(TapQueue::new(
                fd,
                fds.len() > 1 && flags & libc::IFF_MULTI_QUEUE != 0,
                opened.len(),
                &members,
            ));
        }
        let name = interface.map(|(_, name)| name).unwrap_or_default();
        // Whoever attached them may have done so in another order.
        for flag in [libc::IFF_DETACH_QUEUE, libc::IFF_ATTACH_QUEUE] {
            for queue in opened.iter().skip(1).filter(|queue| queue.switchable) {
                ioctls::set_queue(queue.fd.as_fd(), flag).map_err(|source| TapError::Request {
                    name: name.clone(),
                    what: "putting inherited queues in order",
                    source,
                })?;
            }
        }
        Self::with_queues(name, opened)
    }

    /// Goes on with all queues of another program, which has them open until it ends. Nothing of the interface is changed.
    ///
    /// # Errors
    /// [`TapError::NotATap`]
    pub fn adopt(fds: Vec<OwnedFd>) -> Result<(Self, Vec<TapQueue>), TapError> {
        let members = Arc::default();
        let switchable = fds.len() > 1;
        // The first one is never detached.
        let name = match fds.first() {
            Some(first) => ioctls::get_interface(first.as_fd())
                .map(|(name, _)| name)
                .map_err(|errno| TapError::NotATap {
                    fd: first.as_raw_fd(),
                    source: errno.into(),
                })?,
            None => String::new(),
        };
        let opened = (0..).zip(fds);
        let opened = opened.map(|(number, fd)| TapQueue::new(fd, switchable, number, &members));
        let (tap, queues) = Self::with_queues(name, opened.collect())?;
        Ok((Self { taken: true, ..tap }, queues))
    }

    fn with_queues(name: String, queues: Vec<TapQueue>) -> Result<(Self, Vec<TapQueue>), TapError> {
        let none = || io::Error::new(io::ErrorKind::InvalidInput, "no queue was given");
        let control = match queues.first() {
            Some(queue) => queue.fd.try_clone(),
            None => Err(none()),
        };
        match control {
            Ok(control) => {
                let members = queues.first().map(|queue| Arc::clone(&queue.members));
                let tap = Self {
                    name,
                    control,
                    queues: queues.iter().map(|queue| Arc::clone(&queue.fd)).collect(),
                    taken: false,
                    members: members.unwrap_or_default(),
                };
                lock(&tap.members).order = queues.iter().map(|queue| queue.number).collect();
                Ok((tap, queues))
            }
            Err(source) => Err(TapError::Request {
                name,
                what: "duplicating a queue's descriptor",
                source,
            }),
        }
    }

    /// Gives the kernel the program that steers packets to queues.
    ///
    /// # Errors
    /// [`TapError::Steering`]
    fn prepare_steering(&self) -> Result<(), TapError> {
        let load = || -> io::Result<Steering> {
            let steering = Steering::load()?;
            if self.taken {
                // That of the other program is in place.
                return Ok(steering);
            }
            // Does this kernel take it?
            ioctls::set_steering(self.control.as_fd(), Some(steering.program()))?;
            ioctls::set_steering(self.control.as_fd(), None)?;
            Ok(steering)
        };
        let steering = load().map_err(|source| TapError::Steering {
            name: self.name.clone(),
            source,
        })?;
        lock(&self.members).steering = Some(steering);
        Ok(())
    }

    /// Has packets go to the queues that a driver wants, or as the kernel likes.
    ///
    /// # Errors
    /// [`TapError::Request`]
    fn steer(&self, rss: Option<Rss>) -> Result<(), TapError> {
        let mut members = lock(&self.members);
        let steered = rss.is_some();
        let before = std::mem::replace(&mut members.rss, rss);
        let done = members.steer().and_then(|()| {
            if steered == before.is_some() {
                return Ok(());
            }
            let steering = members.steering.as_ref().filter(|_| steered);
            let program = steering.map(Steering::program);
            Ok(ioctls::set_steering(self.control.as_fd(), program)?)
        });
        if done.is_err() {
            // So does the kernel: a map that it does not take is as it was, and without a program it is not asked.
            members.rss = before;
        }
        done.map_err(|source| TapError::Request {
            name: self.name.clone(),
            what: "steering packets to queues",
            source,
        })
    }

    /// Name of the interface.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    fn request(&self, what: &'static str, result: Result<(), Errno>) -> Result<(), TapError> {
        result.map_err(|errno| TapError::Request {
            name: self.name.clone(),
            what,
            source: errno.into(),
        })
    }

    /// Sets how many bytes precede each packet: 12 with `num_buffers` (VIRTIO 1.3, 5.1.6), 10 without.
    ///
    /// # Errors
    /// [`TapError::Request`]
    pub fn set_header_len(&self, len: u8) -> Result<(), TapError> {
        self.request(
            "setting the header length",
            ioctls::set_header_len(self.control.as_fd(), len.into()),
        )
    }

    /// Says which packets this side takes as they are: a set of `TUN_F_*`.
    ///
    /// # Errors
    /// [`TapError::Request`]
    pub fn set_offloads(&self, offloads: u32) -> Result<(), TapError> {
        self.request(
            "setting offloads",
            ioctls::set_offload(self.control.as_fd(), offloads.into()),
        )
    }

    /// Which of these `TUN_F_*` sets, best first, the kernel takes; 0 if none. Leaves all offloads off.
    #[must_use]
    pub fn probe_offloads(&self, candidates: &[u32]) -> u32 {
        let found = candidates
            .iter()
            .copied()
            .find(|&set| ioctls::set_offload(self.control.as_fd(), set.into()).is_ok());
        // 0 is a set that every kernel takes.
        let _ = ioctls::set_offload(self.control.as_fd(), 0);
        found.unwrap_or(0)
    }

    /// Makes the interface stay when its last queue is closed.
    ///
    /// # Errors
    /// [`TapError::Request`]
    pub fn set_persistent(&self) -> Result<(), TapError> {
        self.request(
            "making it persistent",
            ioctls::set_persist(self.control.as_fd()),
        )
    }

    /// Sets the interface's MTU in bytes.
    ///
    /// # Errors
    /// [`TapError::Request`]
    pub fn set_mtu(&self, mtu: u16) -> Result<(), TapError> {
        let result = inet_socket().and_then(|s| ioctls::set_mtu(s.as_fd(), &self.name, mtu.into()));
        self.request("setting the MTU", result)
    }

    /// The interface's own address.
    ///
    /// # Errors
    /// [`TapError::Request`]
    pub(super) fn mac(&self) -> Result<MacAddress, TapError> {
        inet_socket()
            .and_then(|s| ioctls::get_mac(s.as_fd(), &self.name))
            .map(MacAddress::new)
            .map_err(|errno| TapError::Request {
                name: self.name.clone(),
                what: "asking for its address",
                source: errno.into(),
            })
    }

    /// Brings the interface up.
    ///
    /// # Errors
    /// [`TapError::Request`]
    pub fn set_up(&self) -> Result<(), TapError> {
        let result = inet_socket().and_then(|s| ioctls::set_up(s.as_fd(), &self.name));
        self.request("bringing it up", result)
    }

    /// Gives the host's end an IPv4 address.
    ///
    /// # Errors
    /// [`TapError::Request`]
    pub fn set_address(&self, address: Ipv4Addr, prefix_len: u8) -> Result<(), TapError> {
        let bits = u32::from(prefix_len.min(32));
        let mask = u32::MAX
            .checked_shl(32_u32.saturating_sub(bits))
            .unwrap_or(0);
        let result = inet_socket().and_then(|s| {
            ioctls::set_address(s.as_fd(), &self.name, address)?;
            ioctls::set_netmask(s.as_fd(), &self.name, Ipv4Addr::from(mask))
        });
        self.request("setting the address", result)
    }
}

impl Interface for Tap {
    fn set_header_len(&self, len: u8) -> Result<(), LinkError> {
        Ok(Self::set_header_len(self, len)?)
    }

    fn set_offloads(&self, offloads: u32) -> Result<(), LinkError> {
        Ok(Self::set_offloads(self, offloads)?)
    }

    fn needs(&self, profile: &mut Profile) {
        let requests = [
            (
                libc::TUNSETQUEUE,
                "queues that a driver switches on and off",
            ),
            (libc::TUNSETVNETHDRSZ, "the driver's length of headers"),
            (libc::TUNSETOFFLOAD, "the driver's offloads"),
            (libc::TUNSETSTEERINGEBPF, "the driver's table of queues"),
        ];
        let requests = requests.map(|(request, why)| calls::ioctl(request, why));
        let mut kept: Vec<&[Call]> = vec![&requests];
        if lock(&self.members).steering.is_some() {
            profile.capability(Capability::CAP_BPF);
            kept.push(calls::BPF_MAPS);
        }
        for kind in [ThreadKind::Queue, ThreadKind::Helper] {
            profile.thread(kind, &kept);
        }
        profile
            .calls(calls::BATCHES)
            .thread(ThreadKind::Queue, &[calls::BATCHES]);
        kept.into_iter().for_each(|group| {
            profile.calls(group);
        });
    }

    fn prepare_steering(&self) -> Result<(), LinkError> {
        Ok(Self::prepare_steering(self)?)
    }

    fn set_steering(&self, rss: Option<Rss>) -> Result<(), LinkError> {
        if rss.is_some() && lock(&self.members).steering.is_none() {
            return Err(LinkError::NoSteering);
        }
        Ok(self.steer(rss)?)
    }

    fn parts(&self) -> io::Result<Option<Vec<OwnedFd>>> {
        let queues = self.queues.iter().map(|queue| queue.try_clone());
        queues.collect::<io::Result<_>>().map(Some)
    }

    fn order(&self) -> Vec<u16> {
        lock(&self.members).order.clone()
    }

    fn adopt_order(&self, order: Vec<u16>) -> Result<(), LinkError> {
        let mut members = lock(&self.members);
        members.order = order;
        let steered = members.steer();
        Ok(steered.map_err(|source| TapError::Request {
            name: self.name.clone(),
            what: "steering packets to queues",
            source,
        })?)
    }
}

fn check_name(name: &str) -> Result<(), TapError> {
    let unusable = |b: u8| b == b'/' || b == 0 || b.is_ascii_whitespace();
    let reserved = name.is_empty() || name == "." || name == "..";
    if reserved || name.len() >= libc::IFNAMSIZ || name.bytes().any(unusable) {
        let name = name.to_owned();
        return Err(TapError::Name { name });
    }
    Ok(())
}

fn open_device() -> Result<OwnedFd, TapError> {
    open_queue(TUN_DEVICE).map_err(TapError::OpenDevice)
}

fn open_queue(path: &str) -> io::Result<OwnedFd> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(path)
        .map(OwnedFd::from)
}

fn open_error(name: &str, queues: u16, errno: Errno) -> TapError {
    let name = name.to_owned();
    match errno {
        Errno::EPERM | Errno::EACCES => TapError::Permission { name, queues },
        Errno::EBUSY => TapError::Busy { name },
        Errno::EINVAL => TapError::Kind { name, queues },
        Errno::E2BIG => TapError::TooManyQueues { name, queues },
        other => TapError::Request {
            name,
            what: "opening a queue",
            source: other.into(),
        },
    }
}

/// Any socket will do to speak about interfaces.
fn inet_socket() -> Result<OwnedFd, Errno> {
    socket(
        AddressFamily::Inet,
        SockType::Datagram,
        SockFlag::SOCK_CLOEXEC,
        None,
    )
}

/// The requests to the kernel, each behind a function that cannot be called wrongly.
#[allow(
    unsafe_code,
    reason = "ioctl is the only interface to TAP devices, and no safe wrapper of it exists"
)]
mod ioctls {
    use super::*;

    mod raw {
        use super::{c_int, c_ulong};
        nix::ioctl_write_ptr_bad!(tunsetiff, libc::TUNSETIFF, libc::ifreq);
        nix::ioctl_read_bad!(tungetiff, libc::TUNGETIFF, libc::ifreq);
        nix::ioctl_write_ptr_bad!(tunsetqueue, libc::TUNSETQUEUE, libc::ifreq);
        nix::ioctl_write_ptr_bad!(tunsetsteeringebpf, libc::TUNSETSTEERINGEBPF, c_int);
        nix::ioctl_write_ptr_bad!(tunsetvnethdrsz, libc::TUNSETVNETHDRSZ, c_int);
        nix::ioctl_read_bad!(siocgifflags, libc::SIOCGIFFLAGS, libc::ifreq);
        nix::ioctl_write_ptr_bad!(siocsifflags, libc::SIOCSIFFLAGS, libc::ifreq);
        nix::ioctl_read_bad!(siocgifhwaddr, libc::SIOCGIFHWADDR, libc::ifreq);
        nix::ioctl_write_ptr_bad!(siocsifmtu, libc::SIOCSIFMTU, libc::ifreq);
        nix::ioctl_write_ptr_bad!(siocsifaddr, libc::SIOCSIFADDR, libc::ifreq);
        nix::ioctl_write_ptr_bad!(siocsifnetmask, libc::SIOCSIFNETMASK, libc::ifreq);

        /// A request whose argument is a number.
        pub(super) unsafe fn by_value(
            fd: c_int,
            request: libc::Ioctl,
            value: c_ulong,
        ) -> nix::Result<c_int> {
            // SAFETY: the caller vouches for request and value.
            nix::errno::Errno::result(unsafe { libc::ioctl(fd, request, value) })
        }
    }

    fn ifreq(name: &str, ifr_ifru: libc::__c_anonymous_ifr_ifru) -> Result<libc::ifreq, Errno> {
        let mut ifr_name: [libc::c_char; libc::IFNAMSIZ] = [0; libc::IFNAMSIZ];
        if name.len() >= ifr_name.len() {
            return Err(Errno::ENAMETOOLONG);
        }
        for (to, from) in ifr_name.iter_mut().zip(name.bytes()) {
            *to = libc::c_char::from_ne_bytes([from]);
        }
        Ok(libc::ifreq { ifr_name, ifr_ifru })
    }

    fn name_of(request: &libc::ifreq) -> String {
        let bytes: Vec<u8> = request
            .ifr_name
            .iter()
            .map(|c| u8::from_ne_bytes(c.to_ne_bytes()))
            .take_while(|&b| b != 0)
            .collect();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// Flags of interfaces fit the 16 bits of the field, as bit patterns.
    fn flags_field(flags: c_int) -> Result<libc::__c_anonymous_ifr_ifru, Errno> {
        let bits = u16::try_from(flags).map_err(|_| Errno::EINVAL)?;
        let ifru_flags = i16::from_ne_bytes(bits.to_ne_bytes());
        Ok(libc::__c_anonymous_ifr_ifru { ifru_flags })
    }

    fn flags_of(request: &libc::ifreq) -> c_int {
        // SAFETY: all bytes of the union were initialised, and any bits are an i16.
        let flags = unsafe { request.ifr_ifru.ifru_flags };
        u16::from_ne_bytes(flags.to_ne_bytes()).into()
    }

    /// Takes ownership of an inherited descriptor.
    pub(super) fn take(number: RawFd) -> Result<OwnedFd, Errno> {
        // SAFETY: F_GETFD of any number only tells whether it is open.
        let flags = unsafe { libc::fcntl(number, libc::F_GETFD) };
        Errno::result(flags)?;
        // SAFETY: it is open, and the command line gives it to this program, which uses each number once.
        Ok(unsafe { OwnedFd::from_raw_fd(number) })
    }

    /// Attaches a new queue to an interface and returns the interface's name.
    pub(super) fn set_interface(
        fd: BorrowedFd<'_>,
        name: &str,
        flags: c_int,
    ) -> Result<String, Errno> {
        let mut request = ifreq(name, flags_field(flags)?)?;
        // SAFETY: the kernel reads and writes one ifreq, which lives until after the call.
        unsafe { raw::tunsetiff(fd.as_raw_fd(), &raw mut request) }?;
        Ok(name_of(&request))
    }

    /// Name and flags of the interface that a queue is attached to.
    pub(super) fn get_interface(fd: BorrowedFd<'_>) -> Result<(String, c_int), Errno> {
        let mut request = ifreq("", flags_field(0)?)?;
        // SAFETY: the kernel writes one ifreq, which lives until after the call.
        unsafe { raw::tungetiff(fd.as_raw_fd(), &raw mut request) }?;
        Ok((name_of(&request), flags_of(&request)))
    }

    /// Attaches or detaches a queue.
    pub(super) fn set_queue(fd: BorrowedFd<'_>, flag: c_int) -> io::Result<()> {
        let request = ifreq("", flags_field(flag)?)?;
        // SAFETY: the kernel reads one ifreq, which lives until after the call.
        unsafe { raw::tunsetqueue(fd.as_raw_fd(), &raw const request) }?;
        Ok(())
    }

    pub(super) fn set_header_len(fd: BorrowedFd<'_>, len: c_int) -> Result<(), Errno> {
        // SAFETY: the kernel reads one int, which lives until after the call.
        unsafe { raw::tunsetvnethdrsz(fd.as_raw_fd(), &raw const len) }.map(drop)
    }

    pub(super) fn set_offload(fd: BorrowedFd<'_>, offloads: c_ulong) -> Result<(), Errno> {
        // SAFETY: the argument is a set of bits, not a pointer.
        unsafe { raw::by_value(fd.as_raw_fd(), libc::TUNSETOFFLOAD, offloads) }.map(drop)
    }

    /// Has the interface ask a program for the queue of each packet, or none.
    pub(super) fn set_steering(
        fd: BorrowedFd<'_>,
        program: Option<BorrowedFd<'_>>,
    ) -> Result<(), Errno> {
        let program = program.map_or(-1, |program| program.as_raw_fd());
        // SAFETY: the kernel reads one int, which lives until after the call.
        unsafe { raw::tunsetsteeringebpf(fd.as_raw_fd(), &raw const program) }.map(drop)
    }

    pub(super) fn set_persist(fd: BorrowedFd<'_>) -> Result<(), Errno> {
        // SAFETY: the argument is a truth value, not a pointer.
        unsafe { raw::by_value(fd.as_raw_fd(), libc::TUNSETPERSIST, 1) }.map(drop)
    }

    pub(super) fn set_mtu(socket: BorrowedFd<'_>, name: &str, mtu: c_int) -> Result<(), Errno> {
        let request = ifreq(name, libc::__c_anonymous_ifr_ifru { ifru_mtu: mtu })?;
        // SAFETY: the kernel reads one ifreq, which lives until after the call.
        unsafe { raw::siocsifmtu(socket.as_raw_fd(), &raw const request) }.map(drop)
    }

    pub(super) fn get_mac(socket: BorrowedFd<'_>, name: &str) -> Result<[u8; 6], Errno> {
        let mut request = ifreq(name, flags_field(0)?)?;
        // SAFETY: the kernel reads and writes one ifreq, which lives until after the call.
        unsafe { raw::siocgifhwaddr(socket.as_raw_fd(), &raw mut request) }?;
        // SAFETY: all bytes of the union were initialised, and any bits are a sockaddr.
        let address = unsafe { request.ifr_ifru.ifru_hwaddr };
        let mut mac = [0; 6];
        for (to, from) in mac.iter_mut().zip(address.sa_data) {
            *to = u8::from_ne_bytes(from.to_ne_bytes());
        }
        Ok(mac)
    }

    pub(super) fn set_up(socket: BorrowedFd<'_>, name: &str) -> Result<(), Errno> {
        let mut request = ifreq(name, flags_field(0)?)?;
        // SAFETY: the kernel reads and writes one ifreq, which lives until after the call.
        unsafe { raw::siocgifflags(socket.as_raw_fd(), &raw mut request) }?;
        request.ifr_ifru = flags_field(flags_of(&request) | libc::IFF_UP)?;
        // SAFETY: the kernel reads one ifreq, which lives until after the call.
        unsafe { raw::siocsifflags(socket.as_raw_fd(), &raw const request) }.map(drop)
    }

    fn address_field(address: Ipv4Addr) -> Result<libc::__c_anonymous_ifr_ifru, Errno> {
        let sa_family = u16::try_from(libc::AF_INET).map_err(|_| Errno::EAFNOSUPPORT)?;
        let mut sa_data: [libc::c_char; 14] = [0; 14];
        // A sockaddr_in: two bytes of port, then the address.
        for (to, from) in sa_data.iter_mut().skip(2).zip(address.octets()) {
            *to = libc::c_char::from_ne_bytes([from]);
        }
        let ifru_addr = libc::sockaddr { sa_family, sa_data };
        Ok(libc::__c_anonymous_ifr_ifru { ifru_addr })
    }

    pub(super) fn set_address(
        socket: BorrowedFd<'_>,
        name: &str,
        address: Ipv4Addr,
    ) -> Result<(), Errno> {
        let request = ifreq(name, address_field(address)?)?;
        // SAFETY: the kernel reads one ifreq, which lives until after the call.
        unsafe { raw::siocsifaddr(socket.as_raw_fd(), &raw const request) }.map(drop)
    }

    pub(super) fn set_netmask(
        socket: BorrowedFd<'_>,
        name: &str,
        mask: Ipv4Addr,
    ) -> Result<(), Errno> {
        let request = ifreq(name, address_field(mask)?)?;
        // SAFETY: the kernel reads one ifreq, which lives until after the call.
        unsafe { raw::siocsifnetmask(socket.as_raw_fd(), &raw const request) }.map(drop)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::net::hash::Hashing;

    #[test]
    fn names_are_checked_before_the_kernel_sees_them() {
        for name in ["", ".", "..", "a b", "a/b", "0123456789abcdef", "a\0b"] {
            assert!(
                matches!(Tap::open(name, 1), Err(TapError::Name { .. })),
                "{name:?}"
            );
        }
        assert!(check_name("0123456789abcde").is_ok());
        assert!(check_name("ring%d").is_ok());
    }

    #[test]
    fn errors_say_what_to_do() {
        let text = |queues, errno| open_error("tap7", queues, errno).to_string();
        assert!(text(1, Errno::EPERM).contains("mode tap user USER vnet_hdr)"));
        assert!(text(2, Errno::EPERM).contains("vnet_hdr multi_queue)"));
        assert!(text(1, Errno::EBUSY).contains("in use by another program"));
        assert!(text(2, Errno::EINVAL).contains("no TAP interface with multi_queue"));
    }

    /// A request that the kernel has refused is made again when it is asked for again.
    #[test]
    fn steering_that_has_failed_is_not_taken_for_done() {
        let (ours, _theirs) = std::os::unix::net::UnixDatagram::pair().unwrap();
        let queue = TapQueue::from_packet_fd(ours.into());
        let (tap, _queues) = Tap::with_queues("none".to_owned(), vec![queue]).unwrap();
        let rss = || Rss {
            hashing: Hashing::off(),
            table: vec![0],
            unclassified: 0,
            max_tx: 1,
        };
        for _ in 0..2 {
            assert!(matches!(
                tap.steer(Some(rss())),
                Err(TapError::Request { .. })
            ));
        }
        assert!(tap.steer(None).is_ok());
        assert_eq!(lock(&tap.members).rss, None);
    }

    #[test]
    fn descriptors_that_are_no_tap_are_refused() {
        use std::os::fd::IntoRawFd;
        let file = tempfile::tempfile().unwrap().into_raw_fd();
        assert!(matches!(Tap::inherit(&[file]), Err(TapError::NotATap { fd, .. }) if fd == file));
        assert!(matches!(
            Tap::inherit(&[999_999]),
            Err(TapError::NotATap { .. })
        ));
        assert!(matches!(Tap::inherit(&[]), Err(TapError::Request { .. })));
    }
}

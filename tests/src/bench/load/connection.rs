//! The connection to a back-end, whatever its device: negotiation, shared guest memory, and queues.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::Path;

use nix::sys::memfd::{MFdFlags, memfd_create};
use ringside_rings::{DriverLayout, DriverRing};
use vhost::vhost_user::message::{
    VhostUserConfigFlags, VhostUserHeaderFlag, VhostUserProtocolFeatures,
};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vm_memory::{FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::error::LoadError;

/// VIRTIO_F_INDIRECT_DESC (VIRTIO 1.3, 6)
pub(super) const INDIRECT_DESC: u64 = 1 << 28;
/// VIRTIO_F_EVENT_IDX (VIRTIO 1.3, 6)
pub(super) const EVENT_IDX: u64 = 1 << 29;
/// VHOST_USER_F_PROTOCOL_FEATURES (vhost-user, "Feature negotiation")
const PROTOCOL_FEATURES: u64 = 1 << 30;
/// VIRTIO_F_VERSION_1 (VIRTIO 1.3, 6)
pub(super) const VERSION_1: u64 = 1 << 32;
/// VIRTIO_F_RING_PACKED (VIRTIO 1.3, 6)
pub(super) const RING_PACKED: u64 = 1 << 34;
/// VIRTIO_F_IN_ORDER (VIRTIO 1.3, 6)
pub(super) const IN_ORDER: u64 = 1 << 35;

/// VHOST_USER_SET_VRING_BASE (vhost-user, "Front-end message types")
const SET_VRING_BASE: u32 = 10;
/// Version of the messages, without flags (vhost-user, "Header").
const MESSAGE_VERSION: u32 = 1;
/// Length of a vring state description (vhost-user, "A vring state description").
const STATE_LEN: u32 = 8;
/// Where a fresh packed ring stands: both indices at 0, both wrap counters at 1 (vhost-user, "VHOST_USER_SET_VRING_BASE").
const FRESH_PACKED: u32 = 0x8000_8000;

/// Buffers begin at multiples of this.
pub(super) const PAGE: u64 = 4096;
/// Guest memory is a multiple of this: a huge page.
const GRANULE: u64 = 2 << 20;

/// A queue that runs.
#[derive(Debug)]
pub(super) struct Started {
    pub(super) ring: DriverRing<u16>,
    pub(super) kick: EventFd,
    pub(super) call: EventFd,
}

/// A connection to a back-end.
pub(super) struct Connection {
    messages: Frontend,
    /// The same connection, for messages that the crate has no room for.
    raw: UnixStream,
    /// The virtio features in use.
    pub(super) features: u64,
    protocol: VhostUserProtocolFeatures,
}

/// Says which message an error is about.
fn message<T>(name: &'static str, result: vhost::Result<T>) -> Result<T, LoadError> {
    result.map_err(|source| LoadError::Message {
        message: name,
        source,
    })
}

/// Hands out guest memory, upwards from 0.
#[derive(Debug, Default)]
pub(super) struct Room(u64);

impl Room {
    /// Where the next piece begins.
    pub(super) fn next(&self) -> GuestAddress {
        GuestAddress(self.0)
    }

    pub(super) fn take(&mut self, len: u64) -> GuestAddress {
        let start = self.0;
        self.0 = start.saturating_add(len).next_multiple_of(PAGE);
        GuestAddress(start)
    }

    /// Bytes of memory that hold all of it.
    pub(super) fn size(&self) -> u64 {
        self.0.next_multiple_of(GRANULE)
    }
}

impl Connection {
    /// Connects, and agrees on what is `wanted` of the features that the back-end offers; each of `asked` is wanted too,
    /// and it is an error if that option's feature is not offered.
    pub(super) fn open(
        path: &Path,
        queues: u16,
        wanted: u64,
        asked: &[(bool, &'static str, u64)],
    ) -> Result<Self, LoadError> {
        let stream = UnixStream::connect(path).map_err(|source| LoadError::Connect {
            path: path.to_owned(),
            source,
        })?;
        let raw = stream.try_clone().map_err(|source| LoadError::Io {
            doing: "share the connection",
            source,
        })?;
        let mut messages = Frontend::from_stream(stream, u64::from(queues).max(2));
        message("SET_OWNER", messages.set_owner())?;
        let offered = message("GET_FEATURES", messages.get_features())?;
        let mut wanted = wanted | VERSION_1 | PROTOCOL_FEATURES;
        for (asked, option, feature) in asked {
            if *asked {
                wanted |= feature;
                if offered & feature == 0 {
                    let text = format!("{option}: the back-end does not offer that");
                    return Err(LoadError::Option(text));
                }
            }
        }
        let features = offered & wanted;
        if features & VERSION_1 == 0 {
            return Err(LoadError::Option(
                "the back-end does not offer VIRTIO_F_VERSION_1: it is a legacy device".into(),
            ));
        }
        let mut protocol = VhostUserProtocolFeatures::empty();
        if features & PROTOCOL_FEATURES != 0 {
            let offered = message("GET_PROTOCOL_FEATURES", messages.get_protocol_features())?;
            protocol = offered
                & (VhostUserProtocolFeatures::MQ
                    | VhostUserProtocolFeatures::REPLY_ACK
                    | VhostUserProtocolFeatures::CONFIG);
            let set = messages.set_protocol_features(protocol);
            message("SET_PROTOCOL_FEATURES", set)?;
            if protocol.contains(VhostUserProtocolFeatures::REPLY_ACK) {
                messages.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
            }
        }
        message("SET_FEATURES", messages.set_features(features))?;
        Ok(Self {
            messages,
            raw,
            features,
            protocol,
        })
    }

    /// The first bytes of the configuration space; `None` if the back-end does not show it.
    pub(super) fn config(&mut self, len: u32) -> Result<Option<Vec<u8>>, LoadError> {
        if !self.protocol.contains(VhostUserProtocolFeatures::CONFIG) {
            return Ok(None);
        }
        let room = vec![0; usize::try_from(len).unwrap_or_default()];
        let flags = VhostUserConfigFlags::empty();
        let config = self.messages.get_config(0, len, flags, &room);
        message("GET_CONFIG", config).map(|(_, bytes)| Some(bytes))
    }

    /// How many queues the back-end has, if it says so.
    pub(super) fn queues(&mut self) -> Result<Option<u64>, LoadError> {
        if !self.protocol.contains(VhostUserProtocolFeatures::MQ) {
            return Ok(None);
        }
        message("GET_QUEUE_NUM", self.messages.get_queue_num()).map(Some)
    }

    /// Makes guest memory with room for all that was handed out, and shares it with the back-end.
    pub(super) fn share(&mut self, room: &Room, huge: bool) -> Result<GuestMemoryMmap, LoadError> {
        let (file, memory) = guest_memory(room.size(), huge)?;
        let region = VhostUserMemoryRegionInfo {
            guest_phys_addr: 0,
            memory_size: room.size(),
            userspace_addr: host(&memory, GuestAddress(0))?,
            mmap_offset: 0,
            mmap_handle: file.as_raw_fd(),
        };
        message("SET_MEM_TABLE", self.messages.set_mem_table(&[region]))?;
        Ok(memory)
    }

    /// Starts a queue.
    pub(super) fn start(
        &mut self,
        index: usize,
        layout: DriverLayout,
        memory: &GuestMemoryMmap,
    ) -> Result<Started, LoadError> {
        let features = self.features;
        let ring = DriverRing::new(layout, features & EVENT_IDX != 0, memory)?;
        let eventfd = |flags| {
            EventFd::new(flags).map_err(|source| LoadError::Io {
                doing: "make an eventfd",
                source,
            })
        };
        // Several of the latter are waited for together, of which not each has fired then.
        let (kick, call) = (eventfd(EFD_CLOEXEC)?, eventfd(EFD_CLOEXEC | EFD_NONBLOCK)?);
        let addresses = VringConfigData {
            queue_max_size: layout.size(),
            queue_size: layout.size(),
            flags: 0,
            desc_table_addr: host(memory, layout.desc_table())?,
            used_ring_addr: host(memory, layout.used_ring())?,
            avail_ring_addr: host(memory, layout.avail_ring())?,
            log_addr: None,
        };
        let messages = &mut self.messages;
        let size = layout.size();
        message("SET_VRING_NUM", messages.set_vring_num(index, size))?;
        if features & RING_PACKED != 0 {
            set_packed_base(&self.raw, index).map_err(|source| LoadError::Io {
                doing: "send SET_VRING_BASE",
                source,
            })?;
        } else {
            message("SET_VRING_BASE", messages.set_vring_base(index, 0))?;
        }
        message("SET_VRING_ADDR", messages.set_vring_addr(index, &addresses))?;
        message("SET_VRING_CALL", messages.set_vring_call(index, &call))?;
        message("SET_VRING_KICK", messages.set_vring_kick(index, &kick))?;
        if features & PROTOCOL_FEATURES != 0 {
            let enabled = messages.set_vring_enable(index, true);
            message("SET_VRING_ENABLE", enabled)?;
        }
        Ok(Started { ring, kick, call })
    }

    /// Takes the first queues back, which the back-end may have used up to now, and leaves.
    pub(super) fn leave(self, queues: usize) {
        for index in 0..queues {
            // A back-end that is gone needs no goodbye.
            let _ = self.messages.get_vring_base(index);
        }
    }
}

/// Where guest memory lies here: a pointer that is handed to the back-end as a number.
fn host(memory: &GuestMemoryMmap, addr: GuestAddress) -> Result<u64, LoadError> {
    let address = memory.get_host_address(addr);
    let address = address.map_err(|_| LoadError::Access { addr: addr.0 })?;
    u64::try_from(address.addr()).map_err(|_| LoadError::Access { addr: addr.0 })
}

/// Says where a packed ring begins: that is 32 bits, for which the `vhost` crate has no room. No reply is asked for.
fn set_packed_base(mut connection: &UnixStream, index: usize) -> io::Result<()> {
    let index = u32::try_from(index).map_err(io::Error::other)?;
    let words = [
        SET_VRING_BASE,
        MESSAGE_VERSION,
        STATE_LEN,
        index,
        FRESH_PACKED,
    ];
    connection.write_all(words.map(u32::to_ne_bytes).as_flattened())
}

/// What waits for eventfds, or other files. Some back-ends set O_NONBLOCK on those they are given: a plain read would not wait.
pub(super) fn waiting_for(calls: &[&dyn AsRawFd]) -> Result<Epoll, LoadError> {
    let wait = || {
        let epoll = Epoll::new()?;
        for call in calls {
            let event = EpollEvent::new(EventSet::IN, 0);
            epoll.ctl(ControlOperation::Add, call.as_raw_fd(), event)?;
        }
        Ok(epoll)
    };
    wait().map_err(|source| LoadError::Io {
        doing: "wait for an eventfd",
        source,
    })
}

/// Memory that both sides map: one region from guest-physical address 0 on.
pub(super) fn guest_memory(size: u64, huge: bool) -> Result<(File, GuestMemoryMmap), LoadError> {
    let failed = |source: io::Error| LoadError::Memory { size, source };
    let mut flags = MFdFlags::MFD_CLOEXEC;
    if huge {
        flags |= MFdFlags::MFD_HUGETLB;
    }
    let file = File::from(memfd_create(c"guest", flags).map_err(|e| failed(e.into()))?);
    file.set_len(size).map_err(failed)?;
    let len = usize::try_from(size).map_err(|e| failed(io::Error::other(e)))?;
    let mapped = file.try_clone().map_err(failed)?;
    let range = (GuestAddress(0), len, Some(FileOffset::new(mapped, 0)));
    let memory = GuestMemoryMmap::from_ranges_with_files([range])
        .map_err(|e| failed(io::Error::other(e)))?;
    Ok((file, memory))
}

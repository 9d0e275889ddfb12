//! The connection to the back-end, guest memory, and the rings in it.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;

use nix::sys::memfd::{MFdFlags, memfd_create};
use ringside_rings::{DriverLayout, DriverRing};
use vhost::vhost_user::message::{
    VhostUserConfigFlags, VhostUserHeaderFlag, VhostUserProtocolFeatures,
};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vm_memory::{FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EventFd};

use super::Job;
use super::error::LoadError;
use super::lane::Lane;
use super::options::LoadArgs;

/// VIRTIO_F_INDIRECT_DESC (VIRTIO 1.3, 6)
pub(super) const INDIRECT_DESC: u64 = 1 << 28;
/// VIRTIO_F_EVENT_IDX (VIRTIO 1.3, 6)
pub(super) const EVENT_IDX: u64 = 1 << 29;
/// VIRTIO_F_RING_PACKED (VIRTIO 1.3, 6)
pub(super) const RING_PACKED: u64 = 1 << 34;
/// VIRTIO_F_IN_ORDER (VIRTIO 1.3, 6)
const IN_ORDER: u64 = 1 << 35;
/// VHOST_USER_F_PROTOCOL_FEATURES (vhost-user, "Feature negotiation")
const PROTOCOL_FEATURES: u64 = 1 << 30;
/// VIRTIO_F_VERSION_1 (VIRTIO 1.3, 6)
pub(super) const VERSION_1: u64 = 1 << 32;
/// VIRTIO_BLK_F_FLUSH (VIRTIO 1.3, 5.2.3): without it, each write has to be durable
pub(super) const FLUSH: u64 = 1 << 9;
/// VIRTIO_BLK_F_MQ (VIRTIO 1.3, 5.2.3)
pub(super) const MQ: u64 = 1 << 12;

/// VHOST_USER_SET_VRING_BASE (vhost-user, "Front-end message types")
const SET_VRING_BASE: u32 = 10;
/// Version of the messages, without flags (vhost-user, "Header").
const MESSAGE_VERSION: u32 = 1;
/// Length of a vring state description (vhost-user, "A vring state description").
const STATE_LEN: u32 = 8;
/// Where a fresh packed ring stands: both indices at 0, both wrap counters at 1 (vhost-user, "VHOST_USER_SET_VRING_BASE").
const FRESH_PACKED: u32 = 0x8000_8000;

/// Bytes of the configuration space that are read: those up to `num_queues` (VIRTIO 1.3, 5.2.4).
const CONFIG_LEN: u32 = 36;
/// Sectors of the disk's size (VIRTIO 1.3, 5.2.4).
const SECTOR: u64 = 512;
/// Descriptors of a request: header, data, status.
pub(super) const DESCRIPTORS: u16 = 3;
/// Distance of the headers of two requests: each has a cache line of its own, with the status behind it.
pub(super) const HEADER_STRIDE: u64 = 64;
/// Buffers begin at multiples of this.
const PAGE: u64 = 4096;
/// Guest memory is a multiple of this: a huge page.
const GRANULE: u64 = 2 << 20;

/// One virtqueue with its eventfds, and where its requests lie.
#[derive(Debug)]
pub(super) struct Queue {
    pub(super) ring: DriverRing<u16>,
    pub(super) kick: EventFd,
    pub(super) call: EventFd,
    /// Waits for `call`.
    pub(super) interrupts: Epoll,
    /// The first request's header; the others follow each [`HEADER_STRIDE`].
    pub(super) headers: GuestAddress,
    /// The first request's data; the others follow.
    pub(super) data: GuestAddress,
    pub(super) indirect: bool,
}

/// A connected front-end whose queues run.
pub(super) struct FrontEnd {
    messages: Frontend,
    pub(super) memory: GuestMemoryMmap,
    pub(super) queues: Vec<Queue>,
    /// The virtio features in use.
    pub(super) features: u64,
    /// Size of the disk in bytes.
    pub(super) capacity: u64,
}

/// Says which message an error is about.
fn message<T>(name: &'static str, result: vhost::Result<T>) -> Result<T, LoadError> {
    result.map_err(|source| LoadError::Message {
        message: name,
        source,
    })
}

/// Hands out guest memory, upwards from 0.
struct Room(u64);

impl Room {
    fn take(&mut self, len: u64) -> GuestAddress {
        let start = self.0;
        self.0 = start.saturating_add(len).next_multiple_of(PAGE);
        GuestAddress(start)
    }
}

/// Where everything of one queue lies.
struct Place {
    layout: DriverLayout,
    headers: GuestAddress,
    data: GuestAddress,
}

impl FrontEnd {
    /// Connects to the back-end, and starts the queues.
    pub(super) fn connect(args: &LoadArgs) -> Result<Self, LoadError> {
        let stream =
            UnixStream::connect(&args.socket_path).map_err(|source| LoadError::Connect {
                path: args.socket_path.clone(),
                source,
            })?;
        let raw = stream.try_clone().map_err(|source| LoadError::Io {
            doing: "share the connection",
            source,
        })?;
        let mut messages = Frontend::from_stream(stream, u64::from(args.queues).max(2));
        let (features, protocol) = negotiate(&mut messages, args)?;
        let capacity = capacity(&mut messages, protocol)?;
        if protocol.contains(VhostUserProtocolFeatures::MQ) {
            let offered = message("GET_QUEUE_NUM", messages.get_queue_num())?;
            if offered < u64::from(args.queues) {
                return Err(LoadError::Option(format!(
                    "--queues {}: the back-end has {offered}",
                    args.queues
                )));
            }
        }

        let mut room = Room(0);
        let places = (0..args.queues)
            .map(|_| place(args, features, &mut room))
            .collect::<Result<Vec<_>, _>>()?;
        let size = room.0.next_multiple_of(GRANULE);
        let (file, memory) = guest_memory(size, args.huge_pages)?;
        let host = |addr: GuestAddress| {
            let address = memory.get_host_address(addr);
            let address = address.map_err(|_| LoadError::Access { addr: addr.0 })?;
            // A pointer that is handed to the back-end as a number.
            u64::try_from(address.addr()).map_err(|_| LoadError::Access { addr: addr.0 })
        };
        let region = VhostUserMemoryRegionInfo {
            guest_phys_addr: 0,
            memory_size: size,
            userspace_addr: host(GuestAddress(0))?,
            mmap_offset: 0,
            mmap_handle: file.as_raw_fd(),
        };
        message("SET_MEM_TABLE", messages.set_mem_table(&[region]))?;

        let mut queues = Vec::new();
        for (index, place) in places.into_iter().enumerate() {
            let layout = place.layout;
            let ring = DriverRing::new(layout, features & EVENT_IDX != 0, &memory)?;
            let eventfd = || {
                EventFd::new(EFD_CLOEXEC).map_err(|source| LoadError::Io {
                    doing: "make an eventfd",
                    source,
                })
            };
            let (kick, call) = (eventfd()?, eventfd()?);
            let interrupts = waiting_for(&call).map_err(|source| LoadError::Io {
                doing: "wait for an eventfd",
                source,
            })?;
            let addresses = VringConfigData {
                queue_max_size: layout.size(),
                queue_size: layout.size(),
                flags: 0,
                desc_table_addr: host(layout.desc_table())?,
                used_ring_addr: host(layout.used_ring())?,
                avail_ring_addr: host(layout.avail_ring())?,
                log_addr: None,
            };
            let size = layout.size();
            message("SET_VRING_NUM", messages.set_vring_num(index, size))?;
            if features & RING_PACKED != 0 {
                set_packed_base(&raw, index).map_err(|source| LoadError::Io {
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
            queues.push(Queue {
                ring,
                kick,
                call,
                interrupts,
                headers: place.headers,
                data: place.data,
                indirect: features & INDIRECT_DESC != 0,
            });
        }
        Ok(Self {
            messages,
            memory,
            queues,
            features,
            capacity,
        })
    }

    /// The load of each queue.
    pub(super) fn jobs<'a>(&'a mut self, args: &'a LoadArgs) -> Result<Vec<Job<'a>>, LoadError> {
        let ranges = args.ranges(self.capacity)?;
        let memory = &self.memory;
        let job = |(index, (queue, range)): (usize, (&'a mut Queue, _))| -> Job<'a> {
            Box::new(move |phase, ready| {
                let lane = args
                    .pin(index)
                    .and_then(|()| Lane::new(args, index, memory, queue, range));
                // The others wait for this one, whatever became of it.
                ready.wait();
                lane?.run(phase)
            })
        };
        Ok(self
            .queues
            .iter_mut()
            .zip(ranges)
            .enumerate()
            .map(job)
            .collect())
    }

    /// Takes the rings back, which the back-end may have used up to now, and leaves.
    pub(super) fn leave(self) {
        for index in 0..self.queues.len() {
            // A back-end that is gone needs no goodbye.
            let _ = self.messages.get_vring_base(index);
        }
    }
}

fn negotiate(
    messages: &mut Frontend,
    args: &LoadArgs,
) -> Result<(u64, VhostUserProtocolFeatures), LoadError> {
    message("SET_OWNER", messages.set_owner())?;
    let offered = message("GET_FEATURES", messages.get_features())?;
    let mut wanted = VERSION_1 | PROTOCOL_FEATURES | FLUSH | MQ | EVENT_IDX | INDIRECT_DESC;
    if args.no_event_idx {
        wanted &= !EVENT_IDX;
    }
    if args.no_indirect {
        wanted &= !INDIRECT_DESC;
    }
    for (asked, option, feature) in [
        (args.packed, "--packed", RING_PACKED),
        (args.in_order, "--in-order", IN_ORDER),
    ] {
        if asked {
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
    Ok((features, protocol))
}

/// The disk's size in bytes.
fn capacity(
    messages: &mut Frontend,
    protocol: VhostUserProtocolFeatures,
) -> Result<u64, LoadError> {
    if !protocol.contains(VhostUserProtocolFeatures::CONFIG) {
        return Err(LoadError::Option(
            "the back-end does not offer VHOST_USER_PROTOCOL_F_CONFIG: the size of its disk cannot be read"
                .into(),
        ));
    }
    let room = [0; CONFIG_LEN as usize];
    let config = messages.get_config(0, CONFIG_LEN, VhostUserConfigFlags::empty(), &room);
    let (_, bytes) = message("GET_CONFIG", config)?;
    let sectors = bytes
        .first_chunk::<8>()
        .map(|bytes| u64::from_le_bytes(*bytes));
    sectors
        .and_then(|sectors| sectors.checked_mul(SECTOR))
        .ok_or_else(|| LoadError::Option("the back-end's disk has an impossible size".into()))
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

/// What waits for an eventfd. Some back-ends set O_NONBLOCK on those they are given: a plain read would not wait.
fn waiting_for(call: &EventFd) -> io::Result<Epoll> {
    let epoll = Epoll::new()?;
    let event = EpollEvent::new(EventSet::IN, 0);
    epoll.ctl(ControlOperation::Add, call.as_raw_fd(), event)?;
    Ok(epoll)
}

/// Lays out one queue.
fn place(args: &LoadArgs, features: u64, room: &mut Room) -> Result<Place, LoadError> {
    let (per_request, entries) = if features & INDIRECT_DESC != 0 {
        (1, DESCRIPTORS)
    } else {
        (DESCRIPTORS, 0)
    };
    let size = args.entries(per_request)?;
    let base = GuestAddress(room.0);
    let layout = if args.packed {
        DriverLayout::packed(base, size, entries)?
    } else {
        DriverLayout::new(base, size, entries)?
    };
    let layout = if args.in_order {
        layout.in_order()
    } else {
        layout
    };
    room.take(layout.end().0.saturating_sub(base.0));
    let depth = u64::from(args.depth);
    let stride = u64::from(args.block()?).next_multiple_of(PAGE);
    Ok(Place {
        layout,
        headers: room.take(depth.saturating_mul(HEADER_STRIDE)),
        data: room.take(depth.saturating_mul(stride)),
    })
}

/// Where the data of a request of this slot lies, from the first one's on.
pub(super) fn data_offset(slot: u16, block: u32) -> u64 {
    u64::from(slot).saturating_mul(u64::from(block).next_multiple_of(PAGE))
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

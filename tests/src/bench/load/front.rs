//! The queues of a disk: where their requests lie, and their threads.

use ringside_rings::{DriverLayout, DriverRing};
use vm_memory::{GuestAddress, GuestMemoryMmap};
use vmm_sys_util::epoll::Epoll;
use vmm_sys_util::eventfd::EventFd;

use super::Job;
use super::connection::{
    Connection, EVENT_IDX, IN_ORDER, INDIRECT_DESC, PAGE, RING_PACKED, Room, Started, waiting_for,
};
use super::error::LoadError;
use super::lane::Lane;
use super::options::LoadArgs;

/// VIRTIO_BLK_F_FLUSH (VIRTIO 1.3, 5.2.3): without it, each write has to be durable
pub(super) const FLUSH: u64 = 1 << 9;
/// VIRTIO_BLK_F_MQ (VIRTIO 1.3, 5.2.3)
pub(super) const MQ: u64 = 1 << 12;

/// Bytes of the configuration space that are read: those up to `num_queues` (VIRTIO 1.3, 5.2.4).
const CONFIG_LEN: u32 = 36;
/// Sectors of the disk's size (VIRTIO 1.3, 5.2.4).
const SECTOR: u64 = 512;
/// Descriptors of a request: header, data, status.
pub(super) const DESCRIPTORS: u16 = 3;
/// Distance of the headers of two requests: each has a cache line of its own, with the status behind it.
pub(super) const HEADER_STRIDE: u64 = 64;

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
    connection: Connection,
    pub(super) memory: GuestMemoryMmap,
    pub(super) queues: Vec<Queue>,
    /// The virtio features in use.
    pub(super) features: u64,
    /// Size of the disk in bytes.
    pub(super) capacity: u64,
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
        let mut wanted = FLUSH | MQ | EVENT_IDX | INDIRECT_DESC;
        if args.no_event_idx {
            wanted &= !EVENT_IDX;
        }
        if args.no_indirect {
            wanted &= !INDIRECT_DESC;
        }
        let asked = [
            (args.packed, "--packed", RING_PACKED),
            (args.in_order, "--in-order", IN_ORDER),
        ];
        let mut connection = Connection::open(&args.socket_path, args.queues, wanted, &asked)?;
        let capacity = capacity(&mut connection)?;
        if let Some(offered) = connection.queues()?
            && offered < u64::from(args.queues)
        {
            return Err(LoadError::Option(format!(
                "--queues {}: the back-end has {offered}",
                args.queues
            )));
        }
        let features = connection.features;
        let mut room = Room::default();
        let places = (0..args.queues)
            .map(|_| place(args, features, &mut room))
            .collect::<Result<Vec<_>, _>>()?;
        let memory = connection.share(&room, args.huge_pages)?;
        let mut queues = Vec::new();
        for (index, place) in places.into_iter().enumerate() {
            let Started { ring, kick, call } = connection.start(index, place.layout, &memory)?;
            queues.push(Queue {
                ring,
                kick,
                interrupts: waiting_for(&[&call])?,
                call,
                headers: place.headers,
                data: place.data,
                indirect: features & INDIRECT_DESC != 0,
            });
        }
        Ok(Self {
            connection,
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
        self.connection.leave(self.queues.len());
    }
}

/// The disk's size in bytes.
fn capacity(connection: &mut Connection) -> Result<u64, LoadError> {
    let Some(bytes) = connection.config(CONFIG_LEN)? else {
        return Err(LoadError::Option(
            "the back-end does not offer VHOST_USER_PROTOCOL_F_CONFIG: the size of its disk cannot be read"
                .into(),
        ));
    };
    let sectors = bytes
        .first_chunk::<8>()
        .map(|bytes| u64::from_le_bytes(*bytes));
    sectors
        .and_then(|sectors| sectors.checked_mul(SECTOR))
        .ok_or_else(|| LoadError::Option("the back-end's disk has an impossible size".into()))
}

/// Lays out one queue.
fn place(args: &LoadArgs, features: u64, room: &mut Room) -> Result<Place, LoadError> {
    let (per_request, entries) = if features & INDIRECT_DESC != 0 {
        (1, DESCRIPTORS)
    } else {
        (DESCRIPTORS, 0)
    };
    let size = args.entries(per_request)?;
    let base = room.next();
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

//! What can be wrong with a virtqueue, and with one descriptor chain on it.

use std::fmt;

use thiserror::Error;
use vm_memory::{GuestMemoryError, VolatileMemoryError};

/// One of the areas that a virtqueue consists of (VIRTIO 1.3, 2.7 and 2.8).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Area {
    /// The descriptor table (VIRTIO 1.3, 2.7.5), or the descriptor ring of a packed virtqueue (2.8).
    Descriptors,
    /// The available ring, written by the driver (VIRTIO 1.3, 2.7.6).
    Available,
    /// The used ring, written by the device (VIRTIO 1.3, 2.7.8).
    Used,
    /// The driver event suppression structure of a packed virtqueue (VIRTIO 1.3, 2.8.10).
    DriverEvent,
    /// The device event suppression structure of a packed virtqueue (VIRTIO 1.3, 2.8.10).
    DeviceEvent,
    /// A driver's indirect descriptor tables (VIRTIO 1.3, 2.7.5.3).
    IndirectTables,
    /// What a device side notes about chains in flight (vhost-user, "Inflight I/O tracking").
    Inflight,
}

impl fmt::Display for Area {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Descriptors => "descriptor area",
            Self::Available => "available ring",
            Self::Used => "used ring",
            Self::DriverEvent => "driver event suppression structure",
            Self::DeviceEvent => "device event suppression structure",
            Self::IndirectTables => "indirect tables",
            Self::Inflight => "notes about chains in flight",
        })
    }
}

/// The virtqueue as a whole cannot be used any further.
///
/// The device is to stop this queue and tell the driver (DEVICE_NEEDS_RESET, VIRTIO 1.3, 2.1.2, or
/// the vhost-user error eventfd); other queues are not affected.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum RingError {
    /// The size is not a power of two in 1..=32768 (VIRTIO 1.3, 2.7).
    #[error("queue size {size} is not a power of two between 1 and 32768")]
    Size {
        /// The size asked for, in descriptors.
        size: u16,
    },
    /// The size of a packed virtqueue is not in 1..=32768 (VIRTIO 1.3, 2.8).
    #[error("queue size {size} is not between 1 and 32768")]
    PackedSize {
        /// The size asked for, in descriptors.
        size: u16,
    },
    /// An index of a packed virtqueue, as the transport hands it over, leads out of the ring.
    #[error("ring index {index:#x} stands for no descriptor, the queue has {size}")]
    Index {
        /// The place in the ring, with the wrap counter in bit 15.
        index: u16,
        /// The size of the queue.
        size: u16,
    },
    /// An area does not start at the alignment that VIRTIO 1.3, 2.7 and 2.8.10.1 demand.
    #[error("{area} at {addr:#x} is not aligned to {align} bytes")]
    Misaligned {
        /// The area at fault.
        area: Area,
        /// Where it starts: guest-physical, or as mapped into this process.
        addr: u64,
        /// The alignment it must have, in bytes.
        align: u64,
    },
    /// An area does not lie wholly inside guest memory.
    #[error("{area} at {addr:#x}, {len} bytes, does not lie in guest memory")]
    NotInMemory {
        /// The area at fault.
        area: Area,
        /// Guest-physical start of the area.
        addr: u64,
        /// Its length in bytes.
        len: usize,
        /// What guest memory said, if it said more than "no".
        #[source]
        source: Option<GuestMemoryError>,
    },
    /// An area lies across two memory regions that are mapped apart.
    #[error("{area} at {addr:#x}, {len} bytes, lies across the border of two memory regions")]
    Split {
        /// The area at fault.
        area: Area,
        /// Guest-physical start of the area.
        addr: u64,
        /// Its length in bytes.
        len: usize,
    },
    /// An area shares bytes with another one, and the device writes at least one of them.
    #[error("the {area} overlaps the {with}")]
    Overlap {
        /// The area at fault.
        area: Area,
        /// The area it overlaps.
        with: Area,
    },
    /// The driver's available index claims more chains than the queue has room for.
    #[error(
        "available index {avail_idx} is {waiting} chains ahead of {next_avail}, and only {room} can be outstanding"
    )]
    AvailIndex {
        /// The index that the driver wrote.
        avail_idx: u16,
        /// The index up to which the device has taken chains.
        next_avail: u16,
        /// How many chains the driver claims to have added since.
        waiting: u16,
        /// How many it can have added at most.
        room: u16,
    },
    /// The driver made more descriptors of a packed virtqueue available than it can have.
    #[error(
        "the chain at descriptor {at} does not end within {room} descriptors, and no more can be available"
    )]
    AvailDescriptor {
        /// The number of the chain's first descriptor.
        at: u16,
        /// How many descriptors the driver can have made available at most.
        room: u16,
    },
    /// An available ring element names a descriptor that does not exist.
    #[error("available ring names descriptor {head}, the queue has {size}")]
    Head {
        /// The number of the head descriptor.
        head: u16,
        /// The size of the queue.
        size: u16,
    },
    /// The driver made a chain available again that the device still works on.
    #[error("descriptor chain {head} was made available while it is in flight")]
    HeadInFlight {
        /// The number of the head descriptor, or the buffer id.
        head: u16,
    },
    /// The device tried to return a chain that it does not hold.
    #[error("descriptor chain {head} is not in flight and cannot be returned")]
    HeadNotInFlight {
        /// The number of the head descriptor, or the buffer id.
        head: u16,
    },
    /// The notes about chains in flight are not those of a device side that served this queue.
    #[error("the notes about chains in flight make no sense: {why}")]
    Inflight {
        /// What is wrong with them.
        why: &'static str,
    },
    /// The notes about chains in flight are for smaller queues.
    #[error(
        "the notes about chains in flight have {entries} entries, too few for a queue of {size}"
    )]
    InflightSize {
        /// How many descriptors can be noted.
        entries: u16,
        /// The size of the queue.
        size: u16,
    },
    /// An access inside an area failed, although the area was checked.
    #[error("access to the {area} at offset {offset} failed")]
    Access {
        /// The area.
        area: Area,
        /// Offset of the access in bytes.
        offset: usize,
        /// What the memory said.
        #[source]
        source: VolatileMemoryError,
    },
}

/// One descriptor chain is malformed; the queue as such is not.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ChainError {
    /// More descriptors than the queue size, or a loop (VIRTIO 1.3, 2.7.5.2, 2.7.5.3.1).
    #[error("the chain has more than {limit} descriptors, or loops")]
    TooLong {
        /// The most descriptors a chain can have here.
        limit: usize,
    },
    /// All buffers together exceed 2^32 bytes (VIRTIO 1.3, 2.7.5.2).
    #[error("the buffers of the chain exceed 2^32 bytes in total")]
    TooManyBytes,
    /// `next` leads out of the descriptor table (VIRTIO 1.3, 2.7.5).
    #[error("descriptor {next} follows in the chain, its table has {entries}")]
    Next {
        /// The number of the descriptor that was to follow.
        next: u16,
        /// How many descriptors the table has.
        entries: u16,
    },
    /// A buffer of no bytes.
    #[error("a descriptor at guest address {addr:#x} has length 0")]
    Empty {
        /// Guest-physical address in the descriptor.
        addr: u64,
    },
    /// A buffer that does not lie in guest memory, or whose end overflows.
    #[error("the buffer at guest address {addr:#x}, {len} bytes, does not lie in guest memory")]
    NotInMemory {
        /// Guest-physical address in the descriptor.
        addr: u64,
        /// Length in the descriptor, in bytes.
        len: u32,
    },
    /// A device-readable buffer after a device-writable one (VIRTIO 1.3, 2.7.4.2).
    #[error("a device-readable descriptor follows a device-writable one")]
    ReadableAfterWritable,
    /// An indirect descriptor although VIRTIO_F_INDIRECT_DESC was not negotiated (VIRTIO 1.3, 2.7.5.3.1).
    #[error("an indirect descriptor was used without VIRTIO_F_INDIRECT_DESC")]
    IndirectNotNegotiated,
    /// An indirect descriptor behind direct ones of the same chain, on a packed virtqueue (VIRTIO 1.3, 2.8.5).
    #[error("an indirect descriptor follows direct ones in its chain")]
    IndirectMixed,
    /// An indirect descriptor inside an indirect table (VIRTIO 1.3, 2.7.5.3.1).
    #[error("an indirect table holds an indirect descriptor")]
    IndirectNested,
    /// An indirect descriptor with a successor (VIRTIO 1.3, 2.7.5.3.1).
    #[error("an indirect descriptor has VIRTQ_DESC_F_NEXT set")]
    IndirectNext,
    /// An indirect table of no, of a fraction of, or of too many descriptors.
    #[error("an indirect table of {len} bytes is not 1 to {limit} descriptors of 16 bytes")]
    IndirectLength {
        /// Length in the descriptor, in bytes.
        len: u32,
        /// The most descriptors a table can have here.
        limit: u16,
    },
    /// An indirect table that could not be read from guest memory.
    #[error("the indirect table at guest address {addr:#x} cannot be read")]
    IndirectRead {
        /// Guest-physical address of the table.
        addr: u64,
        /// What guest memory said.
        #[source]
        source: GuestMemoryError,
    },
    /// An access inside an indirect table failed, although the table was checked.
    #[error("access to descriptor {index} of an indirect table failed")]
    IndirectAccess {
        /// The number of the descriptor in its table.
        index: u16,
        /// What the memory said.
        #[source]
        source: VolatileMemoryError,
    },
}

/// Why no chain could be taken from the ring.
#[derive(Debug, Error)]
pub enum PopError {
    /// The queue is broken: stop it.
    #[error("the virtqueue is broken")]
    Ring(#[from] RingError),
    /// This chain only is malformed. It is in flight: return it with `push_used(head, 0)`, or stop the queue.
    #[error("descriptor chain {head} is malformed")]
    Chain {
        /// Its head or buffer id, to return it by.
        head: u16,
        /// What is wrong with it.
        #[source]
        error: ChainError,
    },
}

/// A copy from or to the buffers of a chain failed.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum SegmentError {
    /// The buffers are too short for the range asked for.
    #[error("bytes {offset}..{offset}+{len} were wanted from buffers of {available} bytes")]
    TooShort {
        /// Offset of the first byte wanted.
        offset: u64,
        /// Number of bytes wanted.
        len: usize,
        /// Number of bytes there are.
        available: u64,
    },
    /// Guest memory went away under a buffer that had been checked.
    #[error("guest memory at {addr:#x} cannot be accessed")]
    Memory {
        /// Guest-physical address of the access.
        addr: u64,
        /// What guest memory said.
        #[source]
        source: GuestMemoryError,
    },
}

/// The driver side was used wrongly, or met a device that misbehaves.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum DriverError {
    /// The ring's areas cannot be used.
    #[error("the virtqueue cannot be used")]
    Ring(#[from] RingError),
    /// The areas would reach past the end of the address space.
    #[error("a virtqueue of {size} descriptors at {base:#x} does not fit the address space")]
    Layout {
        /// Guest-physical start of the areas.
        base: u64,
        /// Queue size in descriptors.
        size: u16,
    },
    /// A chain needs at least one segment, and none may be empty.
    #[error("a chain needs segments, and each of them at least one byte")]
    Empty,
    /// More segments than one chain can have here.
    #[error("a chain of {segments} segments was to be added, at most {limit} are possible")]
    TooLong {
        /// Number of segments asked for.
        segments: usize,
        /// The most a chain can have.
        limit: u16,
    },
    /// All segments together exceed 2^32 bytes (VIRTIO 1.3, 2.7.5.2).
    #[error("the segments of a chain exceed 2^32 bytes in total")]
    TooManyBytes,
    /// Too few free descriptors: collect used chains first.
    #[error("{needed} descriptors are needed, {free} are free")]
    Full {
        /// Descriptors that the chain takes.
        needed: u16,
        /// Descriptors that are free.
        free: u16,
    },
    /// The device's used index claims more chains than it was given.
    #[error(
        "used index {used_idx} is {returned} chains ahead of {last_used}, and the device has {held}"
    )]
    UsedIndex {
        /// The index that the device wrote.
        used_idx: u16,
        /// The index up to which the driver has collected chains.
        last_used: u16,
        /// How many chains the device claims to have returned since.
        returned: u16,
        /// How many it has at most.
        held: u16,
    },
    /// The device returned a chain that it was not given.
    #[error("the device returned chain {id}, which it was not given")]
    UsedId {
        /// `id` of the used element, or the buffer id.
        id: u32,
    },
    /// The device claims to have written more than the chain has room for (VIRTIO 1.3, 2.7.8.2).
    #[error("the device wrote {len} bytes into chain {head}, which has room for {room}")]
    UsedLen {
        /// The head of the chain, or its buffer id.
        head: u16,
        /// `len` of the used element, in bytes.
        len: u32,
        /// Length of its device-writable segments, in bytes.
        room: u64,
    },
}

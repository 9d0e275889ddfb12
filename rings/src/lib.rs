//! Guest-memory rings: the device side and the driver side of virtqueues. Depends on no other
//! Ringside crate, on no socket and on no KVM.
//!
//! A virtqueue is memory that two parties who do not trust each other write to without asking. The
//! device side is [`DeviceRing`] (the state) and [`Session`] (one turn of the device's loop); the
//! driver side is [`DriverRing`] and [`DriverSession`]. Both drain in batches, make a batch visible
//! with one store, and decide on at most one notification for it. Neither allocates after
//! its `new`. Both serve split and packed virtqueues ([`RingConfig::packed`]), used in order or in any
//! ([`RingConfig::in_order`]); who uses them need not know which.
//!
//! `virtio-queue` validates a split queue's size and alignment, and the tests compare chains with what
//! it finds. Its own iteration is not used: it looks up a memory region for each access to the
//! ring, ends a malformed chain without a word, and stores the used index for each element. It has no
//! packed queue.
//!
//! | Module | Its matter |
//! | --- | --- |
//! | `device`, `driver` | the two sides, whatever the format |
//! | `split`, `packed` | the same for one format, each with the layout of its memory |
//! | `inflight` | what outlasts the device side: which chains it has |
//! | `order` | chains that are done before their turn (VIRTIO_F_IN_ORDER) |
//! | `chain`, `segment` | what is in a chain |
//! | `table` | what descriptors refer to: buffers and indirect tables |
//! | `area` | the parts of a ring in this process's memory |
//! | `error` | what can be wrong |
//!
//! ```
//! use ringside_rings::{ChainBuf, DeviceRing, DriverLayout, DriverRing, Segment};
//! use ringside_rings::{read_segments, write_segments};
//! use vm_memory::{GuestAddress, GuestMemoryMmap};
//!
//! let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 0x1_0000)])?;
//! let layout = DriverLayout::new(GuestAddress(0), 64, 0)?;
//! let mut driver = DriverRing::new(layout, true, &memory)?;
//! let mut device = DeviceRing::new(&layout.config(true), &memory)?;
//!
//! // The driver asks: 5 bytes for the device to read, room for 8 to write.
//! let question = [Segment::new(GuestAddress(0x8000), 5)];
//! let room = [Segment::new(GuestAddress(0x9000), 8)];
//! write_segments(&memory, &question, 0, b"hello")?;
//! let mut asking = driver.session(&memory)?;
//! asking.add(&question, &room, "my first request")?;
//! assert!(asking.publish()?, "the device wants to be notified");
//!
//! // The device answers everything there is.
//! let mut buf = ChainBuf::new(device.size());
//! let mut answering = device.session(&memory)?;
//! while let Some(chain) = answering.pop(&mut buf)? {
//!     let mut word = [0; 5];
//!     read_segments(&memory, chain.readable(), 0, &mut word)?;
//!     word.make_ascii_uppercase();
//!     write_segments(&memory, chain.writable(), 0, &word)?;
//!     answering.push_used(chain.head(), 5)?;
//! }
//! assert!(answering.publish()?, "the driver wants an interrupt");
//! assert!(!answering.enable_notifications()?, "nothing more to do");
//!
//! assert_eq!(asking.poll_used()?, Some(("my first request", 5)));
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # Rules
//!
//! Every index, length, address and flag below is the driver's to write, at any time. The device
//! side answers each in one of four ways: the queue is refused ([`RingError`] from
//! [`DeviceRing::new`]), the queue is broken (`RingError` later: the device stops it), the chain is
//! malformed ([`ChainError`]: the device returns it and goes on), or it is harmless. In no case does
//! it panic, loop, allocate or touch memory outside the guest's. Sections are those of VIRTIO 1.3.
//!
//! Split virtqueues:
//!
//! | What the driver wrote | Section | What the device side answers |
//! | --- | --- | --- |
//! | Queue size 0, no power of two, above 32768 | 2.7 | refused: [`RingError::Size`] |
//! | Area not aligned to 16 (descriptors), 2 (available), 4 (used) | 2.7.1 | refused: [`RingError::Misaligned`] |
//! | Area partly or wholly outside guest memory, or past the end of the address space | 2.7 | refused: [`RingError::NotInMemory`] |
//! | Area across two memory regions | – | refused: [`RingError::Split`]: the regions are mapped apart |
//! | Used ring overlapping another area | 2.7 | refused: [`RingError::Overlap`] |
//! | Available index ahead by more chains than can be outstanding, or moved back | 2.7.6.1 | broken: [`RingError::AvailIndex`] |
//! | Head not below the queue size | 2.7.6 | broken: [`RingError::Head`]: it could not be returned |
//! | Head of a chain that is in flight | 2.7.13 | broken: [`RingError::HeadInFlight`] |
//! | `next` outside its table | 2.7.5 | malformed: [`ChainError::Next`] |
//! | A loop, or more descriptors than the queue size | 2.7.5.2, 2.7.5.3.1 | malformed: [`ChainError::TooLong`], after at most that many |
//! | More than 2^32 bytes in a chain | 2.7.5.2 | malformed: [`ChainError::TooManyBytes`] |
//! | A buffer of length 0 | – | malformed: [`ChainError::Empty`] |
//! | A buffer partly or wholly outside guest memory, be it only between its ends, or whose end overflows | 2.7.5 | malformed: [`ChainError::NotInMemory`] |
//! | A buffer across regions that adjoin | – | served: one [`Segment`] |
//! | A device-readable buffer behind a device-writable one | 2.7.4.2 | malformed: [`ChainError::ReadableAfterWritable`] |
//! | Any split of the content over descriptors | 2.7.4.1 | served: [`read_segments`], [`write_segments`] |
//! | INDIRECT without VIRTIO_F_INDIRECT_DESC | 2.7.5.3.1 | malformed: [`ChainError::IndirectNotNegotiated`] |
//! | INDIRECT inside an indirect table | 2.7.5.3.1 | malformed: [`ChainError::IndirectNested`] |
//! | INDIRECT together with NEXT | 2.7.5.3.1 | malformed: [`ChainError::IndirectNext`] |
//! | Indirect table of length 0, no multiple of 16, or longer than the queue and 128 descriptors | 2.7.5.3, 2.7.5.3.1 | malformed: [`ChainError::IndirectLength`] |
//! | Indirect table outside guest memory | 2.7.5.3 | malformed: [`ChainError::IndirectRead`] |
//! | Indirect table at an odd address, or across regions that adjoin | 2.7.5.3 | served |
//! | INDIRECT together with WRITE | 2.7.5.3.2 | served: WRITE is ignored |
//! | Descriptors followed by an indirect one | 2.7.5.3.2 | served |
//! | Unknown flags | 2.7.5 | served: ignored |
//! | A descriptor changed while or after it is taken | 2.7.13 | harmless: each is read once, and what was checked is used |
//! | An available element changed after its chain was taken | 2.7.6 | harmless: heads in flight are the device side's own notes |
//! | Any `flags` and `used_event` in the available ring | 2.7.7 | harmless: costs the driver its own interrupts |
//! | Buffers that overlap each other or the queue's areas | – | harmless: the driver's own memory, and every index read from there is checked |
//!
//! Packed virtqueues, as far as they differ. What is in a chain is checked alike:
//!
//! | What the driver wrote | Section | What the device side answers |
//! | --- | --- | --- |
//! | Queue size 0 or above 32768 | 2.8 | refused: [`RingError::PackedSize`] |
//! | Queue size that is no power of two | 2.8.10.1 | served |
//! | Area not aligned to 16 (descriptors), 4 (event suppression) | 2.8.10.1 | refused: [`RingError::Misaligned`] |
//! | Areas that overlap | 2.8 | refused: [`RingError::Overlap`] |
//! | An index to begin with that is not below the queue size | – | refused: [`RingError::Index`] |
//! | A descriptor made available while all are in flight | 2.8.16 | broken: [`RingError::AvailDescriptor`] |
//! | A chain that does not end among the descriptors that are the driver's to write | 2.8.17 | broken: [`RingError::AvailDescriptor`]: its id stands in its last descriptor |
//! | Id of a chain that is in flight | 2.8.6 | broken: [`RingError::HeadInFlight`] |
//! | Any other id, whatever the queue size | 2.8.13 | served |
//! | Anything wrong with the contents of a chain that ends | 2.8.5 – 2.8.7 | malformed, and returned with all its descriptors |
//! | AVAIL and USED alike, or as in the round before | 2.8.1 | harmless: there is nothing yet |
//! | Any AVAIL and USED behind the first descriptor of a chain | 2.8.6 | harmless: the first one speaks for all |
//! | INDIRECT behind direct descriptors | 2.8.5, 2.8.19 | malformed: [`ChainError::IndirectMixed`] |
//! | INDIRECT together with NEXT | 2.8.19 | malformed: [`ChainError::IndirectNext`] |
//! | Flags other than WRITE inside an indirect table | 2.8.7 | served: ignored |
//! | Any driver event suppression structure | 2.8.10 | harmless: costs the driver its own interrupts |
//! | A used descriptor changed | 2.8.15 | harmless: places, ids and lengths of chains are the device side's own notes |
//!
//! What a front-end keeps of the notes about chains in flight ([`Inflight`]) is not trusted either: read once, when a queue is
//! [resumed](DeviceRing::resume), which is refused if they contradict themselves ([`RingError::Inflight`]).
//!
//! The reverse holds for [`DriverRing`]: a used index, id or length that a device cannot have
//! arrived at is a [`DriverError`].
//!
//! # Restrictions
//! Little-endian, as VIRTIO_F_VERSION_1 demands (2.7.3 is legacy).
#![forbid(unsafe_code)]
#![warn(clippy::arithmetic_side_effects)]

/// Does the same with a ring or a session of either format.
macro_rules! either {
    ($kind:ident, $on:expr, $ring:ident => $what:expr) => {
        match $on {
            $kind::Split($ring) => $what,
            $kind::Packed($ring) => $what,
        }
    };
}

mod area;
mod chain;
mod device;
mod driver;
mod error;
mod inflight;
#[cfg(test)]
mod interleavings;
mod order;
mod packed;
mod segment;
mod split;
mod table;

pub use chain::{Chain, ChainBuf};
pub use device::{DeviceRing, RingConfig, Session};
pub use driver::{DriverLayout, DriverRing, DriverSession};
pub use error::{Area, ChainError, DriverError, PopError, RingError, SegmentError};
pub use inflight::Inflight;
pub use segment::{Segment, in_one_region, read_segments, total_len, write_segments};

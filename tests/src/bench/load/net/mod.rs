//! A load on a network card: `ringside-load net`, and `ringside-load tap`, the same without a card in between; and what joins
//! a card to a TAP, for loads that the kernel's own network makes.
//!
//! One thread keeps both queues of the first pair as full as they get: it sends frames that all look alike, and gives each
//! receive buffer back as soon as it was filled, without a look at it.
//!
//! | Module | Its matter |
//! | --- | --- |
//! | `options` | the command lines |
//! | `lane` | the two queues under load |
//! | `bare` | a loop on a TAP |
//! | `backlog` | frames that wait in a TAP |
//! | `join` | a TAP joined to a card, or to another TAP |
//! | `report` | what came of it |

mod backlog;
mod bare;
mod join;
mod lane;
mod options;
mod report;

use std::path::Path;

use ringside_backends::net::{Tap, TapError, TapQueue};
use ringside_rings::DriverLayout;
use vm_memory::{Bytes, GuestMemoryMmap};

use super::connection::{
    Connection, EVENT_IDX, IN_ORDER, INDIRECT_DESC, RING_PACKED, Room, Started, waiting_for,
};
use super::error::LoadError;
use super::{Course, Job, measure};
use lane::{Buffers, Counts, Lane, Side};

pub(super) use join::run as join;
pub(in crate::bench) use options::Direction;
pub use options::{JoinArgs, NetArgs, TapArgs};
pub(in crate::bench) use report::NetReport;

/// VIRTIO_NET_F_CSUM (VIRTIO 1.3, 5.1.3)
const CSUM: u64 = 1 << 0;
/// VIRTIO_NET_F_GUEST_CSUM (VIRTIO 1.3, 5.1.3)
const GUEST_CSUM: u64 = 1 << 1;
/// VIRTIO_NET_F_GUEST_TSO4 (VIRTIO 1.3, 5.1.3)
const GUEST_TSO4: u64 = 1 << 7;
/// VIRTIO_NET_F_HOST_TSO4 (VIRTIO 1.3, 5.1.3)
const HOST_TSO4: u64 = 1 << 11;
/// VIRTIO_NET_F_MRG_RXBUF (VIRTIO 1.3, 5.1.3)
const MRG_RXBUF: u64 = 1 << 15;
/// Length of the header in front of a frame (VIRTIO 1.3, 5.1.6).
const HEADER_LEN: u32 = 12;
/// Buffers are multiples of so many bytes.
const BUFFER: u32 = 2048;
/// Longest frame that is not to be cut: an Ethernet header and 1500 bytes.
const WHOLE: u32 = 14 + 1500;
/// Longest frame: an Ethernet header and the longest IPv4 packet.
const LONGEST: u32 = 14 + 65_535;
/// Bytes that the cut pieces of a longer frame carry: what the header of IPv4 and that of TCP leave of 1500.
const SEGMENT: u16 = 1460;

/// Least frame of Ethernet, without its checksum.
const SHORT: u32 = 60;

/// Addresses that nobody has: of the guest that sends, and of what its frames go to.
const GUEST: [u8; 6] = [2, 0, 0, 0, 0, 0x0b];
const PEER: [u8; 6] = [2, 0, 0, 0, 0, 0x0a];

/// A frame that is sent: one of a type for local experiments (IEEE 802, 9.2.3), or a segment of TCP if it is longer than what
/// goes out whole.
fn frame(len: u32, from: [u8; 6], to: [u8; 6]) -> Vec<u8> {
    let mut frame: Vec<u8> = to.into_iter().chain(from).collect();
    if len > WHOLE {
        let total = u16::try_from(len.saturating_sub(14)).unwrap_or(u16::MAX);
        frame.extend([0x08, 0x00, 0x45, 0]);
        frame.extend(total.to_be_bytes());
        // Not to be fragmented, 64 hops, TCP, from 10.0.0.1 to 10.0.0.2 (RFC 791, 3.1).
        frame.extend([0, 0, 0x40, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
        // Ports, numbers, length of this header, ACK, window, checksum (RFC 9293, 3.1).
        frame.extend([
            0, 7, 0, 9, 0, 0, 0, 1, 0, 0, 0, 1, 0x50, 0x10, 0xff, 0xff, 0, 0, 0, 0,
        ]);
    } else {
        frame.extend([0x88, 0xb5]);
    }
    frame.resize(usize::try_from(len).unwrap_or_default(), 0);
    frame
}

/// A frame with its header before it (VIRTIO 1.3, 5.1.6), which leaves the cutting of a long one to the card.
fn packet(len: u32, from: [u8; 6], to: [u8; 6]) -> Vec<u8> {
    let mut packet = vec![0; usize::try_from(HEADER_LEN).unwrap_or_default()];
    if len > WHOLE {
        let [low, high] = SEGMENT.to_le_bytes();
        // NEEDS_CSUM, GSO_TCPV4, length of the headers, of a piece's data, where the checksum begins and where it goes.
        packet = vec![1, 1, 54, 0, low, high, 34, 0, 16, 0, 0, 0];
    }
    packet.extend(frame(len, from, to));
    packet
}

/// Opens a TAP whose frames have a header of [`HEADER_LEN`] bytes before them.
fn open_tap(name: &str) -> Result<(Tap, TapQueue), LoadError> {
    let refused = |error: TapError| LoadError::Option(error.to_string());
    let (tap, queues) = Tap::open(name, 1).map_err(refused)?;
    let header_len = u8::try_from(HEADER_LEN).unwrap_or(u8::MAX);
    tap.set_header_len(header_len).map_err(refused)?;
    let Some(queue) = queues.into_iter().next() else {
        return Err(LoadError::Option("the TAP has no queue".into()));
    };
    Ok((tap, queue))
}

/// How a card is to be driven.
struct Wishes<'a> {
    /// Features that are used if they are there.
    wanted: u64,
    /// Features that must be there, each with the option that says so.
    asked: &'a [(bool, &'static str, u64)],
    queue_size: u16,
    /// Bytes of each buffer.
    buffer: u32,
    huge_pages: bool,
}

/// A connected front-end of a network card.
struct Card {
    connection: Connection,
    memory: GuestMemoryMmap,
    /// The receive queue and the transmit queue (VIRTIO 1.3, 5.1.2).
    queues: [Started; 2],
    /// The buffers of each.
    buffers: [Buffers; 2],
}

impl Card {
    /// Connects to the back-end and starts both queues.
    fn connect(socket: &Path, wishes: &Wishes<'_>) -> Result<Self, LoadError> {
        let mut connection = Connection::open(socket, 2, wishes.wanted, wishes.asked)?;
        let mut room = Room::default();
        let features = connection.features;
        let mut lay_out = || {
            let layout = if features & RING_PACKED != 0 {
                DriverLayout::packed(room.next(), wishes.queue_size, 0)?
            } else {
                DriverLayout::new(room.next(), wishes.queue_size, 0)?
            };
            let layout = if features & IN_ORDER != 0 {
                layout.in_order()
            } else {
                layout
            };
            room.take(layout.end().0.saturating_sub(room.next().0));
            let first = room.take(u64::from(wishes.buffer) * u64::from(wishes.queue_size));
            let len = wishes.buffer;
            Ok::<_, LoadError>((layout, Buffers { first, len }))
        };
        let (receive, transmit) = (lay_out()?, lay_out()?);
        let memory = connection.share(&room, wishes.huge_pages)?;
        let queues = [
            connection.start(0, receive.0, &memory)?,
            connection.start(1, transmit.0, &memory)?,
        ];
        Ok(Self {
            connection,
            memory,
            queues,
            buffers: [receive.1, transmit.1],
        })
    }

    /// Connects to a card that is to be loaded, and writes what it sends into the first transmit buffers.
    fn loaded(
        socket: &Path,
        args: &NetArgs,
        packet: &[u8],
        buffers: u16,
    ) -> Result<Self, LoadError> {
        let long = args.frame > WHOLE;
        let card = Self::connect(
            socket,
            &Wishes {
                wanted: MRG_RXBUF | INDIRECT_DESC | if args.no_event_idx { 0 } else { EVENT_IDX },
                asked: &[
                    (args.packed, "--packed", RING_PACKED),
                    (args.in_order, "--in-order", IN_ORDER),
                    (long, "--frame with segments", CSUM),
                    (long, "--frame with segments", GUEST_CSUM),
                    (long, "--frame with segments", HOST_TSO4),
                    (long, "--frame with segments", GUEST_TSO4),
                ],
                queue_size: args.queue_size,
                buffer: args.buffer(),
                huge_pages: args.huge_pages,
            },
        )?;
        let [_, transmit] = card.buffers;
        for slot in 0..buffers {
            let place = transmit.of(slot);
            card.memory
                .write_slice(packet, place)
                .map_err(|_| LoadError::Access { addr: place.0 })?;
        }
        Ok(card)
    }

    /// Both queues, each with so many buffers in use, and the length of what is sent.
    fn sides(&mut self, received: u16, sent: u16, frame: u32) -> [Side<'_>; 2] {
        let ([receive, transmit], [into, from]) = (&mut self.queues, self.buffers);
        [
            Side::receive(&self.memory, receive, into, received),
            Side::transmit(&self.memory, transmit, from, sent, frame),
        ]
    }
}

/// Connects, loads, measures and prints.
pub(super) fn run(args: &NetArgs) -> Result<(), LoadError> {
    args.check()?;
    let depth = args.queue_size;
    let sent = packet(args.frame, GUEST, PEER);
    if let (Some(tap), Some(count)) = (&args.backlog, args.count) {
        backlog::fill(tap, args.frame, count, args.cpu)?;
    }
    let mut card = Card::loaded(&args.socket_path, args, &sent, depth)?;
    let mut other = match &args.to {
        Some(socket) => {
            let hello = packet(SHORT, PEER, GUEST);
            let mut other = Card::loaded(socket, args, &hello, 1)?;
            // A switch knows from now on where frames for it go.
            let [_, transmit] = other.sides(0, 1, SHORT);
            lane::announce(transmit)?;
            Some(other)
        }
        None => None,
    };
    let features = card.connection.features;
    let interrupts = {
        let [receive, transmit] = &card.queues;
        let receive = other.as_ref().map_or(receive, |other| &other.queues[0]);
        waiting_for(&[&receive.call, &transmit.call])?
    };
    let sides = match &mut other {
        Some(other) => {
            let ([receive, _], [_, transmit]) = (
                other.sides(depth, 0, args.frame),
                card.sides(0, depth, args.frame),
            );
            [receive, transmit]
        }
        None => {
            let depth = |used: bool| if used { depth } else { 0 };
            let (received, sent) = (args.direction.receives(), args.direction.sends());
            card.sides(depth(received), depth(sent), args.frame)
        }
    };
    let lane = Lane {
        interrupts: &interrupts,
        polling: args.polling(),
        forwards: args.to.is_some(),
        left: args.count,
    };
    let job: Job<'_, Counts> = Box::new(|phase, ready| {
        let pinned = args.pin();
        ready.wait();
        pinned?;
        lane.run(sides, phase)
    });
    let course = Course {
        counted: args.count.is_some(),
        warm_up: args.warm_up(),
        seconds: args.seconds(),
        watch: args.watch,
    };
    let outcome = measure(&course, vec![job])?;
    NetReport::new(args.frame, features, args.to.is_some(), &outcome).print(args.json)?;
    std::thread::sleep(args.linger());
    for card in [Some(card), other].into_iter().flatten() {
        card.connection.leave(2);
    }
    Ok(())
}

/// Loads a TAP without any card, measures and prints.
pub(super) fn run_bare(args: &TapArgs) -> Result<(), LoadError> {
    let job: Job<'_, Counts> = Box::new(|phase, ready| {
        let tap = args.pin().and_then(|()| bare::Loop::open(args));
        ready.wait();
        tap?.run(phase)
    });
    let course = Course {
        counted: args.backlog.is_some(),
        warm_up: args.warm_up(),
        seconds: args.seconds(),
        // The loop is this process itself. One that ends by itself has no thread any more when it is looked at; it never waits.
        watch: args.backlog.is_none().then(std::process::id),
    };
    let outcome = measure(&course, vec![job])?;
    NetReport::new(args.frame, 0, false, &outcome).print(args.json)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frame_that_is_to_be_cut_says_how() {
        for len in [14, 60, WHOLE] {
            let packet = packet(len, GUEST, PEER);
            assert_eq!(packet.len(), 12 + len as usize);
            assert_eq!(packet[..12], [0; 12]);
        }
        let packet = packet(LONGEST, GUEST, PEER);
        assert_eq!(packet.len(), 12 + 14 + 65_535);
        let (header, frame) = packet.split_at(12);
        // Where it says that TCP's checksum begins, its header of 20 bytes does.
        assert_eq!(header[6], 14 + 20);
        assert_eq!(header[2], 14 + 20 + 20);
        assert_eq!(frame[12..17], [8, 0, 0x45, 0, 0xff]);
        assert_eq!(frame[34 + 12] >> 4, 5);
    }
}

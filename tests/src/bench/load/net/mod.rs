//! A load on a network card: `ringside-load net`, and `ringside-load tap`, the same without a card in between.
//!
//! One thread keeps both queues of the first pair as full as they get: it sends frames that all look alike, and gives each
//! receive buffer back as soon as it was filled, without a look at it.
//!
//! | Module | Its matter |
//! | --- | --- |
//! | `options` | the command lines |
//! | `lane` | the two queues under load |
//! | `bare` | a loop on a TAP |
//! | `report` | what came of it |

mod bare;
mod lane;
mod options;
mod report;

use ringside_rings::DriverLayout;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::connection::{
    Connection, EVENT_IDX, IN_ORDER, INDIRECT_DESC, RING_PACKED, Room, Started, waiting_for,
};
use super::error::LoadError;
use super::{Course, Job, measure};
use lane::{Counts, Lane, Side};

pub(in crate::bench) use options::Direction;
pub use options::{NetArgs, TapArgs};
pub(in crate::bench) use report::NetReport;

/// VIRTIO_NET_F_MRG_RXBUF (VIRTIO 1.3, 5.1.3)
const MRG_RXBUF: u64 = 1 << 15;
/// Length of the header in front of a frame (VIRTIO 1.3, 5.1.6).
const HEADER_LEN: u32 = 12;
/// Bytes of a receive buffer, and the distance of any two buffers.
const BUFFER: u32 = 2048;

/// The frame that is sent: to and from addresses that nobody has, of a type for local experiments (IEEE 802, 9.2.3).
fn frame(len: u32) -> Vec<u8> {
    let to = [2, 0, 0, 0, 0, 0x0a];
    let from = [2, 0, 0, 0, 0, 0x0b];
    let mut frame: Vec<u8> = to.into_iter().chain(from).chain([0x88, 0xb5]).collect();
    frame.resize(usize::try_from(len).unwrap_or_default(), 0);
    frame
}

/// A connected front-end of a network card.
struct Card {
    connection: Connection,
    memory: GuestMemoryMmap,
    /// The receive queue and the transmit queue (VIRTIO 1.3, 5.1.2).
    queues: [Started; 2],
}

impl Card {
    /// Connects to the back-end and starts both queues; says where the buffers of each lie.
    fn connect(args: &NetArgs) -> Result<(Self, [GuestAddress; 2]), LoadError> {
        let wanted = MRG_RXBUF | INDIRECT_DESC | if args.no_event_idx { 0 } else { EVENT_IDX };
        let asked = [
            (args.packed, "--packed", RING_PACKED),
            (args.in_order, "--in-order", IN_ORDER),
        ];
        let mut connection = Connection::open(&args.socket_path, 2, wanted, &asked)?;
        let mut room = Room::default();
        let mut lay_out = || {
            let layout = if args.packed {
                DriverLayout::packed(room.next(), args.queue_size, 0)?
            } else {
                DriverLayout::new(room.next(), args.queue_size, 0)?
            };
            let layout = if args.in_order {
                layout.in_order()
            } else {
                layout
            };
            room.take(layout.end().0.saturating_sub(room.next().0));
            let buffers = room.take(u64::from(BUFFER) * u64::from(args.queue_size));
            Ok::<_, LoadError>((layout, buffers))
        };
        let (receive, transmit) = (lay_out()?, lay_out()?);
        let memory = connection.share(&room, args.huge_pages)?;
        let queues = [
            connection.start(0, receive.0, &memory)?,
            connection.start(1, transmit.0, &memory)?,
        ];
        let card = Self {
            connection,
            memory,
            queues,
        };
        Ok((card, [receive.1, transmit.1]))
    }
}

/// Connects, loads, measures and prints.
pub(super) fn run(args: &NetArgs) -> Result<(), LoadError> {
    args.check()?;
    let (mut card, [received, sent]) = Card::connect(args)?;
    let interrupts = waiting_for(&[&card.queues[0].call, &card.queues[1].call])?;
    let header = vec![0; usize::try_from(HEADER_LEN).unwrap_or_default()];
    let packet = [header, frame(args.frame)].concat();
    for slot in 0..args.queue_size {
        let place = lane::buffer(sent, slot);
        card.memory
            .write_slice(&packet, place)
            .map_err(|_| LoadError::Access { addr: place.0 })?;
    }
    let features = card.connection.features;
    let [receive, transmit] = &mut card.queues;
    let depth = args.queue_size;
    let sides = [
        Side::receive(receive, received, depth, args.direction),
        Side::transmit(transmit, sent, depth, args.frame, args.direction),
    ];
    let lane = Lane {
        memory: &card.memory,
        interrupts: &interrupts,
        polling: args.polling(),
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
    NetReport::new(args.frame, features, &outcome).print(args.json)?;
    std::thread::sleep(args.linger());
    card.connection.leave(2);
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
        counted: false,
        warm_up: args.warm_up(),
        seconds: args.seconds(),
        // The loop is this process itself.
        watch: Some(std::process::id()),
    };
    let outcome = measure(&course, vec![job])?;
    NetReport::new(args.frame, 0, &outcome).print(args.json)
}

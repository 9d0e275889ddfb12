//! A TAP joined to a card: what the kernel sends by the interface goes out by the card, and what the card receives comes in by
//! the interface, as if the network namespace that the interface is in were a guest. Segments that are not cut and checksums
//! that are not made pass through, as far as the back-end takes them. Or joined to another TAP, by a loop that copies: what no
//! card can exceed.
//!
//! Receive buffers have room for the longest frame, so that one is always enough.

use std::convert::Infallible;
use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;

use nix::errno::Errno;
use nix::libc::{TUN_F_CSUM, TUN_F_TSO4, TUN_F_TSO6};
use nix::unistd::{read, write};
use ringside_backends::net::{Tap, TapQueue};
use ringside_rings::{DriverSession, Segment};
use vm_memory::bitmap::BS;
use vm_memory::{
    Bytes, GuestMemoryBackend, GuestMemoryMmap, ReadVolatile, VolatileMemoryError, VolatileSlice,
    WriteVolatile,
};
use vmm_sys_util::epoll::{Epoll, EpollEvent};
use vmm_sys_util::eventfd::EventFd;

use super::super::connection::{EVENT_IDX, waiting_for};
use super::super::error::LoadError;
use super::lane::Buffers;
use super::options::JoinArgs;
use super::{
    BUFFER, CSUM, Card, GUEST_CSUM, GUEST_TSO4, HEADER_LEN, HOST_TSO4, LONGEST, MRG_RXBUF, Wishes,
    open_tap,
};

/// VIRTIO_NET_F_GUEST_TSO6 (VIRTIO 1.3, 5.1.3)
const GUEST_TSO6: u64 = 1 << 8;
/// VIRTIO_NET_F_HOST_TSO6 (VIRTIO 1.3, 5.1.3)
const HOST_TSO6: u64 = 1 << 12;

/// Entries of each queue.
const QUEUE_SIZE: u16 = 256;
/// Bytes of a buffer.
const ROOM: u32 = (LONGEST + HEADER_LEN).next_multiple_of(BUFFER);
/// Most frames of one direction between two looks at the other one.
const BATCH: u32 = 64;
/// What is written on standard output as soon as frames pass.
const JOINED: &str = "joined";

fn failed(doing: &'static str) -> impl Fn(io::Error) -> LoadError {
    move |source| LoadError::Io { doing, source }
}

/// What came of the reading or writing of a frame: nothing if the queue is empty or full, or the interface is down.
fn passed(moved: Result<usize, Errno>) -> Result<Option<usize>, LoadError> {
    match moved {
        Ok(len) => Ok(Some(len)),
        Err(Errno::EAGAIN | Errno::EIO) => Ok(None),
        Err(errno) => Err(failed("move a frame over the TAP")(errno.into())),
    }
}

/// The same of guest memory.
fn passed_volatile(moved: Result<usize, VolatileMemoryError>) -> Result<Option<usize>, LoadError> {
    passed(moved.map_err(|error| match error {
        VolatileMemoryError::IOError(error) => {
            Errno::from_raw(error.raw_os_error().unwrap_or_default())
        }
        _ => Errno::EFAULT,
    }))
}

/// Joins them until it is ended.
pub(in super::super) fn run(args: &JoinArgs) -> Result<(), LoadError> {
    args.pin()?;
    let (tap, queue) = open_tap(&args.tap)?;
    let never = match (&args.socket_path, &args.to_tap) {
        (Some(socket), _) => to_card(&tap, &queue, socket)?,
        (None, Some(name)) => {
            let (other_tap, other) = open_tap(name)?;
            for tap in [&tap, &other_tap] {
                set_offloads(tap, TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6)?;
            }
            println!("{JOINED}");
            to_tap(queue.as_fd(), other.as_fd())?
        }
        (None, None) => return Err(LoadError::Option("give --socket-path or --to-tap".into())),
    };
    match never {}
}

fn set_offloads(tap: &Tap, offloads: u32) -> Result<(), LoadError> {
    tap.set_offloads(offloads)
        .map_err(|error| LoadError::Option(error.to_string()))
}

/// Sleeps until something comes.
fn sleep(until: &Epoll) -> Result<(), LoadError> {
    match until.wait(-1, &mut [EpollEvent::default(); 2]) {
        Err(error) if error.kind() != ErrorKind::Interrupted => {
            Err(failed("wait for frames")(error))
        }
        _ => Ok(()),
    }
}

/// Copies frames both ways between two TAPs.
fn to_tap(one: BorrowedFd<'_>, other: BorrowedFd<'_>) -> Result<Infallible, LoadError> {
    let mut buffer = vec![0; usize::try_from(ROOM).unwrap_or_default()];
    let frames = waiting_for(&[&one, &other])?;
    loop {
        let mut moved = false;
        for (from, to) in [(one, other), (other, one)] {
            for _ in 0..BATCH {
                let Some(len) = passed(read(from, &mut buffer))? else {
                    break;
                };
                passed(write(to, buffer.get(..len).unwrap_or_default()))?;
                moved = true;
            }
        }
        if !moved {
            sleep(&frames)?;
        }
    }
}

/// Moves frames both ways between a TAP and a card.
fn to_card(tap: &Tap, queue: &TapQueue, socket: &Path) -> Result<Infallible, LoadError> {
    let mut card = Card::connect(
        socket,
        &Wishes {
            wanted: CSUM
                | GUEST_CSUM
                | GUEST_TSO4
                | GUEST_TSO6
                | HOST_TSO4
                | HOST_TSO6
                | MRG_RXBUF
                | EVENT_IDX,
            asked: &[],
            queue_size: QUEUE_SIZE,
            buffer: ROOM,
            huge_pages: false,
        },
    )?;
    let features = card.connection.features;
    // What the kernel may leave to the card is what the card's other side takes.
    let offloads = [
        (CSUM, TUN_F_CSUM),
        (HOST_TSO4, TUN_F_TSO4),
        (HOST_TSO6, TUN_F_TSO6),
    ];
    let taken = offloads
        .into_iter()
        .filter(|(feature, _)| features & feature != 0)
        .fold(0, |set, (_, offload)| set | offload);
    set_offloads(tap, taken)?;
    let [receive, transmit] = &mut card.queues;
    let [into, from] = card.buffers;
    // With all buffers under way, the next frame has to wait.
    let (frames, buffers) = (
        waiting_for(&[&receive.call, &queue.as_fd()])?,
        waiting_for(&[&receive.call, &transmit.call])?,
    );
    let mut received = End {
        memory: &card.memory,
        session: receive.ring.session(&card.memory)?,
        kick: &receive.kick,
        call: &receive.call,
        buffers: into,
    };
    for slot in 0..QUEUE_SIZE {
        received.give(slot)?;
    }
    received.publish()?;
    let mut sent = End {
        memory: &card.memory,
        session: transmit.ring.session(&card.memory)?,
        kick: &transmit.kick,
        call: &transmit.call,
        buffers: from,
    };
    let mut free = (0..QUEUE_SIZE).collect();
    println!("{JOINED}");
    loop {
        let moved = sent.send(queue, &mut free)?;
        if received.receive(queue)? || moved {
            continue;
        }
        // What was sent is of interest only where nothing else can be sent.
        if received.session.enable_interrupts()?
            || free.is_empty() && sent.session.enable_interrupts()?
        {
            continue;
        }
        sleep(if free.is_empty() { &buffers } else { &frames })?;
        received.acknowledge()?;
        sent.acknowledge()?;
    }
}

/// Changes the header of a packet of TCP over IPv4 whose checksum is said to be valid, whatever it is, to one that says that it
/// is not made yet: a TAP knows only the latter, and the kernel then does not look at it either.
fn leave_valid(frame: &VolatileSlice<'_, BS<'_, ()>>) -> Result<(), VolatileMemoryError> {
    // VIRTIO_NET_HDR_F_NEEDS_CSUM and VIRTIO_NET_HDR_F_DATA_VALID (VIRTIO 1.3, 5.1.6).
    const NEEDS_CSUM: u8 = 1;
    const DATA_VALID: u8 = 2;
    // Behind the header, the type of the frame, the length of its IP header, and the protocol.
    const TYPE: usize = 12 + 12;
    const IP: usize = TYPE + 2;
    const PROTOCOL: usize = IP + 9;
    if frame.len() <= PROTOCOL || frame.read_obj::<u8>(0)? != DATA_VALID {
        return Ok(());
    }
    let tcp = frame.read_obj::<[u8; 2]>(TYPE)? == [8, 0] && frame.read_obj::<u8>(PROTOCOL)? == 6;
    if tcp {
        let ip_len = u16::from(frame.read_obj::<u8>(IP)? & 0xf) * 4;
        frame.write_obj(NEEDS_CSUM, 0)?;
        // Where it begins, from the frame's first byte on, and where it goes, from there.
        frame.write_obj((14 + ip_len).to_le_bytes(), 6)?;
        frame.write_obj(16_u16.to_le_bytes(), 8)?;
    }
    Ok(())
}

/// A queue with its ring resolved.
struct End<'c> {
    memory: &'c GuestMemoryMmap,
    session: DriverSession<'c, u16, GuestMemoryMmap>,
    kick: &'c EventFd,
    call: &'c EventFd,
    buffers: Buffers,
}

impl<'c> End<'c> {
    /// The buffer of a slot, or its beginning.
    fn buffer(&self, slot: u16, len: u32) -> Result<VolatileSlice<'c, BS<'c, ()>>, LoadError> {
        let place = self.buffers.of(slot);
        let len = usize::try_from(len).unwrap_or_default();
        self.memory
            .get_slice(place, len)
            .map_err(|_| LoadError::Access { addr: place.0 })
    }

    /// Makes a receive buffer available.
    fn give(&mut self, slot: u16) -> Result<(), LoadError> {
        let segment = [Segment::new(self.buffers.of(slot), ROOM)];
        self.session.add(&[], &segment, slot)?;
        Ok(())
    }

    /// Sends what the interface has, as far as there are buffers; whether there was anything.
    fn send(&mut self, queue: &TapQueue, free: &mut Vec<u16>) -> Result<bool, LoadError> {
        let mut count = 0;
        while count < BATCH {
            // As a driver does before each packet. The buffers that come back last are still in the caches.
            while let Some((slot, _)) = self.session.poll_used()? {
                free.push(slot);
            }
            let Some(&slot) = free.last() else {
                break;
            };
            let mut buffer = self.buffer(slot, ROOM)?;
            let Some(len) = passed_volatile(queue.as_fd().read_volatile(&mut buffer))? else {
                break;
            };
            let len = u32::try_from(len).unwrap_or(ROOM);
            let segment = [Segment::new(self.buffers.of(slot), len)];
            self.session.add(&segment, &[], slot)?;
            // The back-end can take it while the next one is copied.
            self.publish()?;
            free.pop();
            count += 1;
        }
        Ok(count > 0)
    }

    /// Gives the interface what was received; whether there was anything.
    fn receive(&mut self, queue: &TapQueue) -> Result<bool, LoadError> {
        let mut count = 0;
        while count < BATCH
            && let Some((slot, len)) = self.session.poll_used()?
        {
            let frame = self.buffer(slot, len.min(ROOM))?;
            leave_valid(&frame).map_err(|_| LoadError::Access {
                addr: self.buffers.of(slot).0,
            })?;
            passed_volatile(queue.as_fd().write_volatile(&frame))?;
            self.give(slot)?;
            count += 1;
        }
        if count > 0 {
            self.publish()?;
        }
        Ok(count > 0)
    }

    fn publish(&mut self) -> Result<(), LoadError> {
        if self.session.publish()? {
            self.kick
                .write(1)
                .map_err(failed("write the kick eventfd"))?;
        }
        Ok(())
    }

    /// Takes an interrupt back that has come, and wants no more for now.
    fn acknowledge(&mut self) -> Result<(), LoadError> {
        self.session.disable_interrupts()?;
        match self.call.read() {
            Err(error) if error.kind() != ErrorKind::WouldBlock => {
                Err(failed("read the call eventfd")(error))
            }
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::{GUEST, PEER, WHOLE, packet};
    use super::*;

    #[test]
    fn a_valid_checksum_is_told_in_the_taps_words() {
        let mut segment = packet(WHOLE + 1, GUEST, PEER);
        let before = segment.clone();
        leave_valid(&VolatileSlice::from(segment.as_mut_slice())).unwrap();
        assert_eq!(segment, before, "not said to be valid");
        segment[..12].fill(0);
        segment[0] = 2;
        leave_valid(&VolatileSlice::from(segment.as_mut_slice())).unwrap();
        assert_eq!(segment[..12], [1, 0, 0, 0, 0, 0, 34, 0, 16, 0, 0, 0]);
        assert_eq!(segment[12..], before[12..]);
    }
}

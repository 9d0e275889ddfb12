//! The zones of a zoned disk (VIRTIO 1.3, 5.2.6), for all of its queues together.
//!
//! A zone that must be written sequentially is held by one request at a time, from whichever queue; others wait in the order
//! in which they came. So its write pointer is known while it is held: a write elsewhere is refused before the storage sees
//! it, and an append, which Linux does not offer to programs, becomes a write at the pointer. Zones that may be written
//! anywhere are not held, and reads never wait.
//!
//! ```text
//!  enter ──▶ held ──▶ written, refused or changed ──▶ leave ──▶ the next that waits: Outcome::Granted in its mailbox
//! ```
//!
//! The pointers are read when the disk is opened. After a failure and after a reset of all zones they are unknown, and read
//! again by the next request that needs them.

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use ringside_rings::{Segment, write_segments};

use super::config::ZoneGeometry;
use super::device::{BlockDevice, ZoneAction, ZoneInfo};
use super::mailbox::Mailbox;
use super::offload::Outcome;
use super::request::{SECTOR, Status};
use crate::shell::Memory;

/// Length of struct virtio_blk_zone_report without descriptors, and of struct virtio_blk_zone_descriptor (VIRTIO 1.3, 5.2.6).
const DESCRIPTOR_LEN: u64 = 64;
/// VIRTIO_BLK_ZT_CONV (VIRTIO 1.3, 5.2.6).
const CONVENTIONAL: u8 = 1;
/// VIRTIO_BLK_ZS_EMPTY, _IOPEN, _EOPEN and _CLOSED (VIRTIO 1.3, 5.2.6): those that can be written.
const WRITABLE: [u8; 4] = [1, 2, 3, 4];

/// Where a zone can be written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Position {
    /// It has to be looked up.
    Unknown,
    /// At `next`, and up to `end`.
    At {
        /// The write pointer.
        next: u64,
        /// Behind the last byte.
        end: u64,
    },
    /// Nowhere: it is full, read-only or offline.
    Nowhere,
}

impl Position {
    fn of(zone: &ZoneInfo) -> Self {
        let end = zone.start.saturating_add(zone.capacity);
        if WRITABLE.contains(&zone.condition) && zone.write_pointer < end {
            Self::At {
                next: zone.write_pointer,
                end,
            }
        } else {
            Self::Nowhere
        }
    }
}

#[derive(Debug)]
struct State {
    position: Position,
    held: bool,
    waiting: VecDeque<(Arc<Mailbox<Outcome>>, u16)>,
}

/// The zones of a disk.
#[derive(Debug)]
pub(super) struct Zones {
    /// Size of each zone in bytes.
    size: u64,
    /// Writes end at multiples of this many bytes.
    granularity: u64,
    /// Size of the disk in bytes.
    capacity: u64,
    /// `None` for a zone that may be written anywhere.
    zones: Vec<Option<Mutex<State>>>,
}

impl Zones {
    /// Reads the zones of a device of `capacity` bytes.
    ///
    /// # Errors
    /// What the system said; or zones that are not where they should be.
    pub(super) fn read(
        device: &dyn BlockDevice,
        geometry: &ZoneGeometry,
        capacity: u64,
    ) -> io::Result<Self> {
        let mut zones = Vec::new();
        let mut found = Vec::new();
        let mut at = 0;
        while at < capacity {
            device.zones(at, &mut found)?;
            if found.is_empty() {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            for zone in &found {
                if zone.start != at || zone.len == 0 {
                    return Err(io::ErrorKind::InvalidData.into());
                }
                at = at.saturating_add(geometry.size);
                zones.push((zone.kind != CONVENTIONAL).then(|| {
                    Mutex::new(State {
                        position: Position::of(zone),
                        held: false,
                        waiting: VecDeque::new(),
                    })
                }));
            }
        }
        Ok(Self {
            size: geometry.size,
            granularity: geometry.write_granularity.into(),
            capacity,
            zones,
        })
    }

    /// How many there are.
    pub(super) fn count(&self) -> usize {
        self.zones.len()
    }

    fn number(&self, offset: u64) -> u32 {
        offset
            .checked_div(self.size)
            .and_then(|number| u32::try_from(number).ok())
            .unwrap_or(u32::MAX)
    }

    /// `None` for a zone that may be written anywhere, and for one that there is not.
    fn sequential(&self, zone: u32) -> Option<&Mutex<State>> {
        self.zones.get(index(zone))?.as_ref()
    }

    fn start_of(&self, zone: u32) -> u64 {
        u64::from(zone).saturating_mul(self.size)
    }

    fn state(&self, zone: u32) -> Option<MutexGuard<'_, State>> {
        let zone = self.sequential(zone)?;
        Some(zone.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// The zone that a write of `len` bytes, at least one, has to hold; `None` if it needs none.
    ///
    /// # Errors
    /// VIRTIO_BLK_S_ZONE_INVALID_CMD if it lies in several zones, not all of which may be written anywhere (VIRTIO 1.3,
    /// 5.2.6.2).
    pub(super) fn to_hold(&self, offset: u64, len: u64) -> Result<Option<u32>, Status> {
        let first = self.number(offset);
        let last = self.number(offset.saturating_add(len).saturating_sub(1));
        let zones = self
            .zones
            .get(index(first)..=index(last))
            .ok_or(Status::ZoneInvalidCommand)?;
        match zones {
            [Some(_)] => Ok(Some(first)),
            _ if zones.iter().all(Option::is_none) => Ok(None),
            _ => Err(Status::ZoneInvalidCommand),
        }
    }

    /// Checks a read of `len` bytes, at least one.
    ///
    /// # Errors
    /// VIRTIO_BLK_S_ZONE_INVALID_CMD if it begins in a zone that must be written sequentially, and goes on behind it (VIRTIO
    /// 1.3, 5.2.6.2).
    pub(super) fn check_read(&self, offset: u64, len: u64) -> Result<(), Status> {
        let first = self.number(offset);
        let last = self.number(offset.saturating_add(len).saturating_sub(1));
        match self.sequential(first) {
            Some(_) if first != last => Err(Status::ZoneInvalidCommand),
            _ => Ok(()),
        }
    }

    /// The zone that begins at `offset`.
    ///
    /// # Errors
    /// VIRTIO_BLK_S_ZONE_INVALID_CMD if there is none that must be written sequentially (VIRTIO 1.3, 5.2.6.2).
    pub(super) fn sequential_at(&self, offset: u64) -> Result<u32, Status> {
        let number = self.number(offset);
        match self.sequential(number) {
            Some(_) if offset.is_multiple_of(self.size.max(1)) => Ok(number),
            _ => Err(Status::ZoneInvalidCommand),
        }
    }

    /// Takes a zone for the request in a slot. `false` if another has it: [`Outcome::Granted`] tells when it is taken.
    pub(super) fn enter(&self, zone: u32, mailbox: &Arc<Mailbox<Outcome>>, slot: u16) -> bool {
        let Some(mut state) = self.state(zone) else {
            return true; // there is nothing to wait for
        };
        if state.held {
            state.waiting.push_back((Arc::clone(mailbox), slot));
            return false;
        }
        state.held = true;
        true
    }

    /// Gives a zone that is held to the next that waits for it.
    pub(super) fn leave(&self, zone: u32) {
        let Some(mut state) = self.state(zone) else {
            return;
        };
        let next = state.waiting.pop_front();
        state.held = next.is_some();
        drop(state);
        if let Some((mailbox, slot)) = next {
            mailbox.put(slot, Outcome::Granted);
        }
    }

    /// Where a zone that is held can be written.
    pub(super) fn position(&self, zone: u32) -> Position {
        self.state(zone)
            .map_or(Position::Nowhere, |state| state.position)
    }

    /// Whether `len` bytes can be written at `offset` of a zone whose position is known.
    ///
    /// # Errors
    /// VIRTIO_BLK_S_ZONE_UNALIGNED_WP or VIRTIO_BLK_S_ZONE_INVALID_CMD (VIRTIO 1.3, 5.2.6.2).
    pub(super) fn check_write(
        &self,
        position: Position,
        offset: u64,
        len: u64,
    ) -> Result<(), Status> {
        let Position::At { next, end } = position else {
            return Err(Status::ZoneInvalidCommand);
        };
        let behind = offset.saturating_add(len);
        if offset != next || !behind.is_multiple_of(self.granularity.max(SECTOR)) {
            return Err(Status::ZoneUnalignedWritePointer);
        }
        if behind > end {
            return Err(Status::ZoneInvalidCommand);
        }
        Ok(())
    }

    /// Bytes from `from` to `to` were written into a zone that is held.
    pub(super) fn wrote(&self, zone: u32, from: u64, to: u64) {
        if let Some(mut state) = self.state(zone)
            && let Position::At { next, end } = state.position
            && next == from
        {
            state.position = if to < end {
                Position::At { next: to, end }
            } else {
                Position::Nowhere
            };
        }
    }

    /// Nothing is known of a zone's position any more.
    pub(super) fn forget(&self, zone: u32) {
        if let Some(mut state) = self.state(zone) {
            state.position = Position::Unknown;
        }
    }

    /// Nothing is known of any: others have written, and none is held.
    pub(super) fn forget_all(&self) {
        for zone in 0..self.zones.len() {
            self.forget(u32::try_from(zone).unwrap_or(u32::MAX));
        }
    }

    /// Looks up the position of a zone that is held.
    ///
    /// # Errors
    /// What the system said.
    pub(super) fn look_up(&self, device: &dyn BlockDevice, zone: u32) -> io::Result<()> {
        let offset = self.start_of(zone);
        let mut found = Vec::new();
        device.zones(offset, &mut found)?;
        let info = found
            .first()
            .filter(|found| found.start == offset)
            .ok_or(io::ErrorKind::InvalidData)?;
        if let Some(mut state) = self.state(zone) {
            state.position = Position::of(info);
        }
        Ok(())
    }

    /// Changes a zone that is held.
    ///
    /// # Errors
    /// What the system said.
    pub(super) fn manage(
        &self,
        device: &dyn BlockDevice,
        action: ZoneAction,
        zone: u32,
    ) -> io::Result<()> {
        let offset = self.start_of(zone);
        let len = self.size.min(self.capacity.saturating_sub(offset));
        let done = device.manage_zones(action, offset, len);
        if self.look_up(device, zone).is_err() {
            self.forget(zone);
        }
        done
    }

    /// Resets all zones.
    ///
    /// # Errors
    /// What the system said.
    pub(super) fn reset_all(&self, device: &dyn BlockDevice) -> io::Result<()> {
        let done = device.manage_zones(ZoneAction::Reset, 0, self.capacity);
        // A write that is under way may have come before the reset, or after it.
        for zone in 0..u32::try_from(self.zones.len()).unwrap_or(u32::MAX) {
            self.forget(zone);
        }
        done
    }

    /// Writes a struct virtio_blk_zone_report (VIRTIO 1.3, 5.2.6) into segments of guest memory with `room` bytes, from the zone
    /// on in which `offset` is.
    ///
    /// # Errors
    /// What the system said; or there is no room, or no memory.
    pub(super) fn report(
        &self,
        device: &dyn BlockDevice,
        offset: u64,
        memory: &Memory,
        segments: &[Segment],
        room: u64,
    ) -> io::Result<u64> {
        let most = room
            .checked_sub(DESCRIPTOR_LEN)
            .ok_or(io::ErrorKind::InvalidInput)?
            / DESCRIPTOR_LEN;
        let mut at = offset;
        let (mut count, mut written) = (0_u64, DESCRIPTOR_LEN);
        let (mut found, mut bytes) = (Vec::new(), Vec::new());
        while count < most && at < self.capacity {
            device.zones(at, &mut found)?;
            let left = usize::try_from(most.saturating_sub(count)).unwrap_or(usize::MAX);
            found.truncate(left);
            let Some(last) = found.last() else {
                break;
            };
            // Each is beyond the one before, or there would be no end.
            at = last
                .start
                .saturating_add(last.len.max(SECTOR))
                .max(at.saturating_add(SECTOR));
            bytes.clear();
            for zone in &found {
                bytes.extend(descriptor(zone));
            }
            write_segments(memory, segments, written, &bytes).map_err(io::Error::other)?;
            let more = u64::try_from(found.len()).unwrap_or(0);
            count = count.saturating_add(more);
            written = written.saturating_add(more.saturating_mul(DESCRIPTOR_LEN));
        }
        let mut header = [0; 64];
        let (number, _) = header.split_at_mut(8);
        number.copy_from_slice(&count.to_le_bytes());
        write_segments(memory, segments, 0, &header).map_err(io::Error::other)?;
        Ok(written)
    }
}

fn index(zone: u32) -> usize {
    usize::try_from(zone).unwrap_or(usize::MAX)
}

/// A struct virtio_blk_zone_descriptor (VIRTIO 1.3, 5.2.6). Its types and states have the numbers that Linux has for them.
fn descriptor(zone: &ZoneInfo) -> impl Iterator<Item = u8> {
    let numbers = [zone.capacity, zone.start, zone.write_pointer];
    numbers
        .into_iter()
        .flat_map(|bytes| (bytes / SECTOR).to_le_bytes())
        .chain([zone.kind, zone.condition])
        .chain([0; 38])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::blk::device::fake::{Call, Fake};
    use vm_memory::{Bytes, GuestAddress};

    const SIZE: u64 = 1 << 20;
    const GEOMETRY: ZoneGeometry = ZoneGeometry {
        size: SIZE,
        max_open: 0,
        max_active: 0,
        max_append: SIZE,
        write_granularity: 4096,
    };
    /// The first two may be written anywhere; the last is smaller.
    const COUNT: u64 = 7;
    const CAPACITY: u64 = COUNT * SIZE - 65536;

    fn device() -> Fake {
        let zone = |number: u64| ZoneInfo {
            start: number * SIZE,
            len: SIZE.min(CAPACITY - number * SIZE),
            capacity: SIZE - 131_072,
            write_pointer: number * SIZE,
            kind: if number < 2 { 1 } else { 2 },
            condition: u8::from(number >= 2),
        };
        Fake {
            zones: Mutex::new((0..COUNT).map(zone).collect()),
            at_once: 3,
            ..Fake::default()
        }
    }

    fn zones(device: &Fake) -> Zones {
        Zones::read(device, &GEOMETRY, CAPACITY).unwrap()
    }

    #[test]
    fn all_zones_are_read_and_must_be_where_they_belong() {
        let device = device();
        assert_eq!(zones(&device).count(), 7);
        let read = |device: &Fake| Zones::read(device, &GEOMETRY, CAPACITY).map(|_| ());
        device.zones.lock().unwrap()[4].start += 4096;
        assert!(read(&device).is_err());
        device.zones.lock().unwrap().truncate(4);
        assert!(read(&device).is_err());
        *device.errno.lock().unwrap() = Some(libc::ENOTTY);
        assert!(read(&device).is_err());
    }

    #[test]
    fn transfers_stay_in_their_zone() {
        let zones = zones(&device());
        let invalid = Err(Status::ZoneInvalidCommand);
        assert_eq!(zones.to_hold(0, SIZE), Ok(None));
        assert_eq!(zones.to_hold(4096, 2 * SIZE - 4096), Ok(None));
        assert_eq!(zones.to_hold(4096, 2 * SIZE), invalid);
        assert_eq!(zones.to_hold(2 * SIZE, SIZE), Ok(Some(2)));
        assert_eq!(zones.to_hold(3 * SIZE - 4096, 8192), invalid);
        assert_eq!(zones.to_hold(COUNT * SIZE, 4096), invalid);
        assert_eq!(zones.to_hold(u64::MAX - 4096, 4096), invalid);
        assert_eq!(zones.check_read(0, 5 * SIZE), Ok(()));
        assert_eq!(zones.check_read(2 * SIZE, SIZE), Ok(()));
        assert_eq!(
            zones.check_read(2 * SIZE + 512, SIZE),
            Err(Status::ZoneInvalidCommand)
        );
        assert_eq!(zones.sequential_at(2 * SIZE), Ok(2));
        for wrong in [0, SIZE, 2 * SIZE + 512, COUNT * SIZE, u64::MAX] {
            assert_eq!(zones.sequential_at(wrong), invalid.map(|_| 0), "{wrong}");
        }
    }

    #[test]
    fn writes_are_at_the_pointer_and_within_the_capacity() {
        let zones = zones(&device());
        let (start, end) = (2 * SIZE, 3 * SIZE - 131_072);
        let check = |offset, len| zones.check_write(zones.position(2), offset, len);
        let (invalid, unaligned) = (
            Err(Status::ZoneInvalidCommand),
            Err(Status::ZoneUnalignedWritePointer),
        );
        assert_eq!(check(start, 4096), Ok(()));
        assert_eq!(check(start + 4096, 4096), unaligned);
        assert_eq!(check(start, 512), unaligned);
        assert_eq!(check(start, end - start), Ok(()));
        assert_eq!(check(start, end - start + 4096), invalid);
        zones.wrote(2, start, start + 8192);
        assert_eq!(check(start, 4096), unaligned);
        assert_eq!(check(start + 8192, 4096), Ok(()));
        // Not what was written meanwhile, in the zone as it was before a reset.
        zones.wrote(2, start, start + 4096);
        assert_eq!(check(start + 8192, 4096), Ok(()));
        zones.wrote(2, start + 8192, end);
        assert_eq!(zones.position(2), Position::Nowhere);
        assert_eq!(check(end, 4096), invalid);
        zones.forget(3);
        zones.wrote(3, 3 * SIZE, 3 * SIZE + 4096);
        assert_eq!(zones.position(3), Position::Unknown);
    }

    #[test]
    fn a_zone_has_one_holder_and_a_queue() {
        let zones = zones(&device());
        let [one, other] = [(); 2].map(|()| Arc::new(Mailbox::new().unwrap()));
        let take = |mailbox: &Mailbox<Outcome>| {
            let mut ended = Vec::new();
            mailbox.take(&mut ended);
            ended
        };
        assert!(zones.enter(2, &one, 1));
        assert!(zones.enter(3, &one, 2));
        assert!(!zones.enter(2, &other, 7));
        assert!(!zones.enter(2, &one, 3));
        zones.leave(3);
        assert_eq!((take(&one), take(&other)), (vec![], vec![]));
        zones.leave(2);
        assert_eq!(take(&other), [(7, Outcome::Granted)]);
        // It is not free between the two: who comes now waits.
        assert!(!zones.enter(2, &other, 8));
        zones.leave(2);
        assert_eq!(
            (take(&one), take(&other)),
            (vec![(3, Outcome::Granted)], vec![])
        );
        zones.leave(2);
        assert_eq!(take(&other), [(8, Outcome::Granted)]);
        zones.leave(2);
        assert!(zones.enter(2, &one, 4));
    }

    #[test]
    fn pointers_are_read_again_after_changes() {
        let device = device();
        let zones = zones(&device);
        let at = |next: u64| Position::At {
            next,
            end: 4 * SIZE - 131_072,
        };
        device.zones.lock().unwrap()[3].write_pointer += 65536;
        assert_eq!(zones.position(3), at(3 * SIZE));
        zones.look_up(&device, 3).unwrap();
        assert_eq!(zones.position(3), at(3 * SIZE + 65536));
        device.calls.lock().unwrap().clear();
        zones.manage(&device, ZoneAction::Reset, 3).unwrap();
        assert_eq!(zones.position(3), at(3 * SIZE));
        let manage = Call::Manage(ZoneAction::Reset, 3 * SIZE, SIZE);
        assert_eq!(
            *device.calls.lock().unwrap(),
            [manage, Call::Zones(3 * SIZE)]
        );
        // The last is shorter.
        zones.manage(&device, ZoneAction::Open, 6).unwrap();
        let last = Call::Manage(ZoneAction::Open, 6 * SIZE, SIZE - 65536);
        assert!(device.calls.lock().unwrap().contains(&last));
        zones.reset_all(&device).unwrap();
        let all = Call::Manage(ZoneAction::Reset, 0, CAPACITY);
        assert!(device.calls.lock().unwrap().contains(&all));
        assert_eq!(zones.position(3), Position::Unknown);
        for condition in [13, 14, 15] {
            device.zones.lock().unwrap()[3].condition = condition;
            zones.look_up(&device, 3).unwrap();
            assert_eq!(zones.position(3), Position::Nowhere);
        }
        *device.errno.lock().unwrap() = Some(libc::EIO);
        assert!(zones.manage(&device, ZoneAction::Finish, 3).is_err());
        assert_eq!(zones.position(3), Position::Unknown);
        assert!(zones.look_up(&device, 3).is_err());
    }

    #[test]
    fn a_report_has_as_many_zones_as_there_is_room_for() {
        let device = device();
        let zones = zones(&device);
        let memory = Memory::from_ranges(&[(GuestAddress(0), 1 << 16)]).unwrap();
        let report = |offset, room: u32| {
            memory.write_slice(&[0xee; 4096], GuestAddress(0)).unwrap();
            // In two pieces that meet within a descriptor.
            let segments = [
                Segment::new(GuestAddress(0), 100),
                Segment::new(GuestAddress(100), room - 100),
            ];
            let written = zones
                .report(&device, offset, &memory, &segments, room.into())
                .unwrap();
            let mut bytes = vec![0; usize::try_from(written).unwrap()];
            memory.read_slice(&mut bytes, GuestAddress(0)).unwrap();
            bytes
        };
        let u64_at =
            |bytes: &[u8], at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap());
        let all = report(0, 4000);
        assert_eq!((all.len(), u64_at(&all, 0)), (64 * 8, 7));
        assert_eq!(all[8..64], [0; 56]);
        for (number, zone) in (0..7_u64).zip(all[64..].chunks(64)) {
            assert_eq!(u64_at(zone, 0), (SIZE - 131_072) / 512);
            assert_eq!(u64_at(zone, 8), number * SIZE / 512);
            assert_eq!(u64_at(zone, 16), number * SIZE / 512);
            let expected = if number < 2 { [1, 0] } else { [2, 1] };
            assert_eq!(zone[24..26], expected);
            assert_eq!(zone[26..], [0; 38]);
        }
        // From the zone in which the sector is; what does not fit as a whole is left out.
        let some = report(3 * SIZE + 512, 64 * 5 + 63);
        assert_eq!((some.len(), u64_at(&some, 0)), (64 * 5, 4));
        assert_eq!(u64_at(&some, 72), 3 * SIZE / 512);
        assert_eq!(u64_at(&report(6 * SIZE, 4000), 0), 1);
        assert_eq!(u64_at(&report(0, 127), 0), 0);
        let short = [Segment::new(GuestAddress(0), 63)];
        assert!(zones.report(&device, 0, &memory, &short, 63).is_err());
        let lost = [Segment::new(GuestAddress(1 << 20), 4096)];
        assert!(zones.report(&device, 0, &memory, &lost, 4096).is_err());
    }
}

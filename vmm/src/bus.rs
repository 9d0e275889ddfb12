//! Which device answers an access: an address-sorted map of ranges, one for ports, one for MMIO.
//!
//! The map's lock is never held while a device works, so a device may add, move or remove ranges
//! (a BAR that the guest reprograms) from inside its own `write`.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

/// A device with registers. Offsets count from the start of the range it was inserted at.
///
/// Lengths are what the guest used: 1, 2, 4 or 8 bytes. The device decides which it supports; one
/// it does not support reads as all ones and is ignored when written.
pub trait BusDevice: Send {
    /// Fills `data` with the registers at `offset`. Bytes left alone read as all ones.
    fn read(&mut self, offset: u64, data: &mut [u8]);
    /// Writes `data` to the registers at `offset`.
    fn write(&mut self, offset: u64, data: &[u8]);
}

/// A device that several ranges, or a range and somebody else, share.
pub type SharedDevice = Arc<Mutex<dyn BusDevice>>;

/// Why a range cannot be inserted or removed.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Error {
    /// The range is empty or goes beyond the end of the address space.
    #[error("bus range {start:#x} of {size:#x} bytes is empty or wraps around")]
    Invalid {
        /// First address.
        start: u64,
        /// Length in bytes.
        size: u64,
    },
    /// Another device has a part of the range.
    #[error("bus range {start:#x} of {size:#x} bytes overlaps the device at {other:#x}")]
    Overlap {
        /// First address.
        start: u64,
        /// Length in bytes.
        size: u64,
        /// First address of the device that is already there.
        other: u64,
    },
    /// No device was inserted at that address.
    #[error("no device's bus range starts at {start:#x}")]
    Absent {
        /// First address.
        start: u64,
    },
}

#[derive(Clone)]
struct Entry {
    last: u64,
    device: SharedDevice,
}

/// One address space: ports, or MMIO.
#[derive(Default)]
pub struct Bus {
    ranges: RwLock<BTreeMap<u64, Entry>>,
}

impl Bus {
    /// Lets `device` answer for `size` addresses from `start`.
    pub fn insert(&self, start: u64, size: u64, device: SharedDevice) -> Result<(), Error> {
        let last = size
            .checked_sub(1)
            .and_then(|s| start.checked_add(s))
            .ok_or(Error::Invalid { start, size })?;
        let mut ranges = self.ranges.write().unwrap_or_else(PoisonError::into_inner);
        // The last range that starts at or below our end is the only one that can overlap.
        if let Some((&other, entry)) = ranges.range(..=last).next_back()
            && entry.last >= start
        {
            return Err(Error::Overlap { start, size, other });
        }
        ranges.insert(start, Entry { last, device });
        Ok(())
    }

    /// Removes the range that starts at `start`. A vCPU that looked the device up just before may
    /// still be inside it when this returns.
    pub fn remove(&self, start: u64) -> Result<(), Error> {
        let mut ranges = self.ranges.write().unwrap_or_else(PoisonError::into_inner);
        ranges
            .remove(&start)
            .map(|_| ())
            .ok_or(Error::Absent { start })
    }

    /// Reads at `address`. Returns whether a device answered; without one the data is all ones,
    /// as on a real bus.
    pub fn read(&self, address: u64, data: &mut [u8]) -> bool {
        data.fill(0xff);
        match self.find(address, data.len()) {
            Some((offset, device)) => {
                lock(&device).read(offset, data);
                true
            }
            None => false,
        }
    }

    /// Writes at `address`. Returns whether a device took it.
    pub fn write(&self, address: u64, data: &[u8]) -> bool {
        match self.find(address, data.len()) {
            Some((offset, device)) => {
                lock(&device).write(offset, data);
                true
            }
            None => false,
        }
    }

    /// The device that has all of `len` addresses from `address`. An access that leaves its range
    /// half-way has no owner.
    fn find(&self, address: u64, len: usize) -> Option<(u64, SharedDevice)> {
        let last = address.checked_add(u64::try_from(len).ok()?.checked_sub(1)?)?;
        let ranges = self.ranges.read().unwrap_or_else(PoisonError::into_inner);
        let (&start, entry) = ranges.range(..=address).next_back()?;
        (last <= entry.last).then(|| (address - start, Arc::clone(&entry.device)))
    }
}

/// A device whose lock was poisoned is still a device: a panic elsewhere must not end this vCPU.
fn lock<'a>(device: &'a Mutex<dyn BusDevice + 'static>) -> MutexGuard<'a, dyn BusDevice + 'static> {
    device.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Echo(u8, Vec<(u64, Vec<u8>)>);

    impl BusDevice for Echo {
        fn read(&mut self, offset: u64, data: &mut [u8]) {
            for (i, byte) in data.iter_mut().enumerate() {
                *byte = self.0 + u8::try_from(offset).unwrap() + u8::try_from(i).unwrap();
            }
        }
        fn write(&mut self, offset: u64, data: &[u8]) {
            self.1.push((offset, data.to_vec()));
        }
    }

    fn echo(tag: u8) -> Arc<Mutex<Echo>> {
        Arc::new(Mutex::new(Echo(tag, Vec::new())))
    }

    #[test]
    fn accesses_reach_the_right_device_at_the_right_offset() {
        let bus = Bus::default();
        let (a, b) = (echo(0x10), echo(0x40));
        bus.insert(0x100, 8, a.clone()).unwrap();
        bus.insert(0x108, 8, b.clone()).unwrap();
        let mut data = [0; 2];
        assert!(bus.read(0x106, &mut data));
        assert_eq!(data, [0x16, 0x17]);
        assert!(bus.write(0x10c, &[1, 2, 3, 4]));
        assert_eq!(b.lock().unwrap().1, [(4, vec![1, 2, 3, 4])]);
        assert!(a.lock().unwrap().1.is_empty());
    }

    #[test]
    fn nobody_answers_as_all_ones() {
        let bus = Bus::default();
        bus.insert(0x100, 8, echo(0)).unwrap();
        for (address, len) in [(0xff, 1), (0xfe, 4), (0x108, 1), (0x106, 4), (u64::MAX, 2)] {
            let mut data = vec![0; len];
            assert!(!bus.read(address, &mut data), "{address:#x}");
            assert!(data.iter().all(|b| *b == 0xff));
            assert!(!bus.write(address, &data));
        }
        assert!(!bus.read(0x100, &mut []));
    }

    #[test]
    fn overlaps_and_nonsense_are_refused() {
        let bus = Bus::default();
        bus.insert(0x100, 0x10, echo(0)).unwrap();
        for (start, size) in [
            (0x100, 0x10),
            (0xf1, 0x10),
            (0x10f, 1),
            (0x80, 0x1000),
            (0x108, 1),
        ] {
            assert_eq!(
                bus.insert(start, size, echo(0)),
                Err(Error::Overlap {
                    start,
                    size,
                    other: 0x100
                })
            );
        }
        assert!(matches!(
            bus.insert(0, 0, echo(0)),
            Err(Error::Invalid { .. })
        ));
        assert!(matches!(
            bus.insert(u64::MAX, 2, echo(0)),
            Err(Error::Invalid { .. })
        ));
        bus.insert(u64::MAX, 1, echo(0)).unwrap();
        bus.insert(0xff, 1, echo(0)).unwrap();
        bus.insert(0x110, 1, echo(0)).unwrap();
        assert_eq!(bus.remove(0x101), Err(Error::Absent { start: 0x101 }));
        bus.remove(0x100).unwrap();
        bus.insert(0x104, 0xc, echo(0)).unwrap();
    }

    struct Mover(Arc<Bus>);

    impl BusDevice for Mover {
        fn read(&mut self, _: u64, _: &mut [u8]) {}
        fn write(&mut self, _: u64, data: &[u8]) {
            self.0.remove(0x100).unwrap();
            self.0.insert(u64::from(data[0]), 1, echo(7)).unwrap();
        }
    }

    #[test]
    fn a_device_may_change_the_map_while_it_is_written() {
        let bus = Arc::new(Bus::default());
        bus.insert(0x100, 1, Arc::new(Mutex::new(Mover(bus.clone()))))
            .unwrap();
        assert!(bus.write(0x100, &[0x20]));
        let mut data = [0];
        assert!(bus.read(0x20, &mut data));
        assert_eq!(data, [7]);
        assert!(!bus.read(0x100, &mut data));
    }
}

//! The forwarding table: which address was found behind which port (IEEE 802.1Q, 8.8).
//!
//! It has a fixed size and places an address in one of a few neighbouring places that its hash selects, so that each look-up
//! and each lesson is bounded. The hash is seeded: nobody can choose addresses that meet in one bucket. No port can have more
//! than its quota of entries, and an entry that is not too old is never evicted: a guest that sends from ever new addresses
//! fills its own quota, and the addresses of the others stay known.

use std::hash::{BuildHasher, RandomState};

use super::super::config::MacAddress;
use super::policy::PortId;

/// Places of one bucket.
const WAYS: usize = 8;
/// Places in all: four for each entry of a full table.
const PLACES: usize = 1 << 15;
/// Entries that a guest's port can have.
pub(super) const QUOTA: u32 = 256;
/// Entries that an uplink can have: many stations are behind it.
pub(super) const UPLINK_QUOTA: u32 = 4096;

/// An address in a VLAN, as one number; 0 stands for none, as VLANs begin with 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Key(u64);

impl Key {
    /// `address` is a number of 48 bits.
    #[inline]
    pub(super) fn new(vlan: u16, address: u64) -> Self {
        Self(u64::from(vlan) << 48 | address)
    }

    fn vlan(self) -> u16 {
        let [high, low, ..] = self.0.to_be_bytes();
        u16::from_be_bytes([high, low])
    }

    fn address(self) -> MacAddress {
        let [_, _, a, b, c, d, e, f] = self.0.to_be_bytes();
        MacAddress::new([a, b, c, d, e, f])
    }
}

/// One entry; its key is none in a place that is free.
#[derive(Debug, Clone, Copy, Default)]
struct Entry {
    key: Key,
    port: PortId,
    /// When a frame came from there last, in seconds.
    seen: u32,
}

/// What came of a lesson.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Learnt {
    /// It is known, or was known before.
    Known,
    /// The port has its quota, or the bucket is full: the address stays unknown.
    Full,
}

/// The table.
#[derive(Debug)]
pub(super) struct Table {
    entries: Box<[Entry]>,
    /// By port: entries that it has.
    counts: Box<[u32]>,
    seed: u64,
    /// After how many seconds without a frame an entry is too old.
    ageing: u32,
    /// Where the next sweep goes on.
    hand: usize,
    /// How often an address came, moved or went.
    changes: u64,
}

impl Table {
    /// An empty table for so many ports.
    pub(super) fn new(ports: usize, ageing: u32) -> Self {
        Self::of_size(ports, ageing, PLACES)
    }

    /// `places` is a power of two.
    fn of_size(ports: usize, ageing: u32, places: usize) -> Self {
        Self {
            entries: vec![Entry::default(); places].into(),
            counts: vec![0; ports].into(),
            // Its keys come from the system's random numbers. Odd: no bit of an address is lost.
            seed: RandomState::new().hash_one(0) | 1,
            ageing,
            hand: 0,
            changes: 0,
        }
    }

    /// A number that is another one once any address is behind another port, or none.
    #[inline]
    pub(super) fn changes(&self) -> u64 {
        self.changes
    }

    /// The first place of a key's bucket.
    #[inline]
    fn bucket(&self, key: Key) -> usize {
        // A multiplication spreads each bit over those above it, and the fold brings those down again.
        let product = u128::from(key.0).wrapping_mul(u128::from(self.seed));
        let high = u64::try_from(product >> 64).unwrap_or(0);
        let low = key.0.wrapping_mul(self.seed);
        let folded = (low ^ high).wrapping_mul(self.seed) >> 32;
        usize::try_from(folded).unwrap_or(0) & self.entries.len().saturating_sub(WAYS)
    }

    fn is_old(&self, entry: &Entry, now: u32) -> bool {
        now.saturating_sub(entry.seen) > self.ageing
    }

    /// The port behind which an address is, unless that was too long ago. `now` is in seconds.
    #[inline]
    pub(super) fn look_up(&self, key: Key, now: u32) -> Option<PortId> {
        let start = self.bucket(key);
        let bucket = self.entries.get(start..start + WAYS)?;
        let entry = bucket.iter().find(|entry| entry.key == key)?;
        (!self.is_old(entry, now)).then_some(entry.port)
    }

    /// A frame came from an address behind a port that may have `quota` entries.
    pub(super) fn learn(&mut self, key: Key, port: PortId, quota: u32, now: u32) -> Learnt {
        let start = self.bucket(key);
        let ageing = self.ageing;
        let Some(bucket) = self.entries.get_mut(start..start + WAYS) else {
            return Learnt::Full;
        };
        let room = |counts: &[u32]| counts.get(usize::from(port)).is_some_and(|&n| n < quota);
        if let Some(entry) = bucket.iter_mut().find(|entry| entry.key == key) {
            // Found behind another port, it has moved there, if that may have one more.
            if entry.port != port {
                if !room(&self.counts) {
                    return Learnt::Full;
                }
                count(&mut self.counts, entry.port, false);
                count(&mut self.counts, port, true);
                entry.port = port;
                self.changes = self.changes.wrapping_add(1);
            }
            entry.seen = now;
            return Learnt::Known;
        }
        if !room(&self.counts) {
            self.sweep(now);
            return Learnt::Full;
        }
        let free = bucket
            .iter_mut()
            .find(|entry| entry.key == Key::default() || now.saturating_sub(entry.seen) > ageing);
        let Some(entry) = free else {
            return Learnt::Full;
        };
        if entry.key != Key::default() {
            count(&mut self.counts, entry.port, false);
        }
        *entry = Entry {
            key,
            port,
            seen: now,
        };
        count(&mut self.counts, port, true);
        self.changes = self.changes.wrapping_add(1);
        Learnt::Known
    }

    /// Frees what is too old in the next few places, so that quotas are not filled by what nobody hears of any more.
    fn sweep(&mut self, now: u32) {
        let start = self.hand;
        self.changes = self.changes.wrapping_add(1);
        self.hand = (start + WAYS) & self.entries.len().saturating_sub(WAYS);
        let ageing = self.ageing;
        for entry in self.entries.iter_mut().skip(start).take(WAYS) {
            if entry.key != Key::default() && now.saturating_sub(entry.seen) > ageing {
                count(&mut self.counts, entry.port, false);
                *entry = Entry::default();
            }
        }
    }

    /// Forgets all that was found behind a port.
    pub(super) fn forget(&mut self, port: PortId) {
        self.changes = self.changes.wrapping_add(1);
        for entry in &mut self.entries {
            if entry.key != Key::default() && entry.port == port {
                *entry = Entry::default();
            }
        }
        if let Some(count) = self.counts.get_mut(usize::from(port)) {
            *count = 0;
        }
    }

    /// All that is known: VLAN, address, port, and in which second a frame came from there.
    pub(super) fn dump(&self, now: u32) -> Vec<(u16, MacAddress, PortId, u32)> {
        let known = self
            .entries
            .iter()
            .filter(|entry| entry.key != Key::default() && !self.is_old(entry, now));
        let rows = known.map(|entry| {
            let Entry { key, port, seen } = *entry;
            (key.vlan(), key.address(), port, seen)
        });
        rows.collect()
    }
}

fn count(counts: &mut [u32], port: PortId, more: bool) {
    if let Some(count) = counts.get_mut(usize::from(port)) {
        *count = if more {
            count.saturating_add(1)
        } else {
            count.saturating_sub(1)
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashMap;

    fn key(number: u32) -> Key {
        Key::new(1, 0x0200_0000_0000 | u64::from(number))
    }

    #[test]
    fn addresses_are_learnt_move_and_grow_old() {
        let mut table = Table::new(4, 300);
        assert_eq!(table.look_up(key(1), 0), None);
        assert_eq!(table.learn(key(1), 0, QUOTA, 10), Learnt::Known);
        assert_eq!(table.look_up(key(1), 310), Some(0));
        assert_eq!(table.look_up(key(1), 311), None);
        table.learn(key(1), 3, QUOTA, 20);
        assert_eq!(table.look_up(key(1), 320), Some(3));
        assert_eq!(table.look_up(Key::new(2, 0x0200_0000_0001), 20), None);
        let address = MacAddress::new([2, 0, 0, 0, 0, 1]);
        assert_eq!(table.dump(25), [(1, address, 3, 20)]);
        table.forget(3);
        assert_eq!(table.look_up(key(1), 20), None);
        assert_eq!(*table.counts, [0; 4]);
    }

    #[test]
    fn a_forger_fills_its_own_quota_only() {
        let mut table = Table::new(2, 300);
        for number in 0..QUOTA {
            table.learn(key(number), 0, QUOTA, 0);
        }
        for number in 0..50_000 {
            table.learn(key(0x0100_0000 + number), 1, QUOTA, 1);
        }
        let known = (0..QUOTA).filter(|&number| table.look_up(key(number), 1) == Some(0));
        assert_eq!(known.count(), 256);
        assert!(table.counts[1] <= QUOTA);
    }

    #[test]
    fn what_is_too_old_makes_room() {
        let mut table = Table::new(1, 300);
        for number in 0..QUOTA {
            table.learn(key(number), 0, QUOTA, 0);
        }
        assert_eq!(table.learn(key(5000), 0, QUOTA, 300), Learnt::Full);
        // Each refusal sweeps a few places.
        let tries = (0..10_000).find(|_| table.learn(key(5000), 0, QUOTA, 301) == Learnt::Known);
        assert!(tries.is_some_and(|tries| tries < PLACES / WAYS));
    }

    #[test]
    fn a_full_table_of_all_ports_finds_room() {
        let mut table = Table::new(32, 300);
        let lessons = (0..32 * QUOTA).map(|number| {
            let port = u16::try_from(number / QUOTA).unwrap();
            table.learn(key(number), port, QUOTA, 0)
        });
        let refused = lessons.filter(|&learnt| learnt == Learnt::Full).count();
        assert!(refused < 32, "{refused} of {}", 32 * QUOTA);
    }

    proptest! {
        /// Whatever comes: an address that is found is behind the port that it was last learnt from, counts are those of the
        /// entries, and none passes its quota.
        #[test]
        fn it_never_lies(
            steps in prop::collection::vec((0..60_u32, 0..4_u16, 0..50_u32, 0..20_u8), 1..200),
        ) {
            const FEW: u32 = 8;
            let mut table = Table::of_size(4, 100, 64);
            let mut model = HashMap::new();
            let mut now = 0;
            for (number, port, pause, action) in steps {
                now += pause;
                match action {
                    0 => {
                        table.forget(port);
                        model.retain(|_, &mut (at, _)| at != port);
                    }
                    1..10 if table.learn(key(number), port, FEW, now) == Learnt::Known => {
                        model.insert(number, (port, now));
                    }
                    _ => {}
                }
                let expected = model
                    .get(&number)
                    .filter(|&&(_, seen)| now - seen <= 100)
                    .map(|&(at, _)| at);
                prop_assert_eq!(table.look_up(key(number), now), expected);
                let counted = |at: u16| {
                    let entries = table.entries.iter().filter(|e| e.key != Key::default());
                    u32::try_from(entries.filter(|e| e.port == at).count()).unwrap()
                };
                for at in 0..4 {
                    prop_assert_eq!(table.counts[usize::from(at)], counted(at));
                    prop_assert!(counted(at) <= FEW);
                }
            }
        }
    }
}

//! Limits of a card's rates, or of a port's: packets and bytes in a second, from the driver and for it.
//!
//! Each is a bucket of tokens ([`Bucket`]). What the driver sends waits in its ring until there are enough; what comes for it
//! waits in the link, or is dropped where it has left that already.

use std::array;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use ringside_control::{ApiError, ErrorCode, Size};
use serde_json::Value;

use super::tx::MAX_FRAME;
use crate::shell::{Bucket, NamedRates, StateError};

/// Names of a card's limits: of what its driver sends, and of what that gets. Those of a port begin with them.
pub(super) const NAMES: [&str; 4] = ["tx-packets", "tx-bytes", "rx-packets", "rx-bytes"];

/// Limits of a card.
pub(super) type CardRates = NamedRates<{ NAMES.len() }>;
/// The buckets of a card, which all its queue pairs share.
pub(super) type CardLimits = Limits<{ NAMES.len() }>;

/// Bytes that a packet has at most.
const LONGEST_PACKET: u64 = MAX_FRAME as u64;

/// How long something waits at most until limits are asked again, in nanoseconds: they may have been changed meanwhile.
pub(super) const LONGEST_WAIT: u64 = 100_000_000;

/// How long to sleep, in milliseconds, if something waits until that time; both are in nanoseconds.
pub(super) fn sleep_until(until: u64, now: u64) -> i32 {
    let wait = Duration::from_nanos(until.saturating_sub(now)).as_millis();
    i32::try_from(wait).map_or(i32::MAX, |wait| wait.saturating_add(1))
}

/// The buckets of limits whose names begin as [`NAMES`] do.
#[derive(Debug)]
pub(super) struct Limits<const N: usize> {
    names: &'static [&'static str; N],
    buckets: [Bucket; N],
    /// There is one for what the driver sends; for what it gets.
    active: [AtomicBool; 2],
}

/// What is limited.
#[derive(Debug, Clone, Copy)]
enum Way {
    Tx,
    Rx,
}

/// What the packets that a driver sends in a turn are subject to.
pub(super) trait Measure: Copy {
    /// There are limits: without them, nothing of what follows is left in the program.
    const LIMITS: bool;

    /// Lets a packet of the driver pass, or says until when it waits, in nanoseconds.
    fn take_tx(self, bytes: u64) -> Result<(), u64>;

    /// Packets that were let pass have not, with so many bytes.
    fn give_back_tx(self, packets: u64, bytes: u64);
}

/// Nothing.
#[derive(Clone, Copy)]
pub(super) struct Unlimited;

impl Measure for Unlimited {
    const LIMITS: bool = false;

    fn take_tx(self, _bytes: u64) -> Result<(), u64> {
        Ok(())
    }

    fn give_back_tx(self, _packets: u64, _bytes: u64) {}
}

/// A card's limits, at a time in nanoseconds.
#[derive(Clone, Copy)]
pub(super) struct Limited<'l> {
    limits: &'l CardLimits,
    now: u64,
}

impl Limited<'_> {
    fn until(self, wait: u64) -> u64 {
        self.now.saturating_add(wait.min(LONGEST_WAIT))
    }

    /// Takes what up to `most` packets for the driver cost, or says until when they wait. How long they are is not known before:
    /// it is enough for the longest ones; a single one may be on credit.
    pub(super) fn reserve_rx(self, most: u32) -> Result<Reserved, u64> {
        let Some((of_packets, of_bytes)) = self.limits.of(Way::Rx) else {
            return Ok(Reserved {
                packets: most,
                bytes: 0,
            });
        };
        let until = |wait| self.until(wait);
        let there = of_packets.take_some(most.into(), self.now).map_err(until)?;
        let most_bytes = there.saturating_mul(LONGEST_PACKET);
        let bytes = of_bytes.take_some(most_bytes, self.now).map_err(|wait| {
            of_packets.give_back(there);
            until(wait)
        })?;
        let packets = there.min(bytes / LONGEST_PACKET).max(1);
        of_packets.give_back(there.saturating_sub(packets));
        let packets = u32::try_from(packets).unwrap_or(most);
        Ok(Reserved { packets, bytes })
    }

    /// So many packets for the driver have passed of those that were reserved.
    pub(super) fn settle_rx(self, reserved: Reserved, packets: u64, bytes: u64) {
        let Some((of_packets, of_bytes)) = self.limits.of(Way::Rx) else {
            return;
        };
        of_packets.settle(reserved.packets.into(), packets, self.now);
        of_bytes.settle(reserved.bytes, bytes, self.now);
    }
}

/// What packets for a driver may cost.
#[derive(Debug, Clone, Copy)]
pub(super) struct Reserved {
    pub(super) packets: u32,
    bytes: u64,
}

impl Measure for Limited<'_> {
    const LIMITS: bool = true;

    fn take_tx(self, bytes: u64) -> Result<(), u64> {
        let taken = self.limits.take_tx(bytes, self.now);
        taken.map_err(|wait| self.until(wait))
    }

    fn give_back_tx(self, packets: u64, bytes: u64) {
        if let Some((of_packets, of_bytes)) = self.limits.of(Way::Tx) {
            of_packets.give_back(packets);
            of_bytes.give_back(bytes);
        }
    }
}

impl CardLimits {
    /// For a turn that begins at the time `now` in nanoseconds.
    pub(super) fn at(&self, now: u64) -> Limited<'_> {
        Limited { limits: self, now }
    }
}

impl<const N: usize> Limits<N> {
    /// None yet.
    pub(super) fn new(names: &'static [&'static str; N]) -> Self {
        Self {
            names,
            buckets: array::from_fn(|_| Bucket::default()),
            active: Default::default(),
        }
    }

    /// Goes by these from now on.
    pub(super) fn set(&self, rates: NamedRates<N>) {
        let rates = rates.all();
        for (bucket, rate) in self.buckets.iter().zip(rates) {
            bucket.set(rate);
        }
        for (active, rates) in self.active.iter().zip(rates.chunks(2)) {
            active.store(rates.iter().any(Option::is_some), Ordering::Relaxed);
        }
    }

    /// Those that hold.
    pub(super) fn get(&self) -> NamedRates<N> {
        let mut buckets = self.buckets.iter();
        let rates = array::from_fn(|_| buckets.next().and_then(Bucket::get));
        NamedRates::of(self.names, rates)
    }

    /// Changes them by name, as somebody asked for, and gives those that hold.
    ///
    /// # Errors
    /// They cannot be.
    pub(super) fn change(&self, changes: &BTreeMap<String, Size>) -> Result<Value, ApiError> {
        let rates = self.get().with(changes);
        let rates = rates.map_err(|error| ApiError::new(ErrorCode::BadRequest, &error))?;
        self.set(rates);
        Ok(rates.to_json())
    }

    /// Goes on from those of another program, and from how far they were used up.
    ///
    /// # Errors
    /// [`StateError`]
    pub(super) fn adopt(
        &self,
        rates: &BTreeMap<String, Size>,
        levels: [u64; N],
    ) -> Result<(), StateError> {
        let rates = NamedRates::new(self.names).with(rates);
        self.set(rates.map_err(|error| StateError::Misfit(error.to_string()))?);
        self.set_levels(levels);
        Ok(())
    }

    /// How far they are used up, for another program.
    pub(super) fn levels(&self) -> [u64; N] {
        self.buckets.each_ref().map(Bucket::full_at)
    }

    fn set_levels(&self, levels: [u64; N]) {
        for (bucket, level) in self.buckets.iter().zip(levels) {
            bucket.set_full_at(level);
        }
    }

    pub(super) fn buckets(&self) -> &[Bucket; N] {
        &self.buckets
    }

    const HAS_FOUR: () = assert!(N >= NAMES.len());

    /// Those of packets, and of bytes.
    fn of(&self, way: Way) -> Option<(&Bucket, &Bucket)> {
        let () = Self::HAS_FOUR;
        match (way, self.buckets.as_slice()) {
            (Way::Tx, [packets, bytes, ..]) | (Way::Rx, [_, _, packets, bytes, ..]) => {
                Some((packets, bytes))
            }
            _ => None,
        }
    }

    fn take(&self, way: Way, bytes: u64, now: u64) -> Result<(), u64> {
        let Some((of_packets, of_bytes)) = self.of(way) else {
            return Ok(());
        };
        of_packets.take(1, now)?;
        of_bytes.take(bytes, now).inspect_err(|_| {
            of_packets.give_back(1);
        })
    }

    /// There are limits of what the driver sends.
    #[inline]
    pub(super) fn of_tx(&self) -> bool {
        self.active[0].load(Ordering::Relaxed)
    }

    /// There are limits of what it gets.
    #[inline]
    pub(super) fn of_rx(&self) -> bool {
        self.active[1].load(Ordering::Relaxed)
    }

    /// Lets a packet of the driver pass at the time `now` in nanoseconds, or says in how many nanoseconds to ask again.
    pub(super) fn take_tx(&self, bytes: u64, now: u64) -> Result<(), u64> {
        self.take(Way::Tx, bytes, now)
    }

    /// Lets a packet for the driver pass, or not.
    pub(super) fn take_rx(&self, bytes: u64, now: u64) -> bool {
        self.take(Way::Rx, bytes, now).is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: u64 = 1_000_000_000;

    fn limits(rates: &[(&str, u64)]) -> CardLimits {
        let rates = rates
            .iter()
            .map(|&(name, rate)| (name.to_owned(), Size(rate)));
        let limits = CardLimits::new(&NAMES);
        let changes: BTreeMap<_, _> = rates.collect();
        limits.set(CardRates::new(&NAMES).with(&changes).unwrap());
        limits
    }

    #[test]
    fn a_packet_needs_tokens_of_both_kinds() {
        let limits = limits(&[("tx-packets", 10), ("tx-bytes", 1000)]);
        assert!(limits.of_tx() && !limits.of_rx());
        // A burst is a tenth of a second's.
        assert_eq!(limits.take_tx(50, SECOND), Ok(()));
        let wait = limits.take_tx(50, SECOND).unwrap_err();
        assert_eq!(limits.take_tx(50, SECOND + wait), Ok(()));
        // What was taken for nothing is there again.
        limits.at(SECOND + wait).give_back_tx(1, 50);
        assert_eq!(limits.take_tx(50, SECOND + wait), Ok(()));
        assert!(limits.take_rx(1 << 30, SECOND), "it has no limits");
    }

    #[test]
    fn a_packet_whose_length_is_not_known_passes_on_credit() {
        let limits = limits(&[("rx-bytes", 1000)]);
        let reserved = limits.at(SECOND).reserve_rx(32).unwrap();
        assert_eq!(reserved.packets, 1);
        limits.at(SECOND).settle_rx(reserved, 1, 1100);
        // A hundred were there; a thousand come in a second.
        let until = limits.at(SECOND).reserve_rx(32).unwrap_err();
        assert_eq!(until, SECOND + LONGEST_WAIT);
        let nearly = limits.at(2 * SECOND - 1).reserve_rx(32);
        assert!(nearly.is_err_and(|until| until <= 2 * SECOND + SECOND / 500));
        assert!(limits.at(2 * SECOND + SECOND / 500).reserve_rx(32).is_ok());
    }

    #[test]
    fn packets_for_the_driver_are_reserved_by_the_longest() {
        let limits = limits(&[("rx-packets", 1000), ("rx-bytes", 10_000_000)]);
        // A burst is a hundred packets and a million bytes: half of them are seven of the longest.
        let some = limits.at(SECOND).reserve_rx(128).unwrap();
        assert_eq!(some.packets, 7);
        // Others need not wait meanwhile.
        let others = limits.at(SECOND).reserve_rx(128).unwrap();
        assert_eq!(others.packets, 3);
        limits.at(SECOND).settle_rx(others, 0, 0);
        // What was not spent is there again.
        limits.at(SECOND).settle_rx(some, 7, 7 * 64);
        let again = limits.at(SECOND).reserve_rx(128).unwrap();
        assert_eq!(again.packets, 7);
        limits.at(SECOND).settle_rx(again, 0, 0);
        for _ in 0..93 {
            let one = limits.at(SECOND).reserve_rx(1).unwrap();
            limits.at(SECOND).settle_rx(one, 1, 64);
        }
        assert!(limits.at(SECOND).reserve_rx(1).is_err());
    }
}

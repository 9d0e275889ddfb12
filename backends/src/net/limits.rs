//! Limits of a card's rates, or of a port's: packets and bytes in a second, from the driver and for it.
//!
//! Each is a bucket of tokens ([`Bucket`]). What the driver sends waits in its ring until there are enough; what comes for it
//! waits in the link, or is dropped where it has left that already.

use std::array;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::shell::{Bucket, NamedRates};

/// Names of a card's limits: of what its driver sends, and of what that gets.
pub(super) const NAMES: [&str; 4] = ["tx-packets", "tx-bytes", "rx-packets", "rx-bytes"];

/// Limits of a card.
pub(super) type CardRates = NamedRates<{ NAMES.len() }>;
/// The buckets of a card, which all its queue pairs share.
pub(super) type CardLimits = Limits<{ NAMES.len() }>;

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

/// A ring, or a side of it, that its limits make wait.
#[derive(Debug, Default)]
pub(super) struct Throttled(Option<u64>);

impl Throttled {
    /// It waits from `now` on for so many nanoseconds.
    pub(super) fn begin(&mut self, now: u64, wait: u64) {
        self.0 = Some(now.saturating_add(wait.min(LONGEST_WAIT)));
    }

    /// Until when it waits, in nanoseconds.
    pub(super) fn until(&self) -> Option<u64> {
        self.0
    }

    /// It waits no longer, if that was until now. Returns whether it was.
    pub(super) fn end(&mut self, now: u64) -> bool {
        self.0.take_if(|until| *until <= now).is_some()
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

    /// How far they are used up, for another program.
    pub(super) fn levels(&self) -> [u64; N] {
        self.buckets.each_ref().map(Bucket::full_at)
    }

    pub(super) fn set_levels(&self, levels: [u64; N]) {
        for (bucket, level) in self.buckets.iter().zip(levels) {
            bucket.set_full_at(level);
        }
    }

    pub(super) fn buckets(&self) -> &[Bucket; N] {
        &self.buckets
    }

    /// Those of packets, and of bytes.
    fn of(&self, way: Way) -> Option<(&Bucket, &Bucket)> {
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

    /// Packets that were let pass have not, with so many bytes.
    pub(super) fn give_back_tx(&self, packets: u64, bytes: u64) {
        if let Some((of_packets, of_bytes)) = self.of(Way::Tx) {
            of_packets.give_back(packets);
            of_bytes.give_back(bytes);
        }
    }

    /// Lets a packet for the driver pass, or not.
    pub(super) fn take_rx(&self, bytes: u64, now: u64) -> bool {
        self.take(Way::Rx, bytes, now).is_ok()
    }

    /// Whether the next packet for the driver may pass, however long it is, or in how many nanoseconds to ask again.
    pub(super) fn may_rx(&self, now: u64) -> Result<(), u64> {
        let Some((of_packets, of_bytes)) = self.of(Way::Rx) else {
            return Ok(());
        };
        of_packets.has_any(now).and_then(|()| of_bytes.has_any(now))
    }

    /// A packet for the driver has passed.
    pub(super) fn charge_rx(&self, bytes: u64, now: u64) {
        if let Some((of_packets, of_bytes)) = self.of(Way::Rx) {
            of_packets.charge(1, now);
            of_bytes.charge(bytes, now);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ringside_control::Size;
    use std::collections::BTreeMap;

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
        limits.give_back_tx(1, 50);
        assert_eq!(limits.take_tx(50, SECOND + wait), Ok(()));
        assert!(limits.take_rx(1 << 30, SECOND), "it has no limits");
    }

    #[test]
    fn a_packet_whose_length_is_not_known_passes_on_credit() {
        let limits = limits(&[("rx-bytes", 1000)]);
        assert_eq!(limits.may_rx(SECOND), Ok(()));
        limits.charge_rx(1100, SECOND);
        // A hundred were there; a thousand come in a second.
        let wait = limits.may_rx(SECOND).unwrap_err();
        assert!(wait > SECOND && wait <= SECOND + SECOND / 500, "{wait}");
        assert_eq!(limits.may_rx(SECOND + wait), Ok(()));
    }
}

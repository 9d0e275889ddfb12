//! Limits of a disk's rates: operations and bytes in a second, of all requests, of reads, and of writes.
//!
//! Each limit is a bucket that holds `burst` tokens and gets `rate` of them each second. A request takes one token for itself
//! from those of operations, and one for each byte that it moves from those of bandwidth; without enough tokens it stays in
//! the ring. One that is larger than a bucket waits until the bucket is full, and leaves it in debt.
//!
//! All queues of the disk share the buckets, without a lock: a bucket is one number, the time at which it will be full again.

use std::array;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};

use ringside_control::{Metrics, Size, metrics};
use serde_json::Value;

pub use crate::shell::LimitError;
use crate::shell::{Bucket, NamedRates, Rate};

/// Names of the limits: of all requests, of reads, of all others; operations, then bytes.
const NAMES: [&str; 6] = [
    "iops",
    "read-iops",
    "write-iops",
    "bandwidth",
    "read-bandwidth",
    "write-bandwidth",
];
/// How many there are.
pub(super) const COUNT: usize = NAMES.len();
/// Which of them a request is subject to: its operation by the first half, its bytes by the second.
const OF_READS: [usize; 4] = [0, 1, 3, 4];
const OF_WRITES: [usize; 4] = [0, 2, 3, 5];

/// The limits that a user has set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RateLimits(NamedRates<{ NAMES.len() }>);

impl Default for RateLimits {
    fn default() -> Self {
        Self(NamedRates::new(&NAMES))
    }
}

impl RateLimits {
    /// Reads `KEY=VALUE,...`.
    ///
    /// # Errors
    /// [`LimitError`]
    pub fn parse(text: &str) -> Result<Self, LimitError> {
        NamedRates::new(&NAMES).parse(text).map(Self)
    }

    /// These, and what is changed: a rate sets its burst, too, unless that is given as well; a rate of 0 takes the limit away.
    ///
    /// # Errors
    /// [`LimitError`]
    pub(super) fn with(self, changes: &BTreeMap<String, Size>) -> Result<Self, LimitError> {
        self.0.with(changes).map(Self)
    }

    /// As they are written.
    pub(super) fn to_json(self) -> Value {
        self.0.to_json()
    }

    /// As metrics.
    pub(super) fn metrics(self, page: &mut Metrics) {
        let name = "ringside_block_limit";
        let help = "Operations or bytes allowed in a second.";
        page.begin(name, metrics::Kind::Gauge, help);
        for (key, Rate { rate, .. }) in self.0.iter() {
            page.sample(name, &[("limit", &key)], rate);
        }
    }
}

/// The buckets of a disk.
#[derive(Debug, Default)]
pub(super) struct Throttle {
    /// There is a limit.
    active: AtomicBool,
    buckets: [Bucket; NAMES.len()],
}

impl Throttle {
    /// Goes by these limits from now on. One thread does so at a time.
    pub(super) fn set(&self, limits: RateLimits) {
        for (bucket, limit) in self.buckets.iter().zip(limits.0.all()) {
            bucket.set(limit);
        }
        let any = limits.0.iter().next().is_some();
        self.active.store(any, Ordering::Relaxed);
    }

    /// The limits that hold.
    pub(super) fn limits(&self) -> RateLimits {
        let mut buckets = self.buckets.iter();
        let rates = array::from_fn(|_| buckets.next().and_then(Bucket::get));
        RateLimits(NamedRates::of(&NAMES, rates))
    }

    /// When the buckets will be full, by the clock of requests: for another program.
    pub(super) fn levels(&self) -> [u64; NAMES.len()] {
        self.buckets.each_ref().map(Bucket::full_at)
    }

    /// The buckets are as empty as those of another program.
    pub(super) fn set_levels(&self, levels: [u64; NAMES.len()]) {
        for (bucket, level) in self.buckets.iter().zip(levels) {
            bucket.set_full_at(level);
        }
    }

    /// There are limits to ask for.
    #[inline]
    pub(super) fn active(&self) -> bool {
        self.active.load(Ordering::Relaxed)
    }

    /// Takes what a request needs, at the time `now` in nanoseconds. Without success nothing is taken, and there may be enough
    /// after so many nanoseconds.
    pub(super) fn take(&self, write: bool, bytes: u64, now: u64) -> Result<(), u64> {
        let needs = |at: usize| if at < NAMES.len() / 2 { 1 } else { bytes };
        let subject = if write { OF_WRITES } else { OF_READS };
        for (taken, &at) in subject.iter().enumerate() {
            let Some(bucket) = self.buckets.get(at) else {
                continue;
            };
            if let Err(wait) = bucket.take(needs(at), now) {
                for &at in subject.iter().take(taken) {
                    if let Some(bucket) = self.buckets.get(at) {
                        bucket.give_back(needs(at));
                    }
                }
                return Err(wait);
            }
        }
        Ok(())
    }

    /// Takes bytes of a write that is under way already, if need be on credit.
    pub(super) fn charge(&self, bytes: u64, now: u64) {
        let (_, of_bytes) = OF_WRITES.split_at(OF_WRITES.len() / 2);
        for bucket in of_bytes.iter().filter_map(|&at| self.buckets.get(at)) {
            bucket.charge(bytes, now);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    const SECOND: u64 = 1_000_000_000;

    fn throttle(text: &str) -> Throttle {
        let throttle = Throttle::default();
        throttle.set(RateLimits::parse(text).unwrap());
        throttle
    }

    #[test]
    fn limits_are_written_by_name_and_bursts_follow_them() {
        let limits = RateLimits::parse("iops=1000,iops-burst=5,read-bandwidth=10M").unwrap();
        let written = json!({
            "iops": 1000, "iops-burst": 5,
            "read-bandwidth": 10 << 20, "read-bandwidth-burst": 1 << 20,
        });
        assert_eq!(limits.to_json(), written);
        let change = |key: &str, value| BTreeMap::from([(key.to_owned(), Size(value))]);
        let changed = limits.with(&change("iops", 7)).unwrap();
        assert_eq!(changed.to_json()["iops-burst"], 1);
        assert_eq!(changed.to_json()["read-bandwidth"], 10 << 20);
        let gone = limits.with(&change("iops", 0)).unwrap();
        assert_eq!(gone.to_json().get("iops"), None);
        assert_eq!(
            gone.with(&change("iops-burst", 1)),
            Err(LimitError::Burst { key: "iops" })
        );
        for wrong in [
            "",
            "1000",
            "iops",
            "iops=x",
            "speed=1",
            "iops=1,iops=2",
            "-burst=1",
        ] {
            assert!(RateLimits::parse(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn without_limits_nothing_is_asked_for() {
        let throttle = throttle("iops=1");
        assert!(throttle.active());
        throttle.set(RateLimits::default());
        assert!(!throttle.active());
        for _ in 0..1000 {
            assert_eq!(throttle.take(true, u64::MAX, 0), Ok(()));
        }
    }

    #[test]
    fn a_bucket_is_full_at_first_and_fills_with_time() {
        let throttle = throttle("iops=100,iops-burst=3");
        for _ in 0..3 {
            assert_eq!(throttle.take(false, 0, SECOND), Ok(()));
        }
        assert_eq!(throttle.take(false, 0, SECOND), Err(10_000_000));
        assert_eq!(throttle.take(false, 0, SECOND + 9_999_999), Err(1));
        assert_eq!(throttle.take(false, 0, SECOND + 10_000_000), Ok(()));
        // It holds no more than its burst.
        for _ in 0..3 {
            assert_eq!(throttle.take(false, 0, 100 * SECOND), Ok(()));
        }
        assert!(throttle.take(false, 0, 100 * SECOND).is_err());
    }

    #[test]
    fn reads_and_writes_have_limits_of_their_own() {
        let throttle = throttle("read-iops=1,write-bandwidth=1000,write-bandwidth-burst=1000");
        assert_eq!(throttle.take(false, 4096, 0), Ok(()));
        assert_eq!(throttle.take(false, 4096, 0), Err(SECOND));
        assert_eq!(throttle.take(true, 1000, 0), Ok(()));
        assert_eq!(throttle.take(true, 500, 0), Err(SECOND / 2));
        assert_eq!(throttle.take(true, 0, 0), Ok(()));
    }

    #[test]
    fn what_is_larger_than_the_bucket_passes_when_it_is_full() {
        let throttle = throttle("bandwidth=1000,bandwidth-burst=100");
        assert_eq!(throttle.take(true, 5000, 0), Ok(()));
        assert_eq!(throttle.take(true, 1, 0), Err(4_901_000_000));
        assert_eq!(throttle.take(true, 5000, 0), Err(5 * SECOND));
        assert_eq!(throttle.take(true, 5000, 5 * SECOND), Ok(()));
    }

    #[test]
    fn what_is_refused_by_one_bucket_takes_nothing_from_the_others() {
        let throttle = throttle("iops=10,iops-burst=2,bandwidth=1000,bandwidth-burst=1000");
        assert_eq!(throttle.take(true, 1000, 0), Ok(()));
        for _ in 0..10 {
            assert!(throttle.take(true, 1000, 0).is_err());
        }
        // Of the two operations one is left.
        assert_eq!(throttle.take(false, 0, 0), Ok(()));
        assert!(throttle.take(false, 0, 0).is_err());
    }

    #[test]
    fn what_is_charged_later_is_lacking_then() {
        let throttle = throttle("write-bandwidth=1000,write-bandwidth-burst=1000,iops=5");
        throttle.charge(3000, 0);
        assert_eq!(throttle.take(true, 1000, 0), Err(3 * SECOND));
        assert_eq!(throttle.take(false, 1000, 0), Ok(()));
    }

    #[test]
    fn a_limit_that_changes_begins_with_a_full_bucket() {
        let throttle = throttle("iops=1,iops-burst=1");
        assert_eq!(throttle.take(true, 0, 0), Ok(()));
        assert!(throttle.take(true, 0, 0).is_err());
        throttle.set(throttle.limits());
        assert!(throttle.take(true, 0, 0).is_err(), "it did not change");
        throttle.set(RateLimits::parse("iops=2,iops-burst=1").unwrap());
        assert_eq!(throttle.take(true, 0, 0), Ok(()));
    }

    #[test]
    fn queues_together_get_no_more_than_one() {
        let throttle = throttle("iops=1000,iops-burst=500");
        let granted: usize = std::thread::scope(|scope| {
            let workers: Vec<_> = (0..4)
                .map(|_| {
                    let take = || throttle.take(true, 4096, 7).is_ok();
                    scope.spawn(move || (0..1000).filter(|_| take()).count())
                })
                .collect();
            workers.into_iter().map(|w| w.join().unwrap()).sum()
        });
        assert_eq!(granted, 500);
    }
}

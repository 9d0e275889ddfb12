//! Limits of a disk's rates: operations and bytes in a second, of all requests, of reads, and of writes.
//!
//! Each limit is a bucket that holds `burst` tokens and gets `rate` of them each second. A request takes one token for itself
//! from those of operations, and one for each byte that it moves from those of bandwidth; without enough tokens it stays in
//! the ring. One that is larger than a bucket waits until the bucket is full, and leaves it in debt.
//!
//! All queues of the disk share the buckets, without a lock: a bucket is one number, the time at which it will be full again.

use std::array;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use ringside_control::options::keys_and_values;
use ringside_control::{Metrics, Size, metrics};
use serde_json::{Map, Value};
use thiserror::Error;

const NANOSECONDS: u64 = 1_000_000_000;
/// How much of a second's tokens a bucket holds unless the user says otherwise.
const BURST_SHARE: u64 = 10;
/// What makes the key of a burst of that of a rate.
const BURST: &str = "-burst";

/// Names of the limits: of all requests, of reads, of all others; operations, then bytes.
const NAMES: [&str; 6] = [
    "iops",
    "read-iops",
    "write-iops",
    "bandwidth",
    "read-bandwidth",
    "write-bandwidth",
];
/// Which of them a request is subject to: its operation by the first half, its bytes by the second.
const OF_READS: [usize; 4] = [0, 1, 3, 4];
const OF_WRITES: [usize; 4] = [0, 2, 3, 5];

/// Limits that cannot be.
#[derive(Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum LimitError {
    /// A key that is none.
    #[error("there is no limit `{key}`: use {}, or one of them with {BURST}", NAMES.join(", "))]
    Unknown {
        /// The key.
        key: String,
    },
    /// A burst of nothing.
    #[error("{key}{BURST} is of no use without {key}: give both")]
    Burst {
        /// The key that is missing.
        key: &'static str,
    },
    /// Text that is no list of limits.
    #[error("{0}")]
    Text(String),
}

/// Tokens in a second, and how many a bucket holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Rate {
    rate: u64,
    burst: u64,
}

/// The limits that a user has set.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RateLimits([Option<Rate>; NAMES.len()]);

impl RateLimits {
    /// Reads `KEY=VALUE,...`.
    ///
    /// # Errors
    /// [`LimitError`]
    pub fn parse(text: &str) -> Result<Self, LimitError> {
        let read = || -> Result<BTreeMap<String, Size>, String> {
            let pairs = keys_and_values(text, None)?.into_iter();
            let sizes = pairs.map(|(key, value)| value.parse().map(|size| (key, size)));
            sizes.collect()
        };
        Self::default().with(&read().map_err(LimitError::Text)?)
    }

    /// These, and what is changed: a rate sets its burst, too, unless that is given as well; a rate of 0 takes the limit away.
    ///
    /// # Errors
    /// [`LimitError`]
    pub(super) fn with(mut self, changes: &BTreeMap<String, Size>) -> Result<Self, LimitError> {
        let known = |key: &String| NAMES.contains(&key.strip_suffix(BURST).unwrap_or(key));
        if let Some(key) = changes.keys().find(|key| !known(key)) {
            return Err(LimitError::Unknown { key: key.clone() });
        }
        for (key, limit) in NAMES.into_iter().zip(&mut self.0) {
            if let Some(&Size(rate)) = changes.get(key) {
                let burst = (rate / BURST_SHARE).max(1);
                *limit = (rate > 0).then_some(Rate { rate, burst });
            }
            if let Some(&Size(burst)) = changes.get(&format!("{key}{BURST}")) {
                limit.as_mut().ok_or(LimitError::Burst { key })?.burst = burst;
            }
        }
        Ok(self)
    }

    /// As they are written.
    pub(super) fn to_json(self) -> Value {
        let mut object = Map::new();
        for (key, limit) in NAMES.into_iter().zip(self.0) {
            if let Some(Rate { rate, burst }) = limit {
                object.insert(key.to_owned(), rate.into());
                object.insert(format!("{key}{BURST}"), burst.into());
            }
        }
        object.into()
    }

    /// As metrics.
    pub(super) fn metrics(self, page: &mut Metrics) {
        let name = "ringside_block_limit";
        let help = "Operations or bytes allowed in a second.";
        page.begin(name, metrics::Kind::Gauge, help);
        for (key, limit) in NAMES.into_iter().zip(self.0) {
            if let Some(Rate { rate, .. }) = limit {
                page.sample(name, &[("limit", &key)], rate);
            }
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
        for (bucket, limit) in self.buckets.iter().zip(limits.0) {
            bucket.set(limit.unwrap_or(Rate { rate: 0, burst: 0 }));
        }
        let any = limits.0.iter().any(Option::is_some);
        self.active.store(any, Ordering::Relaxed);
    }

    /// The limits that hold.
    pub(super) fn limits(&self) -> RateLimits {
        let mut buckets = self.buckets.iter();
        RateLimits(array::from_fn(|_| buckets.next().and_then(Bucket::get)))
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

/// One limit, in a cache line of its own.
#[derive(Debug, Default)]
#[repr(align(64))]
struct Bucket {
    /// Tokens in a second; 0: no limit.
    rate: AtomicU64,
    /// Tokens that it holds.
    burst: AtomicU64,
    /// When it will be full, in nanoseconds.
    full_at: AtomicU64,
}

/// How long so many tokens take to come, in nanoseconds, rounded up: never too many come.
fn time_of(tokens: u64, rate: u64) -> u64 {
    let time = u128::from(tokens).saturating_mul(NANOSECONDS.into());
    u64::try_from(time.div_ceil(rate.max(1).into())).unwrap_or(u64::MAX)
}

impl Bucket {
    fn set(&self, limit: Rate) {
        let Rate { rate, burst } = limit;
        if self.get() == (rate > 0).then_some(limit) {
            return;
        }
        self.rate.store(rate, Ordering::Relaxed);
        self.burst.store(burst, Ordering::Relaxed);
        self.full_at.store(0, Ordering::Relaxed);
    }

    fn get(&self) -> Option<Rate> {
        let (rate, burst) = (
            self.rate.load(Ordering::Relaxed),
            self.burst.load(Ordering::Relaxed),
        );
        (rate > 0).then_some(Rate { rate, burst })
    }

    fn take(&self, tokens: u64, now: u64) -> Result<(), u64> {
        let Some(Rate { rate, burst }) = self.get().filter(|_| tokens > 0) else {
            return Ok(());
        };
        let cost = time_of(tokens, rate);
        // What it may lack afterwards: all that it holds, or what this one request takes from it when it is full.
        let lack = time_of(burst, rate).max(cost);
        let latest = now.saturating_add(lack);
        // Relaxed: nothing but the number itself is told to the others.
        let taken = self
            .full_at
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |full_at| {
                let full_at = full_at.max(now).saturating_add(cost);
                (full_at <= latest).then_some(full_at)
            });
        match taken {
            Ok(_) => Ok(()),
            Err(full_at) => Err(full_at.saturating_add(cost).saturating_sub(latest).max(1)),
        }
    }

    fn charge(&self, tokens: u64, now: u64) {
        self.change(tokens, |full_at, cost| {
            full_at.max(now).saturating_add(cost)
        });
    }

    fn give_back(&self, tokens: u64) {
        self.change(tokens, u64::saturating_sub);
    }

    /// Changes `full_at` by what so many tokens cost, if there is a limit.
    fn change(&self, tokens: u64, change: impl Fn(u64, u64) -> u64) {
        let Some(Rate { rate, .. }) = self.get() else {
            return;
        };
        let cost = time_of(tokens, rate);
        // The update never declines.
        let _ = self
            .full_at
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |full_at| {
                Some(change(full_at, cost))
            });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    const SECOND: u64 = NANOSECONDS;

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

    proptest! {
        /// Over any span of time: no more than its rate gives in it, and a burst.
        #[test]
        fn no_more_than_rate_and_burst(
            rate in 1..10_000_000_u64,
            burst in 0..100_000_u64,
            steps in prop::collection::vec((0..5_000_000_u64, 0..200_000_u64), 1..60),
        ) {
            let bucket = Bucket::default();
            bucket.set(Rate { rate, burst });
            let (mut now, mut granted) = (0, Vec::new());
            for (pause, tokens) in steps {
                now += pause;
                if bucket.take(tokens, now).is_ok() {
                    granted.push((now, tokens));
                }
            }
            for (first, &(start, _)) in granted.iter().enumerate() {
                let (mut sum, mut largest) = (0, burst);
                for &(end, tokens) in &granted[first..] {
                    sum += u128::from(tokens);
                    largest = largest.max(tokens);
                    let come = u128::from(rate) * u128::from(end - start) / u128::from(SECOND);
                    prop_assert!(sum <= come + u128::from(largest) + 1, "{sum} in {} ns", end - start);
                }
            }
        }

        /// Who waits as long as he was told gets what he asked for, if nobody else comes in between.
        #[test]
        fn waiting_is_worth_it(
            rate in 1..10_000_000_u64,
            burst in 0..100_000_u64,
            wishes in prop::collection::vec(1..200_000_u64, 1..20),
        ) {
            let bucket = Bucket::default();
            bucket.set(Rate { rate, burst });
            let mut now = 0;
            for tokens in wishes {
                if let Err(wait) = bucket.take(tokens, now) {
                    prop_assert!(wait > 0);
                    now += wait;
                    prop_assert_eq!(bucket.take(tokens, now), Ok(()));
                }
            }
        }
    }
}

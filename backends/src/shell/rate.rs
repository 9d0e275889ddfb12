//! Limits of rates: buckets of tokens, and their names and values as users write them.
//!
//! A bucket holds `burst` tokens and gets `rate` of them each second. What is larger than a bucket waits until that is full,
//! and leaves it in debt. Threads share a bucket without a lock: it is one number, the time at which it will be full again.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};

use ringside_control::Size;
use ringside_control::options::keys_and_values;
use serde_json::{Map, Value};
use thiserror::Error;

const NANOSECONDS: u64 = 1_000_000_000;
/// How much of a second's tokens a bucket holds unless the user says otherwise.
const BURST_SHARE: u64 = 10;
/// What makes the key of a burst of that of a rate.
const BURST: &str = "-burst";

/// Limits that cannot be.
#[derive(Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum LimitError {
    /// A key that is none.
    #[error("there is no limit `{key}`: use {}, or one of them with {BURST}", .names.join(", "))]
    Unknown {
        /// The key.
        key: String,
        /// Those there are.
        names: &'static [&'static str],
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
pub struct Rate {
    /// Tokens in a second, not 0.
    pub rate: u64,
    /// Tokens that a bucket holds.
    pub burst: u64,
}

/// Limits that a user can set, by name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NamedRates<const N: usize> {
    names: &'static [&'static str; N],
    rates: [Option<Rate>; N],
}

impl<const N: usize> NamedRates<N> {
    /// None of them.
    #[must_use]
    pub const fn new(names: &'static [&'static str; N]) -> Self {
        Self::of(names, [None; N])
    }

    /// These.
    #[must_use]
    pub const fn of(names: &'static [&'static str; N], rates: [Option<Rate>; N]) -> Self {
        Self { names, rates }
    }

    /// These, and what is changed: a rate sets its burst, too, unless that is given as well; a rate of 0 takes the limit away.
    ///
    /// # Errors
    /// [`LimitError`]
    pub fn with(mut self, changes: &BTreeMap<String, Size>) -> Result<Self, LimitError> {
        let names = self.names;
        let known = |key: &String| names.contains(&key.strip_suffix(BURST).unwrap_or(key));
        if let Some(key) = changes.keys().find(|key| !known(key)) {
            let key = key.clone();
            return Err(LimitError::Unknown { key, names });
        }
        for (key, limit) in names.iter().zip(&mut self.rates) {
            if let Some(&Size(rate)) = changes.get(*key) {
                let burst = (rate / BURST_SHARE).max(1);
                *limit = (rate > 0).then_some(Rate { rate, burst });
            }
            if let Some(&Size(burst)) = changes.get(&format!("{key}{BURST}")) {
                limit.as_mut().ok_or(LimitError::Burst { key })?.burst = burst;
            }
        }
        Ok(self)
    }

    /// These, and what a text of KEY=VALUE,... changes.
    ///
    /// # Errors
    /// [`LimitError`]
    pub fn parse(self, text: &str) -> Result<Self, LimitError> {
        let read = || -> Result<BTreeMap<String, Size>, String> {
            let pairs = keys_and_values(text, None)?.into_iter();
            let sizes = pairs.map(|(key, value)| value.parse().map(|size| (key, size)));
            sizes.collect()
        };
        self.with(&read().map_err(LimitError::Text)?)
    }

    /// Those that are set.
    pub fn iter(&self) -> impl Iterator<Item = (&'static str, Rate)> {
        let all = self.names.iter().zip(self.rates);
        all.filter_map(|(name, rate)| Some((*name, rate?)))
    }

    /// All, in the order of their names.
    #[must_use]
    pub const fn all(&self) -> [Option<Rate>; N] {
        self.rates
    }

    /// As they are written.
    #[must_use]
    pub fn to_json(&self) -> Value {
        let mut object = Map::new();
        for (key, Rate { rate, burst }) in self.iter() {
            object.insert(key.to_owned(), rate.into());
            object.insert(format!("{key}{BURST}"), burst.into());
        }
        object.into()
    }
}

/// One limit, in a cache line of its own.
#[derive(Debug, Default)]
#[repr(align(64))]
pub struct Bucket {
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
    /// Goes by this limit from now on; without one it has all tokens there are. One thread does so at a time.
    pub fn set(&self, limit: Option<Rate>) {
        let Rate { rate, burst } = limit.unwrap_or(Rate { rate: 0, burst: 0 });
        if self.get() == limit.filter(|limit| limit.rate > 0) {
            return;
        }
        self.rate.store(rate, Ordering::Relaxed);
        self.burst.store(burst, Ordering::Relaxed);
        self.full_at.store(0, Ordering::Relaxed);
    }

    /// Its limit.
    pub fn get(&self) -> Option<Rate> {
        let (rate, burst) = (
            self.rate.load(Ordering::Relaxed),
            self.burst.load(Ordering::Relaxed),
        );
        (rate > 0).then_some(Rate { rate, burst })
    }

    /// When it will be full, in nanoseconds: how far it is emptied.
    #[must_use]
    pub fn full_at(&self) -> u64 {
        self.full_at.load(Ordering::Relaxed)
    }

    /// It is emptied as far as another one was, by the same clock.
    pub fn set_full_at(&self, full_at: u64) {
        self.full_at.store(full_at, Ordering::Relaxed);
    }

    /// Takes tokens at the time `now` in nanoseconds.
    ///
    /// # Errors
    /// Nothing is taken, and there may be enough after so many nanoseconds.
    pub fn take(&self, tokens: u64, now: u64) -> Result<(), u64> {
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

    /// Takes up to half of the tokens that there are, one at least and `most` at most, and says how many. The other half is for
    /// others, who need not wait for what may be given back in a moment.
    ///
    /// # Errors
    /// There is none, and may be one after so many nanoseconds.
    pub fn take_some(&self, most: u64, now: u64) -> Result<u64, u64> {
        let Some(Rate { rate, burst }) = self.get() else {
            return Ok(most);
        };
        let full_at = self.full_at().max(now);
        let left = now
            .saturating_add(time_of(burst, rate))
            .saturating_sub(full_at);
        let there = u128::from(left).saturating_mul(rate.into()) / u128::from(NANOSECONDS);
        let half = u64::try_from(there / 2).unwrap_or(u64::MAX);
        let tokens = half.min(most).max(1);
        // Somebody else may take some in between.
        match self.take(tokens, now) {
            Err(_) if tokens > 1 => self.take(1, now).map(|()| 1),
            taken => taken.map(|()| tokens),
        }
    }

    /// Takes tokens that were spent already, if need be on credit.
    pub fn charge(&self, tokens: u64, now: u64) {
        self.change(tokens, |full_at, cost| {
            full_at.max(now).saturating_add(cost)
        });
    }

    /// Of tokens that were taken so many were spent: others are given back, and what is missing is on credit.
    pub fn settle(&self, taken: u64, spent: u64, now: u64) {
        match spent.checked_sub(taken) {
            Some(0) => {}
            Some(missing) => self.charge(missing, now),
            None => self.give_back(taken.saturating_sub(spent)),
        }
    }

    /// Gives back what was taken for nothing.
    pub fn give_back(&self, tokens: u64) {
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

    const SECOND: u64 = NANOSECONDS;

    proptest! {
        /// Over any span of time: no more than its rate gives in it, and a burst.
        #[test]
        fn no_more_than_rate_and_burst(
            rate in 1..10_000_000_u64,
            burst in 0..100_000_u64,
            steps in prop::collection::vec((0..5_000_000_u64, 0..200_000_u64), 1..60),
        ) {
            let bucket = Bucket::default();
            bucket.set(Some(Rate { rate, burst }));
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

        /// Half of what is there is taken, and no more than is wanted.
        #[test]
        fn some_are_half_of_what_is_there(
            rate in 1..10_000_000_u64,
            burst in 1..100_000_u64,
            spent in 0..200_000_u64,
            pause in 0..1_000_000_000_u64,
            most in 1..200_000_u64,
        ) {
            let bucket = Bucket::default();
            bucket.set(Some(Rate { rate, burst }));
            bucket.charge(spent, 0);
            match bucket.take_some(most, pause) {
                Ok(tokens) => {
                    prop_assert!(tokens >= 1 && tokens <= most);
                    let half = tokens == most || bucket.take(tokens + 2, pause).is_err();
                    prop_assert!(half, "{tokens} were less than half");
                    // Times are rounded up.
                    let others = tokens == 1 || bucket.take(tokens - 1, pause).is_ok();
                    prop_assert!(others, "{tokens} were more than half");
                }
                Err(wait) => prop_assert!(bucket.take_some(most, pause + wait).is_ok()),
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
            bucket.set(Some(Rate { rate, burst }));
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

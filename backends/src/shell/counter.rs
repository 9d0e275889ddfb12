//! A number that a worker counts and others read.

use std::sync::atomic::{AtomicU64, Ordering};

use serde_json::{Map, Value};

/// A number that one thread changes and others may read.
#[derive(Debug, Default)]
pub struct Counter {
    own: AtomicU64,
    /// What the program counted whose place this one has taken: apart, as another thread learns of it.
    before: AtomicU64,
}

impl Counter {
    /// Adds to the number. Only the thread that owns it does so, hence no atomic addition.
    #[inline]
    pub fn add(&self, count: u64) {
        let own = self.own.load(Ordering::Relaxed);
        self.set(own.wrapping_add(count));
    }

    /// Replaces the number: for those that also go down.
    #[inline]
    pub fn set(&self, value: u64) {
        self.own.store(value, Ordering::Relaxed);
    }

    /// The number.
    #[inline]
    #[must_use]
    pub fn get(&self) -> u64 {
        let own = self.own.load(Ordering::Relaxed);
        own.wrapping_add(self.before.load(Ordering::Relaxed))
    }
}

/// Counters by name, for a program that takes the place of this one.
pub(crate) fn to_json<'c, N: Into<String>>(
    counters: impl IntoIterator<Item = (N, &'c Counter)>,
) -> Value {
    let named = counters.into_iter();
    let named = named.map(|(name, counter)| (name.into(), counter.get().into()));
    Value::Object(named.collect::<Map<_, _>>())
}

/// Counters go on from where another program's were, of those that it has, too.
pub(crate) fn go_on<'c, N: AsRef<str>>(
    counters: impl IntoIterator<Item = (N, &'c Counter)>,
    from: &Value,
) {
    for (name, counter) in counters {
        if let Some(count) = from.get(name.as_ref()).and_then(Value::as_u64) {
            counter.before.store(count, Ordering::Relaxed);
        }
    }
}

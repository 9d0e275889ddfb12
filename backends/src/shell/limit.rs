//! Keeps a guest, or a front-end, from filling the host's log.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Allows a burst of messages for each interval and counts the ones it held back. Clones share one allowance, so
/// that what is logged about a ring stays limited when the driver sets it up again and again.
#[derive(Debug, Clone)]
pub struct LogLimit {
    interval: Duration,
    burst: u32,
    state: Arc<Mutex<State>>,
}

#[derive(Debug, Default)]
struct State {
    since: Option<Instant>,
    allowed: u32,
    suppressed: u64,
}

impl LogLimit {
    /// A limit of `burst` messages for each `interval`.
    #[must_use]
    pub fn new(burst: u32, interval: Duration) -> Self {
        Self {
            interval,
            burst,
            state: Arc::default(),
        }
    }

    /// Whether a message may be logged now: then the number of messages held back since the last one.
    #[must_use]
    pub fn check(&self) -> Option<u64> {
        self.check_at(Instant::now())
    }

    fn check_at(&self, now: Instant) -> Option<u64> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let fresh = state
            .since
            .is_none_or(|since| now.saturating_duration_since(since) >= self.interval);
        if fresh {
            state.since = Some(now);
            state.allowed = 0;
        }
        if state.allowed >= self.burst {
            state.suppressed = state.suppressed.saturating_add(1);
            return None;
        }
        state.allowed = state.allowed.saturating_add(1);
        Some(std::mem::take(&mut state.suppressed))
    }
}

impl Default for LogLimit {
    /// Five messages in ten seconds: enough to see what is wrong, too few to fill a disk.
    fn default() -> Self {
        Self::new(5, Duration::from_secs(10))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn allows_a_burst_then_counts_what_it_holds_back() {
        let limit = LogLimit::new(2, Duration::from_secs(10));
        let start = Instant::now();
        assert_eq!(limit.check_at(start), Some(0));
        assert_eq!(limit.clone().check_at(start), Some(0));
        assert_eq!(limit.check_at(start), None);
        assert_eq!(limit.check_at(start + Duration::from_secs(9)), None);
        assert_eq!(limit.check_at(start + Duration::from_secs(10)), Some(2));
        assert_eq!(limit.check_at(start + Duration::from_secs(11)), Some(0));
        assert_eq!(limit.check_at(start + Duration::from_secs(12)), None);
    }
}

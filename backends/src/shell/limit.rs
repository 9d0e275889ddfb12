//! Keeps a guest from filling the host's log.

use std::time::{Duration, Instant};

/// Allows a burst of messages for each interval and counts the ones it held back.
#[derive(Debug)]
pub struct LogLimit {
    interval: Duration,
    burst: u32,
    since: Option<Instant>,
    allowed: u32,
    suppressed: u64,
}

impl LogLimit {
    /// A limit of `burst` messages for each `interval`.
    #[must_use]
    pub const fn new(burst: u32, interval: Duration) -> Self {
        Self {
            interval,
            burst,
            since: None,
            allowed: 0,
            suppressed: 0,
        }
    }

    /// Whether a message may be logged now: then the number of messages held back since the last one.
    pub fn check(&mut self) -> Option<u64> {
        self.check_at(Instant::now())
    }

    fn check_at(&mut self, now: Instant) -> Option<u64> {
        let fresh = self
            .since
            .is_none_or(|since| now.saturating_duration_since(since) >= self.interval);
        if fresh {
            self.since = Some(now);
            self.allowed = 0;
        }
        if self.allowed >= self.burst {
            self.suppressed = self.suppressed.saturating_add(1);
            return None;
        }
        self.allowed = self.allowed.saturating_add(1);
        Some(std::mem::take(&mut self.suppressed))
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
        let mut limit = LogLimit::new(2, Duration::from_secs(10));
        let start = Instant::now();
        assert_eq!(limit.check_at(start), Some(0));
        assert_eq!(limit.check_at(start), Some(0));
        assert_eq!(limit.check_at(start), None);
        assert_eq!(limit.check_at(start + Duration::from_secs(9)), None);
        assert_eq!(limit.check_at(start + Duration::from_secs(10)), Some(2));
        assert_eq!(limit.check_at(start + Duration::from_secs(11)), Some(0));
        assert_eq!(limit.check_at(start + Duration::from_secs(12)), None);
    }
}

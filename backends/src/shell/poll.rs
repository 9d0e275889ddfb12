//! When to look again and again in place of going to sleep: the adaptive poll window of a worker.
//!
//! A worker that has nothing to do can sleep, and costs a wake-up when something comes, or spin for a while, and costs that
//! while. It spins only as long as its recent waits say that something is about to come, and never longer than the
//! window's limit; with a limit of what a wake-up costs, spinning is at worst as dear as what it saves. Waits that are longer
//! than the limit make the window shrink to nothing, so that an idle device sleeps and nothing wakes it. And however badly the
//! guesses go, those that failed take no more than a share of the time.
//!
//! ```text
//!            a wait ended while spinning: the window is right
//!            ┌──────┐
//!  ┌─────┐   ▼      │    ┌──────────────────────────────────────────┐
//!  │ off │──────▶ spin ──┤ in vain, and the wait was within the limit: twice the window
//!  └─────┘ a wait   ▲    │ in vain, and it was longer: half of it, in the end off
//!    ▲     within   └────┤
//!    └───── the limit    └──────────────────────────────────────────┘
//! ```

use std::time::Duration;

/// The window to begin with, and the least that is worth it.
const FIRST: Duration = Duration::from_micros(2);
/// How much of failed spinning can be saved up for, if the window is not longer.
const MOST_CREDIT: Duration = Duration::from_millis(1);

/// The user's wishes; without any, nothing spins.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct PollLimits {
    /// Longest window; zero for none.
    pub(crate) window: Duration,
    /// Most that failed spinning may take of the time, in percent.
    pub(crate) budget: u32,
}

impl PollLimits {
    /// Enough for the longest window to be lost once.
    fn most_credit(self) -> Duration {
        MOST_CREDIT.max(self.window)
    }
}

/// The window of one worker.
#[derive(Debug)]
pub(crate) struct PollWindow {
    limits: PollLimits,
    /// For how long to spin; zero when the window is off.
    window: Duration,
    /// Time that may still be lost.
    credit: Duration,
}

impl PollWindow {
    pub(crate) fn new(limits: PollLimits) -> Self {
        Self {
            limits,
            window: Duration::ZERO,
            credit: limits.most_credit(),
        }
    }

    /// For how long to spin now; zero: sleep at once.
    pub(crate) fn now(&self) -> Duration {
        if self.credit < self.window {
            return Duration::ZERO;
        }
        self.window
    }

    /// Something came while spinning, `after` so much time.
    pub(crate) fn hit(&mut self, after: Duration) {
        self.earn(after);
    }

    /// Something came after `waited`, of which `spun` went to spinning in vain.
    pub(crate) fn slept(&mut self, waited: Duration, spun: Duration) {
        let limit = self.limits.window;
        if limit.is_zero() {
            return;
        }
        self.credit = self.credit.saturating_sub(spun);
        self.earn(waited);
        self.window = if waited <= limit {
            self.window.saturating_mul(2).clamp(FIRST.min(limit), limit)
        } else if self.window > FIRST {
            self.window / 2
        } else {
            Duration::ZERO
        };
    }

    /// The share of the time that passed is there to be lost.
    fn earn(&mut self, passed: Duration) {
        let share = passed.saturating_mul(self.limits.budget) / 100;
        self.credit = self
            .credit
            .saturating_add(share)
            .min(self.limits.most_credit());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn us(n: u64) -> Duration {
        Duration::from_micros(n)
    }

    fn window(limit: u64, budget: u32) -> PollWindow {
        PollWindow::new(PollLimits {
            window: us(limit),
            budget,
        })
    }

    #[test]
    fn grows_while_waits_are_short_and_stays_within_its_limit() {
        let mut w = window(10, 100);
        assert_eq!(w.now(), us(0));
        for expected in [2, 4, 8, 10, 10] {
            w.slept(us(9), us(0));
            assert_eq!(w.now(), us(expected));
        }
        w.hit(us(5));
        assert_eq!(w.now(), us(10));
    }

    #[test]
    fn long_waits_put_it_out() {
        let mut w = window(16, 100);
        for _ in 0..5 {
            w.slept(us(10), us(0));
        }
        let mut spun = us(0);
        for _ in 0..10 {
            spun += w.now();
            w.slept(us(1_000_000), w.now());
        }
        assert_eq!(w.now(), us(0));
        assert_eq!(spun, us(16 + 8 + 4 + 2));
    }

    #[test]
    fn the_longest_window_is_spun() {
        let mut w = window(10_000, 100);
        for _ in 0..20 {
            w.slept(us(10_000), us(0));
        }
        assert_eq!(w.now(), us(10_000));
    }

    #[test]
    fn without_a_limit_it_never_spins() {
        let mut w = window(0, 100);
        w.slept(us(0), us(0));
        assert_eq!(w.now(), us(0));
    }

    /// Whatever comes when, what was lost is within the share of all time, and what was saved up before.
    #[test]
    fn failed_spinning_is_bounded() {
        let mut w = window(50, 10);
        let (mut lost, mut all) = (us(0), us(0));
        for _ in 0..100_000 {
            // Just too late each time, the worst that can be.
            let spin = w.now();
            let waited = us(50).max(spin);
            w.slept(waited, spin);
            lost += spin;
            all += waited;
        }
        assert!(lost <= all / 10 + MOST_CREDIT, "{lost:?} of {all:?}");
        assert!(lost > all / 11, "{lost:?} of {all:?}");
    }
}

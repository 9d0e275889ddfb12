//! What a queue has done so far.
//!
//! The worker of a queue alone writes its numbers, others read them whenever they like: no lock, and no atomic addition.
//! Time is read once in a turn of the worker's loop, so that a request costs a few additions; what it measures is from the
//! turn that took a request to the turn that saw its end.

use std::sync::Arc;
use std::time::Duration;

use ringside_control::Metrics;
use ringside_control::metrics::Kind as Metric;
use serde_json::{Map, Value, json};

use super::request::Status;
use crate::shell::{Counter, counters_go_on, counters_to_json};

/// What a request asks for, as far as it is told apart in the numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Read,
    Write,
    Flush,
    Discard,
    WriteZeroes,
    SecureErase,
    /// A report on zones, or a change of one.
    Zone,
    /// The serial number, or what is refused without a look at the disk.
    Other,
}

/// Their names, in order.
const KINDS: [&str; 8] = [
    "read",
    "write",
    "flush",
    "discard",
    "write-zeroes",
    "secure-erase",
    "zone",
    "other",
];
/// Names of what a request can end with, other than success: a status (VIRTIO 1.3, 5.2.6; those about zones are one), or no
/// answer as there is no place for one.
const ERRORS: [&str; 4] = ["io", "unsupported", "zone", "malformed"];
/// Bounds of latencies: one microsecond, and twice that again and again, up to 8.4 seconds; then all others.
const BUCKETS: usize = 24;

/// The time of CLOCK_MONOTONIC: limits go by it from one program to the next.
#[derive(Debug, Clone, Copy)]
pub(super) struct Clock;

impl Clock {
    /// In nanoseconds.
    #[inline]
    pub(super) fn now(self) -> u64 {
        crate::shell::now()
    }
}

/// How long requests took.
#[derive(Debug, Default)]
struct Histogram {
    /// Those up to each bound that are above the one before, and those above all of them.
    counts: [Counter; BUCKETS + 1],
    /// In nanoseconds.
    sum: Counter,
}

impl Histogram {
    #[inline]
    fn add(&self, nanoseconds: u64) {
        if let Some(count) = self.counts.get(bucket(nanoseconds)) {
            count.add(1);
        }
        self.sum.add(nanoseconds);
    }

    /// Each bound in nanoseconds, and how many took so long or less.
    fn cumulative(&self) -> impl Iterator<Item = (Option<u64>, u64)> + '_ {
        let bounds = (0..BUCKETS).map(|at| Some(1000 << at)).chain([None]);
        let sums = self.counts.iter().scan(0_u64, |sum, count| {
            *sum = sum.wrapping_add(count.get());
            Some(*sum)
        });
        bounds.zip(sums)
    }

    fn count(&self) -> u64 {
        self.cumulative().last().map_or(0, |(_, count)| count)
    }
}

/// The first bound that is not less.
#[inline]
fn bucket(nanoseconds: u64) -> usize {
    let above = nanoseconds.div_ceil(1000).saturating_sub(1);
    let bits = above.checked_ilog2().map_or(0, |log| log.saturating_add(1));
    usize::try_from(bits).unwrap_or(BUCKETS).min(BUCKETS)
}

/// The numbers of one queue, in cache lines that no other queue writes to.
#[derive(Debug, Default)]
#[repr(align(128))]
pub(super) struct QueueStats {
    requests: [Counter; KINDS.len()],
    /// Of those that succeeded.
    bytes: [Counter; KINDS.len()],
    errors: [Counter; ERRORS.len()],
    reads: Histogram,
    writes: Histogram,
    /// Requests that were taken and are not answered.
    pub(super) in_flight: Counter,
    /// Interrupts sent.
    pub(super) notifications: Counter,
    /// Interrupts that the driver did not want.
    pub(super) suppressed: Counter,
    /// Kicks seen.
    pub(super) kicks: Counter,
    /// System calls that entered the io_uring.
    pub(super) enters: Counter,
    /// Turns of the worker's loop.
    pub(super) turns: Counter,
    /// Turns that left requests waiting because of a limit.
    pub(super) throttled: Counter,
}

impl QueueStats {
    /// A request is answered. `took` is in nanoseconds.
    #[inline]
    pub(super) fn answered(&self, kind: Kind, bytes: u64, status: Status, took: u64) {
        let at = kind as usize;
        if let Some(count) = self.requests.get(at) {
            count.add(1);
        }
        match kind {
            Kind::Read => self.reads.add(took),
            Kind::Write => self.writes.add(took),
            _ => {}
        }
        match status {
            Status::Ok => {
                if let Some(sum) = self.bytes.get(at) {
                    sum.add(bytes);
                }
            }
            Status::IoError => self.failed(0),
            Status::Unsupported => self.failed(1),
            Status::ZoneInvalidCommand
            | Status::ZoneUnalignedWritePointer
            | Status::ZoneOpenResource
            | Status::ZoneActiveResource => self.failed(2),
        }
    }

    /// A chain came that cannot be answered.
    pub(super) fn malformed(&self) {
        self.failed(3);
    }

    fn failed(&self, at: usize) {
        if let Some(count) = self.errors.get(at) {
            count.add(1);
        }
    }

    /// Requests that were answered, and chains that could not be.
    pub(super) fn total(&self) -> u64 {
        let malformed = self.errors.last().map_or(0, Counter::get);
        sum(&self.requests).wrapping_add(malformed)
    }

    fn to_json(&self) -> Value {
        let Self {
            requests,
            bytes,
            errors,
            reads,
            writes,
            in_flight: _,
            notifications: _,
            suppressed: _,
            kicks: _,
            enters: _,
            turns: _,
            throttled: _,
        } = self;
        let latency = |histogram: &Histogram| {
            let buckets: Vec<_> = histogram
                .cumulative()
                .map(|(bound, count)| json!([bound.map(|ns| ns / 1000), count]))
                .collect();
            json!({
                "count": histogram.count(),
                "sum-microseconds": histogram.sum.get() / 1000,
                "up-to-microseconds": buckets,
            })
        };
        let mut value = json!({
            "requests": named(&KINDS, requests),
            "bytes": named(&KINDS, bytes),
            "errors": named(&ERRORS, errors),
            "latency": { "read": latency(reads), "write": latency(writes) },
            "in-flight": self.in_flight.get(),
        });
        if let Some(object) = value.as_object_mut() {
            for (name, _, counter) in self.events() {
                object.insert(name.replace('_', "-"), counter.get().into());
            }
        }
        value
    }

    /// All that only grows, by name.
    fn all(&self) -> impl Iterator<Item = (String, &Counter)> {
        let Self {
            requests,
            bytes,
            errors,
            reads,
            writes,
            in_flight: _,
            notifications: _,
            suppressed: _,
            kicks: _,
            enters: _,
            turns: _,
            throttled: _,
        } = self;
        let by_name = [
            ("requests", &KINDS[..], &requests[..]),
            ("bytes", &KINDS, bytes),
            ("errors", &ERRORS, errors),
        ];
        let by_name = by_name.into_iter().flat_map(|(what, names, counters)| {
            let counters = names.iter().zip(counters);
            counters.map(move |(name, counter)| (format!("{what}-{name}"), counter))
        });
        let latencies = [("reads", reads), ("writes", writes)];
        let latencies = latencies.into_iter().flat_map(|(what, histogram)| {
            let sum = (format!("{what}-sum"), &histogram.sum);
            let counts = (0..).zip(&histogram.counts);
            let counts = counts.map(move |(at, count): (u32, _)| (format!("{what}-{at}"), count));
            counts.chain([sum])
        });
        let events = self.events().into_iter();
        let events = events.map(|(name, _, counter)| (name.to_owned(), counter));
        by_name.chain(latencies).chain(events)
    }

    /// For another program.
    pub(super) fn handed(&self) -> Value {
        counters_to_json(self.all())
    }

    /// The numbers go on from where those of another program were.
    pub(super) fn go_on(&self, from: &Value) {
        counters_go_on(self.all(), from);
    }

    /// What happened to the queue as a whole: name, description, count.
    fn events(&self) -> [(&'static str, &'static str, &Counter); 6] {
        [
            (
                "notifications",
                "Interrupts sent to the driver.",
                &self.notifications,
            ),
            (
                "notifications_suppressed",
                "Interrupts that the driver did not want.",
                &self.suppressed,
            ),
            ("kicks", "Kicks of the driver.", &self.kicks),
            (
                "io_uring_enters",
                "System calls that entered the io_uring.",
                &self.enters,
            ),
            ("turns", "Turns of the worker's loop.", &self.turns),
            (
                "throttled",
                "Turns that left requests waiting because of a limit.",
                &self.throttled,
            ),
        ]
    }
}

fn sum(counters: &[Counter]) -> u64 {
    counters
        .iter()
        .fold(0, |sum, counter| sum.wrapping_add(counter.get()))
}

fn named(names: &[&str], counters: &[Counter]) -> Value {
    let pairs = names.iter().zip(counters);
    pairs
        .map(|(name, counter)| ((*name).to_owned(), counter.get().into()))
        .collect::<Map<_, _>>()
        .into()
}

/// The numbers of all queues as JSON.
pub(super) fn to_json(queues: &[Arc<QueueStats>]) -> Value {
    queues.iter().map(|queue| queue.to_json()).collect()
}

/// The same as metrics.
pub(super) fn metrics(queues: &[Arc<QueueStats>], page: &mut Metrics) {
    type Counters = fn(&QueueStats) -> &[Counter];
    let families: [(&str, &str, &str, &[&str], Counters); 3] = [
        (
            "ringside_block_requests_total",
            "Requests that were answered.",
            "operation",
            &KINDS,
            |queue| &queue.requests,
        ),
        (
            "ringside_block_bytes_total",
            "Bytes of requests that succeeded.",
            "operation",
            &KINDS,
            |queue| &queue.bytes,
        ),
        (
            "ringside_block_errors_total",
            "Requests that did not succeed.",
            "status",
            &ERRORS,
            |queue| &queue.errors,
        ),
    ];
    for (name, help, label, names, counters) in families {
        page.begin(name, Metric::Counter, help);
        for (queue, stats) in queues.iter().enumerate() {
            for (what, counter) in names.iter().zip(counters(stats)) {
                page.sample(name, &[("queue", &queue), (label, what)], counter.get());
            }
        }
    }
    latencies(queues, page);
    let name = "ringside_block_in_flight";
    page.begin(name, Metric::Gauge, "Requests taken and not yet answered.");
    for (queue, stats) in queues.iter().enumerate() {
        page.sample(name, &[("queue", &queue)], stats.in_flight.get());
    }
    let descriptions = QueueStats::default();
    for (at, (event, help, _)) in descriptions.events().into_iter().enumerate() {
        let name = format!("ringside_block_{event}_total");
        page.begin(&name, Metric::Counter, help);
        for (queue, stats) in queues.iter().enumerate() {
            if let Some((_, _, counter)) = stats.events().get(at) {
                page.sample(&name, &[("queue", &queue)], counter.get());
            }
        }
    }
}

fn latencies(queues: &[Arc<QueueStats>], page: &mut Metrics) {
    let name = "ringside_block_request_duration_seconds";
    let help = "Time from taking a request to answering it.";
    let seconds = |ns: u64| Duration::from_nanos(ns).as_secs_f64();
    page.begin(name, Metric::Histogram, help);
    for (queue, stats) in queues.iter().enumerate() {
        for (operation, histogram) in [("read", &stats.reads), ("write", &stats.writes)] {
            let mut all = 0;
            for (bound, count) in histogram.cumulative() {
                let bound = bound.map_or("+Inf".to_owned(), |ns| seconds(ns).to_string());
                page.sample(
                    &format!("{name}_bucket"),
                    &[("queue", &queue), ("operation", &operation), ("le", &bound)],
                    count,
                );
                all = count;
            }
            let labels: ringside_control::metrics::Labels<'_> =
                &[("queue", &queue), ("operation", &operation)];
            page.sample(&format!("{name}_sum"), labels, seconds(histogram.sum.get()));
            page.sample(&format!("{name}_count"), labels, all);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn latencies_are_sorted_by_powers_of_two_of_microseconds() {
        for (ns, at) in [
            (0, 0),
            (1, 0),
            (1000, 0),
            (1001, 1),
            (2000, 1),
            (2001, 2),
            (4000, 2),
            (4001, 3),
            (1000 << 23, 23),
            ((1000 << 23) + 1, 24),
            (u64::MAX, 24),
        ] {
            assert_eq!(bucket(ns), at, "{ns}");
        }
    }

    #[test]
    fn answers_are_counted_where_they_belong() {
        let queue = Arc::new(QueueStats::default());
        queue.answered(Kind::Read, 4096, Status::Ok, 1500);
        queue.answered(Kind::Read, 4096, Status::IoError, 3000);
        queue.answered(Kind::Write, 512, Status::Ok, 999);
        queue.answered(Kind::Discard, 0, Status::Unsupported, 0);
        queue.answered(Kind::Write, 512, Status::ZoneUnalignedWritePointer, 999);
        queue.malformed();
        assert_eq!(queue.total(), 6);
        let json = queue.to_json();
        assert_eq!(json["requests"]["read"], 2);
        assert_eq!(json["bytes"]["read"], 4096);
        assert_eq!(json["bytes"]["write"], 512);
        assert_eq!(
            json["errors"],
            json!({"io": 1, "unsupported": 1, "zone": 1, "malformed": 1})
        );
        let read = &json["latency"]["read"];
        assert_eq!(
            (&read["count"], &read["sum-microseconds"]),
            (&json!(2), &json!(4))
        );
        assert_eq!(read["up-to-microseconds"][0], json!([1, 0]));
        assert_eq!(read["up-to-microseconds"][1], json!([2, 1]));
        assert_eq!(read["up-to-microseconds"][2], json!([4, 2]));
        assert_eq!(read["up-to-microseconds"][24], json!([null, 2]));
        let mut page = Metrics::default();
        metrics(&[queue], &mut page);
        let text = page.into_text();
        for line in [
            "ringside_block_requests_total{queue=\"0\",operation=\"read\"} 2",
            "ringside_block_errors_total{queue=\"0\",status=\"malformed\"} 1",
            "# TYPE ringside_block_request_duration_seconds histogram",
            "ringside_block_request_duration_seconds_bucket{queue=\"0\",operation=\"read\",le=\"0.000002\"} 1",
            "ringside_block_request_duration_seconds_bucket{queue=\"0\",operation=\"read\",le=\"+Inf\"} 2",
            "ringside_block_request_duration_seconds_sum{queue=\"0\",operation=\"read\"} 0.0000045",
            "ringside_block_request_duration_seconds_count{queue=\"0\",operation=\"write\"} 2",
            "ringside_block_turns_total{queue=\"0\"} 0",
        ] {
            assert!(text.lines().any(|l| l == line), "{line}\n{text}");
        }
    }
}

//! The options of `ringside-load`.

use std::ops::Range;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, ValueEnum};
use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;
use ringside_control::Size;

use super::error::LoadError;

pub(super) const EXAMPLES: &str = "\
Examples:
  Random reads of 4 KiB, 32 at a time, for one second:
    ringside-load --socket-path /tmp/disk.sock

  Sequential writes of 128 KiB on two queues, threads on processors 0 and 2:
    ringside-load --socket-path /tmp/disk.sock --shape write --block-size 128K \\
      --depth 16 --queues 2 --cpus 0,2

  What was written is read back and compared, for ten seconds, then all of it:
    ringside-load --socket-path /tmp/disk.sock --shape randrw --verify \\
      --length 64M --seconds 10

  Frames of 64 bytes from a network card, as fast as its back-end takes them:
    ringside-load net --socket-path /tmp/net.sock --direction tx --frame 64

Writing shapes overwrite the disk.

Exit status: 0 all requests succeeded, 1 something failed, 2 wrong usage.";

/// Up to this depth each request is timed.
const SHALLOW: u16 = 8;
/// Beyond it, one of so many.
const SAMPLE: u32 = 16;

/// Where requests go and what they do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Shape {
    /// Sequential reads
    Read,
    /// Sequential writes
    Write,
    /// Reads at random places
    Randread,
    /// Writes at random places
    Randwrite,
    /// Both at random places; see --mix
    Randrw,
}

impl Shape {
    /// Name as on the command line, which is fio's, too.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Write => "write",
            Self::Randread => "randread",
            Self::Randwrite => "randwrite",
            Self::Randrw => "randrw",
        }
    }
}

/// How a queue's thread learns of completions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Completions {
    /// It sleeps until the back-end writes the call eventfd, as a guest with interrupts does
    Eventfd,
    /// It looks at the used ring all the time, as a polling driver does
    Polling,
}

/// Whose driver puts the requests into the ring.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Driver {
    /// That of this project's rings
    Ringside,
    /// The crate virtio-driver, which libblkio is built on; no verification
    VirtioDriver,
}

/// Options of the load.
#[derive(Debug, Clone, Args)]
pub struct LoadArgs {
    /// Unix socket that the back-end listens on
    #[arg(long, value_name = "PATH")]
    pub socket_path: PathBuf,

    /// Whose driver to use
    #[arg(long, value_enum, default_value = "ringside")]
    pub front_end: Driver,

    /// What the requests do
    #[arg(long, value_enum, default_value = "randread")]
    pub shape: Shape,

    /// Share of reads of `--shape randrw`, in percent
    #[arg(long, value_name = "PERCENT", default_value_t = 70, value_parser = clap::value_parser!(u8).range(0..=100))]
    pub mix: u8,

    /// Bytes of each request, a multiple of 512 (K, M, G are powers of 1024)
    #[arg(long, value_name = "SIZE", default_value = "4K", value_parser = parse_size)]
    pub block_size: u64,

    /// Requests in flight on each queue
    #[arg(long, value_name = "N", default_value_t = 32, value_parser = clap::value_parser!(u16).range(1..=4096))]
    pub depth: u16,

    /// Queues, each with a thread of its own
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=64))]
    pub queues: u16,

    /// Entries of each virtqueue: a power of two [default: 256, or what the depth needs]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(2..=32768))]
    pub queue_size: Option<u16>,

    /// How completions are noticed
    #[arg(long, value_enum, default_value = "eventfd")]
    pub completions: Completions,

    /// Do not negotiate VIRTIO_F_EVENT_IDX
    #[arg(long)]
    pub no_event_idx: bool,

    /// Do not negotiate VIRTIO_F_INDIRECT_DESC: three descriptors for each request
    #[arg(long)]
    pub no_indirect: bool,

    /// Packed virtqueues (VIRTIO_F_RING_PACKED)
    #[arg(long)]
    pub packed: bool,

    /// Buffers are used in order (VIRTIO_F_IN_ORDER)
    #[arg(long)]
    pub in_order: bool,

    /// How long to measure
    #[arg(long, value_name = "SECONDS", default_value_t = 1.0, value_parser = parse_seconds)]
    pub seconds: f64,

    /// How long to load before measuring
    #[arg(long, value_name = "SECONDS", default_value_t = 0.2, value_parser = parse_seconds)]
    pub warm_up: f64,

    /// Do this many requests in all, and measure all of them, in place of a time
    #[arg(
        long,
        value_name = "N",
        conflicts_with = "seconds",
        conflicts_with = "warm_up"
    )]
    pub count: Option<u64>,

    /// First byte of the disk to use
    #[arg(long, value_name = "SIZE", default_value = "0", value_parser = parse_size)]
    pub start: u64,

    /// Bytes of the disk to use [default: to its end]
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub length: Option<u64>,

    /// Fill each block with its place and the number of its write, compare what is read, and read all of it again in the end
    #[arg(long)]
    pub verify: bool,

    /// Processors for the threads, in turn
    #[arg(long, value_name = "N,N,...", value_delimiter = ',')]
    pub cpus: Vec<usize>,

    /// Guest memory of huge pages (hugetlbfs; see /proc/sys/vm/nr_hugepages)
    #[arg(long)]
    pub huge_pages: bool,

    /// Process of the back-end, whose processor time and context switches are counted while measuring
    #[arg(long, value_name = "PID")]
    pub watch: Option<u32>,

    /// Stay connected this long after the result, with nothing in flight
    #[arg(long, value_name = "SECONDS", default_value_t = 0.0, value_parser = parse_seconds)]
    pub linger: f64,

    /// Print the result as JSON
    #[arg(long)]
    pub json: bool,
}

impl LoadArgs {
    /// Checks that the options fit each other.
    pub(super) fn check(&self) -> Result<(), LoadError> {
        let refuse = |text: String| Err(LoadError::Option(text));
        if self.block_size == 0 || !self.block_size.is_multiple_of(512) {
            return refuse(format!(
                "--block-size {} is not a multiple of 512",
                self.block_size
            ));
        }
        if !self.start.is_multiple_of(512) {
            return refuse(format!("--start {} is not a multiple of 512", self.start));
        }
        if self.front_end == Driver::VirtioDriver && (self.verify || self.huge_pages) {
            return refuse("--front-end virtio-driver has no --verify and no --huge-pages".into());
        }
        if self.verify && matches!(self.shape, Shape::Read | Shape::Randread) {
            return refuse(
                "--verify compares with what was written: give --shape randrw, write or randwrite"
                    .into(),
            );
        }
        Ok(())
    }

    /// Bytes of a request.
    pub(super) fn block(&self) -> Result<u32, LoadError> {
        // The most that VIRTIO_BLK lets into one segment here; guests do not come near.
        u32::try_from(self.block_size)
            .ok()
            .filter(|&size| size <= 16 << 20)
            .ok_or_else(|| LoadError::Option("--block-size is larger than 16M".into()))
    }

    /// For each queue, the blocks of the disk that are its own: shares of one size.
    pub(super) fn ranges(&self, capacity: u64) -> Result<Vec<Range<u64>>, LoadError> {
        let end = match self.length {
            Some(length) => self.start.saturating_add(length),
            None => capacity,
        };
        if end > capacity {
            return Err(LoadError::Option(format!(
                "the disk has {capacity} bytes: --start and --length reach beyond it"
            )));
        }
        let queues = u64::from(self.queues);
        let share = end.saturating_sub(self.start) / self.block_size / queues;
        if share < u64::from(self.depth).saturating_mul(2) {
            return Err(LoadError::Option(format!(
                "each queue has {share} blocks of the disk for itself; --depth {} needs twice as many",
                self.depth
            )));
        }
        let first = self.start.div_ceil(self.block_size);
        let range = |queue| {
            let begin = queue * share + first;
            begin..begin + share
        };
        let ranges: Vec<_> = (0..queues).map(range).collect();
        Ok(ranges)
    }

    /// Puts the calling thread, that of the queue `index`, on its processor.
    pub(super) fn pin(&self, index: usize) -> Result<(), LoadError> {
        let Some(cpu) = self.cpus.iter().cycle().nth(index) else {
            return Ok(());
        };
        let mut set = CpuSet::new();
        set.set(*cpu)
            .and_then(|()| sched_setaffinity(Pid::from_raw(0), &set))
            .map_err(|errno| {
                LoadError::Option(format!("--cpus: a thread cannot run on {cpu}: {errno}"))
            })
    }

    /// How long to measure.
    pub(super) fn seconds(&self) -> Duration {
        Duration::from_secs_f64(self.seconds)
    }

    /// How long to load before that.
    pub(super) fn warm_up(&self) -> Duration {
        Duration::from_secs_f64(self.warm_up)
    }

    /// How long to stay afterwards.
    pub(super) fn linger(&self) -> Duration {
        Duration::from_secs_f64(self.linger)
    }

    /// How many of the requests are for this queue to do, where they are counted.
    pub(super) fn share(&self, index: usize) -> Option<u64> {
        let queues = u64::from(self.queues);
        // What does not divide evenly is the first one's.
        self.count
            .map(|count| count / queues + if index == 0 { count % queues } else { 0 })
    }

    /// Of so many requests one is timed: reading the clock costs as much as all the rest of one.
    pub(super) fn sample(&self) -> u32 {
        if self.depth <= SHALLOW { 1 } else { SAMPLE }
    }

    /// Entries of a virtqueue in which a chain takes so many.
    pub(super) fn entries(&self, per_request: u16) -> Result<u16, LoadError> {
        let needed = self.depth.saturating_mul(per_request);
        match self.queue_size {
            None => Ok(needed.next_power_of_two().max(256)),
            Some(size) if !size.is_power_of_two() => Err(LoadError::Option(format!(
                "--queue-size {size} is not a power of two"
            ))),
            Some(size) if size < needed => Err(LoadError::Option(format!(
                "--queue-size {size}: --depth {} needs {needed} descriptors",
                self.depth
            ))),
            Some(size) => Ok(size),
        }
    }
}

/// A size in bytes, with a unit.
pub(in crate::bench) fn parse_size(text: &str) -> Result<u64, String> {
    let Size(bytes) = text.parse()?;
    Ok(bytes)
}

/// A time in seconds.
pub(in crate::bench) fn parse_seconds(text: &str) -> Result<f64, String> {
    text.parse::<f64>()
        .ok()
        .filter(|seconds| (0.0..=86_400.0).contains(seconds))
        .ok_or_else(|| "not a number of seconds up to a day".into())
}

#[cfg(test)]
mod tests {
    use clap::{CommandFactory, Parser};

    use super::super::Cli;
    use super::*;

    fn args(words: &[&str]) -> LoadArgs {
        Cli::try_parse_from([&["x", "--socket-path", "s"], words].concat())
            .unwrap()
            .load
            .unwrap()
    }

    #[test]
    fn command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn sizes_have_units() {
        assert_eq!(parse_size("4k"), Ok(4096));
        assert_eq!(parse_size("512"), Ok(512));
        assert_eq!(parse_size("2G"), Ok(2 << 30));
        for wrong in ["", "K", "-1", "1.5G", "99999999999999G"] {
            assert!(parse_size(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn queues_share_the_disk_without_overlap() {
        let ranges = args(&["--queues", "3", "--depth", "1", "--start", "4K"]).ranges(11 * 4096);
        assert_eq!(ranges.unwrap(), [1..4, 4..7, 7..10]);
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        assert!(args(&["--length", "1G"]).ranges(4096).is_err());
        assert!(args(&["--depth", "128"]).ranges(1 << 19).is_err());
        assert!(args(&["--block-size", "1000"]).check().is_err());
        assert!(args(&["--verify"]).check().is_err());
        assert!(args(&["--verify", "--shape", "randrw"]).check().is_ok());
        assert!(args(&["--queue-size", "64"]).entries(3).is_err());
        assert_eq!(args(&["--depth", "128"]).entries(3).ok(), Some(512));
    }
}

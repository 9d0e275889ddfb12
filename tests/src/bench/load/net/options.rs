//! The options of `ringside-load net` and `ringside-load tap`.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, ValueEnum};
use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};

use super::super::error::LoadError;
use super::super::options::{Completions, parse_seconds};
use super::{BUFFER, HEADER_LEN, LONGEST};

/// Which way frames go, as the guest sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Direction {
    /// From the guest
    Tx,
    /// To the guest
    Rx,
    /// Both at once
    Both,
}

impl Direction {
    /// Name as on the command line.
    pub(in crate::bench) fn name(self) -> &'static str {
        match self {
            Self::Tx => "tx",
            Self::Rx => "rx",
            Self::Both => "both",
        }
    }

    /// As the other end sees it.
    pub(in crate::bench) fn opposite(self) -> Self {
        match self {
            Self::Tx => Self::Rx,
            Self::Rx => Self::Tx,
            Self::Both => Self::Both,
        }
    }

    /// Frames go out.
    pub(super) fn sends(self) -> bool {
        self != Self::Rx
    }

    /// Frames come in.
    pub(super) fn receives(self) -> bool {
        self != Self::Tx
    }
}

/// Options of a load on a network card.
#[derive(Debug, Clone, Args)]
pub struct NetArgs {
    /// Unix socket that the back-end listens on
    #[arg(long, value_name = "PATH")]
    pub socket_path: PathBuf,

    /// Which way frames go
    #[arg(long, value_enum, default_value = "tx", conflicts_with = "to")]
    pub direction: Direction,

    /// Socket of a second card: frames are sent into the first one and come out of this one, and those that arrive are counted
    #[arg(long, value_name = "PATH")]
    pub to: Option<PathBuf>,

    /// Bytes of each frame that is sent, from its Ethernet header on and without the checksum; those of more than 1514 are TCP
    /// segments that are left to the card to cut
    #[arg(long, value_name = "BYTES", default_value_t = 64, value_parser = clap::value_parser!(u32).range(14..=i64::from(LONGEST)))]
    pub frame: u32,

    /// Entries of each virtqueue, all of them in use: a power of two
    #[arg(long, value_name = "N", default_value_t = 1024, value_parser = clap::value_parser!(u16).range(2..=32768))]
    pub queue_size: u16,

    /// How used buffers are noticed
    #[arg(long, value_enum, default_value = "polling")]
    pub completions: Completions,

    /// Do not negotiate VIRTIO_F_EVENT_IDX
    #[arg(long)]
    pub no_event_idx: bool,

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

    /// Move this many frames in all, and measure all of them, in place of a time
    #[arg(
        long,
        value_name = "N",
        conflicts_with = "seconds",
        conflicts_with = "warm_up"
    )]
    pub count: Option<u64>,

    /// With `--direction rx --count N`: before it connects, let N frames wait in the queue of this TAP, which the back-end has open
    #[arg(long, value_name = "TAP", requires = "count", conflicts_with = "to")]
    pub backlog: Option<String>,

    /// Processor for the thread
    #[arg(long, value_name = "N")]
    pub cpu: Option<usize>,

    /// Guest memory of huge pages (hugetlbfs; see /proc/sys/vm/nr_hugepages)
    #[arg(long)]
    pub huge_pages: bool,

    /// Process of the back-end, whose processor time and context switches are counted while measuring
    #[arg(long, value_name = "PID")]
    pub watch: Option<u32>,

    /// Stay connected this long after the result, with nothing going on
    #[arg(long, value_name = "SECONDS", default_value_t = 0.0, value_parser = parse_seconds)]
    pub linger: f64,

    /// Print the result as JSON
    #[arg(long)]
    pub json: bool,
}

impl NetArgs {
    /// Checks that the options fit each other.
    pub(super) fn check(&self) -> Result<(), LoadError> {
        if !self.queue_size.is_power_of_two() {
            return Err(LoadError::Option(format!(
                "--queue-size {} is not a power of two",
                self.queue_size
            )));
        }
        if self.backlog.is_some() && self.direction != Direction::Rx {
            let text = "frames that wait go to the guest: --backlog is for --direction rx";
            return Err(LoadError::Option(text.into()));
        }
        Ok(())
    }

    /// Bytes of a buffer: that of a frame with its header, or more.
    pub(super) fn buffer(&self) -> u32 {
        let packet = self.frame.saturating_add(HEADER_LEN);
        packet.next_multiple_of(BUFFER)
    }

    /// The thread looks at the used rings all the time.
    pub(super) fn polling(&self) -> bool {
        self.completions == Completions::Polling
    }

    /// Puts the calling thread on its processor.
    pub(super) fn pin(&self) -> Result<(), LoadError> {
        pin(self.cpu)
    }

    pub(super) fn seconds(&self) -> Duration {
        Duration::from_secs_f64(self.seconds)
    }

    pub(super) fn warm_up(&self) -> Duration {
        Duration::from_secs_f64(self.warm_up)
    }

    pub(super) fn linger(&self) -> Duration {
        Duration::from_secs_f64(self.linger)
    }
}

/// Options of a loop on a TAP.
#[derive(Debug, Clone, Args)]
pub struct TapArgs {
    /// The TAP interface, which has to exist and be up
    #[arg(long, value_name = "NAME")]
    pub tap: String,

    /// Whether to write frames to it (tx) or to read frames from it (rx), as a network card of a guest would
    #[arg(long, value_enum, default_value = "tx")]
    pub direction: Direction,

    /// Bytes of each frame that is written
    #[arg(long, value_name = "BYTES", default_value_t = 64, value_parser = clap::value_parser!(u32).range(14..=i64::from(BUFFER - HEADER_LEN)))]
    pub frame: u32,

    /// How long to measure
    #[arg(long, value_name = "SECONDS", default_value_t = 1.0, value_parser = parse_seconds)]
    pub seconds: f64,

    /// How long to load before measuring
    #[arg(long, value_name = "SECONDS", default_value_t = 0.2, value_parser = parse_seconds)]
    pub warm_up: f64,

    /// With `--direction rx`: let so many frames wait in the TAP's queue, and measure how all of them are read, in place of a time
    #[arg(
        long,
        value_name = "N",
        conflicts_with = "seconds",
        conflicts_with = "warm_up"
    )]
    pub backlog: Option<u64>,

    /// Processor on which those are made
    #[arg(long, value_name = "N", requires = "backlog")]
    pub source_cpu: Option<usize>,

    /// Processor for the loop
    #[arg(long, value_name = "N")]
    pub cpu: Option<usize>,

    /// Print the result as JSON
    #[arg(long)]
    pub json: bool,
}

impl TapArgs {
    /// Puts the calling thread on its processor.
    pub(super) fn pin(&self) -> Result<(), LoadError> {
        pin(self.cpu)
    }

    pub(super) fn seconds(&self) -> Duration {
        Duration::from_secs_f64(self.seconds)
    }

    pub(super) fn warm_up(&self) -> Duration {
        Duration::from_secs_f64(self.warm_up)
    }
}

/// Options of what joins a TAP to something else.
#[derive(Debug, Clone, Args)]
#[command(group(clap::ArgGroup::new("other").required(true).args(["socket_path", "to_tap"])))]
pub struct JoinArgs {
    /// The TAP interface; its offloads are set to what the other side takes
    #[arg(long, value_name = "NAME")]
    pub tap: String,

    /// Unix socket of a vhost-user back-end, to whose card it is joined: what goes out of the interface is sent by the card
    #[arg(long, value_name = "PATH")]
    pub socket_path: Option<PathBuf>,

    /// Another TAP interface to which it is joined, by a loop that copies
    #[arg(long, value_name = "NAME")]
    pub to_tap: Option<String>,

    /// Processor for the thread
    #[arg(long, value_name = "N")]
    pub cpu: Option<usize>,
}

impl JoinArgs {
    /// Puts the calling thread on its processor.
    pub(super) fn pin(&self) -> Result<(), LoadError> {
        pin(self.cpu)
    }
}

/// Puts the calling thread on a processor.
pub(super) fn pin(cpu: Option<usize>) -> Result<(), LoadError> {
    let Some(cpu) = cpu else { return Ok(()) };
    let mut set = CpuSet::new();
    set.set(cpu)
        .and_then(|()| sched_setaffinity(Pid::from_raw(0), &set))
        .map_err(|errno| LoadError::Option(format!("--cpu: nothing can run on {cpu}: {errno}")))
}

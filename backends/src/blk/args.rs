//! The options of `ringside-blk`, and the checks that need no front-end.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, ValueEnum};
use ringside_control::Size;
use thiserror::Error;

use super::config::Geometry;
use super::disk::{Disk, DiskError, DiskOptions, Format, Lock, Ranges};
use super::request::{ID_LEN, SECTOR};
use super::{BlkConfig, RateLimits, SEG_MAX};
use crate::shell::{OnOff, OpenError, Parts, TakeOverError};

/// How long a disk may stay locked by a program that is ending.
pub(super) const LOCK_WAIT: Duration = Duration::from_secs(1);

/// The cache that the driver is told of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Cache {
    /// Writes are durable after a flush.
    Writeback,
    /// Each write is durable when it completes.
    Writethrough,
}

/// Options of the block device.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Disk")]
pub struct BlkArgs {
    /// Image file, block device, export of an NBD server, or RBD image of a Ceph cluster to serve
    ///
    /// An export is nbd://HOST[:PORT]/EXPORT or nbd+unix:///EXPORT?socket=PATH. An RBD image is
    /// rbd:POOL/[NAMESPACE/]IMAGE[@SNAPSHOT][:KEY=VALUE]..., as QEMU writes it: the keys are id (the user), conf (the configuration
    /// file), and Ceph's own, such as mon_host; a backslash goes before a colon in a value. A snapshot needs --read-only. Ceph's
    /// librbd is loaded for it, which a statically linked program cannot do.
    #[arg(long, alias = "blk-file", value_name = "FILE", required_unless_present_any = ["null", "print_capabilities"], conflicts_with = "null")]
    pub path: Option<PathBuf>,

    /// Format of the image: raw or qcow2
    ///
    /// It is never guessed: a guest can write what looks like a qcow2 image into its raw disk, and would have any file of
    /// the host opened as a backing file the next time.
    #[arg(
        long,
        value_enum,
        default_value = "raw",
        value_name = "FORMAT",
        conflicts_with = "null"
    )]
    pub format: Format,

    /// Open the backing files that a qcow2 image names, for reading; off refuses an image that has one
    #[arg(
        long,
        value_enum,
        default_value = "on",
        value_name = "on|off",
        hide_possible_values = true
    )]
    pub backing: OnOff,

    /// How long requests wait for a server that is gone, or does not answer, before they fail; 0: not at all
    ///
    /// Until then they are kept, and sent again when the NBD server is back. For a Ceph cluster it is one second at least,
    /// also for connecting to it, and for another client to close the image.
    #[arg(long, value_name = "SECONDS", default_value_t = 30, value_parser = clap::value_parser!(u32).range(0..=86_400))]
    pub reconnect_timeout: u32,

    /// Serve a disk of this size that moves no data, to measure everything else (K, M, G, T are powers of 1024)
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub null: Option<u64>,

    /// When to lock the disk against use by others: always, or only while a guest's queues run
    ///
    /// A guest that moves to another VMM, on this host or on another, moves from one back-end to the next, which has to open the
    /// same disk before the first has let go of it: give both --lock running. The disk is then used in turns, and whoever is
    /// out of turn is refused. It is for raw files and block devices; with a file system that hosts share, give --direct too.
    #[arg(
        long,
        value_enum,
        default_value = "always",
        value_name = "always|running",
        hide_possible_values = true,
        conflicts_with = "null"
    )]
    pub lock: Lock,

    /// Let the guest read only
    #[arg(long)]
    pub read_only: bool,

    /// Number of queues, each with a thread of its own
    ///
    /// The front-end can use fewer. QEMU asks for one per virtual processor unless its device is given num-queues=N.
    #[arg(long, visible_alias = "num-queues", value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=256))]
    pub queues: u16,

    /// Largest queue size to accept from a front-end: a power of two
    ///
    /// If the front-end's queues have less than 128 entries, give their size here: the guest is told how long a request may
    /// be before the size is known, and longer ones are refused.
    #[arg(long, value_name = "N", default_value_t = 1024, value_parser = clap::value_parser!(u16).range(2..=4096))]
    pub queue_size: u16,

    /// Bypass the host's page cache (O_DIRECT)
    #[arg(long)]
    pub direct: bool,

    /// Cache mode that the guest begins with; it can switch
    #[arg(long, value_enum, default_value = "writeback", value_name = "MODE")]
    pub cache: Cache,

    /// Serial number that the guest reads: up to 20 printable ASCII characters
    #[arg(long, value_name = "TEXT", default_value = "", value_parser = parse_serial)]
    pub serial: String,

    /// Logical block size in bytes: 512 or 4096 [default: what the storage needs]
    #[arg(long, value_name = "BYTES", value_parser = parse_block_size)]
    pub block_size: Option<u32>,

    /// Physical block size in bytes [default: what the storage says]
    #[arg(long, value_name = "BYTES", value_parser = parse_io_size)]
    pub physical_block_size: Option<u32>,

    /// Smallest efficient transfer in bytes [default: the physical block size]
    #[arg(long, value_name = "BYTES", value_parser = parse_io_size)]
    pub min_io_size: Option<u32>,

    /// Best transfer size in bytes [default: what the storage says]
    #[arg(long, value_name = "BYTES", value_parser = parse_io_size)]
    pub opt_io_size: Option<u32>,

    /// Pin all guest memory and register it with io_uring, which makes transfers a little cheaper
    ///
    /// Memory of the guest is then in use from the start, and cannot be swapped or given back. It counts against the
    /// limit of locked memory, once for each queue.
    #[arg(help_heading = "Performance", long)]
    pub register_memory: bool,

    /// Look for completions in the storage's own queues in place of taking its interrupts
    ///
    /// For devices with poll queues (NVMe: nvme.poll_queues=N). While transfers are under way the thread does not sleep.
    #[arg(help_heading = "Performance", long, requires = "direct")]
    pub io_poll: bool,

    /// How long a queue's thread without requests may spin for the next before it sleeps, in microseconds; 0: not at all
    ///
    /// It spins only while requests come as fast as that, and an idle disk sleeps. Under a driver that has one request at a time
    /// this takes about as much of the processor as sleeping and waking would.
    #[arg(help_heading = "Performance", long, value_name = "MICROSECONDS", default_value_t = 100, value_parser = clap::value_parser!(u32).range(0..=10_000))]
    pub poll: u32,

    /// How long a queue's thread may spin while the storage works, in microseconds; 0: not at all
    ///
    /// About twice the time that the storage takes for a request gives the least latency, and keeps a processor
    /// busy while the disk is in use. On storage that is slower the thread sleeps.
    #[arg(help_heading = "Performance", long, value_name = "MICROSECONDS", default_value_t = 0, value_parser = clap::value_parser!(u32).range(0..=10_000))]
    pub poll_storage: u32,

    /// Most that spinning in vain may take of a queue's thread, in percent
    #[arg(help_heading = "Performance", long, value_name = "PERCENT", default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..=100))]
    pub poll_budget: u32,

    /// Limit the disk's rates: keys iops, bandwidth (bytes), and both with read- or write- in front, each in a second
    ///
    /// KEY-burst=N is how much may come at once after a pause; a tenth of a second's worth, unless given. Units K, M, G are
    /// powers of 1024. Flushes, discards and write-zeroes are operations of writing, of no bytes unless zeroes have to be
    /// written one by one. `ringside-ctl limits` changes the limits of a disk in use.
    #[arg(help_heading = "Performance", long, value_name = "KEY=VALUE,...", value_parser = parse_limits)]
    pub limit: Option<RateLimits>,

    /// Offer discard and write-zeroes, which punch holes into an image, as far as the disk can do them
    #[arg(
        help_heading = "Features that are offered to the guest",
        long,
        value_enum,
        default_value = "on",
        value_name = "on|off",
        hide_possible_values = true
    )]
    pub discard: OnOff,

    /// Offer secure erase, if the disk is a block device that has it; an image file never has
    #[arg(
        help_heading = "Features that are offered to the guest",
        long,
        value_enum,
        default_value = "on",
        value_name = "on|off",
        hide_possible_values = true
    )]
    pub secure_erase: OnOff,

    /// Offer packed virtqueues; the guest decides
    #[arg(
        help_heading = "Features that are offered to the guest",
        long,
        value_enum,
        default_value = "on",
        value_name = "on|off",
        hide_possible_values = true
    )]
    pub packed: OnOff,

    /// Offer to complete requests in the order in which they came
    ///
    /// A request that is done then waits for slower ones before it.
    #[arg(
        help_heading = "Features that are offered to the guest",
        long,
        value_enum,
        default_value = "off",
        value_name = "on|off",
        hide_possible_values = true
    )]
    pub in_order: OnOff,
}

/// Options that do not fit each other, or a disk that cannot be used.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ArgsError {
    /// The disk cannot be used.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// Neither a file nor a size was given.
    #[error("no disk: give --path or --null")]
    NoDisk,
    /// The place of another program cannot be taken.
    #[error("cannot take over")]
    TakeOver(#[from] TakeOverError),
    /// A size that no disk can have.
    #[error(
        "--null {size}: a disk has at least one block of {block} bytes, and a whole number of them"
    )]
    NullSize {
        /// What was given, in bytes.
        size: u64,
        /// The block size in bytes.
        block: u32,
    },
    /// The queue size is no power of two.
    #[error("--queue-size {0} is not a power of two")]
    QueueSize(u16),
    /// A size of the topology is not a multiple of the block size.
    #[error("--{option} {size} is not a multiple of the block size {block}")]
    Topology {
        /// The option.
        option: &'static str,
        /// What was given, in bytes.
        size: u32,
        /// The block size in bytes.
        block: u32,
    },
}

impl OpenError for ArgsError {
    fn is_usage(&self) -> bool {
        !matches!(self, Self::Disk(_) | Self::TakeOver(_))
    }
}

impl BlkArgs {
    /// Opens the disk and checks that all options fit it.
    ///
    /// # Errors
    /// [`ArgsError`]
    pub fn open(&self) -> Result<BlkConfig, ArgsError> {
        self.open_as(None)
    }

    /// The same with what the disk of another program is made of, whose place this one takes.
    ///
    /// # Errors
    /// [`ArgsError`]
    pub fn open_as(&self, parts: Option<Parts>) -> Result<BlkConfig, ArgsError> {
        let taken = parts.is_some();
        if !self.queue_size.is_power_of_two() {
            return Err(ArgsError::QueueSize(self.queue_size));
        }
        let disk = match (&self.path, self.null) {
            (Some(path), _) => Some(Disk::open(&DiskOptions {
                taken: parts.map(Into::into),
                path: path.clone(),
                read_only: self.read_only,
                direct: self.direct,
                block_size: self.block_size,
                lock: self.lock,
                lock_wait: LOCK_WAIT,
                format: self.format,
                backing: self.backing == OnOff::On,
                patience: Duration::from_secs(self.reconnect_timeout.into()),
            })?),
            (None, Some(_)) => None,
            (None, None) => return Err(ArgsError::NoDisk),
        };
        let sector = u32::try_from(SECTOR).unwrap_or(512);
        let (capacity, block, physical, opt_io) = match &disk {
            Some(d) => (d.capacity, d.block_size, d.physical_block_size, d.opt_io),
            None => {
                let block = self.block_size.unwrap_or(sector);
                let size = self.null.unwrap_or(0);
                if size == 0 || !size.is_multiple_of(u64::from(block)) {
                    return Err(ArgsError::NullSize { size, block });
                }
                (size, block, block, 0)
            }
        };
        let fit = |option, given: Option<u32>, otherwise| match given {
            Some(size) if size % block != 0 => Err(ArgsError::Topology {
                option,
                size,
                block,
            }),
            Some(size) => Ok(size),
            None => Ok(otherwise),
        };
        let physical = fit("physical-block-size", self.physical_block_size, physical)?;
        let mut serial = [0; ID_LEN];
        for (place, byte) in serial.iter_mut().zip(self.serial.bytes()) {
            *place = byte;
        }
        let ranges = match &disk {
            _ if self.read_only => Ranges::NONE,
            Some(disk) => disk.ranges,
            None => Ranges::of_blocks(block),
        };
        let keep = |given: OnOff, bytes| if given == OnOff::On { bytes } else { 0 };
        Ok(BlkConfig {
            geometry: Geometry {
                zones: disk
                    .as_ref()
                    .and_then(|d| d.zones.as_ref())
                    .map(|&(_, zones)| zones),
                capacity,
                seg_max: u32::from(SEG_MAX.min(self.queue_size.saturating_sub(2)).max(1)),
                block_size: block,
                physical_block_size: physical,
                min_io: fit("min-io-size", self.min_io_size, physical)?,
                opt_io: fit("opt-io-size", self.opt_io_size, opt_io - opt_io % block)?,
                queues: self.queues,
                max_discard: keep(self.discard, ranges.max_discard),
                discard_align: ranges.discard_align,
                max_write_zeroes: keep(self.discard, ranges.max_write_zeroes),
                zeroes_unmap: ranges.zeroes_unmap,
                max_secure_erase: keep(self.secure_erase, ranges.max_secure_erase),
            },
            disk,
            taken,
            lock: self.lock,
            read_only: self.read_only,
            writeback: self.cache == Cache::Writeback,
            serial,
            max_queue_size: self.queue_size,
            register_memory: self.register_memory,
            io_poll: self.io_poll,
            poll: Duration::from_micros(self.poll.into()),
            poll_storage: Duration::from_micros(self.poll_storage.into()),
            poll_budget: self.poll_budget,
            packed: self.packed == OnOff::On,
            in_order: self.in_order == OnOff::On,
            limits: self.limit.unwrap_or_default(),
        })
    }
}

fn parse_size(text: &str) -> Result<u64, String> {
    let Size(size) = text.parse()?;
    i64::try_from(size)
        .map(|_| size)
        .map_err(|_| "larger than a disk can be".to_owned())
}

fn parse_limits(text: &str) -> Result<RateLimits, String> {
    RateLimits::parse(text).map_err(|error| error.to_string())
}

fn parse_serial(text: &str) -> Result<String, String> {
    if text.len() > ID_LEN {
        return Err(format!("longer than {ID_LEN} characters"));
    }
    if !text.bytes().all(|b| b.is_ascii_graphic() || b == b' ') {
        return Err("has characters that are not printable ASCII".to_owned());
    }
    Ok(text.to_owned())
}

fn parse_block_size(text: &str) -> Result<u32, String> {
    match text {
        "512" => Ok(512),
        "4096" => Ok(4096),
        _ => Err("only 512 and 4096 are possible".to_owned()),
    }
}

fn parse_io_size(text: &str) -> Result<u32, String> {
    let size = parse_size(text)?;
    u32::try_from(size)
        .ok()
        .filter(|size| size.is_power_of_two() && (512..=1 << 24).contains(size))
        .ok_or_else(|| "not a power of two between 512 and 16M".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        blk: BlkArgs,
        #[arg(long)]
        print_capabilities: bool,
    }

    fn open(args: &[&str]) -> Result<BlkConfig, ArgsError> {
        let cli = Cli::try_parse_from([&["x"], args].concat()).unwrap();
        assert!(!cli.print_capabilities);
        cli.blk.open()
    }

    fn refused(args: &[&str]) -> bool {
        Cli::try_parse_from([&["x"], args].concat()).is_err()
    }

    #[test]
    fn sizes_have_units_and_limits() {
        assert_eq!(parse_size("512"), Ok(512));
        assert_eq!(parse_size("3K"), Ok(3072));
        assert_eq!(parse_size("1t"), Ok(1 << 40));
        for wrong in ["", "K", "-1", "1.5G", "9999999T", "18446744073709551615"] {
            assert!(parse_size(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        assert!(refused(&[]));
        assert!(refused(&["--null", "1G", "--path", "x"]));
        assert!(refused(&["--null", "1G", "--queues", "0"]));
        assert!(refused(&[
            "--null",
            "1G",
            "--serial",
            "123456789012345678901"
        ]));
        assert!(refused(&["--null", "1G", "--block-size", "1024"]));
        assert!(refused(&["--null", "1G", "--min-io-size", "1000"]));
        assert!(matches!(
            open(&["--null", "1G", "--queue-size", "100"]),
            Err(ArgsError::QueueSize(100))
        ));
        assert!(matches!(
            open(&["--null", "0"]),
            Err(ArgsError::NullSize { .. })
        ));
        assert!(matches!(
            open(&[
                "--null",
                "1G",
                "--block-size",
                "4096",
                "--min-io-size",
                "512"
            ]),
            Err(ArgsError::Topology { .. })
        ));
    }

    #[test]
    fn a_null_disk_has_the_geometry_asked_for() {
        let config = open(&[
            "--null",
            "1G",
            "--queues",
            "4",
            "--serial",
            "ABC",
            "--physical-block-size",
            "4096",
        ])
        .unwrap();
        assert_eq!(config.geometry.capacity, 1 << 30);
        assert_eq!(config.geometry.queues, 4);
        assert_eq!(config.geometry.min_io, 4096);
        assert_eq!(&config.serial[..4], b"ABC\0");
        assert!(config.writeback);
        let config = open(&["--null", "1G", "--read-only", "--cache", "writethrough"]).unwrap();
        assert_eq!(config.geometry.max_discard, 0);
        assert_eq!(config.geometry.max_write_zeroes, 0);
        assert!(!config.writeback);
    }
}

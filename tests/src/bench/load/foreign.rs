//! The same load by a driver that this project did not write: the crate `virtio-driver`.
#![allow(unsafe_code)] // That crate takes buffers by their addresses.

use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use virtio_driver::{
    EventFd, QueueNotifier, VhostUser, VirtioBlkConfig, VirtioBlkQueue, VirtioBlkReqBuf,
    VirtioBlkTransport, VirtioTransport,
};
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

use super::connection::{EVENT_IDX, VERSION_1, guest_memory};
use super::error::LoadError;
use super::front::{DESCRIPTORS, FLUSH, MQ};
use super::lane::{Measured, PATIENCE, SPINS};
use super::options::{Completions, LoadArgs};
use super::pattern::{Kind, Pattern};
use super::{Job, Phase};

/// Sector size of the configuration space (VIRTIO 1.3, 5.2.4).
const SECTOR: u64 = 512;
/// Guest memory is a multiple of this.
const GRANULE: u64 = 2 << 20;

/// A connection by `virtio-driver`.
pub(super) struct Foreign {
    transport: Box<VhostUser<VirtioBlkConfig, VirtioBlkReqBuf>>,
    /// For data; requests and rings are in memory of the crate's own. It is mapped as long as anything refers to it.
    memory: GuestMemoryMmap,
    /// Host address of that memory.
    base: usize,
    capacity: u64,
}

fn failed(doing: &'static str) -> impl FnOnce(io::Error) -> LoadError {
    move |source| LoadError::Io { doing, source }
}

impl Foreign {
    pub(super) fn connect(args: &LoadArgs) -> Result<Self, LoadError> {
        let path = args.socket_path.to_str().ok_or_else(|| {
            LoadError::Option("--front-end virtio-driver needs a --socket-path in UTF-8".into())
        })?;
        let mut features = VERSION_1 | FLUSH | MQ;
        if !args.no_event_idx {
            features |= EVENT_IDX;
        }
        let connected = VhostUser::new(path, features).map_err(|source| LoadError::Connect {
            path: args.socket_path.clone(),
            source,
        })?;
        let mut transport = Box::new(connected);
        let config = transport
            .get_config()
            .map_err(failed("read the configuration space"))?;
        let requests = u64::from(args.queues).saturating_mul(u64::from(args.depth));
        let size = requests
            .saturating_mul(u64::from(args.block()?))
            .next_multiple_of(GRANULE);
        let (file, memory) = guest_memory(size, false)?;
        let base = memory
            .get_host_address(GuestAddress(0))
            .map_err(|_| LoadError::Access { addr: 0 })?
            .expose_provenance();
        let len = usize::try_from(size).map_err(|_| LoadError::Access { addr: size })?;
        transport
            .map_mem_region(base, len, file.as_raw_fd(), 0)
            .map_err(failed("share memory with the back-end"))?;
        Ok(Self {
            transport,
            memory,
            base,
            capacity: u64::from(config.capacity).saturating_mul(SECTOR),
        })
    }

    pub(super) fn features(&self) -> u64 {
        self.transport.get_features()
    }

    /// The load of each queue.
    pub(super) fn jobs<'a>(&'a mut self, args: &'a LoadArgs) -> Result<Vec<Job<'a>>, LoadError> {
        let ranges = args.ranges(self.capacity)?;
        // It has no indirect descriptors.
        let entries = args.entries(DESCRIPTORS)?;
        let transport: &mut VirtioBlkTransport = &mut *self.transport;
        let queues = VirtioBlkQueue::<u16>::setup_queues(transport, args.queues.into(), entries)
            .map_err(failed("set the queues up"))?;
        let block = args.block()?;
        let share = usize::from(args.depth).saturating_mul(usize::try_from(block).unwrap_or(0));
        let mut jobs: Vec<Job<'a>> = Vec::new();
        for (index, (queue, range)) in queues.into_iter().zip(ranges).enumerate() {
            let lane = ForeignLane {
                queue,
                notifier: self.transport.get_submission_notifier(index),
                call: self.transport.get_completion_fd(index),
                _memory: self.memory.clone(),
                base: self.base.saturating_add(index.saturating_mul(share)),
                polling: args.completions == Completions::Polling,
                block,
                pattern: Pattern::new(args, Range::clone(&range))?,
                left: args.share(index),
                sample: args.sample(),
                started: vec![None; args.depth.into()],
                until_sample: 0,
                in_flight: 0,
            };
            jobs.push(Box::new(move |phase, ready| {
                let pinned = args.pin(index);
                ready.wait();
                pinned?;
                lane.run(phase)
            }));
        }
        Ok(jobs)
    }
}

/// One queue.
struct ForeignLane<'a> {
    queue: VirtioBlkQueue<'a, u16>,
    notifier: Box<dyn QueueNotifier>,
    call: Arc<EventFd>,
    /// Keeps the buffers mapped.
    _memory: GuestMemoryMmap,
    /// Address of the first request's data; the others follow.
    base: usize,
    polling: bool,
    block: u32,
    pattern: Pattern,
    left: Option<u64>,
    sample: u32,
    started: Vec<Option<Instant>>,
    until_sample: u32,
    in_flight: usize,
}

impl ForeignLane<'_> {
    fn run(mut self, phase: &Phase) -> Result<Measured, LoadError> {
        let counted = self.left.is_some();
        let mut measured = Measured::new()?;
        let mut begun = counted.then(Instant::now);
        self.queue.set_used_notif_enabled(!self.polling);
        let mut free: Vec<u16> = (0_u16..).take(self.started.len()).collect();
        let (mut spins, mut idle_since) = (0_u32, None);
        loop {
            while !free.is_empty() && self.wants(phase) {
                if let Some(slot) = free.pop() {
                    self.submit(slot)?;
                }
            }
            if self.queue.avail_notif_needed() {
                self.notifier
                    .notify()
                    .map_err(failed("write the kick eventfd"))?;
                measured.kicks = measured.kicks.saturating_add(1);
            }
            for completion in self.queue.completions() {
                let slot = completion.context;
                if completion.ret != 0 {
                    return Err(LoadError::Io {
                        doing: "do a request by virtio-driver",
                        source: io::Error::from_raw_os_error(completion.ret.saturating_neg()),
                    });
                }
                if let Some(Some(started)) = self.started.get(usize::from(slot)) {
                    let nanos = u64::try_from(started.elapsed().as_nanos()).unwrap_or(u64::MAX);
                    measured.latency.saturating_record(nanos);
                }
                free.push(slot);
                measured.requests = measured.requests.saturating_add(1);
            }
            self.in_flight = self.started.len().saturating_sub(free.len());
            if begun.is_none() && phase.now() != Phase::WARM_UP {
                begun = Some(Instant::now());
                measured = Measured::new()?;
            }
            let ended = if counted {
                self.in_flight == 0
            } else {
                phase.now() == Phase::END
            };
            if ended {
                break;
            }
            if !free.is_empty() && (self.left != Some(0)) {
                idle_since = None;
            } else if self.polling {
                std::hint::spin_loop();
                spins = spins.wrapping_add(1);
                if spins.is_multiple_of(SPINS)
                    && idle_since.get_or_insert_with(Instant::now).elapsed() > PATIENCE
                {
                    return Err(self.stalled());
                }
            } else if !self.queue.completions().has_next() {
                self.wait()?;
                measured.interrupts = measured.interrupts.saturating_add(1);
            }
        }
        measured.elapsed = begun.map_or(Duration::ZERO, |begun| begun.elapsed());
        // The queue's memory goes with it: nothing may be in flight then.
        let end = Instant::now();
        while self.in_flight > 0 {
            let count = self.queue.completions().count();
            self.in_flight = self.in_flight.saturating_sub(count);
            if end.elapsed() > PATIENCE {
                return Err(self.stalled());
            }
        }
        Ok(measured)
    }

    /// Whether there is another request to do; it counts.
    fn wants(&mut self, phase: &Phase) -> bool {
        match &mut self.left {
            Some(0) => false,
            Some(left) => {
                *left = left.saturating_sub(1);
                true
            }
            None => phase.now() != Phase::END,
        }
    }

    fn submit(&mut self, slot: u16) -> Result<(), LoadError> {
        let op = self.pattern.next();
        let len = usize::try_from(self.block).map_err(|_| LoadError::Access { addr: 0 })?;
        let address = self.base.wrapping_add(usize::from(slot).wrapping_mul(len));
        if let Some(started) = self.started.get_mut(usize::from(slot)) {
            *started = (self.until_sample == 0).then(Instant::now);
        }
        self.until_sample = match self.until_sample {
            0 => self.sample.wrapping_sub(1),
            left => left.wrapping_sub(1),
        };
        let offset = op.block.wrapping_mul(u64::from(self.block));
        let queued = match op.kind {
            Kind::Read => {
                let data = std::ptr::with_exposed_provenance_mut(address);
                // SAFETY: the slot's part of `_memory`, which outlives the queue; nothing in this process reads it.
                unsafe { self.queue.read_raw(offset, data, len, slot) }
            }
            Kind::Write => {
                let data = std::ptr::with_exposed_provenance(address);
                // SAFETY: the slot's part of `_memory`, which outlives the queue; nothing in this process writes it.
                unsafe { self.queue.write_raw(offset, data, len, slot) }
            }
        };
        queued.map_err(failed("put a request into the ring"))
    }

    /// Sleeps until the back-end interrupts.
    fn wait(&self) -> Result<(), LoadError> {
        let mut fds = [PollFd::new(self.call.as_fd(), PollFlags::POLLIN)];
        let timeout = PollTimeout::try_from(PATIENCE).unwrap_or(PollTimeout::MAX);
        match poll(&mut fds, timeout) {
            Ok(0) => return Err(self.stalled()),
            Ok(_) => {}
            Err(Errno::EINTR) => return Ok(()),
            Err(errno) => return Err(failed("wait for the call eventfd")(errno.into())),
        }
        match self.call.read() {
            Err(error) if error.kind() != io::ErrorKind::WouldBlock => {
                Err(failed("read the call eventfd")(error))
            }
            _ => Ok(()),
        }
    }

    fn stalled(&self) -> LoadError {
        LoadError::Stalled {
            patience: PATIENCE,
            in_flight: self.in_flight,
        }
    }
}

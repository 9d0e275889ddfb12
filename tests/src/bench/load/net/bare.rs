//! A loop that writes frames to a TAP, or reads what comes from it, and does nothing else: what no card before it can exceed.

use std::os::fd::AsFd;
use std::time::Instant;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::unistd::{read, write};
use ringside_backends::net::{Tap, TapQueue};

use super::super::Phase;
use super::super::error::LoadError;
use super::super::lane::PATIENCE;
use super::lane::Counts;
use super::options::{Direction, TapArgs};
use super::{BUFFER, GUEST, PEER, backlog, open_tap, packet};

/// A TAP and the frame that is written to it.
pub(super) struct Loop {
    /// The interface stays as long as this does.
    _tap: Tap,
    queue: TapQueue,
    packet: Vec<u8>,
    writes: bool,
    /// Frames to read in all, where they wait already.
    left: Option<u64>,
}

fn failed(doing: &'static str, errno: Errno) -> LoadError {
    LoadError::Io {
        doing,
        source: errno.into(),
    }
}

impl Loop {
    pub(super) fn open(args: &TapArgs) -> Result<Self, LoadError> {
        let (tap, queue) = open_tap(&args.tap)?;
        let writes = match args.direction {
            Direction::Tx => true,
            Direction::Rx => false,
            Direction::Both => {
                let text = "a loop on a TAP goes one way: --direction tx or rx";
                return Err(LoadError::Option(text.into()));
            }
        };
        if let Some(count) = args.backlog {
            if writes {
                let text = "frames that wait are read: --backlog is for --direction rx";
                return Err(LoadError::Option(text.into()));
            }
            backlog::fill(&args.tap, args.frame, count, args.source_cpu)?;
        }
        Ok(Self {
            left: args.backlog,
            _tap: tap,
            queue,
            packet: packet(args.frame, GUEST, PEER),
            writes,
        })
    }

    pub(super) fn run(self, phase: &Phase) -> Result<Counts, LoadError> {
        let mut counts = Counts::default();
        let mut started = self.left.map(|_| Instant::now());
        let room = usize::try_from(BUFFER).unwrap_or_default();
        let mut buffer = vec![0; room];
        loop {
            let moved = if self.writes {
                write(self.queue.as_fd(), &self.packet)
            } else {
                read(self.queue.as_fd(), &mut buffer)
            };
            match moved {
                Ok(_) if self.writes => counts.sent = counts.sent.saturating_add(1),
                Ok(_) => counts.received = counts.received.saturating_add(1),
                Err(Errno::EAGAIN) => self.wait()?,
                Err(errno) => return Err(failed("move a frame over the TAP", errno)),
            }
            if started.is_none() && phase.now() != Phase::WARM_UP {
                started = Some(Instant::now());
                counts = Counts::default();
            }
            let ended = match self.left {
                Some(left) => counts.received >= left,
                None => phase.now() == Phase::END,
            };
            if ended {
                break;
            }
        }
        counts.elapsed =
            started.map_or_else(Default::default, |started: Instant| started.elapsed());
        Ok(counts)
    }

    fn wait(&self) -> Result<(), LoadError> {
        let flag = if self.writes {
            PollFlags::POLLOUT
        } else {
            PollFlags::POLLIN
        };
        let mut fds = [PollFd::new(self.queue.as_fd(), flag)];
        let timeout = PollTimeout::try_from(PATIENCE).unwrap_or(PollTimeout::MAX);
        match poll(&mut fds, timeout) {
            Ok(0) => Err(LoadError::Quiet { patience: PATIENCE }),
            Ok(_) | Err(Errno::EINTR) => Ok(()),
            Err(errno) => Err(failed("wait for the TAP", errno)),
        }
    }
}

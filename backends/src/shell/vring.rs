//! One ring as a worker owns it, and the commands by which it comes and goes.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::sync::mpsc::{self, Receiver, Sender, TryRecvError};
use std::sync::{Arc, Weak};

use ringside_rings::{DeviceRing, RingError, Session};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::dirty::Memory;

/// One ring as a worker owns it while it runs.
///
/// Its memory stays mapped as long as the `Vring` exists: I/O in flight may point into it.
#[derive(Debug)]
pub struct Vring {
    /// Number of the queue.
    pub index: u16,
    /// State of the ring.
    pub ring: DeviceRing,
    /// Guest memory, all regions. It knows whether writes are to be marked in the dirty log.
    pub memory: Arc<Memory>,
    /// Signalled by the driver when it has added chains; `None` if the front-end wants to be polled
    /// (VHOST_USER_SET_VRING_KICK without a descriptor).
    ///
    /// It comes from the peer: it may or may not be `O_NONBLOCK`, and it may be no eventfd at all. Wait
    /// with poll, epoll or io_uring, do not rely on a read.
    pub kick: Option<File>,
    /// To be signalled when the driver wants an interrupt; `None` if the driver polls.
    pub call: Option<File>,
    /// To be signalled when the ring is broken.
    pub err: Option<File>,
    /// The virtio features that the driver accepted.
    pub features: u64,
    /// Whether the ring is enabled (VHOST_USER_SET_VRING_ENABLE). A ring that is started and disabled takes
    /// no requests; a network transmit queue drops what it gets.
    pub enabled: bool,
}

impl Vring {
    /// Resolves the ring for one turn of the worker's loop, apart from the other fields.
    ///
    /// # Errors
    /// [`RingError`] if the ring does not lie in guest memory (any more): stop it.
    pub fn session(&mut self) -> Result<Session<'_, Memory>, RingError> {
        self.ring.session(&self.memory)
    }

    /// Interrupts the driver. A failure is no reason to stop: the peer owns the other end.
    ///
    /// # Errors
    /// What the write to the call eventfd said, for the log.
    pub fn notify_driver(&self) -> io::Result<()> {
        signal(self.call.as_ref())
    }

    /// Somebody served the ring before this worker got it, or it did itself. The driver is then to be interrupted once:
    /// it may have been shown something and not interrupted, or by a call descriptor that the front-end looked at for the
    /// last time before it sent the one that is here now.
    #[must_use]
    pub fn resumes(&self) -> bool {
        self.ring.has_begun() || self.ring.is_tracked()
    }

    /// Tells the front-end that this ring is broken, if it asked to know.
    ///
    /// # Errors
    /// What the write to the error eventfd said, for the log.
    pub fn signal_error(&self) -> io::Result<()> {
        signal(self.err.as_ref())
    }

    /// The descriptor to wait on for kicks.
    #[must_use]
    pub fn kick_fd(&self) -> Option<RawFd> {
        self.kick.as_ref().map(AsRawFd::as_raw_fd)
    }
}

/// Adds 1 to an eventfd, if there is one. A peer can make this block (a counter at its maximum, a full pipe); the shell
/// then interrupts the worker by a signal when it wants the ring back.
///
/// # Errors
/// What the write said.
pub fn signal(fd: Option<&File>) -> io::Result<()> {
    let Some(mut fd) = fd else { return Ok(()) };
    match fd.write(&1_u64.to_ne_bytes()) {
        Ok(_) => Ok(()),
        // A counter at its maximum is signalled already.
        Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(()),
        Err(e) => Err(e),
    }
}

/// What the control thread tells a worker.
#[derive(Debug)]
pub enum Command {
    /// Own this ring and serve it. Chains may be waiting already: look before the first kick.
    Start(Box<Vring>),
    /// Take no more chains from the ring, finish those in flight, publish them, and give the ring back.
    /// Also a broken ring is given back. Dropping `done` says that the worker has no such ring.
    Stop {
        /// Number of the queue.
        index: u16,
        /// Chains that the device has not begun with, or waits for somebody else with, are left in flight: what the ring
        /// notes of them outlasts it. Without notes this is never wanted.
        suspend: bool,
        /// Where to give the ring back.
        done: Sender<Box<Vring>>,
    },
    /// Take no more chains from any ring, now or later, until [`Resume`](Self::Resume). Rings come and go as before.
    Pause {
        /// To be told once nothing is in flight. Dropping it says that this will not come to pass.
        done: Sender<()>,
    },
    /// Take chains again.
    Resume,
    /// End the thread. All rings were stopped before.
    Exit,
}

/// The worker's end of its command channel.
///
/// The eventfd is readable while commands may wait; the worker waits on it in its own loop.
#[derive(Debug)]
pub struct Commands {
    receiver: Receiver<Command>,
    wake: Arc<EventFd>,
}

impl Commands {
    /// The next command, or `None` when there is none now. A control thread that is gone reads as
    /// [`Command::Exit`].
    #[must_use]
    pub fn next(&self) -> Option<Command> {
        match self.receiver.try_recv() {
            Ok(command) => Some(command),
            Err(TryRecvError::Empty) => None,
            Err(TryRecvError::Disconnected) => Some(Command::Exit),
        }
    }

    /// Makes the eventfd unreadable again. Call it before [`next`](Self::next), or a command that
    /// arrives in between is missed.
    pub fn acknowledge(&self) {
        // WouldBlock: nobody has written since the last time.
        let _ = self.wake.read();
    }
}

impl AsRawFd for Commands {
    fn as_raw_fd(&self) -> RawFd {
        self.wake.as_raw_fd()
    }
}

/// The control thread's end of a worker's command channel.
#[derive(Debug, Clone)]
pub struct CommandSender {
    sender: Sender<Command>,
    /// Weak: the worker owns the eventfd it sleeps on.
    wake: Weak<EventFd>,
}

impl CommandSender {
    /// Queues a command and wakes the worker.
    ///
    /// # Errors
    /// `BrokenPipe` if the worker is gone.
    pub fn send(&self, command: Command) -> io::Result<()> {
        let gone = || io::Error::new(io::ErrorKind::BrokenPipe, "the worker thread has ended");
        self.sender.send(command).map_err(|_| gone())?;
        let wake = self.wake.upgrade().ok_or_else(gone)?;
        match wake.write(1) {
            Ok(()) => Ok(()),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(()),
            Err(e) => Err(e),
        }
    }
}

/// A command channel to one worker.
///
/// # Errors
/// If no eventfd can be created.
pub fn command_channel() -> io::Result<(CommandSender, Commands)> {
    let wake = Arc::new(EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?);
    let (sender, receiver) = mpsc::channel();
    Ok((
        CommandSender {
            sender,
            wake: Arc::downgrade(&wake),
        },
        Commands { receiver, wake },
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_arrive_in_order_and_a_lost_sender_reads_as_exit() {
        let (sender, commands) = command_channel().unwrap();
        assert!(commands.next().is_none());
        let (done, _keep) = mpsc::channel();
        sender
            .send(Command::Stop {
                index: 3,
                suspend: false,
                done,
            })
            .unwrap();
        commands.acknowledge();
        assert!(matches!(
            commands.next(),
            Some(Command::Stop { index: 3, .. })
        ));
        drop(sender);
        assert!(matches!(commands.next(), Some(Command::Exit)));
    }

    #[test]
    fn a_worker_that_ended_is_reported() {
        let (sender, commands) = command_channel().unwrap();
        drop(commands);
        assert_eq!(
            sender.send(Command::Exit).unwrap_err().kind(),
            io::ErrorKind::BrokenPipe
        );
    }
}

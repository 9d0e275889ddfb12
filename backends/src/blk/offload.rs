//! What blocks and is not for io_uring: done by one thread for the disk, which starts when there is something to do.
//!
//! ```text
//!  worker ──task──▶ channel ──▶ thread of the disk
//!    ▲                            │
//!    └── eventfd in its ring ◀── mailbox: (slot, outcome)
//! ```
//!
//! A request that is handed over keeps its slot, so that no more tasks wait than the queues have descriptors.

use std::fmt::{self, Debug};
use std::io;
use std::sync::mpsc::{self, Sender};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};

use tracing::error;

use super::device::BlockDevice;
use super::mailbox::Mailbox;

/// How something that a worker waited for ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Outcome {
    /// It is done.
    Done,
    /// It is done, and this many bytes of guest memory were written from the start.
    Filled(u64),
    /// The zone is held now, or its position was looked up: go on.
    Granted,
    /// It failed, with this error number.
    Failed(i32),
}

impl From<io::Result<()>> for Outcome {
    fn from(result: io::Result<()>) -> Self {
        match result {
            Ok(()) => Self::Done,
            Err(e) => Self::Failed(e.raw_os_error().unwrap_or(libc::EIO)),
        }
    }
}

/// Something to be done for the request in a slot.
struct Task {
    slot: u16,
    /// Where the outcome goes.
    mailbox: Arc<Mailbox<Outcome>>,
    work: Box<dyn FnOnce() -> Outcome + Send>,
}

impl Debug for Task {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Task")
            .field("slot", &self.slot)
            .finish_non_exhaustive()
    }
}

/// A worker's way to the disk's thread, and back.
#[derive(Debug)]
pub(super) struct DeviceLink {
    device: Arc<dyn BlockDevice>,
    offload: Arc<Offload>,
    mailbox: Arc<Mailbox<Outcome>>,
}

impl DeviceLink {
    /// A worker's link to this device.
    ///
    /// # Errors
    /// What the system said.
    pub(super) fn new(device: Arc<dyn BlockDevice>, offload: Arc<Offload>) -> io::Result<Self> {
        Ok(Self {
            device,
            offload,
            mailbox: Arc::new(Mailbox::new()?),
        })
    }

    /// Lets the device do something for the request in a slot; the outcome comes into the mailbox.
    ///
    /// # Errors
    /// The disk's thread cannot be started, or is gone.
    pub(super) fn ask(
        &self,
        slot: u16,
        work: impl FnOnce(&dyn BlockDevice) -> Outcome + Send + 'static,
    ) -> io::Result<()> {
        let device = Arc::clone(&self.device);
        self.offload.hand_over(Task {
            slot,
            mailbox: Arc::clone(&self.mailbox),
            work: Box::new(move || work(device.as_ref())),
        })
    }

    /// Where outcomes come.
    pub(super) fn mailbox(&self) -> &Arc<Mailbox<Outcome>> {
        &self.mailbox
    }
}

/// The thread of a disk that waits for what blocks.
#[derive(Debug, Default)]
pub(super) struct Offload {
    running: Mutex<Option<(Sender<Task>, JoinHandle<()>)>>,
}

impl Offload {
    /// Hands a task over. The first starts the thread.
    fn hand_over(&self, task: Task) -> io::Result<()> {
        let mut running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        let (sender, _) = match &mut *running {
            Some(running) => running,
            none => none.insert(start()?),
        };
        sender
            .send(task)
            .map_err(|_| io::ErrorKind::BrokenPipe.into())
    }
}

fn start() -> io::Result<(Sender<Task>, JoinHandle<()>)> {
    let (sender, tasks) = mpsc::channel::<Task>();
    let thread = thread::Builder::new()
        .name("blk-offload".into())
        // The first queue that needs it starts it, so that it has the rights of that queue.
        .spawn(move || {
            for Task {
                slot,
                mailbox,
                work,
            } in tasks
            {
                mailbox.put(slot, work());
            }
        })?;
    Ok((sender, thread))
}

impl Drop for Offload {
    /// Waits until everything that was handed over is done.
    fn drop(&mut self) {
        let running = self
            .running
            .get_mut()
            .unwrap_or_else(PoisonError::into_inner);
        if let Some((sender, thread)) = running.take() {
            drop(sender);
            if thread.join().is_err() {
                error!("the disk's thread failed");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::blk::device::fake::{Call, Fake};

    #[test]
    fn tasks_are_done_in_order_and_their_outcomes_come_back() {
        let device = Arc::new(Fake::default());
        let link = DeviceLink::new(Arc::<Fake>::clone(&device), Arc::default()).unwrap();
        for slot in 0..100_u16 {
            let fake = Arc::clone(&device);
            let at = u64::from(slot) * 512;
            let work = move |device: &dyn BlockDevice| {
                if slot == 99 {
                    *fake.errno.lock().unwrap() = Some(libc::EOPNOTSUPP);
                }
                device.secure_erase(at, 512).into()
            };
            link.ask(slot, work).unwrap();
        }
        let mailbox = Arc::clone(link.mailbox());
        drop(link);
        let mut ended = vec![(7, Outcome::Done)];
        mailbox.take(&mut ended);
        let failed = Outcome::Failed(libc::EOPNOTSUPP);
        let expected: Vec<_> = (0..99)
            .map(|slot| (slot, Outcome::Done))
            .chain([(99, failed)])
            .collect();
        assert_eq!(ended, expected);
        let calls = device.calls.lock().unwrap();
        assert_eq!(calls.len(), 100);
        assert_eq!(calls.last(), Some(&Call::SecureErase(99 * 512, 512)));
        mailbox.take(&mut ended);
        assert_eq!(ended, []);
    }
}

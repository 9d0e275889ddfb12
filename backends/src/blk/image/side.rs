//! What a worker has besides its io_uring, when its disk is not a raw file.

use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use ringside_rings::Segment;

use super::map::Place;
use super::ops::{Action, Link, Op, Outcome};
use super::qcow2::Paths;
use crate::shell::Memory;

/// What a request needs while it has a slot. Grows to the largest request that used the slot, and is kept.
#[derive(Debug, Default)]
struct Held {
    segments: Vec<Segment>,
    /// Bytes of the segments that are done, or not data.
    skip: u64,
    /// The kernel works on a place from the map.
    under_way: bool,
}

/// A worker's side of a companion.
#[derive(Debug)]
pub(in crate::blk) struct Side {
    link: Link,
    /// `None`: the worker can do nothing by itself.
    paths: Option<Paths>,
    held: Vec<Held>,
    /// Something was handed over that the companion may not know of.
    unannounced: bool,
    /// The companion gives back what waits.
    suspended: bool,
}

/// A part of a request.
#[derive(Debug, Clone, Copy)]
pub(in crate::blk) struct Part {
    /// The slot.
    pub(in crate::blk) slot: u16,
    /// What is to be done.
    pub(in crate::blk) action: Action,
    /// Where on the disk, in bytes.
    pub(in crate::blk) offset: u64,
    /// How many bytes.
    pub(in crate::blk) len: u64,
    /// It is to be durable when it completes.
    pub(in crate::blk) durable: bool,
}

impl Side {
    /// A worker's side; with `paths`, it reads and writes by itself where the map knows the place.
    pub(super) fn new(link: Link, paths: Option<Paths>) -> Self {
        Self {
            link,
            paths,
            held: Vec::new(),
            unannounced: false,
            suspended: false,
        }
    }

    /// From now on there are this many slots, all of them free.
    pub(in crate::blk) fn attach(&mut self, slots: u16) {
        self.held.resize_with(usize::from(slots), Held::default);
        if std::mem::take(&mut self.suspended) {
            self.link.suspend(false);
        }
    }

    /// Keeps what a request in a slot reads or writes, behind the first `skip` bytes.
    pub(in crate::blk) fn hold(&mut self, slot: u16, segments: &[Segment], skip: u64) {
        if let Some(held) = self.held.get_mut(usize::from(slot)) {
            held.segments.clear();
            held.segments.extend_from_slice(segments);
            held.skip = skip;
        }
    }

    /// Notes that bytes of a request are done.
    pub(in crate::blk) fn advance(&mut self, slot: u16, bytes: u64) {
        if let Some(held) = self.held.get_mut(usize::from(slot)) {
            held.skip = held.skip.saturating_add(bytes);
        }
    }

    /// Where the first bytes of a transfer are. After [`Place::File`], the kernel gets the operation, or
    /// [`ended`](Self::ended) is called.
    pub(in crate::blk) fn find(&mut self, part: &Part) -> Place {
        let (Some(paths), Some(held)) = (&self.paths, self.held.get_mut(usize::from(part.slot)))
        else {
            return Place::Unknown;
        };
        let place = paths.find(part.offset, part.len, part.action == Action::Write);
        held.under_way = matches!(place, Place::File { .. });
        // A write in place is durable only if the way to the place is. Looked at last: the companion says that tables change
        // before it tells of a new place.
        if part.durable && paths.tables_changed() {
            self.ended(part.slot);
            return Place::Unknown;
        }
        place
    }

    /// The kernel has ended an operation in a slot, whichever.
    pub(in crate::blk) fn ended(&mut self, slot: u16) {
        if let (Some(paths), Some(held)) = (&self.paths, self.held.get_mut(usize::from(slot)))
            && std::mem::take(&mut held.under_way)
        {
            paths.leave();
        }
    }

    /// A flush has to go to the companion before the worker's own.
    pub(in crate::blk) fn flushes(&self) -> bool {
        self.paths.as_ref().is_none_or(Paths::tables_changed)
    }

    /// The worker has to sync the file after the companion's flush.
    pub(in crate::blk) fn syncs(&self) -> bool {
        self.paths.is_some()
    }

    /// Hands a part of a request over. `missed`: the companion was asked for its place before. Returns whether somebody is
    /// there to take it.
    pub(in crate::blk) fn hand_over(
        &mut self,
        part: &Part,
        missed: bool,
        memory: Arc<Memory>,
    ) -> bool {
        self.unannounced = true;
        let transfer = matches!(part.action, Action::Read | Action::Write);
        let Some(held) = self.held.get(usize::from(part.slot)) else {
            return false;
        };
        self.link.hand_over(Op {
            slot: part.slot,
            action: part.action,
            offset: part.offset,
            len: part.len,
            durable: part.durable,
            serve: missed || part.durable || self.paths.is_none(),
            segments: if transfer {
                held.segments.clone()
            } else {
                Vec::new()
            },
            skip: held.skip,
            memory,
            mailbox: self.link.mailbox(),
        })
    }

    /// Lets the companion know of what was handed over.
    pub(in crate::blk) fn announce(&mut self) {
        if std::mem::take(&mut self.unannounced) {
            self.link.announce();
        }
    }

    /// Has the companion give back what waits, undone, until the next ring is attached.
    pub(in crate::blk) fn suspend(&mut self) {
        self.suspended = true;
        self.link.suspend(true);
    }

    /// Takes what the companion has done; `outcomes` is emptied first.
    pub(in crate::blk) fn take(&self, outcomes: &mut Vec<(u16, Outcome)>) {
        self.link.take(outcomes);
    }
}

impl AsRawFd for Side {
    /// Readable when outcomes wait.
    fn as_raw_fd(&self) -> RawFd {
        self.link.as_raw_fd()
    }
}

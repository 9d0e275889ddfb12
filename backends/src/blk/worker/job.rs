//! A request that is being served, and the slot that it has meanwhile.

use std::collections::VecDeque;

use ringside_rings::Segment;
use vm_memory::GuestAddress;

use crate::blk::device::ZoneAction;
use crate::blk::image::{Action, Part};
use crate::blk::request::{APPEND_ANSWER_LEN, Range, RangeAction, Status};
use crate::blk::stats::Kind;
use crate::blk::uring::Direction;

/// How often an operation that the kernel wants repeated is repeated.
pub(super) const MAX_RETRIES: u8 = 100;

/// What an operation in a slot is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stage {
    /// Moves `remaining` bytes at `offset`.
    Transfer(Direction),
    /// Writes zeroes, where the storage cannot do that by itself.
    WriteZeroes,
    /// Frees or zeroes the range.
    Fallocate { mode: i32, or_write: bool },
    /// Makes durable what came before, and is the last.
    Sync,
    /// The companion does it.
    Companion(Action),
    /// The device does it, on the disk's thread.
    Device(DeviceCall),
}

/// What the device does on the disk's thread.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum DeviceCall {
    Discard,
    SecureErase,
    /// Describes zones to the driver.
    ZoneReport,
    /// Changes the zone that is held.
    Zone(ZoneAction),
    ZoneResetAll,
}

/// Whether a job needs a zone for itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Hold {
    /// No.
    None,
    /// Yes, and it does not have it yet.
    Wanted(u32),
    /// It has it.
    Held(u32),
}

/// A request that is being served.
#[derive(Debug, Clone, Copy)]
pub(super) struct Job {
    pub(super) head: u16,
    pub(super) status: GuestAddress,
    pub(super) stage: Stage,
    /// What is done to one range after the other.
    pub(super) ranges: Option<RangeAction>,
    pub(super) offset: u64,
    pub(super) remaining: u64,
    pub(super) hold: Hold,
    /// It is appended to its zone, and the driver is told where.
    pub(super) append: bool,
    /// Where a write into a zone that is held begins.
    pub(super) start: u64,
    pub(super) kind: Kind,
    /// Bytes that the request is about.
    pub(super) len: u64,
    /// When it was taken.
    pub(super) began: u64,
    pub(super) durable: bool,
    /// It goes through the bounce buffer.
    pub(super) bounced: bool,
    /// The companion was asked where its data is.
    pub(super) missed: bool,
    pub(super) retries: u8,
}

impl Job {
    /// What is left of it, for the companion.
    pub(super) fn part(&self, slot: u16, action: Action) -> Part {
        Part {
            slot,
            action,
            offset: self.offset,
            len: self.remaining,
            durable: self.durable && action != Action::Read,
        }
    }
}

/// What a completion means for its request.
pub(super) enum Next {
    Done(Status),
    /// Another operation was started, or waits.
    Pending,
}

/// Jobs and who has which slot.
pub(super) struct Slots<'q> {
    pub(super) jobs: &'q mut Vec<Option<Job>>,
    pub(super) ranges: &'q mut Vec<Vec<Range>>,
    pub(super) new_ranges: &'q mut Vec<Range>,
    pub(super) answers: &'q mut Vec<Vec<Segment>>,
    pub(super) free: &'q mut Vec<u16>,
    pub(super) waiting: &'q mut VecDeque<u16>,
    pub(super) bouncing: &'q mut Option<u16>,
}

impl Slots<'_> {
    pub(super) fn take(&mut self) -> Option<u16> {
        self.free.pop()
    }

    pub(super) fn get(&self, slot: u16) -> Option<Job> {
        self.jobs.get(usize::from(slot)).copied().flatten()
    }

    pub(super) fn put(&mut self, slot: u16, job: Job) {
        if let Some(place) = self.jobs.get_mut(usize::from(slot)) {
            *place = Some(job);
        }
    }

    /// Gives a slot the ranges of the request that was parsed last.
    pub(super) fn keep_ranges(&mut self, slot: u16) {
        if let Some(ranges) = self.ranges.get_mut(usize::from(slot)) {
            std::mem::swap(ranges, self.new_ranges);
            ranges.reverse();
        }
    }

    /// Keeps where a job writes its answer, with the status at the end.
    pub(super) fn keep_answer(&mut self, slot: u16, segments: &[Segment]) {
        if let Some(answer) = self.answers.get_mut(usize::from(slot)) {
            answer.clear();
            answer.extend_from_slice(segments);
        }
    }

    pub(super) fn answer(&self, slot: u16) -> &[Segment] {
        self.answers
            .get(usize::from(slot))
            .map_or(&[], Vec::as_slice)
    }

    /// Where append_sector is in an answer: directly before the status.
    pub(super) fn append_answer(&self, slot: u16) -> (&[Segment], u64) {
        let segments = self.answer(slot);
        let len = segments
            .iter()
            .map(|segment| u64::from(segment.len))
            .sum::<u64>();
        (
            segments,
            len.saturating_sub(APPEND_ANSWER_LEN.saturating_add(1)),
        )
    }

    pub(super) fn next_range(&mut self, slot: u16) -> Option<Range> {
        self.ranges.get_mut(usize::from(slot))?.pop()
    }

    pub(super) fn release(&mut self, slot: u16) {
        if let Some(place) = self.jobs.get_mut(usize::from(slot)) {
            *place = None;
            self.free.push(slot);
        }
        if *self.bouncing == Some(slot) {
            *self.bouncing = None;
        }
    }
}

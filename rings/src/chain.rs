//! Descriptor chains, gathered into a buffer that is allocated once.

use crate::error::ChainError;
use crate::segment::Segment;
use crate::table::table_limit;

/// Room for the segments of one chain, reused from chain to chain.
#[derive(Debug)]
pub struct ChainBuf {
    segments: Vec<Segment>,
    /// The first this many segments are device-readable, the rest device-writable.
    readable: usize,
    readable_len: u64,
    writable_len: u64,
    limit: usize,
}

/// Most bytes in a chain (VIRTIO 1.3, 2.7.5.2).
pub(crate) const MAX_BYTES: u64 = 1 << 32;

impl ChainBuf {
    /// Allocates room for the longest chain of a queue of `queue_size` descriptors (VIRTIO 1.3, 2.7.5.3.1).
    #[must_use]
    pub fn new(queue_size: u16) -> Self {
        let limit = usize::from(table_limit(queue_size));
        Self {
            segments: Vec::with_capacity(limit),
            readable: 0,
            readable_len: 0,
            writable_len: 0,
            limit,
        }
    }

    /// The device-writable segments of the chain that it holds.
    #[inline]
    #[must_use]
    pub fn writable(&self) -> &[Segment] {
        self.segments.get(self.readable..).unwrap_or_default()
    }

    /// Length of all device-writable segments in bytes.
    #[inline]
    pub(crate) fn writable_len(&self) -> u64 {
        self.writable_len
    }

    #[inline]
    pub(crate) fn clear(&mut self) {
        self.segments.clear();
        self.readable = 0;
        self.readable_len = 0;
        self.writable_len = 0;
    }

    /// Holds this segment and no other.
    #[inline]
    pub(crate) fn set(&mut self, segment: Segment, writable: bool) {
        let len = u64::from(segment.len);
        self.segments.clear();
        // Within the capacity taken in `new`: never allocates.
        self.segments.push(segment);
        (self.readable, self.readable_len, self.writable_len) =
            if writable { (0, 0, len) } else { (1, len, 0) };
    }

    /// Appends a segment; `limit` is the queue's own bound on chain length.
    #[inline]
    pub(crate) fn push(
        &mut self,
        segment: Segment,
        writable: bool,
        limit: u16,
    ) -> Result<(), ChainError> {
        let limit = self.limit.min(usize::from(limit));
        let count = self.segments.len();
        if count >= limit {
            return Err(ChainError::TooLong { limit });
        }
        let len = u64::from(segment.len);
        if writable {
            self.writable_len = self.writable_len.saturating_add(len);
        } else {
            if count != self.readable {
                return Err(ChainError::ReadableAfterWritable);
            }
            self.readable = count.saturating_add(1);
            self.readable_len = self.readable_len.saturating_add(len);
        }
        if self.readable_len.saturating_add(self.writable_len) > MAX_BYTES {
            return Err(ChainError::TooManyBytes);
        }
        // Within the capacity taken in `new`: never allocates.
        self.segments.push(segment);
        Ok(())
    }

    #[inline]
    pub(crate) fn chain(&self, head: u16) -> Chain<'_> {
        Chain { head, buf: self }
    }
}

/// One descriptor chain that the driver made available: a request.
///
/// Its segments were checked to lie in guest memory; the bytes in them stay under the driver's
/// control, so read each of them once.
// A reference, as a copy costs more than it seems: its lengths were stored a moment ago, one by one. Loads that take both at once
// cannot be forwarded from those stores, and wait until the data of the chain before is in the cache.
#[derive(Debug, Clone, Copy)]
pub struct Chain<'b> {
    head: u16,
    buf: &'b ChainBuf,
}

impl<'b> Chain<'b> {
    /// What it is returned by: the number of its head descriptor, which is below the queue size, or on a
    /// packed virtqueue its buffer id, which can be any number. Unique among the chains in flight.
    #[inline]
    #[must_use]
    pub fn head(&self) -> u16 {
        self.head
    }

    /// The device-readable segments, in order.
    #[inline]
    #[must_use]
    pub fn readable(&self) -> &'b [Segment] {
        // `readable` never exceeds the number of segments.
        self.buf
            .segments
            .get(..self.buf.readable)
            .unwrap_or_default()
    }

    /// The device-writable segments, in order.
    #[inline]
    #[must_use]
    pub fn writable(&self) -> &'b [Segment] {
        self.buf.writable()
    }

    /// Length of all device-readable segments in bytes.
    #[inline]
    #[must_use]
    pub fn readable_len(&self) -> u64 {
        self.buf.readable_len
    }

    /// Length of all device-writable segments in bytes.
    #[inline]
    #[must_use]
    pub fn writable_len(&self) -> u64 {
        self.buf.writable_len
    }
}

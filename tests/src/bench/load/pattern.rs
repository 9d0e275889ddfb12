//! Which request comes next, and what a block must hold.

use std::ops::Range;

use vm_memory::{Bytes, VolatileSlice};

use super::error::LoadError;
use super::options::{LoadArgs, Shape};

/// What a request does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// VIRTIO_BLK_T_IN
    Read,
    /// VIRTIO_BLK_T_OUT
    Write,
}

/// One request: a block of the disk, counted in requests' sizes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Op {
    pub(super) kind: Kind,
    pub(super) block: u64,
}

/// A generator of numbers that look random (xorshift64*): a few instructions each, and the same in each run.
#[derive(Debug)]
struct Random(u64);

impl Random {
    fn new(seed: u64) -> Self {
        Self(mix(seed) | 1)
    }

    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// A number below `limit`.
    fn below(&mut self, limit: u64) -> u64 {
        let product = u128::from(self.next()) * u128::from(limit);
        u64::try_from(product >> 64).unwrap_or_default()
    }
}

/// Spreads a number over all bits (the finalizer of splitmix64).
fn mix(number: u64) -> u64 {
    let mut z = number.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// What is known of one block.
#[derive(Debug, Clone, Copy, Default)]
struct Block {
    /// How often it was written; its content is unknown as long as that is 0.
    generation: u32,
    busy: bool,
}

/// The requests of one queue.
#[derive(Debug)]
pub(super) struct Pattern {
    shape: Shape,
    /// Reads of 100.
    mix: u64,
    range: Range<u64>,
    next: u64,
    random: Random,
    /// With verification: each block of the range.
    blocks: Option<Vec<Block>>,
}

impl Pattern {
    pub(super) fn new(args: &LoadArgs, range: Range<u64>) -> Result<Self, LoadError> {
        let blocks = if args.verify {
            let count = usize::try_from(range.end - range.start)
                .map_err(|_| LoadError::Option("--verify: the disk is too large".into()))?;
            Some(vec![Block::default(); count])
        } else {
            None
        };
        Ok(Self {
            shape: args.shape,
            mix: u64::from(args.mix),
            next: range.start,
            random: Random::new(range.start),
            range,
            blocks,
        })
    }

    /// The next request.
    #[inline]
    pub(super) fn next(&mut self) -> Op {
        let random = !matches!(self.shape, Shape::Read | Shape::Write);
        let mut block = if random {
            self.range.start + self.random.below(self.range.end - self.range.start)
        } else {
            self.next
        };
        if self.blocks.is_some() {
            // At most half of the range is busy.
            while self.is_busy(block) {
                block = self.after(block);
            }
        }
        self.next = self.after(block);
        let kind = match self.shape {
            Shape::Read | Shape::Randread => Kind::Read,
            Shape::Write | Shape::Randwrite => Kind::Write,
            Shape::Randrw if self.random.below(100) < self.mix => Kind::Read,
            Shape::Randrw => Kind::Write,
        };
        match self.known(block) {
            None => Op { kind, block },
            Some(known) => {
                known.busy = true;
                // Nothing can be said of what was never written.
                let kind = if known.generation == 0 {
                    Kind::Write
                } else {
                    kind
                };
                if kind == Kind::Write {
                    known.generation = known.generation.wrapping_add(1).max(1);
                }
                Op { kind, block }
            }
        }
    }

    /// After the load: a read of each block that was written, one after the other from `from` on.
    pub(super) fn next_of_sweep(&mut self, from: &mut u64) -> Option<Op> {
        self.blocks.as_ref()?;
        loop {
            let block = self.range.start.saturating_add(*from);
            if block >= self.range.end {
                return None;
            }
            *from = from.saturating_add(1);
            if let Some(known) = self.known(block)
                && known.generation > 0
            {
                known.busy = true;
                return Some(Op {
                    kind: Kind::Read,
                    block,
                });
            }
        }
    }

    /// Blocks hold stamps.
    pub(super) fn verifies(&self) -> bool {
        self.blocks.is_some()
    }

    /// Fills the buffer of a write.
    pub(super) fn fill<B: vm_memory::bitmap::BitmapSlice>(
        &mut self,
        op: Op,
        data: &VolatileSlice<'_, B>,
    ) -> Result<(), LoadError> {
        let generation = self.known(op.block).map_or(0, |known| known.generation);
        for (offset, word) in (0..data.len()).step_by(8).zip(stamp(op.block, generation)) {
            data.write_obj(word, offset)
                .map_err(|_| LoadError::Access { addr: 0 })?;
        }
        Ok(())
    }

    /// Ends a request: compares what was read.
    pub(super) fn end<B: vm_memory::bitmap::BitmapSlice>(
        &mut self,
        op: Op,
        len: u32,
        data: &VolatileSlice<'_, B>,
    ) -> Result<(), LoadError> {
        let Some(known) = self.known(op.block) else {
            return Ok(());
        };
        known.busy = false;
        if op.kind == Kind::Write {
            return Ok(());
        }
        for (at, word) in (0..data.len())
            .step_by(8)
            .zip(stamp(op.block, known.generation))
        {
            let found: u64 = data
                .read_obj(at)
                .map_err(|_| LoadError::Access { addr: 0 })?;
            if found != word {
                let offset = op.block.saturating_mul(u64::from(len));
                return Err(LoadError::Corrupt { offset, len, at });
            }
        }
        Ok(())
    }

    fn after(&self, block: u64) -> u64 {
        let next = block + 1;
        if next < self.range.end {
            next
        } else {
            self.range.start
        }
    }

    fn is_busy(&mut self, block: u64) -> bool {
        self.known(block).is_some_and(|known| known.busy)
    }

    fn known(&mut self, block: u64) -> Option<&mut Block> {
        let index = usize::try_from(block - self.range.start).ok()?;
        self.blocks.as_mut()?.get_mut(index)
    }
}

/// The words that a block holds after its write number `generation`: its place, that number, and words that follow from both.
fn stamp(block: u64, generation: u32) -> impl Iterator<Item = u64> {
    let seed = mix(block ^ mix(u64::from(generation)));
    [block, u64::from(generation)]
        .into_iter()
        .chain((2_u64..).map(move |word| seed.wrapping_mul(word * 2 + 1)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pattern(shape: Shape, verify: bool) -> Pattern {
        Pattern {
            shape,
            mix: 70,
            range: 10..20,
            next: 10,
            random: Random::new(1),
            blocks: verify.then(|| vec![Block::default(); 10]),
        }
    }

    #[test]
    fn sequential_requests_wrap_around() {
        let mut pattern = pattern(Shape::Read, false);
        let blocks: Vec<u64> = (0..12).map(|_| pattern.next().block).collect();
        assert_eq!(blocks, [10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 10, 11]);
    }

    #[test]
    fn random_requests_reach_all_of_the_range_and_nothing_else() {
        let mut pattern = pattern(Shape::Randrw, false);
        let ops: Vec<Op> = (0..10_000).map(|_| pattern.next()).collect();
        for block in 10..20 {
            let count = ops.iter().filter(|op| op.block == block).count();
            assert!((800..1200).contains(&count), "{block}: {count}");
        }
        let reads = ops.iter().filter(|op| op.kind == Kind::Read).count();
        assert!((6700..7300).contains(&reads), "{reads}");
        assert!(ops.iter().all(|op| (10..20).contains(&op.block)));
    }

    #[test]
    fn verified_blocks_are_written_first_and_never_twice_in_flight() {
        let mut pattern = pattern(Shape::Randrw, true);
        let ops: Vec<Op> = (0..5).map(|_| pattern.next()).collect();
        assert!(ops.iter().all(|op| op.kind == Kind::Write));
        let mut blocks: Vec<u64> = ops.iter().map(|op| op.block).collect();
        blocks.sort_unstable();
        blocks.dedup();
        assert_eq!(blocks.len(), 5);
    }

    #[test]
    fn stale_and_misplaced_data_is_found() {
        let mut memory = vec![0_u8; 512];
        let data = VolatileSlice::from(memory.as_mut_slice());
        let mut pattern = pattern(Shape::Write, true);
        let first = pattern.next();
        pattern.fill(first, &data).unwrap();
        pattern.end(first, 512, &data).unwrap();
        let read = Op {
            kind: Kind::Read,
            ..first
        };
        pattern.end(read, 512, &data).unwrap();
        // Another block with the same content.
        let second = pattern.next();
        let misplaced = Op {
            kind: Kind::Read,
            ..second
        };
        let error = pattern.end(misplaced, 512, &data).unwrap_err();
        assert!(matches!(error, LoadError::Corrupt { at: 0, .. }), "{error}");
        // The content before the last write.
        pattern.known(first.block).unwrap().generation += 1;
        let error = pattern.end(read, 512, &data).unwrap_err();
        assert!(matches!(error, LoadError::Corrupt { at: 8, .. }), "{error}");
        // One byte at the end.
        pattern.known(first.block).unwrap().generation -= 1;
        data.write_obj(0xa5_u8, 511).unwrap();
        let error = pattern.end(read, 512, &data).unwrap_err();
        assert!(
            matches!(error, LoadError::Corrupt { at: 504, .. }),
            "{error}"
        );
    }

    #[test]
    fn the_sweep_reads_what_was_written_and_no_more() {
        let mut pattern = pattern(Shape::Write, true);
        let written: Vec<u64> = (0..3).map(|_| pattern.next().block).collect();
        let mut from = 0;
        let swept: Vec<u64> = std::iter::from_fn(|| pattern.next_of_sweep(&mut from))
            .map(|op| op.block)
            .collect();
        assert_eq!(swept, written);
    }
}

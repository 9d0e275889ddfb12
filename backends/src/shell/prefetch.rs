//! Memory that is needed soon: the processor fetches all of it at once, where it would wait for one line of its cache after
//! the other while it copies.
#![allow(
    unsafe_code,
    reason = "the processor is told by instructions that have no safe function"
)]

/// Bytes that it is told of at most. Of more, those behind would not be there for long enough, and it foresees them by itself.
pub(crate) const MOST_PREFETCHED: usize = 2048;

/// Bytes of a line of a processor's cache.
#[cfg(target_arch = "x86_64")]
const LINE: usize = 64;

/// `len` bytes from `start` on are to be read; of more than [`MOST_PREFETCHED`], none. Any address will do.
#[cfg(target_arch = "x86_64")]
#[inline]
pub(crate) fn prefetch_to_read(start: *const u8, len: usize) {
    use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};

    // SAFETY: a hint, which does nothing to memory and cannot fail, whatever the address.
    each_line(start, len, |line| unsafe {
        _mm_prefetch::<_MM_HINT_T0>(line.cast());
    });
}

/// `len` bytes from `start` on are to be written; of more than [`MOST_PREFETCHED`], none. Any address will do.
#[cfg(target_arch = "x86_64")]
#[inline]
pub(crate) fn prefetch_to_write(start: *const u8, len: usize) {
    // SAFETY: a hint, which does nothing to memory and cannot fail, whatever the address; a processor that does not know it does
    // nothing at all.
    each_line(start, len, |line| unsafe {
        std::arch::asm!("prefetchw [{}]", in(reg) line, options(nostack, preserves_flags));
    });
}

#[cfg(target_arch = "x86_64")]
#[inline]
fn each_line(start: *const u8, len: usize, tell: impl Fn(*const u8)) {
    if len > MOST_PREFETCHED {
        return;
    }
    // The first one may begin before `start`, so that the last byte has one, too.
    let before = start.addr() % LINE;
    for offset in (0..before.saturating_add(len)).step_by(LINE) {
        tell(start.wrapping_sub(before).wrapping_add(offset));
    }
}

/// Other processors are not told.
#[cfg(not(target_arch = "x86_64"))]
pub(crate) fn prefetch_to_read(_: *const u8, _: usize) {}

/// As above.
#[cfg(not(target_arch = "x86_64"))]
pub(crate) fn prefetch_to_write(_: *const u8, _: usize) {}

//! Pages that are written while a guest moves: by its processors, which KVM notes, and by back-ends, which note it in memory
//! that they share with us (vhost-user, "Migration").

use std::fs::File;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};

use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::unistd::ftruncate;
use vm_memory::{
    FileOffset, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, MmapRegion, VolatileMemory,
};

/// Bytes of guest memory that a bit stands for (VHOST_LOG_PAGE; KVM's pages have the same size).
pub const PAGE: u64 = 4096;
/// Bits in a word of a bitmap.
const WORD: u64 = 64;

/// A set of pages of guest memory, by their number.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Pages(Vec<u64>);

impl Pages {
    /// None of the pages of `memory`.
    pub fn none_of(memory: &GuestMemoryMmap) -> Self {
        let words = usize::try_from(words(memory)).unwrap_or(0);
        Self(vec![0; words])
    }

    /// Adds the pages of a bitmap whose first bit is that of the page at `start`. Those beyond the last page are left out.
    pub fn add(&mut self, start: u64, bitmap: impl IntoIterator<Item = u64>) {
        let first = start / PAGE;
        for (word, bits) in (0u64..).zip(bitmap) {
            let mut left = bits;
            while left != 0 {
                let page = first
                    .saturating_add(word.saturating_mul(WORD))
                    .saturating_add(left.trailing_zeros().into());
                left &= left - 1;
                let place = usize::try_from(page / WORD).unwrap_or(usize::MAX);
                if let Some(place) = self.0.get_mut(place) {
                    *place |= 1 << (page % WORD);
                }
            }
        }
    }

    /// How many there are.
    pub fn count(&self) -> u64 {
        self.0.iter().map(|word| u64::from(word.count_ones())).sum()
    }

    /// Runs of pages that follow each other, at most `limit` in each: the first one's address, and how many there are.
    pub fn runs(&self, limit: u64) -> impl Iterator<Item = (u64, u64)> {
        let pages = (0u64..).zip(&self.0).flat_map(|(word, bits)| {
            (0..WORD)
                .filter(move |bit| bits >> bit & 1 != 0)
                .map(move |bit| word * WORD + bit)
        });
        let mut pages = pages.peekable();
        std::iter::from_fn(move || {
            let first = pages.next()?;
            let mut count = 1;
            while count < limit && pages.next_if_eq(&(first + count)).is_some() {
                count += 1;
            }
            Some((first * PAGE, count))
        })
    }
}

/// Words of a bitmap of all pages up to the last one of `memory`.
fn words(memory: &GuestMemoryMmap) -> u64 {
    let last = memory.iter().map(|region| region.last_addr().0).max();
    let pages = last.unwrap_or(0) / PAGE + 1;
    pages.div_ceil(WORD)
}

/// The bitmap that back-ends share with us. Any of them may write anything into it: that costs pages which are sent again.
pub struct DirtyLog {
    region: MmapRegion,
    words: u64,
}

impl DirtyLog {
    /// One for all of `memory`.
    ///
    /// # Errors
    /// The host has no memory for it.
    pub fn new(memory: &GuestMemoryMmap) -> io::Result<Self> {
        let words = words(memory);
        let size = words * WORD / 8;
        let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
        let file: File = memfd_create("dirty-log", flags)?.into();
        ftruncate(&file, i64::try_from(size).map_err(io::Error::other)?)?;
        let seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL;
        fcntl(&file, FcntlArg::F_ADD_SEALS(seals))?;
        let length = usize::try_from(size).map_err(io::Error::other)?;
        let region = MmapRegion::from_file(FileOffset::new(file, 0), length);
        Ok(Self {
            region: region.map_err(io::Error::other)?,
            words,
        })
    }

    /// The file it is in, from its start.
    pub fn file(&self) -> Option<&File> {
        self.region.file_offset().map(FileOffset::file)
    }

    /// Its length in bytes.
    pub fn size(&self) -> u64 {
        self.words * WORD / 8
    }

    /// Moves what is noted in it to `pages`.
    pub fn take(&self, pages: &mut Pages) {
        let word = |index: u64| {
            let at = usize::try_from(index * WORD / 8).ok()?;
            let word = self.region.get_atomic_ref::<AtomicU64>(at).ok()?;
            // Most words stay empty; reading alone leaves their cache lines shared.
            let noted = word.load(Ordering::Relaxed) != 0;
            Some(if noted {
                word.swap(0, Ordering::AcqRel)
            } else {
                0
            })
        };
        pages.add(0, (0..self.words).map_while(word));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;
    use vm_memory::GuestAddress;

    fn memory() -> GuestMemoryMmap {
        GuestMemoryMmap::from_ranges(&[
            (GuestAddress(0), 1 << 20),
            (GuestAddress(4 << 20), 1 << 20),
        ])
        .unwrap()
    }

    #[test]
    fn the_log_gives_each_page_once() {
        let log = DirtyLog::new(&memory()).unwrap();
        assert_eq!(log.size(), 160);
        let noted = log.region.get_atomic_ref::<AtomicU64>(8 * 16).unwrap();
        noted.store(0b101, Ordering::SeqCst);
        let mut pages = Pages::none_of(&memory());
        log.take(&mut pages);
        let found: Vec<_> = pages.runs(8).collect();
        assert_eq!(found, [(4 << 20, 1), ((4 << 20) + 8192, 1)]);
        let mut again = Pages::none_of(&memory());
        log.take(&mut again);
        assert_eq!(again.count(), 0);
    }

    proptest! {
        #[test]
        fn runs_are_all_pages_in_order(
            chosen in proptest::collection::btree_set(0u64..1300, 0..200), limit in 1u64..9
        ) {
            let mut pages = Pages::none_of(&memory());
            for page in &chosen {
                pages.add(page / 7 * 7 * PAGE, [1 << (page % 7)]);
            }
            // The last page of memory is number 1279.
            let chosen: BTreeSet<u64> = chosen.into_iter().filter(|page| *page < 1280).collect();
            prop_assert_eq!(pages.count(), u64::try_from(chosen.len()).unwrap());
            let mut found = BTreeSet::new();
            for (start, count) in pages.runs(limit) {
                prop_assert!(count <= limit);
                found.extend((0..count).map(|page| start / PAGE + page));
            }
            prop_assert_eq!(found, chosen);
        }
    }
}

//! Guest RAM: one memfd, and one for each piece of memory that is added while the guest runs; mapped
//! shared, their sizes sealed so that peers that map them can trust them.

use std::fs::File;
use std::io;
use std::sync::Arc;

use nix::fcntl::{FallocateFlags, FcntlArg, SealFlag, fallocate, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::unistd::ftruncate;
use ringside_control::Size;
use ringside_sandbox::memory::exclude_from_dumps;
use vm_memory::{
    FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion,
    GuestRegionMmap, MmapRegion,
};

use crate::layout::{self, Range};

/// The least RAM a guest can have.
pub const MIN_SIZE: u64 = 16 << 20;

/// Why there is no guest RAM.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Too little to boot anything.
    #[error(
        "guest memory of {size} is too small: give at least {}",
        Size(MIN_SIZE)
    )]
    TooSmall {
        /// What was asked for.
        size: Size,
    },
    /// More than the host has.
    #[error("guest memory of {size} is more than this host's memory and swap, {host}")]
    TooLarge {
        /// What was asked for.
        size: Size,
        /// RAM and swap of the host.
        host: Size,
    },
    /// Not a whole number of pages.
    #[error("guest memory of {size} is not a multiple of the page size, {page}")]
    Unaligned {
        /// What was asked for.
        size: Size,
        /// Size of the pages asked for.
        page: Size,
    },
    /// The host's memory cannot be inquired.
    #[error("cannot find out how much memory the host has")]
    Host(#[source] io::Error),
    /// No memfd.
    #[error("cannot create the guest memory's memfd of {size}{}", hugepage_hint(*pages))]
    Create {
        /// What was asked for.
        size: Size,
        /// Which pages.
        pages: PageSize,
        /// The kernel's reason.
        #[source]
        source: io::Error,
    },
    /// No pages behind the memfd.
    #[error("cannot allocate {size} of guest memory{}", hugepage_hint(*pages))]
    Allocate {
        /// What was asked for.
        size: Size,
        /// Which pages.
        pages: PageSize,
        /// The kernel's reason.
        #[source]
        source: io::Error,
    },
    /// No mapping of the memfd.
    #[error("cannot map {size} of guest memory{}", hugepage_hint(*pages))]
    Map {
        /// What was asked for.
        size: Size,
        /// Which pages.
        pages: PageSize,
        /// vm-memory's reason.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

fn hugepage_hint(pages: PageSize) -> &'static str {
    match pages {
        PageSize::Normal => "",
        PageSize::HugeDefault => " in huge pages: is /proc/sys/vm/nr_hugepages large enough?",
        PageSize::Huge2M => {
            " in pages of 2 MiB: is /sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages large \
             enough?"
        }
        PageSize::Huge1G => {
            " in pages of 1 GiB: is /sys/kernel/mm/hugepages/hugepages-1048576kB/nr_hugepages \
             large enough?"
        }
    }
}

/// What guest RAM is made of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum PageSize {
    /// The host's normal pages.
    #[default]
    Normal,
    /// Huge pages of the host's default size.
    HugeDefault,
    /// Huge pages of 2 MiB.
    Huge2M,
    /// Huge pages of 1 GiB.
    Huge1G,
}

impl PageSize {
    /// Of what the RAM's size must be a multiple. The default huge page is 2 MiB on x86-64 unless
    /// the kernel's command line says otherwise; then the kernel refuses what does not fit.
    pub fn bytes(self) -> u64 {
        match self {
            Self::Normal => 4096,
            Self::HugeDefault | Self::Huge2M => 2 << 20,
            Self::Huge1G => 1 << 30,
        }
    }

    fn flags(self) -> MFdFlags {
        match self {
            Self::Normal => MFdFlags::empty(),
            Self::HugeDefault => MFdFlags::MFD_HUGETLB,
            Self::Huge2M => MFdFlags::MFD_HUGETLB | MFdFlags::MFD_HUGE_2MB,
            Self::Huge1G => MFdFlags::MFD_HUGETLB | MFdFlags::MFD_HUGE_1GB,
        }
    }
}

/// What guest RAM is to be like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// Size in bytes.
    pub size: Size,
    /// What it is made of.
    pub pages: PageSize,
    /// Allocate all pages at the start instead of when the guest first touches them.
    pub prefault: bool,
}

impl Options {
    /// Checks what can be checked without a look at the host.
    pub fn check(&self) -> Result<(), Error> {
        let size = self.size;
        if size.0 < MIN_SIZE {
            return Err(Error::TooSmall { size });
        }
        let page = Size(self.pages.bytes());
        if !size.0.is_multiple_of(page.0) {
            return Err(Error::Unaligned { size, page });
        }
        Ok(())
    }
}

/// Guest RAM, mapped into this process.
pub struct GuestRam {
    memory: GuestMemoryMmap,
    size: u64,
}

impl GuestRam {
    /// Allocates and maps guest RAM.
    pub fn new(options: Options) -> Result<Self, Error> {
        let Options { size, pages, .. } = options;
        let regions = allocate(options, &layout::ram_ranges(size.0))?;
        let memory = GuestMemoryMmap::from_regions(regions).map_err(|e| Error::Map {
            size,
            pages,
            source: e.into(),
        })?;
        Ok(Self {
            memory,
            size: size.0,
        })
    }

    /// The mapping; its regions know their file offsets.
    pub fn memory(&self) -> &GuestMemoryMmap {
        &self.memory
    }

    /// Size in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// First guest-physical address after RAM.
    pub fn end(&self) -> u64 {
        self.memory
            .iter()
            .map(|r| r.start_addr().0 + r.len())
            .max()
            .unwrap_or(0)
    }
}

/// Allocates and maps memory at `start` of a guest that has `memory`: one region, in a file of its
/// own. Returns the new piece alone, and all of memory with it.
pub fn add(
    memory: &GuestMemoryMmap,
    options: Options,
    start: u64,
) -> Result<(GuestMemoryMmap, GuestMemoryMmap), Error> {
    let Options { size, pages, .. } = options;
    let range = Range {
        start,
        size: size.0,
    };
    let regions: Vec<_> = allocate(options, &[range])?
        .into_iter()
        .map(Arc::new)
        .collect();
    let whole = regions.iter().try_fold(memory.clone(), |whole, region| {
        whole.insert_region(Arc::clone(region))
    });
    let piece = GuestMemoryMmap::from_arc_regions(regions);
    piece
        .and_then(|piece| Ok((piece, whole?)))
        .map_err(|e| Error::Map {
            size,
            pages,
            source: e.into(),
        })
}

/// Allocates memory in one file and maps it for `ranges` of the guest's address space, whose sizes
/// sum up to what `options` say.
fn allocate(options: Options, ranges: &[Range]) -> Result<Vec<GuestRegionMmap>, Error> {
    let Options {
        size,
        pages,
        prefault,
    } = options;
    options.check()?;
    check_host(options, host_memory()?)?;

    let map_error = |source| Error::Map {
        size,
        pages,
        source,
    };
    let file = sealed_file(size, pages).map_err(|source| Error::Create {
        size,
        pages,
        source,
    })?;
    if prefault {
        // Unlike MAP_POPULATE alone this reports a lack of memory.
        let length = i64::try_from(size.0).unwrap_or(i64::MAX);
        fallocate(&file, FallocateFlags::empty(), 0, length).map_err(|e| Error::Allocate {
            size,
            pages,
            source: e.into(),
        })?;
    }

    let file = Arc::new(file);
    let mut regions = Vec::new();
    let mut offset = 0;
    for range in ranges {
        let populate = if prefault { libc::MAP_POPULATE } else { 0 };
        let bytes = usize::try_from(range.size).map_err(|e| map_error(e.into()))?;
        let mapping = MmapRegion::build(
            Some(FileOffset::from_arc(Arc::clone(&file), offset)),
            bytes,
            libc::PROT_READ | libc::PROT_WRITE,
            // Without MAP_NORESERVE a lack of huge pages shows here, not as SIGBUS later.
            libc::MAP_SHARED | populate,
        )
        .map_err(|e| map_error(e.into()))?;
        if let Err(error) = exclude_from_dumps(mapping.as_ptr(), bytes) {
            tracing::debug!(%error, "guest memory would be part of a core dump");
        }
        let region = GuestRegionMmap::new(mapping, GuestAddress(range.start))
            .ok_or_else(|| map_error("the region wraps around".into()))?;
        regions.push(region);
        offset += range.size;
    }
    Ok(regions)
}

/// The file behind guest RAM. Its size is for good: a process that maps it must not be killed by
/// SIGBUS because a peer truncates it.
fn sealed_file(size: Size, pages: PageSize) -> io::Result<File> {
    let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING | pages.flags();
    let file: File = memfd_create("guest-ram", flags)?.into();
    ftruncate(&file, i64::try_from(size.0).map_err(io::Error::other)?)?;
    let seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL;
    fcntl(&file, FcntlArg::F_ADD_SEALS(seals))?;
    Ok(file)
}

fn check_host(options: Options, host: Size) -> Result<(), Error> {
    let size = options.size;
    if size > host {
        return Err(Error::TooLarge { size, host });
    }
    Ok(())
}

fn host_memory() -> Result<Size, Error> {
    let info = nix::sys::sysinfo::sysinfo().map_err(|e| Error::Host(e.into()))?;
    Ok(Size(info.ram_total().saturating_add(info.swap_total())))
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::Bytes;

    fn options(size: u64) -> Options {
        Options {
            size: Size(size),
            pages: PageSize::Normal,
            prefault: false,
        }
    }

    #[test]
    fn absurd_sizes_are_refused() {
        let host = Size(8 << 30);
        assert!(matches!(options(0).check(), Err(Error::TooSmall { .. })));
        assert!(matches!(
            check_host(options(9 << 30), host),
            Err(Error::TooLarge { .. })
        ));
        assert!(matches!(
            options((1 << 30) + 1).check(),
            Err(Error::Unaligned { .. })
        ));
        let huge = Options {
            pages: PageSize::Huge1G,
            ..options(1 << 29)
        };
        assert!(matches!(huge.check(), Err(Error::Unaligned { .. })));
        check_host(options(8 << 30), host).unwrap();
        assert!(GuestRam::new(options(1 << 50)).is_err());
    }

    /// The file behind all regions.
    fn file(ram: &GuestRam) -> &File {
        let region = ram.memory().iter().next().unwrap();
        region.file_offset().unwrap().file()
    }

    #[test]
    fn ram_is_one_sealed_file_around_the_hole() {
        let ram = GuestRam::new(options(layout::LOW_RAM_END + (1 << 20))).unwrap();
        assert_eq!(ram.end(), layout::HIGH_RAM_START + (1 << 20));
        let offsets: Vec<u64> = ram
            .memory()
            .iter()
            .map(|r| r.file_offset().unwrap().start())
            .collect();
        assert_eq!(offsets, [0, layout::LOW_RAM_END]);
        assert!(
            ram.memory()
                .write_obj(1u8, GuestAddress(layout::LOW_RAM_END))
                .is_err()
        );
        ram.memory()
            .write_obj(1u8, GuestAddress(layout::HIGH_RAM_START))
            .unwrap();
        // Shared: what the guest writes is in the file.
        let mut byte = [0];
        std::os::unix::fs::FileExt::read_exact_at(file(&ram), &mut byte, layout::LOW_RAM_END)
            .unwrap();
        assert_eq!(byte, [1]);
        assert!(file(&ram).set_len(4096).is_err());
        assert!(file(&ram).set_len(8 << 30).is_err());
    }

    #[test]
    fn a_peer_cannot_change_the_size_whatever_the_pages_are() {
        for pages in [
            PageSize::Normal,
            PageSize::HugeDefault,
            PageSize::Huge2M,
            PageSize::Huge1G,
        ] {
            let size = 4 << 30;
            let file = match sealed_file(Size(size), pages) {
                Ok(file) => file,
                // A kernel without pages of this size; no page has to be free, though.
                Err(_) if pages != PageSize::Normal => continue,
                Err(error) => panic!("{error}"),
            };
            for other in [0, size - (1 << 30), size + (1 << 30)] {
                assert!(file.set_len(other).is_err(), "{pages:?} {other}");
            }
            let weaker = FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_WRITE);
            assert!(fcntl(&file, weaker).is_err(), "{pages:?}");
            assert_eq!(file.metadata().unwrap().len(), size);
        }
    }

    #[test]
    fn added_memory_is_one_region_in_a_sealed_file_of_its_own() {
        let (ram, start) = (GuestRam::new(options(MIN_SIZE)).unwrap(), 4 << 30);
        let (piece, whole) = add(ram.memory(), options(2 * MIN_SIZE), start).unwrap();
        let region = piece.iter().next().unwrap();
        assert_eq!((piece.num_regions(), region.len()), (1, 2 * MIN_SIZE));
        assert_eq!(whole.num_regions(), 2);
        let file = region.file_offset().unwrap();
        assert_eq!(file.start(), 0);
        assert!(file.file().set_len(4096).is_err());
        // One mapping: what is written to the one is in the other.
        whole.write_obj(7u8, GuestAddress(start)).unwrap();
        assert_eq!(piece.read_obj::<u8>(GuestAddress(start)).unwrap(), 7);
        for taken in [0, u64::MAX - 4095] {
            let error = add(ram.memory(), options(MIN_SIZE), taken);
            assert!(matches!(error, Err(Error::Map { .. })));
        }
    }

    #[test]
    fn prefault_allocates() {
        let ram = GuestRam::new(Options {
            prefault: true,
            ..options(MIN_SIZE)
        })
        .unwrap();
        let blocks = std::os::unix::fs::MetadataExt::blocks(&file(&ram).metadata().unwrap());
        assert_eq!(blocks * 512, MIN_SIZE);
    }
}

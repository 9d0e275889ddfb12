//! Guest memory as the front-end describes it: checked, mapped, and searched by the front-end's addresses.
//!
//! A file that is too short is refused when it is mapped. A front-end that truncates it later loses its connection, and
//! nobody else anything (`torn`).

use std::fs::File;
use std::io;
use std::sync::Arc;

use nix::sys::statfs::{FsType, HUGETLBFS_MAGIC, TMPFS_MAGIC, fstatfs};
use ringside_sandbox::memory::exclude_from_dumps;
use thiserror::Error;
use tracing::debug;
use vhost::vhost_user::message::VhostUserMemoryRegion;
use vm_memory::mmap::MmapRegionError;
use vm_memory::{
    FileOffset, GuestAddress, GuestRegionCollectionError, GuestRegionMmap, MmapRegion,
};

use super::dirty::{self, DirtyLog, LogError, Mapping, Memory};
use super::torn::Guarded;

/// How many regions a front-end can add (VHOST_USER_GET_MAX_MEM_SLOTS): as many as KVM has slots.
pub(super) const MAX_SLOTS: usize = 509;

/// Most front-ends of one process.
pub(super) const MAX_FRONT_ENDS: usize = 64;

/// The same for each of several front-ends of one process: as many as QEMU's vhost-user code uses without being told
/// more, so that no front-end can use up what the others need.
pub(super) const MAX_SHARED: usize = 32;

/// A memory region that the front-end named cannot be used.
#[derive(Debug, Error)]
pub enum MemoryError {
    /// The region is empty, or an address range overflows.
    #[error(
        "memory region at guest address {guest:#x}, {len:#x} bytes: empty, or its end overflows"
    )]
    Range {
        /// Guest-physical start.
        guest: u64,
        /// Length in bytes.
        len: u64,
    },
    /// The file offset cannot be mapped.
    #[error(
        "memory region at guest address {guest:#x}: file offset {offset:#x} is not a multiple of the page size"
    )]
    Offset {
        /// Guest-physical start.
        guest: u64,
        /// Offset in the file in bytes.
        offset: u64,
    },
    /// The file ends before the region does; touching the rest would kill the process.
    #[error(
        "memory region at guest address {guest:#x}: its file has {size:#x} bytes, the region ends at {end:#x}"
    )]
    FileTooShort {
        /// Guest-physical start.
        guest: u64,
        /// Size of the file in bytes.
        size: u64,
        /// Where the region ends in the file.
        end: u64,
    },
    /// The file cannot be examined.
    #[error("memory region at guest address {guest:#x}: cannot examine its file")]
    Stat {
        /// Guest-physical start.
        guest: u64,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The pages of the file come from elsewhere.
    #[error(
        "memory that is shared with a program that serves several front-ends must be of a memfd, or of a file of tmpfs or \
         hugetlbfs; that of this file is {kind:#x} (statfs(2))"
    )]
    FileSystem {
        /// The kind of its file system.
        kind: i64,
    },
    /// The file system cannot be examined.
    #[error("cannot examine the file system of shared memory")]
    StatFs(#[source] io::Error),
    /// The file cannot be mapped.
    #[error(
        "memory region at guest address {guest:#x}: cannot map its file for reading and writing"
    )]
    Map {
        /// Guest-physical start.
        guest: u64,
        /// What the system said.
        #[source]
        source: MmapRegionError,
    },
    /// Two regions overlap in the front-end's address space.
    #[error("memory regions overlap at front-end address {user:#x}")]
    UserOverlap {
        /// Start of the second region in the front-end's address space.
        user: u64,
    },
    /// Two regions overlap in guest memory.
    #[error("memory regions overlap in guest memory")]
    GuestOverlap(#[source] GuestRegionCollectionError),
    /// The dirty log does not go with it.
    #[error(transparent)]
    Log(#[from] LogError),
    /// The front-end added more regions than the back-end said it takes.
    #[error("more than {limit} memory regions")]
    TooMany {
        /// How many it takes.
        limit: usize,
    },
    /// A region to be removed is not there.
    #[error("there is no memory region at guest address {guest:#x} with {len:#x} bytes to remove")]
    NotFound {
        /// Guest-physical start.
        guest: u64,
        /// Length in bytes.
        len: u64,
    },
}

#[derive(Clone)]
struct Mapped {
    mapping: Arc<Mapping>,
    guest: u64,
    /// Where the front-end has the region in its own address space.
    user: u64,
    len: u64,
}

/// All regions of one front-end.
#[derive(Clone, Default)]
pub(super) struct MemoryTable {
    mapped: Vec<Mapped>,
    memory: Arc<Memory>,
}

impl MemoryTable {
    /// Maps the regions of a VHOST_USER_SET_MEM_TABLE.
    pub(super) fn new(
        regions: &[VhostUserMemoryRegion],
        files: Vec<File>,
        limit: usize,
    ) -> Result<Self, MemoryError> {
        if regions.len() > limit {
            return Err(MemoryError::TooMany { limit });
        }
        let mapped = regions
            .iter()
            .zip(files)
            .map(|(region, file)| map(region, file))
            .collect::<Result<_, _>>()?;
        Self::build(mapped)
    }

    /// The table with one region more (VHOST_USER_ADD_MEM_REG).
    pub(super) fn with(
        &self,
        region: &VhostUserMemoryRegion,
        file: File,
        limit: usize,
    ) -> Result<Self, MemoryError> {
        if self.mapped.len() >= limit {
            return Err(MemoryError::TooMany { limit });
        }
        let mut mapped = self.mapped.clone();
        mapped.push(map(region, file)?);
        Self::build(mapped)
    }

    /// The table without a region (VHOST_USER_REM_MEM_REG): it is named by guest address, front-end
    /// address and length.
    pub(super) fn without(&self, region: &VhostUserMemoryRegion) -> Result<Self, MemoryError> {
        let (guest, user, len) = (region.guest_phys_addr, region.user_addr, region.memory_size);
        let mut mapped = self.mapped.clone();
        let before = mapped.len();
        mapped.retain(|m| (m.guest, m.user, m.len) != (guest, user, len));
        if mapped.len() == before {
            return Err(MemoryError::NotFound { guest, len });
        }
        Self::build(mapped)
    }

    fn build(mut mapped: Vec<Mapped>) -> Result<Self, MemoryError> {
        mapped.sort_by_key(|m| m.user);
        for pair in mapped.windows(2) {
            if let [a, b] = pair
                && b.user.saturating_sub(a.user) < a.len
            {
                return Err(MemoryError::UserOverlap { user: b.user });
            }
        }
        mapped.sort_by_key(|m| m.guest);
        let memory = view(&mapped, None)?;
        Ok(Self { mapped, memory })
    }

    /// All regions, as a front-end describes them, and their files.
    pub(super) fn described(&self) -> impl Iterator<Item = (VhostUserMemoryRegion, &File)> {
        self.mapped.iter().filter_map(|mapped| {
            let offset = mapped.mapping.region.file_offset()?;
            let (guest, len, user) = (mapped.guest, mapped.len, mapped.user);
            let region = VhostUserMemoryRegion::new(guest, len, user, offset.start());
            Some((region, offset.file()))
        })
    }

    /// Some of it was taken away by the front-end, or lost by the host.
    pub(super) fn torn(&self) -> bool {
        self.mapped
            .iter()
            .any(|mapped| mapped.mapping.guarded.torn())
    }

    pub(super) fn memory(&self) -> &Arc<Memory> {
        &self.memory
    }

    /// The same memory, in which writes are marked in `log`.
    pub(super) fn logged(&self, log: &Arc<DirtyLog>) -> Result<Arc<Memory>, MemoryError> {
        self.check_log(log)?;
        view(&self.mapped, Some(log))
    }

    /// Refuses a log without a bit for each page.
    pub(super) fn check_log(&self, log: &DirtyLog) -> Result<(), LogError> {
        let ends = self.mapped.iter().map(|m| m.guest.saturating_add(m.len));
        let (end, covered) = (ends.max().unwrap_or(0), log.covered());
        if end > covered {
            return Err(LogError::TooShort { covered, end });
        }
        Ok(())
    }

    /// Guest-physical address of an address in the front-end's address space, in which vhost-user names
    /// ring addresses.
    pub(super) fn guest_address(&self, user: u64) -> Option<GuestAddress> {
        self.mapped.iter().find_map(|m| {
            let offset = user.checked_sub(m.user)?;
            (offset < m.len).then_some(())?;
            m.guest.checked_add(offset).map(GuestAddress)
        })
    }
}

/// All regions, sorted by guest address, as memory that is logged or not.
fn view(mapped: &[Mapped], log: Option<&Arc<DirtyLog>>) -> Result<Arc<Memory>, MemoryError> {
    let mut regions = Vec::new();
    for m in mapped {
        let (guest, len) = (m.guest, m.len);
        let region = dirty::view(&m.mapping, guest, log)
            .map_err(|source| MemoryError::Map { guest, source })?;
        let region = GuestRegionMmap::new(region, GuestAddress(guest))
            .ok_or(MemoryError::Range { guest, len })?;
        regions.push(region);
    }
    match Memory::from_regions(regions) {
        Ok(memory) => Ok(Arc::new(memory)),
        Err(GuestRegionCollectionError::NoMemoryRegion) => Ok(Arc::default()),
        Err(e) => Err(MemoryError::GuestOverlap(e)),
    }
}

fn map(region: &VhostUserMemoryRegion, file: File) -> Result<Mapped, MemoryError> {
    let (guest, len, user, offset) = (
        region.guest_phys_addr,
        region.memory_size,
        region.user_addr,
        region.mmap_offset,
    );
    let range = || MemoryError::Range { guest, len };
    let size = usize::try_from(len).map_err(|_| range())?;
    let end = offset.checked_add(len).ok_or_else(range)?;
    if len == 0 || guest.checked_add(len).is_none() || user.checked_add(len).is_none() {
        return Err(range());
    }
    let page = u64::try_from(page_size()).unwrap_or(4096);
    if offset % page != 0 {
        return Err(MemoryError::Offset { guest, offset });
    }
    let meta = file
        .metadata()
        .map_err(|source| MemoryError::Stat { guest, source })?;
    // A device file (such as DAX) has no size.
    if meta.is_file() && meta.len() < end {
        return Err(MemoryError::FileTooShort {
            guest,
            size: meta.len(),
            end,
        });
    }
    let region = MmapRegion::from_file(FileOffset::new(file, offset), size)
        .map_err(|source| MemoryError::Map { guest, source })?;
    let guarded = region
        .file_offset()
        .and_then(|offset| Guarded::new(region.as_ptr().addr(), size, offset.file()))
        .ok_or(MemoryError::TooMany { limit: MAX_SLOTS })?;
    if let Err(error) = exclude_from_dumps(region.as_ptr(), size) {
        debug!("guest memory at {guest:#x} would be part of a core dump: {error}");
    }
    Ok(Mapped {
        mapping: Arc::new(Mapping { guarded, region }),
        guest,
        user,
        len,
    })
}

/// Refuses a file whose pages others may bring, or not (FUSE, file systems of a network): each access is one of a thread that
/// serves other front-ends as well.
pub(super) fn check_file_system(file: &File) -> Result<(), MemoryError> {
    let found = fstatfs(file).map_err(|errno| MemoryError::StatFs(errno.into()))?;
    match found.filesystem_type() {
        TMPFS_MAGIC | HUGETLBFS_MAGIC => Ok(()),
        FsType(kind) => Err(MemoryError::FileSystem { kind }),
    }
}

/// Size of a page of memory in bytes.
pub(super) fn page_size() -> i64 {
    nix::unistd::sysconf(nix::unistd::SysconfVar::PAGE_SIZE)
        .ok()
        .flatten()
        .unwrap_or(4096)
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::{Bytes, GuestMemoryBackend};

    fn file(len: u64) -> File {
        let file = tempfile::tempfile().unwrap();
        file.set_len(len).unwrap();
        file
    }

    fn region(guest: u64, len: u64, user: u64, offset: u64) -> VhostUserMemoryRegion {
        VhostUserMemoryRegion::new(guest, len, user, offset)
    }

    #[test]
    fn translates_front_end_addresses() {
        let table = MemoryTable::new(
            &[
                region(0x10_0000, 0x2000, 0x7000_0000, 0),
                region(0, 0x1000, 0x6000_0000, 0x1000),
            ],
            vec![file(0x2000), file(0x2000)],
            MAX_SLOTS,
        )
        .unwrap();
        assert_eq!(table.memory().num_regions(), 2);
        let at = |user| table.guest_address(user).map(|a| a.0);
        assert_eq!(at(0x7000_0000), Some(0x10_0000));
        assert_eq!(at(0x7000_1fff), Some(0x10_1fff));
        assert_eq!(at(0x7000_2000), None);
        assert_eq!(at(0x6000_0010), Some(0x10));
        assert_eq!(at(0), None);
        table
            .memory()
            .write_obj(7_u32, GuestAddress(0x10_0004))
            .unwrap();
    }

    #[test]
    fn refuses_what_cannot_be_mapped_safely() {
        let one = |r, len| MemoryTable::new(&[r], vec![file(len)], MAX_SLOTS).map(|_| ());
        assert!(matches!(
            one(region(0, 0x3000, 0, 0), 0x2000),
            Err(MemoryError::FileTooShort { .. })
        ));
        assert!(matches!(
            one(region(0, 0x1000, 0, 0x200), 0x2000),
            Err(MemoryError::Offset { .. })
        ));
        assert!(matches!(
            one(region(u64::MAX - 0xfff, 0x2000, 0, 0), 0x2000),
            Err(MemoryError::Range { .. })
        ));
        assert!(matches!(
            one(region(0, 0x1000, 0, u64::MAX - 0xfff), 0x2000),
            Err(MemoryError::Range { .. })
        ));
        assert!(matches!(
            MemoryTable::new(
                &[
                    region(0, 0x2000, 0x1000, 0),
                    region(0x1000, 0x1000, 0x9000, 0)
                ],
                vec![file(0x2000), file(0x2000)],
                MAX_SLOTS
            ),
            Err(MemoryError::GuestOverlap(_))
        ));
        assert!(matches!(
            MemoryTable::new(
                &[
                    region(0, 0x2000, 0x1000, 0),
                    region(0x8000, 0x1000, 0x2000, 0)
                ],
                vec![file(0x2000), file(0x2000)],
                MAX_SLOTS
            ),
            Err(MemoryError::UserOverlap { user: 0x2000 })
        ));
    }

    #[test]
    fn adds_and_removes_regions() {
        let table = MemoryTable::default();
        let a = region(0, 0x1000, 0x1000, 0);
        let table = table.with(&a, file(0x1000), MAX_SLOTS).unwrap();
        assert!(table.with(&a, file(0x1000), MAX_SLOTS).is_err());
        let b = region(0x1000, 0x1000, 0x5000, 0);
        let table = table.with(&b, file(0x1000), MAX_SLOTS).unwrap();
        assert!(table.without(&region(0, 0x1000, 0x5000, 0)).is_err());
        let table = table.without(&a).unwrap();
        assert_eq!(table.guest_address(0x1000), None);
        let table = table.without(&b).unwrap();
        assert_eq!(table.memory().num_regions(), 0);
    }
}

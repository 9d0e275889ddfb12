//! Guest memory that is taken away under its mapping.
//!
//! A front-end can truncate the file of its guest's memory at any time (unless it sealed it, as QEMU and ringside-vmm
//! do), and a page of the host's memory can fail. The next access to such a page raises SIGBUS, which would end the
//! process. Here the signal's handler puts a page of zeroes in its place, so that the access ends, and tells the control
//! threads, of which that of the front-end concerned ends the connection: what was read is nobody's data, and the next
//! front-end is served as if nothing had been. System calls on such a page (io_uring, readv, writev) raise no signal but fail with EFAULT.
//!
//! ```text
//!  worker: access ──SIGBUS──▶ handler: mapped by us? ─no─▶ the process ends by the signal
//!    ▲                                   │ yes
//!    └── goes on, with zeroes ◀── mmap ──┤
//!                                        └── eventfd ──▶ control thread: ends the connection, drains, unmaps
//! ```

#![allow(unsafe_code)] // A signal handler that replaces pages: it reads siginfo_t, and calls mmap, write and raise.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicUsize, Ordering, fence};

use nix::sys::statfs::{HUGETLBFS_MAGIC, fstatfs};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};
use vmm_sys_util::signal::register_signal_handler;

use super::memory::{MAX_FRONT_ENDS, MAX_SHARED, MAX_SLOTS, page_size};

/// Most ranges at a time: for each of several front-ends all regions of a table, and all of the one that takes its place. A
/// single one has room for as many.
const RANGES: usize = 2 * MAX_FRONT_ENDS * MAX_SHARED;
const _: () = assert!(RANGES >= 2 * MAX_SLOTS);

/// A mapping of guest memory. Fields other than `taken` are read by the signal handler: `version` is odd while they
/// change.
struct Slot {
    taken: AtomicBool,
    version: AtomicUsize,
    start: AtomicUsize,
    /// 0 in a slot that is not in use: it then has no address.
    end: AtomicUsize,
    /// Size of its pages: a power of two.
    page: AtomicUsize,
    /// A page of it was replaced.
    torn: AtomicBool,
}

static SLOTS: [Slot; RANGES] = [const {
    Slot {
        taken: AtomicBool::new(false),
        version: AtomicUsize::new(0),
        start: AtomicUsize::new(0),
        end: AtomicUsize::new(0),
        page: AtomicUsize::new(0),
        torn: AtomicBool::new(false),
    }
}; RANGES];

/// Where the handler says so; -1 if nowhere.
static WAKE: AtomicI32 = AtomicI32::new(-1);
/// Keeps the descriptor of `WAKE` open.
static WAKE_OWNER: OnceLock<EventFd> = OnceLock::new();

impl Slot {
    fn set(&self, start: usize, end: usize, page: usize) {
        let version = self.version.load(Ordering::Relaxed);
        self.version
            .store(version.wrapping_add(1), Ordering::Relaxed);
        // The handler sees an odd version, or none of the stores below.
        fence(Ordering::Release);
        self.start.store(start, Ordering::Relaxed);
        self.end.store(end, Ordering::Relaxed);
        self.page.store(page, Ordering::Relaxed);
        self.version
            .store(version.wrapping_add(2), Ordering::Release);
    }

    /// Start and length of the page at `addr`, if it lies in this mapping.
    fn page_at(&self, addr: usize) -> Option<(usize, usize)> {
        let version = self.version.load(Ordering::Acquire);
        let start = self.start.load(Ordering::Relaxed);
        let end = self.end.load(Ordering::Relaxed);
        let page = self.page.load(Ordering::Relaxed);
        fence(Ordering::Acquire);
        // A mapping that is being accessed is not changing.
        let steady = version & 1 == 0 && self.version.load(Ordering::Relaxed) == version;
        let from = addr & !page.wrapping_sub(1);
        (steady && start <= addr && addr < end && start <= from).then_some((from, page))
    }
}

/// A mapping of guest memory is known to the handler for as long as this lives. It is to be dropped before the mapping.
#[derive(Debug)]
pub(super) struct Guarded {
    slot: usize,
}

impl Guarded {
    /// Makes `len` bytes at `start` known, a mapping of `file`. `None` if too many are.
    pub(super) fn new(start: usize, len: usize, file: &File) -> Option<Self> {
        let end = start.checked_add(len)?;
        let slot = SLOTS
            .iter()
            .position(|slot| !slot.taken.swap(true, Ordering::Acquire))?;
        let place = SLOTS.get(slot)?;
        place.torn.store(false, Ordering::Relaxed);
        place.set(start, end, page_size_of(file));
        Some(Self { slot })
    }

    /// Some of it was taken away.
    pub(super) fn torn(&self) -> bool {
        SLOTS
            .get(self.slot)
            .is_some_and(|slot| slot.torn.load(Ordering::Acquire))
    }
}

impl Drop for Guarded {
    fn drop(&mut self) {
        if let Some(slot) = SLOTS.get(self.slot) {
            slot.set(0, 0, 0);
            slot.taken.store(false, Ordering::Release);
        }
    }
}

/// Huge pages can be replaced as a whole only.
fn page_size_of(file: &File) -> usize {
    let page = usize::try_from(page_size()).unwrap_or(4096);
    match fstatfs(file) {
        Ok(fs) if fs.filesystem_type() == HUGETLBFS_MAGIC => usize::try_from(fs.block_size())
            .ok()
            .filter(|size| size.is_power_of_two())
            .unwrap_or(page),
        _ => page,
    }
}

/// Makes SIGBUS survivable where it comes from guest memory. Returns a descriptor that becomes readable, again with
/// each page that is replaced; it is never read.
///
/// # Errors
/// If there is no eventfd to be had, or no signal handler.
pub(super) fn install() -> io::Result<RawFd> {
    let wake = match WAKE_OWNER.get() {
        Some(wake) => wake,
        None => {
            let wake = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
            WAKE_OWNER.get_or_init(|| wake)
        }
    };
    let fd = wake.as_raw_fd();
    WAKE.store(fd, Ordering::Release);
    register_signal_handler(libc::SIGBUS, on_bus_error).map_err(io::Error::from)?;
    Ok(fd)
}

/// Only what is async-signal-safe may be called here: atomics, mmap, write, signal and raise.
extern "C" fn on_bus_error(_: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // SAFETY: the kernel gives each handler with SA_SIGINFO a siginfo_t that lives until it returns.
    let info = unsafe { info.as_ref() };
    // Codes above 0 are the kernel's; others stand for kill(2), which has no address.
    let addr = info.filter(|info| info.si_code > 0).map_or(0, |info| {
        // SAFETY: a SIGBUS of the kernel carries an address.
        unsafe { info.si_addr() }.addr()
    });
    // SAFETY: has no conditions.
    let errno = unsafe { libc::__errno_location() };
    // SAFETY: this thread's own. What was interrupted may be about to read it.
    let saved = unsafe { *errno };
    let found = SLOTS
        .iter()
        .find_map(|slot| slot.page_at(addr).map(|page| (slot, page)));
    if let Some((slot, (start, len))) = found
        && replace(start, len)
    {
        slot.torn.store(true, Ordering::Release);
        let one = 1_u64.to_ne_bytes();
        // SAFETY: eight bytes of the stack, read by the call; a descriptor of -1 is an error like any other.
        unsafe { libc::write(WAKE.load(Ordering::Acquire), one.as_ptr().cast(), one.len()) };
        // SAFETY: as above.
        unsafe { *errno = saved };
        return;
    }
    // Not ours: end as if there were no handler. The signal is blocked until this function returns.
    // SAFETY: sets what the kernel does with the signal, no function of ours.
    unsafe { libc::signal(libc::SIGBUS, libc::SIG_DFL) };
    // SAFETY: raise has no conditions.
    unsafe { libc::raise(libc::SIGBUS) };
}

/// Puts a page of zeroes in the place of another one.
fn replace(start: usize, len: usize) -> bool {
    // SAFETY: the page is one of a mapping of guest memory that the interrupted access keeps in place. All that point
    // into it expect its contents to change at any time, and that it can be read and written; both stay so. Whoever unmaps
    // guest memory unmaps what is here by then.
    let page = unsafe {
        libc::mmap(
            std::ptr::without_provenance_mut(start),
            len,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED | libc::MAP_NORESERVE,
            -1,
            0,
        )
    };
    page != libc::MAP_FAILED
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_are_found_while_their_mapping_is_guarded() {
        // Addresses that no process has, of no consequence as nothing is mapped here.
        const START: usize = 0x7000_0000_0000_0000;
        let find = |addr| SLOTS.iter().find_map(|slot| slot.page_at(addr));
        let file = tempfile::tempfile().unwrap();
        let page = usize::try_from(page_size()).unwrap();
        assert_eq!(find(START), None);
        let guarded = Guarded::new(START, 2 * page, &file).unwrap();
        assert_eq!(find(START), Some((START, page)));
        assert_eq!(find(START + page - 1), Some((START, page)));
        assert_eq!(find(START + 2 * page - 1), Some((START + page, page)));
        assert_eq!(find(START + 2 * page), None);
        assert_eq!(find(START - 1), None);
        drop(guarded);
        assert_eq!(find(START), None);
        assert!(Guarded::new(usize::MAX, page, &file).is_none());
    }
}

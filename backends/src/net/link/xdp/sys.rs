//! The mappings and system calls of AF_XDP and BPF, each behind a function that cannot be called wrongly.
#![allow(
    unsafe_code,
    reason = "memory shared with the kernel, socket options and bpf(2): no safe wrapper without a C library exists"
)]

use std::num::NonZeroUsize;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, AtomicU64};

use nix::errno::Errno;
use nix::sys::mman::{MapFlags, ProtFlags, mmap, mmap_anonymous, munmap};

/// Memory shared with the kernel.
#[derive(Debug)]
pub(super) struct Mapping {
    base: NonNull<libc::c_void>,
    len: usize,
}

// SAFETY: the mapping belongs to the process, not to a thread.
unsafe impl Send for Mapping {}

impl Mapping {
    /// New memory of `len` bytes.
    pub(super) fn anonymous(len: usize) -> Result<Self, Errno> {
        let size = NonZeroUsize::new(len).ok_or(Errno::EINVAL)?;
        let access = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        let flags = MapFlags::MAP_PRIVATE | MapFlags::MAP_POPULATE;
        // SAFETY: it is put where nothing else is, and nothing else refers to it.
        let base = unsafe { mmap_anonymous(None, size, access, flags) }?;
        Ok(Self { base, len })
    }

    /// A ring of a socket: `len` bytes of what lies at the offset `page`.
    pub(super) fn of_ring(socket: BorrowedFd<'_>, len: usize, page: u64) -> Result<Self, Errno> {
        let size = NonZeroUsize::new(len).ok_or(Errno::EINVAL)?;
        let page = libc::off_t::try_from(page).map_err(|_| Errno::EOVERFLOW)?;
        let access = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        let flags = MapFlags::MAP_SHARED | MapFlags::MAP_POPULATE;
        // SAFETY: it is put where nothing else is; what the kernel writes there is read by atomic loads only.
        let base = unsafe { mmap(None, size, access, flags, socket, page) }?;
        Ok(Self { base, len })
    }

    /// Where `T` is at this offset, if it is inside and aligned.
    fn at<T>(&self, offset: usize) -> Option<*mut T> {
        let end = offset.checked_add(size_of::<T>())?;
        let fits = end <= self.len && offset.is_multiple_of(align_of::<T>());
        fits.then(|| self.base.as_ptr().wrapping_byte_add(offset).cast())
    }

    pub(super) fn word32(&self, offset: usize) -> Option<&AtomicU32> {
        let word = self.at::<u32>(offset)?;
        // SAFETY: it is inside the mapping, which this borrows, and aligned; all access to rings is atomic.
        Some(unsafe { AtomicU32::from_ptr(word) })
    }

    pub(super) fn word64(&self, offset: usize) -> Option<&AtomicU64> {
        let word = self.at::<u64>(offset)?;
        // SAFETY: it is inside the mapping, which this borrows, and aligned; all access to rings is atomic.
        Some(unsafe { AtomicU64::from_ptr(word) })
    }

    /// Bytes of a frame. Of memory for frames only, and of a frame that is not with the kernel: the rings say which are.
    pub(super) fn bytes(&mut self, start: u64, len: usize) -> Option<&mut [u8]> {
        let start = usize::try_from(start).ok()?;
        if start.checked_add(len)? > self.len {
            return None;
        }
        let first = self.base.as_ptr().wrapping_byte_add(start).cast::<u8>();
        // SAFETY: they are inside the mapping, which this borrows alone. The kernel leaves a frame alone that it has given back by
        // the rx or the completion ring, until it gets it again.
        Some(unsafe { std::slice::from_raw_parts_mut(first, len) })
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: it was mapped with this length, and all borrows of it have ended.
        let _ = unsafe { munmap(self.base, self.len) };
    }
}

/// A socket of the family, which nix does not know.
pub(super) fn socket() -> Result<OwnedFd, Errno> {
    let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC;
    // SAFETY: a system call that takes numbers only.
    let fd = unsafe { libc::socket(libc::AF_XDP, kind, 0) };
    Errno::result(fd).map(owned)
}

fn set_option<T>(socket: BorrowedFd<'_>, option: libc::c_int, value: &T) -> Result<(), Errno> {
    let len = libc::socklen_t::try_from(size_of::<T>()).map_err(|_| Errno::EINVAL)?;
    // SAFETY: the kernel reads `len` bytes of a value that lives until after the call.
    let done = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_XDP,
            option,
            std::ptr::from_ref(value).cast(),
            len,
        )
    };
    Errno::result(done).map(drop)
}

fn get_option<T>(socket: BorrowedFd<'_>, option: libc::c_int, value: &mut T) -> Result<(), Errno> {
    let mut len = libc::socklen_t::try_from(size_of::<T>()).map_err(|_| Errno::EINVAL)?;
    // SAFETY: the kernel writes at most `len` bytes of a value of numbers only, and that length; both live until after the call.
    let done = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_XDP,
            option,
            std::ptr::from_mut(value).cast(),
            &raw mut len,
        )
    };
    Errno::result(done).map(drop)
}

/// Gives a socket memory for its frames, in places of `place` bytes.
pub(super) fn register(socket: BorrowedFd<'_>, memory: &Mapping, place: u32) -> Result<(), Errno> {
    let request = libc::xdp_umem_reg {
        addr: memory.base.as_ptr().expose_provenance() as u64,
        len: memory.len as u64,
        chunk_size: place,
        headroom: 0,
        flags: 0,
        tx_metadata_len: 0,
    };
    set_option(socket, libc::XDP_UMEM_REG, &request)
}

/// Makes one of the rings.
pub(super) fn set_ring(
    socket: BorrowedFd<'_>,
    option: libc::c_int,
    places: u32,
) -> Result<(), Errno> {
    set_option(socket, option, &places)
}

/// Where the parts of the rings lie.
pub(super) fn offsets(socket: BorrowedFd<'_>) -> Result<libc::xdp_mmap_offsets, Errno> {
    let none = || libc::xdp_ring_offset {
        producer: 0,
        consumer: 0,
        desc: 0,
        flags: 0,
    };
    let mut offsets = libc::xdp_mmap_offsets {
        rx: none(),
        tx: none(),
        fr: none(),
        cr: none(),
    };
    get_option(socket, libc::XDP_MMAP_OFFSETS, &mut offsets)?;
    Ok(offsets)
}

/// The driver uses the memory itself.
pub(super) fn zero_copy(socket: BorrowedFd<'_>) -> Result<bool, Errno> {
    let mut options = libc::xdp_options { flags: 0 };
    get_option(socket, libc::XDP_OPTIONS, &mut options)?;
    Ok(options.flags & libc::XDP_OPTIONS_ZEROCOPY != 0)
}

/// Binds a socket to a queue of an interface: zero-copy if the driver has it.
pub(super) fn bind(socket: BorrowedFd<'_>, index: libc::c_int, queue: u16) -> Result<(), Errno> {
    let address = libc::sockaddr_xdp {
        sxdp_family: u16::try_from(libc::AF_XDP).map_err(|_| Errno::EINVAL)?,
        sxdp_flags: libc::XDP_USE_NEED_WAKEUP,
        sxdp_ifindex: u32::try_from(index).map_err(|_| Errno::EINVAL)?,
        sxdp_queue_id: queue.into(),
        sxdp_shared_umem_fd: 0,
    };
    let len = libc::socklen_t::try_from(size_of_val(&address)).map_err(|_| Errno::EINVAL)?;
    // SAFETY: the kernel reads one sockaddr_xdp, which lives until after the call.
    let done = unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), len) };
    Errno::result(done).map(drop)
}

/// Has the kernel look at the tx ring.
pub(super) fn wake_tx(socket: BorrowedFd<'_>) -> Result<(), Errno> {
    let (flags, nothing) = (libc::MSG_DONTWAIT, std::ptr::null());
    // SAFETY: a message of no bytes and no address.
    let done = unsafe { libc::sendto(socket.as_raw_fd(), nothing, 0, flags, nothing.cast(), 0) };
    Errno::result(done).map(drop)
}

/// Has the driver look at the fill ring.
pub(super) fn wake_rx(socket: BorrowedFd<'_>) -> Result<(), Errno> {
    let nothing = std::ptr::null_mut::<libc::c_void>();
    // SAFETY: a buffer of no bytes and no address.
    let done = unsafe { libc::recv(socket.as_raw_fd(), nothing, 0, libc::MSG_DONTWAIT) };
    Errno::result(done).map(drop)
}

/// One instruction of BPF (RFC 9669, 3).
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub(super) struct Instruction {
    code: u8,
    /// The destination in the low half, the source in the high one.
    registers: u8,
    off: i16,
    imm: i32,
}

impl Instruction {
    pub(super) const fn new(code: u8, dst: u8, src: u8, off: i16, imm: i32) -> Self {
        Self {
            code,
            registers: dst | src << 4,
            off,
            imm,
        }
    }
}

// Commands and arguments of bpf(2) (linux/bpf.h).
const BPF_MAP_CREATE: libc::c_int = 0;
const BPF_MAP_UPDATE_ELEM: libc::c_int = 2;
const BPF_MAP_DELETE_ELEM: libc::c_int = 3;
const BPF_PROG_LOAD: libc::c_int = 5;
const BPF_LINK_CREATE: libc::c_int = 28;
const BPF_MAP_TYPE_XSKMAP: u32 = 17;
const BPF_PROG_TYPE_XDP: u32 = 6;
const BPF_XDP: u32 = 37;

#[repr(C)]
struct MapCreate {
    map_type: u32,
    key_size: u32,
    value_size: u32,
    max_entries: u32,
    map_flags: u32,
}

#[repr(C)]
struct MapElement {
    map_fd: u32,
    padding: u32,
    key: u64,
    value: u64,
    flags: u64,
}

#[repr(C)]
struct ProgramLoad {
    prog_type: u32,
    insn_cnt: u32,
    insns: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log_buf: u64,
    kern_version: u32,
    prog_flags: u32,
    prog_name: [u8; 16],
    prog_ifindex: u32,
    expected_attach_type: u32,
}

#[repr(C)]
struct LinkCreate {
    prog_fd: u32,
    target_ifindex: u32,
    attach_type: u32,
    flags: u32,
}

/// bpf(2).
///
/// # Safety
/// The attributes belong to the command, and what they point at lives.
unsafe fn bpf<T>(command: libc::c_int, attributes: &T) -> Result<libc::c_int, Errno> {
    // SAFETY: the caller vouches for the attributes; the kernel reads as many bytes as they have.
    let done = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            command,
            std::ptr::from_ref(attributes),
            size_of::<T>(),
        )
    };
    libc::c_int::try_from(Errno::result(done)?).map_err(|_| Errno::EOVERFLOW)
}

fn owned(fd: libc::c_int) -> OwnedFd {
    // SAFETY: callers have just got it from the kernel, and nobody else has it.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

fn number(fd: libc::c_int) -> Result<u32, Errno> {
    u32::try_from(fd).map_err(|_| Errno::EBADF)
}

fn address<T>(value: &T) -> u64 {
    std::ptr::from_ref(value).expose_provenance() as u64
}

/// A table of sockets by queue.
pub(super) fn socket_map(entries: u32) -> Result<OwnedFd, Errno> {
    let request = MapCreate {
        map_type: BPF_MAP_TYPE_XSKMAP,
        key_size: 4,
        value_size: 4,
        max_entries: entries,
        map_flags: 0,
    };
    // SAFETY: the attributes are those of the command, and point at nothing.
    unsafe { bpf(BPF_MAP_CREATE, &request) }.map(owned)
}

/// Puts a socket into the table.
pub(super) fn insert(map: &OwnedFd, queue: u32, socket: BorrowedFd<'_>) -> Result<(), Errno> {
    let value = number(socket.as_raw_fd())?;
    let request = MapElement {
        map_fd: number(map.as_raw_fd())?,
        padding: 0,
        key: address(&queue),
        value: address(&value),
        flags: 0,
    };
    // SAFETY: the attributes are those of the command; key and value are four bytes each, as the map has them, and live.
    unsafe { bpf(BPF_MAP_UPDATE_ELEM, &request) }.map(drop)
}

/// Takes a socket out of the table.
pub(super) fn remove(map: &OwnedFd, queue: u32) -> Result<(), Errno> {
    let request = MapElement {
        map_fd: number(map.as_raw_fd())?,
        padding: 0,
        key: address(&queue),
        value: 0,
        flags: 0,
    };
    // SAFETY: the attributes are those of the command; the key is four bytes, as the map has it, and lives.
    unsafe { bpf(BPF_MAP_DELETE_ELEM, &request) }.map(drop)
}

/// Loads an XDP program; the kernel checks it.
pub(super) fn load(instructions: &[Instruction]) -> Result<OwnedFd, Errno> {
    let license = c"BSD";
    let mut prog_name = [0; 16];
    for (place, byte) in prog_name.iter_mut().zip(*b"ringside") {
        *place = byte;
    }
    let request = ProgramLoad {
        prog_type: BPF_PROG_TYPE_XDP,
        insn_cnt: u32::try_from(instructions.len()).map_err(|_| Errno::E2BIG)?,
        insns: instructions.as_ptr().expose_provenance() as u64,
        license: license.as_ptr().expose_provenance() as u64,
        log_level: 0,
        log_size: 0,
        log_buf: 0,
        kern_version: 0,
        prog_flags: 0,
        prog_name,
        prog_ifindex: 0,
        expected_attach_type: BPF_XDP,
    };
    // SAFETY: the attributes are those of the command; instructions and licence live.
    unsafe { bpf(BPF_PROG_LOAD, &request) }.map(owned)
}

/// Attaches a program to an interface: in its driver if that can, else behind it. It stays as long as the result is open.
pub(super) fn attach(program: &OwnedFd, index: libc::c_int) -> Result<OwnedFd, Errno> {
    let request = LinkCreate {
        prog_fd: number(program.as_raw_fd())?,
        target_ifindex: u32::try_from(index).map_err(|_| Errno::EINVAL)?,
        attach_type: BPF_XDP,
        flags: 0,
    };
    // SAFETY: the attributes are those of the command, and point at nothing.
    unsafe { bpf(BPF_LINK_CREATE, &request) }.map(owned)
}

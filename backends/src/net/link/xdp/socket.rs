//! One AF_XDP socket (linux/if_xdp.h): its frames, and the rings by which they go to the kernel and come back.
//!
//! The first half of the frames is for receiving: each is in the fill ring, with the kernel, or in the rx ring. The second half is
//! for sending: each is free, in the tx ring, with the kernel, or in the completion ring. No ring can overflow, as it has as
//! many places as there are frames of its half.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::Ordering;

use nix::errno::Errno;

use super::Failed;
use super::sys::{self, Mapping};

/// Frames of each half, and places of each ring: a power of two.
const FRAMES: u32 = 512;
/// Bytes of the place of a frame: a page.
const PLACE: usize = 4096;
/// Bytes before a received frame that drivers keep for themselves (XDP_PACKET_HEADROOM).
const HEADROOM: usize = 256;
/// Longest frame: what a driver can receive into one place.
pub(in crate::net::link) const MAX_LEN: usize = PLACE - HEADROOM;
/// System calls in a row to have the kernel send; each does a batch.
const KICKS: u32 = 32;

/// The step that fails when there is no such queue.
pub(super) const BINDING: &str = "binding it to a queue";

/// Where the parts of a ring lie in its mapping.
#[derive(Debug, Clone, Copy)]
struct Layout {
    producer: usize,
    consumer: usize,
    flags: usize,
    /// The first place.
    places: usize,
    /// Bytes of a place.
    stride: usize,
}

/// A ring of which this side moves one end.
#[derive(Debug)]
struct Ring {
    map: Mapping,
    layout: Layout,
    /// Our end: the next place to write, or to read.
    next: u32,
}

impl Ring {
    fn map(
        socket: BorrowedFd<'_>,
        page: u64,
        offset: &libc::xdp_ring_offset,
        stride: usize,
    ) -> Result<Self, Failed> {
        let what = "mapping a ring";
        let place = |offset: u64| usize::try_from(offset).map_err(|_| (what, Errno::EOVERFLOW));
        let layout = Layout {
            producer: place(offset.producer)?,
            consumer: place(offset.consumer)?,
            flags: place(offset.flags)?,
            places: place(offset.desc)?,
            stride,
        };
        let count = usize::try_from(FRAMES).map_err(|_| (what, Errno::EOVERFLOW))?;
        let len = layout.places.saturating_add(count.saturating_mul(stride));
        let map = Mapping::of_ring(socket, len, page).map_err(|errno| (what, errno))?;
        Ok(Self {
            map,
            layout,
            next: 0,
        })
    }

    fn place(&self) -> usize {
        let index = usize::try_from(self.next & (FRAMES - 1)).unwrap_or(0);
        self.layout
            .places
            .saturating_add(index.saturating_mul(self.layout.stride))
    }

    /// As producer: writes the words of one place. The kernel sees it after [`Self::publish`].
    fn push<const N: usize>(&mut self, words: [u64; N]) {
        for (offset, word) in (self.place()..).step_by(8).zip(words) {
            if let Some(place) = self.map.word64(offset) {
                place.store(word, Ordering::Relaxed);
            }
        }
        self.next = self.next.wrapping_add(1);
    }

    fn publish(&self) {
        if let Some(producer) = self.map.word32(self.layout.producer) {
            producer.store(self.next, Ordering::Release);
        }
    }

    /// As producer: how many places the kernel has not taken yet.
    fn waiting(&self) -> u32 {
        self.map.word32(self.layout.consumer).map_or(0, |consumer| {
            self.next.wrapping_sub(consumer.load(Ordering::Acquire))
        })
    }

    /// As producer: the kernel wants a system call to go on.
    fn needs_wakeup(&self) -> bool {
        self.map
            .word32(self.layout.flags)
            .is_some_and(|flags| flags.load(Ordering::Acquire) & libc::XDP_RING_NEED_WAKEUP != 0)
    }

    /// As consumer: the words of the next place, which stays ours until [`Self::release`].
    fn pop<const N: usize>(&mut self) -> Option<[u64; N]> {
        let producer = self.map.word32(self.layout.producer)?;
        if producer.load(Ordering::Acquire) == self.next {
            return None;
        }
        let mut words = [0; N];
        for (offset, word) in (self.place()..).step_by(8).zip(&mut words) {
            *word = self.map.word64(offset)?.load(Ordering::Relaxed);
        }
        self.next = self.next.wrapping_add(1);
        Some(words)
    }

    fn release(&self) {
        if let Some(consumer) = self.map.word32(self.layout.consumer) {
            consumer.store(self.next, Ordering::Release);
        }
    }
}

/// A socket on one queue of an interface. Fields are dropped in order: the socket before the memory it uses.
#[derive(Debug)]
pub(super) struct XdpSocket {
    fd: OwnedFd,
    zero_copy: bool,
    fill: Ring,
    completion: Ring,
    rx: Ring,
    tx: Ring,
    /// Places to send from that are free.
    free: Vec<u64>,
    memory: Mapping,
}

impl XdpSocket {
    pub(super) fn open(index: libc::c_int, queue: u16) -> Result<Self, Failed> {
        let doing = |what| move |errno: Errno| (what, errno);
        let fd = sys::socket().map_err(doing("opening it"))?;
        let frames = usize::try_from(FRAMES).unwrap_or(0);
        let len = frames.saturating_mul(2).saturating_mul(PLACE);
        let memory = Mapping::anonymous(len).map_err(doing("having memory"))?;
        let place = u32::try_from(PLACE).unwrap_or(0);
        sys::register(fd.as_fd(), &memory, place).map_err(doing("registering memory"))?;
        for option in [
            libc::XDP_UMEM_FILL_RING,
            libc::XDP_UMEM_COMPLETION_RING,
            libc::XDP_RX_RING,
            libc::XDP_TX_RING,
        ] {
            sys::set_ring(fd.as_fd(), option, FRAMES).map_err(doing("making a ring"))?;
        }
        let offsets = sys::offsets(fd.as_fd()).map_err(doing("asking where its rings lie"))?;
        let map = |page, offset, stride| Ring::map(fd.as_fd(), page, offset, stride);
        let page = |offset: libc::off_t| u64::try_from(offset).unwrap_or(0);
        let mut fill = map(libc::XDP_UMEM_PGOFF_FILL_RING, &offsets.fr, 8)?;
        let completion = map(libc::XDP_UMEM_PGOFF_COMPLETION_RING, &offsets.cr, 8)?;
        let rx = map(page(libc::XDP_PGOFF_RX_RING), &offsets.rx, 16)?;
        let tx = map(page(libc::XDP_PGOFF_TX_RING), &offsets.tx, 16)?;
        let mut places = (0..len).step_by(PLACE).map(|place| place as u64);
        for place in places.by_ref().take(frames) {
            fill.push([place]);
        }
        fill.publish();
        let free = places.collect();
        sys::bind(fd.as_fd(), index, queue).map_err(doing(BINDING))?;
        let zero_copy = sys::zero_copy(fd.as_fd()).map_err(doing("asking for its mode"))?;
        Ok(Self {
            fd,
            zero_copy,
            fill,
            completion,
            rx,
            tx,
            free,
            memory,
        })
    }

    /// The driver uses the memory itself.
    pub(super) fn zero_copy(&self) -> bool {
        self.zero_copy
    }

    /// Sends a frame of `len` bytes that `write` gives, with the next [`Self::kick`]. `false` if there is no place for it.
    pub(super) fn send(&mut self, len: usize, write: impl FnOnce(&mut [u8])) -> bool {
        if self.free.is_empty() {
            self.reclaim();
        }
        if self.free.is_empty() {
            // Places come back only when the kernel sends.
            self.kick();
            self.reclaim();
        }
        let Some(place) = self.free.pop() else {
            return false;
        };
        if let Some(bytes) = self.memory.bytes(place, len) {
            write(bytes);
        }
        // An xdp_desc: the place, the length and no options.
        self.tx.push([place, len as u64]);
        self.tx.publish();
        true
    }

    fn reclaim(&mut self) {
        while let Some([place]) = self.completion.pop() {
            self.free.push(place);
        }
        self.completion.release();
    }

    /// Has the kernel send what is in the ring, as far as the interface takes it now. When it is busy or down, the descriptor
    /// stirs as soon as it is not any more.
    pub(super) fn kick(&self) {
        let mut before = self.tx.waiting();
        for _ in 0..KICKS {
            if before == 0 || !self.tx.needs_wakeup() {
                return;
            }
            // Each call sends a batch, and fails when there is more, or when a frame was lost on the way.
            let _ = sys::wake_tx(self.fd.as_fd());
            let after = self.tx.waiting();
            if after == before {
                return;
            }
            before = after;
        }
    }

    /// Gives the next received frame to `take`. `None` if there is none.
    pub(super) fn receive<T>(&mut self, take: impl FnOnce(&[u8]) -> T) -> Option<T> {
        let Some([start, len_and_options]) = self.rx.pop() else {
            if self.fill.needs_wakeup() {
                // The driver had no place left and does not look by itself. It may fail as often as it likes.
                let _ = sys::wake_rx(self.fd.as_fd());
            }
            return None;
        };
        let len = usize::try_from(len_and_options & u64::from(u32::MAX)).unwrap_or(0);
        let taken = self.memory.bytes(start, len).map(|frame| take(frame));
        self.rx.release();
        let place = PLACE as u64;
        self.fill
            .push([start.wrapping_div(place).wrapping_mul(place)]);
        self.fill.publish();
        taken
    }
}

impl AsFd for XdpSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

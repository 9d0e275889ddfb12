//! The system calls that move data between a socket and guest memory.
#![allow(
    unsafe_code,
    reason = "readv and writev on guest memory: no safe wrapper takes memory that a guest may write meanwhile"
)]

use std::io;
use std::os::fd::{AsFd, AsRawFd};

use crate::shell::{GuestSlice, mark_slices};

/// Most pieces that one system call takes (UIO_MAXIOV).
const MAX_PIECES: usize = 1024;

/// Receives into guest memory, once. Returns how many bytes came.
pub(super) fn receive(socket: &impl AsFd, into: &[GuestSlice<'_>]) -> io::Result<usize> {
    let pieces: Vec<libc::iovec> = into.iter().take(MAX_PIECES).map(piece).collect();
    let count = i32::try_from(pieces.len()).map_err(io::Error::other)?;
    // SAFETY: each piece is memory that its slice keeps borrowed, and so mapped, until the call returns.
    let got = unsafe { libc::readv(socket.as_fd().as_raw_fd(), pieces.as_ptr(), count) };
    let got = usize::try_from(got).map_err(|_| io::Error::last_os_error())?;
    mark_slices(into, got);
    Ok(got)
}

/// Sends bytes, and guest memory behind them, once. Returns how many bytes went.
pub(super) fn send(socket: &impl AsFd, first: &[u8], from: &[GuestSlice<'_>]) -> io::Result<usize> {
    let first = libc::iovec {
        iov_base: first.as_ptr().cast_mut().cast(),
        iov_len: first.len(),
    };
    let pieces: Vec<libc::iovec> = std::iter::once(first)
        .chain(from.iter().map(piece))
        .take(MAX_PIECES)
        .collect();
    let count = i32::try_from(pieces.len()).map_err(io::Error::other)?;
    // SAFETY: `first` and the slices are borrowed until the call returns, and it only reads.
    let sent = unsafe { libc::writev(socket.as_fd().as_raw_fd(), pieces.as_ptr(), count) };
    usize::try_from(sent).map_err(|_| io::Error::last_os_error())
}

fn piece(slice: &GuestSlice<'_>) -> libc::iovec {
    libc::iovec {
        iov_base: slice.ptr_guard_mut().as_ptr().cast(),
        iov_len: slice.len(),
    }
}

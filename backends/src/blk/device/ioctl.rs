//! The requests to the kernel (linux/fs.h), each behind a function that cannot be called wrongly.

#![allow(
    unsafe_code,
    reason = "ioctl is the only interface to these commands, and no safe wrapper of it exists"
)]

use std::fs::File;
use std::os::fd::AsRawFd;

use nix::Result;

mod raw {
    use nix::request_code_none;

    // Numbered without the size of their argument.
    nix::ioctl_write_ptr_bad!(blkdiscard, request_code_none!(0x12, 119), [u64; 2]);
    nix::ioctl_write_ptr_bad!(blksecdiscard, request_code_none!(0x12, 125), [u64; 2]);
}

/// BLKDISCARD: start and length in bytes.
pub(super) fn discard(file: &File, range: [u64; 2]) -> Result<()> {
    // SAFETY: the kernel reads two numbers, which live until after the call.
    unsafe { raw::blkdiscard(file.as_raw_fd(), &raw const range) }.map(drop)
}

/// BLKSECDISCARD: start and length in bytes.
pub(super) fn secure_discard(file: &File, range: [u64; 2]) -> Result<()> {
    // SAFETY: the kernel reads two numbers, which live until after the call.
    unsafe { raw::blksecdiscard(file.as_raw_fd(), &raw const range) }.map(drop)
}

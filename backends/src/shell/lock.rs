//! Locks of files, as QEMU takes them too: they belong to the open file description (fcntl(2)), and go with it.

use std::fs::File;

use nix::Result;
use nix::fcntl::{FcntlArg, fcntl};

/// Takes a lock of a kind (`F_RDLCK`, `F_WRLCK`), or gives it back (`F_UNLCK`), without waiting: of the first `len` bytes, or with
/// 0 of all, however long the file will be.
///
/// # Errors
/// `EAGAIN` or `EACCES` if somebody else has it; what else the file system says.
pub(crate) fn set_lock(file: &File, kind: i32, len: i64) -> Result<()> {
    let lock = libc::flock {
        l_type: i16::try_from(kind).unwrap_or(0),
        l_whence: i16::try_from(libc::SEEK_SET).unwrap_or(0),
        l_start: 0,
        l_len: len,
        l_pid: 0,
    };
    fcntl(file, FcntlArg::F_OFD_SETLK(&lock)).map(drop)
}

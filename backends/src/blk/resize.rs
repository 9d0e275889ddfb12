//! Another size for an image file.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use ringside_control::{ApiError, ErrorCode, Size};
use thiserror::Error;

use super::image::Rbd;

/// The disk keeps its size.
#[derive(Debug, Error)]
pub(super) enum ResizeError {
    /// It has another length than the one asked for because somebody else says so.
    #[error(
        "disk {path} is a block device: give it another size by what made it, then ask again without a size"
    )]
    BlockDevice {
        /// The path.
        path: PathBuf,
    },
    /// It is an image, or on a server.
    #[error(
        "disk {path} is not a raw file, and keeps its size while it is served; enlarge an image with qemu-img resize before"
    )]
    NotRaw {
        /// The path.
        path: PathBuf,
    },
    /// The driver may only read it, and so may this program.
    #[error("disk {path} is open for reading only: start ringside-blk without --read-only")]
    ReadOnly {
        /// The path.
        path: PathBuf,
    },
    /// Its blocks would not fit.
    #[error("{size} bytes are not a whole number of blocks of {block} bytes, and at least one")]
    Blocks {
        /// What was asked for, in bytes.
        size: u64,
        /// The block size in bytes.
        block: u32,
    },
    /// Data could be lost.
    #[error(
        "the disk has {now}, and {size} is less: what lies behind would be lost; ask for it with `shrink` once the guest \
         does not use that part any more"
    )]
    Smaller {
        /// What it has.
        now: Size,
        /// What was asked for.
        size: Size,
    },
    /// The system refused.
    #[error("disk {path} cannot be given {size}")]
    File {
        /// The path.
        path: PathBuf,
        /// What was asked for.
        size: Size,
        /// What the system said.
        #[source]
        source: io::Error,
    },
}

impl From<ResizeError> for ApiError {
    fn from(error: ResizeError) -> Self {
        let code = match error {
            ResizeError::Blocks { .. } => ErrorCode::BadRequest,
            ResizeError::File { .. } => ErrorCode::Failed,
            _ => ErrorCode::Conflict,
        };
        Self::new(code, &error)
    }
}

/// Checks that a disk of `now` bytes may have `size` bytes, in blocks of `block`.
pub(super) fn check(now: u64, size: u64, block: u32, shrink: bool) -> Result<(), ResizeError> {
    if size == 0 || !size.is_multiple_of(block.into()) || i64::try_from(size).is_err() {
        return Err(ResizeError::Blocks { size, block });
    }
    if size < now && !shrink {
        let (now, size) = (Size(now), Size(size));
        return Err(ResizeError::Smaller { now, size });
    }
    Ok(())
}

/// Gives the file its new length: more of it is a hole. It may be longer than the driver was told, and what lies there is not
/// to be lost either.
pub(super) fn set_len(
    file: &File,
    path: &Path,
    size: u64,
    shrink: bool,
) -> Result<(), ResizeError> {
    let failed = |source| ResizeError::File {
        path: path.to_owned(),
        size: Size(size),
        source,
    };
    let meta = file.metadata().map_err(failed)?;
    if meta.file_type().is_block_device() {
        return Err(ResizeError::BlockDevice {
            path: path.to_owned(),
        });
    }
    if size < meta.len() && !shrink {
        let (now, size) = (Size(meta.len()), Size(size));
        return Err(ResizeError::Smaller { now, size });
    }
    file.set_len(size).map_err(failed)
}

/// Gives an image of a cluster its new size. It may be larger than the driver was told, as a file may.
pub(super) fn set_size(rbd: &Rbd, path: &Path, size: u64, shrink: bool) -> Result<(), ResizeError> {
    let failed = |source| ResizeError::File {
        path: path.to_owned(),
        size: Size(size),
        source,
    };
    let now = rbd.size().map_err(failed)?;
    if size < now && !shrink {
        let (now, size) = (Size(now), Size(size));
        return Err(ResizeError::Smaller { now, size });
    }
    rbd.resize(size).map_err(failed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_whole_blocks_and_grow() {
        let check = |size, shrink| check(1 << 20, size, 4096, shrink);
        assert!(check(2 << 20, false).is_ok());
        assert!(check(1 << 20, false).is_ok());
        assert!(matches!(
            check(4096, false),
            Err(ResizeError::Smaller { .. })
        ));
        assert!(check(4096, true).is_ok());
        for wrong in [0, 4095, 2 << 20 | 512, !4095] {
            let refused = check(wrong, true);
            assert!(
                matches!(refused, Err(ResizeError::Blocks { .. })),
                "{wrong}"
            );
        }
    }
    #[test]
    fn a_file_that_is_longer_than_the_driver_knows_is_not_cut() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(8 << 20).unwrap();
        let set_len = |size, shrink| super::set_len(file.as_file(), file.path(), size, shrink);
        assert!(matches!(
            set_len(4 << 20, false),
            Err(ResizeError::Smaller { .. })
        ));
        assert_eq!(file.as_file().metadata().unwrap().len(), 8 << 20);
        assert!(set_len(4 << 20, true).is_ok());
        assert!(set_len(16 << 20, false).is_ok());
        assert_eq!(file.as_file().metadata().unwrap().len(), 16 << 20);
    }
}

//! Rings of io_uring that do what they are for and nothing else.

use std::io;

use io_uring::register::Restriction;
use io_uring::{Builder, IoUring, squeue};

/// What a ring lets register (io_uring_register(2), linux/io_uring.h).
pub(crate) const IORING_REGISTER_BUFFERS: u8 = 0;
pub(crate) const IORING_UNREGISTER_BUFFERS: u8 = 1;
pub(crate) const IORING_REGISTER_FILES: u8 = 2;

/// Makes a ring that does these operations and registers these things (their numbers are
/// those of linux/io_uring.h) and nothing else, for good: io_uring opens files and connects sockets where no filter of system
/// calls sees it.
///
/// # Errors
/// What the system said.
pub(crate) fn restricted(
    builder: &mut Builder,
    entries: u32,
    registrations: &[u8],
    operations: &[u8],
) -> io::Result<IoUring> {
    let flags = squeue::Flags::FIXED_FILE | squeue::Flags::SKIP_SUCCESS;
    let mut restrictions = vec![Restriction::sqe_flags_allowed(flags.bits())];
    restrictions.extend(registrations.iter().copied().map(Restriction::register_op));
    restrictions.extend(operations.iter().copied().map(Restriction::sqe_op));
    let ring = builder.setup_r_disabled().build(entries)?;
    ring.submitter().register_restrictions(&mut restrictions)?;
    ring.submitter().register_enable_rings()?;
    Ok(ring)
}

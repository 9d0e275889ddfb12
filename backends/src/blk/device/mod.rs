//! What a block device does besides reading, writing and flushing. All of it is done by ioctls, which block: `offload.rs`
//! has the thread for it.

mod ioctl;

use std::fmt::Debug;
use std::fs::File;
use std::io;
use std::sync::Arc;

/// A block device. Offsets and lengths are in bytes, multiples of 512.
pub(super) trait BlockDevice: Debug + Send + Sync {
    /// The range is not needed any more.
    ///
    /// # Errors
    /// What the system said.
    fn discard(&self, offset: u64, len: u64) -> io::Result<()>;

    /// The range is to be lost, with all copies of it that the storage may have made.
    ///
    /// # Errors
    /// What the system said.
    fn secure_erase(&self, offset: u64, len: u64) -> io::Result<()>;
}

/// The block device behind an open file.
#[derive(Debug)]
pub(super) struct Device(Arc<File>);

impl Device {
    /// The file must be a block device, or each operation fails.
    pub(super) fn new(file: Arc<File>) -> Self {
        Self(file)
    }

    /// Whether it can erase securely. The kernel has no other way of telling than to be asked for it, with a range that it
    /// cannot have: it looks at the device first, and refuses the range then. (Before Linux 5.19 it looks only whether the
    /// device can discard; requests are then answered as unsupported.)
    pub(super) fn erases_securely(&self) -> bool {
        let misaligned = self.secure_erase_bytes(1, 1);
        misaligned.is_err_and(|e| e.raw_os_error() == Some(libc::EINVAL))
    }

    fn secure_erase_bytes(&self, offset: u64, len: u64) -> io::Result<()> {
        Ok(ioctl::secure_discard(&self.0, [offset, len])?)
    }
}

impl BlockDevice for Device {
    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        Ok(ioctl::discard(&self.0, [offset, len])?)
    }

    fn secure_erase(&self, offset: u64, len: u64) -> io::Result<()> {
        self.secure_erase_bytes(offset, len)
    }
}

/// A block device of memory, which can be made to fail.
#[cfg(test)]
pub(super) mod fake {
    use std::sync::Mutex;

    use super::*;

    /// What it was asked for.
    #[derive(Debug, Clone, PartialEq, Eq)]
    pub(in crate::blk) enum Call {
        Discard(u64, u64),
        SecureErase(u64, u64),
    }

    #[derive(Debug, Default)]
    pub(in crate::blk) struct Fake {
        pub(in crate::blk) calls: Mutex<Vec<Call>>,
        /// What the next calls fail with.
        pub(in crate::blk) errno: Mutex<Option<i32>>,
    }

    impl Fake {
        fn called(&self, call: Call) -> io::Result<()> {
            self.calls.lock().unwrap().push(call);
            match *self.errno.lock().unwrap() {
                Some(errno) => Err(io::Error::from_raw_os_error(errno)),
                None => Ok(()),
            }
        }
    }

    impl BlockDevice for Fake {
        fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
            self.called(Call::Discard(offset, len))
        }

        fn secure_erase(&self, offset: u64, len: u64) -> io::Result<()> {
            self.called(Call::SecureErase(offset, len))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_block_device_does_nothing_of_it() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(1 << 20).unwrap();
        let device = Device::new(Arc::new(file));
        assert!(!device.erases_securely());
        for tried in [device.discard(0, 512), device.secure_erase(0, 512)] {
            assert_eq!(tried.unwrap_err().raw_os_error(), Some(libc::ENOTTY));
        }
    }
}

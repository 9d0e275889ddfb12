//! What a block device does besides reading, writing and flushing. All of it is done by ioctls, which block: `offload.rs`
//! has the thread for it.

mod ioctl;

use std::fmt::Debug;
use std::fs::File;
use std::io;
use std::sync::Arc;

use super::request::SECTOR;

pub(super) use ioctl::REQUESTS;

/// A block device. Offsets and lengths are in bytes, multiples of [`SECTOR`].
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

    /// Describes zones in their order, from the one in which `offset` is: at least one, if there is one. `zones` is emptied
    /// first.
    ///
    /// # Errors
    /// What the system said.
    fn zones(&self, offset: u64, zones: &mut Vec<ZoneInfo>) -> io::Result<()>;

    /// Changes the state of the zones in a range.
    ///
    /// # Errors
    /// What the system said.
    fn manage_zones(&self, action: ZoneAction, offset: u64, len: u64) -> io::Result<()>;
}

/// A zone; places and lengths are in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct ZoneInfo {
    /// Its first byte.
    pub(super) start: u64,
    /// Its length.
    pub(super) len: u64,
    /// How much of it can be written.
    pub(super) capacity: u64,
    /// Where it is written next.
    pub(super) write_pointer: u64,
    /// enum blk_zone_type (linux/blkzoned.h).
    pub(super) kind: u8,
    /// enum blk_zone_cond (linux/blkzoned.h).
    pub(super) condition: u8,
}

/// What can be done to a zone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ZoneAction {
    /// Keep it open until it is closed.
    Open,
    /// Give back what an open zone takes.
    Close,
    /// Let it be full.
    Finish,
    /// Let it be empty.
    Reset,
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

    fn zones(&self, offset: u64, zones: &mut Vec<ZoneInfo>) -> io::Result<()> {
        zones.clear();
        Ok(ioctl::report_zones(&self.0, offset / SECTOR, |zone| {
            zones.push(zone);
        })?)
    }

    fn manage_zones(&self, action: ZoneAction, offset: u64, len: u64) -> io::Result<()> {
        let range = [offset / SECTOR, len / SECTOR];
        Ok(ioctl::manage_zones(&self.0, action, range)?)
    }
}
/// A block device that remembers what it was asked for, and can be made to fail.
#[cfg(test)]
pub(super) mod fake {
    use std::sync::Mutex;

    use super::*;

    /// What it was asked for.
    #[derive(Debug, Clone, PartialEq, Eq)]
    pub(in crate::blk) enum Call {
        Discard(u64, u64),
        SecureErase(u64, u64),
        Zones(u64),
        Manage(ZoneAction, u64, u64),
    }

    #[derive(Debug, Default)]
    pub(in crate::blk) struct Fake {
        pub(in crate::blk) calls: Mutex<Vec<Call>>,
        /// What the next calls fail with.
        pub(in crate::blk) errno: Mutex<Option<i32>>,
        pub(in crate::blk) zones: Mutex<Vec<ZoneInfo>>,
        /// How many zones it describes at once.
        pub(in crate::blk) at_once: usize,
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

        fn zones(&self, offset: u64, zones: &mut Vec<ZoneInfo>) -> io::Result<()> {
            zones.clear();
            self.called(Call::Zones(offset))?;
            let all = self.zones.lock().unwrap();
            let from = all.iter().filter(|z| z.start + z.len > offset);
            zones.extend(from.take(self.at_once));
            Ok(())
        }

        fn manage_zones(&self, action: ZoneAction, offset: u64, len: u64) -> io::Result<()> {
            self.called(Call::Manage(action, offset, len))?;
            for zone in self.zones.lock().unwrap().iter_mut() {
                if action == ZoneAction::Reset && (offset..offset + len).contains(&zone.start) {
                    zone.write_pointer = zone.start;
                    zone.condition = u8::from(zone.kind != 1);
                }
            }
            Ok(())
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
        for tried in [
            device.discard(0, SECTOR),
            device.secure_erase(0, SECTOR),
            device.zones(0, &mut Vec::new()),
            device.manage_zones(ZoneAction::Reset, 0, SECTOR),
        ] {
            assert_eq!(tried.unwrap_err().raw_os_error(), Some(libc::ENOTTY));
        }
    }
}

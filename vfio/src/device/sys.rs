//! The VFIO calls that vfio-ioctls does not have, or whose answer it drops.
#![allow(
    unsafe_code,
    reason = "system calls that the kernel defines by structures"
)]

use std::io;
use std::mem::size_of;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

use nix::libc;
use vfio_bindings::bindings::vfio::{VFIO_BASE, VFIO_TYPE};

// `VFIO_DEVICE_RESET` and `VFIO_DEVICE_PCI_HOT_RESET`: numbers VFIO_BASE + 11 and + 13, without direction or size.
nix::ioctl_none_bad!(device_reset, request(11));
nix::ioctl_write_ptr_bad!(pci_hot_reset, request(13), HotReset);

const fn request(number: u32) -> libc::c_ulong {
    ((VFIO_TYPE as u32) << 8 | (VFIO_BASE + number)) as libc::c_ulong
}

/// `struct vfio_pci_hot_reset` with room for one group's descriptor.
#[repr(C)]
pub(crate) struct HotReset {
    argsz: u32,
    flags: u32,
    count: u32,
    group: i32,
}

/// A device's descriptor, which vfio-ioctls gives as a number only.
pub(crate) fn borrow(device: &impl AsRawFd) -> BorrowedFd<'_> {
    // SAFETY: it is open as long as `device` lives, which outlives the result.
    unsafe { BorrowedFd::borrow_raw(device.as_raw_fd()) }
}

/// Resets a function by the first method that the kernel has for it.
pub(crate) fn reset_function(device: &impl AsRawFd) -> io::Result<()> {
    // SAFETY: the call takes no argument, and the descriptor is open as long as `device` is borrowed.
    unsafe { device_reset(device.as_raw_fd()) }?;
    Ok(())
}

/// Resets the bus that a function is on. `group` shows that all on it is in our hands; a device that was not opened
/// through a group needs none.
pub(crate) fn reset_bus(device: &impl AsRawFd, group: Option<OwnedFd>) -> io::Result<()> {
    let argument = HotReset {
        argsz: u32::try_from(size_of::<HotReset>()).unwrap_or(0),
        flags: 0,
        count: u32::from(group.is_some()),
        group: group.as_ref().map_or(-1, AsRawFd::as_raw_fd),
    };
    // SAFETY: the argument has the layout that the kernel defines, with as many descriptors as it says.
    unsafe { pci_hot_reset(device.as_raw_fd(), &raw const argument) }?;
    Ok(())
}

/// A copy of a descriptor of this process that is open on `path`. A group can be opened once only, and vfio-ioctls keeps
/// it to itself.
pub(crate) fn find_open(path: &str) -> io::Result<OwnedFd> {
    let number = std::fs::read_dir("/proc/self/fd")?
        .flatten()
        .find(|entry| {
            std::fs::read_link(entry.path()).is_ok_and(|target| target.as_os_str() == path)
        })
        .and_then(|entry| entry.file_name().to_str()?.parse().ok())
        .ok_or(io::ErrorKind::NotFound)?;
    // SAFETY: it was open a moment ago, and the caller holds the device that keeps it open.
    let found = unsafe { BorrowedFd::borrow_raw(number) };
    found.try_clone_to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt;

    #[test]
    fn requests_have_the_kernels_numbers() {
        assert_eq!(request(11), 0x3b6f);
        assert_eq!(request(13), 0x3b71);
        assert_eq!(size_of::<HotReset>(), 16);
    }

    #[test]
    fn an_open_file_is_found_by_its_path() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let path = file.path().to_str().unwrap().to_owned();
        let found = std::fs::File::from(find_open(&path).unwrap());
        let inode = |file: &std::fs::File| file.metadata().unwrap().ino();
        assert_eq!(inode(&found), inode(file.as_file()));
        assert!(find_open("/nowhere").is_err());
    }

    #[test]
    fn other_files_cannot_be_reset() {
        let file = tempfile::tempfile().unwrap();
        assert!(reset_function(&file).is_err());
        assert!(reset_bus(&file, None).is_err());
    }
}

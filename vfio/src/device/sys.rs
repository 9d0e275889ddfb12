//! The VFIO calls that vfio-ioctls does not have, or whose answer it drops.
#![allow(
    unsafe_code,
    reason = "system calls that the kernel defines by structures"
)]

use std::io;
use std::mem::size_of;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

use nix::libc;
use vfio_bindings::bindings::vfio::{
    VFIO_BASE, VFIO_IRQ_SET_ACTION_TRIGGER, VFIO_IRQ_SET_DATA_EVENTFD, VFIO_TYPE,
};
use vmm_sys_util::eventfd::EventFd;

// `VFIO_DEVICE_SET_IRQS`, `VFIO_DEVICE_RESET` and `VFIO_DEVICE_PCI_HOT_RESET`: numbers VFIO_BASE + 10, + 11 and + 13, without
// direction or size.
nix::ioctl_write_ptr_bad!(set_irqs, request(10), u32);
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

/// `struct vfio_irq_set`, which is five words, with the descriptors that are to be signalled behind it.
fn irq_set(index: u32, descriptors: &[i32]) -> Vec<u32> {
    let length = |count: usize| u32::try_from(count).unwrap_or(u32::MAX);
    let flags = VFIO_IRQ_SET_DATA_EVENTFD | VFIO_IRQ_SET_ACTION_TRIGGER;
    let size = length((5 + descriptors.len()) * size_of::<u32>());
    let mut set = vec![size, flags, index, 0, length(descriptors.len())];
    set.extend(
        descriptors
            .iter()
            .map(|descriptor| descriptor.cast_unsigned()),
    );
    set
}

/// Lets the kernel signal `events`, one for each interrupt of a kind. It may have fewer vectors left than that; then it
/// answers with their number and enables none.
pub(crate) fn enable_irqs(
    device: &impl AsRawFd,
    index: u32,
    events: &[&EventFd],
) -> io::Result<()> {
    let descriptors: Vec<_> = events.iter().map(|event| event.as_raw_fd()).collect();
    let set = irq_set(index, &descriptors);
    // SAFETY: the argument has the layout that the kernel defines, and as many words as its first one says.
    match unsafe { set_irqs(device.as_raw_fd(), set.as_ptr()) }? {
        0 => Ok(()),
        left => Err(io::Error::other(format!(
            "the host has {left} interrupt vectors left, and the device wants {}: give guests fewer devices",
            events.len()
        ))),
    }
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
        assert_eq!(request(10), 0x3b6e);
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
    fn interrupts_are_described_as_the_kernel_wants_them() {
        assert_eq!(irq_set(2, &[7, 9]), [28, 0b10_0100, 2, 0, 2, 7, 9]);
    }

    #[test]
    fn other_files_are_no_devices() {
        let file = tempfile::tempfile().unwrap();
        let event = EventFd::new(0).unwrap();
        assert!(enable_irqs(&file, 2, &[&event]).is_err());
        assert!(reset_function(&file).is_err());
        assert!(reset_bus(&file, None).is_err());
    }
}

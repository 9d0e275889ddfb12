//! Kernels and initial RAM disks, as files that anyone may have made.

use std::fs;

use ringside_vmm::boot::{Entry, Images, load};
use ringside_vmm::layout::ram_ranges;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use crate::input::Input;

/// RAM of the guest.
const RAM: u64 = 16 << 20;

/// The first byte says how much of the rest is the initial RAM disk, which stands in front of the kernel.
pub(crate) fn boot(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    let small = input.u8().into();
    let initramfs = input.take(small);
    let kernel = input.rest();
    let ram = ram_ranges(RAM);
    let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), RAM as usize)]).unwrap();
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let (kernel_path, initramfs_path) = (dir.path().join("kernel"), dir.path().join("initramfs"));
    fs::write(&kernel_path, kernel).unwrap();
    fs::write(&initramfs_path, initramfs).unwrap();
    let images = Images {
        kernel: &kernel_path,
        initramfs: (!initramfs.is_empty()).then_some(&initramfs_path),
        cmdline: "console=ttyS0",
    };
    let loaded = load(&memory, &ram, &images, GuestAddress(0xe_0000));
    if let Ok(Entry::Linux64 { address, .. } | Entry::Pvh { address, .. }) = loaded {
        // Whatever is there: the processor starts in RAM or faults, which is the guest's own trouble.
        let _ = memory.read_obj::<u8>(GuestAddress(address));
    }
}

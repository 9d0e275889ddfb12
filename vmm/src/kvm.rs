//! The virtual machine as KVM knows it: memory slots, in-kernel interrupt controllers and timer.
//!
//! Interrupt controllers and PIT are in the kernel (not split): level-triggered pins then need no
//! exit at end of interrupt, and a guest that programs the PIT or the I/O APIC at boot does not wait
//! for us.
#![allow(
    unsafe_code,
    reason = "handing memory to KVM as a slot is unsafe by nature"
)]

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvm_bindings::{
    KVM_MEM_LOG_DIRTY_PAGES, KVM_PIT_SPEAKER_DUMMY, kvm_create_device,
    kvm_device_type_KVM_DEV_TYPE_VFIO, kvm_pit_config, kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, DeviceFd, Kvm, VmFd};
use ringside_vfio::device::Mapping;
use vm_memory::{GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use crate::layout;
use crate::snapshot::dirty::Pages;

/// Why KVM gives us no virtual machine.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No access to KVM.
    #[error("cannot open /dev/kvm: is KVM loaded, and may this user use it?")]
    Open(#[source] io::Error),
    /// A kernel that is too old, or a KVM that is not complete.
    #[error("KVM of this kernel lacks {0}")]
    Lacks(&'static str),
    /// One of the steps of creating a VM failed.
    #[error("KVM cannot {action}")]
    Create {
        /// What was tried.
        action: &'static str,
        /// KVM's reason.
        #[source]
        source: io::Error,
    },
    /// Nothing says what the processors have written.
    #[error("KVM cannot tell which pages of memory the guest has written")]
    DirtyLog(#[source] io::Error),
    /// KVM's slots are used up, or the slot overlaps another.
    #[error("KVM cannot map {size:#x} bytes at guest address {start:#x}")]
    Slot {
        /// Guest-physical address.
        start: u64,
        /// Length in bytes.
        size: u64,
        /// KVM's reason.
        #[source]
        source: io::Error,
    },
}

/// What is behind a slot. KVM holds its address.
#[derive(Clone)]
enum Backing {
    /// RAM stays as long as the VM.
    Ram {
        /// Only held.
        _memory: GuestMemoryMmap,
        /// Guest-physical address.
        start: u64,
        /// Length in bytes.
        size: u64,
        /// Address in this process.
        host: u64,
    },
    /// Device memory comes and goes.
    Device {
        /// Only held.
        _mapping: Arc<Mapping>,
    },
}

/// Names a piece of device memory in the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct SlotId(pub(crate) u32);

type Slots = BTreeMap<u32, Backing>;

/// A KVM virtual machine without processors.
pub struct Vm {
    kvm: Kvm,
    fd: Arc<VmFd>,
    slots: Mutex<Slots>,
}

impl Vm {
    /// Creates a virtual machine with its interrupt controllers and timer.
    pub fn new() -> Result<Self, Error> {
        let kvm = Kvm::new().map_err(|e| Error::Open(e.into()))?;
        for (cap, name) in [
            (Cap::Irqchip, "in-kernel interrupt controllers"),
            (Cap::Ioeventfd, "ioeventfd"),
            (Cap::Irqfd, "irqfd"),
            (Cap::IrqRouting, "interrupt routing"),
            (Cap::UserMemory, "user memory slots"),
            (Cap::ImmediateExit, "immediate exit"),
            (Cap::Pit2, "an in-kernel timer"),
        ] {
            if !kvm.check_extension(cap) {
                return Err(Error::Lacks(name));
            }
        }
        let failed = |action| {
            move |e: kvm_ioctls::Error| Error::Create {
                action,
                source: e.into(),
            }
        };
        let fd = kvm
            .create_vm()
            .map_err(failed("create a virtual machine"))?;
        fd.set_identity_map_address(layout::KVM_IDENTITY_MAP)
            .map_err(failed("place its identity-map page"))?;
        let tss = usize::try_from(layout::KVM_TSS).unwrap_or(usize::MAX);
        fd.set_tss_address(tss)
            .map_err(failed("place its task state pages"))?;
        fd.create_irq_chip()
            .map_err(failed("create the interrupt controllers"))?;
        // The speaker port is answered in the kernel too; Linux calibrates clocks with it.
        let pit = kvm_pit_config {
            flags: KVM_PIT_SPEAKER_DUMMY,
            ..Default::default()
        };
        fd.create_pit2(pit)
            .map_err(failed("create the interval timer"))?;
        Ok(Self {
            kvm,
            fd: Arc::new(fd),
            slots: Mutex::default(),
        })
    }

    /// KVM itself.
    pub fn kvm(&self) -> &Kvm {
        &self.kvm
    }

    /// The VM's file descriptor.
    pub fn fd(&self) -> &Arc<VmFd> {
        &self.fd
    }

    /// KVM's own VFIO device, which is told of each device that the guest gets.
    pub fn create_vfio_device(&self) -> Result<DeviceFd, Error> {
        let mut device = kvm_create_device {
            type_: kvm_device_type_KVM_DEV_TYPE_VFIO,
            ..Default::default()
        };
        self.fd
            .create_device(&mut device)
            .map_err(|e| Error::Create {
                action: "create its VFIO device (is the module kvm-vfio part of this kernel?)",
                source: e.into(),
            })
    }

    fn slots(&self) -> MutexGuard<'_, Slots> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes `memory` guest RAM. The VM keeps its mapping alive.
    pub fn add_ram(&self, memory: &GuestMemoryMmap) -> Result<(), Error> {
        let mut slots = self.slots();
        for region in memory.iter() {
            let (start, size) = (region.start_addr().0, region.len());
            let host = region.as_ptr() as u64;
            let backing = Backing::Ram {
                _memory: memory.clone(),
                start,
                size,
                host,
            };
            self.add_slot(&mut slots, start, size, host, backing)?;
        }
        Ok(())
    }

    /// From now on, or no longer, notes which pages of RAM the processors write.
    ///
    /// # Errors
    /// [`Error::Slot`]
    pub fn log_dirty(&self, on: bool) -> Result<(), Error> {
        let flags = if on { KVM_MEM_LOG_DIRTY_PAGES } else { 0 };
        for (slot, backing) in self.slots().iter() {
            if let Backing::Ram {
                start, size, host, ..
            } = backing
            {
                self.set_slot(*slot, *start, *size, *host, flags)?;
            }
        }
        Ok(())
    }

    /// Moves what was noted since to `pages`.
    ///
    /// # Errors
    /// [`Error::DirtyLog`]
    pub fn take_dirty(&self, pages: &mut Pages) -> Result<(), Error> {
        for (slot, backing) in self.slots().iter() {
            if let Backing::Ram { start, size, .. } = backing {
                let length = usize::try_from(*size).unwrap_or(usize::MAX);
                let bitmap = self.fd.get_dirty_log(*slot, length);
                let bitmap = bitmap.map_err(|e| Error::DirtyLog(e.into()))?;
                pages.add(*start, bitmap);
            }
        }
        Ok(())
    }

    /// Lets the guest reach device memory at `start` without an exit.
    pub fn map(&self, start: u64, mapping: &Arc<Mapping>) -> Result<SlotId, Error> {
        let backing = Backing::Device {
            _mapping: Arc::clone(mapping),
        };
        let (size, host) = (mapping.size(), mapping.address());
        self.add_slot(&mut self.slots(), start, size, host, backing)
    }

    /// Undoes [`Vm::map`].
    pub fn unmap(&self, slot: SlotId) {
        let mut slots = self.slots();
        if !matches!(slots.get(&slot.0), Some(Backing::Device { .. })) {
            return;
        }
        // A slot of size 0 goes (KVM_SET_USER_MEMORY_REGION).
        match self.set_slot(slot.0, 0, 0, 0, 0) {
            Ok(()) => drop(slots.remove(&slot.0)),
            Err(error) => tracing::error!(%error, "device memory stays in the guest"),
        }
    }

    fn add_slot(
        &self,
        slots: &mut Slots,
        start: u64,
        size: u64,
        host: u64,
        backing: Backing,
    ) -> Result<SlotId, Error> {
        let slot = (0..u32::MAX)
            .find(|slot| !slots.contains_key(slot))
            .unwrap_or(u32::MAX);
        self.set_slot(slot, start, size, host, 0)?;
        slots.insert(slot, backing);
        Ok(SlotId(slot))
    }

    fn set_slot(
        &self,
        slot: u32,
        start: u64,
        size: u64,
        host: u64,
        flags: u32,
    ) -> Result<(), Error> {
        let region = kvm_userspace_memory_region {
            slot,
            flags,
            guest_phys_addr: start,
            memory_size: size,
            userspace_addr: host,
        };
        // SAFETY: the caller passes the address and length of a mapping that it holds and keeps in `slots` as long as KVM
        // has the slot; nothing runs the VM longer than `self` lives.
        unsafe { self.fd.set_user_memory_region(region) }.map_err(|e| Error::Slot {
            start,
            size,
            source: e.into(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::{GuestRam, MIN_SIZE, Options, PageSize};
    use crate::testing::has_kvm;
    use ringside_control::Size;

    #[test]
    fn ram_has_its_place_for_itself() {
        if !has_kvm("ram_has_its_place_for_itself") {
            return;
        }
        let ram = GuestRam::new(Options {
            size: Size(MIN_SIZE),
            pages: PageSize::Normal,
            prefault: false,
        });
        let (vm, ram) = (Vm::new().unwrap(), ram.unwrap());
        vm.add_ram(ram.memory()).unwrap();
        assert!(matches!(vm.add_ram(ram.memory()), Err(Error::Slot { .. })));
    }

    #[test]
    fn device_memory_comes_and_goes() {
        if !has_kvm("device_memory_comes_and_goes") {
            return;
        }
        let file = tempfile::tempfile().unwrap();
        file.set_len(8192).unwrap();
        let mapping = Arc::new(Mapping::new(&file, 0, 8192).unwrap());
        let vm = Vm::new().unwrap();
        let start = 0xc000_0000;
        let slot = vm.map(start, &mapping).unwrap();
        assert!(matches!(
            vm.map(start + 4096, &mapping),
            Err(Error::Slot { .. })
        ));
        vm.unmap(slot);
        let again = vm.map(start + 4096, &mapping).unwrap();
        assert_eq!(again, slot, "slots are used again");
        vm.unmap(again);
        vm.unmap(again);
        assert_eq!(Arc::strong_count(&mapping), 1);
    }
}

//! The virtual machine as KVM knows it: memory slots, in-kernel interrupt controllers and timer.
//!
//! Interrupt controllers and PIT are in the kernel (not split): level-triggered pins then need no
//! exit at end of interrupt, and a guest that programs the PIT or the I/O APIC at boot does not wait
//! for us.
#![allow(
    unsafe_code,
    reason = "handing memory to KVM as a slot is unsafe by nature"
)]

use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use kvm_bindings::{KVM_PIT_SPEAKER_DUMMY, kvm_pit_config, kvm_userspace_memory_region};
use kvm_ioctls::{Cap, Kvm, VmFd};
use vm_memory::{GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use crate::layout;
use crate::memory::GuestRam;

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

#[derive(Default)]
struct Slots {
    next: u32,
    /// Mappings that KVM holds addresses of. They live as long as the VM.
    held: Vec<GuestMemoryMmap>,
}

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

    /// Makes `ram` the guest's RAM. The VM keeps its mapping alive.
    pub fn add_ram(&self, ram: &GuestRam) -> Result<(), Error> {
        let mut slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
        // First: a slot that was made is there also if the next one fails.
        slots.held.push(ram.memory().clone());
        for region in ram.memory().iter() {
            let slot = slots.next;
            slots.next += 1;
            self.set_slot(
                slot,
                region.start_addr().0,
                region.len(),
                region.as_ptr() as u64,
            )?;
        }
        Ok(())
    }

    fn set_slot(&self, slot: u32, start: u64, size: u64, host: u64) -> Result<(), Error> {
        let region = kvm_userspace_memory_region {
            slot,
            flags: 0,
            guest_phys_addr: start,
            memory_size: size,
            userspace_addr: host,
        };
        // SAFETY: the caller passes the address and length of a mapping that it has stored in `slots`,
        // where it stays as long as `self`; nothing runs the VM longer than that.
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
    use crate::memory::{MIN_SIZE, Options, PageSize, Size};
    use crate::testing::has_kvm;

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
        vm.add_ram(&ram).unwrap();
        assert!(matches!(vm.add_ram(&ram), Err(Error::Slot { .. })));
    }
}

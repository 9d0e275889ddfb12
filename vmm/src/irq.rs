//! GSIs: KVM's routing table, MSI routes in it, and the irqfds that trigger them.
//!
//! GSIs 0 to 23 are the pins of the in-kernel I/O APIC (0 to 15 of the PICs as well) and routed
//! for good. From 24 on each GSI stands for one MSI or MSI-X vector.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvm_bindings::{
    KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE, KvmIrqRouting, kvm_irq_routing_entry,
    kvm_irq_routing_entry__bindgen_ty_1, kvm_irq_routing_irqchip, kvm_irq_routing_msi,
};
use kvm_ioctls::{Cap, VmFd};
use vmm_sys_util::eventfd::EventFd;

use crate::layout::FIRST_MSI_GSI;

/// Why an interrupt cannot be routed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// KVM's table is full.
    #[error("KVM has no GSI left for another interrupt vector (its table has {limit} entries)")]
    Exhausted {
        /// Number of entries in the table.
        limit: u32,
    },
    /// The GSI was not handed out by [`GsiRouter::allocate`], or was freed.
    #[error("GSI {gsi} is not allocated")]
    NotAllocated {
        /// The GSI in question.
        gsi: u32,
    },
    /// The kernel refused the table.
    #[error("KVM refuses the interrupt routing table")]
    Commit(#[source] io::Error),
    /// The kernel refused to connect an eventfd with a GSI.
    #[error("KVM cannot connect an eventfd with GSI {gsi}")]
    Irqfd {
        /// The GSI in question.
        gsi: u32,
        /// KVM's reason.
        #[source]
        source: io::Error,
    },
}

/// What a device writes to raise a message-signalled interrupt.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MsiMessage {
    /// Message address, upper half in the upper 32 bits.
    pub address: u64,
    /// Message data.
    pub data: u32,
}

#[derive(Default)]
struct Table {
    allocated: BTreeSet<u32>,
    messages: BTreeMap<u32, MsiMessage>,
}

/// The routing table and the GSIs in it. Shared by all devices.
pub struct GsiRouter {
    vm: Arc<VmFd>,
    limit: u32,
    table: Mutex<Table>,
}

impl GsiRouter {
    /// Installs the fixed routes of a VM that has its in-kernel interrupt controllers.
    pub fn new(vm: Arc<VmFd>) -> Result<Self, Error> {
        // The extension's value is the size of the table.
        let limit = u32::try_from(vm.check_extension_int(Cap::IrqRouting)).unwrap_or(0);
        let router = Self {
            vm,
            limit,
            table: Mutex::default(),
        };
        router.commit()?;
        Ok(router)
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Hands out a GSI for one vector. It has no route until [`GsiRouter::set_msi`].
    pub fn allocate(&self) -> Result<u32, Error> {
        let mut table = self.table();
        // The fixed routes have more entries than GSIs: pins 0 to 15 also lead to the PICs.
        let fixed = u32::try_from(fixed_routes().len()).unwrap_or(u32::MAX);
        let room = self.limit.saturating_sub(fixed);
        let gsi = (FIRST_MSI_GSI..FIRST_MSI_GSI.saturating_add(room))
            .find(|gsi| !table.allocated.contains(gsi))
            .ok_or(Error::Exhausted { limit: self.limit })?;
        table.allocated.insert(gsi);
        Ok(gsi)
    }

    /// Takes a GSI back, and its route at the next [`GsiRouter::commit`].
    pub fn free(&self, gsi: u32) {
        let mut table = self.table();
        table.allocated.remove(&gsi);
        table.messages.remove(&gsi);
    }

    /// Routes `gsi` to `message`, from the next [`GsiRouter::commit`] on. Returns whether that
    /// changes anything, so that a caller can leave out a needless commit.
    pub fn set_msi(&self, gsi: u32, message: MsiMessage) -> Result<bool, Error> {
        let mut table = self.table();
        if !table.allocated.contains(&gsi) {
            return Err(Error::NotAllocated { gsi });
        }
        Ok(table.messages.insert(gsi, message) != Some(message))
    }

    /// Hands the table to the kernel (KVM_SET_GSI_ROUTING), all at once.
    pub fn commit(&self) -> Result<(), Error> {
        let table = self.table();
        let mut entries = fixed_routes();
        entries.extend(
            table
                .messages
                .iter()
                .map(|(gsi, message)| msi_route(*gsi, *message)),
        );
        let routing = KvmIrqRouting::from_entries(&entries)
            .map_err(|_| Error::Exhausted { limit: self.limit })?;
        // The lock is held on purpose: two commits must not reach the kernel in the wrong order.
        self.vm
            .set_gsi_routing(&routing)
            .map_err(|e| Error::Commit(e.into()))
    }

    /// From now on a signal on `event` raises `gsi`, at once if it is already signalled.
    pub fn register_irqfd(&self, event: &EventFd, gsi: u32) -> Result<(), Error> {
        self.vm
            .register_irqfd(event, gsi)
            .map_err(|e| Error::Irqfd {
                gsi,
                source: e.into(),
            })
    }

    /// The same for a level-triggered pin: the kernel signals `resample` when the guest has dealt with the interrupt.
    pub fn register_level_irqfd(
        &self,
        event: &EventFd,
        resample: &EventFd,
        gsi: u32,
    ) -> Result<(), Error> {
        self.vm
            .register_irqfd_with_resample(event, resample, gsi)
            .map_err(|e| Error::Irqfd {
                gsi,
                source: e.into(),
            })
    }

    /// Signals on `event` no longer reach `gsi`; they are kept in the eventfd's counter.
    pub fn unregister_irqfd(&self, event: &EventFd, gsi: u32) -> Result<(), Error> {
        self.vm
            .unregister_irqfd(event, gsi)
            .map_err(|e| Error::Irqfd {
                gsi,
                source: e.into(),
            })
    }
}

/// Routes of the pins. As on a PC the timer, ISA IRQ 0, is at pin 2 of the I/O APIC (the MADT says
/// so to the guest) and pin 2 of the PIC is its cascade.
fn fixed_routes() -> Vec<kvm_irq_routing_entry> {
    let mut entries = Vec::new();
    for gsi in 0..FIRST_MSI_GSI {
        if gsi < 8 {
            if gsi != 2 {
                entries.push(pin_route(gsi, KVM_IRQCHIP_PIC_MASTER, gsi));
            }
        } else if gsi < 16 {
            entries.push(pin_route(gsi, KVM_IRQCHIP_PIC_SLAVE, gsi - 8));
        }
        match gsi {
            0 => entries.push(pin_route(gsi, KVM_IRQCHIP_IOAPIC, 2)),
            2 => {}
            _ => entries.push(pin_route(gsi, KVM_IRQCHIP_IOAPIC, gsi)),
        }
    }
    entries
}

fn pin_route(gsi: u32, irqchip: u32, pin: u32) -> kvm_irq_routing_entry {
    kvm_irq_routing_entry {
        gsi,
        type_: KVM_IRQ_ROUTING_IRQCHIP,
        u: kvm_irq_routing_entry__bindgen_ty_1 {
            irqchip: kvm_irq_routing_irqchip { irqchip, pin },
        },
        ..Default::default()
    }
}

fn msi_route(gsi: u32, message: MsiMessage) -> kvm_irq_routing_entry {
    let high = u32::try_from(message.address >> 32).unwrap_or(0);
    let low = u32::try_from(message.address & u64::from(u32::MAX)).unwrap_or(0);
    kvm_irq_routing_entry {
        gsi,
        type_: KVM_IRQ_ROUTING_MSI,
        u: kvm_irq_routing_entry__bindgen_ty_1 {
            msi: kvm_irq_routing_msi {
                address_lo: low,
                address_hi: high,
                data: message.data,
                ..Default::default()
            },
        },
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kvm::Vm;
    use crate::testing::has_kvm;

    fn router() -> GsiRouter {
        GsiRouter::new(Arc::clone(Vm::new().unwrap().fd())).unwrap()
    }

    #[test]
    fn gsis_are_handed_out_once_and_run_out() {
        if !has_kvm("gsis_are_handed_out_once_and_run_out") {
            return;
        }
        let router = router();
        let mut all = Vec::new();
        let error = loop {
            match router.allocate() {
                Ok(gsi) => all.push(gsi),
                Err(error) => break error,
            }
        };
        assert!(matches!(error, Error::Exhausted { .. }), "{error}");
        assert_eq!(all.first(), Some(&FIRST_MSI_GSI));
        assert!(all.windows(2).all(|pair| pair[0] < pair[1]));
        // The kernel takes as many as we hand out.
        for gsi in &all {
            let message = MsiMessage {
                address: 0xfee0_0000,
                data: *gsi,
            };
            assert!(router.set_msi(*gsi, message).unwrap());
        }
        router.commit().unwrap();
        router.free(all[7]);
        assert_eq!(router.allocate().unwrap(), all[7]);
    }

    #[test]
    fn irqfds_come_and_go() {
        if !has_kvm("irqfds_come_and_go") {
            return;
        }
        let router = router();
        let event = EventFd::new(0).unwrap();
        router.register_irqfd(&event, 5).unwrap();
        assert!(matches!(
            router.register_irqfd(&event, 5),
            Err(Error::Irqfd { gsi: 5, .. })
        ));
        router.unregister_irqfd(&event, 5).unwrap();
        router.register_irqfd(&event, 5).unwrap();
    }
}

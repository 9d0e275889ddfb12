//! MSI (PCI Express 5.0, 6.1.4 and 7.7.1): up to 32 vectors that share an address, and whose messages differ in the lowest
//! bits of the data. Everything is in the capability's registers; how interrupts are delivered and kept is [`Msix`]'s.

use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;

use super::InterruptRouting;
use super::bits::*;
use super::config::ConfigSpace;
use super::msix::{Error, Msix};
use crate::irq::MsiMessage;

/// Where the registers of a capability are (PCI Express 5.0, 7.7.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MsiLayout {
    /// There is an upper half of the address, at + 8.
    pub upper_address: bool,
    /// Message data.
    pub data: usize,
    /// Mask bits; the pending bits follow.
    pub mask: Option<usize>,
}

impl MsiLayout {
    /// The layout of the capability at `at` with this message control.
    pub fn new(at: usize, control: u16) -> Self {
        let upper_address = control & MSI_64_BIT != 0;
        let data = at + if upper_address { 12 } else { 8 };
        Self {
            upper_address,
            data,
            mask: (control & MSI_MASKABLE != 0).then_some(data + 4),
        }
    }
}

/// MSI of one function. Source and vector are the same.
pub struct Msi {
    capability: usize,
    layout: MsiLayout,
    vectors: Msix,
}

impl Msi {
    /// For the capability at `capability` of `space`.
    pub fn new(
        routing: Arc<dyn InterruptRouting>,
        space: &ConfigSpace,
        capability: usize,
    ) -> Result<Self, Error> {
        let control = space.u16(capability + 2);
        let count = 1u16 << ((control & MSI_CAPABLE) >> 1).min(MSI_MAX_LOG);
        let mut vectors = Msix::new(routing, count, count.into())?;
        for vector in 0..count {
            vectors.assign(vector.into(), Some(vector));
        }
        Ok(Self {
            capability,
            layout: MsiLayout::new(capability, control),
            vectors,
        })
    }

    /// The eventfds of all vectors.
    pub fn events(&self) -> Vec<&EventFd> {
        self.vectors.events()
    }

    /// How many vectors software lets the function use.
    pub fn enabled_vectors(&self, space: &ConfigSpace) -> usize {
        let enabled = enabled(space.u16(self.capability + 2));
        usize::try_from(enabled).unwrap_or(usize::MAX)
    }

    /// Whether software uses it.
    pub fn is_enabled(&self, space: &ConfigSpace) -> bool {
        space.u16(self.capability + 2) & MSI_ENABLE != 0
    }

    /// To be called when software may have written the capability.
    pub fn update(&mut self, space: &ConfigSpace) {
        let control = space.u16(self.capability + 2);
        let enabled = enabled(control);
        let low = u64::from(space.u32(self.capability + 4));
        let high = if self.layout.upper_address {
            u64::from(space.u32(self.capability + 8))
        } else {
            0
        };
        let mask = self.layout.mask.map_or(0, |mask| space.u32(mask));
        let data = u32::from(space.u16(self.layout.data)) & !(enabled - 1);
        for vector in 0..self.vectors.vector_count() {
            let number = u32::from(vector);
            let message = MsiMessage {
                address: (high << 32) | low,
                data: data | (number & (enabled - 1)),
            };
            let masked = number >= enabled || mask.checked_shr(number).unwrap_or(0) & 1 != 0;
            self.vectors.program(vector, message, masked);
        }
        let on = if control & MSI_ENABLE == 0 {
            0
        } else {
            MSIX_ENABLE
        };
        self.vectors.set_control(on);
    }

    /// Writes the pending bits into `space`, if the function has any.
    pub fn show_pending(&self, space: &mut ConfigSpace) {
        if let Some(mask) = self.layout.mask {
            let mut pending = [0; 4];
            self.vectors.read_pending(0, &mut pending);
            space.set(mask + 4, &pending);
        }
    }
}

/// How many vectors software lets a function with this message control use.
fn enabled(control: u16) -> u32 {
    1 << ((control & MSI_ENABLED) >> 4).min(MSI_MAX_LOG)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pci::config::Identity;
    use crate::pci::msix::tests::FakeKvm;

    /// A function with MSI of 4 maskable vectors and 64-bit addresses at 0x40.
    fn space() -> ConfigSpace {
        let mut space = ConfigSpace::new(Identity {
            vendor: 1,
            device: 1,
            revision: 0,
            class: 0,
            subsystem_vendor: 0,
            subsystem: 0,
        });
        let control = (2 << 1) | MSI_64_BIT | MSI_MASKABLE;
        let mut body = [0; 22];
        body[..2].copy_from_slice(&control.to_le_bytes());
        let at = space.add_capability(CAP_MSI, &body, &[0xff; 22]).unwrap();
        assert_eq!(at, 0x40);
        space
    }

    fn enable(space: &mut ConfigSpace, log: u16) {
        let control = (2 << 1) | MSI_64_BIT | MSI_MASKABLE | MSI_ENABLE | (log << 4);
        space.write(0x42, &control.to_le_bytes());
    }

    #[test]
    fn vectors_differ_in_the_lowest_bits_of_the_data() {
        let (kvm, mut space) = (Arc::new(FakeKvm::default()), space());
        let mut msi = Msi::new(kvm.clone(), &space, 0x40).unwrap();
        assert_eq!(msi.events().len(), 4);
        space.write(0x44, &0xfee0_1000_u32.to_le_bytes());
        space.write(0x48, &1u32.to_le_bytes());
        space.write(0x4c, &0x4043_u16.to_le_bytes());
        enable(&mut space, 1);
        assert!(msi.is_enabled(&space));
        msi.update(&space);
        for event in msi.events() {
            kvm.signal(event);
        }
        let sent = kvm.take_sent();
        let address = 0x1_fee0_1000;
        let message = |data| MsiMessage { address, data };
        assert_eq!(sent, [message(0x4042), message(0x4043)], "two are enabled");
        // The other two were kept, and come when they may.
        enable(&mut space, 2);
        msi.update(&space);
        assert_eq!(kvm.take_sent(), [message(0x4042), message(0x4043)]);
    }

    #[test]
    fn masked_vectors_are_pending() {
        let (kvm, mut space) = (Arc::new(FakeKvm::default()), space());
        let mut msi = Msi::new(kvm.clone(), &space, 0x40).unwrap();
        enable(&mut space, 2);
        space.write(0x50, &0b1000_u32.to_le_bytes());
        msi.update(&space);
        kvm.signal(msi.events()[3]);
        assert!(kvm.take_sent().is_empty());
        msi.show_pending(&mut space);
        assert_eq!(space.u32(0x54), 0b1000);
        space.write(0x50, &[0; 4]);
        msi.update(&space);
        assert_eq!(kvm.take_sent().len(), 1);
        msi.show_pending(&mut space);
        assert_eq!(space.u32(0x54), 0);
    }

    #[test]
    fn all_is_given_back() {
        let kvm = Arc::new(FakeKvm::default());
        drop(Msi::new(kvm.clone(), &space(), 0x40).unwrap());
        assert_eq!(kvm.allocated(), 0);
    }
}

//! The reset control register, which the FADT names as ACPI's reset register.
//!
//! | port | size | register |
//! | --- | --- | --- |
//! | 0xcf8 | 4 | PCI configuration address |
//! | 0xcf9 | 1 | reset control: a *byte* access in the middle of the one above |
//! | 0xcfc | 4 | PCI configuration data |
//!
//! As on a PC the access's width tells the two apart, so this device stands before the PCI host's.

use crate::bus::{BusDevice, SharedDevice};
use crate::exit::{ExitHandle, ExitReason};
use crate::layout::{PCI_CONFIG_PORT, RESET_PORT};

/// Written to the register to reset (and stated in the FADT): a system reset, now.
pub const RESET_VALUE: u8 = SYSTEM_RESET | RESET_CPU;
/// The kind of reset: of the system, not only the processor.
const SYSTEM_RESET: u8 = 1 << 1;
/// The transition from 0 to 1 starts it.
const RESET_CPU: u8 = 1 << 2;

/// The reset register, and behind it the PCI configuration ports.
pub struct ResetControl {
    exit: ExitHandle,
    value: u8,
    pci: Option<SharedDevice>,
}

impl ResetControl {
    /// A register that reports a reset to `exit`. `pci` answers all other accesses to ports 0xcf8
    /// to 0xcff; its offsets count from 0xcf8.
    pub fn new(exit: ExitHandle, pci: Option<SharedDevice>) -> Self {
        Self {
            exit,
            value: 0,
            pci,
        }
    }

    /// The register.
    pub fn value(&self) -> u8 {
        self.value
    }

    /// Sets the register, without a reset.
    pub fn restore(&mut self, value: u8) {
        self.value = value & SYSTEM_RESET;
    }

    fn is_reset_register(offset: u64, len: usize) -> bool {
        offset == RESET_PORT - PCI_CONFIG_PORT && len == 1
    }
}

impl BusDevice for ResetControl {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        if Self::is_reset_register(offset, data.len()) {
            data.fill(self.value);
        } else if let Some(pci) = &self.pci {
            pci.lock()
                .unwrap_or_else(std::sync::PoisonError::into_inner)
                .read(offset, data);
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if let (true, &[value]) = (Self::is_reset_register(offset, data.len()), data) {
            if value & RESET_CPU != 0 {
                self.exit.end(ExitReason::Reset("reset register"));
            }
            self.value = value & SYSTEM_RESET;
        } else if let Some(pci) = &self.pci {
            pci.lock()
                .unwrap_or_else(std::sync::PoisonError::into_inner)
                .write(offset, data);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::{Arc, Mutex};

    struct Last(Vec<(u64, usize)>);
    impl BusDevice for Last {
        fn read(&mut self, _: u64, data: &mut [u8]) {
            data.fill(0x42);
        }
        fn write(&mut self, offset: u64, data: &[u8]) {
            self.0.push((offset, data.len()));
        }
    }

    #[test]
    fn a_byte_at_0xcf9_is_the_reset_register_and_the_rest_is_pci() {
        let exit = ExitHandle::new().unwrap();
        let pci = Arc::new(Mutex::new(Last(Vec::new())));
        let mut device = ResetControl::new(exit.clone(), Some(pci.clone()));
        device.write(0, &[0, 0, 0, 0x80]);
        device.write(1, &[6, 6]);
        device.write(5, &[6]);
        device.write(1, &[SYSTEM_RESET]);
        assert_eq!(exit.reason(), None);
        assert_eq!(pci.lock().unwrap().0, [(0, 4), (1, 2), (5, 1)]);
        let (mut own, mut other) = ([0], [0; 4]);
        device.read(1, &mut own);
        device.read(4, &mut other);
        assert_eq!((own, other), ([SYSTEM_RESET], [0x42; 4]));
        device.write(1, &[RESET_VALUE]);
        assert_eq!(exit.reason(), Some(ExitReason::Reset("reset register")));
    }

    #[test]
    fn without_pci_nothing_answers() {
        let mut device = ResetControl::new(ExitHandle::new().unwrap(), None);
        device.write(0, &[1, 2, 3, 4]);
        let mut data = [0xff; 4];
        device.read(0, &mut data);
        assert_eq!(data, [0xff; 4]);
    }
}

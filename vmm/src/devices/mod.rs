//! The platform's fixed devices. Each file has the same order: the register map, the device, its
//! registers' behaviour ([`BusDevice`](crate::bus::BusDevice)), its tests.

pub mod acpi_pm;
pub mod i8042;
pub mod pvpanic;
pub mod reset;
pub mod rtc;
pub mod serial;

use std::sync::{Arc, Mutex};

use serde::{Deserialize, Serialize};

use self::acpi_pm::AcpiPm;
use self::reset::ResetControl;
use self::rtc::Rtc;
use self::serial::{Serial, SerialRegisters};
use crate::pci::host::{ConfigPorts, lock};

/// Those that have a state.
pub struct Platform {
    /// COM1.
    pub serial: Arc<Mutex<Serial>>,
    /// The clock.
    pub rtc: Arc<Mutex<Rtc>>,
    /// ACPI's registers.
    pub pm: Arc<Mutex<AcpiPm>>,
    /// The reset register.
    pub reset: Arc<Mutex<ResetControl>>,
    /// PCI's configuration ports.
    pub pci: Arc<Mutex<ConfigPorts>>,
}

/// Their state, for another process.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct PlatformState {
    /// COM1.
    pub serial: SerialRegisters,
    rtc_index: u8,
    rtc_memory: Vec<u8>,
    /// PM1 enable, PM1 control, and the timer.
    pm: (u16, u16, u32),
    reset: u8,
    pci_address: u32,
}

impl Platform {
    /// As they are now. The processors are out of the guest.
    pub fn state(&self) -> PlatformState {
        let (rtc_index, rtc_memory) = lock(&self.rtc).state();
        PlatformState {
            serial: lock(&self.serial).state(),
            rtc_index,
            rtc_memory,
            pm: lock(&self.pm).state(),
            reset: lock(&self.reset).value(),
            pci_address: lock(&self.pci).address(),
        }
    }

    /// Takes over a state, but for the serial port's, which is made with it. Returns whether it is possible.
    pub fn restore(&self, state: &PlatformState) -> bool {
        lock(&self.pm).restore(state.pm);
        lock(&self.reset).restore(state.reset);
        lock(&self.pci).set_address(state.pci_address);
        lock(&self.rtc).restore(state.rtc_index, &state.rtc_memory)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bus::BusDevice;
    use crate::exit::ExitHandle;
    use proptest::prelude::*;
    use vmm_sys_util::eventfd::EventFd;

    proptest! {
        /// A guest may read and write anything at any width.
        #[test]
        fn no_access_panics(
            accesses in proptest::collection::vec(
                (0u64..16, 0usize..9, any::<u64>(), any::<bool>()), 1..64),
        ) {
            let exit = ExitHandle::new().unwrap();
            let irq = EventFd::new(vmm_sys_util::eventfd::EFD_NONBLOCK).unwrap();
            let (serial, _input) = serial::Serial::new(irq, Box::new(std::io::sink()));
            let mut serial = serial.lock().unwrap();
            let mut pm = acpi_pm::AcpiPm::new(exit.clone());
            let mut keyboard = i8042::I8042::new(exit.clone());
            let mut panic = pvpanic::PvPanic::new(exit.clone());
            let mut reset = reset::ResetControl::new(exit, None);
            let mut clock = rtc::Rtc::new();
            let devices: [&mut dyn BusDevice; 6] =
                [&mut *serial, &mut pm, &mut keyboard, &mut panic, &mut reset, &mut clock];
            for device in devices {
                for (offset, length, value, write) in &accesses {
                    let mut data = value.to_le_bytes();
                    let data = &mut data[..*length % 9];
                    if *write {
                        device.write(*offset, data);
                    } else {
                        device.read(*offset, data);
                    }
                }
            }
        }
    }
}

//! The platform's fixed devices. Each file has the same order: the register map, the device, its
//! registers' behaviour ([`BusDevice`](crate::bus::BusDevice)), its tests.

pub mod acpi_pm;
pub mod i8042;
pub mod pvpanic;
pub mod reset;
pub mod rtc;
pub mod serial;

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

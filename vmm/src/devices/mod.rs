//! The platform's fixed devices. Each file has the same order: the register map, the device, its
//! registers' behaviour ([`BusDevice`](crate::bus::BusDevice)), its tests.

pub mod acpi_pm;
pub mod i8042;
pub mod pvpanic;
pub mod reset;
pub mod rtc;
pub mod serial;

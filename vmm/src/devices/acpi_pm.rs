//! ACPI's fixed hardware (ACPI 6.5, 4.8.3): the PM1 registers, through which the guest powers off,
//! and the power management timer.
//!
//! | offset | size | register |
//! | --- | --- | --- |
//! | 0 | 2 | PM1 status |
//! | 2 | 2 | PM1 enable |
//! | 4 | 2 | PM1 control |
//! | 8 | 4 | PM timer |
//!
//! Full ACPI hardware instead of the hardware-reduced kind: Linux leaves the PICs, the PIT and
//! ISA interrupts alone on hardware-reduced machines, but the serial port is one of those, and
//! the PM timer is what it calibrates its clocks against.

use std::time::Instant;

use crate::bus::BusDevice;
use crate::exit::{ExitHandle, ExitReason};

/// Size of the registers in bytes.
pub const SIZE: u64 = 12;
/// Offset of the PM1 event block (status and enable).
pub const PM1_EVENT: u16 = 0;
/// Offset of the PM1 control block.
pub const PM1_CONTROL: u16 = 4;
/// Offset of the PM timer.
pub const PM_TIMER: u16 = 8;
/// SLP_TYP that the DSDT's `\_S5` names.
pub const SLEEP_TYPE_S5: u8 = 5;

/// ACPI mode is on; there is no other (4.8.3.2.1).
const SCI_EN: u16 = 1;
/// Where SLP_TYP is in the control register.
const SLP_TYP_SHIFT: u16 = 10;
/// Enter the state that SLP_TYP names.
const SLP_EN: u16 = 1 << 13;
/// Frequency of the PM timer in Hz (4.8.3.3).
const TIMER_HZ: u128 = 3_579_545;

/// The registers.
pub struct AcpiPm {
    exit: ExitHandle,
    start: Instant,
    /// What the timer showed at the start.
    ahead: u32,
    enable: u16,
    control: u16,
}

impl AcpiPm {
    /// Registers after reset. Power-off is reported to `exit`.
    pub fn new(exit: ExitHandle) -> Self {
        Self {
            exit,
            start: Instant::now(),
            ahead: 0,
            enable: 0,
            control: SCI_EN,
        }
    }

    /// PM1 enable, PM1 control, and the timer.
    pub fn state(&self) -> (u16, u16, u32) {
        (self.enable, self.control, self.timer())
    }

    /// Takes over what [`AcpiPm::state`] gave elsewhere; the timer goes on from there.
    pub fn restore(&mut self, (enable, control, timer): (u16, u16, u32)) {
        self.enable = enable;
        self.control = control & !SLP_EN | SCI_EN;
        (self.start, self.ahead) = (Instant::now(), timer);
    }

    fn timer(&self) -> u32 {
        let ticks = self.start.elapsed().as_nanos() * TIMER_HZ / 1_000_000_000;
        let ticks = ticks + u128::from(self.ahead);
        // TMR_VAL_EXT: the counter has 32 bits and wraps around.
        u32::try_from(ticks & u128::from(u32::MAX)).unwrap_or(0)
    }
}

impl BusDevice for AcpiPm {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        let mut registers = [0u8; 12];
        // No fixed event ever happens, so the status half stays 0.
        for (at, bytes) in [
            (2, &self.enable.to_le_bytes()[..]),
            (4, &self.control.to_le_bytes()[..]),
            (8, &self.timer().to_le_bytes()[..]),
        ] {
            if let Some(place) = registers.get_mut(at..at + bytes.len()) {
                place.copy_from_slice(bytes);
            }
        }
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        let source = start
            .checked_add(data.len())
            .and_then(|end| registers.get(start..end));
        if let Some(source) = source {
            data.copy_from_slice(source);
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        match (offset, data) {
            (2, &[low, high]) => self.enable = u16::from_le_bytes([low, high]),
            (4, &[low, high]) => {
                let value = u16::from_le_bytes([low, high]);
                self.control = value & !SLP_EN | SCI_EN;
                if value & SLP_EN != 0 && (value >> SLP_TYP_SHIFT) & 7 == u16::from(SLEEP_TYPE_S5) {
                    self.exit.end(ExitReason::PowerOff);
                }
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn s5_ends_the_machine_and_other_states_do_not() {
        let exit = ExitHandle::new().unwrap();
        let mut pm = AcpiPm::new(exit.clone());
        for value in [
            SLP_EN,
            5 << SLP_TYP_SHIFT,
            SLP_EN | 3 << SLP_TYP_SHIFT,
            0xff & !SLP_EN,
        ] {
            pm.write(4, &value.to_le_bytes());
            assert_eq!(exit.reason(), None, "{value:#x}");
        }
        pm.write(4, &(SLP_EN | 5 << SLP_TYP_SHIFT).to_le_bytes());
        assert_eq!(exit.reason(), Some(ExitReason::PowerOff));
    }

    #[test]
    fn registers_read_back() {
        let mut pm = AcpiPm::new(ExitHandle::new().unwrap());
        let mut word = [0; 2];
        pm.read(4, &mut word);
        assert_eq!(word, [1, 0]);
        pm.write(2, &[0x21, 0x03]);
        pm.read(2, &mut word);
        assert_eq!(word, [0x21, 0x03]);
        pm.write(2, &[1, 2, 3, 4]);
        pm.write(4, &[0]);
        pm.read(4, &mut word);
        assert_eq!(word, [1, 0]);
        let mut beyond = [0xff; 8];
        pm.read(8, &mut beyond);
        assert_eq!(beyond, [0xff; 8]);
    }

    #[test]
    fn the_timer_counts_at_its_frequency() {
        let mut pm = AcpiPm::new(ExitHandle::new().unwrap());
        let mut read = || {
            let mut data = [0; 4];
            pm.read(8, &mut data);
            u32::from_le_bytes(data)
        };
        let (first, start) = (read(), Instant::now());
        std::thread::sleep(std::time::Duration::from_millis(20));
        let ticks = f64::from(read() - first);
        let seconds = start.elapsed().as_secs_f64();
        assert!(
            (ticks / seconds / 3_579_545.0 - 1.0).abs() < 0.05,
            "{ticks} in {seconds}"
        );
    }
}

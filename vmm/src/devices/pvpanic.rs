//! pvpanic: a port through which the guest's kernel says that it panicked.
//!
//! | offset | access | register |
//! | --- | --- | --- |
//! | 0 | read | the events this device knows |
//! | 0 | write | the event that happened |

use crate::bus::BusDevice;
use crate::exit::{ExitHandle, ExitReason};

/// The guest panicked.
const PANICKED: u8 = 1 << 0;
/// The guest panicked and a crash kernel takes over; the machine goes on.
const CRASH_LOADED: u8 = 1 << 1;

/// The event port.
pub struct PvPanic {
    exit: ExitHandle,
    /// Logged once: a guest must not be able to fill the log.
    crash_logged: bool,
}

impl PvPanic {
    /// A port that reports panics to `exit`.
    pub fn new(exit: ExitHandle) -> Self {
        Self {
            exit,
            crash_logged: false,
        }
    }
}

impl BusDevice for PvPanic {
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        data.fill(PANICKED | CRASH_LOADED);
    }

    fn write(&mut self, _offset: u64, data: &[u8]) {
        match *data {
            [event] if event & PANICKED != 0 => self.exit.end(ExitReason::Panic),
            [event] if event & CRASH_LOADED != 0 && !self.crash_logged => {
                self.crash_logged = true;
                tracing::warn!("the guest's kernel panicked; its crash kernel takes over");
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_ends_the_machine_and_a_crash_kernel_does_not() {
        let exit = ExitHandle::new().unwrap();
        let mut device = PvPanic::new(exit.clone());
        let mut events = [0];
        device.read(0, &mut events);
        assert_eq!(events, [3]);
        device.write(0, &[CRASH_LOADED]);
        device.write(0, &[0x80]);
        assert_eq!(exit.reason(), None);
        device.write(0, &[PANICKED]);
        assert_eq!(exit.reason(), Some(ExitReason::Panic));
    }
}

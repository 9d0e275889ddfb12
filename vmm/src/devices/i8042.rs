//! The keyboard controller, as far as a guest without a keyboard needs it: its reset line.
//!
//! | port | access | register |
//! | --- | --- | --- |
//! | 0x60 | read | data: nothing |
//! | 0x64 | read | status: both buffers empty |
//! | 0x64 | write | command |
//!
//! The FADT says that there is no keyboard controller, so that nobody probes for it; the reset
//! command is for kernels told to `reboot=kbd`.

use crate::bus::BusDevice;
use crate::exit::{ExitHandle, ExitReason};

/// Pulses the processor's reset line.
const COMMAND_RESET: u8 = 0xfe;

/// The command and status port. The data port has no device and reads as all ones.
pub struct I8042(ExitHandle);

impl I8042 {
    /// A controller that reports a reset to `exit`.
    pub fn new(exit: ExitHandle) -> Self {
        Self(exit)
    }
}

impl BusDevice for I8042 {
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&mut self, _offset: u64, data: &[u8]) {
        if data == [COMMAND_RESET] {
            self.0.end(ExitReason::Reset("keyboard controller"));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_reset_command_resets() {
        let exit = ExitHandle::new().unwrap();
        let mut device = I8042::new(exit.clone());
        device.write(0, &[0xad]);
        device.write(0, &[0xfe, 0]);
        let mut status = [0xff];
        device.read(0, &mut status);
        assert_eq!((status, exit.reason()), ([0], None));
        device.write(0, &[0xfe]);
        assert_eq!(
            exit.reason(),
            Some(ExitReason::Reset("keyboard controller"))
        );
    }
}

//! Registers of a passed-through function, read and written by the guest as its kernel would, without a driver: what it takes to
//! send a device's DMA astray.

use std::time::Duration;

use super::guest::Guest;
use super::passthrough::PciId;
use crate::error::{LabError, Result};

/// How long edu takes for a transfer, with ample time to spare, on plain hardware.
const TRANSFER_LIMIT: Duration = Duration::from_secs(10);

/// BAR 0 of a function in the guest. The function decodes memory and may become bus master; it has no driver.
#[derive(Debug, Clone, Copy)]
pub struct Registers {
    base: u64,
}

/// How wide an access is, in bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Width {
    /// 4 bytes.
    Bits32 = 32,
    /// 8 bytes.
    Bits64 = 64,
}

impl Registers {
    /// Takes the first function of this kind in the guest away from its driver, if it has one.
    ///
    /// # Errors
    /// Fails if there is no such function.
    pub fn take(guest: &mut Guest, id: PciId) -> Result<Self> {
        // Byte 4 of the configuration space: memory space enable and bus master enable.
        let text = guest.run_ok(&format!(
            "for function in /sys/bus/pci/devices/*; do \
             [ \"$(cat $function/vendor) $(cat $function/device)\" = '0x{:04x} 0x{:04x}' ] || continue; \
             [ ! -e $function/driver ] || echo ${{function##*/}} >$function/driver/unbind; \
             printf '\\006' | dd of=$function/config bs=1 seek=4 conv=notrunc 2>/dev/null; \
             head -n 1 $function/resource; exit; \
             done; exit 1",
            id.vendor, id.device
        ))?;
        let base = text
            .split_whitespace()
            .next()
            .and_then(number)
            .ok_or(LabError::Protocol {
                from: "guest agent",
                text,
            })?;
        Ok(Self { base })
    }

    /// Writes values to registers, in order.
    ///
    /// # Errors
    /// Fails if the guest cannot.
    pub fn write(&self, guest: &mut Guest, width: Width, writes: &[(u64, u64)]) -> Result<()> {
        let commands: Vec<String> = writes
            .iter()
            .map(|(offset, value)| {
                format!(
                    "busybox devmem {:#x} {} {value:#x}",
                    self.base + offset,
                    width as u8
                )
            })
            .collect();
        guest.run_ok(&commands.join(" && ")).map(drop)
    }

    /// Reads a register.
    ///
    /// # Errors
    /// Fails if the guest cannot.
    pub fn read(&self, guest: &mut Guest, width: Width, offset: u64) -> Result<u64> {
        let text = guest.run_ok(&format!(
            "busybox devmem {:#x} {}",
            self.base + offset,
            width as u8
        ))?;
        number(text.trim()).ok_or(LabError::Protocol {
            from: "guest agent",
            text,
        })
    }
}

/// A number as `0x1f`.
fn number(text: &str) -> Option<u64> {
    u64::from_str_radix(text.strip_prefix("0x")?, 16).ok()
}

/// Which way edu moves data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transfer {
    /// From memory to the device.
    Read,
    /// From the device to memory.
    Write,
}

/// Lets edu read or write 16 bytes of memory at a guest-physical address by DMA, and waits until it has tried: it does not say
/// whether it could (QEMU, docs/specs/edu.rst).
///
/// # Errors
/// Fails if the guest cannot reach its registers, or the transfer does not end.
pub fn edu_transfer(
    guest: &mut Guest,
    edu: &Registers,
    transfer: Transfer,
    address: u64,
) -> Result<()> {
    const SOURCE: u64 = 0x80;
    const DESTINATION: u64 = 0x88;
    const COUNT: u64 = 0x90;
    const COMMAND: u64 = 0x98;
    const BUFFER: u64 = 0x40000;
    let (source, destination, command) = match transfer {
        Transfer::Read => (address, BUFFER, 0b01),
        Transfer::Write => (BUFFER, address, 0b11),
    };
    edu.write(
        guest,
        Width::Bits64,
        &[
            (SOURCE, source),
            (DESTINATION, destination),
            (COUNT, 16),
            (COMMAND, command),
        ],
    )?;
    let busy = edu.base + COMMAND;
    guest
        .run_ok_within(
            &format!("while [ $(($(busybox devmem {busy:#x} 64) & 1)) = 1 ]; do sleep 0.1; done"),
            TRANSFER_LIMIT,
        )
        .map(drop)
}

/// Lets a virtual function of igb fetch a descriptor of its first transmit queue from a guest-physical address (Intel 82576
/// datasheet, 8.12: transmit registers). Its driver has to have been there before: it makes the physical function let it transmit.
///
/// # Errors
/// Fails if the guest cannot reach its registers.
pub fn igbvf_transmit_from(guest: &mut Guest, vf: &Registers, address: u64) -> Result<()> {
    const TDBAL: u64 = 0x3800;
    const TDBAH: u64 = 0x3804;
    const TDLEN: u64 = 0x3808;
    const TDH: u64 = 0x3810;
    const TDT: u64 = 0x3818;
    const TXDCTL: u64 = 0x3828;
    const TXDCTL_ENABLE: u64 = 1 << 25;
    vf.write(
        guest,
        Width::Bits32,
        &[
            (TXDCTL, 0),
            (TDBAL, address & 0xffff_ffff),
            (TDBAH, address >> 32),
            (TDLEN, 4096),
            (TDH, 0),
            (TDT, 0),
            (TXDCTL, TXDCTL_ENABLE),
            // One descriptor is ready.
            (TDT, 1),
        ],
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_hexadecimal() {
        assert_eq!(number("0x00000000FEA00000"), Some(0xfea0_0000));
        assert_eq!(number("FEA0"), None);
    }
}

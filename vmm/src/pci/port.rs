//! A root port with a hot-plug slot (PCI Express 5.0, 6.7): the bridge between bus 0 and a bus with one device on it, which can
//! come and go while the guest runs.
//!
//! ```text
//!            plugged                 power on (PCC 0)
//!   empty ──────────▶ present, off ───────────────────▶ present, on: link active, the function answers
//!     ▲                 │    ▲        power off (PCC 1)     │  │
//!     │                 │    └──────────────────────────────┘  │ taken away (surprise)
//!     │   removal was   │                                      │
//!     └── asked for ────┘ ◀────────────────────────────────────┘
//! ```
//!
//! - Plugging tells the guest by *presence detect changed*, and by the attention button, as Linux listens for that alone where there
//!   is one; its driver then turns the power on.
//! - Removal is asked for by the attention button. The guest's driver lets go of the device (Linux waits five seconds for a
//!   second push, which would cancel it), turns the power off, and the function leaves.
//! - Without such a request a function whose power was turned off stays, and answers again when it is turned on.
//!
//! Slot commands take effect at once, so there is no *command completed*. Events interrupt by MSI.

use std::sync::Arc;

use super::bits::*;
use super::config::{self, ConfigSpace, Identity};
use super::msi::Msi;
use super::msix;
use super::{InterruptRouting, PciFunction};
use crate::layout::Range;

/// Why there is no port.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Its registers.
    #[error("cannot lay out a root port's configuration space")]
    Config(#[from] config::Error),
    /// Its interrupt.
    #[error("cannot set up a root port's interrupt")]
    Msi(#[from] msix::Error),
}

/// What the guest has done to the slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// The function answers now.
    On,
    /// It does not.
    Off,
    /// It does not, and is to leave as asked.
    Leave,
}

/// The port.
pub struct RootPort {
    config: ConfigSpace,
    msi: Msi,
    /// Offset of the PCI Express capability.
    express: usize,
    present: bool,
    removal_asked: bool,
}

/// The memory that a port forwards to its bus.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Forwarded {
    /// Below 4 GiB, in units of 1 MiB.
    pub low: Option<Range>,
    /// Prefetchable, anywhere.
    pub prefetchable: Option<Range>,
}

impl RootPort {
    /// A port with an empty slot, which leads to bus `number` and is slot `number`.
    pub fn new(
        routing: Arc<dyn InterruptRouting>,
        number: u8,
        forwarded: Forwarded,
    ) -> Result<Self, Error> {
        let mut config = ConfigSpace::new(Identity {
            // "QEMU PCIe Root port" in the PCI ID database; drivers go by the class.
            vendor: 0x1b36,
            device: 0x000c,
            revision: 0,
            class: 0x06_04_00,
            subsystem_vendor: 0,
            subsystem: 0,
        });
        bridge_header(&mut config, number, forwarded);
        let mut body = [0; EXPRESS_SIZE - 2];
        let mut writable = [0; EXPRESS_SIZE - 2];
        let mut put = |at: usize, value: &[u8], mask: &[u8]| {
            // Offsets count from the capability's start.
            for (bytes, new) in [(&mut body, value), (&mut writable, mask)] {
                for (place, byte) in bytes.iter_mut().skip(at - 2).zip(new) {
                    *place = *byte;
                }
            }
        };
        let flags = EXPRESS_VERSION | EXPRESS_ROOT_PORT | EXPRESS_SLOT_IMPLEMENTED;
        put(0x02, &flags.to_le_bytes(), &[]);
        put(0x04, &EXPRESS_DEVCAP_RBER.to_le_bytes(), &[]);
        put(0x08, &EXPRESS_DEVCTL_DEFAULT.to_le_bytes(), &[0xff, 0x7f]);
        let link = LINK_SPEED_AND_WIDTH | LINK_ACTIVE_REPORTING | u32::from(number) << 24;
        put(LINK_CAPABILITIES, &link.to_le_bytes(), &[]);
        let link = LINK_CONTROL_WRITABLE.to_le_bytes();
        put(LINK_CONTROL, &[0; 2], &link);
        let slot = SLOT_CAPABILITIES_FIXED | u32::from(number) << 19;
        put(SLOT_CAPABILITIES, &slot.to_le_bytes(), &[]);
        put(
            SLOT_CONTROL,
            &(SLOT_POWER_OFF | SLOT_INDICATORS_OFF).to_le_bytes(),
            &SLOT_CONTROL_WRITABLE.to_le_bytes(),
        );
        put(ROOT_CONTROL, &[0; 2], &[0x1f, 0]);
        let express = config.add_capability(CAP_EXPRESS, &body, &writable)?;

        let control = MSI_64_BIT;
        let mut body = [0; 12];
        let mut writable = [0xff; 12];
        for (place, byte) in body.iter_mut().zip(control.to_le_bytes()) {
            *place = byte;
        }
        for (place, byte) in writable.iter_mut().zip(MSI_ENABLE.to_le_bytes()) {
            *place = byte;
        }
        let at = config.add_capability(CAP_MSI, &body, &writable)?;
        let msi = Msi::new(routing, &config, at)?;
        Ok(Self {
            config,
            msi,
            express,
            present: false,
            removal_asked: false,
        })
    }

    /// The bus behind the port, as the guest has numbered it.
    pub fn secondary_bus(&self) -> u8 {
        let [_, secondary] = self.config.u16(PRIMARY_BUS).to_le_bytes();
        secondary
    }

    /// Whether the function in the slot answers.
    pub fn is_on(&self) -> bool {
        self.present && !self.power_is_off()
    }

    /// Whether the guest was asked to let go of the function.
    pub fn removal_asked(&self) -> bool {
        self.removal_asked
    }

    /// What the port interrupts with.
    #[cfg(test)]
    pub(crate) fn interrupt_events(&self) -> Vec<&vmm_sys_util::eventfd::EventFd> {
        self.msi.events()
    }

    fn power_is_off(&self) -> bool {
        self.config.u16(self.express + SLOT_CONTROL) & SLOT_POWER_OFF != 0
    }

    /// A function is in the slot before the guest starts, with its power on.
    pub fn plug_cold(&mut self) {
        let control = self.express + SLOT_CONTROL;
        let on = self.config.u16(control) & !SLOT_POWER_OFF;
        self.config.set(control, &on.to_le_bytes());
        self.present = true;
        self.show(0);
    }

    /// A function was put into the slot.
    pub fn plug(&mut self) {
        self.present = true;
        self.removal_asked = false;
        let link = if self.is_on() { SLOT_LINK_CHANGED } else { 0 };
        self.show(SLOT_PRESENCE_CHANGED | SLOT_BUTTON_PUSHED | link);
    }

    /// Pushes the attention button: the guest is to let go of the function.
    pub fn ask_for_removal(&mut self) {
        self.removal_asked = true;
        self.show(SLOT_BUTTON_PUSHED);
    }

    /// The function is gone.
    pub fn unplug(&mut self) {
        let link = if self.is_on() { SLOT_LINK_CHANGED } else { 0 };
        self.present = false;
        self.removal_asked = false;
        self.show(SLOT_PRESENCE_CHANGED | link);
    }

    /// Shows presence and link, and notes events, which interrupt if they are enabled.
    fn show(&mut self, events: u16) {
        let (link, status) = (self.express + LINK_STATUS, self.express + SLOT_STATUS);
        let active = if self.is_on() {
            LINK_ACTIVE | LINK_STATUS_SPEED_AND_WIDTH
        } else {
            0
        };
        self.config.set(link, &active.to_le_bytes());
        let before = self.config.u16(status);
        let presence = if self.present { SLOT_PRESENT } else { 0 };
        let after = (before & !SLOT_PRESENT) | presence | events;
        self.config.set(status, &after.to_le_bytes());
        // Each event has its enable bit at the place of its status bit, but for the link's.
        let control = self.config.u16(self.express + SLOT_CONTROL);
        let link_enabled = if control & SLOT_LINK_CHANGED_ENABLE != 0 {
            SLOT_LINK_CHANGED
        } else {
            0
        };
        let enabled = (control & (SLOT_BUTTON_PUSHED | SLOT_PRESENCE_CHANGED)) | link_enabled;
        if events & enabled != 0 && control & SLOT_INTERRUPT_ENABLE != 0 {
            for event in self.msi.events() {
                if let Err(error) = event.write(1) {
                    tracing::debug!(%error, "a slot's interrupt is pending already");
                }
            }
        }
    }

    /// Writes configuration registers; says what became of the slot because of it.
    pub fn write(&mut self, offset: usize, data: &[u8]) -> Option<Change> {
        let status = self.express + SLOT_STATUS;
        let was_on = self.is_on();
        let was_off = self.power_is_off();
        self.config.write(offset, data);
        // Events are cleared by writing ones.
        for (at, byte) in (offset..).zip(data) {
            if let Some(shift) = at.checked_sub(status).filter(|byte| *byte < 2) {
                let ones = u16::from(*byte) << (8 * shift);
                let left = self.config.u16(status) & !(ones & SLOT_EVENTS);
                self.config.set(status, &left.to_le_bytes());
            }
        }
        self.msi.update(&self.config);
        if was_on != self.is_on() {
            self.show(SLOT_LINK_CHANGED);
        }
        if self.is_on() && !was_on {
            return Some(Change::On);
        }
        if self.present && self.power_is_off() && !was_off {
            return Some(if self.removal_asked {
                Change::Leave
            } else {
                Change::Off
            });
        }
        None
    }
}

impl PciFunction for RootPort {
    fn config(&self) -> &ConfigSpace {
        &self.config
    }

    fn config_mut(&mut self) -> &mut ConfigSpace {
        &mut self.config
    }

    fn read_bar(&mut self, _: usize, _: u64, _: &mut [u8]) {}

    fn write_bar(&mut self, _: usize, _: u64, _: &[u8]) {}
}

/// Header of type 1 (PCI Express 5.0, 7.5.1.3), with the numbers and windows that firmware would give it.
fn bridge_header(config: &mut ConfigSpace, bus: u8, forwarded: Forwarded) {
    config.set(HEADER_TYPE, &[HEADER_BRIDGE]);
    // Where type 0 has a subsystem's ID, the prefetchable window is.
    config.set(SUBSYSTEM_VENDOR_ID, &[0; 4]);
    config.set(PRIMARY_BUS, &[0, bus, bus]);
    config.set_writable(PRIMARY_BUS, &[0xff; 3]);
    // Base and limit hold address bits 31 to 20; a base above the limit forwards nothing.
    let nothing = Range {
        start: 0xfff0_0000,
        size: 0,
    };
    let registers = |window: Option<Range>| {
        let window = window.unwrap_or(nothing);
        let limit = window.end().saturating_sub(1);
        let half = |address: u64| u16::try_from((address >> 16) & 0xfff0).unwrap_or(0);
        let upper = |address: u64| u32::try_from(address >> 32).unwrap_or(0);
        (
            [half(window.start), half(limit)],
            [upper(window.start), upper(limit)],
        )
    };
    let ([base, limit], _) = registers(forwarded.low);
    config.set(MEMORY_BASE, &base.to_le_bytes());
    config.set(MEMORY_BASE + 2, &limit.to_le_bytes());
    config.set_writable(MEMORY_BASE, &[0xf0, 0xff, 0xf0, 0xff]);
    let ([base, limit], upper) = registers(forwarded.prefetchable);
    for (at, half) in [(0, base), (2, limit)] {
        let value = half | WINDOW_64_BIT;
        config.set(PREFETCHABLE_BASE + at, &value.to_le_bytes());
    }
    config.set_writable(PREFETCHABLE_BASE, &[0xf0, 0xff, 0xf0, 0xff]);
    for (at, upper) in [(4, upper[0]), (8, upper[1])] {
        config.set(PREFETCHABLE_BASE + at, &upper.to_le_bytes());
    }
    config.set_writable(PREFETCHABLE_BASE + 4, &[0xff; 8]);
    config.set_writable(BRIDGE_CONTROL, &BRIDGE_CONTROL_WRITABLE.to_le_bytes());
}

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
//! - Plugging shows as *presence detect changed*, and the attention button is pushed with it: Linux waits for the button where
//!   there is one. The guest's driver then turns the power on.
//! - Removal is asked for by the attention button. The guest's driver lets go of the device (Linux waits five seconds for a
//!   second push, which would cancel it), turns the power off, and the function leaves. From a slot whose power is off it
//!   leaves at once.
//! - Without such a request a function whose power was turned off stays, and answers again when it is turned on.
//!
//! Slot commands take effect at once, so there is no *command completed*. Events interrupt by MSI. What the port forwards is
//! what the guest has set its windows to.

use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::bits::*;
use super::config::{self, ConfigSpace, Identity};
use super::msi::Msi;
use super::msix;
use super::{FunctionKind, FunctionState, InterruptRouting, PciFunction};
use crate::layout::Range;

/// How long a guest may think about a push of the button before it is pushed again.
const REACTION: Duration = Duration::from_secs(15);

/// How long a guest leaves the slot's registers alone when it is done with them.
const QUIET: Duration = Duration::from_secs(1);

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

/// The port.
pub struct RootPort {
    config: ConfigSpace,
    msi: Msi,
    /// Offset of the PCI Express capability.
    express: usize,
    present: bool,
    removal: Option<Removal>,
    /// When the guest has last written to slot control.
    controlled: Option<Instant>,
    /// There is an event that interrupts.
    interrupting: bool,
}

/// The guest was asked to let go of the function.
#[derive(Clone, Copy)]
struct Removal {
    asked: Instant,
    /// The power indicator has blinked since.
    answered: bool,
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
        put(LINK_CAPABILITIES_2, &LINK_SPEEDS.to_le_bytes(), &[]);
        put(LINK_CONTROL_2, &LINK_SPEED.to_le_bytes(), &[0x0f]);
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
            removal: None,
            controlled: None,
            interrupting: false,
        })
    }

    /// The bus behind the port, as the guest has numbered it.
    pub fn secondary_bus(&self) -> u8 {
        let [_, secondary] = self.config.u16(PRIMARY_BUS).to_le_bytes();
        secondary
    }

    /// Whether the function in the slot answers: its link is active.
    pub fn is_on(&self) -> bool {
        let link = self.config.u16(self.express + LINK_CONTROL);
        self.present && !self.power_is_off() && link & LINK_DISABLE == 0
    }

    /// The memory that the port forwards now.
    pub fn forwarded(&self) -> Forwarded {
        if !self.is_on() || self.config.u16(COMMAND) & COMMAND_MEMORY == 0 {
            return Forwarded::default();
        }
        // Base and limit hold address bits from 20 on.
        let lower = |at: usize| u64::from(self.config.u16(at) & 0xfff0) << 16;
        let upper = |at: usize| u64::from(self.config.u32(at)) << 32;
        let window = |base: u64, limit: u64| {
            let size = (limit | 0xf_ffff).checked_sub(base)?.checked_add(1)?;
            Some(Range { start: base, size })
        };
        let (low, high) = (MEMORY_BASE, PREFETCHABLE_BASE);
        Forwarded {
            low: window(lower(low), lower(low + 2)),
            prefetchable: window(
                upper(high + 4) | lower(high),
                upper(high + 8) | lower(high + 2),
            ),
        }
    }

    /// Whether the guest was asked to let go of the function.
    pub fn removal_asked(&self) -> bool {
        self.removal.is_some()
    }

    /// Whether it was asked, and has yet to see that, to react, or is about to do it: another push of the button would cancel
    /// it (PCI Express 5.0, 6.7.1.5). A guest that has decided otherwise, or does not react, may be asked again.
    pub fn removal_is_under_way(&self, now: Instant) -> bool {
        let Some(removal) = self.removal else {
            return false;
        };
        let unseen = self.config.u16(self.express + SLOT_STATUS) & SLOT_BUTTON_PUSHED != 0;
        let thinking = !removal.answered && now.saturating_duration_since(removal.asked) < REACTION;
        unseen || thinking || self.power_indicator_blinks()
    }

    fn power_indicator(&self) -> u16 {
        self.config.u16(self.express + SLOT_CONTROL) & SLOT_POWER_INDICATOR
    }

    fn power_indicator_blinks(&self) -> bool {
        self.power_indicator() == SLOT_POWER_INDICATOR_BLINKS
    }

    /// Whether the slot is empty, and the guest done with what was in it: the power indicator, too, is off then (PCI Express
    /// 5.0, 6.7.1.1.2). A driver that is still about to turn the slot off could take the button for a wish to turn it off again.
    pub fn is_free(&self, now: Instant) -> bool {
        let quiet = |since| now.saturating_duration_since(since) >= QUIET;
        !self.present
            && self.power_is_off()
            && self.power_indicator() == SLOT_POWER_INDICATOR
            && self.controlled.is_none_or(quiet)
    }

    /// Lets the guest be done long ago with what it has written.
    #[cfg(test)]
    pub(crate) fn pass_time(&mut self) {
        self.controlled = None;
    }

    /// What the port interrupts with.
    #[cfg(test)]
    pub(crate) fn interrupt_events(&self) -> Vec<&vmm_sys_util::eventfd::EventFd> {
        self.msi.events()
    }

    /// Whether the bus behind the port is held in reset.
    pub fn holds_reset(&self) -> bool {
        self.config.u16(BRIDGE_CONTROL) & BRIDGE_CONTROL_RESET != 0
    }

    fn power_is_off(&self) -> bool {
        self.config.u16(self.express + SLOT_CONTROL) & SLOT_POWER_OFF != 0
    }

    /// A function is in the slot before the guest starts, with its power on.
    pub fn plug_cold(&mut self) {
        let control = self.express + SLOT_CONTROL;
        let others = self.config.u16(control) & !(SLOT_POWER_OFF | SLOT_POWER_INDICATOR);
        let on = others | SLOT_POWER_INDICATOR_ON;
        self.config.set(control, &on.to_le_bytes());
        self.present = true;
        self.show(0);
    }

    /// A function was put into the slot.
    pub fn plug(&mut self) {
        self.present = true;
        self.removal = None;
        // Where the power is on, the button would ask for removal.
        let how = if self.power_is_off() {
            SLOT_BUTTON_PUSHED
        } else {
            0
        };
        let link = if self.is_on() { SLOT_LINK_CHANGED } else { 0 };
        self.show(SLOT_PRESENCE_CHANGED | how | link);
    }

    /// Pushes the attention button: the guest is to let go of the function. Where the power is off there is nothing to let go of.
    pub fn ask_for_removal(&mut self) {
        self.removal = Some(Removal {
            asked: Instant::now(),
            answered: false,
        });
        if !self.power_is_off() {
            self.show(SLOT_BUTTON_PUSHED);
        }
    }

    /// Whether the function is to leave now: that was asked for, and the guest does not use it.
    pub fn lets_go(&self) -> bool {
        self.present && self.removal.is_some() && self.power_is_off()
    }

    /// The function is gone.
    pub fn unplug(&mut self) {
        let link = if self.is_on() { SLOT_LINK_CHANGED } else { 0 };
        self.present = false;
        self.removal = None;
        self.show(SLOT_PRESENCE_CHANGED | link);
    }

    /// Shows presence and link, and notes events.
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
        self.interrupt();
    }

    /// Sends a message when there is an event that interrupts and was none before (PCI Express 5.0, 6.7.3.4).
    fn interrupt(&mut self) {
        let status = self.config.u16(self.express + SLOT_STATUS);
        let control = self.config.u16(self.express + SLOT_CONTROL);
        // Each event has its enable bit at the place of its status bit, but for the link's.
        let link_enabled = if control & SLOT_LINK_CHANGED_ENABLE != 0 {
            SLOT_LINK_CHANGED
        } else {
            0
        };
        let enabled = (control & (SLOT_BUTTON_PUSHED | SLOT_PRESENCE_CHANGED)) | link_enabled;
        let interrupting = status & enabled != 0
            && control & SLOT_INTERRUPT_ENABLE != 0
            && self.msi.is_enabled(&self.config);
        if interrupting && !self.interrupting {
            for event in self.msi.events() {
                if let Err(error) = event.write(1) {
                    tracing::debug!(%error, "a slot's interrupt is pending already");
                }
            }
        }
        self.interrupting = interrupting;
    }

    /// Writes configuration registers. Returns whether the function in the slot answers elsewhere now, or is to leave.
    pub fn write(&mut self, offset: usize, data: &[u8]) -> bool {
        let status = self.express + SLOT_STATUS;
        let (was_on, forwarded) = (self.is_on(), self.forwarded());
        self.config.write(offset, data);
        // Events are cleared by writing ones.
        for (at, byte) in (offset..).zip(data) {
            if let Some(shift) = at.checked_sub(status).filter(|byte| *byte < 2) {
                let ones = u16::from(*byte) << (8 * shift);
                let left = self.config.u16(status) & !(ones & SLOT_EVENTS);
                self.config.set(status, &left.to_le_bytes());
            }
        }
        let (control, end) = (
            self.express + SLOT_CONTROL,
            offset.saturating_add(data.len()),
        );
        if offset < control + 2 && end > control {
            self.controlled = Some(Instant::now());
        }
        let blinks = self.power_indicator_blinks();
        if let Some(removal) = &mut self.removal {
            removal.answered |= blinks;
        }
        self.msi.update(&self.config);
        let changed = was_on != self.is_on();
        self.show(if changed { SLOT_LINK_CHANGED } else { 0 });
        self.lets_go() || self.forwarded() != forwarded
    }
}

/// A root port's slot in another process.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct PortState {
    /// Events that the guest has not cleared.
    events: u16,
    /// Slot control.
    control: u16,
}

impl PciFunction for RootPort {
    fn suspend(&mut self) -> Result<FunctionState, Box<dyn std::error::Error + Send + Sync>> {
        if self.present {
            return Err(
                "there is a function of the host in its slot: remove it first (device-remove)"
                    .into(),
            );
        }
        let state = PortState {
            events: self.config.u16(self.express + SLOT_STATUS) & SLOT_EVENTS,
            control: self.config.u16(self.express + SLOT_CONTROL),
        };
        Ok(FunctionState {
            config: self.config.registers().to_vec(),
            kind: FunctionKind::Port(state),
        })
    }

    fn restore(
        &mut self,
        state: &FunctionState,
    ) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        let FunctionKind::Port(slot) = state.kind else {
            return Err("it is no root port there".into());
        };
        if !self.config.restore(&state.config) {
            return Err("it is another one there".into());
        }
        let control = slot.control.to_le_bytes();
        self.config.write(self.express + SLOT_CONTROL, &control);
        self.msi.update(&self.config);
        self.show(slot.events & SLOT_EVENTS);
        Ok(())
    }

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
    let command = COMMAND_MEMORY | COMMAND_BUS_MASTER;
    config.set(COMMAND, &command.to_le_bytes());
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pci::msix::tests::FakeKvm;

    #[test]
    fn a_guest_has_time_to_react() {
        let mut port = RootPort::new(Arc::new(FakeKvm::default()), 1, Forwarded::default());
        let port = port.as_mut().unwrap();
        port.plug_cold();
        port.ask_for_removal();
        let soon = Instant::now();
        let later = soon + REACTION;
        // It has not seen the button.
        assert!(port.removal_is_under_way(later));
        let status = port.express + SLOT_STATUS;
        port.write(status, &SLOT_BUTTON_PUSHED.to_le_bytes());
        assert!(port.removal_is_under_way(soon));
        assert!(!port.removal_is_under_way(later));
        let control = port.express + SLOT_CONTROL;
        port.write(control, &SLOT_POWER_INDICATOR_BLINKS.to_le_bytes());
        assert!(port.removal_is_under_way(later));
        // It was cancelled.
        port.write(control, &SLOT_POWER_INDICATOR_ON.to_le_bytes());
        assert!(!port.removal_is_under_way(soon));
        assert!(port.removal_asked());
    }

    #[test]
    fn a_slot_is_free_when_the_guest_is_done_with_it() {
        let mut port = RootPort::new(Arc::new(FakeKvm::default()), 1, Forwarded::default());
        let port = port.as_mut().unwrap();
        assert!(port.is_free(Instant::now()));
        port.plug_cold();
        assert!(!port.is_free(Instant::now()));
        port.unplug();
        let control = port.express + SLOT_CONTROL;
        for unfinished in [
            SLOT_POWER_INDICATOR_ON,
            SLOT_POWER_INDICATOR,
            SLOT_POWER_OFF | SLOT_POWER_INDICATOR_BLINKS,
        ] {
            port.write(control, &unfinished.to_le_bytes());
            assert!(!port.is_free(Instant::now() + QUIET), "{unfinished:#x}");
        }
        // In an access of its own, to the upper byte.
        let [_, upper] = (SLOT_POWER_OFF | SLOT_POWER_INDICATOR).to_le_bytes();
        port.write(control + 1, &[upper]);
        assert!(!port.is_free(Instant::now()));
        assert!(port.is_free(Instant::now() + QUIET));
    }
}

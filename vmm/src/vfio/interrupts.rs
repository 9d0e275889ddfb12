//! How a device's interrupts reach the guest: by its pin, by MSI or by MSI-X, whichever the guest's driver has turned on.
//!
//! ```text
//!                  MSI enabled            MSI-X enabled
//!        ┌──────┐ ◀──────────── ┌─────┐ ────────────▶ ┌───────┐
//!        │ MSI  │               │ pin │               │ MSI-X │
//!        └──────┘ ────────────▶ └─────┘ ◀──────────── └───────┘
//!                   disabled               disabled
//! ```
//!
//! VFIO signals an eventfd for each vector, and KVM takes it as an irqfd: no interrupt passes through this process. A
//! masked vector's eventfd is detached from KVM and keeps its signal (see [`crate::pci::msix`]). The pin is level-triggered:
//! the kernel masks it at each interrupt, and KVM's resample eventfd unmasks it when the guest has dealt with it.

use std::sync::Arc;

use ringside_vfio::device::{self, Irq, PassthroughDevice};
use vmm_sys_util::eventfd::EventFd;

use super::config::VirtualConfig;
use crate::irq::{self, GsiRouter};
use crate::pci::InterruptRouting;
use crate::pci::bits::*;
use crate::pci::msi::Msi;
use crate::pci::msix::{self, Msix, new_event};

/// What interrupts need from KVM, narrow enough to be played by a test.
pub trait Routing: InterruptRouting {
    /// Attaches `event` to a level-triggered pin; `resample` is signalled when the guest has dealt with an interrupt.
    fn attach_level(&self, event: &EventFd, resample: &EventFd, gsi: u32)
    -> Result<(), irq::Error>;
    /// Undoes [`Routing::attach_level`].
    fn detach_level(&self, event: &EventFd, gsi: u32) -> Result<(), irq::Error>;
}

impl Routing for GsiRouter {
    fn attach_level(
        &self,
        event: &EventFd,
        resample: &EventFd,
        gsi: u32,
    ) -> Result<(), irq::Error> {
        self.register_level_irqfd(event, resample, gsi)
    }
    fn detach_level(&self, event: &EventFd, gsi: u32) -> Result<(), irq::Error> {
        self.unregister_irqfd(event, gsi)
    }
}

/// Why interrupts do not work.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// VFIO.
    #[error(transparent)]
    Device(#[from] device::Error),
    /// KVM.
    #[error(transparent)]
    Irq(#[from] irq::Error),
    /// MSI or MSI-X.
    #[error(transparent)]
    Msix(#[from] msix::Error),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    Off,
    Pin,
    /// With so many vectors: the host need not have more than the guest's driver uses.
    Msi(usize),
    Msix,
}

struct Pin {
    event: EventFd,
    resample: EventFd,
    gsi: u32,
}

/// The interrupts of one device.
pub struct Interrupts {
    routing: Arc<dyn Routing>,
    mode: Mode,
    pin: Option<Pin>,
    msi: Option<Msi>,
    msix: Option<Msix>,
}

impl Interrupts {
    /// Whatever the device has, all off.
    pub fn new(
        routing: Arc<dyn Routing>,
        device: &dyn PassthroughDevice,
        config: &VirtualConfig,
    ) -> Result<Self, Error> {
        let kinds = || Arc::clone(&routing) as Arc<dyn InterruptRouting>;
        let msi = config.msi().filter(|_| device.irq_count(Irq::Msi) > 0);
        let msi = msi.map(|at| Msi::new(kinds(), config.space(), at));
        let msix = config.msix().filter(|_| device.irq_count(Irq::Msix) > 0);
        let msix = msix.map(|info| {
            let mut msix = Msix::new(kinds(), info.vectors, info.vectors.into())?;
            for vector in 0..info.vectors {
                msix.assign(vector.into(), Some(vector));
            }
            Ok::<_, msix::Error>(msix)
        });
        Ok(Self {
            msi: msi.transpose()?,
            msix: msix.transpose()?,
            routing,
            mode: Mode::Off,
            pin: None,
        })
    }

    /// The device is on the bus: its pin, if it has one, leads to `gsi`.
    pub fn connect_pin(&mut self, gsi: u32) -> Result<(), Error> {
        let event = || new_event().map_err(msix::Error::Event);
        self.pin = Some(Pin {
            event: event()?,
            resample: event()?,
            gsi,
        });
        Ok(())
    }

    /// MSI-X, if the device has it.
    pub fn msix(&self) -> Option<&Msix> {
        self.msix.as_ref()
    }

    /// The same, to write its table.
    pub fn msix_mut(&mut self) -> Option<&mut Msix> {
        self.msix.as_mut()
    }

    /// MSI, if the device has it.
    pub fn msi(&self) -> Option<&Msi> {
        self.msi.as_ref()
    }

    /// To be called when the guest may have written the registers that interrupts depend on.
    pub fn update(
        &mut self,
        device: &dyn PassthroughDevice,
        config: &VirtualConfig,
    ) -> Result<(), Error> {
        let space = config.space();
        let msix_control = config
            .msix()
            .map_or(0, |info| space.u16(info.capability + 2));
        // Software must not enable both (PCI Express 5.0, 7.7.1 and 7.7.2); if it does, MSI-X has precedence here.
        let msi = self.msi.as_ref().filter(|msi| msi.is_enabled(space));
        let wanted = if self.msix.is_some() && msix_control & MSIX_ENABLE != 0 {
            Mode::Msix
        } else if let Some(msi) = msi {
            Mode::Msi(msi.enabled_vectors(space))
        } else if self.pin.is_some() {
            Mode::Pin
        } else {
            Mode::Off
        };
        if self.mode != wanted {
            self.stop(device);
            self.start(wanted, device)?;
        }
        if let Some(msix) = &mut self.msix {
            msix.set_control(if wanted == Mode::Msix {
                msix_control
            } else {
                0
            });
        }
        if let Some(msi) = &mut self.msi {
            msi.update(space);
        }
        Ok(())
    }

    fn start(&mut self, mode: Mode, device: &dyn PassthroughDevice) -> Result<(), Error> {
        match mode {
            Mode::Off => {}
            Mode::Pin => {
                if let Some(pin) = &self.pin {
                    self.routing
                        .attach_level(&pin.event, &pin.resample, pin.gsi)?;
                    let started = device
                        .enable_irq(Irq::Intx, &[&pin.event])
                        .and_then(|()| device.unmask_intx_by(&pin.resample));
                    if let Err(error) = started {
                        // It may be on without a way to unmask it, and would keep MSI and MSI-X off.
                        if let Err(error) = device.disable_irq(Irq::Intx) {
                            tracing::debug!(%error, "the pin was not on");
                        }
                        let detached = self.routing.detach_level(&pin.event, pin.gsi);
                        // It fails where the host shares the line and the device cannot mask itself. It would again.
                        self.pin = None;
                        detached?;
                        return Err(error.into());
                    }
                }
            }
            Mode::Msi(vectors) => {
                if let Some(msi) = &self.msi {
                    let events: Vec<_> = msi.events().into_iter().take(vectors).collect();
                    device.enable_irq(Irq::Msi, &events)?;
                }
            }
            Mode::Msix => {
                if let Some(msix) = &self.msix {
                    device.enable_irq(Irq::Msix, &msix.events())?;
                }
            }
        }
        self.mode = mode;
        Ok(())
    }

    /// Turns off what is on. What the device signals later reaches nobody.
    pub fn stop(&mut self, device: &dyn PassthroughDevice) {
        let irq = match self.mode {
            Mode::Off => return,
            Mode::Pin => Irq::Intx,
            Mode::Msi(_) => Irq::Msi,
            Mode::Msix => Irq::Msix,
        };
        if let Err(error) = device.disable_irq(irq) {
            tracing::debug!(%error, "interrupts stay on");
        }
        if let (Mode::Pin, Some(pin)) = (self.mode, &self.pin)
            && let Err(error) = self.routing.detach_level(&pin.event, pin.gsi)
        {
            tracing::debug!(%error, "a pin stays attached");
        }
        self.mode = Mode::Off;
    }
}

//! PCI Express: a host bridge with its configuration mechanisms, root ports with hot-plug slots, what a
//! function must implement to sit on a bus, and message-signalled interrupts.
//!
//! | module | concern |
//! | --- | --- |
//! | [`bits`] | numbers of the specifications |
//! | [`config`] | one function's configuration space |
//! | [`host`] | bus 0 and those behind its ports: configuration accesses, placing of BARs |
//! | [`port`] | a root port with a slot |
//! | [`msix`] | message-signalled interrupts |
//! | [`msi`] | their older form, in configuration space |

pub mod bits;
pub mod config;
pub mod host;
pub mod msi;
pub mod msix;
pub mod port;

use std::error::Error;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use self::msix::MsixState;
use self::port::PortState;
use crate::snapshot::dirty::DirtyLog;
use crate::virtio::Suspended;
use crate::virtio::common::Negotiation;

pub use config::ConfigSpace;
pub use host::{PciRoot, PortId, SharedFunction, SharedRoot, Windows};
pub use msix::InterruptRouting;

/// A function as it was in another process.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct FunctionState {
    /// All registers of its configuration space.
    pub config: Vec<u8>,
    /// The rest of it.
    pub kind: FunctionKind,
}

/// What there is of a function besides its configuration space.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub enum FunctionKind {
    /// Nothing.
    Plain,
    /// A root port's slot.
    Port(PortState),
    /// A virtio device.
    Virtio(VirtioState),
}

/// A virtio device as it was in another process.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct VirtioState {
    /// What the driver wrote.
    pub negotiation: Negotiation,
    /// What it was told: the configuration's generation, status bits, and interrupt status.
    pub told: [u8; 3],
    /// Its interrupts.
    pub msix: MsixState,
    /// Its queues, and what is behind them.
    pub device: Suspended,
}

/// A function on the bus.
///
/// The host bridge calls [`PciFunction::bar_moved`] whenever the address changes that the function
/// is to answer at; registering that range on the MMIO bus is the host bridge's work.
pub trait PciFunction: Send {
    /// Its configuration space, as far as BARs and the command register go.
    fn config(&self) -> &ConfigSpace;
    /// The same, for placing BARs.
    fn config_mut(&mut self) -> &mut ConfigSpace;

    /// Reads configuration registers.
    fn read_config(&mut self, offset: usize, data: &mut [u8]) {
        self.config().read(offset, data);
    }

    /// Writes configuration registers.
    fn write_config(&mut self, offset: usize, data: &[u8]) {
        self.config_mut().write(offset, data);
    }

    /// Resets the function: its bus was reset, or its power turned on.
    fn reset(&mut self) {}

    /// Reads inside a BAR.
    fn read_bar(&mut self, bar: usize, offset: u64, data: &mut [u8]);

    /// Writes inside a BAR.
    fn write_bar(&mut self, bar: usize, offset: u64, data: &[u8]);

    /// Stops for a while, and tells what is needed to go on elsewhere. When it returns, guest memory is no longer touched.
    fn suspend(&mut self) -> Result<FunctionState, Box<dyn Error + Send + Sync>> {
        Ok(FunctionState {
            config: self.config().registers().to_vec(),
            kind: FunctionKind::Plain,
        })
    }

    /// Goes on after [`PciFunction::suspend`], whether or not that was possible.
    fn resume(&mut self) {}

    /// From now on notes in `log` which pages of guest memory it writes; without one, no longer.
    fn track(&mut self, log: Option<&Arc<DirtyLog>>) -> Result<(), Box<dyn Error + Send + Sync>> {
        let _ = log;
        Ok(())
    }

    /// Takes over the state of the same function elsewhere, and is suspended as that one.
    fn restore(&mut self, state: &FunctionState) -> Result<(), Box<dyn Error + Send + Sync>> {
        if self.config_mut().restore(&state.config) {
            Ok(())
        } else {
            Err("it is another one there".into())
        }
    }

    /// The function was put on a bus; its pins A to D lead to these GSIs.
    fn plugged(&mut self, intx_gsis: [u32; 4]) {
        let _ = intx_gsis;
    }

    /// The BAR is now at another address, or nowhere.
    fn bar_moved(&mut self, bar: usize, from: Option<u64>, to: Option<u64>) {
        let _ = (bar, from, to);
    }
}

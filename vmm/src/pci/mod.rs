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

pub use config::ConfigSpace;
pub use host::{PciRoot, PortId, SharedFunction, SharedRoot, Windows};
pub use msix::InterruptRouting;

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

    /// The function was put on a bus; its pins A to D lead to these GSIs.
    fn plugged(&mut self, intx_gsis: [u32; 4]) {
        let _ = intx_gsis;
    }

    /// The BAR is now at another address, or nowhere.
    fn bar_moved(&mut self, bar: usize, from: Option<u64>, to: Option<u64>) {
        let _ = (bar, from, to);
    }
}

//! The guest's passed-through functions: opened, with their DMA in one address space.

use std::sync::Arc;

use ringside_vfio::device::{AddressSpace, Interface};
use ringside_vfio::host::Host;
use vfio_ioctls::VfioDeviceFd;

use super::{Error, VfioPci};
use crate::config::{VfioConfig, VfioInterface};
use crate::machine::Resources;

/// Opens functions for one guest.
pub struct Passthrough {
    space: Arc<AddressSpace>,
    resources: Resources,
}

impl Passthrough {
    /// An address space with the guest's RAM.
    pub fn new(resources: &Resources, interface: VfioInterface) -> Result<Self, Error> {
        let interface = match interface {
            VfioInterface::Auto => Interface::Auto,
            VfioInterface::Group => Interface::Group,
            VfioInterface::Iommufd => Interface::Iommufd,
        };
        let kvm = VfioDeviceFd::new_from_kvm(resources.vm.create_vfio_device()?);
        let memory = resources.memory.current();
        let space = AddressSpace::new(interface, memory, Some(Arc::new(kvm)))?;
        Ok(Self {
            space: Arc::new(space),
            resources: resources.clone(),
        })
    }

    /// Opens a function and prepares it for the bus.
    pub fn open(&self, config: &VfioConfig) -> Result<VfioPci, Error> {
        let device = self
            .space
            .open(&Host::new("/"), config.host, config.token.as_ref())?;
        let routing = Arc::clone(&self.resources.router);
        VfioPci::new(device, routing, Arc::clone(&self.resources.vm) as _)
    }
}

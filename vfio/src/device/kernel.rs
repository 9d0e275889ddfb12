//! A device as the kernel gives it, through vfio-ioctls.
#![allow(
    unsafe_code,
    reason = "the device is dropped by hand, at the right moment"
)]

use std::io;
use std::mem::ManuallyDrop;
use std::sync::Arc;

use nix::libc::off_t;
use nix::sys::uio::{pread, pwrite};
use vfio_bindings::bindings::vfio::VFIO_REGION_INFO_FLAG_MMAP;
use vfio_ioctls::{VfioDevice, VfioRegionInfoCap};
use vmm_sys_util::eventfd::EventFd;

use super::address_space::AddressSpace;
use super::error::Error;
use super::mapping::Mapping;
use super::name::DeviceName;
use super::sys::{self, borrow};
use super::{Area, Irq, PassthroughDevice, Region, RegionInfo, ResetBy};
use crate::address::PciAddress;

/// Methods that reset a function alone and completely (sysfs, `reset_method`).
const FUNCTION_METHODS: [&str; 4] = ["flr", "af_flr", "device_specific", "acpi"];
/// Mappings are in whole pages.
const PAGE: u64 = 4096;

/// What is asked of the kernel about a device, once.
pub(super) struct Identity {
    /// Where it is on the host.
    pub(super) address: PciAddress,
    /// Its IOMMU group.
    pub(super) group: u32,
    /// How the kernel can reset it, in the order in which it tries.
    pub(super) reset_methods: Vec<String>,
    /// What the kernel was told; vfio-ioctls looks at it once more when the device is dropped.
    pub(super) _name: DeviceName,
}

/// An open device.
pub(super) struct KernelDevice {
    device: ManuallyDrop<VfioDevice>,
    identity: Identity,
    space: Arc<AddressSpace>,
}

impl KernelDevice {
    pub(super) fn new(device: VfioDevice, identity: Identity, space: Arc<AddressSpace>) -> Self {
        Self {
            device: ManuallyDrop::new(device),
            identity,
            space,
        }
    }

    /// Where in the device's file an access to a region goes.
    fn position(&self, region: Region, offset: u64, length: usize) -> io::Result<off_t> {
        let index = region.index();
        let end = u64::try_from(length)
            .ok()
            .and_then(|length| offset.checked_add(length));
        if end.is_none_or(|end| end > self.device.get_region_size(index)) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let position = self.device.get_region_offset(index).checked_add(offset);
        position
            .and_then(|position| off_t::try_from(position).ok())
            .ok_or(io::ErrorKind::InvalidInput.into())
    }

    fn irq_error(&self, irq: Irq) -> impl FnOnce(io::Error) -> Error {
        let address = self.identity.address;
        move |source| Error::Irq {
            address,
            irq,
            source,
        }
    }

    fn has_method(&self, names: &[&str]) -> bool {
        let methods = &self.identity.reset_methods;
        methods
            .iter()
            .any(|method| names.contains(&method.as_str()))
    }

    fn reset_bus(&self) -> io::Result<()> {
        // The guest runs the others.
        if self.space.has_neighbour_of(self.identity.address) {
            return Err(io::ErrorKind::ResourceBusy.into());
        }
        let group = if self.space.is_iommufd() {
            None
        } else {
            let path = format!("/dev/vfio/{}", self.identity.group);
            Some(sys::find_open(&path)?)
        };
        sys::reset_bus(&*self.device, group)
    }
}

/// Whether all of a transfer was done.
fn complete(done: usize, wanted: usize) -> io::Result<()> {
    if done == wanted {
        Ok(())
    } else {
        Err(io::ErrorKind::UnexpectedEof.into())
    }
}

impl PassthroughDevice for KernelDevice {
    fn address(&self) -> PciAddress {
        self.identity.address
    }

    fn region(&self, region: Region) -> RegionInfo {
        let index = region.index();
        let size = self.device.get_region_size(index);
        let mappable = if self.device.get_region_flags(index) & VFIO_REGION_INFO_FLAG_MMAP == 0 {
            Vec::new()
        } else {
            let sparse = self
                .device
                .get_region_caps(index)
                .into_iter()
                .find_map(|cap| {
                    let VfioRegionInfoCap::SparseMmap(cap) = cap else {
                        return None;
                    };
                    let areas = cap.areas.iter().map(|area| Area {
                        offset: area.offset,
                        size: area.size,
                    });
                    Some(areas.collect())
                });
            // The kernel lets a BAR that is smaller than a page be mapped only if the page has nothing else in it.
            let size = size.next_multiple_of(PAGE);
            sparse.unwrap_or_else(|| vec![Area { offset: 0, size }])
        };
        RegionInfo { size, mappable }
    }

    fn read(&self, region: Region, offset: u64, data: &mut [u8]) -> io::Result<()> {
        let position = self.position(region, offset, data.len())?;
        complete(pread(borrow(&*self.device), data, position)?, data.len())
    }

    fn write(&self, region: Region, offset: u64, data: &[u8]) -> io::Result<()> {
        let position = self.position(region, offset, data.len())?;
        complete(pwrite(borrow(&*self.device), data, position)?, data.len())
    }

    fn map(&self, region: Region, area: Area) -> io::Result<Arc<Mapping>> {
        let offset = self.device.get_region_offset(region.index());
        let offset = offset
            .checked_add(area.offset)
            .ok_or(io::ErrorKind::InvalidInput)?;
        Ok(Arc::new(Mapping::new(
            borrow(&*self.device),
            offset,
            area.size,
        )?))
    }

    fn irq_count(&self, irq: Irq) -> u32 {
        let info = self.device.get_irq_info(irq.index());
        info.map_or(0, |info| info.count)
    }

    fn enable_irq(&self, irq: Irq, events: &[&EventFd]) -> Result<(), Error> {
        sys::enable_irqs(&*self.device, irq.index(), events).map_err(self.irq_error(irq))
    }

    fn disable_irq(&self, irq: Irq) -> Result<(), Error> {
        self.device
            .disable_irq(irq.index())
            .map_err(io::Error::other)
            .map_err(self.irq_error(irq))
    }

    fn unmask_intx_by(&self, event: &EventFd) -> Result<(), Error> {
        self.device
            .set_irq_resample_fd(Irq::Intx.index(), vec![event])
            .map_err(io::Error::other)
            .map_err(self.irq_error(Irq::Intx))
    }

    fn reset(&self) -> Result<ResetBy, Error> {
        let function = || sys::reset_function(&*self.device);
        // A kernel before 5.15 does not list its methods; it tries them in the same order.
        let alone = self.identity.reset_methods.is_empty() || self.has_method(&FUNCTION_METHODS);
        if alone && function().is_ok() {
            return Ok(ResetBy::Function);
        }
        let error = match self.reset_bus() {
            Ok(()) => return Ok(ResetBy::Bus),
            Err(error) => error,
        };
        let address = self.identity.address;
        tracing::debug!(%address, %error, "not reset with its bus");
        // A bus reset by the kernel's own choice may be among the methods left.
        if self.has_method(&["pm", "bus", "cxl_bus"]) && function().is_ok() {
            let by_power = self.has_method(&["pm"]);
            return Ok(if by_power {
                ResetBy::PowerManagement
            } else {
                ResetBy::Bus
            });
        }
        Err(Error::Reset {
            address,
            source: error,
        })
    }
}

impl Drop for KernelDevice {
    fn drop(&mut self) {
        match self.reset() {
            Ok(_) => {}
            // The kernel holds it, to take it from its driver; whoever opens it next resets it.
            Err(Error::Reset { source, .. }) if source.kind() == io::ErrorKind::WouldBlock => {
                tracing::debug!(address = %self.identity.address, "a device is given back without a reset");
            }
            Err(error) => {
                let error = &error as &dyn std::error::Error;
                tracing::warn!(error, "a device keeps what its guest left in it");
            }
        }
        let device = &mut self.device;
        self.space.leave(self.identity.address, || {
            // SAFETY: it is dropped here and only here, and not used after.
            unsafe { ManuallyDrop::drop(device) };
        });
    }
}

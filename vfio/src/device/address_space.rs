//! What the devices of a guest reach by DMA: guest-physical addresses, translated by the IOMMU to the pages that are the
//! guest's memory, and nothing else.
//!
//! One address space serves all devices of a guest. Memory is mapped while there are devices: with the first one
//! opened, before anything runs that could use it, in one mapping for each region of guest memory; memory that is added later
//! is mapped when it comes; all of it is unmapped after the last device was closed.

use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use iommufd_ioctls::{IommuFd, IommufdError};
use nix::libc;
use nix::sys::resource::{Resource, getrlimit};
use uuid::Uuid;
use vfio_ioctls::{VfioContainer, VfioDevice, VfioDeviceFd, VfioError, VfioIommufd, VfioOps};
use vm_memory::{GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap};

use super::PassthroughDevice;
use super::error::Error;
use super::kernel::{Identity, KernelDevice};
use super::name::DeviceName;
use crate::address::PciAddress;
use crate::host::Host;
use crate::ids::PciIds;
use crate::inventory::{Inventory, PciDevice, Role};
use crate::viability::judge;

/// The container's device file.
const CONTAINER: &str = "/dev/vfio/vfio";
/// iommufd's device file.
const IOMMUFD: &str = "/dev/iommu";

/// Which of the kernel's interfaces is used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Interface {
    /// iommufd where the kernel has it for this device, else groups.
    #[default]
    Auto,
    /// A group in a container with a type 1 IOMMU.
    Group,
    /// A device file of its own (cdev), and iommufd.
    Iommufd,
}

/// The DMA address space of one guest.
pub struct AddressSpace {
    operations: Arc<dyn VfioOps>,
    iommufd: bool,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// Those that are open.
    devices: Vec<PciAddress>,
    memory: Vec<GuestMemoryMmap>,
}

impl AddressSpace {
    /// An address space with `memory` in it, for the devices that will be opened. `kvm` is KVM's own VFIO device, which
    /// lets KVM know of them.
    ///
    /// # Errors
    /// [`Error::Vfio`] if the interface is not there or not permitted.
    pub fn new(
        interface: Interface,
        memory: GuestMemoryMmap,
        kvm: Option<Arc<VfioDeviceFd>>,
    ) -> Result<Self, Error> {
        let has_iommufd = Path::new(IOMMUFD).exists() && Path::new("/dev/vfio/devices").exists();
        let iommufd = match interface {
            Interface::Auto => has_iommufd,
            Interface::Group => false,
            Interface::Iommufd => true,
        };
        let operations: Arc<dyn VfioOps> = if iommufd {
            let fd = IommuFd::new().map_err(|error| match error {
                IommufdError::OpenIommufd(source) => vfio_error(IOMMUFD, source),
                other => vfio_error(IOMMUFD, io::Error::other(other)),
            })?;
            let space = VfioIommufd::new(Arc::new(fd), None, kvm);
            Arc::new(space.map_err(|error| vfio_error(IOMMUFD, io::Error::other(error)))?)
        } else {
            let container = VfioContainer::new(kvm).map_err(|error| match error {
                VfioError::OpenContainer(source) => vfio_error(CONTAINER, source),
                other => vfio_error(CONTAINER, io::Error::other(other)),
            })?;
            Arc::new(container)
        };
        let state = State {
            devices: Vec::new(),
            memory: vec![memory],
        };
        Ok(Self {
            operations,
            iommufd,
            state: Mutex::new(state),
        })
    }

    /// Whether it is iommufd's.
    #[must_use]
    pub fn is_iommufd(&self) -> bool {
        self.iommufd
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Opens a device, resets it, and lets it reach the address space. It leaves, reset, when it is dropped.
    ///
    /// # Errors
    /// What forbids it ([`Error::Obstacles`], [`Error::NotBound`], [`Error::InUse`], …), or that it cannot be reset.
    pub fn open(
        self: &Arc<Self>,
        host: &Host,
        address: PciAddress,
        token: Option<&Uuid>,
    ) -> Result<Box<dyn PassthroughDevice>, Error> {
        let inventory = Inventory::read(host, &PciIds::default())?;
        let device = inventory.device(address)?;
        let group = check(device, &inventory)?;
        let name = DeviceName::new(address, group, token).map_err(Error::Name)?;
        let sysfs = host.path(format!("sys/bus/pci/devices/{address}"));
        let path = if self.iommufd { &sysfs } else { name.path() };

        // Held to the end: the first device sets up the IOMMU, and the last one takes it down.
        let mut state = self.state();
        let opened = VfioDevice::new(path, Arc::clone(&self.operations), true)
            .map_err(|error| open_error(error, device, group, token))?;
        if state.devices.is_empty() {
            map(self.operations.as_ref(), &state.memory)?;
        }
        state.devices.push(address);
        drop(state);
        let identity = Identity {
            address,
            group,
            reset_methods: device.reset.methods.clone(),
            _name: name,
        };
        let device = KernelDevice::new(opened, identity, Arc::clone(self));
        match device.reset() {
            Ok(by) => tracing::debug!(%address, group, ?by, "device opened and reset"),
            // It went through the reset of its bus when the first of them was opened.
            Err(error) if self.has_neighbour_of(address) => {
                tracing::debug!(%address, %error, "device opened");
            }
            Err(error) => return Err(error),
        }
        Ok(Box::new(device))
    }

    /// Adds memory to a guest that runs.
    ///
    /// # Errors
    /// [`Error::LockedMemory`], [`Error::Mappings`], [`Error::Map`].
    pub fn add(&self, memory: GuestMemoryMmap) -> Result<(), Error> {
        let mut state = self.state();
        if !state.devices.is_empty() {
            map(self.operations.as_ref(), std::slice::from_ref(&memory))?;
        }
        state.memory.push(memory);
        Ok(())
    }

    /// Takes back memory that was added, before the guest could tell a device of it.
    pub fn remove(&self, memory: &GuestMemoryMmap) {
        let mut state = self.state();
        let Some(index) = state.memory.iter().position(|m| same(m, memory)) else {
            return;
        };
        let memory = state.memory.swap_remove(index);
        if !state.devices.is_empty() {
            unmap(self.operations.as_ref(), &memory);
        }
    }

    /// Whether another function of the same bus is open, which a reset of the bus would reset, too.
    pub(super) fn has_neighbour_of(&self, address: PciAddress) -> bool {
        let state = self.state();
        let mut others = state.devices.iter().filter(|other| **other != address);
        others.any(|other| other.shares_bus(&address))
    }

    /// A device is about to be closed by `close`.
    pub(super) fn leave(&self, address: PciAddress, close: impl FnOnce()) {
        let mut state = self.state();
        state.devices.retain(|device| *device != address);
        if state.devices.is_empty() {
            for memory in &state.memory {
                unmap(self.operations.as_ref(), memory);
            }
        }
        close();
    }
}

fn vfio_error(path: &str, source: io::Error) -> Error {
    Error::Vfio {
        path: path.into(),
        source,
    }
}

/// Whether a guest can have a device now, as far as sysfs tells.
///
/// # Errors
/// What forbids it: [`Error::Inventory`], [`Error::Physical`], [`Error::Obstacles`], [`Error::NotBound`].
pub fn assignable(host: &Host, address: PciAddress) -> Result<(), Error> {
    let inventory = Inventory::read(host, &PciIds::default())?;
    check(inventory.device(address)?, &inventory).map(drop)
}

/// The same; gives the device's group.
fn check(device: &PciDevice, inventory: &Inventory) -> Result<u32, Error> {
    let address = device.address;
    let viability = judge(device, inventory);
    if let (Role::Pf { .. }, Some(driver), false) = (&device.role, &device.driver, viability.bound)
    {
        return Err(Error::Physical {
            address,
            driver: driver.clone(),
        });
    }
    let (true, Some(group)) = (viability.viable, &device.iommu_group) else {
        return Err(Error::Obstacles {
            address,
            obstacles: viability.obstacles,
        });
    };
    if !viability.bound {
        return Err(Error::NotBound {
            address,
            driver: device.driver.clone(),
        });
    }
    Ok(group.id)
}

fn open_error(error: VfioError, device: &PciDevice, group: u32, token: Option<&Uuid>) -> Error {
    let address = device.address;
    let path = format!("/dev/vfio/{group}").into();
    match &error {
        VfioError::OpenGroup(source, _) | VfioError::OpenDeviceCdev(source) => {
            match source.raw_os_error() {
                Some(libc::EACCES | libc::EPERM) => Error::Permission { address, path },
                Some(libc::EBUSY) => Error::InUse { address, path },
                _ => Error::Open {
                    address,
                    source: error,
                },
            }
        }
        VfioError::ContainerSetIOMMU(source) if source.errno() == libc::EPERM => {
            Error::UnsafeInterrupts
        }
        // Since Linux 6.17.
        VfioError::VfioDeviceBindIommufd(source) if source.errno() == libc::EACCES => {
            Error::TokenByGroup { address }
        }
        VfioError::GroupGetDeviceFD(source) => match (source.errno(), token) {
            (libc::EBUSY, _) => Error::InUse { address, path },
            (libc::EACCES, _) => Error::Token { address },
            (libc::EINVAL, Some(_)) => Error::NoToken { address },
            _ => Error::Open {
                address,
                source: error,
            },
        },
        _ => Error::Open {
            address,
            source: error,
        },
    }
}

/// Maps each region of guest memory at its guest-physical address: all of them or, if that fails, none.
#[allow(
    unsafe_code,
    reason = "a device may write to mapped memory at any time"
)]
fn map(operations: &dyn VfioOps, memory: &[GuestMemoryMmap]) -> Result<(), Error> {
    let regions = || memory.iter().flat_map(GuestMemoryMmap::iter);
    for (done, region) in regions().enumerate() {
        let (address, size) = (region.start_addr().0, region.len());
        let length = usize::try_from(size).unwrap_or(usize::MAX);
        // SAFETY: guest memory is accessed by volatile and atomic operations only, and `State` holds it until it is unmapped
        // or the container is gone.
        let mapped = unsafe { operations.vfio_dma_map(address, length, region.as_ptr()) };
        if let Err(source) = mapped {
            for region in regions().take(done) {
                unmap_region(operations, region);
            }
            return Err(map_error(source, address, size));
        }
    }
    Ok(())
}

fn map_error(source: VfioError, address: u64, size: u64) -> Error {
    let errno = match &source {
        VfioError::IommuDmaMap(error)
        | VfioError::IommufdIoctlError(IommufdError::IommuIoasMap(error)) => error.errno(),
        _ => 0,
    };
    match errno {
        libc::ENOMEM => Error::LockedMemory {
            size,
            limit: getrlimit(Resource::RLIMIT_MEMLOCK).map_or(0, |(soft, _)| soft),
        },
        libc::ENOSPC => Error::Mappings,
        _ => Error::Map {
            address,
            size,
            source,
        },
    }
}

/// Whether both are the same regions of guest memory.
fn same(one: &GuestMemoryMmap, other: &GuestMemoryMmap) -> bool {
    let place = |memory: &GuestMemoryMmap| -> Vec<_> {
        let regions = memory.iter();
        regions.map(|r| (r.start_addr(), r.len())).collect()
    };
    place(one) == place(other)
}

fn unmap(operations: &dyn VfioOps, memory: &GuestMemoryMmap) {
    for region in memory.iter() {
        unmap_region(operations, region);
    }
}

fn unmap_region(operations: &dyn VfioOps, region: &GuestRegionMmap) {
    let length = usize::try_from(region.len()).unwrap_or(usize::MAX);
    if let Err(error) = operations.vfio_dma_unmap(region.start_addr().0, length) {
        // The kernel does it when the container is closed.
        tracing::warn!(%error, "guest memory stays mapped for DMA");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::GuestAddress;
    use vmm_sys_util::errno;

    /// Plays the IOMMU: notes what is mapped.
    #[derive(Default)]
    struct Iommu {
        mapped: Mutex<Vec<(u64, usize)>>,
        /// From which address on it refuses, and how.
        refuse: Option<(u64, i32)>,
    }

    impl VfioOps for Iommu {
        #[allow(unsafe_code, reason = "the trait's")]
        unsafe fn vfio_dma_map(&self, iova: u64, size: usize, _: *mut u8) -> Result<(), VfioError> {
            if let Some((from, errno)) = self.refuse
                && iova >= from
            {
                return Err(VfioError::IommuDmaMap(errno::Error::new(errno)));
            }
            self.mapped.lock().unwrap().push((iova, size));
            Ok(())
        }
        fn vfio_dma_unmap(&self, iova: u64, size: usize) -> Result<(), VfioError> {
            self.mapped
                .lock()
                .unwrap()
                .retain(|mapped| *mapped != (iova, size));
            Ok(())
        }
    }

    fn memory(ranges: &[(u64, usize)]) -> GuestMemoryMmap {
        let ranges: Vec<_> = ranges.iter().map(|(a, s)| (GuestAddress(*a), *s)).collect();
        GuestMemoryMmap::from_ranges(&ranges).unwrap()
    }

    const FUNCTION: &str = "0000:01:10.0";

    fn address(text: &str) -> PciAddress {
        text.parse().unwrap()
    }

    /// With one open function.
    fn space(iommu: &Arc<Iommu>) -> AddressSpace {
        AddressSpace {
            operations: Arc::clone(iommu) as Arc<dyn VfioOps>,
            iommufd: false,
            state: Mutex::new(State {
                devices: vec![address(FUNCTION)],
                memory: vec![],
            }),
        }
    }

    fn device() -> PciDevice {
        let host = tempfile::tempdir().unwrap();
        let sysfs = host.path().join("sys/bus/pci/devices/0000:01:10.0");
        std::fs::create_dir_all(&sysfs).unwrap();
        for (name, text) in [
            ("vendor", "0x8086"),
            ("device", "0x10ca"),
            ("class", "0x020000"),
        ] {
            std::fs::write(sysfs.join(name), text).unwrap();
        }
        let inventory = Inventory::read(&Host::new(host.path()), &PciIds::default()).unwrap();
        inventory.devices().next().unwrap().clone()
    }

    #[test]
    fn memory_that_comes_later_is_mapped_while_there_are_devices() {
        let iommu = Arc::new(Iommu::default());
        let space = space(&iommu);
        space
            .add(memory(&[(0, 1 << 20), (1 << 32, 2 << 20)]))
            .unwrap();
        assert_eq!(
            *iommu.mapped.lock().unwrap(),
            [(0, 1 << 20), (1 << 32, 2 << 20)],
            "one mapping for each region"
        );
        let mut closed = false;
        space.leave(address(FUNCTION), || {
            closed = true;
            assert!(iommu.mapped.lock().unwrap().is_empty(), "unmapped first");
        });
        assert!(closed);
        space.add(memory(&[(1 << 33, 4096)])).unwrap();
        assert!(
            iommu.mapped.lock().unwrap().is_empty(),
            "no device, no mapping"
        );
    }

    #[test]
    fn memory_is_mapped_as_a_whole_or_not_at_all() {
        let iommu = Arc::new(Iommu {
            refuse: Some((1 << 32, libc::ENOMEM)),
            ..Iommu::default()
        });
        let space = space(&iommu);
        let memory = memory(&[(0, 1 << 20), (1 << 20, 4096), (1 << 32, 2 << 20)]);
        assert!(space.add(memory).is_err());
        assert!(iommu.mapped.lock().unwrap().is_empty());
        assert!(space.state().memory.is_empty());
    }

    #[test]
    fn memory_that_was_added_can_be_taken_back() {
        let iommu = Arc::new(Iommu::default());
        let space = space(&iommu);
        let added = memory(&[(1 << 32, 2 << 20)]);
        space.add(memory(&[(0, 1 << 20)])).unwrap();
        space.add(added.clone()).unwrap();
        space.remove(&added);
        assert_eq!(*iommu.mapped.lock().unwrap(), [(0, 1 << 20)]);
        space.remove(&added);
        space.remove(&memory(&[(0, 4096)]));
        assert_eq!(iommu.mapped.lock().unwrap().len(), 1, "nothing else goes");
        // The place is free again.
        space.add(added).unwrap();
        assert_eq!(iommu.mapped.lock().unwrap().len(), 2);
    }

    #[test]
    fn functions_that_a_bus_reset_would_hit_are_known() {
        let space = space(&Arc::new(Iommu::default()));
        assert!(space.has_neighbour_of(address("0000:01:00.0")));
        assert!(!space.has_neighbour_of(address("0000:02:00.0")));
        assert!(!space.has_neighbour_of(address(FUNCTION)), "itself");
    }

    #[test]
    fn the_kernels_refusals_say_what_to_raise() {
        for (errno, text) in [
            (libc::ENOMEM, "ulimit -l"),
            (libc::ENOSPC, "dma_entry_limit"),
            (libc::EEXIST, "at 0x100000"),
        ] {
            let iommu = Arc::new(Iommu {
                refuse: Some((0, errno)),
                ..Iommu::default()
            });
            let error = space(&iommu).add(memory(&[(1 << 20, 4096)]));
            let error = error.unwrap_err().to_string();
            assert!(error.contains(text), "{error}");
        }
    }

    #[test]
    fn the_kernels_refusals_to_open_are_told_apart() {
        let device = device();
        let io = io::Error::from_raw_os_error;
        let sys = errno::Error::new;
        let token = Uuid::from_u128(1);
        let text = |error, token| open_error(error, &device, 7, token).to_string();
        let group = |errno| VfioError::OpenGroup(io(errno), "7".into());
        assert!(text(group(libc::EBUSY), None).contains("in use"));
        assert!(text(group(libc::EPERM), None).contains("/dev/vfio/7"));
        let device_fd = |errno| VfioError::GroupGetDeviceFD(sys(errno));
        assert!(text(device_fd(libc::EBUSY), None).contains("in use"));
        assert!(text(device_fd(libc::EACCES), None).contains("needs a token"));
        assert!(text(device_fd(libc::EINVAL), Some(&token)).contains("takes no token"));
        let bind = VfioError::VfioDeviceBindIommufd(sys(libc::EACCES));
        assert!(text(bind, Some(&token)).contains("--vfio-interface group"));
        let unsafe_interrupts = VfioError::ContainerSetIOMMU(sys(libc::EPERM));
        assert!(text(unsafe_interrupts, None).contains("remap"));
    }
}

//! Registers that a guest reads and writes at any place and in any width: of a virtio device, and of one that is passed
//! through. KVM and the devices are made up.

use std::collections::{BTreeMap, BTreeSet};
use std::error::Error as StdError;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex};

use ringside_vfio::address::PciAddress;
use ringside_vfio::device::{
    self, Area, Irq, Mapping, PassthroughDevice, Region, RegionInfo, ResetBy,
};
use ringside_vmm::irq::{self, MsiMessage};
use ringside_vmm::kvm::{self, SlotId};
use ringside_vmm::pci::{FunctionKind, FunctionState, InterruptRouting, PciFunction};
use ringside_vmm::vfio::{MemorySlots, Routing, VfioPci};
use ringside_vmm::virtio::pci::Doorbells;
use ringside_vmm::virtio::{Activation, Notifier, Suspended, VirtioDevice, VirtioPci};
use vmm_sys_util::eventfd::EventFd;

use crate::input::Input;

/// Most accesses of one input.
const STEPS: usize = 512;
/// Bytes of configuration space (PCI Express 5.0, 7.2.2).
const CONFIG: usize = 4096;
/// VIRTIO_F_VERSION_1 (VIRTIO 1.3, 6)
const VERSION_1: u64 = 1 << 32;
/// Where the driver writes the status in the BAR of the transport (4.1.4.3).
const STATUS: u64 = 0x14;

/// KVM, which counts what is attached.
#[derive(Default)]
struct Kvm {
    gsis: Mutex<BTreeSet<u32>>,
    irqfds: Mutex<BTreeMap<i32, u32>>,
    doorbells: Mutex<BTreeSet<(u64, i32)>>,
}

impl Kvm {
    fn is_clean(&self) -> bool {
        self.gsis.lock().unwrap().is_empty()
            && self.irqfds.lock().unwrap().is_empty()
            && self.doorbells.lock().unwrap().is_empty()
    }
}

impl InterruptRouting for Kvm {
    fn allocate(&self) -> Result<u32, irq::Error> {
        let mut gsis = self.gsis.lock().unwrap();
        let free = (24..).find(|gsi| !gsis.contains(gsi)).unwrap();
        gsis.insert(free);
        Ok(free)
    }
    fn free(&self, gsi: u32) {
        assert!(self.gsis.lock().unwrap().remove(&gsi));
    }
    fn route(&self, gsi: u32, _: MsiMessage) -> Result<(), irq::Error> {
        assert!(self.gsis.lock().unwrap().contains(&gsi));
        Ok(())
    }
    fn attach(&self, event: &EventFd, gsi: u32) -> Result<(), irq::Error> {
        let before = self.irqfds.lock().unwrap().insert(event.as_raw_fd(), gsi);
        assert_eq!(before, None, "KVM would refuse");
        Ok(())
    }
    fn detach(&self, event: &EventFd, gsi: u32) -> Result<(), irq::Error> {
        let before = self.irqfds.lock().unwrap().remove(&event.as_raw_fd());
        assert_eq!(before, Some(gsi));
        Ok(())
    }
}

impl Routing for Kvm {
    fn attach_level(&self, event: &EventFd, _: &EventFd, gsi: u32) -> Result<(), irq::Error> {
        InterruptRouting::attach(self, event, gsi)
    }
    fn detach_level(&self, event: &EventFd, gsi: u32) -> Result<(), irq::Error> {
        InterruptRouting::detach(self, event, gsi)
    }
}

impl Doorbells for Kvm {
    fn attach(&self, address: u64, event: &EventFd) -> io::Result<()> {
        let new = (address, event.as_raw_fd());
        assert!(self.doorbells.lock().unwrap().insert(new));
        Ok(())
    }
    fn detach(&self, address: u64, event: &EventFd) -> io::Result<()> {
        let old = (address, event.as_raw_fd());
        assert!(self.doorbells.lock().unwrap().remove(&old));
        Ok(())
    }
}

impl MemorySlots for Kvm {
    fn map(&self, _: u64, _: &Arc<Mapping>) -> Result<SlotId, kvm::Error> {
        unreachable!("nothing of the device can be mapped")
    }
    fn unmap(&self, _: SlotId) {
        unreachable!("nothing of the device was mapped")
    }
}

/// Accesses, wherever the input says.
fn access(function: &mut dyn PciFunction, input: &mut Input<'_>) {
    for _ in 0..STEPS {
        if input.is_empty() {
            break;
        }
        let (what, width) = (input.u8(), [1, 2, 4, 8][usize::from(input.below(4))]);
        let place = input.u16();
        let mut data = [0; 8];
        let data = &mut data[..width];
        let bar = usize::from(what >> 4);
        match what & 7 {
            0 => function.read_config(usize::from(place) % CONFIG, data),
            1 => {
                data.copy_from_slice(&input.u64().to_le_bytes()[..width]);
                function.write_config(usize::from(place) % CONFIG, data);
            }
            2 => function.read_bar(bar % 7, place.into(), data),
            3 | 4 => {
                data.copy_from_slice(&input.u64().to_le_bytes()[..width]);
                function.write_bar(0, place.into(), data);
            }
            5 => {
                data.copy_from_slice(&input.u64().to_le_bytes()[..width]);
                function.write_bar(bar % 7, place.into(), data);
            }
            6 => function.read_config(0x40 + usize::from(place) % 0xc0, data),
            _ => function.reset(),
        }
    }
}

struct Device {
    notifier: Arc<Notifier>,
    active: Arc<Mutex<bool>>,
}

impl VirtioDevice for Device {
    fn device_type(&self) -> u16 {
        2
    }
    fn features(&self) -> u64 {
        VERSION_1 | 0x40
    }
    fn queue_sizes(&self) -> Vec<u16> {
        vec![256, 64, 1]
    }
    fn notifier(&self) -> Arc<Notifier> {
        Arc::clone(&self.notifier)
    }
    fn read_config(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(offset as u8);
    }
    fn write_config(&mut self, offset: u64, _: &[u8]) {
        if offset == 7 {
            self.notifier.config_changed();
        } else if offset == 8 {
            self.notifier.needs_reset();
        }
    }
    fn activate(&mut self, activation: Activation) -> Result<(), Box<dyn StdError + Send + Sync>> {
        let was = std::mem::replace(&mut *self.active.lock().unwrap(), true);
        assert!(!was, "it was started twice");
        assert_eq!(activation.features & !self.features(), 0);
        assert!(activation.features & VERSION_1 != 0);
        for active in &activation.queues {
            let limit = self.queue_sizes()[usize::from(active.queue.index)];
            assert!((1..=limit).contains(&active.queue.size));
        }
        Ok(())
    }
    fn reset(&mut self) {
        *self.active.lock().unwrap() = false;
    }
    fn suspend(&mut self) -> Result<Suspended, Box<dyn StdError + Send + Sync>> {
        Ok(Suspended::default())
    }
    fn restore(
        &mut self,
        activation: Option<Activation>,
        _: &Suspended,
    ) -> Result<(), Box<dyn StdError + Send + Sync>> {
        activation.map_or(Ok(()), |activation| self.activate(activation))
    }
}

/// What a guest does to a device.
pub(crate) fn virtio(bytes: &[u8]) {
    drive(None, &mut Input::new(bytes));
}

/// What a guest does to a device that goes on from a state, with a configuration space like that of a new one.
pub(crate) fn goes_on(kind: FunctionKind, input: &mut Input<'_>) {
    let mut state = Made::new().function.suspend().unwrap();
    state.kind = kind;
    for _ in 0..input.below(4) {
        let place = usize::from(input.u16()) % CONFIG;
        if let Some(byte) = state.config.get_mut(place) {
            *byte = input.u8();
        }
    }
    drive(Some(&state), input);
}

fn drive(state: Option<&FunctionState>, input: &mut Input<'_>) {
    let mut made = Made::new();
    if state.is_none_or(|state| made.function.restore(state).is_ok()) {
        access(&mut made.function, input);
        // Whatever a guest has done, it can go on elsewhere, where all is as it was here.
        let state = made.function.suspend().unwrap();
        let mut elsewhere = Made::new();
        elsewhere.function.restore(&state).unwrap();
        let same = [state, elsewhere.function.suspend().unwrap()]
            .map(|state| serde_json::to_string(&state).unwrap());
        assert_eq!(same[0], same[1]);
        elsewhere.end();
    }
    made.end();
}

/// A virtio function, in the BAR of which accesses arrive.
struct Made {
    function: VirtioPci,
    kvm: Arc<Kvm>,
    active: Arc<Mutex<bool>>,
}

impl Made {
    fn new() -> Self {
        let kvm = Arc::new(Kvm::default());
        let active = Arc::default();
        let device = Device {
            notifier: Arc::default(),
            active: Arc::clone(&active),
        };
        let (routing, doorbells) = (Arc::clone(&kvm), Arc::clone(&kvm));
        let mut function = VirtioPci::new(Box::new(device), routing, doorbells).unwrap();
        function.bar_moved(0, None, Some(0x1_0000));
        Self {
            function,
            kvm,
            active,
        }
    }

    /// A driver that resets the device finds it as new, and nothing of it stays.
    fn end(mut self) {
        self.function.bar_moved(0, Some(0x1_0000), Some(0x8_0000));
        self.function.write_bar(0, STATUS, &[0]);
        let mut status = [0xff];
        self.function.read_bar(0, STATUS, &mut status);
        assert_eq!(status, [0]);
        assert!(!*self.active.lock().unwrap());
        drop(self.function);
        assert!(self.kvm.is_clean());
    }
}

/// A device with any configuration space.
struct Passed {
    config: Mutex<Vec<u8>>,
    regions: [u64; 8],
    /// Which of its interrupts are on.
    on: Mutex<BTreeSet<u32>>,
    /// Vectors of MSI and MSI-X.
    vectors: [u32; 2],
    pin: bool,
}

impl PassthroughDevice for Passed {
    fn address(&self) -> PciAddress {
        "0000:01:10.0".parse().unwrap()
    }
    fn region(&self, region: Region) -> RegionInfo {
        RegionInfo {
            size: self.regions[region.index() as usize],
            mappable: Vec::new(),
        }
    }
    fn read(&self, region: Region, offset: u64, data: &mut [u8]) -> io::Result<()> {
        self.within(region, offset, data.len())?;
        if region == Region::Config {
            let at = offset as usize;
            data.copy_from_slice(&self.config.lock().unwrap()[at..at + data.len()]);
        } else {
            data.fill(0x55);
        }
        Ok(())
    }
    fn write(&self, region: Region, offset: u64, data: &[u8]) -> io::Result<()> {
        self.within(region, offset, data.len())?;
        if region == Region::Config {
            let at = offset as usize;
            self.config.lock().unwrap()[at..at + data.len()].copy_from_slice(data);
        }
        Ok(())
    }
    fn map(&self, _: Region, _: Area) -> io::Result<Arc<Mapping>> {
        unreachable!("nothing can be mapped")
    }
    fn irq_count(&self, irq: Irq) -> u32 {
        match irq {
            Irq::Intx => self.pin.into(),
            Irq::Msi => self.vectors[0],
            Irq::Msix => self.vectors[1],
            Irq::Error | Irq::Request => 1,
        }
    }
    fn enable_irq(&self, irq: Irq, events: &[&EventFd]) -> Result<(), device::Error> {
        let mut on = self.on.lock().unwrap();
        assert!(on.is_empty(), "{irq:?} on top of others");
        if events.len() > self.irq_count(irq) as usize {
            // As the kernel says it.
            return Err(device::Error::Irq {
                address: self.address(),
                irq,
                source: io::ErrorKind::InvalidInput.into(),
            });
        }
        on.insert(irq.index());
        Ok(())
    }
    fn disable_irq(&self, irq: Irq) -> Result<(), device::Error> {
        assert!(
            self.on.lock().unwrap().remove(&irq.index()),
            "{irq:?} is off"
        );
        Ok(())
    }
    fn unmask_intx_by(&self, _: &EventFd) -> Result<(), device::Error> {
        Ok(())
    }
    fn reset(&self) -> Result<ResetBy, device::Error> {
        Ok(ResetBy::Function)
    }
}

impl Passed {
    fn within(&self, region: Region, offset: u64, len: usize) -> io::Result<()> {
        let end = offset.checked_add(len as u64);
        let inside = end.is_some_and(|end| end <= self.region(region).size);
        inside
            .then_some(())
            .ok_or(io::ErrorKind::InvalidInput.into())
    }
}

/// The first bytes say what the device is like, then come pieces of its configuration space, then what the guest does.
pub(crate) fn vfio(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    let flags = input.u8();
    let mut config = vec![0; if flags & 1 == 0 { CONFIG } else { 256 }];
    // STATUS: there is a list of capabilities, which begins behind the header.
    config[6] = 0x10;
    config[0x34] = 0x40;
    for _ in 0..input.below(16) {
        let at = usize::from(input.u16()) % config.len();
        let len = usize::from(input.below(64)).min(config.len() - at);
        let piece = input.take(len);
        config[at..at + piece.len()].copy_from_slice(piece);
    }
    let mut regions = [0; 8];
    for region in &mut regions[..7] {
        *region = match input.below(4) {
            0 => 0,
            1 => u64::from(input.u16()),
            _ => 1 << (4 + input.below(28)),
        };
    }
    regions[7] = config.len() as u64;
    let device = Passed {
        config: Mutex::new(config),
        regions,
        on: Mutex::default(),
        vectors: [input.u8().into(), input.u16().into()],
        pin: flags & 2 != 0,
    };
    let kvm = Arc::new(Kvm::default());
    let (routing, slots) = (Arc::clone(&kvm), Arc::clone(&kvm));
    let Ok(mut function) = VfioPci::new(Box::new(device), routing, slots) else {
        return;
    };
    function.plugged([16, 17, 18, 19]);
    access(&mut function, &mut input);
    drop(function);
    assert!(kvm.is_clean());
}

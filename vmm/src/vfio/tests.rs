//! A made-up device, and a made-up KVM around it.
#![allow(
    clippy::cast_possible_truncation,
    reason = "numbers of a made-up device are small"
)]

use std::collections::BTreeMap;
use std::sync::Mutex;

use proptest::prelude::*;
use ringside_vfio::device::{RegionInfo, ResetBy};

use super::*;
use crate::irq::{self, MsiMessage};
use crate::pci::InterruptRouting;
use crate::pci::config::BarKind;
use crate::pci::msix::tests::FakeKvm;

/// Where the made-up device has its capabilities.
const PM: usize = 0x40;
const MSI: usize = 0x50;
const EA: usize = 0x64;
const MSIX: usize = 0x70;
const EXPRESS: usize = 0xa0;
const AER: usize = 0x100;
const SRIOV: usize = 0x140;
const SERIAL: usize = 0x180;
const ATS: usize = 0x190;
const REBAR: usize = 0x1a0;

#[derive(Debug, Clone, PartialEq, Eq)]
enum Call {
    Write(Region, u64, Vec<u8>),
    Enable(Irq, usize),
    Disable(Irq),
    Resample,
    Reset,
}

/// What a test keeps of the device that the function owns.
#[derive(Default)]
struct Shared {
    config: Vec<u8>,
    regions: BTreeMap<u32, RegionInfo>,
    calls: Vec<Call>,
    /// Descriptors of the eventfds that the device signals.
    events: BTreeMap<u32, Vec<EventFd>>,
    /// The pin cannot be unmasked by an eventfd.
    no_resample: bool,
    gone: bool,
}

#[derive(Clone, Default)]
struct Device(Arc<Mutex<Shared>>);

impl Device {
    /// BAR 0 of 16 KiB (64-bit), BAR 2 of 256 bytes (32-bit), BAR 3 of 16 KiB with the MSI-X table, a ROM, a pin, and
    /// capabilities that a guest must and must not see.
    fn new() -> Self {
        let mut config = vec![0; CONFIG_SIZE];
        let mut put = |at: usize, bytes: &[u8]| config[at..at + bytes.len()].copy_from_slice(bytes);
        put(VENDOR_ID, &0x10ca_8086_u32.to_le_bytes());
        put(COMMAND, &0x0006_u16.to_le_bytes());
        put(STATUS, &STATUS_CAPABILITIES.to_le_bytes());
        put(CLASS_CODE, &[0, 0, 2]);
        put(HEADER_TYPE, &[HEADER_MULTI_FUNCTION]);
        put(BAR0, &0x9000_000c_u32.to_le_bytes());
        put(BAR0 + 8, &0x9100_0000_u32.to_le_bytes());
        put(BAR0 + 12, &0x9200_000c_u32.to_le_bytes());
        put(BAR0 + 20, &0x0000_e001_u32.to_le_bytes());
        put(INTERRUPT_LINE, &[11, 2]);
        put(CAPABILITIES_POINTER, &[0x40]);
        put(PM, &[CAP_POWER_MANAGEMENT, 0x50, 0x23, 0xff, 0x03, 0x81]);
        // Four vectors, 64-bit, maskable.
        put(MSI, &[CAP_MSI, 0x64, 0x84, 0x01]);
        put(EA, &[0x14, 0x70, 1, 1, 0xaa, 0xbb, 0xcc, 0xdd]);
        // Three vectors; table at 0x2000 and pending bits at 0x3000 of BAR 3.
        put(MSIX, &[CAP_MSIX, 0xa0, 2, 0, 3, 0x20, 0, 0, 3, 0x30, 0, 0]);
        put(EXPRESS, &[CAP_EXPRESS, 0x00, 0x02, 0x00]);
        let extended = |id: u32, next: usize| (id | 1 << 16 | (next as u32) << 20).to_le_bytes();
        put(AER, &extended(0x01, SRIOV));
        put(SRIOV, &extended(0x10, SERIAL));
        put(SRIOV + 4, &[0xff; 0x3c]);
        put(SERIAL, &extended(0x03, ATS));
        put(SERIAL + 4, &[1, 2, 3, 4, 5, 6, 7, 8]);
        put(ATS, &extended(0x0f, REBAR));
        put(REBAR, &extended(0x15, 0));
        let device = Self::default();
        {
            let mut shared = device.0.lock().unwrap();
            shared.config = config;
            let region = |size: u64, mappable: bool| RegionInfo {
                size,
                mappable: if mappable {
                    vec![Area {
                        offset: 0,
                        size: size.next_multiple_of(4096),
                    }]
                } else {
                    vec![]
                },
            };
            for (at, info) in [
                (Region::Bar(0), region(0x4000, true)),
                (Region::Bar(2), region(0x100, true)),
                (Region::Bar(3), region(0x4000, true)),
                (Region::Bar(5), region(0x20, false)),
                (Region::Rom, region(0x1800, false)),
                (Region::Config, region(0x1000, false)),
            ] {
                shared.regions.insert(at.index(), info);
            }
        }
        device
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Shared> {
        self.0.lock().unwrap()
    }

    fn set(&self, at: usize, bytes: &[u8]) {
        self.lock().config[at..at + bytes.len()].copy_from_slice(bytes);
    }

    fn take_calls(&self) -> Vec<Call> {
        std::mem::take(&mut self.lock().calls)
    }
}

impl PassthroughDevice for Device {
    fn address(&self) -> PciAddress {
        "0000:01:10.0".parse().unwrap()
    }
    fn region(&self, region: Region) -> RegionInfo {
        let shared = self.lock();
        shared
            .regions
            .get(&region.index())
            .cloned()
            .unwrap_or_default()
    }
    fn read(&self, region: Region, offset: u64, data: &mut [u8]) -> io::Result<()> {
        let shared = self.lock();
        let size = shared.regions.get(&region.index()).map_or(0, |r| r.size);
        if shared.gone || offset.saturating_add(data.len() as u64) > size {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        if region == Region::Config {
            let at = offset as usize;
            data.copy_from_slice(&shared.config[at..at + data.len()]);
        } else {
            data.fill(0x40 + region.index() as u8);
        }
        Ok(())
    }
    fn write(&self, region: Region, offset: u64, data: &[u8]) -> io::Result<()> {
        let mut shared = self.lock();
        let size = shared.regions.get(&region.index()).map_or(0, |r| r.size);
        if shared.gone || offset.saturating_add(data.len() as u64) > size {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        if region == Region::Config {
            let at = offset as usize;
            shared.config[at..at + data.len()].copy_from_slice(data);
        }
        shared
            .calls
            .push(Call::Write(region, offset, data.to_vec()));
        Ok(())
    }
    fn map(&self, _: Region, area: Area) -> io::Result<Arc<Mapping>> {
        let file = tempfile::tempfile()?;
        file.set_len(area.size)?;
        Ok(Arc::new(Mapping::new(&file, 0, area.size)?))
    }
    fn irq_count(&self, irq: Irq) -> u32 {
        match irq {
            Irq::Intx | Irq::Error | Irq::Request => 1,
            Irq::Msi => 4,
            Irq::Msix => 3,
        }
    }
    fn enable_irq(&self, irq: Irq, events: &[&EventFd]) -> Result<(), device::Error> {
        let mut shared = self.lock();
        for other in [Irq::Intx, Irq::Msi, Irq::Msix] {
            let on = shared.events.contains_key(&other.index());
            assert!(!on || irq == Irq::Error, "{irq:?} on top of {other:?}");
        }
        let copies = events.iter().map(|event| event.try_clone().unwrap());
        shared.events.insert(irq.index(), copies.collect());
        shared.calls.push(Call::Enable(irq, events.len()));
        Ok(())
    }
    fn disable_irq(&self, irq: Irq) -> Result<(), device::Error> {
        let mut shared = self.lock();
        assert!(
            shared.events.remove(&irq.index()).is_some(),
            "{irq:?} is off"
        );
        shared.calls.push(Call::Disable(irq));
        Ok(())
    }
    fn unmask_intx_by(&self, _: &EventFd) -> Result<(), device::Error> {
        let mut shared = self.lock();
        if shared.no_resample {
            return Err(device::Error::Irq {
                address: self.address(),
                irq: Irq::Intx,
                source: io::ErrorKind::Unsupported.into(),
            });
        }
        shared.calls.push(Call::Resample);
        Ok(())
    }
    fn reset(&self) -> Result<ResetBy, device::Error> {
        self.lock().calls.push(Call::Reset);
        Ok(ResetBy::Function)
    }
}

/// Plays KVM.
#[derive(Default)]
struct Kvm {
    vectors: FakeKvm,
    levels: Mutex<Vec<u32>>,
    slots: Mutex<BTreeMap<u32, (u64, u64)>>,
}

impl InterruptRouting for Kvm {
    fn allocate(&self) -> Result<u32, irq::Error> {
        self.vectors.allocate()
    }
    fn free(&self, gsi: u32) {
        self.vectors.free(gsi);
    }
    fn route(&self, gsi: u32, message: MsiMessage) -> Result<(), irq::Error> {
        self.vectors.route(gsi, message)
    }
    fn attach(&self, event: &EventFd, gsi: u32) -> Result<(), irq::Error> {
        self.vectors.attach(event, gsi)
    }
    fn detach(&self, event: &EventFd, gsi: u32) -> Result<(), irq::Error> {
        self.vectors.detach(event, gsi)
    }
}

impl Routing for Kvm {
    fn attach_level(&self, _: &EventFd, _: &EventFd, gsi: u32) -> Result<(), irq::Error> {
        self.levels.lock().unwrap().push(gsi);
        Ok(())
    }
    fn detach_level(&self, _: &EventFd, gsi: u32) -> Result<(), irq::Error> {
        self.levels.lock().unwrap().retain(|level| *level != gsi);
        Ok(())
    }
}

impl MemorySlots for Kvm {
    fn map(&self, start: u64, mapping: &Arc<Mapping>) -> Result<SlotId, kvm::Error> {
        let mut slots = self.slots.lock().unwrap();
        let id = slots.keys().next_back().map_or(0, |last| last + 1);
        slots.insert(id, (start, mapping.size()));
        Ok(SlotId(id))
    }
    fn unmap(&self, slot: SlotId) {
        let mut slots = self.slots.lock().unwrap();
        assert!(slots.remove(&slot.0).is_some(), "{slot:?} is not mapped");
    }
}

impl Kvm {
    fn mapped(&self) -> Vec<(u64, u64)> {
        self.slots.lock().unwrap().values().copied().collect()
    }
}

struct Fixture {
    device: Device,
    kvm: Arc<Kvm>,
    function: VfioPci,
}

fn with(device: Device) -> Fixture {
    let kvm = Arc::new(Kvm::default());
    let function = VfioPci::new(Box::new(device.clone()), kvm.clone(), kvm.clone()).unwrap();
    device.take_calls();
    Fixture {
        device,
        kvm,
        function,
    }
}

fn fixture() -> Fixture {
    with(Device::new())
}

impl Fixture {
    fn u8(&mut self, at: usize) -> u8 {
        let mut data = [0];
        self.function.read_config(at, &mut data);
        data[0]
    }
    fn u32(&mut self, at: usize) -> u32 {
        let mut data = [0; 4];
        self.function.read_config(at, &mut data);
        u32::from_le_bytes(data)
    }
    fn write16(&mut self, at: usize, value: u16) {
        self.function.write_config(at, &value.to_le_bytes());
    }
    fn write32(&mut self, at: usize, value: u32) {
        self.function.write_config(at, &value.to_le_bytes());
    }
    /// What the host bridge does when an address has changed.
    fn place(&mut self, bar: usize, to: Option<u64>) {
        self.function.bar_moved(bar, None, to);
    }
    fn capabilities(&mut self) -> Vec<u8> {
        let (mut found, mut at) = (Vec::new(), self.u8(CAPABILITIES_POINTER));
        while at != 0 && found.len() < 100 {
            found.push(self.u8(at.into()));
            at = self.u8(usize::from(at) + 1);
        }
        found
    }
    fn extended(&mut self) -> Vec<(usize, u16)> {
        let (mut found, mut at) = (Vec::new(), EXTENDED_START);
        while at != 0 && found.len() < 100 {
            let header = self.u32(at);
            found.push((at, (header & 0xffff) as u16));
            at = (header >> 20) as usize;
        }
        found
    }
    fn table(&mut self, vector: u64, data: u32, masked: bool) {
        let at = 0x2000 + vector * 16;
        self.function
            .write_bar(3, at, &0xfee0_0000_u32.to_le_bytes());
        self.function.write_bar(3, at + 8, &data.to_le_bytes());
        self.function
            .write_bar(3, at + 12, &u32::from(masked).to_le_bytes());
    }
    fn signal(&self, irq: Irq, vector: usize) {
        // A copy of the eventfd has a number of its own; the fake KVM knows the original.
        self.device.lock().events[&irq.index()][vector]
            .write(1)
            .unwrap();
    }
}

#[test]
fn a_guest_sees_the_capabilities_that_it_may_use() {
    let mut f = fixture();
    assert_eq!(
        f.capabilities(),
        [CAP_POWER_MANAGEMENT, CAP_MSI, CAP_MSIX, CAP_EXPRESS]
    );
    assert_eq!(
        f.extended(),
        [(AER, EXT_CAP_AER), (SERIAL, EXT_CAP_SERIAL_NUMBER)]
    );
    for hidden in [EA, EA + 4, SRIOV, SRIOV + 4, SRIOV + 0x3c, ATS, REBAR] {
        assert_eq!(f.u32(hidden), 0, "{hidden:#x}");
        f.write32(hidden, u32::MAX);
    }
    assert_eq!(f.device.take_calls(), [], "and cannot write them");
    assert_eq!(f.u32(SERIAL + 4), 0x0403_0201);
    assert_eq!(
        f.u8(HEADER_TYPE),
        0,
        "one function of several is one function"
    );
}

#[test]
fn a_hidden_capability_at_the_start_leaves_the_list_whole() {
    let device = Device::new();
    device.set(
        AER,
        &(0x10_u32 | 1 << 16 | (SERIAL as u32) << 20).to_le_bytes(),
    );
    let mut f = with(device);
    assert_eq!(
        f.extended(),
        [(AER, EXT_CAP_NULL), (SERIAL, EXT_CAP_SERIAL_NUMBER)]
    );
    let device = Device::new();
    device.set(AER, &[0xff; 4]);
    assert_eq!(with(device).extended(), [(AER, EXT_CAP_NULL)]);
}

#[test]
fn lists_that_bite_their_tails_have_an_end() {
    let device = Device::new();
    device.set(EXPRESS + 1, &[0x40]);
    device.set(
        SERIAL,
        &(0x03_u32 | 1 << 16 | (AER as u32) << 20).to_le_bytes(),
    );
    let mut f = with(device);
    assert!(f.capabilities().len() < 100);
    assert!(f.extended().len() < 100);
}

#[test]
fn only_endpoints_are_given_away() {
    let device = Device::new();
    device.set(HEADER_TYPE, &[1]);
    let kvm = Arc::new(Kvm::default());
    let refused = VfioPci::new(Box::new(device), kvm.clone(), kvm);
    let error = refused.err().unwrap().to_string();
    assert!(
        error.contains("0000:01:10.0") && error.contains("type 1"),
        "{error}"
    );
}

#[test]
fn the_device_decodes_and_the_guest_decides_where_it_sees_that() {
    let mut f = fixture();
    assert_eq!(
        f.device.lock().config[COMMAND],
        0x02,
        "no bus master at first"
    );
    assert_eq!(f.u32(COMMAND) & 0xffff, 0);
    f.write16(COMMAND, COMMAND_MEMORY | COMMAND_BUS_MASTER | COMMAND_IO);
    assert_eq!(f.u32(COMMAND) & 0xffff, 0x0006);
    assert_eq!(f.device.lock().config[COMMAND], 0x06);
    f.write16(COMMAND, 0);
    assert_eq!(f.function.config().decoded_bar(0), None);
    assert_eq!(f.device.lock().config[COMMAND], 0x02);
}

#[test]
fn bars_have_the_devices_sizes_and_the_guests_addresses() {
    let mut f = fixture();
    let kinds: Vec<_> = (0..DECODER_COUNT)
        .map(|bar| f.function.config().bar(bar).map(|bar| (bar.size, bar.kind)))
        .collect();
    let wide = BarKind::Memory64 { prefetchable: true };
    let narrow = BarKind::Memory32 {
        prefetchable: false,
    };
    assert_eq!(
        kinds,
        [
            Some((0x4000, wide)),
            None,
            Some((0x100, narrow)),
            Some((0x4000, wide)),
            None,
            None,
            Some((0x2000, BarKind::Rom)),
        ],
        "without the ports of BAR 5"
    );
    f.write32(BAR0, u32::MAX);
    assert_eq!(f.u32(BAR0), 0xffff_c00c);
    f.write32(BAR0, 0xc000_0000);
    assert_eq!(f.u32(BAR0), 0xc000_000c);
    assert_eq!(f.device.take_calls(), [], "the device stays where it is");
}

#[test]
fn moving_a_bar_moves_its_memory_but_not_the_msix_table() {
    let mut f = fixture();
    f.place(0, Some(0x1_0000_0000));
    f.place(3, Some(0x2_0000_0000));
    let both = [(0x1_0000_0000, 0x4000), (0x2_0000_0000, 0x2000)];
    assert_eq!(f.kvm.mapped(), both);
    f.place(0, Some(0x3_0000_0000));
    f.place(3, None);
    assert_eq!(f.kvm.mapped(), [(0x3_0000_0000, 0x4000)]);
    // Below a page only where a page can begin.
    f.place(2, Some(0xc000_0100));
    assert_eq!(f.kvm.mapped().len(), 1);
    f.place(2, Some(0xc000_1000));
    assert_eq!(f.kvm.mapped().last(), Some(&(0xc000_1000, 0x1000)));
    let kvm = f.kvm.clone();
    drop(f);
    assert_eq!(kvm.mapped(), []);
}

#[test]
fn accesses_around_the_table_reach_the_device() {
    let mut f = fixture();
    let mut data = [0; 4];
    f.function.read_bar(3, 0x2030, &mut data);
    assert_eq!(data, [0x43; 4]);
    f.function.write_bar(3, 0x2030, &[1, 2, 3, 4]);
    f.function.write_bar(3, 0x2000, &[1, 2, 3, 4]);
    f.function.write_bar(3, 0x3000, &[1, 2, 3, 4]);
    f.function.write_bar(ROM_BAR, 0, &[1]);
    let written = Call::Write(Region::Bar(3), 0x2030, vec![1, 2, 3, 4]);
    assert_eq!(f.device.take_calls(), [written]);
    f.function.read_bar(3, 0x2000, &mut data);
    assert_eq!(data, [0, 2, 3, 4], "the table is emulated");
    f.function.read_bar(3, 0x3000, &mut data);
    assert_eq!(data, [0; 4]);
    f.function.read_bar(ROM_BAR, 0, &mut data);
    assert_eq!(data, [0x46; 4]);
    f.function.read_bar(ROM_BAR, 0x1ffc, &mut data);
    assert_eq!(data, [0xff; 4], "beyond the ROM's end");
}

#[test]
fn a_pin_that_does_not_work_does_not_keep_messages_off() {
    let mut f = fixture();
    f.device.lock().no_resample = true;
    f.function.plugged([16, 17, 18, 19]);
    assert!(f.kvm.levels.lock().unwrap().is_empty());
    f.write16(MSIX + 2, MSIX_ENABLE);
    f.write16(MSIX + 2, 0);
    assert_eq!(
        f.device.take_calls()[..4],
        [
            Call::Enable(Irq::Intx, 1),
            Call::Disable(Irq::Intx),
            Call::Enable(Irq::Msix, 3),
            Call::Disable(Irq::Msix),
        ]
    );
}

#[test]
fn interrupts_change_from_the_pin_to_messages_and_back() {
    let mut f = fixture();
    f.function.plugged([16, 17, 18, 19]);
    let pin = [Call::Enable(Irq::Intx, 1), Call::Resample];
    assert_eq!(f.device.take_calls(), pin);
    assert_eq!(*f.kvm.levels.lock().unwrap(), [17], "its pin is INTB");

    f.write16(MSIX + 2, MSIX_ENABLE);
    assert_eq!(
        f.device.take_calls(),
        [Call::Disable(Irq::Intx), Call::Enable(Irq::Msix, 3)]
    );
    assert!(f.kvm.levels.lock().unwrap().is_empty());
    // Two of its four vectors.
    f.write16(MSI + 2, MSI_ENABLE | 1 << 4);
    assert_eq!(f.device.take_calls(), [], "MSI-X has precedence");
    f.write16(MSIX + 2, 0);
    assert_eq!(
        f.device.take_calls(),
        [Call::Disable(Irq::Msix), Call::Enable(Irq::Msi, 2)]
    );
    f.write16(MSI + 2, MSI_ENABLE);
    assert_eq!(
        f.device.take_calls(),
        [Call::Disable(Irq::Msi), Call::Enable(Irq::Msi, 1)]
    );
    f.write16(MSI + 2, 0);
    let calls = f.device.take_calls();
    assert_eq!(calls[0], Call::Disable(Irq::Msi));
    assert_eq!(calls[1..], pin);
    let device = f.device.clone();
    drop(f);
    assert_eq!(device.take_calls(), [Call::Disable(Irq::Intx)]);
}

#[test]
fn a_masked_vector_keeps_its_interrupt() {
    let mut f = fixture();
    f.write16(MSIX + 2, MSIX_ENABLE);
    f.table(1, 0x41, true);
    f.signal(Irq::Msix, 1);
    let mut pending = [0; 8];
    f.function.read_bar(3, 0x3000, &mut pending);
    assert_eq!(pending[0], 0b10);
    assert!(f.kvm.vectors.take_sent().is_empty());
    f.table(1, 0x42, false);
    let sent = f.kvm.vectors.take_sent();
    assert_eq!(sent.len(), 1);
    assert_eq!(sent[0].data, 0x42);
    f.function.read_bar(3, 0x3000, &mut pending);
    assert_eq!(pending[0], 0);
}

#[test]
fn a_reset_turns_everything_off() {
    let mut f = fixture();
    f.write16(COMMAND, COMMAND_MEMORY | COMMAND_BUS_MASTER);
    f.write16(MSIX + 2, MSIX_ENABLE);
    f.write16(PM + 4, PM_POWER_STATE);
    f.device.take_calls();
    f.function.reset();
    assert_eq!(f.u32(COMMAND) & 0xffff, 0);
    assert_eq!(f.device.lock().config[COMMAND], 0x02, "no bus master");
    assert_eq!(
        f.device.take_calls()[..2],
        [Call::Disable(Irq::Msix), Call::Reset]
    );
    assert_eq!(f.u32(MSIX) >> 16, 2);
    assert_eq!(f.u32(PM + 4), u32::from(PM_NO_SOFT_RESET), "in D0");
}

#[test]
fn power_states_are_remembered_and_nothing_more() {
    let mut f = fixture();
    assert_eq!(f.u32(PM) >> 16, 0x3, "it sends no power events");
    f.write16(PM + 4, 0xff03);
    assert_eq!(f.u32(PM + 4), u32::from(PM_NO_SOFT_RESET | 3));
    assert_eq!(f.device.take_calls(), []);
}

#[test]
fn a_device_that_is_gone_reads_as_ones() {
    let mut f = fixture();
    f.device.lock().gone = true;
    assert_eq!(f.u32(EXPRESS + 4), u32::MAX);
    let mut data = [0; 8];
    f.function.read_bar(0, 0, &mut data);
    assert_eq!(data, [0xff; 8]);
    f.function.write_bar(0, 0, &data);
    f.write16(COMMAND, 0x7);
    f.write16(EXPRESS + 8, 0x7);
}

#[test]
fn a_device_without_extended_space_shows_none() {
    let device = Device::new();
    device.lock().regions.insert(
        Region::Config.index(),
        RegionInfo {
            size: 256,
            mappable: vec![],
        },
    );
    let mut f = with(device);
    assert_eq!(f.u32(EXTENDED_START), 0);
    f.write32(EXTENDED_START, 1);
    assert_eq!(f.device.take_calls(), []);
}

proptest! {
    /// Whatever a driver does: the device's own addresses, messages and hidden capabilities stay out of its reach, the interrupt
    /// kinds exclude each other (the made-up device checks that), and everything is given back.
    #[test]
    fn hostile_drivers_reach_only_what_is_theirs(
        steps in prop::collection::vec(
            (0..3u8, 0..4200usize, prop::collection::vec(any::<u8>(), 1..9), any::<u64>()), 0..150)
    ) {
        let mut f = fixture();
        f.function.plugged([16, 17, 18, 19]);
        for (kind, at, data, offset) in steps {
            match kind {
                0 => f.function.write_config(at, &data),
                1 => {
                    let bar = at % 9;
                    f.function.write_bar(bar, offset % 0x5000, &data);
                    f.function.read_bar(bar, offset, &mut data.clone());
                }
                _ => {
                    let bar = at % DECODER_COUNT;
                    let to = f.function.config().decoded_bar(bar);
                    f.place(bar, to);
                }
            }
            let mut back = data.clone();
            f.function.read_config(at, &mut back);
        }
        for call in f.device.take_calls() {
            let Call::Write(Region::Config, at, data) = call else { continue };
            for at in at as usize..at as usize + data.len() {
                let emulated = [BAR0..BAR0 + 24, ROM_ADDRESS..ROM_ADDRESS + 4, MSI..MSI + 0x18,
                    MSIX..MSIX + 12, EA..EA + 12, SRIOV..SERIAL, ATS..REBAR + 4, PM..PM + 8];
                prop_assert!(!emulated.iter().any(|range| range.contains(&at)), "{at:#x}");
            }
        }
        prop_assert!(f.device.lock().config[COMMAND] & 2 != 0, "it decodes");
        let (kvm, device) = (f.kvm.clone(), f.device.clone());
        drop(f);
        prop_assert_eq!(kvm.mapped(), []);
        prop_assert!(device.lock().events.is_empty());
        prop_assert_eq!(kvm.vectors.allocated(), 0);
    }
}

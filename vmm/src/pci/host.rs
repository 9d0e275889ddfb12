//! The host bridge: bus 0 with its functions, the two ways of reaching their configuration space,
//! and the windows in which their BARs answer.
//!
//! ```text
//! ports 0xcf8/0xcfc ─▶ ConfigPorts ─┐
//!                                   ├─▶ PciRoot ─▶ function.write_config
//! ECAM window ───────▶ Ecam ────────┘       │
//!                                           └─▶ BARs moved: MMIO bus, function.bar_moved
//! MMIO bus ──────────▶ BarRange ────────────────▶ function.read_bar / write_bar
//! ```
//!
//! Locks are taken in that order, bridge before function, and a function never calls the bridge.
//! An access to a function's registers holds the function's lock only.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::PciFunction;
use super::bits::*;
use super::config::{Bar, BarKind, ConfigSpace, Identity};
use crate::bus::{Bus, BusDevice};
use crate::layout::Range;

/// Why a function cannot be plugged in.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// All functions of all devices of bus 0 are taken.
    #[error("the PCI bus is full: it has room for {} devices", 31 * 8)]
    NoSlot,
    /// The windows are too small.
    #[error("no room for a BAR of {size:#x} bytes in the guest's PCI memory windows")]
    NoRoom {
        /// Size of the BAR in bytes.
        size: u64,
    },
}

/// The parts of the guest-physical address space that the bridge forwards to its functions.
#[derive(Clone, Copy, Debug)]
pub struct Windows {
    /// Below 4 GiB.
    pub low: Range,
    /// Above RAM. May be empty.
    pub high: Range,
}

impl Windows {
    fn contain(&self, address: u64, size: u64) -> bool {
        let inside = |window: &Range| {
            address >= window.start
                && address
                    .checked_add(size)
                    .is_some_and(|end| end <= window.end())
        };
        inside(&self.low) || inside(&self.high)
    }
}

/// BARs do not share pages: one that is mapped into the guest takes whole pages.
const PAGE: u64 = 4096;

type SharedFunction = Arc<Mutex<dyn PciFunction>>;

struct Slot {
    function: SharedFunction,
    mapped: [Option<u64>; DECODER_COUNT],
    /// BARs that are decoded where another one is mapped.
    waiting: [bool; DECODER_COUNT],
}

impl Slot {
    fn new(function: SharedFunction) -> Self {
        Self {
            function,
            mapped: [None; DECODER_COUNT],
            waiting: [false; DECODER_COUNT],
        }
    }
}

/// Device and function number.
type Place = (u8, u8);

/// Bus 0 and what is on it.
pub struct PciRoot {
    mmio: Arc<Bus>,
    windows: Windows,
    /// First addresses of the windows that nothing was placed at yet.
    next_low: u64,
    next_high: u64,
    /// Functions but the first of a device are those of a crowded bus.
    slots: BTreeMap<Place, Slot>,
}

/// The bridge as its users share it.
pub type SharedRoot = Arc<Mutex<PciRoot>>;

impl PciRoot {
    /// A bus with nothing but the host bridge itself. BARs will answer on `mmio`.
    pub fn new(mmio: Arc<Bus>, windows: Windows) -> Self {
        let bridge = Mutex::new(HostBridge(ConfigSpace::new(Identity {
            // "Generic PCIe host bridge" in the PCI ID database.
            vendor: 0x1b36,
            device: 0x0008,
            revision: 0,
            class: 0x06_00_00,
            subsystem_vendor: 0x1af4,
            subsystem: 0x1100,
        })));
        let slot = Slot::new(Arc::new(bridge));
        Self {
            mmio,
            windows,
            next_low: windows.low.start,
            next_high: windows.high.start,
            slots: BTreeMap::from([((0, 0), slot)]),
        }
    }

    /// Plugs a function into the next free slot and places its BARs, as firmware would do; memory
    /// decoding stays off until the guest turns it on. When all devices have their function 0, they
    /// get further ones. Returns device and function number.
    pub fn add(&mut self, function: SharedFunction) -> Result<(u8, u8), Error> {
        let place = (0..8)
            .flat_map(|function| (1..32).map(move |device| (device, function)))
            .find(|place| !self.slots.contains_key(place))
            .ok_or(Error::NoSlot)?;
        {
            let mut function = lock(&function);
            for bar in 0..DECODER_COUNT {
                if let Some(wanted) = function.config().bar(bar) {
                    let address = self.place(wanted)?;
                    function.config_mut().place_bar(bar, address);
                }
            }
        }
        self.slots.insert(place, Slot::new(function));
        if place.1 != 0
            && let Some(first) = self.slots.get(&(place.0, 0))
        {
            let mut first = lock(&first.function);
            first
                .config_mut()
                .set(HEADER_TYPE, &[HEADER_MULTI_FUNCTION]);
        }
        Ok(place)
    }

    /// Takes all functions off the bus and drops them.
    pub fn remove_all(&mut self) {
        for slot in std::mem::take(&mut self.slots).values() {
            for address in slot.mapped.iter().flatten() {
                if let Err(error) = self.mmio.remove(*address) {
                    tracing::error!(%error, "cannot unmap a BAR");
                }
            }
        }
    }

    fn place(&mut self, bar: Bar) -> Result<u64, Error> {
        let (size, windows) = (bar.size, self.windows);
        let fit = |next: u64, window: Range| {
            let start = next.checked_next_multiple_of(size.max(PAGE))?;
            (start.checked_add(size)? <= window.end()).then_some(start)
        };
        let wide = matches!(bar.kind, BarKind::Memory64 { .. });
        if let Some(start) = fit(self.next_high, windows.high).filter(|_| wide) {
            self.next_high = start + size;
            return Ok(start);
        }
        let start = fit(self.next_low, windows.low).ok_or(Error::NoRoom { size })?;
        self.next_low = start + size;
        Ok(start)
    }

    fn function(&self, address: Address) -> Option<SharedFunction> {
        let slot = (address.bus == 0)
            .then(|| self.slots.get(&(address.device, address.function)))
            .flatten()?;
        Some(Arc::clone(&slot.function))
    }

    /// Makes the MMIO bus agree with what a function decodes. A BAR that overlaps another waits
    /// until that one moves, so that two can swap places; one that is outside the windows answers
    /// nowhere. Functions that have no BAR to move are left alone: one of them may be waiting for
    /// its back-end.
    fn update(&mut self, place: Place) {
        let Some(slot) = self.slots.get_mut(&place) else {
            return;
        };
        for bar in 0..DECODER_COUNT {
            slot.unmap_if_moved(bar, &self.mmio);
        }
        for bar in 0..DECODER_COUNT {
            slot.map(bar, &self.mmio, &self.windows);
        }
        for slot in self.slots.values_mut() {
            for bar in 0..DECODER_COUNT {
                if slot.waiting.get(bar) == Some(&true) {
                    slot.map(bar, &self.mmio, &self.windows);
                }
            }
        }
    }
}

impl Slot {
    fn unmap_if_moved(&mut self, bar: usize, mmio: &Bus) {
        let Some(mapped) = self.mapped.get_mut(bar) else {
            return;
        };
        let mut function = lock(&self.function);
        if let Some(from) = *mapped
            && function.config().decoded_bar(bar) != Some(from)
        {
            if let Err(error) = mmio.remove(from) {
                tracing::error!(%error, "cannot unmap a BAR");
            }
            *mapped = None;
            function.bar_moved(bar, Some(from), None);
        }
    }

    fn map(&mut self, bar: usize, mmio: &Bus, windows: &Windows) {
        let (Some(mapped), Some(waiting)) = (self.mapped.get_mut(bar), self.waiting.get_mut(bar))
        else {
            return;
        };
        *waiting = false;
        let mut function = lock(&self.function);
        let size = function.config().bar(bar).map(|bar| bar.size);
        let wanted = function.config().decoded_bar(bar);
        let (None, Some(to), Some(size)) = (*mapped, wanted, size) else {
            return;
        };
        if !windows.contain(to, size) {
            tracing::debug!(
                address = format_args!("{to:#x}"),
                "BAR is outside the PCI windows"
            );
            return;
        }
        let range = Arc::new(Mutex::new(BarRange {
            function: Arc::clone(&self.function),
            bar,
        }));
        match mmio.insert(to, size, range) {
            Ok(()) => {
                *mapped = Some(to);
                function.bar_moved(bar, None, Some(to));
            }
            Err(error) => {
                tracing::debug!(%error, "BAR is not mapped");
                *waiting = true;
            }
        }
    }
}

fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Reads configuration registers. The bus is not locked while the function works, so one that
/// waits for its back-end holds up nobody else.
fn read(root: &SharedRoot, address: Address, data: &mut [u8]) {
    data.fill(0xff);
    let function = lock(root).function(address);
    if let Some(function) = function {
        lock(&function).read_config(address.register, data);
    }
}

/// Writes configuration registers, and moves BARs if that is what was written.
fn write(root: &SharedRoot, address: Address, data: &[u8]) {
    let Some(function) = lock(root).function(address) else {
        return;
    };
    let moved = {
        let mut function = lock(&function);
        let before = decoded(function.config());
        function.write_config(address.register, data);
        decoded(function.config()) != before
    };
    if moved {
        lock(root).update((address.device, address.function));
    }
}

fn decoded(config: &ConfigSpace) -> [Option<u64>; DECODER_COUNT] {
    std::array::from_fn(|bar| config.decoded_bar(bar))
}

struct HostBridge(ConfigSpace);

impl PciFunction for HostBridge {
    fn config(&self) -> &ConfigSpace {
        &self.0
    }
    fn config_mut(&mut self) -> &mut ConfigSpace {
        &mut self.0
    }
    fn read_bar(&mut self, _: usize, _: u64, _: &mut [u8]) {}
    fn write_bar(&mut self, _: usize, _: u64, _: &[u8]) {}
}

struct BarRange {
    function: SharedFunction,
    bar: usize,
}

impl BusDevice for BarRange {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        lock(&self.function).read_bar(self.bar, offset, data);
    }
    fn write(&mut self, offset: u64, data: &[u8]) {
        lock(&self.function).write_bar(self.bar, offset, data);
    }
}

/// Which register of which function.
#[derive(Clone, Copy)]
struct Address {
    bus: u8,
    device: u8,
    function: u8,
    register: usize,
}

/// The enhanced configuration access mechanism: 4 KiB for each function (PCI Express 5.0, 7.2.2).
pub struct Ecam(pub SharedRoot);

impl Ecam {
    fn address(offset: u64) -> Address {
        // Masked, so the conversions keep every bit.
        let field = |shift: u32, mask: u64| u8::try_from((offset >> shift) & mask).unwrap_or(0);
        Address {
            bus: field(20, 0xff),
            device: field(15, 0x1f),
            function: field(12, 0x7),
            register: usize::try_from(offset & 0xfff).unwrap_or(0),
        }
    }
}

impl BusDevice for Ecam {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        read(&self.0, Self::address(offset), data);
    }
    fn write(&mut self, offset: u64, data: &[u8]) {
        write(&self.0, Self::address(offset), data);
    }
}

/// Configuration mechanism 1: an address port and a data port (PCI 3.0, 3.2.2.3.2).
pub struct ConfigPorts {
    root: SharedRoot,
    address: u32,
}

impl ConfigPorts {
    /// Ports in front of `root`.
    pub fn new(root: SharedRoot) -> Self {
        Self { root, address: 0 }
    }

    fn target(&self, offset: u64) -> Option<Address> {
        if self.address & (1 << 31) == 0 {
            return None;
        }
        let [register, function, bus, _] = self.address.to_le_bytes();
        Some(Address {
            bus,
            device: function >> 3,
            function: function & 7,
            register: usize::from(register & 0xfc) + usize::try_from(offset & 3).ok()?,
        })
    }
}

impl BusDevice for ConfigPorts {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        match (offset, data.len()) {
            (0, 4) => data.copy_from_slice(&self.address.to_le_bytes()),
            (4..8, 1 | 2 | 4) => {
                if let Some(address) = self.target(offset) {
                    read(&self.root, address, data);
                }
            }
            _ => {}
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        match (offset, data) {
            (0, &[a, b, c, d]) => self.address = u32::from_le_bytes([a, b, c, d]),
            (4..8, _) => {
                if let Some(address) = self.target(offset) {
                    write(&self.root, address, data);
                }
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const WINDOWS: Windows = Windows {
        low: Range {
            start: 0xc000_0000,
            size: 0x2000_0000,
        },
        high: Range {
            start: 0x1_0000_0000,
            size: 0x10_0000,
        },
    };

    struct Function {
        config: ConfigSpace,
        tag: u8,
        moves: Vec<(Option<u64>, Option<u64>)>,
        written: Vec<(u64, Vec<u8>)>,
    }

    impl PciFunction for Function {
        fn config(&self) -> &ConfigSpace {
            &self.config
        }
        fn config_mut(&mut self) -> &mut ConfigSpace {
            &mut self.config
        }
        fn read_bar(&mut self, _: usize, _: u64, data: &mut [u8]) {
            data.fill(self.tag);
        }
        fn write_bar(&mut self, _: usize, offset: u64, data: &[u8]) {
            self.written.push((offset, data.to_vec()));
        }
        fn bar_moved(&mut self, _: usize, from: Option<u64>, to: Option<u64>) {
            self.moves.push((from, to));
        }
    }

    fn function(tag: u8, size: u64) -> Arc<Mutex<Function>> {
        let mut config = ConfigSpace::new(Identity {
            vendor: 0x1af4,
            device: 0x1000 + u16::from(tag),
            revision: 0,
            class: 0xff_00_00,
            subsystem_vendor: 0,
            subsystem: 0,
        });
        config
            .add_bar(0, size, BarKind::Memory64 { prefetchable: true })
            .unwrap();
        Arc::new(Mutex::new(Function {
            config,
            tag,
            moves: Vec::new(),
            written: Vec::new(),
        }))
    }

    struct Machine {
        mmio: Arc<Bus>,
        ecam: Ecam,
        root: SharedRoot,
    }

    fn machine() -> Machine {
        let mmio = Arc::<Bus>::default();
        let root = Arc::new(Mutex::new(PciRoot::new(mmio.clone(), WINDOWS)));
        Machine {
            mmio,
            ecam: Ecam(root.clone()),
            root,
        }
    }

    impl Machine {
        fn write(&mut self, device: u64, register: usize, data: &[u8]) {
            let register = u64::try_from(register).unwrap();
            self.ecam.write((device << 15) + register, data);
        }
        fn decode(&mut self, device: u64, on: bool) {
            self.write(device, COMMAND, &[if on { 2 } else { 0 }, 0]);
        }
        fn place(&mut self, device: u64, address: u64) {
            let [a, b, c, d, e, f, g, h] = address.to_le_bytes();
            self.write(device, BAR0, &[a, b, c, d]);
            self.write(device, BAR0 + 4, &[e, f, g, h]);
        }
        fn read(&self, address: u64) -> u8 {
            let mut data = [0];
            self.mmio.read(address, &mut data);
            data[0]
        }
    }

    #[test]
    fn a_bar_answers_where_and_while_it_is_decoded() {
        let mut m = machine();
        let f = function(7, 0x1000);
        assert_eq!(m.root.lock().unwrap().add(f.clone()).unwrap(), (1, 0));
        assert_eq!(m.read(0x1_0000_0000), 0xff);
        m.decode(1, true);
        assert_eq!(m.read(0x1_0000_0000), 7);
        m.mmio.write(0x1_0000_0010, &[1, 2]);
        assert_eq!(f.lock().unwrap().written, [(0x10, vec![1, 2])]);
        m.place(1, 0xc100_0000);
        assert_eq!(m.read(0x1_0000_0000), 0xff);
        assert_eq!(m.read(0xc100_0fff), 7);
        m.decode(1, false);
        assert_eq!(m.read(0xc100_0000), 0xff);
        let moves = std::mem::take(&mut f.lock().unwrap().moves);
        assert_eq!(moves.first(), Some(&(None, Some(0x1_0000_0000))));
        assert_eq!(moves.last(), Some(&(Some(0xc100_0000), None)));
        for pair in moves.windows(2) {
            assert!(
                pair[0].1.is_none() || pair[1].0 == pair[0].1,
                "{moves:x?}: left before it enters elsewhere"
            );
        }
    }

    #[test]
    fn bars_on_top_of_each_other_or_outside_wait() {
        let mut m = machine();
        for tag in [1, 2] {
            m.root.lock().unwrap().add(function(tag, 0x1000)).unwrap();
            m.decode(tag.into(), true);
        }
        m.place(2, 0x1_0000_0000);
        assert_eq!(m.read(0x1_0000_0000), 1);
        m.place(1, 0x1_0000_8000);
        assert_eq!(m.read(0x1_0000_8000), 1);
        assert_eq!(m.read(0x1_0000_0000), 2, "its place is free now");
        for nonsense in [0, 0xfee0_0000, 0x9_0000_0000, u64::MAX, 0xbfff_f000] {
            m.place(2, nonsense);
            assert_eq!(m.read(nonsense & !0xfff), 0xff, "{nonsense:#x}");
        }
    }

    #[test]
    fn a_function_that_is_busy_does_not_hold_up_the_bus() {
        let mut m = machine();
        let functions = [1, 2].map(|tag| function(tag, 0x1000));
        for f in &functions {
            m.root.lock().unwrap().add(f.clone()).unwrap();
        }
        m.decode(1, true);
        let busy = functions[0].lock().unwrap();
        let (done, is_done) = std::sync::mpsc::channel();
        let bus = m.mmio.clone();
        std::thread::spawn(move || {
            m.decode(2, true);
            m.place(2, 0xc000_0000);
            done.send(()).unwrap();
        });
        let limit = std::time::Duration::from_secs(20);
        is_done.recv_timeout(limit).unwrap();
        drop(busy);
        let mut data = [0];
        assert!(bus.read(0xc000_0000, &mut data));
        assert_eq!(data, [2]);
    }

    #[test]
    fn the_windows_are_finite() {
        let mut m = machine();
        let add = |tag, size| m.root.lock().unwrap().add(function(tag, size));
        assert!(add(1, 1 << 40).is_err());
        for n in 0..31 {
            assert_eq!(add(1, 0x10_0000).unwrap(), (n + 1, 0));
        }
        let mut header = |place: u64| {
            let mut data = [0];
            m.ecam.read((place << 12) + 0x0e, &mut data);
            data
        };
        assert_eq!([header(8), header(9)], [[0], [0xff]]);
        assert_eq!(add(2, 0x1000).unwrap(), (1, 1));
        assert_eq!([header(8), header(9), header(16)], [[0x80], [0], [0]]);
        for _ in 32..31 * 8 {
            add(1, 0x1000).unwrap();
        }
        assert!(matches!(add(1, 16), Err(Error::NoSlot)));
    }

    #[test]
    fn both_mechanisms_reach_the_same_registers() {
        let mut m = machine();
        m.root.lock().unwrap().add(function(3, 0x1000)).unwrap();
        let mut ports = ConfigPorts::new(m.root.clone());
        let mut data = [0xff; 4];
        ports.read(4, &mut data);
        assert_eq!(data, [0xff; 4], "not enabled");
        ports.write(0, &0x8000_0800_u32.to_le_bytes());
        ports.read(4, &mut data);
        assert_eq!(u32::from_le_bytes(data), 0x1003_1af4);
        let mut half = [0; 2];
        ports.read(6, &mut half);
        assert_eq!(u16::from_le_bytes(half), 0x1003);
        m.ecam.read(1 << 15, &mut data);
        assert_eq!(u32::from_le_bytes(data), 0x1003_1af4);
        for nobody in [2 << 15, (1 << 15) + (1 << 12), 1 << 20] {
            m.ecam.read(nobody, &mut data);
            assert_eq!(data, [0xff; 4]);
        }
        // Only whole double words reach the address port.
        ports.write(1, &[6]);
        ports.write(0, &[1, 2]);
        ports.read(0, &mut data);
        assert_eq!(u32::from_le_bytes(data), 0x8000_0800);
    }

    proptest! {
        #[test]
        fn hostile_configuration_leaves_the_bus_consistent(
            writes in prop::collection::vec(
                (0..4u64, 0..0x48u64, prop::collection::vec(any::<u8>(), 1..9)), 0..200)
        ) {
            let mut m = machine();
            let functions: Vec<_> = (1..4).map(|tag| function(tag, 0x1000)).collect();
            for f in &functions {
                m.root.lock().unwrap().add(f.clone()).unwrap();
            }
            for (device, register, data) in writes {
                m.ecam.write((device << 15) + register, &data);
            }
            for f in &functions {
                let (mut at, tag) = (None, f.lock().unwrap().tag);
                for (from, to) in &f.lock().unwrap().moves {
                    prop_assert_eq!(*from, at);
                    at = *to;
                }
                if let Some(at) = at {
                    prop_assert_eq!(m.read(at), tag);
                    prop_assert_eq!(f.lock().unwrap().config.decoded_bar(0), Some(at));
                }
            }
        }
    }
}

//! The host bridge: bus 0 with its functions, root ports with one function behind each, the two ways of reaching their
//! configuration space, and the windows in which their BARs answer.
//!
//! ```text
//! ports 0xcf8/0xcfc ─▶ ConfigPorts ─┐
//!                                   ├─▶ PciRoot ─▶ function.write_config
//! ECAM window ───────▶ Ecam ────────┘       │
//!                                           └─▶ BARs moved: MMIO bus, function.bar_moved
//! MMIO bus ──────────▶ BarRange ────────────────▶ function.read_bar / write_bar
//! ```
//!
//! Locks are taken in that order, bridge before function, and a function never calls the bridge. A function that leaves its
//! slot is handed to whoever asked for it ([`PciRoot::on_departure`]) without any lock.
//! An access to a function's registers holds the function's lock only.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use ringside_control::Chain;

use super::bits::*;
use super::config::{Bar, BarKind, ConfigSpace, Identity};
use super::port::{self, Forwarded, RootPort};
use super::{FunctionState, InterruptRouting, PciFunction};
use crate::bus::{Bus, BusDevice};
use crate::layout::{FIRST_PCI_GSI, PCI_GSIS, Range};
use crate::snapshot::{self, dirty::DirtyLog};

/// Why a function cannot be plugged in.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// All functions of all devices of bus 0 are taken.
    #[error("the PCI bus is full: it has room for {} devices", 31 * 8)]
    NoSlot,
    /// A root port cannot be made.
    #[error("cannot add a root port")]
    Port(#[from] port::Error),
    /// All slots have a device.
    #[error(
        "no hot-plug slot is free: start with more of them (--hotplug-ports), or remove a device first"
    )]
    NoFreePort,
    /// A device has left, and its slot cannot take the next one yet.
    #[error(
        "the guest has not finished with the device that left the slot: wait, or start with more slots (--hotplug-ports)"
    )]
    Unfinished,
    /// Nothing is there.
    #[error("the slot is empty")]
    Empty,
    /// The guest was asked before.
    #[error(
        "the guest was already asked to let go of the device, and has not done so yet: wait, or remove it by force"
    )]
    AskedBefore,
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

/// Whether a range is inside a window.
fn inside(window: Range, address: u64, size: u64) -> bool {
    let end = address.checked_add(size);
    address >= window.start && end.is_some_and(|end| end <= window.end())
}

/// The addresses that reach a function.
#[derive(Clone, Copy)]
struct Reach {
    windows: Windows,
    /// What the port before it forwards, if there is one.
    forwarded: Option<Forwarded>,
}

impl Reach {
    fn contains(&self, address: u64, size: u64) -> bool {
        let [low, high] = [self.windows.low, self.windows.high];
        let in_windows = inside(low, address, size) || inside(high, address, size);
        in_windows
            && self.forwarded.is_none_or(|forwarded| {
                [forwarded.low, forwarded.prefetchable]
                    .into_iter()
                    .flatten()
                    .any(|window| inside(window, address, size))
            })
    }
}

/// BARs do not share pages: one that is mapped into the guest takes whole pages.
const PAGE: u64 = 4096;

/// A function as its bus and its owner share it.
pub type SharedFunction = Arc<Mutex<dyn PciFunction>>;

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

/// Device and function number on bus 0.
type Place = (u8, u8);

/// Where a function is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Where {
    /// On bus 0.
    Root(Place),
    /// The only function behind a port.
    Behind(PortId),
}

/// Names a root port, by its place on bus 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct PortId(Place);

struct Port {
    port: Arc<Mutex<RootPort>>,
    forwarded: Forwarded,
}

/// Called with a function that has left its slot.
pub type Departure = Arc<dyn Fn(PortId, SharedFunction) + Send + Sync>;

/// Bus 0 and what is on it.
pub struct PciRoot {
    mmio: Arc<Bus>,
    windows: Windows,
    /// First addresses of the windows that nothing was placed at yet.
    next_low: u64,
    next_high: u64,
    /// Functions but the first of a device are those of a crowded bus.
    slots: BTreeMap<Where, Slot>,
    ports: BTreeMap<PortId, Port>,
    departure: Option<Departure>,
}

/// The bridge as its users share it.
pub type SharedRoot = Arc<Mutex<PciRoot>>;

/// A port forwards at least so much below 4 GiB, for what may be plugged in later.
const PORT_LOW: u64 = 2 << 20;
/// The same for prefetchable memory, as long as there is room.
const PORT_PREFETCHABLE: u64 = 8 << 30;
/// Windows of ports are in units of 1 MiB (PCI Express 5.0, 7.5.1.3.8).
const PORT_UNIT: u64 = 1 << 20;

/// GSIs of a device's pins A to D, as the ACPI tables tell the guest. The pins of a device behind a port are those of the
/// port's device: as the only one of its bus it has number 0, by which nothing is swizzled (PCI-to-PCI Bridge 1.2, 9.1).
pub fn pin_gsis(device: u8) -> [u32; 4] {
    std::array::from_fn(|pin| {
        let pin = u32::try_from(pin).unwrap_or(0);
        FIRST_PCI_GSI + (u32::from(device) + pin) % PCI_GSIS
    })
}

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
            slots: BTreeMap::from([(Where::Root((0, 0)), slot)]),
            ports: BTreeMap::new(),
            departure: None,
        }
    }

    /// From now on `departure` is called with each function that has left its slot.
    pub fn on_departure(&mut self, departure: Departure) {
        self.departure = Some(departure);
    }

    /// Plugs a function into the next free place of bus 0 and places its BARs, as firmware would do; memory decoding stays
    /// off until the guest turns it on. When all devices have their function 0, they get further ones. Returns device
    /// and function number.
    pub fn add(&mut self, function: SharedFunction) -> Result<(u8, u8), Error> {
        let place = self.free_place()?;
        self.place_bars(&function, None)?;
        lock(&function).plugged(pin_gsis(place.0));
        self.occupy(place, function);
        Ok(place)
    }

    /// Adds a root port with a slot, and with a function in it if there is one. The port forwards what the function needs, or
    /// what is likely for one that is plugged in later.
    pub fn add_port(
        &mut self,
        routing: Arc<dyn InterruptRouting>,
        function: Option<SharedFunction>,
    ) -> Result<PortId, Error> {
        let place = self.free_place()?;
        let forwarded = self.reserve(function.as_ref())?;
        // Bus and slot numbers: bus 0 is the root bus.
        let number = u8::try_from(self.ports.len() + 1).map_err(|_| Error::NoSlot)?;
        let port = Arc::new(Mutex::new(RootPort::new(routing, number, forwarded)?));
        self.occupy(place, Arc::clone(&port) as SharedFunction);
        let id = PortId(place);
        self.ports.insert(id, Port { port, forwarded });
        if let Some(function) = function {
            self.put(id, function)?;
            if let Some(port) = self.ports.get(&id) {
                lock(&port.port).plug_cold();
            }
        }
        Ok(id)
    }

    /// A port with nothing in its slot, which the guest expects to be filled at any time.
    pub fn free_port(&self) -> Result<PortId, Error> {
        let now = Instant::now();
        let empty = |id: &PortId| !self.slots.contains_key(&Where::Behind(*id));
        let mut empty = self.ports.iter().filter(|(id, _)| empty(id)).peekable();
        if empty.peek().is_none() {
            return Err(Error::NoFreePort);
        }
        let free = empty.find(|(_, port)| lock(&port.port).is_free(now));
        free.map(|(id, _)| *id).ok_or(Error::Unfinished)
    }

    /// Puts a function into the slot of a [free](Self::free_port) port while the guest runs.
    pub fn plug(&mut self, id: PortId, function: SharedFunction) -> Result<(), Error> {
        let port = Arc::clone(&self.ports.get(&id).ok_or(Error::NoFreePort)?.port);
        self.put(id, function)?;
        lock(&port).plug();
        self.update(Where::Behind(id));
        Ok(())
    }

    /// Whether the guest was asked to let go of the function in a slot.
    pub fn removal_asked(&self, id: PortId) -> bool {
        let port = self.ports.get(&id);
        port.is_some_and(|port| lock(&port.port).removal_asked())
    }

    fn free_place(&self) -> Result<Place, Error> {
        (0..8)
            .flat_map(|function| (1..32).map(move |device| (device, function)))
            .find(|place| !self.slots.contains_key(&Where::Root(*place)))
            .ok_or(Error::NoSlot)
    }

    fn occupy(&mut self, place: Place, function: SharedFunction) {
        self.slots.insert(Where::Root(place), Slot::new(function));
        if place.1 != 0
            && let Some(first) = self.slots.get(&Where::Root((place.0, 0)))
        {
            let mut first = lock(&first.function);
            let layout = first.config().u16(HEADER_TYPE).to_le_bytes()[0];
            first
                .config_mut()
                .set(HEADER_TYPE, &[layout | HEADER_MULTI_FUNCTION]);
        }
    }

    /// Puts a function behind a port.
    fn put(&mut self, id: PortId, function: SharedFunction) -> Result<(), Error> {
        let forwarded = self.ports.get(&id).ok_or(Error::NoFreePort)?.forwarded;
        if self.slots.contains_key(&Where::Behind(id)) {
            return Err(Error::NoFreePort);
        }
        self.place_bars(&function, Some(forwarded))?;
        lock(&function).plugged(pin_gsis(id.0.0));
        self.slots.insert(Where::Behind(id), Slot::new(function));
        Ok(())
    }

    /// Gives a function's BARs addresses: inside what a port forwards, or anywhere.
    fn place_bars(
        &mut self,
        function: &SharedFunction,
        forwarded: Option<Forwarded>,
    ) -> Result<(), Error> {
        let mut function = lock(function);
        let start = |window: Option<Range>| window.map_or(0, |window| window.start);
        let (mut low, mut prefetchable) = match forwarded {
            Some(windows) => (start(windows.low), start(windows.prefetchable)),
            None => (0, 0),
        };
        for (index, bar) in by_size(function.config()) {
            let address = match forwarded {
                None => self.place(bar)?,
                Some(windows) => {
                    let (next, window) = if is_prefetchable(bar) && windows.prefetchable.is_some() {
                        (&mut prefetchable, windows.prefetchable)
                    } else {
                        (&mut low, windows.low)
                    };
                    let fits = fit(*next, bar.size, window.unwrap_or(EMPTY));
                    let address = fits.ok_or(Error::NoRoom { size: bar.size })?;
                    *next = address + bar.size;
                    address
                }
            };
            function.config_mut().place_bar(index, address);
        }
        Ok(())
    }

    /// Takes from the windows what a new port forwards.
    fn reserve(&mut self, function: Option<&SharedFunction>) -> Result<Forwarded, Error> {
        let (mut low, mut prefetchable) = (0u64, 0u64);
        let mut largest = [PORT_UNIT; 2];
        if let Some(function) = function {
            for (_, bar) in by_size(lock(function).config()) {
                let wide = is_prefetchable(bar);
                let sum = if wide { &mut prefetchable } else { &mut low };
                *sum = sum.saturating_add(bar.size.max(PAGE));
                if let Some(largest) = largest.get_mut(usize::from(wide)) {
                    *largest = bar.size.max(*largest);
                }
            }
        }
        let [low_alignment, alignment] = largest;
        let whole = |size: u64| size.checked_next_multiple_of(PORT_UNIT).unwrap_or(u64::MAX);
        let low = whole(low.max(PORT_LOW));
        let start = aligned(self.next_low, low, low_alignment, self.windows.low)
            .ok_or(Error::NoRoom { size: low })?;
        self.next_low = start + low;
        let low = Some(Range { start, size: low });

        let needed = whole(prefetchable);
        let wanted = needed.max(PORT_PREFETCHABLE);
        let place = |size| aligned(self.next_high, size, alignment, self.windows.high);
        let window = match (place(wanted), place(needed)) {
            (Some(start), _) => Some(Range {
                start,
                size: wanted,
            }),
            (None, Some(start)) if needed > 0 => Some(Range {
                start,
                size: needed,
            }),
            _ if needed > 0 => return Err(Error::NoRoom { size: needed }),
            _ => None,
        };
        if let Some(window) = window {
            self.next_high = window.end();
        }
        Ok(Forwarded {
            low,
            prefetchable: window,
        })
    }

    /// The functions of the bus, in order, each with a name for messages.
    fn functions(&self) -> Vec<(Where, String, SharedFunction)> {
        let name = |at: &Where| match at {
            Where::Root((device, function)) => format!("0:{device:02x}.{function}"),
            Where::Behind(PortId((device, _))) => format!("behind 0:{device:02x}.0"),
        };
        let slots = self.slots.iter();
        slots
            .map(|(at, slot)| (*at, name(at), Arc::clone(&slot.function)))
            .collect()
    }

    /// Number of root ports.
    pub fn port_count(&self) -> usize {
        self.ports.len()
    }

    /// Takes all functions off the bus and drops them.
    pub fn remove_all(&mut self) {
        self.ports.clear();
        for slot in std::mem::take(&mut self.slots).values() {
            for address in slot.mapped.iter().flatten() {
                if let Err(error) = self.mmio.remove(*address) {
                    tracing::error!(%error, "cannot unmap a BAR");
                }
            }
        }
    }

    fn place(&mut self, bar: Bar) -> Result<u64, Error> {
        let size = bar.size;
        let wide = matches!(bar.kind, BarKind::Memory64 { .. });
        if let Some(start) = fit(self.next_high, size, self.windows.high).filter(|_| wide) {
            self.next_high = start + size;
            return Ok(start);
        }
        let start = fit(self.next_low, size, self.windows.low).ok_or(Error::NoRoom { size })?;
        self.next_low = start + size;
        Ok(start)
    }

    /// Where the function at an address is, if it answers.
    fn find(&self, address: Address) -> Option<Where> {
        if address.bus == 0 {
            let at = Where::Root((address.device, address.function));
            return self.slots.contains_key(&at).then_some(at);
        }
        // Behind a port there is one device, and of it one function.
        if (address.device, address.function) != (0, 0) {
            return None;
        }
        let leads_there = |port: &Port| {
            let port = lock(&port.port);
            port.secondary_bus() == address.bus && port.is_on()
        };
        let (id, _) = self.ports.iter().find(|(_, port)| leads_there(port))?;
        Some(Where::Behind(*id))
    }

    fn function(&self, at: Where) -> Option<SharedFunction> {
        Some(Arc::clone(&self.slots.get(&at)?.function))
    }

    fn port(&self, at: Where) -> Option<Arc<Mutex<RootPort>>> {
        let Where::Root(place) = at else { return None };
        Some(Arc::clone(&self.ports.get(&PortId(place))?.port))
    }

    /// Makes the MMIO bus agree with what a function decodes. A BAR that overlaps another waits
    /// until that one moves, so that two can swap places; one that is outside the windows answers
    /// nowhere. Functions that have no BAR to move are left alone: one of them may be waiting for
    /// its back-end.
    fn update(&mut self, at: Where) {
        let reach = self.reach(at);
        let Some(slot) = self.slots.get_mut(&at) else {
            return;
        };
        for bar in 0..DECODER_COUNT {
            slot.unmap_if_moved(bar, &self.mmio, Some(&reach));
        }
        for bar in 0..DECODER_COUNT {
            slot.map(bar, &self.mmio, &reach);
        }
        self.map_waiting();
    }

    /// Maps the BARs that waited for another one to go, if it has gone.
    fn map_waiting(&mut self) {
        let waiting = |(at, slot): (&Where, &Slot)| slot.waiting.contains(&true).then_some(*at);
        for at in self.slots.iter().filter_map(waiting).collect::<Vec<_>>() {
            let reach = self.reach(at);
            let Some(slot) = self.slots.get_mut(&at) else {
                continue;
            };
            for bar in 0..DECODER_COUNT {
                if slot.waiting.get(bar) == Some(&true) {
                    slot.map(bar, &self.mmio, &reach);
                }
            }
        }
    }

    fn reach(&self, at: Where) -> Reach {
        let forwarded = match at {
            Where::Root(_) => None,
            Where::Behind(id) => self.ports.get(&id).map(|p| lock(&p.port).forwarded()),
        };
        Reach {
            windows: self.windows,
            forwarded,
        }
    }

    /// Takes the function behind a port off the buses.
    fn take(&mut self, id: PortId) -> Option<SharedFunction> {
        let mut slot = self.slots.remove(&Where::Behind(id))?;
        for bar in 0..DECODER_COUNT {
            slot.unmap_if_moved(bar, &self.mmio, None);
        }
        self.map_waiting();
        if let Some(port) = self.ports.get(&id) {
            lock(&port.port).unplug();
        }
        Some(slot.function)
    }
}

/// Asks the guest to let go of the function in a slot. It leaves when the guest has turned the slot's power off, at once if it
/// is off. A guest that is slow, or has no driver for the slot, can take as long as it likes; it is asked again only if it has
/// seen the request and decided otherwise, or does not react for a while.
pub fn request_unplug(root: &SharedRoot, id: PortId) -> Result<(), Error> {
    {
        let root = lock(root);
        let port = root.ports.get(&id).ok_or(Error::Empty)?;
        if !root.slots.contains_key(&Where::Behind(id)) {
            return Err(Error::Empty);
        }
        let mut port = lock(&port.port);
        if port.removal_is_under_way(Instant::now()) {
            return Err(Error::AskedBefore);
        }
        port.ask_for_removal();
    }
    slot_changed(root, id);
    Ok(())
}

/// Takes a function out of its slot without asking the guest, which is told that it is gone.
pub fn surprise_remove(root: &SharedRoot, id: PortId) {
    let (function, departure) = {
        let mut root = lock(root);
        (root.take(id), root.departure.clone())
    };
    depart(id, function, departure);
}

/// Resets the function in a slot.
fn reset(root: &SharedRoot, id: PortId) {
    let function = lock(root).function(Where::Behind(id));
    if let Some(function) = function {
        lock(&function).reset();
    }
}

/// Stops all functions for a while; tells what is needed to go on elsewhere, in order. To be followed by [`resume`], whether or
/// not it succeeds. The processors are out of the guest, so nobody else has a function's lock for long.
///
/// # Errors
/// [`snapshot::Error::Unsaved`]
pub fn suspend(root: &SharedRoot) -> Result<Vec<FunctionState>, snapshot::Error> {
    let functions = lock(root).functions();
    let states = functions.into_iter().map(|(_, device, function)| {
        let state = lock(&function).suspend();
        state.map_err(|error| snapshot::Error::Unsaved {
            device,
            why: Chain(&*error).to_string(),
        })
    });
    states.collect()
}

/// Lets all functions go on.
pub fn resume(root: &SharedRoot) {
    let functions = lock(root).functions();
    for (_, _, function) in functions {
        lock(&function).resume();
    }
}

/// Has all functions note in `log` which pages they write; without one, no longer.
///
/// # Errors
/// [`snapshot::Error::Unsaved`]
pub fn track(root: &SharedRoot, log: Option<&Arc<DirtyLog>>) -> Result<(), snapshot::Error> {
    let functions = lock(root).functions();
    functions.into_iter().try_for_each(|(_, device, function)| {
        let tracked = lock(&function).track(log);
        tracked.map_err(|error| snapshot::Error::Unsaved {
            device,
            why: Chain(&*error).to_string(),
        })
    })
}

/// Has all functions take over the state of those of another process, and be suspended as they were.
///
/// # Errors
/// [`snapshot::Error::Device`]
pub fn restore(root: &SharedRoot, states: &[FunctionState]) -> Result<(), snapshot::Error> {
    let functions = lock(root).functions();
    if functions.len() != states.len() {
        return Err(snapshot::Error::Damaged);
    }
    for ((at, device, function), state) in functions.into_iter().zip(states) {
        let restored = lock(&function).restore(state);
        restored.map_err(|error| snapshot::Error::Device {
            device,
            why: Chain(&*error).to_string(),
        })?;
        lock(root).update(at);
    }
    Ok(())
}

/// Does what a port's registers say about the function in its slot.
fn slot_changed(root: &SharedRoot, id: PortId) {
    let (function, departure) = {
        let mut root = lock(root);
        let port = root.ports.get(&id);
        let function = if port.is_some_and(|port| lock(&port.port).lets_go()) {
            root.take(id)
        } else {
            root.update(Where::Behind(id));
            None
        };
        (function, root.departure.clone())
    };
    depart(id, function, departure);
}

fn depart(id: PortId, function: Option<SharedFunction>, departure: Option<Departure>) {
    if let (Some(function), Some(departure)) = (function, departure) {
        departure(id, function);
    }
}

/// No window.
const EMPTY: Range = Range { start: 0, size: 0 };

/// BARs that a port may forward as prefetchable: those that can be above 4 GiB (PCI Express 5.0, 7.5.1.3.9).
fn is_prefetchable(bar: Bar) -> bool {
    matches!(bar.kind, BarKind::Memory64 { prefetchable: true })
}

/// A function's BARs, the largest first, so that no gaps are left between them.
fn by_size(config: &ConfigSpace) -> Vec<(usize, Bar)> {
    let mut bars: Vec<_> = (0..DECODER_COUNT)
        .filter_map(|index| Some((index, config.bar(index)?)))
        .collect();
    bars.sort_by_key(|(_, bar)| std::cmp::Reverse(bar.size));
    bars
}

/// The first place for a BAR from `next` on.
fn fit(next: u64, size: u64, window: Range) -> Option<u64> {
    aligned(next, size, size.max(PAGE), window)
}

fn aligned(next: u64, size: u64, alignment: u64, window: Range) -> Option<u64> {
    let start = next.checked_next_multiple_of(alignment)?;
    (start.checked_add(size)? <= window.end()).then_some(start)
}

impl Slot {
    /// `reach` is `None` for a function that leaves.
    fn unmap_if_moved(&mut self, bar: usize, mmio: &Bus, reach: Option<&Reach>) {
        let Some(mapped) = self.mapped.get_mut(bar) else {
            return;
        };
        let mut function = lock(&self.function);
        let size = function.config().bar(bar).map_or(0, |bar| bar.size);
        let stays = |from| {
            function.config().decoded_bar(bar) == Some(from)
                && reach.is_some_and(|reach| reach.contains(from, size))
        };
        if let Some(from) = mapped.filter(|from| !stays(*from)) {
            if let Err(error) = mmio.remove(from) {
                tracing::error!(%error, "cannot unmap a BAR");
            }
            *mapped = None;
            function.bar_moved(bar, Some(from), None);
        }
    }

    fn map(&mut self, bar: usize, mmio: &Bus, reach: &Reach) {
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
        if !reach.contains(to, size) {
            tracing::debug!(
                address = format_args!("{to:#x}"),
                "BAR is where no window leads to it"
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

/// Locks what is usable also after a panic elsewhere.
pub(crate) fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Reads configuration registers. The bus is not locked while the function works, so one that
/// waits for its back-end holds up nobody else.
fn read(root: &SharedRoot, address: Address, data: &mut [u8]) {
    data.fill(0xff);
    let function = {
        let root = lock(root);
        root.find(address).and_then(|at| root.function(at))
    };
    if let Some(function) = function {
        lock(&function).read_config(address.register, data);
    }
}

/// Writes configuration registers, and moves BARs if that is what was written.
fn write(root: &SharedRoot, address: Address, data: &[u8]) {
    let (at, function, port) = {
        let root = lock(root);
        let Some(at) = root.find(address) else { return };
        (at, root.function(at), root.port(at))
    };
    if let (Some(port), Where::Root(place)) = (port, at) {
        // Its own block: the port is not locked any more when the bridge is.
        let (changed, starts_anew) = {
            let mut port = lock(&port);
            let (was_on, held) = (port.is_on(), port.holds_reset());
            let changed = port.write(address.register, data);
            let released = held && !port.holds_reset();
            (changed, port.is_on() && (released || !was_on))
        };
        let id = PortId(place);
        if starts_anew {
            reset(root, id);
        }
        if changed || starts_anew {
            slot_changed(root, id);
        }
        return;
    }
    let Some(function) = function else { return };
    let moved = {
        let mut function = lock(&function);
        let before = decoded(function.config());
        function.write_config(address.register, data);
        decoded(function.config()) != before
    };
    if moved {
        lock(root).update(at);
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
    /// The address port.
    pub fn address(&self) -> u32 {
        self.address
    }

    /// Sets the address port.
    pub fn set_address(&mut self, address: u32) {
        self.address = address;
    }

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
    use crate::pci::msix::tests::FakeKvm;
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
        resets: u32,
        written: Vec<(u64, Vec<u8>)>,
    }

    impl PciFunction for Function {
        fn config(&self) -> &ConfigSpace {
            &self.config
        }
        fn config_mut(&mut self) -> &mut ConfigSpace {
            &mut self.config
        }
        fn reset(&mut self) {
            self.resets += 1;
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
            resets: 0,
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

    /// A port on a machine, as the guest's driver for it sees it.
    struct Slotted {
        machine: Machine,
        id: PortId,
        kvm: Arc<FakeKvm>,
        departed: Arc<Mutex<Vec<SharedFunction>>>,
    }

    /// Where the capability of a port is.
    const EXPRESS: u64 = 0x40;

    fn slotted(function: Option<SharedFunction>) -> Slotted {
        let (machine, kvm) = (machine(), Arc::new(FakeKvm::default()));
        let departed = Arc::<Mutex<Vec<_>>>::default();
        let seen = departed.clone();
        let id = {
            let mut root = machine.root.lock().unwrap();
            root.on_departure(Arc::new(move |_, function| {
                seen.lock().unwrap().push(function);
            }));
            root.add_port(kvm.clone(), function).unwrap()
        };
        Slotted {
            machine,
            id,
            kvm,
            departed,
        }
    }

    impl Slotted {
        fn u16(&mut self, register: u64) -> u16 {
            let mut data = [0; 2];
            self.machine.ecam.read((1 << 15) + register, &mut data);
            u16::from_le_bytes(data)
        }
        fn set(&mut self, register: u64, value: u16) {
            let at = (1 << 15) + register;
            self.machine.ecam.write(at, &value.to_le_bytes());
        }
        /// Vendor and device ID behind the port.
        fn id_on(&mut self, bus: u64) -> u32 {
            let mut data = [0; 4];
            self.machine.ecam.read(bus << 20, &mut data);
            u32::from_le_bytes(data)
        }
        fn status(&mut self) -> u16 {
            self.u16(EXPRESS + SLOT_STATUS as u64)
        }
        fn control(&mut self, value: u16) {
            self.set(EXPRESS + SLOT_CONTROL as u64, value);
        }
        fn link_is_active(&mut self) -> bool {
            self.u16(EXPRESS + LINK_STATUS as u64) & LINK_ACTIVE != 0
        }
        /// Enables the port's MSI, and its events as the driver does.
        fn listen(&mut self, power: u16) {
            let msi = u64::from(self.u16(EXPRESS) >> 8);
            self.set(msi + 4, 0x1000);
            self.set(msi + 6, 0xfee0);
            self.set(msi + 2, MSI_64_BIT | MSI_ENABLE);
            self.control(LISTEN | power);
        }
        /// Turns memory decoding of the function on; gives its BAR's address.
        fn decode(&mut self, function: &Mutex<Function>) -> u64 {
            let at = (1 << 20) + COMMAND as u64;
            self.machine.ecam.write(at, &COMMAND_MEMORY.to_le_bytes());
            function.lock().unwrap().config.bar_address(0).unwrap()
        }
        fn ask(&self) -> Result<(), Error> {
            request_unplug(&self.machine.root, self.id)
        }
        fn departed(&self) -> usize {
            self.departed.lock().unwrap().len()
        }
        fn port(&self) -> Arc<Mutex<RootPort>> {
            lock(&self.machine.root).ports[&self.id].port.clone()
        }
        fn interrupts(&self) -> usize {
            // The port writes to its eventfd; in KVM an irqfd would take it.
            let port = self.port();
            let port = lock(&port);
            let events = port.interrupt_events();
            events.iter().filter(|event| event.read().is_ok()).count()
        }
    }

    /// As Linux has it where there is a button: presence does not interrupt.
    const LISTEN: u16 = SLOT_BUTTON_PUSHED | SLOT_INTERRUPT_ENABLE | SLOT_LINK_CHANGED_ENABLE;

    #[test]
    fn a_function_plugged_before_the_start_answers_behind_its_port() {
        let f = function(7, 0x1000);
        let mut s = slotted(Some(f.clone()));
        assert_eq!(s.id_on(1), 0x1007_1af4);
        assert_eq!(s.status(), SLOT_PRESENT);
        assert!(s.link_is_active());
        let at = f.lock().unwrap().config.bar_address(0).unwrap();
        let [base, limit] = [0, 2].map(|half| {
            let lower = u64::from(s.u16(PREFETCHABLE_BASE as u64 + half) & 0xfff0) << 16;
            let upper = u64::from(s.u16(PREFETCHABLE_BASE as u64 + 4 + 2 * half));
            upper << 32 | lower
        });
        let inside = base <= at && at < limit + 0x10_0000;
        assert!(inside, "{base:x} {limit:x} {at:x}");
        s.machine.ecam.write((1 << 20) + COMMAND as u64, &[2, 0]);
        assert_eq!(s.machine.read(at), 7);
        // The guest numbers buses as it likes.
        s.set(PRIMARY_BUS as u64, 5 << 8);
        assert_eq!((s.id_on(1), s.id_on(5)), (u32::MAX, 0x1007_1af4));
        let mut ports = ConfigPorts::new(s.machine.root.clone());
        ports.write(0, &0x8005_0000_u32.to_le_bytes());
        let mut data = [0; 4];
        ports.read(4, &mut data);
        assert_eq!(u32::from_le_bytes(data), 0x1007_1af4);
        for nobody in [(5 << 20) + (1 << 15), (5 << 20) + (1 << 12)] {
            s.machine.ecam.read(nobody, &mut data);
            assert_eq!(data, [0xff; 4]);
        }
    }

    #[test]
    fn a_function_comes_and_goes_while_the_guest_runs() {
        let mut s = slotted(None);
        assert_eq!((s.status(), s.link_is_active()), (0, false));
        s.listen(SLOT_POWER_OFF | SLOT_INDICATORS_OFF);
        lock(&s.port()).pass_time();
        let f = function(7, 0x1000);
        let plug = |s: &Slotted| {
            let mut root = s.machine.root.lock().unwrap();
            let free = root.free_port()?;
            root.plug(free, f.clone())
        };
        plug(&s).unwrap();
        assert!(matches!(plug(&s), Err(Error::NoFreePort)));
        let events = SLOT_PRESENCE_CHANGED | SLOT_BUTTON_PUSHED;
        assert_eq!(s.status(), SLOT_PRESENT | events);
        assert_eq!(s.interrupts(), 1);
        assert_eq!(s.id_on(1), u32::MAX, "its power is off");
        s.set(EXPRESS + SLOT_STATUS as u64, events);
        s.control(LISTEN);
        assert!(s.link_is_active());
        assert_eq!(s.status(), SLOT_PRESENT | SLOT_LINK_CHANGED);
        s.set(EXPRESS + SLOT_STATUS as u64, SLOT_LINK_CHANGED);
        assert_eq!(s.id_on(1), 0x1007_1af4);
        let at = s.decode(&f);
        assert_eq!(s.machine.read(at), 7);
        s.interrupts();

        s.ask().unwrap();
        assert!(matches!(s.ask(), Err(Error::AskedBefore)));
        assert_eq!(s.status(), SLOT_PRESENT | SLOT_BUTTON_PUSHED);
        assert_eq!(s.interrupts(), 1);
        s.set(EXPRESS + SLOT_STATUS as u64, SLOT_BUTTON_PUSHED);
        assert_eq!(s.machine.read(at), 7, "until the guest lets go");
        s.control(LISTEN | SLOT_POWER_OFF);
        assert_eq!(s.departed(), 1);
        assert_eq!(s.machine.read(at), 0xff);
        assert_eq!(s.status() & SLOT_PRESENT, 0);
        assert_eq!(f.lock().unwrap().moves.last(), Some(&(Some(at), None)));
        assert!(matches!(s.ask(), Err(Error::Empty)));
        assert!(matches!(plug(&s), Err(Error::Unfinished)));
        s.control(LISTEN | SLOT_POWER_OFF | SLOT_INDICATORS_OFF);
        assert!(matches!(plug(&s), Err(Error::Unfinished)), "only just");
        // The slot is free for the next one.
        lock(&s.port()).pass_time();
        plug(&s).unwrap();
        s.control(LISTEN);
        assert_eq!(s.id_on(1), 0x1007_1af4);
    }

    #[test]
    fn a_function_that_was_only_switched_off_can_be_switched_on_again() {
        let f = function(7, 0x1000);
        let mut s = slotted(Some(f.clone()));
        let at = s.decode(&f);
        s.listen(SLOT_POWER_OFF);
        assert_eq!((s.id_on(1), s.machine.read(at)), (u32::MAX, 0xff));
        assert!(s.departed.lock().unwrap().is_empty());
        s.listen(0);
        assert_eq!((s.id_on(1), s.machine.read(at)), (0x1007_1af4, 7));
    }

    #[test]
    fn a_guest_that_decides_otherwise_is_asked_again() {
        let mut s = slotted(Some(function(7, 0x1000)));
        s.listen(0);
        s.ask().unwrap();
        assert!(matches!(s.ask(), Err(Error::AskedBefore)), "not seen yet");
        s.set(EXPRESS + SLOT_STATUS as u64, SLOT_BUTTON_PUSHED);
        assert!(matches!(s.ask(), Err(Error::AskedBefore)), "just seen");
        s.control(LISTEN | SLOT_POWER_INDICATOR_BLINKS);
        assert!(
            matches!(s.ask(), Err(Error::AskedBefore)),
            "a second push would cancel it"
        );
        s.control(LISTEN | SLOT_POWER_INDICATOR_ON);
        assert_eq!(s.interrupts(), 1);
        s.ask().unwrap();
        assert_eq!(s.interrupts(), 1);
        assert_eq!(s.departed(), 0);
        s.control(LISTEN | SLOT_POWER_OFF);
        assert_eq!(s.departed(), 1);
    }

    #[test]
    fn a_function_leaves_a_slot_without_power_at_once() {
        let mut s = slotted(None);
        let plug = |s: &Slotted| {
            let mut root = s.machine.root.lock().unwrap();
            root.plug(s.id, function(7, 0x1000))
        };
        // A guest without a driver for slots has not even seen it.
        plug(&s).unwrap();
        s.ask().unwrap();
        assert_eq!((s.departed(), s.status() & SLOT_PRESENT), (1, 0));
        plug(&s).unwrap();
        s.listen(0);
        s.listen(SLOT_POWER_OFF);
        assert_eq!(s.departed(), 1, "nobody has asked");
        s.ask().unwrap();
        assert_eq!(s.departed(), 2);
    }

    #[test]
    fn events_from_before_interrupt_when_they_are_enabled() {
        let mut s = slotted(None);
        let plugged = s
            .machine
            .root
            .lock()
            .unwrap()
            .plug(s.id, function(7, 0x1000));
        plugged.unwrap();
        assert_eq!(s.interrupts(), 0);
        s.listen(SLOT_POWER_OFF);
        assert_eq!(s.interrupts(), 1);
        s.control(LISTEN | SLOT_POWER_OFF);
        assert_eq!(s.interrupts(), 0, "once");
        s.set(EXPRESS + SLOT_STATUS as u64, SLOT_EVENTS);
        s.control(LISTEN);
        assert_eq!(s.interrupts(), 1, "the link came up");
    }

    #[test]
    fn a_port_forwards_what_its_windows_say() {
        let f = function(7, 0x1000);
        let mut s = slotted(Some(f.clone()));
        let at = s.decode(&f);
        let answers = |s: &Slotted| s.machine.read(at) == 7;
        assert!(answers(&s));
        s.set(COMMAND as u64, 0);
        assert!(!answers(&s));
        s.set(COMMAND as u64, COMMAND_MEMORY);
        assert!(answers(&s));
        let limit = PREFETCHABLE_BASE as u64 + 2;
        let before = [0, 6].map(|half| s.u16(limit + half));
        // A limit below the base forwards nothing.
        s.set(limit + 6, 0);
        assert!(!answers(&s));
        s.set(limit + 6, before[1]);
        assert!(answers(&s));
        // The other window may lead below 4 GiB, to where the BAR is moved.
        s.set(limit + 6, 0);
        let low = 0xc100_0000_u64;
        for (register, word) in [(BAR0, 0xc100_0000_u32), (BAR0 + 4, 0)] {
            let register = (1 << 20) + register as u64;
            s.machine.ecam.write(register, &word.to_le_bytes());
        }
        assert_eq!(s.machine.read(low), 0xff);
        s.set(MEMORY_BASE as u64, 0xc100);
        s.set(MEMORY_BASE as u64 + 2, 0xc100);
        assert_eq!(s.machine.read(low), 7);
        // A link that is disabled leads nowhere.
        s.set(EXPRESS + LINK_CONTROL as u64, LINK_DISABLE);
        assert!(!s.link_is_active());
        assert_eq!((s.machine.read(low), s.id_on(1)), (0xff, u32::MAX));
        s.set(EXPRESS + LINK_CONTROL as u64, 0);
        assert_eq!((s.machine.read(low), s.id_on(1)), (7, 0x1007_1af4));
    }

    #[test]
    fn a_function_is_reset_with_its_bus_and_its_power() {
        let f = function(7, 0x1000);
        let mut s = slotted(Some(f.clone()));
        let control = BRIDGE_CONTROL as u64;
        s.set(control, BRIDGE_CONTROL_RESET);
        assert_eq!(f.lock().unwrap().resets, 0, "held");
        s.set(control, 0);
        assert_eq!(f.lock().unwrap().resets, 1);
        s.set(control, 0);
        s.listen(SLOT_POWER_OFF);
        assert_eq!(f.lock().unwrap().resets, 1);
        s.listen(0);
        assert_eq!(f.lock().unwrap().resets, 2);
    }

    #[test]
    fn a_function_can_vanish() {
        let mut s = slotted(Some(function(7, 0x1000)));
        s.listen(0);
        surprise_remove(&s.machine.root, s.id);
        surprise_remove(&s.machine.root, s.id);
        assert_eq!(s.departed(), 1);
        assert_eq!(s.status(), SLOT_PRESENCE_CHANGED | SLOT_LINK_CHANGED);
        assert!(!s.link_is_active());
        assert_eq!(s.interrupts(), 1);
        assert_eq!(s.id_on(1), u32::MAX);
        s.machine.root.lock().unwrap().remove_all();
        assert_eq!(s.kvm.allocated(), 0);
    }

    #[test]
    fn what_leaves_a_slot_makes_room_for_what_waits() {
        let f = function(7, 0x1000);
        let mut s = slotted(Some(f.clone()));
        let at = s.decode(&f);
        let waiting = function(8, 0x1000);
        s.machine.root.lock().unwrap().add(waiting).unwrap();
        s.machine.decode(2, true);
        s.machine.place(2, at);
        assert_eq!(s.machine.read(at), 7);
        surprise_remove(&s.machine.root, s.id);
        assert_eq!(s.machine.read(at), 8);
    }

    #[test]
    fn pins_behind_a_port_are_those_of_the_port() {
        assert_eq!(pin_gsis(1), [17, 18, 19, 20]);
        assert_eq!(pin_gsis(31), [23, 16, 17, 18]);
    }

    #[test]
    fn ports_take_what_their_functions_need() {
        let windows = Windows {
            high: Range {
                start: 0x1_0000_0000,
                size: 64 << 30,
            },
            ..WINDOWS
        };
        let mut root = PciRoot::new(Arc::default(), windows);
        let kvm = Arc::new(FakeKvm::default());
        let small = root.add_port(kvm.clone(), None).unwrap();
        let large = function(1, 32 << 30);
        let id = root.add_port(kvm.clone(), Some(large.clone())).unwrap();
        let size = |id| root.ports[&id].forwarded.prefetchable.unwrap().size;
        assert_eq!((size(small), size(id)), (8 << 30, 32 << 30));
        let at = lock(&large).config.bar_address(0).unwrap();
        assert_eq!(at % (32 << 30), 0);
        let none = root.add_port(kvm.clone(), Some(function(1, 64 << 30)));
        assert!(matches!(none, Err(Error::NoRoom { .. })));
        let without = root.add_port(kvm, None).unwrap();
        assert_eq!(root.ports[&without].forwarded.prefetchable, None);
        // What is plugged in later has to fit.
        assert!(root.plug(small, function(2, 16 << 30)).is_err());
        root.plug(small, function(2, 1 << 30)).unwrap();
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
        /// Whatever a guest writes to a port and to the function behind it, both stay usable for each other.
        #[test]
        fn hostile_ports_lead_to_one_function_or_none(
            writes in prop::collection::vec(
                (0..3u8, 0..0x80u64, prop::collection::vec(any::<u8>(), 1..9)), 0..200)
        ) {
            let f = function(7, 0x1000);
            let mut s = slotted(Some(f.clone()));
            for (kind, register, data) in writes {
                match kind {
                    0 => s.machine.ecam.write((1 << 15) + register, &data),
                    1 => {
                        let bus = u64::from(s.u16(PRIMARY_BUS as u64) >> 8);
                        s.machine.ecam.write((bus << 20) + register, &data);
                    }
                    _ => {
                        let _ = s.ask();
                    }
                }
            }
            let gone = s.departed();
            prop_assert!(gone <= 1);
            let (mut at, f) = (None, f.lock().unwrap());
            for (from, to) in &f.moves {
                prop_assert_eq!(*from, at);
                at = *to;
            }
            prop_assert!(gone == 0 || at.is_none());
            if let Some(at) = at {
                prop_assert_eq!(f.config.decoded_bar(0), Some(at));
                let root = s.machine.root.lock().unwrap();
                prop_assert!(root.reach(Where::Behind(s.id)).contains(at, 0x1000));
            }
        }

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

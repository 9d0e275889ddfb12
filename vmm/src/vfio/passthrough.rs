//! The guest's passed-through functions: each in the slot of a root port, coming and going by request, or because the host
//! wants one back.
//!
//! ```text
//!            device-add                 the guest lets go, or the device has failed
//!   (host) ─────────────▶ in its slot ─────────────────────────────────────────────▶ (host), reset
//!                          │       ▲
//!                          └───────┘ device-remove, the kernel's request, or the guest is to move: it is asked
//! ```
//!
//! A function stays with its host. One that a card stands in for leaves a guest that moves, and comes back if that fails
//! ([`Passthrough::release`], [`Passthrough::plug`]).

use std::collections::BTreeMap;
use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, Weak};
use std::time::{Duration, Instant};

use ringside_vfio::device::{AddressSpace, Interface, Irq, assignable};
use ringside_vfio::host::Host;
use serde_json::{Value, json};
use vfio_ioctls::VfioDeviceFd;
use vm_memory::GuestMemoryMmap;

use super::{Error, VfioPci};
use crate::config::{VfioConfig, VfioInterface};
use crate::event_loop::{HandlerId, LoopHandle, Next};
use crate::machine::Resources;
use crate::memory_hotplug::MemoryListener;
use crate::pci::host::{self, lock, request_unplug, surprise_remove};
use crate::pci::msix::new_event;
use crate::pci::{PortId, SharedFunction, SharedRoot};

/// How often the kernel asks for a device (every ten seconds) until it is taken from a guest that does not let go of it.
const REQUESTS: u32 = 4;

/// How long a new device waits for a slot that another has just left.
const SLOT_LIMIT: Duration = Duration::from_secs(5);
/// How often that slot is looked at.
const SLOT_POLL: Duration = Duration::from_millis(100);

/// How long a guest that is to move may take to let go of its functions. Linux thinks about it for five seconds.
pub(super) const RELEASE_LIMIT: Duration = Duration::from_secs(30);

struct Entry {
    config: VfioConfig,
    port: PortId,
    handlers: Vec<HandlerId>,
    /// It has left the guest, and is being closed.
    departs: bool,
}

impl MemoryListener for AddressSpace {
    fn name(&self) -> String {
        "VFIO".into()
    }

    fn add(
        self: Arc<Self>,
        piece: &GuestMemoryMmap,
        _whole: &GuestMemoryMmap,
    ) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        Ok(AddressSpace::add(&self, piece.clone())?)
    }

    fn withdraw(self: Arc<Self>, piece: &GuestMemoryMmap, _whole: &GuestMemoryMmap) {
        self.remove(piece);
    }
}

/// All passed-through functions of one guest.
pub struct Passthrough {
    interface: VfioInterface,
    resources: Resources,
    root: SharedRoot,
    /// There is none before the first function: a machine without any does not need VFIO.
    space: OnceLock<Arc<AddressSpace>>,
    devices: Mutex<BTreeMap<String, Entry>>,
    /// Held while a function is added. Taken before `devices`.
    adding: Mutex<()>,
}

impl Passthrough {
    /// No functions so far.
    pub fn new(resources: &Resources, interface: VfioInterface, root: SharedRoot) -> Arc<Self> {
        let passthrough = Arc::new(Self {
            interface,
            resources: resources.clone(),
            root: Arc::clone(&root),
            space: OnceLock::new(),
            devices: Mutex::default(),
            adding: Mutex::default(),
        });
        let weak = Arc::downgrade(&passthrough);
        let departure = move |port, function| {
            if let Some(passthrough) = weak.upgrade() {
                passthrough.departed(port, function);
            }
        };
        lock(&root).on_departure(Arc::new(departure));
        passthrough
    }

    fn devices(&self) -> MutexGuard<'_, BTreeMap<String, Entry>> {
        lock(&self.devices)
    }

    fn space(&self) -> Result<&Arc<AddressSpace>, Error> {
        if let Some(space) = self.space.get() {
            return Ok(space);
        }
        let interface = match self.interface {
            VfioInterface::Auto => Interface::Auto,
            VfioInterface::Group => Interface::Group,
            VfioInterface::Iommufd => Interface::Iommufd,
        };
        let kvm = VfioDeviceFd::new_from_kvm(self.resources.vm.create_vfio_device()?);
        let memory = self.resources.memory.current();
        let space = AddressSpace::new(interface, memory.clone(), Some(Arc::new(kvm)))?;
        let space = Arc::new(space);
        let listener: Arc<dyn MemoryListener> = Arc::clone(&space) as _;
        self.resources.memory.register(&listener, &memory)?;
        Ok(self.space.get_or_init(|| space))
    }

    fn open(&self, config: &VfioConfig) -> Result<VfioPci, Error> {
        let host = Host::new("/");
        // What is wrong with the device is of more use than that this machine has no VFIO.
        assignable(&host, config.host)?;
        let device = self
            .space()?
            .open(&host, config.host, config.token.as_ref())?;
        let routing = Arc::clone(&self.resources.router);
        VfioPci::new(device, routing, Arc::clone(&self.resources.vm) as _)
    }

    /// Puts a function into a new port before the guest starts.
    pub fn add_cold(self: &Arc<Self>, config: &VfioConfig) -> Result<(), Error> {
        self.insert(config, |root, function| {
            root.add_port(Arc::clone(&self.resources.router) as _, Some(function))
        })
    }

    /// Adds ports with empty slots.
    pub fn add_ports(&self, count: u8) -> Result<(), Error> {
        for _ in 0..count {
            let router = Arc::clone(&self.resources.router);
            lock(&self.root).add_port(router, None)?;
        }
        Ok(())
    }

    /// Puts a function into an empty slot while the guest runs.
    pub fn add(self: &Arc<Self>, config: &VfioConfig) -> Result<(), Error> {
        // Before the function is taken from the host and reset.
        self.wait_for_port()?;
        self.insert(config, |root, function| {
            let port = root.free_port()?;
            root.plug(port, function)?;
            Ok(port)
        })
    }

    /// Waits a while for a guest that is about to finish with a slot.
    fn wait_for_port(&self) -> Result<(), Error> {
        let end = Instant::now() + SLOT_LIMIT;
        loop {
            let port = lock(&self.root).free_port();
            match port {
                Err(host::Error::Unfinished) if Instant::now() < end => {
                    std::thread::sleep(SLOT_POLL);
                }
                Err(error) => return Err(error.into()),
                Ok(_) => return Ok(()),
            }
        }
    }

    /// Makes sure that neither the function nor the id is in use; waits a while for one that is being closed.
    fn wait_until_free(&self, config: &VfioConfig) -> Result<(), Error> {
        let end = Instant::now() + SLOT_LIMIT;
        loop {
            let taken = {
                let devices = self.devices();
                let mut entries = devices.values();
                entries
                    .find(|e| e.config.id == config.id || e.config.host == config.host)
                    .map(|entry| (entry.config.clone(), entry.departs))
            };
            match taken {
                None => return Ok(()),
                Some((_, true)) if Instant::now() < end => std::thread::sleep(SLOT_POLL),
                Some((VfioConfig { id, host, .. }, _)) => return Err(Error::Taken { id, host }),
            }
        }
    }

    fn insert(
        self: &Arc<Self>,
        config: &VfioConfig,
        plug: impl FnOnce(&mut crate::pci::PciRoot, SharedFunction) -> Result<PortId, host::Error>,
    ) -> Result<(), Error> {
        // Opening takes its time: only others that are added wait for it.
        let _one = lock(&self.adding);
        self.wait_until_free(config)?;
        let function = self.open(config)?;
        let mut watched = Vec::new();
        for irq in [Irq::Request, Irq::Error] {
            let event = new_event().map_err(Error::Event)?;
            if function.watch(irq, &event)? {
                watched.push((irq, event));
            }
        }
        // Held until it is among them: a function that leaves at once finds its entry.
        let mut devices = self.devices();
        let port = plug(&mut lock(&self.root), Arc::new(Mutex::new(function)))?;
        let mut entry = Entry {
            config: config.clone(),
            port,
            handlers: Vec::new(),
            departs: false,
        };
        let watching = watched.into_iter().try_for_each(|(irq, event)| {
            let (weak, id, mut count) = (Arc::downgrade(self), config.id.clone(), 0u32);
            let fd = event.as_raw_fd();
            let handler = move || {
                // Already empty if it was read for an earlier event.
                let _ = event.read();
                count = count.saturating_add(1);
                notified(&weak, &id, port, irq, count)
            };
            let handler = self.resources.events.add(fd, Box::new(handler))?;
            entry.handlers.push(handler);
            Ok(())
        });
        devices.insert(config.id.clone(), entry);
        drop(devices);
        if watching.is_err() {
            // Nobody would answer when the host wants it back.
            surprise_remove(&self.root, port);
        }
        watching.map_err(Error::Event)
    }

    /// Asks the guest to let go of a function, or takes it away by force.
    pub fn remove(&self, id: &str, force: bool) -> Result<(), Error> {
        let port = {
            let devices = self.devices();
            let entry = devices.get(id);
            let entry = entry.ok_or(Error::Unknown { id: id.to_owned() })?;
            if entry.departs {
                return Ok(());
            }
            entry.port
        };
        if force {
            surprise_remove(&self.root, port);
            return Ok(());
        }
        Ok(request_unplug(&self.root, port)?)
    }

    /// The functions that the guest has.
    pub fn functions(&self) -> Vec<VfioConfig> {
        let devices = self.devices();
        devices.values().map(|entry| entry.config.clone()).collect()
    }

    /// Whether the host could give the guest a function.
    ///
    /// # Errors
    /// [`Error::Device`]
    pub fn check(config: &VfioConfig) -> Result<(), Error> {
        Ok(assignable(&Host::new("/"), config.host)?)
    }

    /// Asks the guest to let go of functions, and waits until the host has all of them: then none of them writes to guest memory.
    ///
    /// # Errors
    /// [`Error::Kept`]; some may have left. [`Error::Pci`]
    pub fn release(&self, functions: &[VfioConfig]) -> Result<(), Error> {
        for function in functions {
            match self.remove(&function.id, false) {
                Err(
                    Error::Unknown { .. }
                    | Error::Pci(host::Error::Empty | host::Error::AskedBefore),
                ) => {}
                asked => asked?,
            }
        }
        let end = Instant::now() + RELEASE_LIMIT;
        loop {
            let kept = {
                let devices = self.devices();
                let mut ids = functions.iter().map(|function| &function.id);
                ids.find(|id| devices.contains_key(*id)).cloned()
            };
            match kept {
                None => return Ok(()),
                Some(id) if Instant::now() > end => return Err(Error::Kept { id }),
                Some(_) => std::thread::sleep(SLOT_POLL),
            }
        }
    }

    /// Puts those of these functions into empty slots that the guest does not have: it runs, or runs again. One that cannot be
    /// put there is missing, and the log says so; another card stands in for it.
    pub fn plug(self: &Arc<Self>, functions: &[VfioConfig]) {
        for function in functions {
            let id = &function.id;
            let stays = self.devices().get(id).is_some_and(|entry| !entry.departs);
            if stays {
                continue;
            }
            match self.add(function) {
                Ok(()) => tracing::info!(id, host = %function.host, "the guest has a device again"),
                Err(error) => tracing::error!(
                    id,
                    error = &error as &dyn std::error::Error,
                    "the guest does without a device: plug it in when that is mended (device-add)"
                ),
            }
        }
    }

    /// The functions, for the control socket.
    pub fn list(&self) -> Vec<Value> {
        let devices = self.devices();
        let show = |entry: &Entry| {
            json!({
                "id": entry.config.id,
                "type": "vfio",
                "host": entry.config.host,
                "leaving": entry.departs || lock(&self.root).removal_asked(entry.port),
            })
        };
        devices.values().map(show).collect()
    }

    /// A function has left its slot: it goes back to the host. That takes a while, as it is reset, and whoever noticed may be
    /// a processor of the guest.
    fn departed(self: &Arc<Self>, port: PortId, function: SharedFunction) {
        let id = {
            let mut devices = self.devices();
            let mut entries = devices.iter_mut();
            let entry = entries.find(|(_, entry)| entry.port == port && !entry.departs);
            let Some((id, entry)) = entry else { return };
            entry.departs = true;
            forget(&self.resources.events, &entry.handlers);
            id.clone()
        };
        let (passthrough, closed) = (Arc::clone(self), id.clone());
        let close = move || {
            drop(function);
            passthrough.closed(&closed);
        };
        let thread = std::thread::Builder::new().name("vfio close".into());
        if let Err(error) = thread.spawn(close) {
            // The closure is gone, and with it the function.
            tracing::warn!(%error, "no thread to close a device: whoever noticed that it left has waited");
            self.closed(&id);
        }
    }

    /// A function can be given to a guest again.
    fn closed(&self, id: &str) {
        if let Some(entry) = self.devices().remove(id) {
            tracing::info!(id, host = %entry.config.host, "a device has left the guest");
        }
    }
}

fn forget(events: &LoopHandle, handlers: &[HandlerId]) {
    for handler in handlers {
        events.remove(*handler);
    }
}

/// The kernel has something to say about a function.
fn notified(weak: &Weak<Passthrough>, id: &str, port: PortId, irq: Irq, count: u32) -> Next {
    let Some(passthrough) = weak.upgrade() else {
        return Next::Remove;
    };
    match irq {
        Irq::Request if count < REQUESTS => {
            if count == 1 {
                tracing::warn!(
                    id,
                    "the host wants a device back: the guest is asked to let go of it"
                );
                if let Err(error) = request_unplug(&passthrough.root, port) {
                    tracing::debug!(%error, id, "the guest knows already");
                }
            }
            return Next::Continue;
        }
        Irq::Request => {
            tracing::warn!(
                id,
                "the guest does not let go of a device that the host wants back: it is taken away"
            );
        }
        _ => tracing::error!(id, "a device has failed: it is taken from the guest"),
    }
    surprise_remove(&passthrough.root, port);
    Next::Remove
}

//! The machine: creates everything in order, runs it, and takes it down in the opposite order.
//!
//! The order is: VM and guest RAM; kernel, RAM disk and ACPI tables in it; PCI devices; processors.
//! That may take long (a slow disk, memory to allocate, back-ends that are not there yet), so a
//! thread of its own does it while the control thread listens to signals already. Then come the
//! console and the platform's devices, and the processors start.
//!
//! The end comes as an [`ExitReason`]: the processors stop first, so that nothing is asked of a
//! device that is gone.

use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, TryLockError, mpsc};
use std::time::{Duration, Instant};

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use ringside_control::{ApiError, ControlSocket, ErrorCode, Peers, Service, server};
use ringside_sandbox::SandboxError;
use serde_json::{Value, json};
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::acpi;
use crate::api::Command;
use crate::boot::{self, Images};
use crate::bus::{self, Bus, SharedDevice};
use crate::config::{Config, DeviceConfig, Origin, VfioConfig};
use crate::confine::confine;
use crate::console::{self, Console};
use crate::cpu::{self, CpuTemplate};
use crate::devices::acpi_pm::{self, AcpiPm};
use crate::devices::i8042::I8042;
use crate::devices::pvpanic::PvPanic;
use crate::devices::reset::ResetControl;
use crate::devices::rtc::{self, Rtc};
use crate::devices::serial::{self, Serial, SerialInput};
use crate::devices::{Platform, PlatformState};
use crate::event_loop::{EventLoop, LoopHandle, Next};
use crate::exit::{ExitHandle, ExitReason};
use crate::irq::{self, GsiRouter};
use crate::kvm::{self, Vm};
use crate::layout::{self, Range};
use crate::memory::{self, GuestRam};
use crate::memory_hotplug::{self, GrowingMemory, Growth, Plan};
use crate::pause::{self, Gate};
use crate::pci::host::{self, ConfigPorts, Ecam, SharedRoot};
use crate::pci::{PciRoot, SharedFunction, Windows};
use crate::snapshot::Error::{Declined, Log};
use crate::snapshot::cpu::{ChipState, CpuState};
use crate::snapshot::dirty::DirtyLog;
use crate::snapshot::transport::{self, Address, Connection, Listener};
use crate::snapshot::{self, Departure, Folder, Incoming, Outgoing};
use crate::vcpu::{self, Context, SharedVcpu, Vcpus};
use crate::vfio::{self, Passthrough};
use crate::vhost_user::{self, VhostUserDevice};
use crate::virtio::{self, VirtioDevice, VirtioPci};

/// Why there is no machine.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// More processors than KVM can give.
    #[error("this host's KVM gives a guest at most {max} CPUs, not {cpus}")]
    Cpus {
        /// What was asked for.
        cpus: u32,
        /// What there is.
        max: usize,
    },
    /// A processor that KVM does not create.
    #[error("KVM cannot create CPU {cpu}")]
    CreateCpu {
        /// Which processor.
        cpu: u8,
        /// KVM's reason.
        #[source]
        source: io::Error,
    },
    /// File descriptors, most likely.
    #[error("cannot set up the control thread's events")]
    Events(#[source] io::Error),
    /// The VM.
    #[error(transparent)]
    Kvm(#[from] kvm::Error),
    /// Guest RAM.
    #[error(transparent)]
    Memory(#[from] memory::Error),
    /// How far it can grow.
    #[error(transparent)]
    MemoryHotplug(#[from] memory_hotplug::Error),
    /// Kernel and RAM disk.
    #[error(transparent)]
    Boot(#[from] boot::Error),
    /// ACPI tables.
    #[error(transparent)]
    Acpi(#[from] acpi::Error),
    /// A processor's state.
    #[error(transparent)]
    Cpu(#[from] cpu::Error),
    /// A processor's thread.
    #[error(transparent)]
    Vcpu(#[from] vcpu::Error),
    /// An interrupt.
    #[error(transparent)]
    Irq(#[from] irq::Error),
    /// A device's addresses.
    #[error(transparent)]
    Bus(#[from] bus::Error),
    /// The PCI bus.
    #[error(transparent)]
    Pci(#[from] host::Error),
    /// A virtio device's registers.
    #[error("device {socket} cannot be put on the PCI bus", socket = socket.display())]
    Virtio {
        /// The back-end's socket.
        socket: PathBuf,
        /// What is wrong with it.
        #[source]
        source: virtio::pci::Error,
    },
    /// A back-end.
    #[error(transparent)]
    VhostUser(#[from] vhost_user::Error),
    /// A function of the host's PCI bus.
    #[error(transparent)]
    Vfio(#[from] vfio::Error),
    /// The control socket.
    #[error(transparent)]
    Api(#[from] server::Error),
    /// The rights that the process gives up.
    #[error(transparent)]
    Sandbox(#[from] SandboxError),
    /// The serial port of a guest that was elsewhere.
    #[error("the serial port cannot take over the snapshot's state")]
    Serial(#[source] io::Error),
    /// The serial port's other end.
    #[error(transparent)]
    Console(#[from] console::Error),
    /// What the guest was elsewhere.
    #[error(transparent)]
    Snapshot(#[from] snapshot::Error),
}

/// What devices are built from. Cheap to clone; all of it is shared.
#[derive(Clone)]
pub struct Resources {
    /// The VM: ioeventfds, memory slots.
    pub vm: Arc<Vm>,
    /// Guest RAM, which may grow.
    pub memory: Arc<GrowingMemory>,
    /// Ports.
    pub ports: Arc<Bus>,
    /// MMIO.
    pub mmio: Arc<Bus>,
    /// GSIs and irqfds.
    pub router: Arc<GsiRouter>,
    /// The control thread's loop.
    pub events: LoopHandle,
    /// Ends the machine.
    pub exit: ExitHandle,
    /// The 64-bit PCI MMIO window.
    pub pci_mmio64: Range,
}

/// Builds the machine that `config` describes and runs its guest until the machine ends.
pub fn run(config: &Config) -> Result<ExitReason, Error> {
    raise_file_limit();
    let exit = ExitHandle::new().map_err(Error::Events)?;
    let mut events = event_loop(&exit)?;
    let peers = Peers::allowing(&config.allow_uid);
    let listener = match &config.origin {
        Origin::Incoming(address) => {
            let listener = Listener::bind(address).map_err(|source| snapshot::Error::Listen {
                address: address.clone(),
                source,
            });
            Some(listener?)
        }
        _ => None,
    };
    // Nobody has the right to open it afterwards.
    let snapshots = config.snapshots.as_deref().map(Folder::open).transpose()?;
    // The threads to come take it over.
    confine(config)?;
    let listener = listener.map(|listener| (listener, peers.clone()));
    let built = build(config, listener, snapshots, events.handle(), &exit)?;
    events.run().map_err(Error::Events)?;
    if let Some(reason) = exit.reason() {
        // The builder may still wait for something. It owns nothing that outlives the process.
        return Ok(reason);
    }
    match built.try_recv() {
        Ok(machine) => machine?.run(config, peers, &mut events),
        Err(_) => Ok(lost_thread("that builds the machine")),
    }
}

/// Each queue takes four file descriptors, and the usual limit of 1024 is for programs that still
/// use select(2). Whoever starts us can set the hard limit.
fn raise_file_limit() {
    let raised = getrlimit(Resource::RLIMIT_NOFILE)
        .and_then(|(_, hard)| setrlimit(Resource::RLIMIT_NOFILE, hard, hard));
    if let Err(error) = raised {
        tracing::debug!(%error, "the limit of open files stays as it is");
    }
}

/// Builds the machine in a thread, which stops the control thread's loop when it is done.
fn build(
    config: &Config,
    listener: Option<(Listener, Peers)>,
    snapshots: Option<Folder>,
    events: LoopHandle,
    exit: &ExitHandle,
) -> Result<mpsc::Receiver<Result<Machine, Error>>, Error> {
    /// Also if the thread panics.
    struct Stop(LoopHandle);
    impl Drop for Stop {
        fn drop(&mut self) {
            self.0.stop();
        }
    }

    let (send, built) = mpsc::channel();
    let (config, exit) = (config.clone(), exit.clone());
    let builder = move || {
        let _stop = Stop(events.clone());
        // Nobody takes it if the end came first.
        let _ = send.send(Machine::new(&config, listener, snapshots, events, exit));
    };
    std::thread::Builder::new()
        .name("builder".into())
        .spawn(builder)
        .map_err(Error::Events)?;
    Ok(built)
}

fn lost_thread(what: &str) -> ExitReason {
    ExitReason::Failure(format!("the thread {what} ended early"))
}

/// A machine that is ready to run, but for its console and the platform's devices.
struct Machine {
    // Dropped in this order.
    processors: Vec<SharedVcpu>,
    resources: Resources,
    pci: SharedRoot,
    control: Control,
    /// What the guest was elsewhere.
    before: Option<snapshot::State>,
    /// Who has it still.
    connection: Option<Connection>,
}

/// Carries out what the control socket is asked for.
struct Control {
    cpus: u8,
    memory: Arc<GrowingMemory>,
    devices: Vec<DeviceConfig>,
    passthrough: Arc<Passthrough>,
    gate: Gate,
    exit: ExitHandle,
    snapshots: Option<Folder>,
    migrate_to: Vec<Address>,
    whole: Whole,
    /// Held by whoever changes the machine: one at a time.
    changing: Mutex<()>,
    /// The functions of a guest that may be elsewhere now, for when it is said to be here.
    doubtful: Mutex<Option<Vec<VfioConfig>>>,
}

impl Control {
    /// Writes a snapshot while the processors stand still.
    fn snapshot(&self, name: &str, stop: bool) -> Result<Value, ApiError> {
        let Some(folder) = &self.snapshots else {
            let message = "the VMM was started without --snapshots FOLDER";
            return Err(ApiError::of(ErrorCode::Conflict, message));
        };
        let functions = self.functions_that_stay()?;
        let out = Outgoing::create(folder, name).map_err(moving_failed)?;
        let path = out.path().to_owned();
        self.release(&functions)?;
        let was_running = self
            .hold()
            .inspect_err(|_| self.passthrough.plug(&functions))?;
        let start = Instant::now();
        let written = self.whole.state().and_then(|state| {
            let memory = self.memory.current();
            out.write(&self.whole.description(), &memory, &state)
        });
        let took = start.elapsed();
        if stop && written.is_ok() {
            self.exit.end(ExitReason::Requested("the control socket"));
        } else {
            self.go_on(was_running);
            self.passthrough.plug(&functions);
        }
        let memory = written.map_err(moving_failed)?;
        Ok(json!({
            "file": path,
            "memory": memory,
            "milliseconds": u64::try_from(took.as_millis()).unwrap_or(u64::MAX),
        }))
    }
}

/// Why a guest is not saved, or not moved.
fn moving_failed(error: snapshot::Error) -> ApiError {
    use snapshot::Error::{Busy, Exists, Name, Unsaved};
    let code = match &error {
        Name(_) => ErrorCode::BadRequest,
        Exists(_) | Unsaved { .. } => ErrorCode::Conflict,
        Busy(_) => ErrorCode::Busy,
        _ => ErrorCode::Failed,
    };
    ApiError::new(code, &error)
}

impl Control {
    /// The guest's functions of the host, which stay with it. For each of them a card stands in while the guest moves.
    fn functions_that_stay(&self) -> Result<Vec<VfioConfig>, ApiError> {
        let functions = self.passthrough.functions();
        let refused = |message: String| Err(ApiError::of(ErrorCode::Conflict, message));
        for VfioConfig {
            host, id, standby, ..
        } in &functions
        {
            let Some(socket) = standby else {
                return refused(format!(
                    "the guest has a function of the host, {host}, which stays with it: remove it first (device-remove {id}), or name the card that stands in for it when you give it (standby=SOCKET)"
                ));
            };
            if !self.whole.stands_in(socket) {
                return refused(format!(
                    "the guest does not use the card at {} as a stand-in for {host} (VIRTIO_NET_F_STANDBY): was its back-end started with --standby, and has the guest net_failover? Else remove the function first (device-remove {id})",
                    socket.display()
                ));
            }
        }
        if !functions.is_empty() && self.gate.is_closed() {
            let message = "the machine is paused, and the guest cannot let go of its functions of the host: resume it first";
            return refused(message.into());
        }
        Ok(functions)
    }

    /// Gets these functions from the guest.
    fn release(&self, functions: &[VfioConfig]) -> Result<(), ApiError> {
        self.passthrough.release(functions).map_err(|error| {
            self.passthrough.plug(functions);
            ApiError::new(ErrorCode::Conflict, &error)
        })
    }

    /// Gets the processors out of the guest. Returns whether they were in it.
    fn hold(&self) -> Result<bool, ApiError> {
        match self.gate.pause() {
            Ok(()) => Ok(true),
            Err(pause::Error::Paused) => Ok(false),
            Err(error) => Err(ApiError::new(ErrorCode::Busy, &error)),
        }
    }

    /// Undoes [`Control::hold`], and what was done to devices since.
    fn go_on(&self, was_running: bool) {
        host::resume(&self.whole.pci);
        if was_running && let Err(error) = self.gate.resume() {
            tracing::debug!(%error, "the machine was not paused any more");
        }
    }

    /// Moves the guest to another VMM.
    fn migrate(&self, to: &Address) -> Result<Value, ApiError> {
        if !self.migrate_to.contains(to) {
            let message = format!("the VMM was started without --migrate-to {to}");
            return Err(ApiError::of(ErrorCode::Conflict, message));
        }
        let functions = self.functions_that_stay()?;
        let start = Instant::now();
        let memory = self.memory.current();
        let log = Arc::new(DirtyLog::new(&memory).map_err(Log).map_err(moving_failed)?);
        let connection = Connection::connect(to).map_err(|source| snapshot::Error::Connect {
            address: to.clone(),
            source,
        });
        let connection = connection.map_err(moving_failed)?;
        let departure = Departure::new(
            connection,
            &self.whole.description(),
            memory,
            Arc::clone(&log),
        );
        let failed = |error: snapshot::Error| moving_failed(error.of_departure());
        let mut departure = departure.map_err(failed)?;
        // Nobody notes what they write.
        self.release(&functions)?;
        let sent = self
            .track(Some(&log))
            .and_then(|()| departure.send_ahead(&self.whole.vm));
        if let Err(error) = sent {
            self.stay(&functions);
            return Err(failed(error));
        }
        let rounds = departure.rounds;
        let was_running = self.hold().inspect_err(|_| self.stay(&functions))?;
        let stands_still = Instant::now();
        let ready = self.whole.state().and_then(|state| {
            let (mut connection, sent) = departure.send_rest(&self.whole.vm, &state)?;
            connection.hear(transport::READY).map_err(Declined)?;
            // From here on it is the other one's.
            connection.say(transport::GO).map_err(Declined)?;
            Ok((connection, sent))
        });
        let (mut connection, sent) = match ready {
            Ok(ready) => ready,
            Err(error) => {
                self.go_on(was_running);
                self.stay(&functions);
                return Err(failed(error));
            }
        };
        if let Err(error) = connection.hear(transport::RUNNING) {
            *host::lock(&self.doubtful) = Some(functions);
            return Err(moving_failed(snapshot::Error::Doubt(error)));
        }
        let downtime = stands_still.elapsed();
        self.exit.end(ExitReason::Requested("its migration"));
        let milliseconds = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        Ok(json!({
            "to": to.to_string(),
            "memory": sent,
            "rounds": rounds,
            "milliseconds": milliseconds(start.elapsed()),
            "downtime-milliseconds": milliseconds(downtime),
        }))
    }

    /// Has processors and devices note which pages they write, or no longer.
    fn track(&self, log: Option<&Arc<DirtyLog>>) -> Result<(), snapshot::Error> {
        let whole = &self.whole;
        whole.vm.log_dirty(log.is_some())?;
        host::track(&whole.pci, log)
    }

    /// The guest does not move after all: nothing is noted any more, and it gets its functions back.
    fn stay(&self, functions: &[VfioConfig]) {
        if let Err(error) = self.track(None) {
            // It costs time, and nothing else.
            tracing::warn!(
                error = &error as &dyn std::error::Error,
                "pages are noted still"
            );
        }
        self.passthrough.plug(functions);
    }
}

/// A device of a back-end.
struct Attached {
    socket: PathBuf,
    description: snapshot::DeviceDescription,
    function: Arc<Mutex<VirtioPci>>,
}

/// All of a machine that a snapshot is made of.
struct Whole {
    processors: Vec<SharedVcpu>,
    vm: Arc<Vm>,
    template: CpuTemplate,
    memory: Arc<GrowingMemory>,
    options: snapshot::Machine,
    devices: Vec<Attached>,
    pci: SharedRoot,
    /// Once they are there.
    platform: OnceLock<Platform>,
}

impl Whole {
    /// What it does. The processors are out of the guest; the devices are stopped afterwards.
    fn state(&self) -> Result<snapshot::State, snapshot::Error> {
        // Before the processors: the last interrupts are for them.
        let functions = host::suspend(&self.pci)?;
        let mut cpus = Vec::with_capacity(self.processors.len());
        for (cpu, vcpu) in (0u8..).zip(&self.processors) {
            let vcpu = host::lock(vcpu);
            cpus.push(CpuState::save(self.vm.kvm(), &vcpu, cpu)?);
        }
        let platform = self.platform.get().map(Platform::state);
        Ok(snapshot::State {
            cpus,
            chips: ChipState::save(self.vm.fd())?,
            platform: platform.ok_or_else(|| snapshot::Error::Unsaved {
                device: "of the platform".into(),
                why: "the machine is being started: ask again".into(),
            })?,
            functions,
        })
    }

    /// Whether the guest's driver takes the card at this socket for one that stands in for another.
    fn stands_in(&self, socket: &Path) -> bool {
        let mut cards = self.devices.iter().filter(|card| card.socket == socket);
        cards.any(|card| {
            let features = host::lock(&card.function).driver_features();
            features & virtio::bits::NET_F_STANDBY != 0
        })
    }

    /// What it is.
    fn description(&self) -> snapshot::Description {
        snapshot::Description {
            program: concat!("ringside-vmm ", env!("CARGO_PKG_VERSION")).into(),
            cpus: self.options.cpus,
            memory: self.options.memory,
            memory_max: self.options.memory_max,
            pieces: self.memory.pieces(),
            ports: self.options.ports,
            devices: self.devices.iter().map(|d| d.description.clone()).collect(),
            cpuid: self.template.entries().to_vec(),
            tsc_deadline: self.template.has_tsc_deadline(),
        }
    }
}

impl Service for Control {
    type Command = Command;

    fn call(&self, command: Command) -> Result<Value, ApiError> {
        let failed = |error: vfio::Error| {
            let code = match &error {
                vfio::Error::Unknown { .. } => ErrorCode::NotFound,
                vfio::Error::Taken { .. } | vfio::Error::Pci(_) => ErrorCode::Conflict,
                _ => ErrorCode::Failed,
            };
            ApiError::new(code, &error)
        };
        let changing = match command {
            Command::Status | Command::DeviceList | Command::PowerOff => None,
            _ => Some(self.changing.try_lock()),
        };
        if let Some(Err(TryLockError::WouldBlock)) = changing {
            let message = "another request is being carried out: wait for its end";
            return Err(ApiError::of(ErrorCode::Busy, message));
        }
        match command {
            Command::Migrate { to } => self.migrate(&to),
            Command::Snapshot { name, stop } => self.snapshot(&name, stop),
            Command::Status => Ok(json!({
                "version": env!("CARGO_PKG_VERSION"),
                "pid": std::process::id(),
                "state": if self.exit.is_set() {
                    "ending"
                } else if self.gate.is_closed() {
                    "paused"
                } else {
                    "running"
                },
                "cpus": self.cpus,
                "memory": self.memory.total().0,
            })),
            Command::DeviceList => {
                let mut list = self.passthrough.list();
                list.extend(self.devices.iter().map(|device| {
                    json!({
                        "type": format!("vhost-user-{}", device.device_type),
                        "socket": device.socket,
                    })
                }));
                Ok(json!({ "devices": list }))
            }
            Command::DeviceAdd(options) => {
                let config = options.resolve();
                let standby = config.check_standby(&self.devices);
                standby.map_err(|error| ApiError::new(ErrorCode::BadRequest, &error))?;
                self.passthrough.add(&config).map_err(failed)?;
                Ok(json!({ "id": config.id }))
            }
            Command::DeviceRemove { id, force } => {
                self.passthrough.remove(&id, force).map_err(failed)?;
                Ok(json!({ "id": id }))
            }
            Command::MemoryAdd { size } => {
                let Growth { added, total } = self.memory.grow(size.0).map_err(|error| {
                    use memory_hotplug::Error::{Fixed, Limit, Pieces, Unaligned};
                    let code = match &error {
                        Unaligned { .. } => ErrorCode::BadRequest,
                        Fixed | Limit { .. } | Pieces { .. } => ErrorCode::Conflict,
                        _ => ErrorCode::Failed,
                    };
                    ApiError::new(code, &error)
                })?;
                Ok(json!({ "added": added.size, "memory": total.0 }))
            }
            Command::Pause => paused(self.gate.pause()),
            Command::Resume => {
                // Those of a guest that was to move.
                host::resume(&self.whole.pci);
                let resumed = paused(self.gate.resume())?;
                if let Some(functions) = host::lock(&self.doubtful).take() {
                    self.stay(&functions);
                }
                Ok(resumed)
            }
            Command::PowerOff => {
                self.exit.end(ExitReason::Requested("the control socket"));
                Ok(json!({}))
            }
        }
    }
}

fn paused(result: Result<(), pause::Error>) -> Result<Value, ApiError> {
    match result {
        Ok(()) => Ok(json!({})),
        Err(error @ pause::Error::HeldUp) => Err(ApiError::new(ErrorCode::Busy, &error)),
        Err(error) => Err(ApiError::new(ErrorCode::Conflict, &error)),
    }
}

impl Machine {
    fn new(
        config: &Config,
        listener: Option<(Listener, Peers)>,
        snapshots: Option<Folder>,
        events: LoopHandle,
        exit: ExitHandle,
    ) -> Result<Self, Error> {
        let vm = Arc::new(Vm::new()?);
        let max = vm.kvm().get_max_vcpus();
        let cpus = u8::try_from(config.cpus).unwrap_or(u8::MAX);
        if usize::from(cpus) > max {
            return Err(Error::Cpus {
                cpus: config.cpus,
                max,
            });
        }
        let options = snapshot::Machine {
            cpus,
            memory: config.memory.size.0,
            memory_max: config.memory_max.0,
            ports: config.vfio.len() + usize::from(config.hotplug_ports),
            devices: config.devices.iter().map(|d| d.device_type.0).collect(),
        };
        let mut connection = None;
        let mut incoming = match &config.origin {
            Origin::Boot { .. } => None,
            Origin::Snapshot(path) => Some(Incoming::open(path)?),
            Origin::Incoming(address) => {
                let failed = |source| snapshot::Error::Listen {
                    address: address.clone(),
                    source,
                };
                let accepted = listener.map(|(listener, peers)| listener.accept(&peers));
                let accepted = accepted.transpose();
                let accepted = accepted.map_err(failed)?;
                let copy = accepted.as_ref().map(Connection::try_clone).transpose();
                connection = copy.map_err(failed)?;
                let incoming = accepted.map(Incoming::over).transpose();
                incoming.map_err(snapshot::Error::of_arrival)?
            }
        };
        let mut template = CpuTemplate::new(vm.kvm(), cpus)?;
        if let Some(Incoming { description, .. }) = &incoming {
            description.check(&options)?;
            template = template.shown_before(&description.cpuid, description.tsc_deadline)?;
        }
        let ram = GuestRam::new(config.memory)?;
        vm.add_ram(ram.memory())?;
        let memory = ram.memory();
        let bits = template.physical_bits();
        let plan = Plan::new(config.memory, memory, config.memory_max, bits)?;
        let pci_mmio64 = layout::pci_mmio64(plan.range.end(), bits);

        let platform = acpi::Platform {
            cpus,
            pci_mmio64,
            memory_devices: plan.devices(),
        };
        let entry = match &config.origin {
            Origin::Boot { kernel, initramfs } => {
                let rsdp = acpi::write(memory, &platform)?;
                let images = Images {
                    kernel,
                    initramfs: initramfs.as_deref(),
                    cmdline: &config.cmdline,
                };
                let entry = boot::load(memory, &layout::ram_ranges(ram.size()), &images, rsdp)?;
                cpu::write_tables(memory, &entry)?;
                Some(entry)
            }
            Origin::Snapshot(_) | Origin::Incoming(_) => None,
        };

        let router = Arc::new(GsiRouter::new(Arc::clone(vm.fd()))?);
        let resources = Resources {
            vm: Arc::clone(&vm),
            memory: growing_memory(&vm, &router, memory.clone(), plan)?,
            ports: Arc::default(),
            mmio: Arc::default(),
            router,
            events,
            exit,
            pci_mmio64,
        };
        // Before the devices are there, which would have to hear of it piece by piece.
        let mut wanted = Vec::new();
        if let Some(Incoming { description, .. }) = &incoming {
            for size in &description.pieces {
                resources.memory.grow(*size)?;
            }
            wanted.clone_from(&description.devices);
        }
        let pci = Arc::new(Mutex::new(PciRoot::new(
            Arc::clone(&resources.mmio),
            windows(&resources),
        )));
        // First, as it fails at once if it does: back-ends may be waited for.
        let passthrough = Passthrough::new(&resources, config.vfio_interface, Arc::clone(&pci));
        for device in &config.vfio {
            if incoming.is_some() {
                // The guest gets it when it runs. What is wrong with it is told before the guest comes over.
                Passthrough::check(device)?;
                passthrough.add_ports(1)?;
            } else {
                passthrough.add_cold(device)?;
            }
        }
        passthrough.add_ports(config.hotplug_ports)?;
        let devices = add_pci_devices(&resources, &config.devices, &wanted, &pci)?;
        let mut processors = Vec::new();
        for cpu in 0..cpus {
            let fd = vm
                .fd()
                .create_vcpu(cpu.into())
                .map_err(|e| Error::CreateCpu {
                    cpu,
                    source: e.into(),
                })?;
            template.prepare(&fd, cpu, entry.as_ref().filter(|_| cpu == 0))?;
            processors.push(Arc::new(Mutex::new(fd)));
        }
        // Last: a guest that comes while it runs stands still from here on.
        let memory = resources.memory.current();
        let before = incoming.as_mut().map(|incoming| incoming.read(&memory));
        let before = before.transpose().map_err(|error| {
            if connection.is_some() {
                error.of_arrival()
            } else {
                error
            }
        })?;
        if let Some(state) = &before {
            // Controllers first: processors and devices interrupt through them.
            state.chips.restore(vm.fd()).map_err(snapshot::Error::Cpu)?;
            if state.cpus.len() != processors.len() {
                return Err(snapshot::Error::Damaged.into());
            }
            for ((cpu, vcpu), state) in (0u8..).zip(&processors).zip(&state.cpus) {
                let restored = state.restore(&host::lock(vcpu), cpu);
                restored.map_err(snapshot::Error::Cpu)?;
            }
            host::restore(&pci, &state.functions)?;
        }
        let control = Control {
            cpus,
            memory: Arc::clone(&resources.memory),
            devices: config.devices.clone(),
            passthrough,
            gate: Gate::default(),
            exit: resources.exit.clone(),
            snapshots,
            migrate_to: config.migrate_to.clone(),
            whole: Whole {
                processors: processors.clone(),
                vm,
                template,
                memory: Arc::clone(&resources.memory),
                options,
                devices,
                pci: Arc::clone(&pci),
                platform: OnceLock::new(),
            },
            changing: Mutex::default(),
            doubtful: Mutex::default(),
        };
        Ok(Self {
            processors,
            resources,
            pci,
            control,
            before,
            connection,
        })
    }

    /// Runs the guest until the machine ends.
    fn run(
        self,
        config: &Config,
        peers: Peers,
        events: &mut EventLoop,
    ) -> Result<ExitReason, Error> {
        let Self {
            processors,
            resources,
            pci,
            control,
            before,
            connection,
        } = self;
        // Held to the end, control socket or not: it has what answers when the host wants a function back.
        let control = Arc::new(control);
        let socket = config.api_socket.as_deref();
        let _socket = socket
            .map(|path| ControlSocket::start(path, peers.clone(), Arc::clone(&control)))
            .transpose()?;
        let ports = Arc::new(Mutex::new(ConfigPorts::new(Arc::clone(&pci))));
        // Last: whatever fails before is reported to a terminal that is not raw yet.
        let (mut console, output) = Console::open(&config.serial, &resources.exit)?;
        let restored = before.as_ref().map(|state| &state.platform);
        let (platform, input) = add_platform_devices(&resources, output, ports, restored)?;
        // Nobody else sets it.
        let _ = control.whole.platform.set(platform);
        console.start(input, resources.exit.clone(), peers)?;
        let context = Context {
            vm: Arc::clone(&resources.vm),
            ports: Arc::clone(&resources.ports),
            mmio: Arc::clone(&resources.mmio),
            exit: resources.exit.clone(),
            gate: control.gate.clone(),
        };
        if let Some(mut connection) = connection {
            let kept = connection
                .say(transport::READY)
                .and_then(|()| connection.hear(transport::GO))
                .and_then(|()| connection.say(transport::RUNNING));
            kept.map_err(snapshot::Error::Kept)?;
        }
        if let Some(state) = &before {
            host::resume(&pci);
            let clock = state.chips.start_clock(resources.vm.fd());
            clock.map_err(snapshot::Error::Cpu)?;
        }
        let vcpus = Vcpus::start(processors, &context)?;
        if before.is_some() && !config.vfio.is_empty() {
            plug_later(&control, &config.vfio);
        }
        events.run().map_err(Error::Events)?;
        drop(vcpus);
        pci.lock()
            .unwrap_or_else(PoisonError::into_inner)
            .remove_all();
        let reason = resources.exit.reason();
        Ok(reason.unwrap_or_else(|| lost_thread("that waits for events")))
    }
}

/// Gives the guest functions in a thread of its own: a slot that another has just left is waited for.
fn plug_later(control: &Arc<Control>, functions: &[VfioConfig]) {
    let (control, functions) = (Arc::clone(control), functions.to_vec());
    let plug = move || {
        // Who asks for a snapshot meanwhile is to find them.
        let _changing = host::lock(&control.changing);
        control.passthrough.plug(&functions);
    };
    let thread = std::thread::Builder::new().name("vfio plug".into());
    if let Err(error) = thread.spawn(plug) {
        // The guest runs, and a card stands in for them.
        tracing::error!(
            error = &error as &dyn std::error::Error,
            "the guest does without its devices: plug them in (device-add)"
        );
    }
}

/// Signals that ask for an orderly end.
const END_SIGNALS: [(Signal, &str); 3] = [
    (Signal::SIGTERM, "SIGTERM"),
    (Signal::SIGINT, "SIGINT"),
    (Signal::SIGHUP, "SIGHUP"),
];

/// The control thread's loop: it ends with the machine, and signals end the machine. Blocks the
/// signals in this thread, and so in all that it starts.
fn event_loop(exit: &ExitHandle) -> Result<EventLoop, Error> {
    let failed = |e: nix::Error| Error::Events(e.into());
    let events = EventLoop::new().map_err(Error::Events)?;
    let handle = events.handle();

    let mut set = SigSet::empty();
    END_SIGNALS.iter().for_each(|(signal, _)| set.add(*signal));
    set.thread_block().map_err(failed)?;
    let flags = SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC;
    let signals = SignalFd::with_flags(&set, flags).map_err(failed)?;
    let on_signal = exit.clone();
    let fd = signals.as_fd().as_raw_fd();
    let add = handle.add(
        fd,
        Box::new(move || {
            while let Ok(Some(info)) = signals.read_signal() {
                let found = END_SIGNALS
                    .iter()
                    .find(|(s, _)| *s as u32 == info.ssi_signo);
                on_signal.end(ExitReason::Requested(
                    found.map_or("a signal", |(_, name)| name),
                ));
            }
            Next::Continue
        }),
    );
    add.map_err(Error::Events)?;

    let (stop, fd) = (handle.clone(), exit.as_raw_fd());
    let keep = exit.clone();
    let add = handle.add(
        fd,
        Box::new(move || {
            if keep.is_set() {
                stop.stop();
            }
            Next::Continue
        }),
    );
    add.map_err(Error::Events)?;
    Ok(events)
}

/// Memory that grows as `plan` says. Its interrupt is edge-triggered.
fn growing_memory(
    vm: &Arc<Vm>,
    router: &GsiRouter,
    ram: GuestMemoryMmap,
    plan: Plan,
) -> Result<Arc<GrowingMemory>, Error> {
    let interrupt = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(Error::Events)?;
    if plan.devices().is_some() {
        router.register_irqfd(&interrupt, layout::MEMORY_HOTPLUG_IRQ)?;
    }
    let slots = Arc::clone(vm) as _;
    Ok(Arc::new(GrowingMemory::new(ram, plan, slots, interrupt)))
}

/// Where BARs can be.
fn windows(resources: &Resources) -> Windows {
    Windows {
        low: Range {
            start: layout::PCI_MMIO32_START,
            size: layout::PCI_MMIO32_SIZE,
        },
        high: resources.pci_mmio64,
    }
}

/// Puts the devices that back-ends serve on the PCI bus, and the bus into the address space. `before` are those of the machine
/// that the guest was in, if it was in one.
fn add_pci_devices(
    resources: &Resources,
    devices: &[DeviceConfig],
    before: &[snapshot::DeviceDescription],
    root: &SharedRoot,
) -> Result<Vec<Attached>, Error> {
    let mut attached = Vec::with_capacity(devices.len());
    for (index, device) in devices.iter().enumerate() {
        let socket = device.socket.clone();
        let memory = resources.memory.current();
        let device = VhostUserDevice::connect(
            device.clone(),
            memory.clone(),
            resources.events.clone(),
            resources.exit.clone(),
        )?;
        let listener = device.memory_listener();
        resources.memory.register(&listener, &memory)?;
        let mut description = snapshot::DeviceDescription {
            device_type: device.device_type(),
            features: device.features(),
            queues: device.queue_sizes(),
        };
        if let Some(before) = before.get(index) {
            description = before.served_by(description, &socket)?;
        }
        let (router, vm) = (Arc::clone(&resources.router), Arc::clone(resources.vm.fd()));
        let function = VirtioPci::offering(description.features, Box::new(device), router, vm)
            .map_err(|source| Error::Virtio {
                socket: socket.clone(),
                source,
            })?;
        let function = Arc::new(Mutex::new(function));
        let shared: SharedFunction = Arc::clone(&function) as _;
        host::lock(root).add(shared)?;
        attached.push(Attached {
            socket,
            description,
            function,
        });
    }
    let ecam = Arc::new(Mutex::new(Ecam(Arc::clone(root))));
    resources
        .mmio
        .insert(layout::ECAM_START, layout::ECAM_SIZE, ecam)?;
    Ok(attached)
}

/// Puts the platform's fixed devices on the buses; `before` is their state. `pci` answers the PCI configuration ports.
fn add_platform_devices(
    resources: &Resources,
    output: serial::Output,
    pci: Arc<Mutex<ConfigPorts>>,
    before: Option<&PlatformState>,
) -> Result<(Platform, SerialInput), Error> {
    let Resources {
        memory,
        ports,
        exit,
        router,
        ..
    } = resources;
    let irq = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(Error::Events)?;
    router.register_irqfd(&irq, layout::SERIAL_IRQ)?;
    let (serial, input) = match before {
        None => Serial::new(irq, output),
        Some(state) => Serial::restored(irq, output, &state.serial).map_err(Error::Serial)?,
    };
    let platform = Platform {
        serial,
        rtc: Arc::new(Mutex::new(Rtc::new())),
        pm: Arc::new(Mutex::new(AcpiPm::new(exit.clone()))),
        reset: Arc::new(Mutex::new(ResetControl::new(
            exit.clone(),
            Some(Arc::clone(&pci) as SharedDevice),
        ))),
        pci,
    };
    if before.is_some_and(|state| !platform.restore(state)) {
        return Err(snapshot::Error::Damaged.into());
    }
    let (com1, rtc) = (Arc::clone(&platform.serial), Arc::clone(&platform.rtc));
    ports.insert(layout::SERIAL_PORT, serial::SIZE, com1)?;
    ports.insert(layout::RTC_PORT, rtc::SIZE, rtc)?;
    let pm = Arc::clone(&platform.pm);
    ports.insert(layout::ACPI_PM_PORT, acpi_pm::SIZE, pm)?;
    let keyboard = Arc::new(Mutex::new(I8042::new(exit.clone())));
    ports.insert(layout::I8042_COMMAND_PORT, 1, keyboard)?;
    if let Some(devices) = memory.devices() {
        let Range { start, size } = devices.ports();
        ports.insert(start, size, memory.registers())?;
    }
    let pvpanic = Arc::new(Mutex::new(PvPanic::new(exit.clone())));
    ports.insert(layout::PVPANIC_PORT, 1, pvpanic)?;
    let reset = Arc::clone(&platform.reset);
    ports.insert(layout::PCI_CONFIG_PORT, layout::PCI_CONFIG_PORT_SIZE, reset)?;
    Ok((platform, input))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_asks_for_a_snapshot_is_told_what_would_help() {
        use snapshot::Error::{Busy, CutShort, Exists, Name};
        let name = || "state".to_owned();
        for (error, code) in [
            (Name(name()), ErrorCode::BadRequest),
            (Exists(name()), ErrorCode::Conflict),
            (Busy(name()), ErrorCode::Busy),
            (CutShort, ErrorCode::Failed),
        ] {
            assert_eq!(moving_failed(error).code, code);
        }
    }
}

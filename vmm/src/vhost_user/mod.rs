//! Virtio devices that another process serves: the vhost-user front-end.
//!
//! | module | concern |
//! | --- | --- |
//! | [`link`] | the conversation with a back-end |
//! | [`offer`] | what the guest is offered |
//! | `channel` | what the back-end asks of us |
//!
//! ```text
//!              connect          DRIVER_OK
//!   (nothing) ─────────▶ idle ─────────────▶ running
//!                         ▲ ◀───────────────  │
//!                         │    guest's reset  │ the back-end goes
//!                         │                   ▼
//!                         └───────────────── lost
//!                          it comes back
//! ```
//!
//! Guest memory, doorbells and interrupts are handed over at DRIVER_OK; from then on this process
//! has no part in the data path. Memory that is added later is handed over at once to a back-end that
//! runs; another gets it with the rest.
//!
//! A back-end that goes is waited for in the background; the device stays where it is and the
//! guest's requests wait in its queues. What happens when it comes back depends on what is known:
//!
//! - The guest had not started the device: nothing is lost, all goes on as usual.
//! - A network card with split queues: its back-ends use buffers in order, so the used index tells
//!   where to go on; packets that were under way are lost, as on any network. Packed queues have no such
//!   index, so they are not offered to such devices unless asked for.
//! - A back-end that notes what is under way (INFLIGHT_SHMFD), likewise: the next one gets the notes,
//!   and repeats what is not done. The notes tell how far packed queues were served, too.
//! - Other devices: requests that were under way may have been done or not. They are neither
//!   repeated nor dropped silently: the device says NEEDS_RESET, and serves the guest again once its
//!   driver has reset it.

mod channel;
pub mod link;
pub mod offer;

use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

use self::channel::Channel;
use self::link::{
    F_LOG_ALL, Guard, Inflight, Link, LinkError, Ring, RingEvents, SocketLink, connect, is_closed,
};
use self::offer::{ConfigSource, Offer};
use crate::config::{DeviceConfig, DeviceType};
use crate::event_loop::{HandlerId, LoopHandle, Next};
use crate::exit::ExitHandle;
use crate::memory_hotplug::MemoryListener;
use crate::pci::msix::new_event;
use crate::snapshot::dirty::DirtyLog;
use crate::virtio::bits::F_RING_PACKED;
use crate::virtio::{Activation, ActiveQueue, Notifier, Queue, Suspended, VirtioDevice};

/// How long a back-end may take for a request.
const ANSWER_LIMIT: Duration = Duration::from_secs(if cfg!(test) { 2 } else { 15 });
/// How long it may take to finish what is under way when a device is reset.
const STOP_LIMIT: Duration = Duration::from_secs(30);
/// Pause before the first attempt to reach a back-end that is gone; each further one is twice as long.
const RECONNECT_PAUSE: Duration = Duration::from_millis(50);
/// The longest, and that of a back-end that goes again and again, as soon as it has come back: the guest goes on within a second.
const RECONNECT_PAUSE_MAX: Duration = Duration::from_millis(500);
/// A back-end that was there for so long is not one of those.
const STABLE: Duration = Duration::from_secs(10);

/// Why a device has no back-end.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Nobody listens.
    #[error("no back-end for device {kind} at {socket}: is it running? (waited {} s)", waited.as_secs())]
    Connect {
        /// Type of the device.
        kind: DeviceType,
        /// The socket's path.
        socket: PathBuf,
        /// How long it was waited for.
        waited: Duration,
        /// The last attempt's failure.
        #[source]
        source: io::Error,
    },
    /// It hung up before it was ready, or said what nobody understands.
    #[error(
        "the negotiation with the back-end for device {kind} at {socket} failed: did it end, or is \
         it no vhost-user back-end?"
    )]
    Negotiate {
        /// Type of the device.
        kind: DeviceType,
        /// The socket's path.
        socket: PathBuf,
        /// The step in question.
        #[source]
        source: LinkError,
    },
    /// It does not suit the device.
    #[error("the back-end for device {kind} at {socket} cannot be used")]
    Unsuitable {
        /// Type of the device.
        kind: DeviceType,
        /// The socket's path.
        socket: PathBuf,
        /// Why not.
        #[source]
        source: Box<offer::Error>,
    },
    /// It does not speak vhost-user, or hangs.
    #[error("the back-end for device {kind} at {socket} does not answer within {} s: does it speak vhost-user?", limit.as_secs())]
    Silent {
        /// Type of the device.
        kind: DeviceType,
        /// The socket's path.
        socket: PathBuf,
        /// The limit.
        limit: Duration,
    },
    /// The process has no file descriptor or thread left.
    #[error("no resources to talk to the back-end for device {kind} at {socket}")]
    Resources {
        /// Type of the device.
        kind: DeviceType,
        /// The socket's path.
        socket: PathBuf,
        /// What is missing.
        #[source]
        source: io::Error,
    },
}

/// Why a device cannot be started.
#[derive(Debug, thiserror::Error)]
enum StartError {
    /// The driver put a queue where no memory is.
    #[error("queue {index}: its {part} is not {alignment}-byte aligned guest memory")]
    Area {
        index: u16,
        part: &'static str,
        alignment: u64,
    },
    /// The back-end refused something.
    #[error("the back-end at {socket} refuses to start the device")]
    Refused {
        socket: PathBuf,
        #[source]
        source: LinkError,
    },
}

/// Why a device cannot be moved.
#[derive(Debug, thiserror::Error)]
enum MoveError {
    /// Where the queues are is not known.
    #[error("its back-end at {socket} is gone, or does not stop: wait until there is one again")]
    Gone { socket: PathBuf },
    /// The back-end refused something.
    #[error("the back-end at {socket} refuses to {action} its state, or what it writes")]
    Refused {
        socket: PathBuf,
        action: &'static str,
        #[source]
        source: LinkError,
    },
    /// The back-end refused what another one is to hand over to it.
    #[error(
        "the back-end at {socket} does not take over the guest's device: use one of the same kind and version, with the same options; its log says more"
    )]
    Unwilling {
        socket: PathBuf,
        #[source]
        source: LinkError,
    },
    /// It has another disk, or another card.
    #[error(
        "the back-end at {socket} has another {field} in its configuration than the guest's driver has read, which does not expect that: start it with the same disk or card, and the same options"
    )]
    Unlike {
        socket: PathBuf,
        field: &'static str,
    },
    /// Nothing could be said to the back-end.
    #[error("no conversation with the back-end at {socket} about its state: {why}")]
    Silent { socket: PathBuf, why: String },
    /// There it was able to.
    #[error(
        "the back-end at {socket} cannot take over the state of the one before (DEVICE_STATE): use one of the same kind and version"
    )]
    Stateless { socket: PathBuf },
    /// What it writes would be lost.
    #[error(
        "the back-end at {socket} cannot tell which pages it writes (VHOST_F_LOG_ALL), so the guest cannot move while it runs: take a snapshot"
    )]
    Blind { socket: PathBuf },
    /// Queues that ran must have a place to go on.
    #[error("queue {index} ran, but nothing says where it goes on")]
    Base { index: u16 },
}

/// Why a device cannot have more memory.
#[derive(Debug, thiserror::Error)]
enum GrowError {
    /// The back-end refused it.
    #[error("the back-end at {socket} refuses a larger guest memory")]
    Refused {
        socket: PathBuf,
        #[source]
        source: LinkError,
    },
    /// Nothing could be said to the back-end.
    #[error("no resources to talk to the back-end at {socket}")]
    Resources {
        socket: PathBuf,
        #[source]
        source: io::Error,
    },
}

/// How to reach a back-end.
trait Dial: Send + Sync {
    /// Connects, within `patience`. The socket, if there is one, is watched for the peer's end.
    fn dial(&self, patience: Duration) -> io::Result<(Box<dyn Link>, Option<UnixStream>)>;
}

struct SocketDial(PathBuf);

impl Dial for SocketDial {
    fn dial(&self, patience: Duration) -> io::Result<(Box<dyn Link>, Option<UnixStream>)> {
        let socket = connect(&self.0, patience)?;
        let watched = socket.try_clone()?;
        Ok((Box::new(SocketLink::new(socket)?), Some(watched)))
    }
}

struct Connection {
    link: Box<dyn Link>,
    socket: Option<UnixStream>,
}

enum CallError {
    /// The back-end said no.
    Refused(LinkError),
    /// It is gone, or talks nonsense.
    Lost(LinkError),
    /// It did not answer in time.
    Silent,
    Resources(io::Error),
}

impl Connection {
    /// Talks to the back-end, for no longer than `limit`, and not much longer than until the end
    /// of the machine.
    fn call<T, E>(
        &mut self,
        limit: Duration,
        exit: &ExitHandle,
        talk: impl FnOnce(&mut dyn Link) -> Result<T, E>,
    ) -> Result<Result<T, E>, CallError> {
        let guard = self.socket.as_ref().map(|s| Guard::new(s, limit, exit));
        let guard = guard.transpose().map_err(CallError::Resources)?;
        let result = talk(&mut *self.link);
        match (result, guard) {
            (Err(_), Some(guard)) if guard.expired() => Err(CallError::Silent),
            (result, _) => Ok(result),
        }
    }

    fn simple<T>(
        &mut self,
        limit: Duration,
        exit: &ExitHandle,
        talk: impl FnOnce(&mut dyn Link) -> Result<T, LinkError>,
    ) -> Result<T, CallError> {
        self.call(limit, exit, talk)?.map_err(|error| {
            if error.is_refusal() {
                CallError::Refused(error)
            } else {
                CallError::Lost(error)
            }
        })
    }
}

/// The queues that the guest has started.
struct Running {
    features: u64,
    queues: Vec<(ActiveQueue, Ring)>,
    error: EventFd,
    error_handler: Option<HandlerId>,
    /// What is under way, as the back-ends note it.
    inflight: Option<Inflight>,
    /// Each queue's base is where it was stopped, so it need not be found out.
    stopped: bool,
    /// What the back-end kept, which it, or the next one, takes over before it starts.
    kept: Option<Vec<u8>>,
    /// The connection whose back-end has all but the queues.
    equipped: Option<u64>,
    /// No back-end is to have them now.
    suspended: bool,
    /// A back-end has had them: what it did with them is not known if it goes.
    handed_over: bool,
    /// Since when the guest has waited for a back-end, if there is none.
    waiting_since: Instant,
    /// There was a back-end that went.
    lost: bool,
    /// It has waited too long.
    given_up: bool,
    /// The connection whose back-end has them now.
    on: Option<u64>,
}

impl Running {
    fn is_packed(&self) -> bool {
        self.features & F_RING_PACKED != 0
    }
}

#[derive(Default)]
struct State {
    /// All of guest memory as it is now.
    memory: GuestMemoryMmap,
    connection: Option<Connection>,
    handlers: Vec<HandlerId>,
    config: Vec<u8>,
    running: Option<Running>,
    /// Where the queues that were stopped last are to go on, by index.
    bases: Vec<(usize, u32)>,
    /// Where back-ends note which pages they write.
    log: Option<Arc<DirtyLog>>,
    /// Counts connections, so that news of an old one is told from news of this one.
    epoch: u64,
    /// Since when there is this connection.
    since: Option<Instant>,
    /// How often it was lost in short order.
    losses: u32,
}

struct Shared {
    wanted: DeviceConfig,
    offer: Offer,
    dial: Box<dyn Dial>,
    events: LoopHandle,
    exit: ExitHandle,
    notifier: Arc<Notifier>,
    config_stale: AtomicBool,
    state: Mutex<State>,
}

/// A device of a virtual machine whose work another process does.
pub struct VhostUserDevice {
    shared: Arc<Shared>,
}

impl VhostUserDevice {
    /// Connects to the back-end and negotiates with it. `memory` is the guest's RAM, all of it
    /// backed by files.
    pub fn connect(
        wanted: DeviceConfig,
        memory: GuestMemoryMmap,
        events: LoopHandle,
        exit: ExitHandle,
    ) -> Result<Self, Error> {
        let dial = SocketDial(wanted.socket.clone());
        Self::with_dial(wanted, memory, events, exit, Box::new(dial))
    }

    fn with_dial(
        wanted: DeviceConfig,
        memory: GuestMemoryMmap,
        events: LoopHandle,
        exit: ExitHandle,
        dial: Box<dyn Dial>,
    ) -> Result<Self, Error> {
        let patience = wanted.reconnect_timeout;
        let (connection, offer, config) = negotiate(&*dial, &wanted, patience, &exit)?;
        let shared = Arc::new(Shared {
            wanted,
            offer,
            dial,
            events,
            exit,
            notifier: Arc::default(),
            config_stale: AtomicBool::new(false),
            state: Mutex::new(State {
                memory,
                ..State::default()
            }),
        });
        let mut state = shared.state();
        shared
            .install(&mut state, connection, config)
            .map_err(|error| call_error(&shared.wanted, error))?;
        drop(state);
        Ok(Self { shared })
    }

    /// What is to know of memory that is added to the guest.
    pub fn memory_listener(&self) -> Arc<dyn MemoryListener> {
        Arc::clone(&self.shared) as _
    }
}

fn negotiate(
    dial: &dyn Dial,
    wanted: &DeviceConfig,
    patience: Duration,
    exit: &ExitHandle,
) -> Result<(Connection, Offer, Vec<u8>), Error> {
    let (kind, socket) = (wanted.device_type, || wanted.socket.clone());
    let start = Instant::now();
    let (link, stream) = dial.dial(patience).map_err(|source| Error::Connect {
        kind,
        socket: socket(),
        waited: start.elapsed(),
        source,
    })?;
    let mut connection = Connection {
        link,
        socket: stream,
    };
    let talk = |link: &mut dyn Link| {
        let offer = Offer::negotiate(link, wanted)?;
        let config = offer.read_config(link)?;
        Ok((offer, config))
    };
    match connection.call(ANSWER_LIMIT, exit, talk) {
        Ok(Ok((offer, config))) => Ok((connection, offer, config)),
        Ok(Err(offer::Error::Link(source))) => Err(call_error(wanted, CallError::Lost(source))),
        Ok(Err(source)) => Err(Error::Unsuitable {
            kind,
            socket: socket(),
            source: Box::new(source),
        }),
        Err(error) => Err(call_error(wanted, error)),
    }
}

/// What a conversation that failed means for a device that does not exist yet.
fn call_error(wanted: &DeviceConfig, error: CallError) -> Error {
    let (kind, socket) = (wanted.device_type, wanted.socket.clone());
    match error {
        CallError::Refused(source) | CallError::Lost(source) => Error::Negotiate {
            kind,
            socket,
            source,
        },
        CallError::Silent => Error::Silent {
            kind,
            socket,
            limit: ANSWER_LIMIT,
        },
        CallError::Resources(source) => Error::Resources {
            kind,
            socket,
            source,
        },
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes a negotiated connection the device's, and watches it.
    fn install(
        self: &Arc<Self>,
        state: &mut State,
        mut connection: Connection,
        config: Vec<u8>,
    ) -> Result<(), CallError> {
        state.epoch += 1;
        let epoch = state.epoch;
        if self.offer.announces_changes() {
            let (channel, theirs) = Channel::new().map_err(CallError::Resources)?;
            let handed =
                connection.simple(ANSWER_LIMIT, &self.exit, |link| link.set_channel(&theirs));
            match handed {
                Ok(()) => {
                    let handler = self.watch_channel(channel);
                    state.handlers.push(handler.map_err(CallError::Resources)?);
                }
                Err(CallError::Refused(_)) => {
                    tracing::warn!("{self}: the back-end takes no channel for its requests");
                }
                Err(error) => return Err(error),
            }
        }
        if let Some(socket) = &connection.socket {
            let watched = socket.try_clone().map_err(CallError::Resources)?;
            let weak = Arc::downgrade(self);
            let fd = watched.as_raw_fd();
            let handler = move || {
                if !is_closed(&watched) {
                    return Next::Continue;
                }
                if let Some(shared) = weak.upgrade() {
                    let mut state = shared.state();
                    if state.epoch == epoch {
                        shared.lose(&mut state, "it closed the connection");
                    }
                }
                Next::Remove
            };
            let handler = self.events.add(fd, Box::new(handler));
            state.handlers.push(handler.map_err(CallError::Resources)?);
        }
        state.connection = Some(connection);
        state.config = config;
        state.since = Some(Instant::now());
        Ok(())
    }

    fn watch_channel(self: &Arc<Self>, mut channel: Channel) -> io::Result<HandlerId> {
        let weak = Arc::downgrade(self);
        let fd = channel.socket().as_raw_fd();
        let handler = move || {
            let requests = channel.serve();
            if requests.config_changed
                && let Some(shared) = weak.upgrade()
            {
                tracing::debug!("{shared}: the configuration has changed");
                shared.config_stale.store(true, Ordering::SeqCst);
                shared.notifier.config_changed();
            }
            if requests.closed {
                Next::Remove
            } else {
                Next::Continue
            }
        };
        self.events.add(fd, Box::new(handler))
    }

    /// The back-end is gone: says so once, tells the guest what it needs to know, and waits for
    /// the back-end's return in the background.
    fn lose(self: &Arc<Self>, state: &mut State, why: &str) {
        if state.connection.take().is_none() {
            return;
        }
        for handler in state.handlers.drain(..) {
            self.events.remove(handler);
        }
        let stayed = |least| state.since.is_none_or(|since| since.elapsed() >= least);
        let stable = stayed(STABLE);
        // One that goes again at once has not been back.
        let served = stable || self.wanted.loss_timeout.is_some_and(stayed);
        if let Some(running) = &mut state.running
            && (served && running.on == Some(state.epoch) || !running.lost)
        {
            running.waiting_since = Instant::now();
            running.lost = true;
        }
        state.epoch += 1;
        let waits = match &state.running {
            None => "the guest does not use the device now",
            Some(running) if self.goes_on(running) => "the guest waits for it",
            Some(_) => {
                self.notifier.needs_reset();
                "the guest's driver must reset the device when the back-end is back"
            }
        };
        tracing::error!("{self}: the back-end is gone: {why}; {waits}");
        self.give_up_if_due(state);
        state.losses = if stable {
            0
        } else {
            state.losses.saturating_add(1)
        };
        let pause = RECONNECT_PAUSE.saturating_mul(1 << state.losses.min(5).saturating_sub(1));
        let pause = pause.min(RECONNECT_PAUSE_MAX);
        let (weak, epoch) = (Arc::downgrade(self), state.epoch);
        let spawned = std::thread::Builder::new()
            .name("vhost-user-wait".into())
            .spawn(move || wait_for_return(&weak, epoch, pause));
        if let Err(error) = spawned {
            tracing::error!(%error, "{self}: cannot wait for the back-end");
        }
    }

    /// Whether the device can go on with another back-end.
    fn goes_on(&self, running: &Running) -> bool {
        // Nothing is under way, and all that the back-end knew is here.
        let whole = running.stopped && running.kept.is_some();
        let resumes = !running.handed_over || self.offer.resumes(running.is_packed());
        (whole || resumes) && !running.given_up
    }

    /// As [`Self::give_up_if_due`], unless a back-end has been here since this epoch.
    fn give_up(&self, epoch: u64) {
        let mut state = self.state();
        if state.epoch == epoch {
            self.give_up_if_due(&mut state);
        }
    }

    /// Tells a guest that it has waited too long for its back-end, once.
    fn give_up_if_due(&self, state: &mut State) {
        let Some(limit) = self.wanted.loss_timeout else {
            return;
        };
        let waits = |running: &&mut Running| {
            self.goes_on(running) && !running.suspended && running.waiting_since.elapsed() >= limit
        };
        if let Some(running) = state.running.as_mut().filter(waits) {
            running.given_up = true;
            self.notifier.needs_reset();
            tracing::error!(
                "{self}: the back-end has not come back to stay in {} s (loss-timeout); the guest's driver must reset the device",
                limit.as_secs()
            );
        }
    }

    /// One attempt at reaching a back-end that came back.
    fn reconnect(self: &Arc<Self>, epoch: u64) -> Attempt {
        let negotiated = negotiate(&*self.dial, &self.wanted, Duration::ZERO, &self.exit);
        let (connection, offer, config) = match negotiated {
            Ok(negotiated) => negotiated,
            Err(Error::Connect { .. }) => return Attempt::Again,
            Err(error) => return Attempt::Unfit(Box::new(error)),
        };
        if !self.offer.is_served_by(&offer) {
            let why = "it lacks features, queues or configuration that the guest was offered";
            return Attempt::Unfit(why.into());
        }
        let mut state = self.state();
        if state.epoch != epoch {
            return Attempt::Done;
        }
        let same_config = state.config == config;
        if let Err(error) = self.install(&mut state, connection, config) {
            for handler in state.handlers.drain(..) {
                self.events.remove(handler);
            }
            state.epoch = epoch;
            return Attempt::Unfit(error.to_string().into());
        }
        tracing::warn!("{self}: the back-end is back");
        if !same_config {
            self.notifier.config_changed();
        }
        let goes_on = |running: &Running| self.goes_on(running) && !running.suspended;
        let goes_on = state.running.as_ref().is_some_and(goes_on);
        if goes_on && let Err(error) = self.start(&mut state) {
            tracing::error!(
                error = &error as &dyn std::error::Error,
                "{self}: the device cannot go on"
            );
            self.notifier.needs_reset();
        }
        Attempt::Done
    }

    /// Queues that are about to be handed to a back-end.
    fn run(
        self: &Arc<Self>,
        features: u64,
        queues: Vec<(ActiveQueue, Ring)>,
    ) -> io::Result<Running> {
        let error = new_event()?;
        let weak = Arc::downgrade(self);
        // Once is enough, so the eventfd need not be read: a back-end could make that block.
        let handler = move || {
            if let Some(shared) = weak.upgrade() {
                if shared.notifier.may_complain() {
                    tracing::error!("{shared}: the back-end has stopped a queue");
                }
                shared.notifier.needs_reset();
            }
            Next::Remove
        };
        let error_handler = Some(self.events.add(error.as_raw_fd(), Box::new(handler))?);
        Ok(Running {
            features,
            queues,
            error,
            error_handler,
            inflight: None,
            stopped: false,
            kept: None,
            equipped: None,
            suspended: false,
            handed_over: false,
            waiting_since: Instant::now(),
            lost: false,
            given_up: false,
            on: None,
        })
    }

    /// Hands a back-end all but the queues, which are stopped.
    fn equip(
        &self,
        link: &mut dyn Link,
        memory: &GuestMemoryMmap,
        log: Option<&DirtyLog>,
        running: &mut Running,
    ) -> Result<(), LinkError> {
        let noted = if log.is_some() { F_LOG_ALL } else { 0 };
        link.set_features(self.offer.backend_choice(running.features | noted))?;
        if self.offer.tracks_inflight() {
            let count = u16::try_from(self.offer.queue_sizes.len()).unwrap_or(u16::MAX);
            let inflight = match running.inflight.take() {
                Some(inflight) => inflight,
                None => link.new_inflight(count, self.wanted.queue_size)?,
            };
            link.set_inflight(running.inflight.insert(inflight))?;
        }
        link.set_memory(memory)?;
        if let Some(log) = log {
            link.set_log(log)?;
        }
        match &running.kept {
            Some(kept) => link.load_state(kept),
            None => Ok(()),
        }
    }

    /// Hands the queues in `state.running` to the back-end. A back-end that goes meanwhile is no
    /// error: it is waited for.
    fn start(self: &Arc<Self>, state: &mut State) -> Result<(), StartError> {
        let (Some(connection), Some(running)) = (&mut state.connection, &mut state.running) else {
            return Ok(());
        };
        if !running.is_packed() && !running.stopped {
            for (active, ring) in &mut running.queues {
                // Zero for a queue that nobody has served yet.
                ring.base = used_index(&state.memory, &active.queue).into();
            }
        }
        let log = state.log.clone();
        for (active, ring) in &mut running.queues {
            ring.log = log.as_ref().map(|_| active.queue.used);
        }
        let equipped = running.equipped == Some(state.epoch) && log.is_none();
        let again = running.handed_over;
        running.handed_over = true;
        let mut config = None;
        let talk = |link: &mut dyn Link| {
            if !equipped {
                self.equip(link, &state.memory, log.as_deref(), running)?;
                // A card's address may be part of what was kept.
                if running.kept.is_some() && self.has_config() {
                    config = Some(self.offer.read_config(link)?);
                }
            }
            running.stopped = false;
            for (active, ring) in &running.queues {
                let events = RingEvents {
                    kick: &active.kick,
                    call: &active.call,
                    error: &running.error,
                };
                link.start_ring(ring, &events)?;
            }
            if self.offer.enables_rings {
                for (_, ring) in &running.queues {
                    link.enable_ring(ring.index, true)?;
                }
            }
            Ok(())
        };
        let told = connection.simple(ANSWER_LIMIT, &self.exit, talk);
        if let Some(config) = config {
            state.config = config;
        }
        match told {
            // From here on what it keeps changes.
            Ok(()) => {
                running.on = Some(state.epoch);
                (running.kept, running.equipped) = (None, None);
            }
            Err(CallError::Refused(source)) => {
                // Some queues may run.
                running.on = Some(state.epoch);
                return Err(StartError::Refused {
                    socket: self.wanted.socket.clone(),
                    source,
                });
            }
            Err(error) => {
                // The guest has put no request into a queue before DRIVER_OK.
                running.handed_over = again;
                self.lose(state, &error.to_string());
                return Ok(());
            }
        }
        if again {
            for (active, _) in &running.queues {
                // What the guest has put in while nobody looked; and it may wait for buffers that
                // were used without an interrupt.
                let _ = (active.kick.write(1), active.call.write(1));
            }
        }
        tracing::debug!(queues = running.queues.len(), "{self}: started");
        Ok(())
    }

    /// Lets a back-end that has the queues, and so guest memory, have what `memory` is instead. A
    /// back-end that goes meanwhile is no error: it is waited for.
    fn set_memory(
        self: &Arc<Self>,
        state: &mut State,
        memory: &GuestMemoryMmap,
    ) -> Result<(), GrowError> {
        let now = Some(state.epoch);
        let has_memory = |running: &Running| running.on == now || running.equipped == now;
        let has_memory = state.running.as_ref().is_some_and(has_memory);
        if let (Some(connection), true) = (&mut state.connection, has_memory) {
            let told = connection.simple(ANSWER_LIMIT, &self.exit, |link| link.set_memory(memory));
            let socket = || self.wanted.socket.clone();
            match told {
                Ok(()) => tracing::debug!("{self}: the back-end has another guest memory"),
                Err(CallError::Refused(source)) => {
                    let socket = socket();
                    return Err(GrowError::Refused { socket, source });
                }
                Err(CallError::Resources(source)) => {
                    let socket = socket();
                    return Err(GrowError::Resources { socket, source });
                }
                Err(error) => self.lose(state, &error.to_string()),
            }
        }
        state.memory = memory.clone();
        Ok(())
    }

    fn stop(self: &Arc<Self>, state: &mut State) {
        let Some(running) = state.running.take() else {
            return;
        };
        if let Some(handler) = running.error_handler {
            self.events.remove(handler);
        }
        if !running.suspended
            && let Some(bases) = self.halt(state, &running)
        {
            state.bases = bases;
        }
    }

    /// Gets the queues back from the back-end that has them, after what is under way. Returns where each is to go on, if the
    /// back-end says so.
    fn halt(self: &Arc<Self>, state: &mut State, running: &Running) -> Option<Vec<(usize, u32)>> {
        if running.on != Some(state.epoch) {
            return None;
        }
        let connection = state.connection.as_mut()?;
        let enables = self.offer.enables_rings;
        let talk = |link: &mut dyn Link| {
            let mut bases = Vec::with_capacity(running.queues.len());
            for (_, ring) in &running.queues {
                bases.push((ring.index, link.stop_ring(ring.index)?));
                if enables {
                    link.enable_ring(ring.index, false)?;
                }
            }
            Ok(bases)
        };
        match connection.simple(STOP_LIMIT, &self.exit, talk) {
            Ok(bases) => {
                tracing::debug!("{self}: stopped");
                Some(bases)
            }
            // One that does not stop must not keep the guest's memory: the connection ends.
            Err(error) => {
                self.lose(state, &error.to_string());
                None
            }
        }
    }

    /// Stops the queues for a while, and asks the back-end for what it keeps.
    fn suspend(self: &Arc<Self>, state: &mut State) -> Result<Suspended, MoveError> {
        let socket = || self.wanted.socket.clone();
        let mut suspended = Suspended {
            config: state.config.clone(),
            ..Suspended::default()
        };
        let Some(mut running) = state.running.take() else {
            return Ok(suspended);
        };
        let halted = self.halt(state, &running);
        if let Some(bases) = &halted {
            for ((_, ring), (_, base)) in running.queues.iter_mut().zip(bases) {
                ring.base = *base;
            }
            (running.stopped, running.suspended) = (true, true);
        }
        state.running = Some(running);
        suspended.bases = halted.ok_or_else(|| MoveError::Gone { socket: socket() })?;
        if let Some(connection) = state.connection.as_mut().filter(|_| self.offer.has_state()) {
            let told = connection.simple(ANSWER_LIMIT, &self.exit, |link| link.save_state());
            let kept = self.moved(state, "tell", told)?;
            if let Some(running) = &mut state.running {
                // If it goes on here after all: a back-end forgets what a driver has set when it hears of features.
                running.kept = Some(kept.clone());
            }
            suspended.back_end = Some(kept);
        }
        Ok(suspended)
    }

    /// Has the back-end note which pages it writes, or no longer.
    fn track(
        self: &Arc<Self>,
        state: &mut State,
        log: Option<&Arc<DirtyLog>>,
    ) -> Result<(), MoveError> {
        if log.is_some() && !self.offer.logs() {
            let socket = self.wanted.socket.clone();
            return Err(MoveError::Blind { socket });
        }
        state.log = log.cloned();
        let (Some(connection), Some(running)) = (&mut state.connection, &mut state.running) else {
            return Ok(());
        };
        for (active, ring) in &mut running.queues {
            ring.log = log.map(|_| active.queue.used);
        }
        if running.suspended || running.on != Some(state.epoch) {
            // The next start says so.
            return Ok(());
        }
        let noted = if log.is_some() { F_LOG_ALL } else { 0 };
        let features = self.offer.backend_choice(running.features | noted);
        let rings = &running.queues;
        let told = connection.simple(ANSWER_LIMIT, &self.exit, |link| {
            if let Some(log) = log {
                link.set_log(log)?;
            }
            link.set_features(features)?;
            rings
                .iter()
                .try_for_each(|(_, ring)| link.set_ring_log(ring))
        });
        self.moved(state, "note", told)
    }

    /// What came of a conversation about the back-end's state.
    fn moved<T>(
        self: &Arc<Self>,
        state: &mut State,
        action: &'static str,
        result: Result<T, CallError>,
    ) -> Result<T, MoveError> {
        let socket = || self.wanted.socket.clone();
        result.map_err(|error| match error {
            CallError::Refused(source) => MoveError::Refused {
                socket: socket(),
                action,
                source,
            },
            error => {
                let why = error.to_string();
                self.lose(state, &why);
                MoveError::Silent {
                    socket: socket(),
                    why,
                }
            }
        })
    }

    /// Has the back-end take over what one elsewhere had, but for the queues: those start when the guest is here, and who has it
    /// until then keeps it if that is refused. `before` is the configuration that the guest has read.
    fn take_over(self: &Arc<Self>, state: &mut State, before: &[u8]) -> Result<(), MoveError> {
        let socket = || self.wanted.socket.clone();
        let (Some(connection), Some(running)) = (&mut state.connection, &mut state.running) else {
            return Err(MoveError::Gone { socket: socket() });
        };
        let log = state.log.clone();
        let told = connection.simple(ANSWER_LIMIT, &self.exit, |link| {
            self.equip(link, &state.memory, log.as_deref(), running)?;
            // A card's address may be part of what was kept.
            let changes = running.kept.is_some() && self.has_config();
            changes.then(|| self.offer.read_config(link)).transpose()
        });
        match told {
            Ok(config) => {
                running.equipped = Some(state.epoch);
                let config = config.unwrap_or_else(|| state.config.clone());
                // The guest may have read the address before its driver changed it.
                let found = [&state.config[..], &config];
                if let Some(field) = self.offer.unlike(running.features, before, &found) {
                    let socket = socket();
                    return Err(MoveError::Unlike { socket, field });
                }
                state.config = config;
                Ok(())
            }
            Err(CallError::Refused(source)) => {
                let socket = socket();
                Err(MoveError::Unwilling { socket, source })
            }
            Err(error) => {
                let why = error.to_string();
                self.lose(state, &why);
                let socket = socket();
                Err(MoveError::Silent { socket, why })
            }
        }
    }

    /// Whether the configuration is the back-end's.
    fn has_config(&self) -> bool {
        matches!(self.offer.config, ConfigSource::Backend(_))
    }

    /// Goes on after [`Shared::suspend`].
    fn resume(self: &Arc<Self>, state: &mut State) {
        match &mut state.running {
            Some(running) if running.suspended => {
                running.suspended = false;
                // Until now the guest waited for nobody.
                running.waiting_since = Instant::now();
            }
            _ => return,
        }
        if let Err(error) = self.start(state) {
            tracing::error!(
                error = &error as &dyn std::error::Error,
                "{self}: the device cannot go on"
            );
            self.notifier.needs_reset();
        }
    }

    /// Reads the configuration anew if it may have changed.
    fn refresh_config(self: &Arc<Self>, state: &mut State) {
        let stale = self.config_stale.swap(false, Ordering::SeqCst);
        if !self.has_config() || self.offer.announces_changes() && !stale {
            return;
        }
        let Some(connection) = &mut state.connection else {
            return;
        };
        match connection.simple(ANSWER_LIMIT, &self.exit, |link| {
            self.offer.read_config(link)
        }) {
            Ok(config) => state.config = config,
            Err(CallError::Refused(error)) => {
                tracing::warn!(%error, "{self}: the configuration cannot be read");
            }
            Err(error) => self.lose(state, &error.to_string()),
        }
    }
}

impl MemoryListener for Shared {
    fn name(&self) -> String {
        self.to_string()
    }

    fn add(
        self: Arc<Self>,
        _piece: &GuestMemoryMmap,
        whole: &GuestMemoryMmap,
    ) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        Ok(self.set_memory(&mut self.state(), whole)?)
    }

    fn withdraw(self: Arc<Self>, _piece: &GuestMemoryMmap, whole: &GuestMemoryMmap) {
        let mut state = self.state();
        if let Err(error) = self.set_memory(&mut state, whole) {
            // It keeps what no guest uses; the next start sets that right.
            tracing::warn!(error = &error as &dyn std::error::Error, "{self}");
            state.memory = whole.clone();
        }
    }
}

impl std::fmt::Display for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let DeviceConfig {
            device_type,
            socket,
            ..
        } = &self.wanted;
        write!(f, "device {device_type} at {}", socket.display())
    }
}

impl std::fmt::Display for CallError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Refused(error) | Self::Lost(error) => write!(f, "{error} ({})", error.source),
            Self::Silent => write!(f, "it does not answer"),
            Self::Resources(error) => write!(f, "{error}"),
        }
    }
}

enum Attempt {
    /// It is back, or nobody waits for it any more.
    Done,
    /// Nobody is there.
    Again,
    /// Somebody is there, but cannot serve the device.
    Unfit(Box<dyn std::error::Error>),
}

/// Body of the thread that waits for a back-end. Ends with the device.
fn wait_for_return(device: &Weak<Shared>, epoch: u64, first: Duration) {
    let (mut told, mut pause) = (false, first);
    loop {
        std::thread::sleep(pause);
        pause = pause.saturating_mul(2).min(RECONNECT_PAUSE_MAX);
        let Some(shared) = device.upgrade() else {
            return;
        };
        match shared.reconnect(epoch) {
            Attempt::Done => return,
            Attempt::Again => shared.give_up(epoch),
            // Each attempt ends like this; once is enough to say so.
            Attempt::Unfit(_) if told => shared.give_up(epoch),
            Attempt::Unfit(error) => {
                tracing::error!(
                    error = &*error,
                    "{shared}: the new back-end cannot be used; waiting for another"
                );
                told = true;
            }
        }
    }
}

/// How far a queue was served, by the used ring (VIRTIO 1.3, 2.7.8).
fn used_index(memory: &GuestMemoryMmap, queue: &Queue) -> u16 {
    let index = queue.used.checked_add(2).map(GuestAddress);
    index
        .and_then(|at| memory.read_obj::<u16>(at).ok())
        .map_or(0, u16::from_le)
}

/// The base of a fresh packed queue: place 0 and wrap counter 1, twice (vhost-user, "Vring state
/// description"; VIRTIO 1.3, 2.8.1).
const PACKED_BASE: u32 = 0x8000_8000;

/// Checks a queue's areas (VIRTIO 1.3, 2.7 and 2.8.10.1) and finds them in this process. A packed queue
/// goes on from `base`.
fn ring(
    memory: &GuestMemoryMmap,
    queue: &Queue,
    packed: bool,
    base: u32,
) -> Result<Ring, StartError> {
    let size = usize::from(queue.size);
    let area = |part, start: u64, length: usize, alignment: u64| {
        start
            .is_multiple_of(alignment)
            .then(|| memory.get_slice(GuestAddress(start), length).ok())
            .flatten()
            .and_then(|slice| u64::try_from(slice.ptr_guard().as_ptr().addr()).ok())
            .ok_or(StartError::Area {
                index: queue.index,
                part,
                alignment,
            })
    };
    let descriptors = area("descriptor table", queue.descriptors, 16 * size, 16)?;
    let (available, used) = if packed {
        let event = |part, start| area(part, start, 4, 4);
        (
            event("driver event suppression structure", queue.available)?,
            event("device event suppression structure", queue.used)?,
        )
    } else {
        // With an event index behind each ring, which exists if EVENT_IDX was agreed on.
        (
            area("available ring", queue.available, 6 + 2 * size, 2)?,
            area("used ring", queue.used, 6 + 8 * size, 4)?,
        )
    };
    Ok(Ring {
        index: queue.index.into(),
        size: queue.size,
        base,
        descriptors,
        available,
        used,
        log: None,
    })
}

impl VirtioDevice for VhostUserDevice {
    fn device_type(&self) -> u16 {
        self.shared.wanted.device_type.0
    }

    fn features(&self) -> u64 {
        self.shared.offer.features
    }

    fn queue_sizes(&self) -> Vec<u16> {
        self.shared.offer.queue_sizes.clone()
    }

    fn notifier(&self) -> Arc<Notifier> {
        Arc::clone(&self.shared.notifier)
    }

    fn read_config(&mut self, offset: u64, data: &mut [u8]) {
        let mut state = self.shared.state();
        self.shared.refresh_config(&mut state);
        let from = usize::try_from(offset).unwrap_or(usize::MAX);
        for (place, byte) in data.iter_mut().zip(state.config.iter().skip(from)) {
            *place = *byte;
        }
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        let shared = &self.shared;
        let ConfigSource::Backend(size) = shared.offer.config else {
            return;
        };
        let length = u64::try_from(data.len()).unwrap_or(u64::MAX);
        let (Ok(at), true) = (
            u32::try_from(offset),
            offset.saturating_add(length) <= size.into() && length > 0,
        ) else {
            tracing::debug!(offset, "{shared}: write beyond the configuration");
            return;
        };
        let mut state = shared.state();
        let Some(connection) = &mut state.connection else {
            return;
        };
        match connection.simple(ANSWER_LIMIT, &shared.exit, |link| {
            link.write_config(at, data)
        }) {
            Ok(()) => shared.config_stale.store(true, Ordering::SeqCst),
            Err(CallError::Refused(_)) => {
                tracing::debug!(offset, "{shared}: the field is read-only");
            }
            Err(error) => shared.lose(&mut state, &error.to_string()),
        }
    }

    fn activate(
        &mut self,
        activation: Activation,
    ) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        let shared = &self.shared;
        let mut state = shared.state();
        let mut queues = Vec::with_capacity(activation.queues.len());
        let packed = activation.features & F_RING_PACKED != 0;
        let stopped = std::mem::take(&mut state.bases);
        for active in activation.queues {
            let index = usize::from(active.queue.index);
            let base = stopped
                .iter()
                .find(|(stopped, _)| activation.again && *stopped == index)
                .map_or(PACKED_BASE, |(_, base)| *base);
            let ring = ring(&state.memory, &active.queue, packed, base)?;
            queues.push((active, ring));
        }
        state.running = Some(shared.run(activation.features, queues)?);
        Ok(shared.start(&mut state)?)
    }

    fn suspend(&mut self) -> Result<Suspended, Box<dyn std::error::Error + Send + Sync>> {
        let mut state = self.shared.state();
        Ok(self.shared.suspend(&mut state)?)
    }

    fn resume(&mut self) {
        let mut state = self.shared.state();
        self.shared.resume(&mut state);
    }

    fn restore(
        &mut self,
        activation: Option<Activation>,
        suspended: &Suspended,
    ) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        let shared = &self.shared;
        let mut state = shared.state();
        if !shared.has_config() && state.config.len() == suspended.config.len() {
            // Nobody else has it: a card's address, say.
            state.config.clone_from(&suspended.config);
        }
        let tell = |config: &[u8]| {
            if config != suspended.config {
                // Another size of the disk, say.
                shared.notifier.config_changed();
            }
        };
        let Some(activation) = activation else {
            tell(&state.config);
            return Ok(());
        };
        if suspended.back_end.is_some() && !shared.offer.has_state() {
            let socket = shared.wanted.socket.clone();
            return Err(MoveError::Stateless { socket }.into());
        }
        let packed = activation.features & F_RING_PACKED != 0;
        let mut queues = Vec::with_capacity(activation.queues.len());
        for active in activation.queues {
            let index = active.queue.index;
            let base = (suspended.bases.iter())
                .find(|(queue, _)| *queue == usize::from(index))
                .ok_or(MoveError::Base { index })?;
            let ring = ring(&state.memory, &active.queue, packed, base.1)?;
            queues.push((active, ring));
        }
        state.running = Some(Running {
            stopped: true,
            suspended: true,
            // The guest has used them: it is to look at them, and the back-end, too.
            handed_over: true,
            kept: suspended.back_end.clone(),
            ..shared.run(activation.features, queues)?
        });
        if let Err(error) = shared.take_over(&mut state, &suspended.config) {
            shared.stop(&mut state);
            return Err(error.into());
        }
        tell(&state.config);
        Ok(())
    }

    fn track(
        &mut self,
        log: Option<&Arc<DirtyLog>>,
    ) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        let mut state = self.shared.state();
        Ok(self.shared.track(&mut state, log)?)
    }

    fn reset(&mut self) {
        let mut state = self.shared.state();
        self.shared.stop(&mut state);
    }
}

impl Drop for VhostUserDevice {
    fn drop(&mut self) {
        let mut state = self.shared.state();
        self.shared.stop(&mut state);
        for handler in state.handlers.drain(..) {
            self.shared.events.remove(handler);
        }
        state.connection = None;
        state.epoch += 1;
    }
}

#[cfg(test)]
mod tests;

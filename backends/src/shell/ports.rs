//! A process with several ports: each has its socket, its front-ends one after the other, and a control thread of its own,
//! so that one which hangs, lies or comes and goes is no matter of the others. Ports come and go while the process runs.
//!
//! ```text
//!  main thread       signals, and the end
//!  a client's thread port-add ──▶ Hub::open ──▶ control thread of the port: Daemon (socket, messages) ──▶ workers
//!                    port-remove ─▶ ends it: rings back, memory unmapped, socket file gone
//!                    status, link, limits, … of a port ─▶ asks its control thread
//!                    hand-over ──▶ Hub::freeze, then each control thread stops its rings; the other way round to go on
//! ```

use std::collections::BTreeMap;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, RwLock, RwLockReadGuard};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use mio::unix::SourceFd;
use mio::{Events, Interest, Poll, Token, Waker};
use nix::sys::signalfd::SignalFd;
use ringside_control::metrics::Kind;
use ringside_control::{
    ApiError, BoundSocket, Chain, ErrorCode, ListenError, Metrics, Peers, Service, Size,
};
use ringside_sandbox::{Profile, calls, confined};
use serde::Deserialize;
use serde_json::{Map, Value, json};
use thiserror::Error;
use tracing::{error, info, info_span};

use super::confine::confine;
use super::control::{Clients, Frozen, Link, LinkState, Reply, Request, Statistics, answered};
use super::daemon::{
    Daemon, ShellError, adopt_control, adopt_file, bind_control, end, ends, or_without, prepare,
    system,
};
use super::device::{Device, OpenError};
use super::handler::Handler;
use super::handover::{HandOver, Parts, Place, Predecessor, Serves, TakeOverError};
use super::options::{Program, ShellArgs};
use super::placement::Placement;
use super::session::Session;
use super::socket::{self, Endpoint, SocketError};
use super::state::StateError;

const SIGNALS: Token = Token(0);
const WAKE: Token = Token(1);

/// How long front-ends, all together, may hold up the hand-over of ports. From some point on the guests of all of them stand still.
const HELD_UP: Duration = Duration::from_secs(5);

/// What a port is made from, as written on the command line or in a request.
pub type PortOptions = BTreeMap<String, String>;

/// A port that is ready to be served.
#[derive(Debug)]
pub struct OpenPort<D> {
    /// Its name, which no other port has.
    pub name: String,
    /// Where its front-ends are met.
    pub socket: PathBuf,
    /// They listen there, and are connected to.
    pub client: bool,
    /// What makes the same one once more, in another program.
    pub options: PortOptions,
    /// The device that they get.
    pub device: D,
}

/// What the ports of a process have in common.
pub trait Hub: Send + 'static {
    /// One of them.
    type Port: Device + Send + 'static;
    /// Why there is no port.
    type Error: OpenError + Send + Sync + 'static;

    /// Says what it and its ports need from when the program is confined on, besides what the shell does.
    fn needs(&self, profile: &mut Profile);

    /// Starts what threads the ports share. Called once, before all others that follow.
    ///
    /// # Errors
    /// What the system said.
    fn begin(&mut self) -> Result<(), Self::Error>;

    /// Makes a port.
    ///
    /// # Errors
    /// What is wrong with the options, or what the system refused.
    fn open(&mut self, options: &PortOptions) -> Result<OpenPort<Self::Port>, Self::Error>;

    /// The port of this name has ended: the name is free.
    fn closed(&mut self, name: &str);

    /// What all ports together count, each under its name.
    fn statistics(&self) -> Arc<dyn Statistics>;

    /// What there is to say about all of them.
    fn status(&self) -> Map<String, Value>;

    /// What is beside the ports.
    fn uplinks(&self) -> Vec<Arc<dyn UplinkControl>>;

    /// Which addresses were found behind which port.
    ///
    /// # Errors
    /// It cannot be told now.
    fn addresses(&self) -> Result<Value, ApiError>;

    /// What ports have in common, for a program that is to take the place of this one.
    ///
    /// # Errors
    /// Why it cannot be had by another program.
    fn parts(&self) -> Result<Parts, ApiError>;

    /// It is about to go over to another program: nothing passes between ports any more. Returns what they have in common, as
    /// it is then. Either this program ends, without another word, or there is [`thaw`](Self::thaw).
    ///
    /// # Errors
    /// It cannot be stopped, and goes on.
    fn freeze(&self) -> Result<Value, ApiError>;

    /// Ends the threads that ports share. There is no port any more, and nothing else is called afterwards but what tells of it.
    fn end(&mut self);

    /// Goes by the state of another program's, while nothing passes. Its ports are there.
    ///
    /// # Errors
    /// It is not of the same kind.
    fn adopt(&self, state: &Value) -> Result<(), StateError>;

    /// All ports have their rings again, and what they have in common goes on.
    fn thaw(&self);
}

/// What is beside the ports, and no guest's, as clients of the control socket see it.
pub trait UplinkControl: Send + Sync {
    /// Its name; no port has the same.
    fn name(&self) -> &str;

    /// What it leads to, as users write it.
    fn link(&self) -> &str;

    /// All there is to say about it.
    fn status(&self) -> Value;

    /// Changes limits of rates, by name; 0 takes one away. Returns all that hold from now on.
    ///
    /// # Errors
    /// Why nothing is changed.
    fn limits(&self, changes: &BTreeMap<String, Size>) -> Result<Value, ApiError>;

    /// Plugs its cable in, or pulls it. Returns whether that is a change.
    fn set_link(&self, up: bool) -> bool;
}

/// A port cannot be had.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum PortError {
    /// Its socket.
    #[error("port {name}")]
    Socket {
        /// Its name.
        name: String,
        /// What is wrong.
        #[source]
        source: SocketError,
    },
    /// Its socket, in a directory where a program that is confined makes none.
    #[error(
        "port {name}: this program is confined, and makes sockets in the directories of its first ports only, not {path}",
        path = .path.display()
    )]
    Confined {
        /// Its name.
        name: String,
        /// Where the socket was to be.
        path: PathBuf,
    },
    /// Its threads.
    #[error("port {name} cannot be started")]
    Start {
        /// Its name.
        name: String,
        /// What failed.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

/// What can be asked for.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
#[serde(
    tag = "command",
    content = "arguments",
    rename_all = "kebab-case",
    deny_unknown_fields
)]
enum PortsRequest {
    /// What the program is and does, all ports.
    Status,
    /// What was counted.
    Stats,
    /// The same as a page of metrics.
    Metrics,
    /// Ends the program in order.
    Quit,
    /// The ports and uplinks, with one line's worth about each.
    PortList,
    /// One port or uplink in full.
    PortStatus(Name),
    /// Makes a port.
    PortAdd(PortOptions),
    /// Ends one; its front-end is disconnected.
    PortRemove(Name),
    /// Plugs the cable of a port or an uplink in, or pulls it.
    PortLink(PortLink),
    /// Changes limits of a port or an uplink, by name, and shows them all.
    PortLimits(PortLimits),
    /// Has the guest at a port make itself known to the network.
    PortAnnounce(Name),
    /// Which addresses were found behind which port.
    Addresses,
    /// Another program wants to take the place of this one.
    HandOver(HandOver),
}

#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
#[serde(deny_unknown_fields)]
struct Name {
    port: String,
}

#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
#[serde(deny_unknown_fields)]
struct PortLink {
    port: String,
    state: LinkState,
}

#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
#[serde(deny_unknown_fields)]
struct PortLimits {
    port: String,
    #[serde(default)]
    limits: BTreeMap<String, Size>,
}

/// A port that is served.
struct Port {
    clients: Clients,
    connected: Arc<AtomicBool>,
    socket: PathBuf,
    options: PortOptions,
    /// Taken by who ends it.
    thread: Mutex<Option<JoinHandle<()>>>,
}

/// All ports, and who answers for them.
struct Ports<H: Hub> {
    program: Program,
    placement: Placement,
    peers: Peers,
    statistics: Arc<dyn Statistics>,
    hub: Mutex<H>,
    /// As many as there were at the start.
    uplinks: Vec<Arc<dyn UplinkControl>>,
    ports: Mutex<BTreeMap<String, Arc<Port>>>,
    end: Arc<Ending>,
    /// What another program needs to be where this one is, once it can be.
    place: OnceLock<Place>,
    /// Held by who makes or ends a port, or changes what is beside them, and alone by a client that is about to take the place of
    /// this program.
    members: RwLock<()>,
}

/// The end of the program, as seen from threads other than the main one.
struct Ending {
    waker: Waker,
    asked: AtomicBool,
    /// All ports are another program's.
    handed_over: AtomicBool,
    failure: Mutex<Option<ShellError>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Ending {
    fn wake(&self) {
        if let Err(error) = self.waker.wake() {
            error!("cannot wake the main thread: {error}");
        }
    }

    fn fail(&self, failure: ShellError) {
        lock(&self.failure).get_or_insert(failure);
        self.wake();
    }
}

/// Runs a program of several ports from start to end: returns when it was told to end, or cannot go on. Call it from the
/// main thread before any other is started, so that signals reach nobody else, nor has more rights.
///
/// # Errors
/// [`ShellError`]: what failed, for the user.
pub fn run_ports<H: Hub>(
    program: &Program,
    hub: impl FnOnce() -> Result<H, H::Error>,
    first: &[PortOptions],
    args: &ShellArgs,
) -> Result<(), ShellError> {
    let mut signals = prepare(args)?;
    let failed = system("wait for events");
    let mut poll = Poll::new().map_err(&failed)?;
    let fd = signals.as_raw_fd();
    poll.registry()
        .register(&mut SourceFd(&fd), SIGNALS, Interest::READABLE)
        .map_err(&failed)?;
    let end = Arc::new(Ending {
        waker: Waker::new(poll.registry(), WAKE).map_err(&failed)?,
        asked: AtomicBool::new(false),
        handed_over: AtomicBool::new(false),
        failure: Mutex::default(),
    });
    let failed = |error: H::Error| ShellError::Port(Box::new(error));
    let mut hub = hub().map_err(failed)?;
    let predecessor = args.predecessor.as_deref();
    let control = match predecessor {
        Some(_) => None,
        None => bind_control(args)?,
    };
    let peers = args.peers();
    let there = predecessor.map_or_else(Vec::new, |predecessor| {
        let ports = predecessor.ports().iter();
        ports.map(|port| port.options().clone()).collect()
    });
    confine(program, args, |profile| {
        listen(profile, first);
        listen(profile, &there);
        hub.needs(profile);
    })?;
    let placement = args.placement();
    let pinned = placement.pin(0).map_err(super::HandlerError::from)?;
    hub.begin().map_err(failed)?;
    drop(pinned);
    let ports = Arc::new(Ports {
        program: *program,
        placement,
        peers,
        statistics: hub.statistics(),
        uplinks: hub.uplinks(),
        hub: Mutex::new(hub),
        ports: Mutex::default(),
        end: Arc::clone(&end),
        place: OnceLock::new(),
        members: RwLock::default(),
    });
    let begun = match predecessor {
        Some(predecessor) => ports
            .take_over(predecessor)
            .map(|()| adopt_control(predecessor, args, ports.peers.clone())),
        None => first
            .iter()
            .try_for_each(|options| ports.add(options).map(drop))
            .map(|()| control)
            .map_err(ShellError::Port),
    };
    let served = begun.and_then(|control| {
        serve(
            &ports,
            control,
            &mut signals,
            &mut poll,
            predecessor.is_some(),
        )
    });
    if end.handed_over.load(Ordering::Acquire) {
        // What the ports' end would undo is the other program's now.
        std::mem::forget(ports);
        return served;
    }
    let names: Vec<String> = lock(&ports.ports).keys().cloned().collect();
    for name in names {
        // Whoever else asked for the end of the port is welcome.
        let _ = ports.remove(&name);
    }
    // Clients of the control socket may keep it for longer than this lasts.
    lock(&ports.hub).end();
    match lock(&end.failure).take() {
        Some(failure) => Err(failure),
        None => served,
    }
}

/// Why a port has no socket.
fn refused(name: &str, path: &Path, source: SocketError) -> PortError {
    let name = name.to_owned();
    match source {
        SocketError::Listen(ListenError::Listen { source, .. })
            if source.kind() == io::ErrorKind::PermissionDenied && confined() =>
        {
            let path = path.to_owned();
            PortError::Confined { name, path }
        }
        source => PortError::Socket { name, source },
    }
}

/// Ports are made in the directories of those that there are from the start.
fn listen(profile: &mut Profile, first: &[PortOptions]) {
    profile.calls(calls::LISTENING);
    for socket in first.iter().filter_map(|options| options.get("socket")) {
        profile.listen(Path::new(socket));
    }
}

fn serve<H: Hub>(
    ports: &Arc<Ports<H>>,
    control: Option<BoundSocket>,
    signals: &mut SignalFd,
    poll: &mut Poll,
    took_over: bool,
) -> Result<(), ShellError> {
    // To the end: what was asked before is answered.
    let control = control
        .map(|socket| {
            let place = Place {
                kind: ports.program.kind,
                serves: Serves::Ports,
                control: socket.listener().map_err(system("duplicate a socket"))?,
            };
            // It is set once.
            let _ = ports.place.set(place);
            Ok::<_, ShellError>(socket.start(Arc::clone(ports))?)
        })
        .transpose();
    let control = if took_over {
        or_without(control)
    } else {
        control?
    };
    info!("{} ready", ports.program.name);
    let mut events = Events::with_capacity(4);
    loop {
        match poll.poll(&mut events, None) {
            Ok(()) => {}
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(system("wait for events")(e)),
        }
        if ports.end.handed_over.load(Ordering::Acquire) {
            if let Some(control) = control {
                control.leave();
            }
            return Ok(());
        }
        let asked = ports.end.asked.load(Ordering::Acquire);
        if asked || lock(&ports.end.failure).is_some() || ends(signals, || {}) {
            // A program that is about to take all of it has it after this, or has not.
            let _alone = (ports.members.write()).unwrap_or_else(PoisonError::into_inner);
            if let (true, Some(control)) = (ports.end.handed_over.load(Ordering::Acquire), control)
            {
                control.leave();
            }
            return Ok(());
        }
    }
}

/// Any error of a port, on its way to the user.
type AnyError = Box<dyn std::error::Error + Send + Sync>;

/// What a port's thread begins with: a port of another program, with the connection of its front-end, if there is one.
type Begin<D> = Option<Option<Session<D>>>;

type SharedHandler<H> = Arc<Mutex<Handler<<H as Hub>::Port>>>;

fn start_failed(name: &str, source: impl Into<AnyError>) -> PortError {
    PortError::Start {
        name: name.to_owned(),
        source: source.into(),
    }
}

/// Ports that are stopped, those that come first with what they have in common: they go on when this is dropped.
struct FrozenPorts<'p, H: Hub> {
    ports: &'p Ports<H>,
    stopped: Vec<(Arc<Port>, Frozen)>,
}

impl<H: Hub> FrozenPorts<'_, H> {
    /// All of them are another program's.
    fn leave(mut self) {
        for (_, frozen) in self.stopped.drain(..) {
            frozen.leave();
        }
        let end = &self.ports.end;
        end.handed_over.store(true, Ordering::Release);
        end.wake();
        // Nothing is to go on here.
        std::mem::forget(self);
    }
}

impl<H: Hub> Drop for FrozenPorts<'_, H> {
    fn drop(&mut self) {
        let ports = self.stopped.drain(..).map(|(port, frozen)| {
            drop(frozen);
            port
        });
        for port in ports.collect::<Vec<_>>() {
            // It answers when its rings run again.
            let _ = port.clients.ask(Request::Stats);
        }
        lock(&self.ports.hub).thaw();
    }
}

impl<H: Hub> Ports<H> {
    fn add(&self, options: &PortOptions) -> Result<String, AnyError> {
        let OpenPort {
            name,
            socket,
            client,
            options,
            device,
        } = lock(&self.hub).open(options)?;
        let begin = || -> Result<(), PortError> {
            let endpoint = if client {
                Endpoint::Connecting(socket.clone())
            } else {
                socket::listen(&socket).map_err(|source| refused(&name, &socket, source))?
            };
            let handler = self.handler(&name, device)?;
            let begin = self.spawn(&name, socket.clone(), options, endpoint, handler)?;
            // It waits for this.
            let _ = begin.send(None);
            Ok(())
        };
        match begin() {
            Ok(()) => Ok(name),
            Err(error) => {
                lock(&self.hub).closed(&name);
                Err(error.into())
            }
        }
    }

    /// Takes the place of another program, with all ports that it has.
    fn take_over(&self, predecessor: &Predecessor) -> Result<(), ShellError> {
        let mut handlers = Vec::new();
        let mut begins = Vec::new();
        for port in predecessor.ports() {
            let failed = |error: AnyError| TakeOverError::Port(error);
            let OpenPort {
                name,
                socket,
                client,
                options,
                device,
            } = lock(&self.hub)
                .open(port.options())
                .map_err(|e| failed(e.into()))?;
            let endpoint = port.endpoint(socket.clone(), client)?;
            let handler = self.handler(&name, device).map_err(|e| failed(e.into()))?;
            port.check(&lock(&handler))?;
            let begin = self
                .spawn(&name, socket, options, endpoint, Arc::clone(&handler))
                .map_err(|e| failed(e.into()))?;
            handlers.push(handler);
            begins.push(begin);
        }
        let sessions = predecessor.replace(
            &handlers,
            |state| Ok(lock(&self.hub).adopt(state)?),
            || lock(&self.hub).thaw(),
        )?;
        for (begin, session) in begins.into_iter().zip(sessions) {
            // It waits for this.
            let _ = begin.send(Some(session));
        }
        Ok(())
    }

    fn handler(&self, name: &str, device: H::Port) -> Result<SharedHandler<H>, PortError> {
        let handler = Handler::new(device, &self.placement).map_err(|e| start_failed(name, e))?;
        Ok(Arc::new(Mutex::new(handler)))
    }

    /// Starts the control thread of a port, which begins when it is told to: if it is one of another program, whose front-end it
    /// goes on with.
    fn spawn(
        &self,
        name: &str,
        socket: PathBuf,
        options: PortOptions,
        endpoint: Endpoint,
        handler: SharedHandler<H>,
    ) -> Result<Sender<Begin<H::Port>>, PortError> {
        let (_, connected) = lock(&handler).observables();
        let (ready, started) = mpsc::channel();
        let (begin, told) = mpsc::channel();
        let (program, end, own) = (self.program, Arc::clone(&self.end), name.to_owned());
        let (peers, path) = (self.peers.clone(), socket.clone());
        let thread = thread::Builder::new()
            .name(format!("port {name}"))
            .spawn(move || {
                let _span = info_span!("port", name = %own).entered();
                let endpoint = (endpoint, path);
                let served = serve_port(&program, &own, &handler, endpoint, peers, &ready, &told);
                if let Err(error) = served {
                    error!("{}", Chain(&error));
                    end.fail(error);
                }
            })
            .map_err(|e| start_failed(name, e))?;
        let source: AnyError = match started.recv() {
            Ok(Ok(clients)) => {
                let port = Port {
                    clients,
                    connected,
                    socket,
                    options,
                    thread: Mutex::new(Some(thread)),
                };
                lock(&self.ports).insert(name.to_owned(), Arc::new(port));
                return Ok(begin);
            }
            Ok(Err(error)) => error.into(),
            Err(error) => error.into(),
        };
        // Nothing of it is left when its name is free again.
        if thread.join().is_err() {
            error!(port = name, "the thread of the port panicked");
        }
        Err(start_failed(name, source))
    }

    /// Has the program at the other end of `client` take the place of this one.
    fn hand_over(&self, arguments: HandOver, client: &UnixStream) -> Result<Value, ApiError> {
        let (Ok(_alone), Some(place)) = (self.members.try_write(), self.place.get()) else {
            let message =
                "a port is about to come or go, or another program to take the place of this one";
            return Err(ApiError::of(ErrorCode::Conflict, message));
        };
        let ports: Vec<Arc<Port>> = lock(&self.ports).values().cloned().collect();
        let offers = || {
            let end = Instant::now() + HELD_UP;
            let common = lock(&self.hub).parts()?;
            let offers = ports.iter().map(|port| {
                let (mut offer, descriptors) = port.clients.offer(end)?;
                offer.options = port.options.clone();
                Ok((offer, descriptors))
            });
            Ok((common, offers.collect::<Result<_, ApiError>>()?))
        };
        let freeze = || {
            let end = Instant::now() + HELD_UP;
            let common = lock(&self.hub).freeze()?;
            let mut frozen = FrozenPorts {
                ports: self,
                stopped: Vec::new(),
            };
            let mut states = Vec::new();
            for port in &ports {
                let (state, stopped) = port.clients.freeze(end)?;
                states.push(state);
                frozen.stopped.push((Arc::clone(port), stopped));
            }
            Ok((common, states, frozen))
        };
        place.hand_over(arguments, client, offers, freeze, FrozenPorts::leave)
    }

    /// Ports come and go, and uplinks change, only while no other program is about to take them.
    fn members(&self) -> Result<RwLockReadGuard<'_, ()>, ApiError> {
        self.members.try_read().map_err(|_| {
            let message = "another program is about to take the place of this one";
            ApiError::of(ErrorCode::Conflict, message)
        })
    }

    /// What is beside the ports and has this name.
    fn uplink(&self, name: &str) -> Option<Arc<dyn UplinkControl>> {
        let mut uplinks = self.uplinks.iter();
        uplinks.find(|uplink| uplink.name() == name).cloned()
    }

    fn port(&self, name: &str) -> Result<Arc<Port>, ApiError> {
        let found = lock(&self.ports).get(name).cloned();
        found.ok_or_else(|| {
            let message = match self.uplink(name) {
                Some(_) => format!("`{name}` is an uplink, and has no guest"),
                None => format!("there is no port `{name}`; `port-list` shows those there are"),
            };
            ApiError::of(ErrorCode::NotFound, message)
        })
    }

    /// Ends a port, and returns when nothing of it is left.
    fn remove(&self, name: &str) -> Result<(), ApiError> {
        let port = self.port(name)?;
        let Some(thread) = lock(&port.thread).take() else {
            let message = format!("port `{name}` is ending");
            return Err(ApiError::of(ErrorCode::Conflict, message));
        };
        // One that has ended by itself needs not be told.
        let _ = port.clients.ask(Request::Quit);
        if thread.join().is_err() {
            error!(port = name, "the thread of the port panicked");
        }
        lock(&self.ports).remove(name);
        lock(&self.hub).closed(name);
        Ok(())
    }

    fn ask(&self, name: &str, request: Request) -> Result<Value, ApiError> {
        match self.port(name)?.clients.ask(request)? {
            Reply::Done(value) => Ok(value),
            Reply::Drain { .. } => Ok(Value::Null),
        }
    }

    /// Names of all ports, sockets, and whether a front-end is there.
    fn list(&self) -> Vec<Value> {
        let ports = lock(&self.ports);
        let ports = ports.iter().map(|(name, port)| {
            let connected = port.connected.load(Ordering::Relaxed);
            json!({
                "name": name,
                "socket": port.socket,
                "front-end": if connected { "connected" } else { "none" },
            })
        });
        ports.collect()
    }

    fn page(&self) -> String {
        let mut page = Metrics::default();
        let Program { name, kind, .. } = self.program;
        page.single(
            (
                "ringside_build_info",
                Kind::Gauge,
                "The program and its version.",
            ),
            &[
                ("program", &name),
                ("kind", &kind),
                ("version", &env!("CARGO_PKG_VERSION")),
            ],
            1,
        );
        let connected = "ringside_front_end_connected";
        page.begin(
            connected,
            Kind::Gauge,
            "Whether a front-end is connected to the port.",
        );
        for (name, port) in lock(&self.ports).iter() {
            let value = u8::from(port.connected.load(Ordering::Relaxed));
            page.sample(connected, &[("port", name)], value);
        }
        self.statistics.metrics(&mut page);
        page.into_text()
    }
}

/// The life of a port's control thread. A port that cannot begin is a matter of who asked for it alone.
fn serve_port<D: Device>(
    program: &Program,
    name: &str,
    handler: &Arc<Mutex<Handler<D>>>,
    (mut endpoint, path): (Endpoint, PathBuf),
    peers: Peers,
    ready: &Sender<Result<Clients, ShellError>>,
    told: &Receiver<Begin<D>>,
) -> Result<(), ShellError> {
    let begin = || {
        let mut daemon = Daemon::new(None, handler, false, peers)?;
        daemon.hands_over(&endpoint, Some(&path))?;
        let clients = daemon.clients(program, None)?;
        Ok((daemon, clients))
    };
    // The receiver waits for either.
    let served = match begin() {
        Ok((mut daemon, clients)) => {
            let _ = ready.send(Ok(clients));
            let Ok(begin) = told.recv() else {
                // The device itself is the other program's.
                lock(handler).shut_down();
                return Ok(());
            };
            if let Some(session) = begin {
                adopt_file(&mut endpoint, &path);
                daemon.goes_on(session);
            }
            let served = daemon.serve(name, endpoint);
            if daemon.handed_over() {
                // What the device's end would undo is the other program's now.
                std::mem::forget(Arc::clone(handler));
                return served;
            }
            served
        }
        Err(error) => {
            let _ = ready.send(Err(error));
            Ok(())
        }
    };
    end(handler, served)
}

impl<H: Hub> Service for Ports<H> {
    type Command = PortsRequest;

    fn call(&self, request: PortsRequest) -> Result<Value, ApiError> {
        match request {
            PortsRequest::Status => {
                let mut status = lock(&self.hub).status();
                status.insert("version".into(), env!("CARGO_PKG_VERSION").into());
                status.insert("pid".into(), std::process::id().into());
                status.insert("ports".into(), self.list().into());
                Ok(status.into())
            }
            PortsRequest::Stats => Ok(self.statistics.stats().into()),
            PortsRequest::Metrics => Ok(self.page().into()),
            PortsRequest::Quit => {
                self.end.asked.store(true, Ordering::Release);
                self.end.wake();
                Ok(json!({}))
            }
            PortsRequest::PortList => {
                let uplinks = self.uplinks.iter();
                let uplinks =
                    uplinks.map(|uplink| json!({ "name": uplink.name(), "uplink": uplink.link() }));
                let all = self.list().into_iter().chain(uplinks);
                Ok(json!({ "ports": all.collect::<Vec<_>>() }))
            }
            PortsRequest::PortStatus(Name { port }) => match self.uplink(&port) {
                Some(uplink) => Ok(uplink.status()),
                None => self.ask(&port, Request::Status),
            },
            PortsRequest::PortAdd(options) => {
                let _member = self.members()?;
                let added = self.add(&options);
                let failed = |error: AnyError| {
                    let usage = error
                        .downcast_ref::<H::Error>()
                        .is_some_and(OpenError::is_usage);
                    let code = match usage {
                        true => ErrorCode::BadRequest,
                        false => ErrorCode::Failed,
                    };
                    ApiError::new(code, error.as_ref())
                };
                Ok(json!({ "name": added.map_err(failed)? }))
            }
            PortsRequest::PortRemove(Name { port }) => {
                let _member = self.members()?;
                self.remove(&port)?;
                Ok(json!({}))
            }
            PortsRequest::PortLink(PortLink { port, state }) => {
                let Some(uplink) = self.uplink(&port) else {
                    return self.ask(&port, Request::Link(Link { state }));
                };
                let _member = self.members()?;
                let changed = uplink.set_link(state == LinkState::Up);
                Ok(json!({ "changed": changed }))
            }
            PortsRequest::PortLimits(PortLimits { port, limits }) => {
                let Some(uplink) = self.uplink(&port) else {
                    return self.ask(&port, Request::Limits(Some(limits)));
                };
                let _member = self.members()?;
                uplink.limits(&limits)
            }
            PortsRequest::PortAnnounce(Name { port }) => self.ask(&port, Request::Announce),
            PortsRequest::Addresses => lock(&self.hub).addresses(),
            // Another program is met by `call_with`.
            PortsRequest::HandOver(_) => Ok(json!({})),
        }
    }

    fn call_with(&self, request: PortsRequest, client: &UnixStream) -> Result<Value, ApiError> {
        let PortsRequest::HandOver(arguments) = request else {
            return self.call(request);
        };
        answered(self.hand_over(arguments, client), client)
    }

    fn metrics(&self) -> Option<String> {
        Some(self.page())
    }
}

//! The life of a back-end process: start, front-ends that come and go, end.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::ExitCode;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use clap::Parser;
use mio::unix::SourceFd;
use mio::{Events, Interest, Poll, Token};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use ringside_control::{ApiError, BoundSocket, Chain, ErrorCode, Peers, server};
use ringside_sandbox::SandboxError;
use thiserror::Error;
use tracing::{debug, error, info, warn};
use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler};

use super::confine::confine;
use super::control::{self, Asked, Clients, Request, Requests};
use super::device::{Device, OpenError};
use super::handler::{Handler, HandlerError};
use super::handover::{
    Descriptors, Meeting, Piece, Place, PortOffer, Predecessor, Serves, TakeOverError, With,
};
use super::limit::LogLimit;
use super::log;
use super::options::{Program, ShellArgs};
use super::session::{Session, SessionError, Step};
use super::socket::{self, Endpoint, Listener, SocketError};
use super::torn;

const SIGNALS: Token = Token(0);
const LISTENER: Token = Token(1);
const SESSION: Token = Token(2);
const TORN: Token = Token(3);
const CONTROL: Token = Token(4);

/// Exit status: something failed.
const FAILURE: u8 = 1;
/// Exit status: the command line is wrong. That of clap's own errors, too.
const USAGE: u8 = 2;

/// How long to wait before connecting again to a front-end that does not listen (yet).
const RECONNECT: Duration = Duration::from_millis(200);

/// How many connections are logged in an interval.
const CONNECTIONS: u32 = 20;
/// That interval.
const LOG_INTERVAL: Duration = Duration::from_secs(10);

/// The program cannot start, or cannot go on.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ShellError {
    /// The log filter in the environment is wrong.
    #[error("{variable}={filter:?} in the environment: {why}")]
    LogFilter {
        /// Name of the variable.
        variable: &'static str,
        /// Its value.
        filter: String,
        /// What is wrong with it.
        why: String,
    },
    /// Neither a path nor a descriptor was given.
    #[error("no socket: give --socket-path or --fd")]
    NoSocket,
    /// The socket cannot be used.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// The control socket cannot be used.
    #[error(transparent)]
    Control(#[from] server::Error),
    /// The process has more rights than it should.
    #[error(transparent)]
    Sandbox(#[from] SandboxError),
    /// A port of several cannot be had.
    #[error("cannot serve a port")]
    Port(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The system refused something that every process needs.
    #[error("cannot {what}")]
    System {
        /// What was to be done.
        what: &'static str,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The device cannot be served any more.
    #[error("the device failed")]
    Device(#[from] HandlerError),
    /// The place of another program cannot be taken.
    #[error("cannot take over")]
    TakeOver(#[from] TakeOverError),
    /// The only front-end there will be ended by an error.
    #[error("the front-end's connection failed")]
    Session(#[from] SessionError),
}

pub(super) fn system(what: &'static str) -> impl Fn(io::Error) -> ShellError {
    move |source| ShellError::System { what, source }
}

/// The signal that ends a worker's system call so that it looks at its commands.
pub(super) fn wake_signal() -> i32 {
    SIGRTMIN()
}

extern "C" fn on_wake(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // That the system call was interrupted is all that is wanted.
}

/// A control socket for a program that has taken the place of another, which serves its guest in any case: nobody else does.
pub(super) fn or_without<C>(control: Result<Option<C>, ShellError>) -> Option<C> {
    control.unwrap_or_else(|error| {
        warn!("there is no control socket any more: {}", Chain(&error));
        None
    })
}

/// Runs a back-end from start to end: returns when it was told to end, or cannot go on. Call it from the
/// main thread before any other is started, so that signals reach nobody else.
///
/// # Errors
/// [`ShellError`]: what failed, for the user.
pub fn run(program: &Program, device: impl Device, args: &ShellArgs) -> Result<(), ShellError> {
    let signals = prepare(args)?;
    let predecessor = args.predecessor.as_deref();
    let mut endpoint = match (predecessor, &args.socket_path, args.fd) {
        (Some(predecessor), ..) => {
            let path = args.socket_path.clone().unwrap_or_default();
            predecessor.port()?.endpoint(path, args.client)?
        }
        (None, Some(path), _) if args.client => Endpoint::Connecting(path.clone()),
        (None, Some(path), _) => socket::listen(path)?,
        (None, None, Some(fd)) => socket::inherit(fd)?,
        (None, None, None) => return Err(ShellError::NoSocket),
    };
    let mut control = match predecessor {
        Some(_) => None,
        None => bind_control(args)?,
    };
    let peers = args.peers();
    // Nobody has been read from, and the device's threads take it over.
    confine(program, args, |profile| device.needs(profile))?;
    let handler = Arc::new(Mutex::new(Handler::new(device, &args.placement())?));
    let mut daemon = Daemon::new(
        Some(signals),
        &handler,
        args.exit_on_disconnect,
        peers.clone(),
    )?;
    if let Some(predecessor) = predecessor {
        daemon.take_over(predecessor).inspect_err(|_| {
            // The device itself is the other program's.
            handler
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .shut_down();
        })?;
        if let Some(path) = &args.socket_path {
            adopt_file(&mut endpoint, path);
        }
        control = adopt_control(predecessor, args, peers.clone());
    }
    // To the end: what was asked before is answered.
    let control = control
        .map(|socket| {
            let path = args.socket_path.as_deref();
            let place = daemon.hands_over(&endpoint, path)?.then(|| {
                let control = socket.listener()?;
                let serves = Serves::OneDevice;
                Ok(Place {
                    kind: program.kind,
                    serves,
                    control,
                })
            });
            let place = place.transpose().map_err(system("duplicate a socket"))?;
            let clients = daemon.clients(program, place)?;
            Ok::<_, ShellError>(socket.start(Arc::new(clients))?)
        })
        .transpose();
    let control = match predecessor {
        Some(_) => or_without(control),
        None => control?,
    };
    let served = daemon.serve(program.name, endpoint);
    let handed_over = daemon.handed_over;
    drop(daemon);
    if handed_over {
        if let Some(control) = control {
            control.leave();
        }
        // What the device's end would undo is the other program's now.
        std::mem::forget(handler);
        return served;
    }
    end(&handler, served)
}

/// The file of a front-end's socket, of a program that has gone. The guest is served in any case.
pub(super) fn adopt_file(endpoint: &mut Endpoint, path: &Path) {
    if let Err(error) = endpoint.adopt_file(path) {
        warn!("the file of the socket {} is gone: {error}", path.display());
    }
}

/// The control socket of a program that has gone.
pub(super) fn adopt_control(
    predecessor: &Predecessor,
    args: &ShellArgs,
    peers: Peers,
) -> Option<BoundSocket> {
    let path = args.control_path()?;
    match predecessor.control(path, peers) {
        Ok(socket) => Some(socket),
        Err(error) => {
            warn!("goes on without a control socket: {}", Chain(&error));
            None
        }
    }
}

/// The control socket, if there is to be one.
pub(super) fn bind_control(args: &ShellArgs) -> Result<Option<BoundSocket>, ShellError> {
    let path = args.control_path();
    let bind = |path| BoundSocket::bind(path, args.peers());
    Ok(path.map(bind).transpose()?)
}

/// Ends the session that there may be, and the workers. Returns what went wrong first.
pub(super) fn end<D: Device>(
    handler: &Mutex<Handler<D>>,
    served: Result<(), ShellError>,
) -> Result<(), ShellError> {
    let mut handler = handler.lock().unwrap_or_else(PoisonError::into_inner);
    let ended = handler.end_session();
    if ended.is_ok() {
        handler.shut_down();
    }
    served?;
    Ok(ended?)
}

/// Sets up what a process has once: its log, its limits, and the signals that end it, which nobody else gets.
pub(super) fn prepare(args: &ShellArgs) -> Result<SignalFd, ShellError> {
    log::start(args)?;
    raise_file_limit();
    let mut signals_taken = SigSet::empty();
    signals_taken.add(Signal::SIGTERM);
    signals_taken.add(Signal::SIGINT);
    signals_taken.add(Signal::SIGHUP);
    let failed = system("receive signals");
    // Before any thread starts: they inherit it.
    signals_taken.thread_block().map_err(|e| failed(e.into()))?;
    let signals = SignalFd::with_flags(
        &signals_taken,
        SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC,
    )
    .map_err(|e| failed(e.into()))?;
    register_signal_handler(wake_signal(), on_wake).map_err(|e| failed(e.into()))?;
    Ok(signals)
}

/// The signals that came and end the program. What else there is of them is for `refresh`.
pub(super) fn ends(signals: &mut SignalFd, mut refresh: impl FnMut()) -> bool {
    while let Ok(Some(info)) = signals.read_signal() {
        let signal = i32::try_from(info.ssi_signo)
            .ok()
            .and_then(|n| Signal::try_from(n).ok());
        if signal == Some(Signal::SIGHUP) {
            refresh();
        } else {
            info!("ending on {}", signal.map_or("a signal", Signal::as_str));
            return true;
        }
    }
    false
}

/// Each queue has five descriptors or so, each memory region one; the usual soft limit of 1024 is for programs that
/// use select(2).
fn raise_file_limit() {
    let raised = getrlimit(Resource::RLIMIT_NOFILE)
        .and_then(|(_, hard)| setrlimit(Resource::RLIMIT_NOFILE, hard, hard));
    if let Err(error) = raised {
        debug!("the limit of open files stays as it is: {error}");
    }
}

/// Why a connection is over.
enum End {
    /// The front-end left or was thrown out.
    Left(Result<(), SessionError>),
    /// A signal came, or a request on the control socket.
    Signal,
}

/// How another program meets the front-ends of this one.
struct Sockets {
    meeting: Meeting,
    listener: Option<UnixListener>,
}

/// Serves the front-ends of one endpoint, one after the other.
pub(super) struct Daemon<'h, D: Device> {
    poll: Poll,
    events: Events,
    /// Of the process, if it has no other endpoint.
    signals: Option<SignalFd>,
    handler: &'h Arc<Mutex<Handler<D>>>,
    /// What clients of the control socket ask for, if there is one.
    requests: Option<Requests>,
    exit_on_disconnect: bool,
    /// Whose connections are taken.
    peers: Peers,
    /// For connections, which anybody who may connect can make as often as he likes.
    log: LogLimit,
    /// For a program that takes the place of this one.
    sockets: Option<Sockets>,
    /// That of the present front-end.
    connection: Option<UnixStream>,
    /// The front-end of a program whose place this one has taken, until it is served.
    taken: Option<Session<D>>,
    /// The device is another program's.
    handed_over: bool,
}

impl<'h, D: Device> Daemon<'h, D> {
    pub(super) fn new(
        signals: Option<SignalFd>,
        handler: &'h Arc<Mutex<Handler<D>>>,
        exit_on_disconnect: bool,
        peers: Peers,
    ) -> Result<Self, ShellError> {
        let failed = system("wait for events");
        let poll = Poll::new().map_err(&failed)?;
        if let Some(signals) = &signals {
            let fd = signals.as_raw_fd();
            poll.registry()
                .register(&mut SourceFd(&fd), SIGNALS, Interest::READABLE)
                .map_err(&failed)?;
        }
        let fd = torn::install().map_err(&failed)?;
        poll.registry()
            .register(&mut SourceFd(&fd), TORN, Interest::READABLE)
            .map_err(&failed)?;
        Ok(Self {
            poll,
            events: Events::with_capacity(8),
            signals,
            handler,
            requests: None,
            exit_on_disconnect,
            peers,
            log: LogLimit::new(CONNECTIONS, LOG_INTERVAL),
            sockets: None,
            connection: None,
            taken: None,
            handed_over: false,
        })
    }

    /// Goes on where another program is now, which ends.
    fn take_over(&mut self, predecessor: &Predecessor) -> Result<(), ShellError> {
        predecessor.port()?.check(&self.lock())?;
        let handlers = std::slice::from_ref(self.handler);
        let sessions = predecessor.replace(handlers, |_| Ok(()), || {})?;
        self.taken = sessions.into_iter().next().flatten();
        Ok(())
    }

    /// Goes on with a front-end of a program whose place this one has taken.
    pub(super) fn goes_on(&mut self, taken: Option<Session<D>>) {
        self.taken = taken;
    }

    /// Its device is another program's.
    pub(super) fn handed_over(&self) -> bool {
        self.handed_over
    }

    /// Lets other programs take the place of this one, if they can meet its front-ends; returns whether they can.
    pub(super) fn hands_over(
        &mut self,
        endpoint: &Endpoint,
        path: Option<&Path>,
    ) -> Result<bool, ShellError> {
        let (meeting, listener) = match (endpoint, path) {
            (Endpoint::Connecting(path), _) => (Meeting::Connecting(path.clone()), None),
            (Endpoint::Listening(listener), Some(path)) => {
                let listener = listener.socket.try_clone();
                let listener = listener.map_err(system("duplicate a socket"))?;
                (Meeting::Listening(path.to_owned()), Some(listener))
            }
            // By a number, which the other program does not have.
            _ => return Ok(false),
        };
        self.sockets = Some(Sockets { meeting, listener });
        Ok(true)
    }

    fn offer(&self) -> Result<With<PortOffer>, ApiError> {
        let failed = |error: io::Error| ApiError::new(ErrorCode::Failed, &error);
        let Some(Sockets { meeting, listener }) = &self.sockets else {
            return Err(failed(io::ErrorKind::NotConnected.into()));
        };
        let handler = self.lock();
        let offered = handler.offered();
        let parts = handler.parts()?;
        let mut descriptors = Descriptors::default();
        let listener = listener.as_ref().map(UnixListener::try_clone);
        let listener = listener.transpose().map_err(failed)?;
        let offer = PortOffer {
            options: BTreeMap::new(),
            features: offered.features,
            protocol_features: offered.protocol_features,
            queues: offered.queues,
            max_queue_size: offered.max_queue_size,
            meeting: meeting.clone(),
            listener: listener.map(|listener| descriptors.add(listener)),
            device: Piece::new(parts, &mut descriptors),
        };
        Ok((offer, descriptors))
    }

    /// Answers clients. `Ok(true)`: all is to end.
    fn answer(&mut self) -> Result<bool, ShellError> {
        let mut end = false;
        while let Some(asked) = self.requests.as_ref().and_then(Requests::next) {
            // Whoever asks waits for it.
            match asked {
                Asked::Request { request, answer } => {
                    end |= request == Request::Quit;
                    let _ = answer.send(self.lock().control(&request));
                }
                Asked::Offer(answer) => {
                    let _ = answer.send(self.offer());
                }
                Asked::HandOver { answer, taken } => {
                    let frozen = self.lock().freeze(self.connection.as_ref());
                    let frozen = answer.send(frozen).is_ok();
                    if frozen && taken.recv().is_ok() {
                        self.handed_over = true;
                        return Ok(true);
                    }
                    self.lock().thaw()?;
                }
            }
        }
        if end {
            info!("ending on request");
        }
        Ok(end)
    }

    /// What clients ask through.
    pub(super) fn clients(
        &mut self,
        program: &Program,
        place: Option<Place>,
    ) -> Result<Clients, ShellError> {
        let (statistics, connected) = self.lock().observables();
        let registry = self.poll.registry();
        let (clients, requests) =
            control::channel(program, statistics, connected, place, registry, CONTROL)
                .map_err(system("wait for requests"))?;
        self.requests = Some(requests);
        Ok(clients)
    }

    fn lock(&self) -> MutexGuard<'h, Handler<D>> {
        // Only this thread ever locks it.
        self.handler.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for an event. `Ok(true)` means that all is to end: a signal came, or a client asked for it.
    fn wait(&mut self, timeout: Option<Duration>) -> Result<bool, ShellError> {
        match self.poll.poll(&mut self.events, timeout) {
            Ok(()) => {}
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(system("wait for events")(e)),
        }
        let came = |token| self.events.iter().any(|e| e.token() == token);
        let (asked, came) = (came(CONTROL), came(SIGNALS));
        if asked && self.answer()? {
            return Ok(true);
        }
        let handler = self.handler;
        Ok(match &mut self.signals {
            Some(signals) if came => ends(signals, || {
                let mut handler = handler.lock().unwrap_or_else(PoisonError::into_inner);
                handler.refresh();
            }),
            _ => false,
        })
    }

    /// Serves until the end. `name` is for the log.
    pub(super) fn serve(&mut self, name: &str, endpoint: Endpoint) -> Result<(), ShellError> {
        match endpoint {
            Endpoint::Connected(stream) => {
                info!("{name} ready on an inherited connection");
                match self.session(stream)? {
                    End::Left(result) => Ok(result?),
                    End::Signal => Ok(()),
                }
            }
            Endpoint::Listening(listener) => {
                info!("{name} ready");
                let served = self.listen(&listener);
                if self.handed_over {
                    listener.leave();
                }
                served
            }
            Endpoint::Connecting(path) => {
                info!("{name} connecting to {}", path.display());
                self.connect(&path)
            }
        }
    }

    fn listen(&mut self, listener: &Listener) -> Result<(), ShellError> {
        let fd = listener.socket.as_raw_fd();
        self.poll
            .registry()
            .register(&mut SourceFd(&fd), LISTENER, Interest::READABLE)
            .map_err(system("wait for connections"))?;
        if self.serve_taken()? {
            return Ok(());
        }
        loop {
            match listener.socket.accept() {
                Ok((stream, _)) => {
                    if self.front_end(stream)? {
                        return Ok(());
                    }
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    if self.wait(None)? {
                        return Ok(());
                    }
                }
                // Out of descriptors, or a peer that left at once: not for ever.
                Err(e) => {
                    if let Some(held_back) = self.log.check() {
                        error!(held_back, "cannot accept a connection: {e}");
                    }
                    if self.wait(Some(RECONNECT))? {
                        return Ok(());
                    }
                }
            }
        }
    }

    fn connect(&mut self, path: &Path) -> Result<(), ShellError> {
        let mut said = false;
        if self.serve_taken()? {
            return Ok(());
        }
        loop {
            match UnixStream::connect(path) {
                Ok(stream) => {
                    said = false;
                    if self.front_end(stream)? {
                        return Ok(());
                    }
                }
                Err(e) if !said => {
                    info!("waiting for a front-end on {}: {e}", path.display());
                    said = true;
                }
                Err(_) => {}
            }
            if self.wait(Some(RECONNECT))? {
                return Ok(());
            }
        }
    }

    /// Serves one front-end of several. `Ok(true)`: the program is to end.
    fn front_end(&mut self, stream: UnixStream) -> Result<bool, ShellError> {
        let said = self.log.check();
        if let Err(error) = self.peers.check(&stream) {
            if said.is_some() {
                error!("{error}");
            }
            return Ok(false);
        }
        if let Some(held_back) = said {
            // Mostly none, which is then not worth a word.
            let held_back = Some(held_back).filter(|&count| count > 0);
            info!(held_back, "front-end connected");
        }
        let end = self.session(stream)?;
        self.ended(end, said.is_some())
    }

    /// Serves the front-end of the program whose place this one has taken, if it has one. `Ok(true)`: the program is to end.
    fn serve_taken(&mut self) -> Result<bool, ShellError> {
        let Some(session) = self.taken.take() else {
            return Ok(false);
        };
        let end = self.serve_session(Ok(session))?;
        self.ended(end, true)
    }

    /// Says what became of a front-end. `Ok(true)`: the program is to end.
    fn ended(&self, end: End, said: bool) -> Result<bool, ShellError> {
        match end {
            End::Signal => Ok(true),
            End::Left(result) => {
                match result {
                    Err(e) if self.exit_on_disconnect => return Err(e.into()),
                    _ if !said => {}
                    Ok(()) => info!("front-end disconnected"),
                    Err(e) => error!("front-end disconnected: {}", Chain(&e)),
                }
                Ok(self.exit_on_disconnect)
            }
        }
    }

    fn session(&mut self, stream: UnixStream) -> Result<End, ShellError> {
        self.lock().begin_session();
        let session = Session::new(stream, self.handler);
        self.serve_session(session)
    }

    fn serve_session(
        &mut self,
        session: Result<Session<D>, SessionError>,
    ) -> Result<End, ShellError> {
        let result = match session {
            Ok(session) => self.messages(session),
            Err(e) => Ok(End::Left(Err(e))),
        };
        self.connection = None;
        if !self.handed_over {
            self.lock().end_session()?;
        }
        result
    }

    fn messages(&mut self, mut session: Session<D>) -> Result<End, ShellError> {
        match session.socket().try_clone() {
            Ok(connection) => self.connection = Some(connection),
            Err(e) => return Ok(End::Left(Err(SessionError::Socket(e)))),
        }
        let fd = session.as_raw_fd();
        self.poll
            .registry()
            .register(&mut SourceFd(&fd), SESSION, Interest::READABLE)
            .map_err(system("wait for messages"))?;
        let end = loop {
            // One message, then a look at the signals: a front-end that never stops talking cannot hold
            // up the end.
            let timeout = match session.step() {
                Ok(Step::Served) => Some(Duration::ZERO),
                Ok(Step::Idle) => None,
                Ok(Step::Gone) => break End::Left(Ok(())),
                Err(e) => break End::Left(Err(e)),
            };
            if self.wait(timeout)? {
                break End::Signal;
            }
            if self.lock().memory_gone() {
                break End::Left(Err(SessionError::MemoryGone));
            }
        };
        if let Err(e) = self.poll.registry().deregister(&mut SourceFd(&fd)) {
            debug!("cannot stop waiting for messages: {e}");
        }
        Ok(end)
    }
}

/// A back-end program, from its command line to its exit status: `open` makes of it the device, and what is for the
/// shell. Errors go to standard error.
#[must_use]
pub fn main<Cli: Parser, D: Device, E: OpenError>(
    program: &Program,
    open: impl FnOnce(Cli) -> (Result<D, E>, ShellArgs),
) -> ExitCode {
    main_with(program, open, run)
}

/// The same for a program that does not always serve one device: `run` is to serve what `open` makes.
#[must_use]
pub fn main_with<Cli: Parser, T, E: OpenError>(
    program: &Program,
    open: impl FnOnce(Cli) -> (Result<T, E>, ShellArgs),
    run: impl FnOnce(&Program, T, &ShellArgs) -> Result<(), ShellError>,
) -> ExitCode {
    match program.print_capabilities_if_asked() {
        Ok(false) => {}
        Ok(true) => return ExitCode::SUCCESS,
        Err(error) => return fail(program, &error, FAILURE),
    }
    let (opened, args) = open(Cli::parse());
    let opened = match opened {
        Ok(opened) => opened,
        Err(error) => {
            let status = if error.is_usage() { USAGE } else { FAILURE };
            return fail(program, &error, status);
        }
    };
    match run(program, opened, &args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fail(program, &error, FAILURE),
    }
}

fn fail(program: &Program, error: &dyn std::error::Error, status: u8) -> ExitCode {
    eprintln!("{}: {}", program.name, Chain(error));
    ExitCode::from(status)
}

//! The program that takes the place of another.

use std::fmt::Debug;
use std::io;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use ringside_control::{BoundSocket, Chain, PeerError, Peers};
use serde_json::{Value, json};
use thiserror::Error;
use tracing::info;

use super::talk::{Descriptors, Talk, TalkError, VERSION};
use super::{
    DRAIN, Meeting, Message, Offer, PREPARE, Parts, Piece, PortOffer, PortState, STEP, Serves, now,
};
use crate::shell::device::Device;
use crate::shell::handler::{Handler, HandlerError, Kicks};
use crate::shell::options::Program;
use crate::shell::ports::PortOptions;
use crate::shell::session::{Session, SessionError};
use crate::shell::socket::Endpoint;
use crate::shell::state::StateError;

/// A program cannot take the place of another, which goes on.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum TakeOverError {
    /// There is none.
    #[error(
        "cannot connect to {path}: give --take-over the control socket of the program whose place this one is to take"
    )]
    Connect {
        /// The control socket.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// Somebody else listens there.
    #[error("the control socket is that of another user's program")]
    Peer(#[from] PeerError),
    /// The conversation failed.
    #[error("the other program's place cannot be taken")]
    Talk(#[from] TalkError),
    /// It serves another device.
    #[error(
        "the other program has {what} {theirs}, and this one {ours}: start both with the same options"
    )]
    Different {
        /// What differs.
        what: &'static str,
        /// That of the other program.
        theirs: String,
        /// That of this one.
        ours: String,
    },
    /// What a driver reads would change.
    #[error(
        "byte {at} of the configuration space differs from what the other program's driver has read: start both with the same options"
    )]
    Config {
        /// The first byte that differs.
        at: usize,
    },
    /// A file of a socket.
    #[error("the socket's file {path} is not there any more")]
    SocketFile {
        /// Its path.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The connection of a front-end cannot be gone on with.
    #[error("the front-end's connection cannot be gone on with")]
    Session(#[from] SessionError),
    /// Something that holds for the connection cannot be had here.
    #[error("the connection's rings cannot be gone on with")]
    Handler(#[from] HandlerError),
    /// What a front-end has said cannot be obeyed here.
    #[error("what the front-end has said cannot be obeyed here")]
    Refused(#[source] io::Error),
    /// The state of the device.
    #[error(transparent)]
    State(#[from] StateError),
    /// What the device is made of.
    #[error("what the other program says about its device cannot be read")]
    Description(#[source] serde_json::Error),
    /// A port cannot be had here.
    #[error("a port of the other program cannot be served here")]
    Port(#[source] Box<dyn std::error::Error + Send + Sync>),
}

/// Refuses what is not the same.
pub(crate) fn same<T: PartialEq + Debug>(
    what: &'static str,
    theirs: &T,
    ours: &T,
) -> Result<(), TakeOverError> {
    if theirs == ours {
        return Ok(());
    }
    Err(TakeOverError::Different {
        what,
        theirs: format!("{theirs:?}"),
        ours: format!("{ours:?}"),
    })
}

/// The program whose place is to be taken, from the first word to the last.
#[derive(Debug)]
pub(in crate::shell) struct Predecessor {
    stream: UnixStream,
    offer: Offer,
    /// Not taken yet.
    descriptors: Mutex<Descriptors>,
    ports: Vec<Port>,
}

/// A port of it.
#[derive(Debug)]
pub(in crate::shell) struct Port {
    offer: PortOffer,
    /// Not taken yet.
    descriptors: Mutex<Descriptors>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn parts_of(piece: &Piece, descriptors: &Mutex<Descriptors>) -> Result<Parts, TakeOverError> {
    let mut all = lock(descriptors);
    let taken = piece.parts.iter().map(|&number| all.take(number));
    Ok(Parts {
        description: piece.description.clone(),
        descriptors: taken.collect::<Result<_, _>>()?,
    })
}

impl Predecessor {
    /// Connects to the control socket at `path`, and hears what there is.
    pub(in crate::shell) fn meet(
        path: &Path,
        program: &Program,
        serves: Serves,
        peers: &Peers,
    ) -> Result<Self, TakeOverError> {
        use std::io::Write;
        let connect = |source| TakeOverError::Connect {
            path: path.to_owned(),
            source,
        };
        let mut stream = UnixStream::connect(path).map_err(connect)?;
        peers.check(&stream)?;
        let arguments = json!({ "version": VERSION });
        let request = json!({ "command": "hand-over", "arguments": arguments });
        stream
            .write_all(format!("{request}\n").as_bytes())
            .map_err(connect)?;
        let talk = Talk(&stream);
        let (Message::Offer(offer), descriptors) = talk.receive(STEP)? else {
            return Err(TalkError::Order.into());
        };
        same("a device of kind", &offer.kind, &program.kind.to_owned())?;
        same("to serve", &offer.serves, &serves)?;
        let mut ports = Vec::new();
        for _ in 0..offer.ports {
            let (Message::Port(offer), descriptors) = talk.receive(STEP)? else {
                return Err(TalkError::Order.into());
            };
            ports.push(Port {
                offer: *offer,
                descriptors: Mutex::new(descriptors),
            });
        }
        Ok(Self {
            stream,
            offer: *offer,
            descriptors: Mutex::new(descriptors),
            ports,
        })
    }

    /// Its ports.
    pub(in crate::shell) fn ports(&self) -> &[Port] {
        &self.ports
    }

    /// The only one.
    pub(in crate::shell) fn port(&self) -> Result<&Port, TakeOverError> {
        Ok(self.ports.first().ok_or(TalkError::Order)?)
    }

    /// What its ports have in common.
    pub(in crate::shell) fn parts(&self) -> Result<Parts, TakeOverError> {
        parts_of(&self.offer.common, &self.descriptors)
    }

    /// Its control socket, once it is gone.
    pub(in crate::shell) fn control(
        &self,
        path: &Path,
        peers: Peers,
    ) -> Result<BoundSocket, TakeOverError> {
        let listener = UnixListener::from(lock(&self.descriptors).take(self.offer.control)?);
        BoundSocket::adopt(path, listener, peers).map_err(|source| TakeOverError::SocketFile {
            path: path.to_owned(),
            source,
        })
    }

    /// Takes its place, with a handler for each of its ports: returns the connections that go on, of those whose front-end is
    /// connected. `adopt` goes by the state of what ports have in common; `go_on` lets that go on when all rings run.
    pub(in crate::shell) fn replace<D: Device>(
        &self,
        handlers: &[Arc<Mutex<Handler<D>>>],
        adopt: impl FnOnce(&Value) -> Result<(), TakeOverError>,
        go_on: impl FnOnce(),
    ) -> Result<Vec<Option<Session<D>>>, TakeOverError> {
        let talk = Talk(&self.stream);
        let none = Descriptors::default();
        talk.send(&Message::Ready, &none, STEP)?;
        let (Message::State(state), _) = talk.receive(DRAIN)? else {
            return Err(TalkError::Order.into());
        };
        let (sessions, kicks) = match place_all(&talk, handlers)
            .and_then(|placed| adopt(&state.common).map(|()| placed))
        {
            Ok(placed) => placed,
            Err(error) => {
                let why = Message::Refused(Chain(&error).to_string());
                // It hears that from the end of the connection as well.
                let _ = talk.send(&why, &none, STEP);
                return Err(error);
            }
        };
        talk.send(&Message::Taken, &none, STEP)?;
        match talk.receive(PREPARE)?.0 {
            Message::Go => {}
            _ => return Err(TalkError::Order.into()),
        }
        for (handler, kicks) in handlers.iter().zip(kicks) {
            lock(handler).go_on(kicks)?;
        }
        go_on();
        let pause = now().saturating_sub(state.stopped) / 1000;
        info!("took over from process {} in {pause} µs", self.offer.pid);
        // Only for its log.
        let _ = talk.send(&Message::Done(pause), &none, STEP);
        Ok(sessions)
    }
}

impl Port {
    /// What it was made from.
    pub(in crate::shell) fn options(&self) -> &PortOptions {
        &self.offer.options
    }

    /// What its device is made of.
    pub(in crate::shell) fn parts(&self) -> Result<Parts, TakeOverError> {
        parts_of(&self.offer.device, &self.descriptors)
    }

    /// How its front-ends are met: at `path`, where they listen (`client`) or connect. It keeps the file of its socket until
    /// its program has gone.
    pub(in crate::shell) fn endpoint(
        &self,
        path: PathBuf,
        client: bool,
    ) -> Result<Endpoint, TakeOverError> {
        let ours = match client {
            true => Meeting::Connecting(path),
            false => Meeting::Listening(path),
        };
        same("a front-end's socket", &self.offer.meeting, &ours)?;
        match (ours, self.offer.listener) {
            (Meeting::Connecting(path), _) => Ok(Endpoint::Connecting(path)),
            (Meeting::Listening(_), Some(listener)) => {
                let socket = UnixListener::from(lock(&self.descriptors).take(listener)?);
                Ok(Endpoint::adopt(socket))
            }
            (Meeting::Listening(_), None) => Err(TalkError::Order.into()),
        }
    }

    /// Refuses a device that its driver would find to be another one.
    pub(in crate::shell) fn check<D: Device>(
        &self,
        handler: &Handler<D>,
    ) -> Result<(), TakeOverError> {
        let hex = |features: u64| format!("{features:#x}");
        let ours = handler.offered();
        let theirs = &self.offer;
        // What front-ends and drivers have been told stays true; a newer program may offer more to those that come.
        let (a, b) = (theirs.features, ours.features);
        if a & !b != 0 {
            same("features", &hex(a), &hex(b))?;
        }
        let (a, b) = (theirs.protocol_features, ours.protocol_features);
        if a & !b != 0 {
            same("protocol features", &hex(a), &hex(b))?;
        }
        same("a number of queues of", &theirs.queues, &ours.queues)?;
        let (a, b) = (theirs.max_queue_size, ours.max_queue_size);
        same("a queue size of up to", &a, &b)
    }
}

/// Sessions, of those that there are, and what starts their rings.
type Placed<D> = (Vec<Option<Session<D>>>, Vec<Kicks>);

fn place_all<D: Device>(
    talk: &Talk<'_>,
    handlers: &[Arc<Mutex<Handler<D>>>],
) -> Result<Placed<D>, TakeOverError> {
    let mut placed = (Vec::new(), Vec::new());
    for handler in handlers {
        let (Message::PortState(state), descriptors) = talk.receive(DRAIN)? else {
            return Err(TalkError::Order.into());
        };
        let (session, kicks) = place(&state, descriptors, handler)?;
        placed.0.push(session);
        placed.1.push(kicks);
    }
    Ok(placed)
}

fn place<D: Device>(
    state: &PortState,
    mut descriptors: Descriptors,
    handler: &Arc<Mutex<Handler<D>>>,
) -> Result<(Option<Session<D>>, Kicks), TakeOverError> {
    let session = match &state.connection {
        Some(connection) => {
            let socket = UnixStream::from(descriptors.take(connection.socket)?);
            let (features, protocol) = (connection.features, connection.protocol_features);
            Some(Session::resume(socket, handler, features, protocol)?)
        }
        None => None,
    };
    let kicks = lock(handler).adopt(state, &mut descriptors)?;
    Ok((session, kicks))
}

//! A disk on an NBD server.
//!
//! Each worker has a connection of its own if the server says that this is safe (NBD_FLAG_CAN_MULTI_CONN), otherwise all
//! share one. A connection has a thread, which sends the workers' requests as they come and takes the replies in whatever order
//! they come. Data goes straight between the socket and guest memory where that saves more than it costs; small transfers
//! share a system call.
//!
//! ```text
//!  worker ──Op──▶ channel, eventfd ──▶ client.rs: sends ──▶ socket ──▶ server
//!    ▲                                             receives ◀───────────┘
//!    └── mailbox ◀── outcome ◀─────────────────────┘
//! ```
//!
//! A program that takes the place of this one gets the connections: none is made anew, so that a server that serves one client only
//! does not notice. Both look away from them while it is open which of the two goes on.
//!
//! When a server is gone, its requests are kept, and sent again when it is back: each of them does the same when it is done
//! twice. What a server acknowledged before, and lost with its cache because nobody flushed, is lost, as with any disk.

mod client;
mod proto;
mod target;
mod vectored;

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Read, Write};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{self, Sender};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use ringside_sandbox::{Profile, ThreadKind};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use thiserror::Error;
use tracing::{error, info};

use super::ops::{Action, Link, Op, Wake};
use super::side::Side;
use crate::shell::{Parts, confined};
use client::{Client, Line};
use proto::Export;

pub use proto::HandshakeError;
pub use target::UriError;

pub(in crate::blk) use target::Target;

/// How long connecting may take, then the handshake, and in it what is begun at the last moment.
const HANDSHAKE_PATIENCE: Duration = Duration::from_secs(3);

/// An export cannot be used.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum NbdError {
    /// The URI is wrong.
    #[error(transparent)]
    Uri(#[from] UriError),
    /// The server cannot be reached, or does not give the export.
    #[error("NBD: {target}: {source}")]
    Handshake {
        /// The export.
        target: String,
        /// What failed.
        #[source]
        source: HandshakeError,
    },
    /// It may not be written.
    #[error("NBD: {target} is read-only; use --read-only")]
    ReadOnly {
        /// The export.
        target: String,
    },
    /// The program whose place is taken has another one.
    #[error(
        "NBD: the other program has {theirs} open, and this one was given {target}: start it with the same --path"
    )]
    Otherwise {
        /// What was asked for.
        target: String,
        /// What is open.
        theirs: String,
    },
}

/// What a program tells the one that takes its place.
#[derive(Debug, Serialize, Deserialize)]
struct Described {
    target: String,
    export: Export,
}

/// An export that is open.
#[derive(Debug)]
pub struct Nbd {
    target: Target,
    export: Export,
    patience: Duration,
    /// Connections, until their threads start: the first one, or those of another program.
    sockets: VecDeque<File>,
    /// They are another program's until there is a request.
    taken: bool,
    connections: Vec<Connection>,
    /// How many these are.
    count: Arc<AtomicUsize>,
    /// The server takes no more connections.
    full: bool,
}

#[derive(Debug)]
struct Connection {
    /// For a program that takes the place of this one.
    socket: Arc<Mutex<File>>,
    sender: Sender<Op>,
    wake: Arc<Wake>,
    thread: JoinHandle<()>,
    users: usize,
}

impl Nbd {
    /// Connects to the server. `patience`: how long requests wait for a server that is gone.
    ///
    /// # Errors
    /// [`NbdError`]
    pub(in crate::blk) fn open(
        target: Target,
        read_only: bool,
        patience: Duration,
    ) -> Result<Self, NbdError> {
        let (socket, export) = connect(&target).map_err(|source| NbdError::Handshake {
            target: target.to_string(),
            source,
        })?;
        let full = !export.multi_conn();
        Self::on(target, export, [socket].into(), full, read_only, patience)
    }

    /// The same on the connections of another program, that was told this when it had opened it.
    ///
    /// # Errors
    /// [`NbdError`]
    pub(in crate::blk) fn adopt(
        target: Target,
        described: &Value,
        sockets: VecDeque<File>,
        read_only: bool,
        patience: Duration,
    ) -> Result<Self, NbdError> {
        let described = Described::deserialize(described);
        let Described {
            target: theirs,
            export,
        } = described.map_err(|error| NbdError::Handshake {
            target: target.to_string(),
            source: HandshakeError::Io(error.into()),
        })?;
        // Where the connections are made again.
        if theirs != target.to_string() {
            let target = target.to_string();
            return Err(NbdError::Otherwise { target, theirs });
        }
        let mut nbd = Self::on(target, export, sockets, true, read_only, patience)?;
        nbd.taken = true;
        Ok(nbd)
    }

    fn on(
        target: Target,
        export: Export,
        sockets: VecDeque<File>,
        full: bool,
        read_only: bool,
        patience: Duration,
    ) -> Result<Self, NbdError> {
        if export.read_only() && !read_only {
            return Err(NbdError::ReadOnly {
                target: target.to_string(),
            });
        }
        Ok(Self {
            target,
            export,
            patience,
            sockets,
            taken: false,
            connections: Vec::new(),
            count: Arc::default(),
            full,
        })
    }

    /// What another program goes on with: what the server said, and the connections.
    ///
    /// # Errors
    /// What the system said.
    pub(in crate::blk) fn parts(&self) -> io::Result<Parts> {
        let sockets = self.connections.iter().map(|connection| {
            let socket = &connection.socket;
            let socket = socket.lock().unwrap_or_else(PoisonError::into_inner);
            Ok(socket.try_clone()?.into())
        });
        Ok(Parts {
            description: json!(Described {
                target: self.target.to_string(),
                export: self.export,
            }),
            descriptors: sockets.collect::<io::Result<_>>()?,
        })
    }

    /// Leaves the connections alone until there is a request again: they may be another program's.
    ///
    /// # Errors
    /// What the system said.
    pub(in crate::blk) fn leave(&self) -> io::Result<()> {
        for Connection { sender, wake, .. } in &self.connections {
            Link::new(sender.clone(), Some(Arc::clone(wake)))?.have(Action::Leave)?;
        }
        Ok(())
    }

    /// Its threads connect to the server again when it was gone.
    pub(in crate::blk) fn needs(&self, profile: &mut Profile) {
        self.target.needs(profile);
    }

    /// Size in bytes.
    pub(in crate::blk) fn capacity(&self) -> u64 {
        self.export.size
    }

    /// Smallest block that the server takes, in bytes.
    pub(in crate::blk) fn min_block(&self) -> u32 {
        self.export.min_block
    }

    /// The block that the server likes best, in bytes, or 0.
    pub(in crate::blk) fn preferred_block(&self) -> u32 {
        self.export.preferred_block
    }

    /// Discarding and zeroing are possible.
    pub(in crate::blk) fn ranges(&self) -> bool {
        self.export.zeroes()
    }

    /// What a worker needs: a connection of its own, if the server gives one.
    ///
    /// # Errors
    /// What the system said.
    pub(in crate::blk) fn attach(&mut self) -> io::Result<Side> {
        let with_it = self.connections.len().saturating_add(1);
        let socket = match self.sockets.pop_front() {
            Some(socket) => Some(socket),
            None if self.full => None,
            None => match connect(&self.target) {
                Ok((socket, export)) if export.succeeds(&self.export, with_it).is_ok() => {
                    Some(socket)
                }
                _ => {
                    self.full = true;
                    info!(
                        connections = self.connections.len(),
                        "the NBD server takes no more connections; queues share them"
                    );
                    None
                }
            },
        };
        if let Some(socket) = socket {
            self.start(socket)?;
        }
        let connection = self
            .connections
            .iter_mut()
            .min_by_key(|connection| connection.users)
            .ok_or(io::ErrorKind::NotConnected)?;
        connection.users = connection.users.saturating_add(1);
        let link = Link::new(
            connection.sender.clone(),
            Some(Arc::clone(&connection.wake)),
        )?;
        Ok(Side::new(link, None))
    }

    /// A way to the server: what one connection flushes, is flushed for all.
    ///
    /// # Errors
    /// What the system said.
    pub(in crate::blk) fn link(&self) -> io::Result<Link> {
        match self.connections.first() {
            Some(Connection { sender, wake, .. }) => {
                Link::new(sender.clone(), Some(Arc::clone(wake)))
            }
            None => Err(io::ErrorKind::NotConnected.into()),
        }
    }

    fn start(&mut self, socket: File) -> io::Result<()> {
        let (sender, ops) = mpsc::channel();
        let wake = Arc::new(Wake::new()?);
        let shared = Arc::new(Mutex::new(socket.try_clone()?));
        let client = Client::new(
            self.target.clone(),
            self.export,
            self.patience,
            Line {
                socket,
                shared: Arc::clone(&shared),
                away: self.taken,
            },
            ops,
            Arc::clone(&wake),
            Arc::clone(&self.count),
        )?;
        let number = self.connections.len();
        if number == 0 {
            let Export {
                size,
                min_block,
                max_block,
                structured,
                ..
            } = self.export;
            info!(%self.target, size, min_block, max_block, structured, "NBD export");
        }
        self.count.fetch_add(1, Ordering::Relaxed);
        let thread = thread::Builder::new()
            .name(format!("blk-nbd-{number}"))
            .spawn(move || confined(ThreadKind::Server, || client.run()))?;
        self.connections.push(Connection {
            socket: shared,
            sender,
            wake,
            thread,
            users: 0,
        });
        Ok(())
    }
}

impl Drop for Nbd {
    /// Takes leave of the server. All workers have ended.
    fn drop(&mut self) {
        for Connection {
            socket: _,
            sender,
            wake,
            thread,
            users: _,
        } in self.connections.drain(..)
        {
            drop(sender);
            wake.wake();
            if thread.join().is_err() {
                error!("the thread of an NBD connection failed");
            }
        }
    }
}

fn connect(target: &Target) -> Result<(File, Export), HandshakeError> {
    let socket = target.connect(HANDSHAKE_PATIENCE)?;
    let patient = Patient {
        socket: &socket,
        begun: Instant::now(),
    };
    let export = proto::handshake(patient, &target.export)?;
    Ok((socket, export))
}

/// A socket whose peer has some time for all that it says, and not for each byte.
struct Patient<'s> {
    socket: &'s File,
    begun: Instant,
}

impl Patient<'_> {
    fn socket(&self) -> io::Result<&File> {
        if self.begun.elapsed() > HANDSHAKE_PATIENCE {
            return Err(io::ErrorKind::TimedOut.into());
        }
        Ok(self.socket)
    }
}

impl Read for Patient<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.socket()?.read(buffer)
    }
}

impl Write for Patient<'_> {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        self.socket()?.write(buffer)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.socket()?.flush()
    }
}

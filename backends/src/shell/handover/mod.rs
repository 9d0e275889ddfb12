//! Upgrade in place: a program takes the place of one that runs, and its guest notices no more than a short pause.
//!
//! The new program is started with the same options and `--take-over`. It connects to the control socket of the old one:
//!
//! ```text
//!  new                                                             old
//!  {"command":"hand-over", …} ───────────────────────────────────▶ goes on serving
//!  opens the device with what it gets,         ◀──────────── Offer: sockets, what the device is made of, what it offers
//!  starts its threads, confines itself
//!  Ready ────────────────────────────────────────────────────────▶ stops its rings: what is in flight ends      ┐
//!  puts features, memory, rings in place       ◀──────────── State: the connection, and all that was said on it  │ the pause
//!  Taken ────────────────────────────────────────────────────────▶                                              │
//!  starts the rings                            ◀──────────── Go: nothing of it is the old program's any more     ┘
//!  Done: how long the pause was ─────────────────────────────────▶ ends, and leaves the sockets' files
//! ```
//!
//! If the new program fails, or goes, before Go, the old one starts its rings again and goes on. Descriptors are handed over as
//! they are: who is connected stays so, packets that wait in a TAP interface stay there, and a disk stays locked, for its lock
//! belongs to the open file.
//!
//! | Module | Its matter |
//! | --- | --- |
//! | `talk` | the messages on the wire |
//! | `taking` | the new program |
//! | here | what is handed over, and the old program |

mod taking;
mod talk;

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;

use nix::time::{ClockId, clock_gettime};
use ringside_control::{ApiError, ErrorCode};
use serde::{Deserialize, Serialize};
use serde_json::Value;

pub(super) use taking::Predecessor;
pub use taking::TakeOverError;
pub(crate) use taking::same;
pub use talk::TalkError;
pub(super) use talk::{Descriptors, Talk, VERSION};

/// How long a program may take to open its device and to start its threads.
pub(super) const PREPARE: Duration = Duration::from_secs(60);
/// How long requests in flight may take to end. The old program goes on if they take longer.
const DRAIN: Duration = Duration::from_secs(60);
/// How long each of the other steps may take.
pub(super) const STEP: Duration = Duration::from_secs(10);

/// What a device is made of: what the program that takes its place is to open it by, besides its options.
#[derive(Debug, Default)]
pub struct Parts {
    /// What there is to know about it.
    pub description: Value,
    /// What it has open.
    pub descriptors: Vec<OwnedFd>,
}

/// How front-ends come to the old program.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Meeting {
    /// They connect to it.
    Listening(PathBuf),
    /// It connects to them.
    Connecting(PathBuf),
}

/// What the new program begins with.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Offer {
    /// Kind of device, as in QEMU's `vhost-user.json`.
    pub(super) kind: String,
    pub(super) pid: u32,
    pub(super) features: u64,
    pub(super) protocol_features: u64,
    pub(super) queues: u16,
    pub(super) max_queue_size: u16,
    pub(super) meeting: Meeting,
    /// Number of the descriptor, if front-ends connect.
    pub(super) listener: Option<u32>,
    pub(super) control: Option<u32>,
    pub(super) description: Value,
    /// Numbers of the descriptors of the device.
    pub(super) parts: Vec<u32>,
}

/// What the new program goes on from.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct State {
    /// When the rings were about to be stopped, in nanoseconds of CLOCK_MONOTONIC.
    pub(super) stopped: u64,
    pub(super) connection: Option<Connection>,
    /// What a driver has set, as for a guest that moves.
    pub(super) device: Vec<u8>,
    /// What users have.
    pub(super) settings: Value,
    /// The configuration space.
    pub(super) config: Vec<u8>,
}

/// What a front-end has said. Descriptors are numbers.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Connection {
    pub(super) socket: u32,
    /// With VHOST_USER_F_PROTOCOL_FEATURES.
    pub(super) features: u64,
    pub(super) protocol_features: u64,
    pub(super) requests: Option<u32>,
    pub(super) memory: Vec<Region>,
    pub(super) inflight: Option<Area>,
    pub(super) log: Option<LogArea>,
    pub(super) rings: Vec<Ring>,
}

/// A region of guest memory, as in a message about memory.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Region {
    pub(super) guest: u64,
    pub(super) len: u64,
    pub(super) user: u64,
    pub(super) offset: u64,
    pub(super) file: u32,
}

/// The dirty log: a part of a file.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct LogArea {
    pub(super) len: u64,
    pub(super) offset: u64,
    pub(super) file: u32,
}

/// The notes of requests in flight of so many queues of a size: a part of a file.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Area {
    pub(super) len: u64,
    pub(super) offset: u64,
    pub(super) queues: u16,
    pub(super) size: u16,
    pub(super) file: u32,
}

/// A ring that is stopped.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Ring {
    pub(super) size: u16,
    pub(super) addresses: Option<RingAddresses>,
    pub(super) base: Option<u32>,
    pub(super) enabled: bool,
    pub(super) kick: RingKick,
    pub(super) call: Option<u32>,
    pub(super) err: Option<u32>,
    pub(super) resumed: Option<bool>,
}

/// In the front-end's address space.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct RingAddresses {
    pub(super) desc: u64,
    pub(super) avail: u64,
    pub(super) used: u64,
    pub(super) log: Option<u64>,
}

/// Where kicks arrive.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum RingKick {
    Unset,
    Polled,
    Descriptor(u32),
}

/// What the two programs say to each other.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Message {
    Offer(Box<Offer>),
    Ready,
    State(Box<State>),
    Taken,
    Go,
    /// The pause in microseconds.
    Done(u64),
    /// The new program cannot go on.
    Refused(String),
}

/// Nanoseconds of CLOCK_MONOTONIC, which all processes share.
pub(super) fn now() -> u64 {
    let time = clock_gettime(ClockId::CLOCK_MONOTONIC).map(std::time::Duration::from);
    let nanoseconds = time.map_or(0, |time| time.as_nanos());
    u64::try_from(nanoseconds).unwrap_or(u64::MAX)
}

/// The old program's side of the conversation.
pub(super) struct Handing<'s>(Talk<'s>);

impl<'s> Handing<'s> {
    pub(super) fn new(client: &'s UnixStream) -> Self {
        Self(Talk(client))
    }

    /// Sends what the other program begins with, and waits until it is ready.
    pub(super) fn offer(&self, offer: Offer, parts: &Descriptors) -> Result<(), ApiError> {
        let message = Message::Offer(Box::new(offer));
        self.0.send(&message, parts, STEP).map_err(failed)?;
        match self.next(PREPARE)? {
            Message::Ready => Ok(()),
            _ => Err(failed(TalkError::Order)),
        }
    }

    /// Sends what it goes on from. All is its own when this has returned.
    pub(super) fn hand_over(
        &self,
        state: State,
        descriptors: &Descriptors,
    ) -> Result<(), ApiError> {
        let message = Message::State(Box::new(state));
        self.0.send(&message, descriptors, STEP).map_err(failed)?;
        match self.next(STEP)? {
            Message::Taken => {}
            _ => return Err(failed(TalkError::Order)),
        }
        let none = Descriptors::default();
        self.0.send(&Message::Go, &none, STEP).map_err(failed)
    }

    /// The pause in microseconds, as the other program measured it.
    pub(super) fn pause(&self) -> Option<u64> {
        match self.next(STEP) {
            Ok(Message::Done(pause)) => Some(pause),
            _ => None,
        }
    }

    fn next(&self, patience: Duration) -> Result<Message, ApiError> {
        match self.0.receive(patience).map_err(failed)?.0 {
            Message::Refused(why) => Err(failed(TalkError::Refused(why))),
            message => Ok(message),
        }
    }
}

fn failed(error: TalkError) -> ApiError {
    ApiError::new(ErrorCode::Failed, &error)
}

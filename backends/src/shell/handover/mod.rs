//! Upgrade in place: a program takes the place of one that runs, and its guest notices no more than a short pause.
//!
//! The new program is started with the same options and `--take-over`. It connects to the control socket of the old one:
//!
//! ```text
//!  new                                                             old
//!  {"command":"hand-over", …} ───────────────────────────────────▶ goes on serving
//!  opens the device with what it gets,         ◀──────────── Offer: what all ports have in common; Port, for each of
//!  starts its threads, confines itself                       them: sockets, what the device is made of, what it offers
//!  Ready ────────────────────────────────────────────────────────▶ stops its rings: what is in flight ends      ┐
//!  puts features, memory, rings in place       ◀──────────── State; PortState, for each port: the connection,    │
//!                                                            and all that was said on it                          │ the pause
//!  Taken ────────────────────────────────────────────────────────▶                                              │
//!  starts the rings                            ◀──────────── Go: nothing of it is the old program's any more     ┘
//!  Done: how long the pause was ─────────────────────────────────▶ ends, and leaves the sockets' files
//! ```
//!
//! A program that serves one device has one port. In one with several, what they have in common stops before the first of them,
//! and goes on after the last: nothing passes between ports of which some are stopped.
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
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::time::Duration;

use nix::time::{ClockId, clock_gettime};
use ringside_control::{ApiError, ErrorCode};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tracing::info;

pub(super) use taking::Predecessor;
pub use taking::TakeOverError;
pub(crate) use taking::same;
pub(super) use talk::Descriptors;
pub use talk::TalkError;
use talk::{Talk, VERSION};

use super::ports::PortOptions;

/// How long a program may take to open its device and to start its threads.
pub(super) const PREPARE: Duration = Duration::from_secs(60);
/// How long requests in flight may take to end. The old program goes on if they take longer.
pub(super) const DRAIN: Duration = Duration::from_secs(60);
/// How long each of the other steps may take.
pub(super) const STEP: Duration = Duration::from_secs(10);

/// Arguments of the request by which another program comes.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
#[serde(deny_unknown_fields)]
pub(super) struct HandOver {
    /// By which version it speaks.
    version: u32,
}

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

/// What a program serves.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Serves {
    /// One device.
    OneDevice,
    /// Ports, that come and go.
    Ports,
}

/// What something is made of. Descriptors are numbers.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Piece {
    pub(super) description: Value,
    pub(super) parts: Vec<u32>,
}

impl Piece {
    pub(super) fn new(parts: Parts, descriptors: &mut Descriptors) -> Self {
        let add = |part| descriptors.add(part);
        Self {
            description: parts.description,
            parts: parts.descriptors.into_iter().map(add).collect(),
        }
    }
}

/// What the new program begins with, besides its ports.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Offer {
    /// Kind of device, as in QEMU's `vhost-user.json`.
    pub(super) kind: String,
    pub(super) serves: Serves,
    pub(super) pid: u32,
    pub(super) control: u32,
    /// What all ports have in common.
    pub(super) common: Piece,
    /// How many there are.
    pub(super) ports: usize,
}

/// A port.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct PortOffer {
    /// What it is made from, if there can be several.
    pub(super) options: PortOptions,
    pub(super) features: u64,
    pub(super) protocol_features: u64,
    pub(super) queues: u16,
    pub(super) max_queue_size: u16,
    pub(super) meeting: Meeting,
    /// Number of the descriptor, if front-ends connect.
    pub(super) listener: Option<u32>,
    pub(super) device: Piece,
}

/// What the new program goes on from, besides its ports.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct State {
    /// When the rings were about to be stopped, in nanoseconds of CLOCK_MONOTONIC.
    pub(super) stopped: u64,
    /// Of what all ports have in common.
    pub(super) common: Value,
}

/// What a port goes on from.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct PortState {
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
    Port(Box<PortOffer>),
    Ready,
    State(Box<State>),
    PortState(Box<PortState>),
    Taken,
    Go,
    /// The pause in microseconds.
    Done(u64),
    /// The new program cannot go on.
    Refused(String),
}

/// Nanoseconds of CLOCK_MONOTONIC, which all processes share.
pub(crate) fn now() -> u64 {
    let time = clock_gettime(ClockId::CLOCK_MONOTONIC).map(std::time::Duration::from);
    let nanoseconds = time.map_or(0, |time| time.as_nanos());
    u64::try_from(nanoseconds).unwrap_or(u64::MAX)
}

/// What a program needs to have another one in its place.
#[derive(Debug)]
pub(super) struct Place {
    /// Of device.
    pub(super) kind: &'static str,
    pub(super) serves: Serves,
    /// The control socket.
    pub(super) control: UnixListener,
}

/// Something that goes with its descriptors.
pub(super) type With<T> = (T, Descriptors);

impl Place {
    /// Has the program at the other end of `client` take the place of this one. `ports` says what there is, `freeze` stops it;
    /// after `leave` nothing of it is this program's any more. Without that it goes on when what `freeze` returned is dropped.
    pub(super) fn hand_over<F>(
        &self,
        HandOver { version }: HandOver,
        client: &UnixStream,
        ports: impl FnOnce() -> Result<(Parts, Vec<With<PortOffer>>), ApiError>,
        freeze: impl FnOnce() -> Result<(Value, Vec<With<PortState>>, F), ApiError>,
        leave: impl FnOnce(F),
    ) -> Result<Value, ApiError> {
        if version != VERSION {
            let message =
                format!("this program hands over by version {VERSION}, and not {version}");
            return Err(ApiError::of(ErrorCode::Conflict, message));
        }
        let handing = Handing(Talk(client));
        let (common, ports) = ports()?;
        let mut descriptors = Descriptors::default();
        let control = self.control.try_clone();
        let offer = Offer {
            kind: self.kind.to_owned(),
            serves: self.serves,
            pid: std::process::id(),
            control: descriptors.add(control.map_err(|e| ApiError::new(ErrorCode::Failed, &e))?),
            common: Piece::new(common, &mut descriptors),
            ports: ports.len(),
        };
        handing.send(Message::Offer(Box::new(offer)), &descriptors)?;
        for (port, descriptors) in ports {
            handing.send(Message::Port(Box::new(port)), &descriptors)?;
        }
        drop(descriptors);
        handing.expect(PREPARE, |message| matches!(message, Message::Ready))?;
        let stopped = now();
        let (common, ports, frozen) = freeze()?;
        let state = State { stopped, common };
        let none = Descriptors::default();
        handing.send(Message::State(Box::new(state)), &none)?;
        for (port, descriptors) in ports {
            handing.send(Message::PortState(Box::new(port)), &descriptors)?;
        }
        handing.expect(STEP, |message| matches!(message, Message::Taken))?;
        handing.send(Message::Go, &none)?;
        leave(frozen);
        let pause = match handing.next(STEP) {
            Ok(Message::Done(pause)) => Some(pause),
            _ => None,
        };
        match pause {
            Some(pause) => info!("another process has taken over; the guest waited {pause} µs"),
            None => info!("another process has taken over"),
        }
        Ok(json!({ "pause-us": pause }))
    }
}

/// The old program's side of the conversation.
struct Handing<'s>(Talk<'s>);

impl Handing<'_> {
    fn send(&self, message: Message, descriptors: &Descriptors) -> Result<(), ApiError> {
        self.0.send(&message, descriptors, STEP).map_err(failed)
    }

    fn next(&self, patience: Duration) -> Result<Message, ApiError> {
        match self.0.receive(patience).map_err(failed)?.0 {
            Message::Refused(why) => Err(failed(TalkError::Refused(why))),
            message => Ok(message),
        }
    }

    fn expect(
        &self,
        patience: Duration,
        is_due: impl FnOnce(&Message) -> bool,
    ) -> Result<(), ApiError> {
        let message = self.next(patience)?;
        is_due(&message)
            .then_some(())
            .ok_or_else(|| failed(TalkError::Order))
    }
}

fn failed(error: TalkError) -> ApiError {
    ApiError::new(ErrorCode::Failed, &error)
}

//! What can be asked of a back-end that runs, on its control socket (`--control-socket`).
//!
//! Clients have threads of their own. Counters they read themselves; for everything else the control thread is asked, which
//! alone knows the device. It answers at once, or says what the client's thread is to wait for.
//!
//! ```text
//!  client's thread            control thread                worker threads
//!  drain ────────────────────▶ Command::Pause ─────────────▶ no new chains
//!        ◀── Reply::Drain ─────┘ (goes on)                   … what is in flight ends
//!        ◀─────────────────────────────────────────────────── done
//!  has it made durable, by a thread of its own
//! ```

use std::collections::BTreeMap;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::thread;
use std::time::{Duration, Instant};

use mio::{Registry, Token, Waker};
use ringside_control::metrics::Kind;
use ringside_control::{ApiError, Chain, ErrorCode, Metrics, Service, Size};
use serde::Deserialize;
use serde_json::{Map, Value, json};
use tracing::warn;

use super::device::Drained;
use super::handover::{DRAIN, HandOver, Parts, Place, PortOffer, PortState, With};
use super::options::Program;

/// How long a drain may take unless the client says otherwise.
const DRAIN_TIMEOUT: u32 = 30;

/// What can be asked for.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
#[serde(
    tag = "command",
    content = "arguments",
    rename_all = "kebab-case",
    deny_unknown_fields
)]
pub(super) enum Request {
    /// What the device is and does.
    Status,
    /// What was counted.
    Stats,
    /// The same as a page of metrics.
    Metrics,
    /// Ends the program in order.
    Quit,
    /// Gives the disk another size, or looks at its size again.
    Resize(Option<Resize>),
    /// Changes limits of rates, by name, and shows them all.
    Limits(Option<BTreeMap<String, Size>>),
    /// Takes no more requests, and waits until those taken have ended and are durable.
    Drain(Option<Drain>),
    /// Takes requests again.
    Resume,
    /// Has the guest make itself known to the network.
    Announce,
    /// Plugs the network's cable in, or pulls it out.
    Link(Link),
    /// Lets another program take the place of this one, which speaks to it on this connection (`handover`).
    HandOver(HandOver),
}

/// Arguments of [`Request::Link`].
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
#[serde(deny_unknown_fields)]
pub(super) struct Link {
    /// What it is to be.
    pub(super) state: LinkState,
}

/// State of a link, as `ip link` writes it.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "kebab-case")]
pub(super) enum LinkState {
    /// Frames pass.
    Up,
    /// None does.
    Down,
}

/// Arguments of [`Request::Resize`].
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq)]
#[serde(deny_unknown_fields)]
pub(super) struct Resize {
    /// What it is to be, or else what it is already is told to the driver.
    pub(super) size: Option<Size>,
    /// It may become smaller.
    #[serde(default)]
    pub(super) shrink: bool,
}

/// Arguments of [`Request::Drain`].
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
#[serde(deny_unknown_fields)]
pub(super) struct Drain {
    /// In seconds.
    timeout: u32,
}

/// What a device counts: read by any thread at any time, whatever the control thread is at.
pub trait Statistics: Send + Sync {
    /// All of it, as an object.
    fn stats(&self) -> Map<String, Value>;

    /// All of it, as metrics whose names begin with `ringside_` and the device's kind.
    fn metrics(&self, page: &mut Metrics);
}

/// What the control thread answers.
pub(super) enum Reply {
    /// It is done.
    Done(Value),
    /// So many workers tell when nothing is in flight any more; then the rest is to be done.
    Drain {
        idle: Receiver<()>,
        workers: usize,
        then: Drained,
        /// The device was paused before, and stays so if this fails.
        stays: bool,
    },
}

/// Where an answer goes.
type Answer<T> = Sender<Result<T, ApiError>>;

/// What is asked of the control thread.
#[derive(Debug)]
pub(super) enum Asked {
    /// What a client asks for.
    Request {
        request: Request,
        answer: Answer<Reply>,
    },
    /// What a program begins with that is to take the place of this one.
    Offer(Answer<With<PortOffer>>),
    /// What it goes on from. Its rings are stopped until it is told that they are another program's, or not.
    HandOver {
        answer: Answer<With<PortState>>,
        taken: Receiver<()>,
    },
}

/// Rings that are stopped: they run again when this is dropped, unless they are another program's then.
pub(super) struct Frozen(Sender<()>);

impl Frozen {
    /// All of it is another program's.
    pub(super) fn leave(self) {
        // The control thread waits for this.
        let _ = self.0.send(());
    }
}

/// The clients' side.
pub(super) struct Clients {
    program: Program,
    statistics: Arc<dyn Statistics>,
    connected: Arc<AtomicBool>,
    requests: Sender<Asked>,
    waker: Waker,
    /// What another program needs to be where this one is, if it can be.
    place: Option<Place>,
    /// A client waits for the end of a drain.
    draining: AtomicBool,
    /// A client is about to take the place of this program.
    handing_over: AtomicBool,
}

/// The control thread's side: what the clients have asked for.
#[derive(Debug)]
pub(super) struct Requests(Receiver<Asked>);

/// Both sides. `token` comes up in `registry`'s poll when there is something for the control thread.
pub(super) fn channel(
    program: &Program,
    statistics: Arc<dyn Statistics>,
    connected: Arc<AtomicBool>,
    place: Option<Place>,
    registry: &Registry,
    token: Token,
) -> std::io::Result<(Clients, Requests)> {
    let (requests, receiver) = mpsc::channel();
    let clients = Clients {
        program: *program,
        statistics,
        connected,
        requests,
        waker: Waker::new(registry, token)?,
        place,
        draining: AtomicBool::new(false),
        handing_over: AtomicBool::new(false),
    };
    Ok((clients, Requests(receiver)))
}

impl Requests {
    /// The next one, if one waits. The client's thread waits for the answer.
    pub(super) fn next(&self) -> Option<Asked> {
        self.0.try_recv().ok()
    }
}

/// The only one at something.
struct One<'f>(&'f AtomicBool);

impl<'f> One<'f> {
    /// `None`: somebody is at it.
    fn begin(flag: &'f AtomicBool) -> Option<Self> {
        (!flag.swap(true, Ordering::Acquire)).then(|| Self(flag))
    }
}

impl Drop for One<'_> {
    fn drop(&mut self) {
        self.0.store(false, Ordering::Release);
    }
}

impl Clients {
    /// Has the control thread answer.
    pub(super) fn ask(&self, request: Request) -> Result<Reply, ApiError> {
        self.put(|answer| Asked::Request { request, answer })
    }

    fn put<T>(&self, asked: impl FnOnce(Answer<T>) -> Asked) -> Result<T, ApiError> {
        self.send(asked)?.recv().map_err(|_| self.ending())?
    }

    /// The same, if the answer is there in time. Who is later finds nobody to give it to, and takes back what it has done.
    fn put_until<T>(
        &self,
        end: Instant,
        asked: impl FnOnce(Answer<T>) -> Asked,
    ) -> Result<T, ApiError> {
        let left = end.saturating_duration_since(Instant::now());
        match self.send(asked)?.recv_timeout(left) {
            Ok(answer) => answer,
            Err(RecvTimeoutError::Disconnected) => Err(self.ending()),
            Err(RecvTimeoutError::Timeout) => {
                let message = "a front-end holds its device up: try again, or have it disconnected";
                Err(ApiError::of(ErrorCode::Busy, message))
            }
        }
    }

    fn ending(&self) -> ApiError {
        let message = format!("{} is ending", self.program.name);
        ApiError::of(ErrorCode::Busy, message)
    }

    fn send<T>(
        &self,
        asked: impl FnOnce(Answer<T>) -> Asked,
    ) -> Result<Receiver<Result<T, ApiError>>, ApiError> {
        let (answer, answered) = mpsc::channel();
        let sent = self.requests.send(asked(answer));
        sent.map_err(|_| self.ending())?;
        self.waker
            .wake()
            .map_err(|e| ApiError::new(ErrorCode::Failed, &e))?;
        Ok(answered)
    }

    /// What there is for another program.
    pub(super) fn offer(&self, end: Instant) -> Result<With<PortOffer>, ApiError> {
        self.put_until(end, Asked::Offer)
    }

    /// Stops the rings, and says what another program goes on from.
    pub(super) fn freeze(&self, end: Instant) -> Result<(With<PortState>, Frozen), ApiError> {
        let (tell, taken) = mpsc::channel();
        let state = self.put_until(end, |answer| Asked::HandOver { answer, taken })?;
        Ok((state, Frozen(tell)))
    }

    /// Has the program at the other end of `client` take the place of this one.
    fn hand_over(&self, arguments: HandOver, client: &UnixStream) -> Result<Value, ApiError> {
        let Some(_one) = One::begin(&self.handing_over) else {
            let message = "another program is about to take the place of this one";
            return Err(ApiError::of(ErrorCode::Conflict, message));
        };
        let Some(place) = &self.place else {
            let message =
                "this program was given its socket by number (--fd), and cannot pass it on";
            return Err(ApiError::of(ErrorCode::Conflict, message));
        };
        let end = || Instant::now() + DRAIN;
        place.hand_over(
            arguments,
            client,
            || Ok((Parts::default(), vec![self.offer(end())?])),
            || {
                let (state, frozen) = self.freeze(end())?;
                Ok((Value::Null, vec![state], frozen))
            },
            Frozen::leave,
        )
    }

    fn drain(&self, request: Request, timeout: Duration) -> Result<Value, ApiError> {
        let start = Instant::now();
        let left = || timeout.saturating_sub(start.elapsed());
        let Some(_one) = One::begin(&self.draining) else {
            let message =
                "another client drains the device; wait for it, or end that with `resume`";
            return Err(ApiError::of(ErrorCode::Conflict, message));
        };
        let (idle, workers, then, stays) = match self.ask(request)? {
            Reply::Done(value) => return Ok(value),
            Reply::Drain {
                idle,
                workers,
                then,
                stays,
            } => (idle, workers, then, stays),
        };
        let late = |what: &str| {
            let state = if stays {
                "stays paused, as it was"
            } else {
                if let Err(error) = self.ask(Request::Resume) {
                    return error;
                }
                "goes on"
            };
            let message = format!(
                "{what} after {} s; the device {state}: look at its storage, or allow more time",
                timeout.as_secs()
            );
            ApiError::of(ErrorCode::Busy, message)
        };
        for _ in 0..workers {
            match idle.recv_timeout(left()) {
                Ok(()) => {}
                Err(RecvTimeoutError::Disconnected) => {
                    let message = "the device was resumed, or ends, before it was drained";
                    return Err(ApiError::of(ErrorCode::Conflict, message));
                }
                Err(RecvTimeoutError::Timeout) => {
                    return Err(late("requests are still in flight"));
                }
            }
        }
        // Storage that does not answer keeps a thread of its own waiting, and not the client.
        let (done, durable) = mpsc::channel();
        thread::Builder::new()
            .name("drain".to_owned())
            .spawn(move || {
                // Nobody is there to be told when the time is over.
                let _ = done.send(then());
            })
            .map_err(|e| ApiError::new(ErrorCode::Failed, &e))?;
        match durable.recv_timeout(left()) {
            Ok(Ok(())) => Ok(json!({ "drained": true })),
            Ok(Err(source)) => {
                let message = format!(
                    "the device is drained, but not durable: {}; `resume` lets it go on",
                    Chain(&source)
                );
                Err(ApiError::of(ErrorCode::Failed, message))
            }
            Err(_) => Err(late("what was written is not durable yet")),
        }
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
        page.single(
            (
                "ringside_front_end_connected",
                Kind::Gauge,
                "Whether a front-end is connected.",
            ),
            &[],
            u8::from(self.connected.load(Ordering::Relaxed)),
        );
        self.statistics.metrics(&mut page);
        page.into_text()
    }
}

/// What a program is answered that wants to take the place of this one.
pub(super) fn answered(
    handed: Result<Value, ApiError>,
    client: &UnixStream,
) -> Result<Value, ApiError> {
    // What comes next is a request, whenever it comes.
    let _ = client.set_read_timeout(None);
    if let Err(error) = &handed {
        warn!("no other program takes over: {}", error.message);
    }
    handed
}

impl Service for Clients {
    type Command = Request;

    fn call(&self, request: Request) -> Result<Value, ApiError> {
        match request {
            Request::Stats => Ok(Value::Object(self.statistics.stats())),
            Request::Metrics => Ok(self.page().into()),
            Request::Drain(arguments) => {
                let timeout = arguments.map_or(DRAIN_TIMEOUT, |a| a.timeout);
                self.drain(request, Duration::from_secs(timeout.into()))
            }
            request => match self.ask(request)? {
                Reply::Done(value) => Ok(value),
                Reply::Drain { .. } => Ok(Value::Null),
            },
        }
    }

    fn call_with(&self, request: Request, client: &UnixStream) -> Result<Value, ApiError> {
        let Request::HandOver(arguments) = request else {
            return self.call(request);
        };
        answered(self.hand_over(arguments, client), client)
    }

    fn metrics(&self) -> Option<String> {
        Some(self.page())
    }
}

/// The names of a set of feature bits: those of the device first asked, then those of rings and transport (VIRTIO 1.3, 6);
/// the others by number.
pub(super) fn feature_names(
    features: u64,
    of_device: impl Fn(u32) -> Option<&'static str>,
) -> Vec<String> {
    let common = |bit| {
        Some(match bit {
            24 => "NOTIFY_ON_EMPTY",
            26 => "LOG_ALL",
            27 => "ANY_LAYOUT",
            28 => "INDIRECT_DESC",
            29 => "EVENT_IDX",
            30 => "PROTOCOL_FEATURES",
            32 => "VERSION_1",
            33 => "ACCESS_PLATFORM",
            34 => "RING_PACKED",
            35 => "IN_ORDER",
            36 => "ORDER_PLATFORM",
            37 => "SR_IOV",
            38 => "NOTIFICATION_DATA",
            40 => "RING_RESET",
            _ => return None,
        })
    };
    (0..u64::BITS)
        .filter(|bit| features & (1 << bit) != 0)
        .map(|bit| {
            of_device(bit)
                .or_else(|| common(bit))
                .map_or_else(|| bit.to_string(), str::to_owned)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(text: &str) -> Result<Request, String> {
        serde_json::from_str(text).map_err(|e| e.to_string())
    }

    #[test]
    fn arguments_may_be_left_out() {
        assert_eq!(request(r#"{"command":"status"}"#), Ok(Request::Status));
        assert_eq!(
            request(r#"{"command":"resize"}"#),
            Ok(Request::Resize(None))
        );
        assert_eq!(request(r#"{"command":"drain"}"#), Ok(Request::Drain(None)));
        assert_eq!(
            request(r#"{"command":"limits"}"#),
            Ok(Request::Limits(None))
        );
        assert_eq!(
            request(r#"{"command":"resize","arguments":{"size":"1K"}}"#),
            Ok(Request::Resize(Some(Resize {
                size: Some(Size(1024)),
                shrink: false
            })))
        );
        assert_eq!(
            request(r#"{"command":"link","arguments":{"state":"down"}}"#),
            Ok(Request::Link(Link {
                state: LinkState::Down
            }))
        );
        for (wrong, why) in [
            (
                r#"{"command":"link","arguments":{"state":"sideways"}}"#,
                "unknown variant `sideways`",
            ),
            (r#"{"command":"fly"}"#, "unknown variant `fly`"),
            (
                r#"{"command":"resize","arguments":{"sise":1}}"#,
                "unknown field `sise`",
            ),
            (
                r#"{"command":"limits","arguments":{"iops":"many"}}"#,
                "`many` is not a size",
            ),
        ] {
            let error = request(wrong).unwrap_err();
            assert!(error.contains(why), "{error}");
        }
    }

    #[test]
    fn features_have_names_or_numbers() {
        let names = feature_names(1 << 5 | 1 << 29 | 1 << 32 | 1 << 60, |bit| {
            (bit == 5).then_some("RO")
        });
        assert_eq!(names, ["RO", "EVENT_IDX", "VERSION_1", "60"]);
    }
}

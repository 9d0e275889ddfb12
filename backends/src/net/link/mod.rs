//! What stands behind a card: where the packets of a queue pair go to and come from.
//!
//! ```text
//!  PairWorker ── send: frame in guest memory, header in front ────▶ Link ──▶ a TAP, a socket, nothing …
//!             ◀─ receive: into guest buffers, the rest to a spill ─       ◀──
//!             ◀─ ready: a descriptor of the link stirred ───────── epoll set of the worker
//! ```
//!
//! Each frame that a link takes or gives has a virtio-net header in front of it (VIRTIO 1.3, 5.1.6). A link that does not
//! know the header takes it off and puts an empty one there; it has no offloads then, and the device offers none.
//!
//! | Module | Its matter |
//! | --- | --- |
//! | `spec` | the option --link, and how a link is opened |
//! | `tap` | TAP and macvtap interfaces |
//! | `packet` | packet sockets on an interface |
//! | `xdp` | AF_XDP sockets on an interface |
//! | `passt`, `starter` | user-mode networking, and who starts it |
//! | `pcap` | a capture file behind any link |
//! | `idle` | links for measurements: nothing, and a source |

mod batch;
mod idle;
mod packet;
mod passt;
mod pcap;
mod spec;
mod starter;
mod tap;
mod xdp;

use std::fmt::Debug;
use std::io;
use std::os::fd::OwnedFd;
use std::slice::ChunksExactMut;
use std::thread;
use std::time::Duration;

use epoll::Events;
use ringside_sandbox::Profile;
use serde_json::Value;
use thiserror::Error;

pub(super) use idle::{Generate, Null};
pub use packet::PacketError;
pub use passt::{Forward, ForwardError, PasstError};
pub(super) use pcap::{MAX_SNAP, Recorder};
pub use pcap::{PcapError, finish_captures};
pub(super) use spec::{Described, HostEnd, LinkOptions, Opened};
pub use spec::{LinkSpec, LinkSpecError};
pub use starter::serve as start_passt;
pub(super) use tap::MAX_QUEUES;
pub use tap::{Tap, TapError, TapQueue};
pub use xdp::XdpError;

use super::epoll_set::Watcher;
use super::iov::IoList;
use super::steering::Rss;

/// The longest header (VIRTIO 1.3, 5.1.6).
const MAX_HEADER: usize = 20;

/// How long to wait between attempts at what is busy.
const PAUSE: Duration = Duration::from_millis(20);
/// How often an interface that is busy is tried: half a second in all, as one of somebody else's is no rarity.
const ATTEMPTS: u32 = 26;

/// Tries something so often at most, as long as `busy` says so of its failure: what a program had that has ended a moment ago, the
/// kernel gives back in the background.
fn patiently<T, E>(
    attempts: u32,
    busy: impl Fn(&E) -> bool,
    mut attempt: impl FnMut() -> Result<T, E>,
) -> Result<T, E> {
    let mut more = 1..attempts;
    loop {
        match attempt() {
            Err(error) if busy(&error) && more.next().is_some() => thread::sleep(PAUSE),
            done => return done,
        }
    }
}

/// A link cannot be had, or not changed.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum LinkError {
    /// The TAP cannot be used.
    #[error(transparent)]
    Tap(#[from] TapError),
    /// The packet socket cannot be had.
    #[error(transparent)]
    Packet(#[from] PacketError),
    /// The AF_XDP socket cannot be had.
    #[error(transparent)]
    Xdp(#[from] XdpError),
    /// There is no passt.
    #[error(transparent)]
    Passt(#[from] PasstError),
    /// The capture file cannot be had.
    #[error(transparent)]
    Pcap(#[from] PcapError),
    /// Packets go to any queue.
    #[error(
        "the link does not let packets be steered to queues: a TAP interface with several does"
    )]
    NoSteering,
    /// The link has no queues to share.
    #[error("a link of kind {kind} serves one queue pair: leave --queue-pairs away")]
    OneQueue {
        /// Its kind.
        kind: &'static str,
    },
}

impl LinkError {
    /// Whether the command line itself is wrong, whatever the system.
    pub(super) fn is_usage(&self) -> bool {
        match self {
            Self::Tap(error) => matches!(error, TapError::Name { .. }),
            Self::OneQueue { .. } => true,
            Self::Packet(_) | Self::Xdp(_) | Self::Passt(_) | Self::Pcap(_) | Self::NoSteering => {
                false
            }
        }
    }
}

/// What may be worth a try after something happened to a descriptor of a link.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Ready {
    /// There may be a frame to receive.
    pub(super) readable: bool,
    /// There may be room for a frame to send.
    pub(super) writable: bool,
}

impl From<Events> for Ready {
    fn from(events: Events) -> Self {
        Self {
            readable: events.contains(Events::EPOLLIN),
            writable: events.contains(Events::EPOLLOUT),
        }
    }
}

/// One queue of what stands behind a card; it belongs to one thread. No call waits.
pub(super) trait Link: Send {
    /// Tells it where its descriptors are waited for, edge-triggered. Called once, before all others.
    ///
    /// # Errors
    /// What the system said.
    fn watch(&mut self, watcher: Watcher) -> io::Result<()>;

    /// Something happened to one of its descriptors.
    fn ready(&mut self, events: Events) -> Ready {
        Ready::from(events)
    }

    /// Takes one frame, its header of `header_len` bytes in front. The list is as before afterwards.
    ///
    /// # Errors
    /// `WouldBlock` if it is full: the frame can be offered again when [`ready`](Self::ready) says so. All others: the frame is lost.
    fn send(&mut self, frame: &mut IoList, header_len: usize) -> io::Result<()>;

    /// How many frames [`send_all`](Self::send_all) takes at most.
    fn at_once(&self) -> u16 {
        1
    }

    /// Takes frames in order, the first of `pieces[0]` pieces of the list, and so on, and appends to `results` what came of each,
    /// as [`send`](Self::send) does. One that was not taken may stand between others that were.
    fn send_all(
        &mut self,
        frames: &mut IoList,
        pieces: &[usize],
        header_len: usize,
        results: &mut Vec<io::Result<()>>,
    ) {
        debug_assert_eq!(pieces.len(), 1, "links that take one at a time");
        results.push(self.send(frames, header_len));
    }

    /// No frame is sent for a while: what was held back for company goes out.
    fn flush(&mut self) {}

    /// Gives one frame, a header of `header_len` bytes in front: into the first `pieces` pieces of the list, and what does
    /// not fit there into `spill`. Returns the length of both together.
    ///
    /// # Errors
    /// `WouldBlock` if there is none.
    fn receive(
        &mut self,
        list: &mut IoList,
        pieces: usize,
        header_len: usize,
        spill: &mut [u8],
    ) -> io::Result<usize>;

    /// How many frames [`receive_all`](Self::receive_all) gives at most; 1: it gives none.
    fn gives_at_once(&self) -> u16 {
        1
    }

    /// Gives frames in order, the first into the first `pieces[0]` pieces of the list, the next one into those behind, and so on,
    /// and what does not fit there into the spill of the same number; appends to `results` what came of each, as
    /// [`receive`](Self::receive) does, of the first ones only if their pieces are too many. There may be none between others
    /// that are there.
    fn receive_all(
        &mut self,
        list: &mut IoList,
        pieces: &[usize],
        spills: ChunksExactMut<'_, u8>,
        results: &mut Vec<io::Result<usize>>,
    ) {
        let _ = (list, pieces, spills, results);
    }

    /// It delivers frames.
    fn attached(&self) -> bool {
        true
    }

    /// Lets it deliver frames, or not, if it is one of several queues that can be told.
    ///
    /// # Errors
    /// What the system said.
    fn set_attached(&mut self, attached: bool) -> io::Result<()> {
        let _ = attached;
        Ok(())
    }

    /// Another program may go on with it: nothing is sent or received here, and what it has of frames is in its interface
    /// ([`Interface::left`]), until [`go_on`](Self::go_on).
    fn leave(&mut self) {}

    /// It is this program's, with what another one, or this one, has left.
    fn go_on(&mut self) {}

    /// What to do about an error of [`send`](Self::send), if that is known.
    fn advice(&self, error: &io::Error) -> Option<&'static str> {
        let _ = error;
        None
    }
}

impl<L: Link + ?Sized> Link for Box<L> {
    fn watch(&mut self, watcher: Watcher) -> io::Result<()> {
        (**self).watch(watcher)
    }

    fn ready(&mut self, events: Events) -> Ready {
        (**self).ready(events)
    }

    fn send(&mut self, frame: &mut IoList, header_len: usize) -> io::Result<()> {
        (**self).send(frame, header_len)
    }

    fn at_once(&self) -> u16 {
        (**self).at_once()
    }

    fn send_all(
        &mut self,
        frames: &mut IoList,
        pieces: &[usize],
        header_len: usize,
        results: &mut Vec<io::Result<()>>,
    ) {
        (**self).send_all(frames, pieces, header_len, results);
    }

    fn flush(&mut self) {
        (**self).flush();
    }

    fn receive(
        &mut self,
        list: &mut IoList,
        pieces: usize,
        header_len: usize,
        spill: &mut [u8],
    ) -> io::Result<usize> {
        (**self).receive(list, pieces, header_len, spill)
    }

    fn gives_at_once(&self) -> u16 {
        (**self).gives_at_once()
    }

    fn receive_all(
        &mut self,
        list: &mut IoList,
        pieces: &[usize],
        spills: ChunksExactMut<'_, u8>,
        results: &mut Vec<io::Result<usize>>,
    ) {
        (**self).receive_all(list, pieces, spills, results);
    }

    fn attached(&self) -> bool {
        (**self).attached()
    }

    fn set_attached(&mut self, attached: bool) -> io::Result<()> {
        (**self).set_attached(attached)
    }

    fn leave(&mut self) {
        (**self).leave();
    }

    fn go_on(&mut self) {
        (**self).go_on();
    }

    fn advice(&self, error: &io::Error) -> Option<&'static str> {
        (**self).advice(error)
    }
}

/// A queue of any link: those of which each instruction counts by their own type.
pub(super) enum AnyLink {
    /// A TAP queue.
    Tap(TapQueue),
    /// Nothing.
    Null(Null),
    /// A source.
    Generate(Generate),
    /// Anything else.
    Other(Box<dyn Link>),
}

impl AnyLink {
    /// As one type, for those who serve links of all kinds side by side.
    pub(super) fn boxed(self) -> Box<dyn Link> {
        match self {
            Self::Tap(queue) => Box::new(queue),
            Self::Null(null) => Box::new(null),
            Self::Generate(generate) => Box::new(generate),
            Self::Other(link) => link,
        }
    }
}

/// What a driver can change about a link, all queues of it.
pub(super) trait Interface: Debug + Send + Sync {
    /// Sets how many bytes precede each packet, unless the link hears it with each call.
    ///
    /// # Errors
    /// What the link said.
    fn set_header_len(&self, len: u8) -> Result<(), LinkError> {
        let _ = len;
        Ok(())
    }

    /// Says which packets the driver takes as they are: a set of `TUN_F_*`. A link without offloads has nothing to do.
    ///
    /// # Errors
    /// What the link said.
    fn set_offloads(&self, offloads: u32) -> Result<(), LinkError> {
        let _ = offloads;
        Ok(())
    }

    /// Makes ready to have packets go to the queues that a driver wants. Called once, before the queues have threads.
    ///
    /// # Errors
    /// What the link said.
    fn prepare_steering(&self) -> Result<(), LinkError> {
        Err(LinkError::NoSteering)
    }

    /// Says what it needs when the program is confined, besides sending and receiving.
    fn needs(&self, profile: &mut Profile) {
        let _ = profile;
    }

    /// Has packets go to the queues that a driver wants; without it, to any that are attached.
    ///
    /// # Errors
    /// What the link said; [`LinkError::NoSteering`] if it was not made ready.
    fn set_steering(&self, rss: Option<Rss>) -> Result<(), LinkError> {
        match rss {
            None => Ok(()),
            Some(_) => Err(LinkError::NoSteering),
        }
    }

    /// The descriptors by which another program has the same link, one for each queue, or none if it opens it anew. `None`: no
    /// other program can have it at the same time.
    ///
    /// # Errors
    /// What the system said.
    fn parts(&self) -> io::Result<Option<Vec<OwnedFd>>> {
        Ok(None)
    }

    /// The queues that are attached, as the kernel numbers them.
    fn order(&self) -> Vec<u16> {
        Vec::new()
    }

    /// They are attached, in this order, as another program has left them.
    ///
    /// # Errors
    /// What the link said.
    fn adopt_order(&self, order: Vec<u16>) -> Result<(), LinkError> {
        let _ = order;
        Ok(())
    }

    /// What its queues have of frames, once they were [left](Link::leave).
    fn left(&self) -> Value {
        Value::Null
    }

    /// The queues are to go on with what those of another program have left.
    ///
    /// # Errors
    /// It is none.
    fn adopt_left(&self, left: &Value) -> io::Result<()> {
        let _ = left;
        Ok(())
    }
}

/// A link that takes the driver's choice from each call.
#[derive(Debug)]
struct Fixed(LinkSpec);

impl Interface for Fixed {
    fn needs(&self, profile: &mut Profile) {
        self.0.needs(profile);
    }

    fn parts(&self) -> io::Result<Option<Vec<OwnedFd>>> {
        let own = matches!(self.0, LinkSpec::Null | LinkSpec::Generate(_));
        Ok(own.then(Vec::new))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_busy_is_tried_again_for_a_while_and_nothing_else_is() {
        let mut tries = 0;
        let mut attempt = |free_at: u32, error: &'static str| {
            tries = 0;
            patiently(
                4,
                |&error| error == "busy",
                || {
                    tries += 1;
                    if tries == free_at {
                        Ok(tries)
                    } else {
                        Err(error)
                    }
                },
            )
        };
        assert_eq!(attempt(1, "busy"), Ok(1));
        assert_eq!(attempt(4, "busy"), Ok(4));
        assert_eq!(attempt(5, "busy"), Err("busy"));
        assert_eq!(attempt(2, "forbidden"), Err("forbidden"));
    }
}

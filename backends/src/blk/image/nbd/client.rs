//! One connection: requests out, replies in, and again from the start when the server was gone.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Read, Write};
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, TryRecvError};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{Shutdown, shutdown};
use ringside_rings::{read_segments, write_segments};
use thiserror::Error;
use tracing::{debug, info, warn};

use super::connect;
use super::proto::{self, Export, Reply, chunk, command, errno};
use super::target::Target;
use super::vectored;
use crate::blk::image::ops::{Action, Op, Outcome, Wake};
use crate::blk::mailbox::Mailbox;
use crate::shell::{Chain as Causes, GuestSlice, LogLimit};

/// Size of the buffers for what is sent and received.
const BUFFER: usize = 128 << 10;
/// From this size on, data does not go through the buffers.
const DIRECT: u64 = 16 << 10;
/// Most bytes of a chunk that is not data: an error's number, message and offset ("Strings")…
const MAX_CONTENT: u32 = 4096 + 16;
/// …and how many of them are looked at.
const CONTENT: usize = 256;
/// Pauses between attempts to connect.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(2);

/// Why a connection is given up.
#[derive(Debug, Error)]
enum Broken {
    #[error("{0}")]
    Io(#[from] io::Error),
    #[error("the server closed the connection")]
    Closed,
    #[error("the server broke the protocol: {0}")]
    Protocol(&'static str),
    #[error("the server is about to end")]
    Ending,
    #[error("the server does not answer")]
    Silent,
    #[error("guest memory cannot be accessed")]
    Memory,
}

const NO_SENSE: Broken = Broken::Protocol("a chunk that makes no sense");
const NO_REQUEST: Broken = Broken::Protocol("a reply to no request");

/// An operation and how far it is.
#[derive(Debug)]
struct Flight {
    op: Op,
    /// Bytes that are done.
    done: u64,
    /// Length of the part that is under way: 0 for a flush.
    part: u32,
    /// What is under way is a flush.
    flushing: bool,
    /// Bytes of a read that have come.
    received: u64,
    /// The server's error number, 0 for none.
    error: u32,
    /// Tells the reply to the part that is with the server from that to another before; `None`: none is.
    generation: Option<u32>,
}

/// Data on its way.
#[derive(Debug)]
struct Payload {
    flight: u32,
    /// From this byte of the operation's data on…
    at: u64,
    /// …so many.
    left: u64,
}

/// What comes next from the server.
#[derive(Debug, Clone, Copy)]
enum Expect {
    Reply,
    /// `left` bytes for a read, from `at` in its operation's data.
    Data {
        flight: u32,
        at: u64,
        left: u64,
        done: bool,
    },
}

/// A connection to a server that gives the export.
#[derive(Debug)]
pub(super) struct Line {
    pub(super) socket: File,
    /// The same, for a program that takes the place of this one.
    pub(super) shared: Arc<Mutex<File>>,
    /// It is another program's until there is a request.
    pub(super) away: bool,
}

/// One end of a connection, on its thread.
#[derive(Debug)]
pub(super) struct Client {
    target: Target,
    export: Export,
    /// How long requests wait for a server that is gone.
    patience: Duration,
    ops: Receiver<Op>,
    wake: Arc<Wake>,
    /// How many connections there are.
    connections: Arc<AtomicUsize>,
    socket: File,
    /// The same, for a program that takes the place of this one.
    shared: Arc<Mutex<File>>,
    /// Another program has the connection: nothing is sent or received here until there is a request again.
    away: bool,
    /// There is a server at the other end.
    connected: bool,
    /// Whose requests are to be given back while they wait.
    suspending: Vec<Arc<Mailbox<Outcome>>>,
    /// Since when no request succeeded, if the connection was lost since.
    lost: Option<Instant>,
    /// Before the next attempt to connect.
    pause: Duration,
    flights: Vec<Option<Flight>>,
    free: Vec<u32>,
    /// Flights whose part is to be sent.
    queue: VecDeque<u32>,
    generation: u32,
    output: Vec<u8>,
    /// Bytes of `output` that are gone.
    written: usize,
    /// A write's data that goes out after `output`, straight from guest memory.
    payload: Option<Payload>,
    input: Box<[u8]>,
    /// What is in `input`, and not looked at.
    unread: Range<usize>,
    expect: Expect,
    /// Whom to wake when a batch is through.
    answered: Vec<Arc<Mailbox<Outcome>>>,
    /// Nobody will send any more.
    ending: bool,
    limit: LogLimit,
}

impl Client {
    pub(super) fn new(
        target: Target,
        export: Export,
        patience: Duration,
        line: Line,
        ops: Receiver<Op>,
        wake: Arc<Wake>,
        connections: Arc<AtomicUsize>,
    ) -> io::Result<Self> {
        let Line {
            socket,
            shared,
            away,
        } = line;
        set_nonblocking(&socket)?;
        Ok(Self {
            target,
            export,
            patience,
            ops,
            wake,
            connections,
            socket,
            shared,
            away,
            connected: true,
            suspending: Vec::new(),
            lost: None,
            pause: Duration::ZERO,
            flights: Vec::new(),
            free: Vec::new(),
            queue: VecDeque::new(),
            generation: 0,
            output: Vec::with_capacity(BUFFER),
            written: 0,
            payload: None,
            input: vec![0; BUFFER].into_boxed_slice(),
            unread: 0..0,
            expect: Expect::Reply,
            answered: Vec::new(),
            ending: false,
            limit: LogLimit::default(),
        })
    }

    /// Serves until nobody sends any more.
    pub(super) fn run(mut self) {
        while let Err(broken) = self.serve() {
            if let Some(held_back) = self.limit.check() {
                warn!(held_back, "NBD: lost {}: {broken}", self.target);
            }
            if !self.reconnect() {
                return;
            }
        }
        if self.away {
            return;
        }
        self.output.clear();
        proto::request(&mut self.output, (command::DISC, 0), 0, 0, 0);
        // A courtesy: closing the connection says the same.
        let _ = (&self.socket).write(&self.output);
    }

    /// Serves until all is done and nobody sends any more.
    fn serve(&mut self) -> Result<(), Broken> {
        loop {
            self.accept();
            let (sent, received) = match self.away {
                true => (false, false),
                false => (self.send()?, self.receive()?),
            };
            self.tell();
            if self.ending && self.in_flight() == 0 {
                return Ok(());
            }
            if !sent && !received {
                let waits = self.in_flight() > 0 && !self.patience.is_zero();
                let timeout = waits.then_some(self.patience);
                if !self.wait(!self.away, timeout)? {
                    return Err(Broken::Silent);
                }
            }
        }
    }

    fn in_flight(&self) -> usize {
        self.flights.len().saturating_sub(self.free.len())
    }

    /// Waits for the workers, and if it is there, for the server. Returns whether anything came.
    fn wait(&mut self, connected: bool, timeout: Option<Duration>) -> Result<bool, Broken> {
        self.wake.lie_down();
        let mut woken = false;
        let mut any = self.accept() || self.ending && self.in_flight() == 0;
        if !any {
            let mut interest = PollFlags::empty();
            if connected {
                interest |= PollFlags::POLLIN;
                if self.written < self.output.len() || self.payload.is_some() {
                    interest |= PollFlags::POLLOUT;
                }
            }
            let mut fds = [
                PollFd::new(self.wake.as_fd(), PollFlags::POLLIN),
                PollFd::new(self.socket.as_fd(), interest),
            ];
            // A socket that is given up reports its end even to those who do not ask.
            let fds = if connected {
                &mut fds[..]
            } else {
                fds.split_at_mut(1).0
            };
            let timeout = timeout.map_or(Ok(PollTimeout::NONE), PollTimeout::try_from);
            any = match poll(fds, timeout.unwrap_or(PollTimeout::MAX)) {
                Ok(count) => count > 0,
                Err(Errno::EINTR) => true,
                Err(e) => return Err(Broken::Io(e.into())),
            };
            woken = fds.first().and_then(PollFd::any).unwrap_or(false);
        }
        self.wake.get_up(woken);
        Ok(any)
    }

    /// Takes what the workers want. Returns whether there was anything.
    fn accept(&mut self) -> bool {
        let mut any = false;
        loop {
            match self.ops.try_recv() {
                Ok(op) => {
                    any = true;
                    match op.action {
                        Action::Suspend => {
                            self.suspending.push(op.mailbox);
                            self.give_back();
                            continue;
                        }
                        Action::Resume => {
                            self.suspending.retain(|who| !Arc::ptr_eq(who, &op.mailbox));
                            continue;
                        }
                        _ => {}
                    }
                    // The next part of a request that was being served.
                    if self.gives_back_to(&op.mailbox) {
                        self.post(op, Outcome::Suspended);
                        continue;
                    }
                    // After this, a request says that the connection is this program's.
                    self.away = match op.action {
                        Action::Leave => true,
                        Action::Adopt => self.away,
                        _ => false,
                    };
                    let nothing = match op.action {
                        Action::Flush => !self.export.flushes(),
                        Action::Discard => !self.export.trims(),
                        Action::Leave | Action::Adopt => true,
                        _ => false,
                    };
                    if nothing {
                        self.post(op, Outcome::Done);
                        continue;
                    }
                    let flight = Flight {
                        flushing: op.action == Action::Flush,
                        op,
                        done: 0,
                        part: 0,
                        received: 0,
                        error: 0,
                        generation: None,
                    };
                    let index = self.free.pop().unwrap_or_else(|| {
                        self.flights.push(None);
                        u32::try_from(self.flights.len().saturating_sub(1)).unwrap_or(u32::MAX)
                    });
                    if let Some(place) = place(&mut self.flights, index) {
                        *place = Some(flight);
                        self.queue.push_back(index);
                    }
                }
                Err(TryRecvError::Empty) => return any,
                Err(TryRecvError::Disconnected) => {
                    self.ending = true;
                    return any;
                }
            }
        }
    }

    fn post(&mut self, op: Op, outcome: Outcome) {
        self.answered.extend(op.post(outcome));
    }

    /// Wakes the workers that have something in their mailbox.
    fn tell(&mut self) {
        for mailbox in self.answered.drain(..) {
            mailbox.ring();
        }
    }

    /// Sends as much as the socket takes. Returns whether it took anything.
    fn send(&mut self) -> Result<bool, Broken> {
        let mut any = false;
        loop {
            while self.payload.is_none() && self.output.len() < BUFFER {
                let Some(index) = self.queue.pop_front() else {
                    break;
                };
                self.encode(index);
            }
            let head = self.output.get(self.written..).unwrap_or_default();
            let data = match &self.payload {
                Some(payload) => self
                    .flights
                    .get(usize::try_from(payload.flight).unwrap_or(usize::MAX))
                    .and_then(Option::as_ref)
                    .map(|flight| flight.op.slices(payload.at, payload.left))
                    .transpose()
                    .map_err(|_| Broken::Memory)?
                    .unwrap_or_default(),
                None => Vec::new(),
            };
            if head.is_empty() && data.is_empty() {
                return Ok(any);
            }
            match vectored::send(&self.socket, head, &data) {
                Ok(0) => return Err(Broken::Closed),
                Ok(count) => {
                    any = true;
                    drop(data);
                    self.sent(count);
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(any),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => {
                    drop(data);
                    let flight = self.payload.as_ref().map(|payload| payload.flight);
                    return Err(self.failed(e, flight));
                }
            }
        }
    }

    /// The connection failed while it moved the data of a request, if there is one. Memory that was taken away does not come
    /// back: such a request is not tried again.
    fn failed(&mut self, error: io::Error, flight: Option<u32>) -> Broken {
        match flight {
            Some(index) if error.raw_os_error() == Some(libc::EFAULT) => {
                self.payload = None;
                self.end(index, Outcome::Failed(libc::EFAULT));
                Broken::Memory
            }
            _ => error.into(),
        }
    }

    fn sent(&mut self, count: usize) {
        let head = self.output.len().saturating_sub(self.written).min(count);
        self.written = self.written.saturating_add(head);
        if self.written == self.output.len() {
            self.output.clear();
            self.written = 0;
        }
        let rest = u64::try_from(count.saturating_sub(head)).unwrap_or(u64::MAX);
        if let Some(payload) = &mut self.payload {
            payload.at = payload.at.saturating_add(rest);
            payload.left = payload.left.saturating_sub(rest);
            if payload.left == 0 {
                self.payload = None;
            }
        }
    }

    /// Puts the next part of an operation into `output`.
    fn encode(&mut self, index: u32) {
        self.generation = self.generation.wrapping_add(1);
        let Some(flight) = place(&mut self.flights, index).and_then(Option::as_mut) else {
            return;
        };
        let left = flight.op.len.saturating_sub(flight.done);
        let len = u32::try_from(left)
            .unwrap_or(u32::MAX)
            .min(self.export.max_block);
        flight.generation = Some(self.generation);
        (flight.received, flight.error) = (0, 0);
        let cookie = u64::from(self.generation) << 32 | u64::from(index);
        if flight.flushing {
            flight.part = 0;
            proto::request(&mut self.output, (command::FLUSH, 0), cookie, 0, 0);
            return;
        }
        flight.part = len;
        let fua = if flight.op.durable && self.export.fua() {
            command::FLAG_FUA
        } else {
            0
        };
        let kind = match flight.op.action {
            Action::Read => (command::READ, 0),
            Action::Write => (command::WRITE, fua),
            Action::Discard
            | Action::Flush
            | Action::Suspend
            | Action::Resume
            | Action::Leave
            | Action::Adopt => (command::TRIM, fua),
            Action::WriteZeroes { unmap: true } => (command::WRITE_ZEROES, fua),
            Action::WriteZeroes { unmap: false } => {
                (command::WRITE_ZEROES, fua | command::FLAG_NO_HOLE)
            }
        };
        let before = self.output.len();
        let offset = flight.op.offset.saturating_add(flight.done);
        proto::request(&mut self.output, kind, cookie, offset, len);
        if flight.op.action != Action::Write {
            return;
        }
        if u64::from(len) >= DIRECT {
            self.payload = Some(Payload {
                flight: index,
                at: flight.done,
                left: len.into(),
            });
            return;
        }
        let start = self.output.len();
        let end = start.saturating_add(usize::try_from(len).unwrap_or(0));
        self.output.resize(end, 0);
        let op = &flight.op;
        let at = op.skip.saturating_add(flight.done);
        let data = self.output.get_mut(start..).unwrap_or_default();
        if read_segments(op.memory.as_ref(), &op.segments, at, data).is_err() {
            self.output.truncate(before);
            self.end(index, Outcome::Failed(libc::EFAULT));
        }
    }

    /// Receives once, and takes in what came. Returns whether anything did.
    fn receive(&mut self) -> Result<bool, Broken> {
        let mut direct = None;
        let got = match self.expect {
            Expect::Data {
                flight, at, left, ..
            } if left >= DIRECT && self.unread.is_empty() => {
                direct = Some(flight);
                let flight = at_index(&self.flights, flight)?;
                let into = flight.op.slices(at, left).map_err(|_| Broken::Memory)?;
                vectored::receive(&self.socket, &into)
            }
            _ => {
                let unread = self.unread.clone();
                self.unread = 0..unread.len();
                self.input.copy_within(unread, 0);
                let room = self.input.get_mut(self.unread.end..).unwrap_or_default();
                (&self.socket).read(room)
            }
        };
        let count = match got {
            Ok(0) => return Err(Broken::Closed),
            Ok(count) => count,
            Err(e)
                if matches!(
                    e.kind(),
                    io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
                ) =>
            {
                return Ok(false);
            }
            Err(e) => return Err(self.failed(e, direct)),
        };
        if direct.is_some() {
            self.arrived(u64::try_from(count).unwrap_or(u64::MAX))?;
        } else {
            self.unread.end = self.unread.end.saturating_add(count);
        }
        while self.take_in()? {}
        Ok(true)
    }

    /// Takes in one thing that was received. Returns whether there was a whole one.
    fn take_in(&mut self) -> Result<bool, Broken> {
        let unread = self.unread.clone();
        match self.expect {
            Expect::Data {
                flight, at, left, ..
            } => {
                let room = usize::try_from(left).unwrap_or(usize::MAX);
                let end = unread.start.saturating_add(room).min(unread.end);
                let data = self.input.get(unread.start..end).unwrap_or_default();
                if data.is_empty() {
                    return Ok(false);
                }
                let op = &at_index(&self.flights, flight)?.op;
                write_segments(
                    op.memory.as_ref(),
                    &op.segments,
                    op.skip.saturating_add(at),
                    data,
                )
                .map_err(|_| Broken::Memory)?;
                self.unread.start = end;
                let count = end.saturating_sub(unread.start);
                self.arrived(u64::try_from(count).unwrap_or(u64::MAX))?;
                Ok(true)
            }
            Expect::Reply => {
                let bytes = self.input.get(unread).unwrap_or_default();
                let Some((reply, len)) = proto::parse_reply(bytes).map_err(Broken::Protocol)?
                else {
                    return Ok(false);
                };
                match reply {
                    Reply::Simple { error, cookie } => {
                        self.unread.start = self.unread.start.saturating_add(len);
                        self.simple(error, cookie)?;
                        Ok(true)
                    }
                    Reply::Chunk {
                        done,
                        kind,
                        cookie,
                        len: more,
                    } => {
                        // All but data is short, and taken in at once.
                        let rest = match kind {
                            chunk::OFFSET_DATA => 8,
                            _ if more <= MAX_CONTENT => more,
                            _ => return Err(NO_SENSE),
                        };
                        let end = len.saturating_add(usize::try_from(rest).unwrap_or(0));
                        let Some(from) = bytes.get(len..end) else {
                            return Ok(false);
                        };
                        let mut content = [0; CONTENT];
                        let content = match content.get_mut(..from.len().min(CONTENT)) {
                            Some(place) => {
                                place.copy_from_slice(from.get(..place.len()).unwrap_or_default());
                                &*place
                            }
                            None => &[],
                        };
                        self.unread.start = self.unread.start.saturating_add(end);
                        self.chunk(done, kind, cookie, more, content)?;
                        Ok(true)
                    }
                }
            }
        }
    }

    /// So many bytes of a read have come.
    fn arrived(&mut self, count: u64) -> Result<(), Broken> {
        let Expect::Data {
            flight: index,
            at,
            left,
            done,
        } = self.expect
        else {
            return Ok(());
        };
        let flight = self.flight(index)?;
        flight.received = flight.received.saturating_add(count);
        let left = left.saturating_sub(count);
        self.expect = Expect::Data {
            flight: index,
            at: at.saturating_add(count),
            left,
            done,
        };
        if left == 0 {
            self.expect = Expect::Reply;
            if done {
                self.finish(index)?;
            }
        }
        Ok(())
    }

    fn flight(&mut self, index: u32) -> Result<&mut Flight, Broken> {
        place(&mut self.flights, index)
            .and_then(Option::as_mut)
            .ok_or(NO_REQUEST)
    }

    /// The request that a reply is for, which must be with the server.
    fn by_cookie(&mut self, cookie: u64) -> Result<(u32, &mut Flight), Broken> {
        let index = u32::try_from(cookie & u64::from(u32::MAX)).map_err(|_| NO_REQUEST)?;
        let generation = u32::try_from(cookie >> 32).map_err(|_| NO_REQUEST)?;
        if self.payload.as_ref().is_some_and(|p| p.flight == index) {
            // Its rest would be taken from whatever comes next in its place.
            return Err(Broken::Protocol(
                "a reply to a write that was not sent to its end",
            ));
        }
        let flight = self.flight(index)?;
        if flight.generation != Some(generation) {
            return Err(NO_REQUEST);
        }
        Ok((index, flight))
    }

    fn simple(&mut self, error: u32, cookie: u64) -> Result<(), Broken> {
        let structured = self.export.structured;
        let (index, flight) = self.by_cookie(cookie)?;
        if error != 0 {
            flight.error = error;
        } else if flight.reads() {
            if structured {
                return Err(Broken::Protocol("a simple reply to a read"));
            }
            self.expect = Expect::Data {
                flight: index,
                at: flight.done,
                left: flight.part.into(),
                done: true,
            };
            return Ok(());
        }
        self.finish(index)
    }

    fn chunk(
        &mut self,
        done: bool,
        kind: u16,
        cookie: u64,
        len: u32,
        content: &[u8],
    ) -> Result<(), Broken> {
        if !self.export.structured {
            return Err(Broken::Protocol("a chunk that was not asked for"));
        }
        let (index, flight) = self.by_cookie(cookie)?;
        match (kind, content) {
            (chunk::NONE, []) if done => {}
            (chunk::OFFSET_DATA, [a, b, c, d, e, f, g, h]) if flight.reads() && len > 8 => {
                let offset = u64::from_be_bytes([*a, *b, *c, *d, *e, *f, *g, *h]);
                let left = u64::from(len).saturating_sub(8);
                let at = flight.position(offset, left)?;
                self.expect = Expect::Data {
                    flight: index,
                    at,
                    left,
                    done,
                };
                return Ok(());
            }
            (chunk::OFFSET_HOLE, [a, b, c, d, e, f, g, h, i, j, k, l])
                if flight.reads() && len == 12 =>
            {
                let offset = u64::from_be_bytes([*a, *b, *c, *d, *e, *f, *g, *h]);
                let size = u64::from(u32::from_be_bytes([*i, *j, *k, *l]));
                let at = flight.position(offset, size)?;
                for slice in flight.op.slices(at, size).map_err(|_| Broken::Memory)? {
                    zero(&slice);
                }
                flight.received = flight.received.saturating_add(size);
            }
            (chunk::ERROR | chunk::ERROR_OFFSET, [a, b, c, d, _, _, text @ ..]) => {
                let error = u32::from_be_bytes([*a, *b, *c, *d]);
                flight.error = if error == 0 { 5 } else { error };
                let said = String::from_utf8_lossy(text);
                let said: String = said.chars().filter(|c| !c.is_control()).take(200).collect();
                debug!(error, said, "the NBD server reports an error");
            }
            _ => return Err(NO_SENSE),
        }
        if done { self.finish(index) } else { Ok(()) }
    }

    /// The server has answered a part.
    fn finish(&mut self, index: u32) -> Result<(), Broken> {
        let (fua, flushes) = (self.export.fua(), self.export.flushes());
        let flight = self.flight(index)?;
        flight.generation = None;
        match flight.error {
            0 if flight.reads() && flight.received != u64::from(flight.part) => {
                return Err(Broken::Protocol("a read without all of its data"));
            }
            0 => {}
            // It will be done by the server that comes next.
            proto::ESHUTDOWN => return Err(Broken::Ending),
            error => {
                let (action, offset, len) = (flight.op.action, flight.op.offset, flight.op.len);
                let error = errno(error);
                if let Some(held_back) = self.limit.check() {
                    let error = io::Error::from_raw_os_error(error);
                    warn!(
                        held_back,
                        ?action,
                        offset,
                        len,
                        "I/O error of the NBD server: {error}"
                    );
                }
                self.end(index, Outcome::Failed(error));
                return Ok(());
            }
        }
        flight.done = flight.done.saturating_add(flight.part.into());
        let all = flight.done >= flight.op.len;
        let durable = flight.op.durable && !fua && flushes && flight.op.action != Action::Read;
        let ended = flight.flushing || all && !durable;
        flight.flushing |= all && durable;
        (self.lost, self.pause) = (None, Duration::ZERO);
        if ended {
            self.end(index, Outcome::Done);
        } else {
            self.queue.push_back(index);
        }
        Ok(())
    }

    fn end(&mut self, index: u32, outcome: Outcome) {
        if let Some(flight) = place(&mut self.flights, index).and_then(Option::take) {
            self.free.push(index);
            self.post(flight.op, outcome);
        }
    }

    fn gives_back_to(&self, mailbox: &Arc<Mailbox<Outcome>>) -> bool {
        self.suspending.iter().any(|who| Arc::ptr_eq(who, mailbox))
    }

    /// Gives back what the server does not have, to whom asked for it. What it has is waited for: it may do it at any time.
    fn give_back(&mut self) {
        if self.suspending.is_empty() {
            return;
        }
        for index in (0..).take(self.flights.len()) {
            let Ok(flight) = at_index(&self.flights, index) else {
                continue;
            };
            let waits = !self.connected || flight.generation.is_none();
            if waits && self.gives_back_to(&flight.op.mailbox) {
                self.end(index, Outcome::Suspended);
                self.queue.retain(|queued| *queued != index);
            }
        }
    }

    /// Connects again, and lets all requests be sent again. Returns whether to go on.
    fn reconnect(&mut self) -> bool {
        self.connected = false;
        self.give_back();
        // A server may have room for one client only. It may also be gone already.
        let _ = shutdown(self.socket.as_fd().as_raw_fd(), Shutdown::Both);
        self.output.clear();
        self.written = 0;
        self.payload = None;
        self.unread = 0..0;
        self.expect = Expect::Reply;
        let lost = *self.lost.get_or_insert_with(Instant::now);
        loop {
            self.accept();
            if lost.elapsed() >= self.patience {
                self.give_up();
            }
            self.tell();
            if self.ending && self.in_flight() == 0 {
                return false;
            }
            if !self.pause.is_zero() {
                let end = Instant::now()
                    .checked_add(self.pause)
                    .unwrap_or_else(Instant::now);
                // A request that comes is one more to wait.
                while let Some(left) = end.checked_duration_since(Instant::now())
                    && !(self.ending && self.in_flight() == 0)
                    && self.wait(false, Some(left)).is_ok()
                {
                    if lost.elapsed() >= self.patience {
                        self.give_up();
                    }
                    self.tell();
                }
            }
            self.pause = self
                .pause
                .saturating_mul(2)
                .clamp(FIRST_PAUSE, LONGEST_PAUSE);
            let connected = connect(&self.target).and_then(|(socket, export)| {
                export.succeeds(&self.export, self.connections.load(Ordering::Relaxed))?;
                set_nonblocking(&socket)?;
                Ok((socket, export))
            });
            match connected {
                Ok((socket, export)) => {
                    if let Ok(clone) = socket.try_clone() {
                        *self.shared.lock().unwrap_or_else(PoisonError::into_inner) = clone;
                    }
                    info!("NBD: connected to {} again", self.target);
                    if self.in_flight() == 0 {
                        // The pauses grow until a request succeeds: a server may do no more than connect.
                        self.lost = None;
                    }
                    self.socket = socket;
                    self.export = export;
                    self.connected = true;
                    self.queue = (0..)
                        .zip(&self.flights)
                        .filter_map(|(index, flight)| flight.is_some().then_some(index))
                        .collect();
                    return true;
                }
                Err(e) => {
                    if let Some(held_back) = self.limit.check() {
                        warn!(held_back, "NBD: {}: {}", self.target, Causes(&e));
                    }
                }
            }
        }
    }

    /// Nobody waits for the server any longer.
    fn give_up(&mut self) {
        let waiting = self.in_flight();
        if waiting == 0 {
            return;
        }
        if let Some(held_back) = self.limit.check() {
            warn!(
                held_back,
                waiting, "NBD: {} does not come back: requests fail", self.target
            );
        }
        for index in (0..).take(self.flights.len()) {
            self.end(index, Outcome::Failed(libc::EIO));
        }
        self.queue.clear();
    }
}

impl Flight {
    /// Its part under way is a read.
    fn reads(&self) -> bool {
        self.op.action == Action::Read && !self.flushing
    }

    /// Where data for a read goes, if it belongs to it and is not more than was asked for.
    fn position(&self, offset: u64, len: u64) -> Result<u64, Broken> {
        let start = self.op.offset.saturating_add(self.done);
        let at = offset.checked_sub(start);
        let fits = at
            .and_then(|at| at.checked_add(len))
            .is_some_and(|end| end <= u64::from(self.part))
            && self.received.saturating_add(len) <= u64::from(self.part);
        at.filter(|_| fits)
            .map(|at| at.saturating_add(self.done))
            .ok_or(Broken::Protocol("data that was not asked for"))
    }
}

fn place(flights: &mut [Option<Flight>], index: u32) -> Option<&mut Option<Flight>> {
    flights.get_mut(usize::try_from(index).ok()?)
}

fn at_index(flights: &[Option<Flight>], index: u32) -> Result<&Flight, Broken> {
    flights
        .get(usize::try_from(index).unwrap_or(usize::MAX))
        .and_then(Option::as_ref)
        .ok_or(NO_REQUEST)
}

fn zero(slice: &GuestSlice<'_>) {
    const ZEROES: [u8; 4096] = [0; 4096];
    let mut at = 0;
    while at < slice.len() {
        let piece = slice.len().saturating_sub(at).min(ZEROES.len());
        if let (Ok(part), Some(zeroes)) = (slice.subslice(at, piece), ZEROES.get(..piece)) {
            part.copy_from(zeroes);
        }
        at = at.saturating_add(piece);
    }
}

fn set_nonblocking(socket: &File) -> io::Result<()> {
    let flags = fcntl(socket, FcntlArg::F_GETFL)?;
    let flags = OFlag::from_bits_retain(flags) | OFlag::O_NONBLOCK;
    fcntl(socket, FcntlArg::F_SETFL(flags))?;
    Ok(())
}

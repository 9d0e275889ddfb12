//! Messages of a front-end as a fuzzer makes them. It panics at what is wrong: it is for tests only.
#![allow(missing_docs, clippy::unwrap_used, clippy::panic)]

use std::collections::HashMap;
use std::fs::File;
use std::io::{IoSlice, Read};
use std::net::Shutdown;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use mio::unix::SourceFd;
use mio::{Events, Interest, Poll, Token};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use ringside_control::Metrics;
use ringside_rings::ChainBuf;
use serde_json::{Map, Value};
use vhost::vhost_user::VhostUserProtocolFeatures;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::control::Statistics;
use super::device::{Device, DeviceError, WorkerThread, config_range};
use super::handler::Handler;
use super::placement::Placement;
use super::session::{Session, Step};
use super::state::{StateError, open, seal};
use super::vring::{Command, Commands, Vring};

/// Most messages of one connection: all of them fit the socket before any is read.
const MESSAGES: usize = 64;
/// Length of each memory file.
const FILE: u64 = 0x2_0000;
/// Where the front-end says that it has its guest's memory.
const USER: u64 = 0x7000_0000;

struct Nothing;

impl Statistics for Nothing {
    fn stats(&self) -> Map<String, Value> {
        Map::new()
    }
    fn metrics(&self, _: &mut Metrics) {}
}

/// A device whose requests are answered as they come, with nothing.
struct Null {
    acked: u64,
    config: [u8; 16],
}

/// VERSION_1, EVENT_IDX, INDIRECT_DESC, RING_PACKED and IN_ORDER (VIRTIO 1.3, 6).
const FEATURES: u64 = 1 << 32 | 1 << 29 | 1 << 28 | 1 << 34 | 1 << 35;

impl Device for Null {
    fn features(&self) -> u64 {
        FEATURES
    }
    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::INFLIGHT_SHMFD
    }
    fn queue_count(&self) -> u16 {
        3
    }
    fn max_queue_size(&self) -> u16 {
        256
    }
    fn read_config(&self, offset: u32, len: u32) -> Result<Vec<u8>, DeviceError> {
        config_range(&self.config, offset, len)
    }
    fn write_config(&mut self, offset: u32, _: &[u8]) -> Result<(), DeviceError> {
        Err(DeviceError::ConfigReadOnly { offset })
    }
    fn set_features(&mut self, acked: u64) {
        assert_eq!(acked & !FEATURES, 0);
        self.acked = acked;
    }
    fn worker_count(&self) -> usize {
        1
    }
    fn worker_of(&self, _: u16) -> usize {
        0
    }
    fn spawn_worker(&mut self, _: usize, commands: Commands) -> Result<WorkerThread, DeviceError> {
        Ok(WorkerThread::Own(thread::spawn(move || work(&commands))))
    }
    fn statistics(&self) -> Arc<dyn Statistics> {
        Arc::new(Nothing)
    }
    fn save(&self) -> Result<Vec<u8>, StateError> {
        seal("null", 1, &self.acked)
    }
    fn load(&mut self, state: &[u8]) -> Result<(), StateError> {
        open("null", 1, state).map(|_: u64| ())
    }
    fn reset(&mut self) {
        self.acked = 0;
    }
}

/// Serves each ring once when it comes.
fn work(commands: &Commands) {
    let mut rings = HashMap::new();
    let (mut poll, mut events) = (Poll::new().unwrap(), Events::with_capacity(1));
    let fd = commands.as_raw_fd();
    poll.registry()
        .register(&mut SourceFd(&fd), Token(0), Interest::READABLE)
        .unwrap();
    loop {
        match commands.next() {
            Some(Command::Start(mut vring)) => {
                drain(&mut vring);
                assert!(rings.insert(vring.index, vring).is_none());
            }
            Some(Command::Stop { index, done, .. }) => {
                let vring = rings.remove(&index).unwrap();
                done.send(vring).unwrap();
            }
            Some(Command::Pause { .. } | Command::Resume) => {}
            Some(Command::Exit) => break,
            None => {
                poll.poll(&mut events, None).unwrap();
                commands.acknowledge();
            }
        }
    }
}

fn drain(vring: &mut Vring) {
    let mut buf = ChainBuf::new(vring.ring.size());
    let Ok(mut session) = vring.session() else {
        return;
    };
    for _ in 0..1024 {
        let head = match session.pop(&mut buf) {
            Ok(Some(chain)) => chain.head(),
            Err(ringside_rings::PopError::Chain { head, .. }) => head,
            Ok(None) | Err(ringside_rings::PopError::Ring(_)) => break,
        };
        session.push_used(head, 0).unwrap();
    }
    let _ = session.publish();
}

/// Descriptors that a message can carry.
struct Kinds {
    memory: File,
    short: File,
    event: EventFd,
    pipe: OwnedFd,
    directory: File,
    socket: UnixStream,
}

impl Kinds {
    fn new() -> Self {
        let memory = |len| {
            let file = File::from(memfd_create(c"guest", MFdFlags::MFD_CLOEXEC).unwrap());
            file.set_len(len).unwrap();
            file
        };
        Self {
            memory: memory(FILE),
            short: memory(100),
            event: EventFd::new(EFD_NONBLOCK).unwrap(),
            pipe: nix::unistd::pipe().unwrap().0,
            directory: File::open("/").unwrap(),
            socket: UnixStream::pair().unwrap().0,
        }
    }

    fn of(&self, kind: u8) -> RawFd {
        match kind % 8 {
            0..3 => self.memory.as_raw_fd(),
            3 => self.short.as_raw_fd(),
            4 => self.event.as_raw_fd(),
            5 => self.pipe.as_raw_fd(),
            6 => self.directory.as_raw_fd(),
            _ => self.socket.as_raw_fd(),
        }
    }
}

/// What is left of the input; 0 behind its end.
struct Input<'a>(&'a [u8]);

impl Input<'_> {
    fn byte(&mut self) -> u8 {
        match self.0.split_first() {
            Some((&byte, rest)) => {
                self.0 = rest;
                byte
            }
            None => 0,
        }
    }

    fn bytes(&mut self, count: u8) -> Vec<u8> {
        (0..count).map(|_| self.byte()).collect()
    }

    /// A number, mostly small; or one around where memory is.
    fn word(&mut self) -> u64 {
        let (kind, low) = (self.byte(), u64::from(self.byte()));
        match kind % 6 {
            0 => low,
            1 => low << 8,
            2 => low << 12,
            3 => USER + (low << 9),
            4 => USER + low,
            _ => (0..7).fold(low, |word, _| word << 8 | u64::from(self.byte())),
        }
    }
}

/// Requests whose payload is a few words, with their number.
const WORDS: [(u32, u8); 12] = [
    (2, 1),
    (5, 4),
    (8, 0),
    (9, 4),
    (10, 0),
    (11, 0),
    (16, 1),
    (18, 0),
    (31, 2),
    (32, 2),
    (37, 4),
    (38, 4),
];

/// A message, and which descriptors go with it.
fn message(input: &mut Input<'_>) -> (Vec<u8>, u8) {
    let (kind, fds) = (input.byte(), input.byte());
    let mut request = u32::from(input.byte() % 48);
    let mut payload = Vec::new();
    if kind & 1 == 0 {
        // As it should be, but for its values.
        let index = usize::from(kind >> 1) % WORDS.len();
        let words = WORDS.get(index).map_or(0, |&(number, words)| {
            request = number;
            words
        });
        match (request, words) {
            // A vring state: index and number.
            (_, 0) => {
                for word in [input.byte() % 4, input.byte()] {
                    payload.extend(u32::from(word).to_ne_bytes());
                }
                if kind & 0x80 != 0 {
                    payload.truncate(4);
                    let base = [input.byte(), input.byte(), input.byte(), input.byte()];
                    payload.extend(base);
                }
            }
            // A table of one region, and vring addresses: two numbers of 32 bits in front.
            (5, _) => payload.extend([1, 0, 0, 0, 0, 0, 0, 0]),
            (9, _) => payload.extend([input.byte() % 4, 0, 0, 0, 0, 0, 0, 0]),
            (37 | 38, _) => payload.extend([0; 8]),
            _ => {}
        }
        for _ in 0..words {
            payload.extend(input.word().to_ne_bytes());
        }
    } else {
        let len = input.byte();
        payload = input.bytes(len);
    }
    let flags = match kind & 0x60 {
        0x60 => u32::from(input.byte()),
        0x40 => 1,
        _ => 9,
    };
    let mut size = u32::try_from(payload.len()).unwrap();
    if fds & 0xc0 == 0xc0 {
        size = size.wrapping_add(u32::from(input.byte())).wrapping_sub(128);
    }
    let mut message = Vec::new();
    for word in [request, flags, size] {
        message.extend(word.to_ne_bytes());
    }
    message.extend(payload);
    (message, fds)
}

/// A whole connection. What the guest has in memory comes first: pieces, each behind its place and its length.
pub fn messages(bytes: &[u8]) {
    let mut input = Input(bytes);
    let kinds = Kinds::new();
    for _ in 0..input.byte() % 8 {
        let at = u64::from(input.byte()) << 9 | u64::from(input.byte());
        let len = input.byte();
        let piece = input.bytes(len);
        std::os::unix::fs::FileExt::write_all_at(&kinds.memory, &piece, at.min(FILE - 256))
            .unwrap();
    }
    let (ours, theirs) = UnixStream::pair().unwrap();
    for _ in 0..MESSAGES {
        if input.0.is_empty() {
            break;
        }
        let (message, fds) = message(&mut input);
        let fds: Vec<RawFd> = (0..fds % 5)
            .map(|at| kinds.of((fds >> 3).wrapping_add(at)))
            .collect();
        let control: &[ControlMessage<'_>] = match fds.as_slice() {
            [] => &[],
            fds => &[ControlMessage::ScmRights(fds)],
        };
        let parts = [IoSlice::new(&message)];
        sendmsg::<()>(
            ours.as_raw_fd(),
            &parts,
            control,
            MsgFlags::MSG_DONTWAIT,
            None,
        )
        .unwrap();
    }
    ours.shutdown(Shutdown::Write).unwrap();
    let device = Null {
        acked: 0,
        config: [7; 16],
    };
    let handler = Handler::new(device, &Placement::Anywhere).unwrap();
    let handler = Arc::new(Mutex::new(handler));
    let lock = || handler.lock().unwrap_or_else(PoisonError::into_inner);
    lock().begin_session();
    let mut session = Session::new(theirs, &handler).unwrap();
    let mut steps = 0;
    while matches!(session.step(), Ok(Step::Served)) {
        steps += 1;
        assert!(steps <= 2 * MESSAGES, "a message is served again and again");
    }
    drop(session);
    lock().end_session().unwrap();
    lock().shut_down();
    // What was answered begins with a header that says that it is an answer.
    let mut answers = Vec::new();
    let mut ours = ours;
    let _ = ours.read_to_end(&mut answers);
    if let Some(header) = answers.first_chunk::<8>() {
        let [_, _, _, _, flags, ..] = header;
        assert_eq!(flags & 7, 5, "{header:?}");
    }
}

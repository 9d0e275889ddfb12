//! The conversation with a back-end, as narrow as a device needs it, so that a test can play the
//! other end; and its implementation on a Unix socket by `vhost`'s front-end.

use std::fs::File;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{MsgFlags, recv};
use nix::unistd::pipe2;
use ringside_control::connect_at_once;
use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags,
    VhostUserHeaderFlag, VhostUserInflight, VhostUserVringAddrFlags,
};
use vhost::vhost_user::{Error as ProtocolError, Frontend, VhostUserFrontend};
use vhost::vhost_user::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost::{VhostBackend, VhostUserDirtyLogRegion, VhostUserMemoryRegionInfo, VringConfigData};
use vm_memory::{GuestMemoryBackend, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

use crate::exit::ExitHandle;
use crate::snapshot::dirty::DirtyLog;

/// Feature bit 30: there are protocol features (vhost-user, "Feature negotiation").
pub(crate) const F_PROTOCOL_FEATURES: u64 = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
/// Protocol feature: more queues than one, GET_QUEUE_NUM.
pub(crate) const P_MQ: u64 = VhostUserProtocolFeatures::MQ.bits();
/// Protocol feature: requests are acknowledged when asked for.
pub(crate) const P_REPLY_ACK: u64 = VhostUserProtocolFeatures::REPLY_ACK.bits();
/// Protocol feature: a channel for the back-end's own requests.
pub(crate) const P_BACKEND_REQ: u64 = VhostUserProtocolFeatures::BACKEND_REQ.bits();
/// Protocol feature: the back-end has the device configuration.
pub(crate) const P_CONFIG: u64 = VhostUserProtocolFeatures::CONFIG.bits();

/// Protocol feature: requests under way are noted in memory that outlives the back-end.
pub(crate) const P_INFLIGHT: u64 = VhostUserProtocolFeatures::INFLIGHT_SHMFD.bits();

/// Protocol feature: the back-end tells, and takes over, what it keeps besides the queues.
pub(crate) const P_DEVICE_STATE: u64 = VhostUserProtocolFeatures::DEVICE_STATE.bits();

/// Feature bit 26: which pages the back-end writes is noted (vhost-user, "Migration").
pub(crate) const F_LOG_ALL: u64 = VhostUserVirtioFeatures::LOG_ALL.bits();
/// Protocol feature: where it notes them is shared with it by a descriptor.
pub(crate) const P_LOG: u64 = VhostUserProtocolFeatures::LOG_SHMFD.bits();

/// Bytes of a back-end's state at most.
const STATE_LIMIT: usize = 16 << 20;
/// How long a back-end may take for all of it: the guest stands still.
const STATE_PATIENCE: Duration = Duration::from_secs(10);

/// The number of SET_VRING_BASE, and the version in the flags of each message (vhost-user, "Header").
const SET_VRING_BASE: u32 = 10;
const PROTOCOL_VERSION: u32 = 1;

/// Rings of a device at most: requests with a file descriptor name one with 8 bits (vhost-user,
/// "SET_VRING_KICK").
pub(crate) const MAX_RINGS: u64 = 256;

/// A step of the conversation that failed.
#[derive(Debug, thiserror::Error)]
#[error("{step} failed")]
pub struct LinkError {
    /// The vhost-user request.
    pub step: &'static str,
    /// What went wrong.
    #[source]
    pub source: vhost::Error,
}

impl LinkError {
    /// Whether the back-end is still there and has merely said no.
    pub(crate) fn is_refusal(&self) -> bool {
        matches!(
            self.source,
            vhost::Error::VhostUserProtocol(ProtocolError::BackendInternalError)
        )
    }
}

/// A queue in terms of this process's addresses, as the protocol has it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Ring {
    /// Index of the queue.
    pub index: usize,
    /// Number of descriptors.
    pub size: u16,
    /// Where to go on from, as SET_VRING_BASE has it: the available index, or of a packed queue the
    /// places of the next available and, in the upper half, the next used descriptor.
    pub base: u32,
    /// Address of the descriptor table.
    pub descriptors: u64,
    /// Address of the available ring, or of the driver's event suppression structure.
    pub available: u64,
    /// Address of the used ring, or of the device's event suppression structure.
    pub used: u64,
    /// The same in the guest, for a ring whose writes are noted.
    pub log: Option<u64>,
}

/// A queue's eventfds.
pub struct RingEvents<'a> {
    /// The driver rang its doorbell.
    pub kick: &'a EventFd,
    /// The driver is to be interrupted.
    pub call: &'a EventFd,
    /// The back-end gave up on the queue.
    pub error: &'a EventFd,
}

/// Memory in which a back-end notes the requests that are under way ("Inflight I/O tracking"). We
/// keep it for the next back-end, and never look inside.
pub struct Inflight {
    /// Where and how large it is, and for what queues.
    pub area: VhostUserInflight,
    /// The file it is in.
    pub file: File,
}

/// What a device says to its back-end. Each call is one or a few vhost-user requests and returns
/// when the back-end has taken them, as far as it can tell us.
pub trait Link: Send {
    /// SET_OWNER, GET_FEATURES.
    fn features(&mut self) -> Result<u64, LinkError>;
    /// GET_PROTOCOL_FEATURES.
    fn protocol_features(&mut self) -> Result<u64, LinkError>;
    /// SET_PROTOCOL_FEATURES.
    fn set_protocol_features(&mut self, features: u64) -> Result<(), LinkError>;
    /// GET_QUEUE_NUM.
    fn queue_count(&mut self) -> Result<u64, LinkError>;
    /// SET_BACKEND_REQ_FD.
    fn set_channel(&mut self, socket: &UnixStream) -> Result<(), LinkError>;
    /// GET_CONFIG.
    fn read_config(&mut self, offset: u32, length: u32) -> Result<Vec<u8>, LinkError>;
    /// SET_CONFIG.
    fn write_config(&mut self, offset: u32, data: &[u8]) -> Result<(), LinkError>;
    /// SET_FEATURES.
    fn set_features(&mut self, features: u64) -> Result<(), LinkError>;
    /// SET_MEM_TABLE. The back-end has the memory when this returns.
    fn set_memory(&mut self, memory: &GuestMemoryMmap) -> Result<(), LinkError>;
    /// SET_LOG_BASE, by descriptor.
    fn set_log(&mut self, log: &DirtyLog) -> Result<(), LinkError>;
    /// SET_VRING_ADDR of a ring that runs: what has changed of it is whether its writes are noted.
    fn set_ring_log(&mut self, ring: &Ring) -> Result<(), LinkError>;
    /// GET_INFLIGHT_FD, for so many queues of that size.
    fn new_inflight(&mut self, queues: u16, size: u16) -> Result<Inflight, LinkError>;
    /// SET_INFLIGHT_FD.
    fn set_inflight(&mut self, inflight: &Inflight) -> Result<(), LinkError>;
    /// SET_VRING_NUM, _BASE, _ADDR, _CALL, _ERR and last _KICK, which starts the ring.
    fn start_ring(&mut self, ring: &Ring, events: &RingEvents<'_>) -> Result<(), LinkError>;
    /// SET_VRING_ENABLE.
    fn enable_ring(&mut self, index: usize, enable: bool) -> Result<(), LinkError>;
    /// GET_VRING_BASE, which stops the ring after what is under way. Returns where it is to go on.
    fn stop_ring(&mut self, index: usize) -> Result<u32, LinkError>;
    /// SET_DEVICE_STATE_FD to save, CHECK_DEVICE_STATE. All rings are stopped.
    fn save_state(&mut self) -> Result<Vec<u8>, LinkError>;
    /// SET_DEVICE_STATE_FD to load, CHECK_DEVICE_STATE. No ring was started.
    fn load_state(&mut self, state: &[u8]) -> Result<(), LinkError>;
}

/// A back-end at the other end of a Unix socket.
pub(crate) struct SocketLink {
    frontend: Frontend,
    /// The same connection, for what `vhost`'s front-end cannot say.
    socket: UnixStream,
    /// The back-end acknowledges requests (REPLY_ACK).
    acknowledges: bool,
}

impl SocketLink {
    pub(crate) fn new(socket: UnixStream) -> io::Result<Self> {
        Ok(Self {
            frontend: Frontend::from_stream(socket.try_clone()?, MAX_RINGS),
            socket,
            acknowledges: false,
        })
    }

    /// Two ends of a pipe: to read from, and to write to.
    fn state_pipe(&self) -> Result<(OwnedFd, OwnedFd), LinkError> {
        let ends = pipe2(OFlag::O_CLOEXEC).map_err(|error| broken(error.into()));
        step("SET_DEVICE_STATE_FD", ends)
    }

    /// Hands the back-end its end; gives ours. One that the back-end would rather have is not taken: it could make it wait, which
    /// would hold up the guest.
    fn transfer(
        &self,
        direction: VhostTransferStateDirection,
        theirs: OwnedFd,
        ours: OwnedFd,
    ) -> Result<File, LinkError> {
        let phase = VhostTransferStatePhase::STOPPED;
        let set = self.frontend.set_device_state_fd(direction, phase, theirs);
        let end = match step("SET_DEVICE_STATE_FD", set)? {
            None => never_waiting(ours.into()),
            Some(_) => Err(io::Error::other(
                "the back-end wants another descriptor for its state than the one it was given",
            )),
        };
        step("SET_DEVICE_STATE_FD", end.map_err(broken))
    }

    /// SET_VRING_BASE, of which `vhost` knows the lower half.
    fn set_base(&self, index: usize, base: u32) -> vhost::Result<()> {
        if let Ok(base) = u16::try_from(base) {
            return self.frontend.set_vring_base(index, base);
        }
        let index = u32::try_from(index).map_err(|_| vhost::Error::InvalidQueue)?;
        let flags = if self.acknowledges {
            PROTOCOL_VERSION | VhostUserHeaderFlag::NEED_REPLY.bits()
        } else {
            PROTOCOL_VERSION
        };
        let message = bytes([SET_VRING_BASE, flags, 8, index, base]);
        (&self.socket).write_all(&message).map_err(broken)?;
        if !self.acknowledges {
            return Ok(());
        }
        let mut reply = [0; 20];
        (&self.socket).read_exact(&mut reply).map_err(broken)?;
        let flags = PROTOCOL_VERSION | VhostUserHeaderFlag::REPLY.bits();
        match reply.strip_prefix(&*bytes([SET_VRING_BASE, flags, 8])) {
            Some([0, 0, 0, 0, 0, 0, 0, 0]) => Ok(()),
            Some(_) => Err(ProtocolError::BackendInternalError.into()),
            None => Err(ProtocolError::InvalidMessage.into()),
        }
    }
}

fn addresses(ring: &Ring) -> VringConfigData {
    let flags = ring.log.map(|_| VhostUserVringAddrFlags::VHOST_VRING_F_LOG);
    VringConfigData {
        queue_max_size: ring.size,
        queue_size: ring.size,
        flags: flags.map_or(0, |flags| flags.bits()),
        desc_table_addr: ring.descriptors,
        used_ring_addr: ring.used,
        avail_ring_addr: ring.available,
        log_addr: ring.log,
    }
}

fn broken(error: io::Error) -> vhost::Error {
    vhost::Error::VhostUserProtocol(ProtocolError::SocketError(error))
}

/// Makes our end of a pipe one whose reads and writes do not wait.
fn never_waiting(file: File) -> io::Result<File> {
    let flags = OFlag::from_bits_retain(fcntl(&file, FcntlArg::F_GETFL)?);
    fcntl(&file, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
    Ok(file)
}

/// Reads up to the end, but no more and no longer than there can be.
fn read_state(source: &mut File, patience: Duration) -> io::Result<Vec<u8>> {
    let (mut state, mut part) = (Vec::new(), [0; 4096]);
    let start = Instant::now();
    loop {
        await_state(source, PollFlags::POLLIN, patience, start)?;
        let count = match source.read(&mut part) {
            Err(error) if is_transient(&error) => continue,
            count => count?,
        };
        if count == 0 {
            return Ok(state);
        }
        state.extend_from_slice(part.get(..count).unwrap_or_default());
        if state.len() > STATE_LIMIT {
            return Err(io::Error::other("the state has no end"));
        }
    }
}

fn write_state(sink: &mut File, mut state: &[u8], patience: Duration) -> io::Result<()> {
    let start = Instant::now();
    while !state.is_empty() {
        await_state(sink, PollFlags::POLLOUT, patience, start)?;
        match sink.write(state) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(count) => state = state.get(count..).unwrap_or_default(),
            Err(error) if is_transient(&error) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Who has the other end, or this one, too, may have been faster.
fn is_transient(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
    )
}

/// Waits until there is something to do, as long as there is time left of that since the start.
fn await_state(file: &File, what: PollFlags, patience: Duration, start: Instant) -> io::Result<()> {
    let mut fds = [PollFd::new(file.as_fd(), what)];
    loop {
        let left = patience.saturating_sub(start.elapsed());
        // Rounded down: what is left of the last millisecond is not waited for.
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::ZERO);
        if timeout == PollTimeout::ZERO {
            return Err(io::ErrorKind::TimedOut.into());
        }
        match poll(&mut fds, timeout) {
            Ok(0) | Err(Errno::EINTR) => {}
            Ok(_) => return Ok(()),
            Err(error) => return Err(error.into()),
        }
    }
}

/// Words of a message as they go over the socket.
fn bytes<const N: usize>(words: [u32; N]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_ne_bytes()).collect()
}

fn step<T>(step: &'static str, result: vhost::Result<T>) -> Result<T, LinkError> {
    result.map_err(|source| LinkError { step, source })
}

impl Link for SocketLink {
    fn features(&mut self) -> Result<u64, LinkError> {
        step("SET_OWNER", self.frontend.set_owner())?;
        step("GET_FEATURES", self.frontend.get_features())
    }

    fn protocol_features(&mut self) -> Result<u64, LinkError> {
        let features = self.frontend.get_protocol_features();
        Ok(step("GET_PROTOCOL_FEATURES", features)?.bits())
    }

    fn set_protocol_features(&mut self, features: u64) -> Result<(), LinkError> {
        let bits = VhostUserProtocolFeatures::from_bits_truncate(features);
        step(
            "SET_PROTOCOL_FEATURES",
            self.frontend.set_protocol_features(bits),
        )?;
        if features & P_REPLY_ACK != 0 {
            self.frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
            self.acknowledges = true;
        }
        Ok(())
    }

    fn queue_count(&mut self) -> Result<u64, LinkError> {
        step("GET_QUEUE_NUM", self.frontend.get_queue_num())
    }

    fn set_channel(&mut self, socket: &UnixStream) -> Result<(), LinkError> {
        step(
            "SET_BACKEND_REQ_FD",
            self.frontend.set_backend_request_fd(socket),
        )
    }

    fn read_config(&mut self, offset: u32, length: u32) -> Result<Vec<u8>, LinkError> {
        let buffer = vec![0; usize::try_from(length).unwrap_or(0)];
        // QEMU's and all other back-ends take the request with no flag set.
        let flags = VhostUserConfigFlags::empty();
        let reply = self.frontend.get_config(offset, length, flags, &buffer);
        Ok(step("GET_CONFIG", reply)?.1)
    }

    fn write_config(&mut self, offset: u32, data: &[u8]) -> Result<(), LinkError> {
        let flags = VhostUserConfigFlags::empty();
        step("SET_CONFIG", self.frontend.set_config(offset, flags, data))
    }

    fn set_features(&mut self, features: u64) -> Result<(), LinkError> {
        step("SET_FEATURES", self.frontend.set_features(features))
    }

    fn set_memory(&mut self, memory: &GuestMemoryMmap) -> Result<(), LinkError> {
        let regions: vhost::Result<Vec<_>> = memory
            .iter()
            .map(VhostUserMemoryRegionInfo::from_guest_region)
            .collect();
        let regions = step("SET_MEM_TABLE", regions)?;
        step("SET_MEM_TABLE", self.frontend.set_mem_table(&regions))?;
        if !self.acknowledges {
            // Requests are done in order: after the answer to this one, memory is set.
            step("GET_FEATURES", self.frontend.get_features())?;
        }
        Ok(())
    }

    fn set_log(&mut self, log: &DirtyLog) -> Result<(), LinkError> {
        let region = log.file().map(|file| VhostUserDirtyLogRegion {
            mmap_size: log.size(),
            mmap_offset: 0,
            mmap_handle: file.as_raw_fd(),
        });
        step("SET_LOG_BASE", self.frontend.set_log_base(0, region))
    }

    fn set_ring_log(&mut self, ring: &Ring) -> Result<(), LinkError> {
        let set = self.frontend.set_vring_addr(ring.index, &addresses(ring));
        step("SET_VRING_ADDR", set)
    }

    fn new_inflight(&mut self, queues: u16, size: u16) -> Result<Inflight, LinkError> {
        let wanted = VhostUserInflight::new(0, 0, queues, size);
        let (area, file) = step("GET_INFLIGHT_FD", self.frontend.get_inflight_fd(&wanted))?;
        Ok(Inflight { area, file })
    }

    fn set_inflight(&mut self, inflight: &Inflight) -> Result<(), LinkError> {
        let fd = inflight.file.as_raw_fd();
        let set = self.frontend.set_inflight_fd(&inflight.area, fd);
        step("SET_INFLIGHT_FD", set)
    }

    fn start_ring(&mut self, ring: &Ring, events: &RingEvents<'_>) -> Result<(), LinkError> {
        let f = &self.frontend;
        let index = ring.index;
        step("SET_VRING_NUM", f.set_vring_num(index, ring.size))?;
        step("SET_VRING_BASE", self.set_base(index, ring.base))?;
        step("SET_VRING_ADDR", f.set_vring_addr(index, &addresses(ring)))?;
        step("SET_VRING_CALL", f.set_vring_call(index, events.call))?;
        step("SET_VRING_ERR", f.set_vring_err(index, events.error))?;
        step("SET_VRING_KICK", f.set_vring_kick(index, events.kick))
    }

    fn enable_ring(&mut self, index: usize, enable: bool) -> Result<(), LinkError> {
        step(
            "SET_VRING_ENABLE",
            self.frontend.set_vring_enable(index, enable),
        )
    }

    fn stop_ring(&mut self, index: usize) -> Result<u32, LinkError> {
        step("GET_VRING_BASE", self.frontend.get_vring_base(index))
    }

    fn save_state(&mut self) -> Result<Vec<u8>, LinkError> {
        let (ours, theirs) = self.state_pipe()?;
        let mut source = self.transfer(VhostTransferStateDirection::SAVE, theirs, ours)?;
        let read = read_state(&mut source, STATE_PATIENCE).map_err(broken);
        let state = step("SET_DEVICE_STATE_FD", read)?;
        step("CHECK_DEVICE_STATE", self.frontend.check_device_state())?;
        Ok(state)
    }

    fn load_state(&mut self, state: &[u8]) -> Result<(), LinkError> {
        let (theirs, ours) = self.state_pipe()?;
        let mut sink = self.transfer(VhostTransferStateDirection::LOAD, theirs, ours)?;
        let written = write_state(&mut sink, state, STATE_PATIENCE).map_err(broken);
        // Its end says that this is all.
        drop(sink);
        step("SET_DEVICE_STATE_FD", written)?;
        step("CHECK_DEVICE_STATE", self.frontend.check_device_state())
    }
}

/// What back-ends get, all together, once the machine is to end: nobody waits for results then.
const END_LIMIT: Duration = Duration::from_secs(2);
/// What each of them gets for a request at least, when others have used that up.
const END_SHARE: Duration = Duration::from_millis(200);
/// How often a guard looks whether the machine is to end.
const STEP: Duration = Duration::from_millis(50);

/// Ends a conversation in which the back-end does not answer: `vhost` waits for ever, so after the
/// limit, or soon after the end of the machine, the socket is shut down under it.
pub(crate) struct Guard {
    // Dropped to end the thread.
    _done: mpsc::Sender<()>,
    expired: Arc<AtomicBool>,
}

impl Guard {
    pub(crate) fn new(socket: &UnixStream, limit: Duration, exit: &ExitHandle) -> io::Result<Self> {
        let (socket, exit) = (socket.try_clone()?, exit.clone());
        let (done, wait) = mpsc::channel();
        let expired = Arc::new(AtomicBool::new(false));
        let flag = Arc::clone(&expired);
        let start = Instant::now();
        let watch = move || {
            loop {
                let limit = match exit.since() {
                    None => limit,
                    Some(end) => {
                        let left = (end + END_LIMIT).saturating_duration_since(start);
                        limit.min(left.max(END_SHARE))
                    }
                };
                let left = limit.saturating_sub(start.elapsed());
                if left.is_zero() {
                    break;
                }
                if wait.recv_timeout(left.min(STEP)) != Err(mpsc::RecvTimeoutError::Timeout) {
                    return;
                }
            }
            flag.store(true, Ordering::SeqCst);
            // It fails only if the socket is closed already.
            let _ = socket.shutdown(Shutdown::Both);
        };
        std::thread::Builder::new()
            .name("vhost-user-watch".into())
            .spawn(watch)?;
        Ok(Self {
            _done: done,
            expired,
        })
    }

    /// Whether the limit has passed.
    pub(crate) fn expired(&self) -> bool {
        self.expired.load(Ordering::SeqCst)
    }
}

/// Connects to a listening socket. A socket that does not exist yet or that nobody listens on is
/// tried again until `patience` is over.
pub(crate) fn connect(path: &Path, patience: Duration) -> io::Result<UnixStream> {
    const PAUSE: Duration = Duration::from_millis(50);
    let start = Instant::now();
    let mut told = patience.is_zero();
    loop {
        match connect_now(path) {
            Ok(socket) => return Ok(socket),
            // It will not become one.
            Err(_) if path.metadata().is_ok_and(|m| !m.file_type().is_socket()) => {
                return Err(io::Error::other("this is not a socket"));
            }
            Err(error) => {
                let transient = matches!(
                    error.kind(),
                    io::ErrorKind::NotFound
                        | io::ErrorKind::ConnectionRefused
                        | io::ErrorKind::WouldBlock
                        | io::ErrorKind::Interrupted
                );
                let left = patience.saturating_sub(start.elapsed());
                if !transient || left.is_zero() {
                    return Err(error);
                }
                if !told {
                    tracing::info!(path = %path.display(), "waiting for a back-end");
                    told = true;
                }
                std::thread::sleep(PAUSE.min(left));
            }
        }
    }
}

/// Connects at once or not at all: a listener that does not accept may leave no room for another
/// connection, and connecting would then wait for it.
fn connect_now(path: &Path) -> io::Result<UnixStream> {
    let socket = connect_at_once(path)?;
    socket.set_nonblocking(false)?;
    Ok(socket)
}

/// Whether the peer has closed its end.
pub(crate) fn is_closed(socket: &UnixStream) -> bool {
    let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
    match recv(socket.as_raw_fd(), &mut [0], flags) {
        Ok(n) => n == 0,
        Err(nix::Error::EAGAIN | nix::Error::EINTR) => false,
        Err(_) => true,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PATIENCE: Duration = Duration::from_millis(200);

    fn pipe() -> (File, File) {
        let (source, sink) = pipe2(OFlag::O_CLOEXEC).unwrap();
        (source.into(), sink.into())
    }

    #[test]
    fn a_state_goes_through_a_pipe() {
        let state: Vec<u8> = (0..=255).cycle().take(1 << 20).collect();
        let (source, sink) = pipe();
        let mut source = never_waiting(source).unwrap();
        let mut sink = never_waiting(sink).unwrap();
        let sent = state.clone();
        let writing = std::thread::spawn(move || write_state(&mut sink, &sent, STATE_PATIENCE));
        let read = read_state(&mut source, STATE_PATIENCE).unwrap();
        writing.join().unwrap().unwrap();
        assert!(read == state);
    }

    /// The other end is as it was: who has it may not know how to go on.
    #[test]
    fn our_end_of_a_pipe_waits_for_nobody() {
        let (source, sink) = pipe();
        let mut source = never_waiting(source).unwrap();
        let error = source.read(&mut [0]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
        let flags = OFlag::from_bits_retain(fcntl(&sink, FcntlArg::F_GETFL).unwrap());
        assert!(!flags.contains(OFlag::O_NONBLOCK));
    }

    #[test]
    fn a_back_end_that_gives_little_at_a_time_does_not_hold_the_guest_up() {
        let (source, mut sink) = pipe();
        let mut source = never_waiting(source).unwrap();
        let start = Instant::now();
        let dripping = std::thread::spawn(move || {
            while sink.write_all(&[7]).is_ok() && start.elapsed() < 20 * PATIENCE {
                std::thread::sleep(PATIENCE / 10);
            }
        });
        let error = read_state(&mut source, PATIENCE).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        drop(source);
        dripping.join().unwrap();

        let (mut source, sink) = pipe();
        let mut sink = never_waiting(sink).unwrap();
        let start = Instant::now();
        let sipping = std::thread::spawn(move || {
            while source.read(&mut [0; 4096]).is_ok_and(|count| count > 0)
                && start.elapsed() < 20 * PATIENCE
            {
                std::thread::sleep(PATIENCE / 10);
            }
        });
        let error = write_state(&mut sink, &vec![0; STATE_LIMIT], PATIENCE).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        drop(sink);
        sipping.join().unwrap();
    }
}

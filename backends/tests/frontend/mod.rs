//! A vhost-user front-end with guest memory and drivers, and a back-end program as a child process.
//!
//! Everything here panics when something is not as it should be: it is for tests only.

#![allow(
    dead_code, // each test program uses its own part
    unreachable_pub,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation
)] // test support: a panic is how it fails

pub mod disk;
pub mod nbd;
pub mod request;

use std::fmt::Display;
use std::fs::File;
use std::io::{self, IoSlice, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CloneFlags, unshare};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::signal::{Signal, kill};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use nix::unistd::{Pid, geteuid, pipe};
use request::{
    GET_FEATURES, GET_PROTOCOL_FEATURES, GET_VRING_BASE_SKIP_DRAIN, NEED_REPLY, SET_FEATURES,
    SET_LOG_BASE, SET_PROTOCOL_FEATURES, SET_VRING_BASE,
};
use ringside_rings::{DriverLayout, DriverRing, Segment};
use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserHeaderFlag, VhostUserInflight,
    VhostUserProtocolFeatures,
};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EventFd};

/// How long anything may take.
pub const PATIENCE: Duration = Duration::from_secs(10);

/// VHOST_USER_F_PROTOCOL_FEATURES
pub const PROTOCOL_FEATURES: u64 = 1 << 30;
/// VHOST_F_LOG_ALL
pub const LOG_ALL: u64 = 1 << 26;
/// VIRTIO_F_EVENT_IDX
pub const EVENT_IDX: u64 = 1 << 29;
/// VIRTIO_F_RING_PACKED
pub const RING_PACKED: u64 = 1 << 34;
/// VIRTIO_F_IN_ORDER
pub const IN_ORDER: u64 = 1 << 35;

/// Says why a test does not run. Past the capture of the test harness: it must not look like one that did.
pub fn skip(test: &str, why: impl Display) {
    let _ = writeln!(io::stderr(), "test {test}: skipped: {why}");
}

/// Gives this thread, and the programs it starts, a network of its own. `false`, and a word on standard error, if
/// that cannot be.
pub fn own_network(test: &str) -> bool {
    match unshare(CloneFlags::CLONE_NEWNET) {
        Err(e) => skip(test, format_args!("no network namespace: {e}")),
        Ok(()) => match File::options().read(true).write(true).open("/dev/net/tun") {
            Ok(_) => return true,
            Err(e) => skip(test, format_args!("/dev/net/tun: {e}")),
        },
    }
    false
}

/// Runs a command that takes some of root's rights away, and returns exit status and log of the program, which has to
/// end by itself. `None`, and a word on standard error, if that cannot be.
pub fn without_rights(test: &str, command: &mut Command) -> Option<(Option<i32>, String)> {
    if !geteuid().is_root() {
        skip(test, "only root can take rights away");
        return None;
    }
    let dir = tempfile::tempdir().unwrap();
    command.arg("--socket-path").arg(dir.path().join("s"));
    match Daemon::try_spawn(command, dir) {
        Ok(daemon) => Some(daemon.outcome()),
        Err(e) => {
            skip(test, format_args!("{command:?}: {e}"));
            None
        }
    }
}

/// A back-end program, ended when dropped.
pub struct Daemon {
    child: Child,
    pub dir: tempfile::TempDir,
}

impl Daemon {
    /// Starts `program --socket-path … args` and waits until it listens.
    pub fn start(program: &str, args: &[&str]) -> Self {
        let daemon = Self::spawn(program, args);
        daemon.wait_for_socket();
        daemon
    }

    /// The same without waiting: the program may end at once.
    pub fn spawn(program: &str, args: &[&str]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut command = Command::new(program);
        command.arg("--socket-path").arg(dir.path().join("s"));
        command.stdin(Stdio::null());
        Self::spawn_command(command.args(args), dir)
    }

    /// Any command line, its standard error kept in `dir`.
    pub fn spawn_command(command: &mut Command, dir: tempfile::TempDir) -> Self {
        Self::try_spawn(command, dir).unwrap()
    }

    fn try_spawn(command: &mut Command, dir: tempfile::TempDir) -> io::Result<Self> {
        let log = File::create(dir.path().join("log"))?;
        let child = command.env_remove("RINGSIDE_LOG").stderr(log).spawn()?;
        Ok(Self { child, dir })
    }

    /// Kills it, and starts another one in its place, with a log of its own.
    pub fn replace(&mut self, program: &str, args: &[&str]) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        let log = File::create(self.dir.path().join("log")).unwrap();
        let mut command = Command::new(program);
        command.arg("--socket-path").arg(self.socket()).args(args);
        command.stdin(Stdio::null()).stderr(log);
        self.child = command.env_remove("RINGSIDE_LOG").spawn().unwrap();
        self.wait_for_socket();
    }

    /// Has another one take its place while it runs, with a log of its own. The old one has to end with success.
    pub fn upgrade(&mut self, program: &str, args: &[&str]) {
        let successor = self.successor(program, args);
        self.upgraded(successor, || {});
        assert!(self.socket().exists());
    }

    /// The same by a program that was started, until which is ready something else is done.
    pub fn upgraded(&mut self, successor: Child, mut meanwhile: impl FnMut()) {
        let old = std::mem::replace(&mut self.child, successor);
        let mut old = Self {
            child: old,
            // Not its own any more.
            dir: tempfile::tempdir().unwrap(),
        };
        let start = Instant::now();
        while !self.log().contains(" ready") && start.elapsed() < PATIENCE {
            meanwhile();
        }
        self.wait_for_socket();
        File::create(old.dir.path().join("log")).unwrap();
        assert_eq!(old.wait().code(), Some(0));
        assert!(self.log().contains("took over"), "{}", self.log());
    }

    /// Starts one that is to take its place.
    pub fn successor(&self, program: &str, args: &[&str]) -> Child {
        let mut command = Command::new(program);
        command.arg("--socket-path").arg(self.socket()).args(args);
        self.successor_by(&mut command)
    }

    /// The same by any command line.
    pub fn successor_by(&self, command: &mut Command) -> Child {
        // What writes to the old file goes on doing so.
        let path = self.dir.path().join("log");
        std::fs::remove_file(&path).unwrap();
        let log = File::create(path).unwrap();
        command.arg("--take-over").arg(self.dir.path().join("ctl"));
        command.stdin(Stdio::null()).stderr(log);
        command.env_remove("RINGSIDE_LOG").spawn().unwrap()
    }

    pub fn wait_for_socket(&self) {
        self.wait_for_line("ready");
    }

    /// Waits until the log has a line with `text`.
    pub fn wait_for_line(&self, text: &str) {
        let start = Instant::now();
        while !self.log().contains(text) {
            assert!(start.elapsed() < PATIENCE, "no `{text}`: {}", self.log());
            sleep(Duration::from_millis(2));
        }
    }

    /// Starts `program --socket-path … --control-socket … args` and waits until it listens.
    pub fn start_controlled(program: &str, args: &[&str]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut command = Command::new(program);
        command.arg("--socket-path").arg(dir.path().join("s"));
        command.arg("--control-socket").arg(dir.path().join("ctl"));
        command.stdin(Stdio::null());
        let daemon = Self::spawn_command(command.args(args), dir);
        daemon.wait_for_socket();
        daemon
    }

    pub fn socket(&self) -> PathBuf {
        self.dir.path().join("s")
    }

    pub fn log(&self) -> String {
        std::fs::read_to_string(self.dir.path().join("log")).unwrap()
    }

    /// Its process.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    pub fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.child.id() as i32), signal).unwrap();
    }

    /// Waits for the end and returns its status.
    pub fn wait(&mut self) -> ExitStatus {
        let start = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(start.elapsed() < PATIENCE, "does not end: {}", self.log());
            sleep(Duration::from_millis(2));
        }
    }

    /// Waits for the end: exit status and what was logged.
    pub fn outcome(mut self) -> (Option<i32>, String) {
        let status = self.wait();
        (status.code(), self.log())
    }

    /// How many file descriptors it has open.
    pub fn descriptors(&self) -> usize {
        let listed = std::fs::read_dir(format!("/proc/{}/fd", self.child.id()));
        listed.unwrap().count()
    }

    /// Ends the program by SIGTERM, which must succeed.
    pub fn stop(mut self) {
        self.signal(Signal::SIGTERM);
        let status = self.wait();
        assert_eq!(status.code(), Some(0), "{}", self.log());
        assert!(!self.socket().exists(), "the socket file stays");
    }

    /// Threads of the process use no processor time to speak of while nothing happens.
    pub fn assert_idle(&self) {
        let ticks = || {
            let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.child.id())).unwrap();
            let fields: Vec<&str> = stat
                .rsplit(')')
                .next()
                .unwrap()
                .split_whitespace()
                .collect();
            fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap()
        };
        let before = ticks();
        sleep(Duration::from_millis(300));
        // 10 ms each.
        assert!(ticks() - before <= 5, "it spins: {}", self.log());
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Guest memory in a memfd: two regions that do not adjoin, to be mapped by both sides.
pub struct Guest {
    pub file: File,
    pub memory: GuestMemoryMmap,
    next: u64,
}

/// Size of each of the two regions.
pub const REGION: u64 = 16 << 20;
/// Guest-physical start of the second.
pub const SECOND: u64 = 1 << 32;

impl Guest {
    pub fn new() -> Self {
        let file = File::from(memfd_create(c"guest", MFdFlags::MFD_CLOEXEC).unwrap());
        file.set_len(2 * REGION).unwrap();
        let part = |guest, offset| {
            let offset = FileOffset::new(file.try_clone().unwrap(), offset);
            (GuestAddress(guest), REGION as usize, Some(offset))
        };
        let memory =
            GuestMemoryMmap::from_ranges_with_files([part(0, 0), part(SECOND, REGION)]).unwrap();
        Self {
            file,
            memory,
            next: 0x1000,
        }
    }

    /// Memory for a test's own use, never given twice.
    pub fn alloc(&mut self, len: u64, align: u64) -> GuestAddress {
        let start = self.next.next_multiple_of(align);
        self.next = start + len;
        assert!(self.next <= REGION, "out of guest memory");
        GuestAddress(start)
    }

    pub fn user_address(&self, addr: GuestAddress) -> u64 {
        self.memory.get_host_address(addr).unwrap() as u64
    }

    pub fn regions(&self) -> Vec<VhostUserMemoryRegionInfo> {
        [(0, 0), (SECOND, REGION)]
            .map(|(guest, offset)| VhostUserMemoryRegionInfo {
                guest_phys_addr: guest,
                memory_size: REGION,
                userspace_addr: self.user_address(GuestAddress(guest)),
                mmap_offset: offset,
                mmap_handle: self.file.as_raw_fd(),
            })
            .to_vec()
    }

    pub fn read(&self, addr: GuestAddress, len: usize) -> Vec<u8> {
        let mut data = vec![0; len];
        self.memory.read_slice(&mut data, addr).unwrap();
        data
    }
}

/// One virtqueue of the driver, with its eventfds.
pub struct Queue {
    pub ring: DriverRing<u64>,
    pub kick: EventFd,
    pub call: EventFd,
    pub err: EventFd,
    pub interrupts: u64,
}

impl Queue {
    /// Adds a chain and kicks if the device wants it. Returns whether it did.
    pub fn submit(
        &mut self,
        guest: &Guest,
        readable: &[Segment],
        writable: &[Segment],
        token: u64,
    ) -> bool {
        let mut session = self.ring.session(&guest.memory).unwrap();
        session.add(readable, writable, token).unwrap();
        let kick = session.publish().unwrap();
        if kick {
            self.kick.write(1).unwrap();
        }
        kick
    }

    /// The next completed chain, sleeping on the call eventfd as a driver does.
    pub fn complete(&mut self, guest: &Guest) -> (u64, u32) {
        let start = Instant::now();
        loop {
            let mut session = self.ring.session(&guest.memory).unwrap();
            if let Some(done) = session.poll_used().unwrap() {
                return done;
            }
            if session.enable_interrupts().unwrap() {
                continue;
            }
            assert!(start.elapsed() < PATIENCE, "no completion");
            if readable(self.call.as_raw_fd(), Duration::from_secs(1)) {
                self.call.read().unwrap();
                self.interrupts += 1;
            }
        }
    }

    /// Takes an interrupt that came for a chain which was seen before it.
    pub fn settle(&self) {
        if readable(self.call.as_raw_fd(), Duration::from_millis(100)) {
            self.call.read().unwrap();
        }
    }

    /// Whether the back-end said that the ring is broken.
    pub fn failed(&self) -> bool {
        readable(self.err.as_raw_fd(), PATIENCE)
    }
}

/// Whether a descriptor becomes readable in time.
pub fn readable(fd: RawFd, timeout: Duration) -> bool {
    // SAFETY: the caller owns the descriptor and waits here.
    let fd = unsafe { BorrowedFd::borrow_raw(fd) };
    let mut fds = [PollFd::new(fd, PollFlags::POLLIN)];
    poll(&mut fds, PollTimeout::try_from(timeout).unwrap()).unwrap() > 0
}

/// What a front-end asks for.
#[derive(Clone, Copy)]
pub struct Setup {
    /// Virtio features not to accept, of those offered.
    pub without: u64,
    pub queues: usize,
    pub size: u16,
    /// Memory by ADD_MEM_REG in place of SET_MEM_TABLE.
    pub slots: bool,
    /// Packed queues, which have to be offered.
    pub packed: bool,
    /// Use in order, which has to be offered.
    pub in_order: bool,
    /// Requests in flight are tracked, which has to be offered.
    pub tracked: bool,
}

impl Setup {
    /// The same in all formats: split and packed, used in any order and, as the last two, in order.
    pub fn formats(self) -> [Self; 4] {
        [(false, false), (true, false), (false, true), (true, true)].map(|(packed, in_order)| {
            Self {
                packed,
                in_order,
                ..self
            }
        })
    }

    /// All features that are not to be accepted.
    fn refused(self) -> u64 {
        let without = |wanted: bool, bit| if wanted { 0 } else { bit };
        self.without | without(self.packed, RING_PACKED) | without(self.in_order, IN_ORDER)
    }
}

impl Default for Setup {
    fn default() -> Self {
        Self {
            without: 0,
            queues: 1,
            size: 64,
            slots: false,
            packed: false,
            in_order: false,
            tracked: false,
        }
    }
}

/// A connected front-end whose queues run.
pub struct FrontEnd {
    pub messages: Frontend,
    /// The same connection, for messages that the `vhost` crate has no function for.
    pub raw: Raw,
    pub guest: Guest,
    pub queues: Vec<Queue>,
    pub features: u64,
    /// Where the back-end notes requests in flight.
    pub inflight: Option<(VhostUserInflight, File)>,
    /// The dirty log, while it is on, and whether each used ring is said to be logged as well.
    pub log: Option<(File, bool)>,
}

/// Connects and negotiates, for split queues used in any order: each message is acknowledged by the back-end.
pub fn negotiate(socket: &Path, without: u64) -> (Frontend, u64) {
    let stream = UnixStream::connect(socket).unwrap();
    negotiate_on(stream, without | RING_PACKED | IN_ORDER)
}

fn negotiate_on(stream: UnixStream, without: u64) -> (Frontend, u64) {
    let mut messages = Frontend::from_stream(stream, 256);
    messages.set_owner().unwrap();
    let features = messages.get_features().unwrap() & !without & !LOG_ALL;
    let protocol = messages.get_protocol_features().unwrap();
    let wanted = VhostUserProtocolFeatures::MQ
        | VhostUserProtocolFeatures::REPLY_ACK
        | VhostUserProtocolFeatures::CONFIG
        | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
        | VhostUserProtocolFeatures::BACKEND_REQ
        | VhostUserProtocolFeatures::LOG_SHMFD
        | VhostUserProtocolFeatures::DEVICE_STATE
        | VhostUserProtocolFeatures::RESET_DEVICE;
    assert!(protocol.contains(wanted), "{protocol:?}");
    let of_device = VhostUserProtocolFeatures::INFLIGHT_SHMFD
        | VhostUserProtocolFeatures::RARP
        | VhostUserProtocolFeatures::GET_VRING_BASE_INFLIGHT;
    messages
        .set_protocol_features(wanted | protocol & of_device)
        .unwrap();
    messages.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
    messages.set_features(features).unwrap();
    (messages, features)
}

impl FrontEnd {
    pub fn new(socket: &Path, setup: Setup) -> Self {
        let mut this = Self::idle(socket, setup);
        for index in 0..setup.queues {
            this.start(index, this.fresh());
        }
        this
    }

    /// The same, with queues that do not run yet.
    pub fn idle(socket: &Path, setup: Setup) -> Self {
        let raw = Raw::connect(socket);
        let (mut messages, features) = negotiate_on(raw.0.try_clone().unwrap(), setup.refused());
        let wanted = [(setup.packed, RING_PACKED), (setup.in_order, IN_ORDER)];
        for (wanted, bit) in wanted {
            assert_eq!(features & bit != 0, wanted, "not offered: {bit:#x}");
        }
        assert!(messages.get_queue_num().unwrap() >= setup.queues as u64);
        let guest = Guest::new();
        if setup.slots {
            assert!(messages.get_max_mem_slots().unwrap() >= 2);
            for region in guest.regions() {
                messages.add_mem_region(&region).unwrap();
            }
        } else {
            messages.set_mem_table(&guest.regions()).unwrap();
        }
        let mut this = Self {
            messages,
            raw,
            queues: Vec::new(),
            features,
            guest,
            inflight: None,
            log: None,
        };
        if setup.tracked {
            let wanted = VhostUserInflight::new(0, 0, setup.queues as u16, setup.size);
            let inflight = this.messages.get_inflight_fd(&wanted).unwrap();
            this.track(&inflight);
            this.inflight = Some(inflight);
        }
        for _ in 0..setup.queues {
            let layout = |base| {
                let layout = if setup.packed {
                    DriverLayout::packed(base, setup.size, 0).unwrap()
                } else {
                    DriverLayout::new(base, setup.size, 0).unwrap()
                };
                if setup.in_order {
                    layout.in_order()
                } else {
                    layout
                }
            };
            let len = layout(GuestAddress(0)).end().0;
            let layout = layout(this.guest.alloc(len, 4096));
            let ring =
                DriverRing::new(layout, features & EVENT_IDX != 0, &this.guest.memory).unwrap();
            let eventfd = || EventFd::new(EFD_CLOEXEC).unwrap();
            this.queues.push(Queue {
                ring,
                kick: eventfd(),
                call: eventfd(),
                err: eventfd(),
                interrupts: 0,
            });
        }
        this
    }

    /// Leaves, and comes back with the same guest, as a front-end does that is restarted. Returns where the rings, which
    /// do not run yet, go on.
    pub fn reconnect(&mut self, socket: &Path) -> Vec<u32> {
        let bases = (0..self.queues.len())
            .map(|index| self.messages.get_vring_base(index).unwrap())
            .collect();
        self.raw.0.shutdown(Shutdown::Both).unwrap();
        self.raw = Raw::connect(socket);
        let without = !self.features;
        let (messages, features) = negotiate_on(self.raw.0.try_clone().unwrap(), without);
        assert_eq!(features, self.features);
        self.messages = messages;
        let regions = self.guest.regions();
        self.messages.set_mem_table(&regions).unwrap();
        bases
    }

    /// Says where requests in flight are noted.
    pub fn track(&mut self, (area, file): &(VhostUserInflight, File)) {
        let fd = file.as_raw_fd();
        self.messages.set_inflight_fd(area, fd).unwrap();
    }

    /// Hands a running guest to the back-end that came after one that died, and starts its rings.
    pub fn hand_over(&mut self, socket: &Path) {
        self.raw = Raw::connect(socket);
        let (messages, features) = negotiate_on(self.raw.0.try_clone().unwrap(), !self.features);
        assert_eq!(features, self.features);
        self.messages = messages;
        if let Some(inflight) = self.inflight.take() {
            self.track(&inflight);
            self.inflight = Some(inflight);
        }
        let regions = self.guest.regions();
        self.messages.set_mem_table(&regions).unwrap();
        for index in 0..self.queues.len() {
            // As QEMU does: the used index, or for a packed ring where it began.
            let base = if self.features & RING_PACKED != 0 {
                self.fresh()
            } else {
                let used = self.queues[index].ring.layout().used_ring();
                let index = GuestAddress(used.0 + 2);
                self.guest.memory.read_obj::<u16>(index).unwrap().into()
            };
            self.start(index, base);
        }
    }

    /// The base of a fresh ring.
    pub fn fresh(&self) -> u32 {
        if self.features & RING_PACKED != 0 {
            0x8000_8000
        } else {
            0
        }
    }

    /// Sends all that a ring needs to run, from `base` on.
    pub fn start(&mut self, index: usize, base: u32) {
        self.prepare(index, base);
        let kick = &self.queues[index].kick;
        self.messages.set_vring_kick(index, kick).unwrap();
        if self.features & PROTOCOL_FEATURES != 0 {
            self.messages.set_vring_enable(index, true).unwrap();
        }
    }

    /// Gives a ring that has been in use another call descriptor. The device may have signalled the one before when
    /// nobody looked at it any more.
    pub fn call_again(&mut self, index: usize) {
        let call = EventFd::new(EFD_CLOEXEC).unwrap();
        self.messages.set_vring_call(index, &call).unwrap();
        assert!(readable(call.as_raw_fd(), PATIENCE), "no interrupt");
        self.queues[index].call = call;
        self.queues[index].settle();
    }

    /// Sends what comes before the kick.
    pub fn prepare(&mut self, index: usize, base: u32) {
        self.raw.set_vring_base(index, base);
        let queue = &self.queues[index];
        let layout = queue.ring.layout();
        self.messages.set_vring_num(index, layout.size()).unwrap();
        self.messages
            .set_vring_addr(index, &self.addresses(layout))
            .unwrap();
        self.messages.set_vring_call(index, &queue.call).unwrap();
        self.messages.set_vring_err(index, &queue.err).unwrap();
    }

    pub fn addresses(&self, layout: &DriverLayout) -> VringConfigData {
        VringConfigData {
            queue_max_size: layout.size(),
            queue_size: layout.size(),
            flags: u32::from(self.logs_used_rings()),
            desc_table_addr: self.guest.user_address(layout.desc_table()),
            used_ring_addr: self.guest.user_address(layout.used_ring()),
            avail_ring_addr: self.guest.user_address(layout.avail_ring()),
            log_addr: self.logs_used_rings().then_some(layout.used_ring().0),
        }
    }

    fn logs_used_rings(&self) -> bool {
        self.log.as_ref().is_some_and(|(_, used)| *used)
    }

    /// Begins the dirty log as front-ends do when a guest is to move, with or without a word about each used ring.
    pub fn begin_log(&mut self, used_rings: bool) {
        let log = File::from(memfd_create(c"log", MFdFlags::MFD_CLOEXEC).unwrap());
        let len = (SECOND + REGION) / 4096 / 8;
        log.set_len(len).unwrap();
        self.raw.set_log_base(len, &log);
        self.messages.set_features(self.features | LOG_ALL).unwrap();
        self.log = Some((log, used_rings));
        self.set_addresses();
    }

    /// Ends it, and returns it.
    pub fn end_log(&mut self) -> File {
        self.messages.set_features(self.features).unwrap();
        let (log, _) = self.log.take().unwrap();
        self.set_addresses();
        log
    }

    fn set_addresses(&mut self) {
        for index in 0..self.queues.len() {
            let addresses = self.addresses(self.queues[index].ring.layout());
            self.messages.set_vring_addr(index, &addresses).unwrap();
        }
    }

    /// Has the device's state written to a pipe. `None`: it refuses.
    pub fn save_state(&self) -> Option<Vec<u8>> {
        let (reader, writer) = pipe().unwrap();
        let (save, stopped) = (
            VhostTransferStateDirection::SAVE,
            VhostTransferStatePhase::STOPPED,
        );
        self.messages
            .set_device_state_fd(save, stopped, writer)
            .ok()?;
        let mut state = Vec::new();
        File::from(reader).read_to_end(&mut state).unwrap();
        self.messages.check_device_state().unwrap();
        Some(state)
    }

    /// Has the device go on from such a state. `false`: it refuses.
    pub fn load_state(&self, state: &[u8]) -> bool {
        let (reader, writer) = pipe().unwrap();
        let (load, stopped) = (
            VhostTransferStateDirection::LOAD,
            VhostTransferStatePhase::STOPPED,
        );
        self.messages
            .set_device_state_fd(load, stopped, reader)
            .unwrap();
        // One that is too long is not taken to its end.
        let _ = File::from(writer).write_all(state);
        self.messages.check_device_state().is_ok()
    }

    pub fn complete(&mut self, queue: usize) -> (u64, u32) {
        self.queues[queue].complete(&self.guest)
    }

    /// Has a network card obey a command, and gives its answer.
    pub fn command(&mut self, queue: usize, bytes: &[u8]) -> u8 {
        let at = self.guest.alloc(bytes.len() as u64 + 1, 64);
        self.guest.memory.write_slice(bytes, at).unwrap();
        let ack = GuestAddress(at.0 + bytes.len() as u64);
        let readable = [Segment::new(at, bytes.len() as u32)];
        let Self { queues, guest, .. } = self;
        queues[queue].submit(guest, &readable, &[Segment::new(ack, 1)], at.0);
        assert_eq!(self.complete(queue), (at.0, 1));
        self.guest.read(ack, 1)[0]
    }

    /// Has a disk do one flush, to see that all is in order.
    pub fn works(&mut self, queue: usize) {
        let (head, status) = (self.guest.alloc(16, 16), self.guest.alloc(1, 1));
        let flush = 4_u128.to_le(); // VIRTIO_BLK_T_FLUSH
        self.guest.memory.write_obj(flush, head).unwrap();
        self.guest.memory.write_obj(0xee_u8, status).unwrap();
        let writable = [Segment::new(status, 1)];
        self.queues[queue].submit(&self.guest, &[Segment::new(head, 16)], &writable, 1);
        assert_eq!(self.complete(queue), (1, 1));
        assert_eq!(self.guest.memory.read_obj::<u8>(status).unwrap(), 0);
    }
}

/// A disk's back-end serves the next front-end.
pub fn still_serves(daemon: &Daemon) {
    FrontEnd::new(&daemon.socket(), Setup::default()).works(0);
}

/// A connection on which messages are written byte by byte.
pub struct Raw(pub UnixStream);

impl Raw {
    pub fn connect(socket: &Path) -> Self {
        let stream = UnixStream::connect(socket).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        Self(stream)
    }

    /// Sends a message: version 1 and these flags.
    pub fn send(&mut self, request: u32, flags: u32, payload: &[u8]) {
        let mut message = Vec::new();
        for word in [request, 1 | flags, payload.len() as u32] {
            message.extend(word.to_ne_bytes());
        }
        message.extend(payload);
        self.0.write_all(&message).unwrap();
    }

    pub fn send_u64(&mut self, request: u32, flags: u32, value: u64) {
        self.send(request, flags, &value.to_ne_bytes());
    }

    /// SET_VRING_BASE, which the `vhost` crate has for split queues only, with REPLY_ACK negotiated.
    pub fn set_vring_base(&mut self, index: usize, base: u32) {
        let state = [(index as u32).to_ne_bytes(), base.to_ne_bytes()].concat();
        self.send(SET_VRING_BASE, NEED_REPLY, &state);
        assert_eq!(self.reply(), (SET_VRING_BASE, 0));
    }

    /// Accepts VHOST_USER_PROTOCOL_F_GET_VRING_BASE_SKIP_DRAIN, which the `vhost` crate does not know, besides all others.
    pub fn accept_skip_drain(&mut self) {
        self.send(GET_PROTOCOL_FEATURES, 0, &[]);
        let protocol = self.reply().1;
        assert_ne!(protocol & 1 << 23, 0, "not offered");
        self.send_u64(SET_PROTOCOL_FEATURES, NEED_REPLY, protocol);
        assert_eq!(self.reply(), (SET_PROTOCOL_FEATURES, 0));
    }

    /// GET_VRING_BASE_SKIP_DRAIN. Returns the base.
    pub fn skip_drain(&mut self, index: usize) -> u32 {
        let state = [(index as u32).to_ne_bytes(), [0; 4]].concat();
        self.send(GET_VRING_BASE_SKIP_DRAIN, 0, &state);
        let (request, state) = self.reply();
        assert_eq!(
            (request, state as u32),
            (GET_VRING_BASE_SKIP_DRAIN, index as u32)
        );
        (state >> 32) as u32
    }

    /// SET_LOG_BASE, whose reply the `vhost` crate does not take: the message itself.
    pub fn set_log_base(&mut self, len: u64, file: &File) {
        let payload = [len.to_ne_bytes(), [0; 8]].concat();
        self.send_with_fds(SET_LOG_BASE, &payload, &[file.as_raw_fd()]);
        let mut reply = [0; 28];
        self.0.read_exact(&mut reply).unwrap();
        assert_eq!(reply[..12], [6, 0, 0, 0, 0x5, 0, 0, 0, 16, 0, 0, 0]);
    }

    /// Sends a message with descriptors, if any, that is to be answered.
    pub fn send_with_fds(&self, request: u32, payload: &[u8], fds: &[RawFd]) {
        let mut message = Vec::new();
        for word in [request, 1 | NEED_REPLY, payload.len() as u32] {
            message.extend(word.to_ne_bytes());
        }
        message.extend(payload);
        let control: &[ControlMessage<'_>] = match fds {
            [] => &[],
            fds => &[ControlMessage::ScmRights(fds)],
        };
        let (fd, parts) = (self.0.as_raw_fd(), [IoSlice::new(&message)]);
        sendmsg::<()>(fd, &parts, control, MsgFlags::empty(), None).unwrap();
    }

    /// Accepts all features that there are.
    pub fn negotiate(&mut self) {
        self.send(GET_FEATURES, 0, &[]);
        let features = self.reply().1;
        self.send(GET_PROTOCOL_FEATURES, 0, &[]);
        let protocol = self.reply().1;
        self.send_u64(SET_PROTOCOL_FEATURES, 0, protocol);
        self.send_u64(SET_FEATURES, NEED_REPLY, features);
        assert_eq!(self.reply(), (SET_FEATURES, 0));
    }

    /// The next reply: its request and its 64-bit payload.
    pub fn reply(&mut self) -> (u32, u64) {
        let mut message = [0; 20];
        self.0.read_exact(&mut message).unwrap();
        let word = |at: usize| u32::from_ne_bytes(message[at..at + 4].try_into().unwrap());
        assert_eq!((word(4), word(8)), (0x5, 8), "not a reply of 8 bytes");
        let value = u64::from_ne_bytes(message[12..].try_into().unwrap());
        (word(0), value)
    }

    /// Whether the back-end closes the connection.
    pub fn is_closed(&mut self) -> bool {
        let read = loop {
            match self.0.read(&mut [0; 64]) {
                // A child of another test ended: with a time-out set, the call is not begun again by itself.
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                read => break read,
            }
        };
        let closed = match &read {
            Ok(count) => *count == 0,
            // Closed with bytes unread.
            Err(e) => e.kind() == io::ErrorKind::ConnectionReset,
        };
        if !closed {
            eprintln!("in place of the end: {read:?}");
        }
        closed
    }
}

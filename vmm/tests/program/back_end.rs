//! A guest with a virtio disk, and a back-end that is played: what either of them learns when the
//! other starts, resets, dies or hangs; and back-ends that no guest starts with.

use std::collections::HashMap;
use std::fs::File;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::Child;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use super::guest::*;
use super::testing::has_kvm;

/// Where the guest puts the device's BAR, to reach it in 32-bit mode.
const BAR: u32 = 0xc000_0000;
const STATUS: u32 = BAR + 0x14;
const DOORBELL: u32 = BAR + 0x3000;
const RINGS: u32 = 0x30_0000;

const NEEDS_RESET: u8 = 64;

/// `mov dx, 0xcf8; mov eax, address; out dx, eax; mov dx, 0xcfc; mov eax, value; out dx, eax`, for
/// the first device on the bus.
fn config_write(register: u8, value: u32) -> Vec<u8> {
    let address = 0x8000_0800 | u32::from(register);
    [
        &[0x66, 0xba, 0xf8, 0x0c, 0xb8][..],
        &address.to_le_bytes(),
        &[0xef, 0x66, 0xba, 0xfc, 0x0c, 0xb8],
        &value.to_le_bytes(),
        &[0xef],
    ]
    .concat()
}

/// `mov byte [at], value`
fn write8(at: u32, value: u8) -> Vec<u8> {
    [&[0xc6, 0x05][..], &at.to_le_bytes(), &[value]].concat()
}

/// `mov word [at], value`
fn write16(at: u32, value: u16) -> Vec<u8> {
    let (at, value) = (at.to_le_bytes(), value.to_le_bytes());
    [&[0x66, 0xc7, 0x05][..], &at, &value].concat()
}

/// `mov dword [at], value`
fn write32(at: u32, value: u32) -> Vec<u8> {
    [&[0xc7, 0x05][..], &at.to_le_bytes(), &value.to_le_bytes()].concat()
}

/// Waits until one of the status bits is set: `again: mov al, [STATUS]; test al, bits; jz again`
fn wait_for_status(bits: u8) -> Vec<u8> {
    [
        &[0xa0][..],
        &STATUS.to_le_bytes(),
        &[0xa8, bits, 0x74, 0xf7],
    ]
    .concat()
}

/// Finds the device: BAR, memory decoding, bus mastering.
fn find() -> Vec<u8> {
    [
        config_write(0x10, BAR),
        config_write(0x14, 0),
        config_write(4, 6),
    ]
    .concat()
}

/// All that a driver does up to DRIVER_OK, with one queue of 64; then it says so.
fn start() -> Vec<u8> {
    [
        write8(STATUS, 3),
        // VIRTIO_F_VERSION_1.
        write32(BAR + 0x08, 1),
        write32(BAR + 0x0c, 1),
        write8(STATUS, 11),
        write16(BAR + 0x16, 0),
        write16(BAR + 0x18, 64),
        write32(BAR + 0x20, RINGS),
        write32(BAR + 0x28, RINGS + 0x1000),
        write32(BAR + 0x30, RINGS + 0x2000),
        write16(BAR + 0x1c, 1),
        write8(STATUS, 15),
        print("S"),
    ]
    .concat()
}

const GET_FEATURES: u32 = 1;
const SET_FEATURES: u32 = 2;
const SET_MEM_TABLE: u32 = 5;
const GET_VRING_BASE: u32 = 11;
const SET_VRING_KICK: u32 = 12;
const SET_VRING_CALL: u32 = 13;
const GET_PROTOCOL_FEATURES: u32 = 15;
const GET_CONFIG: u32 = 24;

/// VIRTIO_F_VERSION_1, VHOST_USER_F_PROTOCOL_FEATURES, VIRTIO_BLK_F_FLUSH.
const FEATURES: u64 = 1 << 32 | 1 << 30 | 1 << 9;
/// REPLY_ACK and CONFIG.
const PROTOCOL: u64 = 1 << 3 | 1 << 9;

/// The requests that came: number and body.
type Seen = Mutex<Vec<(u32, Vec<u8>)>>;

/// The last file that came with each kind of request.
type Files = Mutex<HashMap<u32, File>>;

/// A disk's back-end that answers requests and serves nothing.
struct Backend {
    stream: UnixStream,
    seen: Arc<Seen>,
    files: Arc<Files>,
    mute: Arc<AtomicBool>,
}

/// What a back-end is like.
#[derive(Clone, Copy)]
struct Manner {
    features: u64,
    /// The request at which it dies.
    dies_at: Option<u32>,
}

impl Default for Manner {
    fn default() -> Self {
        Self {
            features: FEATURES,
            dies_at: None,
        }
    }
}

impl Backend {
    fn accept(listener: &UnixListener) -> Self {
        Self::accept_as(listener, Manner::default())
    }

    fn accept_as(listener: &UnixListener, manner: Manner) -> Self {
        let (stream, _) = listener.accept().unwrap();
        let backend = Self {
            stream: stream.try_clone().unwrap(),
            seen: Arc::default(),
            files: Arc::default(),
            mute: Arc::default(),
        };
        let (seen, files) = (backend.seen.clone(), backend.files.clone());
        let mute = backend.mute.clone();
        std::thread::spawn(move || answer(stream, manner, &seen, &files, &mute));
        backend
    }

    /// The bodies of all requests of one kind so far.
    fn bodies(&self, request: u32) -> Vec<Vec<u8>> {
        let seen = self.seen.lock().unwrap();
        let of_kind = seen.iter().filter(|(r, _)| *r == request);
        of_kind.map(|(_, body)| body.clone()).collect()
    }

    fn count(&self, request: u32) -> usize {
        self.bodies(request).len()
    }

    /// Dies as a crashed process does.
    fn crash(&self) {
        self.stream.shutdown(Shutdown::Both).unwrap();
    }
}

fn answer(mut stream: UnixStream, manner: Manner, seen: &Seen, files: &Files, mute: &AtomicBool) {
    loop {
        let mut header = [0; 12];
        let Ok((12, file)) = stream.recv_with_fd(&mut header) else {
            return;
        };
        let word = |at: usize| u32::from_ne_bytes(header[at..at + 4].try_into().unwrap());
        let (request, flags) = (word(0), word(4));
        let mut body = vec![0; usize::try_from(word(8)).unwrap()];
        stream.read_exact(&mut body).unwrap();
        if let Some(file) = file {
            files.lock().unwrap().insert(request, file);
        }
        seen.lock().unwrap().push((request, body.clone()));
        if manner.dies_at == Some(request) {
            stream.shutdown(Shutdown::Both).unwrap();
            return;
        }
        let reply = match request {
            GET_FEATURES => manner.features.to_ne_bytes().to_vec(),
            GET_PROTOCOL_FEATURES => PROTOCOL.to_ne_bytes().to_vec(),
            GET_VRING_BASE | GET_CONFIG => body,
            _ if flags & 8 != 0 => vec![0; 8],
            _ => continue,
        };
        if mute.load(Ordering::SeqCst) {
            continue;
        }
        let mut bytes = request.to_ne_bytes().to_vec();
        bytes.extend(5u32.to_ne_bytes());
        bytes.extend(u32::try_from(reply.len()).unwrap().to_ne_bytes());
        bytes.extend(reply);
        if stream.write_all(&bytes).is_err() {
            return;
        }
    }
}

/// A guest of `code` with a disk whose back-end is played.
struct Setup {
    // Holds the socket and the kernel.
    _dir: tempfile::TempDir,
    listener: UnixListener,
    child: Child,
    backend: Backend,
}

impl Setup {
    fn new(code: &[Vec<u8>]) -> Self {
        Self::with_memory("64M", code)
    }

    fn with_memory(size: &str, code: &[Vec<u8>]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let kernel = kernel(dir.path(), &code.concat());
        let path = dir.path().join("disk");
        let listener = UnixListener::bind(&path).unwrap();
        let child = vmm()
            .arg("--kernel")
            .arg(kernel)
            .args(["--memory", size])
            .arg("--blk")
            .arg(&path)
            .spawn()
            .unwrap();
        let backend = Backend::accept(&listener);
        Self {
            _dir: dir,
            listener,
            child,
            backend,
        }
    }

    /// Waits for the guest's next letter.
    fn expect(&mut self, letter: &str) {
        let mut byte = [0];
        let stdout = self.child.stdout.as_mut().unwrap();
        if stdout.read_exact(&mut byte).is_err() {
            let mut why = String::new();
            let stderr = self.child.stderr.as_mut().unwrap();
            stderr.read_to_string(&mut why).unwrap();
            panic!("it has ended before {letter}: {why}");
        }
        assert_eq!(text(&byte), letter);
    }
}

#[test]
fn doorbells_reach_the_back_end_and_interrupts_the_guest_masked_or_not() {
    if !has_kvm("doorbells_reach_the_back_end_and_interrupts_the_guest_masked_or_not") {
        return;
    }
    const VECTOR: u8 = 0x40;
    const IDT: u32 = 0x38_0000;
    const IDT_POINTER: u32 = 0x39_0000;
    const MSIX_TABLE: u32 = BAR + 0x8000;
    const MSIX_PENDING: u32 = BAR + 0x4000;

    // mov esp, below the tables; sti; halt: hlt; jmp halt
    let wait = [&[0xbc][..], &IDT.to_le_bytes(), &[0xfb, 0xf4, 0xeb, 0xfd]].concat();
    // Says so, ends the interrupt at the local APIC, and does not return: not every KVM has an IRET.
    let handler = [print("I"), write32(0xfee0_00b0, 0), wait.clone()].concat();
    // Behind the jump to the rest of the code.
    let address = ENTRY + 5;
    let length = u32::try_from(handler.len()).unwrap();
    let gate = IDT + 8 * u32::from(VECTOR);
    let code = [
        [&[0xe9][..], &length.to_le_bytes()].concat(),
        handler,
        // A 32-bit interrupt gate to 0x10:address.
        write32(gate, 0x10 << 16 | address & 0xffff),
        write32(gate + 4, address & 0xffff_0000 | 0x8e00),
        write16(IDT_POINTER, 0x7ff),
        write32(IDT_POINTER + 2, IDT),
        // lidt [IDT_POINTER]
        [&[0x0f, 0x01, 0x1d][..], &IDT_POINTER.to_le_bytes()].concat(),
        // The local APIC is on, its spurious vector is 0xff.
        write32(0xfee0_00f0, 0x1ff),
        find(),
        // MSI-X is on. Vector 1 sends its message, once it is not masked.
        config_write(0x7c, 1 << 31),
        write32(MSIX_TABLE + 16, 0xfee0_0000),
        write32(MSIX_TABLE + 20, 0),
        write32(MSIX_TABLE + 24, VECTOR.into()),
        write16(BAR + 0x16, 0),
        write16(BAR + 0x1a, 1),
        start(),
        write16(DOORBELL, 0),
        // again: mov al, [MSIX_PENDING]; test al, 2; jz again
        [
            &[0xa0][..],
            &MSIX_PENDING.to_le_bytes(),
            &[0xa8, 2, 0x74, 0xf7],
        ]
        .concat(),
        print("P"),
        write32(MSIX_TABLE + 28, 0),
        wait,
    ];
    let mut setup = Setup::new(&code);
    setup.expect("S");
    let take = |request| {
        setup
            .backend
            .files
            .lock()
            .unwrap()
            .remove(&request)
            .unwrap()
    };
    let (mut kick, mut call) = (take(SET_VRING_KICK), take(SET_VRING_CALL));
    let (start, mut count) = (Instant::now(), [0; 8]);
    while kick.read(&mut count).is_err() {
        assert!(start.elapsed() < LIMIT, "the doorbell is not heard");
        std::thread::sleep(Duration::from_millis(2));
    }
    assert_eq!(u64::from_ne_bytes(count), 1);
    let one = 1u64.to_ne_bytes();
    call.write_all(&one).unwrap();
    setup.expect("P");
    setup.expect("I");
    for _ in 0..3 {
        call.write_all(&one).unwrap();
        setup.expect("I");
    }
    let output = terminate(setup.child, Signal::SIGTERM);
    assert_eq!(status(&output), 0, "{output:?}");
    assert!(output.stdout.is_empty(), "more interrupts than signals");
}

#[test]
fn a_driver_that_resets_the_device_stops_its_rings_and_starts_it_again() {
    if !has_kvm("a_driver_that_resets_the_device_stops_its_rings_and_starts_it_again") {
        return;
    }
    let code = [
        find(),
        start(),
        write16(DOORBELL, 0),
        write8(STATUS, 0),
        start(),
        // No bus master any more, as before a kexec; then DRIVER_OK again.
        config_write(4, 2),
        config_write(4, 6),
        write8(STATUS, 15),
        POWER_OFF.to_vec(),
    ];
    let mut setup = Setup::new(&code);
    setup.expect("S");
    setup.expect("S");
    let output = finish(setup.child);
    assert_eq!(status(&output), 0, "{output:?}");
    assert!(output.stderr.is_empty(), "{output:?}");
    let backend = setup.backend;
    assert_eq!(backend.count(SET_FEATURES), 3);
    assert_eq!(backend.count(SET_VRING_KICK), 3);
    assert_eq!(backend.count(GET_VRING_BASE), 3, "the last at the end");
}

#[test]
fn a_back_end_gets_all_of_the_guests_memory() {
    if !has_kvm("a_back_end_gets_all_of_the_guests_memory") {
        return;
    }
    const GIB: u64 = 1 << 30;
    let setup = Setup::with_memory("4G", &[find(), start(), POWER_OFF.to_vec()]);
    let output = finish(setup.child);
    assert_eq!(status(&output), 0, "{output:?}");
    let table = setup.backend.bodies(SET_MEM_TABLE).remove(0);
    assert_eq!(table[..4], 2u32.to_ne_bytes(), "number of regions");
    let words: Vec<u64> = table[8..]
        .chunks(8)
        .map(|word| u64::from_ne_bytes(word.try_into().unwrap()))
        .collect();
    // Guest address, size, (address in the VMM,) offset in the file.
    assert_eq!([words[0], words[1], words[3]], [0, 3 * GIB, 0]);
    assert_eq!([words[4], words[5], words[7]], [4 * GIB, GIB, 3 * GIB]);
}

#[test]
fn a_guest_learns_that_its_back_end_died_and_can_use_the_next_one() {
    if !has_kvm("a_guest_learns_that_its_back_end_died_and_can_use_the_next_one") {
        return;
    }
    let code = [
        find(),
        start(),
        wait_for_status(NEEDS_RESET),
        print("N"),
        write8(STATUS, 0),
        start(),
        SPIN.to_vec(),
    ];
    let mut setup = Setup::new(&code);
    setup.expect("S");
    setup.backend.crash();
    setup.expect("N");
    // Started without a back-end; the next one gets the queue when it comes.
    setup.expect("S");
    let backend = Backend::accept(&setup.listener);
    let start = Instant::now();
    while backend.count(SET_VRING_KICK) == 0 {
        assert!(start.elapsed() < LIMIT, "the device does not start");
        std::thread::sleep(Duration::from_millis(2));
    }
    let output = terminate(setup.child, Signal::SIGTERM);
    assert_eq!(status(&output), 0, "{output:?}");
    for message in ["the back-end is gone", "the back-end is back"] {
        assert!(text(&output.stderr).contains(message), "{output:?}");
    }
}

#[test]
fn the_machine_ends_although_its_back_end_is_dead_or_hangs() {
    if !has_kvm("the_machine_ends_although_its_back_end_is_dead_or_hangs") {
        return;
    }
    for hangs in [false, true] {
        let mut setup = Setup::new(&[find(), start(), SPIN.to_vec()]);
        setup.expect("S");
        if hangs {
            setup.backend.mute.store(true, Ordering::SeqCst);
        } else {
            setup.backend.crash();
        }
        let start = Instant::now();
        let output = terminate(setup.child, Signal::SIGTERM);
        assert_eq!(status(&output), 0, "{output:?}");
        assert!(start.elapsed() < Duration::from_secs(8));
    }
}

/// What the program says when the back-end of `option` is like this, behind `ringside-vmm: ` and with
/// `SOCKET` for its path. It ends with status 1.
fn refusal(option: &str, manner: Manner) -> String {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("socket");
    let listener = UnixListener::bind(&path).unwrap();
    let child = vmm()
        .arg("--kernel")
        .arg(kernel(dir.path(), &POWER_OFF))
        .arg(option)
        .arg(&path)
        .spawn()
        .unwrap();
    let _backend = Backend::accept_as(&listener, manner);
    let output = finish(child);
    assert_eq!(status(&output), 1, "{output:?}");
    assert!(output.stdout.is_empty(), "{output:?}");
    let message = text(&output.stderr);
    let message = message.strip_prefix("ringside-vmm: ").unwrap();
    message.replace(path.to_str().unwrap(), "SOCKET")
}

#[test]
fn a_socket_of_another_device_type_is_refused() {
    if !has_kvm("a_socket_of_another_device_type_is_refused") {
        return;
    }
    // VIRTIO_NET_F_MRG_RXBUF, _STATUS and _CTRL_VQ.
    let card = FEATURES & !(1 << 9) | 0b111 << 15;
    for (option, features, expected) in [
        (
            "--blk",
            card,
            "the back-end for device blk at SOCKET cannot be used: the back-end is not one of type blk: \
             it offers features that no block device has; give the socket to the option of its own type\n",
        ),
        (
            "--net",
            FEATURES,
            "the back-end for device net at SOCKET cannot be used: the back-end is not one of type net: \
             it offers the features of a block device; give the socket to the option of its own type\n",
        ),
    ] {
        let manner = Manner {
            features,
            ..Manner::default()
        };
        assert_eq!(refusal(option, manner), expected);
    }
}

#[test]
fn a_back_end_that_dies_before_the_guest_starts_is_reported() {
    if !has_kvm("a_back_end_that_dies_before_the_guest_starts_is_reported") {
        return;
    }
    for request in [GET_FEATURES, GET_PROTOCOL_FEATURES, GET_CONFIG] {
        let manner = Manner {
            dies_at: Some(request),
            ..Manner::default()
        };
        let message = refusal("--blk", manner);
        let expected = "the negotiation with the back-end for device blk at SOCKET failed: did it end, \
                        or is it no vhost-user back-end?: ";
        assert!(message.starts_with(expected), "{request}: {message}");
        assert_eq!(message.lines().count(), 1, "{request}: {message}");
    }
}

#[test]
fn there_is_room_for_many_devices() {
    if !has_kvm("there_is_room_for_many_devices") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    // Function 1 of device 1 is the last of 32: its vendor must not read as nobody's.
    let code = [
        &[0x66, 0xba, 0xf8, 0x0c, 0xb8, 0x00, 0x09, 0x00, 0x80, 0xef][..],
        &[0x66, 0xba, 0xfc, 0x0c, 0x66, 0xed], // mov dx, 0xcfc; in ax, dx
        &[0x66, 0xba, 0xf8, 0x03, 0xee],       // mov dx, 0x3f8; out dx, al
        &POWER_OFF,
    ];
    let mut command = vmm();
    command
        .arg("--kernel")
        .arg(kernel(dir.path(), &code.concat()));
    let mut backends = Vec::new();
    for n in 0..32 {
        let path = dir.path().join(n.to_string());
        let listener = UnixListener::bind(&path).unwrap();
        command.arg("--blk").arg(path);
        backends.push(std::thread::spawn(move || Backend::accept(&listener)));
    }
    let output = finish(command.spawn().unwrap());
    assert_eq!(status(&output), 0, "{output:?}");
    assert_eq!(output.stdout, [0xf4]);
    for backend in backends {
        assert_ne!(backend.join().unwrap().count(GET_CONFIG), 0);
    }
}

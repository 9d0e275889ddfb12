//! The XDP program on the interface: it sends each frame to the socket of the queue on which it came, or on to the host's
//! network if that has none.

use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;

use super::Failed;
use super::sys::{self, Instruction};

/// The program, attached to an interface as long as this lives, and its table of sockets.
#[derive(Debug)]
pub(super) struct Program {
    /// Holds it there; closing it takes it away, whatever ends this program.
    _link: OwnedFd,
    sockets: OwnedFd,
}

/// Loads a 32-bit word: a field of struct xdp_md (linux/bpf.h).
const LDX_W: u8 = 0x61;
/// Loads a constant of 64 bits, in two instructions.
const LD_DW: u8 = 0x18;
/// Loads a constant.
const MOV64: u8 = 0xb7;
/// Calls a function of the kernel.
const CALL: u8 = 0x85;
/// Returns.
const EXIT: u8 = 0x95;
/// Where `rx_queue_index` lies in struct xdp_md.
const RX_QUEUE_INDEX: i16 = 16;
/// In place of a source register: the constant is a descriptor of a map (BPF_PSEUDO_MAP_FD).
const MAP_FD: u8 = 1;
/// bpf_redirect_map, by number.
const REDIRECT_MAP: i32 = 51;
/// What the program returns for a queue without a socket (XDP_PASS).
const PASS: i32 = 2;

/// `return bpf_redirect_map(sockets, context->rx_queue_index, XDP_PASS)`.
fn instructions(sockets: i32) -> [Instruction; 6] {
    let op = |code, dst, src, off, imm| Instruction::new(code, dst, src, off, imm);
    [
        op(LDX_W, 2, 1, RX_QUEUE_INDEX, 0),
        op(LD_DW, 1, MAP_FD, 0, sockets),
        op(0, 0, 0, 0, 0),
        op(MOV64, 3, 0, 0, PASS),
        op(CALL, 0, 0, 0, REDIRECT_MAP),
        op(EXIT, 0, 0, 0, 0),
    ]
}

impl Program {
    /// Attaches it to an interface, with room for the sockets of this many queues.
    pub(super) fn attach(index: libc::c_int, queues: u16) -> Result<Self, Failed> {
        let doing = |what| move |errno: Errno| (what, errno);
        let sockets = sys::socket_map(queues.into()).map_err(doing("making a table of sockets"))?;
        let program = sys::load(&instructions(sockets.as_raw_fd()))
            .map_err(doing("loading the XDP program"))?;
        let link = sys::attach(&program, index).map_err(doing("attaching the XDP program"))?;
        Ok(Self {
            _link: link,
            sockets,
        })
    }

    /// Frames of a queue go to this socket from now on.
    pub(super) fn insert(&self, queue: u16, socket: BorrowedFd<'_>) -> Result<(), Failed> {
        sys::insert(&self.sockets, queue.into(), socket)
            .map_err(|errno| ("putting it into the table of sockets", errno))
    }

    /// Frames of a queue go to no socket from now on.
    pub(super) fn remove(&self, queue: u16) -> Result<(), Failed> {
        match sys::remove(&self.sockets, queue.into()) {
            Ok(()) | Err(Errno::ENOENT) => Ok(()),
            Err(errno) => Err(("taking it out of the table of sockets", errno)),
        }
    }
}

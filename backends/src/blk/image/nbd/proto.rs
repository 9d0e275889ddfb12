//! The NBD protocol (github.com/NetworkBlockDevice/nbd, doc/proto.md): the handshake, and messages as bytes.

use std::io::{self, Read, Write};

use serde::{Deserialize, Serialize};
use thiserror::Error;

/// "Newstyle negotiation": NBDMAGIC, IHAVEOPT.
const INIT_MAGIC: u64 = 0x4e42_444d_4147_4943;
const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
/// "Option haggling": magic of a reply.
const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
/// "Handshake flags", and client flags of the same bits.
const FIXED_NEWSTYLE: u16 = 1 << 0;
const NO_ZEROES: u16 = 1 << 1;

/// "Option types".
mod option {
    pub(super) const GO: u32 = 7;
    pub(super) const STRUCTURED_REPLY: u32 = 8;
}

/// "Option reply types".
mod reply {
    pub(super) const ACK: u32 = 1;
    pub(super) const INFO: u32 = 3;
    pub(super) const ERROR: u32 = 1 << 31;
    pub(super) const UNSUPPORTED: u32 = ERROR | 1;
    pub(super) const POLICY: u32 = ERROR | 2;
    pub(super) const TLS_REQUIRED: u32 = ERROR | 5;
    pub(super) const UNKNOWN: u32 = ERROR | 6;
    pub(super) const SHUTDOWN: u32 = ERROR | 7;
    pub(super) const BLOCK_SIZE_REQUIRED: u32 = ERROR | 8;
}

/// "Information types" of NBD_OPT_GO.
mod info {
    pub(super) const EXPORT: u16 = 0;
    pub(super) const BLOCK_SIZE: u16 = 3;
}

/// "Transmission flags".
mod flag {
    pub(super) const HAS_FLAGS: u16 = 1 << 0;
    pub(super) const READ_ONLY: u16 = 1 << 1;
    pub(super) const SEND_FLUSH: u16 = 1 << 2;
    pub(super) const SEND_FUA: u16 = 1 << 3;
    pub(super) const SEND_TRIM: u16 = 1 << 5;
    pub(super) const SEND_WRITE_ZEROES: u16 = 1 << 6;
    pub(super) const CAN_MULTI_CONN: u16 = 1 << 8;
}

/// "Request types".
pub(super) mod command {
    pub(in super::super) const READ: u16 = 0;
    pub(in super::super) const WRITE: u16 = 1;
    pub(in super::super) const DISC: u16 = 2;
    pub(in super::super) const FLUSH: u16 = 3;
    pub(in super::super) const TRIM: u16 = 4;
    pub(in super::super) const WRITE_ZEROES: u16 = 6;
    /// "Command flags": the data is to be durable when the reply comes.
    pub(in super::super) const FLAG_FUA: u16 = 1 << 0;
    /// The range is to stay allocated.
    pub(in super::super) const FLAG_NO_HOLE: u16 = 1 << 1;
}

/// "Request message".
const REQUEST_MAGIC: u32 = 0x2560_9513;
/// "Simple reply message".
const SIMPLE_MAGIC: u32 = 0x6744_6698;
/// "Structured reply chunk message".
const STRUCTURED_MAGIC: u32 = 0x668e_33ef;
/// Length of a simple reply's header.
pub(super) const SIMPLE_LEN: usize = 16;
/// Length of a chunk's header.
pub(super) const CHUNK_LEN: usize = 20;

/// "Structured reply types".
pub(super) mod chunk {
    pub(in super::super) const FLAG_DONE: u16 = 1 << 0;
    pub(in super::super) const NONE: u16 = 0;
    pub(in super::super) const OFFSET_DATA: u16 = 1;
    pub(in super::super) const OFFSET_HOLE: u16 = 2;
    pub(in super::super) const ERROR: u16 = 1 << 15 | 1;
    pub(in super::super) const ERROR_OFFSET: u16 = 1 << 15 | 2;
}

/// Longest message of text, or list of information, that is read ("Strings").
const MAX_TEXT: u32 = 4096;
/// Most replies to one option: there are fewer informations.
const MAX_REPLIES: u32 = 64;
/// Most bytes in a request when the server does not say ("Block size constraints").
const DEFAULT_MAX: u32 = 32 << 20;

/// The server cannot be used.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum HandshakeError {
    /// The connection failed.
    #[error("the connection failed")]
    Io(#[from] io::Error),
    /// Something else listens there.
    #[error("it does not speak NBD (fixed newstyle)")]
    NotNbd,
    /// The server broke the protocol.
    #[error("the server broke the protocol: {0}")]
    Protocol(&'static str),
    /// There is no such export.
    #[error("the server has no such export{0}")]
    NoExport(String),
    /// TLS.
    #[error("the server wants TLS, which is not supported{0}")]
    Tls(String),
    /// The server does not want this client.
    #[error("the server refuses the export{0}")]
    Refused(String),
    /// NBD_OPT_GO is not known.
    #[error("the server is too old: it does not know NBD_OPT_GO")]
    TooOld,
    /// The export changed while the server was gone.
    #[error("the export is not what it was: {0}")]
    Changed(&'static str),
}

/// What an export is like.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Export {
    /// Size in bytes.
    pub(super) size: u64,
    flags: u16,
    /// Requests are multiples of this many bytes: a power of two.
    pub(super) min_block: u32,
    /// The best size of requests in bytes.
    pub(super) preferred_block: u32,
    /// Most bytes in a request.
    pub(super) max_block: u32,
    /// Reads are answered in chunks.
    pub(super) structured: bool,
}

impl Export {
    fn has(&self, flag: u16) -> bool {
        self.flags & (flag | flag::HAS_FLAGS) == flag | flag::HAS_FLAGS
    }

    pub(super) fn read_only(&self) -> bool {
        self.has(flag::READ_ONLY)
    }

    pub(super) fn flushes(&self) -> bool {
        self.has(flag::SEND_FLUSH)
    }

    pub(super) fn fua(&self) -> bool {
        self.has(flag::SEND_FUA)
    }

    pub(super) fn trims(&self) -> bool {
        self.has(flag::SEND_TRIM)
    }

    pub(super) fn zeroes(&self) -> bool {
        self.has(flag::SEND_WRITE_ZEROES)
    }

    /// What one connection wrote and flushed, all others see.
    pub(super) fn multi_conn(&self) -> bool {
        self.has(flag::CAN_MULTI_CONN)
    }

    /// Whether this export can take the place of `before`, on one of `connections`.
    pub(super) fn succeeds(&self, before: &Self, connections: usize) -> Result<(), HandshakeError> {
        if self.size < before.size {
            return Err(HandshakeError::Changed("it is smaller"));
        }
        if self.read_only() && !before.read_only() {
            return Err(HandshakeError::Changed("it is read-only"));
        }
        if self.min_block > before.min_block {
            return Err(HandshakeError::Changed("its blocks are larger"));
        }
        if (before.flushes() && !self.flushes()) || (before.zeroes() && !self.zeroes()) {
            return Err(HandshakeError::Changed("it cannot do as much"));
        }
        if connections > 1 && !self.multi_conn() {
            return Err(HandshakeError::Changed(
                "it wants one client, and the queues have connections of their own by now; let the server allow several, or \
                 start ringside-blk again",
            ));
        }
        Ok(())
    }
}

/// Opens an export on a new connection.
pub(super) fn handshake<S: Read + Write>(
    mut socket: S,
    name: &str,
) -> Result<Export, HandshakeError> {
    if read_u64(&mut socket)? != INIT_MAGIC || read_u64(&mut socket)? != OPTION_MAGIC {
        return Err(HandshakeError::NotNbd);
    }
    let flags = read_u16(&mut socket)?;
    if flags & FIXED_NEWSTYLE == 0 {
        return Err(HandshakeError::NotNbd);
    }
    let flags = flags & (FIXED_NEWSTYLE | NO_ZEROES);
    socket.write_all(&u32::from(flags).to_be_bytes())?;
    send_option(&mut socket, option::STRUCTURED_REPLY, &[])?;
    let structured = match read_reply(&mut socket, option::STRUCTURED_REPLY)? {
        (reply::ACK, _) => true,
        (kind, _) if kind & reply::ERROR != 0 => false,
        _ => {
            return Err(HandshakeError::Protocol(
                "a reply that NBD_OPT_STRUCTURED_REPLY has not",
            ));
        }
    };
    let mut export = Export {
        size: 0,
        flags: 0,
        min_block: 1,
        preferred_block: 0,
        max_block: DEFAULT_MAX,
        structured,
    };
    let mut data = Vec::new();
    let length = u32::try_from(name.len())
        .map_err(|_| HandshakeError::Protocol("the name of the export is too long"))?;
    data.extend_from_slice(&length.to_be_bytes());
    data.extend_from_slice(name.as_bytes());
    data.extend_from_slice(&1_u16.to_be_bytes());
    data.extend_from_slice(&info::BLOCK_SIZE.to_be_bytes());
    send_option(&mut socket, option::GO, &data)?;
    let mut known = false;
    for _ in 0..MAX_REPLIES {
        let (kind, data) = read_reply(&mut socket, option::GO)?;
        match kind {
            reply::ACK if known => return Ok(export),
            reply::ACK => {
                return Err(HandshakeError::Protocol("no size of the export"));
            }
            reply::INFO => known |= export.learn(&data)?,
            reply::UNSUPPORTED => return Err(HandshakeError::TooOld),
            reply::UNKNOWN => return Err(HandshakeError::NoExport(said(&data))),
            reply::TLS_REQUIRED => return Err(HandshakeError::Tls(said(&data))),
            reply::POLICY | reply::SHUTDOWN | reply::BLOCK_SIZE_REQUIRED => {
                return Err(HandshakeError::Refused(said(&data)));
            }
            _ if kind & reply::ERROR != 0 => return Err(HandshakeError::Refused(said(&data))),
            _ => return Err(HandshakeError::Protocol("a reply that NBD_OPT_GO has not")),
        }
    }
    Err(HandshakeError::Protocol("replies without an end"))
}

impl Export {
    /// Takes in an information of the server. Returns whether it is that of size and flags.
    fn learn(&mut self, data: &[u8]) -> Result<bool, HandshakeError> {
        let (kind, data) = data
            .split_first_chunk()
            .ok_or(HandshakeError::Protocol("an information without a type"))?;
        match (u16::from_be_bytes(*kind), data) {
            (info::EXPORT, [a, b, c, d, e, f, g, h, x, y]) => {
                self.size = u64::from_be_bytes([*a, *b, *c, *d, *e, *f, *g, *h]);
                self.flags = u16::from_be_bytes([*x, *y]);
                Ok(true)
            }
            (info::BLOCK_SIZE, [a, b, c, d, e, f, g, h, i, j, k, l]) => {
                self.min_block = u32::from_be_bytes([*a, *b, *c, *d]);
                self.preferred_block = u32::from_be_bytes([*e, *f, *g, *h]);
                let max = u32::from_be_bytes([*i, *j, *k, *l]);
                self.max_block = max.min(DEFAULT_MAX);
                if !self.min_block.is_power_of_two()
                    || self.min_block > 64 << 10
                    || self.max_block < self.min_block.max(512)
                {
                    return Err(HandshakeError::Protocol("impossible block sizes"));
                }
                // Parts of a request are multiples of the block.
                self.max_block -= self.max_block % self.min_block.max(512);
                Ok(false)
            }
            (info::EXPORT | info::BLOCK_SIZE, _) => Err(HandshakeError::Protocol(
                "an information of the wrong length",
            )),
            _ => Ok(false),
        }
    }
}

/// What the server said about an error, for the user.
fn said(data: &[u8]) -> String {
    let text = String::from_utf8_lossy(data);
    let text: String = text.chars().filter(|c| !c.is_control()).collect();
    if text.is_empty() {
        text
    } else {
        format!(" ({text})")
    }
}

fn send_option(socket: &mut impl Write, option: u32, data: &[u8]) -> io::Result<()> {
    let mut message = OPTION_MAGIC.to_be_bytes().to_vec();
    message.extend_from_slice(&option.to_be_bytes());
    let length = u32::try_from(data.len()).map_err(io::Error::other)?;
    message.extend_from_slice(&length.to_be_bytes());
    message.extend_from_slice(data);
    socket.write_all(&message)
}

fn read_reply(socket: &mut impl Read, option: u32) -> Result<(u32, Vec<u8>), HandshakeError> {
    if read_u64(socket)? != OPTION_REPLY_MAGIC || read_u32(socket)? != option {
        return Err(HandshakeError::Protocol("a reply to something else"));
    }
    let kind = read_u32(socket)?;
    let length = read_u32(socket)?;
    if length > MAX_TEXT {
        return Err(HandshakeError::Protocol("a reply that is too long"));
    }
    let mut data = vec![0; usize::try_from(length).unwrap_or(0)];
    socket.read_exact(&mut data)?;
    Ok((kind, data))
}

fn read_u16(socket: &mut impl Read) -> io::Result<u16> {
    let mut bytes = [0; 2];
    socket.read_exact(&mut bytes)?;
    Ok(u16::from_be_bytes(bytes))
}

fn read_u32(socket: &mut impl Read) -> io::Result<u32> {
    let mut bytes = [0; 4];
    socket.read_exact(&mut bytes)?;
    Ok(u32::from_be_bytes(bytes))
}

fn read_u64(socket: &mut impl Read) -> io::Result<u64> {
    let mut bytes = [0; 8];
    socket.read_exact(&mut bytes)?;
    Ok(u64::from_be_bytes(bytes))
}

/// Appends a request; the data of a write follows it.
pub(super) fn request(
    out: &mut Vec<u8>,
    (kind, flags): (u16, u16),
    cookie: u64,
    offset: u64,
    len: u32,
) {
    out.extend_from_slice(&REQUEST_MAGIC.to_be_bytes());
    out.extend_from_slice(&flags.to_be_bytes());
    out.extend_from_slice(&kind.to_be_bytes());
    out.extend_from_slice(&cookie.to_be_bytes());
    out.extend_from_slice(&offset.to_be_bytes());
    out.extend_from_slice(&len.to_be_bytes());
}

/// The header of a reply.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Reply {
    /// An error number, 0 for none. The data of a read follows.
    Simple {
        /// NBD's error number.
        error: u32,
        /// Of the request.
        cookie: u64,
    },
    /// A part of the answer; `len` bytes follow.
    Chunk {
        /// Nothing comes after it.
        done: bool,
        /// What follows.
        kind: u16,
        /// Of the request.
        cookie: u64,
        /// Length of what follows.
        len: u32,
    },
}

/// The next reply's header and its length; `None` if there are not enough bytes yet.
pub(super) fn parse_reply(bytes: &[u8]) -> Result<Option<(Reply, usize)>, &'static str> {
    match bytes {
        [a, b, c, d, ..]
            if !matches!(
                u32::from_be_bytes([*a, *b, *c, *d]),
                SIMPLE_MAGIC | STRUCTURED_MAGIC
            ) =>
        {
            Err("a reply without its magic number")
        }
        [0x67, _, _, _, e0, e1, e2, e3, a, b, c, d, e, f, g, h, ..] => Ok(Some((
            Reply::Simple {
                error: u32::from_be_bytes([*e0, *e1, *e2, *e3]),
                cookie: u64::from_be_bytes([*a, *b, *c, *d, *e, *f, *g, *h]),
            },
            SIMPLE_LEN,
        ))),
        [
            0x66,
            _,
            _,
            _,
            f0,
            f1,
            t0,
            t1,
            a,
            b,
            c,
            d,
            e,
            f,
            g,
            h,
            l0,
            l1,
            l2,
            l3,
            ..,
        ] => Ok(Some((
            Reply::Chunk {
                done: u16::from_be_bytes([*f0, *f1]) & chunk::FLAG_DONE != 0,
                kind: u16::from_be_bytes([*t0, *t1]),
                cookie: u64::from_be_bytes([*a, *b, *c, *d, *e, *f, *g, *h]),
                len: u32::from_be_bytes([*l0, *l1, *l2, *l3]),
            },
            CHUNK_LEN,
        ))),
        _ => Ok(None),
    }
}

/// The system's number for an error of NBD ("Error values").
pub(super) fn errno(error: u32) -> i32 {
    match error {
        1 => libc::EPERM,
        12 => libc::ENOMEM,
        22 => libc::EINVAL,
        28 => libc::ENOSPC,
        75 => libc::EOVERFLOW,
        95 => libc::EOPNOTSUPP,
        ESHUTDOWN => libc::ESHUTDOWN,
        _ => libc::EIO,
    }
}

/// The server is about to end ("Error values").
pub(super) const ESHUTDOWN: u32 = 108;

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A server whose words are known beforehand.
    struct Script {
        says: io::Cursor<Vec<u8>>,
        hears: Vec<u8>,
    }

    impl Read for Script {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            self.says.read(buffer)
        }
    }

    impl Write for Script {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.hears.extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn option_reply(option: u32, kind: u32, data: &[u8]) -> Vec<u8> {
        let mut bytes = OPTION_REPLY_MAGIC.to_be_bytes().to_vec();
        for word in [option, kind, u32::try_from(data.len()).unwrap()] {
            bytes.extend(word.to_be_bytes());
        }
        bytes.extend(data);
        bytes
    }

    fn greeting() -> Vec<u8> {
        [
            &INIT_MAGIC.to_be_bytes()[..],
            &OPTION_MAGIC.to_be_bytes(),
            &3_u16.to_be_bytes(),
            &option_reply(8, reply::ACK, &[]),
        ]
        .concat()
    }

    fn export_info(size: u64, flags: u16) -> Vec<u8> {
        let data = [&[0; 2][..], &size.to_be_bytes(), &flags.to_be_bytes()].concat();
        option_reply(7, reply::INFO, &data)
    }

    fn block_info(min: u32, max: u32) -> Vec<u8> {
        let mut data = info::BLOCK_SIZE.to_be_bytes().to_vec();
        for word in [min, 4096, max] {
            data.extend(word.to_be_bytes());
        }
        option_reply(7, reply::INFO, &data)
    }

    fn shake(says: Vec<u8>) -> Result<Export, HandshakeError> {
        let mut script = Script {
            says: io::Cursor::new(says),
            hears: Vec::new(),
        };
        handshake(&mut script, "disk")
    }

    #[test]
    fn an_export_says_what_it_is() {
        let ack = option_reply(7, reply::ACK, &[]);
        let says = [
            greeting(),
            export_info(1 << 20, 0x16d),
            block_info(1, 1 << 25),
            ack,
        ]
        .concat();
        let export = shake(says).unwrap();
        assert!(export.structured && export.flushes() && export.fua() && export.trims());
        assert!(export.zeroes() && export.multi_conn() && !export.read_only());
        assert_eq!((export.size, export.max_block), (1 << 20, 32 << 20));
    }

    #[test]
    fn each_refusal_has_its_reason() {
        let ack = || option_reply(7, reply::ACK, &[]);
        let cases = [
            (
                b"HTTP/1.1 400 Bad Request\r\n".to_vec(),
                "does not speak NBD",
            ),
            (greeting()[..30].to_vec(), "connection failed"),
            ([greeting(), ack()].concat(), "no size"),
            (
                [greeting(), option_reply(7, reply::UNKNOWN, b"no")].concat(),
                "no such export (no)",
            ),
            (
                [greeting(), option_reply(7, reply::TLS_REQUIRED, &[])].concat(),
                "TLS",
            ),
            (
                [greeting(), option_reply(7, reply::UNSUPPORTED, &[])].concat(),
                "too old",
            ),
            (
                [greeting(), option_reply(7, reply::POLICY, &[])].concat(),
                "refuses",
            ),
            ([greeting(), option_reply(7, 77, &[])].concat(), "has not"),
            (
                [greeting(), option_reply(9, reply::ACK, &[])].concat(),
                "something else",
            ),
            ([greeting(), block_info(3, 1 << 20)].concat(), "block sizes"),
            ([greeting(), block_info(512, 0)].concat(), "block sizes"),
            (
                [greeting(), option_reply(7, reply::INFO, &[0])].concat(),
                "without a type",
            ),
            (
                [greeting(), option_reply(7, reply::INFO, &[0, 0, 1])].concat(),
                "wrong length",
            ),
        ];
        for (says, reason) in cases {
            let message = shake(says).unwrap_err().to_string();
            assert!(message.contains(reason), "{message}: {reason}");
        }
        let mut endless = greeting();
        endless.extend(option_reply(7, reply::INFO, &[]));
        let at = endless.len() - 4;
        endless[at..].copy_from_slice(&u32::MAX.to_be_bytes());
        assert!(shake(endless).unwrap_err().to_string().contains("too long"));
    }

    proptest! {
        #[test]
        fn no_answer_of_a_server_is_a_reason_to_panic(bytes in prop::collection::vec(any::<u8>(), 0..200), at in 0..120_usize) {
            let _ = shake(bytes.clone());
            let _ = parse_reply(&bytes);
            let mut says = [greeting(), export_info(1 << 20, 0x16d), block_info(1, 1 << 25)].concat();
            says.truncate(at);
            says.extend(bytes);
            let _ = shake(says);
        }
    }
}

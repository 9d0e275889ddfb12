//! What a sender left to its card and a receiver does not take from its own: checksums, and the cutting of segments.
//!
//! Between guests this is the exception: most take both, and then nobody ever computes them. UDP fragments (UFO) are not made.

use virtio_bindings::virtio_net::{
    VIRTIO_NET_HDR_GSO_ECN, VIRTIO_NET_HDR_GSO_TCPV4, VIRTIO_NET_HDR_GSO_TCPV6,
    VIRTIO_NET_HDR_GSO_UDP_L4,
};
use vm_memory::VolatileSlice;

use super::frame::{
    ETHERNET, ETHERTYPE_IPV4, ETHERTYPE_IPV6, FRONT, Frame, HEADER, Header, PREFIX, Rest,
};
use super::policy::Form;
use crate::net::tx::MAX_FRAME;

/// Bytes of payload that a segment has at least if it is one of many: no sender in order has shorter ones (Linux:
/// tcp_min_snd_mss).
const MIN_SEGMENT: usize = 48;
/// Most segments that are cut of one frame; each counts for the turn of who sends it.
const MAX_SEGMENTS: usize = 65535_usize.div_ceil(MIN_SEGMENT);
/// Longest headers of such a frame, which each segment gets a copy of: Ethernet, IPv4 or IPv6 with options, and TCP.
const MAX_HEADERS: usize = 256;

const IPPROTO_TCP: u8 = 6;
const IPPROTO_UDP: u8 = 17;
/// Where TCP's header has its sequence number, its flags and its checksum (RFC 9293, 3.1).
const TCP_SEQUENCE: usize = 4;
const TCP_OFFSET: usize = 12;
const TCP_FLAGS: usize = 13;
const TCP_CHECKSUM: usize = 16;
const TCP_HEADER: usize = 20;
/// FIN and PSH: of the last segment only.
const TCP_LAST: u8 = 0x09;
/// CWR: of the first segment only (RFC 3168, 6.1.2).
const TCP_FIRST: u8 = 0x80;
/// Where UDP's header has its length and its checksum (RFC 768).
const UDP_LENGTH: usize = 4;
const UDP_CHECKSUM: usize = 6;
const UDP_HEADER: usize = 8;

/// Room for frames that are finished here.
#[derive(Debug)]
pub(super) struct Room {
    whole: Box<[u8]>,
    segment: Box<[u8]>,
}

impl Room {
    pub(super) fn new() -> Self {
        let room = || vec![0; HEADER + MAX_FRAME].into();
        Self {
            whole: room(),
            segment: room(),
        }
    }
}

/// The ones' complement sum of bytes, which are put behind those that were summed before (RFC 1071).
fn sum(bytes: &[u8], before: u32) -> u32 {
    let mut total = u64::from(before);
    let mut words = bytes.chunks_exact(4);
    for word in words.by_ref() {
        if let [a, b, c, d] = *word {
            total += u64::from(u32::from_be_bytes([a, b, c, d]));
        }
    }
    let mut last = [0; 4];
    for (place, byte) in last.iter_mut().zip(words.remainder()) {
        *place = *byte;
    }
    total += u64::from(u32::from_be_bytes(last));
    fold(total)
}

/// Folds carries in until 16 bits are left.
fn fold(total: u64) -> u32 {
    let mut total = total;
    while total > 0xffff {
        total = (total & 0xffff) + (total >> 16);
    }
    u32::try_from(total).unwrap_or(0xffff)
}

/// As it is written: never 0, which stands for no checksum in UDP and is the same as its complement elsewhere.
fn written(sum: u32) -> [u8; 2] {
    let sum = u16::try_from(sum).unwrap_or(0xffff);
    match !sum {
        0 => [0xff; 2],
        other => other.to_be_bytes(),
    }
}

fn put<const N: usize>(bytes: &mut [u8], at: usize, value: [u8; N]) -> Option<()> {
    *bytes.get_mut(at..)?.first_chunk_mut()? = value;
    Some(())
}

fn get<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..)?.first_chunk().copied()
}

/// How many segments a frame of `len` bytes is cut into at most; 0 if it is not cut.
pub(super) fn segments(header: &Header, len: usize) -> u64 {
    if !header.is_cut() {
        return 0;
    }
    let count = len.div_ceil(usize::from(header.gso_size).max(1));
    // Others are not cut.
    u64::try_from(count.min(MAX_SEGMENTS)).unwrap_or(u64::MAX)
}

/// Finishes a frame for a receiver that has to get it whole, and hands over what it becomes: one frame, or one for each
/// segment. `None` if it cannot be finished.
pub(super) fn finish(
    frame: &Frame<'_>,
    room: &mut Room,
    send: impl FnMut(&Frame<'_>),
) -> Option<()> {
    let len = frame.len();
    let Room { whole, segment } = room;
    let bytes = whole.get_mut(..len)?;
    // Without a tag, as offsets count from there. The header is dealt with here.
    let mut front = [0; FRONT];
    let packet = frame.packet(Form::Untagged, &mut front);
    let mut header = [0; HEADER];
    let mut left = packet.bytes(HEADER);
    if !left.copy_to(VolatileSlice::from(&mut header[..]))
        || !left.copy_to(VolatileSlice::from(&mut *bytes))
    {
        return None;
    }
    if frame.header.gso == 0 {
        complete(&frame.header, bytes)?;
        send_bytes(frame, bytes, send);
        return Some(());
    }
    cut(frame, bytes, segment, send)
}

/// Hands over a frame of finished bytes, in the same VLAN.
fn send_bytes(frame: &Frame<'_>, bytes: &[u8], mut send: impl FnMut(&Frame<'_>)) {
    let (first, rest) = bytes.split_at(PREFIX.min(bytes.len()));
    let beginning = &frame.with(first, rest.len());
    let rest = &Rest::Bytes(rest);
    send(&Frame { beginning, rest });
}

/// Puts in the checksum that the header asks for; the field holds the sum of the pseudo header already.
fn complete(header: &Header, bytes: &mut [u8]) -> Option<()> {
    let start = usize::from(header.csum_start);
    let sum = sum(bytes.get(start..)?, 0);
    put(bytes, start + usize::from(header.csum_offset), written(sum))
}

/// Cuts a frame into segments, each with headers of its own.
fn cut(
    frame: &Frame<'_>,
    bytes: &[u8],
    segment: &mut [u8],
    mut send: impl FnMut(&Frame<'_>),
) -> Option<()> {
    let start = usize::from(frame.header.csum_start);
    let ipv4 = match frame.ethertype() {
        ETHERTYPE_IPV4 => true,
        ETHERTYPE_IPV6 => false,
        _ => return None,
    };
    // The sum begins where TCP or UDP does; IPv6 may have more headers before that.
    let network = if ipv4 { 20 } else { 40 };
    if start < ETHERNET + network {
        return None;
    }
    let kind = u32::from(frame.header.gso) & !VIRTIO_NET_HDR_GSO_ECN;
    let tcp = match (kind, usize::from(frame.header.csum_offset)) {
        (VIRTIO_NET_HDR_GSO_TCPV4 | VIRTIO_NET_HDR_GSO_TCPV6, TCP_CHECKSUM) => true,
        (VIRTIO_NET_HDR_GSO_UDP_L4, UDP_CHECKSUM) => false,
        _ => return None,
    };
    let transport = if tcp {
        let [offset] = get(bytes, start + TCP_OFFSET)?;
        usize::from(offset >> 4) * 4
    } else {
        UDP_HEADER
    };
    if tcp && transport < TCP_HEADER {
        return None;
    }
    let headers = start + transport;
    if headers > MAX_HEADERS {
        return None;
    }
    let (head, payload) = bytes.split_at_checked(headers)?;
    let size = usize::from(frame.header.gso_size);
    if size == 0 || payload.len().div_ceil(size) > MAX_SEGMENTS {
        return None;
    }
    let count = payload.len().div_ceil(size);
    for (number, part) in payload.chunks(size).enumerate() {
        let len = headers + part.len();
        let out = segment.get_mut(..len)?;
        let (place, behind) = out.split_at_mut_checked(headers)?;
        place.copy_from_slice(head);
        behind.copy_from_slice(part);
        if ipv4 {
            let total = u16::try_from(len - ETHERNET).ok()?;
            put(out, ETHERNET + 2, total.to_be_bytes())?;
            let id = get(out, ETHERNET + 4).map(u16::from_be_bytes)?;
            let id = id.wrapping_add(u16::try_from(number).ok()?);
            put(out, ETHERNET + 4, id.to_be_bytes())?;
            put(out, ETHERNET + 10, [0; 2])?;
            let header = sum(out.get(ETHERNET..start)?, 0);
            put(out, ETHERNET + 10, written(header))?;
        } else {
            let payload = u16::try_from(len - ETHERNET - 40).ok()?;
            put(out, ETHERNET + 4, payload.to_be_bytes())?;
        }
        let of_transport = len - start;
        if tcp {
            let sequence = get(out, start + TCP_SEQUENCE).map(u32::from_be_bytes)?;
            let sequence = sequence.wrapping_add(u32::try_from(number * size).ok()?);
            put(out, start + TCP_SEQUENCE, sequence.to_be_bytes())?;
            let [mut flags] = get(out, start + TCP_FLAGS)?;
            if number + 1 < count {
                flags &= !TCP_LAST;
            }
            if number > 0 {
                flags &= !TCP_FIRST;
            }
            put(out, start + TCP_FLAGS, [flags])?;
        } else {
            let length = u16::try_from(of_transport).ok()?;
            put(out, start + UDP_LENGTH, length.to_be_bytes())?;
        }
        let at = start + usize::from(frame.header.csum_offset);
        put(out, at, [0; 2])?;
        // The pseudo header (RFC 9293, 3.1; RFC 8200, 8.1): both addresses, the length and the protocol.
        let addresses = if ipv4 {
            ETHERNET + 12..ETHERNET + 20
        } else {
            ETHERNET + 8..ETHERNET + 40
        };
        let protocol = if tcp { IPPROTO_TCP } else { IPPROTO_UDP };
        let pseudo = sum(out.get(addresses)?, 0);
        let length = u64::try_from(of_transport).ok()?;
        let pseudo = fold(u64::from(pseudo) + length + u64::from(protocol));
        let total = sum(out.get(start..)?, pseudo);
        put(out, at, written(total))?;
        send_bytes(frame, out, &mut send);
    }
    Some(())
}

//! A frame on its way through the switch.
//!
//! Its first bytes are copied once when it comes in: all that is decided is decided on this copy, and it is the copy that
//! goes out. A guest that changes the frame meanwhile changes what its rest says, not who it is from. In the copy there is no
//! VLAN tag: which VLAN the frame is in stands beside it, so that a tag that is taken off or put in costs nothing.
//!
//! ```text
//!  guest memory  [virtio-net header│addresses│tag│type…          │ rest of the frame          ]
//!                      Header         ╰───── prefix ─────╯ vlan          Rest, not copied yet
//! ```

use std::ops::{Deref, Range};

use ringside_rings::{Segment, in_one_region};
use virtio_bindings::virtio_net::{
    VIRTIO_NET_HDR_F_NEEDS_CSUM, VIRTIO_NET_HDR_GSO_ECN, VIRTIO_NET_HDR_GSO_NONE,
    VIRTIO_NET_HDR_GSO_TCPV4, VIRTIO_NET_HDR_GSO_TCPV6, VIRTIO_NET_HDR_GSO_UDP,
    VIRTIO_NET_HDR_GSO_UDP_L4,
};
use vm_memory::bitmap::BitmapSlice;
use vm_memory::{Address, GuestMemory, Permissions, VolatileSlice};

use super::policy::{Form, Vlans};
use crate::net::hash::Report;
use crate::shell::Memory;

pub(super) const ETHERTYPE_IPV4: u16 = 0x0800;
pub(super) const ETHERTYPE_ARP: u16 = 0x0806;
pub(super) const ETHERTYPE_RARP: u16 = 0x8035;
pub(super) const ETHERTYPE_IPV6: u16 = 0x86dd;
/// Type of a frame with a VLAN tag (IEEE 802.1Q, 9.4).
const ETHERTYPE_VLAN: u16 = 0x8100;

/// Length of an Ethernet header.
pub(super) const ETHERNET: usize = 14;
/// Length of a VLAN tag.
const TAG: usize = 4;
/// Where a tag stands: behind both addresses.
const TAG_AT: usize = 12;
/// Bytes that are copied when a frame comes in: enough for the headers up to a neighbour advertisement's target.
pub(super) const PREFIX: usize = 96;
/// The virtio-net header that links have, and most guests: with `num_buffers` (VIRTIO 1.3, 5.1.6).
pub(super) const HEADER: usize = 12;
/// The longest one, with a hash behind that (VIRTIO 1.3, 5.1.6).
pub(super) const LONGEST_HEADER: usize = 20;
/// Room for a header, and a prefix with a tag.
pub(super) const FRONT: usize = HEADER + PREFIX + TAG;

/// The virtio-net header of a frame, as far as it says anything about it (VIRTIO 1.3, 5.1.6).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Header {
    /// `flags`: NEEDS_CSUM or nothing.
    pub(super) needs_csum: bool,
    /// `gso_type`.
    pub(super) gso: u8,
    /// `hdr_len`: how long the headers are, as a hint.
    pub(super) hdr_len: u16,
    /// `gso_size`: bytes of payload of each segment.
    pub(super) gso_size: u16,
    /// `csum_start`: from where on to sum.
    pub(super) csum_start: u16,
    /// `csum_offset`: where to put the sum, from there.
    pub(super) csum_offset: u16,
}

/// VIRTIO_NET_HDR_GSO_NONE, as `gso_type` has it.
const GSO_NONE: u8 = 0;

/// Offloads that a frame can need, as `TUN_F_*`.
pub(super) const CSUM: u32 = libc::TUN_F_CSUM;
/// Those of UDP segmentation, which are one.
const USO: u32 = libc::TUN_F_USO4 | libc::TUN_F_USO6;

impl Header {
    /// Of a frame that is complete.
    const NONE: Self = Self {
        needs_csum: false,
        gso: 0,
        hdr_len: 0,
        gso_size: 0,
        csum_start: 0,
        csum_offset: 0,
    };

    /// Reads the header of a frame of `len` bytes. `None` if it says what cannot be.
    #[inline]
    pub(super) fn parse(bytes: [u8; 10], len: usize) -> Option<Self> {
        let [flags, gso, h0, h1, g0, g1, s0, s1, o0, o1] = bytes;
        let header = Self {
            needs_csum: u32::from(flags) & VIRTIO_NET_HDR_F_NEEDS_CSUM != 0,
            gso,
            hdr_len: u16::from_le_bytes([h0, h1]),
            gso_size: u16::from_le_bytes([g0, g1]),
            csum_start: u16::from_le_bytes([s0, s1]),
            csum_offset: u16::from_le_bytes([o0, o1]),
        };
        if header.is_plain() {
            return Some(Self::NONE);
        }
        let sum_ends = usize::from(header.csum_start) + usize::from(header.csum_offset) + 2;
        let whole = usize::from(header.csum_start) >= ETHERNET && sum_ends <= len;
        // Segments need their checksum (VIRTIO 1.3, 5.1.6.2), and a size.
        (header.needs_csum && whole && (gso == 0 || header.gso_size > 0)).then_some(header)
    }

    /// The frame is complete.
    #[inline]
    pub(super) fn is_plain(&self) -> bool {
        !self.needs_csum && self.gso == 0
    }

    /// The frame is to be cut into segments.
    #[inline]
    pub(super) fn is_cut(&self) -> bool {
        u32::from(self.gso) & !VIRTIO_NET_HDR_GSO_ECN != VIRTIO_NET_HDR_GSO_NONE
    }

    /// The offloads that a receiver must know, a set of `TUN_F_*`; none if nobody knows the kind.
    #[inline]
    pub(super) fn needs(&self) -> Option<u32> {
        let kind = match u32::from(self.gso) & !VIRTIO_NET_HDR_GSO_ECN {
            VIRTIO_NET_HDR_GSO_NONE => 0,
            VIRTIO_NET_HDR_GSO_TCPV4 => libc::TUN_F_TSO4,
            VIRTIO_NET_HDR_GSO_TCPV6 => libc::TUN_F_TSO6,
            VIRTIO_NET_HDR_GSO_UDP => libc::TUN_F_UFO,
            VIRTIO_NET_HDR_GSO_UDP_L4 => USO,
            _ => return None,
        };
        let ecn = u32::from(self.gso) & VIRTIO_NET_HDR_GSO_ECN != 0;
        Some(
            kind | if self.needs_csum { CSUM } else { 0 }
                | if ecn { libc::TUN_F_TSO_ECN } else { 0 },
        )
    }

    /// As it is written before a frame that has `longer` bytes more in front of its checksum. `num_buffers` is 1.
    #[inline]
    fn bytes(&self, longer: u16) -> [u8; HEADER] {
        if self.is_plain() {
            return [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0];
        }
        let [h0, h1] = self.hdr_len.saturating_add(longer).to_le_bytes();
        let [g0, g1] = self.gso_size.to_le_bytes();
        let [s0, s1] = self.csum_start.saturating_add(longer).to_le_bytes();
        let [o0, o1] = self.csum_offset.to_le_bytes();
        let flags = u8::from(self.needs_csum);
        [flags, self.gso, h0, h1, g0, g1, s0, s1, o0, o1, 1, 0]
    }
}

/// What follows the prefix of a frame, or of several that came in together.
#[derive(Debug)]
pub(super) enum Rest<'a> {
    /// It lies in the memory of a guest, which may change it at any time.
    Guest {
        /// That memory.
        memory: &'a Memory,
        /// The chains of all of them.
        segments: &'a [Segment],
    },
    /// It lies in memory of ours.
    Bytes(&'a [u8]),
}

/// An address is of a group (IEEE 802, 8.2.2).
#[inline]
pub(super) fn is_group(address: u64) -> bool {
    address >> 40 & 1 != 0
}

/// What is known of a frame from its first bytes.
#[derive(Debug)]
pub(super) struct Beginning {
    /// What is yet to be done for it.
    pub(super) header: Header,
    /// Its header as it goes out, with room in front of it for a longer one that came in, and first bytes, without a tag. What is
    /// behind those is of other frames.
    front: [u8; LONGEST_HEADER + PREFIX],
    prefix_len: usize,
    /// The VLAN that it is in.
    pub(super) vlan: u16,
    /// Priority and drop eligibility, as in the tag it came with.
    priority: u16,
    /// How many bytes are behind the first ones.
    rest_len: usize,
    /// Which segments are its chain, if those are in the memory of a guest.
    segments: Range<usize>,
    /// Bytes of them that came in with the first ones.
    skip: usize,
}

/// A frame: two references, which stay in registers. What was written a moment ago in small parts, and is copied in large ones, has
/// a processor wait until all of the frame before is in its cache (a store that cannot be forwarded).
#[derive(Debug, Clone, Copy)]
pub(super) struct Frame<'a> {
    /// How it begins.
    pub(super) beginning: &'a Beginning,
    /// Where the bytes behind are.
    pub(super) rest: &'a Rest<'a>,
}

impl Deref for Frame<'_> {
    type Target = Beginning;

    #[inline]
    fn deref(&self) -> &Beginning {
        self.beginning
    }
}

/// Why a frame goes no further.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Refused {
    /// It is no frame, or its header says what cannot be.
    Malformed,
    /// It is in a VLAN that its port does not belong to.
    Vlan,
}

impl Beginning {
    /// Of no frame.
    pub(super) const fn new() -> Self {
        Self {
            header: Header::NONE,
            front: [0; LONGEST_HEADER + PREFIX],
            prefix_len: 0,
            vlan: 0,
            priority: 0,
            rest_len: 0,
            segments: 0..0,
            skip: 0,
        }
    }

    /// What is behind its first bytes is in these segments, behind `skip` bytes.
    #[inline]
    pub(super) fn goes_on(&mut self, segments: Range<usize>, skip: usize) {
        (self.segments, self.skip) = (segments, skip);
    }

    /// Where the first `len` bytes of a frame are to be put, its header of `header_len` included; `None` if those are too many.
    #[inline]
    pub(super) fn place(&mut self, header_len: usize, len: usize) -> Option<&mut [u8]> {
        let start = LONGEST_HEADER.checked_sub(header_len)?;
        self.front.get_mut(start..start.checked_add(len)?)
    }

    /// Understands what was put there: a frame with a header of `header_len` bytes, `prefix_len` bytes, and `rest_len` that
    /// are elsewhere, at a port of these VLANs.
    #[inline]
    pub(super) fn understand(
        &mut self,
        header_len: usize,
        prefix_len: usize,
        rest_len: usize,
        vlans: &Vlans,
    ) -> Result<(), Refused> {
        let header = self.place(header_len, header_len);
        let header = header.and_then(|header| header.first_chunk::<10>().copied());
        let header = header.ok_or(Refused::Malformed)?;
        if prefix_len < ETHERNET {
            return Err(Refused::Malformed);
        }
        let len = prefix_len.saturating_add(rest_len);
        self.header = Header::parse(header, len).ok_or(Refused::Malformed)?;
        (self.prefix_len, self.rest_len, self.priority) = (prefix_len, rest_len, 0);
        let mut tag = 0;
        if self.ethertype() == ETHERTYPE_VLAN {
            let control = self.bytes_at(ETHERNET).map(u16::from_be_bytes);
            let control = control.ok_or(Refused::Malformed)?;
            (tag, self.priority) = (control & 0x0fff, control & 0xf000);
            self.untag()?;
        }
        self.vlan = vlans.of(tag).ok_or(Refused::Vlan)?;
        self.write_header();
        Ok(())
    }

    /// Understands what was put there, as [`understand`](Self::understand) would, if it is a complete frame without a tag that has
    /// addresses, type and VLAN of `other`: all that decides about where it goes, unless what a frame says of IP addresses does.
    #[inline]
    pub(super) fn is_like(
        &mut self,
        other: &Self,
        header_len: usize,
        prefix_len: usize,
        rest_len: usize,
        vlans: &Vlans,
    ) -> bool {
        let flags = self.place(header_len, header_len);
        let flags = flags.and_then(|header| header.first_chunk::<2>().copied());
        let Some([flags, GSO_NONE]) = flags else {
            return false;
        };
        if u32::from(flags) & VIRTIO_NET_HDR_F_NEEDS_CSUM != 0
            || prefix_len < ETHERNET
            || self.bytes_of_ethernet::<ETHERNET>(0) != other.bytes_of_ethernet(0)
            || self.has_inner_tag()
            || vlans.of(0) != Some(other.vlan)
        {
            return false;
        }
        (self.prefix_len, self.rest_len, self.priority) = (prefix_len, rest_len, 0);
        (self.header, self.vlan) = (Header::NONE, other.vlan);
        self.write_header();
        true
    }

    /// The frame in `bytes`, a header of [`HEADER`] bytes in front, at a port of these VLANs. Returns what is behind its
    /// beginning.
    pub(super) fn begin<'b>(
        &mut self,
        bytes: &'b [u8],
        vlans: &Vlans,
    ) -> Result<&'b [u8], Refused> {
        let count = bytes.len().min(HEADER + PREFIX);
        let (first, rest) = bytes.split_at_checked(count).ok_or(Refused::Malformed)?;
        let prefix_len = count.checked_sub(HEADER).ok_or(Refused::Malformed)?;
        let place = self.place(HEADER, count).ok_or(Refused::Malformed)?;
        place.copy_from_slice(first);
        self.understand(HEADER, prefix_len, rest.len(), vlans)?;
        Ok(rest)
    }

    /// Another frame in its place, in the same VLAN: a complete one that begins with `first`, `rest_len` bytes behind it.
    pub(super) fn with(&self, first: &[u8], rest_len: usize) -> Self {
        let mut other = Self {
            prefix_len: first.len().min(PREFIX),
            vlan: self.vlan,
            priority: self.priority,
            rest_len,
            ..Self::new()
        };
        other.write_header();
        for (place, byte) in other.front.iter_mut().skip(LONGEST_HEADER).zip(first) {
            *place = *byte;
        }
        other
    }

    #[inline]
    fn write_header(&mut self) {
        let place = self.front.get_mut(LONGEST_HEADER - HEADER..);
        if let Some(place) = place.and_then(<[u8]>::first_chunk_mut) {
            *place = self.header.bytes(0);
        }
    }

    /// Writes header and first bytes with a tag.
    fn tag(&self, room: &mut [u8; FRONT]) {
        let (header, place) = room.split_at_mut(HEADER);
        header.copy_from_slice(&self.header.bytes(4));
        let prefix = self.prefix();
        let (addresses, behind) = prefix.split_at_checked(TAG_AT).unwrap_or((prefix, &[]));
        if let Some((before, after)) = place.split_at_mut_checked(TAG_AT) {
            if let Some(before) = before.get_mut(..addresses.len()) {
                before.copy_from_slice(addresses);
            }
            if let Some(tag) = after.first_chunk_mut::<TAG>() {
                let [t0, t1] = ETHERTYPE_VLAN.to_be_bytes();
                let [c0, c1] = (self.priority | self.vlan).to_be_bytes();
                *tag = [t0, t1, c0, c1];
            }
            if let Some(after) = after.get_mut(TAG..TAG + behind.len()) {
                after.copy_from_slice(behind);
            }
        }
    }

    /// Takes the tag off.
    fn untag(&mut self) -> Result<(), Refused> {
        if self.prefix_len < ETHERNET + TAG {
            return Err(Refused::Malformed);
        }
        let end = LONGEST_HEADER + self.prefix_len;
        if let Some(prefix) = self.front.get_mut(LONGEST_HEADER..end) {
            prefix.copy_within(TAG_AT + TAG.., TAG_AT);
        }
        self.prefix_len -= TAG;
        let header = &mut self.header;
        if !header.is_plain() {
            let tag = 4;
            let start = header.csum_start.checked_sub(tag);
            header.csum_start = start
                .filter(|&start| usize::from(start) >= ETHERNET)
                .ok_or(Refused::Malformed)?;
            header.hdr_len = header.hdr_len.saturating_sub(tag);
        }
        Ok(())
    }

    /// The first bytes, without a tag.
    #[inline]
    pub(super) fn prefix(&self) -> &[u8] {
        self.front
            .get(LONGEST_HEADER..LONGEST_HEADER + self.prefix_len)
            .unwrap_or_default()
    }

    /// Bytes of the frame without a tag.
    #[inline]
    pub(super) fn len(&self) -> usize {
        self.prefix_len.saturating_add(self.rest_len)
    }

    /// Some of the first bytes, if they are there.
    #[inline]
    pub(super) fn bytes_at<const N: usize>(&self, offset: usize) -> Option<[u8; N]> {
        self.prefix().get(offset..)?.first_chunk().copied()
    }

    /// The same of an Ethernet header, which all frames have.
    #[inline]
    fn bytes_of_ethernet<const N: usize>(&self, offset: usize) -> Option<[u8; N]> {
        self.front
            .get(LONGEST_HEADER + offset..LONGEST_HEADER + ETHERNET)?
            .first_chunk()
            .copied()
    }

    /// The address at an offset, as a number of 48 bits.
    #[inline]
    fn address_at(&self, offset: usize) -> u64 {
        let bytes = self.bytes_of_ethernet(offset);
        bytes.map_or(0, u64::from_be_bytes) >> 16
    }

    /// Where it goes to, as a number.
    #[inline]
    pub(super) fn destination(&self) -> u64 {
        self.address_at(0)
    }

    /// Where it says that it comes from, as a number.
    #[inline]
    pub(super) fn source(&self) -> u64 {
        self.address_at(6)
    }

    /// What it carries.
    #[inline]
    pub(super) fn ethertype(&self) -> u16 {
        self.bytes_of_ethernet(TAG_AT).map_or(0, u16::from_be_bytes)
    }

    /// It goes to a group.
    #[inline]
    pub(super) fn is_to_group(&self) -> bool {
        is_group(self.destination())
    }

    /// It is between neighbours and never forwarded (IEEE 802.1Q, 8.6.3).
    #[inline]
    pub(super) fn is_link_local(&self) -> bool {
        self.destination() & !0xf == 0x0180_c200_0000
    }

    /// Without its tag it would have another one in its place, which would put it into a VLAN of its sender's choice.
    #[inline]
    pub(super) fn has_inner_tag(&self) -> bool {
        self.ethertype() == ETHERTYPE_VLAN
    }

    /// A number that is the same for all frames of a flow: addresses, and ports of TCP and UDP.
    pub(super) fn flow(&self) -> u32 {
        let (addresses, next, payload) = match self.ethertype() {
            ETHERTYPE_IPV4 => {
                let [first] = self.bytes_at(ETHERNET).unwrap_or_default();
                let header = usize::from(first & 0xf) * 4;
                // Fragments have no ports, but for the first.
                let fragment = self.bytes_at(ETHERNET + 6).map_or(0, u16::from_be_bytes);
                let whole = fragment & 0x3fff == 0;
                let payload = whole.then_some(ETHERNET + header);
                (
                    ETHERNET + 12..ETHERNET + 20,
                    self.bytes_at(ETHERNET + 9),
                    payload,
                )
            }
            ETHERTYPE_IPV6 => (
                ETHERNET + 8..ETHERNET + 40,
                self.bytes_at(ETHERNET + 6),
                Some(ETHERNET + 40),
            ),
            _ => (0..12, None, None),
        };
        let ports = match (next, payload) {
            (Some([6 | 17]), Some(at)) => self.bytes_at::<4>(at).unwrap_or_default(),
            _ => [0; 4],
        };
        let bytes = self.prefix().get(addresses).unwrap_or_default();
        let mut hash = u32::from_be_bytes(ports);
        for word in bytes.chunks_exact(4) {
            let word = <[u8; 4]>::try_from(word).map_or(0, u32::from_be_bytes);
            hash = (hash.rotate_left(5) ^ word).wrapping_mul(0x9e37_79b9);
        }
        hash ^ hash >> 16
    }
}

impl<'a> Frame<'a> {
    /// The packet that goes out in this form; with a tag, it is put together in `room`.
    #[inline]
    pub(super) fn packet(&self, form: Form, room: &'a mut [u8; FRONT]) -> Packet<'a> {
        let beginning = self.beginning;
        let front = match form {
            Form::Untagged => &beginning.front[LONGEST_HEADER - HEADER..],
            Form::Tagged => {
                beginning.tag(room);
                &room[..]
            }
        };
        let longer = if form == Form::Tagged { TAG } else { 0 };
        let front_len = HEADER + beginning.prefix_len + longer;
        Packet {
            front: front.get(..front_len).unwrap_or_default(),
            frame: *self,
        }
    }

    /// The bytes behind its first ones.
    #[inline]
    fn left(&self) -> Left<'a> {
        match *self.rest {
            Rest::Guest { memory, segments } => Left::Guest {
                memory,
                segments: segments.get(self.segments.clone()).unwrap_or_default(),
                skip: self.skip,
            },
            Rest::Bytes(bytes) => Left::Bytes(bytes),
        }
    }
}

/// A frame in the form in which it goes out, its header in front.
#[derive(Debug, Clone, Copy)]
pub(super) struct Packet<'a> {
    /// Header and first bytes.
    front: &'a [u8],
    frame: Frame<'a>,
}

impl<'a> Packet<'a> {
    /// The first bytes of the frame, for filters.
    #[inline]
    pub(super) fn start(&self) -> &'a [u8] {
        self.front.get(HEADER..).unwrap_or_default()
    }

    /// Bytes with a header of `header_len`.
    #[inline]
    pub(super) fn len(&self, header_len: usize) -> usize {
        (self.front.len() + self.frame.rest_len + header_len).saturating_sub(HEADER)
    }

    /// All of it, with a header of `header_len` bytes, if it lies in one piece.
    #[inline]
    pub(super) fn whole(&self, header_len: usize) -> Option<&'a [u8]> {
        (self.frame.rest_len == 0 && header_len == HEADER).then_some(self.front)
    }

    /// All of it, from its beginning, with a header of `header_len` bytes that is no longer than [`HEADER`].
    #[inline]
    pub(super) fn bytes(&self, header_len: usize) -> Bytes<'a> {
        // A short header ends before `num_buffers`, and the frame follows it: its bytes are put together there.
        let (header, front) = if header_len == HEADER {
            (self.front, &[][..])
        } else {
            let header = self.front.get(..header_len).unwrap_or_default();
            (header, self.start())
        };
        Bytes {
            header,
            front,
            rest: self.frame.left(),
        }
    }

    /// The longest header, which is put together in `room`, and all of the frame.
    pub(super) fn bytes_with<'b>(
        &self,
        report: Report,
        room: &'b mut [u8; LONGEST_HEADER],
    ) -> Bytes<'b>
    where
        'a: 'b,
    {
        let header = self.front.iter().copied().take(HEADER);
        for (place, byte) in room.iter_mut().zip(header.chain(report.to_le_bytes())) {
            *place = byte;
        }
        Bytes {
            header: room,
            front: self.start(),
            rest: self.frame.left(),
        }
    }
}

/// What is left of a packet to copy.
#[derive(Debug)]
pub(super) struct Bytes<'a> {
    header: &'a [u8],
    front: &'a [u8],
    rest: Left<'a>,
}

/// What is left to copy of that behind its first bytes.
#[derive(Debug)]
enum Left<'a> {
    Guest {
        memory: &'a Memory,
        segments: &'a [Segment],
        /// Bytes of the segments that are not of it.
        skip: usize,
    },
    Bytes(&'a [u8]),
}

impl Bytes<'_> {
    /// Copies the next bytes until `to` is full. `false` if there are not enough.
    #[inline]
    pub(super) fn copy_to<B: BitmapSlice + Copy>(&mut self, to: VolatileSlice<'_, B>) -> bool {
        match self.header.split_at_checked(to.len()) {
            // A short frame into a buffer that has room for it.
            Some((now, later)) => {
                to.copy_from(now);
                self.header = later;
                true
            }
            None => self.copy_parts_to(to),
        }
    }

    #[inline(never)]
    fn copy_parts_to<B: BitmapSlice + Copy>(&mut self, to: VolatileSlice<'_, B>) -> bool {
        let mut to = to;
        for part in [&mut self.header, &mut self.front] {
            if part.is_empty() {
                continue;
            }
            let (now, later) = part.split_at_checked(to.len()).unwrap_or((part, &[]));
            to.copy_from(now);
            *part = later;
            match to.offset(now.len()) {
                Ok(left) if !left.is_empty() => to = left,
                _ => return true,
            }
        }
        match &mut self.rest {
            Left::Bytes(bytes) => {
                let (now, later) = bytes.split_at_checked(to.len()).unwrap_or((bytes, &[]));
                to.copy_from(now);
                *bytes = later;
                now.len() == to.len()
            }
            Left::Guest {
                memory,
                segments,
                skip,
            } => copy_from_guest(memory, segments, skip, to),
        }
    }
}

/// Copies from segments of one guest to memory of another, from byte `skip` on; both go on behind what was copied.
fn copy_from_guest<B: BitmapSlice + Copy>(
    memory: &Memory,
    segments: &mut &[Segment],
    skip: &mut usize,
    to: VolatileSlice<'_, B>,
) -> bool {
    let mut to = to;
    while !to.is_empty() {
        let Some((segment, later)) = segments.split_first() else {
            return false;
        };
        let len = usize::try_from(segment.len).unwrap_or(usize::MAX);
        let left = len.saturating_sub(*skip);
        if left == 0 {
            *skip = skip.saturating_sub(len);
            *segments = later;
            continue;
        }
        let count = left.min(to.len());
        let Some(start) = u64::try_from(*skip)
            .ok()
            .and_then(|skip| segment.addr.checked_add(skip))
        else {
            return false;
        };
        let copied = if let Some(from) = in_one_region(memory, start, count) {
            from.copy_to_volatile_slice(to);
            count
        } else {
            let Ok(slices) = memory.get_slices(start, count, Permissions::Read) else {
                return false;
            };
            let mut copied = 0;
            for slice in slices {
                let (Ok(from), Ok(place)) = (slice, to.offset(copied)) else {
                    return false;
                };
                from.copy_to_volatile_slice(place);
                copied += from.len();
            }
            copied
        };
        *skip += copied;
        match to.offset(copied) {
            Ok(left) => to = left,
            Err(_) => return true,
        }
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::net::switch::policy::VlanRange;

    fn bytes(packet: &Packet<'_>, header_len: usize) -> Vec<u8> {
        let mut out = vec![0; packet.len(header_len)];
        assert!(
            packet
                .bytes(header_len)
                .copy_to(VolatileSlice::from(&mut out[..]))
        );
        out
    }

    fn frame_bytes(tag: Option<u16>) -> Vec<u8> {
        let mut frame = vec![2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2];
        if let Some(tag) = tag {
            frame.extend([0x81, 0]);
            frame.extend(tag.to_be_bytes());
        }
        frame.extend([8, 0]);
        frame.extend(0..100);
        frame
    }

    fn trunk(native: Option<u16>) -> Vlans {
        let tagged: VlanRange = "5-6".parse().unwrap();
        Vlans::Trunk { tagged, native }
    }

    /// The beginning of a frame with this header, and what is behind.
    fn begin(
        header: [u8; 10],
        frame: &[u8],
        vlans: &Vlans,
    ) -> Result<(Beginning, Vec<u8>), Refused> {
        let mut beginning = Beginning::new();
        let packet = [&header[..], &[0; 2], frame].concat();
        let rest = beginning.begin(&packet, vlans)?.to_vec();
        Ok((beginning, rest))
    }

    fn plain(frame: &[u8], vlans: &Vlans) -> Result<(Beginning, Vec<u8>), Refused> {
        begin([0; 10], frame, vlans)
    }

    /// What goes out.
    fn out((beginning, rest): &(Beginning, Vec<u8>), form: Form, header_len: usize) -> Vec<u8> {
        let rest = &Rest::Bytes(rest);
        let frame = Frame { beginning, rest };
        bytes(&frame.packet(form, &mut [0; FRONT]), header_len)
    }

    #[test]
    fn a_tag_comes_off_and_goes_in() {
        let tagged = frame_bytes(Some(0xe005));
        let came = plain(&tagged, &trunk(None)).unwrap();
        assert_eq!((came.0.vlan, came.0.len()), (5, 114));
        assert_eq!(out(&came, Form::Untagged, 12)[12..], frame_bytes(None));
        let again = out(&came, Form::Tagged, 10);
        assert_eq!(again[..10], [0; 10]);
        assert_eq!(again[10..], tagged);
        let untagged = frame_bytes(None);
        assert_eq!(plain(&untagged, &trunk(None)).unwrap_err(), Refused::Vlan);
        let native = plain(&untagged, &trunk(Some(6))).unwrap();
        assert_eq!(out(&native, Form::Tagged, 12)[12..], frame_bytes(Some(6)));
        let elsewhere = frame_bytes(Some(7));
        assert_eq!(plain(&elsewhere, &trunk(None)).unwrap_err(), Refused::Vlan);
        let access = Vlans::Access(5);
        assert_eq!(plain(&tagged, &access).unwrap_err(), Refused::Vlan);
        let priority = frame_bytes(Some(0xe000));
        assert_eq!(plain(&priority, &access).unwrap().0.vlan, 5);
    }

    #[test]
    fn a_frame_like_another_has_its_addresses_type_and_vlan() {
        let vlans = trunk(Some(6));
        let like = |other: &[u8], header: [u8; 10], frame: &[u8]| {
            let (other, _) = plain(other, &vlans).unwrap();
            let packet = [&header[..], &[7; 2], frame].concat();
            let count = packet.len().min(HEADER + PREFIX);
            let (start, rest) = packet.split_at(count);
            let mut beginning = Beginning::new();
            let place = beginning.place(HEADER, count).unwrap();
            place.copy_from_slice(start);
            let (len, rest_len) = (count - HEADER, rest.len());
            let alike = beginning.is_like(&other, HEADER, len, rest_len, &vlans);
            alike.then(|| out(&(beginning, rest.to_vec()), Form::Tagged, 12))
        };
        let untagged = frame_bytes(None);
        let mut longer = untagged.clone();
        longer.extend([9; 30]);
        let expected = out(&plain(&longer, &vlans).unwrap(), Form::Tagged, 12);
        assert_eq!(like(&untagged, [0; 10], &longer), Some(expected.clone()));
        // That it is valid (DATA_VALID) is no word of a driver's.
        let valid = [2, 0, 9, 9, 9, 9, 9, 9, 9, 9];
        assert_eq!(like(&untagged, valid, &longer), Some(expected.clone()));
        assert_eq!(
            like(&frame_bytes(Some(6)), [0; 10], &longer),
            Some(expected)
        );
        let mut elsewhere = untagged.clone();
        elsewhere[11] ^= 1;
        let tagged = frame_bytes(Some(5));
        let inner = [&tagged[..12], &[0x81, 0, 0, 5][..], &tagged[12..]].concat();
        for (other, header, frame) in [
            (&untagged, [0; 10], &elsewhere),
            (&tagged, [0; 10], &untagged),
            (&tagged, [0; 10], &tagged),
            (&inner, [0; 10], &tagged),
            (&untagged, [1, 0, 0, 0, 0, 0, 34, 0, 16, 0], &untagged),
            (&untagged, [0, 1, 0, 0, 100, 0, 34, 0, 16, 0], &untagged),
        ] {
            assert_eq!(like(other, header, frame), None, "{frame:?}");
        }
        assert_eq!(like(&untagged, [0; 10], &untagged[..13]), None);
    }

    #[test]
    fn offsets_follow_the_tag() {
        let header = [1, 1, 58, 0, 0xa8, 5, 38, 0, 16, 0];
        let came = begin(header, &frame_bytes(Some(5)), &trunk(None)).unwrap();
        let parsed = came.0.header;
        assert_eq!((parsed.csum_start, parsed.hdr_len), (34, 54));
        assert_eq!(out(&came, Form::Tagged, 12)[..10], header);
        assert_eq!(out(&came, Form::Untagged, 12)[6], 34);
    }

    #[test]
    fn a_place_can_be_used_again() {
        let vlans = trunk(Some(6));
        let mut beginning = Beginning::new();
        let segment = [1, 1, 58, 0, 0xa8, 5, 38, 0, 16, 0];
        let first = [&segment[..], &[0; 2], &frame_bytes(Some(5))].concat();
        beginning.begin(&first, &vlans).unwrap();
        let short = &frame_bytes(None)[..60];
        let place = beginning.place(10, 70).unwrap();
        place.copy_from_slice(&[&[0; 10], short].concat());
        beginning.understand(10, 60, 0, &vlans).unwrap();
        let came = (beginning, Vec::new());
        assert_eq!(out(&came, Form::Untagged, 10)[10..], *short);
        assert_eq!(out(&came, Form::Untagged, 12)[10..12], [1, 0]);
        assert_eq!(out(&came, Form::Tagged, 12).len(), 12 + 64);
    }

    #[test]
    fn headers_that_cannot_be_are_refused() {
        let parse = |bytes| Header::parse(bytes, 100);
        assert!(parse([0; 10]).is_some_and(|header| header.is_plain()));
        // DATA_VALID is no word of a driver's (VIRTIO 1.3, 5.1.6.2), and does no harm.
        assert!(parse([2, 0, 9, 9, 9, 9, 9, 9, 9, 9]).is_some_and(|h| h.bytes(0)[..10] == [0; 10]));
        assert!(parse([1, 0, 0, 0, 0, 0, 34, 0, 16, 0]).is_some());
        for wrong in [
            [1, 0, 0, 0, 0, 0, 34, 0, 65, 0],
            [1, 0, 0, 0, 0, 0, 255, 255, 255, 255],
            [1, 0, 0, 0, 0, 0, 13, 0, 16, 0],
            [0, 1, 0, 0, 100, 0, 34, 0, 16, 0],
            [1, 1, 0, 0, 0, 0, 34, 0, 16, 0],
        ] {
            assert_eq!(parse(wrong), None, "{wrong:?}");
        }
        assert_eq!(
            parse([1, 9, 0, 0, 1, 0, 34, 0, 16, 0]).unwrap().needs(),
            None
        );
    }

    #[test]
    fn a_flow_has_one_number() {
        let mut tcp = frame_bytes(None);
        tcp[14] = 0x45;
        tcp[20..22].copy_from_slice(&[0, 0]);
        tcp[23] = 6;
        let flow = |bytes: &[u8]| plain(bytes, &Vlans::Access(1)).unwrap().0.flow();
        let first = flow(&tcp);
        tcp[60] ^= 1;
        assert_eq!(flow(&tcp), first);
        tcp[34] ^= 1;
        assert_ne!(flow(&tcp), first);
    }
}

//! The hash over addresses and ports of a packet that receive-side scaling and hash reports rest on (VIRTIO 1.3, 5.1.6.4.3).
//!
//! The hash is Toeplitz's: the exclusive or of a 32-bit window of the key for each bit of the input that is 1. Windows are
//! the same for all packets, so [`Toeplitz`] has their exclusive or for each value of each byte: one look-up a byte.

use std::fmt;

use virtio_bindings::virtio_net::{
    VIRTIO_NET_HASH_REPORT_IPv4, VIRTIO_NET_HASH_REPORT_IPv6, VIRTIO_NET_HASH_REPORT_NONE,
    VIRTIO_NET_HASH_REPORT_TCPv4, VIRTIO_NET_HASH_REPORT_TCPv6, VIRTIO_NET_HASH_REPORT_UDPv4,
    VIRTIO_NET_HASH_REPORT_UDPv6, VIRTIO_NET_RSS_HASH_TYPE_IPv4, VIRTIO_NET_RSS_HASH_TYPE_IPv6,
    VIRTIO_NET_RSS_HASH_TYPE_TCPv4, VIRTIO_NET_RSS_HASH_TYPE_TCPv6, VIRTIO_NET_RSS_HASH_TYPE_UDPv4,
    VIRTIO_NET_RSS_HASH_TYPE_UDPv6,
};

use super::config::ETHERTYPES_VLAN;

/// The most that is hashed: two addresses and two ports of IPv6.
pub(super) const INPUT: usize = 36;

/// The hash types that are known (VIRTIO 1.3, 5.1.6.4.3.1): all but those that look into extension headers of IPv6.
pub(super) const HASH_TYPES: u32 = VIRTIO_NET_RSS_HASH_TYPE_IPv4
    | VIRTIO_NET_RSS_HASH_TYPE_TCPv4
    | VIRTIO_NET_RSS_HASH_TYPE_UDPv4
    | VIRTIO_NET_RSS_HASH_TYPE_IPv6
    | VIRTIO_NET_RSS_HASH_TYPE_TCPv6
    | VIRTIO_NET_RSS_HASH_TYPE_UDPv6;

/// Bytes of a frame that may be looked at: [`MAX_TAGS`], IPv6 with [`MAX_EXTENSIONS`], and ports.
pub(super) const PEEK: usize = 256;

/// VLAN tags that are skipped to find the IP header.
pub(super) const MAX_TAGS: usize = 2;

/// Extension headers of IPv6 that are skipped to find the ports.
pub(super) const MAX_EXTENSIONS: usize = 4;

const ETHERTYPE_IPV4: u16 = 0x0800;
const ETHERTYPE_IPV6: u16 = 0x86dd;
pub(super) const PROTOCOL_TCP: u8 = 6;
pub(super) const PROTOCOL_UDP: u8 = 17;
/// Extension headers with a length in their second byte: hop-by-hop options, routing, destination options (RFC 8200, 4.1).
pub(super) const EXTENSIONS: [u8; 3] = [0, 43, 60];
/// "More fragments" and the offset (RFC 791, 3.1).
const FRAGMENT: u16 = 0x3fff;

/// A key, made ready.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct Toeplitz(Box<[[u32; 256]]>);

impl fmt::Debug for Toeplitz {
    /// Not nine thousand numbers.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Toeplitz")
    }
}

impl Toeplitz {
    /// `key` goes on with zeroes.
    pub(super) fn new(key: &[u8]) -> Self {
        let byte = |at: usize| u64::from(key.get(at).copied().unwrap_or(0));
        let tables = (0..INPUT).map(|at| {
            // The windows of a byte's eight bits lie in five bytes of the key.
            let window = (0..5).fold(0, |window, i| window << 8 | byte(at.saturating_add(i)));
            let of_bit = |bit: u32| u32::try_from(window >> (8 - bit) & 0xffff_ffff).unwrap_or(0);
            let mut table = [0; 256];
            for (value, place) in (0_u32..).zip(table.iter_mut()) {
                *place = (0..8)
                    .filter(|bit| value & 0x80 >> bit != 0)
                    .fold(0, |hash, bit| hash ^ of_bit(bit));
            }
            table
        });
        Self(tables.collect())
    }

    /// The key, as much of it as counts, without zeroes at its end.
    pub(super) fn key(&self) -> Vec<u8> {
        // What a byte's highest bit adds is the window that begins with that byte; what the lowest bit of the last one adds
        // ends with the last bit that counts.
        let entry = |table: &[u32; 256], value: usize| table.get(value).copied().unwrap_or(0);
        let first = self
            .0
            .iter()
            .map(|table| entry(table, 0x80).to_be_bytes()[0]);
        let rest = self.0.last().map_or(0, |table| entry(table, 1)) << 1;
        let mut key: Vec<u8> = first.chain(rest.to_be_bytes()).collect();
        key.truncate(
            key.iter()
                .rposition(|&byte| byte != 0)
                .map_or(0, |last| last + 1),
        );
        key
    }

    /// The look-up tables, one for each byte of the input.
    pub(super) fn tables(&self) -> &[[u32; 256]] {
        &self.0
    }

    /// Zeroes behind the input add nothing.
    fn hash(&self, input: &[u8; INPUT]) -> u32 {
        self.0.iter().zip(input).fold(0, |hash, (table, &byte)| {
            hash ^ table.get(usize::from(byte)).copied().unwrap_or(0)
        })
    }
}

/// What a driver wants to be hashed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Hashing {
    /// Of [`HASH_TYPES`].
    pub(super) types: u32,
    /// With its key.
    pub(super) toeplitz: Toeplitz,
}

/// What is reported for a packet: `hash_value` and `hash_report` (VIRTIO 1.3, 5.1.6.4.4).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Report {
    pub(super) value: u32,
    pub(super) kind: u16,
}

impl Report {
    /// Nothing was hashed.
    pub(super) const NONE: Self = Self {
        value: 0,
        kind: number(VIRTIO_NET_HASH_REPORT_NONE),
    };

    /// `hash_value`, `hash_report` and padding, as they lie in a header (VIRTIO 1.3, 5.1.6).
    pub(super) fn to_le_bytes(self) -> [u8; 8] {
        (u64::from(self.kind) << 32 | u64::from(self.value)).to_le_bytes()
    }
}

#[allow(
    clippy::cast_possible_truncation,
    reason = "constants of a 16-bit field (VIRTIO 1.3, 5.1.6.4.4)"
)]
const fn number(report: u32) -> u16 {
    report as u16
}

/// A packet that can be hashed.
struct Flow<'a> {
    version: Version,
    addresses: &'a [u8],
    transport: Option<(u8, [u8; 4])>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Version {
    V4,
    V6,
}

impl<'a> Flow<'a> {
    /// `frame` is the start of one, up to [`PEEK`] bytes of it.
    fn find(frame: &'a [u8]) -> Option<Self> {
        let mut rest = frame.get(12..)?;
        for _ in 0..MAX_TAGS {
            if ETHERTYPES_VLAN.contains(&u16_at(rest, 0)?) {
                rest = rest.get(4..)?;
            }
        }
        let packet = rest.get(2..)?;
        let first = *packet.first()?;
        match (u16_at(rest, 0)?, first >> 4) {
            (ETHERTYPE_IPV4, 4) => {
                let addresses = packet.get(12..20)?;
                let header = usize::from(first & 0xf) * 4;
                if header < 20 {
                    return None;
                }
                let whole = u16_at(packet, 6)? & FRAGMENT == 0;
                let ports = ports(packet, header).filter(|_| whole);
                Some(Self {
                    version: Version::V4,
                    addresses,
                    transport: packet.get(9).copied().zip(ports),
                })
            }
            (ETHERTYPE_IPV6, 6) => {
                let addresses = packet.get(8..40)?;
                let (mut next, mut at) = (*packet.get(6)?, 40);
                for _ in 0..MAX_EXTENSIONS {
                    let Some(&[following, len, ..]) =
                        packet.get(at..).filter(|_| EXTENSIONS.contains(&next))
                    else {
                        break;
                    };
                    next = following;
                    at = at.saturating_add((usize::from(len) + 1) * 8);
                }
                Some(Self {
                    version: Version::V6,
                    addresses,
                    transport: ports(packet, at).map(|ports| (next, ports)),
                })
            }
            _ => None,
        }
    }
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    let (bytes, _) = bytes.get(at..)?.split_first_chunk()?;
    Some(u16::from_be_bytes(*bytes))
}

/// Source and destination port.
fn ports(packet: &[u8], at: usize) -> Option<[u8; 4]> {
    packet.get(at..)?.first_chunk().copied()
}

impl Hashing {
    /// No packet is hashed.
    pub(super) fn off() -> Self {
        Self {
            types: 0,
            toeplitz: Toeplitz(Box::default()),
        }
    }

    /// Hashes a packet, given the start of its frame, up to [`PEEK`] bytes of it.
    pub(super) fn report(&self, frame: &[u8]) -> Report {
        if self.types == 0 {
            return Report::NONE;
        }
        let Some(flow) = Flow::find(frame) else {
            return Report::NONE;
        };
        let v4 = flow.version == Version::V4;
        let protocol = flow.transport.map(|(protocol, _)| protocol);
        let with_ports = match (v4, protocol) {
            (true, Some(PROTOCOL_TCP)) => {
                Some((VIRTIO_NET_RSS_HASH_TYPE_TCPv4, VIRTIO_NET_HASH_REPORT_TCPv4))
            }
            (true, Some(PROTOCOL_UDP)) => {
                Some((VIRTIO_NET_RSS_HASH_TYPE_UDPv4, VIRTIO_NET_HASH_REPORT_UDPv4))
            }
            (false, Some(PROTOCOL_TCP)) => {
                Some((VIRTIO_NET_RSS_HASH_TYPE_TCPv6, VIRTIO_NET_HASH_REPORT_TCPv6))
            }
            (false, Some(PROTOCOL_UDP)) => {
                Some((VIRTIO_NET_RSS_HASH_TYPE_UDPv6, VIRTIO_NET_HASH_REPORT_UDPv6))
            }
            _ => None,
        };
        let addresses = if v4 {
            (VIRTIO_NET_RSS_HASH_TYPE_IPv4, VIRTIO_NET_HASH_REPORT_IPv4)
        } else {
            (VIRTIO_NET_RSS_HASH_TYPE_IPv6, VIRTIO_NET_HASH_REPORT_IPv6)
        };
        let wanted = |(kind, _): &(u32, u32)| self.types & kind != 0;
        // The most that is wanted (VIRTIO 1.3, 5.1.6.4.3.2 and 5.1.6.4.3.3).
        let (ports, kind) = match (with_ports.filter(wanted), Some(addresses).filter(wanted)) {
            (Some((_, kind)), _) => (flow.transport, kind),
            (None, Some((_, kind))) => (None, kind),
            (None, None) => return Report::NONE,
        };
        let ports = ports.map(|(_, ports)| ports);
        let bytes = flow.addresses.iter().chain(ports.iter().flatten());
        let mut input = [0; INPUT];
        for (place, byte) in input.iter_mut().zip(bytes) {
            *place = *byte;
        }
        Report {
            value: self.toeplitz.hash(&input),
            kind: number(kind),
        }
    }
}

/// Frames and hashes for tests: those that Microsoft published for receive-side scaling ("Verifying the RSS Hash Calculation").
#[cfg(test)]
pub(super) mod vectors {
    use std::net::IpAddr;

    pub(in crate::net) const KEY: [u8; 40] = [
        0x6d, 0x5a, 0x56, 0xda, 0x25, 0x5b, 0x0e, 0xc2, 0x41, 0x67, 0x25, 0x3d, 0x43, 0xa3, 0x8f,
        0xb0, 0xd0, 0xca, 0x2b, 0xcb, 0xae, 0x7b, 0x30, 0xb4, 0x77, 0xcb, 0x2d, 0xa3, 0x80, 0x30,
        0xf2, 0x0c, 0x6a, 0x42, 0xb7, 0x3b, 0xbe, 0xac, 0x01, 0xfa,
    ];

    /// Source and destination with their ports; the hash of the addresses, and with the ports.
    pub(in crate::net) type Vector = ((&'static str, u16), (&'static str, u16), u32, u32);

    pub(in crate::net) const ALL: [Vector; 8] = [
        (
            ("66.9.149.187", 2794),
            ("161.142.100.80", 1766),
            0x323e_8fc2,
            0x51cc_c178,
        ),
        (
            ("199.92.111.2", 14230),
            ("65.69.140.83", 4739),
            0xd718_262a,
            0xc626_b0ea,
        ),
        (
            ("24.19.198.95", 12898),
            ("12.22.207.184", 38024),
            0xd2d0_a5de,
            0x5c2b_394a,
        ),
        (
            ("38.27.205.30", 48228),
            ("209.142.163.6", 2217),
            0x8298_9176,
            0xafc7_327f,
        ),
        (
            ("153.39.163.191", 44251),
            ("202.188.127.2", 1303),
            0x5d18_09c5,
            0x10e8_28a2,
        ),
        (
            ("3ffe:2501:200:1fff::7", 2794),
            ("3ffe:2501:200:3::1", 1766),
            0x2cc1_8cd5,
            0x4020_7d3d,
        ),
        (
            ("3ffe:501:8::260:97ff:fe40:efab", 14230),
            ("ff02::1", 4739),
            0x0f0c_461c,
            0xdde5_1bbf,
        ),
        (
            ("3ffe:1900:4545:3:200:f8ff:fe21:67cf", 44251),
            ("fe80::200:f8ff:fe21:67cf", 38024),
            0x4b61_e985,
            0x02d1_feef,
        ),
    ];

    /// A frame of a protocol, with these tags of VLAN 0 and, in front of the ports, these bytes of options or extension headers,
    /// the first of which has this number.
    pub(in crate::net) fn frame(
        vector: &Vector,
        protocol: u8,
        tags: &[u16],
        extensions: Option<(u8, &[u8])>,
    ) -> Vec<u8> {
        let ((source, from), (destination, to), ..) = *vector;
        let mut frame = vec![2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 9];
        for tag in tags {
            frame.extend(tag.to_be_bytes());
            frame.extend([0xe0, 0]);
        }
        let (source, destination) = (source.parse().unwrap(), destination.parse().unwrap());
        let (first, options) = extensions.unwrap_or((protocol, &[]));
        match (source, destination) {
            (IpAddr::V4(source), IpAddr::V4(destination)) => {
                let words = 5 + u8::try_from(options.len() / 4).unwrap();
                frame.extend([
                    8,
                    0,
                    0x40 | words,
                    0,
                    0,
                    60,
                    0,
                    0,
                    0x40,
                    0,
                    64,
                    protocol,
                    0,
                    0,
                ]);
                frame.extend(source.octets());
                frame.extend(destination.octets());
            }
            (IpAddr::V6(source), IpAddr::V6(destination)) => {
                frame.extend([0x86, 0xdd, 0x60, 0, 0, 0, 0, 40, first, 64]);
                frame.extend(source.octets());
                frame.extend(destination.octets());
            }
            _ => panic!("two versions of IP"),
        }
        frame.extend(options);
        frame.extend(from.to_be_bytes());
        frame.extend(to.to_be_bytes());
        frame.extend([0; 40]);
        frame
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn hashing(types: u32) -> Hashing {
        Hashing {
            types,
            toeplitz: Toeplitz::new(&vectors::KEY),
        }
    }

    fn is_v4(vector: &vectors::Vector) -> bool {
        vector.0.0.contains('.')
    }

    #[test]
    fn a_key_is_found_again() {
        let key: Vec<u8> = (1..=40).collect();
        for len in [0, 1, 36, 39, 40] {
            let toeplitz = Toeplitz::new(&key[..len]);
            assert_eq!(toeplitz.key(), key[..len]);
            assert!(Toeplitz::new(&toeplitz.key()) == toeplitz);
        }
    }

    #[test]
    fn the_published_hashes_come_out() {
        for vector in &vectors::ALL {
            let &(.., addresses, ports) = vector;
            let kinds: [u16; 3] = if is_v4(vector) { [1, 2, 3] } else { [4, 5, 6] };
            for (protocol, value, kind) in [
                (6, ports, kinds[1]),
                (17, ports, kinds[2]),
                (132, addresses, kinds[0]),
            ] {
                let frame = vectors::frame(vector, protocol, &[], None);
                let report = hashing(HASH_TYPES).report(&frame);
                assert_eq!(report, Report { value, kind }, "{vector:?} {protocol}");
                let tagged = vectors::frame(vector, protocol, &[0x88a8, 0x8100], None);
                assert_eq!(hashing(HASH_TYPES).report(&tagged), report);
                // Only addresses are wanted, or what the packet is not.
                let alone = hashing(VIRTIO_NET_RSS_HASH_TYPE_IPv4 | VIRTIO_NET_RSS_HASH_TYPE_IPv6);
                let kind = kinds[0];
                assert_eq!(
                    alone.report(&frame),
                    Report {
                        value: addresses,
                        kind
                    }
                );
                assert_eq!(hashing(0).report(&frame), Report::NONE);
                let other = if is_v4(vector) { 0x38 } else { 0x07 };
                assert_eq!(hashing(other).report(&frame), Report::NONE);
            }
        }
    }

    #[test]
    fn ports_are_found_behind_options() {
        for vector in &vectors::ALL {
            // Hop-by-hop options of 16 bytes, then a routing header of 8.
            let extensions = [
                43, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 6, 0, 0, 0, 0, 0, 0, 0,
            ];
            let frame = vectors::frame(vector, 6, &[], Some((0, &extensions)));
            assert_eq!(hashing(HASH_TYPES).report(&frame).value, vector.3);
        }
    }

    #[test]
    fn a_fragment_has_no_ports() {
        let mut frame = vectors::frame(&vectors::ALL[0], 17, &[], None);
        for flags in [[0x20, 0], [0, 1], [0x1f, 0xff]] {
            frame[20..22].copy_from_slice(&flags);
            assert_eq!(hashing(HASH_TYPES).report(&frame).value, vectors::ALL[0].2);
        }
        let frame = vectors::frame(
            &vectors::ALL[5],
            17,
            &[],
            Some((44, &[17, 0, 0, 1, 0, 0, 0, 0])),
        );
        assert_eq!(hashing(HASH_TYPES).report(&frame).value, vectors::ALL[5].2);
    }

    #[test]
    fn what_is_no_ip_is_not_hashed() {
        let frame = vectors::frame(&vectors::ALL[0], 6, &[], None);
        for change in [(12, 9), (14, 0x65), (14, 0x44)] {
            let mut frame = frame.clone();
            frame[change.0] = change.1;
            assert_eq!(
                hashing(HASH_TYPES).report(&frame),
                Report::NONE,
                "{change:?}"
            );
        }
        // Too short for addresses, then for ports.
        assert_eq!(hashing(HASH_TYPES).report(&frame[..33]), Report::NONE);
        assert_eq!(hashing(HASH_TYPES).report(&frame[..37]).kind, 1);
    }

    proptest! {
        #[test]
        fn any_bytes_are_hashed_as_the_definition_says(
            key in prop::collection::vec(any::<u8>(), 0..60),
            input: [u8; INPUT],
        ) {
            let bit = |bytes: &[u8], at: usize| bytes.get(at / 8).is_some_and(|byte| byte & 0x80 >> (at % 8) != 0);
            let mut expected = 0_u32;
            for at in (0..INPUT * 8).filter(|&at| bit(&input, at)) {
                expected ^= (0..32).fold(0, |window, i| window << 1 | u32::from(bit(&key, at + i)));
            }
            prop_assert_eq!(Toeplitz::new(&key).hash(&input), expected);
        }

        #[test]
        fn any_frame_is_survived(frame in prop::collection::vec(any::<u8>(), 0..PEEK), v6: bool) {
            let mut frame = frame;
            if let Some(start) = frame.get_mut(12..15) {
                start.copy_from_slice(if v6 { &[0x86, 0xdd, 0x60] } else { &[8, 0, 0x45] });
            }
            hashing(HASH_TYPES).report(&frame);
        }
    }
}

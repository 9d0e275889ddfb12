//! The configuration space of a network device: struct virtio_net_config (VIRTIO 1.3, 5.1.4).

use std::fmt;
use std::str::FromStr;

use thiserror::Error;

use super::hash::MAX_TAGS;
use crate::shell::{DeviceError, config_range};

/// An Ethernet address.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct MacAddress([u8; 6]);

/// A text is no usable address.
#[derive(Debug, Error, PartialEq, Eq)]
#[error("expected the address of one interface, as in 52:54:00:12:34:56")]
pub struct MacError;

impl MacAddress {
    /// The address with these bytes, in the order of the wire.
    #[must_use]
    pub const fn new(bytes: [u8; 6]) -> Self {
        Self(bytes)
    }

    /// The bytes, in the order of the wire.
    #[must_use]
    pub const fn octets(self) -> [u8; 6] {
        self.0
    }

    /// A random address of our own making: locally administered, for one interface (IEEE 802, 8.4).
    #[must_use]
    pub fn random() -> Self {
        use std::hash::{BuildHasher, RandomState};
        // Its keys come from the system's random numbers.
        let [mut first, a, b, c, d, e, ..] = RandomState::new().hash_one(0).to_ne_bytes();
        first = (first & !1) | 2;
        Self([first, a, b, c, d, e])
    }

    /// It names a group, not one interface.
    #[must_use]
    pub const fn is_group(self) -> bool {
        self.0[0] & 1 != 0
    }
}

impl fmt::Display for MacAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl fmt::Debug for MacAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for MacAddress {
    type Err = MacError;

    fn from_str(text: &str) -> Result<Self, MacError> {
        let mut bytes = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut bytes {
            let part = parts.next().ok_or(MacError)?;
            if part.len() != 2 || !part.bytes().all(|b| b.is_ascii_hexdigit()) {
                return Err(MacError);
            }
            *byte = u8::from_str_radix(part, 16).map_err(|_| MacError)?;
        }
        let address = Self(bytes);
        if parts.next().is_some() || address.is_group() || address == Self::default() {
            return Err(MacError);
        }
        Ok(address)
    }
}

/// What the fields hold. Fields whose feature is not offered read as 0.
#[derive(Debug, Clone, Copy)]
pub(super) struct NetConfig {
    /// `mac`.
    pub(super) mac: MacAddress,
    /// `max_virtqueue_pairs`.
    pub(super) pairs: u16,
    /// `mtu` in bytes.
    pub(super) mtu: Option<u16>,
    /// `speed` in Mbit/s.
    pub(super) speed: Option<u32>,
    /// `supported_hash_types`; 0 if neither RSS nor hash reports are offered.
    pub(super) hash_types: u32,
}

/// What `status` says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Status {
    /// The link is up.
    pub(super) link_up: bool,
    /// The driver is asked to make itself known to the network.
    pub(super) announce: bool,
}

/// VIRTIO_NET_S_LINK_UP (VIRTIO 1.3, 5.1.4).
const LINK_UP: u16 = 1;
/// VIRTIO_NET_S_ANNOUNCE (VIRTIO 1.3, 5.1.4).
const ANNOUNCE: u16 = 2;
/// Bytes of an Ethernet header (IEEE 802.3, 3.1.1).
const ETHERNET: usize = 14;
/// Bytes that a VLAN tag adds to it (IEEE 802.1Q, 9.3).
const VLAN_TAG: usize = 4;
/// Where the type of a frame lies that says whether there is one.
pub(super) const TYPE_AT: usize = 12;
/// Types of a frame with a tag: IEEE 802.1Q and 802.1ad.
pub(super) const ETHERTYPES_VLAN: [u16; 2] = [0x8100, 0x88a8];

/// Bytes of the longest frame without a VLAN tag that a driver gets which knows this MTU (VIRTIO 1.3, 5.1.4.1).
pub(super) fn longest_frame(mtu: Option<u16>) -> usize {
    mtu.map_or(usize::MAX, |mtu| usize::from(mtu) + ETHERNET)
}

/// A frame of `len` bytes and this type, which is longer than [`longest_frame`] says, is so by VLAN tags only.
pub(super) fn is_longer_by_tag(len: usize, ethertype: [u8; 2], longest: usize) -> bool {
    ETHERTYPES_VLAN.contains(&u16::from_be_bytes(ethertype))
        && len <= longest.saturating_add(MAX_TAGS * VLAN_TAG)
}

/// `duplex` full (VIRTIO 1.3, 5.1.4).
const FULL_DUPLEX: u8 = 1;

/// `rss_max_key_size` (VIRTIO 1.3, 5.1.4), the least that is allowed: what a hash over addresses and ports of IPv6 takes.
pub(super) const MAX_KEY: usize = 40;
/// `rss_max_indirection_table_length` (VIRTIO 1.3, 5.1.4), the least that is allowed.
pub(super) const MAX_TABLE: usize = 128;

/// Length of the structure.
const LEN: usize = 24;

impl NetConfig {
    fn bytes(&self, status: Status) -> [u8; LEN] {
        let Self {
            mac,
            pairs,
            mtu,
            speed,
            hash_types,
        } = *self;
        let mut bytes = [0; LEN];
        let bit = |on, bit| if on { bit } else { 0_u16 };
        let status = bit(status.link_up, LINK_UP) | bit(status.announce, ANNOUNCE);
        let hashes = hash_types != 0;
        let (key, table) = if hashes { (MAX_KEY, MAX_TABLE) } else { (0, 0) };
        let fields = mac
            .octets()
            .into_iter()
            .chain(status.to_le_bytes())
            .chain(pairs.to_le_bytes())
            .chain(mtu.unwrap_or(0).to_le_bytes())
            .chain(speed.unwrap_or(0).to_le_bytes())
            .chain([if speed.is_some() { FULL_DUPLEX } else { 0 }])
            .chain([u8::try_from(key).unwrap_or(u8::MAX)])
            .chain(u16::try_from(table).unwrap_or(u16::MAX).to_le_bytes())
            .chain(hash_types.to_le_bytes());
        for (place, field) in bytes.iter_mut().zip(fields) {
            *place = field;
        }
        bytes
    }

    /// Reads `len` bytes from `offset` on.
    pub(super) fn read(
        &self,
        status: Status,
        offset: u32,
        len: u32,
    ) -> Result<Vec<u8>, DeviceError> {
        config_range(&self.bytes(status), offset, len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_strictly() {
        let mac: MacAddress = "52:54:00:ab:CD:01".parse().unwrap();
        assert_eq!(mac.octets(), [0x52, 0x54, 0, 0xab, 0xcd, 1]);
        assert_eq!(mac.to_string(), "52:54:00:ab:cd:01");
        for bad in [
            "",
            "52:54:00:ab:cd",
            "52:54:00:ab:cd:01:02",
            "52:54:00:ab:cd:+1",
            "5254:00:ab:cd:01",
            "01:00:5e:00:00:01",
            "ff:ff:ff:ff:ff:ff",
            "00:00:00:00:00:00",
        ] {
            assert_eq!(bad.parse::<MacAddress>(), Err(MacError), "{bad:?}");
        }
    }

    #[test]
    fn random_addresses_are_local_and_differ() {
        let (a, b) = (MacAddress::random(), MacAddress::random());
        assert_ne!(a, b);
        for mac in [a, b] {
            assert!(!mac.is_group());
            assert_eq!(mac.octets()[0] & 2, 2);
        }
    }

    #[test]
    fn fields_lie_where_the_specification_puts_them() {
        let mut config = NetConfig {
            mac: MacAddress::new([2, 3, 4, 5, 6, 7]),
            pairs: 4,
            mtu: Some(9000),
            speed: Some(25_000),
            hash_types: 0,
        };
        let up = Status {
            link_up: true,
            announce: false,
        };
        assert_eq!(config.read(up, 0, 6).unwrap(), [2, 3, 4, 5, 6, 7]);
        assert_eq!(config.read(up, 8, 2).unwrap(), 4_u16.to_le_bytes());
        assert_eq!(config.read(up, 10, 2).unwrap(), 9000_u16.to_le_bytes());
        assert_eq!(config.read(up, 12, 4).unwrap(), 25_000_u32.to_le_bytes());
        assert_eq!(config.read(up, 16, 1).unwrap(), [1]);
        assert_eq!(config.read(up, 17, 43).unwrap(), [0; 43]);
        for (link_up, announce, status) in [
            (true, false, 1_u16),
            (true, true, 3),
            (false, false, 0),
            (false, true, 2),
        ] {
            let now = Status { link_up, announce };
            assert_eq!(config.read(now, 6, 2).unwrap(), status.to_le_bytes());
        }
        for (offset, len) in [(0, 257), (256, 1), (u32::MAX, 1), (0, u32::MAX)] {
            assert!(config.read(up, offset, len).is_err());
        }
        config.hash_types = 0x3f;
        assert_eq!(config.read(up, 17, 7).unwrap(), [40, 128, 0, 0x3f, 0, 0, 0]);
    }
}

//! What a port may send and is to get: VLANs, isolation, and which addresses it may send from.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use super::super::config::MacAddress;
use super::super::filter::VLANS;
use super::frame::{Beginning, ETHERTYPE_ARP, ETHERTYPE_IPV4, ETHERTYPE_IPV6, ETHERTYPE_RARP};

/// Number of a port.
pub(super) type PortId = u16;

/// Most ports of a switch: a set of them is one word.
pub(super) const MAX_PORTS: u16 = 64;

/// The VLAN of a port that was given none (IEEE 802.1Q, 9.6: the default PVID).
pub(super) const DEFAULT_VLAN: u16 = 1;
/// The last VLAN that there is (IEEE 802.1Q, 9.6).
const LAST_VLAN: u16 = VLANS - 2;

/// Which VLANs a port belongs to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Vlans {
    /// To one, without a tag.
    Access(u16),
    /// To several, with a tag; to one of them perhaps without.
    Trunk {
        /// Those with a tag.
        tagged: VlanRange,
        /// That without.
        native: Option<u16>,
    },
}

/// How frames of a VLAN leave a port.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Form {
    /// Without a tag.
    Untagged,
    /// With one.
    Tagged,
}

impl fmt::Display for Vlans {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Access(vlan) => write!(f, "{vlan}"),
            Self::Trunk { tagged, native } => {
                write!(f, "{tagged}")?;
                native.map_or(Ok(()), |native| write!(f, " native {native}"))
            }
        }
    }
}

impl Vlans {
    /// The VLAN of a frame that comes in with this VLAN in its tag; 0, and without a tag, it is the port's own.
    #[inline]
    pub(super) fn of(&self, tag: u16) -> Option<u16> {
        match self {
            Self::Access(vlan) => (tag == 0).then_some(*vlan),
            Self::Trunk { native, .. } if tag == 0 => *native,
            Self::Trunk { tagged, .. } => tagged.holds(tag).then_some(tag),
        }
    }

    /// How frames of a VLAN go out here, if they do.
    #[inline]
    pub(super) fn form(&self, vlan: u16) -> Option<Form> {
        match self {
            Self::Access(own) => (*own == vlan).then_some(Form::Untagged),
            Self::Trunk { native, .. } if *native == Some(vlan) => Some(Form::Untagged),
            Self::Trunk { tagged, .. } => tagged.holds(vlan).then_some(Form::Tagged),
        }
    }
}

/// Reads the number of a VLAN.
pub(super) fn parse_vlan(text: &str) -> Result<u16, String> {
    let vlan = text.parse().ok();
    vlan.filter(|vlan| (1..=LAST_VLAN).contains(vlan))
        .ok_or_else(|| format!("`{text}` is no VLAN: they have the numbers 1 to {LAST_VLAN}"))
}

/// A set of VLANs, written as `2+5-9`.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct VlanRange(Box<[u64; 64]>);

impl VlanRange {
    #[inline]
    fn holds(&self, vlan: u16) -> bool {
        let word = self.0.get(usize::from(vlan / 64)).copied().unwrap_or(0);
        word >> (vlan % 64) & 1 != 0
    }
}

impl FromStr for VlanRange {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut words = Box::new([0; 64]);
        for part in text.split('+') {
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            let (first, last) = (parse_vlan(first)?, parse_vlan(last)?);
            if first > last {
                return Err(format!("`{part}` ends before it begins"));
            }
            for vlan in first..=last {
                if let Some(word) = words.get_mut(usize::from(vlan / 64)) {
                    *word |= 1 << (vlan % 64);
                }
            }
        }
        Ok(Self(words))
    }
}

/// As it is written.
impl fmt::Display for VlanRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut separator = "";
        let mut vlan = 1;
        while vlan < VLANS {
            let last = (vlan..VLANS).take_while(|&vlan| self.holds(vlan)).last();
            match last {
                Some(last) if last > vlan => write!(f, "{separator}{vlan}-{last}")?,
                Some(_) => write!(f, "{separator}{vlan}")?,
                None => {}
            }
            if last.is_some() {
                separator = "+";
            }
            vlan = last.unwrap_or(vlan) + 1;
        }
        Ok(())
    }
}

impl fmt::Debug for VlanRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// All rules of one port.
#[derive(Debug, Clone)]
pub(super) struct Policy {
    /// VLANs.
    pub(super) vlans: Vlans,
    /// It speaks with ports that are not isolated only.
    pub(super) isolated: bool,
    /// Addresses that it may send from; empty: all that no other port has for itself.
    pub(super) macs: Vec<MacAddress>,
    /// IP addresses that it may send from; empty: all.
    pub(super) ips: Vec<IpAddr>,
}

impl Policy {
    /// It says which addresses the port may send from.
    #[inline]
    pub(super) fn has_addresses(&self) -> bool {
        !self.macs.is_empty() || !self.ips.is_empty()
    }

    /// The frame says that it comes from where this port may send from.
    #[inline]
    pub(super) fn allows(&self, frame: &Beginning) -> bool {
        (self.macs.is_empty() || self.allows_mac(frame))
            && (self.ips.is_empty() || self.allows_ip(frame))
    }

    fn allows_mac(&self, frame: &Beginning) -> bool {
        let holds = |address| self.macs.contains(&MacAddress::new(address));
        let arp = [ETHERTYPE_ARP, ETHERTYPE_RARP].contains(&frame.ethertype());
        // Whose address is asked for or told (RFC 826): `ar$sha`.
        frame.bytes_at(6).is_some_and(holds) && (!arp || frame.bytes_at(22).is_some_and(holds))
    }

    fn allows_ip(&self, frame: &Beginning) -> bool {
        let holds = |address: IpAddr| self.ips.contains(&address);
        match frame.ethertype() {
            // `ar$spa` (RFC 826). A probe comes from nobody (RFC 5227, 2.1.1).
            ETHERTYPE_ARP => frame.bytes_at::<4>(28).is_some_and(|address| {
                let address = Ipv4Addr::from(address);
                address.is_unspecified() || holds(address.into())
            }),
            // It tells nobody's IP address (RFC 903).
            ETHERTYPE_RARP => true,
            // Nobody asks for an address (RFC 2131, 4.1).
            ETHERTYPE_IPV4 => frame.bytes_at::<4>(26).is_some_and(|address| {
                let address = Ipv4Addr::from(address);
                address.is_unspecified() || holds(address.into())
            }),
            // Nobody looks whether an address is taken (RFC 4862, 5.4.2).
            ETHERTYPE_IPV6 => {
                let source = frame.bytes_at::<16>(22).map(Ipv6Addr::from);
                source.is_some_and(|address| address.is_unspecified() || holds(address.into()))
                    && advertises(frame).is_some_and(|target| target.is_none_or(holds))
            }
            _ => false,
        }
    }
}

/// The address that an IPv6 packet tells to be the sender's, if it tells one: the target of a neighbour advertisement (RFC
/// 4861, 4.4). `None` if that cannot be told, as it lies too far behind.
fn advertises(frame: &Beginning) -> Option<Option<IpAddr>> {
    const HOP_BY_HOP: u8 = 0;
    const ROUTING: u8 = 43;
    const FRAGMENT: u8 = 44;
    const ICMPV6: u8 = 58;
    const DESTINATION: u8 = 60;
    const NEIGHBOUR_ADVERTISEMENT: u8 = 136;
    let [mut next] = frame.bytes_at(20)?;
    let mut at = 54;
    loop {
        match next {
            HOP_BY_HOP | ROUTING | DESTINATION => {
                let [following, len] = frame.bytes_at(at)?;
                next = following;
                at += 8 + 8 * usize::from(len);
            }
            // Neighbour discovery must not come in fragments (RFC 6980, 5); what else does is no business of this rule.
            FRAGMENT => {
                let [following] = frame.bytes_at(at)?;
                return (following != ICMPV6).then_some(None);
            }
            ICMPV6 => {
                let [kind] = frame.bytes_at(at)?;
                if kind != NEIGHBOUR_ADVERTISEMENT {
                    return Some(None);
                }
                let target = frame.bytes_at::<16>(at + 8)?;
                return Some(Some(Ipv6Addr::from(target).into()));
            }
            _ => return Some(None),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vlans_of_a_port_are_those_it_was_given() {
        let access = Vlans::Access(7);
        assert_eq!([0, 7, 8].map(|tag| access.of(tag)), [Some(7), None, None]);
        assert_eq!(access.form(7), Some(Form::Untagged));
        assert_eq!(access.form(8), None);
        let trunk = |native| Vlans::Trunk {
            tagged: "2+5-9".parse().unwrap(),
            native,
        };
        let tags = [0, 2, 4, 5, 9, 10];
        let expected = [None, Some(2), None, Some(5), Some(9), None];
        assert_eq!(tags.map(|tag| trunk(None).of(tag)), expected);
        assert_eq!(trunk(Some(3)).of(0), Some(3));
        assert_eq!(trunk(Some(3)).form(3), Some(Form::Untagged));
        assert_eq!(trunk(Some(3)).form(2), Some(Form::Tagged));
        assert_eq!(trunk(None).form(1), None);
    }

    #[test]
    fn vlans_are_numbers_and_ranges() {
        for wrong in ["", "0", "4095", "1+", "5-2", "x", "1-2-3"] {
            assert!(wrong.parse::<VlanRange>().is_err(), "{wrong}");
        }
        let all: VlanRange = "1-4094".parse().unwrap();
        assert!(all.holds(1) && all.holds(4094) && !all.holds(0) && !all.holds(4095));
        for text in ["1-4094", "2+5-9+4094", "7"] {
            assert_eq!(text.parse::<VlanRange>().unwrap().to_string(), text);
        }
    }
}

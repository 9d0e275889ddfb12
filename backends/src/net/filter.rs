//! Which packets a driver wants to receive (VIRTIO 1.3, 5.1.6.5.1 to 5.1.6.5.3).

use super::config::MacAddress;

/// Most addresses of each kind that are compared; with more, all of that kind pass.
pub(super) const TABLE_SIZE: usize = 64;

/// Bytes of a frame that the filter looks at: both addresses, the type and a VLAN tag.
pub(super) const PEEK: usize = 18;

/// Type of a frame with a VLAN tag (IEEE 802.1Q).
const ETHERTYPE_VLAN: [u8; 2] = [0x81, 0x00];
const BROADCAST: [u8; 6] = [0xff; 6];

/// Number of VLANs.
pub(super) const VLANS: u16 = 4096;

/// Addresses that pass.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Table {
    /// These.
    Listed(Vec<MacAddress>),
    /// More were given than are compared: all pass.
    Overflow,
}

impl Default for Table {
    fn default() -> Self {
        Self::Listed(Vec::new())
    }
}

impl Table {
    fn holds(&self, address: MacAddress) -> bool {
        match self {
            Self::Listed(list) => list.contains(&address),
            Self::Overflow => true,
        }
    }
}

/// The VLANs that pass.
#[derive(Debug, Clone)]
pub(super) struct VlanSet(Box<[bool]>);

impl Default for VlanSet {
    fn default() -> Self {
        Self(vec![false; usize::from(VLANS)].into())
    }
}

impl VlanSet {
    /// Lets a VLAN pass, or not.
    pub(super) fn set(&mut self, vlan: u16, pass: bool) {
        if let Some(place) = self.0.get_mut(usize::from(vlan)) {
            *place = pass;
        }
    }

    /// Those that pass.
    pub(super) fn listed(&self) -> impl Iterator<Item = u16> + '_ {
        let all = (0..).zip(self.0.iter());
        all.filter_map(|(vlan, pass)| pass.then_some(vlan))
    }

    fn holds(&self, vlan: u16) -> bool {
        self.0.get(usize::from(vlan)).copied().unwrap_or(false)
    }
}

/// The receive filter. A device begins with all packets passing, until a driver says otherwise: one that
/// does not know the control queue must not be deaf.
#[derive(Debug, Clone)]
pub(super) struct Filter {
    /// The link is up. Else no packet passes.
    pub(super) link_up: bool,
    /// All packets pass.
    pub(super) promiscuous: bool,
    /// All packets to a group pass.
    pub(super) all_multicast: bool,
    /// All packets to one interface pass.
    pub(super) all_unicast: bool,
    /// No packet to a group passes.
    pub(super) no_multicast: bool,
    /// No packet to one interface passes.
    pub(super) no_unicast: bool,
    /// No packet to all passes.
    pub(super) no_broadcast: bool,
    /// The device's own address.
    pub(super) mac: MacAddress,
    /// Further addresses of single interfaces.
    pub(super) unicast: Table,
    /// Addresses of groups.
    pub(super) multicast: Table,
    /// The VLANs that pass, if the driver filters them. Frames without a tag, or of VLAN 0, are in none.
    pub(super) vlans: Option<VlanSet>,
}

impl Filter {
    /// The filter before a driver speaks.
    pub(super) fn new(mac: MacAddress, filters_vlans: bool) -> Self {
        Self {
            link_up: true,
            promiscuous: true,
            all_multicast: false,
            all_unicast: false,
            no_multicast: false,
            no_unicast: false,
            no_broadcast: false,
            mac,
            unicast: Table::default(),
            multicast: Table::default(),
            vlans: filters_vlans.then(VlanSet::default),
        }
    }

    /// Whether a frame passes. `start` is its first bytes, up to [`PEEK`] of them.
    #[inline]
    pub(super) fn passes(&self, start: &[u8]) -> bool {
        self.passes_any().unwrap_or_else(|| self.lists(start))
    }

    /// The same of any frame; `None` if frames are told apart.
    #[inline]
    pub(super) fn passes_any(&self) -> Option<bool> {
        (self.promiscuous || !self.link_up).then_some(self.link_up)
    }

    fn lists(&self, start: &[u8]) -> bool {
        let Some((&destination, rest)) = start.split_first_chunk::<6>() else {
            return false;
        };
        if let (Some(vlans), Some([_, _, _, _, _, _, t0, t1, v0, v1])) =
            (&self.vlans, rest.first_chunk::<10>())
            && [*t0, *t1] == ETHERTYPE_VLAN
        {
            let vlan = u16::from_be_bytes([*v0, *v1]) & (VLANS - 1);
            if vlan != 0 && !vlans.holds(vlan) {
                return false;
            }
        }
        let address = MacAddress::new(destination);
        if destination == BROADCAST {
            !self.no_broadcast
        } else if address.is_group() {
            !self.no_multicast && (self.all_multicast || self.multicast.holds(address))
        } else {
            !self.no_unicast
                && (self.all_unicast || address == self.mac || self.unicast.holds(address))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OWN: MacAddress = MacAddress::new([2, 0, 0, 0, 0, 1]);
    const OTHER: MacAddress = MacAddress::new([2, 0, 0, 0, 0, 2]);
    const GROUP: MacAddress = MacAddress::new([1, 0, 0x5e, 0, 0, 1]);
    const ALL: MacAddress = MacAddress::new(BROADCAST);

    fn frame(to: MacAddress, vlan: Option<u16>) -> Vec<u8> {
        let mut frame = to.octets().to_vec();
        frame.extend([2, 0, 0, 0, 0, 9]);
        match vlan {
            Some(vlan) => {
                frame.extend(ETHERTYPE_VLAN);
                frame.extend(vlan.to_be_bytes());
            }
            None => frame.extend([8, 0, 0x45, 0]),
        }
        frame.extend([0; 2]);
        assert_eq!(frame.len(), PEEK);
        frame
    }

    fn passed(filter: &Filter) -> [bool; 4] {
        [OWN, OTHER, GROUP, ALL].map(|to| filter.passes(&frame(to, None)))
    }

    #[test]
    fn modes() {
        let mut filter = Filter::new(OWN, false);
        assert_eq!(passed(&filter), [true; 4]);
        filter.link_up = false;
        assert_eq!(passed(&filter), [false; 4]);
        filter.promiscuous = false;
        assert_eq!(passed(&filter), [false; 4]);
        filter.link_up = true;
        assert_eq!(passed(&filter), [true, false, false, true]);
        filter.all_multicast = true;
        assert_eq!(passed(&filter), [true, false, true, true]);
        filter.all_unicast = true;
        assert_eq!(passed(&filter), [true, true, true, true]);
        filter.no_multicast = true;
        assert_eq!(passed(&filter), [true, true, false, true]);
        filter.no_unicast = true;
        filter.no_broadcast = true;
        assert_eq!(passed(&filter), [false; 4]);
    }

    #[test]
    fn tables() {
        let mut filter = Filter::new(OWN, false);
        filter.promiscuous = false;
        filter.unicast = Table::Listed(vec![OTHER]);
        assert_eq!(passed(&filter), [true, true, false, true]);
        filter.multicast = Table::Listed(vec![GROUP]);
        assert_eq!(passed(&filter), [true; 4]);
        filter.unicast = Table::default();
        filter.multicast = Table::Overflow;
        assert_eq!(passed(&filter), [true, false, true, true]);
    }

    #[test]
    fn vlans() {
        let mut filter = Filter::new(OWN, true);
        let passes = |filter: &Filter, vlan| filter.passes(&frame(OWN, vlan));
        assert!(passes(&filter, Some(7)));
        filter.promiscuous = false;
        assert!(passes(&filter, None));
        assert!(passes(&filter, Some(0xe000)));
        assert!(!passes(&filter, Some(7)));
        filter.vlans.as_mut().unwrap().set(7, true);
        assert!(passes(&filter, Some(0xe007)));
        assert!(!passes(&filter, Some(8)));
        filter.vlans.as_mut().unwrap().set(7, false);
        filter.vlans.as_mut().unwrap().set(4096, true);
        assert!(!passes(&filter, Some(7)));
        let unfiltered = Filter {
            vlans: None,
            ..filter
        };
        assert!(passes(&unfiltered, Some(7)));
    }

    #[test]
    fn a_frame_cut_short_does_not_pass() {
        let mut filter = Filter::new(OWN, true);
        filter.promiscuous = false;
        assert!(!filter.passes(&[2, 0, 0, 0, 0]));
        assert!(filter.passes(&frame(OWN, None)[..6]));
    }
}

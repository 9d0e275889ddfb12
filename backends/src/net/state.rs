//! The state of a network device that goes with its guest: what the driver has set by the control queue.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_net::{VIRTIO_NET_F_CTRL_VLAN, VIRTIO_NET_F_RSS};

use super::coalesce::Coalescing;
use super::config::{MAX_KEY, MAX_TABLE, MacAddress};
use super::features::{GUEST_OFFLOADS, guest_offloads, has, tun_offloads};
use super::filter::{TABLE_SIZE, Table, VLANS, VlanSet};
use super::hash::{HASH_TYPES, Hashing, Toeplitz};
use super::link::Interface;
use super::settings::{Pairs, Settings, Shared};
use super::steering::Rss;
use crate::shell::{Chain as Causes, StateError, open_state, seal_state};

/// Of the device, in its state.
const KIND: &str = "net";
/// Version of [`NetState`].
const VERSION: u32 = 1;

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct NetState {
    mac: [u8; 6],
    /// In the order of the numbers of the commands (VIRTIO 1.3, 5.1.6.5.1).
    modes: [bool; 6],
    /// All pass if there were too many.
    unicast: Option<Vec<[u8; 6]>>,
    multicast: Option<Vec<[u8; 6]>>,
    /// Those that pass, if the driver filters them.
    vlans: Option<Vec<u16>>,
    pairs: PairsState,
    announce: bool,
    hash_types: u32,
    hash_key: Vec<u8>,
    rss: Option<RssState>,
    /// By queue: packets, and microseconds.
    coalescing: Vec<[u32; 2]>,
    /// The same of all receive queues, and of all transmit queues. Older programs do not know it: it is left out
    /// while there is nothing to say.
    #[serde(default, skip_serializing_if = "is_none")]
    coalescing_of_all: [[u32; 2]; 2],
    /// As bits of the features, if they are not those accepted.
    offloads: Option<u64>,
}

#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum PairsState {
    Enabled,
    First(u16),
    Fed,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct RssState {
    table: Vec<u16>,
    unclassified: u16,
    max_tx: u16,
}

fn is_none(coalescing: &[[u32; 2]; 2]) -> bool {
    *coalescing == [[0; 2]; 2]
}

fn numbers(coalescing: &Coalescing) -> [u32; 2] {
    [coalescing.max_packets, coalescing.max_usecs]
}

fn coalescing([max_packets, max_usecs]: [u32; 2]) -> Coalescing {
    Coalescing {
        max_packets,
        max_usecs,
    }
}

fn addresses(table: &Table) -> Option<Vec<[u8; 6]>> {
    match table {
        Table::Listed(list) => Some(list.iter().map(|address| address.octets()).collect()),
        Table::Overflow => None,
    }
}

fn table(addresses: Option<Vec<[u8; 6]>>) -> Table {
    match addresses {
        Some(list) => Table::Listed(list.into_iter().map(MacAddress::new).collect()),
        None => Table::Overflow,
    }
}

/// What the driver of a device has set.
pub(super) fn save(shared: &Shared) -> Result<Vec<u8>, StateError> {
    let settings = shared.get();
    let filter = &settings.filter;
    let state = NetState {
        mac: filter.mac.octets(),
        modes: [
            filter.promiscuous,
            filter.all_multicast,
            filter.all_unicast,
            filter.no_multicast,
            filter.no_unicast,
            filter.no_broadcast,
        ],
        unicast: addresses(&filter.unicast),
        multicast: addresses(&filter.multicast),
        vlans: filter.vlans.as_ref().map(|vlans| vlans.listed().collect()),
        pairs: match settings.pairs {
            Pairs::Enabled => PairsState::Enabled,
            Pairs::First(count) => PairsState::First(count),
            Pairs::Fed => PairsState::Fed,
        },
        announce: settings.announce,
        hash_types: settings.hashing.types,
        hash_key: settings.hashing.toeplitz.key(),
        rss: settings.rss.as_ref().map(|rss| RssState {
            table: rss.table.clone(),
            unclassified: rss.unclassified,
            max_tx: rss.max_tx,
        }),
        coalescing: settings.coalescing.iter().map(numbers).collect(),
        coalescing_of_all: settings.coalescing_of_all.each_ref().map(numbers),
        offloads: settings.offloads,
    };
    seal_state(KIND, VERSION, &state)
}

impl NetState {
    /// Refuses what no driver with these features could have set on a device with so many queue pairs.
    fn check(&self, features: u64, pairs: u16) -> Result<(), StateError> {
        let misfit = |why: String| Err(StateError::Misfit(why));
        if MacAddress::new(self.mac).is_group() || self.mac == [0; 6] {
            return misfit("its address is that of no interface".to_owned());
        }
        let lists = [&self.unicast, &self.multicast];
        if lists
            .into_iter()
            .flatten()
            .any(|list| list.len() > TABLE_SIZE)
        {
            return misfit(format!("more than {TABLE_SIZE} addresses are filtered"));
        }
        let mut vlans = self.vlans.iter().flatten();
        if self.vlans.is_some() != has(features, VIRTIO_NET_F_CTRL_VLAN)
            || vlans.any(|&vlan| vlan >= VLANS)
        {
            return misfit("its VLANs".to_owned());
        }
        if let PairsState::First(count) = self.pairs
            && (count == 0 || count > pairs)
        {
            return misfit(format!("{count} queue pairs are in use, of {pairs}"));
        }
        if self.coalescing.len() != usize::from(pairs) * 2 {
            let count = self.coalescing.len() / 2;
            return misfit(format!("it is of {count} queue pairs, and not of {pairs}"));
        }
        if self.hash_types & !HASH_TYPES != 0 || self.hash_key.len() > MAX_KEY {
            return misfit("its hashes".to_owned());
        }
        if self.offloads.unwrap_or(0) & !(features & GUEST_OFFLOADS) != 0 {
            return misfit("offloads that were not negotiated".to_owned());
        }
        let Some(RssState {
            table,
            unclassified,
            max_tx,
        }) = &self.rss
        else {
            return Ok(());
        };
        let mut all = table.iter().chain([unclassified]);
        if !has(features, VIRTIO_NET_F_RSS)
            || !table.len().is_power_of_two()
            || table.len() > MAX_TABLE
            || all.any(|&pair| pair >= pairs)
            || !(1..=pairs).contains(max_tx)
        {
            return misfit("its table of receive queues".to_owned());
        }
        Ok(())
    }
}

/// Has a device whose driver has accepted these features go on from what was saved.
pub(super) fn load(
    state: &[u8],
    features: u64,
    pairs: u16,
    shared: &Shared,
    interface: &dyn Interface,
) -> Result<(), StateError> {
    let state: NetState = open_state(KIND, VERSION, state)?;
    state.check(features, pairs)?;
    let hashing = Hashing {
        types: state.hash_types,
        toeplitz: Toeplitz::new(&state.hash_key),
    };
    let rss = state.rss.map(|rss| Rss {
        hashing: hashing.clone(),
        table: rss.table,
        unclassified: rss.unclassified,
        max_tx: rss.max_tx,
    });
    let offloads = state.offloads.unwrap_or(guest_offloads(features));
    interface
        .set_steering(rss.clone())
        .and_then(|()| interface.set_offloads(tun_offloads(offloads)))
        .map_err(|error| StateError::Misfit(Causes(&error).to_string()))?;
    shared.change(|settings: &mut Settings| {
        let filter = &mut settings.filter;
        filter.mac = MacAddress::new(state.mac);
        [
            filter.promiscuous,
            filter.all_multicast,
            filter.all_unicast,
            filter.no_multicast,
            filter.no_unicast,
            filter.no_broadcast,
        ] = state.modes;
        filter.unicast = table(state.unicast);
        filter.multicast = table(state.multicast);
        filter.vlans = state.vlans.map(|list| {
            let mut vlans = VlanSet::default();
            list.into_iter().for_each(|vlan| vlans.set(vlan, true));
            vlans
        });
        settings.pairs = match state.pairs {
            PairsState::Enabled => Pairs::Enabled,
            PairsState::First(count) => Pairs::First(count),
            PairsState::Fed => Pairs::Fed,
        };
        settings.announce = state.announce;
        settings.offloads = state.offloads;
        settings.hashing = Arc::new(hashing);
        settings.rss = rss.map(Arc::new);
        settings.coalescing = state.coalescing.into_iter().map(coalescing).collect();
        settings.coalescing_of_all = state.coalescing_of_all.map(coalescing);
    });
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::net::filter::Filter;
    use crate::net::link::LinkError;
    use serde_json::{Value, json};
    use std::sync::Mutex;
    use virtio_bindings::virtio_net::VIRTIO_NET_F_GUEST_CSUM;

    const PAIRS: u16 = 2;
    const FEATURES: u64 =
        1 << VIRTIO_NET_F_CTRL_VLAN | 1 << VIRTIO_NET_F_RSS | 1 << VIRTIO_NET_F_GUEST_CSUM;

    /// A link with several queues that remembers what it was told.
    #[derive(Debug, Default)]
    struct Told(Mutex<(Option<Rss>, u32)>);

    impl Interface for Told {
        fn set_header_len(&self, _len: u8) -> Result<(), LinkError> {
            Ok(())
        }
        fn set_offloads(&self, offloads: u32) -> Result<(), LinkError> {
            self.0.lock().unwrap().1 = offloads;
            Ok(())
        }
        fn set_steering(&self, rss: Option<Rss>) -> Result<(), LinkError> {
            self.0.lock().unwrap().0 = rss;
            Ok(())
        }
    }

    fn device() -> (Shared, Told) {
        let filter = Filter::new(MacAddress::new([2, 0, 0, 0, 0, 1]), true);
        let shared = Shared::new(Settings::new(filter, PAIRS), PAIRS).unwrap();
        (shared, Told::default())
    }

    fn load_into((shared, told): &(Shared, Told), state: &[u8]) -> Result<(), StateError> {
        load(state, FEATURES, PAIRS, shared, told)
    }

    fn save_of((shared, _): &(Shared, Told)) -> Vec<u8> {
        save(shared).unwrap()
    }

    /// One in which nothing is as it is at first.
    fn full() -> Value {
        json!({
            "mac": [2, 0, 0, 0, 0, 7],
            "modes": [false, true, true, true, true, true],
            "unicast": null,
            "multicast": [[1, 0, 0, 0, 0, 1]],
            "vlans": [0, 4095],
            "pairs": { "first": 2 },
            "announce": true,
            "hash-types": HASH_TYPES,
            "hash-key": [1, 2, 3],
            "rss": { "table": [0, 1], "unclassified": 1, "max-tx": 2 },
            "coalescing": [[1, 2], [3, 4], [5, 6], [7, 8]],
            "coalescing-of-all": [[5, 6], [9, 10]],
            "offloads": 0,
        })
    }

    #[test]
    fn all_of_it_comes_over() {
        let (from, to) = (device(), device());
        let before = save_of(&from);
        let state = seal_state(KIND, VERSION, &full()).unwrap();
        load_into(&from, &state).unwrap();
        let saved = save_of(&from);
        let found: Value = open_state(KIND, VERSION, &saved).unwrap();
        assert_eq!(found, full());
        load_into(&to, &saved).unwrap();
        assert_eq!(save_of(&to), saved);
        assert_eq!(to.1.0.lock().unwrap().1, 0);
        let settings = to.0.get();
        assert_eq!(settings.pairs, Pairs::First(2));
        assert!(!settings.filter.passes(&[0xff; 18]));
        load_into(&to, &before).unwrap();
        assert_eq!(save_of(&to), before);
    }

    #[test]
    fn a_state_of_older_programs_says_nothing_of_all_queues() {
        let device = device();
        let mut older = full();
        older.as_object_mut().unwrap().remove("coalescing-of-all");
        let state = seal_state(KIND, VERSION, &older).unwrap();
        load_into(&device, &state).unwrap();
        assert_eq!(device.0.get().coalescing_of_all, [Coalescing::default(); 2]);
        // And they read what is saved then.
        let saved: Value = open_state(KIND, VERSION, &save_of(&device)).unwrap();
        assert_eq!(saved, older);
    }

    #[test]
    fn what_no_driver_could_have_set_is_refused() {
        let device = device();
        let before = save_of(&device);
        let many = vec![[2, 0, 0, 0, 0, 1]; TABLE_SIZE + 1];
        for (place, wrong) in [
            ("/mac/0", json!(1)),
            ("/mac", json!([0, 0, 0, 0, 0, 0])),
            ("/mac", json!([2, 0])),
            ("/modes", json!([true])),
            ("/unicast", json!(many)),
            ("/vlans", Value::Null),
            ("/vlans/0", json!(4096)),
            ("/pairs", json!({ "first": 0 })),
            ("/pairs", json!({ "first": 3 })),
            ("/pairs", json!("none")),
            ("/hash-types", json!(u32::MAX)),
            ("/hash-key", json!(vec![1; MAX_KEY + 1])),
            ("/rss/table", json!([0, 1, 0])),
            ("/rss/table", json!([])),
            ("/rss/table", json!([0, 2])),
            ("/rss/table", json!(vec![0; 2 * MAX_TABLE])),
            ("/rss/unclassified", json!(2)),
            ("/rss/max-tx", json!(0)),
            ("/rss/max-tx", json!(3)),
            ("/coalescing", json!([[1, 2]])),
            ("/offloads", json!(1_u64 << 63)),
        ] {
            let mut state = full();
            *state.pointer_mut(place).unwrap() = wrong;
            let state = seal_state(KIND, VERSION, &state).unwrap();
            assert!(load_into(&device, &state).is_err(), "{place}");
            assert_eq!(save_of(&device), before, "{place}");
        }
        let mut more = full();
        more["more"] = json!(1);
        let more = seal_state(KIND, VERSION, &more).unwrap();
        assert!(load_into(&device, &more).is_err());
    }
}

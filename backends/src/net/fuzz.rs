//! Commands and frames as a fuzzer makes them. It panics at what is wrong: it is for tests only.
#![allow(missing_docs, clippy::panic)]

use super::config::MacAddress;
use super::control::{ControlCommand, RxMode, parse};
use super::filter::Filter;
use super::hash::{Hashing, PEEK};

pub use super::switch::fuzz_frame as frame;

/// The first bytes are features and queue pairs; then come commands, each behind its length; what is left is a frame.
pub fn control(bytes: &[u8]) {
    let Some(([features @ .., pairs, commands], mut rest)) = bytes.split_first_chunk::<10>() else {
        return;
    };
    let features = u64::from_le_bytes(*features);
    let max_pairs = u16::from(pairs % 64) + 1;
    let mut filter = Filter::new(MacAddress::new([2, 0, 0, 0, 0, 1]), features & 1 != 0);
    let mut hashing = Hashing::off();
    for _ in 0..commands % 16 {
        let Some((len, behind)) = rest.split_first_chunk() else {
            break;
        };
        let len = usize::from(u16::from_le_bytes(*len)).min(behind.len());
        let (command, behind) = behind.split_at(len);
        rest = behind;
        match parse(features, max_pairs, command) {
            Ok(ControlCommand::Pairs(pairs)) => assert!((1..=max_pairs).contains(&pairs)),
            Ok(ControlCommand::Coalesce(queue, _) | ControlCommand::TellCoalescing(queue)) => {
                assert!(queue < 2 * max_pairs);
            }
            Ok(ControlCommand::GuestOffloads(offloads)) => assert_eq!(offloads & !features, 0),
            Ok(ControlCommand::Rss(rss)) => {
                assert!(rss.table.len().is_power_of_two());
                assert!(rss.table.iter().all(|&pair| pair < max_pairs));
                assert!(rss.unclassified < max_pairs && (1..=max_pairs).contains(&rss.max_tx));
                hashing = rss.hashing;
            }
            Ok(ControlCommand::Hash(new)) => hashing = new,
            Ok(ControlCommand::Rx(mode, on)) => match mode {
                RxMode::Promiscuous => filter.promiscuous = on,
                RxMode::AllMulticast => filter.all_multicast = on,
                RxMode::AllUnicast => filter.all_unicast = on,
                RxMode::NoMulticast => filter.no_multicast = on,
                RxMode::NoUnicast => filter.no_unicast = on,
                RxMode::NoBroadcast => filter.no_broadcast = on,
            },
            Ok(ControlCommand::MacTable { unicast, multicast }) => {
                (filter.unicast, filter.multicast) = (unicast, multicast);
            }
            Ok(ControlCommand::MacAddress(mac)) => {
                assert!(!mac.is_group());
                filter.mac = mac;
            }
            Ok(ControlCommand::Vlan(vlan, pass)) => {
                if let Some(vlans) = &mut filter.vlans {
                    vlans.set(vlan, pass);
                }
            }
            Ok(ControlCommand::AnnounceAck | ControlCommand::CoalesceAll(..)) | Err(_) => {}
        }
    }
    let start = rest.get(..PEEK).unwrap_or(rest);
    filter.promiscuous = false;
    let passes = filter.passes(start);
    filter.promiscuous = true;
    assert!(filter.passes(start) || !passes);
    let report = hashing.report(start);
    assert!(hashing.types != 0 || report.kind == 0);
}

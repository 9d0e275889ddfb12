//! Commands of the control queue (VIRTIO 1.3, 5.1.6.5): parsing, apart from obeying.

use thiserror::Error;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_CTRL_ANNOUNCE, VIRTIO_NET_CTRL_ANNOUNCE_ACK, VIRTIO_NET_CTRL_GUEST_OFFLOADS,
    VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET, VIRTIO_NET_CTRL_MAC, VIRTIO_NET_CTRL_MAC_ADDR_SET,
    VIRTIO_NET_CTRL_MAC_TABLE_SET, VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_HASH_CONFIG,
    VIRTIO_NET_CTRL_MQ_RSS_CONFIG, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET, VIRTIO_NET_CTRL_NOTF_COAL,
    VIRTIO_NET_CTRL_NOTF_COAL_RX_SET, VIRTIO_NET_CTRL_NOTF_COAL_TX_SET,
    VIRTIO_NET_CTRL_NOTF_COAL_VQ_GET, VIRTIO_NET_CTRL_NOTF_COAL_VQ_SET, VIRTIO_NET_CTRL_RX,
    VIRTIO_NET_CTRL_RX_ALLMULTI, VIRTIO_NET_CTRL_RX_ALLUNI, VIRTIO_NET_CTRL_RX_NOBCAST,
    VIRTIO_NET_CTRL_RX_NOMULTI, VIRTIO_NET_CTRL_RX_NOUNI, VIRTIO_NET_CTRL_RX_PROMISC,
    VIRTIO_NET_CTRL_VLAN, VIRTIO_NET_CTRL_VLAN_ADD, VIRTIO_NET_CTRL_VLAN_DEL,
    VIRTIO_NET_F_CTRL_GUEST_OFFLOADS, VIRTIO_NET_F_CTRL_MAC_ADDR, VIRTIO_NET_F_CTRL_RX,
    VIRTIO_NET_F_CTRL_RX_EXTRA, VIRTIO_NET_F_CTRL_VLAN, VIRTIO_NET_F_GUEST_ANNOUNCE,
    VIRTIO_NET_F_HASH_REPORT, VIRTIO_NET_F_MQ, VIRTIO_NET_F_NOTF_COAL, VIRTIO_NET_F_RSS,
    VIRTIO_NET_F_VQ_NOTF_COAL,
};

use super::coalesce::Coalescing;
use super::config::{MAX_KEY, MAX_TABLE, MacAddress};
use super::features::{GUEST_OFFLOADS, has};
use super::filter::{TABLE_SIZE, Table, VLANS};
use super::hash::{HASH_TYPES, Hashing, Toeplitz};
use super::steering::Rss;

/// The longest command that is read, in bytes. A MAC table of ten thousand addresses fits.
pub(super) const MAX_COMMAND: usize = 65536;

/// What a driver commands.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum ControlCommand {
    /// Switches one receive mode (5.1.6.5.1).
    Rx(RxMode, bool),
    /// Replaces the tables of addresses (5.1.6.5.2).
    MacTable {
        /// Of single interfaces.
        unicast: Table,
        /// Of groups.
        multicast: Table,
    },
    /// Sets the device's own address (5.1.6.5.2).
    MacAddress(MacAddress),
    /// Lets a VLAN pass, or not (5.1.6.5.3).
    Vlan(u16, bool),
    /// The driver has announced itself (5.1.6.5.4).
    AnnounceAck,
    /// Uses this many queue pairs (5.1.6.5.5).
    Pairs(u16),
    /// Takes packets with these offloads, as bits of the features (5.1.6.5.8).
    GuestOffloads(u64),
    /// Holds interrupts of all queues of one direction back (5.1.6.5.9).
    CoalesceAll(Direction, Coalescing),
    /// Holds interrupts of one queue back (5.1.6.5.9).
    Coalesce(u16, Coalescing),
    /// Spreads packets over receive queues by their hash (5.1.6.5.7).
    Rss(Rss),
    /// Reports hashes of packets (5.1.6.5.7.4).
    Hash(Hashing),
    /// Says how interrupts of one queue are held back (5.1.6.5.9).
    TellCoalescing(u16),
}

/// Where packets of a queue go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Direction {
    /// To the driver.
    Receive,
    /// From it.
    Transmit,
}

/// Receive modes (5.1.6.5.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum RxMode {
    Promiscuous,
    AllMulticast,
    AllUnicast,
    NoMulticast,
    NoUnicast,
    NoBroadcast,
}

/// Why a command is answered with VIRTIO_NET_ERR.
#[derive(Debug, Error, PartialEq, Eq)]
pub(super) enum ControlError {
    /// Nothing is known by these numbers, or its feature was not negotiated.
    #[error("command {command} of class {class} is unknown or was not negotiated")]
    Unknown { class: u8, command: u8 },
    /// The data of the command ends too soon, or is too long.
    #[error("command {command} of class {class} has data of a wrong length")]
    Length { class: u8, command: u8 },
    /// A value that the specification does not allow.
    #[error("command {command} of class {class}: value {value} is not allowed")]
    Value { class: u8, command: u8, value: u64 },
}

/// Reads a command: class, command and data (struct virtio_net_ctrl without `ack`).
///
/// `features` are those the driver accepted, `max_pairs` the queue pairs of the device.
pub(super) fn parse(
    features: u64,
    max_pairs: u16,
    bytes: &[u8],
) -> Result<ControlCommand, ControlError> {
    let (class, command, data) = match bytes {
        [class, command, data @ ..] => (*class, *command, data),
        _ => {
            return Err(ControlError::Length {
                class: bytes.first().copied().unwrap_or(0),
                command: 0,
            });
        }
    };
    let unknown = ControlError::Unknown { class, command };
    let length = || ControlError::Length { class, command };
    let value = |value| ControlError::Value {
        class,
        command,
        value,
    };
    let u16_le = || {
        <[u8; 2]>::try_from(data)
            .map(u16::from_le_bytes)
            .map_err(|_| length())
    };
    match (u32::from(class), u32::from(command)) {
        (VIRTIO_NET_CTRL_RX, number) => {
            let (mode, feature) = match number {
                VIRTIO_NET_CTRL_RX_PROMISC => (RxMode::Promiscuous, VIRTIO_NET_F_CTRL_RX),
                VIRTIO_NET_CTRL_RX_ALLMULTI => (RxMode::AllMulticast, VIRTIO_NET_F_CTRL_RX),
                VIRTIO_NET_CTRL_RX_ALLUNI => (RxMode::AllUnicast, VIRTIO_NET_F_CTRL_RX_EXTRA),
                VIRTIO_NET_CTRL_RX_NOMULTI => (RxMode::NoMulticast, VIRTIO_NET_F_CTRL_RX_EXTRA),
                VIRTIO_NET_CTRL_RX_NOUNI => (RxMode::NoUnicast, VIRTIO_NET_F_CTRL_RX_EXTRA),
                VIRTIO_NET_CTRL_RX_NOBCAST => (RxMode::NoBroadcast, VIRTIO_NET_F_CTRL_RX_EXTRA),
                _ => return Err(unknown),
            };
            if !has(features, feature) {
                return Err(unknown);
            }
            match data {
                [0] => Ok(ControlCommand::Rx(mode, false)),
                [1] => Ok(ControlCommand::Rx(mode, true)),
                [other] => Err(value(u64::from(*other))),
                _ => Err(length()),
            }
        }
        // The table belongs to the receive filters, the address has a feature of its own (5.1.6.5.2).
        (VIRTIO_NET_CTRL_MAC, VIRTIO_NET_CTRL_MAC_TABLE_SET)
            if has(features, VIRTIO_NET_F_CTRL_RX) =>
        {
            let (unicast, rest) = parse_table(data).ok_or_else(length)?;
            let (multicast, rest) = parse_table(rest).ok_or_else(length)?;
            if rest.is_empty() {
                Ok(ControlCommand::MacTable { unicast, multicast })
            } else {
                Err(length())
            }
        }
        (VIRTIO_NET_CTRL_MAC, VIRTIO_NET_CTRL_MAC_ADDR_SET)
            if has(features, VIRTIO_NET_F_CTRL_MAC_ADDR) =>
        {
            let bytes = <[u8; 6]>::try_from(data).map_err(|_| length())?;
            let address = MacAddress::new(bytes);
            // A group cannot be an interface's own address.
            if address.is_group() || address == MacAddress::default() {
                let [a, b, c, d, e, f] = bytes;
                return Err(value(u64::from_be_bytes([0, 0, a, b, c, d, e, f])));
            }
            Ok(ControlCommand::MacAddress(address))
        }
        (VIRTIO_NET_CTRL_VLAN, number @ (VIRTIO_NET_CTRL_VLAN_ADD | VIRTIO_NET_CTRL_VLAN_DEL))
            if has(features, VIRTIO_NET_F_CTRL_VLAN) =>
        {
            let vlan = u16_le()?;
            if vlan >= VLANS {
                return Err(value(vlan.into()));
            }
            Ok(ControlCommand::Vlan(
                vlan,
                number == VIRTIO_NET_CTRL_VLAN_ADD,
            ))
        }
        (VIRTIO_NET_CTRL_ANNOUNCE, VIRTIO_NET_CTRL_ANNOUNCE_ACK)
            if has(features, VIRTIO_NET_F_GUEST_ANNOUNCE) =>
        {
            if data.is_empty() {
                Ok(ControlCommand::AnnounceAck)
            } else {
                Err(length())
            }
        }
        (VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET) if has(features, VIRTIO_NET_F_MQ) => {
            let pairs = u16_le()?;
            if pairs == 0 || pairs > max_pairs {
                return Err(value(pairs.into()));
            }
            Ok(ControlCommand::Pairs(pairs))
        }
        (VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_RSS_CONFIG) if has(features, VIRTIO_NET_F_RSS) => {
            let (head, rest) = data.split_first_chunk::<8>().ok_or_else(length)?;
            let [a, b, c, d, mask_low, mask_high, rest_low, rest_high] = *head;
            let types = u32::from_le_bytes([a, b, c, d]);
            let mask = u16::from_le_bytes([mask_low, mask_high]);
            let entries = usize::from(mask) + 1;
            if !entries.is_power_of_two() || entries > MAX_TABLE {
                return Err(value(mask.into()));
            }
            let (table, rest) = rest.split_at_checked(2 * entries).ok_or_else(length)?;
            let table = table.chunks_exact(2);
            let mut table: Vec<u16> = table
                .filter_map(|entry| <[u8; 2]>::try_from(entry).ok())
                .map(u16::from_le_bytes)
                .collect();
            let unclassified = u16::from_le_bytes([rest_low, rest_high]);
            // Bits 1 to 16 of a receive queue's number, which is its pair's; the highest is reserved.
            table.push(unclassified);
            if let Some(&pair) = table.iter().find(|&&pair| pair >= max_pairs) {
                return Err(value(pair.into()));
            }
            table.pop();
            let (max_tx, rest) = rest.split_first_chunk().ok_or_else(length)?;
            let max_tx = u16::from_le_bytes(*max_tx);
            if max_tx == 0 || max_tx > max_pairs {
                return Err(value(max_tx.into()));
            }
            Ok(ControlCommand::Rss(Rss {
                hashing: parse_hashing(types, rest, value).ok_or_else(length)??,
                table,
                unclassified,
                max_tx,
            }))
        }
        (VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_HASH_CONFIG)
            if has(features, VIRTIO_NET_F_HASH_REPORT) =>
        {
            // The types, then what is in their place for RSS.
            let (head, rest) = data.split_first_chunk::<12>().ok_or_else(length)?;
            let [a, b, c, d, ..] = *head;
            let types = u32::from_le_bytes([a, b, c, d]);
            parse_hashing(types, rest, value)
                .ok_or_else(length)?
                .map(ControlCommand::Hash)
        }
        (VIRTIO_NET_CTRL_GUEST_OFFLOADS, VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET)
            if has(features, VIRTIO_NET_F_CTRL_GUEST_OFFLOADS) =>
        {
            let bytes = <[u8; 8]>::try_from(data).map_err(|_| length())?;
            let offloads = u64::from_le_bytes(bytes);
            if offloads & !(features & GUEST_OFFLOADS) != 0 {
                return Err(value(offloads));
            }
            Ok(ControlCommand::GuestOffloads(offloads))
        }
        (
            VIRTIO_NET_CTRL_NOTF_COAL,
            number @ (VIRTIO_NET_CTRL_NOTF_COAL_TX_SET | VIRTIO_NET_CTRL_NOTF_COAL_RX_SET),
        ) if has(features, VIRTIO_NET_F_NOTF_COAL) => {
            let direction = if number == VIRTIO_NET_CTRL_NOTF_COAL_RX_SET {
                Direction::Receive
            } else {
                Direction::Transmit
            };
            let (coalescing, rest) = parse_coalescing(data).ok_or_else(length)?;
            if rest.is_empty() {
                Ok(ControlCommand::CoalesceAll(direction, coalescing))
            } else {
                Err(length())
            }
        }
        (
            VIRTIO_NET_CTRL_NOTF_COAL,
            number @ (VIRTIO_NET_CTRL_NOTF_COAL_VQ_SET | VIRTIO_NET_CTRL_NOTF_COAL_VQ_GET),
        ) if has(features, VIRTIO_NET_F_VQ_NOTF_COAL) => {
            // vq_index and a reserved field.
            let ([low, high, _, _], data) = data.split_first_chunk().ok_or_else(length)?;
            let queue = u16::from_le_bytes([*low, *high]);
            // Not the control queue.
            if queue >= max_pairs.saturating_mul(2) {
                return Err(value(queue.into()));
            }
            if number == VIRTIO_NET_CTRL_NOTF_COAL_VQ_GET {
                return if data.is_empty() {
                    Ok(ControlCommand::TellCoalescing(queue))
                } else {
                    Err(length())
                };
            }
            let (coalescing, rest) = parse_coalescing(data).ok_or_else(length)?;
            if rest.is_empty() {
                Ok(ControlCommand::Coalesce(queue, coalescing))
            } else {
                Err(length())
            }
        }
        _ => Err(unknown),
    }
}

/// Reads the length of a key, and the key. What is behind it is padding of Linux's structures.
fn parse_hashing(
    types: u32,
    data: &[u8],
    value: impl Fn(u64) -> ControlError,
) -> Option<Result<Hashing, ControlError>> {
    let (&len, key) = data.split_first()?;
    if types & !HASH_TYPES != 0 {
        return Some(Err(value(types.into())));
    }
    if usize::from(len) > MAX_KEY {
        return Some(Err(value(len.into())));
    }
    let key = key.get(..usize::from(len))?;
    Some(Ok(Hashing {
        types,
        toeplitz: Toeplitz::new(key),
    }))
}

/// Reads one struct virtio_net_ctrl_coal.
fn parse_coalescing(data: &[u8]) -> Option<(Coalescing, &[u8])> {
    let (max_packets, rest) = data.split_first_chunk()?;
    let (max_usecs, rest) = rest.split_first_chunk()?;
    let coalescing = Coalescing {
        max_packets: u32::from_le_bytes(*max_packets),
        max_usecs: u32::from_le_bytes(*max_usecs),
    };
    Some((coalescing, rest))
}

/// Reads one struct virtio_net_ctrl_mac: le32 entries, then that many addresses.
fn parse_table(data: &[u8]) -> Option<(Table, &[u8])> {
    let (count, rest) = data.split_first_chunk::<4>()?;
    let count = usize::try_from(u32::from_le_bytes(*count)).ok()?;
    let (entries, rest) = rest.split_at_checked(count.checked_mul(6)?)?;
    let table = if count > TABLE_SIZE {
        Table::Overflow
    } else {
        let entries = entries.chunks_exact(6);
        let addresses = entries.filter_map(|e| <[u8; 6]>::try_from(e).ok());
        Table::Listed(addresses.map(MacAddress::new).collect())
    };
    Some((table, rest))
}

#[cfg(test)]
#[allow(
    clippy::cast_possible_truncation,
    reason = "all numbers of these tests are small"
)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn ok(bytes: &[u8]) -> ControlCommand {
        parse(u64::MAX, 4, bytes).unwrap()
    }

    fn fails(bytes: &[u8]) -> ControlError {
        parse(u64::MAX, 4, bytes).unwrap_err()
    }

    #[test]
    fn receive_modes() {
        let modes = [
            RxMode::Promiscuous,
            RxMode::AllMulticast,
            RxMode::AllUnicast,
            RxMode::NoMulticast,
            RxMode::NoUnicast,
            RxMode::NoBroadcast,
        ];
        for (number, mode) in (0..).zip(modes) {
            assert_eq!(ok(&[0, number, 1]), ControlCommand::Rx(mode, true));
            assert_eq!(ok(&[0, number, 0]), ControlCommand::Rx(mode, false));
        }
        assert!(matches!(
            fails(&[0, 0, 2]),
            ControlError::Value { value: 2, .. }
        ));
        assert!(matches!(fails(&[0, 0]), ControlError::Length { .. }));
        assert!(matches!(fails(&[0, 0, 1, 1]), ControlError::Length { .. }));
        assert!(matches!(fails(&[0, 6, 1]), ControlError::Unknown { .. }));
    }

    #[test]
    fn mac_tables() {
        let mut bytes = vec![1, 0, 1, 0, 0, 0, 2, 0, 0, 0, 0, 1, 2, 0, 0, 0];
        bytes.extend([1, 0, 0x5e, 0, 0, 1, 1, 0, 0x5e, 0, 0, 2]);
        let ControlCommand::MacTable { unicast, multicast } = ok(&bytes) else {
            panic!("not a table");
        };
        assert_eq!(
            unicast,
            Table::Listed(vec![MacAddress::new([2, 0, 0, 0, 0, 1])])
        );
        assert!(matches!(multicast, Table::Listed(list) if list.len() == 2));
        for cut in 2..bytes.len() {
            assert!(
                matches!(fails(&bytes[..cut]), ControlError::Length { .. }),
                "{cut}"
            );
        }
        bytes.push(0);
        assert!(matches!(fails(&bytes), ControlError::Length { .. }));
        // A count that overflows everything.
        assert!(matches!(
            fails(&[1, 0, 0xff, 0xff, 0xff, 0xff, 1]),
            ControlError::Length { .. }
        ));
    }

    #[test]
    fn long_tables_overflow_instead_of_growing() {
        let mut bytes = vec![1, 0];
        bytes.extend(65_u32.to_le_bytes());
        bytes.extend([2; 65 * 6]);
        bytes.extend([0; 4]);
        let expected = ControlCommand::MacTable {
            unicast: Table::Overflow,
            multicast: Table::default(),
        };
        assert_eq!(ok(&bytes), expected);
    }

    #[test]
    fn the_other_commands() {
        assert_eq!(ok(&[2, 0, 7, 0]), ControlCommand::Vlan(7, true));
        assert_eq!(ok(&[2, 1, 0xff, 0x0f]), ControlCommand::Vlan(4095, false));
        assert!(matches!(
            fails(&[2, 0, 0, 0x10]),
            ControlError::Value { value: 4096, .. }
        ));
        assert_eq!(ok(&[3, 0]), ControlCommand::AnnounceAck);
        assert!(matches!(fails(&[3, 0, 0]), ControlError::Length { .. }));
        assert_eq!(ok(&[4, 0, 4, 0]), ControlCommand::Pairs(4));
        assert!(matches!(
            fails(&[4, 0, 0, 0]),
            ControlError::Value { value: 0, .. }
        ));
        assert!(matches!(
            fails(&[4, 0, 5, 0]),
            ControlError::Value { value: 5, .. }
        ));
        assert!(matches!(fails(&[4, 3, 5, 0]), ControlError::Unknown { .. }));
        assert_eq!(
            ok(&[1, 1, 2, 3, 4, 5, 6, 7]),
            ControlCommand::MacAddress(MacAddress::new([2, 3, 4, 5, 6, 7]))
        );
        assert!(matches!(
            fails(&[1, 1, 1, 3, 4, 5, 6, 7]),
            ControlError::Value { .. }
        ));
        assert_eq!(
            ok(&[5, 0, 0x82, 0, 0, 0, 0, 0, 0, 0]),
            ControlCommand::GuestOffloads(0x82)
        );
        assert!(matches!(
            fails(&[5, 0, 1, 0, 0, 0, 0, 0, 0, 0]),
            ControlError::Value { .. }
        ));
        assert!(matches!(fails(&[]), ControlError::Length { .. }));
        assert!(matches!(fails(&[4]), ControlError::Length { .. }));
        assert!(matches!(fails(&[9, 0]), ControlError::Unknown { .. }));
    }

    /// RSS_CONFIG: types, mask, pair of what is not hashed, table, transmit queues, key.
    fn rss(
        types: u32,
        mask: u16,
        unclassified: u16,
        table: &[u16],
        max_tx: u16,
        key: &[u8],
    ) -> Vec<u8> {
        let mut bytes = vec![4, 1];
        bytes.extend(types.to_le_bytes());
        bytes.extend(mask.to_le_bytes());
        bytes.extend(unclassified.to_le_bytes());
        bytes.extend(table.iter().flat_map(|pair| pair.to_le_bytes()));
        bytes.extend(max_tx.to_le_bytes());
        bytes.push(key.len() as u8);
        bytes.extend(key);
        bytes
    }

    #[test]
    fn receive_side_scaling() {
        let whole = rss(0x3f, 3, 2, &[0, 1, 3, 0], 4, &[7; 40]);
        let ControlCommand::Rss(set) = ok(&whole) else {
            panic!("not RSS");
        };
        assert_eq!(set.table, [0, 1, 3, 0]);
        assert_eq!((set.unclassified, set.max_tx, set.pairs()), (2, 4, 4));
        let hashing = Hashing {
            types: 0x3f,
            toeplitz: Toeplitz::new(&[7; 40]),
        };
        assert_eq!(set.hashing, hashing);
        for cut in 2..whole.len() {
            assert!(
                fails(&whole[..cut])
                    == ControlError::Length {
                        class: 4,
                        command: 1
                    },
                "{cut}"
            );
        }
        let padded = [whole.as_slice(), &[0xff]].concat();
        assert_eq!(ok(&padded), ok(&whole));
        // The longest table, and one that is longer; one entry alone; a short key, and none.
        assert!(parse(u64::MAX, 4, &rss(1, 127, 0, &[3; 128], 1, &[1; 16])).is_ok());
        assert!(parse(u64::MAX, 4, &rss(0, 0, 0, &[0], 1, &[])).is_ok());
        for (bytes, wrong) in [
            (rss(0x40, 0, 0, &[0], 1, &[7; 40]), 0x40),
            (rss(1, 255, 0, &[0; 256], 1, &[7; 40]), 255),
            (rss(1, 2, 0, &[0; 3], 1, &[7; 40]), 2),
            (rss(1, u16::MAX, 0, &[0; 16], 1, &[7; 40]), 0xffff),
            (rss(1, 1, 0, &[0, 4], 1, &[7; 40]), 4),
            (rss(1, 1, 0, &[0x8000, 0], 1, &[7; 40]), 0x8000),
            (rss(1, 0, 4, &[0], 1, &[7; 40]), 4),
            (rss(1, 0, 0, &[0], 0, &[7; 40]), 0),
            (rss(1, 0, 0, &[0], 5, &[7; 40]), 5),
            (rss(1, 0, 0, &[0], 1, &[7; 41]), 41),
        ] {
            assert!(
                matches!(fails(&bytes), ControlError::Value { value, .. } if value == wrong),
                "{wrong}"
            );
        }
    }

    #[test]
    fn hash_reports() {
        let mut bytes = vec![4, 2, 0x3f, 0, 0, 0];
        bytes.extend([0xff; 8]);
        bytes.push(40);
        bytes.extend([7; 40]);
        assert!(matches!(ok(&bytes), ControlCommand::Hash(hashing) if hashing.types == 0x3f));
        for cut in 2..bytes.len() {
            assert!(matches!(fails(&bytes[..cut]), ControlError::Length { .. }));
        }
        bytes[3] = 1;
        assert!(matches!(
            fails(&bytes),
            ControlError::Value { value: 0x13f, .. }
        ));
    }

    #[test]
    fn coalescing() {
        let limits = Coalescing {
            max_packets: 16,
            max_usecs: 0x0102_0304,
        };
        let coal = [16, 0, 0, 0, 4, 3, 2, 1];
        let with = |start: &[u8]| [start, &coal].concat();
        for (number, direction) in [(0, Direction::Transmit), (1, Direction::Receive)] {
            let set = with(&[6, number]);
            assert_eq!(ok(&set), ControlCommand::CoalesceAll(direction, limits));
            for cut in 2..set.len() {
                assert!(matches!(fails(&set[..cut]), ControlError::Length { .. }));
            }
            let long = [set.as_slice(), &[0]].concat();
            assert!(matches!(fails(&long), ControlError::Length { .. }));
        }
        let set = with(&[6, 2, 7, 0, 0, 0]);
        assert_eq!(ok(&set), ControlCommand::Coalesce(7, limits));
        for cut in 2..set.len() {
            assert!(matches!(fails(&set[..cut]), ControlError::Length { .. }));
        }
        let get = [6, 3, 7, 0, 0, 0];
        assert_eq!(ok(&get), ControlCommand::TellCoalescing(7));
        assert!(matches!(fails(&get[..5]), ControlError::Length { .. }));
        assert!(matches!(
            fails(&[6, 3, 7, 0, 0, 0, 0]),
            ControlError::Length { .. }
        ));
        // The control queue of four pairs, and none.
        for queue in [8, 0xff] {
            let value = u64::from(queue);
            for bytes in [with(&[6, 2, queue, 0, 0, 0]), vec![6, 3, queue, 0, 0, 0]] {
                assert!(
                    matches!(fails(&bytes), ControlError::Value { value: v, .. } if v == value)
                );
            }
        }
    }

    #[test]
    fn what_was_not_negotiated_is_unknown() {
        let rss = rss(0, 0, 0, &[0], 1, &[]);
        let commands: [&[u8]; 13] = [
            &rss,
            &[4, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
            &[0, 0, 1],
            &[0, 2, 1],
            &[1, 0, 0, 0, 0, 0, 0, 0, 0, 0],
            &[1, 1, 2, 3, 4, 5, 6, 7],
            &[2, 0, 1, 0],
            &[3, 0],
            &[4, 0, 1, 0],
            &[5, 0, 0, 0, 0, 0, 0, 0, 0, 0],
            &[6, 0, 0, 0, 0, 0, 0, 0, 0, 0],
            &[6, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
            &[6, 3, 0, 0, 0, 0],
        ];
        for bytes in commands {
            assert!(parse(u64::MAX, 4, bytes).is_ok());
            let result = parse(0, 4, bytes);
            assert!(
                matches!(result, Err(ControlError::Unknown { .. })),
                "{bytes:?}"
            );
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_answered(features: u64, pairs in 1_u16..64, bytes in prop::collection::vec(0_u8..8, 0..80)) {
            if let Ok(ControlCommand::Pairs(set)) = parse(features, pairs, &bytes) {
                prop_assert!((1..=pairs).contains(&set));
            }
        }
    }
}

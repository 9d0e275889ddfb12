//! What the guest is offered: the back-end's features, queues and configuration, less what the VMM
//! or the user do not want.
//!
//! vhost-user has no message that tells a device's type, so a socket of another type is recognised
//! by what cannot be:
//!
//! - A block device needs a configuration (its size is there), and feature bits 18 to 23 and 50 to
//!   63 mean nothing for it, while network back-ends with a configuration have a control queue and
//!   so some of these. Bits 15 to 17 come with at least one of bits 2, 6 and 9.
//! - A network card whose back-end has a configuration offers at least one of bits 15 to 23 and 50
//!   to 63 (mergeable buffers, link status, control queue, …), while block back-ends use bits 0 to
//!   14 only, but for bits 15 to 17 of zoned and secure-erase disks, which are told by bits 2, 6
//!   and 9.
//! - For all types: the configuration can be read in the size that belongs to it.

use std::hash::{BuildHasher, Hasher, RandomState};
use std::ops::Range;

use super::link::{
    F_LOG_ALL, F_PROTOCOL_FEATURES, Link, LinkError, MAX_RINGS, P_BACKEND_REQ, P_CONFIG,
    P_DEVICE_STATE, P_INFLIGHT, P_LOG, P_MQ, P_REPLY_ACK,
};
use crate::config::{DeviceConfig, DeviceType, Mac};
use crate::virtio::bits::*;

/// The protocol features that we make use of.
const PROTOCOL_WANTED: u64 =
    P_MQ | P_REPLY_ACK | P_BACKEND_REQ | P_CONFIG | P_INFLIGHT | P_DEVICE_STATE | P_LOG;
/// Transport features that both the VMM and its back-ends can have. The others need an IOMMU, or
/// a doorbell that carries data.
const TRANSPORT: u64 = F_INDIRECT_DESC | F_EVENT_IDX | F_VERSION_1 | F_RING_PACKED | F_IN_ORDER;

/// Block (VIRTIO 1.3, 5.2.3): SEG_MAX, BLK_SIZE and FLUSH, of which each real disk has some.
const BLK_TYPICAL: u64 = 1 << 2 | 1 << 6 | 1 << 9;
const BLK_MQ: u64 = 1 << 12;
const BLK_SECURE_ERASE: u64 = 1 << 16;
const BLK_ZONED: u64 = 1 << 17;
/// Block: LIFETIME, SECURE_ERASE and ZONED, which no disk has without some of the typical ones.
const BLK_RARE: u64 = 7 << 15;
/// Feature bits without a meaning for block devices.
const BLK_UNDEFINED: u64 = 0xfc << 16 | 0xfffc << 48;
/// Offset of `num_queues` in the configuration (5.2.4).
const BLK_NUM_QUEUES: usize = 34;
/// Size of the configuration up to `write_zeroes_may_unmap` and its padding.
const BLK_CONFIG_SIZE: u16 = 60;
/// Size with secure erase and zones.
const BLK_CONFIG_SIZE_FULL: u16 = 96;

/// A field of the configuration that a driver does not expect to change.
struct Settled {
    name: &'static str,
    at: Range<usize>,
    /// It is there with one of these features; without any, always.
    with: u64,
    /// It may grow: the driver keeps to what it has read.
    grows: bool,
}

const fn settled(name: &'static str, at: Range<usize>, with: u64) -> Settled {
    Settled {
        name,
        at,
        with,
        grows: false,
    }
}

const fn at_least(name: &'static str, at: Range<usize>, with: u64) -> Settled {
    Settled {
        grows: true,
        ..settled(name, at, with)
    }
}

/// Block (VIRTIO 1.3, 5.2.4). Geometry and topology are advice, and the cache's mode may change.
const BLK_SETTLED: [Settled; 15] = [
    // Of a larger disk the driver is told.
    at_least("capacity", 0..8, 0),
    at_least("size_max", 8..12, 1 << 1),
    at_least("seg_max", 12..16, 1 << 2),
    settled("blk_size", 20..24, 1 << 6),
    settled("num_queues", BLK_NUM_QUEUES..36, BLK_MQ),
    at_least("max_discard_sectors", 36..40, 1 << 13),
    at_least("max_discard_seg", 40..44, 1 << 13),
    settled("discard_sector_alignment", 44..48, 1 << 13),
    at_least("max_write_zeroes_sectors", 48..52, 1 << 14),
    at_least("max_write_zeroes_seg", 52..56, 1 << 14),
    settled("write_zeroes_may_unmap", 56..57, 1 << 14),
    at_least("max_secure_erase_sectors", 60..64, BLK_SECURE_ERASE),
    at_least("max_secure_erase_seg", 64..68, BLK_SECURE_ERASE),
    settled("secure_erase_sector_alignment", 68..72, BLK_SECURE_ERASE),
    settled("zoned characteristics", 72..93, BLK_ZONED),
];

/// Network (5.1.4). The link's state, speed and duplex may change.
const NET_SETTLED: [Settled; 6] = [
    settled("mac", 0..6, NET_MAC),
    settled("max_virtqueue_pairs", NET_MAX_PAIRS..10, NET_MQ | NET_RSS),
    settled("mtu", 10..12, NET_MTU),
    at_least("rss_max_key_size", 17..18, NET_RSS | NET_HASH_REPORT),
    at_least("rss_max_indirection_table_length", 18..20, NET_RSS),
    settled("supported_hash_types", 20..24, NET_RSS | NET_HASH_REPORT),
];

impl Settled {
    fn fits(&self, before: &[u8], now: &[u8]) -> bool {
        let (before, now) = (before.get(self.at.clone()), now.get(self.at.clone()));
        match (before, now) {
            // Numbers are little-endian.
            (Some(before), Some(now)) if self.grows => before.iter().rev().le(now.iter().rev()),
            (before, now) => before == now,
        }
    }
}

/// Network (5.1.3).
const NET_MTU: u64 = 1 << 3;
const NET_MAC: u64 = 1 << 5;
const NET_STATUS: u64 = 1 << 16;
const NET_CTRL_VQ: u64 = 1 << 17;
const NET_MQ: u64 = 1 << 22;
const NET_HASH_REPORT: u64 = 1 << 57;
const NET_RSS: u64 = 1 << 60;
const NET_SPEED_DUPLEX: u64 = 1 << 63;
/// Features that work without the device's configuration and control queue: checksum and
/// segmentation offloads, mergeable receive buffers, USO, header length.
const NET_RINGS_ONLY: u64 =
    1 | 1 << 1 | 0x1ff << 6 | 1 << 15 | 1 << 54 | 1 << 55 | 1 << 56 | 1 << 59;
/// Bits that all network back-ends with a configuration have some of.
const NET_TYPICAL: u64 = 0xff << 15 | 1 << 23 | 0xfffc << 48;
/// Offset of `max_virtqueue_pairs` in the configuration (5.1.4).
const NET_MAX_PAIRS: usize = 8;

/// Why a back-end cannot serve the device it is meant for.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The conversation failed.
    #[error(transparent)]
    Link(#[from] LinkError),
    /// A legacy back-end.
    #[error("the back-end does not offer VIRTIO_F_VERSION_1, which modern virtio needs")]
    Legacy,
    /// The socket belongs to another type of device.
    #[error(
        "the back-end is not one of type {wanted}: {why}; give the socket to the option of its own type"
    )]
    WrongType {
        /// The type it should be of.
        wanted: DeviceType,
        /// What speaks against it.
        why: &'static str,
    },
    /// The configuration cannot be read.
    #[error(
        "the back-end does not have {size} bytes of configuration; is it really one of type {wanted}?"
    )]
    Config {
        /// Size asked for.
        size: u16,
        /// The type it should be of.
        wanted: DeviceType,
        /// The back-end's answer.
        #[source]
        source: LinkError,
    },
    /// More or fewer queues than there are.
    #[error("the back-end has {available} queues, so num-queues={wanted} is impossible; {advice}")]
    Queues {
        /// The number asked for.
        wanted: u16,
        /// The number it has.
        available: u64,
        /// What to do.
        advice: &'static str,
    },
    /// A card whose control queue comes after more queues than the protocol has names for.
    #[error(
        "the back-end has {queues} queues, but vhost-user has names for {MAX_RINGS} only: give \
         num-queues=2, or start the back-end with fewer"
    )]
    TooManyQueues {
        /// The number it has.
        queues: u64,
    },
}

/// Where the configuration comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum ConfigSource {
    /// The back-end, this many bytes.
    Backend(u16),
    /// The VMM.
    Fixed(Vec<u8>),
}

/// What the guest is offered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Offer {
    pub(crate) device_type: DeviceType,
    /// Features for the guest.
    pub(crate) features: u64,
    /// Features that the back-end has.
    backend_features: u64,
    pub(crate) protocol: u64,
    pub(crate) queue_sizes: Vec<u16>,
    pub(crate) config: ConfigSource,
    /// A field of the back-end's configuration that the VMM sets.
    patch: Option<(usize, u16)>,
    /// The back-end has protocol features, so its rings start disabled.
    pub(crate) enables_rings: bool,
}

impl Offer {
    /// Negotiates with a fresh back-end. Everything up to the features is settled afterwards.
    pub(crate) fn negotiate(link: &mut dyn Link, wanted: &DeviceConfig) -> Result<Self, Error> {
        let features = link.features()?;
        if features & F_VERSION_1 == 0 {
            return Err(Error::Legacy);
        }
        let mut protocol = 0;
        if features & F_PROTOCOL_FEATURES != 0 {
            protocol = link.protocol_features()? & PROTOCOL_WANTED;
            // A network card goes on without: what is lost is sent again.
            if wanted.device_type == DeviceType::NET {
                protocol &= !P_INFLIGHT;
            }
            link.set_protocol_features(protocol)?;
        }
        let mut offer = Self {
            device_type: wanted.device_type,
            features: features & (TRANSPORT | F_DEVICE_SPECIFIC),
            backend_features: features,
            protocol,
            queue_sizes: Vec::new(),
            config: ConfigSource::Fixed(Vec::new()),
            patch: None,
            enables_rings: features & F_PROTOCOL_FEATURES != 0,
        };
        offer.check_type()?;
        // Guest memory does not tell how far a packed queue was served, so a device that could go on with
        // another back-end cannot with such queues, unless the back-end notes it; that is dearer than with split ones.
        if !wanted.packed.unwrap_or(!offer.resumes(false)) {
            offer.features &= !F_RING_PACKED;
        }
        let queues = match wanted.device_type {
            DeviceType::BLOCK => offer.block(link, wanted)?,
            DeviceType::NET => offer.net(link, wanted)?,
            _ => offer.other(link, wanted)?,
        };
        offer.queue_sizes = vec![wanted.queue_size; usize::try_from(queues).unwrap_or(0)];
        Ok(offer)
    }

    /// Whether a guest that was offered `self` can go on with a back-end that has `other`.
    pub(crate) fn is_served_by(&self, other: &Self) -> bool {
        // The configuration's content may differ (another disk size, say): the guest is told.
        let same_shape = match (&self.config, &other.config) {
            (ConfigSource::Fixed(_), ConfigSource::Fixed(_)) => true,
            (a, b) => a == b,
        };
        same_shape
            && self.features & !other.features == 0
            // What is for moving the guest is asked for only where it is there.
            && self.protocol & !(P_DEVICE_STATE | P_LOG) & !other.protocol == 0
            && self.queue_sizes.len() == other.queue_sizes.len()
            && self.enables_rings == other.enables_rings
    }

    /// The first field in which no configuration of `now` is what a driver with these features has read `before`, if there is one.
    pub(crate) fn unlike(
        &self,
        features: u64,
        before: &[u8],
        now: &[&[u8]],
    ) -> Option<&'static str> {
        let fields = match self.device_type {
            DeviceType::BLOCK => &BLK_SETTLED[..],
            DeviceType::NET => &NET_SETTLED[..],
            _ => &[],
        };
        let there = |field: &&Settled| field.with == 0 || features & field.with != 0;
        let unlike = |field: &&Settled| !now.iter().any(|now| field.fits(before, now));
        let field = fields.iter().filter(there).find(unlike);
        field.map(|field| field.name)
    }

    /// What to tell the back-end when the guest has chosen `features`.
    pub(crate) fn backend_choice(&self, features: u64) -> u64 {
        // Without F_PROTOCOL_FEATURES rings would be enabled from the start.
        (features | F_PROTOCOL_FEATURES) & self.backend_features
    }

    /// Whether the back-end can note which pages it writes.
    pub(crate) fn logs(&self) -> bool {
        self.has(P_LOG) && self.backend_features & F_LOG_ALL != 0
    }

    /// Whether the back-end tells us when its configuration changes.
    pub(crate) fn announces_changes(&self) -> bool {
        self.has(P_BACKEND_REQ)
    }

    /// Whether the device can go on with another back-end after one had its queues.
    pub(crate) fn resumes(&self, packed: bool) -> bool {
        self.device_type == DeviceType::NET && !packed || self.tracks_inflight()
    }

    /// Whether the back-end tells what it keeps besides the queues.
    pub(crate) fn has_state(&self) -> bool {
        self.has(P_DEVICE_STATE)
    }

    /// Whether the back-end notes what is under way where the next one finds it.
    pub(crate) fn tracks_inflight(&self) -> bool {
        self.has(P_INFLIGHT)
    }

    fn has(&self, protocol: u64) -> bool {
        self.protocol & protocol != 0
    }

    fn check_type(&self) -> Result<(), Error> {
        let wrong = |why| {
            Err(Error::WrongType {
                wanted: self.device_type,
                why,
            })
        };
        match self.device_type {
            DeviceType::BLOCK if !self.has(P_CONFIG) => wrong("it has no configuration space"),
            DeviceType::BLOCK
                if self.features & BLK_UNDEFINED != 0
                    || self.features & BLK_RARE != 0 && self.features & BLK_TYPICAL == 0 =>
            {
                wrong("it offers features that no block device has")
            }
            DeviceType::NET
                if self.has(P_CONFIG)
                    && (self.features & NET_TYPICAL == 0
                        || self.features & (NET_TYPICAL & !(7 << 15)) == 0
                            && self.features & (NET_MAC | BLK_TYPICAL) == BLK_TYPICAL) =>
            {
                wrong("it offers the features of a block device")
            }
            _ => Ok(()),
        }
    }

    /// Reads the configuration, with the VMM's changes.
    pub(crate) fn read_config(&self, link: &mut dyn Link) -> Result<Vec<u8>, LinkError> {
        let size = match &self.config {
            ConfigSource::Fixed(config) => return Ok(config.clone()),
            ConfigSource::Backend(0) => return Ok(Vec::new()),
            ConfigSource::Backend(size) => *size,
        };
        let mut config = link.read_config(0, size.into())?;
        if let Some((at, value)) = self.patch {
            for (place, byte) in config.iter_mut().skip(at).zip(value.to_le_bytes()) {
                *place = byte;
            }
        }
        Ok(config)
    }

    fn backend_config(&mut self, link: &mut dyn Link, size: u16) -> Result<Vec<u8>, Error> {
        self.config = ConfigSource::Backend(size);
        self.read_config(link).map_err(|source| {
            if source.is_refusal() {
                let wanted = self.device_type;
                Error::Config {
                    size,
                    wanted,
                    source,
                }
            } else {
                source.into()
            }
        })
    }

    fn block(&mut self, link: &mut dyn Link, wanted: &DeviceConfig) -> Result<u64, Error> {
        let full = self.features & (BLK_SECURE_ERASE | BLK_ZONED) != 0;
        let size = if full {
            BLK_CONFIG_SIZE_FULL
        } else {
            BLK_CONFIG_SIZE
        };
        let config = self.backend_config(link, size)?;
        let mut available = 1;
        if self.features & BLK_MQ != 0 && self.has(P_MQ) {
            available = u64::from(field(&config, BLK_NUM_QUEUES))
                .min(link.queue_count()?)
                .max(1);
        }
        let queues = match wanted.num_queues {
            // A driver has no use for more than one for each processor.
            None => limit(None, available.min(wanted.cpus.into()))?,
            wanted => limit(wanted, available)?,
        };
        if self.features & BLK_MQ != 0 {
            self.patch = Some((BLK_NUM_QUEUES, u16::try_from(queues).unwrap_or(1)));
        }
        Ok(queues)
    }

    fn net(&mut self, link: &mut dyn Link, wanted: &DeviceConfig) -> Result<u64, Error> {
        if !self.has(P_CONFIG) {
            // A back-end that knows rings only: the rest of the device is here, and small.
            self.features &= TRANSPORT | NET_RINGS_ONLY;
            self.features |= NET_MAC | NET_STATUS;
            let Mac(mac) = wanted.mac.unwrap_or_else(random_mac);
            const LINK_UP: u16 = 1;
            let mut config = mac.to_vec();
            config.extend(LINK_UP.to_le_bytes());
            self.config = ConfigSource::Fixed(config);
            return match wanted.num_queues {
                None | Some(2) => Ok(2),
                Some(wanted) => Err(Error::Queues {
                    wanted,
                    available: 2,
                    advice: "leave it out: without a configuration space a back-end has one pair",
                }),
            };
        }
        let config = self.backend_config(link, net_config_size(self.features))?;
        if let Some(mac) = wanted.mac {
            tracing::warn!(%mac, "the back-end has the card's address; mac= is ignored");
        }
        // Each of these makes a driver look for as many pairs as the configuration says (5.1.2).
        const SEVERAL_PAIRS: u64 = NET_MQ | NET_RSS;
        let mut pairs = 1;
        let several = self.features & SEVERAL_PAIRS != 0 && self.features & NET_CTRL_VQ != 0;
        if several && self.has(P_MQ) {
            pairs = u64::from(field(&config, NET_MAX_PAIRS)).clamp(1, 0x8000);
        } else {
            self.features &= !SEVERAL_PAIRS;
        }
        let all = 2 * pairs + u64::from(self.features & NET_CTRL_VQ != 0);
        if all > MAX_RINGS && wanted.num_queues != Some(2) {
            return Err(Error::TooManyQueues { queues: all });
        }
        // With MQ the control queue's index follows from the configuration (5.1.2), so the back-end
        // would look for it elsewhere if only some of its pairs were offered.
        match wanted.num_queues.map(u64::from) {
            None => {}
            Some(2) => {
                pairs = 1;
                self.features &= !SEVERAL_PAIRS;
            }
            Some(n) if n == 2 * pairs => {}
            Some(_) => {
                return Err(Error::Queues {
                    wanted: wanted.num_queues.unwrap_or(0),
                    available: 2 * pairs,
                    advice: "give that number, or 2, or start the back-end with as many as you want",
                });
            }
        }
        Ok(2 * pairs + u64::from(self.features & NET_CTRL_VQ != 0))
    }

    fn other(&mut self, link: &mut dyn Link, wanted: &DeviceConfig) -> Result<u64, Error> {
        if self.has(P_CONFIG) {
            let size = wanted.config_size;
            let size = size.unwrap_or_else(|| config_size(wanted.device_type));
            self.backend_config(link, size)?;
        } else {
            let size = usize::from(wanted.config_size.unwrap_or(0));
            self.config = ConfigSource::Fixed(vec![0; size]);
        }
        let usual = queue_count(wanted.device_type);
        if !self.has(P_MQ) {
            // Nobody can tell us how many queues there are.
            return Ok(wanted.num_queues.map_or(usual, u64::from));
        }
        let available = link.queue_count()?;
        match wanted.num_queues {
            None => limit(None, usual.min(available).max(1)),
            wanted => limit(wanted, available),
        }
    }
}

/// The number of queues: as many as wanted, if there are so many.
fn limit(wanted: Option<u16>, available: u64) -> Result<u64, Error> {
    let usable = available.min(MAX_RINGS);
    match wanted {
        None => Ok(usable),
        Some(n) if u64::from(n) <= usable => Ok(n.into()),
        Some(wanted) => Err(Error::Queues {
            wanted,
            available,
            advice: "ask for fewer, or start the back-end with more",
        }),
    }
}

fn field(config: &[u8], at: usize) -> u16 {
    let bytes = config.get(at..at + 2).and_then(|b| b.try_into().ok());
    bytes.map_or(0, u16::from_le_bytes)
}

/// The part of `virtio_net_config` that these features make exist (5.1.4).
fn net_config_size(features: u64) -> u16 {
    let ends = [
        (NET_RSS | NET_HASH_REPORT, 24),
        (NET_SPEED_DUPLEX, 17),
        (NET_MTU, 12),
        (NET_MQ, 10),
        (NET_STATUS, 8),
        (NET_MAC, 6),
    ];
    let end = ends.iter().find(|(bits, _)| features & bits != 0);
    end.map_or(0, |(_, end)| *end)
}

/// Size of the configuration of the types that people have back-ends for (5.3 and on).
fn config_size(device_type: DeviceType) -> u16 {
    match device_type.0 {
        3 => 12,
        8 => 36,
        16 => 16,
        18 => 136,
        19 => 8,
        20 => 56,
        25 => 12,
        26 => 44,
        41 => 8,
        _ => 0,
    }
}

/// Their number of queues.
fn queue_count(device_type: DeviceType) -> u64 {
    match device_type.0 {
        3 | 16 | 18 | 20 | 26 | 30 | 31 | 41 => 2,
        8 | 19 | 36 => 3,
        25 => 4,
        _ => 1,
    }
}

/// A locally administered unicast address.
fn random_mac() -> Mac {
    // The seed of std's hash tables comes from the kernel; a collision costs a working network at
    // worst, so no better source is needed.
    let [_, _, a, b, c, d, e, g] = RandomState::new().build_hasher().finish().to_ne_bytes();
    Mac([a & 0xfc | 2, b, c, d, e, g])
}

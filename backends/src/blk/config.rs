//! The configuration space: struct virtio_blk_config (VIRTIO 1.3, 5.2.4), and the features that go with it.

use crate::shell::DeviceError;

use super::request::{MAX_RANGES, SECTOR};

/// Feature bits of a block device (VIRTIO 1.3, 5.2.3), of rings (6), and of the transport (6).
pub(super) mod feature {
    /// VIRTIO_BLK_F_SEG_MAX: seg_max is valid.
    pub(in crate::blk) const SEG_MAX: u64 = 1 << 2;
    /// VIRTIO_BLK_F_RO: the disk is read-only.
    pub(in crate::blk) const RO: u64 = 1 << 5;
    /// VIRTIO_BLK_F_BLK_SIZE: blk_size is valid.
    pub(in crate::blk) const BLK_SIZE: u64 = 1 << 6;
    /// VIRTIO_BLK_F_FLUSH: there is a cache that can be flushed.
    pub(in crate::blk) const FLUSH: u64 = 1 << 9;
    /// VIRTIO_BLK_F_TOPOLOGY: topology is valid.
    pub(in crate::blk) const TOPOLOGY: u64 = 1 << 10;
    /// VIRTIO_BLK_F_CONFIG_WCE: the driver can switch the cache between writeback and writethrough.
    pub(in crate::blk) const CONFIG_WCE: u64 = 1 << 11;
    /// VIRTIO_BLK_F_MQ: num_queues is valid.
    pub(in crate::blk) const MQ: u64 = 1 << 12;
    /// VIRTIO_BLK_F_DISCARD: the discard command exists.
    pub(in crate::blk) const DISCARD: u64 = 1 << 13;
    /// VIRTIO_BLK_F_WRITE_ZEROES: the write zeroes command exists.
    pub(in crate::blk) const WRITE_ZEROES: u64 = 1 << 14;
    /// VIRTIO_BLK_F_SECURE_ERASE: the secure erase command exists.
    pub(in crate::blk) const SECURE_ERASE: u64 = 1 << 16;
    /// VIRTIO_BLK_F_ZONED: the disk has zones, and commands for them.
    pub(in crate::blk) const ZONED: u64 = 1 << 17;
    /// VIRTIO_F_INDIRECT_DESC
    pub(in crate::blk) const INDIRECT_DESC: u64 = 1 << 28;
    /// VIRTIO_F_EVENT_IDX
    pub(in crate::blk) const EVENT_IDX: u64 = 1 << 29;
    /// VIRTIO_F_VERSION_1
    pub(in crate::blk) const VERSION_1: u64 = 1 << 32;
    /// VIRTIO_F_RING_PACKED
    pub(in crate::blk) const RING_PACKED: u64 = 1 << 34;
    /// VIRTIO_F_IN_ORDER
    pub(in crate::blk) const IN_ORDER: u64 = 1 << 35;
}

/// The name of a feature bit of block devices (VIRTIO 1.3, 5.2.3).
pub(super) fn feature_name(bit: u32) -> Option<&'static str> {
    Some(match bit {
        1 => "SIZE_MAX",
        2 => "SEG_MAX",
        4 => "GEOMETRY",
        5 => "RO",
        6 => "BLK_SIZE",
        9 => "FLUSH",
        10 => "TOPOLOGY",
        11 => "CONFIG_WCE",
        12 => "MQ",
        13 => "DISCARD",
        14 => "WRITE_ZEROES",
        15 => "LIFETIME",
        16 => "SECURE_ERASE",
        17 => "ZONED",
        _ => return None,
    })
}

/// Offset of `wce`, the only field that a driver writes.
const WCE_OFFSET: u32 = 32;
/// Length of the structure.
const LEN: usize = 96;
/// VIRTIO_BLK_Z_HM: sequential zones can only be written sequentially (VIRTIO 1.3, 5.2.4).
const HOST_MANAGED: u8 = 1;

/// What a driver is told about the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Geometry {
    /// Size in bytes, a multiple of the sector.
    pub capacity: u64,
    /// Most data segments in a request.
    pub seg_max: u32,
    /// Logical block size in bytes: 512 or 4096.
    pub block_size: u32,
    /// Physical block size in bytes: `block_size` times a power of two.
    pub physical_block_size: u32,
    /// Smallest transfer that is efficient, in bytes: a multiple of `block_size`.
    pub min_io: u32,
    /// Best transfer size in bytes, a multiple of `block_size`; 0 if there is none.
    pub opt_io: u32,
    /// Number of queues.
    pub queues: u16,
    /// Most bytes to discard in one range; 0 if there are no such requests.
    pub max_discard: u64,
    /// What is discarded or erased should be aligned to this many bytes: a multiple of `block_size`.
    pub discard_align: u32,
    /// Most bytes to zero in one range; 0 if there are no such requests.
    pub max_write_zeroes: u64,
    /// Zeroing may give space back.
    pub zeroes_unmap: bool,
    /// Most bytes to erase securely in one range; 0 if there are no such requests.
    pub max_secure_erase: u64,
    /// The zones of a host-managed disk.
    pub zones: Option<ZoneGeometry>,
}

/// What a driver is told about zones.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ZoneGeometry {
    /// Size of each zone in bytes; the last may be smaller.
    pub size: u64,
    /// Most zones that can be open; 0 if there is no limit.
    pub max_open: u32,
    /// Most zones that can be open or closed; 0 if there is no limit.
    pub max_active: u32,
    /// Most bytes to append at once.
    pub max_append: u64,
    /// Writes begin and end at multiples of this many bytes.
    pub write_granularity: u32,
}

/// The configuration space as bytes, with `wce` as it stands.
pub(super) fn encode(geometry: &Geometry, writeback: bool) -> [u8; LEN] {
    let block = geometry.block_size.max(1);
    let exponent = (geometry.physical_block_size / block).checked_ilog2();
    let in_blocks = |bytes: u32| bytes / block;
    let in_sectors = |bytes: u64| u32::try_from(bytes / SECTOR).unwrap_or(u32::MAX);
    let segments = |bytes: u64| match bytes {
        0 => 0,
        _ => u32::try_from(MAX_RANGES).unwrap_or(1),
    };
    let mut out = Writer {
        bytes: [0; LEN],
        at: 0,
    };
    out.put(&(geometry.capacity / SECTOR).to_le_bytes()); // capacity
    out.put(&0_u32.to_le_bytes()); // size_max
    out.put(&geometry.seg_max.to_le_bytes());
    out.put(&[0; 4]); // geometry
    out.put(&geometry.block_size.to_le_bytes());
    out.put(&[u8::try_from(exponent.unwrap_or(0)).unwrap_or(0), 0]); // physical_block_exp, alignment_offset
    out.put(
        &u16::try_from(in_blocks(geometry.min_io))
            .unwrap_or(u16::MAX)
            .to_le_bytes(),
    );
    out.put(&in_blocks(geometry.opt_io).to_le_bytes());
    out.put(&[u8::from(writeback), 0]); // wce, unused
    out.put(&geometry.queues.to_le_bytes());
    out.put(&in_sectors(geometry.max_discard).to_le_bytes()); // max_discard_sectors
    out.put(&segments(geometry.max_discard).to_le_bytes()); // max_discard_seg
    out.put(&in_sectors(geometry.discard_align.into()).to_le_bytes()); // discard_sector_alignment
    out.put(&in_sectors(geometry.max_write_zeroes).to_le_bytes()); // max_write_zeroes_sectors
    out.put(&segments(geometry.max_write_zeroes).to_le_bytes()); // max_write_zeroes_seg
    out.put(&[u8::from(geometry.zeroes_unmap), 0, 0, 0]); // write_zeroes_may_unmap, unused
    out.put(&in_sectors(geometry.max_secure_erase).to_le_bytes()); // max_secure_erase_sectors
    out.put(&segments(geometry.max_secure_erase).to_le_bytes()); // max_secure_erase_seg
    out.put(&in_sectors(geometry.discard_align.into()).to_le_bytes()); // secure_erase_sector_alignment
    if let Some(zones) = &geometry.zones {
        out.put(&in_sectors(zones.size).to_le_bytes()); // zone_sectors
        out.put(&zones.max_open.to_le_bytes()); // max_open_zones
        out.put(&zones.max_active.to_le_bytes()); // max_active_zones
        out.put(&in_sectors(zones.max_append).to_le_bytes()); // max_append_sectors
        out.put(&zones.write_granularity.to_le_bytes());
        out.put(&[HOST_MANAGED, 0, 0, 0]); // model, unused
    }
    out.bytes
}

struct Writer {
    bytes: [u8; LEN],
    at: usize,
}

impl Writer {
    fn put(&mut self, field: &[u8]) {
        let end = self.at.saturating_add(field.len());
        if let Some(place) = self.bytes.get_mut(self.at..end) {
            place.copy_from_slice(field);
        }
        self.at = end;
    }
}

/// What a driver's write asks for: the new value of `wce`.
pub(super) fn write(offset: u32, data: &[u8]) -> Result<bool, DeviceError> {
    match (offset, data) {
        (WCE_OFFSET, [wce]) => Ok(*wce != 0),
        _ => Err(DeviceError::ConfigReadOnly { offset }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GEOMETRY: Geometry = Geometry {
        capacity: 3 << 30,
        seg_max: 126,
        block_size: 512,
        physical_block_size: 4096,
        min_io: 4096,
        opt_io: 65536,
        queues: 4,
        max_discard: 1 << 30,
        discard_align: 8192,
        max_write_zeroes: 1 << 29,
        zeroes_unmap: true,
        max_secure_erase: 1 << 28,
        zones: Some(ZoneGeometry {
            size: 4 << 20,
            max_open: 3,
            max_active: 5,
            max_append: 1 << 20,
            write_granularity: 4096,
        }),
    };

    #[test]
    fn fields_lie_where_the_specification_puts_them() {
        let bytes = encode(&GEOMETRY, true);
        let u32_at = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
        let u16_at = |at: usize| u16::from_le_bytes(bytes[at..at + 2].try_into().unwrap());
        assert_eq!(
            u64::from_le_bytes(bytes[..8].try_into().unwrap()),
            (3 << 30) / 512
        );
        assert_eq!(u32_at(12), 126);
        assert_eq!(u32_at(20), 512);
        assert_eq!(bytes[24], 3);
        assert_eq!(u16_at(26), 8);
        assert_eq!(u32_at(28), 128);
        assert_eq!(bytes[32], 1);
        assert_eq!(u16_at(34), 4);
        assert_eq!(u32_at(36), 1 << 21);
        assert_eq!(u32_at(40), 32);
        assert_eq!(u32_at(44), 16);
        assert_eq!(u32_at(48), 1 << 20);
        assert_eq!(u32_at(52), 32);
        assert_eq!(bytes[56], 1);
        assert_eq!(u32_at(60), 1 << 19);
        assert_eq!(u32_at(64), 32);
        assert_eq!(u32_at(68), 16);
        let zones = [72, 76, 80, 84, 88].map(u32_at);
        assert_eq!(zones, [8192, 3, 5, 2048, 4096]);
        assert_eq!(bytes[92..], [1, 0, 0, 0]);
        let plain = Geometry {
            zones: None,
            ..GEOMETRY
        };
        assert_eq!(encode(&plain, true)[72..], [0; 24]);
    }

    #[test]
    fn only_the_cache_mode_can_be_written() {
        assert!(write(32, &[1]).unwrap());
        assert!(!write(32, &[0]).unwrap());
        assert!(write(0, &[1; 8]).is_err());
        assert!(write(32, &[1, 1]).is_err());
    }
}

//! The configuration space: struct virtio_blk_config (VIRTIO 1.3, 5.2.4), and the features that go with it.

use crate::shell::DeviceError;

use super::request::SECTOR;

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
/// Length of the structure up to secure erase, which is not offered.
const LEN: usize = 60;

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
    /// Most bytes in a discard or write-zeroes request; 0 if there are no such requests.
    pub max_range: u64,
}

/// The configuration space as bytes, with `wce` as it stands.
pub(super) fn encode(geometry: &Geometry, writeback: bool) -> [u8; LEN] {
    let block = geometry.block_size.max(1);
    let exponent = (geometry.physical_block_size / block).checked_ilog2();
    let in_blocks = |bytes: u32| bytes / block;
    let sectors = u32::try_from(geometry.max_range / SECTOR).unwrap_or(u32::MAX);
    let segments = u32::from(sectors != 0);
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
    out.put(&sectors.to_le_bytes()); // max_discard_sectors
    out.put(&segments.to_le_bytes()); // max_discard_seg
    // discard_sector_alignment
    let alignment = u64::from(geometry.physical_block_size.max(geometry.block_size)) / SECTOR;
    out.put(&u32::try_from(alignment).unwrap_or(1).to_le_bytes());
    out.put(&sectors.to_le_bytes()); // max_write_zeroes_sectors
    out.put(&segments.to_le_bytes()); // max_write_zeroes_seg
    out.put(&[1, 0, 0, 0]); // write_zeroes_may_unmap, unused
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
        max_range: 1 << 30,
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
        assert_eq!(u32_at(40), 1);
        assert_eq!(u32_at(44), 8);
        assert_eq!(u32_at(48), 1 << 21);
        assert_eq!(u32_at(52), 1);
        assert_eq!(bytes[56], 1);
    }

    #[test]
    fn only_the_cache_mode_can_be_written() {
        assert!(write(32, &[1]).unwrap());
        assert!(!write(32, &[0]).unwrap());
        assert!(write(0, &[1; 8]).is_err());
        assert!(write(32, &[1, 1]).is_err());
    }
}

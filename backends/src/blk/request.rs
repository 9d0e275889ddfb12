//! What a descriptor chain asks of the disk: parsing and checking, no I/O (VIRTIO 1.3, 5.2.6).

use ringside_rings::{Chain, SegmentError, read_segments};
use thiserror::Error;
use vm_memory::GuestMemory;

use super::config::feature;
use super::stats::Kind;

/// Bytes in a sector, the unit of all addresses, whatever the block size (VIRTIO 1.3, 5.2.6).
pub(super) const SECTOR: u64 = 512;
/// Length of the request header: type, reserved, sector (VIRTIO 1.3, 5.2.6).
pub(super) const HEADER_LEN: u64 = 16;
/// Length of the string that VIRTIO_BLK_T_GET_ID returns (VIRTIO 1.3, 5.2.6).
pub(super) const ID_LEN: usize = 20;
/// Length of struct virtio_blk_discard_write_zeroes (VIRTIO 1.3, 5.2.6).
const RANGE_LEN: u64 = 16;
/// `unmap` in the flags of such a range.
const FLAG_UNMAP: u32 = 1;

/// Request types (VIRTIO 1.3, 5.2.6).
mod kind {
    pub(super) const IN: u32 = 0;
    pub(super) const OUT: u32 = 1;
    pub(super) const FLUSH: u32 = 4;
    pub(super) const GET_ID: u32 = 8;
    pub(super) const DISCARD: u32 = 11;
    pub(super) const WRITE_ZEROES: u32 = 13;
}

/// The status byte at the end of each chain (VIRTIO 1.3, 5.2.6).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Status {
    /// VIRTIO_BLK_S_OK
    Ok = 0,
    /// VIRTIO_BLK_S_IOERR
    IoError = 1,
    /// VIRTIO_BLK_S_UNSUPP
    Unsupported = 2,
}

/// What the disk can do, as far as it decides whether a request is valid.
#[derive(Debug, Clone, Copy)]
pub(super) struct Limits {
    /// Size of the disk in bytes, a multiple of [`SECTOR`].
    pub(super) capacity: u64,
    /// No request may change the disk.
    pub(super) read_only: bool,
    /// The driver may flush: it accepted VIRTIO_BLK_F_FLUSH, or VIRTIO_BLK_F_CONFIG_WCE, with which it can see a cache
    /// that is writeback.
    pub(super) flush: bool,
    /// The driver accepted VIRTIO_BLK_F_DISCARD.
    pub(super) discard: bool,
    /// The driver accepted VIRTIO_BLK_F_WRITE_ZEROES.
    pub(super) write_zeroes: bool,
    /// Most bytes in a discard or write-zeroes request.
    pub(super) max_range: u64,
    /// Offsets and lengths of transfers must be multiples of this many bytes: a power of two, at least [`SECTOR`].
    pub(super) align: u64,
}

/// A valid request. Offsets and lengths are in bytes and lie within the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Request {
    /// Read into the first `len` bytes of the writable segments.
    Read {
        /// Where on the disk.
        offset: u64,
        /// How much.
        len: u64,
    },
    /// Write from the readable segments, from [`HEADER_LEN`] on.
    Write {
        /// Where on the disk.
        offset: u64,
        /// How much.
        len: u64,
    },
    /// Make all completed writes durable.
    Flush,
    /// Return the serial number, into `len` bytes at most.
    GetId {
        /// Room for it.
        len: u64,
    },
    /// The range is not needed any more.
    Discard {
        /// Where on the disk.
        offset: u64,
        /// How much.
        len: u64,
    },
    /// The range is to read as zeroes.
    WriteZeroes {
        /// Where on the disk.
        offset: u64,
        /// How much.
        len: u64,
        /// The space may be given back.
        unmap: bool,
    },
    /// The request is answered with this status and nothing else.
    Refuse(Status),
}

impl Request {
    /// How it is counted, and how many bytes it is about.
    pub(super) fn measure(&self) -> (Kind, u64) {
        match *self {
            Self::Read { len, .. } => (Kind::Read, len),
            Self::Write { len, .. } => (Kind::Write, len),
            Self::Flush => (Kind::Flush, 0),
            Self::Discard { len, .. } => (Kind::Discard, len),
            Self::WriteZeroes { len, .. } => (Kind::WriteZeroes, len),
            Self::GetId { .. } | Self::Refuse(_) => (Kind::Other, 0),
        }
    }
}

/// The chain has no room for an answer, or no header to tell what it asks: it is returned with length 0.
#[derive(Debug, Error)]
pub(super) enum Unanswerable {
    /// There is no writable byte for the status.
    #[error("the chain has no writable byte for the status")]
    NoStatus,
    /// The readable part is shorter than a header.
    #[error("the chain's header has {len} bytes of {HEADER_LEN}")]
    ShortHeader {
        /// Its length in bytes.
        len: u64,
    },
    /// Guest memory cannot be read.
    #[error("the chain's header cannot be read")]
    Memory(#[from] SegmentError),
}

/// Reads the header of a chain and checks the request against the disk.
///
/// # Errors
/// [`Unanswerable`]
pub(super) fn parse<M: GuestMemory>(
    chain: &Chain<'_>,
    mem: &M,
    limits: &Limits,
) -> Result<Request, Unanswerable> {
    let Some(writable) = chain.writable_len().checked_sub(1) else {
        return Err(Unanswerable::NoStatus);
    };
    let len = chain.readable_len();
    let Some(readable) = len.checked_sub(HEADER_LEN) else {
        return Err(Unanswerable::ShortHeader { len });
    };
    let mut header = [0; 16];
    read_segments(mem, chain.readable(), 0, &mut header)?;
    let [a, b, c, d, _, _, _, _, sector @ ..] = header;
    let sector = u64::from_le_bytes(sector);
    let request = match u32::from_le_bytes([a, b, c, d]) {
        kind::IN => limits
            .transfer(sector, writable)
            .map(|offset| Request::Read {
                offset,
                len: writable,
            }),
        kind::OUT if limits.read_only => Err(Status::IoError),
        kind::OUT => limits
            .transfer(sector, readable)
            .map(|offset| Request::Write {
                offset,
                len: readable,
            }),
        kind::FLUSH if limits.flush => Ok(Request::Flush),
        kind::GET_ID => Ok(Request::GetId { len: writable }),
        what @ (kind::DISCARD | kind::WRITE_ZEROES) if limits.has_range(what) => {
            if readable != RANGE_LEN {
                // max_discard_seg and max_write_zeroes_seg are 1.
                return Ok(Request::Refuse(Status::IoError));
            }
            let mut range = [0; 16];
            read_segments(mem, chain.readable(), HEADER_LEN, &mut range)?;
            limits.range(what, range)
        }
        // Also what exists, but was not negotiated (VIRTIO 1.3, 2.2.1, 5.2.6).
        _ => Err(Status::Unsupported),
    };
    Ok(request.unwrap_or_else(Request::Refuse))
}

impl Limits {
    /// The limits for a driver that accepted these features.
    pub(super) fn negotiated(self, features: u64) -> Self {
        let has = |bits: u64| features & bits != 0;
        Self {
            flush: has(feature::FLUSH | feature::CONFIG_WCE),
            discard: has(feature::DISCARD),
            write_zeroes: has(feature::WRITE_ZEROES),
            ..self
        }
    }

    fn has_range(&self, what: u32) -> bool {
        if what == kind::DISCARD {
            self.discard
        } else {
            self.write_zeroes
        }
    }

    /// Byte offset of a transfer, if it lies within the disk in whole sectors (VIRTIO 1.3, 5.2.6.2).
    fn transfer(&self, sector: u64, len: u64) -> Result<u64, Status> {
        let offset = self.within(sector, len)?;
        let mask = self.align.saturating_sub(1) | (SECTOR - 1);
        if (offset | len) & mask != 0 {
            return Err(Status::IoError);
        }
        Ok(offset)
    }

    fn within(&self, sector: u64, len: u64) -> Result<u64, Status> {
        let offset = sector.checked_mul(SECTOR).ok_or(Status::IoError)?;
        let end = offset.checked_add(len).ok_or(Status::IoError)?;
        if end > self.capacity {
            return Err(Status::IoError);
        }
        Ok(offset)
    }

    /// A struct virtio_blk_discard_write_zeroes (VIRTIO 1.3, 5.2.6, 5.2.6.2).
    fn range(&self, what: u32, bytes: [u8; 16]) -> Result<Request, Status> {
        let [a, b, c, d, e, f, g, h, n0, n1, n2, n3, f0, f1, f2, f3] = bytes;
        let sector = u64::from_le_bytes([a, b, c, d, e, f, g, h]);
        let len = u64::from(u32::from_le_bytes([n0, n1, n2, n3])).saturating_mul(SECTOR);
        let flags = u32::from_le_bytes([f0, f1, f2, f3]);
        let known = if what == kind::WRITE_ZEROES {
            FLAG_UNMAP
        } else {
            0
        };
        if flags & !known != 0 {
            return Err(Status::Unsupported);
        }
        if self.read_only || len > self.max_range {
            return Err(Status::IoError);
        }
        let offset = self.within(sector, len)?;
        Ok(if what == kind::DISCARD {
            Request::Discard { offset, len }
        } else {
            Request::WriteZeroes {
                offset,
                len,
                unmap: flags & FLAG_UNMAP != 0,
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const LIMITS: Limits = Limits {
        capacity: 1 << 20,
        read_only: false,
        flush: true,
        discard: true,
        write_zeroes: true,
        max_range: 1 << 19,
        align: SECTOR,
    };

    fn range(sector: u64, sectors: u32, flags: u32) -> [u8; 16] {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&sector.to_le_bytes());
        bytes[8..12].copy_from_slice(&sectors.to_le_bytes());
        bytes[12..].copy_from_slice(&flags.to_le_bytes());
        bytes
    }

    #[test]
    fn transfers_lie_within_the_disk_in_whole_sectors() {
        assert_eq!(LIMITS.transfer(0, 0), Ok(0));
        assert_eq!(LIMITS.transfer(2047, 512), Ok(2047 * 512));
        assert_eq!(LIMITS.transfer(2048, 0), Ok(1 << 20));
        assert_eq!(LIMITS.transfer(2047, 1024), Err(Status::IoError));
        assert_eq!(LIMITS.transfer(0, 511), Err(Status::IoError));
        assert_eq!(LIMITS.transfer(u64::MAX, 512), Err(Status::IoError));
        assert_eq!(LIMITS.transfer(u64::MAX / 512, 512), Err(Status::IoError));
        let direct = Limits {
            align: 4096,
            ..LIMITS
        };
        assert_eq!(direct.transfer(1, 4096), Err(Status::IoError));
        assert_eq!(direct.transfer(8, 512), Err(Status::IoError));
        assert_eq!(direct.transfer(8, 4096), Ok(4096));
    }

    #[test]
    fn ranges_follow_the_flag_rules() {
        let discard = |bytes| LIMITS.range(kind::DISCARD, bytes);
        let zeroes = |bytes| LIMITS.range(kind::WRITE_ZEROES, bytes);
        assert_eq!(
            discard(range(8, 8, 0)),
            Ok(Request::Discard {
                offset: 4096,
                len: 4096
            })
        );
        // 5.2.6.2: unmap on a discard, and unknown flags, are unsupported.
        assert_eq!(discard(range(8, 8, 1)), Err(Status::Unsupported));
        assert_eq!(zeroes(range(8, 8, 2)), Err(Status::Unsupported));
        assert!(matches!(
            zeroes(range(8, 8, 1)),
            Ok(Request::WriteZeroes { unmap: true, .. })
        ));
        assert_eq!(zeroes(range(0, 1025, 0)), Err(Status::IoError));
        assert_eq!(zeroes(range(2048, 1, 0)), Err(Status::IoError));
        let frozen = Limits {
            read_only: true,
            ..LIMITS
        };
        assert_eq!(
            frozen.range(kind::DISCARD, range(0, 1, 0)),
            Err(Status::IoError)
        );
    }

    #[test]
    fn commands_are_those_that_were_negotiated() {
        let of = |features| {
            let limits = LIMITS.negotiated(features);
            (limits.flush, limits.discard, limits.write_zeroes)
        };
        assert_eq!(of(0), (false, false, false));
        assert_eq!(of(feature::FLUSH), (true, false, false));
        assert_eq!(of(feature::CONFIG_WCE), (true, false, false));
        assert_eq!(of(feature::DISCARD), (false, true, false));
        assert_eq!(of(feature::WRITE_ZEROES), (false, false, true));
    }

    proptest! {
        #[test]
        fn no_request_reaches_beyond_the_disk(sector: u64, sectors: u32, flags: u32, len: u64, what in 0..16_u32) {
            if let Ok(offset) = LIMITS.transfer(sector, len) {
                prop_assert!(offset + len <= LIMITS.capacity);
            }
            match LIMITS.range(what, range(sector, sectors, flags)) {
                Ok(Request::Discard { offset, len } | Request::WriteZeroes { offset, len, .. }) =>
                    prop_assert!(offset + len <= LIMITS.capacity && len <= LIMITS.max_range),
                Ok(other) => prop_assert!(false, "{other:?}"),
                Err(_) => {}
            }
        }
    }
}

//! What a descriptor chain asks of the disk: parsing and checking, no I/O (VIRTIO 1.3, 5.2.6).

use ringside_rings::{Chain, SegmentError, read_segments};
use thiserror::Error;
use vm_memory::GuestMemory;

use super::config::feature;
use super::device::ZoneAction;
use super::stats::Kind;

/// Bytes in a sector, the unit of all addresses, whatever the block size (VIRTIO 1.3, 5.2.6).
pub(super) const SECTOR: u64 = 512;
/// Length of the request header: type, reserved, sector (VIRTIO 1.3, 5.2.6).
pub(super) const HEADER_LEN: u64 = 16;
/// Length of the string that VIRTIO_BLK_T_GET_ID returns (VIRTIO 1.3, 5.2.6).
pub(super) const ID_LEN: usize = 20;
/// Length of struct virtio_blk_discard_write_zeroes (VIRTIO 1.3, 5.2.6).
const RANGE_LEN: usize = 16;
/// Length of append_sector, behind which is the status (VIRTIO 1.3, 5.2.6, struct virtio_blk_req_za).
pub(super) const APPEND_ANSWER_LEN: u64 = 8;
/// Most of them in a request: max_discard_seg and its like (VIRTIO 1.3, 5.2.4).
pub(super) const MAX_RANGES: usize = 32;
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
    pub(super) const SECURE_ERASE: u32 = 14;
    pub(super) const ZONE_APPEND: u32 = 15;
    pub(super) const ZONE_REPORT: u32 = 16;
    pub(super) const ZONE_OPEN: u32 = 18;
    pub(super) const ZONE_CLOSE: u32 = 20;
    pub(super) const ZONE_FINISH: u32 = 22;
    pub(super) const ZONE_RESET: u32 = 24;
    pub(super) const ZONE_RESET_ALL: u32 = 26;
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
    /// VIRTIO_BLK_S_ZONE_INVALID_CMD
    ZoneInvalidCommand = 3,
    /// VIRTIO_BLK_S_ZONE_UNALIGNED_WP
    ZoneUnalignedWritePointer = 4,
    /// VIRTIO_BLK_S_ZONE_OPEN_RESOURCE
    ZoneOpenResource = 5,
    /// VIRTIO_BLK_S_ZONE_ACTIVE_RESOURCE
    ZoneActiveResource = 6,
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
    /// Most bytes to discard in one range; 0 if the driver did not accept VIRTIO_BLK_F_DISCARD.
    pub(super) max_discard: u64,
    /// Most bytes to zero in one range; 0 if the driver did not accept VIRTIO_BLK_F_WRITE_ZEROES.
    pub(super) max_write_zeroes: u64,
    /// Most bytes to erase securely in one range; 0 if the driver did not accept VIRTIO_BLK_F_SECURE_ERASE.
    pub(super) max_secure_erase: u64,
    /// The driver accepted VIRTIO_BLK_F_ZONED.
    pub(super) zoned: bool,
    /// Most bytes to append to a zone.
    pub(super) max_append: u64,
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
    /// Write from the readable segments, from [`HEADER_LEN`] on, to where the zone is written next. The answer is struct
    /// virtio_blk_req_za's, with [`APPEND_ANSWER_LEN`] bytes.
    ZoneAppend {
        /// Where the zone should begin.
        offset: u64,
        /// How much.
        len: u64,
    },
    /// Describe zones in the first `len` bytes of the writable segments.
    ZoneReport {
        /// In which zone to begin.
        offset: u64,
        /// How much room there is.
        len: u64,
    },
    /// Change a zone.
    Zone {
        /// Where it should begin.
        offset: u64,
        /// How.
        action: ZoneAction,
    },
    /// Reset all zones.
    ZoneResetAll,
    /// Do this to each of the ranges that were found.
    Ranges(RangeAction),
    /// The request is answered with this status and nothing else.
    Refuse(Status),
}

/// What is to be done to ranges of the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum RangeAction {
    /// They are not needed any more.
    Discard,
    /// They are to read as zeroes.
    WriteZeroes,
    /// They are to be lost, with all copies that the storage may have made.
    SecureErase,
}

/// A range that lies within the disk and is not empty.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Range {
    /// Where on the disk, in bytes.
    pub(super) offset: u64,
    /// How many bytes.
    pub(super) len: u64,
    /// The space may be given back, if it is to read as zeroes.
    pub(super) unmap: bool,
}

impl Request {
    /// How it is counted, and how many bytes it is about, with the ranges that were found.
    pub(super) fn measure(&self, ranges: &[Range]) -> (Kind, u64) {
        match *self {
            Self::Read { len, .. } => (Kind::Read, len),
            Self::Write { len, .. } | Self::ZoneAppend { len, .. } => (Kind::Write, len),
            Self::Flush => (Kind::Flush, 0),
            Self::Ranges(action) => {
                let kind = match action {
                    RangeAction::Discard => Kind::Discard,
                    RangeAction::WriteZeroes => Kind::WriteZeroes,
                    RangeAction::SecureErase => Kind::SecureErase,
                };
                (kind, ranges.iter().map(|range| range.len).sum())
            }
            Self::ZoneReport { .. } | Self::Zone { .. } | Self::ZoneResetAll => (Kind::Zone, 0),
            Self::GetId { .. } | Self::Refuse(_) => (Kind::Other, 0),
        }
    }
}

/// The chain has no room for a status, or no header to tell what it asks: it is returned with an I/O error if that has a
/// place, else with nothing.
#[derive(Debug, Error)]
pub(super) enum Malformed {
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

/// Reads the header of a chain and checks the request against the disk. In `ranges` is then what [`Request::Ranges`] is
/// about.
///
/// # Errors
/// [`Malformed`]
pub(super) fn parse<M: GuestMemory>(
    chain: &Chain<'_>,
    mem: &M,
    limits: &Limits,
    ranges: &mut Vec<Range>,
) -> Result<Request, Malformed> {
    let Some(writable) = chain.writable_len().checked_sub(1) else {
        return Err(Malformed::NoStatus);
    };
    let len = chain.readable_len();
    let Some(readable) = len.checked_sub(HEADER_LEN) else {
        return Err(Malformed::ShortHeader { len });
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
        kind::DISCARD if limits.max_discard > 0 => {
            limits.ranges(chain, mem, RangeAction::Discard, ranges)?
        }
        kind::WRITE_ZEROES if limits.max_write_zeroes > 0 => {
            limits.ranges(chain, mem, RangeAction::WriteZeroes, ranges)?
        }
        kind::SECURE_ERASE if limits.max_secure_erase > 0 => {
            limits.ranges(chain, mem, RangeAction::SecureErase, ranges)?
        }
        kind::ZONE_REPORT if limits.zoned => {
            limits.zone_of(sector).map(|offset| Request::ZoneReport {
                offset,
                len: writable,
            })
        }
        kind::ZONE_APPEND if limits.zoned => limits.append(sector, readable, writable),
        kind::ZONE_OPEN if limits.zoned => limits.change(sector, ZoneAction::Open),
        kind::ZONE_CLOSE if limits.zoned => limits.change(sector, ZoneAction::Close),
        kind::ZONE_FINISH if limits.zoned => limits.change(sector, ZoneAction::Finish),
        kind::ZONE_RESET if limits.zoned => limits.change(sector, ZoneAction::Reset),
        kind::ZONE_RESET_ALL if limits.zoned && limits.read_only => Err(Status::IoError),
        kind::ZONE_RESET_ALL if limits.zoned => Ok(Request::ZoneResetAll),
        // Also what exists, but was not negotiated (VIRTIO 1.3, 2.2.1, 5.2.6).
        _ => Err(Status::Unsupported),
    };
    Ok(request.unwrap_or_else(Request::Refuse))
}

impl Limits {
    /// The limits for a driver that accepted these features.
    pub(super) fn negotiated(self, features: u64) -> Self {
        let has = |bits: u64| features & bits != 0;
        let most = |bit: u64, bytes: u64| if has(bit) { bytes } else { 0 };
        Self {
            flush: has(feature::FLUSH | feature::CONFIG_WCE),
            max_discard: most(feature::DISCARD, self.max_discard),
            max_write_zeroes: most(feature::WRITE_ZEROES, self.max_write_zeroes),
            max_secure_erase: most(feature::SECURE_ERASE, self.max_secure_erase),
            zoned: has(feature::ZONED),
            ..self
        }
    }

    /// What the driver is told when a zone is in the way: those that know nothing of zones know none of the words for it.
    pub(super) fn zone_status(&self, status: Status) -> Status {
        if self.zoned { status } else { Status::IoError }
    }

    /// Byte offset of a sector in some zone.
    fn zone_of(&self, sector: u64) -> Result<u64, Status> {
        self.within(sector, SECTOR)
            .map_err(|_| Status::ZoneInvalidCommand)
    }

    fn change(&self, sector: u64, action: ZoneAction) -> Result<Request, Status> {
        if self.read_only {
            return Err(Status::IoError);
        }
        let offset = self.zone_of(sector)?;
        Ok(Request::Zone { offset, action })
    }

    fn append(&self, sector: u64, len: u64, room: u64) -> Result<Request, Status> {
        if self.read_only || room < APPEND_ANSWER_LEN {
            return Err(Status::IoError);
        }
        if len == 0 || len > self.max_append {
            return Err(Status::ZoneInvalidCommand);
        }
        self.zone_of(sector)?;
        let offset = self.transfer(sector, len)?;
        Ok(Request::ZoneAppend { offset, len })
    }

    fn max_range(&self, action: RangeAction) -> u64 {
        match action {
            RangeAction::Discard => self.max_discard,
            RangeAction::WriteZeroes => self.max_write_zeroes,
            RangeAction::SecureErase => self.max_secure_erase,
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

    /// The ranges of a request, all of them valid, or what it is refused with (VIRTIO 1.3, 5.2.6, 5.2.6.2).
    fn ranges<M: GuestMemory>(
        &self,
        chain: &Chain<'_>,
        mem: &M,
        action: RangeAction,
        ranges: &mut Vec<Range>,
    ) -> Result<Result<Request, Status>, SegmentError> {
        let mut buffer = [0; RANGE_LEN * MAX_RANGES];
        let list = usize::try_from(chain.readable_len().saturating_sub(HEADER_LEN))
            .ok()
            .filter(|len| *len > 0 && len.is_multiple_of(RANGE_LEN))
            .and_then(|len| buffer.get_mut(..len));
        let Some(list) = list else {
            return Ok(Err(Status::IoError));
        };
        read_segments(mem, chain.readable(), HEADER_LEN, list)?;
        Ok(self
            .check_ranges(action, list, ranges)
            .map(|()| Request::Ranges(action)))
    }

    /// Checks an array of struct virtio_blk_discard_write_zeroes, and gives what is not empty of it.
    fn check_ranges(
        &self,
        action: RangeAction,
        list: &[u8],
        ranges: &mut Vec<Range>,
    ) -> Result<(), Status> {
        ranges.clear();
        let mut checked = Ok(());
        for bytes in list.as_chunks().0 {
            match self.range(action, *bytes) {
                Ok(range) if range.len > 0 => ranges.push(range),
                Ok(_) => {}
                // Comes first, wherever it is in the list.
                Err(Status::Unsupported) => return Err(Status::Unsupported),
                Err(status) => checked = Err(status),
            }
        }
        checked
    }

    /// A struct virtio_blk_discard_write_zeroes (VIRTIO 1.3, 5.2.6, 5.2.6.2).
    fn range(&self, action: RangeAction, bytes: [u8; RANGE_LEN]) -> Result<Range, Status> {
        let [a, b, c, d, e, f, g, h, n0, n1, n2, n3, f0, f1, f2, f3] = bytes;
        let sector = u64::from_le_bytes([a, b, c, d, e, f, g, h]);
        let len = u64::from(u32::from_le_bytes([n0, n1, n2, n3])).saturating_mul(SECTOR);
        let flags = u32::from_le_bytes([f0, f1, f2, f3]);
        let known = match action {
            RangeAction::WriteZeroes => FLAG_UNMAP,
            RangeAction::Discard | RangeAction::SecureErase => 0,
        };
        if flags & !known != 0 {
            return Err(Status::Unsupported);
        }
        if self.read_only || len > self.max_range(action) {
            return Err(Status::IoError);
        }
        Ok(Range {
            offset: self.within(sector, len)?,
            len,
            unmap: flags & FLAG_UNMAP != 0,
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
        max_discard: 1 << 18,
        max_write_zeroes: 1 << 19,
        max_secure_erase: 1 << 17,
        zoned: true,
        max_append: 1 << 16,
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
        let discard = |bytes| LIMITS.range(RangeAction::Discard, bytes);
        let zeroes = |bytes| LIMITS.range(RangeAction::WriteZeroes, bytes);
        assert_eq!(
            discard(range(8, 8, 0)),
            Ok(Range {
                offset: 4096,
                len: 4096,
                unmap: false
            })
        );
        // 5.2.6.2: unmap on a discard, and unknown flags, are unsupported.
        assert_eq!(discard(range(8, 8, 1)), Err(Status::Unsupported));
        assert_eq!(zeroes(range(8, 8, 2)), Err(Status::Unsupported));
        assert!(matches!(
            zeroes(range(8, 8, 1)),
            Ok(Range { unmap: true, .. })
        ));
        let erase = |bytes| LIMITS.range(RangeAction::SecureErase, bytes);
        assert!(erase(range(2048 - 256, 256, 0)).is_ok());
        assert_eq!(erase(range(0, 257, 0)), Err(Status::IoError));
        assert_eq!(erase(range(0, 8, 1)), Err(Status::Unsupported));
        assert!(discard(range(0, 512, 0)).is_ok());
        assert_eq!(discard(range(0, 513, 0)), Err(Status::IoError));
        assert!(zeroes(range(0, 1024, 0)).is_ok());
        assert_eq!(zeroes(range(0, 1025, 0)), Err(Status::IoError));
        assert_eq!(zeroes(range(2048, 1, 0)), Err(Status::IoError));
        let frozen = Limits {
            read_only: true,
            ..LIMITS
        };
        assert_eq!(
            frozen.range(RangeAction::Discard, range(0, 1, 0)),
            Err(Status::IoError)
        );
    }

    #[test]
    fn all_ranges_are_valid_or_none_is_touched() {
        let check = |list: &[[u8; 16]]| {
            let mut ranges = vec![];
            LIMITS
                .check_ranges(RangeAction::WriteZeroes, &list.concat(), &mut ranges)
                .map(|()| ranges)
        };
        let found = check(&[range(8, 8, 1), range(3, 0, 0), range(0, 1, 0)]).unwrap();
        let found: Vec<_> = found.iter().map(|r| (r.offset, r.len, r.unmap)).collect();
        assert_eq!(found, [(4096, 4096, true), (0, 512, false)]);
        assert_eq!(check(&[range(5, 0, 0)]), Ok(vec![]));
        let (beyond, flags) = (range(2048, 1, 0), range(0, 1, 4));
        assert_eq!(check(&[range(0, 1, 0), beyond]), Err(Status::IoError));
        assert_eq!(check(&[beyond, flags]), Err(Status::Unsupported));
        assert_eq!(check(&[flags, beyond]), Err(Status::Unsupported));
    }

    #[test]
    fn commands_are_those_that_were_negotiated() {
        let of = |features| {
            let limits = LIMITS.negotiated(features);
            (
                limits.flush,
                limits.max_discard > 0,
                limits.max_write_zeroes > 0,
                limits.max_secure_erase > 0,
            )
        };
        assert_eq!(of(0), (false, false, false, false));
        assert_eq!(of(feature::FLUSH), (true, false, false, false));
        assert_eq!(of(feature::CONFIG_WCE), (true, false, false, false));
        assert_eq!(of(feature::DISCARD), (false, true, false, false));
        assert_eq!(of(feature::WRITE_ZEROES), (false, false, true, false));
        assert_eq!(of(feature::SECURE_ERASE), (false, false, false, true));
    }

    #[test]
    fn zones_are_for_those_who_know_them() {
        assert!(LIMITS.negotiated(feature::ZONED).zoned);
        let plain = LIMITS.negotiated(0);
        assert!(!plain.zoned);
        let status = Status::ZoneUnalignedWritePointer;
        assert_eq!(plain.zone_status(status), Status::IoError);
        assert_eq!(LIMITS.zone_status(status), status);
    }

    #[test]
    fn appends_have_a_limit_and_room_for_their_answer() {
        let append = |len| Request::ZoneAppend { offset: 4096, len };
        assert_eq!(LIMITS.append(8, 512, 8), Ok(append(512)));
        assert_eq!(LIMITS.append(8, 1 << 16, 9), Ok(append(1 << 16)));
        assert_eq!(LIMITS.append(8, 512, 7), Err(Status::IoError));
        let invalid = Err(Status::ZoneInvalidCommand);
        assert_eq!(LIMITS.append(8, 0, 8), invalid);
        assert_eq!(LIMITS.append(8, (1 << 16) + 512, 8), invalid);
        assert_eq!(LIMITS.append(2048, 512, 8), invalid);
        assert_eq!(LIMITS.append(8, 100, 8), Err(Status::IoError));
        let frozen = Limits {
            read_only: true,
            ..LIMITS
        };
        assert_eq!(frozen.append(8, 512, 8), Err(Status::IoError));
        let change = frozen.change(8, ZoneAction::Reset);
        assert_eq!(change, Err(Status::IoError));
        assert_eq!(LIMITS.change(2048, ZoneAction::Reset), invalid);
    }

    proptest! {
        #[test]
        fn no_request_reaches_beyond_the_disk(sector: u64, len: u64) {
            if let Ok(offset) = LIMITS.transfer(sector, len) {
                prop_assert!(offset + len <= LIMITS.capacity);
            }
        }

        #[test]
        fn no_range_reaches_beyond_the_disk(
            list in prop::collection::vec((0..4096_u64, 0..1200_u32, 0..3_u32), 0..=MAX_RANGES),
            what in 0..3_usize,
        ) {
            let bytes: Vec<u8> = list.iter().flat_map(|&(at, len, flags)| range(at, len, flags)).collect();
            let action = [RangeAction::Discard, RangeAction::WriteZeroes, RangeAction::SecureErase][what];
            let mut ranges = vec![];
            let checked = LIMITS.check_ranges(action, &bytes, &mut ranges);
            for range in &ranges {
                prop_assert!(range.len > 0 && range.len <= LIMITS.max_range(action));
                prop_assert!(range.offset + range.len <= LIMITS.capacity);
            }
            if checked.is_ok() {
                let wanted: Vec<_> = list.iter().filter(|r| r.1 > 0).map(|r| (r.0 * 512, u64::from(r.1) * 512)).collect();
                let found: Vec<_> = ranges.iter().map(|r| (r.offset, r.len)).collect();
                prop_assert_eq!(found, wanted);
            }
        }
    }
}

//! The requests to the kernel (linux/fs.h, linux/blkzoned.h), each behind a function that cannot be called wrongly.

#![allow(
    unsafe_code,
    reason = "ioctl is the only interface to these commands, and no safe wrapper of it exists"
)]

use std::ffi::c_ulong;
use std::fs::File;
use std::os::fd::AsRawFd;

use nix::{Result, request_code_none, request_code_readwrite, request_code_write};

use super::{ZoneAction, ZoneInfo};
use crate::blk::request::SECTOR;

mod raw {
    use nix::request_code_none;

    use super::ReportHeader;

    // Numbered without the size of their argument.
    nix::ioctl_write_ptr_bad!(blkdiscard, request_code_none!(0x12, 119), [u64; 2]);
    nix::ioctl_write_ptr_bad!(blksecdiscard, request_code_none!(0x12, 125), [u64; 2]);

    nix::ioctl_readwrite!(blkreportzone, 0x12, 130, ReportHeader);
    nix::ioctl_write_ptr!(blkresetzone, 0x12, 131, [u64; 2]);
    nix::ioctl_write_ptr!(blkopenzone, 0x12, 134, [u64; 2]);
    nix::ioctl_write_ptr!(blkclosezone, 0x12, 135, [u64; 2]);
    nix::ioctl_write_ptr!(blkfinishzone, 0x12, 136, [u64; 2]);
}

/// All of them, by their numbers.
pub(in crate::blk) const REQUESTS: [(c_ulong, &str); 7] = [
    (request_code_none!(0x12, 119), "discard"),
    (request_code_none!(0x12, 125), "secure erase"),
    (
        request_code_readwrite!(0x12, 130, size_of::<ReportHeader>()),
        "zones",
    ),
    (
        request_code_write!(0x12, 131, size_of::<[u64; 2]>()),
        "zones",
    ),
    (
        request_code_write!(0x12, 134, size_of::<[u64; 2]>()),
        "zones",
    ),
    (
        request_code_write!(0x12, 135, size_of::<[u64; 2]>()),
        "zones",
    ),
    (
        request_code_write!(0x12, 136, size_of::<[u64; 2]>()),
        "zones",
    ),
];

/// Zones in a report: with its header it is a little more than a page.
const ZONES: usize = 64;
/// BLK_ZONE_REP_CAPACITY: the zones' capacity is valid.
const REPORTS_CAPACITY: u32 = 1;

/// struct blk_zone_report without the zones.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
struct ReportHeader {
    sector: u64,
    nr_zones: u32,
    flags: u32,
}

/// struct blk_zone, in sectors.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
struct Zone {
    start: u64,
    len: u64,
    write_pointer: u64,
    kind: u8,
    condition: u8,
    non_sequential: u8,
    reset: u8,
    reserved: [u8; 4],
    capacity: u64,
    more_reserved: [u8; 24],
}

/// struct blk_zone_report with room for zones.
#[repr(C)]
struct Report {
    header: ReportHeader,
    zones: [Zone; ZONES],
}

/// BLKREPORTZONE: the zones from the one in which a sector is.
pub(super) fn report_zones(file: &File, sector: u64, mut each: impl FnMut(ZoneInfo)) -> Result<()> {
    let mut report = Report {
        header: ReportHeader {
            sector,
            nr_zones: u32::try_from(ZONES).unwrap_or(0),
            flags: 0,
        },
        zones: [Zone::default(); ZONES],
    };
    // SAFETY: the kernel reads the header at this address, and writes it and as many zones behind it as it names, for
    // which there is room. All of it lives until after the call, and any bytes are valid for it.
    unsafe { raw::blkreportzone(file.as_raw_fd(), (&raw mut report).cast()) }?;
    let count = usize::try_from(report.header.nr_zones).unwrap_or(ZONES);
    let has_capacity = report.header.flags & REPORTS_CAPACITY != 0;
    for zone in report.zones.iter().take(count) {
        let capacity = if has_capacity {
            zone.capacity
        } else {
            zone.len
        };
        each(ZoneInfo {
            start: zone.start.saturating_mul(SECTOR),
            len: zone.len.saturating_mul(SECTOR),
            capacity: capacity.saturating_mul(SECTOR),
            write_pointer: zone.write_pointer.saturating_mul(SECTOR),
            kind: zone.kind,
            condition: zone.condition,
        });
    }
    Ok(())
}

/// BLKOPENZONE, BLKCLOSEZONE, BLKFINISHZONE or BLKRESETZONE: start and length in sectors.
pub(super) fn manage_zones(file: &File, action: ZoneAction, range: [u64; 2]) -> Result<()> {
    let (fd, range) = (file.as_raw_fd(), &raw const range);
    match action {
        // SAFETY: the kernel reads two numbers, which live until after the call.
        ZoneAction::Open => unsafe { raw::blkopenzone(fd, range) },
        // SAFETY: as above.
        ZoneAction::Close => unsafe { raw::blkclosezone(fd, range) },
        // SAFETY: as above.
        ZoneAction::Finish => unsafe { raw::blkfinishzone(fd, range) },
        // SAFETY: as above.
        ZoneAction::Reset => unsafe { raw::blkresetzone(fd, range) },
    }
    .map(drop)
}

/// BLKDISCARD: start and length in bytes.
pub(super) fn discard(file: &File, range: [u64; 2]) -> Result<()> {
    // SAFETY: the kernel reads two numbers, which live until after the call.
    unsafe { raw::blkdiscard(file.as_raw_fd(), &raw const range) }.map(drop)
}

/// BLKSECDISCARD: start and length in bytes.
pub(super) fn secure_discard(file: &File, range: [u64; 2]) -> Result<()> {
    // SAFETY: the kernel reads two numbers, which live until after the call.
    unsafe { raw::blksecdiscard(file.as_raw_fd(), &raw const range) }.map(drop)
}

//! Requests as a fuzzer makes them. It panics at what is wrong: it is for tests only.
#![allow(missing_docs, clippy::unwrap_used, clippy::panic)]

use ringside_rings::{ChainBuf, DeviceRing, DriverLayout, DriverRing, Segment};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::request::{Limits, MAX_RANGES, Request, SECTOR, parse};

const SIZE: u16 = 16;
/// Where the request lies.
const DATA: u64 = 0x8000;
const END: u64 = 0x1_0000;

/// One request: what the disk is like, the lengths of its pieces, and what stands in them.
pub fn request(bytes: &[u8]) {
    let Some(([flags, capacity, cuts @ ..], content)) = bytes.split_first_chunk::<8>() else {
        return;
    };
    let has = |bit: u8| flags & bit != 0;
    let most = |bit: u8| if has(bit) { 1 << 20 } else { 0 };
    let limits = Limits {
        capacity: u64::from(*capacity) * SECTOR * 8,
        read_only: has(1),
        flush: has(2),
        max_discard: most(4),
        max_write_zeroes: most(8),
        max_secure_erase: most(16),
        zoned: has(32),
        max_append: 65536,
        align: if has(64) { 4096 } else { SECTOR },
    };
    let mem = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 0x1_0000)]).unwrap();
    let content = content.get(..0x8000).unwrap_or(content);
    mem.write_slice(content, GuestAddress(DATA)).unwrap();
    // Pieces one behind the other; the last ones are the device's to write.
    let mut pieces = [const { Vec::new() }; 2];
    let mut at = DATA;
    for cut in cuts {
        let len = u64::from(cut & 0x7f) * if has(128) { 512 } else { 1 };
        if len == 0 || at + len > END {
            continue;
        }
        let [readable, writable] = &mut pieces;
        let part = if cut & 0x80 == 0 { readable } else { writable };
        part.push(Segment::new(GuestAddress(at), u32::try_from(len).unwrap()));
        at += len;
    }
    let [readable, writable] = pieces;
    let layout = DriverLayout::new(GuestAddress(0), SIZE, 0).unwrap();
    let mut driver = DriverRing::new(layout, false, &mem).unwrap();
    let mut session = driver.session(&mem).unwrap();
    if session.add(&readable, &writable, ()).is_err() {
        return;
    }
    session.publish().unwrap();
    let mut device = DeviceRing::new(&layout.config(false), &mem).unwrap();
    let mut buf = ChainBuf::new(SIZE);
    let mut session = device.session(&mem).unwrap();
    let chain = session.pop(&mut buf).unwrap().unwrap();
    let mut ranges = Vec::with_capacity(MAX_RANGES);
    let Ok(request) = parse(&chain, &mem, &limits, &mut ranges) else {
        return;
    };
    assert!(chain.readable_len() >= 16 && chain.writable_len() > 0);
    assert!(ranges.len() <= MAX_RANGES);
    let within = |offset: u64, len: u64| {
        assert!(
            offset
                .checked_add(len)
                .is_some_and(|end| end <= limits.capacity)
        );
    };
    match request {
        Request::Read { offset, len } => {
            within(offset, len);
            assert_eq!(len, chain.writable_len() - 1);
            assert_eq!((offset | len) % limits.align, 0);
        }
        Request::Write { offset, len } | Request::ZoneAppend { offset, len } => {
            within(offset, len);
            assert_eq!(len, chain.readable_len() - 16);
            assert_eq!((offset | len) % limits.align, 0);
            assert!(!limits.read_only);
        }
        Request::Ranges(_) => {
            assert!(!limits.read_only || ranges.is_empty());
            for range in &ranges {
                within(range.offset, range.len);
                assert!(range.len > 0 && range.len <= 1 << 20);
            }
        }
        Request::ZoneReport { offset, len } => {
            within(offset, SECTOR);
            assert!(limits.zoned && len < chain.writable_len());
        }
        Request::Zone { offset, .. } => {
            within(offset, SECTOR);
            assert!(limits.zoned && !limits.read_only);
        }
        Request::ZoneResetAll => assert!(limits.zoned && !limits.read_only),
        Request::Flush => assert!(limits.flush),
        Request::GetId { len } => assert!(len < chain.writable_len()),
        Request::Refuse(_) => {}
    }
    // What is counted does not overflow either.
    let (_, _) = request.measure(&ranges);
}

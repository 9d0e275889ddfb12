//! Frames in guest memory as a fuzzer makes them. It panics at what is wrong: it is for tests only.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing
)]

use ringside_rings::Segment;
use vm_memory::{Bytes, GuestAddress, VolatileSlice};

use super::frame::{Beginning, FRONT, Frame, HEADER, LONGEST_HEADER, PREFIX, Rest};
use super::offload::{Room, finish};
use super::policy::{Form, Vlans};
use crate::net::hash::Report;
use crate::shell::Memory;

/// Where the frame lies: across two regions.
const BORDER: usize = 0x1000;
const START: u64 = 0xff0;

/// The first bytes are the port's kind, how much longer the frame is than what is given of it, and its virtio-net header; the
/// rest is the frame.
pub fn frame(bytes: &[u8]) {
    let Some(([port, longer, header @ ..], content)) = bytes.split_first_chunk::<12>() else {
        return;
    };
    let content = content.get(..0x4000).unwrap_or(content);
    let len = content.len() + usize::from(*longer) * 256;
    let memory = Memory::from_ranges(&[
        (GuestAddress(0), BORDER),
        (GuestAddress(0x1000), 0x1_8000 - BORDER),
    ])
    .unwrap();
    memory.write_slice(content, GuestAddress(START)).unwrap();
    let segments = [Segment::new(
        GuestAddress(START),
        u32::try_from(len).unwrap(),
    )];
    let vlans = match port % 3 {
        0 => Vlans::Access(1),
        kind => Vlans::Trunk {
            tagged: "2+5-9".parse().unwrap(),
            native: (kind == 1).then_some(3),
        },
    };
    let first = content.get(..PREFIX).unwrap_or(content);
    let rest = Rest::Guest {
        memory: &memory,
        segments: &segments,
    };
    let mut beginning = Beginning::new();
    let Some(place) = beginning.place(HEADER, HEADER + first.len()) else {
        return;
    };
    place[..10].copy_from_slice(header);
    place[HEADER..].copy_from_slice(first);
    let understood = beginning.understand(HEADER, first.len(), len - first.len(), &vlans);
    if understood.is_err() {
        return;
    }
    beginning.goes_on(0..1, first.len());
    let frame = Frame {
        beginning: &beginning,
        rest: &rest,
    };
    let untagged = frame.len();
    assert!(untagged == len || untagged + 4 == len);
    let (_, _, _, _) = (
        frame.flow(),
        frame.is_link_local(),
        frame.is_to_group(),
        frame.header.needs(),
    );
    for (form, longer) in [(Form::Untagged, 0), (Form::Tagged, 4)] {
        let mut front = [0; FRONT];
        let packet = frame.packet(form, &mut front);
        let mut frames = [10, HEADER, LONGEST_HEADER].map(|header_len| {
            assert_eq!(packet.len(header_len), header_len + untagged + longer);
            let mut out = vec![0; packet.len(header_len)];
            let mut room = [0; LONGEST_HEADER];
            let mut bytes = match header_len {
                LONGEST_HEADER => packet.bytes_with(Report::NONE, &mut room),
                shorter => packet.bytes(shorter),
            };
            let copied = bytes.copy_to(VolatileSlice::from(out.as_mut_slice()));
            assert!(copied, "it is shorter than it says");
            out.split_off(header_len)
        });
        frames.sort_unstable();
        assert!(
            frames.windows(2).all(|two| two[0] == two[1]),
            "the header's length changes the frame"
        );
    }
    let mut sent = 0;
    let finished = finish(&frame, &mut Room::new(), |segment| {
        sent += 1;
        assert!(segment.header.is_plain());
        assert_eq!(segment.vlan, frame.vlan);
        assert!(segment.len() <= untagged);
    });
    assert!(finished.is_none() || frame.header.gso != 0 || sent == 1);
}

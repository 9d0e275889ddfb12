//! Random buffers and packets: what is sound passes unchanged and in order, what is not costs only itself.

use std::os::unix::net::UnixDatagram;
use std::time::{Duration, Instant};

use proptest::prelude::*;
use ringside_rings::Segment;
use virtio_bindings::virtio_config::{VIRTIO_F_IN_ORDER, VIRTIO_F_RING_PACKED, VIRTIO_F_VERSION_1};
use virtio_bindings::virtio_net::VIRTIO_NET_F_MRG_RXBUF;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use vm_memory::GuestAddress;

use super::driver::{HEADER, Pair};
use crate::net::features::{GUEST_OFFLOADS, bit};
use crate::net::link::TapQueue;

const BASE: u64 =
    bit(VIRTIO_F_VERSION_1) | bit(VIRTIO_RING_F_EVENT_IDX) | bit(VIRTIO_NET_F_MRG_RXBUF);

fn pair(features: u64) -> (UnixDatagram, Pair) {
    let (ours, theirs) = UnixDatagram::pair().unwrap();
    theirs.set_nonblocking(true).unwrap();
    ours.set_nonblocking(true).unwrap();
    (
        ours,
        Pair::new(TapQueue::from_packet_fd(theirs.into()), features),
    )
}

/// How queues may be laid out and used.
fn queues() -> impl Strategy<Value = u64> {
    const PACKED: u64 = bit(VIRTIO_F_RING_PACKED);
    const IN_ORDER: u64 = bit(VIRTIO_F_IN_ORDER);
    prop::sample::select(vec![0, PACKED, IN_ORDER, PACKED | IN_ORDER])
}

fn packet(number: usize, len: usize) -> Vec<u8> {
    let mut packet = vec![0; HEADER];
    packet.extend((HEADER..len).map(|i| ((i + number) % 251) as u8));
    packet
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// However large the buffers are, and whenever they come, each packet arrives whole.
    #[test]
    fn packets_arrive_whole_in_any_buffers(
        segmented: bool,
        queues in queues(),
        early in 0_usize..40,
        sizes in prop::collection::vec(12_u32..3000, 64),
        lengths in prop::collection::vec(26_usize..9000, 1..12),
    ) {
        let (socket, mut pair) = pair(queues | if segmented { BASE | GUEST_OFFLOADS } else { BASE });
        let mut sizes = sizes.into_iter().cycle();
        for size in sizes.by_ref().take(early) {
            pair.post(1, size);
        }
        for (number, len) in lengths.into_iter().enumerate() {
            let sent = packet(number, len);
            socket.send(&sent).unwrap();
            let start = Instant::now();
            let first = loop {
                if let Some(used) = pair.rx.try_used() {
                    break used;
                }
                prop_assert!(start.elapsed() < Duration::from_secs(5), "packet {number} did not come");
                if pair.rx.outstanding() < 64 && start.elapsed() > Duration::from_millis(2) {
                    let size = sizes.next().unwrap();
                    pair.post(1, size);
                }
                std::thread::yield_now();
            };
            let mut received = pair.guest.read(first.0[0], first.1);
            let buffers = u16::from_le_bytes([received[10], received[11]]);
            for _ in 1..buffers {
                let (segments, len) = pair.rx.try_used().unwrap();
                received.extend(pair.guest.read(segments[0], len));
            }
            received[10..12].fill(0);
            prop_assert!(received == sent, "packet {number} of {len} bytes came as another");
        }
        prop_assert_eq!(pair.worker.counters.rx_dropped.get(), 0);
    }

    /// Whatever is in the chains, each comes back, and a sound packet passes afterwards.
    #[test]
    fn chains_of_any_kind_come_back(
        queues in queues(),
        chains in prop::collection::vec(
            prop::collection::vec((0_u64..6, 1_u32..70_000, any::<bool>()), 1..6),
            1..12,
        ),
    ) {
        let (socket, mut pair) = pair(BASE | GUEST_OFFLOADS | queues);
        let places = [0, 0x1000, 8 << 20, (16 << 20) - 64, 1 << 40, u64::MAX - 16];
        let mut received = vec![0; 1 << 18];
        for chain in chains {
            let part = |writable: bool| -> Vec<Segment> {
                chain
                    .iter()
                    .filter(|piece| piece.2 == writable)
                    .map(|&(place, len, _)| Segment::new(GuestAddress(places[place as usize]), len))
                    .collect()
            };
            // Nothing is to be written by the device, so the driver's memory is not at risk here.
            pair.tx.add(&[(&part(false), &part(true))]);
            prop_assert_eq!(pair.tx.used().1, 0);
            while socket.recv(&mut received).is_ok() {}
        }
        let sound = packet(1, 100);
        let whole = pair.guest.filled(&sound);
        pair.tx.send(&[whole]);
        pair.tx.used();
        let len = socket.recv(&mut received).unwrap();
        prop_assert_eq!(&received[..len], &sound[..]);
    }
}

//! The virtio features of a network device, and the offloads of the TAP that belong to them.

use virtio_bindings::virtio_config::{VIRTIO_F_IN_ORDER, VIRTIO_F_RING_PACKED, VIRTIO_F_VERSION_1};
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_CTRL_GUEST_OFFLOADS, VIRTIO_NET_F_CTRL_MAC_ADDR,
    VIRTIO_NET_F_CTRL_RX, VIRTIO_NET_F_CTRL_RX_EXTRA, VIRTIO_NET_F_CTRL_VLAN, VIRTIO_NET_F_CTRL_VQ,
    VIRTIO_NET_F_GUEST_ANNOUNCE, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN,
    VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_GUEST_UFO,
    VIRTIO_NET_F_GUEST_USO4, VIRTIO_NET_F_GUEST_USO6, VIRTIO_NET_F_HASH_REPORT,
    VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_HOST_UFO,
    VIRTIO_NET_F_HOST_USO, VIRTIO_NET_F_MAC, VIRTIO_NET_F_MQ, VIRTIO_NET_F_MRG_RXBUF,
    VIRTIO_NET_F_MTU, VIRTIO_NET_F_NOTF_COAL, VIRTIO_NET_F_RSS, VIRTIO_NET_F_SPEED_DUPLEX,
    VIRTIO_NET_F_STANDBY, VIRTIO_NET_F_STATUS, VIRTIO_NET_F_VQ_NOTF_COAL,
};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

/// The bit of a feature.
pub(super) const fn bit(feature: u32) -> u64 {
    1 << feature
}

/// `set` has a feature.
pub(super) const fn has(set: u64, feature: u32) -> bool {
    set & bit(feature) != 0
}

/// The features that let the driver receive unfinished packets (VIRTIO 1.3, 5.1.3). The offloads command
/// uses the same bits (5.1.6.5.8).
pub(super) const GUEST_OFFLOADS: u64 = bit(VIRTIO_NET_F_GUEST_CSUM)
    | bit(VIRTIO_NET_F_GUEST_TSO4)
    | bit(VIRTIO_NET_F_GUEST_TSO6)
    | bit(VIRTIO_NET_F_GUEST_ECN)
    | bit(VIRTIO_NET_F_GUEST_UFO)
    | bit(VIRTIO_NET_F_GUEST_USO4)
    | bit(VIRTIO_NET_F_GUEST_USO6);

/// Those of them that let a packet be longer than the MTU.
pub(super) const GUEST_SEGMENTATION: u64 = GUEST_OFFLOADS & !bit(VIRTIO_NET_F_GUEST_CSUM);

/// Kinds of offload that the user can switch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Offloads {
    /// Checksums.
    pub(super) csum: bool,
    /// TCP segmentation.
    pub(super) tso: bool,
    /// UDP fragmentation.
    pub(super) ufo: bool,
    /// UDP segmentation.
    pub(super) uso: bool,
}

impl Offloads {
    /// All that have no dependent one missing: segmentation needs checksums (VIRTIO 1.3, 5.1.3.1).
    const fn consistent(self) -> Self {
        Self {
            csum: self.csum,
            tso: self.csum && self.tso,
            ufo: self.csum && self.ufo,
            uso: self.csum && self.uso,
        }
    }

    /// The sets of `TUN_F_*` bits to try on a kernel, best first.
    pub(super) fn candidates(self) -> [u32; 3] {
        let Self {
            csum,
            tso,
            ufo,
            uso,
        } = self.consistent();
        let when = |on: bool, bits: u32| if on { bits } else { 0 };
        let base = when(csum, libc::TUN_F_CSUM)
            | when(
                tso,
                libc::TUN_F_TSO4 | libc::TUN_F_TSO6 | libc::TUN_F_TSO_ECN,
            );
        let ufo = when(ufo, libc::TUN_F_UFO);
        let uso = when(uso, libc::TUN_F_USO4 | libc::TUN_F_USO6);
        [base | ufo | uso, base | ufo, base]
    }
}

/// The name of a feature bit of network devices (VIRTIO 1.3, 5.1.3).
pub(super) fn feature_name(bit: u32) -> Option<&'static str> {
    Some(match bit {
        VIRTIO_NET_F_CSUM => "CSUM",
        VIRTIO_NET_F_GUEST_CSUM => "GUEST_CSUM",
        VIRTIO_NET_F_CTRL_GUEST_OFFLOADS => "CTRL_GUEST_OFFLOADS",
        VIRTIO_NET_F_MTU => "MTU",
        VIRTIO_NET_F_MAC => "MAC",
        VIRTIO_NET_F_GUEST_TSO4 => "GUEST_TSO4",
        VIRTIO_NET_F_GUEST_TSO6 => "GUEST_TSO6",
        VIRTIO_NET_F_GUEST_ECN => "GUEST_ECN",
        VIRTIO_NET_F_GUEST_UFO => "GUEST_UFO",
        VIRTIO_NET_F_HOST_TSO4 => "HOST_TSO4",
        VIRTIO_NET_F_HOST_TSO6 => "HOST_TSO6",
        VIRTIO_NET_F_HOST_ECN => "HOST_ECN",
        VIRTIO_NET_F_HOST_UFO => "HOST_UFO",
        VIRTIO_NET_F_MRG_RXBUF => "MRG_RXBUF",
        VIRTIO_NET_F_STATUS => "STATUS",
        VIRTIO_NET_F_CTRL_VQ => "CTRL_VQ",
        VIRTIO_NET_F_CTRL_RX => "CTRL_RX",
        VIRTIO_NET_F_CTRL_VLAN => "CTRL_VLAN",
        VIRTIO_NET_F_CTRL_RX_EXTRA => "CTRL_RX_EXTRA",
        VIRTIO_NET_F_GUEST_ANNOUNCE => "GUEST_ANNOUNCE",
        VIRTIO_NET_F_MQ => "MQ",
        VIRTIO_NET_F_CTRL_MAC_ADDR => "CTRL_MAC_ADDR",
        VIRTIO_NET_F_GUEST_USO4 => "GUEST_USO4",
        VIRTIO_NET_F_GUEST_USO6 => "GUEST_USO6",
        VIRTIO_NET_F_HOST_USO => "HOST_USO",
        VIRTIO_NET_F_SPEED_DUPLEX => "SPEED_DUPLEX",
        VIRTIO_NET_F_VQ_NOTF_COAL => "VQ_NOTF_COAL",
        VIRTIO_NET_F_NOTF_COAL => "NOTF_COAL",
        VIRTIO_NET_F_HASH_REPORT => "HASH_REPORT",
        VIRTIO_NET_F_RSS => "RSS",
        VIRTIO_NET_F_STANDBY => "STANDBY",
        _ => return None,
    })
}

/// What a device offers beyond offloads.
#[derive(Debug, Clone, Copy)]
pub(super) struct Extras {
    /// An MTU was given.
    pub(super) mtu: bool,
    /// A speed was given.
    pub(super) speed: bool,
    /// Interrupts can be held back.
    pub(super) coalescing: bool,
    /// It stands in for another device.
    pub(super) standby: bool,
    /// Packets can be steered to queue pairs.
    pub(super) rss: bool,
    /// Hashes of packets are reported.
    pub(super) hash_report: bool,
    /// There is more than one queue pair.
    pub(super) multi_queue: bool,
    /// Packed virtqueues were not ruled out.
    pub(super) packed: bool,
    /// Use in order was not ruled out.
    pub(super) in_order: bool,
}

/// All features that a device offers on a TAP with these `TUN_F_*` offloads.
pub(super) fn offered(tun: u32, extras: Extras) -> u64 {
    let mut set = bit(VIRTIO_F_VERSION_1)
        | bit(VIRTIO_RING_F_EVENT_IDX)
        | bit(VIRTIO_RING_F_INDIRECT_DESC)
        | bit(VIRTIO_NET_F_MRG_RXBUF)
        | bit(VIRTIO_NET_F_MAC)
        | bit(VIRTIO_NET_F_STATUS)
        | bit(VIRTIO_NET_F_CTRL_VQ)
        | bit(VIRTIO_NET_F_CTRL_RX)
        | bit(VIRTIO_NET_F_CTRL_RX_EXTRA)
        | bit(VIRTIO_NET_F_CTRL_VLAN)
        | bit(VIRTIO_NET_F_CTRL_MAC_ADDR)
        | bit(VIRTIO_NET_F_GUEST_ANNOUNCE);
    let optional = [
        (extras.mtu, VIRTIO_NET_F_MTU),
        (extras.speed, VIRTIO_NET_F_SPEED_DUPLEX),
        (extras.coalescing, VIRTIO_NET_F_NOTF_COAL),
        (extras.coalescing, VIRTIO_NET_F_VQ_NOTF_COAL),
        (extras.standby, VIRTIO_NET_F_STANDBY),
        (extras.rss, VIRTIO_NET_F_RSS),
        (extras.hash_report, VIRTIO_NET_F_HASH_REPORT),
        (extras.multi_queue, VIRTIO_NET_F_MQ),
        (extras.packed, VIRTIO_F_RING_PACKED),
        (extras.in_order, VIRTIO_F_IN_ORDER),
        (tun != 0, VIRTIO_NET_F_CTRL_GUEST_OFFLOADS),
    ];
    for (on, feature) in optional {
        if on {
            set |= bit(feature);
        }
    }
    // What the kernel can hand out, it can take in as well.
    for (tun_bit, guest, host) in [
        (libc::TUN_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_CSUM),
        (
            libc::TUN_F_TSO4,
            VIRTIO_NET_F_GUEST_TSO4,
            VIRTIO_NET_F_HOST_TSO4,
        ),
        (
            libc::TUN_F_TSO6,
            VIRTIO_NET_F_GUEST_TSO6,
            VIRTIO_NET_F_HOST_TSO6,
        ),
        (
            libc::TUN_F_TSO_ECN,
            VIRTIO_NET_F_GUEST_ECN,
            VIRTIO_NET_F_HOST_ECN,
        ),
        (
            libc::TUN_F_UFO,
            VIRTIO_NET_F_GUEST_UFO,
            VIRTIO_NET_F_HOST_UFO,
        ),
        (
            libc::TUN_F_USO4,
            VIRTIO_NET_F_GUEST_USO4,
            VIRTIO_NET_F_HOST_USO,
        ),
        (
            libc::TUN_F_USO6,
            VIRTIO_NET_F_GUEST_USO6,
            VIRTIO_NET_F_HOST_USO,
        ),
    ] {
        if tun & tun_bit != 0 {
            set |= bit(guest) | bit(host);
        }
    }
    set
}

/// The guest offloads in a set of accepted features that have what they depend on (VIRTIO 1.3, 5.1.3.1).
pub(super) fn guest_offloads(acked: u64) -> u64 {
    let mut set = acked & GUEST_OFFLOADS;
    if !has(set, VIRTIO_NET_F_GUEST_CSUM) {
        set = 0;
    }
    if set & (bit(VIRTIO_NET_F_GUEST_TSO4) | bit(VIRTIO_NET_F_GUEST_TSO6)) == 0 {
        set &= !bit(VIRTIO_NET_F_GUEST_ECN);
    }
    set
}

/// The `TUN_F_*` bits for a set of guest offloads.
pub(super) fn tun_offloads(guest: u64) -> u32 {
    let guest = guest_offloads(guest);
    let mut tun = 0;
    for (feature, tun_bit) in [
        (VIRTIO_NET_F_GUEST_CSUM, libc::TUN_F_CSUM),
        (VIRTIO_NET_F_GUEST_TSO4, libc::TUN_F_TSO4),
        (VIRTIO_NET_F_GUEST_TSO6, libc::TUN_F_TSO6),
        (VIRTIO_NET_F_GUEST_ECN, libc::TUN_F_TSO_ECN),
        (VIRTIO_NET_F_GUEST_UFO, libc::TUN_F_UFO),
    ] {
        if has(guest, feature) {
            tun |= tun_bit;
        }
    }
    // The kernel knows both or none.
    if has(guest, VIRTIO_NET_F_GUEST_USO4) && has(guest, VIRTIO_NET_F_GUEST_USO6) {
        tun |= libc::TUN_F_USO4 | libc::TUN_F_USO6;
    }
    tun
}

/// Bytes before each packet: `num_buffers` is there with VERSION_1, or with mergeable buffers on a legacy
/// driver, the hash and its kind with hash reports (VIRTIO 1.3, 5.1.6, 5.1.6.1).
pub(super) fn header_len(acked: u64) -> u8 {
    if has(acked, VIRTIO_NET_F_HASH_REPORT) {
        20
    } else if has(acked, VIRTIO_F_VERSION_1) || has(acked, VIRTIO_NET_F_MRG_RXBUF) {
        12
    } else {
        10
    }
}

/// The number of the control queue (VIRTIO 1.3, 5.1.2): behind all pairs with MQ or RSS, behind the first without.
/// `None` if there is no control queue.
pub(super) fn control_queue(acked: u64, pairs: u16) -> Option<u16> {
    if !has(acked, VIRTIO_NET_F_CTRL_VQ) {
        None
    } else if has(acked, VIRTIO_NET_F_MQ) || has(acked, VIRTIO_NET_F_RSS) {
        Some(pairs.saturating_mul(2))
    } else {
        Some(2)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: Offloads = Offloads {
        csum: true,
        tso: true,
        ufo: true,
        uso: true,
    };
    const NONE: Extras = Extras {
        mtu: false,
        speed: false,
        coalescing: false,
        standby: false,
        rss: false,
        hash_report: false,
        multi_queue: false,
        packed: false,
        in_order: false,
    };

    #[test]
    fn offers_only_what_the_kernel_has() {
        let [best, no_uso, base] = ALL.candidates();
        assert_eq!(best, 0x7f);
        assert_eq!(no_uso, 0x1f);
        assert_eq!(base, 0x0f);
        let with_uso = offered(best, NONE);
        assert!(has(with_uso, VIRTIO_NET_F_HOST_USO));
        let without = offered(no_uso, NONE);
        assert!(!has(without, VIRTIO_NET_F_HOST_USO));
        assert!(!has(without, VIRTIO_NET_F_GUEST_USO4));
        assert!(has(without, VIRTIO_NET_F_HOST_UFO));
        let bare = offered(0, NONE);
        assert_eq!(bare & GUEST_OFFLOADS, 0);
        assert!(!has(bare, VIRTIO_NET_F_CSUM));
        assert!(!has(bare, VIRTIO_NET_F_CTRL_GUEST_OFFLOADS));
    }

    #[test]
    fn extras_are_offered_when_they_are_there() {
        let bare = offered(0, NONE);
        let all = Extras {
            mtu: true,
            speed: true,
            coalescing: true,
            standby: true,
            rss: true,
            hash_report: true,
            multi_queue: true,
            packed: true,
            in_order: true,
        };
        for feature in [
            VIRTIO_NET_F_MTU,
            VIRTIO_NET_F_SPEED_DUPLEX,
            VIRTIO_NET_F_NOTF_COAL,
            VIRTIO_NET_F_VQ_NOTF_COAL,
            VIRTIO_NET_F_STANDBY,
            VIRTIO_NET_F_RSS,
            VIRTIO_NET_F_HASH_REPORT,
            VIRTIO_NET_F_MQ,
            VIRTIO_F_RING_PACKED,
            VIRTIO_F_IN_ORDER,
        ] {
            assert!(
                !has(bare, feature) && has(offered(0, all), feature),
                "{feature}"
            );
        }
    }

    #[test]
    fn segmentation_needs_checksums() {
        let no_csum = Offloads { csum: false, ..ALL };
        assert_eq!(no_csum.candidates(), [0, 0, 0]);
        assert_eq!(guest_offloads(bit(VIRTIO_NET_F_GUEST_TSO4)), 0);
        let csum = bit(VIRTIO_NET_F_GUEST_CSUM);
        assert_eq!(guest_offloads(csum | bit(VIRTIO_NET_F_GUEST_ECN)), csum);
    }

    #[test]
    fn tun_bits_follow_the_driver() {
        assert_eq!(tun_offloads(offered(0x7f, NONE)), 0x7f);
        let uso4 = bit(VIRTIO_NET_F_GUEST_CSUM) | bit(VIRTIO_NET_F_GUEST_USO4);
        assert_eq!(tun_offloads(uso4), libc::TUN_F_CSUM);
        assert_eq!(tun_offloads(0), 0);
    }

    #[test]
    fn header_and_control_queue_depend_on_features() {
        assert_eq!(header_len(0), 10);
        assert_eq!(header_len(bit(VIRTIO_NET_F_MRG_RXBUF)), 12);
        assert_eq!(header_len(bit(VIRTIO_F_VERSION_1)), 12);
        assert_eq!(header_len(bit(VIRTIO_NET_F_HASH_REPORT)), 20);
        let ctrl = bit(VIRTIO_NET_F_CTRL_VQ);
        assert_eq!(control_queue(0, 4), None);
        assert_eq!(control_queue(ctrl, 4), Some(2));
        for several in [VIRTIO_NET_F_MQ, VIRTIO_NET_F_RSS] {
            assert_eq!(control_queue(ctrl | bit(several), 4), Some(8));
        }
    }
}

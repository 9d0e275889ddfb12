//! A guest that cannot make itself known to the network, and has moved: its back-end does it in its place.
//!
//! The frame is a request of RARP for the guest's own address (RFC 903), which nobody answers; what matters is that all switches see
//! where it comes from. QEMU asks for it (VHOST_USER_SEND_RARP) if the driver did not accept VIRTIO_NET_F_GUEST_ANNOUNCE.

use std::io;
use std::sync::Arc;

use vm_memory::{Bytes, GuestAddress, Permissions};

use ringside_rings::Segment;

use super::config::MacAddress;
use super::iov::IoList;
use super::link::Link;
use crate::shell::Memory;

/// The shortest Ethernet frame, without its checksum.
const LEN: usize = 60;

/// The whole frame.
fn frame(mac: MacAddress) -> [u8; LEN] {
    let mac = mac.octets();
    // EtherType of RARP; hardware Ethernet, protocol IPv4, lengths of their addresses, "request reverse".
    let kind = [0x80, 0x35, 0, 1, 8, 0, 6, 4, 0, 3];
    let parts: [&[u8]; 7] = [&[0xff; 6], &mac, &kind, &mac, &[0; 4], &mac, &[0; 4]];
    let mut frame = [0; LEN];
    for (place, byte) in frame.iter_mut().zip(parts.into_iter().flatten()) {
        *place = *byte;
    }
    frame
}

/// Sends it.
///
/// # Errors
/// What the link says.
pub(super) fn send(link: &mut impl Link, mac: MacAddress, header_len: usize) -> io::Result<()> {
    let len = header_len.saturating_add(LEN);
    let memory = Memory::from_ranges(&[(GuestAddress(0), len)]).map_err(io::Error::other)?;
    let start = u64::try_from(header_len).map_err(io::Error::other)?;
    memory
        .write_slice(&frame(mac), GuestAddress(start))
        .map_err(io::Error::other)?;
    let mut list = IoList::new(Arc::new(memory));
    let whole = Segment::new(
        GuestAddress(0),
        u32::try_from(len).map_err(io::Error::other)?,
    );
    list.append(&[whole], Permissions::Read)
        .map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
    link.send(&mut list, header_len)?;
    link.flush();
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_frame_asks_everybody_for_the_address_of_its_sender() {
        let mac = [2, 0, 0, 0, 0, 7];
        let frame = frame(MacAddress::new(mac));
        assert_eq!(frame[..6], [0xff; 6]);
        assert_eq!(frame[6..12], mac);
        assert_eq!(frame[12..22], [0x80, 0x35, 0, 1, 8, 0, 6, 4, 0, 3]);
        assert_eq!((&frame[22..28], &frame[32..38]), (&mac[..], &mac[..]));
        assert!(frame[42..].iter().all(|&byte| byte == 0));
    }
}

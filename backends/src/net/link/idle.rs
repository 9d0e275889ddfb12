//! Links for measurements: one that is nothing, and one that gives frames without end.

use std::io;

use super::{Link, MAX_HEADER};
use crate::net::config::MacAddress;
use crate::net::epoll_set::Watcher;
use crate::net::iov::IoList;

/// The type field of the frames of a source: for local experiments (IEEE 802, 9.2.3).
const ETHERTYPE_LOCAL: [u8; 2] = [0x88, 0xb5];
/// Shortest frame of a source: an Ethernet header and 46 bytes (IEEE 802.3, 3.2.7), without the checksum.
pub(super) const MIN_GENERATED: u16 = 60;
/// Longest frame of a source.
pub(super) const MAX_GENERATED: u16 = 9018;

/// Takes all frames and gives none.
#[derive(Debug)]
pub(in crate::net) struct Null;

impl Link for Null {
    fn watch(&mut self, _watcher: Watcher) -> io::Result<()> {
        Ok(())
    }

    #[inline]
    fn send(&mut self, _frame: &mut IoList, _header_len: usize) -> io::Result<()> {
        Ok(())
    }

    #[inline]
    fn at_once(&self) -> u16 {
        64
    }

    #[inline]
    fn send_all(
        &mut self,
        _frames: &mut IoList,
        pieces: &[usize],
        _header_len: usize,
        results: &mut Vec<io::Result<()>>,
    ) {
        results.extend(pieces.iter().map(|_| Ok(())));
    }

    #[inline]
    fn receive(
        &mut self,
        _list: &mut IoList,
        _pieces: usize,
        _header_len: usize,
        _spill: &mut [u8],
    ) -> io::Result<usize> {
        Err(io::ErrorKind::WouldBlock.into())
    }
}

/// Gives the same frame whenever there is a buffer for it, and takes all frames.
#[derive(Debug)]
pub(in crate::net) struct Generate {
    /// An empty header, and the frame.
    bytes: Box<[u8]>,
}

impl Generate {
    /// Frames of `len` bytes for `to`, without the checksum at their end.
    pub(super) fn new(len: u16, to: MacAddress) -> Self {
        let mut bytes = vec![0; MAX_HEADER + usize::from(len)];
        // From an address of our own: locally administered, for one interface.
        let from = [2, 0, 0, 0, 0, 0xfe];
        let ethernet = to.octets().into_iter().chain(from).chain(ETHERTYPE_LOCAL);
        for (place, byte) in bytes.iter_mut().skip(MAX_HEADER).zip(ethernet) {
            *place = byte;
        }
        Self {
            bytes: bytes.into(),
        }
    }
}

impl Link for Generate {
    fn watch(&mut self, _watcher: Watcher) -> io::Result<()> {
        Ok(())
    }

    #[inline]
    fn send(&mut self, _frame: &mut IoList, _header_len: usize) -> io::Result<()> {
        Ok(())
    }

    #[inline]
    fn receive(
        &mut self,
        list: &mut IoList,
        pieces: usize,
        header_len: usize,
        spill: &mut [u8],
    ) -> io::Result<usize> {
        let start = MAX_HEADER.saturating_sub(header_len);
        let packet = self.bytes.get(start..).unwrap_or_default();
        if list.deliver(0, packet, pieces, spill) {
            Ok(packet.len())
        } else {
            Err(io::ErrorKind::InvalidInput.into())
        }
    }
}

//! Frames that wait in the queue of a TAP before somebody reads them: so how fast that goes is measured without a source beside it.

use std::os::fd::AsRawFd;
use std::thread;

use nix::errno::Errno;
use nix::ifaddrs::getifaddrs;
use nix::sys::socket::{AddressFamily, LinkAddr, MsgFlags, SockFlag, SockType, bind, send, socket};

use super::super::error::LoadError;
use super::options::pin;
use super::{GUEST, PEER, frame};

/// Sends frames out of an interface, which is a TAP that somebody has open, on this processor. Its queue has to have room for them
/// (txqueuelen): the kernel drops others.
pub(super) fn fill(tap: &str, len: u32, count: u64, cpu: Option<usize>) -> Result<(), LoadError> {
    let source = || -> Result<(), LoadError> {
        pin(cpu)?;
        let failed = |errno: Errno| LoadError::Io {
            doing: "send frames to a TAP",
            source: errno.into(),
        };
        let frame = frame(len, PEER, GUEST);
        // It receives nothing: no protocol is named.
        let kind = (SockType::Raw, SockFlag::SOCK_CLOEXEC);
        let out = socket(AddressFamily::Packet, kind.0, kind.1, None).map_err(failed)?;
        bind(out.as_raw_fd(), &address(tap).map_err(failed)?).map_err(failed)?;
        for _ in 0..count {
            send(out.as_raw_fd(), &frame, MsgFlags::empty()).map_err(failed)?;
        }
        Ok(())
    };
    thread::scope(|scope| scope.spawn(source).join().map_err(|_| LoadError::Lane)?)
}

/// The address of an interface for a packet socket.
fn address(interface: &str) -> Result<LinkAddr, Errno> {
    let found = getifaddrs()?
        .filter(|address| address.interface_name == interface)
        .filter_map(|address| address.address)
        .find_map(|address| address.as_link_addr().copied());
    found.ok_or(Errno::ENODEV)
}

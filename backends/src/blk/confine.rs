//! What a disk needs when the program is confined: each kind its own.
//!
//! | disk | the process keeps, besides what the shell does | its queues' threads |
//! | --- | --- | --- |
//! | any | making rings of io_uring, which are restricted to transfers before they are used | rings that exist |
//! | raw file | its descriptor | |
//! | block device | its descriptor, and seven ioctls on it | the same ioctls, and the thread that makes them |
//! | qcow2 | the descriptors of all layers | |
//! | NBD | connecting to the server's socket, or its port of TCP; the C library's resolver if it has a name | |
//! | RBD | the host's network, and what Ceph's library calls | as the process |

use ringside_sandbox::{Call, Capability, Profile, ThreadKind, calls};

use super::Blk;
use super::device;
use super::disk::Source;

pub(super) fn needs(blk: &Blk, profile: &mut Profile) {
    let Blk { source, shared, .. } = blk;
    profile.calls(calls::URING).calls(calls::URING_SETUP);
    if shared.registers {
        // Pinned memory counts against a limit otherwise.
        profile.capability(Capability::CAP_IPC_LOCK);
    }
    // The library works on the queues' threads, too.
    if let Some(Source::Rbd(rbd)) = source {
        rbd.needs(profile);
        return;
    }
    profile.thread(ThreadKind::Queue, &[calls::URING]);
    if shared.device.is_some() {
        let requests = device::REQUESTS.map(|(request, why)| calls::ioctl(request, why));
        let requests: &[Call] = &requests;
        profile
            .calls(requests)
            .thread(ThreadKind::Queue, &[requests]);
    }
    match source {
        Some(Source::Qcow2(_)) => {
            profile
                .calls(calls::STORAGE)
                .thread(ThreadKind::Helper, &[calls::STORAGE]);
        }
        Some(Source::Nbd(nbd)) => nbd.needs(profile),
        // What is asked for when it is drained, or looked at again.
        Some(Source::Raw(_) | Source::Rbd(_)) | None => {
            profile.calls(calls::STORAGE);
        }
    }
}

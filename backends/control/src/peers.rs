//! Whose connections are taken: the kernel says which user made one (unix(7), SO_PEERCRED).

use std::os::unix::net::UnixStream;

use nix::errno::Errno;
use nix::sys::socket::{getsockopt, sockopt};
use nix::unistd::geteuid;
use thiserror::Error;

/// A connection is not taken.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum PeerError {
    /// Its user is not one of those allowed.
    #[error(
        "a connection of user {uid} (process {pid}) is refused; --allow-uid {uid} lets that user connect"
    )]
    Refused {
        /// The user.
        uid: u32,
        /// The process, as it was when it connected.
        pid: i32,
    },
    /// The kernel does not say whose it is.
    #[error("a connection is refused: the system does not say whose it is")]
    Unknown(#[source] Errno),
}

/// Users whose connections are taken: that of this program, root, and those allowed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Peers(Vec<u32>);

impl Peers {
    /// Allows these users, too.
    #[must_use]
    pub fn allowing(users: &[u32]) -> Self {
        let always = [0, geteuid().as_raw()];
        Self(always.iter().chain(users).copied().collect())
    }

    /// Checks who has connected.
    ///
    /// # Errors
    /// [`PeerError`]
    pub fn check(&self, stream: &UnixStream) -> Result<(), PeerError> {
        let peer = getsockopt(stream, sockopt::PeerCredentials).map_err(PeerError::Unknown)?;
        let (uid, pid) = (peer.uid(), peer.pid());
        if self.0.contains(&uid) {
            Ok(())
        } else {
            Err(PeerError::Refused { uid, pid })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_user_and_root_are_allowed_and_others_if_it_is_said() {
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let own = geteuid().as_raw();
        Peers::allowing(&[]).check(&ours).unwrap();
        assert_eq!(Peers::allowing(&[7]), Peers(vec![0, own, 7]));
        let error = Peers(vec![own.wrapping_add(1)]).check(&ours).unwrap_err();
        assert!(
            matches!(error, PeerError::Refused { uid, .. } if uid == own),
            "{error}"
        );
    }
}

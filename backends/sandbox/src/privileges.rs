//! What a process gives up as a whole: dumps, new privileges, capabilities, namespaces.

use std::collections::HashSet;
use std::io;

use caps::errors::CapsError;
use caps::{CapSet, Capability, CapsHashSet};
use nix::errno::Errno;
use nix::sched::{CloneFlags, unshare};
use nix::sys::prctl;
use nix::sys::resource::{Resource, setrlimit};
use thiserror::Error;
use tracing::debug;

/// A privilege cannot be given up.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum PrivilegeError {
    /// A property of the process.
    #[error("cannot {what}")]
    Process {
        /// What was to be done.
        what: &'static str,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// A set of capabilities.
    #[error("cannot change the {set:?} set of capabilities")]
    Capabilities {
        /// The set.
        set: CapSet,
        /// What the system said.
        #[source]
        source: CapsError,
    },
}

/// How many threads this process has, this one included.
pub(crate) fn threads() -> usize {
    // Without /proc it is not known, and said to be one.
    std::fs::read_dir("/proc/self/task").map_or(1, Iterator::count)
}

/// No new privileges, no core dumps, and no other process of this user may look into this one.
pub(crate) fn hide() -> Result<(), PrivilegeError> {
    let failed = |what| {
        move |errno: Errno| PrivilegeError::Process {
            what,
            source: errno.into(),
        }
    };
    prctl::set_no_new_privs().map_err(failed("renounce new privileges"))?;
    prctl::set_dumpable(false).map_err(failed("hide from other processes"))?;
    setrlimit(Resource::RLIMIT_CORE, 0, 0).map_err(failed("switch core dumps off"))
}

/// Moves to namespaces of its own, as far as it has the right; says to which. The calling thread moves, and with it those that
/// it starts.
pub(crate) fn separate(network: bool) -> Vec<&'static str> {
    let wanted = [
        ("IPC", CloneFlags::CLONE_NEWIPC, true),
        ("UTS", CloneFlags::CLONE_NEWUTS, true),
        ("network", CloneFlags::CLONE_NEWNET, !network),
    ];
    wanted
        .into_iter()
        .filter(|&(_, _, wanted)| wanted)
        .filter(|&(name, flag, _)| match unshare(flag) {
            Ok(()) => true,
            Err(error) => {
                debug!("no {name} namespace of its own: {error}");
                false
            }
        })
        .map(|(name, ..)| name)
        .collect()
}

/// Drops all capabilities of the calling thread, and of those that it starts, but these; returns which of them it had.
pub(crate) fn drop_capabilities(keep: &[Capability]) -> Result<Vec<Capability>, PrivilegeError> {
    let failed = |set| move |source| PrivilegeError::Capabilities { set, source };
    let has = caps::read(None, CapSet::Permitted).map_err(failed(CapSet::Permitted))?;
    let kept: CapsHashSet = keep.iter().copied().filter(|c| has.contains(c)).collect();
    if caps::has_cap(None, CapSet::Effective, Capability::CAP_SETPCAP)
        .map_err(failed(CapSet::Effective))?
    {
        for capability in caps::runtime::thread_all_supported() {
            if !kept.contains(&capability) {
                caps::drop(None, CapSet::Bounding, capability).map_err(failed(CapSet::Bounding))?;
            }
        }
    }
    if caps::runtime::ambient_set_supported().is_ok() {
        caps::clear(None, CapSet::Ambient).map_err(failed(CapSet::Ambient))?;
    }
    let none = HashSet::new();
    for (set, value) in [
        (CapSet::Inheritable, &none),
        (CapSet::Effective, &kept),
        (CapSet::Permitted, &kept),
    ] {
        caps::set(None, set, value).map_err(failed(set))?;
    }
    let mut kept: Vec<Capability> = kept.into_iter().collect();
    kept.sort_by_key(Capability::index);
    Ok(kept)
}

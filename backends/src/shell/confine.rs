//! What a back-end keeps when it confines itself (`ringside_sandbox`): the shell's part of it. A device adds its own.

use std::path::Path;

use ringside_sandbox::{Profile, SandboxError, ThreadKind, calls, narrow};
use tracing::error;

use super::Chain;
use super::options::{Program, ShellArgs};

/// Gives up all rights but those that the shell needs with these options, and those that `needs` adds. The sockets are
/// there, and everything that the device works on.
///
/// # Errors
/// [`SandboxError`]
pub fn confine(
    program: &Program,
    args: &ShellArgs,
    needs: impl FnOnce(&mut Profile),
) -> Result<(), SandboxError> {
    let mut profile = Profile::new(program.name);
    profile
        .calls(calls::EVENTS)
        .calls(calls::SOCKETS)
        .calls(calls::FILES);
    if args.numa_node.is_some() {
        profile
            .calls(calls::OPENING)
            .read(Path::new("/sys/devices/system/node"));
    }
    if let Some(path) = &args.socket_path {
        if args.client {
            profile.calls(calls::CONNECTING).connect(path);
        } else {
            profile.remove(path);
        }
    }
    if let Some(path) = args.control_path() {
        profile.remove(path);
    }
    if args.take_over.is_some() {
        profile.calls(calls::TAKING_OVER);
    }
    needs(&mut profile);
    profile.enter(args.sandbox)
}

/// Does what a thread of this kind does, with no more than the rights of its kind.
pub(crate) fn confined(kind: ThreadKind, run: impl FnOnce()) {
    match narrow(kind) {
        Ok(()) => run(),
        // The shell sees that the thread is gone.
        Err(error) => error!("a thread ends before it begins: {}", Chain(&error)),
    }
}

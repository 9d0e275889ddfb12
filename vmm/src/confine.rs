//! The rights that the process keeps when it confines itself (`ringside_sandbox`). All threads have them, and so it opens the
//! files that are on its command line afterwards; those of a processor keep fewer.
//!
//! | with | it keeps |
//! | --- | --- |
//! | any guest | `/dev/kvm`; reading kernel and RAM disk; KVM's ioctls |
//! | a back-end | connecting to sockets in the directory of the back-end's |
//! | `--serial`, `--api-socket` | listening on sockets in their directories; writing to the file |
//! | `--snapshots` | creating and removing files in that folder, which it opens before |
//! | `--restore` | reading the snapshot, in place of kernel and RAM disk |
//! | `--incoming` | removing the socket, which is there before |
//! | `--migrate-to` | connecting to sockets in that directory, or to that port of TCP from the host's network |
//! | `--vfio`, or slots and a control socket | `/dev/vfio`, `/dev/iommu`, reading sysfs; VFIO's ioctls; CAP_IPC_LOCK |

use std::path::Path;

use ringside_sandbox::{Capability, Profile, SandboxError, ThreadKind, calls};

use crate::config::{Config, Origin, SerialTarget};
use crate::snapshot::transport::Address;

/// Gives up all rights but those that a machine of this configuration needs. To be called before there are other threads.
///
/// # Errors
/// [`SandboxError`]
pub fn confine(config: &Config) -> Result<(), SandboxError> {
    let mut profile = Profile::new("ringside-vmm");
    profile
        .calls(calls::EVENTS)
        .calls(calls::SOCKETS)
        .calls(calls::STREAMS)
        .calls(calls::FILES)
        .calls(calls::OPENING)
        .calls(calls::CONNECTING)
        .calls(calls::MACHINE)
        .thread(
            ThreadKind::Processor,
            &[
                calls::EVENTS,
                calls::STREAMS,
                calls::CONNECTING,
                calls::MACHINE,
            ],
        )
        .write(Path::new("/dev/kvm"));
    match &config.origin {
        Origin::Boot { kernel, initramfs } => {
            profile.read(kernel);
            if let Some(initramfs) = initramfs {
                profile.read(initramfs);
            }
        }
        Origin::Snapshot(path) => {
            profile.read(path);
        }
        // It listens before; the file is removed afterwards.
        Origin::Incoming(Address::Unix(path)) => {
            profile.remove(path);
        }
        Origin::Incoming(Address::Tcp(_)) => {}
    }
    for address in &config.migrate_to {
        match address {
            Address::Unix(path) => profile.connect(path),
            Address::Tcp(address) => profile.connect_tcp(address.port()).calls(calls::TCP),
        };
    }
    for device in &config.devices {
        profile.connect(&device.socket);
    }
    if let Some(path) = &config.api_socket {
        profile.calls(calls::LISTENING).listen(path);
    }
    if let Some(folder) = &config.snapshots {
        // Landlock knows folders: the name stands for all there.
        let any = folder.join(".snapshot");
        profile.calls(calls::SNAPSHOTS).create(&any).remove(&any);
    }
    match &config.serial {
        SerialTarget::File(path) => {
            profile.create(path);
        }
        SerialTarget::Socket(path) => {
            profile.calls(calls::LISTENING).listen(path);
        }
        SerialTarget::Stdio | SerialTarget::Null => {}
    }
    if !config.vfio.is_empty() || config.api_socket.is_some() && config.hotplug_ports > 0 {
        vfio(&mut profile);
    }
    profile.enter(config.sandbox)
}

fn vfio(profile: &mut Profile) {
    profile
        // Guest memory is pinned, beyond the usual limit.
        .capability(Capability::CAP_IPC_LOCK)
        .calls(calls::VFIO)
        .thread(ThreadKind::Processor, &[calls::VFIO])
        // A name that has a token in it.
        .scratch(&std::env::temp_dir())
        // Its own descriptors.
        .list(Path::new("/proc"));
    for path in ["/dev/vfio", "/dev/iommu"] {
        profile.write(Path::new(path));
    }
    for path in ["/sys/bus/pci", "/sys/devices", "/sys/kernel/iommu_groups"] {
        profile.read(Path::new(path));
    }
}

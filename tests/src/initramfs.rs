//! The initramfs images of the lab VM and of a test's guest: busybox, a few kernel modules and a start script.

use std::fs;
use std::path::Path;

use crate::cpio::Archive;
use crate::error::{Doing, Result};
use crate::setup::sorted_names;

/// Start script of the lab VM.
const L1_INIT: &str = include_str!("../recipe/l1-init.sh");
/// Start script of a guest.
const GUEST_INIT: &str = include_str!("../recipe/guest-init.sh");
/// What a guest runs commands with.
const GUEST_AGENT: &str = include_str!("../recipe/guest-agent.sh");

/// Writes the initramfs of the lab VM; `files` (name, content) are copied to its `/lab/bin` and `/lab/run`.
///
/// # Errors
/// Fails if a part cannot be read, or the image not written.
pub fn write_l1(root: &Path, files: &[(String, Vec<u8>)], image: &Path) -> Result<()> {
    let mut all = vec![("init", L1_INIT.as_bytes())];
    all.extend(files.iter().map(|(name, text)| (name.as_str(), &**text)));
    let directories = ["lab", "lab/bin", "lab/run"];
    write(root, "l1-modules", &directories, &all, image)
}

/// Writes the initramfs of a guest.
///
/// # Errors
/// As [`write_l1`].
pub fn write_guest(root: &Path, image: &Path) -> Result<()> {
    write(
        root,
        "guest-modules",
        &[],
        &[
            ("init", GUEST_INIT.as_bytes()),
            ("agent.sh", GUEST_AGENT.as_bytes()),
        ],
        image,
    )
}

fn write(
    root: &Path,
    modules: &str,
    directories: &[&str],
    files: &[(&str, &[u8])],
    image: &Path,
) -> Result<()> {
    let parts = root.join("opt/lab");
    let read = |path: &Path| fs::read(path).doing(|| format!("read {}", path.display()));
    let making = || format!("make {}", image.display());
    let mut archive = Archive::new(Vec::new());
    for directory in ["bin", "dev", "proc", "sys", "modules"]
        .iter()
        .chain(directories)
    {
        archive.directory(directory).doing(making)?;
    }
    for (name, content) in files {
        archive.file(name, content).doing(making)?;
    }
    archive
        .file("bin/busybox", &read(&parts.join("busybox"))?)
        .doing(making)?;
    let directory = parts.join(modules);
    for name in sorted_names(&directory)? {
        let module = read(&directory.join(&name))?;
        archive
            .file(&format!("modules/{name}"), &module)
            .doing(making)?;
    }
    let bytes = archive.finish().doing(making)?;
    fs::write(image, bytes).doing(|| format!("write {}", image.display()))
}

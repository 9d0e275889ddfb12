//! Builds the programs under test as static binaries, which run on the machine, in the lab VM and in an initramfs alike; and
//! one that is linked dynamically besides, for what is loaded at run time.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use crate::command;
use crate::error::{Doing, Result};

/// Target triple of the lab.
const TARGET: &str = "x86_64-unknown-linux-gnu";

/// Name of the `ringside-blk` that is linked dynamically, beside the static programs.
pub const DYNAMIC_BLK: &str = "ringside-blk-dynamic";

/// How long a build of everything may take on a slow machine.
pub const BUILD_LIMIT: Duration = Duration::from_secs(3600);

/// The workspace's directory.
#[must_use]
pub fn workspace() -> &'static Path {
    let tests = Path::new(env!("CARGO_MANIFEST_DIR"));
    tests.parent().unwrap_or(tests)
}

/// The cargo that runs this program, or the one in the path.
#[must_use]
pub fn cargo() -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(workspace());
    command
}

/// The programs of a directory, if one is given, or fresh builds.
///
/// # Errors
/// Fails if there is no such directory, or as [`build`] does.
pub fn given_or_built(directory: Option<&Path>) -> Result<PathBuf> {
    match directory {
        // Some of them are started elsewhere, where a relative path leads nowhere.
        Some(directory) => directory
            .canonicalize()
            .doing(|| format!("find {}", directory.display())),
        None => {
            eprintln!("lab: building the programs (static, release)");
            build()
        }
    }
}

/// Builds all programs; gives the directory they are in.
///
/// # Errors
/// Fails if the build fails; the compiler's messages are on the terminal then.
pub fn build() -> Result<PathBuf> {
    let target_directory = workspace().join("target").join("lab");
    let mut command = cargo();
    command
        .args([
            "build",
            "--release",
            "--locked",
            "--workspace",
            // Its feature opens the back-ends to it.
            "--exclude",
            "ringside-fuzz",
            "--bins",
            "--target",
            TARGET,
        ])
        .arg("--target-dir")
        .arg(&target_directory)
        .env("RUSTFLAGS", "-C target-feature=+crt-static")
        .env_remove("CARGO_ENCODED_RUSTFLAGS");
    command::succeed(&mut command, BUILD_LIMIT)?;
    let programs = target_directory.join(TARGET).join("release");
    build_dynamic(&target_directory, &programs)?;
    Ok(programs)
}

/// Not optimised, which takes less time.
fn build_dynamic(target_directory: &Path, programs: &Path) -> Result<()> {
    let mut command = cargo();
    command
        .args(["build", "--locked", "--package", "ringside-backends"])
        .args(["--bin", "ringside-blk", "--target-dir"])
        .arg(target_directory)
        .env("RUSTFLAGS", "")
        .env_remove("CARGO_ENCODED_RUSTFLAGS");
    command::succeed(&mut command, BUILD_LIMIT)?;
    let built = target_directory.join("debug").join("ringside-blk");
    let to = programs.join(DYNAMIC_BLK);
    std::fs::copy(&built, &to)
        .doing(|| format!("copy {} to {}", built.display(), to.display()))
        .map(drop)
}

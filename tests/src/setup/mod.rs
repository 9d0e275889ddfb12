//! Builds and checks the lab's systems in the user's cache: the Debian root that the lab VM runs on (with the QEMU that runs
//! the VM itself), as a directory and as a disk, and the disk of a test's guest.
//!
//! ```text
//! CACHE/system/          complete, or not there: it is built as CACHE/building and renamed
//!   stamp.json           the recipe it was built by, and what is compared on each start
//!   root/                Debian trixie; /opt/lab has what the two initramfs images are made of
//!   lab.ext4             the same as the lab VM's disk
//!   guest.ext4           Debian trixie for guests
//! CACHE/build.log        what the last build wrote
//! CACHE/run-PID/         files of one run of `cargo lab`
//! CACHE.lock             locked by all that use the systems, shared, and by what builds or removes them, alone
//! ```

mod mirror;
mod tree;

use std::fs::{self, File};
use std::io::{BufRead, BufReader, IsTerminal, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};
use nix::fcntl::{Flock, FlockArg};
use nix::unistd::geteuid;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::command;
use crate::error::{Doing, LabError, Result, last_lines};
use crate::site::{Effort, Place, Site};

pub use tree::remove_tree;

/// The recipe run inside the new root.
const ROOT_RECIPE: &str = include_str!("../../recipe/lab-root.sh");
/// Packages of the lab's root, from trixie itself.
const ROOT_PACKAGES: &str = "linux-image-amd64,busybox-static,ceph-common,ceph-mon,ceph-osd,\
    e2fsprogs,ethtool,fio,iperf3,iproute2,iptables,iputils-ping,kmod,libarchive13t64,linux-perf,\
    nbdkit,nvme-cli,pciutils,procps,strace,tcpdump,util-linux,valgrind,zstd";
/// Packages of a test's guest.
const GUEST_PACKAGES: &str = "e2fsprogs,ethtool,fio,iperf3,iproute2,iputils-ping,kmod,nvme-cli,\
    pciutils,procps,tcpdump,util-linux";
/// Kernel modules of the lab VM's initramfs.
const L1_MODULES: &str = "virtio_blk ext4 overlay";
/// Kernel modules of a guest's initramfs.
const GUEST_MODULES: &str =
    "virtio_blk virtio_net ext4 overlay nvme igbvf e1000e ahci sd_mod pvpanic-mmio";
/// Size of the lab VM's file system: twice what is in it.
const LAB_DISK_SIZE: &str = "2500M";
/// Size of the guest's file system: three times what is in it.
const GUEST_DISK_SIZE: &str = "700M";
/// To be raised when the code below builds something else from the same texts above.
const BUILD_REVISION: &str = "1";
/// How long one step of the build may take on a slow line.
const STEP_LIMIT: Duration = Duration::from_secs(1800);
/// How long a step that is told to end may take to clean up.
const CLEAN_UP_LIMIT: Duration = Duration::from_secs(30);
/// A file up to this size is hashed whole on each start, a larger one in samples.
const WHOLE_SIZE: u64 = 32 << 20;
/// Size of a sample.
const SAMPLE_SIZE: u64 = 64 << 10;
/// Distance of samples.
const SAMPLE_DISTANCE: u64 = 8 << 20;
/// Disk space that a build needs while it runs.
const SPACE_NEEDED_MIB: u64 = 4500;

/// How the user wants setup to go about it.
#[derive(Debug, Clone, Default)]
pub struct Wishes {
    /// Do not ask before installing packages and downloading.
    pub yes: bool,
    /// Mirror to use in place of apt's.
    pub mirror: Option<String>,
}

/// The lab's place in the user's cache directory, whatever is there.
#[derive(Debug)]
pub struct Cache {
    directory: PathBuf,
}

/// The lab's systems, whole. Nobody rebuilds or removes them while this lives.
#[derive(Debug)]
pub struct Systems {
    directory: PathBuf,
    _lock: Flock<File>,
}

/// One file of the finished system, for the check on each start.
#[derive(Debug, Serialize, Deserialize)]
struct Checked {
    path: PathBuf,
    size: u64,
    /// Of the content, or of samples of it.
    sha256: String,
}

/// What a finished system says about itself.
#[derive(Debug, Serialize, Deserialize)]
struct Stamp {
    recipe: String,
    /// Hash over what is in the root: names, kinds, sizes.
    listing: String,
    /// What the lab cannot start without.
    files: Vec<Checked>,
}

/// What a lock is taken for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Access {
    /// To use the systems beside others.
    Use,
    /// To build or remove them, alone.
    Change,
}

impl Cache {
    /// Finds the place: `$XDG_CACHE_HOME/ringside/lab`, or `~/.cache/ringside/lab`.
    ///
    /// # Errors
    /// Fails if there is no home directory.
    pub fn find() -> Result<Self> {
        let base = std::env::var_os("XDG_CACHE_HOME")
            .map(PathBuf::from)
            .filter(|path| path.is_absolute())
            .or_else(|| std::env::var_os("HOME").map(|home| Path::new(&home).join(".cache")))
            .ok_or_else(|| {
                LabError::Setup("set HOME or XDG_CACHE_HOME: no cache directory".into())
            })?;
        Ok(Self::below(&base))
    }

    fn below(base: &Path) -> Self {
        Self {
            directory: base.join("ringside").join("lab"),
        }
    }

    /// The directory.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.directory
    }

    fn system(&self) -> PathBuf {
        self.directory.join("system")
    }

    /// Removes all of it, once nothing uses it any more.
    ///
    /// # Errors
    /// Fails if something is mounted in it, or a file cannot be removed.
    pub fn remove(self) -> Result<()> {
        let _lock = self.lock(Access::Change)?;
        remove_tree(&self.directory)?;
        // Whoever waits for the lock sees that it is another file by then, and takes that.
        let lock = self.lock_path();
        fs::remove_file(&lock).doing(|| format!("remove {}", lock.display()))?;
        if let Some(parent) = self.directory.parent() {
            // It stays if something else is in it.
            let _ = fs::remove_dir(parent);
        }
        Ok(())
    }

    fn lock_path(&self) -> PathBuf {
        self.directory.with_extension("lock")
    }

    /// Takes the lock, and says so if that takes a while.
    fn lock(&self, access: Access) -> Result<Flock<File>> {
        let path = self.lock_path();
        let doing = || format!("lock {}", path.display());
        let (now, later) = match access {
            Access::Use => (FlockArg::LockSharedNonblock, FlockArg::LockShared),
            Access::Change => (FlockArg::LockExclusiveNonblock, FlockArg::LockExclusive),
        };
        loop {
            if let Some(parent) = path.parent() {
                fs::create_dir_all(parent).doing(|| format!("create {}", parent.display()))?;
            }
            let mut options = File::options();
            let file = match options.read(true).write(true).create(true).open(&path) {
                Ok(file) => file,
                // The directory was removed in this moment.
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
                Err(error) => return Err(error).doing(doing),
            };
            let lock = match Flock::lock(file, now) {
                Ok(lock) => lock,
                Err((file, nix::errno::Errno::EWOULDBLOCK)) => {
                    eprintln!("lab: {}", self.why_waiting(access));
                    Flock::lock(file, later)
                        .map_err(|(_, errno)| errno)
                        .doing(doing)?
                }
                Err((_, errno)) => return Err(errno).doing(doing),
            };
            // Only who has locked the file alone removes it: one that is still there now stays.
            let locked = lock.metadata().doing(doing)?;
            if fs::metadata(&path)
                .is_ok_and(|there| (there.dev(), there.ino()) == (locked.dev(), locked.ino()))
            {
                return Ok(lock);
            }
        }
    }

    fn why_waiting(&self, access: Access) -> String {
        let runs: Vec<String> = sorted_names(&self.directory)
            .unwrap_or_default()
            .iter()
            .filter_map(|name| name.strip_prefix("run-"))
            .filter(|pid| Path::new("/proc").join(pid).exists())
            .map(str::to_owned)
            .collect();
        match access {
            Access::Change if !runs.is_empty() => format!(
                "waiting until no other `cargo lab` uses the lab (process {})",
                runs.join(", ")
            ),
            Access::Change => "waiting until no other `cargo lab` uses the lab".into(),
            Access::Use => "waiting for another `cargo lab` to set the lab up or remove it".into(),
        }
    }

    /// Makes sure that the systems are there, whole and built by the present recipe, and that they stay.
    ///
    /// # Errors
    /// Fails, with what to do, if they cannot be built.
    pub fn ensure(self, wishes: &Wishes) -> Result<Systems> {
        loop {
            let lock = self.lock(Access::Use)?;
            self.create()?;
            remove_stale_runs(&self.directory);
            let Err(why) = check(&self.system()) else {
                return Ok(Systems {
                    directory: self.directory,
                    _lock: lock,
                });
            };
            drop(lock);
            let _lock = self.lock(Access::Change)?;
            self.create()?;
            // Another may have built them in between.
            if check(&self.system()).is_err() {
                eprintln!("lab: its systems have to be built: {why}");
                self.build(wishes)?;
            }
        }
    }

    fn create(&self) -> Result<()> {
        fs::create_dir_all(&self.directory).doing(|| format!("create {}", self.directory.display()))
    }

    /// Builds the systems; the lock is held for it.
    fn build(&self, wishes: &Wishes) -> Result<()> {
        let missing = missing_tools();
        can_install(&missing, geteuid().is_root(), in_path("apt-get"))?;
        let system = self.system();
        let building = self.directory.join("building");
        // Better now than when the new one is finished.
        tree::refuse_mounts(&system)?;
        tree::refuse_mounts(&building)?;
        let mirror = mirror::find(wishes.mirror.as_deref())?;
        announce(&self.directory, &missing, wishes)?;
        install(&missing)?;
        remove_tree(&building)?;
        fs::create_dir_all(&building).doing(|| format!("create {}", building.display()))?;
        // Programs inside the chroot run under other user ids than this process.
        fs::set_permissions(&building, fs::Permissions::from_mode(0o755))
            .doing(|| format!("open {} to all", building.display()))?;
        let result = Build {
            directory: &building,
            log: self.directory.join("build.log"),
            mirror,
        }
        .everything();
        if let Err(error) = result {
            // The half-built system is of no use; the log stays.
            let _ = remove_tree(&building);
            return Err(error);
        }
        remove_tree(&system)?;
        fs::rename(&building, &system)
            .doing(|| format!("move the finished system to {}", system.display()))?;
        check(&system).map_err(|why| LabError::Setup(format!("the new lab is unusable: {why}")))
    }
}

impl Systems {
    /// The directory they are in, with the files of each run.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.directory
    }

    /// The Debian root of the lab VM.
    #[must_use]
    pub fn root(&self) -> PathBuf {
        self.directory.join("system").join("root")
    }

    /// The same root as the disk of the lab VM.
    #[must_use]
    pub fn lab_disk(&self) -> PathBuf {
        self.directory.join("system").join("lab.ext4")
    }

    /// The disk of a guest.
    #[must_use]
    pub fn guest_disk(&self) -> PathBuf {
        self.directory.join("system").join("guest.ext4")
    }

    /// The site of guests on this machine's own KVM.
    #[must_use]
    pub fn host_site(&self, programs: &Path, run: &Path) -> Site {
        Site {
            place: Place::Host,
            root: self.root(),
            programs: programs.to_owned(),
            initramfs: run.join("guest.cpio"),
            guest_disk: self.guest_disk(),
            scratch: run.join("scratch"),
            block_device: None,
            effort: Effort::default(),
        }
    }
}

/// Hash of everything that a finished system depends on.
fn recipe_hash() -> String {
    let mut hash = Sha256::new();
    for part in [
        ROOT_RECIPE,
        ROOT_PACKAGES,
        GUEST_PACKAGES,
        L1_MODULES,
        GUEST_MODULES,
        LAB_DISK_SIZE,
        GUEST_DISK_SIZE,
        BUILD_REVISION,
    ] {
        hash.update(part);
        hash.update([0]);
    }
    hex(&hash.finalize())
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Hash of the content of a file of this size, or of samples of a large one.
fn sha256_of(path: &Path, size: u64) -> Result<String> {
    let reading = || format!("read {}", path.display());
    let file = File::open(path).doing(reading)?;
    let mut hash = Sha256::new();
    let mut buffer = Vec::new();
    for (start, length) in samples(size) {
        buffer.resize(usize::try_from(length).unwrap_or(usize::MAX), 0);
        file.read_exact_at(&mut buffer, start).doing(reading)?;
        hash.update(&buffer);
    }
    Ok(hex(&hash.finalize()))
}

/// The parts (start, length) of a file of this size that are hashed.
fn samples(size: u64) -> Vec<(u64, u64)> {
    let (distance, length) = if size <= WHOLE_SIZE {
        (SAMPLE_DISTANCE, SAMPLE_DISTANCE)
    } else {
        (SAMPLE_DISTANCE, SAMPLE_SIZE)
    };
    let mut parts = Vec::new();
    let mut start = 0;
    while start < size {
        parts.push((start, length.min(size - start)));
        start += distance;
    }
    parts
}

/// Hash over all in a directory, as far as that is known without reading files: names, kinds, permissions, sizes and the
/// targets of links.
fn listing_of(directory: &Path) -> Result<String> {
    let mut hash = Sha256::new();
    list(directory, &mut hash)?;
    Ok(hex(&hash.finalize()))
}

fn list(directory: &Path, hash: &mut Sha256) -> Result<()> {
    let reading = || format!("read the directory {}", directory.display());
    let mut entries = fs::read_dir(directory)
        .doing(reading)?
        .collect::<Result<Vec<_>, _>>()
        .doing(reading)?;
    entries.sort_by_key(fs::DirEntry::file_name);
    for entry in entries {
        let metadata = entry.metadata().doing(reading)?;
        hash.update(entry.file_name().as_bytes());
        hash.update([0]);
        hash.update(metadata.mode().to_le_bytes());
        if metadata.is_dir() {
            list(&entry.path(), hash)?;
        } else {
            // That of a link is the length of its target.
            hash.update(metadata.len().to_le_bytes());
        }
        if metadata.is_symlink() {
            let target = fs::read_link(entry.path()).doing(reading)?;
            hash.update(target.as_os_str().as_bytes());
        }
    }
    // The end of a directory, which no name is.
    hash.update([0]);
    Ok(())
}

/// Compares a system with its stamp; the error says what is wrong with it.
fn check(system: &Path) -> Result<(), String> {
    let text = fs::read_to_string(system.join("stamp.json"))
        .map_err(|_| format!("there is no complete system in {}", system.display()))?;
    let stamp: Stamp = serde_json::from_str(&text)
        .map_err(|error| format!("their stamp is broken, or of another version: {error}"))?;
    if stamp.recipe != recipe_hash() {
        return Err("the recipe has changed since they were built".into());
    }
    let root = system.join("root");
    if listing_of(&root).map_err(|error| error.to_string())? != stamp.listing {
        return Err(format!("what is in {} has changed", root.display()));
    }
    for file in &stamp.files {
        let path = system.join(&file.path);
        let size = fs::metadata(&path)
            .map_err(|error| format!("{}: {error}", path.display()))?
            .len();
        if size != file.size {
            return Err(format!("{} has changed its size", path.display()));
        }
        if sha256_of(&path, size).map_err(|error| error.to_string())? != file.sha256 {
            return Err(format!("{} has changed", path.display()));
        }
    }
    Ok(())
}

/// Says what is going to happen, and asks unless told not to.
fn announce(directory: &Path, missing: &[&str], wishes: &Wishes) -> Result<()> {
    eprintln!("lab: this will, once:");
    if !missing.is_empty() {
        eprintln!(
            "  - install these Debian packages on this machine: {}",
            missing.join(" ")
        );
    }
    eprintln!("  - download about 400 MB of Debian packages");
    eprintln!(
        "  - build two Debian systems in {} (2.4 GB; `cargo lab clean` removes them)",
        directory.display()
    );
    eprintln!("It takes two to five minutes.");
    let space = nix::sys::statvfs::statvfs(directory)
        .doing(|| format!("ask for the free space of {}", directory.display()))?;
    let free_mib = space
        .blocks_available()
        .saturating_mul(space.fragment_size())
        >> 20;
    if free_mib < SPACE_NEEDED_MIB {
        return Err(LabError::Setup(format!(
            "{} has {free_mib} MiB free; building the lab needs {SPACE_NEEDED_MIB} MiB",
            directory.display()
        )));
    }
    if wishes.yes {
        return Ok(());
    }
    if !std::io::stdin().is_terminal() {
        return Err(LabError::Setup(
            "there is no terminal to ask on: give --yes to agree to this".into(),
        ));
    }
    eprint!("Go on? [Y/n] ");
    let mut answer = String::new();
    std::io::stdin()
        .lock()
        .read_line(&mut answer)
        .doing(|| "read the answer".into())?;
    match answer.trim().to_lowercase().as_str() {
        "" | "y" | "yes" => Ok(()),
        _ => Err(LabError::Setup("nothing was changed".into())),
    }
}

fn in_path(program: &str) -> bool {
    std::env::var_os("PATH")
        .is_some_and(|path| std::env::split_paths(&path).any(|dir| dir.join(program).is_file()))
}

/// Debian packages with the tools that a build needs and this machine lacks.
fn missing_tools() -> Vec<&'static str> {
    let mut missing = Vec::new();
    if !in_path("mmdebstrap") {
        missing.push("mmdebstrap");
    }
    if !Path::new("/usr/share/keyrings/debian-archive-keyring.gpg").exists() {
        missing.push("debian-archive-keyring");
    }
    if !geteuid().is_root() && !in_path("newuidmap") {
        missing.push("uidmap");
    }
    missing
}

/// Says how to install the missing tools, if this process cannot.
fn can_install(missing: &[&str], root: bool, apt: bool) -> Result<()> {
    let packages = missing.join(" ");
    if missing.is_empty() || (root && apt) {
        return Ok(());
    }
    Err(LabError::Setup(if apt {
        format!(
            "this machine lacks these Debian packages, and installing them needs root: {packages}; \
             run `sudo apt-get install {packages}`, then this again"
        )
    } else {
        format!("this machine has no apt-get; install these programs by its own means: {packages}")
    }))
}

/// Installs the missing tools.
fn install(missing: &[&str]) -> Result<()> {
    if missing.is_empty() {
        return Ok(());
    }
    let packages = missing.join(" ");
    eprintln!("lab: installing {packages}");
    let install = |update: bool| {
        let mut command = Command::new("apt-get");
        command.env("DEBIAN_FRONTEND", "noninteractive");
        if update {
            command.arg("update");
        } else {
            command
                .args(["install", "-y", "--no-install-recommends"])
                .args(missing);
        }
        command::run(&mut command, STEP_LIMIT)
    };
    // The package lists may be absent or old; most often they are not.
    if install(false).is_err() {
        install(true)?;
        install(false)?;
    }
    Ok(())
}

/// One build of the system.
struct Build<'a> {
    directory: &'a Path,
    log: PathBuf,
    mirror: String,
}

impl Build<'_> {
    fn everything(&self) -> Result<()> {
        File::create(&self.log).doing(|| format!("create {}", self.log.display()))?;
        let recipe = self.directory.join("lab-root.sh");
        fs::write(&recipe, ROOT_RECIPE).doing(|| format!("write {}", recipe.display()))?;
        let root_tar = self.directory.join("root.tar");
        let root = self.directory.join("root");
        self.step(
            "lab root",
            self.mmdebstrap(
                ROOT_PACKAGES,
                &root_tar,
                &["trixie", "trixie-backports"],
                &[
                    format!(
                        "upload {} /tmp/lab-root.sh",
                        command::quoted(&recipe.display().to_string())
                    ),
                    format!("chroot \"$1\" sh /tmp/lab-root.sh '{L1_MODULES}' '{GUEST_MODULES}'"),
                    "rm \"$1/tmp/lab-root.sh\"".into(),
                ],
            ),
        )?;
        fs::create_dir(&root).doing(|| format!("create {}", root.display()))?;
        let mut unpack = Command::new("tar");
        unpack
            .args(["-x", "--no-same-owner", "--exclude=./dev/*", "-C"])
            .arg(&root);
        unpack.arg("-f").arg(&root_tar);
        self.step("unpack it", unpack)?;
        let guest_tar = self.directory.join("guest.tar");
        self.step(
            "guest root",
            self.mmdebstrap(GUEST_PACKAGES, &guest_tar, &["trixie"], &[]),
        )?;
        for (name, tar, size) in [
            ("lab", &root_tar, LAB_DISK_SIZE),
            ("guest", &guest_tar, GUEST_DISK_SIZE),
        ] {
            let mut mke2fs = self.unpacked_site().root_program("usr/sbin/mke2fs");
            mke2fs
                .args(["-q", "-t", "ext4", "-L", name, "-d"])
                .arg(tar)
                .arg(self.directory.join(format!("{name}.ext4")))
                .arg(size);
            self.step(&format!("{name} disk"), mke2fs)?;
        }
        for file in [root_tar, guest_tar, recipe] {
            fs::remove_file(&file).doing(|| format!("remove {}", file.display()))?;
        }
        self.stamp()
    }

    fn unpacked_site(&self) -> Site {
        Site {
            root: self.directory.join("root"),
            ..Site::inside_lab()
        }
    }

    /// The command that makes a tar archive of a Debian system.
    fn mmdebstrap(&self, packages: &str, tar: &Path, suites: &[&str], hooks: &[String]) -> Command {
        let mut command = Command::new("mmdebstrap");
        command.args([
            "--variant=minbase",
            "--format=tar",
            if geteuid().is_root() {
                "--mode=root"
            } else {
                "--mode=unshare"
            },
            // A mirror may be a snapshot, whose Release files are past their date. Signatures are checked as always.
            "--aptopt=Acquire::Check-Valid-Until \"false\"",
            "--aptopt=Acquire::Check-Date \"false\"",
            "--aptopt=Acquire::Retries \"3\"",
            "--dpkgopt=path-exclude=/usr/share/doc/*",
            "--dpkgopt=path-exclude=/usr/share/man/*",
            "--dpkgopt=path-exclude=/usr/share/locale/*",
        ]);
        command.args(mirror::proxy_options());
        command.arg(format!("--include={packages}"));
        command.args(hooks.iter().map(|hook| format!("--customize-hook={hook}")));
        command.arg("trixie").arg(tar);
        command.args(
            suites
                .iter()
                .map(|suite| format!("deb {} {suite} main", self.mirror)),
        );
        // What apt and dpkg say must not depend on the user's language.
        command
            .env("LC_ALL", "C.UTF-8")
            .env("DEBIAN_FRONTEND", "noninteractive");
        command
    }

    /// Runs one step: its output goes to the log, its last line to the terminal.
    fn step(&self, name: &str, mut command: Command) -> Result<()> {
        let mut log = File::options()
            .append(true)
            .open(&self.log)
            .doing(|| format!("open {}", self.log.display()))?;
        let name = name.to_owned();
        let bar = ProgressBar::new_spinner();
        if let Ok(style) =
            ProgressStyle::with_template("lab: {prefix} {spinner} {elapsed:>4}  {wide_msg:.dim}")
        {
            bar.set_style(style);
        }
        bar.set_prefix(name.clone());
        bar.enable_steady_tick(Duration::from_millis(120));
        if bar.is_hidden() {
            eprintln!("lab: {name}");
        }
        let line = command::describe(&command);
        writeln!(log, "# {line}").doing(|| format!("write {}", self.log.display()))?;
        let (reader, writer) = std::io::pipe().doing(|| "make a pipe".into())?;
        let to_stderr = writer.try_clone().doing(|| "make a pipe".into())?;
        let mut child = command
            .stdin(Stdio::null())
            .stdout(writer)
            .stderr(to_stderr)
            .spawn()
            .doing(|| format!("run `{line}`"))?;
        // The command holds the pipe's other ends, which would keep the reader from its end.
        drop(command);
        let progress = bar.clone();
        let reader = std::thread::spawn(move || {
            let mut reader = BufReader::new(reader);
            let mut bytes = Vec::new();
            while matches!(reader.read_until(b'\n', &mut bytes), Ok(1..)) {
                let text = String::from_utf8_lossy(&bytes);
                // A progress line rewrites itself; its last state is the one to show.
                let shown = text.trim_end().rsplit('\r').next().unwrap_or_default();
                progress.set_message(
                    shown
                        .chars()
                        .filter(|c| !c.is_control())
                        .collect::<String>(),
                );
                // The log is a help only; a full disk shows in the step itself.
                let _ = log.write_all(&bytes);
                bytes.clear();
            }
        });
        let status = command::wait_for(&mut child, STEP_LIMIT)?;
        if status.is_none() {
            // mmdebstrap removes its temporary files when what it runs ends.
            command::end_tree(&mut child, CLEAN_UP_LIMIT);
        } else {
            let _ = reader.join();
        }
        bar.finish_and_clear();
        let text = || fs::read_to_string(&self.log).unwrap_or_default();
        match status {
            Some(status) if status.success() => {
                if !bar.is_hidden() {
                    eprintln!("lab: {name} done in {} s", bar.elapsed().as_secs());
                }
                Ok(())
            }
            Some(status) => Err(LabError::Setup(format!(
                "`{}` ended with {status}; all it wrote is in {}, the end of it:\n    {}",
                line.split(' ').next().unwrap_or_default(),
                self.log.display(),
                last_lines(&text(), 25).join("\n    ")
            ))),
            None => Err(LabError::TimedOut {
                what: format!("the end of `{line}`"),
                limit: STEP_LIMIT,
                output: text(),
            }),
        }
    }

    /// Writes what the check on each start compares with. Written last: a system with a stamp is complete.
    fn stamp(&self) -> Result<()> {
        let checked = |path: &str| -> Result<Checked> {
            let full = self.directory.join(path);
            let size = fs::metadata(&full)
                .doing(|| format!("find {}", full.display()))?
                .len();
            Ok(Checked {
                path: path.into(),
                size,
                sha256: sha256_of(&full, size)?,
            })
        };
        let mut files = Vec::new();
        for path in [
            "root/opt/lab/vmlinuz",
            "root/opt/lab/vmlinux",
            "root/opt/lab/busybox",
            "root/usr/bin/qemu-system-x86_64",
            "root/opt/qemu-10/usr/bin/qemu-system-x86_64",
            "root/lib64/ld-linux-x86-64.so.2",
            "lab.ext4",
            "guest.ext4",
        ] {
            files.push(checked(path)?);
        }
        for directory in ["root/opt/lab/l1-modules", "root/opt/lab/guest-modules"] {
            for name in sorted_names(&self.directory.join(directory))? {
                files.push(checked(&format!("{directory}/{name}"))?);
            }
        }
        let stamp = Stamp {
            recipe: recipe_hash(),
            listing: listing_of(&self.directory.join("root"))?,
            files,
        };
        let path = self.directory.join("stamp.json");
        let text = serde_json::to_string_pretty(&stamp)
            .map_err(std::io::Error::from)
            .doing(|| "write the stamp".into())?;
        fs::write(&path, text).doing(|| format!("write {}", path.display()))
    }
}

/// Names in a directory, in order.
///
/// # Errors
/// Fails if it cannot be read.
pub fn sorted_names(directory: &Path) -> Result<Vec<String>> {
    let entries =
        fs::read_dir(directory).doing(|| format!("read the directory {}", directory.display()))?;
    let mut names = Vec::new();
    for entry in entries {
        let entry = entry.doing(|| format!("read the directory {}", directory.display()))?;
        names.push(entry.file_name().to_string_lossy().into_owned());
    }
    names.sort();
    Ok(names)
}

/// Removes what runs that ended without cleaning up have left: those whose process is gone.
fn remove_stale_runs(directory: &Path) {
    for name in sorted_names(directory).unwrap_or_default() {
        if let Some(pid) = name.strip_prefix("run-")
            && !Path::new("/proc").join(pid).exists()
        {
            // A leftover that cannot be removed harms nobody.
            let _ = remove_tree(&directory.join(name));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn system_with(content: &str) -> tempfile::TempDir {
        let directory = tempfile::tempdir().unwrap();
        let root = directory.path().join("root");
        fs::create_dir_all(root.join("etc/empty")).unwrap();
        fs::write(root.join("etc/b"), "b").unwrap();
        std::os::unix::fs::symlink("b", root.join("etc/link")).unwrap();
        fs::write(directory.path().join("a"), content).unwrap();
        let stamp = Stamp {
            recipe: recipe_hash(),
            listing: listing_of(&root).unwrap(),
            files: vec![Checked {
                path: "a".into(),
                size: 3,
                sha256: sha256_of(&directory.path().join("a"), 3).unwrap(),
            }],
        };
        let text = serde_json::to_string(&stamp).unwrap();
        fs::write(directory.path().join("stamp.json"), text).unwrap();
        directory
    }

    #[test]
    fn whole_system_passes_the_check() {
        assert_eq!(check(system_with("abc").path()), Ok(()));
    }

    #[test]
    fn broken_systems_fail_the_check() {
        let system = system_with("abc");
        fs::write(system.path().join("a"), "abd").unwrap();
        assert!(check(system.path()).unwrap_err().contains("has changed"));
        fs::write(system.path().join("a"), "abcd").unwrap();
        assert!(check(system.path()).unwrap_err().contains("size"));
        fs::remove_file(system.path().join("a")).unwrap();
        assert!(check(system.path()).is_err());
        fs::remove_file(system.path().join("stamp.json")).unwrap();
        assert!(
            check(system.path())
                .unwrap_err()
                .contains("no complete system")
        );
    }

    #[test]
    fn damage_anywhere_in_the_root_fails_the_check() {
        let damages: [fn(&Path); 6] = [
            |root| fs::write(root.join("etc/b"), "").unwrap(),
            |root| fs::write(root.join("etc/c"), "").unwrap(),
            |root| fs::remove_file(root.join("etc/link")).unwrap(),
            |root| fs::rename(root.join("etc/empty"), root.join("empty")).unwrap(),
            |root| {
                let file = root.join("etc/b");
                fs::set_permissions(file, fs::Permissions::from_mode(0o400)).unwrap();
            },
            |root| fs::remove_dir_all(root).unwrap(),
        ];
        for damage in damages {
            let system = system_with("abc");
            damage(&system.path().join("root"));
            assert!(check(system.path()).unwrap_err().contains("root"));
        }
    }

    #[test]
    fn broken_stamp_fails_the_check() {
        let system = system_with("abc");
        fs::write(system.path().join("stamp.json"), "{}").unwrap();
        assert!(check(system.path()).unwrap_err().contains("stamp"));
    }

    #[test]
    fn large_files_are_sampled() {
        assert_eq!(samples(0), []);
        assert_eq!(samples(5), [(0, 5)]);
        let whole: u64 = samples(WHOLE_SIZE).iter().map(|(_, length)| length).sum();
        assert_eq!(whole, WHOLE_SIZE);
        let large = samples(WHOLE_SIZE + 7);
        assert_eq!(large.first(), Some(&(0, SAMPLE_SIZE)));
        assert_eq!(large.last(), Some(&(WHOLE_SIZE, 7)));
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(WHOLE_SIZE + 7).unwrap();
        let before = sha256_of(file.path(), WHOLE_SIZE + 7).unwrap();
        file.as_file().write_all_at(b"x", SAMPLE_DISTANCE).unwrap();
        assert_ne!(before, sha256_of(file.path(), WHOLE_SIZE + 7).unwrap());
    }

    #[test]
    fn those_who_use_the_lab_keep_others_from_changing_it() {
        let base = tempfile::tempdir().unwrap();
        let cache = Cache::below(base.path());
        let first = cache.lock(Access::Use).unwrap();
        let second = cache.lock(Access::Use).unwrap();
        let file = File::open(cache.lock_path()).unwrap();
        let (file, errno) = Flock::lock(file, FlockArg::LockExclusiveNonblock).unwrap_err();
        assert_eq!(errno, nix::errno::Errno::EWOULDBLOCK);
        drop((first, second));
        assert!(Flock::lock(file, FlockArg::LockExclusiveNonblock).is_ok());
    }

    #[test]
    fn lock_that_was_removed_while_it_was_waited_for_is_taken_anew() {
        let base = tempfile::tempdir().unwrap();
        let holder = Cache::below(base.path());
        let held = holder.lock(Access::Change).unwrap();
        let waiting = Cache::below(base.path());
        let waiter = std::thread::spawn(move || waiting.lock(Access::Use).unwrap());
        // If it has not come to wait yet it finds another file right away.
        std::thread::sleep(Duration::from_millis(100));
        fs::remove_file(holder.lock_path()).unwrap();
        fs::remove_dir(base.path().join("ringside")).unwrap();
        drop(held);
        let taken = waiter.join().unwrap();
        let there = fs::metadata(holder.lock_path()).unwrap();
        assert_eq!(taken.metadata().unwrap().ino(), there.ino());
    }

    #[test]
    fn removing_leaves_nothing_but_what_is_not_the_labs() {
        let base = tempfile::tempdir().unwrap();
        Cache::below(base.path()).create().unwrap();
        Cache::below(base.path()).remove().unwrap();
        assert!(!base.path().join("ringside").exists());
        let cache = Cache::below(base.path());
        cache.create().unwrap();
        fs::write(base.path().join("ringside/other"), "").unwrap();
        cache.remove().unwrap();
        assert_eq!(
            sorted_names(&base.path().join("ringside")).unwrap(),
            ["other"]
        );
    }

    #[test]
    fn tools_that_cannot_be_installed_are_named() {
        assert!(can_install(&[], false, false).is_ok());
        assert!(can_install(&["uidmap"], true, true).is_ok());
        for apt in [true, false] {
            let error = can_install(&["uidmap"], false, apt).unwrap_err();
            assert!(error.to_string().contains("uidmap"), "{error}");
        }
    }

    #[test]
    fn recipe_change_fails_the_check() {
        let system = system_with("abc");
        let path = system.path().join("stamp.json");
        let text = fs::read_to_string(&path)
            .unwrap()
            .replace(&recipe_hash(), "other");
        fs::write(&path, text).unwrap();
        assert!(check(system.path()).unwrap_err().contains("recipe"));
    }

    #[test]
    fn runs_of_dead_processes_are_removed() {
        let directory = tempfile::tempdir().unwrap();
        let mine = directory.path().join(format!("run-{}", std::process::id()));
        // Process ids end at 2^22 on Linux.
        let stale = directory.path().join("run-99999999");
        fs::create_dir(&mine).unwrap();
        fs::create_dir(&stale).unwrap();
        remove_stale_runs(directory.path());
        assert!(mine.exists() && !stale.exists());
    }
}

//! Builds and checks the lab's systems in the user's cache: the Debian root that the lab VM runs on (with the QEMU that runs
//! the VM itself) and the disk of a test's guest.
//!
//! ```text
//! CACHE/system/          complete, or not there: it is built as CACHE/building and renamed
//!   stamp.json           the recipe it was built by, and the files that are checked on each start
//!   root/                Debian trixie; /opt/lab has what the two initramfs images are made of
//!   guest.ext4           Debian trixie for guests
//! CACHE/build.log        what the last build wrote
//! CACHE/run-PID/         files of one run of `cargo lab`
//! ```

mod mirror;

use std::fs::{self, File};
use std::io::{BufRead, BufReader, IsTerminal, Read, Write};
use std::os::unix::fs::PermissionsExt;
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
use crate::site::{Place, Site};

/// The recipe run inside the new root.
const ROOT_RECIPE: &str = include_str!("../../recipe/lab-root.sh");
/// Packages of the lab's root, from trixie itself.
const ROOT_PACKAGES: &str = "linux-image-amd64,busybox-static,e2fsprogs,ethtool,fio,iperf3,\
    iproute2,iptables,iputils-ping,kmod,libarchive13t64,linux-perf,nvme-cli,pciutils,procps,\
    strace,tcpdump,util-linux,zstd";
/// Packages of a test's guest.
const GUEST_PACKAGES: &str = "e2fsprogs,ethtool,fio,iperf3,iproute2,iputils-ping,kmod,nvme-cli,\
    pciutils,procps,tcpdump,util-linux";
/// Kernel modules of the lab VM's initramfs.
const L1_MODULES: &str = "virtio_blk 9p 9pnet_virtio overlay";
/// Kernel modules of a guest's initramfs.
const GUEST_MODULES: &str = "virtio_blk virtio_net ext4 overlay nvme igbvf pvpanic-mmio";
/// Size of the guest's file system: three times what is in it.
const GUEST_DISK_SIZE: &str = "700M";
/// To be raised when the code below builds something else from the same texts above.
const BUILD_REVISION: &str = "1";
/// How long one step of the build may take on a slow line.
const STEP_LIMIT: Duration = Duration::from_secs(1800);
/// Disk space that a build needs while it runs.
const SPACE_NEEDED_MIB: u64 = 3000;

/// How the user wants setup to go about it.
#[derive(Debug, Clone, Default)]
pub struct Wishes {
    /// Do not ask before installing packages and downloading.
    pub yes: bool,
    /// Mirror to use in place of apt's.
    pub mirror: Option<String>,
}

/// The lab's cache directory, locked against a second setup while this is held for building.
#[derive(Debug)]
pub struct Cache {
    directory: PathBuf,
}

/// One file of the finished system, for the check on each start.
#[derive(Debug, Serialize, Deserialize)]
struct Checked {
    path: PathBuf,
    size: u64,
    /// Absent for files too large to read on each start.
    sha256: Option<String>,
}

/// What a finished system says about itself.
#[derive(Debug, Serialize, Deserialize)]
struct Stamp {
    recipe: String,
    files: Vec<Checked>,
}

impl Cache {
    /// Finds (and creates) the cache directory: `$XDG_CACHE_HOME/ringside`, or `~/.cache/ringside`.
    ///
    /// # Errors
    /// Fails if there is no home directory, or it cannot be written.
    pub fn open() -> Result<Self> {
        let base = std::env::var_os("XDG_CACHE_HOME")
            .map(PathBuf::from)
            .filter(|path| path.is_absolute())
            .or_else(|| std::env::var_os("HOME").map(|home| Path::new(&home).join(".cache")))
            .ok_or_else(|| {
                LabError::Setup("set HOME or XDG_CACHE_HOME: no cache directory".into())
            })?;
        let directory = base.join("ringside").join("lab");
        fs::create_dir_all(&directory).doing(|| format!("create {}", directory.display()))?;
        Ok(Self { directory })
    }

    /// The directory.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.directory
    }

    /// Directory of the finished system.
    #[must_use]
    pub fn system(&self) -> PathBuf {
        self.directory.join("system")
    }

    /// Removes all of it.
    ///
    /// # Errors
    /// Fails if a file cannot be removed.
    pub fn remove(self) -> Result<()> {
        let _lock = self.lock()?;
        remove_tree(&self.directory)
    }

    fn lock(&self) -> Result<Flock<File>> {
        let path = self.directory.join("lock");
        let file = File::create(&path).doing(|| format!("create {}", path.display()))?;
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => Ok(lock),
            Err((file, nix::errno::Errno::EWOULDBLOCK)) => {
                eprintln!("lab: another `cargo lab` sets the lab up; waiting for it");
                Flock::lock(file, FlockArg::LockExclusive)
                    .map_err(|(_, errno)| errno)
                    .doing(|| format!("lock {}", path.display()))
            }
            Err((_, errno)) => Err(errno).doing(|| format!("lock {}", path.display())),
        }
    }

    /// Makes sure that the system is there, whole and built by the present recipe.
    ///
    /// # Errors
    /// Fails, with what to do, if it cannot be built.
    pub fn ensure(&self, wishes: &Wishes) -> Result<()> {
        let _lock = self.lock()?;
        remove_stale_runs(&self.directory);
        let system = self.system();
        match check(&system) {
            Ok(()) => return Ok(()),
            Err(why) => eprintln!("lab: its systems have to be built: {why}"),
        }
        let mirror = mirror::find(wishes.mirror.as_deref())?;
        announce(&self.directory, wishes)?;
        install_tools()?;
        let building = self.directory.join("building");
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

    /// The site of guests on this machine's own KVM.
    #[must_use]
    pub fn host_site(&self, programs: &Path, run: &Path) -> Site {
        let system = self.system();
        Site {
            place: Place::Host,
            root: system.join("root"),
            programs: programs.to_owned(),
            initramfs: run.join("guest.cpio"),
            guest_disk: system.join("guest.ext4"),
            scratch: run.join("scratch"),
            block_device: None,
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

fn sha256_of(path: &Path) -> Result<String> {
    let mut file = File::open(path).doing(|| format!("open {}", path.display()))?;
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        let count = file
            .read(&mut buffer)
            .doing(|| format!("read {}", path.display()))?;
        if count == 0 {
            return Ok(hex(&hash.finalize()));
        }
        hash.update(buffer.get(..count).unwrap_or_default());
    }
}

/// Compares a system with its stamp; the error says what is wrong with it.
fn check(system: &Path) -> Result<(), String> {
    let text = fs::read_to_string(system.join("stamp.json"))
        .map_err(|_| format!("there is no complete system in {}", system.display()))?;
    let stamp: Stamp =
        serde_json::from_str(&text).map_err(|error| format!("its stamp is broken: {error}"))?;
    if stamp.recipe != recipe_hash() {
        return Err("the recipe has changed since they were built".into());
    }
    for file in &stamp.files {
        let path = system.join(&file.path);
        let size = fs::metadata(&path)
            .map_err(|error| format!("{}: {error}", path.display()))?
            .len();
        if size != file.size {
            return Err(format!("{} has changed its size", path.display()));
        }
        if let Some(expected) = &file.sha256
            && sha256_of(&path).map_err(|error| error.to_string())? != *expected
        {
            return Err(format!("{} has changed", path.display()));
        }
    }
    Ok(())
}

/// Says what is going to happen, and asks unless told not to.
fn announce(directory: &Path, wishes: &Wishes) -> Result<()> {
    let missing = missing_tools();
    eprintln!("lab: this will, once:");
    if !missing.is_empty() {
        eprintln!(
            "  - install these Debian packages on this machine: {}",
            missing.join(" ")
        );
    }
    eprintln!("  - download about 300 MB of Debian packages");
    eprintln!(
        "  - build two Debian systems in {} (1.1 GB; `cargo lab clean` removes them)",
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

/// Installs the missing tools, or says how.
fn install_tools() -> Result<()> {
    let missing = missing_tools();
    if missing.is_empty() {
        return Ok(());
    }
    let packages = missing.join(" ");
    if !in_path("apt-get") {
        return Err(LabError::Setup(format!(
            "this machine has no apt-get; install these programs by its own means: {packages}"
        )));
    }
    if !geteuid().is_root() {
        return Err(LabError::Setup(format!(
            "installing packages needs root; run `sudo apt-get install {packages}`, then this again"
        )));
    }
    eprintln!("lab: installing {packages}");
    let install = |update: bool| {
        let mut command = Command::new("apt-get");
        command.env("DEBIAN_FRONTEND", "noninteractive");
        if update {
            command.arg("update");
        } else {
            command
                .args(["install", "-y", "--no-install-recommends"])
                .args(&missing);
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
                    format!("upload {} /tmp/lab-root.sh", quoted(&recipe)),
                    format!("chroot \"$1\" sh /tmp/lab-root.sh '{L1_MODULES}' '{GUEST_MODULES}'"),
                    "rm \"$1/tmp/lab-root.sh\"".into(),
                ],
            ),
        )?;
        // Unpacked as the user's own files, so that QEMU can share all of them without privilege.
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
        let guest_disk = self.directory.join("guest.ext4");
        let mut mke2fs = self.unpacked_site().root_program("usr/sbin/mke2fs");
        mke2fs
            .args(["-q", "-t", "ext4", "-L", "guest", "-d"])
            .arg(&guest_tar);
        mke2fs.arg(&guest_disk).arg(GUEST_DISK_SIZE);
        self.step("guest disk", mke2fs)?;
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
            let _ = child.kill();
            let _ = child.wait();
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
        let checked = |path: &str, with_hash: bool| -> Result<Checked> {
            let full = self.directory.join(path);
            let size = fs::metadata(&full)
                .doing(|| format!("find {}", full.display()))?
                .len();
            let sha256 = if with_hash {
                Some(sha256_of(&full)?)
            } else {
                None
            };
            Ok(Checked {
                path: path.into(),
                size,
                sha256,
            })
        };
        let mut files = vec![
            checked("root/opt/lab/vmlinuz", true)?,
            checked("root/opt/lab/vmlinux", false)?,
            checked("root/opt/lab/busybox", true)?,
            checked("root/usr/bin/qemu-system-x86_64", true)?,
            checked("root/opt/qemu-10/usr/bin/qemu-system-x86_64", false)?,
            checked("root/lib64/ld-linux-x86-64.so.2", true)?,
            checked("guest.ext4", false)?,
        ];
        for directory in ["root/opt/lab/l1-modules", "root/opt/lab/guest-modules"] {
            for name in sorted_names(&self.directory.join(directory))? {
                files.push(checked(&format!("{directory}/{name}"), true)?);
            }
        }
        let stamp = Stamp {
            recipe: recipe_hash(),
            files,
        };
        let path = self.directory.join("stamp.json");
        let text = serde_json::to_string_pretty(&stamp)
            .map_err(std::io::Error::from)
            .doing(|| "write the stamp".into())?;
        fs::write(&path, text).doing(|| format!("write {}", path.display()))
    }
}

/// A path as one word of a shell command.
fn quoted(path: &Path) -> String {
    format!("'{}'", path.display().to_string().replace('\'', r"'\''"))
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

/// Removes a directory and all in it, if it is there.
fn remove_tree(path: &Path) -> Result<()> {
    match fs::remove_dir_all(path) {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error).doing(|| format!("remove {}", path.display())),
    }
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
        fs::write(directory.path().join("a"), content).unwrap();
        let stamp = Stamp {
            recipe: recipe_hash(),
            files: vec![Checked {
                path: "a".into(),
                size: 3,
                sha256: Some(sha256_of(&directory.path().join("a")).unwrap()),
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

    #[test]
    fn quoted_is_one_word() {
        assert_eq!(quoted(Path::new("/a b/it's")), r"'/a b/it'\''s'");
    }
}

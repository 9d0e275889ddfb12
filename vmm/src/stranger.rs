//! For tests: another user who connects to a socket.

use std::fs::{Permissions, set_permissions};
use std::io::{self, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use nix::unistd::geteuid;

/// Where the socket is, in that user's process.
const SOCKET: &str = "RINGSIDE_TEST_SOCKET";
const NOBODY: u32 = 65534;

/// The same test again, in a process of that user's.
pub(crate) struct Stranger {
    test: &'static str,
    dir: tempfile::TempDir,
}

/// It is connecting.
pub(crate) struct Connecting(Child);

impl Stranger {
    /// None in that user's process, which does this with the socket, and where nobody can become another user: the test is to end.
    pub(crate) fn new(test: &'static str, act: fn(&Path)) -> Option<Self> {
        if let Some(socket) = std::env::var_os(SOCKET) {
            act(Path::new(&socket));
            return None;
        }
        if !geteuid().is_root() {
            let why = "only root can become another user";
            // Past the capture of the test harness: a test that did not run must not look like one that did.
            let _ = writeln!(io::stderr(), "test {test}: skipped: {why}");
            return None;
        }
        let dir = tempfile::tempdir().unwrap();
        open_to_all(dir.path(), 0o755);
        Some(Self { test, dir })
    }

    /// Where to listen.
    pub(crate) fn socket(&self) -> PathBuf {
        self.dir.path().join("socket")
    }

    /// Connects to what listens there now.
    pub(crate) fn start(&self) -> Connecting {
        // It is made for its owner, whatever peers are checked besides.
        open_to_all(&self.socket(), 0o666);
        // By its name that user may not reach this program.
        let mut command = Command::new("/proc/self/exe");
        command.args([self.test, "--exact", "--nocapture"]);
        command.stdout(Stdio::null());
        command.env(SOCKET, self.socket()).uid(NOBODY).gid(NOBODY);
        Connecting(command.spawn().unwrap())
    }
}

impl Connecting {
    /// Waits until it has found what it was to find.
    pub(crate) fn end(mut self) {
        assert!(self.0.wait().unwrap().success());
    }
}

fn open_to_all(path: &Path, mode: u32) {
    set_permissions(path, Permissions::from_mode(mode)).unwrap();
}

//! A Ceph cluster of one node, out of the lab's root.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use super::daemon::Daemon;
use crate::command::{self, run_line};
use crate::ensure;
use crate::error::{Doing, LabError, Result};
use crate::site::Site;

const CLUSTER: &str = "11111111-2222-3333-4444-555555555555";
const OSD: &str = "21111111-2222-3333-4444-555555555555";
const MONITOR: &str = "[v2:127.0.0.1:3300]";

/// How long one step may take, on plain hardware.
const LIMIT: Duration = Duration::from_secs(30);

/// A monitor, and one daemon that keeps objects in memory, once. There is a pool `rbd`.
#[derive(Debug)]
pub struct Ceph {
    conf: PathBuf,
    _daemons: [Daemon; 2],
}

impl Ceph {
    /// Starts one in the test's network. Skips the test outside of the lab VM: Ceph's programs want the root to be the system's.
    ///
    /// # Errors
    /// Fails if a step does, with what it says.
    pub fn start(site: &Site) -> Result<Self> {
        if site.root != Path::new("/") {
            return Err(LabError::Skipped(
                "Ceph runs in the lab VM only: its programs look for their parts below /".into(),
            ));
        }
        run_line("ip link set lo up")?;
        let at = site.scratch.join("ceph");
        for directory in ["mon", "osd"] {
            let path = at.join(directory);
            fs::create_dir_all(&path).doing(|| format!("create {}", path.display()))?;
        }
        let conf = at.join("ceph.conf");
        let at = at.display();
        let text = format!(
            "[global]
fsid = {CLUSTER}
mon host = v2:127.0.0.1:3300
public addr = 127.0.0.1
auth cluster required = none
auth service required = none
auth client required = none
osd objectstore = memstore
memstore device bytes = 512M
osd class dir = /usr/lib/x86_64-linux-gnu/rados-classes
osd crush chooseleaf type = 0
osd pool default size = 1
osd pool default min size = 1
mon allow pool size one = true
mon data avail crit = 1
run dir = {at}
mon data = {at}/mon
osd data = {at}/osd
log file = {at}/$name.log
admin socket =
"
        );
        fs::write(&conf, text).doing(|| format!("write {}", conf.display()))?;
        let map = format!("{at}/monmap");
        let command = |program: &str, arguments: &[&str]| {
            let mut command = Command::new(program);
            command.args(arguments).env("CEPH_CONF", &conf);
            command
        };
        let run = |program: &str, arguments: &[&str]| {
            command::run(&mut command(program, arguments), site.limit(LIMIT))
        };
        let first = ["--create", "--addv", "a", MONITOR, "--fsid", CLUSTER];
        run("monmaptool", &[&first[..], &[&map]].concat())?;
        run("ceph-mon", &["-i", "a", "--mkfs", "--monmap", &map])?;
        let monitor = Daemon::start(site, "ceph-mon", command("ceph-mon", &["-i", "a", "-f"]))?;
        // Once for both: this program takes seconds to start.
        let commands = format!("osd new {OSD}\nosd pool create rbd 8\n");
        let mut ceph = command("ceph", &[]);
        let limit = site.limit(LIMIT);
        let output = command::output_with_input(&mut ceph, commands.as_bytes(), limit)?;
        ensure!(
            output.status.success(),
            "the monitor did not take its commands: {}",
            output.stderr
        );
        run("ceph-osd", &["-i", "0", "--mkfs", "--osd-uuid", OSD])?;
        let osd = Daemon::start(site, "ceph-osd", command("ceph-osd", &["-i", "0", "-f"]))?;
        Ok(Self {
            conf,
            _daemons: [monitor, osd],
        })
    }

    /// The path of an image in the pool, for `ringside-blk` and for QEMU.
    #[must_use]
    pub fn path(&self, image: &str) -> String {
        format!("rbd:rbd/{image}:conf={}", self.conf.display())
    }
}

//! `ringside-blk` on images of a Ceph cluster of one node, which each test starts for itself, with QEMU's driver as the peer.

#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation
)] // helpers of tests: a panic is how they fail

mod frontend;

use std::fs;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use frontend::disk::{Disk, FLUSH, IN, OK, OUT};
use frontend::{Daemon, FrontEnd, PATIENCE, REGION, SECOND, Setup, own_network, skip};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use ringside_rings::Segment;
use serde_json::{Value, json};
use vm_memory::{Bytes, GuestAddress};

const BLK: &str = env!("CARGO_BIN_EXE_ringside-blk");
const MIB: usize = 1 << 20;
const IOERR: u8 = 1;

/// What a cluster and its peers are made of, with Debian's packages.
const PROGRAMS: [(&str, &str); 6] = [
    ("ceph-mon", "ceph-mon"),
    ("ceph-osd", "ceph-osd"),
    ("monmaptool", "ceph-common"),
    ("ceph", "ceph-common"),
    ("rbd", "ceph-common"),
    ("qemu-img", "qemu-utils"),
];

/// A monitor and one daemon that keeps objects in memory, in a network of their own.
struct Cluster {
    dir: tempfile::TempDir,
    daemons: Vec<Child>,
}

impl Cluster {
    /// One with a pool `rbd`; `None`, and a word on standard error, if it cannot be had.
    fn new(test: &str) -> Option<Self> {
        for (program, package) in PROGRAMS {
            if Command::new(program).arg("--version").output().is_err() {
                skip(
                    test,
                    format_args!("{program} is not installed (package {package})"),
                );
                return None;
            }
        }
        let drivers = Command::new("qemu-img").arg("--help").output().unwrap();
        if !String::from_utf8_lossy(&drivers.stdout).contains(" rbd") {
            skip(
                test,
                "qemu-img has no driver for RBD (package qemu-block-extra)",
            );
            return None;
        }
        if !own_network(test) {
            return None;
        }
        let up = Command::new("ip")
            .args(["link", "set", "lo", "up"])
            .status();
        if !up.is_ok_and(|status| status.success()) {
            skip(test, "the loopback device cannot be set up with ip");
            return None;
        }
        let dir = tempfile::tempdir().unwrap();
        let mut cluster = Self {
            dir,
            daemons: Vec::new(),
        };
        cluster.start();
        Some(cluster)
    }

    fn start(&mut self) {
        const OSD: &str = "21111111-2222-3333-4444-555555555555";
        let at = self.dir.path().display();
        let conf = format!(
            "[global]
fsid = 11111111-2222-3333-4444-555555555555
mon host = v2:127.0.0.1:3300
public addr = 127.0.0.1
auth cluster required = none
auth service required = none
auth client required = none
osd objectstore = memstore
memstore device bytes = 256M
osd pool default size = 1
osd pool default min size = 1
mon allow pool size one = true
osd crush chooseleaf type = 0
osd client watch timeout = 5
mon data avail crit = 1
run dir = {at}
mon data = {at}/mon
osd data = {at}/osd
log file = {at}/$name.log
admin socket =
"
        );
        fs::write(self.conf(), conf).unwrap();
        for directory in ["mon", "osd"] {
            fs::create_dir(self.dir.path().join(directory)).unwrap();
        }
        let map = self.dir.path().join("map").display().to_string();
        let mon = ["--addv", "a", "[v2:127.0.0.1:3300]"];
        let fsid = ["--fsid", "11111111-2222-3333-4444-555555555555"];
        self.run(
            "monmaptool",
            &[&["--create"][..], &mon, &fsid, &[&map]].concat(),
        );
        self.run("ceph-mon", &["-i", "a", "--mkfs", "--monmap", &map]);
        self.spawn("ceph-mon", &["-i", "a", "-f"]);
        self.run("ceph", &["--connect-timeout", "30", "osd", "new", OSD]);
        self.run("ceph-osd", &["-i", "0", "--mkfs", "--osd-uuid", OSD]);
        self.spawn("ceph-osd", &["-i", "0", "-f"]);
        self.run("ceph", &["osd", "pool", "create", "rbd", "8"]);
    }

    fn conf(&self) -> PathBuf {
        self.dir.path().join("conf")
    }

    fn command(&self, program: &str, args: &[&str]) -> Command {
        let mut command = Command::new(program);
        // From where Debian's build finds the classes of objects, whose directory it has as a relative path.
        command.args(args).stdin(Stdio::null()).current_dir("/");
        command.env("CEPH_CONF", self.conf());
        command
    }

    fn spawn(&mut self, program: &str, args: &[&str]) {
        let mut command = self.command(program, args);
        let child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn();
        self.daemons.push(child.unwrap());
    }

    fn run(&self, program: &str, args: &[&str]) -> String {
        let output = self.command(program, args).output().unwrap();
        let text = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{program} {args:?}: {text}");
        String::from_utf8(output.stdout).unwrap()
    }

    /// A new image of 16 MiB.
    fn create(&self, name: &str, args: &[&str]) {
        let image = format!("rbd/{name}");
        self.run(
            "rbd",
            &[&["create", &image, "--size", "16M"], args].concat(),
        );
    }

    fn uri(&self, name: &str) -> String {
        format!("rbd:rbd/{name}:conf={}", self.conf().display())
    }

    fn serve(&self, name: &str, args: &[&str]) -> Daemon {
        Daemon::start(BLK, &[&["--path", &self.uri(name)], args].concat())
    }

    fn refusal(&self, name: &str, args: &[&str]) -> String {
        refusal(&[&["--path", &self.uri(name)], args].concat())
    }

    /// What QEMU finds in an image.
    fn holds(&self, name: &str) -> Vec<u8> {
        let to = self.dir.path().join("copy");
        let to = to.display().to_string();
        self.run("qemu-img", &["convert", "-O", "raw", &self.uri(name), &to]);
        fs::read(to).unwrap()
    }

    /// To the daemon that keeps the objects.
    fn signal(&self, signal: Signal) {
        let osd = self.daemons.last().unwrap();
        kill(Pid::from_raw(osd.id() as i32), signal).unwrap();
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        for daemon in &mut self.daemons {
            let _ = daemon.kill();
            let _ = daemon.wait();
        }
    }
}

fn refusal(args: &[&str]) -> String {
    let (code, log) = Daemon::spawn(BLK, args).outcome();
    assert_eq!(code, Some(1), "{log}");
    log
}

fn connect(daemon: &Daemon, queues: usize, model: Vec<u8>) -> Disk {
    let setup = Setup {
        queues,
        ..Setup::default()
    };
    Disk::new(FrontEnd::new(&daemon.socket(), setup), model)
}

#[test]
fn what_one_writes_the_other_reads() {
    let Some(cluster) = Cluster::new("what_one_writes_the_other_reads") else {
        return;
    };
    let data: Vec<u8> = (0..16 * MIB).map(|i| (i / 512 * 7) as u8).collect();
    let file = cluster.dir.path().join("data");
    fs::write(&file, &data).unwrap();
    let (file, image) = (file.display().to_string(), cluster.uri("disk"));
    cluster.run(
        "qemu-img",
        &["convert", "-f", "raw", "-O", "raw", &file, &image],
    );
    // With a cache and without, and one by one.
    for args in [
        &["--queues", "3"][..],
        &["--queues", "1", "--cache", "writethrough"],
    ] {
        let daemon = cluster.serve("disk", args);
        let queues = args.get(1).unwrap().parse().unwrap();
        let mut disk = connect(&daemon, queues, cluster.holds("disk"));
        disk.verify();
        disk.exercise(1500, true);
        disk.verify();
        disk.flush();
        let model = disk.model.clone();
        drop(disk);
        daemon.assert_idle();
        daemon.stop();
        assert!(cluster.holds("disk") == model, "{args:?}");
    }
}

#[test]
fn an_image_belongs_to_one_writer() {
    let Some(cluster) = Cluster::new("an_image_belongs_to_one_writer") else {
        return;
    };
    // Without the feature, what counts is who has it open.
    cluster.create("plain", &["--image-feature", "layering"]);
    cluster.create("locked", &[]);
    for name in ["plain", "locked"] {
        let daemon = cluster.serve(name, &[]);
        let mut disk = connect(&daemon, 1, vec![0; 16 * MIB]);
        disk.write(4096, &[7; 4096]);
        let second = cluster.refusal(name, &["--reconnect-timeout", "1"]);
        assert!(
            second.contains("in use by another client, at 127."),
            "{second}"
        );
        // Readers do no harm.
        cluster.serve(name, &["--read-only"]).stop();
        if name == "locked" {
            let uri = cluster.uri(name);
            let write = ["-f", "raw", "-c", "write 0 4096", &uri];
            let output = cluster.command("qemu-io", &write).output().unwrap();
            assert!(!output.status.success(), "{output:?}");
        }
        // One that died is not in the way for long.
        drop((disk, daemon));
        let daemon = Daemon::spawn(BLK, &["--path", &cluster.uri(name)]);
        let start = Instant::now();
        while !daemon.log().contains("ready") {
            assert!(start.elapsed() < 3 * PATIENCE, "{}", daemon.log());
            sleep(Duration::from_millis(20));
        }
        let mut disk = connect(&daemon, 1, vec![0; 16 * MIB]);
        assert_eq!(disk.attempt(OUT, 0, 4096), OK);
        drop(disk);
        daemon.stop();
    }
}

#[test]
fn sizes_and_snapshots_are_followed() {
    let Some(cluster) = Cluster::new("sizes_and_snapshots_are_followed") else {
        return;
    };
    cluster.create("disk", &[]);
    let sockets = tempfile::tempdir().unwrap();
    let control = sockets.path().join("c");
    let daemon = cluster.serve(
        "disk",
        &["--control-socket", &control.display().to_string()],
    );
    let ask = |command: &str, arguments: Value| {
        ringside_control::client::call(&control, command, &arguments).unwrap()
    };
    let size = || ask("status", Value::Null).unwrap()["disk"]["size"].as_u64();
    let mut disk = connect(&daemon, 1, vec![0; 16 * MIB]);
    disk.write(0, &[7; 65536]);
    disk.flush();
    cluster.run("rbd", &["snap", "create", "rbd/disk@before"]);
    disk.write(0, &[9; 65536]);
    disk.flush();
    // By others, and by us.
    cluster.run("rbd", &["resize", "rbd/disk", "--size", "24M"]);
    let start = Instant::now();
    while size() != Some(24 << 20) {
        assert!(start.elapsed() < PATIENCE, "{}", daemon.log());
        sleep(Duration::from_millis(20));
    }
    assert_eq!(disk.attempt(OUT, 20 << 20, 4096), OK);
    let shrink = ask("resize", json!({"size": "16M"})).unwrap_err();
    assert!(shrink.message.contains("`shrink`"), "{shrink:?}");
    assert_eq!(
        ask("resize", json!({"size": "32M"})),
        Ok(json!({"changed": true}))
    );
    assert_eq!(size(), Some(32 << 20));
    assert_eq!(disk.attempt(OUT, 31 << 20, 4096), OK);
    assert_eq!(ask("drain", Value::Null), Ok(json!({"drained": true})));
    let info = cluster.run("rbd", &["info", "rbd/disk"]);
    assert!(info.contains("size 32 MiB"), "{info}");
    drop(disk);
    daemon.stop();

    assert!(
        cluster
            .refusal("disk@before", &[])
            .contains("use --read-only")
    );
    let daemon = cluster.serve("disk@before", &["--read-only"]);
    let mut before = vec![0; 16 * MIB];
    before.get_mut(..65536).unwrap().fill(7);
    let mut disk = connect(&daemon, 1, before);
    disk.verify();
    assert_eq!(disk.attempt(OUT, 0, 4096), IOERR);
    assert_eq!(disk.attempt(FLUSH, 0, 0), OK);
    drop(disk);
    daemon.stop();
}

#[test]
fn requests_do_not_wait_for_ever() {
    let Some(cluster) = Cluster::new("requests_do_not_wait_for_ever") else {
        return;
    };
    cluster.create("disk", &[]);
    let daemon = cluster.serve("disk", &["--reconnect-timeout", "2"]);
    let mut disk = connect(&daemon, 1, vec![0; 16 * MIB]);
    assert_eq!(disk.attempt(OUT, 0, 4096), OK);
    cluster.signal(Signal::SIGSTOP);
    let start = Instant::now();
    assert_eq!(disk.attempt(IN, 1 << 20, 4096), IOERR);
    let waited = start.elapsed();
    assert!(
        waited > Duration::from_secs(1) && waited < PATIENCE,
        "{waited:?}"
    );
    assert!(
        daemon.log().contains("I/O error of the Ceph cluster"),
        "{}",
        daemon.log()
    );
    cluster.signal(Signal::SIGCONT);
    let start = Instant::now();
    while disk.attempt(OUT, 0, 4096) != OK {
        assert!(
            start.elapsed() < 3 * PATIENCE,
            "does not come back: {}",
            daemon.log()
        );
        sleep(Duration::from_millis(50));
    }
    drop(disk);
    daemon.stop();
}

/// Also on threads of librbd.
#[test]
fn memory_that_is_taken_away_ends_a_connection_and_nothing_else() {
    let Some(cluster) =
        Cluster::new("memory_that_is_taken_away_ends_a_connection_and_nothing_else")
    else {
        return;
    };
    cluster.create("disk", &[]);
    let daemon = cluster.serve("disk", &[]);
    let mut disk = connect(&daemon, 1, vec![0; 16 * MIB]);
    disk.write(0, &[7; 256 << 10]);
    disk.flush();
    drop(disk);
    for kind in [IN, OUT] {
        let mut front = FrontEnd::new(&daemon.socket(), Setup::default());
        let (head, status) = (front.guest.alloc(16, 16), front.guest.alloc(1, 16));
        front.guest.file.set_len(REGION).unwrap();
        front.guest.memory.write_slice(&[0; 16], head).unwrap();
        front.guest.memory.write_obj(kind, head).unwrap();
        let data = Segment::new(GuestAddress(SECOND), 64 << 10);
        let (mut readable, mut writable) = (vec![Segment::new(head, 16)], vec![]);
        let of = if kind == IN {
            &mut writable
        } else {
            &mut readable
        };
        of.push(data);
        writable.push(Segment::new(status, 1));
        front.queues[0].submit(&front.guest, &readable, &writable, 1);
        assert!(front.raw.is_closed(), "{}", daemon.log());
    }
    let mut disk = connect(&daemon, 1, vec![0; 16 * MIB]);
    assert_eq!(disk.attempt(OUT, 0, 4096), OK);
    let log = daemon.log();
    assert_eq!(log.matches("guest memory is gone").count(), 2, "{log}");
    drop(disk);
    daemon.stop();
}

#[test]
fn what_cannot_be_served_is_refused_with_a_reason() {
    let Some(cluster) = Cluster::new("what_cannot_be_served_is_refused_with_a_reason") else {
        return;
    };
    cluster.create("disk", &[]);
    let uri = |more: &str| cluster.uri("disk") + more;
    assert!(
        cluster
            .refusal("none", &[])
            .contains("there is no rbd/none")
    );
    let other = cluster.uri("disk").replace("rbd:rbd/", "rbd:none/");
    assert!(refusal(&["--path", &other]).contains("pool \"none\" cannot be used"));
    assert!(refusal(&["--path", &uri(":no_option=1")]).contains("no option \"no_option\""));
    let nobody = uri(":mon_host=127.0.0.1\\:1");
    let patience = ["--reconnect-timeout", "1"];
    let log = refusal(&[&["--path", &nobody][..], &patience].concat());
    assert!(log.contains("monitors' addresses"), "{log}");
    let log = refusal(&["--path", "rbd:rbd/disk:conf=/none"]);
    assert!(
        log.contains("configuration file /none cannot be read"),
        "{log}"
    );
    assert!(
        cluster
            .refusal("disk", &["--format", "qcow2"])
            .contains("leave --format out")
    );
}

/// Needs no cluster.
#[test]
fn names_that_make_no_sense_are_refused() {
    assert!(refusal(&["--path", "rbd:disk"]).contains("write rbd:POOL/IMAGE"));
    assert!(refusal(&["--path", "rbd:rbd/disk:id"]).contains("\"id\" is no option"));
}

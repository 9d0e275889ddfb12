//! `ringside-blk` with qcow2 images that QEMU made, and that QEMU looks at afterwards.

#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation
)] // helpers of tests: a panic is how they fail

mod frontend;

use std::fs;
use std::io::{Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread::sleep;
use std::time::{Duration, Instant};

use frontend::disk::{DISCARD, Disk, WRITE_ZEROES};
use frontend::{Daemon, FrontEnd, PATIENCE, Setup, skip};
use nix::sys::signal::Signal;
use ringside_backends::blk::{self, DiskOptions, Format, Lock};

const BLK: &str = env!("CARGO_BIN_EXE_ringside-blk");
const MIB: usize = 1 << 20;

/// A directory for images, where QEMU's tools are to be had.
struct Images {
    dir: tempfile::TempDir,
}

impl Images {
    fn new(test: &str) -> Option<Self> {
        if Command::new("qemu-img").arg("--version").output().is_err() {
            skip(test, "qemu-img is not installed (package qemu-utils)");
            return None;
        }
        Some(Self {
            dir: tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap(),
        })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Runs qemu-img in the directory; it must succeed.
    fn qemu_img(&self, args: &[&str]) -> String {
        let (ok, output) = self.try_qemu_img(args);
        assert!(ok, "qemu-img {args:?}: {output}");
        output
    }

    fn try_qemu_img(&self, args: &[&str]) -> (bool, String) {
        let output = Command::new("qemu-img")
            .args(args)
            .current_dir(self.dir.path())
            .output()
            .unwrap();
        let text = [output.stdout, output.stderr].concat();
        (
            output.status.success(),
            String::from_utf8_lossy(&text).into_owned(),
        )
    }

    /// Kills the program, and waits until the kernel has given its lock back.
    fn kill(&self, mut daemon: Daemon, image: &str) {
        daemon.signal(Signal::SIGKILL);
        daemon.wait();
        let start = Instant::now();
        while self.try_qemu_img(&["info", image]).1.contains("lock") {
            assert!(start.elapsed() < PATIENCE, "{image} stays locked");
            sleep(Duration::from_millis(20));
        }
    }

    /// A raw file with this in it.
    fn raw(&self, name: &str, data: &[u8]) {
        fs::write(self.path(name), data).unwrap();
    }

    /// The image has no errors, and holds what the model does.
    fn same(&self, image: &str, model: &[u8]) {
        self.qemu_img(&["check", image]);
        self.raw("model", model);
        self.qemu_img(&["compare", "-f", "raw", "-F", "qcow2", "model", image]);
    }

    fn serve(&self, image: &str, args: &[&str]) -> Daemon {
        let path = self.path(image);
        let path = path.to_str().unwrap();
        Daemon::start(
            BLK,
            &[&["--format", "qcow2", "--path", path], args].concat(),
        )
    }

    /// What the program says when it does not serve the image.
    fn refusal(&self, image: &str, args: &[&str]) -> String {
        let path = self.path(image);
        let path = path.to_str().unwrap();
        let daemon = Daemon::spawn(
            BLK,
            &[&["--format", "qcow2", "--path", path], args].concat(),
        );
        let (code, log) = daemon.outcome();
        assert_eq!(code, Some(1), "{log}");
        log
    }
}

fn connect(daemon: &Daemon, queues: usize, model: Vec<u8>) -> Disk {
    let setup = Setup {
        queues,
        ..Setup::default()
    };
    Disk::new(FrontEnd::new(&daemon.socket(), setup), model)
}

/// Bytes that differ from sector to sector.
fn pattern(len: usize, seed: usize) -> Vec<u8> {
    (0..len)
        .map(|i| (i / 512 * 7 + i % 253 + seed) as u8)
        .collect()
}

#[test]
fn random_requests_on_several_queues_leave_what_they_wrote() {
    let test = "random_requests_on_several_queues_leave_what_they_wrote";
    let Some(images) = Images::new(test) else {
        return;
    };
    for (compat, cluster, direct) in [
        ("0.10", "64k", false),
        ("1.1", "4k", false),
        ("1.1", "64k", true),
        ("1.1", "2M", false),
        ("1.1", "512", false),
    ] {
        let options = format!("compat={compat},cluster_size={cluster}");
        images.qemu_img(&["create", "-q", "-f", "qcow2", "-o", &options, "a", "24M"]);
        let mut args = vec!["--queues", "3"];
        if direct {
            args.push("--direct");
        }
        let daemon = images.serve("a", &args);
        let mut disk = connect(&daemon, 3, vec![0; 24 * MIB]);
        disk.exercise(1500, compat != "0.10");
        disk.verify();
        disk.exercise(500, compat != "0.10");
        let Disk { front, model, .. } = disk;
        drop(front);
        daemon.stop();
        images.same("a", &model);
    }
}

#[test]
fn a_chain_of_backing_files_is_read_and_left_alone() {
    let test = "a_chain_of_backing_files_is_read_and_left_alone";
    let Some(images) = Images::new(test) else {
        return;
    };
    // The base ends within a cluster, and before the others.
    let mut model = pattern(5 * MIB + 1536, 0);
    images.raw("base", &model);
    model.resize(16 * MIB, 0);
    for (cluster, compat) in [("64k", "1.1"), ("4k", "0.10"), ("2M", "1.1")] {
        let options = format!("cluster_size={cluster},compat={compat}");
        let create = ["create", "-q", "-f", "qcow2", "-o"];
        let middle = [
            &create[..],
            &[&options, "-b", "base", "-F", "raw", "middle", "16M"],
        ];
        images.qemu_img(&middle.concat());
        let daemon = images.serve("middle", &[]);
        let mut disk = connect(&daemon, 1, model.clone());
        disk.write(3 * MIB as u64 + 512, &pattern(200 << 10, 5));
        disk.write(9 * MIB as u64, &pattern(100 << 10, 6));
        if compat == "1.1" {
            disk.range(WRITE_ZEROES, MIB as u64, MIB as u64);
        }
        disk.verify();
        let middle_model = std::mem::take(&mut disk.model);
        drop(disk);
        daemon.stop();
        images.same("middle", &middle_model);
        let before = fs::read(images.path("middle")).unwrap();
        images.qemu_img(
            &[
                &create[..],
                &["cluster_size=64k", "-b", "middle", "-F", "qcow2", "top"],
            ]
            .concat(),
        );
        let daemon = images.serve("top", &["--queues", "2"]);
        let mut disk = connect(&daemon, 2, middle_model);
        disk.verify();
        disk.exercise(800, true);
        disk.verify();
        let top_model = std::mem::take(&mut disk.model);
        drop(disk);
        daemon.stop();
        images.same("top", &top_model);
        assert!(before == fs::read(images.path("middle")).unwrap());
        assert!(model[..5 * MIB] == fs::read(images.path("base")).unwrap()[..5 * MIB]);
    }
}

#[test]
fn compressed_clusters_are_read_and_written_over() {
    let test = "compressed_clusters_are_read_and_written_over";
    let Some(images) = Images::new(test) else {
        return;
    };
    let model = pattern(8 * MIB, 3);
    images.raw("plain", &model);
    images.qemu_img(&["convert", "-c", "-O", "qcow2", "plain", "c"]);
    let daemon = images.serve("c", &["--queues", "2"]);
    let mut disk = connect(&daemon, 2, model);
    disk.verify();
    disk.exercise(600, true);
    disk.verify();
    let model = std::mem::take(&mut disk.model);
    drop(disk);
    daemon.stop();
    images.same("c", &model);
}

#[test]
fn an_internal_snapshot_keeps_what_it_has() {
    let test = "an_internal_snapshot_keeps_what_it_has";
    let Some(images) = Images::new(test) else {
        return;
    };
    let model = pattern(8 * MIB, 4);
    images.raw("plain", &model);
    images.qemu_img(&["convert", "-O", "qcow2", "plain", "s"]);
    images.qemu_img(&["snapshot", "-c", "then", "s"]);
    let daemon = images.serve("s", &["--queues", "2"]);
    let mut disk = connect(&daemon, 2, model.clone());
    disk.exercise(600, true);
    disk.verify();
    let now = std::mem::take(&mut disk.model);
    drop(disk);
    daemon.stop();
    images.same("s", &now);
    images.qemu_img(&["convert", "-O", "raw", "-l", "then", "s", "kept"]);
    assert!(fs::read(images.path("kept")).unwrap() == model);
}

#[test]
fn discarding_gives_space_back_to_the_file_system() {
    use std::os::unix::fs::MetadataExt;
    let test = "discarding_gives_space_back_to_the_file_system";
    let Some(images) = Images::new(test) else {
        return;
    };
    images.qemu_img(&["create", "-q", "-f", "qcow2", "d", "64M"]);
    let daemon = images.serve("d", &[]);
    let mut disk = connect(&daemon, 1, vec![0; 64 * MIB]);
    for start in 0..64 {
        disk.write(start * (256 << 10), &pattern(256 << 10, 1));
    }
    disk.flush();
    let blocks = || fs::metadata(images.path("d")).unwrap().blocks();
    let before = blocks();
    disk.range(DISCARD, 0, 16 * MIB as u64);
    disk.verify();
    assert!(before * 512 > 16 * MIB as u64);
    assert!(blocks() * 512 < 2 * MIB as u64, "{} of {before}", blocks());
    // The clusters are used again.
    let len = fs::metadata(images.path("d")).unwrap().len();
    for start in 0..64 {
        disk.write(
            (32 * MIB + start * (256 << 10)) as u64,
            &pattern(256 << 10, 2),
        );
    }
    assert!(fs::metadata(images.path("d")).unwrap().len() < len + 2 * MIB as u64);
    let model = std::mem::take(&mut disk.model);
    drop(disk);
    daemon.stop();
    images.same("d", &model);
}

#[test]
fn what_was_flushed_survives_a_kill() {
    let test = "what_was_flushed_survives_a_kill";
    let Some(images) = Images::new(test) else {
        return;
    };
    for round in 0..6 {
        images.qemu_img(&["create", "-q", "-f", "qcow2", "k", "64M"]);
        let daemon = images.serve("k", &["--queues", "2"]);
        let mut disk = connect(&daemon, 2, vec![0; 64 * MIB]);
        disk.exercise(50 + round * 37, true);
        disk.flush();
        let kept = disk.model.clone();
        // Other clusters than those that are looked at afterwards.
        let free = (0..64 * MIB)
            .step_by(MIB)
            .find(|&at| kept[at..at + MIB].iter().all(|&b| b == 0));
        if let Some(at) = free {
            disk.write(at as u64, &pattern(100 << 10, round));
        }
        images.kill(daemon, "k");
        let (sound, report) = images.try_qemu_img(&["check", "k"]);
        // Leaked clusters are all that may be wrong.
        let leaked = report.contains("leaked clusters were found");
        let corrupt = report.contains("ERROR") || report.contains("corrupt");
        assert!(sound || (leaked && !corrupt), "{report}");
        images.qemu_img(&["convert", "-O", "raw", "k", "after"]);
        let after = fs::read(images.path("after")).unwrap();
        for (number, (kept, after)) in kept.chunks(MIB).zip(after.chunks(MIB)).enumerate() {
            assert!(
                kept == after || Some(number * MIB) == free,
                "MiB {number} of round {round}"
            );
        }
    }
}

#[test]
fn writes_in_writethrough_mode_survive_a_kill_without_a_flush() {
    let test = "writes_in_writethrough_mode_survive_a_kill_without_a_flush";
    let Some(images) = Images::new(test) else {
        return;
    };
    images.qemu_img(&["create", "-q", "-f", "qcow2", "w", "16M"]);
    let daemon = images.serve("w", &["--cache", "writethrough", "--queues", "2"]);
    let mut disk = connect(&daemon, 2, vec![0; 16 * MIB]);
    disk.exercise(150, true);
    let model = std::mem::take(&mut disk.model);
    images.kill(daemon, "w");
    images.raw("model", &model);
    images.qemu_img(&["compare", "-f", "raw", "-F", "qcow2", "model", "w"]);
}

#[test]
fn what_cannot_be_served_is_refused_with_a_reason() {
    let test = "what_cannot_be_served_is_refused_with_a_reason";
    let Some(images) = Images::new(test) else {
        return;
    };
    images.raw("r", &pattern(MIB, 0));
    assert!(images.refusal("r", &[]).contains("not a qcow2 image"));
    let create = ["create", "-q", "-f", "qcow2"];
    // Only its header says so (crypt_method at 32 is LUKS): to derive a real key takes seconds.
    images.qemu_img(&[&create[..], &["e", "1M"]].concat());
    let file = fs::File::options().write(true).open(images.path("e"));
    file.unwrap()
        .write_all_at(&2_u32.to_be_bytes(), 32)
        .unwrap();
    assert!(images.refusal("e", &[]).contains("encrypted"));
    images.qemu_img(&[&create[..], &["f", "-o", "data_file=data", "1M"]].concat());
    assert!(images.refusal("f", &[]).contains("data_file"));
    images.qemu_img(&[&create[..], &["x", "-o", "extended_l2=on", "1M"]].concat());
    assert!(images.refusal("x", &[]).contains("extended L2"));
    images.qemu_img(&[&create[..], &["b", "-b", "r", "-F", "raw"]].concat());
    assert!(
        images
            .refusal("b", &["--backing", "off"])
            .contains("--backing off")
    );
    images.serve("b", &[]).stop();
    images.qemu_img(&["rebase", "-u", "-b", "nbd://localhost/x", "-F", "raw", "b"]);
    assert!(images.refusal("b", &[]).contains("not a local path"));
    images.qemu_img(&["rebase", "-u", "-b", "r", "-F", "vmdk", "b"]);
    assert!(images.refusal("b", &[]).contains("only raw and qcow2"));
    images.qemu_img(&["rebase", "-u", "-b", "gone", "-F", "raw", "b"]);
    assert!(images.refusal("b", &[]).contains("does not exist"));
    // Two that are each other's backing file.
    images.qemu_img(&[&create[..], &["one", "1M"]].concat());
    images.qemu_img(&[&create[..], &["two", "-b", "one", "-F", "qcow2"]].concat());
    images.qemu_img(&["rebase", "-u", "-b", "two", "-F", "qcow2", "one"]);
    let log = images.refusal("two", &["--read-only"]);
    assert!(log.contains("backing files, or is its own"), "{log}");
    assert!(images.refusal("two", &[]).contains("in use"));
    // Marked as dirty, as QEMU leaves it when it is killed with lazy reference counts.
    images.qemu_img(&[&create[..], &["l", "-o", "lazy_refcounts=on", "1M"]].concat());
    images.serve("l", &[]).stop();
    let mut file = fs::File::options()
        .write(true)
        .open(images.path("l"))
        .unwrap();
    file.seek(SeekFrom::Start(79)).unwrap();
    file.write_all(&[1]).unwrap();
    assert!(images.refusal("l", &[]).contains("dirty bit"));
    images.qemu_img(&["check", "-q", "-r", "all", "l"]);
    images.serve("l", &[]).stop();
    // A raw disk that looks like an image is served as it is.
    file.set_len(1 << 20).unwrap();
    let path = images.path("l");
    let daemon = Daemon::start(BLK, &["--path", path.to_str().unwrap()]);
    assert!(daemon.log().contains("was --format qcow2 forgotten?"));
    daemon.stop();
}

#[test]
fn an_image_in_use_is_left_alone() {
    let test = "an_image_in_use_is_left_alone";
    let Some(images) = Images::new(test) else {
        return;
    };
    images.raw("base", &pattern(MIB, 0));
    images.qemu_img(&[
        "create", "-q", "-f", "qcow2", "u", "-b", "base", "-F", "raw",
    ]);
    let daemon = images.serve("u", &[]);
    assert!(
        images
            .refusal("u", &[])
            .contains("in use by another program")
    );
    assert!(!images.try_qemu_img(&["check", "u"]).0);
    // The backing file is read by both.
    images.qemu_img(&[
        "create", "-q", "-f", "qcow2", "v", "-b", "base", "-F", "raw",
    ]);
    let other = images.serve("v", &[]);
    other.stop();
    daemon.stop();
    images.qemu_img(&["check", "u"]);
}

/// One program after the other has the image, under a driver that does not stop. One that is refused when it has opened the image
/// to write it leaves it as it is.
#[test]
fn an_image_goes_from_program_to_program() {
    let Some(images) = Images::new("an_image_goes_from_program_to_program") else {
        return;
    };
    let base = pattern(4 * MIB, 3);
    images.raw("base", &base);
    images.qemu_img(&[
        "create",
        "-q",
        "-f",
        "qcow2",
        "-o",
        "cluster_size=4k",
        "-b",
        "base",
        "-F",
        "raw",
        "image",
    ]);
    let path = images.path("image");
    let args = [
        "--path",
        path.to_str().unwrap(),
        "--format",
        "qcow2",
        "--queues",
        "2",
    ];
    let mut daemon = Daemon::start_controlled(BLK, &args);
    let mut disk = connect(&daemon, 2, base);
    for upgrade in 0..20 {
        disk.load(60, true);
        if upgrade % 5 == 0 {
            let other = [&args[..], &["--physical-block-size", "8192"]].concat();
            let mut child = daemon.successor(BLK, &other);
            assert_eq!(child.wait().unwrap().code(), Some(1));
            let log = daemon.log();
            assert!(log.contains("configuration space"), "{log}");
            disk.load(60, true);
        }
        daemon.upgrade(BLK, &args);
    }
    assert!(images.refusal("image", &[]).contains("in use by another"));
    disk.exercise(60, true);
    disk.verify();
    daemon.stop();
    images.same("image", &disk.model);
}

fn open(path: &Path) -> Result<blk::Disk, blk::DiskError> {
    blk::Disk::open(&DiskOptions {
        taken: None,
        path: path.to_owned(),
        read_only: false,
        direct: false,
        block_size: None,
        lock: Lock::Always,
        lock_wait: Duration::ZERO,
        format: Format::Qcow2,
        backing: true,
        patience: Duration::ZERO,
    })
}

#[test]
fn damaged_headers_and_tables_are_no_reason_to_panic() {
    let test = "damaged_headers_and_tables_are_no_reason_to_panic";
    let Some(images) = Images::new(test) else {
        return;
    };
    images.raw("plain", &pattern(MIB, 0));
    images.qemu_img(&[
        "convert",
        "-O",
        "qcow2",
        "-o",
        "cluster_size=4k",
        "plain",
        "good",
    ]);
    let good = fs::read(images.path("good")).unwrap();
    let mut random = 88_172_645_463_325_252_u64;
    let mut next = || {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        random
    };
    let mut opened = 0;
    for round in 0..600 {
        let mut bad = good.clone();
        // The header and its extensions, then tables.
        let area = if round % 2 == 0 { 120 } else { 5 * 4096 };
        for _ in 0..1 + next() % 3 {
            let at = next() as usize % area;
            bad[at] = match next() % 3 {
                0 => 0xff,
                1 => 0,
                _ => next() as u8,
            };
        }
        if next() % 8 == 0 {
            bad.truncate(next() as usize % good.len());
        }
        images.raw("bad", &bad);
        match open(&images.path("bad")) {
            Ok(_) => opened += 1,
            Err(e) => assert!(!e.to_string().is_empty()),
        }
    }
    assert!(opened > 0);
    // The whole disk of some is read and written.
    for round in 0..8 {
        let mut bad = good.clone();
        for _ in 0..8 {
            let at = 4096 + next() as usize % (6 * 4096);
            bad[at] = next() as u8;
        }
        images.raw("bad", &bad);
        if open(&images.path("bad")).is_err() {
            continue;
        }
        let daemon = images.serve("bad", &[]);
        let mut front = FrontEnd::new(&daemon.socket(), Setup::default());
        for sector in (0..2048_u64).step_by(64) {
            let head = front.guest.alloc(16, 16);
            let data = front.guest.alloc(32768, 4096);
            let status = front.guest.alloc(1, 1);
            let mut header = [0; 16];
            header[0] = ((sector / 64 + round) % 2) as u8;
            header[8..].copy_from_slice(&sector.to_le_bytes());
            vm_memory::Bytes::write_slice(&front.guest.memory, &header, head).unwrap();
            let segment = |addr, len| ringside_rings::Segment::new(addr, len);
            let (mut readable, mut writable) = (vec![segment(head, 16)], vec![segment(status, 1)]);
            if header[0] == 0 {
                writable.insert(0, segment(data, 32768));
            } else {
                readable.push(segment(data, 32768));
            }
            front.queues[0].submit(&front.guest, &readable, &writable, sector);
            front.complete(0);
        }
        drop(front);
        daemon.stop();
    }
}

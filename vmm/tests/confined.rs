//! What somebody finds who has taken the VMM over: a process confines itself as the program does, and then does what an intruder
//! would.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)] // a test

#[path = "../../backends/sandbox/tests/intruder/mod.rs"]
mod intruder;

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::symlink;
use std::sync::OnceLock;

use clap::Parser;
use intruder::{
    Attempt, ENDED, LISTEN, OTHER_SOCKETS, REFUSED, Services, TO_OTHER_PORT, TO_PORT, TO_SOCKET,
    Victim, but, call, ends, fails, intrude, landlock, services,
};
use ringside_sandbox::ThreadKind;
use ringside_vmm::config::{Cli, Config, FileOptions};
use ringside_vmm::confine::confine;
use ringside_vmm::snapshot::{Folder, Outgoing};

/// Besides, on the thread of a processor.
const ENDED_ON_PROCESSORS: &[(&str, Attempt)] = &[
    ("listen to clients", || call(libc::SYS_accept4, [0, 0, 0])),
    ("share memory", || call(libc::SYS_memfd_create, [0, 0, 0])),
    ("resize a file", || call(libc::SYS_ftruncate, [0, 0, 0])),
];

/// What a VMM has open that makes snapshots.
static FOLDER: OnceLock<Folder> = OnceLock::new();

/// What it does.
const SNAPSHOTS: &[(&str, Attempt)] = &[
    ("write a snapshot", || {
        let folder = services().dir.join("snapshots");
        let (partial, whole) = (folder.join(".new.partial"), folder.join("new"));
        File::create(&partial)?.write_all(b"memory")?;
        fs::rename(&partial, &whole)?;
        fs::remove_file(whole)
    }),
    ("begin a snapshot where one was broken off", || {
        let begun = Outgoing::create(FOLDER.get().unwrap(), "broken");
        begun.map(drop).map_err(io::Error::other)
    }),
    ("write over a snapshot", || {
        let path = services().dir.join("snapshots/kept");
        File::options().write(true).open(path)?.write_all(b"memory")
    }),
];

/// And what it does not: other files, and others' eyes.
const OTHER_FILES: &[(&str, Attempt)] = &[
    ("read a snapshot", || {
        File::open(services().dir.join("snapshots/kept")).map(drop)
    }),
    ("list snapshots", || {
        File::open(services().dir.join("snapshots")).map(drop)
    }),
    ("put a snapshot elsewhere", || {
        File::create(services().dir.join("other/new")).map(drop)
    }),
];

/// Which takes calls that processors do not have.
const REMOVED: &[(&str, Attempt)] = &[("remove another file", || {
    fs::remove_file(services().dir.join("other/kept"))
})];

/// Which Landlock answers as the file system does that cannot do it.
const MOVED: &[(&str, Attempt)] = &[("move a snapshot away", || {
    let dir = &services().dir;
    fs::rename(dir.join("snapshots/kept"), dir.join("other/moved"))
})];

/// What no VMM does in a folder.
const OTHER_KINDS: &[(&str, Attempt)] = &[
    ("make a directory", || {
        fs::create_dir(services().dir.join("snapshots/new"))
    }),
    ("make a link", || {
        symlink("/etc/passwd", services().dir.join("snapshots/new"))
    }),
    ("cut another file off", || {
        let path = services().dir.join("other/kept");
        let path = std::ffi::CString::new(path.as_os_str().as_encoded_bytes())?;
        call(libc::SYS_truncate, [path.as_ptr().addr(), 0, 0])
    }),
];

fn confine_profile(profile: &str) {
    let mut args = ["x", "--kernel=/dev/null", "--blk=socket=/run/none"]
        .map(String::from)
        .to_vec();
    match profile {
        "vfio" => {
            args.extend(["--vfio=0000:00:01.0", "--api-socket=/tmp/none"].map(String::from));
        }
        "moves-unix" => {
            args.push(format!(
                "--migrate-to=unix:{}",
                services().socket().display()
            ));
        }
        "moves-tcp" => args.push(format!("--migrate-to=tcp:127.0.0.1:{}", services().port)),
        "snapshots" => {
            let folder = services().dir.join("snapshots");
            args.push(format!("--snapshots={}", folder.display()));
            FOLDER.get_or_init(|| Folder::open(&folder).unwrap());
        }
        _ => {}
    }
    let config = Config::new(Cli::parse_from(args), FileOptions::default()).unwrap();
    confine(&config).unwrap();
}

/// The other side of [`intruder::attempt`].
#[test]
fn intruder() {
    let kinds = [("processor", ThreadKind::Processor)];
    let more = [
        ENDED_ON_PROCESSORS,
        SNAPSHOTS,
        OTHER_FILES,
        REMOVED,
        MOVED,
        OTHER_KINDS,
    ];
    intrude(confine_profile, &kinds, &more.concat());
}

#[test]
fn who_takes_the_vmm_over_gets_nowhere() {
    for profile in ["plain", "vfio"] {
        for thread in ["control", "processor"] {
            ends(profile, thread, ENDED);
            // It opens files when it is confined already, and Landlock says which.
            if landlock(1) {
                fails(profile, thread, REFUSED);
            }
        }
        ends(profile, "processor", ENDED_ON_PROCESSORS);
    }
}

/// A directory with the services, and one for snapshots; a file in that, and one elsewhere.
fn directory() -> (tempfile::TempDir, Services) {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let services = Services::start(dir.path(), |_| Ok(()));
    fs::create_dir(dir.path().join("snapshots")).unwrap();
    for kept in ["snapshots/kept", "snapshots/.broken.partial", "other/kept"] {
        fs::write(dir.path().join(kept), "kept").unwrap();
    }
    (dir, services)
}

#[test]
fn who_takes_a_vmm_over_that_may_move_its_guest_reaches_that_place_alone() {
    let test = "who_takes_a_vmm_over_that_may_move_its_guest_reaches_that_place_alone";
    let (_dir, services) = directory();
    for thread in ["control", "processor"] {
        let victim = |profile| Victim {
            profile,
            thread,
            services: Some(&services),
        };
        let others = [LISTEN, OTHER_SOCKETS].concat();
        let unix = victim("moves-unix");
        unix.ends(ENDED);
        unix.ends(&others);
        unix.does(TO_SOCKET);
        let tcp = victim("moves-tcp");
        tcp.ends(&others);
        if thread == "processor" {
            unix.ends(ENDED_ON_PROCESSORS);
            tcp.ends(ENDED_ON_PROCESSORS);
        }
        if thread == "control" {
            tcp.ends(&but(ENDED, &["connect out"]));
            tcp.does(TO_PORT);
        } else {
            tcp.ends(&[ENDED, TO_PORT].concat());
        }
        // That it connects to Unix sockets is for its back-ends, of which any may be replaced.
        for victim in [unix, tcp] {
            victim.keeps_from_other_sockets(|why| {
                let _ = writeln!(io::stderr(), "test {test}: skipped: {why}");
            });
            if landlock(1) {
                victim.fails(REFUSED);
            }
        }
        if thread == "control" && landlock(4) {
            tcp.fails(TO_OTHER_PORT);
        }
    }
}

#[test]
fn who_takes_a_vmm_over_that_makes_snapshots_writes_snapshots_alone() {
    let (_dir, services) = directory();
    let victim = |thread| Victim {
        profile: "snapshots",
        thread,
        services: Some(&services),
    };
    let (control, processor) = (victim("control"), victim("processor"));
    for victim in [control, processor] {
        victim.ends(&[ENDED, OTHER_KINDS].concat());
        if landlock(1) {
            victim.fails(&[REFUSED, OTHER_FILES].concat());
        }
    }
    control.does(SNAPSHOTS);
    processor.ends(&[ENDED_ON_PROCESSORS, REMOVED, MOVED].concat());
    if landlock(1) {
        control.fails(REMOVED);
        control.does_not(MOVED);
    }
}

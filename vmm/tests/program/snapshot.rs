//! A guest that goes on from a snapshot, and what is not taken for one.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command};
use std::time::Instant;

use super::control::ask;
use super::guest::*;
use super::testing::has_kvm;

/// Answers each byte on its serial port with a digit: how many there were, which it keeps at 4 MiB.
fn counter() -> Vec<u8> {
    let mut code = out_byte(0x3f9, 1);
    code.extend(out_byte(0x3fc, 8));
    code.extend([
        0xbe, 0x00, 0x00, 0x40, 0x00, // mov esi, 0x400000
        0x66, 0xba, 0xfd, 0x03, // mov dx, 0x3fd
        0xec, // in al, dx
        0xa8, 0x01, // test al, 1
        0x74, 0xf7, // jz back to mov dx
        0x66, 0xba, 0xf8, 0x03, // mov dx, 0x3f8
        0xec, // in al, dx
        0xfe, 0x06, // inc byte [esi]
        0x8a, 0x06, // mov al, [esi]
        0x04, b'0', // add al, '0'
        0xee, // out dx, al
        0xeb, 0xe9, // jmp back to mov dx
    ]);
    code
}

fn command(dir: &Path, name: &str) -> Command {
    let mut command = vmm();
    command
        .arg("--memory=size=64M,max=192M")
        .arg("--api-socket")
        .arg(dir.join(name))
        .arg(format!("--serial=socket={name}.console"))
        .arg("--snapshots=snapshots")
        .current_dir(dir);
    command
}

struct Vm {
    child: Child,
    console: UnixStream,
}

impl Vm {
    /// A machine with this name's sockets, which boots or goes on as `origin` says.
    fn start(dir: &Path, name: &str, origin: [&Path; 2]) -> Self {
        let child = command(dir, name).args(origin).spawn().unwrap();
        wait_for_thread(&child, "vcpu 0");
        Self::at_console(dir, name, child)
    }

    /// One that runs.
    fn at_console(dir: &Path, name: &str, child: Child) -> Self {
        let console = dir.join(format!("{name}.console"));
        let start = Instant::now();
        let console = loop {
            match UnixStream::connect(&console) {
                Ok(console) => break console,
                Err(error) => assert!(start.elapsed() < LIMIT, "{error}"),
            }
        };
        console.set_read_timeout(Some(LIMIT)).unwrap();
        Self { child, console }
    }

    fn count(&mut self) -> u8 {
        self.console.write_all(b"x").unwrap();
        let mut answer = [0];
        self.console.read_exact(&mut answer).unwrap();
        answer[0]
    }
}

#[test]
fn a_guest_goes_on_from_a_snapshot() {
    if !has_kvm("a_guest_goes_on_from_a_snapshot") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let folder = dir.join("snapshots");
    std::fs::create_dir(&folder).unwrap();
    let kernel = kernel(dir, &counter());
    let mut before = Vm::start(dir, "before", [Path::new("--kernel"), &kernel]);
    assert_eq!(before.count(), b'1');
    let control = dir.join("before");
    assert_eq!(status(&ask(&control, &["memory-add", "128M"])), 0);
    let answer = ask(&control, &["snapshot", "one"]);
    assert_eq!(status(&answer), 0, "{answer:?}");
    // It goes on.
    assert_eq!(before.count(), b'2');
    for (request, message) in [
        (
            &["snapshot", "one"][..],
            "there is a snapshot `one` already",
        ),
        (&["snapshot", "../one"], "no name for a snapshot"),
        (&["snapshot", ".one"], "no name for a snapshot"),
    ] {
        let answer = ask(&control, request);
        assert_eq!(status(&answer), 1, "{answer:?}");
        assert!(text(&answer.stderr).contains(message), "{answer:?}");
    }
    let answer = ask(&control, &["snapshot", "two", "--stop"]);
    assert_eq!(status(&answer), 0, "{answer:?}");
    assert_eq!(status(&finish(before.child)), 0);

    for (name, next) in [("one", b'2'), ("two", b'3'), ("one", b'2')] {
        let file = folder.join(name);
        let mut after = Vm::start(dir, "after", [Path::new("--restore"), &file]);
        assert_eq!(after.count(), next);
        let control = dir.join("after");
        let shown = text(&ask(&control, &["status"]).stdout);
        assert!(shown.contains("memory=201326592"), "{shown}");
        assert_eq!(status(&ask(&control, &["power-off"])), 0);
        assert_eq!(status(&finish(after.child)), 0);
    }
    what_is_no_such_snapshot_is_refused(dir, &folder.join("one"));
}

fn what_is_no_such_snapshot_is_refused(dir: &Path, good: &Path) {
    let refused = |file: &Path, arguments: &[&str], message: &str| {
        let child = vmm()
            .arg("--restore")
            .arg(file)
            .args(arguments)
            .spawn()
            .unwrap();
        let output = finish(child);
        let said = text(&output.stderr);
        assert_eq!(status(&output), 1, "{said}");
        assert!(said.contains(message), "{arguments:?}: {said}");
    };
    let same = ["--memory=size=64M,max=192M", "--hotplug-ports=2"];
    refused(
        good,
        &["--hotplug-ports=2"],
        "64 MiB of memory, but this one has 512 MiB",
    );
    refused(good, &same[..1], "2 hot-plug slots, but this one has 0");
    refused(
        good,
        &[same[0], same[1], "--cpus=2"],
        "1 CPUs, but this one has 2 CPUs",
    );
    refused(&dir.join("none"), &same, "cannot open the snapshot");
    refused(&dir.join("kernel"), &same, "this is no snapshot");
    let bytes = std::fs::read(good).unwrap();
    let bad = dir.join("bad");
    let changed = |at: usize| {
        let mut bytes = bytes.clone();
        bytes[at] ^= 0x40;
        std::fs::write(&bad, bytes).unwrap();
    };
    changed(8);
    refused(&bad, &same, "has version 65, but this VMM reads version 1");
    changed(bytes.len() / 2);
    refused(&bad, &same, "the snapshot is damaged");
    std::fs::write(&bad, &bytes[..bytes.len() - 1]).unwrap();
    refused(&bad, &same, "the snapshot is cut short");
}

/// Waits until a program listens for a guest: the socket's file is there a moment before.
fn wait_for_listener(child: &Child) {
    let start = Instant::now();
    let listens = || {
        let table = std::fs::read_to_string("/proc/net/unix").unwrap();
        let descriptors = std::fs::read_dir(format!("/proc/{}/fd", child.id())).unwrap();
        let own: Vec<_> = descriptors
            .filter_map(|entry| std::fs::read_link(entry.ok()?.path()).ok())
            .collect();
        // Number, counter, protocol, flags (one says that it listens), type, state, inode, path.
        table.lines().any(|row| {
            let columns: Vec<_> = row.split_whitespace().collect();
            columns.len() == 8
                && (columns[3], columns[7]) == ("00010000", "move")
                && own.contains(&format!("socket:[{}]", columns[6]).into())
        })
    };
    while !listens() {
        assert!(start.elapsed() < LIMIT, "nobody listens for a guest");
        std::thread::sleep(std::time::Duration::from_millis(2));
    }
}

#[test]
fn a_guest_moves_while_it_runs() {
    if !has_kvm("a_guest_moves_while_it_runs") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    std::fs::create_dir(dir.join("snapshots")).unwrap();
    let kernel = kernel(dir, &counter());
    let child = command(dir, "from")
        .arg("--kernel")
        .arg(kernel)
        .args(["--migrate-to=unix:move", "--migrate-to=tcp:127.0.0.1:9"])
        .spawn()
        .unwrap();
    wait_for_thread(&child, "vcpu 0");
    let mut from = Vm::at_console(dir, "from", child);
    let control = dir.join("from");
    assert_eq!(from.count(), b'1');
    assert_eq!(status(&ask(&control, &["memory-add", "128M"])), 0);
    for (to, message) in [
        (
            "unix:elsewhere",
            "started without --migrate-to unix:elsewhere",
        ),
        ("move", "neither unix:PATH nor tcp:"),
        ("unix:move", "does a ringside-vmm wait there"),
        ("tcp:127.0.0.1:9", "does a ringside-vmm wait there"),
    ] {
        let answer = ask(&control, &["migrate", to]);
        assert_eq!(status(&answer), 1, "{answer:?}");
        assert!(text(&answer.stderr).contains(message), "{answer:?}");
    }
    // One that is not like it does not take it, and it stays.
    let other = command(dir, "other")
        .args(["--incoming=unix:move", "--cpus=2"])
        .spawn()
        .unwrap();
    wait_for_listener(&other);
    let answer = ask(&control, &["migrate", "unix:move"]);
    assert_eq!(status(&answer), 1, "{answer:?}");
    let output = finish(other);
    assert_eq!(status(&output), 1);
    assert!(
        text(&output.stderr).contains("1 CPUs, but this one has 2 CPUs"),
        "{output:?}"
    );
    assert_eq!(from.count(), b'2');

    let child = command(dir, "to")
        .arg("--incoming=unix:move")
        .spawn()
        .unwrap();
    wait_for_listener(&child);
    let answer = ask(&control, &["migrate", "unix:move"]);
    assert_eq!(status(&answer), 0, "{answer:?}");
    assert!(
        text(&answer.stdout).contains("downtime-milliseconds="),
        "{answer:?}"
    );
    assert_eq!(status(&finish(from.child)), 0);
    let mut to = Vm::at_console(dir, "to", child);
    assert_eq!(to.count(), b'3');
    assert_eq!(status(&ask(&dir.join("to"), &["power-off"])), 0);
    assert_eq!(status(&finish(to.child)), 0);
}

/// What comes over a connection is believed no more than what is in a file.
#[test]
fn who_is_no_vmm_is_heard_no_further() {
    if !has_kvm("who_is_no_vmm_is_heard_no_further") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    std::fs::create_dir(dir.join("snapshots")).unwrap();
    for (said, message) in [
        (&b"GET / HTTP/1.1\r\n\r\n"[..], "this is no snapshot"),
        (b"RINGSIDE\x01\0\0\0", "the VMM that has the guest keeps it"),
        (
            b"RINGSIDE\x01\0\0\0\x01\0\0\0\xff\xff\xff\xff\0\0\0\0",
            "damaged",
        ),
    ] {
        let child = command(dir, "to")
            .arg("--incoming=unix:move")
            .spawn()
            .unwrap();
        let socket = dir.join("move");
        wait_for_listener(&child);
        let mut stream = UnixStream::connect(&socket).unwrap();
        stream.write_all(said).unwrap();
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        let output = finish(child);
        assert_eq!(status(&output), 1);
        assert!(text(&output.stderr).contains(message), "{output:?}");
        assert!(!socket.exists());
    }
}

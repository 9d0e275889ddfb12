//! The control socket, through the program that speaks with it; and functions of the host that cannot be had.

use std::ffi::OsString;
use std::io::{self, Write};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{ExitStatus, Output};

use ringside_control::ctl;

use super::confinement;
use super::guest::*;
use super::testing::has_kvm;

pub(crate) fn ask(socket: &Path, arguments: &[&str]) -> Output {
    let words = ["ringside-ctl", "--socket"].map(OsString::from);
    let words = words.into_iter().chain([socket.into()]);
    let words = words.chain(arguments.iter().map(OsString::from));
    let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
    let status = ctl::run(words, &mut stdout, &mut stderr);
    Output {
        status: ExitStatus::from_raw(i32::from(status) << 8),
        stdout,
        stderr,
    }
}

#[test]
fn a_machine_is_asked_and_ended() {
    if !has_kvm("a_machine_is_asked_and_ended") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("api");
    let child = vmm()
        .arg("--kernel")
        .arg(kernel(dir.path(), &SPIN))
        .arg("--memory=size=64M,max=320M")
        .arg("--api-socket")
        .arg(&socket)
        .spawn()
        .unwrap();
    wait_for_thread(&child, "vcpu 0");
    let answer = ask(&socket, &["memory-add", "128M"]);
    assert_eq!(text(&answer.stdout), "added=134217728\nmemory=201326592\n");
    let answer = ask(&socket, &["status"]);
    assert_eq!(status(&answer), 0, "{answer:?}");
    let shown = text(&answer.stdout);
    assert!(
        shown.contains("state=running") && shown.contains("cpus=1"),
        "{shown}"
    );
    assert!(shown.contains("memory=201326592"), "{shown}");
    let answer = ask(&socket, &["--json", "device-list"]);
    assert_eq!(
        text(&answer.stdout).replace(char::is_whitespace, ""),
        "{\"devices\":[]}"
    );
    for (request, state) in [("pause", "state=paused"), ("resume", "state=running")] {
        assert_eq!(status(&ask(&socket, &[request])), 0);
        let shown = ask(&socket, &["status"]);
        assert!(text(&shown.stdout).contains(state), "{shown:?}");
    }
    for (request, message) in [
        (&["resume"][..], "the machine is not paused"),
        (&["device-remove", "nic"], "no device `nic`"),
        (&["device-add", "nic"], "not a PCI address"),
        (&["memory-add", "much"], "`much` is not a size"),
        (&["memory-add", "64M"], "give a multiple of 128 MiB"),
        (&["memory-add", "1G"], "128 MiB are left"),
        (
            &["device-add", "ffff:ff:1f.7,speed=9"],
            "unknown field `speed`",
        ),
        // Whether there is no such function, no PCI or no VFIO on this machine.
        (&["device-add", "ffff:ff:1f.7"], "ringside-ctl: "),
    ] {
        let answer = ask(&socket, request);
        assert_eq!(status(&answer), 1, "{answer:?}");
        assert!(text(&answer.stderr).contains(message), "{answer:?}");
    }
    assert_eq!(status(&ask(&socket, &["power-off"])), 0);
    let output = finish(child);
    assert_eq!(status(&output), 0, "{output:?}");
    assert!(!socket.exists());
    let answer = ask(&socket, &["status"]);
    assert_eq!(status(&answer), 1);
    assert!(text(&answer.stderr).contains("--api-socket"), "{answer:?}");
    assert_eq!(status(&ask(&socket, &["fly"])), 2);
}

/// As the kernel says.
#[test]
fn all_threads_are_confined_while_a_guest_runs() {
    let test = "all_threads_are_confined_while_a_guest_runs";
    if !has_kvm(test) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut child = vmm()
        .args(["--cpus", "2", "--kernel"])
        .arg(kernel(dir.path(), &SPIN))
        .spawn()
        .unwrap();
    wait_for_thread(&child, "vcpu 0");
    let skip = |why: &str| {
        let _ = writeln!(io::stderr(), "test {test}: skipped: {why}");
    };
    confinement::is_confined(child.id(), 0, skip);
    confinement::are_narrowed(child.id(), &["vcpu 0", "vcpu 1"], skip);
    confinement::is_in_no_dump(child.id(), "guest-ram", skip);
    child.kill().unwrap();
    child.wait().unwrap();
}

#[test]
fn functions_that_are_not_there_end_it_with_a_message() {
    if !has_kvm("functions_that_are_not_there_end_it_with_a_message") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut command = vmm();
    command.arg("--kernel").arg(kernel(dir.path(), &POWER_OFF));
    let output = finish(command.arg("--vfio=ffff:ff:1f.7").spawn().unwrap());
    assert_eq!(status(&output), 1, "{output:?}");
    let message = text(&output.stderr);
    let known = ["ffff:ff:1f.7", "has this machine PCI", "/dev/vfio/vfio"];
    assert!(known.iter().any(|part| message.contains(part)), "{message}");
}

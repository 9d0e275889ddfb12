//! The program as a user runs it, with guests of a few instructions: exit statuses, messages, the
//! serial port. Guests need /dev/kvm, but not one that can boot Linux.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "helpers of tests; a panic is the way to fail"
)]

mod back_end;
#[path = "../../../backends/sandbox/tests/confinement/mod.rs"]
mod confinement;
mod control;
mod guest;
mod snapshot;
#[path = "../../src/testing.rs"]
mod testing;

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::{Output, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;

use guest::*;
use testing::has_kvm;

/// Sends back what it receives, until a `q`, then powers off.
fn echo() -> Vec<u8> {
    // Receive interrupt on, interrupt line connected.
    let mut code = [out_byte(0x3f9, 1), out_byte(0x3fc, 8)].concat();
    code.extend([
        0x66, 0xba, 0xfd, 0x03, // wait: mov dx, 0x3fd
        0xec, // in al, dx
        0xa8, 0x01, // test al, 1
        0x74, 0xf7, // jz wait
        0x66, 0xba, 0xf8, 0x03, // mov dx, 0x3f8
        0xec, // in al, dx
        0xee, // out dx, al
        0x3c, b'q', // cmp al, 'q'
        0x75, 0xed, // jne wait
    ]);
    code.extend(POWER_OFF);
    code
}

fn run(code: &[u8]) -> Output {
    let dir = tempfile::tempdir().unwrap();
    let kernel = kernel(dir.path(), code);
    finish(vmm().arg("--kernel").arg(kernel).spawn().unwrap())
}

#[test]
fn each_end_has_its_own_status() {
    if !has_kvm("each_end_has_its_own_status") {
        return;
    }
    for (code, expected, message) in [
        (POWER_OFF.to_vec(), 0, ""),
        (out_byte(0xcf9, 6), 3, ""),
        (out_byte(0x64, 0xfe), 3, ""),
        (out_byte(0x505, 1), 4, "the guest's kernel panicked"),
        // lidt of an empty table at 3 MiB; ud2
        (
            vec![0x0f, 0x01, 0x1d, 0, 0, 0x30, 0, 0x0f, 0x0b],
            5,
            "triple fault, on CPU 0",
        ),
    ] {
        let output = run(&[print("hello"), code].concat());
        assert_eq!(status(&output), expected, "{output:?}");
        assert_eq!(text(&output.stdout), "hello");
        assert!(text(&output.stderr).contains(message), "{output:?}");
        assert!(
            !message.is_empty() || output.stderr.is_empty(),
            "{output:?}"
        );
    }
}

/// Runs the program with each command line, which has to end it with this status and message.
fn assert_refused(cases: &[(&[&str], i32, &str)]) {
    for (args, expected, message) in cases {
        let output = finish(vmm().args(*args).spawn().unwrap());
        assert_eq!(status(&output), *expected, "{args:?}: {output:?}");
        assert!(
            text(&output.stderr).contains(message),
            "{args:?}: {output:?}"
        );
        assert!(output.stdout.is_empty(), "{args:?}: {output:?}");
    }
}

#[test]
fn mistakes_have_a_message_and_a_status() {
    let dir = tempfile::tempdir().unwrap();
    let wrong_config = dir.path().join("wrong.toml");
    std::fs::write(&wrong_config, "cpuz = 4").unwrap();
    let wrong_config = wrong_config.to_str().unwrap();
    assert_refused(&[
        (&[], 2, "no kernel given"),
        (&["--kernel"], 2, "a value is required"),
        (&["--bogus"], 2, "unexpected argument"),
        (&["--kernel", "x", "--cpus", "0"], 2, "cannot have 0 CPUs"),
        (
            &["--kernel", "x", "--cpus", "1000"],
            2,
            "cannot have 1000 CPUs",
        ),
        (&["--kernel", "x", "--memory", "0"], 2, "too small"),
        (
            &["--kernel", "x", "--memory", "100000000T"],
            2,
            "more than any machine has",
        ),
        (&["--kernel", "x", "--log-level", "=,="], 2, "--log-level"),
        (
            &["--kernel", "x", "--config", "/no/such.toml"],
            1,
            "cannot read the configuration",
        ),
        (&["--config", wrong_config], 2, "unknown field `cpuz`"),
        (
            &["--kernel", "x", "--blk", "num-queues=1"],
            2,
            "missing field `socket`",
        ),
    ]);
}

#[test]
fn what_a_machine_cannot_be_made_of_has_a_message_and_a_status() {
    if !has_kvm("what_a_machine_cannot_be_made_of_has_a_message_and_a_status") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let good = kernel(dir.path(), &POWER_OFF);
    let good = good.to_str().unwrap();
    let not_a_kernel = dir.path().join("text");
    std::fs::write(&not_a_kernel, "hello").unwrap();
    let not_a_kernel = not_a_kernel.to_str().unwrap();
    let nobody = dir.path().join("nobody");
    let socket = format!("socket={},reconnect-timeout=0", nobody.display());
    let no_back_end = format!(
        "no back-end for device blk at {}: is it running? (waited 0 s): No such file",
        nobody.display()
    );
    assert_refused(&[
        (
            &["--kernel", good, "--memory", "900T"],
            1,
            "more than this host's memory",
        ),
        (
            &["--kernel", "/no/such/file"],
            1,
            "cannot read the kernel /no/such/file: No such file",
        ),
        (&["--kernel", not_a_kernel], 1, "is not a kernel"),
        (
            &["--kernel", good, "--initramfs", "/no/such"],
            1,
            "cannot read the initial RAM disk",
        ),
        (
            &["--kernel", good, "--serial", "file=/no/such/log"],
            1,
            "serial port's output file",
        ),
        (&["--kernel", good, "--blk", &socket], 1, &no_back_end),
    ]);
}

#[test]
fn help_and_version_are_no_mistakes() {
    let output = finish(vmm().arg("--help").spawn().unwrap());
    assert_eq!(status(&output), 0);
    for word in [
        "Exit status",
        "Ctrl-A x",
        "--vhost-user",
        "reconnect-timeout",
    ] {
        assert!(text(&output.stdout).contains(word), "{word}");
    }
    let output = finish(vmm().arg("--version").spawn().unwrap());
    assert_eq!(
        text(&output.stdout),
        format!("ringside-vmm {}\n", env!("CARGO_PKG_VERSION"))
    );
}

#[test]
fn a_configuration_file_is_enough() {
    if !has_kvm("a_configuration_file_is_enough") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let kernel = kernel(dir.path(), &[print("x"), POWER_OFF.to_vec()].concat());
    let (config, log) = (dir.path().join("vm.toml"), dir.path().join("log"));
    let content = format!(
        "kernel = {kernel:?}\ncpus = 3\nserial = 'file={}'\n[memory]\nsize = '64M'\nprefault = true",
        log.display()
    );
    std::fs::write(&config, content).unwrap();
    let output = finish(vmm().arg("--config").arg(config).spawn().unwrap());
    assert_eq!(status(&output), 0, "{output:?}");
    assert_eq!(std::fs::read(log).unwrap(), b"x");
}

#[test]
fn input_from_a_pipe_arrives_complete() {
    if !has_kvm("input_from_a_pipe_arrives_complete") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let kernel = kernel(dir.path(), &echo());
    let mut child = vmm()
        .arg("--kernel")
        .arg(kernel)
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    // More than any FIFO on the way holds, and with the escape key, which is for terminals only.
    let mut input: Vec<u8> = (0..2000u32)
        .map(|i| b'A' + u8::try_from(i % 26).unwrap())
        .collect();
    input.extend(b"\x01x\x01q");
    child.stdin.take().unwrap().write_all(&input).unwrap();
    let output = finish(child);
    assert_eq!(status(&output), 0, "{output:?}");
    assert_eq!(output.stdout, input);
}

#[test]
fn a_socket_is_a_serial_line() {
    if !has_kvm("a_socket_is_a_serial_line") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let kernel = kernel(dir.path(), &echo());
    let path = dir.path().join("serial");
    // Left behind by a process that died.
    drop(UnixListener::bind(&path).unwrap());
    let serial = format!("socket={}", path.display());
    let child = vmm()
        .arg("--kernel")
        .arg(kernel)
        .args(["--serial", &serial])
        .spawn()
        .unwrap();
    let start = Instant::now();
    let mut client = loop {
        match UnixStream::connect(&path) {
            Ok(client) => break client,
            Err(_) if start.elapsed() < LIMIT => std::thread::sleep(Duration::from_millis(2)),
            Err(error) => panic!("{error}"),
        }
    };
    client.write_all(b"abcq").unwrap();
    let mut answer = [0; 4];
    client.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"abcq");
    assert_eq!(status(&finish(child)), 0);
    assert!(!path.exists());
}

#[test]
fn signals_end_it_in_order() {
    if !has_kvm("signals_end_it_in_order") {
        return;
    }
    for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP] {
        let dir = tempfile::tempdir().unwrap();
        let kernel = kernel(dir.path(), &[print("up"), SPIN.to_vec()].concat());
        let path = dir.path().join("log");
        let serial = format!("file={}", path.display());
        let child = vmm()
            .arg("--kernel")
            .arg(kernel)
            .args(["--cpus", "4", "--serial", &serial])
            .spawn()
            .unwrap();
        let start = Instant::now();
        while std::fs::read(&path).unwrap_or_default() != b"up" {
            assert!(start.elapsed() < LIMIT, "the guest does not start");
            std::thread::sleep(Duration::from_millis(2));
        }
        let output = terminate(child, signal);
        assert_eq!(status(&output), 0, "{output:?}");
        assert!(output.stderr.is_empty(), "{output:?}");
    }
}

#[test]
fn signals_end_it_while_it_waits_for_a_back_end() {
    if !has_kvm("signals_end_it_while_it_waits_for_a_back_end") {
        return;
    }
    for signal in [Signal::SIGTERM, Signal::SIGINT] {
        let dir = tempfile::tempdir().unwrap();
        let kernel = kernel(dir.path(), &POWER_OFF);
        let path = dir.path().join("disk");
        let disk = format!("socket={},reconnect-timeout=3600", path.display());
        let spawn = || {
            let mut command = vmm();
            command.arg("--kernel").arg(&kernel).args(["--blk", &disk]);
            command.spawn().unwrap()
        };
        let child = spawn();
        wait_for_thread(&child, "builder");
        let output = terminate(child, signal);
        assert_eq!(status(&output), 0, "{output:?}");
        assert!(output.stderr.is_empty(), "{output:?}");

        let listener = UnixListener::bind(&path).unwrap();
        let child = spawn();
        let mut silent = listener.accept().unwrap().0;
        silent.read_exact(&mut [0; 12]).unwrap();
        let start = Instant::now();
        let output = terminate(child, signal);
        assert_eq!(status(&output), 0, "{output:?}");
        assert!(start.elapsed() < Duration::from_secs(5));
    }
}

#[test]
fn a_reader_that_stops_does_not_keep_it_from_ending() {
    if !has_kvm("a_reader_that_stops_does_not_keep_it_from_ending") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    // mov dx, 0x3f8; again: out dx, al; jmp again
    let code = [0x66, 0xba, 0xf8, 0x03, 0xee, 0xeb, 0xfd];
    let kernel = kernel(dir.path(), &code);
    let mut child = vmm().arg("--kernel").arg(kernel).spawn().unwrap();
    let mut stdout = child.stdout.take().unwrap();
    let mut byte = [0];
    stdout.read_exact(&mut byte).unwrap();
    // Time to fill the pipe, as far as this machine gets; it has to end in either case.
    std::thread::sleep(Duration::from_secs(1));
    assert_eq!(status(&terminate(child, Signal::SIGTERM)), 0);
}

#[test]
fn a_terminal_is_raw_until_the_escape_key_ends_it() {
    if !has_kvm("a_terminal_is_raw_until_the_escape_key_ends_it") {
        return;
    }
    use nix::sys::termios::{LocalFlags, tcgetattr};
    let dir = tempfile::tempdir().unwrap();
    let kernel = kernel(dir.path(), &echo());
    let pty = nix::pty::openpty(None, None).unwrap();
    let before = tcgetattr(&pty.slave).unwrap();
    let stdin = pty.slave.try_clone().unwrap();
    let stdout = pty.slave.try_clone().unwrap();
    let child = vmm()
        .arg("--kernel")
        .arg(kernel)
        .stdin(stdin)
        .stdout(stdout)
        .spawn()
        .unwrap();
    let start = Instant::now();
    while tcgetattr(&pty.slave)
        .unwrap()
        .local_flags
        .contains(LocalFlags::ICANON)
    {
        assert!(start.elapsed() < LIMIT, "not raw");
        std::thread::sleep(Duration::from_millis(2));
    }
    let mut terminal = std::fs::File::from(pty.master);
    // Ctrl-C and a doubled Ctrl-A are for the guest, which sends them back.
    terminal.write_all(b"a\x03\x01\x01b").unwrap();
    let mut answer = [0; 4];
    terminal.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"a\x03\x01b");
    terminal.write_all(b"\x01x").unwrap();
    assert_eq!(status(&finish(child)), 0);
    assert_eq!(
        tcgetattr(&pty.slave).unwrap().local_flags,
        before.local_flags
    );
}

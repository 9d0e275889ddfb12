//! The program as a user runs it, with guests of a few instructions: exit statuses, messages, the
//! serial port. They need /dev/kvm, but not one that can boot Linux.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "helpers of tests; a panic is the way to fail"
)]

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

const LIMIT: Duration = Duration::from_secs(30);

/// Where the guests are loaded and started, in 32-bit mode.
const ENTRY: u32 = 0x20_0000;

fn vmm() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_ringside-vmm"));
    command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    command
}

/// Waits for the end, but not for ever.
fn finish(mut child: Child) -> Output {
    let start = Instant::now();
    while child.try_wait().unwrap().is_none() {
        if start.elapsed() > LIMIT {
            child.kill().unwrap();
            panic!("still running: {:?}", child.wait_with_output());
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    child.wait_with_output().unwrap()
}

fn status(output: &Output) -> i32 {
    output.status.code().unwrap_or_else(|| panic!("{output:?}"))
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// A PVH kernel of the given machine code.
fn kernel(dir: &Path, code: &[u8]) -> PathBuf {
    const HEADERS: u64 = 64 + 2 * 56;
    let mut image = b"\x7fELF\x02\x01\x01".to_vec();
    image.resize(16, 0);
    // An executable for x86-64 with two segments.
    image.extend([2, 0, 62, 0, 1, 0, 0, 0]);
    for word in [u64::from(ENTRY), 64, 0] {
        image.extend(word.to_le_bytes());
    }
    image.extend([0, 0, 0, 0, 64, 0, 56, 0, 2, 0, 0, 0, 0, 0, 0, 0]);
    // A note segment, and one to load.
    let load = u64::from(ENTRY);
    for (kind, offset, address, size) in [
        (4u32, HEADERS, 0, 20),
        (1, HEADERS + 20, load, code.len() as u64),
    ] {
        image.extend(kind.to_le_bytes());
        image.extend(5u32.to_le_bytes());
        for word in [offset, address, address, size, size, 4] {
            image.extend(word.to_le_bytes());
        }
    }
    // XEN_ELFNOTE_PHYS32_ENTRY: where to start.
    for word in [4, 4, 18, u32::from_le_bytes(*b"Xen\0"), ENTRY] {
        image.extend(word.to_le_bytes());
    }
    image.extend(code);
    let path = dir.join("kernel");
    std::fs::write(&path, image).unwrap();
    path
}

/// `mov dx, port; mov al, value; out dx, al`
fn out_byte(port: u16, value: u8) -> Vec<u8> {
    let [low, high] = port.to_le_bytes();
    vec![0x66, 0xba, low, high, 0xb0, value, 0xee]
}

/// Enters ACPI S5: `mov dx, 0x604; mov ax, 0x3400; out dx, ax`.
const POWER_OFF: [u8; 10] = [0x66, 0xba, 0x04, 0x06, 0x66, 0xb8, 0x00, 0x34, 0x66, 0xef];

/// `jmp $`
const SPIN: [u8; 2] = [0xeb, 0xfe];

fn print(message: &str) -> Vec<u8> {
    message
        .bytes()
        .flat_map(|byte| out_byte(0x3f8, byte))
        .collect()
}

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

#[test]
fn mistakes_have_a_message_and_a_status() {
    let dir = tempfile::tempdir().unwrap();
    let good = kernel(dir.path(), &POWER_OFF);
    let good = good.to_str().unwrap();
    let not_a_kernel = dir.path().join("text");
    std::fs::write(&not_a_kernel, "hello").unwrap();
    let not_a_kernel = not_a_kernel.to_str().unwrap();
    let wrong_config = dir.path().join("wrong.toml");
    std::fs::write(&wrong_config, "cpuz = 4").unwrap();
    let wrong_config = wrong_config.to_str().unwrap();
    let socket = format!("socket={}/none,reconnect-timeout=0", dir.path().display());
    let socket = socket.as_str();
    for (args, expected, message) in [
        (&[][..], 2, "no kernel given"),
        (&["--kernel"], 2, "a value is required"),
        (&["--bogus"], 2, "unexpected argument"),
        (&["--kernel", good, "--cpus", "0"], 2, "cannot have 0 CPUs"),
        (
            &["--kernel", good, "--cpus", "1000"],
            2,
            "cannot have 1000 CPUs",
        ),
        (&["--kernel", good, "--memory", "0"], 2, "too small"),
        (
            &["--kernel", good, "--memory", "100000000T"],
            2,
            "more than any machine has",
        ),
        (
            &["--kernel", good, "--memory", "900T"],
            1,
            "more than this host's memory",
        ),
        (&["--kernel", good, "--log-level", "=,="], 2, "--log-level"),
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
        (
            &["--kernel", good, "--config", "/no/such.toml"],
            1,
            "cannot read the configuration",
        ),
        (&["--config", wrong_config], 2, "unknown field `cpuz`"),
        (&["--kernel", good, "--blk", socket], 1, "none"),
        (
            &["--kernel", good, "--blk", "num-queues=1"],
            2,
            "missing field `socket`",
        ),
    ] {
        let output = finish(vmm().args(args).spawn().unwrap());
        assert_eq!(status(&output), expected, "{args:?}: {output:?}");
        assert!(
            text(&output.stderr).contains(message),
            "{args:?}: {output:?}"
        );
        assert!(output.stdout.is_empty(), "{args:?}: {output:?}");
    }
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
        kill(Pid::from_raw(child.id().try_into().unwrap()), signal).unwrap();
        let output = finish(child);
        assert_eq!(status(&output), 0, "{output:?}");
        assert!(output.stderr.is_empty(), "{output:?}");
    }
}

/// Waits until a thread of that name runs: signals are served before it starts.
fn wait_for_thread(child: &Child, name: &str) {
    let start = Instant::now();
    let runs = || {
        let tasks = std::fs::read_dir(format!("/proc/{}/task", child.id())).unwrap();
        tasks.flatten().any(|task| {
            std::fs::read_to_string(task.path().join("comm")).is_ok_and(|comm| comm.trim() == name)
        })
    };
    while !runs() {
        assert!(start.elapsed() < LIMIT, "no thread {name}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Sends a signal and waits for the end.
fn terminate(child: Child, signal: Signal) -> Output {
    kill(Pid::from_raw(child.id().try_into().unwrap()), signal).unwrap();
    finish(child)
}

#[test]
fn signals_end_it_while_it_waits_for_a_back_end() {
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
    kill(
        Pid::from_raw(child.id().try_into().unwrap()),
        Signal::SIGTERM,
    )
    .unwrap();
    assert_eq!(status(&finish(child)), 0);
}

#[test]
fn a_terminal_is_raw_until_the_escape_key_ends_it() {
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

//! Guests of a few instructions, and how to run the program with them.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

pub(crate) const LIMIT: Duration = Duration::from_secs(30);

/// Where the guests are loaded and started, in 32-bit mode.
pub(crate) const ENTRY: u32 = 0x20_0000;

pub(crate) fn vmm() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_ringside-vmm"));
    command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    command
}

/// Waits for the end, but not for ever.
pub(crate) fn finish(mut child: Child) -> Output {
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

pub(crate) fn status(output: &Output) -> i32 {
    output.status.code().unwrap_or_else(|| panic!("{output:?}"))
}

pub(crate) fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// A PVH kernel of the given machine code.
pub(crate) fn kernel(dir: &Path, code: &[u8]) -> PathBuf {
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
pub(crate) fn out_byte(port: u16, value: u8) -> Vec<u8> {
    let [low, high] = port.to_le_bytes();
    vec![0x66, 0xba, low, high, 0xb0, value, 0xee]
}

/// Enters ACPI S5: `mov dx, 0x604; mov ax, 0x3400; out dx, ax`.
pub(crate) const POWER_OFF: [u8; 10] = [0x66, 0xba, 0x04, 0x06, 0x66, 0xb8, 0x00, 0x34, 0x66, 0xef];

/// `jmp $`
pub(crate) const SPIN: [u8; 2] = [0xeb, 0xfe];

pub(crate) fn print(message: &str) -> Vec<u8> {
    message
        .bytes()
        .flat_map(|byte| out_byte(0x3f8, byte))
        .collect()
}

/// Waits until a thread of that name runs: signals are served before it starts.
pub(crate) fn wait_for_thread(child: &Child, name: &str) {
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
pub(crate) fn terminate(child: Child, signal: Signal) -> Output {
    kill(Pid::from_raw(child.id().try_into().unwrap()), signal).unwrap();
    finish(child)
}

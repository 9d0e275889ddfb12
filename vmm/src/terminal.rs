//! The user's terminal: raw mode while the guest has it, and the old mode again however the
//! process ends, by return, panic or fatal signal.
#![allow(unsafe_code, reason = "a handler for fatal signals")]

use std::io;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};
use nix::sys::termios::{InputFlags, LocalFlags, SetArg, Termios, tcgetattr, tcsetattr};

/// What to restore. Written once; read by a signal handler.
static SAVED: OnceLock<(RawFd, libc::termios)> = OnceLock::new();
/// Whether the terminal is in raw mode now.
static RAW: AtomicBool = AtomicBool::new(false);

/// Signals that end a process without unwinding.
const FATAL: [Signal; 7] = [
    Signal::SIGSEGV,
    Signal::SIGBUS,
    Signal::SIGILL,
    Signal::SIGFPE,
    Signal::SIGABRT,
    Signal::SIGSYS,
    Signal::SIGQUIT,
];

/// Raw mode, until it is dropped.
#[derive(Debug)]
pub struct RawMode(());

impl RawMode {
    /// Puts standard input into raw mode: each key goes to the guest, also Ctrl-C. Returns `None`
    /// if it is not a terminal. Output processing stays as it is, so that log lines still begin at
    /// the left.
    pub fn enter() -> io::Result<Option<Self>> {
        let stdin = io::stdin();
        let Ok(mut mode) = tcgetattr(&stdin) else {
            return Ok(None);
        };
        SAVED.get_or_init(|| (stdin.as_raw_fd(), mode.clone().into()));
        make_raw(&mut mode);
        RAW.store(true, Ordering::SeqCst);
        install_handlers()?;
        tcsetattr(stdin.as_fd(), SetArg::TCSANOW, &mode)?;
        Ok(Some(Self(())))
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        restore();
    }
}

fn make_raw(mode: &mut Termios) {
    mode.local_flags.remove(
        LocalFlags::ICANON
            | LocalFlags::ECHO
            | LocalFlags::ECHONL
            | LocalFlags::ISIG
            | LocalFlags::IEXTEN,
    );
    mode.input_flags.remove(
        InputFlags::ICRNL
            | InputFlags::INLCR
            | InputFlags::IGNCR
            | InputFlags::IXON
            | InputFlags::ISTRIP
            | InputFlags::BRKINT,
    );
}

/// Gives the terminal its old mode back. May be called from a signal handler, and more than once.
pub fn restore() {
    if RAW.swap(false, Ordering::SeqCst)
        && let Some((fd, mode)) = SAVED.get()
    {
        // SAFETY: `mode` is a valid termios for the whole life of the process, and tcsetattr is
        // async-signal-safe (POSIX.1-2017, 2.4.3).
        unsafe { libc::tcsetattr(*fd, libc::TCSANOW, mode) };
    }
}

fn install_handlers() -> io::Result<()> {
    let previous = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        restore();
        previous(panic);
    }));
    // SA_RESETHAND: the signal that the handler raises again has its default effect.
    let flags = SaFlags::SA_RESETHAND | SaFlags::SA_NODEFER;
    let action = SigAction::new(SigHandler::Handler(on_fatal), flags, SigSet::empty());
    for signal in FATAL {
        // SAFETY: the handler calls async-signal-safe functions only.
        unsafe { sigaction(signal, &action) }?;
    }
    Ok(())
}

extern "C" fn on_fatal(signal: libc::c_int) {
    restore();
    // SAFETY: raise is async-signal-safe.
    unsafe { libc::raise(signal) };
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::pty::openpty;
    use std::process::{Command, Stdio};

    /// Runs this test's binary again with a terminal as its input: `enter_and` then does what the
    /// environment says.
    fn mode_after(how: &str) -> (Termios, Termios) {
        let pty = openpty(None, None).unwrap();
        let before = tcgetattr(&pty.slave).unwrap();
        let status = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "terminal::tests::enter_and"])
            .env("RINGSIDE_TEST_END", how)
            .stdin(Stdio::from(pty.slave.try_clone().unwrap()))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status()
            .unwrap();
        assert_eq!(status.success(), how == "return", "{status}");
        (before, tcgetattr(&pty.slave).unwrap())
    }

    /// Run by the test below in a process of its own; otherwise it has nothing to do.
    #[test]
    fn enter_and() {
        let Ok(how) = std::env::var("RINGSIDE_TEST_END") else {
            return;
        };
        let raw = RawMode::enter().unwrap().unwrap();
        let flags = tcgetattr(io::stdin()).unwrap().local_flags;
        if flags.intersects(LocalFlags::ICANON | LocalFlags::ECHO | LocalFlags::ISIG) {
            std::process::exit(0);
        }
        match how.as_str() {
            "return" => drop(raw),
            "panic" => panic!("on purpose"),
            "abort" => std::process::abort(),
            // SAFETY: raising a signal on ourselves is what this test is for.
            _ => drop(unsafe { libc::raise(libc::SIGSEGV) }),
        }
    }

    #[test]
    fn the_mode_is_restored_however_the_process_ends() {
        for how in ["return", "panic", "abort", "segv"] {
            let (before, after) = mode_after(how);
            assert_eq!(before.local_flags, after.local_flags, "{how}");
            assert_eq!(before.input_flags, after.input_flags, "{how}");
        }
    }
}

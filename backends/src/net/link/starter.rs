//! Starts passt on behalf of a program that has given up the right to: a process with the rights of its user, which
//! reads nothing of a guest.
//!
//! ```text
//!  ringside-net ── which of two requests, a byte ──────────▶ starter ── fork, exec ──▶ passt
//!               ◀─ what came of it, and a connection to it ─
//! ```
//!
//! The arguments are on its command line. So whoever takes the other program over can have another passt, and that is all.
//! There is one at a time, and none when the program has ended.

use std::env;
use std::ffi::{OsStr, OsString};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, ExitCode, ExitStatus};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

/// The argument that makes a program a starter; those of passt follow.
const ARGUMENT: &str = "--start-passt";
/// Name of the program that it starts.
pub(super) const PROGRAM: &str = "passt";
/// How long it may take to answer, in milliseconds, when somebody waits for it: a process is started meanwhile.
const PATIENCE: u16 = 10_000;

/// Request: end the passt there is, and start one. The answer has a connection to it, or an error number.
const START: u8 = 1;
/// Request: wait for the end of the passt there is. The answer is its status, as of wait(2).
const WAIT: u8 = 2;

/// The starter, as the program that asks it sees it. It ends with this.
#[derive(Debug)]
pub(super) struct Starter {
    socket: UnixStream,
}

impl Starter {
    /// Starts it: this program once more.
    pub(super) fn new(arguments: &[OsString]) -> io::Result<Self> {
        let (ours, theirs) = UnixStream::pair()?;
        // Nobody waits for it: it may outlive this program by a moment.
        Command::new(env::current_exe()?)
            .arg(ARGUMENT)
            .args(arguments)
            .stdin(OwnedFd::from(theirs))
            .spawn()?;
        Self::on(ours)
    }

    /// The one at the other end: that of another program, too.
    pub(super) fn on(socket: UnixStream) -> io::Result<Self> {
        socket.set_nonblocking(true)?;
        Ok(Self { socket })
    }

    /// Its socket, for a program that goes on with it.
    pub(super) fn socket(&self) -> io::Result<UnixStream> {
        self.socket.try_clone()
    }

    /// Asks for a new passt. Each request has its answer: until that has come, there is no other one.
    pub(super) fn ask(&self) -> io::Result<()> {
        (&self.socket).write_all(&[START])
    }

    /// A connection to the passt that was asked for, if it has answered.
    pub(super) fn answer(&self) -> io::Result<Option<UnixStream>> {
        let mut errno = [0; 4];
        match self.socket.recv_with_fd(&mut errno) {
            Ok((4, Some(file))) => Ok(Some(OwnedFd::from(file).into())),
            Ok((4, None)) => Err(io::Error::from_raw_os_error(i32::from_le_bytes(errno))),
            Ok(_) => Err(io::ErrorKind::UnexpectedEof.into()),
            Err(error) if error.errno() == libc::EAGAIN => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// Waits until it answers.
    pub(super) fn await_answer(&self) -> io::Result<()> {
        let mut fds = [PollFd::new(self.socket.as_fd(), PollFlags::POLLIN)];
        match poll(&mut fds, PollTimeout::from(PATIENCE))? {
            0 => Err(io::ErrorKind::TimedOut.into()),
            _ => Ok(()),
        }
    }

    /// How the passt that closed its connection has ended.
    pub(super) fn wait(&self) -> io::Result<ExitStatus> {
        (&self.socket).write_all(&[WAIT])?;
        self.await_answer()?;
        let mut status = [0; 4];
        (&self.socket).read_exact(&mut status)?;
        Ok(ExitStatus::from_raw(i32::from_le_bytes(status)))
    }
}

/// Is the starter, if that is what the command line says, until the program that started it has ended.
pub fn serve(mut command_line: impl Iterator<Item = OsString>) -> Option<ExitCode> {
    if command_line.nth(1).as_deref() != Some(OsStr::new(ARGUMENT)) {
        return None;
    }
    let arguments: Vec<OsString> = command_line.collect();
    let served = io::stdin()
        .as_fd()
        .try_clone_to_owned()
        .and_then(|socket| obey(&socket.into(), &arguments));
    Some(match served {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    })
}

fn obey(mut socket: &UnixStream, arguments: &[OsString]) -> io::Result<()> {
    let mut passt = None;
    let mut request = [0];
    while socket.read(&mut request)? > 0 {
        if request == [WAIT] {
            let status = passt.as_mut().map(Child::wait).transpose()?;
            let status = status.unwrap_or_default().into_raw();
            socket.write_all(&status.to_le_bytes())?;
            continue;
        }
        end(passt.take());
        match start(arguments) {
            Ok((child, connection)) => {
                passt = Some(child);
                socket.send_with_fd(&0_i32.to_le_bytes()[..], connection.as_raw_fd())?;
            }
            Err(error) => {
                let errno = error.raw_os_error().unwrap_or(libc::EIO);
                socket.write_all(&errno.to_le_bytes())?;
            }
        }
    }
    end(passt);
    Ok(())
}

/// A passt, and a connection to it: when that closes, it ends.
fn start(arguments: &[OsString]) -> io::Result<(Child, UnixStream)> {
    let (ours, theirs) = UnixStream::pair()?;
    let child = Command::new(PROGRAM)
        .args(["--foreground", "--quiet", "--fd", "0"])
        .args(arguments)
        .stdin(OwnedFd::from(theirs))
        .spawn()?;
    Ok((child, ours))
}

fn end(passt: Option<Child>) {
    if let Some(mut passt) = passt {
        // It may have ended already.
        let _ = passt.kill();
        let _ = passt.wait();
    }
}

//! Both ends of the serial port on the host: standard input and output, a file, a socket, nothing.
//!
//! Input is read by a thread of its own that blocks in `read` or in the port's flow control:
//! standard input may be a terminal, a pipe or a file, is shared with other processes, and so is
//! neither made non-blocking nor given to epoll.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use ringside_control::{ListenError, Peers, SocketFile};

use crate::complaints::Complaints;
use crate::config::SerialTarget;
use crate::devices::serial::{Output, SerialInput};
use crate::exit::{ExitHandle, ExitReason};
use crate::terminal::RawMode;

/// Why the serial port leads nowhere.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The output file.
    #[error("cannot open the serial port's output file {path}")]
    File {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        #[source]
        source: io::Error,
    },
    /// The socket.
    #[error("no socket for the serial port")]
    Socket(#[from] ListenError),
    /// The terminal.
    #[error("cannot put the terminal into raw mode")]
    Terminal(#[source] io::Error),
    /// The input thread.
    #[error("cannot start the serial port's input thread")]
    Thread(#[source] io::Error),
}

/// The host's end of the serial port. Restores the terminal and removes the socket when dropped.
pub struct Console {
    source: Source,
    _raw: Option<RawMode>,
    _socket: Option<SocketFile>,
}

enum Source {
    None,
    Stdin {
        escapes: bool,
    },
    Socket {
        listener: UnixListener,
        client: Client,
    },
}

/// The client that is connected now, if any.
type Client = Arc<Mutex<Option<UnixStream>>>;

/// How long a client may leave its socket full before it is dropped: the guest waits meanwhile.
const CLIENT_PATIENCE: Duration = Duration::from_secs(1);

impl Console {
    /// Opens `target` and returns the writer for the guest's output.
    pub fn open(target: &SerialTarget, exit: &ExitHandle) -> Result<(Self, Output), Error> {
        let mut console = Self {
            source: Source::None,
            _raw: None,
            _socket: None,
        };
        let output: Output = match target {
            SerialTarget::Null => Box::new(io::sink()),
            SerialTarget::File(path) => {
                let open = OpenOptions::new().create(true).append(true).open(path);
                Box::new(open.map_err(|source| Error::File {
                    path: path.clone(),
                    source,
                })?)
            }
            SerialTarget::Stdio => {
                console._raw = RawMode::enter().map_err(Error::Terminal)?;
                console.source = Source::Stdin {
                    escapes: console._raw.is_some(),
                };
                let stdout = io::stdout()
                    .as_fd()
                    .try_clone_to_owned()
                    .map_err(Error::Terminal)?;
                Box::new(Stdout {
                    file: stdout.into(),
                    exit: exit.clone(),
                })
            }
            SerialTarget::Socket(path) => {
                let (file, listener) = SocketFile::listen(path)?;
                let client = Client::default();
                console._socket = Some(file);
                console.source = Source::Socket {
                    listener,
                    client: Arc::clone(&client),
                };
                Box::new(SocketOutput(client))
            }
        };
        Ok((console, output))
    }

    /// Starts to read input, if there is any to read, on a thread that lasts as long as the
    /// process. Clients of a socket are of these users.
    pub fn start(
        &mut self,
        input: SerialInput,
        exit: ExitHandle,
        peers: Peers,
    ) -> Result<(), Error> {
        let builder = std::thread::Builder::new().name("serial input".into());
        match std::mem::replace(&mut self.source, Source::None) {
            Source::None => return Ok(()),
            Source::Stdin { escapes } => builder.spawn(move || read_stdin(escapes, &input, &exit)),
            Source::Socket { listener, client } => {
                builder.spawn(move || serve_socket(&listener, &peers, &client, &input))
            }
        }
        .map(drop)
        .map_err(Error::Thread)
    }
}

/// Standard output without the buffer of [`io::stdout`], which would hold back a prompt.
struct Stdout {
    file: File,
    exit: ExitHandle,
}

impl Write for Stdout {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        loop {
            match self.file.write(data) {
                // Whoever shares our standard output may have made it non-blocking.
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    let mut fds = [PollFd::new(self.file.as_fd(), PollFlags::POLLOUT)];
                    let _ = poll(&mut fds, PollTimeout::NONE);
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                result => return result,
            }
            // A reader that has stopped reading must not keep the machine from ending.
            if self.exit.is_set() {
                return Ok(data.len());
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Writes to the client that is connected, and nowhere while there is none.
struct SocketOutput(Client);

impl Write for SocketOutput {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        let mut client = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(stream) = client.as_mut()
            && let Err(error) = stream.write_all(data)
        {
            tracing::info!(%error, "serial port's client dropped");
            // Its reader, the input thread, sees the end as well and waits for the next client.
            let _ = stream.shutdown(std::net::Shutdown::Both);
            *client = None;
        }
        Ok(data.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn serve_socket(listener: &UnixListener, peers: &Peers, client: &Client, input: &SerialInput) {
    let complaints = Complaints::default();
    loop {
        let accepted = listener.accept().map(|(stream, _)| stream);
        if let Ok(stream) = &accepted
            && let Err(error) = peers.check(stream)
        {
            if complaints.may_complain() {
                tracing::warn!("serial port's socket: {error}");
            }
            continue;
        }
        let connected = accepted.and_then(|stream| {
            stream.set_write_timeout(Some(CLIENT_PATIENCE))?;
            let reader = stream.try_clone()?;
            *client.lock().unwrap_or_else(PoisonError::into_inner) = Some(stream);
            Ok(reader)
        });
        match connected {
            Ok(mut reader) => {
                let result = copy(&mut reader, |bytes| input.feed(bytes));
                tracing::debug!(?result, "serial port's client left");
            }
            Err(error) => {
                tracing::warn!(%error, "serial port's socket");
                // Out of file descriptors, most likely: do not spin until that is over.
                std::thread::sleep(Duration::from_secs(1));
            }
        }
        *client.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
}

fn read_stdin(escapes: bool, input: &SerialInput, exit: &ExitHandle) {
    let mut filter = EscapeFilter::default();
    let result = copy(&mut io::stdin().lock(), |bytes| {
        if !escapes {
            return input.feed(bytes);
        }
        let mut plain = Vec::with_capacity(bytes.len());
        for byte in bytes {
            match filter.next(*byte) {
                Key::Plain(byte) => plain.push(byte),
                Key::Nothing => {}
                Key::Help => eprintln!("{HELP}"),
                Key::End => {
                    exit.end(ExitReason::Requested("Ctrl-A x"));
                    return Ok(());
                }
            }
        }
        input.feed(&plain)
    });
    tracing::debug!(?result, "end of the serial port's input");
}

/// Copies until the end of `reader`.
fn copy(reader: &mut impl Read, mut feed: impl FnMut(&[u8]) -> io::Result<()>) -> io::Result<()> {
    let mut buffer = [0; 256];
    loop {
        let bytes = match reader.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(length) => buffer.get(..length).unwrap_or_default(),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            Err(e) => return Err(e),
        };
        feed(bytes)?;
    }
}

const HELP: &str = "\
Ctrl-A x       end the virtual machine
Ctrl-A Ctrl-A  send Ctrl-A to the guest
Ctrl-A h       this help";

const CTRL_A: u8 = 1;

#[derive(Debug, PartialEq, Eq)]
enum Key {
    Plain(u8),
    Nothing,
    Help,
    End,
}

/// Finds the keys that are for us among those for the guest.
#[derive(Default)]
struct EscapeFilter {
    escaped: bool,
}

impl EscapeFilter {
    fn next(&mut self, byte: u8) -> Key {
        if !std::mem::take(&mut self.escaped) {
            if byte != CTRL_A {
                return Key::Plain(byte);
            }
            self.escaped = true;
            return Key::Nothing;
        }
        match byte {
            CTRL_A => Key::Plain(CTRL_A),
            b'x' | b'X' => Key::End,
            b'h' | b'H' | b'?' => Key::Help,
            _ => Key::Nothing,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stranger::Stranger;

    #[test]
    fn the_escape_key() {
        let mut filter = EscapeFilter::default();
        let keys: Vec<Key> = b"a\x01\x01x\x01h\x01q\x01x"
            .iter()
            .map(|b| filter.next(*b))
            .collect();
        assert_eq!(
            keys,
            [
                Key::Plain(b'a'),
                Key::Nothing,
                Key::Plain(1),
                Key::Plain(b'x'),
                Key::Nothing,
                Key::Help,
                Key::Nothing,
                Key::Nothing,
                Key::Nothing,
                Key::End,
            ]
        );
    }

    #[test]
    fn a_socket_client_types_and_reads_and_another_follows() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let exit = ExitHandle::new().unwrap();
        let (mut console, output) =
            Console::open(&SerialTarget::Socket(path.clone()), &exit).unwrap();
        let irq = vmm_sys_util::eventfd::EventFd::new(0).unwrap();
        let (serial, input) = crate::devices::serial::Serial::new(irq, output);
        console.start(input, exit, Peers::allowing(&[])).unwrap();
        use crate::bus::BusDevice;
        serial.lock().unwrap().write(1, &[1]);
        serial.lock().unwrap().write(4, &[8]);
        for text in [b"one", b"two"] {
            let mut client = UnixStream::connect(&path).unwrap();
            client.write_all(text).unwrap();
            let mut seen = Vec::new();
            while seen.len() < 3 {
                let mut byte = [0];
                serial.lock().unwrap().read(5, &mut byte);
                if byte[0] & 1 != 0 {
                    serial.lock().unwrap().read(0, &mut byte);
                    seen.push(byte[0]);
                    serial.lock().unwrap().write(0, &byte);
                }
            }
            assert_eq!(seen, text);
            let mut echo = [0; 3];
            client.read_exact(&mut echo).unwrap();
            assert_eq!(&echo, text);
        }
    }

    #[test]
    fn another_user_is_no_client_of_the_socket() {
        const TEST: &str = "console::tests::another_user_is_no_client_of_the_socket";
        let Some(stranger) = Stranger::new(TEST, |path| {
            let mut stream = UnixStream::connect(path).unwrap();
            let limit = Duration::from_secs(10);
            stream.set_read_timeout(Some(limit)).unwrap();
            assert_eq!(stream.read(&mut [0]).unwrap(), 0);
        }) else {
            return;
        };
        let (exit, path) = (ExitHandle::new().unwrap(), stranger.socket());
        let target = SerialTarget::Socket(path.clone());
        let (mut console, mut output) = Console::open(&target, &exit).unwrap();
        let irq = vmm_sys_util::eventfd::EventFd::new(0).unwrap();
        let (_serial, input) = crate::devices::serial::Serial::new(irq, Box::new(io::sink()));
        console.start(input, exit, Peers::allowing(&[])).unwrap();
        stranger.start().end();
        let mut client = UnixStream::connect(&path).unwrap();
        client.set_nonblocking(true).unwrap();
        // Until it is the one that is connected.
        while client.read(&mut [0]).is_err() {
            output.write_all(b"x").unwrap();
        }
    }

    #[test]
    fn a_file_is_appended_to() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let target = SerialTarget::File(path.clone());
        let exit = ExitHandle::new().unwrap();
        for text in [b"a", b"b"] {
            let (_console, mut output) = Console::open(&target, &exit).unwrap();
            output.write_all(text).unwrap();
        }
        assert_eq!(std::fs::read(path).unwrap(), b"ab");
        let missing = SerialTarget::File(dir.path().join("no/such"));
        assert!(matches!(
            Console::open(&missing, &exit),
            Err(Error::File { .. })
        ));
    }
}

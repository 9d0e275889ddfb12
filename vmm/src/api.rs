//! The control socket: requests to a machine that runs.
//!
//! One JSON object in each line, both ways. A request has a `command`, its `arguments` if it takes any, and an `id` if the client
//! wants one in the answer. The answer has a `result` or an `error`:
//!
//! ```text
//! {"id": 1, "command": "device-add", "arguments": {"host": "0000:01:10.0", "id": "nic"}}
//! {"id": 1, "result": {"id": "nic"}}
//! {"id": 2, "command": "device-remove", "arguments": {"id": "disk"}}
//! {"id": 2, "error": {"code": "not-found", "message": "there is no device `disk`; ..."}}
//! ```
//!
//! Each client has a thread, so that one which waits, stops reading, or sends half a line holds up nobody; there are only
//! so many, lines are only so long, and a client that does not take its answers is dropped.

use std::fmt;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::config::{SizeValue, VfioOptions};
use crate::listener::SocketFile;

/// Clients at a time.
const MAX_CLIENTS: usize = 16;
/// Bytes in a request, with the end of its line.
const MAX_LINE: usize = 64 * 1024;
/// How long the end waits for answers under way.
const END_LIMIT: Duration = Duration::from_secs(1);
/// How long a client may leave its socket full.
const WRITE_LIMIT: Duration = Duration::from_secs(5);

/// There is no control socket.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The socket.
    #[error("cannot listen on the control socket {}", path.display())]
    Listen {
        /// Its path.
        path: PathBuf,
        /// The system's reason.
        #[source]
        source: io::Error,
    },
    /// Its thread.
    #[error("cannot start the control socket's thread")]
    Thread(#[source] io::Error),
}

/// What can be asked for.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
#[serde(
    tag = "command",
    content = "arguments",
    rename_all = "kebab-case",
    rename_all_fields = "kebab-case",
    deny_unknown_fields
)]
pub enum Command {
    /// What the machine is and does.
    Status,
    /// The devices that came with options, or by request.
    DeviceList,
    /// Plugs a function of the host in; the keys of `--vfio`.
    DeviceAdd(VfioOptions),
    /// Asks the guest to let go of a function, or takes it away.
    DeviceRemove {
        /// Its id.
        id: String,
        /// The guest is not asked: for one that does not answer.
        #[serde(default)]
        force: bool,
    },
    /// Adds to the guest's memory.
    MemoryAdd {
        /// By how much.
        size: SizeValue,
    },
    /// Ends the machine in order.
    PowerOff,
}

/// A request that was not granted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ApiError {
    /// What kind of error; does not change.
    pub code: ErrorCode,
    /// What failed, on what, and what to do.
    pub message: String,
}

/// Kinds of errors.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum ErrorCode {
    /// Not a request.
    BadRequest,
    /// What it names does not exist.
    NotFound,
    /// The state does not allow it.
    Conflict,
    /// It was tried, and failed.
    Failed,
    /// Not now; later, perhaps.
    Busy,
}

impl ApiError {
    /// An error with its causes in the message.
    pub fn new(code: ErrorCode, error: &(dyn std::error::Error + 'static)) -> Self {
        Self {
            code,
            message: with_causes(error),
        }
    }
}

/// An error's message, followed by those of its causes.
pub fn with_causes(error: &(dyn std::error::Error + 'static)) -> String {
    let mut message = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        message.push_str(&format!(": {cause}"));
        source = cause.source();
    }
    message
}

/// Who carries requests out.
pub trait Service: Send + Sync {
    /// Carries one out; gives its result.
    fn call(&self, command: Command) -> Result<Value, ApiError>;
}

/// The control socket; gone when dropped, after requests under way have been answered, or could have been.
#[derive(Debug)]
pub struct ControlSocket {
    _file: SocketFile,
    answering: Arc<Answering>,
}

/// Counts the requests under way.
#[derive(Debug, Default)]
struct Answering {
    count: Mutex<usize>,
    fewer: Condvar,
}

impl Answering {
    fn count(&self, change: isize) {
        let mut count = self.count.lock().unwrap_or_else(PoisonError::into_inner);
        *count = count.saturating_add_signed(change);
        self.fewer.notify_all();
    }

    fn wait_for_none(&self, limit: Duration) {
        let count = self.count.lock().unwrap_or_else(PoisonError::into_inner);
        drop(
            self.fewer
                .wait_timeout_while(count, limit, |count| *count > 0),
        );
    }
}

impl ControlSocket {
    /// Listens at `path`, for this user only.
    pub fn start(path: &std::path::Path, service: Arc<dyn Service>) -> Result<Self, Error> {
        let (file, listener) = SocketFile::listen(path).map_err(|source| Error::Listen {
            path: path.to_owned(),
            source,
        })?;
        let answering = Arc::<Answering>::default();
        let shared = Arc::clone(&answering);
        std::thread::Builder::new()
            .name("api".into())
            .spawn(move || accept(&listener, &service, &shared))
            .map_err(Error::Thread)?;
        Ok(Self {
            _file: file,
            answering,
        })
    }
}

impl Drop for ControlSocket {
    fn drop(&mut self) {
        // Whoever asked for the end is to hear that it comes.
        self.answering.wait_for_none(END_LIMIT);
    }
}

/// Counts the clients.
struct Client(Arc<AtomicUsize>);

impl Drop for Client {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

fn accept(listener: &UnixListener, service: &Arc<dyn Service>, answering: &Arc<Answering>) {
    let clients = Arc::new(AtomicUsize::new(0));
    loop {
        let stream = match listener.accept() {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!(%error, "control socket");
                // Out of file descriptors, most likely: do not spin until that is over.
                std::thread::sleep(Duration::from_secs(1));
                continue;
            }
        };
        let before = clients.fetch_add(1, Ordering::SeqCst);
        let client = Client(Arc::clone(&clients));
        if before >= MAX_CLIENTS {
            let message = format!(
                "the control socket has {MAX_CLIENTS} clients, and no room for another: end one of them"
            );
            tracing::warn!("{message}");
            let code = ErrorCode::Busy;
            // Cannot wait: nothing was sent before.
            let _ = write(&stream, &answer(None, Err(ApiError { code, message })));
            continue;
        }
        let (service, answering) = (Arc::clone(service), Arc::clone(answering));
        let spawned = std::thread::Builder::new()
            .name("api client".into())
            .spawn(move || {
                let _client = client;
                if let Err(error) = serve(&stream, service.as_ref(), &answering) {
                    tracing::debug!(%error, "a client of the control socket is dropped");
                }
            });
        if let Err(error) = spawned {
            tracing::warn!(%error, "control socket");
        }
    }
}

/// Serves one client until it leaves.
fn serve(stream: &UnixStream, service: &dyn Service, answering: &Answering) -> io::Result<()> {
    stream.set_write_timeout(Some(WRITE_LIMIT))?;
    let mut reader = BufReader::new(stream);
    let mut line = Vec::new();
    loop {
        line.clear();
        let limit = u64::try_from(MAX_LINE).unwrap_or(u64::MAX);
        reader.by_ref().take(limit).read_until(b'\n', &mut line)?;
        if line.last() != Some(&b'\n') {
            if line.len() >= MAX_LINE {
                let message = format!("a request has at most {MAX_LINE} bytes");
                write(stream, &answer(None, Err(bad_request(message))))?;
            }
            // The client has closed its end, perhaps within a line.
            return Ok(());
        }
        if !line.trim_ascii().is_empty() {
            answering.count(1);
            let written = write(stream, &respond(&line, service));
            answering.count(-1);
            written?;
        }
    }
}

fn write(mut stream: &UnixStream, answer: &Value) -> io::Result<()> {
    stream.write_all(format!("{answer}\n").as_bytes())
}

fn bad_request(message: impl fmt::Display) -> ApiError {
    ApiError {
        code: ErrorCode::BadRequest,
        message: message.to_string(),
    }
}

/// The answer to one line.
fn respond(line: &[u8], service: &dyn Service) -> Value {
    let request: Value = match serde_json::from_slice(line) {
        Ok(request) => request,
        Err(error) => return answer(None, Err(bad_request(format!("this is not JSON: {error}")))),
    };
    let Value::Object(mut request) = request else {
        return answer(None, Err(bad_request("a request is a JSON object")));
    };
    let id = request.remove("id");
    let command = Command::deserialize(Value::Object(request));
    let result = command.map_err(bad_request).and_then(|command| {
        tracing::debug!(?command, "control socket");
        service.call(command)
    });
    answer(id, result)
}

fn answer(id: Option<Value>, result: Result<Value, ApiError>) -> Value {
    let mut answer = match result {
        Ok(result) => json!({ "result": result }),
        Err(error) => json!({ "error": error }),
    };
    if let (Some(id), Some(answer)) = (id, answer.as_object_mut()) {
        answer.insert("id".into(), id);
    }
    answer
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::Size;

    /// Notes commands, and grants all but removals.
    #[derive(Default)]
    struct Recorder(Mutex<Vec<Command>>);

    impl Service for Recorder {
        fn call(&self, command: Command) -> Result<Value, ApiError> {
            let refused = matches!(command, Command::DeviceRemove { .. });
            self.0.lock().unwrap().push(command);
            if refused {
                return Err(ApiError {
                    code: ErrorCode::NotFound,
                    message: "no".into(),
                });
            }
            Ok(json!({}))
        }
    }

    struct Fixture {
        _dir: tempfile::TempDir,
        path: PathBuf,
        socket: Option<ControlSocket>,
        recorder: Arc<Recorder>,
    }

    fn fixture() -> Fixture {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("api");
        let recorder = Arc::new(Recorder::default());
        let socket = ControlSocket::start(&path, recorder.clone()).unwrap();
        Fixture {
            path,
            _dir: dir,
            socket: Some(socket),
            recorder,
        }
    }

    impl Fixture {
        fn connect(&self) -> UnixStream {
            let stream = UnixStream::connect(&self.path).unwrap();
            let limit = Some(Duration::from_secs(20));
            stream.set_read_timeout(limit).unwrap();
            stream
        }
    }

    fn ask(mut stream: &UnixStream, line: &str) -> Value {
        stream.write_all(line.as_bytes()).unwrap();
        stream.write_all(b"\n").unwrap();
        next(stream)
    }

    fn next(stream: &UnixStream) -> Value {
        let mut line = String::new();
        BufReader::new(stream).read_line(&mut line).unwrap();
        serde_json::from_str(&line).unwrap()
    }

    #[test]
    fn requests_are_answered_in_order() {
        let f = fixture();
        let stream = f.connect();
        assert_eq!(
            ask(&stream, r#"{"id":[1],"command":"status"}"#),
            json!({"id": [1], "result": {}})
        );
        let line = r#"{"command":"device-add","arguments":{"host":"1:0.0","id":"a"}}"#;
        assert_eq!(ask(&stream, line), json!({"result": {}}));
        let line = r#"{"id":2,"command":"device-remove","arguments":{"id":"a"}}"#;
        assert_eq!(
            ask(&stream, line),
            json!({"id": 2, "error": {"code": "not-found", "message": "no"}})
        );
        let line = r#"{"command":"device-remove","arguments":{"id":"a","force":true}}"#;
        ask(&stream, line);
        ask(&stream, r#"{"command":"power-off"}"#);
        for size in [r#""512M""#, "536870912"] {
            let line = format!(r#"{{"command":"memory-add","arguments":{{"size":{size}}}}}"#);
            assert_eq!(ask(&stream, &line), json!({"result": {}}));
        }
        let commands = f.recorder.0.lock().unwrap();
        assert_eq!(commands[0], Command::Status);
        assert!(matches!(&commands[1], Command::DeviceAdd(options)
            if options.clone().resolve().id == "a"));
        let removal = |force| Command::DeviceRemove {
            id: "a".into(),
            force,
        };
        assert_eq!(commands[2..4], [removal(false), removal(true)]);
        assert_eq!(commands[4], Command::PowerOff);
        let size = SizeValue(Size(512 << 20));
        assert_eq!(
            commands[5..],
            [Command::MemoryAdd { size }, Command::MemoryAdd { size }]
        );
    }

    #[test]
    fn what_is_no_request_is_refused_and_the_next_one_is_not() {
        let f = fixture();
        let stream = f.connect();
        for (line, message) in [
            ("{", "not JSON"),
            ("[]", "JSON object"),
            ("7", "JSON object"),
            (r#"{"id":1}"#, "missing field `command`"),
            (r#"{"command":"fly"}"#, "unknown variant `fly`"),
            (
                r#"{"command":"status","more":1}"#,
                "string \"more\", expected",
            ),
            (r#"{"command":"device-remove"}"#, "missing field"),
            (
                r#"{"command":"memory-add","arguments":{"size":"lots"}}"#,
                "`lots` is not a size",
            ),
            (
                r#"{"command":"device-add","arguments":{"host":"nic"}}"#,
                "not a PCI address",
            ),
        ] {
            let answer = ask(&stream, line);
            assert_eq!(answer["error"]["code"], "bad-request", "{line}");
            let text = answer["error"]["message"].as_str().unwrap();
            assert!(text.contains(message), "{line}: {text}");
        }
        assert_eq!(ask(&stream, r#"{"command":"status"}"#)["result"], json!({}));
    }

    #[test]
    fn clients_that_misbehave_hold_up_nobody() {
        let f = fixture();
        let mut half = f.connect();
        half.write_all(b"{\"command\":").unwrap();
        let mut endless = f.connect();
        let _ = endless.write_all(&vec![b'x'; MAX_LINE]);
        assert_eq!(next(&endless)["error"]["code"], "bad-request");
        let mut silent = f.connect();
        silent.set_nonblocking(true).unwrap();
        // Never reads: its answers fill its socket, and it is dropped after a while.
        while silent.write(b"{\"command\":\"status\"}\n").is_ok() {}
        let stream = f.connect();
        assert_eq!(ask(&stream, r#"{"command":"status"}"#)["result"], json!({}));
        drop(half);
    }

    #[test]
    fn there_are_only_so_many_clients() {
        let f = fixture();
        let clients: Vec<_> = (0..MAX_CLIENTS).map(|_| f.connect()).collect();
        for client in &clients {
            ask(client, r#"{"command":"status"}"#);
        }
        let late = f.connect();
        let mut text = String::new();
        (&late).read_to_string(&mut text).unwrap();
        assert!(text.contains(r#""code":"busy""#), "{text}");
        drop(clients);
        // Their threads see that soon.
        let again = || {
            let mut stream = f.connect();
            let _ = stream.write_all(b"{\"command\":\"status\"}\n");
            next(&stream)["result"].is_object()
        };
        assert!((0..200).any(|_| {
            std::thread::sleep(Duration::from_millis(10));
            again()
        }));
    }

    #[test]
    fn what_was_asked_before_the_end_is_answered() {
        /// Takes its time.
        struct Slow(std::sync::mpsc::Sender<()>);
        impl Service for Slow {
            fn call(&self, _: Command) -> Result<Value, ApiError> {
                self.0.send(()).unwrap();
                std::thread::sleep(Duration::from_millis(100));
                Ok(json!({}))
            }
        }
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("api");
        let (send, called) = std::sync::mpsc::channel();
        let socket = ControlSocket::start(&path, Arc::new(Slow(send))).unwrap();
        let mut stream = UnixStream::connect(&path).unwrap();
        stream.write_all(b"{\"command\":\"power-off\"}\n").unwrap();
        called.recv_timeout(Duration::from_secs(20)).unwrap();
        drop(socket);
        stream.set_nonblocking(true).unwrap();
        assert_eq!(next(&stream), json!({"result": {}}));
    }

    #[test]
    fn the_socket_goes_with_the_machine() {
        let mut f = fixture();
        f.socket = None;
        assert!(!f.path.exists());
    }
}

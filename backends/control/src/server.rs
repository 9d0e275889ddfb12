//! The socket of a program that is asked.
//!
//! Each client has a thread, so that one which waits, stops reading, or sends half a line holds up nobody; there are only
//! so many, lines are only so long, and a client that does not take its answers is dropped.

use std::fmt;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use crate::error::{ApiError, ErrorCode};
use crate::http::{self, Wish};
use crate::peers::Peers;
use crate::socket::{ListenError, SocketFile};

/// Clients at a time.
const MAX_CLIENTS: usize = 16;
/// Bytes in a request, with the end of its line; and in the head of one of HTTP.
const MAX_LINE: usize = 64 * 1024;
/// How long the end waits for answers under way.
const END_LIMIT: Duration = Duration::from_secs(1);
/// How long a client may leave its socket full.
const WRITE_LIMIT: Duration = Duration::from_secs(5);

/// There is no control socket.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The socket.
    #[error("no control socket")]
    Listen(#[from] ListenError),
    /// Its thread.
    #[error("cannot start the control socket's thread")]
    Thread(#[source] io::Error),
}

/// Who carries requests out, on the clients' threads.
pub trait Service: Send + Sync + 'static {
    /// What can be asked for: an object with `command`, and `arguments` if there are any.
    type Command: DeserializeOwned + fmt::Debug;

    /// Carries one out; gives its result.
    ///
    /// # Errors
    /// Why it is not granted.
    fn call(&self, command: Self::Command) -> Result<Value, ApiError>;

    /// The same for a request that takes more than its answer: until this returns, `client`'s connection is spoken on by nobody
    /// else, and the client has sent nothing more before it was sent something.
    ///
    /// # Errors
    /// Why it is not granted.
    fn call_with(&self, command: Self::Command, client: &UnixStream) -> Result<Value, ApiError> {
        let _ = client;
        self.call(command)
    }

    /// The page of metrics, if there is one.
    fn metrics(&self) -> Option<String> {
        None
    }
}

/// The control socket; gone when dropped, after requests under way have been answered, or could have been.
#[derive(Debug)]
pub struct ControlSocket {
    file: Option<SocketFile>,
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

/// A control socket on which nobody is answered yet: a program can have it before it gives up the right to make one.
#[derive(Debug)]
pub struct BoundSocket {
    file: SocketFile,
    listener: UnixListener,
    peers: Peers,
}

impl BoundSocket {
    /// Listens at `path`, with mode 0600, for these peers.
    ///
    /// # Errors
    /// [`ListenError`]
    pub fn bind(path: &Path, peers: Peers) -> Result<Self, Error> {
        let (file, listener) = SocketFile::listen(path)?;
        Ok(Self {
            file,
            listener,
            peers,
        })
    }

    /// The socket at `path` that another process listened on.
    ///
    /// # Errors
    /// Its file is not there any more.
    pub fn adopt(path: &Path, listener: UnixListener, peers: Peers) -> io::Result<Self> {
        let file = SocketFile::adopt(path)?;
        Ok(Self {
            file,
            listener,
            peers,
        })
    }

    /// Its socket, for a process that listens there afterwards.
    ///
    /// # Errors
    /// There are too many descriptors.
    pub fn listener(&self) -> io::Result<UnixListener> {
        self.listener.try_clone()
    }

    /// Has requests carried out from now on.
    ///
    /// # Errors
    /// [`Error::Thread`]
    pub fn start<S: Service>(self, service: Arc<S>) -> Result<ControlSocket, Error> {
        let Self {
            file,
            listener,
            peers,
        } = self;
        let answering = Arc::<Answering>::default();
        let shared = Arc::clone(&answering);
        std::thread::Builder::new()
            .name("control".into())
            .spawn(move || accept(&listener, &peers, &service, &shared))
            .map_err(Error::Thread)?;
        Ok(ControlSocket {
            file: Some(file),
            answering,
        })
    }
}

impl ControlSocket {
    /// Listens at `path`, with mode 0600, and has the requests of these peers carried out.
    ///
    /// # Errors
    /// [`Error`]
    pub fn start<S: Service>(path: &Path, peers: Peers, service: Arc<S>) -> Result<Self, Error> {
        BoundSocket::bind(path, peers)?.start(service)
    }

    /// Ends it in this process: another one has its socket, and keeps its file.
    pub fn leave(mut self) {
        if let Some(file) = self.file.take() {
            file.leave();
        }
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

fn accept<S: Service>(
    listener: &UnixListener,
    peers: &Peers,
    service: &Arc<S>,
    answering: &Arc<Answering>,
) {
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
        if let Err(error) = peers.check(&stream) {
            tracing::warn!("control socket: {error}");
            // Said to no effect if nobody listens.
            let _ = write(
                &stream,
                &answer(None, Err(ApiError::new(ErrorCode::Denied, &error))),
            );
            continue;
        }
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
            .name("control client".into())
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
fn serve<S: Service>(
    stream: &UnixStream,
    service: &S,
    answering: &Arc<Answering>,
) -> io::Result<()> {
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
        if let Some(wish) = http::request_line(&line) {
            skip_head(&mut reader)?;
            return write_text(stream, &page(wish, service));
        }
        if !line.trim_ascii().is_empty() {
            answering.count(1);
            let written = write(stream, &respond(&line, service, stream));
            answering.count(-1);
            written?;
        }
    }
}

fn write(stream: &UnixStream, answer: &Value) -> io::Result<()> {
    write_text(stream, &format!("{answer}\n"))
}

fn write_text(mut stream: &UnixStream, text: &str) -> io::Result<()> {
    stream.write_all(text.as_bytes())
}

fn bad_request(message: impl fmt::Display) -> ApiError {
    ApiError::of(ErrorCode::BadRequest, message)
}

/// Reads the rest of a request of HTTP up to the empty line at its end.
fn skip_head(reader: &mut BufReader<&UnixStream>) -> io::Result<()> {
    let mut head = reader.by_ref().take(u64::try_from(MAX_LINE).unwrap_or(0));
    let mut line = Vec::new();
    loop {
        line.clear();
        // At the limit, or at the end of what comes, nothing more is read.
        if head.read_until(b'\n', &mut line)? == 0 || line.trim_ascii().is_empty() {
            return Ok(());
        }
    }
}

fn page<S: Service>(wish: Wish, service: &S) -> String {
    let metrics = match wish {
        Wish::Metrics => service.metrics(),
        Wish::Elsewhere => None,
        Wish::Otherwise => {
            return http::response("405 Method Not Allowed", "only GET is understood\n");
        }
    };
    match metrics {
        Some(text) => http::response("200 OK", &text),
        None => http::response("404 Not Found", "there is no such page\n"),
    }
}

/// The answer to one line.
fn respond<S: Service>(line: &[u8], service: &S, client: &UnixStream) -> Value {
    let request: Value = match serde_json::from_slice(line) {
        Ok(request) => request,
        Err(error) => return answer(None, Err(bad_request(format!("this is not JSON: {error}")))),
    };
    let Value::Object(mut request) = request else {
        return answer(None, Err(bad_request("a request is a JSON object")));
    };
    let id = request.remove("id");
    let command = serde_json::from_value::<S::Command>(Value::Object(request));
    let result = command.map_err(bad_request).and_then(|command| {
        tracing::debug!(?command, "control socket");
        service.call_with(command, client)
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
    use serde::Deserialize;
    use std::path::PathBuf;

    #[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
    #[serde(
        tag = "command",
        content = "arguments",
        rename_all = "kebab-case",
        deny_unknown_fields
    )]
    enum Command {
        Status,
        Remove { id: String },
    }

    /// Notes commands, and grants all but removals.
    #[derive(Default)]
    struct Recorder(Mutex<Vec<Command>>);

    impl Service for Recorder {
        type Command = Command;

        fn call(&self, command: Command) -> Result<Value, ApiError> {
            let refused = matches!(command, Command::Remove { .. });
            self.0.lock().unwrap().push(command);
            if refused {
                return Err(ApiError::of(ErrorCode::NotFound, "no"));
            }
            Ok(json!({}))
        }

        fn metrics(&self) -> Option<String> {
            Some("up 1\n".into())
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
        let path = dir.path().join("control");
        let recorder = Arc::new(Recorder::default());
        let socket = ControlSocket::start(&path, Peers::allowing(&[]), recorder.clone()).unwrap();
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
        let line = r#"{"id":2,"command":"remove","arguments":{"id":"a"}}"#;
        assert_eq!(
            ask(&stream, line),
            json!({"id": 2, "error": {"code": "not-found", "message": "no"}})
        );
        let removal = Command::Remove { id: "a".into() };
        assert_eq!(*f.recorder.0.lock().unwrap(), [Command::Status, removal]);
    }

    #[test]
    fn the_client_of_this_crate_is_understood() {
        let f = fixture();
        let call = |command, arguments| crate::client::call(&f.path, command, &arguments).unwrap();
        assert_eq!(call("status", Value::Null), Ok(json!({})));
        let refused = Err(ApiError::of(ErrorCode::NotFound, "no"));
        assert_eq!(call("remove", json!({"id": "a"})), refused);
        let path = f.path.with_extension("gone");
        assert!(crate::client::call(&path, "status", &Value::Null).is_err());
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
            (r#"{"command":"remove"}"#, "missing field"),
        ] {
            let answer = ask(&stream, line);
            assert_eq!(answer["error"]["code"], "bad-request", "{line}");
            let text = answer["error"]["message"].as_str().unwrap();
            assert!(text.contains(message), "{line}: {text}");
        }
        assert_eq!(ask(&stream, r#"{"command":"status"}"#)["result"], json!({}));
    }

    #[test]
    fn metrics_are_had_by_http() {
        let f = fixture();
        let get = |head: &str| {
            let mut stream = f.connect();
            stream.write_all(head.as_bytes()).unwrap();
            let mut text = String::new();
            stream.read_to_string(&mut text).unwrap();
            text
        };
        let text = get("GET /metrics HTTP/1.1\r\nHost: localhost\r\nAccept: */*\r\n\r\n");
        assert!(text.starts_with("HTTP/1.1 200 OK\r\n"), "{text}");
        assert!(text.contains("Content-Length: 5\r\n"), "{text}");
        assert!(text.ends_with("\r\n\r\nup 1\n"), "{text}");
        assert!(get("GET / HTTP/1.0\r\n\r\n").starts_with("HTTP/1.1 404 "));
        let refused = get("POST /metrics HTTP/1.1\r\n\r\n");
        assert!(refused.starts_with("HTTP/1.1 405 "), "{refused}");
        assert!(refused.contains("\r\nAllow: GET\r\n"), "{refused}");
        // A head without an end is only read so far.
        let endless = format!("GET /metrics HTTP/1.1\r\n{}", "X: y\r\n".repeat(20_000));
        let mut stream = f.connect();
        let _ = stream.write_all(endless.as_bytes());
        let mut start = [0; 15];
        stream.read_exact(&mut start).unwrap();
        assert_eq!(&start, b"HTTP/1.1 200 OK");
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
            type Command = Command;

            fn call(&self, _: Command) -> Result<Value, ApiError> {
                self.0.send(()).unwrap();
                std::thread::sleep(Duration::from_millis(100));
                Ok(json!({}))
            }
        }
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("control");
        let (send, called) = std::sync::mpsc::channel();
        let socket =
            ControlSocket::start(&path, Peers::allowing(&[]), Arc::new(Slow(send))).unwrap();
        let mut stream = UnixStream::connect(&path).unwrap();
        stream.write_all(b"{\"command\":\"status\"}\n").unwrap();
        called.recv_timeout(Duration::from_secs(20)).unwrap();
        drop(socket);
        stream.set_nonblocking(true).unwrap();
        assert_eq!(next(&stream), json!({"result": {}}));
    }

    #[test]
    fn the_socket_goes_with_the_program() {
        let mut f = fixture();
        f.socket = None;
        assert!(!f.path.exists());
    }
}

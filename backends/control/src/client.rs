//! The other side: one request to a program's control socket.

use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

use serde::Deserialize;
use serde_json::{Value, json};

use crate::error::ApiError;

/// Sends one request to the socket at `path`, and waits for its answer as long as it takes. `arguments` may be null.
///
/// # Errors
/// What is wrong with the connection, or with what came as an answer. That the request was refused is no such error, but
/// part of what is returned.
pub fn call(path: &Path, command: &str, arguments: &Value) -> io::Result<Result<Value, ApiError>> {
    #[derive(Deserialize)]
    #[serde(rename_all = "kebab-case")]
    enum Answer {
        Result(Value),
        Error(ApiError),
    }
    let mut request = json!({ "command": command });
    if let (Some(request), false) = (request.as_object_mut(), arguments.is_null()) {
        request.insert("arguments".into(), arguments.clone());
    }
    let mut stream = UnixStream::connect(path)?;
    stream.write_all(format!("{request}\n").as_bytes())?;
    let mut line = String::new();
    BufReader::new(stream).read_line(&mut line)?;
    if line.is_empty() {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok(match serde_json::from_str(&line)? {
        Answer::Result(result) => Ok(result),
        Answer::Error(error) => Err(error),
    })
}

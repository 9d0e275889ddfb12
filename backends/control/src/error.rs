//! Errors, as clients and users see them.

use std::error::Error;
use std::fmt;

use serde::{Deserialize, Serialize};

/// A request that was not granted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ApiError {
    /// What kind of error; does not change.
    pub code: ErrorCode,
    /// What failed, on what, and what to do.
    pub message: String,
}

/// Kinds of errors.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
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
    /// Not for this user.
    Denied,
}

impl ApiError {
    /// An error with its causes in the message.
    pub fn new(code: ErrorCode, error: &(dyn Error + 'static)) -> Self {
        Self::of(code, Chain(error))
    }

    /// An error with this message.
    pub fn of(code: ErrorCode, message: impl fmt::Display) -> Self {
        Self {
            code,
            message: message.to_string(),
        }
    }
}

/// An error and all that caused it, in one line.
#[derive(Debug)]
pub struct Chain<'a>(pub &'a (dyn Error + 'a));

impl fmt::Display for Chain<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)?;
        let mut source = self.0.source();
        while let Some(error) = source {
            write!(f, ": {error}")?;
            source = error.source();
        }
        Ok(())
    }
}

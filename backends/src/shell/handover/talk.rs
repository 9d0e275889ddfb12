//! Messages between a program and the one that takes its place, on a connection to its control socket.
//!
//! ```text
//!  magic  8 bytes │ version  4 │ length  4 │ descriptors  4 │ CRC-32 of the rest  4 │ the rest: JSON
//!  one byte for each descriptor, with it (SCM_RIGHTS)
//! ```
//!
//! Numbers are little-endian.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use ringside_control::ApiError;
use serde::{Deserialize, Serialize};
use thiserror::Error;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

/// What a message begins with.
const MAGIC: [u8; 8] = *b"RINGHAND";
/// Version of all messages, and of what follows them.
pub(in crate::shell) const VERSION: u32 = 2;
/// Length of what comes before the JSON.
const HEADER: usize = 24;
/// The longest message in bytes, without descriptors: more than the state of any device.
const MAX_LEN: u32 = 4 << 20;
/// Most descriptors: those of all queues, and of all memory regions that KVM has slots for.
const MAX_DESCRIPTORS: u32 = 4096;

/// The other program does not speak as it should.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum TalkError {
    /// The connection.
    #[error("the connection to the other program failed")]
    Socket(#[from] io::Error),
    /// What came is no message.
    #[error("the other program speaks otherwise than this one")]
    Garbage,
    /// Another version.
    #[error("the other program hands over by version {found}; this one knows version {VERSION}")]
    Version {
        /// That of the other program.
        found: u32,
    },
    /// Longer than any message is.
    #[error("a message of {len} bytes and {descriptors} descriptors is too long")]
    TooLong {
        /// Its length in bytes.
        len: u32,
        /// Descriptors with it.
        descriptors: u32,
    },
    /// It was changed on its way.
    #[error("the checksum of a message is wrong")]
    Checksum,
    /// It is no description of anything.
    #[error("a message cannot be read")]
    Content(#[source] serde_json::Error),
    /// A descriptor that a message speaks of is not there.
    #[error("a message speaks of descriptor {index}, which did not come with it")]
    Descriptor {
        /// Its number in the message.
        index: u32,
    },
    /// Something else should have come.
    #[error("the other program does not keep to the order of messages")]
    Order,
    /// The other program does not go on.
    #[error("the other program refuses: {0}")]
    Refused(String),
}

/// Descriptors that go with a message.
#[derive(Debug, Default)]
pub(in crate::shell) struct Descriptors(Vec<Option<OwnedFd>>);

impl Descriptors {
    /// Adds one; returns its number.
    pub(in crate::shell) fn add(&mut self, descriptor: impl Into<OwnedFd>) -> u32 {
        let number = u32::try_from(self.0.len()).unwrap_or(u32::MAX);
        self.0.push(Some(descriptor.into()));
        number
    }

    /// Takes one out.
    pub(in crate::shell) fn take(&mut self, index: u32) -> Result<OwnedFd, TalkError> {
        let place = usize::try_from(index).unwrap_or(usize::MAX);
        let found = self.0.get_mut(place).and_then(Option::take);
        found.ok_or(TalkError::Descriptor { index })
    }

    /// The same for a file that may not be there.
    pub(in crate::shell) fn take_file(
        &mut self,
        index: Option<u32>,
    ) -> Result<Option<File>, TalkError> {
        let taken = index.map(|index| self.take(index)).transpose()?;
        Ok(taken.map(File::from))
    }
}

/// One end of the connection.
pub(in crate::shell) struct Talk<'s>(pub(in crate::shell) &'s UnixStream);

impl Talk<'_> {
    /// Sends a message, which may take so long.
    pub(in crate::shell) fn send(
        &self,
        message: &impl Serialize,
        descriptors: &Descriptors,
        patience: Duration,
    ) -> Result<(), TalkError> {
        let body = serde_json::to_vec(message).map_err(TalkError::Content)?;
        let len = u32::try_from(body.len()).unwrap_or(u32::MAX);
        let count = u32::try_from(descriptors.0.len()).unwrap_or(u32::MAX);
        check_len(len, count)?;
        let mut whole = MAGIC.to_vec();
        for word in [VERSION, len, count, crc32fast::hash(&body)] {
            whole.extend(word.to_le_bytes());
        }
        whole.extend(body);
        let mut stream = self.0;
        stream.set_write_timeout(Some(patience))?;
        stream.write_all(&whole)?;
        for descriptor in descriptors.0.iter().flatten() {
            let sent = stream.send_with_fd([0_u8].as_slice(), descriptor.as_raw_fd());
            sent.map_err(io::Error::from)?;
        }
        Ok(())
    }

    /// Receives the next message, which may take so long to come.
    pub(in crate::shell) fn receive<T: for<'de> Deserialize<'de>>(
        &self,
        patience: Duration,
    ) -> Result<(T, Descriptors), TalkError> {
        let mut stream = self.0;
        stream.set_read_timeout(Some(patience))?;
        let mut header = [0; HEADER];
        stream.read_exact(&mut header)?;
        if header.first() == Some(&b'{') {
            return Err(refusal(&header, stream));
        }
        let words = header.strip_prefix(&MAGIC).ok_or(TalkError::Garbage)?;
        let mut words = words
            .chunks_exact(4)
            .filter_map(|word| word.try_into().ok())
            .map(u32::from_le_bytes);
        let mut word = || words.next().unwrap_or(0);
        let (found, len, count, checksum) = (word(), word(), word(), word());
        if found != VERSION {
            return Err(TalkError::Version { found });
        }
        check_len(len, count)?;
        let mut body = vec![0; usize::try_from(len).unwrap_or(0)];
        stream.read_exact(&mut body)?;
        if crc32fast::hash(&body) != checksum {
            return Err(TalkError::Checksum);
        }
        let mut descriptors = Descriptors::default();
        for index in 0..count {
            let received = stream.recv_with_fd(&mut [0]).map_err(io::Error::from)?;
            let (1, Some(file)) = received else {
                return Err(TalkError::Descriptor { index });
            };
            descriptors.add(file);
        }
        let message = serde_json::from_slice(&body).map_err(TalkError::Content)?;
        Ok((message, descriptors))
    }
}

fn check_len(len: u32, descriptors: u32) -> Result<(), TalkError> {
    if len > MAX_LEN || descriptors > MAX_DESCRIPTORS {
        return Err(TalkError::TooLong { len, descriptors });
    }
    Ok(())
}

/// What a control socket answers that does not grant a request.
fn refusal(start: &[u8], stream: &UnixStream) -> TalkError {
    #[derive(Deserialize)]
    struct Answer {
        error: ApiError,
    }
    let limit = u64::from(MAX_LEN);
    let mut line = Vec::new();
    match BufReader::new(start.chain(stream).take(limit)).read_until(b'\n', &mut line) {
        Ok(_) => match serde_json::from_slice::<Answer>(&line) {
            Ok(Answer { error }) => TalkError::Refused(error.message),
            Err(_) => TalkError::Garbage,
        },
        Err(error) => error.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PATIENCE: Duration = Duration::from_secs(10);

    fn pair() -> (UnixStream, UnixStream) {
        UnixStream::pair().unwrap()
    }

    #[test]
    fn messages_come_with_their_descriptors() {
        let (a, b) = pair();
        let mut descriptors = Descriptors::default();
        for text in ["one", "two"] {
            let mut file = tempfile::tempfile().unwrap();
            file.write_all(text.as_bytes()).unwrap();
            descriptors.add(file);
        }
        Talk(&a).send(&"word", &descriptors, PATIENCE).unwrap();
        Talk(&a)
            .send(&7, &Descriptors::default(), PATIENCE)
            .unwrap();
        let (word, mut found) = Talk(&b).receive::<String>(PATIENCE).unwrap();
        assert_eq!(word, "word");
        let file = File::from(found.take(1).unwrap());
        assert_eq!(file.metadata().unwrap().len(), 3);
        assert!(found.take(1).is_err());
        assert!(found.take(2).is_err());
        assert_eq!(Talk(&b).receive::<u8>(PATIENCE).unwrap().0, 7);
    }

    #[test]
    fn what_is_no_message_is_refused() {
        let whole = {
            let (a, mut b) = pair();
            let none = Descriptors::default();
            Talk(&a).send(&"word", &none, PATIENCE).unwrap();
            drop(a);
            let mut whole = Vec::new();
            b.read_to_end(&mut whole).unwrap();
            whole
        };
        let read = |bytes: &[u8]| {
            let (mut a, b) = pair();
            a.write_all(bytes).unwrap();
            drop(a);
            Talk(&b).receive::<String>(PATIENCE).map(|(word, _)| word)
        };
        assert_eq!(read(&whole).unwrap(), "word");
        for cut in 0..whole.len() {
            assert!(read(&whole[..cut]).is_err(), "{cut}");
        }
        for at in 0..whole.len() {
            let mut wrong = whole.clone();
            wrong[at] ^= 0x10;
            assert!(read(&wrong).is_err(), "{at}");
        }
        let line = b"{\"error\":{\"code\":\"conflict\",\"message\":\"not now\"}}\n";
        assert!(matches!(read(line), Err(TalkError::Refused(why)) if why == "not now"));
    }
}

//! How a snapshot is written down: a preamble, then sections, each with its kind, length and checksum.
//!
//! | size | field |
//! | --- | --- |
//! | 8 | [`MAGIC`] |
//! | 4 | [`VERSION`] |
//! | then, for each section: 4 | its kind ([`Kind`]) |
//! | 4 | length of its body in bytes |
//! | 4 | CRC-32 (IEEE 802.3) of kind, length and body |
//! | length | its body |
//!
//! Numbers are little-endian. There is one description first, then memory, then one state, then the end.
//!
//! A file may come from anywhere, so a reader believes nothing: a kind has a greatest length, memory is taken as it comes
//! in and never beforehand, and each checksum is looked at before the body.

use std::io::{self, Read, Write};

use super::Error;

/// The first bytes of a snapshot.
pub const MAGIC: [u8; 8] = *b"RINGSIDE";
/// The version of all that follows. Another one is refused.
pub const VERSION: u32 = 1;

/// Bytes of guest memory in a section at most.
pub const MEMORY_CHUNK: usize = 1 << 20;

/// What a section holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// What machine it is, as JSON.
    Description,
    /// The guest-physical address of pages, 8 bytes, and the pages.
    Memory,
    /// What the machine does, as JSON.
    State,
    /// Nothing: it is complete.
    End,
}

/// Number and greatest length of each kind.
const KINDS: [(Kind, u32, usize); 4] = [
    (Kind::Description, 1, 1 << 20),
    (Kind::Memory, 2, MEMORY_CHUNK + 8),
    (Kind::State, 3, 256 << 20),
    (Kind::End, 4, 0),
];

/// Writes sections.
pub struct Writer<W>(W);

impl<W: Write> Writer<W> {
    /// Writes the preamble.
    ///
    /// # Errors
    /// [`Error::Write`]
    pub fn new(mut out: W) -> Result<Self, Error> {
        let version = VERSION.to_le_bytes();
        out.write_all(&MAGIC)
            .and_then(|()| out.write_all(&version))
            .map_err(Error::Write)?;
        Ok(Self(out))
    }

    /// Writes a section whose body is these parts, one after the other.
    ///
    /// # Errors
    /// [`Error::Write`], [`Error::TooLong`]
    pub fn section(&mut self, kind: Kind, parts: &[&[u8]]) -> Result<(), Error> {
        let length = parts.iter().map(|part| part.len()).sum();
        let (_, number, limit) = row(|(row, ..)| *row == kind).ok_or(Error::Damaged)?;
        let bytes = u32::try_from(length)
            .ok()
            .filter(|_| length <= limit)
            .ok_or(Error::TooLong { length, limit })?;
        let mut head = [number.to_le_bytes(), bytes.to_le_bytes()].concat();
        let checksum = checksum(&head, parts);
        head.extend(checksum.to_le_bytes());
        let parts = std::iter::once(head.as_slice()).chain(parts.iter().copied());
        for part in parts {
            self.0.write_all(part).map_err(Error::Write)?;
        }
        Ok(())
    }

    /// Writes the end, and gives back what was written to.
    ///
    /// # Errors
    /// [`Error::Write`]
    pub fn finish(mut self) -> Result<W, Error> {
        self.section(Kind::End, &[])?;
        self.0.flush().map_err(Error::Write)?;
        Ok(self.0)
    }
}

/// Reads sections.
pub struct Reader<R> {
    input: R,
    body: Vec<u8>,
}

impl<R: Read> Reader<R> {
    /// Reads the preamble.
    ///
    /// # Errors
    /// [`Error::Foreign`], [`Error::Version`], [`Error::CutShort`], [`Error::Read`]
    pub fn new(mut input: R) -> Result<Self, Error> {
        let (mut magic, mut version) = ([0; 8], [0; 4]);
        fill(&mut input, &mut magic)?;
        if magic != MAGIC {
            return Err(Error::Foreign);
        }
        fill(&mut input, &mut version)?;
        let version = u32::from_le_bytes(version);
        if version != VERSION {
            return Err(Error::Version { found: version });
        }
        let body = Vec::new();
        Ok(Self { input, body })
    }

    /// Reads the next section.
    ///
    /// # Errors
    /// [`Error::Damaged`], [`Error::CutShort`], [`Error::Read`]
    pub fn section(&mut self) -> Result<(Kind, &[u8]), Error> {
        let (mut number, mut length, mut expected) = ([0; 4], [0; 4], [0; 4]);
        for field in [&mut number, &mut length, &mut expected] {
            fill(&mut self.input, field)?;
        }
        let head = [number, length].concat();
        let number = u32::from_le_bytes(number);
        let (kind, _, limit) = row(|(_, row, _)| *row == number).ok_or(Error::Damaged)?;
        let length = usize::try_from(u32::from_le_bytes(length)).unwrap_or(usize::MAX);
        if length > limit {
            return Err(Error::Damaged);
        }
        self.body.clear();
        let mut input = self
            .input
            .by_ref()
            .take(u64::try_from(length).unwrap_or(u64::MAX));
        input.read_to_end(&mut self.body).map_err(Error::Read)?;
        if self.body.len() < length {
            return Err(Error::CutShort);
        }
        if checksum(&head, &[&self.body]) != u32::from_le_bytes(expected) {
            return Err(Error::Damaged);
        }
        Ok((kind, &self.body))
    }
}

fn row(wanted: impl Fn(&(Kind, u32, usize)) -> bool) -> Option<(Kind, u32, usize)> {
    KINDS.into_iter().find(wanted)
}

fn checksum(head: &[u8], parts: &[&[u8]]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(head);
    parts.iter().for_each(|part| hasher.update(part));
    hasher.finalize()
}

fn fill(input: &mut impl Read, place: &mut [u8]) -> Result<(), Error> {
    input.read_exact(place).map_err(|error| match error.kind() {
        io::ErrorKind::UnexpectedEof => Error::CutShort,
        _ => Error::Read(error),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn written() -> Vec<u8> {
        let mut writer = Writer::new(Vec::new()).unwrap();
        writer.section(Kind::Description, &[b"{", b"}"]).unwrap();
        writer
            .section(Kind::Memory, &[&[7; 8], &[9; 4096]])
            .unwrap();
        writer.finish().unwrap()
    }

    fn read(bytes: &[u8]) -> Result<Vec<(Kind, Vec<u8>)>, Error> {
        let mut reader = Reader::new(bytes)?;
        let mut sections = Vec::new();
        loop {
            let (kind, body) = reader.section()?;
            sections.push((kind, body.to_vec()));
            if kind == Kind::End {
                return Ok(sections);
            }
        }
    }

    #[test]
    fn what_was_written_is_read() {
        let sections = read(&written()).unwrap();
        let kinds: Vec<_> = sections.iter().map(|(kind, _)| *kind).collect();
        assert_eq!(kinds, [Kind::Description, Kind::Memory, Kind::End]);
        assert_eq!(sections[0].1, b"{}");
        assert_eq!(sections[1].1.len(), 4104);
    }

    #[test]
    fn another_file_and_another_version_are_refused() {
        assert!(matches!(read(b"#!/bin/sh -e\n"), Err(Error::Foreign)));
        let mut bytes = written();
        bytes[8] = 9;
        assert!(matches!(read(&bytes), Err(Error::Version { found: 9 })));
    }

    #[test]
    fn lengths_beyond_the_limit_are_refused_before_anything_is_read() {
        let mut bytes = written();
        bytes.truncate(16);
        bytes.extend(u32::MAX.to_le_bytes());
        bytes.extend([0; 4]);
        assert!(matches!(read(&bytes), Err(Error::Damaged)));
        let mut writer = Writer::new(Vec::new()).unwrap();
        let long = vec![0; MEMORY_CHUNK + 9];
        let error = writer.section(Kind::Memory, &[&long]);
        assert!(matches!(error, Err(Error::TooLong { .. })));
    }

    proptest! {
        #[test]
        fn each_cut_is_found(length in 0..written().len()) {
            prop_assert!(matches!(read(&written()[..length]), Err(Error::CutShort)));
        }

        #[test]
        fn each_changed_byte_is_found(at in 12..written().len(), change in 1u8..) {
            let mut bytes = written();
            bytes[at] ^= change;
            prop_assert!(matches!(read(&bytes), Err(Error::Damaged | Error::CutShort)));
        }
    }
}

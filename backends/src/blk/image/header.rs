//! What the header of a qcow2 image says, as far as it decides whether and how the image is opened
//! (QEMU, docs/interop/qcow2.rst, "Header").

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use thiserror::Error;

use crate::blk::disk::AlignedBlock;

/// "QFI\xfb", the first bytes of an image.
pub(in crate::blk) const MAGIC: [u8; 4] = *b"QFI\xfb";
/// Length of the fields that are read here, of version 3; in version 2, extensions begin before.
const LEN: usize = 104;
/// Length of a version 2 header.
const V2_LEN: u32 = 72;
/// Types of header extensions ("Header extensions").
const END_OF_EXTENSIONS: u32 = 0;
const BACKING_FORMAT: u32 = 0xe279_2aca;

/// Incompatible feature bits ("Incompatible features").
mod incompatible {
    pub(super) const DIRTY: u64 = 1 << 0;
    pub(super) const CORRUPT: u64 = 1 << 1;
    pub(super) const DATA_FILE: u64 = 1 << 2;
    pub(super) const COMPRESSION: u64 = 1 << 3;
    pub(super) const EXTENDED_L2: u64 = 1 << 4;
}

/// An image that is not served.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum HeaderError {
    /// It cannot be read.
    #[error("its header cannot be read")]
    Read(#[source] io::Error),
    /// It is something else.
    #[error("it is not a qcow2 image; leave --format out for a raw one")]
    NotQcow2,
    /// A version that does not exist, or not yet.
    #[error("it is a qcow2 image of version {0}; only 2 and 3 are known")]
    Version(u32),
    /// The cluster size is out of range.
    #[error("its clusters have 2^{0} bytes; only 2^9 to 2^21 are possible")]
    ClusterBits(u32),
    /// Its data is encrypted.
    #[error(
        "it is encrypted, which is not supported; decrypt it with qemu-img convert, or let the guest encrypt"
    )]
    Encrypted,
    /// Its reference counts were not written.
    #[error(
        "it was not closed properly (its dirty bit is set); repair it with qemu-img check -r all"
    )]
    Dirty,
    /// Somebody found its tables to be corrupt.
    #[error("it is marked as corrupt; repair it with qemu-img check -r all")]
    Corrupt,
    /// Its data is in another file.
    #[error(
        "its data is in another file (data_file), which is not supported; convert it with qemu-img convert"
    )]
    DataFile,
    /// Compressed by something else than zlib.
    #[error(
        "its compression type is not zlib, which is not supported; convert it with qemu-img convert -o compression_type=zlib"
    )]
    Compression,
    /// Subclusters.
    #[error(
        "it has extended L2 entries (subclusters), which are not supported; convert it with qemu-img convert -o extended_l2=off"
    )]
    ExtendedL2,
    /// Something newer than this program.
    #[error("it needs features that are not known here (incompatible feature bits {0:#x})")]
    Unknown(u64),
}

/// What is needed of a header.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Header {
    /// 2 or 3.
    pub(super) version: u32,
    /// Binary logarithm of the cluster size in bytes: 9 to 21.
    pub(super) cluster_bits: u32,
    /// The backing file's format, if the header names one.
    pub(super) backing_format: Option<String>,
}

impl Header {
    /// Reads and checks the header of an image.
    pub(super) fn read(file: &File) -> Result<Self, HeaderError> {
        let mut block = AlignedBlock::default();
        let block = block.bytes();
        let mut filled = 0;
        while let Some(rest) = block.get_mut(filled..).filter(|rest| !rest.is_empty()) {
            let at = u64::try_from(filled).unwrap_or(0);
            match file.read_at(rest, at) {
                Ok(0) => break,
                Ok(count) => filled = filled.saturating_add(count),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                // Direct I/O at the end of the file.
                Err(_) if filled > 0 => break,
                Err(e) => return Err(HeaderError::Read(e)),
            }
        }
        Self::parse(block.get(..filled).unwrap_or_default())
    }

    fn parse(bytes: &[u8]) -> Result<Self, HeaderError> {
        if !bytes.starts_with(&MAGIC) {
            return Err(HeaderError::NotQcow2);
        }
        let word = |at: usize| {
            bytes
                .get(at..)
                .and_then(|rest| rest.first_chunk())
                .map(|chunk| u32::from_be_bytes(*chunk))
                .ok_or(HeaderError::NotQcow2)
        };
        let version = word(4)?;
        let cluster_bits = word(20)?;
        if !matches!(version, 2 | 3) {
            return Err(HeaderError::Version(version));
        }
        if bytes.len() < LEN {
            return Err(HeaderError::NotQcow2);
        }
        if !(9..=21).contains(&cluster_bits) {
            return Err(HeaderError::ClusterBits(cluster_bits));
        }
        if word(32)? != 0 {
            return Err(HeaderError::Encrypted);
        }
        let features = if version == 3 {
            u64::from(word(72)?) << 32 | u64::from(word(76)?)
        } else {
            0
        };
        for (bit, error) in [
            (incompatible::CORRUPT, HeaderError::Corrupt),
            (incompatible::DIRTY, HeaderError::Dirty),
            (incompatible::DATA_FILE, HeaderError::DataFile),
            (incompatible::COMPRESSION, HeaderError::Compression),
            (incompatible::EXTENDED_L2, HeaderError::ExtendedL2),
        ] {
            if features & bit != 0 {
                return Err(error);
            }
        }
        if features != 0 {
            return Err(HeaderError::Unknown(features));
        }
        // Header extensions follow the header, whose length is a field of version 3.
        let length = if version == 3 { word(100)? } else { V2_LEN };
        Ok(Self {
            version,
            cluster_bits,
            backing_format: backing_format(bytes, length),
        })
    }
}

/// Looks for the extension that names the backing file's format ("Header extensions").
fn backing_format(bytes: &[u8], length: u32) -> Option<String> {
    let mut rest = bytes.get(usize::try_from(length).ok()?..)?;
    loop {
        let (kind, after) = rest.split_first_chunk()?;
        let (len, after) = after.split_first_chunk()?;
        let len = usize::try_from(u32::from_be_bytes(*len)).ok()?;
        match u32::from_be_bytes(*kind) {
            END_OF_EXTENSIONS => return None,
            BACKING_FORMAT => return String::from_utf8(after.get(..len)?.to_vec()).ok(),
            _ => rest = after.get(len.checked_next_multiple_of(8)?..)?,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(change: impl FnOnce(&mut [u8; 104])) -> Result<Header, HeaderError> {
        let mut bytes = [0; 104];
        bytes[..4].copy_from_slice(&MAGIC);
        bytes[7] = 3;
        bytes[23] = 16;
        change(&mut bytes);
        Header::parse(&bytes)
    }

    #[test]
    fn what_cannot_be_served_is_refused_with_a_reason() {
        let plain = header(|_| ()).unwrap();
        assert_eq!((plain.version, plain.cluster_bits), (3, 16));
        type Change = fn(&mut [u8; 104]);
        let refusals: [(Change, &str); 11] = [
            (|b| b[0] = 0, "not a qcow2 image"),
            (|b| b[7] = 4, "version 4"),
            (|b| b[23] = 8, "2^8 bytes"),
            (|b| b[23] = 22, "2^22 bytes"),
            (|b| b[35] = 2, "encrypted"),
            (|b| b[79] = 1, "dirty bit"),
            (|b| b[79] = 2, "corrupt"),
            (|b| b[79] = 4, "data_file"),
            (|b| b[79] = 8, "compression type"),
            (|b| b[79] = 16, "extended L2"),
            (|b| b[72] = 0x80, "0x8000000000000000"),
        ];
        for (change, reason) in refusals {
            let message = header(change).unwrap_err().to_string();
            assert!(message.contains(reason), "{message}");
        }
        // Version 2 has no feature bits.
        assert!(header(|b| (b[7], b[79]) = (2, 1)).is_ok());
        let with_format = |b: &mut [u8; 104]| {
            b[7] = 2;
            b[72..80].copy_from_slice(&[0x12, 0x34, 0x56, 0x78, 0, 0, 0, 1]);
            b[88..99].copy_from_slice(b"\xe2\x79\x2a\xca\0\0\0\x03raw");
        };
        let format = header(with_format).unwrap().backing_format;
        assert_eq!(format.as_deref(), Some("raw"));
        for len in 0..LEN {
            assert!(Header::parse(&header_bytes()[..len]).is_err(), "{len}");
        }
    }

    fn header_bytes() -> [u8; 104] {
        let mut bytes = [0; 104];
        bytes[..4].copy_from_slice(&MAGIC);
        bytes[7] = 3;
        bytes[23] = 16;
        bytes
    }
}

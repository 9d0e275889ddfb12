//! Writes initramfs images: the kernel's "newc" cpio format (Documentation/driver-api/early-userspace/buffer-format.rst).

use std::io::{self, Write};

/// Writes one archive, entry by entry.
pub struct Archive<W: Write> {
    out: W,
    inode: u32,
}

/// File type bits of `st_mode`.
const S_IFDIR: u32 = 0o040_000;
const S_IFREG: u32 = 0o100_000;

impl<W: Write> Archive<W> {
    /// Starts an archive.
    pub fn new(out: W) -> Self {
        Self { out, inode: 0 }
    }

    fn entry(&mut self, name: &str, mode: u32, data: &[u8]) -> io::Result<()> {
        let too_large = |_| io::Error::from(io::ErrorKind::FileTooLarge);
        let size = u32::try_from(data.len()).map_err(too_large)?;
        let name_size = u32::try_from(name.len() + 1).map_err(too_large)?;
        self.inode += 1;
        // c_magic, then thirteen fields of eight hexadecimal digits: ino, mode, uid, gid, nlink, mtime, filesize,
        // maj, min, rmaj, rmin, namesize, check.
        write!(self.out, "070701")?;
        for field in [self.inode, mode, 0, 0, 1, 0, size, 0, 0, 0, 0, name_size, 0] {
            write!(self.out, "{field:08X}")?;
        }
        self.out.write_all(name.as_bytes())?;
        self.out.write_all(&[0])?;
        // The header (110 bytes) with the name, and the data, each end at a multiple of 4.
        self.pad(110 + name.len() + 1)?;
        self.out.write_all(data)?;
        self.pad(data.len())
    }

    fn pad(&mut self, written: usize) -> io::Result<()> {
        for _ in written..written.next_multiple_of(4) {
            self.out.write_all(&[0])?;
        }
        Ok(())
    }

    /// Adds a directory; its parents have to be there before.
    ///
    /// # Errors
    /// Those of the writer.
    pub fn directory(&mut self, name: &str) -> io::Result<()> {
        self.entry(name, S_IFDIR | 0o755, &[])
    }

    /// Adds a file that can be executed.
    ///
    /// # Errors
    /// Those of the writer; and data over 4 GiB.
    pub fn file(&mut self, name: &str, data: &[u8]) -> io::Result<()> {
        self.entry(name, S_IFREG | 0o755, data)
    }

    /// Writes the end mark and gives the writer back.
    ///
    /// # Errors
    /// Those of the writer.
    pub fn finish(mut self) -> io::Result<W> {
        self.entry("TRAILER!!!", 0, &[])?;
        Ok(self.out)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_are_aligned_and_ended() {
        let mut archive = Archive::new(Vec::new());
        archive.directory("bin").unwrap();
        archive.file("bin/a", b"hello").unwrap();
        let bytes = archive.finish().unwrap();
        // "bin": 110 + 4 = 114 → 116. "bin/a": 110 + 6 = 116, data 5 → 8. Trailer: 110 + 11 = 121 → 124.
        assert_eq!(bytes.len(), 116 + 116 + 8 + 124);
        assert_eq!(&bytes[116..122], b"070701");
        assert_eq!(&bytes[116 + 116..116 + 121], b"hello");
        // filesize is the seventh field.
        assert_eq!(&bytes[116 + 6 + 48..116 + 6 + 56], b"00000005");
    }
}

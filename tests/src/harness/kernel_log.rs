//! What the kernel beside KVM says while a test runs.

use std::fs::File;
use std::io::{ErrorKind, Read, Seek, SeekFrom};
use std::os::unix::fs::OpenOptionsExt;
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::OFlag;

use super::registers::Transfer;
use crate::error::{Doing, LabError, Result};

/// The kernel's log, record by record (Documentation/ABI/testing/dev-kmsg).
const KMSG: &str = "/dev/kmsg";
/// Longer than any record.
const RECORD_SIZE: usize = 8192;
/// How often a record is looked for.
const POLL: Duration = Duration::from_millis(50);

/// The messages from one moment on.
#[derive(Debug)]
pub struct KernelLog {
    file: File,
    messages: Vec<String>,
}

impl KernelLog {
    /// From now on.
    ///
    /// # Errors
    /// Fails if the log cannot be read.
    pub fn follow() -> Result<Self> {
        let doing = || format!("follow {KMSG}");
        let mut file = File::options()
            .read(true)
            .custom_flags(OFlag::O_NONBLOCK.bits())
            .open(KMSG)
            .doing(doing)?;
        file.seek(SeekFrom::End(0)).doing(doing)?;
        Ok(Self {
            file,
            messages: Vec::new(),
        })
    }

    /// All messages so far.
    ///
    /// # Errors
    /// Fails if the log cannot be read.
    pub fn messages(&mut self) -> Result<&[String]> {
        let mut record = [0; RECORD_SIZE];
        loop {
            match self.file.read(&mut record) {
                Ok(length) => {
                    let record = record.get(..length).unwrap_or_default();
                    self.messages.extend(message(record));
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(&self.messages),
                // The oldest were overwritten before they were read.
                Err(error) if error.raw_os_error() == Some(Errno::EPIPE as i32) => {}
                Err(error) => return Err(error).doing(|| format!("read {KMSG}")),
            }
        }
    }

    /// Waits for a message that contains `part`; gives it.
    ///
    /// # Errors
    /// Fails, with the messages so far, if none comes within the limit.
    pub fn wait_for(&mut self, part: &str, limit: Duration) -> Result<String> {
        let deadline = Instant::now() + limit;
        loop {
            let messages = self.messages()?;
            if let Some(message) = messages.iter().find(|message| message.contains(part)) {
                return Ok(message.clone());
            }
            if Instant::now() > deadline {
                return Err(LabError::TimedOut {
                    what: format!("`{part}` in the kernel's log"),
                    limit,
                    output: messages.join("\n"),
                });
            }
            thread::sleep(POLL);
        }
    }
}

/// The text of a record `PRIORITY,SEQUENCE,TIME,FLAGS;TEXT`, whose further lines are other properties.
fn message(record: &[u8]) -> Option<String> {
    let record = String::from_utf8_lossy(record);
    let (_, text) = record.lines().next()?.split_once(';')?;
    Some(text.to_owned())
}

/// What Linux's driver of an Intel IOMMU says of DMA that it stopped (drivers/iommu/intel/dmar.c), up to the reason: of which
/// function, which way, to which address.
#[must_use]
pub fn dma_fault(function: &str, transfer: Transfer, address: u64) -> String {
    // It leaves out the domain.
    let function = function.split_once(':').map_or(function, |(_, rest)| rest);
    format!("[DMA {transfer:?} NO_PASID] Request device [{function}] fault addr {address:#x} ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_of_a_record_is_its_first_line() {
        let record = b"3,1087,41465913,-;DMAR: fault; twice\n SUBSYSTEM=pci\n";
        assert_eq!(message(record).as_deref(), Some("DMAR: fault; twice"));
        assert_eq!(message(b"3,1087"), None);
    }

    #[test]
    fn fault_names_function_and_address() {
        let line = "DMAR: [DMA Read NO_PASID] Request device [01:10.0] fault addr 0x40000000 \
                    [fault reason 0x06] PTE Read access is not set";
        assert!(line.contains(&dma_fault("0000:01:10.0", Transfer::Read, 0x4000_0000)));
        assert!(!line.contains(&dma_fault("0000:01:10.0", Transfer::Write, 0x4000_0000)));
        assert!(!line.contains(&dma_fault("0000:01:10.0", Transfer::Read, 0x400_0000)));
    }
}

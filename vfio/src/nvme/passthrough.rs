//! [`Admin`] over the NVMe driver's passthrough: one ioctl, which gives the kernel a pointer to a command's data.
#![allow(unsafe_code)] // NVME_IOCTL_ADMIN_CMD carries the address of the data as a number.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;

use super::admin::{Admin, AdminError, Command, DATA_LENGTH, Data};

/// `struct nvme_passthru_cmd` (Linux, include/uapi/linux/nvme_ioctl.h).
#[derive(Debug, Default)]
#[repr(C)]
struct PassthroughCommand {
    opcode: u8,
    flags: u8,
    reserved: u16,
    nsid: u32,
    cdw2: u32,
    cdw3: u32,
    metadata: u64,
    address: u64,
    metadata_length: u32,
    data_length: u32,
    cdw10: u32,
    cdw11: u32,
    cdw12: u32,
    cdw13: u32,
    cdw14: u32,
    cdw15: u32,
    /// In milliseconds; 0 for the driver's own.
    timeout: u32,
    result: u32,
}

/// The bits of an opcode that tell which way its data goes (NVM Express Base Specification 2.0, 5).
const DIRECTION: u8 = 0b11;
const DIRECTION_NONE: u8 = 0b00;
const DIRECTION_OUT: u8 = 0b01;
const DIRECTION_IN: u8 = 0b10;

nix::ioctl_readwrite!(
    /// Passes an admin command; gives an errno, or 0, or the controller's status.
    nvme_ioctl_admin_cmd,
    b'N',
    0x41,
    PassthroughCommand
);

/// An open controller.
#[derive(Debug)]
pub struct Passthrough(File);

impl Passthrough {
    /// Opens a controller's device file, such as `/dev/nvme0`.
    ///
    /// # Errors
    /// What the kernel said.
    pub fn open(path: &Path) -> io::Result<Self> {
        OpenOptions::new().read(true).open(path).map(Self)
    }
}

impl Admin for Passthrough {
    fn submit(&mut self, command: &Command, data: Data<'_>) -> Result<u32, AdminError> {
        let length = u32::try_from(DATA_LENGTH).map_err(io::Error::other)?;
        let (address, data_length, direction) = match data {
            Data::Nothing => (0, 0, DIRECTION_NONE),
            Data::In(data) => (data.as_mut_ptr() as u64, length, DIRECTION_IN),
            Data::Out(data) => (data.as_ptr() as u64, length, DIRECTION_OUT),
        };
        if command.opcode & DIRECTION != direction {
            return Err(io::Error::from(io::ErrorKind::InvalidInput).into());
        }
        let mut request = PassthroughCommand {
            opcode: command.opcode,
            nsid: command.nsid,
            cdw10: command.cdw10,
            cdw11: command.cdw11,
            address,
            data_length,
            ..PassthroughCommand::default()
        };
        // SAFETY: the request is the structure that this ioctl takes. What it points to is DATA_LENGTH long and borrowed until
        // after the call, for writing if the opcode's direction, which the driver goes by, is into it.
        let status = unsafe { nvme_ioctl_admin_cmd(self.0.as_raw_fd(), &raw mut request) };
        match u16::try_from(status.map_err(io::Error::from)?) {
            Ok(0) => Ok(request.result),
            Ok(status) => Err(AdminError::Status(status)),
            Err(_) => Err(io::Error::other("the driver gave a status that is none").into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layout_is_the_kernels() {
        assert_eq!(size_of::<PassthroughCommand>(), 72);
        assert_eq!(std::mem::offset_of!(PassthroughCommand, address), 24);
        assert_eq!(std::mem::offset_of!(PassthroughCommand, cdw10), 40);
        assert_eq!(std::mem::offset_of!(PassthroughCommand, result), 68);
    }

    #[test]
    fn file_that_is_no_controller() {
        let mut null = Passthrough::open(Path::new("/dev/null")).unwrap();
        let mut data = [0; DATA_LENGTH];
        let command = super::super::admin::identify_primary(0);
        let error = null.submit(&command, Data::In(&mut data)).unwrap_err();
        assert!(matches!(error, AdminError::Io(_)), "{error:?}");
        // Data that goes the other way does not get to the kernel.
        let Err(AdminError::Io(error)) = null.submit(&command, Data::Out(&data)) else {
            panic!("the command was carried out");
        };
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
    }
}

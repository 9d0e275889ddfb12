//! Signals on eventfds that peers own, sent without ever waiting.
//!
//! A write to an eventfd whose counter is full waits, unless its open file says `O_NONBLOCK`; a peer shares that file, and can
//! fill the counter and take the flag away between any two system calls of ours. What the kernel itself adds to a counter never
//! waits. So the kernel is asked to read nothing from an empty file, and to signal the eventfd when it has (io_submit(2),
//! `IOCB_FLAG_RESFD`): it does both before the call returns. A descriptor that is no eventfd is refused, whatever a write to
//! it would do.
#![allow(
    unsafe_code,
    reason = "the kernel's asynchronous I/O has no safe wrapper that signals a descriptor of the caller's choice"
)]

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::ptr;

use nix::sys::memfd::{MFdFlags, memfd_create};

/// `IOCB_CMD_PREAD` of linux/aio_abi.h.
const PREAD: u16 = 0;
/// `IOCB_FLAG_RESFD` of linux/aio_abi.h: `aio_resfd` is signalled.
const SIGNALS: u32 = 1;

/// Completions that are taken at once; the kernel keeps room for as many at least.
const EVENTS: usize = 64;

/// `struct io_event` of linux/aio_abi.h.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
struct Completion {
    data: u64,
    request: u64,
    result: [i64; 2],
}

/// Signals eventfds.
#[derive(Debug)]
pub(super) struct Signals {
    /// `aio_context_t`.
    context: libc::c_ulong,
    /// The file of which nothing is read.
    empty: OwnedFd,
}

impl Signals {
    /// # Errors
    /// What io_setup(2) or memfd_create(2) said.
    pub(super) fn new() -> io::Result<Self> {
        let empty = memfd_create(c"nothing", MFdFlags::MFD_CLOEXEC)?;
        let mut context: libc::c_ulong = 0;
        // SAFETY: the kernel writes the one word it is pointed to.
        let done = unsafe { libc::syscall(libc::SYS_io_setup, EVENTS, &raw mut context) };
        if done < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(Self { context, empty })
    }

    /// Adds 1 to an eventfd, unless its counter is full.
    ///
    /// # Errors
    /// `InvalidInput` if it is no eventfd; else what io_submit(2) said.
    pub(super) fn signal(&self, event: &impl AsFd) -> io::Result<()> {
        let event = event.as_fd().as_raw_fd();
        match self.submit(event) {
            // There is no room for its completion.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                self.take_completions()?;
                self.submit(event)
            }
            done => done,
        }
    }

    fn submit(&self, event: RawFd) -> io::Result<()> {
        let number = |fd: RawFd| u32::try_from(fd).map_err(|_| io::ErrorKind::InvalidInput);
        // SAFETY: all fields are integers, for which zero is a value.
        let mut request: libc::iocb = unsafe { MaybeUninit::zeroed().assume_init() };
        request.aio_lio_opcode = PREAD;
        request.aio_fildes = number(self.empty.as_raw_fd())?;
        request.aio_flags = SIGNALS;
        request.aio_resfd = number(event)?;
        let mut requests = [&raw mut request];
        let count: libc::c_long = 1;
        // SAFETY: the kernel reads one pointer and the request behind it, and writes that request's key, during the call only.
        let done = unsafe {
            libc::syscall(
                libc::SYS_io_submit,
                self.context,
                count,
                requests.as_mut_ptr(),
            )
        };
        if done < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }

    /// Makes room for as many.
    #[cold]
    fn take_completions(&self) -> io::Result<()> {
        let none = Completion {
            data: 0,
            request: 0,
            result: [0; 2],
        };
        // The kernel has room for more than it was asked for, and reuses none of it before all that is in it was taken.
        loop {
            let mut events = [none; EVENTS];
            let (least, most): (libc::c_long, usize) = (0, EVENTS);
            let no_time = libc::timespec {
                tv_sec: 0,
                tv_nsec: 0,
            };
            // SAFETY: the kernel writes at most `EVENTS` completions and reads the time, during the call only.
            let taken = unsafe {
                libc::syscall(
                    libc::SYS_io_getevents,
                    self.context,
                    least,
                    most,
                    events.as_mut_ptr(),
                    ptr::from_ref(&no_time),
                )
            };
            match usize::try_from(taken) {
                Ok(EVENTS) => {}
                Ok(_) => return Ok(()),
                Err(_) => return Err(io::Error::last_os_error()),
            }
        }
    }
}

impl Drop for Signals {
    fn drop(&mut self) {
        // SAFETY: the context is this one's own, and nothing of it is in progress: all was completed as it was submitted.
        unsafe { libc::syscall(libc::SYS_io_destroy, self.context) };
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Write, pipe};

    use nix::fcntl::{FcntlArg, OFlag, fcntl};
    use nix::sys::eventfd::{EfdFlags, EventFd};

    use super::*;

    #[test]
    fn an_eventfd_counts_what_it_is_told() {
        let signals = Signals::new().unwrap();
        let event = EventFd::from_flags(EfdFlags::EFD_NONBLOCK).unwrap();
        // More than there is room for at once.
        for _ in 0..5000 {
            signals.signal(&event).unwrap();
        }
        assert_eq!(event.read().unwrap(), 5000);
    }

    #[test]
    fn a_full_counter_that_blocks_does_not() {
        let signals = Signals::new().unwrap();
        let event = EventFd::from_flags(EfdFlags::empty()).unwrap();
        event.write(u64::MAX - 1).unwrap();
        let flags = fcntl(&event, FcntlArg::F_GETFL).unwrap();
        assert!(!OFlag::from_bits_retain(flags).contains(OFlag::O_NONBLOCK));
        for _ in 0..100 {
            signals.signal(&event).unwrap();
        }
        assert!(event.read().unwrap() >= u64::MAX - 1);
    }

    #[test]
    fn what_is_no_eventfd_is_refused() {
        let signals = Signals::new().unwrap();
        let (_reader, mut writer) = pipe().unwrap();
        let error = signals.signal(&writer).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
        writer.write_all(b"x").unwrap();
    }
}

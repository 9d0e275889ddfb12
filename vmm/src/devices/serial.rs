//! COM1: a 16550 over `vm-superio`, with flow control towards whoever types.
//!
//! | offset | register |
//! | --- | --- |
//! | 0 | data (divisor, low, while DLAB is set) |
//! | 1 | interrupt enable (divisor, high, while DLAB is set) |
//! | 2 | interrupt identification |
//! | 3 | line control |
//! | 4 | modem control |
//! | 5 | line status |
//! | 6 | modem status |
//! | 7 | scratch |
//!
//! No input is lost: it waits on our side until the guest's driver has enabled the receive
//! interrupt, has connected the interrupt line, and the FIFO has room. What is typed before the
//! driver is up reaches it afterwards instead of vanishing in its probe of the port.

use std::io::{self, Write};
use std::sync::{Arc, Condvar, Mutex, PoisonError};

use serde::{Deserialize, Serialize};
use vm_superio::Trigger;
use vm_superio::serial::{NoEvents, Serial as Uart, SerialState};
use vmm_sys_util::eventfd::EventFd;

use crate::bus::BusDevice;

/// Size of the registers in bytes.
pub const SIZE: u64 = 8;

const DATA: u64 = 0;
const INTERRUPT_ENABLE: u64 = 1;
const INTERRUPT_IDENTIFICATION: u64 = 2;
const LINE_CONTROL: u64 = 3;
const MODEM_CONTROL: u64 = 4;
const LINE_STATUS: u8 = 5;
/// Receive data available.
const IER_RECEIVE: u8 = 1;
/// No interrupt is pending.
const IIR_NONE: u8 = 1;
/// Received data is available.
const IIR_RECEIVED: u8 = 4;
/// There is something to read.
const LSR_DATA_READY: u8 = 1;
/// Offsets 0 and 1 are the divisor.
const LCR_DLAB: u8 = 1 << 7;
/// Connects the port with its interrupt line.
const MCR_OUT2: u8 = 1 << 3;
/// What is sent comes back as received.
const MCR_LOOP: u8 = 1 << 4;

/// The port's interrupt line, an irqfd.
struct IrqLine(EventFd);

impl Trigger for IrqLine {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

/// Where the guest's output goes.
pub type Output = Box<dyn Write + Send>;

/// The port's registers, for another process.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct SerialRegisters {
    divisor: [u8; 2],
    /// Enable and identification.
    interrupt: [u8; 2],
    /// Control and status.
    line: [u8; 2],
    /// Control and status.
    modem: [u8; 2],
    scratch: u8,
    /// What was received and not read.
    fifo: Vec<u8>,
}

/// The port.
pub struct Serial {
    uart: Uart<IrqLine, NoEvents, Output>,
    interrupt_enable: u8,
    line_control: u8,
    modem_control: u8,
    /// Threads that wait for room. Without one nothing is signalled: a condition variable makes a
    /// system call each time, and drivers write to the interrupt enable register all the time.
    waiting: usize,
    /// Signalled when [`Serial::room`] may have become larger.
    room_changed: Arc<Condvar>,
}

impl Serial {
    /// A port that writes to `output` and raises its interrupt through `irq`; and the road for
    /// input.
    pub fn new(irq: EventFd, output: Output) -> (Arc<Mutex<Self>>, SerialInput) {
        Self::with(Uart::new(IrqLine(irq), output), [0; 3])
    }

    fn with(
        uart: Uart<IrqLine, NoEvents, Output>,
        [interrupt_enable, line_control, modem_control]: [u8; 3],
    ) -> (Arc<Mutex<Self>>, SerialInput) {
        let room_changed = Arc::new(Condvar::new());
        let serial = Arc::new(Mutex::new(Self {
            uart,
            interrupt_enable,
            line_control,
            modem_control,
            waiting: 0,
            room_changed: Arc::clone(&room_changed),
        }));
        let input = SerialInput {
            serial: Arc::clone(&serial),
            room_changed,
        };
        (serial, input)
    }

    /// The registers and what is in the FIFO.
    pub fn state(&self) -> SerialRegisters {
        let SerialState {
            baud_divisor_low,
            baud_divisor_high,
            interrupt_enable,
            interrupt_identification,
            line_control,
            line_status,
            modem_control,
            modem_status,
            scratch,
            in_buffer,
        } = self.uart.state();
        SerialRegisters {
            divisor: [baud_divisor_low, baud_divisor_high],
            interrupt: [interrupt_enable, interrupt_identification],
            line: [line_control, line_status],
            modem: [modem_control, modem_status],
            scratch,
            fifo: in_buffer,
        }
    }

    /// A port that goes on as one elsewhere. Its interrupt is raised anew if it was.
    ///
    /// # Errors
    /// The FIFO has more than fits, or the interrupt cannot be raised.
    pub fn restored(
        irq: EventFd,
        output: Output,
        state: &SerialRegisters,
    ) -> io::Result<(Arc<Mutex<Self>>, SerialInput)> {
        let [interrupt_enable, interrupt_identification] = state.interrupt;
        let ([line_control, line_status], [modem_control, modem_status]) =
            (state.line, state.modem);
        let registers = SerialState {
            baud_divisor_low: state.divisor[0],
            baud_divisor_high: state.divisor[1],
            interrupt_enable,
            interrupt_identification,
            line_control,
            line_status,
            modem_control,
            modem_status,
            scratch: state.scratch,
            in_buffer: state.fifo.clone(),
        };
        let uart = Uart::from_state(&registers, IrqLine(irq), NoEvents, output)
            .map_err(io::Error::other)?;
        Ok(Self::with(
            uart,
            [interrupt_enable, line_control, modem_control],
        ))
    }

    /// Whether the driver wants to know of received data, and there is some.
    fn has_data_for_driver(&mut self) -> bool {
        self.interrupt_enable & IER_RECEIVE != 0
            && self.uart.read(LINE_STATUS) & LSR_DATA_READY != 0
    }

    fn wake_waiting(&self) {
        if self.waiting != 0 && self.room() != 0 {
            self.room_changed.notify_all();
        }
    }

    /// How many bytes the guest can be given now.
    fn room(&self) -> usize {
        // A driver's probe also sets bits in the interrupt enable register, to see whether they stay;
        // only one that is in earnest connects the interrupt line as well.
        let listening = self.interrupt_enable & IER_RECEIVE != 0
            && self.modem_control & (MCR_OUT2 | MCR_LOOP) == MCR_OUT2;
        if listening {
            self.uart.fifo_capacity()
        } else {
            0
        }
    }
}

impl BusDevice for Serial {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        let (Ok(register), [byte]) = (u8::try_from(offset), data) else {
            return;
        };
        *byte = self.uart.read(register);
        match offset {
            DATA => self.wake_waiting(),
            // A 16550 reports received data for as long as there is any; `vm-superio` only until the first
            // byte is read. Linux takes 256 bytes, then asks here whether to go on: what is left in the
            // FIFO would wait for an interrupt that never comes.
            INTERRUPT_IDENTIFICATION if *byte & IIR_NONE != 0 && self.has_data_for_driver() => {
                *byte = *byte & !IIR_NONE | IIR_RECEIVED;
            }
            _ => {}
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        let (Ok(register), &[value]) = (u8::try_from(offset), data) else {
            return;
        };
        if let Err(error) = self.uart.write(register, value) {
            // The guest's character is lost, as on a line that nobody is connected to.
            tracing::debug!(%error, "serial port");
        }
        let divisor = self.line_control & LCR_DLAB != 0;
        match offset {
            INTERRUPT_ENABLE if !divisor => self.interrupt_enable = value,
            LINE_CONTROL => self.line_control = value,
            MODEM_CONTROL => self.modem_control = value,
            _ => return,
        }
        self.wake_waiting();
    }
}

/// The road for input to a [`Serial`] port.
#[derive(Clone)]
pub struct SerialInput {
    serial: Arc<Mutex<Serial>>,
    room_changed: Arc<Condvar>,
}

impl SerialInput {
    /// Gives `bytes` to the guest. Blocks until it has taken them into the FIFO.
    pub fn feed(&self, mut bytes: &[u8]) -> io::Result<()> {
        let mut serial = self.serial.lock().unwrap_or_else(PoisonError::into_inner);
        while !bytes.is_empty() {
            if serial.room() == 0 {
                serial.waiting += 1;
                serial = self
                    .room_changed
                    .wait(serial)
                    .unwrap_or_else(PoisonError::into_inner);
                serial.waiting -= 1;
                continue;
            }
            let taken = serial
                .uart
                .enqueue_raw_bytes(bytes)
                .map_err(io::Error::other)?;
            bytes = bytes.get(taken..).unwrap_or_default();
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;
    use std::time::Duration;
    use vmm_sys_util::eventfd::EFD_NONBLOCK;

    #[derive(Clone, Default)]
    struct Sink(Arc<Mutex<Vec<u8>>>);
    impl Write for Sink {
        fn write(&mut self, data: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(data);
            Ok(data.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn port() -> (Arc<Mutex<Serial>>, SerialInput, EventFd, Sink) {
        let irq = EventFd::new(EFD_NONBLOCK).unwrap();
        let sink = Sink::default();
        let (serial, input) = Serial::new(irq.try_clone().unwrap(), Box::new(sink.clone()));
        (serial, input, irq, sink)
    }

    fn read(serial: &Mutex<Serial>, offset: u64) -> u8 {
        let mut data = [0];
        serial.lock().unwrap().read(offset, &mut data);
        data[0]
    }

    #[test]
    fn output_reaches_the_sink() {
        let (serial, _, _, sink) = port();
        for byte in b"hello" {
            serial.lock().unwrap().write(0, &[*byte]);
        }
        serial.lock().unwrap().write(0, b"wide");
        assert_eq!(*sink.0.lock().unwrap(), b"hello");
    }

    #[test]
    fn received_data_is_reported_until_all_is_read() {
        let (serial, input, irq, _) = port();
        serial.lock().unwrap().write(1, &[1]);
        serial.lock().unwrap().write(4, &[MCR_OUT2]);
        input.feed(b"abc").unwrap();
        assert_eq!(irq.read().unwrap(), 1);
        for byte in b"abc" {
            for _ in 0..2 {
                assert_eq!(read(&serial, 2) & 0xf, IIR_RECEIVED);
            }
            assert_eq!(read(&serial, 0), *byte);
        }
        assert_eq!(read(&serial, 2) & 0xf, IIR_NONE);
        // Who has not asked is not told.
        input.feed(b"d").unwrap();
        serial.lock().unwrap().write(1, &[0]);
        read(&serial, 2);
        assert_eq!(read(&serial, 2) & 0xf, IIR_NONE);
    }

    #[test]
    fn input_waits_for_the_driver_and_none_is_lost() {
        let (serial, input, irq, _) = port();
        let text: Vec<u8> = (0..1000u32)
            .map(|i| u8::try_from(i % 251).unwrap())
            .collect();
        let (done, is_done) = mpsc::channel();
        let sent = text.clone();
        let thread = std::thread::spawn(move || {
            input.feed(&sent).unwrap();
            done.send(()).unwrap();
        });
        // The driver's probe reads and writes registers, the divisor included, and gets nothing.
        serial.lock().unwrap().write(3, &[LCR_DLAB]);
        serial.lock().unwrap().write(1, &[1]);
        serial.lock().unwrap().write(3, &[3]);
        serial.lock().unwrap().write(1, &[0xd]);
        serial.lock().unwrap().write(4, &[MCR_LOOP | MCR_OUT2]);
        assert!(is_done.recv_timeout(Duration::from_millis(20)).is_err());
        assert_eq!(read(&serial, 5) & 1, 0);
        assert!(irq.read().is_err());

        serial.lock().unwrap().write(1, &[1]);
        serial.lock().unwrap().write(4, &[MCR_OUT2]);
        let mut received = Vec::new();
        while received.len() < text.len() {
            if read(&serial, 5) & 1 != 0 {
                received.push(read(&serial, 0));
            } else {
                std::thread::yield_now();
            }
        }
        assert_eq!(received, text);
        assert!(irq.read().unwrap() > 0);
        thread.join().unwrap();
    }
}

//! The MC146818 real-time clock and its CMOS memory.
//!
//! | port | register |
//! | --- | --- |
//! | 0x70 | index (bit 7 masks the NMI and is ignored) |
//! | 0x71 | the byte at the index |
//!
//! The clock shows the host's time in UTC, in BCD and 24-hour form. It cannot be set (the host's
//! clock is the authority; what is written to the time registers is dropped) and has no alarm: the
//! DSDT gives it no interrupt.

use std::time::{SystemTime, UNIX_EPOCH};

use crate::bus::BusDevice;

/// Size of the registers in bytes.
pub const SIZE: u64 = 2;
/// Index of the century's byte, which the FADT names.
pub const CENTURY: u8 = 0x32;

const SECONDS: u8 = 0x00;
const MINUTES: u8 = 0x02;
const HOURS: u8 = 0x04;
const WEEKDAY: u8 = 0x06;
const DAY: u8 = 0x07;
const MONTH: u8 = 0x08;
const YEAR: u8 = 0x09;
const STATUS_A: u8 = 0x0a;
const STATUS_B: u8 = 0x0b;
const STATUS_C: u8 = 0x0c;
const STATUS_D: u8 = 0x0d;

/// Status A: 32.768 kHz time base, 1024 Hz rate, no update in progress.
const STATUS_A_VALUE: u8 = 0x26;
/// Status B: 24-hour form, BCD, no interrupts.
const STATUS_B_VALUE: u8 = 0x02;
/// Status D: the battery is good.
const STATUS_D_VALUE: u8 = 0x80;

/// The clock.
pub struct Rtc {
    index: u8,
    memory: [u8; 128],
    now: fn() -> u64,
}

impl Rtc {
    /// A clock that shows the host's time.
    pub fn new() -> Self {
        Self::with_clock(|| {
            SystemTime::now()
                .duration_since(UNIX_EPOCH)
                .map_or(0, |since| since.as_secs())
        })
    }

    fn with_clock(now: fn() -> u64) -> Self {
        Self {
            index: 0,
            memory: [0; 128],
            now,
        }
    }

    /// The index, and the memory.
    pub fn state(&self) -> (u8, Vec<u8>) {
        (self.index, self.memory.to_vec())
    }

    /// Takes over what [`Rtc::state`] gave elsewhere. Returns whether it has as much memory.
    pub fn restore(&mut self, index: u8, memory: &[u8]) -> bool {
        let Ok(memory) = memory.try_into() else {
            return false;
        };
        (self.index, self.memory) = (index & 0x7f, memory);
        true
    }

    fn value(&self) -> u8 {
        let time = Time::from_unix((self.now)());
        match self.index {
            SECONDS => bcd(time.second),
            MINUTES => bcd(time.minute),
            HOURS => bcd(time.hour),
            WEEKDAY => bcd(time.weekday),
            DAY => bcd(time.day),
            MONTH => bcd(time.month),
            YEAR => bcd(time.year % 100),
            CENTURY => bcd(time.year / 100),
            STATUS_A => STATUS_A_VALUE,
            STATUS_B => STATUS_B_VALUE,
            STATUS_C => 0,
            STATUS_D => STATUS_D_VALUE,
            index => self.memory.get(usize::from(index)).copied().unwrap_or(0),
        }
    }
}

impl Default for Rtc {
    fn default() -> Self {
        Self::new()
    }
}

impl BusDevice for Rtc {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        if let (1, [byte]) = (offset, data) {
            *byte = self.value();
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        match (offset, data) {
            (0, &[index]) => self.index = index & 0x7f,
            (1, &[byte]) => {
                // Time and status are never read from here, so this leaves them as they are.
                if let Some(place) = self.memory.get_mut(usize::from(self.index)) {
                    *place = byte;
                }
            }
            _ => {}
        }
    }
}

fn bcd(value: u64) -> u8 {
    u8::try_from(value / 10 % 10 * 16 + value % 10).unwrap_or(0)
}

#[derive(Debug, PartialEq, Eq)]
struct Time {
    year: u64,
    month: u64,
    day: u64,
    weekday: u64,
    hour: u64,
    minute: u64,
    second: u64,
}

impl Time {
    /// The date in the Gregorian calendar. Counts years from 1 March, so that the leap day is the
    /// last of its year, in eras of 400 years, which all have the same number of days.
    fn from_unix(seconds: u64) -> Self {
        let (days, rest) = (seconds / 86_400, seconds % 86_400);
        // From 1 March of the year 0 to 1 January 1970.
        let shifted = days + 719_468;
        let (era, day_of_era) = (shifted / 146_097, shifted % 146_097);
        let year_of_era =
            (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
        let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        // Months of 31, 30, 31, 30, 31 days, repeating: 153 days in five.
        let from_march = (5 * day_of_year + 2) / 153;
        let month = if from_march < 10 {
            from_march + 3
        } else {
            from_march - 9
        };
        Self {
            year: era * 400 + year_of_era + u64::from(month <= 2),
            month,
            day: day_of_year - (153 * from_march + 2) / 5 + 1,
            // 1 January 1970 was a Thursday; the clock's week starts with Sunday as 1.
            weekday: (days + 4) % 7 + 1,
            hour: rest / 3600,
            minute: rest / 60 % 60,
            second: rest % 60,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(rtc: &mut Rtc, index: u8) -> u8 {
        rtc.write(0, &[index]);
        let mut data = [0xff];
        rtc.read(1, &mut data);
        data[0]
    }

    #[test]
    fn dates_are_right() {
        for (unix, year, month, day, weekday) in [
            (0, 1970, 1, 1, 5),
            (951_782_400, 2000, 2, 29, 3),
            (951_868_800, 2000, 3, 1, 4),
            (1_709_164_800, 2024, 2, 29, 5),
            (1_735_603_200, 2024, 12, 31, 3),
            (4_107_542_400, 2100, 3, 1, 2),
        ] {
            let time = Time::from_unix(unix);
            let date = (time.year, time.month, time.day, time.weekday);
            assert_eq!(date, (year, month, day, weekday), "{unix}");
        }
    }

    #[test]
    fn the_clock_shows_the_hosts_time_in_bcd() {
        // 2026-11-23 23:59:58 UTC, a Monday.
        let mut rtc = Rtc::with_clock(|| 1_795_478_398);
        let registers = [CENTURY, YEAR, MONTH, DAY, WEEKDAY, HOURS, MINUTES, SECONDS];
        let values = registers.map(|index| read(&mut rtc, index));
        assert_eq!(values, [0x20, 0x26, 0x11, 0x23, 0x02, 0x23, 0x59, 0x58]);
        assert_eq!(read(&mut rtc, STATUS_B | 0x80), STATUS_B_VALUE);
        assert_eq!(read(&mut rtc, STATUS_D), STATUS_D_VALUE);
    }

    #[test]
    fn memory_keeps_what_is_written_and_the_time_does_not() {
        let mut rtc = Rtc::with_clock(|| 0);
        for index in [0x40, SECONDS] {
            rtc.write(0, &[index]);
            rtc.write(1, &[0x55]);
        }
        assert_eq!(read(&mut rtc, 0x40), 0x55);
        assert_eq!(read(&mut rtc, SECONDS), 0);
        let mut wide = [0xff; 2];
        rtc.read(0, &mut wide);
        assert_eq!(wide, [0xff; 2]);
    }
}

//! Numbers of bytes, as people write them.

use std::fmt;
use std::str::FromStr;

use serde::de::{Deserialize, Deserializer, Error, Visitor};

/// A number of bytes that is written and read with a unit: `512M`, `6G`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Size(pub u64);

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (shift, unit) in [(40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")] {
            if self.0 >> shift != 0 && self.0.trailing_zeros() >= shift {
                return write!(f, "{} {unit}", self.0 >> shift);
            }
        }
        if self.0 >> 20 != 0 {
            return write!(f, "{} MiB", self.0 >> 20);
        }
        write!(f, "{} bytes", self.0)
    }
}

impl FromStr for Size {
    type Err = String;

    /// A decimal number and an optional binary unit: `K`, `M`, `G`, `T`, with or without `iB`.
    /// Without a unit it is in bytes.
    fn from_str(text: &str) -> Result<Self, String> {
        let digits = text
            .find(|c: char| !c.is_ascii_digit())
            .unwrap_or(text.len());
        let (number, unit) = text.split_at(digits);
        let shift = match unit.to_ascii_lowercase().trim_end_matches("ib") {
            "" if unit.is_empty() => 0,
            "k" => 10,
            "m" => 20,
            "g" => 30,
            "t" => 40,
            _ => return Err(format!("`{text}` is not a size: write it like 512M or 6G")),
        };
        let number: u64 = number
            .parse()
            .map_err(|_| format!("`{text}` is not a size: write it like 512M or 6G"))?;
        number
            .checked_mul(1 << shift)
            .map(Size)
            .ok_or_else(|| format!("`{text}` is more than any machine has"))
    }
}

/// A number of bytes, or a text with a unit.
impl<'de> Deserialize<'de> for Size {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Value;
        impl Visitor<'_> for Value {
            type Value = Size;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a number of bytes, or a size such as 512M")
            }

            fn visit_u64<E: Error>(self, bytes: u64) -> Result<Size, E> {
                Ok(Size(bytes))
            }

            fn visit_i64<E: Error>(self, bytes: i64) -> Result<Size, E> {
                u64::try_from(bytes)
                    .map(Size)
                    .map_err(|_| E::custom(format!("{bytes} is not a size")))
            }

            fn visit_str<E: Error>(self, text: &str) -> Result<Size, E> {
                text.parse().map_err(E::custom)
            }
        }
        deserializer.deserialize_any(Value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_and_written() {
        for (text, bytes) in [
            ("0", 0),
            ("4096", 4096),
            ("512M", 512 << 20),
            ("6g", 6 << 30),
            ("1GiB", 1 << 30),
        ] {
            assert_eq!(text.parse(), Ok(Size(bytes)));
        }
        for text in [
            "",
            "G",
            "1X",
            "-1G",
            "1.5G",
            "1 G",
            "1ib",
            "99999999999999999999",
        ] {
            assert!(text.parse::<Size>().is_err(), "{text}");
        }
        assert!("18446744073709551615T".parse::<Size>().is_err());
        assert_eq!(Size(6 << 30).to_string(), "6 GiB");
        assert_eq!(Size(1536 << 20).to_string(), "1536 MiB");
        assert_eq!(Size(12).to_string(), "12 bytes");
    }

    #[test]
    fn requests_have_them_as_numbers_or_as_texts() {
        let read = serde_json::from_str::<Size>;
        assert_eq!(read("4096").unwrap(), Size(4096));
        assert_eq!(read("\"4K\"").unwrap(), Size(4096));
        for wrong in ["-1", "true", "\"lots\"", "1.5", "null"] {
            assert!(read(wrong).is_err(), "{wrong}");
        }
    }
}
